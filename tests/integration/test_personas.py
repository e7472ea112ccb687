"""`bapo personas`: who there is, what is trained, and the matrix."""

import json
import sys

import pytest
import torch
import yaml
from helpers import fresh_lora, randomize_lora, write_config
from peft import PeftModel, get_peft_model
from tiny import make_rows, save_model, write_jsonl
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bapo_plugin.cli import app
from bapo_plugin.commands.personas import personas
from bapo_plugin.commands.personas import train as training
from bapo_plugin.commands.personas.read import merge, read_personas
from bapo_plugin.evaluation import matrix, pairs
from bapo_plugin.runs import SAME

PERSONAS = {
    "plain": {"datasets": [{"field_chosen": "plain", "field_rejected": "formal"}]},
    "jack the 2nd": {
        "datasets": [{"field_chosen": "pirate", "field_rejected": "plain"}],
        "bapo": {"anchor_weight": 0.1},
        "val_set_size": 0.5,
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("personas")
    return save_model(folder / "model", "llama")


@pytest.fixture
def here(tmp_path, model, monkeypatch):
    """CONFIG and PERSONAS.yml, and rows with a column for each taste."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    rows = [
        {"prompt": row["prompt"], "plain": row["chosen"], "formal": row["rejected"], "mine": row["base"], "pirate": f"arr {i} {row['chosen']}"}
        for i, row in enumerate(make_rows(16, seed=2))
    ]  # fmt: skip
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_config(tmp_path)
    write(tmp_path, PERSONAS)
    return tmp_path


def write(folder, content):
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    (folder / "personas.yml").write_text(text)


def read(folder):
    return read_personas(folder / "config.yml", folder / "personas.yml")


def run(folder, *args):
    args = [str(folder / "config.yml"), str(folder / "personas.yml"), *args]
    env = {"AXOLOTL_LOG_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    return CliRunner().invoke(app, ["personas", *args], env=env)


def leave(folder, finished=True, seed=1, model=None):
    """What a training leaves in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bapo_run.json").write_text(json.dumps({"finished": finished}))
    if model:
        lora = get_peft_model(AutoModelForCausalLM.from_pretrained(model), fresh_lora())
        randomize_lora(lora, std=1.0, seed=seed)
        lora.save_pretrained(folder)
    else:
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(b"")


def test_mappings_and_entries_of_lists_merge_and_the_rest_is_replaced():
    base = {
        "bapo": {"anchor_weight": 1, "anchors": {"seed": 3}},
        "datasets": [{"path": "a", "split": "train"}, {"path": "b"}],
        "dpo_loss_type": ["sigmoid", "ipo"],
        "seed": 1,
    }
    kept = json.dumps(base)
    merged = merge(
        base,
        {
            "bapo": {"anchors": {"seed": 4}},
            "datasets": [{"path": "c"}],
            "dpo_loss_type": ["hinge"],
            "seed": None,
            "new": {"a": [{"b": 1}]},
        },
    )
    assert merged == {
        "bapo": {"anchor_weight": 1, "anchors": {"seed": 4}},
        "datasets": [{"path": "c", "split": "train"}, {"path": "b"}],
        "dpo_loss_type": ["hinge"],
        "seed": None,
        "new": {"a": [{"b": 1}]},
    }
    merged["datasets"][1]["path"] = "z"
    assert json.dumps(base) == kept
    more = merge({"datasets": [{"path": "a"}]}, {"datasets": [{}, {"path": "b"}]})
    assert more["datasets"] == [{"path": "a"}, {"path": "b"}]


def test_each_has_a_folder_and_goes_on_unless_it_says_otherwise(here):
    write(
        here, {"a": None, "b": {"output_dir": "elsewhere", "auto_resume_from_checkpoints": False}}
    )
    a, b = read(here)
    assert [a.folder, b.folder.as_posix()] == [here / "out/a", "elsewhere"]
    assert a.config["auto_resume_from_checkpoints"] is True
    assert b.config["auto_resume_from_checkpoints"] is False
    assert a.config["datasets"][0]["path"] == str(here / "rows.jsonl")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"a/b": {}}, "'a/b' can't be the name of a persona"),
        ({"..": {}}, "'..' can't be the name"),
        ("no: {seed: 1}", "False can't be the name"),
        ("a: {seed: 1}\nb: {}\na: {seed: 2}", "a is there twice"),
        ({"a": {"output_dir": "x"}, "b": {"output_dir": "./x"}}, "a and b have the same output_dir"),
        ({"a": {"base_model": "other"}}, "a: base_model: 'other' changes the model (it is"),
        ({"a": {"adapter": "qlora"}}, "changes the kind of adapter (it is 'lora' for all)"),
        ({"a": {"load_in_4bit": True}}, "load_in_4bit: True changes quantisation or precision"),
        ({"a": {"chat_template": "chatml"}}, "chat_template: 'chatml' changes the chat template"),
        ({"a": {"special_tokens": {"pad_token": "x"}}}, "changes the tokenizer"),
        ({"a": {"bapo": {"reference": "base"}}}, "bapo.reference: 'base' changes the adapter"),
        ({"a": {"rl": "dpo"}}, "a: rl: 'dpo' must be bapo"),
        ({"a": {"val_set_size": 0}}, "no held-out rows"),
        ({"a": {"bapo": {"anchor_wieght": 1}}}, "a: rl: bapo can't run with this configuration"),
        ({"a": "plain"}, "a: 'plain' must be a mapping"),
        ("- a", "must be a block of settings"),
        ("a: {", "can't be read as YAML"),
        ("{}", "there are no personas"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_before_anything_is_written(here, content, message):
    write(here, content)
    result = run(here, "--list")
    assert result.exit_code == 2 and message in result.output, result.output
    assert not (here / "out").exists()


def test_all_that_changes_a_loaded_model_must_be_the_same():
    from bapo_plugin.models import _LOADING

    assert set(_LOADING) <= {key for keys in SAME.values() for key in keys}


def test_a_scheduler_gets_commands_and_yamls(here):
    leave(here / "out/plain")
    (here / "out/plain/config.yml").write_text(yaml.safe_dump(read(here)[0].config))
    result = run(here, "--list", "--launcher", "python")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"axolotl train '{here}/out/jack the 2nd/config.yml' --launcher python",
        f"bapo personas {here}/config.yml {here}/personas.yml --matrix",
    ]
    assert "plain is trained already" in result.stderr
    config = yaml.safe_load((here / "out/jack the 2nd/config.yml").read_text())
    assert config == read(here)[1].config and config["datasets"][0]["field_chosen"] == "pirate"


