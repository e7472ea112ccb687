"""The loss of a batch: log-probs of policy and reference, preference, anchor, kept prompts, router."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from bapo_plugin.loss import BAPOLoss, ResponseLogps, bapo_loss, per_response
from bapo_plugin.scoring.collator import ANCHORED, Anchored, num_kept, num_rows
from bapo_plugin.training.metrics import row_metrics

if TYPE_CHECKING:
    from bapo_plugin.training.trainer import BAPOTrainer


class Terms(NamedTuple):
    """What a batch of n preference rows and m kept prompts gives.

    Args:
        rows: per preference row, [n] each.
        policy, reference: log-probs of the three responses, nats, 3 x [n].
        num_tokens: of the three responses, 3 x [n].
        kept: KL(reference ‖ policy) of the kept prompts' answers, nats, [m]; carries a gradient.
        aux: loss of MoE routers with its coefficient, a scalar, or None.
        logps: of all sequences, [3n + m].
        metrics: one number per preference row, [n].
        kept_metrics: one number per kept prompt, [m]; empty without `bapo.keep`.
    """

    rows: BAPOLoss
    policy: ResponseLogps
    reference: ResponseLogps
    num_tokens: ResponseLogps
    kept: Tensor
    aux: Tensor | None
    logps: Tensor
    metrics: dict[str, Tensor]
    kept_metrics: dict[str, Tensor]


class Objective:
    """Callable (model, batch) -> `Terms`.

    Args:
        trainer: its settings, models and reference are used.
    """

    def __init__(self, trainer: "BAPOTrainer"):
        self._trainer = trainer

    @property
    def anchored(self) -> Anchored:
        """The rows on whose base responses the reference's distributions are computed."""
        if self._trainer.bapo.anchor_loss == "kl":
            return "all"
        if self._trainer.keeper is None:
            return "none"
        # a pass is a collective call there, and not every batch of every process has kept prompts
        return "all" if self._trainer.is_sharded else "kept"

    def refuse(self) -> None:
        """What distributions can't be compared with.

        Raises:
            ValueError: there is no adapter to switch off, or the output head trains.
        """
        if self.anchored == "none":
            return
        key = "bapo.keep" if self._trainer.bapo.anchor_loss != "kl" else "bapo.anchor_loss: kl"
        if not is_peft_model(self._trainer.model):
            raise ValueError(
                f"{key} compares distributions under one frozen output head, so it needs an adapter; set `adapter:`, "
                "or bapo.anchor_loss: hinge and no bapo.keep"
            )
        head = self._trainer.model.get_output_embeddings()
        if head is not None and any(p.requires_grad for p in head.parameters()):
            raise ValueError(
                f"{key} compares distributions under one frozen output head, but here the head trains; take it out of "
                "lora_target_modules, lora_modules_to_save and trained embeddings, or set bapo.anchor_loss: hinge and no bapo.keep"
            )

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Terms:
        trainer = self._trainer
        n, m = num_rows(batch), num_kept(batch)
        unwrapped = trainer.accelerator.unwrap_model(model)
        more = {"output_router_logits": True} if trainer.aux_loss_enabled else {}
        if ANCHORED in batch:
            more["reference_states"] = trainer.reference.states(model, unwrapped, batch[ANCHORED])
        out = trainer.response_forward(model, unwrapped, batch, **more)
        lengths = batch["cu_seqlens"].diff()
        policy = ResponseLogps(*out.logps[: 3 * n].view(3, n))
        known = trainer.reference.logps(model, unwrapped, batch)
        reference = ResponseLogps(*known.sequences.view(3, n))
        token_drift = None
        if out.base_tokens is not None:
            token_drift = out.base_tokens - known.base_tokens
        num_tokens = ResponseLogps(*lengths[: 3 * n].view(3, n))
        divergence, kept = None, out.logps.new_zeros(0)
        if out.divergence is not None:
            divergence, kept = out.divergence.split([len(out.divergence) - m, m])
        bapo = trainer.bapo
        weight = trainer.anchor_weight.value
        rows = bapo_loss(
            policy,
            reference,
            num_tokens,
            divergence if bapo.anchor_loss == "kl" else None,
            token_drift,
            beta=trainer.beta,
            loss_type=trainer.loss_types,
            loss_weights=trainer.loss_weights,
            label_smoothing=trainer.label_smoothing,
            anchor_weight=weight,
            anchor_loss=bapo.anchor_loss,
            anchor_reduction=bapo.anchor_reduction,
            anchor_placement=bapo.anchor_placement,
            slack=trainer.anchor_weight.slack,
        )
        metrics = row_metrics(rows, policy, reference, trainer.beta)
        if bapo.anchor_loss == "kl":
            metrics["anchor/kl"] = divergence.detach() / num_tokens.base
        if token_drift is not None:
            lost = per_response(torch.relu(-token_drift.detach()), num_tokens.base)
            metrics["anchor/lost"] = lost / num_tokens.base
        if isinstance(weight, Tensor):
            metrics["anchor/weight"] = weight.float().expand(n)
        aux = None
        if trainer.aux_loss_enabled:
            aux = trainer.router_aux_loss_coef * out.aux_loss
            metrics["aux_loss"] = out.aux_loss.detach().expand(n)
            metrics["loss"] = metrics["loss"] + aux.detach()
        kept_metrics = {}
        if trainer.keeper is not None:  # also where there are none: processes log together
            kept_metrics["loss/keep"] = bapo.keep.weight * kept.detach()
            kept_metrics["keep/kl"] = kept.detach() / lengths[3 * n :]
        return Terms(
            rows, policy, reference, num_tokens, kept, aux, out.logps, metrics, kept_metrics
        )

    def total(self, terms: Terms, num_rows: int | Tensor, num_kept: int) -> Tensor:
        """Means over the rows and the kept prompts of an optimiser step: this batch's part of them.

        Args:
            terms: of the batch.
            num_rows, num_kept: of the step, over its micro-batches and all processes.
        """
        n = len(terms.rows.loss)
        loss = terms.rows.loss.sum() / num_rows
        if terms.aux is not None:
            loss = loss + terms.aux * (n / num_rows)
        if num_kept and len(terms.kept):
            loss = loss + self._trainer.bapo.keep.weight * terms.kept.sum() / num_kept
        return loss
