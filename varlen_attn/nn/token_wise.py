"""Modules that are known to compute one token from one token, and calling them on a piece of the rows at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._switch import original_class

POSITION_WISE = (
    nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Identity, nn.Dropout,
    nn.ReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.LeakyReLU, nn.Hardswish, nn.Tanh, nn.Sigmoid,
)  # fmt: skip
ACTIVATIONS = (F.relu, F.gelu, F.silu, torch.relu, torch.tanh, torch.sigmoid)

# Bytes of a feed-forward's inner rows in one piece. A buffer that is larger is fresh memory at every call, whose pages the system has to
# provide first (two microseconds each), and it leaves the cache before the second matrix product reads it: 13 to 25 % of the
# feed-forward's time in float32 and bfloat16 at widths 512 and 2048.
_PIECE = 8 * 2**20
_LEAST = 256  # rows of a piece


def is_known(part: Any) -> bool:
    """A module or function that is token-wise by its type."""
    return (original_class(part) if isinstance(part, nn.Module) else part) in (*POSITION_WISE, *ACTIVATIONS)


def has_hooks(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in names)


def deepcopy_module(module: nn.Module) -> nn.Module:
    """`copy.deepcopy`, but for torch's decoder layers, whose copies forget an activation that is a module and compute ReLU."""
    copied = copy.deepcopy(module)
    others = dict(copied.named_modules())
    for name, source in module.named_modules():
        if isinstance(source, nn.TransformerDecoderLayer) and "activation" in source._modules and "activation" not in vars(source):
            others[name].__dict__.pop("activation", None)
    return copied


def chunked_feed_forward(layer: Any, x: Tensor, feed_forward: Callable[[Tensor], Tensor]) -> Tensor:
    """``feed_forward(x)`` of a transformer layer, a piece of the rows at a time where that is faster and nobody can tell.

    That is on a CPU, where no gradients need the inner rows, and with modules whose calls nobody counts.
    """
    if torch.is_grad_enabled() or layer.training or torch.compiler.is_compiling() or type(x) is not Tensor:
        return feed_forward(x)
    if torch.jit.is_tracing() or x.device.type != "cpu" or x.dim() != 2 or len(x) < 2 * _LEAST:  # type: ignore[attr-defined]
        return feed_forward(x)
    own = type(layer)._ff_block in (nn.TransformerEncoderLayer._ff_block, nn.TransformerDecoderLayer._ff_block)
    parts = (layer.linear1, layer.activation, layer.dropout, layer.linear2)
    watched = "_ff_block" in vars(layer) or any(has_hooks(m) or "forward" in vars(m) for m in layer.children())
    if not own or watched or not all(is_known(p) for p in parts):
        return feed_forward(x)
    rows = max(_LEAST, _PIECE // (layer.linear1.out_features * x.element_size()))
    if len(x) < 2 * rows:
        return feed_forward(x)
    return torch.cat([feed_forward(piece) for piece in x.split(rows)])
