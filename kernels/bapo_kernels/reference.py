"""The definition. Every other path of this package is tested against this file.

    z_tv  = cap( logit_scale * (h_t . W_v + b_v) )        cap(z) = softcap * tanh(z / softcap)
    logp_t = z_{t, y_t} - log sum_v exp(z_tv)              nats
    sum_s  = sum of logp_t over the tokens of sequence s

It keeps [T, V] logits, in fp32 (fp64 for fp64 inputs), and is differentiable by autograd.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class SequenceLogps(NamedTuple):
    """What :func:`bapo_kernels.sequence_logprobs` returns, in nats.

    Attributes:
        sum: [S] fp32 (fp64 for fp64 inputs), log-probability of each sequence. The only
            differentiable field: a loss is a function of these sums.
        num_tokens: [S] int32, tokens of each sequence.
        token_logps: [T] like ``sum``, log-probability of each token; detached.
        entropy: [T] like ``sum``, entropy of each token's distribution; detached; None unless
            it was asked for.
    """

    sum: Tensor
    num_tokens: Tensor
    token_logps: Tensor
    entropy: Tensor | None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64 (gradcheck and parity tests need it); everything else is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def segment_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[T] int64, the sequence that each token belongs to. Right for empty sequences too."""
    positions = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)


def sequence_logprobs_reference(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
) -> SequenceLogps:
    """Same arguments and result as :func:`bapo_kernels.sequence_logprobs`, in plain torch."""
    dtype = compute_dtype(hidden_states.dtype)
    with torch.autocast(hidden_states.device.type, enabled=False):
        logits = F.linear(
            hidden_states.to(dtype),
            lm_head_weight.to(dtype),
            None if bias is None else bias.to(dtype),
        )
        logits = logits * logit_scale
        if logit_softcap is not None:
            logits = logit_softcap * torch.tanh(logits / logit_softcap)
        all_logps = torch.log_softmax(logits, dim=-1)
        token_logps = all_logps.gather(1, labels.long().unsqueeze(1)).squeeze(1)

    cu_seqlens = cu_seqlens.to(hidden_states.device)
    lengths = cu_seqlens.diff()
    sums = token_logps.new_zeros(lengths.numel()).index_add(
        0, segment_ids(cu_seqlens, labels.numel()), token_logps
    )
    entropy = None
    if return_entropy:
        entropy = -(all_logps.exp() * all_logps).sum(-1).detach()
    return SequenceLogps(sums, lengths.to(torch.int32), token_logps.detach(), entropy)


class SequenceKL(NamedTuple):
    """What :func:`bapo_kernels.sequence_kl` returns, in nats.

    Attributes:
        sum: [S] fp32 (fp64 for fp64 inputs), KL of each sequence, summed over its tokens. The only
            differentiable field.
        token_kl: [T] like ``sum``, KL of each token's distribution; detached.
    """

    sum: Tensor
    token_kl: Tensor


def sequence_kl_reference(
    hidden_states: Tensor,
    reference_hidden_states: Tensor,
    lm_head_weight: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> SequenceKL:
    """Same arguments and result as :func:`bapo_kernels.sequence_kl`, in plain torch."""
    dtype = compute_dtype(hidden_states.dtype)

    def log_probs(states: Tensor) -> Tensor:
        logits = F.linear(
            states.to(dtype), lm_head_weight.to(dtype), None if bias is None else bias.to(dtype)
        )
        logits = logits * logit_scale
        if logit_softcap is not None:
            logits = logit_softcap * torch.tanh(logits / logit_softcap)
        return torch.log_softmax(logits, dim=-1)

    with torch.autocast(hidden_states.device.type, enabled=False):
        policy, fixed = log_probs(hidden_states), log_probs(reference_hidden_states.detach())
        token_kl = (fixed.exp() * (fixed - policy)).sum(-1)
    cu_seqlens = cu_seqlens.to(hidden_states.device)
    sums = token_kl.new_zeros(cu_seqlens.numel() - 1).index_add(
        0, segment_ids(cu_seqlens, token_kl.numel()), token_kl
    )
    return SequenceKL(sums, token_kl.detach())
