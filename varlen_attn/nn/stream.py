"""The one way in and out: what a call, a module or a stack is given becomes packed rows, and its result gets the form of the input.

That form is padded either way round, unbatched, packed or nested.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._torch import mark_unbacked, trace_quietly
from ..attention.checks import check_layouts
from ..attention.export import static_layouts
from ..attention.forms import ROWS, Form, PaddingRows, batch_first, form_of, full_layout, nested_rows, pack_rows, unpack_rows
from ..errors import ArgumentError, LayoutError
from ..layout.seq_layout import SeqLayout
from ..parallel.rows import all_rows, refuse_mixing, share_of
from .checks import check_inputs
from .masks import additive_mask, read_masks
from .token_wise import has_hooks, is_known

# -------------------------------------------------------------------- a stack's tensors


class Masks(NamedTuple):
    """What a caller says about one attention.

    Attributes:
        key_padding: ``(B, S)``, True is padding.
        attn: ``(L, S)`` or ``(B*N, L, S)``, True hides.
        is_causal: query i sees keys up to i, with or without ``attn``.
        layout: in place of ``key_padding``.
        compare: look whether ``attn`` is causal, one read with that of the layout, also with packed rows and no word of `is_causal`: these
            come to layers from a stack, which has looked.
    """

    key_padding: Tensor | None
    attn: Tensor | None
    is_causal: bool
    layout: SeqLayout | None
    compare: bool = False


class PackedInput(NamedTuple):
    """Packed rows on their way through a stack, and all that is needed to go on and to go back.

    Attributes:
        rows: ``(T, D)``, as they came in.
        layout: of the rows.
        causal: query i sees keys up to i.
        mask: an attention mask that only padded attention can serve; None where ``causal`` and the layout say it all.
        form: what was given, and is given back.
        given: the input itself.
        split: rows are shared by ranks here.
    """

    rows: Tensor
    layout: SeqLayout
    causal: bool
    mask: Tensor | None
    form: Form
    given: Tensor
    split: bool = False

    def restore(self, rows: Tensor, padding_rows: PaddingRows) -> Tensor:
        """``rows`` in the form in which the input came."""
        layout, rows = all_rows(self.layout, rows) if self.split else (self.layout, rows)
        return unpack_rows(layout, rows, self.form, self.given, padding_rows)

    def prepared(self, layers: Iterable[nn.Module], memory: PackedInput | None = None, norm: nn.Module | None = None) -> Prepared:
        """For attention of these rows to themselves, or to those of ``memory``, in ``layers``, which ``norm`` follows."""
        keys = self if memory is None else memory
        if self.layout.ranks is not None:
            refuse_mixing([*layers, norm or nn.Identity()])
        written = not (self.layout.has_slack or keys.layout.has_slack) or all(_writes_all_rows(layer) for layer in layers)
        return Prepared(self.layout, keys.layout, keys.causal, keys.mask, self.form != "sequence first", written)


def takes_prepared(module: nn.Module, prepared: Prepared) -> bool:
    """Whether a module of a stack gets what the stack has settled. One with hooks, or with another ``forward``, is called with layouts and
    masks, as anybody calls it: these may be read there, and changed."""
    forward = type(module).forward  # a copy of its attributes, as by functools.wraps, is another function
    if getattr(forward, "takes_prepared", None) is not forward or "forward" in vars(module):
        return False
    return prepared.written and not module._forward_pre_hooks and not module._forward_hooks


def _writes_all_rows(layer: nn.Module) -> bool:
    """Whether every part of a layer is known to write slack rows too: what is in them, times 0, must be 0 in gradients of weights."""
    known = (isinstance(part, nn.MultiheadAttention) or is_known(part) for part in layer.children())
    return not any(has_hooks(module) for module in layer.modules()) and "forward" not in vars(layer) and all(known)


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a stack has settled for the attention of its layers, which they get in place of a layout: nothing is left to be checked. No
    tuple, because a wrapper that rebuilds arguments would make two layouts of one.

    Attributes:
        layout, layout_kv: of queries and of keys.
        causal, mask: as `PackedInput`, of the keys.
        batch_first: how modules that take no layout are called, unless they say it themselves.
        written: no part of the layers leaves slack rows unwritten, so that they are zeroed at the ends of the stack only.
    """

    layout: SeqLayout
    layout_kv: SeqLayout
    causal: bool
    mask: Tensor | None
    batch_first: bool
    written: bool

    # ---------------------------------------------------------------- for modules that take no layout

    def padded(self, rows: Tensor, module: nn.Module, layout: SeqLayout | None = None) -> Tensor:
        """``(B, S, D)``, or ``(S, B, D)`` for a module that wants it so; of the queries' layout, unless another is given."""
        layout = self.layout if layout is None else layout
        if layout.row_ids is not None:
            raise LayoutError(
                f"`layout` has several documents a row, but {type(module).__name__} takes no layout and would mix them: "
                "use this package's modules there, or give every document a row."
            )
        padded = unpack_rows(layout, rows)
        return padded if self._batch_first(module) else padded.transpose(0, 1)

    def packed(self, padded: Tensor, module: nn.Module) -> Tensor:
        """The reverse of `padded`, of queries."""
        return pack_rows(self.layout, padded if self._batch_first(module) else padded.transpose(0, 1))

    def _batch_first(self, module: nn.Module) -> bool:
        return bool(getattr(getattr(module, "self_attn", module), "batch_first", self.batch_first))

    def torch_masks(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """``key_padding_mask`` and ``attn_mask`` as torch's modules take them, both additive: torch warns about two dtypes."""
        mask = _after(self.layout.padded_len, self.layout_kv.padded_len, x.device) if self.causal else self.mask
        padding = None if self.layout_kv.is_dense else additive_mask(self.layout_kv.padding_mask(), x.dtype)
        return padding, None if mask is None else additive_mask(mask, x.dtype).to(x.dtype)


def pack_input(attn: nn.Module, name: str, x: Tensor, masks: Masks, queries: PackedInput | None = None) -> PackedInput:
    """Check, build the layout and pack, for attention by ``attn`` to ``x``.

    Args:
        attn: says the widths, the number of heads and ``batch_first``.
        name: of ``x``, for errors.
        x: ``(B, S, D)``, ``(S, B, D)``, ``(S, D)``, packed ``(T, D)`` with a layout, or nested.
        masks: of the keys, which are in ``x``.
        queries: who attends to ``x``; ``x`` itself if left out.
    """
    if queries is None:
        check_layouts(masks.layout, None)
    else:
        check_layouts(None, masks.layout)
    trace_quietly(x)
    form, given, own = form_of(attn, x, masks.layout), x, masks.layout
    if masks.layout is not None and masks.key_padding is not None:
        raise ArgumentError("pass a key padding mask or a layout, not both: nothing says which one counts.")
    if form == "nested" and not (masks.layout is None and masks.key_padding is None):
        raise ArgumentError("a nested tensor says itself where its sequences are: pass no key padding mask or layout with it.")
    if form == "nested":
        x, own = nested_rows(x)
    packed_by = own if form in ROWS else None
    _check(attn, name, x, packed_by, masks, queries)
    padding = masks.key_padding[None] if form == "unbatched" and masks.key_padding is not None else masks.key_padding
    x = batch_first(form, x)
    if packed_by is None:
        own, _ = static_layouts(x, own, x, None)
    facts = read_masks(x, padding, masks.attn, hint=masks.is_causal, compare=masks.compare or masks.is_causal or form != "packed")
    layout = facts.layout or own or full_layout(x)
    rows = pack_rows(layout, x, name, form, apart=True)
    if form not in ROWS:  # not the caller's own
        mark_unbacked(rows)
    share = share_of(layout, None if queries is None else queries.layout)
    if split := share is not layout:
        rows = share.part(rows)  # type: ignore[attr-defined]
    causal = masks.is_causal if masks.attn is None else not facts.not_causal
    stream = PackedInput(rows, share, causal, None if causal else masks.attn, form, given, split)
    if not facts.additive:
        return stream
    assert padding is not None
    added = _added_to_scores(padding.to(x.device, x.dtype), stream, queries or stream, int(attn.num_heads))  # type: ignore[arg-type]
    return stream._replace(causal=False, mask=added)


def filled(padded: Tensor, padding: Tensor, attn: nn.Module, padding_rows: PaddingRows) -> Tensor:
    """What was computed on padded tensors, as `PackedInput.restore` gives it."""
    stream = pack_input(attn, "output", padded, Masks(padding, None, False, None))
    return stream.restore(stream.rows, padding_rows)


def _check(attn: nn.Module, name: str, x: Tensor, packed_by: SeqLayout | None, masks: Masks, queries: PackedInput | None) -> None:
    """Shapes, in torch's words."""
    if packed_by is not None:
        packed_by._check(x, (packed_by.num_rows,), name)
    if not isinstance(attn, nn.MultiheadAttention):
        return  # a layer of the caller's own, which may take anything
    if queries is not None and packed_by is None and queries.form in ROWS:
        raise LayoutError(
            "`memory` must be packed where the targets are, with a layout of its own: pass layout_kv.pack(memory) and layout_kv=layout_kv."
        )
    if packed_by is not None:
        query, layout = (x, packed_by) if queries is None else (queries.rows, queries.layout)
        check_inputs(attn, query, x, x, None, masks.attn, (layout, packed_by))
    else:
        check_inputs(attn, x if queries is None else queries.given, x, x, masks.key_padding, masks.attn, None)


def _added_to_scores(padding: Tensor, stream: PackedInput, queries: PackedInput, num_heads: int) -> Tensor:
    """An additive padding mask, the attention mask and causality as one ``(B*N, L, S)``: torch adds them all."""
    shape = (stream.layout.batch_size, num_heads, queries.layout.padded_len, stream.layout.padded_len)
    added = padding[:, None, None].expand(shape)
    mask = _after(*shape[2:], padding.device) if stream.causal else stream.mask
    if mask is not None:
        other = additive_mask(mask.to(padding.device), padding.dtype).to(padding.dtype)
        added = added + (other.view(shape) if other.dim() == 3 else other)
    return added.reshape(shape[0] * shape[1], *shape[2:])


def _after(len_q: int, len_k: int, device: torch.device) -> Tensor:
    """True at the keys after each query."""
    return torch.ones(len_q, len_k, dtype=torch.bool, device=device).triu(1)
