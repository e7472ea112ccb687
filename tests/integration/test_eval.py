"""`bapo eval`: before against after, on former answers and tasks of lm-eval."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import axolotl, fresh_lora, randomize_lora
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_rows, make_tokenizer, save_model, write_jsonl
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bapo_plugin.cli import app
from bapo_plugin.evaluation import harness, pairs
from bapo_plugin.evaluation.harness import OWN_TASKS, compare_tasks
from bapo_plugin.evaluation.refusals import check_finite
from bapo_plugin.evaluation.subject import load_adapters

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def save_adapter(folder, base, seed):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), fresh_lora())
    randomize_lora(model, std=2.0, seed=seed)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    save_model(folder / "model", "qwen2")
    save_adapter(folder / "first", folder / "model", 1)
    save_adapter(folder / "second", folder / "model", 2)
    (folder / "prompts.txt").write_text(
        "tell me about the sea\nwhat is rain\nwhy is the sky blue\n"
    )
    questions = [
        {
            "question": row["prompt"],
            "choices": [row["chosen"], row["rejected"], row["base"]],
            "answer": i % 3,
        }
        for i, row in enumerate(make_rows(24, seed=4))
    ]
    write_jsonl(folder / "questions.jsonl", questions)
    (folder / "task.yaml").write_text(
        TASK.format(name="little_quiz", rows=folder / "questions.jsonl")
    )
    return folder


def run(*args):
    # the command sets the level for its process: here it must not outlive the call
    env = {"AXOLOTL_LOG_LEVEL": "WARNING", "AXOLOTL_DO_NOT_TRACK": "1"}
    return CliRunner().invoke(app, ["eval", *map(str, args)], env=env)


@pytest.fixture(scope="module")
def found(folder):
    result = run(
        *(folder / "first", folder / "second", "--prompts", folder / "prompts.txt"),
        *("--tasks", folder / "task.yaml", "--max-new-tokens", 8, "-o", folder / "results"),
    )
    assert result.exit_code == 0, result.output
    return result.output, json.loads((folder / "results/bapo-eval.json").read_text())


def test_columns_for_several_adapters(found, folder):
    output, results = found
    assert list(results["adapters"]) == ["first", "second"]
    retention = results["retention"]
    assert retention["prompts"] == 3
    drifts = [retention["after"][name]["drift"]["value"] for name in ("first", "second")]
    assert drifts[0] != drifts[1] and min(map(abs, drifts)) > 1e-2
    # the table's lines may be broken, by the width of the terminal
    assert "difference" in output and f"Wrote {folder / 'results/bapo-eval.json'}" in output
    text = (folder / "results/bapo-eval.md").read_text()
    assert "| former answers: drift, nats an answer |" in text and "| little_quiz, acc |" in text
    assert f"{drifts[1]:.3f}" in text and "| what | before | first | difference |" in text
    (sample,) = [s for s in results["samples"] if s["prompt"] == "tell me about the sea"]
    assert set(sample["after"]) == {
        "first",
        "second",
    }


def test_a_task_is_scored_as_its_definition_says(found, folder):
    """Accuracy before and after from the model's own logits, and the paired standard error."""
    _, results = found
    (entry,) = results["tasks"]
    tokenizer = make_tokenizer()
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]

    def right(model):
        hits = []
        for row in rows:
            prompt = tokenizer(row["question"])["input_ids"]
            sums = []
            for choice in row["choices"]:
                ids = tokenizer(row["question"] + " " + choice)["input_ids"]
                with torch.no_grad():
                    logps = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
                sums.append(sum(float(logps[i - 1, ids[i]]) for i in range(len(prompt), len(ids))))
            hits.append(float(max(range(3), key=sums.__getitem__) == row["answer"]))
        return torch.tensor(hits, dtype=torch.float64)

    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    before = right(base)
    after = right(PeftModel.from_pretrained(base, folder / "second").eval())
    assert entry["before"]["value"] == pytest.approx(float(before.mean()))
    assert entry["after"]["second"]["value"] == pytest.approx(float(after.mean()))
    assert entry["rows"]["before"] == before.tolist()
    assert entry["rows"]["after"]["second"] == after.tolist()
    assert len(set(entry["rows"]["id"])) == 24
    difference = after - before
    assert difference.abs().sum() > 0, "the case shows nothing"
    assert entry["after"]["second"]["difference"] == pytest.approx(float(difference.mean()))
    assert entry["after"]["second"]["difference_se"] == pytest.approx(
        float(difference.std()) / 24**0.5
    )


