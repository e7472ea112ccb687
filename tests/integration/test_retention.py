"""Retention: what it measures, and watching it in training."""

import json
import math

import pytest
import torch
from datasets import Dataset
from helpers import bapo_trainer, lora_model, randomize_lora
from tiny import make_model, make_rows, make_tokenizer, save_model
from transformers import AutoModelForCausalLM

from bapo_plugin.answers.prompts import Asker, held_out_answers, read_prompts
from bapo_plugin.rows.held_out import prompts_digest
from bapo_plugin.scoring import retention
from bapo_plugin.scoring.forward import response_logits
from bapo_plugin.scoring.reference import reference_mode
from bapo_plugin.scoring.retention import Retention, measure
from bapo_plugin.training.retention import RetentionCallback

CHATS = [[{"role": "user", "content": row["prompt"]}] for row in make_rows(6)]


def scorers(model):
    def reference(batch):
        with reference_mode(model):
            return response_logits(model, batch)

    return reference, {"policy": lambda batch: response_logits(model, batch)}


def measured(model, answers):
    reference, policies = scorers(model)
    tokenizer = make_tokenizer()
    return measure(
        answers,
        reference,
        policies,
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
        device=torch.device("cpu"),
    )["policy"]


@torch.no_grad()
def by_hand(model, answer):
    """One answer, from the model's full logits: (drift, agreement, KL)."""
    ids = torch.tensor([[*answer.prompt_ids, *answer.answer_ids]])
    start = len(answer.prompt_ids)
    policy = torch.log_softmax(model(ids).logits[0, start - 1 : -1].double(), -1)
    with model.disable_adapter():
        reference = torch.log_softmax(model(ids).logits[0, start - 1 : -1].double(), -1)
    labels = ids[0, start:]
    drift = sum(float(policy[t, y] - reference[t, y]) for t, y in enumerate(labels))
    same = [policy[t].argmax() == reference[t].argmax() for t in range(len(labels))]
    kl = [
        float((reference[t].exp() * (reference[t] - policy[t])).sum()) for t in range(len(labels))
    ]
    return drift, sum(map(float, same)) / len(same), sum(kl) / len(kl)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])  # two transform their logits
def test_measures_what_it_defines(family, monkeypatch):
    model = lora_model(family).eval()
    randomize_lora(model, std=0.3)
    tokenizer = make_tokenizer()
    with reference_mode(model):
        answers = Asker(model, tokenizer).ask(CHATS, 9)
    answers = [a._replace(answer_ids=a.answer_ids[: 3 + i]) for i, a in enumerate(answers)]
    whole = measured(model, answers)
    monkeypatch.setattr(retention, "_LOGITS_BYTES", 4 * len(tokenizer) * 8)  # 8 tokens a batch
    parts = measured(model, answers)
    assert whole.tokens.tolist() == [3, 4, 5, 6, 7, 8]
    for i, answer in enumerate(answers):
        expected = by_hand(model, answer)
        assert abs(expected[0]) > 1e-2 and expected[2] > 1e-4
        for found in (whole, parts):
            values = [float(v[i]) for v in (found.drift, found.agreement, found.kl)]
            assert values == pytest.approx(expected, abs=2e-4)
    summary = whole.summary()
    per_token = whole.drift / whole.tokens
    assert summary["drift_per_token"]["value"] == pytest.approx(float(per_token.mean()))
    assert summary["drift"]["se"] == pytest.approx(float(whole.drift.std()) / 6**0.5)


def test_nothing_is_forgotten_before_training():
    model = lora_model().eval()
    answers = Asker(model, make_tokenizer()).ask(CHATS, 8)
    found = measured(model, answers)
    assert found.drift.abs().max() == 0 and found.kl.abs().max() < 1e-6
    assert found.agreement.min() == 1


def test_greedy_answers_are_those_of_one_prompt_at_a_time():
    model, tokenizer = make_model(vocab_size=len(make_tokenizer())), make_tokenizer()
    prompts = [list(answer.prompt_ids) for answer in Asker(model, tokenizer).ask(CHATS, 1)]
    # a token that comes up early now ends an answer: generation_config.json may name it alone
    (first,) = Asker(model, tokenizer).answer(prompts[:1], 6)
    model.generation_config.eos_token_id = first[2]
    model.generation_config.repetition_penalty = 5.0
    asker = Asker(model, tokenizer)
    found = asker.answer(prompts, 10)
    assert asker.stop_ids == sorted({2, first[2]})
    model.generation_config.repetition_penalty = 1.0
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        alone = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=asker.stop_ids,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert answer == alone[0, len(prompt) :].tolist()
    assert found[0] == first[: first.index(first[2]) + 1]


def test_a_chat_that_the_template_refuses_is_named():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    model = make_model(vocab_size=len(tokenizer))
    chat = [{"role": "system", "content": "x"}, {"role": "user", "content": "why"}]
    with pytest.raises(ValueError, match="prompt 2 can't be asked: .*no system"):
        Asker(model, tokenizer).ask([CHATS[0], chat], 4)


