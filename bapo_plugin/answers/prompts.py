"""Prompts that are asked besides training rows, and what the model answered to them before training."""

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from bapo_plugin.answers.engine import Request, in_batches
from bapo_plugin.answers.stops import all_stops, stops_of
from bapo_plugin.answers.transformers import TransformersEngine
from bapo_plugin.blocks import GENERAL, UNRELATED, WordsPolicy
from bapo_plugin.rows.errors import RowError
from bapo_plugin.rows.template import ChatTemplate
from bapo_plugin.rows.tokens import Encoder, digest

Chat = list[dict[str, str]]
_DATA = Path(__file__).parent / "data"
#: prompts of many kinds that have nothing to do with anybody's taste, by name: to hold and to measure on, none in both
PACKAGED = {GENERAL: _DATA / "general.txt", UNRELATED: _DATA / "unrelated.jsonl"}


class FormerAnswer(NamedTuple):
    """A prompt and what the reference model answered; `prompt` as the user wrote it, the rest as tokens."""

    prompt: str
    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]


class Asker:
    """Asks a loaded model, greedily, the way base responses are made.

    Args:
        model: a causal LM, in the state in which it is to answer.
        tokenizer: its tokenizer, with its chat template.
        now: what a template that writes the date gets to hear.
        own_stops: tokens that end an answer besides those of tokenizer, model and template
            (`bapo.anchors.stop`).
        policy: special tokens in the words of prompts (`bapo.special_tokens_in_words`).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        now: datetime | None = None,
        own_stops: Iterable[int] = (),
        policy: WordsPolicy = "text",
    ):
        self._tokenizer = tokenizer
        self._now = now
        self._policy = policy
        self._named = stops_of(tokenizer, model)
        ends: list[int | None] = []
        if tokenizer.chat_template:
            ends.append(self._template().end_id)
        self.stop_ids = all_stops(self._named, ends, own_stops)
        self._engine = TransformersEngine(lambda: model, self.stop_ids)

    def _template(self) -> ChatTemplate:
        if not self._tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template to ask prompts with; set `chat_template:` in the YAML"
            )
        return ChatTemplate(
            self._tokenizer, self._tokenizer.chat_template, self._named, self._now, self._policy
        )

    def ask(
        self,
        chats: Sequence[Chat],
        max_new_tokens: int,
        on_answers: Callable[[int], None] = lambda n: None,
    ) -> list[FormerAnswer]:
        """Answers to chats.

        Raises:
            ValueError: the tokenizer has no chat template, or it refuses a chat.
        """
        template = self._template()
        encode = Encoder(self._tokenizer, from_template=True, words=template.words)
        texts = []
        for i, chat in enumerate(chats, start=1):
            try:
                texts.append(template.ask(chat))
                encode.check(texts[-1])
            except RowError as error:
                raise ValueError(f"prompt {i} can't be asked: {error}") from error
        prompts = encode(texts)
        answers = self.answer(prompts, max_new_tokens, on_answers)
        words = [chat[-1]["content"] for chat in chats]
        return [FormerAnswer(*parts) for parts in zip(words, prompts, answers, strict=True)]

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        on_answers: Callable[[int], None] = lambda n: None,
    ) -> list[list[int]]:
        """The likeliest answer to each prompt, token by token, with the token that ends it where there is one."""
        requests = [
            Request(str(i), "", tuple(prompt), max_new_tokens) for i, prompt in enumerate(prompts)
        ]
        found: dict[str, list[int]] = {}
        for batch in in_batches(self._engine, requests):
            for request, answer in self._engine.generate(batch, lambda n: None):
                found[request.key] = list(answer.ids)
            on_answers(len(batch))
        return [found[str(i)] for i in range(len(prompts))]


def held_out_answers(rows: Dataset, tokenizer: Any, count: int | None) -> list[FormerAnswer]:
    """The base responses of tokenised rows, one for each distinct prompt.

    Args:
        rows: with prompt_ids and base_ids, and open_tokens where base_ids begins with tokens that the model was
            asked with.
        tokenizer: to show prompts.
        count: at most so many, evenly spread over the rows; None takes all.
    """
    has_open = "open_tokens" in rows.column_names
    columns = ["prompt_ids", "base_ids", *(["open_tokens"] if has_open else [])]
    # of each distinct prompt the row, since rows may be many and are read again
    first: dict[int, int] = {}
    index = 0
    for part in rows.select_columns(columns).iter(batch_size=1000):
        for values in zip(*(part[name] for name in columns), strict=True):
            asked, answer = _asked(*values)
            if answer:
                first.setdefault(digest(asked), index)
            index += 1
    picked = list(first.values())
    if count is not None and count < len(picked):
        picked = [picked[i * len(picked) // count] for i in range(count)]
    found = []
    for row in rows.select_columns(columns).select(picked):
        asked, answer = _asked(*(row[name] for name in columns))
        found.append(FormerAnswer(tokenizer.decode(asked, skip_special_tokens=True), asked, answer))
    return found


def _asked(
    prompt: list[int], base: list[int], opened: int | None = None
) -> tuple[tuple[int, ...], list[int]]:
    """What the model was asked with, and its answer."""
    opened = opened or 0
    return (*prompt, *base[:opened]), base[opened:]


def read_prompts(path: str | Path, key: str = "prompts") -> list[Chat]:
    """Prompts of a file, as chats.

    Args:
        path: a name in `PACKAGED`; or .txt with a prompt on each line, or .jsonl whose rows have `prompt`: a string or a list
            of messages. UTF-8, with or without a byte order mark; lines end at line feeds and nowhere else.
        key: what named the file, for messages.

    Raises:
        ValueError: the file isn't there, is of another kind, has a row that can't be used, or no prompt.
    """
    path = PACKAGED.get(str(path), Path(path))
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{key}: {path} must be .txt (one a line) or .jsonl (rows with `prompt`)")
    if not path.is_file():
        raise ValueError(f"{key}: there is no file {path}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}: {path} is not UTF-8 text ({error}); save it as UTF-8") from None
    chats = []
    # not splitlines(): text from the web holds U+2028 and others that end no line of a JSONL file
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        prompt: Any = line.strip()
        if path.suffix == ".jsonl":
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{key}: {path}, line {number}: {line[:100]!r} must be a JSON object with `prompt` "
                    f"({type(error).__name__}: {error})"
                ) from None
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not _is_chat(chat):
            raise ValueError(
                f"{key}: {path}, line {number}: prompt {str(prompt)[:100]!r} must be text, or messages with `role` and "
                "`content`, the last one of the user, and not empty"
            )
        chats.append(chat)
    if not chats:
        raise ValueError(f"{key}: {path} has no prompts")
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
        and chat[-1]["role"] != "assistant"
        and bool(chat[-1]["content"].strip())
    )
