"""What the commands of `bapo` share: arguments, errors, what goes to stdout."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer

from bapo_plugin.files import of_the_disk
from bapo_plugin.runs import hide
from bapo_plugin.versions import too_old

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
# of `bapo eval`
EvalTargets = Annotated[
    list[Path],
    typer.Argument(
        help="YAML of a run (its adapter is that in output_dir), and folders of adapters of the same base "
        "model, which get a column each.",
    ),
]
EvalPrompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        "-p",
        help="Prompts to ask before and after: a file (.txt, one a line; .jsonl with `prompt`), or a number of "
        "held-out rows of the YAML, whose base responses are taken. Default: all held-out rows.",
    ),
]
EvalProbe = Annotated[
    bool | None,
    typer.Option(
        "--probe/--no-probe",
        help="Ask 48 prompts of many kinds too, which have nothing to do with the data. Default: where neither "
        "--prompts nor --tasks is given.",
    ),
]
EvalPairs = Annotated[
    bool | None,
    typer.Option(
        "--pairs/--no-pairs",
        help="Rank held-out pairs of the YAML: accuracy and margin. Default: where its held-out rows are read, so not with "
        "a file of prompts.",
    ),
]
EvalTasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        "-t",
        help="Tasks of lm-eval, by name or as YAML files; several with commas or by repeating. `paper`: ScienceQA, "
        "MMLU humanities and HHH alignment, which ask the hub for their questions unless --data is given.",
    ),
]
EvalData = Annotated[
    Path | None,
    typer.Option(
        "--data",
        "-d",
        help="Folder with the questions of local tasks, in place of the hub: scienceqa.jsonl, mmlu.jsonl and "
        "hhh.jsonl (`--tasks paper`), truthfulqa.jsonl (`--tasks truthfulqa`).",
    ),
]
EvalScale = Annotated[
    list[str] | None,
    typer.Option(
        "--scale",
        "-s",
        help="Measure each LoRA also with its weights scaled by this, a number from 0 (before) to 1 (after) or "
        "beyond; several with commas or by repeating.",
    ),
]
# of `bapo export`
ExportTo = Annotated[
    Literal["merged", "vllm", "gguf", "hub"],
    typer.Option("--to", help="What for."),
]
ExportBase = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="Folder of the base model, where it isn't where the run found it; with --to hub its name there.",
    ),
]
ExportDtype = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option(
        help="merged, gguf: of the merged weights. bfloat16 rounds small changes away. Default: as the base was published; "
        "for gguf float16."
    ),
]
ExportRounded = Annotated[
    bool,
    typer.Option(
        "--rounded",
        help="merged, gguf: add an adapter that was trained on 4-bit weights to those, in 16 bits, not to the base as published.",
    ),
]
ExportOuttype = Annotated[
    Literal["q8_0", "bf16", "f16", "f32", "auto"],
    typer.Option(help="gguf: precision of the file."),
]
ExportAdapter = Annotated[
    bool,
    typer.Option(
        "--adapter", help="gguf: merge nothing; a file of the adapter, beside the base's."
    ),
]
ExportLlamaCpp = Annotated[
    Path | None,
    typer.Option(
        help="gguf: folder of llama.cpp, whose converters are run. Default: those on PATH."
    ),
]
# of `bapo plan`
PlanGpu = Annotated[
    str | None,
    typer.Option("--gpu", "-g", help='Name of a card, such as "RTX 4090" or "A100 80GB".'),
]
PlanVram = Annotated[
    float | None,
    typer.Option("--vram", help="Memory of a card in GB, in place of its name.", min=1),
]
PlanModelConfig = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="config.json of the model, or the folder with it. Default: that of base_model; a hub model's is looked for in "
        "the local cache, then on the hub, unless HF_HUB_OFFLINE is set.",
    ),
]
PlanPromptTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of the longest row's prompt. Default: the worst case of sequence_len.",
        min=1,
    ),
]
PlanResponseTokens = Annotated[
    int | None, typer.Option(help="Tokens of each of its responses.", min=1)
]
# of `bapo personas`
Base = Annotated[Path, typer.Argument(help="YAML that all personas begin with.")]
Personas = Annotated[
    Path,
    typer.Argument(
        metavar="PERSONAS", help="YAML with the name of each persona and what differs for it."
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="NAME", help="Train this persona only; several by repeating."),
]
OnlyList = Annotated[
    bool,
    typer.Option(
        "--list",
        "--dry-run",
        help="Write the personas' YAMLs and print the commands, for a scheduler; run none.",
    ),
]
OnlyMatrix = Annotated[
    bool, typer.Option("--matrix", help="Train nothing; measure those that are trained.")
]
Launcher = Annotated[str | None, typer.Option(help="Of `axolotl train`. Default: axolotl's own.")]


@contextmanager
def errors_in_a_line(interrupted: str = "Interrupted.") -> Iterator[None]:
    """An error that a user can mend ends the command with one text and exit code 2, Ctrl-C with `interrupted` and 130.

    So does a full disk or a folder that can't be written to, whoever met it.
    """
    try:
        yield
    except ValueError as error:
        fail(str(error))
    except OSError as error:
        if (text := of_the_disk(error)) is None:
            raise
        fail(text)
    except KeyboardInterrupt:
        typer.echo(interrupted, err=True)
        raise typer.Exit(130) from None


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


def refuse_older(command: str | None) -> None:
    """End where axolotl is too old for any command but the one that says what is wrong."""
    if command != "doctor" and (said := too_old()):
        fail(said)


def fail(message: str) -> Any:
    typer.echo(f"Error: {hide(message)}", err=True)
    raise typer.Exit(2)
