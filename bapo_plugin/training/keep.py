"""`bapo.keep`: prompts without preferences whose former answers are held beside the training rows."""

from typing import TYPE_CHECKING, Any

import torch
from axolotl.utils.logging import get_logger
from datasets import Dataset

from bapo_plugin.rows.columns import IDS
from bapo_plugin.scoring.collator import ROW, packs_of
from bapo_plugin.training.reference import Reference
from bapo_plugin.training.rows import refuse_empty

if TYPE_CHECKING:
    from bapo_plugin.training.trainer import BAPOTrainer

LOG = get_logger("axolotl." + __name__)


class Keeper:
    """Adds kept prompts to the micro-batches of an optimiser step.

    Which ones is a function of seed and step alone: every prompt is taken once before any is taken twice, and a run
    that goes on takes those that it would have taken.

    A router's auxiliary loss (MoE) sees their tokens as it sees those of rows.

    Args:
        trainer: its rows, layout and processes are used.
        rows: `prompt_ids` and `base_ids`, the same on every process.

    Raises:
        ValueError: there are none, or one without tokens.
    """

    def __init__(self, trainer: "BAPOTrainer", rows: Dataset):
        if len(rows) == 0:
            raise ValueError("bapo.keep: there are no prompts to keep")
        self._trainer = trainer
        columns = ["prompt_ids", "base_ids"]
        refuse_empty(rows, columns, "bapo.keep", "prompt")
        #: `prompt_ids` and `base_ids`
        self.rows = rows.select_columns(columns)
        #: prompts in each optimiser step, over its micro-batches and all processes
        self.per_step: int = min(trainer.bapo.keep.per_step, len(rows))
        self._orders: dict[int, list[int]] = {}
        LOG.info(
            f"bapo.keep: {len(rows):,} prompts, {self.per_step} in each step; each costs a pass of the reference over "
            "prompt and answer besides"
        )

    def describe(self, number: int) -> str:
        """The prompt, for messages."""
        return f"prompt {number + 1} of bapo.keep"

    def drawn(self, step: int) -> list[int]:
        """Numbers of the prompts of an optimiser step, counted from 0."""
        start = step * self.per_step
        return [
            self._order(i // len(self.rows))[i % len(self.rows)]
            for i in range(start, start + self.per_step)
        ]

    def _order(self, turn: int) -> list[int]:
        if turn not in self._orders:
            seed = self._trainer.args.seed * 1_000_003 + turn
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(self.rows), generator=generator).tolist()
            self._orders = {k: v for k, v in self._orders.items() if k == turn - 1}
            self._orders[turn] = order
        return self._orders[turn]

    def add(self, batches: list[dict[str, Any]], reference: Reference) -> None:
        """Put this process's share of the step's prompts into its micro-batches, in place.

        Args:
            batches: of an optimiser step, as many on every process; all rows have numbers.
            reference: knows the rows by number.
        """
        accelerator = self._trainer.accelerator
        world, rank = accelerator.num_processes, accelerator.process_index
        step = self._trainer.state.global_step
        # processes take turns, so that none has more to do than others
        own = [n for j, n in enumerate(self.drawn(step)) if (j + step) % world == rank]
        mine: dict[int, list[dict]] = {}
        for i, number in enumerate(own):
            place = i * len(batches) // len(own)
            mine.setdefault(place, []).append({**self.rows[number], ROW: number})
        for i, kept in mine.items():
            numbers = [
                n for pack in packs_of(batches[i]) if ROW in pack for n in pack[ROW].tolist()
            ]
            rows = [reference.row(number, IDS) for number in numbers]
            batches[i] = self._trainer.data_collator([*rows, *kept])
