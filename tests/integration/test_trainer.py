"""What the trainer must hold: DPO at weight zero, accumulation, resuming, metrics, the anchor's pull."""

import json
import math

import pytest
import torch
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from datasets import Dataset
from helpers import (
    bapo_trainer,
    batch_of,
    drifted,
    fresh_lora,
    gradients,
    lora_model,
    randomize_lora,
    training_args,
)
from peft import LoraConfig, PeftModel
from tiny import make_model, make_rows, make_tokenizer
from trl import DPOTrainer

from bapo_plugin import BAPOConfig, BAPOTrainer
from bapo_plugin.scoring.shared_prefix import install


def trl_trainer(tmp_path, model, rows, cls=DPOTrainer, **changes):
    return cls(
        model,
        args=training_args(tmp_path / "trl", **changes),
        train_dataset=Dataset.from_list([{k: r[k] for k in r if k != "base"} for r in rows]),
        processing_class=make_tokenizer(),
    )


@pytest.mark.parametrize(
    ("loss", "smoothing"),
    [
        (["sigmoid"], 0.0),
        (["hinge"], 0.0),
        (["ipo"], 0.0),
        (["sigmoid_norm"], 0.0),
        (["robust"], 0.1),
        (["exo_pair"], 0.1),
        (["sigmoid", "hinge"], 0.0),
    ],
)
def test_weight_zero_is_trls_dpo(tmp_path, loss, smoothing):
    """Same tokens, loss and LoRA gradients as trl.DPOTrainer, fp32, to 1e-5."""
    rows = make_rows(6)
    options = {"loss_type": loss, "label_smoothing": smoothing, "beta": 0.3}
    theirs = drifted(trl_trainer(tmp_path, lora_model(), rows, **options))
    ours = drifted(bapo_trainer(tmp_path, lora_model(), rows, bapo={"anchor_weight": 0}, **options))
    # both keep a copy of the given adapter as the reference: make it the same, untrained one
    mine, true = batch_of(ours), batch_of(theirs)
    for i in range(6):
        for key in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert ours.train_dataset[i][key] == theirs.train_dataset[i][key]

    loss_true = theirs.compute_loss(theirs.model, true)
    loss_mine = ours.compute_loss(ours.model, mine)
    assert loss_mine.item() == pytest.approx(loss_true.item(), abs=1e-5)
    loss_true.backward()
    loss_mine.backward()
    expected, found = gradients(theirs.model), gradients(ours.model)
    assert expected.keys() == found.keys() and len(found) > 10
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert max(g.abs().max() for g in found.values()) > 1e-3


def test_weight_zero_trains_as_axolotls_dpo(tmp_path):
    """Three optimiser steps: the losses of every step agree."""
    rows = make_rows(12)
    theirs = trl_trainer(tmp_path, lora_model(), rows, cls=AxolotlDPOTrainer)
    # in each step as TRL does it: rounding would decide which of two equal rewards is higher
    bapo = {"anchor_weight": 0, "precompute_ref_log_probs": False}
    ours = bapo_trainer(tmp_path, lora_model(), rows, bapo=bapo)
    theirs.train()
    ours.train()
    for key in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
        expected, found = (
            [log[key] for log in trainer.state.log_history if key in log]
            for trainer in (theirs, ours)
        )
        assert len(found) == 3 and found == pytest.approx(expected, abs=2e-4), key


