"""Distinct prompts of tables with millions of rows: 32 bytes of each are held, texts and tokens stay in the tables."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from bapo_plugin.answers.engine import Request

# the key's 128 bits, the row's place in all tables, tokens of the prompt, most tokens of the answer
_ENTRY = np.dtype([("key", "S16"), ("place", "i8"), ("length", "i4"), ("limit", "i4")])


class Prompts(Sequence[Request]):
    """Prompts that need an answer; each is read from its table when it is asked for.

    Args:
        tables: rows of `anchors.plan.with_keys`.
        entries: one for each prompt.
    """

    def __init__(self, tables: Sequence[Dataset], entries: np.ndarray):
        columns = ["ask", "prompt_ids", "open_ids"]
        self._tables = tables
        self._asked = [rows.select_columns(columns) for rows in tables]
        self._starts = np.cumsum([0, *map(len, tables)])
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        """A request, or those of a slice."""
        if isinstance(index, slice):
            return self.requests(range(*index.indices(len(self))))
        return self.requests([index])[0]

    def requests(self, at: Sequence[int]) -> list[Request]:
        """Requests of the prompts at these indices."""
        entries = self._entries[list(at)]
        keys, limits = _hex(entries), entries["limit"].tolist()
        found: list[Any] = [None] * len(entries)
        for table, picked, rows in self._rows(entries):
            part = self._asked[table][rows]
            texts = zip(picked, part["ask"], part["prompt_ids"], part["open_ids"], strict=True)
            for i, ask, prompt, rest in texts:
                found[i] = Request(keys[i], ask, (*prompt, *rest), limits[i])
        return found

    def limits_by_key(self, at: slice = slice(None)) -> dict[str, int]:
        """Key -> most tokens, of the prompts of a slice, in their order."""
        entries = self._entries[at]
        return dict(zip(_hex(entries), entries["limit"].tolist(), strict=True))

    def keys(self) -> list[str]:
        """Of all."""
        return _hex(self._entries)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each prompt, int32."""
        return self._entries["length"]

    @property
    def limits(self) -> np.ndarray:
        """Most tokens of each answer, int32."""
        return self._entries["limit"]

    def where(self, marks: np.ndarray) -> "Prompts":
        """Those that are marked."""
        return Prompts(self._tables, self._entries[marks])

    def longest_first(self) -> "Prompts":
        """By length, and by key where that is the same."""
        order = np.lexsort((self._entries["key"], -self._entries["length"]))
        return Prompts(self._tables, self._entries[order])

    def first(self, count: int) -> "Prompts":
        """Those that come first in the tables."""
        return Prompts(self._tables, self._entries[np.argsort(self._entries["place"])[:count]])

    def words(self) -> dict[str, str]:
        """Key -> the prompt as the user wrote it, of all."""
        keys, found = self.keys(), {}
        for table, picked, rows in self._rows(self._entries):
            words = self._tables[table].select_columns(["words"])[rows]["words"]
            found |= {keys[i]: text for i, text in zip(picked, words, strict=True)}
        return found

    def _rows(self, entries: np.ndarray) -> Any:
        """(table, which of the entries are in it, their rows there)."""
        tables = np.searchsorted(self._starts, entries["place"], side="right") - 1
        for table in np.unique(tables).tolist():
            picked = np.flatnonzero(tables == table)
            rows = entries["place"][picked] - self._starts[table]
            yield table, picked.tolist(), rows.tolist()


def distinct_prompts(tables: Sequence[Dataset]) -> tuple[Prompts, int]:
    """The distinct prompts of rows that need an answer, by key, and the number of those rows.

    Args:
        tables: rows of `anchors.plan.with_keys`.
    """
    found = [np.zeros(0, _ENTRY)]
    start = 0
    columns = ["key", "limit", "prompt_ids", "open_ids"]
    for rows in tables:
        for part in rows.select_columns(columns).with_format("arrow").iter(batch_size=1000):
            asked = pc.list_value_length(part["prompt_ids"]).to_numpy()
            entries = np.zeros(len(part), _ENTRY)
            entries["place"] = np.arange(start, start + len(part))
            entries["length"] = asked + pc.list_value_length(part["open_ids"]).to_numpy()
            entries["limit"] = part["limit"].to_numpy()
            entries = entries[pc.not_equal(part["key"], "").to_numpy()]
            digits = "".join(part["key"].to_pylist())
            entries["key"] = np.frombuffer(bytes.fromhex(digits), "S16")
            found.append(entries)
            start += len(part)
    every = np.concatenate(found)
    found.clear()
    # the first row of each, sorted by key: so a store is read from its beginning to its end
    _, first = np.unique(every["key"], return_index=True)
    return Prompts(tables, every[first]), len(every)


def _hex(entries: np.ndarray) -> list[str]:
    # not entry by entry: numpy leaves zeros at the end of bytes out
    digits = entries["key"].tobytes().hex()
    return [digits[i : i + 32] for i in range(0, len(digits), 32)]
