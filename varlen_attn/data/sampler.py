"""`TokenBudgetBatchSampler`: batches by tokens, balanced over the ranks of a training. `global_token_mean`: the loss of a whole step.

A step waits for the rank with the most work. Here the documents of some dozens of steps are drawn at random, and then dealt out: which
steps hold the long ones, and which rank computes what. Plans are made from integers alone, so that all machines make the same one.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from ..errors import ArgumentError, VarlenWarning, warn
from ..layout.checks import check_at_least, check_integer_vector

FILL = 0.95  # the share of the budget that steps fill on average: what is left of it lets costs be levelled
_PARTS = 2**30  # costs are counted in so many parts of the largest


@dataclass(frozen=True)
class Cost:
    """What a document of l tokens costs to compute: ``linear * l + quadratic * l**2``. Only ratios matter.

    Examples:
        >>> Cost.of(768)(torch.tensor([768.0, 4608.0]))
        tensor([ 896., 9216.])
    """

    linear: float = 1.0
    quadratic: float = 0.0

    @classmethod
    def of(cls, width: Any) -> Cost:
        """Of an encoder of that width, or with that configuration of transformers.

        A layer has ``4 * width**2 + 2 * width * inner`` weights, and each is multiplied once for a token. Attention multiplies
        ``2 * width`` numbers for a pair of tokens. ``inner`` is the ``intermediate_size`` of the configuration, else ``4 * width``.
        """
        size = check_at_least(1, getattr(width, "hidden_size", width), "width", "pass a width, or a configuration with a hidden_size")
        return cls(1.0, 1 / (2 * size + (getattr(width, "intermediate_size", None) or 4 * size)))

    def __call__(self, lengths: Tensor) -> Tensor:
        return self.linear * lengths + self.quadratic * lengths**2


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """``batch_sampler`` of a `DataLoader`: lists of indices, which hold at most ``budget`` tokens, and cost all ranks of a step alike.

    In an epoch every index comes once, on one rank. All ranks have the same number of steps, which is the same in every epoch, and no share
    of a step is empty. Nothing is communicated: each rank makes the plan of all, so ``lengths`` and options have to be the same everywhere.
    Like `DistributedSampler`, it needs ``set_epoch(epoch)`` before each epoch, for another order. Average the loss by `global_token_mean`,
    because ranks have different numbers of documents.

    ``state_dict()`` is small and the same on all ranks; after ``load_state_dict(state)`` the epoch goes on where it was, also with another
    number of ranks. The state counts what was handed out: a `DataLoader` with workers is ahead of the training by what they prefetch, and
    torchdata's ``StatefulDataLoader`` takes that into account.

    Args:
        lengths: tokens of each document: a list, a tensor, an array, or a column of a data set.
        budget: tokens that a rank holds in a step at most, padding not counted.
        cost: what documents cost, a function of a float64 tensor of lengths, such as `Cost`. An encoder of width 768 if left out.
        shuffle: another random order in every epoch; else windows come in the order of ``lengths``.
        seed: of the order.
        num_replicas, rank: those of `torch.distributed`, else 1 and 0. ``rank="all"`` gives the batches of all ranks in turn, for
            Accelerate's ``prepare``, which deals them out.
        window: over how many steps documents may change places, so that long ones meet; over up to twice as many where that leaves no rest,
            and over more where documents hardly fit. With 1, each step is a random sample.
        oversize: what becomes of a document over the budget: ``"error"``, ``"drop"`` with a warning, or ``"alone"`` in a share.
        drop_last: leave out some documents, fewer than ranks, where they do not fit into steps that use every rank. Else this is an error.

    Raises:
        ArgumentError: fewer documents than ranks, one over the budget, or too many of more than half of it to use every rank in every step.

    The equivalent in plain PyTorch, without balance and budget, is ``BatchSampler(DistributedSampler(dataset), batch_size, drop_last)``.

    Examples:
        >>> sampler = TokenBudgetBatchSampler([7, 1, 2, 3, 6, 1], budget=10, num_replicas=2, rank="all")
        >>> len(sampler), sorted(i for batch in sampler for i in batch)
        (4, [0, 1, 2, 3, 4, 5])
    """

    def __init__(
        self, lengths: Any, budget: int, *, cost: Callable[[Tensor], Any] | None = None, shuffle: bool = True, seed: int = 0,
        num_replicas: int | None = None, rank: int | Literal["all"] | None = None, window: int = 32,
        oversize: Literal["error", "drop", "alone"] = "error", drop_last: bool = False,
    ) -> None:  # fmt: skip
        world, me = _world()
        self.num_replicas = check_at_least(1, world if num_replicas is None else num_replicas, "num_replicas")
        self.rank = me if rank is None else rank
        if self.rank != "all" and check_at_least(0, self.rank, "rank") >= self.num_replicas:
            raise _wrong("rank", f"be below num_replicas = {self.num_replicas}", self.rank, "pass 'all' for all of them")
        self.budget, self.window = check_at_least(1, budget, "budget"), check_at_least(1, window, "window")
        self.shuffle, self.seed, self.drop_last, self.epoch = shuffle, seed, drop_last, 0
        self._lengths = _as_lengths(lengths)
        self._tokens = self._lengths.clamp(1, self.budget)
        self._costs = _as_parts((Cost.of(768) if cost is None else cost)(self._lengths.double()), len(self._lengths))
        over = self._lengths > self.budget
        if oversize == "drop" and over.any():
            warn(f"{int(over.sum())} of {len(over)} documents are left out: they are longer than `budget`, {self.budget}.", VarlenWarning)
        elif oversize != "alone" and over.any():
            fix = "raise it, cut the documents, or pass oversize='drop' or oversize='alone'"
            raise _wrong("budget", f"be at least the longest of `lengths`, {int(self._lengths.max())}", self.budget, fix)
        self._kept = (~over | (oversize != "drop")).nonzero()[:, 0]
        self._go_to([], 0)

    def _go_to(self, past: list[tuple[int, int]], taken: int) -> None:
        """So many steps after those that were taken with other numbers of ranks."""
        self._past, self._taken, self._resumed = past, taken, False
        left = self._kept
        if self.shuffle:
            generator = torch.Generator().manual_seed(self._draw("order").getrandbits(63))
            left = left[torch.randperm(len(left), generator=generator, device="cpu")]
        for ranks, steps in past:
            documents, total = self._levelled(left, ranks)
            parts = [documents[:0]]
            for part, first, last in self._windows(documents, 0, total, ranks, steps):
                begun = self._shares(part, first, last, ranks)[steps - first :] if first < steps else []
                parts.append(torch.tensor([i for step in begun for share in step for i in share], device="cpu") if begun else part)
            left = torch.cat(parts)
        self._documents, self._steps = self._levelled(left, self.num_replicas)

    def _draw(self, *what: object) -> random.Random:
        return random.Random(repr((self.seed, self.epoch * self.shuffle, *what)))

    def _levelled(self, documents: Tensor, ranks: int) -> tuple[Tensor, int]:
        """The documents of an epoch and the number of its steps, which does not depend on their order."""
        most, each = len(documents) // ranks, _each(self._tokens[documents])
        if not most and (len(documents) or not self._past):
            raise _wrong("lengths", f"have a document for each of {ranks} ranks", f"{len(documents)} documents", "use fewer ranks")
        if not _fits(each, most * ranks, self.budget):
            if not self.drop_last:
                must = f"let {len(documents)} documents fit into steps that use each of {ranks} ranks"
                raise _wrong("budget", must, self.budget, "raise it, or pass drop_last=True")
            return documents[: most * ranks], most
        least = min(math.ceil(int(each.prod(0).sum()) / (FILL * self.budget * ranks)), most)
        return documents, least + bisect_left(range(least, most), True, key=lambda steps: _fits(each, steps * ranks, self.budget))

    def _windows(self, documents: Tensor, first: int, last: int, ranks: int, taken: int) -> Iterator[tuple[Tensor, int, int]]:
        """Documents, first and last step of the windows that are not yet taken: halves of halves, as long as their documents fit."""
        windows = (last - first) // self.window
        if last > taken and windows > 1:
            middle = first + (last - first) * (windows // 2) // windows
            ends = self._tokens[documents].cumsum(0)
            cut = int(torch.searchsorted(ends, ends[-1] * (middle - first) // (last - first), right=True))
            halves = (documents[:cut], first, middle), (documents[cut:], middle, last)
            if all(_fits(_each(self._tokens[half]), (end - begin) * ranks, self.budget) for half, begin, end in halves):
                for half, begin, end in halves:
                    yield from self._windows(half, begin, end, ranks, taken)
                return
        if last > taken:
            yield documents, first, last

    def _shares(self, documents: Tensor, first: int, last: int, ranks: int) -> list[list[list[int]]]:
        """Of each step and rank. Each begins with one of the longest documents, alike ones in a step. The others go, longest first, to the
        share that lacks most of what its step costs and has room."""
        size = (last - first) * ranks
        order = documents[self._lengths[documents].argsort(descending=True, stable=True)]
        tokens, costs = self._tokens[order], self._costs[order]
        peaks = costs[:size].view(-1, ranks).amax(1)
        highest = peaks.sort(descending=True).values
        # What all steps cost but those whose longest document alone costs more.
        level = int(((costs.sum() // ranks - highest.cumsum(0) + highest) // torch.arange(last - first, 0, -1, device="cpu")).min())
        lacks = costs[:size] - peaks.clamp(min=level).repeat_interleave(ranks)
        shares, room = [[i] for i in order[:size].tolist()], (self.budget - tokens[:size]).tolist()
        heap, full = list(zip(lacks.tolist(), range(size), strict=True)), cast("list[tuple[int, tuple[int, int]]]", [])
        heapify(heap)
        for i, length, cost in zip(order[size:].tolist(), tokens[size:].tolist(), costs[size:].tolist(), strict=True):
            while full and -full[0][0] >= length:
                heappush(heap, heappop(full)[1])
            while room[heap[0][1]] < length:
                entry = heappop(heap)
                heappush(full, (-room[entry[1]], entry))
            lack, share = heap[0]
            shares[share].append(i)
            room[share] -= length
            heapreplace(heap, (lack + cost, share))
        draw = self._draw(first, last, ranks)
        steps = [draw.sample(shares[k : k + ranks], ranks) for k in range(0, size, ranks)]
        return draw.sample(steps, len(steps))

    sampler = property(lambda self: self)  # where Accelerate looks for `set_epoch`

    @property
    def batch_size(self) -> None:
        """None, because batches differ. Accelerate asks for it where it deals out batches to ranks, and then it needs those of all."""
        if self.rank != "all" and self.num_replicas > 1:
            raise _wrong("rank", "be 'all' where Accelerate deals out batches", self.rank, "pass rank='all', or leave out `prepare`")

    def __len__(self) -> int:
        """Steps of the epoch, for ``rank="all"`` times ranks."""
        return (sum(taken for _, taken in self._past) + self._steps) * (self.num_replicas if self.rank == "all" else 1)

    def __iter__(self) -> Iterator[list[int]]:
        if not self._resumed and (self._past or self._taken):
            self._go_to([], 0)
        self._resumed = False
        return self._batches(self._documents, self._taken)

    def set_epoch(self, epoch: int) -> None:
        """The order of another epoch. What `load_state_dict` restored stays if it is of this epoch."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._go_to([], 0)

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch, in plain numbers."""
        return {"epoch": self.epoch, "taken": [*map(list, self._past), [self.num_replicas, self._taken]], **self._plan()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the epoch of ``state_dict``: of a sampler with the same lengths and options but for the ranks."""
        for name, here in self._plan().items():
            if state_dict[name] != here:
                raise _wrong(f"state_dict[{name!r}]", f"be {here}, as in this sampler", state_dict[name], "make it with the same arguments")
        *past, (ranks, taken) = (tuple(pair) for pair in state_dict["taken"])
        self.epoch = state_dict["epoch"]
        self._go_to(past, taken) if ranks == self.num_replicas else self._go_to([*past, (ranks, taken)], 0)
        self._resumed = True

    def _plan(self) -> dict[str, Any]:
        """What plans are made from, beside the epoch and the ranks."""
        sums = {"documents": len(self._kept), "tokens": int(self._tokens[self._kept].sum()), "cost": int(self._costs[self._kept].sum())}
        return sums | {name: getattr(self, name) for name in ("budget", "window", "shuffle", "seed", "drop_last")}

    def _batches(self, documents: Tensor, taken: int) -> Iterator[list[int]]:
        for part, first, last in self._windows(documents, 0, self._steps, self.num_replicas, taken):
            steps = self._shares(part, first, last, self.num_replicas)
            for number in range(max(first, taken), last):
                step = steps[number - first]
                *before, mine = step if self.rank == "all" else [step[self.rank]]
                yield from before
                self._taken = number + 1
                yield mine


