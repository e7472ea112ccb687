"""What the subcommands of `bapo` share: arguments, errors, what goes to stdout."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

# of `bapo eval`, with --data; `evaluation.local` has them
LOCAL_TASKS = {"paper", "scienceqa", "mmlu_humanities", "hhh", "truthfulqa"}

Config = Annotated[Path, typer.Argument(help="YAML of the training run.")]
LoadIn4Bit = Annotated[
    bool | None,
    typer.Option(
        help="Without a YAML: quantise the model to NF4. Default: as the run recorded it, else not."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON for programs, and nothing else on stdout.")
]


@contextmanager
def others_to_stderr(wanted: bool) -> Iterator[TextIO]:
    """Gives stdout, to which libraries write their log too: where a program reads it, they go to stderr."""
    out = sys.stdout
    with redirect_stdout(sys.stderr) if wanted else nullcontext():
        yield out


def must_exist(*paths: Path) -> None:
    """Before anything heavy is imported."""
    for path in paths:
        if not path.exists():
            fail(f"there is no file or folder {path}")


def fail(message: str) -> Any:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(2)
