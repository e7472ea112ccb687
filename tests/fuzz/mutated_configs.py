"""Mutated YAMLs: a sound one of `yaml_examples/` or the README with one to three mistakes in it."""

import copy
import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml
from axolotl.utils.schemas.config import AxolotlInputConfig

from bapo_plugin.blocks import AnchorsConfig, AnchorServerConfig, KeepConfig, RetentionConfig
from bapo_plugin.config import BAPOConfig

ROOT = Path(__file__).parents[2]
BLOCKS = {
    ("bapo",): BAPOConfig,
    ("bapo", "anchors"): AnchorsConfig,
    ("bapo", "anchors", "server"): AnchorServerConfig,
    ("bapo", "keep"): KeepConfig,
    ("bapo", "retention"): RetentionConfig,
}
# what stands there in a sound YAML, where a mutation needs the block
_FILLED = {
    ("bapo", "anchors", "server"): {"url": "http://localhost:1/v1"},
    ("bapo", "keep"): {"prompts": "keep.txt"},
    ("bapo", "retention"): {"prompts": 2},
}
ODD: tuple[Any, ...] = (
    *(None, "", " ", "x", "auto", "off", "1", "0.5", "nan", "\u2028", "\0", "a" * 5000),
    *(True, False, 0, -1, 1, 7, 0.5, 1e-320, 1e308, 10**30, -(10**30)),
    *(float("nan"), float("inf"), float("-inf"), date(2024, 2, 30 - 1), b"\xff"),
    *([], {}, [None], [[1]], ["x", "y"], [{}], {"x": {"y": None}}, {1: 2}),
)
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_TOP = sorted(
    {
        name
        for key, field in AxolotlInputConfig.model_fields.items()
        for name in (key, field.alias)
        if name
    }
)


class Case(NamedTuple):
    """A mutated YAML.

    Args:
        text: of the file.
        done: mutation and place of each mistake.
        keys: names of which a message must have one.
        twice: dotted keys that stand twice.
    """

    text: str
    done: list[str]
    keys: set[str]
    twice: list[str]


def unknown_keys(config: dict) -> set[str]:
    """Dotted keys inside `bapo:` that are none of ours: each has to be an error."""
    found = set()
    for path, schema in BLOCKS.items():
        block: Any = config
        for key in path:
            block = block.get(key) if isinstance(block, dict) else None
        if isinstance(block, dict):
            found |= {_name((*path, key)) for key in block if key not in schema.model_fields}
    return found


def strange_keys(config: dict) -> set[str]:
    """Keys at the top that are none of axolotl's: each has to be named."""
    return {str(key) for key in config if key not in _TOP and key != "bapo"}


def sound(model: str) -> list[dict]:
    """The examples and the README's YAML, with a model and rows that are here."""
    texts = [path.read_text("utf-8") for path in sorted((ROOT / "yaml_examples").glob("*.yml"))]
    readme = (ROOT / "README.md").read_text("utf-8")
    texts += [t for t in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL) if "base_model" in t]
    found = []
    for text in texts:
        config = yaml.safe_load(text)
        config |= {"base_model": model, "plugins": ["bapo_plugin.BAPOPlugin"]}
        for entry in config["datasets"]:
            entry["path"] = "rows.jsonl"
        found.append(config)
    return found


def rows() -> list[dict[str, str]]:
    """Rows with all columns that the examples name."""
    columns = {"chosen", "rejected", "plain", "pirate", "formal", "completion_a", "completion_b"}
    columns |= {"academy", "business", "entertainment", "literature", "normal"}
    found = []
    for i in range(24):
        row = {name: f"{name} says {i}" for name in sorted(columns)}
        found.append(row | dict.fromkeys(("prompt", "query", "user_input"), f"question {i}"))
    return [row | {"base": f"answer {i}"} for i, row in enumerate(found)]


def cases(configs: list[dict], seed: int, count: int) -> Iterator[tuple[int, Case]]:
    """Numbered cases; a case is a function of seed and number alone."""
    for number in range(count):
        yield number, _case(Random(f"{seed} {number}"), configs)


def _case(random: Random, configs: list[dict]) -> Case:
    config = copy.deepcopy(random.choice(configs))
    case = Case("", [], set(), [])
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        mutation = random.choice(_MUTATIONS)
        mutation(random, config, case)
    text = yaml.dump(config, Dumper=_DUMPER, sort_keys=False, allow_unicode=True)
    if random.random() < 0.08:
        text = random.choice((_repeat_line, _break))(random, text, case)
    return case._replace(text=text)


# ---------------------------------------------------------------- mutations of values and keys


def _paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from _paths(inner, (*path, key))


def _pick(random: Random, config: dict, keyed: bool = False) -> tuple[Any, Any, tuple]:
    """(block, key, path) of a place; half of the time one of ours or of a data set."""
    paths = [p for p in _paths(config) if not keyed or isinstance(p[-1], str)]
    ours = [p for p in paths if p[0] in ("bapo", "datasets", "rl")]
    path = random.choice(ours if ours and random.random() < 0.5 else paths)
    return *_at(config, path), path


def _at(config: dict, path: tuple) -> tuple[Any, Any]:
    block: Any = config
    for key in path[:-1]:
        block = block[key]
    return block, path[-1]


