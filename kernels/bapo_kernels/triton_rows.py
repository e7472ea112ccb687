"""CUDA with a gradient: chunks of rows, GEMM -> one row kernel -> GEMM.

    logits [rows, V] fp32  = h W^T                       cuBLAS, accumulated and kept in fp32
    row kernel             : logp, q = 1 - p_y, g_v      one program a row, two passes over it
    unit [rows, H]         = q * logit_scale * (g W)     cuBLAS, fp32 result, rounded once

with g_y = c_y and g_v = -c_v exp(z_v - L) elsewhere (see torch_tiles for L, q and c). g is what is
rounded to 16 bits: its entries are relative to q, so fp16 keeps a confident token's gradient too.

Traffic of the row kernel, bytes a logit: 4 (pass 1) + 4 (pass 2) + 2 (g) = 10, beside 4 * H FLOPs
of GEMM. At H = 4096 that is 3.0 ps on an H100 (3.35 TB/s) beside 23 ps of GEMM (700 TFLOP/s): the
kernel has only to stream. Hence no masks in the main loop (a mask with V not a multiple of 16
splits 16-byte loads), 16-byte aligned rows, per-lane running sums with a single cross-lane
reduction at the end, and one exp a logit: of exp(m - m') and exp(z - m') one is always 1.

BLOCK = 2048 over 8 warps is 8 logits a thread, two 16-byte loads in flight; the state is 2 or 3
registers a logit, so that 4 programs fit an SM beside each other (table: bapo_kernels.inspect).
"""

import functools
import math
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from bapo_kernels.torch_tiles import even_blocks, has_mixed_gemm, mm_wide, operand
from bapo_kernels.triton_math import LOWEST, cap_logits, cap_slope, finish

BLOCK = 2048
NUM_WARPS = 8
DEFAULT_CHUNK_BYTES = 1 << 30
# Fewer rows would make the first GEMM wait for W: 2 * rows FLOPs for each 2 bytes of it.
_MIN_ROWS = 512
_GEMM_TILE = 128


@triton.jit
def _accumulate(z, here, label, peak, mass, spread, NEED_ENTROPY: tl.constexpr):
    """One block of logits into each lane's online (peak, mass, spread); the label is left out."""
    z = tl.where(here == label, float("-inf"), z)
    d = z - peak
    e = tl.exp(-tl.abs(d))
    rises = d > 0
    if NEED_ENTROPY:
        grown = tl.where(mass > 0, e * (spread - d * mass), 0.0)
        spread = tl.where(rises, grown, spread + tl.where(e > 0, e * d, 0.0))
    mass = tl.where(rises, mass * e + 1.0, mass + e)
    return tl.maximum(peak, z), mass, spread


