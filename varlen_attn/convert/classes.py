"""The classes that enabled modules get: the module stays the same object, with its weights, hooks and attributes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from .._state import state
from .._switch import run_as_it_came, switchable
from .._torch import is_tracing
from ..attention.records import recorded_padded
from ..nn.masks import read_masks
from ..nn.multihead import VarlenMultiheadAttention
from ..nn.stream import Prepared, filled
from ..nn.transformer import (
    VarlenTransformerDecoder,
    VarlenTransformerDecoderLayer,
    VarlenTransformerEncoder,
    VarlenTransformerEncoderLayer,
    unwrapped,
)
from .watch import STACKS, why_replaced, why_touched

_switchable = partial(switchable, inside=Prepared)


# What `enable` sets on objects beside their class.
OPTIONS = ("hooks_packed", "padding_rows")


class _Enabled:
    """How enabled modules run as they came.

    Attributes:
        takes: positions and names of the input and of its padding mask, as far as padding is filled at the end.
        packs: parts are called on packed rows, which hooks would see.
        hooks_packed: and may see.
    """

    original_class: ClassVar[type[nn.Module]]
    takes: ClassVar[tuple[tuple[int, str], ...]]
    packs: ClassVar[bool] = True
    hooks_packed: bool = False

    def why_as_it_came(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if self.padding_rows == "exact" and any(x is not None for x in _given(self.takes[1:], args, kwargs)):
            return 'padding_rows="exact" is what torch computes there'
        return why_replaced(self.original_class) or (why_touched(self, not self.hooks_packed) if self.packs else None)

    def as_it_came(self: Any, why: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, *padding = _given(self.takes, args, kwargs)
        layers = self.layers if isinstance(self, STACKS) else ()
        owner = layers[0] if layers else self
        attn: Any = getattr(owner, "self_attn", owner)
        note: AbstractContextManager[object] = nullcontext()
        if state.records and isinstance(x, Tensor) and not (x.is_nested or is_tracing(x)):
            heads = (x if x.dim() == 3 else x[None]).detach().unflatten(-1, (attn.num_heads, -1))
            note = recorded_padded(self, heads, heads, heads, "torch's own", f"runs as it came: {why}")
        with note:
            out = run_as_it_came(self, args, kwargs, all(unwrapped(x) is x and "forward" not in vars(x) for x in layers))
        as_it_is = self.padding_rows == "exact" or why_replaced(self.original_class)  # by somebody who may want anything at padding
        return out if as_it_is or not padding or padding[0] is None else filled(out, padding[0], attn, self.padding_rows)


def _given(takes: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in takes]


class _EnabledEncoder(_Enabled):
    takes = (0, "src"), (2, "src_key_padding_mask")


class _EnabledDecoder(_Enabled):
    takes = (0, "tgt"), (4, "tgt_key_padding_mask")


class _EnabledAttention(_Enabled):
    takes = ((0, "query"),)
    packs = False


@_switchable
class EnabledMultiheadAttention(_EnabledAttention, VarlenMultiheadAttention):
    """`VarlenMultiheadAttention` with torch's ``need_weights=True``, so that a model that reads the weights goes on doing so."""

    original_class: ClassVar[type[nn.Module]] = nn.MultiheadAttention

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, **options)

    forward.takes_prepared = forward  # type: ignore[attr-defined]
    forward.inside = VarlenMultiheadAttention.forward  # type: ignore[attr-defined]  # a stack says that it wants no weights


@_switchable
class EnabledMultiheadAttentionWithoutWeights(_EnabledAttention, VarlenMultiheadAttention):
    """Enabled with ``need_weights=False``."""

    original_class: ClassVar[type[nn.Module]] = nn.MultiheadAttention


@_switchable
class EnabledTransformerEncoderLayer(_EnabledEncoder, VarlenTransformerEncoderLayer):
    original_class: ClassVar[type[nn.Module]] = nn.TransformerEncoderLayer


@_switchable
class EnabledTransformerEncoder(_EnabledEncoder, VarlenTransformerEncoder):
    original_class: ClassVar[type[nn.Module]] = nn.TransformerEncoder


@_switchable
class EnabledTransformerDecoderLayer(_EnabledDecoder, VarlenTransformerDecoderLayer):
    original_class: ClassVar[type[nn.Module]] = nn.TransformerDecoderLayer


@_switchable
class EnabledTransformerDecoder(_EnabledDecoder, VarlenTransformerDecoder):
    original_class: ClassVar[type[nn.Module]] = nn.TransformerDecoder


@_switchable
class AttentionOnlyTransformerEncoderLayer(EnabledTransformerEncoderLayer):
    """torch's layer on padded tensors, without its fast path: that reads the weights of ``self_attn`` and never calls it."""

    original_class: ClassVar[type[nn.Module]] = nn.TransformerEncoderLayer
    packs = False

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        if src.is_nested or options:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal, **options)
        return self._compute(src, (src_mask, src_key_padding_mask, is_causal))

    def _attend(self, x: Tensor, prepared: Any) -> Tensor:
        return super()._attend(x, prepared) if type(prepared) is Prepared else self._sa_block(x, *prepared)


@_switchable
class AttentionOnlyTransformerEncoder(EnabledTransformerEncoder):
    """torch's stack on padded tensors, with the caller's masks and without nested tensors."""

    original_class: ClassVar[type[nn.Module]] = nn.TransformerEncoder
    packs = False

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        **options: Any,
    ) -> Tensor:
        if src.is_nested or options:
            return super().forward(src, mask, src_key_padding_mask, is_causal, **options)
        facts = read_masks(src, None, mask, hint=bool(is_causal), compare=True)
        causal = bool(is_causal) if mask is None else not facts.not_causal
        x = src
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask)
        return x if self.norm is None else self.norm(x)
