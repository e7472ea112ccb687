"""What `bapo eval` does."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from datasets import Dataset
from tqdm.auto import tqdm

from bapo_plugin import __version__
from bapo_plugin.answers.prompts import Chat, FormerAnswer, held_out_answers, read_prompts
from bapo_plugin.answers.transformers import autocast
from bapo_plugin.blocks import UNRELATED
from bapo_plugin.config import is_active, parse_block
from bapo_plugin.evaluation.harness import find_tasks, run_tasks
from bapo_plugin.evaluation.output import ELSEWHERE, print_table, write
from bapo_plugin.evaluation.pairs import COLUMNS, pair_margins
from bapo_plugin.evaluation.recorded import digest, recorded_answers, recorded_pairs
from bapo_plugin.evaluation.refusals import (
    check_finite,
    check_held_out,
    names_others,
    warn_of_others,
)
from bapo_plugin.evaluation.subject import Subject, load_subject, split_targets
from bapo_plugin.files import must_be_writable
from bapo_plugin.prepare import kept_of, prepare_rows
from bapo_plugin.rows.held_out import prompts_digest
from bapo_plugin.runs import recorded_config, recorded_held_out, weights_digest
from bapo_plugin.scoring.forward import response_logits
from bapo_plugin.scoring.retention import Retention, measure
from bapo_plugin.yaml_files import read_yaml

LOG = get_logger("axolotl." + __name__)

_SAMPLES = 8


def evaluate(
    targets: Sequence[Path],
    *,
    prompts: str | None = None,
    tasks: Sequence[str] = (),
    data: Path | None = None,
    scales: Sequence[float] = (),
    limit: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    chat: bool = False,
    load_in_4bit: bool | None = None,
    output: Path | None = None,
    probe: bool | None = None,
    pairs: bool | None = None,
) -> list[Path]:
    """Measure, print a table, and write `bapo-eval.json` and `bapo-eval.md`.

    Args:
        targets: a YAML (then its `output_dir` is the adapter) and folders of adapters, of one base model.
        prompts: file with prompts (see `read_prompts`), or a number of held-out rows of the YAML.
        tasks: names of lm-eval's tasks, YAML files of tasks, or "paper".
        data: folder with files that the paper's tasks take their questions from (see `local`). Default: the hub.
        scales: each adapter is also measured with its weights scaled by these.
        limit: at most so many questions of a task.
        max_new_tokens: of an answer to a prompt of a file, and of the samples.
        batch_size: for the tasks.
        chat: ask the tasks' questions through the chat template.
        load_in_4bit: of a model that is loaded without a YAML; None: as its run recorded it.
        output: folder for the results. Default: the folder of each adapter.
        probe: ask the unrelated prompts too. Default: where neither prompts nor tasks are named.
        pairs: rank held-out pairs of the YAML. Default: where its held-out rows are read.

    Returns:
        The files written.

    Raises:
        ValueError: there is nothing to measure, no adapter, or a file, prompt or task that can't be used.
    """
    config, folders = split_targets(targets)
    is_asked = bool(probe)
    if probe is None:
        probe = prompts is None and not tasks and not data
    nothing = prompts is None and not tasks and not data and not config and not probe
    # the record of a run names its held-out rows
    if nothing and not any(map(recorded_config, folders)):
        raise ValueError(
            "nothing to measure: name --prompts FILE, --tasks, or the YAML of a BAPO run"
        )
    count = _count(prompts)
    chats = read_prompts(prompts) if prompts is not None and count is None else None
    manager, names = find_tasks(tasks, data) if tasks or data else (None, [])
    subject = load_subject(config, folders, load_in_4bit, scales)
    # an adapter that is scaled too has one folder
    places = [output] if output else dict.fromkeys(a.folder for a in subject.adapters.values())
    for place in places:
        must_be_writable(place, ELSEWHERE)
    rows = None
    if pairs or chats is None:
        required = pairs or prompts is not None or not (tasks or probe)
        rows = _held_out_rows(subject, required, config)
    if chats is not None:
        answers = asked_before(subject, chats, max_new_tokens)
    else:
        answers = held_out_answers(rows, subject.tokenizer, count) if rows is not None else []
    if probe and not is_asked and not subject.tokenizer.chat_template and answers:
        LOG.warning("The tokenizer has no chat template: unrelated prompts are not asked")
        probe = False
    unrelated = read_prompts(UNRELATED) if probe else []
    for name, asked in ((prompts, chats or []), ("the unrelated prompts", unrelated)):
        _warn_of_kept(subject, name, asked)
    probed = asked_before(subject, unrelated, max_new_tokens) if probe else []

    found: dict[str, Any] = {
        "format": 1,
        "model": subject.model.config.name_or_path,
        "quantization": _quantization(subject.model.config),
        "template": digest(subject.tokenizer.chat_template),
        "versions": {"axolotl-plugin-bapo": __version__}
        | {n: version(n) for n in ("axolotl", "torch", "transformers", "peft", "lm_eval")},
        # to measure the same again
        "asked": {
            "config": str(config) if config else None,
            "prompts": prompts,
            "probe": bool(probed),
            "tasks": list(tasks),
            "limit": limit,
            "chat": chat,
            "max_new_tokens": max_new_tokens,
            "load_in_4bit": load_in_4bit,
        },
        "adapters": {name: str(adapter.folder) for name, adapter in subject.adapters.items()},
        "weights": {name: weights_digest(a.folder) for name, a in subject.adapters.items()},
        "scales": {
            name: adapter.scale
            for name, adapter in subject.adapters.items()
            if adapter.scale is not None
        },
        "data": str(data) if data else None,
        "pairs": None,
        "retention": None,
        "probe": None,
        "tasks": [],
        "samples": [],
    }
    if rows is not None and pairs is not False:
        held_out = _evenly(list(rows.select_columns(list(COLUMNS))), count)
        found["pairs"] = recorded_pairs(held_out, pair_margins(subject, {"": held_out})[""])
    if answers or probed:
        sets = {"retention": answers, "probe": probed}
        # base responses of held-out rows are of any length, and many: repetition is of what is asked anew
        anew = ("probe",) if chats is None else ("retention", "probe")
        found |= _measure_answers(subject, sets, anew, max_new_tokens)
    if names:
        found["tasks"] = run_tasks(subject, manager, names, limit, batch_size, chat)
    print_table(found)  # it is there, whatever becomes of the files
    return [path for place in places for path in write(found, place)]


def _warn_of_kept(subject: Subject, name: str | None, chats: list[Chat]) -> None:
    if not chats or subject.cfg is None or not is_active(subject.cfg):
        return
    bapo = parse_block(dict(subject.cfg.bapo))
    try:
        count = kept_of(bapo, chats)
    except ValueError as error:  # nothing is asked of that file here
        LOG.warning(f"Whether prompts were held in training isn't known: {error}")
        return
    if count:
        LOG.warning(
            f"Training has held the former answers to {count} of {len(chats)} of {name} (bapo.keep.prompts: {bapo.keep.prompts}), so "
            "that less is seen there of what was forgotten"
        )


def _count(prompts: str | None) -> int | None:
    """Of held-out rows, where --prompts is a number.

    Raises:
        ValueError: it is 0.
    """
    if prompts is None or not prompts.isdecimal():
        return None
    if count := int(prompts):
        return count
    raise ValueError(
        f"--prompts: {prompts} asks nothing; name a number from 1 on, or leave it out for all"
    )


def _held_out_rows(subject: Subject, required: bool, config: Path | None) -> Dataset | None:
    """Tokenised held-out rows of the YAML; None where there are none and none are required.

    Raises:
        ValueError: they are required, or aren't those that training held out.
    """
    if subject.cfg is None or not is_active(subject.cfg):
        if not required:
            return None
        raise ValueError(
            "held-out rows are those of the YAML of a BAPO run; name it, or a file with prompts (--prompts)"
        )
    _, rows = prepare_rows(subject.cfg, subject.tokenizer)
    if rows is None and required:
        raise ValueError(
            "there are no held-out rows: set val_set_size or test_datasets, or name a file with prompts "
            "(--prompts)"
        )
    if rows is not None:
        folders = list(dict.fromkeys(a.folder for a in subject.adapters.values()))
        # of several runs one may have held out these rows; the others may have been trained on some
        mark = prompts_digest(rows)
        own = next((f for f in folders if recorded_held_out(f)[1] == mark), folders[0])
        if config is None or not names_others(read_yaml(config), own):
            check_held_out(rows, own)
        warn_of_others(rows, own, folders)
    return rows


def _evenly(rows: list, count: int | None) -> list:
    """At most so many, evenly spread."""
    if count is None or count >= len(rows):
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]


def _quantization(config: Any) -> str | None:
    """In words, of a loaded model's configuration."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    for bits in (4, 8):
        if found.get(f"load_in_{bits}bit"):
            return f"{bits}-bit"
    return str(found.get("quant_method"))


