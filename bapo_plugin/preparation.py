"""From a configuration to tokenised rows.

axolotl loads data sets (local files, hub, cloud); each row is read, rendered, checked and tokenised once, in
`dataset_num_proc` processes. All faulty rows are reported in one message before a model is loaded. Then the
base responses that rows lack are made, for all data sets together, and put into the rows as the tokens that the
model gave. The result is kept under `dataset_prepared_path`, under a key of everything that it depends on.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.utils.data.shared import merge_datasets
from axolotl.utils.logging import get_logger
from datasets import Dataset, concatenate_datasets, load_from_disk
from filelock import FileLock

from bapo_plugin.anchors.generate import make_missing, remember_rows
from bapo_plugin.anchors.plan import StoredAnswers, make_plan, with_keys
from bapo_plugin.anchors.provenance import fingerprint, provenance, tokenizer_hash
from bapo_plugin.config import BAPOConfig, parse_block
from bapo_plugin.files import writing
from bapo_plugin.models import (
    answer_beside,
    answering_engine,
    reference_adapter,
    reference_spec,
)
from bapo_plugin.opening import Opening, store_path
from bapo_plugin.rows.faults import Faults
from bapo_plugin.rows.sources import Source, content_hash, lacks_bases
from bapo_plugin.rows.table import as_table, check_long, finish, split_by_prompt
from bapo_plugin.rows.tokens import FEATURES, complete_batch, prepare_batch
from bapo_plugin.store import Store
from bapo_plugin.trust import refuse_strangers

LOG = get_logger("axolotl." + __name__)

# what prepared rows mean; rows of another format are not read
FORMAT = 3
SPLITS = ("datasets", "test_datasets")
_LIGHT = 2000  # rows that are worth a process where a row takes little
KEEP = "keep"  # prompts of `bapo.keep`, prepared beside them
_ELSEWHERE = "name another dataset_prepared_path"


class Preparation:
    """The data sets of a configuration, on their way to tokenised rows.

    Args:
        cfg: axolotl's validated configuration.
        tokenizer: axolotl's for this configuration.
        evaluation: the reference is the model without any adapter.
        keep: whether the prompts of `bapo.keep` are wanted too.
    """

    def __init__(self, cfg: Any, tokenizer: Any, evaluation: bool = False, keep: bool = False):
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.bapo: BAPOConfig = parse_block(dict(cfg.bapo))
        self.folder = Path(cfg.dataset_prepared_path or DEFAULT_DATASET_PREPARED_PATH)
        self.store_path = store_path(cfg)
        self._adapter = None if evaluation else reference_adapter(cfg)
        self._opening = Opening(cfg, tokenizer)
        self.splits = {
            split: [s for i in range(len(cfg[split])) for s in self._opening.sources(split, i)]
            for split in SPLITS
            if cfg[split]
        }
        if keep and self.bapo.keep:
            self.splits[KEEP] = [self._opening.prompts(self.bapo.keep.prompts, "bapo.keep.prompts")]
        self._keep = not cfg.skip_prepare_dataset
        self._contents: dict[int, str] = {}
        self._file_lock = FileLock(
            str(self.folder / ".bapo-rows.lock")
        )  # can be taken again while held

    # ------------------------------------------------------------ stages

    def rows(self) -> dict[str, Dataset]:
        """Prepared rows of each split, `datasets` first."""
        paths = {split: self._path(split) for split in self.splits}
        with self._lock():  # the first process does the work, the others take what it stored
            if self._are_there(paths):
                return self._load(paths)
            rendered = self.rendered(keep=self._lacks_any)
            if not self._lacks_any:
                return self._store(paths, self.completed(rendered))
        # every process makes a share of the missing base responses
        made_by = self.made_by()
        rendered = self.keyed(rendered, made_by)
        with Store(self.store_path, "base responses") as store:
            summary = self.make_missing(rendered, made_by, store)
        if self._is_main:
            LOG.info(str(summary))
        with self._lock():
            if self._are_there(paths, fresh=True):
                return self._load(paths)
            found = self._store(paths, self.completed(rendered))
            for split, sources in self.splits.items():
                for i in range(len(sources)):
                    shutil.rmtree(self._path(split, i), ignore_errors=True)
        return found

    def rendered(self, keep: bool) -> dict[str, list[Dataset]]:
        """The usable rows of each source, rendered and tokenised, perhaps without base responses.

        Args:
            keep: store them, for other processes and for a run that goes on.

        Raises:
            ValueError: rows that can't be used.
        """
        return self.usable(self.all_rendered(keep))

    def all_rendered(self, keep: bool) -> dict[str, list[Dataset]]:
        """All rows of each source, those too that can't be used and say why (`rows.tokens.FEATURES`).

        Args:
            keep: see `rendered`.
        """
        found: dict[str, list[Dataset]] = {}
        for split, sources in self.splits.items():
            found[split] = []
            for i, source in enumerate(sources):
                path = self._path(split, i)
                if keep and self._keep:
                    with self._lock():  # whoever comes later takes what is there
                        if not _is_whole(path):
                            _save(self._render(source), path)
                        rows = _read(path)
                else:
                    rows = self._render(source)
                found[split].append(rows)
        return found

    def usable(self, rendered: dict[str, list[Dataset]]) -> dict[str, list[Dataset]]:
        """The rows that can be used, of `all_rendered`; the others are counted, written to a file and, by the policy,
        left out.

        Raises:
            ValueError: there are others and they may not be left out, or what is left can't be trained on.
        """
        faults = Faults(self.folder, self.bapo.on_faulty)
        policy = self.bapo.anchors.on_missing
        found: dict[str, list[Dataset]] = {}
        for split, sources in self.splits.items():
            found[split] = []
            for source, rows in zip(sources, rendered[split], strict=True):
                rows = faults.take(source.name, rows, len(source.rows))
                if policy != "generate" and split != KEEP:
                    rows = faults.take_missing(source.name, rows, source.fields.base, policy)
                found[split].append(rows)
        faults.settle(self._is_main)
        found = {
            split: [as_table(rows, self._num_proc(len(rows), _LIGHT)) for rows in parts]
            for split, parts in found.items()
        }
        self._check_before_generating(found)
        return found

    def prompts(self, path: str, key: str) -> Dataset:
        """Prompts of a file, as `Opening.prompts`, rendered and tokenised."""
        return self._render(self._opening.prompts(path, key))

    def _check_before_generating(self, rendered: dict[str, list[Dataset]]) -> None:
        """What depends on rows alone fails now, not when hours of generation are done."""
        for split, parts in rendered.items():
            for source, rows in zip(self.splits[split], parts, strict=True):
                check_long(rows, source.name, self.cfg.sequence_len, self._policy)
        if (size := self.cfg.val_set_size) and not self.cfg.test_datasets and self._lacks_any:
            rows = concatenate_datasets(rendered["datasets"])
            split_by_prompt(rows, int(size) if size >= 1 else size)

    def _render(self, source: Source) -> Dataset:
        return source.rows.map(
            prepare_batch,
            batched=True,
            batch_size=256,
            with_indices=True,
            fn_kwargs={"read": source.read, "encode": source.encode} | self._limits(),
            remove_columns=source.rows.column_names,
            features=FEATURES,
            num_proc=self._num_proc(len(source.rows)),
            load_from_cache_file=False,
            # with one of theirs, datasets before 5.0 counts rows of a file that it doesn't take, and goes past the bar's end
            new_fingerprint=os.urandom(8).hex(),
            desc=f"Rendering and tokenising {source.name}",
        )

    def completed(self, rendered: dict[str, list[Dataset]]) -> dict[str, Dataset]:
        """The rows of each split with all base responses, within the length policy, ready for training."""
        policies = (self.cfg.sequence_len, self._policy, self.bapo.anchors.on_cut)
        found = {}
        for split, sources in self.splits.items():
            parts = [
                finish(self.put_in(source, rows), source.name, *policies)
                for source, rows in zip(sources, rendered[split], strict=True)
            ]
            found[split] = parts[0] if split == KEEP else merge_datasets(parts, self.cfg)
        return found

    def put_in(self, source: Source, rows: Dataset) -> Dataset:
        """Generated base responses into the rows that lack one."""
        if "key" not in rows.column_names:
            return rows
        decode = partial(
            self.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return rows.map(
            complete_batch,
            batched=True,
            batch_size=1000,
            fn_kwargs={"answers": StoredAnswers(self.store_path), "decode": decode}
            | self._limits(),
            remove_columns=["key", "limit"],
            features=FEATURES,
            num_proc=self._num_proc(len(rows), _LIGHT),
            load_from_cache_file=False,
            new_fingerprint=os.urandom(8).hex(),  # a store has no fingerprint
            desc=f"Putting base responses into {source.name}",
        )

    # ------------------------------------------------------------ base responses

    @cached_property
    def _lacks_any(self) -> bool:
        """Whether base responses have to be generated."""
        if KEEP in self.splits:
            return True
        if self.bapo.anchors.on_missing != "generate":
            return False
        return any(lacks_bases(source) for sources in self.splits.values() for source in sources)

    def made_by(self) -> dict[str, Any]:
        """Provenance of generated base responses."""
        with Store(self.store_path, "base responses") as store:
            return provenance(
                reference_spec(self.cfg, self._adapter),
                self.tokenizer,
                sorted(self._opening.templates),
                self.bapo.anchors,
                self.stop_ids,
                store,
            )

    def keyed(
        self, rendered: dict[str, list[Dataset]], made_by: dict[str, Any]
    ) -> dict[str, list[Dataset]]:
        """Rendered rows with the keys of the base responses that they lack."""
        limits = (self.bapo.anchors.max_new_tokens, self.cfg.sequence_len)
        return {
            split: [
                with_keys(rows, made_by, *limits, self._num_proc(len(rows), _LIGHT))
                for rows in parts
            ]
            for split, parts in rendered.items()
        }

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return self._opening.stop_ids

    def make_missing(
        self, keyed: dict[str, list[Dataset]], made_by: dict[str, Any], store: Store
    ) -> Any:
        """Have the reference model answer what is not in the store; returns the `Summary`."""
        sources = [rows for parts in keyed.values() for rows in parts]
        plan = make_plan(sources, store, made_by, self.stop_ids)
        if plan.requests and answer_beside(self.cfg):
            plan = make_plan(sources, store, made_by, self.stop_ids)
        engine, on_start = answering_engine(
            self.cfg,
            self.tokenizer,
            self._adapter,
            (self.stop_ids, self._opening.end_id),
            plan.requests,
        )
        summary = make_missing(plan, engine, store, self.tokenizer, on_start)
        for rows in sources if self._is_main else ():
            remember_rows(rows, store)
        return summary

    # ------------------------------------------------------------ cache

    @property
    def _is_main(self) -> bool:
        return int(os.environ.get("RANK", 0)) == 0

    @property
    def _policy(self) -> str:
        return str(self.cfg.excess_length_strategy or "drop").lower()

    def _limits(self) -> dict[str, Any]:
        return {"sequence_len": self.cfg.sequence_len, "strategy": self._policy}

    def _num_proc(self, total: int, each: int = 256) -> int | None:
        """Processes for rows of which each has so many at least: it costs more than fewer."""
        workers = min(self.cfg.dataset_num_proc or 1, total // each)
        return workers if workers > 1 else None

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with writing(self.folder, _ELSEWHERE):
            self.folder.mkdir(parents=True, exist_ok=True)
            held = self._file_lock.acquire()
        with held:
            yield

    def _are_there(self, paths: Mapping[str, Path], fresh: bool = False) -> bool:
        if not self._keep or (self.cfg.is_preprocess and not (fresh and not self._is_main)):
            return False
        return all(map(_is_whole, paths.values()))

    def _load(self, paths: Mapping[str, Path]) -> dict[str, Dataset]:
        for split, path in paths.items():
            LOG.info(f"Loading prepared rows of {split} from {path}")
        return {split: _read(path) for split, path in paths.items()}

    def _store(self, paths: Mapping[str, Path], rows: dict[str, Dataset]) -> dict[str, Dataset]:
        if not self._keep:
            return rows
        for split, path in paths.items():
            _save(rows[split], path)
        return {split: _read(path) for split, path in paths.items()}

    def _path(self, split: str, index: int | None = None) -> Path:
        """Where prepared rows of a split are kept, or the rendered rows of one of its sources."""
        sources = self.splits[split] if index is None else [self.splits[split][index]]
        cfg, anchors = self.cfg, self.bapo.anchors
        parts: list[Any] = [
            FORMAT,
            version("axolotl"),
            [(s.name, self._content(s), s.identity) for s in sources],
            [tokenizer_hash(self.tokenizer), sorted(self._opening.named)],
            [cfg.sequence_len, self._policy],
        ]
        if index is None:
            parts += [
                [cfg.seed, cfg.shuffle_merged_datasets, cfg.shuffle_before_merging_datasets],
                [cfg.curriculum_sampling, self.bapo.on_faulty, anchors.on_missing, anchors.on_cut],
                [anchors.max_new_tokens, self._made_by] if self._lacks_any else [],
            ]
        text = json.dumps(parts, default=str, sort_keys=True)
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return self.folder / (
            f"bapo-{split}-{key}" if index is None else f".bapo-{split}-{index}-{key}"
        )

    @cached_property
    def _made_by(self) -> str:
        return fingerprint(self.made_by())

    def _content(self, source: Source) -> str:
        if id(source) not in self._contents:
            self._contents[id(source)] = content_hash(source.rows)
        return self._contents[id(source)]


def _read(path: Path) -> Dataset:
    """
    Raises:
        ValueError: another user may have written it.
    """
    refuse_strangers(path)
    return load_from_disk(str(path))


def _is_whole(path: Path) -> bool:
    """`datasets` may have put a cache file into the folder of rows that another process has removed since."""
    return (path / "state.json").is_file()


def _save(rows: Dataset, path: Path) -> None:
    """Store under a temporary name first: a run that is killed leaves no half-written rows."""
    partial_path = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}")
    try:
        with writing(path, _ELSEWHERE):
            rows.save_to_disk(str(partial_path))
            shutil.rmtree(path, ignore_errors=True)
            partial_path.rename(path)
    finally:
        shutil.rmtree(partial_path, ignore_errors=True)
