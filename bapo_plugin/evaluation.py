"""What `bapo eval` does: a model before training against the same model with one or more adapters.

The model is loaded once, quantised as in training; its adapter switched off is what it was before.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from axolotl.cli.config import load_cfg
from axolotl.loaders import load_tokenizer
from peft import PeftConfig, PeftModel
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from bapo_plugin import __version__
from bapo_plugin.anchors.engines import autocast, load_reference
from bapo_plugin.callbacks import RECORD, write_whole
from bapo_plugin.compat import keep_4bit_trainable_on_cpu
from bapo_plugin.config import is_active
from bapo_plugin.data.load import prepare_rows, reference_adapter
from bapo_plugin.forward import response_logits
from bapo_plugin.retention import (
    FormerAnswer,
    Retention,
    former_answers,
    greedy_answers,
    held_out_answers,
    mean_and_error,
    measure,
    read_prompts,
)

RESULT = "bapo-eval"
OWN_TASKS = Path(__file__).parent / "tasks"
# what the paper measures; the first is a task of ours, the others are lm-eval's
PAPER_TASKS = ("scienceqa", "mmlu_humanities", "bigbench_hhh_alignment_multiple_choice")
_SAMPLES = 8


@dataclass
class Subject:
    """A loaded model and its states.

    Args:
        model: with all adapters.
        adapters: shown name -> (name in the model, folder).
        start: the adapter that was there before training, where training went on with one.
        cfg: axolotl's configuration, where one was given.
    """

    model: Any
    tokenizer: Any
    adapters: dict[str, tuple[str, Path]]
    start: str | None = None
    cfg: Any = None

    @contextmanager
    def before(self) -> Iterator[None]:
        """The model as it was before training."""
        if self.start:
            self.model.set_adapter(self.start)
            yield
        else:
            with self.model.disable_adapter():
                yield

    @contextmanager
    def after(self, name: str) -> Iterator[None]:
        """The model with one of the adapters."""
        self.model.set_adapter(self.adapters[name][0])
        yield


def evaluate(
    targets: Sequence[Path],
    *,
    prompts: str | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    chat: bool = False,
    load_in_4bit: bool | None = None,
    output: Path | None = None,
) -> list[Path]:
    """Measure, print a table, and write `bapo-eval.json` and `bapo-eval.md`.

    Args:
        targets: a YAML (then its `output_dir` is the adapter) and folders of adapters, of one base model.
        prompts: file with prompts (see `read_prompts`), or a number of held-out rows of the YAML.
        tasks: names of lm-eval's tasks, YAML files of tasks, or "paper".
        limit: at most so many questions of a task.
        max_new_tokens: of an answer to a prompt of a file, and of the samples.
        batch_size: for the tasks.
        chat: ask the tasks' questions through the chat template.
        load_in_4bit: of a model that is loaded without a YAML; None: as its run recorded it.
        output: folder for the results. Default: the folder of each adapter.

    Returns:
        The files written.

    Raises:
        ValueError: there is nothing to measure, no adapter, or a file, prompt or task that can't be used.
    """
    config = [t for t in targets if t.suffix in (".yml", ".yaml")]
    folders = [t for t in targets if t not in config]
    if len(config) > 1:
        raise ValueError(
            f"more than one YAML: {', '.join(map(str, config))}; name adapters by folder"
        )
    if prompts is None and not tasks and not config:
        raise ValueError(
            "nothing to measure: name --prompts FILE, --tasks, or the YAML of a BAPO run"
        )
    chats = read_prompts(prompts) if prompts and not prompts.isdigit() else None
    manager, names = _find_tasks(tasks) if tasks else (None, [])
    if config:
        subject = _load_run(config[0], folders)
    else:
        subject = _load_adapters(folders, load_in_4bit)
    answers = _former_answers(subject, prompts, chats, max_new_tokens, required=not tasks)

    found: dict[str, Any] = {
        "format": 1,
        "model": subject.model.config.name_or_path,
        "versions": {"axolotl-plugin-bapo": __version__}
        | {n: version(n) for n in ("axolotl", "torch", "transformers", "peft", "lm_eval")},
        "adapters": {name: str(folder) for name, (_, folder) in subject.adapters.items()},
        "retention": None,
        "tasks": [],
        "samples": [],
    }
    if answers:
        retention = _retention(subject, answers)
        found["retention"] = {
            "prompts": len(answers),
            "tokens": sum(len(answer.answer_ids) for answer in answers),
            "after": {name: result.summary() for name, result in retention.items()},
        }
        found["samples"] = _samples(subject, answers, retention, max_new_tokens)
    if names:
        found["tasks"] = _run_tasks(subject, manager, names, limit, batch_size, chat)
    _print(found)
    folders = [output] if output else [folder for _, folder in subject.adapters.values()]
    return [path for folder in folders for path in _write(found, folder)]


# ---------------------------------------------------------------- loading


def _load_run(config: Path, folders: list[Path]) -> Subject:
    if not config.is_file():
        raise ValueError(f"there is no file {config}")
    cfg = load_cfg(str(config))
    if not cfg.adapter:
        raise ValueError(
            f"{config} trains without an adapter: before and after are two models then; compare them with "
            "lm_eval"
        )
    cfg.rl = "dpo"  # axolotl leaves the adapter to the trainer then, and loads the bare model
    adapters = _check_adapters(folders or [Path(cfg.output_dir)])
    tokenizer = load_tokenizer(cfg)
    start = reference_adapter(cfg) if is_active(cfg) else None
    return _with_adapters(load_reference(cfg, tokenizer, None), tokenizer, adapters, start, cfg)


def _load_adapters(folders: Sequence[Path], load_in_4bit: bool | None) -> Subject:
    adapters = _check_adapters(folders)
    bases = {
        str(folder): PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
        for folder in adapters.values()
    }
    if len(set(bases.values())) > 1:
        pairs = ", ".join(f"{folder}: {base}" for folder, base in bases.items())
        raise ValueError(f"the adapters belong to different models ({pairs}); evaluate them apart")
    (base,) = set(bases.values())
    first = next(iter(adapters.values()))
    if load_in_4bit is None:
        record = first / RECORD
        config = json.loads(record.read_text("utf-8"))["config"] if record.is_file() else {}
        load_in_4bit = bool(config.get("load_in_4bit"))
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        device_map={"": 0} if cuda else None,
        quantization_config=quantization if load_in_4bit else None,
    )
    has_tokenizer = (first / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(str(first) if has_tokenizer else base)
    return _with_adapters(model, tokenizer, adapters, None, None)


def _check_adapters(folders: Sequence[Path]) -> dict[str, Path]:
    """name -> folder; the name is the folder's, or its path where two have the same."""
    for folder in folders:
        if not (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{folder} has no trained adapter (no adapter_config.json); train first, or name its folder"
            )
    names = [folder.resolve().name for folder in folders]
    distinct = len(set(names)) == len(names)
    return {
        name if distinct else str(folder): folder
        for name, folder in zip(names, folders, strict=True)
    }


