"""`bapo report`: what is read from runs of all kinds, and a page that needs nothing and trusts nobody."""

import json
import math
import os
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bapo_plugin.report import write_report
from bapo_plugin.report.figures import NUM_COLOURS, make_figures, run_style
from bapo_plugin.report.plots import _MAX_POINTS, _STAND_INS, _thinned, panel_svg
from bapo_plugin.report.read import TRAINER_CLS, read_runs, unique_names
from bapo_plugin.report.tables import (
    decimal,
    differences,
    retention_table,
    samples,
    summary,
    task_table,
)
from bapo_plugin.report.verdict import verdict
from bapo_plugin.runs import log_digest, weights_digest

EVIL = "<script>alert(1)</script>"
BAPO = {"base_model": "tiny", "rl": "dpo", "trainer_cls": TRAINER_CLS, "rl_beta": 0.1}


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def metrics(step: int, base: float) -> dict:
    """What BAPOTrainer logs."""
    return {
        "loss": 0.7 - 0.01 * step,
        "loss/preference": 0.6 - 0.01 * step,
        "loss/anchor": 0.1,
        "rewards/chosen": 0.1 * step,
        "rewards/rejected": -0.2 * step,
        "rewards/margins": 0.3 * step,
        "rewards/accuracies": 0.75,
        "drift/chosen": 1.0 * step,
        "drift/base": base * step / 20,
        "drift/rejected": -2.0 * step,
        "anchor/active": 0.5,
        "anchor/lost": 0.02,
    }


def make_run(folder: Path, base: float = -1.0, config: dict | None = None, steps: int = 20) -> Path:
    history = []
    for step in range(2, steps + 1, 2):
        throughput = {"tokens/s": 1000 + step, "sharing": 0.4, "packing": 0.9}
        history.append({"step": step, **metrics(step, base), **throughput})
        if step % 10 == 0:
            evaluation = {f"eval_{k}": v for k, v in metrics(step, base).items()}
            history.append({"step": step, **evaluation})
            history.append({"step": step, "retention/drift": base, "retention/agreement": 0.97})
    state = {"global_step": steps, "max_steps": 20, "log_history": history}
    write(folder / f"checkpoint-{steps}/trainer_state.json", state)
    write(folder / "bapo_run.json", {"config": BAPO if config is None else config, "model": "tiny"})
    return folder


def make_state(folder: Path, history: list, **more) -> Path:
    state = {"global_step": 10, "max_steps": 10, "log_history": history, **more}
    write(folder / "trainer_state.json", state)
    return folder


def add_evaluation(folder: Path, **more) -> None:
    estimate = {"value": -3.14, "se": 0.42}
    after = {"value": 0.25, "se": 0.02, "difference": -0.05, "difference_se": 0.01}
    content = {
        "format": 1,
        "model": "tiny",
        "retention": {"prompts": 40, "tokens": 1800, "after": {"a": {"drift": estimate}}},
        "tasks": [
            {
                "task": "t1",
                "metric": "acc",
                "before": {"value": 0.3, "se": 0.02},
                "after": {"a": after},
            }
        ],
        "samples": [
            {"prompt": "Why?", "before": "Because.", "after": {"a": "Arr."}, "drift": {"a": -7.5}}
        ],
    }
    write(folder / "bapo-eval.json", content | more)


class Page(HTMLParser):
    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags[-1:] and self.tags[-1][0] != "style":
            self.text += data

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


@pytest.fixture
def two(tmp_path):
    """A run that forgets and one that doesn't."""
    forgets = make_run(tmp_path / "dpo", -30.0, BAPO | {"bapo": {"anchor_weight": 0}})
    keeps = make_run(tmp_path / "bapo", -0.5, BAPO | {"bapo": {"anchor_weight": 0.1}})
    add_evaluation(forgets)
    return [forgets, keeps]


# ---------------------------------------------------------------- page


