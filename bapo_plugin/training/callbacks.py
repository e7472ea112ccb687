"""What the trainer does beside training: watch retention, and record the run for `bapo report`."""

import json
import math
import os
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from axolotl.utils.logging import get_logger
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from bapo_plugin import __version__
from bapo_plugin.compat import disable_gradient_checkpointing
from bapo_plugin.config import RetentionConfig
from bapo_plugin.scoring.forward import response_logits
from bapo_plugin.scoring.reference import evaluating, reference_mode
from bapo_plugin.scoring.retention import (
    FormerAnswer,
    former_answers,
    held_out_answers,
    mean_and_error,
    measure,
    read_prompts,
)

if TYPE_CHECKING:
    from bapo_plugin.training.trainer import BAPOTrainer

LOG = get_logger("axolotl." + __name__)

RECORD = "bapo_run.json"


class RetentionCallback(TrainerCallback):
    """Logs `retention/drift`, `/drift_per_token`, `/agreement`, `/kl` and can stop the run.

    Definitions: `bapo_plugin/retention.py`. The reference is that of training.

    Args:
        trainer: its models and its rows for evaluation are used.
        config: `bapo.retention`.

    Raises:
        ValueError: there are no held-out rows, the file can't be used, or weights are sharded.
    """

    def __init__(self, trainer: "BAPOTrainer", config: RetentionConfig):
        self._trainer = trainer
        self._config = config
        self._answers: list[FormerAnswer] | None = None
        self._last_step = -1
        self._chats = None
        if trainer.is_sharded:
            raise ValueError(
                "bapo.retention needs the whole model on each GPU, but FSDP or ZeRO-3 shards its weights; remove "
                "the block and use `bapo eval` afterwards"
            )
        if isinstance(config.prompts, str):
            self._chats = read_prompts(config.prompts)
        elif trainer.eval_dataset is None:
            raise ValueError(
                f"bapo.retention.prompts: {config.prompts} takes held-out rows, but there are none; set "
                "val_set_size or test_datasets, or name a file with prompts"
            )
        if config.every is None and trainer.args.eval_strategy == "no":
            raise ValueError(
                "bapo.retention without `every` is measured with each evaluation, but eval_strategy is no; set "
                "bapo.retention.every to a number of steps"
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self._config.every and state.global_step % self._config.every == 0:
            self._measure(state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        # an evaluation outside training has no step to be logged with
        if self._config.every is None and self._trainer.is_in_train:
            self._measure(state, control)

    def _measure(self, state: Any, control: Any) -> None:
        if state.global_step == self._last_step:
            return
        self._last_step = state.global_step
        found = self.measure()
        self._trainer.log({f"retention/{name}": value for name, value in found.items()})
        limit = self._config.stop_below
        if limit is not None and not found["drift"] >= limit:  # NaN stops too
            LOG.warning(
                f"Stopping at step {state.global_step}: former answers have drifted by {found['drift']:.2f} nats on "
                f"average, and bapo.retention.stop_below is {limit}"
            )
            control.should_training_stop = True

    def measure(self) -> dict[str, float]:
        """Means over all prompts, the same on every process."""
        trainer = self._trainer
        accelerator = trainer.accelerator
        policy = accelerator.unwrap_model(trainer.model)
        other = trainer.ref_model
        checkpointing = trainer.args.gradient_checkpointing_kwargs

        def reference(batch: dict[str, Tensor]) -> Tensor:
            model = policy if other is None else accelerator.unwrap_model(other)
            with accelerator.autocast(), evaluating(model), reference_mode(model, checkpointing):
                return response_logits(model, batch)

        def current(batch: dict[str, Tensor]) -> Tensor:
            with (
                accelerator.autocast(),
                evaluating(policy),
                disable_gradient_checkpointing(policy, checkpointing),
            ):
                return response_logits(policy, batch)

        if self._answers is None:
            self._answers = self._former_answers(policy if other is None else other)
        rank, world = accelerator.process_index, accelerator.num_processes
        share = self._answers[rank::world]
        found = {"drift": [], "drift_per_token": [], "agreement": [], "kl": []}
        if share:
            (result,) = measure(
                share,
                reference,
                {"policy": current},
                pad_token_id=trainer.processing_class.pad_token_id,
                vocab_size=policy.config.get_text_config().vocab_size,
                device=accelerator.device,
            ).values()
            found = {
                "drift": result.drift.tolist(),
                "drift_per_token": (result.drift / result.tokens).tolist(),
                "agreement": result.agreement.tolist(),
                "kl": result.kl.tolist(),
            }
        return {
            name: mean_and_error(gather_object(values) if world > 1 else values)["value"]
            for name, values in found.items()
        }

    def _former_answers(self, model: Any) -> list[FormerAnswer]:
        trainer = self._trainer
        if self._chats is None:
            rows = trainer.eval_dataset
            if isinstance(rows, dict):
                rows = next(iter(rows.values()))
            return held_out_answers(rows, trainer.processing_class, self._config.prompts)
        main = trainer.accelerator.is_main_process
        bar = tqdm(
            total=len(self._chats),
            desc="Former answers of the prompts to watch",
            unit="prompt",
            disable=not main,
        )
        model = trainer.accelerator.unwrap_model(model)
        checkpointing = trainer.args.gradient_checkpointing_kwargs
        with (
            bar,
            trainer.accelerator.autocast(),
            evaluating(model),
            reference_mode(model, checkpointing),
        ):
            return former_answers(
                model,
                trainer.processing_class,
                self._chats,
                self._config.max_new_tokens,
                on_answers=bar.update,
            )


class RunRecord(TrainerCallback):
    """Keeps `bapo_run.json` (what was run) and `trainer_state.json` (what was logged) in output_dir while
    training, so that `bapo report` can show a run that has no checkpoint yet.

    Args:
        config: settings to show; the plugin puts the user's YAML here.
        model: name of the model.
        rows: split -> number of rows.
    """

    # seconds between two writes of the log
    EVERY = 10.0

    def __init__(self, config: Mapping[str, Any], model: str, rows: Mapping[str, int]):
        self.config = dict(config)
        self._model = model
        self._rows = dict(rows)
        self._written = -math.inf

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            names = ("axolotl", "torch", "transformers", "trl", "peft")
            record = {
                "config": self.config,
                "model": self._model,
                "rows": self._rows,
                "versions": {"axolotl-plugin-bapo": __version__}
                | {name: version(name) for name in names},
            }
            text = json.dumps(record, indent=1, ensure_ascii=False, default=str)
            write_whole(Path(args.output_dir) / RECORD, text)

    def on_log(self, args, state, control, **kwargs):
        if time.monotonic() - self._written > self.EVERY:
            self._write(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._write(args, state)

    def _write(self, args: Any, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".trainer_state.json.{os.getpid()}"
        state.save_to_json(str(partial))
        os.replace(partial, folder / "trainer_state.json")
        self._written = time.monotonic()


def write_whole(path: Path, text: str) -> None:
    """Write a file as a whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)
