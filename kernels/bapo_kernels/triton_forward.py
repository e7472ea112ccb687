"""CUDA without a gradient (reference, evaluation, anchor scoring): GEMM and softmax in one kernel.

    tile z [BLOCK_T, BLOCK_V] = h W^T in registers (fp32), then bias, scale, soft cap, and the online
    (peak, mass, spread) over v != label; nothing of a tile but these reaches memory.

The grid is (block of tokens) x (split of the vocabulary). A second kernel merges the splits of a
token in their order: no atomics, no lock, the same bits on every run. 2 * T * V * H FLOPs.

Why split even where T alone would fill the device: programs that run together should share both
operands in L2. With S splits, n running programs touch n / S token blocks (n / S * BLOCK_T * H) and
S vocabulary tiles at a time; S near sqrt(n) is the least: 12 on an H100 keeps 11 MB + 12 MB in
its 50 MB, one split alone would stream 132 token blocks from memory for every vocabulary tile.

Configurations (registers and shared memory: bapo_kernels.inspect). 128 x 128 x 64, 8 warps,
3 stages: 64 FLOP a byte of L2 traffic, 64 fp32 accumulators a thread and 64 KB of shared memory,
which every card from sm_80 on has (consumer cards: 99 KB a block). sm_90 has room for a fourth
stage. A 128 x 256 tile would suit its wgmma better (85 FLOP a byte), but spills with plain
pointers, by 8 to 40 bytes, whether over 8 or 16 warps. One block an SM everywhere, by registers.

Addresses: a 64-bit base a tile, 32-bit offsets inside it; rows beyond the end are clamped and
masked after the product, so the inner loop has no mask where H is a multiple of BLOCK_K.
"""

import math
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from bapo_kernels.triton_math import INTERPRET, LOWEST, cap_logits, finish

