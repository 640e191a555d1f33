"""Hypothesis strategies for padded batches: lengths, masks of any form, layouts, semantics, problems.

Hypothesis is imported here only. Draw a `Batch` for "some padded batch", an `AttentionCase` for "some attention call".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ..kernels.problem import Problem, Semantics
from ..layout.seq_layout import SeqLayout

__all__ = [
    "AttentionCase",
    "Batch",
    "attention_cases",
    "batches",
    "each",
    "head_shapes",
    "layouts",
    "lengths",
    "mask_dtypes",
    "masks",
    "problems",
    "semantics",
]

T = TypeVar("T")
FORMS = ("right", "left", "both", "holes", "random")
SIZES = (1, 2, 3, 5, 8, 13)  # padded lengths; more than 8 crosses no kernel boundary on a CPU, long ones are drawn separately


def each(drawn: st.SearchStrategy[T], check: Callable[[T], None], examples: int) -> None:
    """``check`` so many of them. What is raised comes from the smallest that fails."""
    limits = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    limits(given(drawn)(lambda case: check(case)))()  # noqa: PLW0108 (it reads the names of arguments)


@st.composite
def lengths(draw: st.DrawFn, max_batch: int = 5, max_len: int = 9, batch: int | None = None) -> list[int]:
    """Lengths of a batch: anything, all equal, all empty, or one long among ones. ``batch`` is B where another tensor says it."""
    size = draw(st.integers(0, max_batch)) if batch is None else batch
    kind = draw(st.sampled_from(("any", "any", "any", "equal", "empty", "one long")))
    if kind == "equal":
        return [draw(st.integers(0, max_len))] * size
    if kind == "empty":
        return [0] * size
    if kind == "one long":
        return [max_len if i == 0 else 1 for i in range(size)]
    return draw(st.lists(st.integers(0, max_len), min_size=size, max_size=size))


@st.composite
def masks(draw: st.DrawFn, forms: tuple[str, ...] = FORMS, max_batch: int = 5, max_len: int = 9, batch: int | None = None) -> Tensor:
    """A ``key_padding_mask``: ``(B, S)`` bool, True is padding; rows without tokens, B = 0 and S = 0 included."""
    tokens = draw(lengths(max_batch, max_len, batch))
    form = draw(st.sampled_from(forms))
    size = max(tokens, default=0) + draw(st.integers(0, 2))
    rows = [_row(draw, form, n, size) for n in tokens]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(tokens), size)


def _row(draw: st.DrawFn, form: str, tokens: int, size: int) -> list[bool]:
    padding = size - tokens
    if form == "right":
        return [False] * tokens + [True] * padding
    if form == "left":
        return [True] * padding + [False] * tokens
    if form == "both":
        left = draw(st.integers(0, padding))
        return [True] * left + [False] * tokens + [True] * (padding - left)
    if form == "holes":
        return draw(st.permutations([False] * tokens + [True] * padding))
    return draw(st.lists(st.booleans(), min_size=size, max_size=size))


@st.composite
def mask_dtypes(draw: st.DrawFn, mask: Tensor) -> Tensor:
    """The same ``key_padding_mask`` in another legal form: additive float, non-contiguous, or both."""
    form = draw(st.sampled_from(("bool", "-inf", "-1e4", "finfo.min", "half finfo.min")))
    strided = draw(st.booleans())
    if form != "bool":
        dtype = torch.float16 if form == "half finfo.min" else torch.float32
        low = {"-inf": float("-inf"), "-1e4": -1e4}.get(form, torch.finfo(dtype).min)
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, low)
    if strided:
        mask = torch.stack([mask, mask], dim=-1)[..., 0]
    return mask


@dataclass(frozen=True)
class Batch:
    """A padded batch: ``x (B, S, D)`` by ``seed``, its mask and the layout of the mask."""

    mask: Tensor
    layout: SeqLayout
    seed: int

    def tensor(self, *trailing: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False, salt: int = 0) -> Tensor:
        """``(B, S, *trailing)`` of normal numbers: the same for the same batch and salt."""
        generator = torch.Generator().manual_seed(self.seed + 1000 * salt)
        x = torch.randn(*self.mask.shape, *trailing, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_(requires_grad)


@st.composite
def batches(draw: st.DrawFn, forms: tuple[str, ...] = FORMS, max_batch: int = 5, max_len: int = 9, batch: int | None = None) -> Batch:
    """A `Batch` with a mask of any form."""
    mask = draw(masks(forms, max_batch, max_len, batch))
    layout = SeqLayout.from_key_padding_mask(mask, validate=False)
    return Batch(mask, layout, draw(st.integers(0, 10**6)))


@st.composite
def layouts(draw: st.DrawFn, num_seqs: int | None = None, max_len: int = 9) -> SeqLayout:
    """A layout of any kind: padding right, left or between tokens (``holes="packed"``), slack rows, several documents a row."""
    counts = st.integers(0, max_len)
    tokens = draw(lengths(max_len=max_len) if num_seqs is None else st.lists(counts, min_size=num_seqs, max_size=num_seqs))
    kind = draw(st.sampled_from(("right", "right", "left", "holes", "capacity", "documents")))
    size = max(tokens, default=0) + draw(st.integers(0, 2))
    if kind == "documents" and 0 not in tokens:  # a document has a token
        ids = [number for i, n in enumerate(tokens) for number in [i + 1] * n + [0] * draw(st.integers(0, 1))]
        return SeqLayout.from_document_ids(torch.tensor([ids], dtype=torch.int64))
    if kind in ("holes", "capacity"):
        rows = [_row(draw, kind if kind == "holes" else "right", n, size) for n in tokens]
        mask = torch.tensor(rows, dtype=torch.bool).reshape(len(tokens), size)
        capacity = sum(tokens) + draw(st.integers(0, 3)) if kind == "capacity" else None
        return SeqLayout.from_key_padding_mask(mask, capacity=capacity, holes="packed", validate=False)
    return SeqLayout.from_lengths(tokens, size, "left" if kind == "left" else "right")


@dataclass(frozen=True)
class HeadShape:
    """N, K, H, Hv."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int


