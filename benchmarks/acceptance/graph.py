"""One CUDA graph for all lengths: captured once in capacity mode, replayed after `SeqLayout.update_` has written other lengths in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from varlen_attn import BackendRefused, SeqLayout

from .cases import Batch, Case, Results, attend, compare, given, here, mask_of
from .findings import Findings, Setting, half, one_line

__all__ = ["captured", "layouts", "length_sets", "replays", "run"]

COLUMNS = 256
_LAYOUTS = "layouts, made and updated inside of the graph"
Capture = Callable[[Callable[[], Results]], tuple[Callable[[], None], Results]]


def length_sets(columns: int, count: int = 20) -> list[tuple[int, ...]]:
    """Four lengths each: nothing, everything, edges, and random ones."""
    generator = torch.Generator().manual_seed(0)
    edges = [(0, 0, 0, 0), (columns,) * 4, (1, 0, 1, 0), (0, columns, 0, 64 % columns), (columns, 1, 1, 1)]
    drawn = torch.randint(0, columns + 1, (count - len(edges), 4), generator=generator).tolist()
    return [*edges, *map(tuple, drawn)]


def captured(call: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
    """A CUDA graph of ``call``: what replays it, and the tensors that it writes to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = call()
    return graph.replay, written


def run(setting: Setting, findings: Findings) -> None:
    for backend in ("auto", *here(setting.device)):
        with findings.trying(backend):
            try:
                told = replays(backend, setting.device, half(setting.device), COLUMNS, captured)
            except BackendRefused as refusal:
                findings.facts[backend] = one_line(refusal)
                continue
            findings.check(backend, True, told)
    with findings.trying(_LAYOUTS):
        findings.check(_LAYOUTS, True, layouts(setting.device, COLUMNS, captured))


def layouts(device: str, columns: int, capture: Capture) -> str:
    """R-40: raise AssertionError unless a graph that itself updates a layout, and builds one, follows the mask that both are made of."""
    mask = mask_of((columns, 7, columns // 2, 0), columns).to(device)
    updated = SeqLayout.from_key_padding_mask(mask, capacity=mask.numel())

    def make() -> Results:
        updated.update_(mask)
        return _tensors("updated", updated) | _tensors("built", SeqLayout.from_key_padding_mask(mask, capacity=mask.numel()))

    replay, written = capture(make)
    for lengths in length_sets(columns):
        mask.copy_(mask_of(lengths, columns))
        replay()
        want = SeqLayout.from_key_padding_mask(mask, capacity=mask.numel())
        for what, x in (_tensors("updated", want) | _tensors("built", want)).items():
            assert torch.equal(written[what], x), f"{what} is not that of the lengths {lengths}"
    return f"captured once, replayed with {len(length_sets(columns))} other masks"


def _tensors(what: str, layout: SeqLayout) -> Results:
    fields = {"cu_seqlens": layout.cu_seqlens, "token_indices": layout.token_indices, "gather_indices": layout.gather_indices}
    return {f"{what} {name}": x for name, x in fields.items()}


def replays(backend: str, device: str, dtype: torch.dtype, columns: int, capture: Capture) -> str:
    """R-40: raise AssertionError unless each replay is right, output, gradients and zeros at padding."""
    batches = [Batch.of(_case(lengths, columns), dtype, device, seed) for seed, lengths in enumerate(length_sets(columns))]
    first = Batch.of(_case((columns, 7, columns // 2, 0), columns), dtype, device)
    static = tuple(x.detach().clone().requires_grad_() for x in first.qkv)
    grad = first.grad.clone()
    layout = SeqLayout.from_key_padding_mask(first.masks[0], capacity=first.masks[0].numel())
    replay, written = capture(lambda: _step(static, grad, layout, backend))
    for batch in batches:
        with torch.no_grad():
            for place, x in zip((*static, grad), (*batch.qkv, batch.grad), strict=True):
                place.copy_(x)
        layout.update_(batch.masks[0])
        replay()
        exact, plain = (batch.specification(wanted) for wanted in (torch.float64, dtype))
        compare(batch.pack({what: x.clone() for what, x in written.items()}), exact, plain)
    return f"captured once, replayed with {len(batches)} other sets of lengths"


def _case(lengths: tuple[int, ...], columns: int) -> Case:
    return Case("", lengths, columns, options=given(causal=True))


def _step(qkv: tuple[Tensor, ...], grad: Tensor, layout: SeqLayout, backend: str) -> Results:
    rows = [layout.pack(x) for x in qkv]
    out = layout.unpack(attend(rows, layout, backend, causal=True))
    return {"output": out.detach(), **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, qkv, grad), strict=True))}