def test_page_and_figures(two, tmp_path):
    written = write_report(two, tmp_path / "r.html")
    keys = ["drift", "loss", "rewards", "preference", "anchor", "retention", "throughput"]
    assert [path.name for path in written] == ["r.html", *(f"r-{key}.png" for key in keys)]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == sorted(
        p.name for p in written
    )
    text = Page(written[0]).text
    order = [
        "What to look at",
        "Drift from the model before training",
        "Loss",
        "Rewards",
        "Margins and accuracy",
        "Anchor activity",
        "Retention",
        "Throughput",
        "Evaluation before and after",
        "Answers before and after",
        "Configuration",
    ]
    places = [text.index(title) for title in order]
    assert places == sorted(places)
    assert "lowest in dpo (−30.0 nats) and highest in bapo (−0.500 nats)" in text
    assert "drift −7.50 nats" in text
    assert "Lost by tokens nats a token" in text


def test_print_unfolds_what_is_folded(two, tmp_path):
    page = Page(write_report(two, tmp_path / "r.html")[0])
    assert page.all("details")
    in_print = page.source.split("@media print")[1]
    assert "details::details-content { content-visibility: visible" in in_print


def test_same_runs_same_bytes(two, tmp_path):
    first = [path.read_bytes() for path in write_report(two, tmp_path / "r.html")]
    assert [path.read_bytes() for path in write_report(two, tmp_path / "r.html")] == first


def test_page_needs_nothing_else(two, tmp_path):
    page = Page(write_report(two, tmp_path / "r.html")[0])
    assert "http" not in re.sub(r'http-equiv="Content-Security-Policy"', "", page.source)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object"}
    for _, attrs in page.tags:
        assert "src" not in attrs
        assert (attrs.get("href") or "#").startswith("#")
    assert "@import" not in page.source


def test_svgs_share_a_page(two, tmp_path):
    page = Page(write_report(two, tmp_path / "r.html")[0])
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert ids and len(ids) == len(set(ids))
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', page.source)
    assert used and set(used) == set(ids)
    # every colour is one of the style sheet's, so that it follows light and dark
    body = page.source[page.source.index("<body>") :]
    assert not re.search(r"(stroke|fill): #", body)
    assert not any(colour in page.source for colour in _STAND_INS.values())
    variables = set(re.findall(r"var\(--([a-z0-9]+)\)", page.source))
    assert variables <= set(re.findall(r"--([a-z0-9]+):", page.source))
    labels = [attrs["aria-label"] for attrs in page.all("svg") if attrs.get("role") == "img"]
    assert any("dpo" in label and "base ends at -30" in label for label in labels)


def test_drift_panels_have_one_scale(two):
    def ticks(figure):
        svgs = [panel_svg(panel, figure, "") for panel in figure.panels]
        return [re.findall(r"text-anchor: end[^>]*>([^<]+)<", svg) for svg in svgs]

    make_run(two[0], base=-90.0)  # beyond all of the other's
    drift, loss, *_ = make_figures(read_runs(two))
    assert [panel.title for panel in drift.panels] == ["dpo", "bapo"]
    assert [line.label for line in drift.panels[0].lines] == ["chosen", "base", "rejected"]
    forgets, keeps = ticks(drift)
    assert len(forgets) > 3 and forgets == keeps
    assert ticks(loss)[0] != ticks(loss)[2]


@pytest.mark.parametrize(
    "evil", [EVIL, "</textarea></pre><b>\" onload=\"x\" ' onclick='x' <!-- ]]> -->"]
)
def test_everything_is_escaped(tmp_path, evil):
    name = evil.replace("/", "∕")
    config = BAPO | {"note": evil, evil: 1, "base_model": evil, "datasets": [{"path": evil}]}
    run = make_run(tmp_path / name, config=config)
    add_evaluation(
        run,
        tasks=[{"task": evil, "metric": evil, "before": None, "after": {evil: {"value": evil}}}],
        samples=[{"prompt": evil, "before": evil, "after": {evil: evil}, "drift": {evil: evil}}],
    )
    other = make_run(tmp_path / f"b {name}", config={})
    page = Page(write_report([run, other], tmp_path / f"{name}.html")[0])
    assert not page.all("script") and not page.all("b")
    assert not {key for _, attrs in page.tags for key in attrs if key.startswith("on")}
    assert page.text.count(evil) >= 6  # prompt, answers, task, config key and value
    assert name in page.text
    assert any(name in attrs.get("aria-label", "") for attrs in page.all("svg"))


