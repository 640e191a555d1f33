"""Packing once around a stack of transformers' layers, whatever stands before and after it.

Every layer of the stack gets a hook that sees its arguments. Where these are the padded ``(B, S, D)`` hidden states and a `VarlenMask` with
padding, the layer gets ``(1, T, D)`` rows, and everything else by token (rotary cosines, position ids) packed alike; its result goes to
the next layer as it is, and the hook of the last one puts the tokens back. Positions, embeddings, convolutions, poolers and losses stay
padded code on padded tensors, so that rotary, absolute and convolutional positions are what they were.

The hooks hold no state: rows are told from padded tensors by their shape, against the mask that every layer is given. So layers
may be checkpointed, recomputed, shared or skipped.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .._host_lengths import HostLengths
from ..errors import VarlenError
from ..layout import SeqLayout
from ._hf_attention import captured, collected
from ._hf_mask import LOOKED_AT, Meaning, VarlenMask, enter_forward, leave_forward

__all__ = ["LayerHook", "ModelHook", "Tree", "install", "is_ours", "only_waiting", "remove", "unwatch", "watch"]

_SKIPPING_LAYERS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
_ASKING_FOR_MORE = ("output_attentions", "output_router_logits", "output_scores")
# Arguments of layers that are not about the stack's own tokens, whatever their shape.
_FOREIGN = ("encoder", "cross", "memory", "bias", "cu_seq", "visual", "image", "vision")


class LayerHook:
    """Before and after one layer: packs its arguments, and unpacks its result if it is the last.

    An object and not a function, so that deep copies and pickles of a model keep it, with the copied configuration.

    Attributes:
        names: the positional parameters of the layer's ``forward``.
        last: whether the tokens are put back after this layer.
        config: of the model: layers that are skipped at random in training can not hand on rows.
    """

    def __init__(self, layer: nn.Module, last: bool, config: Any) -> None:
        parameters = inspect.signature(type(layer).forward).parameters.values()
        self.names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))[1:]
        self.last, self.config = last, config

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        named = [*zip(self.names, args, strict=False), *kwargs.items()]
        mask = next((x for _, x in named if isinstance(x, VarlenMask)), None)
        if mask is None or not named or torch.compiler.is_compiling():
            return None
        hidden = named[0][1] if args else kwargs.get("hidden_states")
        meaning = mask.meaning
        if not isinstance(hidden, Tensor) or meaning.rows is not None:
            return None
        is_rows = self._is_rows(hidden, meaning)
        reason = None if is_rows else meaning.padded_because or self._why_padded(module, hidden, meaning)
        refused = [name for name, x in named if not _can_pack(name, x, meaning, hidden)]
        if refused and is_rows:
            raise VarlenError(
                f"the layers of {type(module).__name__} were given packed rows, but now `{refused[0]}`, which can not be packed: call "
                'varlen_attn.enable(model, level="attention").'
            )
        if reason or refused:
            meaning.keep_padded(reason or f"the layers are given `{refused[0]}`, which is not by token, or asked for it")
            return None
        meaning.hands_on(rows=True)
        packed = [_packed(x, meaning, hidden) for _, x in named]
        return tuple(packed[: len(args)]), dict(zip(kwargs, packed[len(args) :], strict=True))

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        if not self.last:
            return None
        mask = next((x for x in (*args, *kwargs.values()) if isinstance(x, VarlenMask)), None)
        layout = None if mask is None else mask.meaning.rows
        if layout is None:
            return None
        assert mask is not None
        mask.meaning.hands_on(rows=False)
        states = collected().get("hidden_states", [])
        for i, x in enumerate(states):  # of the layers before; this one's is collected after it was unpacked
            if x is not None and x.shape[:2] == (1, layout.num_rows):
                states[i] = layout.unpack(x[0])
        if isinstance(result, Tensor):
            return layout.unpack(result[0])
        return (layout.unpack(result[0][0]), *result[1:])

    @staticmethod
    def _is_rows(hidden: Tensor, meaning: Meaning) -> bool:
        """Whether the layer before handed on rows. Only a batch with padding is packed, so the two shapes differ."""
        batch_size, _, padded_len, _ = meaning.shape
        if hidden.shape[:2] == (batch_size, padded_len) or hidden.shape[0] != 1:
            return False
        return bool(hidden.shape[1] == meaning.keys.num_rows)

    def _why_padded(self, module: nn.Module, hidden: Tensor, meaning: Meaning) -> str | None:
        """None for the padded tokens of a self-attention, where nothing is asked for that rows do not have."""
        batch_size, _, len_q, len_k = meaning.shape
        keys = meaning.keys
        if meaning.numbers is not None:
            return LOOKED_AT
        if hidden.dim() != 3 or hidden.shape[:2] != (batch_size, len_q) or len_q != len_k or meaning.first_query != 0:
            return "there are cached keys, or keys of others"
        if meaning.pattern.documents is not None or keys.is_dense:
            return "nothing is padded"
        if keys.lengths is None or not keys.total:
            return "only the device knows the lengths" if keys.lengths is None else "no row has a token"
        asked = [name for name in captured() if name != "hidden_states"]
        if asked:
            return f"asked for {', '.join(asked)} of every layer"
        if 0 in keys.lengths:
            return "a row without tokens, which a pooler may read"
        if keys.has_holes:  # windows count columns, and this layer does not know whether one after it has a window
            return "padding between tokens"
        if not meaning.pattern.causal and not keys.right_padded:  # encoders pool their first column, which must be what it was
            return "an encoder with padding before its tokens, which a pooler may read"
        return None


def _can_pack(name: str, x: Any, meaning: Meaning, hidden: Tensor) -> bool:
    if x is None or isinstance(x, bool | int | float | str):
        return not (x and name in _ASKING_FOR_MORE)
    if any(part in name for part in _FOREIGN):
        return False
    if isinstance(x, tuple | list):
        return all(_can_pack(name, y, meaning, hidden) for y in x)
    if isinstance(x, VarlenMask):
        return x.meaning.is_of_columns_of(meaning)
    if isinstance(x, Tensor):
        by_token = x.dim() >= 2 and x.shape[0] in (1, meaning.shape[0]) and x.shape[1] == meaning.shape[2]
        return by_token or x is hidden or x.dim() == 0 or name == "cache_position"
    return _is_growing_cache(x)


def _packed(x: Any, meaning: Meaning, hidden: Tensor) -> Any:
    if isinstance(x, VarlenMask):
        return x.meaning.packed
    if isinstance(x, tuple | list):
        return tuple(_packed(y, meaning, hidden) for y in x)
    if isinstance(x, Tensor):
        if x is hidden:
            return x if LayerHook._is_rows(x, meaning) else meaning.keys.pack(x)[None]
        return meaning.pack(x) if x.dim() >= 2 else x
    return _packed_cache_class()(x, meaning.keys) if _is_growing_cache(x) else x


# -------------------------------------------------------------------- caches


def _is_growing_cache(x: Any) -> bool:
    from transformers.cache_utils import DynamicCache

    return type(x) is DynamicCache


@cache
def _packed_cache_class() -> Any:
    from transformers.cache_utils import DynamicCache

    class PackedCache(DynamicCache):  # type: ignore[misc]
        """A view of an empty cache for layers that run packed: they go on with their rows, the cache gets padded ones, 0 at padding."""

        def __init__(self, cache: Any, layout: SeqLayout) -> None:
            self.__dict__.update(cache.__dict__)  # the same layers
            self.layout = layout

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            keys, values = (self.layout.unpack(x[0].transpose(0, 1)).transpose(1, 2) for x in (key_states, value_states))
            super().update(keys, values, *args, **kwargs)
            return key_states, value_states

    return PackedCache


# -------------------------------------------------------------------- hooks on models


class Tree:
    """Of a model that was enabled, by identity: copies of the model have a copy of it."""


class ModelHook:
    """Around a model of transformers: sees what the caller wants, and whether that reads rows of padding, which then must be there.

    Attributes:
        tree: one object for all models of a model that was enabled.
        stacks: names of the module lists in it that run packed.
        looks_at_ids: its head picks a row by ids (the last that is no padding, the largest), those in padding too.
        depth: how many layers the configuration said.
    """

    def __init__(self, tree: Tree, model: Any, stacks: tuple[str, ...], looks_at_ids: bool) -> None:
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self.tree, self.config, self.stacks, self.looks_at_ids = tree, model.config, stacks, looks_at_ids
        self.depth = getattr(model.config, "num_hidden_layers", None)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            reason = self._changed(module) or self._why_padded(dict(zip(self.names, args, strict=False)) | kwargs)
            enter_forward(self.tree, module, reason)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if torch.compiler.is_compiling():
            return
        forward = leave_forward()
        if forward is not None and forward.in_rows and result is not None:
            raise VarlenError(
                f"the layers of {type(module).__name__} must all be called, the last one too, but rows are left over: where some are "
                'left out, call varlen_attn.enable(model, level="attention").'
            )

    def _changed(self, module: nn.Module) -> str | None:
        """What is not as it was when the model was enabled."""
        stacks = [module.get_submodule(name) for name in self.stacks]
        if not all(_is_whole(layers) for layers in stacks) or self.depth != getattr(self.config, "num_hidden_layers", None):
            return "its layers were changed since it was enabled: enable it again"
        if module.training and any(getattr(self.config, name, 0) for name in _SKIPPING_LAYERS):
            return "layers are skipped at random in training (layerdrop)"
        if any(_chooses_rows(hook) for layers in stacks for m in layers.modules() for hook in m._forward_pre_hooks.values()):
            return "adapters by row of the batch"
        return None

    def _why_padded(self, given: dict[str, Any]) -> str | None:
        mask = given.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < 2:
            return None
        continues = given.get("past_key_values") is not None or isinstance(given.get("logits_to_keep", 0), Tensor)
        if (continues or given.get("logits_to_keep")) and not bool(mask[:, -1].all()):
            return "generation with padding on the right, which reads the last column"
        if given.get("start_positions") is not None or given.get("end_positions") is not None:
            return "a loss over all columns, those of padding too"
        for labels in (given.get("labels"), given.get("shift_labels")):
            if isinstance(labels, Tensor) and labels.shape == mask.shape and _counts_padding(labels, mask):
                return "labels at padding or just after it that are not -100, so that the loss counts it"
        ids, pad = given.get("input_ids"), getattr(self.config.get_text_config(), "pad_token_id", None)
        if self.looks_at_ids and (ids is None or pad is None or ids.shape != mask.shape or not bool((mask.bool() | (ids == pad)).all())):
            return "other ids than pad_token_id at padding, which the head looks at"
        return None


def _counts_padding(labels: Tensor, mask: Tensor) -> bool:
    """At padding, or, for a loss on shifted labels, just after it."""
    if isinstance(mask, HostLengths) and mask.lengths is not None and labels.device.type != "cpu":
        return False  # our collator's labels; to look would be to wait for the device
    counted, padding = labels != -100, ~mask.bool().to(labels.device)
    return bool((counted & padding).any() | (counted[:, 1:] & padding[:, :-1]).any())


def _is_whole(layers: Any) -> bool:
    """Whether every layer of a stack takes rows, and the last one puts the tokens back."""
    owners = [[getattr(hook, "__self__", None) for hook in layer._forward_hooks.values()] for layer in layers]
    last = [next((owner.last for owner in found if isinstance(owner, LayerHook)), None) for found in owners]
    return last == [False] * (len(last) - 1) + [True]


def _chooses_rows(hook: Any) -> bool:
    """Of PEFT, which puts such hooks on its layers for a call that names an adapter for each row."""
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("peft.")


def only_waiting(module: nn.Module) -> bool:
    """No hooks but ours, and transformers' own, which wait for somebody to ask for hidden states."""
    if not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks):
        return True
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    known = (is_ours(hook) or getattr(hook, "__qualname__", "").endswith("output_capturing_hook") for hook in hooks)
    return not (module._backward_hooks or module._backward_pre_hooks) and all(known)


