"""Time and peak extra memory of sequence log-probs: ours, plain torch and the field's kernels.

    python benchmarks/kernel.py                  # picks the GPU if there is one, else the CPU
    python benchmarks/kernel.py --device cpu --json cpu.json --csv cpu.csv

Needs torch, triton and numpy. Peers (liger-kernel, cut-cross-entropy, TRL 1.14, torch's own
F.linear_cross_entropy) are timed where they can be imported and named where not. Implementations
take turns in one process; ms is the median. Peak extra memory counts everything that torch
allocated above the inputs, gradients included. Under 9 minutes in all (--budget).

"floor" is the time of the FLOPs alone: 2*T*V*H (fwd) or 4*T*V*H (fwd+bwd, frozen head) over the
rate of this device's own GEMM on the same operands.
"""

import argparse
import csv
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import sys
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes would break the table
import numpy as np
import torch
from torch.nn import functional as F

if importlib.util.find_spec("bapo_kernels") is None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from bapo_kernels import sequence_kl, sequence_logprobs

# name: (V, H, soft cap)
HEADS = {
    "llama3-8b": (128_256, 4096, None),
    "qwen3-1.7b": (151_936, 2048, None),
    "gemma2-2b": (256_000, 2304, 30.0),
    "smollm2": (49_152, 576, None),
}
GPU_TOKENS = (8192, 1536, 512, 64, 24_576)
COMPILED_TOKENS = (8192, 1536)
FIELDS = (
    "case impl pass ms ms_p20 ms_p80 peak_bytes tokens vocabulary width dtype device versions note"
).split()
PEAKED = ("bapo", "naive", "liger", "cut-cross-entropy", "cce-exact")
MAX_NAIVE_BYTES = 8 << 30  # on a CPU: don't drive the machine into swap


def bapo(h, w, y, cu, softcap):
    return sequence_logprobs(h, w, y, cu, logit_softcap=softcap).sum


def naive(h, w, y, cu, softcap):
    """Logits in the model's dtype, softmax in fp32: what a trainer writes."""
    logits = F.linear(h, w).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = torch.log_softmax(logits, -1).gather(1, y.unsqueeze(1)).squeeze(1)
    sequence = torch.repeat_interleave(cu.diff(), output_size=y.numel())
    return logps.new_zeros(cu.numel() - 1).index_add(0, sequence, logps)


def naive_fp32_logits(h, w, y, cu, softcap):
    """Plain torch at our accuracy: logits themselves in fp32."""
    return naive(h.float(), w.float(), y, cu, softcap)


def liger(h, w, y, cu, softcap):
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=softcap)
    return -loss(w, h, y)


def cut_cross_entropy(h, w, y, cu, softcap):
    module = importlib.import_module("cut_cross_entropy")
    return -module.linear_cross_entropy(h, w, y, softcap=softcap, reduction="sum")


def cut_cross_entropy_exact(h, w, y, cu, softcap):
    """Without the skipping of blocks whose probabilities round away in bf16."""
    module = importlib.import_module("cut_cross_entropy")
    return -module.linear_cross_entropy(h, w, y, softcap=softcap, reduction="sum", filter_eps=None)


def bapo_kl(h, w, y, cu, softcap):
    """The other function of ours, three GEMMs a token."""
    return sequence_kl(h, h.detach().roll(1, 0), w, cu, logit_softcap=softcap).sum


def trl_chunked(h, w, y, cu, softcap):
    function = importlib.import_module("trl.trainer.utils")._ChunkedLogProbFunction
    return function.apply(h, w, None, y, 1.0, 8192, softcap)[0].sum()


def torch_linear_cross_entropy(h, w, y, cu, softcap):
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(h, w, y, reduction="sum", options=options)


class Missing(Exception):
    """An implementation that this machine can't run, and why."""


