"""Three responses on one prompt: the prompt is computed once and its responses share it.

A micro-batch is one row of tokens without padding: [prompt chosen rejected base] of each example, one
after another. The positions of each response go on from its prompt. In every layer all tokens pass
through projections and MLP together; attention runs over *segments*: prompt + chosen, which is plain
causal attention, then rejected and base, whose queries see the keys of [prompt, own response]. In such
gathered keys an index is a position, so sliding windows need nothing special, and autograd adds up what
the responses send back to the prompt. The numbers are those of three separate rows.

That holds only for models whose tokens meet nowhere but in attention; `scoring/layouts.py` decides where.
"""

import inspect
import sys
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# implementations of attention that understand packed rows, under their own names, by which transformers looks up
# masks, kernels and what a name with "flash" in it means
_UNDERSTOOD: set[str] = set()
# models whose layers all go through such an implementation
_INSTALLED: WeakSet[nn.Module] = WeakSet()
_PACKED = ContextVar("bapo_packed", default=False)


class AskedMask(NamedTuple):
    """What stands in the place of a packed row's mask: the window that the model asked the mask for."""

    window: int | None


class Segment(NamedTuple):
    """Queries are the tokens [start, end) of the row; keys are those of its prompt
    [prompt_start, prompt_end), then its own. A segment that holds its prompt itself has an empty one."""

    start: int
    end: int
    prompt_start: int
    prompt_end: int


