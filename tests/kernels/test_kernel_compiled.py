"""Every kernel and every shipped configuration, compiled ahead of time; no GPU needed.

Triton's cache makes later runs quick.
"""

import importlib.util
import itertools
import os

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton isn't installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

from bapo_kernels import inspect, triton_slabs

# 25 kernels an architecture, about half a second each the first time: one in the quick run.
ARCHITECTURES = [
    pytest.param(a, marks=() if a == 90 else pytest.mark.slow) for a in inspect.ARCHITECTURES
]
# registers a thread: an SM has 65,536
MOST = {"slab": 64, "kl": 128}
# bytes a thread: Blackwell's assembler lacks up to eight registers of 64 in the widest slab (triton 3.8: bf16 16, fp32 32; 3.9: fp32 24)
SPILLED = {(100, "slab", "plain, 32768"): 32}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_limits(architecture):
    rows = [inspect.measure(v, architecture) for v in inspect.variants()]
    assert {r.kernel for r in rows} == {"slab", "close", "kl"}
    for row in rows:
        assert row.spilled <= SPILLED.get((architecture, row.kernel, row.options), 0), row
        assert row.shared <= 1024, row
        if row.kernel == "close":
            assert row.registers <= 64 and row.loads_128 >= 1, row
            continue
        plain = row.options.startswith("plain")
        assert row.registers <= (MOST[row.kernel] if plain else 128), row
        # logits come and go in 16-byte pieces
        assert row.loads_128 >= 4 and row.stores_wide >= 1, row


HEADS = [(128_256, 4096), (151_936, 2048), (256_000, 3584), (49_152, 576), (32_003, 4096), (3, 16)]


@pytest.mark.parametrize("budget", [0, 1, 20 << 20, 300 << 20])
@pytest.mark.parametrize("tokens", [1, 64, 513, 8192, 24_577])
@pytest.mark.parametrize("vocabulary, width", HEADS)
def test_slabs_cover_everything_within_their_budget(vocabulary, width, tokens, budget):
    for need_unit in (True, False):
        rows, columns = triton_slabs.slab_plan(tokens, vocabulary, width, need_unit, budget)
        for slices, size in ((rows, tokens), (columns, vocabulary)):
            assert slices[0].start == 0 and slices[-1].stop == size
            assert all(a.stop == b.start for a, b in itertools.pairwise(slices))
            assert all(s.stop > s.start for s in slices)
        high, wide = rows[0].stop, columns[0].stop
        assert all(s.stop - s.start == wide for s in columns[:-1])
        assert len(columns) == 1 or wide & (wide - 1) == 0  # the kernel's block is a power of two
        used = high * (4 * wide + 4 * width * need_unit)
        least = 16 * (4 * triton_slabs.MIN_COLUMNS + 4 * width * need_unit)
        assert used <= max(budget or (64 << 20) + 4 * high * width * need_unit, least)
        two, halves = triton_slabs.slab_plan(tokens, vocabulary, width, need_unit, budget, 8192, 2)
        used = two[0].stop * (8 * halves[0].stop + 4 * width * need_unit)
        assert halves[-1].stop == vocabulary and halves[0].stop <= 8192
        least = 16 * (8 * triton_slabs.MIN_COLUMNS + 4 * width * need_unit)
        assert used <= max(budget or (64 << 20) + 4 * two[0].stop * width * need_unit, least)


def test_the_readmes_memory():
    """Llama 3 8B: 64 MiB of logits and 32 MiB of sums, whatever T is."""
    rows, columns = triton_slabs.slab_plan(8192, 128_256, 4096, True, 0)
    assert (rows[0].stop, columns[0].stop) == (2048, 8192)
