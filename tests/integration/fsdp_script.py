"""Started by test_distributed.py: gradients through FSDP2 (one process, gloo) are those without it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from tiny import make_model, make_rows, make_tokenizer
from torch.distributed.fsdp import fully_shard

from bapo_plugin.data.collator import PaddedCollator
from bapo_plugin.data.rows import tokenize_row
from bapo_plugin.forward import ResponseForward


def gradients(sharded: bool, tied: bool) -> dict[str, torch.Tensor]:
    tokenizer = make_tokenizer()
    model = make_model("qwen2", vocab_size=len(tokenizer), tie_word_embeddings=tied)
    if sharded:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
    batch = PaddedCollator(0)([tokenize_row(row, tokenizer) for row in make_rows(3)])
    log = []
    out = ResponseForward(log=log.append)(model, model, batch)
    assert log == [], log
    out.logps.sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if sharded else g for n, g in found.items()}


if __name__ == "__main__":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for tied in (False, True):
        plain, sharded = gradients(False, tied), gradients(True, tied)
        assert plain.keys() == sharded.keys() and len(plain) > 20
        for name, gradient in plain.items():
            torch.testing.assert_close(sharded[name], gradient, rtol=1e-4, atol=1e-5)
    print("SAME", len(plain))
    dist.destroy_process_group()
