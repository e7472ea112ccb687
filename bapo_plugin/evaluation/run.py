"""What `bapo eval` does."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from tqdm.auto import tqdm

from bapo_plugin import __version__
from bapo_plugin.answers.prompts import Chat, FormerAnswer, held_out_answers, read_prompts
from bapo_plugin.answers.transformers import autocast
from bapo_plugin.config import is_active
from bapo_plugin.evaluation.harness import find_tasks, run_tasks
from bapo_plugin.evaluation.output import ELSEWHERE, print_table, write
from bapo_plugin.evaluation.subject import Subject, load_subject, split_targets
from bapo_plugin.files import must_be_writable
from bapo_plugin.prepare import prepare_rows
from bapo_plugin.scoring.forward import response_logits
from bapo_plugin.scoring.retention import Retention, measure

LOG = get_logger("axolotl." + __name__)

_SAMPLES = 8
#: prompts of many kinds that have nothing to do with anybody's taste
PROBE = Path(__file__).parent / "data/unrelated.jsonl"


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
        probe: ask the prompts of `PROBE` too. Default: where neither prompts nor tasks are named.

    Returns:
        The files written.

    Raises:
        ValueError: there is nothing to measure, no adapter, or a file, prompt or task that can't be used.
    """
    config, folders = split_targets(targets)
    is_asked = bool(probe)
    if probe is None:
        probe = prompts is None and not tasks and not data
    if prompts is None and not tasks and not data and not config and not probe:
        raise ValueError(
            "nothing to measure: name --prompts FILE, --tasks, or the YAML of a BAPO run"
        )
    chats = read_prompts(prompts) if prompts and not prompts.isdigit() else None
    manager, names = find_tasks(tasks, data) if tasks or data else (None, [])
    subject = load_subject(config, folders, load_in_4bit, scales)
    # an adapter that is scaled too has one folder
    places = [output] if output else dict.fromkeys(a.folder for a in subject.adapters.values())
    for place in places:
        must_be_writable(place, ELSEWHERE)
    answers = _former_answers(
        subject, prompts, chats, max_new_tokens, required=not tasks and not probe
    )
    if probe and not is_asked and not subject.tokenizer.chat_template and answers:
        LOG.warning("The tokenizer has no chat template: unrelated prompts are not asked")
        probe = False
    probed = asked_before(subject, read_prompts(PROBE), max_new_tokens) if probe else []

    found: dict[str, Any] = {
        "format": 1,
        "model": subject.model.config.name_or_path,
        "versions": {"axolotl-plugin-bapo": __version__}
        | {n: version(n) for n in ("axolotl", "torch", "transformers", "peft", "lm_eval")},
        "adapters": {name: str(adapter.folder) for name, adapter in subject.adapters.items()},
        "scales": {
            name: adapter.scale
            for name, adapter in subject.adapters.items()
            if adapter.scale is not None
        },
        "data": str(data) if data else None,
        "retention": None,
        "probe": None,
        "tasks": [],
        "samples": [],
    }
    if answers or probed:
        retention = measure_retention(subject, answers + probed)
        sets = (
            ("retention", answers, slice(len(answers))),
            ("probe", probed, slice(len(answers), None)),
        )
        for name, asked, own in sets:
            if asked:
                found[name] = {
                    "prompts": len(asked),
                    "tokens": sum(len(answer.answer_ids) for answer in asked),
                    "after": {name: r.part(own).summary() for name, r in retention.items()},
                }
        found["samples"] = _samples(subject, answers + probed, retention, max_new_tokens)
    if names:
        found["tasks"] = run_tasks(subject, manager, names, limit, batch_size, chat)
    print_table(found)  # it is there, whatever becomes of the files
    return [path for place in places for path in write(found, place)]


def _former_answers(
    subject: Subject,
    prompts: str | None,
    chats: list[Chat] | None,
    max_new_tokens: int,
    required: bool,
) -> list[FormerAnswer]:
    if chats is not None:
        return asked_before(subject, chats, max_new_tokens)
    if subject.cfg is None or not is_active(subject.cfg):
        if prompts is None and not required:
            return []
        raise ValueError(
            "held-out rows are those of the YAML of a BAPO run; name it, or a file with prompts (--prompts)"
        )
    _, rows = prepare_rows(subject.cfg, subject.tokenizer)
    if rows is None:
        if prompts is None and not required:
            return []
        raise ValueError(
            "there are no held-out rows: set val_set_size or test_datasets, or name a file with prompts "
            "(--prompts)"
        )
    return held_out_answers(rows, subject.tokenizer, int(prompts) if prompts else None)


def asked_before(subject: Subject, chats: list[Chat], max_new_tokens: int) -> list[FormerAnswer]:
    """Answers of the model as it was before training, with a progress bar."""
    bar = tqdm(total=len(chats), desc="Answers before training", unit="prompt")
    with bar, subject.before():
        return subject.asker().ask(chats, max_new_tokens, bar.update)


def measure_retention(subject: Subject, answers: Sequence[FormerAnswer]) -> dict[str, Retention]:
    """What each adapter of the subject has kept of former answers, with a progress bar; by the adapter's name."""

    def scorer(state: Callable[[], AbstractContextManager]) -> Callable[[dict], torch.Tensor]:
        def score(batch: dict) -> torch.Tensor:
            with state(), autocast(subject.model):
                return response_logits(subject.model, batch)

        return score

    with tqdm(total=len(answers), desc="Retention", unit="answer") as bar:
        return measure(
            answers,
            scorer(subject.before),
            {name: scorer(lambda name=name: subject.after(name)) for name in subject.adapters},
            pad_token_id=subject.pad_token_id,
            vocab_size=subject.model.config.get_text_config().vocab_size,
            device=subject.model.device,
            on_answers=bar.update,
        )


def _samples(
    subject: Subject,
    answers: list[FormerAnswer],
    retention: Mapping[str, Retention],
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Answers before and after, to be read: those that lost most under any adapter first."""
    worst = torch.stack([result.drift for result in retention.values()]).min(0).values
    order = worst.argsort(stable=True)[:_SAMPLES].tolist()
    shown = [answers[i] for i in order]
    prompts = [answer.prompt_ids for answer in shown]

    def text(ids: Sequence[int]) -> str:
        return subject.tokenizer.decode(ids, skip_special_tokens=True).strip()

    after = {}
    for name in subject.adapters:
        with subject.after(name):
            after[name] = subject.asker().answer(prompts, max_new_tokens)
    return [
        {
            "prompt": answer.prompt,
            "before": text(answer.answer_ids),
            "after": {name: text(ids[i]) for name, ids in after.items()},
            "drift": {name: float(result.drift[order[i]]) for name, result in retention.items()},
        }
        for i, answer in enumerate(shown)
    ]
