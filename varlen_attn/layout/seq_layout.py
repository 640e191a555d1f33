"""`SeqLayout`: which tokens of a padded batch are real, and where they are when packed.

With `build`, which makes its index tensors, the only file that knows masks and indices. Shape letters, here and in every other file:

====  ==========================================================
``B``  batch (rows of the padded tensor)
``S``  padded length (columns of the padded tensor)
``T``  packed rows: the real tokens, one sequence after another
``Q``  sequences (``Q == B``, except for several documents a row)
``N``  query heads        ``K``  key/value heads
``H``  head dimension     ``D``  model dimension
====  ==========================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, ClassVar, Literal, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .._torch import PLAIN, is_tracing, mark_unbacked, num_writes, pytree, ragged_dim, trace_quietly
from ..errors import ArgumentError, DtypeError, LayoutError
from .build import (
    Index,
    Step,
    exact,
    index_and_flags,
    index_of_all,
    index_of_documents,
    index_of_frames,
    index_of_mask,
    refuse_indices,
    refuse_offsets,
    refuse_shifted,
    to_device,
)
from .checks import (
    CONVENTIONS,
    MOST_ROWS,
    check_at_least,
    check_integer_vector,
    check_offsets,
    check_offsets_tensor,
    check_rank,
    check_takes_rows,
    describe,
    heads_first,
    host_lengths,
    refuse_distributed,
    shorten,
    signed_pad_value,
)
from .rows import STAND_INS, Edges, Pack, Unpack, gather_rows, place_rows, scatter_rows, take_rows, takes_formulas

Pooling = Literal["mean", "max", "sum", "first", "last"]
P = ParamSpec("P")
R = TypeVar("R")

_PADDING_THRESHOLD = -1e4  # an additive mask value at or below this is padding: covers finfo.min of float16


def _constructor(function: Callable[P, R]) -> Callable[P, R]:
    """Leave inference mode, so that a layout made or moved during evaluation can be saved for backward later."""

    @wraps(function)
    def build(*args: P.args, **kwargs: P.kwargs) -> R:
        trace_quietly()
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return build


@dataclass(frozen=True, eq=False, repr=False)
class SeqLayout:
    """Where the real tokens of a padded ``(B, S)`` batch are, and their order when packed.

    Make one with a constructor (`from_key_padding_mask`, `from_attention_mask`, `from_lengths`,
    `from_cu_seqlens`, `from_document_ids`, `from_batch_index`, `from_nested`), once per batch; share it between q, k, v,
    every layer, pooling and the loss. Frozen, hashed by identity, a pytree node.

    Attributes:
        batch_size: B.
        padded_len: S.
        max_seqlen: an upper bound of the longest sequence, never read back from a device.
        cu_seqlens: ``(Q+1,)`` int32, offsets of the sequences in the packed rows; starts at 0.
        token_indices: ``(T,)`` int64, the index of each packed row in the flattened ``B*S`` (0 for slack rows).
        gather_indices: ``(B*S,)`` int64, for each padded position its packed row plus 1; 0 at padding.
        lengths: the Q lengths, or None where only the device knows them.
        has_holes: whether a row has padding between two tokens; None where only the device knows.
        right_padded: whether all padding comes after the tokens of its row, so that columns are positions; None as above.
        holes: ``"refuse"`` or ``"packed"``: may distances count packed tokens although a row has holes?
        has_slack: capacity mode: T is fixed, and rows from ``cu_seqlens[-1]`` on hold nothing.
        row_ids: ``(Q,)`` the batch row of each document (-1 for unused ones); None unless made from documents.

    The equivalent of ``layout.pack(x)`` in plain PyTorch is ``x[~key_padding_mask]``, and of ``layout.unpack(y)``
    ``torch.zeros(B, S, D).masked_scatter(~key_padding_mask[..., None], y)``.

    Examples:
        >>> mask = torch.arange(4) >= torch.tensor([4, 1])[:, None]  # (B, S), True is padding
        >>> layout = SeqLayout.from_key_padding_mask(mask)
        >>> layout
        SeqLayout(B=2, S=4, Q=2, T=5, fill=0.62, lengths=(4, 1), device=cpu)
        >>> rows = layout.pack(torch.randn(2, 4, 16))  # (T, D)
        >>> layout.unpack(rows).shape, layout.pool(rows, "mean").shape
        (torch.Size([2, 4, 16]), torch.Size([2, 16]))
    """

    batch_size: int
    padded_len: int
    max_seqlen: int
    cu_seqlens: Tensor
    token_indices: Tensor
    gather_indices: Tensor
    lengths: tuple[int, ...] | None
    has_holes: bool | None
    right_padded: bool | None
    holes: Literal["refuse", "packed"] = "refuse"
    has_slack: bool = False
    row_ids: Tensor | None = None
    ranks: ClassVar[Any] = None  # who shares the rows, in a `RankRows`

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
            validate: warn (`LayoutWarning`) about what an inverted mask looks like: a row without a token while others have some, or
                several rows, none of them full, that all begin with padding.

        Raises:
            DtypeError: the mask is neither bool nor float.
            LayoutError: it is not 2-D, or a float mask has other values.
        """
        padding, bad = padding_of(mask)
        return cls._of(index_of_mask(~padding, bad, mask, capacity, validate, left_is_odd=True), mask.shape, holes)

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
        check_rank(mask, "mask")
        if mask.dtype == torch.bool:
            return cls._of(index_of_mask(mask, None, mask, capacity, validate), mask.shape, holes)
        if mask.is_floating_point() or mask.is_complex():
            raise DtypeError(
                f"`mask` must be bool or an integer dtype with values 0 and 1, but is {mask.dtype}. "
                f"{CONVENTIONS}; for an additive float mask call SeqLayout.from_key_padding_mask(mask)."
            )
        bad = (mask != 0) & (mask != 1)
        return cls._of(index_of_mask(mask == 1, bad, mask, capacity, validate), mask.shape, holes)

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
            padding_side: where the padding of the padded tensors is.
            device: of the index tensors; of ``lengths`` if that is a tensor, else the CPU.

        Raises:
            DtypeError, LayoutError: lengths are not integers, negative, or above ``padded_len``.
        """
        if isinstance(lengths, Tensor):
            device = lengths.device if device is None else device
            check_integer_vector(lengths, "lengths")
        values = host_lengths(lengths)
        longest = max(values, default=0)
        size = longest if padded_len is None else check_at_least(0, padded_len, "padded_len", error=LayoutError)
        if longest > size:
            raise LayoutError(
                f"`lengths[{values.index(longest)}]` must be at most padded_len = {size}, but is {longest}: "
                "give the number of columns of the padded tensors as `padded_len`."
            )
        if padding_side not in ("right", "left"):
            raise ArgumentError(f"`padding_side` must be 'right' or 'left', but is {padding_side!r}.")
        device = torch.device("cpu" if device is None else device)
        lengths_Q = to_device(torch.tensor(values, dtype=torch.int64, device="cpu"), device)
        columns_S = torch.arange(size, device=device)
        if padding_side == "left":
            real_BS = columns_S >= size - lengths_Q[:, None]
        else:
            real_BS = columns_S < lengths_Q[:, None]
        right_padded = padding_side == "right" or all(n in (0, size) for n in values)
        return cls._of(exact(real_BS, lengths_Q, values, has_holes=False, right_padded=right_padded), real_BS.shape)

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
        """From the offsets of packed sequences, as varlen kernels take them; padding is on the right.

        Args:
            cu_seqlens: ``(Q+1,)`` of any integer dtype: 0, then the running sum of the lengths.
            padded_len: S; the longest sequence if left out.
            total: the number of packed rows, ``cu_seqlens[-1]``.
            validate: read the offsets (one transfer from a device) and check them. False needs
                ``padded_len`` and ``total``, and reads nothing: what uses the layout refuses offsets that do not fit them.

        Raises:
            DtypeError, LayoutError: not a vector of integers, does not start at 0, decreases, ends elsewhere than ``total``,
                or has a sequence longer than ``padded_len``.
        """
        check_integer_vector(cu_seqlens, "cu_seqlens")
        if cu_seqlens.shape[0] == 0:
            raise LayoutError(
                "`cu_seqlens` must have Q+1 >= 1 entries, the first of them 0, but is empty: for no sequences pass torch.tensor([0])."
            )
        lengths = None
        if validate or padded_len is None or total is None:
            if is_tracing(cu_seqlens):
                raise ArgumentError(
                    "`cu_seqlens` cannot be read while tracing: pass `padded_len`, `total` and "
                    "`validate=False`, or build the layout outside the compiled function."
                )
            lengths = check_offsets(cu_seqlens.tolist(), padded_len, total)
            padded_len = max(lengths, default=0) if padded_len is None else int(padded_len)
            total = sum(lengths)
        wide = cu_seqlens.to(torch.int64).clamp(-1, MOST_ROWS)  # a wrong one stays wrong
        lengths_Q = wide.diff()
        real_BS = torch.arange(padded_len, device=cu_seqlens.device) < lengths_Q[:, None]
        index = exact(real_BS, lengths_Q, lengths, has_holes=False, right_padded=True, total=total)
        if lengths is not None:
            return cls._of(index, real_BS.shape)
        return cls._of(index._replace(cu_seqlens=wide.to(torch.int32)), real_BS.shape, known=False)

    @classmethod
    @_constructor
    def from_document_ids(cls, ids: Tensor, *, max_docs: int | None = None) -> SeqLayout:
        """Several documents in each row: a run of equal non-zero ids in one row is a document, a 0 is padding.

        Equal ids in two rows, or apart in one row, are different documents. Rows without ids add none;
        ``row_ids`` says which row each document came from.

        Args:
            ids: ``(B, S)`` of any integer dtype.
            max_docs: a fixed number of sequences: nothing is read from the device and all shapes are
                static (T is ``B*S``); unused sequences are empty. More documents are refused.
        """
        check_rank(ids, "ids")
        if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
            raise DtypeError(f"`ids` must have an integer dtype, but is {ids.dtype}: number the documents 1, 2, ...")
        return cls._of(
            index_of_documents(ids, None if max_docs is None else check_at_least(0, max_docs, "max_docs", error=LayoutError)), ids.shape
        )

    @classmethod
    @_constructor
    def from_batch_index(cls, batch: Tensor, num_graphs: int | None = None, *, padded_len: int | None = None) -> SeqLayout:
        """From the graph of each node, as graph libraries batch: ``data.batch`` of PyTorch Geometric. The nodes are the packed rows.

        Nothing has to be packed: node features ``(T, D)`` are rows of this layout. ``layout.unpack(x)`` is ``to_dense_batch(x, batch)[0]``.
        A vector on a device is read once.

        Args:
            batch: ``(T,)`` of any integer dtype, sorted: 0 for the nodes of the first graph, then 1, ...; a number that is left out is a
                graph without nodes.
            num_graphs: Q; the last number plus 1 if left out, so that graphs without nodes at the end are not counted. Needed for numbers
                from T + 2**24 on.
            padded_len: S; the largest graph if left out.

        Raises:
            DtypeError, LayoutError: not a vector of integers, not sorted, negative, or not below ``num_graphs``.

        Examples:
            >>> SeqLayout.from_batch_index(torch.tensor([0, 0, 0, 1, 3, 3]))
            SeqLayout(B=4, S=3, Q=4, T=6, fill=0.50, lengths=(3, 1, 0, 2), device=cpu)
        """
        check_integer_vector(batch, "batch")
        if is_tracing(batch):
            raise ArgumentError("`batch` cannot be read while tracing: build the layout outside of the compiled function.")
        least = 0 if num_graphs is None else check_at_least(0, num_graphs, "num_graphs", error=LayoutError)
        graphs = len(batch) + 2**24 if num_graphs is None else least  # a wild number would take all memory
        ids = batch.to("cpu", torch.int64)
        down = ids.diff() < 0
        if down.any():
            i = int(down.nonzero()[0])
            fix = "sort the nodes by graph (order = batch.argsort(stable=True)), with all that belongs to them"
            raise LayoutError(f"`batch` must be sorted, but batch[{i + 1}] = {ids[i + 1]} comes after {ids[i]}: {fix}.")
        ends = ids[[0, -1]].tolist() if len(ids) else [0, -1]
        if ends[0] < 0 or ends[1] >= graphs:
            last = f"{graphs - 1} without `num_graphs`" if num_graphs is None else f"num_graphs - 1 = {graphs - 1}"
            raise LayoutError(f"`batch` must hold numbers from 0 to {last}, but holds {ends[ends[0] >= 0]}: give the number of all graphs.")
        return cls.from_lengths(torch.bincount(ids, minlength=least), padded_len, device=batch.device)

    @classmethod
    @_constructor
    def from_nested(cls, nested: Tensor) -> SeqLayout:
        """From a jagged nested tensor ``(Q, j, ...)``: its offsets as they are; pack order is ``nested.values()``.

        Raises:
            LayoutError: not a jagged nested tensor, or one with gaps between its sequences.
        """
        if not isinstance(nested, Tensor) or not nested.is_nested or nested.layout != torch.jagged:
            raise LayoutError(
                f"`nested` must be a nested tensor with layout torch.jagged, but is {describe(nested)}: "
                "make one with torch.nested.as_nested_tensor(tensors, layout=torch.jagged)."
            )
        if ragged_dim(nested) != 1 or nested.lengths() is not None:  # type: ignore[attr-defined]
            raise LayoutError(
                "`nested` must hold its sequences one after another along dimension 1, but it is a "
                "transposed view or has gaps: call .contiguous() on it."
            )
        return cls.from_cu_seqlens(nested.offsets())  # type: ignore[attr-defined]

    @classmethod
    def _of(cls, index: Index, shape: Sequence[int], holes: Literal["refuse", "packed"] = "refuse", *, known: bool = True) -> SeqLayout:
        if holes not in ("refuse", "packed"):
            raise ArgumentError(f"`holes` must be 'refuse' or 'packed', but is {holes!r}.")
        batch_size, padded_len = shape
        made = cls(batch_size=batch_size, padded_len=padded_len, max_seqlen=padded_len, holes=holes, **index._asdict())
        return made._trusted() if known else made

    # ---------------------------------------------------------------- facts

    @property
    def num_seqs(self) -> int:
        """Q, the number of sequences."""
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
    def whole(self) -> SeqLayout:
        """Of the rows of all ranks."""
        return self

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
        """Whether the host knows of no padding: packed is ``x.reshape(B*S, ...)`` then. False in a graph, which is for all lengths."""
        if torch.compiler.is_compiling() or self.lengths is None or self.lengths != (self.padded_len,) * self.batch_size:
            return False
        return not is_tracing(self.cu_seqlens)

    @property
    def seq_ids(self) -> Tensor:
        """``(T,)`` int64: the sequence of each packed row; Q for slack rows."""
        self._check_tensors(again=True)
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
        self._check_tensors(again=True)
        return torch.arange(self.num_rows, device=self.device) < self.cu_seqlens[-1]

    def padding_mask(self) -> Tensor:
        """``(B, S)`` bool: torch's ``key_padding_mask``, True at padding."""
        return (self.gather_indices == 0).view(self.batch_size, self.padded_len)

    def counts(self) -> Tensor:
        """``(B, S)``: the position of each token in its sequence; of padding that of the token before, or -1."""
        if self.is_dense:
            return torch.arange(self.padded_len, device=self.device).expand(self.batch_size, self.padded_len)
        return (~self.padding_mask()).to(torch.int64).cumsum(1) - 1

    # ---------------------------------------------------------------- packing

    def pack(self, x: Tensor) -> Tensor:
        """``(B, S, ...) -> (T, ...)``: the real tokens, contiguous, any dtype; the backward of `unpack`.

        Raises:
            LayoutError: ``x`` does not begin with ``(B, S)``, or is on another device.
            DtypeError: it is quantised in a way that torch cannot select rows of.
        """
        self._check(x, (self.batch_size, self.padded_len), "x")
        if x.dtype in STAND_INS:
            return self.pack(x.view(STAND_INS[x.dtype])).view(x.dtype)
        flat = x.reshape(self.batch_size * self.padded_len, *x.shape[2:])
        valid_T = self.valid_rows() if self.has_slack else None
        if takes_formulas(x, packed=False):
            return gather_rows(flat, self.token_indices, valid_T)
        if torch.is_grad_enabled() and x.requires_grad:
            packed: Tensor = Pack.apply(flat, self.token_indices, self.gather_indices, valid_T)
            return packed
        return take_rows(flat, self.token_indices, valid_T)

    def unpack(self, x: Tensor, pad_value: float | Literal["edge"] = 0) -> Tensor:
        """``(T, ...) -> (B, S, ...)``: tokens at their places, ``pad_value`` at padding; the backward of `pack`.

        ``"edge"`` repeats tokens: padding holds what the nearest token before it in its row holds, else the first one after it, and takes
        no gradient. A row without any token is 0.

        Raises:
            LayoutError: ``x`` does not have T rows, or is on another device.
            ArgumentError: ``pad_value`` is no number of the dtype of ``x``.
            DtypeError: ``x`` is quantised in a way that torch cannot select rows of.
        """
        self._check(x, (self.token_indices.shape[0],), "x")
        edges = None
        if isinstance(pad_value, str):
            edges, pad_value = self._edges(pad_value), 0
        exact = not (x.is_floating_point() or x.is_complex() or x.is_quantized)
        if exact and pad_value % 1 != 0:
            raise ArgumentError(f"`pad_value` must be an integer for a tensor of {x.dtype}, but is {pad_value}.")
        value = int(pad_value) if exact else pad_value
        if x.dtype in STAND_INS:
            return self.unpack(x.view(STAND_INS[x.dtype]), "edge" if edges else signed_pad_value(value, x.dtype)).view(x.dtype)
        if takes_formulas(x, packed=True):
            padded = scatter_rows(x, self.gather_indices, value)
            if edges is not None:
                padding = (self.gather_indices == 0).view(-1, *[1] * (x.dim() - 1))
                padded = torch.where(padding, edges.rows_of(x.detach()), padded)
        else:
            valid_T = self.valid_rows() if self.has_slack else None
            if torch.is_grad_enabled() and x.requires_grad:
                padded = Unpack.apply(x, self.token_indices, self.gather_indices, valid_T, value, edges)
            elif edges is not None:
                padded = edges.rows_of(x)
            else:
                padded = place_rows(x, self.token_indices, self.gather_indices, valid_T, value)
        return padded.reshape(self.batch_size, self.padded_len, *x.shape[1:])

    @_constructor
    def _edges(self, how: str) -> Edges:
        """Kept for a layout, except where its tensors may be written to."""
        if how != "edge":
            raise ArgumentError(f'`pad_value` must be a number or "edge", but is {how!r}.')
        traced = is_tracing(self.cu_seqlens)
        known = None if traced else _edges.get(self)
        if known is None:
            empty = traced or self.lengths is None or 0 in self.lengths or self.row_ids is not None
            known = Edges.of(self.gather_indices.view(self.batch_size, self.padded_len), leading=not self.right_padded, empty=empty)
            if not (traced or self.has_slack or is_captured(self.cu_seqlens)):
                _edges[self] = known
        return known

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(T, ...) -> Q`` views, one for each sequence. Needs lengths on the host."""
        self._check(x, (self.num_rows,), "x")
        self._check_tensors(again=True, traced=True)
        if self.lengths is None:
            raise LayoutError(
                "split needs the lengths on the host, but only the device knows them: build the layout from lengths, or without `capacity`."
            )
        views: tuple[Tensor, ...] = x[: self.total].split(list(self.lengths))
        return views

    def to_nested(self, x: Tensor) -> Tensor:
        """``(T, ...) -> (Q, j, ...)``: a jagged nested tensor over the same memory."""
        self._check(x, (self.num_rows,), "x")
        self._check_tensors(again=True, traced=True)
        bounds: dict[str, Any] = {}
        if self.lengths is not None:
            bounds = {"min_seqlen": min(self.lengths, default=0), "max_seqlen": max(self.lengths, default=0)}
        offsets = self.cu_seqlens.to(torch.int64)
        return torch.nested.nested_tensor_from_jagged(x.view_as(x), offsets=offsets, **bounds)  # torch marks what it is given

    def pool(self, x: Tensor, how: Pooling) -> Tensor:
        """``(T, ...) -> (Q, ...)``: mean, max, sum, first or last token of each sequence; 0 for an empty one.

        Losses of tokens ``(T,)`` become one for each sequence: ``layout.pool(F.cross_entropy(logits, targets, reduction="none"),
        "mean").mean()`` lets every sequence count alike, whatever its length.

        Sums and means of half precision and less accumulate in float32. The mean in plain PyTorch:
        ``(padded * real[..., None]).sum(1) / real.sum(1, keepdim=True)``.
        """
        self._check(x, (self.num_rows,), "x")
        self._check_tensors(again=True, traced=True)
        offsets = self.cu_seqlens.to(torch.int64)
        lengths_Q1 = offsets.diff().view(-1, *[1] * (x.dim() - 1))
        if how in ("first", "last"):
            row_Q = offsets[:-1] + 1 if how == "first" else offsets[1:]
            if x.dtype in STAND_INS:
                return self.pool(x.view(STAND_INS[x.dtype]), how).view(x.dtype)
            return scatter_rows(x, torch.where(offsets.diff() > 0, row_Q, 0), 0)
        if how not in ("mean", "max", "sum"):
            raise ArgumentError(f"`how` must be one of 'mean', 'max', 'sum', 'first', 'last', but is {how!r}.")
        if not x.is_floating_point() or x.dtype in STAND_INS:
            raise DtypeError(f"`x` must be floating-point for how={how!r}, but is {x.dtype}: convert it with x.float().")
        wide = x.float() if x.element_size() < 4 else x
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
        self._check_tensors(again=True)
        known = self.lengths is not None and not is_tracing(self.cu_seqlens)
        size = max(self.lengths or (), default=0) if known else self.max_seqlen
        offsets = self.cu_seqlens.to(torch.int64)
        columns_S = torch.arange(size, device=self.device)
        real_QS = columns_S < offsets.diff()[:, None]
        gather_QS = torch.where(real_QS, offsets[:-1, None] + columns_S + 1, 0)
        token_indices = torch.where(self.valid_rows(), self.seq_ids * size + self.positions, 0)
        return self._with(
            batch_size=self.num_seqs,
            padded_len=size,
            max_seqlen=size,
            token_indices=token_indices,
            gather_indices=gather_QS.reshape(-1),
            has_holes=None if self.has_holes is None else False,
            right_padded=True,
            row_ids=None,
        )

    @_constructor
    def downsample(self, kernel: int, stride: int, padding: int = 0, dilation: int = 1) -> SeqLayout:
        """The layout of the frames after a strided 1-D convolution over time; one call for each of several convolutions.

        A sequence of ``l`` tokens gives ``(l + 2*padding - dilation*(kernel-1) - 1) // stride + 1`` frames, what `torch.nn.Conv1d`
        makes of that sample alone, and S becomes what it makes of S columns. Where torch refuses the sample alone there is
        no frame: a sequence too short for one gives 0, and an empty sequence always gives 0, also where ``padding`` is so wide
        that a padded batch would have frames of nothing but padding.

        Nothing is read from a device. Where only the device knows the lengths, shapes are static: T is an upper bound for any
        lengths, and the result has slack rows. ``holes`` is kept. The equivalent in plain PyTorch::

            frames = torch.where(lengths > 0, ((lengths + 2*padding - dilation*(kernel-1) - 1) // stride + 1).clamp(min=0), 0)

        Raises:
            ArgumentError: not integers, or kernel, stride or dilation below 1, or padding below 0.
            LayoutError: padding is before or between tokens, so that frames do not start at a token, or rows hold several
                documents, which a convolution would mix.
        """
        fix = "of an nn.Conv1d pass conv.{}[0], not the tuple"
        step = Step(
            check_at_least(1, kernel, "kernel", fix.format("kernel_size")),
            check_at_least(1, stride, "stride", fix.format("stride")),
            check_at_least(0, padding, "padding", "it counts the zeros on each side; 'same' with stride 1 needs no other layout"),
            check_at_least(1, dilation, "dilation", fix.format("dilation")),
        )
        self._check_tensors(again=True)
        self._check_frames_start_at_tokens()
        size, traced = step.frames(self.padded_len), is_tracing(self.cu_seqlens)
        if not traced and self.lengths is not None:
            frames = type(self).from_lengths([step.frames(n) for n in self.lengths], size, device=self.device)
            return frames._with(holes=self.holes)
        capacity = None
        if self.has_slack or not traced:
            capacity = min(step.most_frames(self.num_rows, self.batch_size), self.batch_size * size)
        frames_B = step.frames_of_each(self.cu_seqlens.to(torch.int64).diff())
        return self._of(index_of_frames(frames_B, size, capacity), (self.batch_size, size), self.holes)

    # ---------------------------------------------------------------- moving and updating

    @_constructor
    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SeqLayout:
        """The same layout with its index tensors on ``device``."""
        if self.device.type == "cpu":
            self._check_tensors()  # where it costs no wait
        moved = self._map_tensors(lambda t: t.to(device, non_blocking=non_blocking))
        if moved.token_indices is not self.token_indices and not moved.has_slack:
            mark_unbacked(moved.token_indices)
        return moved

    @_constructor
    def pin_memory(self) -> SeqLayout:
        """The same layout in page-locked memory, for a non-blocking copy to a GPU."""
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
        known = "on the device only" if self.lengths is None else shorten(self.lengths)
        fill = "" if self.fill is None else f", fill={self.fill:.2f}"
        extras = "".join(
            f", {text}"
            for text, shown in (
                (f"holes={self.holes!r}", bool(self.has_holes)),
                ("capacity=T", self.has_slack),
                (f"row_ids={shorten(self.row_ids.tolist()) if self.row_ids is not None else ()}", self.row_ids is not None),
            )
            if shown
        )
        return (
            f"SeqLayout(B={self.batch_size}, S={self.padded_len}, Q={self.num_seqs}, T={self.num_rows}{fill}, "
            f"lengths={known}{extras}, device={self.device})"
        )

    def _repr_html_(self) -> str:
        """The batch as coloured cells, a row each, a colour for each sequence in turn; a cell of a wide batch is the first of several."""
        step = -(-self.padded_len // 96) or 1
        cells = self.unpack(self.seq_ids + 1)[:32, ::step].tolist()
        rows = ["".join(f'<td style="background:{_COLOURS[cell and 1 + cell % 2]}"></td>' for cell in row) for row in cells]
        style = "border-collapse:collapse;line-height:9px;display:inline-table"
        return f"<pre>{self}</pre><table style='{style}'>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; without the index tensors."""
        names = ("batch_size", "padded_len", "num_seqs", "num_rows", "lengths", "fill", "has_holes", "right_padded", "holes", "has_slack")
        return {name: getattr(self, name) for name in names} | {"device": str(self.device)}

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> SeqLayout:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: function(v) for k, v in tensors.items() if isinstance(v, Tensor)}
        return self._with(**changed)

    def _with(self, **changed: Any) -> SeqLayout:
        """Other values that belong together as those of this layout do."""
        return replace(self, **changed)._trusted()

    def _trusted(self) -> SeqLayout:
        """This layout, whose tensors belong together as they are now."""
        if not is_tracing(self.cu_seqlens) and not self.cu_seqlens.is_inference():
            _known[self] = num_writes(self.cu_seqlens)
        return self

    def _part(self, sequences: slice) -> SeqLayout:
        """Some sequences, whose offsets still count from the first row of all: for kernels, and not checked."""
        part = replace(self, cu_seqlens=self.cu_seqlens[sequences.start : sequences.stop + 1])
        _known[part] = _UNCHECKED
        return part

    def _check_tensors(self, *, again: bool = False, traced: bool = False) -> None:
        """Refuse tensors that do not belong together. No constructor makes such, but `dataclasses.replace`, altered pickles and writes to
        the offsets do.

        Once for each layout, and where torch has counted a write since. Some writes it does not count, so what reads the offsets checks
        them ``again`` on a CPU, and in graphs if ``traced``. A CUDA graph that is captured after the first call holds no check.
        """
        cu, is_traced = self.cu_seqlens, is_tracing(self.cu_seqlens)
        at = None if is_traced else _known.get(self)
        known = at is not None and not cu.is_inference() and at == num_writes(cu)
        if at == _UNCHECKED or (known and (cu.is_cuda or not again)) or (is_traced and not traced):
            return
        check_offsets_tensor(cu)
        refuse_offsets(cu, self.num_rows, self.max_seqlen, slack=self.has_slack, lengths=None if is_traced else self.lengths)
        if not known and not is_traced:
            index = Index(**{name: getattr(self, name) for name in Index._fields})
            refuse_indices(index, self.batch_size, self.padded_len, self.max_seqlen)
            self._trusted()

    def _check(self, x: Tensor, leading: tuple[int, ...], name: str) -> None:
        if torch.compiler.is_compiling():  # sizes that are data cannot be compared while tracing, but asserted at run time
            for have, need in zip(x.shape, leading, strict=False):
                torch._check(have == need)
            return
        if tuple(x.shape[: len(leading)]) != leading:
            expected = "x".join(str(n) for n in leading)
            # One frame too many or too few is the classic of masks that were divided where features were convolved.
            frames = heads_first(x, leading, name)
            if not frames and len(leading) == 2 and x.dim() >= 2 and x.shape[0] == leading[0]:
                frames = (
                    f" It has {x.shape[1]} columns where the layout has {leading[1]}: for the frames of a convolution over time, "
                    "take layout.downsample(kernel, stride, padding) of the layout before it."
                )
            raise LayoutError(
                f"`{name}` must begin with {expected} (this layout has B={self.batch_size}, S={self.padded_len}, "
                f"T={self.num_rows}), but has shape {tuple(x.shape)}. Nothing is sliced to fit: build the layout "
                f"from the mask that belongs to this tensor.{frames}"
            )
        if x.is_quantized:
            check_takes_rows(x, name, self.has_slack)
        if type(x) not in PLAIN:
            refuse_distributed(x, name)
        if x.device != self.cu_seqlens.device:
            raise LayoutError(
                f"`{name}` is on {x.device}, but the layout is on {self.device}: call layout.to({str(x.device)!r}) once per batch."
            )
        if self.cu_seqlens.is_inference() or _known.get(self) != num_writes(self.cu_seqlens):  # asked here, because this is every call
            self._check_tensors()

    def _check_frames_start_at_tokens(self) -> None:
        way_out = "layout.compact() has the same packed rows, with every sequence in a row of its own from column 0"
        if self.row_ids is not None:
            raise LayoutError(
                "`layout` must have one sequence a row to be downsampled, but has several documents a row: "
                f"downsample layout.compact() instead. {way_out}."
            )
        if self.right_padded:
            return
        where = "between" if self.has_holes else "before"
        message = (
            f"`layout` must have all padding on the right to be downsampled, but has padding {where} tokens, so that frames do not "
            f"start at a token: pad on the right, or downsample layout.compact(). {way_out}."
        )
        if self.right_padded is False:
            raise LayoutError(message)
        refuse_shifted(~self.padding_mask(), message)


# The version of the offsets at which the tensors of a layout were found to belong together. Not an attribute, which a pickle would carry.
_known: WeakKeyDictionary[SeqLayout, int] = WeakKeyDictionary()
_edges: WeakKeyDictionary[SeqLayout, Edges] = WeakKeyDictionary()
_UNCHECKED = -1
_COLOURS = ("#eeeeee", "#4c78a8", "#9ecae9")  # of padding, and of sequences in turn


def is_captured(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, whose memory must not be kept."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def padding_of(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where a ``key_padding_mask (B, S)`` says padding, and where it holds what no mask of padding may; None where that cannot be."""
    check_rank(mask, "mask")
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        raise DtypeError(
            f"`mask` must be bool or float, but is {mask.dtype}: only bool and floating types of "
            f"key_padding_mask are supported. {CONVENTIONS}; for a 0/1 mask of tokens call "
            "SeqLayout.from_attention_mask(mask), for one of padding pass mask.bool()."
        )
    padding = mask <= _PADDING_THRESHOLD
    return padding, ~(padding | (mask == 0))


def moved(layout: SeqLayout, device: torch.device) -> SeqLayout:
    """``layout`` on ``device``. To a GPU only the index tensors move, without waiting; the lengths stay on the host."""
    if layout.cu_seqlens.device == device:
        return layout
    if layout.device.type == "cpu" and device.type == "cuda":
        return layout.pin_memory().to(device, non_blocking=True)
    return layout.to(device)


def layout_of_all(batch_size: int, padded_len: int, device: torch.device) -> SeqLayout:
    """Nothing is padded, and nothing is known on the host: for graphs."""
    return SeqLayout._of(index_of_all(batch_size, padded_len, device), (batch_size, padded_len))


def layout_and_flags(real_BS: Tensor, flags: Sequence[Tensor] = ()) -> tuple[SeqLayout, tuple[bool, ...]]:
    """The layout of a mask that is True at tokens, and bool scalars of the caller, in the one transfer of a device mask."""
    index, values = index_and_flags(real_BS, flags, validate=True)
    return SeqLayout._of(index, real_BS.shape), values


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
# For `torch.load`, which is told what it may make of a file: tensors and numbers, which every call checks against its own.
torch.serialization.add_safe_globals([SeqLayout])
