"""The calls: `varlen_attention` on packed tensors, `padded_attention` and `varlen_mha` on padded ones.

The seam of the package. Everything is checked and normalised here, once: shapes, dtypes (autocast included), the layout against the
tensors, the route, empty sequences for backends that mishandle them. Backends trust what they get.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._call_checks import autocasts, check_extras, check_holes, check_layouts, check_mask, check_projections, check_shapes, common_dtype
from ._gather import trace_quietly
from ._static import PaddedRows, note_static, refuse_order, static_attention, static_graph, static_layout, static_layouts
from .backends import BACKENDS
from .backends.base import Backend, Extras, ScoreBias, connected_zeros, grad_of_real_rows, state, wide_dtype, zero_unless
from .dispatch import Plan, choose, choose_while_tracing, requested_backend, route
from .errors import ArgumentError, LayoutError
from .layout import SeqLayout, is_tracing, layout_of_all
from .problem import Problem, Semantics, check_dropout
from .records import announced

__all__ = ["padded_attention", "plan_attention", "varlen_attention", "varlen_mha"]


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
        dropout_p: probability of dropping an attention weight. It is what it says: pass 0 when evaluating.
        alibi_slopes: ``(N,)``; subtracts ``slope * |i + Lk - Lq - j|``, as flash-attn does. No gradient.
        score_bias: added to the scaled (and capped) scores: a tensor ``(N, Sq, Sk)`` indexed by positions, or a callable
            ``(head, q_position, k_position) -> tensor`` on broadcastable index tensors. With gradient.
        sinks: ``(N,)``: a logit for each head that joins the softmax's denominator only. With gradient.
        return_lse: also return the natural log of the sum of the exponentials, sinks not included.
        backend: ``"auto"``, or an order: a name or a `Backend`. It runs, or `BackendRefused` says why not.
        deterministic: bitwise reproducible gradients; ``torch.are_deterministic_algorithms_enabled()`` if None.
        batch_invariant: a sequence's result is bitwise the same whatever its batch-mates.

    Returns:
        ``(T, N, Hv)``, and with ``return_lse`` also ``(N, T)`` float32 (float64 for float64 inputs), detached; -inf for
        a query without a visible key, whose output and gradients are exactly 0.

    Raises:
        ArgumentError, LayoutError: shapes, devices or values do not fit together.
        DtypeError: mixed dtypes outside autocast, float64 inside it, or no floating dtype.
        BackendRefused: the ordered backend can not run this.

    The same in plain PyTorch, for one sequence ``q, k, v`` of ``(N, L, H)``::

        scores = q @ k.transpose(-1, -2) * scale
        out = scores.masked_fill(hidden, -inf).softmax(-1) @ v
    """
    options = dict(
        causal=causal, window=window, scale=scale, softcap=softcap, dropout_p=dropout_p, return_lse=return_lse,
        deterministic=deterministic, batch_invariant=batch_invariant,
    )  # fmt: skip
    call = _Call(query, key, value, layout, layout_kv, Extras(alibi_slopes, sinks, score_bias), options, backend)
    return call.run(module=None)


def attend_for(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SeqLayout,
    layout_kv: SeqLayout,
    options: dict[str, Any],
    backend: str | Backend,
    extras: Extras | None = None,
    reason: str | None = None,
) -> Tensor:
    """`varlen_attention` on behalf of a module, whose name stands in the record, with the reason for what it could not do."""
    out: Tensor = _Call(query, key, value, layout, layout_kv, extras or Extras(), options, backend).run(module, reason)
    return out


def plan_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SeqLayout, layout_kv: SeqLayout | None = None, **semantics: Any
) -> Plan:
    """The `Plan` of ``varlen_attention(query, key, value, layout, layout_kv, **semantics)``, without running it."""
    names = {"alibi_slopes", "sinks", "score_bias"}
    extras = Extras(**{k: semantics.pop(k) for k in names & set(semantics)})
    backend = semantics.pop("backend", "auto")
    return _Call(query, key, value, layout, layout_kv, extras, semantics, backend).plan(thorough=True)


