"""`bapo eval`: the paper's tasks from files, results by group and subject, adapters scaled."""

import json
import socket
from contextlib import ExitStack
from pathlib import Path

import datasets.config
import huggingface_hub.constants
import lm_eval.tasks
import pytest
import torch
from datasets import Dataset
from helpers import fresh_lora, randomize_lora, write_config
from lm_eval.tasks import TaskManager
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny import make_rows, make_tokenizer, save_model, write_jsonl
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bapo_plugin.cli import app
from bapo_plugin.evaluation import run as evaluation
from bapo_plugin.evaluation.harness import find_tasks
from bapo_plugin.evaluation.local import read_rows
from bapo_plugin.evaluation.subject import load_adapters
from bapo_plugin.evaluation.task_results import compare_tasks

SUBJECTS = ("formal_logic", "prehistory")


def questions(n, choices, seed, **more):
    """Rows of plain words; the right choice is now the first, now the second."""
    rows = make_rows(n * choices, seed=seed)
    return [
        {
            "question": rows[i]["prompt"],
            "choices": [f"{row['chosen']} {k}" for k, row in enumerate(rows[i::n][:choices])],
            "answer": i % 2,
            **{key: values[i * len(values) // n] for key, values in more.items()},
        }
        for i in range(n)
    ]


def write_data(folder):
    folder.mkdir(exist_ok=True)
    science = questions(9, 3, 1, group=["language science", "natural science", "social science"])
    for i, row in enumerate(science):
        row |= {"hint": "rain is water" if i % 2 else "", "split": "test", "grade": "grade2"}
    picture = science[0] | {"image": "a picture"}
    write_jsonl(folder / "scienceqa.jsonl", [*science, picture])
    humanities = questions(12, 4, 2, subject=SUBJECTS, group=["humanities"])
    others = questions(4, 4, 3, subject=["astronomy"], group=["science"])
    write_jsonl(folder / "mmlu.jsonl", others[:2] + humanities + others[2:])
    pairs = [
        {"group": group, "prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["base"]}
        for group, rows in zip(
            ("honest", "helpful", "harmless", "[/b] | other"),
            [make_rows(16, seed=4)] * 4,
            strict=True,
        )
        for row in rows[:4]
    ]
    write_jsonl(folder / "hhh.jsonl", pairs)
    truth = questions(8, 3, 5, group=["Law", "Health"])
    write_jsonl(folder / "truthfulqa.jsonl", [row | {"answer": 0} for row in truth])
    return folder


def save_adapter(folder, base, **lora):
    config = LoraConfig(**(fresh_lora().to_dict() | lora))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    randomize_lora(model, std=2.0, seed=1)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    save_model(folder / "model", "qwen2")
    save_adapter(folder / "bapo", folder / "model")
    write_data(folder / "data")
    (folder / "prompts.txt").write_text("tell me about the sea\nwhat is rain\nwhy is it blue\n")
    return folder


def run(*args):
    env = {"AXOLOTL_LOG_LEVEL": "WARNING", "AXOLOTL_DO_NOT_TRACK": "1", "COLUMNS": "80"}
    return CliRunner().invoke(app, ["eval", *map(str, args)], env=env)


@pytest.fixture(scope="module")
def found(folder):
    """All local tasks, with a hub that would be asked, and no network that could reach it."""
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(socket.socket, "connect", refuse)
        result = run(
            *(folder / "bapo", "--tasks", "paper,truthfulqa", "--data", folder / "data"),
            *("-o", folder / "results"),
        )
    assert result.exit_code == 0, result.output
    assert not asked
    results = json.loads((folder / "results/bapo-eval.json").read_text())
    return result.output, results["tasks"], (folder / "results/bapo-eval.md").read_text()


def names(entry, kind):
    return {part["name"]: part["questions"] for part in entry["parts"] if part["kind"] == kind}


def test_the_papers_tasks_come_from_files(found):
    _, tasks, _ = found
    entries = {(entry["task"], entry["metric"]): entry for entry in tasks}
    assert {key: entry["questions"] for key, entry in entries.items()} == {
        ("scienceqa", "acc"): 9,
        ("scienceqa", "acc_norm"): 9,
        ("mmlu_humanities", "acc"): 12,
        ("hhh", "acc"): 16,
        ("hhh", "acc_norm"): 16,
        ("truthfulqa", "acc"): 8,
        ("truthfulqa", "acc_norm"): 8,
    }
    science = {"language science": 3, "natural science": 3, "social science": 3}
    assert names(entries["scienceqa", "acc"], "group") == science
    assert names(entries["mmlu_humanities", "acc"], "subject") == dict.fromkeys(SUBJECTS, 6)
    hhh = {"honest": 4, "helpful": 4, "harmless": 4, "[/b] | other": 4}
    assert names(entries["hhh", "acc"], "group") == hhh
    assert entries["mmlu_humanities", "acc"]["chance"] == 0.25
    assert entries["truthfulqa", "acc"]["parts"] == []


def test_subjects_are_scored_as_the_model_answers(found, folder):
    """Each subject's accuracy and paired difference, from the logits of the letters."""
    _, tasks, _ = found
    (entry,) = [entry for entry in tasks if entry["task"] == "mmlu_humanities"]
    tokenizer = make_tokenizer()

    def right(model, row):
        letters = "".join(
            f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"], strict=True)
        )
        text = (
            "The following are multiple choice questions (with answers) about "
            f"{row['subject'].replace('_', ' ')}.\n\n{row['question']}\n{letters}Answer:"
        )
        prompt = len(tokenizer(text)["input_ids"])
        ids = torch.tensor([tokenizer(f"{text} {letter}")["input_ids"] for letter in "ABCD"])
        with torch.no_grad():
            logps = torch.log_softmax(model(ids).logits[:, prompt - 1 : -1], -1)
        sums = logps.gather(-1, ids[:, prompt:, None]).sum((1, 2))
        return float(sums.argmax() == row["answer"])

    subject = load_adapters([folder / "bapo"], None)
    rows = read_rows("mmlu_humanities", folder / "data")
    changed = 0
    for part in entry["parts"]:
        own = [row for row in rows if row["subject"] == part["name"]]
        with subject.before():
            before = torch.tensor([right(subject.model, row) for row in own])
        with subject.after("bapo"):
            difference = torch.tensor([right(subject.model, row) for row in own]) - before
        after = part["after"]["bapo"]
        assert part["before"]["value"] == pytest.approx(float(before.mean()))
        assert after["difference"] == pytest.approx(float(difference.mean()))
        assert after["difference_se"] == pytest.approx(float(difference.std()) / 6**0.5)
        changed += int(difference.abs().sum())
    assert changed, "the case shows nothing"


def test_prompts_are_those_of_lm_eval(folder):
    """MMLU and TruthfulQA ask word for word as lm-eval's own tasks ask the same rows."""
    theirs = Path(lm_eval.tasks.__file__).parent
    manager, tasks = find_tasks(["mmlu_humanities", "truthfulqa"], folder / "data")
    own = TaskManager(
        include_path=[str(theirs / "mmlu/default"), str(theirs / "truthfulqa")],
        include_defaults=False,
    )

    def asked(manager, config):
        (task,) = manager.load_config(dict(config)).values()
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests()
        return {instance.args for instance in task.instances}

    mmlu, truth = (asked(manager, task) for task in tasks)
    rows = read_rows("mmlu_humanities", folder / "data")
    expected = set()
    for subject in SUBJECTS:
        mine = Dataset.from_list([row for row in rows if row["subject"] == subject])
        splits = {"test": mine, "dev": mine}
        expected |= asked(
            own, {"task": f"mmlu_{subject}", "custom_dataset": lambda splits=splits, **_: splits}
        )
    assert mmlu == expected and len(mmlu) == 12 * 4
    rows = Dataset.from_list(
        [
            {"question": row["question"], "mc1_targets": {"choices": row["choices"]}}
            for row in read_rows("truthfulqa", folder / "data")
        ]
    )
    custom = {"task": "truthfulqa_mc1", "custom_dataset": lambda **_: {"validation": rows}}
    assert truth == asked(own, custom) and len(truth) == 8 * 3


def test_the_screen_is_short_and_the_files_are_whole(found):
    output, _, text = found
    assert output.count("  honest") == 1 and output.count("  social science") == 1
    assert "formal_logic" not in output and "≈ at chance" in output
    assert "| mmlu_humanities, acc | prehistory | 6 | 0.250, at chance |" in text
    assert "| hhh, acc | honest | 4 | 0.500" in text
    assert "| truthfulqa, acc | all | 8 | 0.333" in text
    # what stands in a file is neither markup nor a cell's end
    assert "  [/b] | other" in output and "| hhh, acc | [/b] \\| other | 4 | 0.500" in text
    assert "| what | before | bapo | difference |" in text and "astronomy" not in text


def test_a_limit_leaves_out_no_subject(folder):
    rows = read_rows("mmlu_humanities", folder / "data")
    assert [row["subject"] for row in rows[:4]] == [*SUBJECTS, *SUBJECTS]
    assert len({row["question"] for row in rows}) == 12


def test_the_right_choice_does_not_always_stand_first(folder):
    raw = [json.loads(line) for line in (folder / "data/truthfulqa.jsonl").read_text().splitlines()]
    right = {row["question"]: row["choices"][0] for row in raw}
    rows = read_rows("truthfulqa", folder / "data")
    assert rows == read_rows("truthfulqa", folder / "data")
    assert {row["answer"] for row in rows} == {0, 1, 2}
    assert all(row["choices"][row["answer"]] == right[row["question"]] for row in rows)
    assert {row["answer"] for row in read_rows("hhh", folder / "data")} == {0, 1}


GOOD = {"group": "humanities", "subject": "law", "question": "q", "choices": list("abcd")}


@pytest.mark.parametrize(
    "file, line, message",
    [
        ("mmlu.jsonl", '{"group": ', "line 2: it is not JSON"),
        ("mmlu.jsonl", "[1]", "line 2: it is no object; write one with group, question"),
        ("mmlu.jsonl", b"\xff", "line 2: it is not UTF-8 text; save the file as UTF-8"),
        ("mmlu.jsonl", GOOD, "line 2: `answer` is missing among group, subject, question, choices"),
        ("mmlu.jsonl", GOOD | {"answer": 4}, "line 2: `answer` is 4; it must be the place"),
        ("mmlu.jsonl", GOOD | {"answer": -1}, "line 2: `answer` is -1"),
        ("mmlu.jsonl", GOOD | {"answer": True}, "line 2: `answer` is true"),
        ("mmlu.jsonl", GOOD | {"answer": "A"}, 'line 2: `answer` is "A"'),
        ("mmlu.jsonl", GOOD | {"choices": ["a", "b"], "answer": 0}, "2 texts; it must have 4"),
        ("mmlu.jsonl", GOOD | {"choices": "abcd", "answer": 0}, '`choices` is "abcd"; it must be'),
        ("scienceqa.jsonl", {"group": "x", "hint": 3}, "line 2: `hint` is 3; it must be text"),
        ("scienceqa.jsonl", {"group": "x", "choices": ["a", 2]}, "`choices[1]` is 2; it must be"),
        ("hhh.jsonl", {"group": "x", "prompt": " "}, 'line 2: `prompt` is " "; it must be text'),
        (
            "hhh.jsonl",
            {"group": "x", "prompt": "p", "chosen": "a", "rejected": "a"},
            "line 2: `chosen` and `rejected` are the same; leave the row out",
        ),
        ("hhh.jsonl", {"group": "x", "prompt": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_a_line_that_cant_be_used_is_named(tmp_path, monkeypatch, folder, file, line, message):
    def load(*args):
        raise AssertionError("a model is loaded before the files are read")

    monkeypatch.setattr(evaluation, "load_subject", load)
    data = write_data(tmp_path / "data")
    first, *rest = (data / file).read_bytes().splitlines(keepends=True)
    line = json.dumps(line) if isinstance(line, dict) else line
    line = line.encode() if isinstance(line, str) else line
    (data / file).write_bytes(b"".join([first, line + b"\n", *rest]))
    result = run(folder / "bapo", "--tasks", "paper", "--data", data)
    (said,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and message in said, result.output
    assert said.startswith(f"Error: --data: {data / file}, line 2: ") and "; " in said


@pytest.mark.parametrize(
    "args, message",
    [
        (["--data", "{data}"], "no task of --tasks reads it (none is named)"),
        (["--data", "{data}", "--tasks", "arc_easy"], "no task of --tasks reads it (arc_easy)"),
        (["--data", "{data}/none", "--tasks", "paper"], "there is no folder"),
        (["--data", "{model}", "--tasks", "paper"], "there is no file"),
        (["--data", "{empty}", "--tasks", "mmlu_humanities"], "no rows of group `humanities`"),
        (["--scale", "half", "-p", "{prompts}"], "'half' is no number from 0 on"),
        (["--scale", "0.5,-1", "-p", "{prompts}"], "'-1' is no number"),
        (["--scale", "nan", "-p", "{prompts}"], "'nan' is no number"),
    ],
)
def test_errors_say_what_to_do(folder, tmp_path, args, message):
    (tmp_path / "mmlu.jsonl").write_text("\n")
    places = {
        "data": folder / "data",
        "model": folder / "model",
        "empty": tmp_path,
        "prompts": folder / "prompts.txt",
    }
    result = run(folder / "bapo", *(arg.format(**places) for arg in args))
    assert result.exit_code == 2 and message in result.output, result.output


def test_at_chance_is_within_two_errors_of_guessing():
    """40 questions with 4 choices: guessing has 0.25 ± 0.068; with 2 and 4 choices mixed, 0.375."""

    def result(right, choices):
        samples = [
            {"doc_id": i, "acc": float(i < right), "arguments": [()] * n, "target": 0, "doc": {}}
            for i, n in enumerate(choices)
        ]
        return {
            "results": {"quiz": {"acc,none": right / len(choices)}},
            "samples": {"quiz": samples},
            "configs": {"quiz": {"output_type": "multiple_choice"}},
        }

    def entry(right, choices):
        before = result(right, choices)
        (found,) = compare_tasks(before, {"x": before})
        return found["chance"], found["at_chance"]

    assert entry(15, [4] * 40) == (0.25, True)  # 1.8 errors above
    assert entry(16, [4] * 40) == (0.25, False)  # 2.2
    assert entry(4, [4] * 40) == (0.25, False)  # below is no guessing either
    assert entry(15, [2, 4] * 20) == (0.375, True)
    assert entry(0, [4]) == (0.25, True)  # one question says nothing
    before = result(1, [4] * 4)
    before["configs"]["quiz"]["output_type"] = "generate_until"
    (found,) = compare_tasks(before, {"x": before})
    assert found["chance"] is found["at_chance"] is None


def test_scaled_adapters_get_columns_of_their_own(folder):
    result = run(
        *(folder / "bapo", "-p", folder / "prompts.txt", "--max-new-tokens", 4),
        *("--tasks", "hhh", "--data", folder / "data", "--limit", 8),
        *("--scale", "1", "--scale", "0,0.5", "-o", folder / "scaled"),
    )
    assert result.exit_code == 0, result.output
    found = json.loads((folder / "scaled/bapo-eval.json").read_text())
    scales = {"bapo × 1": 1.0, "bapo × 0": 0.0, "bapo × 0.5": 0.5}
    assert found["scales"] == scales and list(found["adapters"]) == ["bapo", *scales]
    after = found["retention"]["after"]
    # scaled adapters aren't asked anew, for repetition
    assert after["bapo × 1"].items() <= after["bapo"].items()
    assert after["bapo"].keys() - after["bapo × 1"].keys() == {
        "repetition",
        "repetition_worst_tenth",
    }
    assert abs(after["bapo"]["drift"]["value"]) > 0.1
    assert after["bapo × 0"]["drift"] == {"value": 0.0, "se": 0.0}
    assert after["bapo × 0"]["agreement"]["value"] == 1.0
    assert after["bapo × 0.5"]["drift"]["value"] not in (0.0, after["bapo"]["drift"]["value"])
    for entry in found["tasks"]:
        assert entry["after"]["bapo × 1"] == entry["after"]["bapo"]
        assert entry["after"]["bapo × 0"]["value"] == entry["before"]["value"]
        assert entry["after"]["bapo × 0"]["difference_se"] == 0.0
    # four columns would be too wide: one row an adapter
    assert "adapter" in result.output and "bapo × 0.5" in result.output


@pytest.mark.parametrize(
    "lora", [{}, {"use_rslora": True}, {"lora_bias": True, "target_modules": ["q_proj"]}]
)
def test_half_an_adapter_is_half_its_weights(folder, tmp_path, lora):
    """θ_0 + α Δ, with Δ = scaling · B A merged by hand, and nothing left of it afterwards."""
    save_adapter(tmp_path / "mine", folder / "model", **lora)
    subject = load_adapters([tmp_path / "mine"], None, [0.5])
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    scaling = 8 / 4**0.5 if lora.get("use_rslora") else 8 / 4
    parts = subject.model.state_dict()
    with torch.no_grad():
        for name, module in model.named_modules():
            up = parts.get(f"base_model.model.{name}.lora_B.after0.weight")
            if up is not None:
                down = parts[f"base_model.model.{name}.lora_A.after0.weight"]
                module.weight += 0.5 * scaling * up @ down
                if lora.get("lora_bias"):
                    module.bias += (
                        0.5 * scaling * parts[f"base_model.model.{name}.lora_B.after0.bias"]
                    )
    ids = torch.tensor([make_tokenizer()("tell me about the sea")["input_ids"]])

    def logits(*names):
        with ExitStack() as stack, torch.no_grad():
            for name in names:
                stack.enter_context(subject.after(name))
            return subject.model(ids).logits

    full = logits("mine")
    half = logits("mine × 0.5")
    with torch.no_grad():
        torch.testing.assert_close(half, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert (half - full).abs().max() > 0.1
    assert torch.equal(logits("mine"), full)
    with pytest.raises(KeyboardInterrupt), subject.after("mine × 0.5"):
        raise KeyboardInterrupt
    assert torch.equal(logits("mine"), full)


@pytest.mark.parametrize(
    "config, reason",
    [
        (LoraConfig(use_dora=True), "DoRA also learns"),
        (LoraConfig(modules_to_save=["lm_head"]), "whole modules (lm_head: modules_to_save)"),
        (LoraConfig(bias="lora_only"), "trained biases (bias: lora_only)"),
        (LoraConfig(trainable_token_indices=[1]), "trained embeddings of tokens"),
        (LoraConfig(init_lora_weights="pissa"), "init_lora_weights: pissa changes the weights"),
        (
            LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[1]),
            "a variant of LoRA (alora_invocation_tokens)",
        ),
        (IA3Config(), "it is IA3, not LoRA"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cant_be_scaled_is_refused(folder, tmp_path, config, reason):
    config.base_model_name_or_path = "there is no such model"
    config.save_pretrained(tmp_path / "other")
    save_file({}, tmp_path / "other/adapter_model.safetensors")
    result = run(tmp_path / "other", "-p", folder / "prompts.txt", "--scale", "0.5")
    (said,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and reason in said, result.output
    assert said.endswith("; evaluate it without --scale")


def test_a_run_that_went_on_cant_be_scaled(folder):
    """Its model before is not the bare one, so that the scaled adapter leads elsewhere."""
    save_adapter(folder / "on", folder / "model")
    config = write_config(
        folder, lora_model_dir=str(folder / "bapo"), output_dir=str(folder / "on")
    )
    result = run(config, "-p", folder / "prompts.txt", "--scale", "0.5")
    assert result.exit_code == 2 and "went on training the adapter" in result.output
