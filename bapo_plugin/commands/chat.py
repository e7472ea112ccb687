"""What `bapo chat` does: the model before training and after it, side by side, in one conversation each."""

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from bapo_plugin.answers.prompts import Chat
from bapo_plugin.evaluation.subject import Subject, load_subject, split_targets

_HELP = "A line is a message. /new begins another conversation, /quit or Ctrl-D ends."


def chat(
    targets: Sequence[Path],
    prompts: Sequence[str] = (),
    max_new_tokens: int = 256,
    load_in_4bit: bool | None = None,
    json_to: TextIO | None = None,
) -> None:
    """Ask before and after training: `prompts`, else lines of stdin, else what is typed.

    Only what is typed goes on as a conversation; prompts and lines of a file are asked apart.

    Args:
        targets: a YAML (then its output_dir is the adapter), or folders of adapters of one base model.
        prompts: to ask.
        max_new_tokens: of an answer.
        load_in_4bit: of a model that is loaded without a YAML; None: as its run recorded it.
        json_to: write an object a prompt here, {"prompt", "before", "after": {adapter: answer}}, and nothing else.

    Raises:
        ValueError: no adapter, a tokenizer without a chat template, or a prompt that isn't UTF-8 text.
    """
    prompts = [_text(prompt, "--prompt") for prompt in prompts]
    config, folders = split_targets(targets)
    subject = load_subject(config, folders, load_in_4bit)
    talk = Talk(subject, max_new_tokens)
    show = _printer(len(subject.adapters)) if json_to is None else partial(_write_json, json_to)
    typed = not prompts and sys.stdin.isatty()
    if typed:
        print(_HELP)
    for line in prompts or (_typed() if typed else _lines(sys.stdin)):
        if not typed:
            talk.begin()
        elif line == "/new":
            talk.begin()
            continue
        show(line, *talk.say(line))


class Talk:
    """A conversation with each state of a model: before training, and with each adapter.

    Args:
        subject: the loaded model.
        max_new_tokens: of an answer.
    """

    def __init__(self, subject: Subject, max_new_tokens: int):
        self._subject = subject
        self._limit = max_new_tokens
        self.begin()

    def begin(self) -> None:
        """Forget what was said."""
        #: with the model before, and with each adapter
        self.before: Chat = []
        self.after: dict[str, Chat] = {name: [] for name in self._subject.adapters}

    def say(self, message: str) -> tuple[str, dict[str, str]]:
        """The answer before, and that of each adapter: greedy, each to its own conversation so far."""
        with self._subject.before():
            before = self._answer(self.before, message)
        after = {}
        for name, chat in self.after.items():
            with self._subject.after(name):
                after[name] = self._answer(chat, message)
        return before, after

    def _answer(self, chat: Chat, message: str) -> str:
        chat.append({"role": "user", "content": message})
        (found,) = self._subject.asker().ask([chat], self._limit)
        text = self._subject.tokenizer.decode(found.answer_ids, skip_special_tokens=True).strip()
        chat.append({"role": "assistant", "content": text})
        return text


def _lines(file: Iterable[str]) -> Iterator[str]:
    lines = iter(file)
    for number in itertools.count(1):
        try:
            line = next(lines, None)
        except UnicodeDecodeError as error:
            raise ValueError(f"stdin is not UTF-8 text ({error}); save it as UTF-8") from None
        if line is None:
            return
        if number == 1:
            line = line.removeprefix("\ufeff")
        if line.strip():
            yield _text(line.strip(), f"stdin, line {number}")


def _text(words: str, of: str) -> str:
    """Words as they are; bytes that are no UTF-8 have become half characters, which no tokenizer takes.

    Raises:
        ValueError: they hold some.
    """
    try:
        words.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{of}: {words[:100]!r} is not UTF-8 text; write it as UTF-8") from None
    return words


def _typed() -> Iterator[str]:
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line:
            yield _text(line, "the message")


def _printer(adapters: int) -> Any:
    console = Console(highlight=False, markup=False, emoji=False)

    def show(prompt: str, before: str, after: dict[str, str]) -> None:
        if not sys.stdin.isatty():
            console.print(Text(f"> {prompt}", style="bold"))
        answers = [("before", before)]
        answers += [("after" if adapters == 1 else name, text) for name, text in after.items()]
        for label, text in answers:
            console.print(Text(f"{label}: ", style="bold").append(text, style="not bold"))
        console.print()

    return show


def _write_json(file: TextIO, prompt: str, before: str, after: dict[str, str]) -> None:
    found = {"prompt": prompt, "before": before, "after": after}
    print(json.dumps(found, ensure_ascii=False), file=file, flush=True)
