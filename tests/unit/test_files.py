"""Files of rows that can't be read, or would lose words: the error names the line; those that are only unusual are read."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from axolotl.utils.dict import DictDefault
from datasets import load_dataset

from bapo_plugin.rows.conversation import fields_of, read_conversation
from bapo_plugin.rows.sources import raw_rows

ROW = {"prompt": "why", "chosen": "a", "rejected": "b"}


def read(tmp_path, data, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    ((_, rows),) = raw_rows(DictDefault({"path": str(path), "split": "train"}), "datasets[0]")
    return rows


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            lines(ROW, '{"prompt": "x", "chosen": ', ROW),
            "line 2: .*Expecting value at character 27",
        ),
        (lines(ROW, ROW, '{"prompt": '), "line 3: "),
        ("5\n" + lines(ROW) + '"x"\n', "line 1: '5': no object.*line 3"),
        (lines('{"prompt": "a", "prompt": "b"}'), "line 1: .*the key 'prompt' stands twice"),
        (lines(ROW, '{"prompt": "\\ud800"}'), "line 2: .*half of a surrogate pair"),
        (lines(ROW | {"x": json.loads("[" * 99 + "]" * 99)}), "line 1: .*nested too deep"),
        (lines(ROW | {"x": 10**30}, ROW | {"x": ["a"]}), "line 1: .*the number 1000.* is too big"),
        ("\0\0\n" + lines(ROW), "line 1: "),
        ("", "is empty"),
        (lines(ROW).encode("utf-16"), "line 1: it is not UTF-8 .*; save the file as UTF-8"),
    ],
)
def test_the_line_is_named(tmp_path, text, said):
    with pytest.raises(ValueError, match=rf"(?s)datasets\[0\] can't be loaded: .*{said}"):
        read(tmp_path, text)


@pytest.mark.parametrize("half", ["\\ud800 a", "\\udc00", "\\ud83d\\ude00\\ude00", "\\uDBFFx"])
def test_half_a_character_is_not_dropped_without_a_word(tmp_path, half):
    """`datasets` drops it in lists, and where a column has several types."""
    row = json.dumps(ROW).replace("why", half)
    with pytest.raises(ValueError, match="row 2: it holds half of a surrogate pair"):
        read(tmp_path, f"[{json.dumps(ROW)}, {row}]", "rows.json")
    with pytest.raises(ValueError, match="line 2: .*half of a surrogate pair"):
        read(tmp_path, lines(ROW | {"prompt": 5}, row))


@pytest.mark.parametrize("whole", ["\U0001f600", "\\ud800 as text", "\U0001f600\U0001f600"])
def test_whole_characters_are_none_of_their_halves(tmp_path, whole):
    rows = [ROW | {"prompt": whole}]
    assert read(tmp_path, json.dumps(rows), "rows.json")[0]["prompt"] == whole


def test_a_list_of_rows_is_named_by_row(tmp_path):
    rows = [ROW | {"x": "a"}, ROW | {"x": 10**30}]
    with pytest.raises(ValueError, match="row 2: the number 1000"):
        read(tmp_path, json.dumps(rows), "rows.json")


def test_text_that_is_not_utf8_is_found_before_it_is_read(tmp_path):
    data = lines(ROW, ROW).encode() + '{"prompt": "é"}\n'.encode("latin-1")
    with pytest.raises(ValueError, match="row 3 .*column 'prompt' is not UTF-8; save the file"):
        read(tmp_path, data)


def test_csv_with_a_nul_byte_would_lose_words(tmp_path):
    with pytest.raises(ValueError, match="line 2 holds a NUL byte, .*; take it out"):
        read(tmp_path, b"prompt,chosen,rejected\na\x00b,c,d\n", "rows.csv")


@pytest.mark.parametrize(
    ("data", "name", "prompt"),
    [
        (b"\xef\xbb\xbfprompt,chosen,rejected\nwhy,a,b\n", "rows.csv", "why"),
        (b"\xef\xbb\xbf" + lines(ROW).encode(), "rows.jsonl", "why"),
        (lines(ROW).replace("\n", "\r\n\r\n"), "rows.jsonl", "why"),
        (json.dumps(ROW | {"prompt": "a\u2028b"}, ensure_ascii=False), "rows.jsonl", "a\u2028b"),
        (lines(ROW | {"prompt": "nul \0"}), "rows.jsonl", "nul \0"),
        (lines(ROW | {"prompt": "x" * 2**20}), "rows.jsonl", "x" * 2**20),
        (lines(ROW, ROW | {"prompt": 5}, ROW | {"prompt": ["z"]}), "rows.jsonl", "why"),
    ],
)
def test_unusual_files_are_read(tmp_path, data, name, prompt):
    rows = read(tmp_path, data, name)
    assert rows[0] == ROW | {"prompt": prompt}


def test_parquet_of_another_schema_is_read_and_its_rows_are_judged(tmp_path):
    pq.write_table(pa.table({"question": ["a"], "n": [1]}), tmp_path / "rows.parquet")
    assert read(tmp_path, (tmp_path / "rows.parquet").read_bytes(), "x.parquet").column_names == [
        "question",
        "n",
    ]


def call(arguments, **more):
    function = {"name": "pay", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]} | more


def tool(**schema):
    return [{"type": "function", "function": {"name": "pay", "parameters": schema}}]


# what Arrow's types would change: whole numbers beside a fraction, long numbers, nulls, order, dates; and where keys
# differ, numbers with more than ten decimals
CALLS = [
    {"prompt": "one", "tools": tool(a=0, b="2024-05-01"), "rejected": "no",
     "chosen": [call({"n": 3, "long": 12345678901234567, "xs": [1, 2.5], "day": "2024-05-01", "memo": None, "o": {}})]},
    {"prompt": "two", "tools": tool(b="2024-05-02", a=0.5), "rejected": "no",
     "chosen": [call({"memo": "x", "long": 0.5, "n": 2.5, "xs": [1], "day": "2024-05-02", "o": {}})]},
    {"prompt": "three", "tools": None, "chosen": [{"role": "assistant", "content": "no"}], "rejected": "no"},
    {"prompt": "four", "tools": tool(c=0.1234567890123), "chosen": [call('{"n": 1.0}')], "rejected": call({"x": 1e-12})},
]  # fmt: skip


def read_calls(tmp_path, monkeypatch, rows, name="rows.jsonl", **entry):
    """(tools, arguments of chosen) of each row, as the template gets them, and the prompts."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / name
    if rows is not None:
        text = json.dumps(rows) if name.endswith(".json") else lines(*rows)
        path.write_text(text, encoding="utf-8")
    fields = fields_of({"field_messages": "prompt"}, "base")
    entry = DictDefault({"path": str(path), "split": "train"} | entry)
    found = []
    for _, rows in raw_rows(entry, "datasets[0]", None, fields):
        for row in rows:
            made = read_conversation(row, fields)
            calls = made.chosen.get("tool_calls", ())
            found.append([row["prompt"], made.tools, [c["function"]["arguments"] for c in calls]])
    return found


