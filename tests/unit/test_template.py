"""A conversation is written by the model's own template, to the token; what it can't write is refused.

The oracle is `apply_chat_template` on the whole conversation.
"""

import json
import time
from datetime import datetime

import pytest
from axolotl.utils.chat_templates import get_chat_template
from templates import AXOLOTL, STANDS_FOR, TEMPLATES, known, tokenizer_of
from tiny import CHATML, make_tokenizer

from bapo_plugin.rows.chat import ChatRows
from bapo_plugin.rows.conversation import Fields
from bapo_plugin.rows.errors import RowError
from bapo_plugin.rows.template import ChatTemplate
from bapo_plugin.rows.tokens import Encoder, prepare_batch
from bapo_plugin.rows.tools import read_tools

DAY = datetime(2026, 11, 25, 12, 30)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


HISTORIES = {
    "one turn": [user("why is the sky blue")],
    "two turns": [user("hello friend"), assistant("hello"), user("why blue?")],
    "a header's word": [user("assistant")],
    "think": [user("think")],
    "odd": [user("日本語 🙂 naïve\n\n- a\n- b")],
}
CHOSEN, REJECTED, BASE = "arr the sea be blue", "the sea is water", "it is the sun"


def row_of(history, **more):
    return {"messages": history, "chosen": CHOSEN, "rejected": REJECTED} | more


def rows_of(tokenizer, text, stops=(), now=DAY):
    return ChatRows(ChatTemplate(tokenizer, text, stops, now), Fields())


def prepared(tokenizer, read, row):
    batch = {key: [value] for key, value in row.items()}
    out = prepare_batch(batch, [0], read, Encoder(tokenizer, from_template=True), 4096, "drop")
    assert not out["problem"][0], out["problem"][0]
    return {key: values[0] for key, values in out.items()}


def whole(tokenizer, text, history, answer, end):
    """The oracle: text and tokens of the conversation up to the end of its last turn."""
    message = assistant(answer) if isinstance(answer, str) else answer
    written = tokenizer.apply_chat_template(
        [*history, message], chat_template=text, tokenize=False, strftime_now=DAY.strftime
    )
    words = message["content"].split("</think>")[-1].strip()
    stop = written.rindex(words) + len(words)
    found = written.find(end, stop)
    assert found >= 0 or end in ("<|user|>", ""), written
    written = written[: found + len(end)] if found >= 0 else written + end
    return written, tokenizer(written, add_special_tokens=False)["input_ids"]


def test_every_template_says_what_it_stands_for():
    assert set(TEMPLATES) == set(STANDS_FOR)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_response_are_the_templates_own_text(name, history):
    tokenizer, text, stops, end = known(name)
    history = HISTORIES[history]
    check(tokenizer, text, stops, end, history)


@pytest.mark.parametrize("history", ["one turn", "two turns"])
@pytest.mark.parametrize("name", AXOLOTL)
def test_axolotls_templates(name, history):
    special, eos, end = AXOLOTL[name]
    text = get_chat_template(name)
    tokenizer = tokenizer_of(special, special[0], eos, text)
    ids = [tokenizer.convert_tokens_to_ids(eos), tokenizer.convert_tokens_to_ids(end)]
    check(tokenizer, text, ids, end, HISTORIES[history])


