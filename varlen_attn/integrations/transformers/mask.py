"""The mask that transformers' layers hand round: what is visible, said in words, and as numbers only for those who look at them.

transformers makes one mask a forward (and one for each kind of layer) and passes it to every layer. `VarlenMask` is such a mask, ``(B, 1,
Q, K)`` bool, True is visible, that holds no numbers: our attention reads its `Meaning`. Code that computes with it, whatever it does, gets
exactly transformers' own mask for ``sdpa``, so that a model which slices or inverts its mask stays right.
"""

from __future__ import annotations

import inspect
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

from ..._state import state
from ..._switch import Alive, Use, in_use, uses
from ..._torch import between_graphs, is_tracing, is_unreadable
from ...attention.dispatch import requested_backend
from ...attention.export import static_graph
from ...data.host_lengths import HostLengths
from ...errors import ArgumentError
from ...layout.seq_layout import SeqLayout
from ...parallel.rows import share_of

Window = tuple[int | None, int | None]
INTERNAL = "_attn_implementation_internal"  # of a configuration, whose own way to say it takes microseconds
LOOKED_AT = "a mask that the model looked at, and may have changed"
ISLAND = "attention that needs columns: the layers around it compute rows"


class Pattern(NamedTuple):
    """What a mask function of transformers computes.

    Attributes:
        causal: key columns up to the query's.
        window: how many other columns are visible on each side, inclusive.
        documents: ``(B, S)``, equal numbers belong together.
    """

    causal: bool
    window: Window | None = None
    documents: Tensor | None = None


class Packing(NamedTuple):
    """A call of packed attention that does the same: rows by ``layout_q``, keys by ``layout_kv``, which may cover fewer columns.

    Attributes:
        blind: ``(T,)`` True at rows that see nothing; None where each sees some.
    """

    layout_q: SeqLayout
    layout_kv: SeqLayout
    causal: bool | str
    window: Window | None
    blind: Tensor | None = None


# -------------------------------------------------------------------- forwards


@dataclass(eq=False)
class Forward:
    """A model's forward under way.

    Attributes:
        tree: of the model that was enabled, whose or whose part's forward it is.
        model: whose it is.
        reader: says why its layers must not run packed, from its arguments; called once, by the first layer that would run packed
            otherwise, with whether its mask is causal, and again where another's is not alike.
        given: its arguments, by name.
        padded_because: why its layers do not run packed, once that is known.
        filled: its layers run padded, but no reader of rows at padding is known, so that these hold what they do after a packed stack.
        in_rows: whether a layer handed on rows, and the last did not put them back yet.
        labelled: a weak reference to what its head reads, if that is not all.
        use: of the model's hooks.
    """

    tree: object
    model: nn.Module
    reader: Callable[[bool], str | None] | None
    given: Callable[[], dict[str, Any]] = dict
    padded_because: str | None = None
    filled: bool = False
    in_rows: bool = False
    labelled: Any = None

    def __post_init__(self) -> None:
        self.use = in_use(self.model)
        self.read: set[bool] = set()


class _Thread(threading.local):
    """Lists are replaced and not changed: these are of all threads."""

    forwards: Sequence[Forward] = ()
    seen: list[Tensor] | None = None
    made: tuple[Tensor, SeqLayout] | None = None
    rows: Callable[[], Use | None] = staticmethod(lambda: None)
    island: Callable[[], Meaning | None] = staticmethod(lambda: None)


_thread = _Thread()


def enter_forward(forward: Forward) -> None:
    """A model's forward begins."""
    left = next((i for i, f in enumerate(_thread.forwards) if f.model is forward.model), None)  # interrupted, and never left
    _thread.forwards = [*_thread.forwards[:left], forward]


def _under_way() -> list[Forward]:
    """Forwards of the innermost model and of those around it; not of a model that only happens to run, or was interrupted."""
    return [f for f in _thread.forwards if f.tree is _thread.forwards[-1].tree]


def is_entered(model: nn.Module) -> bool:
    """Whether a forward of a model is under way, and was entered."""
    return any(f.model is model for f in _thread.forwards)


def forward_of(model: nn.Module) -> Forward | None:
    """That which began last, if it is of this model."""
    return next((forward for forward in _thread.forwards[-1:] if forward.model is model), None)