def said_by(rows):
    found = []
    for row in rows:
        last = row["chosen"][-1]
        given = [c["function"]["arguments"] for c in last.get("tool_calls", ())]
        given = [json.loads(g) if isinstance(g, str) else g for g in given]
        found.append([row["prompt"], row["tools"], given])
    return found


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("part", [slice(0, 2), slice(0, 4), slice(2, 4)])
def test_tools_and_calls_are_those_of_the_file(tmp_path, monkeypatch, name, part):
    rows = CALLS[part]
    found = read_calls(tmp_path, monkeypatch, rows, name)
    # as text: numbers and the order of keys too
    assert json.dumps(found) == json.dumps(said_by(rows))


@pytest.mark.parametrize(
    ("entry", "numbers"),
    [
        ({"split": "train[1:3]"}, [1, 2]),
        ({"split": "train[2:]+train[:1]"}, [2, 3, 0]),
        ({"shards": 2, "shards_idx": 1}, [2, 3]),
        ({"preprocess_shards": 4}, [0, 1, 2, 3]),
        ({"split": None}, [0, 1, 2, 3]),
    ],
)
def test_tools_and_calls_of_a_part_of_a_file(tmp_path, monkeypatch, entry, numbers):
    found = read_calls(tmp_path, monkeypatch, CALLS, **entry)
    assert json.dumps(found) == json.dumps(said_by([CALLS[i] for i in numbers]))


