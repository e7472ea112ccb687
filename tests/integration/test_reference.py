"""Reference log-probs computed once: as in the step, found again, never stale."""

import random
import signal
import sqlite3
import time
from pathlib import Path

import pytest
import torch
import warm
from datasets import Dataset
from helpers import (
    bapo_trainer,
    batch_of,
    fresh_lora,
    lora_model,
    randomize_lora,
    training_args,
)
from tiny import FAMILIES, make_model, make_rows, make_tokenizer

from bapo_plugin import BAPOConfig, BAPOTrainer
from bapo_plugin.scoring.collator import num_rows
from bapo_plugin.store import StoreDamaged
from bapo_plugin.training.reference import Reference

SCRIPT = Path(__file__).with_name("reference_script.py")


@pytest.fixture
def passes(monkeypatch):
    """Rows of each batch that the reference was computed for."""
    sizes = []
    original, make = Reference.live, Reference._make_cache

    def counted(self, policy):
        cache = make(self, policy)
        compute = cache._compute

        def count(batch):
            sizes.append(num_rows(batch))
            return compute(batch)

        cache._compute = count
        return cache

    def in_step(self, model, unwrapped, batch):
        if not self.precomputed:
            sizes.append(num_rows(batch))
        return original(self, model, unwrapped, batch)

    monkeypatch.setattr(Reference, "_make_cache", counted)
    monkeypatch.setattr(Reference, "live", in_step)
    monkeypatch.setattr(Reference, "check", lambda *args: None)
    return sizes


def cached_logps(trainer):
    """Of all rows, [n, 3]."""
    trainer.get_train_dataloader()
    rows = list(trainer.train_dataset)
    known = trainer.reference.known(trainer.collate(rows))
    return known.sequences.view(3, len(rows)).T


def trainer_for(tmp_path, rows=None, **changes):
    return bapo_trainer(tmp_path, rows=rows, cache_dir=tmp_path / "cache", **changes)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_cached_is_live_in_fp32(tmp_path, family):
    trainer = trainer_for(tmp_path, make_rows(9), model=lora_model(family))
    randomize_lora(trainer.model, std=0.1)
    cached = cached_logps(trainer)
    for indices in ([0], [1, 2, 3, 4], [5, 6, 7, 8]):
        live = trainer.reference.live(
            trainer.model, trainer.model, batch_of(trainer, indices)
        ).logps
        found = cached[indices].T.reshape(-1)
        torch.testing.assert_close(found, live, rtol=1e-6, atol=1e-5)
        policy = trainer.response_forward(
            trainer.model, trainer.model, batch_of(trainer, indices)
        ).logps
        assert (policy - live).abs().max() > 0.01, "policy and reference are the same"


