"""Seconds of a step, from what a rehearsal counted and what a card's vendor publishes.

    seconds = max(host, products / (COMPUTE · peak) + bytes written / (TRAFFIC · bandwidth))

Three constants, fitted to 36 steps of benchmarks/results/step-gpu.csv (BAPO and TRL's DPO on H100 and H200; the 12 of padded
BAPO were left out of the fit). Where the card decides, the estimate is 0.84 to 1.10 of what was measured; where the host can't
start operations fast enough, 0.72 to 1.52. Other cards are scaled by their published figures and weren't measured.
"""

from bapo_plugin.planning.cards import Card
from bapo_plugin.planning.tracker import Peaks

COMPUTE = 0.70  # of the peak of dense bf16 products
TRAFFIC = 0.26  # of the bandwidth; what is written is read again
HOST = 6e-6  # seconds that the host takes to start an operation


def seconds(peaks: Peaks, card: Card) -> float:
    """A pass over a micro-batch, forward and backward.

    Args:
        peaks: of its rehearsal.
        card: with its peak TFLOP/s and GB/s.
    """
    products = peaks["flops"].total() / (COMPUTE * card.tflops * 1e12)
    traffic = peaks["written"].total() / (TRAFFIC * card.bandwidth * 1e9)
    return max(HOST * peaks["calls"].total(), products + traffic)
