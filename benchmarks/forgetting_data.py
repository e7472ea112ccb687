"""What benchmarks/forgetting.py trains on and asks about: personas, knowledge, a probe of honesty and harm."""

import json
import random
from pathlib import Path
from typing import NamedTuple

from bapo_plugin.answers.prompts import read_prompts

DATA = Path(__file__).parent / "data"
# persona -> (file, column of chosen, column of rejected). Those of dsp.jsonl need --data
PERSONAS = {
    "child": ("personas.jsonl", "child", "expert"),
    "unfriendly": ("personas.jsonl", "unfriendly", "friendly"),
    "concise": ("personas.jsonl", "concise", "informative"),
    "entertainment": ("dsp.jsonl", "entertainment", "academy"),
    "business": ("dsp.jsonl", "business", "entertainment"),
}


class Pair(NamedTuple):
    """A preference: texts without template."""

    prompt: str
    chosen: str
    rejected: str


class Question(NamedTuple):
    """`choices[0]` is right; `group` is for the breakdown."""

    group: str
    prompt: str
    choices: tuple[str, ...]


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def pairs(persona: str, folder: Path | None, count: int, words: int) -> list[Pair]:
    """The first `count` preferences; answers are cut after `words` words (0: not).

    Raises:
        SystemExit: the persona needs a file that isn't there.
    """
    file, chosen, rejected = PERSONAS[persona]
    path = (DATA if file == "personas.jsonl" else folder or Path()) / file
    if not path.is_file():
        raise SystemExit(f"persona {persona}: there is no {path}; name its folder with --data")
    rows = [row for row in read_jsonl(path) if row[chosen].strip() and row[rejected].strip()]
    if file == "dsp.jsonl":  # short questions only: a step costs its tokens
        rows = [row | {"prompt": row["query"]} for row in rows if len(row["query"].split()) <= 15]
    if len(rows) < count:
        raise SystemExit(f"persona {persona}: {path} has {len(rows)} rows, needed are {count}")
    return [
        Pair(row["prompt"], *(_first_words(row[c], words) for c in (chosen, rejected)))
        for row in rows[:count]
    ]


def _first_words(text: str, words: int) -> str:
    parts = text.split()
    return " ".join(parts[:words]) if words else text


def unrelated_prompts() -> list[str]:
    """Those that `bapo eval` asks by itself."""
    return [chat[0]["content"] for chat in read_prompts("unrelated")]


def probe() -> list[Question]:
    """Honest or harmless answer first, then the other."""
    rows = read_jsonl(DATA / "probe.jsonl")
    return [Question(r["kind"], r["prompt"], (r["better"], r["worse"])) for r in rows]


def easy_questions(seed: int = 0) -> list[Question]:
    """200 three-choice questions from packaged lists and arithmetic; wrong choices are of the same kind."""
    rng = random.Random(seed)
    facts = json.loads((DATA / "facts.json").read_text("utf-8"))
    asked = {
        "capitals": (50, "What is the capital of {}?"),
        "elements": (40, "What is the chemical symbol for {}?"),
        "opposites": (40, "What is the opposite of {}?"),
        "young": (20, "What is the young of a {} called?"),
    }
    questions = []
    for group, (count, text) in asked.items():
        answers = [answer for _, answer in facts[group]]
        for name, answer in rng.sample(facts[group], count):
            wrong = rng.sample([a for a in answers if a != answer], 2)
            questions.append(Question(group, text.format(name), (answer, *wrong)))
    categories = facts["categories"]
    for category, words in categories.items():
        others = [w for name, members in categories.items() if name != category for w in members]
        for word in rng.sample(words, 2):
            text = f"Which of these is a kind of {category}?"
            if category in ("country", "colour", "piece of furniture", "part of the body"):
                text = f"Which of these is a {category}?"
            questions.append(Question("categories", text, (word, *rng.sample(others, 2))))
    for _ in range(26):
        a, b = rng.randint(20, 60), rng.randint(3, 19)
        sign, right = rng.choice([("plus", a + b), ("minus", a - b)])
        wrong = rng.sample([right + delta for delta in (-10, -2, -1, 1, 2, 10)], 2)
        choices = tuple(map(str, (right, *wrong)))
        questions.append(Question("arithmetic", f"What is {a} {sign} {b}?", choices))
    return questions


def mmlu(folder: Path | None, count: int) -> list[Question]:
    """The shortest four-choice questions of mmlu.jsonl, as many of each group; none without the file."""
    path = folder / "mmlu.jsonl" if folder else None
    if path is None or not path.is_file():
        return []
    groups: dict[str, list[Question]] = {}
    for row in read_jsonl(path):
        right = row["choices"].pop(row["answer"])
        question = Question(row["group"], row["question"], (right, *row["choices"]))
        groups.setdefault(row["group"], []).append(question)
    share = count // len(groups)
    return [
        question
        for name in sorted(groups)
        for question in sorted(groups[name], key=lambda q: len(q.prompt) + len("".join(q.choices)))[
            :share
        ]
    ]