@st.composite
def head_shapes(draw: st.DrawFn) -> HeadShape:
    """Multi-head, grouped or multi-query; head dimensions that are no multiple of 8, and Hv != H, included."""
    kv_heads = draw(st.sampled_from((1, 2)))
    heads = kv_heads * draw(st.sampled_from((1, 1, 2, 3)))
    dim = draw(st.sampled_from((1, 3, 8, 17, 20, 32)))
    value_dim = draw(st.sampled_from((dim, dim, dim, 5, 24)))
    return HeadShape(heads, kv_heads, dim, value_dim)


@st.composite
def semantics(draw: st.DrawFn, heads: int, max_len: int = 12) -> dict[str, Any]:
    """Keyword arguments of `varlen_attention`; most options are off most of the time."""

    def rarely(strategy: st.SearchStrategy[Any], off: Any = None) -> Any:
        return draw(strategy) if draw(st.integers(0, 4)) == 4 else off

    seed = draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    side = st.sampled_from((None, 0, 1, 2, max_len, 3 * max_len))
    options: dict[str, Any] = {
        "causal": draw(st.sampled_from((False, False, True, "bottom_right", "top_left"))),
        "window": rarely(st.tuples(side, side)),
        "scale": rarely(st.sampled_from((1.0, 0.3))),
        "softcap": rarely(st.sampled_from((0.7, 5.0))),
        "alibi_slopes": rarely(st.just(torch.rand(heads, generator=generator))),
        "sinks": rarely(st.just(torch.randn(heads, generator=generator))),
        "score_bias": rarely(st.sampled_from((torch.randn(heads, max_len, max_len, generator=generator), _distance_bias))),
        "batch_invariant": rarely(st.just(True), False),
        "deterministic": rarely(st.just(True), False),
    }
    return {name: value for name, value in options.items() if value is not None}