def test_cached_is_live_in_bf16(tmp_path, smollm2):
    """With the same rows in a batch. With others, bf16 matrices round differently from batch to batch,
    in the step as here; that is the model's precision, not the cache's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    trainer = BAPOTrainer(
        AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16),
        args=training_args(tmp_path, per_device_eval_batch_size=4),
        train_dataset=Dataset.from_list(make_rows(8)),
        processing_class=tokenizer,
        peft_config=fresh_lora(),
        bapo=BAPOConfig(),
    )
    cached = cached_logps(trainer)
    rows = list(trainer.train_dataset)
    length = [
        max(len(r["prompt_ids"]) + len(r[f"{n}_ids"]) for n in ("chosen", "rejected", "base"))
        for r in rows
    ]
    order = sorted(range(8), key=lambda i: (-length[i], i))
    for indices in (order[:4], order[4:]):
        live = trainer.reference.live(
            trainer.model, trainer.model, batch_of(trainer, indices)
        ).logps
        found = cached[indices].T.reshape(-1)
        torch.testing.assert_close(found, live, rtol=0, atol=1e-3)


def test_training_with_and_without_is_the_same(tmp_path, passes):
    logs = []
    for precompute in (True, False):
        trainer = trainer_for(
            tmp_path / str(precompute),
            make_rows(12),
            model=lora_model(),
            eval_rows=make_rows(5, seed=3),
            eval_strategy="epoch",
            # in the first step Δ is zero up to rounding, which decides whether a hinge pulls
            bapo={"precompute_ref_log_probs": precompute, "anchor_loss": "squared"},
        )
        trainer.train()
        logs.append(trainer.state.log_history)
        assert sum(passes) == 12 + 5
        passes.clear()
    for cached, live in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "drift/base", "eval_loss", "eval_drift/chosen"):
            assert cached.get(key) == pytest.approx(live.get(key), abs=2e-4), key


def test_found_again_where_only_training_differs(tmp_path, passes):
    trainer_for(tmp_path, make_rows(10)).get_train_dataloader()
    assert sum(passes) == 10
    rows = make_rows(12)[::-1]  # ten of them, in another order, and two new ones
    trainer = trainer_for(
        tmp_path,
        rows,
        bapo={"anchor_weight": 3.0, "anchor_loss": "absolute"},
        learning_rate=1.0,
        beta=0.7,
        num_train_epochs=5,
        per_device_train_batch_size=1,
        seed=99,
    )
    first = trainer.train_dataset.to_list()
    trainer.get_train_dataloader()
    assert sum(passes) == 12
    fresh = trainer_for(tmp_path / "other", rows)
    fresh.get_train_dataloader()
    assert [row["chosen_ids"] for row in first] == trainer.train_dataset["chosen_ids"]
    torch.testing.assert_close(cached_logps(trainer), cached_logps(fresh), rtol=0, atol=1e-4)


def test_another_model_or_start_is_computed_anew(tmp_path, passes):
    rows = make_rows(6)
    trainer_for(tmp_path, rows).get_train_dataloader()  # a new adapter on all layers
    trained = lora_model(r=8, target_modules=["q_proj"])  # another adapter on the same reference
    randomize_lora(trained, std=0.3)
    trainer_for(tmp_path, rows, model=trained, bapo={"reference": "base"}).get_train_dataloader()
    assert sum(passes) == 6
    trainer_for(tmp_path, rows, model=trained).get_train_dataloader()  # goes on with that adapter
    assert sum(passes) == 12
    changed = lora_model()
    with torch.no_grad():
        changed.get_input_embeddings().weight[7, 3] += 1e-3
    trainer_for(tmp_path, rows, model=changed).get_train_dataloader()
    assert sum(passes) == 18
    for row in rows:  # another template
        row["prompt"] = "tell " + row["prompt"]
    trainer_for(tmp_path, rows, model=lora_model()).get_train_dataloader()
    assert sum(passes) == 24


def test_evaluate_with_another_data_set_after_training(tmp_path, passes):
    """The reference is the model before training, whatever it has learned since."""
    other = Dataset.from_list(make_rows(7, seed=8))
    results = []
    for precompute in (True, False):
        trainer = trainer_for(
            tmp_path,
            make_rows(8),
            model=lora_model(),
            eval_rows=make_rows(4, seed=4),
            bapo={"precompute_ref_log_probs": precompute},
        )
        randomize_lora(trainer.model, std=0.05)
        results.append(trainer.evaluate(other) | trainer.evaluate(metric_key_prefix="own"))
    for key in ("eval_drift/base", "eval_loss", "own_drift/chosen"):
        assert results[0][key] == pytest.approx(results[1][key], abs=1e-4), key
        assert abs(results[0]["eval_drift/base"]) > 0.01


def test_several_evaluation_sets(tmp_path):
    trainer = trainer_for(tmp_path, make_rows(4), model=lora_model())
    trainer.eval_dataset = {
        name: trainer._prepare_dataset(
            Dataset.from_list(make_rows(3, seed=i)), trainer.processing_class, trainer.args, name
        )
        for i, name in enumerate(("one", "two"))
    }
    metrics = trainer.evaluate()
    assert {"eval_one_loss", "eval_two_drift/base"} <= metrics.keys()


def test_full_fine_tuning_computes_in_the_step_unless_asked(tmp_path):
    vocabulary = len(make_tokenizer())

    def trainer(**bapo):
        return BAPOTrainer(
            make_model("qwen2", vocab_size=vocabulary),
            make_model("qwen2", vocab_size=vocabulary),
            args=training_args(tmp_path),
            train_dataset=Dataset.from_list(make_rows(4)),
            processing_class=make_tokenizer(),
            bapo=BAPOConfig(**bapo),
        )

    live, asked = trainer(), trainer(precompute_ref_log_probs=True)
    live.train()
    asked.train()
    assert asked.reference.precomputed and not live.reference.precomputed
    for key in ("loss", "drift/base"):
        values = [t.state.log_history[0][key] for t in (live, asked)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_a_damaged_cache_is_said(tmp_path, passes):
    trainer_for(tmp_path, make_rows(10)).get_train_dataloader()
    path = tmp_path / "cache/bapo-reference.sqlite"
    db = sqlite3.connect(path)
    key = db.execute("SELECT key FROM entries LIMIT 1").fetchone()
    db.execute("UPDATE entries SET value = x'0000000000000000' WHERE key = ?", key)
    db.commit()
    db.close()
    with pytest.raises(StoreDamaged, match=r"reference log-probs .*39 sound entries"):
        trainer_for(tmp_path, make_rows(10)).get_train_dataloader()
    trainer_for(tmp_path, make_rows(10)).get_train_dataloader()
    assert sum(passes) == 11


def test_a_log_prob_that_is_not_finite_is_an_error(tmp_path):
    trainer = trainer_for(tmp_path, make_rows(4), model=lora_model())
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[:] = torch.inf
    with pytest.raises(
        ValueError, match=r"row \d of the training rows a log-probability that is not"
    ):
        trainer.get_train_dataloader()


def killed_and_gone_on(folder, kills):
    generator, best = random.Random(2), 0
    for _ in range(kills):
        # so slow that the pass doesn't end before the last kill
        process = warm.Process([SCRIPT, folder, 0.15 if kills == 1 else 0.8])
        # the first kill has something to lose; the others come as they come
        begun = "BATCH" if not best else "START"
        while begun not in (line := process.stdout.readline()):
            assert line, process.errors()
        if not best:
            process.stdout.readline()
        time.sleep(generator.uniform(0.2, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        db = sqlite3.connect(folder / "bapo-reference.sqlite")
        count = db.execute("SELECT count(*) FROM entries").fetchone()[0]
        db.close()
        assert count >= best and count % 8 == 0, "a batch was stored in part"
        best = count
    assert 0 < best < 160
    process = warm.Process([SCRIPT, folder, 0])
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert int(out.split("BATCHES")[1]) == 20 - best // 8


def test_killed_in_the_pass_and_gone_on(tmp_path):
    killed_and_gone_on(tmp_path, 1)


@pytest.mark.slow
def test_killed_ten_times_in_the_pass_and_gone_on(tmp_path):
    killed_and_gone_on(tmp_path, 10)
