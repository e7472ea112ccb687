"""The policy's adapter and its frozen copy, and what would make the two differ without training."""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

REFERENCE = "ref"  # TRL's name for the frozen copy of an adapter whose training goes on


def refuse_bias(model: Any) -> None:
    """An adapter that trains the model's own biases, which stay what they are when it is switched off.

    Raises:
        ValueError: it does.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        if (bias := getattr(config, "bias", "none")) != "none":
            raise ValueError(
                f"bias: {bias!r} in the adapter {name!r} trains biases of the model itself, so that the reference, the model with its "
                "adapter off, would move with it; set bias='none'"
            )


def copy_to_reference(model: Any, goes_on: bool) -> None:
    """Make the adapter "ref" what the active adapter is, in values and dtypes.

    TRL copies parameters whose names hold ".default.", which those of embeddings and trained tokens don't. With
    `target_parameters` TRL 1.9 makes no "ref", since PEFT before 0.20 couldn't.

    Args:
        model: a PEFT model; another one is left alone.
        goes_on: whether it came with an adapter, of which there must be a copy.
    """
    if not is_peft_model(model):
        return
    exists = REFERENCE in model.peft_config
    if not exists and not goes_on:
        return
    (active,) = model.active_adapters
    if not exists:
        model.add_adapter(REFERENCE, model.peft_config[active])
    state = get_peft_model_state_dict(model, adapter_name=active)
    set_peft_model_state_dict(model, state, adapter_name=REFERENCE)
    own = dict(model.named_parameters())
    for name, parameter in own.items():
        parts = name.split(".")
        if REFERENCE in parts:
            twin = own.get(".".join(active if part == REFERENCE else part for part in parts))
            if twin is not None and twin.dtype != parameter.dtype:
                parameter.data = parameter.data.to(twin.dtype)
            parameter.requires_grad_(False)


_OTHER = (
    "the checkpoint was written by a run with other adapter settings. Start again with them, or without "
    "resume_from_checkpoint"
)


def refuse_other_shapes(model: Any, checkpoint: str | Path) -> None:
    """
    Args:
        model: a PEFT model whose weights are whole; another one is left alone.
        checkpoint: folder.

    Raises:
        ValueError: the adapter's file has tensors of other shapes than the active adapter, which PEFT says without a
            remedy.
    """
    path = Path(checkpoint) / "adapter_model.safetensors"
    if not is_peft_model(model) or not path.is_file():
        return
    (active,) = model.active_adapters
    own = get_peft_model_state_dict(model, adapter_name=active)
    with safe_open(path, "pt") as file:
        for name in file.keys():
            shape = tuple(file.get_slice(name).get_shape())
            if name in own and tuple(own[name].shape) != shape:
                raise ValueError(
                    f"{path}: {name} has shape {shape}, and the model has {tuple(own[name].shape)}; {_OTHER}"
                )


def load_adapter(model: Any, checkpoint: str | Path) -> bool:
    """Give the active adapter the weights in a checkpoint's file.

    transformers loads only the adapters in subfolders where there are any ("ref"), and with FSDP 2 the other
    processes none at all.

    Args:
        model: a PEFT model, perhaps sharded by FSDP 2; another one is left alone.
        checkpoint: folder.

    Returns:
        Whether there was a file.

    Raises:
        ValueError: the model then has other weights than the file.
    """
    path = Path(checkpoint) / "adapter_model.safetensors"
    if not is_peft_model(model) or not path.is_file():
        return False
    (active,) = model.active_adapters
    own = get_peft_model_state_dict(model, adapter_name=active)  # shares memory with the parameters
    file = load_file(path)
    for name, saved in file.items():
        target = own.get(name)
        if target is not None and target.shape == saved.shape:
            with torch.no_grad():
                target.copy_(_as(saved, target))
    found = get_peft_model_state_dict(model, adapter_name=active)
    for name, saved in file.items():
        loaded = found.get(name)
        if isinstance(loaded, DTensor):
            loaded = loaded.full_tensor()
        if loaded is None or not torch.equal(loaded.cpu(), saved.to(loaded.dtype)):
            raise ValueError(f"{path}: {name} is not what the model has after loading it; {_OTHER}")
    return True


def _as(tensor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The tensor with dtype, device and shards of another one."""
    tensor = tensor.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        return distribute_tensor(tensor, target.device_mesh, target.placements)
    return tensor


def disable_functional_dropout(model: nn.Module) -> None:
    """Set every rate of dropout that is no `nn.Dropout` module to 0, as TRL's `disable_dropout` does with modules.

    Granite, StarCoder2 and others drop out by a function, with a rate that is an attribute of their layers: policy
    and reference would differ at random.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            continue
        for name, value in vars(module).items():
            if name.endswith(("dropout", "dropout_p", "dropout_prob")) and isinstance(value, float):
                setattr(module, name, 0.0)
