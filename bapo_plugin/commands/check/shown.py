"""Rows as the model sees them: decoded from the token ids that training takes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from datasets import Dataset

from bapo_plugin.commands.check.facts import Part, ShownRow
from bapo_plugin.rows.ends import special_texts


class Speller:
    """Token ids back to text, part for part.

    Args:
        tokenizer: that of the rows.
        stops: ids of tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, stops: set[int]):
        self._tokenizer = tokenizer
        self._stops = stops
        self._special = set(special_texts(tokenizer))

    def part(self, ids: Sequence[int], after: Sequence[int] = ()) -> Part:
        """A part of a row.

        Args:
            ids: its tokens.
            after: those before it; a tokenizer may spell a token otherwise at the beginning of a text.
        """
        ids, after = list(ids), list(after)
        edges = [0]
        for i, token in enumerate(ids):
            if token in self._special | self._stops:
                edges += [i, i + 1]
        edges = sorted({*edges, len(ids)})
        text, special, end = "", [], ""
        before = self._decode(after)
        for start, stop in pairwise(edges):
            whole = self._decode(after + ids[:stop])
            # a character may be spelt by tokens on both sides
            piece = (
                whole[len(before) :] if whole.startswith(before) else self._decode(ids[start:stop])
            )
            if stop - start == 1 and ids[start] in self._special:
                special.append((len(text), len(text) + len(piece)))
            if stop == len(ids) and after and ids[-1] in self._stops and start == stop - 1:
                end = piece
            text, before = text + piece, whole
        return Part(text, len(ids), end, special)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def row(self, name: str, row: dict[str, Any], key: str) -> ShownRow:
        """A row.

        Args:
            name: of the data set.
            row: of `rows.tokens.FEATURES`, with its base response where there is one.
            key: of the base response that the row itself lacks, "" where it doesn't.
        """
        prompt = row["prompt_ids"]
        chosen, rejected, base = (
            self.part(row[f"{part}_ids"], prompt) if row[f"{part}_ids"] else None
            for part in ("chosen", "rejected", "base")
        )
        if row["lacks"]:
            base_from = "to be made" if key else "no room"
        else:
            base_from = "store" if key else "data"
        return ShownRow(
            name, row["row"], self.part(prompt), chosen, rejected, base, base_from, row["length"]
        )


def first_rows(
    names: Sequence[str], filled: Sequence[Dataset], keys: Sequence[Sequence[str]], count: int
) -> list[tuple[str, dict[str, Any], str]]:
    """The first rows of data sets, one after the other: (name, row, key)."""
    found = []
    for name, rows, row_keys in zip(names, filled, keys, strict=True):
        for i in range(min(count - len(found), len(rows))):
            found.append((name, rows[i], row_keys[i]))
    return found
