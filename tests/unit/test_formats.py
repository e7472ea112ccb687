"""The base response is rendered as the chosen one is, in every DPO format of axolotl.

The oracle: the same strategy on a row whose chosen response *is* the base text. Rendered base and
oracle must be equal to the letter.
"""

import copy
import inspect
from functools import partial

import pytest
from axolotl.prompt_strategies.dpo import load as load_strategy
from axolotl.utils.dict import DictDefault
from tiny import make_tokenizer

from bapo_plugin.rows.strategies import BaseRenderer, RowError

CHOSEN, REJECTED, BASE = "arr the sea be blue", "the sea is blue", "It is blue. "


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def plain(**more):
    """A row of strings; `response` is what stands where the chosen response stands."""
    return lambda response: {"prompt": "why blue?", "chosen": response, "rejected": REJECTED} | more


def renamed(mapping):
    def row(response):
        return {mapping.get(k, k): v for k, v in plain()(response).items()}

    return row


def conversation(response):
    return {
        "chosen": [user("why blue?"), assistant(response)],
        "rejected": [user("why blue?"), assistant(REJECTED)],
        "prompt": "why blue?",
    }


def messages(response):
    return {
        "messages": [user("hi"), assistant("hello"), user("why blue?")],
        "chosen": assistant(response),
        "rejected": assistant(REJECTED),
    }


def sharegpt(response):
    return {
        "conversations": [{"from": "human", "value": "why blue?"}],
        "better": {"from": "gpt", "value": response},
        "worse": {"from": "gpt", "value": REJECTED},
    }


SHAREGPT = {
    "field_messages": "conversations",
    "field_chosen": "better",
    "field_rejected": "worse",
    "message_property_mappings": {"role": "from", "content": "value"},
    "roles": {"user": ["human"], "assistant": ["gpt"], "system": ["system"]},
}


def nectar(response):
    answers = [
        {"answer": REJECTED, "rank": 2},
        {"answer": response, "rank": 3},
        {"answer": "no", "rank": 1},
    ]
    return {"prompt": "why blue?", "answers": answers}


FORMATS = {
    "chat_template.default": [
        ({"field_messages": "messages"}, messages),
        ({"field_messages": "prompt"}, plain()),
        (SHAREGPT, sharegpt),
    ],
    "chat_template.argilla_chat": [({}, conversation)],
    "chatml.default": [
        ({}, plain()),
        ({}, renamed({"chosen": "chosen_response", "prompt": "input"})),
    ],
    "chatml.argilla_chat": [({}, conversation)],
    "chatml.icr": [
        ({}, renamed({"prompt": "input"})),
        ({}, lambda r: {"system": "s", **renamed({"prompt": "input"})(r)}),
    ],
    "chatml.intel": [({}, renamed({"prompt": "question"}))],
    "chatml.prompt_pairs": [({}, plain())],
    "chatml.ultra": [({}, conversation)],
    "llama3.default": [({}, plain())],
    "llama3.argilla_chat": [({}, conversation)],
    "llama3.icr": [({}, renamed({"prompt": "input"}))],
    "llama3.intel": [({}, renamed({"prompt": "question"}))],
    "llama3.prompt_pairs": [({}, plain())],
    "llama3.ultra": [({}, conversation)],
    "zephyr.nectar": [({}, nectar)],
    "passthrough.default": [({}, plain())],
    "user_defined.default": [
        (
            {
                "type": {
                    "field_prompt": "q",
                    "field_chosen": "good",
                    "field_rejected": "bad",
                    "prompt_format": "<u>{prompt}</u>",
                    "chosen_format": "{chosen}</s>",
                    "rejected_format": "{rejected}</s>",
                }
            },
            renamed({"prompt": "q", "chosen": "good", "rejected": "bad"}),
        )
    ],
}
CASES = [(kind, cfg, row) for kind, cases in FORMATS.items() for cfg, row in cases]


def strategy_of(kind, ds_cfg, style="chatml"):
    cfg = DictDefault(
        {"datasets": [{"path": "x", "type": kind, **ds_cfg}], "chat_template": "tokenizer_default"}
    )
    found = load_strategy(kind, cfg, dataset_idx=0)
    transform = found[0] if isinstance(found, tuple) else found
    if "tokenizer" in inspect.signature(transform).parameters:
        transform = partial(transform, tokenizer=make_tokenizer(style))
    return transform


