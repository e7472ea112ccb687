"""The run that makes missing base responses.

Each distinct prompt is answered once, however many rows have it, and what is in the store is not made again: a
run that was killed goes on where it stopped, and several processes share the work.
"""

import json
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from bapo_plugin.anchors.plan import KIND, Plan, usable
from bapo_plugin.anchors.provenance import fingerprint
from bapo_plugin.answers.engine import Answer, Engine, ModelChanged, Request, shown
from bapo_plugin.store import Store


@dataclass
class Summary:
    """What a run did. Lengths in tokens; `seconds` of generation alone."""

    rows: int = 0
    prompts: int = 0
    generated: int = 0
    reused: int = 0
    cut: int = 0
    tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    samples: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        speed = f", {self.generated_tokens / self.seconds:,.0f} tokens/s" if self.generated else ""
        mean = self.tokens / max(1, self.prompts)
        lines = [
            f"Base responses: {self.rows:,} rows with {self.prompts:,} distinct prompts; {self.generated:,} generated, "
            f"{self.reused:,} reused, {self.cut:,} cut by their limit; {mean:.1f} tokens on average{speed}"
        ]
        for prompt, answer in self.samples:
            lines += [f"  prompt: {prompt!r}", f"  answer: {answer!r}"]
        return "\n".join(lines)


def make_missing(
    plan: Plan,
    engine: Engine,
    store: Store,
    tokenizer: Any,
    on_start: Callable[[], None] = lambda: None,
) -> Summary:
    """Answer the plan's requests, with other processes, until all are in the store.

    Args:
        plan: what is missing.
        engine: what answers; it is closed at the end.
        store: where answers are kept.
        tokenizer: to show answers as text.
        on_start: called before the work, if there is any: to load models and to try out a server.
    """
    summary = Summary(plan.rows, len(plan.reused) + len(plan.requests), len(plan.requests))
    summary.reused, summary.cut = len(plan.reused), plan.reused_cut
    summary.tokens = plan.reused_tokens
    try:
        if plan.requests:
            on_start()
            mark = fingerprint(plan.provenance)
            store.put("provenance", {mark: json.dumps(plan.provenance).encode()})
            started = time.monotonic()
            _run(plan, engine, store, tokenizer, summary)
            summary.seconds = time.monotonic() - started
    finally:
        engine.close()
    words = plan.first.words()
    for key, answer in usable(store, plan.first.limits_by_key()).items():
        text = tokenizer.decode(shown(answer.ids, plan.stop_ids))
        summary.samples.append((shorten(words[key]), shorten(text)))
    return summary


def remember_rows(rows: Dataset, store: Store) -> None:
    """Keep which answer each row has, so that a later `--explain` can say what changed."""
    for part in rows.select_columns(["key", "row_hash"]).iter(batch_size=1000):
        pairs = zip(part["row_hash"], part["key"], strict=True)
        store.put("row", {row: key.encode() for row, key in pairs if key})


def _run(plan: Plan, engine: Engine, store: Store, tokenizer: Any, summary: Summary) -> None:
    """Work until every request has an answer."""
    requests, started = plan.requests, time.monotonic()
    ends = np.cumsum(engine.batches(requests.lengths, requests.limits)).tolist()
    batches = [slice(*places) for places in pairwise([0, *ends])]
    done = np.zeros(len(requests), dtype=bool)
    bar = tqdm(
        total=len(plan.reused) + len(requests),
        initial=len(plan.reused),
        desc="Making base responses",
        unit="prompt",
        mininterval=1,
        smoothing=0,
        disable=int(os.environ.get("LOCAL_RANK", 0)) != 0,
    )

    def count(new: int) -> None:
        summary.generated_tokens += new
        speed = summary.generated_tokens / max(1e-9, time.monotonic() - started)
        bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
        bar.update(0)

    def ready(answers: Collection[Answer]) -> None:
        summary.tokens += sum(len(answer.ids) for answer in answers)
        summary.cut += sum(answer.cut for answer in answers)
        bar.update(len(answers))

    def left(batch: slice) -> tuple[dict[str, int], dict[str, int]]:
        """Of the prompts of a batch most tokens, and of those that have no answer yet their places, by key."""
        limits = requests.limits_by_key(batch)
        return limits, {key: i for i, key in enumerate(limits, batch.start) if not done[i]}

    with bar, store.keep_claims_alive():
        while batches:
            waiting = []
            for batch in batches:
                limits, todo = left(batch)
                mine = store.claim(todo)
                try:
                    # another process may have answered some before they were claimed
                    others = usable(store, {key: limits[key] for key in mine})
                    ready(others.values())
                    here = requests.requests([todo[key] for key in mine if key not in others])
                    _answer(here, engine, store, plan, tokenizer, count, ready)
                finally:
                    store.release(mine)
                done[[todo[key] for key in mine]] = True
                if len(mine) < len(todo):
                    waiting.append(batch)
            # the rest is another process's; if that ends without an answer, it becomes ours
            for batch in waiting:
                limits, todo = left(batch)
                others = usable(store, {key: limits[key] for key in todo})
                ready(others.values())
                done[[todo[key] for key in others]] = True
            batches = [batch for batch in waiting if not done[batch].all()]
            if batches:
                time.sleep(0.5)


def _answer(
    requests: list[Request],
    engine: Engine,
    store: Store,
    plan: Plan,
    tokenizer: Any,
    count: Callable[[int], None],
    ready: Callable[[Collection[Answer]], None],
) -> None:
    """Answer requests and store the answers, those that get ready at one time together."""
    mark = fingerprint(plan.provenance)
    answers: list[Answer] = []
    entries: dict[str, bytes] = {}
    last = time.monotonic()

    def flush() -> None:
        nonlocal last
        if entries:
            store.put(KIND, entries, done=entries)
            ready(answers)
            answers.clear()
            entries.clear()
        last = time.monotonic()

    if not requests:
        return
    try:
        for request, answer in engine.generate(requests, count):
            answers.append(answer)
            entries[request.key] = _entry(request, answer, mark, plan.stop_ids, tokenizer)
            # a server's answers come one by one; those of a batch belong together
            if engine.streams and time.monotonic() - last > 1:
                flush()
    except BaseException:
        if engine.streams:
            flush()
        raise
    flush()
    try:
        engine.confirm()
    except ModelChanged as error:
        store.remove(KIND, [request.key for request in requests])
        raise ModelChanged(
            f"{error}\nThe last {len(requests):,} answers are not kept, the others are; start again when the former model answers"
        ) from error


def _entry(
    request: Request, answer: Answer, mark: str, stop_ids: list[int], tokenizer: Any
) -> bytes:
    said = shown(answer.ids, stop_ids)
    return json.dumps(
        {
            "answer": [tokenizer.decode(said), len(said), answer.cut],  # for people; `ids` counts
            "ids": answer.ids,
            "prompt": request.prompt,
            "prompt_ids": request.prompt_ids,
            "limit": request.limit,
            "provenance": mark,
        },
        ensure_ascii=False,
    ).encode()


def shorten(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
