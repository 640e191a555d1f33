"""flash-attn 3 (Hopper): declared, not connected yet.

Read in its source (``hopper/flash_attn_interface.py``), not run: no dropout, no ALiBi, no sinks; head dimensions are not padded for the
caller; rows beyond ``cu_seqlens[-1]`` can corrupt the last sequence's rows (sgl-flash-attn#47); deterministic gradients except for a
head dimension of 256; several wheels are forward only, and some have no windows.
"""

from __future__ import annotations

from ._declared import Declared
from .base import HALF, Capabilities


class Flash3(Declared):
    """flash-attn's kernels for the H100."""

    name = "flash3"
    title = "flash-attn 3"
    kernel_name = "flash_attn_3::fwd (FlashAttnFwdSm90)"
    package = "flash-attn-3"
    install = "use 'torch_varlen' or 'flash2'"
    capabilities = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=HALF,
        min_capability=(9, 0),
        rocm=False,
        max_head_dim=256,
        causal_top_left=False,
        dropout=False,
        alibi=False,
        score_bias=False,
        sinks=False,
        slack_rows=False,
    )
