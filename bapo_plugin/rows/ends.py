"""Where an answer ends: tokens that end a turn, in texts, and what a chat template writes behind an answer."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from bapo_plugin.rows.errors import RowError


def common_prefix(parts: Sequence[Any]) -> Any:
    """The beginning that all texts, or all lists, share."""
    first, last = min(parts), max(parts)
    for i, item in enumerate(first):
        if item != last[i]:
            return first[:i]
    return first


class StopTexts:
    """Finds tokens that end an answer at the end of texts.

    Args:
        tokenizer: of the texts.
        stops: ids of tokens that end an answer; those that aren't special tokens play no part here.
    """

    def __init__(self, tokenizer: Any, stops: Iterable[int]):
        special = special_texts(tokenizer)
        self._ends = tuple(special[i] for i in sorted(stops) if i in special)
        self._eos = tokenizer.eos_token or ""
        self._names = tuple(special.values())
        pattern = "|".join(re.escape(text) for text in sorted(self._ends, key=len, reverse=True))
        self._end = re.compile(pattern) if pattern else None

    def strip(self, text: str) -> str:
        """The text without ends of turn at its end; white space before them stays."""
        found = self._first(text)
        return text if found is None else text[: found.start()]

    def close(self, text: str, end: str | None = None) -> str:
        """The text up to the first end of turn at its end; where it has none, with one put there.

        Args:
            end: what is put there; default: the tokenizer's end of sequence.
        """
        found = self._first(text)
        if found is None:
            return text + (self._eos if end is None else end)
        return text[: found.end()]

    def first_inside(self, text: str) -> str | None:
        """An end of turn in a text that should hold none, or None."""
        found = self._end.search(text) if self._end else None
        return found and found.group()

    def _first(self, text: str) -> re.Match | None:
        """The first end in the run of special tokens and white space at the text's end."""
        if self._end is None:
            return None
        start = len(text)
        while True:
            start = len(text[:start].rstrip())
            names = [n for n in self._names if text.endswith(n, 0, start)]
            if not names:
                return self._end.search(text, start)
            start -= max(map(len, names))


def special_texts(tokenizer: Any) -> dict[int, str]:
    """Ids of special and added tokens, and how they are written; white space that is a token of its own is text."""
    found = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    found |= dict(
        zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=False)
    )
    return {i: text for i, text in found.items() if text.strip()}


class End(NamedTuple):
    """How turns of the assistant end.

    Args:
        text: what ends a turn, up to the token that does it.
        token: its id, or None where nothing does.
        tail: what the template writes after an answer that ends the conversation.
    """

    text: str
    token: int | None
    tail: str


def find_end(tokenizer: Any, apply: Callable[[list[dict]], str], stops: set[int]) -> End:
    """By an example: what the template writes after an answer, with and without another turn behind it."""
    said = "zebra"
    try:
        turns = [{"role": "user", "content": "giraffe"}, {"role": "assistant", "content": said}]
        last = apply(turns)
        if said not in last:
            raise RowError(f"the answer {said!r} became {last!r}")
        tail = last[last.rindex(said) + len(said) :]
    except RowError as error:
        raise ValueError(
            f"the chat template can't write a question and an answer: {error}; check `chat_template:` and `chat_template_jinja:`"
        ) from error
    try:
        more = apply([*turns, {"role": "user", "content": "gnu"}])
        following = more[more.rindex(said) + len(said) :]
    except ValueError:
        following = tail  # a template of a single turn
    special = {text: i for i, text in special_texts(tokenizer).items()}
    always = common_prefix([tail, following])
    for candidate in (always, tail):
        # up to the first known stop, else to the last special token: <|END_RESPONSE|><|END_OF_TURN_TOKEN|>
        found = [(m.end(), special[m.group()]) for m in _names(special, candidate)]
        if found:
            end, token = next(((e, i) for e, i in found if i in stops), found[-1])
            return End(candidate[:end], token, tail)
    # nothing is written after the last answer: what begins the next turn may be what the model stops at
    if not always.strip():
        first = next(iter(_names(special, following)), None)
        if first and not following[: first.start()].strip() and special[first.group()] in stops:
            return End(first.group(), special[first.group()], tail)
        return End(tokenizer.eos_token or "", tokenizer.eos_token_id, tail)
    return End(always.rstrip(), None, tail)  # words that are no token of this tokenizer


def _names(special: dict[str, int], text: str) -> list[re.Match]:
    if not special:
        return []
    return list(re.finditer("|".join(map(re.escape, sorted(special, key=len, reverse=True))), text))
