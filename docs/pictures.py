"""Draws the pictures of docs/metrics.md from runs recorded in benchmarks/results: python docs/pictures.py."""

import io
import json
from dataclasses import replace
from pathlib import Path

from PIL import Image

from bapo_plugin.report.figures import RESPONSE_STYLES, Figure, Line, Panel, run_style
from bapo_plugin.report.plots import figure_png

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
FOLDER = Path(__file__).parent / "pictures"
# file of the picture -> its title, the file of results, the method there
CASES = {
    "healthy": ("Healthy: BAPO, λ = 0.05", "forgetting-24-cpu.json", "BAPO token hinge 0.05"),
    "forgets": ("Forgets: DPO", "forgetting-24-cpu.json", "DPO"),
    "tight": (
        "Held too tightly: BAPO, anchor_loss: nll, λ = 0.1",
        "forgetting-24-cpu.json",
        "BAPO nll 0.1",
    ),
}


def panels(file: str, method: str) -> list[Panel]:
    """Of the run with the first seed: drift in training, then margin and drift on prompts outside it."""
    runs = json.loads((RESULTS / file).read_text("utf-8"))
    run = next(r for r in runs if r["method"] == method and r["seed"] == 0)

    def points(part: str, key: str) -> list[tuple[int, float]]:
        return [(entry["step"], entry[key]) for entry in run[part]]

    drift = [
        Line(name, style, points("training", f"drift/{name}"), [])
        for name, style in RESPONSE_STYLES.items()
    ]
    margin = [Line("margin", run_style(0), [], points("curve", "margin"))]
    kept = [Line("drift", RESPONSE_STYLES["base"], [], points("curve", "drift"))]
    return [
        Panel("Training rows: drift", "nats a response", drift, has_zero=True),
        Panel("Held-out pairs: Δ chosen − Δ rejected", "nats", margin, has_zero=True),
        Panel("Unrelated prompts: drift of former answers", "nats an answer", kept, has_zero=True),
    ]


def pictures() -> dict[str, bytes]:
    """name -> PNG; a panel has the same scale in all of them."""
    found = {name: panels(file, method) for name, (_, file, method) in CASES.items()}
    for i, same in enumerate(zip(*found.values(), strict=True)):
        values = [value for panel in same for line in panel.lines for value in line.values]
        for row in found.values():
            row[i] = replace(row[i], bounds=(min(values), max(values)))
    legend = list(RESPONSE_STYLES.items())
    return {
        name: _small(figure_png(Figure(name, CASES[name][0], "", row, legend=legend)))
        for name, row in found.items()
    }


def _small(png: bytes) -> bytes:
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.quantize(method=Image.Quantize.MAXCOVERAGE).save(file, "PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, png in pictures().items():
        (FOLDER / f"{name}.png").write_bytes(png)
