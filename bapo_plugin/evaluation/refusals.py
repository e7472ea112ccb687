"""What `bapo eval`, `bapo chat` and `bapo personas` refuse: adapters that can't share one loaded model, rows that training may
have seen, and numbers that are none."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from datasets import Dataset

from bapo_plugin import base_weights
from bapo_plugin.files import of_the_disk
from bapo_plugin.rows.held_out import prompts_digest
from bapo_plugin.runs import (
    base_model,
    check_all_whole,
    differing,
    is_hub_name,
    is_there,
    recorded_base_weights,
    recorded_config,
    recorded_held_out,
    same_place,
)

LOG = get_logger("axolotl." + __name__)

_AGAIN = "Train it again with a lower learning_rate, or take an earlier checkpoint"
# of `runs.SAME`, what --load-in-4bit and a YAML may change on purpose
LOADED = ("the kind of adapter", "quantisation or precision")


@contextmanager
def model_is_found(base: str, by: str) -> Iterator[None]:
    """Inside, where the model is loaded, an error that says it isn't there becomes a message.

    Raises:
        ValueError: there is no such folder, and the hub doesn't give it; or its weights are damaged.
    """
    check_all_whole(Path(base))  # of a name at the hub there is nothing to check
    try:
        yield
    except OSError as error:
        if Path(base).is_dir() or of_the_disk(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"base model: {base!r}, which {by} names, is no folder of this machine, and the hub doesn't give it ({reason}). If it "
            "has moved, name its folder as base_model in a YAML, and this YAML before the adapter's folder"
        ) from error


def must_be_of(folder: Path, given: Mapping[str, Any], name: str) -> None:
    """
    Raises:
        ValueError: an adapter was trained on another model than a YAML names, or in another setting.
    """
    base, named = base_model(folder), str(given.get("base_model") or "")
    is_same = has_its_weights(folder, named, given.get("revision_of_model"))
    # of a folder that has moved, or that an adapter alone names from where it was, the YAML says where it is
    are_known = (is_there(base) or is_hub_name(base)) and not (
        is_hub_name(base) and is_there(named)
    )
    if not is_same and base and are_known and not same_place(base, named):
        raise ValueError(
            f"{folder} was trained on {base}, but {name} has base_model: {named}; evaluate it by itself, without this YAML. If {base} "
            "has moved there, write that into adapter_config.json (base_model_name_or_path)"
        )
    if recorded := recorded_config(folder):
        recorded["base_model"] = named
        remedy = "evaluate it by itself, without this YAML"
        must_be_alike(name, given, folder, recorded, ("the model", *LOADED), remedy)


def has_its_weights(folder: Path, base: str, revision: str | None = None) -> bool:
    """Whether a model is known by its weights to be the one that an adapter was trained on.

    Raises:
        ValueError: it is another one.
    """
    remedy = "Restore it, or name a YAML with the right base_model before the folder"
    place = base_weights.folder_of(base, revision)
    return base_weights.must_be(recorded_base_weights(folder), base, place, folder, remedy)


def must_be_alike(
    name: str,
    config: Mapping[str, Any],
    folder: Path,
    other: Mapping[str, Any],
    left_out: Sequence[str],
    remedy: str,
) -> None:
    """
    Raises:
        ValueError: an adapter's run had the model in another state than the one that is loaded.
    """
    for what, key, value, its in differing(config, other):
        if what not in left_out:
            raise ValueError(
                f"{key}: is {_shown(value)} in {name}, {_shown(its)} in the record of {folder}. That changes {what}, and all are "
                f"measured in one loaded model; {remedy}"
            )


def _shown(value: Any) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 80 else text[:80] + "…"


def check_held_out(rows: Dataset, folder: Path) -> None:
    """Whether held-out rows are those that a run held out.

    Args:
        rows: prepared rows.
        folder: of the run; nothing is said where it has no record of them.

    Raises:
        ValueError: they aren't, so that some may have been trained on.
    """
    count, digest = recorded_held_out(folder)
    differs = None
    if count is not None and count != len(rows):
        differs = f"there are {len(rows)} now, and training had {count}"
    elif digest is not None and digest != prompts_digest(rows):
        differs = "they have other prompts now"
    if differs:
        raise ValueError(
            f"the held-out rows aren't those that training in {folder} held out ({differs}), and it may have been trained on some "
            "of them. Restore the data and what splits it (datasets, test_datasets, val_set_size, seed; without a seed the rows in "
            "dataset_prepared_path). Or measure on other rows: test_datasets in a YAML, or --prompts FILE of bapo eval"
        )


def names_others(given: Mapping[str, Any], folder: Path) -> bool:
    """Whether a YAML has other `test_datasets` than its run had: then other rows are to be measured."""
    sets = given.get("test_datasets")
    recorded = recorded_config(folder)
    if not sets or recorded is None:
        return False
    before = recorded.get("test_datasets") or []
    return len(sets) != len(before) or not all(
        same_place(entry.get("path"), its.get("path"))
        and {**entry, "path": None} == {**its, "path": None}
        for entry, its in zip(sets, before, strict=True)
    )


def warn_of_others(rows: Dataset, folder: Path, others: Iterable[Path]) -> None:
    """Say where other runs have held out other rows than these, of the run in `folder`: some of them they may have been
    trained on."""
    digest = prompts_digest(rows)
    for other in others:
        _, its = recorded_held_out(other)
        if (
            its is not None
            and its != digest
            and folder.resolve() not in (other.resolve(), *other.resolve().parents)
        ):
            LOG.warning(
                f"{other} held out other rows than these, so that it may have been trained on some of them, which flatters it. "
                "Where that may be, hold the same rows out of all runs (test_datasets)"
            )


def must_be_finite(model: Any, inside: str, folder: Path) -> None:
    """
    Args:
        inside: name of the adapter in the model.
        folder: where it was read.

    Raises:
        ValueError: one of its weights isn't finite.
    """
    for name, weights in model.named_parameters():
        if inside in name.split(".") and not weights.isfinite().all():
            raise ValueError(
                f"{folder}: the adapter is broken: {name.replace(f'.{inside}', '')} holds what is no finite number, so that there is "
                f"nothing to measure. {_AGAIN}"
            )


def check_finite(values: torch.Tensor, whose: str | None, of: str) -> None:
    """
    Args:
        values: a number for each of what was measured.
        whose: an adapter's name; None: the model before training.
        of: what was measured.

    Raises:
        ValueError: one isn't finite.
    """
    bad = int((~values.isfinite()).sum())
    if not bad:
        return
    remedy = _AGAIN if whose else "Load it in another precision (bf16, load_in_4bit)"
    raise ValueError(
        f"{whose or 'the model before training'}: {of}: no finite number in {bad} of {len(values)}. Its weights or its logits are "
        f"broken, so that there is nothing to measure. {remedy}"
    )
