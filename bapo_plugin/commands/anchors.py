"""What `bapo anchors` does."""

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from axolotl.cli.config import load_cfg
from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.loaders import load_tokenizer
from datasets import Dataset, Features, Value
from datasets import Sequence as SequenceOf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bapo_plugin.anchors.generate import shorten
from bapo_plugin.anchors.plan import StoredAnswers, explain, make_plan
from bapo_plugin.answers.engine import shown
from bapo_plugin.compat import only_reading
from bapo_plugin.config import is_active, not_bapo
from bapo_plugin.files import must_be_writable, whole
from bapo_plugin.models import WHOLE
from bapo_plugin.opening import store_path
from bapo_plugin.prepare import KEEP, Preparation
from bapo_plugin.rows.conversation import is_blank, read_flag, wrap
from bapo_plugin.rows.sources import Source
from bapo_plugin.rows.table import where
from bapo_plugin.scoring.reference import FILE
from bapo_plugin.store import Store

_ELSEWHERE = "name another place with --output"


def write_anchors(config: Path, output: Path | None) -> None:
    """Make what is missing; write rows with base responses.

    Raises:
        ValueError: the configuration is not one of BAPO, or as `add_anchors`.
    """
    work = _open(config)
    anchors = work.bapo.anchors
    if anchors.on_missing != "generate":
        raise ValueError(
            f"bapo.anchors.on_missing must be generate for this command; the YAML says {anchors.on_missing}"
        )
    if output is not None:
        must_be_writable(output.parent, _ELSEWHERE)
    rendered = work.rendered(keep=True)
    made_by = work.made_by()
    keyed = work.keyed(rendered, made_by)
    with Store(work.store_path, "base responses") as store:
        summary = work.make_missing(keyed, made_by, store)
        print(str(summary) if summary.rows else "Every row has a base response already.")
        print(f"The responses are kept in {work.store_path}")
        if output is None or int(os.environ.get("RANK", 0)):
            return
        sources = [
            (split, i, s)
            for split, parts in work.splits.items()
            for i, s in enumerate(parts)
            if split != KEEP
        ]
        for split, i, source in sources:
            path = output
            if len(sources) > 1:
                path = output.with_name(f"{output.stem}-{split}{i}{output.suffix}")
            rows = _filled(work, source, keyed[split][i])
            _write(rows, path)
            print(f"Wrote {len(rows):,} rows of {source.name} to {path}")


def explain_anchors(config: Path) -> None:
    """Print which responses are reused, which would be made, and why."""
    work = _open(config)
    made_by = work.made_by()
    keyed = work.keyed(work.rendered(keep=True), made_by)
    sources = [rows for parts in keyed.values() for rows in parts]
    with Store(work.store_path, "base responses") as store:
        plan = make_plan(sources, store, made_by, work.stop_ids)
        reasons = explain(sources, plan, store)
    table = Table(title=f"Base responses in {work.store_path}", show_lines=True)
    table.add_column("rows", justify="right")
    table.add_column("what and why", ratio=2)
    table.add_column("first prompts", ratio=2)
    own = sum(len(where(rows, "lacks", lambda lacks: not lacks)) for rows in sources)
    long = sum(map(len, sources)) - own - plan.rows
    if own:
        table.add_row(str(own), "in the data set itself", "")
    if long:
        table.add_row(str(long), "none: the prompt leaves no room within sequence_len", "")
    for reason, rows, prompts in reasons:
        table.add_row(str(rows), Text(reason), Text("\n".join(shorten(p, 100) for p in prompts)))
    Console().print(table)


def verify_stores(config: Path) -> None:
    """Read all that is kept for a configuration.

    Raises:
        StoreDamaged: an entry isn't sound; the file was set aside.
    """
    cfg = _load(config)
    folder = Path(cfg.dataset_prepared_path or DEFAULT_DATASET_PREPARED_PATH)
    for content, file in (
        ("base responses", store_path(cfg)),
        ("reference log-probs", folder / FILE),
    ):
        if not file.is_file():
            print(f"There are no {content} in {file}")
            continue
        with Store(file, content) as store:
            print(f"{store.verify():,} entries of {content} in {file}: all are sound")


