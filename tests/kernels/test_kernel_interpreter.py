"""Every Triton kernel under Triton's interpreter, against fp64, in a process of its own.

TRITON_INTERPRET=1 has to be set before a kernel is defined, and stays for the process: this file
runs itself (`python test_kernel_interpreter.py`) and the test reads the result. What the interpreter
can't show: races, TF32, round-to-nearest stores to bf16 (it truncates).
"""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

# tokens, vocabulary, width, lengths of sequences
SHAPES = [
    (1, 1, 16, None),
    (3, 2, 5, [1, 0, 2]),
    (37, 5003, 17, [0, 0, 5, 15, 17, 0]),
    (5, 2048, 64, [5]),  # exactly one block of the row kernel, H exactly one BLOCK_K
    (140, 523, 80, [139, 1]),  # two blocks of tokens, H not a multiple of BLOCK_K
]
OPTIONS = [
    {},
    {"bias": True},
    {"logit_softcap": 3.0},
    {"logit_scale": 0.3},
    {"bias": True, "logit_softcap": 3.0, "logit_scale": 1.7},
]
PARTS = ["forward", "gradient", "long", "config", "masked", "nan"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton isn't installed")
@pytest.mark.parametrize("part", PARTS)
def test_against_fp64(part):
    root = Path(__file__).parents[2]
    paths = [str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "2",
    }
    result = subprocess.run(
        [sys.executable, __file__, part], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert int(result.stdout.split()[-1]) > 0, "no case ran"


def cases(torch):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return itertools.product(SHAPES, dtypes, OPTIONS)


def compare(torch, shape, dtype, options, gradient):
    from kernel_cases import make_case, to_fp64

    from bapo_kernels import sequence_logprobs
    from bapo_kernels.reference import sequence_logprobs_reference

    options = dict(options)
    case = make_case(*shape, dtype=dtype, bias=options.pop("bias", False))
    exact = to_fp64(case)
    for each in (case, exact):
        each["hidden_states"] = each["hidden_states"].clone().requires_grad_(gradient)
    with_entropy = shape[1] > 2 or gradient
    ours = sequence_logprobs(
        **case, **options, return_entropy=with_entropy, backend="triton", chunk_bytes=1
    )
    truth = sequence_logprobs_reference(**exact, **options, return_entropy=True)
    where = f"{shape} {dtype} {options} gradient={gradient}"

    def check(a, b, tolerance, what):
        error = (a.double() - b).abs().max().item()
        assert error <= tolerance, f"{where}: {what} off by {error:.1e}"

    check(ours.token_logps, truth.token_logps, 2e-5, "token_logps")
    check(ours.sum, truth.sum, 2e-5 * max(1, shape[0]), "sum")
    if with_entropy:
        check(ours.entropy, truth.entropy, 2e-5, "entropy")
    if gradient:
        weights = torch.arange(1, ours.sum.numel() + 1)
        (a,) = torch.autograd.grad((ours.sum * weights).sum(), case["hidden_states"])
        (b,) = torch.autograd.grad((truth.sum * weights).sum(), exact["hidden_states"])
        assert a.dtype == dtype
        # bf16: three roundings, of which the interpreter's store truncates (2**-8 each way)
        limit = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
        check(a, b, limit * b.abs().max().item() + 1e-12, "gradient")


def part_forward(torch):
    """No gradient: the fused forward for 16 bits, the row kernel for fp32."""
    return [compare(torch, *case, gradient=False) for case in cases(torch)]


def part_gradient(torch):
    return [compare(torch, *case, gradient=True) for case in cases(torch)]


def part_long(torch):
    """Several launches of the forward, each within its workspace; many splits; same bits twice."""
    from kernel_cases import make_case

    from bapo_kernels import triton_forward

    case = make_case(600, 1100, 32, dtype=torch.float16)
    args = [case[n] for n in ("hidden_states", "lm_head_weight", "bias", "labels")]
    whole = triton_forward.forward(*args, 1.0, None, True, processors=3)
    triton_forward.WORKSPACE_BYTES = 8192
    split = triton_forward.forward(*args, 1.0, None, True, processors=30)
    again = triton_forward.forward(*args, 1.0, None, True, processors=30)
    for a, b, c in zip(whole, split, again, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
        assert torch.equal(b, c)
    return [whole]


def part_config(torch):
    """The configuration of every card gives the same numbers."""
    from kernel_cases import make_case

    from bapo_kernels import triton_forward

    case = make_case(130, 700, 80, dtype=torch.bfloat16, bias=True)
    args = [case[n] for n in ("hidden_states", "lm_head_weight", "bias", "labels")]
    results = []
    for capability in ((8, 0), (8, 9), (9, 0), (12, 0)):
        config = triton_forward.config_for(capability)
        results.append(triton_forward.forward(*args, 0.5, 5.0, True, config=config))
        for a, b in zip(results[0], results[-1], strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    return results


def part_nan(torch):
    """One NaN or infinity reaches its rows as NaN, wherever it stands: never a plausible number."""
    from kernel_cases import make_case

    from bapo_kernels import sequence_logprobs

    ran = []
    places = {
        "hidden_states": [(3, 2)],
        "lm_head_weight": [("label", 2), ("other", 2), (-1, 0)],
        "bias": [("label",), ("other",), (-1,)],
    }
    for dtype, (name, positions), value, gradient in itertools.product(
        (torch.float32, torch.bfloat16), places.items(), (torch.nan, torch.inf), (False, True)
    ):
        for position in positions:
            if name == "bias" and value == torch.inf and position != ("label",):
                continue  # an infinite logit of another token leaves none for the label: -inf
            case = make_case(5, 2100, 16, [3, 2], dtype=dtype, bias=True)
            label = int(case["labels"][3])
            where = {"label": label, "other": (label + 1) % 2100}
            at = tuple(where.get(p, p) for p in position)
            case[name] = case[name].clone()
            case[name][at] = value
            case["hidden_states"].requires_grad_(gradient)
            truth = sequence_logprobs(**case, backend="torch").token_logps
            found = sequence_logprobs(**case, backend="triton").token_logps
            text = f"{dtype} {name}{at} {value} gradient={gradient}: {found} not {truth}"
            assert not truth.isfinite().all(), text
            assert torch.equal(found.isfinite(), truth.isfinite()), text
            ran.append(found)
    return ran


def part_masked(torch):
    """A bias of -inf takes a token out of the vocabulary, on either side of a block's end."""
    from kernel_cases import make_case

    from bapo_kernels import sequence_logprobs

    found = []
    for dtype, softcap in itertools.product((torch.float32, torch.bfloat16), (None, 3.0)):
        case = make_case(9, 2500, 48, dtype=dtype, bias=True)
        case["labels"] = case["labels"] % 2000
        case["bias"][2000:2200] = -torch.inf
        for gradient in (False, True):
            leaf = case["hidden_states"].clone().requires_grad_(gradient)
            triton, plain = (
                sequence_logprobs(
                    **{**case, "hidden_states": leaf},
                    logit_softcap=softcap,
                    return_entropy=True,
                    backend=backend,
                )
                for backend in ("triton", "torch")
            )
            torch.testing.assert_close(triton.token_logps, plain.token_logps, atol=2e-5, rtol=0)
            torch.testing.assert_close(triton.entropy, plain.entropy, atol=2e-5, rtol=0)
            if gradient:
                a, b = (torch.autograd.grad(r.sum.sum(), leaf)[0] for r in (triton, plain))
                torch.testing.assert_close(a, b, atol=8e-3 * b.abs().max().item(), rtol=0)
            found.append(triton)
    return found


if __name__ == "__main__":
    import torch

    torch.set_num_threads(2)
    print(len(globals()[f"part_{sys.argv[1]}"](torch)))
