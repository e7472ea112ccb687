"""`bapo export`: the merged model is the trained one, what vLLM and llama.cpp would take, what goes to the hub and what doesn't."""

import json
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
from helpers import randomize_lora
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from safetensors import safe_open
from tiny import make_tokenizer, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from bapo_plugin import base_weights
from bapo_plugin.cli import app
from bapo_plugin.commands.export import below, hub, kept, merged
from bapo_plugin.commands.export.source import read_source

IDS = torch.tensor([[5, 9, 40, 77, 123, 8, 31]])


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """No test reaches a network, though nothing forbids it; and few tokens are asked for."""
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host))
    monkeypatch.setattr(kept, "TOKENS", 4)
    yield
    assert not asked


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
    torch.manual_seed(5)  # lora_A too is the same, whatever ran before
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
    torch.manual_seed(5)  # lora_A too is the same, whatever ran before
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
    assert found["drift"]["per_token"] < 0.05 and found["drift"]["share"] > 0.95
    assert found["drift"]["merged"] == pytest.approx(found["drift"]["adapter"], abs=0.5)
    # beside the model lie tokenizer and template, and nothing half written
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_on_what_is_left_of_the_base_is_merged_and_not_served(base, tmp_path, init):
    model = AutoModelForCausalLM.from_pretrained(base)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=init)
    model = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "mine")
    make_tokenizer().save_pretrained(tmp_path / "mine")
    for more in (["vllm"], ["gguf", "--adapter"]):
        result = run(tmp_path / "mine", "--to", *more)
        assert result.exit_code == 2 and f"what init_lora_weights: {init} left" in " ".join(
            result.output.split()
        )
    result = run(tmp_path / "mine", "--to", "merged")
    assert result.exit_code == 0, result.output
    merged = log_probs(AutoModelForCausalLM.from_pretrained(tmp_path / "mine/merged"))
    before = log_probs(AutoModelForCausalLM.from_pretrained(base))
    difference = (merged - log_probs(model)).abs().mean()
    assert difference < 0.1 * (merged - before).abs().mean()


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
@pytest.mark.parametrize("to", [["merged"], ["gguf"], ["gguf", "--adapter"], ["vllm"]])
def test_a_base_that_peft_cannot_change_again_is_refused(base, tmp_path, init, to):
    adapter(base, tmp_path / "mine")
    edit(tmp_path / "mine/adapter_config.json", init_lora_weights=init)
    result = run(tmp_path / "mine", "--to", *to)
    text = " ".join(result.output.split())
    assert result.exit_code == 2 and "path_initial_model_for_weight_conversion" in text
    assert init in text and "Merge it" not in text


def test_what_rounding_takes_of_a_small_adapter_is_said_and_a_finer_dtype_keeps_it(base, tmp_path):
    folder = adapter(base, tmp_path / "mine", std=0.002)
    found = json.loads(run(folder, "--to", "merged", "--json").stdout)
    assert found["drift"]["share"] < 0.9 and "Rounding to bfloat16 leaves" in found["notes"][-1]
    more = ["--dtype", "float32", "-o", tmp_path / "fine"]
    fine = json.loads(run(folder, "--to", "merged", "--json", *more).stdout)
    assert fine["drift"]["share"] == pytest.approx(1, abs=0.01) and fine["notes"] == []
    actual = log_probs(AutoModelForCausalLM.from_pretrained(tmp_path / "fine"))
    assert (actual - trained(base, folder)).abs().max() < 1e-3


def test_a_merge_that_loses_the_adapter_is_refused_and_nothing_is_left(base, tmp_path, monkeypatch):
    folder = adapter(base, tmp_path / "mine")
    monkeypatch.setattr(BaseTuner, "merge_and_unload", lambda self, **_: self.unload())
    result = run(folder, "--to", "merged")
    assert result.exit_code == 2 and "isn't the one that was trained" in result.output
    assert not (folder / "merged").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    result = run(folder, "--to", "merged", "--no-check")
    assert result.exit_code == 0 and "was not compared" in result.output


