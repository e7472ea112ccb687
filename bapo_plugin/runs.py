"""Folders that runs have written: what they hold, and how far training got. Light: nothing heavy is imported."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORD = "bapo_run.json"
STATE = "trainer_state.json"
_SECRET = re.compile(
    r"(api_?key|secret|password|credential|webhook_url|(hub|hf|auth|access|api)_?token)$",
    re.IGNORECASE,
)
# names and passwords in addresses
_USER = re.compile(r"(?<=://)[^/@\s]+@")
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def has_adapter(folder: Path) -> bool:
    """Whether an adapter's weights lie here; axolotl writes its settings before training."""
    return (folder / "adapter_config.json").is_file() and any(
        (folder / name).is_file() for name in _WEIGHTS
    )


def weights_digest(folder: Path) -> str | None:
    """Of the adapter's weights that lie here; None where there are none."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return None


def check_adapter(folder: Path) -> None:
    """
    Raises:
        ValueError: the folder has no trained adapter; says how far training got.
    """
    if has_adapter(folder):
        return
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} has no trained adapter (no adapter_config.json); train first, or name its folder"
        )
    raise ValueError(
        f"{folder} has the settings of an adapter, but no weights ({_WEIGHTS[0]}): training {how_far(folder)}. {_go_on(folder)}"
    )


def is_finished(folder: Path) -> bool:
    """Whether a run of ours has recorded here that training came to its end."""
    return bool((_read(folder / RECORD) or {}).get("finished"))


def unfinished(folder: Path) -> str | None:
    """What is to be said of an adapter whose training didn't come to its end; None where it did, or isn't known."""
    record = _read(folder / RECORD)
    if record is None or record.get("finished", True):
        return None
    return f"The adapter in {folder} is unfinished: training {how_far(folder)}. {_go_on(folder)}"


def how_far(folder: Path) -> str:
    state = _read(folder / STATE) or {}
    step, last = state.get("global_step"), state.get("max_steps")
    if not step:
        return "has not written a step yet"
    return f"got to step {step}" + (f" of {last}" if last else "")


def _go_on(folder: Path) -> str:
    if any(folder.glob("checkpoint-*")):
        return (
            "`axolotl train` goes on at the last checkpoint there with `auto_resume_from_checkpoints: true` in the YAML, and "
            "each checkpoint-* folder has an adapter of its own"
        )
    return "There is no checkpoint to go on with: train again"


def recorded_config(folder: Path) -> dict[str, Any] | None:
    """The YAML of the run that wrote a folder, or the folder above it (checkpoints); None where there is no record.

    Names of files that were relative are taken from where the run was started.
    """
    for place in (folder.resolve(), folder.resolve().parent):
        if (place / RECORD).is_file():
            break
    else:
        return None
    record = json.loads((place / RECORD).read_text("utf-8"))
    config = record.get("config") or {}
    if not config.get("base_model"):
        return None  # a trainer without a YAML
    config["output_dir"] = str(place)
    started = Path(record.get("directory") or ".")
    for key in ("base_model", "base_model_config", "lora_model_dir", "dataset_prepared_path"):
        name = config.get(key)
        if isinstance(name, str) and not Path(name).exists() and (started / name).exists():
            config[key] = str(started / name)
    for entry in (config.get("datasets") or []) + (config.get("test_datasets") or []):
        name = entry.get("path")
        if isinstance(name, str) and not Path(name).exists() and (started / name).exists():
            entry["path"] = str(started / name)
    return config


def without_secrets(value: Any, key: str = "") -> Any:
    """A configuration that is handed on, in a record, a report or a model card: keys of accounts are not."""
    if isinstance(value, Mapping):
        return {str(k): without_secrets(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(v) for v in value]
    if not isinstance(value, str):
        return value
    return "(not shown)" if value and _SECRET.search(key) else _USER.sub("", value)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
