"""`bapo check`: what can be known of a run before its model is loaded."""

import json

import numpy as np
import pytest
from axolotl.cli.config import load_cfg
from axolotl.loaders import load_tokenizer
from helpers import write_config
from tiny import make_rows, make_tokenizer, save_model, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from bapo_plugin import models as loading
from bapo_plugin.cli import app
from bapo_plugin.commands.anchors import write_anchors
from bapo_plugin.commands.check.measure import bins_of
from bapo_plugin.commands.check.shown import Speller
from bapo_plugin.prepare import prepare_rows
from bapo_plugin.store import Store

RED = "\x1b[31m"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model without its weights."""
    folder = tmp_path_factory.mktemp("check")
    save_model(folder / "model", "qwen2")
    (folder / "model/model.safetensors").rename(folder / "weights")
    write_jsonl(folder / "rows.jsonl", rows_of(16))
    return folder


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    monkeypatch.setattr(loading, "load_reference", None)


def rows_of(n):
    return make_rows(n, base="mine")


def entry(path, **changes):
    found = {"path": str(path), "split": "train", "type": "chat_template.default"}
    return found | {"field_messages": "prompt", "field_base": "mine"} | changes


def run(config, *arguments):
    # the command sets the level for its process: here it must not outlive the call
    env = {"AXOLOTL_LOG_LEVEL": "WARNING", "AXOLOTL_DO_NOT_TRACK": "1", "COLUMNS": "200"}
    done = CliRunner().invoke(app, ["check", str(config), *arguments], env=env)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def facts_of(config, *arguments):
    done = run(config, "--json", *arguments)
    found = json.loads(done.stdout)
    assert found["exit_code"] == done.exit_code
    return found


def about(facts):
    return {warned["about"] for warned in facts["warnings"]}


def said(facts):
    return "\n".join(warned["text"] for warned in facts["warnings"])


def test_a_sound_run_without_weights_and_what_its_model_sees(folder):
    """The rows shown are those that training takes, token for token, and nothing of a run is touched."""
    config = write_config(folder)
    (folder / "out").mkdir()
    (folder / "out/debug.log").write_text("of a run")
    facts = facts_of(config, "--rows", "3")
    assert (facts["exit_code"], facts["errors"], facts["warnings"]) == (0, [], [])
    assert [path.name for path in (folder / "out").iterdir()] == ["debug.log"]
    assert (folder / "out/debug.log").read_text() == "of a run"
    (data,) = facts["data_sets"]
    assert (data["rows"], data["usable"], data["refused"], data["odd"]) == (16, 16, [], [])
    assert data["mapping"] == {
        "prompt": "prompt",
        "chosen": "chosen",
        "rejected": "rejected",
        "base": "mine",
    }
    assert facts["bases"]["in_data"] == 16 and facts["bases"]["requests"] == 0
    assert (facts["held_out"]["train"], facts["held_out"]["held_out"]) == (12, 4)
    assert (facts["steps"]["per_epoch"], facts["steps"]["total"]) == (3, 3)
    assert facts["sharing"]["refused"] == "" and not facts["sharing"]["at_least"]

    cfg = load_cfg(str(config))
    train, held = prepare_rows(cfg, tokenizer := load_tokenizer(cfg))
    rows = {row["prompt"]: row for part in (train, held) for row in part}
    assert [shown["row"] for shown in facts["shown"]] == [1, 2, 3]
    longest, shared, separate = [], 0, 0
    for shown in facts["shown"]:
        row = rows[shown["prompt"]["text"]]
        for name in ("prompt", "chosen", "rejected", "base"):
            part, ids = shown[name], row[f"{name}_ids"]
            assert (part["text"], part["tokens"]) == (tokenizer.decode(ids), len(ids))
            assert part["end"] == ("" if name == "prompt" else "<|im_end|>")
            for start, stop in part["special"]:
                assert part["text"][start:stop] in ("<|im_start|>", "<|im_end|>")
    for row in rows.values():
        prompt, *rest = (len(row[f"{n}_ids"]) for n in ("prompt", "chosen", "rejected", "base"))
        longest.append(prompt + max(rest))
        shared, separate = shared + prompt + sum(rest), separate + 3 * prompt + sum(rest)
    assert facts["lengths"]["longest"] == max(longest)
    assert sum(n for _, _, n in facts["lengths"]["bins"]) == 16
    assert facts["sharing"]["saved"] == pytest.approx(1 - shared / separate)


def test_everything_that_deserves_a_look(folder, tmp_path):
    rows = rows_of(24)
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[4]["chosen"] = ""
    rows[5]["mine"] = ""
    rows[6]["mine"], rows[7]["mine"] = rows[6]["chosen"], rows[7]["rejected"]
    rows[9] = dict(rows[8])
    rows[10]["prompt"] = rows[8]["prompt"]
    rows[11]["chosen"] = "ship " * 300
    rows[12] |= {"prompt": "tell me about the sea", "chosen": "tell me about the sea, you ask"}
    rows[0]["chosen"] = f" red {RED}"
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "keep.txt").write_text(f"{rows[20]['prompt']}\nanother one\n")
    (tmp_path / "watch.txt").write_text(f"{rows[21]['prompt']}\n{rows[22]['prompt']}\n")
    config = write_config(
        tmp_path,
        base_model=str(folder / "model"),
        datasets=[entry(tmp_path / "rows.jsonl")],
        bapo={
            "on_faulty": "drop",
            "anchors": {"max_new_tokens": 9},
            "keep": {"prompts": str(tmp_path / "keep.txt")},
            "retention": {"prompts": str(tmp_path / "watch.txt"), "every": 1},
        },
        val_set_size=None,
        sequence_len=100,
        rl_bta=0.3,
        gradient_acumulation_steps=2,
        liger_rope=True,
    )
    facts = facts_of(config)
    assert facts["exit_code"] == 1 and facts["errors"] == []
    assert about(facts) == {"key", "rows", "repeats", "length", "held_out", "keep"}
    assert "rl_bta: " in said(facts) and "did you mean rl_beta?" in said(facts)
    assert "did you mean gradient_accumulation_steps?" in said(facts)
    assert [text[:11] for text in facts["remarks"]] == ["liger_rope:"]
    (data,) = facts["data_sets"]
    assert (data["usable"], data["odd_rows"]) == (22, 1)
    assert {(group["rows"], *group["first"]) for group in data["refused"]} == {(1, 4), (1, 5)}
    assert facts["repeats"] == {
        "prompts": 2,
        "rows": 1,
        "base_is_chosen": 1,
        "base_is_rejected": 1,
        "chosen_is_rejected": 1,
    }
    assert facts["lengths"]["over"] == facts["lengths"]["mendable"] == 1
    assert facts["lengths"]["bins"][-1][::2] == [101, 1]
    bases = facts["bases"]
    assert [bases[k] for k in ("in_data", "in_store", "to_make", "no_room")] == [21, 0, 1, 0]
    assert (bases["requests"], bases["most_tokens"]) == (3, 27)
    assert (bases["kept_prompts"], bases["kept_to_make"]) == (2, 2)
    held = facts["held_out"]
    assert (held["train"], held["held_out"], held["by"]) == (21, 0, "")
    assert (held["kept_in_training"], held["watched_in_training"]) == (1, 2)
    assert facts["sharing"]["at_least"]

    screen = run(config, "--rows", "1").stdout
    assert "\x1b" not in screen and r"chosen     ·red \x1b[31m⟦<|im_end|>⟧" in screen
    words = "".join(screen.split())  # however it is wrapped, a long path too
    for line in (
        "drop: 1 left out, truncate: 1 cut, 0 left out, raise: stops at 1 row",
        f"by `bapo anchors {config}`",
    ):
        assert "".join(line.split()) in words


def test_errors_are_those_of_a_run(folder, tmp_path):
    """As one message, with exit code 2, also as JSON."""
    for changes in (
        {"bapo": {"anchor_wieght": 1}, "adapter": "llama-adapter"},
        {"datasets": [entry(folder / "none.jsonl")]},
        {"val_set_size": 40},
        {"chat_template": "nonsense"},
    ):
        config = write_config(folder, output_dir="wrong", **changes)
        with pytest.raises(ValueError) as run_fails:
            cfg = load_cfg(str(config))
            prepare_rows(cfg, load_tokenizer(cfg))
        done, facts = run(config), facts_of(config)
        assert done.exit_code == facts["exit_code"] == 2
        (error,) = facts["errors"]
        last = error.splitlines()[-1].rpartition(", got ")[0] or error
        assert len(reason := last.partition(": ")[2]) > 20 and reason in str(run_fails.value)
        assert "".join(error.split())[:60] in "".join(done.stdout.split())
    for text, message in (
        ("rl: dpo\nbapo: {anchor_weight: 0.1}", "rl: dpo trains plain DPO"),
        ("rl: dpo", "is not a configuration of BAPO"),
        ("- rl: bapo", "must be a block of settings"),
        ("rl: [bapo", "can't be read as YAML"),
        ("rl: bapo\nseed: 2024-02-30", "can't be read as YAML"),
        ("rl: " + "[" * 5000, "can't be read as YAML: it is nested too deep"),
        ("rl: bapo\nbase_model: [x]", "base_model: ['x'] must be text"),
        (
            "rl: bapo\nplugins: bapo_plugin.BAPOPlugin",
            "plugins: 'bapo_plugin.BAPOPlugin' must be a list",
        ),
    ):
        path = tmp_path / "bad.yml"
        path.write_text(text)
        facts = facts_of(path)
        assert facts["exit_code"] == 2 and message in facts["errors"][0]


def test_what_axolotl_would_meet_with_a_traceback_is_an_error_that_shows_its_line(folder):
    """The key is named, whether axolotl's schema refuses it (0.21) or its code runs into it (0.19)."""
    facts = facts_of(write_config(folder, output_dir="wrong", optimizer=7))
    assert facts["exit_code"] == 2
    (error,) = facts["errors"]
    assert "optimizer" in error