def check(tokenizer, text, stops, end, history):
    read = rows_of(tokenizer, text, stops)
    out = prepared(tokenizer, read, row_of(history))
    for response, answer in (("chosen", CHOSEN), ("rejected", REJECTED)):
        expected, ids = whole(tokenizer, text, history, answer, end)
        assert out["prompt"] + out[response] == expected
        assert out["prompt_ids"] + out[f"{response}_ids"] == ids
        assert answer in out[response]
    ask = tokenizer.apply_chat_template(
        history, chat_template=text, tokenize=False, add_generation_prompt=True, strftime_now=DAY.strftime
    )  # fmt: skip
    # what the model is asked with, and a generated answer right behind it
    assert out["lacks"] and out["ask"] == ask
    ids = tokenizer(ask, add_special_tokens=False)["input_ids"]
    assert out["prompt_ids"] + out["open_ids"] == ids
    # a base response that was cut goes on from there to the letter
    cut = prepared(tokenizer, read, row_of(history, base=BASE, base_cut=True))
    assert cut["prompt"] + cut["base"] == ask + BASE
    assert not cut["base"].endswith(end) or not end
    # one that a row brings is written as the answer of a conversation
    own = prepared(tokenizer, read, row_of(history, base=BASE))
    assert own["prompt"] + own["base"] in (
        whole(tokenizer, text, history, BASE, end)[0],
        ask + BASE + end,
    )
    assert own["base"].endswith(end)


@pytest.mark.parametrize(
    "text", ["A", "I", "user", "assistant", "z", "think", "arr \n", "\n\narr", " arr"]
)
@pytest.mark.parametrize(
    "name", ["llama3.1", "gemma", "qwen3", "mistral", "gpt-oss", "chatml", "r1"]
)
def test_answers_of_any_words_and_white_space(name, text):
    tokenizer, template, stops, end = known(name)
    read = rows_of(tokenizer, template, stops)
    history = HISTORIES["one turn"]
    out = prepared(tokenizer, read, row_of(history, base=text) | {"chosen": text})
    expected, ids = whole(tokenizer, template, history, text, end)
    assert (
        out["prompt"] + out["chosen"] == expected and out["prompt_ids"] + out["chosen_ids"] == ids
    )
    # what a model said is not trimmed; in front of it is what the template writes before any answer, or nothing
    ask = prepared(tokenizer, read, row_of(history))["ask"]
    opened, _, _ = whole(tokenizer, template, history, "zebra", end)[0].rpartition("zebra")
    said = out["prompt"] + out["base"]
    assert said in (ask + text + end, opened + text + end) and said.startswith(ask)
    assert said == expected or text != text.strip() or not expected.startswith(ask)
    assert (
        out["prompt_ids"] + out["base_ids"]
        == tokenizer(said, add_special_tokens=False)["input_ids"]
    )


TRIM = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")


@pytest.mark.parametrize(
    ("name", "text", "base", "expected"),
    [
        ("chatml", TRIM, " sea \n", " sea \n"),
        ("chatml", TRIM, " sea \n<|im_end|>\n", " sea \n"),
        ("qwen3", None, "<think>moon</think>sea", "<think>moon</think>sea"),
        ("qwen3", None, "<think>\nmoon\n</think>\n\nsea", "<think>\nmoon\n</think>\n\nsea"),
        ("qwen3", None, "\n\nsea", "\n\nsea"),
        ("qwen3", None, "sea\n", "<think>\n\n</think>\n\nsea\n"),
        ("qwen3", None, "<|im_end|>", ""),
        ("thinking", None, "<think>\nmoon\n</think>\n\nsea", "moon\n</think>\n\nsea"),
        ("mistral", None, "sea", " sea"),
        ("gpt-oss", None, "sea", "<|channel|>final<|message|>sea"),
        ("gpt-oss", None, "<|channel|>final<|message|>sea", "<|channel|>final<|message|>sea"),
    ],
)  # fmt: skip
def test_a_base_response_is_taken_to_the_letter(name, text, base, expected):
    tokenizer, template, stops, end = known(name)
    read = rows_of(tokenizer, text or template, stops)
    ask = prepared(tokenizer, read, row_of([user("why")]))["ask"]
    out = prepared(tokenizer, read, row_of([user("why")], base=base))
    assert out["prompt"] + out["base"] == ask + expected + end


def test_text_and_tokens_of_a_base_response_are_the_same():
    tokenizer, template, stops, end = known("qwen3")
    read = rows_of(tokenizer, template, stops)
    ask = prepared(tokenizer, read, row_of([user("why")]))["ask"]
    ids = tokenizer("sea" + end, add_special_tokens=False)["input_ids"]
    out = prepared(tokenizer, read, row_of([user("why")], base="sea", base_tokens=ids))
    assert out["prompt"] + out["base"] == ask + "sea" + end
    assert out["prompt_ids"] + out["base_ids"] == tokenizer(ask)["input_ids"] + ids


