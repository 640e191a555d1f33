"""What repeats: bits under deterministic algorithms, and memory with the number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from varlen_attn import SeqLayout

from ..measure import peak_extra
from .cases import Batch, Case, attend, given, here
from .findings import Findings, Setting, Tally, half

__all__ = ["determinism", "line_through", "memory"]

RUNS = 20


def determinism(setting: Setting, findings: Findings) -> None:
    """R-42: asked by the argument, and by torch's own switch; whoever cannot says so."""
    case = Case("", (1024, 300, 0, 700), 1024, heads=(8, 4), options=given(causal=True))
    batch = Batch.of(case.shrunk() if setting.small else case, setting.dtype, setting.device)
    for name in ("auto", *here(setting.device)):
        tally = Tally(name)
        tally.attempt("deterministic=True", partial(same_bits, batch, name))
        with _deterministic():
            tally.attempt("torch.use_deterministic_algorithms", partial(same_bits, batch, name))
        if tally.ran or tally.failures:
            tally.write(findings)
        else:
            findings.facts[name] = {"refused": tally.refused}


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def same_bits(batch: Batch, backend: str) -> None:
    """Raise AssertionError unless outputs and gradients of all runs are bitwise the same, pack and unpack included."""
    layouts = batch.layouts()
    asked = Batch(batch.qkv, batch.grad, batch.masks, {**batch.options, "deterministic": True})
    first = asked.results(backend, layouts)
    for number in range(1, RUNS):
        for what, x in asked.results(backend, layouts).items():
            assert torch.equal(x, first[what]), f"{what} of run {number + 1} has other bits"


# -------------------------------------------------------------------- memory

FILLS, HEADS, DIM = (0.25, 0.5, 0.75, 1.0), 16, 64


def memory(setting: Setting, findings: Findings, batch: int = 8, columns: int = 4096) -> None:
    """R-53: of forward and backward on packed rows. Scores would grow with the square of the lengths, and padding with S."""
    for name in here(setting.device, omit=("reference", "sdpa_padded")):
        with findings.trying(name):
            peaks = {round(columns * fill) * batch: _peak(name, batch, round(columns * fill), columns, setting.device) for fill in FILLS}
            slope, intercept = line_through(list(peaks), list(peaks.values()))
            row = HEADS * DIM * 2
            off = max(abs(peak - slope * rows - intercept) for rows, peak in peaks.items()) / max(peaks.values())
            linear = f"{slope / row:.1f} times the bytes of q per token, {off:.1%} off a line"
            findings.check(f"{name}, linear in tokens", off < 0.03 and slope < 40 * row, linear)
            half = columns // 2
            wider = _peak(name, batch, half, 2 * columns, setting.device) / peaks[half * batch]
            findings.check(f"{name}, padding costs nothing", wider < 1.05, f"{wider:.2f} times the peak for twice the padded length")
            findings.facts[name] = {str(rows): peak for rows, peak in peaks.items()}


def _peak(backend: str, batch: int, length: int, columns: int, device: str) -> int:
    layout = SeqLayout.from_lengths([length] * batch, columns, device=device)
    qkv = tuple(torch.randn(layout.num_rows, HEADS, DIM, device=device, dtype=half(device)).requires_grad_() for _ in range(3))

    def step() -> tuple[Tensor, ...]:
        out = attend(qkv, layout, backend)
        return torch.autograd.grad(out, qkv, torch.ones_like(out))

    step()  # whatever is compiled or kept from a first call
    return peak_extra(step, device)


def line_through(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of least squares."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    return slope, mean_y - slope * mean_x
