"""What `bapo personas` does: many users, one model. An adapter for each persona, then a matrix of what each has learned.

read.py   the personas, each with its whole configuration
train.py  what is trained, and training: `axolotl train` in a process of its own

Light until the matrix: training may happen wherever a scheduler runs what `--list` prints.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

import typer
import yaml

from bapo_plugin.commands.personas.read import Persona, read_personas
from bapo_plugin.commands.personas.train import (
    INTERRUPTED,
    command_of,
    is_trained,
    state_of,
    train_all,
)
from bapo_plugin.files import must_be_writable, write_whole
from bapo_plugin.network import stay_offline
from bapo_plugin.yaml_files import read_yaml

_ELSEWHERE = "name another output_dir"


def personas(
    config: Path,
    file: Path,
    *,
    only: Sequence[str] = (),
    only_list: bool = False,
    only_matrix: bool = False,
    launcher: str | None = None,
) -> int:
    """Train an adapter for each persona, then measure each on each persona's held-out pairs.

    Args:
        config: YAML that all personas begin with.
        file: YAML with name -> what differs.
        only: names of those to train; by default all. The matrix has the others too where they are trained.
        only_list: write the YAMLs, print the commands, run nothing.
        only_matrix: measure what is trained.
        launcher: of `axolotl train`; None leaves it to axolotl.

    Returns:
        The exit code: 0, that of a training that failed, or 130 after Ctrl-C.

    Raises:
        ValueError: a file, a name or a configuration can't be used, or a configuration isn't the one that its adapter
            was trained with.
    """
    everybody = read_personas(config, file)
    if unknown := [name for name in only if name not in {p.name for p in everybody}]:
        raise ValueError(
            f"--only: {file} has no persona {', '.join(unknown)}; it has {', '.join(p.name for p in everybody)}"
        )
    found = [p for p in everybody if not only or p.name in only]
    todo = [p for p in found if not is_trained(p)]
    for persona in todo if not only_matrix else ():
        write_whole(persona.path, _text(persona, config, file), _ELSEWHERE)
    # the same command again, for messages
    again = shlex.join(["bapo", "personas", str(config), str(file)])
    again += "".join(f" --only {shlex.quote(name)}" for name in only)

    if only_list:
        for persona in found:
            if persona not in todo:
                typer.echo(f"{persona.name} is trained already: {persona.folder}", err=True)
        for persona in todo:
            typer.echo(shlex.join(command_of(persona, launcher)))
        typer.echo(f"{again} --matrix")
        return 0
    if only_matrix:
        for persona in todo:
            typer.echo(f"{persona.name} is left out: {state_of(persona)}")
        if len(todo) == len(found):
            raise ValueError(f"--matrix: none is trained; train first: {again}")
    stay_offline([p.path for p in found if not only_matrix or p not in todo])
    if not only_matrix:
        again += f" --launcher {launcher}" if launcher else ""
        if code := train_all(found, todo, launcher, again):
            return code
        todo = []
    try:
        _measure([p for p in everybody if p not in todo and (p in found or _joins(p))], config)
    except KeyboardInterrupt:
        typer.echo(
            f"\nInterrupted. All are trained; this measures again: {again} --matrix", err=True
        )
        return INTERRUPTED
    return 0


def _joins(persona: Persona) -> bool:
    """Whether one that `--only` doesn't name is measured too: else the matrix of some would replace that of all."""
    try:
        return is_trained(persona)
    except ValueError as error:
        typer.echo(f"{persona.name} is left out: {error}")
        return False


def _text(persona: Persona, config: Path, file: Path) -> str:
    return (
        f"# written by `bapo personas`: {config} with what {file} says of {persona.name}\n"
        + yaml.safe_dump(dict(persona.config), sort_keys=False, allow_unicode=True)
    )


def _measure(found: list[Persona], config: Path) -> None:
    from bapo_plugin.evaluation.matrix import measure_personas, print_matrix, write_matrix
    from bapo_plugin.report.heatmap import heatmap_png

    folder = Path(read_yaml(config)["output_dir"])
    must_be_writable(folder, _ELSEWHERE)
    result = measure_personas({p.name: p.path for p in found}, [p.folder for p in found])
    print_matrix(result)  # it is there, whatever becomes of the files
    paths = write_matrix(result, folder)
    picture = folder / f"{paths[0].stem}.png"
    write_whole(picture, heatmap_png(result), _ELSEWHERE)
    for path in (*paths, picture):
        typer.echo(f"Wrote {path}")
