"""Which sequences share a kernel call of the CPU backend: equal lengths, and near-equal ones where padding costs less than a call.

Groups are views where their sequences are equally long and stand one after another. The others are gathered, several groups in one
wave, where the padding of a shorter sequence holds copies of its own last token: memory that is valid, and nothing of its neighbours.

With several threads every operation on more than a few rows is a parallel region, in which threads wait for each other. Where another
process is busy, that takes a time slice of the scheduler: milliseconds, for work of microseconds. Few regions matter more than anything
else then, so there a call counts for more than it costs on a quiet machine. One thread has nobody to wait for, and groups little.

Plans are pure functions of lengths and costs, kept by value: layers, forward and backward share one, and offsets that change in place
can not meet an old one. Costs are constants of a class of machine and not measured at run time, because they decide the shape of
kernel calls, and with it the last bits of results: a program must give the same bits every time it runs.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

_WAVE_BYTES = (1 << 19, 1 << 20)  # of one gathered tensor, for one thread and for several: larger ones are fresh memory, to fault in
_NOWHERE = -(1 << 62)
_KEPT = 8  # plans: one for each pair of layouts of a step, with a reserve

_plans: dict[tuple[object, ...], Plan] = {}


class Costs(NamedTuple):
    """Microseconds, by which groups are chosen; only their ratios count. For all heads of one sequence.

    Attributes:
        call: one more kernel call, with what it takes to bring its results to their places.
        token, pair: of the kernel, for each query, and for each query and key.
        copy: of gathering one row of query, key and value.
        wave: rows of a wave at most.
    """

    call: float
    token: float
    pair: float
    copy: float
    wave: int

    @classmethod
    def of(cls, query: Tensor, threads: int) -> Costs:
        """Fitted on Zen 5 with AVX512, AVX2 and neither, and on Sapphire Rapids with AMX; one and two threads."""
        width = query.shape[1] * query.shape[2]
        pair = 0.024 * (1 if torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2") else 2)
        if query.dtype == torch.float64:
            pair *= 2.7
        elif query.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
            pair *= 0.3
        share = width / 512 / min(threads, 8)  # beyond, short sequences hardly get faster
        call = 10.0 if threads == 1 else 60 + 6 * math.log2(threads)
        wave = _WAVE_BYTES[threads > 1] // max(1, width * max(4, query.itemsize))
        return cls(call, 0.4 * share, pair * share, 0.06 * query.itemsize * share, wave)

    def kernel(self, len_q: int, len_k: int) -> float:
        return (self.token + self.pair * len_k) * len_q


class Run(NamedTuple):
    """``size`` adjacent sequences of equal lengths, by their first packed rows and the number of the first."""

    q_start: int
    k_start: int
    size: int
    len_q: int
    len_k: int
    first: int


class Side(NamedTuple):
    """Where the queries, or the keys, of a gathered group go to.

    Attributes:
        sequences: their numbers.
        cuts: true length and padding of each, in turns; where nothing is padded, only lengths.
        padded: whether anything is.
        bias: ``(size, 1, 1, length)`` float32, -inf at padding, to add to scores; None if there is none.
    """

    sequences: list[int]
    cuts: list[int]
    padded: bool
    bias: Tensor | None


class Gather(NamedTuple):
    """Where the queries, or the keys, of a wave come from.

    Attributes:
        rows: packed rows, one group after another; at padding the last of their sequence.
        sizes: rows of each group.
        padding: places of padding among ``rows``.
    """

    rows: Tensor
    sizes: list[int]
    padding: Tensor


class Group(NamedTuple):
    """``size`` sequences of one kernel call, of ``len_q`` queries and ``len_k`` keys with padding.

    A view of the rows from ``q_start`` and ``k_start`` on, unless ``queries`` and ``keys`` say that it is gathered.
    """

    q_start: int
    k_start: int
    size: int
    len_q: int
    len_k: int
    queries: Side | None = None
    keys: Side | None = None

    def key_mask(self, dtype: torch.dtype) -> Tensor | None:
        """To add to the scores; None without padding. Given float32 for float64, the kernel reads it wrongly and says nothing."""
        bias = None if self.keys is None else self.keys.bias
        return bias.double() if bias is not None and dtype == torch.float64 else bias


class Plan(NamedTuple):
    """All groups of a batch: views first, in packed order, then those of each wave.

    Attributes:
        groups: those that have queries and keys.
        waves_q, waves_k: how the groups after the views are gathered.
        lengths_q, lengths_k: of all sequences.
        covers_q, covers_k: whether every row is in a group.
        order: ``(T,)``, for each packed row its place among the rows of all groups; the place after the last for rows without a
            group. None if that is where they stand anyway.
    """

    groups: list[Group]
    waves_q: list[Gather]
    waves_k: list[Gather]
    lengths_q: list[int]
    lengths_k: list[int]
    covers_q: bool
    covers_k: bool
    order: Tensor | None


def runs(offsets_q: Sequence[int], offsets_k: Sequence[int], single: bool) -> Iterator[Run]:
    """Sequences without queries are left out, and end a run; ``single`` keeps every sequence apart."""
    size = len_q = len_k = first = 0
    for i, ((q0, q1), (k0, k1)) in enumerate(zip(itertools.pairwise(offsets_q), itertools.pairwise(offsets_k), strict=True)):
        if size and q1 - q0 == len_q and k1 - k0 == len_k and not single:
            size += 1
            continue
        if size:
            yield Run(offsets_q[first], offsets_k[first], size, len_q, len_k, first)
        len_q, len_k, first, size = q1 - q0, k1 - k0, i, int(q1 > q0)
    if size:
        yield Run(offsets_q[first], offsets_k[first], size, len_q, len_k, first)


def plan_for(offsets_q: tuple[int, ...], offsets_k: tuple[int, ...], rows: tuple[int, int], how: str, costs: Costs) -> Plan:
    """The plan for ``rows`` of queries and keys, made once for all calls on the same lengths.

    ``how``: "single" gives every sequence a call of its own, "equal" groups equal lengths, "near" pads near-equal ones too.
    """
    wanted = (offsets_q, offsets_k, rows, how, costs)
    plan = _plans.get(wanted)
    if plan is None:
        plan = _make(*wanted)
        for old in list(_plans)[: max(0, len(_plans) + 1 - _KEPT)]:
            _plans.pop(old, None)  # another thread may have been faster
        _plans[wanted] = plan
    return plan


def _make(offsets_q: tuple[int, ...], offsets_k: tuple[int, ...], rows: tuple[int, int], how: str, costs: Costs) -> Plan:
    found = [run for run in runs(offsets_q, offsets_k, how == "single") if run.len_k]
    bags = [[run] for run in found] if how == "single" or len(found) < 2 else list(_merge(found, how == "near", costs))
    views = sorted(bag[0] for bag in bags if len(bag) == 1)
    gathered = [bag for bag in bags if len(bag) > 1]
    groups = [Group(*run[:5]) for run in views]
    covers = sum(r.size * r.len_q for r in found) == rows[0], sum(r.size * r.len_k for r in found) == rows[1]
    same = offsets_q == offsets_k
    lengths_q = [b - a for a, b in itertools.pairwise(offsets_q)]
    lengths_k = lengths_q if same else [b - a for a, b in itertools.pairwise(offsets_k)]
    if not gathered:
        order = None if covers[0] else _order(lengths_q, views, [], rows[0])
        return Plan(groups, [], [], lengths_q, lengths_k, *covers, order)
    waves_q, queries = _sides(gathered, 0, costs.wave)
    waves_k, keys = (waves_q, queries) if same else _sides(gathered, 1, costs.wave)
    groups += [Group(-1, -1, len(q.sequences), b[0].len_q, b[0].len_k, q, k) for b, q, k in zip(gathered, queries, keys, strict=True)]
    order = _order(lengths_q, views, gathered, rows[0])
    return Plan(groups, waves_q, waves_k, lengths_q, lengths_k, *covers, order)


def _merge(found: list[Run], near: bool, costs: Costs) -> Iterator[list[Run]]:
    """Greedy from the longest on: within a few per cent of the optimum, which takes a hundred times as long to find."""
    bag: list[Run] = []
    waste, rows, len_q, len_k, full = 0.0, 0, 0, 0, 0.0
    for run in sorted(found, key=itemgetter(3, 4), reverse=True):
        rows += run.size * len_q
        if bag and rows <= costs.wave:
            if run.len_q == len_q and run.len_k == len_k:
                bag.append(run)
                continue
            if near and run.len_k <= len_k:
                more = waste + run.size * (full - costs.kernel(run.len_q, run.len_k))
                if more <= costs.call:
                    bag.append(run)
                    waste = more
                    continue
        yield from _worth_it(bag, costs, waste)
        len_q, len_k = run.len_q, run.len_k
        bag, waste, rows, full = [run], 0.0, run.size * len_q, costs.kernel(len_q, len_k)
    yield from _worth_it(bag, costs, waste)


def _worth_it(bag: list[Run], costs: Costs, waste: float) -> Iterable[list[Run]]:
    """The bag, or its runs where copying them takes longer than the calls that it saves."""
    if len(bag) < 2:
        return [bag] if bag else []
    rows = sum(run.size for run in bag) * bag[0].len_q
    return [bag] if costs.copy * rows + waste < costs.call * (len(bag) - 1) else [[run] for run in bag]


def _sides(bags: list[list[Run]], side: int, wave: int) -> tuple[list[Gather], list[Side]]:
    """Queries (0) or keys (1): the waves and each group. Indices in one go, because every operation costs microseconds."""
    starts: list[int] = []
    lengths: list[int] = []
    padded: list[int] = []
    shapes = []
    for bag in bags:
        before = len(starts)
        for run in bag:
            length = run[3 + side]
            starts += range(run[side], run[side] + run.size * length, length)
            lengths += [length] * run.size
        longest = max(lengths[before:])
        shapes.append((len(starts) - before, longest))
        padded += [longest] * (len(starts) - before)
    rows_R, hidden_R = _spread(starts, lengths, padded)
    sizes = [count * longest for count, longest in shapes]
    biases = torch.zeros(len(rows_R), device="cpu").masked_fill_(hidden_R, float("-inf")).split(sizes)
    sides = [_side(bag, side, shape, bias) for bag, shape, bias in zip(bags, shapes, biases, strict=True)]
    shares = _waves(sizes, wave)
    pieces = (x.split([sum(share) for share in shares]) for x in (rows_R, hidden_R))
    return [Gather(rows, share, hidden.nonzero().squeeze(1)) for share, rows, hidden in zip(shares, *pieces, strict=True)], sides


def _waves(sizes: list[int], most: int) -> list[list[int]]:
    """``sizes`` in as few lists as a sum of ``most`` each allows."""
    waves: list[list[int]] = []
    for size in sizes:
        if waves and sum(waves[-1]) + size <= most:
            waves[-1].append(size)
        else:
            waves.append([size])
    return waves


def _side(bag: list[Run], side: int, shape: tuple[int, int], bias: Tensor) -> Side:
    count, longest = shape
    numbers = [run.first + i for run in bag for i in range(run.size)]
    lengths = [run[3 + side] for run in bag for _ in range(run.size)]
    if sum(lengths) == count * longest:
        return Side(numbers, lengths, False, None)
    return Side(numbers, [n for length in lengths for n in (length, longest - length)], True, bias.view(count, 1, 1, longest))


def _table(*columns: list[int]) -> Tensor:
    """An int64 tensor of lists; `torch.tensor` takes ten times as long for it."""
    return torch.frombuffer(array("q", itertools.chain(*columns)), dtype=torch.int64).view(len(columns), -1)


def _spread(starts_Q: list[int], lengths_Q: list[int], padded_Q: list[int]) -> tuple[Tensor, Tensor]:
    """The rows of sequences, one after another, each padded with copies of its last row; and True at padding."""
    starts, lengths, padded = _table(starts_Q, lengths_Q, padded_Q)
    total = sum(padded_Q)
    parts_R = torch.repeat_interleave(padded, output_size=total)
    shift = starts + padded - padded.cumsum(0)
    rows_R = shift.index_select(0, parts_R).add_(torch.arange(total, device="cpu"))
    last_R = (starts + lengths - 1).index_select(0, parts_R)
    return torch.minimum(rows_R, last_R), rows_R > last_R


def _order(lengths: list[int], views: list[Run], bags: list[list[Run]], num_rows: int) -> Tensor:
    """See `Plan`. With a sequence of slack rows at the end."""
    shifts, done = [-1] * (len(lengths) + 1), 0
    for bag in [*([run] for run in views), *bags]:
        longest = bag[0].len_q
        for run in bag:
            shifts[run.first : run.first + run.size] = range(done, done + run.size * longest, longest)
            done += run.size * longest
    slack = num_rows - sum(lengths)
    starts = itertools.accumulate(lengths, initial=0)
    shifts = [place - start if place >= 0 else _NOWHERE for place, start in zip(shifts, starts, strict=True)]
    shift_Q, lengths_Q = _table(shifts, [*lengths, slack])
    order: Tensor = shift_Q.repeat_interleave(lengths_Q, output_size=num_rows).add_(torch.arange(num_rows, device="cpu"))
    if slack or _NOWHERE in shifts[:-1]:
        order.masked_fill_(order < 0, done)
    return order
