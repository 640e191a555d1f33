"""flash-attn 4 (CuTe DSL, compiled when first called): declared, not connected yet.

Read in its source (``flash_attn/cute/interface.py``), not run: no dropout; ALiBi and biases only as a ``score_mod``; it has sinks; its
backward needs sm90 and its log-sum-exp of a row without keys is -inf; it registers no custom ops, so it can not be traced. Head
dimensions above 128 depend on the GPU. The distribution leaves a namespace package ``flash_attn`` without flash-attn 2 in it.
"""

from __future__ import annotations

from torch import Tensor

from ..layout import SeqLayout
from ..problem import Problem, Semantics
from .base import HALF, Backend, Capabilities, Extras


class Flash4(Backend):
    """flash-attn's kernels for Hopper and Blackwell, written in CuTe."""

    name = "flash4"
    package = "flash-attn-4"
    install = "use 'torch_varlen' or 'flash2'"
    capabilities = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=HALF,
        min_capability=(9, 0),
        rocm=False,
        max_head_dim=128,
        causal_top_left=False,
        dropout=False,
        alibi=False,
        score_bias=False,
        tracing=False,
        slack_rows=False,
    )

    def missing(self, problem: Problem) -> str | None:
        version = problem.version(self.package)
        there = "is not installed" if version is None else f"{version} is there"
        return f"this version of varlen_attn has no adapter for flash-attn 4 yet ({self.package} {there})"

    def kernel(self, problem: Problem) -> str:
        return "flash_attn.cute.interface.flash_attn_varlen_func"

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
        raise NotImplementedError("varlen_attn has no adapter for flash-attn 4 yet")
