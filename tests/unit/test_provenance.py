"""What a base response depends on shows in its key; names of folders don't."""

import json

import pytest

from bapo_plugin.anchors import provenance as module
from bapo_plugin.anchors.provenance import ReferenceSpec, fingerprint, provenance
from bapo_plugin.blocks import AnchorsConfig
from bapo_plugin.store import Store


@pytest.fixture
def key(tmp_path, chatml):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")

    def make(**changes):
        spec = ReferenceSpec(**{"model": str(model)} | changes)
        with Store(tmp_path / "s.sqlite") as store:
            return fingerprint(provenance(spec, chatml, ["x"], AnchorsConfig(), [2], store))

    return make


def test_two_adapters_of_the_hub_are_two(key, tmp_path, monkeypatch):
    def cached(name, file, revision=None):
        if file != "adapter_config.json":
            raise OSError("no such file")
        commit = {"me/one": "a" * 40, "me/two": "b" * 40}[name]
        return str(tmp_path / f"models--{name.replace('/', '--')}/snapshots/{commit}/{file}")

    monkeypatch.setattr(module, "cached_file", cached)
    assert len({key(), key(adapter="me/one"), key(adapter="me/two")}) == 3
    assert key(adapter="me/one") == key(adapter="me/one")


def test_a_configuration_of_its_own_and_code_that_comes_with_a_model(key, tmp_path):
    other = tmp_path / "config"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"rope_theta": 5}))
    first = key(config=str(other))
    (other / "config.json").write_text(json.dumps({"rope_theta": 50}))
    assert len({key(), first, key(config=str(other))}) == 3
    code = tmp_path / "model/modeling.py"
    code.write_text("x = 1")
    before, plain = key(remote_code=True), key()
    code.write_text("x = 22")
    assert key(remote_code=True) != before and key() == plain


def test_settings_of_loading(key):
    keys = {
        key(),
        key(loading={"load_in_8bit": True}),
        key(loading={"attn_implementation": "eager"}),
    }
    assert len(keys) == 3 and key(loading={"load_in_4bit": None}) == key()


def test_a_name_that_is_nothing(key, monkeypatch):
    def missing(*args, **kwargs):
        raise OSError("not there")

    monkeypatch.setattr(module, "cached_file", missing)
    with pytest.raises(ValueError, match="me/none is neither a folder nor a model or adapter"):
        key(adapter="me/none")
