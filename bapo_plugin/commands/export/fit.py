"""Whether the base below an adapter is the model that the adapter was trained on: another of the same shape takes it too."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bapo_plugin import base_weights
from bapo_plugin.commands.export.source import Source
from bapo_plugin.runs import read_if_sound, recorded_base_weights

_SIZES = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)


def check_base(source: Source) -> None:
    """Compare the base on this machine with what the run's folder knows of it: config.json, and in the record a digest of the
    base's weights.

    Args:
        source: of an adapter; a whole model, and a base that isn't on this machine, are left alone.

    Raises:
        ValueError: it is another model.
    """
    if source.adapter is None:
        return
    try:
        base = source.base_folder()
    except ValueError:
        return  # whoever needs it says so
    remedy = (
        f"Name the model that {source.folder} was trained on with --base; --no-check takes this one"
    )
    before, now = _sizes(_find(source.folder, "config.json")), _sizes(base / "config.json")
    for key in before.keys() & now.keys():
        if before[key] != now[key]:
            raise ValueError(
                f"base model: {source.base} has {key} {now[key]!r}, and the adapter was trained on one with {before[key]!r}. {remedy}"
            )
    known = recorded_base_weights(source.folder)
    base_weights.must_be(known, source.base, base, source.folder, remedy)


def _find(folder: Path, name: str) -> Path:
    """Of the run, also for a checkpoint in it."""
    is_checkpoint = folder.resolve().name.startswith("checkpoint-")
    return (folder.resolve().parent if is_checkpoint else folder) / name


def _sizes(path: Path) -> dict[str, Any]:
    config = read_if_sound(path) or {}
    inner = config.get("text_config")
    text = {**config, **inner} if isinstance(inner, Mapping) else config
    return {key: text[key] for key in _SIZES if text.get(key) is not None}
