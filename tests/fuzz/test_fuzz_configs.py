"""Mutated YAMLs: each is an error that names the key, or a run as far as `bapo check` goes; never a traceback of ours."""

import copy
import functools
import logging
import sys

import mutated_configs
import pytest
import yaml
from axolotl.integrations.base import PluginManager
from axolotl.utils import config as axolotls
from axolotl.utils.dict import DictDefault
from ledger import CASES, COUNT, SEED, Ledger
from tiny import make_tokenizer, save_model, write_jsonl

from bapo_plugin.commands.check import configuration, gather
from bapo_plugin.commands.check.facts import Facts
from bapo_plugin.last_word import is_for_the_user
from bapo_plugin.network import is_local
from bapo_plugin.planning.settings import read_settings
from bapo_plugin.plugin import BAPOPlugin

# of the YAMLs that can be read, one in so many goes on to its rows
DEPTH = 1 if COUNT else 10


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model, rows and prompts; axolotl's schema made once for each set of plugins, and a registry that is put back."""
    save_model(tmp_path / "model", "qwen2")
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"  # some templates write one
    tokenizer.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "rows.jsonl", mutated_configs.rows())
    (tmp_path / "keep.txt").write_text("who are you\nwhat is the sun\n")
    monkeypatch.chdir(tmp_path)
    if hasattr(yaml, "CSafeLoader"):  # ten times as fast
        monkeypatch.setattr(yaml, "SafeLoader", yaml.CSafeLoader)
    made = functools.cache(lambda names: merge())
    merge = axolotls.merge_input_args
    for module in (axolotls, configuration):
        monkeypatch.setattr(
            module, "merge_input_args", lambda: made(tuple(PluginManager.get_instance().plugins))
        )
    monkeypatch.setattr(PluginManager, "_instance", None)
    logger = logging.getLogger("axolotl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield tmp_path
    logger.setLevel(level)


@pytest.fixture
def raised(monkeypatch):
    """The errors behind the messages of `Facts`."""
    found = []
    fail = Facts.fail

    def remember(self, text):
        found.append(sys.exc_info()[1])
        fail(self, text)

    monkeypatch.setattr(Facts, "fail", remember)
    return found


class FarEnough(ValueError):
    pass


def test_configurations(folder, raised, monkeypatch):
    ledger = Ledger()
    configs = mutated_configs.sound(str(folder / "model"))
    path = folder / "config.yml"
    prepare = gather.Preparation

    def stop(*args, **kwargs):
        raise FarEnough("far enough")

    for number, case in mutated_configs.cases(configs, SEED, COUNT or 300):
        if CASES and number not in CASES:
            continue
        path.write_bytes(case.text.encode("utf-8", "surrogatepass"))
        monkeypatch.setattr(gather, "Preparation", prepare if number % DEPTH == 0 else stop)
        PluginManager._instance = None
        raised.clear()
        ledger.counts["tried"] += 1
        try:
            facts = gather.gather(path, 1)
        except Exception as error:
            ledger.fail("TRACEBACK", number, case.done, error)
            continue
        raw = read(case.text)
        judge(ledger, number, case, raw, facts, [e for e in raised if e is not None])
        other_readers(ledger, number, case, raw, path)
    ledger.settle("Configurations")


def judge(ledger, number, case, raw, facts, raised):
    errors = "\n".join(text for text in facts.errors if text != "far enough")
    said = "\n".join([errors, *(w.text for w in facts.warnings), *facts.remarks])
    ledger.counts["refused" if errors else "accepted"] += 1
    for error in raised:
        if not is_for_the_user(error) and not isinstance(error, FarEnough):
            ledger.fail("NOT OURS", number, case.done, error)
    if "axolotl stops at this configuration" in errors:
        ledger.counts["stopped by an error of Python's in axolotl, told as such"] += 1
    elif errors and not any(key.lower() in errors.lower() for key in case.keys):
        if any(_is_axolotls(error) for error in raised):
            ledger.counts["refused in axolotl's words, which name another key"] += 1
        else:
            ledger.fail("NO KEY", number, case.done, errors)
    if raw is None:
        if "can't be read as YAML" not in errors and "must be a block of settings" not in errors:
            ledger.fail("NO YAML", number, case.done, errors)
        return
    if "can't run with this configuration" in errors or not errors:
        for key in mutated_configs.unknown_keys(raw):
            if f"{key}: " not in errors or not ("did you mean" in errors or "known keys" in errors):
                ledger.fail("UNKNOWN KEY", number, case.done, f"{key} in: {errors}")
    for key in mutated_configs.strange_keys(raw):
        # "_x" and the like are a place for YAML's own anchors
        if key not in said and not key.startswith(("x-", "_", ".")):
            ledger.fail("SILENCE", number, case.done, f"{key} in: {said}")
    for key in case.twice:
        if f"{key}: stands twice" not in said and "can't be read as YAML" not in errors:
            ledger.fail("TWICE", number, case.done, said)


def other_readers(ledger, number, case, raw, path):
    """What else reads a YAML: `axolotl train` through the plugin, `bapo plan`, and what decides on the network."""
    readers = {"plan": lambda: read_settings(path)}
    if raw is not None:
        readers |= {
            "register": lambda: BAPOPlugin().register(DictDefault(copy.deepcopy(raw))),
            "network": lambda: is_local(raw),
        }
    for name, reader in readers.items():
        try:
            reader()
        except Exception as error:
            if not is_for_the_user(error):
                ledger.fail(f"TRACEBACK of {name}", number, case.done, error)


def _is_axolotls(error):
    """Whether the message is one that axolotl's own checks made."""
    return "validation error" in repr(error.__context__) or "axolotl refuses" in str(error)


def read(text):
    try:
        found = yaml.safe_load(text)
    except Exception:
        return None
    return found if isinstance(found, dict) else None
