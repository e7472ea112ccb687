"""Trainers on tiny models, ours and TRL's, on the same rows."""

import torch
from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_rows, make_tokenizer

from bapo_plugin import BAPOConfig, BAPOTrainer


def training_args(output_dir, **changes):
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "eval_strategy": "no",
        "remove_unused_columns": False,
        "use_cpu": True,
        "bf16": False,
        "max_length": 256,
        "seed": 7,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
    }
    return AxolotlDPOConfig(**(defaults | changes))


def lora_model(family="llama", **lora):
    """A tiny model with a LoRA adapter whose output is not zero, so that policy and reference differ."""
    model = make_model(family, vocab_size=len(make_tokenizer()))
    targets = {"gpt_neox": ["query_key_value", "dense"]}.get(family, "all-linear")
    if family == "mixtral":
        targets = ["q_proj", "v_proj"]
    config = LoraConfig(
        **({"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM"} | lora)
    )
    return get_peft_model(model, config)


def randomize_lora(model, std=0.02, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def fresh_lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def bapo_trainer(tmp_path, model=None, rows=None, bapo=None, eval_rows=None, **changes):
    return BAPOTrainer(
        model if model is not None else make_model(vocab_size=len(make_tokenizer())),
        args=training_args(tmp_path / "out", **changes),
        train_dataset=Dataset.from_list(rows or make_rows(8)),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=make_tokenizer(),
        peft_config=fresh_lora() if model is None else None,
        bapo=BAPOConfig(**(bapo or {})),
    )


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def batch_of(trainer, indices=None):
    rows = [trainer.train_dataset[i] for i in indices or range(len(trainer.train_dataset))]
    return trainer.data_collator(rows)
