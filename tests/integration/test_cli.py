"""axolotl's own commands on `rl: bapo`, each in its own process, on a tiny model."""

import csv
import json
import os
import re
import shutil
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from helpers import BIN, axolotl, write_config
from packaging.version import Version
from tiny import make_rows, save_model, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save_model(folder / "model", "qwen2")
    write_jsonl(folder / "rows.jsonl", make_rows(16, base="mine"))
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """preprocess, then train: what the other tests look at."""
    config = write_config(folder)
    preprocess = axolotl(folder, "preprocess", config)
    train = axolotl(folder, "train", config, "--launcher", "python")
    return config, preprocess, train


def history(folder, out="out"):
    (state,) = (folder / out).glob("checkpoint-*/trainer_state.json")
    return json.loads(state.read_text())["log_history"]


def test_preprocess_stores_rows_and_train_takes_them(trained):
    _, preprocess, train = trained
    assert "Success! Preprocessed data path" in preprocess
    assert "Rendering and tokenising" in preprocess and "Rendering and tokenising" not in train
    assert "Loading prepared rows of datasets" in train


def test_train_logs_the_metrics_and_saves_an_adapter(trained, folder):
    log = history(folder)
    steps = [entry for entry in log if "loss" in entry]
    assert len(steps) == 3
    for entry in steps:
        assert entry["loss"] == pytest.approx(
            entry["loss/preference"] + entry["loss/anchor"], abs=1e-5
        )
        assert {"drift/base", "anchor/active", "rewards/margins", "logps/base"} < entry.keys()
    assert steps[0]["drift/base"] == pytest.approx(0, abs=1e-4)
    assert abs(steps[-1]["drift/chosen"]) > 1e-3, "nothing was learned"
    assert [entry for entry in log if "eval_drift/base" in entry]
    assert (folder / "out/adapter_model.safetensors").exists()
    assert not list((folder / "out").glob("model*")), "the model below the adapter was stored too"
    card = (folder / "out/README.md").read_text()
    assert "An adapter of `model`" in card and "Base-Anchored Preference Optimization" in card
    evaluated = [entry for entry in log if "eval_drift/base" in entry][-1]
    assert f"former answer), nats | {evaluated['eval_drift/base']:+.2f} |" in card
    assert yaml.safe_load(card.split("```yaml")[1].split("```")[0])["rl"] == "bapo"
    assert json.loads((folder / "out/bapo_run.json").read_text())["finished"] is True


def test_evaluate_measures_the_trained_adapter_against_the_model_without(trained, folder):
    output = axolotl(folder, "evaluate", trained[0], "--launcher", "python")
    assert "Loaded the adapter in" in output
    rows = list(csv.DictReader((folder / "out/eval_summary.csv").open()))
    found = {row["metric"]: row["validation"] for row in rows}
    last = [entry for entry in history(folder) if "eval_drift/base" in entry][-1]
    for name in ("drift/chosen", "drift/base", "loss/anchor", "loss"):
        assert float(found[name]) == pytest.approx(last[f"eval_{name}"], abs=1e-3), name
    assert abs(float(found["drift/chosen"])) > 1e-2


def test_evaluate_before_training_says_what_to_do(folder):
    config = write_config(folder, output_dir=str(folder / "untrained"))
    output = axolotl(folder, "evaluate", config, "--launcher", "python", check=False)
    assert (
        "has no trained adapter to evaluate; train first, or name one with `lora_model_dir:`"
        in output
    )


def test_merge_lora_and_inference(trained, folder):
    config = trained[0]
    axolotl(folder, "merge-lora", config, "--lora-model-dir", folder / "out")
    assert list((folder / "out/merged").glob("*.safetensors"))
    output = axolotl(
        folder,
        *("inference", config, "--launcher", "python", "--lora-model-dir", folder / "out"),
        stdin="tell me about the sea\n\x04",
        check=False,
    )
    assert "Give me an instruction" in output and "Error" not in output.split("Give me")[1]


@pytest.mark.skipif(
    Version(version("axolotl")) < Version("0.21.0"),
    reason="before axolotl 0.21 the YAML has to name the plugin",
)
def test_installed_package_is_enough(trained, folder):
    """The same losses without a `plugins:` line."""
    out = str(folder / "by_itself")
    config = write_config(folder, plugins=None, output_dir=out)
    axolotl(folder, "train", config, "--launcher", "python", fresh=True)
    found = [[e["loss"] for e in history(folder, o) if "loss" in e] for o in ("out", out)]
    assert found[0] == found[1] and len(found[0]) == 3


