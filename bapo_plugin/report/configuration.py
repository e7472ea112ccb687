"""The configuration of a run that has no record of ours."""

import json
import re
from pathlib import Path
from typing import Any

import yaml


def model_card_config(path: Path) -> dict[str, Any] | None:
    """The YAML that axolotl puts into a model card, folded away."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    block = re.search(r"<details>.*?^```ya?ml\n(.*?)^```\s*$", text, re.DOTALL | re.MULTILINE)
    try:
        config = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError:
        return None
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else None


def logged_config(path: Path) -> dict[str, Any] | None:
    """The complete configuration that axolotl logs at its start, as JSON."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(1_000_000)
    except OSError:
        return None
    start = re.search(r"config:\n(?=\{)", text)
    try:
        config = json.JSONDecoder().raw_decode(text, start.end())[0] if start else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(config, dict):
        return None
    return {k: v for k, v in config.items() if k not in ("capabilities", "env_capabilities")}
