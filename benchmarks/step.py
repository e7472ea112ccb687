"""A training step: TRL's DPO, three padded rows with full logits, and ours, padded and with a shared prefix.

    python benchmarks/step.py --json step.json --plot step.png         # CPU: SmolLM2-135M with LoRA
    python benchmarks/step.py --shape llama3-8b --csv step.csv         # GPU: random weights of that shape

One process, variants take turns, medians. Forward, loss and backward of a micro-batch; the optimiser is left
out. The reference is precomputed for all, as each would do it.

  trl_dpo      TRL's DPOTrainer: two responses, full logits
  trl_rows     three padded rows, full logits in fp32: BAPO as one would write it
  bapo_padded  ours: three padded rows, only response tokens reach the vocabulary
  bapo_shared  ours: the prompt once, its responses after it, nothing padded

Peak memory counts what a step allocates above the model and its gradients: torch's count on a GPU, the
process's resident memory on a CPU (Linux).
"""

import argparse
import csv
import ctypes
import gc
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
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
import torch
from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from step_gpu import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import DPOTrainer

from bapo_plugin import BAPOConfig, BAPOTrainer
from bapo_plugin.loss import ResponseLogps, bapo_loss
from bapo_plugin.rows.texts import tokenize_row
from bapo_plugin.scoring.collator import ROW, PaddedCollator
from bapo_plugin.scoring.reference import COLUMN

ROOT = Path(__file__).parents[1]
DATA = ROOT / "yaml_examples/demo/personal_styles.jsonl"
VARIANTS = ("trl_dpo", "trl_rows", "bapo_padded", "bapo_shared")


def fixed_rows(prompt, response, count, vocabulary):
    g = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(10, min(vocabulary, 40_000), (n,), generator=g).tolist()

    return [
        {"prompt_ids": ids(prompt)}
        | {f"{name}_ids": ids(response) for name in ("chosen", "rejected", "base")}
        for _ in range(count)
    ]


def demo_rows(tokenizer, count, conversations=False):
    """The demo's rows. With conversations, every third prompt has former turns, as chats have: ragged."""
    lines = [json.loads(line) for line in DATA.read_text("utf-8").splitlines()]
    rows = []
    for i in range(count):
        row = lines[i]
        chat = [{"role": "user", "content": row["prompt"]}]
        if conversations and i % 3 == 0:
            for earlier in lines[40 + i : 44 + i]:
                chat[:0] = [
                    {"role": "user", "content": earlier["prompt"]},
                    {"role": "assistant", "content": earlier["formal"]},
                ]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        texts = {"prompt": prompt, "chosen": row["plain"], "rejected": row["formal"]}
        rows.append(tokenize_row(texts | {"base": row["pirate"]}, tokenizer))
    return rows


