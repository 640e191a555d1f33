"""What masks, lengths and offsets must be, and the words for what they are not."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import ArgumentError, DtypeError, LayoutError

MOST_ROWS = 2**31 - 1  # offsets are int32, as kernels take them
CONVENTIONS = "`key_padding_mask` marks padding with True (torch), `attention_mask` marks tokens with True or 1 (Hugging Face)"


def describe(x: Any) -> str:
    if not isinstance(x, Tensor):
        return repr(type(x).__name__)
    shape = "nested" if x.is_nested else f"of shape {tuple(x.shape)}"  # a strided nested tensor has no shape to ask for
    return f"{x.dtype}, {shape}" + (f", with layout {x.layout}" if x.is_nested or x.layout != torch.strided else "")


def heads_first(x: Tensor, leading: tuple[int, ...], name: str) -> str:
    """What mends a tensor whose heads come before its columns (or rows), if they do."""
    at = len(leading)
    if x.dim() != at + 2 or (*x.shape[: at - 1], x.shape[at]) != leading:
        return ""
    return f" With heads before tokens, as F.scaled_dot_product_attention takes them, pass {name}.transpose({at - 1}, {at})."


def check_at_least(least: int, value: Any, name: str, fix: str = "", error: type[ArgumentError] = ArgumentError) -> int:
    if not is_integer(value) or value < least:
        raise error(f"`{name}` must be an integer of at least {least}, but is {value!r}{fix and f': {fix}'}.")
    return int(value)


def shorten(values: Sequence[int]) -> str:
    shown = ", ".join(str(v) for v in values[:8])
    return f"({shown}, ... {len(values) - 8} more)" if len(values) > 8 else f"({shown})"


def check_rank(mask: Any, name: str) -> None:
    if not isinstance(mask, Tensor):
        raise DtypeError(f"`{name}` must be a tensor, but is {describe(mask)}: pass torch.as_tensor({name}).")
    if mask.dim() != 2:
        raise LayoutError(
            f"`{name}` must have shape (B, S), but has shape {tuple(mask.shape)}: a mask of (B, 1, 1, S) or (B, S, S) "
            "says more than which tokens exist; reduce it to one flag a token."
        )


def refuse_distributed(x: Tensor, name: str) -> None:
    if hasattr(x, "full_tensor"):
        raise DtypeError(
            f"`{name}` must hold its rows, but is a DTensor, of which other ranks may hold some: pass {name}.to_local() of a batch that is "
            f"whole on every rank or split between ranks, with its own mask, else {name}.full_tensor()."
        )


def check_integer_vector(values: Tensor, name: str) -> None:
    if not isinstance(values, Tensor) or values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
        raise DtypeError(f"`{name}` must be a tensor of integers, but is {describe(values)}.")
    if values.dim() != 1:
        raise LayoutError(f"`{name}` must be 1-D, but has shape {tuple(values.shape)}.")


def check_takes_rows(x: Tensor, name: str, has_slack: bool) -> None:
    """Quantised numbers: one scale for all, whole bytes, and no rows to fill with zeros."""
    if x.qscheme() != torch.per_tensor_affine or x.dtype in (torch.quint4x2, torch.quint2x4) or has_slack:
        raise DtypeError(
            f"`{name}` must be quantised with one scale for all and at least 8 bits, and the layout exact, but is {x.dtype} with "
            f"{x.qscheme()}{', and the layout has a capacity' if has_slack else ''}: pass {name}.int_repr() or {name}.dequantize()."
        )


def signed_pad_value(value: float, dtype: torch.dtype) -> int:
    """The number that means ``value`` where a signed integer of as many bits replaces ``dtype``."""
    size = 2 ** (8 * dtype.itemsize) if dtype in (torch.uint16, torch.uint32, torch.uint64) else 1
    if not -size < value < size:
        raise ArgumentError(f"`pad_value` must be {f'below {size}' if size > 1 else '0'} for a tensor of {dtype}, but is {value}.")
    value = int(value) % size
    return value - size if 2 * value >= size > 1 else value


def check_offsets_tensor(cu: Any) -> None:
    """What kernels take for offsets."""
    if not isinstance(cu, Tensor) or cu.dtype != torch.int32 or cu.dim() != 1 or cu.shape[0] == 0:
        raise LayoutError(
            f"`cu_seqlens` must be a tensor of int32 with shape (Q+1,), the first entry 0, but is {describe(cu)}: "
            "build the layout with SeqLayout.from_cu_seqlens, which takes every integer dtype."
        )


def is_integer(value: Any) -> bool:
    """An integer of any package, but no bool. A size of a graph with dynamic shapes is an int to dynamo, without attributes to ask for."""
    return not isinstance(value, bool) and (isinstance(value, int) or hasattr(value, "__index__"))


def host_lengths(lengths: Iterable[Any] | Tensor) -> tuple[int, ...]:
    if not isinstance(lengths, Tensor | Iterable):
        raise DtypeError(f"`lengths` must be a list, tuple or 1-D tensor of integers, but is {describe(lengths)}.")
    values = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    for i, value in enumerate(values):
        if not is_integer(value):
            raise DtypeError(f"`lengths[{i}]` must be an integer, but is {value!r}.")
        if value < 0:
            raise LayoutError(f"`lengths[{i}]` must be at least 0, but is {value}.")
    check_total(sum(values))
    return tuple(int(value) for value in values)


def check_total(total: int) -> None:
    if total > MOST_ROWS:
        raise LayoutError(
            f"a layout counts its packed rows in 32 bits, so they must be at most {MOST_ROWS}, but are {total}: split the batch."
        )


def check_offsets(offsets: Sequence[int], padded_len: int | None, total: int | None, slack: bool = False) -> tuple[int, ...]:
    """The lengths. With ``slack`` offsets may end before ``total``."""
    if offsets[0] != 0:
        raise LayoutError(
            f"`cu_seqlens[0]` must be 0, but is {offsets[0]}: these are running sums of lengths, "
            "not lengths; for lengths call SeqLayout.from_lengths."
        )
    lengths = tuple(b - a for a, b in itertools.pairwise(offsets))
    for i, length in enumerate(lengths):
        if length < 0:
            raise LayoutError(
                f"`cu_seqlens` must not decrease, but cu_seqlens[{i + 1}] = {offsets[i + 1]} after {offsets[i]}: "
                "for lengths call SeqLayout.from_lengths."
            )
    if total is not None and (offsets[-1] > total or (offsets[-1] < total and not slack)):
        raise LayoutError(
            f"`cu_seqlens[-1]` must be {'at most ' if slack else ''}total = {total}, but is {offsets[-1]}: that many rows are packed. "
            "Build the layout from the offsets of these rows, and do not write to its tensors."
        )
    check_total(offsets[-1])
    longest = max(lengths, default=0)
    if padded_len is not None and longest > padded_len:
        raise LayoutError(
            f"`padded_len` must be at least the longest sequence, but is {padded_len} and sequence {lengths.index(longest)} has {longest} "
            "tokens."
        )
    return lengths


def raise_bad_value(mask: Tensor, bad_BS: Tensor) -> NoReturn:
    row, column = (int(i) for i in bad_BS.nonzero()[0])
    value = mask[row, column].item()
    if mask.is_floating_point():
        raise LayoutError(
            f"`mask[{row}, {column}]` must be 0 (token), -inf or at most -1e4 (padding), but is {value}: a float mask is added to "
            f"the scores, and other values are a bias, not padding. Pass a bool mask; {CONVENTIONS}."
        )
    raise LayoutError(f"`mask[{row}, {column}]` must be 0 or 1, but is {value}: pass (ids != pad_id).")
