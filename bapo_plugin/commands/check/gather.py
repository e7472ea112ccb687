"""From a configuration to what can be known of its run."""

import math
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
from axolotl.loaders import load_tokenizer
from datasets import Dataset
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from bapo_plugin.anchors.plan import Plan, make_plan, usable
from bapo_plugin.commands.check import measure as m
from bapo_plugin.commands.check.configuration import (
    Heard,
    hearing,
    read_config,
    read_yaml,
    stray_keys,
)
from bapo_plugin.commands.check.facts import (
    Bases,
    DataSet,
    Facts,
    Group,
    HeldOut,
    Sharing,
    Steps,
)
from bapo_plugin.commands.check.shown import Speller, first_rows
from bapo_plugin.models import empty_model
from bapo_plugin.prepare import KEEP, Preparation, check_kept, check_watched_file, split_rows
from bapo_plugin.rows.chat import ChatRows
from bapo_plugin.rows.sources import Source
from bapo_plugin.rows.strategies import StrategyRows
from bapo_plugin.rows.table import kept_among, notices_of, overlap, problems_of, where, without
from bapo_plugin.scoring.layouts import refusal, refusal_by_settings
from bapo_plugin.store import Store
from bapo_plugin.training.refusals import refuse_without_held_out

# a share of base responses that were cut above which a longer limit is worth a thought
MANY_CUT = 0.2
_SLOW = 5000  # rows that take some seconds to render
_SAME = "chosen and rejected are identical"