def test_of_4_bit_runs_the_drift_as_trained_is_said_and_rounded_weights_are_those_of_training(
    base, tmp_path
):
    record = {"load_in_4bit": True, "adapter": "qlora"}
    folder = adapter(base, tmp_path / "mine", record=record)
    found = json.loads(run(folder, "--to", "merged", "--json").stdout)
    assert found["drift"]["as_trained"] != pytest.approx(found["drift"]["merged"], abs=1e-3)
    record = json.loads((folder / "merged/bapo_export.json").read_text())
    assert record["drift"] == found["drift"] and not record["rounded"]

    result = run(folder, "--to", "merged", "--rounded", "-o", tmp_path / "rounded")
    assert result.exit_code == 0, result.output
    before, plain, rounded = (
        AutoModelForCausalLM.from_pretrained(place).state_dict()
        for place in (base, folder / "merged", tmp_path / "rounded")
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(plain[name], rounded[name])
    # training rounds neither embeddings nor the head that is tied to them
    assert torch.equal(before["model.embed_tokens.weight"], rounded["model.embed_tokens.weight"])
    result = run(adapter(base, tmp_path / "other"), "--to", "merged", "--rounded")
    assert result.exit_code == 2 and "wasn't trained on 4-bit weights" in result.output


def test_what_ends_a_turn_and_the_template_are_those_of_training(base, tmp_path):
    folder = adapter(base, tmp_path / "mine")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|im_start|>"
    tokenizer.chat_template = tokenizer.chat_template.replace("\n", " ")
    tokenizer.save_pretrained(folder)
    (base / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": 2}')
    try:  # a temperature without sampling: transformers wouldn't save it
        result = run(folder, "--to", "merged")
    finally:
        (base / "generation_config.json").unlink()
    assert result.exit_code == 0, result.output
    settings = json.loads((folder / "merged/generation_config.json").read_text())
    assert settings == {"temperature": 0.7, "eos_token_id": [tokenizer.eos_token_id, 2]}
    assert "wasn't in the base's generation_config.json" in " ".join(result.output.split())
    assert "differs from the base's" in result.output
    saved = AutoTokenizer.from_pretrained(folder / "merged")
    assert saved.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("full", "isn't empty, and nothing is overwritten"),
        ("file", "is a file; name a folder"),
        ("disk", "name a folder on another disk"),
        ("memory", "of memory, and"),
        ("moved", "Name the folder where it lies now with --base"),
        ("small", "doesn't fit the base"),
        ("deep", "doesn't fit the base"),
        ("quantised", "is published quantised (gptq)"),
        ("tokens", "holds none for those that were added"),
        ("no weights", "has no weights"),
        ("no adapter", "has no trained adapter"),
        ("no template", None),
    ],
)
def test_what_stands_in_the_way_is_said_before_anything_is_written(
    base, tmp_path, monkeypatch, name, said
):
    folder, output = tmp_path / "mine", tmp_path / "out"
    adapter(base, folder, target_modules=["q_proj"])
    more = []
    if name == "full":
        output.mkdir()
        (output / "x").touch()
    elif name == "file":
        output.touch()
    elif name == "disk":
        usage = SimpleNamespace(free=1000)
        monkeypatch.setattr(merged.shutil, "disk_usage", lambda place: usage)
    elif name == "memory":
        monkeypatch.setattr(below.psutil, "virtual_memory", lambda: SimpleNamespace(available=9))
        monkeypatch.setattr(below.psutil, "swap_memory", lambda: SimpleNamespace(free=0))
    elif name == "moved":
        edit(folder / "adapter_config.json", base_model_name_or_path="gone/model")
    elif name in ("small", "deep"):
        changes = {"hidden_size": 16} if name == "small" else {"num_hidden_layers": 3}
        more = ["--base", save_model(tmp_path / "other", "llama", **changes)]
    elif name in ("quantised", "no weights"):
        other = shutil.copytree(base, tmp_path / "other")
        more = ["--base", other]
        if name == "quantised":
            edit(other / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
        else:
            (other / "model.safetensors").unlink()
    elif name == "tokens":
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["<|new|>"])
        tokenizer.save_pretrained(folder)
    elif name == "no adapter":
        (folder / "adapter_config.json").unlink()
    elif name == "no template":
        tokenizer = make_tokenizer()
        tokenizer.chat_template = None
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(folder)
    left = sorted(tmp_path.rglob("*"))
    result = run(folder, "--to", "merged", "-o", output, *more)
    text = " ".join(result.output.split())
    if said is None:  # prompts are asked as they stand
        assert result.exit_code == 0 and "ask for completions" in text
        return
    assert result.exit_code == 2 and said in text, result.output
    assert sorted(tmp_path.rglob("*")) == left


