"""Which layout batches get: one prompt for three responses where that is proven, else padded rows.

`refusal` names the families, by their config, where sharing a prompt can't hold; `self_check` then proves it
on the model as it is loaded.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor, nn

from bapo_plugin.compat import disable_gradient_checkpointing
from bapo_plugin.scoring.collator import PaddedCollator, SharedPrefixCollator
from bapo_plugin.scoring.forward import ResponseForward
from bapo_plugin.scoring.reference import evaluating
from bapo_plugin.scoring.shared_prefix import install, uninstall, unwrap_peft

LOG = get_logger("axolotl." + __name__)


def choose_collator(
    models: Sequence[tuple[nn.Module, nn.Module]],
    forward: ResponseForward,
    *,
    wanted: str,
    tokens_per_batch: int | None,
    pad_token_id: int,
    pad_to_multiple_of: int | None,
    mixed_precision: str,
    autocast: Callable[[], AbstractContextManager],
    checkpointing: dict | None,
    refused: str | None,
    device: torch.device | None = None,
    agree: Callable[[str | None], str | None] = lambda reason: reason,
) -> PaddedCollator | SharedPrefixCollator:
    """The layout of batches: one prompt for three responses where that is proven on the models.

    Args:
        models: policy, and the reference where it is a model of its own: each as it is called (perhaps wrapped), and the
            model inside.
        forward: that of training.
        wanted: "auto", "off" or "require".
        tokens_per_batch: with a shared prefix, most tokens at a time.
        pad_token_id, pad_to_multiple_of: see the collators.
        mixed_precision, autocast: of training.
        checkpointing: settings of gradient checkpointing, to restore it with.
        refused: why the prompt can't be shared whatever the models are, or None.
        device: where inputs go; by default where the model is.
        agree: given this process's verdict, returns that of all.

    Raises:
        ValueError: sharing is required and can't be done, or a setting needs it and it is off.
    """
    padded = PaddedCollator(pad_token_id, pad_to_multiple_of)
    if wanted == "off":
        if tokens_per_batch:
            raise ValueError(
                f"bapo.tokens_per_batch: {tokens_per_batch} needs a shared prefix, but bapo.shared_prefix is off; remove one "
                "of the two lines"
            )
        return padded
    shared = SharedPrefixCollator(pad_token_id, pad_to_multiple_of, tokens_per_batch)

    def try_out(model: nn.Module, unwrapped: nn.Module) -> str | None:
        def run(rows: list[dict], is_shared: bool) -> tuple[Tensor, int]:
            batch: dict[str, Any] = shared.pack(rows) if is_shared else padded(rows)
            batch = {key: value.to(device or unwrapped.device) for key, value in batch.items()}
            with (
                torch.no_grad(),
                autocast(),
                evaluating(unwrapped),
                disable_gradient_checkpointing(unwrapped, checkpointing),
            ):
                logps = forward(model, unwrapped, batch).logps
            return logps, batch["layout"].calls if is_shared else 0

        return _why_not(unwrapped, run, mixed_precision)

    reason = refused or agree(next(filter(None, (try_out(*pair) for pair in models)), None))
    if reason:
        if wanted == "require":
            raise ValueError(
                f"bapo.shared_prefix: require, but {reason}; set bapo.shared_prefix: auto to compute the prompt once for "
                "each response"
            )
        for _, model in models:
            uninstall(model)
        LOG.info(
            f"shared prefix: off, each response gets a padded row of its own: {reason}"
            + ("; bapo.tokens_per_batch has no effect" if tokens_per_batch else "")
        )
        return padded
    LOG.info("shared prefix: on, each prompt is computed once for its three responses")
    return shared


def refusal_by_settings(is_fsdp1: bool, has_aux_loss: bool) -> str | None:
    """Why the prompt can't be shared whatever the model is; None where nothing speaks against it."""
    if is_fsdp1:
        return "with FSDP 1 it can't be tried out; set fsdp_version: 2"
    if has_aux_loss:
        return "the router's auxiliary loss would count a prompt once instead of three times"
    return None


class LateCollator:
    """Stands for a layout that is chosen after batches' loader is made: weights must be sharded first."""

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None):
        #: what collates
        self.chosen: PaddedCollator | SharedPrefixCollator = PaddedCollator(
            pad_token_id, pad_to_multiple_of
        )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return self.chosen(rows)


def compute_dtype(model: nn.Module, mixed_precision: str) -> torch.dtype:
    """What a model computes in."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = half.get(mixed_precision, next(model.parameters()).dtype)
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        return getattr(model.config, "dtype", None) or dtype
    return dtype


def _why_not(
    model: nn.Module,
    run: Callable[[list[dict], bool], tuple[Tensor, int]],
    mixed_precision: str,
) -> str | None:
    """Why this model can't share a prompt; where it can, its attention is installed."""
    if reason := refusal(model):
        return reason
    parameter = next(model.parameters())
    if parameter.device.type == "meta":
        return "the model isn't loaded on this process"
    config = model.config.get_text_config()
    dtype = compute_dtype(model, mixed_precision)
    far = _LONGEST_CHECK[parameter.device.type == "cuda"]
    try:
        install(model)
        rows = check_rows(config, far)
        reason = self_check(run, rows, config.num_hidden_layers, config.vocab_size, dtype)
    except Exception as error:  # a family that stumbles over the layout
        reason = f"{type(error).__name__}: {error}"
    return reason and f"the check on {type(unwrap_peft(model)).__name__} failed: {reason}"


