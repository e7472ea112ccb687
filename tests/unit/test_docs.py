"""Documents say what is so: options are current, links lead somewhere, commands and YAML blocks are real."""

import ast
import re
import shlex
import sys

import pytest
import typer
import yaml
from axolotl.utils.schemas.enums import RLType
from documents import PAGES, ROOT, blocks, without_blocks
from pydantic import TypeAdapter, ValidationError

from bapo_plugin.cli import app
from bapo_plugin.config import parse_block

COMMANDS = typer.main.get_command(app).commands


def each(language):
    return pytest.mark.parametrize(
        "text", [pytest.param(block.text, id=block.name) for block in blocks(language)]
    )


def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = without_blocks(path.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, place = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        # a folder opens on a code host and nowhere else
        assert other.is_file(), f"{path.name}: {target}"
        if place:
            headings = re.findall(r"^#+ (.*)$", other.read_text("utf-8"), re.MULTILINE)
            assert place in map(anchor, headings), f"{path.name}: {target}"


def test_every_page_is_in_the_site():
    """mkdocs isn't installed here; `make docs` makes its own environment, and stops at links that lead nowhere."""
    site = yaml.safe_load((ROOT / ".ci/mkdocs.yml").read_text("utf-8"))

    def pages(part):
        if isinstance(part, str):
            return [part]
        values = part.values() if isinstance(part, dict) else part
        return [page for value in values for page in pages(value)]

    listed = pages(site["nav"])
    assert sorted(listed) == sorted({*listed})
    assert {*listed} >= {str(path.relative_to(ROOT)) for path in PAGES}
    assert all((ROOT / page).is_file() for page in listed)


def texts():
    """All texts in our code, pieces that are put in as a NUL."""
    for path in (ROOT / "bapo_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "\0" for p in node.values)
                yield "".join(map(str, parts))


def test_errors_are_quoted_as_they_are_printed():
    page = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    quoted = re.findall(r"\*\*`(.+?)`\*\*", page)
    assert len(quoted) > 10
    with pytest.raises(ValidationError) as of_axolotl:
        TypeAdapter(RLType).validate_python("bapo")
    ours = [*texts(), of_axolotl.value.errors()[0]["msg"]]
    for quote in quoted:
        parts = [part.strip() for part in quote.split("...")]
        assert any(all(part in text for part in parts) for text in ours), quote


def test_pictures_are_drawn_from_recorded_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import pictures

    found = pictures.pictures()
    sys.modules.pop("pictures")
    assert {path.stem for path in pictures.FOLDER.glob("*.png")} == set(found)
    for name, png in found.items():
        assert png.startswith(b"\x89PNG") and len(png) < 60_000
        assert f"pictures/{name}.png" in (ROOT / "docs/metrics.md").read_text("utf-8")
        # the same picture, but for how a version of matplotlib draws
        kept = (pictures.FOLDER / f"{name}.png").read_bytes()
        assert kept[16:24] == png[16:24], "run `python docs/pictures.py`"


def test_options_are_those_of_the_code(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import options

    assert options.PAGE.read_text("utf-8") == options.page(), "run `python docs/options.py`"
    sys.modules.pop("options")


@each("yaml")
def test_yaml_is_what_we_take(text):
    found = yaml.safe_load(text)
    if isinstance(found, dict) and "bapo" in found:
        parse_block(found["bapo"])


@each("bash")
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
