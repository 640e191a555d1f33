"""The mini test: what do a mask, causal attention and dropout cost? 100 steps of training of one attention layer, batch 32, 500 tokens,
width 128, in 4 heads of 32 (BERT and its like keep heads of 32 to 64 at small widths).

Attention layers of several libraries are quick as long as nothing is asked of them, and lose the fused kernel, and a factor with it, as
soon as there is a mask, and some of them with dropout. So each layer is trained with every combination, all in turns, and beside its time
stands the kernel that ran, as `torch.profiler` names it (for ops of ours also the kernel that they say they call).

A step is forward, backward and AdamW. A layer is compared with float64 first, output and all gradients, in every column without dropout.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varlen_attn import BackendRefused, SeqLayout, VarlenMultiheadAttention, record, varlen_mha
from varlen_attn.cli.bench import named_kernel
from varlen_attn.testing import assert_within_budget

from .measure import DTYPES, Absent, Timing, add_machine, interleave, ours, ratio, save, use_machine

BATCH, WIDTH, LENGTH, HEADS, STEPS, TURNS = 32, 128, 500, 4, 100, 5
DROPOUT = 0.1
WEIGHTS, PLAIN, BY_HAND, FLASH, OURS = (
    "nn.MultiheadAttention", "nn.MultiheadAttention, need_weights=False", "by hand over SDPA", "flash-attn's MHA", "ours",
)  # fmt: skip
LEFT_OUT = {
    "reference": "the specification, which is not meant to be fast",
    "sdpa_padded": "the padded call again, with packing around it; benchmarks/results/mha.json has it",
}
KEYS = ("threads", "dtype", "row", "column")


class Column(NamedTuple):
    """What is asked of a layer."""

    mask: bool = False
    causal: bool = False
    dropout: float = 0.0

    def __str__(self) -> str:
        asked = [name for name in ("mask", "causal", "dropout") if getattr(self, name)]
        return " + ".join(asked) or "no option"


COLUMNS = (
    Column(), Column(dropout=DROPOUT), Column(mask=True), Column(causal=True), Column(mask=True, dropout=DROPOUT),
    Column(mask=True, causal=True, dropout=DROPOUT),
)  # fmt: skip


class Inputs(NamedTuple):
    """x, a leaf, the gradient of the output, 0 at padding, and the mask, True at padding."""

    x: Tensor
    grad: Tensor
    mask: Tensor

    @classmethod
    def of(cls, dtype: torch.dtype, device: str, length: int = LENGTH, batch: int = BATCH) -> Inputs:
        """Lengths from 30 % of the columns on; the first row is full."""
        generator = torch.Generator().manual_seed(0)
        lengths = (length * (0.3 + 0.7 * torch.rand(batch, generator=generator))).long()
        lengths[0] = length
        mask = torch.arange(length) >= lengths[:, None]
        x, grad = (torch.randn(batch, length, WIDTH, generator=generator) for _ in range(2))
        return cls(x.to(device, dtype).requires_grad_(), grad.masked_fill(mask[..., None], 0).to(device, dtype), mask.to(device))


# -------------------------------------------------------------------- the layers


class OverSDPA(nn.MultiheadAttention):
    """The layer as people write it: linear, `F.scaled_dot_product_attention`, linear."""

    def attend(self, x: Tensor, keep: Tensor | None, causal: bool, dropout: float) -> Tensor:
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, keep, dropout, is_causal=causal and keep is None)
        result: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return result


def _layer(kind: type[nn.MultiheadAttention], x: Tensor, column: Column, **options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return kind(WIDTH, HEADS, dropout=column.dropout, batch_first=True, **options).to(x.device, x.dtype)


def _causal(length: int, device: torch.device) -> Tensor:
    """True is hidden."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


Layer = tuple[nn.Module, Callable[[], Tensor]]  # whose parameters are trained, and the forward


def of_torch(inputs: Inputs, column: Column, need_weights: bool) -> Layer:
    layer = _layer(nn.MultiheadAttention, inputs.x, column)
    options: dict[str, Any] = dict(key_padding_mask=inputs.mask if column.mask else None, need_weights=need_weights)
    if column.causal:
        options |= dict(attn_mask=_causal(inputs.x.shape[1], inputs.x.device), is_causal=True)
    return layer, lambda: _first(layer(inputs.x, inputs.x, inputs.x, **options))


