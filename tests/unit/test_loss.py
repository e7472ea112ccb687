"""The loss, held to numbers worked out by hand and to finite differences."""

import doctest
import math

import pytest
import torch

import bapo_plugin.loss
from bapo_plugin.loss import (
    ANCHOR_LOSSES,
    PREFERENCE_LOSSES,
    ResponseLogps,
    anchor_penalty,
    bapo_loss,
    preference_loss,
)


def logps(*rows):
    """[(chosen, rejected, base), ...] -> ResponseLogps in fp64."""
    return ResponseLogps(*torch.tensor(rows, dtype=torch.float64).T)


def test_docstring_example():
    result = doctest.testmod(bapo_plugin.loss)
    assert result.attempted > 0 and result.failed == 0


# margin 2, beta 0.5: z = 1
@pytest.mark.parametrize(
    ("loss_type", "smoothing", "expected"),
    [
        ("sigmoid", 0.0, math.log1p(math.exp(-1))),
        ("sigmoid", 0.1, 0.9 * math.log1p(math.exp(-1)) + 0.1 * math.log1p(math.e)),
        ("sigmoid_norm", 0.0, math.log1p(math.exp(-1))),
        ("hinge", 0.0, 0.0),
        ("ipo", 0.0, (2 - 1) ** 2),
        ("robust", 0.1, (0.9 * math.log1p(math.exp(-1)) - 0.1 * math.log1p(math.e)) / 0.8),
        (
            "exo_pair",
            0.1,
            # KL between (σ(1), σ(−1)) and (0.9, 0.1)
            sum(q * math.log(q / p) for q, p in ((0.7310585786, 0.9), (0.2689414214, 0.1))),
        ),
    ],
)
def test_preference_losses_by_hand(loss_type, smoothing, expected):
    margin = torch.tensor([2.0], dtype=torch.float64)
    value = preference_loss(margin, loss_type, beta=0.5, label_smoothing=smoothing)
    assert value.item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("anchor_loss", "expected"),
    [
        ("hinge", [3.0, 0.0]),
        ("absolute", [3.0, 2.0]),
        ("squared", [9.0, 4.0]),
        ("nll", [13.0, 8.0]),
    ],
)
def test_anchor_by_hand(anchor_loss, expected):
    # base responses at −10 nats in the reference, now −13 and −8
    policy, drift = torch.tensor([-13.0, -8.0]), torch.tensor([-3.0, 2.0])
    assert anchor_penalty(drift, policy, anchor_loss).tolist() == expected


def test_kl_is_the_divergence_that_is_given():
    policy, reference = logps((-9, -12, -7)), logps((-10, -11, -5))
    tokens = ResponseLogps(*torch.tensor([[4], [3], [8]]))
    divergence = torch.tensor([1.6], dtype=torch.float64)
    options = {"anchor_loss": "kl", "anchor_weight": 0.5}
    assert bapo_loss(policy, reference, tokens, divergence, **options).anchor.item() == (
        pytest.approx(0.8)
    )
    mean = bapo_loss(policy, reference, tokens, divergence, anchor_reduction="mean", **options)
    assert mean.anchor.item() == pytest.approx(0.5 * 1.6 / 8) and mean.active.item() == 1.0
    with pytest.raises(ValueError, match="divergence"):
        bapo_loss(policy, reference, **options)


@pytest.mark.parametrize(
    ("anchor_loss", "base", "divergence", "expected"),
    [
        ("hinge", -7.0, 0.0, 2 - 0.8),  # lost 2 nats, of which 8 tokens may lose 0.1 each
        ("hinge", -5.5, 0.0, 0.0),
        ("hinge", -2.0, 0.0, 0.0),
        ("absolute", -2.0, 0.0, 3 - 0.8),
        ("squared", -7.0, 0.0, 1.2**2),
        ("kl", -7.0, 1.6, 0.8),
        ("kl", -7.0, 0.5, 0.0),
    ],
)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_slack_is_left_alone(anchor_loss, base, divergence, expected, reduction):
    policy, reference = logps((-9, -12, base)), logps((-10, -11, -5))
    tokens = ResponseLogps(*torch.tensor([[4], [3], [8]]))
    out = bapo_loss(
        policy,
        reference,
        tokens,
        torch.tensor([divergence], dtype=torch.float64),
        anchor_weight=1.0,
        anchor_loss=anchor_loss,
        anchor_reduction=reduction,
        slack=0.1,
    )
    scale = {"sum": 1, "mean": 8 if anchor_loss != "squared" else 64}[reduction]
    assert out.anchor.item() == pytest.approx(expected / scale, abs=1e-9)
    assert out.active.item() == (expected > 0)
    with pytest.raises(ValueError, match="slack"):
        bapo_loss(policy, reference, slack=0.1)


def test_weight_may_be_a_tensor():
    policy, reference = logps((-9, -12, -7)), logps((-10, -11, -5))
    given = bapo_loss(policy, reference, anchor_weight=torch.tensor(0.25, dtype=torch.float64))
    assert torch.equal(given.loss, bapo_loss(policy, reference, anchor_weight=0.25).loss)


