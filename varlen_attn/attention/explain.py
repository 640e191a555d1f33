"""`explain` a call before it is made, and say what this machine has."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from ..layout.seq_layout import SeqLayout
from .dispatch import Plan
from .functional import Asked, plan_attention


def explain(
    query: Tensor, key: Tensor, value: Tensor, layout: SeqLayout, layout_kv: SeqLayout | None = None, *, return_lse: bool = False,
    **semantics: Unpack[Asked],
) -> Plan:  # fmt: skip
    """Which backend would run ``varlen_attention(query, key, value, layout, layout_kv, **semantics)``, and why the others would not.

    ``print`` it: what runs, and why, in two lines, in which every backend is named. ``plan.details()`` has all reasons and their fixes.
    Nothing is computed.

    Raises:
        what the call itself would raise.

    Examples:
        >>> x, layout = torch.randn(9, 2, 16), SeqLayout.from_lengths([5, 3, 1])
        >>> plan = explain(x, x, x, layout, causal=True, backend="cpu")
        >>> print(plan)
        cpu runs this: aten::_scaled_dot_product_flash_attention_for_cpu (declared)
        why: it was requested; ...
    """
    return plan_attention(query, key, value, layout, layout_kv, return_lse=return_lse, **semantics)
