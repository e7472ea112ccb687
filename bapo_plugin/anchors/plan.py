"""Which base responses are missing, and why: rows that were rendered, against what the store has."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value, concatenate_datasets

from bapo_plugin.anchors.prompts import Prompts, distinct_prompts
from bapo_plugin.anchors.provenance import differences, fingerprint
from bapo_plugin.answers.engine import Answer
from bapo_plugin.store import Store

KIND = "anchor"


class Kept(NamedTuple):
    """An answer in the store: as the model gave it within `limit` tokens."""

    ids: tuple[int, ...]
    cut: bool
    limit: int
    provenance: str
    prompt_ids: tuple[int, ...]

    def within(self, limit: int) -> Answer | None:
        """The answer that a limit would have given; None where that can't be told from this one.

        An answer that ended doesn't depend on the limit, and the beginning of one that was cut is what a
        smaller limit gives.
        """
        if self.cut and self.limit < limit:
            return None
        return Answer(self.ids[:limit], self.cut or len(self.ids) > limit)


@dataclass
class Plan:
    """What rows need.

    Args:
        requests: the distinct prompts that have no usable answer in the store, the longest first.
        reused: those that have one.
        reused_tokens, reused_cut: of their answers.
        first: the first few of all.
        rows: number of rows that need an answer.
        provenance: of the answers.
        stop_ids: tokens that end an answer.
    """

    requests: Prompts
    reused: Prompts
    reused_tokens: int
    reused_cut: int
    first: Prompts
    rows: int
    provenance: dict[str, Any]
    stop_ids: list[int]


@dataclass(frozen=True)
class StoredAnswers:
    """`usable` of a store, for the processes of `Dataset.map`: it is opened where it is asked.

    Args:
        path: of the store.
    """

    path: Path

    def __call__(self, limits: Mapping[str, int]) -> dict[str, Answer]:
        """See `usable`."""
        with Store(self.path, "base responses") as store:
            return usable(store, limits)


def with_keys(
    rows: Dataset,
    made_by: Mapping[str, Any],
    max_new_tokens: int,
    sequence_len: int,
    num_proc: int | None = None,
) -> Dataset:
    """Rendered rows with columns `key` ("" where no base response is needed) and `limit`.

    Args:
        rows: of `rows.tokens.prepare_batch`.
        made_by: provenance of the answers.
        max_new_tokens, sequence_len: most tokens of an answer, and of prompt and answer.
        num_proc: processes.
    """
    if not len(rows):
        return rows.add_column("key", pa.array([], pa.string())).add_column(
            "limit", pa.array([], pa.int64())
        )
    columns = ["lacks", "length", "prompt_ids", "open_ids"]
    keys = rows.select_columns(columns).map(
        _keys_of,
        batched=True,
        batch_size=1000,
        fn_kwargs={
            "mark": fingerprint(made_by),
            "max_new_tokens": max_new_tokens,
            "sequence_len": sequence_len,
        },
        remove_columns=columns,
        features=Features({"key": Value("string"), "limit": Value("int64")}),
        num_proc=num_proc,
        desc="Naming the base responses that rows lack",
    )
    return concatenate_datasets([rows, keys], axis=1)


def _keys_of(
    batch: Mapping[str, list], mark: str, max_new_tokens: int, sequence_len: int
) -> dict[str, list]:
    keys, limits = [], []
    columns = (batch[name] for name in ("lacks", "length", "prompt_ids", "open_ids"))
    for lacks, length, prompt, rest in zip(*columns, strict=True):
        needs = lacks and length != "long"
        ids = [*prompt, *rest]
        keys.append(key_of(mark, ids) if needs else "")
        limits.append(min(max_new_tokens, sequence_len - len(ids)) if needs else 0)
    return {"key": keys, "limit": limits}


def key_of(mark: str, prompt_ids: Sequence[int]) -> str:
    """Of an answer: who gives it, and to what."""
    return hashlib.sha256(repr((mark, list(prompt_ids))).encode()).hexdigest()[:32]


def make_plan(
    sources: Iterable[Dataset],
    store: Store,
    made_by: dict[str, Any],
    stop_ids: Sequence[int],
) -> Plan:
    """Find the prompts that need an answer.

    Args:
        sources: rows of `with_keys`.
        store: with the answers that there are.
        made_by: provenance of the answers.
        stop_ids: tokens that end one.
    """
    prompts, rows = distinct_prompts(list(sources))
    there = np.zeros(len(prompts), dtype=bool)
    tokens = cut = 0
    for start in range(0, len(prompts), 1000):
        limits = prompts.limits_by_key(slice(start, start + 1000))
        found = usable(store, limits)
        there[start : start + 1000] = [key in found for key in limits]
        tokens += sum(len(answer.ids) for answer in found.values())
        cut += sum(answer.cut for answer in found.values())
    return Plan(
        requests=prompts.where(~there).longest_first(),
        reused=prompts.where(there),
        reused_tokens=tokens,
        reused_cut=cut,
        first=prompts.first(3),
        rows=rows,
        provenance=made_by,
        stop_ids=list(stop_ids),
    )


def usable(store: Store, limits: Mapping[str, int]) -> dict[str, Answer]:
    """The answers in the store that fit the limits."""
    found = {}
    for key, kept in read_kept(store, limits).items():
        if (answer := kept.within(limits[key])) is not None:
            found[key] = answer
    return found


def read_kept(store: Store, keys: Iterable[str]) -> dict[str, Kept]:
    """Answers in the store, whatever their limit."""
    found = {}
    for key, value in store.get(KIND, keys).items():
        entry = json.loads(value)
        found[key] = Kept(
            tuple(entry["ids"]),
            entry["answer"][2],
            entry["limit"],
            entry["provenance"],
            tuple(entry["prompt_ids"]),
        )
    return found


def explain(
    sources: Sequence[Dataset], plan: Plan, store: Store
) -> list[tuple[str, int, list[str]]]:
    """Why answers are reused or made, without making any.

    Returns:
        (reason, number of rows, first prompts) for each reason.
    """
    found: dict[str, tuple[int, list[str]]] = {}
    for rows in sources:
        columns = ["key", "limit", "words", "row_hash", "prompt_ids", "open_ids"]
        for part in rows.select_columns(columns).iter(batch_size=1000):
            former = {h: k.decode() for h, k in store.get("row", part["row_hash"]).items()}
            kept = read_kept(store, {*part["key"], *former.values()} - {""})
            marks = {entry.provenance for entry in kept.values()}
            known = {m: json.loads(v) for m, v in store.get("provenance", marks).items()}
            for key, limit, words, row, prompt, rest in zip(
                *(part[c] for c in columns), strict=True
            ):
                if not key:
                    continue
                reason = _reason(
                    kept.get(key),
                    kept.get(former.get(row, "")),
                    known,
                    plan.provenance,
                    limit,
                    (*prompt, *rest),
                )
                count, shown = found.get(reason, (0, []))
                found[reason] = (count + 1, [*shown, words][:3])
    return [(reason, count, shown) for reason, (count, shown) in found.items()]


def _reason(
    kept: Kept | None,
    before: Kept | None,
    known: Mapping[str, dict],
    made_by: dict[str, Any],
    limit: int,
    prompt_ids: tuple[int, ...],
) -> str:
    if kept is not None and kept.within(limit) is not None:
        return "reused: made with the same model and settings"
    if kept is not None:
        return f"to generate: it was cut at {kept.limit} tokens, and now it may have {limit}"
    if before is None:
        return "to generate: no response to this row yet"
    changes = differences(known.get(before.provenance, {}), made_by)
    if before.prompt_ids != prompt_ids and not any(
        change.startswith(("template", "tokenizer")) for change in changes
    ):
        changes.append("the prompt is rendered differently")
    return "to generate: " + "; ".join(changes or ["another setting changed"])
