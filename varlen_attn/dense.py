"""Multi-head attention the dense way, with torch's meaning of every mask: for what packed kernels can not serve.

Arbitrary `attn_mask`, additive key masks, `add_bias_kv`, `add_zero_attn` and attention weights. Different from torch in two points, both
of which its users ask for: a row without a visible key gives 0 and not NaN, and what stands in padding is never read.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ._static import static_graph
from .backends._masked import EAGER, masked_attention, masked_kernel_name
from .backends._maths import safe_softmax

__all__ = ["additive_mask", "dense_attention", "dense_kernel_name"]


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """torch's bool masks (True is hidden) as 0 and -inf; float masks as they are."""
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))


def dense_kernel_name(query: Tensor, bias: Tensor | None, dropout_p: float, need_weights: bool) -> str:
    """The kernel that `dense_attention` calls."""
    if need_weights or dropout_p > 0 or (bias is not None and bias.requires_grad) or static_graph():
        return EAGER
    return masked_kernel_name(query.device.type, query.dtype)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, dropout_p: float = 0.0, need_weights: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``(B, L, N, H), (B, M, N, H), (B, M, N, H) -> (B, L, N, H)`` and weights ``(B, N, L, M)`` or None.

    ``bias`` is added to the scaled scores and broadcasts to ``(B, N, L, M)``; -inf hides a key. Weights come after dropout, as
    torch returns them; a row that sees no key has weights and output 0.
    """
    q, k, v = (rearrange(x, "b l n h -> b n l h") for x in (query, key, value))
    if 0 in (*q.shape[:3], k.shape[2]):
        weights = (q @ k.transpose(-1, -2)) * 0
        return rearrange(weights @ v, "b n l h -> b l n h"), weights if need_weights else None
    if dense_kernel_name(query, bias, dropout_p, need_weights) != EAGER:
        visible = torch.ones((), dtype=torch.bool, device=q.device) if bias is None else ~torch.isneginf(bias)
        visible = visible.expand(1, 1, q.shape[2], k.shape[2]) if visible.dim() < 4 else visible
        finite = None if bias is None else bias.masked_fill(~visible, 0.0)
        out, _ = masked_attention(q, k, v, visible, finite, q.shape[-1] ** -0.5)
        return rearrange(out, "b n l h -> b l n h"), None
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-1, -2)
    scores = scores if bias is None else scores + bias
    weights = safe_softmax(scores, torch.isneginf(scores).all(-1, keepdim=True))
    weights = F.dropout(weights, dropout_p)
    return rearrange(weights @ v, "b n l h -> b l n h"), weights if need_weights else None
