"""The calls: `varlen_attention` on packed tensors, `padded_attention` and `varlen_mha` on padded ones.

The seam of the package. Everything is checked and normalised here, once: shapes, dtypes (autocast included), the layout against the
tensors, empty sequences for backends that mishandle them. Backends trust what they get.
"""

from __future__ import annotations

import operator
from contextlib import nullcontext
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .._state import state
from .._torch import PLAIN, SDPA, is_plain, is_unreadable, trace_quietly, watchers
from ..errors import ArgumentError, LayoutError, UnknownArgument, VarlenWarning, warn
from ..kernels.base import Backend
from ..kernels.dense import FLASH_CPU
from ..kernels.problem import check_dropout
from ..kernels.values import NO_EXTRAS, Extras, ScoreBias
from ..layout.seq_layout import SeqLayout, moved
from .call import AttentionCall, Options, attend
from .checks import autocasts, check_layouts, check_mask, check_projections, unknown
from .dispatch import Plan, requested_backend
from .export import static_graph, static_layout, static_layouts
from .forms import Form, full_layout, pack_rows, unpack_rows
from .records import recorded_padded

_LITTLE = 1 << 18  # numbers of a query times columns: with fewer, on a CPU, attention took less time than a layout (Zen 5, one thread)

_WIDE = 256  # a head of more is nearly always heads that nothing was said of


class Asked(TypedDict, total=False):
    """The keywords of `varlen_attention` that do not change what it returns, for type checkers."""

    causal: bool | Literal["bottom_right", "top_left"]
    window: tuple[int | None, int | None] | None
    scale: float | None
    softcap: float | None
    dropout_p: float
    alibi_slopes: Tensor | None
    score_bias: ScoreBias | None
    sinks: Tensor | None
    backend: str | Backend
    deterministic: bool | None
    batch_invariant: bool
    group: Any


