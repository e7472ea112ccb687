"""Models as a configuration's training loads them."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from axolotl.utils.logging import get_logger
from transformers.integrations import is_deepspeed_zero3_enabled

from bapo_plugin.anchors.provenance import ReferenceSpec
from bapo_plugin.answers.engine import Engine, Request, Sampling
from bapo_plugin.answers.server import ServerEngine
from bapo_plugin.answers.transformers import TransformersEngine
from bapo_plugin.compat import keep_4bit_trainable_on_cpu
from bapo_plugin.config import parse_block

LOG = get_logger("axolotl." + __name__)

# keys of the YAML that change what a loaded model computes
_LOADING = (
    *("load_in_4bit", "load_in_8bit", "gptq", "bnb_config_kwargs", "torch_dtype"),
    *("model_quantization_config", "model_quantization_config_kwargs", "overrides_of_model_config"),
    *("overrides_of_model_kwargs", "resize_token_embeddings_to_32x", "type_of_model"),
    *("attn_implementation", "experts_implementation", "cls_model_config", "reinit_weights"),
    *("quantize_moe_experts", "scaling_softmax", "scaling_softmax_factor", "scaling_softmax_bias"),
    *(
        "qat",
        "fp8",
        "use_onebitllms",
        "shrink_embeddings",
        "mean_resizing_embeddings",
        "fp32_norms",
    ),
)

# keys of the YAML that split a model over processes, switched off: commands that only read a model load it whole
WHOLE = dict.fromkeys(("fsdp", "fsdp_config", "fsdp_version", "deepspeed"))


def reference_adapter(cfg: Any) -> str | None:
    """The adapter that is part of the reference: that of `lora_model_dir`, unless `reference: base`.

    Raises:
        ValueError: the run itself writes there, so that it would be another adapter once it goes on.
    """
    start = cfg.lora_model_dir
    if start is None or cfg.bapo.get("reference", "start") != "start":
        return None
    written, read = Path(cfg.output_dir).resolve(), Path(start).resolve()
    if read == written or (read.parent == written and read.name.startswith("checkpoint-")):
        raise ValueError(
            f"lora_model_dir: {start} is where the run saves its own adapter (output_dir: {cfg.output_dir}). The reference is the "
            "adapter as it was, and would be the trained one as soon as the run goes on or is measured; set another "
            "output_dir, or bapo.reference: base"
        )
    return start


def reference_spec(cfg: Any, adapter: str | None) -> ReferenceSpec:
    """What the reference of a configuration is made of."""
    same = cfg.base_model_config in (None, cfg.base_model)
    return ReferenceSpec(
        model=cfg.base_model,
        revision=cfg.revision_of_model,
        adapter=adapter,
        config=None if same else cfg.base_model_config,
        remote_code=bool(cfg.trust_remote_code),
        loading={key: cfg.get(key) for key in _LOADING},
    )


def shards(cfg: Any) -> bool:
    """Whether this process would get a part of a model only."""
    sharded = cfg.fsdp or cfg.fsdp_config or is_deepspeed_zero3_enabled()
    return bool(sharded) and int(os.environ.get("WORLD_SIZE", 1)) > 1


def answer_beside(cfg: Any) -> bool:
    """Let `bapo anchors`, in a process of its own, make the base responses of a run that shards its model. It loads
    the model whole, on this process's GPU; those of the other ranks share the work through the store.

    Args:
        cfg: axolotl's validated configuration; the YAML that it was read from is used.

    Returns:
        Whether that was needed and done; a server answers in any case.

    Raises:
        ValueError: it failed.
    """
    if not shards(cfg) or cfg.bapo.get("anchors", {}).get("engine") == "server":
        return False
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    prefixes = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "ROLE_", "GROUP_")
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ours and not key.startswith(prefixes)
    }
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = seen.split(",") if seen else list(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = devices[rank % len(devices)]
    LOG.info(
        "Weights will be sharded: `bapo anchors` makes the base responses with the whole model"
    )
    command = [sys.executable, "-m", "bapo_plugin", "anchors", str(cfg.axolotl_config_path)]
    quiet = None if rank == 0 else subprocess.DEVNULL
    done = subprocess.run(command, env=environment, stdout=quiet, stderr=quiet)
    if done.returncode:
        raise ValueError(
            f"`bapo anchors {cfg.axolotl_config_path}` failed with exit code {done.returncode} (its output stands above); if the "
            "model doesn't fit on one GPU, let a server answer (bapo.anchors.engine: server)"
        )
    return True


def load_reference(cfg: Any, tokenizer: Any, adapter_dir: str | None) -> Any:
    """The reference model: loaded by axolotl as for training, without the adapter to be trained.

    Args:
        cfg: axolotl's validated configuration.
        tokenizer: axolotl's for this configuration.
        adapter_dir: an adapter that is part of the reference, or None.

    Raises:
        ValueError: the run shards weights over several processes, which generation can't do.
    """
    if shards(cfg):
        raise ValueError(
            "rows lack base responses, and FSDP or ZeRO-3 shards the model that would make them; run `bapo "
            "anchors` on this YAML first (with bapo.anchors.engine: server, if the model doesn't fit on one GPU)"
        )
    from axolotl.loaders import ModelLoader
    from peft import PeftModel

    LOG.info(f"Loading {cfg.base_model} to make base responses")
    model, _ = ModelLoader(cfg, tokenizer).load()
    if adapter_dir:
        model = PeftModel.from_pretrained(model, adapter_dir)
    keep_4bit_trainable_on_cpu(model)
    return model.eval()


def answering_engine(
    cfg: Any,
    tokenizer: Any,
    adapter_dir: str | None,
    stops: tuple[list[int], int | None],
    requests: Sequence[Request],
) -> tuple[Engine, Callable[[], None]]:
    """What makes base responses, and what is to be called before it begins.

    Args:
        cfg, tokenizer, adapter_dir: see `load_reference`.
        stops: tokens that end an answer, and the one that ends a turn.
        requests: to choose from where a server is compared with the reference.
    """
    anchors = parse_block(dict(cfg.bapo)).anchors
    sampling = Sampling(anchors.temperature, anchors.top_p, anchors.seed)
    sizes = (anchors.batch_size, anchors.batch_tokens)
    stop_ids, end_id = stops

    def load() -> Any:
        return load_reference(cfg, tokenizer, adapter_dir)

    if anchors.engine == "transformers":
        engine = TransformersEngine(load, stop_ids, sampling, *sizes)
        return engine, lambda: engine.model and None
    server = ServerEngine(tokenizer, anchors.server, sampling, cfg.base_model, stop_ids, end_id)

    def probe() -> None:
        reference = TransformersEngine(load, stop_ids, Sampling(), *sizes)
        try:
            server.probe(requests, reference)
        finally:
            reference.close()

    return server, probe if anchors.server.probe else lambda: None


def empty_model(cfg: Any) -> Any:
    """The model of a configuration without weights: they aren't read, and its parameters take no memory.

    Args:
        cfg: axolotl's validated configuration.
    """
    from axolotl.loaders.utils import load_model_config
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        return AutoModelForCausalLM.from_config(
            load_model_config(cfg), trust_remote_code=bool(cfg.trust_remote_code)
        )


def check_room_for_reference(cfg: Any) -> None:
    """Without an adapter the reference is a second copy of the model: refuse early if it can't fit.

    Args:
        cfg: axolotl's validated configuration, without an adapter.

    Raises:
        ValueError: weights of policy, gradients and reference need more memory than is free.
    """
    if cfg.fsdp_config or cfg.fsdp or cfg.deepspeed:
        return  # shards: what is needed here depends on the number of GPUs
    try:
        model = empty_model(cfg)
    except Exception:  # an unusual architecture: loading it will say more than this estimate could
        return
    dtype = cfg.torch_dtype if isinstance(cfg.torch_dtype, torch.dtype) else torch.float32
    copy = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    if torch.cuda.is_available():
        # one process spreads the model over all GPUs, several have one each
        shared = int(os.environ.get("WORLD_SIZE", 1)) == 1
        devices = range(torch.cuda.device_count()) if shared else [torch.cuda.current_device()]
        free = sum(torch.cuda.mem_get_info(device)[0] for device in devices)
    else:
        free = psutil.virtual_memory().available
    # policy and reference, and gradients where all weights are trained; optimiser states come on top
    needed = (2 if cfg.unfrozen_parameters else 3) * copy
    if needed > free:
        raise ValueError(
            f"adapter: is not set, so rl: bapo keeps a second copy of {cfg.base_model} as the reference. "
            f"Together with the policy and its gradients that needs {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are "
            "free. Set `adapter: qlora` with `load_in_4bit: true` (or `adapter: lora`): then the reference "
            "is the model with its adapter off and needs no memory"
        )
