"""The YAML: validated as in training; what axolotl would ignore in it; what is said on the way."""

import difflib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from axolotl.cli.config import load_cfg
from axolotl.integrations.config import merge_input_args
from pydantic import ValidationError

from bapo_plugin.compat import only_reading
from bapo_plugin.config import is_active, not_bapo
from bapo_plugin.runs import without_secrets

_OURS = "axolotl.bapo_plugin"
# below, two names have little in common
_NEAR = 0.8


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


def read_yaml(config: Path) -> dict[str, Any]:
    """The YAML as it is written.

    Raises:
        ValueError: it is none, or no block of settings.
    """
    try:
        raw = yaml.safe_load(config.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{config} can't be read as YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{config} must be a block of settings, `key: value` on each line")
    return raw


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
        name = str(raw.get(key) or "")
        if name.startswith((".", "/", "~")) and not Path(name).exists():
            raise ValueError(f"{key}: {name}: there is no such folder; mend the path")
    try:
        with only_reading():
            # as `axolotl preprocess` does: bf16 is not refused where no GPU could compute in it
            cfg = load_cfg(str(config), is_preprocess=True)
    except ValidationError as error:
        if any(e["loc"][:1] == ("rl",) and e["input"] == "bapo" for e in error.errors()):
            raise ValueError(not_bapo(config)) from None
        raise ValueError(_in_words(error)) from None
    except (ImportError, OSError) as error:  # a plugin, or a file that the YAML names
        raise ValueError(f"{type(error).__name__}: {error}; check what {config} names") from error
    if not is_active(cfg):
        raise ValueError(not_bapo(config))
    return cfg


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
    """Keys at the top of the YAML that axolotl ignores without a word.

    Args:
        raw: the YAML as it is written.

    Returns:
        Messages: of those that are much like a known key, and of all others.
    """
    known: set[Any] = {"bapo"}  # where the plugin isn't active, something else is said about it
    for name, field in merge_input_args()[1].model_fields.items():
        known |= {name, field.alias, field.validation_alias}
    names = sorted(name for name in known if isinstance(name, str))
    near, strange = [], []
    for key in map(str, raw):
        if key in known or key.startswith(("x-", "_", ".")):  # a place for YAML's own anchors
            continue
        found = difflib.get_close_matches(key, names, n=1, cutoff=_NEAR)
        if found:
            near.append(f"{key}: axolotl has no such key and ignores it; did you mean {found[0]}?")
        else:
            strange.append(
                f"{key}: axolotl has no such key and ignores it, unless it belongs to a plugin that `plugins:` doesn't name"
            )
    return near, strange


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
