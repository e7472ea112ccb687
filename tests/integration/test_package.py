"""A release: the sdist holds all that a wheel needs, and the wheel made of it runs without the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"bapo_plugin": ROOT / "bapo_plugin", "bapo_kernels": ROOT / "kernels/bapo_kernels"}
# runs inside: everything can be imported, from where it was installed
IMPORTS = """
import importlib, pkgutil, sys
for name in ("bapo_plugin", "bapo_kernels"):
    package = importlib.import_module(name)
    assert package.__file__.startswith(sys.prefix), package.__file__
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        if module.name != "bapo_plugin.__main__":  # it is the command
            importlib.import_module(module.name)
from importlib.metadata import entry_points
(plugin,) = [e for e in entry_points(group="axolotl.plugins") if e.name == "bapo"]
assert plugin.load().__name__ == "BAPOPlugin"
"""


def run(*command, cwd):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment of its own with the wheel that was made of the sdist; libraries are those of this one."""
    folder = tmp_path_factory.mktemp("release")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for path in PACKAGES.values():
        shutil.copytree(
            path, source / path.relative_to(ROOT), ignore=shutil.ignore_patterns("__pycache__")
        )
    run(sys.executable, "setup.py", "-q", "sdist", "-d", folder / "dist", cwd=source)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    build = ("wheel", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, *build, sdist, "-w", folder / "wheels", cwd=folder)
    (wheel,) = (folder / "wheels").glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv/bin/python"
    where = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    libraries = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})"
    (Path(where.strip()) / "libraries.pth").write_text(libraries + "\n")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder, Path(where.strip())


@pytest.mark.slow
def test_the_command_and_all_modules(installed):
    folder, _ = installed
    from bapo_plugin import __version__

    said = run(folder / "venv/bin/bapo", "--version", cwd=folder)
    assert said.strip() == f"axolotl-plugin-bapo {__version__}"
    run(folder / "venv/bin/python", "-c", IMPORTS, cwd=folder)


@pytest.mark.slow
def test_nothing_is_left_behind(installed):
    _, where = installed
    for name, path in PACKAGES.items():
        files = {
            file.relative_to(path)
            for file in path.rglob("*")
            if file.is_file() and "__pycache__" not in file.parts
        }
        there = {file.relative_to(where / name) for file in (where / name).rglob("*")}
        assert not files - there, f"{name}: add them to package_data in setup.py"
        assert Path("py.typed") in files
