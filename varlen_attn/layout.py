"""`SeqLayout`: which tokens of a padded batch are real, and where they stand when packed.

The only file that knows masks and indices. Shape letters, here and in every other file:

====  ==========================================================
``B``  batch (rows of the padded tensor)
``S``  padded length (columns of the padded tensor)
``T``  packed rows: the real tokens, one sequence after another
``Q``  sequences (``Q == B``, except for several documents a row)
``N``  query heads        ``K``  key/value heads
``H``  head dimension     ``D``  model dimension
====  ==========================================================

Packing is two gathers, one for each direction, and each is the other's backward. A gather needs no
atomic add (the backward of a plain ``index_select`` does), so it is deterministic and never reads
a padding slot: NaN there can not leak.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, Literal, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from .errors import ArgumentError, DtypeError, LayoutError, LayoutWarning, warn

__all__ = ["SeqLayout"]

Pooling = Literal["mean", "max", "sum", "first", "last"]
P = ParamSpec("P")
R = TypeVar("R")

_CONVENTIONS = "`key_padding_mask` marks padding with True (torch), `attention_mask` marks tokens with True or 1 (Hugging Face)"
_PADDING_THRESHOLD = -1e4  # an additive mask value at or below this is padding: covers finfo.min of float16


def is_tracing(*tensors: Tensor) -> bool:
    """Whether values must not be read: under `torch.compile` or `torch.export`, or on fake tensors."""
    return torch.compiler.is_compiling() or any(isinstance(t, FakeTensor) for t in tensors)


def _constructor(function: Callable[P, R]) -> Callable[P, R]:
    """Leave inference mode, so that a layout made or moved during evaluation can be saved for backward later."""

    @wraps(function)
    def build(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return build


def _mark_unbacked(tensor: Tensor) -> None:
    """Tell `torch.compile` that the number of packed rows is data: one graph for all of 0, 1, 2, ...

    Only where dynamo is loaded already: its import costs 0.8 s and nobody compiles without it.
    """
    if "torch._dynamo" in sys.modules and not is_tracing(tensor):
        from torch._dynamo.decorators import mark_unbacked

        mark_unbacked(tensor, 0)


class _Pack(torch.autograd.Function):
    """Rows of the padded tensor, in packed order. ``valid_T`` is None unless there are slack rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_indices: Tensor, gather_indices: Tensor, valid_T: Tensor | None) -> Tensor:
        ctx.save_for_backward(token_indices, gather_indices, valid_T)
        return _pack(x, token_indices, valid_T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Unpack.apply(grad, *ctx.saved_tensors, 0), None, None, None


class _Unpack(torch.autograd.Function):
    """Rows of the packed tensor at their places in the padded one, ``pad_value`` elsewhere."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        token_indices: Tensor,
        gather_indices: Tensor,
        valid_T: Tensor | None,
        pad_value: float,
    ) -> Tensor:
        ctx.save_for_backward(token_indices, gather_indices, valid_T)
        return _unpack(x, gather_indices, pad_value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Pack.apply(grad, *ctx.saved_tensors), None, None, None, None


def _pack(x: Tensor, token_indices: Tensor, valid_T: Tensor | None) -> Tensor:
    if valid_T is None:
        return x.index_select(0, token_indices)
    if x.shape[0] == 0:
        return x.new_zeros((token_indices.shape[0], *x.shape[1:]))
    rows = x.index_select(0, token_indices)
    return torch.where(valid_T.view(-1, *[1] * (x.dim() - 1)), rows, rows.new_zeros(()))


def _unpack(x: Tensor, gather_indices: Tensor, pad_value: float) -> Tensor:
    # The padding row stands first, so that its index (0) does not depend on T, which is data.
    padding_row = x.new_full((1, *x.shape[1:]), pad_value)
    return torch.cat([padding_row, x]).index_select(0, gather_indices)


def _is_transformed() -> bool:
    """Under `torch.func` or forward-mode AD, for which plain indexing has all rules and our two functions have none."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@dataclass(frozen=True, eq=False, repr=False)
class SeqLayout:
    """Where the real tokens of a padded ``(B, S)`` batch are, and their order when packed.

    Make one with a constructor (`from_key_padding_mask`, `from_attention_mask`, `from_lengths`,
    `from_cu_seqlens`, `from_document_ids`, `from_nested`), once per batch; share it between q, k, v,
    every layer, pooling and the loss. Frozen, hashed by identity, a pytree node.

    Attributes:
        batch_size: B.
        padded_len: S.
        max_seqlen: an upper bound of the longest sequence, never read back from a device.
        cu_seqlens: ``(Q+1,)`` int32, offsets of the sequences in the packed rows; starts at 0.
        token_indices: ``(T,)`` int64, where each packed row stands in the flattened ``B*S`` (0 for slack rows).
        gather_indices: ``(B*S,)`` int64, for each padded position its packed row plus 1; 0 at padding.
        lengths: the Q lengths, or None where only the device knows them.
        has_holes: whether a row has padding between two tokens; None where only the device knows.
        holes: ``"refuse"`` or ``"packed"``: may distances count packed tokens although a row has holes?
        has_slack: capacity mode: T is fixed, and rows from ``cu_seqlens[-1]`` on hold nothing.
        row_ids: ``(Q,)`` the batch row of each document (-1 for unused ones); None unless made from documents.

    The equivalent of ``layout.pack(x)`` in plain PyTorch is ``x[~key_padding_mask]``, and of ``layout.unpack(y)``
    ``torch.zeros(B, S, D).masked_scatter(~key_padding_mask[..., None], y)``.
    """

    batch_size: int
    padded_len: int
    max_seqlen: int
    cu_seqlens: Tensor
    token_indices: Tensor
    gather_indices: Tensor
    lengths: tuple[int, ...] | None
    has_holes: bool | None
    holes: Literal["refuse", "packed"] = "refuse"
    has_slack: bool = False
    row_ids: Tensor | None = None

    # ---------------------------------------------------------------- constructors

    @classmethod
    @_constructor
    def from_key_padding_mask(
        cls,
        mask: Tensor,
        *,
        capacity: int | None = None,
        holes: Literal["refuse", "packed"] = "refuse",
        validate: bool = True,
    ) -> SeqLayout:
        """From torch's mask, where **True is padding**.

        Args:
            mask: ``(B, S)`` bool, or float with 0 at tokens and -inf (or at most -1e4) at padding.
            capacity: a fixed number of packed rows: nothing is read from the device, shapes are
                static, rows beyond the real tokens are exactly 0. A mask with more tokens is refused.
            holes: ``"packed"`` allows windows, ALiBi and score biases to count packed tokens where a
                row has padding between tokens; ``"refuse"`` makes them an error there.
            validate: warn (`LayoutWarning`) about a row without a token while others have some.

        Raises:
            DtypeError: the mask is neither bool nor float.
            LayoutError: it is not 2-D, or a float mask has other values.
        """
        _check_rank(mask, "mask")
        if mask.dtype == torch.bool:
            return _from_real(~mask, None, mask, capacity, holes, validate)
        if not mask.is_floating_point():
            raise DtypeError(
                f"`mask` must be bool or float, but is {mask.dtype}: only bool and floating types of "
                f"key_padding_mask are supported. {_CONVENTIONS}; for a 0/1 mask of tokens call "
                "SeqLayout.from_attention_mask(mask), for one of padding pass mask.bool()."
            )
        padding = mask <= _PADDING_THRESHOLD
        return _from_real(~padding, ~(padding | (mask == 0)), mask, capacity, holes, validate)

    @classmethod
    @_constructor
    def from_attention_mask(
        cls,
        mask: Tensor,
        *,
        capacity: int | None = None,
        holes: Literal["refuse", "packed"] = "refuse",
        validate: bool = True,
    ) -> SeqLayout:
        """From Hugging Face's mask, where **True or 1 is a token**: ``(B, S)`` bool, or integers 0 and 1.

        Arguments and errors as `from_key_padding_mask`.
        """
        _check_rank(mask, "mask")
        if mask.dtype == torch.bool:
            return _from_real(mask, None, mask, capacity, holes, validate)
        if mask.is_floating_point() or mask.is_complex():
            raise DtypeError(
                f"`mask` must be bool or an integer dtype with values 0 and 1, but is {mask.dtype}. "
                f"{_CONVENTIONS}; for an additive float mask call SeqLayout.from_key_padding_mask(mask)."
            )
        bad = (mask != 0) & (mask != 1)
        return _from_real(mask == 1, bad, mask, capacity, holes, validate)

    @classmethod
    @_constructor
    def from_lengths(
        cls,
        lengths: Sequence[int] | Tensor,
        padded_len: int | None = None,
        padding_side: Literal["right", "left"] = "right",
        *,
        device: torch.device | str | None = None,
    ) -> SeqLayout:
        """From the number of tokens of each row, known on the host: nothing is read from a device.

        Args:
            lengths: B integers in a list, tuple or 1-D integer tensor (one on a device is read back once).
            padded_len: S; the longest length if left out.
            padding_side: where the padding of the padded tensors stands.
            device: of the index tensors; of ``lengths`` if that is a tensor, else the CPU.

        Raises:
            DtypeError, LayoutError: lengths are not integers, negative, or above ``padded_len``.
        """
        if isinstance(lengths, Tensor):
            device = lengths.device if device is None else device
            _check_integer_vector(lengths, "lengths")
        values = _host_lengths(lengths)
        longest = max(values, default=0)
        size = longest if padded_len is None else int(padded_len)
        if size < 0:
            raise LayoutError(f"`padded_len` must be at least 0, but is {size}.")
        if longest > size:
            raise LayoutError(
                f"`lengths[{values.index(longest)}]` must be at most padded_len = {size}, but is {longest}: "
                "give the number of columns of the padded tensors as `padded_len`."
            )
        if padding_side not in ("right", "left"):
            raise ArgumentError(f"`padding_side` must be 'right' or 'left', but is {padding_side!r}.")
        device = torch.device("cpu" if device is None else device)
        lengths_Q = _to_device(torch.tensor(values, dtype=torch.int64, device="cpu"), device)
        columns_S = torch.arange(size, device=device)
        if padding_side == "left":
            real_BS = columns_S >= size - lengths_Q[:, None]
        else:
            real_BS = columns_S < lengths_Q[:, None]
        return _exact(real_BS, lengths_Q, values, has_holes=False, holes="refuse")

    @classmethod
    @_constructor
    def from_cu_seqlens(
        cls,
        cu_seqlens: Tensor,
        padded_len: int | None = None,
        *,
        total: int | None = None,
        validate: bool = True,
    ) -> SeqLayout:
        """From the offsets of packed sequences, as varlen kernels take them; padding stands on the right.

        Args:
            cu_seqlens: ``(Q+1,)`` of any integer dtype: 0, then the running sum of the lengths.
            padded_len: S; the longest sequence if left out.
            total: the number of packed rows, ``cu_seqlens[-1]``.
            validate: read the offsets (one transfer from a device) and check them. False needs
                ``padded_len`` and ``total``, trusts both, and reads nothing.

        Raises:
            DtypeError, LayoutError: not a vector of integers, does not start at 0, decreases, ends elsewhere than ``total``,
                or has a sequence longer than ``padded_len``.
        """
        _check_integer_vector(cu_seqlens, "cu_seqlens")
        if cu_seqlens.shape[0] == 0:
            raise LayoutError(
                "`cu_seqlens` must have Q+1 >= 1 entries, the first of them 0, but is empty: for no sequences pass torch.tensor([0])."
            )
        lengths = None
        if validate or padded_len is None or total is None:
            if is_tracing(cu_seqlens):
                raise ArgumentError(
                    "`cu_seqlens` can not be read while tracing: pass `padded_len`, `total` and "
                    "`validate=False`, or build the layout outside the compiled function."
                )
            lengths = _check_offsets(cu_seqlens.tolist(), padded_len, total)
            padded_len = max(lengths, default=0) if padded_len is None else int(padded_len)
            total = sum(lengths)
        lengths_Q = cu_seqlens.to(torch.int64).diff()
        real_BS = torch.arange(padded_len, device=cu_seqlens.device) < lengths_Q[:, None]
        return _exact(real_BS, lengths_Q, lengths, has_holes=False, holes="refuse", total=total)

    @classmethod
    @_constructor
    def from_document_ids(cls, ids: Tensor, *, max_docs: int | None = None) -> SeqLayout:
        """Several documents a row: a run of equal non-zero ids in one row is a document, a 0 is padding.

        Equal ids in two rows, or apart in one row, are different documents. Rows without ids add none;
        ``row_ids`` says which row each document came from.

        Args:
            ids: ``(B, S)`` of any integer dtype.
            max_docs: a fixed number of sequences: nothing is read from the device and all shapes are
                static (T is ``B*S``); unused sequences are empty. More documents are refused.
        """
        _check_rank(ids, "ids")
        if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
            raise DtypeError(f"`ids` must have an integer dtype, but is {ids.dtype}: number the documents 1, 2, ...")
        return _from_documents(ids, max_docs)

    @classmethod
    @_constructor
    def from_nested(cls, nested: Tensor) -> SeqLayout:
        """From a jagged nested tensor ``(Q, j, ...)``: its offsets as they are; pack order is ``nested.values()``.

        Raises:
            LayoutError: not a jagged nested tensor, or one with gaps between its sequences.
        """
        if not nested.is_nested or nested.layout != torch.jagged:
            raise LayoutError(
                f"`nested` must be a nested tensor with layout torch.jagged, but is {_describe(nested)}: "
                "make one with torch.nested.as_nested_tensor(tensors, layout=torch.jagged)."
            )
        if getattr(nested, "_ragged_idx", 1) != 1 or nested.lengths() is not None:  # type: ignore[attr-defined]
            raise LayoutError(
                "`nested` must hold its sequences one after another along dimension 1, but it is a "
                "transposed view or has gaps: call .contiguous() on it."
            )
        return cls.from_cu_seqlens(nested.offsets())  # type: ignore[attr-defined]

    # ---------------------------------------------------------------- facts

    @property
    def num_seqs(self) -> int:
        """Q."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_rows(self) -> int:
        """T: rows of a packed tensor (a SymInt while tracing)."""
        return self.token_indices.shape[0]

    @property
    def device(self) -> torch.device:
        """Of the index tensors; tensors to pack must be there too."""
        return self.cu_seqlens.device

    @property
    def total(self) -> int | None:
        """Real tokens; None where only the device knows."""
        return None if self.lengths is None else sum(self.lengths)

    @property
    def fill(self) -> float | None:
        """Real tokens per padded position, 1.0 for no padding; None where only the device knows."""
        if self.lengths is None:
            return None
        slots = self.batch_size * self.padded_len
        return sum(self.lengths) / slots if slots else 1.0

    @property
    def is_dense(self) -> bool:
        """Known on the host to have no padding: then packed is ``x.reshape(B*S, ...)``."""
        return self.lengths is not None and self.lengths == (self.padded_len,) * self.batch_size

    @property
    def seq_ids(self) -> Tensor:
        """``(T,)`` int64: the sequence of each packed row; Q for slack rows."""
        rows_T = torch.arange(self.num_rows, device=self.device, dtype=torch.int32)
        return torch.searchsorted(self.cu_seqlens[1:].contiguous(), rows_T, right=True)

    @property
    def positions(self) -> Tensor:
        """``(T,)`` int64: 0, 1, 2, ... from the start of each sequence (for rotary embeddings); 0 for slack rows."""
        rows_T = torch.arange(self.num_rows, device=self.device)
        starts_T = self.cu_seqlens.to(torch.int64).index_select(0, self.seq_ids)
        return torch.where(self.valid_rows(), rows_T - starts_T, 0)

    @property
    def columns(self) -> Tensor:
        """``(T,)`` int64: the column of each packed row in the padded tensor; 0 for slack rows."""
        return self.token_indices % max(self.padded_len, 1)

    def valid_rows(self) -> Tensor:
        """``(T,)`` bool: False for slack rows, True for all others."""
        return torch.arange(self.num_rows, device=self.device) < self.cu_seqlens[-1]

    def padding_mask(self) -> Tensor:
        """``(B, S)`` bool: torch's ``key_padding_mask``, True at padding."""
        return (self.gather_indices == 0).view(self.batch_size, self.padded_len)

    # ---------------------------------------------------------------- packing

    def pack(self, x: Tensor) -> Tensor:
        """``(B, S, ...) -> (T, ...)``: the real tokens, contiguous, any dtype; the backward of `unpack`.

        Raises:
            LayoutError: ``x`` does not begin with ``(B, S)``, or is on another device.
        """
        self._check(x, (self.batch_size, self.padded_len), "x")
        flat = x.reshape(self.batch_size * self.padded_len, *x.shape[2:])
        valid_T = self.valid_rows() if self.has_slack else None
        if _is_transformed():
            return _pack(flat, self.token_indices, valid_T)
        packed: Tensor = _Pack.apply(flat, self.token_indices, self.gather_indices, valid_T)
        _mark_unbacked(packed)
        return packed

    def unpack(self, x: Tensor, pad_value: float = 0.0) -> Tensor:
        """``(T, ...) -> (B, S, ...)``: tokens at their places, ``pad_value`` at padding; the backward of `pack`.

        Raises:
            LayoutError: ``x`` does not have T rows, or is on another device.
        """
        self._check(x, (self.num_rows,), "x")
        value = pad_value if x.is_floating_point() or x.is_complex() else int(pad_value)
        if _is_transformed():
            padded = _unpack(x, self.gather_indices, value)
        else:
            valid_T = self.valid_rows() if self.has_slack else None
            padded = _Unpack.apply(x, self.token_indices, self.gather_indices, valid_T, value)
        return padded.reshape(self.batch_size, self.padded_len, *x.shape[1:])

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(T, ...) -> Q`` views, one a sequence. Needs lengths on the host."""
        self._check(x, (self.num_rows,), "x")
        views: tuple[Tensor, ...] = x[: self.total].split(list(self._host_lengths("split")))
        return views

    def to_nested(self, x: Tensor) -> Tensor:
        """``(T, ...) -> (Q, j, ...)``: a jagged nested tensor over the same memory."""
        self._check(x, (self.num_rows,), "x")
        bounds: dict[str, Any] = {}
        if self.lengths is not None:
            bounds = {"min_seqlen": min(self.lengths, default=0), "max_seqlen": max(self.lengths, default=0)}
        offsets = self.cu_seqlens.to(torch.int64)
        return torch.nested.nested_tensor_from_jagged(x, offsets=offsets, **bounds)

    def pool(self, x: Tensor, how: Pooling) -> Tensor:
        """``(T, D) -> (Q, D)``: mean, max, sum, first or last token of each sequence; 0 for an empty one.

        Sums and means of half precision accumulate in float32. The mean in plain PyTorch:
        ``(padded * real[..., None]).sum(1) / real.sum(1, keepdim=True)``.
        """
        self._check(x, (self.num_rows,), "x")
        offsets = self.cu_seqlens.to(torch.int64)
        lengths_Q1 = offsets.diff().view(-1, *[1] * (x.dim() - 1))
        if how in ("first", "last"):
            row_Q = offsets[:-1] + 1 if how == "first" else offsets[1:]
            padded = torch.cat([x.new_zeros((1, *x.shape[1:])), x])  # row 0 serves empty sequences
            return padded.index_select(0, torch.where(offsets.diff() > 0, row_Q, 0))
        if how not in ("mean", "max", "sum"):
            raise ArgumentError(f"`how` must be one of 'mean', 'max', 'sum', 'first', 'last', but is {how!r}.")
        if not x.is_floating_point():
            raise DtypeError(f"`x` must be floating-point for how={how!r}, but is {x.dtype}: convert it with x.float().")
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if self.has_slack:  # 0 times NaN would be NaN in a sum that should not see the row at all
            wide = torch.where(self.valid_rows().view(-1, *[1] * (x.dim() - 1)), wide, 0)
        reduced = torch.segment_reduce(wide, "max" if how == "max" else "sum", offsets=offsets, unsafe=True)
        if how == "mean":
            reduced = reduced / lengths_Q1.clamp(min=1)
        return torch.where(lengths_Q1 > 0, reduced, 0).to(x.dtype)

    @_constructor
    def compact(self) -> SeqLayout:
        """The same packed rows, with every sequence in a padded row of its own, from column 0.

        For dense kernels: whatever the padding side, holes or documents of this layout, ``compact().unpack(x_TNH)`` is a
        right-padded ``(Q, max_seqlen, N, H)``. Reads nothing from a device.
        """
        size = self.max_seqlen if self.lengths is None else max(self.lengths, default=0)
        offsets = self.cu_seqlens.to(torch.int64)
        columns_S = torch.arange(size, device=self.device)
        real_QS = columns_S < offsets.diff()[:, None]
        gather_QS = torch.where(real_QS, offsets[:-1, None] + columns_S + 1, 0)
        token_indices = torch.where(self.valid_rows(), self.seq_ids * size + self.positions, 0)
        return replace(
            self,
            batch_size=self.num_seqs,
            padded_len=size,
            max_seqlen=size,
            token_indices=token_indices,
            gather_indices=gather_QS.reshape(-1),
            has_holes=None if self.has_holes is None else False,
            row_ids=None,
        )

    # ---------------------------------------------------------------- moving and updating

    @_constructor
    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SeqLayout:
        """The same layout with its index tensors on ``device``."""
        moved = self._map_tensors(lambda t: t.to(device, non_blocking=non_blocking))
        if moved.token_indices is not self.token_indices and not moved.has_slack:
            _mark_unbacked(moved.token_indices)
        return moved

    @_constructor
    def pin_memory(self) -> SeqLayout:
        """The same layout in page-locked memory, for a copy to a GPU that blocks nothing."""
        return self._map_tensors(lambda t: t.pin_memory())

    def update_(self, mask: Tensor) -> SeqLayout:
        """Capacity mode: another ``key_padding_mask`` of the same shape, written in place (CUDA-graph replay).

        Raises:
            LayoutError: the layout has no capacity, shapes differ, or the mask has more tokens than fit.
        """
        if not self.has_slack or self.row_ids is not None:
            raise LayoutError("only a layout made with `capacity=` has fixed shapes that update_ could write to.")
        self._check(mask, (self.batch_size, self.padded_len), "mask")
        other = type(self).from_key_padding_mask(mask, capacity=self.num_rows, holes=self.holes)
        self.cu_seqlens.copy_(other.cu_seqlens)
        self.token_indices.copy_(other.token_indices)
        self.gather_indices.copy_(other.gather_indices)
        return self

    def __repr__(self) -> str:
        known = "on the device only" if self.lengths is None else _shorten(self.lengths)
        fill = "" if self.fill is None else f", fill={self.fill:.2f}"
        extras = "".join(
            f", {text}"
            for text, shown in (
                (f"holes={self.holes!r}", bool(self.has_holes)),
                ("capacity=T", self.has_slack),
                (f"row_ids={_shorten(self.row_ids.tolist()) if self.row_ids is not None else ()}", self.row_ids is not None),
            )
            if shown
        )
        return (
            f"SeqLayout(B={self.batch_size}, S={self.padded_len}, Q={self.num_seqs}, T={self.num_rows}{fill}, "
            f"lengths={known}{extras}, device={self.device})"
        )

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> SeqLayout:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: function(v) for k, v in tensors.items() if isinstance(v, Tensor)}
        return replace(self, **changed)

    def _check(self, x: Tensor, leading: tuple[int, ...], name: str) -> None:
        if torch.compiler.is_compiling():  # sizes that are data can not be compared while tracing, but asserted at run time
            for have, need in zip(x.shape, leading, strict=False):
                torch._check(have == need)
            return
        if tuple(x.shape[: len(leading)]) != leading:
            expected = "x".join(str(n) for n in leading)
            raise LayoutError(
                f"`{name}` must begin with {expected} (this layout has B={self.batch_size}, S={self.padded_len}, "
                f"T={self.num_rows}), but has shape {tuple(x.shape)}. Nothing is sliced to fit: build the layout "
                "from the mask that belongs to this tensor."
            )
        if x.device != self.device:
            raise LayoutError(
                f"`{name}` is on {x.device}, but the layout is on {self.device}: call layout.to({str(x.device)!r}) once per batch."
            )

    def _host_lengths(self, what: str) -> tuple[int, ...]:
        if self.lengths is None:
            raise LayoutError(
                f"{what} needs the lengths on the host, but only the device knows them: build the layout from lengths, or "
                "without `capacity`."
            )
        return self.lengths


# -------------------------------------------------------------------- builders


def _from_real(
    real_BS: Tensor,
    bad_BS: Tensor | None,
    mask: Tensor,
    capacity: int | None,
    holes: Literal["refuse", "packed"],
    validate: bool,
) -> SeqLayout:
    """A layout from a mask that is True at tokens; reads from the device at most once."""
    if holes not in ("refuse", "packed"):
        raise ArgumentError(f"`holes` must be 'refuse' or 'packed', but is {holes!r}.")
    if capacity is not None:
        return _with_capacity(real_BS, real_BS.sum(1), int(capacity), holes)
    flags = () if bad_BS is None else (bad_BS.any(),)
    layout, values = layout_and_flags(real_BS, flags, holes=holes, validate=validate)
    if any(values) and bad_BS is not None:
        _raise_bad_value(mask, bad_BS)
    return layout


def layout_and_flags(
    real_BS: Tensor, flags: Sequence[Tensor] = (), *, holes: Literal["refuse", "packed"] = "refuse", validate: bool = True
) -> tuple[SeqLayout, tuple[bool, ...]]:
    """The layout of a mask that is True at tokens, and bool scalars of the caller, in the one transfer of a device mask.

    While tracing nothing is read: no flag comes back.
    """
    lengths_B = real_BS.sum(1)
    if is_tracing(real_BS):
        return _exact(real_BS, lengths_B, None, has_holes=None, holes=holes), ()
    read = torch.cat([lengths_B, torch.stack([_any_hole(real_BS), *flags]).to(torch.int64)]).tolist()
    lengths, (some_hole, *values) = tuple(read[: len(real_BS)]), read[len(real_BS) :]
    if validate and 0 in lengths and any(lengths):
        warn(
            f"row {lengths.index(0)} of the mask has no token while others have some. If that is not meant, the mask is "
            f"inverted: {_CONVENTIONS}. validate=False silences this.",
            LayoutWarning,
        )
    return _exact(real_BS, lengths_B, lengths, has_holes=bool(some_hole), holes=holes), tuple(map(bool, values))


def _exact(
    real_BS: Tensor,
    lengths_Q: Tensor,
    lengths: tuple[int, ...] | None,
    *,
    has_holes: bool | None,
    holes: Literal["refuse", "packed"],
    total: int | None = None,
) -> SeqLayout:
    """T is the number of real tokens; one sequence a row."""
    size, padded_len = real_BS.shape
    flat = real_BS.reshape(-1)
    total = sum(lengths) if lengths is not None else total
    if total is None:
        token_indices = flat.nonzero().squeeze(1)
    else:
        token_indices = torch.nonzero_static(flat, size=total).squeeze(1)
    _mark_unbacked(token_indices)
    return SeqLayout(
        batch_size=size,
        padded_len=padded_len,
        max_seqlen=padded_len,
        cu_seqlens=_offsets(lengths_Q),
        token_indices=token_indices,
        gather_indices=flat.cumsum(0) * flat,
        lengths=lengths,
        has_holes=has_holes,
        holes=holes,
    )


def _with_capacity(real_BS: Tensor, lengths_B: Tensor, capacity: int, holes: Literal["refuse", "packed"]) -> SeqLayout:
    """T is ``capacity``; nothing is read from the device."""
    if capacity < 0:
        raise ArgumentError(f"`capacity` must be at least 0, but is {capacity}.")
    size, padded_len = real_BS.shape
    flat = real_BS.reshape(-1)
    rank = flat.cumsum(0)  # packed row + 1, at tokens
    _refuse_overflow(lengths_B.sum(), capacity, "`capacity`", "tokens")
    slot = torch.where(flat, (rank - 1).clamp(max=capacity), capacity)
    token_indices = torch.zeros(capacity + 1, dtype=torch.int64, device=flat.device)
    token_indices = token_indices.scatter(0, slot, torch.arange(flat.shape[0], device=flat.device))
    token_indices[capacity] = 0
    return SeqLayout(
        batch_size=size,
        padded_len=padded_len,
        max_seqlen=padded_len,
        cu_seqlens=_offsets(lengths_B),
        token_indices=token_indices[:capacity].clone(),
        gather_indices=rank * flat,
        lengths=None,
        has_holes=None,
        holes=holes,
        has_slack=True,
    )


def _from_documents(ids: Tensor, max_docs: int | None) -> SeqLayout:
    size, padded_len = ids.shape
    home = ids.device
    if max_docs is None and not is_tracing(ids):
        ids = ids.cpu()  # the one transfer; all that follows is small and moves back without waiting
    real_BS = ids != 0
    start_BS = real_BS.clone()
    start_BS[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    start, flat = start_BS.reshape(-1), real_BS.reshape(-1)
    rank = flat.cumsum(0)
    if max_docs is None:
        first = start.nonzero().squeeze(1)
        cu_seqlens = torch.cat([rank[first] - 1, rank[-1:] if flat.shape[0] else rank.new_zeros(1)]).to(torch.int32)
        lengths = None if is_tracing(ids) else tuple(cu_seqlens.diff().tolist())
        row_ids = first // max(padded_len, 1)
        token_indices = flat.nonzero().squeeze(1)
    else:
        # Static shapes: documents scatter their offset and row to their number; unused numbers keep the total.
        number = start.cumsum(0)
        _refuse_overflow(start.sum(), max_docs, "`max_docs`", "documents")
        slot = torch.where(start, (number - 1).clamp(max=max_docs), max_docs)
        cu_seqlens = flat.sum().expand(max_docs + 1).scatter(0, slot, rank - 1)
        cu_seqlens[max_docs] = flat.sum()
        cu_seqlens = cu_seqlens.to(torch.int32)
        rows = torch.arange(size, device=home).repeat_interleave(padded_len, output_size=size * padded_len)
        row_ids = torch.full((max_docs + 1,), -1, device=home).scatter(0, slot, rows)[:max_docs].clone()
        lengths = None
        token_indices = _with_capacity(real_BS, real_BS.sum(1), flat.shape[0], "refuse").token_indices
    layout = SeqLayout(
        batch_size=size,
        padded_len=padded_len,
        max_seqlen=padded_len,
        cu_seqlens=cu_seqlens,
        token_indices=token_indices,
        gather_indices=rank * flat,
        lengths=lengths,
        has_holes=False,
        has_slack=max_docs is not None,
        row_ids=row_ids,
    )
    layout = layout if layout.device == home else layout.to(home, non_blocking=True)
    if not layout.has_slack:
        _mark_unbacked(layout.token_indices)
    return layout


def _offsets(lengths_Q: Tensor) -> Tensor:
    return torch.cat([lengths_Q.new_zeros(1), lengths_Q.cumsum(0)]).to(torch.int32)


def _any_hole(real_BS: Tensor) -> Tensor:
    """Whether a row has more than one run of tokens."""
    if real_BS.shape[1] < 3 or real_BS.shape[0] == 0:
        return torch.zeros((), dtype=torch.bool, device=real_BS.device)
    runs_B = (real_BS[:, 1:] & ~real_BS[:, :-1]).sum(1) + real_BS[:, 0]
    return (runs_B > 1).any()


def _refuse_overflow(count: Tensor, bound: int, name: str, what: str) -> None:
    """Refuse on the device, without a transfer; on a CPU the same assertion raises at once, as our error."""
    message = f"{name} must hold all {what}, but there are more than {bound}: raise it."
    if is_tracing(count) or count.device.type != "cpu":
        torch._assert_async(count <= bound, message)
        return
    try:
        torch._assert_async(count <= bound, message)
    except RuntimeError as error:
        raise LayoutError(message) from error


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy that does not wait: `torch.tensor(list, device="cuda")` blocks, a pinned copy does not."""
    if device.type == "cuda" and torch.cuda.is_available():
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


# -------------------------------------------------------------------- checks


def _describe(x: Any) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)} and layout {x.layout}" if isinstance(x, Tensor) else repr(type(x).__name__)