def test_tools_and_calls_of_a_folder(tmp_path, monkeypatch):
    folder, other = tmp_path / "rows", CALLS[0] | {"prompt": "five"}
    folder.mkdir()
    (folder / "one.jsonl").write_text(lines(CALLS[0]), encoding="utf-8")
    (folder / "two.jsonl").write_text(lines(other), encoding="utf-8")
    files = [str(folder / "two.jsonl"), str(folder / "one.jsonl")]
    entry = {"data_files": files, "ds_type": "json"}
    found = read_calls(tmp_path, monkeypatch, None, "rows", **entry)
    assert json.dumps(found) == json.dumps(said_by([other, CALLS[0]]))
    (folder / "one.jsonl").rename(tmp_path / "one.jsonl")
    assert json.dumps(read_calls(tmp_path, monkeypatch, None, "rows")) == json.dumps(
        said_by([other])
    )
    (tmp_path / "one.jsonl").rename(folder / "one.jsonl")
    with pytest.raises(ValueError, match="in a folder .*; name the file itself with `path:`"):
        read_calls(tmp_path, monkeypatch, None, "rows")
    for i, name in enumerate(("one", "two")):
        row = CALLS[i] | {"tools": None, "chosen": [call('{"n": 1.0}')]}
        (folder / f"{name}.jsonl").write_text(lines(row), encoding="utf-8")
    found = read_calls(tmp_path, monkeypatch, None, "rows")
    assert [arguments for _, _, arguments in found] == [[{"n": 1.0}], [{"n": 1.0}]]


def test_tools_and_calls_of_a_packed_file(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines(*CALLS[:2]).encode()))
    found = read_calls(tmp_path, monkeypatch, None, "rows.jsonl.gz", ds_type="json")
    assert json.dumps(found) == json.dumps(said_by(CALLS[:2]))


def test_what_has_types_of_its_own_stays(tmp_path, monkeypatch):
    """A saved data set still names the file that it was made of, whatever was done to it since."""
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(*CALLS[:2]), encoding="utf-8")
    made = load_dataset("json", data_files=str(path), split="train")
    made = made.map(lambda row: row | {"prompt": "new"})
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "rows.parquet")
    for name in ("saved", "rows.parquet"):
        found = read_calls(tmp_path, monkeypatch, None, name)
        assert [prompt for prompt, _, _ in found] == ["new", "new"] and found[0][2][0]["n"] == 3.0
    assert not (tmp_path / "cache" / "bapo").exists()


def test_calls_that_are_text_need_no_copy(tmp_path, monkeypatch):
    rows = [CALLS[3] | {"tools": json.dumps(CALLS[3]["tools"]), "rejected": "no"}]
    (row,) = read_calls(tmp_path, monkeypatch, rows)
    assert row == ["four", CALLS[3]["tools"], [{"n": 1.0}]]
    assert not (tmp_path / "cache" / "bapo").exists()


def test_calls_that_cannot_be_read_from_the_file(tmp_path, monkeypatch):
    text = json.dumps(CALLS[0], indent=1) + "\n" + json.dumps(CALLS[1], indent=1)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(
        ValueError, match="(?s)'tools' are objects, .* as JSON text, or mend .*line 1"
    ):
        read_calls(tmp_path, monkeypatch, None)
