"""How the CPU backend cuts a batch into kernel calls: groups of sequences, tiles of rows and the keys they see, and their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch import copy_each
from ...layout.checks import check_offsets, check_offsets_tensor
from ...layout.seq_layout import SeqLayout
from ..base import accumulation_dtype
from ..dense import alibi_bias, visible_mask
from ..problem import Semantics
from .groups import Run, Side, Span, plan_for, runs

_WINDOW_ROWS = 256  # query rows of one call under a window: enough to fill the kernel's blocks, few enough to skip keys
_ALL = slice(None)
_SCORES = 1 << 24  # score elements of one eager call: 64 MB in float32


Tile = tuple[int, int, int, int]  # first row and end of rows of a sequence, first key and end of the keys that they see


class Piece(NamedTuple):
    """One kernel call of a group. ``rows`` is None where it computes all of the group, with all keys."""

    rows: slice | None
    keys: slice
    is_causal: bool
    mask: Tensor | None


def _tiles(len_q: int, len_k: int, semantics: Semantics) -> Iterator[Tile]:
    """The rows that see a key, cut for windows; every row of a tile sees at least one of its keys."""
    low, high = semantics.visible_range(len_k - len_q)
    first = 0 if high is None else max(0, -high)
    last = len_q if low is None else min(len_q, len_k - low)
    step = last - first if low is None else max(_WINDOW_ROWS, (high or 0) - low)
    for r0 in range(first, last, max(step, 1)):
        r1 = min(r0 + step, last)
        k0 = 0 if low is None else max(0, r0 + low)
        k1 = len_k if high is None else min(len_k, r1 + high)
        if k1 > k0:
            yield r0, r1, k0, k1


def _tile_mask(tile: Tile, offset: int, semantics: Semantics, slopes: Tensor | None, dtype: torch.dtype) -> tuple[bool, Tensor | None]:
    """``(is_causal, additive mask or None)`` of one kernel call."""
    r0, r1, k0, k1 = tile
    low, high = semantics.visible_range(offset)
    rows, keys, shift = r1 - r0, k1 - k0, r0 - k0
    low_cuts = low is not None and rows - 1 + low + shift > 0
    high_cuts = high is not None and high + shift < keys - 1
    if slopes is None and not low_cuts and (not high_cuts or high == -shift):
        return high_cuts, None
    i = torch.arange(r0, r1, device="cpu")[:, None]
    j = torch.arange(k0, k1, device="cpu")
    wide = accumulation_dtype(dtype)
    bias = torch.zeros(rows, keys, dtype=wide, device="cpu") if slopes is None else alibi_bias(slopes.to(wide), i, j, offset)[None]
    visible = visible_mask(semantics, i, j, offset)
    return False, bias if visible is None else bias.masked_fill(~visible, float("-inf"))


class Launch:
    """What forward and backward share: groups, and the kernel calls of each.

    Attributes:
        covers_q: whether every query row is in a kernel call: then nothing needs to be zeroed first.
        covers_k: whether every key row is in exactly one.
        shortest: at most so many keys has the smallest one; 0 under a window, whose tiles are not counted.
        whole: whether all sequences are one call of the kernel, which adds -inf between two of them: NaN would stay NaN.
    """

    def __init__(
        self, query: Tensor, key: Tensor, cu_q: Tensor, cu_k: Tensor, slopes: Tensor | None, causal: str, window: list[int], single: bool,
        slack_q: bool, slack_k: bool,
    ):  # fmt: skip
        left, right = window
        self.causal, self.dtype = causal, query.dtype
        self.slopes = None if slopes is None else slopes.expand(query.shape[1])
        offsets_q = tuple(cu_q.tolist())
        offsets_k = offsets_q if cu_k is cu_q else tuple(cu_k.tolist())
        rows, rows_k = query.shape[0], key.shape[0]
        if (offsets_q[-1] != rows and not slack_q) or (offsets_k[-1] != rows_k and not slack_k):
            check_offsets(offsets_q, None, rows, slack_q)
            check_offsets(offsets_k, None, rows_k, slack_k)
        # Under a causal mask no query sees the padding of equally many queries and keys. Other masks know no padding.
        near = left < 0 and right < 0 and slopes is None and (not causal or offsets_q == offsets_k)
        how = "single" if single else "near" if near else "equal"
        self.queries, self.keys, self.whole = plan_for(offsets_q, offsets_k, (rows, rows_k), how, query)
        self.covers_q, self.covers_k = self.queries.covers, self.keys.covers
        self.tiles: list[list[Tile]] | None = None  # None where each group is one kernel call, as usual
        self.shortest = 0
        if near:
            self.shortest = min([length for _, _, length in self.keys.spans], default=_WINDOW_ROWS)
            return
        sides = None if left < 0 else left, None if right < 0 else right
        self.semantics = Semantics(causal=causal or False, window=sides)  # type: ignore[arg-type]
        self.tiles = []
        for (_, _, len_q), (_, _, len_k) in zip(self.queries.spans, self.keys.spans, strict=True):
            tiles = list(_tiles(len_q, len_k, self.semantics))
            self.covers_q &= sum(r1 - r0 for r0, r1, _, _ in tiles) == len_q
            self.covers_k &= [tile[2:] for tile in tiles] == [(0, len_k)]
            self.tiles.append(tiles)

    def pieces(self, index: int) -> list[Piece]:
        """The kernel calls of a group."""
        if self.tiles is None:
            bias = None if self.causal and not self.whole else self.keys.biases[index]
            # Given float32 for float64, the kernel reads it wrongly and says nothing.
            return [Piece(None, _ALL, bool(self.causal), bias.double() if bias is not None and self.dtype == torch.float64 else bias)]
        len_q, len_k = self.queries.spans[index][2], self.keys.spans[index][2]
        return [
            Piece(
                None if tile == (0, len_q, 0, len_k) else slice(tile[0], tile[1]),
                slice(tile[2], tile[3]),
                *_tile_mask(tile, len_k - len_q, self.semantics, self.slopes, self.dtype),
            )
            for tile in self.tiles[index]
        ]

    def lse(self, parts: list[Tensor], like: Tensor) -> Tensor:
        """``(N, T)`` from ``(size, N, len_q)`` of each group, over memory in the kernel's own order, ``(T, N)``; -inf without a group."""
        flat = [part.transpose(1, 2).flatten(0, 1) for part in parts]
        if not self.queries.covers or not flat:
            flat.append(like.new_full((1 if like.shape[0] else 0, like.shape[1]), float("-inf"), dtype=accumulation_dtype(like.dtype)))
        rows = flat[0] if len(flat) == 1 else torch.cat(flat)
        return (rows.contiguous() if self.queries.order is None else rows.index_select(0, self.queries.order)).t()