def test_keys_that_axolotl_ignores_inside_its_blocks_and_keys_that_stand_twice(folder):
    config = write_config(
        folder, special_tokens={"pad_tokn": "<|endoftext|>"}, peft={"nothing_like_it": 1}
    )
    config.write_text(config.read_text() + "bf16: false\n")
    text = said(facts_of(config))
    assert "special_tokens.pad_tokn: axolotl has no such key there" in text
    assert "did you mean pad_token?" in text
    assert "peft.nothing_like_it: axolotl has no such key there and ignores it; it has " in text
    assert "bf16: stands twice, first in line" in text


def test_faulty_rows_are_an_error_and_the_rest_is_seen_nevertheless(folder, tmp_path):
    rows = rows_of(12)
    rows[2]["chosen"] = None
    held_out = [*rows_of(20)[14:], rows[0]]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", held_out)
    config = write_config(
        tmp_path,
        base_model=str(folder / "model"),
        datasets=[entry(tmp_path / "rows.jsonl", type="chatml.prompt_pairs")],
        test_datasets=[entry(tmp_path / "test.jsonl", field_base=False)],
        val_set_size=None,
    )
    facts = facts_of(config)
    assert facts["exit_code"] == 2
    (error,) = facts["errors"]
    assert "1 of 12 rows can't be used" in error and "row 3: " in error
    train, test = facts["data_sets"]
    assert train["mapping"]["chosen"] == "chosen" and train["type"] == "chatml.prompt_pairs"
    assert test["mapping"]["base"] == "generated (field_base: false)"
    assert facts["bases"]["to_make"] == 7
    assert (facts["held_out"]["train"], facts["held_out"]["overlap"]) == (11, 1)
    assert "1 of 7 held-out rows have a prompt that is in training too" in said(facts)


