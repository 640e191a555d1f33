"""What both scripts share: the same training twice, step by step in turns, and a table of losses, times and memory.

Nothing here is needed to train a model with varlen_attn: that is all in the scripts.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from varlen_attn.testing import assert_within_budget

Batch = tuple[Tensor, ...]
Loss = Callable[[Any, Batch], Tensor]  # of a model and a batch

WARM_UP = 2  # steps that are not timed
MEMORY_STEPS = 4
BUSY = 0.75  # load of the last minute by others, for each thread, above which times are not to be trusted


@dataclass(frozen=True)
class Training:
    """A model and how its loss is computed."""

    model: nn.Module
    loss: Loss


def arguments(doc: str | None, argv: Sequence[str] | None, *, steps: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc and doc.splitlines()[0])
    parser.add_argument("--steps", type=int, help=f"optimizer steps of each training (default {steps}, with --quick 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the batches and their order")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and no subprocesses: does it run?")
    parser.add_argument("--memory-of", choices=("padded", "packed"), help=argparse.SUPPRESS)  # for the subprocesses below
    args = parser.parse_args(argv)
    args.steps = args.steps or (3 if args.quick else steps)
    return args


def compare(script: str, args: argparse.Namespace, padded: Training, packed: Training, batches: Sequence[Batch], *, lr: float) -> None:
    """Train both from the same weights on the same batches, and say what happened.

    Raises:
        AssertionError: the losses of the packed training are further from float64 than rounding explains.
    """
    batches = [batches[i % len(batches)] for i in range(args.steps)]
    if args.memory_of:
        print(_peak_mib(padded if args.memory_of == "padded" else packed, batches[:MEMORY_STEPS], lr))
        return
    # The truth: the padded training in float64. How far the packed losses may be from it is what the padded ones allow.
    exact = _Trainer(Training(copy.deepcopy(padded.model).double(), padded.loss), lr)
    trainers = {"padded": _Trainer(padded, lr), "packed": _Trainer(packed, lr)}
    print("\nstep  loss padded  loss packed  difference  ms padded  ms packed")
    for step, batch in enumerate(batches):
        exact.step(tuple(t.double() if t.is_floating_point() else t for t in batch))
        for name in ("padded", "packed") if step % 2 else ("packed", "padded"):  # neither always comes second
            trainers[name].step(batch)
        a, b = (t.losses[-1] for t in trainers.values())
        ms_a, ms_b = (t.seconds[-1] * 1e3 for t in trainers.values())
        print(f"{step:4}  {a:11.6f}  {b:11.6f}  {abs(a - b):10.1e}  {ms_a:9.0f}  {ms_b:9.0f}")
    losses = {name: torch.tensor(t.losses) for name, t in trainers.items()}
    truth = torch.tensor(exact.losses, dtype=torch.float64)
    for name, values in losses.items():
        print(f"{name}: largest difference from float64 {float((values.double() - truth).abs().max()):.1e}")
    assert_within_budget(losses["packed"], truth, losses["padded"], what="losses")
    print("The same training: the packed losses are within the error budget that the padded ones set.")
    _print_costs(script, args, {name: t.seconds for name, t in trainers.items()})


def step_by_step(trainings: dict[str, Training], batches: Sequence[Batch], lr: float) -> dict[str, list[tuple[float, float]]]:
    """Train all of them in turns; of each the loss and the seconds of every step."""
    trainers = {name: _Trainer(training, lr) for name, training in trainings.items()}
    for step, batch in enumerate(batches):
        for name in reversed(trainers) if step % 2 else trainers:
            trainers[name].step(batch)
    return {name: list(zip(t.losses, t.seconds, strict=True)) for name, t in trainers.items()}


class _Trainer:
    def __init__(self, training: Training, lr: float) -> None:
        # One thread: its own time, which other processes hardly touch. More threads wait for each other: time of the clock.
        self.clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self.model, self.loss = training.model.train(), training.loss
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, batch: Batch) -> None:
        start = self.clock()
        self.optimizer.zero_grad()
        loss = self.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(self.clock() - start)


def _print_costs(script: str, args: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    from_step = WARM_UP if args.steps > WARM_UP else 0
    times = {name: median(s[from_step:]) * 1e3 for name, s in seconds.items()}
    ratio = median(a / b for a, b in zip(seconds["padded"][from_step:], seconds["packed"][from_step:], strict=True))
    memory = {name: None if args.quick else measure_memory(script, args, name) for name in seconds}
    mib = {name: "not measured" if m is None else f"{m:.0f}" for name, m in memory.items()}
    print(f"\n{f'{torch.get_num_threads()} threads':18}  {'padded':>12}  {'packed':>12}")
    print(f"{'ms a step, median':18}  {times['padded']:12.0f}  {times['packed']:12.0f}  {ratio:.1f} times as fast")
    print(f"{'peak memory, MiB':18}  {mib['padded']:>12}  {mib['packed']:>12}  over {MEMORY_STEPS} steps, above that before the first")
    if torch.get_num_threads() > 1 and hasattr(os, "getloadavg") and os.getloadavg()[0] > (1 + BUSY) * torch.get_num_threads():
        print("Other processes were busy, and they disturb threads that wait for each other: the times are unsure.")


def measure_memory(script: str, args: argparse.Namespace, name: str) -> float | None:
    """In a process of its own: the peak of a process cannot tell two trainings apart."""
    command = [sys.executable, script, "--memory-of", name, "--steps", str(args.steps), "--seed", str(args.seed)]
    command += ["--threads", str(args.threads)] if args.threads else []
    command += ["--quick"] if args.quick else []
    last = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    return None if last == "None" else float(last)


def _peak_mib(training: Training, batches: Sequence[Batch], lr: float) -> float | None:
    """The peak of the resident memory over a few steps, above where it stood before them. Linux only."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = _status_mib("VmRSS")
    except OSError:
        return None
    trainer = _Trainer(training, lr)
    for batch in batches:
        trainer.step(batch)
    return _status_mib("VmHWM") - before


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
