"""KL to a reference under the same head, against its definition in fp64."""

import pytest
import torch
from kernel_cases import make_case, to_fp64

from bapo_kernels import divergence, sequence_kl
from bapo_kernels.reference import sequence_kl_reference

OPTIONS = [{}, {"bias": True}, {"bias": True, "logit_softcap": 3.0, "logit_scale": 1.7}]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 4, None), (5, 257, 8, [2, 0, 3]), (130, 9001, 24, [128, 2])]


def kl_case(shape, dtype, moved, bias=False):
    case = make_case(*shape, dtype=dtype, bias=bias)
    del case["labels"]
    noise = torch.randn(case["hidden_states"].shape, generator=torch.Generator().manual_seed(1))
    case["reference_hidden_states"] = case["hidden_states"] + (moved * noise).to(dtype)
    return case


def run(function, case, weights, **options):
    case = dict(case)
    hidden = case["hidden_states"].clone().requires_grad_()
    out = function(**(case | {"hidden_states": hidden}), **options)
    (out.sum * weights.to(out.sum.dtype)).sum().backward()
    return out, hidden.grad


@pytest.mark.parametrize("moved", [1.0, 1e-2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64_truth(shape, dtype, options, moved):
    options = dict(options)
    case = kl_case(shape, dtype, moved, options.pop("bias", False))
    weights = torch.linspace(0.5, 2.0, case["cu_seqlens"].numel() - 1)
    truth, grad_true = run(sequence_kl_reference, to_fp64(case), weights, **options)
    found, grad = run(sequence_kl, case, weights, **options, chunk_bytes=2**20)
    # the logits' rounding, 1e-5 in fp32, times how far the policy has moved
    exact = dtype == torch.float64
    tolerance = 1e-13 if exact else 1e-5 * moved
    torch.testing.assert_close(found.token_kl.double(), truth.token_kl, atol=tolerance, rtol=1e-4)
    lengths = case["cu_seqlens"].diff()
    assert ((found.sum.double() - truth.sum).abs() <= (tolerance + 1e-4 * moved) * lengths).all()
    assert (found.token_kl >= 0).all() and grad.dtype == dtype
    # one rounding to the states' dtype, relative to the token's own gradient
    allowed = {torch.float64: 1e-12, torch.float32: 2e-5 / moved}.get(dtype, 2e-2)
    size = grad_true.norm(dim=1, keepdim=True)
    assert ((grad.double() - grad_true).norm(dim=1, keepdim=True) <= allowed * size + 1e-30).all()


def test_is_zero_where_nothing_has_moved():
    case = kl_case((40, 3001, 16, None), torch.bfloat16, 0.0)
    out, grad = run(sequence_kl, case, torch.ones(1))
    assert out.sum.item() == 0 and grad.abs().max() == 0


def test_result_does_not_depend_on_chunks():
    case = kl_case((70, 5003, 16, [30, 40]), torch.float32, 0.3)
    small, grad_small = run(sequence_kl, case, torch.ones(2), chunk_bytes=1)
    large, grad_large = run(sequence_kl, case, torch.ones(2))
    torch.testing.assert_close(small.token_kl, large.token_kl, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad_small, grad_large, rtol=1e-4, atol=2e-6)


def test_small_gradients_survive_fp16():
    """What the loss scale is there for: a gradient far below fp16's smallest number, times 2**16."""
    case = kl_case((12, 257, 8, None), torch.float16, 1e-2)
    scale = torch.tensor([2.0**-14])
    _, truth = run(sequence_kl_reference, to_fp64(case), scale)
    _, grad = run(sequence_kl, case, torch.tensor([1.0]))
    unscaled = grad.double() * 2.0**-14
    torch.testing.assert_close(unscaled, truth, rtol=2e-2, atol=2e-3 * float(truth.abs().max()))


@pytest.mark.parametrize("name", ["hidden_states", "reference_hidden_states", "lm_head_weight"])
def test_nan_stays_nan(name):
    case = kl_case((6, 257, 8, [3, 3]), torch.float32, 0.1)
    case[name] = case[name].clone()
    case[name][4, 0] = torch.nan
    found = sequence_kl(**case).sum
    assert found[1].isnan() and (found[0].isnan() == (name == "lm_head_weight"))


def test_far_apart_is_finite():
    """Where the reference's probability underflows and the policy's doesn't."""
    case = kl_case((4, 257, 8, None), torch.float32, 0.0)
    case["hidden_states"] = case["hidden_states"] * 40
    case["reference_hidden_states"] = -case["hidden_states"]
    truth, grad_true = run(sequence_kl_reference, to_fp64(case), torch.ones(1))
    found, grad = run(sequence_kl, case, torch.ones(1))
    torch.testing.assert_close(found.sum.double(), truth.sum, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), grad_true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c | {"lm_head_weight": c["lm_head_weight"].requires_grad_()}, "freeze it"),
        (lambda c: c | {"reference_hidden_states": c["hidden_states"][:3]}, r"\(6, 8\).*\(3, 8\)"),
        (lambda c: c | {"reference_hidden_states": c["hidden_states"].double()}, "float64"),
        (lambda c: c | {"cu_seqlens": torch.tensor([0, 4])}, "runs from 0 to 4"),
        (lambda c: c | {"logit_softcap": -1.0}, "softcap"),
    ],
)
def test_refusals(change, match):
    case = kl_case((6, 257, 8, None), torch.float32, 0.1)
    with pytest.raises(ValueError, match=match):
        sequence_kl(**change(case))


def test_no_gradient_work_without_a_gradient(monkeypatch):
    asked = []
    original = divergence.forward
    monkeypatch.setattr(divergence, "forward", lambda *a: asked.append(a[6]) or original(*a))
    case = kl_case((5, 257, 8, None), torch.float32, 1.0)
    case["hidden_states"].requires_grad_()
    sequence_kl(**case)
    with torch.no_grad():
        sequence_kl(**case)
    assert asked == [True, False]
