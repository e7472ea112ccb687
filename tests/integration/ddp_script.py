"""Started by test_distributed.py in one or two processes: train, evaluate, write what was logged.

ddp_script.py FOLDER '{"kind": "zero2", "batch": 1, ...}': settings are those of `main`.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from helpers import bapo_trainer, kept_prompts, lora_model, randomize_lora
from safetensors.torch import load_file
from tiny import make_rows
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from bapo_plugin.scoring.collator import SharedPrefixCollator

# Nothing stays gathered for longer than its module runs: a weight that is used too late is empty.
ZERO3 = {
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def settings_of(kind: str, state_dict_type: str) -> dict:
    """Arguments of the trainer; FSDP also reads the environment."""
    start = PartialState.__init__

    def pretend(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self._shared_state["device"] = torch.device("cpu")  # not cpu:0, where nothing can be loaded
        # accelerate shards where it sees GPUs only
        if kind == "fsdp2" and self._shared_state["distributed_type"] != DistributedType.FSDP:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = pretend
    if kind == "fsdp2":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        layers = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        layers["transformer_layer_cls_to_wrap"] = ["LlamaDecoderLayer"]
        fsdp = {"fsdp_version": 2, "reshard_after_forward": True, **layers}
        return {
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": {**fsdp, "state_dict_type": state_dict_type},
        }
    if kind.startswith("zero"):
        stage = int(kind[-1])
        config = ZERO3 if stage == 3 else {**ZERO3, "zero_optimization": {"stage": stage}}
        return {"deepspeed": {**config, **dict.fromkeys((*AUTO, "gradient_clipping"), "auto")}}
    return {}


class Steps(TrainerCallback):
    """A pause after each step, and a death at one."""

    def __init__(self, die_at: int | None, pause: float):
        self._die_at, self._pause = die_at, pause

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(self._pause)
        if state.global_step == self._die_at:
            os._exit(9)


def main(
    folder: Path,
    kind: str = "ddp",
    batch: int = 4,
    accumulation: int = 1,
    rows: int = 16,
    tokens: int | None = None,
    continued: bool = False,
    retention: str | int | None = None,
    resume: bool = False,
    die_at: int | None = None,
    die_on: int = 0,
    pause: float = 0.0,
    state_dict_type: str = "FULL_STATE_DICT",
    anchor: dict | None = None,
    keep: int | None = None,
    bf16: bool = False,
) -> None:
    bapo = {"anchor_weight": 1.0, "shared_prefix": "require", "tokens_per_batch": tokens}
    bapo |= anchor or {}
    if keep:
        bapo["keep"] = {"prompts": "asked.txt", "weight": 0.5, "per_step": keep}
    if retention is not None:
        bapo["retention"] = {"prompts": retention, "every": 2, "max_new_tokens": 5}
    model = None
    if continued:  # an adapter that has learned something goes on; its copy is the reference
        torch.manual_seed(7)
        model = lora_model()
        randomize_lora(model, std=0.1)
    trainer = bapo_trainer(
        folder,
        model=model,
        rows=make_rows(rows),
        eval_rows=make_rows(7, seed=1),  # an uneven last batch: one rank repeats a row
        bapo=bapo,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        bf16=bf16,
        ddp_backend="gloo" if "RANK" in os.environ else None,
        cache_dir=folder / "cache",
        keep_dataset=kept_prompts() if keep else None,
        save_strategy="steps",
        save_steps=1,
        **settings_of(kind, state_dict_type),
    )
    dies = int(os.environ.get("RANK", 0)) == die_on
    trainer.add_callback(Steps(die_at if dies else None, pause))
    assert trainer.is_sharded == (kind in ("zero3", "fsdp2"))
    trainer.train(resume_from_checkpoint=resume or None)
    if kind == "fsdp2":
        assert all(isinstance(p, DTensor) for p in trainer.model_wrapped.parameters())
    if kind == "zero3":
        assert all(p.numel() == 0 for p in trainer.model.parameters())
    assert type(trainer.layout) is SharedPrefixCollator and trainer.reference.precomputed
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        path = folder / "out" / "adapter_model.safetensors"  # not with a sharded state
        weights = load_file(path) if path.exists() else {}
        weights = {name: weight.tolist() for name, weight in weights.items()}
        result = {"log": trainer.state.log_history, "eval": metrics, "weights": weights}
        result["steps"] = trainer.state.global_step
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
