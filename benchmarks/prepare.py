"""Rows a second and memory from files to token ids, beside axolotl's DPO preparation and TRL's tokenising of the same rows.

    python benchmarks/prepare.py --model .models/SmolLM2-135M-Instruct [--rows 1000 10000] [--processes 1 2] [--turns 3]

Rows have UltraFeedback's shape: a prompt of about 200 tokens, responses of about 250. Each case is a process of its own,
and cases take turns:

  base      ours, rows with a base response: first start, everything checked, rendered, tokenised and stored
  again     ours, second start of `base`
  plan      ours, rows without: until it is known what has to be generated
  replan    ours, second start of `plan`, where the rendered rows are there
  stored    ours, third start of it, where all base responses are in the store by now: planned, put in and stored
  axolotl   axolotl's own preparation with `rl: dpo` (not stored) and TRL's tokenising after it

Memory is looked at from outside, ten times a second. `main_MB` is what the main process holds more than at its start, and
`worker_MB` what the largest of its workers holds of its own, both without pages of mapped files; `peak_MB` is the largest
resident size of the main process with all of that. `disk_MB` is what a case leaves on the disk.
Seconds of the CPU count where others use the machine too.

Prints medians and writes a CSV row a case to benchmarks/results/prepare-cpu.csv.
"""

import argparse
import csv
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import psutil

HERE = Path(__file__).parent
CASES = ("base", "axolotl", "plan", "again", "replan", "stored")
WORDS = (HERE.parent / "README.md").read_text("utf-8").split()


def write_rows(path: Path, count: int, with_base: bool) -> None:
    generator = random.Random(0)
    words = [word for word in WORDS if word.isalpha()]

    def text(length: int) -> str:
        return " ".join(generator.choices(words, k=length))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            row = {"prompt": text(150), "chosen": text(190), "rejected": text(190)}
            if with_base:
                row["base"] = text(190)
            file.write(json.dumps(row) + "\n")


def configuration(folder: Path, args: argparse.Namespace, rows: int, processes: int | None) -> dict:
    entry = {"path": str(folder / f"{rows}.jsonl"), "split": "train"}
    entry |= {"type": "chat_template.default", "field_messages": "prompt"}
    return {
        **{"rl": "dpo", "bapo": {}, "base_model": str(args.model), "sequence_len": 1024, "seed": 1},
        **{"datasets": [entry], "chat_template": "tokenizer_default"},
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": processes,
    }


def run_case(case: str, folder: Path, args: argparse.Namespace, rows: int, processes: int) -> dict:
    """In a process of its own: {"seconds", "cpu", "start_MB"}."""
    os.environ["HF_HOME"] = str(folder / "hf")
    from axolotl.utils.dict import DictDefault
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    work: Callable[[], object]
    if case == "axolotl":
        import axolotl.utils.data.rl as rl
        from trl import DPOConfig, DPOTrainer

        cfg = DictDefault(configuration(folder, args, rows, processes if processes > 1 else None))
        rl.load_tokenizer = lambda cfg: tokenizer
        rl.save_preprocessed_dataset = lambda *args, **kwargs: None
        trainer = object.__new__(DPOTrainer)
        trainer._is_vlm = trainer._is_vision_dataset = False
        trainer._tokenizer = trainer.processing_class = tokenizer
        settings = DPOConfig(str(folder / "out"), bf16=False, use_cpu=True, max_length=1024)
        settings.dataset_num_proc = processes if processes > 1 else None

        def work() -> None:
            prepared, _ = rl.prepare_preference_datasets(cfg, tokenizer)
            trainer._prepare_dataset(prepared, tokenizer, settings, "train")
    else:
        from bapo_plugin.anchors.plan import make_plan
        from bapo_plugin.prepare import Preparation
        from bapo_plugin.store import Store

        cfg = DictDefault(configuration(folder, args, rows, processes))
        if case == "stored":
            fill_store(Preparation(cfg, tokenizer))

        def work() -> None:
            preparation = Preparation(cfg, tokenizer)
            if case not in ("plan", "replan"):
                preparation.rows()
                return
            made_by = preparation.made_by()
            keyed = preparation.keyed(preparation.rendered(keep=True), made_by)["datasets"]
            with Store(preparation.store_path) as store:
                plan = make_plan(keyed, store, made_by, preparation.stop_ids)
            if len(plan.requests) != rows:
                raise RuntimeError("rows were planned more or less than once")

    memory, cpu, start = own_memory(psutil.Process(), of_worker=False), cpu_seconds(), time.time()
    work()
    seconds = time.time() - start
    return {"seconds": seconds, "cpu": cpu_seconds() - cpu, "start_MB": memory >> 20}