class Bench:
    """One model with LoRA in four trainers' hands."""

    def __init__(self, args):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.folder = tempfile.mkdtemp()
        # the adapter makes one model serve all; each trainer gets its own LoRA on a model of its own
        # only where memory is plenty, so: build ours, and let TRL's forward use the same modules
        self.trainer = BAPOTrainer(
            self._model(),
            args=self._config(),
            train_dataset=Dataset.from_list(self._texts()),
            processing_class=self.tokenizer,
            peft_config=LoraConfig(
                r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            bapo=BAPOConfig(shared_prefix="require"),
        )
        # all rows of a batch get the reference log-probs of row 0
        known = self.trainer.train_dataset.add_column(COLUMN, [[-50.0] * 3])
        self.trainer.reference.number(known, "training")
        self.trainer.reference.fill()
        self.model = self.trainer.model
        self.trl = DPOTrainer(
            self.model,
            args=self._config(precompute_ref_log_probs=False),
            train_dataset=Dataset.from_list(self._texts()),
            processing_class=self.tokenizer,
        )
        self.trl.precompute_ref_logps = (
            True  # as after its own pass; the step reads them from the batch
        )
        self.model.train()

    def _config(self, **changes):
        return AxolotlDPOConfig(
            output_dir=self.folder,
            report_to=[],
            max_length=None,
            bf16=self.device == "cuda",
            remove_unused_columns=False,
            gradient_checkpointing=self.args.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            disable_tqdm=True,
            **changes,
        )

    def _model(self):
        if not self.args.shape:
            model = AutoModelForCausalLM.from_pretrained(self.args.model, dtype=self.dtype)
        else:
            shape = dict(SHAPES[self.args.shape])
            config = AutoConfig.for_model(shape.pop("model_type"), **shape)
            with torch.device(self.device):
                torch.set_default_dtype(self.dtype)
                model = AutoModelForCausalLM.from_config(config)
                torch.set_default_dtype(torch.float32)
        return model.to(self.device)

    @staticmethod
    def _texts():
        return [{"prompt": "a ", "chosen": "b", "rejected": "c", "base": "d"}]

    def batch(self, variant, rows):
        if variant == "trl_dpo":
            features = [
                {k: row[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")}
                | {"ref_chosen_logps": -50.0, "ref_rejected_logps": -50.0}
                for row in rows
            ]
            batch = self.trl.data_collator(features)
        else:
            rows = [row | {ROW: 0} for row in rows]
            shared = variant == "bapo_shared"
            pad = self.tokenizer.pad_token_id
            batch = (self.trainer.data_collator if shared else PaddedCollator(pad))(rows)
        return {k: v.to(self.device) if hasattr(v, "to") else v for k, v in batch.items()}

    def loss(self, variant, batch):
        if variant == "trl_dpo":
            return self.trl.compute_loss(self.model, batch)
        if variant == "trl_rows":
            return self._rows_loss(batch)
        return self.trainer.compute_loss(self.model, batch)

    def _rows_loss(self, batch):
        """log-softmax of all logits, as trainers do it, then our loss."""
        outputs = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        )
        logits = outputs.logits[:, :-1].float()
        labels = batch["input_ids"][:, 1:]
        logps = torch.log_softmax(logits, -1).gather(2, labels.unsqueeze(2)).squeeze(2)
        keep = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        keep.view(-1)[batch["response_index"]] = True
        n = len(labels) // 3
        policy = ResponseLogps(*(logps * keep[:, :-1]).sum(1).view(3, n))
        reference = ResponseLogps(*self.trainer.reference.known(batch).sequences.view(3, n))
        tokens = ResponseLogps(*batch["cu_seqlens"].diff().view(3, n))
        return bapo_loss(policy, reference, tokens, anchor_weight=0.1).loss.mean()

    def step(self, variant, batch):
        self.model.zero_grad(set_to_none=False)
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.loss(variant, batch)
        loss.backward()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, variant, batch):
        start = time.perf_counter()
        self.step(variant, batch)
        return time.perf_counter() - start

    def peak(self, variant, batch):
        """Most bytes allocated during a step, above those before it."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step(variant, batch)
            return torch.cuda.max_memory_allocated() - before
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _status("VmRSS")
        self.step(variant, batch)
        return _status("VmHWM") - before


def _status(name):
    """A line of Linux's /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def run_case(bench, case, rows, args, results, variants=VARIANTS):
    batches = {variant: bench.batch(variant, rows) for variant in variants}
    times = {variant: [] for variant in variants}
    failed = {}
    for turn in range(args.turns + 1):  # the first warms up
        for variant in variants:
            if variant in failed:
                continue
            try:
                seconds = bench.seconds(variant, batches[variant])
            except torch.OutOfMemoryError:
                failed[variant] = "out of memory"
                bench.model.zero_grad()
                torch.cuda.empty_cache()
                continue
            if turn:
                times[variant].append(seconds)
    for variant in variants:
        row = {"case": case, "variant": variant, "rows": len(rows)}
        if variant in failed:
            row |= {"seconds": None, "peak_bytes": None, "note": failed[variant]}
        else:
            row["seconds"] = statistics.median(times[variant])
            row["peak_bytes"] = bench.peak(variant, batches[variant]) if args.memory else None
        results.append(row)
        print(f"{case:>10} {variant:>12} {row['seconds']} s  {row['peak_bytes']} bytes", flush=True)


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    growth = {
        "prompt tokens (1 row, responses of 128)": [
            r for r in results if r["case"].startswith("P=")
        ],
        "rows of a micro-batch (256/128)": [r for r in results if r["case"].startswith("n=")],
    }
    for axis, (title, rows) in zip(axes, growth.items(), strict=True):
        for variant in VARIANTS:
            mine = [r for r in rows if r["variant"] == variant and r["seconds"]]
            axis.plot(
                [int(r["case"][2:]) for r in mine],
                [r["seconds"] for r in mine],
                "o-",
                label=variant,
            )
        axis.set_xlabel(title)
        axis.set_ylabel("seconds a step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / ".models/SmolLM2-135M-Instruct"))
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), help="random weights of this shape instead"
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1, help="rows of a micro-batch, fixed lengths")
    parser.add_argument("--ragged-rows", type=int, default=4, help="the same for demo and ragged")
    parser.add_argument(
        "--cases", nargs="+", default=["64/64", "256/128", "512/128", "demo", "ragged"]
    )
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path, help="also time growth, and plot it here")
    args = parser.parse_args()
    disable_progress_bars()
    bench = Bench(args)
    vocabulary = bench.model.config.vocab_size
    results = []
    for case in args.cases:
        if case in ("demo", "ragged"):
            rows = demo_rows(bench.tokenizer, args.ragged_rows, conversations=case == "ragged")
        else:
            prompt, response = map(int, case.split("/"))
            rows = fixed_rows(prompt, response, args.rows, vocabulary)
        run_case(bench, case, rows, args, results)
    if args.plot:
        args.memory, args.turns = False, max(1, args.turns - 1)
        for prompt in (64, 256, 512, 1024):
            rows = fixed_rows(prompt, 128, 1, vocabulary)
            run_case(bench, f"P={prompt}", rows, args, results)
        for count in (1, 2, 4):
            run_case(bench, f"n={count}", fixed_rows(256, 128, count, vocabulary), args, results)
        plot(results, args.plot)
    gpu = bench.device == "cuda"
    about = {
        "model": args.shape or Path(args.model).name,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name()
        if gpu
        else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": " ".join(
            f"{n} {version(n)}" for n in ("torch", "transformers", "trl", "axolotl")
        ),
    }
    by = {(r["case"], r["variant"]): r for r in results}
    print(f"\n{'case':>10}  d/a time  d/b time  c/b time  d/b memory")
    for case in dict.fromkeys(r["case"] for r in results):
        a, b, c, d = (by[case, variant] for variant in VARIANTS)

        def ratio(x, y, key):
            return f"{x[key] / y[key]:8.2f}" if x[key] and y[key] else "       -"

        print(
            f"{case:>10}  {ratio(d, a, 'seconds')}  {ratio(d, b, 'seconds')}  {ratio(c, b, 'seconds')}  "
            f"{ratio(d, b, 'peak_bytes')}"
        )
    rows = [row | about for row in results]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(
                file, ["case", "variant", "rows", "seconds", "peak_bytes", "note", *about]
            )
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
