"""Writes docs/options.md from `bapo_plugin/config.py`: python docs/options.py. A test holds the file to it."""

import types
import typing
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from bapo_plugin.blocks import (
    AnchorsConfig,
    AnchorServerConfig,
    KeepConfig,
    RetentionConfig,
)
from bapo_plugin.config import BAPOConfig

PAGE = Path(__file__).with_suffix(".md")
_BLOCKS: tuple[tuple[str, type[BaseModel], str], ...] = (
    ("bapo", BAPOConfig, "The block in the YAML. Formulas: [the method](method.md)."),
    ("bapo.anchors", AnchorsConfig, "How base responses are made where rows have none."),
    ("bapo.anchors.server", AnchorServerConfig, "With `engine: server`."),
    (
        "bapo.keep",
        KeepConfig,
        "Prompts outside the preference data whose former answers are held too.",
    ),
    ("bapo.retention", RetentionConfig, "What was forgotten, measured while training."),
)
_OTHERS = """\
## Keys of axolotl that mean something here

| key | default | meaning |
| --- | --- | --- |
| `rl_beta` | 0.1 | β of the preference loss |
| `dpo_loss_type` | [sigmoid] | sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair: every loss that is a function of the margin |
| `dpo_label_smoothing` | 0 | share of flipped labels, for sigmoid (conservative DPO; TRL ignores it there), robust, exo_pair |
| `precompute_ref_log_probs` | with an adapter | log π_ref once before training instead of in each step |
| `excess_length_strategy` | drop | drop, truncate or raise: looks at all three responses |
| `datasets[].field_base` | base | column with the base response of this data set; false: none |
| `datasets[].field_system` | | column with the system message of a row |
"""


def page() -> str:
    """The page as Markdown."""
    parts = [
        "# Options",
        "",
        "Written by `python docs/options.py` from `bapo_plugin/config.py`; don't edit it.",
        "`axolotl config-schema` has the same descriptions.",
        "",
    ]
    for name, block, about in _BLOCKS:
        parts += [f"## `{name}`", "", about, "", "| key | type | default | meaning |"]
        parts.append("| --- | --- | --- | --- |")
        for key, field in block.model_fields.items():
            if key == "entries":  # the plugin's own
                continue
            text = str((field.json_schema_extra or {}).get("description", field.description or ""))
            parts.append(
                f"| `{key}` | {_type(field.annotation)} | {_default(field)} | {text.replace('|', chr(92) + '|')} |"
            )
        parts.append("")
    return "\n".join([*parts, _OTHERS])


def _type(annotation: typing.Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _type(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        found = [_type(a) for a in typing.get_args(annotation) if a is not type(None)]
        return " or ".join(dict.fromkeys(found))
    if origin is typing.Literal:
        return ", ".join(f"`{str(a).lower()}`" for a in typing.get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "block"
    if origin is not None:
        return getattr(origin, "__name__", str(origin))
    return {"str": "text", "int": "whole number", "float": "number", "bool": "`true`, `false`"}.get(
        annotation.__name__, annotation.__name__
    )


def _default(field: typing.Any) -> str:
    if field.is_required():
        return "required"
    if field.default is PydanticUndefined or field.default is None:
        return ""
    if field.default == []:
        return "`[]`"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    print(f"Wrote {PAGE}")
