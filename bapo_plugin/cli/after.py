"""Commands after training."""

import os
from pathlib import Path
from typing import Annotated

import typer

from bapo_plugin.cli.app import app
from bapo_plugin.cli.arguments import (
    LOCAL_TASKS,
    AsJson,
    EvalData,
    EvalPairs,
    EvalProbe,
    EvalPrompts,
    EvalScale,
    EvalTargets,
    EvalTasks,
    ExportAdapter,
    ExportBase,
    ExportDtype,
    ExportLlamaCpp,
    ExportOuttype,
    ExportRounded,
    ExportTo,
    LoadIn4Bit,
    errors_in_a_line,
    must_exist,
    others_to_stderr,
)
from bapo_plugin.network import stay_offline


@app.command("eval", rich_help_panel="After training")
def evaluate(
    targets: EvalTargets,
    prompts: EvalPrompts = None,
    probe: EvalProbe = None,
    pairs: EvalPairs = None,
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

    For `bapo compare`, both in one call: bapo eval outputs/bapo outputs/dpo --scale 0.25,0.5,0.75
    """
    must_exist(*targets)
    names = [name for text in tasks or () for name in text.split(",") if name]
    if not names or (data and set(names) <= LOCAL_TASKS):
        stay_offline(targets)
    from bapo_plugin.evaluation.run import evaluate
    from bapo_plugin.evaluation.scaled import read_scales

    with errors_in_a_line():
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
            pairs=pairs,
        )
    for path in paths:
        typer.echo(f"Wrote {path}")


@app.command(rich_help_panel="After training")
def compare(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="What is compared with: the folder of a run, or a bapo-eval.json; `:ADAPTER` behind it says which of several.",
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The candidate, named likewise.")],
    fail_below: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-below",
            metavar="NAME=VALUE",
            help="Exit code 1 where B is better than A by less than this, in the unit of the table; several by repeating. "
            "Below 0 it is what B may be worse by. Where less is better (lost, kl, repetition), less counts as more.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Which of two runs is better, on the same pairs and prompts, with paired errors.

    A, what is compared with, and B, the candidate: the folder of a run, or a bapo-eval.json; `:ADAPTER` behind it says which
    of several.

    First the settings in which they differ. Then what `bapo eval` measured of both: accuracy and margin on held-out pairs,
    drift, losses and repetition on unrelated prompts, tasks. Where both were measured at parts of their strength too
    (`bapo eval A B --scale 0.25,0.5,0.75`), what each has forgotten at equal margin and accuracy. No model is loaded.

    Runs that were measured on different things are refused, with the command that measures both on the same.

    In a CI: bapo compare outputs/yesterday outputs/today --fail-below accuracy=-0.02 --fail-below drift=-1

    Exit codes: 0, 1 below a limit, 2 not comparable or another error.
    """
    with errors_in_a_line(), others_to_stderr(as_json) as out:
        from bapo_plugin.commands.compare import compare

        code = compare((a, b), fail_below or (), out if as_json else None)
    if code:
        raise typer.Exit(code)


@app.command(rich_help_panel="After training")
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

    with errors_in_a_line():
        paths = write_report(runs, output)
    for path in paths:
        typer.echo(f"Wrote {path}")


@app.command(rich_help_panel="After training")
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
    # axolotl's log takes stdout when it is imported
    with errors_in_a_line(), others_to_stderr(as_json) as out:
        from bapo_plugin.commands.chat import chat

        chat(targets, prompts or (), max_new_tokens, load_in_4bit, out if as_json else None)


@app.command(rich_help_panel="After training")
def export(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folder of a run, a checkpoint in it, or its YAML. With --to vllm several adapters of one base model."
        ),
    ],
    to: ExportTo,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder to write to. Default: one in the run's, called like --to.",
        ),
    ] = None,
    base: ExportBase = None,
    dtype: ExportDtype = None,
    rounded: ExportRounded = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Compare the base with the one of training; merged, gguf: log-probs of former answers before and after "
            "merging too.",
        ),
    ] = True,
    outtype: ExportOuttype = "q8_0",
    as_adapter: ExportAdapter = False,
    llama_cpp: ExportLlamaCpp = None,
    repo: Annotated[str | None, typer.Option(help="hub: user/name.")] = None,
    public: Annotated[
        bool, typer.Option("--public", help="hub: for everybody. Default: private.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="hub: list what would be uploaded, and send nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Use what was trained elsewhere: merged, with vLLM, as GGUF, on the hub: bapo export outputs/mine --to merged

    RUNS: the folder of a run, a checkpoint in it, or its YAML.

    **merged**: the adapter written into the base's own weights, checked against what was trained. **vllm**: the command that
    serves the adapter on its base, if vLLM takes it. **gguf**: for llama.cpp and Ollama, by llama.cpp's converters.
    **hub**: the adapter and its card, private unless --public; nothing else reaches a network.

    Says which base and which chat template, and prints the next command. Nothing is overwritten.
    """
    must_exist(*runs)
    if to != "hub" or dry_run:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported
    with errors_in_a_line("Interrupted. Nothing was left half written."):
        with others_to_stderr(as_json) as out:
            from bapo_plugin.commands.export import export

            result = export(
                runs,
                to,
                output=output,
                base=base,
                dtype=dtype,
                rounded=rounded,
                check=check,
                outtype=outtype,
                as_adapter=as_adapter,
                llama_cpp=llama_cpp,
                repo=repo,
                public=public,
                dry_run=dry_run,
                say=typer.echo,
            )
        if as_json:
            result.write_json(out)
        else:
            result.show()
