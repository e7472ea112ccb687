"""Rows a second from files to token ids, beside axolotl's DPO preparation and TRL's tokenising of the same rows.

    python benchmarks/prepare.py --model .models/SmolLM2-135M-Instruct [--rows 1000 10000] [--processes 1 2] [--turns 3]

Rows have UltraFeedback's shape: a prompt of about 200 tokens, responses of about 250. Each case is a process of its own,
and cases take turns:

  base      ours, rows with a base response: first start, everything checked, rendered, tokenised and stored
  plan      ours, rows without: until it is known what has to be generated
  again     ours, second start of `base`
  axolotl   axolotl's own preparation with `rl: dpo` (not stored) and TRL's tokenising after it

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
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
CASES = ("base", "plan", "again", "axolotl")
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
    """In a process of its own: {"seconds", "MB"}."""
    os.environ["HF_HOME"] = str(folder / "hf")
    from axolotl.utils.dict import DictDefault
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if case == "axolotl":
        import axolotl.utils.data.rl as rl
        from trl import DPOConfig, DPOTrainer

        cfg = DictDefault(configuration(folder, args, rows, processes if processes > 1 else None))
        rl.load_tokenizer = lambda cfg: tokenizer
        rl.save_preprocessed_dataset = lambda *args, **kwargs: None
        start = time.perf_counter()
        prepared, _ = rl.prepare_preference_datasets(cfg, tokenizer)
        trainer = object.__new__(DPOTrainer)
        trainer._is_vlm = trainer._is_vision_dataset = False
        trainer._tokenizer = trainer.processing_class = tokenizer
        settings = DPOConfig(str(folder / "out"), bf16=False, use_cpu=True, max_length=1024)
        settings.dataset_num_proc = processes if processes > 1 else None
        trainer._prepare_dataset(prepared, tokenizer, settings, "train")
    else:
        from bapo_plugin.anchors.plan import make_plan
        from bapo_plugin.prepare import Preparation
        from bapo_plugin.store import Store

        cfg = DictDefault(configuration(folder, args, rows, processes))
        start = time.perf_counter()
        work = Preparation(cfg, tokenizer)
        if case == "plan":
            made_by = work.made_by()
            keyed = work.keyed(work.rendered(keep=True), made_by)["datasets"]
            with Store(work.store_path) as store:
                if len(make_plan(keyed, store, made_by, work.stop_ids).requests) != rows:
                    raise RuntimeError("rows were planned more or less than once")
        else:
            work.rows()
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


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
                        done = subprocess.run(
                            list(map(str, command)), capture_output=True, text=True
                        )
                        if done.returncode:
                            sys.exit(done.stderr[-3000:])
                        result = json.loads(done.stdout.split("RESULT")[1])
                        found.setdefault((case, rows, processes), []).append(result)
                        print(f"turn {turn}: {case} {rows} rows: {result}", flush=True)
    lines = []
    for (case, rows, processes), results in found.items():
        seconds = statistics.median(r["seconds"] for r in results)
        peer = statistics.median(r["seconds"] for r in found["axolotl", rows, processes])
        lines.append(
            {
                "case": case,
                "rows": rows,
                "processes": processes,
                "seconds": round(seconds, 2),
                "rows_per_second": round(rows / seconds),
                "of_axolotl_and_trl": round(seconds / peer, 2),
                "MB": max(r["MB"] for r in results),
                "turns": args.turns,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "versions": " ".join(
                    f"{n} {version(n)}" for n in ("axolotl", "trl", "datasets", "tokenizers")
                ),
            }
        )
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0].keys())
        writer.writeheader()
        writer.writerows(lines)
    for line in lines:
        print({key: line[key] for key in list(line)[:7]})


if __name__ == "__main__":
    main()