def test_odd_names_in_figures(tmp_path):
    runs = [
        make_run(tmp_path / name) for name in ("$x_{1$ 100% \\nosuch", "日本語 العربية", "n" * 200)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = write_report(runs, tmp_path / "r.html")
    assert "$x_{1$ 100% \\nosuch" in Page(written[0]).text


def test_sections_without_data_are_left_out(tmp_path):
    history = [{"step": step, "loss": 2.0 / step} for step in range(1, 11)]
    run = make_state(tmp_path / "sft", history)
    write(run / "README.md", "<details>\n```yaml\nbase_model: tiny\n```\n</details>")
    written = write_report([run], tmp_path / "r.html")
    assert [path.name for path in written] == ["r.html", "r-loss.png"]
    page = Page(written[0])
    assert page.source.count("<figure") == 1
    for absent in ("Drift", "Rewards", "Retention", "Evaluation", "Answers", "What to look at"):
        assert f"<h2>{absent}" not in page.source
    assert "sft" in page.text


def test_run_that_only_started(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    drift = make_figures(read_runs([run]))[0]
    svg = panel_svg(drift.panels[0], drift, "p-")
    assert svg.count("<use") >= 3  # a single point shows only as a mark
    text = Page(write_report([run], tmp_path / "r.html")[0]).text
    assert "2 / 20" in text and "running or stopped" in text and "train" in text


def test_nothing_logged_yet(tmp_path):
    run = make_state(tmp_path / "run", [], global_step=0)
    written = write_report([run], tmp_path / "r.html")
    assert len(written) == 1
    assert "No metric has been logged yet" in Page(written[0]).text
    assert "Configuration unknown" in Page(written[0]).text


def test_many_runs_can_be_told_apart(tmp_path):
    assert len({run_style(i) for i in range(4 * NUM_COLOURS)}) == 4 * NUM_COLOURS
    runs = [make_run(tmp_path / f"run{i}") for i in range(9)]
    figures = make_figures(read_runs(runs))
    assert len(figures[0].panels) == 9
    assert len(figures[1].panels) == 3 and len(figures[1].panels[0].lines) == 9


def test_long_lines_keep_their_extremes():
    points = [(step, float(step % 7)) for step in range(100_000)]
    points[54_321] = (54_321, -99.0)
    points[54_400] = (54_400, 99.0)
    thinned = _thinned(points)
    assert len(thinned) <= _MAX_POINTS + 2
    assert (54_321, -99.0) in thinned and (54_400, 99.0) in thinned
    assert thinned == sorted(thinned)


# ---------------------------------------------------------------- reading


def test_newest_state_counts(tmp_path):
    run = make_run(tmp_path / "run", steps=20)
    make_run(run, steps=10)  # adds checkpoint-10
    assert read_runs([run])[0].step == 20
    make_state(run, [{"step": 30, "loss": 1.0}], global_step=30)
    assert read_runs([run])[0].step == 30
    checkpoint = read_runs([run / "checkpoint-10"])[0]
    assert (checkpoint.step, checkpoint.name) == (10, "run/checkpoint-10")
    assert checkpoint.method == "bapo" and checkpoint.config_source == "bapo_run.json"
    assert read_runs([run / "checkpoint-20/trainer_state.json"])[0].step == 20


def test_half_written_state_is_left_out_and_said(tmp_path):
    run = make_run(tmp_path / "run", steps=10)
    write(run / "checkpoint-20/trainer_state.json", '{"global_step": 20, "log_')
    [read] = read_runs([run])
    assert read.step == 10
    assert "checkpoint-20" in read.notes[0]


def test_odd_values(tmp_path):
    history = [
        {"step": 1, "loss": "0.5", "drift/base": None, "rewards/margins": float("inf")},
        {"step": 2, "loss": float("nan"), "drift/base": "nan", "rewards/margins": [1]},
        {"step": 3, "loss": 0.25, "drift/base": -2, "rewards/margins": "x", "flag": True},
        {"loss": 9.0},
        {"step": "x", "loss": 9.0},
        "not an entry",
    ]
    run = make_state(tmp_path / "run", history)
    [read] = read_runs([run])
    assert [v for _, v in read.series["loss"]] == [
        0.5,
        pytest.approx(float("nan"), nan_ok=True),
        0.25,
    ]
    assert read.last("drift/base") == -2
    assert "rewards/margins" not in read.series and "flag" not in read.series
    assert "step 2" in " ".join(read.notes)
    write_report([run], tmp_path / "r.html")


def test_last_one_of_a_step_counts(tmp_path):
    history = [{"step": s, "loss": v} for s, v in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0))]
    [read] = read_runs([make_state(tmp_path / "run", history)])
    assert read.series["loss"] == [(1, 1.0), (2, 20.0), (3, 3.0)]


