"""A model of an architecture without its weights: what it has, counted on the meta device."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from bapo_plugin.planning.memory import int8_bytes, nf4_bytes
from bapo_plugin.planning.settings import RunSettings

# parameters that axolotl leaves in the dtype of training, where a quantised model's others go to fp32
_KEPT_IN_16_BITS = ("norm", "embed_tokens", "lm_head", "embed_in", "embed_out", "word_embeddings")


def read_config(source: str | Path, settings: RunSettings | None = None) -> PretrainedConfig:
    """The text model's config.

    Args:
        source: a config.json, a folder that holds one, or a model of the hub, which is asked unless HF_HUB_OFFLINE is
            set and only for what the local cache lacks.
        settings: what the YAML changes in it.

    Raises:
        ValueError: there is none, or it isn't that of a causal LM that transformers knows.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ValueError(
                f"{source}: the folder has no config.json; name the model's own folder"
            )
    remote = bool(settings and settings.trust_remote_code)
    changes = settings.model_overrides if settings else {}
    try:
        if path.is_file():
            written = json.loads(path.read_text("utf-8"))
            if not isinstance(written, dict) or "model_type" not in written:
                raise ValueError("it has no `model_type`")
            if not remote:
                kind = written.pop("model_type")
                config = AutoConfig.for_model(kind, **written)
            else:
                config = AutoConfig.from_pretrained(path.parent, trust_remote_code=remote)
            for key, value in changes.items():
                setattr(config, key, value)
        else:
            revision = {"revision": settings.revision} if settings and settings.revision else {}
            config = AutoConfig.from_pretrained(
                str(source), trust_remote_code=remote, **revision, **changes
            )
    except (OSError, ValueError, KeyError) as error:
        if path.is_file():
            raise ValueError(
                f"{path}: not the config of a model that transformers knows ({_first(error)})"
            ) from error
        raise ValueError(
            f"base_model: {source} is neither a folder nor in the local cache, and its config can't be had "
            f"({_first(error)}); get it with `hf download {source} config.json`, or name a file with --config FILE"
        ) from error
    return config.get_text_config()


def _first(error: Exception) -> str:
    return (
        str(error).strip().splitlines()[0].rstrip(".")[:200]
        if str(error).strip()
        else "no reason given"
    )


def build(
    config: PretrainedConfig,
    settings: RunSettings,
    layer: Callable[[nn.Linear], nn.Module] | None = None,
) -> nn.Module:
    """The model with its adapter on the meta device, in the dtype of training.

    Args:
        config: of the text model.
        settings: dtype, adapter.
        layer: makes of a linear layer that is quantised what stands for it.

    Raises:
        ValueError: transformers has no causal LM of this kind, or the adapter's targets aren't there.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code
            )
    except (ValueError, ImportError, AttributeError, KeyError) as error:
        raise ValueError(
            f"a model of model_type {config.model_type!r} can't be built ({_first(error)})"
        ) from error
    if layer is not None and settings.bits < 16:
        for parent, name, linear in _quantised(model):
            setattr(parent, name, layer(linear))
    if not settings.adapter:
        return model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        model = get_peft_model(
            model,
            LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings.adapter),
            low_cpu_mem_usage=True,
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the adapter doesn't go with this model: {_first(error)}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(settings.adapter_dtype)
    return model


def _quantised(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """What transformers gives to bitsandbytes: every linear layer but the output head. Those of an adapter come later
    and stay as they are."""
    head = model.get_output_embeddings()
    return [
        (parent, name, child)
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child is not head and "lora_" not in path
    ]


@dataclass(frozen=True)
class Counts:
    """What a model has.

    Args:
        weights: bytes of base weights as the run loads them; tied ones once.
        parameters: elements of the base model; tied ones once.
        trained: elements of each trained tensor.
    """

    weights: int
    parameters: int
    trained: tuple[int, ...]


def count(config: PretrainedConfig, settings: RunSettings) -> Counts:
    """Count a model's parameters and bytes, without its weights."""
    model = build(config, settings)
    base = model.get_base_model() if settings.adapter else model
    quantised = {id(layer.weight) for _, _, layer in _quantised(base)}
    own = {id(p) for p in model.parameters() if p.requires_grad} if settings.adapter else set()
    weights = elements = 0
    for name, parameter in base.named_parameters():  # tied ones come once
        if id(parameter) in own:
            continue
        n = parameter.numel()
        elements += n
        if id(parameter) in quantised and settings.bits == 4:
            weights += nf4_bytes(n, settings.double_quant)
        elif id(parameter) in quantised and settings.bits == 8:
            weights += int8_bytes(*parameter.shape)
        else:
            upcast = settings.bits < 16 and not any(k in name for k in _KEPT_IN_16_BITS)
            weights += n * (4 if upcast else settings.dtype.itemsize)
    trained = tuple(p.numel() for p in model.parameters() if p.requires_grad)
    return Counts(weights, elements, trained)