def test_additive_and_margin_placement_by_hand():
    policy, reference = logps((-9, -12, -7)), logps((-10, -11, -5))
    additive = bapo_loss(policy, reference, beta=0.5, anchor_weight=0.25)
    # margin 1 − (−1) = 2, z = 1; base lost 2 nats: 0.25 · 2 = 0.5
    assert additive.preference.item() == pytest.approx(math.log1p(math.exp(-1)))
    assert additive.anchor.item() == pytest.approx(0.5)
    margin = bapo_loss(policy, reference, beta=0.5, anchor_weight=0.25, anchor_placement="margin")
    # z = 0.5 · (2 − 0.5)
    assert margin.loss.item() == pytest.approx(math.log1p(math.exp(-0.75)))
    assert margin.preference.item() == pytest.approx(math.log1p(math.exp(-1)))
    for out in (additive, margin):
        assert torch.equal(out.loss, out.preference + out.anchor)
        assert out.active.item() == 1.0


def test_mean_reduction_and_length_normalised_losses_divide_by_tokens():
    policy, reference = logps((-8, -12, -9)), logps((-10, -9, -5))
    tokens = ResponseLogps(torch.tensor([4]), torch.tensor([3]), torch.tensor([8]))
    out = bapo_loss(
        policy,
        reference,
        tokens,
        beta=0.5,
        loss_type="ipo",
        anchor_weight=2.0,
        anchor_reduction="mean",
    )
    # per token: 2/4 − (−3/3) = 1.5, minus 1/(2·0.5) = 0.5, squared; anchor 2 · 4/8
    assert out.preference.item() == pytest.approx(0.25)
    assert out.anchor.item() == pytest.approx(1.0)


def test_several_losses_are_summed_with_weights():
    policy, reference = logps((-9, -12, -7)), logps((-10, -11, -5))
    out = bapo_loss(
        policy,
        reference,
        beta=0.5,
        loss_type=["sigmoid", "hinge"],
        loss_weights=[2, 3],
        anchor_weight=0,
    )
    assert out.loss.item() == pytest.approx(2 * math.log1p(math.exp(-1)) + 3 * 0.0)


@pytest.mark.parametrize("anchor_loss", ANCHOR_LOSSES)
@pytest.mark.parametrize("loss_type", PREFERENCE_LOSSES)
@pytest.mark.parametrize("placement", ["additive", "margin"])
def test_gradcheck(anchor_loss, loss_type, placement):
    if placement == "margin" and anchor_loss == "nll":
        pytest.skip("refused, see test_refusals")
    torch.manual_seed(0)
    # away from the kinks of hinge and |.|: every drift is at least 0.5 nats
    drift = torch.tensor([[1.3, -0.9], [-2.1, 1.7], [-0.8, 1.1]], dtype=torch.float64)
    reference = torch.full((3, 2), -9.0, dtype=torch.float64)
    tokens = ResponseLogps(*torch.tensor([[3, 5], [4, 2], [6, 3]]))

    def loss(policy):
        divergence = (
            policy[2] - reference[2]
        ) ** 2 + 0.1  # stands for one that depends on the policy
        return bapo_loss(
            ResponseLogps(*policy),
            ResponseLogps(*reference),
            tokens,
            divergence,
            beta=0.3,
            loss_type=loss_type,
            label_smoothing=0.1 if loss_type in ("robust", "exo_pair") else 0.0,
            anchor_loss=anchor_loss,
            anchor_weight=0.7,
            anchor_reduction="mean",
            anchor_placement=placement,
        ).loss

    assert torch.autograd.gradcheck(loss, ((reference + drift).requires_grad_(),))


@pytest.mark.parametrize("anchor_loss", ["hinge", "absolute", "squared"])
def test_anchor_is_silent_at_the_reference(anchor_loss):
    base = torch.tensor([-5.0, -7.0], requires_grad=True)
    zero = torch.zeros(2)
    policy = ResponseLogps(zero, zero, base)
    reference = ResponseLogps(zero, zero, base.detach())
    out = bapo_loss(policy, reference, anchor_loss=anchor_loss, anchor_weight=1.0)
    (gradient,) = torch.autograd.grad(out.loss.sum(), base)
    assert gradient.tolist() == [0.0, 0.0]
    assert out.active.tolist() == [0.0, 0.0] and out.anchor.tolist() == [0.0, 0.0]


