"""`bapo.keep` and `anchor_weight: auto` through axolotl's commands."""

import json
import re
from types import SimpleNamespace

import pytest
from axolotl.cli.config import load_cfg
from helpers import axolotl, write_config
from tiny import make_rows, save_model, write_jsonl

from bapo_plugin.answers.prompts import read_prompts
from bapo_plugin.evaluation.run import _warn_of_kept
from bapo_plugin.prepare import load_datasets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keep")
    save_model(folder / "model", "qwen2")
    rows = make_rows(14)
    write_jsonl(folder / "rows.jsonl", [{**row, "mine": row["base"]} for row in rows])
    (folder / "keep.txt").write_text("tell me about the sea\nwhat is a star\n\nwhy is it\n")
    write_jsonl(
        folder / "chat.jsonl",
        [
            {"prompt": [{"role": "user", "content": text}]}
            for text in ("name three", "what is a star")
        ],
    )
    return folder


def config(folder, bapo=None, **changes):
    keep = {"prompts": str(folder / "keep.txt"), "weight": 0.5, "per_step": 2}
    return write_config(
        folder,
        bapo={
            "anchor_weight": "auto",
            "drift_limit": 0.02,
            "keep": keep,
            "anchors": {"max_new_tokens": 12, "on_missing": "error"},
        }
        | (bapo or {}),
        **changes,
    )


def prepared(path):
    return load_datasets(load_cfg(str(path)))


def test_training_keeps_the_prompts(folder):
    """The prompts are answered once, whatever rows without a base response would mean, and found again."""
    path = config(folder)
    first = axolotl(folder, "train", path, "--launcher", "python")
    assert "3 rows with 3 distinct prompts; 3 generated" in first
    assert "bapo.keep: 3 prompts, 2 in each step" in first and "Traceback" not in first
    (state,) = (folder / "out").glob("checkpoint-*/trainer_state.json")
    steps = [e for e in json.loads(state.read_text())["log_history"] if "loss" in e]
    for entry in steps:
        parts = entry["loss/preference"] + entry["loss/anchor"] + entry["loss/keep"]
        assert entry["loss"] == pytest.approx(parts, abs=1e-5)
    assert steps[0]["keep/kl"] < 1e-6 < steps[-1]["keep/kl"]
    assert len({entry["anchor/weight"] for entry in steps}) == len(steps) >= 3
    (_, kept) = prepared(path)
    chats = read_prompts(folder / "keep.txt")
    assert len(kept) == len(chats) == 3
    for row, chat in zip(kept, chats, strict=True):
        words = chat[0]["content"]
        assert row["prompt"] == f"<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n"
        assert row["base_ids"] and row["open_tokens"] == 0


def test_prompts_that_are_watched_are_refused(folder):
    retention = {"prompts": str(folder / "chat.jsonl"), "every": 1}
    with pytest.raises(ValueError, match=r"1 prompts of bapo.keep.prompts: .*keep.txt are among"):
        prepared(config(folder, {"retention": retention}))


def test_prompts_that_come_with_the_plugin(folder):
    """100 to hold and 48 to measure on; none is in both, nor nearly."""
    held, watched = (
        [set(re.findall(r"\w+", chat[0]["content"].lower())) for chat in read_prompts(name)]
        for name in ("general", "unrelated")
    )
    assert (len(held), len(watched)) == (100, 48) and len(set(map(frozenset, held))) == 100
    assert max(len(a & b) / len(a | b) for a in held for b in watched) < 0.65
    path = config(
        folder, {"keep": {"prompts": "general"}, "retention": {"prompts": "unrelated", "every": 50}}
    )
    _, kept = prepared(path)
    assert len(kept) == 100 and kept[0]["prompt"].startswith(
        "<|im_start|>user\nWhat is 34 minus 19?<|im_end|>"
    )


def test_eval_says_that_what_it_asks_was_held(folder, caplog):
    (folder / "both.txt").write_text("what is a star\nWhat is 17 plus 26?\n")
    cfg = load_cfg(str(config(folder, {"keep": {"prompts": str(folder / "both.txt")}})))
    chats = read_prompts("unrelated")
    _warn_of_kept(SimpleNamespace(cfg=cfg), "the unrelated prompts", chats)
    assert (
        "the former answers to 1 of 48 of the unrelated prompts (bapo.keep.prompts: " in caplog.text
    )
    caplog.clear()
    _warn_of_kept(SimpleNamespace(cfg=cfg), "other.txt", chats[1:])
    assert not caplog.text
    (folder / "both.txt").unlink()
    _warn_of_kept(SimpleNamespace(cfg=cfg), None, [])
    assert not caplog.text
    _warn_of_kept(SimpleNamespace(cfg=cfg), "other.txt", chats)
    assert "isn't known: bapo.keep.prompts: there is no file" in caplog.text


def test_a_watched_prompt_with_other_white_space_is_the_same(folder):
    write_jsonl(folder / "space.jsonl", [{"prompt": "what is a star "}])
    retention = {"prompts": str(folder / "space.jsonl"), "every": 1}
    with pytest.raises(ValueError, match="1 prompts of bapo.keep.prompts"):
        prepared(config(folder, {"retention": retention}))


def test_repeated_prompts_count_once(folder):
    (folder / "twice.txt").write_text("what is a star\nwho are you\nwhat is a star\n")
    _, kept = prepared(config(folder, {"keep": {"prompts": str(folder / "twice.txt")}}))
    assert len(kept) == 2


def test_held_out_rows_that_are_kept_are_said(folder, caplog):
    _, held_out = (
        prepared(config(folder))[0].train_dataset,
        prepared(config(folder))[0].eval_dataset,
    )
    words = held_out[0]["prompt"].split("user\n")[1].split("<|im_end|>")[0]
    (folder / "same.txt").write_text(f"{words}\nwhat is a star\n")
    keep = {"prompts": str(folder / "same.txt")}
    with pytest.raises(ValueError, match="1 prompts of bapo.keep.prompts"):
        prepared(config(folder, {"keep": keep, "retention": {"prompts": 2}}))
    assert "eval_drift/base on them says nothing" not in caplog.text
    prepared(config(folder, {"keep": keep}))
    assert "eval_drift/base on them says nothing" in caplog.text


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, r"bapo\.keep\.prompts: there is no file"),
        ('{"prompt": 1}', r"bapo\.keep\.prompts: .*line 1"),
        ("\n \n", r"bapo\.keep\.prompts: .* has no prompts"),
    ],
)
def test_a_file_that_cannot_be_used(folder, text, match):
    path = folder / ("odd.jsonl" if text and "{" in text else "odd.txt")
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=match):
        prepared(config(folder, {"keep": {"prompts": str(path)}}))


def test_a_prompt_too_long_is_left_out(folder, caplog):
    (folder / "long.txt").write_text("what is a star\n" + "tell me about the sea " * 200 + "\n")
    _, kept = prepared(config(folder, {"keep": {"prompts": str(folder / "long.txt")}}))
    assert len(kept) == 1 and "bapo.keep.prompts" in caplog.text and "1 dropped" in caplog.text
