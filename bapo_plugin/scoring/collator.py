"""Rows to tensors, in two layouts: padded rows, or one packed row in which responses share their prompt.

Besides n preference rows a batch may hold m kept prompts (`bapo.keep`): rows with only a base response. Its sequences
are all chosen, all rejected, all base responses, then those of kept prompts: 3n + m.

In both, `token_counts` [3] has the tokens that are computed, those of them that are not padding, and
those that three separate rows would have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bapo_plugin.rows.columns import IDS, RESPONSES
from bapo_plugin.scoring.shared_prefix import Layout, Segment

# column of a row: its number among all rows that a trainer knows. A batch brings it to the loss, where what is known
# of the row is looked up: numbers stay whole, while DeepSpeed casts every float of a batch to its own 16-bit type.
ROW = "row_number"
# of a batch: the numbers of its kept prompts, [m]
KEPT = "kept_number"
# of a batch: prompts with only their base response, for the reference to compute its distribution on
ANCHORED = "anchored"
# of a batch: as cu_seqlens, with each token of a base response as a sequence of its own, [2n + T_b + m + 1]
BASE_TOKENS = "base_token_seqlens"


Anchored = Literal["none", "kept", "all"]


@dataclass
class PaddedCollator:
    """Each prompt with each of its three responses as one padded row; responses also as flat lists.

    A batch of n rows becomes 3n sequences: all chosen, then all rejected, then all base. Besides the
    model's input it holds where the response tokens are, so that nothing else reaches the vocabulary
    projection: hidden state `response_index[t]` (an index into the flattened [3n · L] positions)
    predicts `response_labels[t]`, and sequence s owns t in [cu_seqlens[s], cu_seqlens[s + 1]).

    Args:
        pad_token_id: fills up on the right; it is masked out.
        pad_to_multiple_of: round L up to a multiple.
        anchored: the rows whose base responses are also given alone, as the batch "anchored": "none", those of
            "kept" prompts, or "all".

    Example:
        >>> rows = [{"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5], "base_ids": [6, 7]}]
        >>> batch = PaddedCollator(pad_token_id=0)(rows)
        >>> batch["input_ids"].tolist()
        [[1, 2, 3, 4], [1, 2, 5, 0], [1, 2, 6, 7]]
        >>> batch["response_index"].tolist()
        [1, 2, 5, 9, 10]
        >>> batch["response_labels"].tolist(), batch["cu_seqlens"].tolist()
        ([3, 4, 5, 6, 7], [0, 2, 3, 5])
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    anchored: Anchored = "none"

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns input_ids, attention_mask [3n + m, L] int64; response_index, response_labels [T] int64;
        cu_seqlens [3n + m + 1], base_token_seqlens [2n + T_b + m + 1] int32; token_counts; row_number [n] and kept_number [m] int64 where the rows have
        one; anchored."""
        batch = self._pad(_in_order(rows)) | _numbers(rows) | _base_tokens(rows)
        if anchored := _only_base(rows, self.anchored):
            batch[ANCHORED] = self._pad(_in_order(anchored))
        return batch

    def _pad(self, sequences: list[tuple[int, dict[str, Any], str]]) -> dict[str, torch.Tensor]:
        prompts = [row["prompt_ids"] for _, row, _ in sequences]
        responses = [row[key] for _, row, key in sequences]
        batch = pad_sequences(prompts, responses, self.pad_token_id, self.pad_to_multiple_of)
        separate = sum(map(len, prompts)) + sum(map(len, responses))
        counts = [batch["input_ids"].numel(), separate, separate]
        batch["token_counts"] = torch.tensor(counts)
        return batch


def pad_sequences(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
) -> dict[str, torch.Tensor]:
    """S prompts, each with one response, as padded rows; see `PaddedCollator` for what is in them."""
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    if pad_to_multiple_of:
        longest = -(-longest // pad_to_multiple_of) * pad_to_multiple_of

    input_ids = torch.full((len(prompts), longest), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    index, cu_seqlens = [], [0]
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        input_ids[i, :end] = torch.tensor([*prompt, *response])
        attention_mask[i, :end] = 1
        # the hidden state one position earlier predicts the token
        index.append(torch.arange(len(prompt) - 1, end - 1) + i * longest)
        cu_seqlens.append(cu_seqlens[-1] + len(response))
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "response_index": torch.cat(index),
        "response_labels": torch.tensor([t for response in responses for t in response]),
        "cu_seqlens": torch.tensor(cu_seqlens, dtype=torch.int32),
    }


@dataclass
class SharedPrefixCollator:
    """Each prompt once, its three responses after it, all examples in one row without padding.

    Responses come out in the order of `PaddedCollator`: all chosen, all rejected, all base. The row holds
    them example by example; `layout` says where.

    Args:
        pad_to_multiple_of: fill the row up with a segment of its own that nothing else sees.
        tokens_per_batch: with more tokens than this, a batch is split into packs that the trainer takes one
            after another. A single row is never split.
        anchored: see `PaddedCollator`.

    Example:
        >>> rows = [{"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5], "base_ids": [6, 7]}]
        >>> batch = SharedPrefixCollator()(rows)
        >>> batch["input_ids"].tolist(), batch["position_ids"].tolist()
        ([[1, 2, 3, 4, 5, 6, 7]], [[0, 1, 2, 3, 2, 2, 3]])
        >>> batch["response_index"].tolist()
        [1, 2, 1, 1, 5]
        >>> [tuple(segment) for segment in batch["layout"].segments]
        [(0, 4, 0, 0), (4, 5, 0, 2), (5, 7, 0, 2)]
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None
    tokens_per_batch: int | None = None
    anchored: Anchored = "none"

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of `pack`, or {"packs": such batches, "order": [n] the rows' places in the micro-batch,
        "input_ids": [1, T] of all}."""
        if not self.tokens_per_batch:
            return self.pack(rows)
        parts = split_by_tokens(rows, self.tokens_per_batch)
        if len(parts) == 1:
            return self.pack(rows)
        packs = [self.pack([rows[i] for i in part]) for part in parts]
        return {
            "packs": packs,
            "order": torch.tensor([i for part in parts for i in part]),
            # for those who count tokens
            "input_ids": torch.cat([pack["input_ids"] for pack in packs], dim=1),
        }

    def pack(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns input_ids, position_ids [1, T] int64; response_index, response_labels [R] int64;
        cu_seqlens [3n + m + 1], base_token_seqlens [2n + T_b + m + 1] int32; layout; token_counts; row_number [n] and kept_number [m] int64 where the rows
        have one; anchored."""
        batch = self._pack(rows) | _numbers(rows) | _base_tokens(rows)
        if anchored := _only_base(rows, self.anchored):
            batch[ANCHORED] = self._pack(anchored)
        return batch

    def _pack(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        index: dict[tuple[int, str], list[int]] = {}
        separate = 0
        for i, row in enumerate(rows):
            prompt, start = row["prompt_ids"], len(ids)
            end = start + len(prompt)
            ids += prompt
            positions += range(len(prompt))
            for j, key in enumerate(_responses_of(row)):
                response = row[key]
                first = len(ids)
                ids += response
                positions += range(len(prompt), len(prompt) + len(response))
                segments.append(
                    Segment(start, len(ids), start, start)
                    if j == 0
                    else Segment(first, len(ids), start, end)
                )
                # the prompt's last state predicts the first token of each response
                index[i, key] = [end - 1, *range(first, len(ids) - 1)]
                separate += len(prompt) + len(response)
        real = len(ids)
        if self.pad_to_multiple_of and (extra := -len(ids) % self.pad_to_multiple_of):
            segments.append(Segment(len(ids), len(ids) + extra, len(ids), len(ids)))
            ids += [self.pad_token_id] * extra
            positions += range(extra)
        sequences = _in_order(rows)
        ordered = [index[i, key] for i, _, key in sequences]
        lengths = [0, *map(len, ordered)]
        labels = [token for _, row, key in sequences for token in row[key]]
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "response_index": torch.tensor([i for part in ordered for i in part]),
            "response_labels": torch.tensor(labels),
            "cu_seqlens": torch.tensor(lengths).cumsum(0).to(torch.int32),
            "layout": Layout(tuple(segments)),
            "token_counts": torch.tensor([len(ids), real, separate]),
        }


def split_by_tokens(rows: list[dict[str, Any]], budget: int) -> list[list[int]]:
    """Indices of rows in packs of at most `budget` tokens with shared prompts: the longest first, each into the
    first pack that has room."""
    packs: list[list[int]] = []
    rooms: list[int] = []
    sizes = [sum(len(row[key]) for key in IDS if key in row) for row in rows]
    for i in sorted(range(len(rows)), key=lambda i: -sizes[i]):
        fits = next((p for p, room in enumerate(rooms) if sizes[i] <= room), None)
        if fits is None:
            packs.append([])
            rooms.append(budget)
            fits = len(packs) - 1
        packs[fits].append(i)
        rooms[fits] -= sizes[i]
    return packs


def _responses_of(row: dict[str, Any]) -> list[str]:
    return [f"{name}_ids" for name in RESPONSES if f"{name}_ids" in row]


def _is_kept(row: dict[str, Any]) -> bool:
    return "chosen_ids" not in row


def _in_order(rows: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any], str]]:
    """(index of the row, row, column) of every response, in the order of a batch's sequences."""
    numbered = list(enumerate(rows))
    kept = [(i, row, "base_ids") for i, row in numbered if _is_kept(row)]
    whole = [(i, row) for i, row in numbered if not _is_kept(row)]
    return [(i, row, f"{name}_ids") for name in RESPONSES for i, row in whole] + kept


def _only_base(rows: list[dict[str, Any]], which: Anchored) -> list[dict[str, Any]]:
    """The rows of `anchored` with only their base response, in the order of a batch's sequences."""
    whole = [row for row in rows if not _is_kept(row)] if which == "all" else []
    kept = [row for row in rows if _is_kept(row)] if which != "none" else []
    return [{key: row[key] for key in ("prompt_ids", "base_ids")} for row in whole + kept]


def _numbers(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    found = {}
    for name, part in ((ROW, False), (KEPT, True)):
        own = [row for row in rows if _is_kept(row) == part]
        if own and all(ROW in row for row in own):
            found[name] = torch.tensor([row[ROW] for row in own])
    return found


def _base_tokens(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The base responses of rows token by token, all other sequences whole."""
    lengths = [
        part
        for _, row, key in _in_order(rows)
        for part in (
            [1] * len(row[key]) if key == "base_ids" and not _is_kept(row) else [len(row[key])]
        )
    ]
    return {BASE_TOKENS: torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)}


def packs_of(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a micro-batch that go through the model one after another."""
    return batch.get("packs") or [batch]


def num_kept(batch: dict[str, Any]) -> int:
    """Kept prompts in a collated batch."""
    return batch[KEPT].numel() if KEPT in batch else 0


def num_rows(batch: dict[str, Any]) -> int:
    """Preference rows in a collated batch."""
    if "packs" in batch:
        return sum(map(num_rows, batch["packs"]))
    return (batch["cu_seqlens"].numel() - 1 - num_kept(batch)) // len(RESPONSES)
