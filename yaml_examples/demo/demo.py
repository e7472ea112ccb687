"""The demo behind `make demo`: train with DPO and with BAPO, then look at what each has learned and what it has kept.

Both runs are yaml_examples/smollm2-qlora-cpu.yml; DPO's has `bapo.anchor_weight: 0` and an output_dir of its own,
and nothing else is changed. Base responses and reference log-probs are made once, by the first run. An interrupted run
goes on where it stopped, a finished one is reused.

    python yaml_examples/demo/demo.py                     # train, measure, compare
    python yaml_examples/demo/demo.py "Your question?"    # the answers to your own prompts
"""

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CONFIG = Path("yaml_examples/smollm2-qlora-cpu.yml")
DPO_CONFIG = Path("outputs/smollm2-dpo.yml")
DPO_OUTPUT = "outputs/smollm2-dpo"
MAX_NEW_TOKENS = 40  # of an answer that is measured or shown
TASTE = "How do I make a good cup of tea?"  # like the data, and not in it
BIN = Path(sys.executable).parent  # the commands of this environment


def main(own_prompts: Sequence[str]) -> None:
    os.chdir(ROOT)
    # a small model on a CPU, from the disk
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("HF_HUB_OFFLINE", "1")):
        os.environ.setdefault(name, value)
    config = yaml.safe_load(CONFIG.read_text("utf-8"))
    dpo = as_dpo(config)
    DPO_CONFIG.parent.mkdir(exist_ok=True)
    DPO_CONFIG.write_text(
        f"# written by demo.py: {CONFIG} with anchor_weight 0 and another output_dir\n"
        + yaml.safe_dump(dpo, sort_keys=False, allow_unicode=True),
        "utf-8",
    )
    outputs = {"DPO": Path(dpo["output_dir"]), "BAPO": Path(config["output_dir"])}
    # the first one makes what both need
    train("BAPO", CONFIG, config, outputs["BAPO"])
    train("DPO", DPO_CONFIG, dpo, outputs["DPO"])
    os.environ.setdefault("AXOLOTL_LOG_LEVEL", "WARNING")  # it prints the whole configuration
    os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
    compare(config, outputs, own_prompts)


def as_dpo(config: dict[str, Any]) -> dict[str, Any]:
    """The same run without the anchor, which is DPO."""
    dpo = copy.deepcopy(config)
    dpo["bapo"]["anchor_weight"] = 0
    dpo["output_dir"] = DPO_OUTPUT
    return dpo


def train(name: str, path: Path, config: dict[str, Any], output: Path) -> None:
    mark, key = output / "demo.key", key_of(config)
    if not mark.exists() or mark.read_text() != key:
        shutil.rmtree(output, ignore_errors=True)  # another configuration: nothing to go on with
        output.mkdir(parents=True)
        mark.write_text(key)
    if (output / "DONE").exists():
        print(f"{name}: {output} is trained already (delete it to train again)", flush=True)
        return
    print(f"{name}\n$ axolotl train {path} --launcher python", flush=True)
    start = time.perf_counter()
    try:
        failed = subprocess.run([BIN / "axolotl", "train", path, "--launcher", "python"]).returncode
    except KeyboardInterrupt:
        failed = 130
    if failed:
        sys.exit(f"{name}: training stopped; `make demo` goes on at the last checkpoint.")
    (output / "DONE").touch()
    print(f"{name}: trained in {time.perf_counter() - start:.0f} seconds", flush=True)


def key_of(config: dict[str, Any]) -> str:
    """Another one, if a setting or the data differ; comments in the YAML do not count."""
    data = Path(config["datasets"][0]["path"]).read_bytes()
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode() + data).hexdigest()


def compare(config: dict[str, Any], outputs: dict[str, Path], own_prompts: Sequence[str]) -> None:
    from bapo_plugin.answers.prompts import held_out_answers, read_prompts
    from bapo_plugin.evaluation.run import measure_retention
    from bapo_plugin.evaluation.subject import load_run
    from bapo_plugin.prepare import prepare_rows

    print("Loading the model with both adapters ...", flush=True)
    subject = load_run(CONFIG, list(outputs.values()))
    names = dict(zip(outputs, subject.adapters, strict=True))  # DPO -> name of its adapter
    if own_prompts:
        show(answer(subject, names, own_prompts), dict.fromkeys(own_prompts, ""))
        return

    print("Asking the model before training ...", flush=True)
    with subject.before():
        unrelated = subject.asker().ask(read_prompts("unrelated"), MAX_NEW_TOKENS)
    _, rows = prepare_rows(subject.cfg, subject.tokenizer)
    held_out = held_out_answers(rows, subject.tokenizer, None)
    print("Measuring what each run has kept ...", flush=True)
    measured = measure_retention(subject, unrelated + held_out)
    kept = {run: measured[adapter] for run, adapter in names.items()}
    parts = {
        f"{len(unrelated)} prompts that have nothing to do with the data": slice(len(unrelated)),
        f"{len(held_out)} held-out rows of the data": slice(len(unrelated), None),
    }
    # to be read: the taste, and where each run lost most, whichever prompt that is
    shown = {TASTE: "like the data"}
    for run, found in kept.items():
        worst = int(found.drift[: len(unrelated)].argmin())
        text = f"lost most under {run}: {found.drift[worst]:.1f} nats"
        prompt = unrelated[worst].prompt
        shown[prompt] = f"{shown[prompt]}, {text}" if prompt in shown else text
    show(answer(subject, names, list(shown)), shown)
    show_numbers({run: last_evaluation(output) for run, output in outputs.items()}, kept, parts)
    data = config["datasets"][0]
    console().print(
        f"Both learned to prefer {data['field_chosen']} to {data['field_rejected']} (other tastes: field_chosen and "
        f"field_rejected in {CONFIG}). A drift of 0 means that the model's former answer is as likely as before "
        "training; far below 0 it is forgotten. ± is one standard error. Both took the same steps: BAPO learns more "
        "slowly, so its margin is smaller. benchmarks/forgetting.py compares them at the same margin.",
        highlight=False,
    )
    print("\nGo on with:", *commands(outputs), sep="\n  ")


