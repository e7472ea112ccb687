"""The autograd function, as a torch custom op so that `torch.compile` traces through a caller.

Forward forms token log-probs and, where hidden states need a gradient, size_t * unit_t = d logp_t / d h_t.
A sequence enters the loss through its sum only, so backward is

    d loss / d h_t = unit_t * (size_t * d loss / d sum_s),    s = the sequence of token t

and costs T * H: no second projection, no atomics, the same bits on every run. A trainable head
is the exception: dW = sum_t g_t (onehot - p_t) h_t^T needs g before it can be summed, so its
backward recomputes the logits, tile by tile.

Values (labels, cu_seqlens) are checked here rather than in api.py because only here are they
real tensors while a caller is being compiled.
"""

import itertools
import os

import torch
from torch import Tensor

from bapo_kernels import torch_tiles
from bapo_kernels.head_gradient import head_gradient
from bapo_kernels.reference import compute_dtype, segment_ids

# Outputs of the op, in order. `logsumexp`, `unit` and `size` never leave this package.
_SUM, _LOGPS, _LOGSUMEXP, _ENTROPY, _UNIT, _SIZE = range(6)


def triton_missing(hidden: Tensor) -> str | None:
    """Why the Triton path can't run on this tensor; None where it can."""
    if hidden.dtype == torch.float64:
        return "fp64 hidden states are computed in torch (supported: bf16, fp16, fp32)"
    if hidden.is_cuda and torch.version.cuda is None:
        return "the Triton path is for NVIDIA builds of torch, others take the torch path"
    if not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"hidden_states are on {hidden.device}, Triton kernels run on CUDA devices"
    if hidden.is_cuda and (have := torch.cuda.get_device_capability(hidden.device)) < (8, 0):
        return f"the GPU has compute capability {have[0]}.{have[1]}, Triton kernels need 8.0"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton can't be imported ({error})"
    return None


def takes_triton(backend: str, hidden: Tensor) -> bool:
    return backend == "triton" or (backend == "auto" and triton_missing(hidden) is None)


