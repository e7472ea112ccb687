"""How large a run may be, or what would make it fit: the same estimate, other settings."""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bapo_plugin.planning.estimate import Planner
from bapo_plugin.planning.settings import RunSettings

_MOST_ROWS = 256
_RANKS = [2**n for n in range(11)]


class Change(NamedTuple):
    """Keys of the YAML with their values, and bytes that the run needs with them."""

    keys: dict[str, Any]
    total: int


def with_keys(settings: RunSettings, keys: dict[str, Any]) -> RunSettings:
    """The run with keys of its YAML changed; those of `bapo.` too."""
    fields: dict[str, Any] = {}
    for key, value in keys.items():
        if key == "bapo.tokens_per_batch":
            fields["bapo"] = settings.bapo.model_copy(update={"tokens_per_batch": value})
        elif key == "gradient_checkpointing":
            fields["checkpointing"] = value
        elif key == "load_in_4bit":
            fields["bits"] = 4
        elif key == "lora_r":
            fields["adapter"] = settings.adapter | {"r": value}
        elif key in ("sequence_len", "micro_batch_size"):
            fields[key] = value
    return dataclasses.replace(settings, **fields)


def largest(planner: Planner, settings: RunSettings, room: int) -> list[Change]:
    """How far each key may go alone, of a run that fits.

    Args:
        room: bytes of the card.
    """
    found = []
    for key, values in _ways_up(planner, settings).items():
        best = _last_that_fits(planner, settings, room, key, values)
        if best is not None and best.keys[key] > values[0]:
            found.append(best)
    return found


def remedies(planner: Planner, settings: RunSettings, room: int) -> list[Change]:
    """What would let a run fit: each change alone, or, where none suffices, the gentlest together.

    Args:
        room: bytes of the card.
    """
    switches = _switches(settings)
    found = []
    for keys in switches:
        total = planner.bapo(with_keys(settings, keys)).total
        if total <= room:
            found.append(Change(keys, total))
    for key, values in _ways_down(planner, settings).items():
        best = _last_that_fits(planner, settings, room, key, values)
        if best is not None:
            found.append(best)
    if found:
        return found
    together: dict[str, Any] = {k: v for keys in switches for k, v in keys.items()}
    if settings.micro_batch_size > 1:
        together["micro_batch_size"] = 1
    smaller = with_keys(settings, together)
    total = planner.bapo(smaller).total
    if together and total <= room:
        return [Change(together, total)]
    for key, values in _ways_down(planner, smaller).items():
        best = _last_that_fits(planner, smaller, room, key, values)
        if best is not None:
            return [Change(together | best.keys, best.total)]
    return []


def _switches(settings: RunSettings) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if not settings.checkpointing:
        found.append({"gradient_checkpointing": True})
    if settings.adapter and settings.bits > 4:
        found.append({"load_in_4bit": True, "adapter": "qlora"})
    return found


def _ways_up(planner: Planner, settings: RunSettings) -> dict[str, Sequence[int]]:
    shared = planner.rehearsal(settings).padded_because is None
    ways: dict[str, Sequence[int]] = {}
    if settings.bapo.tokens_per_batch and shared:
        start = settings.bapo.tokens_per_batch
        ways["bapo.tokens_per_batch"] = _multiples(start, 64 * start)
    else:
        ways["micro_batch_size"] = range(settings.micro_batch_size, _MOST_ROWS + 1)
    if settings.prompt_tokens is None and settings.response_tokens is None:
        most = getattr(planner.config, "max_position_embeddings", None) or 2**17
        ways["sequence_len"] = _multiples(settings.sequence_len, most)
    if settings.adapter:
        ways["lora_r"] = [r for r in _RANKS if r >= settings.adapter["r"]]
    return ways


def _ways_down(planner: Planner, settings: RunSettings) -> dict[str, Sequence[int]]:
    """Values from small to large, below those of the run."""
    prompt, response = settings.row
    shared = planner.rehearsal(settings).padded_because is None
    ways: dict[str, Sequence[int]] = {}
    rows = settings.micro_batch_size
    if rows > 1 and shared:
        row = prompt + 3 * response
        most = min(rows * row, settings.bapo.tokens_per_batch or rows * row) - 1
        ways["bapo.tokens_per_batch"] = [row, *_multiples(row, most)[1:]] if most > row else []
    if rows > 1:
        ways["micro_batch_size"] = range(1, rows)
    if settings.prompt_tokens is None and settings.response_tokens is None:
        ways["sequence_len"] = _multiples(64, settings.sequence_len - 1)
    if settings.adapter:
        ways["lora_r"] = [r for r in _RANKS if 4 <= r < settings.adapter["r"]]
    return ways


def _multiples(low: int, high: int) -> Sequence[int]:
    """From `low` in steps that become coarser with it."""
    step = 64 if high <= 1024 else 256
    first = -(-(low + 1) // step) * step
    return [low, *range(first, high + 1, step)] if low <= high else []


def _last_that_fits(
    planner: Planner, settings: RunSettings, room: int, key: str, values: Sequence[int]
) -> Change | None:
    """The largest value with which a run fits; memory grows with every value."""

    found: dict[int, int] = {}

    def total(i: int) -> int:
        if i not in found:
            found[i] = planner.bapo(with_keys(settings, {key: values[i]})).total
        return found[i]

    i = last_within(total, room, len(values), [float(v) for v in values])
    return None if i is None else Change({key: values[i]}, total(i))


def last_within(total: Callable[[int], int], room: int, n: int, at: Sequence[float]) -> int | None:
    """The last index whose total is within `room`; None where there is none.

    Totals grow with the index, nearly straight in `at`, so that a line through two of them leads near.

    Args:
        total: index -> bytes.
        room: bytes.
        n: how many there are.
        at: what the totals are nearly straight in.
    """
    if n == 0 or total(0) > room:
        return None
    low, high = 0, None
    probe = 1
    while high is None:
        if probe >= n:
            if low == n - 1:
                return low
            probe = n - 1
        if total(probe) > room:
            high = probe
        else:
            low, probe = probe, _meeting(total, room, at, 0, probe) + 1
            probe = max(probe, low + 1)
    while high - low > 1:
        middle = _meeting(total, room, at, low, high)
        middle = min(max(middle, low + 1), high - 1)
        if total(middle) <= room:
            low = middle
            # the line may stay below for long: look just above too
            if high - low > 1 and total(low + 1) > room:
                return low
        else:
            high = middle
    return low


def _meeting(total: Callable[[int], int], room: int, at: Sequence[float], i: int, j: int) -> int:
    """The index at which the line through two totals comes to `room`, cut off at both ends."""
    slope = (total(j) - total(i)) / (at[j] - at[i])
    if slope <= 0:
        return len(at) - 1
    value = at[i] + (room - total(i)) / slope
    return bisect.bisect_right(at, value) - 1
