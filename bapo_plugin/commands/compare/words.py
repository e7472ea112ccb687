"""What the numbers of a comparison say, in sentences, and not more than they say."""

from collections.abc import Sequence

from bapo_plugin.commands.compare.measures import Level, Measure

_SHORT = {
    "drift": "drift",
    "lost": "share lost",
    "worst_tenth": "worst tenth",
    "agreement": "likeliest token",
    "kl": "KL",
    "repetition": "repetition",
}


def conclusions(measures: Sequence[Measure], levels: Sequence[Level]) -> list[str]:
    """A sentence on taste and one on forgetting, where each was measured."""
    taste = [m for m in measures if m.of == "held-out pairs"]
    kept = [m for m in measures if m.of == "unrelated prompts"]
    kept = kept or [m for m in measures if m.of == "former answers"]
    found = []
    is_equal = not any(m.is_clear for m in taste)
    if taste:
        found.append(_taste(taste, is_equal))
    if not kept:
        return found
    margin = next((level for level in levels if level.of == "margin"), None)
    if not taste:
        found.append(f"Forgetting, with taste unknown: {_kept(kept)}")
    elif is_equal:
        found.append(f"Forgetting: {_kept(kept)}")
    elif margin:
        found.append(
            f"Forgetting at the equal margin of {margin.value:.2f} nats: {_kept(margin.measures)}"
        )
    else:
        found.append(
            f"Forgetting, as it stands and not at equal taste: {_kept(kept)} Who learned more tends to forget more."
        )
    return found


def _taste(taste: Sequence[Measure], is_equal: bool) -> str:
    if any(m.se is None for m in taste):
        return "Taste: from one pair nothing can be said."
    if is_equal:
        return (
            f"Taste: accuracy and margin of A and B differ by no more than two standard errors ({taste[0].n} pairs), so "
            "that what they have forgotten can be compared as it stands."
        )
    found = []
    for measure in (m for m in taste if m.is_clear):
        more = "higher" if measure.difference > 0 else "lower"
        size, error = abs(measure.difference), measure.se
        if measure.key == "accuracy":
            found.append(f"its accuracy is {100 * size:.0f} ± {100 * error:.0f} points {more}")
        else:
            found.append(f"its margin is {size:.2f} ± {error:.2f} nats {more}")
    return f"Taste: B differs from A: {' and '.join(found)}. So compare forgetting at equal margin."


def _kept(measures: Sequence[Measure]) -> str:
    if any(m.se is None for m in measures):
        return "from one prompt nothing can be said."
    better, worse = (
        [_SHORT.get(m.key.rpartition(".")[2], m.key) for m in measures if m.is_clear and m.gain * sign > 0]
        for sign in (1, -1)
    )  # fmt: skip
    if not better and not worse:
        return f"no difference beyond two standard errors ({measures[0].n} prompts)."
    parts = [f"B is better in {', '.join(better)}"] if better else []
    parts += [f"{'' if better else 'B is '}worse in {', '.join(worse)}"] if worse else []
    return f"{' and '.join(parts)}; the rest is within two standard errors."
