"""Secrets planted in every place of a YAML, looked for in all that is written and shown."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from axolotl.cli.config import load_cfg
from helpers import bapo_trainer, write_config
from tiny import make_rows, make_tokenizer, save_model, write_jsonl
from typer.testing import CliRunner

from bapo_plugin import BAPOConfig, last_word
from bapo_plugin.anchors.provenance import ReferenceSpec, provenance
from bapo_plugin.answers.engine import Request, Sampling
from bapo_plugin.answers.server import ServerEngine, ServerError
from bapo_plugin.cli import app
from bapo_plugin.compat import only_reading
from bapo_plugin.plugin import _as_written
from bapo_plugin.store import Store

SECRET = "S3CRET"
URL = f"https://me:{SECRET}@127.0.0.1:9/v1"
PLANTED = {
    "comet_api_key": f"{SECRET}-comet",
    "swanlab_api_key": f"{SECRET}-swanlab",
    "hf_token": f"{SECRET}-hub",
    "wandb_api_key": f"{SECRET}-wandb",
    "mlflow_tracking_uri": URL,
    "hub_strategy": f"hf_{SECRET}abcdefghijklmnopq",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secrets")
    save_model(folder / "model", "llama")
    write_jsonl(folder / "rows.jsonl", make_rows(8, base="mine"))
    return folder


def config(folder, **changes):
    server = {"engine": "server", "server": {"url": URL, "retries": 0, "probe": False}}
    return write_config(folder, **PLANTED | {"bapo": {"anchors": server}} | changes)


def run(*arguments, **env):
    done = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "400"} | env)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert SECRET not in done.output, done.output
    return done


def test_what_a_run_writes_and_reports(folder, monkeypatch):
    for name in ("COMET_API_KEY", "SWANLAB_API_KEY"):
        monkeypatch.setenv(name, "")  # axolotl sets them: not for tests after this one
    trainer = bapo_trainer(folder, rows=make_rows(4), max_steps=1)
    with only_reading():
        cfg = load_cfg(str(config(folder)))
    trainer.record.config = _as_written(cfg)
    trainer.train()
    trainer.create_model_card("mine")
    # of a run without a YAML, and of axolotl's own methods, which keep more
    trainer.record.config = {
        "bapo": BAPOConfig(
            anchors=yaml.safe_load(config(folder).read_text())["bapo"]["anchors"]
        ).model_dump()
    }
    trainer.args.output_dir = str(folder / "python")
    trainer.record.on_train_end(trainer.args, trainer.state, None)
    logged = {"rl": "dpo"} | PLANTED
    for name, text in (
        ("README.md", f"<details>\n```yaml\n{yaml.safe_dump(logged)}```\n</details>"),
        ("debug.log", f"config:\n{json.dumps(logged)}"),
    ):
        dpo = folder / f"dpo-{Path(name).stem}"
        dpo.mkdir()
        (dpo / "trainer_state.json").write_bytes((folder / "out/trainer_state.json").read_bytes())
        (dpo / name).write_text(text)
    runs = [folder / name for name in ("out", "python", "dpo-README", "dpo-debug")]
    (folder / "report").mkdir()
    done = run("report", *runs, "-o", folder / "report/r.html")
    assert done.exit_code == 0, done.output
    written = [
        path
        for place in (folder / "out", folder / "python", folder / "report")
        for path in place.rglob("*")
        if path.is_file()
    ]
    names = {path.name for path in written}
    assert {"bapo_run.json", "trainer_state.json", "README.md", "r.html"} <= names
    leaks = [path.name for path in written if SECRET.encode() in path.read_bytes()]
    assert not leaks
    # it isn't only left out: the keys are there
    assert "comet_api_key" in (folder / "out/README.md").read_text()
    assert "comet_api_key" in (folder / "report/r.html").read_text()


def test_checks(folder):
    done = run("check", config(folder), "--json")
    assert done.exit_code < 2, done.output
    assert run("check", config(folder)).exit_code < 2
    faults = {
        "datasets": [
            {
                "path": f"https://me:{SECRET}@127.0.0.1:9/rows.jsonl?token={SECRET}",
                "type": "chat_template.default",
            },
            {"token": SECRET},
        ],
        "bapo": {"anchors": {"engine": "server", "server": {"url": f"ftp://me:{SECRET}@host"}}},
        "comet_api_key": {"value": SECRET},
    }
    for change in faults:
        done = run("check", config(folder, **{change: faults[change]}), "--json")
        assert done.exit_code == 2 and json.loads(done.stdout)["errors"]
    entry = faults["datasets"][:1]
    assert run("check", config(folder, datasets=entry), "--json").exit_code == 2


def test_a_server_that_does_not_answer(folder):
    server = BAPOConfig(
        anchors={"engine": "server", "server": {"url": URL, "retries": 0, "probe": False}}
    ).anchors.server
    engine = ServerEngine(make_tokenizer(), server, Sampling(), "model", [2])
    with pytest.raises(ServerError) as error:
        ids = tuple(make_tokenizer()("a")["input_ids"])
        list(engine.generate([Request("k", "a", ids, 2)], lambda n: None))
    assert SECRET not in str(error.value) and "https://127.0.0.1:9/v1/completions" in str(
        error.value
    )


def test_provenance(folder, chatml):
    anchors = BAPOConfig(anchors={"engine": "server", "server": {"url": URL}}).anchors
    with Store(folder / "store.sqlite") as store:
        made = provenance(
            ReferenceSpec(str(folder / "model")), chatml, ["template"], anchors, [2], store
        )
    assert SECRET not in json.dumps(made) and "127.0.0.1" in json.dumps(made)


def test_doctor(folder):
    run("doctor", HF_TOKEN=SECRET, WANDB_API_KEY=SECRET, OPENAI_API_KEY=SECRET)
    run("doctor", "--json", HF_TOKEN=SECRET, WANDB_API_KEY=SECRET, OPENAI_API_KEY=SECRET)


def test_personas_copy_no_secret_into_folders_that_may_be_shared(folder):
    (folder / "personas.yml").write_text("pirate: {seed: 1}\n")
    done = run("personas", config(folder), folder / "personas.yml", "--list")
    assert done.exit_code == 2
    for key in ("comet_api_key", "hf_token", "bapo.anchors.server.url", "hub_strategy"):
        assert key in done.output
    assert "set it in the environment" in done.output
    assert not list((folder / "out").rglob("config.yml"))


def test_the_last_word_hides_what_an_error_shows(capsys):
    before = sys.excepthook
    try:
        last_word.install()
        code = compile(f"raise ValueError('{URL} is wrong')", last_word.__file__, "exec")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(last_word, "_launcher", lambda: None)
            try:
                exec(code)
            except ValueError as error:
                sys.excepthook(ValueError, error, error.__traceback__)
    finally:
        sys.excepthook = before
    assert SECRET not in (said := capsys.readouterr().err) and "is wrong" in said
