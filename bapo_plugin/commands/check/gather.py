"""From a configuration to what can be known of its run."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from axolotl.loaders import load_tokenizer
from datasets import Dataset
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from bapo_plugin.commands.check.configuration import (
    Heard,
    hearing,
    read_config,
    repeated,
    settings_of,
    stray_keys,
)
from bapo_plugin.commands.check.facts import Facts, HeldOut, Sharing, Steps
from bapo_plugin.commands.check.judge import warn_of_bases, warn_of_repeats, warn_of_sides
from bapo_plugin.commands.check.measure import (
    Measured,
    lengths_of,
    measure,
    repeats_of,
    saved_by_sharing,
)
from bapo_plugin.commands.check.shown import Speller, first_rows
from bapo_plugin.commands.check.tables import (
    Answered,
    Tables,
    answered,
    bases_of,
    data_sets_of,
    with_what_is_asked,
)
from bapo_plugin.models import empty_model
from bapo_plugin.prepare import KEEP, Preparation, check_kept, check_watched_file, split_rows
from bapo_plugin.rows.oddities import IDENTICAL
from bapo_plugin.rows.table import kept_among, overlap, problems_of, where, without
from bapo_plugin.scoring.layouts import refusal, refusal_by_settings
from bapo_plugin.training.refusals import refuse_without_held_out
from bapo_plugin.yaml_files import read_yaml

_SLOW = 5000  # rows that take some seconds to render


def gather(config: Path, count: int) -> Facts:
    """Look at everything; what is wrong is among the facts.

    Args:
        config: YAML of the run.
        count: rows to show.
    """
    facts = Facts(str(config))
    had_bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with hearing() as heard:
            _Gathering(facts, heard).run(config, count)
    except ValueError as error:
        facts.fail(str(error))
    finally:
        if had_bars:
            enable_progress_bars()
    return facts


class _Gathering:
    """Fills in facts, one after the other, as far as errors let it."""

    def __init__(self, facts: Facts, heard: Heard):
        self.facts = facts
        self.heard = heard

    def run(self, config: Path, count: int) -> None:
        facts = self.facts
        raw = read_yaml(config)
        try:
            cfg = self.cfg = read_config(config, raw)
        finally:
            near, strange = stray_keys(raw)
            for text in (*near, *repeated(config)):
                facts.warn("key", text)
            facts.remarks += strange
        self._hear("key")
        facts.settings = settings_of(cfg)
        work = self.work = Preparation(cfg, self._tokenizer(), keep=True)
        self._hear("template")
        self._try(check_watched_file, work.bapo)

        total = sum(len(source.rows) for parts in work.splits.values() for source in parts)
        if total > _SLOW and sys.stderr.isatty():
            print(f"Rendering {total:,} rows ...", file=sys.stderr)
        rendered = work.all_rendered(keep=True)
        rows = self._usable(rendered)
        facts.data_sets = data_sets_of(work, rendered, rows)
        filled = answered(work, rows)
        self._show(filled, count)
        if any(map(len, rows["datasets"])):
            self._numbers(filled)
            self._both_sides(filled.tables)

    def _tokenizer(self) -> Any:
        cfg = self.cfg
        try:
            return load_tokenizer(cfg)
        except (OSError, ValueError, ImportError, KeyError) as error:
            key = "tokenizer_config" if cfg.tokenizer_config else "base_model"
            raise ValueError(
                f"{key}: the tokenizer of {cfg[key]} can't be loaded: {error}"
            ) from error

    def _usable(self, rendered: Tables) -> Tables:
        """As the run takes them; where it would stop, those that it would stop at are left out."""
        found = self._try(self.work.usable, rendered)
        self._hear("rows")
        if found is not None:
            return found
        return {
            split: [without(rows, where(rows, "problem", bool)) for rows in parts]
            for split, parts in rendered.items()
        }

    def _show(self, filled: Answered, count: int) -> None:
        speller = Speller(self.work.tokenizer, set(self.work.stop_ids))
        names = [source.name for source in self.work.splits["datasets"]]
        first = first_rows(names, filled.tables["datasets"], filled.keys["datasets"], count)
        self.facts.shown = [speller.row(*row) for row in first]

    def _numbers(self, filled: Answered) -> None:
        facts, work, cfg = self.facts, self.work, self.cfg
        limits = (cfg.sequence_len, work.bapo.anchors.max_new_tokens, set(work.stop_ids))
        splits = {
            split: Measured.together(measure(rows, *limits) for rows in parts)
            for split, parts in filled.tables.items()
            if split != KEEP
        }
        together = Measured.together(splits.values())
        policy = str(cfg.excess_length_strategy or "drop").lower()
        facts.lengths = lengths_of(together, cfg.sequence_len, policy)
        groups = [group for data in facts.data_sets for group in data.refused]
        refused = sum(group.rows for group in groups if group.text == IDENTICAL)
        facts.repeats = repeats_of(splits, refused)
        warn_of_repeats(facts, facts.repeats)
        facts.bases = bases_of(work, filled, together)
        warn_of_bases(facts, facts.bases, cfg.sequence_len)
        facts.sharing = self._sharing(splits["datasets"])

    def _sharing(self, rows: Measured) -> Sharing:
        cfg, wanted = self.cfg, self.work.bapo.shared_prefix
        refused: str | None = ""
        if wanted != "off":
            is_fsdp1 = bool(cfg.fsdp or cfg.fsdp_config) and str(cfg.fsdp_version) != "2"
            try:
                model = empty_model(cfg)
            except Exception as error:  # an unusual architecture: loading it will say more
                self.facts.remarks.append(
                    "whether the prompt can be shared can't be told before the model is loaded "
                    f"({type(error).__name__}: {error})"
                )
                refused = refusal_by_settings(is_fsdp1, False)
            else:
                aux_loss = bool(getattr(model.config, "output_router_logits", False))
                refused = refusal_by_settings(is_fsdp1, aux_loss) or refusal(model)
            self._hear("key")
            if refused and wanted == "require":
                self.facts.fail(
                    f"bapo.shared_prefix: require, but {refused}; set bapo.shared_prefix: auto to compute the prompt once for "
                    "each response"
                )
        return Sharing(wanted, refused or "", saved_by_sharing(rows), bool(rows.lacks.any()))

    # ------------------------------------------------------------ both sides

    def _both_sides(self, tables: Tables) -> None:
        facts, work, cfg = self.facts, self.work, self.cfg
        if work.bapo.keep or work.bapo.retention:
            tables = {s: list(map(with_what_is_asked, parts)) for s, parts in tables.items()}
        found = self._try(work.completed, tables)
        self._hear("length")
        if found is None:
            return
        kept = found.pop(KEEP, None)
        sides = self._try(split_rows, cfg, found)
        self._hear("held_out")
        if sides is None:
            return
        train, held = sides
        by = "test_datasets" if len(found) > 1 else "val_set_size"
        facts.held_out = HeldOut(
            train=len(train),
            held_out=0 if held is None else len(held),
            by="" if held is None else by,
            overlap=0 if held is None else overlap(train, held),
        )
        self._files(facts.held_out, train, held, kept)
        warn_of_sides(facts, facts.held_out, work.bapo)
        per_epoch, epochs = math.ceil(len(train) / cfg.batch_size), float(cfg.num_epochs)
        total = cfg.max_steps if (cfg.max_steps or 0) > 0 else math.ceil(per_epoch * epochs)
        facts.steps = Steps(cfg.batch_size, per_epoch, epochs, total)

    def _files(
        self, found: HeldOut, train: Dataset, held: Dataset | None, kept: Dataset | None
    ) -> None:
        """Prompts of `bapo.keep` and `bapo.retention` among the rows."""
        bapo = self.work.bapo
        if kept is not None:
            found.kept_in_training = kept_among(train, kept)
            self._try(check_kept, bapo, self.work.tokenizer, kept, held)
            self._hear("keep")
        if bapo.retention is None:
            return
        self._try(refuse_without_held_out, bapo.retention, held is not None)
        if isinstance(bapo.retention.prompts, str):
            watched = self._try(self._watched, bapo.retention.prompts)
            if watched is not None:
                found.watched_in_training = kept_among(train, watched)

    def _watched(self, path: str) -> Dataset:
        rows = self.work.prompts(path, "bapo.retention.prompts")
        for text, said in problems_of(rows).items():
            raise ValueError(f"bapo.retention.prompts: {path}, prompt {said.first[0]}: {text}")
        return rows

    # ------------------------------------------------------------ what is said

    def _try(self, function: Callable[..., Any], *args: Any) -> Any:
        """What it returns; None where it fails, which is told."""
        try:
            return function(*args)
        except ValueError as error:
            self.facts.fail(str(error))
            return None

    def _hear(self, about: str) -> None:
        """What was logged so far: a warning of ours deserves a look, one of axolotl's is told."""
        ours, others = self.heard.take()
        for text in ours:
            self.facts.warn(about, text)
        self.facts.remarks += [f"axolotl says: {text}" for text in others]
