"""Whether a merged model is the one that was trained: log-probs of former answers, with the adapter and merged.

The prompts have nothing to do with anybody's taste, and the answers are the base model's own, so that their drift is what
`bapo eval` calls forgetting. Merging may not move it.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from bapo_plugin.answers.prompts import Asker, FormerAnswer, read_prompts
from bapo_plugin.answers.transformers import autocast
from bapo_plugin.evaluation.run import PROBE
from bapo_plugin.scoring.collator import pad_sequences
from bapo_plugin.scoring.forward import response_logits

PROMPTS, TOKENS = 8, 24

# nats a token, on average over all tokens; see docs/serving.md for what rounding to 16 bits does
TOLERANCE = 0.1


def former_answers(model: Any, tokenizer: Any) -> list[FormerAnswer]:
    """Greedy answers of the model in its present state to `PROMPTS` of the probe, at most `TOKENS` tokens each."""
    chats = read_prompts(PROBE)
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


def check_kept(adapter: Tensor, merged: Tensor) -> float:
    """
    Args:
        adapter, merged: log-probs of the same tokens.

    Returns:
        nats a token between the two, the mean of absolute differences.

    Raises:
        ValueError: more than `TOLERANCE`.
    """
    difference = float((merged - adapter).abs().mean())
    if not difference <= TOLERANCE:  # NaN is no success either
        raise ValueError(
            f"the merged model isn't the one that was trained: log-probs of former answers are {difference:.3f} nats a token "
            f"away from those with the adapter (at most {TOLERANCE} is rounding). Nothing was written. Serve the adapter "
            "itself (--to vllm), or report this with adapter_config.json; --no-check merges all the same"
        )
    return difference
