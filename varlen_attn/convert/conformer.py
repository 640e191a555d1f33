"""`enable(level="model")` for torchaudio's `Conformer`: all layers on packed rows, though a convolution in each reads the frames around it.

A padded conformer gives the last frames of an utterance other numbers than the utterance has alone, because convolutions read what norms
and linear layers leave at padding. So frames of padding that reach a real frame through the convolutions that are still to come are rows
too: attention computes them, and never looks at them. With ``padding_rows="alone"`` only real frames are rows.

torchaudio is not imported. Its classes are known by name, and what they compute by a trial of a small one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .._clone import Seeded
from .._state import state, visible
from .._switch import Derived, derived, original_class, run_as_it_came, switchable
from .._torch import global_hooks, is_plain, unwrapped
from ..attention.dispatch import use_backend
from ..attention.forms import pack_rows, unpack_rows
from ..errors import ArgumentError, VarlenError
from ..layout.seq_layout import SeqLayout
from ..nn.conv import varlen_conv1d
from ..nn.multihead import VarlenMultiheadAttention
from ..nn.norm import varlen_norm
from ..nn.stream import Prepared, filled
from ..nn.token_wise import POSITION_WISE, has_hooks
from .classes import _LITTLE_PADDED, NOTHING_PADDED, EnabledMultiheadAttention, _Enabled, _given
from .watch import ATTENTION, Code, code_of, sees, why_replaced

_HOME, _NAME = "torchaudio.models.conformer", "Conformer"
_PARTS = [(_HOME, name) for name in ("ConformerLayer", "_ConvolutionModule", "_FeedForwardModule")]
_NORMS = (nn.BatchNorm1d, nn.GroupNorm)  # over time
_OVER_FEATURES = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
_CONTAINERS = (nn.ModuleList, nn.Sequential, NonDynamicallyQuantizableLinear)  # the last one is in attention, and not called
_UNREAD = "its lengths cannot be read: it is traced, transformed or distributed"
_NO_LENGTHS = "lengths must be integers of one dimension, one for each utterance, of which the longest has all columns"
# Multiplications of a layer that are saved: more take longer than packing, and what a layout takes (Zen 4, one thread). A GPU multiplies
# some hundred times as fast, and launches kernels no faster: an estimate.
_PAYS, _BY_WIDTH = 30_000_000, 23  # for each row, by the square of its width, where linear layers are four times as wide


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
        return _on_rows(self, input, layout), lengths

    def why_as_it_came(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        x, lengths = _given(self.takes, args, kwargs)
        if not all(isinstance(t, Tensor) and not t.is_nested and is_plain(t) for t in (x, lengths)):
            return _UNREAD
        if x.dim() != 3 or lengths.shape != x.shape[:1] or lengths.device != x.device or lengths.is_floating_point() or not x.numel():
            return _NO_LENGTHS
        columns, known, alone = x.shape[1], _Lengths(max(n, 0) for n in lengths.tolist()), self.padding_rows == "alone"
        if max(known) != columns or min(known) == columns:
            return NOTHING_PADDED if min(known) == columns else _NO_LENGTHS
        worth = _PAYS * (1 if x.is_cpu else 100) // (_BY_WIDTH * x.shape[2] ** 2 + 1)
        if not alone and len(known) * columns - sum(known) < worth:
            return _LITTLE_PADDED
        why = why_replaced(self.original_class, self.code) or _why_not_parts(self, alone, running=True)
        kwargs["layout"] = known
        if why is None and not alone:
            left = [sum(columns - min(n + reach, columns) if n else columns for n in known) for reach in _reaches(self)[:-1]]
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
def enabled(original: Any) -> Any:
    return switchable(derived(EnabledConformer, original, enabled, code=_code(original)), inside=Prepared)


# -------------------------------------------------------------------- on rows


def _reaches(model: Any) -> list[int]:
    """From how many frames away each layer, and the end, must be right for real frames to be right at the end."""
    reaches = [0]
    for layer in reversed(model.conformer_layers):
        reaches.append(reaches[-1] + sum(x.padding[0] for x in layer.conv_module.sequential if hasattr(x, "padding")))
    return reaches[::-1]


def _on_rows(model: Any, x: Tensor, lengths: Sequence[int]) -> Tensor:
    reaches = [0] * (1 + len(model.conformer_layers)) if model.padding_rows == "alone" else _reaches(model)
    within = [tuple(min(n + reach, x.shape[1]) if n else 0 for n in lengths) for reach in reaches]
    made = {some: SeqLayout.from_lengths(some, x.shape[1], device=x.device) for some in set(within)}
    layouts = [made[some] for some in within]
    for log in visible(state.records):
        log.tokens.append(layouts[-1])  # type: ignore[attr-defined]
    rows = pack_rows(layouts[0], x, apart=True)
    for layer, own, kept in zip(model.conformer_layers, layouts, layouts[1:], strict=False):
        rows = _layer(layer, rows, own, kept, layouts[-1])
    return unpack_rows(layouts[-1], rows, padding_rows="edge" if model.padding_rows == "edge" else "zero")


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
            rows = varlen_norm(part, rows, layout) if isinstance(part, _NORMS) else part(rows)
    return rows


# -------------------------------------------------------------------- which may be


def host_of(module: nn.Module) -> Any:
    """The class of a `Conformer`, or one that is derived from it."""
    own = original_class(module)
    return own if _base(own) else None


def _base(cls: type[Any]) -> Any:
    return next((c for c in cls.__mro__ if (c.__module__, c.__qualname__) == (_HOME, _NAME)), None)


def _code(cls: Any) -> Code:
    own = [x for _, name in _PARTS if (x := cls.forward.__globals__.get(name))]
    parts = [code_of(x, "forward", "_apply_convolution", "_conv_forward") for x in (_base(cls), *own, nn.Conv1d, nn.GLU, nn.GroupNorm)]
    return sum(parts, start=ATTENTION)


def why_not(model: Any, padding_rows: str | None) -> str | None:
    """Why it is not to have ``padding_rows``, which may be the reason."""
    host: Any = original_class(model)
    if "forward" in vars(model) or host.forward is not _base(host).forward:
        return "has a forward of its own"
    if not len(model.conformer_layers):
        return "has no layers"
    why = why_replaced(host, enabled(host).code) if padding_rows in ("zero", "edge", "alone") else padding_rows
    try:
        return why or _why_not_parts(model, padding_rows == "alone") or _try(_base(host))
    except Exception as error:
        return f"a small one could not be packed: {type(error).__name__}: {error}"


def _why_not_parts(model: nn.Module, alone: bool, running: bool = False) -> str | None:
    if any(map(sees, global_hooks)):
        return "hooks for all modules"
    for name, m in list(model.named_modules())[1:]:
        own: Any = original_class(m)
        convolves = ".conv_module.sequential." in name  # where features are the second dimension
        if has_hooks(m) or not vars(m).keys().isdisjoint(("forward", "_apply_convolution")):
            return f"{name}: has hooks or a method of its own, which rows would not go through"
        if convolves and own in _NORMS:
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
            known |= (own.__module__, own.__name__) in _PARTS
        if not known:
            return f"{name}: nothing is known of a {own.__name__} there on packed rows"
    return None


@cache
def _try(cls: Any) -> None:
    """A small one, once for each class: its code may be that of another version of torchaudio."""
    for first in (False, True):
        with torch.no_grad(), Seeded(), use_backend("auto"):
            tiny = cls(8, 2, 8, 3, 3, convolution_first=first).double().eval()
            x, lengths = torch.randn(2, 9, 8, dtype=torch.float64), (9, 4)
            expected, _ = cls.forward(tiny, x, torch.tensor(lengths))
            tiny.__class__ = enabled(cls)
            for attn in tiny._attns():
                attn.__class__ = EnabledMultiheadAttention
            got = _on_rows(tiny, x, lengths)
        if not all(torch.allclose(got[i, :n], expected[i, :n]) for i, n in enumerate(lengths)):
            raise VarlenError("it gave other numbers, as one of a version that is not known")


def says(padding_rows: str | None, reader: str | None) -> str:
    """For the report."""
    if padding_rows == "alone":
        return "each utterance gets the numbers that it has alone, and not those of the padded model, which it gets without padding_rows"
    read = f', which {reader} may read: padding_rows="exact" keeps them' if reader else ""
    numbers = 'real frames get the padded model\'s numbers, those that each utterance has alone with padding_rows="alone"'
    return f"{numbers}; rows at padding are {padding_rows or 0}{read}"
