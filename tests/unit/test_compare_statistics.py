"""The statistics of `bapo compare` and the share of repeated 4-grams, against numbers reckoned by hand."""

import numpy as np
import pytest
import torch

from bapo_plugin.answers.prompts import FormerAnswer
from bapo_plugin.commands.compare import read_limits
from bapo_plugin.commands.compare.file import Evaluation
from bapo_plugin.commands.compare.measures import (
    LABELS,
    Level,
    Measure,
    at_equal,
    at_level,
    bootstrap,
    has_curve,
    paired,
    tasks,
    taste_and_forgetting,
    worst_tenth,
)
from bapo_plugin.commands.compare.results import Result
from bapo_plugin.commands.compare.shown import _shortened
from bapo_plugin.commands.compare.words import conclusions
from bapo_plugin.evaluation.recorded import recorded_answers, repetition
from bapo_plugin.evaluation.task_results import compare_tasks
from bapo_plugin.scoring.retention import Retention


@pytest.mark.parametrize(
    "ids, share",
    [
        ([], 0),
        ([7, 7, 7], 0),  # no 4-gram
        ([1, 2, 3, 4, 5], 0),
        ([7] * 8, 4 / 5),  # five 4-grams, all the same
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # 1234 2341 3412 4123 1234
    ],
)
def test_repetition_is_the_share_of_4_grams_said_before(ids, share):
    assert repetition(ids) == pytest.approx(share)


def test_repetition_is_recorded_before_and_after_with_a_paired_error():
    answers = [FormerAnswer("a", [1], [1, 2, 3, 4]), FormerAnswer("b", [2], [7] * 8)]
    kept = Retention(*torch.zeros(4, 2, dtype=torch.float64))
    after = [[7] * 8, [7] * 8]
    found = recorded_answers(answers, {"x": kept, "x × 0.5": kept}, {"x": after})
    assert found["before"]["repetition"]["value"] == pytest.approx(0.4)
    assert found["before"]["repetition_worst_tenth"]["value"] == pytest.approx(0.8)
    measured = found["after"]["x"]["repetition"]
    assert measured["value"] == pytest.approx(0.8)
    # differences 0.8 and 0: their standard deviation is 0.8 / √2, that of the mean 0.4
    assert measured["difference"] == measured["difference_se"] == pytest.approx(0.4)
    assert "repetition" not in found["after"]["x × 0.5"]
    assert found["rows"]["before"]["repetition"] == pytest.approx([0, 0.8])


def test_differences_are_paired():
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 2.0, 4.0, 6.0])
    found = paired("kl", "x", a, b)
    # 1, 0, 1, 2: mean 1, standard deviation √(2/3), error √(2/3)/2
    assert (found.a, found.b, found.difference, found.gain) == (2.5, 3.5, 1.0, -1.0)
    assert found.se == pytest.approx((2 / 3) ** 0.5 / 2) and found.is_clear
    assert paired("kl", "x", a[:1], b[:1]).se is None
    assert not paired("kl", "x", a[:1], b[:1]).is_clear
    assert paired("kl", "x", a, a + 1).is_clear, "no error at all and yet a difference"
    assert not paired("kl", "x", a, a).is_clear


def test_bootstrap_has_the_error_of_a_mean_and_is_the_same_again():
    values = np.random.default_rng(1).normal(size=200)
    error = bootstrap(lambda rows: values[rows].mean(), 200)
    assert error == pytest.approx(values.std() / 200**0.5, rel=0.1)
    assert error == bootstrap(lambda rows: values[rows].mean(), 200)
    assert bootstrap(lambda rows, other: 0.0, 200, 1) is None


def test_worst_tenth_is_that_of_eval():
    drift = torch.randn(48, dtype=torch.float64)
    kept = Retention(torch.ones(48), drift, drift, drift).summary()["worst_tenth"]["value"]
    assert worst_tenth(drift.numpy()) == pytest.approx(kept)
    assert worst_tenth(np.array([3.0, -1.0])) == -1


@pytest.mark.parametrize(
    "level, y",
    [(0.0, 0.0), (1.0, -0.5), (2.0, -1.0), (3.0, -3.0), (4.0, -5.0), (9.0, -5.0), (-1.0, 0.0)],
)
def test_a_level_is_read_off_between_points(level, y):
    assert at_level([0.0, 2.0, 4.0], [0.0, -1.0, -5.0], level) == pytest.approx(y)


