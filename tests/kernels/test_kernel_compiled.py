"""Every kernel and every shipped configuration, compiled ahead of time; no GPU needed.

Triton's cache makes later runs quick.
"""

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton isn't installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

from bapo_kernels import inspect

# 15 kernels an architecture, about a second each the first time: two in the quick run.
ARCHITECTURES = [
    pytest.param(a, marks=() if a in (89, 90) else pytest.mark.slow) for a in inspect.ARCHITECTURES
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_limits(architecture):
    rows = [inspect.measure(v, architecture) for v in inspect.variants(architecture)]
    assert {r.kernel for r in rows} == {"rows", "rows+grad", "forward", "merge"}
    for row in rows:
        assert row.spilled == 0, row
        assert row.registers <= 255, row
        assert row.shared <= inspect.SHARED_LIMIT[architecture], row
        if row.kernel == "forward":
            assert row.tensor_core > 0, row
            # both operands of every tile arrive in 16-byte pieces
            assert row.loads_128 >= 8, row
        if row.kernel.startswith("rows"):
            assert row.loads_128 >= 2, row
            # several programs an SM, or the two passes over a row don't overlap
            assert row.registers <= 80, row
        if row.kernel == "rows+grad":
            assert row.stores_wide >= 1, row


def test_consumer_cards_are_held_to_99_kilobytes():
    for architecture in (86, 89, 120):
        assert inspect.SHARED_LIMIT[architecture] == 101_376
