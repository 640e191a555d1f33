"""Re-pad with zeros, then dense attention with a mask: the last resort, which takes every option on every device.

ATen's kernels are called directly: `F.scaled_dot_product_attention` would choose by global flags, and its choice on new GPUs
(cuDNN with a mask) has returned NaN gradients (pytorch#196678). Whatever no dense kernel takes is exact eager maths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import SeqLayout
from ..problem import Problem, Semantics
from ._maths import alibi_bias, attend, needs_maths, visible_mask
from .base import FLOATS, HALF, Backend, Capabilities, Extras, connected_zeros, pad_head_dim, repeat_kv


class SdpaPadded(Backend):
    """Dense masked attention on re-padded sequences."""

    name = "sdpa_padded"
    capabilities = Capabilities(devices=frozenset({"cpu", "cuda", "mps", "xpu"}), dtypes=FLOATS)

    def kernel(self, problem: Problem) -> str:
        if _has_flash(problem.device_type, problem.semantics):
            return "aten::_scaled_dot_product_flash_attention_for_cpu with a mask"
        if _has_efficient(problem.device_type, problem.dtype, problem.semantics):
            return "aten::_scaled_dot_product_efficient_attention with a mask"
        return "eager matmul, softmax, matmul on the padded batch"

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout_q: SeqLayout,
        layout_kv: SeqLayout,
        semantics: Semantics,
        extras: Extras,
    ) -> tuple[Tensor, Tensor | None]:
        dense_q = layout_q.compact()
        dense_kv = dense_q if layout_kv is layout_q else layout_kv.compact()
        lengths_q, lengths_k = (x.cu_seqlens.to(torch.int64).diff() for x in (layout_q, layout_kv))
        offset = (lengths_k - lengths_q).view(-1, 1, 1, 1)
        columns = torch.arange(dense_kv.padded_len, device=key.device)
        key_real = columns < lengths_k.view(-1, 1, 1, 1)
        q = dense_q.unpack(query).transpose(1, 2)
        k, v = (dense_kv.unpack(x).transpose(1, 2) for x in (key, value))

        if 0 in (*q.shape[:3], *k.shape[:3]):
            out = connected_zeros((*q.shape[:3], value.shape[2]), query, key, value)
            lse = q.new_full(q.shape[:3], float("-inf"), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        elif _has_flash(query.device.type, semantics) or _has_efficient(query.device.type, query.dtype, semantics):
            visible = _visible(semantics, q.shape[2], columns, offset, key_real)
            kernel = _flash_cpu if query.device.type == "cpu" else _efficient_cuda
            bias = _bias(extras, q.shape[2], columns, offset, q.dtype)
            out, lse = kernel(q, k, v, visible, bias, semantics)
        else:
            out, lse = attend(q, k, v, semantics, extras, offset=offset, key_real=key_real)
        packed_lse = dense_q.pack(lse.transpose(1, 2)).transpose(0, 1) if semantics.return_lse else None
        if packed_lse is not None and layout_q.has_slack:
            packed_lse = torch.where(layout_q.valid_rows(), packed_lse, float("-inf"))
        return dense_q.pack(out.transpose(1, 2)), packed_lse


def _has_flash(device_type: str, semantics: Semantics) -> bool:
    return device_type == "cpu" and not needs_maths(semantics)


def _has_efficient(device_type: str, dtype: torch.dtype, semantics: Semantics) -> bool:
    return device_type == "cuda" and dtype != torch.float64 and not needs_maths(semantics)


def _visible(semantics: Semantics, len_q: int, columns: Tensor, offset: Tensor, key_real: Tensor) -> Tensor:
    """``(Q, 1, Lq or 1, Lk)`` bool."""
    rows = torch.arange(len_q, device=columns.device)[:, None]
    visible = visible_mask(semantics, rows, columns, offset)
    return key_real if visible is None else visible & key_real


def _bias(extras: Extras, len_q: int, columns: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor | None:
    if extras.alibi_slopes is None:
        return None
    rows = torch.arange(len_q, device=columns.device)[:, None]
    return alibi_bias(extras.alibi_slopes, rows, columns, offset)


def _flash_cpu(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | None, semantics: Semantics
) -> tuple[Tensor, Tensor]:
    """Gives 0 for a row without a visible key (documented nowhere, tested here), but a log-sum-exp of 0."""
    value_dim = v.shape[-1]
    q, k, v = pad_head_dim(1, q, k, v)
    mask = torch.zeros((), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    mask = (mask if bias is None else bias).masked_fill(~visible, float("-inf"))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=semantics.scale)
    return out[..., :value_dim], lse.detach().masked_fill(~visible.any(-1), float("-inf"))


def _efficient_cuda(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | None, semantics: Semantics
) -> tuple[Tensor, Tensor]:
    """The memory-efficient kernel. It wants q's dtype, full shape and a row stride of a multiple of 16 for its mask, and turns a
    row of -inf into NaN: so hidden keys get the lowest finite number, and rows without a visible key are zeroed afterwards."""
    value_dim, len_q, len_k = v.shape[-1], q.shape[2], k.shape[2]
    q, k, v = pad_head_dim(8 if q.dtype in HALF else 4, q, *repeat_kv(q.shape[1], k, v))
    mask = (q.new_zeros(()) if bias is None else bias.to(q.dtype)).masked_fill(~visible, torch.finfo(q.dtype).min)
    mask = F.pad(mask.expand(q.shape[0], q.shape[1], len_q, len_k), (0, -len_k % 16))[..., :len_k]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, scale=semantics.scale)
    seen = visible.any(-1, keepdim=True)
    lse = lse.detach()[..., :len_q].masked_fill(~seen.squeeze(-1), float("-inf"))
    return torch.where(seen, out[..., :value_dim], 0), lse
