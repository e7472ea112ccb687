"""Cards by name. Memory as sold; dense bf16 TFLOP/s with fp32 accumulation and GB/s of memory as their vendors publish them."""

import difflib
import re
from typing import NamedTuple


class Card(NamedTuple):
    """`vram` in GiB, `tflops` dense bf16, `bandwidth` in GB/s."""

    name: str
    vram: float
    tflops: float
    bandwidth: float


CARDS = (
    Card("RTX 3060 12GB", 12, 25.6, 360),
    Card("RTX 4060 8GB", 8, 30.2, 272),
    Card("RTX 4060 Ti 16GB", 16, 44.1, 288),
    Card("RTX 3090", 24, 71.2, 936),
    Card("RTX 4090", 24, 165.2, 1008),
    Card("RTX 5090", 32, 209.5, 1792),
    Card("L4", 24, 121.0, 300),
    Card("A10", 24, 125.0, 600),
    Card("L40S", 48, 362.0, 864),
    Card("A100 40GB", 40, 312.0, 1555),
    Card("A100 80GB", 80, 312.0, 2039),
    Card("H100 80GB", 80, 989.4, 3350),
    Card("H200", 141, 989.4, 4800),
)


def find_card(name: str) -> Card:
    """The card of this name, however it is written ("4090", "rtx4090", "NVIDIA A100 80GB").

    Raises:
        ValueError: there is none in the table, or more than one.
    """
    wanted = _plain(name)
    exact = [card for card in CARDS if _plain(card.name) == wanted]
    found = exact or [card for card in CARDS if wanted and wanted in _plain(card.name)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(card.name for card in found or CARDS)
    if found:
        raise ValueError(f"--gpu: {name!r} may be one of {names}; name one of them")
    near = difflib.get_close_matches(wanted, [_plain(card.name) for card in CARDS], n=1)
    hint = next(
        (f"did you mean {c.name}? " for c in CARDS if near and _plain(c.name) == near[0]), ""
    )
    raise ValueError(
        f"--gpu: {name!r} is no card of the table; {hint}Give its memory with --vram (GiB) instead, or one of {names}"
    )


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())
