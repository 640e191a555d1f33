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


@dataclass(frozen=True)
class WrittenMask:
    """``attn_mask`` as people write it, and ``key_padding_mask`` beside it.

    Where ``spoiled``, one number is another; where ``learned``, it wants a gradient after it was seen without.
    """

    mask: Tensor
    padding: Tensor | None
    spoiled: bool
    learned: bool
    packs: bool


@st.composite
def written_masks(draw: st.DrawFn, heads: int, max_batch: int = 3, max_len: int = 9) -> WrittenMask:
    """Causal, all, a window, documents, alone or merged with padding of either side, the diagonal open or not, or expanded for all;
    every kind of number; other queries than keys; beside it the same padding, or one of whole documents."""
    lengths = torch.tensor(draw(st.lists(st.integers(0, max_len), min_size=1, max_size=max_batch)))
    batch, size = len(lengths), max(1, int(lengths.max())) + draw(st.integers(0, 1))
    left, holes = draw(st.booleans()), draw(st.integers(0, 3)) == 0
    column = torch.arange(size)
    real = column >= size - lengths[:, None] if left else column < lengths[:, None]
    if holes:
        real &= torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    distance = column - column[:, None]
    kind = draw(st.sampled_from(("causal", "all", "window", "causal window")))
    near = draw(st.integers(1, 4))
    relation = {"causal": distance <= 0, "all": distance > -size, "window": distance.abs() <= near}.get(
        kind, (distance <= 0) & (distance >= -near)
    )
    merged, beside, opened = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    seen = relation.expand(batch, -1, -1)
    documents = draw(st.integers(0, 2)) == 0
    if documents:
        starts = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
        numbers = starts.cumsum(0)
        seen = seen & (numbers == numbers[:, None])
    if merged:
        seen = seen & real[:, None]
    if merged and opened:
        seen = seen | torch.eye(size, dtype=torch.bool)
    len_q = draw(st.sampled_from((size, size, size, size + 1, size + 3, max(1, size - 1))))
    if len_q != size:  # as the last query, with its distance or without
        nearer = draw(st.booleans())
        seen = (seen if nearer else (real if merged else torch.ones_like(real))[:, None]).expand(-1, size, -1)
        seen = torch.cat([seen, seen[:, -1:].expand(-1, max(0, len_q - size), -1)], 1)[:, :len_q]
    if documents and draw(st.booleans()):
        kept = st.lists(st.booleans(), min_size=size + 1, max_size=size + 1)
        real = real & torch.tensor([draw(kept) for _ in range(batch)])[:, numbers]
    hidden = ~seen
    if draw(st.booleans()):
        hidden = hidden[0]
    else:
        hidden = hidden.repeat_interleave(heads, 0)
    form = draw(st.sampled_from(("bool", "float64", "float32", "least")))
    mask = hidden.clone()
    if form != "bool":
        dtype = torch.float32 if form == "float32" else torch.float64
        least = torch.finfo(torch.float32).min if form == "least" else -torch.inf
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, least)
    spoiled = draw(st.integers(0, 2)) == 0
    if spoiled:
        spot = tuple(draw(st.integers(0, n - 1)) for n in mask.shape)
        value = draw(st.sampled_from((0.0, -torch.inf, 1e-3, -1e4)))
        mask[spot] = ~mask[spot] if form == "bool" else value
    shared = mask.dim() == 3 and draw(st.integers(0, 3)) == 0
    if shared:
        mask = mask[:1].expand_as(mask)
    learned = form != "bool" and draw(st.integers(0, 3)) == 0
    known = len_q == size and not (spoiled or shared or learned or documents or opened or holes or "window" in kind or form == "least")
    packs = known and not (left and not beside) and not (merged and mask.dim() == 2)
    return WrittenMask(mask, ~real if beside else None, spoiled, learned, packs)
