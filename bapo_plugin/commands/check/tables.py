"""Rendered rows of all data sets: how they are read, and with which base responses."""

from typing import NamedTuple

import pyarrow as pa
from datasets import Dataset

from bapo_plugin.anchors.plan import Plan, explain, make_plan
from bapo_plugin.commands.check.facts import Bases, DataSet, Group
from bapo_plugin.commands.check.measure import Measured
from bapo_plugin.prepare import KEEP, Preparation
from bapo_plugin.rows.chat import ChatRows
from bapo_plugin.rows.sources import Source
from bapo_plugin.rows.strategies import StrategyRows
from bapo_plugin.rows.table import Said, notices_of, problems_of, where
from bapo_plugin.store import Store

Tables = dict[str, list[Dataset]]  # split -> rows of each of its data sets


class Answered(NamedTuple):
    """Usable rows with the base responses that there are.

    Args:
        keys: for each row the key of the base response that it lacks in the data, "" where it has one or gets none.
        plan: what is still to be made; None where no row lacks one.
        reasons: why, and for how many rows.
    """

    tables: Tables
    keys: dict[str, list[list[str]]]
    plan: Plan | None
    reasons: list[tuple[str, int]]


def data_sets_of(work: Preparation, rendered: Tables, rows: Tables) -> list[DataSet]:
    """The data sets of the YAML.

    Args:
        rendered: all rows.
        rows: the usable ones.
    """
    found = []
    for split, sources in work.splits.items():
        if split == KEEP:
            continue
        for source, table, left in zip(sources, rendered[split], rows[split], strict=True):
            found.append(
                DataSet(
                    name=source.name,
                    split=split,
                    type=source.kind,
                    rows=len(table),
                    columns=list(source.rows.column_names),
                    mapping=_mapping(source, left),
                    usable=len(left),
                    refused=_groups(problems_of(table)),
                    odd=_groups(notices_of(table)),
                    odd_rows=len(where(table, "notice", bool)),
                )
            )
    return found


def answered(work: Preparation, rows: Tables) -> Answered:
    """Usable rows with the base responses that are in the store; none is made.

    Raises:
        ValueError: the model isn't there, or nothing ends an answer.
    """
    if not any(len(where(table, "lacks", bool)) for parts in rows.values() for table in parts):
        none = {split: [[""] * len(table) for table in parts] for split, parts in rows.items()}
        return Answered(rows, none, None, [])
    made_by = work.made_by()
    keyed = work.keyed(rows, made_by)
    with Store(work.store_path, "base responses") as store:
        tables = [table for parts in keyed.values() for table in parts]
        plan = make_plan(tables, store, made_by, work.stop_ids)
        known = set(plan.reused.keys())
        reasons = explain(tables, plan, store) if plan.requests else []
    mark = "to generate: "
    why = [(text.removeprefix(mark), n) for text, n, _ in reasons if text.startswith(mark)]
    found = Answered({}, {}, plan, why)
    for split, parts in keyed.items():
        found.tables[split], found.keys[split] = [], []
        for source, table in zip(work.splits[split], parts, strict=True):
            keys = list(table["key"])
            if known.isdisjoint(keys):
                table = table.remove_columns(["key", "limit"])
            else:
                there = pa.array([key if key in known else "" for key in keys])
                table = work.put_in(source, table.remove_columns("key").add_column("key", there))
            found.tables[split].append(table)
            found.keys[split].append(keys)
    return found


def bases_of(work: Preparation, rows: Answered, measured: Measured) -> Bases:
    """Base responses in numbers.

    Args:
        measured: all rows but prompts to keep, in order.
    """
    splits = [split for split in rows.tables if split != KEEP]
    has_key = [key != "" for split in splits for part in rows.keys[split] for key in part]
    pairs = list(zip(has_key, measured.lacks.tolist(), strict=True))
    to_make = set(rows.plan.requests.keys()) if rows.plan else set()
    kept_keys = {key for part in rows.keys.get(KEEP, []) for key in part}
    return Bases(
        in_data=pairs.count((False, False)),
        in_store=pairs.count((True, False)),
        to_make=pairs.count((True, True)),
        no_room=pairs.count((False, True)),
        requests=len(to_make),
        most_tokens=int(rows.plan.requests.limits.sum()) if rows.plan else 0,
        kept_prompts=sum(map(len, rows.tables.get(KEEP, []))),
        kept_to_make=len(kept_keys & to_make),
        cut=int((measured.cut & ~measured.lacks).sum()),
        empty=int(measured.empty.sum()),
        reasons=rows.reasons,
        limit=work.bapo.anchors.max_new_tokens,
        engine=work.bapo.anchors.engine,
        store=str(work.store_path),
    )


def with_what_is_asked(rows: Dataset) -> Dataset:
    """Rows in which a base response that is to be made holds what the model will be asked with, by which prompts of a
    file are recognised."""
    bases = [
        opened if lacks else base
        for part in rows.select_columns(["lacks", "open_ids", "base_ids"]).iter(batch_size=1000)
        for lacks, opened, base in zip(*part.values(), strict=True)
    ]
    feature = rows.features["base_ids"]
    return rows.remove_columns("base_ids").add_column("base_ids", bases, feature=feature)


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


def _groups(found: dict[str, Said]) -> list[Group]:
    groups = [Group(text, said.rows, said.first) for text, said in found.items()]
    return sorted(groups, key=lambda group: -group.rows)
