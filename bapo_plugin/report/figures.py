"""What the report's figures show: each is a row of panels, a panel is some lines against the step.

What has no data has no line, no panel and no figure.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bapo_plugin.report.read import RESPONSES, Points, Run


@dataclass(frozen=True)
class Style:
    """A look that can be told from the others without its colour.

    `colour` names a variable of the page's style sheet; `dash` is in line widths; `marker` is one of
    matplotlib's.
    """

    colour: str
    marker: str
    dash: tuple[float, ...] = ()


# the same everywhere, as in Figure 5 of the paper three lines that are told apart at a glance
RESPONSE_STYLES = {
    "chosen": Style("chosen", "o"),
    "base": Style("base", "s"),
    "rejected": Style("rejected", "^", (3.4, 1.5)),
}
MARGIN_STYLE = Style("ink", "D", (1.2, 1.2))
_MARKERS = "osD^vPXp"
_DASHES = ((), (3.4, 1.5), (1.2, 1.2), (4, 1.3, 1.2, 1.3))
NUM_COLOURS = 8


def run_style(i: int) -> Style:
    """Look of the i-th run where runs share a panel."""
    return Style(
        f"run{i % NUM_COLOURS + 1}",
        _MARKERS[i % len(_MARKERS)],
        _DASHES[(i + i // NUM_COLOURS) % len(_DASHES)],
    )


@dataclass(frozen=True)
class Line:
    """`thin` is logged in training, `marked` in evaluations."""

    label: str
    style: Style
    thin: Points
    marked: Points

    @property
    def values(self) -> list[float]:
        return [v for points in (self.thin, self.marked) for _, v in points if math.isfinite(v)]

    @property
    def end(self) -> float:
        """The last value: of the evaluations, where there are any."""
        points = self.marked if any(math.isfinite(v) for _, v in self.marked) else self.thin
        return [v for _, v in points if math.isfinite(v)][-1]


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    lines: list[Line]
    bounds: tuple[float, float] | None = None  # of the y axis; None: from the values
    has_zero: bool = False  # the y axis shows 0, with a line


@dataclass(frozen=True)
class Figure:
    """`caption` is one sentence on what is seen; panels of a `shared` figure have one y axis."""

    key: str
    title: str
    caption: str
    panels: list[Panel]
    shared: bool = False
    legend: list[tuple[str, Style]] = field(default_factory=list)
    has_marked: bool = False
    has_thin: bool = False


def make_figures(runs: Sequence[Run]) -> list[Figure]:
    """All figures for which there is data, in the order of the page."""
    compare = len(runs) > 1
    figures = [
        _figure(
            "drift",
            "Drift from the model before training",
            "How much more (above 0) or less (below 0) likely a response has become than it was before training; "
            "the base response is the model's own former answer, and a base line that sinks is forgetting"
            + ("; all panels have one scale." if compare else "."),
            [_by_response(run, "drift", "nats a response") for run in runs],
            shared=True,
        ),
        _figure(
            "loss",
            "Loss",
            "What training minimises: the preference part falls as chosen and rejected are told apart, the anchor "
            "part is above 0 only where base responses have lost likelihood.",
            [
                _by_run(runs, "loss", "Loss", "nats", has_zero=True),
                _by_run(runs, "loss/preference", "Preference part", "nats", has_zero=True),
                _by_run(runs, "loss/anchor", "Anchor part, weighted", "nats", has_zero=True),
                _by_run(runs, "loss/keep", "Kept prompts, weighted", "nats", has_zero=True),
            ],
        ),
        _figure(
            "rewards",
            "Rewards",
            "The reward is β · drift, and the margin is how far the chosen response is ahead of the rejected one"
            + ("; all panels have one scale." if compare else "."),
            [_by_response(run, "rewards", "β · nats", with_margin=True) for run in runs],
            shared=True,
        ),
        _figure(
            "preference",
            "Margins and accuracy",
            "How far, and how often, the chosen response is preferred to the rejected one: what training is for.",
            [
                _by_run(runs, "rewards/margins", "Margin", "β · nats", has_zero=True),
                _by_run(runs, "rewards/accuracies", "Accuracy", "share of rows", (0, 1)),
            ],
        ),
        _figure(
            "anchor",
            "Anchor activity",
            "The share of the base responses' tokens whose anchor pulls because they have become less likely (with "
            "anchor_level: response or anchor_loss: kl, of rows), and what they have lost; with anchor_weight: auto the "
            "weight that was found, and with kl and keep the divergence that is held.",
            [
                _by_run(runs, "anchor/active", "Active anchors", "share", (0, 1)),
                _by_run(runs, "anchor/lost", "Lost by tokens", "nats a token", has_zero=True),
                _by_run(runs, "anchor/weight", "Weight λ", "λ", has_zero=True),
                _by_run(runs, "anchor/kl", "Divergence of rows", "nats a token", has_zero=True),
                _by_run(
                    runs, "keep/kl", "Divergence of kept prompts", "nats a token", has_zero=True
                ),
            ],
        ),
        _figure(
            "retention",
            "Retention",
            "How well the model keeps its former answers on prompts it wasn't trained on: log-likelihood lost, and "
            "how often it would still say the same next token.",
            [
                _by_run(runs, "retention/drift", "Drift", "nats an answer", has_zero=True),
                _by_run(runs, "retention/agreement", "Agreement", "share of tokens", (0, 1)),
                _by_run(runs, "retention/kl", "Divergence", "nats a token", has_zero=True),
            ],
        ),
        _figure(
            "throughput",
            "Throughput",
            "Tokens through the model a second, the share of tokens that sharing the prompt saved, and the share of "
            "computed tokens that are not padding.",
            [
                _by_run(runs, "tokens/s", "Tokens a second", "tokens/s", has_zero=True),
                _by_run(runs, "sharing", "Saved by sharing", "share of tokens", (0, 1)),
                _by_run(runs, "packing", "Packing", "share of tokens", (0, 1)),
            ],
        ),
    ]
    return [figure for figure in figures if figure.panels]


def describe(panel: Panel) -> str:
    """The panel in words, for those who don't see it."""
    ends = "; ".join(f"{line.label} ends at {line.end:.3g}" for line in panel.lines)
    return f"{panel.title}, {panel.unit}, against the step: {ends}."