def test_trained_interrupted_and_changed(here):
    (first, _) = read(here)
    assert not training.is_trained(first)
    first.folder.mkdir(parents=True)
    first.path.write_text(yaml.safe_dump(first.config))
    # interrupted before a checkpoint: nothing to go on with, so that another configuration does no harm
    leave(first.folder, finished=False)
    write(here, merge(PERSONAS, {"plain": {"datasets": [{"field_rejected": "mine"}], "seed": 8}}))
    assert not training.is_trained(read(here)[0])
    # interrupted after one: it goes on, but not with another configuration
    (first.folder / "checkpoint-2").mkdir()
    assert not training.is_trained(first)
    with pytest.raises(ValueError, match="has begun to train with another configuration"):
        training.is_trained(read(here)[0])
    leave(first.folder)
    assert training.is_trained(first)
    result = run(here, "--list")
    assert result.exit_code == 2
    assert (
        "plain is trained with another configuration: datasets[0].field_rejected was 'formal' and is 'mine'; seed was 3 and is 8. "
        f"Set another output_dir for plain, or delete {first.folder}" in result.output
    )
    (first.folder / "adapter_model.safetensors").unlink()
    assert not training.is_trained(first)  # ended before the adapter was saved
    first.path.unlink()
    with pytest.raises(ValueError, match="that `bapo personas` didn't begin"):
        training.is_trained(first)


@pytest.fixture
def trained(here, monkeypatch):
    """Trainings do what the test says; their names are noted, and whether the matrix was measured."""
    import bapo_plugin.commands.personas as command

    told, done = {}, []

    def fake(line):
        assert line[:2] == ["axolotl", "train"]
        persona = next(p for p in read(here) if str(p.path) == line[2])
        done.append((persona.name, *line[3:]))
        what = told.get(persona.name, 0)
        if what is KeyboardInterrupt:
            raise KeyboardInterrupt
        if what == 0:
            leave(persona.folder)
        elif what == "stopped":
            leave(persona.folder, finished=False)
            return 0
        return what

    monkeypatch.setattr(training, "run", fake)
    monkeypatch.setattr(
        command, "_measure", lambda found, config: done.append([p.name for p in found])
    )
    return told, done


def test_all_are_trained_in_turn_and_once(here, trained):
    _, done = trained
    result = run(here, "--launcher", "python")
    assert result.exit_code == 0, result.output
    both = ["plain", "jack the 2nd"]
    assert done == [(name, "--launcher", "python") for name in both] + [both]
    assert f"$ axolotl train {here}/out/plain/config.yml --launcher python" in result.output
    done.clear()
    result = run(here)
    assert done == [both] and "plain (1 of 2): trained already" in result.output
    done.clear()
    assert run(here, "--only", "jack the 2nd").exit_code == 0 and done == [
        both
    ]  # the matrix is whole
    (here / "out/plain/config.yml").write_text("changed: since\n")
    result = run(here, "--only", "jack the 2nd")
    assert result.exit_code == 0 and done == [both, both[1:]]
    assert "plain is left out: plain is trained with another configuration" in result.output
    assert "--only: " in run(here, "--only", "jill").output