def _with_adapters(
    model: Any, tokenizer: Any, adapters: dict[str, Path], start: str | None, cfg: Any
) -> Subject:
    inside = {name: f"after{i}" for i, name in enumerate(adapters)}
    for name, folder in adapters.items():
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name=inside[name])
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=inside[name])
    if start:
        model.load_adapter(start, adapter_name="start")
    keep_4bit_trainable_on_cpu(model)
    shown = {name: (inside[name], folder) for name, folder in adapters.items()}
    return Subject(model.eval(), tokenizer, shown, "start" if start else None, cfg)


# ---------------------------------------------------------------- retention


def _former_answers(
    subject: Subject,
    prompts: str | None,
    chats: list | None,
    max_new_tokens: int,
    required: bool,
) -> list[FormerAnswer]:
    if chats is not None:
        bar = tqdm(total=len(chats), desc="Answers before training", unit="prompt")
        with bar, subject.before():
            return former_answers(
                subject.model, subject.tokenizer, chats, max_new_tokens, on_answers=bar.update
            )
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


def _retention(subject: Subject, answers: list[FormerAnswer]) -> dict[str, Retention]:
    def scorer(state: Callable[[], Any]) -> Callable[[dict], torch.Tensor]:
        def score(batch: dict) -> torch.Tensor:
            with state(), autocast(subject.model):
                return response_logits(subject.model, batch)

        return score

    with tqdm(total=len(answers), desc="Retention", unit="answer") as bar:
        pad = subject.tokenizer.pad_token_id
        return measure(
            answers,
            scorer(subject.before),
            {name: scorer(lambda name=name: subject.after(name)) for name in subject.adapters},
            pad_token_id=subject.tokenizer.eos_token_id if pad is None else pad,
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
    """Answers before and after to the first prompts, to be read."""
    shown = answers[:_SAMPLES]
    prompts = [answer.prompt_ids for answer in shown]

    def text(ids: Sequence[int]) -> str:
        return subject.tokenizer.decode(ids, skip_special_tokens=True).strip()

    after = {}
    for name in subject.adapters:
        with subject.after(name):
            after[name] = greedy_answers(subject.model, subject.tokenizer, prompts, max_new_tokens)
    return [
        {
            "prompt": answer.prompt,
            "before": text(answer.answer_ids),
            "after": {name: text(ids[i]) for name, ids in after.items()},
            "drift": {name: float(result.drift[i]) for name, result in retention.items()},
        }
        for i, answer in enumerate(shown)
    ]


# ---------------------------------------------------------------- tasks


def _find_tasks(tasks: Sequence[str]) -> tuple[Any, list[str]]:
    """lm-eval's task manager and the tasks' names.

    Raises:
        ValueError: an unknown name, or a YAML that is no task.
    """
    from lm_eval.tasks import TaskManager

    names, folders = [], {OWN_TASKS}
    wanted = [t for task in tasks for t in (PAPER_TASKS if task == "paper" else (task,))]
    for task in wanted:
        path = Path(task)
        if path.suffix not in (".yaml", ".yml"):
            names.append(task)
            continue
        if not path.is_file():
            raise ValueError(f"--tasks: there is no file {path}")
        folders.add(path.resolve().parent)
        # tags such as !function are lm-eval's to read
        name = next(
            (
                line.split(":", 1)[1].strip().strip("\"'")
                for line in path.read_text("utf-8").splitlines()
                if line.startswith(("task:", "group:"))
            ),
            None,
        )
        if not name:
            raise ValueError(
                f"--tasks: {path} has no line `task: NAME`, so it is no task of lm-eval"
            )
        names.append(name)
    only_files = all(Path(task).suffix in (".yaml", ".yml") for task in wanted)
    manager = TaskManager(
        include_path=[str(folder) for folder in sorted(folders)], include_defaults=not only_files
    )
    if unknown := [name for name in names if name not in manager.all_tasks]:
        hints = [
            f"{name!r}"
            + (f" (did you mean {', '.join(near)}?)" if (near := _near(name, manager)) else "")
            for name in unknown
        ]
        raise ValueError(
            f"--tasks: unknown {', '.join(hints)}; `lm_eval ls tasks` lists lm-eval's own, and a file of yours is "
            "named by its path"
        )
    return manager, names


def _near(name: str, manager: Any) -> list[str]:
    return difflib.get_close_matches(name, manager.all_tasks, n=3)


def _run_tasks(
    subject: Subject,
    manager: Any,
    names: list[str],
    limit: int | None,
    batch_size: int,
    chat: bool,
) -> list[dict[str, Any]]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=batch_size)

    def run(state: Callable[[], Any]) -> dict[str, Any]:
        with state(), autocast(subject.model):
            return simple_evaluate(
                lm,
                tasks=names,
                task_manager=manager,
                limit=limit,
                log_samples=True,
                apply_chat_template=chat,
                bootstrap_iters=0,
            )

    before = run(subject.before)
    after = {name: run(lambda name=name: subject.after(name)) for name in subject.adapters}
    return compare_tasks(before, after)


