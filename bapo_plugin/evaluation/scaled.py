"""Adapters at a part of their strength: θ_0 + α Δ, the simplest rival of an anchor.

LoRA adds Δ = (lora_alpha / r) B A to a frozen weight, so that scaling it by α goes straight from the model before
training (α = 0) to the one after it (α = 1), as WiSE-FT does (Wortsman et al. 2022, arXiv 2109.01903).
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftType

# the others change the frozen weights below the adapter when it is made
_KEEPS_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")


def read_scales(texts: Sequence[str]) -> list[float]:
    """Numbers, each text one or several with commas, without repetitions.

    Raises:
        ValueError: it is no number, not finite, or below 0.
    """
    scales = []
    for text in (part for several in texts for part in several.split(",")):
        try:
            scale = float(text)
        except ValueError:
            scale = math.nan
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"--scale: {text!r} is no number from 0 on, such as --scale 0.5")
        scales.append(scale + 0.0)  # -0 is 0
    return list(dict.fromkeys(scales))


def check_scalable(folder: Path) -> None:
    """Whether the model with this adapter is θ_0 + Δ, with a Δ that PEFT can scale.

    Raises:
        ValueError: it is another kind of adapter, or trained more than LoRA's matrices.
    """
    config = PeftConfig.from_pretrained(str(folder))
    reason = None
    if config.peft_type != PeftType.LORA or not isinstance(config, LoraConfig):
        reason = f"it is {config.peft_type.value}, not LoRA"
    elif config.use_dora:
        reason = "DoRA also learns the weights' magnitudes"
    elif config.modules_to_save:
        reason = f"it holds whole modules ({', '.join(config.modules_to_save)}: modules_to_save)"
    elif config.bias != "none":
        reason = f"it trained biases (bias: {config.bias})"
    elif config.trainable_token_indices:
        reason = "it trained embeddings of tokens (trainable_token_indices)"
    elif config.init_lora_weights not in _KEEPS_THE_BASE:
        reason = f"init_lora_weights: {config.init_lora_weights} changes the weights below it"
    elif variants := [
        field.name
        for field in dataclasses.fields(config)
        if field.metadata.get("is_lora_variant") and getattr(config, field.name)
    ]:
        reason = f"it is a variant of LoRA ({', '.join(variants)})"
    if reason:
        raise ValueError(
            f"--scale: {folder} can't be scaled, because {reason}; evaluate it without --scale"
        )
