"""Which base responses are missing, and the run that makes them.

Rows are checked as far as they can be without a base response, before any model is loaded. Each
distinct prompt is answered once, however many rows have it, and what is in the store is not made
again: a run that was killed goes on where it stopped, and several processes share the work.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.utils.logging import get_logger
from datasets import Dataset, Features, Value
from datasets import Sequence as SequenceFeature
from tqdm.auto import tqdm
from transformers import GenerationConfig

from bapo_plugin.anchors.provenance import differences, fingerprint, provenance
from bapo_plugin.answers.server import ServerEngine
from bapo_plugin.answers.transformers import (
    Answer,
    Engine,
    Request,
    TransformersEngine,
    load_reference,
)
from bapo_plugin.config import AnchorsConfig, BAPOConfig, parse_block
from bapo_plugin.rows.strategies import GENERATED, GENERATED_CUT, BaseRenderer, RowError, Source
from bapo_plugin.rows.tokens import encode, report_rows
from bapo_plugin.store import Store

LOG = get_logger("axolotl." + __name__)

_PROMPT_FEATURES = Features(
    {name: Value("string") for name in ("prompt", "words", "tail", "row", "problem")}
    | {"prompt_ids": SequenceFeature(Value("int64")), "lacks": Value("bool")}
)


@dataclass
class Plan:
    """What a configuration's rows need.

    Args:
        requests: key -> request, one for each distinct prompt without a base response.
        keys: for each source, for each row: the key of its response; None for a row that has one, ""
            for a row whose prompt leaves no room within `sequence_len`.
        words: key -> the prompt as the user wrote it, to show.
        rows: hash of a row without its base response -> key of the response, to explain changes.
        provenance: of the responses.
        stop_ids: tokens that end a response.
    """

    requests: dict[str, Request]
    keys: list[list[str | None]]
    words: dict[str, str]
    rows: dict[str, str]
    provenance: dict[str, Any]
    stop_ids: list[int]


@dataclass
class Summary:
    """What `make_anchors` did. Lengths in tokens; `seconds` of generation alone."""

    rows: int = 0
    prompts: int = 0
    generated: int = 0
    reused: int = 0
    cut: int = 0
    mean_tokens: float = 0.0
    generated_tokens: int = 0
    seconds: float = 0.0
    samples: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        speed = f", {self.generated_tokens / self.seconds:,.0f} tokens/s" if self.generated else ""
        lines = [
            f"Base responses: {self.rows:,} rows with {self.prompts:,} distinct prompts; {self.generated:,} generated, "
            f"{self.reused:,} reused, {self.cut:,} cut by their limit; {self.mean_tokens:.1f} tokens on average{speed}"
        ]
        for prompt, answer in self.samples:
            lines += [f"  prompt: {prompt!r}", f"  answer: {answer!r}"]
        return "\n".join(lines)


def store_path(cfg: Any) -> Path:
    """Where base responses of this configuration are kept."""
    root = Path(cfg.dataset_prepared_path or DEFAULT_DATASET_PREPARED_PATH)
    return Path(settings(cfg).anchors.store or root / "bapo-anchors.sqlite")


def settings(cfg: Any) -> BAPOConfig:
    """The `bapo:` block of a validated configuration."""
    return parse_block(dict(cfg["bapo"]))


def missing_rows(source: Source) -> list[int]:
    """Indices of rows without a base response.

    Raises:
        ValueError: the YAML names a column that isn't there.
    """
    renderer, columns = source.renderer, source.rows.column_names
    if renderer.field_base not in columns:
        if renderer.field_base_named:
            raise ValueError(
                f"{source.name}: there is no column {renderer.field_base!r} with the base response (columns: "
                f"{', '.join(columns)}); mend `field_base:`, or remove it to have base responses generated"
            )
        return list(range(len(source.rows)))
    values = source.rows.select_columns([renderer.field_base])
    return [i for i, row in enumerate(values) if renderer.lacks_base(row)]


def anchors_key(
    cfg: Any, tokenizer: Any, sources: Sequence[Source], reference_adapter: str | None
) -> str:
    """Of all that generated base responses depend on besides the rows; "" where none is missing."""
    if not any(missing_rows(source) for source in sources):
        return ""
    anchors = settings(cfg).anchors
    if anchors.on_missing != "generate":
        return anchors.on_missing
    with Store(store_path(cfg), "base responses") as store:
        # the chat template's end of turn follows from template and rows, which are in the key already
        made_by = provenance(
            cfg,
            tokenizer,
            anchors,
            _stop_ids(cfg, tokenizer, set(), anchors),
            reference_adapter,
            store,
        )
    return f"{fingerprint(made_by)}-{anchors.max_new_tokens}-{anchors.on_cut}"


def add_anchors(
    cfg: Any,
    tokenizer: Any,
    sources: Sequence[Source],
    reference_adapter: str | None,
    report: Callable[[str], None] = LOG.info,
) -> list[Source]:
    """Give every row without a base response one, by the policy of `bapo.anchors`.

    Args:
        cfg: axolotl's validated configuration.
        tokenizer: axolotl's for this configuration.
        sources: data sets, as loaded.
        reference_adapter: an adapter that is part of the reference, or None.
        report: told what was done.

    Returns:
        The sources, with the generated responses in columns that `BaseRenderer` knows; without the
        rows that are to be left out.

    Raises:
        ValueError: rows that can't be used, cut responses with `on_cut: error`, or an engine that
            can't work; what was generated is kept.
    """
    anchors = settings(cfg).anchors
    missing = [missing_rows(source) for source in sources]
    if not any(missing) or anchors.on_missing == "error":
        return list(sources)  # missing ones are reported with the rows' other faults
    if anchors.on_missing == "skip":
        return [_skip(source, rows) for source, rows in zip(sources, missing, strict=True)]
    with Store(store_path(cfg), "base responses") as store:
        plan = make_plan(cfg, tokenizer, sources, reference_adapter, store)
        answers, summary = make_anchors(cfg, tokenizer, plan, reference_adapter, store)
    if summary.rows:
        report(str(summary))
    return [
        _with_answers(source, keys, answers, anchors.on_cut)
        for source, keys in zip(sources, plan.keys, strict=True)
    ]


def make_plan(
    cfg: Any,
    tokenizer: Any,
    sources: Sequence[Source],
    reference_adapter: str | None,
    store: Store,
) -> Plan:
    """Find the prompts that need a base response.

    Raises:
        ValueError: rows that can't be used whatever their base response is, in one message.
    """
    bapo = settings(cfg)
    checked, problems = [], []
    for source in sources:
        rows = source.rows.map(
            _check_row,
            fn_kwargs={"renderer": source.renderer, "tokenizer": tokenizer},
            remove_columns=source.rows.column_names,
            features=_PROMPT_FEATURES,
            load_from_cache_file=False,
            desc=f"Checking rows of {source.name}",
        )
        if faulty := [(i, text) for i, text in enumerate(rows["problem"], start=1) if text]:
            problems.append(report_rows(source.name, faulty, len(rows)))
        checked.append(rows)
    if problems:
        raise ValueError("\n".join(problems))

    tails = {tail for rows in checked for tail in rows.unique("tail") if tail}
    stop_ids = _stop_ids(cfg, tokenizer, tails, bapo.anchors)
    source_of = provenance(cfg, tokenizer, bapo.anchors, stop_ids, reference_adapter, store)
    mark = fingerprint(source_of)
    tail_tokens = {
        tail: len(tokenizer(tail, add_special_tokens=False)["input_ids"]) for tail in tails
    }
    plan = Plan({}, [], {}, {}, source_of, stop_ids)
    for rows in checked:
        keys: list[str | None] = []
        for row in rows:
            if not row["lacks"]:
                keys.append(None)
                continue
            room = cfg.sequence_len - len(row["prompt_ids"])
            if room <= 0:
                keys.append("")  # too long whatever the response is: the length policy decides
                continue
            # one token for the end of sequence where the template's tail doesn't have it
            limit = max(1, room - max(1, tail_tokens.get(row["tail"], 0)))
            limit = min(bapo.anchors.max_new_tokens, limit)
            ids = tuple(row["prompt_ids"])
            key = hashlib.sha256(repr((mark, ids, limit)).encode()).hexdigest()[:32]
            plan.requests.setdefault(key, Request(key, row["prompt"], ids, limit))
            plan.words.setdefault(key, row["words"])
            plan.rows[row["row"]] = key
            keys.append(key)
        plan.keys.append(keys)
    return plan


def make_anchors(
    cfg: Any, tokenizer: Any, plan: Plan, reference_adapter: str | None, store: Store
) -> tuple[dict[str, Answer], Summary]:
    """Answer the plan's requests that the store has no answer to.

    Returns:
        key -> answer for all requests, and what was done.
    """
    bapo = settings(cfg)

    def load() -> Any:
        return load_reference(cfg, tokenizer, reference_adapter)

    engine: Engine
    if bapo.anchors.engine == "server":
        engine = ServerEngine(tokenizer, bapo.anchors, cfg.base_model, plan.stop_ids)
    else:
        engine = TransformersEngine(load, tokenizer, bapo.anchors, plan.stop_ids)
    there = len(store.get("anchor", plan.requests))
    started = time.monotonic()
    tokens = 0
    try:
        if there < len(plan.requests):
            if isinstance(engine, ServerEngine) and bapo.anchors.server.probe:
                greedy = bapo.anchors.model_copy(update={"temperature": 0.0})
                probe = TransformersEngine(load, tokenizer, greedy, plan.stop_ids)
                try:
                    engine.probe(list(plan.requests.values()), probe)
                finally:
                    probe.close()
            store.put(
                "provenance",
                {fingerprint(plan.provenance): json.dumps(plan.provenance).encode()},
            )
            if isinstance(engine, TransformersEngine):
                engine.model  # noqa: B018  (load it now, before the clock runs)
            started = time.monotonic()
            tokens = _run(plan, engine, store)
    finally:
        engine.close()
    seconds = time.monotonic() - started
    answers = {
        key: Answer(*json.loads(value)["answer"])
        for key, value in store.get("anchor", plan.requests).items()
    }
    store.put("row", {row: key.encode() for row, key in plan.rows.items()})

    rows = sum(1 for keys in plan.keys for key in keys if key)
    summary = Summary(rows, len(answers), len(answers) - there, there, seconds=seconds)
    summary.cut = sum(answer.cut for answer in answers.values())
    summary.mean_tokens = sum(a.num_tokens for a in answers.values()) / max(1, len(answers))
    summary.generated_tokens = tokens
    for key in list(plan.requests)[:3]:
        summary.samples.append((_shorten(plan.words[key]), _shorten(answers[key].text)))
    return answers, summary


def explain(plan: Plan, store: Store) -> list[tuple[str, int, list[str]]]:
    """Why responses are reused or made, without making any.

    Returns:
        (reason, number of rows, first prompts) for each reason.
    """
    there = store.get("anchor", plan.requests)
    former = {row: key.decode() for row, key in store.get("row", plan.rows).items()}
    old = {key: json.loads(value) for key, value in store.get("anchor", former.values()).items()}
    marks = {value["provenance"] for value in old.values()}
    known = {mark: json.loads(value) for mark, value in store.get("provenance", marks).items()}
    found: dict[str, list[str]] = {}
    for row, key in plan.rows.items():
        request = plan.requests[key]
        if key in there:
            reason = "reused: made with the same model and settings"
        elif former.get(row) not in old:
            reason = "to generate: no response to this row yet"
        else:
            before = old[former[row]]
            changes = differences(known.get(before["provenance"], {}), plan.provenance)
            if tuple(before["prompt_ids"]) != request.prompt_ids and not any(
                change.startswith(("template", "tokenizer")) for change in changes
            ):
                changes.append("the prompt is rendered differently")
            if before["limit"] != request.limit:
                changes.append(f"most tokens: {before['limit']} -> {request.limit}")
            reason = "to generate: " + "; ".join(changes or ["another setting changed"])
        found.setdefault(reason, []).append(_shorten(plan.words[key], 100))
    return [(reason, len(prompts), prompts[:3]) for reason, prompts in found.items()]


def _run(plan: Plan, engine: Engine, store: Store) -> int:
    """Work until every request has an answer; returns the tokens made here."""
    tokens, started = 0, time.monotonic()
    batches = engine.batches(list(plan.requests.values()))
    done = set(store.get("anchor", plan.requests))
    bar = tqdm(
        total=len(plan.requests),
        initial=len(done),
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

    with bar, store.keep_claims_alive():
        while batches:
            waiting = []
            for batch in batches:
                todo = [request for request in batch if request.key not in done]
                if not todo:
                    continue
                mine = set(store.claim("anchor", [request.key for request in todo]))
                here = [request for request in todo if request.key in mine]
                try:
                    _answer(here, engine, store, plan, count, bar)
                finally:
                    store.release(mine)
                if len(here) < len(todo):
                    waiting.append(batch)
                done |= mine
            # the rest is another process's; if that ends without an answer, it becomes ours
            batches = waiting
            if batches:
                wanted = [request.key for batch in batches for request in batch]
                now = set(store.get("anchor", wanted)) - done
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
            store.put("anchor", ready, done=ready)
            bar.update(len(ready))
            ready.clear()
        last = time.monotonic()

    if not requests:
        return
    try:
        for request, answer in engine.generate(requests, count):
            ready[request.key] = json.dumps(
                {
                    "answer": answer,
                    "prompt": request.prompt,
                    "prompt_ids": request.prompt_ids,
                    "limit": request.limit,
                    "provenance": mark,
                },
                ensure_ascii=False,
            ).encode()
            # a server's answers come one by one; those of a batch belong together
            if isinstance(engine, ServerEngine) and time.monotonic() - last > 1:
                flush()
    except BaseException:
        if isinstance(engine, ServerEngine):
            flush()
        raise
    flush()


def _check_row(row: dict[str, Any], renderer: BaseRenderer, tokenizer: Any) -> dict[str, Any]:
    out: dict[str, Any] = dict.fromkeys(_PROMPT_FEATURES, "") | {"prompt_ids": [], "lacks": False}
    try:
        out["lacks"] = renderer.lacks_base(row)
        if not out["lacks"]:
            renderer(row)
            return out
        texts, words, chosen, _ = renderer.render_pair(row)
        if texts["chosen"] == texts["rejected"]:
            raise RowError(
                "chosen and rejected are identical: there is no preference in it; remove the row"
            )
        ids = encode(tokenizer, texts["prompt"])
        if not ids:
            raise RowError("the prompt has no tokens; fill it or remove the row")
    except RowError as error:
        return out | {"problem": str(error)}
    own = (renderer.field_base, f"{renderer.field_base}_cut")
    kept = json.dumps({k: v for k, v in row.items() if k not in own}, default=str, sort_keys=True)
    return out | {
        "prompt": texts["prompt"],
        "words": words,
        "prompt_ids": ids,
        "tail": chosen[2],
        "row": hashlib.sha256(kept.encode()).hexdigest()[:32],
    }


def _stop_ids(cfg: Any, tokenizer: Any, tails: set[str], anchors: AnchorsConfig) -> list[int]:
    """Tokens that end a response: of the tokenizer, the model, the chat template, and the user's."""
    found = {tokenizer.eos_token_id}
    try:
        config = GenerationConfig.from_pretrained(cfg.base_model, revision=cfg.revision_of_model)
        eos = config.eos_token_id
        found |= set(eos if isinstance(eos, list) else [eos])
    except OSError:
        pass  # a model without such a file
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for tail in tails:
        first = tokenizer(tail, add_special_tokens=False)["input_ids"][:1]
        found |= set(first) & special
    for text in anchors.stop:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(
                f"bapo.anchors.stop: {text!r} is {len(ids)} tokens for this tokenizer; name single tokens, such "
                "as <|im_end|>"
            )
        found |= set(ids)
    found.discard(None)
    if not found:
        raise ValueError(
            "nothing ends a response: the tokenizer has no EOS token; set special_tokens.eos_token or "
            "bapo.anchors.stop"
        )
    return sorted(found)


