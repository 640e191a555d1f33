"""`torch.compile`: one graph without breaks for all lengths, with the layout made inside (capacity) and outside (exact)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from varlen_attn import SeqLayout, padded_attention
from varlen_attn.kernels.problem import version_tuple

from .cases import Batch, Case, Results, compare, given
from .findings import Findings, Setting

__all__ = ["run"]

COLUMNS = 64
LENGTHS: tuple[tuple[int, ...], ...] = (
    (64, 30, 7, 50),
    (1, 2, 3, 4),
    (64, 64, 64, 64),
    (0, 1, 0, 0),
    (0, 0, 0, 0),
    (50, 60, 0, 10),
)  # totals of 1 and 0 among them
Attend = Callable[..., Tensor]


def capacity(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    layout = SeqLayout.from_key_padding_mask(mask, capacity=mask.numel())
    out: Tensor = padded_attention(q, k, v, layout=layout, causal=True)
    return out


def exact(q: Tensor, k: Tensor, v: Tensor, layout: SeqLayout) -> Tensor:
    out: Tensor = padded_attention(q, k, v, layout=layout, causal=True)
    return out


def run(setting: Setting, findings: Findings) -> None:
    compiler = "inductor" if setting.device == "cuda" else "aot_eager"
    for name, attend in (("capacity, layout inside", capacity), ("exact, layout outside", exact)):
        with findings.trying(name):
            sets = LENGTHS
            if attend is exact and setting.device == "cuda" and _divides_by_no_rows():
                sets = tuple(lengths for lengths in LENGTHS if any(lengths))
                findings.facts["a batch without tokens"] = f"torch {torch.__version__} divides by its rows (pytorch#178878)"
            frames = frames_of(attend, compiler, setting.dtype, setting.device, sets)
            findings.check(name, frames == 1, f"{frames} compilations for {len(sets)} sets of lengths, forward and backward, {compiler}")


def _divides_by_no_rows() -> bool:
    """Inductor of torch 2.11 launches a kernel over two dimensions with a division by the blocks of the second."""
    return version_tuple(torch.__version__) < (2, 13)


def frames_of(attend: Attend, compiler: str, dtype: torch.dtype, device: str, sets: tuple[tuple[int, ...], ...]) -> int:
    """R-18, R-19: how often it was compiled; raises unless every result is right."""
    import torch._dynamo
    import torch._dynamo.testing

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    try:
        for seed, lengths in enumerate(sets):
            batch = Batch.of(Case("", lengths, COLUMNS, options=given(causal=True)), dtype, device, seed)
            last = batch.masks[0] if attend is capacity else batch.layouts()[0]
            out = compiled(*batch.qkv, last)
            grads = torch.autograd.grad(out, batch.qkv, batch.grad)
            found: Results = {"output": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
            compare(batch.pack(found), batch.specification(torch.float64), batch.specification(dtype))
    finally:
        torch._dynamo.reset()
    return int(counter.frame_count)