def test_the_tokens_of_a_base_response_end_where_it_ended():
    tokenizer, template, stops, _ = known("chatml")
    read = rows_of(tokenizer, template, stops)
    for base, given, cut, taken in [
        ("sea", "sea<|im_end|>", False, True),
        ("sea<|im_end|>", "sea<|im_end|>", False, True),
        ("sea <|im_start|>", "sea <|im_start|><|im_end|>", False, True),
        ("sea", "sea", True, True),
        ("sea", "sea", False, False),
        ("sea", "sea<|im_start|>", False, False),
        ("sea", "sea<|im_end|><|im_end|>", False, False),
        ("sea", "sea<|im_end|>", True, False),
        ("sea<|im_end|>", "sea<|im_end|>", True, False),
        ("sea", "moon<|im_end|>", False, False),
    ]:
        ids = tokenizer(given, add_special_tokens=False)["input_ids"]
        row = row_of([user("why")], base=base, base_cut=cut, base_tokens=ids)
        out = prepared(tokenizer, read, row)
        assert ("left aside" in out["notice"]) != taken, (base, given, cut)
        if taken:
            assert out["base_ids"] == ids
        # whether taken or not: an end of turn where it ended, none where a limit cut it
        assert (out["base_ids"][-1] == tokenizer.eos_token_id) != cut


def test_thoughts_of_a_row():
    thought = "<think>\nthe ship\n</think>\n\narr blue"
    for name in ("qwen3", "thinking"):
        tokenizer, template, stops, end = known(name)
        read = rows_of(tokenizer, template, stops)
        out = prepared(tokenizer, read, row_of([user("why")], chosen=thought, base=thought))
        assert (
            out["prompt"] + out["chosen"]
            == "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n" + thought + end
        )
        assert out["chosen"] == out["base"]
    with_key = row_of([user("why")], chosen=assistant("arr blue", reasoning_content="the ship"))
    tokenizer, template, stops, _ = known("qwen3")
    assert prepared(tokenizer, rows_of(tokenizer, template, stops), with_key)["chosen"].startswith(
        "<think>\nthe ship"
    )
    tokenizer, template, stops, _ = known("r1")
    with pytest.raises(
        RowError, match="does not write chosen as the row has it.*leaves thoughts out"
    ):
        rows_of(tokenizer, template, stops)(row_of([user("why")], chosen=thought))
    # a key that the template doesn't know
    tokenizer, template, stops, _ = known("chatml")
    with pytest.raises(RowError, match="leaves thoughts out"):
        rows_of(tokenizer, template, stops)(with_key)


def test_old_thoughts_may_be_dropped():
    history = [user("hello"), assistant("<think>\nhm\n</think>\n\nhello"), user("why")]
    tokenizer, template, stops, _ = known("qwen3")
    assert (
        "hm"
        not in prepared(tokenizer, rows_of(tokenizer, template, stops), row_of(history))["prompt"]
    )


@pytest.mark.parametrize(
    ("base", "cut", "expected"),
    [
        ("</think>\n\nit is the sea", False, "</think>\n\nit is the sea<|im_end|>"),
        ("the sky\n</think>\n\nit is", False, "the sky\n</think>\n\nit is<|im_end|>"),
        ("what is the question", True, "what is the question"),
        ("it is", False, "</think>\n\nit is<|im_end|>"),
    ],
)
def test_a_base_response_goes_on_where_the_prompt_opens_a_thought(base, cut, expected):
    """The README's own template: axolotl's qwen3 ends prompts with an open <think>."""
    text = get_chat_template("qwen3")
    tokenizer = tokenizer_of(
        ["<|im_start|>", "<|im_end|>", "<think>", "</think>"], None, "<|im_end|>"
    )
    read = rows_of(tokenizer, text, [tokenizer.eos_token_id])
    out = prepared(tokenizer, read, row_of([user("why")], base=base, base_cut=cut))
    assert out["prompt"].endswith("<think>\n\n") and out["base"] == expected
    assert out["chosen"] == f"</think>\n\n{CHOSEN}<|im_end|>"


