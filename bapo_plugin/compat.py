"""Every difference between supported versions and faults of theirs to work around, nothing else.

`TOUCHED` names all that others keep private or deep inside and we use or override. A test resolves each name, another finds
what is missing in the list. With versions that were not tested the names are resolved when this file is imported.
"""

import dataclasses
import gc
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from bapo_plugin.versions import REMEDY, found, untested

try:
    # sends a call through the wrapper's forward (DDP, FSDP, DeepSpeed), so that gradient synchronisation and
    # parameter gathering happen
    from trl.models.utils import _ForwardRedirection as ForwardRedirection
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer.utils import use_adapter
except ImportError:
    # a bare machine with a GPU, for benchmarks/GPU.md: models there are not wrapped. Where TRL is there and has moved
    # a name, the end of this file says so
    disable_gradient_checkpointing = use_adapter = None

    class ForwardRedirection:
        def __call__(self, wrapper: Any, model: Any, function: Callable, **inputs: Any) -> Any:
            if wrapper is not model:
                raise ImportError("a model that is wrapped (DDP, FSDP, DeepSpeed) needs TRL")
            return function(**inputs)


__all__ = [
    "TOUCHED",
    "ForwardRedirection",
    "disable_gradient_checkpointing",
    "garbage_of_training",
    "keep_4bit_trainable_on_cpu",
    "moved",
    "only_reading",
    "refuse_moved",
    "route_evaluate_to_plugins",
    "use_adapter",
]

