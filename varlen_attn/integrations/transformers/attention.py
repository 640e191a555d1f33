"""The attention function that transformers' layers call under the name ``varlen_attn``.

``(B, N, L, H)`` in, ``((B, L, N, H), weights or None)`` out. Every row comes out as with ``sdpa``, those of padded queries too: what is
skipped are keys at padding, and inside a stack that runs packed everything at padding. What packed attention cannot compute
goes to transformers' own function for ``sdpa``, or, where that lacks an option (softcap, sinks, weights), to eager maths.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..._state import state
from ..._torch import between_graphs, is_tracing, is_transformed
from ...attention.call import Options as Asked
from ...attention.call import attend
from ...attention.dispatch import requested_backend
from ...attention.export import REASON, note_static, refuse_order, static_graph
from ...attention.forms import full_layout, pack_rows, unpack_rows
from ...attention.records import recorded_padded
from ...data.host_lengths import HostLengths
from ...errors import ArgumentError, LayoutError
from ...kernels.base import accumulation_dtype
from ...kernels.dense import EAGER, attend_dense
from ...kernels.problem import Semantics
from ...kernels.values import NO_EXTRAS, Extras
from ...layout.seq_layout import SeqLayout
from .mask import ISLAND, Meaning, Packing, VarlenMask, island_of

_OTHER_MASK = "a mask of the model's or the caller's own"
_ONE_GRAPH = "inside of torch.compile, in one graph with the making of its mask (fullgraph=True, or an export), where no layout is known"


class NotPackable(ArgumentError):
    """A layer asks for something that attention here cannot give it."""


class Options(NamedTuple):
    """What a layer asks for besides its mask."""

    scaling: float | None
    dropout: float
    softcap: float | None
    bias: Tensor | None
    sinks: Tensor | None
    weights: bool


def varlen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Registered as ``varlen_attn`` in transformers' `AttentionInterface`.

    Args:
        module: of the model, with ``is_causal``, and ``num_key_value_groups`` where heads are grouped.
        query: ``(B, N, Lq, H)``.
        key, value: ``(B, K, Lk, H)``; N is a multiple of K.
        attention_mask: a `VarlenMask`, or what `sdpa` takes: None, bool (True is visible) or additive, ``(B, 1, Lq, Lk)``.
        dropout, scaling, is_causal, softcap, position_bias, s_aux: as in transformers; ``s_aux`` are sinks ``(N,)``.
        kwargs: ``cu_seq_lens_q`` and ``cu_seq_lens_k`` say which of the ``(1, T)`` columns belong together.

    Raises:
        LayoutError: ``cu_seq_lens_q`` does not fit the query.
    """
    for name in kwargs:
        if name.endswith("indices") and kwargs[name] is not None:
            raise NotPackable(
                f"`{name}` must not be given to attention, but is, by {type(module).__name__}: it chooses keys in a way that only kernels "
                "of its own understand. Call varlen_attn.enable(model), which leaves such models alone."
            )
    mask, wants_weights, has_offsets = attention_mask, bool(kwargs.get("output_attentions")), kwargs.get("cu_seq_lens_q") is not None
    meaning = mask.meaning if isinstance(mask, VarlenMask) else None
    plain = position_bias is None and not wants_weights and not has_offsets
    if (
        plain
        and meaning is not None
        and meaning.stack is not None
        and (1, query.shape[2], key.shape[2]) == (query.shape[0], *meaning.shape[2:])
    ):
        return _attend_rows(module, query, key, value, meaning.stack, Options(scaling, dropout, softcap, None, s_aux, False)), None
    as_sdpa = plain and meaning is None and softcap is None and s_aux is None and not (state.records or torch.compiler.is_compiling())
    if as_sdpa and not is_transformed() and requested_backend("auto") == "auto" and "attentions" not in collected():
        return _sdpa()(module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)  # type: ignore[no-any-return]
    options = Options(scaling, dropout, softcap, position_bias, s_aux, wants_weights)
    # In `torch.compile` layouts are made, and looked at, between graphs.
    compute = _attend_columns if meaning is None and not has_offsets else _attend_columns_between_graphs
    return compute(module, query, key, value, mask, is_causal, options, kwargs)


