"""Packing once around a stack of transformers' layers, whatever comes before and after it.

Every layer of the stack gets a hook that sees its arguments. Where these are the padded ``(B, S, D)`` hidden states and a `VarlenMask` with
padding, the layer gets ``(1, T, D)`` rows, and everything else by token (rotary cosines, position ids) packed alike; its result goes to
the next layer as it is, and the hook of the last one puts the tokens back. Positions, embeddings, convolutions, poolers and losses stay
padded code on padded tensors, so that rotary, absolute and convolutional positions are what they were.

The hooks hold no state: rows are told from padded tensors by their shape, against the mask that every layer is given. So layers
may be checkpointed, recomputed, shared or skipped. What the first layer settles for all is kept on that mask: arguments that were packed,
and how attention is computed.

Attention that needs columns (a position bias by columns, code of its own, keys of others) is an island in such a stack: a hook around it
puts the tokens back, the model's own code computes the padded batch, and the tokens of its result are packed again. Everything else in the
layers is computed on rows.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import cache, partial, update_wrapper, wraps
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..._switch import Class, Derived, Entry, Hook, Step, around, derived, original_class, own_class
from ..._torch import begins_no_graph, between_graphs, is_compiled, unwrapped, with_first_dimension
from ...attention.records import Call, write
from ...data.host_lengths import HostLengths
from ...errors import VarlenError
from ...layout.seq_layout import SeqLayout
from ...parallel.rows import all_rows, refuse_mixing
from .attention import captured, collected
from .labelled import labelled_in, read_labelled
from .mask import (
    ISLAND,
    LOOKED_AT,
    Forward,
    Meaning,
    Pattern,
    VarlenMask,
    around_island,
    caller,
    end_rows,
    enter_forward,
    is_entered,
    island_of,
    leave_forward,
    meaning_of_numbers,
    of_numbers,
    take_over,
)

_SKIPPING_LAYERS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
_ASKING_FOR_MORE = ("output_attentions", "output_router_logits", "output_scores")
# Arguments of layers that are not about the stack's own tokens, whatever their shape.
_FOREIGN = ("encoder", "cross", "key_value_states", "memory", "bias", "cu_seq", "visual", "image", "vision")


class ModelId:
    """Of a model that was enabled, by identity: copies of the model have a copy of it.

    Attributes:
        left: the hooks begin nothing new: not all are there yet, or they are about to go.
        begun: identities of the stacks' first layers that were given rows.
        hooks: which hooks of others may see rows, as `varlen_attn.enable` takes it.
        padding_rows: what rows at padding hold after a packed stack, as the caller of `enable` said; None for edge rows, and for stacks
            that run as they came where a reader is known.
        reads_first: encoders may be pooled by their first column, which must be what it was.
    """

    left = False
    hooks = "leave"  # these three also of pickles of earlier versions
    padding_rows: str | None = None
    reads_first = True

    def __init__(self, hooks: str = "leave", padding_rows: str | None = None, reads_first: bool = True) -> None:
        self.hooks, self.padding_rows, self.reads_first = hooks, padding_rows, reads_first
        self.begun: set[int] = set()


class LayerHook:
    """Before a layer: packs its arguments. After the last one: puts the tokens back.

    An object and not a function, so that deep copies and pickles of a model keep it.

    Attributes:
        tree: of the model.
        names: the positional parameters of the layer's ``forward``.
        last: whether the tokens are put back after this layer.
        islands: its attention is one: it gets what the layer was given.
        crosses: what it is given of a source goes to it as rows too.
    """

    tree = ModelId()  # these three of pickles of earlier versions
    islands = False
    crosses = False

    def __init__(self, tree: ModelId, layer: nn.Module, last: bool, islands: bool = False, crosses: bool = False) -> None:
        self.tree, self.islands = tree, islands
        parameters = inspect.signature(type(layer).forward).parameters.values()
        self.names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))[1:]
        self.last, self.crosses = last, crosses and not islands and "encoder_hidden_states" in self.names

    @between_graphs
    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if kwargs is None:  # being removed
            return None
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor) or torch.compiler.is_compiling():
            return None
        if self.islands:
            around_island(None)
        meaning = self._meaning(args, kwargs)
        if meaning is None or meaning.rows is not None:
            return None
        # Only a batch with padding is packed, so the shape of rows is another.
        is_rows = hidden.shape[:2] != meaning.shape[::2] and hidden.shape[:2] == (1, meaning.tokens.num_rows)
        if not is_rows:
            reason = meaning.padded_because or _why_as_it_came(module, hidden, meaning, self.islands, self.tree)
            if reason is None and not meaning.forwards:
                reason = "no forward of its model is under way, or it began before that was enabled"
            filled = reason is None
            reason = reason or _why_padded(meaning, self.islands)
            if reason is not None:
                meaning.keep_padded(reason, filled)
                return None
        # No view: in `torch.compile` that would be another graph than for what a layer gives.
        rows = hidden if is_rows else with_first_dimension(meaning.tokens.pack(hidden))
        packed: list[Any] = []
        named = (*zip(self.names, args, strict=False), *kwargs.items())
        source = _of_source(meaning, dict(named)) if self.crosses and meaning.tokens.ranks is None else {}
        for name, x in named:
            known = source.get(name) or meaning.packed_arguments.get((name, id(x)))
            y = rows if x is hidden else known[1] if known is not None else _packed(name, x, meaning, hidden, rows, self.islands)
            if y is _REFUSED and is_rows:
                raise VarlenError(
                    f"the layers of {type(module).__name__} were given packed rows, but now `{name}`, which cannot be packed: call "
                    'varlen_attn.enable(model, level="attention").'
                )
            if y is _REFUSED:
                kind = f", a {type(x).__name__}" if hasattr(x, "get_seq_length") else ""
                meaning.keep_padded(f"the layers are given `{name}`{kind}, which is not by token, or asked for it", filled)
                return None
            packed.append(y)
        if meaning.tokens.ranks is not None:
            refuse_mixing([module])
        if not is_rows:
            meaning.begin_rows(module)
            if self.tree.left:
                end_rows()
                return None
            meaning.hands_on(rows=True)
            self.tree.begun.add(id(module))
        if self.islands:
            around_island(meaning)
        return tuple(packed[: len(args)]), dict(zip(kwargs, packed[len(args) :], strict=True))

    @between_graphs
    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, result: Any = None) -> Any:
        traced = torch.compiler.is_compiling()
        meaning = self._meaning(args, kwargs) if isinstance(kwargs, dict) and not traced else None
        if meaning is None or not self.last:  # pickles of earlier versions have this after every layer
            return None
        hidden = result if isinstance(result, Tensor) else result[0]
        in_rows = meaning.rows is not None or (self.islands and meaning.shape[::2] != hidden.shape[:2] == (1, meaning.tokens.num_rows))
        if in_rows:
            meaning.hands_on(rows=False)
            end_rows()
        elif not meaning.filled:
            return None
        layout, shape = meaning.rows or meaning.tokens, hidden.shape[:2] if in_rows else meaning.shape[::2]

        def put_back(x: Tensor) -> Tensor:
            """Rows at padding hold the same, whether the stack ran packed or padded."""
            whole, rows = all_rows(layout, x[0]) if in_rows else (layout.whole, layout.whole.pack(x))
            return whole.unpack(rows, 0 if self.tree.padding_rows == "zero" else "edge")

        states = collected().get("hidden_states", [])
        if not states and "hidden_states" in collected() and args:  # of one layer, whose input is collected after this
            chosen = collected().get("_hidden_states_layers")
            states.append(args[0] if chosen is None or 0 in chosen else None)
        for i, x in enumerate(states):  # of the layers before; this one's is collected after it was unpacked
            if x is not None and x.shape[:2] == shape:
                states[i] = put_back(x)
        return put_back(result) if isinstance(result, Tensor) else (put_back(result[0]), *result[1:])

    def before_islands(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """`before`, and in graphs nothing, which goes on in them."""
        return None if torch.compiler.is_compiling() else self.before(module, args, kwargs)

    def after_islands(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, result: Any = None) -> Any:
        return None if torch.compiler.is_compiling() else self.after(module, args, kwargs, result)

    def _meaning(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Meaning | None:
        """Of the first mask that a layer is given. Attention code of its own has one of numbers, made of that which its model was given."""
        named = (*zip(self.names, args, strict=False), *kwargs.items())
        for name, x in named:
            if isinstance(x, VarlenMask) and not _is_foreign(name):
                return x.meaning
        named = named if self.islands else ()
        mask = next((x for name, x in named if "mask" in name and isinstance(x, Tensor) and not _is_foreign(name)), None)
        return None if mask is None else meaning_of_numbers(mask)


class Island:
    """Around attention that needs columns, in a stack whose layers are computed on rows. In graphs of `torch.compile`, which these hooks do
    not end, the layers are not.

    Attributes:
        recorded: the attention itself says what it computes.
    """

    names: tuple[str, ...] = ()  # of pickles of earlier versions

    def __init__(self, recorded: bool, module: nn.Module) -> None:
        self.recorded, self.names = recorded, tuple(inspect.signature(type(module).forward).parameters)[1:]

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if kwargs is None or torch.compiler.is_compiling():
            return None
        named = (*zip((*self.names, *[""] * len(args)), args, strict=False), *kwargs.items())
        mask = next((x for _, x in named if isinstance(x, VarlenMask) or (isinstance(x, Tensor) and x in of_numbers)), None)
        own = None if mask is None else mask.meaning if isinstance(mask, VarlenMask) else of_numbers[mask]
        if own is not None and not any(_is_source(name, x) for name, x in named):
            hidden = args[0] if args else kwargs["hidden_states"]  # a layer that is computed again did not say that it begins
            around_island(own if own.shape[::2] != hidden.shape[:2] == (1, own.tokens.num_rows) else None)
        meaning = island_of()
        if meaning is None:
            return None
        rows, given = (1, meaning.tokens.num_rows), {id(y): x for x, y in meaning.packed_arguments.values()}
        if not self.recorded:
            slots = meaning.shape[0] * meaning.shape[2]
            write(Call("dense", "its own code", rows=slots, slots=slots, reason=ISLAND), module)

        def padded(name: str, x: Any) -> Any:
            if _is_source(name, x):  # perhaps at as many columns
                columns: Any = x.view_as(x)
                columns.of_source, columns.rows = None, None
                if own is not None and own.padding is not None and own.tokens.padded_len == x.shape[1]:
                    columns.of_source, columns.rows = own.tokens, with_first_dimension(own.tokens.pack(x))
                return columns
            if id(x) in given or not isinstance(x, Tensor) or x.dim() not in (2, 3) or x.shape[:2] != rows:
                return given.get(id(x), x)
            columns = meaning.tokens.unpack(x[0])
            columns.of_rows, columns.rows = meaning.tokens, x
            return columns

        padded_args = tuple(padded(name, x) for name, x in named)
        return padded_args[: len(args)], dict(zip(kwargs, padded_args[len(args) :], strict=True))

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, result: Any = None) -> Any:
        given = (*args, *kwargs.values()) if isinstance(kwargs, dict) else ()
        layout = next((x.of_rows for x in given if isinstance(x, Tensor) and hasattr(x, "of_rows")), None)
        if layout is None or result is None:
            return None
        hidden, *others = (result,) if isinstance(result, Tensor) else result
        rows = with_first_dimension(layout.pack(hidden))
        return rows if isinstance(result, Tensor) else (rows, *others)


class Projection:
    """Around a linear layer of an island, which computes rows as well."""

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        meaning = None if torch.compiler.is_compiling() else island_of()
        if not args or kwargs is None or meaning is None or args[0].dim() != 3:
            return None
        layout = getattr(args[0], "of_source", meaning.tokens)
        if layout is None or args[0].shape[:2] != (layout.batch_size, layout.padded_len):
            return None
        rows: Any = getattr(args[0], "rows", None)
        rows = with_first_dimension(layout.pack(args[0])) if rows is None else rows.view_as(rows)
        rows.of_columns = layout
        return (rows, *args[1:]), kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, result: Any = None) -> Any:
        layout = getattr(args[0], "of_columns", None) if args and isinstance(kwargs, dict) else None
        return None if layout is None or result is None else layout.unpack(result[0])


def _why_as_it_came(layer: nn.Module, hidden: Tensor, meaning: Meaning, islands: bool, tree: ModelId) -> str | None:
    """None for the padded tokens of a self-attention, where no reader of rows at padding is known."""
    batch_size, _, len_q, _ = meaning.shape
    if meaning.numbers is not None and not islands:
        return LOOKED_AT
    if islands and is_compiled(layer):
        return "compiled layers, whose attention needs columns"
    if hidden.dim() != 3 or hidden.shape[:2] != (batch_size, len_q) or len_q != meaning.columns or meaning.first_query != 0:
        return "there are cached keys, or keys of others"
    # Compiled layers get rows in any case: the same graphs serve all batches, and none ends before attention.
    packs = is_compiled(layer) or not (meaning.padding is None or meaning.tokens.is_dense)
    if meaning.pattern.documents is not None or not (packs or meaning.tokens.ranks):
        return "nothing is padded"
    keys = meaning.keys
    if keys.lengths is None or not keys.total:
        return "only the device knows the lengths" if keys.lengths is None else "no row has a token"
    if not meaning.pattern.causal and not meaning.tokens.right_padded and (tree.reads_first or keys.has_holes):
        return f"an encoder with padding {'between' if keys.has_holes else 'before'} its tokens, which a pooler may read"
    return meaning.read_by()


def _why_padded(meaning: Meaning, islands: bool = False) -> str | None:
    """None where nothing is asked for that rows do not have."""
    asked = [name for name in captured() if name != "hidden_states"]
    if asked:
        return f"asked for {', '.join(asked)} of every layer"
    if islands and "hidden_states" not in captured() and any(map(_asks_for_states, meaning.forwards)):
        return "asked for hidden states, which its own code collects"
    # Windows count columns, and this layer does not know whether one after it has a window.
    return "padding between tokens" if meaning.keys.has_holes else None


def _asks_for_states(forward: Forward) -> bool:
    asked = forward.given().get("output_hidden_states")
    return bool(getattr(getattr(forward.model, "config", None), "output_hidden_states", False) if asked is None else asked)


_REFUSED = object()


def _packed(name: str, x: Any, meaning: Meaning, hidden: Tensor, rows: Tensor, islands: bool = False) -> Any:
    """An argument of a layer for ``rows``, or `_REFUSED`. What every layer is given is packed once.

    What only attention understands goes to ``islands`` as it is, and they get what by token was packed as it was.
    """
    known = meaning.packed_arguments.get((name, id(x)))
    if known is not None:
        return known[1]
    y: Any = _REFUSED
    keep = True
    if x is None or isinstance(x, bool | int | float | str):
        y = _REFUSED if x and name in _ASKING_FOR_MORE else x
    elif _is_foreign(name) or (islands and (isinstance(x, VarlenMask) or (isinstance(x, Tensor) and x in of_numbers))):
        return x if islands else _REFUSED
    elif isinstance(x, VarlenMask):
        keep = x.meaning is not meaning  # which would hold itself
        y = x.meaning.packed if not keep or x.meaning.is_of_columns_of(meaning) else _REFUSED
    elif x is hidden:
        return rows
    elif isinstance(x, Tensor):
        keep = not x.requires_grad  # a layer that is computed again for its gradients packs again
        by_token = x.dim() >= 2 and x.shape[0] in (1, meaning.shape[0]) and x.shape[1] == meaning.shape[2]
        if by_token or x.dim() == 0 or name == "cache_position":
            y = meaning.tokens.pack(x.expand(meaning.shape[0], *x.shape[1:]))[None] if x.dim() >= 2 else x
        elif islands:
            return x
    elif isinstance(x, tuple | list):
        parts = tuple(_packed(name, z, meaning, hidden, rows, islands) for z in x)
        keep = isinstance(x, tuple) and all((name, id(z)) in meaning.packed_arguments for z in x)
        y = _REFUSED if any(z is _REFUSED for z in parts) else parts
    elif islands and _is_of_both(x):
        return x
    elif (view := _view_of(type(x))) is not None:  # type: ignore[arg-type]
        y = view(x, meaning.tokens)
    if keep and y is not _REFUSED:
        meaning.packed_arguments[name, id(x)] = x, y
    return y


def _of_source(meaning: Meaning, given: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Of what a decoder's layer is given, with what it was: tokens of a source as rows, a mask for these, and a view of the cache. Nothing
    if it sees none, or not by a mask of padding alone."""
    states, mask, cache = given.get("encoder_hidden_states"), given.get("encoder_attention_mask", False), given.get("past_key_values")
    if not isinstance(states, Tensor) or states.dim() != 3 or len(states) != meaning.shape[0]:
        return {}
    shape, kept = (*meaning.shape[:3], states.shape[1]), meaning.packed_arguments
    source = kept.get(("", id(mask)), (mask, mask.meaning if isinstance(mask, VarlenMask) else None))[1]
    if mask is None and source is None:
        source = Meaning(shape, states.device, Pattern(False), None, 0, lambda: torch.ones(shape, dtype=torch.bool, device=states.device))
    if source is None or (source.shape, source.pattern) != (shape, Pattern(False)):
        return {}
    if source.numbers is not None or source.keys.lengths is None:
        return {}
    if ("", id(mask)) not in kept:
        kept["", id(mask)], kept["encoder_attention_mask", id(mask)] = (mask, source), (mask, source.crossing(meaning.tokens))
    rows = kept.get(("encoder_hidden_states", id(states))) or (states, with_first_dimension(source.keys.pack(states)))
    if not states.requires_grad:  # a layer that is computed again for its gradients packs again
        kept["encoder_hidden_states", id(states)] = rows
    if cache is not None and _is_of_both(cache) and not any(cache.is_updated.values()):
        view = copy(cache)  # with the same notes of what is cached
        for name, layout in (("self_attention_cache", meaning.tokens), ("cross_attention_cache", source.keys)):
            part: Any = getattr(cache, name)
            setattr(view, name, _view_of(type(part))(part, layout))  # type: ignore[arg-type]
        kept["past_key_values", id(cache)] = cache, view
    return {"encoder_hidden_states": rows, "encoder_attention_mask": kept["encoder_attention_mask", id(mask)]}


