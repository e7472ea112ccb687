"""Every kernel and every shipped configuration, compiled ahead of time; no GPU needed.

Triton's cache makes later runs quick.
"""

import importlib.util
import math
import os

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton isn't installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

from bapo_kernels import inspect, triton_forward, triton_rows

# 15 kernels an architecture, about a second each the first time: one in the quick run.
ARCHITECTURES = [
    pytest.param(a, marks=() if a == 90 else pytest.mark.slow) for a in inspect.ARCHITECTURES
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


H100, RTX_4090, RTX_3060 = 132, 128, 28  # multiprocessors


@pytest.mark.parametrize("processors", [H100, RTX_4090, RTX_3060])
@pytest.mark.parametrize("vocabulary, width", [(128_256, 4096), (151_936, 2048), (256_000, 3584)])
def test_chunks_fill_the_device(processors, vocabulary, width):
    """The last wave of the second GEMM is 80% full or more, within a budget of 1 GiB."""
    row_bytes = vocabulary * 6
    rows = triton_rows.chunk_rows(row_bytes, width, triton_rows.DEFAULT_CHUNK_BYTES, processors)
    assert rows >= 512 and rows * row_bytes <= 1 << 30
    waves = (rows / 128) * (width / 128) / processors
    assert waves / math.ceil(waves) >= 0.8, waves


@pytest.mark.parametrize("budget, rows", [(1, 16), (50 * 6000, 48), (300 * 6000, 256)])
def test_a_chunk_stays_within_its_budget(budget, rows):
    assert triton_rows.chunk_rows(6000, 64, budget, H100) == rows


@pytest.mark.parametrize("processors", [H100, RTX_4090, RTX_3060])
@pytest.mark.parametrize("tokens", [64, 512, 2048, 8192, 24_576])
@pytest.mark.parametrize("vocabulary", [49_152, 128_256, 151_936, 256_000, 32_003])
def test_splits_fill_the_device(processors, tokens, vocabulary):
    config = triton_forward.CONFIG
    tiles = math.ceil(vocabulary / config["BLOCK_V"])
    splits, per_split = triton_forward.split_plan(tokens, vocabulary, config, processors)
    assert (splits - 1) * per_split < tiles <= splits * per_split  # all of them, and none empty
    blocks = math.ceil(tokens / config["BLOCK_T"])
    in_turn = math.ceil(blocks * splits / processors) * per_split
    assert blocks * tiles / processors / in_turn >= 0.85


def test_consumer_cards_are_held_to_99_kilobytes():
    for architecture in (86, 89, 120):
        assert inspect.SHARED_LIMIT[architecture] == 101_376
