"""Folders that runs have written: what they hold, and how far training got. Light: nothing heavy is imported."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORD = "bapo_run.json"
STATE = "trainer_state.json"
_HIDDEN = "(not shown)"
# tokens of text have such names too (eos_token), so that those of accounts are named
_SECRET = re.compile(
    r"(api_?key|(access|private|secret)_?key(_id)?|secret|passw(or)?d|credentials?|webhook_url|^token"
    r"|(hub|hf|auth|access|api|bearer|bot|secret|session|wandb)_?token)$",
    re.IGNORECASE,
)
# in any text: names and passwords in addresses, signed addresses, tokens that show what they are
_USER = re.compile(r"(?<=://)[^/\s'\"]*@")
_SIGNED = re.compile(
    r"(?<=[?&])((?:access_|auth_)?token|(?:api_?)?key|sig|signature|secret|password|AWSAccessKeyId|X-Amz-[\w-]+)=[^&#\s'\"]+",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[opsu]_[A-Za-z0-9]{16,}|glpat-[\w-]{16,}|xox[abp]-[\w-]{10,}|AKIA[0-9A-Z]{16})"
)
_WEIGHTS, _PICKLED = "adapter_model.safetensors", "adapter_model.bin"


def has_adapter(folder: Path) -> bool:
    """Whether an adapter's weights lie here; axolotl writes its settings before training."""
    return (folder / "adapter_config.json").is_file() and (folder / _WEIGHTS).is_file()


def weights_digest(folder: Path) -> str | None:
    """Of the adapter's weights that lie here; None where there are none."""
    path = folder / _WEIGHTS
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def check_adapter(folder: Path) -> None:
    """
    Raises:
        ValueError: the folder has no trained adapter, says how far training got; or one that isn't safetensors.
    """
    if has_adapter(folder):
        return
    refuse_pickled(folder)
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} has no trained adapter (no adapter_config.json); train first, or name its folder"
        )
    raise ValueError(
        f"{folder} has the settings of an adapter, but no weights ({_WEIGHTS}): training {how_far(folder)}. {_go_on(folder)}"
    )


def refuse_pickled(folder: str | Path) -> None:
    """
    Args:
        folder: with an adapter; a name at the hub is left to PEFT, which executes nothing either.

    Raises:
        ValueError: its weights are a pickle file, which may hold a program.
    """
    folder = Path(folder)
    if (folder / _PICKLED).is_file() and not (folder / _WEIGHTS).is_file():
        raise ValueError(
            f"{folder} has its weights in {_PICKLED}, a pickle file, which can hold a program; only {_WEIGHTS} is read. If you "
            "trust where it comes from, PeftModel.from_pretrained(model, folder).save_pretrained(folder) writes it anew"
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


def base_of(folder: Path) -> dict[str, Any] | None:
    """As a configuration, the model that an adapter without the record of a run names."""
    name = (_read(folder / "adapter_config.json") or {}).get("base_model_name_or_path")
    return {"base_model": name} if name else None


def without_secrets(value: Any, key: str = "") -> Any:
    """A configuration that is handed on, in a record, a report or a model card: keys of accounts are not."""
    if value and not isinstance(value, bool) and _SECRET.search(key):
        return _HIDDEN
    if isinstance(value, Mapping):
        return {str(k): without_secrets(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(v) for v in value]
    return hide(value) if isinstance(value, str) else value


def hide(text: str) -> str:
    """A text, such as a message, without the secrets that can be told by their looks."""
    text = _SIGNED.sub(rf"\1={_HIDDEN}", _USER.sub("", text))
    return _TOKEN.sub(_HIDDEN, text)


def secrets_in(value: Any, key: str = "") -> list[str]:
    """Keys of a configuration, dotted, whose values `without_secrets` doesn't hand on."""
    if without_secrets(value, key.rpartition(".")[2]) == value:
        return []
    found: list[str] = []
    if isinstance(value, Mapping):
        found = [k for name, v in value.items() for k in secrets_in(v, f"{key}.{name}".lstrip("."))]
    elif isinstance(value, list):
        found = [k for i, v in enumerate(value) for k in secrets_in(v, f"{key}[{i}]")]
    return found or [key]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
