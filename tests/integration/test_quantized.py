"""QLoRA: a model in NF4 on the CPU."""

import pytest
import torch
from helpers import bapo_trainer, batch_of, gradients
from peft import get_peft_model, prepare_model_for_kbit_training
from tiny import make_model, make_rows, make_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from bapo_plugin.answers.transformers import autocast

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("nf4")
    make_model(
        vocab_size=len(make_tokenizer()), hidden_size=128, intermediate_size=256, seed=4
    ).save_pretrained(path)
    return path


def nf4_model(path, **settings):
    from helpers import fresh_lora

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        **settings,
    )
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization, dtype=torch.float32
    )
    torch.manual_seed(0)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(model, fresh_lora())


def test_gradients_are_the_same_after_an_evaluation(tmp_path, saved):
    """bitsandbytes packs weights at an eval forward on some CPUs and then has no backward."""
    found = []
    for evaluate_first in (False, True):
        rows = make_rows(4)
        trainer = bapo_trainer(tmp_path, nf4_model(saved), rows=rows, eval_rows=rows)
        if evaluate_first:
            trainer.evaluate()
        trainer.compute_loss(trainer.model.train(), batch_of(trainer)).backward()
        found.append(gradients(trainer.model))
    assert found[0].keys() == found[1].keys() and len(found[0]) >= 14
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5)
    # the first layer's gradient comes through the frozen 4-bit weights of the second
    first = [g for n, g in found[0].items() if "layers.0" in n and "lora_B" in n]
    assert max(g.abs().max() for g in first) > 0


def test_reference_is_the_quantised_model_and_training_moves_the_policy(tmp_path, saved):
    trainer = bapo_trainer(tmp_path, nf4_model(saved), rows=make_rows(8))
    trainer.train()
    drift = [
        entry["drift/chosen"] for entry in trainer.state.log_history if "drift/chosen" in entry
    ]
    assert drift[0] == pytest.approx(0, abs=1e-4) and abs(drift[-1]) > 1e-3


def test_the_storage_of_4_bit_weights_is_no_reason_for_autocast(saved):
    """axolotl packs them into bf16 (FSDP wants that); a run in fp32 must be answered and evaluated in fp32."""
    model = nf4_model(saved, bnb_4bit_quant_storage=torch.bfloat16)
    assert torch.bfloat16 in {p.dtype for p in model.parameters()}
    with autocast(model):
        assert not torch.is_autocast_enabled("cpu")
    model.get_input_embeddings().to(torch.bfloat16)
    with autocast(model):
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