def test_plain_dpo_is_untouched(folder):
    """Byte for byte the same losses with the plugin and without, and not a word from it.

    Without an adapter, since axolotl (0.19) makes the adapter of a DPO run before it sets the seed.
    """
    full = dict.fromkeys(("adapter", "lora_r", "lora_alpha", "lora_target_linear"))
    logs = {}
    for name, plugins in (("with", ["bapo_plugin.BAPOPlugin"]), ("without", None)):
        out = str(folder / f"dpo_{name}")
        config = write_config(folder, rl="dpo", bapo=None, plugins=plugins, output_dir=out, **full)
        output = axolotl(folder, "train", config, "--launcher", "python")
        assert "bapo_plugin" not in re.sub(
            r".*(load|loaded).*plugin.*|.*\"bapo_plugin.BAPOPlugin\".*", "", output
        )
        timing = ("runtime", "per_second", "flos")
        logs[name] = json.dumps(
            [{k: v for k, v in e.items() if not k.endswith(timing)} for e in history(folder, out)]
        )
        weights = (Path(out) / "model.safetensors").read_bytes()
        logs[name + "_weights"] = weights
    assert logs["with"] == logs["without"]
    assert logs["with_weights"] == logs["without_weights"]


def test_broken_configuration_and_rows_stop_before_a_model_is_loaded(folder):
    shutil.rmtree(folder / "broken", ignore_errors=True)
    config = write_config(
        folder, output_dir=str(folder / "broken"), bapo={"anchor_wieght": 1}, sample_packing=True
    )
    output = axolotl(folder, "train", config, "--launcher", "python", check=False)
    assert "bapo.anchor_wieght: unknown key; did you mean anchor_weight?" in output
    assert "sample_packing: True does not work with rl: bapo" in output
    assert "Loading weights" not in output
    # the message is the last thing on the screen, without a traceback
    assert "Traceback" not in output and output.rstrip().endswith("remove the line")

    rows = make_rows(4)
    rows[2]["base"] = None
    rows[3]["rejected"] = ""
    entry = {
        "path": str(write_jsonl(folder / "faulty.jsonl", rows)),
        "split": "train",
        "type": "chatml.prompt_pairs",
    }
    config = write_config(
        folder, output_dir=str(folder / "broken"), datasets=[entry], val_set_size=None
    )
    output = axolotl(
        folder, "train", config, check=False
    )  # accelerate prints a traceback of its own
    # the row without a base response would get one, but not before the faulty one is mended
    assert "1 of 4 rows can't be used" in output and "row 4: rejected is empty" in output
    assert "Loading weights" not in output
    assert output.count("row 4: rejected is empty") == 1
    assert output.rstrip().endswith("or leave them out with `bapo.on_faulty: drop`.")


@pytest.mark.slow
def test_continued_adapter_starts_where_it_was(trained, folder):
    """`lora_model_dir`: the adapter's own start is the reference, so the drift begins at zero."""
    out = str(folder / "continued")
    config = write_config(folder, output_dir=out, lora_model_dir=str(folder / "out"))
    axolotl(folder, "train", config, "--launcher", "python")
    steps = [entry for entry in history(folder, out) if "loss" in entry]
    first = next(entry for entry in history(folder) if "loss" in entry)
    assert steps[0]["drift/chosen"] == pytest.approx(0, abs=1e-4)
    assert steps[0]["logps/chosen"] != pytest.approx(first["logps/chosen"], abs=1e-2)
    assert abs(steps[-1]["drift/chosen"]) > 1e-3
    assert (folder / "continued/adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_other_launchers(trained, folder, launcher):
    out = str(folder / launcher)
    config = write_config(folder, output_dir=out)
    extra = ["--", "--nproc_per_node=1"] if launcher == "torchrun" else []
    axolotl(folder, "train", config, "--launcher", launcher, *extra)
    mine, first = ([e["loss"] for e in history(folder, o) if "loss" in e] for o in (out, "out"))
    assert mine == first


@pytest.mark.slow
def test_killed_and_resumed(folder):
    """Killed after the first checkpoint, the run goes on and ends where an uninterrupted one does."""
    options = {
        "val_set_size": None,
        "eval_strategy": None,
        "num_epochs": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "auto_resume_from_checkpoints": True,
    }
    whole = write_config(folder, output_dir=str(folder / "whole"), **options)
    axolotl(folder, "train", whole, "--launcher", "python")
    config = write_config(folder, output_dir=str(folder / "killed"), **options)
    process = subprocess.Popen(
        [BIN / "axolotl", "train", config, "--launcher", "python"],
        cwd=folder,
        # as many as `axolotl` has: others round otherwise, and a hinge at its corner goes by that
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (folder / "killed/checkpoint-2/trainer_state.json").exists():
        assert process.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.1)
    process.kill()
    process.wait()
    axolotl(folder, "train", config, "--launcher", "python")

    def losses(out):
        state = max((folder / out).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        log = json.loads((state / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in log if "loss" in entry]

    assert len(losses("whole")) == 16
    assert losses("killed") == pytest.approx(losses("whole"), abs=1e-5)
