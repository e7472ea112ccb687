"""`anchor_weight: auto`: what base responses lose is the limit, whatever lengths, β and learning rate are."""

import pytest
import torch
from helpers import bapo_trainer
from tiny import make_model, make_tokenizer

LIMIT = 0.05


def rows_of(length, count=160):
    """Base responses are what the model says; chosen and rejected are mostly of one half of the vocabulary each."""
    generator = torch.Generator().manual_seed(0)
    model = make_model(vocab_size=len(make_tokenizer()))
    vocabulary = model.config.vocab_size
    prompts = torch.randint(3, vocabulary, (count, 8), generator=generator)
    mask, settings = torch.ones_like(prompts), {"max_new_tokens": length, "min_new_tokens": length}
    base = model.generate(prompts, attention_mask=mask, do_sample=False, pad_token_id=0, **settings)

    def answers(low, high):
        own = torch.randint(low, high, (count, length), generator=generator)
        other = torch.randint(3, vocabulary, (count, length), generator=generator)
        return torch.where(torch.rand(count, length, generator=generator) < 0.6, other, own)

    chosen, rejected = answers(3, vocabulary // 2), answers(vocabulary // 2, vocabulary)
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "base_ids")
    columns = (prompts, chosen, rejected, base[:, 8:])
    return [
        dict(zip(names, row, strict=True))
        for row in zip(*(c.tolist() for c in columns), strict=True)
    ]


def lost(tmp_path, rows, beta, learning_rate, bapo, steps=80):
    """Nats a token of the last quarter of the run, over all rows of it."""
    trainer = bapo_trainer(
        tmp_path,
        rows=rows,
        bapo=bapo,
        beta=beta,
        learning_rate=learning_rate,
        max_steps=steps,
        lr_scheduler_type="cosine",
        warmup_steps=3,
    )
    trainer.train()
    log = [e["anchor/kl"] for e in trainer.state.log_history if "anchor/kl" in e]
    return sum(log[-steps // 4 :]) / (steps // 4)


CASES = [
    (24, 0.1, 6e-3),
    (24, 0.05, 6e-3),
    (24, 0.5, 6e-3),
    (24, 0.1, 1.8e-2),
    (60, 0.2, 1e-2),
    (100, 0.1, 4.5e-3),
    (100, 0.1, 9e-3),
    (400, 0.1, 3e-3),
]
AUTO = {"anchor_weight": "auto", "drift_limit": LIMIT}


def test_the_budget_is_kept(tmp_path):
    found = lost(tmp_path, rows_of(24), 0.1, 6e-3, AUTO, steps=60)
    assert 0.7 * LIMIT < found < 1.3 * LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_budget_is_kept_and_used(tmp_path, case):
    length, *settings = case
    count, steps = (80, 60) if length == 400 else (160, 80)
    rows = rows_of(length, count)
    without = lost(tmp_path, rows, *settings, {"anchor_loss": "kl", "anchor_weight": 1e-9}, steps)
    assert without > 1.5 * LIMIT, "nothing to hold back"
    found = lost(tmp_path, rows, *settings, AUTO, steps)
    assert 0.7 * LIMIT < found < 1.3 * LIMIT