def asked_before(subject: Subject, chats: list[Chat], max_new_tokens: int) -> list[FormerAnswer]:
    """Answers of the model as it was before training, with a progress bar."""
    bar = tqdm(total=len(chats), desc="Answers before training", unit="prompt")
    with bar, subject.before():
        return subject.asker().ask(chats, max_new_tokens, bar.update)


def measure_retention(subject: Subject, answers: Sequence[FormerAnswer]) -> dict[str, Retention]:
    """What each adapter of the subject has kept of former answers, with a progress bar; by the adapter's name.

    Raises:
        ValueError: a drift isn't finite.
    """

    def scorer(state: Callable[[], AbstractContextManager]) -> Callable[[dict], torch.Tensor]:
        def score(batch: dict) -> torch.Tensor:
            with state(), autocast(subject.model):
                return response_logits(subject.model, batch)

        return score

    with tqdm(total=len(answers), desc="Retention", unit="answer") as bar:
        found = measure(
            answers,
            scorer(subject.before),
            {name: scorer(lambda name=name: subject.after(name)) for name in subject.adapters},
            pad_token_id=subject.pad_token_id,
            vocab_size=subject.model.config.get_text_config().vocab_size,
            device=subject.model.device,
            on_answers=bar.update,
        )
    for name, kept in found.items():
        check_finite(kept.drift, name, "drift of former answers")
    return found