def labelled_of(model: nn.Module) -> Any:
    """Which rows of a model's result a head around it reads; None for all."""
    found = (forward.labelled and forward.labelled() for forward in _thread.forwards)
    return next((x for x in found if x is not None and x.model is model), None)


def leave_forward(model: nn.Module) -> Forward | None:
    """It ends; None if it began before anybody watched."""
    forwards = _thread.forwards
    i = next((i for i in reversed(range(len(forwards))) if forwards[i].model is model), None)
    if i is None:
        return None
    _thread.forwards = forwards[:i]
    for forward in forwards[i:]:
        forward.reader, forward.given = None, dict
        uses.discard(forward.use)
    end_rows()
    return forwards[i]


def end_rows() -> None:
    """No layer hands on rows any more."""
    use = _thread.rows()
    if use is not None:
        uses.discard(use)


def around_island(meaning: Meaning | None) -> None:
    """A layer begins, on the rows of ``meaning`` or on columns (None)."""
    _thread.island = (lambda: None) if meaning is None else weakref.ref(meaning)


def island_of() -> Meaning | None:
    """What the layer was given whose attention this is; None if it runs on columns."""
    return _thread.island()


def caller(frame: FrameType | None, name: str) -> FrameType | None:
    """The innermost of ``frame`` and its callers that runs a function of this name."""
    while frame is not None and not frame.f_code.co_qualname.endswith(name):
        frame = frame.f_back
    return frame


@contextmanager
def paddings() -> Iterator[list[Tensor]]:
    """The masks of tokens, ``(B, K)``, that a model makes inside: of tokens, of frames."""
    seen: list[Tensor] = []
    before, _thread.seen = _thread.seen, seen
    try:
        yield seen
    finally:
        _thread.seen = before


def take_over(masks: Sequence[Any]) -> None:
    """The masks that the innermost model is given are of its forward. `generate` makes those for a static cache before."""
    meanings = [x.meaning for x in masks if isinstance(x, VarlenMask)]
    if meanings and len(meanings) < len(masks):
        _thread.forwards[-1].padded_because = _UNKNOWN
    for meaning in meanings:
        if not any(forward.in_rows for forward in meaning.forwards):
            meaning.forwards = _under_way()
            vars(meaning).pop("packed", None)  # and what was packed is of a forward before
            meaning.packed_arguments.clear()


# -------------------------------------------------------------------- masks

_UNKNOWN = "a kind of layers whose mask has a pattern that is not known"
masks: Alive[Meaning] = Alive()
leaving: set[int] = set()  # identities of the configurations that are about to say ``eager``


