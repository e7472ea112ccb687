"""A conversation as text, by the model's own chat template, and the proof that it is the same conversation.

A prompt is what the template writes before the assistant speaks (its generation prompt); a response is what the
template's text of the whole conversation has more. Where both part, the response begins: so templates that open,
close, drop or rewrite a block of thoughts, trim, or write nothing, are right by construction. What can't be right
by construction is checked in every row: the words of the row are there, and the turn ends once, where the model
ends it.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from bapo_plugin.rows.conversation import Conversation
from bapo_plugin.rows.errors import RowError
from bapo_plugin.rows.oddities import REASONING, Message

_SPACE = re.compile(r"\s+")
_THOUGHTS = re.compile(r".*</think>", re.DOTALL)


class RenderedRow(NamedTuple):
    """A row as text.

    Args:
        ask: what the model is asked with: the generation prompt.
        prompt: the beginning that `ask` and all responses share.
        chosen, rejected: what follows `prompt`, up to the end of the turn.
        base: likewise; None where it has to be generated.
        base_cut: a limit cut the base response, so it has no end of turn.
        words: the prompt's own words, to show.
        notices: what is odd in the row though it can be used.
    """

    ask: str
    prompt: str
    chosen: str
    rejected: str
    base: str | None
    base_cut: bool
    words: str
    notices: tuple[str, ...] = ()


class ChatTemplate:
    """A chat template with its tokenizer's special tokens, and where its turns end.

    Args:
        tokenizer: gives the special tokens.
        template: jinja text.
        stops: ids of tokens that are known to end an answer (of tokenizer and model).
        now: what a template that writes the date gets to hear; None: the time of each call.

    Raises:
        ValueError: the template can't write a question and an answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        stops: Iterable[int] = (),
        now: datetime | None = None,
    ):
        self.text = template
        self._tokenizer = tokenizer
        self._kwargs: dict[str, Any] = {"strftime_now": now.strftime} if now else {}
        known = set(stops)
        self._end = _find_end(tokenizer, self._apply, known)
        #: token that ends a turn
        self.end_id = self._end.token
        self._stops = StopTexts(tokenizer, (known | {self.end_id}) - {None})

    @property
    def end(self) -> str:
        """What ends a turn; where `end_id` is None it is text that is no token, and nothing stops a model there."""
        return self._end.text

    @property
    def writes_the_date(self) -> bool:
        return "strftime_now" in self.text

    def ask(self, history: Sequence[Message], tools: list[dict] | None = None) -> str:
        """The text that asks the model to answer.

        Raises:
            RowError: the template refuses the messages, or leaves out some of their words.
        """
        text = self._apply(history, tools, ask=True)
        _check_history(text, history, tools)
        return text

    def render(
        self, conversation: Conversation, base: str | Message | None = None, cut: bool = False
    ) -> RenderedRow:
        """A row as text.

        Args:
            base: what the model said before training: text, taken as a message where the template then
                writes what the model was asked with, else to the letter; or a message.
            cut: a limit cut it.

        Raises:
            RowError: the template refuses the conversation, leaves out words of it, or writes the prompt
                otherwise once an answer follows.
        """
        history, tools = conversation.history, conversation.tools
        ask = self.ask(history, tools)
        wholes, notices = [], []
        for name, message in (("chosen", conversation.chosen), ("rejected", conversation.rejected)):
            whole, doubled = self._whole(history, message, tools)
            start = _end_of_words(ask, whole, history)
            self._check_response(whole[start:], message, name)
            if doubled:
                notices.append(f"{name} brings an end of turn of its own, which was taken off")
            wholes.append(whole)
        if wholes[0] == wholes[1]:
            raise RowError(
                "chosen and rejected are identical: there is no preference in it; remove the row"
            )
        if base is not None:
            wholes.append(self._base(history, tools, ask, base, cut))
        prompt = common_prefix([ask, *wholes])
        rest = [whole[len(prompt) :] for whole in wholes]
        words = history[-1]["content"]
        return RenderedRow(
            ask,
            prompt,
            rest[0],
            rest[1],
            rest[2] if base is not None else None,
            cut,
            words,
            tuple(notices),
        )

    def _base(
        self,
        history: Sequence[Message],
        tools: list[dict] | None,
        ask: str,
        base: str | Message,
        cut: bool,
    ) -> str:
        if isinstance(base, str) and cut:
            return ask + base
        message = {"role": "assistant", "content": base} if isinstance(base, str) else base
        whole, _ = self._whole(history, message, tools)
        start = _end_of_words(ask, whole, history)
        if isinstance(base, str) and not (
            whole.startswith(ask) and has_words(whole[start:], self._stops.strip(base))
        ):
            # the template writes a message otherwise than the model goes on after what it was asked with
            return ask + self._stops.strip(base) + self._end.text
        self._check_response(whole[start:], message, "base")
        return whole.removesuffix(self._end.text) if cut else whole

    def _check_response(self, text: str, message: Message, name: str) -> None:
        thoughts = next(
            (message[key] for key in REASONING if isinstance(message.get(key), str)), ""
        )
        for part in (thoughts, message["content"]):
            if not has_words(text, self._stops.strip(part)):
                kept, shown = text[:60], part.strip()[:60]
                raise RowError(
                    f"the chat template does not write {name} as the row has it: {shown!r} became {kept!r}"
                    + (
                        "; it leaves thoughts out, so this data needs a template that writes them"
                        if "</think>" in part or part is thoughts
                        else "; use another template, or mend the row"
                    )
                )
        _check_calls(text, message, name)

    def _whole(
        self, history: Sequence[Message], message: Message, tools: list[dict] | None
    ) -> tuple[str, bool]:
        """The conversation with this answer, up to the end of its turn; whether the answer brought an end of
        its own."""
        text = self._apply([*history, message], tools)
        tail = self._end.tail
        if tail and text.endswith(tail):
            text = text[: -len(tail)]
        elif not tail:
            pass
        else:  # a turn that ends otherwise, such as a call of a tool
            return self._stops.close(text, self._end.text), False
        body = self._stops.strip(text)
        return body + self._end.text, body != text

    def _apply(
        self, messages: Sequence[Message], tools: list[dict] | None = None, ask: bool = False
    ) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self.text,
                add_generation_prompt=ask,
                tokenize=False,
                **self._kwargs,
            )
        except Exception as error:  # jinja's own, and whatever the template runs into
            raise RowError(
                f"the chat template refuses the messages ({' → '.join(m['role'] for m in messages)}): "
                f"{type(error).__name__}: {error}"
            ) from error


