"""The YAML: validated as in training; what axolotl would ignore in it; what is said on the way."""

import difflib
import logging
import traceback
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from axolotl.cli.config import load_cfg
from axolotl.integrations.config import merge_input_args
from pydantic import AliasChoices, BaseModel, ValidationError

import bapo_plugin
from bapo_plugin.compat import only_reading
from bapo_plugin.config import is_active, not_bapo
from bapo_plugin.runs import is_there, without_secrets
from bapo_plugin.yaml_files import repeated_keys

_OURS = "axolotl.bapo_plugin"
_HERE = str(Path(bapo_plugin.__file__).parent)
# below, two names have little in common
_NEAR = 0.8
# whose keys `checks` looks at
_CHECKED = ("datasets", "test_datasets")
_PLUGINS = "plugins: [bapo_plugin.BAPOPlugin]"


class Heard(logging.Handler):
    """Warnings that axolotl and we log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: list[tuple[bool, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        said = (record.name.startswith(_OURS), record.getMessage())
        if said not in self._said:
            self._said.append(said)

    def take(self) -> tuple[list[str], list[str]]:
        """(ours, axolotl's) since the last call."""
        said, self._said = self._said, []
        return [text for ours, text in said if ours], [text for ours, text in said if not ours]


@contextmanager
def hearing() -> Iterator[Heard]:
    """Inside, what axolotl and we log is collected, and of all others only errors are logged."""
    heard = Heard()
    logger = logging.getLogger("axolotl")
    before = (logger.handlers, logger.propagate)
    levels = {handler: handler.level for handler in logging.getLogger().handlers}
    logger.handlers, logger.propagate = [heard], False
    for handler in levels:
        handler.setLevel(logging.ERROR)
    try:
        yield heard
    finally:
        logger.handlers, logger.propagate = before
        for handler, level in levels.items():
            handler.setLevel(level)


def read_config(config: Path, raw: Mapping[str, Any]) -> Any:
    """axolotl's validated configuration, on a machine that may have no GPU.

    Args:
        config: the YAML.
        raw: as it is written.

    Raises:
        ValueError: it is no configuration of BAPO, or what a run would refuse.
    """
    rl = str(raw.get("rl") or "").lower()
    if rl != "bapo":
        if rl and raw.get("bapo") is not None:
            kind = "plain DPO" if rl == "dpo" else rl
            raise ValueError(
                f"rl: {raw['rl']} trains {kind}, and the `bapo:` block has no effect; set rl: bapo"
            )
        raise ValueError(not_bapo(config))
    for key in ("base_model", "base_model_config", "tokenizer_config", "lora_model_dir"):
        name = raw.get(key, "")
        if not isinstance(name, str | None):
            raise ValueError(f"{key}: {name!r} must be text: the name of a model or of its folder")
        if name and name.startswith((".", "/", "~")) and not is_there(name):
            raise ValueError(f"{key}: {name}: there is no such folder; mend the path")
    plugins = raw.get("plugins") or []
    if not isinstance(plugins, list) or not all(map(_names_a_class, plugins)):
        raise ValueError(
            f"plugins: {plugins!r} must be a list of classes with their packages, such as\n{_PLUGINS}"
        )
    try:
        with only_reading():
            # as `axolotl preprocess` does: bf16 is not refused where no GPU could compute in it
            cfg = load_cfg(str(config), is_preprocess=True)
    except ValidationError as error:
        if any(e["loc"][:1] == ("rl",) and e["input"] == "bapo" for e in error.errors()):
            raise ValueError(not_bapo(config)) from None
        raise ValueError(_in_words(error)) from None
    except (ImportError, OSError) as error:  # a plugin, or a file that the YAML names
        raise ValueError(
            f"{type(error).__name__}: {' '.join(str(error).split())}; check base_model: {raw.get('base_model')!r} and what else "
            f"{config} names"
        ) from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if any(_is_ours(frame.filename) for frame in frames[1:]):
            raise  # our own
        raise ValueError(_where_axolotl_stops(error, frames[-1])) from error
    if not is_active(cfg):
        raise ValueError(not_bapo(config))
    return cfg


def _names_a_class(name: Any) -> bool:
    return isinstance(name, str) and all(name.rpartition(".")[::2])


def _is_ours(file: str) -> bool:
    # the package itself only says which classes it has
    return file.startswith(_HERE) and file != bapo_plugin.__file__


def settings_of(cfg: Any) -> dict[str, Any]:
    """Settings that tell runs apart, by their names in the YAML."""
    names = (
        "base_model",
        "adapter",
        "load_in_4bit",
        "load_in_8bit",
        "sequence_len",
        "chat_template",
    )
    found = {name: cfg.get(name) for name in names}
    found["rl_beta"] = cfg.rl_beta or (cfg.trl or {}).get("beta") or 0.1
    for key, value in cfg.bapo.items():
        if not isinstance(value, Mapping):
            found[f"bapo.{key}"] = value
    return {key: value for key, value in found.items() if value is not None}


def stray_keys(raw: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Keys of the YAML that axolotl ignores without a word; data sets and `bapo:`, where they are errors, aside.

    Args:
        raw: the YAML as it is written.

    Returns:
        Messages: of those that are much like a known key, or stand in a block of axolotl's, and of all others.
    """
    schema = merge_input_args()[1]
    names = _names(schema) | {"bapo"}  # where the plugin isn't active, something else is said
    near, strange = [], []
    for key in map(str, raw):
        if key in names:
            continue
        is_ours = "bapo" not in raw and _nearest(key, ["bapo"])
        if key.startswith(("x-", "_", ".")) and not is_ours:  # a place for YAML's own anchors
            continue
        if found := _nearest(key, names):
            near.append(f"{key}: axolotl has no such key and ignores it; did you mean {found}?")
        else:
            strange.append(
                f"{key}: axolotl has no such key and ignores it, unless it belongs to a plugin that `plugins:` doesn't name"
            )
    for name, field in schema.model_fields.items():
        block = raw.get(name)
        schemas = list(_schemas(field.annotation))
        if name in (*_CHECKED, "bapo") or not isinstance(block, Mapping) or not schemas:
            continue
        inner = set().union(*map(_names, schemas))
        for key in map(str, block):
            if key not in inner:
                found = _nearest(key, inner)
                hint = f"did you mean {found}?" if found else f"it has {', '.join(sorted(inner))}"
                near.append(f"{name}.{key}: axolotl has no such key there and ignores it; {hint}")
    return near, strange


def repeated(config: Path) -> list[str]:
    """Messages about keys that stand twice in a block of the YAML.

    Args:
        config: a YAML that can be read.
    """
    return [
        f"{key}: stands twice, first in line {first}, and only line {last} counts; remove one of the two"
        for key, first, last in repeated_keys(config)
    ]


def _names(schema: type[BaseModel]) -> set[str]:
    """Keys that a block of this schema may have."""
    found: list[Any] = []
    for name, field in schema.model_fields.items():
        other = field.validation_alias
        others = other.choices if isinstance(other, AliasChoices) else [other]
        found += [name, field.alias, *others]
    return {name for name in found if isinstance(name, str)}


def _schemas(annotation: Any) -> Iterator[type[BaseModel]]:
    """Schemas of blocks that ignore what they don't know; other parts of a type's union aside."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation.model_config.get("extra") in (None, "ignore"):
            yield annotation
    elif typing.get_origin(annotation) is not list:
        for part in typing.get_args(annotation):
            yield from _schemas(part)


def _nearest(key: str, names: Iterable[str]) -> str | None:
    found = difflib.get_close_matches(key, sorted(names), n=1, cutoff=_NEAR)
    return next(iter(found), None)


def _where_axolotl_stops(error: Exception, last: traceback.FrameSummary) -> str:
    """axolotl meets some values that it doesn't expect with an error of Python's; its line of code names the key."""
    if (last.line or "").startswith("raise"):
        return f"axolotl refuses this configuration: {type(error).__name__}: {error}"
    return (
        f"axolotl stops at this configuration with {type(error).__name__}: {error}, in {Path(last.filename).name}, line "
        f"{last.lineno}: `{last.line}`; look for the key that is named there, its value is of a kind that axolotl doesn't take"
    )


def _in_words(error: ValidationError) -> str:
    lines = []
    for e in error.errors():
        key = ".".join(map(str, e["loc"]))
        text = e["msg"].removeprefix("Value error, ")
        is_plain = isinstance(e["input"], str | int | float | bool | None)
        lines.append(
            f"{key}: {text}, got {without_secrets(e['input'], key)!r}"
            if key and is_plain
            else f"{key}: {text}"
            if key
            else text
        )
    return "\n".join(lines)