def test_a_level_is_where_it_is_first_reached():
    assert at_level([0.5, 0.9, 0.9, 0.7, 0.9], [0.0, 1.0, 2.0, 3.0, 4.0], 0.9) == 1.0


def result(margins, drift, half=None, metric=None):
    """Of one adapter, and of the same at half its strength where `half` has its margins and drift."""
    ids = [str(i) for i in range(len(drift))]

    def rows(of, values):
        if of == "pairs":
            return {"margin": values, "accuracy": [float(v > 0) for v in values]}
        return {"drift": values, "lost": [float(v < -2) for v in values], "agreement": values, "kl": [-v for v in values]}  # fmt: skip

    pairs, probe = {"x": rows("pairs", margins)}, {"x": rows("probe", drift)}
    if half:
        pairs["x × 0.5"], probe["x × 0.5"] = rows("pairs", half[0]), rows("probe", half[1])
    names = dict.fromkeys(pairs, "x")
    found = {
        "model": "m",
        "quantization": None,
        "template": "",
        "asked": {
            "config": None,
            "prompts": None,
            "tasks": [],
            "limit": None,
            "chat": False,
            "max_new_tokens": 64,
            "load_in_4bit": None,
        },
        "weights": {},
        "data": None,
        "adapters": names,
        "scales": {"x × 0.5": 0.5} if half else {},
        "pairs": {"rows": {"id": ids[: len(margins)], "after": pairs}},
        "probe": {"rows": {"prompt": ids, "answer": ids, "after": probe}},
        "retention": None,
        "tasks": [metric] if metric else [],
    }
    found = Evaluation.model_validate(found)
    found.check_rows()
    return Result("file", found, "x", "folder")


def test_at_equal_margin_the_stronger_adapter_is_read_at_a_part_of_its_strength():
    a = result([8.0, 8.0], [-10.0, -30.0], half=([4.0, 4.0], [-2.0, -6.0]))
    b = result([6.0, 6.0], [-1.0, -1.0], half=([3.0, 3.0], [0.0, 0.0]))
    margin, accuracy = at_equal(a, b)
    # margin 6: half way between A's half (4) and all (8): drift between -4 and -20
    assert margin.value == 6 and margin.strengths == pytest.approx((0.75, 1.0))
    drift = margin.measures[0]
    assert (drift.key, drift.a, drift.b) == ("equal_margin.drift", -12.0, -1.0)
    assert drift.se > 0 and drift.gain == 11
    # both rank all right at half their strength, and half way to it (0.75 of it) nothing was measured
    assert accuracy.value == 1 and accuracy.strengths == (0.5, 0.5)
    assert (accuracy.measures[0].a, accuracy.measures[0].b) == (-4.0, 0.0)
    said = conclusions(taste_and_forgetting(a, b), [margin, accuracy])
    assert "its margin is 2.00 ± 0.00 nats lower" in said[0]
    assert said[1].startswith("Forgetting at the equal margin of 6.00 nats")


def test_who_has_learned_nothing_has_no_equal():
    a = result([-1.0, -1.0], [-1.0, -3.0], half=([-0.5, -0.5], [-1.0, -1.0]))
    assert at_equal(a, a) == []


def test_words_say_no_more_than_the_numbers():
    a = result([5.0, 6.0, 7.0, 8.0], [-1.0, -3.0, -2.0, -4.0])
    b = result([5.1, 5.9, 7.2, 7.9], [-0.1, -0.3, -0.2, -0.3])
    taste, kept = conclusions(taste_and_forgetting(a, b), [])
    assert "differ by no more than two standard errors (4 pairs)" in taste
    assert kept.startswith("Forgetting: B is better in drift, ") and "worse" not in kept
    _, kept = conclusions(taste_and_forgetting(a, result([1.0] * 4, [-9.0] * 4)), [])
    assert "not at equal taste" in kept and "worse in drift" in kept
    (taste, kept) = conclusions(taste_and_forgetting(a, a), [])
    assert "no difference beyond two standard errors (4 prompts)" in kept