def test_a_generated_answer_follows_what_the_template_opens():
    """R1's generation prompt opens a thought that answers are written without: it belongs to the base response."""
    tokenizer, template, stops, _ = known("r1")
    out = prepared(tokenizer, rows_of(tokenizer, template, stops), row_of([user("why")]))
    assert tokenizer.decode(out["open_ids"]) == "<think>\n" and out["prompt"].endswith(
        "<|Assistant|>"
    )
    assert out["chosen"] == CHOSEN + "</s>"


def test_an_end_of_turn_that_a_row_brings_is_not_doubled():
    tokenizer, template, stops, _ = known("chatml")
    read = rows_of(tokenizer, template, stops)
    for tail in ("<|im_end|>", "<|im_end|>\n", " <|im_end|><|im_end|>"):
        out = prepared(
            tokenizer, read, row_of([user("why")], chosen=CHOSEN + tail, base=BASE + tail)
        )
        assert out["chosen"].count("<|im_end|>") == 1 and out["base"].count("<|im_end|>") == 1
        assert "brings an end of turn of its own" in out["notice"]


def test_an_end_of_turn_inside_a_response_is_refused():
    """A model never says it and goes on."""
    tokenizer, template, stops, _ = known("chatml")
    read = rows_of(tokenizer, template, stops)
    turns = "arr<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\nok"
    for part in ("chosen", "rejected", "base"):
        with pytest.raises(RowError, match=f"{part} goes on behind an end of turn"):
            read(row_of([user("why")], base=BASE) | {part: turns})
    with pytest.raises(RowError, match="chosen is empty but for an end of turn"):
        read(row_of([user("why")], chosen="<|im_end|>"))


def test_white_space_that_is_a_token_is_text():
    """Gemma and GPT-NeoX have tokens of line feeds and of blanks."""
    tokenizer, template, stops, end = known("gemma")
    tokenizer.add_tokens(["\n" * n for n in range(1, 20)] + [" " * n for n in range(2, 20)])
    made = ChatTemplate(tokenizer, template, [tokenizer.eos_token_id], DAY)
    assert made.end == end and tokenizer.decode([made.end_id]) == end
    text = "one" + "\n" * 40 + " " * 4000 + "two"
    started = time.monotonic()
    out = prepared(
        tokenizer, rows_of(tokenizer, template, stops), row_of([user("why")], chosen=text)
    )
    assert out["chosen"] == text + end and time.monotonic() - started < 30


@pytest.mark.parametrize("words", ["yes", "I", "continue"])
def test_a_system_message_that_only_the_prompt_has_is_refused(words):
    """Mistral's templates write it into the last turn, and only if that is the user's."""
    template = TEMPLATES["mistral"][0]
    tokenizer, _, stops, _ = known("mistral")
    history = [user("say continue, I or yes"), assistant("yes I continue"), user(words)]
    out = prepared(tokenizer, rows_of(tokenizer, template, stops), row_of(history))
    assert out["prompt"].endswith(f"[INST] {words}[/INST]")
    only_last = template.replace(
        "loop.last and system", "loop.last and m is sameas messages[-1] and system"
    )
    with pytest.raises(RowError, match="leaves out words of message 1|writes the prompt otherwise"):
        rows_of(tokenizer, only_last.replace("{%- else %}{{- ' '", "{%- elif m.role == 'assistant' %}{{- ' '").replace("loop.last and m is sameas messages[-1]", "messages[-1].role == 'user' and loop.last"), stops)(row_of([{"role": "system", "content": "be kind"}, *history]))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("command-r7b", "<|START_RESPONSE|>it is<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ("gpt-oss", "<|channel|>final<|message|>it is<|return|>"),
        ("qwen3", "<think>\nI know"),
    ],
)
def test_a_base_response_in_the_models_own_words_is_taken_to_the_letter(name, base):
    tokenizer, template, stops, end = known(name)
    out = prepared(tokenizer, rows_of(tokenizer, template, stops), row_of([user("why")], base=base))
    ask = tokenizer.apply_chat_template([user("why")], tokenize=False, add_generation_prompt=True)
    assert out["prompt"] + out["base"] == ask + base.removesuffix(end) + end


