"""A run, finished or still going on, from what it has written into its output_dir."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bapo_plugin.report.configuration import logged_config, model_card_config
from bapo_plugin.runs import (
    RECORD,
    STATE,
    log_digest,
    read_json,
    weights_digest,
    without_secrets,
)

TRAINER_CLS = (
    "bapo_plugin.training.trainer.BAPOTrainer"  # `bapo_plugin.config` has it too, and imports torch
)
RESPONSES = ("chosen", "base", "rejected")
MEASURED = ("retention", "probe")  # parts of bapo-eval.json about former answers
_CHECKPOINT = r"checkpoint-\d+"
# methods of TRL whose rewards are β · (log π_θ − log π_ref); those of CPO, ORPO and SimPO have no reference
_REFERENCED = ("dpo", "ipo")

Points = list[tuple[int, float]]  # (step, value), ascending; NaN where no finite number was logged


@dataclass
class Run:
    """What is known of a run.

    Attributes:
        name: the last part of the folder's path, or more of it where two runs would share a name.
        step, planned: optimiser steps done, and of the whole run (None: unknown).
        is_finished: None where `planned` is unknown.
        series: metric -> its points; evaluations have `eval_` in front. Units as logged: nats a
            response for `drift/*` and `logps/*`, shares for accuracies and agreement.
        config: the settings, nested as in the YAML (None: unknown). `flat` is the same with one key a
            value, lists and blocks opened: "bapo.anchor_weight", "datasets[0].path".
        evaluation: content of bapo-eval.json, of adapters that are still what was measured.
        drift_beta: β, where drift isn't logged and was computed here as rewards / β.
        notes: sentences for the reader about what is missing or odd.
    """

    path: Path
    name: str
    step: int
    planned: int | None
    is_finished: bool | None
    series: dict[str, Points]
    config: dict[str, Any] | None = None
    config_source: str = ""
    versions: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    drift_beta: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def flat(self) -> dict[str, str]:
        return flatten(self.config or {})

    @property
    def method(self) -> str | None:
        """`rl` as the user wrote it: axolotl itself sees BAPO as dpo with another trainer."""
        flat = self.flat
        if flat.get("trainer_cls") == TRAINER_CLS or "loss/anchor" in self.series:
            return "bapo"
        if self.config:
            rl = flat.get("rl")
            return "sft" if rl in (None, "null") else rl
        return None

    @property
    def beta(self) -> float:
        """β of the preference loss, NaN where the configuration doesn't say."""
        values = (number(self.flat.get(key)) for key in ("trl.beta", "rl_beta", "beta"))
        return next((v for v in values if v > 0), math.nan)

    def last(self, name: str) -> float | None:
        """The last value of a metric: NaN where it wasn't a finite number, None where there is none at all."""
        points = self.series.get(name, [])
        return points[-1][1] if points else None

    @property
    def own_names(self) -> list[str]:
        """Names in `evaluation` of this run's own adapter, as it was trained and scaled."""
        folders = {
            name: Path(str(f)) for name, f in _mapping(self.evaluation.get("adapters")).items()
        }
        here = [name for name, folder in folders.items() if folder.resolve() == self.path.resolve()]
        # measured in another place, or moved since
        here = here or [name for name, folder in folders.items() if folder.name == self.path.name]
        return here or (list(folders) if len(set(folders.values())) == 1 else [])

    def own(self, part: str) -> Mapping[str, Any] | None:
        """What a part of `evaluation` has of this run's own adapter as it was trained; None where it wasn't measured."""
        after = _mapping(_mapping(self.evaluation.get(part)).get("after"))
        scaled = _mapping(self.evaluation.get("scales"))
        names = [name for name in self.own_names if name in after and name not in scaled]
        if not self.evaluation.get("adapters"):
            names = list(after)
        return _mapping(after[names[0]]) if len(names) == 1 else None

    def retention(self, name: str) -> Points:
        return self.series.get(f"retention/{name}") or self.series.get(f"eval_retention/{name}", [])


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read each run once, in the given order.

    Args:
        paths: output folders of axolotl or transformers, checkpoints in them, or trainer_state.json files.

    Raises:
        ValueError: no run at a path, or a file that can't be read; names the path and the remedy.
    """
    if not paths:
        raise ValueError("no runs to report on; name at least one output_dir")
    unique = list(dict.fromkeys(Path(path).resolve() for path in paths))
    places = [_Place.find(path) for path in unique]
    names = unique_names([place.named_by for place in places])
    return [_read(place, name) for place, name in zip(places, names, strict=True)]


def read_settings(folder: Path, name: str) -> Run:
    """A run of which only the configuration is read, and its versions and numbers of rows; no training log is needed.

    Args:
        folder: output folder, or a checkpoint in it.
        name: to be shown.

    Raises:
        ValueError: a record that can't be read.
    """
    run = Run(folder, name, step=0, planned=None, is_finished=None, series={})
    is_checkpoint = re.fullmatch(_CHECKPOINT, folder.resolve().name)
    _add_configuration(run, [folder, folder.resolve().parent] if is_checkpoint else [folder])
    return run


@dataclass
class _Place:
    """Where the files of a run are."""

    states: list[Path]  # candidates, of which the newest counts
    folder: Path  # bapo-eval.json
    roots: list[Path]  # configuration: the first that has one
    named_by: list[str]  # parts of the path, the last ones make the name

    @classmethod
    def find(cls, path: Path) -> "_Place":
        if not path.exists():
            raise ValueError(
                f"{path}: no such folder; name the output_dir of a run, or a checkpoint in it"
            )
        if path.suffix in (".yml", ".yaml"):
            raise ValueError(
                f"{path}: is a configuration, not what a run has written; name the folder in its output_dir"
            )
        folder = path if path.is_dir() else path.parent
        if path.is_dir():
            states = [path / STATE, *path.glob(f"checkpoint-*/{STATE}")]
            states = sorted(state for state in states if state.is_file())
        else:
            states = [path]
        if not states:
            raise ValueError(
                f"{path}: has neither trainer_state.json nor checkpoint-*/trainer_state.json. A run writes the "
                "first with its first checkpoint (save_steps in its YAML); is this its output_dir?"
            )
        parts = list(folder.parts[1:]) or [str(folder)]
        if re.fullmatch(_CHECKPOINT, folder.name):
            return cls(states, folder, [folder, folder.parent], [*parts[:-2], "/".join(parts[-2:])])
        return cls(states, folder, [folder], parts)


def unique_names(paths: Sequence[Sequence[str]]) -> list[str]:
    """The last part of each path, or as many more as it takes to tell it from the others."""
    lengths = [1] * len(paths)
    while True:
        names = ["/".join(path[-n:]) for path, n in zip(paths, lengths, strict=True)]
        same = [i for i, name in enumerate(names) if names.count(name) > 1]
        longer = [i for i in same if lengths[i] < len(paths[i])]
        if not longer:
            break
        for i in longer:
            lengths[i] += 1
    # a folder and a state file in it
    return [
        f"{name} ({names[: i + 1].count(name)})" if i in same else name
        for i, name in enumerate(names)
    ]


def _read(place: _Place, name: str) -> Run:
    state, notes = _newest(place)
    step = int(_or_zero(state.get("global_step")))
    planned = int(_or_zero(state.get("max_steps"))) or None
    control = _mapping(_mapping(state.get("stateful_callbacks")).get("TrainerControl"))
    has_stopped = (
        _mapping(control.get("args")).get("should_training_stop") is True
    )  # early stopping
    run = Run(
        path=place.folder,
        name=name,
        step=step,
        planned=planned,
        is_finished=(step >= planned or has_stopped) if planned else None,
        series=_series(state["log_history"]),
        notes=notes,
    )
    _add_configuration(run, place.roots)
    evaluation = place.folder / "bapo-eval.json"
    if evaluation.is_file():
        run.evaluation = read_json(evaluation, "run `bapo eval` again")
        if run.evaluation.get("format") != 1:
            raise ValueError(
                f"{evaluation}: has format {run.evaluation.get('format')!r}, this version reads format 1; run "
                "`bapo eval` again, or update axolotl-plugin-bapo"
            )
        _leave_out_other_weights(run)
    run.model = run.model or run.flat.get("base_model") or run.evaluation.get("model")
    _add_drift(run)
    if not run.series:
        run.notes.append("No metric has been logged yet.")
    for key, what in (("loss", "loss"), ("eval_rewards/accuracies", "accuracy on held-out pairs")):
        bad = [step for step, value in run.series.get(key, []) if not math.isfinite(value)]
        if bad:
            run.notes.append(f"The {what} was not a finite number in step {_listed(bad)}.")
    return run


def _leave_out_other_weights(run: Run) -> None:
    """Results of adapters that were trained anew since say nothing of those that lie there now."""
    recorded = _mapping(run.evaluation.get("weights"))
    folders = _mapping(run.evaluation.get("adapters"))
    own = run.own_names
    gone = set()
    for name, folder in folders.items():
        there = weights_digest(run.path if name in own else Path(str(folder)))
        if recorded.get(name) and there and recorded[name] != there:
            gone.add(name)
    if not gone:
        return
    run.notes.append(
        f"bapo-eval.json has results of weights that are no longer there ({', '.join(sorted(gone))}), which are left out: the "
        "adapter was trained anew since. Run `bapo eval` again."
    )
    parts = [run.evaluation.get(part) for part in MEASURED]
    for name in ("tasks", "samples"):
        parts += _list(run.evaluation.get(name))
    for part in parts:
        for content in (_mapping(part).get("after"), _mapping(part).get("drift")):
            for name in gone & set(_mapping(content)):
                del content[name]


def _newest(place: _Place) -> tuple[dict[str, Any], list[str]]:
    """The state that has come furthest; left out are those of an earlier run in the same folder, and one that can't be
    read where there is another."""
    others = []
    record = next((root / RECORD for root in place.roots if (root / RECORD).is_file()), None)
    if record is not None:
        others = _list(read_json(record, "remove it, or train again").get("logs_of_others"))
    paths = [path for path in place.states if not others or log_digest(path) not in others]
    if not paths:
        return {"log_history": []}, ["All that lies there was logged by an earlier run."]
    states, errors = [], []
    for path in paths:
        try:
            state = read_json(path, "if the run is just writing it, try again; else remove it")
            if not isinstance(state.get("log_history"), list):
                raise ValueError(
                    f"{path}: has no list log_history, so it isn't a trainer state; name the output_dir of a run"
                )
            states.append(state)
        except ValueError as error:
            errors.append(error)
    if not states:
        raise errors[0]
    newest = max(states, key=lambda s: (_or_zero(s.get("global_step")), len(s["log_history"])))
    return newest, [f"Left out: {error}." for error in errors]


def _series(log_history: list[Any]) -> dict[str, Points]:
    values: dict[str, dict[int, float]] = {}
    for entry in log_history:
        entry = _mapping(entry)
        step = number(entry.get("step"))
        if math.isnan(step):
            continue
        for key, value in entry.items():
            # a step that was done again after a resume: the last one counts
            values.setdefault(str(key), {})[int(step)] = number(value)
    return {
        key: sorted(points.items())
        for key, points in values.items()
        if key.endswith(("loss", "rewards/accuracies")) or any(map(math.isfinite, points.values()))
    }


def _add_configuration(run: Run, roots: list[Path]) -> None:
    for root in roots:
        path = root / RECORD
        if path.is_file():
            content = read_json(path, "remove it, or train again")
            run.config = without_secrets(_mapping(content.get("config")))
            run.versions = dict(_mapping(content.get("versions")))
            run.rows = dict(_mapping(content.get("rows")))
            run.model = str(content["model"]) if content.get("model") else None
            run.config_source = path.name
            if content.get("finished") is True and root == run.path:  # also by `stop_below`
                run.is_finished = True
            return
        for name, reader in (("README.md", model_card_config), ("debug.log", logged_config)):
            config = reader(root / name)
            if config is not None:
                run.config, run.config_source = without_secrets(config), name
                return


def _add_drift(run: Run) -> None:
    """TRL's trainers log rewards = β · drift, of the chosen and the rejected response."""
    if any(f"{mode}drift/{name}" in run.series for mode in ("", "eval_") for name in RESPONSES):
        return
    if not any(key.endswith("rewards/chosen") for key in run.series):
        return
    if not run.config:
        why = "β is unknown"
    elif run.method not in _REFERENCED:
        why = f"the rewards of {run.method} are not β · drift"
    elif math.isnan(run.beta):
        why = "its configuration has no rl_beta"
    else:
        run.drift_beta = run.beta
        for mode in ("", "eval_"):
            for name in RESPONSES:
                if points := run.series.get(f"{mode}rewards/{name}"):
                    run.series[f"{mode}drift/{name}"] = [(s, v / run.beta) for s, v in points]
        run.notes.append(
            f"Drift is rewards / β, with β = {run.beta:g} from its configuration; this trainer doesn't log the "
            "base response."
        )
        return
    run.notes.append(f"Drift isn't logged and can't be had from the rewards: {why}.")


def flatten(value: Any, key: str = "") -> dict[str, str]:
    """Nested settings as "a.b[0].c" -> text; lists of plain values stay in one piece."""
    if isinstance(value, Mapping) and (value or not key):
        items = [(f"{key}.{k}" if key else str(k), v) for k, v in value.items()]
    elif isinstance(value, list) and any(isinstance(v, Mapping | list) for v in value):
        items = [(f"{key}[{i}]", v) for i, v in enumerate(value)]
    else:
        return {
            key: value
            if isinstance(value, str)
            else json.dumps(value, ensure_ascii=False, default=str)
        }
    return {k: v for name, item in items for k, v in flatten(item, name).items()}


def number(value: Any) -> float:
    """As a float, also out of a string; NaN for what isn't a finite number."""
    if isinstance(value, bool):
        return math.nan
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return value if math.isfinite(value) else math.nan


def _or_zero(value: Any) -> float:
    value = number(value)
    return 0.0 if math.isnan(value) else value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps[:5])) + (f" and {len(steps) - 5} more" if steps[5:] else "")