def _is_of_both(cache: Any) -> bool:
    """Whether it holds keys by column, of a decoder and of its source."""
    parts: list[Any] = [getattr(cache, f"{name}_attention_cache", None) for name in ("self", "cross")]
    return all(_view_of(type(x)) is not None for x in parts)  # type: ignore[arg-type]


@cache
def _is_foreign(name: str) -> bool:
    return any(part in name for part in _FOREIGN)


def _is_source(name: str, x: Any) -> bool:
    """Whether attention is given states of others."""
    return "states" in name and _is_foreign(name) and isinstance(x, Tensor) and x.dim() == 3


# -------------------------------------------------------------------- caches


class _PackedCache:
    """A view of an empty cache for layers that run packed: they go on with their rows, the cache gets padded ones, 0 at padding."""

    def __init__(self, cache: Any, layout: SeqLayout) -> None:
        self.__dict__.update(cache.__dict__)  # the same layers
        self.layout = layout

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = (self.layout.unpack(x[0].transpose(0, 1)).transpose(1, 2) for x in (key_states, value_states))
        super().update(keys, values, *args, **kwargs)  # type: ignore[misc]
        return key_states, value_states


@cache
def _view_of(kind: type) -> Any:
    """Of a cache that holds keys by column: one that grows with its tokens, or has its length from the beginning; None for all others."""
    from transformers.cache_utils import DynamicCache, StaticCache

    return type(f"Packed{kind.__name__}", (_PackedCache, kind), {}) if kind in (DynamicCache, StaticCache) else None