def _measure_answers(
    subject: Subject,
    sets: Mapping[str, list[FormerAnswer]],
    anew: Sequence[str],
    max_new_tokens: int,
) -> dict[str, Any]:
    """Former answers as `recorded_answers` says them, by set, and samples to be read.

    Args:
        sets: name of a set -> former answers; empty sets are left out.
        anew: sets whose prompts each adapter answers too, to measure repetition.
        max_new_tokens: of an adapter's answer.
    """
    answers = [answer for own in sets.values() for answer in own]
    places, start = {}, 0
    for name, own in sets.items():
        if own:
            places[name] = range(start, start + len(own))
        start += len(own)
    retention = measure_retention(subject, answers)
    worst = torch.stack([result.drift for result in retention.values()]).min(0).values
    shown = worst.argsort(stable=True)[:_SAMPLES].tolist()
    whole = [i for name, own in places.items() if name in anew for i in own]
    after = _answers_after(subject, answers, whole, shown, max_new_tokens)
    asked = [name for name, adapter in subject.adapters.items() if adapter.scale is None]
    found: dict[str, Any] = {
        name: recorded_answers(
            sets[name],
            {a: kept.part(slice(own.start, own.stop)) for a, kept in retention.items()},
            {a: [after[a][i] for i in own] for a in asked} if name in anew else {},
        )
        for name, own in places.items()
    }
    return found | {"samples": _samples(subject, answers, retention, after, shown)}


def _answers_after(
    subject: Subject,
    answers: Sequence[FormerAnswer],
    whole: Sequence[int],
    shown: Sequence[int],
    max_new_tokens: int,
) -> dict[str, dict[int, list[int]]]:
    """What adapters answer now, with a progress bar: adapter -> place of the prompt -> token ids.

    Args:
        whole: places of prompts for repetition; scaled adapters are not asked these.
        shown: places of prompts whose answers are to be read.
    """
    places = {
        name: list(dict.fromkeys([*shown, *(whole if adapter.scale is None else ())]))
        for name, adapter in subject.adapters.items()
    }
    found = {}
    total = sum(map(len, places.values()))
    with tqdm(total=total, desc="Answers after training", unit="prompt") as bar:
        for name, own in places.items():
            prompts = [answers[i].prompt_ids for i in own]
            with subject.after(name):
                ids = subject.asker().answer(prompts, max_new_tokens, bar.update)
            found[name] = dict(zip(own, ids, strict=True))
    return found


def _samples(
    subject: Subject,
    answers: Sequence[FormerAnswer],
    retention: Mapping[str, Retention],
    after: Mapping[str, Mapping[int, Sequence[int]]],
    shown: Sequence[int],
) -> list[dict[str, Any]]:
    """Answers before and after, to be read: those that lost most under any adapter first."""

    def text(ids: Sequence[int]) -> str:
        return subject.tokenizer.decode(ids, skip_special_tokens=True).strip()

    return [
        {
            "prompt": answers[i].prompt,
            "before": text(answers[i].answer_ids),
            "after": {name: text(ids[i]) for name, ids in after.items()},
            "drift": {name: float(result.drift[i]) for name, result in retention.items()},
        }
        for i in shown
    ]