def test_a_base_that_moved_is_named_and_a_checkpoint_has_the_runs_tokenizer(base, tmp_path):
    folder = adapter(base, tmp_path / "mine", record={"base_model": "gone/model"})
    edit(folder / "adapter_config.json", base_model_name_or_path="gone/model")
    point = folder / "checkpoint-3"
    point.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).rename(point / name)
    result = run(point, "--to", "vllm")
    text = " ".join(result.output.split())
    assert result.exit_code == 0, result.output
    assert "mine-checkpoint-3=" in result.output and "couldn't be compared" in text
    result = run(point, "--to", "merged", "--base", base)
    assert result.exit_code == 0, result.output
    saved = AutoTokenizer.from_pretrained(point / "merged")
    assert saved.chat_template == make_tokenizer().chat_template


@pytest.fixture
def run_on(base, tmp_path):
    """What a run leaves that recorded its base, and another base of the same shape."""
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() == 2:
                parameter.copy_(parameter.flip(0))
    shutil.copytree(base, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    folder = adapter(base, tmp_path / "mine", record={})
    trained = {"base_model": str(base), "base_weights": base_weights.digest(base)}
    edit(folder / "bapo_run.json", trained=trained)
    return folder, tmp_path / "other"


@pytest.mark.parametrize("to", ["merged", "vllm", "gguf"])
def test_another_base_of_the_same_shape_is_refused(run_on, to):
    folder, other = run_on
    result = run(folder, "--to", to, "--base", other)
    assert result.exit_code == 2, result.output
    text = " ".join(result.output.split())
    assert "has other weights (digest" in text and "--base; --no-check takes this one" in text
    assert not (folder / "merged").exists() and not (folder / "gguf").exists()
    assert run(folder, "--to", to, "--base", other, "--no-check").exit_code == 0


def test_a_copy_of_the_base_in_another_form_is_the_base(run_on, base, tmp_path):
    folder, _ = run_on
    shutil.copytree(base, tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    (tmp_path / "copy/model.safetensors").unlink()
    model.save_pretrained(tmp_path / "copy", max_shard_size="100KB")
    assert (tmp_path / "copy/model.safetensors.index.json").is_file()
    result = run(folder, "--to", "merged", "--base", tmp_path / "copy")
    assert result.exit_code == 0, result.output
    # the next command takes the same base
    assert f"--to gguf --base {tmp_path / 'copy'}" in " ".join(result.output.split()).replace(
        " \\ ", " "
    )


def test_a_base_of_another_family_or_size_is_refused_without_a_record(base, tmp_path):
    folder = adapter(base, tmp_path / "mine", target_modules=["q_proj"])
    shutil.copy(base / "config.json", folder)
    save_model(tmp_path / "other", "qwen3")
    result = run(folder, "--to", "merged", "--base", tmp_path / "other")
    text = " ".join(result.output.split())
    assert result.exit_code == 2 and "'qwen3', and the adapter was trained on one with" in text
    assert "'llama'" in text
    shutil.copytree(base, tmp_path / "deeper")
    edit(tmp_path / "deeper/config.json", num_hidden_layers=7)
    result = run(folder, "--to", "vllm", "--base", tmp_path / "deeper")
    assert result.exit_code == 2 and "num_hidden_layers 7" in " ".join(result.output.split())


def test_a_run_of_all_weights_is_the_model_itself(base):
    result = run(base, "--to", "merged")
    assert result.exit_code == 0 and "nothing to merge" in result.output
    assert f"vllm serve {base}" in result.output.replace(" \\\n      ", " ")
    found = json.loads(run(base, "--to", "vllm", "--json").stdout)
    assert found["next"][0] == f"vllm serve {base} --served-model-name model"


# -- vLLM


def test_the_command_for_vllm_names_base_rank_adapters_and_template(base, tmp_path):
    one = adapter(base, tmp_path / "my plain", r=9)
    two = adapter(base, tmp_path / "a,b")
    found = json.loads(run(one, two, "--to", "vllm", "--json").stdout)
    assert found["next"][0] == (
        f"vllm serve {base} --enable-lora --max-lora-rank 16 --max-loras 2 --lora-modules 'my-plain={one}' "
        f'\'{{"name": "a-b", "path": "{two}"}}\''
    )
    assert found["wrote"] == []
    for folder in (one, two):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = tokenizer.chat_template + " "
        tokenizer.save_pretrained(folder)
    found = json.loads(run(one, two, "--to", "vllm", "--json", "-o", tmp_path / "out").stdout)
    template = tmp_path / "out/my-plain/chat_template.jinja"
    assert found["next"][0].endswith(f" --chat-template {template}") and template.is_file()
    assert (tmp_path / "out/a-b/adapter_model.safetensors").is_file()
    make_tokenizer().save_pretrained(two)
    result = run(one, two, "--to", "vllm")
    assert result.exit_code == 2 and "different chat templates" in result.output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": 600}, "its rank is 600"),
        ({"use_dora": True}, "it is DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters: experts"),
        ({"rank_pattern": {"q_proj": 8}}, "it ignores rank_pattern"),
        ({"bias": "all"}, "it trained biases"),
        ({"peft_type": "IA3"}, "it is IA3, not LoRA"),
        ({}, "it holds weights beside LoRA's"),
    ],
)
def test_what_vllm_would_not_serve_as_trained_is_refused(base, tmp_path, change, said):
    more = {} if change else {"target_modules": ["q_proj", "embed_tokens"]}
    folder = adapter(base, tmp_path / "mine", **more)
    edit(folder / "adapter_config.json", **change)
    result = run(folder, "--to", "vllm")
    text = " ".join(result.output.split())
    assert result.exit_code == 2 and said in text and "--to merged" in text, result.output