def test_full_fine_tuning_with_a_reference_model(tmp_path):
    rows = make_rows(4)
    vocabulary = len(make_tokenizer())

    def trainer(cls, data, **kwargs):
        return cls(
            make_model("qwen2", vocab_size=vocabulary, seed=1),
            make_model("qwen2", vocab_size=vocabulary, seed=2),
            args=training_args(tmp_path / cls.__name__),
            train_dataset=Dataset.from_list(data),
            processing_class=make_tokenizer(),
            **kwargs,
        )

    theirs = trainer(AxolotlDPOTrainer, [{k: r[k] for k in r if k != "base"} for r in rows])
    ours = trainer(BAPOTrainer, rows, bapo=BAPOConfig(anchor_weight=0))
    losses = [t.compute_loss(t.model.train(), batch_of(t)) for t in (theirs, ours)]
    assert losses[1].item() == pytest.approx(losses[0].item(), abs=1e-4)
    for loss in losses:
        loss.backward()
    expected, found = gradients(theirs.model), gradients(ours.model)
    assert "lm_head.weight" in found
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_continued_adapter_is_its_own_reference(tmp_path):
    model = lora_model()
    randomize_lora(model, std=0.1)
    trainer = bapo_trainer(tmp_path, model)
    trainer.compute_loss(trainer.model.train(), batch_of(trainer))
    metrics = trainer.row_metrics.take("train")
    assert metrics["drift/base"] == pytest.approx(0, abs=1e-5), "the reference is the given adapter"
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_reference_base_measures_a_given_adapter_against_the_model_without(tmp_path):
    model = lora_model()
    randomize_lora(model, std=0.1)
    trainer = bapo_trainer(tmp_path, model, bapo={"reference": "base"})
    batch = batch_of(trainer)
    reference = trainer.reference.live(trainer.model, trainer.model, batch).logps
    base = make_model(vocab_size=len(make_tokenizer()))
    install(base)
    torch.testing.assert_close(
        reference, trainer.response_forward(base, base, batch).logps.detach()
    )
    assert "ref" not in trainer.model.peft_config


