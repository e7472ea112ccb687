"""Started by test_distributed.py, `fsdp2` or `zero3`: gradients with sharded weights are those without.

FSDP2 runs in one process that reshards, ZeRO-3 in as many as torchrun starts; both with gloo.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from ddp_script import ZERO3
from tiny import make_model, make_rows, make_tokenizer
from torch.distributed.fsdp import fully_shard

from bapo_plugin.rows.texts import tokenize_row
from bapo_plugin.scoring.collator import PaddedCollator
from bapo_plugin.scoring.forward import ResponseForward


def shard_fsdp2(model):
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def shard_zero3(model):
    import deepspeed

    optimizer = {"type": "AdamW", "params": {"torch_adam": True}}
    config = {**ZERO3, "train_micro_batch_size_per_gpu": 1, "optimizer": optimizer}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    assert model.lm_head.weight.numel() == 0, "not sharded"
    return engine


def gradients(kind: str | None, tied: bool, frozen_head: bool) -> dict[str, torch.Tensor]:
    tokenizer = make_tokenizer()
    model = make_model("qwen2", vocab_size=len(tokenizer), tie_word_embeddings=tied)
    model.lm_head.weight.requires_grad_(not frozen_head)
    shard = {None: lambda model: model, "fsdp2": shard_fsdp2, "zero3": shard_zero3}[kind]
    wrapped = shard(model)
    batch = PaddedCollator(0)([tokenize_row(row, tokenizer) for row in make_rows(3)])
    log = []
    out = ResponseForward(log=log.append)(wrapped, model, batch)
    assert log == [], log
    loss = out.logps.sum()
    wrapped.backward(loss) if kind == "zero3" else loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if kind == "zero3":
        from deepspeed.utils import safe_get_full_grad

        return {n: safe_get_full_grad(p) for n, p in trained.items()}
    return {n: p.grad.full_tensor() if kind else p.grad for n, p in trained.items()}


def main(kind: str) -> None:
    if kind == "zero3":
        import deepspeed

        deepspeed.init_distributed("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    compared = 0
    for tied in (False, True):
        for frozen_head in (False, True):
            plain = gradients(None, tied, frozen_head)
            sharded = gradients(kind, tied, frozen_head)
            assert plain.keys() == sharded.keys() and len(plain) > 20
            for name, gradient in plain.items():
                torch.testing.assert_close(sharded[name], gradient, rtol=1e-4, atol=1e-5)
                compared += 1
    if dist.get_rank() == 0:
        print("SAME", compared)
    dist.destroy_process_group()
    os._exit(0)  # DeepSpeed's threads


if __name__ == "__main__":
    main(sys.argv[1])
