"""The first glance: did it learn the taste, and is the model intact? A sentence of each for a run."""

import math
from dataclasses import dataclass
from typing import Any

from bapo_plugin.report.read import Run, number
from bapo_plugin.report.tables import decimal

# shares of held-out pairs ranked right; a coin gives one half
_LEARNED, _PARTLY = 0.8, 0.65
# shares of former answers that lost more than 2 nats
_KEPT, _DAMAGED = 0.05, 0.25
# rise of the share of repeated 4-grams
_REPEATS = 0.05


@dataclass(frozen=True)
class Verdict:
    """`learned` and `kept` are one of the words below with the numbers that say so; "" where nothing was measured."""

    run: str
    learned: str
    kept: str


def verdict(run: Run) -> Verdict:
    return Verdict(run.name, _learned(run), _kept(run))


def _learned(run: Run) -> str:
    named = [k for k in run.series if k.startswith("eval_") and k.endswith("rewards/accuracies")]
    found = [value for name in named if (value := run.last(name)) is not None]
    accuracy, where = (sum(found) / len(found) if found else None), "held-out pairs"
    if accuracy is None:
        accuracy, where = (
            run.last("rewards/accuracies"),
            "training pairs; there were no held-out ones",
        )
    if accuracy is None:
        return ""
    if not math.isfinite(accuracy):
        return f"Not known: the last accuracy on {where.partition(';')[0]} was not a finite number"
    word = "Learned"
    if accuracy < _LEARNED:
        word = "Learned in part" if accuracy >= _PARTLY else "Not learned"
    rows = number(run.rows.get("eval")) if where == "held-out pairs" else math.nan
    of = f"{rows:.0f} {where}" if rows > 0 else where
    return f"{word}: {accuracy:.0%} of {of} ranked right"


def _kept(run: Run) -> str:
    """Of unrelated prompts where they were asked, else of the others."""
    for part, whose in (("probe", "answers to unrelated prompts"), ("retention", "former answers")):
        metrics = run.own(part)
        if metrics is None:
            continue
        drift = metrics.get("drift")
        if isinstance(drift, dict) and "value" in drift and math.isnan(_value(metrics, "drift")):
            return (
                f"Broken: {whose} have no finite drift, so that the model's weights or its logits hold what is no number; train it "
                "again with a lower learning_rate"
            )
        lost, worst = _value(metrics, "lost"), _value(metrics, "worst_tenth")
        if math.isnan(lost):
            continue
        word = "Kept"
        if lost > _KEPT:
            word = "Kept in part" if lost <= _DAMAGED else "Forgotten"
        count = number(run.evaluation[part].get("prompts"))
        of = f"{count:.0f} {whose}" if count > 0 else whose
        return (
            f"{word}: {lost:.0%} of {of} lost more than 2 nats; the worst tenth drifted by "
            f"{decimal(worst, sign=True)} nats{_repeats(metrics)}"
        )
    return ""


def _repeats(metrics: Any) -> str:
    """Where answers clearly repeat themselves more than before; nothing else is said."""
    part = metrics.get("repetition")
    if not isinstance(part, dict):
        return ""
    after, change, error = (number(part.get(k)) for k in ("value", "difference", "difference_se"))
    if not (change > _REPEATS and change > 2 * error):
        return ""
    return f". Answers repeat themselves: {after - change:.0%} of 4-grams before, {after:.0%} now"


def _value(metrics: Any, name: str) -> float:
    part = metrics.get(name) if isinstance(metrics, dict) else None
    return number(part.get("value")) if isinstance(part, dict) else math.nan
