"""Mutated rows: what files of preference data hold when nobody has looked at them."""

import copy
import re
from collections.abc import Iterator
from datetime import date
from random import Random
from typing import Any, NamedTuple

WORDS = (
    *("the sea is blue", "why, when and who?", "name three trees:\n- oak\n- ash", "x" * 40, "1.", "Ünïcödé"),
    *("שלום עולם", "مرحبا \u202eabc\u202c", "中文 字", "👩‍👩‍👧 e\u0301", "a\u2028b\u2029c\u0085d", "tab\tand\x0bvt"),
    *("\x00 null", "bell \x07 \x1b[31m", "\ufeffBOM", "\ue000 \U000f0000", "{{ messages }} {% raw %}", "<b>&amp;</b>"),
    *("{'role': 'x'}", '"quoted", "csv"\n;', "\\n \\u0041 \\", "zero\u200bwidth\u00a0nbsp", "  spaces  at ends  "),
    *("<think>\nhm\n</think>\n\nyes", "#" * 300, "a\r\nb\rc", "NaN", "null", "-1", "[INST] x [/INST]", "<s>x</s>"),
)  # fmt: skip
SPECIAL = (
    *("<|im_end|>", "<|im_start|>system\nobey<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>", "<s>"),
    *("<end_of_turn>", "<|end|>", "<|user|>", "[/INST]", "<bos>", "<|im_end|>\n", "<|im_end|><|im_end|>"),
)  # fmt: skip
# in any of the words above
TOKENS = ("[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", *(token.strip() for token in SPECIAL))
ODD: tuple[Any, ...] = (
    *(None, "", "   ", "\n", 0, 5, -1, 2.5, float("nan"), float("inf"), True, False, 10**30),
    *([], {}, [None], [[]], [""], ["a", "b"], [5], ["one"], {"x": 1}, {"content": None}, b"bytes", date(2024, 1, 2)),
    *({"role": "user"}, {"content": "no role"}, {"role": None, "content": "x"}, {"role": "wizard", "content": "x"}),
    *([{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], [{"from": "human", "value": "h"}]),
    *([{"role": "user", "content": ["parts", {"text": "of"}]}], [{"role": "user", "content": [{"image": 1}]}]),
    *([{"role": "system", "content": "s"}], [{"role": 5, "content": "x"}], [{"role": "user", "content": 5}]),
    *([{"role": "assistant", "content": "a", "tool_calls": [{"x": 1}]}], [{"role": ["user"], "content": "x"}]),
    *([{"role": "user", "content": "u"}] * 3, [{"role": "assistant", "content": "a", "tool_calls": 7}]),
    *([{"role": "assistant", "content": "a", "reasoning_content": 5}], {"role": "assistant", "content": " "}),
    *("[{'role': 'user', 'content': 'as text'}]", "\ud800 half", "\udfff", "\ufdd0\ufdd1\ufdd2\ufdd3", "long " * 400),
)  # fmt: skip


class Row(NamedTuple):
    """A mutated row and what was done to it."""

    values: dict[str, Any]
    done: list[str]


def text(random: Random) -> str:
    """Words, with a number that makes them different from others."""
    parts = [random.choice(WORDS) for _ in range(random.choice((1, 1, 2, 5)))]
    return " ".join([*parts, str(random.randrange(10**6))])


def sound(random: Random, whole: bool, messages: bool) -> dict[str, Any]:
    """A row that is as it should be: columns prompt, chosen, rejected, base, extra.

    Args:
        whole: chosen and rejected are whole conversations.
        messages: columns hold messages, not text.
    """
    prompt, chosen, rejected, base = (text(random) for _ in range(4))
    row: dict[str, Any] = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "base": base}
    if messages or whole:
        turns = [{"role": "user", "content": text(random)} for _ in range(random.choice((1, 1, 3)))]
        for i in range(1, len(turns), 2):
            turns[i]["role"] = "assistant"
        row["prompt"] = turns
        for name in ("chosen", "rejected", "base"):
            row[name] = [{"role": "assistant", "content": row[name]}]
    if whole:
        for name in ("chosen", "rejected"):
            row[name] = [*copy.deepcopy(turns), *row[name]]
        row.pop("prompt")
    if random.random() < 0.5:
        row.pop("base")
    return row


def mutated(random: Random, whole: bool, messages: bool) -> Row:
    """A row with none to three faults."""
    row = Row(sound(random, whole, messages), [])
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        random.choice(_MUTATIONS)(random, row)
    return row


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all values inside a value, inner ones included."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def _pick(random: Random, row: Row) -> tuple[Any, Any]:
    path = random.choice(list(places(row.values)) or [("x",)])
    block: Any = row.values
    for key in path[:-1]:
        block = block[key]
    return block, path[-1]


def _retype(random: Random, row: Row) -> None:
    block, key = _pick(random, row)
    block[key] = copy.deepcopy(random.choice(ODD))
    row.done.append(f"{key}: {block[key]!r:.60}")


def _drop(random: Random, row: Row) -> None:
    block, key = _pick(random, row)
    if len(block) > 1:
        del block[key]
        row.done.append(f"{key} dropped")


def _add(random: Random, row: Row) -> None:
    key = random.choice(("system", "tools", "base_cut", "base_tokens", "x", "extra_system_prompt"))
    row.values[key] = copy.deepcopy(random.choice((*ODD, *WORDS)))
    row.done.append(f"{key}: {row.values[key]!r:.60}")


def _special(random: Random, row: Row) -> None:
    """A special token into words."""
    block, key = _pick(random, row)
    if isinstance(block[key], str) and key != "role":
        i = random.choice((0, len(block[key]), random.randrange(len(block[key]) + 1)))
        token = random.choice(SPECIAL)
        block[key] = block[key][:i] + token + block[key][i:]
        row.done.append(f"{key} with {token!r} at {i}")


def _same(random: Random, row: Row) -> None:
    """A column that says what another one says."""
    names = list(row.values)
    one, other = random.choice(names), random.choice(names)
    row.values[one] = copy.deepcopy(row.values[other])
    row.done.append(f"{one} is {other}")


def _long(random: Random, row: Row) -> None:
    block, key = _pick(random, row)
    if isinstance(block[key], str) and key != "role" and len(block[key]) < 1000:
        block[key] *= random.choice((20, 200))
        row.done.append(f"{key} repeated")


def _nest(random: Random, row: Row) -> None:
    block, key = _pick(random, row)
    value = block[key]
    block[key] = random.choice(([value], {"content": value}, {"role": "user", "content": value}))
    row.done.append(f"{key} nested")


_MUTATIONS = (_retype, _retype, _retype, _drop, _add, _special, _special, _same, _long, _nest)


def broken(random: Random, data: bytes) -> bytes:
    """The bytes of a file with a fault: cut, or with bytes too many or others."""
    i = random.randrange(len(data))
    new = random.choice(
        (b"\x00", b"\xff", b"\n", b'"', b"{", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\xed\xa0\x80")
    )
    return random.choice(
        (data[:i], data[:i] + new + data[i:], data[:i] + new + data[i + 1 :], new + data)
    )


def readable(value: Any) -> Any:
    """The value without what makes a whole file unreadable: halves of surrogate pairs, numbers that JSON or 64 bits don't
    hold, and NUL for the sake of CSV."""
    if isinstance(value, int | float) and not abs(value) < 2**63:
        return 5
    if isinstance(value, str):
        return re.sub("[\0\ud800-\udfff]", "", value)
    if isinstance(value, dict):
        return {k: readable(v) for k, v in value.items()}
    return [readable(v) for v in value] if isinstance(value, list) else value
