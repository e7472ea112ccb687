"""What rows of the chat formats say, and what they must not be."""

import pytest

from bapo_plugin.rows.conversation import fields_of, read_base, read_conversation, read_flag, wrap
from bapo_plugin.rows.errors import RowError
from bapo_plugin.rows.oddities import check_system, odd_order, repeats


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


ROW = {"messages": [user("why blue?")], "chosen": "arr blue", "rejected": assistant("no")}


def read(row=None, entry=None, whole=False, **change):
    return read_conversation((row or ROW) | change, fields_of(entry or {}, "base", whole))


def test_a_row_in_its_forms():
    for prompt in ("why blue?", user("why blue?"), [user("why blue?")], ["why blue?"]):
        for chosen in (
            "arr blue",
            assistant("arr blue"),
            [user("why blue?"), assistant("arr blue")],
        ):
            found = read(messages=prompt, chosen=chosen)
            assert found.history == [user("why blue?")] and found.chosen == assistant("arr blue")
            assert found.rejected == assistant("no") and found.tools is None
    whole = {"chosen": [user("why"), assistant("arr")], "rejected": [user("why"), assistant("no")]}
    found = read(whole, whole=True)
    assert found.history == [user("why")] and found.chosen["content"] == "arr"


def test_sharegpt_and_ones_own_names():
    row = {
        "conversations": [{"from": "human", "value": "why"}],
        "chosen": {"from": "gpt", "value": "arr"},
        "rejected": [{"from": "gpt", "value": "no"}],
    }
    mapping = {"role": "from", "content": "value"}
    entry = {"field_messages": "conversations", "message_property_mappings": mapping}
    assert read(row, entry).history == [user("why")]
    entry = {
        "field_messages": "talk",
        "message_property_mappings": {
            "role": "speaker",
            "content": "text",
            "reasoning_content": "mind",
        },
        "roles": {"user": ["me"], "assistant": "bot"},
    }
    row = {"talk": [{"speaker": "me", "text": "why"}], "chosen": {"speaker": "bot", "text": "arr", "mind": "hm"}, "rejected": "no"}  # fmt: skip
    found = read(row, entry)
    assert found.history == [user("why")] and found.chosen == assistant("arr") | {
        "reasoning_content": "hm"
    }


def test_parts_of_text_are_one_text():
    parts = [{"type": "text", "text": "why "}, {"type": "text", "text": "blue?"}]
    assert read(messages=[user(parts)]).history == [user("why blue?")]
    with pytest.raises(RowError, match="message 1 of prompt has parts that aren't text"):
        read(messages=[user([{"type": "image"}])])


def test_a_system_column_is_used_or_refused():
    row = ROW | {"rule": "be kind"}
    assert read(row, {"field_system": "rule"}).history == [system("be kind"), user("why blue?")]
    own = [system("be kind "), user("why")]
    assert read(row, {"field_system": "rule"}, messages=own).history == own
    own = [system("be kind\nand brief"), user("why")]
    assert read(row, {"field_system": "rule"}, messages=own).history == own
    own = [system("own"), user("why")]
    with pytest.raises(RowError, match="column 'rule' .*'be kind'.* begin with another one .'own'"):
        read(row, {"field_system": "rule"}, messages=own)
    with pytest.raises(
        RowError, match="column 'system' holds a system message.*field_system: system"
    ):
        check_system({"system": "be kind"}, "user: why".__contains__)
    check_system({"system": "be kind", "system_note": None}, "system: be kind".__contains__)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"messages": [user("why"), assistant("arr")]}, "prompt ends with a message of the assistant.*field_messages: prompt"),
        ({"messages": [system("be kind")]}, "no message of the user"),
        ({"messages": [user("hi"), assistant("ho"), user("")]}, "prompt is empty: its last message has no words"),
        ({"messages": [user("hi"), assistant(" "), user("why")]}, "message 2 of the prompt has no words"),
        ({"messages": [user(None)]}, "message 1 of prompt has no content .it is null"),
        ({"messages": [None]}, "message 1 of prompt is missing"),
        ({"messages": [user(5)]}, "content of message 1 of prompt is of type int"),
        ({"messages": ""}, "prompt is empty .column 'messages'"),
        ({"messages": None}, "prompt is missing .column 'messages'"),
        ({"messages": 5}, "prompt is of type int"),
        ({"messages": [{"role": "pirate", "content": "x"}]}, "role 'pirate', which is none of.*roles:"),
        ({"messages": '[{"role": "user", "content": "why"}]'}, "prompt is messages written as text.*json.loads"),
        ({"messages": "[{'from': 'human', 'value': 'why'}]"}, "prompt is messages written as text"),
        ({"chosen": '{"role": "assistant", "content": "why"}'}, "chosen is messages written as text"),
        ({"chosen": [assistant("arr"), user("thanks")]}, "chosen must end with a message of the assistant, not of 'user'"),
        ({"rejected": user("why")}, "rejected must end with a message of the assistant, not of 'user'"),
        ({"chosen": [user("other"), assistant("arr")]}, "chosen brings another history than the prompt"),
        ({"chosen": ""}, "chosen is empty"),
        ({"chosen": None}, "chosen is missing"),
        ({"rejected": assistant("  ")}, "rejected is empty"),
        ({"rejected": 5}, "rejected is of type int"),
        ({"chosen": "why blue? arr", "rejected": "why blue? no"}, "both begin with the prompt"),
        ({"tools": "no json"}, "tools is text that is no JSON"),
        ({"tools": [5]}, "tools is of type list"),
        ({"tools": [{"function": "x"}]}, "tools has an entry that is no function"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "has the role"),
        ({"chosen": assistant("x") | {"tool_calls": 5}}, "tool calls of chosen are of type int"),
        ({"chosen": assistant("x") | {"tool_calls": [{"function": "f"}]}}, "a tool call of chosen is .* must have a function"),
        ({"chosen": assistant("x") | {"reasoning_content": [1]}}, "reasoning_content of chosen is of type list"),
    ],
)  # fmt: skip
def test_rows_that_are_not_what_they_seem(change, match):
    with pytest.raises(RowError, match=match):
        read(**change)


