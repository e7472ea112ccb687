"""A loss or log-probability that is NaN or infinite never reaches the weights."""

from typing import TYPE_CHECKING, Any

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor
from transformers import TrainerCallback

from bapo_plugin.rows.columns import RESPONSES
from bapo_plugin.scoring.collator import KEPT, ROW
from bapo_plugin.training.objective import Terms

if TYPE_CHECKING:
    from bapo_plugin.training.trainer import BAPOTrainer

LOG = get_logger("axolotl." + __name__)


class NonFinite(TrainerCallback):
    """Stops, or leaves the optimiser step out, by `bapo.on_non_finite`.

    Args:
        trainer: its rows and processes are used.

    Raises:
        ValueError: a step is to be left out, but DeepSpeed takes it before anybody can.
    """

    def __init__(self, trainer: "BAPOTrainer"):
        self._trainer = trainer
        self._skips = trainer.bapo.on_non_finite == "skip"
        self._found = False
        if self._skips and trainer.is_deepspeed_enabled:
            raise ValueError(
                "bapo.on_non_finite: skip doesn't work with DeepSpeed, which steps within the backward pass; set "
                "bapo.on_non_finite: stop"
            )

    def finite_rows(self, terms: Terms, batch: dict[str, Any]) -> Tensor | None:
        """Which rows of a training batch are finite, [n] bool, or None where all are; called before the backward pass.

        Args:
            terms: of the batch.
            batch: of a layout.

        Raises:
            ValueError: not all, and that is to stop the run; step and rows are named.
        """
        values = {"loss": terms.rows.loss}
        if terms.aux is not None:
            values["router loss"] = terms.aux.expand_as(terms.rows.loss)
        for name in RESPONSES:
            values[f"log π_θ of {name}"] = getattr(terms.policy, name)
            values[f"log π_ref of {name}"] = getattr(terms.reference, name)
        table = torch.stack([value.detach() for value in values.values()])  # [values, n]
        finite = table.isfinite().all(0)
        kept = terms.kept.detach().isfinite()
        if bool(finite.all() & kept.all()):
            return None
        table, faults = table.cpu(), []
        keeper = self._trainer.keeper
        faults += [
            f"{keeper.describe(int(batch[KEPT][i]))} (KL)"
            for i in (~kept).nonzero()[:, 0].tolist()[:5]
        ]
        for i in (~finite).nonzero()[:, 0].tolist()[:5]:
            row = self._trainer.reference.describe(int(batch[ROW][i])) if ROW in batch else "a row"
            wrong = [f"{n} {v:.3g}" for n, v in zip(values, table[:, i], strict=True)]
            wrong = [text for text in wrong if text.endswith(("nan", "inf"))]
            faults.append(f"{row} ({', '.join(wrong)})")
        step = self._trainer.state.global_step + 1
        message = f"step {step}: not finite: {'; '.join(faults)}"
        if not self._skips:
            raise ValueError(
                f"{message}. The weights are those of step {step - 1}. A lower learning_rate, bf16 in place of fp16, or "
                "max_grad_norm helps against a model that breaks up; bapo.on_non_finite: skip leaves such steps out"
            )
        LOG.warning(f"{message}; the step is left out (bapo.on_non_finite: skip)")
        self._found = True
        return finite

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self._skips:
            return
        accelerator = self._trainer.accelerator
        found = torch.tensor(float(self._found), device=accelerator.device)
        self._found = False
        if accelerator.reduce(found, "sum").item():
            # without gradients an optimiser moves nothing, not by momentum or decay either
            for parameter in self._trainer.model.parameters():
                parameter.grad = None
