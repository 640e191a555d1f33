"""`explain` a call before it is made, and say what this machine has."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..layout.seq_layout import SeqLayout
from .dispatch import Plan
from .functional import plan_attention


def explain(query: Tensor, key: Tensor, value: Tensor, layout: SeqLayout, layout_kv: SeqLayout | None = None, **semantics: Any) -> Plan:
    """Which backend would run ``varlen_attention(query, key, value, layout, layout_kv, **semantics)``, and why the others would not.

    Names every backend exactly once, with all reasons and their fixes; ``print`` it. Nothing is computed.

    Raises:
        what the call itself would raise.
    """
    return plan_attention(query, key, value, layout, layout_kv, **semantics)
