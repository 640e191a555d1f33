"""Strategies of what torch's modules take: masks of attention, and options of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class AttentionMask:
    """``attn_mask`` and ``is_causal`` of torch's modules. ``means`` is the one mask that says the same, None for none."""

    mask: Tensor | None
    is_causal: bool
    means: Tensor | None


@st.composite
def attention_masks(draw: st.DrawFn, len_q: int, len_k: int, rows: int) -> AttentionMask:
    """None, exactly causal with and without the hint, causal by the hint alone, a wrong hint, or anything ``(L, S)`` or ``(rows, L, S)``.

    ``rows`` is B*N. Queries that see no key are included; for those torch's attention is 0.
    """
    after = torch.ones(len_q, len_k, dtype=torch.bool).triu(1)
    kind = draw(st.sampled_from(("none", "hint alone", "causal", "causal", "any", "any", "any")))
    if kind in ("none", "hint alone"):
        hinted = kind == "hint alone"
        return AttentionMask(None, hinted, after if hinted else None)
    shape = (rows, len_q, len_k) if draw(st.integers(0, 2)) == 2 else (len_q, len_k)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    hidden = after.expand(shape) if kind == "causal" else torch.rand(shape, generator=generator) < 0.3
    form = draw(st.sampled_from(("bool", "float64", "float32", "added")))
    mask = hidden
    if form != "bool":
        dtype = torch.float32 if form == "float32" else torch.float64
        mask = torch.zeros(shape, dtype=dtype).masked_fill(hidden, -torch.inf)
    if form == "added":
        mask = mask + torch.randn(shape, generator=generator, dtype=torch.float64)
    return AttentionMask(mask, draw(st.booleans()), mask)


@st.composite
def transformer_options(draw: st.DrawFn) -> dict[str, Any]:
    """Keyword arguments of `torch.nn.TransformerEncoderLayer` and `torch.nn.TransformerDecoderLayer` that change what is computed."""
    return {
        "activation": draw(st.sampled_from(("relu", "gelu", torch.tanh, torch.nn.SiLU(), torch.nn.PReLU(dtype=torch.float64)))),
        "layer_norm_eps": draw(st.sampled_from((1e-5, 0.1))),
        "batch_first": draw(st.booleans()),
        "norm_first": draw(st.booleans()),
        "bias": draw(st.sampled_from((True, True, False))),
    }
