"""The matrix of `bapo personas` as a picture."""

from collections.abc import Mapping
from typing import Any

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from bapo_plugin.report.plots import LIGHT, light_canvas, png_of

_WIDTH, _HEIGHT = 92, 50  # points, of a cell
_GAP = 14  # before the columns of what was kept
_LETTER = 7  # points, of a label
_LONGEST = 24  # letters of a label
_RANKED = LinearSegmentedColormap.from_list(
    "ranked", [LIGHT["rejected"], LIGHT["paper"], LIGHT["chosen"]]
)
_LOST = LinearSegmentedColormap.from_list("lost", [LIGHT["paper"], LIGHT["rejected"]])


def heatmap_png(found: Mapping[str, Any]) -> bytes:
    """A row an adapter, a column a persona's held-out pairs, then what was lost on unrelated prompts.

    Colour is the share of pairs ranked right, from 0 over a half (white) to 1, and the share of former answers that
    lost over 2 nats. A persona's own pairs are framed.

    Args:
        found: see `bapo_plugin.evaluation.matrix.measure_personas`.
    """
    personas = list(found["personas"])
    labels = [_short(name) for name in personas]
    left = 24 + _LETTER * max(map(len, [*labels, "adapter"]))
    tilted = max(map(len, labels)) * _LETTER > _WIDTH - 8
    head = 56 + (int(0.6 * _LETTER * max(map(len, labels))) if tilted else 18)
    width = max(left + _WIDTH * (len(personas) + 2) + _GAP + 14, 560)
    height = head + _HEIGHT * len(personas) + 34
    with light_canvas(width, height) as canvas:
        axes = canvas.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))  # points from the upper left corner
        axes.axis("off")

        def write(x: float, y: float, text: str, colour: str = "ink", **kwargs: Any) -> None:
            """A dollar in a name is no formula."""
            axes.text(x, y, text, color=LIGHT[colour], parse_math=False, **kwargs)

        def cell(x: float, y: float, fill: Any, texts: tuple[str, str]) -> None:
            box = Rectangle((x, y), _WIDTH, _HEIGHT, facecolor=fill, edgecolor=LIGHT["grid"])
            axes.add_patch(box)
            red, green, blue, _ = fill
            colour = "paper" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "ink"
            for text, down, size in zip(texts, (19, 36), (13, 10), strict=True):
                place = (x + _WIDTH / 2, y + down)
                write(*place, text, colour, size=size, ha="center", va="center")

        write(14, 22, "Each adapter on each persona's held-out pairs", size=14, weight="bold")
        write(left - 10, head - 8, "adapter", "muted", size=10, ha="right")
        kept = left + _WIDTH * len(personas) + _GAP
        tilt = {"rotation": 30, "ha": "left"} if tilted else {"ha": "center"}
        for i, label in enumerate(labels):
            place = left + _WIDTH * (i + (0.3 if tilted else 0.5))
            write(place, head - 8, label, size=11, rotation_mode="anchor", **tilt)
        write(kept + _WIDTH, head - 22, "unrelated prompts", size=11, ha="center")
        for i, label in enumerate(("answers lost", "drift")):
            write(kept + _WIDTH * (i + 0.5), head - 8, label, "muted", size=10, ha="center")
        for row, (adapter, label) in enumerate(zip(personas, labels, strict=True)):
            y = head + _HEIGHT * row
            write(left - 10, y + _HEIGHT / 2, label, size=11, ha="right", va="center")
            for column, persona in enumerate(personas):
                numbers = found["pairs"][persona][adapter]
                share, margin = numbers["accuracy"]["value"], numbers["margin"]["value"]
                texts = (f"{share:.0%}", f"{margin:+.1f} nats")
                cell(left + _WIDTH * column, y, _RANKED(share), texts)
            after = found["retention"]["after"][adapter]
            lost, drift = after["lost"]["value"], after["drift"]["value"]
            cell(kept, y, _LOST(lost), (f"{lost:.0%}", "over 2 nats"))
            cell(kept + _WIDTH, y, _LOST(0.0), (f"{drift:+.1f}", "nats an answer"))
        for i in range(len(personas)):  # above the lines of all cells
            corner = (left + _WIDTH * i, head + _HEIGHT * i)
            axes.add_patch(
                Rectangle(corner, _WIDTH, _HEIGHT, fill=False, edgecolor=LIGHT["ink"], linewidth=2)
            )
        text = "Share of pairs ranked right: white is a half, blue all, orange none. Framed: a persona's own pairs."
        write(14, height - 14, text, "muted", size=9)
        return png_of(canvas)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
