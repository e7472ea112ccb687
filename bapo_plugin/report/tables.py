"""What the report's tables hold, as text."""

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from bapo_plugin.report.read import MEASURED, TRAINER_CLS, Run, flatten, number

DASH = "–"


@dataclass(frozen=True)
class Cell:
    """`tag` is small print beside the text; `is_strong` marks what shouldn't be overlooked."""

    text: str
    tag: str = ""
    is_strong: bool = False


def decimal(value: Any, digits: int | None = None, sign: bool = False) -> str:
    """With so many digits behind the point; by default three significant ones, of small numbers three."""
    value = number(value)
    if math.isnan(value):
        return DASH
    size = abs(value)
    if size >= 1e7:
        return f"{value:.3g}".replace("-", "−")
    if digits is None:
        digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    if not text.strip("+-0."):  # no minus zero
        text = text.lstrip("+-")
    return text.replace("-", "−")


def count(value: Any) -> str:
    value = number(value)
    return DASH if math.isnan(value) else f"{value:,.0f}"


# ---------------------------------------------------------------- one line a run


def summary(runs: Sequence[Run]) -> tuple[list[str], list[list[Cell]]]:
    """Heads and rows; columns in which no run has anything are left out."""
    columns: dict[str, Callable[[Run], Cell]] = {
        "method": _method,
        "model": lambda run: Cell(run.model or DASH),
        "steps": _steps,
        "accuracy": lambda run: _final(run, "rewards/accuracies"),
        "margin": lambda run: _final(run, "rewards/margins"),
        "drift chosen": lambda run: _final(run, "drift/chosen"),
        "drift base": lambda run: _final(run, "drift/base"),
        "drift rejected": lambda run: _final(run, "drift/rejected"),
        "retention drift": lambda run: _retention(run, "drift"),
        "retention agreement": lambda run: _retention(run, "agreement"),
        "loss": lambda run: _final(run, "loss"),
        "tokens/s": _speed,
    }
    if len({run.model for run in runs}) == 1:
        del columns["model"]  # the page's head has it
    if all(run.last("rewards/margins") is not None for run in runs):
        del columns["loss"]  # says nothing that margin and drift don't say better
    cells = {head: [cell(run) for run in runs] for head, cell in columns.items()}
    cells = {head: column for head, column in cells.items() if any(c.text != DASH for c in column)}
    return list(cells), [list(row) for row in zip(*cells.values(), strict=True)]


def _method(run: Run) -> Cell:
    settings = []
    for symbol, value in (("λ", number(run.flat.get("bapo.anchor_weight"))), ("β", run.beta)):
        if not math.isnan(value):
            settings.append(f"{symbol} {value:g}")
    if run.flat.get("bapo.anchor_weight") == "auto":
        settings.insert(0, "λ auto")
    return Cell(run.method or DASH, " ".join(settings))


def _steps(run: Run) -> Cell:
    if not run.planned:
        return Cell(count(run.step))
    # a run that was killed looks like one that goes on
    state = "finished" if run.is_finished else "running or stopped"
    return Cell(f"{count(run.step)} / {count(run.planned)}", state)


def _final(run: Run, metric: str) -> Cell:
    value, tag = run.last(f"eval_{metric}"), ""
    if value is None:
        value, tag = run.last(metric), "train"
    return Cell(DASH) if value is None else Cell(decimal(value), tag)


def _retention(run: Run, name: str) -> Cell:
    values = [v for _, v in run.retention(name) if math.isfinite(v)]
    if values:
        return Cell(decimal(values[-1]))
    for part in MEASURED:
        if (own := run.own(part)) is not None:
            return Cell(decimal(_value(own.get(name))))
    return Cell(DASH)


def _speed(run: Run) -> Cell:
    values = [v for _, v in run.series.get("tokens/s", []) if math.isfinite(v)]
    return Cell(count(statistics.median(values)) if values else DASH)


def what_to_look_at(runs: Sequence[Run]) -> str:
    """One or two short sentences on the base response, where it was measured."""
    drift = {run.name: run.last("eval_drift/base") for run in runs}
    drift = {
        run.name: run.last("drift/base") if drift[run.name] is None else drift[run.name]
        for run in runs
    }
    known = {name: value for name, value in drift.items() if _is_known(value)}
    rule = (
        "Drift of the base response (drift/base) far below 0 is forgetting: the model's own former answers have "
        "become less likely."
    )
    if not known:
        return rule if any("rewards/chosen" in run.series for run in runs) else ""
    low, high = min(known, key=known.get), max(known, key=known.get)
    if low == high:
        return f"{rule} Here it is {decimal(known[low])} nats a response."
    return f"{rule} It is lowest in {low} ({decimal(known[low])} nats) and highest in {high} ({decimal(known[high])} nats)."


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


# ---------------------------------------------------------------- bapo-eval.json


