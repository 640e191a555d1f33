"""Every backend that is here against float64, forward and backward, with NaN at padding; exact layouts and those with a capacity."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .cases import Batch, Case, Results, compare, given, here
from .findings import Findings, Setting, Tally

__all__ = ["CASES", "every_backend", "run"]

SHARE = 15.0  # seconds for one backend: a slow one does not take the time of all others


def _alibi(heads: int, columns: int, device: str) -> dict[str, Any]:
    return {"alibi_slopes": torch.linspace(0.1, 0.5, heads, device=device)}


def _sinks(heads: int, columns: int, device: str) -> dict[str, Any]:
    return {"sinks": torch.linspace(-1, 1, heads, device=device)}


def _table(heads: int, columns: int, device: str) -> dict[str, Any]:
    return {"score_bias": torch.randn(heads, columns, columns, generator=torch.Generator().manual_seed(1)).to(device)}


def _distance(head: Tensor, q_position: Tensor, k_position: Tensor) -> Tensor:
    return (head + 1) * 0.1 * (q_position - k_position).abs()


_MIXED = (130, 0, 64, 1, 33)
_KEYS = ((64, 3, 7, 0, 129), 140)
_ODD = ((704, 703, 640, 1, 64), 704)  # 704 % 128 == 64, where a backward of cuDNN has returned NaN (pytorch#196678)

CASES: tuple[Case, ...] = (
    Case("lengths", _MIXED, 130),
    Case("lengths, causal", _MIXED, 130, options=given(causal=True)),
    Case("S % 128 == 64", *_ODD),
    Case("S % 128 == 64, causal", *_ODD, options=given(causal=True)),
    Case("one token", (1,), 1),
    Case("one token a row, grouped heads", (1, 0, 1), 1, heads=(4, 2)),  # a decoding shortcut of kernels that needs a token in every row
    Case("no padding", (128, 128), 128),
    Case("all empty", (0, 0), 8),
    Case("one row of many", (0, 0, 300, 0), 300, options=given(causal=True)),
    *(Case(f"head dim {dim}", (70, 0, 33), 70, dims=(dim, dim), options=given(causal=True)) for dim in (20, 32, 80, 96, 128, 192, 256)),
    Case("head dim 192, not causal", (70, 0, 33), 70, dims=(192, 192)),
    Case("value dim 32", (70, 0, 33), 70, dims=(64, 32)),
    Case("grouped heads", _MIXED, 130, heads=(4, 2), options=given(causal=True)),
    Case("one key head", _MIXED, 130, heads=(4, 1)),
    Case("cross", _MIXED, 130, keys=_KEYS),
    Case("cross, bottom-right", _MIXED, 130, keys=_KEYS, options=given(causal="bottom_right")),
    Case("cross, top-left", _MIXED, 130, keys=_KEYS, options=given(causal="top_left")),
    Case("cross, grouped heads", _MIXED, 130, heads=(4, 2), keys=_KEYS),
    Case("padding left", _MIXED, 150, side="left", options=given(causal=True)),
    Case("padding on both sides", _MIXED, 150, side="both"),
    Case("holes", _MIXED, 150, side="holes", options=given(causal=True)),
    Case("window, causal", _MIXED, 130, options=given(causal=True, window=(16, 0))),
    Case("window", _MIXED, 130, options=given(window=(7, 9))),
    Case("window, one side", _MIXED, 130, options=given(window=(None, 3))),
    Case("window, cross", _MIXED, 130, keys=_KEYS, options=given(window=(7, 9))),
    Case("scale", _MIXED, 130, options=given(scale=0.3)),
    Case("softcap", _MIXED, 130, options=given(softcap=5.0)),
    Case("ALiBi", _MIXED, 130, options=_alibi),
    Case("sinks", _MIXED, 130, options=_sinks),
    Case("score bias, a table", _MIXED, 130, options=_table),
    Case("score bias, a function", _MIXED, 130, options=given(score_bias=_distance)),
)
DTYPES = {"cuda": (torch.bfloat16, torch.float16, torch.float32), "cpu": (torch.float32,)}


def verify(batch: Batch, exact: Results, plain: Results, backend: str, capacity: bool) -> None:
    """R-01, R-09, R-12: raise AssertionError unless this backend is right, and 0 at padding."""
    compare(batch.pack(batch.results(backend, batch.layouts(capacity))), exact, plain)


def run(setting: Setting, findings: Findings, cases: tuple[Case, ...] = CASES) -> None:
    """A check for each backend, and one for the automatic choice, which may refuse nothing."""
    tallies = {name: Tally(name, SHARE) for name in ("auto", *here(setting.device))}
    try:
        for case in cases:
            for dtype in DTYPES[setting.device]:
                every_backend(case.shrunk() if setting.small else case, dtype, setting.device, tallies)
    finally:
        for name, tally in tallies.items():
            tally.write(findings, may_refuse=name != "auto", may_leave_out=name != "auto")


def every_backend(case: Case, dtype: torch.dtype, device: str, tallies: Mapping[str, Tally]) -> None:
    batch = Batch.of(case, dtype, device)
    exact, plain = (batch.specification(wanted) for wanted in (torch.float64, dtype))
    for name, tally in tallies.items():
        for capacity in (False, True):
            label = f"{case.name}, {str(dtype).removeprefix('torch.')}{', capacity' if capacity else ''}"
            tally.attempt(label, partial(verify, batch, exact, plain, name, capacity))