class _Call:
    """One call, checked and normalised: tensors of one dtype, `Semantics`, both layouts."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: SeqLayout,
        layout_kv: SeqLayout | None,
        extras: Extras,
        options: dict[str, Any],
        backend: str | Backend,
    ):
        check_layouts(layout, layout_kv)
        if layout is None:
            raise ArgumentError("`layout` must be a SeqLayout, but is None: build one with SeqLayout.from_key_padding_mask(mask).")
        self.layout_q, self.layout_kv = layout, layout if layout_kv is None else layout_kv
        self.query, self.key, self.value = common_dtype(query, key, value)
        check_shapes(self.query, self.key, self.value, self.layout_q, self.layout_kv)
        self.extras = check_extras(self.query, self.layout_q, self.layout_kv, extras)
        flags: dict[str, Any] = {
            "alibi": extras.alibi_slopes is not None,
            "sinks": extras.sinks is not None,
            "score_bias": extras.score_bias is not None,
        }
        semantics = Semantics.of(**options, **flags)
        if semantics.scale is None:
            semantics = replace(semantics, scale=float(int(query.shape[2]) or 1) ** -0.5)
        if semantics.causal and self.layout_kv is self.layout_q:
            semantics = replace(semantics, causal="bottom_right")  # equal lengths: both alignments are one
        self.semantics = semantics
        self.backend = requested_backend(backend)
        check_holes(self.layout_q, self.layout_kv, semantics)

    def _needs_grad(self) -> bool:
        tensors = [self.query, self.key, self.value, self.extras.sinks, self.extras.score_bias]
        return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)

    def plan(self, thorough: bool = False) -> Plan:
        requested = self.backend if isinstance(self.backend, str) else self.backend.name
        problem = Problem.of(
            self.query, self.key, self.value, self.layout_q, self.layout_kv, self.semantics,
            needs_grad=self._needs_grad(), requested=requested,
        )  # fmt: skip
        candidates = BACKENDS
        if isinstance(self.backend, Backend):
            candidates = (self.backend, *(b for b in BACKENDS if b.name != requested))
        plan = choose(problem, candidates, thorough=thorough)
        way = route(self.layout_q, problem)
        return replace(plan, route=way.name, route_reason=way.reason) if thorough or state.records else plan

    def run(self, module: torch.nn.Module | None, reason: str | None = None) -> Any:
        if isinstance(self.layout_q, PaddedRows) and isinstance(self.layout_kv, PaddedRows):
            return self._run_static(self.layout_q, self.layout_kv, module)
        if torch.compiler.is_compiling():
            out, lse = self._launch(self._backend_while_tracing())
            return (out, lse) if self.semantics.return_lse else out
        if self.query.is_meta:  # shapes only; there is nothing to choose
            shape = (*self.query.shape[:2], self.value.shape[2])
            out = connected_zeros(shape, self.query, self.key, self.value)
            return (out, out.new_empty(out.shape[1::-1], dtype=wide_dtype(out.dtype))) if self.semantics.return_lse else out
        plan = self.plan()
        note = announced(plan, self.layout_q, module, reason) if state.records else nullcontext()
        with note, torch.profiler.record_function(f"varlen_attn::{plan.backend}"):
            out, lse = self._launch(plan.implementation)
        return (out, lse) if self.semantics.return_lse else out

    def _run_static(self, layout_q: PaddedRows, layout_kv: PaddedRows, module: torch.nn.Module | None) -> Any:
        """Padded rows in a graph that may not depend on data: no backend is chosen."""
        refuse_order(self.backend)
        slots = self.query.shape[0] if isinstance(self.query.shape[0], int) else None
        note_static(*self._fields(), slots, None if torch.compiler.is_dynamo_compiling() else module)
        device_type = self.query.device.type
        with torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext():
            out, lse = static_attention(self.query, self.key, self.value, layout_q, layout_kv, self.semantics, self.extras)
        return (out, lse) if self.semantics.return_lse else out

    def _backend_while_tracing(self) -> Backend:
        """The choice as a constant of the graph; guarded by what it depends on, the override included."""
        if isinstance(self.backend, Backend):
            return self.backend
        name = choose_while_tracing(*self._fields())
        for candidate in BACKENDS:
            if candidate.name == name:
                return candidate
        raise AssertionError(name)

    def _fields(self) -> tuple[tuple[tuple[str, Any], ...], tuple[tuple[str, Any], ...]]:
        """Of the `Problem` and of its `Semantics`, as plain values."""
        device, semantics = self.query.device, self.semantics
        problem = (
            ("device_type", device.type),
            ("dtype", self.query.dtype),
            ("num_heads", int(self.query.shape[1])),
            ("num_kv_heads", int(self.key.shape[1])),
            ("head_dim", int(self.query.shape[2])),
            ("value_head_dim", int(self.value.shape[2])),
            ("self_attention", self.layout_q is self.layout_kv),
            ("needs_grad", self._needs_grad()),
            ("tracing", True),
            ("host_lengths", False),
            ("requested", self.backend if isinstance(self.backend, str) else self.backend.name),
        )
        fields = (
            ("causal", semantics.causal), ("window", semantics.window), ("scale", semantics.scale), ("softcap", semantics.softcap),
            ("dropout_p", semantics.dropout_p), ("alibi", semantics.alibi), ("score_bias", semantics.score_bias),
            ("sinks", semantics.sinks), ("return_lse", semantics.return_lse), ("deterministic", semantics.deterministic),
            ("batch_invariant", semantics.batch_invariant),
        )  # fmt: skip
        return problem, fields

    def _launch(self, backend: Backend) -> tuple[Tensor, Tensor | None]:
        # The dtype is settled: eager maths inside a backend must not be cast once more.
        device_type = self.query.device.type
        off = torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext()
        with off:
            if not backend.capabilities.slack_rows and (self.layout_q.has_slack or self.layout_kv.has_slack):
                return self._launch_without_slack(backend)
            if not backend.capabilities.empty_sequences and _has_empty(self.layout_q, self.layout_kv):
                return self._launch_without_empties(backend)
            return backend.run(self.query, self.key, self.value, self.layout_q, self.layout_kv, self.semantics, self.extras)

    def _launch_without_slack(self, backend: Backend) -> tuple[Tensor, Tensor | None]:
        """For kernels that leave rows beyond ``cu_seqlens[-1]`` unwritten: zero them in results and gradients."""
        valid_q, valid_k = (x.valid_rows()[:, None, None] for x in (self.layout_q, self.layout_kv))
        only_real = zero_unless if backend.capabilities.reads_slack else grad_of_real_rows
        query = only_real(self.query, valid_q)
        key, value = (only_real(x, valid_k) for x in (self.key, self.value))
        out, lse = backend.run(query, key, value, self.layout_q, self.layout_kv, self.semantics, self.extras)
        if lse is not None:
            lse = torch.where(valid_q[:, 0, 0], lse, float("-inf"))
        return zero_unless(out, valid_q), lse

    def _launch_without_empties(self, backend: Backend) -> tuple[Tensor, Tensor | None]:
        """For kernels that mishandle empty sequences: leave them out; their queries, if any, get 0 and -inf."""
        lengths_q, lengths_k = self.layout_q.lengths, self.layout_kv.lengths
        assert lengths_q is not None  # refused otherwise
        assert lengths_k is not None
        kept = [i for i, (a, b) in enumerate(zip(lengths_q, lengths_k, strict=True)) if a and b]
        rows_q, rows_k = (_rows_of(x, kept) for x in (self.layout_q, self.layout_kv))
        if not kept:
            shape = (*self.query.shape[:2], self.value.shape[2])
            out = connected_zeros(shape, self.query, self.key, self.value)
            lse_dtype = wide_dtype(out.dtype)
            lse = out.new_full((out.shape[1], out.shape[0]), float("-inf"), dtype=lse_dtype)
            return out, lse if self.semantics.return_lse else None
        layout_q = SeqLayout.from_lengths([lengths_q[i] for i in kept], device=self.layout_q.device)
        layout_kv = layout_q
        if self.layout_kv is not self.layout_q:
            layout_kv = SeqLayout.from_lengths([lengths_k[i] for i in kept], device=self.layout_kv.device)
        query = rows_q.pack(self.query[None])
        key, value = rows_k.pack(self.key[None]), rows_k.pack(self.value[None])
        out, some_lse = backend.run(query, key, value, layout_q, layout_kv, self.semantics, self.extras)
        if some_lse is not None:
            some_lse = rows_q.unpack(some_lse.transpose(0, 1).contiguous(), float("-inf"))[0].transpose(0, 1)
        return rows_q.unpack(out)[0], some_lse


def _has_empty(layout_q: SeqLayout, layout_kv: SeqLayout) -> bool:
    """Whether a sequence has no queries or no keys, or there is no sequence at all."""
    return layout_q.lengths == () or 0 in (layout_q.lengths or ()) or 0 in (layout_kv.lengths or ())


def _rows_of(layout: SeqLayout, kept: list[int]) -> SeqLayout:
    """The packed rows of some sequences, as tokens of one row of T columns."""
    wanted = torch.zeros(layout.num_seqs, dtype=torch.bool, device="cpu")
    wanted[kept] = True
    lengths = torch.tensor(layout.lengths, device="cpu", dtype=torch.int64)
    real = wanted.repeat_interleave(lengths, output_size=layout.num_rows)
    return SeqLayout.from_attention_mask(real[None], validate=False).to(layout.device)


# -------------------------------------------------------------------- padded tensors


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
    """
    trace_quietly()
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise LayoutError(f"`{name}` must have shape (B, S, heads, head_dim), but has shape {tuple(x.shape)}.")
    if value.shape[:3] != key.shape[:3]:
        raise LayoutError(f"`value` must begin with key's (B, S, K) = {tuple(key.shape[:3])}, but has shape {tuple(value.shape)}.")
    layout_q, layout_k = _layouts(query, key, key_padding_mask, query_padding_mask, layout, layout_kv)
    if layout_q is layout_k:
        query, key, value = pack_rows_together(layout_q, query=query, key=key, value=value)
    else:
        query = pack_rows(layout_q, query, "query")
        key, value = pack_rows_together(layout_k, key=key, value=value)
    result = varlen_attention(query, key, value, layout_q, layout_k, **semantics)
    if not semantics.get("return_lse"):
        return unpack_rows(layout_q, result)
    out, lse = result
    return unpack_rows(layout_q, out), layout_q.unpack(lse.transpose(0, 1), float("-inf")).transpose(1, 2)


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


