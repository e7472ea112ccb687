"""The `bapo` command: arguments and help. `python -m bapo_plugin` is the same, for accelerate to launch on several GPUs."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from bapo_plugin import __version__
from bapo_plugin.arguments import (
    LOCAL_TASKS,
    AsJson,
    Base,
    Config,
    EvalData,
    EvalProbe,
    EvalPrompts,
    EvalScale,
    EvalTargets,
    EvalTasks,
    Launcher,
    LoadIn4Bit,
    Only,
    OnlyList,
    OnlyMatrix,
    Personas,
    PlanGpu,
    PlanModelConfig,
    PlanPromptTokens,
    PlanResponseTokens,
    PlanVram,
    fail,
    must_exist,
    others_to_stderr,
    refuse_older,
)
from bapo_plugin.network import report_to_nobody, stay_offline

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


@app.command()
def check(
    config: Config,
    rows: Annotated[
        int, typer.Option("--rows", "-r", help="Show so many rows as the model sees them.", min=0)
    ] = 2,
    as_json: AsJson = False,
) -> None:
    """Show what can be known of a run before its model is loaded: bapo check config.yml --rows 3

    CONFIG: the YAML of the training run.

    Needs tokenizer and config of the model, not its weights, and makes no base responses. Rows
    are rendered as for training and kept for it.

    Exit code 2: an error that would stop the run. 1: something deserves a look. 0: all is well.

    What deserves a look: a misspelt key; rows left out, cut or odd; identical rows; base responses
    that equal chosen or rejected, say nothing, or of which more than a fifth were cut; no held-out
    rows; prompts on both sides of the split, or in the files of bapo.keep and bapo.retention.
    """
    must_exist(config)
    stay_offline([config])
    from bapo_plugin.commands.check import check

    try:
        code = check(config, rows, as_json)
    except ValueError as error:
        fail(str(error))
    raise typer.Exit(code)


@app.command()
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

    try:
        if verify:
            verify_stores(config)
        elif explain:
            explain_anchors(config)
        else:
            write_anchors(config, output)
    except ValueError as error:
        fail(str(error))
    except KeyboardInterrupt:
        typer.echo("Interrupted. What was made is kept; the same command goes on.", err=True)
        raise typer.Exit(130) from None


@app.command("eval")
def evaluate(
    targets: EvalTargets,
    prompts: EvalPrompts = None,
    probe: EvalProbe = None,
    tasks: EvalTasks = None,
    data: EvalData = None,
    scale: EvalScale = None,
    limit: Annotated[
        int | None, typer.Option(help="At most so many questions of each task.", min=1)
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Most tokens of an answer to a prompt.", min=1)
    ] = 64,
    batch_size: Annotated[int, typer.Option(help="For tasks.", min=1)] = 8,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask tasks through the chat template.")
    ] = False,
    load_in_4bit: LoadIn4Bit = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the results. Default: each adapter's own."),
    ] = None,
) -> None:
    """What training has changed: the model's former answers and knowledge, before and after.

    TARGETS: the YAML of a run, whose adapter is the one in its output_dir, or folders of
    adapters of one base model, which get a column each, or both.

    Loads the model once, quantised as in training; with its adapter off it is the one before.
    Prints a table and writes bapo-eval.json and bapo-eval.md, which also have results by group
    and subject. Nothing is reported to anybody, and no hub is asked where model, data and tasks
    are files.
    """
    must_exist(*targets)
    names = [name for text in tasks or () for name in text.split(",") if name]
    if not names or (data and set(names) <= LOCAL_TASKS):
        stay_offline(targets)
    from bapo_plugin.evaluation.run import evaluate
    from bapo_plugin.evaluation.scaled import read_scales

    try:
        paths = evaluate(
            targets,
            prompts=prompts,
            tasks=names,
            data=data,
            scales=read_scales(scale or ()),
            limit=limit,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            chat=chat,
            load_in_4bit=load_in_4bit,
            output=output,
            probe=probe,
        )
    except ValueError as error:
        fail(str(error))
    for path in paths:
        typer.echo(f"Wrote {path}")


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="output_dir of runs, of BAPO, DPO or other, finished or going on."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The page; figures go beside it as PNG.")
    ] = Path("report.html"),
) -> None:
    """Show what runs did: one self-contained page with drift, loss, rewards, retention and settings.

    RUNS: the output_dir of each run, of BAPO, DPO or other, finished or going on. What `bapo
    eval` has written there is shown too.
    """
    must_exist(*runs)
    from bapo_plugin.report import write_report

    try:
        paths = write_report(runs, output)
    except ValueError as error:
        fail(str(error))
    for path in paths:
        typer.echo(f"Wrote {path}")


@app.command()
def chat(
    targets: Annotated[
        list[Path],
        typer.Argument(
            help="Folder of a run or its YAML, or several folders of adapters of one base model."
        ),
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="Ask this and end; several by repeating."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 256,
    load_in_4bit: LoadIn4Bit = None,
    as_json: AsJson = False,
) -> None:
    """Talk to the model before and after training, side by side.

    TARGETS: the folder that a run has written, or its YAML. The model is loaded as in training, on a
    CPU and in 4 bits too, and answers twice, with its adapter off and on.

    A file of prompts, one a line: bapo chat outputs/bapo < prompts.txt
    """
    must_exist(*targets)
    stay_offline(targets)
    try:
        with others_to_stderr(as_json) as out:  # axolotl's log takes stdout when it is imported
            from bapo_plugin.commands.chat import chat

            chat(targets, prompts or (), max_new_tokens, load_in_4bit, out if as_json else None)
    except ValueError as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
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

    try:
        code = personas(
            config,
            file,
            only=only or (),
            only_list=only_list,
            only_matrix=only_matrix,
            launcher=launcher,
        )
    except ValueError as error:
        fail(str(error))
    raise typer.Exit(code)


@app.command()
def plan(
    config: Config,
    gpu: PlanGpu = None,
    vram: PlanVram = None,
    model_config: PlanModelConfig = None,
    prompt_tokens: PlanPromptTokens = None,
    response_tokens: PlanResponseTokens = None,
    as_json: AsJson = False,
) -> None:
    """Does this run fit on a card, how large may it be, and how long does it take?

    CONFIG: the YAML of the training run. Nothing is loaded but the model's config:

        bapo plan config.yml --gpu "RTX 4090"

    Prints memory by part beside that of TRL's DPO, and the time of a step. With --gpu or --vram
    the exit code is 0 if the run fits and 1 if not; then it says which keys of the YAML would
    make it fit. Errors exit with 2.
    """
    if gpu and vram:
        fail("--gpu and --vram both name a card; give one")
    must_exist(config, *filter(None, [model_config]))
    stay_offline([config])
    from bapo_plugin.commands.plan import plan

    try:
        fits = plan(
            config,
            model_config=model_config,
            gpu=gpu,
            vram=vram,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            as_json=as_json,
        )
    except ValueError as error:
        fail(str(error))
    if not fits:
        raise typer.Exit(1)


@app.command()
def doctor(
    as_json: AsJson = False,
) -> None:
    """What is installed here, which kernel and attention will be used, and what is missing.

    Made to be pasted into an issue. Exit code 1 where something will not work.
    """
    with others_to_stderr(as_json) as out:
        from bapo_plugin.commands.doctor import diagnose, show

        found = diagnose()
    if as_json:
        print(json.dumps(found, indent=1), file=out)
    else:
        show(found)
    raise typer.Exit(1 if found["problems"] else 0)


def main() -> None:
    """Entry point."""
    sys.exit(app())
