"""Bulk embedding on a CPU: processes of `examples/embed_corpus.py` beside a pool of sentence-transformers, MiniLM on the same docstrings.

All pools have as many processes, with one thread each, and the same blocks of texts; they stay open and take turns. What they need to start
is not counted. Vectors are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any

import numpy as np
import torch

import varlen_attn
from examples import embed_corpus

from .inputs import library, minilm_folder, sentence_transformer
from .measure import environment, save

THEIRS, ENABLED, OURS = "encode, a pool", "encode, a pool, enabled", "embed_corpus"
KEYS = ("workers", "block", "tokens")
TOLERANCE = 1e-4  # of vectors of length 1

Vectors = np.ndarray[Any, Any]


def contestants(stack: ExitStack, workers: int, size: int, tokens: int) -> dict[str, Callable[[list[str]], Vectors]]:
    model = sentence_transformer()
    ours = copy.deepcopy(model)
    varlen_attn.enable(ours)

    def theirs(model: Any) -> Callable[[list[str]], Vectors]:
        pool = model.start_multi_process_pool(["cpu"] * workers)
        stack.callback(model.stop_multi_process_pool, pool)
        return lambda texts: np.stack(model.encode(texts, pool=pool, chunk_size=size, show_progress_bar=False))

    path = minilm_folder()
    processes = stack.enter_context(embed_corpus.pool(path, workers=workers, tokens=tokens, threads=1))

    def blocks(texts: list[str]) -> Vectors:
        given = embed_corpus.blocks(enumerate(texts), set(), size)
        return np.concatenate([found["vector"] for found in processes.map(embed_corpus._embed, given)])

    return {THEIRS: theirs(model), ENABLED: theirs(ours), OURS: blocks}


def compared(calls: dict[str, Callable[[list[str]], Vectors]], texts: list[str]) -> dict[str, float]:
    """The largest difference from the vectors of the model as it came. The first calls also wait until all processes have started."""
    vectors = {name: call(texts) for name, call in calls.items()}
    difference = {name: float(f"{np.abs(x - vectors[THEIRS]).max():.2g}") for name, x in vectors.items() if name != THEIRS}
    wrong = {name: x for name, x in difference.items() if not x <= TOLERANCE}
    if wrong:
        raise AssertionError(f"vectors differ from those of the model as it came: {wrong}")
    return difference


def rates(calls: dict[str, Callable[[list[str]], Vectors]], texts: list[str], rounds: int) -> dict[str, list[float]]:
    """Texts a second, in each round."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
            began = time.perf_counter()
            calls[name](texts)
            found[name].append(len(texts) / (time.perf_counter() - began))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--block", type=int, default=64, help="texts that a process takes at a time")
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch of ours; a batch of `encode` has 32 texts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes
    torch.set_num_threads(1)
    texts, busy = random.Random(0).sample(library(), args.texts), round(os.getloadavg()[0], 1)
    with ExitStack() as stack:
        calls = contestants(stack, args.workers, args.block, args.tokens)
        difference = compared(calls, texts[: 2 * args.workers * args.block])
        found = rates(calls, texts, args.rounds)
    ratios = {name: [y / x for x, y in zip(found[THEIRS], found[name], strict=True)] for name in (ENABLED, OURS)}
    row = {
        "workers": args.workers, "block": args.block, "tokens": args.tokens, "texts": len(texts), "busy": busy, "difference": difference,
        "rates": {name: [round(x, 1) for x in found[name]] for name in found},
        "texts_per_second": {name: round(median(x), 1) for name, x in found.items()},
        "times_as_fast": {name: round(median(x), 2) for name, x in ratios.items()},
    }  # fmt: skip
    print(row)
    if not args.no_save:
        print(f"written to {save('embedding', [row], KEYS).name}; {environment()['cpu']}")


if __name__ == "__main__":
    main()
