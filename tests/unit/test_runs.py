"""Folders of runs as they are found: trained, interrupted, unfinished; and what may reach a network."""

import json
import os
import subprocess
import sys

import pytest

from bapo_plugin import network, runs

HEADER = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
WHOLE = len(HEADER).to_bytes(8, "little") + HEADER + bytes(8)


def make(folder, weights=True, settings=True, finished=None, step=None, checkpoint=False):
    folder.mkdir(parents=True, exist_ok=True)
    if settings:
        (folder / "adapter_config.json").write_text("{}")
    if weights:
        (folder / "adapter_model.safetensors").write_bytes(WHOLE)
    if finished is not None:
        (folder / "bapo_run.json").write_text(json.dumps({"finished": finished}))
    if step is not None:
        state = {"global_step": step, "max_steps": 24}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    if checkpoint:
        (folder / "checkpoint-3").mkdir()
    return folder


def test_a_trained_adapter_is_taken(tmp_path):
    runs.check_adapter(make(tmp_path, finished=True, step=24))
    assert runs.unfinished(tmp_path) is None


@pytest.mark.parametrize(
    "state, said",
    [
        ({"settings": False, "weights": False}, ["no adapter_config.json", "train first"]),
        ({"weights": False}, ["no weights", "has not written a step yet", "train again"]),
        ({"weights": False, "step": 3}, ["got to step 3 of 24", "There is no checkpoint"]),
        (
            {"weights": False, "step": 3, "checkpoint": True},
            ["got to step 3 of 24", "auto_resume_from_checkpoints: true"],
        ),
    ],
)
def test_a_folder_that_only_looks_trained_says_how_far_it_got(tmp_path, state, said):
    folder = make(tmp_path / "out", **state)
    assert not runs.has_adapter(folder)
    with pytest.raises(ValueError) as error:
        runs.check_adapter(folder)
    assert str(folder) in str(error.value) and all(text in str(error.value) for text in said)


def test_an_adapter_of_an_interrupted_run_is_called_unfinished(tmp_path):
    folder = make(tmp_path, finished=False, step=3, checkpoint=True)
    runs.check_adapter(folder)
    assert "unfinished: training got to step 3 of 24" in runs.unfinished(folder)


