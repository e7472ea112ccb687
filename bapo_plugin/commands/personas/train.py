"""The training of personas: what is done, what is to be done, and doing it, one `axolotl train` after another."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from bapo_plugin.commands.personas.read import CONFIG, Persona, has_entries
from bapo_plugin.runs import has_adapter, how_far, is_finished
from bapo_plugin.yaml_files import read_yaml

INTERRUPTED = 130  # exit code, as a shell gives it after Ctrl-C


def is_trained(persona: Persona) -> bool:
    """Whether its adapter is there, trained to the end with this configuration.

    Raises:
        ValueError: what lies in its folder was trained with another one.
    """
    folder, done = persona.folder, is_finished(persona.folder) and has_adapter(persona.folder)
    if not done and not any(folder.glob("checkpoint-*")):
        return False  # nothing that training would go on with
    remedy = f"Set another output_dir for {persona.name}, or delete {folder}"
    if not persona.path.is_file():
        raise ValueError(
            f"{persona.name}: {folder} has a run that `bapo personas` didn't begin (there is no {CONFIG}). {remedy}"
        )
    before = read_yaml(persona.path)
    if before != persona.config:
        changed = "; ".join(_changes(before, persona.config))
        state = "is trained" if done else "has begun to train"
        raise ValueError(f"{persona.name} {state} with another configuration: {changed}. {remedy}")
    return done


def _changes(before: Any, after: Any, key: str = "") -> list[str]:
    """What differs, as `key: then, now`."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        pairs = [
            (f"{key}.{k}" if key else str(k), before.get(k), after.get(k))
            for k in dict.fromkeys([*before, *after])
        ]
    elif has_entries(before) and has_entries(after) and len(before) == len(after):
        pairs = [(f"{key}[{i}]", *pair) for i, pair in enumerate(zip(before, after, strict=True))]
    elif before == after:
        return []
    else:
        return [f"{key} was {before!r} and is {after!r}"]
    return [text for key, *pair in pairs for text in _changes(*pair, key)]


def state_of(persona: Persona) -> str:
    folder = persona.folder
    begun = any(folder.glob("checkpoint-*")) or has_adapter(folder)
    return f"its training {how_far(folder)}" if begun else "it isn't trained"


def command_of(persona: Persona, launcher: str | None) -> list[str]:
    return ["axolotl", "train", str(persona.path), *(["--launcher", launcher] if launcher else [])]


def train_all(found: list[Persona], todo: list[Persona], launcher: str | None, again: str) -> int:
    """Train those that aren't yet; 0, or the exit code of what went wrong."""
    for i, persona in enumerate(found, start=1):
        number = f"{persona.name} ({i} of {len(found)})"
        if persona not in todo:
            typer.echo(f"{number}: trained already, in {persona.folder}")
            continue
        command = command_of(persona, launcher)
        typer.echo(f"{number}\n$ {shlex.join(command)}")
        sys.stdout.flush()
        try:
            code = run(command)
        except KeyboardInterrupt:
            code = INTERRUPTED
        done = code == 0 and is_trained(persona)
        if code == INTERRUPTED:
            typer.echo(f"\nInterrupted at {number}. The same command goes on: {again}", err=True)
        elif not done:
            # axolotl ends with 0 where it is interrupted
            how = f"ended with exit code {code}" if code else f"{how_far(persona.folder)} and ended"
            typer.echo(
                f"Error: {number}: training {how}; its own output says why. When that is mended, the same command goes on: "
                f"{again}",
                err=True,
            )
            code = code or 1
        if code:
            return code
    return 0


def run(command: Sequence[str]) -> int:
    """Run a command of this environment; its exit code, as a shell gives it.

    Raises:
        KeyboardInterrupt: after the command, which was interrupted too, has ended.
    """
    # axolotl starts accelerate and torchrun by name
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which(command[0], path=path) or command[0]
    process = subprocess.Popen([program, *command[1:]], env=os.environ | {"PATH": path})
    try:
        code = process.wait()
    except KeyboardInterrupt:
        try:
            process.wait()  # it saves what it has
        except KeyboardInterrupt:
            process.kill()
        raise
    return code if code >= 0 else 128 - code
