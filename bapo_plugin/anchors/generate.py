"""The run that makes missing base responses.

Each distinct prompt is answered once, however many rows have it, and what is in the store is not made again: a
run that was killed goes on where it stopped, and several processes share the work.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
    there = len(plan.limits) - len(plan.requests)
    tokens, seconds = 0, 0.0
    try:
        if plan.requests:
            on_start()
            mark = fingerprint(plan.provenance)
            store.put("provenance", {mark: json.dumps(plan.provenance).encode()})
            started = time.monotonic()
            tokens = _run(plan, engine, store, tokenizer)
            seconds = time.monotonic() - started
    finally:
        engine.close()
    summary = Summary(plan.rows, len(plan.limits), len(plan.requests), there, seconds=seconds)
    summary.generated_tokens = tokens
    keys = list(plan.limits)
    for start in range(0, len(keys), 1000):
        part = {key: plan.limits[key] for key in keys[start : start + 1000]}
        for answer in usable(store, part).values():
            summary.cut += answer.cut
            summary.tokens += len(answer.ids)
    first = usable(store, {key: plan.limits[key] for key in plan.words})
    for key, answer in first.items():
        text = tokenizer.decode(shown(answer.ids, plan.stop_ids))
        summary.samples.append((shorten(plan.words[key]), shorten(text)))
    return summary


def remember_rows(rows: Dataset, store: Store) -> None:
    """Keep which answer each row has, so that a later `--explain` can say what changed."""
    for part in rows.select_columns(["key", "row_hash"]).iter(batch_size=1000):
        pairs = zip(part["row_hash"], part["key"], strict=True)
        store.put("row", {row: key.encode() for row, key in pairs if key})


def _run(plan: Plan, engine: Engine, store: Store, tokenizer: Any) -> int:
    """Work until every request has an answer; returns the tokens made here."""
    tokens, started = 0, time.monotonic()
    batches = engine.batches(list(plan.requests.values()))
    done: set[str] = set()
    bar = tqdm(
        total=len(plan.limits),
        initial=len(plan.limits) - len(plan.requests),
        desc="Making base responses",
        unit="prompt",
        mininterval=1,
        smoothing=0,
        disable=int(os.environ.get("LOCAL_RANK", 0)) != 0,
    )

    def count(new: int) -> None:
        nonlocal tokens
        tokens += new
        speed = tokens / max(1e-9, time.monotonic() - started)
        bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
        bar.update(0)

    def there(requests: list[Request]) -> set[str]:
        return set(usable(store, {r.key: r.limit for r in requests}))

    with bar, store.keep_claims_alive():
        while batches:
            waiting = []
            for batch in batches:
                todo = [request for request in batch if request.key not in done]
                mine = set(store.claim([request.key for request in todo]))
                here = [request for request in todo if request.key in mine]
                try:
                    # another process may have answered some before they were claimed
                    others = there(here)
                    bar.update(len(others))
                    _answer(
                        [r for r in here if r.key not in others],
                        engine,
                        store,
                        plan,
                        tokenizer,
                        count,
                        bar,
                    )
                finally:
                    store.release(mine)
                if len(here) < len(todo):
                    waiting.append(batch)
                done |= mine
            # the rest is another process's; if that ends without an answer, it becomes ours
            batches = waiting
            if batches:
                wanted = [
                    request for batch in batches for request in batch if request.key not in done
                ]
                now = there(wanted)
                bar.update(len(now))
                done |= now
                batches = [b for b in batches if any(r.key not in done for r in b)]
                if batches:
                    time.sleep(0.5)
    return tokens


def _answer(
    requests: list[Request],
    engine: Engine,
    store: Store,
    plan: Plan,
    tokenizer: Any,
    count: Callable[[int], None],
    bar: Any,
) -> None:
    """Answer requests and store the answers, those that get ready at one time together."""
    mark = fingerprint(plan.provenance)
    ready: dict[str, bytes] = {}
    last = time.monotonic()

    def flush() -> None:
        nonlocal last
        if ready:
            store.put(KIND, ready, done=ready)
            bar.update(len(ready))
            ready.clear()
        last = time.monotonic()

    if not requests:
        return
    try:
        for request, answer in engine.generate(requests, count):
            ready[request.key] = _entry(request, answer, mark, plan.stop_ids, tokenizer)
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
