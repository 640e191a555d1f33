"""How the CPU backend cuts a batch into kernel calls: groups of sequences, tiles of rows and the keys they see, and their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import SeqLayout
from ..problem import Semantics
from ._cpu_groups import Costs, Gather, Group, Run, Side, plan_for, runs
from ._maths import alibi_bias, visible_mask
from .base import wide_dtype

_WINDOW_ROWS = 256  # query rows of one call under a window: enough to fill the kernel's blocks, few enough to skip keys
_SCORES = 1 << 24  # score elements of one eager call: 64 MB in float32


class Tile(NamedTuple):
    """Rows ``r0..r1`` of a sequence and the keys ``k0..k1`` that they see."""

    r0: int
    r1: int
    k0: int
    k1: int


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


class Launch:
    """What forward and backward share: groups, their tiles and masks, and the tensors of each group."""

    def __init__(
        self, query: Tensor, key: Tensor, cu: tuple[Tensor, Tensor], causal: str, window: list[int], slopes: Tensor | None, single: bool
    ):
        left, right = (None if side < 0 else side for side in window)
        sides = None if left is None and right is None else (left, right)
        self.semantics = Semantics(causal=causal or False, window=sides)  # type: ignore[arg-type]
        self.slopes = slopes
        offsets_q = tuple(cu[0].tolist())
        offsets_k = offsets_q if cu[1] is cu[0] else tuple(cu[1].tolist())
        # Under a causal mask nobody sees the padding of equally many queries and keys. Other masks know no padding.
        unmasked = sides is None and slopes is None
        near = unmasked and (not causal or offsets_q == offsets_k)
        how = "single" if single else "near" if near else "equal"
        self.plan = plan_for(offsets_q, offsets_k, (query.shape[0], key.shape[0]), how, Costs.of(query, torch.get_num_threads()))
        self.groups = self.plan.groups
        self.is_plain = near or (unmasked and all(g.len_q == g.len_k for g in self.groups))

    @cached_property
    def tiles(self) -> list[list[Tile]]:
        """Of each group; the usual case needs none."""
        return [list(_tiles(g, self.semantics)) for g in self.groups]

    @property
    def is_whole(self) -> bool:
        """One group, a view of all rows: results of the kernel are results of the call."""
        return len(self.groups) == 1 and self.groups[0].queries is None and self.plan.covers_q and self.plan.covers_k

    def covers(self) -> tuple[bool, bool]:
        """Whether every query row, and every key row exactly once, is part of a tile: then nothing needs to be zeroed first."""
        if self.is_plain:
            return self.plan.covers_q, self.plan.covers_k
        each = [(group, tile) for group, tiles in zip(self.groups, self.tiles, strict=True) for tile in tiles]
        rows = all(sum(t.r1 - t.r0 for t in tiles) == g.len_q for g, tiles in zip(self.groups, self.tiles, strict=True))
        whole = len(each) == len(self.groups) and all((tile.k0, tile.k1) == (0, group.len_k) for group, tile in each)
        return self.plan.covers_q and rows, self.plan.covers_k and whole

    def queries(self, *tensors: Tensor, zeroed: int | None = None) -> Iterator[tuple[Tensor, ...]]:
        """For each group the ``(size, heads, len_q, dim)`` blocks of packed ``(T, heads, dim)`` tensors: views, or gathered into memory
        that serves the next wave too. The padding of tensor number ``zeroed`` is 0."""
        return _blocks(tensors, [(g.q_start, g.size, g.len_q) for g in self.groups], self.plan.waves_q, zeroed)

    def keys(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The same of ``(Tk, heads, dim)`` tensors."""
        return _blocks(tensors, [(g.k_start, g.size, g.len_k) for g in self.groups], self.plan.waves_k)

    def query_target(self, x: Tensor) -> Target:
        return Target(x, [((g.q_start, g.size, g.len_q), g.queries) for g in self.groups], self.plan.lengths_q)

    def key_target(self, x: Tensor) -> Target:
        return Target(x, [((g.k_start, g.size, g.len_k), g.keys) for g in self.groups], self.plan.lengths_k)

    def lse(self, parts: list[Tensor], like: Tensor) -> Tensor:
        """``(N, T)`` from ``(size, N, len_q)`` of each group, over memory in the kernel's own order, ``(T, N)``; -inf without a group."""
        flat = [part.transpose(1, 2).flatten(0, 1) for part in parts]
        if self.plan.order is not None:
            flat.append(like.new_full((1, like.shape[1]), float("-inf"), dtype=wide_dtype(like.dtype)))
            return torch.cat(flat).index_select(0, self.plan.order).t()
        if len(flat) == 1:
            return flat[0].contiguous().t()
        return torch.cat(flat).t() if flat else like.new_empty(like.shape[:2], dtype=wide_dtype(like.dtype)).t()

    def masked_tiles(self, index: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice, bool, Tensor | None]]:
        """Rows, keys, whether causal, and the mask of each kernel call of a group."""
        group = self.groups[index]
        for tile in self.tiles[index]:
            yield slice(tile.r0, tile.r1), slice(tile.k0, tile.k1), *_tile_mask(tile, group, self.semantics, self.slopes, dtype)


