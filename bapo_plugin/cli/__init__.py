"""The `bapo` command. `python -m bapo_plugin` is the same, for accelerate to launch on several GPUs.

Here are arguments and help; what a command does is in `bapo_plugin.commands`, `evaluation` and `report`, imported when it runs.
"""

import sys

from bapo_plugin.cli.app import app

# the order of the commands is that of the help
# isort: off
from bapo_plugin.cli import before, training, after  # noqa: F401

# isort: on

__all__ = ["app", "main"]


def main() -> None:
    """Entry point."""
    sys.exit(app())
