"""One forward pass of a causal LM to the log-probabilities of response tokens, without logits.

The model's own forward runs as it is; only its output head (`lm_head`) is replaced for the moment of
the call. The replacement sees the very hidden states that the head would see, picks the rows that
predict response tokens and hands them to `bapo_kernels`, so neither prompt nor padding reaches the
vocabulary projection and no [tokens × vocabulary] matrix is made. This holds for every model class
and every wrapper (PEFT, DDP, quantisation, checkpointing), since nothing is assumed of the backbone.

What a model does *after* its head must be known: Gemma caps logits, Cohere and Granite scale them.
That is read from the config and then verified: on the first call the replaced head returns probe
values, and what the model makes of them must be what we expect. A head or a family for which this
does not hold (an adapter on the head, a quantised head, an unknown transformation) takes the plain
path: the model's own logits, of response tokens only, in fp32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from bapo_kernels import sequence_kl, sequence_logprobs
from bapo_plugin.compat import ForwardRedirection
from bapo_plugin.loss import per_response
from bapo_plugin.scoring.collator import ANCHORED, BASE_TOKENS, KEPT, ROW, num_kept, num_rows
from bapo_plugin.scoring.head import Head, inspect_head, is_plain_linear, replaced
from bapo_plugin.scoring.shared_prefix import packed

_NOT_FOR_MODEL = (
    *("response_index", "response_labels", "cu_seqlens", "layout", "token_counts"),
    *(ROW, KEPT, ANCHORED, BASE_TOKENS, "is_repeated"),
)

_NO_DIVERGENCE = (
    "bapo.anchor_loss: kl and bapo.keep compare distributions under one plain, frozen output head, but {reason}; set "
    "bapo.anchor_loss: hinge and no bapo.keep"
)
_TRIES = 3
_SMALL_CHUNK = 2**24  # bytes; a sixth of what bapo_kernels takes on a GPU, or less


class ForwardOutput(NamedTuple):
    """`logps` [S] fp32, nats summed over each sequence's response tokens; `aux_loss` of MoE routers,
    a scalar, or None; `divergence` [A] fp32, KL(reference ‖ policy) of the last A sequences, nats summed over
    tokens, or None; `base_tokens` [T_b] fp32, log-probs of the base responses' tokens, row by row, or None."""

    logps: Tensor
    aux_loss: Tensor | None
    divergence: Tensor | None = None
    base_tokens: Tensor | None = None