def common_prefix(parts: Sequence[Any]) -> Any:
    """The beginning that all texts, or all lists, share."""
    first, last = min(parts), max(parts)
    for i, item in enumerate(first):
        if item != last[i]:
            return first[:i]
    return first


# ---------------------------------------------------------------- words


def _check_history(ask: str, history: Sequence[Message], tools: list[dict] | None) -> None:
    for i, message in enumerate(history, start=1):
        content = message["content"]
        if message["role"] == "assistant" and "</think>" in content:
            content = _THOUGHTS.sub(
                "", content
            )  # templates drop old thoughts, as they are meant to
        if not has_words(ask, content) and not (
            message["role"] == "tool"
            and has_words(ask, json.dumps(content, ensure_ascii=False)[1:-1])
        ):
            raise RowError(
                f"the chat template leaves out words of message {i} of the prompt ({message['role']}: "
                f"{content[:60]!r}); use a template that writes such messages, or remove the message"
            )
        _check_calls(ask, message, f"message {i} of the prompt")
    for tool in tools or ():
        name = tool.get("function", tool).get("name")
        if name and str(name) not in ask:
            raise RowError(
                f"the chat template doesn't write the tool {name!r} into the prompt; use a template that takes tools, "
                "or remove the column of the tools"
            )


def _check_calls(text: str, message: Message, name: str) -> None:
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, dict) else {}
        if str(function.get("name")) not in text:
            raise RowError(
                f"the chat template doesn't write the tool call {function.get('name')!r} of {name}; use a template that "
                "takes tool calls"
            )


def has_words(text: str, words: str) -> bool:
    """Whether all the words are there in their order; white space may be another one."""
    return words.strip() in text or _SPACE.sub("", words) in _SPACE.sub("", text)


def _end_of_words(ask: str, whole: str, history: Sequence[Message]) -> int:
    """Where the last message's own words end, which must be before the prompt and the conversation part.

    Raises:
        RowError: they part before.
    """
    both = common_prefix([ask, whole])
    words = history[-1]["content"].strip()
    found = both.rfind(words)
    if found >= 0:
        return found + len(words)
    if words in ask:
        raise RowError(
            "the chat template writes the prompt otherwise once an answer follows, so that responses can't share its "
            "text; use another template, or rows without what it rewrites"
        )
    return 0  # words that the template writes in another way


# ---------------------------------------------------------------- ends


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
        # longest first, so that of two names that begin alike the whole one is taken
        names = "|".join(
            re.escape(text) for text in sorted(special.values(), key=len, reverse=True)
        )
        ends = "|".join(re.escape(text) for text in sorted(self._ends, key=len, reverse=True))
        self._tail = re.compile(rf"(?:\s|{names})+\Z" if names else r"\s+\Z")
        self._end = re.compile(ends) if ends else None

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

    def _first(self, text: str) -> re.Match | None:
        if self._end is None or not (tail := self._tail.search(text)):
            return None
        return self._end.search(text, tail.start())


def special_texts(tokenizer: Any) -> dict[int, str]:
    """Ids of special and added tokens, and how they are written."""
    return {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()} | {
        i: str(text)
        for i, text in zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=False)
    }


class _End(NamedTuple):
    """How turns of the assistant end.

    Args:
        text: what ends a turn, up to the token that does it.
        token: its id, or None where nothing does.
        tail: what the template writes after an answer that ends the conversation.
    """

    text: str
    token: int | None
    tail: str


def _find_end(tokenizer: Any, apply: Callable[..., str], stops: set[int]) -> _End:
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
            f"the chat template can't write a question and an answer: {error}; check `chat_template:`"
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
            return _End(candidate[:end], token, tail)
    # nothing is written after the last answer: what begins the next turn may be what the model stops at
    if not always.strip():
        first = next(iter(_names(special, following)), None)
        if first and not following[: first.start()].strip() and special[first.group()] in stops:
            return _End(first.group(), special[first.group()], tail)
        return _End(tokenizer.eos_token or "", tokenizer.eos_token_id, tail)
    return _End(always.rstrip(), None, tail)  # words that are no token of this tokenizer


def _names(special: dict[str, int], text: str) -> list[re.Match]:
    if not special:
        return []
    return list(re.finditer("|".join(map(re.escape, sorted(special, key=len, reverse=True))), text))