Tables = dict[str, list[Dataset]]  # split -> rows of each of its data sets


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
            for text in near:
                facts.warn("key", text)
            facts.remarks += strange
        self._hear("key")
        facts.settings = _settings(cfg)
        try:
            tokenizer = load_tokenizer(cfg)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise ValueError(
                f"the tokenizer of {cfg.tokenizer_config or cfg.base_model} can't be loaded: {error}"
            ) from error
        work = self.work = Preparation(cfg, tokenizer, keep=True)
        self._hear("template")
        self._try(check_watched_file, work.bapo)

        total = sum(len(source.rows) for parts in work.splits.values() for source in parts)
        if total > _SLOW and sys.stderr.isatty():
            print(f"Rendering {total:,} rows ...", file=sys.stderr)
        rendered = work.all_rendered(keep=True)
        rows = self._usable(rendered)
        self._data_sets(rendered, rows)
        filled, keys, plan = self._with_bases(rows)
        measured = self._measure(filled, keys)
        self._show(filled, keys, count)
        if not sum(map(len, measured.values())):
            return
        self._numbers(measured, filled, keys, plan, rendered)
        self._sharing(measured)
        self._held_out(filled)

    # ------------------------------------------------------------ rows

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

    def _data_sets(self, rendered: Tables, usable_rows: Tables) -> None:
        for split, sources in self.work.splits.items():
            if split == KEEP:
                continue
            tables = zip(sources, rendered[split], usable_rows[split], strict=True)
            for source, rows, left in tables:
                self.facts.data_sets.append(
                    DataSet(
                        source.name,
                        split,
                        source.kind,
                        len(rows),
                        list(source.rows.column_names),
                        _mapping(source, left),
                        len(left),
                        _groups(problems_of(rows)),
                        _groups(odd := notices_of(rows)),
                        len({number for numbers in odd.values() for number in numbers}),
                    )
                )

    def _with_bases(self, rows: Tables) -> tuple[Tables, dict[str, list[list[str]]], Plan | None]:
        """Rows with the base responses that there are; for each row the key of one that it lacks, "" where it has
        one or gets none."""
        work = self.work
        if not any(m.count(table, "lacks", bool) for parts in rows.values() for table in parts):
            return rows, {s: [[""] * len(t) for t in parts] for s, parts in rows.items()}, None
        made_by = work.made_by()
        keyed = work.keyed(rows, made_by)
        with Store(work.store_path, "base responses") as store:
            plan = make_plan(
                [t for parts in keyed.values() for t in parts], store, made_by, work.stop_ids
            )
            known = set(usable(store, plan.limits))
        filled: Tables = {}
        keys: dict[str, list[list[str]]] = {}
        for split, parts in keyed.items():
            filled[split], keys[split] = [], []
            for source, table in zip(work.splits[split], parts, strict=True):
                own = list(table["key"])
                there = pa.array([key if key in known else "" for key in own])
                table = table.remove_columns("key").add_column("key", there)
                filled[split].append(work.put_in(source, table))
                keys[split].append(own)
        return filled, keys, plan

    def _measure(self, filled: Tables, keys: dict[str, list[list[str]]]) -> dict[str, m.Measured]:
        cfg, anchors = self.cfg, self.work.bapo.anchors
        stops = set(self.work.stop_ids)
        return {
            split: m.Measured.together(
                m.measure(rows, cfg.sequence_len, anchors.max_new_tokens, stops) for rows in parts
            )
            for split, parts in filled.items()
            if split != KEEP
        }

    def _show(self, filled: Tables, keys: dict[str, list[list[str]]], count: int) -> None:
        speller = Speller(self.work.tokenizer, set(self.work.stop_ids))
        names = [source.name for source in self.work.splits["datasets"]]
        first = first_rows(names, filled["datasets"], keys["datasets"], count)
        self.facts.shown = [speller.row(*row) for row in first]

    # ------------------------------------------------------------ numbers

    def _numbers(
        self,
        measured: dict[str, m.Measured],
        filled: Tables,
        keys: dict[str, list[list[str]]],
        plan: Plan | None,
        rendered: Tables,
    ) -> None:
        facts, work = self.facts, self.work
        rows = m.Measured.together(measured.values())
        policy = str(self.cfg.excess_length_strategy or "drop").lower()
        facts.lengths = m.lengths_of(rows, self.cfg.sequence_len, policy)
        refused = sum(
            group.rows for data in facts.data_sets for group in data.refused if _SAME in group.text
        )
        facts.repeats = m.repeats_of(measured, refused)

        splits = [split for split in filled if split != KEEP]
        has_key = [key != "" for split in splits for part in keys[split] for key in part]
        lacking = rows.lacks.tolist()
        pairs = list(zip(has_key, lacking, strict=True))
        requests = plan.requests if plan else {}
        kept_keys = {key for part in keys.get(KEEP, []) for key in part}
        facts.bases = Bases(
            in_data=pairs.count((False, False)),
            in_store=pairs.count((True, False)),
            to_make=pairs.count((True, True)),
            no_room=pairs.count((False, True)),
            requests=len(requests),
            most_tokens=sum(request.limit for request in requests.values()),
            kept_prompts=sum(map(len, filled.get(KEEP, []))),
            kept_to_make=len(kept_keys & set(requests)),
            cut=int((rows.cut & ~rows.lacks).sum()),
            empty=int(rows.empty.sum()),
            engine=work.bapo.anchors.engine,
            store=str(work.store_path),
        )
        self._warn_of_numbers(facts.bases)

    def _warn_of_numbers(self, bases: Bases) -> None:
        facts, repeats = self.facts, self.facts.repeats
        if repeats.rows:
            facts.warn(
                "repeats",
                f"{_rows(repeats.rows)} {'is' if repeats.rows == 1 else 'are'} the same as an earlier one (prompt, chosen and rejected); "
                "`dataset_exact_deduplication: true` takes those out that are the same in all",
            )
        if repeats.base_is_chosen:
            facts.warn(
                "repeats",
                f"{_rows(repeats.base_is_chosen)} {_have(repeats.base_is_chosen)} a base response equal to chosen: the model answers so already, "
                "and the anchor holds what the preference raises",
            )
        if repeats.base_is_rejected:
            facts.warn(
                "repeats",
                f"{_rows(repeats.base_is_rejected)} {_have(repeats.base_is_rejected)} a base response equal to rejected: the anchor holds what the "
                "preference pushes down; take other rejected responses where that is not meant",
            )
        there = bases.in_data + bases.in_store
        if bases.cut > MANY_CUT * there:
            facts.warn(
                "base",
                f"{bases.cut:,} of {there:,} base responses were cut by a limit; raise bapo.anchors.max_new_tokens "
                f"({self.work.bapo.anchors.max_new_tokens}) or sequence_len ({self.cfg.sequence_len})",
            )
        if bases.empty:
            facts.warn(
                "base",
                f"{_rows(bases.empty)} {_have(bases.empty)} a base response that says nothing; look at them in the file of "
                f"`bapo anchors {facts.config} --output FILE`",
            )

    def _sharing(self, measured: dict[str, m.Measured]) -> None:
        cfg, wanted = self.cfg, self.work.bapo.shared_prefix
        refused: str | None = ""
        if wanted != "off":
            is_fsdp1 = bool(cfg.fsdp or cfg.fsdp_config) and str(cfg.fsdp_version) != "2"
            try:
                model = empty_model(cfg)
            except Exception as error:  # an unusual architecture: loading it will say more
                self.facts.remarks.append(
                    f"whether the prompt can be shared can't be told before the model is loaded ({type(error).__name__}: {error})"
                )
                refused = refusal_by_settings(is_fsdp1, False)
            else:
                aux_loss = bool(getattr(model.config, "output_router_logits", False))
                refused = refusal_by_settings(is_fsdp1, aux_loss) or refusal(model)
            self._hear("key")
            if refused and wanted == "require":
                self.facts.fail(f"bapo.shared_prefix: require, but {refused}; set auto")
        rows = measured["datasets"]
        self.facts.sharing = Sharing(
            wanted, refused or "", m.saved_by_sharing(rows), bool(rows.lacks.any())
        )

    # ------------------------------------------------------------ both sides

    def _held_out(self, filled: Tables) -> None:
        facts, work, cfg = self.facts, self.work, self.cfg
        if work.bapo.keep or work.bapo.retention:
            filled = {s: list(map(_with_what_is_asked, parts)) for s, parts in filled.items()}
        found = self._try(work.completed, filled)
        self._hear("length")
        if found is None:
            return
        kept = found.pop(KEEP, None)
        sides = self._try(split_rows, cfg, found)
        self._hear("held_out")
        if sides is None:
            return
        train, held = sides
        by = "test_datasets" if len(found) > 1 else "val_set_size" if held is not None else ""
        facts.held_out = HeldOut(
            len(train),
            0 if held is None else len(held),
            by,
            0 if held is None else overlap(train, held),
        )
        if held is None:
            facts.warn(
                "held_out",
                "no rows are held out, so nothing shows whether the taste is learned and what is forgotten on other prompts; "
                "set val_set_size: 0.05, or test_datasets",
            )
        self._files(train, held, kept)
        per_step = cfg.batch_size
        per_epoch = math.ceil(len(train) / per_step)
        epochs = float(cfg.num_epochs)
        total = int(cfg.max_steps or 0)
        facts.steps = Steps(
            per_step, per_epoch, epochs, total if total > 0 else math.ceil(per_epoch * epochs)
        )

    def _files(self, train: Dataset, held: Dataset | None, kept: Dataset | None) -> None:
        """Prompts of `bapo.keep` and `bapo.retention` among the rows."""
        facts, bapo = self.facts, self.work.bapo
        if kept is not None:
            facts.held_out.kept_in_training = count = kept_among(train, kept)
            if count:
                facts.warn(
                    "keep",
                    f"{count:,} of {len(train):,} training rows {_have(count)} a prompt of bapo.keep.prompts: {bapo.keep.prompts}, whose "
                    "former answer the anchor holds already; take them out of the file",
                )
            self._try(check_kept, bapo, self.work.tokenizer, kept, held)
            self._hear("keep")
        if bapo.retention is None:
            return
        self._try(refuse_without_held_out, bapo.retention, held is not None)
        if isinstance(path := bapo.retention.prompts, str):
            rendered = self._try(self._watched, path)
            if rendered is None:
                return
            facts.held_out.watched_in_training = count = kept_among(train, rendered)
            if count:
                facts.warn(
                    "keep",
                    f"{count:,} of {len(train):,} training rows {_have(count)} a prompt of bapo.retention.prompts: {path}, so what is "
                    "measured on it says nothing about forgetting; take them out of the file",
                )

    def _watched(self, path: str) -> Dataset:
        rows = self.work.prompts(path, "bapo.retention.prompts")
        for text, numbers in problems_of(rows).items():
            raise ValueError(f"bapo.retention.prompts: {path}, prompt {numbers[0]}: {text}")
        return rows

    # ------------------------------------------------------------ what is said

    def _try(self, function: Any, *args: Any) -> Any:
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


