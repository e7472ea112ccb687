"""Every example trains: two steps through axolotl's own builder, on a tiny model of its family with its chat template.

What only GPUs have is switched off: 4-bit weights, bf16, 8-bit optimisers, kernels, and what splits a model.
"""

import dataclasses
import gc
import json
import math
import re
from pathlib import Path

import pytest
import yaml
from axolotl.cli.config import load_cfg
from axolotl.core.builders import rl
from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
from axolotl.integrations.base import PluginManager
from axolotl.train import setup_model_and_trainer
from templates import AXOLOTL, TEMPLATES, tokenizer_of
from test_anchor_server import Server
from tiny import make_model, make_rows, write_jsonl

from bapo_plugin.config import BAPOTrainingArgs
from bapo_plugin.scoring.collator import SharedPrefixCollator

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "yaml_examples").glob("*.yml"))
# base_model -> family of tests/tiny.py
FAMILIES = {
    "meta-llama/": "llama",
    "google/gemma-2": "gemma2",
    "mistralai/": "mistral",
    "microsoft/phi-2": "phi",
    "Qwen/Qwen2.5": "qwen2",
    "Qwen/Qwen3": "qwen3",
    ".models/SmolLM2": "llama",
}
# chat_template -> what it writes before a prompt, after it, and after an answer
WRITTEN = {
    "llama3": ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>"),
    "mistral_v2v3": ("[INST] ", "[/INST]", "</s>"),
    "jinja": ("Instruct: ", "\nOutput:", "<|endoftext|>"),
    "qwen_25": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "qwen3": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "tokenizer_default": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
}  # fmt: skip
ON_A_CPU = {
    **dict.fromkeys(("load_in_4bit", "deepspeed", "fsdp_version", "fsdp_config")),
    **dict.fromkeys(("evals_per_epoch", "saves_per_epoch", "save_steps", "eval_steps")),
    **dict.fromkeys(("bf16", "fp16", "tf32"), False),
    **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False),
    "adapter": "lora",
    "lora_r": 4,
    "optimizer": "adamw_torch",
    "learning_rate": 0.01,
    "lr_scheduler": "constant",
    "warmup_ratio": None,
    "warmup_steps": 0,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "val_set_size": 0.25,
    "eval_strategy": "no",
    "save_strategy": "no",
    "auto_resume_from_checkpoints": False,
    "dataset_num_proc": 1,
}


TrainingArgs = AxolotlDPOConfig
if not hasattr(AxolotlDPOConfig, "bapo_now"):
    # as axolotl 0.19 makes it in a process of its own, where the plugin is known before the arguments are imported
    TrainingArgs = dataclasses.make_dataclass(
        "TrainingArgs", [], bases=(BAPOTrainingArgs, AxolotlDPOConfig)
    )


def tokenizer_for(config):
    """A tiny one with the special tokens of the family, and the example's template where the tokenizer has it."""
    name = config["chat_template"]
    if name == "tokenizer_default":
        template, special, bos, eos, *_ = TEMPLATES["smollm2"]
    elif name == "jinja":
        template, special, bos, eos = None, ["<|endoftext|>"], None, "<|endoftext|>"
    else:
        template, (special, eos, _) = None, AXOLOTL[name]
        bos = next((t for t in ("<|begin_of_text|>", "<bos>", "<s>") if t in special), None)
    wanted = config.get("special_tokens", {}).values()
    return tokenizer_of(list(dict.fromkeys([*special, *wanted])), bos, eos, template)


def rows_of(path, config, count=8):
    """Rows in the columns that the header shows, each cell another text; the demo has rows of its own."""
    data = ROOT / config["datasets"][0]["path"]
    if data.exists():
        return [json.loads(line) for line in data.read_text("utf-8").splitlines()[:count]]
    shown = re.search(r"^# +(\{.*\})$", path.read_text("utf-8"), re.MULTILINE)
    columns = list(json.loads(shown[1]))
    texts = [row["prompt"] for row in make_rows(count * len(columns), seed=4)]
    rows = [{name: f"{texts.pop()} {name} {i}" for name in columns} for i in range(count)]
    if "anchors" not in config["bapo"]:  # making them needs the model once more
        rows = [row | {"base": f"base {i}"} for i, row in enumerate(rows)]
    if config["bapo"].get("on_faulty") == "drop":
        rows.append(dict.fromkeys(rows[0], "the same"))
    return rows


def on_a_cpu(path, config, folder):
    """The example as a YAML for a CPU: a tiny model, a few rows."""
    family = next(f for start, f in FAMILIES.items() if config["base_model"].startswith(start))
    tokenizer = tokenizer_for(config)
    model = make_model(family, vocab_size=len(tokenizer))
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = rows_of(path, config)
    data = write_jsonl(folder / "rows.jsonl", rows)
    changed = config | ON_A_CPU
    changed["base_model"] = str(folder / "model")
    changed["datasets"] = [entry | {"path": str(data)} for entry in config["datasets"]]
    changed |= {
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
    }
    changed["bapo"] = config["bapo"] | {"shared_prefix": "require"}
    anchors = config["bapo"].get("anchors", {}) | {"max_new_tokens": 6}
    changed["bapo"]["anchors"] = anchors
    return {k: v for k, v in changed.items() if v is not None}, model, tokenizer, rows


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_left_aside():
    """axolotl collects garbage when it loads and in every step: two thirds of the time, spent on imported modules."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_trains(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(rl, "AxolotlDPOConfig", TrainingArgs)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # which axolotl sets, and leaves
    example = yaml.safe_load(path.read_text("utf-8"))
    config, model, tokenizer, rows = on_a_cpu(path, example, tmp_path)
    layer = example.get("fsdp_config", {}).get("transformer_layer_cls_to_wrap")
    assert layer is None or layer in {type(module).__name__ for module in model.modules()}
    with Server(model, takes="ids") as server:
        server.tokenizer = tokenizer
        if "server" in config["bapo"]["anchors"]:
            config["bapo"]["anchors"]["server"]["url"] = server.url
        (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
        cfg = load_cfg(str(tmp_path / "config.yml"))
        meta = PluginManager.get_instance().load_datasets(cfg)
    assert bool(server.requests) == ("server" in config["bapo"]["anchors"])
    check_rows(meta.train_dataset, example, tokenizer, rows)
    trainer = setup_model_and_trainer(cfg, meta)[0]
    trainer.train()
    assert type(trainer.layout) is SharedPrefixCollator
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(math.isfinite(entry["loss"]) for entry in logs)
    assert logs[0]["drift/base"] == pytest.approx(0, abs=1e-3)
    assert logs[1]["drift/chosen"] != 0, "it learned"


def check_rows(dataset, example, tokenizer, rows):
    """Each row's texts stand where the YAML says, in the example's own template."""
    before, after, end = WRITTEN[example["chat_template"]]
    entries = example["datasets"]
    found = set()
    for row in dataset:
        prompt, chosen, rejected, base = (
            tokenizer.decode(row[f"{part}_ids"])
            for part in ("prompt", "chosen", "rejected", "base")
        )
        for i, of in enumerate(rows):
            for entry in entries:
                names = (entry[f"field_{part}"] for part in ("messages", "chosen", "rejected"))
                words, wanted, refused = (of[name] for name in names)
                if f"{before}{words}{after}" in prompt and refused in rejected:
                    # Qwen3's begins with the end of an empty block of thoughts
                    assert chosen.endswith(wanted + end) and rejected.endswith(refused + end)
                    found.add((i, entry["field_rejected"]))
        assert (base.endswith(end) and "base" in base) or "anchors" in example["bapo"]
    assert len(found) == len(dataset)
