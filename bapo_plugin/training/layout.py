"""The layout of a trainer's batches: chosen when it is made, or once its weights are sharded."""

from typing import TYPE_CHECKING

from axolotl.utils.logging import get_logger
from torch import nn
from transformers import TrainerCallback

from bapo_plugin.scoring.collator import PaddedCollator, SharedPrefixCollator
from bapo_plugin.scoring.layouts import choose_collator, refusal_by_settings
from bapo_plugin.training.reference import first_of_all

if TYPE_CHECKING:
    from bapo_plugin.training.trainer import BAPOTrainer

LOG = get_logger("axolotl." + __name__)


def choose_layout(
    trainer: "BAPOTrainer", model: nn.Module | None = None
) -> PaddedCollator | SharedPrefixCollator:
    """The layout that is proven on the trainer's models.

    Args:
        trainer: its settings and models are used.
        model: the policy as it is called, where weights are sharded.

    Raises:
        ValueError: see `choose_collator`.
    """
    accelerator = trainer.accelerator
    unwrap = accelerator.unwrap_model
    models = [trainer.model if model is None else model, trainer.ref_model]
    return choose_collator(
        [(model, unwrap(model)) for model in models if model is not None],
        trainer.response_forward,
        wanted=trainer.bapo.shared_prefix,
        tokens_per_batch=trainer.bapo.tokens_per_batch,
        pad_token_id=trainer.processing_class.pad_token_id,
        pad_to_multiple_of=trainer.args.pad_to_multiple_of,
        mixed_precision=accelerator.mixed_precision,
        autocast=accelerator.autocast,
        checkpointing=trainer.args.gradient_checkpointing_kwargs,
        refused=refusal_by_settings(trainer.is_fsdp1, trainer.aux_loss_enabled),
        device=accelerator.device if trainer.is_sharded else None,
        agree=lambda reason: first_of_all(reason, accelerator) if trainer.is_sharded else reason,
    )


def tell_what_sharing_saves(trainer: "BAPOTrainer") -> None:
    """Log the tokens of the first rows, shared and separate."""
    if isinstance(trainer.layout, SharedPrefixCollator):
        n = min(trainer.args.per_device_train_batch_size, len(trainer.train_dataset))
        rows = [trainer.train_dataset[i] for i in range(n)]
        shared = trainer.collate(rows)["token_counts"][0]
        padded = PaddedCollator(0)(rows)["token_counts"][0]
        LOG.info(f"shared prefix: {shared:,} tokens instead of {padded:,} for the first {n} rows")


class WhenSharded(TrainerCallback):
    """Has the trainer do what needs weights that are sharded already."""

    def __init__(self, trainer: "BAPOTrainer"):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.when_sharded()
