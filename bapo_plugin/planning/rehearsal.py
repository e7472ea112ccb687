"""A training step rehearsed on tensors without storage: what it allocates, byte by byte, without weights or a GPU.

The model's own forward and backward run, with its adapter, autocast, gradient checkpointing and the batches of our
collators, on torch's fake tensors: shapes, dtypes and lifetimes are those of a step, and nothing is computed. What a CPU
would do otherwise than a GPU is stood in for: weights dequantised for one product, flash attention of variable length,
LayerNorm in fp32 under autocast, and the log-prob kernels, whose temporaries `memory` states.

A step is rehearsed with two and with three layers; what more layers add follows, since layers repeat.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import PretrainedConfig

from bapo_plugin.planning import memory
from bapo_plugin.planning.architecture import build
from bapo_plugin.planning.settings import RunSettings
from bapo_plugin.scoring import shared_prefix
from bapo_plugin.scoring.collator import ANCHORED, PaddedCollator, SharedPrefixCollator
from bapo_plugin.scoring.layouts import refusal

#: what a step's bytes are there for
KEPT, BACKWARD, HEAD, DEQUANTISED, REFERENCE = (
    *("kept", "backward", "head", "dequantised", "reference"),
)
_DEPTHS = (2, 3)
_FLASH_WIDTH = 256
#: TRL 1.14 has a kernel of its own for log-probs, 1.9 hasn't; what was measured is with it
TRL_IS_FUSED = find_spec("trl.kernels") is not None


class Peaks(dict[str, Counter[str]]):
    """ "forward" and "backward" -> bytes by purpose when most was allocated in that pass; "written" -> bytes of
    everything that was ever allocated; "flops" -> floating point operations of products; "calls" -> operations that the
    host starts."""

    @property
    def bytes(self) -> int:
        """The peak of the step."""
        return self.parts.total()

    @property
    def parts(self) -> Counter[str]:
        """Bytes by purpose at the peak of the step."""
        return max((self["forward"], self["backward"]), key=Counter.total)


class _Tracker(TorchDispatchMode):
    """Follows every storage from its first tensor to its last."""

    def __init__(self, known: Iterator[Tensor], vocabulary: int):
        super().__init__()
        self.purpose, self.phase = KEPT, "forward"
        names = ("forward", "backward", "written", "flops", "calls")
        self.found = Peaks({name: Counter() for name in names})
        self._vocabulary = vocabulary
        self._live: Counter[str] = Counter()
        self._most = {"forward": 0, "backward": 0}
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.found["calls"][self.purpose] += not func.is_view
        if (flops := flop_registry.get(func.overloadpacket)) is not None:
            self.found["flops"][self.purpose] += flops(*args, **kwargs, out_val=out)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen:
                    self._seen.add(storage)
                    is_logits = tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary
                    self._add(storage, HEAD if is_logits else self.purpose)
        return out

    def _add(self, storage: Any, purpose: str) -> None:
        size = storage.nbytes()
        self._live[purpose] += size
        self.found["written"][purpose] += size
        weakref.finalize(storage, self._free, purpose, size)
        self._look()

    def _look(self) -> None:
        total = self._live.total()
        if total > self._most[self.phase]:
            self._most[self.phase] = total
            self.found[self.phase] = +self._live

    def _free(self, purpose: str, size: int) -> None:
        self._live[purpose] -= size

    @contextmanager
    def taking(self, purpose: str) -> Iterator[None]:
        before, self.purpose = self.purpose, purpose
        try:
            yield
        finally:
            self.purpose = before

    @contextmanager
    def held(self, size: int, flops: int) -> Iterator[None]:
        """Temporaries of a kernel, for the length of a call."""
        self.found["flops"][HEAD] += flops
        self.found["written"][HEAD] += size
        self._live[HEAD] += size
        self._look()
        yield
        self._live[HEAD] -= size


_TRACKER: list[_Tracker] = []


def _taking(purpose: str) -> Any:
    return _TRACKER[-1].taking(purpose) if _TRACKER else nullcontext()


# ---------------------------------------------------------------- what stands in


class _Dequantised(torch.autograd.Function):
    """bitsandbytes' product: the weight in 16 bits exists for its length, in forward and in backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, bits):
        ctx.weight = weight
        if bits == 8:
            ctx.save_for_backward(x)
        with _taking(DEQUANTISED):
            # LLM.int8 has the input in 8 bits and a result in 32
            _ = (
                (x.to(torch.int8), x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.int32))
                if bits == 8
                else torch.empty_like(weight)
            )
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        with _taking(DEQUANTISED):
            weight = torch.empty_like(ctx.weight)
        return grad @ weight, None, None, None


