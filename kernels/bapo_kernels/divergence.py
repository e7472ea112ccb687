"""KL of sequences to a reference under the same frozen head, without the [T, V] logits.

With z, r the logits of policy and reference, and L, M their log-sum-exps over the vocabulary,

    d_v  = (z_v - L) - (r_v - M)                  log of the ratio of the two probabilities
    g_v  = p_ref_v * expm1(d_v)                   = p_v - p_ref_v
    KL_t = sum_v ( g_v - p_ref_v * d_v )          each term >= 0, since sum_v g_v = 0
    d KL_t / d h_t = logit_scale * sum_v g_v c_v W_v,      c_v = 1 - (z_v / softcap)^2

Nothing near 1 is subtracted from anything near 1: where the policy has hardly moved, KL and its
gradient keep their digits. The torch path is here: row blocks hold the logits of both; three GEMMs a token.
"""

from typing import Any

import torch
from torch import Tensor

from bapo_kernels.chunked import _sum_by_sequence, takes_triton
from bapo_kernels.reference import compute_dtype, segment_ids
from bapo_kernels.torch_tiles import (
    _MAX_COLUMNS,
    even_blocks,
    logits_tile,
    mm_wide,
    operand,
    softcap_slope_,
)

# Bytes of the two models' logits of a block of rows.
_DEFAULT_BYTES = {"cpu": 256 << 20}
_DEFAULT_BYTES_ACCELERATOR = 1 << 30
_MAX_ROWS = 2048
# Above this ratio p_ref may have underflowed where p has not.
_DIRECT = 1.0


class SequenceDivergence(torch.autograd.Function):
    """(hidden [T, H], reference [T, H], weight, bias, cu_seqlens, ...) -> (sums [S], token_kl [T])."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        reference: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cu_seqlens: Tensor,
        scale: float,
        softcap: float | None,
        chunk_bytes: int,
        backend: str,
        need_unit: bool,
    ) -> tuple[Tensor, Tensor]:
        compute, add_up = forward, _sum_by_sequence
        if takes_triton(backend, hidden):
            from bapo_kernels import triton_divergence, triton_slabs

            compute, add_up = triton_divergence.forward, triton_slabs.sum_by_sequence
        with torch.autocast(hidden.device.type, enabled=False):
            token_kl, unit, size = compute(
                hidden, reference, weight, bias, scale, softcap, need_unit, chunk_bytes
            )
        cu_seqlens = cu_seqlens.to(hidden.device, torch.int64, non_blocking=True)
        ctx.save_for_backward(unit, size, cu_seqlens)
        ctx.mark_non_differentiable(token_kl)
        ctx.set_materialize_grads(False)
        return add_up(token_kl, cu_seqlens), token_kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_sum: Tensor | None, _: Any) -> tuple:
        unit, size, cu_seqlens = ctx.saved_tensors
        if grad_sum is None:
            return (None,) * 10
        sequence = segment_ids(cu_seqlens, unit.shape[0]).clamp_max(grad_sum.shape[0] - 1)
        # the factor meets the loss's own before it is rounded: in fp16 it may be far below 6e-8
        factor = (size * grad_sum[sequence]).unsqueeze(1)
        return torch.mul(unit, factor, out=torch.empty_like(unit)), *(None,) * 9


def forward(
    hidden: Tensor,
    reference: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    need_unit: bool,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token_kl [T], unit [T, H] in hidden's dtype, size [T]); the gradient is unit * size."""
    dtype = compute_dtype(hidden.dtype)
    total = hidden.shape[0]
    token_kl = hidden.new_empty(total, dtype=dtype)
    unit = hidden.new_empty(total if need_unit else 0, hidden.shape[1])
    size = hidden.new_ones(total if need_unit else 0, dtype=dtype)
    bias = None if bias is None else bias.to(dtype)
    bytes_a_row = 2 * weight.shape[0] * dtype.itemsize
    device = hidden.device.type
    most = chunk_bytes or _DEFAULT_BYTES.get(device, _DEFAULT_BYTES_ACCELERATOR)
    columns = even_blocks(weight.shape[0], _MAX_COLUMNS)
    for block in even_blocks(total, max(1, min(_MAX_ROWS, most // bytes_a_row))):
        h, h_ref = operand(hidden[block]), operand(reference[block])
        policy, fixed = [], []  # tiles of logits, one for each slice of the vocabulary
        for piece in columns:
            w, b = operand(weight[piece]), None if bias is None else bias[piece]
            policy.append(logits_tile(h, w, b, scale, softcap, None))
            fixed.append(logits_tile(h_ref, w, b, scale, softcap, None))
        total_policy, total_fixed = _logsumexp(policy), _logsumexp(fixed)
        kl = torch.zeros_like(token_kl[block])
        largest = torch.zeros_like(kl)
        for z, r in zip(policy, fixed, strict=True):
            slope = softcap_slope_(z.clone(), softcap) if softcap is not None else None
            log_p, log_ref = z.sub_(total_policy), r.sub_(total_fixed)
            d = log_p - log_ref
            p_ref = log_ref.exp_()
            g = torch.where(d > _DIRECT, log_p.exp() - p_ref, p_ref * d.clamp_max(_DIRECT).expm1())
            kl += (g - p_ref * d).sum(1)
            z.copy_(g if slope is None else g.mul_(slope))
            if need_unit:
                largest = torch.maximum(largest, z.abs().amax(1))
        del fixed
        token_kl[block] = kl
        if need_unit:
            largest = torch.where(largest == 0, torch.ones_like(largest), largest)
            gradient = torch.zeros(h.shape, dtype=dtype, device=hidden.device)
            for g, piece in zip(policy, columns, strict=True):
                gradient += mm_wide(g.div_(largest.unsqueeze(1)), operand(weight[piece]))
            unit[block] = gradient
            size[block] = largest * scale
    return token_kl, unit, size


def _logsumexp(tiles: list[Tensor]) -> Tensor:
    """[rows, 1], over all tiles."""
    parts = torch.stack([tile.logsumexp(1) for tile in tiles])
    return parts.logsumexp(0).unsqueeze(1)
