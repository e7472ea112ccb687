"""One adapter's results, and whether those of two were measured on the same."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bapo_plugin.commands.compare.file import (
    PARTS,
    RESULT,
    Evaluation,
    NotMeasured,
    Task,
    read_file,
)
from bapo_plugin.runs import check_adapter, has_adapter, weights_digest

Columns = dict[str, np.ndarray]  # measure -> a number a row, [n] fp64


@dataclass(frozen=True)
class Result:
    """One adapter in one bapo-eval.json.

    Args:
        file: where it was read.
        found: its content.
        name: of the adapter in it.
        folder: of the run or the adapter.
    """

    file: Path
    found: Evaluation
    name: str
    folder: Path

    def has(self, part: str) -> bool:
        """Whether a part, of `PARTS`, was measured."""
        return getattr(self.found, part) is not None

    @property
    def scale(self) -> float:
        """Of the adapter that is compared: 1 unless it was measured with its weights scaled."""
        return self.found.scales.get(self.name, 1.0)

    @property
    def strengths(self) -> dict[float, str]:
        """Scale -> name of the same adapter so scaled; 1 is the adapter as it is."""
        adapters, scales = self.found.adapters, self.found.scales
        same = [name for name, folder in adapters.items() if folder == adapters[self.name]]
        same.sort(key=lambda name: name not in scales)  # it counts before a copy scaled by 1
        return {scales.get(name, 1.0): name for name in same} | {self.scale: self.name}

    @property
    def task_keys(self) -> set[str]:
        return {task.key for task in self.found.tasks}

    def ids(self, part: str) -> list[str]:
        """Digests of what each row of a part was asked: pairs, or prompts."""
        rows = getattr(self.found, part).rows
        return rows.id if part == "pairs" else rows.prompt

    def asked_and_answered(self, part: str) -> Counter:
        """Of answers: digests of a prompt and of what the model answered before training."""
        rows = getattr(self.found, part).rows
        return Counter(zip(rows.prompt, rows.answer, strict=True))

    def columns(self, part: str, name: str | None = None) -> Columns:
        """The numbers of each row of a part, in the order of what was asked, which is the same in all files.

        Args:
            part: of `PARTS`.
            name: of the adapter; by default the one that is compared.

        Raises:
            ValueError: one isn't finite.
        """
        name = name or self.name
        columns = getattr(self.found, part).rows.after[name].model_dump(exclude_none=True)
        return self._ordered(self.ids(part), columns, f"{PARTS[part]}, {name}")

    def task_column(self, task: Task) -> np.ndarray:
        """As `columns`, of a task with rows, [questions]."""
        columns = {task.metric: task.rows.after[self.name]}
        return self._ordered(task.rows.id, columns, task.key)[task.metric]

    def task_value(self, task: Task) -> float:
        """
        Raises:
            ValueError: it isn't finite.
        """
        return self._ordered([""], {task.metric: [task.after[self.name].value]}, task.key)[
            task.metric
        ].item()

    def _ordered(self, ids: Sequence[str], columns: Mapping[str, list], of: str) -> Columns:
        order = np.argsort(np.array(ids), kind="stable")
        found = {}
        for key, values in columns.items():
            found[key] = np.array(values, dtype=np.float64)[order]
            if bad := int((~np.isfinite(found[key])).sum()):
                raise ValueError(
                    f"{self.file}: {of}: {key} is no finite number in {bad} of {len(values)} rows; the adapter's weights or its "
                    "logits are broken, so there is nothing to compare: train it again with a lower learning_rate"
                )
        return found


def split_target(target: str) -> tuple[Path, str | None]:
    """FOLDER, FILE, or either with `:ADAPTER` behind it; the adapter is None where none is named.

    Raises:
        ValueError: there is no such file or folder.
    """
    path, adapter = Path(target), None
    if not path.exists() and ":" in target:
        head, _, adapter = target.partition(":")
        path = Path(head)
    if not path.exists():
        raise ValueError(f"there is no file or folder {path}")
    if path.is_file() and path.suffix != ".json":
        raise ValueError(
            f"{path} is neither the folder of a run nor a {RESULT}; name the folder that its output_dir names"
        )
    return path, adapter


def read_result(path: Path, adapter: str | None) -> Result:
    """The results of one adapter.

    Raises:
        NotMeasured: there are none that can be used.
        ValueError: there is no adapter, or the file doesn't say which is meant.
    """
    file = path / RESULT if path.is_dir() else path
    if not file.is_file():
        check_adapter(path)
        raise NotMeasured(f"{path} has no {RESULT}: it has not been measured yet")
    found = read_file(file)
    name = _adapter(file, found, path, adapter)
    folder = path if adapter is None and has_adapter(path) else Path(found.adapters[name])
    recorded, there = found.weights.get(name), weights_digest(folder)
    if recorded and there and recorded != there:
        raise NotMeasured(
            f"{file} was measured before the adapter in {folder} was trained anew: its weights are others now; measure it again"
        )
    return Result(file, found, name, folder)


def _adapter(file: Path, found: Evaluation, path: Path, wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in found.adapters:
            raise ValueError(
                f"{file} has no adapter {wanted!r}; it has {', '.join(found.adapters)}"
            )
        return wanted
    names = [name for name in found.adapters if name not in found.scales]
    if path.is_dir():
        here = [n for n in names if Path(found.adapters[n]).resolve() == path.resolve()]
        # measured in another place, or moved since
        here = here or [n for n in names if Path(found.adapters[n]).name == path.resolve().name]
        if len(here) == 1:
            return here[0]
    if len(names) != 1:
        raise ValueError(
            f"{file} has {len(names)} adapters; say which one is meant: "
            + " or ".join(f"{path}:{name}" for name in names)
        )
    return names[0]


def start_from_different_models(a: Result, b: Result) -> bool:
    """Whether the model before training is another. One model may lie in two places: then it gives the same answers."""
    parts = [part for part in ("probe", "retention") if a.has(part) and b.has(part)]
    same = parts and all(a.asked_and_answered(p) == b.asked_and_answered(p) for p in parts)
    return a.found.model != b.found.model and not same


def others(a: Result, b: Result) -> Iterator[str]:
    """What both have and was not measured on the same: a sentence each."""
    for part, of in PARTS.items():
        if not (a.has(part) and b.has(part)):
            continue
        ids = [Counter(result.ids(part)) for result in (a, b)]
        number = ids[0].total()
        if ids[0] != ids[1]:
            what = "pairs" if part == "pairs" else "prompts"
            why = ""
            if a.found.template != b.found.template:
                why = ", and the chat templates differ"
            yield (
                f"{of}: A was measured on {number} {what}, B on {ids[1].total()}; {(ids[0] & ids[1]).total()} of them are the "
                f"same{why}"
            )
        elif part != "pairs":
            answers = [result.asked_and_answered(part) for result in (a, b)]
            if count := (answers[0] - answers[1]).total():
                yield (
                    f"{of}: the model before training gave other answers to {count} of {number} prompts ({_why(a, b)})"
                )
    for first, second in shared_tasks(a, b):
        ids = [Counter(task.rows.id) if task.rows else None for task in (first, second)]
        if ids[0] != ids[1] or first.questions != second.questions:
            yield f"{first.key}: A and B were asked other questions, or in another form"


def _why(a: Result, b: Result) -> str:
    limits = [result.found.asked.max_new_tokens for result in (a, b)]
    kinds = [result.found.quantization or "not quantised" for result in (a, b)]
    if limits[0] != limits[1]:
        return f"--max-new-tokens {limits[0]} of A, {limits[1]} of B"
    if kinds[0] != kinds[1]:
        return f"loaded {kinds[0]} for A, {kinds[1]} for B"
    return "other weights, versions or a machine that rounds otherwise"


def shared_tasks(a: Result, b: Result) -> Iterator[tuple[Task, Task]]:
    """The same task and metric of both."""
    theirs = {task.key: task for task in b.found.tasks}
    for task in a.found.tasks:
        if task.key in theirs:
            yield task, theirs[task.key]