def test_base_responses_that_were_made_before(folder, tmp_path, monkeypatch):
    monkeypatch.undo()  # this makes them
    model = save_model(tmp_path / "model", "qwen2")
    rows = [{k: v for k, v in row.items() if k != "mine"} for row in rows_of(6)]
    write_jsonl(tmp_path / "rows.jsonl", rows[:4])
    data = [entry(tmp_path / "rows.jsonl", field_base=None)]
    bapo = {"anchors": {"max_new_tokens": 5}}
    config = write_config(tmp_path, base_model=str(model), datasets=data, bapo=bapo)
    write_anchors(config, None)
    monkeypatch.setattr(loading, "load_reference", None)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    facts = facts_of(config, "--rows", "9")
    bases = facts["bases"]
    assert [bases[k] for k in ("in_data", "in_store", "to_make")] == [0, 4, 2]
    assert (bases["requests"], bases["most_tokens"]) == (2, 10)
    assert bases["reasons"] == [["no response to this row yet", 2]]
    assert [row["base_from"] for row in facts["shown"]] == ["store"] * 4 + ["to be made"] * 2
    assert all(row["base"]["tokens"] <= 5 for row in facts["shown"][:4])
    assert bases["cut"] == sum(row["base"]["end"] == "" for row in facts["shown"][:4]) > 0
    assert f"{bases['cut']} of 4 base responses were cut by a limit" in said(facts)
    with Store(tmp_path / "prepared/bapo-anchors.sqlite") as store:
        count = "SELECT count(*) FROM entries WHERE kind = 'anchor'"
        assert store._db.execute(count).fetchone() == (4,)


