"""Started by test_distributed.py in one or two processes: train, evaluate, write what was logged."""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import bapo_trainer
from safetensors.torch import load_file
from tiny import make_rows

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


def main(folder: Path, batch: int, accumulation: int, zero3: bool) -> None:
    deepspeed = {**ZERO3, **dict.fromkeys((*AUTO, "gradient_clipping"), "auto")}
    trainer = bapo_trainer(
        folder,
        rows=make_rows(16),
        eval_rows=make_rows(7, seed=1),  # an uneven last batch: one rank repeats a row
        bapo={"anchor_weight": 1.0},
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        ddp_backend="gloo",
        cache_dir=folder,
        **({"deepspeed": deepspeed} if zero3 else {}),
    )
    assert trainer.is_sharded == zero3
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        weights = load_file(folder / "out" / "adapter_model.safetensors")
        weights = {name: weight.sum().item() for name, weight in weights.items()}
        result = {"log": trainer.state.log_history, "eval": metrics, "weights": weights}
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] == ["zero3"])
