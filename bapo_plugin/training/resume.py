"""Going on from a checkpoint: only with what it was trained with, and not beyond the end of a run.

The weights of a checkpoint are those of its settings. A run that went on with other ones would record what it wasn't
trained with.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from axolotl.utils.logging import get_logger
from datasets import Dataset
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from bapo_plugin import base_weights
from bapo_plugin.rows.columns import IDS
from bapo_plugin.runs import RECORD, is_finished, log_digest, read_if_sound, weights_digest
from bapo_plugin.training.checkpoints import whole_checkpoint
from bapo_plugin.training.outputs import tell_what_is_overwritten

if TYPE_CHECKING:
    from bapo_plugin.training.trainer import BAPOTrainer

LOG = get_logger("axolotl." + __name__)

# settings of the `bapo:` block that change how something is computed or watched, or what the rows' digest holds
_FREE = {
    *("kernel", "shared_prefix", "tokens_per_batch", "precompute_ref_log_probs", "retention"),
    *("anchors", "field_base", "entries", "on_faulty", "on_non_finite", "special_tokens_in_words"),
}
# key of the YAML -> attribute of PEFT's configuration
_ADAPTER = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_trainable_token_indices": "trainable_token_indices",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "peft_init_lora_weights": "init_lora_weights",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}
# what names files -> key of the digest of what is in them, which decides where it is known
_BY_DIGEST = {"base_model": "base_weights", "lora_model_dir": "lora_weights"}


def begin(trainer: "BAPOTrainer", wanted: str | bool | None) -> str | bool | None:
    """What training is to go on from, looked at before anything is written.

    Args:
        trainer: with all that it will train.
        wanted: see `whole_checkpoint`.

    Raises:
        ValueError: the checkpoint was trained with something else, or lies beyond the end of this run.
    """
    folder = trainer.args.output_dir
    checkpoint = whole_checkpoint(folder, wanted)
    is_first = trainer.is_world_process_zero()
    if is_first or checkpoint:
        trainer.record.trained = trained_with(trainer)
    if is_first:
        tell_what_is_overwritten(folder, goes_on=bool(checkpoint))
    if isinstance(checkpoint, str) and Path(checkpoint).is_dir():
        _refuse_changes(trainer, Path(checkpoint))
        _refuse_beyond_the_end(trainer, Path(checkpoint))
    return checkpoint


def is_done(trainer: "BAPOTrainer", checkpoint: str | bool | None) -> bool:
    """Whether a checkpoint has all steps that this run asks for; transformers would train one more."""
    if not isinstance(checkpoint, str) or not Path(checkpoint).is_dir():
        return False
    return _step(Path(checkpoint)) >= planned_steps(trainer)


def is_saved(trainer: "BAPOTrainer", checkpoint: str | bool | None) -> bool:
    """Whether such a run has saved what it trained too; says so."""
    folder = Path(trainer.args.output_dir)
    if not is_done(trainer, checkpoint) or not is_finished(folder):
        return False
    if not any(folder.glob("*.safetensors")):
        return False
    if trainer.is_world_process_zero():
        LOG.warning(
            f"The run in {folder} has finished already: {Path(checkpoint).name} is there, and {_plan(trainer)} asks for no "
            "more. Nothing was trained or changed. Raise that to train on; to train anew name another output_dir, or set "
            "`auto_resume_from_checkpoints: false`"
        )
    return True


def finish(trainer: "BAPOTrainer", checkpoint: str) -> TrainOutput:
    """Load what is trained to its end; complete the record of a run that was killed before it had saved.

    Raises:
        ValueError: that needs weights that are sharded only in training.
    """
    if trainer.is_sharded:
        raise ValueError(
            f"{checkpoint} has all steps of {_plan(trainer)}, and where weights are sharded nothing can be saved without "
            "training. It holds what was trained; raise that to train on"
        )
    is_recorded = is_saved(trainer, checkpoint)
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(best if best and Path(best).is_dir() else checkpoint)
    state.is_world_process_zero = trainer.is_world_process_zero()
    state.is_local_process_zero = trainer.is_local_process_zero()
    trainer.state = state
    if not is_recorded:
        trainer.record.on_train_begin(trainer.args, state, trainer.control)
        trainer.record.on_train_end(trainer.args, state, trainer.control)
    losses = [entry["train_loss"] for entry in state.log_history if "train_loss" in entry]
    return TrainOutput(state.global_step, losses[-1] if losses else math.nan, {})


def planned_steps(trainer: "BAPOTrainer") -> int:
    """Optimiser steps of the whole run, as transformers counts them."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    at_once = args.per_device_train_batch_size * args.world_size
    whole, rest = divmod(len(trainer.train_dataset), at_once)
    batches = whole + (rest > 0 and not args.dataloader_drop_last)
    a_step = args.gradient_accumulation_steps
    return math.ceil(args.num_train_epochs * max(math.ceil(batches / a_step), 1))


