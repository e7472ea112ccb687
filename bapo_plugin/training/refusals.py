"""Arguments that would give another training than the one documented here."""

from pathlib import Path
from typing import Any

from bapo_plugin.blocks import RetentionConfig
from bapo_plugin.config import BAPOConfig
from bapo_plugin.loss import PREFERENCE_LOSSES
from bapo_plugin.runs import check_adapter, has_adapter


def refuse_arguments(args: Any, bapo: BAPOConfig) -> None:
    """Settings of TRL that would give another loss than the one documented here."""
    if args is None:
        return
    unknown = [name for name in args.loss_type if name not in PREFERENCE_LOSSES]
    if unknown:
        raise ValueError(
            f"loss_type {unknown} is not a function of the margin of a pair; possible are "
            f"{', '.join(PREFERENCE_LOSSES)}"
        )
    if bapo.anchor_weight == "auto" and "ipo" in args.loss_type:
        raise ValueError(
            "anchor_weight: auto doesn't work with loss_type ipo, whose gradient is of another size; set a number"
        )
    refused = {
        "use_liger_kernel": bool(args.use_liger_kernel),
        "use_weighting": bool(args.use_weighting),
        "ld_alpha": args.ld_alpha is not None,
        "f_divergence_type": str(getattr(args.f_divergence_type, "value", args.f_divergence_type))
        != "reverse_kl",
        "sync_ref_model": bool(args.sync_ref_model),
        "torch_compile": bool(args.torch_compile),
        # a response keeps its beginning; and what is kept of the weight is restored by checkpoints anyway
        "truncation_mode": getattr(args, "truncation_mode", "keep_start") != "keep_start",
        "restore_callback_states_from_checkpoint": bool(
            args.restore_callback_states_from_checkpoint
        ),
        "train_sampling_strategy: group_by_length": getattr(args, "train_sampling_strategy", None)
        == "group_by_length",
    }
    if wrong := [name for name, is_set in refused.items() if is_set]:
        raise ValueError(f"BAPO does not work with {', '.join(wrong)}; leave it at its default")
    if args.precompute_ref_log_probs:
        raise ValueError(
            "args.precompute_ref_log_probs is TRL's own, without base responses; set "
            "BAPOConfig(precompute_ref_log_probs=True)"
        )
    if bapo.kernel == "triton" and args.device.type != "cuda":
        raise ValueError(
            f"bapo.kernel: triton needs an NVIDIA GPU, but training runs on {args.device.type}; set "
            "bapo.kernel: auto"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (DataParallel) would split a row's three responses; start "
            "one process a GPU (axolotl train does), or set CUDA_VISIBLE_DEVICES to one"
        )


def refuse_without_held_out(retention: RetentionConfig, has_held_out: bool) -> None:
    """`bapo.retention` may want rows that aren't there.

    Raises:
        ValueError: it does.
    """
    if isinstance(retention.prompts, int) and not has_held_out:
        raise ValueError(
            f"bapo.retention.prompts: {retention.prompts} takes held-out rows, but there are none; set "
            "val_set_size or test_datasets, or name a file with prompts"
        )


def refuse_unmeasured(retention: RetentionConfig, args: Any, steps: int) -> str | None:
    """What is to be said where a run is over before `bapo.retention` is measured for the first time.

    Args:
        retention: of the YAML.
        args: training arguments.
        steps: of the whole run.

    Raises:
        ValueError: `stop_below` would never act.
    """
    every, key = retention.every, "bapo.retention.every"
    if every is None and args.eval_strategy == "steps":
        every, key = args.eval_steps, "eval_steps"
        if every is not None and every < 1:  # a share of the run
            return None
    if every is None or every <= steps:
        return None
    said = f"{key}: {every:g} is more than the {steps} steps of this run, so that bapo.retention is never measured"
    if retention.stop_below is not None:
        raise ValueError(
            f"{said}, and stop_below: {retention.stop_below:g} never acts; set {key} to at most {steps}"
        )
    return f"{said}; set {key} to at most {steps}"


def adapter_to_evaluate(output_dir: str, start: str | None) -> str:
    """The adapter that a run has trained, else the one that it was to start from (`lora_model_dir`).

    Raises:
        ValueError: there is none.
    """
    folder = Path(output_dir)
    if has_adapter(folder):
        return output_dir
    if start is None:
        if (folder / "adapter_config.json").exists():  # axolotl writes it before training
            check_adapter(folder)
        raise ValueError(
            f"output_dir: {output_dir} has no trained adapter to evaluate; train first, or name one with "
            "`lora_model_dir:`"
        )
    return start
