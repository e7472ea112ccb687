"""What documents show runs: Python, commands of ours, data rows. On tiny models in a folder like that of a reader.

Names of models on a hub become the tiny one. Where a block can't run, a comment above it says why (`tests/documents.py`).
"""

import ast
import json
import re
import shlex
import shutil
import sys

import pytest
import torch
import yaml
from documents import BLOCKS, PAGES, blocks
from helpers import fresh_lora, randomize_lora
from peft import get_peft_model
from tiny import make_rows, make_tokenizer, save_model, write_jsonl
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bapo_plugin.cli import app
from bapo_plugin.config import parse_block

# what a reader has and this machine hasn't: a model of a hub, a GPU
STAND_INS = {
    "Qwen/Qwen3-1.7B": "model",
    "AxolotlDPOConfig(": "AxolotlDPOConfig(use_cpu=True, bf16=False, report_to=[], ",
}
ON_A_CPU = {
    "load_in_4bit": False,
    "adapter": "lora",
    "bf16": False,
    "optimizer": "adamw_torch",
    "dataset_prepared_path": "prepared",
}
# commands of ours that no test of this file runs, and who does
ELSEWHERE = {
    r"--tasks (paper|arc_easy)": "asks the hub, or needs the paper's data: tests/integration/test_eval_paper.py",
    r"bapo (export|compare)": "need a whole run, or results of two: tests/integration/test_(export|compare).py",
    r"bapo personas(?!.*--list)": "trains in processes of its own: tests/integration/test_personas.py",
}
# what `make test` has time for; the others are slow tests
QUICK = r"bapo check|bapo doctor|bapo report|--explain|--list"
# of all commands, those that load no model
NO_WEIGHTS = r"bapo (check|plan|doctor|report)|--explain|--list"
# programs of others in bash blocks, and why no test runs them
OTHERS = {
    "make": "makes an environment; CI runs it",
    "accelerate": "starts processes on several GPUs: tests/integration/test_distributed.py",
    "axolotl": "trains: tests/e2e",
    "python": "scripts of others, or of benchmarks/",
    "vllm": "not installed here",
    "ollama": "not installed here",
    "printf": "writes a file for ollama",
}
# blocks with a comment `not run`
MOST_NOT_RUN = 0
TASK = """\
task: my_task
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def stand_in(text):
    for name, tiny in STAND_INS.items():
        text = text.replace(name, tiny)
    return text


def commands():
    """Lines of bash blocks that begin with a command of ours, each once."""
    found = {}
    for block in blocks("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = " ".join(shlex.split(line, comments=True, posix=False))
            if words.startswith("bapo "):
                found.setdefault(words, block.name)
    return found


def wanted():
    """As parameters of a test; those that take long are slow ones."""
    for line, place in commands().items():
        if not any(re.search(pattern, line) for pattern in ELSEWHERE):
            marks = [] if re.search(QUICK, line) else [pytest.mark.slow]
            yield pytest.param(line, id=f"{place} {line}", marks=marks)


def the_minimal_yaml():
    (block,) = [b for b in blocks("yaml") if b.path.parent.name == "yaml_examples"]
    return block.text


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of a reader: the minimal YAML, rows like that of the README, and runs."""
    folder = tmp_path_factory.mktemp("docs")
    save_model(folder / "model", "qwen3")
    (folder / "config.yml").write_text(stand_in(the_minimal_yaml()), "utf-8")
    row = next(json.loads(b.text) for b in blocks("json") if b.path.name == "README.md")
    rows = [
        row | {"prompt": f"{row['prompt']} ({i})", "pirate": f"Arr {i}", "formal": "Sir"}
        for i in range(8)
    ]
    for name in ("preferences.jsonl", "anna.jsonl"):
        write_jsonl(folder / name, rows)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), fresh_lora())
    model.peft_config["default"].base_model_name_or_path = str(folder / "model")
    randomize_lora(model, std=0.5)
    model.save_pretrained(folder / "outputs/mine")
    make_tokenizer().save_pretrained(folder / "outputs/mine")
    history = [
        {"step": s, "loss": 1 / s, "drift/base": -s, "rewards/margins": s} for s in range(1, 5)
    ]
    state = {"global_step": 4, "max_steps": 4, "log_history": history}
    (folder / "outputs/mine/trainer_state.json").write_text(json.dumps(state))
    for name in ("dpo", "bapo", "plain", "pirate"):
        shutil.copytree(folder / "outputs/mine", folder / "outputs" / name)
    for name in ("prompts.txt", "keep.txt"):
        (folder / name).write_text("tell me about the sea\nwhat is rain\n")
    (folder / "folder").mkdir()
    shutil.copy(folder / "model/config.json", folder / "folder")
    (folder / "my_task.yaml").write_text(TASK)
    questions = [
        {"question": r["prompt"], "choices": ["a", "b"], "answer": 0} for r in make_rows(3)
    ]
    write_jsonl(folder / "questions.jsonl", questions)
    (personas,) = [b for b in blocks("yaml") if b.path.name == "personas.md"]
    (folder / "personas.yml").write_text(personas.text)
    return folder


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