# -------------------------------------------------------------------- models


class ModelHook:
    """Around the forward of a model of transformers: sees whether its caller wants rows of padding, which then must be there.

    Attributes:
        tree: one object for all models of a model that was enabled.
        stacks: names of the module lists in it that run packed.
        looks_at_ids: its head picks a row by ids (the last that is no padding, the largest), those in padding too.
        depth: how many layers the configuration said.
        inputs: keywords that are no labels: of models inside, and of transformers' own.
        looked: how many hooks had been registered in this process when there were none of others in the stacks.
    """

    inputs: frozenset[str] = frozenset()  # of pickles of earlier versions
    looked: int | None = None

    def __init__(self, tree: ModelId, model: Any, stacks: tuple[str, ...], looks_at_ids: bool) -> None:
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self.tree, self.config, self.stacks, self.looks_at_ids = tree, model.config, stacks, looks_at_ids
        self.depth = getattr(model.config, "num_hidden_layers", None)
        inside = {type(m) for m in model.modules() if m is not model and hasattr(m, "get_input_embeddings")}
        known = inside | ({type(model)} if type(model).__module__.startswith("transformers.") else set())
        self.inputs = frozenset(name for cls in known for name in inspect.signature(cls.forward).parameters) - _LABELS

    @between_graphs
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Called by the model's forward, and as a hook in pickles of earlier versions, like `after`."""
        if kwargs is not None and not torch.compiler.is_compiling():
            given = partial(self._given, args, kwargs)
            why_not = partial(self._why_not, module, args, kwargs, inspect.currentframe())
            enter_forward(Forward(self.tree, module, why_not, given))
            take_over(_masks_of(given()))
            if self.tree.left:
                leave_forward(module)

    @between_graphs
    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, result: Any = None) -> None:
        if torch.compiler.is_compiling():
            return
        forward = leave_forward(module)
        if forward is not None and forward.in_rows and result is not None:
            raise VarlenError(
                f"the layers of {type(module).__name__} must all be called, the last one too, but rows are left over: where some are "
                'left out, call varlen_attn.enable(model, level="attention").'
            )

    def _changed(self, module: nn.Module) -> str | None:
        """What is not as it was when the model was enabled."""
        stacks = [module.get_submodule(name) for name in self.stacks]
        if not all(map(_is_whole, stacks)) or self.depth != getattr(self.config, "num_hidden_layers", None):
            return "its layers were changed since it was enabled: enable it again"
        if module.training and any(getattr(self.config, name, 0) for name in _SKIPPING_LAYERS):
            return "layers are skipped at random in training (layerdrop)"
        registered = RemovableHandle.next_id
        if self.looked != registered:  # to look at all modules costs as much as a layer
            if (hooked := next(filter(None, (why_hooked(s, self.tree.hooks) for s in stacks)), None)) is not None:
                return hooked
            self.looked = registered
        return None

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self.names, args, strict=False)) | kwargs

    def _why_not(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType | None, causal: bool
    ) -> str | None:
        """Why layers must not run packed in the call of this ``frame``: they were changed, or rows at padding are read, as far as arguments
        say. From a device all flags come in one transfer, if there are any.

        A caller who said what rows at padding hold knows the readers. The exception is what picks a row by column or by ids.
        """
        (reason, around_it), given = _around(module, self.tree, frame), self._given(args, kwargs)
        if (reason := self._changed(module) or reason) is not None:
            return reason
        mask, ids = next(iter(_masks_of(given)), None), given.get("input_ids")
        two = "decoder_attention_mask" in self.names  # of a source, and of a target, about which most arguments are
        if two and causal:
            mask, ids = given.get("decoder_attention_mask"), given.get("decoder_input_ids")
        mask = mask.meaning.padding if isinstance(mask, VarlenMask) else mask
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < 2:
            return None
        ids = ids.to(mask.device) if isinstance(ids, Tensor) and ids.shape == mask.shape else None
        of_collator = isinstance(mask, HostLengths) and mask.lengths is not None and mask.device.type != "cpu"
        padding = ~mask.bool()
        found: list[tuple[str, Tensor]] = []
        continues = given.get("past_key_values") is not None or isinstance(given.get("logits_to_keep", 0), Tensor)
        if ((continues or given.get("logits_to_keep")) and (causal or not two)) or (causal and caller(frame, "GenerationMixin.generate")):
            after_token = (padding[:, 1:] & ~padding[:, :-1]).any()
            found.append(("generation with padding on the right, which reads the last column", after_token))
        if self.looks_at_ids:
            reason = "other ids than pad_token_id at padding, which the head looks at"
            pad = getattr(self.config.get_text_config(), "pad_token_id", None)
            if pad is None:
                return reason
            # Without ids a head knows no other column than the last.
            found.append((reason, padding[:, -1].any() if ids is None else ((ids != pad) & padding).any()))
        if self.tree.padding_rows is None:
            odd = "an id at padding that is not that of padding, so that its rows may be read"
            # One id was chosen, such as [MASK]. Several are random numbers, whose rows mean nothing.
            if ids is not None and not causal and ids.is_cpu:
                others = {*ids.masked_select(padding).tolist()} - {0}
                if others and len(others - _special_ids(self.config)) == 1:
                    return odd
            elif ids is not None and not causal and not of_collator:
                usual = ~padding
                for known in _special_ids(self.config):
                    usual = usual | (ids == known)
                found.append((odd, ids.masked_fill(usual, _LARGEST).amin() == ids.masked_fill(usual, -1).amax()))
            for name, x in (around_it | {name: given[name] for name in sorted(given.keys() - self.inputs - _INPUTS)}).items():
                of_tokens = isinstance(x, Tensor) and x.shape[:2] == mask.shape and (causal or not two or name not in _LABELS)
                if of_tokens and not (of_collator and x.dim() == 2 and name in _LABELS):
                    reason = f"`{name}` at padding or just after it that are not -100, so that a loss may count it"
                    found.append((reason, _counts(x, padding)))
        said = torch.stack([x for _, x in found]).tolist() if found else []
        return next((reason for (reason, _), x in zip(found, said, strict=True) if x), None)


