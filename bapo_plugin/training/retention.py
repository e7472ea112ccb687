"""Watches, while training, how much of the model is left, and can stop the run."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from axolotl.utils.logging import get_logger
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from bapo_plugin.answers.prompts import Asker, Chat, FormerAnswer, held_out_answers, read_prompts
from bapo_plugin.answers.stops import own_stops
from bapo_plugin.blocks import RetentionConfig
from bapo_plugin.compat import disable_gradient_checkpointing
from bapo_plugin.scoring.forward import response_logits, within
from bapo_plugin.scoring.reference import evaluating, reference_mode
from bapo_plugin.scoring.retention import mean_and_error, measure
from bapo_plugin.training.refusals import refuse_unmeasured, refuse_without_held_out
from bapo_plugin.training.resume import planned_steps

if TYPE_CHECKING:
    from bapo_plugin.training.trainer import BAPOTrainer

LOG = get_logger("axolotl." + __name__)


class RetentionCallback(TrainerCallback):
    """Logs `retention/drift`, `/drift_per_token`, `/agreement`, `/kl` and can stop the run.

    Definitions: `bapo_plugin/scoring/retention.py`. The reference is that of training.

    Args:
        trainer: its models and its rows for evaluation are used.
        config: `bapo.retention`.

    Raises:
        ValueError: there are no held-out rows, the file can't be used, or `stop_below` would never act.
    """

    def __init__(self, trainer: "BAPOTrainer", config: RetentionConfig):
        self._trainer = trainer
        self._config = config
        self._answers: list[FormerAnswer] | None = None
        self._last_step = -1
        self._chats: list[Chat] | None = None
        if isinstance(config.prompts, str):
            self._chats = read_prompts(config.prompts, "bapo.retention.prompts")
        else:
            refuse_without_held_out(config, trainer.eval_dataset is not None)
        if config.every is None and trainer.args.eval_strategy == "no":
            raise ValueError(
                "bapo.retention without `every` is measured with each evaluation, but eval_strategy is no; set "
                "bapo.retention.every to a number of steps"
            )
        if trainer.train_dataset is not None:  # else nothing is trained
            said = refuse_unmeasured(config, trainer.args, planned_steps(trainer))
            if said and trainer.accelerator.is_main_process:
                LOG.warning(said)

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
        with self._trainer.throughput.paused(), self._averaged_weights():
            found = self.measure()
        should_log = control.should_log  # one log clears it, and the step's own comes after this
        self._trainer.log({f"retention/{name}": value for name, value in found.items()})
        control.should_log = should_log
        limit = self._config.stop_below
        # what is no finite number is lost
        if limit is not None and not limit <= found["drift"] < math.inf:
            LOG.warning(
                f"Stopping at step {state.global_step}: former answers have drifted by {found['drift']:.2f} nats on "
                f"average, and bapo.retention.stop_below is {limit}"
            )
            control.should_training_stop = True

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Schedule-free optimisers keep the weights that count beside those that are trained."""
        optimizer = self._trainer.optimizer
        if not callable(getattr(optimizer, "eval", None)):
            yield
            return
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()

    def measure(self) -> dict[str, float]:
        """Means over all prompts, the same on every process."""
        trainer = self._trainer
        accelerator = trainer.accelerator
        # as they are called, and the models inside
        outer = trainer.model_wrapped if trainer.is_sharded else trainer.model
        policy = accelerator.unwrap_model(outer)
        other = outer if trainer.ref_model is None else trainer.ref_model
        checkpointing = trainer.args.gradient_checkpointing_kwargs

        def reference(batch: dict[str, Tensor]) -> Tensor:
            model = accelerator.unwrap_model(other)
            with accelerator.autocast(), evaluating(model), reference_mode(model, checkpointing):
                return response_logits(other, batch, model)

        def current(batch: dict[str, Tensor]) -> Tensor:
            with (
                accelerator.autocast(),
                evaluating(policy),
                disable_gradient_checkpointing(policy, checkpointing),
            ):
                return response_logits(outer, batch, policy)

        if self._answers is None:
            self._answers = self._former_answers(other)
        rank, world = accelerator.process_index, accelerator.num_processes
        if trainer.is_sharded:  # every call needs all processes: all measure all of it
            rank, world = 0, 1
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
            found = held_out_answers(rows, trainer.processing_class, self._config.prompts)
            if len(found) < self._config.prompts and trainer.accelerator.is_main_process:
                LOG.warning(
                    f"bapo.retention.prompts: {self._config.prompts} are wanted, but the held-out rows have {len(found)} "
                    "distinct prompts: those are watched"
                )
            return found
        bar = tqdm(
            total=len(self._chats),
            desc="Former answers of the prompts to watch",
            unit="prompt",
            disable=not trainer.accelerator.is_main_process,
        )
        outer, model = model, trainer.accelerator.unwrap_model(model)
        now = getattr(trainer.args, "bapo_now", None)
        asker = Asker(
            model,
            trainer.processing_class,
            now and datetime.fromisoformat(now),
            own_stops(trainer.processing_class, trainer.bapo.anchors.stop),
            trainer.bapo.special_tokens_in_words,
        )
        checkpointing = trainer.args.gradient_checkpointing_kwargs
        with (
            bar,
            trainer.accelerator.autocast(),
            evaluating(model),
            reference_mode(model, checkpointing),
        ):
            return within(
                outer,
                model,
                lambda: asker.ask(self._chats, self._config.max_new_tokens, bar.update),
                {},
            )
