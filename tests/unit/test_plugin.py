"""The plugin is inert unless `rl: bapo`, and cheap to import."""

import json
import subprocess
import sys

import pytest
from axolotl.utils.dict import DictDefault

from bapo_plugin import BAPOPlugin
from bapo_plugin.config import TRAINER_CLS, is_active

RAW = {
    "rl": "bapo",
    "adapter": "lora",
    "dpo_loss_type": "hinge",
    "datasets": [
        {"path": "a.jsonl", "type": "chatml.intel", "field_base": "mine"},
        {"path": "b.jsonl", "type": {"field_chosen": "good", "field_base": "own"}},
        {"path": "c.jsonl"},
    ],
    "test_datasets": [{"path": "t.jsonl", "field_base": "held"}],
}


def test_register_turns_bapo_into_a_dpo_run_with_our_trainer():
    cfg = DictDefault(json.loads(json.dumps(RAW)))
    BAPOPlugin().register(cfg)
    assert (cfg.rl, cfg.trainer_cls, cfg.dpo_loss_type) == ("dpo", TRAINER_CLS, ["hinge"])
    assert is_active(cfg)
    assert cfg.seed == 42, "axolotl shuffles by none, and other rows would be held out each time"
    kept = cfg.bapo["entries"]
    assert [entry.get("field_base") for entry in kept["datasets"]] == ["mine", "own", None]
    assert [entry.get("field_base") for entry in kept["test_datasets"]] == ["held"]
    assert kept["datasets"][1]["type"] == {"field_chosen": "good"}
    assert "field_base" not in cfg.datasets[0] and "field_base" not in cfg.datasets[1]["type"]
    assert BAPOPlugin().get_training_args(cfg)["bapo"]["anchor_weight"] == 0.05


@pytest.mark.parametrize("rl", ["dpo", "kto", None])
def test_other_runs_are_left_alone(rl):
    raw = RAW | {"rl": rl}
    cfg = DictDefault(json.loads(json.dumps(raw)))
    plugin = BAPOPlugin()
    plugin.register(cfg)
    assert json.loads(json.dumps(cfg)) == raw
    assert plugin.load_datasets(cfg) is None and plugin.get_training_args(cfg) is None
    plugin.pre_model_load(cfg)
    assert not is_active(cfg)


def test_import_is_quick_quiet_and_pulls_in_nothing():
    """A hundredth of the time that axolotl's own imports take, however fast the machine is (0.3% measured), and no module but
    ours and axolotl's."""
    code = """
import sys, time, contextlib, io, json, logging
start = time.process_time()
import axolotl.integrations.base, axolotl.utils.config  # what every axolotl command imports
theirs = time.process_time() - start
before = set(sys.modules)
out = io.StringIO()
handler = logging.StreamHandler(out); logging.getLogger().addHandler(handler)
start = time.process_time()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
    import bapo_plugin
    plugin = bapo_plugin.BAPOPlugin()
    plugin.register({"rl": "dpo"})
    from bapo_plugin.config import BAPOArgs, BAPOTrainingArgs  # what axolotl imports for its schema
ours = time.process_time() - start
new = {m.split(".")[0] for m in set(sys.modules) - before}
print("RESULT", json.dumps([ours / theirs, sorted(new), out.getvalue()]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line = next(li for li in done.stdout.splitlines() if li.startswith("RESULT"))
    share, new, said = json.loads(line.removeprefix("RESULT"))
    assert said == "" and set(new) <= {"axolotl", "bapo_plugin"}
    assert share < 0.01


def test_dotted_names_normalise_to_one():
    """axolotl 0.21 registers entry point and YAML name once only if they come to the same string."""
    from importlib.metadata import entry_points

    (point,) = entry_points(group="axolotl.plugins", name="bapo")
    assert point.value.replace(":", ".") == "bapo_plugin.BAPOPlugin"
    assert point.load() is BAPOPlugin


def test_full_fine_tuning_without_room_for_a_reference(tmp_path, monkeypatch):
    import psutil
    from tiny import make_model

    from bapo_plugin.models import check_room_for_reference

    make_model("qwen2").save_pretrained(tmp_path / "model")
    cfg = DictDefault({"base_model": str(tmp_path / "model")})
    check_room_for_reference(cfg)
    parameters = sum(p.numel() for p in make_model("qwen2").parameters())
    free = 3 * 4 * parameters - 1
    monkeypatch.setattr(psutil, "virtual_memory", lambda: DictDefault(available=free))
    with pytest.raises(ValueError, match="adapter: is not set.*Set `adapter: qlora`"):
        check_room_for_reference(cfg)
