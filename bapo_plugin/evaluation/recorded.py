"""What bapo-eval.json says of pairs and of former answers: means with errors, and the number of each row.

Rows carry digests of what was asked, so that `bapo compare` compares runs on the same rows and on no others. A column of
`rows` is one number a row, and its mean is the measure of the same name.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bapo_plugin.answers.prompts import FormerAnswer
from bapo_plugin.scoring.retention import Retention, mean_and_error

_NGRAM = 4


def digest(*parts: Any) -> str:
    """Of what was asked: token ids or text."""
    text = json.dumps(parts, default=list)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def repetition(ids: Sequence[int]) -> float:
    """Share of an answer's 4-grams of tokens that it has said before: 1 − distinct / all.

    It is seq-rep-4 of Welleck et al. 2020 (arXiv 1908.04319). An answer of fewer than four tokens repeats nothing.
    """
    grams = [tuple(ids[i : i + _NGRAM]) for i in range(len(ids) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def recorded_pairs(
    rows: Sequence[Mapping[str, Any]], margins: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Of held-out pairs.

    Args:
        rows: with prompt_ids, chosen_ids, rejected_ids.
        margins: adapter -> margin of each row, nats, [n].
    """
    columns = {
        name: {"accuracy": (m > 0).double().tolist(), "margin": m.tolist()}
        for name, m in margins.items()
    }
    return {
        "pairs": len(rows),
        "after": {
            name: {key: mean_and_error(values) for key, values in own.items()}
            for name, own in columns.items()
        },
        "rows": {
            "id": [digest(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in rows],
            "after": columns,
        },
    }


def recorded_answers(
    answers: Sequence[FormerAnswer],
    retention: Mapping[str, Retention],
    after: Mapping[str, Sequence[Sequence[int]]],
) -> dict[str, Any]:
    """Of former answers.

    Args:
        answers: those of the model before training.
        retention: adapter -> what it has kept of them.
        after: adapter -> its own answers to the same prompts, token ids, where it was asked for all. With none, nothing is
            said of repetition.
    """
    before = [repetition(answer.answer_ids) for answer in answers]
    found: dict[str, Any] = {
        "prompts": len(answers),
        "tokens": sum(len(answer.answer_ids) for answer in answers),
        "before": _repetition(before) if after else {},
        "after": {name: kept.summary() for name, kept in retention.items()},
        "rows": {
            "prompt": [digest(answer.prompt_ids) for answer in answers],
            "answer": [digest(answer.answer_ids) for answer in answers],
            "before": {"repetition": before} if after else {},
            "after": {
                name: {
                    "drift": kept.drift.tolist(),
                    "lost": kept.lost.double().tolist(),
                    "agreement": kept.agreement.tolist(),
                    "kl": kept.kl.tolist(),
                }
                for name, kept in retention.items()
            },
        },
    }
    for name, own in after.items():
        values = [repetition(ids) for ids in own]
        found["rows"]["after"][name]["repetition"] = values
        summary, at_start = _repetition(values), found["before"]
        change = mean_and_error([b - a for a, b in zip(before, values, strict=True)])
        for key, number in summary.items():
            # the worst tenths are of different answers, so that their difference has no paired error
            error = change["se"] if key == "repetition" else None
            number["difference"] = number["value"] - at_start[key]["value"]
            number["difference_se"] = error
        found["after"][name] |= summary
    return found


def _repetition(values: Sequence[float]) -> dict[str, dict[str, float | None]]:
    """Mean over answers, and of the tenth that repeats itself most."""
    worst = sorted(values)[-math.ceil(len(values) / 10) :]
    return {
        "repetition": mean_and_error(values),
        "repetition_worst_tenth": mean_and_error(worst),
    }