# -- GGUF

CONVERTER = """
import argparse, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("folder"), parser.add_argument("--base")
parser.add_argument("--outfile"), parser.add_argument("--outtype", choices=["f16", "q8_0"])
args = parser.parse_args()
folder = pathlib.Path(args.folder)
if (folder / "fail").exists():
    sys.exit("no such architecture")
names = sorted(path.name for path in folder.glob("*model*.safetensors"))
pathlib.Path(args.outfile).write_text(f"{args.outtype} {names} {args.base}")
"""


@pytest.fixture
def llama_cpp(tmp_path):
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (folder / name).write_text(CONVERTER)
    return folder


def test_a_gguf_file_is_made_of_the_merged_model_by_llama_cpp(base, tmp_path, llama_cpp):
    folder = adapter(base, tmp_path / "mine")
    result = run(folder, "--to", "gguf")
    text = result.output.replace("\\\n      ", "")
    assert result.exit_code == 0, result.output
    file = folder / "gguf/mine-q8_0.gguf"
    assert (
        f"llama.cpp/convert_hf_to_gguf.py {folder / 'gguf/merged'} --outfile {file} --outtype q8_0"
        in text
    )
    assert file.with_suffix(".Modelfile").read_text() == "FROM ./mine-q8_0.gguf\n"
    result = run(folder, "--to", "gguf", "--llama-cpp", llama_cpp)
    assert result.exit_code == 0, result.output
    assert "made before" in result.output and "convert_hf_to_gguf" not in result.output
    assert file.read_text() == "q8_0 ['model.safetensors'] None"
    assert run(folder, "--to", "gguf").exit_code == 2  # nothing is overwritten
    (folder / "gguf/merged/fail").touch()
    result = run(folder, "--to", "gguf", "--llama-cpp", llama_cpp, "--outtype", "f16")
    assert result.exit_code == 2 and "no such architecture" in result.output
    assert sorted(path.name for path in (folder / "gguf").iterdir()) == [
        "merged",
        "mine-f16.Modelfile",
        "mine-q8_0.Modelfile",
        file.name,
    ]
    edit(folder / "adapter_config.json", lora_alpha=9)
    result = run(folder, "--to", "gguf", "--outtype", "f16")
    assert result.exit_code == 2 and "isn't empty" in result.output


