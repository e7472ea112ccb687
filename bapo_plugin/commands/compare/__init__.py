"""What `bapo compare` does: which of two runs is better, from what `bapo eval` has written of them. No model is loaded.

file.py       what is read of a bapo-eval.json
results.py    one adapter's results, and whether two were measured on the same
measures.py   differences with paired errors, as they are and at equal margin and accuracy
remedy.py     the `bapo eval` command that makes two runs comparable
words.py      what the numbers say, in sentences
shown.py      the screen, and JSON
"""

import math
from collections.abc import Sequence
from typing import TextIO

from bapo_plugin.commands.compare.file import PARTS, NotMeasured
from bapo_plugin.commands.compare.measures import (
    Level,
    Measure,
    at_equal,
    has_curve,
    tasks,
    taste_and_forgetting,
)
from bapo_plugin.commands.compare.remedy import SCALES, eval_command
from bapo_plugin.commands.compare.results import (
    Result,
    others,
    read_result,
    split_target,
    start_from_different_models,
)
from bapo_plugin.commands.compare.shown import Comparison, print_comparison, print_settings
from bapo_plugin.commands.compare.shown import write_json as write_json
from bapo_plugin.report.read import read_settings
from bapo_plugin.report.tables import differences

NAMES = ("A", "B")
BELOW = 1  # exit code
_ROUNDING = 1e-9
# where a run lies, which differs between any two
_PLACES = ("output_dir", "dataset_prepared_path", "axolotl_config_path")
# what decides which rows are held out: the last ones, after shuffling
_DATA = ("datasets", "test_datasets", "val_set_size", "seed", "shuffle_merged_datasets", "rows.")


def compare(targets: Sequence[str], limits: Sequence[str] = (), out: TextIO | None = None) -> int:
    """Compare B with A.

    Args:
        targets: A and B, each the folder of a run, or a bapo-eval.json; `:ADAPTER` behind it says which of several.
        limits: of `--fail-below`, NAME=VALUE each.
        out: JSON goes there, and nothing to the screen.

    Returns:
        The exit code: 0, or 1 where B falls below one of the limits.

    Raises:
        ValueError: a run wasn't measured, or on something else; says which `bapo eval` mends it. On the screen the
            settings come first.
    """
    least = read_limits(limits)
    places = [split_target(target) for target in targets]
    found: list[Result | NotMeasured] = []
    for place in places:
        try:
            found.append(read_result(*place))
        except NotMeasured as error:
            found.append(error)
    folders = [
        result.folder if isinstance(result, Result) else path
        for result, (path, _) in zip(found, places, strict=True)
    ]
    if folders[0].resolve() == folders[1].resolve() and _same(found):
        raise ValueError(f"A and B are the same adapter ({folders[0]}); name two")
    runs = [read_settings(f, name) for f, name in zip(folders, NAMES, strict=True) if f.is_dir()]
    known, settings = differences(runs)
    settings = [(key, values) for key, values in settings if key not in _PLACES]
    if out is None:
        print_settings(targets, known, settings)
    a, b = _comparable(found, folders)
    measures = taste_and_forgetting(a, b)
    measures += tasks(a, b)
    levels = at_equal(a, b) if has_curve(a) and has_curve(b) else []
    every = [*measures, *(m for level in levels for m in level.measures)]
    failed = _below(every, least)
    comparison = Comparison(
        a=a,
        b=b,
        known=known,
        settings=settings,
        measures=measures,
        levels=levels,
        notes=_notes(a, b, [key for key, _ in settings], levels),
        limits=least,
        failed=failed,
    )
    if out is None:
        print_comparison(comparison)
    else:
        write_json(comparison, out)
    return BELOW if failed else 0


