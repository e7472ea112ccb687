"""No [T, V] tensor, and a peak that doesn't grow with the vocabulary."""

import pytest
import torch
from kernel_cases import make_case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bapo_kernels import chunked, sequence_logprobs, torch_tiles


class LargestTensor(TorchDispatchMode):
    """Elements of the largest storage that any operation under it returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                size = leaf.untyped_storage().nbytes() // leaf.itemsize
                self.elements = max(self.elements, size)
        return result


def forward_args(case, **changes):
    options = {
        "scale": 1.0,
        "softcap": None,
        "backend": "torch",
        "need_unit": True,
        "need_entropy": True,
        "chunk_bytes": 4 << 20,
    }
    return (*case.values(), *{**options, **changes}.values())


def reordered(case):
    names = ("hidden_states", "lm_head_weight", "bias", "labels", "cu_seqlens")
    return {n: case[n] for n in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_logits_matrix(dtype, softcap):
    """T * V = 10.5 M elements, the weight itself has 1.3 M: nothing may pass 2.6 M (a quarter)."""
    tokens, vocabulary = 512, 20480
    case = reordered(make_case(tokens, vocabulary, 64, dtype=dtype))
    # The custom op hides its inside from dispatch modes: call the function that it wraps.
    with LargestTensor() as seen:
        chunked._op._init_fn(*forward_args(case, softcap=softcap))
    assert 0 < seen.elements < tokens * vocabulary / 4

    lse = torch.zeros(tokens)
    with LargestTensor() as seen:
        chunked._head_gradient_op._init_fn(
            case["hidden_states"],
            case["lm_head_weight"],
            None,
            case["labels"],
            -lse,
            lse,
            lse,
            1.0,
            softcap,
            True,
            False,
            4 << 20,
        )
    assert 0 < seen.elements < tokens * vocabulary / 4


def test_the_counter_sees_a_logits_matrix():
    """The check above is worth what this one is: it must fail on the naive computation."""
    case = make_case(64, 1000, 8)
    with LargestTensor() as seen:
        torch.log_softmax(case["hidden_states"] @ case["lm_head_weight"].t(), -1)
    assert seen.elements >= 64 * 1000


def peak_bytes(function):
    """Most bytes allocated at once by torch while `function` ran, by the profiler's record."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    now = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_is_flat_in_vocabulary_and_within_budget(dtype):
    tokens, width, budget = 1024, 32, 4 << 20

    def peak(vocabulary):
        case = make_case(tokens, vocabulary, width, dtype=dtype)
        case["hidden_states"].requires_grad_()
        return peak_bytes(
            lambda: sequence_logprobs(**case, chunk_bytes=budget).sum.sum().backward()
        )

    small, large = peak(8192), peak(32768)
    assert large < 1.05 * small
    assert large < budget + 8 * tokens * width * 4
    assert large < 0.1 * tokens * 32768 * 4  # a tenth of the fp32 logits alone


@pytest.mark.parametrize("vocabulary", [49_152, 128_256, 151_936, 32_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_have_a_width_that_gemms_are_fast_at(vocabulary, dtype):
    hidden, weight = torch.empty(1536, 64, dtype=dtype), torch.empty(vocabulary, 64, dtype=dtype)
    _, columns = torch_tiles.tile_plan(hidden, weight, 0, 1)
    widths = [piece.stop - piece.start for piece in columns]
    assert sum(widths) == vocabulary and len(widths) > 1
    assert all(width % 64 == 0 for width in widths[:-1])
