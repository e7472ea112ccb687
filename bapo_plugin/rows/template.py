"""A conversation as text, by the model's own chat template, and the proof that it is the same conversation.

A prompt is what the template writes before the assistant speaks (its generation prompt); a response is what the
template's text of the whole conversation has more. Where both part, the response begins: so templates that open,
close, drop or rewrite a block of thoughts, trim, or write nothing, are right by construction. What can't be right
by construction is checked in every row: the words of the row are there, and the turn ends once, where the model
ends it.
"""

import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from bapo_plugin.blocks import WordsPolicy
from bapo_plugin.rows.conversation import BaseResponse, Conversation
from bapo_plugin.rows.ends import StopTexts, common_prefix, find_end
from bapo_plugin.rows.errors import RowError
from bapo_plugin.rows.oddities import IDENTICAL, REASONING, Message, with_text_arguments
from bapo_plugin.rows.words import Words

_SPACE = re.compile(r"\s+")
_THOUGHTS = re.compile(r".*</think>", re.DOTALL)
# an answer that no template takes for anything else
_ANY = "zebra"
_SWITCHES = re.compile(r"/(?:no_)?think\b|/system_override\b")


class RenderedRow(NamedTuple):
    """A row as text, with stand-ins for special tokens in its words (`rows.words`).

    Args:
        ask: what the model is asked with: the generation prompt.
        prompt: the beginning that `ask` and all responses share.
        chosen, rejected: what follows `prompt`, up to the end of the turn; None in a prompt without a preference.
        base: likewise; None where it has to be generated.
        base_cut: a limit cut the base response, so it has no end of turn.
        base_tokens: the ids that the model gave right after `ask`, and their text, where the row has them.
        words: the prompt's own words, to show.
        notices: what is odd in the row though it can be used.
    """

    ask: str
    prompt: str
    chosen: str | None
    rejected: str | None
    base: str | None
    base_cut: bool
    base_tokens: tuple[tuple[int, ...], str] | None
    words: str
    notices: tuple[str, ...] = ()


