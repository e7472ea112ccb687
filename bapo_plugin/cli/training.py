"""Commands that make: base responses, and adapters of many users."""

from pathlib import Path
from typing import Annotated

import typer

from bapo_plugin.cli.app import app
from bapo_plugin.cli.arguments import (
    Base,
    Config,
    Launcher,
    Only,
    OnlyList,
    OnlyMatrix,
    Personas,
    errors_in_a_line,
    fail,
    must_exist,
)
from bapo_plugin.network import stay_offline


@app.command(rich_help_panel="Making")
def anchors(
    config: Config,
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
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Read all that was kept of base responses and reference log-probs, and check it; make none.",
        ),
    ] = False,
) -> None:
    """Make the base responses that rows lack, with the reference model, and keep them.

    CONFIG: the YAML of the training run.

    What was made before is reused; an interrupted run goes on. Nothing is reported to anybody, and
    no hub is asked where model and data are files. Prompts go nowhere but to the server that
    `bapo.anchors.server` names.
    """
    must_exist(config)
    if output and output.suffix not in (".jsonl", ".parquet"):
        fail(f"--output: {output} must end in .jsonl or .parquet")
    if output and not output.parent.is_dir():
        fail(f"--output: there is no folder {output.parent}")
    stay_offline([config])
    from bapo_plugin.commands.anchors import explain_anchors, verify_stores, write_anchors

    with errors_in_a_line("Interrupted. What was made is kept; the same command goes on."):
        if verify:
            verify_stores(config)
        elif explain:
            explain_anchors(config)
        else:
            write_anchors(config, output)


@app.command(rich_help_panel="Making")
def personas(
    config: Base,
    file: Personas,
    only: Only = None,
    only_list: OnlyList = False,
    only_matrix: OnlyMatrix = False,
    launcher: Launcher = None,
) -> None:
    """Many users, one model: train an adapter for each, then measure each on everybody's pairs.

    CONFIG: the YAML that all begin with. PERSONAS: a YAML with the name of each and what differs,
    for instance (lists of data sets are merged entry by entry):

        anna: {datasets: [{field_chosen: plain}]}

        jack: {datasets: [{field_chosen: pirate}], learning_rate: 1e-4}

    bapo personas config.yml personas.yml

    Each gets a folder in CONFIG's output_dir, with a config.yml for all other commands. What is trained is
    skipped, what was interrupted goes on. Base responses and reference log-probs are made once for all. The
    matrix goes to the screen and to bapo-personas.json, .md and .png in CONFIG's output_dir.
    """
    if only_list and only_matrix:
        fail("--list and --matrix contradict each other; give one")
    must_exist(config, file)
    from bapo_plugin.commands.personas import personas

    with errors_in_a_line("Interrupted. What was made is kept; the same command goes on."):
        code = personas(
            config,
            file,
            only=only or (),
            only_list=only_list,
            only_matrix=only_matrix,
            launcher=launcher,
        )
    raise typer.Exit(code)
