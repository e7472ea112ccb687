"""The paper's experiments: several users' tastes by DPO and by BAPO, and what each keeps of knowledge and values.

    python benchmarks/paper.py --data FOLDER --output paper                 # SmolLM2-135M, 2 cores: half an hour
    python benchmarks/paper.py --data FOLDER --model Qwen/Qwen3-1.7B ...     # a model that knows enough to forget

Users are domains of the Domain-Specific Preference data set (dsp.jsonl in --data), one domain's answer preferred to
another's, and styles as P-SOUPS has them (benchmarks/data). For each user an adapter is trained with DPO and one with
BAPO, on the same pairs in the same order. `bapo eval` then asks the model and all adapters the questions of ScienceQA,
MMLU (humanities) and HHH alignment, from --data. Adapters in --output are not trained again.

Written to --output:

  paper-tasks.png    as the paper's Figure 2: accuracy by user, the black line is the model before
  paper-groups.png   as its Figure 3: change by subject and group, mean over users
  bapo-eval.json     every number, with paired errors
  paper.md           the table

A bar is hollow where the model before is within two standard errors of guessing: there is nothing that it could forget,
and a difference says nothing.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import forgetting
import matplotlib.pyplot as plt
from datasets import disable_progress_bars
from forgetting_data import PERSONAS
from tqdm import tqdm
from transformers.utils import logging

from bapo_plugin.evaluation.run import evaluate
from bapo_plugin.scoring.shared_prefix import uninstall

USERS = ("entertainment", "business", "child", "unfriendly")
COLOURS = {"DPO": "#cf5500", "BAPO": "#008f68"}
NAMES = {"scienceqa": "ScienceQA", "mmlu_humanities": "MMLU, humanities", "hhh": "HHH alignment"}


def train(args: argparse.Namespace) -> list[Path]:
    """An adapter for each user and method, and what it learned; those that are there stay."""
    methods = {"DPO": "DPO", "BAPO": args.method}
    todo = [
        (user, name)
        for user in args.users
        for name in methods
        if not (folder_of(args, user, name) / "learned.json").exists()
    ]
    if todo:
        bench = forgetting.Bench(args)
        rows: dict[str, tuple] = {}
        for user, name in tqdm(todo, desc="Training", unit="adapter"):
            if user not in rows:
                args.words = args.words_of.get(user, 0)
                rows[user] = forgetting.prepare(bench, user)
            found = forgetting.run(bench, methods[name], args.seed, *rows[user])
            model, folder = found.pop("_model"), folder_of(args, user, name)
            found.pop("_scale")
            model.peft_config["default"].base_model_name_or_path = args.model
            model.save_pretrained(folder)
            uninstall(model)
            bench.model = model.unload()
            # last: what is there is whole
            forgetting.write_json(folder / "learned.json", [found])
    return [folder_of(args, user, name) for user in args.users for name in methods]


def folder_of(args: argparse.Namespace, user: str, name: str) -> Path:
    return args.output / f"{user}-{name}"


def one_metric(tasks: list[dict]) -> list[dict]:
    """An entry a task: accuracy by likelihood per byte where lm-eval has it, since choices differ in length."""
    found = {}
    for task in tasks:
        if task["metric"] == "acc_norm" or task["task"] not in found:
            found[task["task"]] = task
    return list(found.values())


def plot_tasks(found: dict, users: list[str], path: Path) -> None:
    """Accuracy of each user's two adapters on each task."""
    tasks = found["tasks"]
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(4.2 * len(tasks), 3.6), layout="constrained"
    )
    for axis, task in zip(axes, tasks, strict=True):
        for i, name in enumerate(COLOURS):
            entries = [task["after"][f"{user}-{name}"] for user in users]
            axis.bar(
                [x + 0.38 * (i - 0.5) for x in range(len(users))],
                [entry["value"] for entry in entries],
                0.36,
                yerr=[entry["difference_se"] or 0 for entry in entries],
                label=name,
                error_kw={"elinewidth": 1},
                **bar_style(COLOURS[name], task["at_chance"]),
            )
        axis.axhline(task["before"]["value"], color="black", label="before")
        if task["chance"] is not None:
            axis.axhline(task["chance"], color="grey", linestyle=":", label="guessing")
        axis.set_xticks(range(len(users)), users, fontsize=8)
        axis.set_ylim(0, 1)
        suffix = "; the model guesses" if task["at_chance"] else ""
        axis.set_title(f"{NAMES[task['task']]} ({task['questions']} questions{suffix})", fontsize=9)
        axis.set_ylabel(task["metric"])
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def bar_style(colour: str, at_chance: bool | None) -> dict:
    return {"color": "none" if at_chance else colour, "edgecolor": colour, "ecolor": "black"}


