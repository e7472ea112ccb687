"""CUDA: KL to a reference under the same head, by slabs; `divergence` states the mathematics.

Both models' log-sum-exps come first (`triton_slabs`, without a gradient: one GEMM a token each). Then, for a
block of rows and a slab of columns at a time:

    z, r [rows, slab] fp32  = h W_slab^T, h_ref W_slab^T
    kl kernel               : g_v = p_v - p_ref_v, sums of |g| and of the terms of KL; g / s to where z was
    sum [rows, H] fp32     += (g c / s) W_slab

The scale s of a row is the largest |g| of its first slab, and moves like the reference of `triton_slabs`: only
when a later one is STEP times as large. After the last slab

    unit [rows, H] = sum / (sum of |g| / s),    size [rows] = logit_scale * sum of |g|

so `unit` is of the order of W and may be rounded to 16 bits, however near policy and reference are. Five GEMMs a
token, three of them for the divergence itself; 8 bytes a logit of a slab, never a row of logits.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from bapo_kernels import triton_slabs
from bapo_kernels.torch_tiles import has_mixed_gemm
from bapo_kernels.triton_math import cap_logits, cap_slope, expm1, scale_row

# registers: two logits a lane
MAX_COLUMNS = 8192
STEP = tl.constexpr(1024.0)
# Above this log-ratio p_ref may have underflowed where p has not.
DIRECT = tl.constexpr(1.0)


@triton.jit(do_not_specialize=["need_grad"])
def kl_kernel(
    logits,  # [rows, BLOCK] fp32, of the policy
    grad,  # the same memory in the dtype of the states
    reference,  # [rows, BLOCK] fp32
    bias,
    lse,
    reference_lse,
    sums,  # [rows, H] fp32
    state,  # [3, stride_state] fp32: scale, sum of |g| / scale, KL
    V,
    H,
    first,
    stride_state,
    scale,
    softcap,
    need_grad,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < V - first
    b = 0.0
    if HAS_BIAS:
        b = tl.load(bias + first + lanes, mask=inside, other=0.0)
    z = tl.load(logits + row * BLOCK + lanes)
    r = tl.load(reference + row * BLOCK + lanes)
    z = cap_logits(z, b, scale, softcap, HAS_SOFTCAP)
    r = cap_logits(r, b, scale, softcap, HAS_SOFTCAP)
    log_p = z - tl.load(lse + row)
    log_ref = r - tl.load(reference_lse + row)
    d = log_p - log_ref
    p_ref = tl.exp(log_ref)
    g = tl.where(d > DIRECT, tl.exp(log_p) - p_ref, p_ref * expm1(d))
    g = tl.where(inside, g, 0.0)
    terms = tl.where(inside, g - p_ref * d, 0.0)

    state += row
    # before the reduction, whose barrier keeps these from the stores below: one thread stores for all
    size = tl.load(state, mask=first > 0, other=0.0)
    mass = tl.load(state + stride_state, mask=first > 0, other=0.0)
    kl = tl.load(state + 2 * stride_state, mask=first > 0, other=0.0)
    top = tl.max(tl.abs(g), 0)
    if top > size * STEP:
        shrink = size / top
        if (need_grad != 0) & (mass > 0):
            scale_row(sums + row * H, shrink, H, BLOCK_H)
        mass *= shrink
        size = top
    g /= tl.where(size == 0, 1.0, size)
    tl.store(state, size)
    tl.store(state + stride_state, mass + tl.sum(tl.abs(g), 0))
    tl.store(state + 2 * stride_state, kl + tl.sum(terms, 0))
    if need_grad != 0:
        if HAS_SOFTCAP:
            g *= cap_slope(z, softcap)
        narrow: tl.constexpr = grad.dtype.element_ty
        grad += row * (BLOCK * 32 // narrow.primitive_bitwidth)
        tl.store(grad + lanes, g.to(narrow))


@triton.jit
def close_kernel(
    sums,
    state,
    token_kl,
    unit,
    size,
    H,
    stride_state,
    scale,
    NEED_GRAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    state += row
    tl.store(token_kl + row, tl.load(state + 2 * stride_state))
    if NEED_GRAD:
        mass = tl.load(state + stride_state)
        tl.store(size + row, tl.load(state) * mass * scale)
        mass = tl.where(mass == 0, 1.0, mass)  # policy and reference are one
        for start in range(0, H, BLOCK_H):
            at = start + tl.arange(0, BLOCK_H)
            total = tl.load(sums + row * H + at, mask=at < H, other=0.0)
            tl.store(unit + row * H + at, (total / mass).to(unit.dtype.element_ty), mask=at < H)


def forward(
    hidden: Tensor,
    reference: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    need_unit: bool,
    chunk_bytes: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same arguments and result as `divergence.forward`; bf16, fp16 and fp32."""
    total, width = hidden.shape
    vocabulary = weight.shape[0]
    empty = hidden.new_empty
    token_kl = empty(total, dtype=torch.float32)
    unit = empty(total if need_unit else 0, width)
    size = empty(total if need_unit else 0, dtype=torch.float32)
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    any_label = torch.zeros(total, dtype=torch.int64, device=hidden.device)
    lse, reference_lse = (
        triton_slabs.forward(
            states, weight, bias, any_label, scale, softcap, False, False, chunk_bytes
        )[1]
        for states in (hidden, reference)
    )

    blocks, slabs = triton_slabs.slab_plan(
        total, vocabulary, width, need_unit, chunk_bytes, MAX_COLUMNS, buffers=2
    )
    if not blocks:
        return token_kl, unit, size
    rows, padded = blocks[0].stop, triton.next_power_of_2(slabs[0].stop)
    logits, fixed = (empty(rows, padded, dtype=torch.float32) for _ in range(2))
    grad = logits.view(hidden.dtype)
    sums = empty(rows if need_unit else 0, width, dtype=torch.float32)
    state = empty(3, rows, dtype=torch.float32)
    block_h = min(triton_slabs.BLOCK_H, triton.next_power_of_2(width))
    mixed, mm = has_mixed_gemm(weight), triton_slabs.mm
    pieces = [(slab.start, weight[slab]) for slab in slabs]
    with torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext():
        for block in blocks:
            h, h_ref = hidden[block], reference[block]
            n = h.shape[0]
            for first, w in pieces:
                columns = w.shape[0]
                mm(h, w.t(), logits[:n, :columns], mixed)
                mm(h_ref, w.t(), fixed[:n, :columns], mixed)
                kl_kernel[(n,)](
                    logits,
                    grad,
                    fixed,
                    logits if bias is None else bias,
                    lse[block],
                    reference_lse[block],
                    sums,
                    state,
                    vocabulary,
                    width,
                    first,
                    rows,
                    scale,
                    1.0 if softcap is None else softcap,
                    int(need_unit),
                    HAS_BIAS=bias is not None,
                    HAS_SOFTCAP=softcap is not None,
                    BLOCK=padded,
                    BLOCK_H=block_h,
                    num_warps=triton_slabs.num_warps(padded),
                )
                if need_unit:
                    mm(grad[:n, :columns], w, sums[:n], mixed, add=first > 0)
            close_kernel[(n,)](
                sums,
                state,
                token_kl[block],
                unit[block] if need_unit else unit,
                size[block] if need_unit else size,
                width,
                rows,
                scale,
                NEED_GRAD=need_unit,
                BLOCK_H=block_h,
            )
    return token_kl, unit, size
