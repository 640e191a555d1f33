"""What attention with packing around it could take at best on an H100: bytes at the speed of memory, products at a published rate.

Nothing here was measured by this project. Rates of kernels are read off the figures of the FlashAttention-3 paper (arXiv:2407.08608; H100
SXM5, half precision, 16384 tokens, N*H = 2048, not causal); those at 256 tokens are not in it, they continue its trend. A copy is taken
for 3.0 TB/s. A kernel is taken to run at its rate for the mean of the lengths. Launches cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["BACKWARD", "COPY", "RATES", "attention_seconds", "limit_seconds", "moving_seconds", "rate"]

COPY = 3.0e12  # bytes a second, read and written
BACKWARD = 2.5  # products of the backward / products of the forward
_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)

# (kernel, direction, head dimension): TFLOP/s at _LENGTHS
RATES: dict[tuple[str, str, int], tuple[float, ...]] = {
    ("FA2", "forward", 64): (249, 282, 306, 318, 321, 322, 324),
    ("FA3", "forward", 64): (260, 333, 392, 460, 476, 496, 497),
    ("FA2", "backward", 64): (164, 198, 238, 264, 279, 287, 291),
    ("FA3", "backward", 64): (210, 272, 363, 422, 453, 472, 474),
    ("FA2", "forward", 128): (262, 309, 350, 362, 368, 370, 370),
    ("FA3", "forward", 128): (370, 467, 565, 625, 638, 646, 648),
    ("FA2", "backward", 128): (170, 214, 260, 291, 310, 318, 322),
    ("FA3", "backward", 128): (240, 316, 424, 501, 542, 559, 561),
}


def rate(kernel: str, direction: str, head_dim: int, length: float) -> float:
    """FLOP/s at a length, between two of the table by its logarithm; at its ends beyond them."""
    table = RATES[kernel, direction, head_dim]
    place = math.log2(min(max(length, _LENGTHS[0]), _LENGTHS[-1]) / _LENGTHS[0])
    low = min(int(place), len(table) - 2)
    return (table[low] + (place - low) * (table[low + 1] - table[low])) * 1e12


def moving_seconds(tokens: int, slots: int, width: int, direction: str) -> float:
    """Pack q, k, v and unpack the output; in the backward, pack one gradient and unpack three. Two bytes a number."""
    packed, unpacked = 2 * tokens, tokens + slots
    rows = 3 * packed + unpacked if direction == "forward" else packed + 3 * unpacked
    return rows * width * 2 / COPY


def attention_seconds(lengths: Sequence[float], heads: int, head_dim: int, kernel: str, direction: str) -> float:
    products = 4 * heads * head_dim * sum(n * n for n in lengths) * (1.0 if direction == "forward" else BACKWARD)
    return products / rate(kernel, direction, head_dim, sum(lengths) / max(len(lengths), 1))


def limit_seconds(lengths: Sequence[int], columns: int, heads: int, head_dim: int, kernel: str, direction: str) -> float:
    """Pack, attend, unpack; ``direction`` "forward" or "forward+backward"."""
    return sum(
        moving_seconds(sum(lengths), len(lengths) * columns, heads * head_dim, way)
        + attention_seconds(lengths, heads, head_dim, kernel, way)
        for way in direction.split("+")
    )
