"""Re-pad with zeros, then dense attention with a mask: the last resort, which takes every option on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from .._gather import is_transformed
from ..problem import Problem, Semantics, strictly_deterministic
from ._masked import EAGER, masked_attention, masked_kernel_name
from ._maths import alibi_bias, attend, needs_maths, visible_mask
from .base import FLOATS, Backend, Call, Capabilities, Extras, Result, connected_zeros, constant_while_tracing, wide_dtype


class SdpaPadded(Backend):
    """Dense masked attention on re-padded sequences."""

    name = "sdpa_padded"
    capabilities = Capabilities(devices=frozenset({"cpu", "cuda", "mps", "xpu"}), dtypes=FLOATS)

    def kernel(self, problem: Problem) -> str:
        want = problem.semantics
        varies = want.deterministic and problem.needs_grad and problem.device_type == "cuda" and not problem.deterministic_mode
        if needs_maths(want, problem.device_type) or varies or problem.transformed:
            return EAGER
        return masked_kernel_name(problem.device_type, problem.dtype, problem.rocm, problem.capability)

    def seen_as(self, problem: Problem) -> str:
        if self.kernel(problem) == EAGER:
            return "(?i)softmax"
        return "fmha_cutlassF" if problem.device_type == "cuda" else "aten::_scaled_dot_product_flash_attention_for_cpu"

    def run(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
        (layout_q, layout_kv), semantics, extras = call.layouts, call.semantics, call.extras
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
            lse: Tensor | None = q.new_full(q.shape[:3], float("-inf"), dtype=wide_dtype(q.dtype))
        elif not _is_eager(semantics, q, k, v):
            visible = _visible(semantics, q.shape[2], columns, offset, key_real)
            out, lse = masked_attention(q, k, v, visible, _bias(extras, q.shape[2], columns, offset), semantics.factor, semantics.dropout_p)
        else:
            out, lse = attend(q, k, v, semantics, extras, offset=offset, key_real=key_real)
        packed_lse = dense_q.pack(lse.transpose(1, 2)).transpose(0, 1) if semantics.return_lse and lse is not None else None
        if packed_lse is not None and layout_q.has_slack:
            packed_lse = torch.where(layout_q.valid_rows(), packed_lse, float("-inf"))
        return dense_q.pack(out.transpose(1, 2)), packed_lse


_strict = constant_while_tracing(strictly_deterministic)


def _is_eager(semantics: Semantics, *tensors: Tensor) -> bool:
    """Whether `attend` computes it, as `SdpaPadded.kernel` says.

    The backward of the memory-efficient kernel splits keys over blocks and adds up in any order, unless torch's global mode forbids it.
    """
    device_type, dtype = tensors[0].device.type, tensors[0].dtype
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    varies = semantics.deterministic and grad and device_type == "cuda" and not _strict()
    return needs_maths(semantics, device_type) or varies or is_transformed() or masked_kernel_name(device_type, dtype) == EAGER


def _visible(semantics: Semantics, len_q: int, columns: Tensor, offset: Tensor, key_real: Tensor) -> Tensor:
    """``(Q, 1, Lq or 1, Lk)`` bool."""
    rows = torch.arange(len_q, device=columns.device)[:, None]
    visible = visible_mask(semantics, rows, columns, offset)
    return key_real if visible is None else visible & key_real


def _bias(extras: Extras, len_q: int, columns: Tensor, offset: Tensor) -> Tensor | None:
    if extras.alibi_slopes is None:
        return None
    rows = torch.arange(len_q, device=columns.device)[:, None]
    return alibi_bias(extras.alibi_slopes, rows, columns, offset)
