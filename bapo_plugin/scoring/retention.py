"""How much of a model is left: what it makes of its own former answers, on prompts outside training.

For a prompt x and the answer y that the reference model gave to it, before training:

    drift       log π_θ(y|x) − log π_ref(y|x), nats, summed over the answer's tokens
    agreement   share of y's tokens at which both models hold the same token most likely
    kl          KL(π_ref ‖ π_θ) of the next token, nats, mean over y's tokens

A model that forgot nothing has 0, 1 and 0. `bapo.retention` logs them in training, `bapo eval` measures a
finished run.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

from bapo_plugin.answers.transformers import Request, TransformersEngine
from bapo_plugin.config import AnchorsConfig
from bapo_plugin.rows.tokens import encode
from bapo_plugin.scoring.collator import pad_sequences

# a batch keeps [tokens × vocabulary] log-probs of two models, in fp32
_LOGITS_BYTES = 256 * 2**20

# batch -> logits of its response tokens, [T, V] fp32; see `forward.response_logits`
Scorer = Callable[[dict[str, Tensor]], Tensor]


class FormerAnswer(NamedTuple):
    """A prompt and what the reference model answered; `prompt` as the user wrote it, the rest as tokens."""

    prompt: str
    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]


@dataclass(frozen=True)
class Retention:
    """One number for each former answer, [n] fp64 each; `tokens` are those of the answers."""

    tokens: Tensor
    drift: Tensor
    agreement: Tensor
    kl: Tensor

    def summary(self) -> dict[str, dict[str, float]]:
        """name -> {"value": mean over answers, "se": its standard error}: drift (nats an answer),
        drift_per_token (nats), agreement (share), kl (nats a token)."""
        parts = {
            "drift": self.drift,
            "drift_per_token": self.drift / self.tokens,
            "agreement": self.agreement,
            "kl": self.kl,
        }
        return {name: mean_and_error(values) for name, values in parts.items()}


def mean_and_error(values: Tensor | Sequence[float]) -> dict[str, float | None]:
    """Mean and its standard error; None as the error of a single value."""
    values = torch.as_tensor(values, dtype=torch.float64)
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return {"value": float(values.mean()), "se": error}


def measure(
    answers: Sequence[FormerAnswer],
    reference: Scorer,
    policies: Mapping[str, Scorer],
    *,
    pad_token_id: int,
    vocab_size: int,
    device: torch.device,
    on_answers: Callable[[int], None] = lambda n: None,
) -> dict[str, Retention]:
    """Compare policies with the reference on its former answers, without gradients.

    Args:
        answers: none of them empty.
        reference, policies: give the logits; called in turns, so one model with adapters will do.
        pad_token_id: fills rows up; masked.
        vocab_size: to choose batches that fit into memory.
        device: where the models are.
        on_answers: told how many more answers are done.

    Returns:
        name of the policy -> its `Retention`, in the order of `answers`.
    """
    found: dict[str, dict[int, tuple[float, float, float]]] = {name: {} for name in policies}
    for part in _batches(answers, vocab_size):
        rows = [answers[i] for i in part]
        batch = pad_sequences(
            [row.prompt_ids for row in rows], [row.answer_ids for row in rows], pad_token_id
        )
        batch = {key: value.to(device) for key, value in batch.items()}
        labels, bounds = batch["response_labels"][:, None], batch["cu_seqlens"].tolist()
        with torch.no_grad():
            ref = torch.log_softmax(reference(batch), dim=-1)  # [T, V]
            ref_logps, ref_best = ref.gather(1, labels)[:, 0], ref.argmax(-1)
            for name, policy in policies.items():
                logps = torch.log_softmax(policy(batch), dim=-1)
                drift = logps.gather(1, labels)[:, 0] - ref_logps
                same = (logps.argmax(-1) == ref_best).double()
                kl = (ref.exp() * (ref - logps)).sum(-1)
                for k, i in enumerate(part):
                    own = slice(bounds[k], bounds[k + 1])
                    found[name][i] = (
                        float(drift[own].double().sum()),
                        float(same[own].mean()),
                        float(kl[own].double().mean()),
                    )
        on_answers(len(part))
    tokens = torch.tensor([len(answer.answer_ids) for answer in answers], dtype=torch.float64)
    out = {}
    for name, rows in found.items():
        columns = torch.tensor([rows[i] for i in range(len(answers))], dtype=torch.float64)
        out[name] = Retention(tokens, *columns.T)
    return out


def _batches(answers: Sequence[FormerAnswer], vocab_size: int) -> Iterator[list[int]]:
    """Indices of answers of similar length, within the memory for logits."""
    most = max(1, _LOGITS_BYTES // (4 * vocab_size))
    part: list[int] = []
    tokens = 0
    for i in sorted(
        range(len(answers)), key=lambda i: len(answers[i].prompt_ids) + len(answers[i].answer_ids)
    ):
        more = len(answers[i].answer_ids)
        if part and tokens + more > most:
            yield part
            part, tokens = [], 0
        part.append(i)
        tokens += more
    if part:
        yield part


# ---------------------------------------------------------------- prompts and answers


def read_prompts(path: str | Path) -> list[list[dict[str, str]]]:
    """Prompts of a file, as chats.

    Args:
        path: .txt with a prompt on each line, or .jsonl whose rows have `prompt`: a string or a list of
            messages.

    Raises:
        ValueError: the file isn't there, is of another kind, has a row that can't be used, or no prompt.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"prompts: {path} must be .txt (one a line) or .jsonl (rows with `prompt`)"
        )
    if not path.is_file():
        raise ValueError(f"prompts: there is no file {path}")
    chats = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        prompt: Any = line.strip()
        if path.suffix == ".jsonl":
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: {line[:100]!r} must be a JSON object with `prompt` "
                    f"({type(error).__name__}: {error})"
                ) from None
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not _is_chat(chat):
            raise ValueError(
                f"{path}, line {number}: prompt {str(prompt)[:100]!r} must be text, or messages with `role` and "
                "`content`, and not empty"
            )
        chats.append(chat)
    if not chats:
        raise ValueError(f"prompts: {path} has no prompts")
    return chats