def _masks_of(given: Mapping[str, Any]) -> list[Any]:
    """One, or one for each kind of layers."""
    mask = given.get("attention_mask")
    return [*mask.values()] if isinstance(mask, Mapping) else [mask]


def _around(module: nn.Module, tree: ModelId, frame: FrameType | None) -> tuple[str | None, dict[str, Any]]:
    """A reason if what the caller of a model around this one wants is not known, and targets that other modules around it are given."""
    models: list[nn.Module] = []
    targets: dict[str, Any] = {}
    for model, given in around(frame):
        if getattr(vars(model).get(WATCH), "tree", None) is tree:
            models += [] if model is module else [model]
        else:
            inside = (x for x in given.values() if isinstance(x, Mapping))
            targets |= {name: x for some in (given, *inside) for name, x in some.items() if _TARGETS.search(str(name))}
    unseen = not all(map(is_entered, models))
    return "its forward began before it was enabled" if unseen else None, {} if models else targets


# Names of what a loss compares with, in modules around a model, whose other arguments may be anything.
_TARGETS = re.compile("label|tag|target|gold|truth")
_LARGEST = torch.iinfo(torch.int32).max  # of all token ids
_LABELS = frozenset(("labels", "shift_labels"))
# Keywords by token that are no labels, for models with a class of the user's own.
_INPUTS = frozenset(
    (
        "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "bbox", "input_values", "input_features",
        "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "encoder_hidden_states", "encoder_attention_mask",
        "global_attention_mask", "special_tokens_mask",
    )
)  # fmt: skip


