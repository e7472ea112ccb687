"""Draws the pictures of docs/metrics.md from runs: python docs/pictures.py HEALTHY FORGETS TIGHT.

Each is a folder that training has written; metrics.md says of which runs they are.
"""

import io
import sys
from dataclasses import replace
from pathlib import Path

from PIL import Image

from bapo_plugin.report.figures import make_figures
from bapo_plugin.report.plots import figure_png
from bapo_plugin.report.read import read_runs

NAMES = {"healthy": "Healthy", "forgets": "Forgets", "tight": "Anchored too tightly"}
FOLDER = Path(__file__).parent / "pictures"
# the figure of the report, the place of its panel, and a title
PANELS = (("drift", 0, "Drift"), ("preference", 0, "Margin"), ("anchor", 0, "Active anchors"))


def picture(title: str, folder: Path) -> bytes:
    """A run's drift, margin and anchors side by side, as a PNG of few colours."""
    figures = {figure.key: figure for figure in make_figures(read_runs([folder]))}
    drift = figures["drift"]
    panels = [replace(figures[key].panels[i], title=name) for key, i, name in PANELS]
    png = figure_png(replace(drift, title=title, caption="", panels=panels, shared=False))
    file = io.BytesIO()
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    image.quantize(method=Image.Quantize.MAXCOVERAGE).save(file, "PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for (name, title), run in zip(NAMES.items(), sys.argv[1:], strict=True):
        (FOLDER / f"{name}.png").write_bytes(picture(title, Path(run)))
