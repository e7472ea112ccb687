"""Micro-batches that are taken in several passes, on several processes."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from bapo_plugin.scoring.collator import num_rows, packs_of


def equal_passes(batches: list[dict[str, Any]], accelerator: Accelerator) -> None:
    """Let every process take as many packs of each micro-batch as the others, in place: a pass is a collective one
    where weights are sharded. What is missing are repeats, marked `is_repeated`, that must not count.

    Args:
        batches: micro-batches of an optimiser step, as many on every process.
        accelerator: all processes call this together.
    """
    if accelerator.num_processes == 1:
        return
    counts = torch.tensor([[len(packs_of(batch)) for batch in batches]])
    most = accelerator.gather(counts.to(accelerator.device)).amax(0).tolist()
    for batch, wanted in zip(batches, most, strict=True):
        packs = packs_of(batch)
        if missing := wanted - len(packs):
            if "packs" not in batch:
                packs = [dict(batch)]
                batch["order"] = torch.arange(num_rows(batch))
            batch["packs"] = [{**packs[-1], "is_repeated": True}] * missing + packs


@contextmanager
def collecting_gradients(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Inside, a backward pass only adds to the gradients: they are exchanged, and with DeepSpeed the optimiser steps,
    in a later one."""
    state = accelerator.gradient_state
    if not state.sync_gradients:  # that later one is in another micro-batch
        yield
        return
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    state._set_sync_gradients(False)
    try:
        with nullcontext() if deepspeed else accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(True)
