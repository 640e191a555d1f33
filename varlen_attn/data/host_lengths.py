"""`HostLengths`: a small index tensor of a batch that remembers the lengths it was made from, so that nobody reads it back.

A mask that a data loader made on the host is all that a model on a device gets to see, and to pack, the model would have to read it.
A tensor that carries its lengths goes through loaders, `Trainer` and accelerate as any other does, because it is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..layout.checks import check_rank, host_lengths
from ..layout.seq_layout import SeqLayout

Kind = Literal["mask", "offsets"]
Side = Literal["right", "left"]

_SIDES: tuple[Side, ...] = ("right", "left")
_OFFSET_DTYPES = (torch.int32, torch.int64)  # in others offsets overflow or are rounded
_DATA: Any = Tensor.data  # a property, which the stub calls a tensor

_CONVERSIONS = frozenset(
    (
        Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.pin_memory, Tensor.bool, Tensor.int, Tensor.long, Tensor.clone, Tensor.contiguous,
        Tensor.detach, torch.clone, torch.detach,
    )
)  # fmt: skip
# What writes, or lets others write, where torch's count of writes does not see it.
_UNCOUNTED = frozenset(
    (
        Tensor.apply_, Tensor.map_, Tensor.map2_, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.storage, Tensor.untyped_storage,
        _DATA.__get__, _DATA.__set__, Tensor.unsafe_chunk, Tensor.unsafe_split, Tensor.unsafe_split_with_sizes, torch.unsafe_chunk,
        torch.unsafe_split, torch.unsafe_split_with_sizes,
    )
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Known:
    """What the host knows of a mask or of offsets; one object for a tensor and all that was converted from it.

    Attributes:
        lengths: Q integers.
        padded_len: S; of offsets the longest length.
        padding_side: where the padding of the padded batch is.
        kind: ``"mask"`` for ``(B, S)`` with 1 or True at tokens, ``"offsets"`` for ``(Q+1,)``: 0, then the running sum of the lengths.
        layouts: those built so far, by device.
    """

    lengths: tuple[int, ...]
    padded_len: int
    padding_side: Side
    kind: Kind
    layouts: dict[torch.device, SeqLayout] = field(default_factory=dict, repr=False)

    def layout_on(self, device: torch.device) -> SeqLayout:
        """The `SeqLayout` with its tensors on ``device``: built by the first call, and the same object from then on."""
        if device not in self.layouts:
            layout = SeqLayout.from_lengths(self.lengths, self.padded_len, self.padding_side, device=device)
            self.layouts.setdefault(device, layout)  # another thread may have been first
        return self.layouts[device]

    def __reduce__(self) -> tuple[Any, ...]:
        # Layouts are many times the size of the lengths, and the process that unpickles wants them on another device anyway.
        return Known, (self.lengths, self.padded_len, self.padding_side, self.kind)


class HostLengths(Tensor):
    """An attention mask ``(B, S)`` or offsets ``(Q+1,)`` that remembers on the host its lengths.

    Make one from lengths with `as_mask` or `as_offsets`, or from a mask on the host with `from_mask`. What only moves or converts the
    tensor keeps them: ``to``, ``cpu``, ``cuda``, ``pin_memory``, ``bool``, ``int``, ``long``, ``clone``, ``contiguous``, ``detach``,
    copies, pickles. Every other operation returns a plain tensor. After a write to its memory (through a view, a detached alias or
    ``out=``, too) the tensor has forgotten, and `lengths` is None. torch's own count of writes decides that; where the tensor hands its
    memory to what does not count (numpy, dlpack, ``.data``), it forgets at once. Unseen go uncounted writes through other tensors of the
    same memory: numpy of a view, a kernel with a raw pointer, a view as another dtype that was made in inference mode.

    The equivalent in plain PyTorch is a tensor and a list beside it, which no framework would carry to the model.
    """

    _known: Known | None = None
    _writes = 0  # torch's count of writes at the time when the lengths were right
    _plain: Tensor | None = None  # the same memory, for operations that should see no subclass

    # ---------------------------------------------------------------- constructors

    @classmethod
    def as_mask(
        cls,
        lengths: Sequence[int] | Tensor,
        padded_len: int | None = None,
        padding_side: Side = "right",
        *,
        dtype: torch.dtype = torch.int64,
    ) -> HostLengths:
        """``(B, S)`` on the CPU, 1 or True at tokens: Hugging Face's ``attention_mask``.

        Arguments and errors as `SeqLayout.from_lengths`. In plain PyTorch: ``(torch.arange(S) < lengths[:, None]).to(dtype)``.
        """
        values = host_lengths(lengths)
        layout = SeqLayout.from_lengths(values, padded_len, padding_side)
        known = Known(values, layout.padded_len, padding_side, "mask", {layout.device: layout})
        return cls._of((~layout.padding_mask()).to(dtype), known)

    @classmethod
    def as_offsets(cls, lengths: Sequence[int] | Tensor, *, dtype: torch.dtype = torch.int32) -> HostLengths:
        """``(Q+1,)`` on the CPU: ``cu_seqlens``, as varlen kernels take them.

        Errors as `SeqLayout.from_lengths`. In plain PyTorch: ``F.pad(lengths.cumsum(0), (1, 0)).to(dtype)``.
        """
        values = host_lengths(lengths)
        layout = SeqLayout.from_lengths(values)
        known = Known(values, layout.padded_len, "right", "offsets", {layout.device: layout})
        return cls._of(layout.cu_seqlens.to(dtype, copy=True), known)

    @classmethod
    def from_mask(cls, mask: Tensor) -> Tensor:
        """The same memory ``(B, S)``, 1 or True at tokens, with its lengths: where all rows have their padding on the same side.

        Reads the mask, unless it is on a device: such a mask, a float one, and one that is anything else than tokens and padding on one
        side comes back as it is.

        Raises:
            DtypeError, LayoutError: not a tensor, or not 2-D.
        """
        check_rank(mask, "mask")
        if mask.device.type != "cpu" or mask.is_floating_point() or mask.is_complex():
            return mask
        lengths = mask.ne(0).sum(1).tolist()
        for side in _SIDES:
            made = cls.as_mask(lengths, mask.shape[1], side, dtype=mask.dtype)
            if torch.equal(made, mask):
                return cls._of(mask.as_subclass(Tensor), made.known)
        return mask

    @classmethod
    def _of(cls, plain: Tensor, known: Known | None) -> HostLengths:
        if plain.is_inference():  # nobody counts the writes to such a tensor
            with torch.inference_mode(False):
                plain = plain.clone()
        result = plain.as_subclass(cls)
        result._known, result._writes, result._plain = known, plain._version, plain
        return result

    # ---------------------------------------------------------------- what it knows

    @property
    def known(self) -> Known | None:
        """All that the host knows; None from the first write on, as `lengths` and `seq_layout`."""
        if self._known is not None:
            with torch._C.DisableTorchFunctionSubclass():
                if self._version != self._writes:
                    self._forget()
        return self._known

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """Q integers."""
        return None if self.known is None else self.known.lengths

    @property
    def seq_layout(self) -> SeqLayout | None:
        """The `SeqLayout` on the device of the tensor; reads nothing. (``layout`` is taken: torch's name for strided and sparse.)

        One object for everything that was converted from one tensor and is on one device, so that all layers and all dtypes of a mask
        share it.
        """
        return None if self.known is None else self.known.layout_on(self.device)

    def _forget(self) -> None:
        self._known, self._plain = None, self.as_subclass(Tensor)  # anew, because `resize_` and its like change this object's shape only

    # ---------------------------------------------------------------- as a tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Another subclass should see plain tensors. So should compiled graphs: in a graph's first run AOTAutograd refuses inputs of any
        # class of their own (torch 2.13), while an attribute that is a plain tensor becomes an input by itself.
        if torch.compiler.is_compiling() or not all(issubclass(t, HostLengths) for t in types):
            args, kwargs = pytree.tree_map_only(HostLengths, _plain, (args, kwargs))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            source = args[0] if args else None
            if func in _CONVERSIONS and isinstance(source, HostLengths):
                return source._converted(func, args, kwargs)
            result = func(*args, **kwargs)
            if func in _UNCOUNTED and isinstance(source, HostLengths):
                source._forget()
            elif isinstance(result, HostLengths) and result.known is None:  # operations in place return their argument
                result._forget()
            return result

    def _converted(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        known = self.known
        # Not in inference mode, or `_of` would copy what was copied already, and would not pin it.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            result = func(*args, **kwargs)
            keeps = known is not None and (known.kind == "mask" or result.dtype in _OFFSET_DTYPES)
            return HostLengths._of(result, known) if keeps and result is not self else result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.detach().clone()

    def __reduce_ex__(self, proto: Any) -> tuple[Any, ...]:
        return _restored, (self.as_subclass(Tensor), self.known)  # `copy.copy`, too: memory and the count of writes are shared then

    def __repr__(self) -> str:  # type: ignore[override]
        facts = "forgotten" if self.known is None else repr(self.known).removeprefix("Known(").removesuffix(")")
        return f"HostLengths({self.as_subclass(Tensor)!r}, {facts})"


def _restored(plain: Tensor, known: Known | None) -> HostLengths:
    """What a pickle calls, by a name that `torch.load` can allow."""
    return HostLengths._of(plain, known)


# For `torch.load`, which is told what it may make of a file: that builds plain values, and reads nothing else.
torch.serialization.add_safe_globals([_restored, Known])


def _plain(x: HostLengths) -> Tensor:
    return x if x._plain is None else x._plain
