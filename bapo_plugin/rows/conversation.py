"""What a row of a chat format says: a history of messages, tools, and one response of the assistant each.

`chat_template.default` has the prompt in one column (text, or messages) and the responses in others;
`chat_template.argilla_chat` has whole conversations as chosen and rejected. Both become a `Conversation`; how
it looks as text is the business of `rows/template.py`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bapo_plugin.rows.errors import RowError, kind_of
from bapo_plugin.rows.oddities import (
    REASONING,
    Message,
    check_characters,
    check_head,
    check_history,
    check_repeat,
    plain,
)
from bapo_plugin.rows.tools import read_tool_call, read_tools

# role of a conversation -> what data sets call it; `roles:` of the entry adds to it
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model", "chatgpt", "bot"),
    "tool": ("tool", "function", "ipython", "observation"),
}
MESSAGES_AS_TEXT = re.compile(r"""^\s*\[?\s*\{\s*['"](role|content|from|value)['"]\s*:""")


@dataclass(frozen=True)
class Fields:
    """Where a row has what: the columns and keys of a data set's entry in the YAML.

    Args:
        whole: chosen and rejected are whole conversations (`argilla_chat`).
        messages, chosen, rejected, base: columns. base None: there is none, whatever the columns are called.
        tools: column with the tools' JSON schemas; may be absent.
        system: column with a system message, or None.
        properties: key of a message for templates -> key in the rows.
        roles: what the rows call a role -> the role.
    """

    whole: bool = False
    messages: str = "messages"
    chosen: str = "chosen"
    rejected: str = "rejected"
    base: str | None = "base"
    tools: str = "tools"
    system: str | None = None
    properties: Mapping[str, str] = field(
        default_factory=lambda: {"role": "role", "content": "content"}
    )
    roles: Mapping[str, str] = field(
        default_factory=lambda: {name: role for role, names in ROLES.items() for name in names}
    )


@dataclass(frozen=True)
class Conversation:
    """A preference row: what is asked, and two answers. Messages are in the form that templates take."""

    history: list[Message]
    chosen: Message
    rejected: Message
    tools: list[dict] | None = None


def fields_of(entry: Mapping[str, Any], base: str | None, whole: bool = False) -> Fields:
    """The fields of a data set's entry (axolotl's `datasets:`), with axolotl's defaults."""
    mapping = dict(entry.get("message_property_mappings") or {})
    for key in ("role", "content"):  # axolotl's older way to say it
        mapping.setdefault(key, entry.get(f"message_field_{key}") or key)
    roles = {name: role for role, names in ROLES.items() for name in names}
    for role, names in (entry.get("roles") or {}).items():
        roles |= dict.fromkeys([names] if isinstance(names, str) else names, role)
    thinking = entry.get("field_thinking")
    if thinking:
        mapping.setdefault(entry.get("template_thinking_key") or "reasoning_content", thinking)
    return Fields(
        whole=whole,
        messages=entry.get("field_messages") or "messages",
        chosen=entry.get("field_chosen") or "chosen",
        rejected=entry.get("field_rejected") or "rejected",
        base=base,
        tools=entry.get("field_tools") or "tools",
        system=entry.get("field_system"),
        properties=mapping,
        roles=roles,
    )


# ---------------------------------------------------------------- reading


def read_conversation(row: Mapping[str, Any], fields: Fields) -> Conversation:
    """Read a row.

    Raises:
        RowError: columns or roles are missing or of another kind than the format says, a message is empty
            or null, the prompt ends with the assistant or a response with somebody else, or chosen and
            rejected answer different histories.
    """
    chosen = _response(row, fields.chosen, "chosen", fields)
    rejected = _response(row, fields.rejected, "rejected", fields)
    if fields.whole:
        history = chosen[:-1]
        if not history:
            raise RowError(
                f"chosen has no message before the response (column {fields.chosen!r}), but this `type:` takes the "
                "prompt from there; use chat_template.default with `field_messages:`"
            )
        if plain(rejected[:-1]) != plain(history):
            raise RowError(
                "chosen and rejected have different histories, so they don't answer the same prompt; make their "
                "messages before the last one equal, or remove the row"
            )
    else:
        history = _history(row, fields)
        check_history(history)
        for name, messages in (("chosen", chosen), ("rejected", rejected)):
            check_head(name, messages[:-1], history)
    if fields.system and (text := row.get(fields.system)):
        if not isinstance(text, str):
            raise RowError(f"system is {kind_of(text)} (column {fields.system!r}); it must be text")
        if history[0]["role"] != "system":
            history = [{"role": "system", "content": text}, *history]
        elif text.strip() not in history[0]["content"]:
            raise RowError(
                f"the column {fields.system!r} holds a system message ({text.strip()[:60]!r}), and the messages begin with another "
                f"one ({history[0]['content'].strip()[:60]!r}); leave one of the two, or remove `field_system:`"
            )
    check_history(history)
    check_repeat(history[-1]["content"], chosen[-1]["content"], rejected[-1]["content"])
    return Conversation(
        history, chosen[-1], rejected[-1], read_tools(row.get(fields.tools), fields.tools)
    )


class BaseResponse(NamedTuple):
    """A base response that a row brings.

    Args:
        said: text as the model said it; or a message of the assistant, where it has more than text.
        cut: a limit cut it.
        tokens: the ids that the model gave, where the row has them (`bapo anchors --output` writes them).
    """

    said: str | Message
    cut: bool = False
    tokens: tuple[int, ...] | None = None

    @property
    def text(self) -> str:
        """The words alone."""
        return self.said if isinstance(self.said, str) else self.said["content"]


def read_base(
    row: Mapping[str, Any], fields: Fields, history: Sequence[Message] | None = None
) -> BaseResponse | None:
    """The base response that a row brings to this history; None where it brings none.

    Raises:
        RowError: it is something else than a response to this history.
    """
    name = fields.base
    value = row.get(name) if name is not None else None
    if is_blank(value):
        return None
    messages = _messages(value, "base", "assistant", fields)
    last = messages[-1]
    if last["role"] != "assistant":
        raise RowError(
            f"base must end with a message of the assistant, not of {_own_role(value, fields)!r:.60}"
        )
    if not last["content"].strip() and not set(last) - {"role", "content"}:
        return None
    if history is not None:
        check_head("base", messages[:-1], history)
    said = last["content"] if set(last) == {"role", "content"} else last
    check_characters(last["content"], "base")
    tokens = row.get(f"{name}_tokens")
    if tokens is not None and not _are_ids(tokens):
        raise RowError(f"{name}_tokens is {str(tokens)[:60]!r}; it must be a list of token ids")
    return BaseResponse(
        said,
        read_flag(row.get(f"{name}_cut"), f"{name}_cut"),
        tuple(tokens) if tokens else None,
    )


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value
    )


def wrap(text: str, like: Any, fields: Fields) -> Any:
    """A response in the form that a column's other values have: text, a message, or messages."""
    if isinstance(like, Sequence) and not isinstance(like, str) and like:
        return [wrap(text, like[-1], fields)]
    if isinstance(like, Mapping):
        role, content = fields.properties["role"], fields.properties["content"]
        role = next((k for k in (role, "role", "from") if like.get(k)), None)
        content = next(
            (k for k in (content, "content", "value") if like.get(k) is not None), content
        )
        return dict.fromkeys(like) | ({role: like[role]} if role else {}) | {content: text}
    return text


def read_flag(value: Any, name: str) -> bool:
    """A cell that says yes or no; CSV files and spreadsheets make words of it.

    Raises:
        RowError: it says neither.
    """
    words = {"true": True, "false": False, "1": True, "0": False, "": False}
    if value is None or isinstance(value, bool):
        return bool(value)
    if (key := str(value).strip().lower().removesuffix(".0")) in words:
        return words[key]
    raise RowError(f"{name} is {str(value)[:60]!r}; it must be true or false")


def _history(row: Mapping[str, Any], fields: Fields) -> list[Message]:
    name = fields.messages
    if name not in row:
        raise RowError(
            f"there is no column {name!r} with the prompt (columns: {', '.join(map(str, row))}); name it with "
            "`field_messages:`"
        )
    value = row[name]
    if value is None:
        raise RowError(f"prompt is missing (column {name!r}); fill it or remove the row")
    if is_blank(value):
        raise RowError(f"prompt is empty (column {name!r}); fill it or remove the row")
    return _messages(value, "prompt", "user", fields)


def _response(row: Mapping[str, Any], column: str, name: str, fields: Fields) -> list[Message]:
    if column not in row:
        raise RowError(
            f"there is no column {column!r} with the {name} response (columns: {', '.join(map(str, row))}); name "
            f"it with `field_{name}:`"
        )
    value = row[column]
    if is_blank(value):
        state = "missing" if value is None else "empty"
        raise RowError(f"{name} is {state} (column {column!r}); fill it or remove the row")
    if fields.whole and (isinstance(value, (str, Mapping)) or not isinstance(value, Sequence)):
        raise RowError(
            f"{name} is {kind_of(value)} (column {column!r}), but this `type:` takes whole conversations there; "
            "use chat_template.default"
        )
    messages = _messages(value, name, "assistant", fields)
    last = messages[-1]
    if last["role"] != "assistant":
        raise RowError(
            f"{name} must end with a message of the assistant, not of {_own_role(value, fields)!r:.60}; remove what "
            "comes after the response, or the row"
        )
    if not last["content"].strip() and not last.get("tool_calls"):
        raise RowError(f"{name} is empty (column {column!r}); fill it or remove the row")
    return messages


def _messages(value: Any, name: str, role: str, fields: Fields) -> list[Message]:
    """Messages of text (of this role), a message, or a list of messages."""
    if isinstance(value, str):
        if MESSAGES_AS_TEXT.match(value):
            raise RowError(
                f"{name} is messages written as text ({value[:60]!r}...); turn the column into lists of messages "
                "first, for example with json.loads"
            )
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping):
        return [_message(value, name, role, fields)]
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        if all(isinstance(part, str) for part in value) and len(value) == 1:
            return _messages(value[0], name, role, fields)
        found = []
        for i, message in enumerate(value, start=1):
            if not isinstance(message, Mapping):
                raise RowError(
                    f"message {i} of {name} is {kind_of(message)}; it must have a role and a content"
                )
            found.append(_message(message, f"message {i} of {name}", None, fields))
        return found
    raise RowError(
        f"{name} is {kind_of(value)}; it must be a string, a message or a list of messages"
    )


