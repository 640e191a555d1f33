"""Dense attention with a mask on ATen's kernels, called directly.

`F.scaled_dot_product_attention` would choose by global flags, and its choice on new GPUs (cuDNN with a mask) has returned NaN gradients
(pytorch#196678). Rows without a visible key give 0 and a log-sum-exp of -inf, with gradient 0, on every kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import HALF, constant_while_tracing, pad_head_dim, repeat_kv, wide_dtype

_ROCM = torch.version.hip is not None

# Of one call with dropout: the kernel counts its random numbers in 32 bits in the forward and in 64 in the backward (2.11 to 2.13).
_MAX_DROPPED = 2**32 - 1

EAGER = "eager matmul, softmax, matmul on the padded batch"


@constant_while_tracing
def _capability_here() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)


def masked_kernel_name(device_type: str, dtype: torch.dtype, rocm: bool = _ROCM, capability: tuple[int, int] | None = None) -> str:
    """The kernel that `masked_attention` calls, or `EAGER` where there is none for the device or dtype. What ROCm, Intel GPUs and MPS have
    of the kind was not read: eager maths is right there too."""
    if device_type == "cpu":
        return "aten::_scaled_dot_product_flash_attention_for_cpu with a mask"
    if device_type == "cuda" and dtype == torch.bfloat16 and (capability or _capability_here()) < (8, 0):
        return EAGER
    if device_type == "cuda" and dtype != torch.float64 and not rocm:
        return "aten::_scaled_dot_product_efficient_attention with a mask"
    return EAGER


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, bias: Tensor | None, scale: float | None, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``query (B,N,L,H)``, ``key (B,K,M,H)``, ``value (B,K,M,Hv)`` -> ``out (B,N,L,Hv)``, ``lse (B,N,L)``, detached.

    ``visible`` (bool) and ``bias`` (finite, added to the scaled scores, without gradient) broadcast to ``(B,N,L,M)``. The kernel of a CPU
    has no dropout.
    """
    if query.device.type == "cpu":
        assert not dropout_p
        return _flash_cpu(query, key, value, visible, bias, scale)
    return _efficient_cuda(query, key, value, visible, bias, scale, dropout_p)


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    """Gives 0 for a row without a visible key (documented nowhere, tested here), but a log-sum-exp of 0."""
    value_dim = v.shape[-1]
    q, k, v = pad_head_dim(1, q, k, v)
    mask = torch.zeros((), device=q.device, dtype=wide_dtype(q.dtype))
    mask = (mask if bias is None else bias).masked_fill(~visible, float("-inf"))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    return out[..., :value_dim], lse.detach().masked_fill(~visible.any(-1), float("-inf"))


def _efficient_cuda(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | None, scale: float | None, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The memory-efficient kernel. It wants q's dtype, full shape and a row stride of a multiple of 16 for its mask. What it makes of a
    row in which everything is hidden differs between versions: such rows see all keys here, and are zeroed afterwards."""
    value_dim, len_q, len_k = v.shape[-1], q.shape[2], k.shape[2]
    q, k, v = pad_head_dim(8 if q.dtype in HALF else 4, q, *repeat_kv(q.shape[1], k, v))
    seen = visible.any(-1, keepdim=True)
    mask = (q.new_zeros(()) if bias is None else bias.to(q.dtype)).masked_fill(~visible & seen, torch.finfo(q.dtype).min)
    mask = F.pad(mask.expand(*mask.shape[:-1], len_k), (0, -len_k % 16))[..., :len_k]
    mask = mask.expand(q.shape[0], q.shape[1], len_q, len_k)  # after the copy, which a mask of padding alone makes of its (B, 1, 1, M) only
    out, lse = _in_parts(q, k, v, mask, scale, dropout_p)
    lse = lse.masked_fill(~seen.squeeze(-1), float("-inf"))
    return torch.where(seen, out[..., :value_dim], 0), lse


def _in_parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    """``out (B,N,L,Hv)``, ``lse (B,N,L)``. A call with dropout has at most `_MAX_DROPPED` weights: samples, heads or queries are halved
    until then, none of which changes the result."""
    sizes = (*q.shape[:3], k.shape[2])
    dim = next((d for d in range(3) if sizes[d] > 1), None)
    if not dropout_p or dim is None or sizes[0] * sizes[1] * sizes[2] * sizes[3] <= _MAX_DROPPED:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, dropout_p, scale=scale)
        return out, lse.detach()[..., : q.shape[2]]
    half = sizes[dim] // 2
    parts = []
    for start, length in ((0, half), (half, sizes[dim] - half)):
        part_q, part_mask = (x.narrow(dim, start, length) for x in (q, mask))
        part_k, part_v = (x if dim == 2 else x.narrow(dim, start, length) for x in (k, v))
        parts.append(_in_parts(part_q, part_k, part_v, part_mask, scale, dropout_p))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim), torch.cat(lses, dim)
