"""CPU time and memory of each stage between rendering and training, for very many rows.

    python benchmarks/many_rows.py --model .models/SmolLM2-135M-Instruct [--rows 10000 60000]

Rows are random tokens in UltraFeedback's shape (prompt 200, responses 250 tokens), so that nothing has to be rendered; one
process does each stage. Prints and writes to benchmarks/results/many-rows-cpu.csv, for each stage: microseconds of the CPU a
row, and by how much the process's own memory (without pages of mapped files) is higher at its peak than before the stage.

    python benchmarks/many_rows.py --store 1000000

Instead: seconds that a store of so many entries of 1 kB takes to open and to give one of them, each in a new process, and
to be read as a whole (`bapo anchors --verify`). Writes nothing.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, concatenate_datasets, disable_progress_bars, load_from_disk
from transformers import AutoTokenizer

from bapo_plugin.anchors.plan import KIND, StoredAnswers, make_plan, with_keys
from bapo_plugin.rows.sources import content_hash
from bapo_plugin.rows.table import finish, split_by_prompt
from bapo_plugin.rows.tokens import FEATURES, complete_batch
from bapo_plugin.scoring.reference import ReferenceCache, _entries, _sequence_keys
from bapo_plugin.store import Store

HERE = Path(__file__).parent
MADE_BY = {"model": {"name": "m"}, "adapter": None, "config": None, "engine": {"name": "e"}}
TEXT = "word and more text of this " * 40
PART = 5000


class Peak(threading.Thread):
    """Looks at this process's own memory, in MB, fifty times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most = self.own()
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.02):
            self.most = max(self.most, self.own())

    @staticmethod
    def own() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) >> 10


def table(folder: Path, count: int) -> Dataset:
    """Rendered rows without base responses, in mapped files."""
    generator = np.random.default_rng(0)
    parts = []
    for start in range(0, count, PART):

        def ids(length: int) -> list:
            return list(generator.integers(5, 49_000, (PART, length)).astype(np.int32))

        columns = dict.fromkeys(("notice", "problem", "length", "base"), [""] * PART)
        columns |= dict.fromkeys(("prompt", "ask", "words", "chosen", "rejected"), [TEXT] * PART)
        columns |= {"row_hash": [f"{start + i:032x}" for i in range(PART)]}
        columns |= {"prompt_ids": ids(200), "chosen_ids": ids(250), "rejected_ids": ids(250)}
        columns |= {"base_ids": [[]] * PART, "open_ids": [[]] * PART, "lacks": [True] * PART}
        columns |= {"asked": range(start, start + PART)}
        columns |= {"row": range(start + 1, start + PART + 1), "base_cut": [False] * PART}
        Dataset.from_dict(columns, features=FEATURES).save_to_disk(f"{folder}/{start}")
        parts.append(load_from_disk(f"{folder}/{start}"))
    return concatenate_datasets(parts)


def fill(store: Store, keyed: Dataset) -> None:
    """An answer of 250 tokens to each prompt."""
    entry = {"answer": [TEXT, 250, False], "ids": list(range(1000, 1250)), "limit": 256}
    entry |= {"provenance": "x" * 32, "prompt": TEXT}
    for part in keyed.select_columns(["key", "prompt_ids"]).iter(batch_size=1000):
        pairs = zip(part["key"], part["prompt_ids"], strict=True)
        store.put(KIND, {k: json.dumps(entry | {"prompt_ids": p}).encode() for k, p in pairs})


def measure(count: int, model: Path, folder: Path) -> list[dict]:
    lines: list[dict] = []

    def stage(name: str, work: Callable[[], Any]) -> Any:
        peak = Peak()
        before, start = peak.most, time.process_time()
        peak.start()
        result = work()
        seconds = time.process_time() - start
        peak.stopped.set()
        peak.join()
        line = {"rows": count, "stage": name, "us_a_row": round(seconds / count * 1e6, 1)}
        lines.append(line | {"peak_MB": peak.most - before})
        print(lines[-1], flush=True)
        return result

    decode = partial(
        AutoTokenizer.from_pretrained(model).decode,
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    rows = table(folder, count)
    keyed = stage("keys", lambda: with_keys(rows, MADE_BY, 256, 1024))
    store = Store(folder / "answers")
    stage("plan, nothing there", lambda: make_plan([keyed], store, MADE_BY, [7]))
    stage("answers into the store", lambda: fill(store, keyed))
    stage("plan, all there", lambda: make_plan([keyed], store, MADE_BY, [7]))
    settings = {"answers": StoredAnswers(folder / "answers"), "decode": decode}
    settings |= {"sequence_len": 1024, "strategy": "drop"}
    full = stage(
        "base responses put in",
        lambda: keyed.map(
            complete_batch,
            batched=True,
            fn_kwargs=settings,
            remove_columns=["key", "limit"],
            features=FEATURES,
        ),
    )
    ready = stage("finish", lambda: finish(full, "rows", 1024, "drop", "keep"))
    stage("shuffle and save", lambda: ready.shuffle(seed=1).save_to_disk(f"{folder}/ready"))
    ready = load_from_disk(f"{folder}/ready")
    stage("split by prompt", lambda: split_by_prompt(ready, 0.01))
    stage("content hash", lambda: content_hash(ready))
    path = folder / "reference"
    with Store(path) as log_probs:
        keys = list(_sequence_keys(ready, "key"))
        for i in range(0, count, 1000):
            values = torch.randn(len(keys[i : i + 1000]), 3, dtype=torch.float64)
            log_probs.put("logp", _entries(keys[i : i + 1000], values, []))
    cache = ReferenceCache(path, None, None, Accelerator(cpu=True), "key", False)
    stage("reference log-probs read", lambda: cache.logps_of(ready, 8, "train"))
    sizes = {"prepared rows": folder / "ready", "answers": store.path, "reference log-probs": path}
    for name, place in sizes.items():
        files = place.rglob("*") if place.is_dir() else [place]
        size = sum(file.stat().st_size for file in files) / count
        print(f"{name}: {size:,.0f} bytes a row on the disk")
    store.close()
    return lines


def measure_store(count: int, path: Path) -> None:
    with Store(path) as store:
        for start in range(0, count, PART):
            keys = range(start, min(start + PART, count))
            store.put("answer", {f"{key:032x}": os.urandom(1000) for key in keys})
    print(f"{count} entries, {path.stat().st_size >> 20} MB")
    code = """if True:
        import sys, time
        from bapo_plugin.store import Store
        start = time.perf_counter()
        with Store(sys.argv[1]) as store:
            found = store.get("answer", [f"{int(sys.argv[2]) // 2:032x}"])
        assert len(found) == 1
        print(f"opened, one entry read: {time.perf_counter() - start:.4f} s")
    """
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code, str(path), str(count)], check=True)
    with Store(path) as store:
        start = time.perf_counter()
        assert store.verify() == count
        print(f"verified: {time.perf_counter() - start:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="folder with a tokenizer")
    parser.add_argument(
        "--store", type=int, metavar="ENTRIES", help="measure a store of so many entries"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 60_000])
    parser.add_argument("--output", type=Path, default=HERE / "results/many-rows-cpu.csv")
    args = parser.parse_args()
    if args.store:
        with tempfile.TemporaryDirectory() as name:
            measure_store(args.store, Path(name) / "store.sqlite")
        return
    if not args.model:
        parser.error("--model is missing")
    disable_progress_bars()
    lines = []
    for count in args.rows:
        with tempfile.TemporaryDirectory() as name:
            os.environ["HF_HOME"] = name
            lines += measure(-(-count // PART) * PART, args.model, Path(name))
        with args.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0].keys())
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