@dataclass(eq=False, repr=False)
class Meaning:
    """What a mask says.

    Attributes:
        shape: ``(B, 1, Q, K)``.
        pattern: of the columns.
        padding: ``(B, columns)``, True is a token; None for no padding.
        first_query: the key column of the first query.
        make: transformers' own mask.
        rows: of a stack that runs packed, the layout of its ``(1, T, D)`` rows; `blind`: those that see nothing.
        others: the layout of the rows that they see, if these are not their own.
        forwards: of the models in whose forwards the mask was made, the innermost last.
        config: of the model.
        dtype: of the scores.
        added: the model was disabled while its forward is under way, and attends with ``eager``, which adds masks to scores.
        stack: how all layers of that stack attend; None once somebody looked at the mask.
        packed_arguments: what layers were given, by name and identity, and the same for packed rows.
        numbers: the mask as somebody was given it to compute with. That code may write to it, so from then on it is what counts.
    """

    shape: tuple[int, int, int, int]
    device: torch.device
    pattern: Pattern
    padding: Tensor | None
    first_query: int
    make: Callable[[], Tensor]
    rows: SeqLayout | None = None
    forwards: list[Forward] = field(default_factory=_under_way)
    config: Any = None
    dtype: torch.dtype = torch.float32
    blind: Tensor | None = None
    others: SeqLayout | None = None

    def __post_init__(self) -> None:
        self.stack = None if self.rows is None else Packing(self.rows, self.others or self.rows, *self.pattern[:2], self.blind)
        self.packed_arguments: dict[tuple[str, int], tuple[Any, Any]] = {}
        self.made: Tensor | None = None
        self.numbers: Tensor | None = None
        self.added = False
        masks.add(self)
        if id(self.config) in leaving or str(getattr(self.config, "__dict__", {}).get(INTERNAL)) == "eager":
            self.added = True

    @property
    def padded_because(self) -> str | None:
        """Why the stack that is given this mask does not run packed."""
        return next((f.padded_because for f in self.forwards if f.padded_because is not None), None)

    def begin_rows(self, layer: nn.Module) -> None:
        """Until they end, or nobody holds this mask because the forward was broken off."""
        self.use = in_use(layer)
        _thread.rows = weakref.ref(self.use)

    def hands_on(self, rows: bool) -> None:
        """A layer's result is rows, or padded again."""
        if self.forwards:
            self.forwards[-1].in_rows = rows

    def keep_padded(self, reason: str, filled: bool) -> None:
        """All layers of this forward, whatever their masks."""
        if self.forwards and self.padded_because is None:
            self.forwards[-1].padded_because, self.forwards[-1].filled = reason, filled

    def read_by(self) -> str | None:
        """Why rows at padding are read, as the arguments of the forwards say."""
        for forward in self.forwards:
            if forward.reader is not None and self.pattern.causal not in forward.read and forward.padded_because is None:
                forward.read.add(self.pattern.causal)
                forward.padded_because = forward.reader(self.pattern.causal)
        return self.padded_because

    @property
    def filled(self) -> bool:
        return bool(self.forwards) and self.forwards[-1].filled

    @property
    def dense(self) -> Tensor:
        """transformers' own ``(B, 1, Q, K)``."""
        if self.numbers is None and self.made is None:  # no cached_property, whose lock `torch.compile` does not know
            self.made = self.make()
        return self.made if self.numbers is None else self.numbers  # type: ignore[return-value]

    def look(self) -> Tensor:
        """The mask for code that computes with it, or writes to it."""
        if self.numbers is None:
            self.numbers, self.stack = self.dense.contiguous(), None
        if not self.added:
            return self.numbers
        return torch.zeros_like(self.numbers, dtype=self.dtype).masked_fill_(~self.numbers, torch.finfo(self.dtype).min)

    @property
    def columns(self) -> int:
        """How many of the key columns queries see: not those of a static cache's future."""
        return _columns(self.pattern, self.first_query, *self.shape[2:])

    @cached_property
    def keys(self) -> SeqLayout:
        """Of these columns. One transfer, unless the host knows the lengths."""
        if self.pattern.documents is not None:
            return SeqLayout.from_document_ids(self.pattern.documents + 1)
        return self._all(self.columns) if self.padding is None else _layout_of(self.padding)

    @cached_property
    def tokens(self) -> SeqLayout:
        """Of what a packed stack computes: these columns, and all of a row that has none. They see nothing, and may be read. Those of this
        rank in `sequence_parallel`."""
        if not self.keys.lengths or 0 not in self.keys.lengths or self.padding is None:
            return share_of(self.keys)
        return share_of(_layout_of(self.padding | ~self.padding.any(1, keepdim=True)))

    def _all(self, columns: int) -> SeqLayout:
        return SeqLayout.from_lengths([columns] * self.shape[0], columns, device=self.device)

    @property
    def is_plain(self) -> bool:
        """Whether a flag says it all: causal or not."""
        _, _, len_q, len_k = self.shape
        if self.numbers is not None or self.rows is not None or self.pattern.window is not None or self.pattern.documents is not None:
            return False
        square = self.first_query == 0 and len_q == len_k
        return (square or not self.pattern.causal) and (self.padding is None or self.keys.is_dense)

    @property
    def packing(self) -> Packing | str:
        """How packed attention computes this for every query row, those at padding included; or why it cannot."""
        return LOOKED_AT if self.numbers is not None else self._packing

    @cached_property
    def _packing(self) -> Packing | str:
        if self.stack is not None:
            return self.stack
        if self.pattern.documents is not None:
            return Packing(self.keys, self.keys, self.pattern.causal, self.pattern.window)
        return self._causal() if self.pattern.causal else self._bidirectional()

    def _causal(self) -> Packing | str:
        _, _, len_q, len_k = self.shape
        last = self.first_query + len_q
        if last > len_k or self.first_query < 0:
            return f"queries stand at columns {self.first_query} to {last} of {len_k} keys"
        keys, window = self.keys, self.pattern.window
        if keys.lengths is None:
            return "only the device knows the lengths"
        if self.first_query == 0 and keys.is_dense:
            return Packing(keys, keys, True, window)
        if self.first_query == 0 and keys.right_padded:
            return Packing(self._all(len_q), keys, "top_left", window)
        if keys.has_holes or not _reaches_last_column(self.padding, keys, last):
            return "padding on both sides or with tokens after it, where the padded rows must stay what they are"
        if self.first_query == 0:
            return Packing(keys, keys, True, window)  # rows before the first token see nothing
        if self.padding is None:
            return Packing(self._all(len_q), keys, True, window)
        return Packing(_layout_of(self.padding[:, self.first_query : last]), keys, True, window)

    def _bidirectional(self) -> Packing | str:
        window = self.pattern.window
        if window is None:
            return Packing(self._all(self.shape[2]), self.keys, False, None)
        if self.first_query == 0 and self.shape[2] == self.shape[3] and self.keys.is_dense:
            return Packing(self.keys, self.keys, False, window)
        return "a window around queries at padding"

    @cached_property
    def packed(self) -> VarlenMask:
        """The same for the packed rows ``(1, T)`` of a self-attention without cached keys."""
        layout, total = self.tokens, self.tokens.num_rows
        blind = None if layout.whole is self.keys or self.padding is None else ~layout.pack(self.padding)
        make = partial(_block_diagonal, layout, self.pattern, blind)
        known = layout, self.forwards, self.config, self.dtype, blind
        return VarlenMask(Meaning((1, 1, total, total), self.device, self.pattern, None, 0, make, *known))

    def crossing(self, queries: SeqLayout) -> VarlenMask:
        """The same for packed rows of others, which all see all of these."""
        keys = self.keys
        make = lambda: (queries.seq_ids[:, None] == keys.seq_ids)[None, None]  # noqa: E731
        known = queries, self.forwards, self.config, self.dtype, None, keys
        return VarlenMask(Meaning((1, 1, queries.num_rows, keys.num_rows), self.device, self.pattern, None, 0, make, *known))

    def is_of_columns_of(self, other: Meaning) -> bool:
        """Whether both are masks of one self-attention: the same columns, the same padding."""
        same = (self.columns, self.first_query, self.shape[2]) == (other.columns, other.first_query, other.shape[2])
        if not same or self.pattern.documents is not None:
            return False
        if self.keys is other.keys:
            return True
        return self.padding is not None and other.padding is not None and torch.equal(self.padding, other.padding)

    def to(self, device: torch.device) -> Meaning:
        pattern = self.pattern
        if pattern.documents is not None:
            pattern = pattern._replace(documents=pattern.documents.to(device))
        padding = None if self.padding is None else self.padding.to(device)
        rows = None if self.rows is None else self.rows.to(device)
        dense = lambda: self.dense.to(device)  # noqa: E731
        blind, others = (None if x is None else x.to(device) for x in (self.blind, self.others))
        known = dict(config=self.config, dtype=self.dtype, blind=blind, others=others)
        return Meaning(self.shape, device, pattern, padding, self.first_query, dense, rows, **known)