def test_whole_conversations_must_answer_one_history():
    row = {"chosen": [user("why"), assistant("arr")], "rejected": [user("who"), assistant("no")]}
    with pytest.raises(RowError, match="different histories"):
        read(row, whole=True)
    first, other = (
        assistant("") | {"tool_calls": [{"function": {"name": "f", "arguments": {"city": city}}}]}
        for city in ("north", "moon")
    )
    told = [user("why"), first, {"role": "tool", "content": "rain"}]
    row = {"chosen": [*told, assistant("arr")], "rejected": [*told, assistant("no")]}
    assert read(row, whole=True).history == told
    row["rejected"][1] = other
    with pytest.raises(RowError, match="different histories"):
        read(row, whole=True)
    with pytest.raises(RowError, match="chosen has no message before the response"):
        read({"chosen": [assistant("arr")], "rejected": [assistant("no")]}, whole=True)
    with pytest.raises(RowError, match="chosen is of type str.*takes whole conversations"):
        read({"chosen": "arr", "rejected": "no"}, whole=True)


def test_a_missing_column_names_those_there_are():
    with pytest.raises(
        RowError,
        match=r"no column 'messages' with the prompt.*columns: prompt, chosen.*field_messages",
    ):
        read({"prompt": "why", "chosen": "arr", "rejected": "no"})
    with pytest.raises(RowError, match=r"no column 'chosen'.*field_chosen:"):
        read({"messages": "why"})


def base_of(value, **more):
    return read_base({"base": value} | more, fields_of({}, "base"), [user("why")])


def test_base_in_its_forms():
    for value in ("arr", assistant("arr"), [user("why"), assistant("arr")]):
        assert base_of(value) == ("arr", False, None)
    for value in (None, "", " \n", [], assistant(""), [assistant(" ")]):
        assert base_of(value) is None
    thoughtful = assistant("arr") | {"reasoning_content": "hm"}
    assert base_of(thoughtful) == (thoughtful, False, None)
    assert base_of("arr", base_cut=True, base_tokens=[5]) == ("arr", True, (5,))
    for wrong in ("[5]", [[5]], [5.0], [-1], 5):
        with pytest.raises(RowError, match="base_tokens is .*; it must be a list of token ids"):
            base_of("arr", base_tokens=wrong)
    for value, match in (
        (user("why"), "base must end with a message of the assistant, not of 'user'"),
        ([user("who"), assistant("arr")], "base brings another history"),
        (7, "base is of type int; it must be a string, a message or a list"),
    ):
        with pytest.raises(RowError, match=match):
            base_of(value)
    assert read_base({"base": "x"}, fields_of({}, None), []) is None


def test_flags():
    for value, expected in ((True, True), ("True", True), ("false", False), (None, False), (1, True), (0.0, False), ("", False)):  # fmt: skip
        assert read_flag(value, "x") is expected
    with pytest.raises(RowError, match="x is 'maybe'"):
        read_flag("maybe", "x")


def test_odd_but_usable():
    assert odd_order([system("x"), user("a"), assistant("b"), user("c")]) == ""
    assert odd_order([user("a"), user("b")]) == "user, user"
    assert odd_order([assistant("a"), user("b")]) == "assistant first"
    assert odd_order([user("a"), system("x"), user("b")]) == "user, system"
    assert repeats("say a b c d", ("I: say a b c d", "no")) and not repeats("why", ("why not",))


def test_a_response_in_the_form_of_a_column():
    fields = fields_of({}, "base")
    assert wrap("arr", "", fields) == "arr"
    assert wrap("arr", [user("why"), assistant("x")], fields) == [assistant("arr")]
    assert wrap("arr", {"from": "gpt", "value": "x"}, fields) == {"from": "gpt", "value": "arr"}