def test_a_model_whose_prompt_cant_be_shared(folder, tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = save_model(tmp_path / "model", "llama", rope_parameters=rope)
    places = {"base_model": str(model), "output_dir": "rope"}
    facts = facts_of(write_config(folder, **places))
    assert facts["exit_code"] == 0 and "dynamic rotary positions" in facts["sharing"]["refused"]
    facts = facts_of(write_config(folder, **places, bapo={"shared_prefix": "require"}))
    assert facts["exit_code"] == 2 and "require, but LlamaForCausalLM has" in facts["errors"][0]


def sentencepiece():
    """As Llama 2's: a space before the text, which is not written at its beginning."""
    words = ["<s>", "</s>", "▁", "▁ask", "▁say", "say", "é", "a", "s", "k", "y"]
    words += [f"<0x{i:02X}>" for i in range(256)]
    vocabulary = {word: i for i, word in enumerate(words)}
    merges = [("▁", "a"), ("▁a", "s"), ("▁as", "k"), ("▁", "s"), ("▁s", "a"), ("▁sa", "y")]
    vocabulary |= {
        a + b: len(vocabulary) + i for i, (a, b) in enumerate(merges) if a + b not in vocabulary
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("make", [make_tokenizer, sentencepiece])
def test_parts_of_a_row_spell_the_whole(make):
    """Also where a response begins with a space, or in the middle of a character."""
    tokenizer = make()
    speller = Speller(tokenizer, {tokenizer.eos_token_id})
    ids = tokenizer("ask say ü say")["input_ids"] + [tokenizer.eos_token_id]
    whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    for cut in range(1, len(ids) - 1):
        prompt, response = speller.part(ids[:cut]), speller.part(ids[cut:], ids[:cut])
        assert response.end == tokenizer.eos_token and prompt.end == ""
        if "\ufffd" not in prompt.text:
            assert prompt.text + response.text == whole
        assert response.tokens == len(ids) - cut


def test_bins_hold_every_row_and_end_at_sequence_len():
    totals = np.array([30, 31, 48, 99, 100, 101, 5000])
    bins = bins_of(totals, 100)
    assert bins[-1] == (101, 5000, 2) and bins[-2] == (100, 100, 1)
    assert [n for _, _, n in bins] == [
        int(((totals >= low) & (totals <= high)).sum()) for low, high, _ in bins
    ]
    assert sum(n for _, _, n in bins) == len(totals)
    assert bins_of(np.array([7]), 7) == [(7, 7, 1)] and bins_of(np.array([8]), 7) == [(8, 8, 1)]


@pytest.mark.parametrize(
    "block",
    [
        {"message_property_mappings": {"role": "role", "content": "content"}},
        {"roles": {"user": ["human"], "assistant": ["assistant"]}},
        {
            "type": {
                "field_prompt": "prompt",
                "field_chosen": "chosen",
                "field_rejected": "rejected",
            }
        },
    ],
)
def test_blocks_in_an_entry_reach_axolotls_validation(folder, block):
    config = write_config(folder, datasets=[entry(folder / "rows.jsonl", **block)])
    assert load_cfg(str(config)).datasets[0].path == str(folder / "rows.jsonl")
    assert run(config).exit_code < 2, run(config).output