class Layout:
    """Where prompts and responses stand in a packed row. Made by the collator, handed through the model's
    call to every attention layer. No dataclass: FSDP 2 with mixed precision copies those at each layer, and calls and
    cache would be lost.

    Args:
        segments: in the order of the row; together they cover it.
        dense: compute with one [T, T] mask instead, the plain reference for tests.
    """

    def __init__(self, segments: tuple[Segment, ...], dense: bool = False):
        self.segments = segments
        self.dense = dense
        self.calls = 0  # of the attention, for the self-check
        self._cache: dict = {}

    @property
    def num_tokens(self) -> int:
        return self.segments[-1].end

    def to(self, device: Any, **kwargs: Any) -> "Layout":
        """Itself: masks and indices are made on the device where they are needed."""
        return self

    def mask(self, segment: Segment, window: int | None, device: torch.device) -> Tensor:
        """[queries, keys], true where a query sees a key."""
        prompt = segment.prompt_end - segment.prompt_start
        length = segment.end - segment.start
        key = (prompt, length, window, device)
        if key not in self._cache:
            seen = torch.ones(length, prompt + length, dtype=torch.bool, device=device)
            seen = seen.tril(prompt)
            if window is not None:
                seen &= seen.new_ones(seen.shape).triu(prompt - window + 1)
            self._cache[key] = seen
        return self._cache[key]

    def dense_mask(self, window: int | None, device: torch.device) -> Tensor:
        """[T, T], true where a query sees a key."""
        seen = torch.zeros(self.num_tokens, self.num_tokens, dtype=torch.bool, device=device)
        for segment in self.segments:
            part = self.mask(segment, window, device)
            start, end, prompt_start, prompt_end = segment
            prompt = prompt_end - prompt_start
            seen[start:end, prompt_start:prompt_end] = part[:, :prompt]
            seen[start:end, start:end] = part[:, prompt:]
        return seen

    def gathered(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """For variable-length attention: index of keys [K] int64; cu_seqlens of queries and of keys,
        [segments + 1] int32; the longest of both."""
        key = ("gathered", device)
        if key not in self._cache:
            index, cu_q, cu_k = [], [0], [0]
            for start, end, prompt_start, prompt_end in self.segments:
                index += [torch.arange(prompt_start, prompt_end), torch.arange(start, end)]
                cu_q.append(end)
                cu_k.append(cu_k[-1] + end - start + prompt_end - prompt_start)
            cu_q, cu_k = (
                torch.tensor(cu_q, dtype=torch.int32),
                torch.tensor(cu_k, dtype=torch.int32),
            )
            most = int(cu_q.diff().max()), int(cu_k.diff().max())
            self._cache[key] = (
                torch.cat(index).to(device),
                cu_q.to(device),
                cu_k.to(device),
                *most,
            )
        return self._cache[key]


# ---------------------------------------------------------------- attention


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    bapo_layout: Layout,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row, in the form that transformers calls.

    Args:
        query [1, heads, T, D], key, value [1, kv_heads, T, D]: with positions applied.
        attention_mask: an `AskedMask`, or None.
        sliding_window: how many keys, itself included, a query sees at most.
        softcap: scores become softcap · tanh(score / softcap).
        s_aux: [heads], a logit that takes part in the softmax without a value (attention sink).
        bapo_layout: of the row.

    Returns:
        [1, T, heads, D], and None in the place of attention weights.

    Raises:
        RuntimeError: the layer wants something that isn't known here.
    """
    unknown = [k for k, v in kwargs.items() if k in _CHANGES_SCORES and v is not None]
    if unknown or not getattr(module, "is_causal", True):
        raise RuntimeError(
            f"{type(module).__name__} asks for {', '.join(unknown) or 'non-causal attention'}"
        )
    if isinstance(attention_mask, AskedMask):
        if sliding_window not in (None, attention_mask.window):
            raise RuntimeError(
                f"{type(module).__name__} has a window of {sliding_window}, its mask one of {attention_mask.window}"
            )
        sliding_window = attention_mask.window
    elif attention_mask is not None:
        raise RuntimeError(f"{type(module).__name__} brings a mask of its own")
    layout = bapo_layout
    layout.calls += 1
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    special = {"softcap": softcap, "sinks": s_aux}
    if layout.dense:
        mask = layout.dense_mask(sliding_window, query.device)
        out = _plain(query, key, value, mask, scaling, dropout, **special)
    elif (
        softcap is None
        and s_aux is None
        and dropout == 0
        and _has_varlen(query, value, sliding_window)
    ):
        out = _varlen(query, key, value, layout, scaling, sliding_window)
    else:
        parts = []
        for segment in layout.segments:
            parts.append(
                _segment(
                    query, key, value, layout, segment, scaling, dropout, sliding_window, special
                )
            )
        out = torch.cat(parts, dim=2)
    return out.transpose(1, 2), None


# keyword arguments with which some family changes attention scores
_CHANGES_SCORES = ("position_bias", "alibi", "head_mask", "score_mod", "learnable_sink")


def _segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    segment: Segment,
    scaling: float,
    dropout: float,
    window: int | None,
    special: dict,
) -> Tensor:
    start, end, prompt_start, prompt_end = segment
    q, k, v = (states[:, :, start:end] for states in (query, key, value))
    if prompt_end > prompt_start:
        k = torch.cat([key[:, :, prompt_start:prompt_end], k], dim=2)
        v = torch.cat([value[:, :, prompt_start:prompt_end], v], dim=2)
    if window is not None and window >= k.shape[2]:
        window = None  # it sees everything
    if any(option is not None for option in special.values()):
        mask = layout.mask(segment, window, q.device)
        return _plain(q, k, v, mask, scaling, dropout, **special)
    causal = prompt_end == prompt_start and window is None
    mask = None if causal else layout.mask(segment, window, q.device)
    # sdpa's fast kernels take grouped heads without a mask only
    grouped = k.shape[1] != q.shape[1]
    if grouped and (mask is not None or q.device.type != "cuda"):
        k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=causal, scale=scaling, enable_gqa=grouped
    )


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scaling: float,
    dropout: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention as it is written, for what fused kernels don't have; softmax in fp32 or better."""
    groups = q.shape[1] // k.shape[1]
    k, v = (states.repeat_interleave(groups, dim=1) for states in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        scores = torch.cat([scores, sink], dim=-1)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return F.dropout(weights.to(q.dtype), dropout, dropout > 0) @ v


def _varlen_function() -> tuple[Callable | None, frozenset[str]]:
    """torch's variable-length attention, and which of its later options this torch has: 2.10 only `is_causal`, 2.11
    `scale` and `window_size`, 2.12 `enable_gqa` too."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, frozenset()
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


VARLEN, _VARLEN_OPTIONS = _varlen_function()


def _cast_dtype(query: Tensor) -> torch.dtype:
    """Inside autocast attention runs in its dtype, as torch's own does."""
    device = query.device.type
    inside = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if inside else query.dtype


def _has_varlen(query: Tensor, value: Tensor, window: int | None) -> bool:
    return (
        VARLEN is not None
        and (window is None or "window_size" in _VARLEN_OPTIONS)
        and query.device.type == "cuda"
        and torch.version.hip is None
        and _cast_dtype(query) in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float,
    window: int | None,
) -> Tensor:
    index, cu_q, cu_k, most_q, most_k = layout.gathered(query.device)
    dtype = _cast_dtype(query)
    q, k, v = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    k, v = k[index], v[index]
    options: dict[str, Any] = {}
    if "enable_gqa" in _VARLEN_OPTIONS:
        options["enable_gqa"] = True
    else:
        groups = q.shape[1] // k.shape[1]
        k, v = (states.repeat_interleave(groups, dim=1) for states in (k, v))
    if "scale" in _VARLEN_OPTIONS:
        options["scale"] = scaling
    elif scaling != (usual := q.shape[-1] ** -0.5):
        q = q * (scaling / usual)
    # causal, the last query at the last key; a window counts keys besides the query's own
    if "window_size" in _VARLEN_OPTIONS:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        options["is_causal"] = True
    out = VARLEN(q, k, v, cu_q, cu_k, most_q, most_k, **options)
    return out.transpose(0, 1).unsqueeze(0)


def unwrap_peft(model: nn.Module) -> nn.Module:
    """The transformers model inside."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def install(model: nn.Module) -> None:
    """Let the model's attention understand packed rows; calls without a layout are as before.

    Args:
        model: a transformers model, or one wrapped by PEFT.
    """
    inner = unwrap_peft(model)
    _teach(_implementation(inner))
    _INSTALLED.add(inner)


def uninstall(model: nn.Module) -> None:
    """Packed rows are an error from now on."""
    _INSTALLED.discard(unwrap_peft(model))


def _implementation(model: nn.Module) -> str:
    return model.config.get_text_config()._attn_implementation


def _teach(name: str) -> None:
    """Put a layer of ours over transformers' implementation of this name."""
    if name in _UNDERSTOOD:
        return
    own, own_mask = ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name)

    def attention(module, query, key, value, attention_mask, **kwargs):
        if kwargs.get("bapo_layout") is not None:
            return shared_prefix_attention(module, query, key, value, attention_mask, **kwargs)
        if _PACKED.get():
            raise RuntimeError(f"{type(module).__name__} lost the layout of the packed row")
        function = own or _eager_of(module)
        return function(module, query, key, value, attention_mask, **kwargs)

    def mask(*args, local_size=None, **kwargs):
        # the layout says who sees whom; a [T, T] mask of what stands beside what would be wrong
        if _PACKED.get():
            return AskedMask(local_size)
        return own_mask(*args, local_size=local_size, **kwargs)

    AttentionInterface.register(name, attention)
    if own_mask is not None:
        AttentionMaskInterface.register(name, mask)
    _UNDERSTOOD.add(name)


def _eager_of(module: nn.Module) -> Callable:
    """The plain attention that stands beside the layer's class, where no implementation has a name."""
    for kind in type(module).__mro__:
        found = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if found is not None:
            return found
    raise RuntimeError(f"{type(module).__name__} has no eager attention")


@contextmanager
def packed(model: nn.Module, layout: Layout | None):
    """Around a model's forward: with a layout, no mask is made, and a layer that lost it is an error.

    Raises:
        RuntimeError: a layout, but `install` wasn't called on the model.
    """
    if layout is not None and unwrap_peft(model) not in _INSTALLED:
        raise RuntimeError(
            f"{type(unwrap_peft(model)).__name__} can't read a packed row: install() its attention first"
        )
    token = _PACKED.set(layout is not None)
    try:
        yield
    finally:
        _PACKED.reset(token)
