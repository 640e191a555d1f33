"""`VarlenTransformerEncoder`, `VarlenTransformerDecoder` and their layers: torch's, with everything computed on real tokens only.

Subclasses of torch's modules: same constructor, `state_dict` and forward arguments. A padded batch is packed once before the first layer
and put back after the last; in between attention, linear layers, norms, activations and dropout see packed rows ``(T, D)``, in training
and in evaluation. That pays about 1/fill on the whole stack, where leaving padding out of attention alone pays little, because attention
is a small share of an encoder at the lengths of text.

A module that replaces one of torch's must be token-wise (a LoRA layer, another norm, a mixture of experts): it is called on ``(T, D)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import unwrapped
from ..attention.forms import PaddingRows
from ..layout.seq_layout import SeqLayout
from .multihead import VarlenMultiheadAttention
from .stream import Masks, Prepared, pack_input, takes_prepared
from .token_wise import chunked_feed_forward

_ATTENTIONS = (nn.MultiheadAttention, VarlenMultiheadAttention)


class VarlenTransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Drop-in for `torch.nn.TransformerEncoderLayer` that computes real tokens only.

    Constructor, `state_dict`, initial weights and forward arguments are torch's. The differences: rows at padding are 0 (in torch
    they hold numbers in training and zeros in evaluation); ``is_causal=True`` needs no mask; there is no separate fast path, so that
    training and evaluation agree when dropout is 0. Every submodule is called, on packed rows ``(T, D)``, so that whatever replaces it
    (LoRA, another norm or activation) runs, and must be token-wise.

    Examples:
        >>> layer = VarlenTransformerEncoderLayer(16, 2, batch_first=True)
        >>> layer(torch.randn(2, 5, 16), src_key_padding_mask=torch.arange(5) >= torch.tensor([5, 3])[:, None]).shape
        torch.Size([2, 5, 16])
    """

    padding_rows: PaddingRows = "zero"

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device, dtype)
        # A new class for the same object, so that the initial weights are those that torch draws with this seed.
        self.self_attn.__class__ = VarlenMultiheadAttention
        self.__module__ = nn.TransformerEncoderLayer.__module__  # so that `torch.fx` makes a leaf of it, as it does of torch's

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        layout: SeqLayout | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            src: ``(B, S, D)``, or ``(S, B, D)`` unless ``batch_first``; ``(S, D)`` unbatched; packed ``(T, D)`` with ``layout``;
                or a nested tensor.
            src_mask: ``(S, S)`` or ``(B*N, S, S)``; True hides. Exactly causal masks are recognised and run packed; for all others
                attention is computed the padded way, and the rest of the layer packed. With packed ``src`` it is compared only if
                ``is_causal`` says so.
            src_key_padding_mask: ``(B, S)``, True is padding. Floats are added to the scores, as torch does: -inf is padding, and with
                other values than 0 and -inf attention is computed the padded way.
            is_causal: query i sees keys up to i; no mask needed.
            layout: in place of the mask, (B, S) whatever ``batch_first``.

        Returns:
            The shape of ``src``; exactly 0 at padding.

        Raises:
            AssertionError, RuntimeError: what torch raises for shapes and masks, with our fix appended.
            ArgumentError, LayoutError: a layout that does not fit, or together with a mask.

        In plain PyTorch: ``nn.TransformerEncoderLayer.forward(self, src, src_mask, src_key_padding_mask)``, times
        ``~src_key_padding_mask[..., None]``.
        """
        prepared: Any = layout
        if type(prepared) is Prepared:
            return self._compute(src, prepared)
        stream = pack_input(self.self_attn, "src", src, Masks(src_key_padding_mask, src_mask, is_causal, layout))
        return stream.restore(self._compute(stream.rows, stream.prepared([self])), self.padding_rows)

    def _compute(self, x: Tensor, layout: Any) -> Tensor:
        """The layer on packed rows, or on what `_attend` takes in place of a layout."""
        if self.norm_first:
            x = x + self._attend(self.norm1(x), layout)
            return x + chunked_feed_forward(self, self.norm2(x), self._ff_block)
        x = self.norm1(x + self._attend(x, layout))
        out: Tensor = self.norm2(x + chunked_feed_forward(self, x, self._ff_block))
        return out

    forward.takes_prepared, forward.inside = forward, _compute  # type: ignore[attr-defined]

    def _attend(self, x: Tensor, prepared: Prepared) -> Tensor:
        if type(self)._sa_block is not nn.TransformerEncoderLayer._sa_block:
            return _padded_block(self, self._sa_block, (x,), prepared)
        out: Tensor = self.dropout1(_attention(self.self_attn, x, x, prepared))
        return out


class VarlenTransformerEncoder(nn.TransformerEncoder):
    """Drop-in for `torch.nn.TransformerEncoder` that packs once before its first layer and unpacks after its last.

    Constructor, `state_dict` and forward arguments are torch's. Copies of a plain `nn.TransformerEncoderLayer` become
    `VarlenTransformerEncoderLayer`. A layer of another class gets packed rows if its ``forward`` takes ``layout=``, as
    ``layer(rows, src_mask=..., is_causal=..., layout=...)``; without that it is called as torch calls it, on padded tensors.

    The output has the shape of the input for every mask, in training and in evaluation, and is exactly 0 at padding. The layout is built
    once: one transfer from a mask on a device, none with ``layout=`` made from host lengths. A ``mask`` beside ``layout=`` is one transfer
    more, because it is compared with a causal one: pass ``is_causal=True`` without a mask where that is what it is.

    Examples:
        >>> encoder = VarlenTransformerEncoder(VarlenTransformerEncoderLayer(16, 2, batch_first=True), num_layers=2)
        >>> layout = SeqLayout.from_lengths([5, 3])
        >>> encoder(torch.randn(8, 16), layout=layout).shape  # packed in, packed out
        torch.Size([8, 16])
    """

    padding_rows: PaddingRows = "zero"

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        # torch warns where its nested tensors cannot serve a layer; they are not used here.
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor=False, mask_check=mask_check)
        self.enable_nested_tensor = enable_nested_tensor
        self.__module__ = nn.TransformerEncoder.__module__
        for layer in self.layers:
            if type(layer) is nn.TransformerEncoderLayer and type(layer.self_attn) in _ATTENTIONS:
                layer.__class__ = VarlenTransformerEncoderLayer
                layer.self_attn.__class__ = VarlenMultiheadAttention

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        layout: SeqLayout | None = None,
    ) -> Tensor:
        """The stack of layers, and the final norm.

        Args:
            src: ``(B, S, D)``, or ``(S, B, D)`` unless ``batch_first``; ``(S, D)`` unbatched; packed ``(T, D)`` with ``layout``;
                or a nested tensor.
            mask: ``(S, S)`` or ``(B*N, S, S)``; True hides. Compared with the causal mask once, in the layout's one transfer; while
                tracing ``is_causal`` is trusted instead, as torch documents. Any other mask: attention is computed the padded way.
            src_key_padding_mask: ``(B, S)``, True is padding. Floats are added to the scores, as torch does: -inf is padding, and with
                other values than 0 and -inf attention is computed the padded way.
            is_causal: True is causal without a mask too.
            layout: in place of the mask, (B, S) whatever ``batch_first``.

        Returns:
            The shape of ``src``; exactly 0 at padding.

        Raises:
            AssertionError, RuntimeError: what torch raises for shapes and masks, with our fix appended.
            ArgumentError, LayoutError: a layout that does not fit, or together with a mask.

        In plain PyTorch: ``nn.TransformerEncoder.forward(self, src, mask, src_key_padding_mask)``, times
        ``~src_key_padding_mask[..., None]``.
        """
        first = self.layers[0]
        stream = pack_input(first.self_attn, "src", src, Masks(src_key_padding_mask, mask, bool(is_causal), layout, compare=True))
        x, prepared = stream.rows, stream.prepared(self.layers, norm=self.norm)
        for layer in self.layers:
            if takes_prepared(layer, prepared):
                x = layer(x, layout=prepared)
            elif takes_layouts(layer):
                x = layer(x, src_mask=stream.mask, is_causal=stream.causal, layout=stream.layout)
            else:
                x = _padded_encoder_layer(layer, x, prepared)
        if self.norm is not None:
            x = self.norm(x)
        return stream.restore(x, self.padding_rows)


class VarlenTransformerDecoderLayer(nn.TransformerDecoderLayer):
    """Drop-in for `torch.nn.TransformerDecoderLayer` that computes real tokens only, of targets and of memory.

    As `VarlenTransformerEncoderLayer`. The masks of targets and memory are independent, and either may be left out.

    Examples:
        >>> layer = VarlenTransformerDecoderLayer(16, 2, batch_first=True)
        >>> layer(torch.randn(2, 5, 16), torch.randn(2, 3, 16)).shape
        torch.Size([2, 5, 16])
    """

    padding_rows: PaddingRows = "zero"

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device, dtype)
        self.self_attn.__class__ = self.multihead_attn.__class__ = VarlenMultiheadAttention
        self.__module__ = nn.TransformerDecoderLayer.__module__

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        layout: SeqLayout | None = None,
        layout_kv: SeqLayout | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            tgt: ``(B, L, D)``, or ``(L, B, D)`` unless ``batch_first``; ``(L, D)`` unbatched; packed ``(T, D)`` with ``layout``.
            memory: ``(B, S, D)`` likewise; packed with ``layout_kv``.
            tgt_mask, memory_mask: ``(L, L)`` and ``(L, S)``, or one for each head; True hides. As ``src_mask`` of
                `VarlenTransformerEncoderLayer`.
            tgt_key_padding_mask, memory_key_padding_mask: ``(B, L)`` and ``(B, S)``, True is padding; floats as in
                `VarlenTransformerEncoderLayer`. Without one every token is real: without a memory mask, targets attend to what
                is at the memory's padding.
            tgt_is_causal, memory_is_causal: target i sees targets, or memory, up to i; no mask needed.
            layout, layout_kv: of targets and of memory, in place of their padding masks.

        Returns:
            The shape of ``tgt``; exactly 0 at its padding.

        Raises:
            AssertionError, RuntimeError: what torch raises for shapes and masks, with our fix appended.
            ArgumentError, LayoutError: layouts that do not fit, or together with a mask, or one where two are needed.

        In plain PyTorch: ``nn.TransformerDecoderLayer.forward`` with the same masks, times ``~tgt_key_padding_mask[..., None]``.
        """
        own: Any = layout
        if type(own) is Prepared:
            return self._compute(tgt, memory, own, layout_kv)
        target = pack_input(self.self_attn, "tgt", tgt, Masks(tgt_key_padding_mask, tgt_mask, tgt_is_causal, layout))
        masks = Masks(memory_key_padding_mask, memory_mask, memory_is_causal, layout_kv)
        source = pack_input(self.multihead_attn, "memory", memory, masks, target)
        rows = self._compute(target.rows, source.rows, target.prepared([self]), target.prepared([self], source))
        return target.restore(rows, self.padding_rows)

    forward.takes_prepared = forward  # type: ignore[attr-defined]

    def _compute(self, x: Tensor, memory: Tensor, own: Prepared, across: Any) -> Tensor:
        if self.norm_first:
            x = x + self._attend(self.norm1(x), own)
            x = x + self._attend_to(self.norm2(x), memory, across)
            return x + chunked_feed_forward(self, self.norm3(x), self._ff_block)
        x = self.norm1(x + self._attend(x, own))
        x = self.norm2(x + self._attend_to(x, memory, across))
        out: Tensor = self.norm3(x + chunked_feed_forward(self, x, self._ff_block))
        return out

    def _attend(self, x: Tensor, prepared: Prepared) -> Tensor:
        if type(self)._sa_block is not nn.TransformerDecoderLayer._sa_block:
            return _padded_block(self, self._sa_block, (x,), prepared)
        out: Tensor = self.dropout1(_attention(self.self_attn, x, x, prepared))
        return out

    def _attend_to(self, x: Tensor, memory: Tensor, prepared: Prepared) -> Tensor:
        if type(self)._mha_block is not nn.TransformerDecoderLayer._mha_block:
            return _padded_block(self, self._mha_block, (x, memory), prepared)
        out: Tensor = self.dropout2(_attention(self.multihead_attn, x, memory, prepared))
        return out


