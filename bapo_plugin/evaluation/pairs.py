"""Has it learned the taste? Adapters on held-out pairs.

With Δ = log π_after − log π_before of a response, nats, a pair is ranked right where Δ_chosen > Δ_rejected, and its margin
is Δ_chosen − Δ_rejected; both are those of training (`rewards/margins` is β times it).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor
from tqdm.auto import tqdm

from bapo_plugin.answers.transformers import autocast
from bapo_plugin.evaluation.refusals import check_finite
from bapo_plugin.evaluation.subject import Subject
from bapo_plugin.scoring.collator import pad_sequences
from bapo_plugin.scoring.forward import ResponseForward

LOG = get_logger("axolotl." + __name__)

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
_TOKENS = 4096  # of a batch, padding counted

Ids = tuple[int, ...]
# prompt and response
Sequence_ = tuple[Ids, Ids]


def pair_margins(
    subject: Subject, pairs: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, dict[str, Tensor]]:
    """Margins of each adapter on each set of pairs, with a progress bar.

    Args:
        subject: the model before training, and its adapters.
        pairs: name of a set -> rows with `COLUMNS`.

    Returns:
        name of a set -> adapter -> margins, nats, [n] fp64, in the order of the rows.

    Raises:
        ValueError: a log-prob isn't finite.
    """
    numbers: dict[Sequence_, int] = {}  # what sets share is scored once
    places = {
        name: torch.tensor(
            [
                [
                    numbers.setdefault((tuple(row["prompt_ids"]), tuple(row[key])), len(numbers))
                    for key in ("chosen_ids", "rejected_ids")
                ]
                for row in rows
            ]
        )
        for name, rows in pairs.items()
    }
    sequences = list(numbers)
    forward = ResponseForward(log=LOG.info)
    total = len(sequences) * (1 + len(subject.adapters))
    with tqdm(total=total, desc="Held-out pairs", unit="response") as bar:
        with subject.before():
            before = _logps(subject, forward, sequences, bar)
        check_finite(before, None, "responses of held-out pairs")
        gains = {}
        for adapter in subject.adapters:
            with subject.after(adapter):
                gains[adapter] = _logps(subject, forward, sequences, bar) - before
            check_finite(gains[adapter], adapter, "responses of held-out pairs")
    return {
        name: {a: gain[place[:, 0]] - gain[place[:, 1]] for a, gain in gains.items()}
        for name, place in places.items()
    }


@torch.no_grad()
def _logps(
    subject: Subject, forward: ResponseForward, sequences: Sequence[Sequence_], bar: Any
) -> Tensor:
    """Log-probs of responses in the state that the model is in, nats, [n] fp64."""
    model, pad = subject.model, subject.pad_token_id
    found = torch.empty(len(sequences), dtype=torch.float64)
    for part in _batches(sequences):
        prompts, responses = zip(*(sequences[i] for i in part), strict=True)
        batch = {k: v.to(model.device) for k, v in pad_sequences(prompts, responses, pad).items()}
        with autocast(model):
            found[part] = forward(model, model, batch).logps.cpu().double()
        bar.update(len(part))
    return found


def _batches(sequences: Sequence[Sequence_]) -> Iterator[list[int]]:
    """Places of sequences of similar length."""
    sizes = [len(prompt) + len(response) for prompt, response in sequences]
    part: list[int] = []
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):
        if (
            part and sizes[i] * (len(part) + 1) > _TOKENS
        ):  # the longest so far: all are padded to it
            yield part
            part = []
        part.append(i)
    if part:
        yield part