def _is_chat(chat: Any) -> bool:
    return (
        isinstance(chat, list)
        and bool(chat)
        and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in chat
        )
        and bool(chat[-1]["content"].strip())
    )


def former_answers(
    model: Any,
    tokenizer: Any,
    chats: Sequence[list[dict[str, str]]],
    max_new_tokens: int,
    *,
    on_answers: Callable[[int], None] = lambda n: None,
) -> list[FormerAnswer]:
    """Let a model answer chats greedily; the caller puts it into the state that is the reference.

    Raises:
        ValueError: the tokenizer has no chat template or nothing that ends an answer.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template to ask prompts with; set `chat_template:` in the YAML"
        )
    prompts = [
        encode(
            tokenizer,
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
        )
        for chat in chats
    ]
    answers = greedy_answers(model, tokenizer, prompts, max_new_tokens, on_answers=on_answers)
    words = [chat[-1]["content"] for chat in chats]
    return [FormerAnswer(*parts) for parts in zip(words, prompts, answers, strict=True)]


def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    on_answers: Callable[[int], None] = lambda n: None,
) -> list[list[int]]:
    """The likeliest answer to each prompt, token by token, with the token that ends it where there is one.

    Raises:
        ValueError: nothing ends an answer.
    """
    requests = [
        Request(str(i), "", tuple(prompt), max_new_tokens) for i, prompt in enumerate(prompts)
    ]
    engine = TransformersEngine(
        lambda: model, tokenizer, AnchorsConfig(), stop_ids(model, tokenizer)
    )
    found: dict[str, list[int]] = {}
    for batch in engine.batches(requests):
        for request, ids in zip(batch, engine.token_ids(batch), strict=True):
            found[request.key] = ids
        on_answers(len(batch))
    return [found[str(i)] for i in range(len(prompts))]


def held_out_answers(rows: Dataset, tokenizer: Any, count: int | None) -> list[FormerAnswer]:
    """The base responses of tokenised rows, one for each distinct prompt.

    Args:
        rows: with prompt_ids and base_ids.
        tokenizer: to show prompts.
        count: at most so many, evenly spread over the rows; None takes all.
    """
    distinct = {}
    for row in rows.select_columns(["prompt_ids", "base_ids"]):
        distinct.setdefault(tuple(row["prompt_ids"]), row["base_ids"])
    items = list(distinct.items())
    if count is not None and count < len(items):
        items = [items[i * len(items) // count] for i in range(count)]
    return [
        FormerAnswer(tokenizer.decode(ids, skip_special_tokens=True), ids, answer)
        for ids, answer in items
    ]


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer, of the tokenizer and the model."""
    found = {tokenizer.eos_token_id}
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        found |= set(eos if isinstance(eos, list) else [eos])
    found.discard(None)
    if not found:
        raise ValueError(
            "nothing ends an answer: the tokenizer has no EOS token; set special_tokens.eos_token"
        )
    return sorted(found)
