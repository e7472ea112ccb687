"""Every example YAML is valid: by our checks, by axolotl's own schema, and in what it points to."""

import re
from pathlib import Path

import pytest
import yaml
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

from bapo_plugin import BAPOPlugin
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
    assert checked.bapo["anchor_weight"] == 0.03
    assert [entry["path"] for entry in checked.bapo["entries"]["datasets"]] == [
        entry["path"] for entry in load(path)["datasets"]
    ]
    # nothing that the example sets is unknown to axolotl and silently dropped
    dropped = {key for key in keys - {"rl"} if checked.get(key) is None}
    assert dropped == set(), dropped


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_header_names_the_file(path):
    header = path.read_text("utf-8").split("base_model:")[0]
    assert f"axolotl train yaml_examples/{path.name}" in header
    assert re.search(r"\d+ GB", header), "the memory it needs"


def test_demo_data():
    import json

    rows = [json.loads(line) for line in (EXAMPLES / "demo/personal_styles.jsonl").open()]
    assert len(rows) >= 60 and len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"prompt", "pirate", "plain", "formal"}
        assert all(text.strip() for text in row.values())


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
