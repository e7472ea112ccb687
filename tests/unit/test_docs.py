"""Documents say what is so: options are current, links lead somewhere, commands and YAML blocks are real."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
import yaml

from bapo_plugin.cli import app
from bapo_plugin.config import parse_block

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "yaml_examples").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMANDS = typer.main.get_command(app).commands


def blocks(language):
    return [
        pytest.param(text, id=f"{path.name}:{i}")
        for path in PAGES
        for i, (found, text) in enumerate(BLOCK.findall(path.read_text("utf-8")))
        if found == language
    ]


def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = BLOCK.sub("", path.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, place = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), f"{path.name}: {target}"
        if place:
            headings = re.findall(r"^#+ (.*)$", other.read_text("utf-8"), re.MULTILINE)
            assert place in map(anchor, headings), f"{path.name}: {target}"


def test_options_are_those_of_the_code(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import options

    assert options.PAGE.read_text("utf-8") == options.page(), "run `python docs/options.py`"
    sys.modules.pop("options")


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_is_what_we_take(text):
    found = yaml.safe_load(text)
    if isinstance(found, dict) and "bapo" in found:
        parse_block(found["bapo"])


@pytest.mark.parametrize("text", blocks("bash"))
def test_commands_of_ours_have_these_options(text):
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "bapo_plugin" in words:
            words = ["bapo", *words[words.index("bapo_plugin") + 1 :]]
        if words[:1] != ["bapo"]:
            continue
        command = COMMANDS[words[1]]
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        given = {word.partition("=")[0] for word in words[2:] if word.startswith("-")}
        assert given <= known | {"--help"}, line


def test_every_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text("utf-8")
    documents = text + "".join(path.read_text("utf-8") for path in PAGES)
    for name in COMMANDS:
        assert f"bapo {name}" in documents, name