def implementations(device, softcap, dtype, tokens):
    """(name -> function or the reason why there is none)."""
    found = {"bapo": bapo, "bapo-kl": bapo_kl, "naive": naive}
    if dtype != torch.float32:
        found["naive-fp32-logits"] = naive_fp32_logits
    if device != "cuda":
        found["naive-compiled"] = Missing("timed on CUDA only")
    elif tokens not in COMPILED_TOKENS:
        found["naive-compiled"] = Missing(f"compiled for T in {COMPILED_TOKENS} only, to save time")
    else:
        found["naive-compiled"] = torch.compile(naive)
    peers = {
        "liger": (liger, "liger_kernel", True),
        "cut-cross-entropy": (cut_cross_entropy, "cut_cross_entropy", True),
        "cce-exact": (cut_cross_entropy_exact, "cut_cross_entropy", True),
        "trl-chunked": (trl_chunked, "trl", False),
    }
    for name, (function, package, needs_cuda) in peers.items():
        if importlib.util.find_spec(package) is None:
            found[name] = Missing(f"{package} isn't installed")
        elif needs_cuda and device != "cuda":
            found[name] = Missing("runs on CUDA only")
        else:
            found[name] = function
    if isinstance(found["trl-chunked"], type(trl_chunked)):
        try:
            utils = importlib.import_module("trl.trainer.utils")
            function = getattr(utils, "_ChunkedLogProbFunction", None)
            if function is None or "bias" not in inspect.signature(function.forward).parameters:
                found["trl-chunked"] = Missing("needs TRL 1.14")
        except Exception as error:
            found["trl-chunked"] = Missing(f"TRL can't be imported: {error}")
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["torch-lce"] = Missing("torch has no F.linear_cross_entropy")
    elif softcap is not None:
        found["torch-lce"] = Missing("no soft cap")
    else:
        found["torch-lce"] = torch_linear_cross_entropy
    return found


