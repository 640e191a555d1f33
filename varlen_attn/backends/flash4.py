"""flash-attn 4 (CuTe DSL, compiled when first called): declared, not connected yet.

Read in its source (``flash_attn/cute/interface.py``), not run: no dropout; ALiBi and biases only as a ``score_mod``; it has sinks; its
backward needs sm90 and its log-sum-exp of a row without keys is -inf; it registers no custom ops, so it can not be traced. Head
dimensions above 128 depend on the GPU. The distribution leaves a namespace package ``flash_attn`` without flash-attn 2 in it.
"""

from __future__ import annotations

from ._declared import Declared
from .base import HALF, Capabilities


class Flash4(Declared):
    """flash-attn's kernels for Hopper and Blackwell, written in CuTe."""

    name = "flash4"
    title = "flash-attn 4"
    kernel_name = "flash_attn.cute.interface.flash_attn_varlen_func"
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
