"""Data sets of a configuration: sources, checks, cache, splits. Through axolotl's own loading."""

import json
import re

import pytest
from axolotl.utils.dict import DictDefault
from tiny import make_rows, write_jsonl

from bapo_plugin import prepare as module
from bapo_plugin.prepare import load_datasets, prepare_rows

ERROR = {"anchors": {"on_missing": "error"}}


@pytest.fixture
def config(tmp_path):
    def make(rows=None, **changes):
        entry = {
            "path": str(
                write_jsonl(tmp_path / "rows.jsonl", make_rows(12) if rows is None else rows)
            ),
            "split": "train",
            "type": "chatml.prompt_pairs",
        }
        base = {
            "datasets": [entry],
            "bapo": {},
            "sequence_len": 256,
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "seed": 1,
            "num_epochs": 1,
            "batch_size": 4,
        }
        return DictDefault(base | changes)

    return make


def test_rows_in_order_with_ids_and_text(config, chatml):
    train, evaluation = prepare_rows(config(), chatml)
    assert len(train) == 12 and evaluation is None
    for row, source in zip(train, make_rows(12), strict=True):
        assert row["base"] == source["base"] + "<|im_end|>"
        assert chatml.decode(row["base_ids"]) == row["base"]
        assert source["prompt"] in chatml.decode(row["prompt_ids"])


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_other_files(config, chatml, tmp_path, suffix):
    import pandas

    path = tmp_path / f"rows.{suffix}"
    frame = pandas.DataFrame(make_rows(5))
    frame.to_parquet(path) if suffix == "parquet" else frame.to_csv(path, index=False)
    entry = {"path": str(path), "split": "train", "type": "chatml.prompt_pairs"}
    train, _ = prepare_rows(config(datasets=[entry]), chatml)
    assert [r["chosen"] for r in train] == [r["chosen"] + "<|im_end|>" for r in make_rows(5)]


def test_several_data_sets_of_different_formats_and_columns(config, chatml, tmp_path):
    talk = [
        {
            "messages": [{"role": "user", "content": r["prompt"]}],
            "chosen": {"role": "assistant", "content": r["chosen"]},
            "rejected": {"role": "assistant", "content": r["rejected"]},
            "mine": [{"role": "assistant", "content": r["base"]}],
        }
        for r in make_rows(5, seed=3)
    ]
    entries = [
        config()["datasets"][0],
        {"path": str(write_jsonl(tmp_path / "talk.jsonl", talk)), "type": "chat_template.default"},
    ]
    cfg = config(
        datasets=entries,
        bapo={"entries": {"datasets": [{}, {"field_base": "mine"}]}},
        chat_template="tokenizer_default",
    )
    train, _ = prepare_rows(cfg, chatml)
    assert len(train) == 17
    assert train[12]["base"] == make_rows(5, seed=3)[0]["base"] + "<|im_end|>"


def test_test_datasets_are_rendered_by_their_own_entry(config, chatml, tmp_path):
    """axolotl renders `test_datasets` with the columns of `datasets`; here each has its own."""
    held_out = [
        {"q": r["prompt"], "good": r["chosen"], "bad": r["rejected"], "own": r["base"]}
        for r in make_rows(3)
    ]
    entry = {
        "path": str(write_jsonl(tmp_path / "test.jsonl", held_out)),
        "split": "train",
        "type": {
            "field_prompt": "q",
            "field_chosen": "good",
            "field_rejected": "bad",
            "chosen_format": "{chosen}!",
        },
    }
    cfg = config(
        test_datasets=[entry],
        bapo={"entries": {"datasets": [{}], "test_datasets": [{"field_base": "own"}]}},
    )
    train, evaluation = prepare_rows(cfg, chatml)
    assert (len(train), len(evaluation)) == (12, 3)
    assert evaluation[0]["base"] == held_out[0]["own"] + "!<|im_end|>"
    assert evaluation[0]["chosen"] == held_out[0]["good"] + "!<|im_end|>"


@pytest.mark.parametrize(("size", "expected"), [(0.25, 3), (4.0, 4)])
def test_val_set_size(config, chatml, size, expected):
    train, evaluation = prepare_rows(config(val_set_size=size), chatml)
    assert (len(train), len(evaluation)) == (12 - expected, expected)


