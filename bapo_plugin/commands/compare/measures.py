"""How much better one run is than another: differences with paired errors, as they are and at equal margin and accuracy.

A difference is B − A, row by row on the same rows. Its error is the standard error of the mean of those differences. What
is no mean of rows (the worst tenth, and numbers at equal margin, which come from two sets of rows) has a bootstrap's: rows
are drawn anew with replacement, the same ones for A and for B, and the error is the standard deviation over draws.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from bapo_plugin.commands.compare.file import PARTS, Task
from bapo_plugin.commands.compare.results import Columns, Result, shared_tasks

DRAWS = 1000

#: measure -> label, and the sign of what is better
LABELS = {
    "accuracy": ("ranked right, share", 1),
    "margin": ("margin, nats", 1),
    "drift": ("drift, nats an answer", 1),
    "lost": ("lost over 2 nats, share", -1),
    "worst_tenth": ("worst tenth, nats", 1),
    "agreement": ("same likeliest token", 1),
    "kl": ("KL, nats a token", -1),
    "repetition": ("repeated 4-grams, share", -1),
}
_LESS_IS_BETTER = ("bits_per_byte", "ter", "brier_score")  # of lm-eval, which says otherwise of ter
# what is read off a curve of strengths, where it starts
_START = {"accuracy": 0.5, "margin": 0.0}
_AT_LEVEL = ("drift", "lost", "kl")


@dataclass(frozen=True)
class Measure:
    """One number of A and of B.

    Args:
        key: for programs and `--fail-below`.
        of: what was asked, for headings.
        n: rows; None where only a whole is known.
        se: of the difference; None where there is none, as with one row.
        better: 1 where more is better, -1 where less is.
    """

    key: str
    of: str
    label: str
    n: int | None
    a: float
    b: float
    se: float | None
    better: int = 1

    @property
    def difference(self) -> float:
        """B − A."""
        return self.b - self.a

    @property
    def gain(self) -> float:
        """How much better B is, in the measure's unit."""
        return self.better * self.difference

    @property
    def is_clear(self) -> bool:
        """Beyond two standard errors."""
        return self.se is not None and abs(self.difference) > 2 * self.se


@dataclass(frozen=True)
class Level:
    """Where two runs are equal in taste.

    Args:
        of: "margin" or "accuracy".
        value: the lower of the two.
        strengths: of A's adapter and of B's that reach it, between 0 (before) and its own, which is 1 but for a scaled one.
        measures: what each has forgotten there.
    """

    of: str
    value: float
    strengths: tuple[float, float]
    measures: tuple[Measure, ...]


def taste_and_forgetting(a: Result, b: Result) -> list[Measure]:
    """Of all parts that both have, which must have been measured on the same; first accuracy and margin."""
    found = []
    for part, of in PARTS.items():
        if a.has(part) and b.has(part):
            prefix = "former." if part == "retention" else ""
            columns = [result.columns(part) for result in (a, b)]
            found += [_renamed(m, prefix) for m in _measures(of, *columns)]
    return found


def _renamed(measure: Measure, prefix: str) -> Measure:
    return Measure(**{**vars(measure), "key": prefix + measure.key}) if prefix else measure


def _measures(of: str, a: Columns, b: Columns) -> Iterator[Measure]:
    for key in (key for key in LABELS if key in a and key in b):
        yield paired(key, of, a[key], b[key])
        if key == "lost":  # beside the other number of losses
            yield _worst_tenths(of, a["drift"], b["drift"])


def paired(key: str, of: str, a: np.ndarray, b: np.ndarray) -> Measure:
    """The means of two columns of the same rows, [n] each, and the error of their difference."""
    label, better = LABELS.get(key, (key, 1))
    se = float((b - a).std(ddof=1) / math.sqrt(len(a))) if len(a) > 1 else None
    return Measure(key, of, label, len(a), float(a.mean()), float(b.mean()), se, better)


def _worst_tenths(of: str, a: np.ndarray, b: np.ndarray) -> Measure:
    error = bootstrap(lambda rows: worst_tenth(b[rows]) - worst_tenth(a[rows]), len(a))
    label, better = LABELS["worst_tenth"]
    return Measure("worst_tenth", of, label, len(a), worst_tenth(a), worst_tenth(b), error, better)


def worst_tenth(values: np.ndarray) -> float:
    """Mean of the lowest tenth, at least one value."""
    return float(np.sort(values)[: math.ceil(len(values) / 10)].mean())


