"""Tools and arguments of tool calls as a JSON file has them.

`datasets` turns objects into Arrow's structs, which have one type for each key in all rows: beside a 0.5 every 3 becomes
3.0, beside an absent key a null can't be told, keys stand in the order of the first row, dates in quotes become dates.
Where keys differ it keeps JSON, with ten decimals of a number. Text passes as it is. So such a file is loaded from a copy
that has tools and arguments as JSON text, the form of OpenAI's API.
"""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Json, LargeList, List, Value, config, load_dataset

from bapo_plugin.files import whole
from bapo_plugin.rows.conversation import Fields
from bapo_plugin.rows.files import distinct, local_files, what_is_wrong

_ELSEWHERE = "set HF_DATASETS_CACHE to another folder"
# of a copy; another one makes all copies anew
_FORM = 1
# files of a folder that `Dataset.save_to_disk` wrote
_SAVED = ("state.json", "dataset_dict.json")


def with_text_calls(rows: Dataset, entry: Mapping[str, Any], fields: Fields, name: str) -> Dataset:
    """The same rows; those of JSON files on this machine have tools and arguments of tool calls as JSON text.

    Args:
        rows: as axolotl loaded them.
        entry: of the data set.
        fields: columns and keys of the rows.
        name: for messages.

    Raises:
        ValueError: they hold tools or arguments as objects, and these can't be read from the files.
    """
    columns = [
        c for c in (fields.messages, fields.chosen, fields.rejected, fields.base) if c is not None
    ]
    key = fields.properties.get("tool_calls", "tool_calls")
    kinds = rows.features
    has_tools = fields.tools in kinds and not isinstance(kinds[fields.tools], Value)
    if not has_tools and not any(_may_call(kinds.get(column), key) for column in columns):
        return rows
    place = Path(entry["path"])
    is_saved = any((place / saved).exists() for saved in _SAVED)
    if rows.info.builder_name != "json" or is_saved or not place.exists():
        return rows  # they have types of their own, or are elsewhere
    files, are_all = _files(entry)
    wanted = [fields.tools, key, *columns]
    have = [_has_objects(file, wanted, name) for file in files]
    if not any(have):
        return rows
    if not are_all:
        raise ValueError(
            f"{name}: {_cause(fields.tools)}, and in a folder it isn't known which file has which rows; name the file itself "
            f"with `path:`, or {_remedy(fields.tools)}"
        )
    read = [
        str(_copy(file, wanted, name)) if has else str(file)
        for file, has in zip(files, have, strict=True)
    ]
    found = load_dataset("json", data_files=read, split=rows.split)
    if len(found) != len(rows):
        raise ValueError(
            f"{name}: {_cause(fields.tools)}, and the files read line by line have {len(found):,} rows instead of "
            f"{len(rows):,}; {_remedy(fields.tools)}"
        )
    return found


def _may_call(kind: Any, key: str) -> bool:
    """Whether messages of this type may have tool calls."""
    if isinstance(kind, List | LargeList):
        return _may_call(kind.feature, key)
    return isinstance(kind, Json) or (isinstance(kind, dict) and key in kind)


def _files(entry: Mapping[str, Any]) -> tuple[list[Path], bool]:
    """Files of a data set on this machine; whether they are those that it is loaded from, in their order."""
    place, given = Path(entry["path"]), entry.get("data_files")
    if place.is_file():
        return [place], True
    given = [given] if isinstance(given, str) else given
    named = local_files(entry)
    if isinstance(given, list) and given and len(named) == len(given):
        return named, True
    found = sorted({*named, *place.rglob("*.*json*")})
    return found, len(found) == 1


def _cause(tools: str) -> str:
    return (
        f"tool calls or {tools!r} are objects, of which `datasets` changes numbers, nulls and order"
    )


def _remedy(tools: str) -> str:
    return f"write the arguments of calls, and {tools!r}, as JSON text"


def _has_objects(path: Path, wanted: list[str], name: str) -> bool:
    """Whether a file has tools or arguments as objects.

    Args:
        path: of the file.
        wanted: the column of tools, the key of tool calls, and columns with messages.
        name: for messages.
    """
    return any(_to_text(row, *wanted) for row in _rows(path, wanted, name))


def _copy(path: Path, wanted: list[str], name: str) -> Path:
    """A copy of a file of rows with tools and arguments as text."""
    digest = hashlib.sha256(json.dumps([_FORM, *wanted]).encode())
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    copy = Path(config.HF_DATASETS_CACHE) / "bapo" / f"{digest.hexdigest()[:32]}.jsonl"
    if not copy.is_file():
        with whole(copy, _ELSEWHERE) as partial, partial.open("w", encoding="utf-8") as file:
            for row in _rows(path, wanted, name):
                _to_text(row, *wanted)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return copy


def _rows(path: Path, wanted: list[str], name: str) -> Iterator[dict[str, Any]]:
    """Of a list, or of an object on each line."""
    read = json.JSONDecoder(object_pairs_hook=distinct).decode
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            is_list = file.read(100).lstrip().startswith("[")
            file.seek(0)
            found: Iterable = read(file.read()) if is_list else map(read, filter(str.strip, file))
            for row in found:
                if not isinstance(row, dict):
                    raise ValueError(f"{str(row)[:60]!r} is no object")
                yield row
    except ValueError as error:
        raise ValueError(
            f"{name}: {_cause(wanted[0])}, and the rows of {path} can't be read one by one; {_remedy(wanted[0])}, or mend the "
            f"file: {what_is_wrong(path) or error}"
        ) from error


def _to_text(row: dict[str, Any], tools: str, key: str, *columns: str) -> bool:
    """Turn tools and arguments of a row into text; whether there were any."""
    found = isinstance(row.get(tools), list | dict)
    if found:
        row[tools] = _text(row[tools])
    for column in columns:
        value = row.get(column)
        for message in value if isinstance(value, list) else [value]:
            calls = message.get(key) if isinstance(message, dict) else None
            for call in calls if isinstance(calls, list) else ():
                inner = call.get("function", call) if isinstance(call, dict) else None
                if isinstance(inner, dict) and isinstance(inner.get("arguments"), dict):
                    inner["arguments"] = _text(inner["arguments"])
                    found = True
    return found


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
