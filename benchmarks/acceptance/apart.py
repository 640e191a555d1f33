"""Backends that are asked apart from the others: `flex` and flash-attention 4, which compile kernels for each kind of call, and a library
of flash-attention 3 that is only carried here, which may crash."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..measure import Absent, ours
from . import environment, kernels, nosync, numerics, padding, repeats, smoke, timing
from .cases import Case, given
from .findings import Findings, Setting, Stage, Tally, half

__all__ = ["flex_parts", "flex_times", "parts_of"]

_MIXED = (130, 0, 64, 1, 33)
Part = Callable[[Setting, Findings], object]

# Each line is one kind of kernel, and so one part: what flex is there for first, then what it is chosen for.
KINDS: tuple[tuple[str, ...], ...] = (
    ("score bias, a function",),
    ("score bias, a table",),
    ("lengths", "lengths, causal", "S % 128 == 64, causal", "window, cross", "cross, top-left", "holes", "all empty"),
    ("softcap",),
    ("ALiBi",),
    ("sinks",),
    ("grouped heads",),
    ("one token", "value dim 32"),
)
FLOAT32 = ("lengths", "lengths, causal", "window", "cross", "padding left")
WIDE = Case("head dim 256, many rows", _MIXED, 130, dims=(256, 256), options=given(causal=True))
TABLE = Case("score bias, a table, head dim 192", _MIXED, 130, dims=(192, 192), options=numerics._table)


def flex_parts(setting: Setting) -> tuple[Stage, ...]:
    """R-12 for every kind of kernel, then which kernels ran, padding, and waiting; each of them compiles for many seconds."""
    by_name = {case.name: case for case in (*numerics.CASES, WIDE, TABLE)}

    def of_kind(names: tuple[str, ...], dtype: torch.dtype | None = None) -> Stage:
        cases = tuple(by_name[name] for name in names)
        wide = ", float32" if dtype == torch.float32 else ""
        return Stage(f"{names[0]}{wide}", "", partial(_right, "flex", cases, dtype), 45)

    return (
        Stage("flex", "", partial(smoke.of_backend, "flex"), 45),
        of_kind((WIDE.name,), torch.float32),  # the longest to compile
        *map(of_kind, KINDS),
        of_kind(FLOAT32, torch.float32),
        of_kind((TABLE.name,)),
        Stage("kernels", "", kernels.by_name, 45),
        Stage("padding", "", padding.run, 60),
        Stage("nosync", "", nosync.run, 45),
    )


def _right(backend: str, cases: tuple[Case, ...], dtype: torch.dtype | None, setting: Setting, findings: Findings) -> None:
    tallies = {name: Tally(name) for name in (backend, "auto")}
    for case in cases:
        numerics.every_backend(case, dtype or half(setting.device), setting.device, tallies)
    for tally in tallies.values():
        tally.write(findings, may_refuse=tally.name != "auto")


def flex_times(setting: Setting, findings: Findings) -> None:
    timing.timing(setting, findings, shapes=timing.SHAPES[1:2])


def parts_of(backend: str, setting: Setting) -> tuple[Stage, ...]:
    """The stages about what one backend computes, with only this one, in the process that holds its library."""
    stages: tuple[tuple[str, Part, float], ...] = (
        (backend, partial(smoke.of_backend, backend), 30),
        ("numerics", numerics.run, 25),
        ("kernels", kernels.by_name, 10),
        ("nosync", nosync.run, 10),
        ("padding", padding.run, 15),
        ("determinism", repeats.determinism, 10),
        ("timing", partial(timing.timing, shapes=timing.SHAPES[:3]), 30),
    )
    return tuple(Stage(name, "", partial(_with_library, backend, run), seconds) for name, run, seconds in stages)


def _with_library(backend: str, run: Part, setting: Setting, findings: Findings) -> None:
    if backend == "flash3":
        if setting.fa3_library is None:
            raise Absent("asked with --fa3-library; an installed package is asked with the other backends")
        if not hasattr(torch.ops.flash_attn_3, "fwd"):
            environment.load_library(setting.fa3_library, setting.cudart)
    if (reason := ours(setting.device).get(backend)) is not None:
        raise Absent(reason)
    run(setting, findings)
