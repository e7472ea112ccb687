"""Every refusal, and that its message names what the caller has to look at."""

import pytest
import torch
from kernel_cases import make_case

from bapo_kernels import sequence_logprobs


@pytest.fixture
def case():
    return make_case(10, 50, 8, [4, 6])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_states": torch.zeros(10, 9)}, ["9 wide", "lm_head_weight 8"]),
        ({"hidden_states": torch.zeros(2, 5, 8)}, ["(2, 5, 8)", "(50, 8)"]),
        ({"lm_head_weight": torch.zeros(0)}, ["(10, 8)", "(0,)", "ungathered"]),
        ({"lm_head_weight": torch.zeros(0, 8)}, ["no rows"]),
        ({"lm_head_weight": torch.zeros(50, 8).half()}, ["float32", "float16"]),
        ({"labels": torch.zeros(9, dtype=torch.long)}, ["T = 10", "(9,)"]),
        ({"labels": torch.zeros(10, 1, dtype=torch.long)}, ["T = 10", "(10, 1)"]),
        ({"labels": torch.zeros(10)}, ["labels", "float32"]),
        ({"labels": torch.zeros(10, dtype=torch.bool)}, ["labels", "bool"]),
        ({"bias": torch.zeros(49)}, ["V = 50", "(49,)"]),
        ({"bias": torch.zeros(50, dtype=torch.long)}, ["bias", "int64"]),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.long)}, ["[S + 1]", "(0,)"]),
        ({"cu_seqlens": torch.tensor([0])}, ["no sequence", "10 tokens"]),
        ({"cu_seqlens": torch.tensor([0.0, 10.0])}, ["cu_seqlens", "float32"]),
        ({"cu_seqlens": torch.tensor([1, 10])}, ["10", "from 1 to 10"]),
        ({"cu_seqlens": torch.tensor([0, 9])}, ["10", "from 0 to 9"]),
        ({"cu_seqlens": torch.tensor([0, 6, 4, 10])}, ["cu_seqlens[1] = 6", "cu_seqlens[2] = 4"]),
        ({"hidden_states": torch.zeros(10, 8, device="meta")}, ["meta", "cpu"]),
        ({"backend": "cuda"}, ["auto, triton, torch", "'cuda'"]),
        ({"backend": "triton"}, ["triton", "cpu"]),
        ({"logit_softcap": 0.0}, ["logit_softcap", "0.0"]),
        ({"logit_softcap": -30.0}, ["logit_softcap", "-30.0"]),
        ({"logit_scale": float("nan")}, ["logit_scale", "nan"]),
        ({"chunk_bytes": 0}, ["chunk_bytes", "0"]),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_value_errors_name_both_sides(case, changes, words, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError) as error:
        sequence_logprobs(**{**case, **changes})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("value", [-100, -1, 50, 2**40])
def test_label_out_of_range_names_position_and_value(case, value):
    case["labels"][3] = value
    with pytest.raises(ValueError, match=rf"labels\[3\] = {value} .*\[0, 50\)"):
        sequence_logprobs(**case)


def test_quantised_storage_is_refused(case):
    class FourBit(torch.nn.Parameter):
        """What bitsandbytes' Params4bit looks like from here: packed bytes and a state."""

    packed = FourBit(torch.zeros(200, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match="FourBit in torch.uint8 storage.*bf16"):
        sequence_logprobs(**{**case, "lm_head_weight": packed})
    with pytest.raises(TypeError, match="int8"):
        sequence_logprobs(**{**case, "lm_head_weight": torch.zeros(50, 8, dtype=torch.int8)})
    packed = torch.zeros(50, 8)  # quant_storage may be a floating dtype
    packed.quant_state = object()
    with pytest.raises(TypeError, match="quantisation"):
        sequence_logprobs(**{**case, "lm_head_weight": packed})
    with pytest.raises(TypeError, match="float8"):
        low = torch.zeros(50, 8).to(torch.float8_e4m3fn)
        sequence_logprobs(**{**case, "lm_head_weight": low})


def test_wrapped_storage_is_refused(case):
    from torch.testing._internal.two_tensor import TwoTensor

    weight = TwoTensor(case["lm_head_weight"], case["lm_head_weight"])
    with pytest.raises(TypeError, match="TwoTensor.*Gather"):
        sequence_logprobs(**{**case, "lm_head_weight": weight})