def test_anchor_is_silent_at_the_start_and_pulls_back_after_drift(tmp_path):
    """At the start BAPO's gradient is DPO's; away from it the anchor's gradient raises log π(y_b)."""
    found = {}
    for weight in (0.0, 5.0):
        trainer = bapo_trainer(tmp_path, bapo={"anchor_weight": weight})
        trainer.compute_loss(trainer.model.train(), batch_of(trainer)).backward()
        found[weight] = gradients(trainer.model)
    for name in found[0.0]:
        assert torch.equal(found[0.0][name], found[5.0][name]), name

    trainer = drifted(bapo_trainer(tmp_path, bapo={"anchor_weight": 5.0}))
    batch = batch_of(trainer)
    with torch.no_grad():  # find a drift that lowers base responses
        trainer.compute_loss(trainer.model, batch)
    before = trainer.row_metrics.take("train")
    assert before["anchor/active"] > 0 and before["loss/anchor"] > 0
    optimizer = torch.optim.SGD([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        trainer.compute_loss(trainer.model, batch).backward()
        optimizer.step()
    trainer.row_metrics.take("train")
    with torch.no_grad():
        trainer.compute_loss(trainer.model, batch)
    assert trainer.row_metrics.take("train")["loss/anchor"] < 0.5 * before["loss/anchor"]


def run(tmp_path, rows, **changes):
    trainer = bapo_trainer(tmp_path, rows=rows, bapo={"anchor_weight": 1.0}, **changes)
    torch.manual_seed(0)
    randomize_lora(trainer.model)
    trainer.starts_equal = False
    trainer.train()
    return trainer


def logged(trainer, key="loss"):
    return [log[key] for log in trainer.state.log_history if key in log]


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("rows", [8, 7])  # with 7 the last micro-batch is smaller than the others
def test_one_batch_is_accumulated_micro_batches(tmp_path, rows):
    data = make_rows(rows)
    whole = run(tmp_path, data, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    micro = run(tmp_path, data, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    uneven = run(tmp_path, data, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    for other in (micro, uneven):
        for key in (
            "loss",
            "loss/anchor",
            "loss/preference",
            "drift/base",
            "rewards/accuracies",
            "grad_norm",
        ):
            assert logged(other, key) == pytest.approx(logged(whole, key), abs=2e-5), key
        for name, value in weights(whole).items():
            torch.testing.assert_close(weights(other)[name], value, rtol=1e-3, atol=2e-4)


def test_metrics_are_means_over_rows(tmp_path):
    """Batches of 4 and 3: every metric equals the mean over the 7 rows taken one by one."""
    trainer = drifted(bapo_trainer(tmp_path, rows=make_rows(7), bapo={"anchor_weight": 0.5}))
    trainer.model.eval()

    def measure(indices):
        trainer.prediction_step(trainer.model, batch_of(trainer, indices), True)

    for indices in ([0, 1, 2, 3], [4, 5, 6]):
        measure(indices)
    together = trainer.row_metrics.take("eval")
    single = []
    for i in range(7):
        measure([i])
        single.append(trainer.row_metrics.take("eval"))
    assert len(together) == 15
    for key, value in together.items():
        assert value == pytest.approx(sum(s[key] for s in single) / 7, abs=1e-4), key
    assert together["loss"] == pytest.approx(
        together["loss/preference"] + together["loss/anchor"], abs=1e-6
    )
    assert together["rewards/chosen"] == pytest.approx(0.1 * together["drift/chosen"], abs=1e-6)


def test_evaluation_is_weighted_by_rows_and_returned(tmp_path):
    rows = make_rows(7)
    trainer = bapo_trainer(tmp_path, rows=rows, eval_rows=rows, bapo={"anchor_weight": 0.5})
    randomize_lora(trainer.model, std=0.05)
    trainer.starts_equal = False
    metrics = {}
    for size in (7, 3, 1):
        trainer.args.per_device_eval_batch_size = size
        metrics[size] = trainer.evaluate()
    for key in ("eval_loss", "eval_loss/anchor", "eval_drift/base", "eval_rewards/accuracies"):
        assert metrics[3][key] == pytest.approx(metrics[7][key], abs=1e-4)
        assert metrics[1][key] == pytest.approx(metrics[7][key], abs=1e-4)
    other = trainer.evaluate(trainer.train_dataset, metric_key_prefix="train")
    assert other["train_loss"] == pytest.approx(metrics[1]["eval_loss"], abs=1e-5)
    assert not [key for key in other if key.startswith("eval_")]


def test_resumed_is_uninterrupted(tmp_path):
    rows = make_rows(24)
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "lr_scheduler_type": "cosine",
    }
    whole = bapo_trainer(tmp_path / "a", rows=rows, **options)
    whole.train()
    first = bapo_trainer(tmp_path / "b", rows=rows, **options)
    first.train()  # leaves checkpoint-3 and checkpoint-6
    resumed = bapo_trainer(tmp_path / "b", rows=rows, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b/out/checkpoint-3"))
    for key in ("loss", "loss/anchor", "drift/base", "grad_norm", "learning_rate"):
        assert len(logged(whole, key)) == 6
        assert logged(resumed, key) == pytest.approx(logged(whole, key), abs=1e-6), key
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": False}, {"use_reentrant": True}])
def test_gradient_checkpointing_changes_nothing(tmp_path, checkpointing):
    found = []
    for options in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": checkpointing},
    ):
        trainer = bapo_trainer(tmp_path, rows=make_rows(4), bapo={"anchor_weight": 1.0}, **options)
        randomize_lora(trainer.model, std=0.05)
        trainer.starts_equal = False
        trainer.train()
        found.append((logged(trainer), weights(trainer)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-4, atol=1e-6)


def test_moe_router_loss_is_added_as_trl_does(tmp_path):
    rows = make_rows(4)
    theirs = drifted(trl_trainer(tmp_path, lora_model("mixtral"), rows, router_aux_loss_coef=0.5))
    ours = drifted(
        bapo_trainer(
            tmp_path, lora_model("mixtral"), rows, {"anchor_weight": 0}, router_aux_loss_coef=0.5
        )
    )
    true, mine = batch_of(theirs), batch_of(ours)
    keep = slice(0, 8)  # TRL's batch has no base responses, which would route too
    for key in ("input_ids", "attention_mask"):
        mine[key] = mine[key][keep]
    mine["cu_seqlens"] = mine["cu_seqlens"][:9]
    del mine["base_token_seqlens"]
    tokens = mine["cu_seqlens"][-1]
    mine["response_index"], mine["response_labels"] = (
        mine[k][:tokens] for k in ("response_index", "response_labels")
    )
    aux_true = theirs.model(
        **{k: true[k] for k in ("input_ids", "attention_mask")}, output_router_logits=True
    )
    aux_mine = ours.response_forward(ours.model, ours.model, mine, output_router_logits=True)
    assert aux_mine.aux_loss.item() == pytest.approx(aux_true.aux_loss.item(), rel=1e-4)
    whole = ours.compute_loss(ours.model, batch_of(ours))
    metrics = ours.row_metrics.take("train")
    assert metrics["aux_loss"] > 0
    assert whole.item() == pytest.approx(
        metrics["loss/preference"] + 0.5 * metrics["aux_loss"], rel=1e-4
    )


def test_model_card_says_bapo_and_cites_the_paper(tmp_path):
    trainer = bapo_trainer(tmp_path)
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "out/README.md").read_text("utf-8")
    assert (
        "Base-Anchored Preference Optimization" in card
        and "2407.00693" in card
        and "lee2024bapo" in card
    )
    assert "- bapo" in card and "Direct Preference" not in card


def test_saved_adapter_loads_again(tmp_path):
    trainer = run(tmp_path, make_rows(8))
    trainer.save_model(str(tmp_path / "adapter"))
    base = make_model(vocab_size=len(make_tokenizer()))
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)
    args = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert args["peft_type"] == "LORA"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"loss_type": ["nca_pair"]}, "nca_pair.*possible are sigmoid"),
        ({"ld_alpha": 0.5}, "does not work with ld_alpha"),
        ({"f_divergence_type": "js_divergence"}, "does not work with f_divergence_type"),
        (
            {"precompute_ref_log_probs": True},
            r"TRL's own.*BAPOConfig\(precompute_ref_log_probs=True\)",
        ),
        ({"use_weighting": True}, "does not work with use_weighting"),
        ({"truncation_mode": "keep_end"}, "does not work with truncation_mode"),
        ({"restore_callback_states_from_checkpoint": True}, "does not work with restore_callback"),
    ],
)
def test_settings_of_trl_that_would_mean_another_loss_are_refused(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        bapo_trainer(tmp_path, **changes)


def test_an_adapter_that_trains_biases_of_the_model_is_refused(tmp_path):
    model = make_model("qwen2", vocab_size=len(make_tokenizer()))
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", bias="lora_only")
    with pytest.raises(ValueError, match="bias: 'lora_only' in the adapter 'default'.*bias='none'"):
        BAPOTrainer(
            model,
            args=training_args(tmp_path),
            train_dataset=Dataset.from_list(make_rows(4)),
            processing_class=make_tokenizer(),
            peft_config=lora,
            bapo=BAPOConfig(),
        )


def test_triton_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="bapo.kernel: triton needs an NVIDIA GPU.*set bapo.kernel: auto"
    ):
        bapo_trainer(tmp_path, bapo={"kernel": "triton"})
    assert bapo_trainer(tmp_path, bapo={"kernel": "torch"}).response_forward._backend == "torch"