def cpu_seconds() -> float:
    """Of this process and of workers that have ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(kind)[:2]) for kind in kinds)


def fill_store(preparation) -> None:
    """Base responses of 250 tokens, as if a model had given them."""
    from bapo_plugin.anchors.plan import KIND
    from bapo_plugin.anchors.provenance import fingerprint
    from bapo_plugin.store import Store

    made_by = preparation.made_by()
    ids = list(range(1000, 1249)) + preparation.stop_ids[:1]
    text = preparation.tokenizer.decode(ids)
    entry = {"answer": [text, 249, False], "ids": ids, "limit": 256}
    entry["provenance"] = fingerprint(made_by)
    with Store(preparation.store_path) as store:
        for rows in preparation.keyed(preparation.rendered(keep=True), made_by)["datasets"]:
            columns = ["key", "ask", "prompt_ids"]
            for part in rows.select_columns(columns).iter(batch_size=1000):
                found = zip(*(part[name] for name in columns), strict=True)
                made = {
                    key: json.dumps(entry | {"prompt": ask, "prompt_ids": prompt}).encode()
                    for key, ask, prompt in found
                }
                store.put(KIND, made)


def own_memory(process: psutil.Process, of_worker: bool) -> int:
    """Bytes that are no pages of files. A worker's pages that its main process has too are not counted."""
    folder = Path(f"/proc/{process.pid}")
    if not folder.is_dir():
        return process.memory_info().rss
    file, name = ("smaps_rollup", "Private_Dirty:") if of_worker else ("status", "RssAnon:")
    lines = (folder / file).read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(name))


def watched(command: list[str]) -> tuple[str, dict[str, int]]:
    """Run a command; its output, and peaks of memory in bytes."""
    peaks = {"own": 0, "worker": 0, "resident": 0}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = psutil.Process(process.pid)
    while True:
        try:
            output, errors = process.communicate(timeout=0.1)
            break
        except subprocess.TimeoutExpired:
            pass
        try:
            peaks["own"] = max(peaks["own"], own_memory(seen, of_worker=False))
            peaks["resident"] = max(peaks["resident"], seen.memory_info().rss)
            for child in seen.children(recursive=True):
                peaks["worker"] = max(peaks["worker"], own_memory(child, of_worker=True))
        except (psutil.Error, OSError):
            pass  # it has ended meanwhile
    if process.returncode:
        sys.exit(errors[-3000:])
    return output, peaks


def size_of(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def lines_of(found: dict[tuple, list[dict]]) -> list[dict]:
    """What the CSV file says of (case, rows, processes) -> results."""
    lines = []
    for (case, rows, processes), results in found.items():
        seconds, cpu = (statistics.median(r[key] for r in results) for key in ("seconds", "cpu"))
        peers = found["axolotl", rows, processes]
        of_seconds, of_cpu = (
            statistics.median(r[key] for r in peers) for key in ("seconds", "cpu")
        )
        lines.append(
            {
                "case": case,
                "rows": rows,
                "processes": processes,
                "seconds": round(seconds, 2),
                "rows_per_second": round(rows / seconds),
                "of_axolotl_and_trl": round(seconds / of_seconds, 2),
                "cpu_seconds": round(cpu, 2),
                "cpu_of_axolotl_and_trl": round(cpu / of_cpu, 2),
                **{
                    name: max(r[name] for r in results)
                    for name in ("main_MB", "worker_MB", "peak_MB", "disk_MB")
                },
                "turns": len(results),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "versions": " ".join(
                    f"{n} {version(n)}" for n in ("axolotl", "trl", "datasets", "tokenizers")
                ),
            }
        )
    return lines


def write(path: Path, lines: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0].keys())
        writer.writeheader()
        writer.writerows(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder with a tokenizer")
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results/prepare-cpu.csv")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(
            "RESULT",
            json.dumps(run_case(args.case, args.folder, args, args.rows[0], args.processes[0])),
        )
        return
    found: dict[tuple, list[dict]] = {}
    for turn in range(args.turns):
        for rows in args.rows:
            for processes in args.processes:
                with tempfile.TemporaryDirectory() as name:
                    folders = {
                        with_base: Path(name) / str(with_base) for with_base in (True, False)
                    }
                    for with_base, folder in folders.items():
                        folder.mkdir()
                        write_rows(folder / f"{rows}.jsonl", rows, with_base)
                    for case in CASES:
                        folder = folders[case in ("base", "again")]
                        command = [sys.executable, __file__, "--model", args.model, "--case", case]
                        command += ["--rows", rows, "--processes", processes, "--folder", folder]
                        before = size_of(folder)
                        output, peaks = watched(list(map(str, command)))
                        result = json.loads(output.split("RESULT")[1])
                        result["main_MB"] = (peaks["own"] >> 20) - result.pop("start_MB")
                        result["worker_MB"] = peaks["worker"] >> 20
                        result["peak_MB"] = peaks["resident"] >> 20
                        result["disk_MB"] = (size_of(folder) - before) >> 20
                        found.setdefault((case, rows, processes), []).append(result)
                        print(f"turn {turn}: {case} {rows} rows: {result}", flush=True)
                write(args.output, lines_of(found))  # a run of hours may be stopped
    for line in lines_of(found):
        print({key: line[key] for key in list(line)[:12]})


if __name__ == "__main__":
    main()
