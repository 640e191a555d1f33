"""Attention on padded tensors with a mask, by one of ATen's kernels or by eager math.

Not the specification (that is `reference`, which shares nothing with this file and is tested against it). ATen's kernels are called
directly: `F.scaled_dot_product_attention` would choose by global flags, and its choice on new GPUs (cuDNN with a mask) has returned NaN
gradients (pytorch#196678). A query that sees no key gives 0 and a log-sum-exp of -inf, with gradient 0, on every kernel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch import constant_while_tracing, is_observed, is_plain, is_transformed
from ..errors import ArgumentError
from ..layout.checks import describe
from .base import HALF, accumulation_dtype, pad_head_dim, repeat_kv
from .problem import Semantics, strictly_deterministic
from .values import NO_EXTRAS, Extras, ScoreBias

EAGER = "eager matmul, softmax, matmul on the padded batch"
FLASH_CPU = "aten::_scaled_dot_product_flash_attention_for_cpu with a mask"
EFFICIENT = "aten::_scaled_dot_product_efficient_attention with a mask"
FUSED = "aten::scaled_dot_product_attention with a mask"  # for exported graphs: the machine that runs them chooses

_ROCM = torch.version.hip is not None

# Of one call with dropout: the kernel counts its random numbers in 32 bits in the forward and in 64 in the backward (2.11 to 2.13).
_MAX_DROPPED = 2**32 - 1

_strict = constant_while_tracing(strictly_deterministic)


@constant_while_tracing
def _capability_here() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)


# -------------------------------------------------------------------- which kernel


def needs_eager(semantics: Semantics, device_type: str = "cpu") -> bool:
    """Whether a call has an option that the device's dense kernel does not take. That of a GPU takes dropout, but not of everything."""
    dropped = semantics.dropout_p if device_type != "cuda" else semantics.dropout_p == 1.0
    return bool(semantics.softcap or dropped or semantics.sinks or semantics.score_bias)


def dense_kernel(
    semantics: Semantics,
    device_type: str,
    dtype: torch.dtype,
    *,
    needs_grad: bool = False,
    transformed: bool = False,
    strict: bool = False,
    rocm: bool = _ROCM,
    capability: tuple[int, int] | None = None,
) -> str:
    """The kernel for a call; `EAGER` where its options, the device or the dtype allow no other. What ROCm, Intel GPUs and MPS have of the
    kind was not read: eager math is right there too.

    The backward of the memory-efficient kernel splits keys over blocks and adds up in any order, unless torch's global mode is ``strict``.
    """
    varies = semantics.deterministic and needs_grad and device_type == "cuda" and not strict
    if needs_eager(semantics, device_type) or varies or transformed:
        return EAGER
    if device_type == "cpu":
        return FLASH_CPU
    old = dtype == torch.bfloat16 and (capability or _capability_here()) < (8, 0)
    return EAGER if device_type != "cuda" or dtype == torch.float64 or rocm or old else EFFICIENT


def dense_kernel_here(semantics: Semantics, *tensors: Tensor) -> str:
    """`dense_kernel` for query, key and value."""
    query, grad = tensors[0], torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return dense_kernel(semantics, query.device.type, query.dtype, needs_grad=grad, transformed=is_transformed(), strict=_strict())


# -------------------------------------------------------------------- masks and biases


def is_nan(x: Tensor, rows: Tensor | None = None) -> bool:
    """Whether one is among ``x``, in one pass, which is left out where none of ``rows`` is True; False where values must not be read."""
    return is_plain(x) and not is_observed() and (rows is None or bool(rows.any())) and math.isnan(x.sum().item())


def visible_mask(semantics: Semantics, rows: Tensor, columns: Tensor, offset: int | Tensor) -> Tensor | None:
    """True where query position ``rows`` sees key position ``columns``; None if all is visible. Shapes broadcast."""
    low, high = semantics.visible_range(0)
    if low is None and high is None:
        return None
    shift = 0 if semantics.causal == "top_left" else offset  # visible_range is linear in the offset
    distance = columns - rows - shift
    visible = None if low is None else distance >= low
    if high is not None:
        visible = distance <= high if visible is None else visible & (distance <= high)
    return visible


def alibi_bias(slopes_N: Tensor, rows: Tensor, columns: Tensor, offset: int | Tensor) -> Tensor:
    """``(..., N, Lq, Lk)``: ``-slope * |i + Lk - Lq - j|``; rows ``(Lq, 1)``, columns ``(Lk,)``, offset int or ``(Q,1,1,1)``."""
    return -slopes_N[:, None, None] * (rows + offset - columns).abs()


