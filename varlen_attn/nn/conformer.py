"""`enable(level="model")` for torchaudio's `Conformer`: all layers on packed rows, though a convolution in each reads the frames around it.

A padded conformer gives the last frames of an utterance other numbers than the utterance has alone, because convolutions read what norms
and linear layers leave at padding. So frames of padding that reach a real frame through the convolutions that are still to come are rows
too: attention computes them, and never looks at them. With ``padding_rows="alone"`` only real frames are rows.

torchaudio is not imported. Its classes are known by name, and what they compute by a trial of a small one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .._state import state, visible
from .._switch import original_class
from ..attention.dispatch import use_backend
from ..attention.forms import pack_rows, unpack_rows
from ..errors import VarlenError
from ..layout.seq_layout import SeqLayout
from .conv import varlen_conv1d
from .multihead import VarlenMultiheadAttention
from .norm import varlen_norm
from .stream import Prepared
from .token_wise import POSITION_WISE, has_hooks

_HOME, _NAME = "torchaudio.models.conformer", "Conformer"
PARTS = [(_HOME, name) for name in ("ConformerLayer", "_ConvolutionModule", "_FeedForwardModule")]
NORMS = (nn.BatchNorm1d, nn.GroupNorm)  # over time
_OVER_FEATURES = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
_REPLACED = ("forward", "_apply_convolution", "_compiled_call_impl")
_CONTAINERS = (nn.ModuleList, nn.Sequential, NonDynamicallyQuantizableLinear)  # the last one is in attention, and not called


# -------------------------------------------------------------------- on rows


def reaches_of(model: Any) -> list[int]:
    """From how many frames away each layer, and the end, must be right for real frames to be right at the end."""
    reaches = [0]
    for layer in reversed(model.conformer_layers):
        reaches.append(reaches[-1] + sum(x.padding[0] for x in layer.conv_module.sequential if hasattr(x, "padding")))
    return reaches[::-1]


def on_rows(model: Any, x: Tensor, lengths: Sequence[int], padding_rows: str) -> Tensor:
    reaches = [0] * (1 + len(model.conformer_layers)) if padding_rows == "alone" else reaches_of(model)
    within = [tuple(min(n + reach, x.shape[1]) if n else 0 for n in lengths) for reach in reaches]
    made = {some: SeqLayout.from_lengths(some, x.shape[1], device=x.device) for some in set(within)}
    layouts = [made[some] for some in within]
    for log in visible(state.records):
        log.tokens.append(layouts[-1])  # type: ignore[attr-defined]
    rows = pack_rows(layouts[0], x, apart=True)
    for layer, own, kept in zip(model.conformer_layers, layouts, layouts[1:], strict=False):
        rows = _layer(layer, rows, own, kept, layouts[-1])
    return unpack_rows(layouts[-1], rows, padding_rows="edge" if padding_rows == "edge" else "zero")


def _layer(layer: Any, rows: Tensor, own: SeqLayout, kept: SeqLayout, real: SeqLayout) -> Tensor:
    """Rows of ``own``, of which those of ``kept`` are right afterwards, and those of ``real`` are looked at."""
    rows = torch.add(rows, layer.ffn1(rows), alpha=0.5)
    if layer.convolution_first:
        rows, own = _part(rows + _convolution(layer.conv_module, rows, own), own, kept), kept
    query = layer.self_attn_layer_norm(rows)
    keys, prepared = _part(query, own, real), Prepared(own, real, False, None, False, True)
    rows = rows + layer.self_attn_dropout(layer.self_attn(query, keys, need_weights=False, layout=prepared)[0])
    if not layer.convolution_first:
        rows = _part(rows + _convolution(layer.conv_module, rows, own), own, kept)
    return layer.final_layer_norm(torch.add(rows, layer.ffn2(rows), alpha=0.5))  # type: ignore[no-any-return]


def _part(rows: Tensor, layout: SeqLayout, kept: SeqLayout) -> Tensor:
    """Those of the tokens that ``kept`` has too."""
    return rows if layout is kept else rows.index_select(0, layout.gather_indices.index_select(0, kept.token_indices) - 1)


def _convolution(module: Any, rows: Tensor, layout: SeqLayout) -> Tensor:
    rows = module.layer_norm(rows)
    for part in module.sequential:
        if isinstance(part, nn.Conv1d | nn.GLU):
            rows = F.glu(rows, -1) if isinstance(part, nn.GLU) else varlen_conv1d(part, rows, layout)[0]
        else:
            rows = varlen_norm(part, rows, layout) if isinstance(part, NORMS) else part(rows)
    return rows


# -------------------------------------------------------------------- which may be


def conformer_of(cls: type[Any]) -> Any:
    """The `Conformer` that a class is, or is derived from."""
    return next((c for c in cls.__mro__ if (c.__module__, c.__qualname__) == (_HOME, _NAME)), None)


def why_not_parts(model: nn.Module, alone: bool, running: bool = False) -> str | None:
    for name, m in list(model.named_modules())[1:]:
        own: Any = original_class(m)
        convolves = ".conv_module.sequential." in name  # where features are the second dimension
        if has_hooks(m) or not vars(m).keys().isdisjoint(_REPLACED):
            return f"{name}: has hooks or a method of its own, which rows would not go through"
        if convolves and own in NORMS:
            known = alone or not (own is nn.GroupNorm or m.running_mean is None or (m.training and running))
            if not known:
                return f'{name}: a {own.__name__} reads all padding here: padding_rows="alone" leaves it out'
        elif own is nn.MultiheadAttention:
            plain = name.endswith("self_attn") and not (m.batch_first or m.add_zero_attn or m.bias_k is not None)
            known = plain and (isinstance(m, VarlenMultiheadAttention) or not running)
        elif own in POSITION_WISE:
            known = not (convolves and own in _OVER_FEATURES) and len(getattr(m, "normalized_shape", "D")) == 1
        elif convolves and own is nn.Conv1d:
            known = (m.stride, m.padding_mode, m.padding) == ((1,), "zeros", (m.dilation[0] * (m.kernel_size[0] - 1) / 2,))
        else:
            known = m.dim in (1, -2) if convolves and own is nn.GLU else not convolves and own in _CONTAINERS
            known |= (own.__module__, own.__name__) in PARTS
        if not known:
            return f"{name}: nothing is known of a {own.__name__} there on packed rows"
    return None


@cache
def try_small(cls: Any) -> None:
    """A small one, once for each class: its code may be that of another version of torchaudio."""
    for first in (False, True):
        with torch.device("meta"):  # where nothing is drawn
            tiny = cls(8, 2, 8, 3, 3, convolution_first=first)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad(), use_backend("auto"):
            tiny = tiny.to_empty(device="cpu").double().eval()
            for t in (*tiny.parameters(), *tiny.buffers()):
                t.copy_(torch.rand(t.shape, generator=generator) + 0.1)
            x, lengths = torch.randn(2, 9, 8, dtype=torch.float64, generator=generator), (9, 4)
            expected, _ = cls.forward(tiny, x, torch.tensor(lengths))
            for layer in tiny.conformer_layers:
                layer.self_attn.__class__ = VarlenMultiheadAttention
            got = on_rows(tiny, x, lengths, "zero")
        if not all(torch.allclose(got[i, :n], expected[i, :n]) for i, n in enumerate(lengths)):
            raise VarlenError("it gave other numbers, as one of a version that is not known")
