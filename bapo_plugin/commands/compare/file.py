"""What is read of a bapo-eval.json: its shape, checked whole, so that what follows can rely on it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

RESULT = "bapo-eval.json"
#: parts of the file with a number a row, and what their rows are
PARTS = {
    "pairs": "held-out pairs",
    "probe": "unrelated prompts",
    "retention": "former answers",
}
_AGAIN = "measure it again"

Numbers = Annotated[list[float], Field(min_length=1)]  # one a row; perhaps not finite
Digests = Annotated[list[str], Field(min_length=1)]


class NotMeasured(ValueError):
    """A run has no results, or none that can be compared; `bapo eval` makes them."""


class PairColumns(BaseModel):
    accuracy: Numbers
    margin: Numbers


class AnswerColumns(BaseModel):
    """Repetition is only of answers that were asked anew."""

    drift: Numbers
    lost: Numbers
    agreement: Numbers
    kl: Numbers
    repetition: Numbers | None = None


class PairRows(BaseModel):
    id: Digests
    after: dict[str, PairColumns]


class AnswerRows(BaseModel):
    prompt: Digests
    answer: Digests
    after: dict[str, AnswerColumns]


class TaskRows(BaseModel):
    id: Digests
    after: dict[str, Numbers]


class Pairs(BaseModel):
    rows: PairRows


class Answers(BaseModel):
    rows: AnswerRows


class Value(BaseModel):
    value: float


class Task(BaseModel):
    task: str
    metric: str
    questions: int | None
    # of lm-eval; not in older files, nor where it doesn't say
    higher_is_better: bool | None = None
    after: dict[str, Value]
    rows: TaskRows | None

    @property
    def key(self) -> str:
        return f"{self.task}.{self.metric}"


class Asked(BaseModel):
    config: str | None
    prompts: str | None
    tasks: list[str]
    limit: int | None
    chat: bool
    max_new_tokens: int
    load_in_4bit: bool | None


class Evaluation(BaseModel):
    """The file. A part is None where it wasn't measured."""

    model: str
    quantization: str | None
    template: str
    asked: Asked
    adapters: dict[str, str]
    weights: dict[str, str | None]
    scales: dict[str, float]
    data: str | None
    pairs: Pairs | None
    probe: Answers | None
    retention: Answers | None
    tasks: list[Task]

    def check_rows(self) -> None:
        """
        Raises:
            ValueError: an adapter is missing somewhere, or has another number of rows.
        """
        for part, of in PARTS.items():
            if measured := getattr(self, part):
                rows = measured.rows
                columns = {n: list(own.model_dump().values()) for n, own in rows.after.items()}
                ids = [rows.id] if part == "pairs" else [rows.prompt, rows.answer]
                self._check(of, ids, columns)
        for task in self.tasks:
            if task.rows:
                self._check(task.key, [task.rows.id], {n: [v] for n, v in task.rows.after.items()})
            if missing := self.adapters.keys() - task.after.keys():
                raise ValueError(f"{task.key} has nothing of {', '.join(missing)}")

    def _check(
        self, of: str, ids: Sequence[Sequence], columns: Mapping[str, Sequence[Sequence | None]]
    ) -> None:
        if missing := self.adapters.keys() - columns.keys():
            raise ValueError(f"{of}: no rows of {', '.join(missing)}")
        every = [*ids, *(values for own in columns.values() for values in own)]
        if len({len(values) for values in every if values is not None}) > 1:
            raise ValueError(f"{of}: columns of different lengths")


def read_file(path: Path) -> Evaluation:
    """
    Raises:
        NotMeasured: it can't be read, is of an older version, or isn't whole.
        ValueError: it is of a newer version.
    """
    try:
        found: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise NotMeasured(f"{path} can't be read ({error}); {_AGAIN}") from None
    if not isinstance(found, dict) or "adapters" not in found:
        raise NotMeasured(f"{path} is not what `bapo eval` writes; {_AGAIN}")
    if found.get("format") != 1:
        raise ValueError(
            f"{path} has format {found.get('format')!r}, this version reads format 1; update axolotl-plugin-bapo"
        )
    if "asked" not in found:
        raise NotMeasured(
            f"{path} is of an older version, which didn't write what it asked, row by row; {_AGAIN}"
        )
    try:
        evaluation = Evaluation.model_validate(found)
        evaluation.check_rows()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise NotMeasured(f"{path} is damaged ({place}: {first['msg']}); {_AGAIN}") from None
    except ValueError as error:
        raise NotMeasured(f"{path} is damaged ({error}); {_AGAIN}") from None
    return evaluation
