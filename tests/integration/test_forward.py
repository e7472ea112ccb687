"""Log-probs from the replaced head against the model's own logits, family by family."""

import pytest
import torch
from helpers import lora_model, randomize_lora
from tiny import FAMILIES, make_model

from bapo_plugin.scoring.collator import PaddedCollator
from bapo_plugin.scoring.forward import ResponseForward

ROWS = [
    {
        "prompt_ids": [3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
        "chosen_ids": [13, 14, 15],
        "rejected_ids": [16],
        "base_ids": [17, 18],
    },
    {
        "prompt_ids": [20],
        "chosen_ids": [21, 22],
        "rejected_ids": [23, 24, 25, 26],
        "base_ids": [27],
    },
]


def oracle(model, row, name):
    """Log-prob of one response, alone and unpadded, from all logits in fp64."""
    prompt, response = row["prompt_ids"], row[f"{name}_ids"]
    logits = model(torch.tensor([prompt + response])).logits[0].double()
    logps = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
    return logps[torch.arange(len(response)), torch.tensor(response)].sum()


def expected(model):
    return torch.stack(
        [oracle(model, row, n) for n in ("chosen", "rejected", "base") for row in ROWS]
    )


def run(model, log=None, **kwargs):
    messages = [] if log is None else log
    return ResponseForward(log=messages.append)(model, model, PaddedCollator(0)(ROWS), **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_logps_and_gradients_of_every_family(family):
    model = make_model(family)
    log = []
    out = run(model, log)
    want = expected(model)
    assert log == [], "the plain path was taken"
    torch.testing.assert_close(out.logps.double(), want, rtol=0, atol=2e-4)

    names = [n for n, _ in model.named_parameters()]
    ours = torch.autograd.grad(out.logps.sum(), model.parameters(), allow_unused=True)
    theirs = torch.autograd.grad(want.sum(), model.parameters(), allow_unused=True)
    for name, mine, true in zip(names, ours, theirs, strict=True):
        assert (mine is None) == (true is None), name
        if mine is not None:
            scale = true.abs().max().clamp(min=1e-3)
            assert (mine - true).abs().max() <= 2e-4 * scale, name


def test_transformations_after_the_head_matter_in_these_models():
    """Guards the test above: without scale and cap the numbers would be far off."""
    for family, key, neutral in (
        ("gemma2", "final_logit_softcapping", None),
        ("cohere", "logit_scale", 1.0),
        ("granite", "logits_scaling", 1.0),
    ):
        model = make_model(family)
        right = run(model).logps
        setattr(model.config, key, neutral)
        wrong = expected_without_transformation(model)
        assert (right - wrong).abs().max() > 0.05, family


def expected_without_transformation(model):
    hidden = {}
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda m, args: hidden.update(h=args[0])
    )
    batch = PaddedCollator(0)(ROWS)
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    states = hidden["h"].flatten(0, 1)[batch["response_index"]]
    logps = torch.log_softmax(model.get_output_embeddings()(states), -1)
    tokens = logps.gather(1, batch["response_labels"][:, None])[:, 0]
    return torch.stack([t.sum() for t in tokens.split(batch["cu_seqlens"].diff().tolist())])


def test_unknown_transformation_takes_the_models_own_logits():
    model = make_model("llama")
    original = model.forward

    def doubled(*args, **kwargs):
        out = original(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = doubled
    log = []
    out = run(model, log)
    assert len(log) == 1 and "transforms its logits in a way that its config doesn't name" in log[0]
    torch.testing.assert_close(out.logps.double(), expected(model), rtol=0, atol=2e-4)


def test_adapter_on_the_head_takes_the_models_own_logits_and_gets_a_gradient():
    model = lora_model("qwen2", target_modules=["q_proj", "lm_head"])
    randomize_lora(model, std=0.2)
    log = []
    out = run(model, log)
    assert len(log) == 1 and "not a plain linear layer" in log[0]
    torch.testing.assert_close(out.logps.double(), expected(model), rtol=0, atol=2e-4)
    out.logps.sum().backward()
    gradient = {n: p.grad for n, p in model.named_parameters() if "lm_head" in n and "lora_A" in n}
    assert gradient and all(g is not None and g.abs().max() > 0 for g in gradient.values())


def test_trainable_copy_of_the_head():
    model = lora_model("qwen2", target_modules=["q_proj"], modules_to_save=["lm_head"])
    out = run(model)
    torch.testing.assert_close(out.logps.double(), expected(model), rtol=0, atol=2e-4)
    out.logps.sum().backward()
    (gradient,) = (
        p.grad for n, p in model.named_parameters() if "modules_to_save" in n and p.requires_grad
    )
    assert gradient.abs().max() > 0


def test_prompt_tuning_is_refused():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(
        make_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(RuntimeError, match="adds or drops positions.*LoRA-like"):
        run(model)


def test_head_is_as_before_after_success_and_failure():
    model = make_model("llama")
    head = model.get_output_embeddings()
    run(model)
    assert "forward" not in vars(head)
    batch = PaddedCollator(0)(ROWS) | {"response_labels": torch.full((13,), 10**6)}
    with pytest.raises(ValueError, match="1000000"):
        ResponseForward(log=print)(model, model, batch)
    assert "forward" not in vars(head)


def test_moe_router_loss_is_the_models_own():
    model = make_model("mixtral").train()
    batch = PaddedCollator(0)(ROWS)
    with torch.no_grad():
        out = run(model, output_router_logits=True)
        own = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_router_logits=True,
        )
    assert out.aux_loss.item() == pytest.approx(own.aux_loss.item(), rel=1e-6) and own.aux_loss > 0


def test_only_response_positions_reach_the_vocabulary():
    model = make_model("llama")
    vocabulary = model.config.vocab_size
    tokens = len(PaddedCollator(0)(ROWS)["response_labels"])
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() and out.shape[-1] == vocabulary:
                seen.append(out.numel() // vocabulary)
            return out

    with Watch():
        run(model).logps.sum().backward()
    assert not seen or max(seen) <= tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_bf16_sums_are_nearer_to_the_truth_than_bf16_logits(dtype):
    model = make_model("qwen2").to(dtype)
    ours = run(model).logps.double()
    exact = make_model("qwen2").to(dtype).double()
    want = expected(exact)
    batch = PaddedCollator(0)(ROWS)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = torch.log_softmax(logits.flatten(0, 1)[batch["response_index"]].float(), -1)
    plain = logps.gather(1, batch["response_labels"][:, None])[:, 0]
    plain = torch.stack([t.sum() for t in plain.split(batch["cu_seqlens"].diff().tolist())])
    assert (ours - want).abs().mean() < (plain.double() - want).abs().mean() + 0.05
