"""Graphics cards and the least time in which they can do some work."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A card's name, its memory in GB and its nominal peak in TFLOP/s."""

    name: str
    memory: int
    peak: float


# Dense matrix products in bfloat16, summed in float32, at boost clock, from NVIDIA's papers: "Ampere GA102 GPU
# Architecture" v2 (30 series), "Ada GPU Architecture" (40 series), "RTX Blackwell GPU Architecture" (5090), and the
# data sheets of A100, H100 SXM and H200. Figures "with sparsity" are twice these. No program reaches them: on an H200
# 790 have been measured in large products.
CARDS = (
    Card("RTX 3070", 8, 40.6),
    Card("RTX 3080", 10, 59.5),
    Card("RTX 3090", 24, 71.0),
    Card("RTX 4080", 16, 97.5),
    Card("RTX 4090", 24, 165.2),
    Card("RTX 5090", 32, 209.5),
    Card("A100", 80, 312.0),
    Card("H100", 80, 989.4),
    Card("H200", 141, 989.4),
)


def floor_seconds(card: Card, flop: int) -> float:
    """The time of so many operations at the card's nominal peak: no step is faster."""
    return flop / (card.peak * 1e12)
