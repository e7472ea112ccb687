"""The anchor as a divergence, and prompts that are kept: held to full logits, and the same however a step is cut up."""

import pytest
import torch
from datasets import Dataset
from helpers import (
    bapo_trainer,
    base_log_softmax,
    batch_of,
    drifted,
    gradients,
    kept_prompts,
    lora_model,
    training_args,
)
from tiny import make_model, make_rows, make_tokenizer

from bapo_plugin import BAPOConfig, BAPOTrainer
from bapo_plugin.scoring.collator import KEPT, num_rows

KEEP = {"prompts": "asked.txt", "weight": 0.7, "per_step": 3}


def keeping(tmp_path, bapo=None, rows=None, prompts=None, family="llama", **changes):
    return bapo_trainer(
        tmp_path,
        lora_model(family),
        rows,
        {"keep": KEEP, "reference": "base", **(bapo or {})},
        keep_dataset=kept_prompts() if prompts is None else prompts,
        **changes,
    )


def kl_by_hand(model, rows):
    """[rows], nats an answer, from whole logits in fp64, with gradient."""
    found = []
    for row in rows:
        policy, reference = base_log_softmax(model, row)
        found.append((reference.exp() * (reference - policy)).sum())
    return torch.stack(found)


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # the second caps its logits
@pytest.mark.parametrize("shared", ["require", "off"])
def test_kl_is_that_of_full_logits(tmp_path, shared, family):
    def trainer(weight):
        bapo = {"anchor_loss": "kl", "anchor_weight": weight, "shared_prefix": shared}
        return drifted(keeping(tmp_path, bapo, family=family))

    anchored, plain = trainer(2.0), trainer(0.0)
    for one in (anchored, plain):
        one.compute_loss(one.model, batch_of(one)).backward()
    without = gradients(plain.model)
    found = {n: g - without[n] for n, g in gradients(anchored.model).items()}

    rows = [anchored.train_dataset[i] for i in range(8)]
    terms = anchored.objective(anchored.model, batch_of(anchored))
    anchored.model.zero_grad()
    truth = kl_by_hand(anchored.model, rows)
    (2.0 * truth.mean()).backward()
    lengths = torch.tensor([len(row["base_ids"]) for row in rows])
    torch.testing.assert_close(
        terms.metrics["anchor/kl"], (truth.detach() / lengths).float(), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(terms.rows.anchor, 2 * truth.detach().float(), rtol=1e-4, atol=1e-5)
    assert truth.min() > 1e-3 and (terms.rows.active == 1).all()
    for name, gradient in gradients(anchored.model).items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=2e-5)


def test_kl_is_nothing_before_the_first_step(tmp_path):
    trainer = bapo_trainer(tmp_path, bapo={"anchor_loss": "kl", "anchor_weight": 1.0})
    trainer.train()
    first, *others = [log["anchor/kl"] for log in trainer.state.log_history if "anchor/kl" in log]
    assert first < 1e-8 and others[-1] > 1e-5


@pytest.mark.parametrize("shared", ["require", "off"])
def test_kept_prompts_by_hand(tmp_path, shared):
    """Loss and gradient of a step of two micro-batches: the rows' mean, and weight times the mean KL of the prompts."""
    trainer = drifted(keeping(tmp_path, {"shared_prefix": shared}))
    trainer.get_train_dataloader()  # numbers the rows
    batches = [batch_of(trainer, range(5)), batch_of(trainer, range(5, 8))]
    plain = sum(
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=8) for batch in batches
    )
    plain.backward()
    expected = gradients(trainer.model)
    trainer.model.zero_grad()
    trainer.keeper.add(batches, trainer.reference)
    drawn = trainer.keeper.drawn(0)
    assert sorted(n for b in batches for n in b[KEPT].tolist()) == sorted(drawn)
    assert [num_rows(b) for b in batches] == [5, 3] and len(drawn) == 3
    total = sum(
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=8) for batch in batches
    )
    total.backward()
    found = gradients(trainer.model)
    trainer.model.zero_grad()
    truth = kl_by_hand(trainer.model, [kept_prompts()[n] for n in drawn])
    (0.7 * truth.mean()).backward()
    assert total.item() == pytest.approx(plain.item() + 0.7 * truth.mean().item(), rel=1e-4)
    for name, gradient in gradients(trainer.model).items():
        expected[name] = expected[name] + gradient
        torch.testing.assert_close(found[name], expected[name], rtol=2e-3, atol=2e-5)