def _shorten(values: Sequence[int]) -> str:
    shown = ", ".join(str(v) for v in values[:8])
    return f"({shown}, ... {len(values) - 8} more)" if len(values) > 8 else f"({shown})"


def _check_rank(mask: Any, name: str) -> None:
    if not isinstance(mask, Tensor):
        raise DtypeError(f"`{name}` must be a tensor, but is {_describe(mask)}.")
    if mask.dim() != 2:
        raise LayoutError(
            f"`{name}` must have shape (B, S), but has shape {tuple(mask.shape)}: a mask of (B, 1, 1, S) or (B, S, S) "
            "says more than which tokens exist; reduce it to one flag a token."
        )


def _check_integer_vector(values: Tensor, name: str) -> None:
    if not isinstance(values, Tensor) or values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
        raise DtypeError(f"`{name}` must be a tensor of integers, but is {_describe(values)}.")
    if values.dim() != 1:
        raise LayoutError(f"`{name}` must be 1-D, but has shape {tuple(values.shape)}.")


def _host_lengths(lengths: Iterable[Any] | Tensor) -> tuple[int, ...]:
    values = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    for i, value in enumerate(values):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise DtypeError(f"`lengths[{i}]` must be an integer, but is {value!r}.")
        if value < 0:
            raise LayoutError(f"`lengths[{i}]` must be at least 0, but is {value}.")
    return tuple(int(value) for value in values)


