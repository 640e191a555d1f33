"""Packing and unpacking as copies of rows, each the other's backward.

A copy needs no atomic add (the backward of a plain ``index_select`` does), so it is deterministic, and it never reads a padding
slot: NaN there cannot leak.

Both are here twice. `gather_rows` and `scatter_rows` are the formulas: they have all rules of `torch.func`, and T may be 0 or unknown
while tracing. Inductor makes one kernel of `scatter_rows`, without a temporary (seen in its code for a CPU, torch 2.13); eager torch
copies all rows once more to put a row of padding before them. So an eager call with many bytes goes through `take_rows` and
`place_rows`.

Bytes moved for N real rows, B*S slots, in sizes of a row; arithmetic, not measured:

====================================  ==================  ================
path                                  pack                unpack
====================================  ==================  ================
`gather_rows`, `scatter_rows`, eager  2N                  4N + BS
the same under inductor               2N                  N + BS
`take_rows`, `place_rows`             2N                  2N + BS
====================================  ==================  ================

With slack rows (capacity mode) N counts them too; an eager pack writes those once more.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import PLAIN, is_batch_of_gradients, is_tracing, is_transformed

# Rows of at most so many bytes are moved by the formulas: with one thread on a CPU (torch 2.13, float32 and bfloat16, data in the
# cache) the steps around the faster copy took longer than what it saved.
_SMALL_PACK = 2**15
_SMALL_UNPACK = 2**19

# Integers of as many bits in place of the dtypes whose rows torch does not move everywhere (2.13): unsigned ones above 8 bits, parts of
# a byte, and names for bits only. None of them has a gradient.
_UNMOVED = re.compile("uint(16|32|64)|u?int[1-7]|bits.*|float4.*")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
STAND_INS = {d: _INTEGERS[d.itemsize] for name, d in vars(torch).items() if isinstance(d, torch.dtype) and _UNMOVED.fullmatch(name)}


class Edges(NamedTuple):
    """Where every padded position takes its row from: a token from itself, padding from the nearest token before it in its batch row,
    else from the first one after it.

    Attributes:
        indices: ``(B*S,)`` of packed rows.
        shifted: they are one larger, because 0 says that the batch row has no token, which then is 0.
    """

    indices: Tensor
    shifted: bool

    @classmethod
    def of(cls, gather_indices_BS: Tensor, *, leading: bool, empty: bool) -> Edges:
        """From packed rows plus 1, 0 at padding. Reads nothing from a device.

        Args:
            gather_indices_BS: as in a layout, ``(B, S)``.
            leading: whether padding may come before the tokens of a row.
            empty: whether a row may have no token.
        """
        indices = gather_indices_BS.cummax(1).values
        if leading and indices.shape[1]:
            first = torch.where(indices > 0, indices, torch.iinfo(indices.dtype).max).amin(1, keepdim=True)
            indices = torch.where(indices[:, -1:] == 0, 0, indices.maximum(first)) if empty else indices.maximum(first)
        return cls((indices if empty else indices - 1).flatten(), empty)

    def rows_of(self, x: Tensor) -> Tensor:
        return scatter_rows(x, self.indices, 0) if self.shifted else x.index_select(0, self.indices)


class Pack(torch.autograd.Function):
    """Rows of the padded tensor, in packed order. ``valid_T`` is None unless there are slack rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_indices: Tensor, gather_indices: Tensor, valid_T: Tensor | None) -> Tensor:
        ctx.save_for_backward(token_indices, gather_indices, valid_T)
        return take_rows(x, token_indices, valid_T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return Unpack.apply(grad, *ctx.saved_tensors, 0), None, None, None


class Unpack(torch.autograd.Function):
    """Rows of the packed tensor at their places in the padded one, elsewhere ``pad_value``, or those of ``edges``, without a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        token_indices: Tensor,
        gather_indices: Tensor,
        valid_T: Tensor | None,
        pad_value: float,
        edges: Edges | None = None,
    ) -> Tensor:
        ctx.save_for_backward(token_indices, gather_indices, valid_T)
        return place_rows(x, token_indices, gather_indices, valid_T, pad_value) if edges is None else edges.rows_of(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return Pack.apply(grad, *ctx.saved_tensors), None, None, None, None, None


# -------------------------------------------------------------------- the formulas


def gather_rows(x: Tensor, token_indices: Tensor, valid_T: Tensor | None) -> Tensor:
    if valid_T is None:
        return x.index_select(0, token_indices)
    if x.shape[0] == 0:
        return torch.constant_pad_nd(x, [0, 0] * (x.dim() - 1) + [0, token_indices.shape[0]])
    rows = x.index_select(0, token_indices)
    valid = valid_T.view(-1, *[1] * (x.dim() - 1))
    return torch.where(valid, rows, rows.new_zeros(()))


def scatter_rows(x: Tensor, gather_indices: Tensor, pad_value: float) -> Tensor:
    # The padding row comes first, so that its index (0) does not depend on T, which is data.
    before = [0, 0] * (x.dim() - 1) + [1, 0]
    return torch.constant_pad_nd(x, before, pad_value).index_select(0, gather_indices)


def takes_formulas(x: Tensor, *, packed: bool) -> bool:
    """Where `Pack` and `Unpack` have no rules, under `torch.func`, cannot be saved, by `torch.jit.trace`, or take longer than torch's own
    derivatives of the formulas, for a small tensor on a CPU."""
    if torch.compiler.is_compiling():
        return False
    small = type(x) in PLAIN and x.is_cpu and x.nbytes <= (_SMALL_UNPACK if packed else _SMALL_PACK)
    return small or is_transformed() or torch.jit.is_tracing()  # type: ignore[attr-defined]


# -------------------------------------------------------------------- eager, without gradients


def take_rows(x: Tensor, token_indices: Tensor, valid_T: Tensor | None) -> Tensor:
    """`gather_rows`; slack rows are overwritten in place."""
    if valid_T is None or x.shape[0] == 0 or is_tracing(x) or x.nbytes <= _SMALL_PACK or not _has_memory(x):
        return gather_rows(x, token_indices, valid_T)
    rows = x.index_select(0, token_indices)
    words = _in_words(rows)[0]
    words.masked_fill_(~valid_T.view(-1, *[1] * (words.dim() - 1)), 0)
    return rows


def place_rows(x: Tensor, token_indices: Tensor, gather_indices: Tensor, valid_T: Tensor | None, pad_value: float) -> Tensor:
    """`scatter_rows`, by writing where the rows belong instead of reading from where they come."""
    if is_tracing(x) or x.nbytes <= _SMALL_UNPACK or not _has_memory(x):
        return scatter_rows(x, gather_indices, pad_value)
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():  # that would sort the indices at every call
        return scatter_rows(x, gather_indices, pad_value)
    slots, trailing = gather_indices.shape[0], x.shape[1:]
    if valid_T is None:
        out = x.new_full((slots, *trailing), pad_value)
    else:  # slack rows go to one slot too many, which is cut off
        token_indices = torch.where(valid_T, token_indices, slots)
        out = x.new_full((slots + 1, *trailing), pad_value)
    target, source = _in_words(out, x)
    target.index_copy_(0, token_indices, source)
    return out if valid_T is None else out.resize_(slots, *trailing)  # a slice would be a view, which could not be changed in place


def _has_memory(x: Tensor) -> bool:
    """Whether the numbers of ``x`` stand in memory that we may address: not in a tensor subclass, not quantised, and not in a batch of
    gradients, which has no storage."""
    if x.device.type not in ("cpu", "cuda") or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__ or x.is_quantized:
        return False
    return not is_batch_of_gradients(x)


def _in_words(*rows: Tensor) -> tuple[Tensor, ...]:
    """Tensors of equal rows as numbers of 16 bytes over the same memory (a copy of a strided one), or of their own size where that is
    impossible.

    torch writes rows number by number, on a CPU and a GPU alike, so that bfloat16 costs 8 times the steps. Copying complex numbers
    changes no bit.
    """
    words = []
    for x in rows:
        width = math.prod(x.shape[1:])
        flat = x.reshape(x.shape[0], width)
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        sizes = (width, flat.stride(0), flat.storage_offset())
        fits = width > 0 and all(size * x.element_size() % 16 == 0 for size in sizes) and flat.data_ptr() % 16 == 0
        if not fits or x.is_conj() or x.is_neg():
            return tuple(_in_own_size(x) for x in rows)
        words.append(flat.view(torch.complex128))
    return tuple(words)


def _in_own_size(x: Tensor) -> Tensor:
    """Integers over the same memory in place of float8, of which torch writes no rows."""
    return x.view(torch.int8) if x.is_floating_point() and x.element_size() == 1 else x
