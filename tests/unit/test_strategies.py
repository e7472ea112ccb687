"""Rows of the formats that aren't chat templates: the base response is rendered as the chosen one is.

The oracle: the same strategy on a row whose chosen response *is* the base text. Rendered base and oracle
must be equal to the letter. The chat formats are in test_template.py and test_conversation.py.
"""

import copy
import inspect
from functools import partial

import pytest
from axolotl.prompt_strategies.dpo import load as load_strategy
from axolotl.utils.dict import DictDefault
from tiny import make_tokenizer

from bapo_plugin.rows.conversation import fields_of
from bapo_plugin.rows.ends import StopTexts
from bapo_plugin.rows.errors import RowError
from bapo_plugin.rows.origin import source_of
from bapo_plugin.rows.strategies import StrategyRows
from bapo_plugin.rows.words import Words

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


def nectar(response):
    answers = [
        {"answer": REJECTED, "rank": 2},
        {"answer": response, "rank": 3},
        {"answer": "no", "rank": 1},
    ]
    return {"prompt": "why blue?", "answers": answers}


FORMATS = {
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


def reader(transform, base="base", entry=None, words=None):
    stops = StopTexts(make_tokenizer(), {2})
    return StrategyRows(transform, fields_of(entry or {}, base), stops, entry, words)


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
    read = reader(transform, "mine", ds_cfg)
    out = read(row)
    assert row == before, "the row was changed"

    def closed(text):  # a response without an end of its own gets the tokenizer's
        return text if text.endswith("<|im_end|>") else text + "<|im_end|>"

    plain_render = transform(copy.deepcopy(make(CHOSEN)))
    assert out.prompt == out.ask == plain_render["prompt"]
    assert out.chosen == closed(plain_render["chosen"])
    assert out.rejected == closed(plain_render["rejected"])
    assert out.base == closed(transform(copy.deepcopy(make(BASE)))["chosen"])
    assert BASE.strip() in out.base and out.base != out.chosen
    assert "why blue?" in out.words
    # a row like it, by the places that were found; and one that has no base response
    again = read(make("aye") | {"mine": value[shape]})
    assert again.chosen == closed(transform(copy.deepcopy(make("aye")))["chosen"])
    assert again.base == out.base and read(make(CHOSEN)).base is None


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
    assert found == set(FORMATS) | {"chat_template.default", "chat_template.argilla_chat"}


def test_a_strategy_of_ones_own():
    def transform(row):
        return {
            "prompt": row["q"],
            "chosen": f"<<{row['pair'][1].upper()}>>",
            "rejected": row["pair"][0],
        }

    row = {"q": "why", "pair": ["no", "yes"], "base": "maybe"}
    with pytest.raises(RowError, match="found no place"):  # upper() hides the marker
        reader(transform)(row)

    def visible(row):
        return transform(row) | {"chosen": f"<<{row['pair'][1]}>>"}

    assert reader(visible)(row).base == "<<maybe>><|im_end|>"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"base": 7}, "base is of type int; it must be a string, a message or a list"),
        ({"base": [user("why")]}, "must end with a message of the assistant, not of 'user'"),
        ({"base": {"role": "assistant", "content": None}}, "base has no content .it is null"),
        ({"chosen": '[{"role": "user", "content": "why"}]'}, "chosen is messages written as text"),
        ({"chosen": "why blue? arr", "rejected": "why blue? no"}, "both begin with the prompt"),
        ({"system_prompt": "be kind"}, "column 'system_prompt' holds a system message"),
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
            reader(strategy_of(kind, {}))(row)


CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "north"}}}]
LEFT_OUT = "which this `type:` leaves out; use chat_template.default"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"chosen": [user("why blue?"), assistant("a") | {"tool_calls": CALL}]}, f"message of chosen holds tool_calls, {LEFT_OUT}"),
        ({"rejected": [user("why blue?"), assistant("b") | {"thinking": "hm"}]}, f"message of rejected holds thinking, {LEFT_OUT}"),
        ({"base": assistant("") | {"tool_calls": CALL}}, f"message of base holds tool_calls, {LEFT_OUT}"),
        ({"base": "one<|im_end|>\n<|im_start|>user\nand"}, "base goes on behind an end of turn .'<.im_end.>'"),
        ({"tools": '[{"name": "weather"}]'}, f"column 'tools' holds tools, {LEFT_OUT}"),
    ],
)  # fmt: skip
def test_what_a_format_would_leave_out_is_refused(change, match):
    tokenizer = make_tokenizer()
    with pytest.raises(RowError, match=match):
        reader(strategy_of("chatml.argilla_chat", {}), words=Words(tokenizer))(
            conversation(CHOSEN) | change
        )
    for tools in (None, [], "[]", " [ ]", "{}", "null", "None", "a hammer"):
        base = assistant("one") | {"tool_calls": "[]", "reasoning": " "}
        row = conversation(CHOSEN) | {"tools": tools, "base": base | {"tool_calls": []}}
        row["chosen"][-1] |= {"tool_calls": "[]", "reasoning": " "}
        assert reader(strategy_of("chatml.argilla_chat", {}), words=Words(tokenizer))(row).base


