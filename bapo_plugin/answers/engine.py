"""What is asked of a model and what comes back, whoever answers."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Args:
        temperature: 0 is greedy.
        top_p: with a temperature, the nucleus that is sampled from.
        seed: with a temperature; a prompt's answer depends on it and on the prompt alone.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42


@dataclass(frozen=True)
class Request:
    """A prompt to be answered.

    Args:
        key: of the answer.
        prompt: its text, with template, for servers that take no token ids.
        prompt_ids: its tokens.
        limit: most tokens of the answer, the one that ends it included.
    """

    key: str
    prompt: str
    prompt_ids: tuple[int, ...]
    limit: int


class Answer(NamedTuple):
    """Token ids as the model gave them, with the one that ended the answer; `cut`: its limit did."""

    ids: tuple[int, ...]
    cut: bool


class ModelChanged(ValueError):
    """Another model answers than before; the text says how that shows."""


class Engine(Protocol):
    """What makes answers."""

    #: whether answers get ready one by one, not a batch at a time
    streams: bool

    def batches(self, lengths: Sequence[int], limits: Sequence[int]) -> list[int]:
        """Split requests, the longest prompts first, into parts that are worked on together.

        Args:
            lengths, limits: tokens of each prompt, and most tokens of its answer.

        Returns:
            The sizes of the parts.
        """

    def generate(
        self, requests: Sequence[Request], on_tokens: Callable[[int], None]
    ) -> Iterator[tuple[Request, Answer]]:
        """Answer requests, in the order in which they get ready.

        Args:
            requests: a part as `batches` makes them, or some of one.
            on_tokens: told how many more tokens there are.
        """

    def confirm(self) -> None:
        """Make sure that what has answered is still what it was.

        Raises:
            ModelChanged: it isn't.
        """

    def close(self) -> None:
        """Free memory and connections."""


def in_batches(engine: Engine, requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Requests in the parts that an engine works on together, the longest prompts first."""
    ordered = sorted(requests, key=lambda r: (-len(r.prompt_ids), r.key))
    rest = iter(ordered)
    for size in engine.batches([len(r.prompt_ids) for r in ordered], [r.limit for r in ordered]):
        yield list(islice(rest, size))


def seed_of(sampling: Sampling, request: Request) -> int:
    """63 bits that follow from the run's seed and the prompt alone."""
    digest = hashlib.sha256(repr((sampling.seed, request.prompt_ids)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def shown(ids: Sequence[int], stop_ids: Sequence[int]) -> tuple[int, ...]:
    """An answer's tokens without the one that ends it."""
    return tuple(ids[:-1]) if ids and ids[-1] in stop_ids else tuple(ids)
