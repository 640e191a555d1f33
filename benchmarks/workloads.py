"""The batches that are timed: synthetic lengths of common shapes, from fixed seeds, and lengths of real text and speech."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .lengths import SPEECH_MILLISECONDS, frames, text_batch

__all__ = ["REAL", "SYNTHETIC", "WORKLOADS", "Workload"]


@dataclass(frozen=True)
class Workload:
    """A batch by its lengths.

    Attributes:
        name: w1 to w6, text, speech.
        says: what it stands for.
        padded_len: S.
        lengths: real tokens of each row.
    """

    name: str
    says: str
    padded_len: int
    lengths: tuple[int, ...]

    @property
    def fill(self) -> float:
        """Share of the B*S positions that are tokens."""
        return sum(self.lengths) / (len(self.lengths) * self.padded_len)

    @property
    def pair_fill(self) -> float:
        """Share of the B*S*S scores that are between tokens: what attention itself has to compute."""
        return sum(n * n for n in self.lengths) / (len(self.lengths) * self.padded_len**2)

    @property
    def key_padding_mask(self) -> Tensor:
        """``(B, S)`` bool, True is padding."""
        return torch.arange(self.padded_len) >= torch.tensor(self.lengths)[:, None]

    def __str__(self) -> str:
        return f"{self.name}: B {len(self.lengths)}, S {self.padded_len}, fill {self.fill:.2f}, pairs {self.pair_fill:.2f} ({self.says})"


def _lognormal(batch: int, padded_len: int, median: float, spread: float, least: int) -> tuple[int, ...]:
    """Many short rows and a few long ones, as text has; the first row has full length."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.exp(torch.randn(batch, generator=generator) * spread + math.log(median)).round().clamp(least, padded_len).long()
    lengths[0] = padded_len
    return tuple(lengths.tolist())


def _uniform(batch: int, padded_len: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(0)
    lengths = (padded_len * (0.3 + 0.7 * torch.rand(batch, generator=generator))).long()
    lengths[0] = padded_len
    return tuple(lengths.tolist())


SYNTHETIC: tuple[Workload, ...] = (
    Workload("w1", "paragraphs", 512, _lognormal(32, 512, median=165, spread=0.55, least=8)),
    Workload("w2", "long documents", 2048, _uniform(8, 2048)),
    Workload("w3", "sentences", 128, _lognormal(128, 128, median=28, spread=0.5, least=4)),
    Workload("w4", "one long row among short ones", 4096, (4096, 512, 300, 700)),
    Workload("w5", "no padding", 512, (512,) * 16),
    Workload("w6", "very short sentences", 64, _lognormal(64, 64, median=26, spread=0.5, least=2)),
)

REAL: tuple[Workload, ...] = (
    Workload("text", "docstrings, in the order of files", max(text_batch()), text_batch()),
    Workload("speech", "frames of spoken prompts", frames(max(SPEECH_MILLISECONDS)), tuple(map(frames, SPEECH_MILLISECONDS))),
)
WORKLOADS = SYNTHETIC + REAL
