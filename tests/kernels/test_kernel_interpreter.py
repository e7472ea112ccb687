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
    (19, 803, 17, [0, 0, 5, 10, 4, 0]),
    (5, 1024, 64, [5]),  # whole slabs only
    (34, 261, 1100, [33, 1]),  # several blocks of rows, H more than one BLOCK_H
]
OPTIONS = [
    {},
    {"bias": True},
    {"logit_softcap": 3.0},
    {"logit_scale": 0.3},
    {"bias": True, "logit_softcap": 3.0, "logit_scale": 1.7},
]
PARTS = [
    "forward",
    "gradient",
    "rises",
    "confident",
    "blocks",
    "masked",
    "nan",
    "poison",
    "kl",
    "layout",
]
# the same kernels as in "gradient"
SLOW = ("forward", "blocks")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton isn't installed")
@pytest.mark.parametrize(
    "part", [pytest.param(p, marks=[pytest.mark.slow] * (p in SLOW)) for p in PARTS]
)
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
        # bf16: e and unit, which the interpreter truncates (2**-8), and the product, rounded (2**-9)
        limit = {torch.float32: 5e-6, torch.bfloat16: 1.2e-2, torch.float16: 1e-3}[dtype]
        check(a, b, limit * b.abs().max().item() + 1e-12, "gradient")


def part_forward(torch):
    """No gradient. The same logits as with one, so the same log-probs to the bit."""
    return [compare(torch, *case, gradient=False) for case in cases(torch)]


def part_gradient(torch):
    return [compare(torch, *case, gradient=True) for case in cases(torch)]


def part_rises(torch):
    """The largest logit in a later slab, far above the first's, by steps below and above RISE; and a first
    slab that is masked whole."""
    from kernel_cases import make_case, to_fp64

    from bapo_kernels import sequence_logprobs
    from bapo_kernels.reference import sequence_logprobs_reference

    found = []
    steps = torch.tensor(
        [0.0, 3.0, 6.0, 20.0, 10.0, 27.5, 60.0, -5.0]
    )  # of the slabs of 256 columns
    masked = torch.cat([torch.full((256,), -torch.inf), torch.zeros(2048 - 256)])
    for dtype, bias in itertools.product(
        (torch.float32, torch.float16, torch.bfloat16), (steps.repeat_interleave(256), masked)
    ):
        case = make_case(24, 2048, 32, [9, 15], dtype=dtype)
        case["labels"] = torch.arange(24) * 80 + 200  # in every slab
        case["labels"][:3] = 300
        case["bias"] = bias
        exact = to_fp64(case)
        for each in (case, exact):
            each["hidden_states"].requires_grad_()
        ours = sequence_logprobs(**case, backend="triton", return_entropy=True, chunk_bytes=1)
        truth = sequence_logprobs_reference(**exact, return_entropy=True)
        torch.testing.assert_close(
            ours.token_logps.double(), truth.token_logps, atol=3e-5, rtol=1e-6
        )
        if bias is not masked:  # the definition's entropy has 0 * -inf there
            torch.testing.assert_close(ours.entropy.double(), truth.entropy, atol=3e-5, rtol=0)
        (a,) = torch.autograd.grad(ours.sum.sum(), case["hidden_states"])
        (b,) = torch.autograd.grad(truth.sum.sum(), exact["hidden_states"])
        limit = {torch.float32: 5e-6, torch.bfloat16: 1.2e-2, torch.float16: 1e-3}[dtype]
        assert (a - b).abs().max() <= limit * b.abs().max(), (dtype, (a - b).abs().max())
        found.append(ours)
    return found


def part_confident(torch):
    """1 - p from 1e-3 to 1e-8 in 16 bits, with a loss scaler's factor: each token's gradient to 1%."""
    from kernel_cases import confident_case, confident_errors

    found = []
    for dtype in (torch.float16, torch.bfloat16):
        errors = confident_errors(confident_case(dtype), 2.0**16, backend="triton")
        assert errors.max() < 1e-2, errors
        found.append(errors)
    return found