def bootstrap(statistic: Callable[..., float], *sizes: int) -> float | None:
    """Standard deviation of a statistic over draws of rows; the same numbers give the same error.

    Args:
        statistic: takes, for each size, indices of rows, [n].
        sizes: rows of each set. None comes back where one has a single row.
    """
    if min(sizes) < 2:
        return None
    draw = np.random.default_rng(0)
    found = [statistic(*(draw.integers(0, n, n) for n in sizes)) for _ in range(DRAWS)]
    return float(np.std(found, ddof=1))


def tasks(a: Result, b: Result) -> Iterator[Measure]:
    """Of lm-eval's tasks that both have; paired where there is a number for each question."""
    for first, second in shared_tasks(a, b):
        se = None
        if first.rows and second.rows:
            se = paired(first.key, "tasks", a.task_column(first), b.task_column(second)).se
        yield Measure(
            first.key,
            "tasks",
            first.key,
            first.questions,
            # lm-eval's own number need not be the mean over questions
            a.task_value(first),
            b.task_value(second),
            se,
            _direction(first, second),
        )


def _direction(*measured: Task) -> int:
    """As lm-eval says, in either file; where it doesn't, most metrics count what is right."""
    name = measured[0].metric.split()[0].lower()
    if "perplexity" in name or name in _LESS_IS_BETTER:
        return -1
    return -1 if False in [task.higher_is_better for task in measured] else 1


# ---------------------------------------------------------------- at equal taste


@dataclass(frozen=True)
class _Curve:
    """An adapter from strength 0 to its own: columns [rows, strengths] of pairs and of unrelated prompts."""

    strengths: list[float]
    pairs: Mapping[str, np.ndarray]
    kept: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, result: Result) -> "_Curve":
        names = {s: name for s, name in sorted(result.strengths.items()) if 0 < s <= result.scale}
        points = {
            part: [result.columns(part, name) for name in names.values()]
            for part in ("pairs", "probe")
        }

        def table(part: str, key: str, start: float) -> np.ndarray:
            columns = [point[key] for point in points[part]]
            return np.stack([np.full_like(columns[0], start), *columns], axis=1)

        return cls(
            [0.0, *names],
            {key: table("pairs", key, start) for key, start in _START.items()},
            {key: table("probe", key, 0.0) for key in _AT_LEVEL},
        )


def has_curve(result: Result) -> bool:
    """Whether the adapter was measured at a part of its strength too."""
    is_measured = result.has("pairs") and result.has("probe")
    return is_measured and any(0 < strength < result.scale for strength in result.strengths)


def at_equal(a: Result, b: Result) -> list[Level]:
    """What each has forgotten where both have the lower of the two margins, and of the two accuracies.

    An adapter at a part of its strength has learned less and forgotten less; between the strengths that were measured, both
    are taken to change linearly. Nothing is said where a run has learned nothing.
    """
    curves = [_Curve.read(result) for result in (a, b)]
    n_pairs, n_kept = (len(next(iter(t.values()))) for t in (curves[0].pairs, curves[0].kept))
    found = []
    for of in ("margin", "accuracy"):

        def at(key: str, pairs: np.ndarray, kept: np.ndarray, of: str = of) -> list[float]:
            """Of A and of B, with these rows."""
            taste = [curve.pairs[of][pairs].mean(0) for curve in curves]
            level = min(points[-1] for points in taste)
            values = [
                np.array(c.strengths) if key == "strength" else c.kept[key][kept].mean(0)
                for c in curves
            ]
            return [at_level(x, y, level) for x, y in zip(taste, values, strict=True)]

        every = np.arange(n_pairs), np.arange(n_kept)
        level = min(float(curve.pairs[of][:, -1].mean()) for curve in curves)
        if level <= _START[of]:
            continue
        measures = []
        for key in _AT_LEVEL:

            def change(pairs: np.ndarray, kept: np.ndarray, key: str = key) -> float:
                a, b = at(key, pairs, kept)
                return b - a

            label, better = LABELS[key]
            error = bootstrap(change, n_pairs, n_kept)
            name = f"equal_{of}.{key}"
            measures.append(Measure(name, f"at equal {of}", label, n_kept, *at(key, *every), error, better))  # fmt: skip
        found.append(Level(of, level, tuple(at("strength", *every)), tuple(measures)))
    return found


def at_level(x: Sequence[float], y: Sequence[float], level: float) -> float:
    """y where x first reaches a level, linear between points; its end where x never does.

    Example:
        >>> at_level([0.0, 2.0, 4.0], [0.0, -1.0, -5.0], 3.0)
        -3.0
    """
    for (x0, y0), (x1, y1) in pairwise(zip(x, y, strict=True)):
        if x1 >= level:
            share = (level - x0) / (x1 - x0) if x1 > x0 else 1.0
            return float(y0 + min(1.0, max(0.0, share)) * (y1 - y0))
    return float(y[-1])