class ChatTemplate:
    """A chat template with its tokenizer's special tokens, and where its turns end.

    Args:
        tokenizer: gives the special tokens.
        template: jinja text.
        stops: ids of tokens that are known to end an answer (of tokenizer and model).
        now: what a template that writes the date gets to hear; None: the time of each call.
        policy: special tokens in the words of messages, see `Words`.

    Raises:
        ValueError: the template can't write a question and an answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        stops: Iterable[int] = (),
        now: datetime | None = None,
        policy: WordsPolicy = "text",
    ):
        self.text = template
        self._tokenizer = tokenizer
        self._kwargs: dict[str, Any] = {"strftime_now": now.strftime} if now else {}
        known = set(stops)
        self._end = find_end(tokenizer, self._apply, known)
        #: token that ends a turn
        self.end_id = self._end.token
        ends = (known | {self.end_id}) - {None}
        self._stops = StopTexts(tokenizer, ends)
        #: knows the stand-ins in texts that this template writes
        self.words = Words(tokenizer, policy, ends)

    @property
    def end(self) -> str:
        """What ends a turn; where `end_id` is None it is text that is no token, and nothing stops a model there."""
        return self._end.text

    def ask(self, history: Sequence[Message], tools: list[dict] | None = None) -> str:
        """The text that asks the model to answer, with stand-ins for special tokens in its words.

        Raises:
            RowError: the template refuses the messages, or leaves out some of their words.
        """
        return self._ask(
            self.words.hide(history, "the prompt"), self.words.hide_below(tools, "tools")
        )

    def _ask(self, history: Sequence[Message], tools: list[dict] | None) -> str:
        text = self._apply(history, tools, ask=True)
        _check_history(text, history, tools)
        self.words.check(text, "the prompt")
        return text

    def render(self, conversation: Conversation, base: BaseResponse | None = None) -> RenderedRow:
        """A row as text.

        Args:
            base: what the model said before training: text, taken to the letter behind what the model was asked with
                and what the template itself opens there; or a message.

        Raises:
            RowError: the template refuses the conversation, leaves out words of it, or writes the prompt
                otherwise once an answer follows.
        """
        history = self.words.hide(conversation.history, "the prompt")
        tools = self.words.hide_below(conversation.tools, "tools")
        ask = self._ask(history, tools)
        # what stands before the assistant is spoken to, and must stay so when it has answered
        told = common_prefix([ask, self._apply(history, tools)])
        wholes, notices = [], []
        for name, message in (("chosen", conversation.chosen), ("rejected", conversation.rejected)):
            message = self._own_words(message, name)
            whole, doubled = self._whole(history, message, tools)
            self._check_response(told, whole, message, name)
            if doubled:
                notices.append(f"{name} brings an end of turn of its own, which was taken off")
            wholes.append(whole)
        if wholes[0] == wholes[1]:
            raise RowError(IDENTICAL)
        if base is not None:
            wholes.append(self._base(history, tools, ask, told, base))
        if notice := self.words.notice([ask, *wholes]):
            notices.append(notice)
        prompt = common_prefix([ask, *wholes])
        rest = [whole[len(prompt) :] for whole in wholes]
        return RenderedRow(
            ask=ask,
            prompt=prompt,
            chosen=rest[0],
            rejected=rest[1],
            base=None if base is None else rest[2],
            base_cut=base is not None and base.cut,
            base_tokens=tokens_of(base),
            words=history[-1]["content"],
            notices=tuple(notices),
        )

    def _base(
        self,
        history: Sequence[Message],
        tools: list[dict] | None,
        ask: str,
        told: str,
        base: BaseResponse,
    ) -> str:
        if not isinstance(base.said, str):
            message = self._own_words(base.said, "base")
            whole, _ = self._whole(history, message, tools)
            self._check_response(told, whole, message, "base")
            return whole.removesuffix(self._end.text) if base.cut else whole
        # special tokens in what a model said are those that it gave
        said = self._strip(base.said)
        # among its ids, where they are there, the model itself has told text from ends
        if base.tokens is None and (end := self._stops.first_inside(said)):
            raise RowError(f"base goes on behind an end of turn ({end!r}); cut it there")
        if base.cut:
            return ask + said
        # words that came with tokens came right behind what the model was asked with
        head = ask if base.tokens else self._head(history, tools, ask, said)
        return head + said + self._end.text

    def _head(
        self, history: Sequence[Message], tools: list[dict] | None, ask: str, said: str
    ) -> str:
        """What stands before the words of a model: what it was asked with, and what the template itself writes between
        that and any answer, such as an empty block of thoughts. Words that begin with what the prompt opens, such as
        <think>, stand for it. A template that doesn't write the words to the letter has no say."""

        def before(words: str) -> str:
            try:
                whole, _ = self._whole(history, {"role": "assistant", "content": words}, tools)
            except RowError:
                return ask
            head = whole.removesuffix(words + self._end.text)
            return head if whole.startswith(ask) and head != whole else ask

        head = before(said) if said.strip() else ask
        if len(head) <= len(ask):  # white space is nothing that a prompt opens
            return head if ask[len(head) :].strip() else ask
        begun = common_prefix([head[len(ask) :].lstrip(), said.lstrip()]).strip()
        return head if len(begun) <= 2 and before(_ANY) == head else ask

    def _own_words(self, message: Message, name: str) -> Message:
        """An answer with stand-ins for special tokens in its words; the end of turn that it brings is none of them.

        Raises:
            RowError: it goes on behind an end of turn.
        """
        body = self._strip(message["content"])
        self._refuse_inside(body, name)
        tail = message["content"][len(body) :]
        hidden = self.words.hide(message | {"content": body}, name)
        self.words.check(hidden["content"], name)
        return hidden | {"content": hidden["content"] + tail}

    def _refuse_inside(self, content: str, name: str) -> None:
        if end := self._stops.first_inside(content):
            raise RowError(
                f"{name} goes on behind an end of turn ({end!r}), as if it held several turns; leave one answer in it"
            )

    def _strip(self, text: str) -> str:
        """A text without the end of turn that it brings."""
        end = self._end.text
        if end and text.rstrip().endswith(end):
            text = text.rstrip()[: -len(end)]
        return self._stops.strip(text)

    def _check_response(self, told: str, whole: str, message: Message, name: str) -> None:
        if not whole.startswith(told):
            raise RowError(
                f"the chat template writes the prompt otherwise once {name} follows, so that responses can't share its text; "
                "use another template, or rows without what it rewrites"
            )
        text = whole[len(told) :]
        content = self._strip(message["content"])
        if not content.strip() and not message.get("tool_calls"):
            raise RowError(f"{name} is empty but for an end of turn; fill it or remove the row")
        self._refuse_inside(content, name)
        thoughts = next((message[key] for key in REASONING if message.get(key)), "")
        if not has_words(text, thoughts, content):
            shown = thoughts if not has_words(text, thoughts) else content
            raise RowError(
                f"the chat template does not write {name} as the row has it: {shown.strip()[:60]!r} became {text[:60]!r}"
                + (
                    "; it leaves thoughts out, so this data needs a template that writes them"
                    if "</think>" in content or thoughts
                    else "; use another template, or mend the row"
                )
            )
        _check_calls(text, [message], name)

    def _whole(
        self, history: Sequence[Message], message: Message, tools: list[dict] | None
    ) -> tuple[str, bool]:
        """The conversation with this answer, up to the end of its turn; whether the answer brought an end of
        its own."""
        text = self._apply([*history, message], tools)
        tail = self._end.tail
        if not text.endswith(tail):  # a turn that ends otherwise, such as a call of a tool
            return self._stops.close(text, self._end.text), False
        text = text.removesuffix(tail)
        body = self._strip(text)
        return body + self._end.text, body != text

    def _apply(
        self, messages: Sequence[Message], tools: list[dict] | None = None, ask: bool = False
    ) -> str:
        def write(messages: Sequence[Message]) -> str:
            return self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self.text,
                add_generation_prompt=ask,
                tokenize=False,
                **self._kwargs,
            )

        try:
            return write(messages)
        except Exception as error:  # jinja's own, and whatever the template runs into
            if any(message.get("tool_calls") for message in messages):
                try:  # some templates want arguments as text
                    return write([with_text_arguments(message) for message in messages])
                except Exception:
                    pass  # nosec B110 # the first error is the one to tell
            raise RowError(
                f"the chat template refuses the messages ({' → '.join(m['role'] for m in messages)}): "
                f"{type(error).__name__}: {error}"
            ) from error