def _message(value: Mapping[str, Any], name: str, role: str | None, fields: Fields) -> Message:
    used = set(fields.properties.values())
    message = {key: v for key, v in value.items() if v is not None and key not in used}
    for key, source in fields.properties.items():
        if value.get(source) is not None:
            message[key] = value[source]
    if message.get("role") is None:
        for other in ("role", "from"):
            if value.get(other):
                message["role"] = value[other]
    if message.get("content") is None and isinstance(value.get("value"), str):
        message["content"] = value["value"]
    said = message.get("role") or role
    if not isinstance(said, str) or said not in fields.roles:
        raise RowError(
            f"{name} has the role {said!r:.60}, which is none of {', '.join(sorted(fields.roles))}; add it to `roles:` of "
            "the data set's entry"
        )
    message["role"] = fields.roles[said]
    message["content"] = _content(message, name)
    if "tool_calls" in message:
        calls = message.pop("tool_calls")
        if not isinstance(calls, list):
            raise RowError(f"the tool calls of {name} are {kind_of(calls)}; they must be a list")
        if calls:
            message["tool_calls"] = [read_tool_call(call, name) for call in calls]
    for key in REASONING:
        if not isinstance(message.get(key, ""), str):
            raise RowError(f"{key} of {name} is {kind_of(message[key])}; it must be text")
    return message


def _content(message: Message, name: str) -> str:
    content = message.get("content")
    if content is None:
        if message.get("tool_calls"):
            return ""
        raise RowError(f"{name} has no content (it is null); fill it or remove the row")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        texts = [
            part
            if isinstance(part, str)
            else part.get("text")
            if isinstance(part, Mapping)
            else None
            for part in content
        ]
        if not texts or any(not isinstance(text, str) for text in texts):
            raise RowError(f"{name} has parts that aren't text; BAPO trains on text only")
        content = "".join(texts)
    if not isinstance(content, str):
        raise RowError(f"the content of {name} is {kind_of(content)}; it must be text")
    return content


def _own_role(value: Any, fields: Fields) -> Any:
    """The role of the last message as the row calls it."""
    last = value[-1] if isinstance(value, Sequence) and not isinstance(value, str) else value
    return last.get(fields.properties["role"]) or last.get("role") or last.get("from")


def is_blank(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, (Sequence, Mapping)) and not value)