def full_layout(x: Tensor) -> SeqLayout:
    if static_graph():
        return static_layout(x, None)
    if is_tracing(x):
        return layout_of_all(x.shape[0], x.shape[1], x.device)
    return SeqLayout.from_lengths([x.shape[1]] * x.shape[0], x.shape[1], device=x.device)


def _layout_for(x: Tensor, mask: Tensor | None, name: str = "key_padding_mask", owner: str = "x") -> SeqLayout:
    """The layout of ``x (B, S, ...)`` by its mask; without one, nothing is padded."""
    check_mask(mask, x, name, owner)
    if static_graph():
        return static_layout(x, mask)
    return full_layout(x) if mask is None else to_device_of(SeqLayout.from_key_padding_mask(mask), x)


def to_device_of(layout: SeqLayout, x: Tensor) -> SeqLayout:
    """``layout`` where ``x`` is. To a GPU only the index tensors move, without waiting; the lengths stay on the host."""
    if layout.device == x.device:
        return layout
    if layout.device.type == "cpu" and x.device.type == "cuda":
        return layout.pin_memory().to(x.device, non_blocking=True)
    return layout.to(x.device)


def pack_rows(layout: SeqLayout, x: Tensor, name: str = "x") -> Tensor:
    """`SeqLayout.pack`, without the copy where nothing is padded (the dense route)."""
    layout._check(x, (layout.batch_size, layout.padded_len), name)
    if not is_tracing(x) and layout.is_dense:
        return x.reshape(layout.num_rows, *x.shape[2:])
    return layout.pack(x)