def test_every_prompt_is_taken_once_before_any_is_taken_twice(tmp_path):
    keeper = keeping(tmp_path, prompts=kept_prompts(7)).keeper
    drawn = [n for step in range(14) for n in keeper.drawn(step)]
    turns = [drawn[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(turn) == list(range(7)) for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 3, "each turn in another order"
    assert keeper.drawn(3) == drawn[9:12], "a step's prompts depend on nothing before"


def logs_and_weights(trainer):
    keys = ("loss", "loss/preference", "loss/anchor", "loss/keep", "keep/kl", "drift/base")
    logs = [[e[k] for k in keys] for e in trainer.state.log_history if "loss" in e]
    return logs, [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "cut",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"tokens_per_batch": 60},
        {"shared_prefix": "off"},
        {"precompute_ref_log_probs": False},
    ],
    ids=str,
)
def test_a_step_is_the_same_however_it_is_cut_up(tmp_path, cut):
    own = {k: v for k, v in cut.items() if k in BAPOConfig.model_fields}
    args = {k: v for k, v in cut.items() if k not in own}
    bapo = {"anchor_loss": "kl", "anchor_weight": 0.5}
    whole, parts = (
        drifted(keeping(tmp_path, bapo | changes, make_rows(7), **more))
        for changes, more in (({}, {}), (own, args))
    )
    for trainer in (whole, parts):
        trainer.train()
    expected, found = logs_and_weights(whole), logs_and_weights(parts)
    assert len(expected[0]) == 2 and expected[0][1][3] > 1e-3
    for a, b in zip(expected[0], found[0], strict=True):
        assert b == pytest.approx(a, rel=2e-3, abs=2e-5)
    for a, b in zip(expected[1], found[1], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


def test_resumed_is_uninterrupted(tmp_path):
    bapo = {"anchor_weight": "auto", "drift_limit": 0.01}
    settings = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    whole = keeping(tmp_path, bapo, **settings)
    whole.train()
    again = keeping(tmp_path, bapo, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    weights = [
        [e["anchor/weight"] for e in t.state.log_history if "loss" in e] for t in (whole, again)
    ]
    assert weights[0] == weights[1] and len(set(weights[0])) == 4
    expected, found = logs_and_weights(whole), logs_and_weights(again)
    assert expected[0] == found[0]
    for a, b in zip(expected[1], found[1], strict=True):
        assert torch.equal(a, b)


def test_the_kept_part_holds_the_model(tmp_path):
    """Trained to move far, kept prompts stay nearer with a weight than almost without."""
    kl = {}
    for weight in (1e-6, 2.0):
        bapo = {"keep": KEEP | {"weight": weight, "per_step": 5}, "anchor_weight": 0.0}
        args = {"num_train_epochs": 3, "learning_rate": 5e-3}
        trainer = keeping(tmp_path, bapo, make_rows(8), **args)
        trainer.train()
        kl[weight] = kl_by_hand(trainer.model, kept_prompts()).mean().item()
    assert kl[2.0] < 0.3 * kl[1e-6]


def test_log_probs_of_another_reference_are_found_behind_a_pack_of_kept_prompts(tmp_path):
    row = {"prompt_ids": [5] * 40, "base_ids": [6] * 40}
    trainer = keeping(tmp_path, {"tokens_per_batch": 90}, prompts=Dataset.from_list([row] * 3))
    loader = trainer.get_train_dataloader
    trainer.get_train_dataloader = lambda: (loader(), trainer.reference._known.add_(5))[0]
    with pytest.raises(ValueError, match="the reference has changed"):
        trainer.train()


def broken_divergence(trainer, at=1):
    """The divergence of one step is NaN."""
    original, calls = trainer.response_forward, []

    def forward(model, unwrapped, batch, **kwargs):
        out = original(model, unwrapped, batch, **kwargs)
        if out.divergence is None or not torch.is_grad_enabled():
            return out
        calls.append(1)
        factor = torch.nan if len(calls) == at else 1.0
        return out._replace(divergence=out.divergence * factor)

    forward.states = original.states
    trainer.response_forward = forward


def test_a_kept_prompt_that_is_not_finite_is_named(tmp_path):
    trainer = keeping(tmp_path)
    broken_divergence(trainer)
    with pytest.raises(ValueError, match=r"step 1: not finite: prompt \d of bapo.keep \(KL\)"):
        trainer.train()


def test_a_step_with_one_may_be_left_out(tmp_path):
    bapo = {"on_non_finite": "skip", "anchor_weight": "auto", "drift_limit": 0.01}
    trainer = keeping(tmp_path, bapo | {"anchor_loss": "hinge"}, num_train_epochs=2)
    broken_divergence(trainer, at=2)
    trainer.train()
    logs = [e for e in trainer.state.log_history if "loss" in e]
    keys = ("loss", "anchor/weight", "drift/base")
    assert len(logs) == 4 and all(
        torch.isfinite(torch.tensor([e[k] for k in keys])).all() for e in logs
    )


@pytest.mark.parametrize("name", ["prompt_ids", "base_ids"])
def test_a_kept_prompt_without_tokens_is_refused(tmp_path, name):
    rows = [dict(row) for row in kept_prompts()]
    rows[2][name] = []
    with pytest.raises(ValueError, match=f"{name} of prompt 3 is empty"):
        keeping(tmp_path, prompts=Dataset.from_list(rows))


@pytest.mark.parametrize(
    ("lora", "match"),
    [
        ({"modules_to_save": ["lm_head"]}, "head trains"),
        ({"target_modules": ["q_proj", "lm_head"]}, "head trains"),
    ],
)
@pytest.mark.parametrize("bapo", [{"anchor_loss": "kl"}, {"keep": KEEP}], ids=["kl", "keep"])
def test_a_head_that_trains_is_refused(tmp_path, lora, match, bapo):
    with pytest.raises(ValueError, match=match):
        BAPOTrainer(
            lora_model("qwen2", **lora),
            args=training_args(tmp_path / "out"),
            train_dataset=Dataset.from_list(make_rows(4)),
            processing_class=make_tokenizer(),
            bapo=BAPOConfig(**bapo),
            keep_dataset=kept_prompts() if "keep" in bapo else None,
        )


def test_full_fine_tuning_is_refused(tmp_path):
    model, other = (make_model("qwen2", vocab_size=len(make_tokenizer()), seed=1) for _ in "ab")
    with pytest.raises(ValueError, match="needs an adapter"):
        BAPOTrainer(
            model,
            other,
            args=training_args(tmp_path / "out"),
            train_dataset=Dataset.from_list(make_rows(4)),
            processing_class=make_tokenizer(),
            bapo=BAPOConfig(anchor_loss="kl"),
        )
