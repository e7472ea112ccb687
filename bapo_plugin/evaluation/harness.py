"""Tasks of lm-eval, before and after training."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from bapo_plugin.answers.transformers import autocast
from bapo_plugin.evaluation.subject import Subject
from bapo_plugin.scoring.retention import mean_and_error

OWN_TASKS = Path(__file__).parent / "tasks"
# what the paper measures; the first is a task of ours, the others are lm-eval's
PAPER_TASKS = ("scienceqa", "mmlu_humanities", "bigbench_hhh_alignment_multiple_choice")


def find_tasks(tasks: Sequence[str]) -> tuple[Any, list[str]]:
    """lm-eval's task manager and the tasks' names.

    Raises:
        ValueError: an unknown name, or a YAML that is no task.
    """
    from lm_eval.tasks import TaskManager

    names, folders = [], {OWN_TASKS}
    wanted = [t for task in tasks for t in (PAPER_TASKS if task == "paper" else (task,))]
    for task in wanted:
        path = Path(task)
        if path.suffix not in (".yaml", ".yml"):
            names.append(task)
            continue
        if not path.is_file():
            raise ValueError(f"--tasks: there is no file {path}")
        folders.add(path.resolve().parent)
        # tags such as !function are lm-eval's to read
        name = next(
            (
                line.split(":", 1)[1].strip().strip("\"'")
                for line in path.read_text("utf-8").splitlines()
                if line.startswith(("task:", "group:"))
            ),
            None,
        )
        if not name:
            raise ValueError(
                f"--tasks: {path} has no line `task: NAME`, so it is no task of lm-eval"
            )
        names.append(name)
    only_files = all(Path(task).suffix in (".yaml", ".yml") for task in wanted)
    manager = TaskManager(
        include_path=[str(folder) for folder in sorted(folders)], include_defaults=not only_files
    )
    if unknown := [name for name in names if name not in manager.all_tasks]:
        hints = [
            f"{name!r}"
            + (f" (did you mean {', '.join(near)}?)" if (near := _near(name, manager)) else "")
            for name in unknown
        ]
        raise ValueError(
            f"--tasks: unknown {', '.join(hints)}; `lm_eval ls tasks` lists lm-eval's own, and a file of yours is "
            "named by its path"
        )
    return manager, names


def _near(name: str, manager: Any) -> list[str]:
    return difflib.get_close_matches(name, manager.all_tasks, n=3)


def run_tasks(
    subject: Subject,
    manager: Any,
    names: list[str],
    limit: int | None,
    batch_size: int,
    chat: bool,
) -> list[dict[str, Any]]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=batch_size)

    def run(state: Callable[[], AbstractContextManager]) -> dict[str, Any]:
        with state(), autocast(subject.model):
            return simple_evaluate(
                lm,
                tasks=names,
                task_manager=manager,
                limit=limit,
                log_samples=True,
                apply_chat_template=chat,
                bootstrap_iters=0,
            )

    before = run(subject.before)
    after = {name: run(lambda name=name: subject.after(name)) for name in subject.adapters}
    return compare_tasks(before, after)


def compare_tasks(before: dict[str, Any], after: Mapping[str, dict[str, Any]]) -> list[dict]:
    """lm-eval's results before and after, one entry a task and metric.

    The standard error of the difference is that of the paired differences, question by question, where
    lm-eval gives a number for each; None elsewhere (metrics of a whole set, such as BLEU).
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
            entry = {
                "task": task,
                "metric": metric if filters == "none" else f"{metric} ({filters})",
                "before": {
                    "value": value,
                    "se": _number(metrics.get(f"{metric}_stderr,{filters}")),
                },
                "after": {},
            }
            own = _per_question(before, task, metric, filters)
            if own and entry["before"]["se"] is None:
                entry["before"]["se"] = mean_and_error(list(own.values()))["se"]
            for name, result in after.items():
                new = result["results"][task][key]
                theirs = _per_question(result, task, metric, filters)
                error = se = None
                if own and own.keys() == theirs.keys():
                    differences = [theirs[q] - own[q] for q in own]
                    error = mean_and_error(differences)["se"]
                    se = mean_and_error(list(theirs.values()))["se"]
                entry["after"][name] = {
                    "value": new,
                    "se": se,
                    "difference": new - value,
                    "difference_se": error,
                }
            entries.append(entry)
    return entries


def _per_question(result: dict, task: str, metric: str, filters: str) -> dict[tuple, float]:
    """(task, question) -> its number, over a group's tasks."""
    subtasks = _leaves(result, task)
    return {
        (sub, sample["doc_id"]): float(sample[metric])
        for sub in subtasks
        for sample in result.get("samples", {}).get(sub, [])
        if sample.get("filter", "none") == filters and isinstance(sample.get(metric), int | float)
    }


def _leaves(result: dict, task: str) -> list[str]:
    subs = (result.get("group_subtasks") or {}).get(task) or []
    return [leaf for sub in subs for leaf in _leaves(result, sub)] if subs else [task]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
