"""What a server's reply says. Servers are many and may be ill: nothing is taken from a reply that isn't a whole completion."""

import json
from typing import Any, NamedTuple

# reasons for which a server ends an answer early, with HTTP 200
_BROKEN_OFF = ("abort", "aborted", "cancelled", "content_filter", "error")


class NotACompletion(ValueError):
    """The text says what came instead; asked again, the server may do better."""


class Completion(NamedTuple):
    """An answer as a server gives it.

    Args:
        text: may hold the text of the token that ended it, or not.
        ids: its tokens, where the server shows them.
        cut: whether its limit ended it.
        stopped_by: the token that ended it, where the server names it.
        prompt_tokens: of the prompt, where the server counts them.
        model: the name under which the server answered, where it says so.
    """

    text: str
    ids: list[int] | None
    cut: bool
    stopped_by: Any
    prompt_tokens: int | None
    model: str | None


def read_completion(data: bytes, vocabulary: int) -> Completion:
    """
    Args:
        data: the reply's body.
        vocabulary: number of tokens; ids go up to it.

    Raises:
        NotACompletion: it is something else, several answers or one that was broken off.
    """
    try:
        reply = json.loads(data)
    except ValueError as error:
        raise NotACompletion(f"no JSON ({error}): {_start(data)}") from None
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise NotACompletion(f"something that is not a completion: {_start(data)}")
    if len(choices) != 1:
        raise NotACompletion(f"{len(choices)} answers to one prompt: {_start(data)}")
    (choice,) = choices
    text, ids, reason = choice.get("text"), choice.get("token_ids"), choice.get("finish_reason")
    if not isinstance(text, str):
        raise NotACompletion(f"an answer without text: {_start(data)}")
    if reason in _BROKEN_OFF:
        raise NotACompletion(f"an answer that was broken off (finish_reason: {reason})")
    is_shown = isinstance(ids, list) and bool(ids) and all(type(i) is int for i in ids)
    if is_shown and not 0 <= min(ids) <= max(ids) < vocabulary:
        raise NotACompletion(
            f"token ids from {min(ids)} to {max(ids)}, and the tokenizer has {vocabulary:,} tokens"
        )
    usage, model = reply.get("usage"), reply.get("model")
    counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return Completion(
        text,
        list(ids) if is_shown else None,
        reason == "length",
        choice.get("stop_reason"),
        counted if isinstance(counted, int) else None,
        model if isinstance(model, str) else None,
    )


def _start(data: bytes) -> str:
    return data[:300].decode("utf-8", "replace")
