"""How the CPU backend cuts a batch into kernel calls: groups of equal adjacent lengths, and tiles of rows and the keys they see."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import SeqLayout
from ..problem import Semantics
from ._maths import alibi_bias, visible_mask
from .base import wide_dtype

_WINDOW_ROWS = 256  # query rows of one call under a window: enough to fill the kernel's blocks, few enough to skip keys
_SCORES = 1 << 24  # score elements of one eager call: 64 MB in float32


class Group(NamedTuple):
    """``size`` adjacent sequences of equal lengths, by their first packed rows."""

    q_start: int
    k_start: int
    size: int
    len_q: int
    len_k: int


class Tile(NamedTuple):
    """Rows ``r0..r1`` of a sequence and the keys ``k0..k1`` that they see."""

    r0: int
    r1: int
    k0: int
    k1: int


def groups(cu_q: list[int], cu_k: list[int], single: bool) -> Iterator[Group]:
    """Sequences without queries are left out; ``single`` keeps every sequence apart."""
    run: Group | None = None
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
        len_q, len_k = q1 - q0, k1 - k0
        if len_q == 0:
            # Its keys, if any, lie between those of its neighbours: they must not share a call.
            if len_k and run is not None:
                yield run
                run = None
            continue
        if run is not None and not single and (len_q, len_k) == (run.len_q, run.len_k):
            run = run._replace(size=run.size + 1)
            continue
        if run is not None:
            yield run
        run = Group(q0, k0, 1, len_q, len_k)
    if run is not None:
        yield run


def _tiles(group: Group, semantics: Semantics) -> Iterator[Tile]:
    """The rows that see a key, cut for windows; every row of a tile sees at least one of its keys."""
    low, high = semantics.visible_range(group.len_k - group.len_q)
    first = 0 if high is None else max(0, -high)
    last = group.len_q if low is None else min(group.len_q, group.len_k - low)
    step = last - first if low is None else max(_WINDOW_ROWS, (high or 0) - low)
    for r0 in range(first, last, max(step, 1)):
        r1 = min(r0 + step, last)
        k0 = 0 if low is None else max(0, r0 + low)
        k1 = group.len_k if high is None else min(group.len_k, r1 + high)
        if k1 > k0:
            yield Tile(r0, r1, k0, k1)


def _tile_mask(tile: Tile, group: Group, semantics: Semantics, slopes: Tensor | None, dtype: torch.dtype) -> tuple[bool, Tensor | None]:
    """``(is_causal, additive mask or None)`` of one kernel call."""
    offset = group.len_k - group.len_q
    low, high = semantics.visible_range(offset)
    rows, keys = tile.r1 - tile.r0, tile.k1 - tile.k0
    shift = tile.r0 - tile.k0
    low_cuts = low is not None and rows - 1 + low + shift > 0
    high_cuts = high is not None and high + shift < keys - 1
    if slopes is None and not low_cuts and (not high_cuts or high == -shift):
        return high_cuts, None
    i = torch.arange(tile.r0, tile.r1, device="cpu")[:, None]
    j = torch.arange(tile.k0, tile.k1, device="cpu")
    wide = wide_dtype(dtype)
    bias = torch.zeros(rows, keys, dtype=wide, device="cpu") if slopes is None else alibi_bias(slopes.to(wide), i, j, offset)[None]
    visible = visible_mask(semantics, i, j, offset)
    return False, bias if visible is None else bias.masked_fill(~visible, float("-inf"))


class Call:
    """What forward and backward share: groups, their tiles and their masks, and views of tensors by group."""

    def __init__(self, cu_q: Tensor, cu_k: Tensor, causal: str, window: list[int], slopes: Tensor | None, single: bool):
        left, right = (None if side < 0 else side for side in window)
        sides = None if left is None and right is None else (left, right)
        self.semantics = Semantics(causal=causal or False, window=sides)  # type: ignore[arg-type]
        self.slopes = slopes
        self.groups = [g for g in groups(cu_q.tolist(), cu_k.tolist(), single) if g.len_k]

    @cached_property
    def tiles(self) -> list[list[Tile]]:
        """Of each group; the usual case needs none."""
        return [list(_tiles(g, self.semantics)) for g in self.groups]

    def covers(self, rows_q: int, rows_k: int) -> tuple[bool, bool]:
        """Whether every query row, and every key row exactly once, is part of a tile: then nothing needs to be zeroed first."""
        seen_q = sum(g.size * (t.r1 - t.r0) for g, tiles in zip(self.groups, self.tiles, strict=True) for t in tiles)
        whole = all(
            len(tiles) == 1 and (tiles[0].k0, tiles[0].k1) == (0, g.len_k) for g, tiles in zip(self.groups, self.tiles, strict=True)
        )
        return seen_q == rows_q, whole and sum(g.size * g.len_k for g in self.groups) == rows_k

    def is_plain(self, rows_q: int, rows_k: int) -> bool:
        """Whether every group is one kernel call on all its rows and keys, without a mask."""
        if not self.groups or self.semantics.window is not None or self.slopes is not None:
            return False
        square = not self.semantics.causal or all(g.len_q == g.len_k for g in self.groups)
        return square and rows_q == sum(g.size * g.len_q for g in self.groups) and rows_k == sum(g.size * g.len_k for g in self.groups)

    def queries(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """For each group the ``(size, heads, len_q, dim)`` views of packed ``(T, heads, dim)`` tensors, without copies."""
        spans = [(g.q_start, g.size, g.len_q) for g in self.groups]
        return list(zip(*(blocks(x, spans) for x in tensors), strict=True))

    def keys(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """The same of ``(Tk, heads, dim)`` tensors."""
        spans = [(g.k_start, g.size, g.len_k) for g in self.groups]
        return list(zip(*(blocks(x, spans) for x in tensors), strict=True))

    def masked_tiles(self, index: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice, bool, Tensor | None]]:
        """Rows, keys, whether causal, and the mask of each kernel call of a group."""
        group = self.groups[index]
        for tile in self.tiles[index]:
            yield slice(tile.r0, tile.r1), slice(tile.k0, tile.k1), *_tile_mask(tile, group, self.semantics, self.slopes, dtype)


def blocks(x: Tensor, spans: list[tuple[int, int, int]]) -> list[Tensor]:
    """``(size, heads, length, dim)`` views at ``(start, size, length)``. One split for all, because a slice of its own for each short
    sequence takes as long as its attention."""
    sizes = [size * length for _, size, length in spans]
    if sum(sizes) == x.shape[0]:
        views = list(x.transpose(0, 1)[None].split(sizes, 2))
    else:  # the rows between the spans, and those after the last, become parts that nobody wants
        ends = [start + n for (start, _, _), n in zip(spans, sizes, strict=True)]
        gaps = [start - end for (start, _, _), end in zip(spans, [0, *ends], strict=False)]
        cuts = [n for pair in zip(gaps, sizes, strict=True) for n in pair] + [x.shape[0] - (ends[-1] if ends else 0)]
        views = list(x.transpose(0, 1)[None].split(cuts, 2)[1::2])
    for i, (_, size, length) in enumerate(spans):
        if size > 1:
            views[i] = views[i][0].view(x.shape[1], size, length, x.shape[2]).transpose(0, 1)
    return views


def chunks(layout_q: SeqLayout, layout_kv: SeqLayout, single: bool, num_heads: int) -> Iterator[Group]:
    """Groups, cut so that the scores of one fit into memory."""
    for group in groups(layout_q.cu_seqlens.tolist(), layout_kv.cu_seqlens.tolist(), single):
        step = max(1, _SCORES // max(1, num_heads * group.len_q * group.len_k))
        for first in range(0, group.size, step):
            yield Group(
                group.q_start + first * group.len_q,
                group.k_start + first * group.len_k,
                min(step, group.size - first),
                group.len_q,
                group.len_k,
            )