def _score_bias(bias: ScoreBias, num_heads: int, rows: Tensor, columns: Tensor) -> Tensor:
    """``(N, Lq, Lk)`` of a tensor ``(N, Sq, Sk)`` or a callable, at ``rows (Lq, 1)`` and ``columns (Lk,)`` counted from 0; or
    ``(B, N, Lq, Lk)`` at positions ``(B,1,Lq,1)`` and ``(B,1,1,Lk)``, of which -1, before the first token, counts as 0."""
    if isinstance(bias, Tensor) and rows.dim() == 2:
        return bias[:, : rows.shape[0], : columns.shape[0]]
    head = torch.arange(num_heads, device=rows.device)[:, None, None]
    rows, columns = rows.clamp(min=0), columns.clamp(min=0)
    if isinstance(bias, Tensor):
        return bias[head, rows, columns]
    made: Any = bias
    try:
        made = bias(head, rows, columns)
        made.expand(torch.broadcast_shapes(head.shape, rows.shape, columns.shape))
    except (AttributeError, TypeError, RuntimeError) as error:
        if made is bias and not isinstance(error, TypeError):
            raise
        what = f"raises {error!r}" if made is bias else f"returns {describe(made)}"
        raise ArgumentError(
            "`score_bias` must be a tensor (N, Sq, Sk), or a callable (head, q_position, k_position) -> tensor that computes all scores at "
            f"once from index tensors of shapes {(*head.shape,)}, {(*rows.shape,)} and {(*columns.shape,)}, but it {what}."
        ) from error
    return made  # type: ignore[no-any-return]


def _may_be_fully_masked(semantics: Semantics, offset: int | Tensor, len_q: int, len_k: int) -> bool:
    """Whether a query may see no key: what the host knows saves passes over the scores."""
    if isinstance(offset, Tensor):
        return True
    low, high = semantics.visible_range(offset)
    return (high is not None and high < 0) or (low is not None and len_q + low > len_k)


# -------------------------------------------------------------------- attention


def attend_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    semantics: Semantics,
    extras: Extras = NO_EXTRAS,
    *,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    offset: int | Tensor = 0,
    positions: tuple[Tensor, Tensor] | None = None,
    kernel: str = EAGER,
    wide: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``query (B,N,Lq,H)``, ``key (B,K,Lk,H)``, ``value (B,K,Lk,Hv)`` -> ``out (B,N,Lq,Hv)``, ``lse (B,N,Lq)`` and weights ``(B,N,Lq,Lk)``.

    The log-sum-exp is detached; eager math gives it only if ``semantics`` ask for it. Weights come after dropout, as torch returns them,
    from eager math only.

    Args:
        visible: bool, False hides; broadcasts to ``(B,N,Lq,Lk)``. In addition to what ``semantics`` hide.
        bias: added to the scaled scores, likewise; -inf hides. Only eager math gives it a gradient.
        offset: ``Lk - Lq`` of the true lengths, an int or ``(B,1,1,1)``.
        positions: ``(B,1,Lq,1)`` and ``(B,1,1,Lk)``: of queries and keys in their sequences, if those are not their columns.
        kernel: as `dense_kernel` says; `FUSED` takes no bias and gives no log-sum-exp.
        wide: eager math computes half precision in float32.
    """
    num_heads, len_q, len_k = int(query.shape[1]), query.shape[2], key.shape[2]
    sure = visible is None and bias is None and extras.score_bias is None
    if semantics.causal or semantics.window or extras is not NO_EXTRAS:
        rows, columns = positions or (torch.arange(len_q, device=query.device)[:, None], torch.arange(len_k, device=query.device))
        near = visible_mask(semantics, rows, columns, offset)
        visible = near if visible is None else visible if near is None else visible & near
        terms = [] if bias is None else [bias]
        if extras.alibi_slopes is not None:
            terms.append(alibi_bias(extras.alibi_slopes, rows, columns, offset))
        if extras.score_bias is not None:
            terms.append(_score_bias(extras.score_bias, num_heads, rows, columns).to(accumulation_dtype(query.dtype)))
        bias = sum(terms[1:], start=terms[0]) if terms else None
    if kernel == FUSED:
        return _fused(query, key, value, visible, semantics.factor), None, None
    if kernel != EAGER and 0 not in (*query.shape[:3], *key.shape[:3]):
        out, its_lse, unseen = _by_kernel(kernel, query, key, value, visible, bias, semantics)
        # The kernel of a CPU adds -inf to scores that it hides, and NaN stays NaN; in a row that sees no key, that of a value too.
        if kernel != FLASH_CPU or visible is None or not (is_nan(its_lse) or is_nan(out, unseen)):
            return out, its_lse.masked_fill(unseen, float("-inf")), None

    dtype = accumulation_dtype(query.dtype) if wide else query.dtype
    q, k, v = (x.to(dtype) for x in (query, *repeat_kv(num_heads, key, value)))
    all_see = sure and not _may_be_fully_masked(semantics, offset, len_q, len_k)
    blind = None if all_see or visible is None else ~visible.any(-1, keepdim=True)
    q = q if blind is None else q.masked_fill(blind, 0.0)  # or 0 * NaN would be its gradient, and that of keys
    scores = (q * semantics.factor) @ k.transpose(-1, -2)
    if semantics.softcap is not None:
        scores = semantics.softcap * torch.tanh(scores / semantics.softcap)
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.detach().logsumexp(-1) if semantics.return_lse else None
    fully_masked = blind if all_see or bias is None else torch.isneginf(scores).all(-1, keepdim=True)
    weights = _softmax(scores, fully_masked, extras.sinks)
    weights = F.dropout(weights, semantics.dropout_p)
    out = weights @ v if blind is None else (weights @ v).masked_fill(blind, 0.0)
    return out.to(query.dtype), lse, weights


def _softmax(scores: Tensor, fully_masked: Tensor | None, sinks_N: Tensor | None) -> Tensor:
    """Softmax in which a ``fully_masked`` row, which is -inf throughout, is 0, with gradient 0 (a plain one gives NaN for both)."""
    if fully_masked is not None:
        scores = scores.masked_fill(fully_masked, 0.0)
    if sinks_N is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks_N.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return weights if fully_masked is None else weights.masked_fill(fully_masked, 0.0)


def _fused(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Rows that see nothing give 0 wherever the graph runs: some kernels, and ONNX, make NaN of them, so they see all and are zeroed."""
    if visible is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    fully_masked = ~visible.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible | fully_masked, scale=scale).masked_fill(fully_masked, 0.0)