def test_a_folder_of_rows_that_has_only_a_cache_file_is_written_anew(config, chatml, tmp_path):
    """Another process may have removed the rows when `datasets` put the file there."""
    work = module.Preparation(config(), chatml)
    path = work._path("datasets", 0)
    path.mkdir(parents=True)
    (path / "cache-1.arrow").write_bytes(b"")
    (rows,) = work.rendered(keep=True)["datasets"]
    assert len(rows) == 12


def test_faulty_rows_of_all_data_sets_in_one_message_ten_shown(config, chatml, tmp_path):
    rows = make_rows(20)
    for i in range(1, 14):
        rows[i]["base"] = "" if i % 2 else None
    rows[15]["rejected"] = rows[15]["chosen"]
    second = [{**row, "base": ""} for row in make_rows(2)]
    cfg = config(rows, bapo=ERROR)
    cfg["datasets"].append(
        DictDefault(
            {"path": str(write_jsonl(tmp_path / "b.jsonl", second)), "type": "chatml.prompt_pairs"}
        )
    )
    with pytest.raises(ValueError) as error:
        prepare_rows(cfg, chatml)
    message = str(error.value)
    assert re.search(
        r"datasets\[0\] \(.*rows\.jsonl\): 14 of 20 rows can't be used \(rows counted from 1\)",
        message,
    )
    assert "  row 2: base is missing or empty (column 'base'); put there what the model" in message
    assert "  row 16: chosen and rejected are identical" not in message  # the eleventh and later
    assert message.endswith(
        "bapo-faulty-rows.jsonl. Mend the rows, or leave them out with `bapo.on_faulty: drop`."
    )
    found = [json.loads(line) for line in (tmp_path / "prepared/bapo-faulty-rows.jsonl").open()]
    assert len(found) == 16 and "identical" in found[13]["problem"] and found[13]["row"] == 16
    assert "and 4 more" in message and message.count("  row ") == 10 + 2
    assert re.search(r"datasets\[1\] \(.*b\.jsonl\): 2 of 2 rows", message)
    assert not list((tmp_path / "prepared").glob("bapo-datasets*")), "nothing may be stored"


def test_faulty_rows_can_be_dropped_counted(config, chatml, tmp_path, caplog):
    rows = make_rows(6)
    rows[1]["chosen"] = None
    rows[4]["rejected"] = rows[4]["chosen"]
    train, _ = prepare_rows(config(rows, bapo={"on_faulty": "drop"}), chatml)
    assert len(train) == 4
    assert "2 of 6 rows can't be used and are left out" in caplog.text
    found = [json.loads(line) for line in (tmp_path / "prepared/bapo-faulty-rows.jsonl").open()]
    assert [entry["row"] for entry in found] == [2, 5]
    # row numbers are those of the file, also where rows before were left out
    rows[5]["base"] = "sea " * 300
    cfg = config(rows, bapo={"on_faulty": "drop"}, sequence_len=64, excess_length_strategy="raise")
    with pytest.raises(ValueError, match="row 6: prompt"):
        prepare_rows(cfg, chatml)
    with pytest.raises(ValueError, match="no row is left without those that can't be used"):
        prepare_rows(config([rows[1]], bapo={"on_faulty": "drop"}), chatml)


def test_missing_base_column(config, chatml):
    rows = [{k: v for k, v in row.items() if k != "base"} for row in make_rows(2)]
    with pytest.raises(ValueError, match=r"(?s)2 of 2 rows.*row 1: base is missing or empty"):
        prepare_rows(config(rows, bapo=ERROR), chatml)
    with pytest.raises(
        ValueError, match=r"no column 'mine'.*columns: prompt, chosen, rejected.*mend `field_base:`"
    ):
        prepare_rows(config(rows, bapo={"field_base": "mine"}), chatml)


def test_a_column_base_of_another_meaning_is_left_alone(config, chatml):
    with pytest.raises(ValueError, match=r"row 1: base is missing or empty \(field_base: false\)"):
        prepare_rows(config(bapo=ERROR | {"field_base": False}), chatml)


