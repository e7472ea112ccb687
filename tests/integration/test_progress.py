"""Progress bars end where they said they would."""

import pytest
import torch
from helpers import bapo_trainer, preparation, write_config
from tiny import make_rows, save_model, write_jsonl
from tqdm import std

from bapo_plugin.answers.transformers import TransformersEngine
from bapo_plugin.store import Store


@pytest.fixture
def bars(monkeypatch):
    """Names of bars that were closed -> [(where it stood, where it had to end)]."""
    found = {}
    original = std.tqdm.close

    def close(bar):
        if not getattr(bar, "disable", True):
            found.setdefault(bar.desc.partition(":")[0], []).append((bar.n, bar.total))
        original(bar)

    monkeypatch.setattr(std.tqdm, "close", close)
    return found


def named(bars, word):
    return [ends for name, ends in bars.items() if word in name]


def test_rows_rendered_twice_and_base_responses(tmp_path, monkeypatch, bars):
    """Memory is out at more than two prompts."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    rows = [{k: v for k, v in row.items() if k != "base"} for row in make_rows(10)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    entry = {"path": "rows.jsonl", "split": "train", "type": "chat_template.default"}
    config = write_config(
        tmp_path,
        bapo={"anchors": {"max_new_tokens": 4}},
        datasets=[entry | {"field_messages": "prompt"}],
    )
    work = preparation(config)
    work.all_rendered(keep=False)
    work.all_rendered(keep=False)
    (ends,) = named(bars, "Rendering")
    assert {*ends} == {(10, 10)} and len(ends) > 1

    generate = TransformersEngine._generate

    def limited(engine, batch, on_tokens):
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return generate(engine, batch, on_tokens)

    monkeypatch.setattr(TransformersEngine, "_generate", limited)
    keyed = work.keyed(work.rendered(keep=True), work.made_by())
    with Store(work.store_path) as store:
        done = work.make_missing(keyed, work.made_by(), store)
    (ends,) = named(bars, "Making base responses")
    assert ends == [(done.prompts, done.prompts)] and done.generated == done.prompts


def test_training(tmp_path, bars):
    """Three batches of 4, 4 and 1 rows in packs, evaluation of 3 and 2, prompts to watch."""
    (tmp_path / "p.txt").write_text("tell me\nwhat is rain\nwhy\n")
    watched = {"prompts": str(tmp_path / "p.txt"), "max_new_tokens": 4}
    trainer = bapo_trainer(
        tmp_path,
        rows=make_rows(9),
        eval_rows=make_rows(5, seed=1),
        bapo={"retention": watched, "tokens_per_batch": 64, "precompute_ref_log_probs": True},
        disable_tqdm=False,
        per_device_eval_batch_size=3,
        eval_strategy="epoch",
        num_train_epochs=2,
    )
    trainer.train()
    assert {(9, 9), (5, 5)} <= {end for ends in named(bars, "Reference") for end in ends}
    assert named(bars, "Former answers") == [[(3, 3)]]
    assert all(n == total for ends in bars.values() for n, total in ends if total), bars
    assert (6, 6) in bars[""] and (2, 2) in bars[""]  # steps, batches of evaluation
