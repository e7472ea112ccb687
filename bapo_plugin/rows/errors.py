"""What is wrong with rows, and how it is said."""

from collections.abc import Sequence
from typing import Any

SHOWN = 10


class RowError(ValueError):
    """A row that can't be used; the text says what is wrong with it and what mends it."""


def report_rows(name: str, count: int, first: Sequence[tuple[int, str]], total: int) -> str:
    """One message about a data set's faulty rows; the first ten are shown.

    Args:
        name: of the data set.
        count: of faulty rows.
        first: (row number from 1, problem), of the first `SHOWN` at least.
        total: rows of the data set.
    """
    lines = [f"{name}: {count:,} of {total:,} rows can't be used (rows counted from 1):"]
    lines += [f"  row {i}: {text}" for i, text in first[:SHOWN]]
    if count > SHOWN:
        lines.append(f"  and {count - SHOWN:,} more")
    return "\n".join(lines)


def kind_of(value: Any) -> str:
    """What a value is, for messages: "missing", or "of type ..."."""
    return "missing" if value is None else f"of type {type(value).__name__}"