def test_an_adapter_alone_becomes_a_gguf_file_only_where_llama_cpp_scales_it_right(
    base, tmp_path, llama_cpp
):
    folder = adapter(base, tmp_path / "mine")
    result = run(folder, "--to", "gguf", "--adapter", "--llama-cpp", llama_cpp)
    assert result.exit_code == 0, result.output
    made = (folder / "gguf/mine-lora-q8_0.gguf").read_text()
    assert made == f"q8_0 ['adapter_model.safetensors'] {base}"
    lines = (folder / "gguf/mine-lora-q8_0.Modelfile").read_text().splitlines()
    (below,) = (folder / "gguf").glob("model-*-q8_0.gguf")
    assert lines == [f"FROM ./{below.name}", "ADAPTER ./mine-lora-q8_0.gguf"]
    assert not (folder / "merged").exists()
    edit(folder / "adapter_config.json", use_rslora=True)
    result = run(folder, "--to", "gguf", "--adapter", "-o", tmp_path / "other")
    assert result.exit_code == 2 and "rsLoRA" in result.output and not (tmp_path / "other").exists()


def test_what_was_made_of_another_base_is_not_taken(base, tmp_path, llama_cpp):
    """Neither a merged model nor the GGUF file below an adapter."""
    other = shutil.copytree(base, tmp_path / "other")
    folder = adapter(base, tmp_path / "mine")
    assert run(folder, "--to", "merged", "--dtype", "float16").exit_code == 0
    again = run(folder, "--to", "gguf", "--base", other)
    assert again.exit_code == 0 and "made before" not in again.output, again.output
    record = json.loads((folder / "gguf/merged/bapo_export.json").read_text())
    assert record["base"] == str(other)

    twin, gg = adapter(other, tmp_path / "twin"), tmp_path / "gg"
    for one in (folder, twin):
        tokenizer = make_tokenizer()
        tokenizer.chat_template += one.name
        tokenizer.save_pretrained(one)
        result = run(one, "--to", "gguf", "--adapter", "--llama-cpp", llama_cpp, "-o", gg)
        assert result.exit_code == 0, result.output
    bases = {
        (gg / f"{name}-lora-q8_0.Modelfile").read_text().split()[1] for name in ("mine", "twin")
    }
    assert len(bases) == 2 and all((gg / name).is_file() for name in bases)
    assert all((gg / f"{n}-lora.jinja").read_text().endswith(n) for n in ("mine", "twin"))


# -- the hub