# What masks of numbers mean, also to layers that are computed again when no forward is under way. Gone with them.
of_numbers: MutableMapping[Tensor, Meaning] = WeakIdKeyDictionary()


def meaning_of_numbers(mask: Tensor) -> Meaning | None:
    """Of the mask that attention code of its own is given. Which columns are tokens it says itself if it is ``(B, S)``, else the mask that
    the model was given."""
    known, forward = of_numbers.get(mask), _thread.forwards[-1] if _thread.forwards else None
    if forward is None or (known is not None and known.forwards[-1:] == [forward]):
        return known
    given = forward.given()
    padding = mask.clone() if mask.dim() == 2 else given.get("attention_mask")
    if not isinstance(padding, Tensor) or padding.dim() != 2 or padding.is_floating_point() or padding.device != mask.device:
        return None
    if is_unreadable(padding):
        return None
    if any(isinstance(x := given.get(name), Tensor) and x.shape[:2] != padding.shape for name in ("input_ids", "inputs_embeds")):
        return None  # keys are cached
    columns = padding.shape[1]
    made = of_numbers[mask] = Meaning((len(padding), 1, columns, columns), mask.device, Pattern(False), padding, 0, padding.clone)
    return made


_KEEPING = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_ADDING = {torch.ops.aten.add, torch.ops.aten.add_, torch.ops.aten.sub, torch.ops.aten.mul, torch.ops.aten.baddbmm}