def by_hand(inputs: Inputs, column: Column) -> Layer:
    layer = _layer(OverSDPA, inputs.x, column)
    assert isinstance(layer, OverSDPA)
    keep = ~inputs.mask[:, None, None] if column.mask else None
    if keep is not None and column.causal:
        keep = keep & ~_causal(inputs.x.shape[1], inputs.x.device)
    return layer, lambda: layer.attend(inputs.x, keep, column.causal, column.dropout)


def of_flash(inputs: Inputs, column: Column) -> Layer:
    """flash-attn's own layer. Its flash kernels take no padding mask: with one, it computes scores."""
    if inputs.x.device.type != "cuda":
        raise Absent("flash-attn runs on GPUs only")
    if inputs.x.dtype == torch.float32:
        raise Absent("flash-attn has no float32")
    try:
        from flash_attn.modules.mha import MHA
    except ImportError as error:
        raise Absent(f"flash-attn is not installed or broken ({error})") from None
    layer = MHA(WIDTH, HEADS, dropout=column.dropout, causal=column.causal, use_flash_attn=not column.mask).to(inputs.x)
    ours = _layer(nn.MultiheadAttention, inputs.x, column)
    layer.load_state_dict({
        "Wqkv.weight": ours.in_proj_weight, "Wqkv.bias": ours.in_proj_bias,
        "out_proj.weight": ours.out_proj.weight, "out_proj.bias": ours.out_proj.bias,
    })  # fmt: skip
    return layer, lambda: _first(layer(inputs.x, key_padding_mask=~inputs.mask if column.mask else None))


def of_ours(inputs: Inputs, column: Column, backend: str) -> Layer:
    if backend != "auto" and backend == _auto(inputs, column):
        raise Absent('the same as "ours", which chose it')
    layer = _layer(VarlenMultiheadAttention, inputs.x, column, backend=backend)
    mask = inputs.mask if column.mask else None
    return layer, lambda: _first(layer(inputs.x, key_padding_mask=mask, is_causal=column.causal))


def _first(found: Any) -> Tensor:
    result: Tensor = found[0] if isinstance(found, tuple) else found
    return result


def _auto(inputs: Inputs, column: Column) -> str:
    """The backend that runs where none is ordered."""
    with record() as log:
        of_ours(inputs, column, "auto")[1]()
    return log.calls[-1].backend


def makers(device: str) -> tuple[dict[str, Callable[[Inputs, Column], Layer]], dict[str, str]]:
    """All rows, and the reasons of our backends that are not here."""
    backends = {name: reason or LEFT_OUT.get(name) for name, reason in ours(device).items()}
    return {
        WEIGHTS: partial(of_torch, need_weights=True),
        PLAIN: partial(of_torch, need_weights=False),
        BY_HAND: by_hand,
        FLASH: of_flash,
        OURS: partial(of_ours, backend="auto"),
        **{f"{OURS}, {name}": partial(of_ours, backend=name) for name, reason in backends.items() if reason is None},
    }, {f"{OURS}, {name}": reason for name, reason in backends.items() if reason is not None}


# -------------------------------------------------------------------- verified


def results(layer: nn.Module, forward: Callable[[], Tensor], inputs: Inputs, column: Column) -> dict[str, Tensor]:
    """Output and gradients, at real tokens; of a layer without a mask, all are real."""
    layer.zero_grad()
    out = forward()
    (of_x,) = torch.autograd.grad(out, [inputs.x], inputs.grad, retain_graph=True)
    out.backward(inputs.grad)
    real = ~inputs.mask if column.mask else torch.ones_like(inputs.mask)
    weights = [weight.grad for _, weight in sorted(layer.named_parameters(), key=lambda pair: pair[0].lower().replace("wqkv", "in_proj"))]
    return {"output": out.detach()[real], "input": of_x[real], **{str(i): w for i, w in enumerate(weights) if w is not None}}


def specification(inputs: Inputs, column: Column, dtype: torch.dtype) -> dict[str, Tensor]:
    """`results` by the reference backend, one sequence at a time."""
    layer = _layer(nn.MultiheadAttention, inputs.x, column).to(dtype)
    same = Inputs(inputs.x.detach().to(dtype).requires_grad_(), inputs.grad.to(dtype), inputs.mask)
    shape = inputs.mask.shape
    layout = SeqLayout.from_key_padding_mask(inputs.mask) if column.mask else SeqLayout.from_lengths([shape[1]] * shape[0], shape[1])
    options: dict[str, Any] = dict(
        layout=layout.to(inputs.x.device), num_heads=HEADS, causal=column.causal, backend="reference",
        in_proj_weight=layer.in_proj_weight, in_proj_bias=layer.in_proj_bias,
        out_proj_weight=layer.out_proj.weight, out_proj_bias=layer.out_proj.bias,
    )  # fmt: skip
    return results(layer, lambda: varlen_mha(same.x, **options), same, column)


