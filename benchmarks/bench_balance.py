"""How long do ranks wait for the slowest one? Shares of the machine that idle, by sampler and number of ranks, and what planning takes.

Nothing is trained: the work of a document is its `Cost`, by which `TokenBudgetBatchSampler` balances. Others get batches that hold as many
tokens on average, so that all make about as many steps.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from varlen_attn import Cost, TokenBudgetBatchSampler
from varlen_attn.data.sampler import FILL

from .lengths import SPEECH_MILLISECONDS, all_text, frames
from .measure import peak_extra, save

KEYS = ("what", "data", "ranks", "documents")
RANDOM, GROUPED, GREEDY, OURS, ALONE = "DistributedSampler", "length-grouped", "greedy", "ours", "ours, window=1"
RANKS, STEPS = (8, 64, 512), 33
IDLE, PLANNING = "idle", "planning"
PLANS = ((64, 1_000_000), (4096, 1_000_000), (64, 10_000_000), (4096, 10_000_000))


def _drawn(pool: tuple[int, ...]) -> Callable[[int, torch.Generator], Tensor]:
    return lambda count, generator: torch.tensor(pool)[torch.randint(len(pool), (count,), generator=generator)]


def web(count: int, generator: torch.Generator) -> Tensor:
    """Log-normal, with a mean of 655 tokens, cut at 8192."""
    return torch.empty(count).log_normal_(math.log(400), 1.0, generator=generator).clamp(1, 8192).long()


def long_context(count: int, generator: torch.Generator) -> Tensor:
    """One in twenty of another log-normal, up to 32768 tokens."""
    short, long = (torch.empty(count).log_normal_(math.log(x), s, generator=generator) for x, s in ((300, 0.8), (8000, 0.7)))
    return torch.where(torch.rand(count, generator=generator) < 0.95, short, long).clamp(1, 32768).long()


DATA: dict[str, tuple[Callable[[int, torch.Generator], Tensor], int, int]] = {  # lengths, width, budget
    "log-normal": (web, 768, 8192),
    "log-normal, more a rank": (web, 768, 32768),
    "long context": (long_context, 2048, 32768),
    "text": (_drawn(all_text()), 384, 4096),
    "speech": (_drawn(tuple(map(frames, SPEECH_MILLISECONDS))), 768, 8192),
}


def idle(work: Tensor) -> float:
    """``work`` (steps, ranks): the share of the time of all ranks that they wait for the slowest."""
    return 1 - float(work.sum() / (work.shape[1] * work.amax(1).sum()))


def equal_counts(cost: Tensor, ranks: int, size: int) -> Tensor:
    """As they come, ``size`` documents a rank and step."""
    steps = len(cost) // (ranks * size)
    return cost[: steps * ranks * size].view(steps, size, ranks).sum(1)


def grouped(lengths: Tensor, size: int) -> Tensor:
    """The order of transformers' ``group_by_length``: sorted within 50 batches."""
    parts = zip(range(0, len(lengths), 50 * size), lengths.split(50 * size), strict=True)
    return torch.cat([start + part.argsort(descending=True, stable=True) for start, part in parts])


def greedy(lengths: Tensor, cost: Tensor, ranks: int, budget: int) -> Tensor:
    """Each rank fills batches to the budget, from its own share of the documents; steps that not all ranks have are left out."""
    found = []
    for rank in range(ranks):
        work, held = [0.0], 0
        for length, price in zip(lengths[rank::ranks].tolist(), cost[rank::ranks].tolist(), strict=True):
            if held + length > budget:
                work.append(0.0)
                held = 0
            held += length
            work[-1] += price
        found.append(work[:-1] or work)
    steps = min(map(len, found))
    return torch.tensor([work[:steps] for work in found], dtype=torch.float64).T


def ours(lengths: Tensor, cost: Cost, ranks: int, budget: int, window: int) -> Tensor:
    sampler = TokenBudgetBatchSampler(lengths, budget, cost=cost, num_replicas=ranks, rank="all", window=window)
    batches = list(sampler)
    where = torch.empty(len(lengths), dtype=torch.int64)
    where[torch.tensor([i for batch in batches for i in batch])] = torch.repeat_interleave(torch.tensor([len(batch) for batch in batches]))
    assert torch.bincount(where, lengths).max() <= budget, "a share is over the budget"
    return torch.bincount(where, cost(lengths.double()), len(batches)).view(-1, ranks)


def bench_idle(data: str, ranks: int, steps: int = STEPS) -> dict[str, Any]:
    make, width, budget = DATA[data]
    generator, cost = torch.Generator().manual_seed(0), Cost.of(width)
    mean = float(make(20_000, generator).double().mean())
    size = int(budget * FILL / mean)
    lengths = make(int(steps * ranks * budget * FILL / mean), generator)
    price = cost(lengths.double())
    order = grouped(lengths, ranks * size)
    work = {
        RANDOM: equal_counts(price, ranks, size),
        GROUPED: equal_counts(price[order], ranks, size),
        GREEDY: greedy(lengths, price, ranks, budget),
        ALONE: ours(lengths, cost, ranks, budget, 1),
        OURS: ours(lengths, cost, ranks, budget, 32),
    }
    most = {RANDOM: equal_counts(lengths, ranks, size), GROUPED: equal_counts(lengths[order], ranks, size)}
    return {
        "what": IDLE, "data": data, "ranks": ranks, "documents": len(lengths), "budget": budget, "width": width,
        "idle": {name: round(idle(found), 5) for name, found in work.items()},
        "tokens": {name: round(int(found.max()) / budget, 2) for name, found in most.items()},
    }  # fmt: skip


def plan(ranks: int, documents: int) -> dict[str, Any]:
    """CPU seconds of one rank, and memory beyond the lengths, in a process of its own: one epoch of log-normal documents."""
    lengths, times = web(documents, torch.Generator().manual_seed(0)), []

    def run() -> None:
        begin = time.process_time()
        sampler = TokenBudgetBatchSampler(lengths, 8192, num_replicas=ranks, rank=0)
        times.append(time.process_time() - begin)
        batches = iter(sampler)
        next(batches)
        times.append(time.process_time() - begin)
        times.append(1 + sum(1 for _ in batches))
        times.append(time.process_time() - begin)

    megabytes = peak_extra(run) / 1e6
    made, first, steps, whole = times
    return {
        "what": PLANNING, "data": "log-normal", "ranks": ranks, "documents": documents, "steps": steps, "made": round(made, 3),
        "first": round(first, 3), "step_ms": round(1e3 * (whole - made) / steps, 3), "megabytes": round(megabytes),
    }  # fmt: skip


def bench_planning(ranks: int, documents: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.bench_balance", "--plan", str(ranks), str(documents)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=int, nargs=2, metavar=("RANKS", "DOCUMENTS"), help="time one plan, and print it as JSON")
    parser.add_argument("--quick", action="store_true", help="few ranks and documents: does it run? Nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.plan:
        print(json.dumps(plan(*options.plan)))
        return
    rows = [bench_idle(data, ranks) for data in DATA for ranks in (RANKS[:1] if options.quick else RANKS)]
    rows += [bench_planning(*size) for size in ([(8, 10_000)] if options.quick else PLANS)]
    for row in rows:
        print(row)
    if not options.quick:
        print(f"written: {save('balance', rows, KEYS)}")


if __name__ == "__main__":
    main()