def _check_offsets(offsets: list[int], padded_len: int | None, total: int | None) -> tuple[int, ...]:
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
        if padded_len is not None and length > padded_len:
            raise LayoutError(
                f"`padded_len` must be at least the longest sequence, but is {padded_len} and sequence {i} has {length} tokens."
            )
    if total is not None and offsets[-1] != total:
        raise LayoutError(f"`cu_seqlens[-1]` must be total = {total}, but is {offsets[-1]}.")
    return lengths


def _raise_bad_value(mask: Tensor, bad_BS: Tensor) -> NoReturn:
    row, column = (int(i) for i in bad_BS.nonzero()[0])
    value = mask[row, column].item()
    if mask.is_floating_point():
        raise LayoutError(
            f"`mask[{row}, {column}]` must be 0 (token), -inf or at most -1e4 (padding), but is {value}: a float mask is added to "
            f"the scores, and other values are a bias, not padding. Pass a bool mask; {_CONVENTIONS}."
        )
    raise LayoutError(f"`mask[{row}, {column}]` must be 0 or 1, but is {value}: pass (ids != pad_id).")


# -------------------------------------------------------------------- pytree

_TENSORS = ("cu_seqlens", "token_indices", "gather_indices", "row_ids")
_STATIC = tuple(f.name for f in fields(SeqLayout) if f.name not in _TENSORS)


def _flatten(layout: SeqLayout) -> tuple[list[Any], tuple[Any, ...]]:
    return [getattr(layout, name) for name in _TENSORS], tuple(getattr(layout, name) for name in _STATIC)


def _flatten_with_keys(layout: SeqLayout) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
    values, static = _flatten(layout)
    return [(pytree.GetAttrKey(name), value) for name, value in zip(_TENSORS, values, strict=True)], static


def _unflatten(values: Iterable[Any], static: tuple[Any, ...]) -> SeqLayout:
    return SeqLayout(**dict(zip(_TENSORS, values, strict=True)), **dict(zip(_STATIC, static, strict=True)))


pytree.register_pytree_node(
    SeqLayout,
    _flatten,
    _unflatten,
    serialized_type_name="varlen_attn.SeqLayout",
    to_dumpable_context=lambda static: [list(v) if isinstance(v, tuple) else v for v in static],
    from_dumpable_context=lambda static: tuple(tuple(v) if isinstance(v, list) else v for v in static),
    flatten_with_keys_fn=_flatten_with_keys,
)
