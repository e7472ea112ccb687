"""What could go wrong without a word in training: another reference, another weight, a number that is none."""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from axolotl.utils.collators.dpo import AxolotlDPODataCollatorWithPadding
from datasets import Dataset
from helpers import bapo_trainer, batch_of, fresh_lora, lora_model, randomize_lora, training_args
from safetensors.torch import load_file
from tiny import FAMILIES, make_model, make_rows, make_tokenizer

from bapo_plugin import BAPOConfig, BAPOTrainer
from bapo_plugin.scoring import forward as forward_module
from bapo_plugin.scoring.collator import ROW, SharedPrefixCollator
from bapo_plugin.scoring.forward import ResponseForward
from bapo_plugin.scoring.reference import weights_key
from bapo_plugin.scoring.shared_prefix import install, uninstall
from bapo_plugin.training import metrics
from bapo_plugin.training.checkpoints import whole_checkpoint
from bapo_plugin.training.refusals import adapter_to_evaluate
from bapo_plugin.training.retention import RetentionCallback

SCRIPT = Path(__file__).with_name("ddp_script.py")

# ---------------------------------------------------------------- policy and reference before step 1


@pytest.mark.parametrize("precompute", [True, False])
def test_a_policy_that_is_not_its_reference_is_an_error(tmp_path, precompute):
    trainer = bapo_trainer(
        tmp_path, rows=make_rows(6), bapo={"precompute_ref_log_probs": precompute}
    )
    randomize_lora(trainer.model, std=0.05)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    message = (
        r"row \d of the training rows: before the first step .*[+-]\d.* nats away from the ref"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters())


def test_dropout_that_stays_on_is_found(tmp_path):
    """A family may drop out in a way that nobody knows here."""
    trainer = bapo_trainer(tmp_path, rows=make_rows(6))
    layer = trainer.model.get_base_model().model.layers[0].mlp
    layer.register_forward_hook(
        lambda module, args, out: torch.dropout(out, 0.3, True) if module.training else out
    )
    with pytest.raises(ValueError, match="before the first step.*Dropout or noise that stays on"):
        trainer.train()