def pack_rows_together(layout: SeqLayout, **tensors: Tensor) -> tuple[Tensor, ...]:
    """`pack_rows` of tensors by name, in one launch where there is a kernel for that (`_fused_rows`)."""
    for name, x in tensors.items():
        layout._check(x, (layout.batch_size, layout.padded_len), name)
    xs = tensors.values()
    fused = layout._pack_fused(*xs) if not is_tracing(*xs) and not layout.is_dense else None
    return tuple(pack_rows(layout, x) for x in xs) if fused is None else fused


def unpack_rows(layout: SeqLayout, x: Tensor) -> Tensor:
    """`SeqLayout.unpack`, without the copy where nothing is padded (the dense route)."""
    if not is_tracing(x) and layout.is_dense:
        return x.reshape(layout.batch_size, layout.padded_len, *x.shape[1:])
    return layout.unpack(x)


def without_slack(layout: SeqLayout, rows: Tensor) -> Tensor:
    """Packed rows that hold nothing are 0, also where the caller's hold NaN, which gradients of weights would see."""
    return torch.where(layout.valid_rows().view(-1, *[1] * (rows.dim() - 1)), rows, 0) if layout.has_slack else rows


def varlen_mha(
    x: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    num_heads: int = 1,
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
) -> Tensor:
    """Multi-head self-attention of a padded batch, computed on its real tokens only; projections too.

    Args:
        x: ``(B, S, D)`` padded, ``(T, D)`` packed (with ``layout``), or ``(B, S, 3, N, H)``, stacked q, k, v.
        key_padding_mask: ``(B, S)``, **True is padding** (torch's convention); None for no padding.
        num_heads: N; D is a multiple of it. Taken from the shape of stacked q, k, v.
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
    """
    trace_quietly()
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
    if x.dim() == 5:
        return _stacked(x, key_padding_mask, layout, (in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias), options)
    if x.dim() == 2 and layout is None:
        raise LayoutError(f"`x` of shape {tuple(x.shape)} is packed, so `layout` must be given: which rows belong to which sequence?")
    if layout is not None and key_padding_mask is not None:
        raise ArgumentError("pass `key_padding_mask` or `layout`, not both: nothing says which one counts.")
    width = x.shape[-1]
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ArgumentError(f"`num_heads` must be a positive integer, but is {num_heads!r}.")
    if width % num_heads:
        raise ArgumentError(f"`num_heads` must divide the width of x ({width}), but is {num_heads}.")
    check_projections(width, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias)

    if x.dim() == 3:
        layout = _layout_for(x, key_padding_mask) if layout is None else static_layouts(x, layout, x, None)[0]
        assert layout is not None
        rows = pack_rows(layout, x)
    else:
        assert layout is not None
        layout._check(x, (layout.num_rows,), "x")
        rows = without_slack(layout, x)
    projected = rows if in_proj_weight is None else F.linear(rows, in_proj_weight, in_proj_bias)
    parts = (projected,) * 3 if in_proj_weight is None else projected.chunk(3, dim=-1)
    query, key, value = (p.unflatten(-1, (num_heads, -1)) for p in parts)
    out = varlen_attention(query, key, value, layout, **options).flatten(1)
    if out_proj_weight is not None:
        out = F.linear(out, out_proj_weight, out_proj_bias)
    return out if x.dim() == 2 else unpack_rows(layout, out)


def _stacked(
    x: Tensor, mask: Tensor | None, layout: SeqLayout | None, projections: tuple[Tensor | None, ...], options: dict[str, Any]
) -> Tensor:
    """``(B, S, 3, N, H) -> (B, S, N, H)``: one pack for all three."""
    if x.shape[2] != 3:
        raise LayoutError(f"stacked `x` must have shape (B, S, 3, N, H), but has shape {tuple(x.shape)}.")
    if any(p is not None for p in projections):
        raise ArgumentError("stacked q, k, v are projected already: pass no in_proj or out_proj weights.")
    if layout is not None and mask is not None:
        raise ArgumentError("pass `key_padding_mask` or `layout`, not both: nothing says which one counts.")
    layout = _layout_for(x, mask) if layout is None else static_layouts(x, layout, x, None)[0]
    assert layout is not None
    query, key, value = pack_rows(layout, x).unbind(1)
    out: Tensor = varlen_attention(query, key, value, layout, **options)
    return unpack_rows(layout, out)
