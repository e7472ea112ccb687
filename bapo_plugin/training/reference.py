"""The reference in training: every row has a number, and log π_ref is looked up by it or computed in the step."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, is_peft_model
from axolotl.utils.logging import get_logger
from datasets import Dataset
from torch import Tensor, nn

from bapo_plugin.rows.columns import RESPONSES
from bapo_plugin.scoring.collator import BASE_TOKENS, ROW, num_kept, num_rows
from bapo_plugin.scoring.forward import ForwardOutput
from bapo_plugin.scoring.reference import (
    COLUMN,
    FILE,
    ReferenceCache,
    ReferenceLogps,
    base_lengths,
    evaluating,
    reference_mode,
    weights_key,
)

if TYPE_CHECKING:
    from bapo_plugin.training.trainer import BAPOTrainer

LOG = get_logger("axolotl." + __name__)


def first_of_all(reason: str | None, accelerator: Accelerator) -> str | None:
    """The first reason that any process has, the same on all; None where none has one. All call it together."""
    reasons = gather_object([reason]) if accelerator.num_processes > 1 else [reason]
    return next(filter(None, reasons), None)


class _Part(NamedTuple):
    """Rows of one data set: they have the numbers from `start` on."""

    name: str
    rows: Dataset
    start: int


class Reference:
    """log π_ref of a trainer's rows.

    Args:
        trainer: its models, settings and layout are used.
        cache_dir: folder to keep log-probs in, or None.

    Raises:
        ValueError: they are to be computed before training, and FSDP 1 shards the model.
    """

    def __init__(self, trainer: "BAPOTrainer", cache_dir: str | None):
        self._trainer = trainer
        self._cache_dir = cache_dir
        self._cache: ReferenceCache | None = None
        self._parts: list[_Part] = []
        self._pending: list[_Part] = []
        self._numbered: set[str] = set()  # fingerprints of what `number` gave
        self._known = torch.zeros(0, len(RESPONSES))  # NaN where it is not computed
        self._holds_tokens: bool = trainer.bapo.holds_tokens
        self._tokens = torch.zeros(0)  # of all rows' base responses, row after row
        self._starts = torch.zeros(1, dtype=torch.int64)  # where each row's begin, and the end
        wanted = trainer.bapo.precompute_ref_log_probs
        if trainer.is_fsdp1 and wanted:
            raise ValueError(
                "precompute_ref_log_probs: true doesn't work with FSDP 1; set fsdp_version: 2, or remove the line"
            )
        if wanted is None:
            wanted = is_peft_model(trainer.model) and not trainer.is_fsdp1
        self.precomputed: bool = wanted
        LOG.info(
            "log-probs of the reference are computed "
            + ("once, before training" if wanted else "in each step")
        )

    # ---------------------------------------------------------------- rows

    def number(self, rows: Any, name: str) -> Any:
        """The rows with their numbers; a dict of data sets as one.

        Args:
            rows: tokenised, the same on every process.
            name: of the data set, for messages.
        """
        if rows is None:
            return None
        if isinstance(rows, dict):
            return {key: self.number(part, f"{name} {key}") for key, part in rows.items()}
        if rows._fingerprint in self._numbered:
            return rows
        if ROW in rows.column_names:  # another trainer's numbers, or a column of the user's
            rows = rows.remove_columns(ROW)
        for part in self._parts:
            if part.rows._fingerprint == rows._fingerprint:
                break
        else:
            part = _Part(name, rows, len(self._known))
            self._parts.append(part)
            self._pending.append(part)
            nothing = torch.full((len(rows), len(RESPONSES)), torch.nan)
            self._known = torch.cat([self._known, nothing.to(self._known.device)])
            if self._holds_tokens:
                lengths = torch.from_numpy(base_lengths(rows))
                starts = self._starts.cpu()
                self._starts = torch.cat([starts, starts[-1] + lengths.cumsum(0)])
                room = torch.full((int(lengths.sum()),), torch.nan, device=self._tokens.device)
                self._tokens = torch.cat([self._tokens, room])
        numbered = rows.add_column(ROW, np.arange(part.start, part.start + len(rows)))
        self._numbered.add(numbered._fingerprint)
        return numbered

    def _bring_their_own(self, batch: dict[str, Any]) -> bool:
        numbers = batch[ROW].tolist() if ROW in batch else []
        return any(COLUMN in self._part(number).rows.column_names for number in numbers)

    def _part(self, number: int) -> _Part:
        return next(p for p in reversed(self._parts) if p.start <= number)

    def describe(self, number: int) -> str:
        """The row, for messages."""
        part = self._part(number)
        return f"row {number - part.start + 1} of the {part.name} rows"

    def row(self, number: int, columns: Sequence[str]) -> dict[str, Any]:
        """Columns of the row, and its number."""
        part = self._part(number)
        row = part.rows[number - part.start]
        return {name: row[name] for name in columns} | {ROW: number}

    # ---------------------------------------------------------------- log-probs

    def fill(self, model: nn.Module | None = None) -> None:
        """Compute what is to be known before training and isn't yet. All processes call it together.

        Args:
            model: the policy as the trainer calls it, where weights are sharded.
        """
        pending, self._pending = self._pending, []
        if not self.precomputed or not pending:
            return
        trainer = self._trainer
        device = trainer.accelerator.device
        if self._cache is None:
            self._cache = self._make_cache(trainer.model if model is None else model)
        known, tokens = self._known.cpu(), self._tokens.cpu()
        for name, rows, start in pending:
            found = self._cache.logps_of(rows, trainer.args.per_device_eval_batch_size, name)
            known[start : start + len(rows)] = found.sequences
            if found.base_tokens is not None:
                first = int(self._starts[start])
                tokens[first : first + len(found.base_tokens)] = found.base_tokens
        self._known, self._tokens = known.to(device), tokens.to(device)

    def logps(
        self, model: nn.Module, unwrapped: nn.Module, batch: dict[str, Any]
    ) -> ReferenceLogps:
        """log π_ref of the batch's 3n sequences, all chosen, all rejected, all base, and of the base responses' tokens
        where the anchor looks at them. No gradient.

        Raises:
            RuntimeError: there is no reference.
        """
        known = self.known(batch)
        if known is None:
            live = self.live(model, unwrapped, batch)
            own = slice(len(RESPONSES) * num_rows(batch))
            known = ReferenceLogps(live.logps[own], live.base_tokens)
        return known

    def known(self, batch: dict[str, Any]) -> ReferenceLogps | None:
        """What was computed before training; None where it wasn't."""
        if not self.precomputed:
            return None
        device = batch["cu_seqlens"].device
        if ROW not in batch:
            # kept prompts alone have nothing to know; a pass of the model would be one that others don't make
            nothing = torch.zeros(0, device=device)
            return None if num_rows(batch) else ReferenceLogps(nothing, nothing)
        self._known = self._known.to(device)
        sequences = self._known[batch[ROW]].T.reshape(-1)
        if not self._holds_tokens:
            return ReferenceLogps(sequences, None)
        self._tokens, self._starts = self._tokens.to(device), self._starts.to(device)
        # the places of the rows' tokens in the table, row after row
        starts = self._starts[batch[ROW]]
        lengths = self._starts[batch[ROW] + 1] - starts
        before = lengths.cumsum(0) - lengths
        total = len(batch[BASE_TOKENS]) - 1 - 2 * num_rows(batch) - num_kept(batch)
        shift = torch.repeat_interleave(starts - before, lengths, output_size=total)
        return ReferenceLogps(sequences, self._tokens[shift + torch.arange(total, device=device)])

    def live(self, model: nn.Module, unwrapped: nn.Module, batch: dict[str, Any]) -> ForwardOutput:
        """The reference's own forward pass over the batch."""
        with self._as_reference(model, unwrapped) as (model, unwrapped):
            return self._trainer.response_forward(model, unwrapped, batch)

    def states(self, model: nn.Module, unwrapped: nn.Module, batch: dict[str, Any]) -> Tensor:
        """[T, H], what the reference hands to its output head for the batch's response tokens. No gradient.

        Where weights are sharded all processes call it together; else each on its own.
        """
        if not self._trainer.is_sharded:
            model = unwrapped  # DDP's forward is a collective call
        with self._as_reference(model, unwrapped) as (model, unwrapped):
            return self._trainer.response_forward.states(model, unwrapped, batch)

    @contextmanager
    def _as_reference(
        self, model: nn.Module, unwrapped: nn.Module
    ) -> Iterator[tuple[nn.Module, nn.Module]]:
        """The reference as it is called, and the model inside."""
        trainer = self._trainer
        if trainer.ref_model is not None:
            model = trainer.ref_model
            unwrapped = trainer.accelerator.unwrap_model(model)
        elif not is_peft_model(unwrapped):
            raise RuntimeError(
                "no reference: the model has no adapter and no reference model was given"
            )
        checkpointing = trainer.args.gradient_checkpointing_kwargs
        with evaluating(unwrapped), reference_mode(unwrapped, checkpointing):
            yield model, unwrapped

    def _make_cache(self, policy: nn.Module) -> ReferenceCache:
        trainer, accelerator = self._trainer, self._trainer.accelerator
        model = trainer.ref_model if trainer.ref_model is not None else policy
        unwrapped = accelerator.unwrap_model(model)
        if trainer.state.global_step and trainer.ref_model is None and not is_peft_model(unwrapped):
            raise RuntimeError("the reference is no longer there: the model has been trained")
        if not trainer.is_sharded and next(model.parameters()).device.type == "cpu":
            model.to(trainer.args.device)  # DeepSpeed moves it only when training begins

        def compute(batch: dict[str, Tensor]) -> ReferenceLogps:
            with accelerator.autocast():
                live = self.live(model, unwrapped, batch)
            return ReferenceLogps(live.logps, live.base_tokens)

        key = self._key(unwrapped) if self._cache_dir else ""
        return ReferenceCache(
            Path(self._cache_dir) / FILE if self._cache_dir else None,
            compute,
            trainer.collate,
            accelerator,
            key,
            self._holds_tokens,
        )

    def _key(self, model: nn.Module) -> str:
        trainer, accelerator = self._trainer, self._trainer.accelerator
        device = trainer.args.device.type
        layout = type(trainer.layout).__name__
        key = weights_key(
            model, f"{device} {accelerator.mixed_precision} {trainer.bapo.kernel} {layout}"
        )
        if not trainer.is_sharded:
            return key
        # each process has seen its own part
        return hashlib.sha256("".join(gather_object([key])).encode()).hexdigest()

    # ---------------------------------------------------------------- the first batch

    def check(self, model: nn.Module, batch: dict[str, Any], starts_equal: bool) -> None:
        """Measure on a batch that what was computed before training is what the model gives now, and that the policy
        starts as the reference. All processes call it together.

        Args:
            model: the policy as the trainer calls it, with the weights that it begins with.
            batch: of a layout, n rows.
            starts_equal: whether the policy is the reference before the first step.

        Raises:
            ValueError: it isn't so; rows and the difference are named.
        """
        trainer = self._trainer
        unwrapped = trainer.accelerator.unwrap_model(model)
        known = self.known(batch)
        if known is None and not starts_equal:
            return
        own = slice(len(RESPONSES) * num_rows(batch))
        with torch.no_grad(), trainer.compute_loss_context_manager():
            live = self.live(model, unwrapped, batch).logps[own]
            policy = live
            if starts_equal:
                unwrapped.train()  # as in the step
                policy = trainer.response_forward(model, unwrapped, batch).logps[own]
        tolerance = _tolerance(batch, trainer.computes_in_half)[own]
        problem = ""
        # log-probs that rows brought with them are the user's own affair
        computed = None if known is None or self._bring_their_own(batch) else known.sequences
        for found, message in ((computed, _STALE), (policy, _UNEQUAL)):
            if found is None or problem or not len(live):
                continue
            excess = (found - live).abs() - tolerance
            if not excess.max() <= 0:  # NaN too
                worst = int(excess.nan_to_num(torch.inf).argmax())
                n = num_rows(batch)
                row = self.describe(int(batch[ROW][worst % n])) if ROW in batch else "a row"
                response, off = RESPONSES[worst // n], float((found - live)[worst])
                problem = message.format(row=row, response=response, off=off)
        if problem := first_of_all(problem, trainer.accelerator):
            raise ValueError(problem)
        if starts_equal and len(live):
            off = (policy - live).abs().max().item()
            LOG.info(f"Before the first step policy and reference differ by at most {off:.2g} nats")


_STALE = (
    "{row}: log π_ref of the {response} response, computed before training, is {off:+.3g} nats away from what the "
    "reference gives now, so the reference has changed; remove bapo-reference.sqlite from dataset_prepared_path, or set "
    "precompute_ref_log_probs: false"
)
_UNEQUAL = (
    "{row}: before the first step the policy's log-probability of the {response} response is {off:+.3g} nats away from "
    "the reference's, so drift and anchor would measure something else than training. Dropout or noise that stays "
    "on, or an adapter whose frozen copy is none, does this; train without it, or set bapo.reference: base with "
    "lora_model_dir"
)


def _tolerance(batch: dict[str, Any], half: bool) -> Tensor:
    """What rounding may do to the log-probs, nats, [3n]: in 16 bits it grows as errors of tokens that add up at
    random."""
    lengths = batch["cu_seqlens"].diff().float()
    return 0.5 + 0.1 * lengths.sqrt() if half else 0.02 + 0 * lengths
