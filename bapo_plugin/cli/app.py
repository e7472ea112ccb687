"""The application that the commands hang on, and what holds for all of them."""

import os
from typing import Annotated

import typer

from bapo_plugin import __version__
from bapo_plugin.cli.arguments import refuse_older
from bapo_plugin.network import report_to_nobody

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # paragraphs are wrapped to the screen
    help="Base-Anchored Preference Optimization: what goes with `rl: bapo` in axolotl.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"axolotl-plugin-bapo {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    refuse_older(context.invoked_subcommand)
    report_to_nobody()
    os.environ.setdefault("AXOLOTL_LOG_LEVEL", "WARNING")  # it prints the whole configuration