@overload
def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SeqLayout, layout_kv: SeqLayout | None = None, *,
    return_lse: Literal[False] = False, **asked: Unpack[Asked],
) -> Tensor: ...  # fmt: skip
@overload
def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SeqLayout, layout_kv: SeqLayout | None = None, *,
    return_lse: Literal[True], **asked: Unpack[Asked],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SeqLayout,
    layout_kv: SeqLayout | None = None,
    *,
    causal: bool | Literal["bottom_right", "top_left"] = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    alibi_slopes: Tensor | None = None,
    score_bias: ScoreBias | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | Backend = "auto",
    deterministic: bool | None = None,
    batch_invariant: bool = False,
    group: Any = None,
    **others: Any,
) -> Any:
    """Exact attention on packed tensors: every sequence attends to itself (or to its keys), and nothing is padded.

    Args:
        query: ``(T, N, H)``, packed by ``layout``.
        key: ``(Tk, K, H)``; N is a multiple of K (grouped heads need no flag).
        value: ``(Tk, K, Hv)``.
        layout: where the query's sequences begin and end.
        layout_kv: the same for keys and values; ``layout`` if left out. Both have equally many sequences.
        causal: True or ``"bottom_right"`` aligns the last query with the last key (flash-attn >= 2.1); ``"top_left"``
            the first with the first (torch's ``is_causal``). For equal lengths both are the same.
        window: ``(left, right)``: how many other tokens are visible on each side, inclusive; None is unlimited.
        scale: factor of the scores; ``H ** -0.5`` if left out.
        softcap: ``c`` of ``c * tanh(score / c)``.
        dropout_p: probability of dropping an attention weight. It is always applied: pass 0 in evaluation.
        alibi_slopes: ``(N,)``; subtracts ``slope * |i + Lk - Lq - j|``, as flash-attn does. No gradient.
        score_bias: added to the scaled (and capped) scores: a tensor ``(N, Sq, Sk)`` indexed by positions, or a callable
            ``(head, q_position, k_position) -> tensor`` on broadcastable index tensors. With gradient.
        sinks: ``(N,)``: a logit for each head that joins the softmax's denominator only. With gradient.
        return_lse: also return the natural log of the sum of the exponentials, sinks not included.
        backend: ``"auto"``, or a request: a name or a `Backend`. It runs, or `BackendRefused` says why not.
        deterministic: bitwise reproducible gradients; ``torch.are_deterministic_algorithms_enabled()`` if None.
        batch_invariant: a sequence's result is bitwise the same whatever its batch-mates.
        group: ranks that share the rows, a `DeviceMesh` of one dimension or a `ProcessGroup`. Each passes its own rows, in order and cut as
            `torch.tensor_split` cuts all of them, with the layouts of the whole batch, and gets its own rows of the result. Gradients
            of sinks and biases are parts, whose sum over the ranks is the gradient.

    Returns:
        ``(T, N, Hv)``, and with ``return_lse`` also ``(N, T)`` float32 (float64 for float64 inputs), detached; -inf for
        a query without a visible key, whose output and gradients are exactly 0.

    Raises:
        ArgumentError, LayoutError: shapes, devices or values do not fit together.
        DtypeError: mixed dtypes outside autocast, float64 inside it, or no floating dtype.
        BackendRefused: the requested backend cannot run this.

    The same in plain PyTorch, for one sequence ``q, k, v`` of ``(N, L, H)``::

        scores = q @ k.transpose(-1, -2) * scale
        out = scores.masked_fill(hidden, -inf).softmax(-1) @ v

    Examples:
        >>> layout = SeqLayout.from_lengths([5, 3])
        >>> q = torch.randn(8, 4, 16)  # (T, N, H)
        >>> out, lse = varlen_attention(q, q[:, :2], q[:, :2], layout, causal=True, window=(2, 0), return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([8, 4, 16]), torch.Size([4, 8]))
    """
    if others:
        raise unknown("varlen_attention", others, ASKED)
    if group is not None:
        from ..parallel.rows import split_layouts

        layout, layout_kv = split_layouts(layout, layout_kv, group)
    options = Options(causal, window, scale, softcap, dropout_p, return_lse, deterministic, batch_invariant)
    plain = alibi_slopes is None and score_bias is None and sinks is None
    extras = NO_EXTRAS if plain else Extras(alibi_slopes, sinks, score_bias)
    return attend(query, key, value, layout, layout_kv, options, extras, backend)


ASKED = (*Options._fields, "alibi_slopes", "sinks", "score_bias", "backend", "group")


def plan_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SeqLayout,
    layout_kv: SeqLayout | None = None,
    *,
    all_reasons: bool = True,
    **semantics: Any,
) -> Plan:
    """The `Plan` of ``varlen_attention(query, key, value, layout, layout_kv, **semantics)``, without running it."""
    if others := [name for name in semantics if name not in ASKED]:
        raise unknown("explain", others, ASKED)
    names = {"alibi_slopes", "sinks", "score_bias"}
    extras = Extras(**{k: semantics.pop(k) for k in names & set(semantics)})
    backend = semantics.pop("backend", "auto")
    if (group := semantics.pop("group", None)) is not None:
        from ..parallel.rows import split_layouts

        layout, layout_kv = split_layouts(layout, layout_kv, group)
    return AttentionCall(query, key, value, layout, layout_kv, extras, Options(**semantics), backend).plan(all_reasons)


# -------------------------------------------------------------------- padded tensors


