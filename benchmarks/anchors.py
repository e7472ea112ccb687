"""Base responses and reference log-probs: what batching and caching them is worth.

    python benchmarks/anchors.py --model .models/SmolLM2-135M-Instruct --json anchors.json

(1) Generation: tokens/s one prompt at a time and in batches, the same prompts, taking turns in one
process. (2) An epoch of 3 with log π_ref computed once (the pass counted) against in each step, same
rows. Medians. Needs the demo's data set and model (`make model`); about 12 minutes on two cores.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from bapo_plugin import BAPOConfig, BAPOTrainer
from bapo_plugin.answers.engine import Request, in_batches
from bapo_plugin.answers.transformers import TransformersEngine

ROOT = Path(__file__).parents[1]
DATA = ROOT / "yaml_examples/demo/personal_styles.jsonl"


def rendered_rows(tokenizer, count):
    rows = []
    for line in DATA.read_text("utf-8").splitlines()[:count]:
        row = json.loads(line)
        chat = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        rows.append(
            {
                "prompt": prompt,
                "chosen": row["plain"],
                "rejected": row["formal"],
                "base": row["pirate"],
            }
        )
    return rows


def generation(model, tokenizer, rows, args):
    """Rows of results: tokens/s at each batch size."""
    requests = []
    for i, row in enumerate(rows[: args.prompts]):
        ids = tuple(tokenizer(row["prompt"])["input_ids"])
        requests.append(Request(str(i), row["prompt"], ids, args.new_tokens))
    seconds: dict[int, list[float]] = {size: [] for size in args.batch_sizes}
    texts: dict[int, dict[str, tuple[int, ...]]] = {}
    tokens = 0
    for turn in range(args.turns):
        for size in args.batch_sizes:
            engine = TransformersEngine(lambda: model, [tokenizer.eos_token_id], batch_size=size)
            start = time.perf_counter()
            found = {}
            for batch in in_batches(engine, requests):
                found |= {r.key: a for r, a in engine.generate(batch, lambda n: None)}
            seconds[size].append(time.perf_counter() - start)
            tokens = sum(len(answer.ids) for answer in found.values())
            texts[size] = {key: answer.ids for key, answer in found.items()}
            print(
                f"turn {turn}: batch {size}: {tokens / seconds[size][-1]:.1f} tokens/s", flush=True
            )
    one = statistics.median(seconds[args.batch_sizes[0]])
    return [
        {
            "case": "generation",
            "batch_size": size,
            "prompts": len(requests),
            "tokens": tokens,
            "seconds": statistics.median(values),
            "tokens_per_second": tokens / statistics.median(values),
            "speedup": one / statistics.median(values),
            "same_answers": sum(
                texts[size][key] == texts[args.batch_sizes[0]][key] for key in texts[size]
            ),
        }
        for size, values in seconds.items()
    ]


def epochs(model_dir, tokenizer, rows, args):
    """Seconds of 3 epochs: log π_ref in each step, computed once before (the pass counted), found again."""
    seconds: dict[str, list[float]] = {"live": [], "cached": [], "found": []}
    for turn in range(args.turns):
        with tempfile.TemporaryDirectory() as folder:
            for name in seconds:
                trainer = BAPOTrainer(
                    AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
                    args=AxolotlDPOConfig(
                        output_dir=folder,
                        per_device_train_batch_size=4,
                        per_device_eval_batch_size=4,
                        num_train_epochs=3,
                        learning_rate=1e-4,
                        report_to=[],
                        save_strategy="no",
                        eval_strategy="no",
                        logging_steps=1000,
                        max_length=1024,
                        disable_tqdm=True,
                        bf16=False,
                        remove_unused_columns=False,
                        gradient_checkpointing=False,
                    ),
                    train_dataset=Dataset.from_list(rows[: args.rows]),
                    processing_class=tokenizer,
                    peft_config=LoraConfig(
                        r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
                    ),
                    bapo=BAPOConfig(precompute_ref_log_probs=name != "live"),
                    cache_dir=folder,
                )
                start = time.perf_counter()
                trainer.train()
                seconds[name].append(time.perf_counter() - start)
                print(
                    f"turn {turn}: 3 epochs, reference {name}: {seconds[name][-1]:.1f} s",
                    flush=True,
                )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "case": "three epochs",
            "reference": name,
            "rows": args.rows,
            "seconds": medians[name],
            "ratio": medians[name] / medians["live"],
        }
        for name in seconds
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / ".models/SmolLM2-135M-Instruct"))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", choices=["generation", "epochs"])
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = rendered_rows(tokenizer, max(args.prompts, args.rows))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    if args.only != "epochs":
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
        results += generation(model, tokenizer, rows, args)
        del model
    if args.only != "generation":
        results += epochs(args.model, tokenizer, rows, args)
    machine = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else platform.processor() or platform.machine()
    )
    about = {
        "device": f"{machine}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "axolotl")},
    }
    for row in results:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    if args.json:
        args.json.write_text(json.dumps([row | about for row in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