def part_blocks(torch):
    """However rows and columns are cut, the numbers are the same; the same bits on every run."""
    from kernel_cases import make_case

    from bapo_kernels import triton_slabs

    case = make_case(50, 1100, 32, dtype=torch.float16, bias=True)
    names = ("hidden_states", "lm_head_weight", "bias", "labels")
    args = [*(case[n] for n in names), 0.5, 5.0, True, True]
    whole = triton_slabs.forward(*args)
    for budget in (1, 30_000, 100_000):
        parts = triton_slabs.forward(*args, budget)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(
                a, b, atol=2e-5 if a.dtype == torch.float32 else 4e-3, rtol=0
            )
        assert all(map(torch.equal, parts, triton_slabs.forward(*args, budget)))
    return [whole]


def part_nan(torch):
    """One NaN or infinity reaches its rows as NaN, wherever it stands: never a plausible number."""
    from kernel_cases import make_case

    from bapo_kernels import sequence_kl, sequence_logprobs

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

    for name, at in (
        *(("hidden_states", (3, 2)), ("reference_hidden_states", (3, 2)), ("bias", (-1,))),
        *(("lm_head_weight", (0, 2)), ("lm_head_weight", (-1, 0))),
    ):
        case = make_case(5, 700, 16, [3, 2], bias=True)
        del case["labels"]
        case["reference_hidden_states"] = case["hidden_states"] + 0.1
        case[name] = case[name].clone()
        case[name][at] = torch.nan
        truth, found = (sequence_kl(**case, backend=b).token_kl for b in ("torch", "triton"))
        assert not truth.isfinite().all()
        assert torch.equal(found.isnan(), truth.isnan()), f"{name}{at}: {found} not {truth}"
        ran.append(found)
    return ran


def part_poison(torch):
    """What the host can't see on CUDA: a wrong label makes its sequence NaN, wrong offsets all of them."""
    from kernel_cases import make_case

    from bapo_kernels import chunked, sequence_logprobs

    chunked._check_values = lambda *_: None
    case = make_case(20, 1000, 16, [8, 0, 12])
    right = sequence_logprobs(**case, backend="torch").sum
    found = [right]
    for dtype in (torch.uint8, torch.int32, torch.int64):
        offsets = case["cu_seqlens"].to(dtype)
        found.append(sequence_logprobs(**{**case, "cu_seqlens": offsets}, backend="triton").sum)
        torch.testing.assert_close(found[-1], right)
    for label in (-100, -1, 1000, 2**32 + 5):
        labels = case["labels"].clone()
        labels[3] = label
        leaf = case["hidden_states"].clone().requires_grad_()
        result = sequence_logprobs(
            **{**case, "labels": labels, "hidden_states": leaf}, backend="triton"
        )
        assert result.sum.isnan().tolist() == [True, False, False], label
        torch.testing.assert_close(result.sum[1:], right[1:])
        assert result.token_logps.isnan().nonzero().tolist() == [[3]]
    many = [0] * 350 + [20] * 50  # more offsets than a program reads at once
    late = [*many[:-20], 5, *many[-20:]]
    for offsets in ([0, 8, 19], [1, 8, 20], [0, 15, 8, 20], [0, 50, 20], [0, 8, 99], late):
        offsets = torch.tensor(offsets)
        sums = sequence_logprobs(**{**case, "cu_seqlens": offsets}, backend="triton").sum
        assert sums.isnan().all(), offsets
    offsets = torch.tensor(many)
    sums = sequence_logprobs(**{**case, "cu_seqlens": offsets}, backend="triton").sum
    torch.testing.assert_close(sums.sum(), right.sum())
    return found


