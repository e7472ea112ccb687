"""What our commands let reach a network: nothing that the user didn't name.

The libraries below us ask the hub for kernels, count downloads and report usage, also where model and data are files.
They read the environment when they are imported, so this comes first and imports nothing of them.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bapo_plugin.runs import base_of, is_there, recorded_config
from bapo_plugin.yaml_files import read_yaml

# axolotl's and the hub's telemetry, the load counter of `datasets`
_SILENT = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
}
_MODELS = ("base_model", "base_model_config", "tokenizer_config", "lora_model_dir")


def report_to_nobody() -> None:
    """Switch off what counts and reports; the user's own environment goes first."""
    for name, value in _SILENT.items():
        os.environ.setdefault(name, value)


def stay_offline(targets: Iterable[Path]) -> None:
    """Ask no hub where all that the targets name lies on this machine; the user's own HF_HUB_OFFLINE goes first.

    Args:
        targets: YAMLs, and folders of runs.
    """
    configs = [_config(target) for target in targets]
    if all(config is not None and is_local(config) for config in configs):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def is_local(config: Mapping[str, Any]) -> bool:
    """Whether model and data sets of a configuration are files of this machine."""
    names = [config.get(key) for key in _MODELS if config.get(key)]
    for split in ("datasets", "test_datasets"):
        entries = config.get(split) or []
        if not isinstance(entries, list) or not all(isinstance(e, Mapping) for e in entries):
            return False
        for entry in entries:
            files = entry.get("data_files") or []
            names += [entry.get("path"), *(files if isinstance(files, list) else [files])]
    kernel = str(config.get("attn_implementation") or "")
    if "/" in kernel:  # a kernel of the hub
        return False
    return bool(names) and all(isinstance(name, str) and is_there(name) for name in names)


def _config(target: Path) -> Mapping[str, Any] | None:
    try:
        if target.suffix in (".yml", ".yaml"):
            return read_yaml(target)
        found = recorded_config(target) or base_of(target)
    except (OSError, ValueError):
        return None  # what reads it for good will say what is wrong
    return found if isinstance(found, Mapping) else None
