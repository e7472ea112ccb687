"""Why a file of rows can't be read, in words that name the line; libraries below often only say that it can't."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from bapo_plugin.rows.errors import SHOWN

_JSON = (".jsonl", ".json", ".ndjson")
# Arrow's own limit is 64
_DEEP = 60
# an escape of half a pair, as far as bytes tell
_HALF = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD])[c-fC-F][0-9a-fA-F]{2})"
)
_HALF_SAID = "it holds half of a surrogate pair, which is no character"
_TOO_DEEP = "nested too deep"


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
    if path.suffix not in _JSON:
        return ""
    # some parsers know no NaN; others do, so that it is only said where nothing else is wrong
    faults = list(_faults(text, None)) or list(_faults(text, _no_number))
    if not faults:
        return ""
    shown = "\n".join(f"  {place}: {fault}" for place, fault in faults[:SHOWN])
    more = f"\n  and {len(faults) - SHOWN:,} more" if len(faults) > SHOWN else ""
    return f"{path} must have a JSON object on each line; mend or remove what is none ({len(faults):,}):\n{shown}{more}"


def check_files(entry: Mapping[str, Any], name: str) -> None:
    """Refuse files of which a part would be lost without a word.

    Raises:
        ValueError: a NUL byte in CSV, where the parser ends a cell; half of a surrogate pair in JSON, which some of its
            parsers drop.
    """
    for path in local_files(entry):
        if path.suffix == ".csv":
            _check_csv(path, name)
        elif path.suffix in _JSON and path.stat().st_size:
            with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
                has_half = _HALF.search(data)
            if has_half and _HALF_SAID in (wrong := what_is_wrong(path)):
                raise ValueError(f"{name} can't be loaded: {wrong}")


def _check_csv(path: Path, name: str) -> None:
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


def _faults(text: str, constant: Callable[[str], Any] | None) -> Iterator[tuple[str, str]]:
    """(line or row, what is wrong with it).

    Args:
        constant: is given NaN and Infinity.
    """
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        rows = None
    if isinstance(rows, list):  # one value, not one on each line
        for number, row in enumerate(rows, start=1):
            if fault := _fault(row):
                yield f"row {number}", fault
        return
    # lines end at line feeds and nowhere else: words may hold U+2028
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fault = _fault(json.loads(line, object_pairs_hook=distinct, parse_constant=constant))
        except json.JSONDecodeError as error:
            fault = f"{error.msg} at character {error.pos + 1}"
        except RecursionError:
            fault = _TOO_DEEP
        except ValueError as error:
            fault = str(error)
        if fault:
            yield f"line {number}", f"{line[:60]!r}: {fault}"


def _fault(row: Any) -> str:
    """What is wrong with a row that Python's own parser takes; "" where nothing is."""
    if not isinstance(row, dict):
        return "no object"
    if _depth(row) > _DEEP:
        return _TOO_DEEP
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return _HALF_SAID
    numbers = (v for v in _leaves(row) if isinstance(v, int))
    big = next((v for v in numbers if not -(2**63) <= v < 2**63), None)
    return "" if big is None else f"the number {big!r:.40} is too big"


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _leaves(value: Any) -> Iterator[Any]:
    parts = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list):
        yield value
        return
    for part in parts:
        yield from _leaves(part)


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        ValueError: a key stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _depth(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    parts = value.values() if isinstance(value, dict) else value
    return 1 + max(map(_depth, parts), default=0)