@overload
def padded_attention(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, *,
    query_padding_mask: Tensor | Literal[False] | None = None, layout: SeqLayout | None = None, layout_kv: SeqLayout | None = None,
    return_lse: Literal[False] = False, **semantics: Unpack[Asked],
) -> Tensor: ...  # fmt: skip
@overload
def padded_attention(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, *,
    query_padding_mask: Tensor | Literal[False] | None = None, layout: SeqLayout | None = None, layout_kv: SeqLayout | None = None,
    return_lse: Literal[True], **semantics: Unpack[Asked],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    query_padding_mask: Tensor | Literal[False] | None = None,
    layout: SeqLayout | None = None,
    layout_kv: SeqLayout | None = None,
    **semantics: Any,
) -> Any:
    """Pack, attend, unpack: `varlen_attention` for padded tensors.

    Args:
        query: ``(B, Sq, N, H)``.
        key, value: ``(B, Sk, K, H)`` and ``(B, Sk, K, Hv)``.
        key_padding_mask: ``(B, Sk)``, True is padding. Alone it means self-attention and holds for queries too (then Sq == Sk).
        query_padding_mask: ``(B, Sq)``, True is padding, or False for "all queries are real": makes it cross-attention.
        layout, layout_kv: in place of the masks.
        semantics: as `varlen_attention`.

    Returns:
        ``(B, Sq, N, Hv)``, exactly 0 at padding; with ``return_lse`` also ``(B, N, Sq)``, -inf at padding.

    Raises:
        LayoutError: a mask or layout does not fit its tensor (nothing is sliced to fit).
        ArgumentError: masks and a layout are both given; and all that `varlen_attention` raises.

    In plain PyTorch, on ``(B, N, S, H)``::

        F.scaled_dot_product_attention(q, k, v, attn_mask=~key_padding_mask[:, None, None]) * ~query_padding_mask[:, None, :, None]

    Examples:
        >>> q = torch.randn(2, 5, 4, 16)  # (B, S, N, H)
        >>> mask = torch.arange(5) >= torch.tensor([5, 3])[:, None]  # True is padding
        >>> out = padded_attention(q, q, q, mask, causal=True)
        >>> out.shape, bool(out[mask].any())
        (torch.Size([2, 5, 4, 16]), False)
    """
    trace_quietly(query)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise LayoutError(f"`{name}` must have shape (B, S, heads, head_dim), but has shape {tuple(x.shape)}.")
    if value.shape[:3] != key.shape[:3]:
        raise LayoutError(f"`value` must begin with key's (B, S, K) = {tuple(key.shape[:3])}, but has shape {tuple(value.shape)}.")
    alone = query_padding_mask is None and layout is None and layout_kv is None and not semantics
    if key_padding_mask is not None and alone and _is_little(query, key, value, key_padding_mask):
        return _little_attention(query, key, value, key_padding_mask)
    layout_q, layout_k = _layouts(query, key, key_padding_mask, query_padding_mask, layout, layout_kv)
    query, key, value = pack_rows(layout_q, query, "query"), pack_rows(layout_k, key, "key"), pack_rows(layout_k, value, "value")
    try:
        result = varlen_attention(query, key, value, layout_q, layout_k, **semantics)
    except UnknownArgument:
        raise unknown("padded_attention", semantics.keys() - ASKED, ASKED) from None
    if not semantics.get("return_lse"):
        return unpack_rows(layout_q, result)
    out, lse = result
    return unpack_rows(layout_q, out), layout_q.unpack(lse.transpose(0, 1), float("-inf")).transpose(1, 2)