def changes(part: dict, users: list[str], name: str) -> tuple[float, float]:
    """Mean over users of the change, and its standard error over questions: users share them, so it isn't smaller
    than a user's own."""
    entries = [part["after"][f"{user}-{name}"] for user in users]
    errors = [entry["difference_se"] or 0.0 for entry in entries]
    return (
        statistics.mean(entry["difference"] for entry in entries),
        math.sqrt(statistics.mean(e * e for e in errors)),
    )


def plot_groups(found: dict, users: list[str], path: Path) -> None:
    """Change by group and subject; MMLU's subjects have too few questions each to be shown apart."""
    parts = [
        (f"{NAMES[task['task']].split(',')[0]}\n{part['name']}", part)
        for task in found["tasks"]
        for part in (
            [task | {"name": "all"}] if task["task"] == "mmlu_humanities" else task["parts"]
        )
    ]
    figure, axis = plt.subplots(figsize=(1.5 + 0.95 * len(parts), 3.8), layout="constrained")
    for i, name in enumerate(COLOURS):
        for x, (_, part) in enumerate(parts):
            mean, error = changes(part, users, name)
            axis.bar(
                x + 0.38 * (i - 0.5),
                100 * mean,
                0.36,
                yerr=100 * error,
                label=name if x == 0 else None,
                error_kw={"elinewidth": 1},
                **bar_style(COLOURS[name], part["at_chance"]),
            )
    axis.axhline(0, color="black")
    labels = [f"{label}\n({part['questions']})" for label, part in parts]
    axis.set_xticks(range(len(parts)), labels, fontsize=7)
    axis.set_ylabel("change of accuracy, points")
    axis.set_title("hollow: the model before guesses", fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def table(found: dict, users: list[str], learned: dict[str, dict]) -> str:
    head = ["user", "method", "held-out accuracy", "margin, nats", "KL to before, nats a token"]
    head += [
        f"{NAMES[t['task']]}, before {100 * t['before']['value']:.1f}%" for t in found["tasks"]
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for user in users:
        for name in COLOURS:
            own = learned[f"{user}-{name}"]
            cells = [user, name, f"{own['preference_accuracy']:.2f}", f"{own['margin']:.1f}"]
            cells.append(f"{own['kl']:.3f}")
            for task in found["tasks"]:
                entry = task["after"][f"{user}-{name}"]
                text = f"{100 * entry['value']:.1f}% ({100 * entry['difference']:+.1f} ± {100 * (entry['difference_se'] or 0):.1f})"
                cells.append(text + (", at chance" if task["at_chance"] else ""))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(forgetting.ROOT / ".models/SmolLM2-135M-Instruct"))
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with dsp.jsonl, scienceqa.jsonl, mmlu.jsonl, hhh.jsonl",
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--users", nargs="+", choices=list(PERSONAS), default=list(USERS))
    parser.add_argument("--method", choices=list(forgetting.METHODS), default=forgetting.DEFAULT)
    parser.add_argument("--limit", type=int, default=150, help="questions of a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--pairs", type=int, default=40, help="in training")
    parser.add_argument("--held-out", type=int, default=24, help="pairs")
    parser.add_argument("--unrelated", type=int, default=24, help="prompts that KL is measured on")
    parser.add_argument("--base-tokens", type=int, default=24, help="most of a former answer")
    args = parser.parse_args()
    # what forgetting.py's Bench and run read besides
    args.kept, args.eval_steps = 24, args.steps
    args.words_of = {"entertainment": 24, "business": 24}
    args.output.mkdir(parents=True, exist_ok=True)
    disable_progress_bars()
    logging.set_verbosity_error()
    folders = train(args)
    evaluate(folders, tasks=["paper"], data=args.data, limit=args.limit, output=args.output)
    found = json.loads((args.output / "bapo-eval.json").read_text("utf-8"))
    found["tasks"] = one_metric(found["tasks"])
    learned = {f.name: json.loads((f / "learned.json").read_text("utf-8"))[0] for f in folders}
    plot_tasks(found, args.users, args.output / "paper-tasks.png")
    plot_groups(found, args.users, args.output / "paper-groups.png")
    text = table(found, args.users, learned)
    (args.output / "paper.md").write_text(text + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