def test_log_probs_of_another_reference_are_found(tmp_path):
    trainer = bapo_trainer(tmp_path, rows=make_rows(6))
    trainer.get_train_dataloader()
    trainer.reference._known += 0.5
    with pytest.raises(ValueError, match=r"computed before training, is \+0.5 nats away .*remove"):
        trainer.train()


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 5, 6, 7, 8, 9]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
    ],
    ids=["embedding", "tokens", "head", "experts"],
)
def test_every_kind_of_adapter_goes_on_from_its_own_reference(tmp_path, monkeypatch, lora):
    small = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    monkeypatch.setitem(FAMILIES, "qwen3_moe", small)
    model = lora_model("qwen3_moe" if "target_parameters" in lora else "qwen2", **lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    trainer = bapo_trainer(tmp_path, model, make_rows(6))
    trainer.train()  # measures
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["drift/chosen"] == pytest.approx(0, abs=1e-3)


def test_the_reference_may_be_another_by_intention(tmp_path):
    vocabulary = len(make_tokenizer())
    other = BAPOTrainer(
        make_model("qwen2", vocab_size=vocabulary),
        make_model("qwen2", vocab_size=vocabulary, seed=4),
        args=training_args(tmp_path / "other"),
        train_dataset=Dataset.from_list(make_rows(4)),
        processing_class=make_tokenizer(),
        bapo=BAPOConfig(),
    )
    other.train()
    assert abs(other.state.log_history[0]["drift/chosen"]) > 0.1


# ---------------------------------------------------------------- numbers that are none


def poison(trainer, at):
    """From step `at` on, one micro-batch's policy log-prob is NaN, as a broken model gives it."""
    original, calls = trainer.response_forward, []

    def forward(model, unwrapped, batch, **kwargs):
        out = original(model, unwrapped, batch, **kwargs)
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == at:
                broken = torch.ones_like(out.logps)
                broken[1] = torch.nan
                return out._replace(logps=out.logps * broken)
        return out

    trainer.response_forward = forward


def test_a_loss_that_is_not_finite_stops_before_the_weights(tmp_path):
    trainer = bapo_trainer(tmp_path, rows=make_rows(12), eval_rows=make_rows(2))
    poison(trainer, at=2)
    kept = {}
    step = trainer.training_step

    def watched(*args, **kwargs):
        kept.update({n: p.clone() for n, p in trainer.model.named_parameters()})
        return step(*args, **kwargs)

    trainer.training_step = watched
    with pytest.raises(
        ValueError, match=r"step 2: not finite: row \d+ of the training rows \(loss nan, log π_θ"
    ):
        trainer.train()
    assert trainer.state.global_step == 1
    assert all(torch.equal(kept[n], p) for n, p in trainer.model.named_parameters())


def test_a_loss_that_is_not_finite_may_leave_its_step_out(tmp_path):
    trainer = bapo_trainer(
        tmp_path, rows=make_rows(16), bapo={"on_non_finite": "skip"}, weight_decay=0.1
    )
    poison(trainer, at=2)
    weights = []

    original = trainer.log

    def log(logs, *args):
        weights.append({n: p.clone() for n, p in trainer.model.named_parameters()})
        original(logs, *args)

    trainer.log = log
    trainer.train()
    moved = [
        any(not torch.equal(before[n], after[n]) for n in after)
        for before, after in itertools.pairwise(weights)
    ]
    assert moved[:3] == [False, True, True]  # steps 2, 3 and 4
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert all(torch.isfinite(torch.tensor(e["loss"])) for e in entries)


# ---------------------------------------------------------------- attention and head


def test_attention_keeps_its_name(tmp_path):
    """transformers looks masks and kernels up by it; "flash" in a name means something there."""
    model = make_model("mistral")
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        install(model)
        assert model.config._attn_implementation == name
        ids = [3, 4, 5]
        rows = [dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids", "base_ids"), ids)]
        log = []
        ResponseForward(log=log.append)(model, model, SharedPrefixCollator()(rows))
        assert log == []  # the head is still a plain one
        uninstall(model)
        with pytest.raises(RuntimeError, match="install"):
            ResponseForward(log=log.append)(model, model, SharedPrefixCollator()(rows))


def test_a_passing_fault_does_not_switch_the_kernel_off(monkeypatch):
    model = make_model("llama", vocab_size=len(make_tokenizer()))
    rows = [{key: [3, 4, 5] for key in ("prompt_ids", "chosen_ids", "rejected_ids", "base_ids")}]
    install(model)
    log, calls = [], []
    forward = ResponseForward(log=log.append)
    monkeypatch.setattr(
        forward_module, "sequence_logprobs", _counting(calls, forward_module.sequence_logprobs)
    )
    original = forward_module.inspect_head
    faults = [RuntimeError("a passing fault")]

    def inspect(*args):
        if faults:
            raise faults.pop()
        return original(*args)

    monkeypatch.setattr(forward_module, "inspect_head", inspect)
    plain = forward(model, model, SharedPrefixCollator()(rows)).logps
    assert calls == [] and log == []
    again = forward(model, model, SharedPrefixCollator()(rows)).logps
    assert len(calls) == 1 and log == []
    torch.testing.assert_close(plain, again, rtol=0, atol=1e-4)


def _counting(calls, function):
    def counted(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return counted


def test_the_kernel_takes_less_memory_once(monkeypatch):
    model = make_model("llama", vocab_size=len(make_tokenizer()))
    rows = [{key: [3, 4, 5] for key in ("prompt_ids", "chosen_ids", "rejected_ids", "base_ids")}]
    install(model)
    log, chunks, room = [], [], [2**24]
    original = forward_module.sequence_logprobs

    def scarce(*args, chunk_bytes, **kwargs):
        chunks.append(chunk_bytes)
        if (chunk_bytes or 2**27) > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*args, chunk_bytes=chunk_bytes, **kwargs)

    forward = ResponseForward(log=log.append)
    batch = SharedPrefixCollator()(rows)
    expected = forward(model, model, batch).logps
    monkeypatch.setattr(forward_module, "sequence_logprobs", scarce)
    for _ in range(2):
        torch.testing.assert_close(forward(model, model, batch).logps, expected, rtol=0, atol=1e-5)
    assert chunks == [None, 2**24, 2**24]
    assert len(log) == 1 and "less temporary memory, 16 MiB" in log[0]
    room[0] = 2**20
    with pytest.raises(
        torch.OutOfMemoryError, match=r"at 9 response tokens.*bapo.tokens_per_batch"
    ):
        forward(model, model, batch)


# ---------------------------------------------------------------- the cache's key


def test_the_key_is_the_same_in_every_process(tmp_path):
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from helpers import lora_model
from bapo_plugin.scoring.reference import weights_key
model = lora_model(target_modules=["q_proj", "k_proj", "v_proj"])
model.add_adapter("ref", model.peft_config["default"])
model.peft_config["ref"].target_modules = {"q_proj", "k_proj", "v_proj", "o_proj"}
model.config.a_set = {"one", "two", "three", "four"}
print("KEY", weights_key(model, "cpu"))
"""
    keys = set()
    for seed in "12":
        done = subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parents[1])],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        keys.add(done.stdout.split("KEY")[1].strip())
    assert len(keys) == 1


def test_the_key_knows_the_implementation_of_attention():
    model = make_model("gemma2")
    keys = set()
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        keys.add(weights_key(model, "cpu"))
    model.config._experts_implementation = "grouped_mm"
    keys.add(weights_key(model, "cpu"))
    assert len(keys) == 3


# ---------------------------------------------------------------- small


def test_tokens_seen_are_counted_with_packs(tmp_path):
    rows = make_rows(8)
    seen = []
    for tokens in (None, 60):
        trainer = bapo_trainer(
            tmp_path,
            rows=rows,
            bapo={"shared_prefix": "require", "tokens_per_batch": tokens},
            include_num_input_tokens_seen="all",
        )
        trainer.train()
        seen.append((trainer.state.num_input_tokens_seen, trainer.state.total_flos))
    assert seen[0] == seen[1] and min(seen[0]) > 0
    assert ("packs" in batch_of(trainer)) is True


def test_a_row_of_ids_without_tokens_is_refused(tmp_path):
    keys = ("prompt_ids", "chosen_ids", "rejected_ids", "base_ids")
    for empty in keys:
        rows = [{key: [3, 4] for key in keys} for _ in range(3)]
        rows[1] = {**rows[1], empty: []}
        with pytest.raises(ValueError, match=f"{empty} of row 2 is empty"):
            bapo_trainer(tmp_path, rows=rows)


@pytest.fixture
def clock(monkeypatch):
    """The trainer's, on which nothing takes time but a second in each of its micro-batches."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(metrics, "time", clock)
    training_step = BAPOTrainer.training_step

    def step(*args, **kwargs):
        loss = training_step(*args, **kwargs)
        clock.now += 1
        return loss

    monkeypatch.setattr(BAPOTrainer, "training_step", step)
    return clock


def speeds(trainer):
    return [entry["tokens/s"] for entry in trainer.state.log_history if "tokens/s" in entry]


def test_speed_is_that_of_training(tmp_path, clock, monkeypatch):
    trainer = bapo_trainer(
        tmp_path, rows=make_rows(8), eval_rows=make_rows(4), eval_strategy="steps", eval_steps=1
    )
    counts, add = [], metrics.Throughput.add
    monkeypatch.setattr(
        metrics.Throughput, "add", lambda self, n: (counts.append(n[0].item()), add(self, n))
    )
    loop = BAPOTrainer.__mro__[1].evaluation_loop

    def slow(self, *args, **kwargs):
        clock.now += 1000
        return loop(self, *args, **kwargs)

    monkeypatch.setattr(BAPOTrainer.__mro__[1], "evaluation_loop", slow)
    trainer.train()
    assert len(counts) == 2 and speeds(trainer) == counts, "tokens of a step, in its one second"


@pytest.mark.parametrize("shared", ["require", "off"])
def test_axolotls_padding_reaches_our_layout(tmp_path, shared):
    trainer = BAPOTrainer(
        make_model(vocab_size=len(make_tokenizer())),
        args=training_args(tmp_path / "out"),
        train_dataset=Dataset.from_list(make_rows(3)),
        processing_class=make_tokenizer(),
        peft_config=fresh_lora(),
        bapo=BAPOConfig(shared_prefix=shared),
        data_collator=AxolotlDPODataCollatorWithPadding(pad_to_multiple_of=64),
    )
    assert batch_of(trainer)["input_ids"].shape[1] % 64 == 0


def test_retention_measures_the_weights_that_count(tmp_path):
    """Schedule-free optimisers keep an average beside what is trained."""
    trainer = bapo_trainer(
        tmp_path,
        rows=make_rows(4),
        eval_rows=make_rows(3),
        bapo={"retention": {"prompts": 2, "every": 1}},
    )
    modes, measured = ["train"], []
    (callback,) = [
        c for c in trainer.callback_handler.callbacks if isinstance(c, RetentionCallback)
    ]
    measure = callback.measure

    def watched():
        measured.append(modes[-1])
        return measure()

    callback.measure = watched
    create = trainer.create_optimizer

    def with_modes(*args):
        optimizer = create(*args)
        optimizer.train = lambda: modes.append("train")
        optimizer.eval = lambda: modes.append("eval")
        return optimizer

    trainer.create_optimizer = with_modes
    trainer.train()
    assert measured == ["eval"] and modes[-1] == "train"


def test_evaluation_takes_the_runs_own_adapter(tmp_path):
    """That of output_dir, and where there is none that of lora_model_dir."""
    with pytest.raises(ValueError, match="no trained adapter to evaluate; train first"):
        adapter_to_evaluate(str(tmp_path), None)
    assert adapter_to_evaluate(str(tmp_path), "start") == "start"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert adapter_to_evaluate(str(tmp_path), "start") == "start", (
        "axolotl writes it before training"
    )
    with pytest.raises(ValueError, match="no weights .* training has not written a step yet"):
        adapter_to_evaluate(str(tmp_path), None)
    (tmp_path / "adapter_model.safetensors").touch()
    assert adapter_to_evaluate(str(tmp_path), "start") == str(tmp_path)


def test_an_evaluation_before_training_is_no_training_time(tmp_path, clock):
    trainer = bapo_trainer(
        tmp_path, rows=make_rows(8), eval_rows=make_rows(200), eval_on_start=True
    )
    trainer.evaluate()
    alone = bapo_trainer(tmp_path, rows=make_rows(8))
    alone.train()
    for _ in range(2):
        clock.now += 1000
        trainer.train()
        assert speeds(trainer) == speeds(alone) != []


def test_row_numbers_of_others_do_not_count(tmp_path):
    """Rows that another trainer has numbered, and a user's own column of that name."""
    first = bapo_trainer(tmp_path, rows=make_rows(8), model=lora_model())
    first.get_train_dataloader()
    results = []
    for with_column in (False, True):
        trainer = bapo_trainer(tmp_path, rows=make_rows(6), model=lora_model())
        randomize_lora(trainer.model, std=0.05)
        rows = first.train_dataset
        trainer.get_train_dataloader()
        results.append(trainer.evaluate(rows if with_column else rows.remove_columns(ROW)))
    for key in ("eval_loss", "eval_drift/chosen"):
        assert results[0][key] == results[1][key]


def test_rows_may_bring_their_own_reference(tmp_path):
    trainer = bapo_trainer(tmp_path, rows=make_rows(4), bapo={"anchor_level": "response"})
    own = [[-9.0, -8.0, -7.0]] * 4
    trainer.train_dataset = trainer.train_dataset.add_column("reference_logps", own)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["drift/chosen"] == pytest.approx(log["logps/chosen"] + 9, abs=1e-3)


def test_a_retention_log_leaves_the_steps_own(tmp_path):
    trainer = bapo_trainer(
        tmp_path,
        rows=make_rows(16),
        eval_rows=make_rows(3),
        bapo={"retention": {"prompts": 2, "every": 1}},
    )
    trainer.train()
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == [1, 2, 3, 4]


# ---------------------------------------------------------------- killed and gone on


def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path):
    trainer = bapo_trainer(tmp_path, rows=make_rows(12), save_strategy="steps", save_steps=1)
    trainer.train()
    out = tmp_path / "out"
    assert whole_checkpoint(str(out), True) == str(out / "checkpoint-3")
    (out / "checkpoint-3/trainer_state.json").write_text('{"half": ')
    (out / "checkpoint-2/trainer_state.json").unlink()
    assert whole_checkpoint(str(out), True) == str(out / "checkpoint-1")
    assert whole_checkpoint("elsewhere", str(out / "checkpoint-2")) == str(out / "checkpoint-1")
    resumed = bapo_trainer(tmp_path, rows=make_rows(12), save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint=True)
    logs = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (trainer, resumed)]
    assert logs[1] == pytest.approx(logs[0], abs=1e-6) and len(logs[0]) == 3
    for path in out.glob("checkpoint-*/trainer_state.json"):
        path.unlink()
    with pytest.raises(ValueError, match="no checkpoint in .* was written to its end"):
        resumed.train(resume_from_checkpoint=True)
    assert whole_checkpoint(str(tmp_path / "none"), True) is True
    assert whole_checkpoint(str(out), None) is None


