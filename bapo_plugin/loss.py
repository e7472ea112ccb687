"""The BAPO loss, as pure functions of log-probabilities. Start reading here.

Symbols (all log-probabilities in nats, summed over the tokens of a response; n preference rows):

    y_w, y_l, y_b   chosen, rejected and base response; the base response is what the reference
                    model itself answered to the prompt before training
    Δ_r             log π_θ(y_r|x) − log π_ref(y_r|x): how far the policy drifted on response r
    δ = Δ_w − Δ_l   the margin; every supported preference loss is a function of δ alone

    L(θ) = L_pref(δ) + λ · mean A(Δ_b)           anchor_placement="additive"   (default)
    L(θ) = L_pref(δ − λ · A(Δ_b))                anchor_placement="margin"     (as in DPOP)

    A(Δ) = max(0, −Δ)  "hinge" (default)  |  |Δ|  "absolute"  |  Δ²  "squared"  |  −log π_θ(y_b|x)  "nll"
           |  Σ_t KL( π_ref(·|x, y_b<t) ‖ π_θ(·|x, y_b<t) )  "kl"

    anchor_level="response":         A(Δ_b), of the whole response, as the paper's anchor is reported
    anchor_level="token" (default):  Σ_t A(Δ_t), over its tokens; Δ_b = Σ_t Δ_t

The preference loss pulls the policy to the user's taste; the anchor A holds the likelihood of the
model's own former answer to what it was, or with "kl" its whole distribution at each of the answer's
tokens: for an answer drawn from π_ref the mean of −Δ_b *is* that divergence, so the others are
estimates of it from one sample. All forms but "nll" have zero gradient at θ = θ_ref: the anchor acts
only once the policy has drifted (in 16 bits a token's log-prob is rounded by some 0.03 nats, and what
is lost by rounding pulls too). On tokens the hinge says: no token of the former answer may become
less likely. On the whole response, tokens that become likelier pay for others that are forgotten,
and the answer's likelihood stays while its distribution goes.

What is the paper's and what is ours: two independent summaries of the paper describe an additive term
λ · L_Anchor beside the DPO loss, which holds the base response's probability to the reference's.
Neither says whether it is one-sided. So the additive placement is as they report the paper's, and the
form of A is an option; its default, the hinge on tokens, is ours.

Sources: BAPO, Lee et al., Findings of EMNLP 2024 (arXiv 2407.00693); DPO, Rafailov et al. 2023
(2305.18290); IPO, Azar et al. 2023 (2310.12036); robust DPO, Chowdhury et al. 2024 (2403.00409);
EXO, Ji et al. 2024 (2402.00856); SLiC hinge, Zhao et al. 2023 (2305.10425); margin placement: DPOP,
Pal et al. 2024 (2402.13228).

Example:
    >>> import torch
    >>> policy = ResponseLogps(torch.tensor([-9.0]), torch.tensor([-12.0]), torch.tensor([-7.0]))
    >>> reference = ResponseLogps(torch.tensor([-10.0]), torch.tensor([-11.0]), torch.tensor([-5.0]))
    >>> out = bapo_loss(policy, reference, beta=0.1, anchor_weight=0.1)
    >>> # margin 2 nats: -log σ(0.1·2) = 0.5981; base drifted by -2 nats: 0.1·2 = 0.2
    >>> [round(x.item(), 4) for x in (out.preference, out.anchor, out.loss)]
    [0.5981, 0.2, 0.7981]
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

AnchorLoss = Literal["hinge", "absolute", "squared", "nll", "kl"]
AnchorLevel = Literal["token", "response"]
AnchorReduction = Literal["sum", "mean"]
AnchorPlacement = Literal["additive", "margin"]
PreferenceLoss = Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair"]

ANCHOR_LOSSES: tuple[str, ...] = get_args(AnchorLoss)
# the forms that differ between tokens and response; "nll" and "kl" are sums over tokens in any case
TOKEN_LOSSES: tuple[str, ...] = ("hinge", "absolute", "squared")
ANCHOR_PLACEMENTS: tuple[str, ...] = get_args(AnchorPlacement)
ANCHOR_REDUCTIONS: tuple[str, ...] = get_args(AnchorReduction)
PREFERENCE_LOSSES: tuple[str, ...] = get_args(PreferenceLoss)
# The preference losses in which label smoothing (the share of flipped labels) has a meaning.
SMOOTHED_LOSSES: tuple[str, ...] = ("sigmoid", "robust", "exo_pair")


class ResponseLogps(NamedTuple):
    """One number per row for each of the three responses: log-probs (nats) or token counts.

    Fields: `chosen`, `rejected`, `base`, each of shape [n].
    """

    chosen: Tensor
    rejected: Tensor
    base: Tensor


class BAPOLoss(NamedTuple):
    """What `bapo_loss` returns, per row (shape [n]), so that the caller decides how to average.

    `loss` carries the gradient and always equals `preference + anchor`. `active` is 1.0 where the
    anchor pulls (its gradient is not zero), else 0.0; by tokens, the share of the response's tokens where it does.
    """

    loss: Tensor
    preference: Tensor
    anchor: Tensor
    active: Tensor


def preference_loss(
    margin: Tensor, loss_type: str, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Preference loss per row, as a function of the margin δ = Δ_w − Δ_l.

    Args:
        margin: [n], nats. For "ipo" and "sigmoid_norm" the difference of the *per-token means* of
            Δ_w and Δ_l (as in TRL); see `bapo_loss`, which chooses.
        loss_type: one of `PREFERENCE_LOSSES`.
        beta: β > 0, the inverse temperature; for "ipo" it is τ of the paper's eq. 17.
        label_smoothing: probability ε in [0, 0.5) that a label is flipped. "sigmoid" becomes
            conservative DPO, "robust" its unbiased form; "exo_pair" needs ε > 0.

    Raises:
        ValueError: unknown `loss_type`, or a `label_smoothing` the loss has no meaning for.
    """
    if loss_type not in PREFERENCE_LOSSES:
        raise ValueError(
            f"loss_type {loss_type!r} is not a function of the margin of a pair; possible are "
            f"{', '.join(PREFERENCE_LOSSES)}"
        )
    if label_smoothing and loss_type not in SMOOTHED_LOSSES:
        raise ValueError(
            f"label_smoothing={label_smoothing} has no meaning for loss_type {loss_type!r}; it is "
            f"defined for {', '.join(SMOOTHED_LOSSES)}"
        )
    z = beta * margin
    if loss_type == "hinge":
        return torch.relu(1 - z)
    if loss_type == "ipo":
        return (margin - 1 / (2 * beta)) ** 2

    keep, flip = -F.logsigmoid(z), -F.logsigmoid(-z)  # the losses if the label is right / flipped
    eps = label_smoothing
    if loss_type == "robust":
        return ((1 - eps) * keep - eps * flip) / (1 - 2 * eps)
    if loss_type == "exo_pair":
        if not 0 < eps < 1:
            raise ValueError(
                "loss_type 'exo_pair' needs label_smoothing > 0 (the EXO paper recommends 1e-3)"
            )
        log_p = torch.log(torch.tensor([1 - eps, eps], dtype=z.dtype, device=z.device))
        return torch.sigmoid(z) * (-keep - log_p[0]) + torch.sigmoid(-z) * (-flip - log_p[1])
    return (1 - eps) * keep + eps * flip  # sigmoid, sigmoid_norm