def watch(tree: Tree, model: Any, stacks: tuple[str, ...] = (), guarded: bool = False) -> None:
    """Let a model that has packed stacks run padded where a caller's wish reads padding; ``guarded``: its head looks at ids."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not any(is_ours(hook) for hook in module._forward_pre_hooks.values()):
            hook = ModelHook(tree, module, stacks if module is model else (), guarded and module is model)
            module.register_forward_pre_hook(hook.before, with_kwargs=True, prepend=True)
            module.register_forward_hook(hook.after, with_kwargs=True, always_call=True)


# -------------------------------------------------------------------- hooks on layers


def install(layers: nn.ModuleList, config: Any) -> None:
    """Let a stack run packed."""
    for i, layer in enumerate(layers):
        hook = LayerHook(layer, i == len(layers) - 1, config)
        # Before hooks of others, which then see what the layer sees.
        layer.register_forward_pre_hook(hook.before, with_kwargs=True, prepend=True)
        layer.register_forward_hook(hook.after, with_kwargs=True, prepend=True)


def is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), LayerHook | ModelHook)


def remove(*modules: nn.Module) -> None:
    """The inverse of `install` for layers, and of `watch` for models."""
    _remove(modules, LayerHook | ModelHook)


def unwatch(model: nn.Module) -> None:
    """The inverse of `watch` alone."""
    _remove(model.modules(), ModelHook)


def _remove(modules: Iterable[nn.Module], kind: Any) -> None:
    for module in modules:
        before = (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        after = (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
        for hooks, *flags in (before, after):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), kind)]:
                del hooks[key]
                for flag in flags:
                    flag.pop(key, None)