def verify(layers: dict[str, Layer], inputs: Inputs, column: Column) -> None:
    """Raise AssertionError unless all results are as near to float64 as plain attention is."""
    exact, plain = (specification(inputs, column, dtype) for dtype in (torch.float64, inputs.x.dtype))
    for name, layer in layers.items():
        for what, got in results(*layer, inputs, column).items():
            assert_within_budget(got, exact[what], plain[what], gradient=True, what=f"{name}, {column}, {what}")


# -------------------------------------------------------------------- timed


def trained(layer: nn.Module, forward: Callable[[], Tensor], inputs: Inputs) -> Callable[[], None]:
    """One step: forward, backward, optimizer."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        inputs.x.grad = None
        forward().backward(inputs.grad)
        optimizer.step()

    return step


def build(inputs: Inputs, device: str) -> tuple[dict[tuple[str, Column], Layer], dict[tuple[str, Column], str]]:
    """The layers that can be trained, verified; and the reasons of the others."""
    rows, absent = makers(device)
    found: dict[tuple[str, Column], Layer] = {}
    missing = {(row, column): reason for row, reason in absent.items() for column in COLUMNS}
    for column in COLUMNS:
        for row, make in rows.items():
            try:
                found[row, column] = make(inputs, column)
                found[row, column][1]()
            except (Absent, RuntimeError) as error:
                if row == OURS:
                    raise
                found.pop((row, column), None)
                kind = "" if isinstance(error, Absent | BackendRefused) else f"{type(error).__name__}: "
                missing[row, column] = kind + " ".join(str(error).split())
        if not column.dropout:
            verify({row: layer for (row, of), layer in found.items() if of == column}, inputs, column)
    return found, missing


def bench(inputs: Inputs, dtype: str, device: str, steps: int) -> Iterator[dict[str, Any]]:
    found, missing = build(inputs, device)
    step = {cell: trained(*layer, inputs) for cell, layer in found.items()}
    kernels = {cell: named_kernel(call) for cell, call in step.items()}
    turn = max(1, steps // TURNS)
    names = {f"{row} / {column}": (row, column) for row, column in step}
    calls: dict[str, Callable[[], object]] = {name: partial(_times, turn, step[cell]) for name, cell in names.items()}
    again = f"{PLAIN} / {COLUMNS[0]}"
    timings = interleave({**calls, "again": calls[again]}, rounds=TURNS, least=0, warm_up=0, budget=0, device=device)
    by_cell = {cell: timings[name] for name, cell in names.items()}
    noise = round(ratio(timings[again], timings["again"]), 3)
    for cell, timing in by_cell.items():
        yield {**_cell(dtype, steps, *cell, timing, by_cell), "kernel": kernels[cell], "again": noise}
    for (row, column), reason in missing.items():
        yield {"threads": torch.get_num_threads(), "dtype": dtype, "row": row, "column": str(column), "absent": reason}


def _times(number: int, call: Callable[[], None]) -> None:
    for _ in range(number):
        call()


def _cell(dtype: str, steps: int, row: str, column: Column, timing: Timing, others: dict[tuple[str, Column], Timing]) -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "row": row,
        "column": str(column),
        "steps": steps,
        "seconds": round(sum(timing.rounds), 3),
        "spread": round(timing.spread, 3),
        "to_first_column": round(ratio(timing, others[row, COLUMNS[0]]), 3),
        "times_faster_than_torch": round(ratio(others[PLAIN, column], timing), 3),
        "verified": not column.dropout,
        "foreign": round(timing.foreign, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"in {TURNS} turns")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="float32, on a GPU bfloat16")
    add_machine(parser, budget=0.0)
    options = parser.parse_args()
    use_machine(options.device, options.threads)
    for dtype in options.dtype or (["bfloat16"] if options.device == "cuda" else ["float32"]):
        inputs = Inputs.of(DTYPES[dtype], options.device)
        rows = list(bench(inputs, dtype, options.device, options.steps))
        path = save("minitest", rows, KEYS, options.device)
        for row in rows:
            print(
                f"{row['row']:40} {row['column']:24} {row.get('seconds', row.get('absent'))}", row.get("to_first_column"), row.get("kernel")
            )
    print(f"written: {path}")


if __name__ == "__main__":
    main()
