"""Three responses that share their prompt give what three separate rows give; where not, it is noticed."""

import copy
import inspect

import pytest
import torch
from datasets import Dataset
from helpers import (
    bapo_trainer,
    batch_of,
    fresh_lora,
    gradients,
    lora_model,
    randomize_lora,
    training_args,
)
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, make_model, make_rows, make_tokenizer
from torch.distributed.utils import _apply_to_tensors
from torch.overrides import TorchFunctionMode

from bapo_plugin import BAPOConfig, BAPOTrainer
from bapo_plugin.scoring import shared_prefix
from bapo_plugin.scoring.collator import PaddedCollator, SharedPrefixCollator, split_by_tokens
from bapo_plugin.scoring.forward import ResponseForward
from bapo_plugin.scoring.layouts import check_rows, refusal, self_check
from bapo_plugin.scoring.shared_prefix import Layout, Segment, install, uninstall

NAMES = ("chosen", "rejected", "base")
# more families than the rest of the tests need; what makes each of them small or special
MORE = {
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "olmo2": {},
    "cohere2": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "logit_scale": 0.5,
    },
    "gpt_oss": {
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "starcoder2": {"sliding_window": 8},
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": 0},
    "glm4": {"head_dim": 8, "pad_token_id": 0},
    "helium": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    # the window is in the mask alone, the attention isn't told
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "sliding_window": 8,
        "use_sliding_window": True,
        "max_window_layers": 0,
    },
    "phimoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "pad_token_id": 0,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
    },
}
REFUSED = {
    "mamba": {"state_size": 4},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "llama4_text": {
        "attention_chunk_size": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "head_dim": 8,
    },
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "recurrent_gemma": {"head_dim": 8, "lru_width": 32},
}


class AllDouble(TorchFunctionMode):
    """fp64 means fp64: norms and softmax of most families compute in fp32, whatever the model is in."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            return args[0].double()
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def _families(monkeypatch):
    for name, settings in {**MORE, **REFUSED}.items():
        monkeypatch.setitem(FAMILIES, name, settings)


def ragged(vocabulary=500):
    """Prompts longer than the window of 8, and one that is shorter."""
    g = torch.Generator().manual_seed(3)

    def ids(n):
        return torch.randint(3, vocabulary, (n,), generator=g).tolist()

    lengths = ((13, 5, 2, 11), (9, 1, 7, 3), (4, 6, 6, 1))
    keys = ("prompt_ids", *(f"{n}_ids" for n in NAMES))
    return [dict(zip(keys, map(ids, row), strict=True)) for row in lengths]


def double_model(family):
    model = make_model(family).double()
    if (
        hasattr(model, "_can_set_experts_implementation")
        and model._can_set_experts_implementation()
    ):
        model.set_experts_implementation("eager")  # grouped_mm has no fp64
    if family == "gemma2":
        model.set_attn_implementation("eager")  # transformers' sdpa leaves its soft cap out
    return model


def with_lora(model, dtype=torch.float64):
    names = {
        name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    targets = sorted(
        names & {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "dense"}
    )
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    model = model.to(dtype)
    randomize_lora(model, std=0.05)
    return model


def separate_logps(model, rows):
    """log-probs of the rows' responses, one forward each, nothing shared, packed or padded."""
    found = []
    for name in NAMES:
        for row in rows:
            prompt, response = row["prompt_ids"], row[f"{name}_ids"]
            logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0]
            logits = logits[len(prompt) - 1 : -1]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            logps = torch.log_softmax(logits, -1)
            found.append(logps.gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(found)


def shared_logps(model, rows, **layout):
    install(model)
    batch = SharedPrefixCollator()(rows)
    for key, value in layout.items():
        setattr(batch["layout"], key, value)
    return ResponseForward(log=print)(model, model, batch).logps


WEIGHTS = torch.linspace(-1, 1, 9, dtype=torch.float64)


def backward(model, logps):
    (logps * WEIGHTS.to(logps.dtype)).sum().backward()
    found = gradients(model)
    model.zero_grad()
    assert found and max(g.abs().max() for g in found.values()) > 1e-4
    return found


@pytest.mark.parametrize("family", sorted({*FAMILIES, *MORE}))
def test_log_probs_and_gradients_are_those_of_separate_rows(family):
    with AllDouble():
        same_as_separate_rows(family)


def same_as_separate_rows(family):
    rows = ragged()
    model = with_lora(double_model(family))
    assert refusal(model) is None
    expected = separate_logps(model, rows)
    expected_gradients = backward(model, expected)
    found = shared_logps(model, rows)
    found_gradients = backward(model, found)
    tolerance = 1e-9
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=tolerance, atol=tolerance)

    # against the same attention without sharing, and with one dense mask
    dense = shared_logps(model, rows, dense=True)
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-9)
    alone = []
    for name in NAMES:
        for row in rows:
            ids = row["prompt_ids"] + row[f"{name}_ids"]
            start = len(row["prompt_ids"])
            batch = {
                "input_ids": torch.tensor([ids]),
                "position_ids": torch.arange(len(ids))[None],
                "response_index": torch.arange(start - 1, len(ids) - 1),
                "response_labels": torch.tensor(row[f"{name}_ids"]),
                "cu_seqlens": torch.tensor([0, len(ids) - start]),
                "layout": Layout((Segment(0, len(ids), 0, 0),)),
            }
            alone.append(ResponseForward(log=print)(model, model, batch).logps[0])
    torch.testing.assert_close(found, torch.stack(alone), rtol=0, atol=1e-9)
    # calls without a layout are the model's own, padded ones too
    torch.testing.assert_close(separate_logps(model, rows), expected, rtol=0, atol=1e-12)
    uninstall(model)
    torch.testing.assert_close(separate_logps(model, rows), expected, rtol=0, atol=1e-12)


