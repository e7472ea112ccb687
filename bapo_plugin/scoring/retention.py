"""How much of a model is left: what it makes of its own former answers, on prompts outside training.

For a prompt x and the answer y that the reference model gave to it, before training:

    drift       log π_θ(y|x) − log π_ref(y|x), nats, summed over the answer's tokens
    agreement   share of y's tokens at which both models hold the same token most likely
    kl          KL(π_ref ‖ π_θ) of the next token, nats, mean over y's tokens

A model that forgot nothing has 0, 1 and 0. Gains of some answers make up for losses of others in a mean drift, so two more
numbers say what was lost: the share of answers that lost more than 2 nats (they are less than 1/7 as likely as before), and
the mean drift of the worst tenth. An answer without a finite drift, of a broken model, is lost. `bapo.retention` logs them in training, `bapo eval` measures a
finished run.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bapo_plugin.answers.prompts import FormerAnswer
from bapo_plugin.scoring.collator import pad_sequences

# a batch keeps [tokens × vocabulary] log-probs of two models, in fp32
_LOGITS_BYTES = 256 * 2**20

# nats: an answer that drifted below has become less than 1/7 as likely
LOST = -2.0

# batch -> logits of its response tokens, [T, V] fp32; see `forward.response_logits`
Scorer = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Retention:
    """One number for each former answer, [n] fp64 each; `tokens` are those of the answers."""

    tokens: Tensor
    drift: Tensor
    agreement: Tensor
    kl: Tensor

    def summary(self) -> dict[str, dict[str, float]]:
        """name -> {"value": mean over answers, "se": its standard error}: drift (nats an answer),
        drift_per_token (nats), lost (share of answers with a drift below -2 nats), worst_tenth (mean drift of
        the worst tenth, nats), agreement (share), kl (nats a token)."""
        drift = self.drift.where(
            self.drift.isfinite(), -math.inf
        )  # NaN would be sorted as the best
        parts = {
            "drift": self.drift,
            "drift_per_token": self.drift / self.tokens,
            "lost": self.lost.double(),
            "worst_tenth": drift.sort().values[: math.ceil(len(drift) / 10)],
            "agreement": self.agreement,
            "kl": self.kl,
        }
        return {name: mean_and_error(values) for name, values in parts.items()}

    @property
    def lost(self) -> Tensor:
        """Which answers are, [n] bool."""
        return ~((self.drift >= LOST) & self.drift.isfinite())

    def part(self, which: slice) -> "Retention":
        """Of some of the answers."""
        return Retention(*(values[which] for values in vars(self).values()))


def mean_and_error(values: Tensor | Sequence[float]) -> dict[str, float | None]:
    """Mean and its standard error; None as the error of a single value."""
    values = torch.as_tensor(values, dtype=torch.float64)
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return {"value": float(values.mean()), "se": error}


def measure(
    answers: Sequence[FormerAnswer],
    reference: Scorer,
    policies: Mapping[str, Scorer],
    *,
    pad_token_id: int,
    vocab_size: int,
    device: torch.device,
    on_answers: Callable[[int], None] = lambda n: None,
) -> dict[str, Retention]:
    """Compare policies with the reference on its former answers, without gradients.

    Args:
        answers: none of them empty.
        reference, policies: give the logits; called in turns, so one model with adapters will do.
        pad_token_id: fills rows up; masked.
        vocab_size: to choose batches that fit into memory.
        device: where the models are.
        on_answers: told how many more answers are done.

    Returns:
        name of the policy -> its `Retention`, in the order of `answers`.
    """
    found: dict[str, dict[int, tuple[float, float, float]]] = {name: {} for name in policies}
    for part in _batches(answers, vocab_size):
        rows = [answers[i] for i in part]
        batch = pad_sequences(
            [row.prompt_ids for row in rows], [row.answer_ids for row in rows], pad_token_id
        )
        batch = {key: value.to(device) for key, value in batch.items()}
        labels, bounds = batch["response_labels"][:, None], batch["cu_seqlens"].tolist()
        with torch.no_grad():
            ref = torch.log_softmax(reference(batch), dim=-1)  # [T, V]
            ref_logps, ref_best = ref.gather(1, labels)[:, 0], ref.argmax(-1)
            for name, policy in policies.items():
                logps = torch.log_softmax(policy(batch), dim=-1)
                drift = logps.gather(1, labels)[:, 0] - ref_logps
                same = (logps.argmax(-1) == ref_best).cpu().double()
                kl = (ref.exp() * (ref - logps)).sum(-1).cpu().double()
                drift = drift.cpu().double()  # not every device has 64 bits
                for k, i in enumerate(part):
                    own = slice(bounds[k], bounds[k + 1])
                    found[name][i] = (
                        float(drift[own].sum()),
                        float(same[own].mean()),
                        float(kl[own].mean()),
                    )
        on_answers(len(part))
    tokens = torch.tensor([len(answer.answer_ids) for answer in answers], dtype=torch.float64)
    out = {}
    for name, rows in found.items():
        columns = torch.tensor([rows[i] for i in range(len(answers))], dtype=torch.float64)
        out[name] = Retention(tokens, *columns.T)
    return out


def _batches(answers: Sequence[FormerAnswer], vocab_size: int) -> Iterator[list[int]]:
    """Indices of answers of similar length, within the memory for logits."""
    most = max(1, _LOGITS_BYTES // (4 * vocab_size))
    part: list[int] = []
    tokens = 0
    for i in sorted(
        range(len(answers)), key=lambda i: len(answers[i].prompt_ids) + len(answers[i].answer_ids)
    ):
        more = len(answers[i].answer_ids)
        if part and tokens + more > most:
            yield part
            part, tokens = [], 0
        part.append(i)
        tokens += more
    if part:
        yield part
