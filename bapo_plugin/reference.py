"""The reference model: what the policy was before training."""

import os
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from accelerate.utils import is_peft_model

from bapo_plugin.compat import disable_gradient_checkpointing, use_adapter


@contextmanager
def reference_mode(model: Any, gradient_checkpointing_kwargs: dict | None = None):
    """Inside, the PEFT model is its own reference: adapter off, or the copy "ref" that TRL keeps of an
    adapter whose training goes on. A model without PEFT is left as it is. No gradients.

    Args:
        model: the unwrapped policy, or a reference model of its own.
        gradient_checkpointing_kwargs: as the trainer set them, to restore checkpointing with.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(disable_gradient_checkpointing(model, gradient_checkpointing_kwargs))
        if is_peft_model(model):
            name = "ref" if "ref" in model.peft_config else None
            stack.enter_context(use_adapter(model, adapter_name=name))
        yield


def check_room_for_reference(cfg: Any) -> None:
    """Without an adapter the reference is a second copy of the model: refuse early if it can't fit.

    Args:
        cfg: axolotl's validated configuration, without an adapter.

    Raises:
        ValueError: weights of policy, gradients and reference need more memory than is free.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if cfg.fsdp_config or cfg.fsdp or cfg.deepspeed:
        return  # shards: what is needed here depends on the number of GPUs
    try:
        config = AutoConfig.from_pretrained(
            cfg.base_model_config or cfg.base_model, trust_remote_code=bool(cfg.trust_remote_code)
        )
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # an unusual architecture: loading it will say more than this estimate could
        return
    dtype = cfg.torch_dtype if isinstance(cfg.torch_dtype, torch.dtype) else torch.float32
    copy = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    if torch.cuda.is_available():
        # one process spreads the model over all GPUs, several have one each
        shared = int(os.environ.get("WORLD_SIZE", 1)) == 1
        devices = range(torch.cuda.device_count()) if shared else [torch.cuda.current_device()]
        free = sum(torch.cuda.mem_get_info(device)[0] for device in devices)
    else:
        free = psutil.virtual_memory().available
    # policy and reference, and gradients where all weights are trained; optimiser states come on top
    needed = (2 if cfg.unfrozen_parameters else 3) * copy
    if needed > free:
        raise ValueError(
            f"adapter: is not set, so rl: bapo keeps a second copy of {cfg.base_model} as the reference. "
            f"Together with the policy and its gradients that needs {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are "
            "free. Set `adapter: qlora` with `load_in_4bit: true` (or `adapter: lora`): then the reference "
            "is the model with its adapter off and needs no memory"
        )