def test_the_layout_survives_fsdp2_with_mixed_precision():
    """FSDP 2 casts the inputs of each layer this way. A copy would lose its calls, so that the check fails, and its cache."""
    layout = Layout((Segment(0, 3, 0, 0),))
    cast = _apply_to_tensors(lambda tensor: tensor.bfloat16(), {"bapo_layout": layout})
    assert cast["bapo_layout"] is layout


@pytest.mark.parametrize("family", sorted({*FAMILIES, *MORE}))
def test_fp32_within_rounding(family):
    rows = ragged()
    model = with_lora(make_model(family), torch.float32)
    with torch.no_grad():
        expected, found = separate_logps(model, rows), shared_logps(model, rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def check(model):
    forward = ResponseForward(log=print)

    def run(rows, shared):
        batch = (SharedPrefixCollator() if shared else PaddedCollator(0))(rows)
        with torch.no_grad():
            logps = forward(model, model, batch).logps
        return logps, batch["layout"].calls if shared else 0

    config = model.config.get_text_config()
    dtype = next(model.parameters()).dtype
    return self_check(
        run, check_rows(config, 512), config.num_hidden_layers, config.vocab_size, dtype
    )


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "gemma3_text", "gpt_oss", "qwen3_moe", "phi3"]
)
def test_self_check_accepts(family):
    model = make_model(family)
    install(model)
    assert check(model) is None
    model = make_model(family).bfloat16()
    install(model)
    assert check(model) is None


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_families_that_would_break_are_refused(family):
    model = make_model(family)
    reason = refusal(model)
    assert reason and type(model).__name__ in reason


def test_an_adapter_that_looks_for_tokens_in_a_row_is_refused():
    model = lora_model("llama", alora_invocation_tokens=[5, 6], target_modules=["q_proj"])
    assert "aLoRA" in refusal(model) and refusal(lora_model("llama")) is None