def test_base_responses_that_were_cut_follow_the_policy(config, chatml, caplog):
    rows = [
        row | {"base_cut": text}
        for row, text in zip(make_rows(3), ("true", "false", None), strict=True)
    ]
    train, _ = prepare_rows(config(rows), chatml)
    assert [row["base"].endswith("<|im_end|>") for row in train] == [False, True, True]
    train, _ = prepare_rows(config(rows, bapo={"anchors": {"on_cut": "drop"}}), chatml)
    assert len(train) == 2 and "1 of 3 rows have a base response that was cut" in caplog.text
    with pytest.raises(ValueError, match="row 1: the base response was cut at"):
        prepare_rows(config(rows, bapo={"anchors": {"on_cut": "error"}}), chatml)


def test_a_prompt_stays_on_one_side_of_the_split(config, chatml, tmp_path, caplog):
    rows = [{**row, "chosen": f"{row['chosen']} {i}"} for row in make_rows(8) for i in range(3)]
    train, held_out = prepare_rows(config(rows, val_set_size=0.2), chatml)
    assert len(train) + len(held_out) == 24 and len(held_out) == 6  # 5 wanted: two prompts
    assert not set(train["prompt"]) & set(held_out["prompt"])
    with pytest.raises(ValueError, match="rows of one prompt stay together"):
        prepare_rows(config(rows[:3], val_set_size=0.4), chatml)
    # test data sets are the user's: it is said
    entry = {
        "path": str(write_jsonl(tmp_path / "t.jsonl", rows[:2])),
        "split": "train",
        "type": "chatml.prompt_pairs",
    }
    prepare_rows(config(rows, test_datasets=[entry]), chatml)
    assert "2 of 2 held-out rows have a prompt that is in training too" in caplog.text


def test_keys_that_axolotl_drops_are_those_of_the_yaml(config, chatml, tmp_path):
    """Both splits are read by what is written: here ShareGPT rows, and a template of the entry."""
    rows = [
        {
            "conversations": [{"from": "human", "value": r["prompt"]}],
            "chosen": {"from": "gpt", "value": r["chosen"]},
            "rejected": {"from": "gpt", "value": r["rejected"]},
            "base": r["base"],
        }
        for r in make_rows(4)
    ]
    path = str(write_jsonl(tmp_path / "talk.jsonl", rows))
    seen = {
        "path": path,
        "split": "train",
        "type": "chat_template.default",
        "field_messages": "conversations",
    }
    written = seen | {
        "message_property_mappings": {"role": "from", "content": "value"},
        "chat_template": "jinja",
        "chat_template_jinja": "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}",
        "shards": 2,
    }
    cfg = config(
        datasets=[dict(seen)],
        test_datasets=[dict(seen)],
        bapo={"entries": {"datasets": [written], "test_datasets": [written]}},
    )
    train, held_out = prepare_rows(cfg, chatml)
    assert (
        len(train) == 2
        and train[0]["prompt"] == f"[user] {make_rows(1)[0]['prompt']}<|im_end|>[assistant] "
    )
    assert held_out.to_list() == train.to_list()