def losses(folder):
    log = json.loads((folder / "result.json").read_text())["log"]
    return [entry["loss"] for entry in log if "loss" in entry]


def start(folder, **settings):
    command = [sys.executable, str(SCRIPT), str(folder), json.dumps(settings)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("continued", [False, True])
def test_ten_kills_change_nothing(tmp_path, continued):
    """At random moments; the last of the checkpoints that is whole is where it goes on."""
    settings = {"batch": 2, "rows": 60, "continued": continued, "pause": 0.4}
    (tmp_path / "one").mkdir()
    assert start(tmp_path / "one", **settings).wait(300) == 0
    folder = tmp_path / "killed"
    folder.mkdir()
    generator, kills = random.Random(3), 0
    while kills < 10:
        process = start(folder, **settings, resume=any(folder.glob("out/checkpoint-*")))
        known = len(list(folder.glob("out/checkpoint-*")))
        while len(list(folder.glob("out/checkpoint-*"))) == known and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(generator.uniform(0, 0.8))
        process.kill()
        process.wait()
        kills += 1
    process = start(folder, **settings, resume=True)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert losses(folder) == pytest.approx(losses(tmp_path / "one"), abs=1e-6)
    weights = [
        load_file(path / "out/adapter_model.safetensors") for path in (folder, tmp_path / "one")
    ]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-6)
