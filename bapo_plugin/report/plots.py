"""Figures as SVG for the page and as PNG, drawn by the same code.

The SVG of a panel is made for a page in light and dark: it is drawn in stand-in colours, which are then
replaced by variables of the page's style sheet. Names of runs are not in it; the page shows them, in
its own fonts and wrapped.
"""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator

from bapo_plugin.report.figures import Figure, Line, Panel, Style
from bapo_plugin.report.read import Points

# Chosen, base and rejected are Okabe & Ito's blue, green and vermilion, those of runs are Tol's "muted";
# both are made for all kinds of colour vision. name -> (light, dark)
COLOURS = {
    "ink": ("#1d2026", "#e8e8e6"),
    "muted": ("#5d636e", "#a2a8b3"),
    "grid": ("#e7e8eb", "#2b2f37"),
    "zero": ("#a7acb5", "#666d79"),
    "paper": ("#ffffff", "#15171b"),
    "chosen": ("#0072b2", "#56b0ea"),
    "base": ("#008f68", "#2fc79b"),
    "rejected": ("#cf5500", "#f58a3c"),
    "run1": ("#332288", "#a99cf5"),
    "run2": ("#c4566a", "#ee8b9b"),
    "run3": ("#a08220", "#dccb72"),
    "run4": ("#2f94b8", "#88cdee"),
    "run5": ("#882255", "#d877ad"),
    "run6": ("#71751f", "#b9bd55"),
    "run7": ("#93439a", "#cf8fd6"),
    "run8": ("#5d636e", "#a2a8b3"),
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
_STAND_INS = {name: f"#fe00{i:02x}" for i, name in enumerate(COLOURS)}

_WIDTH, _HEIGHT = 360, 236  # points, of a panel
_MARGINS = {"left": 48, "right": 12, "top": 10, "bottom": 40}
_FONT = 12
_MAX_POINTS = 500  # of a line: more can't be told apart in a panel
_MAX_MARKERS = 12
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bapo",  # ids are otherwise random, and the page another one each time
    "font.size": _FONT,
    "axes.unicode_minus": True,
    "path.simplify": True,
}
# families that have what DejaVu Sans lacks, where one is installed
_MORE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Microsoft YaHei",
    "Hiragino Sans",
    "Arial Unicode MS",
)


def panel_svg(panel: Panel, figure: Figure, prefix: str) -> str:
    """One panel as an `<svg>` element to put into HTML.

    Args:
        prefix: put before each id, so that those of several panels don't clash in one page.
    """
    with matplotlib.rc_context(SETTINGS):
        canvas = Canvas(figsize=(_WIDTH / 72, _HEIGHT / 72))
        FigureCanvasSVG(canvas)
        axes = canvas.add_axes(_box(0, 0, 1, _HEIGHT))
        _draw(axes, panel, _limits(panel, figure), _STAND_INS)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(file, format="svg", metadata=nothing, transparent=True)
    return _for_html(file.getvalue(), prefix)


def figure_png(figure: Figure) -> bytes:
    """All panels of a figure in one PNG, in light colours, with titles, legend and caption."""
    columns = min(3, len(figure.panels))
    width = columns * _WIDTH
    legend = _legend_lines(figure, width) if len(figure.legend) > 1 else []
    titles = [textwrap.wrap(panel.title, 44, max_lines=3) or [""] for panel in figure.panels]
    starts = range(0, len(titles), columns)
    # of each row of panels, in points
    heights = [30 + 16 * max(map(len, titles[i : i + columns])) + _HEIGHT for i in starts]
    caption = figure.caption
    if figure.has_thin and figure.has_marked:
        caption += " Thin: training; thick, with marks: evaluation."
    caption_lines = textwrap.wrap(caption, int(width / 6.2))
    head, foot = 38 + 18 * len(legend), 12 + 15 * len(caption_lines)
    height = head + sum(heights) + foot
    with light_canvas(width, height) as canvas:

        def write(x: float, y: float, text: str, colour: str = "ink", **kwargs: Any) -> None:
            """At points from the upper left corner; a dollar in a name is no formula."""
            place = (x / width, 1 - y / height)
            canvas.text(*place, text, va="top", color=LIGHT[colour], parse_math=False, **kwargs)

        write(14, 12, figure.title, size=14, weight="bold")
        for i, line in enumerate(legend):
            y = 40 + 18 * i
            for x, label, style in line:
                canvas.add_artist(_legend_line(x / width, 1 - (y + 6.5) / height, style, width))
                write(x + 33, y, label)
        top = head
        for start, row_height in zip(starts, heights, strict=True):
            for i, panel in enumerate(figure.panels[start : start + columns]):
                title = titles[start + i]
                write(i * _WIDTH + 14, top + 8, "\n".join(title), size=12, weight="bold")
                write(i * _WIDTH + 14, top + 10 + 16 * len(title), panel.unit, "muted", size=11)
                box = _box(i * _WIDTH, height - top - row_height, columns, height)
                _draw(canvas.add_axes(box), panel, _limits(panel, figure), LIGHT)
            top += row_height
        write(14, top + 2, "\n".join(caption_lines), "muted", size=10)
        return png_of(canvas)


@contextmanager
def light_canvas(width: float, height: float) -> Iterator[Canvas]:
    """An empty picture of this size in points, in light colours, with fonts for all that is installed."""
    with (
        matplotlib.rc_context({**SETTINGS, "font.family": families()}),
        warnings.catch_warnings(),
    ):
        # what no installed font has is drawn as a box
        warnings.filterwarnings("ignore", "Glyph .* missing")
        canvas = Canvas(figsize=(width / 72, height / 72), facecolor=LIGHT["paper"])
        FigureCanvasAgg(canvas)
        yield canvas


