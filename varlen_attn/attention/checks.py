"""What the arguments of a call must be: shapes, dtypes, devices, and that distances mean what a padded implementation would mean."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._torch import is_tracing
from ..errors import ArgumentError, DtypeError, LayoutError, UnknownArgument
from ..kernels.base import FLOATS, accumulation_dtype
from ..kernels.problem import Semantics
from ..kernels.values import Extras
from ..layout.checks import heads_first
from ..layout.seq_layout import SeqLayout


def autocasts(device_type: str) -> bool:
    """Whether autocast is on; asked about the meta device, torch raises."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def common_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Autocast casts half and single precision to its dtype; outside it, dtypes are equal and stay what they are."""
    names = ("query", "key", "value")
    for name, x in zip(names, tensors, strict=True):
        if not isinstance(x, Tensor):
            raise DtypeError(f"`{name}` must be a tensor, but is {type(x).__name__}.")
        if x.is_nested:
            raise ArgumentError(f"`{name}` must be a plain packed tensor, but is nested: pass its values() and SeqLayout.from_nested.")
    dtypes = [str(x.dtype).removeprefix("torch.") for x in tensors]
    listing = ", ".join(f"{n} is {d}" for n, d in zip(names, dtypes, strict=True))
    if any(x.dtype not in FLOATS for x in tensors):
        raise DtypeError(f"query, key and value must be float16, bfloat16, float32 or float64, but {listing}.")
    device_type = tensors[0].device.type
    if autocasts(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        if any(x.dtype == torch.float64 for x in tensors):
            raise DtypeError(
                f"inside autocast query, key and value must be float16, bfloat16 or float32, but {listing}: leave autocast for float64."
            )
        return tuple(x if x.dtype == dtype else x.to(dtype) for x in tensors)  # torch.export asserts the dtype before each cast
    if len(set(dtypes)) > 1:
        raise DtypeError(f"query, key and value must have one dtype, but {listing}: convert them, or call under torch.autocast.")
    return tensors


def check_layouts(layout: Any, layout_kv: Any) -> None:
    """Each a `SeqLayout` or None: a mask in its place is the most natural slip."""
    for name, x in (("layout", layout), ("layout_kv", layout_kv)):
        if x is not None and not isinstance(x, SeqLayout):
            raise ArgumentError(
                f"`{name}` must be a SeqLayout, but is {type(x).__name__}: build one with SeqLayout.from_key_padding_mask(mask)."
            )


def check_shapes(query: Tensor, key: Tensor, value: Tensor, layout_q: SeqLayout, layout_kv: SeqLayout) -> None:
    for name, x, letters in (("query", query, "(T, N, H)"), ("key", key, "(Tk, K, H)"), ("value", value, "(Tk, K, Hv)")):
        if x.dim() != 3:
            raise LayoutError(
                f"`{name}` must be packed, {letters}, but has shape {tuple(x.shape)}: "
                "pack padded tensors with layout.pack(x), or call padded_attention."
            )
    layout_q._check(query, (layout_q.num_rows,), "query")
    layout_kv._check(key, (layout_kv.num_rows,), "key")
    layout_kv._check(value, (layout_kv.num_rows,), "value")
    if layout_q.num_seqs != layout_kv.num_seqs:
        raise LayoutError(
            f"`layout` and `layout_kv` must have equally many sequences, but have {layout_q.num_seqs} and {layout_kv.num_seqs}."
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    if value.shape[1] != kv_heads:
        raise ArgumentError(f"`value` must have as many heads as key ({kv_heads}), but has {value.shape[1]}.")
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ArgumentError(f"query heads must be a multiple of key/value heads, but they are {heads} and {kv_heads}.")
    if query.shape[2] != key.shape[2]:
        raise ArgumentError(f"`key` must have the head dimension of query ({query.shape[2]}), but has {key.shape[2]}.")
    if query.device != key.device:
        raise ArgumentError(f"query and key must be on one device, but are on {query.device} and {key.device}.")


def check_extras(query: Tensor, layout_q: SeqLayout, layout_kv: SeqLayout, extras: Extras) -> Extras:
    """Slopes and sinks stay float32 under autocast: half precision would round the logits they shift."""
    wide = accumulation_dtype(query.dtype)
    heads = query.shape[1]
    converted: dict[str, Tensor] = {}
    for name, x in (("alibi_slopes", extras.alibi_slopes), ("sinks", extras.sinks)):
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            raise DtypeError(f"`{name}` must be a floating-point tensor, but is {getattr(x, 'dtype', type(x).__name__)}.")
        if tuple(x.shape) != (heads,):
            raise ArgumentError(f"`{name}` must have shape (N,) = ({heads},), but has shape {tuple(x.shape)}.")
        if x.device != query.device:
            raise ArgumentError(f"`{name}` must be on {query.device}, as query is, but is on {x.device}.")
        converted[name] = x.to(wide)
    if extras.alibi_slopes is not None and extras.alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ArgumentError("`alibi_slopes` must not require a gradient, because no kernel gives one: use `score_bias`, or detach them.")
    if isinstance(extras.score_bias, Tensor):
        check_bias(extras.score_bias, query, layout_q, layout_kv)
    elif extras.score_bias is not None and not callable(extras.score_bias):
        raise DtypeError(f"`score_bias` must be a tensor or a callable, but is {type(extras.score_bias).__name__}.")
    return replace(extras, **converted)


def check_bias(bias: Tensor, query: Tensor, layout_q: SeqLayout, layout_kv: SeqLayout) -> None:
    """One that is too small would be broadcast where a side is 1."""
    heads = query.shape[1]
    if bias.dtype not in FLOATS:
        raise DtypeError(f"`score_bias` must be a floating-point tensor, but is {bias.dtype}: it is added to scores, and hides nothing.")
    if bias.dim() != 3 or bias.shape[0] != heads:
        raise ArgumentError(f"`score_bias` must have shape (N, Sq, Sk) with N = {heads}, but has shape {tuple(bias.shape)}.")
    if bias.device != query.device:
        raise ArgumentError(f"`score_bias` must be on {query.device}, as query is, but is on {bias.device}.")
    known = not is_tracing(query)
    reach = [max(x.lengths, default=0) if known and x.lengths is not None else x.max_seqlen for x in (layout_q, layout_kv)]
    if bias.shape[1] < reach[0] or bias.shape[2] < reach[1]:
        raise ArgumentError(
            f"`score_bias` must reach to position {reach[0]} of queries and {reach[1]} of keys, but has shape {tuple(bias.shape)}: "
            "it is indexed by positions."
        )


def check_holes(layout_q: SeqLayout, layout_kv: SeqLayout, semantics: Semantics) -> None:
    """Distances count packed tokens, a padded implementation counts columns: with holes the two differ."""
    asked = [
        n
        for n, on in (("window", semantics.window is not None), ("alibi_slopes", semantics.alibi), ("score_bias", semantics.score_bias))
        if on
    ]
    if asked and any(x.has_holes and x.holes == "refuse" for x in (layout_q, layout_kv)):
        raise LayoutError(
            f"`{asked[0]}` counts distances in packed tokens, but this layout has padding between tokens of one row, where a padded "
            "implementation counts columns. If packed distances are meant, build the layout with holes='packed'."
        )


def check_mask(mask: Tensor | None, x: Tensor, name: str, other: str) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise DtypeError(f"`{name}` must be a tensor, but is {type(mask).__name__}: pass torch.as_tensor({name}).")
    if mask.shape != x.shape[:2]:
        raise LayoutError(
            f"`{name}` must have {other}'s (B, S) = {tuple(x.shape[:2])}, but has shape {tuple(mask.shape)}. Nothing is sliced to fit."
            + heads_first(x, tuple(mask.shape), other)
        )


_OURS = {
    "is_causal": "pass causal='top_left'",
    "attn_mask": "pass causal= or window= for what they say, score_bias= for a bias, and the mask of padding to padded_attention",
    "enable_gqa": "leave it out, because key and value may have fewer heads than query anyway",
}


def unknown(function: str, names: Iterable[str], known: Iterable[str]) -> TypeError:
    """For a keyword that a function does not have: of `F.scaled_dot_product_attention` ours, else the nearest."""
    name, known = next(iter(names)), list(known)
    fix = _OURS.get(name) or f"the nearest is {', '.join(difflib.get_close_matches(name, known, 1, 0)) or 'none'}"
    return UnknownArgument(f"{function}() got an unexpected keyword argument {name!r}: {fix}.")


def check_projections(
    width: int, in_weight: Tensor | None, in_bias: Tensor | None, out_weight: Tensor | None, out_bias: Tensor | None
) -> None:
    expected = (
        ("in_proj_weight", in_weight, (3 * width, width)),
        ("in_proj_bias", in_bias, (3 * width,)),
        ("out_proj_weight", out_weight, (width, width)),
        ("out_proj_bias", out_bias, (width,)),
    )
    for name, x, shape in expected:
        if x is not None and tuple(x.shape) != shape:
            raise ArgumentError(f"`{name}` must have shape {shape} for x of width {width}, but has shape {tuple(x.shape)}.")
    for name, weight, bias in (("in_proj", in_weight, in_bias), ("out_proj", out_weight, out_bias)):
        if bias is not None and weight is None:
            raise ArgumentError(f"`{name}_bias` is given without `{name}_weight`: pass the weight too (torch.eye for none).")
