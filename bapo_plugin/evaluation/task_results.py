"""lm-eval's results before and after training: paired, by task, group and subject."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from bapo_plugin.evaluation.recorded import digest
from bapo_plugin.scoring.retention import mean_and_error

# what lm-eval says of a question: its row, as it was asked, the right answer
_HASHED = ("doc", "prompt", "target")
# (task of lm-eval, number of the question)
Question = tuple[str, int]


def compare_tasks(before: dict[str, Any], after: Mapping[str, dict[str, Any]]) -> list[dict]:
    """lm-eval's results before and after, one entry a task and metric.

    The standard error of the difference is that of the paired differences, question by question, where
    lm-eval gives a number for each; None elsewhere (metrics of a whole set, such as BLEU).

    An entry has `questions` (their number), `chance` (accuracy of guessing: mean of 1 / number of choices),
    `at_chance` (whether the accuracy before is within two standard errors of guessing; None where chance isn't
    known), `higher_is_better` (as lm-eval says; None where it doesn't), and `parts`: the same for each group and subject, with `kind` and `name`. `rows` has the numbers question by
    question, with a digest of each question; it is None where lm-eval gives none.
    """
    inside = {
        sub
        for group, subs in (before.get("group_subtasks") or {}).items()
        for sub in subs
        if sub != group
    }
    entries = []
    for task, metrics in before["results"].items():
        if task in inside:
            continue
        for key, value in metrics.items():
            metric, _, filters = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not filters:
                continue
            own = _per_question(before, task, metric, filters)
            theirs = {
                name: _per_question(result, task, metric, filters) for name, result in after.items()
            }
            chances = _chances(before, task) if metric in ("acc", "acc_norm") else {}
            measured = _measure(own, theirs, own, chances)
            # lm-eval's own number counts: it need not be the mean over questions
            measured["before"]["value"] = value
            error = _number(metrics.get(f"{metric}_stderr,{filters}"))
            if error is not None:
                measured["before"]["se"] = error
            for name, result in after.items():
                new = result["results"][task][key]
                measured["after"][name] |= {"value": new, "difference": new - value}
            entries.append(
                {
                    "task": task,
                    "metric": metric if filters == "none" else f"{metric} ({filters})",
                    "higher_is_better": _higher_is_better(before, task, metric),
                    **measured,
                    "rows": _rows(before, task, filters, own, theirs),
                    "parts": [
                        {"kind": kind, "name": name, **_measure(own, theirs, part, chances)}
                        for (kind, name), part in _parts(before, task).items()
                        if part <= own.keys()
                    ],
                }
            )
    return entries


def _higher_is_better(result: dict, task: str, metric: str) -> bool | None:
    said = (result.get("higher_is_better") or {}).get(task) or {}
    return said[metric] if isinstance(said.get(metric), bool) else None


def _rows(
    before: dict,
    task: str,
    filters: str,
    own: Mapping[Question, float],
    theirs: Mapping[str, Mapping[Question, float]],
) -> dict[str, Any] | None:
    """Columns of numbers before and after, where every question has one in all."""
    if not own or any(values.keys() != own.keys() for values in theirs.values()):
        return None
    ids = {
        (sub, sample["doc_id"]): digest(sub, *(sample.get(f"{of}_hash") for of in _HASHED))
        for sub, sample in _samples(before, task)
        if sample.get("filter", "none") == filters
    }
    return {
        "id": [ids[question] for question in own],
        "before": list(own.values()),
        "after": {name: [values[q] for q in own] for name, values in theirs.items()},
    }


def _measure(
    own: Mapping[Question, float],
    theirs: Mapping[str, Mapping[Question, float]],
    questions: Iterable[Question],
    chances: Mapping[Question, float],
) -> dict[str, Any]:
    """Means over questions before and after, and the paired difference; None where there are no numbers."""
    questions = list(questions)
    before = _mean([own[q] for q in questions])
    after = {}
    for name, values in theirs.items():
        paired = questions if own.keys() == values.keys() else []
        new = _mean([values[q] for q in paired])
        difference = _mean([values[q] - own[q] for q in paired])
        after[name] = {
            **new,
            "difference": difference["value"],
            "difference_se": difference["se"],
        }
    chance = at_chance = None
    if questions and all(q in chances for q in questions):
        shares = [chances[q] for q in questions]
        chance = sum(shares) / len(shares)
        error = math.sqrt(sum(p * (1 - p) for p in shares)) / len(shares)
        at_chance = abs(before["value"] - chance) <= 2 * error
    return {
        "questions": len(questions) or None,
        "chance": chance,
        "at_chance": at_chance,
        "before": before,
        "after": after,
    }


def _mean(values: list[float]) -> dict[str, float | None]:
    return mean_and_error(values) if values else {"value": None, "se": None}


def _per_question(result: dict, task: str, metric: str, filters: str) -> dict[Question, float]:
    """Question -> its number, over a group's tasks."""
    return {
        (sub, sample["doc_id"]): float(sample[metric])
        for sub, sample in _samples(result, task)
        if sample.get("filter", "none") == filters and isinstance(sample.get(metric), int | float)
    }


def _chances(result: dict, task: str) -> dict[Question, float]:
    """Question -> 1 / number of its choices, where one of several is right."""
    return {
        (sub, sample["doc_id"]): 1 / len(sample["arguments"])
        for sub, sample in _samples(result, task)
        if _config(result, sub).get("output_type") == "multiple_choice"
        and "acc_mutual_info" not in sample  # asks each choice twice
        and not isinstance(sample.get("target"), list)
    }


def _parts(result: dict, task: str) -> dict[tuple[str, str], set[Question]]:
    """(kind, name) -> questions. Subjects are the tasks of a group of lm-eval; besides, a task's
    metadata may name the column of its groups (`groups`) or subjects (`subjects`)."""
    several = len(_leaves(result, task)) > 1
    found: dict[tuple[str, str], set[Question]] = {}
    for sub, sample in _samples(result, task):
        names = [("subject", sub)] if several else []
        metadata = _config(result, sub).get("metadata") or {}
        for kind in ("group", "subject"):
            column = metadata.get(f"{kind}s")
            if isinstance(column, str) and column in sample.get("doc", ()):
                names.append((kind, str(sample["doc"][column])))
        for name in names:
            found.setdefault(name, set()).add((sub, sample["doc_id"]))
    return found


def _samples(result: dict, task: str) -> Iterable[tuple[str, dict]]:
    for sub in _leaves(result, task):
        for sample in result.get("samples", {}).get(sub, []):
            yield sub, sample


def _config(result: dict, task: str) -> dict:
    return result.get("configs", {}).get(task, {})


def _leaves(result: dict, task: str) -> list[str]:
    subs = (result.get("group_subtasks") or {}).get(task) or []
    return [leaf for sub in subs for leaf in _leaves(result, sub)] if subs else [task]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