def png_of(canvas: Canvas) -> bytes:
    """The picture, inside its `light_canvas`."""
    file = io.BytesIO()
    canvas.savefig(file, format="png", dpi=144, metadata={"Software": None})
    return file.getvalue()


def _box(left: float, bottom: float, width: float, height: float) -> tuple[float, ...]:
    """A panel's axes as shares of a figure that is `width` panels wide and `height` points high."""
    across = width * _WIDTH
    return (
        (left + _MARGINS["left"]) / across,
        (bottom + _MARGINS["bottom"]) / height,
        (_WIDTH - _MARGINS["left"] - _MARGINS["right"]) / across,
        (_HEIGHT - _MARGINS["top"] - _MARGINS["bottom"]) / height,
    )


def families() -> list[str]:
    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in _MORE_FONTS if name in installed)]


def _draw(
    axes: Axes, panel: Panel, limits: tuple[float, float], colours: Mapping[str, str]
) -> None:
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colours["zero"])
    axes.patch.set_visible(False)
    axes.grid(axis="y", color=colours["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    if panel.has_zero and limits[0] < 0:
        axes.axhline(0, color=colours["zero"], linewidth=0.9, zorder=1)
    last = max(1, *(step for line in panel.lines for step, _ in line.thin + line.marked))
    axes.set_xlim(-0.025 * last, 1.025 * last)
    axes.set_ylim(limits)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(*limits)
    axes.yaxis.set_major_locator(FixedLocator([t for t in ticks if limits[0] <= t <= limits[1]]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_tick)
        axis.set_tick_params(length=0, pad=5, labelcolor=colours["muted"], labelsize=_FONT)
    text = {"color": colours["muted"], "size": _FONT, "parse_math": False}
    axes.set_xlabel("step", loc="right", labelpad=2, **text)
    strength = 1.0
    if any(line.marked for line in panel.lines):  # thin lines are behind those
        strength = 0.55 if len(panel.lines) <= 4 else 0.3
    for line in panel.lines:
        _draw_line(axes, line, colours, strength)


def _draw_line(axes: Axes, line: Line, colours: Mapping[str, str], strength: float) -> None:
    colour, style = colours[line.style.colour], line.style
    marker = {
        "marker": style.marker,
        "markersize": 6,
        "markeredgecolor": colours["paper"],
        "markeredgewidth": 0.8,
    }
    if line.thin:
        points = _thinned(line.thin)
        few = sum(math.isfinite(v) for _, v in points) <= 2  # a line of one point isn't seen
        if few or len(line.marked) <= 2:
            strength = 1.0
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            linewidth=1.0,
            alpha=strength,
            zorder=2,
            **({**marker, "markersize": 5.5} if few else {}),
        )
    if line.marked:
        axes.plot(
            *zip(*line.marked, strict=True),
            color=colour,
            linewidth=2.1,
            linestyle=(0, style.dash) if style.dash else "-",
            dash_capstyle="butt",
            zorder=3,
            markevery=max(1, math.ceil(len(line.marked) / _MAX_MARKERS)),
            clip_on=False,
            **marker,
        )


def _thinned(points: Points) -> Points:
    """At most about `_MAX_POINTS` points that look the same: the lowest and the highest of each stretch."""
    size = math.ceil(2 * len(points) / _MAX_POINTS)
    if size <= 2:
        return points
    kept = []
    for start in range(0, len(points), size):
        stretch = [p for p in points[start : start + size] if math.isfinite(p[1])]
        if stretch:
            kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def _limits(panel: Panel, figure: Figure) -> tuple[float, float]:
    if panel.bounds:
        low, high = panel.bounds
    else:
        panels = figure.panels if figure.shared else [panel]
        values = [v for p in panels for line in p.lines for v in line.values]
        values += [0.0] if panel.has_zero else []
        low, high = min(values), max(values)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    # what begins at zero stands on the axis
    return (low if panel.has_zero and low == 0 else low - pad), high + pad


def _tick(value: float, _position: int | None = None) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}".replace("-", "−")
    return f"{round(value, 12) + 0.0:.5g}".replace("-", "−")


def _for_html(svg: str, prefix: str) -> str:
    """The bare element: no fonts or global styles of its own, ids of its own, colours of the page.

    Replacing text is safe here: all text in the SVG is this package's.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # would hold for the whole page
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| version="1\.1"', "", svg)
    svg = svg.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1">', svg, count=1)
    for name, colour in _STAND_INS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


def _legend_lines(figure: Figure, width: float) -> list[list[tuple[float, str, Style]]]:
    """The legend in lines that fit: place from the left in points, label, style."""
    lines: list[list[tuple[float, str, Style]]] = [[]]
    x = 14.0
    for label, style in figure.legend:
        limit = int((width - 80) / 7.2)
        label = label[: limit - 1] + "…" if len(label) > limit else label
        needed = 33 + 7.2 * len(label) + 18
        if lines[-1] and x + needed > width:
            lines.append([])
            x = 14.0
        lines[-1].append((x, label, style))
        x += needed
    return lines


def _legend_line(x: float, y: float, style: Style, width: float) -> Line2D:
    return Line2D(
        [x, x + 13 / width, x + 26 / width],
        [y] * 3,
        color=LIGHT[style.colour],
        linewidth=2.1,
        linestyle=(0, style.dash) if style.dash else "-",
        marker=style.marker,
        markevery=[1],
        markersize=6,
        markeredgecolor=LIGHT["paper"],
    )