def _distance_bias(head: Tensor, q_position: Tensor, k_position: Tensor) -> Tensor:
    return (head + 1) * 0.1 * (q_position - k_position).abs()


@dataclass(frozen=True)
class AttentionCase:
    """One call of `varlen_attention`, apart from its numbers, which come from ``seed``."""

    layout: SeqLayout
    layout_kv: SeqLayout | None
    shape: HeadShape
    semantics: dict[str, Any]
    dtype: torch.dtype
    seed: int

    def tensors(self, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """query, key, value and a gradient of the output, in ``dtype``; rounded from the same numbers for every dtype."""
        generator = torch.Generator().manual_seed(self.seed)
        kv = self.layout if self.layout_kv is None else self.layout_kv
        s = self.shape
        shapes = (
            (self.layout.num_rows, s.heads, s.dim),
            (kv.num_rows, s.kv_heads, s.dim),
            (kv.num_rows, s.kv_heads, s.value_dim),
            (self.layout.num_rows, s.heads, s.value_dim),
        )
        q, k, v, g = (torch.randn(*shape, generator=generator).to(device, self.dtype) for shape in shapes)
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), g


@st.composite
def attention_cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], max_len: int = 9) -> AttentionCase:
    """Self- or cross-attention of any semantics, head shape and layout."""
    layout = draw(layouts(max_len=max_len))
    cross = draw(st.booleans())
    layout_kv = draw(layouts(num_seqs=layout.num_seqs, max_len=max_len)) if cross else None
    shape = draw(head_shapes())
    options = draw(semantics(shape.heads, max_len + 3))
    return AttentionCase(layout, layout_kv, shape, options, draw(st.sampled_from(dtypes)), draw(st.integers(0, 10**6)))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any problem on any machine: for properties of `choose`, which needs no such machine."""
    device = draw(st.sampled_from(("cpu", "cuda", "cuda", "mps", "xpu")))
    kv_heads = draw(st.sampled_from((1, 2, 4)))
    capability = draw(st.sampled_from(((7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)))) if device == "cuda" else None
    causal: Any = draw(st.sampled_from((False, "bottom_right", "top_left")))
    flag = st.booleans()
    return Problem(
        device_type=device,
        capability=capability,
        rocm=device == "cuda" and draw(st.integers(0, 4)) == 0,
        torch_version=draw(st.sampled_from(("2.11.0", "2.12.0", "2.13.0"))),
        flash_impl=draw(st.sampled_from((None, None, "FA4"))),
        packages=draw(st.sampled_from(((), (("flash-attn", "2.8.3"),), (("flash-attn", "2.5.0"),), (("flash-attn-3", "3.0.0"),)))),
        dtype=draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64))),
        num_heads=kv_heads * draw(st.sampled_from((1, 2, 8))),
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from((1, 8, 20, 64, 96, 128, 192, 256, 264, 512))),
        value_head_dim=draw(st.sampled_from((None, None, 64))),
        semantics=Semantics(
            causal=causal,
            window=draw(st.sampled_from((None, None, (4, 0), (None, 3)))),
            scale=0.125,
            softcap=draw(st.sampled_from((None, None, 30.0))),
            dropout_p=draw(st.sampled_from((0.0, 0.0, 0.1))),
            alibi=draw(flag),
            score_bias=draw(flag) and draw(flag),
            sinks=draw(flag) and draw(flag),
            return_lse=draw(flag),
            deterministic=draw(flag) and draw(flag),
            batch_invariant=draw(flag) and draw(flag),
        ),
        self_attention=draw(flag),
        needs_grad=draw(flag),
        tracing=draw(flag) and draw(flag),
        host_lengths=draw(flag),
    )
