"""Started by test_reference.py: precompute slowly, so that the test can kill it at any moment."""

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

from helpers import bapo_trainer
from tiny import make_rows

from bapo_plugin.training.reference import Reference


def main(folder: Path, pause: float) -> None:
    compute, calls = Reference.live, []

    def slow(self, *args):
        calls.append(1)
        print("BATCH", flush=True)
        time.sleep(pause)
        return compute(self, *args)

    Reference.live = slow
    trainer = bapo_trainer(
        folder, rows=make_rows(40), cache_dir=folder, per_device_eval_batch_size=2
    )
    print("START", flush=True)
    trainer.get_train_dataloader()
    print("BATCHES", len(calls), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