Span = tuple[int, int, int]  # first row, size and length of a group


def _blocks(
    tensors: Sequence[Tensor], spans: Sequence[Span], waves: Sequence[Gather], zeroed: int | None = None
) -> Iterator[tuple[Tensor, ...]]:
    num_views = len(spans) - sum(len(wave.sizes) for wave in waves)
    yield from zip(*(blocks(x, spans[:num_views]) for x in tensors), strict=True)
    most = max((len(wave.rows) for wave in waves), default=0)
    buffers = [x.new_empty(most, *x.shape[1:]) for x in tensors if waves]
    shapes = iter(spans[num_views:])
    for wave in waves:
        rows = [torch.index_select(x, 0, wave.rows, out=y[: len(wave.rows)]) for x, y in zip(tensors, buffers, strict=True)]
        if zeroed is not None and len(wave.padding):
            rows[zeroed].index_fill_(0, wave.padding, 0.0)
        for parts in zip(*(x.split(wave.sizes) for x in rows), strict=True):
            _, size, length = next(shapes)
            yield tuple(x.view(size, length, *x.shape[1:]).transpose(1, 2) for x in parts)


class Target:
    """A packed ``(T, heads, dim)`` tensor that results of groups are written to."""

    def __init__(self, x: Tensor, places: Sequence[tuple[Span, Side | None]], lengths: list[int]):
        self.places = places
        self.views = blocks(x, [span for span, side in places if side is None])
        self.rows = x[: sum(lengths)].split(lengths) if len(self.views) < len(places) else ()
        self.like = x

    def block(self, index: int) -> Tensor:
        """``(size, heads, length, dim)`` to write into piece by piece: the rows themselves, or zeros that `put` brings there."""
        if index < len(self.views):
            return self.views[index]
        _, size, length = self.places[index][0]
        return self.like.new_zeros(size, length, *self.like.shape[1:]).transpose(1, 2)

    def put(self, index: int, block: Tensor) -> None:
        """Write a whole block, without its padding."""
        if index < len(self.views):
            if block is not self.views[index]:
                self.views[index].copy_(block)
            return
        side = self.places[index][1]
        assert side is not None
        parts = block.transpose(1, 2).flatten(0, 1).split(side.cuts)
        if side.padded:
            parts = parts[::2]
        torch._foreach_copy_([self.rows[i] for i in side.sequences], parts)


def blocks(x: Tensor, spans: Sequence[Span]) -> list[Tensor]:
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


def chunks(layout_q: SeqLayout, layout_kv: SeqLayout, single: bool, num_heads: int) -> Iterator[Run]:
    """Runs of equal adjacent lengths, cut so that the scores of one fit into memory."""
    for run in runs(layout_q.cu_seqlens.tolist(), layout_kv.cu_seqlens.tolist(), single):
        step = max(1, _SCORES // max(1, num_heads * run.len_q * run.len_k))
        for first in range(0, run.size, step):
            q_start, k_start = run.q_start + first * run.len_q, run.k_start + first * run.len_k
            yield Run(q_start, k_start, min(step, run.size - first), run.len_q, run.len_k, run.first + first)
