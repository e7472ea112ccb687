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
                config = AutoConfig.from_pretrained(path.parent, trust_remote_code=True)
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
    before = torch.get_default_dtype()
    try:
        with torch.device("meta"):
            torch.set_default_dtype(settings.dtype)
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=settings.trust_remote_code
            )
    except (ValueError, ImportError, AttributeError, KeyError) as error:
        raise ValueError(
            f"a model of model_type {config.model_type!r} can't be built ({_first(error)})"
        ) from error
    finally:
        torch.set_default_dtype(before)
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
    """What transformers gives to bitsandbytes: every linear layer but the output head."""
    head = model.get_output_embeddings()
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child is not head
    ]


@dataclass(frozen=True)
class Counts:
    """What a model has.

    Args:
        weights: bytes of frozen or trained base weights as the run loads them; tied ones once.
        base_parameters: elements of the base model; tied ones once.
        linear: elements of the layers' matrices, which a token passes through once.
        trained: elements of each trained tensor.
        width, vocabulary, layers: of the text model.
        head_dims: query heads times their width, for the FLOPs of attention.
    """

    weights: int
    base_parameters: int
    linear: int
    trained: tuple[int, ...]
    width: int
    vocabulary: int
    layers: int
    head_dims: int


def count(config: PretrainedConfig, settings: RunSettings) -> Counts:
    """Count a model's parameters and bytes, without its weights."""
    bare = build(config, settings.without_adapter())
    quantised = {id(child.weight): child.weight for _, _, child in _quantised(bare)}
    head = bare.get_output_embeddings()
    weights = elements = linear = 0
    for name, parameter in bare.named_parameters():  # tied ones come once
        n = parameter.numel()
        elements += n
        is_matrix = parameter.dim() > 1 and "embed" not in name and parameter is not head.weight
        linear += _used_elements(config, parameter) if is_matrix else 0
        if id(parameter) in quantised and settings.bits == 4:
            weights += nf4_bytes(n, settings.double_quant)
        elif id(parameter) in quantised and settings.bits == 8:
            weights += int8_bytes(*parameter.shape)
        else:
            upcast = settings.bits < 16 and not any(k in name for k in _KEPT_IN_16_BITS)
            weights += n * (4 if upcast else settings.dtype.itemsize)
    model = build(config, settings) if settings.adapter else bare
    trained = tuple(p.numel() for p in model.parameters() if p.requires_grad)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Counts(
        weights,
        elements,
        linear,
        trained,
        config.hidden_size,
        head.weight.shape[0],
        config.num_hidden_layers,
        heads * head_dim,
    )


def _used_elements(config: PretrainedConfig, parameter: nn.Parameter) -> int:
    """Elements that one token meets: of stacked experts those that the router chooses."""
    if parameter.dim() < 3:
        return parameter.numel()
    chosen = getattr(config, "num_experts_per_tok", None) or parameter.shape[0]
    return parameter.numel() // parameter.shape[0] * min(chosen, parameter.shape[0])