@torch.library.custom_op("bapo_kernels::sequence_logprobs", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    softcap: float | None,
    backend: str,
    need_unit: bool,
    need_entropy: bool,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_values(labels, cu_seqlens, hidden.shape[0], weight.shape[0])
    cu_seqlens = cu_seqlens.to(hidden.device, non_blocking=True)
    # CUDA values aren't checked on the host, which would wait for the device: a wrong label or
    # offset gives NaN, which no loss can miss, instead of a plausible number.
    # Inside autocast torch would silently round our fp32 GEMMs to 16 bits.
    with torch.autocast(hidden.device.type, enabled=False):
        options = (scale, softcap, need_unit, need_entropy, chunk_bytes)
        if takes_triton(backend, hidden):
            from bapo_kernels import triton_slabs

            logps, *rest = triton_slabs.forward(hidden, weight, bias, labels, *options)
            return triton_slabs.sum_by_sequence(logps, cu_seqlens), logps, *rest
        labels = labels.to(torch.int64)
        inside = labels.clamp(0, weight.shape[0] - 1)
        logps, *rest = torch_tiles.forward(hidden, weight, bias, inside, *options)
    logps.masked_fill_(labels != inside, torch.nan)
    return _sum_by_sequence(logps, cu_seqlens.to(torch.int64)), logps, *rest


@_op.register_fake
def _(
    hidden, weight, bias, labels, cu_seqlens, scale, softcap, backend, need_unit, need_entropy, _
):
    total, width = hidden.shape
    dtype = compute_dtype(hidden.dtype)
    return (
        hidden.new_empty(cu_seqlens.shape[0] - 1, dtype=dtype),
        hidden.new_empty(total, dtype=dtype),
        hidden.new_empty(total, dtype=dtype),
        hidden.new_empty(total if need_entropy else 0, dtype=dtype),
        hidden.new_empty((total if need_unit else 0, width)),
        hidden.new_empty(total if need_unit else 0, dtype=dtype),
    )


@torch.library.custom_op("bapo_kernels::head_gradient", mutates_args=())
def _head_gradient_op(
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
    chunk_bytes: int,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        return head_gradient(
            hidden,
            weight,
            bias,
            labels.to(torch.int64),
            token_logps,
            logsumexp,
            grad_tokens,
            scale,
            softcap,
            need_weight,
            need_bias,
            chunk_bytes,
        )


@_head_gradient_op.register_fake
def _(hidden, weight, bias, labels, logps, lse, grad, scale, softcap, need_weight, need_bias, _):
    return (
        torch.empty_like(weight) if need_weight else weight.new_empty((0, weight.shape[1])),
        torch.empty_like(bias) if need_bias else weight.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, labels, cu_seqlens, scale, softcap, *_, chunk_bytes = inputs
    ctx.set_materialize_grads(False)
    ctx.options = (scale, softcap, chunk_bytes)
    ctx.trainable_head = any(ctx.needs_input_grad[1:3])
    head = (hidden, weight, bias, labels, output[_LOGPS], output[_LOGSUMEXP])
    kept = (output[_UNIT], output[_SIZE], cu_seqlens)
    ctx.save_for_backward(*kept, *(head if ctx.trainable_head else ()))


def _backward(ctx, grad_sum, *_):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "sequence_logprobs can't be differentiated twice (create_graph=True): the forward "
            "pass keeps first derivatives only. bapo_kernels.reference can."
        )
    none = (None,) * 8
    if grad_sum is None:
        return None, None, None, *none
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    unit, size, cu_seqlens, *head = ctx.saved_tensors
    tokens = head[0].shape[0] if head else unit.shape[0]
    sequence = segment_ids(cu_seqlens.to(grad_sum.device, non_blocking=True), tokens)
    # A wrong cu_seqlens on CUDA has made every sum NaN; here it only must not read out of bounds.
    grad_tokens = grad_sum[sequence.clamp_max(grad_sum.shape[0] - 1)]

    d_hidden = d_weight = d_bias = None
    if need_hidden:
        # the factors meet before unit is touched; the fp32 product is rounded once, on CUDA as it is stored
        factor = (size * grad_tokens).unsqueeze(1)
        d_hidden = torch.mul(unit, factor, out=torch.empty_like(unit))
    if ctx.trainable_head:
        scale, softcap, chunk_bytes = ctx.options
        d_weight, d_bias = _head_gradient_op(
            *head, grad_tokens, scale, softcap, need_weight, need_bias, chunk_bytes
        )
    return d_hidden, d_weight if need_weight else None, d_bias if need_bias else None, *none


_op.register_autograd(_backward, setup_context=_setup_context)


def _check_values(labels: Tensor, cu_seqlens: Tensor, tokens: int, vocabulary: int) -> None:
    """Errors that name the position, for every tensor whose values the host can see for free."""
    _check_offsets(cu_seqlens, tokens)
    if labels.device.type == "cpu":
        labels = labels.to(torch.int64)
        bad = ((labels < 0) | (labels >= vocabulary)).nonzero()
        if bad.numel():
            position = bad[0].item()
            raise ValueError(
                f"labels[{position}] = {labels[position].item()} is outside the vocabulary "
                f"[0, {vocabulary}) ({bad.shape[0]} such labels). Prompt and padding positions "
                f"(-100) must be dropped before the call: T counts response tokens only."
            )


def _check_offsets(cu_seqlens: Tensor, tokens: int) -> None:
    if cu_seqlens.device.type == "cpu":
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != tokens:
            raise ValueError(
                f"cu_seqlens must run from 0 to the number of tokens, {tokens}; "
                f"it runs from {ends[0]} to {ends[-1]}"
            )
        for i, (start, stop) in enumerate(itertools.pairwise(ends)):
            if stop < start:
                raise ValueError(
                    f"cu_seqlens must not decrease: cu_seqlens[{i}] = {start}, "
                    f"cu_seqlens[{i + 1}] = {stop}"
                )


def _sum_by_sequence(token_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[S] sums, accumulated in fp64; NaN where cu_seqlens is no partition of T."""
    tokens = token_logps.shape[0]
    ends = cu_seqlens.clamp(0, tokens)
    valid = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (cu_seqlens.diff() >= 0).all()
    if tokens == 0:
        return torch.where(valid, token_logps.new_zeros(ends.shape[0] - 1), torch.nan)
    ends = torch.where(valid, ends, torch.zeros_like(ends))
    sums = torch.segment_reduce(token_logps.double(), "sum", offsets=ends, initial=0.0, unsafe=True)
    return torch.where(valid, sums, torch.nan).to(token_logps.dtype)
