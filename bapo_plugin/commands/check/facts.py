"""What `bapo check` found, as plain values: `--json` prints them, the screen shows them."""

from dataclasses import dataclass, field
from typing import Any

from bapo_plugin.runs import hide


@dataclass
class Warned:
    """Something that deserves a look.

    Args:
        about: "key", "template", "rows", "length", "base", "repeats", "held_out" or "keep".
    """

    about: str
    text: str


@dataclass
class Group:
    """Rows of a data set of which the same is said.

    Args:
        rows: how many.
        first: the numbers of the first ones, counted from 1.
    """

    text: str
    rows: int
    first: list[int]


@dataclass
class DataSet:
    """A data set of the YAML.

    Args:
        split: "datasets" or "test_datasets".
        columns: of its raw rows.
        mapping: prompt, chosen, rejected, base, ... -> where that stands in a row.
        odd_rows: how many are odd; a row may be so in several ways.
        usable: rows that are left without those refused, and without those that lack a base response where
            `bapo.anchors.on_missing` leaves them out.
    """

    name: str
    split: str
    type: str
    rows: int
    columns: list[str]
    mapping: dict[str, str]
    usable: int
    refused: list[Group]
    odd: list[Group]
    odd_rows: int


@dataclass
class Part:
    """A part of a row as the model sees it, decoded from its token ids.

    Args:
        text: all of it, special tokens and end of turn included.
        tokens: how many.
        end: the end of turn at the end of the text, "" where there is none.
        special: [start, end) of special tokens in the text.
    """

    text: str
    tokens: int
    end: str
    special: list[tuple[int, int]]


@dataclass
class ShownRow:
    """A row as the model sees it.

    Args:
        row: its number in the data set, from 1.
        base: None where it is still to be made.
        base_from: "data", "store", "to be made" or "no room".
        length: what the length policy does to it: "fits", "cut" or "long"; "" where that is still to come.
    """

    data_set: str
    row: int
    prompt: Part
    chosen: Part
    rejected: Part
    base: Part | None
    base_from: str
    length: str


@dataclass
class Lengths:
    """Tokens of prompt and longest response, over all usable rows.

    Args:
        bins: (from, to, rows), both ends included; the last one has all that is above sequence_len.
        over: rows above sequence_len, which every policy touches.
        mendable: those of them that "truncate" would cut; it would leave out the others.
        open: rows whose base response is still to be made and may yet be the longest; it never goes above
            sequence_len.
    """

    rows: int
    sequence_len: int
    policy: str
    median: int
    longest: int
    bins: list[tuple[int, int, int]]
    over: int
    mendable: int
    open: int


@dataclass
class Repeats:
    """Rows that say the same twice.

    Args:
        prompts: rows whose prompt an earlier row of the split has.
        rows: rows whose prompt, chosen and rejected an earlier one has.
        chosen_is_rejected: refused ones included.
    """

    prompts: int
    rows: int
    base_is_chosen: int
    base_is_rejected: int
    chosen_is_rejected: int


@dataclass
class Bases:
    """Base responses, in rows unless it says otherwise.

    Args:
        in_data, in_store, to_make, no_room: every row is in one of them. no_room: its prompt fills sequence_len.
        requests: distinct prompts that are to be answered, those of `bapo.keep` included.
        most_tokens: that they may take together.
        kept_prompts: prompts of `bapo.keep`; kept_to_make: those of them that are to be answered.
        limit: most tokens of one that is to be made.
        reasons: why some are to be made, and for how many rows and prompts to keep.
        cut: of those that are there, how many a limit cut.
        empty: of those that are there, how many say nothing.
    """

    in_data: int
    in_store: int
    to_make: int
    no_room: int
    requests: int
    most_tokens: int
    kept_prompts: int
    kept_to_make: int
    cut: int
    empty: int
    limit: int
    reasons: list[tuple[str, int]]
    engine: str
    store: str


@dataclass
class HeldOut:
    """Rows on both sides, after all policies.

    Args:
        by: "val_set_size", "test_datasets" or "".
        overlap: held-out rows whose prompt is in training too.
        kept_in_training, watched_in_training: training rows whose prompt is in the file of `bapo.keep` or
            `bapo.retention`; None without such a file.
    """

    train: int
    held_out: int
    by: str
    overlap: int
    kept_in_training: int | None = None
    watched_in_training: int | None = None


@dataclass
class Sharing:
    """Whether the prompt is computed once for its three responses.

    Args:
        wanted: `bapo.shared_prefix`.
        refused: why the configuration alone rules it out, "" where it doesn't. The check on the loaded model is
            the last word.
        saved: share of the tokens of separate rows.
        at_least: base responses that are still to be made were counted with their limit.
    """

    wanted: str
    refused: str
    saved: float
    at_least: bool


@dataclass
class Steps:
    """Optimiser steps of one process with one GPU, or as many as WORLD_SIZE says."""

    rows_a_step: int
    per_epoch: int
    epochs: float
    total: int


@dataclass
class Facts:
    """All of it; a part is None where an error came before it."""

    config: str
    exit_code: int = 0
    errors: list[str] = field(default_factory=list)
    warnings: list[Warned] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    data_sets: list[DataSet] = field(default_factory=list)
    lengths: Lengths | None = None
    repeats: Repeats | None = None
    bases: Bases | None = None
    held_out: HeldOut | None = None
    sharing: Sharing | None = None
    steps: Steps | None = None
    shown: list[ShownRow] = field(default_factory=list)

    def fail(self, text: str) -> None:
        """An error; one that was met twice is told once."""
        text = hide(text)
        if text not in self.errors:
            self.errors.append(text)
        self.exit_code = 2

    def warn(self, about: str, text: str) -> None:
        self.warnings.append(Warned(about, hide(text)))
        self.exit_code = max(self.exit_code, 1)
