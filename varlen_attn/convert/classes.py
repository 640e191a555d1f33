"""The classes that enabled modules get: the module stays the same object, with its weights, hooks and attributes."""

from __future__ import annotations

import math
import threading
import weakref
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, ClassVar, Literal, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._state import state
from .._switch import Class, Derived, Hook, Step, derived, original_class, run_as_it_came, switchable
from .._torch import global_hooks, is_observed, is_plain, is_tracing, pytree, unwrapped, without_subclass
from ..attention.dispatch import requested_backend
from ..attention.records import recorded_padded
from ..errors import ArgumentError, VarlenError, VarlenWarning, warn
from ..layout.seq_layout import SeqLayout
from ..nn.conformer import PARTS, conformer_of, on_rows, reaches_of, try_small, why_not_parts
from ..nn.masks import is_not_causal, pattern_of, read_masks
from ..nn.multihead import ADDITIVE, CAUSAL, NO_PATTERN, VarlenMultiheadAttention, are_one
from ..nn.prepacked import PREPACKED
from ..nn.stream import Prepared, filled
from ..nn.transformer import (
    VarlenTransformerDecoder,
    VarlenTransformerDecoderLayer,
    VarlenTransformerEncoder,
    VarlenTransformerEncoderLayer,
)
from .watch import ATTENTION, STACKS, Code, code_of, sees, why_replaced, why_touched

_switchable = partial(switchable, inside=Prepared)


# What `enable` sets on objects beside their class.
OPTIONS = ("hooks_packed", "padding_rows", "weights", "__module__")


