"""The arithmetic of benchmarks/forgetting.py: what it compares, and that rows keep their own numbers."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_rows, make_tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def forgetting():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import forgetting

        yield forgetting
    finally:
        sys.path.remove(str(BENCHMARKS))


def curve(*points):
    return [dict(zip(("step", "accuracy", "margin", "drift"), p, strict=True)) for p in points]


@pytest.fixture
def results(forgetting):
    import forgetting_results

    return forgetting_results


def test_drift_at_a_level_is_where_the_curve_first_reaches_it(results):
    points = curve((0, 0.5, 0, 0), (6, 0.8, 10, -2), (12, 0.7, 20, -10), (18, 0.9, 30, -20))
    assert results.at_level(points, "margin", 15) == pytest.approx(-6)
    assert results.at_level(points, "margin", 30) == pytest.approx(-20)
    assert results.at_level(points, "accuracy", 0.65) == pytest.approx(-1)
    assert results.at_level(points, "accuracy", 0.8) == pytest.approx(-2)
    assert results.at_level(points, "margin", 31) is None


def test_runs_are_matched_with_dpo_of_the_same_persona_and_seed(results):
    def row(method, persona, seed, *points):
        return {"method": method, "persona": persona, "seed": seed, "curve": curve(*points)}

    start = (0, 0.5, 0, 0)
    rows = [
        row("DPO", "a", 0, start, (6, 1.0, 20, -10)),
        row("DPO", "a", 1, start, (6, 1.0, 20, -99)),
        row("BAPO hinge 0.03", "a", 0, start, (6, 0.75, 10, -1)),
        row("BAPO hinge 0.03", "b", 0, start, (6, 0.75, 10, -1)),
    ]
    results.add_matched(rows)
    matched = rows[2]["matched"]["margin"]
    assert matched == {"level": 10, "drift": -1, "dpo_drift": -5}
    assert rows[2]["matched"]["accuracy"] == {"level": 0.75, "drift": -1, "dpo_drift": -5}
    assert results.kept(rows[2], "margin") == pytest.approx(0.8)
    assert rows[3]["matched"] == {} and results.kept(rows[3], "margin") is None
    assert results.kept({"matched": {"margin": {"drift": 3, "dpo_drift": -5}}}, "margin") == 1
    assert results.kept({"matched": {"margin": {"drift": 3, "dpo_drift": 5}}}, "margin") is None


def test_every_row_gets_its_own_scores(forgetting):
    """Packs reorder rows; a mix-up here would make every number of the benchmark wrong."""
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer))
    bench = object.__new__(forgetting.Bench)
    bench.args = argparse.Namespace(words=0)
    bench.model, bench.tokenizer, bench.pad = model, tokenizer, 0
    bench.forward = forgetting.ResponseForward(log=lambda text: None, base_tokens=True)
    found = [forgetting.Pair(r["prompt"], r["chosen"], r["rejected"]) for r in make_rows(9)]
    rows = bench.rows(found, None)
    forgetting.uninstall(model)
    for row in rows:
        for name, logp in zip(
            ("chosen_ids", "rejected_ids", "base_ids"), row["reference_logps"], strict=True
        ):
            ids, start = torch.tensor([row["prompt_ids"] + row[name]]), len(row["prompt_ids"])
            with torch.no_grad():
                logps = torch.log_softmax(model(ids).logits[0], -1)
            alone = sum(float(logps[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
            assert logp == pytest.approx(alone, abs=1e-3)
        assert sum(row["reference_base_logps"]) == pytest.approx(alone, abs=1e-3)  # the last one


def test_data_is_whole(forgetting):
    import forgetting_data as data

    assert len(data.easy_questions()) == 200
    assert data.easy_questions() == data.easy_questions()
    for question in data.easy_questions() + data.probe():
        assert len(set(question.choices)) == len(question.choices) >= 2, question
    for persona, (file, *_) in data.PERSONAS.items():
        if file == "personas.jsonl":
            pairs = data.pairs(persona, None, 56, 0)
            assert len({pair.prompt for pair in pairs}) == 56
            assert all(pair.chosen != pair.rejected for pair in pairs)
        else:
            with pytest.raises(SystemExit, match="--data"):
                data.pairs(persona, None, 56, 0)
    trained = {pair.prompt for pair in data.pairs("child", None, 64, 0)}
    assert not trained & set(data.unrelated_prompts())
