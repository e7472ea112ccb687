"""PERSONAS.yml: who there is, and the whole configuration of each."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bapo_plugin.checks import check_config
from bapo_plugin.runs import differing, secrets_in
from bapo_plugin.yaml_files import read_yaml, repeated_keys

CONFIG = "config.yml"
_NAME = re.compile(r"\w(?:[\w .-]{0,98}[\w-])?")


@dataclass(frozen=True)
class Persona:
    """Someone's run.

    Args:
        name: in PERSONAS.yml.
        config: the whole YAML of the run.
    """

    name: str
    config: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.config["output_dir"])

    @property
    def path(self) -> Path:
        """Of the YAML."""
        return self.folder / CONFIG


def read_personas(config: Path, file: Path) -> list[Persona]:
    """The personas of a file, in its order.

    Args:
        config: YAML that all begin with.
        file: YAML with name -> what differs.

    Raises:
        ValueError: a file is no mapping; a name can't be a folder's; adapters couldn't be compared or would share a
            folder; a configuration has no held-out rows or can't work with `rl: bapo`.
    """
    base = read_yaml(config)
    if not base.get("output_dir"):
        raise ValueError(f"{config}: output_dir: is not set; the personas' folders lie in it")
    found = []
    personas = read_yaml(file)
    for twice, *_ in repeated_keys(file):
        if twice in personas:
            raise ValueError(f"{file}: {twice} is there twice; give each persona a name of its own")
    for name, overrides in personas.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"{file}: {name!r} can't be the name of a persona, which names a folder too: take letters, digits and _ . - in "
                'between, in quotes where YAML reads something else ("1", "no")'
            )
        if overrides is not None and not isinstance(overrides, Mapping):
            raise ValueError(
                f"{file}: {name}: {overrides!r} must be a mapping, keys of the configuration with their values"
            )
        merged = merge(base, overrides or {})
        if not (overrides or {}).get("output_dir"):
            merged["output_dir"] = str(Path(base["output_dir"]) / name)
        merged.setdefault("auto_resume_from_checkpoints", True)
        _check(f"{file}: {name}", base, merged)
        found.append(Persona(name, merged))
    if not found:
        raise ValueError(f"{file}: there are no personas; write one as `name: {{key: value}}`")
    places: dict[Path, str] = {}
    for persona in found:
        other = places.setdefault(persona.folder.resolve(), persona.name)
        if other != persona.name:
            raise ValueError(
                f"{file}: {other} and {persona.name} have the same output_dir: {persona.folder}; give each its own"
            )
    return found


def merge(base: Any, overrides: Any) -> Any:
    """A configuration with some of its values replaced; neither is changed.

    Mappings are merged. So are lists of mappings (data sets), entry by entry: entries that `overrides` doesn't have stay.
    Anything else is replaced.

    Example:
        >>> merge({"a": {"b": 1, "c": 2}, "d": [{"e": 1, "f": 2}], "g": [1, 2]}, {"a": {"b": 3}, "d": [{"e": 3}], "g": [3]})
        {'a': {'b': 3, 'c': 2}, 'd': [{'e': 3, 'f': 2}], 'g': [3]}
    """
    if isinstance(base, Mapping) and isinstance(overrides, Mapping):
        merged = {key: merge(base.get(key), value) for key, value in overrides.items()}
        return copy.deepcopy(dict(base)) | merged
    if has_entries(base) and has_entries(overrides):
        both = [merge(*pair) for pair in zip(base, overrides, strict=False)]
        longer = base if len(base) > len(overrides) else overrides
        return both + copy.deepcopy(list(longer[len(both) :]))
    return copy.deepcopy(overrides)


def has_entries(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(e, Mapping) for e in value)


def _check(where: str, base: Mapping[str, Any], merged: Mapping[str, Any]) -> None:
    for what, key, before, after in differing(base, merged):
        raise ValueError(
            f"{where}: {key}: {after!r} changes {what} (it is {before!r} for all), and then its adapter can't be compared with "
            "the others in one loaded model; remove the line, or train it by itself with `axolotl train`"
        )
    if str(merged.get("rl") or "").lower() != "bapo":
        raise ValueError(
            f"{where}: rl: {merged.get('rl')!r} must be bapo; with `bapo: {{anchor_weight: 0}}` that is DPO"
        )
    if not merged.get("adapter"):
        raise ValueError(
            f"{where}: adapter: is not set; personas share one model, so set `adapter: qlora` or `adapter: lora`"
        )
    if not merged.get("val_set_size") and not merged.get("test_datasets"):
        raise ValueError(
            f"{where}: there are no held-out rows to compare adapters on; set val_set_size or test_datasets"
        )
    if found := secrets_in(merged):
        raise ValueError(
            f"{where}: {', '.join(found)}: would be copied into the persona's folder, which may be shared or uploaded; remove it "
            "from the YAML and set it in the environment (HF_TOKEN, WANDB_API_KEY, COMET_API_KEY, ...)"
        )
    try:
        check_config(copy.deepcopy(dict(merged)))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
