"""The data sets of a configuration, as tokenised rows.

axolotl loads (local files, hub, cloud), renders, merges, shuffles and splits; in between, every row
is checked, gets its base response rendered and is tokenised. All faulty rows are reported in one
message before a model is loaded. The result is kept under `dataset_prepared_path`, under a key of
everything that it depends on: the data, the strategy, the tokenizer, the length policy, our version.
"""

import hashlib
import inspect
import json
import math
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.loaders import load_tokenizer
from axolotl.prompt_strategies.dpo import load as load_strategy
from axolotl.utils.data.lock import FileLockLoader
from axolotl.utils.data.shared import (
    create_train_validation_split,
    datasets_with_name_generator,
    load_dataset_with_config,
    merge_datasets,
)
from axolotl.utils.data.utils import deduplicate_and_log_datasets
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from datasets import Dataset, DatasetDict, load_from_disk

from bapo_plugin import __version__
from bapo_plugin.anchors.generate import add_anchors, anchors_key
from bapo_plugin.anchors.provenance import tokenizer_hash
from bapo_plugin.rows.strategies import BaseRenderer, Source
from bapo_plugin.rows.tokens import (
    FEATURES,
    IDS,
    apply_policy,
    faulty_rows,
    prepare_row,
    report_rows,
)

LOG = get_logger("axolotl." + __name__)


def load_datasets(cfg: Any) -> TrainDatasetMeta:
    """Rows for training and evaluation, in the form axolotl's `train` takes them from a plugin."""
    train, evaluation = prepare_rows(cfg, load_tokenizer(cfg))
    steps = math.ceil(len(train) * cfg.num_epochs / cfg.batch_size)
    return TrainDatasetMeta(train_dataset=train, eval_dataset=evaluation, total_num_steps=steps)


def prepare_rows(
    cfg: Any, tokenizer: Any, evaluation: bool = False
) -> tuple[Dataset, Dataset | None]:
    """Tokenised rows of `datasets:` and of `test_datasets:` or the `val_set_size` share.

    Columns: prompt, chosen, rejected, base (text as rendered), prompt_ids, chosen_ids,
    rejected_ids, base_ids (list of int).

    Args:
        cfg: axolotl's validated configuration.
        tokenizer: axolotl's for this configuration.
        evaluation: for `axolotl evaluate`, which compares with the model without any adapter.

    Raises:
        ValueError: faulty rows (all of them in one message), rows over `sequence_len` with
            `excess_length_strategy: raise`, a data set without its split, or no row left.
    """
    splits = [split for split in ("datasets", "test_datasets") if cfg[split]]
    # Every rank makes its share of missing base responses; what they need is only read here.
    loaded = [_open_split(cfg, tokenizer, split, evaluation) for split in splits]

    def load() -> tuple[Dataset, Dataset | None]:
        train, *test = [_load_split(cfg, tokenizer, split) for split in loaded]
        if test:
            return train, test[0]
        if size := cfg.val_set_size:
            # axolotl makes a float of it, with which `datasets` refuses a number of rows
            return create_train_validation_split(train, cfg, int(size) if size >= 1 else size)
        return train, None

    loader = FileLockLoader(cfg)  # the first rank does the work, the others take what it stored
    try:
        train, test = loader.load(load)
    finally:
        loader.cleanup()
    if cfg.dataset_exact_deduplication:
        train, test = deduplicate_and_log_datasets(dataset=train, other_dataset=test)
    return train, test


class _Split(NamedTuple):
    """A split's data sets, with base responses; none where they are prepared already."""

    name: str
    sources: list[Source]
    path: Path


def _open_split(cfg: Any, tokenizer: Any, split: str, evaluation: bool) -> _Split:
    sources = open_sources(cfg, tokenizer, split)
    adapter = None if evaluation else reference_adapter(cfg)
    anchored = anchors_key(cfg, tokenizer, sources, adapter)
    root = Path(cfg.dataset_prepared_path or DEFAULT_DATASET_PREPARED_PATH)
    path = root / f"bapo-{split}-{_cache_key(cfg, tokenizer, sources, anchored)}"
    if _is_prepared(cfg, path):
        return _Split(split, [], path)
    return _Split(split, add_anchors(cfg, tokenizer, sources, adapter), path)


def _is_prepared(cfg: Any, path: Path) -> bool:
    return not cfg.skip_prepare_dataset and not cfg.is_preprocess and path.exists()


def _load_split(cfg: Any, tokenizer: Any, split: _Split) -> Dataset:
    if _is_prepared(cfg, split.path):
        LOG.info(f"Loading prepared rows of {split.name} from {split.path}")
        return load_from_disk(str(split.path))
    rows = merge_datasets(_build(cfg, tokenizer, split.sources), cfg)
    if not cfg.skip_prepare_dataset:
        _save(rows, split.path)
    return rows


def reference_adapter(cfg: Any) -> str | None:
    """The adapter that is part of the reference: that of `lora_model_dir`, unless `reference: base`."""
    return cfg.lora_model_dir if cfg.bapo.get("reference", "start") == "start" else None