def compare_tasks(before: dict[str, Any], after: Mapping[str, dict[str, Any]]) -> list[dict]:
    """lm-eval's results before and after, one entry a task and metric.

    The standard error of the difference is that of the paired differences, question by question, where
    lm-eval gives a number for each; None elsewhere (metrics of a whole set, such as BLEU).
    """
    inside = {
        sub
        for group, subs in (before.get("group_subtasks") or {}).items()
        for sub in subs
        if sub != group
    }
    entries = []
    for task, metrics in before["results"].items():
        if task in inside:
            continue
        for key, value in metrics.items():
            metric, _, filters = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not filters:
                continue
            entry = {
                "task": task,
                "metric": metric if filters == "none" else f"{metric} ({filters})",
                "before": {
                    "value": value,
                    "se": _number(metrics.get(f"{metric}_stderr,{filters}")),
                },
                "after": {},
            }
            own = _per_question(before, task, metric, filters)
            if own and entry["before"]["se"] is None:
                entry["before"]["se"] = mean_and_error(list(own.values()))["se"]
            for name, result in after.items():
                new = result["results"][task][key]
                theirs = _per_question(result, task, metric, filters)
                error = se = None
                if own and own.keys() == theirs.keys():
                    differences = [theirs[q] - own[q] for q in own]
                    error = mean_and_error(differences)["se"]
                    se = mean_and_error(list(theirs.values()))["se"]
                entry["after"][name] = {
                    "value": new,
                    "se": se,
                    "difference": new - value,
                    "difference_se": error,
                }
            entries.append(entry)
    return entries


