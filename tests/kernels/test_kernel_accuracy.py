"""Values and gradients against fp64 truth: no worse than plain torch in the same dtype allows."""

import pytest
import torch
from kernel_cases import confident_case, confident_errors, make_case, to_fp64
from torch.nn import functional as F

from bapo_kernels import head_gradient, sequence_logprobs
from bapo_kernels.reference import sequence_logprobs_reference

# tokens, vocabulary, width, lengths: ragged everywhere, vocabularies not a multiple of anything
SHAPES = [
    (1, 1, 4, None),
    (1, 2, 1, None),
    (5, 257, 8, [2, 0, 3]),
    (37, 1003, 17, [0, 0, 5, 15, 17, 0]),
    (130, 32003, 24, [128, 2]),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [
    {},
    {"bias": True},
    {"logit_softcap": 5.0},
    {"logit_scale": 0.25},
    {"bias": True, "logit_softcap": 3.0, "logit_scale": 1.7},
]
# Largest absolute error of a token's log-prob, in nats, where logits are a few tens.
TOKEN_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5}
TOKEN_TOLERANCE[torch.float16] = 2e-5  # 16-bit inputs are exact: only fp32 arithmetic may differ


def naive_sums(case, scale=1.0, softcap=None):
    """What a trainer writes: logits in the model's dtype, softmax in fp32."""
    logits = F.linear(case["hidden_states"], case["lm_head_weight"], case["bias"])
    logits = logits.float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = torch.log_softmax(logits, -1).gather(1, case["labels"].unsqueeze(1)).squeeze(1)
    lengths = case["cu_seqlens"].diff().tolist()
    return torch.stack([piece.sum() for piece in logps.split(lengths)])


def split_options(options):
    options = dict(options)
    return options.pop("bias", False), options


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64_truth(shape, dtype, options):
    bias, options = split_options(options)
    case = make_case(*shape, dtype=dtype, bias=bias)
    truth = sequence_logprobs_reference(**to_fp64(case), **options, return_entropy=True)
    ours = sequence_logprobs(**case, **options, return_entropy=True, chunk_bytes=1)

    tolerance = TOKEN_TOLERANCE[dtype]
    result = torch.float64 if dtype == torch.float64 else torch.float32
    assert ours.sum.dtype == ours.token_logps.dtype == ours.entropy.dtype == result
    assert ours.num_tokens.dtype == torch.int32
    assert ours.num_tokens.tolist() == case["cu_seqlens"].diff().tolist()
    torch.testing.assert_close(ours.token_logps.double(), truth.token_logps, atol=tolerance, rtol=0)
    torch.testing.assert_close(ours.entropy.double(), truth.entropy, atol=tolerance, rtol=0)
    allowed = tolerance * ours.num_tokens.clamp_min(1)  # an empty sequence sums to 0
    assert ((ours.sum.double() - truth.sum).abs() <= allowed).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trainable_head", [False, True], ids=["frozen", "trainable"])
def test_gradient_error_budget(dtype, options, trainable_head):
    """Error against fp64 at most twice that of plain torch in the same dtype (issue's rule)."""
    bias, options = split_options(options)
    case = make_case(96, 4099, 48, [50, 0, 46], dtype=dtype, bias=bias)
    grad = torch.tensor([0.7, 2.0, -1.3])

    def gradients(function, case, grad):
        names = ["hidden_states"]
        if trainable_head:
            names += ["lm_head_weight"] + (["bias"] if bias else [])
        leaves = {n: case[n].clone().requires_grad_() for n in names}
        sums = function({**case, **leaves})
        return torch.autograd.grad(sums, list(leaves.values()), grad.to(sums.dtype))

    truth = gradients(
        lambda c: sequence_logprobs_reference(**c, **options).sum, to_fp64(case), grad
    )
    scale, softcap = options.get("logit_scale", 1.0), options.get("logit_softcap")
    naive = gradients(lambda c: naive_sums(c, scale, softcap), case, grad)
    ours = gradients(lambda c: sequence_logprobs(**c, **options, chunk_bytes=1).sum, case, grad)
    for exact, plain, mine in zip(truth, naive, ours, strict=True):
        assert mine.dtype == plain.dtype == dtype
        budget = 2 * (plain.double() - exact).norm() + 1e-6 * exact.norm()
        error = (mine.double() - exact).norm()
        assert error <= budget, f"relative error {error / exact.norm():.2e}"


