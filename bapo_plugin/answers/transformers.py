"""Answers by a model on this machine: batched generation with a KV cache."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from bapo_plugin.answers.engine import Answer, Request, Sampling, seed_of

LOG = get_logger("axolotl." + __name__)


class TransformersEngine:
    """Greedy or sampled answers of a model of transformers, wrapped by PEFT or not.

    Nothing but `sampling` decides: a model's own defaults of generation (a repetition penalty, a
    temperature) are not part of its distribution, and are left out.

    Greedy answers are those of one prompt at a time, up to rounding: padding is on the left and masked,
    but a batch of another shape may round differently, which matters where two tokens are equally
    likely. Sampled ones draw from a generator of their own for each prompt, so they depend on the
    seed, the prompt and the kind of device, not on order or batches (again up to rounding).

    Args:
        load: gives the model, in eval mode; called when the first batch is due.
        stop_ids: tokens that end an answer.
        sampling: how answers are drawn; default: greedily.
        batch_size: most prompts at a time.
        batch_tokens: most tokens (prompts, padding and answers) in memory at a time.
    """

    streams = False

    def __init__(
        self,
        load: Callable[[], Any],
        stop_ids: Sequence[int],
        sampling: Sampling | None = None,
        batch_size: int = 32,
        batch_tokens: int = 16384,
    ):
        self._load = load
        self._model: Any = None
        self._stop_ids = list(stop_ids)
        self._sampling = sampling or Sampling()
        self._batch_size = batch_size
        self._batch_tokens = batch_tokens

    @property
    def model(self) -> Any:
        if self._model is None:
            self._model = self._load()
        return self._model

    def batches(self, lengths: Sequence[int], limits: Sequence[int]) -> list[int]:
        """Prompts of similar length together, within rows and tokens of a batch.

        The split depends on the requests alone, so a run that goes on makes the batches that an
        uninterrupted one makes, and by that the same answers to the bit.
        """
        sizes: list[int] = []
        most = longest = 0
        for length, limit in zip(map(int, lengths), map(int, limits), strict=True):
            rows = sizes[-1] + 1 if sizes else 1
            width = max(longest, length) + max(most, limit)
            if not sizes or rows > self._batch_size or rows * width > self._batch_tokens:
                sizes.append(0)
                longest = most = 0
            sizes[-1] += 1
            longest, most = max(longest, length), max(most, limit)
        return sizes

    def generate(
        self, requests: Sequence[Request], on_tokens: Callable[[int], None]
    ) -> Iterator[tuple[Request, Answer]]:
        try:
            new_ids = self._generate(requests, on_tokens)
        except torch.OutOfMemoryError:
            if len(requests) == 1:
                raise ValueError(
                    f"no memory to answer a prompt of {len(requests[0].prompt_ids)} tokens; lower "
                    "bapo.anchors.max_new_tokens or sequence_len"
                ) from None
            new_ids = None
        if new_ids is None:  # outside the handler, which would keep the failed tensors alive
            torch.cuda.empty_cache()
            LOG.warning(
                f"out of memory with {len(requests)} prompts at a time: going on with half as many (lower "
                "bapo.anchors.batch_tokens to avoid this)"
            )
            half = len(requests) // 2
            yield from self.generate(requests[:half], on_tokens)
            yield from self.generate(requests[half:], on_tokens)
            return
        for request, ids in zip(requests, new_ids, strict=True):
            yield request, self._answer(request, ids)

    def _generate(
        self, requests: Sequence[Request], on_tokens: Callable[[int], None]
    ) -> list[list[int]]:
        longest = max(len(request.prompt_ids) for request in requests)
        ids = torch.full((len(requests), longest), self._stop_ids[0])  # padding is masked
        mask = torch.zeros_like(ids)
        for i, request in enumerate(requests):
            ids[i, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[i, longest - len(request.prompt_ids) :] = 1
        processors = LogitsProcessorList()
        if self._sampling.temperature > 0:
            processors.append(_SeededSampling(self._sampling, requests, self.model.device))
        with torch.no_grad(), autocast(self.model), _neutral(self.model):
            out = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=max(request.limit for request in requests),
                    eos_token_id=self._stop_ids,
                    pad_token_id=self._stop_ids[0],
                    use_cache=True,
                ),
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList(
                    [_Counted(requests, longest, self._stop_ids, on_tokens)]
                ),
            )
        return out[:, longest:].tolist()

    def _answer(self, request: Request, ids: list[int]) -> Answer:
        ids = ids[: request.limit]
        end = next((i + 1 for i, token in enumerate(ids) if token in self._stop_ids), None)
        return Answer(tuple(ids[:end]), end is None)

    def confirm(self) -> None:
        """A model in this process doesn't change."""

    def close(self) -> None:
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def _neutral(model: Any):
    """Inside, the model has no defaults of generation, which `generate` would mix into ours."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = [
        (m, m.generation_config)
        for m in {id(m): m for m in (model, inner)}.values()
        if hasattr(m, "generation_config")
    ]
    for part, _ in before:
        part.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for part, config in before:
            part.generation_config = config


class _SeededSampling(LogitsProcessor):
    """Turns greedy choice into sampling: argmax(log p + Gumbel noise) is a sample from p.

    The noise of a row comes from a generator seeded with the run's seed and the prompt.
    """

    def __init__(self, sampling: Sampling, requests: Sequence[Request], device: torch.device):
        self._warpers = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._generators = []
        for request in requests:
            seed = seed_of(sampling, request)
            self._generators.append(torch.Generator(device).manual_seed(seed))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        scores = scores.float()
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


class _Counted(StoppingCriteria):
    """Counts tokens and ends rows at their own limits."""

    def __init__(
        self,
        requests: Sequence[Request],
        longest: int,
        stop_ids: Sequence[int],
        on_tokens: Callable[[int], None],
    ):
        self._limits = torch.tensor([request.limit for request in requests])
        self._longest = longest
        self._stop_ids = torch.tensor(list(stop_ids))
        self._on_tokens = on_tokens
        self._running = torch.ones(len(requests), dtype=torch.bool)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._on_tokens(int(self._running.sum()))
        done = input_ids.shape[1] - self._longest
        ended = torch.isin(input_ids[:, -1].cpu(), self._stop_ids)
        self._running &= ~ended & (done < self._limits)
        return (done >= self._limits).to(input_ids.device)


@contextmanager
def autocast(model: Any):
    """As in training: 16-bit weights with norms kept in fp32 need it. What 4-bit weights are packed into says nothing."""
    plain = (p for p in model.parameters() if getattr(p, "quant_state", None) is None)
    dtypes = {p.dtype for p in plain if p.is_floating_point()}
    half = next((d for d in (torch.bfloat16, torch.float16) if d in dtypes), None)
    enabled = half is not None and len(dtypes) > 1
    with torch.autocast(model.device.type, dtype=half, enabled=enabled):
        yield