@pytest.mark.parametrize(
    ("config", "drift", "note"),
    [
        ("rl: dpo\nrl_beta: 0.1", 5.0, "β = 0.1"),
        ("rl: ipo\ntrl:\n  beta: 5e-1", 1.0, "β = 0.5"),
        ("rl: dpo", None, "no rl_beta"),
        ("rl: simpo\nrl_beta: 0.1", None, "simpo"),
        (None, None, "β is unknown"),
    ],
)
def test_drift_out_of_the_rewards_of_trl(tmp_path, config, drift, note):
    rewards = {"rewards/chosen": 0.5, "rewards/rejected": -1.0, "rewards/margins": 1.5}
    run = make_state(tmp_path / "run", [{"step": 1, "loss": 0.6, **rewards}])
    if config:
        card = (
            f"---\nx: 1\n---\n<details><summary>c</summary>\n\n```yaml\n{config}\n```\n</details>\n"
        )
        write(run / "README.md", card)
    [read] = read_runs([run])
    assert read.last("drift/chosen") == (drift if drift is None else pytest.approx(drift))
    assert "drift/base" not in read.series
    page = Page(write_report([run], tmp_path / "r.html")[0])
    assert note in page.text
    keys = [figure.key for figure in make_figures([read])]
    assert "rewards" in keys and ("drift" in keys) == (drift is not None)


def test_names():
    paths = [["a", "x", "run"], ["a", "y", "run"], ["b", "other"], ["b", "y", "run"]]
    assert unique_names(paths) == ["x/run", "a/y/run", "other", "b/y/run"]
    assert unique_names([["a", "run"], ["a", "run"]]) == ["a/run (1)", "a/run (2)"]


def test_same_folder_twice_is_one_run(tmp_path, monkeypatch):
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert len(read_runs([Path("run"), tmp_path / "run", Path("./x/../run")])) == 1


def test_configuration(tmp_path):
    run = make_run(
        tmp_path / "run", config=BAPO | {"wandb_api_key": "hunter2", "eos_token": "</s>"}
    )
    write(run / "README.md", "<details>\n```yaml\nrl: orpo\n```\n</details>")
    assert read_runs([run])[0].method == "bapo"  # bapo_run.json goes before the model card
    page = Page(write_report([run], tmp_path / "r.html")[0])
    assert "hunter2" not in page.source and "eos_token: </s>" in page.text
    assert "rl: bapo" in page.text
    (run / "bapo_run.json").unlink()
    assert read_runs([run])[0].flat == {"rl": "orpo"}
    write(run / "README.md", "<details>\n```yaml\n: [\n```\n</details>")
    assert read_runs([run])[0].config is None


def test_configuration_out_of_the_log_of_a_dpo_run(tmp_path):
    """TRL's model card has no YAML; axolotl logs the configuration as JSON, between other lines."""
    run = make_state(tmp_path / "dpo", [{"step": 1, "loss": 0.7, "rewards/chosen": 0.4}])
    config = {
        "rl": "dpo",
        "rl_beta": 0.2,
        "capabilities": {"n_gpu": 1},
        "datasets": [{"path": "a"}],
    }
    log = f"[INFO] config:\n{json.dumps(config, indent=2)}\n[INFO] more {{\n"
    write(run / "debug.log", f"baseline\n{log}")
    (found,) = read_runs([run])
    assert found.config_source == "debug.log" and "capabilities" not in found.config
    assert found.method == "dpo" and found.last("drift/chosen") == pytest.approx(2.0)
    write(run / "debug.log", log[:60])  # cut
    assert read_runs([run])[0].config is None