def _is_little(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> bool:
    """Whether a layout takes longer than attention to the padding. A row that begins with padding is left to the layout, which
    may warn."""
    if not is_plain(query) or any(map(operator.call, watchers)) or not PLAIN.issuperset(map(type, (query, key, value, mask))):
        return False
    alike = query.shape == key.shape == value.shape and query.is_cpu and key.is_cpu and value.is_cpu and mask.is_cpu
    alike = alike and query.dtype == key.dtype == value.dtype == torch.float32 and mask.dtype == torch.bool
    alike = alike and F.scaled_dot_product_attention is SDPA
    little = alike and query.shape[:2] == mask.shape and 0 < query.numel() * query.shape[1] <= _LITTLE
    return little and requested_backend("auto") == "auto" and not autocasts("cpu") and not bool(mask.select(1, 0).any())


def _little_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Self-attention of ``(B, S, N, H)``, to the padding too, which is 0 and hidden."""
    at = mask[:, :, None, None]
    q, k, v = (x.masked_fill(at, 0).contiguous().transpose(1, 2) for x in (query, key, value))
    bias = query.new_zeros(mask.shape).masked_fill_(mask, float("-inf")).view(mask.shape[0], 1, 1, -1)
    with recorded_padded(None, query, key, value, FLASH_CPU, "so little that a layout takes longer") if state.records else nullcontext():
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)[0]
    return out.transpose(1, 2).masked_fill(at, 0)


def _layouts(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | Literal[False] | None,
    layout: SeqLayout | None,
    layout_kv: SeqLayout | None,
) -> tuple[SeqLayout, SeqLayout]:
    """Both layouts from masks or layouts, never from both, never sliced."""
    if layout is not None or layout_kv is not None:
        if key_padding_mask is not None or query_padding_mask is not None:
            raise ArgumentError("pass masks or `layout`/`layout_kv`, not both: nothing says which one counts.")
        check_layouts(layout, layout_kv)
        layout, layout_kv = static_layouts(query, layout, key, layout_kv)
        layout = full_layout(query) if layout is None else layout
        return layout, layout if layout_kv is None else layout_kv
    layout_k = _layout_for(key, key_padding_mask, "key_padding_mask", "key")
    if query_padding_mask is False:
        return full_layout(query), layout_k
    if query_padding_mask is not None:
        return _layout_for(query, query_padding_mask, "query_padding_mask", "query"), layout_k
    if query.shape[:2] != key.shape[:2]:
        raise LayoutError(
            f"`key_padding_mask` alone means self-attention, where query and key have one (B, S), but they have "
            f"{tuple(query.shape[:2])} and {tuple(key.shape[:2])}: for cross-attention "
            "pass query_padding_mask=<mask>, or False if all are real."
        )
    return layout_k, layout_k


def _layout_for(x: Tensor, mask: Tensor | None, name: str = "key_padding_mask", owner: str = "x") -> SeqLayout:
    """The layout of ``x (B, S, ...)`` by its mask; without one, nothing is padded."""
    check_mask(mask, x, name, owner)
    if static_graph() or (mask is not None and is_unreadable(mask)):
        return static_layout(x, mask)
    return full_layout(x) if mask is None else moved(SeqLayout.from_key_padding_mask(mask), x.device)


def varlen_mha(
    x: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    num_heads: int | None = None,
    in_proj_weight: Tensor | None = None,
    in_proj_bias: Tensor | None = None,
    out_proj_weight: Tensor | None = None,
    out_proj_bias: Tensor | None = None,
    layout: SeqLayout | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    dropout_p: float = 0.0,
    training: bool | None = None,
    backend: str | Backend = "auto",
    **others: Any,
) -> Tensor:
    """Multi-head self-attention of a padded batch, with its projections, computed on real tokens only.

    Args:
        x: ``(B, S, D)`` padded, ``(T, D)`` packed (with ``layout``), or ``(B, S, 3, N, H)``, stacked q, k, v.
        key_padding_mask: ``(B, S)``, **True is padding** (torch's convention); None for no padding.
        num_heads: N; D is a multiple of it. 1 if left out, with a warning where x is wide. Taken from the shape of stacked q, k, v.
        in_proj_weight, in_proj_bias: ``(3D, D)`` and ``(3D,)`` as in ``F.multi_head_attention_forward``; without a
            weight x itself is query, key and value.
        out_proj_weight, out_proj_bias: ``(D, D)`` and ``(D,)``; without a weight the output is not projected.
        layout: in place of the mask; build it once for several layers.
        causal, window: as `varlen_attention`, where ``causal=True`` is torch's ``is_causal``.
        dropout_p, training: dropout of attention weights, applied if ``training``. Dropout asked without saying whether
            this is training raises: the silent answers (dropout in evaluation, none in training) are both wrong.
        backend: as `varlen_attention`.

    Returns:
        The shape of ``x`` (``(B, S, N, H)`` for stacked q, k, v); exactly 0 at padding.

    Raises:
        ArgumentError, LayoutError, DtypeError, BackendRefused: as `varlen_attention`.

    In plain PyTorch: ``F.multi_head_attention_forward`` on ``x.transpose(0, 1)`` with ``need_weights=False``, times
    ``~key_padding_mask[..., None]``.

    Examples:
        >>> x = torch.randn(2, 5, 64)
        >>> mask = torch.arange(5) >= torch.tensor([5, 3])[:, None]  # True is padding
        >>> weights = dict(in_proj_weight=torch.randn(192, 64) / 8, out_proj_weight=torch.randn(64, 64) / 8)
        >>> varlen_mha(x, mask, num_heads=4, **weights).shape
        torch.Size([2, 5, 64])
    """
    trace_quietly(x)
    if others:
        raise unknown("varlen_mha", others, [*Options._fields[:2], "dropout_p", "num_heads", "training", "backend", "key_padding_mask"])
    check_dropout(dropout_p)
    if dropout_p > 0 and training is None:
        raise ArgumentError(f"`training` must be True or False where dropout_p > 0, but is None (dropout_p is {dropout_p}).")
    options: dict[str, Any] = dict(causal=causal, window=window, dropout_p=dropout_p if training else 0.0, backend=backend)
    check_layouts(layout, None)
    if not isinstance(x, Tensor) or x.dim() not in (2, 3, 5):
        raise LayoutError(
            "`x` must be (B, S, D), packed (T, D) with `layout`, or stacked (B, S, 3, N, H), but has shape "
            f"{tuple(getattr(x, 'shape', ()))}."
        )
    projections = in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias
    stacked, width = x.dim() == 5, x.shape[-1]
    if stacked and x.shape[2] != 3:
        raise LayoutError(f"stacked `x` must have shape (B, S, 3, N, H), but has shape {tuple(x.shape)}.")
    if stacked and any(p is not None for p in projections):
        raise ArgumentError("stacked q, k, v are projected already: pass no in_proj or out_proj weights.")
    if x.dim() == 2 and layout is None:
        raise LayoutError(f"`x` of shape {tuple(x.shape)} is packed, so `layout` must be given: which rows belong to which sequence?")
    if layout is not None and key_padding_mask is not None:
        raise ArgumentError("pass `key_padding_mask` or `layout`, not both: nothing says which one counts.")
    heads = 1 if num_heads is None else num_heads
    if not stacked:
        if num_heads is None and width > _WIDE and not torch.compiler.is_compiling():
            warn(
                f"`num_heads` is left out, so that one head of {width} is computed: pass num_heads={width // 64} for heads of 64.",
                VarlenWarning,
            )
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
            raise ArgumentError(f"`num_heads` must be a positive integer, but is {heads!r}.")
        if width % heads:
            raise ArgumentError(f"`num_heads` must divide the width of x ({width}), but is {heads}.")
        check_projections(width, *projections)

    form: Form = "packed" if x.dim() == 2 else "batch first"
    if layout is None:
        layout = _layout_for(x, key_padding_mask)
    elif form == "packed":
        layout._check(x, (layout.num_rows,), "x")
    else:
        layout = static_layouts(x, layout, x, None)[0] or layout
    rows = pack_rows(layout, x, form=form, apart=True)
    if in_proj_weight is not None:
        rows = F.linear(rows, in_proj_weight, in_proj_bias).view(rows.shape[0], 3, heads, width // heads)
    if rows.dim() == 4:
        query, key, value = rows.unbind(1)
    else:
        query = key = value = rows.view(rows.shape[0], heads, width // heads)
    out: Tensor = varlen_attention(query, key, value, layout, **options)
    out = out if stacked else out.flatten(1)
    if out_proj_weight is not None:
        out = F.linear(out, out_proj_weight, out_proj_bias)
    return unpack_rows(layout, out, form)