def refusal(model: nn.Module) -> str | None:
    """Why this model can't share a prompt, by its config; None where nothing speaks against it.

    Args:
        model: a transformers model, or one wrapped by PEFT.
    """
    inner = unwrap_peft(model)
    config = getattr(inner, "config", None)
    if config is None or not hasattr(inner, "set_attn_implementation"):
        return f"{type(inner).__name__} is not a transformers model"
    name = type(inner).__name__
    text = config.get_text_config()
    if any(
        getattr(adapter, "alora_invocation_tokens", None)
        for adapter in getattr(model, "peft_config", {}).values()
    ):
        return "an adapter acts behind its invocation tokens only (aLoRA), which it looks for in a row's text"
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder"
    try:
        can_set = inner._can_set_attn_implementation()
    except (OSError, AttributeError, TypeError):  # no source to look at
        can_set = False
    if not can_set:
        return f"{name} has attention of its own that can't be replaced"
    kinds = set(
        getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or []
    )
    if other := kinds - {"full_attention", "sliding_attention", "attention"}:
        return f"{name} has layers in which tokens meet outside attention or otherwise ({', '.join(sorted(other))})"
    for key in ("alibi", "use_alibi"):
        if getattr(text, key, None):
            return f"{name} has ALiBi positions"
    if getattr(getattr(text, "attn_config", None), "alibi", False):
        return f"{name} has ALiBi positions"
    for key in _STATE_KEYS:
        if getattr(text, key, None):
            return f"{name} has {key} in its config: not attention alone"
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    scalings = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for scaling in scalings:
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind in ("dynamic", "longrope"):
            return (
                f"{name} has {kind} rotary positions, which depend on the longest position in a row"
            )
    if getattr(text, "use_bidirectional_attention", None) not in (None, False):
        return f"{name} has bidirectional attention"
    return None


_STATE_KEYS = (
    *("ssm_cfg", "mamba_d_state", "mamba_d_conv", "ssm_state_size", "state_size", "conv_kernel"),
    *("conv_L_cache", "linear_num_key_heads", "attention_chunk_size", "lru_width", "rescale_every"),
)


def self_check(
    run: Callable[[Sequence[dict], bool], tuple[Tensor, int]],
    rows: Sequence[dict],
    num_layers: int,
    vocab_size: int,
    dtype: torch.dtype,
) -> str | None:
    """Prove on a loaded model that sharing changes nothing. None where it holds, else what failed.

    Args:
        run: (rows, shared) -> log-probs [3n] of the rows' responses, and how often an attention layer got
            the layout.
        rows: to try it on, see `check_rows`.
        num_layers: attention layers of the model.
        vocab_size: token ids to draw from.
        dtype: of the computation, which decides what rounding may do.
    """
    separate, _ = run(rows, False)
    shared, calls = run(rows, True)
    if calls != num_layers:
        return f"{calls} of {num_layers} attention layers got the layout"
    if not shared.isfinite().all():
        return "log-probs are not finite"
    tolerance = {torch.float64: 1e-8, torch.float32: 5e-3}.get(dtype, 1.0)
    difference = (shared - separate).abs().max().item()
    if difference > tolerance:
        return f"log-probs differ by {difference:.3g} nats from those of separate rows"
    # what one response says must not reach the others, nor the next example
    exact = {torch.float64: 1e-8, torch.float32: 1e-3}.get(dtype, 0.25)
    n = len(rows)
    for number, name in enumerate(("chosen_ids", "rejected_ids", "base_ids")):
        changed = [dict(row) for row in rows]
        changed[0][name] = [(token * 7 + 3) % vocab_size for token in rows[0][name]]
        moved = (run(changed, True)[0] - shared).abs()
        own = moved[number * n].item()
        moved[number * n] = 0
        if moved.max().item() > exact:
            return f"a change of one response moves another by {moved.max().item():.3g} nats"
        if own == 0:
            return "a change of a response doesn't move its own log-prob"
    return None


# tokens of a check's prompt that are affordable without and with a GPU
_LONGEST_CHECK = {False: 512, True: 8192}


def check_rows(config: Any, longest: int) -> list[dict[str, list[int]]]:
    """Random rows for `self_check`. Their prompts go beyond every window of the model, as far as that is affordable:
    what is wrong there is right in short rows.

    Args:
        config: of the text model.
        longest: most tokens of a prompt.
    """
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()

    windows = [
        value + 8
        for name, value in vars(config).items()
        if "window" in name and isinstance(value, int) and value + 8 <= longest
    ]
    lengths = ((max([72, *windows]), 5, 3, 6), (40, 2, 7, 4))
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "base_ids")
    return [dict(zip(names, map(ids, row), strict=True)) for row in lengths]