def test_a_mask_of_the_models_own_is_found(monkeypatch):
    """Doge's mask depends on the values; another one comes as a tensor."""
    monkeypatch.setitem(FAMILIES, "doge", {"keep_window_size": 16, "pad_token_id": 0})
    model = make_model("doge")
    install(model)
    with pytest.raises(AttributeError, match="AskedMask"):
        check(model)
    model = make_model("mistral")
    install(model)
    attention = model.model.layers[1].self_attn
    forward = attention.forward
    own = {"attention_mask": torch.zeros(1)}
    attention.forward = lambda *a, **k: forward(*a, **(k | own if "bapo_layout" in k else k))
    with pytest.raises(RuntimeError, match="MistralAttention brings a mask of its own"):
        check(model)
    attention.forward = forward
    assert check(model) is None
    model = make_model("gemma3_text")
    install(model)
    model.model.layers[0].self_attn.sliding_window = 5  # not that of the mask
    with pytest.raises(RuntimeError, match="has a window of 5, its mask one of 8"):
        check(model)


def test_the_check_goes_beyond_every_window():
    config = make_model("mistral", sliding_window=200).config
    longest = [max(len(row["prompt_ids"]) for row in check_rows(config, n)) for n in (512, 100)]
    assert longest == [208, 72]


def test_rotary_positions_that_depend_on_the_row_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "dynamic rotary" in refusal(make_model("llama", rope_parameters=rope))


def leaky(original):
    def mask(self, segment, window, device):
        seen = original(self, segment, window, device).clone()
        seen[:, -1] = True  # the future
        return seen

    return mask


def test_self_check_notices_what_would_go_wrong_silently(monkeypatch):
    """Faults planted one at a time, in ways that give plausible numbers."""
    model = make_model("mistral")  # window 8
    install(model)
    assert check(model) is None
    original = Layout.mask
    collate = SharedPrefixCollator.__call__

    def another_segment(self, rows):
        batch = collate(self, rows)
        a, b, c, *rest = batch["layout"].segments
        # base sees rejected in place of the end of its prompt
        batch["layout"].segments = (
            a,
            b,
            c._replace(prompt_start=b.start - 4, prompt_end=b.end),
            *rest,
        )
        return batch

    def going_on(self, rows):
        batch = collate(self, rows)
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        return batch

    for target, name, fault in (
        (Layout, "mask", leaky(original)),
        (Layout, "mask", lambda self, s, w, d: original(self, s, w and w + 1, d)),
        (Layout, "mask", lambda self, s, w, d: original(self, s, None, d)),
        (SharedPrefixCollator, "__call__", another_segment),
        (SharedPrefixCollator, "__call__", going_on),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fault)
            assert check(model), f"not noticed: {name} {fault}"

    # a layer that computes without the layout, and a row handed over as if it were a plain one
    rows = ragged()
    batch = SharedPrefixCollator()(rows)
    plain = {k: v for k, v in batch.items() if k != "layout"}
    wrong = ResponseForward(log=print)(model, model, plain).logps
    assert (wrong - shared_logps(model, rows)).abs().max() > 1
    attention = model.model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda *a, **k: forward(
        *a, **{x: y for x, y in k.items() if x != "bapo_layout"}
    )
    with pytest.raises(RuntimeError, match="lost the layout"):
        check(model)


def test_a_packed_row_needs_an_attention_that_understands_it():
    model = make_model("llama")
    with pytest.raises(RuntimeError, match=r"can't read a packed row: install\(\)"):
        ResponseForward(log=print)(model, model, SharedPrefixCollator()(ragged()))


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, window):
    """Variable-length attention as it is documented: causal and bottom-right aligned, left window."""
    outs = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        assert b - a <= max_q and d - c <= max_k
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale
        distance = torch.arange(d - c) - (torch.arange(b - a) + (d - c) - (b - a))[:, None]
        seen = distance <= 0
        if window >= 0:
            seen &= distance >= -window
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v[c:d]))
    return torch.cat(outs)


