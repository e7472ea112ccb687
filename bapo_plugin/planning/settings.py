"""The keys of a YAML that decide on memory, with axolotl's defaults."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bapo_plugin.checks import check_config
from bapo_plugin.config import BAPOConfig
from bapo_plugin.yaml_files import read_yaml

_CHECKPOINTING = "gradient_checkpointing_kwargs"


@dataclass(frozen=True)
class RunSettings:
    """What a run's memory depends on besides the model's architecture.

    Args:
        sequence_len: most tokens of a prompt with one response.
        micro_batch_size: rows in a micro-batch.
        prompt_tokens, response_tokens: of a row; None takes the worst case that `sequence_len` allows.
        bits: of quantised weights, 4 or 8; 16 where there are none.
        dtype: of weights that aren't quantised, and of computation.
        autocast: whether the step runs under autocast.
        adapter: keyword arguments of `peft.LoraConfig`; empty without an adapter.
        goes_on: an adapter's training goes on, so that a frozen copy of it is kept.
        optimizer: name.
        checkpointing: recompute each layer in the backward pass.
        bapo: its block.
        precompute: log-probs of the reference are known before training.
    """

    base_model: str = ""
    sequence_len: int = 512
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    bits: int = 16
    double_quant: bool = True
    dtype: torch.dtype = torch.bfloat16
    autocast: bool = True
    adapter: dict[str, Any] = field(default_factory=dict)
    goes_on: bool = False
    optimizer: str = "adamw_torch_fused"
    checkpointing: bool = False
    reentrant: bool = False
    bapo: BAPOConfig = field(default_factory=BAPOConfig)
    precompute: bool = True
    attention: str = "sdpa"
    revision: str | None = None
    trust_remote_code: bool = False
    model_overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def adapter_dtype(self) -> torch.dtype:
        """TRL casts the adapter of a quantised model to bf16; PEFT keeps others in fp32."""
        return torch.bfloat16 if self.bits < 16 else torch.float32

    @property
    def trained_itemsize(self) -> int:
        """Bytes of an element of what is trained."""
        return (self.adapter_dtype if self.adapter else self.dtype).itemsize

    @property
    def row(self) -> tuple[int, int]:
        """Tokens of the prompt and of each response of the longest row. In the worst case three responses fill
        sequence_len on a prompt of one token, since the prompt is computed once."""
        prompt, response = self.prompt_tokens, self.response_tokens
        if prompt is None and response is None:
            return 1, self.sequence_len - 1
        if prompt is None:
            return max(1, self.sequence_len - response), response
        return prompt, response if response is not None else max(1, self.sequence_len - prompt)

    def without_adapter(self) -> "RunSettings":
        """The same run of all weights."""
        return dataclasses.replace(self, adapter={})


def read_settings(path: Path, **changes: Any) -> tuple[RunSettings, dict[str, Any]]:
    """A YAML as numbers, and as it is written.

    Args:
        path: of the YAML.
        changes: of fields, for what the command line says otherwise.

    Raises:
        ValueError: it is no YAML, no run of BAPO or DPO, or a key has a value that can't be.
    """
    cfg = read_yaml(path)
    if str(cfg.get("rl")).lower() not in ("bapo", "dpo"):
        raise ValueError(f"{path} is not a run of preferences: it needs `rl: bapo` (or `rl: dpo`)")
    bapo = check_config(cfg) if str(cfg["rl"]).lower() == "bapo" else BAPOConfig()
    if not cfg.get("base_model"):
        raise ValueError("base_model: is not set")
    adapter = cfg.get("adapter")
    if adapter not in (None, "lora", "qlora"):
        raise ValueError(f"adapter: {adapter} is not known here; lora and qlora are")
    numbers = {
        key: _whole(cfg, key, default)
        for key, default in (
            ("sequence_len", 512),
            ("micro_batch_size", 1),
            ("gradient_accumulation_steps", 1),
        )
    }
    half, dtype = _precision(cfg)
    precompute = bapo.precompute_ref_log_probs
    bits = 4 if cfg.get("load_in_4bit") else 8 if cfg.get("load_in_8bit") else 16
    bnb, checkpointing = _block(cfg, "bnb_config_kwargs"), _block(cfg, _CHECKPOINTING)
    settings = RunSettings(
        base_model=str(cfg["base_model"]),
        **numbers,
        bits=bits,
        double_quant=bool(bnb.get("bnb_4bit_use_double_quant", True)),
        dtype=dtype,
        autocast=half,
        adapter=_lora(cfg) if adapter else {},
        goes_on=bool(cfg.get("lora_model_dir")) and bapo.reference == "start",
        optimizer=str(cfg.get("optimizer") or "adamw_torch_fused"),
        checkpointing=bool(cfg.get("gradient_checkpointing")),
        reentrant=bool(checkpointing.get("use_reentrant")),
        bapo=bapo,
        precompute=bool(adapter) if precompute is None else precompute,
        attention=str(cfg.get("attn_implementation") or "sdpa"),
        revision=cfg.get("revision_of_model"),
        trust_remote_code=bool(cfg.get("trust_remote_code")),
        model_overrides=_block(cfg, "overrides_of_model_config"),
    )
    settings = dataclasses.replace(settings, **{k: v for k, v in changes.items() if v is not None})
    prompt, response = settings.row
    if prompt < 1 or response < 1:
        raise ValueError(
            f"sequence_len: {settings.sequence_len} leaves no room for a prompt and a response"
        )
    return settings, cfg


def _block(cfg: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = cfg.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{key}: {value!r} must be a block of settings; mend or remove it")
    return dict(value or {})


def _whole(cfg: Mapping[str, Any], key: str, default: int) -> int:
    value = cfg.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key}: {value!r} must be a whole number above 0")
    return value


def _precision(cfg: Mapping[str, Any]) -> tuple[bool, torch.dtype]:
    """Whether autocast is on, and the dtype that weights are loaded in. `auto` is bf16, as on every card of the table."""
    if cfg.get("bf16") in ("auto", True) or cfg.get("bfloat16"):
        return not cfg.get("bfloat16"), torch.bfloat16
    if cfg.get("bf16") == "full":
        return False, torch.bfloat16
    if cfg.get("fp16"):
        return True, torch.float16
    return False, torch.float32


def _lora(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `peft.LoraConfig`, as axolotl gives them."""
    if cfg.get("lora_r") is None:
        raise ValueError("lora_r: is not set, but adapter is; 16 or 32 are usual")
    rank = _whole(cfg, "lora_r", 0)
    modules = cfg.get("lora_target_modules") or []
    targets: Any = [modules] if isinstance(modules, str) and modules != "all-linear" else modules
    if cfg.get("lora_target_linear") or modules == "all-linear":
        targets = "all-linear"
    if not targets and not cfg.get("lora_target_parameters"):
        raise ValueError(
            "lora_target_modules: is empty; name modules, or set lora_target_linear: true"
        )
    options = {
        "r": rank,
        "lora_alpha": cfg.get("lora_alpha") or rank,
        "target_modules": targets or None,
        "target_parameters": cfg.get("lora_target_parameters"),
        "modules_to_save": cfg.get("lora_modules_to_save"),
        "layers_to_transform": cfg.get("peft_layers_to_transform"),
        "use_dora": bool(cfg.get("peft_use_dora")),
    }
    return {key: value for key, value in options.items() if value not in (None, [], False)}
