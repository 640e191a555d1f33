"""What a model returns, and how far it is from what it returned before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

HUGE = 1e4
_HALF = (torch.float16, torch.bfloat16)


def tensors_of(x: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in mappings, sequences and dataclasses, by name: ``"logits"``, ``"[0].hidden[2]"``. Caches of models are none of these,
    and what they hold at padding is nobody's business."""
    if isinstance(x, Tensor):
        yield name, x
    elif isinstance(x, Mapping) or (is_dataclass(x) and not isinstance(x, type)):
        for key, y in (x if isinstance(x, Mapping) else vars(x)).items():
            yield from tensors_of(y, f"{name}.{key}" if name else f"{key}")
    elif isinstance(x, tuple | list):
        for i, y in enumerate(x):
            yield from tensors_of(y, f"{name}[{i}]")


def farthest(x: Tensor, y: Tensor) -> tuple[float, tuple[int, ...]]:
    """The largest absolute difference and its index; NaN is equal to NaN and infinitely far from numbers."""
    if x.numel() == 0:
        return 0.0, ()
    gap = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, (x - y).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return float(gap.max()), tuple(int(n) for n in torch.unravel_index(gap.argmax(), gap.shape))


class Gap(NamedTuple):
    """The largest difference, and the largest that rounding explains."""

    size: float
    allowed: float

    @property
    def explained(self) -> bool:
        """Whether rounding explains it."""
        return self.size <= self.allowed

    @property
    def share(self) -> float:
        """Of what rounding explains."""
        return self.size / self.allowed if self.allowed else self.size and float("inf")


def gap(before: Tensor, after: Tensor, where: Tensor | None = None, *, fine: float = 1e-3, dtype: torch.dtype | None = None) -> Gap:
    """Of tensors of one shape, there where they count. ``fine`` times the usual size is what may differ, but in half precision much more.

    Args:
        where: the part that counts; broadcasts to them.
        dtype: what was computed in, if not in the dtype of the results. Results that are no floats must be equal.
    """
    dtype = dtype or before.dtype
    a, b = (x.detach().double() for x in (before, after))
    if where is not None:
        where = where.expand(a.shape)
        a, b = a[where], b[where]
    usual = a[a.abs() < HUGE]  # the rest are scores of hidden keys and their like
    scale = float(usual.abs().max()) if usual.numel() else 1.0
    size, _ = farthest(a.clamp(-HUGE, HUGE), b.clamp(-HUGE, HUGE))
    return Gap(size, scale * (5e-2 if dtype in _HALF else fine) + 1e-6 if before.is_floating_point() else 0.0)
