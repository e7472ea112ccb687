"""Tables with very many rows: what is held of each, and that they are read by several processes alike."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from tiny import make_rows, write_jsonl

from bapo_plugin.anchors.generate import make_missing
from bapo_plugin.anchors.plan import KIND, StoredAnswers, make_plan, usable, with_keys
from bapo_plugin.answers.engine import Answer
from bapo_plugin.preparation import Preparation
from bapo_plugin.prepare import prepare_rows
from bapo_plugin.rows.faults import Faults
from bapo_plugin.rows.table import as_table, finish, split_by_prompt
from bapo_plugin.rows.tokens import FEATURES, complete_batch
from bapo_plugin.scoring.reference import ReferenceCache, _entries, _sequence_keys
from bapo_plugin.store import Store

MADE_BY = {"model": {"name": "m"}, "adapter": None, "config": None, "engine": {"name": "e"}}
FEW, MANY = 2000, 4000  # both whole batches, and more than one
HELD = 300  # bytes of a row, what differs from batch to batch included; its texts and tokens are some KB as Python values


def table(count, lacks=True, problem="", seed=0):
    """Rendered rows of 30 and 40 tokens, all different but the last tenth, which repeats the first."""
    generator = np.random.default_rng(seed)
    numbers = [i if i < count * 0.9 else i - int(count * 0.9) for i in range(count)]
    tokens = generator.integers(1000, 30_000, (count, 110)).astype(np.int32)[numbers]
    text = "a word and another one " * 10
    columns = dict.fromkeys(("chosen", "rejected", "base", "notice", "row_hash"), [""] * count)
    columns |= {name: [f"{text} {i}" for i in numbers] for name in ("prompt", "ask", "words")}
    columns |= {"problem": [problem] * count, "length": ["" if lacks else "fits"] * count}
    columns |= {"prompt_ids": list(tokens[:, :30]), "open_ids": [[]] * count}
    columns |= {"chosen_ids": list(tokens[:, 30:70]), "rejected_ids": list(tokens[:, 70:])}
    columns |= {"base_ids": [[]] * count if lacks else list(tokens[:, :40])}
    columns |= {"asked": numbers}
    columns |= {"row": range(1, count + 1), "base_cut": [False] * count, "lacks": [lacks] * count}
    return Dataset.from_dict(columns, features=FEATURES)


def keyed(rows, num_proc=None):
    return with_keys(rows, MADE_BY, 8, 256, num_proc)


def fill(store, rows):
    """An answer to each prompt."""
    for part in rows.iter(batch_size=1000):
        entries = {
            key: {"ids": [5, 6, 7, number % 100], "answer": ["", 4, False], "limit": 8}
            for key, number in zip(part["key"], part["row"], strict=True)
        }
        rest = {"provenance": "p", "prompt_ids": [1] * 30, "prompt": "x" * 200}
        store.put(KIND, {key: json.dumps(e | rest).encode() for key, e in entries.items()})


def held(tmp_path, work, make):
    """Bytes by which the peak grows with a row. `datasets` keeps tables outside of Python, as mapped files."""
    peaks = []
    for count in (FEW, MANY):
        data = make(tmp_path / str(count), count)
        if not peaks:
            work(*data)  # what is made once
        tracemalloc.start()
        work(*data)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return (peaks[1] - peaks[0]) / (MANY - FEW)


@pytest.mark.parametrize("answered", [False, True])
def test_a_plan_holds_bytes_of_a_prompt(tmp_path, answered):
    def make(path, count):
        rows, store = keyed(table(count)), Store(path)
        if answered:
            fill(store, rows)
        return rows, store

    def work(rows, store):
        plan = make_plan([rows], store, MADE_BY, [7])
        assert len(plan.reused if answered else plan.requests) == 0.9 * len(rows) == 0.9 * plan.rows

    assert held(tmp_path, work, make) < HELD


def test_faulty_rows_are_written_and_not_held(tmp_path):
    def work(rows, folder):
        faults = Faults(folder, "error")
        assert len(faults.take("here", rows, len(rows))) == 0
        with pytest.raises(ValueError, match=f"{len(rows):,} of {len(rows):,} rows"):
            faults.settle(write=True)
        assert len(faults.path.read_bytes().splitlines()) == len(rows)

    # the last line reads the file: 100 bytes a row and a list of them
    many = held(tmp_path, work, lambda path, n: (table(n, problem="it is wrong"), path))
    assert many < HELD + 250


def test_finished_and_split_rows_are_not_held(tmp_path):
    def work(rows):
        rows = finish(rows, "here", 256, "drop", "drop")
        train, test = split_by_prompt(rows, 0.2)
        assert len(train) + len(test) == len(rows)

    assert held(tmp_path, work, lambda path, n: (table(n, lacks=False),)) < HELD


def test_known_reference_log_probs_hold_only_themselves(tmp_path):
    def make(path, count):
        rows = table(count, lacks=False)
        with Store(path, "log-probs") as store:
            values = torch.arange(3.0 * count).view(count, 3).double()
            store.put("logp", _entries(list(_sequence_keys(rows, "key")), values, []))
        return rows, ReferenceCache(path, None, None, Accelerator(cpu=True), "key", False), values

    def work(rows, cache, values):
        found = cache.logps_of(rows, 4, "train").sequences
        # a row that repeats another has the number that was kept last
        assert (found.diff(dim=1) == 1).all() and (found[-5:] == values[-5:]).all()

    assert held(tmp_path, work, make) < HELD


def test_several_processes_give_the_same_rows(tmp_path, chatml):
    rows = table(600).select(
        [*range(540, 600), *range(110, 540)]
    )  # as where faulty ones were dropped
    one, two = keyed(as_table(rows)), keyed(as_table(rows, 2), 2)
    assert one.remove_columns(["key", "limit"]).to_dict() == rows.to_dict()
    assert one.to_dict() == two.to_dict() and len(set(one["key"])) == 490
    with Store(tmp_path / "s") as store:
        fill(store, one)
    made = [
        keys.map(
            complete_batch,
            batched=True,
            fn_kwargs={"answers": StoredAnswers(tmp_path / "s"), "decode": chatml.decode}
            | {"sequence_len": 256, "strategy": "drop"},
            remove_columns=["key", "limit"],
            features=FEATURES,
            num_proc=num_proc,
        )
        for keys, num_proc in ((one, None), (two, 2))
    ]
    assert made[0].to_dict() == made[1].to_dict()
    assert made[0]["base_ids"][0][:3] == [5, 6, 7] and not any(made[0]["lacks"])


class Echo:
    """Answers with the prompt's first tokens, three prompts at a time."""

    streams = False

    def __init__(self):
        self.sizes = []

    def batches(self, lengths, limits):
        assert list(lengths) == sorted(lengths, reverse=True) and set(limits) == {8}
        return [3] * (len(lengths) // 3) + [len(lengths) % 3] * (len(lengths) % 3 > 0)

    def generate(self, requests, on_tokens):
        self.sizes.append(len(requests))
        for request in requests:
            yield request, Answer(request.prompt_ids[:2], False)

    def confirm(self):
        pass

    def close(self):
        pass


def test_what_is_missing_is_answered_part_by_part(tmp_path, chatml):
    rows, engine = keyed(table(50)), Echo()
    others = keyed(table(20, seed=1))  # another table, with other prompts
    with Store(tmp_path / "s") as store:
        fill(store, rows.select(range(10)))
        plan = make_plan([rows, others], store, MADE_BY, [7])
        summary = make_missing(plan, engine, store, chatml)
        assert sum(engine.sizes) == len(plan.requests) == summary.generated == 45 - 10 + 18
        assert max(engine.sizes) == 3 and (summary.reused, summary.prompts) == (10, 63)
        assert summary.tokens == 10 * 4 + 53 * 2 and summary.cut == 0
        for part in (rows, others):
            keys = dict(zip(part["key"], part["limit"], strict=True))
            found = usable(store, keys)
            for key, prompt in zip(part["key"], part["prompt_ids"], strict=True):
                assert found[key].ids in ((5, 6, 7, found[key].ids[-1]), tuple(prompt[:2]))
        again = make_plan([rows, others], store, MADE_BY, [7])
    assert not again.requests and again.reused_tokens == summary.tokens


def test_a_second_start_reads_no_row_but_its_bytes(tmp_path, chatml, monkeypatch):
    """At any number of rows: nothing is rendered, tokenised, or asked of the store."""
    from axolotl.utils.dict import DictDefault

    path = str(write_jsonl(tmp_path / "rows.jsonl", make_rows(300)))
    entry = {"path": path, "split": "train", "type": "chatml.prompt_pairs"}
    cfg = DictDefault(
        {"datasets": [entry], "bapo": {}, "sequence_len": 256, "seed": 1, "dataset_num_proc": 2}
        | {"dataset_prepared_path": str(tmp_path / "prepared")}
    )
    first, _ = prepare_rows(cfg, chatml)

    def never(*args, **kwargs):
        raise AssertionError("done again")

    monkeypatch.setattr(Preparation, "_render", never)
    monkeypatch.setattr(Dataset, "map", never)
    monkeypatch.setattr(Store, "get", never)
    monkeypatch.setattr(type(chatml), "__call__", never)
    second, _ = prepare_rows(cfg, chatml)
    assert second.to_dict() == first.to_dict()
