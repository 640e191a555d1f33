"""Which sequences share a kernel call of the CPU backend: equal lengths, and near-equal ones where padding costs less than a call.

Groups are views where their sequences are equally long and stand one after another. The others are gathered, several groups in one
wave, where the padding of a shorter sequence holds copies of its own last token: memory that is valid, and nothing of its neighbours.

With several threads every operation on more than a few rows is a parallel region, in which threads wait for each other. Where another
process is busy, that takes a time slice of the scheduler: milliseconds, for work of microseconds. Few regions matter more than anything
else then, so there a call counts for more than it costs on a quiet machine. One thread waits for no other, and groups little.

Plans are pure functions of lengths and costs, kept by value: layers, forward and backward share one, and offsets that change in place
cannot meet an old one. Costs are constants of a class of machine and not measured at run time, because they decide the shape of
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

from ..._torch import has_amx
from ...layout.checks import check_offsets

_WAVE_BYTES = (1 << 19, 1 << 20)  # of one gathered tensor, for one thread and for several: larger ones are fresh memory, to fault in
_NOWHERE = -(1 << 62)
_KEPT = 8  # plans: one for each pair of layouts of a step, with a reserve

Span = tuple[int, int, int]  # first row, size and length of a group
_plans: dict[tuple[object, ...], Plan] = {}


class Costs(NamedTuple):
    """Microseconds, by which groups are chosen; only their ratios count. For all heads of one sequence.

    Attributes:
        call: one more kernel call, with what it takes to bring its results to their places.
        token, pair: of the kernel, for each query, and for each query and key.
        copy: of gathering one row of query, key and value.
        wave: rows of a wave at most.
        groups: of cutting a batch into groups, and of bringing them together.
    """

    call: float
    token: float
    pair: float
    copy: float
    wave: int
    groups: float = 0.0

    @classmethod
    def of(cls, query: Tensor, threads: int) -> Costs:
        """Fitted on Zen 5 with AVX512, AVX2 and neither, and on Sapphire Rapids with AMX; one and two threads."""
        width = query.shape[1] * query.shape[2]
        pair = 0.024 * (1 if torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2") else 2)
        if query.dtype == torch.float64:
            pair *= 2.7
        elif query.dtype == torch.bfloat16 and has_amx():
            pair *= 0.3
        share = width / 512 / min(threads, 8)  # beyond, short sequences hardly get faster
        call = 10.0 if threads == 1 else 60 + 6 * math.log2(threads)
        wave = _WAVE_BYTES[threads > 1] // max(1, width * max(4, query.itemsize))
        return cls(call, 0.4 * share, pair * share, 0.06 * query.itemsize * share, wave, 2 * call)

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
    """The queries of all groups, or the keys.

    Attributes:
        spans: first row, size and padded length of each group. Those that are views come first, in packed order; then those gathered,
            which have no first row.
        waves: what is gathered together: packed rows, one group after another, at padding the last of their sequence; rows of each
            group; places of padding.
        members: of each gathered group the numbers of its sequences; true length and padding of each, in turns, or only lengths where
            nothing is padded; and whether anything is.
        biases: of each group, ``(size, 1, 1, length)`` float32, -inf at padding; None without padding. Where all sequences are one group
            that is a view, ``(1, 1, T, Tk)``, -inf between any two of them.
        lengths: of all sequences.
        covers: whether every row is in a group.
        order: ``(T,)``, for each packed row its place among the rows of all groups, or the one after the last; None where they are equal.
    """

    spans: list[Span]
    waves: list[tuple[Tensor, list[int], Tensor]]
    members: list[tuple[list[int], list[int], bool]]
    biases: list[Tensor | None]
    lengths: list[int]
    covers: bool
    order: Tensor | None


Plan = tuple[Side, Side, bool]  # queries and keys of all groups that have both; whether all sequences are one group, with a mask


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


def plan_for(offsets_q: tuple[int, ...], offsets_k: tuple[int, ...], rows: tuple[int, int], how: str, query: Tensor) -> Plan:
    """The plan for ``rows`` of queries and keys, made once for all calls on the same lengths by as many threads.

    ``how``: "single" gives every sequence a call of its own, "equal" groups equal lengths, "near" pads near-equal ones too.
    """
    threads = torch.get_num_threads()
    wanted = (offsets_q, offsets_k, rows, how, query.shape[1:], query.dtype, threads)
    plan = _plans.get(wanted)
    if plan is None:
        plan = _make(offsets_q, offsets_k, rows, how, Costs.of(query, threads))
        for old in list(_plans)[: max(0, len(_plans) + 1 - _KEPT)]:
            _plans.pop(old, None)  # another thread may have been faster
        _plans[wanted] = plan
    return plan


def _make(offsets_q: tuple[int, ...], offsets_k: tuple[int, ...], rows: tuple[int, int], how: str, costs: Costs) -> Plan:
    for offsets, most in zip((offsets_q, offsets_k), rows, strict=True):
        check_offsets(offsets, None, most, slack=True)  # a plan that is kept has been checked
    found = [run for run in runs(offsets_q, offsets_k, how == "single") if run.len_k]
    if how == "near" and len(found) > 1 and costs.kernel(*rows) < costs.groups + sum(run.size * costs.kernel(*run[3:5]) for run in found):
        lengths = [[b - a for a, b in itertools.pairwise(offsets)] for offsets in (offsets_q, offsets_k)]
        ids = [torch.arange(len(x), device="cpu").repeat_interleave(_table(x)[0]) for x in lengths]
        if tuple(map(len, ids)) == rows and all(k or not q for q, k in zip(*lengths, strict=True)):
            bias = torch.zeros(rows, device="cpu").masked_fill_(ids[0][:, None] != ids[1], float("-inf"))[None, None]
            whole = [Side([(0, 1, most)], [], [], [bias], each, True, None) for each, most in zip(lengths, rows, strict=True)]
            return whole[0], whole[1], True
    bags = [[run] for run in found] if how == "single" or len(found) < 2 else list(_merge(found, how == "near", costs))
    views = sorted(bag[0] for bag in bags if len(bag) == 1)
    gathered = [bag for bag in bags if len(bag) > 1]
    queries = _side(0, offsets_q, views, gathered, rows[0], costs.wave)
    same = (offsets_k, rows[1]) == (offsets_q, rows[0])
    return queries, queries if same else _side(1, offsets_k, views, gathered, rows[1], costs.wave), False


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
        yield from _pays_off(bag, costs, waste)
        len_q, len_k = run.len_q, run.len_k
        bag, waste, rows, full = [run], 0.0, run.size * len_q, costs.kernel(len_q, len_k)
    yield from _pays_off(bag, costs, waste)


def _pays_off(bag: list[Run], costs: Costs, waste: float) -> Iterable[list[Run]]:
    """The bag, or its runs where copying them takes longer than the calls that it saves."""
    if len(bag) < 2:
        return [bag] if bag else []
    rows = sum(run.size for run in bag) * bag[0].len_q
    return [bag] if costs.copy * rows + waste < costs.call * (len(bag) - 1) else [[run] for run in bag]


def _side(side: int, offsets: tuple[int, ...], views: list[Run], bags: list[list[Run]], num_rows: int, wave: int) -> Side:
    """Queries (0) or keys (1). Indices of all groups in one go, because every operation costs microseconds."""
    spans: list[Span] = [(run[side], run.size, run[3 + side]) for run in views]
    covered = sum(run.size * run[3 + side] for run in itertools.chain(views, *bags))
    all_lengths = [b - a for a, b in itertools.pairwise(offsets)]
    order = None if covered == num_rows and not bags else _order(side, all_lengths, views, bags, num_rows)
    if not bags:
        return Side(spans, [], [], [None] * len(spans), all_lengths, covered == num_rows, order)
    starts: list[int] = []
    padded: list[int] = []
    members = []
    for bag in bags:
        numbers = [run.first + i for run in bag for i in range(run.size)]
        lengths = [all_lengths[i] for i in numbers]
        size, longest = len(numbers), max(lengths)
        starts += [offsets[i] for i in numbers]
        padded += [longest] * size
        spans.append((-1, size, longest))
        is_padded = sum(lengths) < size * longest
        cuts = [n for length in lengths for n in (length, longest - length)] if is_padded else lengths
        members.append((numbers, cuts, is_padded))
    rows_R, hidden_R = _spread(starts, [all_lengths[i] for numbers, _, _ in members for i in numbers], padded)
    sizes = [size * longest for _, size, longest in spans[len(views) :]]
    every = torch.zeros(len(rows_R), device="cpu").masked_fill_(hidden_R, float("-inf")).split(sizes)
    biases = [
        x.view(size, 1, 1, longest) if m[2] else None for x, m, (_, size, longest) in zip(every, members, spans[len(views) :], strict=True)
    ]
    shares = _waves(sizes, wave)
    pieces = (x.split([sum(share) for share in shares]) for x in (rows_R, hidden_R))
    waves = [(rows, share, hidden.nonzero().squeeze(1)) for share, rows, hidden in zip(shares, *pieces, strict=True)]
    return Side(spans, waves, members, [*[None] * len(views), *biases], all_lengths, covered == num_rows, order)


def _waves(sizes: list[int], most: int) -> list[list[int]]:
    """``sizes`` in as few lists as a sum of ``most`` each allows."""
    waves: list[list[int]] = []
    for size in sizes:
        if waves and sum(waves[-1]) + size <= most:
            waves[-1].append(size)
        else:
            waves.append([size])
    return waves


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


def _order(side: int, lengths: list[int], views: list[Run], bags: list[list[Run]], num_rows: int) -> Tensor:
    shifts, done = [-1] * (len(lengths) + 1), 0  # slack rows count as one more sequence
    for bag in [*([run] for run in views), *bags]:
        longest = bag[0][3 + side]
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