def varlen_2_12(q, k, v, *lengths, scale, window_size, enable_gqa):
    assert enable_gqa and window_size[1] == 0
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return varlen(q, k, v, *lengths, scale, window_size[0])


def varlen_2_11(q, k, v, *lengths, scale, window_size):
    assert window_size[1] == 0 and k.shape[1] == q.shape[1]
    return varlen(q, k, v, *lengths, scale, window_size[0])


def varlen_2_10(q, k, v, *lengths, is_causal):
    assert is_causal and k.shape[1] == q.shape[1]
    return varlen(q, k, v, *lengths, q.shape[-1] ** -0.5, -1)


@pytest.mark.parametrize("stand_in", [varlen_2_10, varlen_2_11, varlen_2_12])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_variable_length_attention_gets_the_right_pieces(family, stand_in, monkeypatch):
    """The way to flash attention on a GPU, with a stand-in for the kernel of each torch."""
    options = frozenset(inspect.signature(stand_in).parameters)
    model = with_lora(double_model(family))
    rows = ragged()
    expected = shared_logps(model, rows)
    expected_gradients = backward(model, expected)
    calls = []
    monkeypatch.setattr(
        shared_prefix, "_has_varlen", lambda q, v, w: w is None or "window_size" in options
    )
    monkeypatch.setattr(
        shared_prefix, "VARLEN", lambda *a, **k: calls.append(1) or stand_in(*a, **k)
    )
    monkeypatch.setattr(shared_prefix, "_VARLEN_OPTIONS", options)
    found = shared_logps(model, rows)
    assert calls or (family, stand_in) == ("mistral", varlen_2_10)  # windows on every layer
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    for name, gradient in backward(model, found).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- in the trainer


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_the_trainers_gradients_are_those_of_the_padded_layout(tmp_path, checkpointing):
    found = {}
    for mode in ("off", "require"):
        model = lora_model("qwen2")
        randomize_lora(model, std=0.1)
        trainer = bapo_trainer(
            tmp_path,
            model,
            make_rows(7),
            bapo={"shared_prefix": mode, "anchor_weight": 1.0, "reference": "base"},
            gradient_checkpointing=checkpointing is not None,
            gradient_checkpointing_kwargs=checkpointing,
        )
        expected = SharedPrefixCollator if mode == "require" else PaddedCollator
        assert type(trainer.data_collator) is expected
        if checkpointing:
            trainer.model.gradient_checkpointing_enable(checkpointing)
            trainer.model.enable_input_require_grads()
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch_of(trainer))
        loss.backward()
        found[mode] = loss.detach(), gradients(trainer.model)
    torch.testing.assert_close(found["off"][0], found["require"][0], rtol=1e-5, atol=1e-5)
    for name, gradient in found["off"][1].items():
        torch.testing.assert_close(found["require"][1][name], gradient, rtol=1e-3, atol=1e-5)


def test_training_and_evaluation_in_both_layouts(tmp_path):
    logs = {}
    for mode in ("off", "require"):
        trainer = bapo_trainer(
            tmp_path / mode,
            lora_model(),
            make_rows(10),
            bapo={"shared_prefix": mode, "anchor_loss": "squared"},
            eval_rows=make_rows(5, seed=2),
            eval_strategy="epoch",
        )
        trainer.train()
        logs[mode] = trainer.state.log_history
    for padded, shared in zip(logs["off"], logs["require"], strict=True):
        for key in ("loss", "drift/base", "grad_norm", "eval_loss", "eval_drift/chosen"):
            assert padded.get(key) == pytest.approx(shared.get(key), abs=5e-4), key
    first = logs["require"][0]
    assert 0 < first["sharing"] < 0.67 and first["packing"] == 1 and first["tokens/s"] > 0
    padded = logs["off"][0]
    assert padded["sharing"] == 0 and 0 < padded["packing"] < 1


