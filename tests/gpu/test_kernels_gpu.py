"""What only a card can show: `pytest -m gpu tests/gpu/test_kernels_gpu.py`. Torch and Triton only."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "kernels"))
if importlib.util.find_spec("bapo_kernels") is None:
    sys.path.insert(0, str(ROOT / "kernels"))

from kernel_cases import confident_case, confident_errors, make_case, to_fp64  # noqa: E402

from bapo_kernels import sequence_kl, sequence_logprobs  # noqa: E402
from bapo_kernels.reference import sequence_kl_reference, sequence_logprobs_reference  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPES = [
    (1, 2, 16, None),
    (37, 1003, 17, [0, 0, 5, 15, 17, 0]),
    (300, 32003, 576, [299, 1]),
    (1000, 49152, 576, [500, 0, 500]),
]
OPTIONS = [{}, {"bias": True, "logit_softcap": 5.0, "logit_scale": 1.7}]
GRADIENT_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def to_cuda(case):
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in case.items()}


@pytest.fixture(autouse=True)
def _exact_fp32_gemm(monkeypatch):
    """These tolerances are for fp32 GEMMs; some containers turn TF32 on."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("backend", ["triton", "torch", "auto"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path_against_fp64(shape, dtype, options, backend):
    options = dict(options)
    case = to_cuda(make_case(*shape, dtype=dtype, bias=options.pop("bias", False)))
    exact = to_fp64(case)
    exact["hidden_states"].requires_grad_()
    truth = sequence_logprobs_reference(**exact, **options, return_entropy=True)
    weights = torch.arange(1, truth.sum.numel() + 1, device="cuda")
    (true_grad,) = torch.autograd.grad((truth.sum * weights).sum(), exact["hidden_states"])

    def check(result):
        torch.testing.assert_close(
            result.token_logps.double(), truth.token_logps, atol=5e-5, rtol=0
        )
        torch.testing.assert_close(result.entropy.double(), truth.entropy, atol=5e-5, rtol=0)
        error = (result.sum.double() - truth.sum).abs()
        assert (error <= 1e-3 * (1 + result.num_tokens / 512)).all()

    kwargs = {**options, "return_entropy": True, "backend": backend, "chunk_bytes": 8 << 20}
    check(sequence_logprobs(**case, **kwargs))
    case["hidden_states"].requires_grad_()
    result = sequence_logprobs(**case, **kwargs)
    check(result)
    (grad,) = torch.autograd.grad((result.sum * weights).sum(), case["hidden_states"])
    limit = GRADIENT_LIMIT[dtype]
    assert (grad.double() - true_grad).norm() <= limit * true_grad.norm() + 1e-12