def test_rows_without_base_are_refused(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "base"} for row in make_rows(3)]
    with pytest.raises(ValueError, match="train data set lacks the columns base"):
        bapo_trainer(tmp_path, rows=rows)
    rows = make_rows(3)
    rows[1]["rejected"] = rows[1]["chosen"]
    with pytest.raises(ValueError, match="row 2: chosen and rejected are identical"):
        bapo_trainer(tmp_path, rows=rows)


def test_fresh_adapter_reference_is_the_base_model(tmp_path):
    trainer = bapo_trainer(tmp_path)
    randomize_lora(trainer.model, std=0.2)
    trainer.starts_equal = False
    batch = batch_of(trainer)
    model = make_model(vocab_size=len(make_tokenizer()))
    install(model)
    base = trainer.response_forward(model, model, batch).logps
    reference = trainer.reference.live(trainer.model, trainer.model, batch).logps
    torch.testing.assert_close(reference, base.detach())
    assert (
        trainer.response_forward(trainer.model, trainer.model, batch).logps - base
    ).abs().max() > 0.05
    assert fresh_lora().r == 4


# ---------------------------------------------------------------- an adapter whose training goes on


def continued(tmp_path, steps, **changes):
    model = lora_model()
    randomize_lora(model, std=0.2)
    return bapo_trainer(
        tmp_path,
        model,
        rows=make_rows(16),
        save_strategy="steps",
        save_steps=2,
        max_steps=steps,
        **changes,
    )