def _attend_columns(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool | None,
    options: Options,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """For padded columns, and those that the caller packed."""
    options = options._replace(weights=options.weights or "attentions" in collected())
    meaning, has_offsets = mask.meaning if isinstance(mask, VarlenMask) else None, kwargs.get("cu_seq_lens_q") is not None
    order = requested_backend("auto")
    if has_offsets:
        layouts, causal = _given_layouts(query, key, mask, kwargs), _is_causal(module, is_causal)
        way = REASON if static_graph() else _by_offsets(*layouts, mask, causal, options)
        if isinstance(way, str):
            mask = _same_document(mask, *layouts, causal)
    elif meaning is not None and torch.compiler.is_compiling():
        way = _ONE_GRAPH
    elif meaning is not None:
        way = _by_mask(meaning, query, key, options, order)
    elif mask is None and order != "auto" and options.bias is None and not options.weights:
        aligned = "top_left" if query.shape[2] > 1 and _is_causal(module, is_causal) else False
        way = Packing(full_layout(query.transpose(1, 2)), full_layout(key.transpose(1, 2)), aligned, None)
    else:
        way = "nothing is padded" if mask is None else "a decoding step" if query.shape[2] == 1 else _OTHER_MASK
    if isinstance(way, str):
        refuse_order(order, f"this call can only be computed the padded way: {way}", "drop the request, or use backend='sdpa_padded'")
        return _dense(module, query, key, value, mask, is_causal, options, way, kwargs)
    if (query.shape[0], query.shape[2]) != (way.layout_q.batch_size, way.layout_q.padded_len):
        return _attend_rows(module, query, key, value, way, options), None
    q_TNH = pack_rows(way.layout_q, query.transpose(1, 2), "query")
    columns = slice(way.layout_kv.padded_len)
    k_TKH, v_TKH = (pack_rows(way.layout_kv, x[:, :, columns].transpose(1, 2)) for x in (key, value))
    reason = (meaning is not None and meaning.padded_because) or "a call by itself: the layers around it compute padding"
    reason = reason if island_of() is None else ISLAND
    return unpack_rows(way.layout_q, _attend(module, q_TNH, k_TKH, v_TKH, way, options, reason)), None


_attend_columns_between_graphs = between_graphs(_attend_columns)


def _attend_rows(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, way: Packing, options: Options) -> Tensor:
    """For columns that are packed rows already. Those that see nothing get 0, as from all kernels."""
    value = value if way.blind is None else value.masked_fill(way.blind[:, None], 0)
    q_TNH, k_TKH, v_TKH = query.squeeze(0).transpose(0, 1), key.squeeze(0).transpose(0, 1), value.squeeze(0).transpose(0, 1)
    return _attend(module, q_TNH, k_TKH, v_TKH, way, options, None).unsqueeze(0)


def _attend(module: nn.Module, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, way: Packing, options: Options, reason: str | None) -> Tensor:
    asked = Asked(way.causal, way.window, options.scaling, options.softcap, options.dropout)
    extras = NO_EXTRAS
    if options.bias is not None or options.sinks is not None:
        extras = Extras(None, options.sinks, None if options.bias is None else options.bias[0])
    out: Tensor = attend(q_TNH, k_TKH, v_TKH, way.layout_q, way.layout_kv, asked, extras, module=module, reason=reason)
    return out


# -------------------------------------------------------------------- which way


def _by_mask(meaning: Meaning, query: Tensor, key: Tensor, options: Options, order: Any) -> Packing | str:
    batch_size, _, len_q, len_k = meaning.shape
    if (query.shape[0], query.shape[2]) != (batch_size, len_q) or (key.shape[0], key.shape[2]) != (batch_size, len_k):
        return "the mask was made for tensors of another shape"
    if meaning.rows is not None and (options.bias is not None or options.weights):
        raise NotPackable("it adds a position bias to the scores, or gives attention weights")
    if options.weights:
        return "attention weights are asked for"
    if meaning.is_plain and order == "auto":
        return "nothing is padded"
    way = meaning.packing
    if isinstance(way, str) or options.bias is None:
        return way
    if options.bias.shape[0] != 1 or options.bias.shape[2:] != (len_q, len_k) or not way.layout_kv.right_padded or len_q != len_k:
        return "a position bias by columns, which are not positions in this batch"
    if 0 in (way.layout_kv.lengths or ()):
        return "a row without tokens, where a position bias is all that counts"
    if way.layout_q.padded_len != len_q or meaning.first_query != 0:
        return "a position bias of cached keys"
    if meaning.keys.fill is not None and meaning.keys.fill > _BIAS_FILL and order == "auto":
        return "a position bias with little padding: one dense call is faster than eager maths for each sequence"
    return way


# Attention with a bias is eager maths for each sequence on packed rows and one fused call on padded ones: about 1.5 times the work of
# the latter for a real pair of tokens.
_BIAS_FILL = 0.6


def _given_layouts(query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> tuple[SeqLayout, SeqLayout]:
    """The caller packed the batch: ``(1, T)`` columns, and where each sequence begins."""
    if isinstance(mask, VarlenMask) and mask.meaning.padding is not None and not mask.meaning.keys.is_dense:
        raise LayoutError(
            "`attention_mask` must not hide columns where cu_seq_lens_q is given, whose columns are all tokens, but does: pass one of both."
        )
    offsets_q, offsets_k = kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k")
    layout_q = _offsets_layout(offsets_q, query, "q", kwargs.get("max_length_q"))
    same = (offsets_k is None or offsets_k is offsets_q) and key.shape[2] == query.shape[2]
    return layout_q, layout_q if same else _offsets_layout(offsets_k, key, "k", kwargs.get("max_length_k"))


def _by_offsets(layout_q: SeqLayout, layout_k: SeqLayout, mask: Tensor | None, causal: bool, options: Options) -> Packing | str:
    if options.bias is not None or options.weights:
        return "a position bias by columns, or attention weights, of packed columns"
    if isinstance(mask, VarlenMask):
        return Packing(layout_q, layout_k, mask.meaning.pattern.causal, mask.meaning.pattern.window)
    return Packing(layout_q, layout_k, causal, None) if mask is None else _OTHER_MASK


# By the tensor of offsets, and gone with it. Not an attribute: the tensor is the caller's, and would take the layout into a file.
_layouts: MutableMapping[Tensor, tuple[int, Tensor, SeqLayout]] = WeakIdKeyDictionary()


def _offsets_layout(offsets: Tensor | None, x: Tensor, side: str, longest: Any) -> SeqLayout:
    """Kept for the tensor, which every layer is given, as long as nobody writes to it; in one graph, where nothing is read, made anew."""
    name = f"cu_seq_lens_{side}"
    if offsets is None:
        raise LayoutError(f"`{name}` must be given, because there are other keys than queries, but is None.")
    if is_tracing(offsets) and x.shape[0] == 1:
        total = x.shape[2]
        return SeqLayout.from_cu_seqlens(offsets, longest if isinstance(longest, int) else total, total=total, validate=False)
    kept = offsets.seq_layout if isinstance(offsets, HostLengths) else _kept_layout(offsets)
    layout = SeqLayout.from_cu_seqlens(offsets) if kept is None else kept
    if x.shape[0] != 1 or x.shape[2] != layout.num_rows:
        raise LayoutError(
            f"`{name}` must describe the ({x.shape[0]}, {x.shape[2]}) columns of the batch, one row of as many columns as tokens, but ends "
            f"at {layout.num_rows}: pass packed inputs (1, T) with it, or an attention_mask with padded ones."
        )
    if kept is None and not offsets.is_inference():
        _layouts[offsets] = offsets._version, offsets.detach().clone(), layout
    return layout


def _kept_layout(offsets: Tensor) -> SeqLayout | None:
    """That of an earlier layer. On a CPU looking costs nothing, and sees writes that torch does not count, by numpy for one."""
    known = None if offsets.is_inference() else _layouts.get(offsets)
    if known is None:
        return None
    version, copied, layout = known
    same = version == offsets._version and (offsets.device.type != "cpu" or torch.equal(copied, offsets))
    return layout if same else None


def _same_document(mask: Tensor | None, layout_q: SeqLayout, layout_k: SeqLayout, causal: bool) -> Tensor:
    """``mask`` without what crosses from one sequence into another."""
    together = (layout_q.seq_ids[:, None] == layout_k.seq_ids)[None, None]
    if mask is None:
        ends = torch.repeat_interleave(layout_k.cu_seqlens[1:] - layout_q.cu_seqlens[1:], layout_q.cu_seqlens.diff())
        rows, columns = (torch.arange(layout.num_rows, device=together.device) for layout in (layout_q, layout_k))
        return together & (columns <= (rows + ends)[:, None]) if causal else together  # aligned at the ends
    if mask.dtype == torch.bool:
        return mask & together
    return mask.masked_fill(~together, float("-inf"))


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


@cache
def _collector() -> Any:
    try:
        from transformers.utils import output_capturing
    except ImportError:  # before 5.0 layers collected what was asked for themselves
        return None
    return getattr(output_capturing, "_active_collector", None)


def captured() -> tuple[str, ...]:
    """What transformers collects from layers in this forward: hidden_states, attentions, router_logits and the like."""
    return tuple(name for name in collected() if not name.startswith("_"))


def collected() -> dict[str, Any]:
    """The lists that transformers collects it in."""
    if torch.compiler.is_compiling():
        return {}
    collector = _collector()
    return {} if collector is None else collector.get() or {}


# -------------------------------------------------------------------- the dense way


@cache
def _sdpa() -> Any:
    """transformers' own function."""
    from transformers.integrations import sdpa_attention

    return sdpa_attention.sdpa_attention_forward


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool | None,
    options: Options,
    reason: str,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    blind = False
    if isinstance(mask, VarlenMask):
        meaning = mask.meaning
        blind = options.bias is not None and 0 in (meaning.keys.lengths or ())
        mask, is_causal = (None, meaning.pattern.causal) if meaning.is_plain else (meaning.dense, False)
    fused = options.softcap is None and options.sinks is None and not options.weights and not is_transformed()
    if blind and mask is not None and mask.dtype == torch.bool:
        # As ``eager`` does it: torch's kernel has a wrong gradient where all numbers of a row are so low.
        lowest = torch.finfo(query.dtype).min
        mask, fused = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, lowest), False
    if options.bias is not None and "position_bias" not in _sdpa().__code__.co_varnames:
        fused = False  # an earlier one would take it among its other keywords, and leave it out
    note: AbstractContextManager[object] = nullcontext()
    if torch.compiler.is_compiling():
        problem = (
            ("device_type", query.device.type),
            ("device_index", query.device.index),
            ("dtype", query.dtype),
            ("num_heads", index(query.shape[1])),
            ("num_kv_heads", index(key.shape[1])),
            ("head_dim", index(query.shape[3])),
            ("value_head_dim", index(value.shape[3])),
        )
        note_static(problem, (), None, None, _ONE_GRAPH)
    elif state.records:
        kernel = "F.scaled_dot_product_attention" if fused else EAGER
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        note = recorded_padded(module, q, k, v, kernel, reason)
    given = {k: v for k, v in kwargs.items() if k not in ("cu_seq_lens_q", "cu_seq_lens_k")}
    if options.bias is not None:
        given["position_bias"] = options.bias
    with note:
        if not fused:
            return _eager(module, query, key, value, mask, is_causal, options)
        out: tuple[Tensor, None] = _sdpa()(
            module, query, key, value, mask, dropout=options.dropout, scaling=options.scaling, is_causal=is_causal, **given
        )
    return out


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool | None, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Everything that ``sdpa`` has no argument for; in float32 for half precision."""
    len_q, bias, visible = query.shape[2], options.bias, None
    causal = mask is None and len_q > 1 and _is_causal(module, is_causal)
    if causal:
        key, value = key[:, :, :len_q], value[:, :, :len_q]  # the rest of a static cache is the future
        bias = None if bias is None else bias[..., :len_q]
    elif mask is not None and mask.dtype == torch.bool:
        visible = mask
    elif mask is not None:
        bias = mask if bias is None else bias.to(accumulation_dtype(query.dtype)) + mask
    scale = query.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    semantics = Semantics("top_left" if causal else False, None, scale, options.softcap, options.dropout)
    out, _, weights = attend_dense(query, key, value, semantics, Extras(None, options.sinks), visible=visible, bias=bias)
    assert weights is not None
    return out.transpose(1, 2).contiguous(), weights.to(query.dtype)