def answer(subject: Any, names: dict[str, str], prompts: Sequence[str]) -> dict[str, list[str]]:
    """Whose answers -> greedy answers to `prompts`, as text."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    states = {
        "before": subject.before,
        **{n: lambda a=a: subject.after(a) for n, a in names.items()},
    }
    texts = {}
    for name, state in states.items():
        with state():
            found = subject.asker().ask(chats, MAX_NEW_TOKENS)
        texts[name] = [
            subject.tokenizer.decode(one.answer_ids, skip_special_tokens=True).strip()
            for one in found
        ]
    return texts


def last_evaluation(output: Path) -> dict[str, float]:
    """Of the held-out pairs after training, as the trainer logged it."""
    states = sorted(output.glob("checkpoint-*/trainer_state.json"), key=lambda p: p.stat().st_mtime)
    log = json.loads(states[-1].read_text("utf-8"))["log_history"]
    return [entry for entry in log if "eval_drift/base" in entry][-1]


def show(texts: dict[str, list[str]], prompts: dict[str, str]) -> None:
    """Answers below each other, so that what changed is seen; `prompts`: prompt -> a word about it."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Answers (their first {MAX_NEW_TOKENS} tokens, greedy)", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for i, (prompt, about) in enumerate(prompts.items()):
        asked = Text(prompt, style="bold")
        if about:
            asked.append(f"\n({about})", style="not bold italic")
        table.add_row("asked", asked)
        for j, (name, found) in enumerate(texts.items(), start=1):
            table.add_row(name, Text(found[i]), end_section=j == len(texts))
    console().print(table)


def show_numbers(
    learned: dict[str, dict[str, float]],
    kept: dict[str, Any],
    parts: dict[str, slice],
) -> None:
    """One column a run.

    Args:
        learned: the last evaluation of each run.
        kept: its retention on former answers.
        parts: heading -> which of the former answers it stands for.
    """
    from rich.table import Table

    from bapo_plugin.scoring.retention import LOST, mean_and_error

    def row(label: str, cell: Any, of: dict[str, Any]) -> None:
        table.add_row(f"  {label}", *(cell(of[name]) for name in learned))

    def with_error(values: Any, digits: int) -> str:
        found = mean_and_error(values)
        return f"{found['value']:.{digits}f} ± {found['se']:.{digits}f}"

    table = Table(title="What each run has learned and kept")
    table.add_column("")
    for name in learned:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("[bold]Learned: the taste, on held-out pairs[/]")
    row("pairs ranked right", lambda log: f"{log['eval_rewards/accuracies']:.0%}", learned)
    row(
        "margin, nats",
        lambda log: f"{log['eval_drift/chosen'] - log['eval_drift/rejected']:.1f}",
        learned,
    )
    for heading, part in parts.items():
        table.add_section()
        table.add_row(f"[bold]Kept: former answers to {heading}[/]")
        row("drift, nats an answer", lambda r, p=part: with_error(r.drift[p], 1), kept)
        row(
            f"answers that lost more than {-LOST:.0f} nats",
            lambda r, p=part: f"{(r.drift[p] < LOST).double().mean():.0%}",
            kept,
        )
        row("same likeliest token", lambda r, p=part: f"{r.agreement[p].mean():.0%}", kept)
        row("KL(before ‖ after), nats a token", lambda r, p=part: with_error(r.kl[p], 2), kept)
    console().print(table)


def console() -> Any:
    from rich.console import Console

    return Console(width=min(110, shutil.get_terminal_size((100, 20)).columns))


def commands(outputs: dict[str, Path]) -> list[str]:
    """What works next, in this environment and from the project's folder."""
    place = BIN.relative_to(ROOT) if BIN.is_relative_to(ROOT) else BIN
    folders = " ".join(map(str, outputs.values()))
    return [
        f'{place}/python {Path(__file__).relative_to(ROOT)} "Your own question?"',
        f"{place}/bapo report {folders} -o outputs/report.html",
        f"{place}/bapo eval {CONFIG} {folders} --max-new-tokens {MAX_NEW_TOKENS}",
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