def _special_ids(config: Any) -> set[int]:
    """Tokenizers pad with one of these, or with 0."""
    config = config.get_text_config()
    found = [getattr(config, f"{name}_token_id", None) for name in ("pad", "eos", "bos", "sep", "cls")]
    return {0, *(x for ids in found for x in (ids if isinstance(ids, list) else [ids]) if x is not None)}


def _counts(labels: Tensor, padding: Tensor) -> Tensor:
    """At padding, or, for a loss on shifted labels, just after it."""
    counted = (labels != -100).flatten(2).any(-1) if labels.dim() > 2 else labels != -100
    counted = counted.to(padding.device)
    return (counted & padding).any() | (counted[:, 1:] & padding[:, :-1]).any()


def _is_whole(layers: Any) -> bool:
    """Whether every layer of a stack takes rows, and the last one alone puts the tokens back."""
    if not len(layers):
        return False
    for i, layer in enumerate(layers, 1):
        for hook in list(layer._forward_pre_hooks.values()):
            if isinstance(owner := getattr(hook, "__self__", None), LayerHook):
                break
        else:
            inside = [unwrapped(x) for x in layers]
            return inside != list(layers) and _is_whole(inside)
        if owner.last != (i == len(layers)):
            return False
    return any(map(is_ours, list(layer._forward_hooks.values())))