class _Enabled:
    """How enabled modules run as they came.

    Attributes:
        takes: positions and names of the input and of its padding mask, as far as padding is filled at the end.
        padding: the same of all padding masks.
        hiding: and of what hides keys otherwise.
        packs: parts are called on packed rows, which hooks would see.
        hooks_packed: and may see.
        weights: attention gives them unless told otherwise, where they are asked for, until a forward shows that they are unread, or never.
    """

    original_class: ClassVar[type[nn.Module]]
    takes: ClassVar[tuple[tuple[int, str], ...]]
    padding: ClassVar[tuple[tuple[int, str], ...]]
    hiding: ClassVar[tuple[tuple[int, str], ...]]
    packs: ClassVar[bool] = True
    hooks_packed: bool = False
    weights: Literal["given", "asked", "unread", "none"] = "given"

    def why_as_it_came(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        why: str | None = self._why_torchs(args, kwargs)
        if why is not None:
            return why
        if self.padding_rows == "exact" and any(x is not None for x in _given(self.takes[1:], args, kwargs)):
            return 'padding_rows="exact" is what torch computes there'
        return why_replaced(self.original_class) or (why_touched(self, not self.hooks_packed) if self.packs else None)

    def as_it_came(self: Any, why: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, *padding = _given(self.takes, args, kwargs)
        layers = self.layers if isinstance(self, STACKS) else ()
        if why == NOTHING_PADDED and self.packs and torch.is_grad_enabled():  # as with padding, `pack_input`
            args, kwargs = (x.clone(), *args[1:]), {k: v for k, v in kwargs.items() if k != self.takes[0][1]}
        with self._noted(why, x):
            out = run_as_it_came(self, args, kwargs, all(unwrapped(x) is x and "forward" not in vars(x) for x in layers))
        if why in (NOTHING_PADDED, _DISTRIBUTED) or not padding or padding[0] is None or self.padding_rows == "exact":
            return out
        as_it_is = why_replaced(self.original_class)  # by somebody who may want anything at padding
        return out if as_it_is else filled(out, padding[0], self._attns()[0], self.padding_rows)

    def _attns(self: Any) -> list[Any]:
        return [layer.self_attn for layer in self.layers] if isinstance(self, STACKS) else [getattr(self, "self_attn", self)]

    def _noted(self: Any, why: str, x: Any) -> AbstractContextManager[object]:
        """The call is in the open records."""
        if not state.records or not isinstance(x, Tensor) or x.is_nested or is_tracing(x):
            return nullcontext()
        heads = (x if x.dim() == 3 else x[None]).detach().unflatten(-1, (self._attns()[0].num_heads, -1))
        return recorded_padded(self, heads, heads, heads, "torch's own", f"runs as it came: {why}")

    def _why_torchs(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Nothing is padded, as far as that is known without a transfer, and torch's own kernels are as good: those of a GPU, and for
        little work all. Unless a backend was requested, or the call has another mask: what ``is_causal`` without a mask means here, and
        what a query without a key gives, does not depend on the size of a batch."""
        x = args[0] if args else kwargs.get(self.takes[0][1])
        if not _is_seen(x):
            return _why_distributed(x)
        if x.is_cpu and x.numel() > _LITTLE:
            return None
        if any(x is not None and x is not False for x in _given(self.hiding, args, kwargs)):
            return None
        for mask in _given(self.padding, args, kwargs):
            if mask is not None and (not is_plain(mask) or not mask.is_cpu or bool(mask.any())):
                return None
        return NOTHING_PADDED if self._requests_nothing(kwargs, self._attns()) else None

    def _requests_nothing(self, kwargs: dict[str, Any], attns: list[Any]) -> bool:
        """No backend, no weights in another format, and nothing that torch's modules do not know."""
        if not _OURS.isdisjoint(kwargs) or requested_backend("auto") != "auto" or (state.ranks and self.packs):
            return False
        for x in attns:  # a generator is one more frame in each of many calls
            if getattr(x, "backend", "auto") != "auto" or getattr(x, "window", None) is not None or PREPACKED in vars(x):
                return False
        return True


NOTHING_PADDED = "nothing is padded, and torch's own is as quick"
_WEIGHTS = "attention weights exist in the padded computation only"
_LITTLE_PADDED = "to pack so little takes more time than it saves"
_LITTLE_MASKED = f"{_LITTLE_PADDED}, with a look at attn_mask (is_causal=True without a mask packs)"
_DISTRIBUTED = "a DTensor, whose rows may be on other ranks"
_PAYS = 4_000_000  # multiplications that padding takes, of which one with a key takes as long as four by a weight: more saves time (alike)
_SMALL = 1 << 13  # numbers: copies of fewer take no longer than to look at them
_LARGE = 1e15  # scores of two such tokens are numbers of float32
_LOOKS = 16  # times as much it must be for a mask to be looked at
_LITTLE = 1 << 18  # numbers of an input: below, a forward of torch's encoder took less time than ours on packed rows (Zen 4, one thread)
_OURS = frozenset({"layout", "layout_kv", "window", "backend"})  # keywords that torch's modules do not know


def _is_seen(x: Any) -> TypeGuard[Tensor]:
    """Whether ``x`` is a padded tensor, whose computation runs at once and for it alone."""
    return isinstance(x, Tensor) and not x.is_nested and is_plain(x) and not is_observed()


def _why_distributed(x: Any) -> str | None:
    return _DISTRIBUTED if hasattr(x, "full_tensor") else None


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
    packs = False

    def _wants(self, weights: bool | None) -> bool:
        if self.weights in ("unread", "none"):
            return weights is not False and self.weights == "unread" and not _unread.get(self)
        return self.weights == "given" if weights is None else weights

    def _why_torchs(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Or weights are wanted, or little is padded or hidden, and torch's own has the meaning that is wanted: every query sees a key.
        On a GPU that is not known without a transfer."""
        query, key, value, padding, weights, mask, _, causal, ours = _attention(*args, **kwargs)
        if not _is_seen(query):
            return _why_distributed(query)
        if not self._requests_nothing(ours, [self]) or (causal and mask is None):
            return None
        weights, hidden, additive = self._wants(weights), [0], False
        nothing = _WEIGHTS if weights and query.is_cpu else None if query.is_cpu and query.numel() > _LITTLE else NOTHING_PADDED
        if padding is mask is None:
            return nothing
        for x in (padding, mask):
            if x is not None and not (isinstance(x, Tensor) and is_plain(x) and x.is_cpu):
                return None
        bound = _LOOKS * _PAYS / (query.numel() + 1)
        if padding is None and query.is_cpu and (weights or self.embed_dim + 4 * max(key.shape) < bound):  # torch says what is wrong
            return _WEIGHTS if weights else _LITTLE_MASKED
        if padding is not None:
            if padding.is_floating_point():
                at = torch.isneginf(padding)
                additive = padding.requires_grad or bool(((padding != 0) & ~at).any())
            rows = at if padding.is_floating_point() else padding
            hidden = [row.count(True) for row in rows.reshape(-1, padding.shape[-1]).tolist()]
            if mask is None and not (additive or any(hidden)):
                return nothing and NOTHING_PADDED
        if not query.is_cpu or self.padding_rows == "edge" or not ((key is query or _is_seen(key)) and (value is key or _is_seen(value))):
            return None
        first = self.batch_first or query.dim() == 2
        shapes = {x.shape[:-1] if first else x.shape[1::-1] for x in (key, value)} | ({padding.shape} if padding is not None else set())
        *batch, columns = shapes.pop()
        length, size = query.shape[-2 if first else 0], math.prod(batch)
        if shapes or (
            columns in hidden if mask is None else mask.shape not in ((length, columns), (size * self.num_heads, length, columns))
        ):
            return None  # ours says what is wrong, or gives 0
        if weights or why_replaced(self.original_class):
            return _WEIGHTS if weights else None
        if additive:
            return ADDITIVE
        of_row = self.embed_dim * (self.embed_dim + 4 * columns)
        saved, pays = size * length * of_row, sum(hidden) * of_row >= _PAYS
        if mask is None:
            return None if pays else _LITTLE_PADDED
        own = padding is not None and self.padding_rows == "zero" and are_one(query, key, self)
        if pays and own and mask.dim() == 2 and not is_not_causal(mask, None):
            kwargs["layout"] = CAUSAL  # so that it is not compared again, as below
            return None
        if saved < _LOOKS * _PAYS:
            return _LITTLE_MASKED
        packs = self.bias_k is None and not self.add_zero_attn
        most = (saved - 2 * _PAYS) / self.embed_dim  # what the packed call may take
        worth = lambda x: self.embed_dim * x.layout_q.num_rows + 4 * x.pairs <= most  # noqa: E731
        pattern = pattern_of(mask, padding, size, query.device, own=own, worth=worth) if packs else None
        if pattern is None or not worth(pattern):
            return NO_PATTERN if pattern is None else _LITTLE_MASKED
        kwargs["layout"] = pattern  # so that it is not looked for again
        return None

    def as_it_came(self: Any, why: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        query, key, value, padding, weights, mask, average, causal, ours = _attention(*args, **kwargs)
        weights, zeros, meant = self._wants(weights), False, why in (_WEIGHTS, _LITTLE_PADDED, _LITTLE_MASKED, NO_PATTERN, ADDITIVE)
        hidden = padding if padding is None or not padding.is_floating_point() else torch.isneginf(padding)
        if meant and hidden is not None and (hidden is padding or hidden.any()):
            at = (hidden if self.batch_first or hidden.dim() == 1 else hidden.T).unsqueeze(-1)
            zeros = self.padding_rows == "zero" and are_one(query, key, self)  # else padded queries are computed as they are
            # NaN at padding reaches no token, nor what gets infinite. To look for it takes a tenth of the time of a copy without it.
            if key.numel() < _SMALL or not all(torch.linalg.vector_norm(x).item() < _LARGE for x in {key, value}):
                clean = key.masked_fill(at, 0)
                value = clean if value is key else value.masked_fill(at, 0)
                query, key = clean if zeros else query, clean
        with self._noted(why, query):
            hint = causal and not meant  # of a mask, which says so itself
            out, given = self.original_class.forward(self, query, key, value, padding, weights, mask, average, hint, **ours)
        if mask is not None and meant and (weights or query is key) and math.isnan(out.sum().item()):
            query, key, value = _attention(*args, **kwargs)[:3]
            out, given = VarlenMultiheadAttention.forward(self, query, key, value, padding, weights, mask, average, causal)
        elif zeros:
            keep = ~at
            out = out.mul_(keep)  # numbers: a tenth of the time of `masked_fill_`
            if given is not None:
                keep = keep if self.batch_first or hidden.dim() == 1 else keep.transpose(0, 1)
                keep = keep.unsqueeze(-3) if given.dim() > hidden.dim() + 1 else keep
                given = given * keep if given.requires_grad else given.mul_(keep)
        return out, given if self.weights != "unread" else _watched(self, given)


def _attention(
    query: Any = None, key: Any = None, value: Any = None, key_padding_mask: Any = None, need_weights: bool | None = None,
    attn_mask: Any = None, average_attn_weights: bool = True, is_causal: bool = False, **ours: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """What attention is given, with what it may leave out."""
    key = query if key is None else key
    value = key if value is None else value
    return query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, ours


@_switchable
class EnabledMultiheadAttention(_EnabledAttention, VarlenMultiheadAttention):
    """`VarlenMultiheadAttention` with torch's ``need_weights=True``, so that a model that reads the weights goes on doing so; unless
    ``weights`` says otherwise."""

    original_class: ClassVar[type[nn.Module]] = nn.MultiheadAttention

    def forward(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None, attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        # Who gives a layout knows more than torch's arguments, and asks for weights by name.
        knows = options.get("layout") is not None or options.get("layout_kv") is not None
        masks = key_padding_mask, self._wants(False if knows and need_weights is None else need_weights), attn_mask
        out, weights = super().forward(query, key, value, *masks, average_attn_weights, is_causal, **options)
        return out, _watched(self, weights)

    forward.takes_prepared = forward  # type: ignore[attr-defined]
    forward.inside = VarlenMultiheadAttention.forward  # type: ignore[attr-defined]  # a stack says that it wants no weights


# Whether forwards have shown that nothing reads the weights of a module; and what the last ones have shown, which counts from the next one
# on, because a checkpoint computes them again.
_unread: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
_shown: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class _Thread(threading.local):
    """Of the forwards under way that are looked at: whose each is, and the weights that modules have given."""

    given: tuple[tuple[nn.Module, list[tuple[Any, weakref.ref[Any]]]], ...] = ()


_thread = _Thread()


class Weights(Tensor):
    """Attention weights of a forward that shows whether anything reads them: an operation, or what is left of them at its end."""

    reader: weakref.ref[Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in pytree.tree_leaves((args, kwargs)):
            if type(x) is Weights and (module := x.reader()) is not None:
                _keep(module)
        return without_subclass(func, args, kwargs)


def _keep(module: Any) -> None:
    if _unread.get(module) is not False:
        warn('attention weights are read, so that need_weights="never" does not hold here: they are computed as before.', VarlenWarning)
    _unread[module] = False


def _watched(module: Any, weights: Tensor | None) -> Tensor | None:
    if module.weights != "unread" or module in _unread or not _thread.given or weights is None or not is_plain(weights):
        return weights
    watched = weights.as_subclass(Weights)
    watched.reader = weakref.ref(module)
    _thread.given[-1][1].append((module, weakref.ref(watched)))
    return watched


def before_forward(module: nn.Module, args: Any, kwargs: Any = None) -> None:
    """Hooks on a model of which some modules are asked for weights that may be unread."""
    if not torch.compiler.is_compiling():
        _unread.update({m: True for m in list(_shown) if m not in _unread})
        _shown.clear()
        left = (i for i, (m, _) in enumerate(_thread.given) if m is module)  # interrupted, and never left
        _thread.given = (*_thread.given[: next(left, None)], (module, []))


def after_forward(module: nn.Module, args: Any, kwargs: Any, result: Any = None) -> None:
    """After errors too, without a result. Weights that a model returns or keeps are there at its end."""
    if not torch.compiler.is_compiling() and _thread.given:
        *others, (_, given) = _thread.given
        _thread.given = tuple(others)
        kept = {m for m, weights in given if weights() is not None}
        for m in {m for m, _ in given} if result is not None else ():
            if m in kept:
                _keep(m)
            else:
                _shown[m] = True


def looking_at_weights(model: nn.Module, steps: list[Step]) -> list[Step]:
    """What is done to a model besides ``steps`` so that its forwards show what reads weights; what earlier ones have shown is forgotten."""
    asked = [x.module for x in steps if isinstance(x, Class) and ("weights", "unread") in x.options]
    for module in asked:
        _unread.pop(module, None)
        _shown.pop(module, None)
    return [Hook.new(model, before_forward, False), Hook.new(model, after_forward, True, True)] if asked else []


def found_looking(model: nn.Module) -> list[Hook]:
    return [hook for m in model.modules() for hook in Hook.found(m, (before_forward, after_forward).__contains__)]


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
        self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool = False,
        **options: Any,
    ) -> Tensor:  # fmt: skip
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
        self, src: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool | None = None,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        if src.is_nested or options:
            return super().forward(src, mask, src_key_padding_mask, is_causal, **options)
        facts = read_masks(src, None, mask, hint=bool(is_causal), compare=True)
        causal = bool(is_causal) if mask is None else not facts.not_causal
        x = src
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask)
        return x if self.norm is None else self.norm(x)


# -------------------------------------------------------------------- conformers

_UNREAD = "its lengths cannot be read: it is traced, transformed or distributed"
_NO_LENGTHS = "lengths must be integers of one dimension, one for each utterance, of which the longest has all columns"
# Multiplications of a layer that are saved: more take longer than packing, and what a layout takes (Zen 4, one thread). A GPU multiplies
# some hundred times as fast, and launches kernels no faster: an estimate.
_PAYS_CONFORMER, _BY_WIDTH = 30_000_000, 23  # for each row, by the square of its width, where linear layers are four times as wide


class _Lengths(list[int]):
    """As `EnabledConformer.why_as_it_came` has read them, in place of a layout."""


class EnabledConformer(Derived, _Enabled):
    takes = (0, "input"), (1, "lengths")
    padding_rows: str = "zero"  # or "alone"
    code: ClassVar[Code]  # which does not run on rows

    def forward(self: Any, input: Tensor, lengths: Tensor, layout: Any = None) -> tuple[Tensor, Tensor]:
        """As torchaudio's. ``layout`` is not for callers."""
        if type(layout) is not _Lengths:
            raise ArgumentError("`layout` must be left out, because a Conformer takes the lengths of padded rows: call it without.")
        return on_rows(self, input, layout, self.padding_rows), lengths

    def why_as_it_came(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        x, lengths = _given(self.takes, args, kwargs)
        if not all(isinstance(t, Tensor) and not t.is_nested and is_plain(t) for t in (x, lengths)):
            return _UNREAD
        if x.dim() != 3 or lengths.shape != x.shape[:1] or lengths.device != x.device or lengths.is_floating_point() or not x.numel():
            return _NO_LENGTHS
        columns, known, alone = x.shape[1], _Lengths(max(n, 0) for n in lengths.tolist()), self.padding_rows == "alone"
        if max(known) != columns or min(known) == columns:
            return NOTHING_PADDED if min(known) == columns else _NO_LENGTHS
        worth = _PAYS_CONFORMER * (1 if x.is_cpu else 100) // (_BY_WIDTH * x.shape[2] ** 2 + 1)
        if not alone and len(known) * columns - sum(known) < worth:
            return _LITTLE_PADDED
        why = why_replaced(self.original_class, self.code) or _why_not_on_rows(self, alone, running=True)
        kwargs["layout"] = known
        if why is None and not alone:
            left = [sum(columns - min(n + reach, columns) if n else columns for n in known) for reach in reaches_of(self)[:-1]]
            return _LITTLE_PADDED if sum(left) < worth * len(left) else None
        return why

    def as_it_came(self: Any, why: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (x, lengths), known = _given(self.takes, args, kwargs), kwargs.pop("layout", None)
        alone = self.padding_rows == "alone"
        if alone and torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(type(self).forward)(self, *args, **kwargs)
        with self._noted(why, x):
            if known is not None and alone and not any(m.training and isinstance(m, nn.BatchNorm1d) for m in self.modules()):
                each = ((x[i : i + 1, :n], lengths[i : i + 1]) for i, n in enumerate(known) if n)
                rows = torch.cat([run_as_it_came(self, one, {}, False)[0][0] for one in each])
                return SeqLayout.from_lengths(known, device=x.device).unpack(rows), lengths
            inside = why == NOTHING_PADDED and all(unwrapped(m) is m and "forward" not in vars(m) for m in self.conformer_layers)
            out, given = run_as_it_came(self, args, kwargs, inside)
        if why == NOTHING_PADDED or why_replaced(self.original_class, self.code):
            return out, given
        if alone:
            raise VarlenError(
                f"padding_rows='alone' must not be asked for here, where each utterance would get the padded model's numbers: {why}. "
                "Call varlen_attn.disable(model) first, or enable it without."
            )
        padding = torch.arange(x.shape[1], device=lengths.device) >= lengths[:, None]
        if self.padding_rows == "zero":
            return out.masked_fill(padding[..., None], 0), given
        return filled(out.transpose(0, 1), padding, self._attns()[0], self.padding_rows).transpose(0, 1), given

    def _attns(self: Any) -> list[Any]:
        return [layer.self_attn for layer in self.conformer_layers]


@cache
def enabled_conformer(original: Any) -> Any:
    return _switchable(derived(EnabledConformer, original, enabled_conformer, code=_code(original)))


def _code(cls: Any) -> Code:
    own = [x for _, name in PARTS if (x := cls.forward.__globals__.get(name))]
    parts = [
        code_of(x, "forward", "_apply_convolution", "_conv_forward") for x in (conformer_of(cls), *own, nn.Conv1d, nn.GLU, nn.GroupNorm)
    ]
    return sum(parts, start=ATTENTION)


def _why_not_on_rows(model: nn.Module, alone: bool, running: bool = False) -> str | None:
    return "hooks for all modules" if any(map(sees, global_hooks)) else why_not_parts(model, alone, running)


def why_not_conformer(model: Any, padding_rows: str | None) -> str | None:
    """Why it is not to have ``padding_rows``, which may be the reason."""
    host: Any = original_class(model)
    if "forward" in vars(model) or host.forward is not conformer_of(host).forward:
        return "has a forward of its own"
    if not len(model.conformer_layers):
        return "has no layers"
    why = why_replaced(host, enabled_conformer(host).code) if padding_rows in ("zero", "edge", "alone") else padding_rows
    try:
        return why or _why_not_on_rows(model, padding_rows == "alone") or try_small(conformer_of(host))
    except Exception as error:
        return f"a small one could not be packed: {type(error).__name__}: {error}"


def says_of_conformer(padding_rows: str | None, reader: str | None) -> str:
    """For the report."""
    if padding_rows == "alone":
        return "each utterance gets the numbers that it has alone, and not those of the padded model, which it gets without padding_rows"
    read = f', which {reader} may read: padding_rows="exact" keeps them' if reader else ""
    numbers = 'real frames get the padded model\'s numbers, those that each utterance has alone with padding_rows="alone"'
    return f"{numbers}; rows at padding are {padding_rows or 0}{read}"
