"""What is wrong with rows, and how it is said."""

from collections.abc import Sequence
from typing import Any

SHOWN = 10


class RowError(ValueError):
    """A row that can't be used; the text says what is wrong with it and what mends it."""


def report_rows(name: str, faulty: Sequence[tuple[int, str]], total: int) -> str:
    """One message about a data set's faulty rows; the first ten are shown.

    Args:
        name: of the data set.
        faulty: (row number from 1, problem).
        total: rows of the data set.
    """
    lines = [f"{name}: {len(faulty):,} of {total:,} rows can't be used (rows counted from 1):"]
    lines += [f"  row {i}: {text}" for i, text in faulty[:SHOWN]]
    if len(faulty) > SHOWN:
        lines.append(f"  and {len(faulty) - SHOWN:,} more")
    return "\n".join(lines)


def kind_of(value: Any) -> str:
    """What a value is, for messages: "missing", or "of type ..."."""
    return "missing" if value is None else f"of type {type(value).__name__}"