def task_table(runs: Sequence[Run]) -> list[list[Cell]]:
    """task, metric, run, before, after, difference; tasks of all runs together, to compare them."""
    rows: dict[tuple[str, str], list[list[Cell]]] = {}
    for run in _measured(runs):
        for task in _list(run.evaluation.get("tasks")):
            key = (str(task.get("task")), str(task.get("metric")))
            for name, label in _adapters(runs, run, task.get("after")):
                after = _mapping(task["after"][name])
                difference = {"value": after.get("difference"), "se": after.get("difference_se")}
                rows.setdefault(key, []).append(
                    [
                        Cell(label),
                        _with_error(task.get("before")),
                        _with_error(after),
                        _with_error(difference, sign=True),
                    ]
                )
    return [[Cell(key[0]), Cell(key[1]), *row] for key, group in rows.items() for row in group]


RETAINED = ("drift", "drift_per_token", "lost", "worst_tenth", "agreement", "kl")


def retention_table(runs: Sequence[Run]) -> list[list[Cell]]:
    """run, whose answers, prompts, drift, drift per token, share that was lost, worst tenth, agreement, kl."""
    rows = []
    for run in _measured(runs):
        for part, of in (
            ("retention", "held-out or named prompts"),
            ("probe", "unrelated prompts"),
        ):
            retention = _mapping(run.evaluation.get(part))
            for name, label in _adapters(runs, run, retention.get("after")):
                metrics = _mapping(retention["after"][name])
                rows.append(
                    [
                        Cell(label),
                        Cell(of),
                        Cell(count(retention.get("prompts"))),
                        *(_with_error(metrics.get(key)) for key in RETAINED),
                    ]
                )
    return rows


@dataclass(frozen=True)
class Sample:
    """A prompt with the answers of the model before training and after it: (whose, text, drift)."""

    prompt: str
    before: str
    after: list[tuple[str, str, str]]


def samples(runs: Sequence[Run]) -> list[Sample]:
    """Samples of all runs; runs that were asked the same and answered the same before share one."""
    found: dict[tuple[str, str], Sample] = {}
    for run in _measured(runs):
        for sample in _list(run.evaluation.get("samples")):
            prompt, before = str(sample.get("prompt") or ""), str(sample.get("before") or "")
            entry = found.setdefault((prompt, before), Sample(prompt, before, []))
            drift = _mapping(sample.get("drift"))
            for name, label in _adapters(runs, run, sample.get("after")):
                value = drift.get(name)
                text = "" if math.isnan(number(value)) else f"{decimal(value)} nats"
                entry.after.append((label, str(sample["after"][name]), text))
    return list(found.values())


def _measured(runs: Sequence[Run]) -> list[Run]:
    """Runs with results, one of those that share them: `bapo eval A B` leaves the same file in both."""
    return list({_content(run): run for run in reversed(runs)}.values())[::-1]


def _content(run: Run) -> str:
    return json.dumps(run.evaluation, sort_keys=True, default=str)


def _adapters(runs: Sequence[Run], run: Run, after: Any) -> Iterator[tuple[str, str]]:
    """Each adapter's name and what to call it in a page with several runs."""
    names = list(_mapping(after))
    sharing = [other for other in runs if _content(other) == _content(run)]
    for name in names:
        owner = next((other for other in sharing if name in other.own_names), None)
        label = run.name if len(names) == 1 else f"{run.name}: {name}"
        if owner is not None:
            scale = _mapping(run.evaluation.get("scales")).get(name)
            label = owner.name if scale is None else f"{owner.name} × {scale:g}"
        yield name, label


def _with_error(measured: Any, sign: bool = False) -> Cell:
    """A number with its standard error; a difference beyond two of them is marked."""
    value, error = _value(measured), number(_mapping(measured).get("se"))
    if not error > 0:
        return Cell(decimal(value, sign=sign))
    # as many digits as the error has: two of its own
    digits = min(3, max(0, 1 - math.floor(math.log10(error))))
    return Cell(
        decimal(value, digits, sign),
        f"± {decimal(error, digits)}",
        is_strong=sign and abs(value) > 2 * error,
    )


def _value(measured: Any) -> float:
    return number(measured.get("value") if isinstance(measured, Mapping) else measured)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Mapping[str, Any]]:
    return (
        [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []
    )


# ---------------------------------------------------------------- configuration


def differences(runs: Sequence[Run]) -> tuple[list[str], list[tuple[str, list[str | None]]]]:
    """Names of runs whose configuration is known, and the keys in which they differ (None: not set)."""
    known = [run for run in runs if run.config is not None]
    settings = [flatten(_settings(run)) for run in known]
    keys = dict.fromkeys(key for flat in settings for key in flat)
    rows = [(key, [flat.get(key) for flat in settings]) for key in keys]
    return [run.name for run in known], [(k, values) for k, values in rows if len(set(values)) > 1]


def complete(run: Run) -> str:
    """The configuration as YAML."""
    return yaml.safe_dump(
        _plain(_settings(run)),
        allow_unicode=True,
        sort_keys=False,
        default_flow_style=False,
        width=100,
    )


def _settings(run: Run) -> dict[str, Any]:
    more = {"rows": run.rows, "versions": run.versions}
    config = dict(run.config or {})
    if config.get("trainer_cls") == TRAINER_CLS:  # as in the user's YAML, before the plugin's part
        del config["trainer_cls"]
        config["rl"] = "bapo"
    return {**config, **{key: value for key, value in more.items() if value}}


def _plain(value: Any) -> Any:
    """Without YAML's anchors, which `safe_dump` writes for an object that comes up twice."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value
