"""Entries of `datasets:` and `test_datasets:`, as written in the YAML."""

import difflib
from collections.abc import Mapping
from typing import Any

from bapo_plugin.blocks import can_be_path
from bapo_plugin.runs import without_secrets

# keys of an entry that are ours, or that axolotl reads without having them in a schema
_OURS = (
    "field_base",
    "field_system",
    "field_prompt",
    "message_field_role",
    "message_field_content",
)
#: of an entry whose column `base` means something else: have base responses generated
NO_BASE = False


def known_keys() -> set[str]:
    """All keys that an entry of a data set may have."""
    from axolotl.utils.schemas import datasets as schemas

    found = set(_OURS)
    for schema in vars(schemas).values():
        if isinstance(schema, type) and issubclass(schema, schemas.BaseModel):
            found |= set(schema.model_fields)
    return found


def check_entry(where: str, entry: Any) -> list[str]:
    """Problems of one entry of `datasets:` or `test_datasets:`, as written in the YAML."""
    if (
        not isinstance(entry, Mapping)
        or not isinstance(entry.get("path"), str)
        or not entry["path"]
    ):
        return [
            f"{where}: {without_secrets(entry)!r} must be a block with at least `path:` and `type:`"
        ]
    known = known_keys()
    problems = []
    if not can_be_path(entry["path"]):
        problems.append(f"{where}.path: {entry['path'][:40]!r} can't be the name of a file")
    inner = entry.get("type")
    blocks = [("", entry)] + ([("type.", inner)] if isinstance(inner, Mapping) else [])
    for prefix, block in blocks:
        for key in block:
            if key not in known:
                near = difflib.get_close_matches(str(key), sorted(known), n=1)
                hint = (
                    f"did you mean {near[0]}?" if near else "axolotl has no such key for a data set"
                )
                problems.append(f"{where}.{prefix}{key}: unknown key; {hint}")
    for key in ("field_base", "field_chosen", "field_rejected", "field_messages", "field_system"):
        value = entry.get(key)
        if value is not None and not (isinstance(value, str) and value):
            if key == "field_base" and value is NO_BASE:
                continue
            problems.append(
                f"{where}.{key}: {value!r} must be the name of a column"
                + (", or false to have base responses generated" if key == "field_base" else "")
            )
    for key, form in (("roles", "role: [names]"), ("message_property_mappings", "key: name")):
        if entry.get(key) is not None and not isinstance(entry[key], Mapping):
            problems.append(f"{where}.{key}: {entry[key]!r} must be a block of `{form}`")
    return problems