_TRAINER = "axolotl.core.trainers.dpo.trainer.AxolotlDPOTrainer"
_PLUGIN = "axolotl.integrations.base.BasePlugin"
_CALLBACK = "transformers.TrainerCallback"
#: name -> what becomes of it here. Attributes that only objects have are found in the source of their class
TOUCHED = {
    # taken by TRL, transformers and axolotl from the trainer: `BAPOTrainer` has its own
    f"{_TRAINER}._prepare_dataset": "training/trainer.py overrides to tokenise rows with a base response",
    f"{_TRAINER}._set_signature_columns_if_needed": "training/trainer.py overrides to keep the columns of a base response",
    f"{_TRAINER}._signature_columns": "training/trainer.py fills in",
    f"{_TRAINER}._tokenizer": "training/trainer.py tokenises rows with",
    f"{_TRAINER}._load_from_checkpoint": "training/trainer.py overrides to load the adapter of a checkpoint",
    f"{_TRAINER}._get_num_items_in_batch": "training/trainer.py overrides to weigh gradients by rows",
    f"{_TRAINER}._save_checkpoint": "training/trainer.py overrides to tell checkpoints that are whole",
    f"{_TRAINER}._prepare_inputs": "training/trainer.py moves a batch to the device with",
    f"{_TRAINER}._name": "training/trainer.py overrides to name the method",
    f"{_TRAINER}._paper": "training/trainer.py overrides to name the paper, and training/outputs.py cites it",
    f"{_TRAINER}._tag_names": "training/trainer.py overrides to tag the model",
    f"{_TRAINER}.tag_names": "training/trainer.py overrides to tag the model",
    f"{_TRAINER}.training_step": "training/trainer.py overrides to take a micro-batch in packs",
    f"{_TRAINER}.compute_loss": "training/trainer.py overrides with the method's loss",
    f"{_TRAINER}.prediction_step": "training/trainer.py overrides to evaluate",
    f"{_TRAINER}.evaluation_loop": "training/trainer.py overrides to add metrics",
    f"{_TRAINER}.get_train_dataloader": "training/trainer.py overrides to score the reference first",
    f"{_TRAINER}.get_eval_dataloader": "training/trainer.py overrides to score the reference first",
    f"{_TRAINER}.train": "training/trainer.py overrides to choose the checkpoint",
    f"{_TRAINER}.log": "training/trainer.py overrides to add metrics",
    f"{_TRAINER}.create_model_card": "training/trainer.py overrides to write a card of its own",
    # called on callbacks and on the plugin
    f"{_CALLBACK}.on_train_begin": "training/ implements",
    f"{_CALLBACK}.on_train_end": "training/ implements",
    f"{_CALLBACK}.on_log": "training/ implements",
    f"{_CALLBACK}.on_save": "training/ implements",
    f"{_CALLBACK}.on_step_end": "training/ implements",
    f"{_CALLBACK}.on_evaluate": "training/ implements",
    f"{_CALLBACK}.on_pre_optimizer_step": "training/ implements",
    "transformers.trainer_callback.ExportableState.state": "training/weight.py implements",
    f"{_PLUGIN}.register": "plugin.py implements",
    f"{_PLUGIN}.get_input_args": "plugin.py implements",
    f"{_PLUGIN}.get_training_args_mixin": "plugin.py implements",
    f"{_PLUGIN}.get_training_args": "plugin.py implements",
    f"{_PLUGIN}.post_trainer_create": "plugin.py implements",
    f"{_PLUGIN}.load_datasets": "plugin.py implements",
    # replaced
    "axolotl.common.datasets.prepare_preference_datasets": "compat.py replaces, for `axolotl evaluate`",
    "axolotl.cli.config.prepare_debug_log": "compat.py replaces while our commands read a configuration",
    "axolotl.cli.config.prepare_optim_env": "compat.py replaces while our commands read a configuration",
    "bitsandbytes.nn.Linear4bit.support_avx512bf16_for_cpu": "compat.py switches off, which repacks weights on a CPU",
    "transformers.PreTrainedModel.save_pretrained": "training/outputs.py replaces on a model below an adapter",
    "accelerate.utils.FullyShardedDataParallelPlugin.mixed_precision_policy": "compat.py keeps log-probs in fp32 with",
    # taken
    "trl.models.utils._ForwardRedirection": "scoring/forward.py calls wrapped models through",
    "trl.models.utils.disable_gradient_checkpointing": "scoring/ scores without checkpointing with",
    "trl.trainer.utils.use_adapter": "scoring/ takes the reference's adapter with",
    "accelerate.state.GradientState._set_sync_gradients": "training/packs.py holds the exchange of gradients back with",
    "datasets.Dataset._indices": "rows/table.py knows by whether rows were left out of a table",
    "datasets.Dataset._fingerprint": "training/reference.py knows rows again by",
    "peft.PeftModel.get_base_model": "training/outputs.py reaches the model below an adapter by",
    "peft.helpers.rescale_adapter_scale": "evaluation/subject.py scales adapters with",
    "peft.tuners.lora.layer.Linear": "planning/ rehearses LoRA layers with",
    "peft.tuners.tuners_utils.BaseTunerLayer": "training/outputs.py tells adapters by",
    "transformers.PreTrainedModel._can_set_attn_implementation": "scoring/layouts.py asks whether a prompt can be shared",
    "transformers.PreTrainedModel._supports_sdpa": "planning/rehearsal.py chooses attention by",
    "transformers.PretrainedConfig._attn_implementation": "scoring/ knows the attention by",
    "transformers.PretrainedConfig._experts_implementation": "scoring/reference.py has in the key of its cache",
    "transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS": "scoring/shared_prefix.py puts a mask over",
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS": "scoring/shared_prefix.py puts a layer over",
    "transformers.trainer.TRAINER_STATE_NAME": "training/checkpoints.py tells whole checkpoints by",
    "transformers.trainer_utils.TrainOutput": "training/resume.py says in that nothing was to be trained",
    "transformers.trainer_utils.PREFIX_CHECKPOINT_DIR": "training/checkpoints.py finds checkpoints by",
    "transformers.utils.hub.extract_commit_hash": "anchors/provenance.py names a model's revision by",
    "axolotl.cli.config.load_cfg": "commands read a configuration with",
    "axolotl.common.const.DEFAULT_DATASET_PREPARED_PATH": "preparation.py keeps rows in",
    "axolotl.common.datasets.TrainDatasetMeta": "prepare.py hands rows over in",
    "axolotl.integrations.config.merge_input_args": "`bapo check` knows the keys of a YAML by",
    "axolotl.loaders.ModelLoader": "models.py loads models with",
    "axolotl.loaders.load_tokenizer": "prepare.py loads tokenizers with",
    "axolotl.loaders.utils.load_model_config": "models.py makes an empty model with",
    "axolotl.prompt_strategies.dpo.load": "opening.py loads prompt strategies with",
    "axolotl.utils.chat_templates.get_chat_template_from_config": "opening.py chooses the chat template with",
    "axolotl.utils.data.shared.datasets_with_name_generator": "rows/sources.py opens data sets with",
    "axolotl.utils.data.shared.load_dataset_with_config": "rows/sources.py opens data sets with",
    "axolotl.utils.data.shared.merge_datasets": "preparation.py merges data sets with",
    "axolotl.utils.data.utils.deduplicate_and_log_datasets": "prepare.py drops repeated rows with",
    "axolotl.utils.dict.DictDefault": "configurations are",
    "axolotl.utils.logging.get_logger": "everything logs with",
    "axolotl.utils.schemas.datasets": "rows/entries.py knows the keys of a data set by",
    # of others
    "tqdm.std.tqdm._instances": "last_word.py closes progress bars by",
    "torch.nn.Module._parameters": "planning/rehearsal.py fills with fake tensors",
    "torch.nn.Module._buffers": "planning/rehearsal.py fills with fake tensors",
    "torch._subclasses.fake_tensor.DataDependentOutputException": "planning/rehearsal.py expects",
    "torch._subclasses.fake_tensor.FakeTensorMode": "planning/rehearsal.py rehearses a step in",
    "torch.utils._python_dispatch._disable_current_modes": "planning/rehearsal.py looks at real tensors with",
    "torch.utils._python_dispatch.TorchDispatchMode": "planning/tracker.py counts memory in",
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass": "the kernels tell sharded weights by",
    "torch.utils._pytree.tree_iter": "planning/tracker.py walks results with",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported": "the kernels ask whether this CPU multiplies in bf16",
}  # fmt: skip