class ResponseForward:
    """Callable (model, batch) -> `ForwardOutput`.

    Args:
        log: told, once per model and in one line, when the plain path is taken and why.
        backend: of `bapo_kernels.sequence_logprobs`.
        base_tokens: give the log-probs of the base responses' tokens too.
    """

    def __init__(
        self, log: Callable[[str], None], backend: str = "auto", base_tokens: bool = False
    ):
        self._log = log
        self._backend = backend
        self._base_tokens = base_tokens
        self._chunk_bytes: int | None = None  # the kernel's own
        # model -> its head, or the reason for the plain path
        self._heads: WeakKeyDictionary[nn.Module, Head | str] = WeakKeyDictionary()
        self._failures: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self._redirect = ForwardRedirection()

    def __call__(
        self,
        model: nn.Module,
        unwrapped: nn.Module,
        batch: dict[str, Any],
        reference_states: Tensor | None = None,
        **model_kwargs: Any,
    ) -> ForwardOutput:
        """Log-probs of the batch's S sequences under the model.

        Args:
            model: as the trainer calls it, perhaps wrapped (DDP, FSDP, DeepSpeed).
            unwrapped: the model inside.
            batch: see `bapo_plugin.scoring.collator`.
            reference_states: of the batch "anchored", see `states`: then the divergence is computed too.
            model_kwargs: more keyword arguments of the model's forward.

        Raises:
            RuntimeError: the model didn't call its output head exactly once, or adds positions.
            ValueError: a divergence is wanted, and the head isn't a plain frozen one.
        """

        def run(spec: Head | str, head: Any, kwargs: dict) -> ForwardOutput:
            if isinstance(spec, str):
                if reference_states is not None:
                    raise ValueError(_NO_DIVERGENCE.format(reason=spec))
                return self._from_logits(unwrapped, head, batch, kwargs)
            return self._from_kernel(unwrapped, head, spec, batch, reference_states, kwargs)

        return self._run(model, unwrapped, batch, run, model_kwargs)

    def states(self, model: nn.Module, unwrapped: nn.Module, batch: dict[str, Any]) -> Tensor:
        """[T, H], the states that predict the batch's response tokens, in the dtype of the output head.

        Raises:
            ValueError: what the head makes of them isn't known.
        """

        def run(spec: Head | str, head: Any, kwargs: dict) -> Tensor:
            if isinstance(spec, str):
                raise ValueError(_NO_DIVERGENCE.format(reason=spec))
            found: list[Tensor] = []

            def keep(hidden: Tensor) -> Tensor:
                found.append(_response_states(hidden, batch).to(head.weight.dtype))
                return hidden.new_zeros(1, 1, 1)

            _call_with_head(unwrapped, head, keep, kwargs)
            return found[0]

        return self._run(model, unwrapped, batch, run, {})

    def _run(
        self,
        model: nn.Module,
        unwrapped: nn.Module,
        batch: dict[str, Any],
        function: Callable[[Head | str, Any, dict], Any],
        model_kwargs: dict[str, Any],
    ) -> Any:
        """Call a function with what is known of the head, the head, and the inputs, inside the model's wrapper."""
        inputs = {k: v for k, v in batch.items() if k not in _NOT_FOR_MODEL}
        inputs |= {"use_cache": False} | model_kwargs
        if "layout" in batch:
            inputs["bapo_layout"] = batch["layout"]

        # The wrapper's forward must return our result: DDP looks there for the parameters that took
        # part, and FSDP2, which wraps in place, hangs its backward on it.
        def run(**kwargs: Any) -> Any:
            head = unwrapped.get_output_embeddings()
            spec = self._heads.get(unwrapped)
            if spec is None:
                spec = self._find_head(unwrapped, head, kwargs)
            # an adapter may have put another head in place (modules_to_save)
            if not isinstance(spec, str) and not is_plain_linear(head):
                spec = f"its output head is a {type(head).__name__}, not a plain linear layer"
            return function(spec, head, kwargs)

        return self._redirect(model, unwrapped, run, **inputs)

    def _find_head(self, model: nn.Module, head: Any, kwargs: dict) -> Head | str:
        """`inspect_head`, once; an exception may come from anywhere in the model, so it is tried again before it counts as
        a property of the head."""
        try:
            spec = inspect_head(model, head, kwargs)
        except Exception as error:  # a model that inspects its own logits, or a passing fault
            spec = (
                f"{type(model).__name__} failed on probe logits ({type(error).__name__}: {error})"
            )
            self._failures[model] = self._failures.get(model, 0) + 1
            if self._failures[model] < _TRIES:
                return spec
        self._heads[model] = spec
        if isinstance(spec, str):
            self._log(f"log-probs come from the model's own logits of response tokens: {spec}")
        return spec

    def _from_kernel(
        self,
        model: nn.Module,
        head: nn.Linear,
        spec: Head,
        batch: dict,
        reference_states: Tensor | None,
        kwargs: dict,
    ) -> ForwardOutput:
        found: list[Tensor | None] = []

        def score(hidden: Tensor) -> Tensor:
            states = _response_states(hidden, batch)
            states = states.to(head.weight.dtype)
            found.extend(self._logps(states, head, spec, batch))
            found.append(
                None
                if reference_states is None
                else sequence_kl(
                    states[len(states) - len(reference_states) :],
                    reference_states,
                    head.weight,
                    batch[ANCHORED]["cu_seqlens"],
                    bias=head.bias,
                    logit_scale=spec.scale,
                    logit_softcap=spec.softcap,
                    chunk_bytes=self._chunk_bytes,
                ).sum
            )
            return hidden.new_zeros(1, 1, 1)

        outputs = _call_with_head(model, head, score, kwargs)
        logps, base_tokens, divergence = found
        return ForwardOutput(logps, getattr(outputs, "aux_loss", None), divergence, base_tokens)

    def _logps(
        self, states: Tensor, head: nn.Linear, spec: Head, batch: dict
    ) -> tuple[Tensor, Tensor | None]:
        """[S] of sequences, nats, and [T_b] of the base responses' tokens where they are wanted. With less temporary
        memory, from then on, where there was too little."""
        by_token = self._base_tokens and BASE_TOKENS in batch

        def run() -> Tensor | None:
            try:
                return sequence_logprobs(
                    states,
                    head.weight,
                    batch["response_labels"],
                    batch[BASE_TOKENS if by_token else "cu_seqlens"],
                    bias=head.bias,
                    logit_scale=spec.scale,
                    logit_softcap=spec.softcap,
                    backend=self._backend,
                    chunk_bytes=self._chunk_bytes,
                ).sum
            except torch.OutOfMemoryError:
                return None

        found = run()
        if found is None and self._chunk_bytes is None:
            self._chunk_bytes = _SMALL_CHUNK
            self._log(
                "the log-prob kernel ran out of memory and goes on with less temporary memory, "
                f"{self._chunk_bytes / 2**20:.0f} MiB"
            )
            found = run()
        if found is None:
            kept = states.shape[1] * states.element_size()  # the gradient, for each token
            free = torch.cuda.mem_get_info()[0] if states.is_cuda else 0
            fit = max(0, (free - self._chunk_bytes) // kept)
            raise torch.OutOfMemoryError(
                f"the log-prob kernel ran out of memory at {len(states):,} response tokens: with {free / 2**20:,.0f} MiB "
                f"free and {self._chunk_bytes / 2**20:.0f} MiB of temporary memory about {fit:,} fit. Set bapo.tokens_per_batch, or "
                "a smaller micro_batch_size"
            )
        if not by_token:
            return found, None
        n, m = num_rows(batch), num_kept(batch)
        pairs, tokens, kept = found.split([2 * n, len(found) - 2 * n - m, m])
        base = per_response(tokens, batch["cu_seqlens"].diff()[2 * n : 3 * n])
        return torch.cat([pairs, base, kept]), tokens

    def _from_logits(
        self, model: nn.Module, head: nn.Module, batch: dict, kwargs: dict
    ) -> ForwardOutput:
        outputs = _call_with_response_head(model, head, batch, kwargs)
        logits = outputs.logits[0]
        if logits.dtype != torch.float64:
            logits = logits.float()
        logps = torch.log_softmax(logits, dim=-1)  # [T, V]
        token_logps = logps.gather(1, batch["response_labels"].unsqueeze(1)).squeeze(1)
        sums = per_response(token_logps, batch["cu_seqlens"].diff())
        tokens = None
        if self._base_tokens and BASE_TOKENS in batch:
            n = num_rows(batch)
            first, last = batch["cu_seqlens"][[2 * n, 3 * n]].tolist()
            tokens = token_logps[first:last]
        return ForwardOutput(sums, getattr(outputs, "aux_loss", None), None, tokens)


def within(
    model: nn.Module, unwrapped: nn.Module, function: Callable[[], Any], inputs: dict
) -> Any:
    """Call a function inside the forward of a model's wrapper, which then gathers what FSDP or ZeRO-3 has sharded.

    Args:
        model: as the trainer calls it, perhaps wrapped.
        unwrapped: the model inside.
        function: what is to be done with the model; it has no arguments.
        inputs: tensors for wrappers that look at what a forward gets.
    """
    if model is unwrapped and not isinstance(model, FSDPModule):  # FSDP 2 wraps in place
        return function()
    return ForwardRedirection()(model, unwrapped, lambda **_: function(), **inputs)


def response_logits(
    model: nn.Module, batch: dict[str, Tensor], unwrapped: nn.Module | None = None
) -> Tensor:
    """The model's own logits of response tokens, [T, V] fp32, as its head and what follows give them.

    For measuring distributions (KL, agreement); log-probs alone come cheaper from `ResponseForward`.

    Args:
        model: as it is called, perhaps wrapped.
        batch: input_ids, attention_mask, response_index; see `bapo_plugin.scoring.collator`.
        unwrapped: the model inside, by default `model`.
    """
    inner = model if unwrapped is None else unwrapped
    kwargs = {k: v for k, v in batch.items() if k not in _NOT_FOR_MODEL} | {"use_cache": False}

    def run() -> Tensor:
        head = inner.get_output_embeddings()
        return _call_with_response_head(inner, head, batch, kwargs).logits[0].float()

    return within(model, inner, run, kwargs)


def _call_with_response_head(model: nn.Module, head: nn.Module, batch: dict, kwargs: dict) -> Any:
    """The model's outputs, with logits [1, T, V] of response tokens only."""
    forward = head.forward

    def project(hidden: Tensor) -> Tensor:
        return forward(_response_states(hidden, batch)).unsqueeze(0)

    return _call_with_head(model, head, project, kwargs)


def _call_with_head(
    model: nn.Module, head: nn.Module, forward: Callable[[Tensor], Tensor], kwargs: dict
) -> Any:
    """The model's outputs with `forward` in the place of its head, which it must call exactly once."""
    calls = 0

    def counted(hidden: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return forward(hidden)

    with replaced(head, counted), packed(model, kwargs.get("bapo_layout")):
        outputs = model(**kwargs)
    if calls != 1:
        raise RuntimeError(f"{type(model).__name__} called its output head {calls} times, not once")
    return outputs


def _response_states(hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """[T, H], the states that predict response tokens, out of the head's input [B, L, H]."""
    if hidden.shape[:-1] != batch["input_ids"].shape:
        raise RuntimeError(
            f"the output head got states of shape {tuple(hidden.shape)} for input_ids of shape "
            f"{tuple(batch['input_ids'].shape)}: the model adds or drops positions (prompt tuning does), "
            "and then BAPO can't tell which of them are response tokens; use a LoRA-like adapter"
        )
    return hidden.reshape(-1, hidden.shape[-1])[batch["response_index"]]