def make_inputs(tokens, vocabulary, width, dtype, device, peaked=False):
    """Unit-variance states, a head of std 1/sqrt(H) * 2, four ragged sequences.

    Peaked: two thirds of the states point at their label, as a trained model's do.
    """
    g = torch.Generator(device).manual_seed(0)
    h = torch.randn(tokens, width, generator=g, device=device).to(dtype)
    w = torch.empty(vocabulary, width, dtype=dtype, device=device)
    for start in range(0, vocabulary, 16_384):  # no fp32 copy of the head
        rows = w[start : start + 16_384]
        rows.copy_(torch.randn(rows.shape, generator=g, device=device) * (2 / width**0.5))
    y = torch.randint(0, vocabulary, (tokens,), generator=g, device=device)
    if peaked:
        likely = torch.arange(tokens, device=device) % 3 > 0
        h[likely] += 4 * w[y[likely]]  # the label's logit is 16 higher
    cu = torch.tensor([0, tokens // 8, tokens // 2, tokens * 3 // 4, tokens], device=device)
    return h, w, y, cu


def call(function, inputs, softcap, backward):
    h, w, y, cu = inputs
    if not backward:
        with torch.no_grad():
            return function(h, w, y, cu, softcap)
    leaf = h.detach().requires_grad_()
    function(leaf, w, y, cu, softcap).sum().backward()
    return leaf.grad


def time_ms(function, device):
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def peak_bytes(function, device):
    """Most bytes that torch held at once above what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    now = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


class Bench:
    def __init__(self, device, rounds, budget, only, json_file=None, csv_file=None):
        self.device, self.rounds, self.only = device, rounds, only
        self.json_file, self.csv_file = json_file, csv_file
        self.deadline = time.monotonic() + budget
        self.rows = []
        card = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
        self.machine = {"device": card, "versions": versions()}

    def late(self):
        return time.monotonic() > self.deadline

    def row(self, case, impl, which, note="", times=(), peak=None, **shape):
        p20, ms, p80 = np.percentile(times, (20, 50, 80)) if len(times) else (None,) * 3
        values = {"case": case, "impl": impl, "pass": which, "peak_bytes": peak, "note": note}
        values.update(ms=ms, ms_p20=p20, ms_p80=p80, **shape, **self.machine)
        row = {field: values.get(field) for field in FIELDS}
        self.rows.append(row)
        shown = f"{ms:10.2f}" if ms is not None else " " * 10
        memory = f"{peak / 2**20:10.1f}" if peak is not None else " " * 10
        print(f"{case:26} {which:8} {impl:18} {shown} {memory}  {note}", flush=True)

    def run(self, case, head, tokens, dtype, softcap, impls=None, peaked=False):
        """Every implementation on one shape, taking turns; both passes."""
        vocabulary, width = head
        shape = {
            "tokens": tokens,
            "vocabulary": vocabulary,
            "width": width,
            "dtype": str(dtype).removeprefix("torch."),
        }
        inputs = make_inputs(tokens, vocabulary, width, dtype, self.device, peaked)
        chosen = implementations(self.device, softcap, dtype, tokens)
        chosen = {
            n: f
            for n, f in chosen.items()
            if n in (impls or chosen) and (not self.only or n in self.only)
        }
        for backward, which in ((False, "fwd"), (True, "fwd+bwd")):
            runnable, peaks = {}, {}
            for name, function in chosen.items():
                if isinstance(function, Missing):
                    self.row(case, name, which, f"skipped: {function}", **shape)
                elif self.late() and name not in ("bapo", "naive"):
                    self.row(case, name, which, "skipped: out of time (--budget)", **shape)
                elif self.too_large(name, tokens, vocabulary):
                    self.row(case, name, which, "skipped: would not fit the memory", **shape)
                else:
                    once = functools.partial(call, function, inputs, softcap, backward)
                    try:
                        once()
                        peaks[name] = peak_bytes(once, self.device)
                        runnable[name] = once
                    except Exception as error:
                        self.failed(case, name, which, error, shape)
            times = {name: [] for name in runnable}
            stop = time.monotonic() + 25  # a slow peer must not eat the others' time
            for _ in range(self.rounds):
                if all(times.values()) and (time.monotonic() > stop or self.late()):
                    break
                for name, once in list(runnable.items()):
                    try:
                        times[name].append(time_ms(once, self.device))
                    except Exception as error:  # memory that the others left no room in
                        del runnable[name], times[name]
                        self.failed(case, name, which, error, shape)
            floor = self.floor(inputs, (4 if backward else 2))
            self.row(case, "floor", which, "GEMM FLOPs alone", times=floor, **shape)
            for name in runnable:
                note = ""
                if "naive" in times and name != "naive":
                    ratio = np.median(np.array(times[name]) / np.array(times["naive"]))
                    note = (
                        f"{ratio:.2f} of naive's time, {peaks[name] / peaks['naive']:.1%} of peak"
                    )
                if name == "bapo" and self.device == "cuda":
                    note = "; ".join(filter(None, (note, parts(runnable[name], backward))))
                self.row(case, name, which, note, times=times[name], peak=peaks[name], **shape)

        self.save()

    def failed(self, case, name, which, error, shape):
        note = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:90]}"
        self.row(case, name, which, note, **shape)
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def save(self):
        """After every shape: an interrupted run keeps what it has."""
        if self.json_file:
            Path(self.json_file).write_text(json.dumps(self.rows, indent=1) + "\n", "utf-8")
        if self.csv_file:
            with open(self.csv_file, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                writer.writerows(self.rows)

    def too_large(self, name, tokens, vocabulary):
        naive = name.startswith("naive")
        return self.device == "cpu" and naive and tokens * vocabulary * 16 > MAX_NAIVE_BYTES

    def floor(self, inputs, flops_factor):
        h, w, _, _ = inputs
        rows = h[: min(2048, 2**29 // w.shape[0])]
        product = lambda: torch.mm(rows, w.t())  # noqa: E731
        product()
        times = [time_ms(product, self.device) for _ in range(max(3, self.rounds // 2))]
        scale = flops_factor / 2 * h.shape[0] / rows.shape[0]
        return [t * scale for t in times]


def parts(function, backward):
    """ms of the first GEMMs, the slab kernel, the second GEMMs and the rest, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    on_card = torch.autograd.DeviceType.CUDA
    events = profile.profiler.kineto_results.events()
    events = sorted((e for e in events if e.device_type() == on_card), key=lambda e: e.start_ns())
    ms = dict.fromkeys(("GEMM 1", "slab kernel", "GEMM 2", "rest"), 0.0)
    last = None
    for event in events:
        name = event.name()
        if "slab_kernel" in name:
            kind = "slab kernel"
        elif any(word in name for word in ("gemm", "nvjet", "cutlass", "splitK")):
            # between two slab kernels the second GEMM comes before the next slab's first
            kind = "GEMM 2" if backward and last == "slab kernel" else "GEMM 1"
        else:
            kind = "rest"
        ms[kind] += event.duration_ns() / 1e6
        last = kind
    return ", ".join(f"{kind} {value:.2f}" for kind, value in ms.items())


def run_gpu(bench):
    for tokens in GPU_TOKENS:
        if tokens == 1536:  # after the first size, before time may be short
            for name in ("llama3-8b", "qwen3-1.7b"):
                vocabulary, width, softcap = HEADS[name]
                case = f"{name} T=8192 peaked"
                bench.run(case, (vocabulary, width), 8192, torch.bfloat16, softcap, PEAKED, True)
        for name, (vocabulary, width, softcap) in HEADS.items():
            torch._dynamo.reset()
            torch.cuda.empty_cache()
            bench.run(f"{name} T={tokens}", (vocabulary, width), tokens, torch.bfloat16, softcap)


def run_cpu(bench):
    vocabulary, width, softcap = HEADS["smollm2"]
    head = (vocabulary, width)
    bench.run("smollm2 T=1536", head, 1536, torch.float32, softcap)
    bench.run("smollm2 T=1536 bf16", head, 1536, torch.bfloat16, softcap)
    # Flat memory: T and V doubled, ours beside naive
    bench.rounds, both = 1, ("bapo", "naive")
    for factor in (1, 2, 4, 8):
        case = f"smollm2 T={256 * factor} flat in T"
        bench.run(case, head, 256 * factor, torch.float32, softcap, both)
    for factor in (2, 4, 8):
        case = f"smollm2 V={vocabulary * factor} T=256"
        bench.run(case, (vocabulary * factor, width), 256, torch.float32, softcap, both)


def versions():
    found = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in ("triton", "liger_kernel", "cut_cross_entropy", "trl"):
        try:
            found.append(f"{package} {importlib.metadata.version(package.replace('_', '-'))}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def cpu_name():
    name = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = next(x.split(":")[1].strip() for x in text.splitlines() if "model name" in x)
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--json", metavar="FILE", help="write the rows as a list of objects")
    parser.add_argument("--csv", metavar="FILE", help="write the rows as a table")
    parser.add_argument("--rounds", type=int, default=None, help="timed rounds of each shape")
    parser.add_argument("--only", nargs="+", metavar="IMPL", help="these implementations only")
    parser.add_argument("--budget", type=float, default=300, help="seconds after which peers rest")
    args = parser.parse_args()
    rounds = args.rounds or (9 if args.device == "cuda" else 5)
    bench = Bench(args.device, rounds, args.budget, args.only, args.json, args.csv)
    print(*bench.machine.values(), sep="\n")
    print(f"{'case':26} {'pass':8} {'impl':18} {'ms':>10} {'peak MiB':>10}")
    (run_gpu if args.device == "cuda" else run_cpu)(bench)


if __name__ == "__main__":
    main()
