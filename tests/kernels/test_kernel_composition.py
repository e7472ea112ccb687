"""Inside other machinery: autocast, checkpointing, torch.compile, no_grad, strange strides."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import make_case
from torch.utils.checkpoint import checkpoint

from bapo_kernels import chunked, sequence_logprobs, torch_tiles


@pytest.fixture
def case():
    return make_case(37, 1003, 17, [0, 5, 15, 17, 0], bias=True)


def run(case, function=lambda h: h, **options):
    """(sums, gradient) through a caller that does something of its own around the op."""
    leaf = case["hidden_states"].clone().requires_grad_()
    result = function(leaf)
    sums = result if result is not leaf else sequence_logprobs(**case, **options).sum
    return sums.detach(), torch.autograd.grad((sums * sums).sum(), leaf)[0]


def caller(case):
    rest = {k: v for k, v in case.items() if k != "hidden_states"}
    return lambda hidden: sequence_logprobs(torch.tanh(hidden) * 3, **rest, return_entropy=True).sum


def assert_same_bits(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def test_reruns_are_equal_to_the_bit(case):
    assert_same_bits(run(case, caller(case)), run(case, caller(case)))


def test_autocast_changes_nothing(case):
    plain = run(case, caller(case))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(case, caller(case))
    assert inside[0].dtype == torch.float32
    assert_same_bits(plain, inside)


def test_autocast_casts_hidden_states_to_the_heads_dtype(case):
    low = case["hidden_states"].bfloat16()
    expected = sequence_logprobs(**{**case, "hidden_states": low.float()}).sum
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sequence_logprobs(**{**case, "hidden_states": low}).sum, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(case, reentrant):
    def wrapped(h):
        return checkpoint(caller(case), h, use_reentrant=reentrant)

    leaf = case["hidden_states"].clone().requires_grad_()
    sums = wrapped(leaf)
    (sums * sums).sum().backward()
    assert_same_bits(run(case, caller(case)), (sums.detach(), leaf.grad))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(case, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(caller(case), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_same_bits(run(case, caller(case)), run(case, compiled))


def test_compiles_with_a_trainable_head(case):
    torch._dynamo.reset()
    rest = {k: v for k, v in case.items() if k not in ("hidden_states", "lm_head_weight")}

    def function(hidden, weight):
        return sequence_logprobs(hidden, weight, **rest).sum

    leaves = [case[n].requires_grad_() for n in ("hidden_states", "lm_head_weight")]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    assert_same_bits(expected, torch.autograd.grad(compiled(*leaves).sum(), leaves))


def test_custom_op_registration_is_sound(case):
    args = [case[n] for n in ("hidden_states", "lm_head_weight", "bias", "labels", "cu_seqlens")]
    args[0].requires_grad_()
    torch.library.opcheck(
        torch.ops.bapo_kernels.sequence_logprobs.default,
        (*args, 0.5, 5.0, "torch", True, True, 0),
    )


@pytest.mark.parametrize("wanted", [True, False])
def test_gradient_work_is_skipped_where_nobody_asks(case, monkeypatch, wanted):
    asked = []
    original = torch_tiles.forward

    def spy(*args):
        asked.append(args[6])  # need_unit
        return original(*args)

    monkeypatch.setattr(torch_tiles, "forward", spy)
    case["hidden_states"].requires_grad_(wanted)
    result = sequence_logprobs(**case)
    with torch.no_grad():
        sequence_logprobs(**case)
    assert asked == [wanted, False]
    assert result.sum.requires_grad is wanted


def test_only_sums_carry_a_gradient(case):
    case["hidden_states"].requires_grad_()
    result = sequence_logprobs(**case, return_entropy=True)
    assert result.sum.requires_grad
    assert not result.token_logps.requires_grad and not result.entropy.requires_grad


def test_gradient_of_one_sequence_leaves_the_others_alone(case):
    case["hidden_states"].requires_grad_()
    sequence_logprobs(**case).sum[2].backward()
    rows = case["hidden_states"].grad.abs().amax(1)
    assert (rows[5:20] > 0).all() and rows[:5].sum() == 0 and rows[20:].sum() == 0


def test_backward_twice_over_one_graph(case):
    case["hidden_states"].requires_grad_()
    sums = sequence_logprobs(**case).sum
    first = torch.autograd.grad(sums.sum(), case["hidden_states"], retain_graph=True)[0]
    second = torch.autograd.grad(sums.sum(), case["hidden_states"])[0]
    assert torch.equal(first, second)


def test_double_backward_is_refused(case):
    case["hidden_states"].requires_grad_()
    sums = sequence_logprobs(**case).sum
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(sums.sum(), case["hidden_states"], create_graph=True)


def test_non_contiguous_inputs(case):
    expected = sequence_logprobs(**case).sum
    strided = dict(case)
    for name in ("hidden_states", "lm_head_weight"):
        strided[name] = case[name].t().contiguous().t()
    for name in ("labels", "bias", "cu_seqlens"):
        strided[name] = case[name].repeat_interleave(2)[::2]
    assert not any(t.is_contiguous() for t in strided.values())
    strided["hidden_states"].requires_grad_()
    sums = sequence_logprobs(**strided).sum
    torch.testing.assert_close(sums, expected, atol=1e-4, rtol=0)
    sums.sum().backward()
    assert strided["hidden_states"].grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_and_offsets_of_any_integer_type(case, dtype):
    case["labels"] = case["labels"] % 100
    expected = sequence_logprobs(**case).sum
    for name in ("labels", "cu_seqlens"):
        assert torch.equal(sequence_logprobs(**{**case, name: case[name].to(dtype)}).sum, expected)


@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 0, 0]])
@pytest.mark.parametrize("trainable_head", [False, True])
def test_no_tokens_at_all(offsets, trainable_head):
    hidden = torch.empty(0, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=trainable_head)
    labels = torch.empty(0, dtype=torch.int64)
    result = sequence_logprobs(hidden, weight, labels, torch.tensor(offsets), return_entropy=True)
    assert result.sum.tolist() == [0.0] * (len(offsets) - 1)
    result.sum.sum().backward()
    assert hidden.grad.shape == (0, 8)
    if trainable_head:
        assert weight.grad.shape == (50, 8) and weight.grad.abs().sum() == 0


def test_labels_poison_where_values_cannot_be_checked(case, monkeypatch):
    """On CUDA the host doesn't read values: wrong ones must give NaN, never a plausible number."""
    monkeypatch.setattr(chunked, "_check_values", lambda *_: None)
    bad = case["labels"].clone()
    bad[7] = 1003
    result = sequence_logprobs(**{**case, "labels": bad})
    assert result.token_logps.isnan().nonzero().tolist() == [[7]]
    assert result.sum.isnan().tolist() == [False, False, True, False, False]
    for offsets in ([0, 5, 36], [1, 5, 37], [0, 20, 5, 37], [0, 50, 37], [0, 5, 99]):
        sums = sequence_logprobs(**{**case, "cu_seqlens": torch.tensor(offsets)}).sum
        assert sums.isnan().all(), offsets


def test_import_is_light():
    """No Triton, nothing but torch and the standard library, and it works without Triton."""
    code = (
        "import sys, torch; before = set(sys.modules); sys.modules['triton'] = None;"
        "import bapo_kernels;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names);"
        "assert new <= {'bapo_kernels', 'torch', 'triton'}, new;"
        "h = torch.randn(3, 4); y = torch.tensor([0, 1, 2]);"
        "r = bapo_kernels.sequence_logprobs(h, torch.randn(9, 4), y, torch.tensor([0, 3]));"
        "print(bapo_kernels.__all__, float(r.sum))"
    )
    path = str(Path(torch_tiles.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "['SequenceKL', 'SequenceLogps', 'sequence_kl', 'sequence_logprobs']" in result.stdout
