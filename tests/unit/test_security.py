"""Nothing of ours executes data; caches of strangers are not read; files have the user's own permissions."""

import ast
import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import lora_model
from peft import PeftModel
from tiny import make_model, make_tokenizer

from bapo_plugin import runs, trust
from bapo_plugin.checks import check_config
from bapo_plugin.files import write_whole
from bapo_plugin.network import stay_offline
from bapo_plugin.preparation import _read, _save
from bapo_plugin.store import Store, StoreDamaged
from bapo_plugin.training.callbacks import RunRecord

ROOT = Path(__file__).parents[2]
CODE = ("bapo_plugin", "kernels", "benchmarks", "yaml_examples", "docs")

# ------------------------------------------------------------ no data is executed

_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load"}
_YAML = {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"}


def dangers(text):
    """(line, why) of what could execute data, or a shell."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if bad := {name.split(".")[0] for name in names} & _MODULES:
                yield node.lineno, f"import {bad.pop()}"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in _CALLS | _YAML:
            yield node.lineno, name
        if name == "torch.load" and given.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        for key in ("trust_remote_code", "allow_pickle", "shell"):
            if given.get(key) == "True":
                yield node.lineno, f"{key}=True"


def test_no_file_executes_data():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {why}"
        for folder in CODE
        for path in (ROOT / folder).rglob("*.py")
        for line, why in dangers(path.read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from dill import loads",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, yaml.Loader)",
        "subprocess.run(command, shell=True)",
        "np.load(path, allow_pickle=True)",
        "AutoConfig.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_search_for_dangers_finds_them(text):
    assert list(dangers(text))


def test_what_is_harmless_is_no_danger():
    assert not list(dangers("torch.load(p, weights_only=True); yaml.safe_load(t); model.eval()"))


class Program:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (Path.touch, (Path(self.mark),))


@pytest.fixture(scope="module")
def pickled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pickled") / "adapter"
    lora_model().save_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"weight": Program(folder / "executed")}, folder / "adapter_model.bin")
    return folder


def test_an_adapter_that_is_a_pickle_is_refused(pickled):
    assert not runs.has_adapter(pickled)
    with pytest.raises(
        ValueError, match=r"adapter_model\.bin, a pickle file.*only adapter_model\.safetensors"
    ):
        runs.check_adapter(pickled)
    with pytest.raises(
        ValueError, match=r"lora_model_dir: .*pickle file.*save_pretrained\(folder\)"
    ):
        check_config(
            {"adapter": "lora", "lora_model_dir": str(pickled), "datasets": [{"path": "a"}]}
        )


def test_where_peft_reads_one_from_a_hub_it_executes_nothing(pickled):
    model = make_model(vocab_size=len(make_tokenizer()))
    with pytest.raises(Exception, match="[Ww]eights.only"):
        PeftModel.from_pretrained(model, str(pickled))
    assert not (pickled / "executed").exists()
    torch.load(pickled / "adapter_model.bin", weights_only=False)  # the file is what it seems
    assert (pickled / "executed").exists()


# ------------------------------------------------------------ caches of others


@pytest.fixture
def stranger(monkeypatch):
    """Says of a path that another user owns it; who calls is no root."""
    owners = {}
    real = Path.stat

    def owned(path, **kwargs):
        found = real(path, **kwargs)
        numbers = list(found)
        numbers[4] = owners.get(path, 1001)
        return os.stat_result(numbers)

    monkeypatch.setattr(trust.os, "geteuid", lambda: 1001, raising=False)
    monkeypatch.setattr(Path, "stat", owned)
    monkeypatch.setattr(trust, "_name", {1002: "mallory"}.__getitem__)
    monkeypatch.delenv(trust.SETTING, raising=False)
    return owners


def kept(folder, kind):
    """A cache, and one of its files."""
    path = folder / "cache" / kind
    if kind == "rows":
        path.parent.mkdir()
        _save(Dataset.from_dict({"a": [1]}), path)
        return path, next(path.glob("*.arrow"))
    Store(path).close()
    return path, path if kind == "store" else path.with_name(f"{path.name}-journal")


@pytest.mark.parametrize("kind", ["store", "journal of a store", "rows"])
def test_a_cache_of_another_user_is_read_only_where_the_user_says_so(
    tmp_path, stranger, monkeypatch, kind
):
    path, file = kept(tmp_path, kind)
    file.touch()

    def read():
        return _read(path) if kind == "rows" else Store(path).close()

    read()
    stranger[file] = 1002
    with pytest.raises(
        ValueError, match=f"{file} belongs to the user mallory.*BAPO_TRUSTED_USERS=mallory"
    ):
        read()
    for setting in ("mallory", "anna, 1002", "*"):
        monkeypatch.setenv(trust.SETTING, setting)
        read()
    monkeypatch.setenv(trust.SETTING, "anna")
    with pytest.raises(ValueError, match="belongs to the user mallory"):
        read()
    stranger[file] = 0  # root could do anything anyway
    read()


def test_root_reads_what_the_user_outside_its_container_wrote(tmp_path, stranger, monkeypatch):
    path, file = kept(tmp_path, "store")
    stranger[file] = 1002
    monkeypatch.setattr(trust.os, "geteuid", lambda: 0)
    Store(path).close()


@pytest.mark.parametrize("which", ["file", "folder"])
def test_what_every_user_can_write_is_said_once(tmp_path, monkeypatch, caplog, which):
    monkeypatch.delenv(trust.SETTING, raising=False)
    path, _ = kept(tmp_path, "store")
    open_ = path if which == "file" else path.parent
    open_.chmod(open_.stat().st_mode | stat.S_IWOTH)
    monkeypatch.setenv(trust.SETTING, "*")
    Store(path).close()
    assert "every user" not in caplog.text
    monkeypatch.delenv(trust.SETTING)
    for _ in range(2):
        Store(path).close()
    assert caplog.text.count(f"{path.parent} can be written by every user") == 1


@pytest.mark.parametrize("mode", [0o1777, 0o2775])
def test_a_folder_for_all_with_the_sticky_bit_and_one_of_a_group_are_fine(tmp_path, mode):
    path, file = kept(tmp_path, "store")
    path.parent.chmod(mode)
    file.chmod(0o664)
    Store(path).close()


def test_checksums_are_against_damage_and_not_against_malice(tmp_path):
    """Said in docs/reliability.md: whoever can write the file can write the checksum."""
    path = tmp_path / "store"
    with Store(path) as store:
        store.put("kind", {"key": b"value"})
        store._db.execute("UPDATE entries SET value = ?", (b"other",))
        with pytest.raises(StoreDamaged):
            store.get("kind", ["key"])


# ------------------------------------------------------------ permissions


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_files_have_the_permissions_that_the_user_chose(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "folder/text.json", "{}", "name another folder")
        with Store(tmp_path / "cache/store.sqlite") as store:
            store.put("kind", {"key": b"value"})
        _save(Dataset.from_dict({"a": [1]}), tmp_path / "rows")
        record = RunRecord({"rl": "bapo"}, "model", {"train": 1})
        state = SimpleNamespace(
            is_world_process_zero=True, save_to_json=lambda path: Path(path).write_text("{}")
        )
        record.on_train_end(SimpleNamespace(output_dir=str(tmp_path / "out")), state, None)
    finally:
        os.umask(before)
    made = sorted(tmp_path.rglob("*"))
    assert len(made) > 8
    for path in made:
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~mask, path


# ------------------------------------------------------------ secrets


@pytest.mark.parametrize(
    "key, value",
    [
        ("comet_api_key", "S3CRET"),
        ("swanlab_secret", "S3CRET"),
        ("aws_secret_access_key", "S3CRET"),
        ("AWS_ACCESS_KEY_ID", "S3CRET"),
        ("hf_token", "S3CRET"),
        ("token", "S3CRET"),
        ("db_password", "S3CRET"),
        ("credentials", {"user": "me", "value": "S3CRET"}),
        ("swanlab_lark_webhook_url", "https://S3CRET"),
        ("password", 3417),
        ("path", "https://me:S3CRET@host/rows.jsonl"),
        ("path", "https://me:p@S3CRET@host/rows.jsonl"),
        ("path", "https://host/rows.jsonl?token=S3CRET&x=1"),
        ("path", "s3://bucket/rows?X-Amz-Signature=S3CRET"),
        ("note", "use hf_S3CRETabcdefghijklmnop here"),
        ("note", "sk-proj-S3CRETabcdefghijklmnop"),
    ],
)
def test_a_secret_is_not_handed_on(key, value):
    config = {"blocks": [{key: value}], "rl": "bapo"}
    shown = json.dumps(runs.without_secrets(config))
    assert "S3CRET" not in shown and "3417" not in shown and '"rl": "bapo"' in shown
    assert runs.secrets_in(config) == [f"blocks[0].{key}"]


@pytest.mark.parametrize(
    "key, value",
    [
        ("eos_token", "<|im_end|>"),
        ("hf_use_auth_token", True),
        ("token", None),
        ("max_new_tokens", 64),
        ("path", "https://host/rows.jsonl?split=train&monkey=1"),
        ("note", "mail me@host, or see https://host/@me; risk-averse-and-long-enough"),
        ("revision_of_model", "0123456789abcdef0123456789abcdef01234567"),
    ],
)
def test_what_is_no_secret_is_shown(key, value):
    assert runs.without_secrets({key: value}) == {key: value}
    assert runs.secrets_in({key: value}) == []


# ------------------------------------------------------------ network


def test_an_adapter_without_a_record_asks_no_hub_for_a_model_that_is_a_folder(
    tmp_path, monkeypatch
):
    """`bapo eval FOLDER --prompts FILE`: the adapter's own settings name the model."""
    for base, offline in [(tmp_path, "1"), ("owner/model", None)]:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        settings = {"base_model_name_or_path": str(base)}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        stay_offline([tmp_path])
        assert os.environ.get("HF_HUB_OFFLINE") == offline
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