def test_empty_system_message_is_fine():
    row = plain(system="")(CHOSEN) | {"base": BASE, "score": 3, "note": None}
    assert reader(strategy_of("chatml.prompt_pairs", {}))(row).base


def test_messages_where_the_type_takes_text():
    row = plain()(CHOSEN) | {"base": BASE, "rejected": [user("why"), assistant("no")]}
    with pytest.raises(RowError, match="rejected is of type list.*takes text there"):
        reader(strategy_of("chatml.prompt_pairs", {}))(row)


def test_a_longer_conversation_than_the_strategy_takes_is_refused():
    """chatml.argilla_chat takes the first two messages, whatever follows."""
    read = reader(strategy_of("chatml.argilla_chat", {}))
    row = conversation("arr")
    row["chosen"] = [user("hello"), assistant("hi"), *row["chosen"]]
    with pytest.raises(
        RowError, match="strategy leaves out message 3 of chosen .'why blue\\?'.; use"
    ):
        read(row)
    row = conversation("arr")
    row["rejected"][0] = user("another question")
    with pytest.raises(RowError, match="leaves out message 1 of rejected .'another question'"):
        read(row)


def test_binary_columns_are_no_text():
    with pytest.raises(RowError, match="prompt is of type bytes"):
        reader(strategy_of("chatml.prompt_pairs", {}))(plain()("arr") | {"prompt": b"why"})


def test_strategy_that_returns_nothing():
    with pytest.raises(RowError, match="the prompt strategy returned missing, not prompt"):
        reader(lambda row: None)(plain()(CHOSEN) | {"base": BASE})


@pytest.mark.parametrize("base", ["", "  \n", None, []])
def test_an_empty_base_is_none(base):
    row = plain()(CHOSEN) | {"base": base}
    assert reader(strategy_of("chatml.prompt_pairs", {}))(row).base is None


def test_a_chosen_response_made_of_two_places_is_noticed():
    """A base response would get the chosen one's thoughts."""

    def transform(row):
        thought = f"<think>{row['reasoning']}</think>" if row["reasoning"] else ""
        return {"prompt": row["q"], "chosen": thought + row["chosen"], "rejected": row["rejected"]}

    read = reader(transform)
    row = {"q": "why blue?", "chosen": CHOSEN, "rejected": REJECTED, "reasoning": ""}
    assert read(row | {"base": BASE}).base.strip() == BASE.strip() + " <|im_end|>"
    with pytest.raises(RowError, match=r"of two places of the row, chosen and reasoning"):
        read(row | {"reasoning": "the ship", "base": BASE})
    assert read(row | {"reasoning": "the ship"}).base is None, "a generated one has its own"


def test_a_response_of_the_user_is_refused():
    row = conversation(CHOSEN)
    row["rejected"] = [*row["rejected"], user("thanks")]
    with pytest.raises(
        RowError, match="rejected must end with a message of the assistant, not of 'user'"
    ):
        reader(strategy_of("chatml.ultra", {}))(row)


def test_the_source_of_a_strategy_follows_what_it_imports(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_words.py").write_text("GREETING = 'hello'\n")
    (tmp_path / "my_strategy.py").write_text(
        "import my_words\ndef transform(row):\n    return row | {'prompt': my_words.GREETING}\n"
    )
    import my_strategy

    before = source_of(partial(my_strategy.transform))
    assert [name for name, _ in before] == ["my_strategy", "my_words"]
    (tmp_path / "my_words.py").write_text("GREETING = 'aye'\n")
    assert source_of(my_strategy.transform) != before
    assert source_of(strategy_of("chatml.intel", {})) == [], "axolotl's have a version"