def test_a_token_budget_changes_nothing_but_the_passes(tmp_path, monkeypatch):
    """The same losses, gradients and evaluation, in several passes of at most so many tokens."""
    rows = make_rows(12)
    widths, forward = [], ResponseForward.__call__

    def counted(self, model, unwrapped, batch, **kwargs):
        widths.append(batch["input_ids"].shape[1])
        return forward(self, model, unwrapped, batch, **kwargs)

    logs, weights = {}, {}
    for budget in (None, 90):
        trainer = bapo_trainer(
            tmp_path / str(budget),
            lora_model(),
            rows,
            bapo={"tokens_per_batch": budget, "anchor_loss": "squared", "anchor_weight": 1.0},
            eval_rows=make_rows(7, seed=2),
            eval_strategy="epoch",
            per_device_train_batch_size=3,
            per_device_eval_batch_size=4,
            gradient_accumulation_steps=2,
        )
        trainer.get_train_dataloader()
        with monkeypatch.context() as patch:
            patch.setattr(ResponseForward, "__call__", counted)
            trainer.train()
        logs[budget] = trainer.state.log_history
        weights[budget] = {
            n: p.detach() for n, p in trainer.model.named_parameters() if "lora" in n
        }
        if budget is None:
            assert max(widths) > 90
        else:
            longest = max(
                sum(len(v) for k, v in r.items() if k.endswith("_ids"))
                for r in trainer.train_dataset
            )
            assert max(widths) <= max(90, longest) and len(widths) > 6
        widths.clear()
    for one, several in zip(logs[None], logs[90], strict=True):
        for key in ("loss", "grad_norm", "drift/base", "eval_loss", "eval_drift/base", "sharing"):
            assert one.get(key) == pytest.approx(several.get(key), abs=2e-4), key
    for name, value in weights[None].items():
        torch.testing.assert_close(weights[90][name], value, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="needs a shared prefix, but bapo.shared_prefix is off"):
        bapo_trainer(tmp_path, bapo={"shared_prefix": "off", "tokens_per_batch": 9})


def test_packs_are_full(tmp_path):
    rows = [
        {"prompt_ids": [1] * n, "chosen_ids": [2], "rejected_ids": [3], "base_ids": [4]}
        for n in (50, 7, 27, 37, 17, 60, 3)
    ]
    packs = split_by_tokens(rows, 64)
    sizes = [sum(len(rows[i]["prompt_ids"]) + 3 for i in pack) for pack in packs]
    assert sorted(i for pack in packs for i in pack) == list(range(len(rows)))
    assert max(sizes) <= 64 and len(packs) == 4


def test_the_log_says_what_it_saves(tmp_path, caplog):
    trainer = bapo_trainer(tmp_path, rows=make_rows(6))
    trainer.get_train_dataloader()
    rows = [trainer.train_dataset[i] for i in range(4)]
    shared = sum(len(ids) for row in rows for name, ids in row.items() if name.endswith("_ids"))
    padded = PaddedCollator(0)(rows)["input_ids"].numel()
    assert f"shared prefix: {shared} tokens instead of {padded} for the first 4 rows" in caplog.text


def test_moe_router_loss_and_bare_off_take_the_padded_layout(tmp_path, caplog):
    trainer = bapo_trainer(
        tmp_path, lora_model("mixtral", target_modules=["q_proj"]), router_aux_loss_coef=0.0
    )
    assert type(trainer.data_collator) is SharedPrefixCollator  # without its auxiliary loss
    model = lora_model("mixtral", target_modules=["q_proj"])
    trainer = bapo_trainer(tmp_path, model)
    assert type(trainer.data_collator) is PaddedCollator and "auxiliary loss" in caplog.text
    assert BAPOConfig(shared_prefix=False).shared_prefix == "off"