def test_thoughts_that_the_answer_repeats_are_missed_too():
    tokenizer, template, stops, _ = known("chatml")
    chosen = assistant("the answer is 4", reasoning_content="4")
    with pytest.raises(RowError, match="leaves thoughts out"):
        rows_of(tokenizer, template, stops)(row_of([user("why")], chosen=chosen))


def test_words_that_switch_a_template_are_not_missed():
    tokenizer, template, stops, _ = known("smollm2")
    switch = template.replace("m['content']", "(m['content'] | replace('/no_think', ''))")
    history = [{"role": "system", "content": "be plain /no_think"}, user("why")]
    assert (
        "be plain"
        in prepared(tokenizer, rows_of(tokenizer, switch, stops), row_of(history))["prompt"]
    )


def test_text_that_is_no_text():
    tokenizer, template, stops, _ = known("chatml")
    read = rows_of(tokenizer, template, stops)
    batch = {"messages": ["why"], "chosen": ["x\ud800"], "rejected": ["no"]}
    out = prepare_batch(batch, [0], read, Encoder(tokenizer, True), 64, "drop")
    assert "which is no character" in out["problem"][0]


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def test_all_calls_and_their_arguments():
    tokenizer, template, stops, _ = known("llama3.1")  # writes the first call only
    read = rows_of(tokenizer, template, stops)
    two = call() + call(arguments='{"city": "oslo"}')
    with pytest.raises(RowError, match="doesn't write the tool call 'weather' of chosen with all"):
        read(
            row_of([user("rain?")], chosen={"role": "assistant", "content": "", "tool_calls": two})
        )
    tokenizer, _, stops, _ = known("chatml")
    joined = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}")  # fmt: skip
    chosen = {"role": "assistant", "content": "", "tool_calls": two}
    out = prepared(
        tokenizer, rows_of(tokenizer, joined, stops), row_of([user("rain?")], chosen=chosen)
    )
    assert out["chosen"].startswith('weather{"city": "sea"}weather{"city": "oslo"}')


def call(name="weather", arguments='{"city": "sea"}'):
    return [{"type": "function", "function": {"name": name, "arguments": arguments, "extra": None}}]


def test_tools():
    tokenizer, template, stops, _ = known("llama3.1")
    read = rows_of(tokenizer, template, stops)
    history = [user("rain?"), {"role": "assistant", "content": None, "tool_calls": call()}, {"role": "tool", "content": 'it "rains"\n'}]  # fmt: skip
    out = prepared(tokenizer, read, row_of(history))
    assert '{"city": "sea"}' in out["prompt"], "arguments are a mapping, not text in quotes"
    out = prepared(
        tokenizer,
        read,
        row_of([user("rain?")], chosen={"role": "assistant", "content": "", "tool_calls": call()}),
    )
    assert out["chosen"].endswith("}<|eom_id|>")
    tokenizer, template, stops, _ = known("gemma")
    read = rows_of(tokenizer, template, stops)
    with pytest.raises(RowError, match="doesn't write the tool call 'weather'"):
        read(
            row_of(
                [user("rain?")], chosen={"role": "assistant", "content": "x", "tool_calls": call()}
            )
        )
    with pytest.raises(RowError, match="doesn't write the tool 'weather' into the prompt"):
        read(row_of([user("rain?")], tools=[TOOL]))