class VarlenTransformerDecoder(nn.TransformerDecoder):
    """Drop-in for `torch.nn.TransformerDecoder` that packs targets and memory once and unpacks after its last layer.

    As `VarlenTransformerEncoder`; a layer of another class gets packed rows if its ``forward`` takes ``layout=`` and ``layout_kv=``.

    Examples:
        >>> decoder = VarlenTransformerDecoder(VarlenTransformerDecoderLayer(16, 2, batch_first=True), num_layers=2)
        >>> masks = dict(memory_key_padding_mask=torch.tensor([[False, True]] * 2))
        >>> decoder(torch.randn(2, 5, 16), torch.randn(2, 2, 16), tgt_is_causal=True, **masks).shape
        torch.Size([2, 5, 16])
    """

    padding_rows: PaddingRows = "zero"

    def __init__(self, decoder_layer: nn.TransformerDecoderLayer, num_layers: int, norm: nn.Module | None = None) -> None:
        super().__init__(decoder_layer, num_layers, norm)
        self.__module__ = nn.TransformerDecoder.__module__
        for layer in self.layers:
            attns = (getattr(layer, "self_attn", None), getattr(layer, "multihead_attn", None))
            if type(layer) is nn.TransformerDecoderLayer and all(type(a) in _ATTENTIONS for a in attns):
                layer.__class__ = VarlenTransformerDecoderLayer
                for attn in attns:
                    attn.__class__ = VarlenMultiheadAttention

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        layout: SeqLayout | None = None,
        layout_kv: SeqLayout | None = None,
    ) -> Tensor:
        """The stack of layers, and the final norm.

        Args, Returns, Raises: as `VarlenTransformerDecoderLayer`. Both masks are compared with causal ones once for all layers, where
        ``tgt_is_causal`` is None too; targets and memory are packed once.

        In plain PyTorch: ``nn.TransformerDecoder.forward`` with the same masks, times ``~tgt_key_padding_mask[..., None]``.
        """
        first = self.layers[0]
        target = pack_input(first.self_attn, "tgt", tgt, Masks(tgt_key_padding_mask, tgt_mask, bool(tgt_is_causal), layout, compare=True))
        masks = Masks(memory_key_padding_mask, memory_mask, memory_is_causal, layout_kv, compare=True)
        source = pack_input(first.multihead_attn, "memory", memory, masks, target)
        x, own, across = target.rows, target.prepared(self.layers, norm=self.norm), target.prepared(self.layers, source)
        for layer in self.layers:
            if takes_prepared(layer, own) and across.written:
                x = layer(x, source.rows, layout=own, layout_kv=across)
            elif takes_layouts(layer, "layout", "layout_kv"):
                x = layer(
                    x, source.rows, tgt_mask=target.mask, memory_mask=source.mask, tgt_is_causal=target.causal,
                    memory_is_causal=source.causal, layout=target.layout, layout_kv=source.layout,
                )  # fmt: skip
            else:
                x = _padded_decoder_layer(layer, x, source.rows, own, across)
        if self.norm is not None:
            x = self.norm(x)
        return target.restore(x, self.padding_rows)


