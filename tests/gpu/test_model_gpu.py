"""What only a card can show of a model's forward: flash attention over packed rows, 16 bits, equality at step 1.

`pytest -m gpu tests/gpu/test_model_gpu.py` needs torch, transformers and peft.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]
for folder in (ROOT, ROOT / "kernels", ROOT / "tests"):
    sys.path.append(str(folder))  # after what is installed

from peft import LoraConfig, get_peft_model  # noqa: E402
from tiny import FAMILIES, make_model  # noqa: E402

from bapo_plugin.scoring import shared_prefix  # noqa: E402
from bapo_plugin.scoring.collator import PaddedCollator, SharedPrefixCollator  # noqa: E402
from bapo_plugin.scoring.forward import ResponseForward  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
NAMES = ("chosen", "rejected", "base")
# heads of 16 and 64 for flash attention; gemma3's window of 8 is shorter than its prompts
SIZES = {"hidden_size": 128, "num_hidden_layers": 3, "head_dim": 32, "vocab_size": 500}
MODELS = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma3_text": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


def rows(count=4, longest=90):
    g = torch.Generator().manual_seed(3)

    def ids(n):
        return torch.randint(3, 500, (n,), generator=g).tolist()

    def length():
        return int(torch.randint(1, longest, (1,), generator=g))

    keys = ("prompt_ids", *(f"{n}_ids" for n in NAMES))
    return [{key: ids(length()) for key in keys} for _ in range(count)]


def model_of(family, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, FAMILIES.get(family, {}) | MODELS[family])
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(make_model(family, **SIZES), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
        elif parameter.dim() > 1 and "lora" not in name:
            parameter.data.mul_(
                0.3
            )  # at this width less is flat no more, and rounding isn't amplified
    return model.cuda()


def run(model, batch, weights=None, autocast=False):
    """(log-probs, gradients of the adapter) under the training forward."""
    batch = {k: v.to("cuda") if hasattr(v, "to") else v for k, v in batch.items()}
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        logps = ResponseForward(log=pytest.fail)(model, model, batch).logps
    weights = torch.linspace(-1, 1, len(logps), device="cuda")
    (logps * weights).sum().backward()
    return logps.detach().double(), torch.cat(
        [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    )


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_packed_rows_by_flash_attention(family, checkpointing, autocast, monkeypatch):
    """bf16, shared prefix, variable-length attention: as near to fp32 as padded rows in bf16 are."""
    wide = model_of(family, monkeypatch)
    padded = PaddedCollator(0)(rows())
    truth, true_gradient = run(wide, padded)
    model = copy.deepcopy(wide) if autocast else copy.deepcopy(wide).to(torch.bfloat16)
    shared_prefix.install(model)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    calls = []
    varlen = shared_prefix._varlen
    monkeypatch.setattr(shared_prefix, "_varlen", lambda *a: calls.append(1) or varlen(*a))
    plain, plain_gradient = run(model, padded, autocast=autocast)
    assert not calls
    shared, gradient = run(model, SharedPrefixCollator()(rows()), autocast=autocast)
    assert calls, "flash attention was not taken"
    assert error(shared, truth) <= 2 * error(plain, truth) + 1e-4
    assert error(gradient, true_gradient) <= 1.5 * error(plain_gradient, true_gradient) + 1e-3


def test_flash_attention_over_long_prompts(monkeypatch):
    """Thousands of tokens: many tiles of the kernel; and what one response says reaches no other."""
    wide = model_of("llama", monkeypatch)
    long = rows(2, 1500)
    long[0]["prompt_ids"] = (long[0]["prompt_ids"] * 100)[:3000]
    truth, true_gradient = run(wide, PaddedCollator(0)(long))
    model = copy.deepcopy(wide).to(torch.bfloat16)
    plain, plain_gradient = run(model, PaddedCollator(0)(long))
    shared_prefix.install(model)
    shared, gradient = run(model, SharedPrefixCollator()(long))
    assert error(shared, truth) <= 2 * error(plain, truth) + 1e-4
    assert error(gradient, true_gradient) <= 1.5 * error(plain_gradient, true_gradient) + 1e-3
    changed = copy.deepcopy(long)
    changed[0]["rejected_ids"] = [(t * 7 + 3) % 500 for t in changed[0]["rejected_ids"]]
    moved = (run(model, SharedPrefixCollator()(changed))[0] - shared).abs()
    assert moved[2] > 1 and moved.sum() == moved[2]


@pytest.mark.parametrize("collator", [PaddedCollator(0), SharedPrefixCollator()], ids=type)
@pytest.mark.parametrize("autocast", [False, True])
def test_policy_and_reference_are_equal_at_step_1(autocast, collator, monkeypatch):
    model = model_of("llama", monkeypatch)
    if not autocast:
        model = model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    shared_prefix.install(model)
    batch = collator(rows())
    policy, _ = run(model, batch, autocast=autocast)
    batch = {k: v.to("cuda") if hasattr(v, "to") else v for k, v in batch.items()}
    with (
        torch.no_grad(),
        model.disable_adapter(),
        torch.autocast("cuda", torch.bfloat16, enabled=autocast),
    ):
        reference = ResponseForward(log=pytest.fail)(model, model, batch).logps
    assert torch.equal(policy, reference.double())
