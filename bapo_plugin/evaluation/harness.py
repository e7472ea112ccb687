"""Tasks of lm-eval, before and after training."""

import difflib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from bapo_plugin.answers.transformers import autocast
from bapo_plugin.evaluation import local
from bapo_plugin.evaluation.refusals import check_finite
from bapo_plugin.evaluation.subject import Subject
from bapo_plugin.evaluation.task_results import compare_tasks

OWN_TASKS = Path(__file__).parent / "tasks"
# what the paper measures; the first is a task of ours, the others are lm-eval's
PAPER_TASKS = ("scienceqa", "mmlu_humanities", "bigbench_hhh_alignment_multiple_choice")


def find_tasks(tasks: Sequence[str], data: Path | None = None) -> tuple[Any, list[str | dict]]:
    """lm-eval's task manager and the tasks: names, and for local ones what `local_task` gives.

    Args:
        tasks: names, YAML files, or "paper".
        data: folder with the rows of local tasks; read and checked here. None takes all from the hub.

    Raises:
        ValueError: an unknown name, a YAML that is no task, or a file in `data` that can't be used.
    """
    paper = local.PAPER_TASKS if data else PAPER_TASKS
    wanted = list(
        dict.fromkeys(t for task in tasks for t in (paper if task == "paper" else [task]))
    )
    names: list[str | dict] = []
    folders = {OWN_TASKS}
    if data:
        if not data.is_dir():
            raise ValueError(f"--data: there is no folder {data}")
        if not any(task in local.LOCAL for task in wanted):
            raise ValueError(
                f"--data: no task of --tasks reads it ({', '.join(wanted) or 'none is named'}); those that do are "
                f"paper, {', '.join(local.LOCAL)}"
            )
        folders.add(local.LOCAL_TASKS)
    from lm_eval.tasks import TaskManager

    for task in wanted:
        if data and task in local.LOCAL:
            names.append(local.local_task(task, data))
            continue
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
    own = all(
        Path(task).suffix in (".yaml", ".yml") or (data and task in local.LOCAL) for task in wanted
    )
    manager = TaskManager(
        include_path=[str(folder) for folder in sorted(folders)], include_defaults=not own
    )
    if unknown := [n for n in names if isinstance(n, str) and n not in manager.all_tasks]:
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


def _not_about_metadata(record: logging.LogRecord) -> bool:
    """lm-eval advises about options for tasks like our local ones, which have none."""
    return "Custom kwargs can be passed" not in record.getMessage()


def run_tasks(
    subject: Subject,
    manager: Any,
    names: list[str | dict],
    limit: int | None,
    batch_size: int,
    chat: bool,
) -> list[dict[str, Any]]:
    """The tasks before and after; see `compare_tasks`.

    Raises:
        ValueError: a log-prob is NaN.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval.api.task").addFilter(_not_about_metadata)
    lm = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=batch_size)

    def run(state: Callable[[], AbstractContextManager]) -> dict[str, Any]:
        with state(), autocast(subject.model):
            return simple_evaluate(
                lm,
                # it takes the name out of a task that is a dictionary
                tasks=[dict(name) if isinstance(name, dict) else name for name in names],
                task_manager=manager,
                limit=limit,
                log_samples=True,
                apply_chat_template=chat,
                bootstrap_iters=0,
            )

    before = run(subject.before)
    _check_finite(before, None)
    after = {}
    for name in subject.adapters:
        after[name] = run(lambda name=name: subject.after(name))
        _check_finite(after[name], name)
    return compare_tasks(before, after)


def _check_finite(results: dict[str, Any], whose: str | None) -> None:
    """Log-probs of a task: lm-eval takes NaN for the likeliest answer or the unlikeliest, without a word."""
    for task, samples in results["samples"].items():
        numbers = [number for sample in samples for number in _numbers(sample["resps"])]
        # a token may well be impossible
        known = [0.0 if math.isinf(number) else number for number in numbers]
        check_finite(torch.tensor(known), whose, f"log-probs of {task}")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)
