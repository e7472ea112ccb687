"""Backward of a trainable head (full fine-tuning), in torch on every device.

    dW_v = sum_t g_t a c_tv (onehot(y_t)_v - p_tv) h_t,    g_t = d loss / d sum of t's sequence

g is known in backward only, so the logits are recomputed, a slice of the vocabulary at a time.
"""

import torch
from torch import Tensor

from bapo_kernels.reference import compute_dtype
from bapo_kernels.torch_tiles import (
    has_mixed_gemm,
    logits_tile,
    mm_wide,
    operand,
    set_label_column_,
    softcap_slope_,
    tile_buffer,
    tile_plan,
)


def head_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_logps: Tensor,
    logsumexp: Tensor,
    grad_tokens: Tensor,
    scale: float,
    softcap: float | None,
    need_weight: bool,
    need_bias: bool,
    tile_bytes: int = 0,
) -> tuple[Tensor, Tensor]:
    """(dW [V, H] or [0, H], db [V] or [0]) of a trainable head, logits recomputed tile by tile.

    A slice of dW is finished (summed over all tokens, in fp32) before the next one is begun, so
    no fp32 copy of dW exists beside the one in weight's dtype.
    """
    dtype = compute_dtype(hidden.dtype)
    d_weight = torch.empty_like(weight) if need_weight else weight.new_empty(0, weight.shape[1])
    d_bias = torch.empty_like(bias) if need_bias else weight.new_empty(0)
    bias = None if bias is None else bias.to(dtype)
    one_minus_p = -torch.expm1(token_logps)
    token_scale = grad_tokens.to(dtype) * scale
    # A 16-bit GEMM takes g in 16 bits: between 2**14 and the p of an unlikely token fp16 holds it.
    unit = 1.0
    if has_mixed_gemm(weight) and token_scale.numel():
        unit = token_scale.abs().amax().clamp_min(2**14 * torch.finfo(dtype).tiny) / 2**14
        token_scale = token_scale / unit

    rows, columns = tile_plan(hidden, weight, tile_bytes, 2 + (softcap is not None))
    buffer = tile_buffer(rows, columns, weight)
    for piece in columns:
        w = operand(weight[piece])
        w_sum = weight.new_zeros(w.shape, dtype=dtype)
        b_sum = weight.new_zeros(w.shape[0], dtype=dtype)
        for block in rows:
            h, y = operand(hidden[block]), labels[block]
            z = logits_tile(h, w, None if bias is None else bias[piece], scale, softcap, buffer)
            slope = None if softcap is None else softcap_slope_(z.clone(), softcap)
            g = z.sub_(logsumexp[block].unsqueeze(1)).exp_().neg_()
            set_label_column_(g, y - piece.start, one_minus_p[block])
            g = g if slope is None else g.mul_(slope)
            g *= token_scale[block].unsqueeze(1)
            if need_weight:
                w_sum += mm_wide(g.t(), h)
            b_sum += g.sum(0)
        if need_weight:
            d_weight[piece] = w_sum.mul_(unit)
        if need_bias:
            d_bias[piece] = b_sum.mul_(unit)
    return d_weight, d_bias
