"""Padding in every form, by every way to state it: nothing reads it, and every constructor finds the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from varlen_attn import SeqLayout, apply_rotary

from .cases import Batch, Case, Results, Side, given, here, mask_of
from .findings import Findings, Setting, Tally

__all__ = ["run"]

FORMS: dict[str, tuple[tuple[int, ...], int]] = {
    "ragged": ((50, 7, 64, 1), 64),
    "an empty row": ((50, 0, 64, 0), 64),
    "no token at all": ((0, 0), 64),
    "no padding": ((64, 64), 64),
}
FILLS = (0.0, 1e4, float("nan"), float("inf"))


def run(setting: Setting, findings: Findings) -> None:
    dtype = setting.dtype
    for name in ("auto", *here(setting.device)):
        tally = Tally(name)
        for form, (lengths, columns) in FORMS.items():
            for side in get_args(Side):
                case = Case(form, lengths, columns, options=given(causal=True) if name != "nested" else given(), side=side)
                tally.attempt(f"{form}, {side}", partial(never_read, case, dtype, setting.device, name))
        tally.write(findings)
    _constructors(setting.device, findings)
    _rotary(setting.device, findings)


def never_read(case: Case, dtype: torch.dtype, device: str, backend: str) -> None:
    """R-09, R-28: raise AssertionError unless the output is bitwise the same whatever is at padding, and all is finite."""
    batch = Batch.of(case, dtype, device)
    layouts, results = batch.layouts(), list[Results]()
    for fill in FILLS:
        qkv = tuple(x.detach().masked_fill(batch.masks[0][..., None, None], fill).requires_grad_() for x in batch.qkv)
        filled = Batch(qkv, batch.grad, batch.masks, batch.options)
        results.append(batch.pack(filled.results(backend, layouts)))
        assert all(bool(x.isfinite().all()) for x in results[-1].values()), f"with {fill} at padding, a result is not finite"
        assert torch.equal(results[-1]["output"], results[0]["output"]), f"with {fill} at padding, the output is another"


def _constructors(device: str, findings: Findings) -> None:
    """All that states these lengths gives these layouts, made on this device."""
    lengths, columns = (5, 0, 9, 1), 12
    mask = mask_of(lengths, columns).to(device)
    offsets = torch.tensor([0, 5, 5, 14, 15], dtype=torch.int32, device=device)
    jagged = torch.nested.nested_tensor_from_jagged(torch.zeros(15, 1, device=device), offsets.long())
    additive = torch.zeros(mask.shape, device=device).masked_fill(mask, float("-inf"))
    by_mask = partial(SeqLayout.from_key_padding_mask, validate=False)
    ways: dict[str, Callable[[], SeqLayout]] = {
        "key padding mask": lambda: by_mask(mask),
        "additive mask": lambda: by_mask(additive),
        "mask of tokens": lambda: SeqLayout.from_attention_mask((~mask).long(), validate=False),
        "lengths": lambda: SeqLayout.from_lengths(lengths, columns, device=device),
        "lengths, a tensor": lambda: SeqLayout.from_lengths(torch.tensor(lengths, device=device), columns),
        "offsets": lambda: SeqLayout.from_cu_seqlens(offsets, columns),
        "nested tensor": lambda: SeqLayout.from_nested(jagged),
        "moved": lambda: by_mask(mask.cpu()).to(device),
        "capacity": lambda: by_mask(mask, capacity=20),
        "capacity, updated": lambda: by_mask(torch.ones_like(mask), capacity=20).update_(mask),
    }
    wrong = [name for name, make in ways.items() if not _states(make(), lengths, mask)]
    findings.check("constructors", not wrong, f"{len(ways)} ways; wrong: {', '.join(wrong) or 'none'}")


def _states(layout: SeqLayout, lengths: tuple[int, ...], mask: Tensor) -> bool:
    places = (~mask).flatten().nonzero().squeeze(1)
    same_rows = layout.padded_len == mask.shape[1]  # a nested tensor knows no columns beyond its longest sequence
    return (
        layout.device.type == mask.device.type
        and layout.cu_seqlens.diff().tolist() == list(lengths)
        and (not same_rows or torch.equal(layout.token_indices[: len(places)], places))
        and (not same_rows or torch.equal(layout.padding_mask(), mask))
    )


def _rotary(device: str, findings: Findings) -> None:
    """R-29, R-30: rotary positions of packed rows are those of each sequence alone."""
    lengths, columns = (5, 0, 9, 1), 12
    layout = SeqLayout.from_lengths(lengths, columns, device=device)
    x = torch.randn(len(lengths), columns, 2, 16, generator=torch.Generator().manual_seed(0)).to(device)
    padded = layout.pack(apply_rotary(x, torch.arange(columns, device=device)))
    same = torch.equal(apply_rotary(layout.pack(x), layout.positions), padded)
    findings.check("rotary positions", same, "turned before and after packing")
