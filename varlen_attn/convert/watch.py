"""Why an enabled module runs as it came: somebody watches what it packs, or has changed what it computes.

Hooks and methods may be put on objects, and classes changed for all objects, at any time. So these are looked at when a module is enabled,
and once for every forward that enters a stack, a layer or attention from outside.
"""

from __future__ import annotations

from types import BuiltinFunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .._torch import global_hooks, is_compiled_function
from ..nn.transformer import takes_layouts

LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
STACKS = (nn.TransformerEncoder, nn.TransformerDecoder)

# Code that sets one of these on an object wants it called, as torch calls it.
METHODS = ("forward", "_sa_block", "_mha_block", "_ff_block")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Of these no hook looks at what goes through a module: they gather, mask or normalise weights, compute again, or note which module runs.
_OURS = __name__.partition(".")[0]
WEIGHTS_ONLY = (f"{_OURS}.", "torch.distributed.fsdp.", "torch.distributed._composable.")  # which are whole in it, and only there
_BLIND = (*WEIGHTS_ONLY, "torch.nn.utils.", "torch.utils.module_tracker")


Code = tuple[tuple[Any, str, Any], ...]


def code_of(owner: Any, *names: str) -> Code:
    """What a class or module computes by, as its own file defines it; None where that was replaced before."""
    home = owner.__module__ if isinstance(owner, type) else owner.__name__
    found = ((name, getattr(owner, name)) for name in names if name in vars(owner))
    is_own = {name: isinstance(x, BuiltinFunctionType) or getattr(x, "__globals__", {}).get("__name__") == home for name, x in found}
    return tuple((owner, name, getattr(owner, name) if own else None) for name, own in is_own.items())


ATTENTION = code_of(nn.MultiheadAttention, *METHODS) + code_of(F, "multi_head_attention_forward", "scaled_dot_product_attention")
_TORCHS: dict[type[nn.Module], Code] = {nn.MultiheadAttention: ATTENTION}
for _layer, _stack in zip(LAYERS, STACKS, strict=True):
    _TORCHS[_layer] = code_of(_layer, *METHODS) + ATTENTION
    _TORCHS[_stack] = code_of(_stack, *METHODS) + _TORCHS[_layer]


def why_replaced(host: type[nn.Module], code: Code = ()) -> str | None:
    """Which code of one of torch's classes, and of what it calls, or which of ``code`` is another for all objects."""
    for owner, name, own in code or _TORCHS[host]:
        if getattr(owner, name) is not own:
            return f"{owner.__name__}.{name} was replaced for all objects"
    return None


def why_touched(module: nn.Module, hooks: bool) -> str | None:
    """Which part of what a stack or layer packs has methods of somebody else's, or, with ``hooks``, hooks.

    One frame for all parts, where there is nothing: this is a part of the time of every forward.
    """
    parents = [vars(module)]
    for parent in parents:
        for m in parent["_modules"].values():
            if m is not None:
                d = m.__dict__
                seen = d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"] or "forward" in d
                if (seen and hooks) or "_sa_block" in d or "_mha_block" in d or "_ff_block" in d:
                    return _touched_part(module, hooks)
                if d["_modules"]:
                    parents.append(d)
    return "hooks for all modules" if hooks and any(map(sees, global_hooks)) else None


def _touched_part(module: Any, hooks: bool) -> str | None:
    """Layers that take no layout get padded tensors, and so do their hooks."""
    if torch.compiler.is_compiling():
        return "a part has hooks or methods of its own"
    padded = {m for x in module.layers if not takes_layouts(x) for m in x.modules()} if isinstance(module, STACKS) else set()
    for name, m in module.named_modules():
        if m is module or m in padded:
            continue
        method = next((x for x in METHODS[0 if hooks else 1 :] if x in vars(m) and not is_compiled_function(vars(m)[x])), None)
        if method is not None:
            return f"{name}: its {method} was replaced on the object"
        if hooks and is_seen(m):
            return f'{name}: has hooks, which would see packed rows: allow it with hooks="packed"'
    return None


def is_seen(module: nn.Module, blind: tuple[str, ...] = _BLIND) -> bool:
    """It has hooks, of other code than ``blind``."""
    return any(sees(getattr(module, kind), blind) for kind in _HOOKS)


def sees(hooks: dict[int, Any], blind: tuple[str, ...] = _BLIND) -> bool:
    return any(not str(getattr(hook, "__module__", None)).startswith(blind) for hook in hooks.values())