WORKSPACE_BYTES = 1 << 20
MERGE_BLOCK = 128
CONFIG = {"BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
CONFIG_SM90 = {"BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}


def config_for(capability: tuple[int, int]) -> dict[str, int]:
    """The shipped configuration of a compute capability. Fixed, so results don't vary by run."""
    return CONFIG_SM90 if capability[0] == 9 else CONFIG


@triton.jit(do_not_specialize=["T", "splits", "tiles_per_split"])  # they vary from batch to batch
def forward_kernel(
    hidden,
    weight,
    bias,
    labels,
    peaks,
    masses,
    spreads,
    label_logits,
    T,
    V,
    H,
    stride_hidden,
    stride_weight,
    splits,
    tiles_per_split,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEED_ENTROPY: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    split = tl.program_id(0) % splits
    first = (tl.program_id(0) // splits) * BLOCK_T
    rows = first + tl.arange(0, BLOCK_T)
    valid = rows < T
    in_tile = tl.minimum(rows, T - 1) - first
    ks = tl.arange(0, BLOCK_K)
    hidden += first.to(tl.int64) * stride_hidden
    h_offsets = in_tile[:, None] * stride_hidden + ks[None, :]
    label = tl.load(labels + rows, mask=valid, other=0).to(tl.int32)

    peak = tl.full([BLOCK_T], LOWEST, tl.float32)
    mass = tl.zeros([BLOCK_T], tl.float32)
    spread = tl.zeros([BLOCK_T], tl.float32)
    z_label = tl.zeros([BLOCK_T], tl.float32)
    begin = split * tiles_per_split * BLOCK_V
    end = tl.minimum(begin + tiles_per_split * BLOCK_V, V)
    w_base = weight + begin.to(tl.int64) * stride_weight
    for start in range(begin, end, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        w_rows = tl.minimum(columns, V - 1) - start
        w_offsets = w_rows[None, :] * stride_weight + ks[:, None]
        z = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for k in range(0, H, BLOCK_K):
            if EVEN_K:
                h = tl.load(hidden + k + h_offsets)
                w = tl.load(w_base + k + w_offsets)
            else:
                h = tl.load(hidden + k + h_offsets, mask=(k + ks)[None, :] < H, other=0.0)
                w = tl.load(w_base + k + w_offsets, mask=(k + ks)[:, None] < H, other=0.0)
            if WIDEN:  # the interpreter's 16-bit dot is wrong
                h = h.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(h, w, z)

        b = 0.0
        if HAS_BIAS:
            b = tl.load(bias + tl.minimum(columns, V - 1))[None, :]
        z = cap_logits(z, b, scale, softcap, HAS_SOFTCAP)
        is_label = columns[None, :] == label[:, None]
        z_label += tl.sum(tl.where(is_label, z, 0.0), 1)
        z = tl.where(is_label | (columns[None, :] >= V), float("-inf"), z)
        new_peak = tl.maximum(peak, tl.max(z, 1))
        shrink = tl.exp(peak - new_peak)
        d = z - new_peak[:, None]
        e = tl.exp(d)
        if NEED_ENTROPY:
            spread = shrink * (spread + (peak - new_peak) * mass)
            spread += tl.sum(tl.where(e > 0, e * d, 0.0), 1)
        mass = mass * shrink + tl.sum(e, 1)
        peak = new_peak
        w_base += BLOCK_V * stride_weight

    at = split * T + rows
    tl.store(peaks + at, peak, mask=valid)
    tl.store(masses + at, mass, mask=valid)
    if NEED_ENTROPY:
        tl.store(spreads + at, spread, mask=valid)
    tl.store(label_logits + rows, z_label, mask=valid & (label >= begin) & (label < end))


@triton.jit(do_not_specialize=["T", "splits"])
def merge_kernel(
    peaks,
    masses,
    spreads,
    label_logits,
    logps,
    logsumexp,
    entropy,
    T,
    splits,
    NEED_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = rows < T
    peak = tl.full([BLOCK], LOWEST, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    spread = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        at = split * T + rows
        other_peak = tl.load(peaks + at, mask=valid, other=0.0)
        other_mass = tl.load(masses + at, mask=valid, other=0.0)
        top = tl.maximum(peak, other_peak)
        mine, other = tl.exp(peak - top), tl.exp(other_peak - top)
        if NEED_ENTROPY:
            other_spread = tl.load(spreads + at, mask=valid, other=0.0)
            spread = mine * (spread + (peak - top) * mass)
            spread += other * (other_spread + (other_peak - top) * other_mass)
        mass = mine * mass + other * other_mass
        peak = top
    z_label = tl.load(label_logits + rows, mask=valid, other=0.0)
    logp, _, _, lse, h = finish(peak, mass, spread, z_label)
    tl.store(logps + rows, logp, mask=valid)
    tl.store(logsumexp + rows, lse, mask=valid)
    if NEED_ENTROPY:
        tl.store(entropy + rows, h, mask=valid)


def supports(hidden: Tensor, weight: Tensor) -> bool:
    """16-bit inputs with unit inner stride. fp32 would leave the tensor cores: cuBLAS does it."""
    return hidden.dtype.itemsize == 2 and weight.stride(1) == 1


def split_plan(tokens: int, vocabulary: int, config: dict[str, int], processors: int):
    """(splits, tiles a split), no split empty: at least sqrt(processors) for L2 and enough to fill
    the device; of those up to twice as many, the ones whose last wave is fullest."""
    tiles = math.ceil(vocabulary / config["BLOCK_V"])
    blocks = math.ceil(tokens / config["BLOCK_T"])
    fewest = max(round(processors**0.5), math.ceil(processors / blocks))

    def tiles_in_turn(splits: int) -> int:
        return math.ceil(blocks * splits / processors) * math.ceil(tiles / splits)

    per_split = math.ceil(tiles / min(range(fewest, 2 * fewest + 1), key=tiles_in_turn))
    return math.ceil(tiles / per_split), per_split


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    need_entropy: bool,
    config: dict[str, int] | None = None,
    processors: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token_logps [T], logsumexp [T], entropy [T] or [0]), fp32; workspace below 1 MiB."""
    total, width = hidden.shape
    vocabulary = weight.shape[0]
    if hidden.is_cuda:
        config = config or config_for(torch.cuda.get_device_capability(hidden.device))
        properties = torch.cuda.get_device_properties(hidden.device)
        processors = processors or properties.multi_processor_count
    else:  # the interpreter
        config, processors = config or CONFIG, processors or 4
    tile = {k: v for k, v in config.items() if k.startswith("BLOCK")}
    launch = {k: v for k, v in config.items() if k.startswith("num")}

    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    logps = hidden.new_empty(total, dtype=torch.float32)
    logsumexp = torch.empty_like(logps)
    entropy = hidden.new_empty(total if need_entropy else 0, dtype=torch.float32)

    start = 0
    with torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext():
        while start < total:
            splits, per_split = split_plan(total - start, vocabulary, config, processors)
            fitting = WORKSPACE_BYTES // (4 * (splits * (2 + need_entropy) + 1))
            fitting -= fitting % tile["BLOCK_T"]
            rows = min(total - start, max(tile["BLOCK_T"], fitting))
            block = slice(start, start + rows)
            start += rows
            # two tensors, not parts of one: their starts are aligned, so one compiled kernel serves all
            peaks = hidden.new_empty(splits, rows, dtype=torch.float32)
            masses = torch.empty_like(peaks)
            spreads = torch.empty_like(peaks) if need_entropy else peaks
            label_logits = hidden.new_empty(rows, dtype=torch.float32)
            forward_kernel[(math.ceil(rows / tile["BLOCK_T"]) * splits,)](
                hidden[block],
                weight,
                label_logits if bias is None else bias,
                labels[block],
                peaks,
                masses,
                spreads,
                label_logits,
                rows,
                vocabulary,
                width,
                hidden.stride(0),
                weight.stride(0),
                splits,
                per_split,
                scale,
                1.0 if softcap is None else softcap,
                HAS_BIAS=bias is not None,
                HAS_SOFTCAP=softcap is not None,
                NEED_ENTROPY=need_entropy,
                EVEN_K=width % tile["BLOCK_K"] == 0,
                WIDEN=INTERPRET,
                **tile,
                **launch,
            )
            merge_kernel[(math.ceil(rows / MERGE_BLOCK),)](
                peaks,
                masses,
                spreads,
                label_logits,
                logps[block],
                logsumexp[block],
                entropy[block] if need_entropy else entropy,
                rows,
                splits,
                NEED_ENTROPY=need_entropy,
                BLOCK=MERGE_BLOCK,
            )
            del peaks, masses, spreads, label_logits  # before the next launch allocates its own
    return logps, logsumexp, entropy
