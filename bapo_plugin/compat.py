"""Every difference between supported versions and faults of theirs to work around, nothing else."""

import dataclasses
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

try:
    # private in TRL, the same in 1.9 and 1.14: sends a call through the wrapper's forward (DDP, FSDP,
    # DeepSpeed), so that gradient synchronisation and parameter gathering happen
    from trl.models.utils import _ForwardRedirection as ForwardRedirection
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer.utils import use_adapter
except ImportError:
    # a bare machine with a GPU, for benchmarks/GPU.md: models there are not wrapped
    disable_gradient_checkpointing = use_adapter = None

    class ForwardRedirection:
        def __call__(self, wrapper: Any, model: Any, function: Callable, **inputs: Any) -> Any:
            if wrapper is not model:
                raise ImportError("a model that is wrapped (DDP, FSDP, DeepSpeed) needs TRL")
            return function(**inputs)


__all__ = [
    "ForwardRedirection",
    "disable_gradient_checkpointing",
    "garbage_of_training",
    "keep_4bit_trainable_on_cpu",
    "only_reading",
    "route_evaluate_to_plugins",
    "use_adapter",
]


def route_evaluate_to_plugins(
    is_ours: Callable[[Any], bool], prepare: Callable[[Any, Any], tuple[Any, Any]]
) -> None:
    """Let `axolotl evaluate` load rows as `train` and `preprocess` do.

    Those two ask plugins for the data sets; `evaluate` (0.19 to 0.21) doesn't. Configurations that
    are not ours pass through untouched.

    Args:
        is_ours: whether a configuration is.
        prepare: (configuration, tokenizer) -> training and held-out rows.
    """
    from axolotl.common import datasets

    original = datasets.prepare_preference_datasets
    if getattr(original, "_bapo", False):
        return

    @wraps(original)
    def prepare_preference_datasets(cfg, tokenizer):
        return prepare(cfg, tokenizer) if is_ours(cfg) else original(cfg, tokenizer)

    prepare_preference_datasets._bapo = True
    datasets.prepare_preference_datasets = prepare_preference_datasets


@contextmanager
def only_reading() -> Iterator[None]:
    """Inside, axolotl's `load_cfg` validates and does nothing else: else it makes `output_dir`, deletes there the log of
    a run that may still be going on, and prepares this process for sharded weights."""
    from axolotl.cli import config

    names = ("prepare_debug_log", "prepare_optim_env")
    before = {name: getattr(config, name) for name in names}
    try:
        for name in names:
            setattr(config, name, lambda cfg: None)
        yield
    finally:
        for name, function in before.items():
            setattr(config, name, function)


@contextmanager
def garbage_of_training() -> Iterator[None]:
    """Inside, the garbage collector looks at what was made inside.

    axolotl's DPO trainer (0.19 to 0.21) collects after each micro-batch. That goes through all objects there are, a
    million and a half with its imports: a third of a second of a CPU each time, whatever the model's size.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def keep_4bit_trainable_on_cpu(model: Any) -> None:
    """Stop bitsandbytes from packing 4-bit weights for CPU inference.

    On a CPU with AVX512-BF16, bitsandbytes (0.50) repacks the weights of a 4-bit layer for good at
    its first forward in eval mode. Its kernel for packed weights has no backward, so after one
    evaluation every further training step would silently lose the gradient through that layer.

    Args:
        model: any module; layers on a GPU are left alone.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def keep_log_probs_in_fp32(accelerator: Any) -> None:
    """Stop FSDP 2 from rounding what a model returns.

    accelerate's mixed precision casts the results of a model to bf16, log-probs too: at −100 nats that is a step of
    half a nat. Without `output_dtype` layers still compute and return bf16.

    Args:
        accelerator: of a trainer, before it prepares its model.
    """
    if not accelerator.is_fsdp2:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)
        plugin.mixed_precision_policy = policy
