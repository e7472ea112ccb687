"""Inputs that the kernel tests share."""

import torch


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
