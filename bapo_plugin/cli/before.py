"""Commands before anything is trained: what this machine has, what the model will see, whether it fits."""

import json
from typing import Annotated

import typer

from bapo_plugin.cli.app import app
from bapo_plugin.cli.arguments import (
    AsJson,
    Config,
    PlanGpu,
    PlanModelConfig,
    PlanPromptTokens,
    PlanResponseTokens,
    PlanVram,
    errors_in_a_line,
    fail,
    must_exist,
    others_to_stderr,
)
from bapo_plugin.network import stay_offline


@app.command(rich_help_panel="Before training")
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

    with errors_in_a_line():
        code = check(config, rows, as_json)
    raise typer.Exit(code)


@app.command(rich_help_panel="Before training")
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

    with errors_in_a_line():
        fits = plan(
            config,
            model_config=model_config,
            gpu=gpu,
            vram=vram,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            as_json=as_json,
        )
    if not fits:
        raise typer.Exit(1)


@app.command(rich_help_panel="Before training")
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