class VarlenMask(Tensor):
    """See the file. ``mask.meaning`` says what is visible; any operation on the mask computes with `Meaning.look`."""

    meaning: Meaning

    @staticmethod
    def __new__(cls, meaning: Meaning) -> VarlenMask:
        made: VarlenMask = Tensor._make_wrapper_subclass(cls, meaning.shape, dtype=torch.bool, device=meaning.device)
        return made

    def __init__(self, meaning: Meaning) -> None:
        self.meaning = meaning

    def __repr__(self) -> str:  # type: ignore[override]
        pattern = self.meaning.pattern
        kind = "causal" if pattern.causal else "bidirectional"
        return f"VarlenMask({tuple(self.shape)}, {kind}, window={pattern.window}, device={self.device})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        """Copies of what layers are given, which debuggers and recorders keep, are of transformers' own mask."""
        return self.meaning.dense.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.meaning.dense.clone().__reduce_ex__(protocol)

    def numpy(self, **options: Any) -> Any:
        return self.meaning.dense.clone().numpy(**options)

    def tolist(self) -> Any:
        return self.meaning.dense.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _KEEPING:
            return VarlenMask(args[0].meaning)
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, torch.bool):
            return VarlenMask(args[0].meaning.to(torch.device(kwargs.get("device") or args[0].device)))
        adding = func.overloadpacket in _ADDING and any(isinstance(x, Tensor) and x.is_floating_point() for x in args)
        if adding and not any(isinstance(x, VarlenMask) and x.meaning.added for x in args):
            raise ArgumentError(
                "`attention_mask` must not be added to scores, but a model with attention code of its own does that to the mask made for "
                'attn_implementation="varlen_attn": call varlen_attn.enable(model), which leaves such models alone.'
            )
        args, kwargs = tree_map(lambda x: x.meaning.look() if isinstance(x, VarlenMask) else x, (args, kwargs))
        return func(*args, **kwargs)


# -------------------------------------------------------------------- layouts


def _layout_of(real: Tensor) -> SeqLayout:
    """The layout of a mask of tokens, ``(B, K)`` bool.

    A model with two kinds of layers makes two masks of one attention mask, each of a bool copy: on a CPU, where that costs nothing, the
    last layout is kept with a copy of the mask that it was made of, and compared by value.
    """
    if isinstance(real, HostLengths) and (known := real.seq_layout) is not None:
        return known
    if real.device.type != "cpu" or is_tracing(real):
        return SeqLayout.from_attention_mask(real, validate=False)
    if _thread.made is not None and torch.equal(_thread.made[0], real):
        return _thread.made[1]
    layout = SeqLayout.from_attention_mask(real, validate=False)
    with torch.inference_mode(False):
        _thread.made = (real.detach().clone(), layout)
    return layout


def _reaches_last_column(padding: Tensor | None, keys: SeqLayout, last: int) -> bool:
    """Whether the tokens of every row reach the last column, so that the last query is the last token."""
    if padding is None or keys.is_dense:
        return True
    return bool((padding[:, last - 1] | ~padding[:, :last].any(1)).all())


def _block_diagonal(layout: SeqLayout, pattern: Pattern, blind: Tensor | None = None) -> Tensor:
    """``(1, 1, T, T)``: what packed rows see, for code that wants numbers."""
    rows, columns = layout.seq_ids[:, None], layout.seq_ids
    distance = layout.positions - layout.positions[:, None]
    visible = rows == columns
    if pattern.causal:
        visible = visible & (distance <= 0)
    if pattern.window is not None:
        left, right = pattern.window
        visible = visible if left is None else visible & (distance >= -left)
        visible = visible if right is None else visible & (distance <= right)
    return visible[None, None] if blind is None else visible[None, None] & ~blind