def test_what_cannot_be_loaded_is_named(config, chatml, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"\nnothing')
    said = {"broken.jsonl": "line 1: .*delimiter at character 15", "nowhere.jsonl": "check `path:`"}
    for name, reason in said.items():
        entry = {"path": str(tmp_path / name), "split": "train", "type": "chatml.prompt_pairs"}
        with pytest.raises(
            ValueError, match=rf"(?s)datasets\[0\] .*{name}.* can't be loaded: .*{reason}"
        ):
            prepare_rows(config(datasets=[entry]), chatml)


def long_base():
    rows = make_rows(4)
    rows[1]["base"] = "sea " * 60  # only the base response is too long
    return rows


def test_length_drop(config, chatml, caplog):
    train, _ = prepare_rows(config(long_base(), sequence_len=64), chatml)
    assert len(train) == 3
    assert "0 rows cut, 1 dropped, 3 untouched" in caplog.text


def test_length_truncate(config, chatml, caplog):
    cfg = config(long_base(), sequence_len=64, excess_length_strategy="truncate")
    train, _ = prepare_rows(cfg, chatml)
    assert len(train) == 4 and len(train[1]["prompt_ids"]) + len(train[1]["base_ids"]) == 64
    assert "1 rows cut, 0 dropped, 3 untouched" in caplog.text


def test_length_raise(config, chatml):
    cfg = config(long_base(), sequence_len=64, excess_length_strategy="raise")
    with pytest.raises(
        ValueError, match=r"row 2: prompt \d+, chosen \d+, rejected \d+, base \d+ tokens.*64"
    ):
        prepare_rows(cfg, chatml)


def test_nothing_left_is_an_error(config, chatml):
    with pytest.raises(
        ValueError, match="all 12 rows are longer than sequence_len: 4; raise sequence_len"
    ):
        prepare_rows(config(sequence_len=4), chatml)


def test_unknown_strategy(config, chatml):
    entry = {**config()["datasets"][0], "type": "chatml.nonsense"}
    with pytest.raises(
        ValueError, match=r"datasets\[0\]\.type: 'chatml\.nonsense' is not a DPO prompt"
    ):
        prepare_rows(config(datasets=[entry]), chatml)


def built(monkeypatch):
    calls = []
    original = module.Preparation._render
    monkeypatch.setattr(module.Preparation, "_render", lambda *a: calls.append(1) or original(*a))
    return calls


def test_cache_is_used_and_follows_what_it_depends_on(config, chatml, monkeypatch, tmp_path):
    calls = built(monkeypatch)
    first, _ = prepare_rows(config(), chatml)
    second, _ = prepare_rows(config(), chatml)
    assert len(calls) == 1 and first.to_list() == second.to_list()

    changed = make_rows(12)
    changed[3]["base"] = "another answer"
    prepare_rows(config(changed), chatml)  # same path, other content
    assert len(calls) == 2
    prepare_rows(config(changed, sequence_len=200), chatml)
    assert len(calls) == 3
    renamed = [{**row, "other": "other text"} for row in changed]
    prepare_rows(config(renamed, bapo={"field_base": "other"}), chatml)
    assert len(calls) == 4
    prepare_rows(config(renamed, bapo={"field_base": "base"}), chatml)
    assert len(calls) == 5
    prepare_rows(config(renamed, bapo={"field_base": "base"}, is_preprocess=True), chatml)
    assert len(calls) == 6


def test_cache_follows_what_a_strategy_of_ones_own_reads(config, chatml, monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def load(cfg, **kwargs):\n"
        "    def ask(row):\n"
        "        return row | {'prompt': cfg['default_system_message'] + row['prompt']}\n"
        "    return ask\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry = {**config()["datasets"][0], "type": "mine.load"}
    calls, found = built(monkeypatch), []
    for words in ("be kind ", "be kind ", "be a pirate "):
        cfg = config(datasets=[entry], default_system_message=words)
        found.append(prepare_rows(cfg, chatml)[0][0]["prompt"])
    assert len(calls) == 2 and [text[:7] for text in found] == ["be kind", "be kind", "be a pi"]


def test_total_steps(config, chatml, monkeypatch):
    monkeypatch.setattr(module, "load_tokenizer", lambda cfg: chatml)
    assert load_datasets(config(num_epochs=3))[0].total_num_steps == 9
    assert json.dumps(load_datasets(config())[0].train_dataset[0])  # plain values


def test_many_rows_in_several_processes(config, chatml, tmp_path):
    rows = make_rows(600)
    rows[555]["chosen"] = ""
    entry = {
        "path": str(write_jsonl(tmp_path / "many.jsonl", rows)),
        "split": "train",
        "type": "chat_template.default",
        "field_messages": "prompt",
    }
    cfg = config(
        datasets=[entry], chat_template="tokenizer_default", dataset_num_proc=2, bapo=ERROR
    )
    with pytest.raises(ValueError, match="row 556: chosen is empty"):
        prepare_rows(cfg, chatml)
    rows = make_rows(600)
    write_jsonl(tmp_path / "many.jsonl", rows)
    train, _ = prepare_rows(cfg, chatml)
    assert [row["base"] for row in train] == [row["base"] + "<|im_end|>" for row in rows]


def test_exact_deduplication(config, chatml):
    rows = make_rows(6)
    train, _ = prepare_rows(config([*rows, *rows[:2]], dataset_exact_deduplication=True), chatml)
    assert len(train) == 6
