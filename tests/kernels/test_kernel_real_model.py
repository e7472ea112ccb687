"""Hidden states of a real model: SmolLM2 on text, where logits are peaked as they are in use."""

from pathlib import Path

import pytest
import torch
from kernel_cases import to_fp64

from bapo_kernels import sequence_logprobs
from bapo_kernels.reference import sequence_logprobs_reference

README = Path(__file__).parents[2] / "kernels" / "README.md"


@pytest.fixture(scope="module")
def real_case(smollm2):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = tokenizer(README.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    ids = ids[:, :513]
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[0, :-1]
    tokens = hidden.shape[0]
    return {
        "hidden_states": hidden,
        "lm_head_weight": model.lm_head.weight.detach(),
        "labels": ids[0, 1:],
        "cu_seqlens": torch.tensor([0, tokens // 3, tokens]),
        "bias": None,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_hidden_states(real_case, dtype):
    case = {
        k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in real_case.items()
    }
    results = []
    for function, inputs in (
        (sequence_logprobs_reference, to_fp64(case)),
        (sequence_logprobs, case),
    ):
        leaf = inputs["hidden_states"].clone().requires_grad_()
        sums = function(**{**inputs, "hidden_states": leaf}).sum
        results.append((sums.detach().double(), torch.autograd.grad(sums.sum(), leaf)[0].double()))
    (true_sums, truth), (sums, ours) = results
    assert (sums - true_sums).abs().max() < 1e-3
    limit = 1e-4 if dtype == torch.float32 else 5e-3  # bf16 keeps 8 bits: 2**-8 = 4e-3
    assert (ours - truth).norm() / truth.norm() < limit