def run(line):
    words = shlex.split(stand_in(line))[1:]
    text = None
    if "<" in words:
        place = words.index("<")
        text = open(words[place + 1]).read()
        words = words[:place]
    return CliRunner().invoke(app, words, input=text, env={"COLUMNS": "100"})


@pytest.mark.parametrize("line", wanted())
def test_commands_do_what_is_written(here, line):
    needs_weights = not re.search(NO_WEIGHTS, line)
    if needs_weights:  # the minimal YAML is for a GPU
        written = yaml.safe_load((here / "config.yml").read_text()) | ON_A_CPU
        written["bapo"]["anchors"] = {"max_new_tokens": 6}
        (here / "on-a-cpu.yml").write_text(yaml.safe_dump(written))
        line = line.replace("config.yml", "on-a-cpu.yml")
    done = run(line)
    # 1: something deserves a look or doesn't fit, which is no fault of the command
    assert done.exit_code in ((0,) if needs_weights else (0, 1)), done.output


@pytest.mark.parametrize("block", blocks("json"), ids=lambda b: b.name)
def test_data_rows_are_read(here, tmp_path, block):
    row = json.loads(block.text)
    write_jsonl(tmp_path / "rows.jsonl", [row | {"prompt": f"{row['prompt']} {i}"} for i in (1, 2)])
    written = yaml.safe_load(stand_in(the_minimal_yaml()))
    written["datasets"][0]["path"] = str(tmp_path / "rows.jsonl")
    written["dataset_prepared_path"] = str(tmp_path / "prepared")
    (tmp_path / "config.yml").write_text(yaml.safe_dump(written | {"val_set_size": 0}))
    done = run(f"bapo check {tmp_path}/config.yml --json")
    (found,) = json.loads(done.stdout)["data_sets"]
    assert (found["rows"], found["usable"], found["refused"]) == (2, 2, []), done.output


def sides(text):
    """Before and after a diff."""
    lines = text.splitlines()
    return ["\n".join(x[1:] for x in lines if not x.startswith(mark)) for mark in "+-"]


@pytest.mark.parametrize("block", blocks("diff"), ids=lambda b: b.name)
def test_diffs_lead_from_dpo_to_bapo(block):
    before, after = map(yaml.safe_load, sides(block.text))
    assert before["rl"] == "dpo" and "bapo" not in before
    assert after["rl"] == "bapo"
    parse_block(after.get("bapo"))
    assert {k: v for k, v in after.items() if k not in ("rl", "bapo")} == {
        k: v for k, v in before.items() if k != "rl"
    }


def said(text):
    """First line of a `print` -> the comment behind it, for those that have one."""
    lines = text.splitlines()
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            _, mark, comment = lines[node.end_lineno - 1][node.end_col_offset :].partition("# ")
            if mark:
                found[node.lineno] = comment
    return found


@pytest.mark.parametrize(
    "path",
    [p for p in PAGES if any(b.path == p and not b.not_run for b in blocks("python"))],
    ids=lambda path: path.name,
)
def test_python_runs_from_top_to_bottom(here, path):
    """A page's blocks one after another, as a reader would. The comment behind a `print` begins with what it prints."""
    torch.manual_seed(0)
    names = {"__name__": "__main__"}
    for block in blocks("python"):
        if block.path != path or block.not_run:
            continue
        printed = {}

        def show(*values, printed=printed):
            printed[sys._getframe(1).f_lineno] = " ".join(map(str, values))

        names["print"] = show
        exec(compile(stand_in(block.text), block.name, "exec"), names)
        for line, comment in said(stand_in(block.text)).items():
            assert comment.startswith(printed[line]), f"{block.name}, line {line}"


def test_what_is_not_run_has_a_reason_and_is_counted():
    """Another block that isn't run changes the number here, where someone sees it."""
    skipped = {b.name: b.not_run for b in BLOCKS if b.not_run}
    for name, reason in skipped.items():
        print(f"{name}: {reason}")
    assert all(len(reason) > 10 for reason in skipped.values())
    assert len(skipped) <= MOST_NOT_RUN


def test_programs_of_others_are_those_that_we_know():
    """What a line of a bash block begins with, where it isn't a command of ours."""
    programs = {
        words[0]
        for block in blocks("bash")
        for line in block.text.replace("\\\n", " ").splitlines()
        if (words := shlex.split(line, comments=True)) and words[0] != "bapo"
    }
    assert programs <= OTHERS.keys()
