"""What was measured of a run, from its bapo-eval.json, and whether two were measured on the same."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bapo_plugin.runs import check_adapter, weights_digest

RESULT = "bapo-eval.json"
# of bapo-eval.json, and what their rows are
PARTS = {
    "pairs": "held-out pairs",
    "probe": "unrelated prompts",
    "retention": "former answers",
}
_AGAIN = "measure it again"

Columns = dict[str, np.ndarray]  # measure -> a number a row, [n] fp64


class NotMeasured(ValueError):
    """A run has no results, or none that can be compared; `bapo eval` makes them."""


@dataclass(frozen=True)
class Result:
    """One adapter in one bapo-eval.json.

    Args:
        file: where it was read.
        found: its content.
        name: of the adapter in it.
        folder: of the run or the adapter.
    """

    file: Path
    found: Mapping[str, Any]
    name: str
    folder: Path

    @property
    def asked(self) -> Mapping[str, Any]:
        return self.found["asked"]

    @property
    def strengths(self) -> dict[float, str]:
        """Scale -> name of the same adapter so scaled; 1 is the adapter as it is."""
        adapters = self.found["adapters"]
        scaled = {
            float(scale): name
            for name, scale in (self.found.get("scales") or {}).items()
            if adapters.get(name) == adapters[self.name]
        }
        return scaled | {1.0: self.name}

    def ids(self, part: str) -> list[str]:
        """What each row of a part was asked: pairs, or prompts."""
        return self._rows(part)["id" if part == "pairs" else "prompt"]

    def columns(self, part: str, name: str | None = None) -> Columns:
        """The numbers of each row of a part.

        Args:
            part: of `PARTS`.
            name: of the adapter; by default the one that is compared.

        Raises:
            ValueError: one isn't finite.
        """
        name = name or self.name
        return self.finite(self._rows(part)["after"][name], f"{PARTS[part]}, {name}")

    def _rows(self, part: str) -> Mapping[str, Any]:
        return self.found[part]["rows"]

    def finite(self, columns: Mapping[str, Any], of: str) -> Columns:
        """
        Raises:
            ValueError: a number isn't finite.
        """
        found = {key: np.array(values, dtype=np.float64) for key, values in columns.items()}
        for key, values in found.items():
            if bad := int((~np.isfinite(values)).sum()):
                raise ValueError(
                    f"{self.file}: {of}: {key} is no finite number in {bad} of {len(values)} rows; the adapter's weights or its "
                    "logits are broken, so there is nothing to compare: train it again with a lower learning_rate"
                )
        return found


def split_target(target: str) -> tuple[Path, str | None]:
    """FOLDER, FILE, or either with `:ADAPTER` behind it; the adapter is None where none is named.

    Raises:
        ValueError: there is no such file or folder.
    """
    path, adapter = Path(target), None
    if not path.exists() and ":" in target:
        head, _, adapter = target.partition(":")
        path = Path(head)
    if not path.exists():
        raise ValueError(f"there is no file or folder {path}")
    if path.is_file() and path.suffix != ".json":
        raise ValueError(
            f"{path} is neither the folder of a run nor a {RESULT}; name the folder that its output_dir names"
        )
    return path, adapter


def read_result(path: Path, adapter: str | None) -> Result:
    """The results of one adapter.

    Raises:
        NotMeasured: there are none, or an older version wrote them.
        ValueError: the file can't be read, or it doesn't say which adapter is meant.
    """
    file = path / RESULT if path.is_dir() else path
    if not file.is_file():
        check_adapter(path)
        raise NotMeasured(f"{path} has no {RESULT}: it has not been measured yet")
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise NotMeasured(f"{file} can't be read ({error}); {_AGAIN}") from None
    if not isinstance(found, dict) or not isinstance(found.get("adapters"), dict):
        raise NotMeasured(f"{file} is not what `bapo eval` writes; {_AGAIN}")
    if found.get("format") != 1:
        raise ValueError(
            f"{file} has format {found.get('format')!r}, this version reads format 1; update axolotl-plugin-bapo"
        )
    if "asked" not in found:
        raise NotMeasured(
            f"{file} is of an older version, which didn't write what it asked, row by row; {_AGAIN}"
        )
    name = _adapter(file, found, path, adapter)
    folder = path if path.is_dir() and adapter is None else Path(found["adapters"][name])
    result = Result(file, found, name, folder)
    _check_whole(result)
    recorded, there = (found.get("weights") or {}).get(name), weights_digest(folder)
    if recorded and there and recorded != there:
        raise NotMeasured(
            f"{file} was measured before the adapter in {folder} was trained anew: its weights are others now; {_AGAIN}"
        )
    return result


def _adapter(file: Path, found: Mapping[str, Any], path: Path, wanted: str | None) -> str:
    adapters, scales = found["adapters"], found.get("scales") or {}
    if wanted is not None:
        if wanted not in adapters:
            raise ValueError(f"{file} has no adapter {wanted!r}; it has {', '.join(adapters)}")
        return wanted
    names = [name for name in adapters if name not in scales]
    if path.is_dir():
        here = [n for n in names if Path(adapters[n]).resolve() == path.resolve()]
        # measured in another place, or moved since
        here = here or [n for n in names if Path(adapters[n]).name == path.resolve().name]
        if len(here) == 1:
            return here[0]
    if len(names) != 1:
        raise ValueError(
            f"{file} has {len(names)} adapters; say which one is meant: "
            + " or ".join(f"{path}:{name}" for name in names)
        )
    return names[0]


def _check_whole(result: Result) -> None:
    """
    Raises:
        NotMeasured: rows are missing or have no numbers.
    """
    try:
        for part in PARTS:
            if result.found[part]:
                rows = result._rows(part)
                ids = result.ids(part)
                columns = [rows["after"][name] for name in result.strengths.values()]
                lengths = {len(values) for own in columns for values in own.values()}
                if part != "pairs":
                    lengths.add(len(rows["answer"]))
                if not ids or lengths != {len(ids)}:
                    raise ValueError(f"rows of {part} of different numbers")
                for own in columns:
                    for values in own.values():
                        np.array(values, dtype=np.float64)
        for entry in result.found["tasks"]:
            if entry["rows"]:
                if len(entry["rows"]["after"][result.name]) != len(entry["rows"]["id"]):
                    raise ValueError(f"rows of {entry['task']} of different numbers")
            float(entry["after"][result.name]["value"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NotMeasured(
            f"{result.file} is damaged ({type(error).__name__}: {error}); {_AGAIN}"
        ) from None


def others(a: Result, b: Result) -> list[str]:
    """Why two can't be compared: sentences; none where all that both have was measured on the same."""
    reasons = []
    same_answers = [
        sorted(a.ids(part)) == sorted(b.ids(part)) and not _answered_otherwise(a, b, part)
        for part in ("probe", "retention")
        if a.found[part] and b.found[part]
    ]
    if a.found["model"] != b.found["model"] and not (same_answers and all(same_answers)):
        # the same model may lie in two places: then it gives the same answers
        reasons.append(
            f"A was trained from {a.found['model']}, B from {b.found['model']}: what each has forgotten is its own model's"
        )
        return reasons
    for part, of in PARTS.items():
        if not (a.found[part] and b.found[part]):
            continue
        shared = Counter(a.ids(part)) & Counter(b.ids(part))
        number, counts = shared.total(), [len(r.ids(part)) for r in (a, b)]
        if counts != [number, number]:
            what = "pairs" if part == "pairs" else "prompts"
            why = ""
            if a.found.get("template") != b.found.get("template"):
                why = ", written by different chat templates"
            reasons.append(
                f"{of}: A was measured on {counts[0]} {what}, B on {counts[1]}; {number} of them are the same{why}"
            )
        elif part != "pairs" and (count := _answered_otherwise(a, b, part)):
            reasons.append(
                f"{of}: the model before training gave other answers to {count} of {number} prompts{_why(a, b)}"
            )
    tasks = [dict(_tasks(result)) for result in (a, b)]
    for key in tasks[0].keys() & tasks[1].keys():
        ids = [Counter((entries[key]["rows"] or {}).get("id", ())) for entries in tasks]
        if ids[0] != ids[1] or tasks[0][key]["questions"] != tasks[1][key]["questions"]:
            reasons.append(f"{key}: A and B were asked other questions, or in another form")
    return reasons


def _answered_otherwise(a: Result, b: Result, part: str) -> int:
    """How many prompts, of the same ones, the model before training answered otherwise."""
    answers = [Counter(zip(r.ids(part), r._rows(part)["answer"], strict=True)) for r in (a, b)]
    return (answers[0] - answers[1]).total()


def _why(a: Result, b: Result) -> str:
    limits = [r.asked["max_new_tokens"] for r in (a, b)]
    kinds = [r.found.get("quantization") or "not quantised" for r in (a, b)]
    if limits[0] != limits[1]:
        return f" (--max-new-tokens {limits[0]} of A, {limits[1]} of B)"
    if kinds[0] != kinds[1]:
        return f" (loaded {kinds[0]} for A, {kinds[1]} for B)"
    return " (other weights, versions or a machine that rounds otherwise)"


def _tasks(result: Result) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for entry in result.found["tasks"]:
        yield f"{entry['task']}.{entry['metric']}", entry


def shared_tasks(
    a: Result, b: Result
) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Task and metric, and the entries of both."""
    theirs = dict(_tasks(b))
    for key, entry in _tasks(a):
        if key in theirs:
            yield key, entry, theirs[key]