def read(side: Side, *tensors: Tensor, zeroed: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """For each group the ``(size, heads, length, dim)`` blocks of packed ``(T, heads, dim)`` tensors: views, or gathered into memory
    that serves the next wave too, if there is one. The padding of tensor number ``zeroed`` is 0."""
    num_views = len(side.spans) - len(side.members)
    yield from zip(*[blocks(x, side.spans[:num_views]) for x in tensors], strict=True)
    if not side.waves:
        return
    most = max(len(rows) for rows, _, _ in side.waves)
    buffers = [x.new_empty(most, *x.shape[1:]) if len(side.waves) > 1 else None for x in tensors]
    shapes = iter(side.spans[num_views:])
    for rows, sizes, padding in side.waves:
        gathered = [torch.index_select(x, 0, rows, out=y if y is None else y[: len(rows)]) for x, y in zip(tensors, buffers, strict=True)]
        if zeroed is not None and len(padding):
            gathered[zeroed].index_fill_(0, padding, 0.0)
        for parts in zip(*[x.split(sizes) if len(sizes) > 1 else (x,) for x in gathered], strict=True):
            _, size, length = next(shapes)
            yield tuple([x.view(size, length, *x.shape[1:]).transpose(1, 2) for x in parts])


class Target:
    """A packed tensor like ``like`` that results of groups are written to. Without ``covered``, rows that nothing is written to are 0.

    Attributes:
        rows: the tensor. Where one result is all of it, without a copy, or with one that brings it into its order.
    """

    def __init__(self, side: Side, like: Tensor, covered: bool, dtype: torch.dtype | None = None):
        self.side, self.like, self.covered, self.dtype = side, like, covered, dtype or like.dtype
        self.rows = like  # until there is memory for it
        if not covered or len(side.spans) != 1:
            self._allocate()

    def _allocate(self) -> None:
        self.rows = (self.like.new_empty if self.covered else self.like.new_zeros)(self.like.shape, dtype=self.dtype)
        self.views = blocks(self.rows, self.side.spans[: len(self.side.spans) - len(self.side.members)])
        self.sequences = self.rows[: sum(self.side.lengths)].split(self.side.lengths) if self.side.members else ()

    def block(self, index: int) -> Tensor:
        """``(size, heads, length, dim)`` to write into piece by piece: the rows themselves, or zeros that `put` brings there."""
        if self.rows is self.like:
            self._allocate()
        if index < len(self.views):
            return self.views[index]
        _, size, length = self.side.spans[index]
        return self.rows.new_zeros(size, length, *self.rows.shape[1:]).transpose(1, 2)

    def put(self, index: int, block: Tensor) -> None:
        """Write a whole block, without its padding."""
        if self.rows is self.like:
            rows, order = block.transpose(1, 2).flatten(0, 1), self.side.order
            self.rows = (rows.contiguous() if order is None else rows.index_select(0, order)).to(self.dtype)
        elif index < len(self.views):
            if block is not self.views[index]:
                self.views[index].copy_(block)
        else:
            numbers, cuts, is_padded = self.side.members[index - len(self.views)]
            parts = block.transpose(1, 2).flatten(0, 1).split(cuts)
            copy_each([self.sequences[i] for i in numbers], parts[::2] if is_padded else parts)


def blocks(x: Tensor, spans: Sequence[Span]) -> list[Tensor]:
    """``(size, heads, length, dim)`` views at ``(start, size, length)``. One split for all, because a slice of its own for each short
    sequence takes as long as its attention."""
    if not spans:
        return []
    sizes = [size * length for _, size, length in spans]
    if sum(sizes) == x.shape[0]:
        rows = x.transpose(0, 1).unsqueeze(0)
        views = list(rows.split(sizes, 2)) if len(sizes) > 1 else [rows]
    else:  # the rows between the spans, and those after the last, become parts that are not used
        ends = [start + n for (start, _, _), n in zip(spans, sizes, strict=True)]
        gaps = [start - end for (start, _, _), end in zip(spans, [0, *ends], strict=False)]
        cuts = [n for pair in zip(gaps, sizes, strict=True) for n in pair] + [x.shape[0] - ends[-1]]
        views = list(x.transpose(0, 1)[None].split(cuts, 2)[1::2])
    for i, (_, size, length) in enumerate(spans):
        if size > 1:
            views[i] = views[i][0].view(x.shape[1], size, length, x.shape[2]).transpose(0, 1)
    return views


def chunks(layout_q: SeqLayout, layout_kv: SeqLayout, single: bool, num_heads: int) -> Iterator[Run]:
    """Runs of equal adjacent lengths, cut so that the scores of one fit into memory."""
    check_offsets_tensor(layout_q.cu_seqlens)
    check_offsets_tensor(layout_kv.cu_seqlens)
    offsets_q, offsets_k = (layout.cu_seqlens.tolist() for layout in (layout_q, layout_kv))
    check_offsets(offsets_q, None, layout_q.num_rows, layout_q.has_slack)
    check_offsets(offsets_k, None, layout_kv.num_rows, layout_kv.has_slack)
    for run in runs(offsets_q, offsets_k, single):
        step = max(1, _SCORES // max(1, num_heads * run.len_q * run.len_k))
        for first in range(0, run.size, step):
            q_start, k_start = run.q_start + first * run.len_q, run.k_start + first * run.len_k
            yield Run(q_start, k_start, min(step, run.size - first), run.len_q, run.len_k, run.first + first)
