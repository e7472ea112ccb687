"""The output head of a model: what follows it, and how it is replaced for the moment of a call."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# values for the probe that bf16 and fp16 represent exactly
_PROBE = (-40.0, -7.5, -1.0, -0.125, 0.0, 0.5, 3.0, 20.0, 64.0)


class Head(NamedTuple):
    """How logits come from hidden states: softcap · tanh(scale · (h W^T + b) / softcap)."""

    scale: float
    softcap: float | None


def inspect_head(model: nn.Module, head: Any, kwargs: dict) -> Head | str:
    """Find out what the model does after its head; a string says why the plain path is needed."""
    if not is_plain_linear(head):
        return f"its output head is a {type(head).__name__}, not a plain linear layer"
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    spec = Head(scale, float(softcap) if softcap else None)

    def probe(hidden: Tensor) -> Tensor:
        return torch.tensor(_PROBE, device=hidden.device, dtype=hidden.dtype).view(1, 1, -1)

    # two tokens are enough to pass through every layer
    short = {
        k: v[:1, :2] if isinstance(v, Tensor) and v.dim() > 1 else v
        for k, v in kwargs.items()
        if k != "bapo_layout"
    }
    with torch.no_grad(), replaced(head, probe):
        seen = model(**short).logits
    expected = torch.tensor(_PROBE, dtype=torch.float64) * spec.scale
    if spec.softcap:
        expected = spec.softcap * torch.tanh(expected / spec.softcap)
    if torch.allclose(seen.cpu().double().view(-1), expected, rtol=0.02, atol=1e-3):
        return spec
    return f"{type(model).__name__} transforms its logits in a way that its config doesn't name"


def is_plain_linear(head: Any) -> bool:
    return (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and "forward" not in vars(head)  # hooks of accelerate that move weights in and out
        and head.weight.is_floating_point()
        and head.weight.device.type != "meta"
    )


@contextmanager
def replaced(head: nn.Module, forward: Callable[[Tensor], Tensor]):
    """Let `head(...)` run `forward`; hooks of the module still run."""
    missing = object()
    before = vars(head).get("forward", missing)
    head.forward = forward
    try:
        yield
    finally:
        if before is missing:
            del head.forward
        else:
            head.forward = before
