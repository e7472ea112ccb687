"""The anchor on each token of the base response: held to whole logits, cached or live, whole or cut."""

import pytest
import torch
from helpers import (
    bapo_trainer,
    base_log_softmax,
    batch_of,
    drifted,
    gradients,
    lora_model,
    randomize_lora,
)
from tiny import make_rows

from bapo_plugin.scoring.reference import COLUMN, TOKENS_COLUMN

ANCHOR = {"anchor_weight": 2.0, "reference": "base"}


def anchored_trainer(tmp_path, family="llama", rows=None, bapo=None, **changes):
    bapo = {**ANCHOR, **(bapo or {})}
    return drifted(bapo_trainer(tmp_path, lora_model(family), rows, bapo, **changes))


def drift_by_hand(model, rows):
    """Δ_t of each row's base response, from whole logits in fp64, with gradient."""
    found = []
    for row in rows:
        labels = torch.tensor(row["base_ids"])[:, None]
        policy, reference = (p.gather(1, labels)[:, 0] for p in base_log_softmax(model, row))
        found.append(policy - reference)
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # the second caps its logits
@pytest.mark.parametrize("shared", ["require", "off"])
def test_it_is_that_of_whole_logits(tmp_path, shared, family):
    anchored = anchored_trainer(tmp_path, family, bapo={"shared_prefix": shared})
    plain = anchored_trainer(tmp_path, family, bapo={"shared_prefix": shared, "anchor_weight": 0})
    for one in (anchored, plain):
        one.compute_loss(one.model, batch_of(one)).backward()
    without = gradients(plain.model)
    found = {n: g - without[n] for n, g in gradients(anchored.model).items()}

    terms = anchored.objective(anchored.model, batch_of(anchored))
    anchored.model.zero_grad()
    drift = drift_by_hand(anchored.model, [anchored.train_dataset[i] for i in range(8)])
    truth = torch.stack([torch.relu(-d).sum() for d in drift])
    (2.0 * truth.mean()).backward()
    torch.testing.assert_close(terms.rows.anchor, 2 * truth.detach().float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        terms.metrics["drift/base"], torch.stack([d.detach().sum() for d in drift]).float(),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    share = torch.stack([(d < 0).double().mean() for d in drift]).float()
    torch.testing.assert_close(terms.rows.active, share)
    assert 0.2 < share.mean() < 0.8, (
        "some tokens gain, some lose: else this is the response's hinge"
    )
    for name, gradient in gradients(anchored.model).items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=2e-5)


def test_the_models_own_logits_give_the_same(tmp_path, monkeypatch):
    """Where the head isn't known, log-probs come from them."""
    from bapo_plugin.scoring import forward

    trainer = anchored_trainer(tmp_path)
    terms = trainer.objective(trainer.model, batch_of(trainer))
    monkeypatch.setattr(forward, "inspect_head", lambda *args: "it is not to be known")
    plain = anchored_trainer(tmp_path)
    found = plain.objective(plain.model, batch_of(plain))
    torch.testing.assert_close(found.rows.anchor, terms.rows.anchor, rtol=1e-4, atol=1e-5)
    assert found.rows.anchor.sum() > 0


@pytest.mark.parametrize("shared", ["require", "off"])
def test_cached_is_live(tmp_path, shared):
    found = []
    for cached in (True, False):
        bapo = {"shared_prefix": shared, "precompute_ref_log_probs": cached}
        trainer = anchored_trainer(tmp_path, bapo=bapo, cache_dir=tmp_path / "cache")
        trainer.get_train_dataloader()
        rows = [trainer.train_dataset[i] for i in (5, 0, 3)]  # not in the table's order
        known = trainer.reference.logps(trainer.model, trainer.model, trainer.collate(rows))
        found.append(known)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert len(found[0].base_tokens) == sum(len(row["base_ids"]) for row in rows)


def test_a_cache_of_whole_responses_is_filled_up_and_serves_both(tmp_path, monkeypatch):
    """A run that looked at whole responses has left no tokens: they are computed, once."""
    from bapo_plugin.training.reference import Reference

    calls, live = [], Reference.live
    monkeypatch.setattr(Reference, "live", lambda *args: calls.append(1) or live(*args))
    passes = []
    for level in ("response", "token", "token", "response"):
        calls.clear()
        trainer = anchored_trainer(
            tmp_path, bapo={"anchor_level": level}, cache_dir=tmp_path / "cache"
        )
        trainer.get_train_dataloader()
        passes.append(len(calls))
        table = trainer.reference._tokens
        assert table.isfinite().all() and (len(table) > 0) == (level == "token")
    assert passes[0] == passes[1] > 0 and passes[2:] == [0, 0]