def _skip(source: Source, rows: list[int]) -> Source:
    if not rows:
        return source
    LOG.warning(
        f"{source.name}: {len(rows)} of {len(source.rows)} rows have no base response and are left out "
        "(bapo.anchors.on_missing: skip)"
    )
    return source._replace(rows=_without(source, set(rows)))


def _with_answers(
    source: Source, keys: list[str | None], answers: dict[str, Answer], on_cut: str
) -> Source:
    if not any(key is not None for key in keys):
        return source
    # a row whose prompt is too long gets a stand-in: no response could make it fit
    made = [answers[key] if key else ("…", 0, False) if key == "" else None for key in keys]
    rows = source.rows.add_column(GENERATED, [answer and answer[0] for answer in made])
    rows = rows.add_column(GENERATED_CUT, [bool(answer and answer[2]) for answer in made])
    cut = [i for i, answer in enumerate(made) if answer and answer[2]]
    source = source._replace(rows=rows)
    if cut and on_cut == "error":
        text = (
            "the base response was cut at {} tokens: raise bapo.anchors.max_new_tokens or sequence_len, or set "
            "bapo.anchors.on_cut: keep or drop"
        )
        faulty = [(i + 1, text.format(made[i][1])) for i in cut]
        raise ValueError(report_rows(source.name, faulty, len(rows)))
    if cut and on_cut == "drop":
        LOG.warning(
            f"{source.name}: {len(cut)} of {len(rows)} rows have a base response that was cut and are left out "
            "(bapo.anchors.on_cut: drop)"
        )
        source = source._replace(rows=_without(source, set(cut)))
    return source


def _without(source: Source, dropped: set[int]) -> Dataset:
    kept = [i for i in range(len(source.rows)) if i not in dropped]
    if not kept:
        raise ValueError(
            f"{source.name}: no row is left without those that have no usable base response; see "
            "bapo.anchors.on_missing and on_cut"
        )
    return source.rows.select(kept)


def _shorten(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