def why_hooked(layers: nn.Module, allowed: str) -> str | None:
    """Why the hooks in a stack, if any, keep it from running packed; ``allowed`` as `varlen_attn.enable` takes it."""
    for name, module in layers.named_modules():
        kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
        homes = [_home(hook) for kind in kinds if kind for hook in list(kind.values()) if not is_ours(hook)]
        homes = [home for home in homes if not home.startswith(_UNCONCERNED)]
        if any(home.startswith("peft.") for home in homes):
            return "adapters by row of the batch"
        if homes and allowed == "leave":
            return f'layer {name} has hooks, which would see packed rows: allow it with hooks="packed"'
    return None


def _home(hook: Any) -> str:
    """The module of its code. PEFT's are partial functions, put on its layers for a call that names an adapter for each row."""
    hook = getattr(hook, "func", hook)
    return str(getattr(hook, "__module__", None) or type(hook).__module__)


# Hooks that bring weights, and those of transformers that wait for somebody to ask for hidden states.
_UNCONCERNED = (
    "torch.nn.utils", "torch.distributed.fsdp", "torch.distributed._composable", "deepspeed.", "transformers.utils.output_capturing"
)  # fmt: skip


# -------------------------------------------------------------------- the class of a model

WATCH = "_varlen_attn_watch"  # the attribute of a model that holds its `ModelHook`
HEADS = "_varlen_attn_heads"  # and of one whose head computes labelled tokens only: what it reads, as `labelled_in` takes it


