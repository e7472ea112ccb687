"""A DPO data set without base responses, through axolotl's commands and `bapo anchors`."""

import json
import os
import re

import pytest
from datasets import Dataset
from helpers import axolotl, preparation, write_config
from tiny import make_rows, save_model, write_jsonl
from typer.testing import CliRunner

from bapo_plugin import models
from bapo_plugin.cli import app
from bapo_plugin.models import answer_beside, shards
from bapo_plugin.prepare import prepare_rows

MADE = "Making base responses"
PASS = "Reference log-probs of the"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anchors")
    save_model(folder / "model", "qwen2")
    rows = [{k: v for k, v in row.items() if k != "base"} for row in make_rows(16)]
    write_jsonl(folder / "rows.jsonl", rows)
    return folder


def config(folder, **changes):
    entry = {
        "path": str(folder / "rows.jsonl"),
        "split": "train",
        "type": "chat_template.default",
        "field_messages": "prompt",
    }
    bapo = {"anchor_weight": 0.5, "anchors": {"max_new_tokens": 12}}
    return write_config(folder, **{"datasets": [entry], "bapo": bapo} | changes)


@pytest.fixture(scope="module")
def runs(folder):
    """preprocess, train, and another train that differs in training settings only."""
    again = {"output_dir": str(folder / "again"), "learning_rate": 0.02, "rl_beta": 0.3}
    return [
        axolotl(folder, "preprocess", config(folder)),
        axolotl(folder, "train", config(folder), "--launcher", "python"),
        axolotl(folder, "train", config(folder, **again), "--launcher", "python"),
    ]


def test_made_in_preprocess_and_never_again(runs, folder):
    preprocess, train, again = runs
    assert MADE in preprocess and "16 rows with 16 distinct prompts; 16 generated" in preprocess
    assert MADE not in train and PASS in train
    assert MADE not in again and PASS not in again
    for output in (preprocess, train):
        assert "Traceback" not in output


def test_training_held_the_generated_responses(runs, folder):
    (state,) = (folder / "out").glob("checkpoint-*/trainer_state.json")
    log = json.loads(state.read_text())["log_history"]
    steps = [entry for entry in log if "loss" in entry]
    assert steps[0]["drift/base"] == pytest.approx(0, abs=1e-4)
    assert abs(steps[-1]["drift/base"]) > 1e-3
    assert [entry for entry in log if "eval_drift/base" in entry]


