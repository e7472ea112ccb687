"""The `bapo` command.

    bapo anchors CONFIG.yml [--output FILE.jsonl|.parquet] [--explain]

Also as `python -m bapo_plugin`, which accelerate can launch on several GPUs.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Base-Anchored Preference Optimization: what goes with `rl: bapo` in axolotl.",
)


@app.callback()
def _main() -> None:
    # a command of ours reports to nobody
    os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
    os.environ.setdefault("AXOLOTL_LOG_LEVEL", "WARNING")  # it prints the whole configuration


@app.command()
def anchors(
    config: Annotated[Path, typer.Argument(help="YAML of the training run.", exists=True)],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the rows with their base responses here, in the data set's order (.jsonl or .parquet). "
            "With several data sets each gets a file of its own, with its place in the YAML in the name.",
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Say which responses are there, which would be made, and why; make none.",
        ),
    ] = False,
) -> None:
    """Make the base responses that rows lack, with the reference model, and keep them.

    What was made before is reused; an interrupted run goes on. Nothing is sent anywhere, except to the
    server that `bapo.anchors.server` names.
    """
    if output and output.suffix not in (".jsonl", ".parquet"):
        _fail(f"--output: {output} must end in .jsonl or .parquet")
    if output and not output.parent.is_dir():
        _fail(f"--output: there is no folder {output.parent}")
    from bapo_plugin.anchors.command import explain_anchors, write_anchors

    try:
        if explain:
            explain_anchors(config)
        else:
            write_anchors(config, output)
    except ValueError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        typer.echo("Interrupted. What was made is kept; the same command goes on.", err=True)
        raise typer.Exit(130) from None


def _fail(message: str) -> Any:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(2)


def main() -> None:
    """Entry point."""
    sys.exit(app())
