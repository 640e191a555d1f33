"""The classes that enabled modules get: the module stays the same object, with its weights, hooks and attributes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._state import state
from .._switch import run_as_it_came, switchable
from .._torch import is_observed, is_plain, is_tracing
from ..attention.dispatch import requested_backend
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
OPTIONS = ("hooks_packed", "padding_rows", "__module__")


class _Enabled:
    """How enabled modules run as they came.

    Attributes:
        takes: positions and names of the input and of its padding mask, as far as padding is filled at the end.
        padding: the same of all padding masks.
        hiding: and of what hides keys otherwise.
        packs: parts are called on packed rows, which hooks would see.
        hooks_packed: and may see.
    """

    original_class: ClassVar[type[nn.Module]]
    takes: ClassVar[tuple[tuple[int, str], ...]]
    padding: ClassVar[tuple[tuple[int, str], ...]]
    hiding: ClassVar[tuple[tuple[int, str], ...]]
    packs: ClassVar[bool] = True
    hooks_packed: bool = False

    def why_as_it_came(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if self._gains_nothing(args, kwargs):
            return NOTHING_PADDED
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
        if why == NOTHING_PADDED and self.packs and torch.is_grad_enabled():  # as with padding, `pack_input`
            args, kwargs = (x.clone(), *args[1:]), {k: v for k, v in kwargs.items() if k != self.takes[0][1]}
        with note:
            out = run_as_it_came(self, args, kwargs, all(unwrapped(x) is x and "forward" not in vars(x) for x in layers))
        if why == NOTHING_PADDED or not padding or padding[0] is None or self.padding_rows == "exact":
            return out
        as_it_is = why_replaced(self.original_class)  # by somebody who may want anything at padding
        return out if as_it_is else filled(out, padding[0], attn, self.padding_rows)

    def _gains_nothing(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Nothing is padded, as far as that is known without a transfer, and torch's own kernels are as good: those of a GPU, and for
        little work all. Unless a backend was requested, or the call has another mask: what ``is_causal`` without a mask means here, and
        what a query without a key gives, does not depend on the size of a batch."""
        x = args[0] if args else kwargs.get(self.takes[0][1])
        if not isinstance(x, Tensor) or x.is_nested or not is_plain(x) or is_observed() or (x.is_cpu and x.numel() > _LITTLE):
            return False
        if any(x is not None and x is not False for x in _given(self.hiding, args, kwargs)):
            return False
        for mask in _given(self.padding, args, kwargs):
            if mask is not None and (not is_plain(mask) or not mask.is_cpu or bool(mask.any())):
                return False
        attns = [layer.self_attn for layer in self.layers] if isinstance(self, STACKS) else [getattr(self, "self_attn", self)]
        return bool(self._requests_nothing(kwargs, attns))

    def _requests_nothing(self, kwargs: dict[str, Any], attns: list[Any]) -> bool:
        """No backend, and nothing that torch's modules do not know."""
        if not _OURS.isdisjoint(kwargs) or requested_backend("auto") != "auto":
            return False
        return all(getattr(x, "backend", "auto") == "auto" and getattr(x, "window", None) is None for x in attns)


NOTHING_PADDED = "nothing is padded, and torch's own is as quick"
_WEIGHTS = "attention weights exist in the padded computation only"
_LITTLE = 1 << 18  # numbers of an input: below, a forward of torch's encoder took less time than ours on packed rows (Zen 4, one thread)
_OURS = frozenset({"layout", "layout_kv", "window", "backend"})  # keywords that torch's modules do not know


def _given(takes: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in takes]


class _EnabledEncoder(_Enabled):
    takes = (0, "src"), (2, "src_key_padding_mask")
    padding = takes[1:]
    hiding = (1, "src_mask"), (1, "mask"), (3, "is_causal")


class _EnabledDecoder(_Enabled):
    takes = (0, "tgt"), (4, "tgt_key_padding_mask")
    padding = *takes[1:], (5, "memory_key_padding_mask")
    hiding = (2, "tgt_mask"), (3, "memory_mask"), (6, "tgt_is_causal"), (7, "memory_is_causal")


class _EnabledAttention(_Enabled):
    takes = ((0, "query"),)
    padding = ((3, "key_padding_mask"),)
    hiding = (5, "attn_mask"), (7, "is_causal")
    packs = False
    gives_weights: ClassVar[bool] = False  # unless told otherwise

    def why_as_it_came(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        return _WEIGHTS if self._is_torchs(args, kwargs) else super().why_as_it_came(args, kwargs)

    def _is_torchs(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Weights are wanted, which exist in the padded computation only, and torch's own has the meaning that is wanted: every query sees
        a key. On a GPU that is not known without a transfer."""
        if not (args[4] if len(args) > 4 else kwargs.get("need_weights", self.gives_weights)) or len(args) > 5:
            return False
        query, key, value, padding = _given(((0, "query"), (1, "key"), (2, "value"), (3, "key_padding_mask")), args, kwargs)
        if not isinstance(query, Tensor) or not query.is_cpu or query.is_nested or not is_plain(query) or is_observed():
            return False
        if any(x is not None and x is not False for x in _given(self.hiding, args, kwargs)) or self.padding_rows == "edge":
            return False
        if padding is not None:
            key = query if key is None else key
            value = key if value is None else value
            fits = all(isinstance(x, Tensor) and padding.shape == self._columns(x) for x in (key, value))  # else ours says what is wrong
            if not fits or not is_plain(padding) or padding.dtype != torch.bool or bool(padding.all(-1).any()):
                return False
        return bool(self._requests_nothing(kwargs, [self]))

    def _columns(self: Any, x: Tensor) -> torch.Size:
        return (x if self.batch_first or x.dim() == 2 else x.transpose(0, 1)).shape[:-1]

    def as_it_came(self: Any, why: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = ("query", "key", "value", "key_padding_mask", "need_weights")
        given = dict(zip(names, args, strict=False)) | kwargs
        query, padding = given["query"], given.get("key_padding_mask")
        key = given.setdefault("key", None)
        given["value"] = value = given.get("value")
        key = query if key is None else key
        value = key if value is None else value
        if why is not _WEIGHTS or padding is None:
            return super().as_it_came(why, (query, key, value, *args[3:]), {k: x for k, x in kwargs.items() if k not in names[:3]})
        at = (padding if self.batch_first or padding.dim() == 1 else padding.T)[..., None]
        inputs = {id(x): x.masked_fill(at, 0) for x in (key, value)}  # NaN at padding reaches no token
        zeros = self.padding_rows == "zero" and query.is_set_to(key)  # else padded queries are computed as they are
        given |= {"query": inputs[id(key)] if zeros else query, "key": inputs[id(key)], "value": inputs[id(value)]}
        out, weights = super().as_it_came(why, (), {"need_weights": True, **given})
        if zeros:
            per_head = weights.dim() > padding.dim() + 1
            out = out.masked_fill(at, 0)
            weights = weights.masked_fill((padding.unsqueeze(-2) if per_head else padding)[..., None], 0)
        return out, weights


@_switchable
class EnabledMultiheadAttention(_EnabledAttention, VarlenMultiheadAttention):
    """`VarlenMultiheadAttention` with torch's ``need_weights=True``, so that a model that reads the weights goes on doing so."""

    original_class: ClassVar[type[nn.Module]] = nn.MultiheadAttention
    gives_weights = True

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
