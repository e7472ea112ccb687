"""A run of thousands of steps costs at its end what it costs at its beginning: memory, handles, threads, time."""

import gc
import os
import statistics
import sys
import threading
import time

import numpy as np
import psutil
import pytest
from helpers import bapo_trainer
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_rows, make_tokenizer
from transformers import TrainerCallback

STEPS = 2000


class Watch(TrainerCallback):
    """After each step: seconds, bytes in memory, open files, threads. What else happens between steps isn't timed."""

    def __init__(self):
        # made before, so that watching takes no memory of its own
        self.seconds, self.memory, self.files, self.threads = np.zeros((4, STEPS))
        self._process = psutil.Process()

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        step = state.global_step
        self.seconds[step] = time.perf_counter() - self._started
        self.memory[step] = self._process.memory_info().rss
        self.files[step] = len(os.listdir("/proc/self/fd"))
        self.threads[step] = threading.active_count()


def test_garbage_is_collected_from_what_training_made(tmp_path):
    """axolotl collects after each micro-batch, which takes longer than a small model's step with all that is imported."""
    trainer = bapo_trainer(tmp_path, rows=make_rows(8))
    frozen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            frozen.append((gc.get_freeze_count(), len(gc.get_objects())))

    trainer.add_callback(Look())
    trainer.train()
    assert gc.get_freeze_count() == 0
    assert all(kept > 10 * looked_at for kept, looked_at in frozen) and len(frozen) == 2


def size_of(log):
    """Bytes of what training has logged: dicts, keys and numbers."""
    parts = {id(e): e for entry in log for e in (entry, *entry, *entry.values())}
    return sum(map(sys.getsizeof, parts.values()))


@pytest.mark.slow
def test_two_thousand_steps_stay_as_they_are(tmp_path):
    small = make_model(vocab_size=len(make_tokenizer()), num_hidden_layers=1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = bapo_trainer(
        tmp_path,
        get_peft_model(small, lora),
        rows=make_rows(64),
        eval_rows=make_rows(16, seed=1),
        bapo={"retention": {"prompts": 8, "every": 50}},
        cache_dir=tmp_path / "cache",
        per_device_train_batch_size=2,
        max_steps=STEPS,
        learning_rate=1e-4,
        eval_strategy="steps",
        eval_steps=50,
        save_strategy="steps",
        save_steps=250,
        save_total_limit=2,
        logging_steps=10,
    )
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    log = trainer.state.log_history
    assert trainer.state.global_step == STEPS and watch.seconds.all()
    assert sum("eval_loss" in e for e in log) == sum("retention/drift" in e for e in log) == 40

    half = STEPS // 2
    slope, _ = np.polyfit(range(half, STEPS), watch.memory[half:], 1)
    logged = size_of([e for e in log if e["step"] > half]) / half  # grows by design
    quarter = STEPS // 4
    times = [statistics.median(watch.seconds[i : i + quarter]) for i in (quarter, 3 * quarter)]
    print(
        f"\nmemory {watch.memory[half] / 2**20:.1f} -> {watch.memory[-1] / 2**20:.1f} MiB, {slope:+.0f} bytes a step, of which the log has "
        f"{logged:.0f}; files "
        f"{max(watch.files[50:half]):.0f} -> {max(watch.files[half:]):.0f}; threads {max(watch.threads[50:half]):.0f} -> "
        f"{max(watch.threads[half:]):.0f}; step {1e3 * times[0]:.1f} -> {1e3 * times[1]:.1f} ms"
    )
    assert slope - logged < 1024, "bytes a step"
    assert max(watch.files[half:]) <= max(watch.files[50:half])
    assert max(watch.threads[half:]) <= max(watch.threads[50:half])
    assert times[1] <= 1.2 * times[0], "seconds of a step"
