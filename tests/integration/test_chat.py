"""`bapo chat` and `bapo doctor`: what they print, for people and for programs."""

import io
import json

import pytest
from helpers import lora_model, randomize_lora
from tiny import make_tokenizer, save_model
from typer.testing import CliRunner

from bapo_plugin.cli import app
from bapo_plugin.commands import chat as command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    save_model(folder / "model", "llama")
    model = lora_model()
    model.peft_config["default"].base_model_name_or_path = str(folder / "model")
    randomize_lora(model, std=0.5)
    model.save_pretrained(folder / "mine")
    make_tokenizer().save_pretrained(folder / "mine")
    return folder


@pytest.fixture(scope="module")
def subject(folder):
    from bapo_plugin.evaluation.subject import load_adapters

    return load_adapters([folder / "mine"], None)


def run(*args, text=""):
    return CliRunner().invoke(app, ["chat", *map(str, args), "--max-new-tokens", "6"], input=text)


def test_lines_are_asked_apart_before_and_after(folder, monkeypatch, subject):
    monkeypatch.setattr(command, "load_subject", lambda *args: subject)
    out = io.StringIO()
    lines = ["tell me about the sea", "what is gold"]
    command.chat([folder / "mine"], lines, max_new_tokens=6, json_to=out)
    found = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [set(answer) for answer in found] == [{"prompt", "before", "after"}] * 2
    assert any(answer["before"] != answer["after"]["mine"] for answer in found)
    # the second says nothing of the first: asked alone it is the same
    out = io.StringIO()
    command.chat([folder / "mine"], lines[1:], max_new_tokens=6, json_to=out)
    assert json.loads(out.getvalue()) == found[1]


def test_a_conversation_goes_on_with_each_ones_own_answers(subject):
    talk = command.Talk(subject, 6)
    first, second = talk.say("tell me about the sea"), talk.say("and of gold")
    said = [(talk.before, first[0], second[0])]
    said += [(talk.after["mine"], first[1]["mine"], second[1]["mine"])]
    for turns, one, two in said:
        assert [turn["content"] for turn in turns] == [
            "tell me about the sea", one, "and of gold", two,
        ]  # fmt: skip
    talk.begin()
    talk.say("and of gold")
    assert [len(turns) for turns in (talk.before, talk.after["mine"])] == [2, 2]


def test_stdin_of_a_script_is_read_line_by_line(folder):
    result = run(folder / "mine", text="tell me about the sea\n\nwhat is gold\n")
    assert result.exit_code == 0, result.output
    # the first line may stand behind a progress bar
    assert [
        result.output.count(text) for text in ("> tell me about the sea", "> what is gold", "> ")
    ] == [1, 1, 2]
    assert result.output.count("before: ") == result.output.count("after: ") == 2


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(folder):
    result = run(folder / "mine", text="\ufeffwhat is gold\n")
    assert result.exit_code == 0 and "> what is gold\n" in result.output, result.output


def test_text_that_is_not_utf8_is_said(folder, monkeypatch, subject):
    monkeypatch.setattr(command, "load_subject", lambda *args: subject)
    with pytest.raises(ValueError, match="--prompt: .* is not UTF-8 text"):
        command.chat([folder / "mine"], ["caf\udce9"], max_new_tokens=4)
    for errors, said in (("strict", "stdin is not UTF-8"), ("surrogateescape", "stdin, line 2: ")):
        lines = io.TextIOWrapper(io.BytesIO(b"what is gold\ncaf\xe9\n"), "utf-8", errors)
        monkeypatch.setattr("sys.stdin", lines)
        with pytest.raises(ValueError, match=said):
            command.chat([folder / "mine"], max_new_tokens=4)


def test_a_folder_without_weights_is_an_error(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    result = run(tmp_path, "-p", "hello")
    assert result.exit_code == 2 and "has not written a step yet" in result.output


def test_doctor_says_what_will_be_used_and_what_is_missing(monkeypatch):
    import torch

    from bapo_plugin import versions

    monkeypatch.setattr(torch.version, "cuda", None)  # a build for GPUs, where there is none
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(result.stdout)
    assert found["versions"]["axolotl"] and found["used"]["log-prob kernel"] in ("torch", "triton")
    assert found["problems"] == [] and result.exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        result = CliRunner().invoke(app, ["doctor", "--json"])
        (problem,) = json.loads(result.stdout)["problems"]
        assert "built for CUDA 13.0, but no GPU is found" in problem and result.exit_code == 1
    real = versions.version
    for number, said in [
        ("0.22.1", "not tested with axolotl 0.22.1"),
        ("0.18.0", "0.18.0 is too old"),
    ]:
        monkeypatch.setattr(
            versions, "version", lambda n, number=number: number if n == "axolotl" else real(n)
        )
        assert CliRunner().invoke(app, ["doctor", "--json"]).exit_code == 1
        result = CliRunner().invoke(app, ["doctor"])
        assert result.exit_code == 1 and said in " ".join(result.output.split())
