"""Tokens, checks and the length policy of one row."""

import pytest
from datasets import Dataset
from tiny import make_tokenizer

from bapo_plugin.rows.chat import ChatRows
from bapo_plugin.rows.conversation import Fields
from bapo_plugin.rows.ends import StopTexts
from bapo_plugin.rows.errors import RowError
from bapo_plugin.rows.table import finish, kept_among, overlap, split_by_prompt
from bapo_plugin.rows.template import ChatTemplate
from bapo_plugin.rows.texts import tokenize_row
from bapo_plugin.rows.tokens import FEATURES, Encoder, fit_length, prepare_batch
from bapo_plugin.scoring.collator import ROW as NUMBER
from bapo_plugin.scoring.collator import (
    PaddedCollator,
    SharedPrefixCollator,
    num_rows,
)

ROW = {
    "prompt": "tell me about the sea ",
    "chosen": "arr blue",
    "rejected": "water",
    "base": "it is",
}


def test_tokens_are_trls(chatml):
    """Same ids as trl.DPOTrainer makes: whole texts, EOS added, response = what follows the prompt."""
    ids = tokenize_row(ROW | {"prompt": "tell me<|im_end|>"}, chatml)
    prompt = chatml("tell me<|im_end|>")["input_ids"]
    assert ids["prompt_ids"] == prompt
    for name in ("chosen", "rejected", "base"):
        whole = chatml("tell me<|im_end|>" + ROW[name] + "<|im_end|>")["input_ids"]
        assert ids[f"{name}_ids"] == whole[len(prompt) :]
        assert ids[f"{name}_ids"][-1] == chatml.eos_token_id


def test_eos_is_not_doubled(chatml):
    once = tokenize_row(ROW, chatml)
    with_eos = tokenize_row(ROW | {"base": ROW["base"] + "<|im_end|>"}, chatml)
    assert once["base_ids"] == with_eos["base_ids"]


@pytest.mark.parametrize(
    "tail", ["<|im_end|>\n", "<|im_end|><|im_end|>", "<|im_end|>\n<|im_end|>\n"]
)
def test_an_end_of_turn_stands_once_however_a_row_was_rendered(chatml, tail):
    once = tokenize_row(ROW, chatml)
    many = tokenize_row(
        ROW | {key: ROW[key] + tail for key in ("chosen", "rejected", "base")}, chatml
    )
    assert many == once


def test_an_end_that_is_not_the_tokenizers_stays(chatml):
    """Phi, Gemma and ChatML models end turns with a token that is not their EOS."""
    stops = StopTexts(chatml, {0, 2})  # <|endoftext|>, <|im_end|>
    assert stops.close("arr <|im_end|>\n<|endoftext|>") == "arr <|im_end|>"
    assert stops.close("arr <|endoftext|>") == "arr <|endoftext|>"
    assert stops.close("arr \n") == "arr \n<|im_end|>"
    assert stops.close("<|im_start|>") == "<|im_start|><|im_end|>", "a special token is no end"
    inside = "a <|im_end|> b"
    assert stops.strip(f"{inside}<|im_end|>\n") == inside


def test_an_eos_that_the_tokenizer_puts_after_every_text_is_left_out():
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)]
    )
    assert tokenizer("sea")["input_ids"][-1] == 2, "the trap"
    assert tokenize_row(ROW, tokenizer) == tokenize_row(ROW, make_tokenizer())


def test_a_cut_base_response_has_no_end(chatml):
    ids = tokenize_row(ROW | {"base_cut": "true"}, chatml)
    assert chatml.decode(ids["base_ids"]).strip() == "it is"
    assert tokenize_row(ROW | {"base_cut": "false"}, chatml) == tokenize_row(ROW, chatml)
    with pytest.raises(RowError, match="base_cut is 'perhaps'; it must be true or false"):
        tokenize_row(ROW | {"base_cut": "perhaps"}, chatml)


def test_bos_of_template_and_tokenizer_becomes_one():
    llama = make_tokenizer("llama3")
    prompt = llama.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert llama(prompt)["input_ids"][:2] == [0, 0]  # the trap
    ids = tokenize_row(ROW | {"prompt": prompt}, llama)
    assert ids["prompt_ids"][0] == 0 and ids["prompt_ids"][1] != 0
    assert 0 not in ids["base_ids"]


def test_prompt_and_response_that_merge_keep_the_text_right(chatml):
    """The pieces wat + er are one token together: the prompt then ends before it and no text is lost."""
    row = {"prompt": "the wat", "chosen": "er is", "rejected": "ey sun", "base": "er"}
    assert len(chatml("the water")["input_ids"]) < len(
        chatml("the wat")["input_ids"] + chatml("er")["input_ids"]
    )
    ids = tokenize_row(row, chatml)
    for name in ("chosen", "rejected", "base"):
        whole = ids["prompt_ids"] + ids[f"{name}_ids"]
        assert whole == chatml(row["prompt"] + row[name] + "<|im_end|>")["input_ids"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rejected": "arr blue"}, "identical"),
        ({"prompt": ""}, "prompt is empty"),
        ({"base": None}, "base is missing, not text"),
        (
            {"chosen": [{"role": "assistant"}]},
            "chosen is of type list, not text; apply the chat template",
        ),
    ],
)
def test_bad_rows(chatml, change, match):
    with pytest.raises(RowError, match=match):
        tokenize_row(ROW | change, chatml)