class _Flash(torch.autograd.Function):
    """Attention that keeps its inputs, its output and a log-sum-exp a query."""

    @staticmethod
    def forward(ctx, q, k, v, longest):
        ctx.flops = 2 * q.numel() * longest  # two products, half of the keys on average
        _TRACKER[-1].found["flops"][KEPT] += ctx.flops
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *_ = ctx.saved_tensors
        _TRACKER[-1].found["flops"][BACKWARD] += ctx.flops * 5 // 2
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class _Scored(torch.autograd.Function):
    """bapo_kernels: from states to the sum of their log-probs; keeps a gradient for each, [T, H]."""

    @staticmethod
    def forward(ctx, states, temporaries, flops):
        ctx.save_for_backward(torch.empty_like(states))
        with _TRACKER[-1].held(temporaries, flops):
            return states.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(ctx.saved_tensors[0]), None, None


class _Selected(torch.autograd.Function):
    """TRL's fused log-softmax of a label: keeps the logits, and its backward makes as many."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.new_zeros(logits.shape[:-1], dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        return torch.empty(logits.shape, dtype=logits.dtype)


class _LikeNF4(nn.Linear):
    bits = 4

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        return _Dequantised.apply(x.to(self.weight.dtype), self.weight, self.bias, self.bits).to(
            dtype
        )


class _LikeInt8(_LikeNF4):
    bits = 8


def _stand_in(bits: int):
    def make(linear: nn.Linear) -> nn.Linear:
        linear.__class__ = _LikeNF4 if bits == 4 else _LikeInt8  # weights stay where they are
        return linear

    return make


def _as_quantised(layer: LoraLinear) -> None:
    """Let a LoRA layer compute as PEFT's layers for bitsandbytes do."""
    name = next(iter(layer.lora_A))

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        result = layer.base_layer(x)
        if layer.disable_adapters:
            return result
        if isinstance(layer.base_layer, _LikeNF4) and layer.base_layer.bits == 4:
            result = result.clone()
        dtype = result.dtype
        if not torch.is_autocast_enabled("cpu"):
            x = x.to(layer.lora_A[name].weight.dtype)
        return (result + layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]).to(dtype)

    layer.forward = forward


def _in_fp32(norm: nn.LayerNorm) -> None:
    """As under CUDA's autocast, which a CPU's leaves in 16 bits."""

    def forward(x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
        return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)

    norm.forward = forward


@contextmanager
def _flash_attention() -> Iterator[None]:
    """Let packed rows take attention of variable length where this torch has it, as on a GPU."""
    before = shared_prefix._VARLEN, shared_prefix._has_varlen

    def has_varlen(query: Tensor, value: Tensor, window: int | None) -> bool:
        return (
            (window is None or "window_size" in shared_prefix._VARLEN_OPTIONS)
            and query.shape[-1] == value.shape[-1] <= _FLASH_WIDTH
            and shared_prefix._cast_dtype(query) in (torch.bfloat16, torch.float16)
        )

    if before[0] is not None:
        shared_prefix._VARLEN = lambda q, k, v, _cu_q, _cu_k, _most_q, longest, **_: _Flash.apply(
            q, k, v, longest
        )
        shared_prefix._has_varlen = has_varlen
    try:
        yield
    finally:
        shared_prefix._VARLEN, shared_prefix._has_varlen = before


# ---------------------------------------------------------------- the rehearsal