def tokens_of(base: BaseResponse | None) -> tuple[tuple[int, ...], str] | None:
    """Ids and text of a base response that brings its tokens."""
    if base is None or base.tokens is None:
        return None
    return base.tokens, base.text


# ---------------------------------------------------------------- words


def _check_history(ask: str, history: Sequence[Message], tools: list[dict] | None) -> None:
    for i, message in enumerate(history, start=1):
        content = message["content"]
        if message["role"] == "assistant":
            content = _THOUGHTS.sub(
                "", content
            )  # templates drop old thoughts, as they are meant to
        if message["role"] == "system":
            content = _SWITCHES.sub("", content)  # read by the template, not written
        escaped = json.dumps(content, ensure_ascii=False)[1:-1]
        if not has_words(ask, content) and not (
            message["role"] == "tool" and has_words(ask, escaped)
        ):
            raise RowError(
                f"the chat template leaves out words of message {i} of the prompt ({message['role']}: "
                f"{content[:60]!r}); use a template that writes such messages, or remove the message"
            )
    for tool in tools or ():
        name = tool.get("function", tool).get("name")
        if name and str(name) not in ask:
            raise RowError(
                f"the chat template doesn't write the tool {name!r} into the prompt; use a template that takes tools, "
                "or remove the column of the tools"
            )
    _check_calls(ask, history, "the prompt", json.dumps(tools or []))


def _check_calls(text: str, messages: Sequence[Message], name: str, besides: str = "") -> None:
    """Every tool call is there, with its arguments.

    Args:
        text: where they must be.
        messages: with the calls.
        name: of the text.
        besides: what else in the text may hold the names of tools.
    """
    calls = [call["function"] for message in messages for call in message.get("tool_calls") or ()]
    for function in calls:
        tool = str(function["name"])
        wanted = sum(str(other["name"]) == tool for other in calls) + (tool in besides)
        arguments = function.get("arguments")
        values = arguments.values() if isinstance(arguments, dict) else ()
        texts = [value for value in values if isinstance(value, str)]
        if text.count(tool) < wanted or any(
            value not in text and json.dumps(value, ensure_ascii=False)[1:-1] not in text
            for value in texts
        ):
            raise RowError(
                f"the chat template doesn't write the tool call {tool!r} of {name} with all its arguments; use a template "
                "that takes tool calls"
            )


def has_words(text: str, *parts: str) -> bool:
    """Whether all the words of the parts are there in their order; white space may be another one."""
    place = 0
    for part in parts:
        found = text.find(part.strip(), place)
        if found < 0:
            break
        place = found + len(part.strip())
    else:
        return True
    text, place = _SPACE.sub("", text), 0
    for part in parts:
        part = _SPACE.sub("", part)
        found = text.find(part, place)
        if found < 0:
            return False
        place = found + len(part)
    return True