def ids(prompt, chosen, rejected, base):
    return {
        "prompt_ids": [9] * prompt,
        "chosen_ids": [1] * chosen,
        "rejected_ids": [2] * rejected,
        "base_ids": [3] * base,
    }


@pytest.mark.parametrize(
    ("lengths", "strategy", "expected"),
    [
        ((4, 6, 6, 6), "drop", "fits"),
        ((4, 6, 6, 7), "drop", "long"),  # only the base response is too long
        ((4, 7, 6, 6), "raise", "long"),
        ((4, 6, 6, 7), "truncate", "cut"),
        ((10, 1, 1, 1), "truncate", "long"),  # no room for any response
        ((12, 1, 1, 1), "truncate", "long"),
    ],
)
def test_length_policy_looks_at_all_three(lengths, strategy, expected):
    row, status = fit_length(ids(*lengths), 10, strategy)
    assert status == expected
    if status == "cut":
        assert max(len(row[k]) for k in row if k != "prompt_ids") == 10 - lengths[0]


def test_a_cut_that_leaves_nothing_of_the_base_response_is_long():
    """But what a template opened for the model."""
    row = ids(4, 8, 8, 8) | {"open_ids": [1, 1]}
    row["rejected_ids"] = [1, 2, *[1] * 6]
    assert fit_length(row, 7, "truncate")[1] == "cut"
    assert fit_length(row, 6, "truncate")[1] == "long"


def test_a_cut_that_removes_the_difference_is_long():
    row = ids(4, 8, 8, 8)
    row["rejected_ids"] = [1] * 7 + [5]
    assert fit_length(row, 10, "truncate")[1] == "long"


def test_padded_collator():
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5], "base_ids": [6, 7]},
        {"prompt_ids": [8], "chosen_ids": [9], "rejected_ids": [10, 11, 12, 13], "base_ids": [14]},
    ]
    batch = PaddedCollator(pad_token_id=0, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].shape == (6, 8) and num_rows(batch) == 2
    # chosen of both rows, then rejected, then base
    assert batch["input_ids"][:, :5].tolist() == [
        [1, 2, 3, 4, 0],
        [8, 9, 0, 0, 0],
        [1, 2, 5, 0, 0],
        [8, 10, 11, 12, 13],
        [1, 2, 6, 7, 0],
        [8, 14, 0, 0, 0],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [4, 2, 3, 5, 4, 2]
    assert batch["cu_seqlens"].tolist() == [0, 2, 3, 4, 8, 10, 11]
    # the state before a token predicts it
    flat = batch["input_ids"].view(-1)
    assert torch_equal(flat[batch["response_index"] + 1], batch["response_labels"])


def torch_equal(a, b):
    return a.tolist() == b.tolist()


@pytest.mark.parametrize("collator", [PaddedCollator(0), SharedPrefixCollator()])
def test_row_numbers_come_along(collator):
    rows = [ids(2, 1, 1, 1) | {NUMBER: 2**24 + 1}, ids(1, 2, 1, 1) | {NUMBER: 5}]
    assert collator(rows)[NUMBER].tolist() == [2**24 + 1, 5]
    assert NUMBER not in collator([ids(2, 1, 1, 1)])


def test_collator_docstring():
    import doctest

    import bapo_plugin.scoring.collator as module

    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


class Merging(Encoder):
    """Two line feeds are one token, as for Qwen and Llama 3."""

    def __call__(self, texts):
        return [list(map(ord, text.replace("\n\n", "\0"))) for text in texts]


def test_no_prompt_is_on_both_sides_where_a_response_merges_with_it():
    prompts = [f"what is {i} in the sea" for i in range(6)] * 2
    chosen = ["the sun"] * 6 + ["\nthe sun"] * 6
    batch = {"messages": prompts, "chosen": chosen, "rejected": ["no"] * 12, "base": ["yes"] * 12}
    tokenizer = make_tokenizer()
    template = ChatTemplate(tokenizer, tokenizer.chat_template, [tokenizer.eos_token_id])
    read = ChatRows(template, Fields(base="base"))
    made = prepare_batch(batch, range(12), read, Merging(tokenizer, True), 500, "drop")
    assert not any(made["problem"])
    rows = finish(Dataset.from_dict(made, features=FEATURES), "rows", 500, "drop", "keep")
    assert rows[0]["prompt_ids"] != rows[6]["prompt_ids"] and rows[0]["asked"] == rows[6]["asked"]
    train, held_out = split_by_prompt(rows, 3)
    assert overlap(train, held_out) == 0 and len(held_out) == 4
    assert overlap(rows.select(range(6)), rows.select(range(6, 12))) == 6
    assert kept_among(rows, rows.select([2])) == 2