def _by_kernel(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, bias: Tensor | None, semantics: Semantics
) -> tuple[Tensor, Tensor, Tensor]:
    """``out``, the kernel's log-sum-exp, and ``(B or 1, N or 1, Lq or 1)``: the rows that see no key, where that is wrong.

    The kernel of a CPU gives 0 for such a row (documented nowhere, tested here), but a log-sum-exp of 0.

    The memory-efficient kernel wants q's dtype, full shape and a row stride of a multiple of 16 for its mask. What it makes of a row in
    which everything is hidden differs between versions: such rows see all keys here, and are zeroed afterwards.
    """
    value_dim, len_k, dtype, scale = v.shape[-1], k.shape[2], q.dtype, semantics.factor
    mask = q.new_zeros((1, 1, 1, 1), dtype=accumulation_dtype(dtype) if kernel == FLASH_CPU else dtype) if bias is None else bias
    mask = mask if visible is None else mask.masked_fill(~visible, float("-inf"))
    fully_masked = torch.isneginf(mask).all(-1, keepdim=True)
    if kernel == FLASH_CPU:
        q, k, v = pad_head_dim(1, q, k, v)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    else:
        q, k, v = pad_head_dim(8 if dtype in HALF else 4, q, *repeat_kv(q.shape[1], k, v))
        mask = mask.masked_fill(fully_masked, 0.0).clamp(min=torch.finfo(dtype).min).to(dtype)
        mask = F.pad(mask.expand(*mask.shape[:-1], len_k), (0, -len_k % 16))[..., :len_k]
        mask = mask.expand(*q.shape[:3], len_k)  # after the copy, which a mask of padding alone makes of its (B, 1, 1, M) only
        out, lse = _in_parts(q, k, v, mask, scale, semantics.dropout_p)
        out = torch.where(fully_masked, 0, out)
    return out[..., :value_dim], lse.detach(), fully_masked.squeeze(-1)


def _in_parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, dropout_p: float) -> tuple[Tensor, Tensor]:
    """``out (B,N,L,Hv)``, ``lse (B,N,L)``. A call with dropout has at most `_MAX_DROPPED` weights: samples, heads or queries are halved
    until then, none of which changes the result."""
    sizes = (*q.shape[:3], k.shape[2])
    dim = next((d for d in range(3) if sizes[d] > 1), None)
    if not dropout_p or dim is None or sizes[0] * sizes[1] * sizes[2] * sizes[3] <= _MAX_DROPPED:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, dropout_p, scale=scale)
        return out, lse[..., : q.shape[2]]
    half = sizes[dim] // 2
    parts = []
    for start, length in ((0, half), (half, sizes[dim] - half)):
        part_q, part_mask = (x.narrow(dim, start, length) for x in (q, mask))
        part_k, part_v = (x if dim == 2 else x.narrow(dim, start, length) for x in (k, v))
        parts.append(_in_parts(part_q, part_k, part_v, part_mask, scale, dropout_p))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim), torch.cat(lses, dim)
