"""Base-Anchored Preference Optimization (BAPO, arXiv 2407.00693) for axolotl.

Start reading in `bapo_plugin/loss.py`: it is the method. `plugin.py` is where axolotl comes in.

axolotl 0.21 and later imports this package in every run, so nothing heavy is imported here: the
public names are loaded when they are first used.
"""

from importlib import import_module

__version__ = "0.1.0"
# setup.py and `versions` read it; each minor version in it is tested
AXOLOTL = ">=0.19.0,<0.22"

_EXPORTS = {
    "BAPOPlugin": "bapo_plugin.plugin",
    "BAPOConfig": "bapo_plugin.config",
    "BAPOTrainer": "bapo_plugin.training.trainer",
    "bapo_loss": "bapo_plugin.loss",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name in _EXPORTS:
        from bapo_plugin.versions import refuse_older

        refuse_older()  # before an import of what isn't there yet says it in its way
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
