"""Every example YAML is valid: by our checks, by axolotl's own schema, and in what it points to."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from typer.testing import CliRunner

from bapo_plugin import BAPOPlugin
from bapo_plugin.answers.prompts import read_prompts
from bapo_plugin.cli import app
from bapo_plugin.config import TRAINER_CLS

EXAMPLES = Path(__file__).parents[2] / "yaml_examples"
FILES = sorted(EXAMPLES.glob("*.yml"))


def load(path):
    return DictDefault(yaml.safe_load(path.read_text("utf-8")))


def test_there_are_examples():
    assert {f.name for f in FILES} >= {
        "smollm2-qlora-cpu.yml",
        "qwen3-1.7b-qlora-8gb.yml",
        "llama-3.1-8b-qlora-24gb.yml",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_axolotl_accepts_it(path, monkeypatch):
    from axolotl.integrations.base import PluginManager

    manager = PluginManager.get_instance()
    monkeypatch.setattr(manager, "plugins", type(manager.plugins)(manager.plugins))
    monkeypatch.setitem(manager.plugins, "bapo_plugin.BAPOPlugin", BAPOPlugin())
    cfg = load(path)
    keys = set(cfg)
    BAPOPlugin().register(cfg)
    gpu = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_89"}
    checked = validate_config(cfg, capabilities=gpu, env_capabilities={"torch_version": "2.13.0"})
    assert checked.rl == "dpo" and checked.trainer_cls == TRAINER_CLS
    assert checked.bapo["anchor_weight"] == 0.05
    assert [entry["path"] for entry in checked.bapo["entries"]["datasets"]] == [
        entry["path"] for entry in load(path)["datasets"]
    ]
    # nothing that the example sets is unknown to axolotl and silently dropped
    dropped = {key for key in keys - {"rl"} if checked.get(key) is None}
    for key, block in load(path).items():
        if isinstance(block, dict) and key != "bapo":
            dropped |= {f"{key}.{name}" for name in block if (checked[key] or {}).get(name) is None}
    assert dropped == set(), dropped


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_header_names_the_file(path):
    header = path.read_text("utf-8").split("base_model:")[0]
    assert f"axolotl train yaml_examples/{path.name}" in header
    assert re.search(r"\d+ GB", header), "the memory it needs"


def test_the_table_says_what_the_headers_say():
    table = (EXAMPLES / "README.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| \[(\S+)\]\(\1\) .* ([\d.]+) GB[^|]*\|$", table, re.MULTILINE))
    headers = {path.name: path.read_text("utf-8") for path in FILES}
    said = {n: re.search(r"`bapo plan` computes ([\d.]+) GB", h)[1] for n, h in headers.items()}
    assert rows == said
    for name, header in headers.items():
        model = re.search(r"^base_model: .*?([^/\n]+)$", header, re.MULTILINE)[1]
        (row,) = [line for line in table.splitlines() if line.startswith(f"| [{name}]")]
        assert model.lower() in row.lower()


def test_demo_data():
    rows = [json.loads(line) for line in (EXAMPLES / "demo/personal_styles.jsonl").open()]
    assert len(rows) >= 60 and len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"prompt", "pirate", "plain", "formal"}
        assert all(text.strip() for text in row.values())


@pytest.fixture
def demo(monkeypatch):
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo/demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(EXAMPLES.parent)
    return module


def test_the_demos_dpo_differs_only_in_the_anchor(demo):
    config = yaml.safe_load(demo.CONFIG.read_text("utf-8"))
    before = json.dumps(config)
    dpo = demo.as_dpo(config)
    assert json.dumps(config) == before and config["bapo"]["anchor_weight"] > 0
    assert dpo["output_dir"] != config["output_dir"]
    assert dpo["bapo"]["anchor_weight"] == 0
    dpo["output_dir"] = config["output_dir"]
    dpo["bapo"]["anchor_weight"] = config["bapo"]["anchor_weight"]
    assert dpo == config


def test_the_demo_asks_what_training_does_not(demo):
    config = yaml.safe_load(demo.CONFIG.read_text("utf-8"))
    rows = Path(config["datasets"][0]["path"]).read_text("utf-8").splitlines()
    trained = {json.loads(row)["prompt"] for row in rows}
    asked = [chat[-1]["content"] for chat in read_prompts("unrelated")]
    assert len(asked) >= 12 and trained.isdisjoint([*asked, demo.TASTE])


def test_the_demo_reuses_a_finished_run_and_goes_on_with_an_interrupted_one(
    demo, monkeypatch, tmp_path
):
    config = yaml.safe_load(demo.CONFIG.read_text("utf-8"))
    path, output = tmp_path / "config.yml", tmp_path / "out"
    codes = [1, 0, 0]
    started = []

    def run(command):
        started.append(list(map(str, command[1:])))
        (output / f"checkpoint-{len(started)}").mkdir()
        return type("Done", (), {"returncode": codes.pop(0)})

    monkeypatch.setattr(demo.subprocess, "run", run)
    with pytest.raises(SystemExit, match="goes on at the last checkpoint"):
        demo.train("BAPO", path, config, output)
    demo.train("BAPO", path, config, output)
    assert (output / "checkpoint-1").exists(), "an interrupted run goes on"
    demo.train("BAPO", path, config, output)
    assert started == [["train", str(path), "--launcher", "python"]] * 2
    demo.train("BAPO", path, config | {"learning_rate": 1e-5}, output)
    assert len(started) == 3 and not (output / "checkpoint-1").exists(), "another run"


def test_the_demos_commands_exist(demo):
    folders = {"DPO": Path("outputs/smollm2-dpo"), "BAPO": Path("outputs/smollm2-bapo")}
    programs = []
    for line in demo.commands(folders):
        program, *words = shlex.split(line)
        programs.append(Path(program).name)
        assert Path(program).exists(), program
        assert all(Path(w).exists() for w in words if w.endswith((".py", ".yml", ".jsonl")))
        if programs[-1] == "bapo":
            known = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200"})
            assert known.exit_code == 0
            options = {word for word in words if word.startswith("-")}
            assert all(option in known.output for option in options)
    assert programs == ["python", "bapo", "bapo"]


def test_the_demos_tables(demo, capsys, monkeypatch):
    """One column a run; shares, means and their errors are those of the part that the heading names."""
    import torch

    from bapo_plugin.scoring.retention import Retention

    monkeypatch.setenv("COLUMNS", "80")
    logs = {
        name: {"eval_rewards/accuracies": a, "eval_drift/chosen": c, "eval_drift/rejected": -10}
        for name, a, c in (("DPO", 1.0, 2.5), ("BAPO", 0.75, -4.5))
    }

    def retention(*drift):
        values = torch.tensor(drift, dtype=torch.float64)
        ones = torch.ones(len(drift), dtype=torch.float64)
        return Retention(ones, values, ones, 0 * ones)

    kept = {"DPO": retention(-9, -3, -1, 1, 5), "BAPO": retention(-1, 0, -1, 0, 0)}
    demo.show_numbers(logs, kept, {"first": slice(4)})
    lines = capsys.readouterr().out.splitlines()
    cells = [
        re.findall(r"[-\d.]+%?(?: ± [\d.]+)?", line.split("│")[2] + line.split("│")[3])
        for line in lines
        if line.startswith("│")
    ]
    assert ["12.5", "5.5"] in cells and ["100%", "75%"] in cells
    assert ["-3.0 ± 2.2", "-0.5 ± 0.3"] in cells and ["50%", "0%"] in cells
    assert max(map(len, lines)) <= 80


def test_the_diff_names_only_settings_that_exist():
    text = (EXAMPLES / "dpo-to-bapo.md").read_text("utf-8")
    from bapo_plugin.checks import _REFUSED
    from bapo_plugin.loss import PREFERENCE_LOSSES

    for key in (
        "sample_packing",
        "dpo_padding_free",
        "dpo_use_liger_kernel",
    ):
        assert key in text and key in _REFUSED
    assert ", ".join(PREFERENCE_LOSSES) in text