def test_tools_written_as_text_keep_their_nulls():
    """A default of null, as pydantic writes it; only a table puts nulls where a row has nothing."""
    unit = {"type": "string", "default": None, "enum": ["c", None]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"unit": unit}}}
    assert read_tools(json.dumps([tool]), "tools") == [tool]
    del unit["default"]
    padded = tool | {"function": tool["function"] | {"strict": None}}
    assert read_tools([padded], "tools") == [tool]


def test_a_system_message_within_that_of_the_template_is_not_there():
    """Qwen's own message holds the most common one."""
    tokenizer, template, stops, _ = known("chatml")
    own = "<|im_start|>system\nYou are Qwen. You are a helpful assistant.<|im_end|>\n"
    own = f"{{% if messages[0].role != 'system' %}}{{{{ {own!r} }}}}{{% endif %}}"
    read = rows_of(tokenizer, own + template, stops)
    assert "You are Qwen" in read(row_of([user("why")])).prompt
    with pytest.raises(RowError, match="column 'system' holds a system message"):
        read(row_of([user("why")]) | {"system": "You are a helpful assistant."})
    # where there is no role for it, the user says it
    for history in (
        [user("be plain\n\nwhy")],
        [{"role": "system", "content": "be plain\nhm"}, user("why")],
    ):
        assert read(row_of(history) | {"system": "be plain "})


@pytest.mark.parametrize(
    ("name", "history", "match"),
    [
        ("gemma", [{"role": "system", "content": "be kind"}, user("why")], "refuses the messages.*System role"),
        ("gemma", [user("a b"), user("why")], "refuses the messages.*must alternate"),
        ("smollm3", [{"role": "system", "content": "be kind"}, user("why")], "leaves out words of message 1.*system"),
    ],
)  # fmt: skip
def test_what_a_template_cannot_write_is_refused(name, history, match):
    tokenizer, template, stops, _ = known(name)
    with pytest.raises(RowError, match=match):
        rows_of(tokenizer, template, stops)(row_of(history))


def test_a_template_that_changes_words_is_refused():
    tokenizer = make_tokenizer()
    loud = CHATML.replace("m['content']", "m['content'] | upper")
    with pytest.raises(
        ValueError, match="can't write a question and an answer: the answer 'zebra' became"
    ):
        rows_of(tokenizer, loud)
    asks = CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] if m['role'] != 'user' else m['content'] | upper }}"
    )
    with pytest.raises(RowError, match="leaves out words of message 1"):
        rows_of(tokenizer, asks)(row_of([user("why")]))
    answers = CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] if m['role'] == 'user' else m['content'][:3] }}"
    )
    with pytest.raises(ValueError, match="can't write a question"):
        rows_of(tokenizer, answers)
    answers = answers.replace("[:3]", "[:9]")
    with pytest.raises(
        RowError, match="does not write chosen as the row has it: 'arr the sea be blue' became"
    ):
        rows_of(tokenizer, answers)(row_of([user("why")]))


def test_a_template_that_rewrites_the_prompt_is_refused():
    text = "{% for m in messages %}[{{ m.role }}{{ messages | length }}] {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant{{ messages | length }}] {% endif %}"
    with pytest.raises(RowError, match="writes the prompt otherwise once chosen follows"):
        rows_of(make_tokenizer(), text)(row_of([user("why")]))


def test_the_date_of_a_template_is_the_one_given():
    tokenizer, template, stops, _ = known("granite")
    out = prepared(tokenizer, rows_of(tokenizer, template, stops), row_of([user("why")]))
    assert "Today: November 25, 2026." in out["prompt"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_a_turn(name):
    tokenizer, text, stops, end = known(name)
    template = ChatTemplate(tokenizer, text, stops, DAY)
    assert template.end == end
    if name.endswith("no tokens"):
        assert template.end_id is None  # text that is no token
    else:
        assert tokenizer.decode([template.end_id]) and end.endswith(
            tokenizer.decode([template.end_id])
        )