@pytest.fixture
def environment():
    """Put back afterwards: axolotl notes there that FSDP is on, and our command how much is logged."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("kind", ["deepspeed", "fsdp"])
def test_bapo_anchors_loads_a_sharded_runs_model_whole(runs, folder, environment, kind):
    """So that its answers are there when training starts; DeepSpeed needn't be installed. They are those that
    training without shards made."""
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    layers = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_ram_efficient_loading": True}
    layers["transformer_layer_cls_to_wrap"] = "Qwen2DecoderLayer"
    keys = {
        "deepspeed": {"deepspeed": str(folder / "zero3.json")},
        "fsdp": {"fsdp_version": 2, "fsdp_config": layers},
    }
    path = config(folder, output_dir=str(folder / kind), **keys[kind])
    done = CliRunner().invoke(app, ["anchors", str(path)])
    assert done.exit_code == 0, done.output
    assert MADE not in done.output


def test_a_sharded_run_has_its_base_responses_made_beside_it(folder, environment, monkeypatch):
    """As one of two ranks sees it: the model is never loaded here, and all rows have a response."""
    layers = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    layers["transformer_layer_cls_to_wrap"] = "Qwen2DecoderLayer"
    places = {name: str(folder / "beside" / name) for name in ("prepared", "out")}
    path = config(
        folder,
        dataset_prepared_path=places["prepared"],
        output_dir=places["out"],
        fsdp_version=2,
        fsdp_config=layers,
    )
    work = preparation(path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(models, "load_reference", None)
    assert shards(work.cfg)
    train, evaluation = prepare_rows(work.cfg, work.tokenizer)
    assert len(train) + len(evaluation) == 16
    assert all(row["base_ids"] for rows in (train, evaluation) for row in rows)
    bad = config(folder, base_model=str(folder / "none"), output_dir=places["out"])
    work.cfg.axolotl_config_path = str(bad)
    with pytest.raises(ValueError, match=r"bapo anchors .* failed with exit code .*engine: server"):
        answer_beside(work.cfg)


def test_evaluate_uses_the_same_responses(runs, folder):
    output = axolotl(folder, "evaluate", config(folder), "--launcher", "python")
    assert MADE not in output and PASS not in output
    assert "Loaded the adapter in" in output


def test_bapo_anchors_writes_rows_in_order(runs, folder):
    output = axolotl(
        folder, "anchors", config(folder), "--output", folder / "o.jsonl", program="bapo"
    )
    assert "0 generated, 16 reused" in output and "base_model" not in output
    rows = [json.loads(line) for line in (folder / "o.jsonl").read_text().splitlines()]
    source = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [{k: row[k] for k in source[0]} for row in rows] == source
    assert all(isinstance(row["base"], str) and row["base_cut"] in (True, False) for row in rows)

    # the file is a data set with base responses: nothing is made, and the rows are the same
    entry = {
        "path": str(folder / "o.jsonl"),
        "split": "train",
        "type": "chat_template.default",
        "field_messages": "prompt",
    }
    changes = {"datasets": [entry], "dataset_prepared_path": str(folder / "from-file")}
    output = axolotl(folder, "preprocess", config(folder, **changes))
    assert MADE not in output
    prepared = [
        Dataset.load_from_disk(str(next((folder / name).glob("bapo-datasets-*"))))
        for name in ("prepared", "from-file")
    ]
    assert prepared[0].to_list() == prepared[1].to_list()


def bapo(*arguments):
    # the command sets the level for its process: here it must not outlive the call
    env = {"AXOLOTL_LOG_LEVEL": "WARNING", "AXOLOTL_DO_NOT_TRACK": "1"}
    done = CliRunner().invoke(app, [*map(str, arguments)], env=env)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output


def test_bapo_anchors_explains_and_refuses(runs, folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    output = bapo("anchors", config(folder), "--explain")
    assert "reused:" in output and "16" in output
    changed = config(folder, bapo={"anchors": {"max_new_tokens": 12, "temperature": 1.0}})
    output = bapo("anchors", changed, "--explain")
    assert "to generate:" in output and "generation.temperature" in output and MADE not in output
    for changes, arguments, message in (
        ({}, ("--output", "o.csv"), "must end in .jsonl or .parquet"),
        ({}, ("--output", "no/o.jsonl"), "there is no folder no"),
        ({"rl": "dpo", "bapo": None}, (), "is not a configuration of BAPO"),
        ({"bapo": {"anchors": {"engine": "server"}}}, (), "go together; set both"),
        ({"bapo": {"anchors": {"on_missing": "skip"}}}, (), "on_missing must be generate"),
    ):
        output = bapo("anchors", config(folder, **changes), *arguments)
        assert "Error: " in output and message in output, output[-2000:]


def test_parquet_messages_and_partly_filled_columns(folder):
    rows = [
        {
            "prompt": row["prompt"],
            "chosen": row["chosen"],
            "rejected": row["rejected"],
            "mine": None if i % 2 else [{"role": "assistant", "content": "I said this"}],
        }
        for i, row in enumerate(make_rows(6))
    ]
    Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    entry = {
        "path": str(folder / "rows.parquet"),
        "split": "train",
        "type": "chat_template.default",
        "field_messages": "prompt",
        "field_base": "mine",
    }
    path = config(folder, datasets=[entry], dataset_prepared_path=str(folder / "messages"))
    output = axolotl(folder, "anchors", path, "-o", folder / "o.parquet", program="bapo")
    assert "3 rows with 3 distinct prompts; 3 generated" in output
    written = Dataset.from_parquet(str(folder / "o.parquet")).to_list()
    assert [row["prompt"] for row in written] == [row["prompt"] for row in rows]
    for i, row in enumerate(written):
        (message,) = row["mine"]
        assert message["role"] == "assistant"
        assert (message["content"] == "I said this") == (i % 2 == 0)


def test_bapo_eval_measures_the_held_out_rows(runs, folder):
    """Its drift is the one that the last evaluation of the training logged."""
    output = axolotl(folder, "eval", config(folder), "--max-new-tokens", 8, program="bapo")
    assert MADE not in output and "former answers" in output and "unrelated prompts" in output
    found = json.loads((folder / "out/bapo-eval.json").read_text())
    (state,) = (folder / "out").glob("checkpoint-*/trainer_state.json")
    log = json.loads(state.read_text())["log_history"]
    last = [entry for entry in log if "eval_drift/base" in entry][-1]
    drift = found["retention"]["after"]["out"]["drift"]["value"]
    assert drift == pytest.approx(last["eval_drift/base"], abs=1e-3) and abs(drift) > 1e-3
    assert found["retention"]["prompts"] == 4 and found["probe"]["prompts"] == 48


def test_bapo_anchors_verify_reads_all_that_was_kept(runs, folder):
    result = CliRunner().invoke(app, ["anchors", str(config(folder)), "--verify"])
    assert result.exit_code == 0, result.output
    counts = dict(
        re.findall(r"([\d,]+) entries of (base responses|reference log-probs)", result.output)
    )
    assert len(counts) == 2 and all(int(n) > 10 for n in counts), result.output


def test_bapo_report_shows_how_runs_differ(runs, folder):
    record = json.loads((folder / "again/bapo_run.json").read_text())["config"]
    assert record["rl"] == "bapo" and record["learning_rate"] == 0.02
    assert "trainer_cls" not in record and record["bapo"]["anchor_weight"] == 0.5
    output = axolotl(
        folder,
        *("report", folder / "out", folder / "again", "-o", folder / "r.html"),
        program="bapo",
    )
    assert f"Wrote {folder / 'r.html'}" in output and (folder / "r-drift.png").exists()
    page = (folder / "r.html").read_text()
    assert "learning_rate" in page and "0.02" in page