def test_rows_may_bring_their_own(tmp_path):
    rows = make_rows(4)
    made = anchored_trainer(tmp_path, rows=rows)
    made.get_train_dataloader()
    tokenised = list(made.train_dataset)
    known = made.reference.known(made.collate(tokenised))
    lengths = [len(row["base_ids"]) for row in tokenised]
    sums = known.sequences.view(3, 4).T.tolist()
    each = [part.tolist() for part in known.base_tokens.split(lengths)]
    bare = [{k: v for k, v in row.items() if k.endswith("_ids")} for row in tokenised]

    def bring(**columns):
        brought = [r | {k: v[i] for k, v in columns.items()} for i, r in enumerate(bare)]
        trainer = anchored_trainer(tmp_path, rows=brought)
        trainer.get_train_dataloader()
        return trainer.reference.known(trainer.collate(list(trainer.train_dataset)))

    again = bring(**{COLUMN: sums, TOKENS_COLUMN: each})
    torch.testing.assert_close(again.base_tokens, known.base_tokens)
    with pytest.raises(ValueError, match="add a column reference_base_logps"):
        bring(**{COLUMN: sums})
    with pytest.raises(ValueError, match="row 3 of the training rows has .* they must be as many"):
        bring(**{COLUMN: sums, TOKENS_COLUMN: [*each[:2], each[2][1:], each[3]]})


def logs_and_weights(trainer):
    keys = ("loss", "loss/preference", "loss/anchor", "anchor/lost", "anchor/active", "drift/base")
    logs = [[e[k] for k in keys] for e in trainer.state.log_history if "loss" in e]
    return logs, [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "cut",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"bapo": {"tokens_per_batch": 60}},
        {"bapo": {"shared_prefix": "off"}},
        {"bapo": {"precompute_ref_log_probs": False}},
    ],
    ids=lambda cut: next(iter(cut)) if "bapo" not in cut else next(iter(cut["bapo"])),
)
def test_a_step_is_the_same_however_it_is_cut(tmp_path, cut):
    def run(**changes):
        bapo = {"anchor_weight": 1.0, **changes.pop("bapo", {})}
        trainer = bapo_trainer(
            tmp_path, lora_model(), bapo=bapo, max_steps=3,
            **{"per_device_train_batch_size": 4} | changes,
        )  # fmt: skip
        randomize_lora(trainer.model, std=0.05)
        trainer.starts_equal = False
        trainer.train()
        return logs_and_weights(trainer)

    (logs, weights), (other_logs, other_weights) = run(), run(**cut)
    torch.testing.assert_close(torch.tensor(logs), torch.tensor(other_logs), rtol=1e-3, atol=1e-4)
    for one, other in zip(weights, other_weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_evaluation_measures_it_too(tmp_path):
    trainer = anchored_trainer(tmp_path, eval_rows=make_rows(5, seed=3))
    found = trainer.evaluate()
    rows = [trainer.eval_dataset[i] for i in range(5)]
    drift = drift_by_hand(trainer.model, rows)
    lost = torch.stack([torch.relu(-d).mean() for d in drift]).mean().item()
    assert found["eval_anchor/lost"] == pytest.approx(lost, rel=1e-4)


def test_a_response_that_is_one_rows_base_and_anothers_chosen_is_computed_once(
    tmp_path, monkeypatch
):
    """Their keys are the same; what is kept of one mustn't replace what is kept of the other."""
    from bapo_plugin.training.reference import Reference

    first, second = make_rows(2)
    second |= {"prompt": first["prompt"], "chosen": first["base"], "base": first["chosen"]}
    calls, live = [], Reference.live
    monkeypatch.setattr(Reference, "live", lambda *args: calls.append(1) or live(*args))
    passes = []
    for _ in range(3):
        calls.clear()
        changes = {"per_device_eval_batch_size": 1, "cache_dir": tmp_path / "cache"}
        trainer = anchored_trainer(tmp_path, rows=[first, second], **changes)
        trainer.get_train_dataloader()
        passes.append(len(calls))
    assert passes == [2, 0, 0]


@pytest.mark.parametrize(
    "column, value, match",
    [
        (TOKENS_COLUMN, float("nan"), "row 1 of the training rows: .* of one model, and finite"),
        (TOKENS_COLUMN, None, "row 1 of the training rows: .* of one model, and finite"),
        (TOKENS_COLUMN, -500.0, "row 1 .* sum up to .* nats beside that of the base response"),
        (COLUMN, float("inf"), "row 1 of the training rows brings .* not finite"),
    ],
)
def test_what_rows_bring_is_checked(tmp_path, column, value, match):
    rows = [
        row | {COLUMN: [-9.0, -8.0, -7.0], TOKENS_COLUMN: [-7.0 / n] * n}
        for row in make_rows_as_ids(2)
        for n in [len(row["base_ids"])]
    ]
    anchored_trainer(tmp_path, rows=rows).get_train_dataloader()
    rows[0][column][0] = value
    with pytest.raises(ValueError, match=match):
        anchored_trainer(tmp_path, rows=rows).get_train_dataloader()


def make_rows_as_ids(n):
    generator = torch.Generator().manual_seed(1)
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "base_ids")
    return [
        {name: torch.randint(3, 300, (5 + i,), generator=generator).tolist() for name in names}
        for i in range(n)
    ]


def test_dpo_needs_no_tokens(tmp_path):
    rows = [row | {COLUMN: [-9.0, -8.0, -7.0]} for row in make_rows_as_ids(2)]
    trainer = anchored_trainer(tmp_path, rows=rows, bapo={"anchor_weight": 0})
    trainer.get_train_dataloader()
    assert trainer.reference.known(batch_of(trainer)).base_tokens is None