class Watched(Derived):
    """A class for objects of another one, whose forward is watched however it is called: as ``model(...)``, as ``model.forward(...)``,
    and below functions that stand in its place on the object, such as Accelerate's."""


@cache
def _watched(original: Any) -> Any:
    return derived(Watched, original, _watched, forward=_Forward(original))


class _Forward:
    """The ``forward`` of a class of models. With a ``__set__`` it comes before what is on the object."""

    def __init__(self, original: Any) -> None:
        @begins_no_graph
        @wraps(original.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _seen(self, partial(original.forward, self), *args, **kwargs)

        self.function: Any = forward

    @begins_no_graph
    def __get__(self, model: Any, cls: Any = None) -> Any:
        if model is None:
            return self.function
        own = vars(model).get("forward")
        return self.function.__get__(model) if own is None else update_wrapper(partial(_seen, model, own), own)

    def __set__(self, model: Any, value: Any) -> None:
        vars(model)["forward"] = value
        if value == self.function.__get__(model):  # who put another one there puts back what was there
            del model.forward

    def __delete__(self, model: Any) -> None:
        if vars(model).pop("forward", None) is None:
            raise AttributeError("forward")


@partial(between_graphs, recursive=False)
def _seen(model: Any, compute: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return compute(*args, **kwargs)
    hook = vars(model).get(WATCH)
    if hook is None:  # it was disabled since a forward around it began
        return read_labelled(model, None, compute(*args, **kwargs))
    hook.before(model, args, kwargs)
    result = None
    try:
        labelled = labelled_in(model, *vars(model).get(HEADS, ()))
        result = read_labelled(model, labelled, compute(*args, **kwargs) if labelled is None else compute(**labelled.given))
        return result
    finally:
        hook.after(model, args, kwargs, result)


# -------------------------------------------------------------------- what is done to modules


def on_models(tree: ModelId, root: Any, packed: Mapping[nn.Module, tuple[tuple[str, ...], bool]]) -> list[Step]:
    """Let models run padded where a caller's wish reads padding.

    Args:
        tree: of ``root``.
        root: a model, which is watched with all models in it.
        packed: of some of these, the names of their stacks that run packed, and whether a head looks at ids.
    """
    from transformers import PreTrainedModel

    made: list[Step] = []
    for module in root.modules():
        if isinstance(module, PreTrainedModel):
            made.append(Entry(vars(module), WATCH, ModelHook(tree, module, *packed.get(module, ((), False)))))
            original = original_class(module)
            made.append(Class(module, _watched(original), original))  # type: ignore[arg-type]
    return made


def on_layers(
    tree: ModelId, layers: nn.ModuleList, islands: Sequence[nn.Module] = (), recorded: bool = True, crosses: bool = False
) -> list[Hook]:
    """Let a stack run packed, but for the attention modules in it that are ``islands``, which say themselves what they compute if
    ``recorded``; with rows of a source if it ``crosses``."""
    made: list[Hook] = []
    linear: list[tuple[nn.Module, Any]] = [(m, Projection()) for x in islands for m in x.modules() if original_class(m) is nn.Linear]
    for module, hooks in [*((x, Island(recorded, x)) for x in islands), *linear]:
        made += [Hook.new(module, hooks.before, False), Hook.new(module, hooks.after, True)]
    for i, layer in enumerate(map(unwrapped, layers)):
        hook = LayerHook(tree, layer, i == len(layers) - 1, len(islands) > 0, crosses)
        before, after = (hook.before_islands, hook.after_islands) if hook.islands else (hook.before, hook.after)
        made += [Hook.new(layer, before, False)] + ([Hook.new(layer, after, True)] if hook.last else [])
    return made


def found_on(modules: Iterable[nn.Module]) -> list[Step]:
    """What of it is there."""
    found: list[Step] = []
    for module in modules:
        original = original_class(module)
        if isinstance(module, Watched) and original is not own_class(module):
            found.append(Class(module, own_class(module), original))
        found += [Entry(vars(module), name, vars(module)[name]) for name in (WATCH, HEADS) if name in vars(module)]
        found += Hook.found(module, is_ours)
    return found


def is_ours(hook: Any, kind: Any = LayerHook | ModelHook | Island | Projection) -> bool:
    return isinstance(getattr(hook, "__self__", None), kind)
