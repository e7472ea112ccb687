"""What must hold between the `bapo:` block and the rest of the YAML.

`check_config` refuses what can't work together, with the line that mends it, before axolotl
validates the rest.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bapo_plugin.blocks import can_be_path
from bapo_plugin.config import TRAINER_CLS, BAPOConfig, parse_block
from bapo_plugin.loss import PREFERENCE_LOSSES, SMOOTHED_LOSSES
from bapo_plugin.rows.entries import check_entry
from bapo_plugin.runs import refuse_pickled

# ways to initialise LoRA that leave the weights below it as they are
_INITS = ("gaussian", "eva", "orthogonal")
# DPO settings that can't be honoured when only response tokens reach the vocabulary projection, or
# that ask for another loss. key -> why and what to do instead
_REFUSED = {
    "dpo_use_weighting": "WPO weights need the logits of every token, which BAPO never forms; remove the line",
    "dpo_use_liger_kernel": "BAPO has a log-prob kernel of its own; remove the line",
    "dpo_padding_free": "TRL ignores it and BAPO lays out its own batches; remove the line",
    "dpo_ld_alpha": "length-desensitised log-probs have no anchored form; remove the line",
    "dpo_norm_loss": "use `dpo_loss_type: [sigmoid_norm]` or [ipo], which divide by the length",
    "rpo_alpha": "axolotl ignores it; to keep likelihood up use the anchor (bapo.anchor_weight)",
    "sample_packing": "a preference row can't be packed with others by axolotl's packer; remove the line",
    "eval_sample_packing": "a preference row can't be packed with others by axolotl's packer; remove the line",
    "streaming": "rows must be checked and tokenised before training; remove the line",
    "rl_adapter_ref_model": "the model with its adapter switched off is the reference; remove the line",
    "push_dataset_to_hub": "rows with base responses are kept here only; write them with `bapo anchors CONFIG --output FILE` "
    "and push that file, or remove the line",
    "num_dataset_shards_to_save": "prepared rows are kept in files of the size that `datasets` chooses; remove the line",
    "torch_compile": "compiling the model is not supported by this version; remove the line",
}


def check_config(cfg: Mapping[str, Any]) -> BAPOConfig:
    """Check the raw YAML of an `rl: bapo` run.

    Args:
        cfg: the YAML as a mapping, before axolotl validates it.

    Returns:
        The parsed `bapo:` block.

    Raises:
        ValueError: one message that lists every contradiction: key, value, why, remedy.
    """
    problems: list[str] = []
    bapo = BAPOConfig()
    try:
        bapo = parse_block(cfg.get("bapo"))
    except ValueError as error:
        problems.append(str(error))

    trl = _block(cfg, "trl", problems)
    precompute = cfg.get("precompute_ref_log_probs")
    if precompute not in (None, True, False):
        problems.append(f"precompute_ref_log_probs: {precompute!r} must be true or false")
        precompute = None
    if precompute is not None:
        if bapo.precompute_ref_log_probs not in (None, precompute):
            problems.append(
                f"precompute_ref_log_probs: {precompute} and bapo.precompute_ref_log_probs: "
                f"{bapo.precompute_ref_log_probs} contradict each other; remove one of the two lines"
            )
        bapo.precompute_ref_log_probs = precompute
    if bapo.precompute_ref_log_probs and trl.get("sync_ref_model"):
        problems.append(
            "precompute_ref_log_probs: true and trl.sync_ref_model: true contradict each other: log-probs of a "
            "reference that changes can't be computed in advance; remove one of the two lines"
        )
    elif trl.get("sync_ref_model"):
        problems.append(
            "trl.sync_ref_model: true moves the reference, but BAPO anchors to what the model answered before "
            "training; remove the line"
        )
    for key, why in _REFUSED.items():
        if cfg.get(key):
            problems.append(f"{key}: {cfg[key]} does not work with rl: bapo: {why}")
    problems += _check_preference_loss(cfg, trl)
    for key in ("context_parallel_size", "sequence_parallel_degree"):
        value = cfg.get(key)
        if value is not None and not _number(value) <= 1:
            problems.append(
                f"{key}: {value!r} would split a response over GPUs; remove the line"
                if _number(value) > 1
                else f"{key}: {value!r} must be a number; remove the line"
            )
    problems += _check_anchor(cfg, bapo)
    problems += _check_adapter(cfg, _block(cfg, "peft", problems))
    if cfg.get("trainer_cls") not in (None, TRAINER_CLS):
        problems.append(
            f"trainer_cls: {cfg['trainer_cls']} can't be combined with rl: bapo, which is a trainer of its "
            "own; remove one of the two"
        )
    if _block(cfg, "accelerator_config", problems).get("dispatch_batches"):
        problems.append(
            "accelerator_config.dispatch_batches: true would cut batches between the responses of a row; "
            "remove the line"
        )
    if not 0 < _number(cfg.get("num_epochs") or 1) < math.inf:
        problems.append(f"num_epochs: {cfg['num_epochs']!r} must be a number above 0")
    if not 0 <= _number(cfg.get("seed") or 0) < 2**32:
        problems.append(f"seed: {cfg['seed']!r} must be a whole number from 0 to {2**32 - 1}")
    for key in ("dataset_prepared_path", "output_dir", "lora_model_dir"):
        value = cfg.get(key)
        if isinstance(value, str) and not can_be_path(value):
            problems.append(f"{key}: {value[:40]!r} can't be the name of a folder; mend the path")
    if not 0 <= _number(cfg.get("val_set_size") or 0) < math.inf:
        problems.append(
            f"val_set_size: {cfg['val_set_size']!r} must be a share of the rows, such as 0.05, or a number of them"
        )
    if not cfg.get("datasets"):
        problems.append("datasets: is empty; name at least one preference data set")
    for split in ("datasets", "test_datasets"):
        entries = cfg.get(split) or []
        if isinstance(entries, (str, Mapping)) or not isinstance(entries, Sequence):
            problems.append(
                f"{split}: {entries!r} must be a list of blocks with `path:` and `type:`"
            )
            continue
        for i, entry in enumerate(entries):
            problems += check_entry(f"{split}[{i}]", entry)
    if problems:
        raise ValueError("rl: bapo can't run with this configuration:\n- " + "\n- ".join(problems))
    return bapo


def _check_anchor(cfg: Mapping[str, Any], bapo: BAPOConfig) -> list[str]:
    problems = []
    wanted = "bapo.anchor_weight: auto takes bapo.anchor_loss: kl, which"
    if bapo.anchor_weight != "auto" or "anchor_loss" in (cfg.get("bapo") or {}):
        wanted = "bapo.anchor_loss: kl"
    if not cfg.get("adapter"):
        if bapo.anchor_loss == "kl":
            problems.append(
                f"{wanted} compares distributions under one frozen output head, which needs an adapter; set `adapter:`, or "
                "bapo.anchor_loss: hinge"
            )
        if bapo.keep is not None:
            problems.append(
                "bapo.keep compares distributions under one frozen output head, which needs an adapter; set `adapter:`, or "
                "remove the block"
            )
    if bapo.anchor_weight == "auto" and "ipo" in str(cfg.get("dpo_loss_type")):
        problems.append(
            "bapo.anchor_weight: auto doesn't work with dpo_loss_type: ipo, whose gradient is of another size; set a number"
        )
    return problems


def _check_adapter(cfg: Mapping[str, Any], peft: Mapping[str, Any]) -> list[str]:
    problems = []
    adapter = cfg.get("adapter")
    if not adapter and (cfg.get("load_in_4bit") or cfg.get("load_in_8bit")):
        key, remedy = (
            ("load_in_4bit", "qlora") if cfg.get("load_in_4bit") else ("load_in_8bit", "lora")
        )
        problems.append(
            f"{key}: true without an adapter: quantised weights can't be trained; set `adapter: {remedy}`"
        )
    if adapter == "llama-adapter":
        problems.append(
            "adapter: llama-adapter can't be switched off for the reference; use lora or qlora"
        )
    try:
        refuse_pickled(str(cfg.get("lora_model_dir") or "."))
    except ValueError as error:
        problems.append(f"lora_model_dir: {error}")
    init = cfg.get("peft_init_lora_weights")
    if not isinstance(init, str | bool | None) or init not in (None, True, False, *_INITS):
        problems.append(
            f"peft_init_lora_weights: {init} changes the weights below the adapter, so that the model with "
            f"its adapter off is no longer the model you started from; use true, {', '.join(_INITS)}"
        )
    if peft.get("loftq_config") or cfg.get("loftq_config"):
        problems.append(
            "peft.loftq_config changes the weights below the adapter, so that the model with its adapter "
            "off is no longer the model you started from; remove the block"
        )
    return problems


def _check_preference_loss(cfg: Mapping[str, Any], trl: Mapping[str, Any]) -> list[str]:
    problems = []
    betas = {"rl_beta": cfg.get("rl_beta"), "trl.beta": trl.get("beta")}
    betas = {key: value for key, value in betas.items() if value is not None}
    for key, value in betas.items():
        if not _number(value) > 0:
            problems.append(f"{key}: {value!r} must be a number above 0; the usual value is 0.1")
    if len(set(map(_number, betas.values()))) > 1:
        problems.append(
            f"rl_beta: {betas['rl_beta']} and trl.beta: {betas['trl.beta']} contradict each other; remove one of the two lines"
        )
    loss_types = cfg.get("dpo_loss_type") or ["sigmoid"]
    loss_types = [loss_types] if isinstance(loss_types, str) else loss_types
    if not isinstance(loss_types, list | tuple) or any(not isinstance(n, str) for n in loss_types):
        problems.append(
            f"dpo_loss_type: {loss_types!r} must be a name or a list of names; possible are "
            f"{', '.join(PREFERENCE_LOSSES)}"
        )
        loss_types = []
    for name in loss_types:
        if name not in PREFERENCE_LOSSES:
            problems.append(
                f"dpo_loss_type: {name!r} is not a function of the margin between chosen and rejected; "
                f"possible are {', '.join(PREFERENCE_LOSSES)}"
            )
    weights = cfg.get("dpo_loss_weights")
    if weights is not None and (
        not isinstance(weights, list | tuple)
        or len(weights) != len(loss_types)
        or any(math.isnan(_number(weight)) for weight in weights)
    ):
        problems.append(
            f"dpo_loss_weights: {weights} must have one number for each of the {len(loss_types)} losses in "
            f"dpo_loss_type: {loss_types}"
        )
    smoothing = cfg.get("dpo_label_smoothing") or 0
    if not 0 <= _number(smoothing) < 0.5:
        problems.append(f"dpo_label_smoothing: {smoothing!r} must be a number in [0, 0.5)")
    elif _number(smoothing):
        for name in set(loss_types) & (set(PREFERENCE_LOSSES) - set(SMOOTHED_LOSSES)):
            problems.append(
                f"dpo_label_smoothing: {smoothing} has no meaning for dpo_loss_type {name!r}; remove it, or use "
                f"one of {', '.join(SMOOTHED_LOSSES)}"
            )
    elif "exo_pair" in loss_types:
        problems.append(
            "dpo_loss_type: exo_pair needs `dpo_label_smoothing: 0.001` (or another > 0)"
        )
    return problems


def _block(cfg: Mapping[str, Any], key: str, problems: list[str]) -> Mapping[str, Any]:
    """A block of the YAML; where something else stands there, that is a problem, and an empty one is given."""
    value = cfg.get(key)
    if value is None or isinstance(value, Mapping):
        return value or {}
    problems.append(f"{key}: {value!r} must be a block of settings; mend or remove it")
    return {}


def _number(value: Any) -> float:
    """The value as axolotl will take it (YAML reads 5e-2 as a string); NaN where it is no number."""
    if isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