def test_hinge_pulls_up_only_what_fell():
    base = torch.tensor([-6.0, -4.0], requires_grad=True)
    zero = torch.zeros(2)
    reference = ResponseLogps(zero, zero, torch.tensor([-5.0, -5.0]))
    out = bapo_loss(ResponseLogps(zero, zero, base), reference, anchor_weight=0.4)
    (gradient,) = torch.autograd.grad(out.loss.sum(), base)
    assert gradient.tolist() == pytest.approx(
        [-0.4, 0.0]
    )  # descent raises the first, leaves the second
    assert out.active.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"loss_type": "nca_pair"}, "possible are sigmoid"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "no meaning for loss_type 'hinge'"),
        ({"loss_type": "exo_pair"}, "needs label_smoothing"),
        ({"loss_type": "ipo"}, "num_tokens is needed"),
        ({"anchor_reduction": "mean"}, "num_tokens is needed"),
        ({"anchor_weight": -1}, "anchor_weight must be >= 0, got -1"),
        ({"anchor_loss": "huber"}, "'huber' is not one of hinge"),
        ({"anchor_reduction": "max"}, "'max' must be one of"),
        ({"anchor_placement": "margin", "anchor_loss": "nll"}, "can't be placed in the margin"),
        ({"loss_weights": [1, 2]}, "1 loss types but 2 loss_weights"),
    ],
)
def test_refusals(kwargs, match):
    with pytest.raises(ValueError, match=match):
        bapo_loss(logps((-1, -2, -3)), logps((-1, -2, -3)), **kwargs)


# ---------------------------------------------------------------- the anchor on tokens

TOKENS = ResponseLogps(torch.tensor([4, 4]), torch.tensor([3, 3]), torch.tensor([3, 2]))
# the first answer loses 1.5 nats on two tokens and gains 2 on one, the second loses nothing
TOKEN_DRIFT = torch.tensor([-1.0, 2.0, -0.5, 0.25, 0.0], dtype=torch.float64)
WHOLE = torch.tensor([0.5, 0.25], dtype=torch.float64)


def by_token(drift, tokens=TOKENS, base=WHOLE, **kwargs):
    zero = torch.zeros_like(base)
    return bapo_loss(
        ResponseLogps(zero, zero, base),
        ResponseLogps(zero, zero, zero),
        tokens,
        None,
        drift,
        **{"anchor_weight": 1.0} | kwargs,
    )


@pytest.mark.parametrize(
    "anchor_loss, expected", [("hinge", [1.5, 0]), ("absolute", [3.5, 0.25]), ("squared", [5.25, 0.0625])]
)  # fmt: skip
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_on_tokens_gains_do_not_pay_for_losses(anchor_loss, expected, reduction):
    out = by_token(TOKEN_DRIFT, anchor_loss=anchor_loss, anchor_reduction=reduction)
    sizes = [3, 2] if reduction == "mean" else [1, 1]
    assert out.anchor.tolist() == pytest.approx([e / s for e, s in zip(expected, sizes)])  # noqa: B905
    moved = {"hinge": [2 / 3, 0], "absolute": [1, 1 / 2], "squared": [1, 1 / 2]}[anchor_loss]
    assert out.active.tolist() == pytest.approx(moved)
    # the whole response has gained, so that a hinge on it sees nothing of this
    whole = by_token(None, anchor_loss="hinge", anchor_reduction=reduction)
    assert whole.anchor.tolist() == [0, 0]


def test_on_tokens_the_hinge_pulls_each_token_that_fell_alike():
    drift = TOKEN_DRIFT.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(by_token(drift, anchor_weight=0.4).loss.sum(), drift)
    assert gradient.tolist() == pytest.approx([-0.4, 0, -0.4, 0, 0])


def test_on_tokens_slack_is_each_tokens():
    out = by_token(TOKEN_DRIFT, slack=0.6)
    assert out.anchor.tolist() == pytest.approx([0.4, 0])  # of -1.0 and -0.5 nats
    assert out.active.tolist() == pytest.approx([1 / 3, 0])


@pytest.mark.parametrize("anchor_loss", ANCHOR_LOSSES)
@pytest.mark.parametrize("placement", ["additive", "margin"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_one_token_is_a_whole_response(anchor_loss, placement, reduction):
    if placement == "margin" and anchor_loss == "nll":
        pytest.skip("refused, see test_refusals")
    ones = TOKENS._replace(base=torch.tensor([1, 1]))
    drift = torch.tensor([-1.5, 0.5], dtype=torch.float64)
    found = []
    for tokens in (drift, None):
        policy = ResponseLogps(*torch.tensor([[1.0, 2], [-1, 0], [0, 0]], dtype=torch.float64))
        policy = policy._replace(base=drift - 4)
        reference = ResponseLogps(*torch.zeros(3, 2, dtype=torch.float64) - 4)
        found.append(
            bapo_loss(
                policy,
                reference,
                ones,
                drift.square(),
                tokens,
                anchor_weight=0.3,
                anchor_loss=anchor_loss,
                anchor_reduction=reduction,
                anchor_placement=placement,
            )
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("placement", ["additive", "margin"])
@pytest.mark.parametrize("anchor_loss", ["hinge", "absolute", "squared"])
def test_gradcheck_on_tokens(anchor_loss, placement):
    drift = torch.tensor([-1.0, 2.0, -0.5, 0.25, -0.75], dtype=torch.float64, requires_grad=True)

    def loss(drift):
        return by_token(drift, anchor_loss=anchor_loss, anchor_placement=placement).loss

    assert torch.autograd.gradcheck(loss, (drift,))


def test_on_tokens_lengths_are_needed():
    with pytest.raises(ValueError, match="num_tokens is needed for .*token_drift"):
        by_token(TOKEN_DRIFT, tokens=None)