def test_require_is_an_error_where_it_cannot_be(tmp_path):
    def model():
        made = lora_model("llama", target_modules=["q_proj"])
        made.get_base_model().config.layer_types = ["full_attention", "linear_attention"]
        return made

    with pytest.raises(
        ValueError, match=r"shared_prefix: require, but .*linear_attention.*set bapo"
    ):
        bapo_trainer(tmp_path, model(), bapo={"shared_prefix": "require"})
    trainer = bapo_trainer(tmp_path, model())
    assert type(trainer.data_collator) is PaddedCollator


def test_lora_dropout_and_padding_to_a_multiple(tmp_path):
    trainer = bapo_trainer(
        tmp_path, lora_model(lora_dropout=0.3), make_rows(8), bapo={"shared_prefix": "require"}
    )
    trainer.train()
    model = lora_model()
    randomize_lora(model, std=0.1)
    rows = ragged(len(make_tokenizer()))
    install(model)
    for multiple in (None, 8, 64):
        batch = SharedPrefixCollator(pad_to_multiple_of=multiple)(rows)
        assert multiple is None or batch["input_ids"].shape[1] % multiple == 0
        logps = ResponseForward(log=print)(model, model, batch).logps
        if multiple is None:
            expected = logps
        torch.testing.assert_close(logps, expected, rtol=0, atol=1e-4)


def test_a_reference_model_of_its_own_shares_too(tmp_path):
    vocabulary = len(make_tokenizer())
    trainer = BAPOTrainer(
        make_model("qwen2", vocab_size=vocabulary),
        make_model("qwen2", vocab_size=vocabulary, seed=4),
        args=training_args(tmp_path),
        train_dataset=Dataset.from_list(make_rows(4)),
        processing_class=make_tokenizer(),
        bapo=BAPOConfig(shared_prefix="require"),
    )
    batch = batch_of(trainer)
    expected = separate_logps(copy.deepcopy(trainer.ref_model), list(trainer.train_dataset))
    found = trainer.reference.live(trainer.model, trainer.model, batch).logps
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["fp32", "bf16", pytest.param("nf4", marks=pytest.mark.slow)])
def test_smollm2(smollm2, tmp_path, kind):
    """The real model: in fp32 the same numbers; in 16 and 4 bits within its rounding, and no worse
    than padding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"quantization_config": quantization} if kind == "nf4" else {}
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype, **options)
    trainer = BAPOTrainer(
        model,
        args=training_args(
            tmp_path,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        ),
        train_dataset=Dataset.from_list(make_rows(3)),
        processing_class=AutoTokenizer.from_pretrained(smollm2),
        peft_config=fresh_lora(),
        bapo=BAPOConfig(shared_prefix="require", precompute_ref_log_probs=False),
    )
    randomize_lora(trainer.model, std=0.02)
    rows = list(trainer.train_dataset)
    model = trainer.model
    results = {}
    for name, collator in (("shared", trainer.data_collator), ("padded", PaddedCollator(0))):
        model.train()
        model.zero_grad()
        logps = trainer.response_forward(model, model, collator(rows)).logps
        backward_of = (logps * torch.linspace(-1, 1, 9)).sum()
        backward_of.backward()
        results[name] = logps.detach(), gradients(model)
    model.eval()
    with torch.no_grad():
        expected = separate_logps(model, rows)
    errors = {name: (logps - expected).abs().max().item() for name, (logps, _) in results.items()}
    limit = {"fp32": 2e-3, "nf4": 2e-3, "bf16": 1.0}[kind]
    assert errors["shared"] < limit, errors
    dot = sum(
        (results["shared"][1][n].double() * g.double()).sum()
        for n, g in results["padded"][1].items()
    )
    norms = [
        float(sum(g.double().square().sum() for g in found[1].values())) ** 0.5
        for found in (results["shared"], results["padded"])
    ]
    assert dot / (norms[0] * norms[1]) > (0.99 if kind == "bf16" else 1 - 1e-4)
    assert norms[0] == pytest.approx(norms[1], rel=0.05 if kind == "bf16" else 1e-3)
