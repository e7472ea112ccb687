"""Which checkpoint a run goes on from: a process that is killed while it saves leaves one that is not whole."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from axolotl.utils.logging import get_logger
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bapo_plugin.files import writing

LOG = get_logger("axolotl." + __name__)


def whole_checkpoint(output_dir: str, wanted: str | bool | None) -> str | bool | None:
    """The checkpoint to resume from: the one that is named, or the last one before it that is whole.

    Args:
        output_dir: of the run.
        wanted: a checkpoint's folder, True for the last one, or None.

    Returns:
        A folder; `wanted` where there is nothing to choose from.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    if not wanted:
        return wanted
    named = None if wanted is True else Path(wanted)
    folder = Path(output_dir) if named is None else named.parent
    steps = {_step(path): path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    last = max(steps, default=None) if named is None else _step(named)
    if last not in steps or last < 0:
        return wanted  # it says so itself
    for step in sorted((step for step in steps if 0 <= step <= last), reverse=True):
        if _is_whole(steps[step]):
            if step != last:
                LOG.warning(
                    f"{steps[last]} was not written to its end; going on from {steps[step].name} instead"
                )
            return str(steps[step])
    raise ValueError(
        f"resume_from_checkpoint: no checkpoint in {folder} was written to its end; remove them and train from the start"
    )


@contextmanager
def saving_checkpoint(output_dir: str, step: int, writes: bool) -> Iterator[None]:
    """Inside, a checkpoint is written.

    Args:
        output_dir: of the run.
        step: of the checkpoint.
        writes: whether this process writes what all share; it removes what is left of a checkpoint that could not be
            written to its end.

    Raises:
        ValueError: the disk is full, or the folder can't be written to.
    """
    folder = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    go_on = (
        "name another output_dir; checkpoints take less with save_total_limit. With `auto_resume_from_checkpoints: true` the "
        "same command then goes on at the last checkpoint"
    )
    with writing(folder, go_on):
        if writes:  # what an earlier run left under this name is no longer whole
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            yield
        except Exception:
            if writes and not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _step(path: Path) -> int:
    number = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdigit() else -1


def _is_whole(path: Path) -> bool:
    """The state of the run is written last."""
    try:
        json.loads((path / TRAINER_STATE_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True
