"""What a CPU would do otherwise than a GPU, stood in for in a rehearsal: the same tensors kept, nothing computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F

from bapo_plugin.planning.tracker import BACKWARD, DEQUANTISED, KEPT, current
from bapo_plugin.scoring import shared_prefix

_FLASH_WIDTH = 256  # most that flash attention takes


class _Dequantised(torch.autograd.Function):
    """bitsandbytes' product: the weight in 16 bits exists for its length, in forward and in backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, bits):
        ctx.weight = weight
        if bits == 8:
            ctx.save_for_backward(x)
        with current().taking(DEQUANTISED):
            # LLM.int8 has the input in 8 bits and a result in 32
            _ = (
                (x.to(torch.int8), x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.int32))
                if bits == 8
                else torch.empty_like(weight)
            )
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        with current().taking(DEQUANTISED):
            weight = torch.empty_like(ctx.weight)
        return grad @ weight, None, None, None


class _Flash(torch.autograd.Function):
    """Attention that keeps its inputs, its output and a log-sum-exp a query."""

    @staticmethod
    def forward(ctx, q, k, v, longest):
        ctx.flops = 2 * q.numel() * longest  # two products, half of the keys on average
        current().found["flops"][KEPT] += ctx.flops
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *_ = ctx.saved_tensors
        current().found["flops"][BACKWARD] += ctx.flops * 5 // 2
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class Scored(torch.autograd.Function):
    """bapo_kernels: from states to the sum of their log-probs; keeps a gradient for each, [T, H]. Temporaries of forward
    and backward are in bytes; a head that trains has some in the latter."""

    @staticmethod
    def forward(ctx, states, temporaries, later, flops):
        ctx.save_for_backward(torch.empty_like(states))
        ctx.later, ctx.flops = later, flops
        with current().held(temporaries, flops):
            return states.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        with current().held(ctx.later, ctx.flops if ctx.later else 0):
            return torch.empty_like(ctx.saved_tensors[0]), None, None, None


class Selected(torch.autograd.Function):
    """TRL's fused log-softmax of a label: keeps the logits, and its backward makes as many."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.new_zeros(logits.shape[:-1], dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        return torch.empty(logits.shape, dtype=logits.dtype)


class LikeNF4(nn.Linear):
    bits = 4

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        return _Dequantised.apply(x.to(self.weight.dtype), self.weight, self.bias, self.bits).to(
            dtype
        )


class _LikeInt8(LikeNF4):
    bits = 8


def stand_in(bits: int):
    def make(linear: nn.Linear) -> nn.Linear:
        linear.__class__ = LikeNF4 if bits == 4 else _LikeInt8  # weights stay where they are
        return linear

    return make


def as_quantised(layer: LoraLinear) -> None:
    """Let a LoRA layer compute as PEFT's layers for bitsandbytes do."""
    name = next(iter(layer.lora_A))

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        result = layer.base_layer(x)
        if layer.disable_adapters:
            return result
        if isinstance(layer.base_layer, LikeNF4) and layer.base_layer.bits == 4:
            result = result.clone()
        dtype = result.dtype
        if not torch.is_autocast_enabled("cpu"):
            x = x.to(layer.lora_A[name].weight.dtype)
        return (result + layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]).to(dtype)

    layer.forward = forward


def in_fp32(norm: nn.LayerNorm) -> None:
    """As under CUDA's autocast, which a CPU's leaves in 16 bits."""

    def forward(x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
        return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)

    norm.forward = forward


@contextmanager
def flash_attention() -> Iterator[None]:
    """Let packed rows take attention of variable length where this torch has it, as on a GPU."""
    before = shared_prefix.VARLEN, shared_prefix._has_varlen

    def has_varlen(query: Tensor, value: Tensor, window: int | None) -> bool:
        return (
            (window is None or "window_size" in shared_prefix._VARLEN_OPTIONS)
            and query.shape[-1] == value.shape[-1] <= _FLASH_WIDTH
            and shared_prefix._cast_dtype(query) in (torch.bfloat16, torch.float16)
        )

    if before[0] is not None:
        shared_prefix.VARLEN = lambda q, k, v, _cu_q, _cu_k, _most_q, longest, **_: _Flash.apply(
            q, k, v, longest
        )
        shared_prefix._has_varlen = has_varlen
    try:
        yield
    finally:
        shared_prefix.VARLEN, shared_prefix._has_varlen = before