def moved(name: str) -> str | None:
    """What is to be said where one of `TOUCHED` isn't there any more; None where it is."""
    package = name.split(".")[0]
    if _is_there(name):
        return None
    return (
        f"{package} {found(package)} has no {name} any more, which bapo_plugin: {TOUCHED[name]}; see bapo_plugin/compat.py. "
        f"{REMEDY[0].upper()}{REMEDY[1:]}"
    )


def _is_there(name: str) -> bool:
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            holder = import_module(".".join(parts[:i]))
            break
        except ImportError:
            continue
    else:
        return False
    for part in parts[i:]:
        if hasattr(holder, part):
            holder = getattr(holder, part)
        else:
            return inspect.isclass(holder) and _is_in_source(holder, part)
    return True


def _is_in_source(kind: type, name: str) -> bool:
    """Whether objects of a class get an attribute: assigned to self, or a field of a dataclass."""
    pattern = re.compile(rf"\bself\.{name}\s*(:[^=]+)?=[^=]|^\s+{name}\s*:", re.MULTILINE)
    for base in kind.__mro__[:-1]:
        if pattern.search(_source(base)):
            return True
    return False


@cache
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def refuse_moved() -> None:
    """
    Raises:
        ValueError: names of `TOUCHED` that aren't there, one a line.
    """
    if gone := [
        said for name in TOUCHED if find_spec(name.split(".")[0]) and (said := moved(name))
    ]:
        raise ValueError("\n".join(gone))


def route_evaluate_to_plugins(
    is_ours: Callable[[Any], bool], prepare: Callable[[Any, Any], tuple[Any, Any]]
) -> None:
    """Let `axolotl evaluate` load rows as `train` and `preprocess` do.

    Those two ask plugins for the data sets; `evaluate` (0.19 to 0.21) doesn't. Configurations that
    are not ours pass through untouched.

    Args:
        is_ours: whether a configuration is.
        prepare: (configuration, tokenizer) -> training and held-out rows.
    """
    from axolotl.common import datasets

    original = datasets.prepare_preference_datasets
    if getattr(original, "_bapo", False):
        return

    @wraps(original)
    def prepare_preference_datasets(cfg, tokenizer):
        return prepare(cfg, tokenizer) if is_ours(cfg) else original(cfg, tokenizer)

    prepare_preference_datasets._bapo = True
    datasets.prepare_preference_datasets = prepare_preference_datasets


@contextmanager
def only_reading() -> Iterator[None]:
    """Inside, axolotl's `load_cfg` validates and does nothing else: else it makes `output_dir`, deletes there the log of
    a run that may still be going on, and prepares this process for sharded weights."""
    from axolotl.cli import config

    names = ("prepare_debug_log", "prepare_optim_env")
    before = {name: getattr(config, name) for name in names}
    try:
        for name in names:
            setattr(config, name, lambda cfg: None)
        yield
    finally:
        for name, function in before.items():
            setattr(config, name, function)


@contextmanager
def garbage_of_training() -> Iterator[None]:
    """Inside, the garbage collector looks at what was made inside.

    axolotl's DPO trainer (0.19 to 0.21) collects after each micro-batch. That goes through all objects there are, a
    million and a half with its imports: a third of a second of a CPU each time, whatever the model's size.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def keep_4bit_trainable_on_cpu(model: Any) -> None:
    """Stop bitsandbytes from packing 4-bit weights for CPU inference.

    On a CPU with AVX512-BF16, bitsandbytes (0.50) repacks the weights of a 4-bit layer for good at
    its first forward in eval mode. Its kernel for packed weights has no backward, so after one
    evaluation every further training step would silently lose the gradient through that layer.

    Args:
        model: any module; layers on a GPU are left alone.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def keep_log_probs_in_fp32(accelerator: Any) -> None:
    """Stop FSDP 2 from rounding what a model returns.

    accelerate's mixed precision casts the results of a model to bf16, log-probs too: at −100 nats that is a step of
    half a nat. Without `output_dtype` layers still compute and return bf16.

    Args:
        accelerator: of a trainer, before it prepares its model.
    """
    if not accelerator.is_fsdp2:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)
        plugin.mixed_precision_policy = policy


if found("axolotl") and untested():
    refuse_moved()  # here, before anything runs without what it needs