def global_token_mean(losses: Tensor, num_tokens: int | Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The loss whose gradient, averaged over ranks as data parallel wrappers do, is that of the mean over all tokens of the step.

    Every rank divides by its own number of tokens otherwise, and tokens on a rank with few of them count more.

    Args:
        losses: of this rank's tokens, of any shape; they are summed. One sum will do, such as that of ``reduction="sum"``.
        num_tokens: tokens of this rank in the whole step, a number or several that are added. With gradient accumulation, those of all
            its batches, in each call.
        group: of the ranks whose gradients are averaged; the default one if left out.

    Returns:
        A scalar. Its mean over ranks, summed over the accumulated batches, is the mean loss of a token. One number is summed over ranks.

    The equivalent in plain PyTorch::

        torch.distributed.all_reduce(num_tokens)
        losses.sum() * torch.distributed.get_world_size() / num_tokens

    Examples:
        >>> global_token_mean(torch.tensor([1.0, 2.0, 6.0]), 3)
        tensor(3.)
    """
    counts = torch.as_tensor(num_tokens, device=losses.device).reshape(-1)
    check_integer_vector(counts, "num_tokens")
    total, (ranks, _) = counts.sum(), _world(group)
    if ranks > 1:
        dist.all_reduce(total, group=group)
    return losses.sum() * ranks / total.clamp(min=1)


def _world(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """The number of ranks, and which this is."""
    return (dist.get_world_size(group), dist.get_rank(group)) if dist.is_available() and dist.is_initialized() else (1, 0)


def _wrong(name: str, must: str, value: object, fix: str) -> ArgumentError:
    return ArgumentError(f"`{name}` must {must}, but is {value}: {fix}.")


def _as_lengths(lengths: Any) -> Tensor:
    try:
        found = lengths if torch.is_tensor(lengths) else torch.tensor(getattr(lengths, "__array__", lambda: [*lengths])(), device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise _wrong("lengths", "be integers, one for each document", repr(type(lengths).__name__), str(error)) from error
    check_integer_vector(found if found.numel() else found.long(), "lengths")
    found = found.to("cpu", torch.int64)
    if (found < 0).any():
        raise _wrong("lengths", "be at least 0", int(found.min()), "count the tokens of each document")
    return found


def _as_parts(costs: Any, count: int) -> Tensor:
    """Integers, which add up to the same sum everywhere."""
    found = torch.as_tensor(costs, dtype=torch.float64, device="cpu")
    if found.shape != (count,) or not (found.isfinite() & (found >= 0)).all():
        raise _wrong("cost", f"give a finite number of at least 0 for each of {count} lengths", f"{costs!r}", "see `Cost`")
    return (found * (_PARTS / found.max().clamp(min=1e-300) if count else 1)).round().to(torch.int64)


def _each(tokens: Tensor) -> Tensor:
    """The different lengths, longest first, and how many there are of each."""
    return torch.stack(torch.unique(tokens, return_counts=True)).flip(1)


def _fits(each: Tensor, shares: int, budget: int) -> bool:
    """Whether there is a document for every share, and room for all however they are dealt out, longest first.

    A document has no room only where every share holds more than the budget without it. They then hold more than so much together, and each
    of them at least as many documents as there is room for of the longest.
    """
    lengths, counts = each
    upto = counts.cumsum(0)
    before = (lengths * counts).cumsum(0) - lengths  # tokens before the last document of each length
    fine = (upto <= shares * (budget // lengths[:1])) | (before <= shares * (budget - lengths))
    return int(counts.sum()) >= shares and bool(fine.all())
