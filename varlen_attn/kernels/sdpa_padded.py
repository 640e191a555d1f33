"""Re-pad with zeros, then attention with a mask: the last resort, which takes every option on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import FLOATS, Backend, Capabilities
from .dense import EAGER, EFFICIENT, FLASH_CPU, attend_dense, dense_kernel, dense_kernel_here
from .problem import Problem
from .values import Call, Result


class SdpaPadded(Backend):
    """Dense masked attention on re-padded sequences."""

    name = "sdpa_padded"
    capabilities = Capabilities(devices=frozenset({"cpu", "cuda", "mps", "xpu"}), dtypes=FLOATS, transforms=True)

    def kernel(self, problem: Problem) -> str:
        return dense_kernel(
            problem.semantics, problem.device_type, problem.dtype, needs_grad=problem.needs_grad, transformed=problem.transformed,
            strict=problem.deterministic_mode, rocm=problem.rocm, capability=problem.capability,
        )  # fmt: skip

    def seen_as(self, problem: Problem) -> str:
        names = {EAGER: "(?i)softmax", EFFICIENT: "fmha_cutlassF", FLASH_CPU: "aten::_scaled_dot_product_flash_attention_for_cpu"}
        return names[self.kernel(problem)]

    def run(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
        (layout_q, layout_kv), semantics, extras = call.layouts, call.semantics, call.extras
        dense_q = layout_q.compact()
        dense_kv = dense_q if layout_kv is layout_q else layout_kv.compact()
        lengths_q, lengths_k = (x.cu_seqlens.to(torch.int64).diff() for x in (layout_q, layout_kv))
        offset = (lengths_k - lengths_q).view(-1, 1, 1, 1)
        key_real = torch.arange(dense_kv.padded_len, device=key.device) < lengths_k.view(-1, 1, 1, 1)
        q = dense_q.unpack(query).transpose(1, 2)
        k, v = (dense_kv.unpack(x).transpose(1, 2) for x in (key, value))

        kernel = dense_kernel_here(semantics, q, k, v)
        out, lse, _ = attend_dense(q, k, v, semantics, extras, visible=key_real, offset=offset, kernel=kernel)
        packed_lse = dense_q.pack(lse.transpose(1, 2)).transpose(0, 1) if semantics.return_lse and lse is not None else None
        if packed_lse is not None and layout_q.has_slack:
            packed_lse = torch.where(layout_q.valid_rows(), packed_lse, float("-inf"))
        return dense_q.pack(out.transpose(1, 2)), packed_lse
