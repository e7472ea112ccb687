"""Whether a merged model is the one that was trained: log-probs of former answers, with the adapter and merged.

The prompts have nothing to do with anybody's taste, and the answers are the base model's own, so that their drift is what
`bapo eval` calls forgetting. What merging leaves of it, it leaves of the taste.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from bapo_plugin.answers.prompts import Asker, FormerAnswer, read_prompts
from bapo_plugin.answers.transformers import autocast
from bapo_plugin.blocks import UNRELATED
from bapo_plugin.scoring.collator import pad_sequences
from bapo_plugin.scoring.forward import response_logits

PROMPTS, TOKENS = 8, 24

# nats a token: what arithmetic in fp32 may differ by, and from where on a change is no noise of 16 bits
_EXACT, _NOISE = 0.01, 0.1
# share of the change: less is no rounding, and from here on it is all there
_LOST, WHOLE = 0.3, 0.9


@dataclass(frozen=True)
class Kept:
    """What merging left of what an adapter changed.

    Args:
        per_token: between the model with the adapter and the merged one, nats, mean of absolute differences.
        share: slope of the merged model's change of log-probs on the adapter's. Published weights lie on the grid of their
            dtype, so that a change of less than half a step is rounded away, and the share sinks below 1.
    """

    per_token: float
    share: float


def former_answers(model: Any, tokenizer: Any) -> list[FormerAnswer]:
    """Greedy answers of the model in its present state to `PROMPTS` of the probe, at most `TOKENS` tokens each."""
    chats = read_prompts(UNRELATED)
    chats = [chats[i * len(chats) // PROMPTS] for i in range(PROMPTS)]
    asker = Asker(model, tokenizer)
    if tokenizer.chat_template:
        return asker.ask(chats, TOKENS)
    words = [chat[-1]["content"] for chat in chats]
    prompts = [list(ids) for ids in tokenizer(words)["input_ids"]]
    answers = asker.answer(prompts, TOKENS)
    return [FormerAnswer(*parts) for parts in zip(words, prompts, answers, strict=True)]


@torch.no_grad()
def token_logps(model: Any, answers: Sequence[FormerAnswer]) -> Tensor:
    """Log-probs of all tokens of all answers, one after the other, nats, [tokens] fp64."""
    batch = pad_sequences(
        [answer.prompt_ids for answer in answers],
        [answer.answer_ids for answer in answers],
        0,  # masked
    )
    batch = {key: value.to(model.device) for key, value in batch.items()}
    with autocast(model):
        logits = response_logits(model, batch)
    labels = batch["response_labels"][:, None]
    return logits.log_softmax(-1).gather(1, labels)[:, 0].cpu().double()


def logps_off_and_on(model: PeftModel, answers: Sequence[FormerAnswer]) -> tuple[Tensor, Tensor]:
    """Log-probs with the adapter off and on, as in `token_logps`."""
    found = []
    for state in (model.disable_adapter(), nullcontext()):
        with state:
            found.append(token_logps(model, answers))
    return found[0], found[1]


def check_kept(before: Tensor, adapter: Tensor, merged: Tensor, dtype: torch.dtype) -> Kept:
    """
    Args:
        before, adapter, merged: log-probs of the same tokens, without, with and after merging the adapter.
        dtype: of the merged weights.

    Raises:
        ValueError: the merged model isn't the trained one, by more than rounding can do.
    """
    change = adapter - before
    found = Kept(
        float((merged - adapter).abs().mean()),
        float((merged - before) @ change / change.square().sum().clamp_min(1e-12)),
    )
    if not math.isfinite(found.per_token):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"the model overflows in {name}; take another --dtype. Nothing was written"
        )
    lost = found.share < _LOST and float(change.abs().mean()) > _NOISE
    if lost or (dtype == torch.float32 and found.per_token > _EXACT):
        raise ValueError(
            f"the merged model isn't the one that was trained: log-probs of former answers are {found.per_token:.3f} nats a token "
            f"from those with the adapter, and {found.share:.0%} of its change is left. Nothing was written. Serve the adapter "
            "itself (--to vllm), or report this with adapter_config.json; --no-check merges all the same"
        )
    return found
