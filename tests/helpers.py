"""Trainers on tiny models, ours and TRL's, and axolotl's commands."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import warm
import yaml
from axolotl.cli.config import load_cfg
from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
from axolotl.loaders import load_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_rows, make_tokenizer

from bapo_plugin import BAPOConfig, BAPOTrainer
from bapo_plugin.prepare import Preparation


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


def drifted(trainer):
    """The trainer, its policy moved away from the reference, the same way in each."""
    randomize_lora(trainer.model, std=0.05)
    trainer.starts_equal = False
    trainer.model.train()
    return trainer


def base_log_softmax(model, row):
    """Of policy (with gradient) and reference, from whole logits over the row's base response, [T, V] fp64 each."""
    ids = torch.tensor([[*row["prompt_ids"], *row["base_ids"]]])
    own = slice(len(row["prompt_ids"]) - 1, -1)
    policy = model(ids).logits[0, own].double().log_softmax(-1)
    with torch.no_grad(), model.disable_adapter():
        reference = model(ids).logits[0, own].double().log_softmax(-1)
    return policy, reference


def randomize_lora(model, std=0.02, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def fresh_lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def kept_prompts(n=5, seed=9):
    """Prompts of `bapo.keep` with base responses: random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 300, (length,), generator=generator).tolist()

    return Dataset.from_list([{"prompt_ids": ids(3, 9), "base_ids": ids(2, 12)} for _ in range(n)])


def bapo_trainer(
    tmp_path,
    model=None,
    rows=None,
    bapo=None,
    eval_rows=None,
    cache_dir=None,
    keep_dataset=None,
    **changes,
):
    return BAPOTrainer(
        model if model is not None else make_model(vocab_size=len(make_tokenizer())),
        args=training_args(tmp_path / "out", **changes),
        train_dataset=Dataset.from_list(rows or make_rows(8)),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=make_tokenizer(),
        peft_config=fresh_lora() if model is None else None,
        bapo=BAPOConfig(**(bapo or {})),
        cache_dir=cache_dir,
        keep_dataset=keep_dataset,
    )


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def batch_of(trainer, indices=None):
    rows = [trainer.train_dataset[i] for i in indices or range(len(trainer.train_dataset))]
    return trainer.data_collator(rows)


BIN = Path(sys.executable).parent


# the user's settings that keep libraries from a network; our commands have to do without
_OFFLINE = ("HF_HUB_OFFLINE", "AXOLOTL_DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY", "CI")


def axolotl(folder, *command, stdin="", check=True, program="axolotl", fresh=False):
    """What a command prints. A command of ours may not reach beyond this machine, which takes a fresh interpreter."""
    network = Path(folder) / "network.log"
    env = os.environ | {
        "OMP_NUM_THREADS": "2",
        "COLUMNS": "200",
        # axolotl starts accelerate and torchrun by name
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    if program == "bapo":
        network.unlink(missing_ok=True)
        paths = [str(Path(__file__).parent / "offline"), env.get("PYTHONPATH", "")]
        env |= {
            "BAPO_NETWORK_LOG": str(network),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        env = {name: value for name, value in env.items() if name not in _OFFLINE}
    start = {"cwd": folder, "env": env}
    program_path = BIN / program
    if fresh or program == "bapo":
        done = subprocess.run(
            [program_path, *map(str, command)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
            **start,
        )
        output = done.stdout + done.stderr
    else:
        done = warm.Process([program_path, *command], stdin=stdin, **start)
        output = "".join(done.communicate())
    assert done.returncode == 0 or not check, output[-6000:]
    assert program != "bapo" or not network.exists(), network.read_text()
    return output


def write_config(folder, **changes):
    config = {
        "base_model": str(folder / "model"),
        "plugins": ["bapo_plugin.BAPOPlugin"],
        "rl": "bapo",
        "rl_beta": 0.2,
        "bapo": {"anchor_weight": 0.5},
        "chat_template": "tokenizer_default",
        "datasets": [
            {
                "path": str(folder / "rows.jsonl"),
                "split": "train",
                "type": "chat_template.default",
                "field_messages": "prompt",
                "field_base": "mine",
            }
        ],
        "val_set_size": 0.25,
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "sequence_len": 256,
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        # Triton kernels, which axolotl 0.19 turns on without a GPU too
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "gradient_accumulation_steps": 1,
        "micro_batch_size": 4,
        "num_epochs": 1,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "learning_rate": 0.01,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "seed": 3,
        "dataset_num_proc": 1,
    } | changes
    path = folder / f"{changes.get('output_dir', 'config')}.yml".replace("/", "_")
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
    return path


def preparation(config):
    """The data sets of a YAML, as `bapo anchors` opens them."""
    cfg = load_cfg(str(config))
    return Preparation(cfg, load_tokenizer(cfg))
