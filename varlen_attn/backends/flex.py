"""`torch.nn.attention.flex_attention` with a document block mask: declared, not connected yet.

Read in torch's source (2.13), run on a CPU only: a document mask costs ``O(T^2)`` memory unless its construction is compiled; there
is no backward on a CPU; changing lengths recompile; no dropout and no sinks. It is the one fused kernel that takes a score bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import SeqLayout
from ..problem import Problem, Semantics
from .base import HALF, Backend, Capabilities, Extras


class Flex(Backend):
    """`flex_attention` over packed rows, sequences kept apart by a block mask."""

    name = "flex"
    install = "use 'sdpa_padded'"
    capabilities = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=HALF | {torch.float32},
        min_capability=(8, 0),
        rocm=False,
        dropout=False,
        sinks=False,
        deterministic=False,
    )

    def missing(self, problem: Problem) -> str | None:
        return f"this version of varlen_attn has no adapter for flex_attention yet (torch {problem.torch_version} is there)"

    def kernel(self, problem: Problem) -> str:
        return "flex_attention (triton_tem_fused_flex_attention)"

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
        raise NotImplementedError("varlen_attn has no adapter for flex_attention yet")
