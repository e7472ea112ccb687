"""The public function: what it promises, and every refusal, before any arithmetic."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bapo_kernels import chunked
from bapo_kernels.divergence import SequenceDivergence
from bapo_kernels.reference import SequenceKL, SequenceLogps

BACKENDS = ("auto", "triton", "torch")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def sequence_logprobs(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    backend: str = "auto",
    return_entropy: bool = False,
    chunk_bytes: int | None = None,
) -> SequenceLogps:
    """Log-probability of each sequence under softmax(cap(logit_scale * (h W^T + b))).

    No [T, V] tensor is ever made. Logits are accumulated and kept in fp32 whatever the inputs'
    dtype, inside autocast too. The definition is ``bapo_kernels.reference``.

    Args:
        hidden_states: [T, H] bf16, fp16, fp32 or fp64; row t is the state that predicts
            ``labels[t]``. T counts response tokens only.
        lm_head_weight: [V, H], same dtype and device (inside autocast hidden_states are cast to
            its dtype). May need a gradient; then backward recomputes the logits.
        labels: [T] any integer type, in [0, V).
        cu_seqlens: [S + 1] any integer type, on hidden_states' device or on the CPU, from 0 to T,
            non-decreasing: sequence s is ``[cu_seqlens[s], cu_seqlens[s + 1])``, perhaps empty.
        bias: [V], any floating dtype.
        logit_scale: factor on the logits, before the soft cap (Cohere, Granite).
        logit_softcap: c in ``c * tanh(z / c)`` (Gemma); None for none.
        backend: "auto" takes Triton on CUDA where it can be imported, else torch; "triton" and
            "torch" force one.
        return_entropy: also compute each token's entropy (nats).
        chunk_bytes: temporary memory, bytes; None takes the device's default. Peak extra memory
            is about this much plus three [T, H] tensors, whatever V is.

    Returns:
        SequenceLogps. Only ``sum`` carries a gradient; ``token_logps`` and ``entropy`` are
        detached. First derivatives only.

    Raises:
        ValueError: shapes, dtypes, devices or values that don't fit; the message names both sides.
            Values of CUDA tensors aren't read by the host, which would wait for the device: there
            a label outside [0, V) gives NaN, and so does a cu_seqlens that is no partition of T.
        TypeError: a head in 8- or 4-bit or otherwise wrapped storage.
    """
    _check_head(lm_head_weight)
    _check_devices(hidden_states, lm_head_weight, cu_seqlens, bias, labels)
    device = hidden_states.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        hidden_states = hidden_states.to(lm_head_weight.dtype)
    _check_shapes(hidden_states, lm_head_weight, cu_seqlens, bias, labels)
    _check_options(hidden_states, logit_scale, logit_softcap, backend, chunk_bytes)

    need_unit = hidden_states.requires_grad and torch.is_grad_enabled()
    sums, token_logps, _, entropy, *_ = chunked._op(
        hidden_states,
        lm_head_weight,
        bias,
        labels,
        cu_seqlens,
        float(logit_scale),
        None if logit_softcap is None else float(logit_softcap),
        backend,
        need_unit,
        return_entropy,
        chunk_bytes or 0,
    )
    return SequenceLogps(
        sum=sums,
        num_tokens=cu_seqlens.diff().to(hidden_states.device, torch.int32, non_blocking=True),
        token_logps=token_logps.detach(),
        entropy=entropy.detach() if return_entropy else None,
    )


def sequence_kl(
    hidden_states: Tensor,
    reference_hidden_states: Tensor,
    lm_head_weight: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
) -> SequenceKL:
    """KL(softmax(cap(r)) || softmax(cap(z))) of each sequence, z and r the logits of both states.

    Both distributions come from the same frozen head, so the reference's hidden states stand for
    its distribution. No [T, V] tensor is ever made; logits are fp32 whatever the inputs' dtype. The
    definition is ``bapo_kernels.reference``.

    Args:
        hidden_states: [T, H] bf16, fp16, fp32 or fp64 of the policy.
        reference_hidden_states: [T, H] of the reference, same dtype and device; no gradient.
        lm_head_weight: [V, H], same dtype and device, frozen (inside autocast states are cast to its
            dtype).
        cu_seqlens: [S + 1], as in :func:`sequence_logprobs`.
        bias, logit_scale, logit_softcap, backend: as in :func:`sequence_logprobs`.
        chunk_bytes: temporary memory, bytes; None takes the default (100 MiB with Triton; in torch 256 MiB
            on a CPU, else 1 GiB, and at least one token's logits of both models).

    Returns:
        SequenceKL, nats. Only ``sum`` carries a gradient, for hidden_states. First derivatives only.

    Raises:
        ValueError: a head that trains; shapes, dtypes, devices or values that don't fit.
        TypeError: a head in 8- or 4-bit or otherwise wrapped storage.
    """
    _check_head(lm_head_weight)
    if torch.is_grad_enabled() and (
        lm_head_weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        raise ValueError(
            "lm_head_weight or bias needs a gradient: the reference's distribution is taken through the same "
            "head, which must not change; freeze it"
        )
    device = hidden_states.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        hidden_states = hidden_states.to(lm_head_weight.dtype)
        reference_hidden_states = reference_hidden_states.to(lm_head_weight.dtype)
    if reference_hidden_states.shape != hidden_states.shape:
        raise ValueError(
            f"reference_hidden_states must be as hidden_states, {tuple(hidden_states.shape)}; got "
            f"{tuple(reference_hidden_states.shape)}"
        )
    if reference_hidden_states.dtype != hidden_states.dtype:
        raise ValueError(
            f"hidden_states are {hidden_states.dtype}, reference_hidden_states "
            f"{reference_hidden_states.dtype}: cast one"
        )
    if reference_hidden_states.device != hidden_states.device:
        raise ValueError(
            f"hidden_states are on {hidden_states.device}, reference_hidden_states on "
            f"{reference_hidden_states.device}"
        )
    _check_devices(hidden_states, lm_head_weight, cu_seqlens, bias)
    _check_shapes(hidden_states, lm_head_weight, cu_seqlens, bias)
    _check_options(hidden_states, logit_scale, logit_softcap, backend, chunk_bytes)
    chunked._check_offsets(cu_seqlens, hidden_states.shape[0])
    sums, token_kl = SequenceDivergence.apply(
        hidden_states,
        reference_hidden_states.detach(),
        lm_head_weight,
        bias,
        cu_seqlens,
        float(logit_scale),
        None if logit_softcap is None else float(logit_softcap),
        chunk_bytes or 0,
        backend,
        hidden_states.requires_grad and torch.is_grad_enabled(),
    )
    return SequenceKL(sums, token_kl)


def _check_head(weight: Tensor) -> None:
    """Refuse storage whose numbers aren't the numbers of a [V, H] matrix."""
    supported = (
        "supported heads are plain bf16, fp16, fp32 or fp64 tensors: keep lm_head out of "
        "quantisation (it usually is), or pass its dequantised weight"
    )
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):
        raise TypeError(
            f"lm_head_weight is a {type(weight).__name__} in {weight.dtype} storage; {supported}"
        )
    if is_traceable_wrapper_subclass(weight):
        raise TypeError(
            f"lm_head_weight is a {type(weight).__name__}; {supported}. Gather a sharded weight "
            f"(DTensor.full_tensor(), ZeRO-3's GatheredParameters) first."
        )
    if weight.dtype not in _FLOATS:
        raise TypeError(f"lm_head_weight is {weight.dtype}; {supported}")