def steps_of(trainer):
    return {e["step"]: e for e in trainer.state.log_history if "loss" in e}


def test_a_continued_adapter_resumes_with_what_it_had_learned(tmp_path):
    """transformers loads only adapters in subfolders, where there are any: the frozen copy "ref"."""
    whole = continued(tmp_path / "whole", 4)
    whole.train()
    first = continued(tmp_path / "parts", 2)
    first.train()
    assert (tmp_path / "parts/out/checkpoint-2/ref").is_dir(), "the trap"
    second = continued(tmp_path / "parts", 4)
    second.train(resume_from_checkpoint=str(tmp_path / "parts/out/checkpoint-2"))
    expected, found = steps_of(whole), steps_of(second)
    for step in (3, 4):
        for name in ("loss", "drift/chosen", "drift/base"):
            assert float(found[step][name]) == pytest.approx(float(expected[step][name]), abs=1e-5)
    assert abs(float(found[3]["drift/chosen"])) > 1e-2, "it starts from where it was"


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    trainer = continued(tmp_path, 2)
    trainer.train()
    path = tmp_path / "out/checkpoint-2/adapter_model.safetensors"
    weights = load_file(path)
    other = weights[next(iter(weights))].clone()
    save_file({**weights, "base_model.model.other.lora_A.weight": other}, path)
    with pytest.raises(
        ValueError, match="other.lora_A.weight is not what the model has after loading"
    ):
        continued(tmp_path, 4).train(resume_from_checkpoint=str(path.parent))


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [5, 6, 7, 8, 9]},
        },
    ],
    ids=["embedding", "tokens"],
)
def test_the_reference_copy_of_an_adapter_is_the_adapter(tmp_path, lora):
    """TRL's copy leaves out what LoRA adds to embeddings, and trained tokens."""
    model = lora_model(**lora)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    trainer = bapo_trainer(tmp_path, model, learning_rate=1e-12, max_steps=1)
    trainer.train()
    for name in ("chosen", "rejected", "base"):
        assert float(steps_of(trainer)[1][f"drift/{name}"]) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("precomputed", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "granite"])
def test_dropout_that_is_a_function_is_off_too(tmp_path, family, precomputed):
    """TRL's disable_dropout reaches nn.Dropout modules only; policy and reference would differ at random."""
    from peft import get_peft_model

    vocabulary = len(make_tokenizer())
    model = get_peft_model(
        make_model(family, vocab_size=vocabulary, attention_dropout=0.3), fresh_lora()
    )
    trainer = bapo_trainer(
        tmp_path, model, learning_rate=1e-12, bapo={"precompute_ref_log_probs": precomputed}
    )
    trainer.train()
    for entry in steps_of(trainer).values():
        assert float(entry["drift/base"]) == pytest.approx(0, abs=1e-4)
        assert float(entry["loss"]) == pytest.approx(0.6931, abs=1e-3)
