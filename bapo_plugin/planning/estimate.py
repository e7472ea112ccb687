"""What a run needs on a card: what stays and what a step adds, of BAPO and of TRL's DPO."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from bapo_plugin.planning import memory
from bapo_plugin.planning.architecture import Counts, count
from bapo_plugin.planning.rehearsal import Rehearsal
from bapo_plugin.planning.settings import RunSettings
from bapo_plugin.planning.tracker import (
    BACKWARD,
    DEQUANTISED,
    HEAD,
    KEPT,
    REFERENCE,
    Peaks,
)

Row = tuple[int, int, int, int]

#: parts of an estimate, in the order of a table
PARTS = {
    "weights": "weights of the model",
    "copy": "copy for the reference",
    "adapter": "weights of the adapter",
    "gradients": "gradients",
    "optimizer": "states of the optimiser",
    KEPT: "kept for the backward pass",
    BACKWARD: "backward pass, the most of one layer",
    DEQUANTISED: "weights dequantised for one product",
    HEAD: "output head: log-probs or logits",
    REFERENCE: "pass of the reference",
    "update": "the optimiser's step",
    "context": "CUDA context and fragmentation (assumed)",
}


@dataclass(frozen=True)
class Estimate:
    """Bytes by part of `PARTS` when most is needed, and what the pass was.

    Args:
        parts: bytes.
        peaks: of the pass, for its time.
        passes: of a micro-batch.
        tokens: through the model in the largest pass, padding included.
    """

    parts: dict[str, int]
    peaks: Peaks
    passes: int
    tokens: int

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


def rows_of_pass(settings: RunSettings, shared: bool) -> tuple[list[Row], int]:
    """The rows of the largest pass, and how many passes a micro-batch of longest rows takes.

    Args:
        settings: rows and their number; `bapo.tokens_per_batch` bounds a pass where prompts are shared.
        shared: whether they are.
    """
    prompt, response = settings.row
    row, rows = (prompt, *[response] * 3), settings.micro_batch_size
    budget = settings.bapo.tokens_per_batch
    if not shared or not budget:
        return [row] * rows, 1
    size = sum(row)
    whole = max(1, min(rows, budget // size))
    found = [row] * whole
    # shorter rows fill a pass to its bound
    if whole < rows and (rest := (budget - whole * size) // 4) > 0:
        found.append((rest, rest, rest, rest))
    return found, -(-rows // whole)


class Planner:
    """Estimates of runs of one architecture; models that are needed again are kept.

    Args:
        config: of the text model.
    """

    def __init__(self, config: PretrainedConfig):
        self.config = config
        self._rehearsals: dict[str, Rehearsal] = {}
        self._counts: dict[str, Counts] = {}
        self._passes: dict[tuple[str, str, tuple[Row, ...]], Peaks] = {}

    def rehearsal(self, settings: RunSettings) -> Rehearsal:
        """That of a run's model."""
        key = self._key(settings)
        if key not in self._rehearsals:
            self._rehearsals[key] = Rehearsal(self.config, settings)
        return self._rehearsals[key]

    def counts(self, settings: RunSettings) -> Counts:
        """Those of a run's model."""
        key = self._key(settings)
        if key not in self._counts:
            self._counts[key] = count(self.config, settings)
        return self._counts[key]

    def bapo(self, settings: RunSettings) -> Estimate:
        """Of `rl: bapo`."""
        shared = self.rehearsal(settings).padded_because is None
        rows, passes = rows_of_pass(settings, shared)
        if shared:
            tokens = sum(map(sum, rows))
        else:
            tokens = 3 * len(rows) * max(prompt + max(responses) for prompt, *responses in rows)
        return self._estimate(settings, "bapo", rows, passes, tokens)

    def dpo(self, settings: RunSettings) -> Estimate:
        """Of TRL's DPO with the same YAML, as people run it: the reference in each step, rows padded."""
        plain = dataclasses.replace(
            settings, bapo=settings.bapo.model_copy(update={"anchor_loss": "hinge", "keep": None})
        )
        rows, _ = rows_of_pass(plain, shared=False)
        tokens = 2 * len(rows) * max(prompt + chosen for prompt, chosen, *_ in rows)
        return self._estimate(plain, "dpo", rows, 1, tokens)

    def _estimate(
        self, settings: RunSettings, kind: str, rows: Sequence[Row], passes: int, tokens: int
    ) -> Estimate:
        key = (kind, self._key(settings), tuple(rows))
        if key not in self._passes:
            self._passes[key] = getattr(self.rehearsal(settings), kind)(rows)
        peaks = self._passes[key]
        parts = self.stays(settings)
        trained = sum(self.counts(settings).trained)
        update = memory.optimizer_step_bytes(settings.optimizer, trained, settings.trained_itemsize)
        step = dict(peaks.parts) if peaks.bytes >= update else {"update": update}
        parts |= step
        parts["context"] = memory.context_bytes(sum(step.values()))
        return Estimate({k: parts[k] for k in PARTS if parts.get(k)}, peaks, passes, tokens)

    def stays(self, settings: RunSettings) -> dict[str, int]:
        """Bytes of what is there in every moment of training. Gradients are, from a step's first micro-batch on."""
        counts = self.counts(settings)
        trained, itemsize = sum(counts.trained), settings.trained_itemsize
        adapter = trained * itemsize if settings.adapter else 0
        return {
            "weights": counts.weights,
            "copy": (adapter if settings.goes_on else 0) if settings.adapter else counts.weights,
            "adapter": adapter,
            "gradients": trained * itemsize,
            "optimizer": memory.optimizer_bytes(settings.optimizer, counts.trained, itemsize),
        }

    @staticmethod
    def _key(settings: RunSettings) -> str:
        rows = {"sequence_len": 0, "micro_batch_size": 0, "prompt_tokens": 0, "response_tokens": 0}
        bapo = settings.bapo.model_copy(update={"tokens_per_batch": None})
        return repr(dataclasses.replace(settings, **rows, bapo=bapo))