def test_only_differing_keys_are_compared(tmp_path):
    runs = [
        make_run(tmp_path / "a", config={"x": 1, "bapo": {"anchor_weight": 0.1}, "l": [1, 2]}),
        make_run(
            tmp_path / "b", config={"x": 1, "bapo": {"anchor_weight": 0.2}, "l": [1, 2], "y": None}
        ),
        make_state(tmp_path / "c", [{"step": 1, "loss": 1.0}]),
    ]
    names, rows = differences(read_runs(runs))
    assert names == ["a", "b"]
    assert rows == [("bapo.anchor_weight", ["0.1", "0.2"]), ("y", [None, "null"])]


def test_summary(two):
    heads, rows = summary(read_runs(two))
    row = dict(zip(heads, rows[0], strict=True))
    assert (row["method"].text, row["method"].tag) == ("bapo", "λ 0 β 0.1")
    assert (row["steps"].text, row["steps"].tag) == ("20 / 20", "finished")
    assert row["accuracy"].text == "0.750"
    assert row["drift base"].text == "−30.0"
    assert row["retention agreement"].text == "0.970"
    assert row["tokens/s"].text == "1,011"
    assert "loss" not in heads and "model" not in heads


def test_standard_errors(two):
    [[task, _, run, before, after, difference]] = task_table(read_runs(two))
    assert (task.text, run.text) == ("t1", "dpo")
    assert (before.text, before.tag) == ("0.300", "± 0.020")
    assert (after.text, difference.text, difference.tag) == ("0.250", "−0.050", "± 0.010")
    assert difference.is_strong and not after.is_strong


@pytest.mark.parametrize("empty", [None, [], {}, "x"])
def test_evaluation_without_parts(tmp_path, empty):
    run = make_run(tmp_path / "run")
    add_evaluation(run, retention=empty, tasks=empty, samples=empty)
    assert "Answers before" not in Page(write_report([run], tmp_path / "r.html")[0]).source


def test_decimal():
    values = (-30.12, -0.04, 1234.5, -1e-9, None, "nan", 2e9)
    assert [decimal(v) for v in values] == ["−30.1", "−0.040", "1,234", "0.000", "–", "–", "2e+09"]
    assert decimal(0.5, 1, sign=True) == "+0.5"


def test_trainer_is_the_one_of_the_configuration():
    source = (Path(__file__).parents[2] / "bapo_plugin/config.py").read_text("utf-8")
    assert f'TRAINER_CLS = "{TRAINER_CLS}"' in source


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "output", "message"),
    [
        (lambda run: None, "r.html", "run: no such folder; name the output_dir"),
        (lambda run: run.mkdir(), "r.html", "run: has neither trainer_state.json nor checkpoint"),
        (lambda run: write(run / "trainer_state.json", "{"), "r.html", "can't be read .*try again"),
        (lambda run: write(run / "trainer_state.json", "[]"), "r.html", "holds list, not a JSON"),
        (lambda run: write(run / "trainer_state.json", "{}"), "r.html", "no list log_history"),
        (lambda run: write(make_run(run) / "bapo_run.json", "{"), "r.html", "bapo_run.json: can't"),
        (lambda run: add_evaluation(make_run(run), format=2), "r.html", "format 2, this version"),
        (make_run, "r.pdf", "ends in .html"),
        (make_run, "absent/r.html", "no folder .*absent; make it first"),
    ],
)
def test_errors_name_path_and_remedy(tmp_path, make, output, message):
    make(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        write_report([tmp_path / "run"], tmp_path / output)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


def test_no_runs(tmp_path):
    with pytest.raises(ValueError, match="name at least one"):
        write_report([], tmp_path / "r.html")


def test_written_whole_or_not_at_all(two, tmp_path, monkeypatch):
    def full(self, content):
        if self.name.startswith(".r-loss"):
            self.touch()
            raise OSError(28, "No space left on device")
        return write_bytes(self, content)

    write(tmp_path / "r.html", "what was there")
    write_bytes = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match="r-loss.png can't be written: no space"):
        write_report(two, tmp_path / "r.html")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["r.html"]
    assert (tmp_path / "r.html").read_text() == "what was there"


