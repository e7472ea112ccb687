"""What the trainer logs: means over preference rows since the last log, and tokens a second."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from bapo_plugin.loss import BAPOLoss, ResponseLogps
from bapo_plugin.rows.columns import RESPONSES


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
    """Sums over rows, kept on the device until they are taken."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        # mode ("train" or "eval") -> metric -> sum over rows; "rows" counts them
        self._sums = {mode: defaultdict(float) for mode in ("train", "eval")}

    def add(self, mode: str, metrics: dict[str, Tensor]) -> None:
        """One number per row, [n], of each metric: in training those of this process, which count all, as they do in
        the gradient; in evaluation those of all processes, see `gathered`."""
        if not metrics:
            return
        for name, values in metrics.items():
            self._sums[mode][name] += values.sum()
        self._sums[mode]["rows"] += len(next(iter(metrics.values())))

    def gathered(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """The metrics of a micro-batch in evaluation, of all processes, without the rows that fill up the last one.

        Args:
            metrics: one number per row, [n], in the order of the rows, as many on every process.
        """
        rows = torch.stack([values.float() for values in metrics.values()], dim=1)  # [n, metrics]
        rows = self._accelerator.gather_for_metrics(rows)
        return dict(zip(metrics, rows.unbind(1), strict=True))

    def take(self, mode: str) -> dict[str, float]:
        """Means over the rows since the last call. In training all processes must call it at the same moment."""
        sums, self._sums[mode] = self._sums[mode], defaultdict(float)
        if not sums:
            return {}
        values = [
            torch.as_tensor(total, device=self._accelerator.device) for total in sums.values()
        ]
        totals = torch.stack([value.float() for value in values])
        if mode == "train":
            totals = self._accelerator.reduce(totals, "sum")
        means = dict(zip(sums, totals.tolist(), strict=True))
        rows = max(means.pop("rows"), 1.0)  # none where all were left out
        return {name: total / rows for name, total in means.items()}


class Throughput:
    """Tokens computed, tokens that are not padding, tokens of separate rows (see `scoring.collator`), and the time
    that training took: without evaluation, saving and what comes before the first step."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._counts: Tensor | None = None
        self._since: float | None = None
        self._paused = 0.0

    def stop(self) -> None:
        """Training ends, or is about to begin: what passes until the next step doesn't count."""
        self._counts = self._since = None

    def start(self) -> None:
        """A step begins; the first call starts the clock."""
        if self._since is None:
            self._since, self._paused = time.perf_counter(), 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside doesn't count."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began

    def add(self, token_counts: Tensor) -> None:
        """token_counts: of a batch, [3]."""
        self._counts = token_counts if self._counts is None else self._counts + token_counts

    def take(self) -> dict[str, float]:
        """Since the last call, on all ranks; empty where nothing was computed."""
        if self._counts is None or self._since is None:
            return {}
        counts = self._accelerator.reduce(self._counts, "sum").tolist()
        computed, real, separate = counts
        now, self._counts = time.perf_counter(), None
        seconds, self._since, self._paused = now - self._since - self._paused, now, 0.0
        return {
            "tokens/s": computed / seconds,
            "sharing": 1 - real / separate,
            "packing": real / computed,
        }