LAYERS = (VarlenTransformerEncoderLayer, VarlenTransformerDecoderLayer)
VARLEN = (VarlenMultiheadAttention, *LAYERS, VarlenTransformerEncoder, VarlenTransformerDecoder)


# -------------------------------------------------------------------- modules that know no layout


def _attention(attn: nn.Module, x: Tensor, memory: Tensor, prepared: Prepared) -> Tensor:
    """Attention of packed rows; a module that takes no layout is called as torch calls it, on padded tensors."""
    if takes_prepared(attn, prepared):
        out: Tensor = attn(x, memory, memory, need_weights=False, layout=prepared)[0]
        return out
    if isinstance(attn, VarlenMultiheadAttention):
        layouts = {"layout": prepared.layout, "layout_kv": prepared.layout_kv}
        return attn(x, memory, memory, need_weights=False, attn_mask=prepared.mask, is_causal=prepared.causal, **layouts)[0]  # type: ignore[no-any-return]
    query = prepared.padded(x, attn)
    key = query if memory is x else prepared.padded(memory, attn, prepared.layout_kv)
    padding, mask = prepared.torch_masks(x)
    out = attn(query, key, key, attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=prepared.causal)[0]
    return prepared.packed(out, attn)


def _padded_block(layer: nn.Module, block: Callable[..., Tensor], rows: tuple[Tensor, ...], prepared: Prepared) -> Tensor:
    """A block of torch's layers that a subclass has overridden: it is called as torch calls it, on padded tensors."""
    padding, mask = prepared.torch_masks(rows[0])
    padded = [prepared.padded(x, layer, layout) for layout, x in zip((prepared.layout, prepared.layout_kv), rows, strict=False)]
    return prepared.packed(block(*padded, mask, padding, prepared.causal), layer)


def takes_layouts(layer: nn.Module, *names: str) -> bool:
    """Whether a layer can be called on packed rows, with these layouts; ``layout`` by default."""
    layer, names = unwrapped(layer), names or ("layout",)
    return isinstance(layer, LAYERS) or {*names} <= {*inspect.signature(type(layer).forward).parameters}


def _padded_encoder_layer(layer: nn.Module, x: Tensor, prepared: Prepared) -> Tensor:
    padding, mask = prepared.torch_masks(x)
    out = layer(prepared.padded(x, layer), src_mask=mask, is_causal=prepared.causal, src_key_padding_mask=padding)
    return prepared.packed(out, layer)


def _padded_decoder_layer(layer: nn.Module, x: Tensor, memory: Tensor, own: Prepared, across: Prepared) -> Tensor:
    (padding, mask), (memory_padding, memory_mask) = own.torch_masks(x), across.torch_masks(x)
    out = layer(
        own.padded(x, layer), own.padded(memory, layer, across.layout_kv), tgt_mask=mask, memory_mask=memory_mask,
        tgt_key_padding_mask=padding, memory_key_padding_mask=memory_padding, tgt_is_causal=own.causal,
        memory_is_causal=across.causal,
    )  # fmt: skip
    return own.packed(out, layer)