@pytest.mark.parametrize(
    "what, code, message",
    [
        (3, 3, "Error: plain (1 of 2): training ended with exit code 3"),
        ("stopped", 1, "Error: plain (1 of 2): training has not written a step yet and ended"),
        (KeyboardInterrupt, 130, "Interrupted at plain (1 of 2)"),
    ],
)
def test_one_that_fails_stops_all_and_the_same_command_goes_on(here, trained, what, code, message):
    told, done = trained
    told["plain"] = what
    result = run(here)
    assert result.exit_code == code and message in result.output, result.output
    assert f"bapo personas {here}/config.yml {here}/personas.yml" in result.output
    assert done == [("plain",)]
    told.clear()
    assert run(here).exit_code == 0 and len(done) == 4


def test_the_matrix_is_of_those_that_are_trained(here, trained):
    _, done = trained
    result = run(here, "--matrix")
    assert result.exit_code == 2 and "--matrix: none is trained" in result.output
    assert not (here / "out").exists()
    run(here, "--list")
    leave(here / "out/plain")  # beside the YAML that is written there by now
    result = run(here, "--matrix")
    assert result.exit_code == 0 and done == [["plain"]]
    assert "jack the 2nd is left out: it isn't trained" in result.output


def test_a_command_gives_its_exit_code_as_a_shell_does():
    assert training.run([sys.executable, "-c", "raise SystemExit(5)"]) == 5
    assert training.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"]) == 143


def test_the_matrix_is_that_of_whole_logits(here, model, monkeypatch, capsys):
    monkeypatch.setattr(matrix, "_MAX_NEW_TOKENS", 3)
    monkeypatch.setattr(pairs, "_TOKENS", 120)  # several batches
    monkeypatch.setenv("COLUMNS", "80")
    found = read(here)
    for seed, persona in enumerate(found):
        leave(persona.folder, seed=seed, model=model)
        persona.path.write_text(yaml.safe_dump(persona.config))
    assert personas(here / "config.yml", here / "personas.yml", only_matrix=True) == 0
    results = json.loads((here / "out/bapo-personas.json").read_text())

    rows = {p.name: held_out(p) for p in found}
    assert {name: len(part) for name, part in rows.items()} == {"plain": 4, "jack the 2nd": 8}
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    before = {name: [logps(base, row) for row in part] for name, part in rows.items()}
    margins = {}
    for adapter in found:
        after = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(model), adapter.folder
        ).eval()
        for name, part in rows.items():
            gains = torch.stack([logps(after, row) for row in part]) - torch.stack(before[name])
            margins[name, adapter.name] = gains[:, 0] - gains[:, 1]
    assert len({round(float(m.mean()), 3) for m in margins.values()}) == 4, "the case shows nothing"
    for (name, adapter), values in margins.items():
        cell = results["pairs"][name][adapter]
        right, n = (values > 0).double(), len(values)
        assert cell["margin"]["value"] == pytest.approx(float(values.mean()), abs=1e-3)
        assert cell["margin"]["se"] == pytest.approx(float(values.std()) / n**0.5, abs=1e-3)
        assert cell["accuracy"]["value"] == pytest.approx(float(right.mean()))
        if name == adapter:
            assert cell["difference"] is None
            continue
        more = values - margins[name, name]
        assert cell["difference"]["margin"]["value"] == pytest.approx(float(more.mean()), abs=1e-3)
        assert cell["difference"]["margin"]["se"] == pytest.approx(
            float(more.std()) / n**0.5, abs=1e-3
        )
    kept = results["retention"]
    assert kept["prompts"] == 48 and set(kept["after"]) == set(rows)
    assert kept["after"]["plain"]["drift"] != kept["after"]["jack the 2nd"]["drift"]

    text = (here / "out/bapo-personas.md").read_text()
    own = results["pairs"]["plain"]["plain"]
    assert f"%*; {own['margin']['value']:+.1f} ± {own['margin']['se']:.1f} |" in text
    assert "## Against the persona's own adapter" in text
    assert (here / "out/bapo-personas.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if str(here) not in line]  # paths are as long as they are
    assert max(map(len, shown)) <= 80
    assert any(line.split()[:1] == ["adapter"] and "jack the 2nd" in line for line in lines)


def held_out(persona):
    from axolotl.cli.config import load_cfg
    from axolotl.loaders import load_tokenizer

    from bapo_plugin.compat import only_reading
    from bapo_plugin.prepare import prepare_rows

    with only_reading():
        cfg = load_cfg(str(persona.path))
    return prepare_rows(cfg, load_tokenizer(cfg))[1].to_list()


@torch.no_grad()
def logps(model, row):
    """[2], of chosen and rejected."""
    found = []
    for key in ("chosen_ids", "rejected_ids"):
        ids = torch.tensor([row["prompt_ids"] + row[key]])
        all_logps = torch.log_softmax(model(ids).logits[0].double(), -1)
        start = len(row["prompt_ids"])
        found.append(sum(all_logps[i - 1, ids[0, i]] for i in range(start, ids.shape[1])))
    return torch.stack(found)
