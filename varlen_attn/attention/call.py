"""`attend`: one call, checked and normalised, then launched. What the public functions have in common.

What a call is checked for, and which backend runs it, follows from metadata. So both are decided once for all calls of one signature, and
a call whose signature is known goes straight to its backend.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from operator import index
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

from .. import _state
from .._state import state
from .._torch import SDPA, in_context_parallel, is_plain, is_transformed, profiler_enabled
from ..errors import ArgumentError, NoBackend
from ..kernels import BACKENDS
from ..kernels.base import Backend, grad_without_slack, nothing, result_without_slack
from ..kernels.problem import Problem, Semantics
from ..kernels.unseen import without_unseen
from ..kernels.values import NO_EXTRAS, Call, Extras, Result
from ..layout.padded import PaddedRows
from ..layout.seq_layout import SeqLayout
from . import dispatch
from .checks import autocasts, check_extras, check_holes, check_layouts, check_shapes, common_dtype
from .dispatch import Plan, choose, choose_while_tracing, requested_backend, route
from .export import note_static, refuse_order, static_attention
from .records import recorded


class Options(NamedTuple):
    """What `varlen_attention` is asked, apart from tensors and the backend."""

    causal: Any = False
    window: Any = None
    scale: Any = None
    softcap: Any = None
    dropout_p: Any = 0.0
    return_lse: bool = False
    deterministic: bool | None = None
    batch_invariant: bool = False


_SIDES, _NUMBERS = {int, type(None)}, {int, float, type(None)}


class Verdict(NamedTuple):
    """What was decided for all calls of one signature.

    Attributes:
        cast: the dtype that autocast casts to; None outside of it.
    """

    backend: Backend
    semantics: Semantics
    cast: torch.dtype | None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SeqLayout,
    layout_kv: SeqLayout | None,
    options: Options,
    extras: Extras = NO_EXTRAS,
    backend: str | Backend = "auto",
    module: torch.nn.Module | None = None,
    reason: str | None = None,
) -> Any:
    """`varlen_attention`. The record gets the name of ``module``, and the ``reason`` for what it could not do."""
    if F.scaled_dot_product_attention is not SDPA and in_context_parallel():
        raise NoBackend(
            "no backend sees the columns of other ranks, as attention inside torch's `context_parallel` has to: disable(model), or use "
            "torch's modules."
        )
    if module is not None and query.dtype is key.dtype is value.dtype is torch.float64 and autocasts(query.device.type):
        with torch.autocast(query.device.type, enabled=False):  # which leaves float64 as it is in torch's modules
            return attend(query, key, value, layout, layout_kv, options, extras, backend, module, reason)
    signature = None
    if extras is NO_EXTRAS and not state.records:
        signature = _signature(query, key, value, layout, layout_kv, options, backend)
    if signature is not None:
        verdict = dispatch._plans.get(signature)
        if verdict is not None:
            call = Call(layout, layout if layout_kv is None else layout_kv, verdict.semantics)
            if verdict.cast is None and not profiler_enabled():
                out, lse = launch(verdict.backend, query, key, value, call)
            else:
                if verdict.cast is not None:
                    query, key, value = query.to(verdict.cast), key.to(verdict.cast), value.to(verdict.cast)
                with _surroundings(verdict.backend.name, query.device.type):
                    out, lse = launch(verdict.backend, query, key, value, call)
            return (out, lse) if options.return_lse else out
    unknown = AttentionCall(query, key, value, layout, layout_kv, extras, options, backend)
    result = unknown.run(module, reason)
    if signature is not None:
        dispatch.remember(signature, unknown.verdict)
    return result


def _signature(
    query: Tensor, key: Tensor, value: Tensor, layout: Any, layout_kv: Any, options: Options, backend: str | Backend
) -> tuple[Any, ...] | None:
    """All that checks and choices depend on, as plain values; None where they cannot be made once for many calls."""
    other, window = layout if layout_kv is None else layout_kv, options.window
    if type(layout) is not SeqLayout or type(other) is not SeqLayout or not is_plain(query):
        return None
    if type(options.causal) not in (bool, str) or not {type(options.scale), type(options.softcap), type(options.dropout_p)} <= _NUMBERS:
        return None  # 1 is equal to True, and not allowed in its place; nor are numbers of other packages
    if window is not None and not (type(window) is tuple and {*map(type, window)} <= _SIDES):
        return None
    try:
        shape_q, shape_k, shape_v, device = query.shape, key.shape, value.shape, query.device
        rows, rows_kv, kind = layout.token_indices.shape[0], other.token_indices.shape[0], device.type
        if (len(shape_q), len(shape_k), len(shape_v)) != (3, 3, 3) or (shape_q[0], shape_k[0], shape_v[0]) != (rows, rows_kv, rows_kv):
            return None
        if not (device == key.device == value.device == layout.cu_seqlens.device == other.cu_seqlens.device):
            return None
        signature = (
            shape_q[1:], shape_k[1:], shape_v[1:], query.dtype, key.dtype, value.dtype, device, options, backend,
            _state.order if state.orders else None, current_flash_attention_impl() if kind == "cuda" else None,
            torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
            torch.get_deterministic_debug_mode(),
            other is layout, layout.cu_seqlens.shape == other.cu_seqlens.shape, layout.lengths is None, other.lengths is None,
            (layout.has_holes and layout.holes == "refuse") or (other.has_holes and other.holes == "refuse"),
        )  # fmt: skip
        hash(signature)
    except (AttributeError, RuntimeError, TypeError):
        return None  # no tensors, or values that cannot be hashed: the checks say what is wrong
    return signature


def _surroundings(backend: str, device_type: str) -> AbstractContextManager[object]:
    """A range for profilers, and no autocast: the dtype is settled, and eager maths inside a backend must not be cast once more."""
    stack = ExitStack()
    stack.enter_context(torch.profiler.record_function(f"varlen_attn::{backend}"))
    if autocasts(device_type):
        stack.enter_context(torch.autocast(device_type, enabled=False))
    return stack


class AttentionCall:
    """One call, checked and normalised: tensors of one dtype, `Semantics`, both layouts."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: SeqLayout,
        layout_kv: SeqLayout | None,
        extras: Extras,
        options: Options,
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
        semantics = Semantics.of(**options._asdict(), **flags)
        if semantics.scale is None:
            semantics = replace(semantics, scale=float(index(query.shape[2]) or 1) ** -0.5)
        if semantics.causal and self.layout_kv is self.layout_q:
            semantics = replace(semantics, causal="bottom_right")  # equal lengths: both alignments are one
        self.semantics = semantics
        self.backend = requested_backend(backend)
        check_holes(self.layout_q, self.layout_kv, semantics)

    @property
    def verdict(self) -> Verdict:
        cast = self.query.dtype if autocasts(self.query.device.type) else None
        return Verdict(self.plan().implementation, self.semantics, cast)

    def _needs_grad(self) -> bool:
        tensors = [self.query, self.key, self.value, self.extras.sinks, self.extras.score_bias]
        return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)

    def plan(self, all_reasons: bool = False) -> Plan:
        requested = self.backend if isinstance(self.backend, str) else self.backend.name
        problem = Problem.of(
            self.query, self.key, self.value, self.layout_q, self.layout_kv, self.semantics,
            needs_grad=self._needs_grad(), requested=requested,
        )  # fmt: skip
        candidates = BACKENDS
        if isinstance(self.backend, Backend):
            candidates = (self.backend, *(b for b in BACKENDS if b.name != requested))
        plan = choose(problem, candidates, all_reasons=all_reasons)
        way = route(self.layout_q, problem)
        return replace(plan, route=way.name, route_reason=way.reason) if all_reasons or state.records else plan

    def run(self, module: torch.nn.Module | None, reason: str | None = None) -> Any:
        if isinstance(self.layout_q, PaddedRows) or isinstance(self.layout_kv, PaddedRows):
            return self._run_static(self.layout_q, self.layout_kv, module)
        call = Call(self.layout_q, self.layout_kv, self.semantics, self.extras)
        if self.layout_q.ranks is not None or self.layout_kv.ranks is not None:
            from ..parallel.attention import attend_split

            out, lse = attend_split(self.query, self.key, self.value, call, partial(partial, self._attend_other, module))
            return (out, lse) if self.semantics.return_lse else out
        qkv, device_type = (self.query, self.key, self.value), self.query.device.type
        if torch.compiler.is_compiling():
            with torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext():
                out, lse = launch(self._backend_while_tracing(), *qkv, call)
        elif self.query.is_meta:  # shapes only; there is nothing to choose
            out, lse = nothing(*qkv, call)
        else:
            plan = self.plan()
            note = recorded(plan, self.layout_q, module, reason) if state.records else nullcontext()
            with note, _surroundings(plan.backend, device_type):
                out, lse = launch(plan.implementation, *qkv, call)
        return (out, lse) if self.semantics.return_lse else out

    def _attend_other(self, module: torch.nn.Module | None, reason: str, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
        options = Options(*(getattr(call.semantics, name) for name in Options._fields))
        extras = call.extras if any(x is not None for x in vars(call.extras).values()) else NO_EXTRAS
        result = attend(query, key, value, *call.layouts, options, extras, self.backend, module, reason)
        return result if options.return_lse else (result, None)

    def _run_static(self, layout_q: SeqLayout, layout_kv: SeqLayout, module: torch.nn.Module | None) -> Any:
        """Padded rows in a graph that may not depend on data: no backend is chosen."""
        refuse_order(
            self.backend,
            "this call is exported, and only padded attention has static control flow",
            "export with backend='auto', or write the packing out (layout.pack, varlen_attention, layout.unpack) and use torch.export",
        )
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
        """Of the `Problem` and of its `Semantics`, as plain values: `index` makes numbers of sizes that are symbols in a graph."""
        device, semantics = self.query.device, self.semantics
        problem = (
            ("device_type", device.type),
            ("device_index", device.index),
            ("flash_impl", current_flash_attention_impl()),
            ("dtype", self.query.dtype),
            ("num_heads", index(self.query.shape[1])),
            ("num_kv_heads", index(self.key.shape[1])),
            ("head_dim", index(self.query.shape[2])),
            ("value_head_dim", index(self.value.shape[2])),
            ("self_attention", self.layout_q is self.layout_kv),
            ("needs_grad", self._needs_grad()),
            ("tracing", True),
            ("transformed", is_transformed()),
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


def launch(backend: Backend, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
    """``backend.run``, with what the backend does not do itself."""
    can = backend.capabilities
    if not backend.checks_offsets:
        call.layout_q._check_tensors(again=True, traced=True)
        if call.layout_kv is not call.layout_q:
            call.layout_kv._check_tensors(again=True, traced=True)
    if not can.slack_rows and (call.layout_q.has_slack or call.layout_kv.has_slack):
        return _launch_without_slack(backend, query, key, value, call)
    if not can.empty_sequences and _has_empty(*call.layouts):
        return without_unseen(query, key, value, call, backend.run)
    return backend.run(query, key, value, call)


def _launch_without_slack(backend: Backend, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
    """For kernels that leave rows beyond ``cu_seqlens[-1]`` unwritten: zero them in results and gradients. `masked_fill`, because
    `torch.where` with a number launches a kernel that writes the number."""
    slack_q = _slack(call.layout_q)
    slack_k = slack_q if call.layout_kv is call.layout_q else _slack(call.layout_kv)
    reads = backend.capabilities.reads_slack
    without: Callable[[Tensor, Tensor], Tensor] = _zeroed if reads else grad_without_slack
    out, lse = backend.run(without(query, slack_q), without(key, slack_k), without(value, slack_k), call)
    out = _zeroed(out, slack_q) if reads else result_without_slack(out, slack_q)
    return out, None if lse is None else lse.masked_fill(slack_q[:, 0, 0], float("-inf"))


def _zeroed(x: Tensor, slack: Tensor) -> Tensor:
    return x.masked_fill(slack, 0)


def _slack(layout: SeqLayout) -> Tensor:
    """``(T, 1, 1)`` bool, True for slack rows."""
    return (torch.arange(layout.num_rows, device=layout.device) >= layout.cu_seqlens[-1])[:, None, None]


def _has_empty(layout_q: SeqLayout, layout_kv: SeqLayout) -> bool:
    """Whether a sequence has no queries or no keys, or there is no sequence at all."""
    return layout_q.lengths == () or 0 in (layout_q.lengths or ()) or 0 in (layout_kv.lengths or ())