@pytest.mark.parametrize("shape", ["string", "message", "messages"])
@pytest.mark.parametrize(
    ("kind", "ds_cfg", "make"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_base_is_rendered_like_chosen(kind, ds_cfg, make, shape):
    transform = strategy_of(kind, ds_cfg)
    value = {
        "string": BASE,
        "message": assistant(BASE),
        "messages": [user("why blue?"), assistant(BASE)],
    }
    row = make(CHOSEN) | {"mine": value[shape]}
    before = copy.deepcopy(row)
    out = BaseRenderer(transform, field_base="mine", entry=ds_cfg)(row)
    assert row == before, "the row was changed"

    plain_render = transform(copy.deepcopy(make(CHOSEN)))
    assert {k: out[k] for k in ("prompt", "chosen", "rejected")} == {
        k: plain_render[k] for k in ("prompt", "chosen", "rejected")
    }
    assert out["base"] == transform(copy.deepcopy(make(BASE)))["chosen"]
    assert BASE.strip() in out["base"] and out["base"] != out["chosen"]


def test_every_dpo_strategy_of_axolotl_is_covered():
    import importlib
    import pkgutil

    import axolotl.prompt_strategies.dpo as package

    found = set()
    for module in pkgutil.iter_modules(package.__path__):
        loaded = importlib.import_module(f"{package.__name__}.{module.name}")
        for name, function in inspect.getmembers(loaded, inspect.isfunction):
            if (
                function.__module__ == loaded.__name__
                and "cfg" in inspect.signature(function).parameters
            ):
                found.add(f"{module.name}.{name}")
    assert found == set(FORMATS)


def test_a_strategy_of_ones_own():
    def transform(row):
        return {
            "prompt": row["q"],
            "chosen": f"<<{row['pair'][1].upper()}>>",
            "rejected": row["pair"][0],
        }

    row = {"q": "why", "pair": ["no", "yes"], "base": "maybe"}
    with pytest.raises(RowError, match="found no place"):  # upper() hides the marker
        BaseRenderer(transform, field_base="base")(row)

    def visible(row):
        return transform(row) | {"chosen": f"<<{row['pair'][1]}>>"}

    assert BaseRenderer(visible, field_base="base")(row)["base"] == "<<maybe>>"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"base": ""}, "base is empty; put there what the model answers"),
        ({"base": "  \n"}, "base is empty"),
        ({"base": None}, "base is missing"),
        ({"base": []}, "base is empty"),
        ({"base": 7}, "base is of type int; it must be a string, a message or a list"),
        ({"base": [user("why")]}, "must end with a message of the assistant, not of 'user'"),
        ({"base": {"role": "assistant", "content": None}}, "base is missing"),
        ({"chosen": ""}, "chosen is empty"),
        ({"chosen": " "}, "chosen is empty"),
        ({"rejected": None}, "rejected is missing"),
        ({"rejected": 5}, "rejected is of type int"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": None}, "prompt is missing"),
    ],
)
def test_bad_rows_say_what_and_how_to_mend(change, match):
    row = plain()(CHOSEN) | {"base": BASE} | change
    for kind in ("passthrough.default", "chatml.prompt_pairs", "llama3.prompt_pairs"):
        with pytest.raises(RowError, match=match):
            BaseRenderer(strategy_of(kind, {}), field_base="base")(row)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"chosen": ""}, "chosen is empty|chosen is so short"),
        ({"rejected": ""}, "rejected is empty|rejected is so short"),
        ({"rejected": None}, "failed with.*empty: rejected|rejected is missing"),
        ({"chosen": assistant("")}, "chosen is empty|chosen is so short"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": [user("hi"), assistant("ho"), user("")]}, "prompt is empty"),
    ],
)
def test_bad_rows_in_a_chat_template(change, match):
    row = plain()(CHOSEN) | {"base": BASE} | change
    transform = strategy_of("chat_template.default", {"field_messages": "prompt"})
    with pytest.raises(RowError, match=match):
        BaseRenderer(transform, field_base="base", entry={"field_messages": "prompt"})(row)


def test_empty_system_message_is_fine():
    row = plain(system="")(CHOSEN) | {"base": BASE, "score": 3, "note": None}
    assert BaseRenderer(strategy_of("chatml.prompt_pairs", {}), field_base="base")(row)["base"]


def test_messages_where_the_type_takes_text():
    row = plain()(CHOSEN) | {"base": BASE, "rejected": [user("why"), assistant("no")]}
    with pytest.raises(RowError, match="rejected is of type list.*takes text there"):
        BaseRenderer(strategy_of("chatml.prompt_pairs", {}), field_base="base")(row)


def test_base_in_the_users_own_message_format():
    entry = {
        "field_messages": "conversations",
        "message_property_mappings": {"role": "speaker", "content": "text"},
        "roles": {"user": ["me"], "assistant": ["bot"], "system": ["system"]},
    }
    row = {
        "conversations": [{"speaker": "me", "text": "why blue?"}],
        "chosen": {"speaker": "bot", "text": CHOSEN},
        "rejected": {"speaker": "bot", "text": REJECTED},
        "base": [{"speaker": "me", "text": "why blue?"}, {"speaker": "bot", "text": BASE}],
    }
    transform = strategy_of("chat_template.default", entry)
    assert BASE.strip() in BaseRenderer(transform, field_base="base", entry=entry)(row)["base"]
    row["base"] = [{"speaker": "me", "text": "why blue?"}]
    with pytest.raises(RowError, match="must end with a message of the assistant, not of 'me'"):
        BaseRenderer(transform, field_base="base", entry=entry)(row)


def test_strategy_that_returns_nothing():
    with pytest.raises(RowError, match="the prompt strategy returned missing, not prompt"):
        BaseRenderer(lambda row: None, field_base="base")(plain()(CHOSEN) | {"base": BASE})


def test_missing_column_names_the_columns_there_are():
    with pytest.raises(
        RowError, match=r"no column 'base'.*columns: prompt, chosen, rejected.*field_base"
    ):
        BaseRenderer(strategy_of("chatml.prompt_pairs", {}), field_base="base")(plain()(CHOSEN))


@pytest.mark.parametrize("text", ["user", "age", "message", "e"])
@pytest.mark.parametrize("name", ["base", "chosen", "rejected"])
def test_response_that_axolotl_cuts_at_the_wrong_place_is_reported(name, text):
    """axolotl 0.19 looks for the response's text from the start of a template that has it too."""
    transform = strategy_of("chat_template.default", {"field_messages": "prompt"})
    row = plain()(CHOSEN) | {"base": BASE, name: text}
    if len(transform(plain()("user"))["chosen"]) > len("user<|im_end|>"):
        with pytest.raises(RowError, match=f"{name} is so short"):
            BaseRenderer(transform, field_base="base")(row)
    else:  # mended in axolotl 0.21
        assert BaseRenderer(transform, field_base="base")(row)[name] == f"{text}<|im_end|>"
