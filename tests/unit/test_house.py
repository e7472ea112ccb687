"""The house: imports run one way, without a circle, and files fit in a head."""

import ast
from pathlib import Path

import pytest

import bapo_plugin

ROOT = Path(bapo_plugin.__file__).parent
# floors, from the ground up; a file imports from its own floor and from those below
FLOORS = [
    [
        "loss",
        "files",
        "base_weights",
        "store",
        "machines",
        "compat",
        "last_word",
        "blocks",
        "runs",
        "trust",
        "versions",
        "yaml_files",
    ],
    ["config", "network"],
    ["rows"],
    ["checks"],
    ["answers"],
    ["anchors"],
    ["models"],
    ["opening"],
    ["preparation", "prepare"],
    ["scoring"],
    ["planning"],
    ["training"],
    ["evaluation", "commands", "report"],
    ["plugin", "cli", "__main__", "__init__"],
]
LEVEL = {name: i for i, names in enumerate(FLOORS) for name in names}
FILES = sorted(ROOT.rglob("*.py"))


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Modules of ours that a file imports anywhere in it, but for types."""
    found = set()
    tree = ast.parse(path.read_text("utf-8"))
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            inner = name.removeprefix("bapo_plugin.")
            if (
                name.startswith("bapo_plugin.")
                and (ROOT / (inner.replace(".", "/") + ".py")).exists()
            ):
                found.add(inner)
    return found


GRAPH = {module_of(path): imports(path) for path in FILES}


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_no_arrow_runs_up(module):
    floor = LEVEL[module.split(".")[0]]
    up = [other for other in GRAPH[module] if LEVEL[other.split(".")[0]] > floor]
    assert not up, f"{module} imports {up} from a floor above"


def test_no_circle():
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in sorted(GRAPH[module]):
                visit(other)
            path.pop()
            done.add(module)

    for module in GRAPH:
        visit(module)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_file_is_long(path):
    assert len(path.read_text("utf-8").splitlines()) <= 400


@pytest.mark.parametrize("module", ["rows", "answers", "anchors", "scoring", "training"])
def test_below_prepare_nothing_takes_axolotls_configuration(module):
    for path in (ROOT / module).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert "cfg" not in [arg.arg for arg in node.args.args], f"{path.name}: {node.name}"
