"""Inputs that the kernel tests share."""

import torch
from torch.nn import functional as F


def make_case(tokens, vocabulary, width, lengths=None, dtype=torch.float32, bias=False, seed=0):
    """A dict of arguments with peaked, trained-like logits: some tokens confident, most not."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=g, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=g, dtype=torch.float64) / width**0.5 * 2
    labels = torch.randint(0, vocabulary, (tokens,), generator=g)
    likely = torch.arange(tokens) % 3 == 0  # a third of the states point at their label
    hidden[likely] += weight[labels[likely]]
    lengths = lengths or [tokens]
    assert sum(lengths) == tokens
    return {
        "hidden_states": hidden.to(dtype),
        "lm_head_weight": weight.to(dtype),
        "labels": labels,
        "cu_seqlens": torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]),
        "bias": torch.randn(vocabulary, generator=g, dtype=torch.float64).to(dtype)
        if bias
        else None,
    }


def to_fp64(case):
    """The same numbers (already rounded to the case's dtype) in fp64: the truth to compare with."""
    return {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in case.items()
    }


def confident_case(dtype, vocabulary=500, width=32):
    """Eight tokens whose 1 - p goes from 1e-3 down to below 1e-8, a sequence each."""
    weight = make_case(1, vocabulary, width)["lm_head_weight"]
    labels = torch.arange(8)
    hidden = F.normalize(weight[labels], dim=1) * torch.linspace(8, 26, 8).unsqueeze(1)
    return {
        "hidden_states": hidden.to(dtype),
        "lm_head_weight": weight.to(dtype),
        "labels": labels,
        "cu_seqlens": torch.arange(9),
        "bias": None,
    }


def confident_errors(case, loss_scale, **options):
    """[T] relative error of each token's gradient, which a loss scaler multiplies, against fp64."""
    from bapo_kernels import sequence_logprobs
    from bapo_kernels.reference import sequence_logprobs_reference

    def gradient(function, case, **options):
        leaf = case["hidden_states"].clone().requires_grad_()
        sums = function(**{**case, "hidden_states": leaf}, **options).sum
        return torch.autograd.grad(loss_scale * sums.sum(), leaf)[0].double()

    truth = gradient(sequence_logprobs_reference, to_fp64(case))
    ours = gradient(sequence_logprobs, case, **options)
    return (ours - truth).norm(dim=1) / truth.norm(dim=1)