# -------------------------------------------------------------------- made by transformers' mask functions


@between_graphs
def varlen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What transformers calls to make a mask; registered as ``varlen_attn`` in its `AttentionMaskInterface`.

    Decoding steps, static caches and unknown patterns (images, chunks, prefixes, whatever comes) get the mask of ``sdpa``. Otherwise never
    None, which ``sdpa`` gets where a flag says it all: whether attention is causal then hangs on an attribute that some models lack.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    mask_function = causal_mask_function if mask_function is None else mask_function
    arguments: dict[str, Any] = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, **kwargs,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return sdpa_mask(**arguments)  # type: ignore[no-any-return]
    _refuse_own_attention(kwargs.get("config"))
    device = torch.device(kwargs.get("device", "cpu"))
    pattern = classify(mask_function)
    make = partial(sdpa_mask, **{**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    if static_graph() or (attention_mask is not None and is_unreadable(attention_mask)):
        return make()  # type: ignore[no-any-return]
    order = requested_backend("auto")
    if isinstance(q_offset, Tensor) and q_length > 1 and pattern is not None and not is_unreadable(q_offset):
        q_offset = int(q_offset)  # of a static cache that was used before; `sdpa_mask` reads it too
        make = partial(make, q_offset=q_offset)  # the tensor is the cache's own, which counts on
    plain = isinstance(q_offset, int) and (q_length > 1 or order != "auto") and device.type != "meta"
    if pattern is None:
        for forward in _under_way()[-1:]:
            forward.padded_because = _UNKNOWN
    if pattern is None or not plain or (attention_mask is not None and attention_mask.dim() != 2):
        return sdpa_mask(**arguments)  # type: ignore[no-any-return]
    assert isinstance(q_offset, int)
    columns = _columns(pattern, q_offset - kv_offset, q_length, kv_length)
    padding = _padding_of_columns(attention_mask, columns, kv_offset)
    square = (q_length, q_offset) == (kv_length, kv_offset)
    if order == "auto" and not state.records and not state.ranks and _says_it_all(kwargs.get("config"), pattern, padding, square):
        return sdpa_mask(**arguments)  # type: ignore[no-any-return]
    pattern = pattern._replace(window=_effective(pattern.window, q_length, kv_length))
    if padding is not None and tuple(padding.shape) != (batch_size, columns):
        return sdpa_mask(**arguments)  # type: ignore[no-any-return]  # transformers' error, or its broadcasting
    if _thread.seen is not None and padding is not None:
        _thread.seen.append(padding)
    shape, known = (batch_size, 1, q_length, kv_length), {"config": kwargs.get("config"), "dtype": kwargs.get("dtype", torch.float32)}
    return VarlenMask(Meaning(shape, device, pattern, padding, q_offset - kv_offset, make, **known))


def _says_it_all(config: Any, pattern: Pattern, padding: Tensor | None, square: bool) -> bool:
    """Whether nothing is packed, because nothing is padded, and layers know themselves whether they are causal: of a model that is enabled,
    and that transformers lets attend by ``sdpa`` with no more than that."""
    if pattern.window is not None or pattern.documents is not None or not (square or not pattern.causal) or not _thread.forwards:
        return False
    # One that came with ``eager`` may be told so again while its forward is under way.
    if not getattr(_thread.forwards[-1].model, "_supports_sdpa", False) or getattr(config, "__dict__", {}).get(INTERNAL) == "eager":
        return False
    return padding is None or (padding.device.type == "cpu" and bool(padding.all()))


def _refuse_own_attention(config: Any) -> None:
    """A model given our name at its construction is not checked by transformers, and might take this mask for numbers to add."""
    if config is not None and not _has_interface(type(config).__module__):
        raise ArgumentError(
            f"`attn_implementation` must be 'eager' for the model of {type(config).__name__}, whose attention code is its own, but is "
            "'varlen_attn': construct it without, and call varlen_attn.enable(model), which leaves such models alone."
        )


@cache
def _has_interface(configuration_module: str) -> bool:
    """Whether the modeling file beside a configuration's has no attention, or uses transformers' interface for it."""
    module = sys.modules.get(configuration_module.replace("configuration_", "modeling_"))
    if module is None or "configuration_" not in configuration_module:
        return True
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return True
    return "ALL_ATTENTION_FUNCTIONS" in source or re.search(r"^class \w*Attention\w*\(nn\.Module\):", source, re.MULTILINE) is None


def _columns(pattern: Pattern, first_query: int, q_length: int, kv_length: int) -> int:
    return min(first_query + q_length, kv_length) if pattern.causal else kv_length


def _padding_of_columns(attention_mask: Tensor | None, columns: int, kv_offset: int) -> Tensor | None:
    """``(B, columns)``: those that the keys have; those beyond the mask hold nothing yet."""
    if attention_mask is None:
        return None
    missing = columns + kv_offset - attention_mask.shape[1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    if kv_offset == 0 and attention_mask.shape[1] == columns:
        return attention_mask
    return attention_mask[:, kv_offset : kv_offset + columns]


def _effective(window: Window | None, q_length: int, kv_length: int) -> Window | None:
    """No window where no distance is larger."""
    if window is None:
        return None
    farthest = max(q_length, kv_length) - 1
    sides = tuple(None if side is None or side >= farthest else side for side in window)
    return None if sides == (None, None) else (sides[0], sides[1])


def classify(mask_function: Callable[..., Any]) -> Pattern | None:
    """The pattern of transformers' own index functions, by their code and what they close over; None for all others.

    That is private to transformers: a test fails when it moves, and until then unknown functions are computed as ``sdpa`` computes them.
    """
    from transformers import masking_utils as hf

    if mask_function is hf.causal_mask_function:
        return Pattern(True)
    if mask_function is hf.bidirectional_mask_function:
        return Pattern(False)
    known, code = _known_code(), getattr(mask_function, "__code__", None)
    parts: Any = _closed_over(mask_function).get("mask_functions", ()) if code in (known["both"], known["either"]) else ()
    if len(parts) != 2:
        return None
    if code is known["either"]:
        return _union(*parts)
    overlay, base = parts
    code, inside = getattr(overlay, "__code__", None), _closed_over(overlay)
    if code is known["window"] and base is hf.causal_mask_function:
        return Pattern(True, (int(inside["sliding_window"]) - 1, None))
    if code is known["bidirectional window"] and base is hf.bidirectional_mask_function:
        side = int(inside["sliding_window"])
        return Pattern(False, (side, side))
    if code is known["documents"] and getattr(base, "__code__", None) is known["remapped"]:
        pattern = classify(_closed_over(base)["mask_function"])
        if pattern is not None and pattern.documents is None:
            return pattern._replace(documents=inside["packed_sequence_mask"])
    return None


def _union(base: Any, overlay: Any) -> Pattern | None:
    """Of a causal window and one on both sides, or of anything and all columns: Gemma as an encoder."""
    code, inside = getattr(overlay, "__code__", None), _closed_over(overlay)
    side = int(inside.get("sliding_window", 0)) - 1
    if getattr(code, "co_qualname", "") == "_bidirectional_window_overlay.<locals>.inner_mask":
        return Pattern(False, (side, side)) if classify(base) == Pattern(True, (side, None)) else None
    with suppress(Exception):  # it looks at what it is given
        return Pattern(False) if not inside and not code.co_argcount and overlay() else None  # type: ignore[union-attr]
    return None


@cache
def _known_code() -> dict[str, Any]:
    """Of the functions that transformers' makers of mask functions return. One that is not there matches nothing."""
    from transformers import masking_utils as hf

    nothing: Any = torch.zeros(1, 1, device="cpu")
    makers = {
        "both": ("and_masks", (hf.causal_mask_function,)),
        "either": ("or_masks", (hf.causal_mask_function,)),
        "window": ("sliding_window_overlay", (1,)),
        "bidirectional window": ("sliding_window_bidirectional_overlay", (1,)),
        "documents": ("packed_sequence_mask_function", (nothing,)),
        "remapped": ("remap_positions_for_packed_sequence", (hf.causal_mask_function, nothing)),
    }
    return {name: getattr(hf, maker)(*args).__code__ if hasattr(hf, maker) else object() for name, (maker, args) in makers.items()}


def _closed_over(function: Callable[..., Any]) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    code = getattr(function, "__code__", None)
    return {} if code is None else {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