@pytest.mark.parametrize(
    "content, said",
    [
        (WHOLE[:-3], "is cut off: it has"),
        (WHOLE[:5], "is cut off"),
        (b"", "is cut off"),
        (WHOLE + b"x", "is no file of safetensors, or a damaged one"),
        (WHOLE[:8] + b"x" * (len(WHOLE) - 8), "is no file of safetensors"),
        (b"<html>" * 99, "is no file of safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
    ],
)
def test_weights_that_are_cut_off_or_a_pointer_are_refused(tmp_path, content, said):
    folder = make(tmp_path / "mine")
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        runs.check_adapter(folder)
    assert str(folder / "adapter_model.safetensors") in str(error.value)


@pytest.mark.parametrize("name", ["bapo_run.json", "adapter_config.json"])
@pytest.mark.parametrize("content", ['{"a": 1,\n', "[1]"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    folder = make(tmp_path / "mine", finished=True)
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match="restore it") as error:
        runs.check_adapter(folder)
        runs.recorded_config(folder)
    assert str(folder / name) in str(error.value)


def two_projects(tmp_path):
    """One has a run; the other has files of the same names."""
    for name in ("one", "two"):
        (tmp_path / name / "m").mkdir(parents=True)
        for file in ("rows.jsonl", "p.txt"):
            (tmp_path / name / file).touch()
    config = {
        "base_model": "m",
        "datasets": [{"path": "json", "data_files": ["rows.jsonl"]}, {"path": "rows.jsonl"}],
        "bapo": {"keep": {"prompts": "p.txt"}, "retention": {"prompts": 4}},
    }
    folder = make(tmp_path / "one/out")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "m"}')
    record = {"config": config, "directory": str(tmp_path / "one")}
    (folder / "bapo_run.json").write_text(json.dumps(record))
    return folder


def test_names_are_those_of_where_the_run_started(tmp_path, monkeypatch):
    folder, one = two_projects(tmp_path), tmp_path / "one"
    monkeypatch.chdir(tmp_path / "two")
    found = runs.recorded_config(folder)
    assert found["base_model"] == str(one / "m") == runs.base_model(folder)
    files, named = found["datasets"]
    assert files["data_files"] == [str(one / "rows.jsonl")]
    assert named["path"] == str(one / "rows.jsonl")
    assert found["bapo"]["keep"]["prompts"] == str(one / "p.txt")
    monkeypatch.chdir(one)  # there they stay as they were written
    assert runs.recorded_config(folder)["base_model"] == "m"
    (one / "m").rmdir()  # nothing is there any more
    monkeypatch.chdir(tmp_path / "two")
    assert runs.recorded_config(folder)["base_model"] == "m"


def test_what_an_adapter_names_now_counts_where_the_model_has_moved(tmp_path):
    folder = two_projects(tmp_path)
    (tmp_path / "one/m").rename(tmp_path / "moved")
    settings = {"base_model_name_or_path": str(tmp_path / "moved")}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert runs.base_model(folder) == str(tmp_path / "moved")


def test_one_place_has_several_names(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    a = {"base_model": "m", "load_in_4bit": False, "chat_template": "tokenizer_default"}
    assert list(runs.differing(a, {"base_model": str(tmp_path / "m")})) == []
    others = {"base_model": "other/m", "load_in_4bit": True, "bapo": {"reference": "base"}}
    assert [key for _, key, *_ in runs.differing(a, others)] == [
        *("base_model", "base_model_config", "bapo.reference", "tokenizer_config", "load_in_4bit"),
    ]


def test_an_adapter_without_a_record_is_not_judged(tmp_path):
    assert runs.unfinished(make(tmp_path, step=3)) is None


def config(tmp_path, **changes):
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "rows.jsonl").touch()
    found = {
        "base_model": str(tmp_path / "model"),
        "datasets": [{"path": str(tmp_path / "rows.jsonl")}],
    }
    return found | changes


@pytest.mark.parametrize(
    "changes, local",
    [
        ({}, True),
        ({"base_model": "owner/model"}, False),
        ({"datasets": [{"path": "owner/rows"}]}, False),
        ({"test_datasets": [{"path": "owner/rows"}]}, False),
        ({"tokenizer_config": "owner/model"}, False),
        ({"lora_model_dir": "owner/adapter"}, False),
        ({"datasets": "rows"}, False),
        ({"base_model": None, "datasets": None}, False),
        ({"attn_implementation": "kernels-community/flash-attn2"}, False),
        ({"datasets": [{"path": "{here}", "data_files": "https://host/rows.jsonl"}]}, False),
        ({"datasets": [{"path": "{here}", "data_files": ["{here}"]}]}, True),
    ],
)
def test_local_is_what_names_no_hub(tmp_path, changes, local):
    changes = json.loads(json.dumps(changes).replace("{here}", str(tmp_path)))
    assert network.is_local(config(tmp_path, **changes)) is local


def test_names_that_no_file_can_have_are_not_local(tmp_path):
    assert not network.is_local({"base_model": "a" * 5000})
    assert not network.is_local({"base_model": "a\0"})


@pytest.mark.parametrize("local", [True, False])
def test_the_users_own_environment_goes_first(tmp_path, monkeypatch, local):
    path = tmp_path / "run.yml"
    changes = {} if local else {"base_model": "owner/model"}
    path.write_text(json.dumps(config(tmp_path, **changes)))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    network.stay_offline([path])
    assert os.environ.pop("HF_HUB_OFFLINE", None) == ("1" if local else None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    network.stay_offline([path])
    assert os.environ["HF_HUB_OFFLINE"] == "0"


def test_what_is_set_before_the_libraries_is_light():
    """They read the environment when they are imported, so none of them may be here already."""
    code = (
        "import sys, bapo_plugin.cli, bapo_plugin.network, bapo_plugin.runs; "
        "print([m for m in ('torch', 'datasets', 'huggingface_hub', 'transformers', 'axolotl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_secrets_are_not_handed_on():
    config = {
        "API_KEY": "S1",
        "hatchery": {"api_key": "S2", "list": [{"AWS_SECRET": "S3"}]},
        "hf_token": "S4",
        "swanlab_lark_webhook_url": "https://S5",
        "bapo": {"anchors": {"server": {"url": "https://me:S6@host:8000/v1"}}},
        "special_tokens": {"eos_token": "<|im_end|>", "pad_token": "<pad>"},
        "learning_rate": 1e-4,
    }
    found = runs.without_secrets(config)
    assert not any(f"S{i}" in json.dumps(found) for i in range(1, 7))
    assert found["bapo"]["anchors"]["server"]["url"] == "https://host:8000/v1"
    assert found["special_tokens"] == config["special_tokens"] and found["learning_rate"] == 1e-4


def test_names_of_local_tasks_are_those_of_the_tasks():
    from bapo_plugin.cli.arguments import LOCAL_TASKS
    from bapo_plugin.evaluation.local import LOCAL

    assert LOCAL_TASKS == {"paper", *LOCAL}
