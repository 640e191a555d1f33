"""How fast: ours against torch's padded calls, against the bare kernel, and against what an H100 could do at best."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from varlen_attn import explain

from .. import bench_minitest as mini
from ..contestants import Case
from ..measure import Timing, interleave, ratio
from ..workloads import Workload
from . import contests
from .contests import AGAIN, BARE, BASE, KERNEL, WHOLE
from .findings import Findings, Setting
from .gpu_time import device_times
from .limits import BACKWARD, limit_seconds

__all__ = ["SHAPES", "TINY", "Shape", "minitest", "timing"]

NEAR_BARE = 1.02  # what is ours around a kernel may take, in device time, plus the noise
OF_LIMIT = 0.8  # share of the limit that the whole path reaches
STEPS = 10
HEADS = 16
DIRECTIONS = ("forward", "forward+backward")


@dataclass(frozen=True)
class Shape:
    """A batch of random lengths, spread evenly around ``fill * columns``."""

    batch: int
    columns: int
    fill: float = 0.5
    head_dim: int = 64
    heads: int = HEADS

    @property
    def workload(self) -> Workload:
        least = max(2 * self.fill - 1, 0.0)
        shares = torch.rand(self.batch, generator=torch.Generator().manual_seed(1)) * (min(2 * self.fill, 1.0) - least) + least
        lengths = (shares * self.columns).long().clamp(1, self.columns)
        lengths[0] = self.columns
        return Workload(str(self), "random lengths", self.columns, tuple(lengths.tolist()))

    def __str__(self) -> str:
        return f"B {self.batch}, S {self.columns}, fill {self.fill:g}, {self.heads} heads of {self.head_dim}"


TINY = Shape(3, 40, heads=2, head_dim=16)
SHAPES = (Shape(32, 512), Shape(32, 2048), Shape(32, 2048, 0.85), Shape(8, 8192), Shape(32, 2048, head_dim=128))
ROW_SECONDS = 20.0  # of one shape
SHARE = 90.0  # seconds, beyond which no shape is begun: stages wait


def timing(setting: Setting, findings: Findings, shapes: tuple[Shape, ...] = ()) -> None:
    """A row of facts for each shape, written as it is measured. Speed is a goal, and no requirement; a shape left out is not judged."""
    began = time.monotonic()
    shapes = shapes or ((TINY,) if setting.small else SHAPES)
    findings.facts["rows"] = rows = list[dict[str, Any]]()
    for shape in shapes:
        if setting.left() < (1 if setting.small else ROW_SECONDS) or time.monotonic() - began > SHARE:
            findings.check(str(shape), False, "left out for time", required=False)
            continue
        with findings.trying(f"{shape}: every part of the row"):
            case = Case.of(shape.workload, setting.dtype, shape.heads, shape.head_dim, setting.device)
            _row(shape, case, findings, rows)
        if setting.device == "cuda":
            torch.cuda.empty_cache()
    timed = sum("forward" in row for row in rows)
    findings.check("a shape was timed", timed > 0, f"{timed} of {len(shapes)}")


def _has_published_limits(device: str) -> bool:
    """An H100 with the memory and power that the published rates are of; an H200 has more."""
    if device != "cuda":
        return False
    name = torch.cuda.get_device_name()
    return torch.cuda.get_device_capability() == (9, 0) and "H100" in name and not any(board in name for board in ("PCIe", "NVL"))


def _row(shape: Shape, case: Case, findings: Findings, rows: list[dict[str, Any]]) -> None:
    found, absent = contests.contestants(case)
    wrong = contests.verified(found, case)
    for name, why in wrong.items():
        if name.startswith((KERNEL, WHOLE)):
            findings.check(f"{shape}: {name} is right", False, why)
    found = {name: contestant for name, contestant in found.items() if name not in wrong}
    backend = explain(*case.tensors[:3], case.layout).backend
    row: dict[str, Any] = {
        "shape": str(shape), "fill": round(case.workload.fill, 3), "pair_fill": round(case.workload.pair_fill, 3),
        "dtype": str(case.tensors[0].dtype).removeprefix("torch."),
        "auto": backend, "absent": absent | wrong,
    }  # fmt: skip
    rows.append(row)
    budget = 0.2 if case.device == "cpu" else 3.0
    for direction in DIRECTIONS:
        calls: dict[str, Callable[[], object]] = {
            name: c.forward if direction == DIRECTIONS[0] else c.both
            for name, c in found.items()
            if direction == DIRECTIONS[0] or c.grad is not None
        }
        times = device_times(calls, case.device, budget=budget)
        row[direction] = _facts(times, case, direction)
        findings.publish()
        _judge(f"{shape}, {direction}", times, shape, case, direction, backend, findings)
    walls = {name: found[name].forward for name in (BASE, f"{WHOLE}, auto") if name in found}
    parts: dict[str, Callable[[], Mapping[str, Timing]]] = {
        "moving": lambda: device_times(_agreeing(contests.movers(case)), case.device, budget=budget / 3),
        "packing q, k, v": lambda: device_times(_agreeing(contests.packers(case, absent)), case.device, budget=budget / 3),
        "layout": lambda: interleave(contests.layouts(case), budget=budget / 6, least=0.005, device=case.device),
        "by the clock of the host": lambda: interleave(walls, budget=budget / 3, device=case.device),
    }
    for part, measure in parts.items():
        with findings.trying(f"{shape}: {part}", required=False):
            row[part] = _microseconds(measure())
    findings.publish()


def _agreeing(movers: dict[str, Callable[[], contests.Moved]]) -> dict[str, Callable[[], contests.Moved]]:
    """Those that can run, if all that they move is bitwise the same.

    Raises:
        AssertionError: they differ.
    """
    kept, first = {}, None
    for name, move in movers.items():
        try:
            moved = move()
        except (RuntimeError, NotImplementedError):  # no kernel for this device or dtype
            continue
        first = first or moved
        assert all(torch.equal(a.view_as(b), b) for a, b in zip(moved, first, strict=True)), f"{name} moves other rows"
        kept[name] = move
    return kept


def _microseconds(times: Mapping[str, Timing]) -> dict[str, float]:
    return {name: round(t.seconds * 1e6, 1) for name, t in times.items()}


def _facts(times: dict[str, Timing], case: Case, direction: str) -> dict[str, Any]:
    products = 4 * case.tensors[0].shape[1] * case.tensors[0].shape[2] * sum(n * n for n in case.workload.lengths)
    work = products * (1.0 if direction == DIRECTIONS[0] else 1 + BACKWARD)
    return {
        "microseconds": _microseconds(times),
        "spread": {name: round(t.spread, 3) for name, t in times.items()},
        "times faster than torch, mask": {name: round(ratio(times[BASE], t), 3) for name, t in times.items()} if BASE in times else {},
        "TFLOP/s": {name: round(work / t.seconds / 1e12, 1) for name, t in times.items() if name.startswith((KERNEL, BARE))},
    }


def _judge(
    what: str, times: dict[str, Timing], shape: Shape, case: Case, direction: str, backend: str, findings: Findings
) -> None:  # fmt: skip
    """Goals."""
    for name, bare in times.items():
        kernel = name.removeprefix(f"{BARE}, ")
        if name.startswith(f"{BARE}, ") and f"{KERNEL}, {kernel}" in times:
            own = times[f"{KERNEL}, {kernel}"]
            ours = 1 / ratio(bare, own)
            noise = max(abs(1 - ratio(bare, times[f"{AGAIN}, {kernel}"])), bare.spread, own.spread)
            told = f"{ours:.3f} times the bare kernel's time; noise {noise:.3f}"
            findings.check(f"{what}: {kernel} adds nothing", ours <= NEAR_BARE + noise, told, required=False)
    family = "FA3" if backend in ("flash3", "flash4") else "FA2"
    if shape.head_dim in (64, 128) and f"{WHOLE}, auto" in times and _has_published_limits(case.device):
        limit = limit_seconds(case.workload.lengths, shape.columns, shape.heads, shape.head_dim, family, direction)
        share = limit / times[f"{WHOLE}, auto"].seconds
        told = f"{share:.2f} of an H100's limit with {family}, {limit * 1e6:.0f} us"
        findings.check(f"{what}: whole path", share >= OF_LIMIT, told, required=False)


# -------------------------------------------------------------------- the mini test


def minitest(setting: Setting, findings: Findings) -> None:
    """The columns of `benchmarks.bench_minitest`, with fewer steps; it compares with float64 before it times."""
    dtype = setting.dtype
    size = (mini.LENGTH, mini.BATCH) if setting.device == "cuda" else (16, 3)
    inputs = mini.Inputs.of(dtype, setting.device, *size)
    rows = list(mini.bench(inputs, str(dtype).removeprefix("torch."), setting.device, 2 if setting.small else STEPS))
    findings.facts["rows"] = rows
    ours = [row for row in rows if row["row"] == mini.OURS and "absent" not in row]
    findings.check("ours has every column", len(ours) == len(mini.COLUMNS), f"{len(ours)} of {len(mini.COLUMNS)}")
