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
from tiny import make_rows


def main(folder: Path, batch: int, accumulation: int) -> None:
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
    )
    trainer.train()
    metrics = trainer.evaluate()
    weights = {n: p.sum().item() for n, p in trainer.model.named_parameters() if p.requires_grad}
    if trainer.is_world_process_zero():
        result = {"log": trainer.state.log_history, "eval": metrics, "weights": weights}
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
