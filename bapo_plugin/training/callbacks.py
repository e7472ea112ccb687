"""The record of a run, for `bapo report` and `bapo eval`."""

import json
import math
import os
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.utils.logging import get_logger
from datasets import Dataset
from transformers import TrainerCallback

from bapo_plugin import __version__
from bapo_plugin.files import whole, write_whole
from bapo_plugin.rows.held_out import prompts_digest
from bapo_plugin.runs import RECORD, STATE, log_digest, read_if_sound, without_secrets
from bapo_plugin.training.outputs import ELSEWHERE

if TYPE_CHECKING:
    from bapo_plugin.training.trainer import BAPOTrainer

LOG = get_logger("axolotl." + __name__)


class RunRecord(TrainerCallback):
    """Keeps `bapo_run.json` (what was run) and `trainer_state.json` (what was logged) in output_dir while
    training, so that `bapo report` can show a run that has no checkpoint yet.

    Args:
        config: settings to show; the plugin puts the user's YAML here.
        model: name of the model.
        rows: split -> number of rows.
        held_out: digest of the held-out prompts, where there are any with their text.
    """

    # seconds between two writes of the log, and the most of all time that they may take: the log grows with the run
    EVERY = 10.0
    SHARE = 0.01

    def __init__(
        self,
        config: Mapping[str, Any],
        model: str,
        rows: Mapping[str, int],
        held_out: str | None = None,
    ):
        self.config = dict(config)
        self._model = model
        self._rows = dict(rows)
        self._held_out = held_out
        #: what the weights depend on, see `training.resume`
        self.trained: dict[str, Any] = {}
        #: digests of logs in output_dir that aren't of this run
        self._others: list[str] = []
        #: whether training came to its end, be it that of `bapo.retention.stop_below`
        self.finished = False
        #: between the first step and the end
        self.is_under_way = False
        self._due = -math.inf

    def on_train_begin(self, args, state, control, **kwargs):
        self.finished, self.is_under_way = False, True
        if state.is_world_process_zero:
            self._others = logs_of_others(Path(args.output_dir), state.global_step)
        self._write_record(args, state)

    def _write_record(self, args: Any, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        names = ("axolotl", "torch", "transformers", "trl", "peft")
        record = {
            "config": without_secrets(self.config),
            "directory": os.getcwd(),  # relative names in the configuration start there
            "model": self._model,
            "rows": self._rows,
            "held_out": self._held_out,
            "versions": {"axolotl-plugin-bapo": __version__}
            | {name: version(name) for name in names},
            "trained": without_secrets(self.trained),
            "logs_of_others": self._others,
            "finished": self.finished,
        }
        text = json.dumps(record, indent=1, ensure_ascii=False, default=str)
        write_whole(Path(args.output_dir) / RECORD, text, ELSEWHERE)

    def on_save(self, args, state, control, **kwargs):
        """A log without entries is the same in every run: what this one has just written is its own."""
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
        if self._others and path.is_file() and (own := log_digest(path)) in self._others:
            self._others.remove(own)
            self._write_record(args, state)

    def on_log(self, args, state, control, **kwargs):
        # `axolotl evaluate` logs too, and would put its one entry in place of the run's
        if self.is_under_way and time.monotonic() > self._due:
            self._write(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self.finished, self.is_under_way = True, False
        self._write(args, state)
        try:
            self._write_record(args, state)
        except ValueError as error:  # the adapter is still to be saved, and may find room
            LOG.warning(f"{error}. `bapo report` will call this run unfinished")

    def _write(self, args: Any, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        started = time.monotonic()
        try:
            with whole(Path(args.output_dir) / STATE, ELSEWHERE) as partial:
                state.save_to_json(str(partial))
        except (
            ValueError
        ) as error:  # a log is no reason to stop; a checkpoint that can't be saved is
            LOG.warning(
                f"{error}. Training goes on; what was logged until now is for `bapo report`"
            )
        now = time.monotonic()
        self._due = now + max(self.EVERY, (now - started) / self.SHARE)


def record_of(trainer: "BAPOTrainer") -> RunRecord:
    """The record of a trainer's run."""
    rows = trainer.eval_dataset
    # of several sets, or of rows without text, there is none
    held_out = prompts_digest(rows) if isinstance(rows, Dataset) else None
    model = trainer.model.config.name_or_path
    return RunRecord(_settings(trainer), model, _rows(trainer), held_out)


def logs_of_others(folder: Path, step: int) -> list[str]:
    """Digests of the logs in a folder that are of an earlier run, at its start.

    Args:
        folder: output_dir.
        step: that the run goes on from; 0: it begins anew.
    """
    found = []
    if step:
        found = (read_if_sound(folder / RECORD) or {}).get("logs_of_others") or []
    for path in [folder / STATE, *folder.glob(f"checkpoint-*/{STATE}")]:
        # what can't be read isn't read by others either
        its = (read_if_sound(path) or {}).get("global_step")
        if isinstance(its, int) and its > step:
            found.append(log_digest(path))
    return sorted(set(found))


def _settings(trainer: "BAPOTrainer") -> dict[str, Any]:
    """For the record of a run without YAML."""
    names = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size")
    names += ("gradient_accumulation_steps", "lr_scheduler_type", "optim", "seed")
    return {
        "rl": "bapo",
        "rl_beta": trainer.beta,
        "dpo_loss_type": trainer.loss_types,
        **{name: getattr(trainer.args, name) for name in names},
        "bapo": trainer.bapo.model_dump(exclude_none=True),
    }


def _rows(trainer: "BAPOTrainer") -> dict[str, int]:
    """Split -> number of rows."""
    sets = {"train": trainer.train_dataset, "eval": trainer.eval_dataset}
    return {
        name: sum(map(len, rows.values())) if isinstance(rows, dict) else len(rows)
        for name, rows in sets.items()
        if rows is not None
    }