def test_starts_fast():
    code = "import sys, bapo_plugin.report; print({'torch', 'transformers', 'axolotl'} & {*sys.modules})"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert run.stdout.strip() == "set()", run.stderr


def kept(lost, worst=-1.0):
    return {"lost": {"value": lost, "se": None}, "worst_tenth": {"value": worst, "se": None}}


@pytest.mark.parametrize(
    "accuracy, lost, learned, said",
    [
        (0.95, 0.0, "Learned: 95% of 40 held-out pairs", "Kept: 0% of 48 answers to unrelated prompts"),
        (0.7, 0.1, "Learned in part: 70%", "Kept in part: 10%"),
        (0.5, 0.5, "Not learned: 50%", "Forgotten: 50%"),
    ],
)  # fmt: skip
def test_the_first_glance_says_what_was_learned_and_kept(tmp_path, accuracy, lost, learned, said):
    history = [
        {"step": 10, "loss": 0.5, "rewards/accuracies": 0.99},
        {"step": 10, "eval_rewards/accuracies": accuracy},
    ]
    run = make_state(tmp_path / "run", history)
    write(run / "bapo_run.json", {"config": BAPO, "rows": {"eval": 40}})
    # unrelated prompts go first: held-out rows are of the data
    add_evaluation(
        run,
        retention={"prompts": 5, "after": {"a": kept(0.99)}},
        probe={"prompts": 48, "after": {"a": kept(lost, -3.25)}},
    )
    write_report([run], tmp_path / "r.html")
    text = Page(tmp_path / "r.html").text
    assert learned in text and said in text and "the worst tenth drifted by −3.25 nats" in text


def test_a_model_that_gives_no_numbers_is_broken(tmp_path):
    """As older versions wrote it: no answer is below -2 nats, for NaN is below nothing."""
    run = make_state(tmp_path / "run", [{"step": 1, "loss": 0.5}])
    part = kept(0.0, float("nan")) | {"drift": {"value": float("nan"), "se": None}}
    add_evaluation(run, probe={"prompts": 48, "after": {"a": part}})
    write_report([run], tmp_path / "r.html")
    text = Page(tmp_path / "r.html").text
    assert (
        "Broken: answers to unrelated prompts have no finite drift" in text and "Kept" not in text
    )


def test_the_first_glance_says_what_was_not_measured(tmp_path):
    run = make_state(tmp_path / "run", [{"step": 1, "loss": 0.5, "rewards/accuracies": 0.75}])
    write_report([run], tmp_path / "r.html")
    text = Page(tmp_path / "r.html").text
    assert "75% of training pairs; there were no held-out ones" in text
    assert "bapo eval asks 48 unrelated prompts" in text


def test_a_yaml_is_not_a_run(tmp_path):
    path = write(tmp_path / "run.yml", "rl: bapo")
    with pytest.raises(ValueError, match="run.yml: is a configuration, .* name the folder in its"):
        write_report([path], tmp_path / "r.html")


def test_the_verdict_says_where_answers_have_begun_to_loop(tmp_path):
    def kept(change, error):
        part = {"value": 0.3, "difference": change, "difference_se": error}
        after = {"lost": {"value": 0.1}, "worst_tenth": {"value": -3.0}, "repetition": part}
        folder = make_run(tmp_path / f"run{change}{error}")
        add_evaluation(folder, probe={"prompts": 48, "after": {"a": after}})
        return verdict(read_runs([folder])[0]).kept

    assert "4-grams before" not in kept(0.04, 0.01) and "4-grams before" not in kept(0.2, 0.11)
    assert kept(0.2, 0.05).endswith("Answers repeat themselves: 10% of 4-grams before, 30% now")


# ---------------------------------------------------------------- what is no longer there


