"""What a base response depends on shows in its key; names of folders don't."""

import json
import re
from pathlib import Path

import pytest
from axolotl import loaders
from axolotl.utils.dict import DictDefault

from bapo_plugin.anchors import provenance as module
from bapo_plugin.anchors.provenance import ReferenceSpec, fingerprint, provenance
from bapo_plugin.blocks import AnchorsConfig
from bapo_plugin.models import _LOADING, reference_adapter
from bapo_plugin.store import Store


@pytest.fixture
def key(tmp_path, chatml):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")

    def make(**changes):
        spec = ReferenceSpec(**{"model": str(model)} | changes)
        with Store(tmp_path / "s.sqlite") as store:
            return fingerprint(provenance(spec, chatml, ["x"], AnchorsConfig(), [2], store))

    return make


def test_two_adapters_of_the_hub_are_two(key, tmp_path, monkeypatch):
    def cached(name, file, revision=None):
        if file != "adapter_config.json":
            raise OSError("no such file")
        commit = {"me/one": "a" * 40, "me/two": "b" * 40}[name]
        return str(tmp_path / f"models--{name.replace('/', '--')}/snapshots/{commit}/{file}")

    monkeypatch.setattr(module, "cached_file", cached)
    assert len({key(), key(adapter="me/one"), key(adapter="me/two")}) == 3
    assert key(adapter="me/one") == key(adapter="me/one")


def test_a_configuration_of_its_own_and_code_that_comes_with_a_model(key, tmp_path):
    other = tmp_path / "config"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"rope_theta": 5}))
    first = key(config=str(other))
    (other / "config.json").write_text(json.dumps({"rope_theta": 50}))
    assert len({key(), first, key(config=str(other))}) == 3
    code = tmp_path / "model/modeling.py"
    code.write_text("x = 1")
    before, plain = key(remote_code=True), key()
    code.write_text("x = 22")
    assert key(remote_code=True) != before and key() == plain


def test_settings_of_loading(key):
    keys = {
        key(),
        key(loading={"load_in_8bit": True}),
        key(loading={"attn_implementation": "eager"}),
    }
    assert len(keys) == 3 and key(loading={"load_in_4bit": None}) == key()


@pytest.mark.parametrize("start", ["out", "out/", "./out/checkpoint-4"])
def test_a_reference_that_the_run_overwrites_is_refused(tmp_path, monkeypatch, start):
    monkeypatch.chdir(tmp_path)

    def adapter(**changes):
        cfg = {"lora_model_dir": start, "output_dir": str(tmp_path / "out"), "bapo": {}}
        return reference_adapter(DictDefault(cfg | changes))

    with pytest.raises(ValueError, match="lora_model_dir: .*out.* where the run saves its own"):
        adapter()
    assert adapter(bapo={"reference": "base"}) is None
    assert adapter(output_dir="new") == start
    assert adapter(lora_model_dir="outer") == "outer"


# what axolotl's loaders read besides that is no part of what a loaded model answers: a field of `ReferenceSpec` of its own, the
# tokenizer, the adapter that is to be trained, where and how fast it computes, what only training does
ELSEWHERE = """base_model base_model_config revision_of_model trust_remote_code tokenizer_config tokens get
    lora_model_dir lora_modules_to_save lora_on_cpu adapter peft merge_lora lora_fp32_gradients inference
    device_map max_memory gpu_memory_limit low_cpu_mem_usage local_rank ddp deepspeed fsdp fsdp_config fsdp_version
    tensor_parallel_size context_parallel_size qlora_sharded_model_loading experimental_skip_move_to_device ple_cpu_offload
    activation_checkpointing activation_offloading selective_checkpointing gradient_checkpointing gradient_checkpointing_kwargs
    gradient_accumulation_steps micro_batch_size sequence_len sample_packing rl trl seed torch_compile flex_attn_compile_kwargs
    attn_needs_dtype_cast attn_supports_packing attn_uses_flash_lib chunked_cross_entropy chunked_cross_entropy_num_chunks
    cut_cross_entropy flash_attn_cross_entropy flash_attn_cross_entropy_loss flash_attn_fuse_mlp flash_optimum fused_attn_kernel
    gemma4_hybrid_attn_impl sdpa_varlen use_kernels use_scattermoe gptq_disable_exllama lora_mlp_kernel lora_o_kernel lora_qkv_kernel
    llama4_linearized_experts tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp fp8_enable_fsdp_float8_all_gather
    embeddings_skip_upcast fill_match image_size is_multimodal is_llama_derived_model model_config_type model_config_type_text num_labels
    reward_model process_reward_model""".split()


def test_all_that_axolotl_reads_to_load_a_model_is_known():
    """A key that it learns is one of those that change the answers, or one of the others."""
    folder = Path(loaders.__file__).parent
    text = "".join((folder / f"{n}.py").read_text() for n in ("model", "utils", "patch_manager"))
    read = set(re.findall(r"\bcfg\.([a-z_0-9]+)", text))
    assert len(read) > 80
    assert read - set(_LOADING) - set(ELSEWHERE) == set(), "into models._LOADING, or ELSEWHERE?"


def test_a_name_that_is_nothing(key, monkeypatch):
    def missing(*args, **kwargs):
        raise OSError("not there")

    monkeypatch.setattr(module, "cached_file", missing)
    with pytest.raises(ValueError, match="me/none is neither a folder nor a model or adapter"):
        key(adapter="me/none")