def _figure(
    key: str, title: str, caption: str, panels: Iterable[Panel], shared: bool = False
) -> Figure:
    panels = [panel for panel in panels if panel.lines]
    lines = [line for panel in panels for line in panel.lines]
    legend = {line.label: line.style for line in lines}
    return Figure(
        key,
        title,
        caption,
        panels,
        shared,
        legend=list(legend.items()),
        has_marked=any(line.marked for line in lines),
        has_thin=any(line.thin for line in lines),
    )


def _line(label: str, style: Style, run: Run, metric: str) -> Line:
    if metric.startswith("retention/"):  # measured now and then, in both modes in the same way
        return Line(label, style, [], run.retention(metric.removeprefix("retention/")))
    return Line(label, style, run.series.get(metric, []), run.series.get(f"eval_{metric}", []))


def _by_response(run: Run, metric: str, unit: str, with_margin: bool = False) -> Panel:
    lines = [_line(name, RESPONSE_STYLES[name], run, f"{metric}/{name}") for name in RESPONSES]
    if with_margin:
        lines.append(_line("margin", MARGIN_STYLE, run, "rewards/margins"))
    return Panel(run.name, unit, [line for line in lines if line.values], has_zero=True)


def _by_run(
    runs: Sequence[Run],
    metric: str,
    title: str,
    unit: str,
    bounds: tuple[float, float] | None = None,
    has_zero: bool = False,
) -> Panel:
    lines = [_line(run.name, run_style(i), run, metric) for i, run in enumerate(runs)]
    return Panel(title, unit, [line for line in lines if line.values], bounds, has_zero)
