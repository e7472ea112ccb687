"""`bapo compare`: two trained runs, measured by `bapo eval`; and what can't be compared."""

import json
import shutil

import pytest
import yaml
from axolotl.cli.config import load_cfg
from axolotl.loaders import load_tokenizer
from helpers import fresh_lora, training_args, write_config
from tiny import make_rows, save_model, write_jsonl
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bapo_plugin import BAPOConfig, BAPOTrainer, base_weights
from bapo_plugin.cli import app
from bapo_plugin.prepare import prepare_rows
from bapo_plugin.rows.held_out import prompts_digest


def bapo(*args):
    # the command sets the level for its process: here it must not outlive the call
    env = {"AXOLOTL_LOG_LEVEL": "WARNING", "AXOLOTL_DO_NOT_TRACK": "1", "COLUMNS": "200"}
    return CliRunner().invoke(app, [*map(str, args)], env=env)


def train(folder, name, weight):
    """An adapter with the record of its run, as `axolotl train` leaves them."""
    path = write_config(folder, output_dir=str(folder / name), bapo={"anchor_weight": weight})
    cfg = load_cfg(str(path))
    tokenizer = load_tokenizer(cfg)
    rows, held_out = prepare_rows(cfg, tokenizer)
    trainer = BAPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=training_args(folder / name, max_steps=4),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=fresh_lora(),
        bapo=BAPOConfig(anchor_weight=weight),
    )
    trainer.train()
    trainer.save_model(str(folder / name))
    config = yaml.safe_load(path.read_text()) | {"hub_token": f"hf_{name}"}
    rows = {"train": len(rows), "eval": len(held_out)}
    record = {"config": config, "directory": str(folder), "finished": True, "rows": rows}
    record["held_out"] = prompts_digest(held_out)
    (folder / name / "bapo_run.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    save_model(folder / "model", "llama")
    rows = [
        {"prompt": r["prompt"], "chosen": f"arr {r['chosen']}", "rejected": r["rejected"], "mine": r["base"]}
        for r in make_rows(24, seed=2)
    ]  # fmt: skip
    write_jsonl(folder / "rows.jsonl", rows)
    for name, weight in (("dpo", 0), ("bapo", 1.0)):
        train(folder, name, weight)
    return folder


@pytest.fixture(scope="module")
def measured(runs):
    args = ("--max-new-tokens", 8, "--scale", "0.25,0.5", "--pairs", "--probe")
    result = bapo("eval", runs / "dpo", runs / "bapo", *args)
    assert result.exit_code == 0, result.output
    return runs


@pytest.fixture
def copies(measured, tmp_path):
    """dpo and bapo, to be spoilt."""
    for name in ("dpo", "bapo"):
        shutil.copytree(measured / name, tmp_path / name)
    return tmp_path


def spoil(folder, change):
    path = folder / "bapo-eval.json"
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def test_settings_come_first_then_numbers_on_the_same_rows(measured):
    result = bapo("compare", measured / "dpo", measured / "bapo")
    assert result.exit_code == 0, result.output
    out = result.output
    places = [out.index(text) for text in (
        "bapo.anchor_weight", "held-out pairs", "unrelated prompts", "former answers", "at equal margin", "Taste: ",
    )]  # fmt: skip
    assert places == sorted(places)
    assert "(not shown)" not in out and "hf_" not in out and "output_dir" not in out
    found = json.loads((measured / "bapo/bapo-eval.json").read_text())
    assert found["pairs"]["pairs"] == 6 and found["probe"]["prompts"] == 48
    assert "repetition" not in found["probe"]["after"]["dpo × 0.5"]


def test_numbers_are_those_of_eval_and_errors_are_paired(measured):
    result = bapo("compare", measured / "dpo", measured / "bapo", "--json")
    found = json.loads(result.stdout)
    evaluation = json.loads((measured / "dpo/bapo-eval.json").read_text())
    for name, side in (("dpo", "a"), ("bapo", "b")):
        probe, pairs = (evaluation[part]["after"][name] for part in ("probe", "pairs"))
        for key in ("drift", "lost", "worst_tenth", "agreement", "kl", "repetition"):
            assert found["measures"][key][side] == pytest.approx(probe[key]["value"]), key
        assert found["measures"]["margin"][side] == pytest.approx(pairs["margin"]["value"])
        former = evaluation["retention"]["after"][name]["drift"]["value"]
        assert found["measures"]["former.drift"][side] == pytest.approx(former)
    rows = evaluation["probe"]["rows"]["after"]
    changes = [b - a for a, b in zip(rows["dpo"]["drift"], rows["bapo"]["drift"], strict=True)]
    mean = sum(changes) / 48
    se = (sum((c - mean) ** 2 for c in changes) / 47 / 48) ** 0.5
    drift = found["measures"]["drift"]
    assert drift["difference"] == pytest.approx(mean) and drift["difference_se"] == pytest.approx(
        se
    )
    assert drift["n"] == 48
    # at the margin of the one that learned less, the other is at a part of its strength
    level, strength = (found["levels"]["margin"][key] for key in ("value", "strength"))
    margins = [found["measures"]["margin"][side] for side in "ab"]
    assert level == pytest.approx(min(margins))
    assert max(strength.values()) == 1 and min(strength.values()) < 1
    assert found["settings"]["bapo.anchor_weight"] == {"a": "0", "b": "1.0"}
    assert "hub_token" not in found["settings"], "two secrets look the same"


def test_order_of_rows_and_of_runs_changes_nothing(measured, copies):
    def turn(found):
        for part in ("pairs", "probe", "retention"):
            rows = found[part]["rows"]
            for key in ("id", "prompt", "answer"):
                if key in rows:
                    rows[key].reverse()
            for columns in rows["after"].values():
                for values in columns.values():
                    values.reverse()

    spoil(copies / "bapo", turn)
    one, two = (
        json.loads(bapo("compare", first, second, "--json").stdout)["measures"]
        for first, second in (
            (measured / "dpo", measured / "bapo"),
            (copies / "dpo", copies / "bapo"),
        )
    )
    for key in one:
        assert two[key]["difference"] == pytest.approx(one[key]["difference"], abs=1e-9), key
        assert two[key]["difference_se"] == pytest.approx(one[key]["difference_se"]), key
    back = json.loads(bapo("compare", copies / "bapo", copies / "dpo", "--json").stdout)
    assert back["measures"]["drift"]["gain"] == pytest.approx(-one["drift"]["gain"])


def test_fail_below_is_an_exit_code(measured):
    def code(*limits):
        args = [arg for limit in limits for arg in ("--fail-below", limit)]
        result = bapo("compare", measured / "dpo", measured / "bapo", *args)
        return result.exit_code, result.output

    gains = json.loads(bapo("compare", measured / "dpo", measured / "bapo", "--json").stdout)
    drift, kl = (gains["measures"][key]["gain"] for key in ("drift", "kl"))
    assert drift > 0 and kl > 0 and gains["measures"]["kl"]["difference"] < 0
    assert code(f"drift={drift - 1e-6}", f"kl={kl - 1e-6}")[0] == 0
    failed, output = code(f"drift={drift - 1e-6}", f"kl={kl + 0.01}")
    assert failed == 1 and "Below: kl is" in output and "Below: drift" not in output
    assert code("equal_margin.drift=-1000")[0] == 0
    for limit, message in (
        ("drift", "must be NAME=VALUE"),
        ("drift=nan", "must be NAME=VALUE"),
        ("=1", "must be NAME=VALUE"),
        ("drfit=1", "drfit isn't measured here; what is: accuracy, margin, drift"),
    ):
        failed, output = code(limit)
        assert failed == 2 and message in output, output
    assert code("drift=1", "drift=2")[0] == 2


def drop_rows(found):
    del found["asked"]


def other_limit(found):
    found["asked"]["max_new_tokens"] = 9
    found["probe"]["rows"]["answer"][0] = "x"


def other_weights(found):
    found["probe"]["rows"]["answer"][0] = "x"


def other_pairs(found):
    found["pairs"]["rows"]["id"][0] = "x"


def other_model(found):
    found["model"] = "other"
    other_weights(found)


def broken(found):
    found["probe"]["rows"]["after"]["bapo"]["kl"][3] = float("nan")


def cut(found):
    found["probe"]["rows"]["after"]["bapo"]["drift"].pop()


def no_name(found):
    del found["probe"]["rows"]["after"]["bapo"]


def nothing_in_common(found):
    found |= {"pairs": None, "probe": None, "retention": None}


def elsewhere(found):
    found["adapters"] = {name: f"elsewhere/{name}/it" for name in found["adapters"]}


AGAIN = "This measures both on the same: bapo eval "


@pytest.mark.parametrize(
    "change, messages",
    [
        (drop_rows, ["is of an older version", AGAIN]),
        (other_limit, ["other answers to 1 of 48 prompts (--max-new-tokens 8 of A, 9 of B)", "tokens 9"]),
        (other_weights, ["other answers to 1 of 48 prompts (other weights", AGAIN]),
        (other_pairs, ["A was measured on 6 pairs, B on 6; 5 of them are the same", AGAIN]),
        (other_model, ["B from other", "No command makes that comparable"]),
        (broken, ["kl is no finite number in 1 of 48 rows", "learning_rate"]),
        (cut, ["is damaged", AGAIN]),
        (no_name, ["is damaged", AGAIN]),
        (nothing_in_common, ["no measurement in common", AGAIN]),
        (lambda found: found.update(format=2), ["format 2"]),
        (elsewhere, ["has 2 adapters", "bapo:dpo or "]),
    ],
)  # fmt: skip
def test_what_was_not_measured_on_the_same_is_refused(copies, change, messages):
    spoil(copies / "bapo", change)
    result = bapo("compare", copies / "dpo", copies / "bapo")
    assert result.exit_code == 2, result.output
    for message in messages:
        assert message in result.output


def test_without_results_there_are_settings_and_the_command(copies):
    (copies / "bapo/bapo-eval.json").unlink()
    result = bapo("compare", copies / "dpo", copies / "bapo")
    assert result.exit_code == 2 and "bapo.anchor_weight" in result.output
    command = f"bapo eval {copies / 'dpo'} {copies / 'bapo'} --max-new-tokens 8 --scale 0.25,0.5"
    assert result.stderr.rstrip().endswith(command)


def test_an_adapter_that_was_trained_anew_is_not_what_was_measured(copies):
    with (copies / "bapo/adapter_model.safetensors").open("ab") as file:
        file.write(b" ")
    result = bapo("compare", copies / "dpo", copies / "bapo")
    assert result.exit_code == 2 and "was trained anew" in result.output


def test_other_names_of_the_same_model_and_adapters_in_one_file(copies, tmp_path):
    file = copies / "bapo/bapo-eval.json"
    (copies / "results").mkdir()
    shutil.copy(file, copies / "results")
    for pair in (
        (f"{file}:dpo", f"{file}:bapo"),
        (copies / "dpo", f"{copies / 'results'}:bapo × 0.5"),
    ):
        result = bapo("compare", *pair)
        assert result.exit_code == 0 and "held-out pairs" in result.output, result.output
    spoil(copies / "bapo", lambda found: found.update(model="/elsewhere/model"))
    assert bapo("compare", copies / "dpo", copies / "bapo").exit_code == 0
    for other, message in (
        (copies / "dpo", "are the same adapter"),
        (tmp_path / "none", "there is no file"),
        (copies / "dpo/README.md", "neither the folder of a run"),
        (f"{file}:x", "has no adapter 'x'"),
    ):
        result = bapo("compare", copies / "dpo", other)
        assert result.exit_code == 2 and message in result.output, result.output


def test_one_row_says_nothing(copies):
    def first(found):
        for part in ("pairs", "probe", "retention"):
            rows = found[part]["rows"]
            for key in ("id", "prompt", "answer"):
                if key in rows:
                    del rows[key][1:]
            for columns in rows["after"].values():
                for values in columns.values():
                    del values[1:]

    for name in ("dpo", "bapo"):
        spoil(copies / name, first)
    result = bapo("compare", copies / "dpo", copies / "bapo", "--json")
    found = json.loads(result.stdout)
    assert found["measures"]["drift"]["difference_se"] is None
    assert "from one pair nothing can be said" in found["conclusions"][0]


# ---------------------------------------------------------------- what eval refuses of runs


@pytest.fixture
def moved(runs, tmp_path):
    """All of it in another place, to be spoilt."""
    for path in runs.iterdir():
        if path.name in ("dpo", "bapo", "model"):
            shutil.copytree(path, tmp_path / path.name)
    shutil.copy(runs / "rows.jsonl", tmp_path)
    for name in ("dpo", "bapo"):
        for file in ("bapo_run.json", "adapter_config.json"):
            path = tmp_path / name / file
            path.write_text(path.read_text().replace(str(runs), str(tmp_path)))
    return tmp_path


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def evaluated(*args):
    result = bapo("eval", *args)
    return result.exit_code, " ".join(result.output.split())


def test_held_out_pairs_are_known_from_the_record(moved):
    code, said = evaluated(moved / "bapo", "--no-probe")
    assert code == 0 and "held-out pairs" in said and "unrelated" not in said


def more(rows):
    return [*rows, rows[0] | {"prompt": "one more"}]


def changed(rows):
    return [row | {"prompt": f"{row['prompt']} now"} for row in rows]


@pytest.mark.parametrize(
    "change, differs",
    [(more, "there are 7 now, and training had 6"), (changed, "they have other prompts now")],
)
def test_rows_that_training_did_not_hold_out_are_refused(moved, change, differs):
    path = moved / "rows.jsonl"
    write_jsonl(path, change([json.loads(line) for line in path.read_text().splitlines()]))
    config = write_config(moved, output_dir=str(moved / "bapo"))
    for target in (moved / "bapo", config):
        code, said = evaluated(target, "--no-probe")
        assert code == 2 and differs in said and "--prompts FILE" in said, said
    # a YAML may name others on purpose
    entry = yaml.safe_load(config.read_text())["datasets"][0]
    others = {"test_datasets": [entry], "val_set_size": None, "output_dir": str(moved / "bapo")}
    code, said = evaluated(write_config(moved, **others), "--no-probe")
    assert code == 0, said


def test_where_only_counts_are_recorded_they_are_compared(moved):
    def older(record, count):
        del record["held_out"]
        record["rows"]["eval"] = count

    edit(moved / "bapo/bapo_run.json", lambda record: older(record, 6))
    assert evaluated(moved / "bapo", "--no-probe")[0] == 0
    edit(moved / "bapo/bapo_run.json", lambda r: r["rows"].pop("eval"))
    code, said = evaluated(moved / "bapo", "--no-probe")
    assert code == 2 and "training had 0" in said


def test_a_yaml_of_another_model_is_refused(moved):
    save_model(moved / "other", "llama", seed=3)
    config = write_config(moved, base_model=str(moved / "other"))
    for command in ("eval", "chat"):
        result = bapo(command, config, moved / "bapo")
        said = " ".join(result.output.split())
        assert result.exit_code == 2 and "evaluate it by itself" in said, said
        assert (
            f"was trained on {moved / 'model'}" in said and f"base_model: {moved / 'other'}" in said
        )


def test_a_copy_of_the_model_is_the_model_and_other_weights_in_its_place_are_not(moved):
    digest = base_weights.digest(moved / "model")
    for name in ("dpo", "bapo"):
        edit(moved / name / "bapo_run.json", lambda r: r.update(trained={"base_weights": digest}))
    shutil.copytree(moved / "model", moved / "copy")
    config = write_config(moved, base_model=str(moved / "copy"), output_dir=str(moved / "bapo"))
    code, said = evaluated(config, moved / "bapo", "--no-probe")
    assert code == 0, said
    save_model(moved / "other", "llama", seed=3)
    shutil.copy(moved / "other/model.safetensors", moved / "model")
    for targets in ([moved / "bapo"], [write_config(moved), moved / "bapo"]):
        code, said = evaluated(*targets, "--no-probe")
        assert code == 2 and "has other weights (digest" in said and f"(digest {digest})" in said


def test_an_adapter_that_names_a_model_from_elsewhere_takes_that_of_the_yaml(moved):
    (moved / "dpo/bapo_run.json").unlink()
    edit(moved / "dpo/adapter_config.json", lambda c: c.update(base_model_name_or_path="model"))
    code, said = evaluated(write_config(moved), moved / "dpo", "--no-probe")
    assert code == 0, said


def test_held_out_rows_are_those_of_the_run_that_is_evaluated(moved):
    """The YAML's output_dir may be another run's."""
    edit(moved / "dpo/bapo_run.json", lambda record: record.update(held_out="0" * 32))
    config = write_config(moved, output_dir=str(moved / "dpo"))
    assert evaluated(config, moved / "bapo", "--no-probe")[0] == 0
    code, said = evaluated(config, moved / "dpo", "--no-probe")
    assert code == 2 and f"training in {moved / 'dpo'} held out" in said


def test_a_model_that_moved_is_said_and_a_yaml_says_where_to(moved):
    (moved / "model").rename(moved / "now")
    code, said = evaluated(moved / "bapo", "--no-probe")
    assert code == 2 and f"base model: '{moved / 'model'}'" in said and "in a YAML" in said
    config = write_config(moved, base_model=str(moved / "now"), output_dir=str(moved / "bapo"))
    code, said = evaluated(config, moved / "bapo", "--no-probe")
    assert code == 0, said


@pytest.mark.parametrize(
    "key, value", [("lora_model_dir", "dpo"), ("load_in_8bit", True), ("chat_template", "chatml")]
)
def test_runs_of_one_model_in_other_states_are_evaluated_apart(moved, key, value):
    edit(moved / "dpo/bapo_run.json", lambda record: record["config"].update({key: value}))
    for command in ("eval", "chat"):
        result = bapo(command, moved / "bapo", moved / "dpo")
        said = " ".join(result.output.split())
        assert result.exit_code == 2 and f"{key}: is" in said and str(value) in said, said
        assert "evaluate them apart" in said


def test_one_model_may_be_named_in_two_ways(moved, monkeypatch):
    monkeypatch.chdir(moved)
    edit(moved / "dpo/bapo_run.json", lambda record: record["config"].update(base_model="model"))
    code, said = evaluated("bapo", "dpo", "--no-probe")
    assert code == 0, said