def _name(path: tuple) -> str:
    return ".".join(map(str, path))


def _note(case: Case, what: str, path: tuple) -> None:
    case.done.append(f"{what} {_name(path)}")
    case.keys.update(str(key) for key in path if isinstance(key, str))


def _misspell(random: Random, word: str) -> str:
    i = random.randrange(len(word))
    return random.choice(
        (
            word[:i] + word[i + 1 :],
            word[:i] + word[i] + word[i:],
            word[:i] + random.choice("aeionrst_") + word[i + 1 :],
            word[:i] + word[i : i + 2][::-1] + word[i + 2 :],
            word.replace("_", "-"),
            word.upper(),
            word + "s",
        )
    )


def _drop(random: Random, config: dict, case: Case) -> None:
    block, key, path = _pick(random, config)
    del block[key]
    _note(case, "dropped", path)


def _retype(random: Random, config: dict, case: Case) -> None:
    block, key, path = _pick(random, config)
    block[key] = copy.deepcopy(random.choice(ODD))
    _note(case, f"{block[key]!r:.40} at", path)


def _nest(random: Random, config: dict, case: Case) -> None:
    block, key, path = _pick(random, config)
    value = block[key]
    block[key] = random.choice(([value], {str(key): value}, [[value]], {"a": [value]}))
    _note(case, "nested", path)


def _flatten(random: Random, config: dict, case: Case) -> None:
    block, key, path = _pick(random, config)
    value = block[key]
    while isinstance(value, dict | list) and value:
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    block[key] = value
    _note(case, "flattened", path)


def _rename(random: Random, config: dict, case: Case) -> None:
    """A key misspelt, or another one's name."""
    block, key, path = _pick(random, config, keyed=True)
    other = random.choice((*_TOP, *BAPOConfig.model_fields))
    new = _misspell(random, key) if random.random() < 0.8 else other
    if new in block:
        return
    block[new] = block.pop(key)
    _note(case, f"{new} for", path)
    case.keys.add(new)


def _unknown(random: Random, config: dict, case: Case) -> None:
    """A key that we don't have in a block of ours."""
    path = random.choice(list(BLOCKS))
    block = _block(config, path)
    known = random.choice(list(BLOCKS[path].model_fields))
    key = random.choice((_misspell(random, known), "wieght", "x", "", 1, None, True, "rl_beta"))
    if block is None or key in block:
        return
    block[key] = copy.deepcopy(random.choice(ODD))
    _note(case, "unknown", (*path, key))
    case.keys.add(str(key))


def _ours(random: Random, config: dict, case: Case) -> None:
    """One of our settings, with an odd value."""
    path = random.choice(list(BLOCKS))
    key = random.choice(list(BLOCKS[path].model_fields))
    if (block := _block(config, path)) is not None:
        block[key] = copy.deepcopy(random.choice(ODD))
        _note(case, f"{block[key]!r:.40} at", (*path, key))


def _axolotls(random: Random, config: dict, case: Case) -> None:
    """One of axolotl's settings, with an odd value: wrong combinations too."""
    key = random.choice(_TOP)
    config[key] = copy.deepcopy(random.choice(ODD))
    _note(case, f"{config[key]!r:.40} at", (key,))


def _move(random: Random, config: dict, case: Case) -> None:
    """A key out of its block, or into ours."""
    block, key, path = _pick(random, config, keyed=True)
    value = block.pop(key)
    target = () if len(path) > 1 else ("bapo",)
    home = config if not target else _block(config, target)
    if home is None or key in home:
        return
    home[key] = value
    _note(case, f"moved to {target}", path)


def _block(config: dict, path: tuple) -> dict | None:
    """A block of ours, made where it isn't; None where something else stands there."""
    block: Any = config
    for i, key in enumerate(path):
        if key not in block:
            block[key] = copy.deepcopy(_FILLED.get(path[: i + 1], {}))
        block = block[key]
        if not isinstance(block, dict):
            return None
    return block


_MUTATIONS = (
    *(_drop, _retype, _retype, _nest, _flatten, _rename, _rename, _unknown, _unknown),
    *(_ours, _ours, _axolotls, _move),
)

# ---------------------------------------------------------------- mutations of the text


def _repeat_line(random: Random, text: str, case: Case) -> str:
    """A key twice in its block."""
    lines = text.split("\n")
    places = [i for i, line in enumerate(lines) if re.match(r"[a-z_]+: [^\s&*|>\"']", line)]
    if not places:
        return text
    i = random.choice(places)
    key = lines[i].split(":")[0].strip()
    case.done.append(f"twice {key}")
    case.keys.add(key)
    case.twice.append(key)
    return "\n".join([*lines[: i + 1], lines[i].split(":")[0] + ": 3", *lines[i + 1 :]])


def _break(random: Random, text: str, case: Case) -> str:
    """A character too much, too few or another one."""
    i = random.randrange(len(text))
    case.done.append(f"broken at {i}")
    case.keys.update(re.findall(r"\w+", text), ("YAML",))
    new = random.choice("\t:-[]{}#&*!|>'\"%@`,\n \r\x07\u2028")
    return text[:i] + random.choice((new, "", new + text[i : i + 1])) + text[i + 1 :]
