"""The demo's YAML on the real model: a short run with NF4, and what it must show."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_short_run_of_the_demo(smollm2, tmp_path):
    config = yaml.safe_load((ROOT / "yaml_examples/smollm2-qlora-cpu.yml").read_text("utf-8"))
    rows = tmp_path / "rows.jsonl"
    shutil.copy(ROOT / config["datasets"][0]["path"], rows)
    config["datasets"][0]["path"] = str(rows)
    config |= {
        "base_model": str(smollm2),
        "output_dir": str(tmp_path / "out"),
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "max_steps": 4,
        "bapo": {"anchor_weight": 0.1, "anchors": {"max_new_tokens": 16}},
        "eval_steps": 4,
        "save_steps": 4,
    }
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [Path(sys.executable).parent / "axolotl", "train", path, "--launcher", "python"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    log = json.loads((tmp_path / "out/checkpoint-4/trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in log if "loss" in entry]
    assert "Base responses: 96 rows with 96 distinct prompts; 96 generated" in done.stdout
    # the reference is the same quantised model: no drift at the start, up to rounding
    assert steps[0]["drift/chosen"] == pytest.approx(0, abs=1e-3)
    assert steps[0]["drift/base"] == pytest.approx(0, abs=1e-3)
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    # two optimiser steps with a learning rate above zero later, the margin has grown
    assert steps[-1]["rewards/margins"] > 0.1 and steps[-1]["loss"] < 0.69
    evaluations = [entry for entry in log if "eval_drift/base" in entry]
    assert evaluations[0]["eval_drift/rejected"] == pytest.approx(0, abs=1e-3)
    assert evaluations[-1]["eval_drift/rejected"] < -0.01
