"""Other versions of axolotl, TRL, transformers, PEFT: what is said, and that all we touch in them is known and there."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import bapo_kernels
import bapo_plugin
from bapo_plugin import compat, versions
from bapo_plugin.cli import app

ROOT = Path(__file__).parents[2]
SOURCES = [Path(package.__file__).parent for package in (bapo_plugin, bapo_kernels)]
FOREIGN = ("axolotl", "trl", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
# methods of named tuples, and what the standard library documents
PUBLIC = {"_asdict", "_replace", "_exit"}


def as_if(monkeypatch, **numbers):
    real = versions.version
    monkeypatch.setattr(versions, "version", lambda name: numbers.get(name) or real(name))


# ------------------------------------------------------------ what is said


@pytest.mark.parametrize(
    "number, old, said",
    [
        ("0.18.0", True, None),
        ("0.9.1.post1", True, None),
        ("0.19.0", False, None),
        ("0.21.3", False, None),
        ("0.22.0.dev1", False, "axolotl 0.22.0.dev1 (tested: 0.19 to 0.21)"),
        ("1.0", False, "axolotl 1.0 (tested: 0.19 to 0.21)"),
    ],
)
def test_an_older_axolotl_is_refused_and_a_newer_one_is_said_to_be_untested(
    monkeypatch, number, old, said
):
    as_if(monkeypatch, axolotl=number)
    assert bool(versions.too_old()) is old
    if old:
        assert 'pip install "axolotl>=0.19.0,<0.22"' in versions.too_old()
        with pytest.raises(ValueError, match=f"axolotl {number} is too old"):
            bapo_plugin.BAPOPlugin  # noqa: B018
        return
    warning = versions.untested()
    assert (
        (said in warning and "\n" not in warning and "pip install" in warning)
        if said
        else not warning
    )


def test_a_version_that_was_forced_is_named(monkeypatch):
    as_if(monkeypatch, trl="1.15.0", peft="0.19.1")
    assert (
        "trl 1.15.0 (tested: 1.9 to 1.14), peft 0.19.1 (tested: 0.20 to 0.21)"
        in versions.untested()
    )


def test_every_command_but_doctor_ends_with_one_line_where_axolotl_is_too_old(monkeypatch):
    as_if(monkeypatch, axolotl="0.18.0")
    result = CliRunner().invoke(app, ["report", "nowhere"])
    assert result.exit_code == 2 and result.output.count("\n") == 1
    assert result.output.startswith("Error: axolotl 0.18.0 is too old for axolotl-plugin-bapo")


def test_what_is_tested_are_the_locks():
    for lock in (ROOT / ".ci").glob("lock-py*.txt"):
        pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", lock.read_text("utf-8"), re.MULTILINE))
        for package, (first, last) in versions.TESTED.items():
            assert first <= versions.numbers(pinned[package]) <= last, f"{lock.name}: {package}"


def test_setup_asks_for_what_is_tested():
    setup = (ROOT / "setup.py").read_text("utf-8")
    assert 'install_requires=[f"axolotl{AXOLOTL}"' in setup and "axolotl>=" not in setup


# ------------------------------------------------------------ what is there


@pytest.mark.parametrize("name", compat.TOUCHED)
def test_what_we_touch_is_there(name):
    assert compat.moved(name) is None, compat.moved(name)


@pytest.mark.parametrize(
    "name", ["trl.DPOTrainer._gone", "trl.gone.thing", "transformers.trainer._gone.deeper"]
)
def test_a_name_that_has_moved_is_said_with_what_needed_it(monkeypatch, name):
    monkeypatch.setitem(compat.TOUCHED, name, "training/trainer.py overrides to do this")
    said = compat.moved(name)
    package = name.split(".")[0]
    assert said.startswith(f"{package} {versions.found(package)} has no {name} any more")
    assert "training/trainer.py overrides to do this; see bapo_plugin/compat.py" in said
    with pytest.raises(ValueError, match="has no"):
        compat.refuse_moved()


# ------------------------------------------------------------ that nothing is missing in the list


def uses(path):
    """(line, name, whether it is a whole path) of what a file touches in others, as far as its text shows it."""
    tree = ast.parse(path.read_text("utf-8"))
    own, modules = set(), set()  # names of the file's own; our modules that it imports
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own |= {node.attr} if ast.unparse(node.value) == "self" else set()
        elif isinstance(node, ast.AnnAssign | ast.Assign) and not isinstance(node, ast.Attribute):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            own |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bapo_"):
            modules |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            private = any(part.startswith("_") for part in node.module.split("."))
            for alias in node.names:
                deep = "." in node.module and node.module.split(".")[0] in FOREIGN
                if deep or (
                    (private or alias.name.startswith("_")) and node.module != "__future__"
                ):
                    if not node.module.startswith("bapo_"):
                        yield node.lineno, f"{node.module}.{alias.name}", True
        elif isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            value = ast.unparse(node.value)
            if node.attr not in own | PUBLIC and value not in modules:
                yield node.lineno, node.attr, False
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "getattr",
            "hasattr",
            "setattr",
        ):
            name = node.args[1]
            if isinstance(name, ast.Constant) and re.match(r"_[a-z]", str(name.value)):
                if name.value not in own:
                    yield node.lineno, name.value, False


# public in their packages, though these have parts
DOCUMENTED = (
    "datasets.utils.",
    "accelerate.utils.",
    "transformers.utils.",
    "transformers.integrations.",
)
# marks that we put on functions of others
OURS = {"_bapo"}


def test_every_private_name_that_a_file_shows_is_in_the_list():
    last = {name.split(".")[-1] for name in compat.TOUCHED}
    modules = {name.rsplit(".", 1)[0] for name in compat.TOUCHED}
    missing = []
    for root in SOURCES:
        for path in root.rglob("*.py"):
            for line, name, whole in uses(path):
                known = name in compat.TOUCHED or name in modules if whole else name in last | OURS
                public = whole and name.startswith(DOCUMENTED) and name.split(".")[-1][0] != "_"
                if not known and not (public and name.count(".") == 2):
                    missing.append(f"{path.relative_to(root.parent)}:{line}: {name}")
    assert not missing, "not in compat.TOUCHED, with what becomes of them:\n" + "\n".join(missing)


def test_the_search_for_private_names_finds_them(tmp_path):
    path = tmp_path / "file.py"
    path.write_text(
        "from trl.trainer.utils import new\nfrom torch._inner import thing\nimport trl\n"
        "class Own:\n    def _mine(self):\n        self._kept = 1\n        return self._kept, self._mine(), trainer._theirs\n"
        "getattr(model, '_hidden', None)\n"
    )
    assert [name for _, name, _ in uses(path)] == [
        *("trl.trainer.utils.new", "torch._inner.thing"),
        *("_hidden", "_theirs"),
    ]


def test_every_method_of_others_that_a_class_overrides_is_in_the_list():
    last = {name.split(".")[-1] for name in compat.TOUCHED}
    missing = []
    for found in pkgutil.walk_packages(bapo_plugin.__path__, "bapo_plugin."):
        if found.name.endswith("__main__") or ".tasks" in found.name:
            continue
        module = importlib.import_module(found.name)
        for kind in vars(module).values():
            if not inspect.isclass(kind) or kind.__module__ != found.name:
                continue
            theirs = [base for base in kind.__mro__ if base.__module__.split(".")[0] in FOREIGN]
            for name in vars(kind):
                if not name.startswith(("__", "_abc")) and any(name in vars(b) for b in theirs):
                    missing += [f"{found.name}.{kind.__name__}.{name}"] if name not in last else []
    assert not missing, "not in compat.TOUCHED: " + ", ".join(missing)
