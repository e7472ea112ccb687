"""The report: one HTML file that needs no other, and its figures as PNG."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bapo_plugin.files import whole
from bapo_plugin.report import tables
from bapo_plugin.report.figures import Figure, Style, describe, make_figures
from bapo_plugin.report.plots import COLOURS, figure_png, panel_svg
from bapo_plugin.report.read import Run, read_runs
from bapo_plugin.report.verdict import verdict

NUM_OPEN_SAMPLES = 4  # the others are folded away

# markers of the legend around (14, 6), 6 points wide
_MARKERS = {
    "o": "M10.8 6a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0z",
    "s": "M11 3h6v6h-6z",
    "^": "M14 2.6L17.4 9H10.6z",
    "D": "M14 2L18 6L14 10L10 6z",
    "v": "M14 9.4L17.4 3H10.6z",
    "P": "M13 2.6h2v2.4h2.4v2H15v2.4h-2V7h-2.4V5H13z",
    "X": "M11 4.4L12.4 3L14 4.6L15.6 3L17 4.4L15.4 6L17 7.6L15.6 9L14 7.4L12.4 9L11 7.6L12.6 6z",
    "p": "M14 2.6L17.4 5L16.1 9H11.9L10.6 5z",
}


def write_report(runs: Sequence[Path], output: Path) -> list[Path]:
    """Write a page about runs, finished or still going on, and its figures beside it.

    Args:
        runs: output folders of axolotl or transformers, of BAPO, DPO or other training; checkpoints in
            them or trainer_state.json files work too.
        output: the page, `NAME.html`. Figures become `NAME-drift.png` and so on in the same folder.

    Returns:
        The files written, the page first. The same runs give the same bytes.

    Raises:
        ValueError: no run at a path, a file that can't be read, or an `output` that can't be written; the
            message says which path, why, and what to do. Then nothing is written.
    """
    output = Path(output)
    if output.suffix != ".html":
        raise ValueError(f"{output}: a report is a web page; give it a name that ends in .html")
    if not output.parent.is_dir():
        raise ValueError(f"{output}: there is no folder {output.parent}; make it first")
    if output.is_dir():
        raise ValueError(f"{output}: is a folder; name a file")
    all_runs = read_runs(runs)
    figures = make_figures(all_runs)
    files = {output: render(all_runs, figures).encode()}
    for figure in figures:
        files[output.with_name(f"{output.stem}-{figure.key}.png")] = figure_png(figure)
    _write_all(files)
    return list(files)


def render(runs: Sequence[Run], figures: Sequence[Figure]) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    heads, rows = tables.summary(runs)
    known, differing = tables.differences(runs)
    models = {run.model for run in runs if run.model}
    samples = tables.samples(runs)
    return environment.get_template("template.html").render(
        runs=runs,
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        model=models.pop() if len(models) == 1 else None,
        colours=COLOURS,
        heads=heads,
        rows=rows,
        verdicts=[verdict(run) for run in runs],
        look=tables.what_to_look_at(runs),
        figures=figures,
        svg=_svg,
        swatch=_swatch,
        tasks=tables.task_table(runs),
        retention=tables.retention_table(runs),
        samples=samples[:NUM_OPEN_SAMPLES],
        more_samples=samples[NUM_OPEN_SAMPLES:],
        known=known,
        differing=differing,
        complete=tables.complete,
    )


def _svg(figure: Figure, index: int) -> Markup:
    panel = figure.panels[index]
    svg = panel_svg(panel, figure, f"{figure.key}{index}-")
    label = Markup('<svg role="img" aria-label="{}" ').format(describe(panel))
    # matplotlib's, without anything of the user's: tests/unit/test_report.py plants markup everywhere
    return label + Markup(svg.removeprefix("<svg "))  # nosec B704


def _swatch(style: Style) -> Markup:
    dash = " ".join(f"{2 * length:g}" for length in style.dash)
    return Markup(
        '<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true" style="color:var(--{})">'
        '<path d="M1 6H27" stroke-dasharray="{}"/><path class="marker" d="{}"/></svg>'
    ).format(style.colour, dash or "none", _MARKERS[style.marker])


def _write_all(files: dict[Path, bytes]) -> None:
    """All files or none: each is written under another name first; the page, the first, is there last."""
    with ExitStack() as stack:
        for path, content in files.items():
            partial = stack.enter_context(whole(path, "name another page with --output"))
            partial.write_bytes(content)