def _settings(cfg: Any) -> dict[str, Any]:
    bapo = cfg.bapo
    names = (
        "base_model",
        "adapter",
        "load_in_4bit",
        "load_in_8bit",
        "sequence_len",
        "chat_template",
    )
    found = {name: cfg.get(name) for name in names}
    found |= {"rl_beta": cfg.rl_beta or (cfg.trl or {}).get("beta") or 0.1}
    found |= {f"bapo.{key}": value for key, value in bapo.items() if not hasattr(value, "items")}
    found.pop("bapo.entries", None)
    return {key: value for key, value in found.items() if value is not None}


def _mapping(source: Source, rows: Dataset) -> dict[str, str]:
    """Part of a row -> where it stands."""
    fields, columns = source.fields, source.rows.column_names
    if isinstance(source.read, ChatRows):
        prompt = f"{fields.chosen}, all but its last message" if fields.whole else fields.messages
        found = {"prompt": prompt, "chosen": fields.chosen, "rejected": fields.rejected}
        for part, column in (("system", fields.system), ("tools", fields.tools)):
            if column in columns:
                found[part] = column
    else:
        found = dict.fromkeys(("prompt", "chosen", "rejected"), "not found")
        if isinstance(source.read, StrategyRows) and len(rows):
            source.read(source.rows[rows[0]["row"] - 1])
            found |= source.read.places
    if fields.base is None:
        found["base"] = "generated (field_base: false)"
    else:
        has_column = fields.base in columns
        found["base"] = fields.base if has_column else f"generated (no column {fields.base})"
    return found


def _with_what_is_asked(rows: Dataset) -> Dataset:
    """Rows in which a base response that is to be made holds what the model will be asked with, by which prompts of a
    file are recognised."""
    bases = [
        opened if lacks else base
        for part in rows.select_columns(["lacks", "open_ids", "base_ids"]).iter(batch_size=1000)
        for lacks, opened, base in zip(*part.values(), strict=True)
    ]
    feature = rows.features["base_ids"]
    return rows.remove_columns("base_ids").add_column("base_ids", bases, feature=feature)


def _groups(found: dict[str, list[int]]) -> list[Group]:
    groups = [Group(text, len(numbers), numbers[:5]) for text, numbers in found.items()]
    return sorted(groups, key=lambda group: -group.rows)


def _rows(count: int) -> str:
    return f"{count:,} row" + "s" * (count != 1)


def _have(count: int) -> str:
    return "has" if count == 1 else "have"
