"""λ, the weight of the anchor: a number, or found while training so that former answers keep to a budget."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

if TYPE_CHECKING:
    from bapo_plugin.training.objective import Terms
    from bapo_plugin.training.trainer import BAPOTrainer

# of λ, in units of β (times the weights of the preference losses): its bounds, and where it starts. A nat of preference
# gains at most β in the loss, so what holds a base response is of that order whatever its length; a divergence, which
# grows as the square of a shift, needs more
_LOWEST, _HIGHEST = 1e-3, 100.0
_START = {"kl": 1.0}
_START_OF_OTHERS = 0.3
# share of the past in what is measured, a step
_SMOOTHING = 0.8
# log λ follows the excess e by _NOW · e + _EVER · (sum of all e): the first brakes before the limit is reached and damps,
# the second is dual ascent and leaves no error behind
_NOW, _EVER = 1.0, 0.05


class AnchorWeight(TrainerCallback, ExportableState):
    """Holds λ, and with `anchor_weight: auto` steers it after every optimiser step.

    The constraint is v <= `drift_limit`, where v is what base responses of the training rows have lost, nats a token:
    mean of -Δ_b, with `anchor_level: token` the sum over tokens of max(0, -Δ_t), or with `anchor_loss: kl` the divergence. With e = v / limit - 1, clipped to [-1, 1], the multiplier rises
    while e > 0 and falls while e < 0 (dual ascent in log λ). The anchor itself pulls only on what is beyond the limit
    (`slack` of `bapo_loss`). λ is the same on every process and kept in checkpoints.

    Args:
        trainer: its settings and processes are used.
    """

    def __init__(self, trainer: "BAPOTrainer"):
        self._trainer = trainer
        bapo = trainer.bapo
        self._auto = bapo.anchor_weight == "auto"
        self._sums: Tensor | None = None  # [2] of this process in this step: lost nats, tokens
        device = trainer.accelerator.device
        #: [3]: smoothed lost nats, smoothed tokens, sum of e
        self._state = torch.zeros(3, dtype=torch.float32, device=device)
        #: what the anchor leaves alone, nats a token of the base response
        self.slack: float = bapo.drift_limit if self._auto else 0.0
        start = _START.get(bapo.anchor_loss, _START_OF_OTHERS)
        self._start, *self._bounds = map(math.log, (start, _LOWEST, _HIGHEST))

    @property
    def value(self) -> float | Tensor:
        """λ; a scalar tensor with `anchor_weight: auto`."""
        if not self._auto:
            return self._trainer.bapo.anchor_weight
        # a nat of the margin changes the preference loss by at most this
        weights = self._trainer.loss_weights or [1.0] * len(self._trainer.loss_types)
        unit = self._trainer.beta * sum(map(abs, weights))
        log = self._start + _NOW * self._excess() + _EVER * self._state[2]
        return unit * log.clamp(*self._bounds).exp()

    def _excess(self) -> Tensor:
        lost, tokens, _ = self._state.unbind()
        limit = self._trainer.bapo.drift_limit
        # before anything is measured nothing is lost
        return (lost / tokens.clamp_min(1e-6) / limit - 1).clamp(-1, 1)

    def add(self, terms: "Terms") -> None:
        """What a batch of training rows has lost."""
        if not self._auto:
            return
        if self._trainer.bapo.anchor_loss == "kl":
            lost = terms.metrics["anchor/kl"] * terms.num_tokens.base
        elif self._trainer.bapo.holds_tokens:
            lost = terms.metrics["anchor/lost"] * terms.num_tokens.base
        else:
            lost = -terms.metrics["drift/base"]
        found = torch.stack([lost.sum().float(), terms.num_tokens.base.sum().float()])
        self._sums = found if self._sums is None else self._sums + found

    def on_step_end(self, args, state, control, **kwargs):
        if not self._auto:
            return
        sums = self._state.new_zeros(2) if self._sums is None else self._sums
        self._sums = None
        sums = self._trainer.accelerator.reduce(sums, "sum")
        kept = _SMOOTHING * self._state[:2] + (1 - _SMOOTHING) * sums
        # a step that was left out since it wasn't finite says nothing
        self._state[:2] = torch.where(sums.isfinite().all(), kept, self._state[:2])
        low, high = ((bound - self._start) / _EVER for bound in self._bounds)
        self._state[2] = (self._state[2] + self._excess()).clamp(low, high)

    def on_train_begin(self, args, state, control, **kwargs):
        """Goes on with what the checkpoint holds."""
        kept = (state.stateful_callbacks or {}).get(type(self).__name__)
        if self._auto and kept and "steering" in kept:
            self._state.copy_(torch.tensor(kept["steering"], dtype=torch.float32))

    def state(self) -> dict[str, Any]:
        """For `trainer_state.json`."""
        return {"args": {}, "attributes": {}, "steering": self._state.tolist()}
