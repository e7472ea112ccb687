"""Lengths, repeats and base responses of rows, in numbers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from bapo_plugin.answers.engine import shown
from bapo_plugin.commands.check.facts import Lengths, Repeats
from bapo_plugin.rows.columns import IDS
from bapo_plugin.rows.tokens import digest, fit_length

_BINS = 10


@dataclass
class Measured:
    """Numbers of n rows.

    Args:
        lengths: prompt, chosen, rejected and base, [n, 4] int64, tokens; base is 0 where it is to be made.
        marks: of their tokens without the end of turn, [n, 4] int64.
        over: above sequence_len, [n] bool.
        mendable: of those, "truncate" would do, [n] bool.
        lacks: no base response yet, [n] bool.
        cut: the base response was cut, [n] bool.
        empty: the base response says nothing, [n] bool.
        most: tokens that a base response that is to be made may have, with what the model is asked with, [n] int64.
    """

    lengths: np.ndarray
    marks: np.ndarray
    over: np.ndarray
    mendable: np.ndarray
    lacks: np.ndarray
    cut: np.ndarray
    empty: np.ndarray
    most: np.ndarray

    @classmethod
    def together(cls, parts: Iterable["Measured"]) -> "Measured":
        """One after the other."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*map(np.concatenate, columns))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def totals(self) -> np.ndarray:
        """Prompt and longest response, as far as it is there, [n] int64, tokens."""
        return self.lengths[:, 0] + self.lengths[:, 1:].max(axis=1)


def measure(rows: Dataset, sequence_len: int, most: int, stops: set[int]) -> Measured:
    """Measure rows of one data set.

    Args:
        rows: `rows.tokens.FEATURES`, with the base responses that there are.
        sequence_len: most tokens of prompt and response.
        most: tokens of a base response that is to be made, `bapo.anchors.max_new_tokens`.
        stops: tokens that end an answer.
    """
    found: list[tuple] = []
    columns = [*IDS, "open_ids", "length", "lacks", "base_cut"]
    for part in rows.select_columns(columns).with_format("numpy").iter(batch_size=1000):
        for *ids, opened, length, lacks, cut in zip(*(part[c] for c in columns), strict=True):
            row = {key: value.tolist() for key, value in zip(IDS, ids, strict=True)}
            sizes = [len(value) for value in row.values()]
            room = sequence_len - sizes[0] - len(opened)
            over = length in ("cut", "long") or sizes[0] + max(sizes[1:]) > sequence_len
            mendable = over and (
                length == "cut" or fit_length(row, sequence_len, "truncate")[1] == "cut"
            )
            prompt, *responses = row.values()
            texts = [prompt, *(shown(value, stops) for value in responses)]
            empty = not lacks and len(texts[3]) <= len(opened)
            open_to = len(opened) + min(most, max(room, 0))
            found.append(
                (sizes, [digest(t) for t in texts], over, mendable, lacks, cut, empty, open_to)
            )
    lengths, marks, *others = zip(*found, strict=True) if found else ((),) * 8
    flags = [np.array(values, dtype=bool) for values in others[:-1]]
    return Measured(
        np.array(lengths, dtype=np.int64).reshape(-1, 4),
        np.array(marks, dtype=np.int64).reshape(-1, 4),
        *flags,
        np.array(others[-1], dtype=np.int64),
    )


def lengths_of(rows: Measured, sequence_len: int, policy: str) -> Lengths:
    """Of all rows; there must be one."""
    totals = rows.totals
    return Lengths(
        rows=len(rows),
        sequence_len=sequence_len,
        policy=policy,
        median=int(np.median(totals)),
        longest=int(totals.max()),
        bins=bins_of(totals, sequence_len),
        over=int(rows.over.sum()),
        mendable=int(rows.mendable.sum()),
        open=int(rows.lacks.sum()),
    )


def bins_of(totals: np.ndarray, sequence_len: int) -> list[tuple[int, int, int]]:
    """(from, to, count) of about ten bins of a round width up to `sequence_len`, both ends included, and of one with all
    that is above.

    Args:
        totals: [n] int64, n > 0.
    """
    fit = totals[totals <= sequence_len]
    found = []
    if len(fit):
        low, high = int(fit.min()), int(fit.max())
        width = _round_up((high - low + 1) / _BINS)
        first = low // width
        for i, n in enumerate(np.bincount(fit // width - first)):
            start = (first + i) * width
            found.append((start, min(start + width - 1, sequence_len), int(n)))
    if above := len(totals) - len(fit):
        found.append((sequence_len + 1, int(totals.max()), above))
    return found


def _round_up(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, ..."""
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale >= width:
                return step * scale
        scale *= 10


def repeats_of(splits: Mapping[str, Measured], refused: int) -> Repeats:
    """What rows say twice.

    Args:
        splits: rows of each split; a repetition counts within its own.
        refused: rows that were refused because chosen and rejected are the same.
    """
    found = Repeats(0, 0, 0, 0, refused)
    for rows in splits.values():
        prompt, chosen, rejected, base = rows.marks.T
        has_base = ~rows.lacks
        found.prompts += len(rows) - len(np.unique(prompt))
        found.rows += len(rows) - len(np.unique(rows.marks[:, :3], axis=0))
        found.base_is_chosen += int((has_base & (base == chosen)).sum())
        found.base_is_rejected += int((has_base & (base == rejected)).sum())
        found.chosen_is_rejected += int((chosen == rejected).sum())
    return found


def saved_by_sharing(rows: Measured) -> float:
    """Share of the tokens of separate rows that are saved where the prompt is computed once, of rows that fit; base
    responses that are to be made count with all the tokens that they may have, so that it is a lower bound. 0 where none
    fits."""
    prompt, chosen, rejected, base = rows.lengths.T * ~rows.over
    responses = chosen + rejected + np.where(rows.lacks & ~rows.over, rows.most, base)
    if not prompt.any():
        return 0.0
    return float(2 * prompt.sum() / (3 * prompt + responses).sum())