def test_logs_of_an_earlier_run_in_the_folder_are_left_out(tmp_path):
    run = make_run(tmp_path / "run", steps=20)
    old = log_digest(run / "checkpoint-20/trainer_state.json")
    record = {"config": BAPO, "logs_of_others": [old], "finished": True}
    write(run / "bapo_run.json", record)
    read = read_runs([run])[0]
    assert read.step == 0 and not read.series and "by an earlier run" in read.notes[0]
    make_state(run, [{"step": 3, "loss": 0.5}], global_step=3, max_steps=3)
    read = read_runs([run])[0]
    assert (read.step, read.series["loss"], read.is_finished) == (3, [(3, 0.5)], True)
    # a checkpoint that the new run wrote under that name is its own
    make_run(run, base=-2.0, steps=20)
    write(run / "bapo_run.json", record)
    assert read_runs([run])[0].step == 20


def test_a_run_that_stopped_itself_is_finished(tmp_path):
    run = make_run(tmp_path / "run", steps=10)
    write(run / "bapo_run.json", {"config": BAPO, "finished": True})
    assert read_runs([run])[0].is_finished
    assert not read_runs([run / "checkpoint-10"])[0].is_finished, "a checkpoint is no end"
    write(run / "bapo_run.json", {"config": BAPO, "finished": False})
    assert not read_runs([run])[0].is_finished


def measured_together(tmp_path, **weights):
    """`bapo eval a d --scale 0.5` of two runs: one file in both."""
    shares = {"a": 0.01, "a × 0.5": 0.5, "d": 0.9, "d × 0.5": 0.5}
    names, runs = list(shares), []
    for name in ("a", "d"):
        run = make_run(tmp_path / name)
        write(run / "adapter_model.safetensors", f"weights of {name}")
        runs.append(run)
    found = {run.name: weights_digest(run) for run in runs} | weights
    for run in runs:
        add_evaluation(
            run,
            adapters={name: str(tmp_path / name[0]) for name in names},
            weights={name: found[name[0]] for name in names},
            scales={name: 0.5 for name in names if "×" in name},
            probe={"prompts": 40, "after": {n: kept(s) for n, s in shares.items()}},
            retention=None,
            tasks=[],
            samples=[
                {"prompt": "Why?", "before": "So.", "after": {n: n for n in names}, "drift": {}}
            ],
        )
    return runs


def test_adapters_that_were_measured_together_are_told_apart(tmp_path):
    runs = read_runs(measured_together(tmp_path)[::-1])
    said = [verdict(run).kept for run in runs]
    assert said[0].startswith("Forgotten: 90% of 40") and said[1].startswith("Kept: 1% of 40")
    rows = retention_table(runs)
    assert [row[0].text for row in rows] == ["a", "a × 0.5", "d", "d × 0.5"]
    (sample,) = samples(runs)
    assert [entry[0] for entry in sample.after] == ["a", "a × 0.5", "d", "d × 0.5"]
    alone = retention_table(runs[:1])
    assert [row[0].text for row in alone] == ["d: a", "d: a × 0.5", "d", "d × 0.5"]


def test_results_of_weights_that_are_gone_are_left_out(tmp_path):
    _, d = measured_together(tmp_path)
    write(d / "adapter_model.safetensors", "trained anew")
    runs = read_runs([tmp_path / "a", d])
    assert [verdict(run).kept[:4] for run in runs] == ["Kept", ""]
    assert "no longer there (d, d × 0.5)" in " ".join(runs[1].notes)
    assert [row[0].text for row in retention_table(runs)] == ["a", "a × 0.5"]


@pytest.mark.parametrize("values", [[0.95, math.nan], [math.nan, math.nan]])
def test_an_accuracy_that_is_no_number_is_not_learned(tmp_path, values):
    history = [{"step": 1, "loss": 0.1, "rewards/accuracies": 0.9}]
    history += [{"step": i, "eval_rewards/accuracies": v} for i, v in enumerate(values, 1)]
    run = read_runs([make_state(tmp_path / "run", history)])[0]
    assert verdict(run).learned == (
        "Not known: the last accuracy on held-out pairs was not a finite number"
    )
    steps = ", ".join(str(i) for i, v in enumerate(values, 1) if math.isnan(v))
    assert f"accuracy on held-out pairs was not a finite number in step {steps}" in run.notes[-1]
    heads, rows = summary([run])
    assert "accuracy" not in heads or rows[0][heads.index("accuracy")].text == "–"
