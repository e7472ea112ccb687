"""CUDA: slabs of the vocabulary between GEMM -> one kernel -> GEMM.

For a block of rows and a slab of columns at a time:

    z   [rows, slab] fp32  = h W_slab^T                 cuBLAS, accumulated and kept in fp32
    slab kernel            : e_v = exp(z_v - m), sums of e (and of e (z - m) for the entropy), v != y
    sum [rows, H] fp32    += (e c) W_slab               cuBLAS, added to in fp32

and after the last slab one kernel closes the rows: logp from (m, sum of e, z_y), and

    unit [rows, H] = c_y W_y - sum / sum of e,    size [rows] = logit_scale * q,    q = 1 - p_y

with d logp / d h = size * unit (see torch_tiles for c, q and why the label is left out). `unit` is of
order 1 and rounded once; `size` may be 1e-7 and stays fp32 until the loss's factor has met it.

The reference m of a row is the largest logit of its first slab. It moves only when a later slab has
one that is above it by more than RISE: then that row's sums are scaled, by the program that found it.
So e stays below exp(RISE), which fp16 holds, and a row is rarely touched twice. Online softmax moves
its maximum with every tile; that would pass over `sum` once for each.

A program holds its row of the slab in registers, so e goes where z was: a slab needs 4 bytes a logit.
Every launch costs the host 10 to 40 us: hence wide slabs, and few arguments. No atomics and no lock: the
same bits on every run. Without a gradient the second GEMM and `sum` don't exist; the kernel is the same
one, so log-probs are equal to the bit: where policy and reference agree, their difference is zero.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from bapo_kernels.torch_tiles import even_blocks, has_mixed_gemm, operand
from bapo_kernels.triton_math import LOWEST, cap_logits, cap_slope, finish, scale_row

# Logits of a slab: 64 MiB in fp32. On an H100, blocks of [2048, 8192] were faster than any other.
MAX_ROWS = 2048
SLAB_LOGITS = 2048 * 8192
# Of few rows a slab takes more columns, so that launches don't outlast the work; as many as registers hold.
MAX_COLUMNS = 32768
MAX_COLUMNS_WITH_OPTIONS = 16384
MIN_COLUMNS = 256
RISE = tl.constexpr(7.0)
BLOCK_H = 1024
SUM_BLOCK = 256


@triton.jit(do_not_specialize=["need_grad"])
def slab_kernel(
    logits,  # [rows, BLOCK] fp32
    grad,  # the same memory in the dtype of the states
    bias,
    labels,
    sums,  # [rows, H] fp32
    state,  # [4, stride_state] fp32: peak, mass, spread, label's logit
    V,
    H,
    first,
    stride_state,
    scale,
    softcap,
    need_grad,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEED_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    columns = V - first
    label = (tl.load(labels + row).to(tl.int64) - first).to(tl.int32)  # close_kernel sees a wrap
    logits += row * BLOCK
    inside = lanes < columns
    # The slab is allocated whole: what a last one holds beyond V is read, in 16 bytes a lane, and masked after.
    z = tl.load(logits + lanes)
    b = 0.0
    if HAS_BIAS:
        b = tl.load(bias + first + lanes, mask=inside, other=0.0)
    z = cap_logits(z, b, scale, softcap, HAS_SOFTCAP)
    state += row
    if (label >= 0) & (label < tl.minimum(columns, BLOCK)):
        z_label = tl.load(logits + label)
        b_label = 0.0
        if HAS_BIAS:
            b_label = tl.load(bias + first + label)
        z_label = cap_logits(z_label, b_label, scale, softcap, HAS_SOFTCAP)
        tl.store(state + 3 * stride_state, z_label)

    z_others = tl.where(inside & (lanes != label), z, float("-inf"))
    # before the reduction, whose barrier keeps these from the stores below: one thread stores for all
    peak = tl.load(state, mask=first > 0, other=LOWEST)
    mass = tl.load(state + stride_state, mask=first > 0, other=0.0)
    spread = 0.0
    if NEED_ENTROPY:
        spread = tl.load(state + 2 * stride_state, mask=first > 0, other=0.0)
    top = tl.max(z_others, 0)
    if top > peak + RISE:
        shrink = tl.exp(peak - top)
        if NEED_ENTROPY:
            spread = shrink * (spread + (peak - top) * mass)
        if (need_grad != 0) & (mass > 0):
            scale_row(sums + row * H, shrink, H, BLOCK_H)
        mass *= shrink
        peak = top

    d = z_others - peak
    e = tl.exp(d)
    tl.store(state, peak)
    tl.store(state + stride_state, mass + tl.sum(e, 0))
    if NEED_ENTROPY:
        tl.store(state + 2 * stride_state, spread + tl.sum(tl.where(e > 0, e * d, 0.0), 0))
    if need_grad != 0:
        if HAS_SOFTCAP:
            e *= cap_slope(z, softcap)
        narrow: tl.constexpr = grad.dtype.element_ty
        grad += row * (BLOCK * 32 // narrow.primitive_bitwidth)
        tl.store(grad + lanes, e.to(narrow))


@triton.jit
def close_kernel(
    weight,
    labels,
    sums,
    state,
    logps,
    logsumexp,
    entropy,
    unit,
    size,
    V,
    H,
    stride_weight,
    stride_width,
    stride_state,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    NEED_ENTROPY: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    state += row
    label = tl.load(labels + row).to(tl.int64)
    known = (label >= 0) & (label < V)
    mass = tl.load(state + stride_state)
    spread = 0.0
    if NEED_ENTROPY:
        spread = tl.load(state + 2 * stride_state)
    # NaN where there is no such token: no loss can miss it, and the host needn't look
    z_label = tl.load(state + 3 * stride_state, mask=known, other=float("nan"))
    logp, q, lse, h = finish(tl.load(state), mass, spread, z_label)
    tl.store(logps + row, logp)
    tl.store(logsumexp + row, lse)
    if NEED_ENTROPY:
        tl.store(entropy + row, h)
    if NEED_GRAD:
        tl.store(size + row, q * scale)
        slope = 1.0
        if HAS_SOFTCAP:
            slope = cap_slope(z_label, softcap)
        mass = tl.where(mass == 0, 1.0, mass)  # V = 1: nothing was summed
        weight += tl.where(known, label, 0) * stride_weight
        for start in range(0, H, BLOCK_H):
            at = start + tl.arange(0, BLOCK_H)
            w = tl.load(weight + at * stride_width, mask=at < H, other=0.0).to(tl.float32)
            mean = tl.load(sums + row * H + at, mask=at < H, other=0.0) / mass
            tl.store(unit + row * H + at, (slope * w - mean).to(unit.dtype.element_ty), mask=at < H)


@triton.jit(do_not_specialize=["T", "S"])
def sum_kernel(logps, offsets, sums, T, S, BLOCK: tl.constexpr):
    """One program a sequence, summed in fp64; NaN everywhere where `offsets` is no partition of T."""
    lanes = tl.arange(0, BLOCK)
    wrong = (tl.load(offsets) != 0) | (tl.load(offsets + S) != T)
    for start in range(0, S, BLOCK):
        at = start + lanes
        a = tl.load(offsets + at, mask=at < S, other=0)
        b = tl.load(offsets + at + 1, mask=at < S, other=0)
        wrong = wrong | (tl.sum((b < a).to(tl.int32), 0) > 0)
    sequence = tl.program_id(0)
    begin = tl.where(wrong, 0, tl.load(offsets + sequence)).to(tl.int32)
    end = tl.where(wrong, 0, tl.load(offsets + sequence + 1)).to(tl.int32)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + lanes
        total += tl.load(logps + at, mask=at < end, other=0.0).to(tl.float64)
    found = tl.sum(total, 0).to(tl.float32)
    tl.store(sums + sequence, tl.where(wrong, float("nan"), found))


def num_warps(columns: int) -> int:
    """16 logits a thread, 32 from 16,384 columns on."""
    return max(4, min(16, columns // 512), columns // 1024)


def slab_plan(
    tokens: int,
    vocabulary: int,
    width: int,
    need_unit: bool,
    budget: int,
    most_columns: int = MAX_COLUMNS,
    buffers: int = 1,
) -> tuple[list[slice], list[slice]]:
    """(blocks of rows, slabs of columns) whose temporaries fit `budget` bytes, 0 for the default: `buffers` slabs of
    fp32 logits, and fp32 sums where a gradient is needed.

    Slabs are a power of two wide, all but the last.
    """
    most_rows, logits = MAX_ROWS, SLAB_LOGITS // buffers
    if budget:
        sums = 4 * width * need_unit  # bytes a row
        least = 4 * buffers * MIN_COLUMNS + sums
        most_rows = min(most_rows, max(16, budget // least // 16 * 16))
        logits = min(logits, max(0, budget - sums * most_rows) // (4 * buffers))
    blocks = even_blocks(tokens, most_rows, multiple=16)
    rows = blocks[0].stop if blocks else 1
    columns = max(MIN_COLUMNS, min(most_columns, 1 << (max(1, logits // rows).bit_length() - 1)))
    columns = min(columns, triton.next_power_of_2(vocabulary))
    return blocks, [slice(s, min(s + columns, vocabulary)) for s in range(0, vocabulary, columns)]


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    need_unit: bool,
    need_entropy: bool,
    chunk_bytes: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same arguments and result as `torch_tiles.forward`; bf16, fp16 and fp32."""
    total, width = hidden.shape
    vocabulary = weight.shape[0]
    empty = hidden.new_empty
    # Tensors of their own, not rows of one: their starts are aligned, so one compiled kernel serves all.
    logps, logsumexp = (empty(total, dtype=torch.float32) for _ in range(2))
    entropy = empty(total if need_entropy else 0, dtype=torch.float32)
    unit = empty(total if need_unit else 0, width)
    size = empty(total if need_unit else 0, dtype=torch.float32)
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    labels = labels.contiguous()

    plain = bias is None and softcap is None and not need_entropy
    most_columns = MAX_COLUMNS if plain else MAX_COLUMNS_WITH_OPTIONS
    blocks, slabs = slab_plan(total, vocabulary, width, need_unit, chunk_bytes, most_columns)
    if not blocks:
        return logps, logsumexp, entropy, unit, size
    rows = blocks[0].stop
    padded = triton.next_power_of_2(slabs[0].stop)
    logits = empty(rows, padded, dtype=torch.float32)
    grad = logits.view(hidden.dtype)
    sums = empty(rows if need_unit else 0, width, dtype=torch.float32)
    state = empty(4, rows, dtype=torch.float32)
    cap = 1.0 if softcap is None else softcap
    block_h = min(BLOCK_H, triton.next_power_of_2(width))

    pieces = [(slab.start, weight[slab]) for slab in slabs]  # what the host does once, it does here
    mixed = has_mixed_gemm(weight)
    with torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext():
        for block in blocks:
            h, y = hidden[block], labels[block]
            n = h.shape[0]
            for first, w in pieces:
                columns = w.shape[0]
                mm(h, w.t(), logits[:n, :columns], mixed)
                slab_kernel[(n,)](
                    logits,
                    grad,
                    logits if bias is None else bias,
                    y,
                    sums,
                    state,
                    vocabulary,
                    width,
                    first,
                    rows,
                    scale,
                    cap,
                    int(need_unit),
                    HAS_BIAS=bias is not None,
                    HAS_SOFTCAP=softcap is not None,
                    NEED_ENTROPY=need_entropy,
                    BLOCK=padded,
                    BLOCK_H=block_h,
                    num_warps=num_warps(padded),
                )
                if need_unit:
                    mm(grad[:n, :columns], w, sums[:n], mixed, add=first > 0)
            close_kernel[(n,)](
                weight,
                y,
                sums,
                state,
                logps[block],
                logsumexp[block],
                entropy[block] if need_entropy else entropy,
                unit[block] if need_unit else unit,
                size[block] if need_unit else size,
                vocabulary,
                width,
                weight.stride(0),
                weight.stride(1),
                rows,
                scale,
                cap,
                HAS_SOFTCAP=softcap is not None,
                NEED_GRAD=need_unit,
                NEED_ENTROPY=need_entropy,
                BLOCK_H=block_h,
            )
    return logps, logsumexp, entropy, unit, size


def sum_by_sequence(logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[S] sums of [T] fp32 log-probs; one launch, whatever is asked of `cu_seqlens`."""
    sums = logps.new_empty(cu_seqlens.shape[0] - 1)
    offsets = cu_seqlens.contiguous()
    if sums.numel():
        with torch.cuda.device(logps.device) if logps.is_cuda else nullcontext():
            sum_kernel[(sums.numel(),)](
                logps, offsets, sums, logps.numel(), sums.numel(), BLOCK=SUM_BLOCK
            )
    return sums


def mm(a: Tensor, b: Tensor, out: Tensor, mixed: bool, add: bool = False) -> None:
    """out (+)= a @ b, accumulated and kept in fp32."""
    if mixed:
        if add:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif add:
        out.addmm_(operand(a), operand(b))
    else:
        torch.mm(operand(a), operand(b), out=out)
