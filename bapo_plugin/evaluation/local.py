"""The paper's evaluations with rows of local files (`bapo eval --data FOLDER`).

A file is read and checked whole before a model is loaded; lm-eval then gets its rows in place of the hub's.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

LOCAL_TASKS = Path(__file__).parent / "local_tasks"


class _Fault(ValueError):
    """What is wrong with a row, and what mends it."""


@dataclass(frozen=True)
class LocalTask:
    """A task whose rows come from a file.

    Args:
        file: its name in the folder.
        read: row of the file -> row of the task, or None where the row is of no use to it.
        part: column of the task's rows; a limit is spread over its values.
        keys: of a row, for messages.
    """

    file: str
    read: Callable[[dict], dict | None]
    part: str
    keys: str


def _text(row: dict, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise _Fault(f"`{key}` is {_shown(row, key)}; it must be text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _Fault(f"`{key}` has half of a surrogate pair; save the file as UTF-8")
    return value


def _question(row: dict, choices: int | None = None) -> dict:
    """question, choices and answer, the index of the right choice."""
    texts, answer = row.get("choices"), row.get("answer")
    if not isinstance(texts, list) or len(texts) < 2:
        raise _Fault(
            f"`choices` is {_shown(row, 'choices')}; it must be a list of two or more texts"
        )
    texts = [_text({f"choices[{i}]": text}, f"choices[{i}]") for i, text in enumerate(texts)]
    if choices and len(texts) != choices:
        raise _Fault(f"`choices` has {len(texts)} texts; it must have {choices}")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(texts):
        raise _Fault(
            f"`answer` is {_shown(row, 'answer')}; it must be the place of the right choice, from 0 to {len(texts) - 1}"
        )
    return {"question": _text(row, "question"), "choices": texts, "answer": answer}


def _scienceqa(row: dict) -> dict | None:
    if row.get("image") is not None:
        return None  # a language model can't see the picture; the hub's are left out too
    hint = row.get("hint")
    if hint not in (None, ""):
        _text(row, "hint")
    return {"subject": _text(row, "group"), "hint": hint or "", **_question(row)}


def _mmlu(row: dict) -> dict | None:
    found = {"subject": _text(row, "subject"), **_question(row, choices=4)}
    return found if _text(row, "group") == "humanities" else None


def _hhh(row: dict) -> dict:
    prompt, chosen, rejected = (_text(row, key) for key in ("prompt", "chosen", "rejected"))
    if chosen == rejected:
        raise _Fault("`chosen` and `rejected` are the same; leave the row out")
    return {"group": _text(row, "group"), "prompt": prompt} | _shuffled(
        [chosen, rejected], 0, prompt
    )


def _truthfulqa(row: dict) -> dict:
    found = {"group": _text(row, "group"), **_question(row)}
    return found | _shuffled(found["choices"], found["answer"], found["question"])


def _shuffled(choices: list[str], answer: int, seed: str) -> dict:
    """The right choice stands first in the file: of equally likely ones the first would win."""
    order = list(range(len(choices)))
    random.Random(seed).shuffle(order)
    return {"choices": [choices[i] for i in order], "answer": order.index(answer)}


_ASKED = "group, question, choices and answer"
LOCAL = {
    "scienceqa": LocalTask("scienceqa.jsonl", _scienceqa, "subject", f"{_ASKED}, and hint"),
    "mmlu_humanities": LocalTask("mmlu.jsonl", _mmlu, "subject", f"{_ASKED}, and subject"),
    "hhh": LocalTask("hhh.jsonl", _hhh, "group", "group, prompt, chosen and rejected"),
    "truthfulqa": LocalTask("truthfulqa.jsonl", _truthfulqa, "group", _ASKED),
}
PAPER_TASKS = ("scienceqa", "mmlu_humanities", "hhh")


def local_task(name: str, folder: Path) -> dict[str, Any]:
    """What lm-eval needs besides the task's YAML: the rows of its file.

    Raises:
        ValueError: there is no such file, or a line of it can't be used.
    """
    rows = Dataset.from_list(read_rows(name, folder))
    # in place of lm-eval's own loading, which would ask the hub or write a cache
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": rows},
        "dataset_path": None,
        "process_docs": None,
    }


def read_rows(name: str, folder: Path) -> list[dict]:
    """Rows of a local task, its groups or subjects taking turns, so that a limit leaves out none.

    Raises:
        ValueError: as `local_task`.
    """
    task = LOCAL[name]
    path = folder / task.file
    if not path.is_file():
        raise ValueError(
            f"--data: there is no file {path}, which the task {name} reads; put it there, or name other --tasks"
        )
    rows = []
    for number, row in _lines(path):
        try:
            if not isinstance(row, dict):
                raise _Fault(f"it is no object; write one with {task.keys}")
            found = task.read(row)
        except _Fault as fault:
            raise ValueError(f"--data: {path}, line {number}: {fault}") from None
        if found:
            rows.append(found)
    if not rows:
        of = " of group `humanities`" if name == "mmlu_humanities" else ""
        raise ValueError(f"--data: {path} has no rows{of}; write one with {task.keys} on each line")
    seen: Counter[str] = Counter()
    turns = []
    for row in rows:
        turns.append(seen[row[task.part]])
        seen[row[task.part]] += 1
    return [rows[i] for i in sorted(range(len(rows)), key=turns.__getitem__)]


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, its JSON) of the lines that aren't blank."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise ValueError(
                f"--data: {path}, line {number}: it is not UTF-8 text; save the file as UTF-8"
            ) from None
        if not text.strip():
            continue
        try:
            yield number, json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"--data: {path}, line {number}: it is not JSON ({error}); write one object on each line"
            ) from None


def _shown(row: dict, key: str) -> str:
    """A value for a message: short, and on one line."""
    if key not in row:
        return f"missing among {', '.join(map(str, row))[:80] or 'no keys'}"
    text = json.dumps(row[key], ensure_ascii=False)
    return text if len(text) <= 40 else text[:40] + " ..."