def part_kl(torch):
    """`sequence_kl` by slabs: near and far from the reference, with a scale that rises from slab to slab."""
    from kernel_cases import make_case, to_fp64
    from test_kernel_divergence import run

    from bapo_kernels import sequence_kl
    from bapo_kernels.reference import sequence_kl_reference

    shapes = [(1, 1, 4, None), (5, 257, 8, [2, 0, 3]), (17, 1030, 24, [15, 2]), (2, 300, 1100, [2])]
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    found = []
    every = itertools.product(shapes, dtypes, (OPTIONS[0], OPTIONS[-1]), (1.0, 1e-2))
    for shape, dtype, options, moved in [*every, (shapes[1], dtypes[0], {}, 0.0)]:
        options = dict(options)
        case = make_case(*shape, dtype=dtype, bias=options.pop("bias", False))
        del case["labels"]
        if case["bias"] is not None:  # later slabs weigh more: by a factor of e**3 each
            case["bias"] = torch.arange(shape[1]) // 256 * 3.0 + torch.arange(shape[1]) % 3
        g = torch.Generator().manual_seed(1)
        noise = torch.randn(case["hidden_states"].shape, generator=g)
        case["reference_hidden_states"] = case["hidden_states"] + (moved * noise).to(dtype)
        weights = torch.linspace(0.5, 2.0, case["cu_seqlens"].numel() - 1)
        exact = to_fp64(case)
        truth, true_grad = run(sequence_kl_reference, exact, weights, **options)
        ours, grad = run(sequence_kl, case, weights, **options, backend="triton", chunk_bytes=1)
        where = f"{shape} {dtype} {options} {moved}"
        error = (ours.token_kl.double() - truth.token_kl).abs()
        assert (error <= 2e-5 * moved + 1e-4 * truth.token_kl).all(), f"{where}: {error.max()}"
        assert (ours.token_kl >= 0).all()
        # the interpreter truncates g and unit: 2**-8 each in bf16
        allowed = {torch.float32: 4e-5 / max(moved, 1e-3)}.get(dtype, 3e-2)
        error = (grad.double() - true_grad).norm(dim=1)
        assert (error <= allowed * true_grad.norm(dim=1) + 1e-12).all(), f"{where}: {error.max()}"
        found.append(ours)
    return found


def part_layout(torch):
    """Strides of every input; log-sum-exps beside a label whose logit is far below all others."""
    from kernel_cases import make_case, to_fp64
    from test_kernel_divergence import run

    from bapo_kernels import sequence_kl, sequence_logprobs
    from bapo_kernels.reference import sequence_kl_reference

    found = []
    case = make_case(10, 600, 16, [4, 6], bias=True)
    strided = {
        "hidden_states": case["hidden_states"].t().contiguous().t(),
        "lm_head_weight": case["lm_head_weight"].t().contiguous().t(),
        **{n: case[n].repeat_interleave(2)[::2] for n in ("labels", "bias", "cu_seqlens")},
    }
    assert not any(t.is_contiguous() for t in strided.values())
    results = []
    for each, backend in ((case, "torch"), (strided, "triton")):
        leaf = each["hidden_states"].detach().requires_grad_()
        sums = sequence_logprobs(**{**each, "hidden_states": leaf}, backend=backend).sum
        results.append((sums.detach(), *torch.autograd.grad(sums.sum(), leaf)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-5)
    same = {**case, "labels": case["labels"][:1].expand(10)}
    a, b = (sequence_logprobs(**same, backend=k).sum for k in ("torch", "triton"))
    torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-5)

    for bias in (-100.0, -1e9):
        case = make_case(10, 600, 16, [4, 6], bias=True)
        case["bias"][0] = bias
        del case["labels"]
        noise = torch.randn(10, 16, generator=torch.Generator().manual_seed(1))
        case["reference_hidden_states"] = case["hidden_states"] + 0.01 * noise
        weights = torch.ones(2)
        truth, true_grad = run(sequence_kl_reference, to_fp64(case), weights)
        ours, grad = run(sequence_kl, case, weights, backend="triton")
        torch.testing.assert_close(ours.token_kl.double(), truth.token_kl, atol=1e-7, rtol=1e-3)
        assert (grad - true_grad).norm() <= 2e-3 * true_grad.norm()
        found.append(ours)
    return found


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