class Rehearsal:
    """Steps of one architecture under one adapter and quantisation.

    Args:
        config: of the text model; with as many layers as the model has.
        settings: of the run; rows and batch are given to each step.

    Raises:
        ValueError: the model can't be built, or its step can't be rehearsed.
    """

    def __init__(self, config: PretrainedConfig, settings: RunSettings):
        self._settings = settings
        self._layers = config.num_hidden_layers
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._depths = [n for n in _DEPTHS if n < self._layers] or [self._layers]
        self._models = {n: self._model(config, n) for n in self._depths}
        refused = refusal(self._models[self._depths[0]])
        if settings.bapo.shared_prefix == "off":
            refused = "bapo.shared_prefix is off"
        #: why each response gets a padded row of its own; None where they share their prompt
        self.padded_because: str | None = refused

    def bapo(self, rows: Sequence[tuple[int, int, int, int]]) -> Peaks:
        """A pass over preference rows and its backward.

        Args:
            rows: tokens of the prompt, the chosen, rejected and base response of each.
        """
        return self._deep(lambda model, tracker: self._bapo(model, tracker, rows))

    def dpo(self, rows: Sequence[tuple[int, int, int, int]], precomputed: bool = False) -> Peaks:
        """The same of TRL's DPO: chosen and rejected as padded rows, logits of all tokens.

        Args:
            rows: as above; the base response plays no part.
            precomputed: whether the reference's log-probs are known; by default TRL computes them in each step.
        """
        return self._deep(lambda model, tracker: self._dpo(model, tracker, rows, precomputed))

    def _model(self, config: PretrainedConfig, depth: int) -> nn.Module:
        config = copy.deepcopy(config)
        config.num_hidden_layers = depth
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:depth]
        config._attn_implementation = _attention(config, self._settings)
        settings = self._settings
        # with fewer layers some that PEFT was told to take aren't there
        adapter = {k: v for k, v in settings.adapter.items() if k != "layers_to_transform"}
        settings = copy.copy(settings)
        object.__setattr__(settings, "adapter", adapter)
        model = build(config, settings, _stand_in(settings.bits))
        model.train()
        with self._mode:
            _give_storage(model, settings)
            if settings.checkpointing:
                if settings.adapter:
                    model.enable_input_require_grads()
                model.gradient_checkpointing_enable({"use_reentrant": settings.reentrant})
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) and settings.autocast:
                _in_fp32(module)
            elif (
                isinstance(module, LoraLinear)
                and settings.bits < 16
                and not settings.adapter.get("use_dora")
            ):
                _as_quantised(module)
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
        shared_prefix.install(model)
        return model

    def _deep(self, step: Any) -> Peaks:
        """A step at the model's own depth."""
        found = []
        for depth in self._depths:
            model = self._models[depth]
            try:
                with self._mode, _flash_attention():
                    tracker = _Tracker(_tensors(model), model.config.get_text_config().vocab_size)
                    _TRACKER.append(tracker)
                    with tracker:
                        with _autocast(self._settings):
                            loss = step(model, tracker)
                        tracker.phase = "backward"
                        with tracker.taking(BACKWARD):
                            loss.backward()
                        del loss
            except Exception as error:  # a model whose shapes depend on values, or a passing fault
                raise ValueError(
                    f"a step of a {type(shared_prefix.unwrap_peft(model)).__name__} can't be rehearsed without a GPU "
                    f"({type(error).__name__}: {str(error).strip().splitlines()[0][:160]})"
                ) from error
            finally:
                _TRACKER.clear()
            found.append(tracker.found)
        if len(found) == 1:
            return found[0]
        return Peaks(
            {
                phase: Counter(
                    {
                        purpose: _extrapolate(
                            self._depths, [f[phase][purpose] for f in found], self._layers
                        )
                        for purpose in {*found[0][phase], *found[1][phase]}
                    }
                )
                for phase in found[0]
            }
        )

    # ------------------------------------------------------------ ours

    def _bapo(self, model: nn.Module, tracker: _Tracker, rows: Sequence) -> Tensor:
        bapo = self._settings.bapo
        held = "all" if bapo.anchor_loss == "kl" else "kept" if bapo.keep is not None else "none"
        batch = self._batch(rows, held)
        states = None
        if ANCHORED in batch:
            with tracker.taking(REFERENCE), torch.no_grad(), _reference(model):
                states = self._states(model, batch[ANCHORED], lambda h: h)
        if not self._settings.precompute and self._settings.adapter:
            # the policy's graph is there meanwhile
            loss = self._score(model, batch, states)
            with tracker.taking(REFERENCE), torch.no_grad(), _reference(model):
                self._score(model, batch, None)
            return loss
        return self._score(model, batch, states)

    def _batch(self, rows: Sequence, held: str) -> dict[str, Any]:
        names = ("prompt_ids", "chosen_ids", "rejected_ids", "base_ids")
        made = [dict(zip(names, ([0] * n for n in row), strict=True)) for row in rows]
        kept = self._settings.bapo.keep
        if kept is not None and made:
            each = -(-kept.per_step // self._settings.gradient_accumulation_steps)
            made += [{"prompt_ids": made[0]["prompt_ids"], "base_ids": made[0]["base_ids"]}] * each
        collate = (
            PaddedCollator(0, anchored=held)
            if self.padded_because
            else SharedPrefixCollator(anchored=held)
        )
        with _disable_current_modes():
            batch = collate.pack(made) if hasattr(collate, "pack") else collate(made)
            for part in (batch, batch.get(ANCHORED)):
                if part and "layout" in part:
                    part["layout"].gathered(torch.device("cpu"))  # kept there: its lengths are read
        return batch

    def _states(self, model: nn.Module, batch: dict[str, Any], function: Any) -> Any:
        head = model.get_output_embeddings()
        index, found = batch["response_index"], []
        inputs = {
            k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch
        }
        if "layout" in batch:
            inputs["bapo_layout"] = batch["layout"]

        def replaced(hidden: Tensor) -> Tensor:
            states = hidden.reshape(-1, hidden.shape[-1])[index].to(head.weight.dtype)
            found.append(function(states))
            return hidden.new_zeros(1, 1, 1)

        before, head.forward = head.forward, replaced
        try:
            with shared_prefix.packed(model, batch.get("layout")):
                model(**inputs, use_cache=False)
        finally:
            head.forward = before
        return found[0]

    def _score(self, model: nn.Module, batch: dict[str, Any], reference: Tensor | None) -> Tensor:
        head = model.get_output_embeddings()
        vocabulary, width = head.weight.shape
        backend = self._settings.bapo.kernel

        def score(states: Tensor) -> Tensor:
            with _taking(HEAD):
                gradient = 1 + torch.is_grad_enabled()
                product = 2 * vocabulary * width
                size = memory.kernel_bytes(len(states), width, vocabulary, backend)
                total = _Scored.apply(states, size, gradient * product * len(states))
                if reference is not None:
                    own = states[len(states) - len(reference) :]
                    size = memory.divergence_bytes(len(own), width, vocabulary, backend)
                    total = total + _Scored.apply(own, size, 5 * product * len(own))
            return total

        return self._states(model, batch, score)

    # ------------------------------------------------------------ TRL's

    def _dpo(
        self, model: nn.Module, tracker: _Tracker, rows: Sequence, precomputed: bool
    ) -> Tensor:
        longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected, _ in rows)
        ids = torch.zeros(2 * len(rows), longest, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        logits = model(**inputs).logits[..., :-1, :]
        loss = _selected(logits).sum()
        reference = None
        if not precomputed:
            with tracker.taking(REFERENCE), torch.no_grad(), _reference(model):
                reference = model(**inputs).logits
                _selected(reference[..., :-1, :])
        # its metrics take the logits of one response of each row
        most = max(sum(row[1] for row in rows), sum(row[2] for row in rows))
        logits.new_empty(most, logits.shape[-1])
        if not TRL_IS_FUSED:
            logits.detach().reshape(-1, logits.shape[-1])  # for the entropy
        return loss


def _selected(logits: Tensor) -> Tensor:
    """TRL's log-probs of labels; the fused kernel, or in fp32 row by row as before it."""
    if TRL_IS_FUSED:
        return _Selected.apply(logits)
    label = torch.zeros(logits.shape[1], 1, dtype=torch.long)
    return torch.stack([F.log_softmax(row.float(), -1).gather(-1, label) for row in logits])


def _attention(config: PretrainedConfig, settings: RunSettings) -> str:
    """FlashAttention can't be had without a GPU; sdpa keeps as much."""
    return "eager" if settings.attention == "eager" else "sdpa"


def _give_storage(model: nn.Module, settings: RunSettings) -> None:
    """Fake tensors for the meta device's, gradients for what trains: they are there from the first micro-batch on."""
    made: dict[int, nn.Parameter] = {}
    originals = []  # ids are those of living objects
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                originals.append(parameter)
                new = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = nn.Parameter(new, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    for parameter in made.values():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """What is there before a step."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        if tensor.grad is not None:
            yield tensor.grad


def _autocast(settings: RunSettings) -> Any:
    return torch.autocast("cpu", dtype=settings.dtype) if settings.autocast else nullcontext()


def _reference(model: nn.Module) -> Any:
    """The model with its adapter off; without one a copy of it, whose weights `estimate` counts."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


def _extrapolate(depths: Sequence[int], sizes: Sequence[int], layers: int) -> int:
    """Bytes at a number of layers, from those at two others."""
    each = (sizes[1] - sizes[0]) / (depths[1] - depths[0])
    return max(0, round(sizes[0] + each * (layers - depths[0])))