class Hub:
    """In the hub's place: remembers what it was given."""

    def __init__(self, private=True):
        self.private, self.sent = private, {}

    def create_repo(self, repo, private, exist_ok):
        self.wanted = private

    def repo_info(self, repo):
        return SimpleNamespace(private=self.private)

    def create_commit(self, repo, operations, commit_message):
        for operation in operations:
            with operation.as_file() as file:
                self.sent[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://hub/{repo}/commit/1")


CARD = """---
base_model: {base}
library_name: peft
tags:
- bapo
- base_model:adapter:{base}
---

# mine

An adapter of `model`.

```python
model = AutoModelForCausalLM.from_pretrained("model")
model = PeftModel.from_pretrained(model, "mine")
```

```yaml
base_model: {base}
datasets:
- path: /home/anna/private/rows.jsonl
- path: data/rows.jsonl
```
"""


@pytest.fixture
def mine(base, tmp_path):
    folder = adapter(base, tmp_path / "mine", record={"hub_token": "(not shown)"})
    (folder / "README.md").write_text(CARD.format(base=base))
    for name in ("training_args.bin", "trainer_state.json", "optimizer.pt", "debug.log"):
        (folder / name).write_text("x")
    (folder / "checkpoint-1").mkdir()
    return folder


def publish(folder, *more):
    return run(folder, "--to", "hub", "--repo", "anna/taste", "--base", "maker/model", *more)


def test_the_revision_of_one_base_is_not_that_of_another(mine, monkeypatch):
    api = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    edit(mine / "adapter_config.json", revision="abc123")
    result = publish(mine)
    assert result.exit_code == 0 and "abc123" not in result.output, result.output
    assert json.loads(api.sent["adapter_config.json"])["revision"] is None


def test_the_hub_gets_the_adapter_its_card_and_nothing_of_this_machine(mine, base, monkeypatch):
    api = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    result = publish(mine, "--dry-run")
    assert result.exit_code == 0 and api.sent == {}, result.output
    result = publish(mine)
    assert result.exit_code == 0 and api.wanted is True, result.output
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"}
    names |= {"tokenizer_config.json", "chat_template.jinja"}
    assert api.sent.keys() == names and all(name in result.output for name in names)
    assert json.loads(api.sent["adapter_config.json"])["base_model_name_or_path"] == "maker/model"
    card = api.sent["README.md"].decode()
    assert "base_model: maker/model\n" in card and 'from_pretrained(model, "anna/taste")' in card
    assert "- bapo\n" in card and "base_model:adapter" not in card
    assert "path: rows.jsonl" in card and "path: data/rows.jsonl" in card
    for content in (card, api.sent["adapter_config.json"].decode()):
        assert "/home/anna" not in content and str(base) not in content
    with safe_open(mine / "adapter_model.safetensors", "pt") as file:
        assert file.keys()  # what lies in the run is as it was


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("secret", "line 4, holds what looks like a secret (hf_abc...)"),
        ("public", "is there and public; say --public"),
        ("base", "name the same model on the hub with --base"),
        ("refused", "the hub didn't take it"),
    ],
)
def test_what_must_not_be_uploaded_is_not(mine, monkeypatch, name, said):
    api = Hub(private=name != "public")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    more = []
    if name == "secret":
        (mine / "README.md").write_text("---\n---\n\ntoken: hf_abcdefghijklmnopqrstuvwxyz0123\n")
    elif name == "base":
        more = ["--base", mine.parents[0]]
    elif name == "refused":

        def refuse(*args, **kwargs):
            raise OSError("401 for hf_abcdefghijklmnopqrstuvwxyz0123")

        monkeypatch.setattr(api, "create_commit", refuse)
    result = publish(mine, *more)
    text = " ".join(result.output.split())
    assert result.exit_code == 2 and said in text, result.output
    assert api.sent == {} and "bcdefghij" not in text


@pytest.mark.parametrize(
    "text", ["https://huggingface.co/papers/2407.00693", "a/b", "./x/y", "</p>"]
)
def test_an_address_or_a_relative_path_is_no_path_of_this_machine(text):
    assert not hub._PATH.search(f"see {text} here")


def test_one_base_may_be_named_in_two_ways(base, tmp_path, monkeypatch):
    first, second = adapter(base, tmp_path / "a"), adapter(base, tmp_path / "b")
    monkeypatch.chdir(base.parent)
    edit(second / "adapter_config.json", base_model_name_or_path=base.name)
    result = run(first, second, "--to", "vllm")
    assert result.exit_code == 0, result.output


def test_the_base_is_that_of_where_the_run_started(base, tmp_path, monkeypatch):
    record = {"config": {"base_model": "m"}, "directory": str(tmp_path / "one")}
    folder = adapter(base, tmp_path / "one/out")
    (folder / "bapo_run.json").write_text(json.dumps(record))
    edit(folder / "adapter_config.json", base_model_name_or_path="m")
    for name in ("one", "two"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "m").mkdir()
    monkeypatch.chdir(tmp_path / "two")
    assert read_source(folder).base == str(tmp_path / "one/m")


def test_a_pointer_in_place_of_weights_is_said(base, tmp_path):
    folder = adapter(base, tmp_path / "mine")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (folder / "adapter_model.safetensors").write_text(pointer)
    result = run(folder, "--to", "merged")
    assert result.exit_code == 2 and "git lfs pull" in " ".join(result.output.split())
    whole = shutil.copytree(base, tmp_path / "whole")
    (whole / "model.safetensors").write_text(pointer)
    result = run(adapter(base, tmp_path / "other"), "--to", "merged", "--base", whole)
    assert result.exit_code == 2 and "git lfs pull" in " ".join(result.output.split())
