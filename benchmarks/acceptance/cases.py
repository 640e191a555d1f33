"""Batches that are compared with float64: padded, NaN at every padded place of inputs and of the output's gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from varlen_attn import SeqLayout, padded_attention, varlen_attention
from varlen_attn.testing import assert_within_budget, poison, reference_attention

from ..measure import ours

__all__ = ["Batch", "Case", "Options", "Results", "attend", "compare", "given", "here", "leaves_of", "mask_of"]

Options = Callable[[int, int, str], dict[str, Any]]  # of heads, columns, device
Side = Literal["right", "left", "both", "holes"]
Results = dict[str, Tensor]


def given(**plain: Any) -> Options:
    """Options without tensors."""
    return lambda heads, columns, device: plain


_NOTHING = given()


@dataclass(frozen=True)
class Case:
    """One call of `padded_attention`, without its numbers.

    Attributes:
        lengths, columns: of the queries' rows, and S.
        heads: N and K.
        dims: H and Hv.
        keys: lengths of the keys' rows and their S, where they are others.
        side: where the padding stands.
        options: what is asked of the call.
    """

    name: str
    lengths: tuple[int, ...]
    columns: int
    heads: tuple[int, int] = (2, 2)
    dims: tuple[int, int] = (64, 64)
    keys: tuple[tuple[int, ...], int] | None = None
    side: Side = "right"
    options: Options = _NOTHING

    def shrunk(self, factor: int = 8) -> Case:
        """The same with shorter rows, for a machine that is slow; 0 and 1 stay."""
        keys = None if self.keys is None else (_shrunk(self.keys[0], factor), _shrunk((self.keys[1],), factor)[0])
        return replace(self, lengths=_shrunk(self.lengths, factor), columns=_shrunk((self.columns,), factor)[0], keys=keys)


def _shrunk(lengths: Sequence[int], factor: int) -> tuple[int, ...]:
    return tuple(n if n < 2 else max(2, -(-n // factor)) for n in lengths)


def mask_of(lengths: Sequence[int], columns: int, side: Side = "right") -> Tensor:
    """``(B, S)`` bool, True is padding; ``holes`` spreads the tokens of a row over its columns, ``both`` centres them."""
    mask = torch.ones(len(lengths), columns, dtype=torch.bool)
    for row, length in enumerate(lengths):
        start = {"right": 0, "left": columns - length, "both": (columns - length) // 2}.get(side)
        if start is None:
            mask[row, [i * columns // max(length, 1) for i in range(length)]] = False
        else:
            mask[row, start : start + length] = False
    return mask


@dataclass(frozen=True)
class Batch:
    """The numbers of a case.

    Attributes:
        qkv: ``(B, S, N, H)``, ``(B, S, K, H)``, ``(B, S, K, Hv)``, leaves, with NaN at padding.
        grad: of the output, ``(B, S, N, Hv)``, with NaN at padding: whoever reads it there shows it.
        masks: of queries and keys, True at padding; the same tensor twice for self-attention.
    """

    qkv: tuple[Tensor, ...]
    grad: Tensor
    masks: tuple[Tensor, Tensor]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> Batch:
        """Rounded from the same normal numbers for every dtype and device."""
        generator = torch.Generator().manual_seed(seed)
        mask_q = mask_of(case.lengths, case.columns, case.side).to(device)
        mask_k = mask_q if case.keys is None else mask_of(*case.keys, case.side).to(device)
        (heads, kv_heads), (dim, value_dim) = case.heads, case.dims

        def random(mask: Tensor, *shape: int) -> Tensor:
            return poison(torch.randn(*mask.shape, *shape, generator=generator).to(device, dtype), mask)

        qkv = random(mask_q, heads, dim), random(mask_k, kv_heads, dim), random(mask_k, kv_heads, value_dim)
        columns = max(mask_q.shape[1], mask_k.shape[1])
        leaves = tuple(x.requires_grad_() for x in qkv)
        return cls(leaves, random(mask_q, heads, value_dim), (mask_q, mask_k), case.options(heads, columns, device))

    def layouts(self, capacity: bool = False) -> tuple[SeqLayout, SeqLayout | None]:
        """Of queries, and of keys where they are others. With capacity nothing is read from the device, and T is ``B*S``."""

        def layout(mask: Tensor) -> SeqLayout:
            rows = mask.numel() if capacity else None
            return SeqLayout.from_key_padding_mask(mask, capacity=rows, holes="packed", validate=False)

        mask_q, mask_k = self.masks
        return layout(mask_q), None if mask_k is mask_q else layout(mask_k)

    def results(self, backend: str, layouts: tuple[SeqLayout, SeqLayout | None]) -> Results:
        """Output and gradients, padded."""
        out = padded_attention(*self.qkv, layout=layouts[0], layout_kv=layouts[1], backend=backend, **self.options)
        return {"output": out.detach(), **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, self.qkv, self.grad), strict=True))}

    def specification(self, dtype: torch.dtype) -> Results:
        """The same by the reference in ``dtype``, packed: on tokens alone."""
        layout, layout_kv = self.layouts()
        of_keys = layout if layout_kv is None else layout_kv
        q, k, v = (
            x.detach().to(dtype).requires_grad_() for x in (layout.pack(self.qkv[0]), of_keys.pack(self.qkv[1]), of_keys.pack(self.qkv[2]))
        )
        out = reference_attention(q, k, v, layout, layout_kv, dtype=dtype, **self.options)
        grads = torch.autograd.grad(out, (q, k, v), layout.pack(self.grad).to(dtype))
        return {"output": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}

    def pack(self, results: Results) -> Results:
        """Padded results as packed rows.

        Raises:
            AssertionError: something at padding is not exactly 0.
        """
        layout, layout_kv = self.layouts()
        packed = {}
        for what, x in results.items():
            of_query = what in ("output", "dq")
            mask = self.masks[0 if of_query else 1]
            assert not bool((x[mask] != 0).any()), f"{what} is not 0 at padding"
            packed[what] = (layout if of_query or layout_kv is None else layout_kv).pack(x)
        return packed


def attend(qkv: Sequence[Tensor], layout: SeqLayout, backend: str, **options: Any) -> Tensor:
    """`varlen_attention` on packed rows."""
    query, key, value = qkv
    out: Tensor = varlen_attention(query, key, value, layout, backend=backend, **options)
    return out


def leaves_of(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of q, k, v that get gradients of their own."""
    q, k, v = (x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in tensors)
    return q, k, v


def compare(packed: Results, exact: Results, plain: Results) -> None:
    """Raise AssertionError unless every result is as near to float64 as plain attention of the same dtype is."""
    for what, x in packed.items():
        assert_within_budget(x, exact[what], plain[what], gradient=what != "output", what=what)


def here(device: str, omit: Sequence[str] = ("reference",)) -> list[str]:
    """Our backends that this machine has, by name."""
    return [name for name, reason in ours(device).items() if reason is None and name not in omit]
