"""Nobody waits: with lengths known on the host, or with a capacity, a call and its backward never make the host wait for the device.

On a GPU two witnesses: torch's own mode that raises where it would wait, and a trace in which nothing is copied to the host and no stream
waited for. Both are shown to see what they look for. On a CPU, where nothing waits, operations that read values are counted instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tests.nosync import count_reads
from varlen_attn import BackendRefused, SeqLayout

from .cases import Batch, Case, attend, here
from .findings import Findings, Setting, one_line
from .traced import trace

__all__ = ["run"]

Lengths = tuple[int, ...]


def run(setting: Setting, findings: Findings) -> None:
    case = Case("", (512, 300, 0, 7, 100), 512, heads=(8, 8))  # an empty row too: some kernels cannot have one
    case = case.shrunk() if setting.small else case
    batch = Batch.of(case, setting.dtype, setting.device)
    modes: dict[str, Lengths | None] = {"lengths on the host": case.lengths, "capacity": None}
    if setting.small:
        _on_cpu(batch, modes, findings)
        return
    _control(batch.masks[0], findings)
    for backend in here(setting.device):
        for mode, lengths in modes.items():
            with findings.trying(f"{backend}, {mode}"):
                _on_gpu(f"{backend}, {mode}", batch, backend, lengths, findings)


def layout_of(batch: Batch, lengths: Lengths | None) -> SeqLayout:
    """The layout, as somebody builds it who does not want to wait: from lengths on the host, or with a capacity."""
    mask = batch.masks[0]
    if lengths is None:
        return SeqLayout.from_key_padding_mask(mask, capacity=mask.numel())
    return SeqLayout.from_lengths(lengths, mask.shape[1], device=mask.device)


def step(batch: Batch, layout: SeqLayout, backend: str) -> Callable[[], object]:
    """Pack, attend, unpack, and the way back."""

    def call() -> object:
        rows = [layout.pack(x) for x in batch.qkv]
        out = layout.unpack(attend(rows, layout, backend, causal=True))
        return torch.autograd.grad(out, batch.qkv, batch.grad)

    return call


@contextmanager
def _raises_where_it_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _on_gpu(name: str, batch: Batch, backend: str, lengths: Lengths | None, findings: Findings) -> None:
    try:
        step(batch, layout_of(batch, lengths), backend)()  # what is compiled or set up at a first call may wait
    except BackendRefused as refusal:
        findings.facts[name] = one_line(refusal)
        return
    torch.cuda.synchronize()
    with _raises_where_it_waits():
        layout = layout_of(batch, lengths)
        step(batch, layout, backend)()
    seen = trace(step(batch, layout, backend), "cuda")
    built = trace(lambda: layout_of(batch, lengths), "cuda")
    # Lengths must get to the device somehow, those of a batch without its empty rows too: from page-locked memory nobody waits for that.
    copies = [copy for copy in (*seen.copies, *built.copies) if "Pinned -> Device" not in copy]
    waiting = [*copies, *seen.waits, *built.waits]
    findings.check(name, not waiting, f"{len(seen.kernels)} kernels; waits: {sorted(set(waiting)) or 'none'}")


def _control(mask: Tensor, findings: Findings) -> None:
    """What everybody writes must be seen by both witnesses, or they are blind."""
    habits: dict[str, Callable[[], object]] = {
        "lengths.max().item()": lambda: mask.sum(1).max().item(),
        "nonzero": mask.nonzero,
        "x[mask]": lambda: mask[mask],
    }
    for name, habit in habits.items():
        seen = trace(habit, "cuda")
        try:
            with _raises_where_it_waits():
                habit()
            raised = False
        except RuntimeError:
            raised = True
        traced = bool(seen.copies or seen.waits)
        findings.check(f"control: {name}", raised and traced, f"raised: {raised}; in the trace: {traced}")


def _on_cpu(batch: Batch, modes: dict[str, Lengths | None], findings: Findings) -> None:
    """Layouts, packing, and the one backend that serves both modes without looking at values: `cpu` plans by them, as a CPU may."""
    with count_reads() as reads:
        int(batch.masks[0].sum(1).max()), batch.masks[0].nonzero()
    findings.check("control", len(reads) == 2, reads)
    for mode, lengths in modes.items():
        with count_reads() as reads:
            step(batch, layout_of(batch, lengths), "sdpa_padded")()
        findings.check(f"sdpa_padded, {mode}", not reads, reads or "nothing is read")
