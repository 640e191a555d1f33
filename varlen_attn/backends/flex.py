"""`torch.nn.attention.flex_attention` with a document block mask: declared, not connected yet.

Read in torch's source (2.13), run on a CPU only: a document mask costs ``O(T^2)`` memory unless its construction is compiled; there
is no backward on a CPU; changing lengths recompile; no dropout and no sinks. It is the one fused kernel that takes a score bias.
"""

from __future__ import annotations

import torch

from ._declared import Declared
from .base import HALF, Capabilities


class Flex(Declared):
    """`flex_attention` over packed rows, sequences kept apart by a block mask."""

    name = "flex"
    title = "flex_attention"
    kernel_name = "flex_attention (triton_tem_fused_flex_attention)"
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
