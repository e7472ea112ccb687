"""What `save_pretrained` of the model below the adapter does while a trainer has it."""

import logging

import pytest
import torch
from helpers import bapo_trainer
from safetensors.torch import load_file


def test_it_saves_the_adapter_and_says_where_training_was_interrupted(tmp_path, caplog):
    trainer = bapo_trainer(tmp_path, max_steps=2)
    base = trainer.model.get_base_model()
    said = "Interrupted at step"
    with caplog.at_level(logging.WARNING):
        base.save_pretrained(tmp_path / "before")
        assert said not in caplog.text
        trainer.record.on_train_begin(trainer.args, trainer.state, trainer.control)
        base.save_pretrained(save_directory=tmp_path / "at_ctrl_c")
        assert f"{said} 0" in caplog.text and "auto_resume_from_checkpoints" in caplog.text
        caplog.clear()
        trainer.train()
        base.save_pretrained(str(tmp_path / "after"))
        assert said not in caplog.text
    for name in ("before", "at_ctrl_c", "after"):
        assert not list((tmp_path / name).glob("model*"))
        assert load_file(tmp_path / name / "adapter_model.safetensors")


def test_a_merged_model_is_saved_whole(tmp_path):
    trainer = bapo_trainer(tmp_path, max_steps=1)
    trainer.train()
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    saved = load_file(tmp_path / "merged/model.safetensors")
    weights = dict(merged.named_parameters())
    assert saved.keys() <= weights.keys() and len(saved) > 5
    for name, weight in saved.items():
        torch.testing.assert_close(weight, weights[name].detach())


def test_a_trained_adapter_that_will_be_overwritten_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        first = bapo_trainer(tmp_path, max_steps=1)
        first.train()
        assert "will overwrite it" not in caplog.text
        first.model.save_pretrained(tmp_path / "out")
        bapo_trainer(tmp_path, max_steps=1).train()
    assert "an adapter whose training got to step 1 of 1; this run will overwrite it" in caplog.text


@pytest.mark.parametrize("named", [False, True], ids=["one", "named"])
def test_the_card_has_the_last_evaluation(tmp_path, named):
    from datasets import Dataset
    from tiny import make_rows

    trainer = bapo_trainer(tmp_path, max_steps=1, eval_rows=make_rows(3), eval_strategy="epoch")
    if named:
        rows = trainer.eval_dataset
        trainer.eval_dataset = {"a": rows, "b": Dataset.from_list(list(rows))}
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "out/README.md").read_text("utf-8")
    assert "| drift of the base response (the former answer), nats |" in card