def _load(config: Path) -> Any:
    with only_reading():
        cfg = load_cfg(str(config), **WHOLE)
    if not is_active(cfg):
        raise ValueError(not_bapo(config))
    return cfg


def _open(config: Path) -> Preparation:
    cfg = _load(config)
    return Preparation(cfg, load_tokenizer(cfg), keep=True)


def _filled(work: Preparation, source: Source, rendered: Dataset) -> Dataset:
    """The raw rows, with the generated responses in the base column, marks of those that were cut, and the token
    ids that the model gave, which training takes where they spell the response.

    A row whose prompt leaves no room has no response: null.
    """
    rows, name = source.rows, source.fields.base or "base"
    own = (v for part in _cells(rows, name) for v in part) if name in rows.features else ()
    like = next((value for value in own if not is_blank(value)), "")
    keys, limits = np.zeros(len(rows), "S32"), np.zeros(len(rows), np.int32)
    for part in rendered.select_columns(["row", "key", "limit"]).iter(batch_size=1000):
        at = np.array(part["row"]) - 1
        keys[at], limits[at] = np.array(part["key"], "S32"), part["limit"]
    made = {
        name: rows.features[name] if like else Value("string"),
        f"{name}_cut": Value("bool"),
        f"{name}_tokens": rows.features.get(f"{name}_tokens") or SequenceOf(Value("int64")),
    }
    others = {column: kind for column, kind in rows.features.items() if column not in made}
    stops = set(work.stop_ids)

    def said(ids: Sequence[int]) -> Any:
        return wrap(work.tokenizer.decode(shown(ids, stops)), like, source.fields)

    return rows.map(
        _fill,
        batched=True,
        with_indices=True,
        fn_kwargs={
            "name": name,
            "keys": keys,
            "limits": limits,
            "answers": StoredAnswers(work.store_path),
            "said": said,
        },
        features=Features(others | made),
        load_from_cache_file=False,
        new_fingerprint=rendered._fingerprint,  # nothing is read by it, and the function has none
        desc=f"Putting base responses into {source.name}",
    )


def _fill(
    batch: Mapping[str, list],
    indices: list[int],
    name: str,
    keys: np.ndarray,
    limits: np.ndarray,
    answers: StoredAnswers,
    said: Callable[[Sequence[int]], Any],
) -> dict[str, list]:
    """The base column, its marks and tokens, for `Dataset.map(batched=True, with_indices=True)`."""
    nothing = [None] * len(indices)
    marks, tokens = f"{name}_cut", f"{name}_tokens"
    base, given = list(batch.get(name, nothing)), list(batch.get(tokens, nothing))
    cut = [read_flag(value, marks) for value in batch.get(marks, nothing)]
    wanted = [key.decode() for key in keys[indices]]
    made = answers({k: n for k, n in zip(wanted, limits[indices].tolist(), strict=True) if k})
    for i, key in enumerate(wanted):
        if key:
            base[i], cut[i], given[i] = said(made[key].ids), made[key].cut, list(made[key].ids)
    return {name: base, marks: cut, tokens: given}


def _cells(rows: Dataset, column: str) -> Iterator[list]:
    for part in rows.select_columns([column]).iter(batch_size=1000):
        yield part[column]


def _write(rows: Dataset, path: Path) -> None:
    """As a whole or not at all."""
    with whole(path, _ELSEWHERE) as partial:
        if path.suffix == ".parquet":
            with _Patient(partial) as file:
                rows.to_parquet(file)
        else:
            with partial.open("w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


class _Patient(io.FileIO):
    """A file that says at its end what went wrong: Arrow ends the whole process where a write fails."""

    def __init__(self, path: Path):
        super().__init__(path, "w")
        self._error: OSError | None = None
        self._written = 0

    def write(self, data: Any) -> int:
        """All of it, or nothing any more after an error."""
        data = memoryview(data).cast("B")
        self._written += len(data)
        try:
            start = 0
            while start < len(data) and self._error is None:
                start += super().write(data[start:])
        except OSError as error:
            self._error = error
        return len(data)

    def tell(self) -> int:
        return self._written

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        if self._error is not None:
            raise self._error
