"""Going on from a checkpoint: only with what it was trained with, and never beyond the end."""

import json
import logging
import shutil

import pytest
from datasets import Dataset
from helpers import bapo_trainer, fresh_lora, training_args
from peft import PeftModel
from safetensors.torch import load_file
from tiny import make_model, make_rows, make_tokenizer, save_model
from transformers import AutoModelForCausalLM

from bapo_plugin import BAPOConfig, BAPOPlugin, BAPOTrainer
from bapo_plugin.training import resume
from bapo_plugin.training.resume import planned_steps

SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}


def trained(folder, **changes):
    """A run of two steps as axolotl leaves it: checkpoints, record, adapter and card."""
    trainer = bapo_trainer(folder, rows=make_rows(12), **(SAVED | changes))
    trainer.train()
    trainer.model.save_pretrained(str(folder / "out"))
    trainer.create_model_card()
    return trainer


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir() if path.is_file()}


def adapter(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    return {name: value.tolist() for name, value in weights.items()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bapo": {"anchor_weight": 0}}, r"bapo.anchor_weight was 0.05 and is 0.0"),
        (
            {"bapo": {"keep": {"prompts": "general"}}},
            r"bapo.keep was None and is \{.*answers\) was None and is '1 rows, ",
        ),
        ({"beta": 0.3}, r"rl_beta was 0.1 and is 0.3"),
        ({"loss_type": ["ipo"]}, r"dpo_loss_type was \['sigmoid'\] and is \['ipo'\]"),
        ({"rows": make_rows(13)}, r"training rows\) was '12 rows, \w+' and is '13 rows, \w+'"),
        ({"rows": [*make_rows(12)[1:], make_rows(12)[0]]}, r"training rows\) was '12 rows, "),
    ],
    ids=["anchor", "keep", "beta", "loss", "more rows", "other rows"],
)
def test_what_was_trained_otherwise_is_refused(tmp_path, changes, said):
    trained(tmp_path)
    before = files(tmp_path)
    other = bapo_trainer(tmp_path, **({"rows": make_rows(12)} | SAVED | {"max_steps": 4} | changes))
    if other.bapo.keep is not None:
        other.keep(Dataset.from_list([{"prompt_ids": [5, 6], "base_ids": [7, 8]}]))
    with pytest.raises(ValueError, match=f"(?s)checkpoint-2 was trained.*{said}.*another output_d"):
        other.train(resume_from_checkpoint=True)
    assert files(tmp_path) == before


@pytest.mark.parametrize("lora", [{"r": 8}, {"lora_alpha": 16}, {"target_modules": ["q_proj"]}])
def test_another_adapter_is_refused(tmp_path, lora, monkeypatch):
    trained(tmp_path)
    config = fresh_lora()
    for name, value in lora.items():
        setattr(config, name, set(value) if isinstance(value, list) else value)
    monkeypatch.setattr("helpers.fresh_lora", lambda: config)
    other = bapo_trainer(tmp_path, rows=make_rows(12), **(SAVED | {"max_steps": 4}))
    with pytest.raises(ValueError, match="lora_(r|alpha|target_modules) was .* and is "):
        other.train(resume_from_checkpoint=True)
    if "r" in lora:  # without a record the shapes say it
        (tmp_path / "out/bapo_run.json").unlink()
        with pytest.raises(ValueError, match=r"has shape \(4, .* and the model has \(8, .*without"):
            other.train(resume_from_checkpoint=True)


