"""What the trainer logs: means over preference rows since the last log, and tokens a second."""

import time
from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import Tensor

from bapo_plugin.loss import BAPOLoss, ResponseLogps
from bapo_plugin.rows.tokens import RESPONSES


def row_metrics(
    out: BAPOLoss, policy: ResponseLogps, reference: ResponseLogps, beta: float
) -> dict[str, Tensor]:
    """Every metric of `BAPOTrainer` as one number per row, [n], detached.

    Args:
        out: of `bapo_loss`.
        policy, reference: log-probs, nats a response, each [n].
        beta: factor of the rewards.
    """
    policy = ResponseLogps(*(logps.detach() for logps in policy))
    drift = ResponseLogps(*(p - r for p, r in zip(policy, reference, strict=True)))
    chosen, rejected = beta * drift.chosen, beta * drift.rejected
    return {
        "loss": out.loss.detach(),
        "loss/preference": out.preference,
        "loss/anchor": out.anchor,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        **{f"logps/{name}": getattr(policy, name) for name in RESPONSES},
        **{f"drift/{name}": getattr(drift, name) for name in RESPONSES},
        "anchor/active": out.active,
    }


class RowMetrics:
    """Sums over the rows of all ranks, kept on the device until they are taken."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        # mode -> metric -> sum over rows; "rows" counts them
        self._sums = {mode: defaultdict(float) for mode in ("train", "eval")}

    def add(self, mode: str, metrics: dict[str, Tensor]) -> None:
        """One number per row, [n], of each metric; `mode` is "train" or "eval"."""
        rows = torch.stack([values.float() for values in metrics.values()], dim=1)  # [n, metrics]
        # In evaluation, rows that fill up a rank's last batch are left out. In training they count,
        # as they do in the gradient; besides, the loader is a whole optimiser step ahead there, and
        # `gather_for_metrics` would cut micro-batches that are not the last.
        accelerator = self._accelerator
        gather = accelerator.gather if mode == "train" else accelerator.gather_for_metrics
        rows = gather(rows)
        for name, total in zip(metrics, rows.sum(0), strict=True):
            self._sums[mode][name] += total
        self._sums[mode]["rows"] += len(rows)

    def take(self, mode: str) -> dict[str, float]:
        """Means over the rows since the last call."""
        sums, self._sums[mode] = self._sums[mode], defaultdict(float)
        rows = sums.pop("rows", 0)
        return {name: float(total) / rows for name, total in sums.items()}


class Throughput:
    """Tokens computed, tokens that are not padding, tokens of separate rows: see `data.collator`."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._counts: Tensor | None = None
        self._since = time.perf_counter()

    def add(self, token_counts: Tensor) -> None:
        """token_counts: of a batch, [1, 3]."""
        self._counts = token_counts if self._counts is None else self._counts + token_counts

    def take(self) -> dict[str, float]:
        """Since the last call, on all ranks; empty where nothing was computed."""
        if self._counts is None:
            return {}
        counts = self._accelerator.gather(self._counts).view(-1, 3).sum(0).tolist()
        computed, real, separate = counts
        now, self._counts = time.perf_counter(), None
        seconds, self._since = now - self._since, now
        return {
            "tokens/s": computed / seconds,
            "sharing": 1 - real / separate,
            "packing": real / computed,
        }
