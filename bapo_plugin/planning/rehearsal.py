"""A training step rehearsed on tensors without storage: what it allocates, byte by byte, without weights or a GPU.

The model's own forward and backward run, with its adapter, autocast, gradient checkpointing and the batches of our
collators, on torch's fake tensors: shapes, dtypes and lifetimes are those of a step, and nothing is computed. What a CPU
would do otherwise than a GPU is stood in for: weights dequantised for one product, flash attention of variable length,
LayerNorm in fp32 under autocast, and the log-prob kernels, whose temporaries `memory` states.

A step is rehearsed with two and with three layers; what more layers add follows, since layers repeat.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from bapo_plugin.planning import memory
from bapo_plugin.planning.architecture import build
from bapo_plugin.planning.settings import RunSettings
from bapo_plugin.planning.stand_ins import (
    Scored,
    Selected,
    as_quantised,
    flash_attention,
    in_fp32,
    stand_in,
)
from bapo_plugin.planning.tracker import (
    BACKWARD,
    HEAD,
    REFERENCE,
    Peaks,
    Tracker,
    current,
)
from bapo_plugin.scoring import shared_prefix
from bapo_plugin.scoring.collator import ANCHORED, PaddedCollator, SharedPrefixCollator
from bapo_plugin.scoring.layouts import refusal

_DEPTHS = (2, 3)
#: TRL 1.14 has a kernel of its own for log-probs, 1.9 hasn't; what was measured is with it
TRL_IS_FUSED = find_spec("trl.kernels") is not None


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
        self._masked = True
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
        model = build(config, settings, stand_in(settings.bits))
        model.train()
        with self._mode:
            _give_storage(model, settings)
            if settings.checkpointing:
                if settings.adapter:
                    model.enable_input_require_grads()
                model.gradient_checkpointing_enable({"use_reentrant": settings.reentrant})
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) and settings.autocast:
                in_fp32(module)
            elif (
                isinstance(module, LoraLinear)
                and settings.bits < 16
                and not settings.adapter.get("use_dora")
            ):
                as_quantised(module)
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
        shared_prefix.install(model)
        return model

    def _deep(self, step: Any) -> Peaks:
        """A step at the model's own depth."""
        try:
            return self._try(step)
        except DataDependentOutputException:
            # it looks at values of its padding mask; none is what full rows have
            self._masked = False
        except Exception as error:
            raise self._failed(error) from error
        try:
            return self._try(step)
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> ValueError:
        name = type(shared_prefix.unwrap_peft(self._models[self._depths[0]])).__name__
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:160]
        return ValueError(
            f"a step of a {name} can't be rehearsed without a GPU ({type(error).__name__}: {reason})"
        )

    def _try(self, step: Any) -> Peaks:
        found = []
        for depth in self._depths:
            model = self._models[depth]
            with self._mode, flash_attention():
                tracker = Tracker(_tensors(model), model.config.get_text_config().vocab_size)
                with tracker:
                    with _autocast(self._settings):
                        loss = step(model, tracker)
                    tracker.turn()
                    with tracker.taking(BACKWARD):
                        loss.backward()
                    del loss
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

    def _bapo(self, model: nn.Module, tracker: Tracker, rows: Sequence) -> Tensor:
        bapo = self._settings.bapo
        held = "all" if bapo.anchor_loss == "kl" else "kept" if bapo.keep is not None else "none"
        batch = self._batch(rows, held)
        states = None
        if ANCHORED in batch:
            with tracker.taking(REFERENCE), torch.no_grad(), _reference(model):
                states = self._states(model, batch[ANCHORED], lambda h: h)
        if not self._settings.precompute:
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
            # as long as the longest row, but for what no former answer can have
            answer = made[0]["base_ids"][: self._settings.bapo.anchors.max_new_tokens]
            made += [{"prompt_ids": made[0]["prompt_ids"], "base_ids": answer}] * each
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
        names = ("input_ids", "position_ids", *(["attention_mask"] if self._masked else []))
        inputs = {k: batch[k] for k in names if k in batch}
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
            with current().taking(HEAD):
                gradient = 1 + torch.is_grad_enabled()
                product = 2 * vocabulary * width
                size = memory.kernel_bytes(len(states), width, vocabulary, backend)
                later = 0
                if head.weight.requires_grad:
                    later = memory.head_gradient_bytes(
                        len(states), width, vocabulary, head.weight.dtype.itemsize
                    )
                total = Scored.apply(states, size, later, gradient * product * len(states))
                if reference is not None:
                    own = states[len(states) - len(reference) :]
                    size = memory.divergence_bytes(len(own), width, vocabulary, backend)
                    total = total + Scored.apply(own, size, 0, 5 * product * len(own))
            return total

        return self._states(model, batch, score)

    # ------------------------------------------------------------ TRL's

    def _dpo(self, model: nn.Module, tracker: Tracker, rows: Sequence, precomputed: bool) -> Tensor:
        longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected, _ in rows)
        ids = torch.zeros(2 * len(rows), longest, dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if self._masked:
            inputs["attention_mask"] = torch.ones_like(ids)
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
        return Selected.apply(logits)
    label = torch.zeros(logits.shape[1], 1, dtype=torch.long)
    return torch.stack([F.log_softmax(row.float(), -1).gather(-1, label) for row in logits])


def _attention(config: PretrainedConfig, settings: RunSettings) -> str:
    """FlashAttention can't be had without a GPU; sdpa keeps as much."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    has_sdpa = known is None or getattr(known, "_supports_sdpa", True)
    return "sdpa" if has_sdpa and settings.attention != "eager" else "eager"


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