def open_sources(cfg: Any, tokenizer: Any, split: str) -> list[Source]:
    """Raw rows of `datasets:` or `test_datasets:`.

    Raises:
        ValueError: a data set has no rows, not the split, or an unknown `type:`.
    """
    field_base = (cfg.bapo.get("dataset_field_base") or {}).get(split) or []
    sources = []
    for i, entry in enumerate(cfg[split]):
        named = (field_base[i] if i < len(field_base) else None) or cfg.bapo.get("field_base")
        renderer = BaseRenderer(
            _transform(cfg, tokenizer, split, i),
            field_base=named or "base",
            field_base_named=bool(named),
            entry=entry,
        )
        for config in datasets_with_name_generator([entry]):
            rows = load_dataset_with_config(config, cfg.hf_use_auth_token, streaming=False)
            name = f"{split}[{i}] ({entry.path})"
            if isinstance(rows, DatasetDict):
                if "train" not in rows:
                    raise ValueError(
                        f"{name} has no split 'train' but {', '.join(rows)}: name one with `split:`"
                    )
                rows = rows["train"]
            if config.get("shards"):
                rows = rows.shard(config["shards"], config.get("shards_idx") or 0)
            if len(rows) == 0:
                raise ValueError(f"{name} has no rows: check the file and `split:`")
            sources.append(Source(name, rows, renderer))
    return sources


def _transform(cfg: Any, tokenizer: Any, split: str, index: int) -> Any:
    """The data set's own prompt strategy, bound to the tokenizer."""
    kind = cfg[split][index].get("type")
    if not kind:
        return lambda row: row  # no type: the columns are rendered already
    if isinstance(kind, dict):
        kind = "user_defined.default"
    # strategies read cfg.datasets[index], also for a test data set
    own = DictDefault({**cfg, "datasets": cfg[split]})
    strategy = load_strategy(kind, own, dataset_idx=index)
    if isinstance(strategy, tuple):
        strategy = strategy[0]
    if strategy is None:
        raise ValueError(
            f"{split}[{index}].type: {kind!r} is not a DPO prompt strategy of axolotl or of yours "
            "(the warning above has the reason); examples are chat_template.default, chatml.intel"
        )
    if "tokenizer" in inspect.signature(strategy).parameters:
        strategy = partial(strategy, tokenizer=tokenizer)
    return strategy


def _build(cfg: Any, tokenizer: Any, sources: list[Source]) -> list[Dataset]:
    strategy = str(cfg.excess_length_strategy or "drop").lower()
    built, problems = [], []
    for source in sources:
        rows = source.rows.map(
            prepare_row,
            fn_kwargs={
                "render": source.renderer,
                "tokenizer": tokenizer,
                "sequence_len": cfg.sequence_len,
                "strategy": strategy,
            },
            remove_columns=source.rows.column_names,
            features=FEATURES,
            num_proc=_num_proc(cfg, len(source.rows)),
            load_from_cache_file=False,
            desc=f"Rendering and tokenising {source.name}",
        )
        if faulty := faulty_rows(rows):
            problems.append(report_rows(source.name, faulty, len(rows)))
        elif strategy == "raise" and "long" in rows["length"]:
            long = [i for i, length in enumerate(rows["length"], start=1) if length == "long"]
            problems.append(_report_long(source.name, long, rows, cfg.sequence_len))
        built.append((source.name, rows))
    if problems:
        raise ValueError("\n".join(problems))
    return [apply_policy(name, rows, cfg.sequence_len) for name, rows in built]


def _report_long(name: str, long: list[int], rows: Dataset, limit: int) -> str:
    faulty = []
    for i in long:
        row = rows[i - 1]
        tokens = ", ".join(f"{key.removesuffix('_ids')} {len(row[key])}" for key in IDS)
        faulty.append((i, f"{tokens} tokens: prompt + response is over sequence_len: {limit}"))
    return (
        report_rows(name, faulty, len(rows))
        + "\n  Raise sequence_len, or set `excess_length_strategy: drop` or `truncate`."
    )


def _num_proc(cfg: Any, total: int) -> int | None:
    workers = min(cfg.dataset_num_proc or 1, total // 256)  # a process costs more than 256 rows
    return workers if workers > 1 else None


def _cache_key(cfg: Any, tokenizer: Any, sources: list[Source], anchored: str) -> str:
    parts = [
        __version__,
        [
            (s.name, _content_hash(s.rows), s.renderer.field_base, s.renderer.source())
            for s in sources
        ],
        [cfg.sequence_len, str(cfg.excess_length_strategy), cfg.seed, cfg.shuffle_merged_datasets],
        [cfg.shuffle_before_merging_datasets, cfg.curriculum_sampling],
        [cfg.chat_template, cfg.chat_template_jinja, cfg.default_system_message],
        [dict(entry) for split in ("datasets", "test_datasets") for entry in cfg[split] or []],
        [tokenizer_hash(tokenizer), tokenizer.chat_template, anchored],
    ]
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()[:16]


def _content_hash(rows: Dataset) -> str:
    """Of what the rows say; the fingerprint of `datasets` follows the file's time stamp instead."""
    digest = hashlib.sha256(str(rows.features).encode())
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def _save(rows: Dataset, path: Path) -> None:
    """Store under a temporary name first: a run that is killed leaves no half-written rows."""
    partial_path = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        rows.save_to_disk(str(partial_path))
        shutil.rmtree(path, ignore_errors=True)
        partial_path.rename(path)
    finally:
        shutil.rmtree(partial_path, ignore_errors=True)
