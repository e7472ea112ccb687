"""Packaging. The version, and that of axolotl, is read from the source; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
SOURCE = (HERE / "bapo_plugin/__init__.py").read_text("utf-8")
VERSION, AXOLOTL = (
    re.search(rf'^{name} = "(.+)"$', SOURCE, re.MULTILINE)[1] for name in ("__version__", "AXOLOTL")
)

setup(
    name="axolotl-plugin-bapo",
    version=VERSION,
    description="Base-Anchored Preference Optimization for axolotl: learn one user's taste, keep the model",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["bapo_plugin", "bapo_plugin.*"]),
        *find_packages("kernels"),
    ],
    package_data={
        "bapo_plugin": ["py.typed"],
        "bapo_kernels": ["py.typed"],
        "bapo_plugin.report": ["template.html"],
        "bapo_plugin.answers": ["data/*"],
        "bapo_plugin.evaluation": ["tasks/*.yaml", "tasks/*.py", "local_tasks/*.yaml"],
    },
    package_dir={"bapo_kernels": "kernels/bapo_kernels"},
    # torch and triton come with axolotl, which pins what it was tested with
    # matplotlib: figures of `bapo report`
    install_requires=[f"axolotl{AXOLOTL}", "matplotlib>=3.8"],
    # gguf: to read the demo's model
    extras_require={"test": ["pytest>=8", "pytest-xdist>=3.5", "ruff==0.17.6", "gguf>=0.10"]},
    entry_points={
        "axolotl.plugins": ["bapo = bapo_plugin:BAPOPlugin"],
        "console_scripts": ["bapo = bapo_plugin.cli:main"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
