"""How base responses are made: by the model on this machine (a server: `server.py`).

An engine takes requests (prompts as tokens, with a limit) and gives answers back as they are ready.
"""

import gc
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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
from transformers.integrations import is_deepspeed_zero3_enabled

from bapo_plugin.compat import keep_4bit_trainable_on_cpu
from bapo_plugin.config import AnchorsConfig

LOG = get_logger("axolotl." + __name__)


@dataclass(frozen=True)
class Request:
    """A prompt to be answered.

    Args:
        key: of the answer in the store.
        prompt: as rendered, with template.
        prompt_ids: its tokens.
        limit: most tokens of the answer.
    """

    key: str
    prompt: str
    prompt_ids: tuple[int, ...]
    limit: int


class Answer(NamedTuple):
    """`text` without the tokens that end a turn; `num_tokens` it has; `cut` by its limit."""

    text: str
    num_tokens: int
    cut: bool


class Engine(Protocol):
    """What makes answers."""

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Split requests into parts that are worked on together."""

    def generate(
        self, requests: Sequence[Request], on_tokens: Callable[[int], None]
    ) -> Iterator[tuple[Request, Answer]]:
        """Answer requests, in the order in which they get ready.

        Args:
            requests: one of `batches`, or a part of one.
            on_tokens: told how many more tokens there are.
        """

    def close(self) -> None:
        """Free memory and connections."""


# ---------------------------------------------------------------- transformers


class TransformersEngine:
    """Batched generation with a KV cache, by the reference model as training loads it.

    Greedy answers are those of one prompt at a time, up to rounding: padding is on the left and masked,
    but a batch of another shape may round differently, which matters where two tokens are equally
    likely. Sampled ones draw from a generator of their own for each prompt, so they depend on the
    seed, the prompt and the kind of device, not on order or batches (again up to rounding).

    Args:
        load: gives the model, in eval mode; called when the first batch is due.
        tokenizer: for padding and decoding.
        anchors: settings of the generation.
        stop_ids: tokens that end an answer.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        tokenizer: Any,
        anchors: AnchorsConfig,
        stop_ids: Sequence[int],
    ):
        self._load = load
        self._model: Any = None
        self._tokenizer = tokenizer
        self._anchors = anchors
        self._stop_ids = list(stop_ids)
        pad = tokenizer.pad_token_id
        self._pad_id = pad if pad is not None else self._stop_ids[0]

    @property
    def model(self) -> Any:
        if self._model is None:
            self._model = self._load()
        return self._model

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Prompts of similar length together, the longest first, within rows and tokens of a batch.

        The split depends on the requests alone, so a run that goes on makes the batches that an
        uninterrupted one makes, and by that the same answers to the bit.
        """
        batches: list[list[Request]] = []
        limit = longest = 0
        for request in sorted(requests, key=lambda r: (-len(r.prompt_ids), r.key)):
            rows = len(batches[-1]) + 1 if batches else 1
            width = max(longest, len(request.prompt_ids)) + max(limit, request.limit)
            full = rows > self._anchors.batch_size or rows * width > self._anchors.batch_tokens
            if not batches or full:
                batches.append([])
                longest = limit = 0
            batches[-1].append(request)
            longest, limit = max(longest, len(request.prompt_ids)), max(limit, request.limit)
        return batches

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

    def token_ids(self, requests: Sequence[Request]) -> list[list[int]]:
        """Answers to one batch as the model made them: with the token that ends it, where there is one."""
        found = []
        for request, ids in zip(requests, self._generate(requests, lambda n: None), strict=True):
            ids = ids[: request.limit]
            end = next((i + 1 for i, token in enumerate(ids) if token in self._stop_ids), None)
            found.append(ids[:end])
        return found

    def _generate(
        self, requests: Sequence[Request], on_tokens: Callable[[int], None]
    ) -> list[list[int]]:
        longest = max(len(request.prompt_ids) for request in requests)
        ids = torch.full((len(requests), longest), self._pad_id)
        mask = torch.zeros_like(ids)
        for i, request in enumerate(requests):
            ids[i, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[i, longest - len(request.prompt_ids) :] = 1
        processors = LogitsProcessorList()
        if self._anchors.temperature > 0:
            processors.append(_SeededSampling(self._anchors, requests, self.model.device))
        with torch.inference_mode(), autocast(self.model):
            out = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=max(request.limit for request in requests),
                    eos_token_id=self._stop_ids,
                    pad_token_id=self._pad_id,
                    use_cache=True,
                ),
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList(
                    [_Counted(requests, longest, self._stop_ids, on_tokens)]
                ),
            )
        return out[:, longest:].tolist()

    def _answer(self, request: Request, ids: list[int]) -> Answer:
        ends = [i for i, token in enumerate(ids[: request.limit]) if token in self._stop_ids]
        kept = ids[: ends[0]] if ends else ids[: request.limit]
        text = self._tokenizer.decode(
            kept, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return Answer(text, len(kept), not ends and bool(text.strip()))

    def close(self) -> None:
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def seed_of(anchors: AnchorsConfig, request: Request) -> int:
    """63 bits that follow from the run's seed and the prompt alone."""
    digest = hashlib.sha256(repr((anchors.seed, request.prompt_ids)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class _SeededSampling(LogitsProcessor):
    """Turns greedy choice into sampling: argmax(log p + Gumbel noise) is a sample from p.

    The noise of a row comes from a generator seeded with the run's seed and the prompt.
    """

    def __init__(self, anchors: AnchorsConfig, requests: Sequence[Request], device: torch.device):
        self._warpers = [TemperatureLogitsWarper(float(anchors.temperature))]
        if anchors.top_p < 1:
            self._warpers.append(TopPLogitsWarper(anchors.top_p))
        self._generators = []
        for request in requests:
            seed = seed_of(anchors, request)
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
    """As in training: 16-bit weights with norms kept in fp32 need it."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    half = next((d for d in (torch.bfloat16, torch.float16) if d in dtypes), None)
    enabled = half is not None and len(dtypes) > 1
    with torch.autocast(model.device.type, dtype=half, enabled=enabled):
        yield


def load_reference(cfg: Any, tokenizer: Any, adapter_dir: str | None) -> Any:
    """The reference model: loaded by axolotl as for training, without the adapter to be trained.

    Args:
        cfg: axolotl's validated configuration.
        tokenizer: axolotl's for this configuration.
        adapter_dir: an adapter that is part of the reference, or None.

    Raises:
        ValueError: the run shards weights over several processes, which generation can't do.
    """
    sharded = cfg.fsdp or cfg.fsdp_config or is_deepspeed_zero3_enabled()
    if sharded and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "rows lack base responses, and FSDP or ZeRO-3 shards the model that would make them; run `bapo "
            "anchors` on this YAML first (with bapo.anchors.engine: server, if the model doesn't fit on one GPU)"
        )
    from axolotl.loaders import ModelLoader
    from peft import PeftModel

    LOG.info(f"Loading {cfg.base_model} to make base responses")
    model, _ = ModelLoader(cfg, tokenizer).load()
    if adapter_dir:
        model = PeftModel.from_pretrained(model, adapter_dir)
    keep_4bit_trainable_on_cpu(model)
    # a model's own defaults (a repetition penalty, sampling) are not part of its distribution
    model.generation_config = GenerationConfig()
    return model.eval()
