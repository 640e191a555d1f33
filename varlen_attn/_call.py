"""`AttentionCall`: one call, checked and normalised, then launched. What the public functions have in common."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._call_checks import autocasts, check_extras, check_holes, check_layouts, check_shapes, common_dtype
from ._padded_rows import PaddedRows
from ._static import note_static, refuse_order, static_attention
from .backends import BACKENDS
from .backends._kept import kept
from .backends.base import Backend, Call, Extras, connected_zeros, grad_without_slack, result_without_slack, state, wide_dtype
from .dispatch import Plan, choose, choose_while_tracing, requested_backend, route
from .errors import ArgumentError
from .layout import SeqLayout, moved
from .problem import Problem, Semantics
from .records import announced

__all__ = ["AttentionCall"]


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
            ("device_index", device.index),
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
            return backend.run(*self._qkv, self._call())

    def _launch_without_slack(self, backend: Backend) -> tuple[Tensor, Tensor | None]:
        """For kernels that leave rows beyond ``cu_seqlens[-1]`` unwritten: zero them in results and gradients. `masked_fill`, because
        `torch.where` with a number launches a kernel that writes the number."""
        slack_q = _slack(self.layout_q)
        slack_k = slack_q if self.layout_kv is self.layout_q else _slack(self.layout_kv)
        if backend.capabilities.reads_slack:
            query, key, value = (x.masked_fill(slack, 0) for x, slack in zip(self._qkv, (slack_q, slack_k, slack_k), strict=True))
        else:
            query, key, value = (grad_without_slack(x, slack) for x, slack in zip(self._qkv, (slack_q, slack_k, slack_k), strict=True))
        out, lse = backend.run(query, key, value, self._call())
        out = out.masked_fill(slack_q, 0) if backend.capabilities.reads_slack else result_without_slack(out, slack_q)
        return out, None if lse is None else lse.masked_fill(slack_q[:, 0, 0], float("-inf"))

    def _launch_without_empties(self, backend: Backend) -> tuple[Tensor, Tensor | None]:
        """For kernels that mishandle empty sequences: leave them out; their queries, if any, get 0 and -inf."""
        some = kept(self.layout_q, self.layout_kv, "without empties", lambda: _without_empties(self.layout_q, self.layout_kv))
        if some is None:
            shape = (*self.query.shape[:2], self.value.shape[2])
            out = connected_zeros(shape, self.query, self.key, self.value)
            lse_dtype = wide_dtype(out.dtype)
            lse = out.new_full((out.shape[1], out.shape[0]), float("-inf"), dtype=lse_dtype)
            return out, lse if self.semantics.return_lse else None
        query = self.query if some.rows_q is None else some.rows_q.pack(self.query[None])
        key, value = (x if some.rows_k is None else some.rows_k.pack(x[None]) for x in (self.key, self.value))
        out, some_lse = backend.run(query, key, value, self._call().on(some.layout_q, some.layout_kv))
        if some.rows_q is None:
            return out, some_lse
        if some_lse is not None:
            some_lse = some.rows_q.unpack(some_lse.transpose(0, 1).contiguous(), float("-inf"))[0].transpose(0, 1)
        return some.rows_q.unpack(out)[0], some_lse

    def _call(self) -> Call:
        return Call(self.layout_q, self.layout_kv, self.semantics, self.extras)

    @property
    def _qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


def _slack(layout: SeqLayout) -> Tensor:
    """``(T, 1, 1)`` bool, True for slack rows."""
    return (torch.arange(layout.num_rows, device=layout.device) >= layout.cu_seqlens[-1])[:, None, None]


class _Some(NamedTuple):
    """The sequences of two layouts that are not empty, and their packed rows, None for all."""

    layout_q: SeqLayout
    layout_kv: SeqLayout
    rows_q: SeqLayout | None
    rows_k: SeqLayout | None


def _without_empties(layout_q: SeqLayout, layout_kv: SeqLayout) -> _Some | None:
    lengths_q, lengths_k = layout_q.lengths, layout_kv.lengths
    assert lengths_q is not None  # refused otherwise
    assert lengths_k is not None
    taken = [i for i, (a, b) in enumerate(zip(lengths_q, lengths_k, strict=True)) if a and b]
    if not taken:
        return None
    some_q = some_kv = SeqLayout.from_lengths([lengths_q[i] for i in taken], device=layout_q.device)
    if layout_kv is not layout_q:
        some_kv = SeqLayout.from_lengths([lengths_k[i] for i in taken], device=layout_kv.device)
    return _Some(some_q, some_kv, _rows_of(layout_q, taken), _rows_of(layout_kv, taken))


def _has_empty(layout_q: SeqLayout, layout_kv: SeqLayout) -> bool:
    """Whether a sequence has no queries or no keys, or there is no sequence at all."""
    return layout_q.lengths == () or 0 in (layout_q.lengths or ()) or 0 in (layout_kv.lengths or ())


def _rows_of(layout: SeqLayout, taken: list[int]) -> SeqLayout | None:
    """The packed rows of some sequences, as tokens of one row of T columns; None if they are all: what is left out had no rows."""
    assert layout.lengths is not None
    if sum(layout.lengths[i] for i in taken) == layout.num_rows:
        return None
    wanted = torch.zeros(layout.num_seqs, dtype=torch.bool, device="cpu")
    wanted[taken] = True
    lengths = torch.tensor(layout.lengths, device="cpu", dtype=torch.int64)
    real = wanted.repeat_interleave(lengths, output_size=layout.num_rows)
    return moved(SeqLayout.from_attention_mask(real[None], validate=False), layout.device)
