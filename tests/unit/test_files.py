"""Files of rows that can't be read, or would lose words: the error names the line; those that are only unusual are read."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from axolotl.utils.dict import DictDefault

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
