"""The base model on this machine, and an adapter put on it so that nothing of it is lost."""

from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from bapo_plugin.commands.export.result import size
from bapo_plugin.commands.export.source import Source
from bapo_plugin.compat import keep_4bit_trainable_on_cpu

_ROOM = 1.05  # beyond the weights: tokenizer, config, one layer twice


def bytes_of_base(source: Source, base: Path, dtype: str | None) -> int:
    """What its weights need on a disk and in memory, with some room.

    Args:
        source: with an adapter.
        base: folder.
        dtype: that they will have; None: as published.

    Raises:
        ValueError: it is published quantised, or has no weights.
    """
    config = AutoConfig.from_pretrained(str(base), trust_remote_code=source.trusts)
    if found := getattr(config, "quantization_config", None):
        method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
        raise ValueError(
            f"base model: {source.base} is published quantised ({method}), and merging into such weights rounds the adapter "
            "away. Name the model in 16 bits with --base, or serve the adapter itself (--to vllm)"
        )
    files = list(base.glob("*.safetensors")) or list(base.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(
            f"base model: {base} has no weights (*.safetensors); name a folder that has them with --base"
        )
    bytes_now = sum(path.stat().st_size for path in files)
    published = config.dtype or torch.float32
    wider = getattr(torch, dtype).itemsize / published.itemsize if dtype else 1
    return int(bytes_now * wider * _ROOM)


def place_for(needed: int) -> torch.device:
    """The GPU where the model fits, else the CPU.

    Raises:
        ValueError: it fits neither.
    """
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.3 * needed:
        return torch.device("cuda", torch.cuda.current_device())
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    if free < needed:
        raise ValueError(
            f"merging needs {size(needed)} of memory, and {size(free)} are free; merge on a larger machine, serve the "
            "adapter itself (--to vllm), or merge file by file with `axolotl merge-lora` (docs/serving.md says what that "
            "does otherwise)"
        )
    return torch.device("cpu")


def load(
    source: Source,
    base: Path,
    device: torch.device,
    tokenizer: Any,
    weights: str = "published",
    dtype: str | None = None,
) -> PeftModel:
    """The base with the adapter on it.

    Args:
        source: with an adapter.
        base: folder.
        device: for the whole model.
        tokenizer: of the run.
        weights: "published"; "quantised" as in training, by bitsandbytes; "rounded": quantised, and back in the dtype.
        dtype: None: the one that it was published in.

    Raises:
        ValueError: the adapter doesn't fit the base.
    """
    model = AutoModelForCausalLM.from_pretrained(
        str(base),
        dtype=dtype or "auto",
        device_map={"": device},
        quantization_config=None if weights == "published" else _quantization(source, device),
        trust_remote_code=source.trusts,
        local_files_only=True,
    )
    if weights == "rounded":
        model = model.dequantize()
    keep_4bit_trainable_on_cpu(
        model
    )  # packed weights have kernels of their own, with other rounding
    return _with_adapter(source, model, tokenizer)


def _with_adapter(source: Source, model: Any, tokenizer: Any) -> PeftModel:
    tensors = source.tensors()
    embeddings = model.get_input_embeddings()
    have = embeddings.weight.shape[0]
    # saved whole where they were trained, or the vocabulary resized
    name = f"base_model.model.{_name_of(model, embeddings)}"
    saved = [tensors.get(f"{name}.weight"), tensors.get(f"{name}.base_layer.weight")]
    rows = next((shape[0] for shape in saved if shape), have)
    if rows != have:
        model.resize_token_embeddings(rows, mean_resizing=False)
    if len(tokenizer) > rows:
        raise ValueError(
            f"the run's tokenizer has {len(tokenizer)} tokens, its base {rows} embeddings, and {source.folder} holds none for "
            "those that were added; they would be random. Train with the embeddings saved (lora_modules_to_save: "
            "[embed_tokens, lm_head])"
        )
    _untie(source, model, tensors)
    try:
        model = PeftModel.from_pretrained(model, str(source.folder))
    except RuntimeError as error:  # shapes
        line = next((text for text in str(error).splitlines() if "size mismatch" in text), error)
        raise ValueError(
            f"the adapter in {source.folder} doesn't fit the base {source.base} ({str(line).strip()}); name the model that "
            "it was trained on with --base"
        ) from None
    inside = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    whole = {f"base_model.model.{name}" for name in model.get_base_model().state_dict()}
    lost = [name for name in tensors if name not in inside and name not in whole]
    lacking = [name for name in inside if ".lora_" in name and name not in tensors]
    if lost or lacking:
        which = f"has no place for {lost[0]}" if lost else f"has {lacking[0]} beside it"
        raise ValueError(
            f"the adapter in {source.folder} doesn't fit the base {source.base}, which {which} ({len(lost or lacking)} "
            "tensors); name the model that it was trained on with --base"
        )
    return model.eval()


def _untie(source: Source, model: Any, tensors: dict[str, tuple[int, ...]]) -> None:
    """Give the head weights of its own where they are the embeddings' and LoRA changes one of the two: merged into the
    shared weights it would change both."""
    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        return
    if source.adapter.get("ensure_weight_tying"):
        return  # PEFT trained both as one
    names = [_name_of(model, module) for module in (head, model.get_input_embeddings())]
    if any(f".{name}.lora_" in tensor for name in names for tensor in tensors):
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False


def _name_of(model: Any, module: Any) -> str:
    return next(name for name, inside in model.named_modules() if inside is module)


def _quantization(source: Source, device: torch.device) -> BitsAndBytesConfig:
    """As axolotl loads it."""
    if source.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    settings = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32 if device.type == "cpu" else torch.bfloat16,
    }
    return BitsAndBytesConfig(**settings | (source.config.get("bnb_config_kwargs") or {}))