def test_results_go_to_the_adapters_folder(folder):
    result = run(folder / "first", "-p", folder / "prompts.txt", "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output
    assert {p.name for p in (folder / "first").glob("bapo-eval*")} == {
        "bapo-eval.json",
        "bapo-eval.md",
    }


def test_without_prompts_unrelated_ones_are_asked_and_the_worst_is_shown_first(folder):
    result = run(folder / "second", "--max-new-tokens", 3, "-o", folder / "probed")
    assert result.exit_code == 0, result.output
    assert "unrelated prompts" in result.output and "former answers" not in result.output
    found = json.loads((folder / "probed/bapo-eval.json").read_text())
    assert found["retention"] is None and found["probe"]["prompts"] == 48
    after = found["probe"]["after"]["second"]
    assert after["worst_tenth"]["value"] < after["drift"]["value"]
    shown = [sample["drift"]["second"] for sample in found["samples"]]
    assert len(shown) == 8 and shown == sorted(shown)
    assert sum(shown[:5]) / 5 == pytest.approx(after["worst_tenth"]["value"], rel=1e-6)  # of 48


def test_scienceqa_leaves_out_questions_with_pictures(folder):
    """Our task, with rows as ScienceQA has them in place of the hub's."""
    rows = [
        {
            "image": None if i % 2 else "a picture",
            "question": f"what is {word}",
            "choices": ["sea", "ship"],
            "answer": i % 2,
            "hint": "the sky is blue" if i < 3 else "",
        }
        for i, word in enumerate(["rain", "gold", "egg", "tree", "moon"])
    ]
    write_jsonl(folder / "science.jsonl", rows)
    text = (OWN_TASKS / "scienceqa.yaml").read_text()
    rows_of = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'science.jsonl'}"
    )
    text = text.replace("dataset_path: derek-thomas/ScienceQA", rows_of)
    (folder / "mine").mkdir()
    (folder / "mine/mine.yaml").write_text(text.replace("task: scienceqa", "task: my_scienceqa"))
    shutil.copy(OWN_TASKS / "scienceqa.py", folder / "mine")
    result = run(folder / "first", "--tasks", folder / "mine/mine.yaml", "-o", folder / "science")
    assert result.exit_code == 0, result.output
    found = json.loads((folder / "science/bapo-eval.json").read_text())
    assert found["retention"] is None
    assert {e["metric"] for e in found["tasks"]} == {"acc", "acc_norm"}
    assert found["tasks"][0]["before"]["value"] in (0, 0.5, 1)  # two of five rows


def test_a_group_is_compared_over_its_questions():
    """As lm-eval lays out a group: its own number, and questions in its tasks only."""

    def result(a, b):
        def samples(values):
            return [{"doc_id": i, "filter": "none", "acc": v} for i, v in enumerate(values)]

        return {
            "results": {
                "group": {"acc,none": sum(a + b) / len(a + b), "acc_stderr,none": 0.1},
                "a": {"acc,none": sum(a) / len(a), "acc_stderr,none": "N/A"},
                "b": {"acc,none": sum(b) / len(b), "acc_stderr,none": "N/A"},
            },
            "group_subtasks": {"group": ["a", "b"], "a": [], "b": []},
            "samples": {"a": samples(a), "b": samples(b)},
        }

    (entry,) = compare_tasks(result([1.0, 0.0], [1.0]), {"x": result([1.0, 1.0], [0.0])})
    assert entry["task"] == "group" and entry["before"] == {"value": 2 / 3, "se": 0.1}
    assert entry["after"]["x"]["difference"] == pytest.approx(0)
    # differences 0, +1, -1: their standard deviation is 1
    assert entry["after"]["x"]["difference_se"] == pytest.approx(1 / 3**0.5)


@pytest.mark.parametrize(
    "args, message",
    [
        (["{first}", "--no-probe"], "nothing to measure"),
        (["{model}", "-p", "{prompts}"], "has no trained adapter"),
        (["{first}", "-p", "{here}/none.txt"], "there is no file"),
        (["{first}", "-p", "0"], "--prompts: 0 asks nothing"),
        (["{first}", "-p", "{prompts}", "-o", "{prompts}"], "is a file"),
        (["{first}", "-p", "{prompts}", "-o", "{prompts}/below"], "is a file"),
        (["{first}", "-p", "4"], "held-out rows are those of the YAML"),
        (["{first}", "--tasks", "mmlu_humanitis"], "did you mean mmlu_humanities"),
        (["{first}", "--tasks", "{here}/none.yaml"], "there is no file"),
        (["{here}/none.yml"], "there is no file"),
    ],
)
def test_errors_say_what_to_do(folder, args, message):
    places = {
        "first": folder / "first",
        "model": folder / "model",
        "prompts": folder / "prompts.txt",
        "here": folder,
    }
    result = run(*(arg.format(**places) for arg in args))
    assert result.exit_code == 2 and message in result.output, result.output


