"""A service on a CPU under load: MiniLM as it came and enabled, one request a call and in batches of tokens by `examples/serving.py`.

Docstrings arrive at random times, at the same times for every contestant, in turns. A latency is counted from the time when the request
was due. Loads are shares of what the model as it came answers when all requests come at once, alone or in batches; the row "all at once"
says how many each answers then. Vectors are compared before anything is timed. Whoever asks shares the process, and the cores.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import time
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any

import torch

import varlen_attn
from examples.serving import Server

from .inputs import library, sentence_transformer
from .measure import environment, save

ALONE, BATCHES = "as it came, one by one", "as it came, batches"
OURS_ALONE, OURS = "enable, prepack, one by one", "enable, prepack, batches"
AT_ONCE = "all at once"
KEYS = ("load", "threads")
TOLERANCE = 1e-4  # of vectors of length 1


def contestants(threads: int) -> dict[str, Server]:
    model = sentence_transformer()
    ours = copy.deepcopy(model)
    varlen_attn.enable(ours, prepack=True)
    alone, batches = {"tokens": 1, "patience": 0.0, "threads": threads}, {"threads": threads}
    options: dict[str, Any] = {ALONE: alone, BATCHES: batches, OURS_ALONE: alone, OURS: batches}
    return {name: Server(ours if "enable" in name else model, **chosen) for name, chosen in options.items()}


def asked(server: Server, texts: Sequence[str], rate: float, seed: int) -> tuple[list[float], float]:
    """Latencies, and how many were answered in a second; all at once where ``rate`` is infinite."""
    gaps, latencies, due = random.Random(seed), [], time.perf_counter()
    began, answers = due, []
    for text in texts:
        due += gaps.expovariate(rate) if rate < float("inf") else 0.0
        time.sleep(max(0.0, due - time.perf_counter()))
        answers.append(server.submit(text))
        answers[-1].add_done_callback(lambda _, due=due: latencies.append(time.perf_counter() - due))  # type: ignore[misc]
    for answer in answers:
        answer.result()
    return latencies, len(texts) / (time.perf_counter() - began)


def compared(servers: dict[str, Server], texts: Sequence[str]) -> dict[str, float]:
    vectors = {name: torch.stack([f.result() for f in [server.submit(text) for text in texts]]) for name, server in servers.items()}
    difference = {name: float(f"{float((x - vectors[ALONE]).abs().max()):.2g}") for name, x in vectors.items() if name != ALONE}
    wrong = {name: x for name, x in difference.items() if not x <= TOLERANCE}
    if wrong:
        raise AssertionError(f"vectors differ from those of the model as it came, one by one: {wrong}")
    return difference


def row(
    load: float | str, servers: dict[str, Server], texts: Sequence[str], rate: float, seconds: float, rounds: int, least: int = 20
) -> dict[str, Any]:
    latencies: dict[str, list[float]] = {name: [] for name in servers}
    answered: dict[str, list[float]] = {name: [] for name in servers}
    for seed in range(rounds):
        some = random.Random(seed).choices(texts, k=len(texts) if load == AT_ONCE else max(least, round(rate * seconds)))
        for name in list(servers)[:: 1 if seed % 2 == 0 else -1]:
            taken, speed = asked(servers[name], some, rate, seed)
            latencies[name] += taken
            answered[name].append(speed)
    at = {name: quantiles(x, n=20, method="inclusive") for name, x in latencies.items()}
    return {
        "load": str(load), "rate": None if load == AT_ONCE else round(rate, 1),
        "p50": {name: round(x[9] * 1e3, 1) for name, x in at.items()}, "p95": {name: round(x[18] * 1e3, 1) for name, x in at.items()},
        "answered": {name: round(median(x), 1) for name, x in answered.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.6, 0.9])
    parser.add_argument("--texts", type=int, default=128, help="that come at once")
    parser.add_argument("--seconds", type=float, default=6.0, help="of one turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    texts, rows, busy = random.Random(0).sample(library(), args.texts), [], round(os.getloadavg()[0], 1)
    for threads in args.threads:
        torch.set_num_threads(threads)
        servers = contestants(threads)
        try:
            difference, capacity = compared(servers, texts), float("nan")
            for load in (AT_ONCE, *args.loads):
                rate = float("inf") if load == AT_ONCE else load * capacity
                found = row(load, servers, texts, rate, args.seconds, args.rounds)
                capacity = max(found["answered"][name] for name in (ALONE, BATCHES)) if load == AT_ONCE else capacity
                rows.append({**found, "threads": threads, "difference": difference, "busy": busy})
                print(f"{threads} threads, {load}: answered {found['answered']}, p50 {found['p50']}, p95 {found['p95']}", flush=True)
        finally:
            for server in servers.values():
                server.close()
    if not args.no_save:
        print(f"written to {save('serving', rows, KEYS).name}; {environment()['cpu']}")


if __name__ == "__main__":
    main()