def trained_with(trainer: "BAPOTrainer") -> dict[str, Any]:
    """What the weights depend on, in keys of the YAML, for the record; learning rate, batches and length may change when
    training goes on."""
    model, args = trainer.model, trainer.args
    config = model.config
    name = str(config.name_or_path or "")
    revision = trainer.record.config.get("revision_of_model")
    adapters = getattr(model, "peft_config", {}) if is_peft_model(model) else {}
    found: dict[str, Any] = {
        "base_model": str(Path(name).resolve()) if name and Path(name).is_dir() else name,
        "base_weights": base_weights.digest(base_weights.folder_of(name, revision)),
        "load_in_4bit": bool(getattr(model, "is_loaded_in_4bit", False)),
        "load_in_8bit": bool(getattr(model, "is_loaded_in_8bit", False)),
        "adapter": None,
        "rl_beta": trainer.beta,
        "dpo_loss_type": trainer.loss_types,
        "loss_weights": trainer.loss_weights,
        "dpo_label_smoothing": args.label_smoothing,
    }
    if adapters:
        (active,) = model.active_adapters
        adapter = adapters[active]
        start = getattr(args, "bapo_adapter_dir", None)
        found["adapter"] = str(getattr(adapter.peft_type, "value", adapter.peft_type)).lower()
        found["lora_model_dir"] = start and str(Path(start).resolve())
        found["lora_weights"] = start and weights_digest(Path(start))
        found |= {key: getattr(adapter, part, None) for key, part in _ADAPTER.items()}
    block = trainer.bapo.model_dump(exclude={*_FREE, "keep"})
    found |= {f"bapo.{key}": value for key, value in block.items()}
    # its prompts are those of the digest below
    keep = trainer.bapo.keep
    found["bapo.keep"] = keep and keep.model_dump(exclude={"prompts"})
    found["datasets (training rows)"] = _described(trainer.train_dataset, IDS)
    kept = trainer.keeper.rows if trainer.keeper is not None else None
    found["bapo.keep.prompts (with answers)"] = kept and _described(kept, kept.column_names)
    return json.loads(json.dumps(found, default=_plain))  # as the record gives it back


def _refuse_changes(trainer: "BAPOTrainer", checkpoint: Path) -> None:
    record = checkpoint.resolve().parent / RECORD
    content = read_if_sound(record) or {}
    if log_digest(checkpoint / TRAINER_STATE_NAME) in (content.get("logs_of_others") or []):
        raise ValueError(
            f"{checkpoint} is of an earlier run in this folder, and not of the one that {record.name} there tells of; remove it, or "
            "name another output_dir"
        )
    before = content.get("trained") or {}
    if not before:
        if trainer.is_world_process_zero():
            LOG.warning(
                f"{record} doesn't say what {checkpoint.name} was trained with: whether this run trains the same isn't known"
            )
        return
    now, changed = trainer.record.trained, []
    for key in now.keys() & before.keys() - set(_BY_DIGEST.values()):
        was, its = before[key], now[key]
        if mark := _BY_DIGEST.get(key):
            weights = before.get(mark), now.get(mark)
            if None not in weights:  # a folder that moved has the same
                if weights[0] != weights[1]:
                    texts = [
                        f"{name!r} (weights {w})"
                        for name, w in zip((was, its), weights, strict=True)
                    ]
                    changed.append(f"{key} was {texts[0]} and is {texts[1]}")
                continue
        if was != its:
            changed.append(f"{key} was {was!r} and is {its!r}")
    if changed:
        changed.sort()
        raise ValueError(
            f"{checkpoint} was trained with other settings, and going on from it would record what it wasn't trained with: "
            f"{'; '.join(changed)}. Set that back, name another output_dir, or train from the start "
            "(`auto_resume_from_checkpoints: false`, and no resume_from_checkpoint)"
        )


def _refuse_beyond_the_end(trainer: "BAPOTrainer", checkpoint: Path) -> None:
    """A checkpoint that has more steps than are asked for is no end of this run."""
    folder = Path(trainer.args.output_dir)
    planned, step = planned_steps(trainer), _step(checkpoint)
    epochs, wanted = _state(checkpoint).get("epoch"), trainer.args.num_train_epochs
    if step > planned and not _own_max_steps(trainer) and epochs and epochs < wanted - 1e-3:
        raise ValueError(
            f"{checkpoint} has {step} steps and {epochs:g} epochs of the {wanted:g} that num_epochs asks for, and this run has "
            f"{planned} steps in all, since more rows are in each: steps can't be told from epochs. Set micro_batch_size and "
            "gradient_accumulation_steps back, or train from the start in another output_dir"
        )
    is_here = checkpoint.resolve().parent == folder.resolve()
    if step < planned or (is_here and (step == planned or is_finished(folder))):
        return
    raise ValueError(
        f"resume_from_checkpoint: {checkpoint} is at step {step}, and {_plan(trainer)} asks for no more: there is nothing to train. Raise that, "
        "or train from the start in another output_dir"
    )


def _plan(trainer: "BAPOTrainer") -> str:
    if steps := _own_max_steps(trainer):
        return f"max_steps: {steps}"
    return f"num_epochs: {trainer.args.num_train_epochs:g} ({planned_steps(trainer)} steps)"


def _own_max_steps(trainer: "BAPOTrainer") -> int | None:
    """Those of the user: axolotl makes some of the epochs."""
    steps = trainer.record.config.get("max_steps")
    return steps if isinstance(steps, int) and steps > 0 else None


def _step(checkpoint: Path) -> int:
    return int(_state(checkpoint).get("global_step") or 0)


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))


def _described(rows: Dataset, columns: Any) -> str:
    """Number and digest of rows' token ids."""
    digest = hashlib.blake2b(digest_size=8)
    for part in rows.select_columns(list(columns)).with_format("arrow").iter(batch_size=1000):
        for name in columns:
            column = part.column(name).combine_chunks()
            lengths = column.value_lengths().to_numpy(zero_copy_only=False)
            values = column.flatten().to_numpy(zero_copy_only=False)
            digest.update(lengths.astype("<i8").tobytes() + values.astype("<i8").tobytes())
    return f"{len(rows)} rows, {digest.hexdigest()}"


def _plain(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)