@triton.jit
def row_kernel(
    logits,
    bias,
    labels,
    grad,
    logps,
    logsumexp,
    entropy,
    row_scale,
    V,
    stride_logits,
    stride_grad,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    NEED_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 elements
    logits += row * stride_logits
    grad += row * stride_grad
    label = tl.load(labels + row).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    whole = V // BLOCK * BLOCK

    z_label = tl.load(logits + label)
    b_label = 0.0
    if HAS_BIAS:
        b_label = tl.load(bias + label)
    z_label = cap_logits(z_label, b_label, scale, softcap, HAS_SOFTCAP)

    peak = tl.full([BLOCK], LOWEST, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    spread = tl.zeros([BLOCK], tl.float32)
    for start in range(0, whole, BLOCK):
        here = start + lanes
        z = tl.load(logits + here, eviction_policy="evict_last")
        b = 0.0
        if HAS_BIAS:
            b = tl.load(bias + here)
        z = cap_logits(z, b, scale, softcap, HAS_SOFTCAP)
        peak, mass, spread = _accumulate(z, here, label, peak, mass, spread, NEED_ENTROPY)
    here = whole + lanes
    inside = here < V
    if whole < V:
        z = tl.load(logits + here, mask=inside, other=0.0)
        b = 0.0
        if HAS_BIAS:
            b = tl.load(bias + here, mask=inside, other=0.0)
        z = cap_logits(z, b, scale, softcap, HAS_SOFTCAP)
        z = tl.where(inside, z, float("-inf"))
        peak, mass, spread = _accumulate(z, here, label, peak, mass, spread, NEED_ENTROPY)

    top = tl.max(peak, 0)
    shrink = tl.exp(peak - top)
    if NEED_ENTROPY:
        spread_sum = tl.sum(shrink * (spread + (peak - top) * mass), 0)
    else:
        spread_sum = 0.0
    logp, q, others, lse, h = finish(top, tl.sum(shrink * mass, 0), spread_sum, z_label)
    tl.store(logps + row, logp)
    tl.store(logsumexp + row, lse)
    if NEED_ENTROPY:
        tl.store(entropy + row, h)

    if NEED_GRAD:
        tl.store(row_scale + row, q * scale)
        for start in range(0, whole, BLOCK):
            here = start + lanes
            z = tl.load(logits + here, eviction_policy="evict_first")
            b = 0.0
            if HAS_BIAS:
                b = tl.load(bias + here)
            z = cap_logits(z, b, scale, softcap, HAS_SOFTCAP)
            g = tl.where(here == label, 1.0, -tl.exp(z - others))
            if HAS_SOFTCAP:
                g *= cap_slope(z, softcap)
            tl.store(grad + here, g.to(grad.dtype.element_ty))
        here = whole + lanes
        if whole < V:
            z = tl.load(logits + here, mask=inside, other=0.0)
            b = 0.0
            if HAS_BIAS:
                b = tl.load(bias + here, mask=inside, other=0.0)
            z = cap_logits(z, b, scale, softcap, HAS_SOFTCAP)
            g = tl.where(here == label, 1.0, -tl.exp(z - others))
            if HAS_SOFTCAP:
                g *= cap_slope(z, softcap)
            tl.store(grad + here, g.to(grad.dtype.element_ty), mask=inside)


@functools.lru_cache  # the same for every batch of a model
def chunk_rows(row_bytes: int, width: int, budget: int, processors: int) -> int:
    """Rows of a chunk within `budget` bytes: the fewest, from `_MIN_ROWS`, that fill the device in the
    second GEMM to 90%; where none do, those that fill it best.

    That GEMM has [rows, H] to give, which is few tiles: 640 rows of H = 4096 are 160 tiles of
    128 x 128, two waves of an H100's 132 processors, the second of them nearly empty; 512 rows are one.
    """
    largest = max(16, budget // row_bytes)
    if largest < _GEMM_TILE:
        return largest - largest % 16

    def fill(rows: int) -> float:
        waves = rows // _GEMM_TILE * math.ceil(width / _GEMM_TILE) / processors
        return waves / math.ceil(waves)

    most = largest // _GEMM_TILE * _GEMM_TILE
    candidates = range(min(_MIN_ROWS, most), most + 1, _GEMM_TILE)
    return next((rows for rows in candidates if fill(rows) >= 0.9), max(candidates, key=fill))


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same arguments and result as `torch_tiles.forward`; bf16, fp16 and fp32."""
    total, width = hidden.shape
    vocabulary = weight.shape[0]
    # Three tensors, not rows of one: their starts are aligned, so one compiled kernel serves all.
    logps, logsumexp, row_scale = (hidden.new_empty(total, dtype=torch.float32) for _ in range(3))
    entropy = hidden.new_empty(total if need_entropy else 0, dtype=torch.float32)
    unit = hidden.new_empty(total if need_unit else 0, width)
    bias = None if bias is None else bias.to(torch.float32).contiguous()

    padded = math.ceil(vocabulary / 16) * 16  # rows start on 16 elements: vector loads, cuBLAS
    row_bytes = padded * (4 + (hidden.dtype.itemsize if need_unit else 0))
    if hidden.is_cuda:
        processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    else:  # the interpreter
        processors = 1
    largest = chunk_rows(row_bytes, width, chunk_bytes or DEFAULT_CHUNK_BYTES, processors)

    with torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext():
        for block in even_blocks(total, largest, multiple=16):
            logits = _logits(hidden[block], weight, padded)
            rows = logits.shape[0]
            grad = hidden.new_empty(rows if need_unit else 0, padded)
            row_kernel[(rows,)](
                logits,
                logits if bias is None else bias,
                labels[block],
                grad,
                logps[block],
                logsumexp[block],
                entropy[block] if need_entropy else entropy,
                row_scale[block],
                vocabulary,
                logits.stride(0),
                padded,
                scale,
                1.0 if softcap is None else softcap,
                HAS_BIAS=bias is not None,
                HAS_SOFTCAP=softcap is not None,
                NEED_GRAD=need_unit,
                NEED_ENTROPY=need_entropy,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )
            if need_unit:
                product = mm_wide(operand(grad[:, :vocabulary]), operand(weight))
                unit[block] = product.mul_(row_scale[block].unsqueeze(1))
                del product
            del logits, grad  # before the next chunk allocates its own
    return logps, logsumexp, entropy, unit


def _logits(hidden: Tensor, weight: Tensor, padded: int) -> Tensor:
    """[rows, V] fp32 logits whose rows lie `padded` elements apart."""
    if padded == weight.shape[0]:
        return mm_wide(operand(hidden), operand(weight).t())
    out = hidden.new_empty(hidden.shape[0], padded, dtype=torch.float32)[:, : weight.shape[0]]
    if has_mixed_gemm(weight):
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    return torch.mm(operand(hidden), operand(weight).t(), out=out)
