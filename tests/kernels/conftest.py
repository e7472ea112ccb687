"""The kernel tests run on a CPU, offline; `bapo_kernels` need not be installed for them."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
if importlib.util.find_spec("bapo_kernels") is None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))


@pytest.fixture(autouse=True)
def _two_threads():
    torch.set_num_threads(2)