def test_adapters_of_different_models_are_refused(folder, tmp_path):
    save_model(tmp_path / "other", "qwen2", seed=3)
    save_adapter(tmp_path / "third", tmp_path / "other", 1)
    result = run(folder / "first", tmp_path / "third", "-p", folder / "prompts.txt")
    assert result.exit_code == 2 and "belong to different models" in result.output


@pytest.mark.parametrize("more", [(), ("--tasks", "{task}")])
def test_an_adapter_that_is_broken_is_said(folder, tmp_path, more):
    shutil.copytree(folder / "first", tmp_path / "mine")
    path = tmp_path / "mine/adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, path)
    more = [text.format(task=folder / "task.yaml") for text in more]
    result = run(tmp_path / "mine", "--no-probe", "-p", folder / "prompts.txt", *more)
    assert result.exit_code == 2 and "the adapter is broken" in result.output, result.output


def test_what_is_no_finite_number_is_no_result():
    results = {
        "samples": {"quiz": [{"resps": [[(-1.5, True)]]}, {"resps": [[(-math.inf, False)]]}]}
    }
    harness._check_finite(results, "mine")
    results["samples"]["quiz"].append({"resps": [[(math.nan, False)], [("text",)]]})
    with pytest.raises(ValueError, match="mine: log-probs of quiz: no finite number in 1 of 3"):
        harness._check_finite(results, "mine")
    with pytest.raises(ValueError, match="the model before training: x: .* another precision"):
        check_finite(torch.tensor([1.0, math.inf]), None, "x")


def test_a_model_that_overflows_is_no_result(folder, monkeypatch):
    """Weights are finite, what they give isn't."""
    from bapo_plugin.evaluation import run as evaluation

    subject = load_adapters([folder / "first"], None)
    given = evaluation.response_logits

    def overflow(model, batch):
        return given(model, batch) * math.nan

    monkeypatch.setattr(evaluation, "response_logits", overflow)
    answers = evaluation.asked_before(subject, [[{"role": "user", "content": "hello"}]], 4)
    with pytest.raises(ValueError, match="first: drift of former answers: no finite number in 1"):
        evaluation.measure_retention(subject, answers)
    monkeypatch.setattr(pairs, "ResponseForward", lambda log: broken_forward)
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}]
    with pytest.raises(ValueError, match="the model before training: responses of held-out pairs"):
        pairs.pair_margins(subject, {"": rows})


def broken_forward(model, outer, batch):
    return SimpleNamespace(logps=torch.full((len(batch["cu_seqlens"]) - 1,), math.nan))


def test_a_checkpoint_is_loaded_as_its_run_was(folder, tmp_path, monkeypatch):
    """The record lies in the run's folder; names in it start where the run was started."""
    from bapo_plugin.runs import recorded_config

    shutil.copytree(folder / "first", tmp_path / "run/checkpoint-4")
    assert recorded_config(tmp_path / "run/checkpoint-4") is None
    config = {
        "base_model": "model",
        "load_in_8bit": True,
        "lora_model_dir": "first",
        "output_dir": "x",
    }
    record = {"config": config, "directory": str(folder)}
    (tmp_path / "run/bapo_run.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    for place in ("run", "run/checkpoint-4"):
        found = recorded_config(tmp_path / place)
        assert found["load_in_8bit"] and found["base_model"] == str(folder / "model")
        assert found["lora_model_dir"] == str(folder / "first")
        assert found["output_dir"] == str(tmp_path / "run")


@pytest.mark.slow
def test_no_network_for_prompts_of_a_file(folder, tmp_path):
    """An adapter without the record of a run, a model in a folder: sockets are forbidden."""
    output = axolotl(
        tmp_path,
        *("eval", folder / "first", "--prompts", folder / "prompts.txt", "--max-new-tokens", 4),
        *("-o", tmp_path),
        program="bapo",
    )
    assert "former answers" in output and (tmp_path / "bapo-eval.json").exists()