def test_another_base_is_refused_and_one_that_moved_is_not(tmp_path):
    save_model(tmp_path / "one", "llama")
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    other = make_model("llama", vocab_size=len(make_tokenizer()), seed=4)
    other.save_pretrained(tmp_path / "other")

    def trainer(name, steps):
        return BAPOTrainer(
            AutoModelForCausalLM.from_pretrained(tmp_path / name),
            args=training_args(tmp_path / "out", **(SAVED | {"max_steps": steps})),
            train_dataset=Dataset.from_list(make_rows(12)),
            processing_class=make_tokenizer(),
            peft_config=fresh_lora(),
            bapo=BAPOConfig(),
        )

    trainer("one", 2).train()
    again = trainer("moved", 3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    with pytest.raises(ValueError, match=r"base_model was '.*moved' \(weights \w+\) and is '.*oth"):
        trainer("other", 4).train(resume_from_checkpoint=True)


def test_the_adapter_to_start_from_is_known_by_its_weights(tmp_path):
    start = tmp_path / "start"
    trained(tmp_path / "first").model.save_pretrained(str(start))
    shutil.copytree(start, tmp_path / "moved")

    def trainer(place, steps):
        model = PeftModel.from_pretrained(
            make_model(vocab_size=len(make_tokenizer())), place, is_trainable=True
        )
        found = bapo_trainer(tmp_path, model, rows=make_rows(12), **(SAVED | {"max_steps": steps}))
        found.args.bapo_adapter_dir = str(place)
        return found

    trainer(start, 2).train()
    again = trainer(tmp_path / "moved", 3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    shutil.copy(tmp_path / "out/checkpoint-2/adapter_model.safetensors", tmp_path / "moved")
    with pytest.raises(ValueError, match=r"lora_model_dir was .*moved' \(weights \w+\) and is "):
        trainer(tmp_path / "moved", 4).train(resume_from_checkpoint=True)


def test_kept_prompts_are_known_by_what_they_are(tmp_path):
    kept = Dataset.from_list([{"prompt_ids": [5, 6], "base_ids": [7, 8]}])
    for name, steps in (("x.jsonl", 2), ("/elsewhere/x.jsonl", 3)):
        keep = {"keep": {"prompts": name}}
        trainer = bapo_trainer(
            *(tmp_path, None, make_rows(12), keep),
            keep_dataset=kept,
            **(SAVED | {"max_steps": steps}),
        )
        trainer.train(resume_from_checkpoint=steps > 2)
    assert trainer.state.global_step == 3


def test_larger_batches_are_no_reason_to_train_nothing(tmp_path):
    """More epochs, and fewer steps all the same."""
    settings = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 2}
    trained(tmp_path, **settings)
    settings |= {"num_train_epochs": 3, "per_device_train_batch_size": 4}
    again = bapo_trainer(tmp_path, rows=make_rows(12), **(SAVED | settings))
    with pytest.raises(ValueError, match="12 steps and 2 epochs of the 3 .* 9 steps in all, since"):
        again.train(resume_from_checkpoint=True)


def test_a_checkpoint_without_a_log_is_that_of_who_wrote_it_last(tmp_path):
    quiet = {"logging_steps": 100, "max_steps": 3}
    trained(tmp_path, **quiet)
    trained(tmp_path, **quiet, learning_rate=1e-3)
    shutil.rmtree(tmp_path / "out/checkpoint-3")
    again = bapo_trainer(
        tmp_path, rows=make_rows(12), **(SAVED | quiet | {"max_steps": 4, "learning_rate": 1e-3})
    )
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_what_may_change_when_training_goes_on(tmp_path):
    trained(tmp_path)
    other = bapo_trainer(
        tmp_path,
        rows=make_rows(12),
        bapo={"kernel": "torch", "shared_prefix": "off", "retention": None},
        **(SAVED | {"max_steps": 5, "learning_rate": 1e-4, "save_steps": 2}),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=2,
    )
    other.train(resume_from_checkpoint=True)
    assert other.state.global_step == 5
    record = json.loads((tmp_path / "out/bapo_run.json").read_text())
    assert record["finished"] and record["trained"]["bapo.anchor_weight"] == 0.05


@pytest.mark.parametrize("steps", [2, 1])
def test_a_finished_run_is_left_as_it_is(tmp_path, steps, caplog):
    trained(tmp_path)
    before = files(tmp_path)
    again = bapo_trainer(tmp_path, rows=make_rows(12), **(SAVED | {"max_steps": steps}))
    with caplog.at_level(logging.WARNING):
        found = again.train(resume_from_checkpoint=True)
    assert found.global_step == again.state.global_step == 2
    assert f"max_steps: {steps} asks for no more. Nothing was trained" in caplog.text
    assert files(tmp_path) == before
    # the weights are there for who goes on with the trainer
    again.model.save_pretrained(str(tmp_path / "saved"))
    assert adapter(tmp_path / "saved") == adapter(tmp_path / "out")


def test_axolotl_does_not_come_to_write_over_a_finished_run(tmp_path, monkeypatch):
    trained(tmp_path)
    again = bapo_trainer(tmp_path, rows=make_rows(12), **SAVED)
    cfg = {"auto_resume_from_checkpoints": True}
    monkeypatch.setattr("bapo_plugin.plugin.is_active", lambda cfg: True)
    monkeypatch.setattr("bapo_plugin.plugin._as_written", dict)
    with pytest.raises(SystemExit) as stop:
        BAPOPlugin().post_trainer_create(cfg, again)
    assert stop.value.code == 0
    # one with nothing to go on from trains
    shutil.rmtree(tmp_path / "out")
    BAPOPlugin().post_trainer_create(cfg, again)


def test_a_run_that_was_killed_before_it_had_saved_is_completed(tmp_path):
    trained(tmp_path)
    out = tmp_path / "out"
    expected = adapter(out)
    for name in ("adapter_model.safetensors", "README.md", "trainer_state.json"):
        (out / name).unlink()
    record = json.loads((out / "bapo_run.json").read_text())
    (out / "bapo_run.json").write_text(json.dumps(record | {"finished": False}))
    again = bapo_trainer(tmp_path, rows=make_rows(12), **SAVED)
    again.train(resume_from_checkpoint=True)
    again.model.save_pretrained(str(out))
    assert adapter(out) == expected
    assert json.loads((out / "bapo_run.json").read_text())["finished"]
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2


def test_fewer_steps_than_an_unfinished_run_has_are_refused(tmp_path):
    trained(tmp_path)
    record = tmp_path / "out/bapo_run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"finished": False}))
    again = bapo_trainer(tmp_path, rows=make_rows(12), **(SAVED | {"max_steps": 1}))
    with pytest.raises(
        ValueError, match=r"checkpoint-2 is at step 2, and max_steps: 1 asks for no"
    ):
        again.train(resume_from_checkpoint=True)
    # nor from another run's end
    other = bapo_trainer(tmp_path / "other", rows=make_rows(12), **SAVED)
    with pytest.raises(ValueError, match="there is nothing to train"):
        other.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_train_epochs": 2},
        {"num_train_epochs": 1.5, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 5, "dataloader_drop_last": True},
        {"max_steps": 3},
    ],
)
def test_steps_are_counted_as_transformers_does(tmp_path, settings):
    trainer = bapo_trainer(tmp_path, rows=make_rows(11), **settings)
    planned = planned_steps(trainer)
    trainer.train()
    assert planned == trainer.state.max_steps == trainer.state.global_step


def test_a_record_of_before_is_no_reason_to_stop(tmp_path, caplog):
    trained(tmp_path)
    (tmp_path / "out/bapo_run.json").write_text("{}")
    again = bapo_trainer(tmp_path, rows=make_rows(12), **(SAVED | {"max_steps": 3}))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3 and "doesn't say what checkpoint-2 was" in caplog.text


def test_the_record_says_of_which_logs_it_is(tmp_path):
    """`bapo report` reads no others, and nothing goes on from their checkpoints."""
    trained(tmp_path)
    trained(tmp_path, max_steps=1)
    found = json.loads((tmp_path / "out/bapo_run.json").read_text())
    again = bapo_trainer(tmp_path, rows=make_rows(12), **(SAVED | {"max_steps": 4}))
    assert len(found["logs_of_others"]) == 3 and found["trained"] == resume.trained_with(again)
    with pytest.raises(ValueError, match="checkpoint-2 is of an earlier run in this folder"):
        again.train(resume_from_checkpoint=True)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    assert again.state.global_step == 4