def test_held_out_answers_take_each_prompt_once():
    from datasets import Dataset

    rows = [{"prompt_ids": [5, i // 2], "base_ids": [i]} for i in range(20)]
    answers = held_out_answers(Dataset.from_list(rows), make_tokenizer(), 5)
    assert [a.prompt_ids[1] for a in answers] == [0, 2, 4, 6, 8]
    assert [a.answer_ids for a in answers] == [[0], [4], [8], [12], [16]]
    assert len(held_out_answers(Dataset.from_list(rows), make_tokenizer(), None)) == 10
    # what a template opens is a part of what was asked
    row = {"prompt_ids": [5], "base_ids": [7, 8, 9], "open_tokens": 1}
    (answer,) = held_out_answers(Dataset.from_list([row]), make_tokenizer(), None)
    assert list(answer.prompt_ids) == [5, 7] and answer.answer_ids == [8, 9]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.txt", "\n \n", "has no prompts"),
        ("p.csv", "a", "must be .txt"),
        ("p.jsonl", '{"prompt": "a"}\n{"question": "b"}', "line 2"),
        ("p.jsonl", '{"prompt": "a"}\nno json', "line 2"),
        ("p.jsonl", '{"prompt": [{"role": "user"}]}', "line 1"),
        ("p.jsonl", '{"prompt": 3}', "line 1"),
        ("p.jsonl", '{"prompt": ""}', "line 1"),
        (
            "p.jsonl",
            '{"prompt": [{"role": "assistant", "content": "x"}]}',
            "line 1.*last one of the user",
        ),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_prompt_files(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo \n")
    assert [chat[0]["content"] for chat in read_prompts(tmp_path / "p.txt")] == ["one", "two"]
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": chat}) + '\n{"prompt": "x"}\n')
    assert read_prompts(tmp_path / "p.jsonl") == [chat, [{"role": "user", "content": "x"}]]
    with pytest.raises(ValueError, match="there is no file"):
        read_prompts(tmp_path / "none.txt")


def test_prompt_files_end_lines_at_line_feeds_only(tmp_path):
    text = "a\u2028b\u0085c"
    (tmp_path / "p.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"prompt": text}, ensure_ascii=False).encode() + b"\r\n"
    )
    assert read_prompts(tmp_path / "p.jsonl") == [[{"role": "user", "content": text}]]
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf" + f"{text}\r\ntwo".encode())
    assert [chat[0]["content"] for chat in read_prompts(tmp_path / "p.txt")] == [text, "two"]
    (tmp_path / "q.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_prompts(tmp_path / "q.txt")


# ---------------------------------------------------------------- in training


def entries(trainer):
    return [e for e in trainer.state.log_history if "retention/drift" in e]


def test_held_out_rows_in_training(tmp_path):
    """With all held-out rows, the drift is the evaluation's drift of base responses."""
    trainer = bapo_trainer(
        tmp_path,
        # a line feed, so that no token of a prompt merges with one of its responses
        eval_rows=[row | {"prompt": row["prompt"] + "\n"} for row in make_rows(5, seed=9)],
        bapo={"retention": {"prompts": 5}, "anchor_weight": 0},
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    found = entries(trainer)
    evaluations = [e for e in trainer.state.log_history if "eval_drift/base" in e]
    assert [e["step"] for e in found] == [1, 2] == [e["step"] for e in evaluations]
    for entry, evaluation in zip(found, evaluations, strict=True):
        assert float(entry["retention/drift"]) == pytest.approx(
            float(evaluation["eval_drift/base"]), abs=1e-3
        )
    assert abs(float(found[-1]["retention/drift"])) > 1e-2
    assert float(found[-1]["retention/kl"]) > 0
    assert 0 <= float(found[-1]["retention/agreement"]) < 1


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_file_of_prompts_every_few_steps(tmp_path, full):
    (tmp_path / "p.txt").write_text("tell me about the sea\nwhat is rain\n")
    trainer = bapo_trainer(
        tmp_path,
        model=AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "model"))
        if full
        else lora_model(),
        bapo={
            "retention": {"prompts": str(tmp_path / "p.txt"), "every": 2, "max_new_tokens": 6},
            "shared_prefix": "auto",
        },
        max_steps=4,
        per_device_train_batch_size=2,
    )
    trainer.train()
    assert [e["step"] for e in entries(trainer)] == [2, 4]
    assert float(entries(trainer)[-1]["retention/kl"]) > 0


def test_stops_at_the_first_step_below(tmp_path):
    # the former answers are the rejected ones: DPO drives them away
    rows = [row | {"base": row["rejected"]} for row in make_rows(8)]

    def drifts(limit):
        trainer = bapo_trainer(
            tmp_path,
            rows=rows,
            eval_rows=rows,
            bapo={
                "retention": {"prompts": 5, "every": 1, "stop_below": limit},
                "anchor_weight": 0,
            },
            max_steps=8,
            learning_rate=0.05,
        )
        trainer.train()
        found = [float(entry["retention/drift"]) for entry in entries(trainer)]
        assert len(found) == trainer.state.global_step
        return found

    whole = drifts(-1e9)
    assert len(whole) == 8
    limit = min(whole) / 2
    first = next(i for i, drift in enumerate(whole) if drift < limit)
    assert limit < 0 and first < 7, "the case shows nothing"
    assert drifts(limit) == pytest.approx(whole[: first + 1])


@pytest.mark.parametrize(
    "settings, changes, message",
    [
        ({"prompts": 4, "every": 1}, {}, "there are none"),
        ({"prompts": "nowhere.txt", "every": 1}, {}, "there is no file nowhere.txt"),
        ({"prompts": 4}, {"eval_rows": make_rows(3)}, "eval_strategy is no"),
        (
            {"prompts": 3, "every": 3, "stop_below": -5},
            {"eval_rows": make_rows(3)},
            "retention.every: 3 is more than the 2 steps .* stop_below: -5 never acts; set",
        ),
        (
            {"prompts": 3, "stop_below": -5},
            {"eval_rows": make_rows(3), "eval_strategy": "steps", "eval_steps": 3},
            "^eval_steps: 3 is more than the 2 steps",
        ),
    ],
)
def test_refused(tmp_path, settings, changes, message):
    with pytest.raises(ValueError, match=message):
        bapo_trainer(tmp_path, bapo={"retention": settings}, **changes)


@pytest.mark.parametrize(("every", "warns"), [(3, True), (2, False)])
def test_a_run_that_is_over_before_it_is_measured_is_said(tmp_path, every, warns, caplog):
    settings = {"prompts": 3, "every": every}
    bapo_trainer(tmp_path, bapo={"retention": settings}, eval_rows=make_rows(3))
    assert ("every: 3 is more than the 2 steps of this run" in caplog.text) == warns


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompts": 0}, "bapo.retention.prompts: must be a number"),
        ({"prompts": True}, "bapo.retention.prompts"),
        ({"prompts": -3}, "at least 1"),
        ({"prompts": 3, "stop_below": 2}, "bapo.retention.stop_below"),
        ({"prompts": 3, "evry": 2}, "did you mean every"),
        ({}, "bapo.retention.prompts"),
    ],
)
def test_bad_settings_name_the_key(settings, message):
    from bapo_plugin.config import parse_block

    with pytest.raises(ValueError, match=message):
        parse_block({"retention": settings})


def test_what_is_no_number_is_lost():
    one = torch.ones(20, dtype=torch.float64)
    drift = one.clone()
    drift[[3, 5]], drift[7] = math.nan, math.inf
    found = Retention(one, drift, one, one).summary()
    assert found["lost"]["value"] == pytest.approx(3 / 20)
    assert found["worst_tenth"]["value"] == -math.inf


@pytest.mark.parametrize("drift, stops", [(math.nan, True), (math.inf, True), (-0.5, False)])
def test_a_drift_that_is_no_number_stops_the_run(tmp_path, monkeypatch, drift, stops):
    monkeypatch.setattr(RetentionCallback, "measure", lambda self: {"drift": drift})
    trainer = bapo_trainer(
        tmp_path,
        eval_rows=make_rows(3, seed=9),
        bapo={"retention": {"prompts": 3, "every": 1, "stop_below": -1.0}},
        max_steps=2,
    )
    trainer.train()
    assert trainer.state.global_step == (1 if stops else 2)


def test_which_rows_were_held_out_is_recorded(tmp_path):
    held_out = make_rows(5, seed=9)
    trainer = bapo_trainer(tmp_path, eval_rows=held_out, max_steps=1)
    trainer.train()
    record = json.loads((tmp_path / "out/bapo_run.json").read_text())
    digest = prompts_digest(Dataset.from_list(held_out[::-1]))  # in any order
    assert record["held_out"] == digest and record["rows"]["eval"] == 5
    for others in (held_out[:-1], [*held_out, held_out[0]], make_rows(5, seed=8)):
        assert prompts_digest(Dataset.from_list(others)) != digest


def test_the_run_is_recorded_while_it_goes_on(tmp_path):
    """`bapo report` can show a run without a checkpoint."""
    trainer = bapo_trainer(tmp_path, max_steps=2)
    trainer.record.EVERY = 0.0
    seen = []

    class Look(type(trainer.record).__mro__[1]):
        def on_step_end(self, args, state, control, **kwargs):
            path = tmp_path / "out/trainer_state.json"
            seen.append(len(json.loads(path.read_text())["log_history"]) if path.exists() else 0)

    trainer.add_callback(Look())
    trainer.train()
    assert seen == [0, 1]
    record = json.loads((tmp_path / "out/bapo_run.json").read_text())
    assert record["config"]["rl"] == "bapo" and record["config"]["bapo"]["anchor_weight"] == 0.05
    assert record["rows"] == {"train": 8} and "torch" in record["versions"]
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert "drift/base" in state["log_history"][0] and state["global_step"] == 2
    assert not list((tmp_path / "out").glob(".*"))
