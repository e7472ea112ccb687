"""What a conversation must not be, and what is odd in it though it can be used."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from bapo_plugin.rows.errors import RowError

Message = dict[str, Any]

#: a row's problem
IDENTICAL = "chosen and rejected are identical: there is no preference in it; remove the row"

#: Unicode keeps these for a program's own use
RESERVED = "".join(map(chr, range(0xFDD0, 0xFDF0)))
_RESERVED = re.compile(f"[{RESERVED}]")

# keys under which a message may hold the model's thoughts
REASONING = ("reasoning_content", "reasoning", "thinking")


def check_characters(text: str, name: str) -> None:
    """Refuse a text that holds what we put in place of special tokens.

    Raises:
        RowError: it does.
    """
    if digit := _RESERVED.search(text):
        raise RowError(
            f"{name} holds U+{ord(digit.group()):04X}, which Unicode keeps free of characters; take it out"
        )


def check_history(history: list[Message]) -> None:
    last = history[-1]
    if last["role"] == "assistant":
        raise RowError(
            "the prompt ends with a message of the assistant, so that the response would be a second answer; name "
            "the column of the prompt with `field_messages: prompt`, or use chat_template.argilla_chat where chosen "
            "and rejected hold whole conversations"
        )
    if last["role"] == "system":
        raise RowError("the prompt has no message of the user; add one or remove the row")
    for i, message in enumerate(history, start=1):
        if message["role"] != "system" and not message["content"].strip():
            if not set(message) & {"tool_calls", *REASONING}:
                where = (
                    "prompt is empty: its last message"
                    if i == len(history)
                    else f"message {i} of the prompt"
                )
                raise RowError(f"{where} has no words; fill it or remove the row")


def check_repeat(prompt: str, chosen: str, rejected: str) -> None:
    """Refuse responses that begin with the prompt, as where columns hold whole texts.

    Raises:
        RowError: both do.
    """
    prompt = prompt.strip()
    if len(prompt.split()) > 1 and all(r.lstrip().startswith(prompt) for r in (chosen, rejected)):
        raise RowError(
            "chosen and rejected both begin with the prompt, so that it would be trained as a part of the answer; leave "
            f"only the answers in them (prompt: {prompt[:60]!r})"
        )


def repeats(prompt: str, responses: Sequence[str]) -> str:
    """A notice where a response holds the whole prompt, "" where none does."""
    prompt = prompt.strip()
    if len(prompt.split()) >= 5 and any(prompt in response for response in responses):
        return "the words of the prompt stand in a response too"
    return ""


def check_system(
    row: Mapping[str, Any], arrives: Callable[[str], bool], used: str | None = None
) -> None:
    """Refuse a column with a system message that the prompt lacks.

    Args:
        arrives: whether the prompt has these words, without white space around them.
        used: the column that the format takes.

    Raises:
        RowError: those of another column don't.
    """
    for column, value in row.items():
        if "system" not in str(column).lower() or not isinstance(value, str) or not value.strip():
            continue
        if column != used and not arrives(value.strip()):
            raise RowError(
                f"the column {column!r} holds a system message ({value.strip()[:60]!r}) that this `type:` leaves out; use it "
                f"with `field_system: {column}` (for chat_template.*) or a `type:` that does, such as chatml.intel, or "
                "remove the column"
            )


def check_words_alone(parts: Mapping[str, Any], row: Mapping[str, Any], tools: str | None) -> None:
    """Refuse what a format leaves out that writes the words of messages and nothing else.

    Args:
        parts: name -> a message, messages or text.
        row: all columns.
        tools: the column of the tools.

    Raises:
        RowError: a message has thoughts or calls a tool, or there are tools.
    """
    remedy = (
        "which this `type:` leaves out; use chat_template.default or chat_template.argilla_chat"
    )
    for name, value in parts.items():
        for message in value if isinstance(value, list) else [value]:
            for key in ("tool_calls", *REASONING):
                held = message.get(key) if isinstance(message, Mapping) else None
                if _objects(held) if key == "tool_calls" else held and str(held).strip():
                    raise RowError(f"a message of {name} holds {key}, {remedy}")
    if _objects(row.get(tools)):
        raise RowError(f"the column {tools!r} holds tools, {remedy}, or remove the column")


def _objects(value: Any) -> Any:
    """A list or object that isn't empty, also one that is written as JSON; words are none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, list | Mapping) else None


def odd_order(history: Sequence[Message]) -> str:
    """Roles that don't take turns, as "user, user"; "" where they do. Some data is like that; it is said once."""
    roles = [m["role"] for m in history]
    turns = roles[1:] if roles[0] == "system" else roles
    follow = {
        "user": ("assistant",),
        "assistant": ("user", "tool"),
        "tool": ("assistant", "tool", "user"),
    }
    if turns[0] != "user":
        return f"{turns[0]} first"
    for before, after in pairwise(turns):
        if after not in follow.get(before, ()):
            return f"{before}, {after}"
    return ""


def check_head(name: str, head: list[Message], history: list[Message]) -> None:
    """Messages before a response repeat the prompt, or they are another one."""
    if head and plain(head) != plain(history)[-len(head) :]:
        raise RowError(
            f"{name} brings another history than the prompt; make them equal, keep only the response in {name}, or "
            "use chat_template.argilla_chat, which takes the prompt from chosen"
        )


def plain(messages: Sequence[Message]) -> list[tuple]:
    """What makes histories the same: roles, words, and what tools are called with."""
    return [
        (m["role"], m["content"].strip(), [c["function"] for c in m.get("tool_calls") or ()])
        for m in messages
    ]


def with_text_arguments(message: Message) -> Message:
    """The message with the arguments of its tool calls as JSON text, which some templates want."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = dict(call["function"])
        if isinstance(function.get("arguments"), dict):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append(call | {"function": function})
    return message | {"tool_calls": calls} if calls else message
