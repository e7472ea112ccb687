"""`bapo export`: the merged model is the trained one, what vLLM and llama.cpp would take, what goes to the hub and what doesn't."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import randomize_lora
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tiny import make_tokenizer, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from bapo_plugin.cli import app
from bapo_plugin.commands.export import hub, merged

IDS = torch.tensor([[5, 9, 40, 77, 123, 8, 31]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model in bf16 with tied embeddings, as published."""
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(folder, "llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def adapter(base, folder, std=0.3, record=None, resize=0, **lora):
    """What a run leaves: an adapter that isn't zero, its tokenizer, and perhaps its record."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if resize:
        model.resize_token_embeddings(resize)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**(config | lora)))
    randomize_lora(model, std=std)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_embedding_B", "modules_to_save", "magnitude")):
                parameter.mul_(1.2).add_(0.05)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    if record is not None:
        config = {"base_model": str(base), "output_dir": str(folder)} | record
        text = json.dumps({"finished": True, "directory": str(folder.parent), "config": config})
        (folder / "bapo_run.json").write_text(text)
    return folder


def run(*args):
    return CliRunner().invoke(app, ["export", *map(str, args)])


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def log_probs(model):
    return model.eval().float()(IDS).logits.log_softmax(-1)


def trained(base, folder, resize=0):
    model = AutoModelForCausalLM.from_pretrained(base)
    if resize:
        model.resize_token_embeddings(resize, mean_resizing=False)
    return log_probs(PeftModel.from_pretrained(model, folder))


VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 2},
    "dora": {"use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "parameters": {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]},
    "resized": {"resize": 520},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_merged_model_is_the_trained_one(base, tmp_path, variant):
    folder = adapter(base, tmp_path / "mine", **VARIANTS[variant])
    result = run(folder, "--to", "merged", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    model = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    expected = trained(base, folder, VARIANTS[variant].get("resize", 0))
    actual = log_probs(model)
    before = log_probs(AutoModelForCausalLM.from_pretrained(base))
    if actual.shape == before.shape:
        assert (expected - before).abs().mean() > 0.2  # there was something to merge
    assert (actual - expected).abs().mean() < 0.05
    assert found["drift"]["per_token"] < 0.05
    assert found["drift"]["merged"] == pytest.approx(found["drift"]["adapter"], abs=0.5)
    # beside the model lie tokenizer and template, and nothing half written
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