@pytest.mark.parametrize("loss_scale", [1e-5, 1.0, 256.0])
def test_head_gradient_by_16_bit_gemms(monkeypatch, loss_scale):
    """As on CUDA, where the GEMM takes g in fp16: tiny terms of -p must not vanish, large ones not overflow."""

    def mm_16(a, b, buffer=None):
        product = a.to(b.dtype).float() @ b.float()
        return (
            product if buffer is None else buffer[: product.numel()].view_as(product).copy_(product)
        )

    case = make_case(200, 5003, 64, dtype=torch.float16, bias=True)
    grad = torch.full((200,), loss_scale)
    truth = to_fp64(case)
    leaf = truth["lm_head_weight"].requires_grad_()
    sums = sequence_logprobs_reference(**truth).sum
    (truth,) = torch.autograd.grad(loss_scale * sums.sum(), leaf)

    exact = sequence_logprobs(**case)
    logsumexp = torch.logsumexp(to_fp64(case)["hidden_states"] @ leaf.t() + case["bias"], 1).float()
    monkeypatch.setattr(head_gradient, "has_mixed_gemm", lambda tensor: True)
    monkeypatch.setattr(head_gradient, "mm_wide", mm_16)
    names = ("hidden_states", "lm_head_weight", "bias", "labels")
    arguments = [*(case[n] for n in names), exact.token_logps, logsumexp.detach(), grad]
    ours, _ = head_gradient.head_gradient(*arguments, 1.0, None, True, False)
    rounding = (truth.half().double() - truth).norm()
    assert (ours.double() - truth).norm() <= 2 * rounding + 1e-5 * truth.norm()
    unlikely = torch.ones(5003, dtype=torch.bool).index_fill(0, case["labels"], False)
    rounding = (truth[unlikely].half().double() - truth[unlikely]).norm()
    assert (ours[unlikely].double() - truth[unlikely]).norm() <= 2 * rounding


def test_sums_of_512_tokens_from_bf16():
    """Logits kept in bf16 are off by tenths of a nat here; ours must be within 1e-3."""
    case = make_case(1024, 8192, 64, [512, 512], dtype=torch.bfloat16)
    truth = sequence_logprobs_reference(**to_fp64(case)).sum
    error = (sequence_logprobs(**case).sum.double() - truth).abs().max()
    naive_error = (naive_sums(case).double() - truth).abs().max()
    assert error < 1e-3
    assert naive_error > 10 * error, "the case no longer tells fp32 logits from bf16 logits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 300.0])
def test_confident_tokens_keep_their_gradient(dtype, softcap):
    """1 - p from 1e-3 to 1e-9: onehot - p in the working precision would give 0 or noise."""
    case = confident_case(dtype)

    def run(function, case):
        leaf = case["hidden_states"].clone().requires_grad_()
        sums = function(**{**case, "hidden_states": leaf}, logit_softcap=softcap).sum
        return sums.detach().double(), torch.autograd.grad(sums.sum(), leaf)[0].double()

    true_sums, truth = run(sequence_logprobs_reference, to_fp64(case))
    sums, ours = run(sequence_logprobs, case)
    assert -true_sums.max() < 4e-9 and -true_sums.min() > 5e-4
    torch.testing.assert_close(sums, true_sums, atol=1e-12, rtol=1e-4)
    relative = (ours - truth).norm(dim=1) / truth.norm(dim=1)
    assert relative.max() < (1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("loss_scale", [2.0**16, 2.0**24])
def test_a_loss_scaler_saves_a_confident_tokens_fp16_gradient(loss_scale):
    """1 - p of a token must not be rounded to fp16 (6e-8 and below is 0) before the scale meets it."""
    errors = confident_errors(confident_case(torch.float16), loss_scale)
    assert errors.max() < 2e-3, errors


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("tokens, lengths", [(7, [3, 0, 4]), (1, [1])])
def test_gradcheck(tokens, lengths, softcap):
    case = make_case(tokens, 300, 5, lengths, dtype=torch.float64, bias=True)
    leaves = [case.pop(n).requires_grad_() for n in ("hidden_states", "lm_head_weight", "bias")]

    def sums(hidden, weight, bias):
        return sequence_logprobs(
            hidden, weight, **case, bias=bias, logit_scale=0.6, logit_softcap=softcap, chunk_bytes=1
        ).sum

    assert torch.autograd.gradcheck(sums, leaves, fast_mode=True)


def test_masked_vocabulary_and_extreme_logits_stay_finite():
    """A bias of -inf takes a token out of the vocabulary; logits of +-1e4 overflow no exp."""
    case = make_case(12, 700, 16, [12], bias=True)
    case["labels"] = case["labels"] % 600
    case["bias"][600:] = -torch.inf
    case["hidden_states"] = (case["hidden_states"] * 1e4).requires_grad_()
    ours = sequence_logprobs(**case, return_entropy=True, chunk_bytes=1)
    truth = sequence_logprobs_reference(**{**to_fp64(case), "bias": case["bias"].double()})
    torch.testing.assert_close(ours.sum.double(), truth.sum, rtol=1e-5, atol=1e-2)
    assert ours.entropy.isfinite().all()
    ours.sum.sum().backward()
    assert case["hidden_states"].grad.isfinite().all()