def anchor_penalty(
    drift: Tensor, policy_logps: Tensor, anchor_loss: str, divergence: Tensor | None = None
) -> Tensor:
    """A(Δ_b) per row, not yet weighted.

    Args:
        drift: Δ_b, [n], nats (per response, or per token with anchor_reduction="mean"), or Δ_t of tokens, [T].
        policy_logps: log π_θ(y_b|x), [n], in the same unit; only "nll" reads it.
        anchor_loss: one of `ANCHOR_LOSSES`.
        divergence: KL(π_ref ‖ π_θ) over the base response's tokens, [n], in the same unit; only "kl"
            reads it.

    Raises:
        ValueError: unknown `anchor_loss`, or "kl" without `divergence`.
    """
    if anchor_loss == "hinge":
        return torch.relu(-drift)
    if anchor_loss == "absolute":
        return drift.abs()
    if anchor_loss == "squared":
        return drift.square()
    if anchor_loss == "nll":
        return -policy_logps
    if anchor_loss == "kl":
        if divergence is None:
            raise ValueError("anchor_loss 'kl' needs `divergence`")
        return divergence
    raise ValueError(f"anchor_loss {anchor_loss!r} is not one of {', '.join(ANCHOR_LOSSES)}")


def bapo_loss(
    policy: ResponseLogps,
    reference: ResponseLogps,
    num_tokens: ResponseLogps | None = None,
    divergence: Tensor | None = None,
    token_drift: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    anchor_weight: float | Tensor = 0.1,
    anchor_loss: str = "hinge",
    anchor_reduction: str = "sum",
    anchor_placement: str = "additive",
    slack: float = 0.0,
) -> BAPOLoss:
    """BAPO loss of n preference rows. With `anchor_weight=0` it is DPO.

    Args:
        policy: log π_θ of chosen, rejected, base response: 3 × [n], nats, summed over tokens.
        reference: log π_ref of the same, without gradient.
        num_tokens: response lengths in tokens, 3 × [n]; needed by "ipo", "sigmoid_norm" and
            `anchor_reduction="mean"`, which divide by them.
        divergence: KL(π_ref ‖ π_θ) of the base responses, [n], nats, summed over tokens; needed by
            `anchor_loss="kl"`.
        token_drift: Δ_t = log π_θ − log π_ref of each token of the base responses, row by row, [T] with T =
            num_tokens.base.sum(), nats. Where it is given, "hinge", "absolute" and "squared" are summed over the
            tokens (anchor_level: token), which needs `num_tokens`; else they are of the whole response.
        beta, loss_type, label_smoothing: see `preference_loss`; several loss types are summed with
            `loss_weights` (default 1 each).
        anchor_weight: λ ≥ 0, a number or a scalar on the same device.
        anchor_loss: one of `ANCHOR_LOSSES`.
        anchor_reduction: "sum" anchors the whole response, "mean" the mean over its tokens.
        anchor_placement: "additive", or "margin", which subtracts λ·A from the margin inside the
            preference loss. "nll" is not zero at θ_ref and therefore only additive.
        slack: what a base response (or each of its tokens) may lose, or with "kl" differ, nats a token, before
            the anchor pulls: A sees only what is beyond it. Needs `num_tokens`; not for "nll".

    Raises:
        ValueError: unknown names, a negative weight, or `num_tokens` missing where it is needed.
    """
    loss_types = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    weights = [1.0] * len(loss_types) if loss_weights is None else list(loss_weights)
    if len(weights) != len(loss_types):
        raise ValueError(f"{len(loss_types)} loss types but {len(weights)} loss_weights")
    if not isinstance(anchor_weight, Tensor) and anchor_weight < 0:
        raise ValueError(f"anchor_weight must be >= 0, got {anchor_weight}")
    if anchor_reduction not in ANCHOR_REDUCTIONS or anchor_placement not in ANCHOR_PLACEMENTS:
        raise ValueError(
            f"anchor_reduction {anchor_reduction!r} must be one of {ANCHOR_REDUCTIONS} and "
            f"anchor_placement {anchor_placement!r} one of {ANCHOR_PLACEMENTS}"
        )
    if anchor_placement == "margin" and anchor_loss == "nll":
        raise ValueError("anchor_loss 'nll' can't be placed in the margin; use 'additive'")
    per_token = anchor_reduction == "mean" or not {"ipo", "sigmoid_norm"}.isdisjoint(loss_types)
    by_token = token_drift is not None and anchor_loss in TOKEN_LOSSES
    if (per_token or slack or by_token) and num_tokens is None:
        raise ValueError(
            "num_tokens is needed for ipo, sigmoid_norm, anchor_reduction='mean', slack and token_drift"
        )

    # Δ of the three responses, each [n]
    chosen, rejected, base = (p - r for p, r in zip(policy, reference, strict=True))
    policy_base = policy.base
    if anchor_reduction == "mean":
        length = num_tokens.base.clamp(min=1)
        base, policy_base = base / length, policy_base / length
        divergence = None if divergence is None else divergence / length
    if slack:
        room = slack if anchor_reduction == "mean" else slack * num_tokens.base.to(base.dtype)
        base = _beyond(base, room)
        token_drift = None if token_drift is None else _beyond(token_drift, slack)
        divergence = None if divergence is None else torch.relu(divergence - room)
    if by_token:
        each = anchor_penalty(token_drift, token_drift, anchor_loss)  # [T]
        distance = per_response(each, num_tokens.base)
        if anchor_reduction == "mean":
            distance = distance / length
    else:
        distance = anchor_penalty(base, policy_base, anchor_loss, divergence)
    penalty = anchor_weight * distance  # [n]

    preference = torch.zeros_like(chosen)
    shifted = torch.zeros_like(chosen)
    for name, weight in zip(loss_types, weights, strict=True):
        if name in ("ipo", "sigmoid_norm"):
            margin = chosen / num_tokens.chosen.clamp(min=1) - rejected / num_tokens.rejected.clamp(
                min=1
            )
        else:
            margin = chosen - rejected
        options = {"beta": beta, "label_smoothing": label_smoothing}
        preference = preference + weight * preference_loss(margin, name, **options)
        if anchor_placement == "margin":
            shifted = shifted + weight * preference_loss(margin - penalty, name, **options)
    loss = shifted if anchor_placement == "margin" else preference + penalty

    if not isinstance(anchor_weight, Tensor) and anchor_weight == 0:
        active = torch.zeros_like(base)
    elif anchor_loss == "nll":
        active = torch.ones_like(base)
    elif by_token:
        active = per_response((each > 0).to(base.dtype), num_tokens.base)
        active = active / num_tokens.base.clamp(min=1)
    elif anchor_loss == "kl":
        active = (divergence > 0).to(base.dtype)
    else:
        active = ((base < 0) if anchor_loss == "hinge" else (base != 0)).to(base.dtype)
    # loss = preference + anchor holds exactly in both placements
    return BAPOLoss(loss, preference.detach(), (loss - preference).detach(), active.detach())


def per_response(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums over the tokens of each response.

    Args:
        values: [T], one a token, response by response.
        lengths: [n], tokens of each response; T is their sum.
    """
    lengths = lengths.to(values.device)
    if values.device.type in ("cpu", "cuda"):
        # in one order, so that a run can be repeated to the bit
        return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True, initial=0)
    index = torch.arange(len(lengths), device=values.device)
    owner = torch.repeat_interleave(index, lengths, output_size=len(values))
    return values.new_zeros(len(lengths)).index_add(0, owner, values)


def _beyond(drift: Tensor, room: Tensor | float) -> Tensor:
    """What of a drift is further from 0 than `room`."""
    return torch.where(drift < 0, (drift + room).clamp_max(0), (drift - room).clamp_min(0))