def read_limits(texts: Sequence[str]) -> dict[str, float]:
    """NAME=VALUE each.

    Raises:
        ValueError: another form, no finite number, or a name twice.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not name or not math.isfinite(number):
            raise ValueError(
                f"--fail-below: {text!r} must be NAME=VALUE with a number, such as --fail-below accuracy=-0.02"
            )
        if name in found:
            raise ValueError(f"--fail-below: {name} is there twice; name it once")
        found[name] = number
    return found


def _below(measures: Sequence[Measure], least: dict[str, float]) -> list[str]:
    """Names of limits that B falls below.

    Raises:
        ValueError: a name that this comparison hasn't.
    """
    gains = {measure.key: measure.gain for measure in measures}
    if unknown := [name for name in least if name not in gains]:
        raise ValueError(
            f"--fail-below: {', '.join(unknown)} isn't measured here; what is: {', '.join(gains)}"
        )
    # 0.98 is two points less than 1, up to rounding
    return [name for name, value in least.items() if gains[name] < value - _ROUNDING]


def _same(found: Sequence[Result | NotMeasured]) -> bool:
    a, b = found
    return not (isinstance(a, Result) and isinstance(b, Result)) or a.name == b.name


def _comparable(found: Sequence[Result | NotMeasured], folders: Sequence) -> tuple[Result, Result]:
    """
    Raises:
        NotMeasured: one has no results, or they were measured on other things.
    """
    results = [result for result in found if isinstance(result, Result)]
    reasons = [str(error) for error in found if not isinstance(error, Result)]
    command = eval_command(folders, results)
    if not reasons:
        a, b = results
        if start_from_different_models(a, b):
            raise NotMeasured(
                f"A was trained from {a.found.model}, B from {b.found.model}: what each has forgotten is its own model's. No command "
                "makes that comparable; tasks of lm-eval, run on each, are"
            )
        reasons = list(others(a, b))
        if not any(a.has(part) and b.has(part) for part in PARTS) and not a.task_keys & b.task_keys:
            reasons.append("A and B have no measurement in common")
    if reasons:
        raise NotMeasured(
            f"A and B can't be compared. {'. '.join(reasons)}. This measures both on the same: {command}"
        )
    a, b = results
    return a, b


def _notes(a: Result, b: Result, differing: Sequence[str], levels: Sequence[Level]) -> list[str]:
    """What is missing and, on a line of its own, the command to get it; what to beware of."""
    notes = []
    folders = [a.folder, b.folder]
    command = eval_command(folders, [a, b])
    for part, of in PARTS.items():
        has = [result.has(part) for result in (a, b)]
        if all(has) or (part == "retention" and not any(has)):
            continue
        whose = f"only {NAMES[has.index(True)]} was measured" if any(has) else "none was measured"
        if part == "pairs":
            whose += "; they are the held-out rows of a BAPO run (val_set_size or test_datasets)"
            mends = eval_command(folders, [a, b], pairs=True)
        else:
            mends = command
        notes.append(f"{of.capitalize()} are missing: {whose}.\n{mends}")
    if alone := sorted(a.task_keys ^ b.task_keys):
        notes.append(f"Only one has been asked {', '.join(alone)}.\n{command}")
    if not (has_curve(a) and has_curve(b)) and a.has("pairs") and b.has("pairs"):
        scaled = eval_command(folders, [a, b], scales=SCALES)
        notes.append(f"For forgetting at equal margin and accuracy:\n{scaled}")
    notes += [note for level in levels if level.of == "margin" for note in _too_weak(a, b, level)]
    if a.has("pairs") and b.has("pairs") and any(key.startswith(_DATA) for key in differing):
        notes.append(
            "The runs' data differ: a held-out pair of one may have been in the other's training, which flatters that one. "
            "Where that may be, hold the same rows out of both (test_datasets)."
        )
    weights = [result.found.weights.get(result.name) for result in (a, b)]
    if (
        weights[0]
        and weights[0] == weights[1]
        and {a.name, b.name}.isdisjoint({*a.found.scales, *b.found.scales})
    ):
        notes.append("A and B have the very same weights.")
    return notes


def _too_weak(a: Result, b: Result, level: Level) -> list[str]:
    """Where a level lies between nothing and the weakest strength that was measured, losses grow by more than a line."""
    notes = []
    for name, result, at in zip(NAMES, (a, b), level.strengths, strict=True):
        lowest = min(strength for strength in result.strengths if strength > 0)
        if at < lowest:
            nearer = [float(f"{share * at:.2g}") for share in (0.5, 1, 2)]
            notes.append(
                f"{name} reaches the equal {level.of} at × {at:.2g}, below the weakest strength that was measured (× {lowest:g}). "
                "A straight line from there to 0 makes its losses look larger than they may be. Nearer:\n"
                + eval_command([a.folder, b.folder], [a, b], scales=nearer)
            )
    return notes