def _per_question(result: dict, task: str, metric: str, filters: str) -> dict[tuple, float]:
    """(task, question) -> its number, over a group's tasks."""
    subtasks = _leaves(result, task)
    return {
        (sub, sample["doc_id"]): float(sample[metric])
        for sub in subtasks
        for sample in result.get("samples", {}).get(sub, [])
        if sample.get("filter", "none") == filters and isinstance(sample.get(metric), int | float)
    }


def _leaves(result: dict, task: str) -> list[str]:
    subs = (result.get("group_subtasks") or {}).get(task) or []
    return [leaf for sub in subs for leaf in _leaves(result, sub)] if subs else [task]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


# ---------------------------------------------------------------- results


def table_rows(found: dict[str, Any]) -> list[list[str]]:
    """The results as text: a heading, then one row a number, `before` and for each adapter `after`."""
    names = list(found["adapters"])
    rows = [["what", "before", *[part for name in names for part in (name, "difference")]]]
    if retention := found["retention"]:
        for key, label, at_start in (
            ("drift", "drift of former answers, nats an answer", 0.0),
            ("drift_per_token", "drift, nats a token", 0.0),
            ("agreement", "agreement of the likeliest token", 1.0),
            ("kl", "KL(before ‖ after), nats a token", 0.0),
        ):
            row = [label, _short(at_start, None)]
            for name in names:
                part = retention["after"][name][key]
                row += [_short(part["value"], part["se"]), f"{part['value'] - at_start:+.3f}"]
            rows.append(row)
    for entry in found["tasks"]:
        row = [f"{entry['task']}, {entry['metric']}", _short(**entry["before"])]
        for name in names:
            part = entry["after"][name]
            difference = f"{part['difference']:+.3f}"
            if part["difference_se"] is not None:
                difference += f" ± {part['difference_se']:.3f}"
            row += [_short(part["value"], part["se"]), difference]
        rows.append(row)
    return rows


def _short(value: float, se: float | None) -> str:
    return f"{value:.3f}" + ("" if se is None else f" ± {se:.3f}")


def _print(found: dict[str, Any]) -> None:
    heading, *rows = table_rows(found)
    title = f"{found['model']} before and after training; ± is one standard error"
    table = Table(title=title)
    for i, name in enumerate(heading):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _markdown(found: dict[str, Any]) -> str:
    heading, *rows = table_rows(found)

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    text = [f"# {found['model']} before and after training", ""]
    if found["retention"]:
        text += [
            f"Former answers: {found['retention']['prompts']} prompts, {found['retention']['tokens']} tokens. ± is one "
            "standard error; that of a difference is paired, question by question.",
            "",
        ]
    text += [line(heading), line(["---"] * len(heading)), *map(line, rows), ""]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return "\n".join([*text, versions, ""])


def _write(found: dict[str, Any], folder: Path) -> list[Path]:
    texts = {
        ".json": json.dumps(found, indent=1, ensure_ascii=False),
        ".md": _markdown(found),
    }
    paths = []
    for suffix, text in texts.items():
        path = folder / f"{RESULT}{suffix}"
        write_whole(path, text)
        paths.append(path)
    return paths
