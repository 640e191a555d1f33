"""The index tensors of a `SeqLayout`, built on the device of the mask with at most one transfer from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch import assert_async, in_make_fx, is_plain, is_tracing, is_unreadable, mark_unbacked
from ..errors import ArgumentError, LayoutError, LayoutWarning, warn
from .checks import CONVENTIONS, check_offsets, is_integer, raise_bad_value, refuse_distributed, shorten


class Index(NamedTuple):
    """Where the tokens are; the fields are those of `SeqLayout`."""

    cu_seqlens: Tensor
    token_indices: Tensor
    gather_indices: Tensor
    lengths: tuple[int, ...] | None = None
    has_holes: bool | None = None
    right_padded: bool | None = None
    has_slack: bool = False
    row_ids: Tensor | None = None


class Step(NamedTuple):
    """A 1-D convolution over time, as far as it decides how many frames a sequence gives."""

    kernel: int
    stride: int
    padding: int
    dilation: int

    @property
    def reach(self) -> int:
        """The shortest sequence that gives a frame; 0 and below where padding alone would fill one."""
        return self.dilation * (self.kernel - 1) + 1 - 2 * self.padding

    def frames(self, length: int) -> int:
        return max(0, (length - self.reach) // self.stride + 1) if length > 0 else 0

    def frames_of_each(self, lengths_Q: Tensor) -> Tensor:
        return torch.where(lengths_Q > 0, ((lengths_Q - self.reach) // self.stride + 1).clamp(min=0), 0)

    def most_frames(self, tokens: int, seqs: int) -> int:
        """An upper bound for lengths of this sum: each of ``seqs`` sequences rounds up once, and each token counts one ``stride``-th."""
        return (tokens + min(tokens, seqs) * max(self.stride - self.reach, 0)) // self.stride


def index_of_mask(
    real_BS: Tensor, bad_BS: Tensor | None, mask: Tensor, capacity: int | None, validate: bool, left_is_odd: bool = False
) -> Index:
    """From a mask that is True at tokens; reads from the device at most once. ``bad_BS`` marks illegal values of ``mask``.

    Where masks say which token to attend to, padding on the left is common; where they say padding, it may be ``left_is_odd``."""
    if bad_BS is not None and (capacity is not None or is_tracing(mask)):
        # Nothing is read here, so the device itself refuses.
        refuse_bad_values(bad_BS)
        bad_BS = None
    if capacity is not None:
        return with_capacity(real_BS, capacity)
    flags = () if bad_BS is None else (bad_BS.any(),)
    index, values = index_and_flags(real_BS, flags, validate=validate, left_is_odd=left_is_odd)
    if any(values) and bad_BS is not None:
        raise_bad_value(mask, bad_BS)
    return index


def index_and_flags(
    real_BS: Tensor, flags: Sequence[Tensor], *, validate: bool, left_is_odd: bool = False
) -> tuple[Index, tuple[bool, ...]]:
    """The index of a mask that is True at tokens, and bool scalars of the caller, in the one transfer of a device mask.

    While tracing nothing is read: no flag comes back.
    """
    if not is_plain(real_BS):
        _check_readable(real_BS)
    lengths_B: Tensor | None = None
    if is_tracing(real_BS):
        return exact(real_BS, real_BS.sum(1)), ()
    values: list[int] = []
    if real_BS.is_cpu and not flags and real_BS.numel() <= _FEW:
        lengths, some_hole, shifted = [], False, 0
        for row in map(bytes, real_BS.tolist()):
            lengths.append(n := row.count(1))
            some_hole |= len(row.strip(b"\0")) > n
            shifted += len(row.rstrip(b"\0")) > n
    else:
        lengths_B = real_BS.sum(1)
        read = torch.cat([lengths_B, torch.stack([*_forms(real_BS), *flags]).to(torch.int64)]).tolist()
        lengths, (some_hole, shifted, *values) = read[: len(real_BS)], read[len(real_BS) :]
    looks, otherwise = "", ""
    if validate and 0 in lengths and any(lengths):
        looks = f"row {lengths.index(0)} of the mask has no token while others have some"
    elif validate and left_is_odd and not some_hole and shifted == len(lengths) > 1 and max(lengths) < real_BS.shape[1]:
        looks, otherwise = "every row of the mask begins with padding, and none is full", ", or padding is on the left"
    if looks:
        warn(
            f"{looks}. If that is not meant, the mask is inverted{otherwise}: {CONVENTIONS}. validate=False, or a warning filter for "
            "LayoutWarning, silences this.",
            LayoutWarning,
        )
    index = exact(real_BS, lengths_B, tuple(lengths), has_holes=bool(some_hole), right_padded=not shifted)
    return index, tuple(map(bool, values))


def _check_readable(mask: Tensor) -> None:
    """The number of packed rows is data: in `torch.compile` and `torch.jit.trace` too, and in `make_fx` on fake tensors."""
    if torch.compiler.is_compiling():
        return
    refuse_distributed(mask, "mask")
    instead = "pass the mask itself to a module, to varlen_mha or to padded_attention, or give `capacity` (`max_docs` for documents)"
    if is_unreadable(mask):
        raise ArgumentError(
            "`mask` must have values that can be read, because the number of packed rows depends on them, but is mapped by torch.vmap, "
            f"inside of torch.func.functionalize, on the meta device or fake: {instead}."
        )
    if in_make_fx() and type(mask) is Tensor:
        warn(
            "make_fx records the number of tokens of `mask` as a constant: the graph will raise for masks with more or fewer of them. "
            f'For a graph of all masks {instead}, or record with tracing_mode="symbolic".',
            LayoutWarning,
        )


_FEW = 1024  # of a mask's numbers: those are looked at one by one in less time than by a dozen operations (Zen 4)


def exact(
    real_BS: Tensor,
    lengths_Q: Tensor | None,
    lengths: tuple[int, ...] | None = None,
    *,
    has_holes: bool | None = None,
    right_padded: bool | None = None,
    total: int | None = None,
) -> Index:
    """T is the number of real tokens; one sequence a row. ``lengths_Q`` may be None on a CPU, where ``lengths`` say it."""
    flat = real_BS.reshape(-1)
    total = sum(lengths) if lengths is not None else total
    if total is None:
        token_indices = flat.nonzero().squeeze(1)
    else:
        token_indices = torch.nonzero_static(flat, size=total).squeeze(1)
    mark_unbacked(token_indices)
    return Index(
        _offsets(lengths or () if lengths_Q is None else lengths_Q),
        token_indices,
        flat.cumsum(0).mul_(flat),
        lengths,
        has_holes,
        right_padded,
    )


def index_of_all(batch_size: int, padded_len: int, device: torch.device) -> Index:
    """Where nothing is padded, from sizes alone: in a graph with dynamic shapes these are no numbers that a list could hold."""
    rows = torch.arange(batch_size * padded_len, device=device)
    offsets = torch.arange(batch_size + 1, device=device, dtype=torch.int32) * padded_len
    return Index(offsets, rows, rows + 1, lengths=None, has_holes=False, right_padded=True)


def index_of_frames(lengths_B: Tensor, padded_len: int, capacity: int | None) -> Index:
    """From lengths that only the device knows, padding on the right; with ``capacity`` shapes are static."""
    real_BS = torch.arange(padded_len, device=lengths_B.device) < lengths_B[:, None]
    if capacity is not None:
        return with_capacity(real_BS, capacity)
    return exact(real_BS, lengths_B, has_holes=False, right_padded=True)


def refuse_bad_values(bad_BS: Tensor) -> None:
    """Illegal values of a mask, where only the device knows."""
    assert_on_device(~bad_BS.any(), "`mask` must hold 0 (or 1, for a mask of tokens), -inf or at most -1e4, but has other values.")


def refuse_shifted(real_BS: Tensor, message: str) -> None:
    """A row with padding before a token, where only the device knows."""
    assert_on_device(_forms(real_BS)[1] == 0, message)


def refuse_offsets(cu: Tensor, rows: int, longest: int, *, slack: bool = False, lengths: Sequence[int] | None = None) -> None:
    """Offsets (int32) of other rows than these, of a sequence above ``longest``, or of other ``lengths``. Nothing is read: on a GPU the
    device refuses, by the extremes of ``lengths`` only.
    """
    num_seqs, least = cu.shape[0] - 1, 0
    if lengths is not None:
        least, most, total = min(lengths, default=0), max(lengths, default=0), sum(lengths)
        if len(lengths) != num_seqs or most > longest or total > rows or (total < rows and not slack):
            raise LayoutError(
                f"`lengths` must be those of the {num_seqs} sequences in `cu_seqlens`, none above {longest}, with a sum of {rows}, but are "
                f"{shorten(lengths)}: build a layout for other sequences."
            )
        longest = most
    if lengths is not None and cu.device.type == "cpu":
        holds = (cu == torch.tensor([0, *itertools.accumulate(lengths)], dtype=cu.dtype, device="cpu")).all()
    else:
        offsets = cu.to(torch.int64)
        end = offsets[-1]
        holds = (offsets[0] == 0) & ((end <= rows) if slack else (end == rows))
        if num_seqs:
            shortest_one, longest_one = offsets.diff().aminmax()
            holds = holds & (shortest_one >= least) & (longest_one <= longest)
    assert_on_device(
        holds,
        "`cu_seqlens` must be 0 and then the running sum of the lengths of the packed rows, none above `max_seqlen`, and those in "
        "`lengths` where that is known: build a layout for other sequences, and do not write to the tensors of this one.",
        lambda: check_offsets(cu.tolist(), longest, rows, slack),
    )


def refuse_indices(index: Index, batch_size: int, padded_len: int, longest: int) -> None:
    """Indices that do not bring each packed row to the padded row of its sequence and back, likewise; the offsets are right."""
    slots, offsets = batch_size * padded_len, index.cu_seqlens.to(torch.int64)
    devices = {x.device for x in index if isinstance(x, Tensor)}
    if index.gather_indices.shape != (slots,) or longest > padded_len or len(devices) > 1:
        raise LayoutError(
            f"`gather_indices` must have B*S = {batch_size}*{padded_len} entries, `max_seqlen` be at most S, and all be on one device, but "
            f"they are {tuple(index.gather_indices.shape)}, {longest} and on {', '.join(map(str, devices))}: use a constructor."
        )
    rows_T = torch.arange(index.token_indices.shape[0], device=offsets.device)
    home_Q = rows_T.new_zeros(1).repeat(offsets.shape[0])  # one more, for slack rows
    home_Q[:-1] = torch.arange(offsets.shape[0] - 1, device=offsets.device) if index.row_ids is None else index.row_ids
    from_T = index.token_indices.clamp(0, max(slots - 1, 0))
    home_T = home_Q[torch.searchsorted(offsets[1:].contiguous(), rows_T, right=True)]
    fits_T = (from_T == index.token_indices) & (from_T // max(padded_len, 1) == home_T)
    if slots:
        fits_T &= index.gather_indices.index_select(0, from_T) == rows_T + 1
    assert_on_device(
        (fits_T | (rows_T >= offsets[-1])).all() & ((index.gather_indices != 0).sum() == offsets[-1]),
        "`token_indices` and `gather_indices` must say where each packed row of `cu_seqlens` is in the padded tensor, but belong to "
        "another layout: build one from the mask or the lengths, and do not write to its tensors.",
    )


def with_capacity(real_BS: Tensor, capacity: int) -> Index:
    """T is ``capacity``; nothing is read from the device."""
    if not is_integer(capacity) or capacity < 0:
        raise ArgumentError(f"`capacity` must be an integer of at least 0, but is {capacity!r}.")
    flat, lengths_B = real_BS.reshape(-1), real_BS.sum(1)
    rank = flat.cumsum(0)  # packed row + 1, at tokens
    _refuse_overflow(lengths_B.sum(), capacity, "`capacity`", "tokens")
    slot = torch.where(flat, (rank - 1).clamp(max=capacity), capacity)
    token_indices = torch.zeros(capacity + 1, dtype=torch.int64, device=flat.device)
    token_indices = token_indices.scatter(0, slot, torch.arange(flat.shape[0], device=flat.device))
    return Index(_offsets(lengths_B), token_indices[:capacity].clone(), rank * flat, has_slack=True)


def index_of_documents(ids: Tensor, max_docs: int | None) -> Index:
    size, padded_len = ids.shape
    home = ids.device
    if max_docs is None:
        _check_readable(ids)
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
        token_indices = with_capacity(real_BS, flat.shape[0]).token_indices
    if max_docs is None:
        token_indices = to_device(token_indices, home)
        mark_unbacked(token_indices)
    return Index(
        cu_seqlens=to_device(cu_seqlens, home),
        token_indices=token_indices,
        gather_indices=to_device(rank * flat, home),
        lengths=lengths,
        has_holes=False,
        right_padded=False,
        has_slack=max_docs is not None,
        row_ids=to_device(row_ids, home),
    )


def _offsets(lengths_Q: Tensor | tuple[int, ...]) -> Tensor:
    if isinstance(lengths_Q, tuple):
        return torch.tensor([0, *itertools.accumulate(lengths_Q)], dtype=torch.int32, device="cpu")
    return torch.cat([lengths_Q.new_zeros(1), lengths_Q.cumsum(0)]).to(torch.int32)


def _forms(real_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a row has more than one run of tokens, and how many runs begin after padding."""
    if real_BS.shape[1] < 2 or real_BS.shape[0] == 0:
        return (torch.zeros((), dtype=torch.bool, device=real_BS.device),) * 2
    starts = real_BS[:, 1:] & ~real_BS[:, :-1]
    return (starts.sum(1) + real_BS[:, 0] > 1).any(), starts.sum()


def _refuse_overflow(count: Tensor, bound: int, name: str, what: str) -> None:
    # A size in a message would be a constant of the graph: traced, there is one message for all.
    more = "more" if is_tracing(count) else f"more than {bound}"
    assert_on_device(count <= bound, f"{name} must hold all {what}, but there are {more}: raise it.")


def assert_on_device(holds: Tensor, message: str, explain: Callable[[], object] | None = None) -> None:
    """Refuse on the device, without a transfer; on a CPU the same assertion raises at once, as our error, or that of ``explain``."""
    if is_tracing(holds) or holds.device.type != "cpu":
        assert_async(holds, message)
        return
    try:
        assert_async(holds, message)
    except RuntimeError as error:
        if explain is not None:
            explain()
        raise LayoutError(message) from error


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Where it is needed, without waiting: `torch.tensor(list, device="cuda")` blocks, a copy from page-locked memory does not."""
    if host.device == device:
        return host
    if device.type == "cuda" and torch.cuda.is_available():
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)