def _check_devices(
    hidden: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    labels: Tensor | None = None,
) -> None:
    same_device = {"lm_head_weight": weight, "labels": labels, "bias": bias}
    if cu_seqlens.device.type != "cpu":
        same_device["cu_seqlens"] = cu_seqlens
    for name, tensor in same_device.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"hidden_states are on {hidden.device}, {name} on {tensor.device}")


def _check_shapes(
    hidden: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    labels: Tensor | None = None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"hidden_states must be [T, H] and lm_head_weight [V, H]; got {tuple(hidden.shape)} "
            f"and {tuple(weight.shape)} (a sharded, ungathered weight has no rows)"
        )
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden_states are {hidden.shape[1]} wide, lm_head_weight {weight.shape[1]}: "
            f"got [T, H] = {tuple(hidden.shape)} and [V, H] = {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"lm_head_weight has no rows: {tuple(weight.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden_states are {hidden.dtype}, lm_head_weight {weight.dtype}: cast one "
            f"(hidden_states.to(lm_head_weight.dtype))"
        )
    if labels is not None and (labels.dim() != 1 or labels.shape[0] != hidden.shape[0]):
        raise ValueError(
            f"labels must be [T] with T = {hidden.shape[0]} rows of hidden_states; "
            f"got {tuple(labels.shape)}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must be [S + 1], at least [0]; got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.shape[0] == 1 and hidden.shape[0] > 0:
        raise ValueError(f"cu_seqlens has no sequence, hidden_states have {hidden.shape[0]} tokens")
    for name, tensor in (("labels", labels), ("cu_seqlens", cu_seqlens)):
        if tensor is None:
            continue
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f"{name} must be integers; got {tensor.dtype}")
    if bias is not None:
        if bias.shape != (weight.shape[0],):
            raise ValueError(
                f"bias must be [V] with V = {weight.shape[0]} rows of lm_head_weight; "
                f"got {tuple(bias.shape)}"
            )
        if not bias.is_floating_point():
            raise ValueError(f"bias must be floating point; got {bias.dtype}")


def _check_options(
    hidden: Tensor, scale: float, softcap: float | None, backend: str, chunk_bytes: int | None
) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "triton" and (why := chunked.triton_missing(hidden)):
        raise ValueError(f'backend="triton": {why}; use "auto" or "torch"')
    if softcap is not None and not softcap > 0:
        raise ValueError(f"logit_softcap must be positive or None; got {softcap}")
    if not abs(scale) < float("inf"):
        raise ValueError(f"logit_scale must be finite; got {scale}")
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes must be positive or None; got {chunk_bytes}")
