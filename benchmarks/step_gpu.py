"""A training step on a GPU: TRL's DPO as people run it, and BAPO as this project runs it.

    python benchmarks/step_gpu.py --json step_gpu.json            # all shapes, under 9 minutes (--budget)
    python benchmarks/step_gpu.py --shapes llama3-8b --nf4        # QLoRA, where bitsandbytes is there

Random weights in the shapes of real models, LoRA r = 16 on all linear layers, bf16, gradient checkpointing
where --checkpointing says so. Needs torch, transformers and peft; trl and datasets for the baselines, liger-kernel and
bitsandbytes where they are asked for. One process, variants take turns, medians; forward, loss and backward of a micro-batch; the optimiser is left out.

  trl_dpo      TRL's DPOTrainer with its default: the reference is computed in every step
  trl_cached   the same with precomputed reference log-probs
  trl_liger    trl_dpo with Liger's fused loss, where liger-kernel is there
  bapo_padded  three padded rows (chosen, rejected, base), cached reference, log-probs by bapo_kernels
  bapo_shared  the prompt once and its three responses after it, nothing padded: what `rl: bapo` does

Peak memory is what a step allocates above the model, its gradients and its inputs.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_DISABLED", "true")
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
for folder in (ROOT, ROOT / "kernels", ROOT / "tests"):
    sys.path.append(str(folder))  # after what is installed

from tiny import make_tokenizer  # noqa: E402

from bapo_plugin.loss import ResponseLogps, bapo_loss  # noqa: E402
from bapo_plugin.scoring import shared_prefix  # noqa: E402
from bapo_plugin.scoring.collator import PaddedCollator, SharedPrefixCollator  # noqa: E402
from bapo_plugin.scoring.forward import ResponseForward  # noqa: E402

NAMES = ("chosen", "rejected", "base")
SHAPES = {
    "llama3-8b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen3-1.7b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "head_dim": 128,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "gemma2-2b": {
        "model_type": "gemma2",
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "head_dim": 256,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}
# (prompt, response, rows): short questions; a chat's answers; long context, short answers
CASES = ((64, 64, 4), (256, 256, 4), (1536, 256, 2))
VARIANTS = ("trl_dpo", "trl_cached", "trl_liger", "bapo_padded", "bapo_shared")
BASELINE = "trl_dpo"


def make_model(shape: dict, nf4: bool) -> torch.nn.Module:
    """On the GPU, with random weights in bf16, or those of linear layers in NF4."""
    shape = dict(shape)
    config = AutoConfig.for_model(shape.pop("model_type"), max_position_embeddings=8192, **shape)
    config._attn_implementation = "eager" if "gemma2" in config.model_type else "sdpa"
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = AutoModelForCausalLM.from_config(config)
        torch.set_default_dtype(torch.float32)
    if nf4:
        quantize(model)
    return model


def quantize(model: torch.nn.Module) -> None:
    """NF4 for every linear layer but the head, as QLoRA has it."""
    import bitsandbytes as bnb

    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is torch.nn.Linear and child is not head:
                new = bnb.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                    device="meta",
                )
                new.weight = bnb.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4"
                ).to("cuda")
                setattr(module, name, new)
    model.is_loaded_in_4bit = True


def make_rows(prompt: int, response: int, count: int, vocabulary: int) -> list[dict]:
    """Ragged, as data are: lengths from a half to one and a half of what is named."""
    g = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        n = int(torch.randint(n // 2, n * 3 // 2 + 1, (1,), generator=g))
        return torch.randint(10, vocabulary, (n,), generator=g).tolist()

    return [
        {"prompt_ids": ids(prompt)} | {f"{name}_ids": ids(response) for name in NAMES}
        for _ in range(count)
    ]


class Bench:
    """One policy; each variant is a function of it and of a batch."""

    def __init__(self, shape: str, nf4: bool, checkpointing: bool):
        base = make_model(SHAPES[shape], nf4)
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self.missing: dict[str, str] = {}
        try:
            self.trl = self._trl(base, lora, checkpointing)
            self.model = self.trl.model
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error)[:100]}"
            self.missing = {v: reason for v in VARIANTS if v.startswith("trl")}
            self.model = get_peft_model(base, lora)
        if not getattr(self, "liger", False):
            self.missing.setdefault("trl_liger", "liger-kernel isn't installed")
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        if checkpointing:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.forward = ResponseForward(log=self._refuse)
        shared_prefix.install(self.model)

    @staticmethod
    def _refuse(message: str) -> None:
        raise RuntimeError(f"not the path that is to be timed: {message}")

    def _trl(self, model: torch.nn.Module, lora: LoraConfig, checkpointing: bool):
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        self.liger = find_spec("liger_kernel") is not None
        config = DPOConfig(
            output_dir=tempfile.mkdtemp(),
            report_to=[],
            max_length=None,
            bf16=True,
            remove_unused_columns=False,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            disable_tqdm=True,
            use_liger_kernel=self.liger,
        )
        texts = [{"prompt": "a ", "chosen": "b", "rejected": "c"}]
        return DPOTrainer(
            model,
            args=config,
            train_dataset=Dataset.from_list(texts),
            processing_class=make_tokenizer(),
            peft_config=lora,
        )

    def batch(self, variant: str, rows: list[dict]) -> dict:
        if variant.startswith("trl"):
            keys = ("prompt_ids", "chosen_ids", "rejected_ids")
            known = {"ref_chosen_logps": -50.0, "ref_rejected_logps": -50.0}
            known = known if variant == "trl_cached" else {}
            batch = self.trl.data_collator([{k: r[k] for k in keys} | known for r in rows])
        else:
            collator = PaddedCollator(0) if variant == "bapo_padded" else SharedPrefixCollator()
            batch = collator(rows)
        return {k: v.to("cuda") if hasattr(v, "to") else v for k, v in batch.items()}

    def loss(self, variant: str, batch: dict) -> torch.Tensor:
        if variant.startswith("trl"):
            # as after its own pass; the step reads them from the batch
            self.trl.precompute_ref_logps = variant == "trl_cached"
            self.trl.use_liger_kernel = variant == "trl_liger"
            return self.trl.compute_loss(self.model, batch)
        logps = self.forward(self.model, self.model, batch).logps
        policy = ResponseLogps(*logps.view(3, -1))
        reference = ResponseLogps(*torch.full_like(logps, -50.0).view(3, -1))
        return bapo_loss(policy, reference, anchor_weight=0.1).loss.mean()

    def step(self, variant: str, batch: dict) -> float:
        """Seconds."""
        self.model.zero_grad(set_to_none=False)
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = self.loss(variant, batch)
        loss.backward()
        torch.cuda.synchronize()
        if not loss.isfinite():
            raise FloatingPointError(f"{variant}: the loss is {loss.item()}")
        return time.perf_counter() - start

    def peak(self, variant: str, batch: dict) -> int:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step(variant, batch)
        return torch.cuda.max_memory_allocated() - before


def run_case(bench: Bench, case: str, rows: list[dict], turns: int, deadline: float) -> list[dict]:
    found, batches, times = {}, {}, {}
    for variant in VARIANTS:
        found[variant] = {"case": case, "variant": variant, "seconds": None, "peak_bytes": None}
        if variant in bench.missing:
            found[variant]["note"] = bench.missing[variant]
            continue
        try:
            batches[variant] = bench.batch(variant, rows)
            bench.step(variant, batches[variant])  # compiles
            found[variant]["peak_bytes"] = bench.peak(variant, batches[variant])
            times[variant] = []
        except Exception as error:
            found[variant]["note"] = f"{type(error).__name__}: {str(error)[:100]}"
            bench.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    for _ in range(turns):
        for variant in times:
            if time.monotonic() < deadline or not times[variant]:
                times[variant].append(bench.step(variant, batches[variant]))
    for variant, seconds in times.items():
        found[variant]["seconds"] = statistics.median(seconds)
    base = found[BASELINE]
    for row in found.values():
        ms = f"{row['seconds'] * 1e3:9.1f} ms" if row["seconds"] else " " * 12
        mib = f"{row['peak_bytes'] / 2**20:9.0f} MiB" if row["peak_bytes"] else " " * 13
        ratio = ""
        if row["seconds"] and base["seconds"]:
            ratio = f"{row['seconds'] / base['seconds']:6.2f} of its time, "
            ratio += f"{row['peak_bytes'] / base['peak_bytes']:5.2f} of its memory"
        print(f"{case:34} {row['variant']:12}{ms}{mib}  {ratio}{row.get('note', '')}", flush=True)
    return list(found.values())


def versions() -> str:
    found = [f"python {platform.python_version()}"]
    for name in "torch triton transformers peft trl liger-kernel bitsandbytes".split():
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--nf4", action="store_true", help="linear layers in 4 bits (QLoRA)")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--budget", type=float, default=480, help="seconds; the rest is left out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device; benchmarks/step.py runs on a CPU")
    deadline = time.monotonic() + args.budget
    about = {"device": torch.cuda.get_device_name(), "versions": versions()}
    print(about["device"], about["versions"], sep="\n", flush=True)
    results = []
    for shape in args.shapes:
        bench = None  # its memory is the next one's
        gc.collect()
        torch.cuda.empty_cache()
        if time.monotonic() > deadline:
            print(f"{shape}: left out, the time is over (--budget)")
            continue
        bench = Bench(shape, args.nf4, args.checkpointing)
        for prompt, response, count in CASES:
            rows = make_rows(prompt, response, count, SHAPES[shape]["vocab_size"])
            case = f"{shape}{' nf4' if args.nf4 else ''} {count}×{prompt}+{response}"
            found = run_case(bench, case, rows, args.turns, deadline)
            settings = {"rows": count, "prompt": prompt, "response": response, "nf4": args.nf4}
            settings["checkpointing"] = args.checkpointing
            results += [row | settings | about for row in found]
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