def test_tasks_are_paired_by_question():
    def entry(metric, ids, values):
        return {
            "task": "quiz",
            "metric": metric,
            "questions": 3,
            "rows": {"id": ids, "after": {"x": values}},
            "after": {"x": {"value": sum(values) / 3}},
        }

    a = result([1.0], [0.0], metric=entry("acc", ["p", "q", "r"], [0.0, 1.0, 0.0]))
    b = result([1.0], [0.0], metric=entry("acc", ["r", "q", "p"], [1.0, 1.0, 0.0]))
    (found,) = tasks(a, b)
    # by question 0, 0, 1
    assert found.key == "quiz.acc" and found.difference == pytest.approx(1 / 3)
    assert found.se == pytest.approx(1 / 3) and found.gain > 0
    a, b = (result([1.0], [0.0], metric=entry("word_perplexity", ["p", "q", "r"], v)) for v in ([1.0] * 3, [2.0] * 3))  # fmt: skip
    assert next(iter(tasks(a, b))).gain == -1


@pytest.mark.parametrize(
    "metric, said, better",
    [
        ("wer", False, -1),
        ("acc", True, 1),
        ("acc", None, 1),
        ("word_perplexity (all)", None, -1),
        ("ter", True, -1),  # lm-eval is wrong
    ],
)
def test_which_way_is_better_lm_eval_says(metric, said, better):
    def results(value):
        outcome = {f"{metric.split()[0]},none": value}
        higher = {} if said is None else {"higher_is_better": {"quiz": {metric.split()[0]: said}}}
        return {"results": {"quiz": outcome}, **higher}

    (entry,) = compare_tasks(results(1.0), {"x": results(2.0)})
    assert entry["higher_is_better"] is said
    a = result([1.0], [0.0], metric=entry)
    b = result([1.0], [0.0], metric={k: v for k, v in entry.items() if k != "higher_is_better"})
    for pair in ((a, a), (a, b), (b, a)):
        assert next(iter(tasks(*pair))).better == better


def test_a_scaled_adapters_curve_ends_at_its_own_scale():
    found = result([4.0, 4.0], [-2.0, -6.0], half=([2.0, 2.0], [-1.0, -1.0]))
    twice = found.found.model_copy(deep=True)
    twice.adapters["x × 2"], twice.scales["x × 2"] = "x", 2.0
    for part, factor in (("pairs", 2), ("probe", 3)):
        after = getattr(twice, part).rows.after
        after["x × 2"] = after["x"].model_copy(deep=True)
        key = "margin" if part == "pairs" else "drift"
        setattr(after["x × 2"], key, [factor * v for v in getattr(after["x"], key)])
    whole, scaled, half = (Result("file", twice, n, "folder") for n in ("x", "x × 2", "x × 0.5"))
    names = {0.5: "x × 0.5", 1.0: "x", 2.0: "x × 2"}
    assert whole.strengths == scaled.strengths == half.strengths == names
    assert has_curve(scaled) and not has_curve(half)
    margin = at_equal(whole, scaled)[0]
    assert margin.value == 4 and margin.strengths == (1.0, 1.0)
    margin = at_equal(scaled, scaled)[0]
    assert margin.value == 8 and margin.strengths == (2.0, 2.0)
    assert margin.measures[0].a == -12


def test_long_settings_are_shown_from_where_they_differ():
    one, two = "x" * 500 + "one", "x" * 500 + "two"
    assert _shortened([one, two]) == ["…" + "x" * 20 + "one", "…" + "x" * 20 + "two"]
    assert _shortened(["a", None]) == ["a", "not set"]
    assert [len(text) for text in _shortened(["", "y" * 500])] == [0, 161]


def test_limits():
    assert read_limits(["a.b=-1e-2", "task, x=1=0"]) == {"a.b": -0.01, "task, x=1": 0.0}


def test_every_measure_of_a_part_has_a_name_and_a_direction():
    assert {better for _, better in LABELS.values()} == {1, -1}
    level = Level("margin", 1.0, (1.0, 1.0), (Measure("equal_margin.kl", "", "", 2, 1.0, 0.5, 0.1, -1),))  # fmt: skip
    assert level.measures[0].gain == 0.5