@pytest.mark.parametrize("shape", [(1, 1003, 16), (700, 49152, 256), (5000, 32003, 576)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_policy_and_reference_are_equal_to_the_bit(dtype, shape):
    """The first step's drift is zero: what needs a gradient and what doesn't take the same way."""
    case = to_cuda(make_case(*shape, dtype=dtype))
    with torch.no_grad():
        reference = sequence_logprobs(**case)
    case["hidden_states"].requires_grad_()
    policy = sequence_logprobs(**case)
    assert torch.equal(policy.token_logps, reference.token_logps)
    assert torch.equal(policy.sum, reference.sum)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("loss_scale", [2.0**16, 2.0**24])
def test_confident_tokens_in_fp16(loss_scale, backend):
    case = to_cuda(confident_case(torch.float16))
    assert confident_errors(case, loss_scale, backend=backend).max() < 2e-3


@pytest.mark.parametrize("place", ["hidden_states", "label", "other", "last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_nan_stays_one(gradient, value, place):
    case = to_cuda(make_case(5, 20_000, 64, [3, 2], dtype=torch.bfloat16))
    label = int(case["labels"][3])
    row = {"label": label, "other": (label + 1) % 20_000, "last": -1}
    if place == "hidden_states":
        case[place][3, 2] = value
    else:
        case["lm_head_weight"][row[place], 2] = value
    case["hidden_states"].requires_grad_(gradient)
    truth = sequence_logprobs(**case, backend="torch").token_logps.isfinite()
    assert not truth.all()
    assert torch.equal(sequence_logprobs(**case).token_logps.isfinite(), truth)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("distance", [1e-2, 1.0])
def test_kl_against_fp64(distance, dtype, options):
    options = dict(options)
    case = to_cuda(
        make_case(300, 32003, 576, [299, 1], dtype=dtype, bias=options.pop("bias", False))
    )
    del case["labels"]
    g = torch.Generator("cuda").manual_seed(1)
    noise = torch.randn(case["hidden_states"].shape, generator=g, device="cuda")
    case["reference_hidden_states"] = (case["hidden_states"] + distance * noise).to(dtype)
    exact = to_fp64(case)

    def run(function, case, **more):
        leaf = case["hidden_states"].clone().requires_grad_()
        result = function(**{**case, "hidden_states": leaf}, **options, **more)
        return result.token_kl.double(), torch.autograd.grad(result.sum.sum(), leaf)[0].double()

    truth, true_grad = run(sequence_kl_reference, exact)
    _, plain = run(
        sequence_kl_reference, case
    )  # fp32's rounding of logits counts for much in p - p_ref
    for backend in ("triton", "torch"):
        kl, grad = run(sequence_kl, case, backend=backend)
        torch.testing.assert_close(kl, truth, rtol=1e-3, atol=1e-6)
        # the logits' rounding, 1e-5 in fp32, is large beside p - p_ref where the policy has hardly moved
        budget = 2 * (plain - true_grad).norm() + 1e-5 / distance * true_grad.norm()
        assert (grad - true_grad).norm() <= budget, backend


@pytest.mark.parametrize("loss_scale", [1e-3, 1.0, 256.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_trainable_head(dtype, loss_scale):
    case = to_cuda(make_case(200, 5003, 64, [120, 80], dtype=dtype, bias=True))
    names = ("hidden_states", "lm_head_weight", "bias")

    def gradients(function, case):
        leaves = [case[n].clone().requires_grad_() for n in names]
        sums = function(**{**case, **dict(zip(names, leaves, strict=True))}).sum
        return torch.autograd.grad((loss_scale * sums).sum(), leaves)

    truth = gradients(sequence_logprobs_reference, to_fp64(case))
    for a, b in zip(gradients(sequence_logprobs, case), truth, strict=True):
        assert (a.double() - b).norm() <= GRADIENT_LIMIT[dtype] * b.norm()


@pytest.mark.parametrize("gradient", [False, True])
def test_same_bits_on_every_run(gradient):
    case = to_cuda(make_case(700, 49152, 256, [400, 300], dtype=torch.bfloat16))
    case["hidden_states"].requires_grad_(gradient)

    def once():
        sums = sequence_logprobs(**case).sum
        if not gradient:
            return (sums,)
        return sums, *torch.autograd.grad(sums.sum(), case["hidden_states"])

    first = once()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize("on_cpu", [False, True])
def test_the_host_never_waits_for_the_device(on_cpu):
    case = to_cuda(make_case(64, 4096, 64, [30, 34], dtype=torch.bfloat16))
    if on_cpu:
        case["cu_seqlens"] = case["cu_seqlens"].cpu()
    case["hidden_states"].requires_grad_()

    def once():
        sequence_logprobs(**case).sum.sum().backward()
        with torch.no_grad():
            sequence_logprobs(**case)

    once()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_wrong_values_give_nan(backend):
    case = to_cuda(make_case(20, 1000, 64, [8, 12], dtype=torch.bfloat16))
    labels = case["labels"].clone()
    labels[3] = -100
    result = sequence_logprobs(**{**case, "labels": labels}, backend=backend)
    assert result.sum.isnan().tolist() == [True, False]
    offsets = torch.tensor([0, 8, 19], device="cuda")
    result = sequence_logprobs(**{**case, "cu_seqlens": offsets}, backend=backend)
    assert result.sum.isnan().all()


def test_no_tokens():
    hidden = torch.empty(0, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(100, 64, device="cuda", dtype=torch.bfloat16)
    labels = torch.empty(0, dtype=torch.int64, device="cuda")
    result = sequence_logprobs(hidden, weight, labels, torch.tensor([0, 0], device="cuda"))
    assert result.sum.tolist() == [0.0]
    result.sum.sum().backward()
    assert hidden.grad.shape == (0, 64)


@pytest.mark.parametrize("budget", [None, 32 << 20])
def test_peak_memory(budget):
    """Slabs, and what backward needs: d logp / d h and the gradient itself."""
    tokens, vocabulary, width = 8192, 128_256, 1024
    case = to_cuda(make_case(tokens, vocabulary, width, dtype=torch.bfloat16))

    def peak(function):
        function()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    slabs = budget or 74 << 20
    with torch.no_grad():
        assert peak(lambda: sequence_logprobs(**case, chunk_bytes=budget)) < slabs + tokens * 100
    hidden = case["hidden_states"].requires_grad_()

    def step():
        hidden.grad = None
        sequence_logprobs(**case, chunk_bytes=budget).sum.sum().backward()

    assert peak(step) < slabs + 3 * tokens * width * 2 + tokens * 100


def test_inductor_compiles_the_caller():
    case = to_cuda(make_case(64, 4096, 64, [30, 34], dtype=torch.bfloat16))
    rest = {k: v for k, v in case.items() if k != "hidden_states"}

    def function(hidden):
        return sequence_logprobs(torch.tanh(hidden.float()).bfloat16(), **rest).sum

    leaf = case["hidden_states"].requires_grad_()
    compiled = torch.compile(function, fullgraph=True)
    (a,) = torch.autograd.grad(function(leaf).sum(), leaf)
    (b,) = torch.autograd.grad(compiled(leaf).sum(), leaf)
    torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-4)  # inductor's tanh may differ


@pytest.mark.parametrize("large", ["states", "head"])
def test_more_than_2_to_the_31_elements(large):
    """64-bit addresses: the last rows must be as right as the first."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free GPU memory")
    if large == "head":
        vocabulary, width, tokens = 600_000, 4096, 48  # V * H = 2.46e9 in bf16: 4.9 GB
    else:
        vocabulary, width, tokens = 3000, 4096, 530_000  # T * H = 2.17e9: 4.3 GB
    weight = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16) / width**0.5
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(vocabulary - 1000, vocabulary, (tokens,), device="cuda")
    cu = torch.tensor([0, tokens], device="cuda")
    hidden.requires_grad_(large != "head")
    result = sequence_logprobs(hidden, weight, labels, cu, backend="triton")
    ours = result.token_logps
    tail = slice(tokens - 48, tokens)
    few = torch.tensor([0, 48])
    with torch.no_grad():
        expected = sequence_logprobs(hidden[tail], weight, labels[tail], few, backend="torch")
    torch.testing.assert_close(ours[tail], expected.token_logps, atol=1e-4, rtol=0)
    if large == "states":
        (grad,) = torch.autograd.grad(result.sum, hidden)
        leaf = hidden[tail].detach().requires_grad_()
        expected = sequence_logprobs(leaf, weight, labels[tail], few, backend="torch").sum
        (expected,) = torch.autograd.grad(expected, leaf)
        assert (grad[tail] - expected).norm() <= GRADIENT_LIMIT[torch.bfloat16] * expected.norm()
