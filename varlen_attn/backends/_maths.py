"""Names that the `cpu` backend imports from here."""

from __future__ import annotations

from typing import Any

from ._dense import alibi_bias, attend_dense, visible_mask
from ._dense import needs_eager as needs_maths
from .base import Result

__all__ = ["alibi_bias", "attend", "needs_maths", "visible_mask"]


def attend(*args: Any, **options: Any) -> Result:
    """`attend_dense`, without the weights."""
    out, lse, _ = attend_dense(*args, **options)
    return out, lse
