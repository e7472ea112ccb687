"""Rows of axolotl's `chat_template.*` formats: read into a conversation, written by the template."""

import json
from collections.abc import Mapping
from typing import Any

from bapo_plugin.rows.conversation import Fields, read_base, read_conversation
from bapo_plugin.rows.oddities import check_system, odd_order, repeats
from bapo_plugin.rows.template import ChatTemplate, RenderedRow


class ChatRows:
    """Callable row -> `RenderedRow`, by the chat template.

    Args:
        template: writes the conversation.
        fields: columns and keys of the rows.
    """

    def __init__(self, template: ChatTemplate, fields: Fields):
        self._template = template
        self._fields = fields

    def __call__(self, row: Mapping[str, Any]) -> RenderedRow:
        """Render one row.

        Raises:
            RowError: the row isn't what the format says, or the template doesn't write all of it.
        """
        conversation = read_conversation(row, self._fields)
        base = read_base(row, self._fields, conversation.history)
        rendered = self._template.render(conversation, base)
        # in the row's own messages, since a template's may hold the most common one
        told = "\n".join(m["content"] for m in conversation.history)
        check_system(row, told.__contains__, self._fields.system)
        order = odd_order(conversation.history)
        found = (
            *rendered.notices,
            order and f"roles of the prompt don't take turns ({order})",
            repeats(rendered.words, (rendered.chosen, rendered.rejected)),
        )
        return rendered._replace(notices=tuple(filter(None, found)))


class Prompts:
    """Callable row -> `RenderedRow` without responses, for rows {"chat": list of messages, as JSON}.

    Args:
        template: writes the prompt.
    """

    def __init__(self, template: ChatTemplate):
        self._template = template

    def __call__(self, row: Mapping[str, Any]) -> RenderedRow:
        """Render one prompt.

        Raises:
            RowError: the template refuses the messages, or leaves out some of their words.
        """
        chat = json.loads(row["chat"])
        ask = self._template.ask(chat)
        words = chat[-1]["content"]
        notice = self._template.words.notice([ask])
        return RenderedRow(
            ask, ask, None, None, None, False, None, words, (notice,) if notice else ()
        )
