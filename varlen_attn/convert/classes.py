"""The classes that enabled modules get: the module stays the same object, with its weights, hooks and attributes."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from .._switch import switchable
from ..nn.masks import read_masks
from ..nn.multihead import VarlenMultiheadAttention
from ..nn.stream import Prepared
from ..nn.transformer import (
    VarlenTransformerDecoder,
    VarlenTransformerDecoderLayer,
    VarlenTransformerEncoder,
    VarlenTransformerEncoderLayer,
)

_switchable = partial(switchable, inside=Prepared)


@_switchable
class EnabledMultiheadAttention(VarlenMultiheadAttention):
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
class EnabledMultiheadAttentionWithoutWeights(VarlenMultiheadAttention):
    """Enabled with ``need_weights=False``."""

    original_class: ClassVar[type[nn.Module]] = nn.MultiheadAttention


@_switchable
class EnabledTransformerEncoderLayer(VarlenTransformerEncoderLayer):
    original_class: ClassVar[type[nn.Module]] = nn.TransformerEncoderLayer


@_switchable
class EnabledTransformerEncoder(VarlenTransformerEncoder):
    original_class: ClassVar[type[nn.Module]] = nn.TransformerEncoder


@_switchable
class EnabledTransformerDecoderLayer(VarlenTransformerDecoderLayer):
    original_class: ClassVar[type[nn.Module]] = nn.TransformerDecoderLayer


@_switchable
class EnabledTransformerDecoder(VarlenTransformerDecoder):
    original_class: ClassVar[type[nn.Module]] = nn.TransformerDecoder


@_switchable
class AttentionOnlyTransformerEncoderLayer(EnabledTransformerEncoderLayer):
    """torch's layer on padded tensors, without its fast path: that reads the weights of ``self_attn`` and never calls it."""

    original_class: ClassVar[type[nn.Module]] = nn.TransformerEncoderLayer

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
