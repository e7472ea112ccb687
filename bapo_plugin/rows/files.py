"""Why a file of rows can't be read, in words that name the line; libraries below often only say that it can't."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from bapo_plugin.rows.errors import SHOWN

_JSON = (".jsonl", ".json", ".ndjson")
# Arrow's own limit is 64
_DEEP = 60


def local_files(entry: Mapping[str, Any]) -> list[Path]:
    """The files on this machine that an entry of the YAML names."""
    named = entry.get("data_files") or []
    named = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    paths = [Path(name) for name in (entry.get("path"), *named) if isinstance(name, str)]
    return [path for path in dict.fromkeys(paths) if path.is_file()]


def what_is_wrong(path: Path) -> str:
    """What makes a file unreadable, its first lines with faults; "" where nothing is found."""
    data = path.read_bytes()
    if not data.strip():
        return f"{path} is empty"
    if path.suffix not in (*_JSON, ".csv", ".txt"):
        return ""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return f"{path}, line {line}: it is not UTF-8 ({error.reason}); save the file as UTF-8"
    if path.suffix not in _JSON or _is_list(text):
        return ""
    faults = list(_faults(text))
    if not faults:
        return ""
    shown = "\n".join(f"  line {number}: {fault}" for number, fault in faults[:SHOWN])
    more = f"\n  and {len(faults) - SHOWN:,} more" if len(faults) > SHOWN else ""
    return (
        f"{path} must have a JSON object on each line; mend or remove what is none ({len(faults):,} of its lines):\n{shown}"
        + more
    )


def check_csv(entry: Mapping[str, Any], name: str) -> None:
    """Refuse CSV files in which a cell would be cut without a word.

    Raises:
        ValueError: there is a NUL byte, where the parser ends a cell.
    """
    for path in local_files(entry):
        if path.suffix != ".csv":
            continue
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if b"\0" in line:
                    raise ValueError(
                        f"{name}: {path}, line {number} holds a NUL byte, behind which the CSV parser drops the rest of the cell; "
                        "take it out, or write the rows as JSONL"
                    )


def check_utf8(rows: Dataset, name: str) -> None:
    """Refuse text that isn't UTF-8, which loads and fails only when it is read.

    Raises:
        ValueError: the first such row.
    """
    start = 0
    for table in rows.with_format("arrow").iter(batch_size=1000):
        if not _is_sound(table):
            row = next(i for i in range(len(table)) if not _is_sound(table.slice(i, 1)))
            columns = [c for c in table.column_names if not _is_sound(table.select([c]))]
            raise ValueError(
                f"{name}, row {start + row + 1} (counted from 1): column {columns[0]!r} is not UTF-8; save the file as UTF-8, or "
                "mend the row"
            )
        start += len(table)


def _is_sound(table: pa.Table) -> bool:
    try:
        # a copy: what stands before a slice is looked at else
        pa.concat_tables([table]).combine_chunks().validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _is_list(text: str) -> bool:
    """Whether the file is a list of rows."""
    try:
        return isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return False


def _faults(text: str) -> Iterator[tuple[int, str]]:
    # lines end at line feeds and nowhere else: words may hold U+2028
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_distinct)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                shown = f"{error.msg} at character {error.pos + 1}"
            else:
                shown = "nested too deep" if isinstance(error, RecursionError) else str(error)
            yield number, f"{line[:60]!r}: {shown}"
            continue
        if not isinstance(row, dict):
            yield number, f"{line[:60]!r} is no object"
        elif _depth(row) > _DEEP:
            yield number, f"{line[:60]!r} is nested too deep"
        elif not _is_text(line):
            yield number, f"{line[:60]!r} holds half of a surrogate pair, which is no character"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _is_text(line: str) -> bool:
    try:
        json.dumps(json.loads(line), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _depth(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    parts = value.values() if isinstance(value, dict) else value
    return 1 + max(map(_depth, parts), default=0)
