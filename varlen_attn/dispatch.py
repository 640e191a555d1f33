"""`choose` a backend for a `Problem`, with the reasons against the others; `use_backend` and `record` around calls.

::

    Problem ─► choose ─► Plan(backend, kernel, decisions = one for each backend, with reasons and fixes)
    SeqLayout ─► route ─► "packed" or "dense"
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .backends import BACKENDS
from .backends.base import Backend, Refusal, constant_while_tracing, state
from .errors import ArgumentError, BackendRefused, NoBackend
from .layout import SeqLayout
from .problem import Problem, Semantics

__all__ = ["Call", "Decision", "Plan", "Record", "Route", "backends", "choose", "record", "route", "use_backend"]

_ENVIRONMENT = "VARLEN_ATTN_BACKEND"
_environment_order = os.environ.get(_ENVIRONMENT) or "auto"  # read once: a changed environment must not change a running model

_NAMES = ("auto", *(b.name for b in BACKENDS))

_plans: dict[Any, Plan] = {}
_MAX_PLANS = 4096


@dataclass(frozen=True)
class Decision:
    """What was decided about one backend."""

    backend: str
    accepted: bool
    reasons: tuple[Refusal, ...] = ()

    def __str__(self) -> str:
        if self.accepted:
            return f"{self.backend}: accepts"
        return f"{self.backend}: " + "; ".join(str(r) for r in self.reasons)


@dataclass(frozen=True)
class Route:
    """Whether the tokens are packed, and why."""

    name: Literal["packed", "dense"]
    reason: str


@dataclass(frozen=True)
class Plan:
    """The backend that runs a problem, and why the others do not.

    Attributes:
        backend: its name.
        kernel: the kernel that it calls.
        evidence: how that is known: "declared" by the backend, "probed" on this machine, or "profiled".
        decisions: one for each backend, in order of preference.
        problem: what was asked.
        route, route_reason: "packed", or "dense" where nothing is padded.
    """

    backend: str
    kernel: str
    decisions: tuple[Decision, ...]
    problem: Problem
    implementation: Backend = field(repr=False, compare=False)
    evidence: Literal["declared", "probed", "profiled"] = "declared"
    route: Literal["packed", "dense"] = "packed"
    route_reason: str = "no layout was given"

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, for JSON."""
        problem = self.problem
        return {
            "backend": self.backend,
            "kernel": self.kernel,
            "evidence": self.evidence,
            "route": self.route,
            "route_reason": self.route_reason,
            "device": problem.device_type,
            "capability": problem.capability,
            "dtype": str(problem.dtype).removeprefix("torch."),
            "torch": problem.torch_version,
            "packages": dict(_package_versions(problem)),
            "decisions": [
                {
                    "backend": d.backend,
                    "accepted": d.accepted,
                    "reasons": [{"reason": r.reason, "fix": r.fix, "kind": r.kind} for r in d.reasons],
                }
                for d in self.decisions
            ],
        }

    def __str__(self) -> str:
        problem = self.problem
        capability = "" if problem.capability is None else f" sm{problem.capability[0]}{problem.capability[1]}"
        heads = f"{problem.num_heads}/{problem.num_kv_heads} heads of {problem.head_dim}"
        packages = ", ".join(f"{name} {version}" for name, version in _package_versions(problem)) or "none"
        origin = "installed" if problem.packages is None else "stated"
        lines = [
            f"{self.backend} runs this: {self.kernel} ({self.evidence})",
            f"  on {problem.device_type}{capability}, {str(problem.dtype).removeprefix('torch.')}, {heads}, "
            f"torch {problem.torch_version}; optional packages {origin}: {packages}",
            f"  route: {self.route} ({self.route_reason})",
        ]
        for decision in self.decisions:
            if decision.backend == self.backend:
                lines.append(f"  > {decision.backend}: runs")
            elif decision.accepted:
                lines.append(f"  + {decision.backend}: would run too, but stands later in the order")
            else:
                reasons = [f"{r.reason}. Fix: {r.fix}." for r in decision.reasons]
                lines.append(f"  - {decision.backend}: " + "\n      ".join(reasons))
        return "\n".join(lines)


def _package_versions(problem: Problem) -> list[tuple[str, str]]:
    names = sorted({b.package for b in BACKENDS} - {"torch"})
    versions = [(name, problem.version(name)) for name in names]
    return [(name, version) for name, version in versions if version is not None]


def choose(problem: Problem, backends: Sequence[Backend] = BACKENDS, *, thorough: bool = False) -> Plan:
    """The plan for ``problem``: the first backend that accepts it, or the one that it orders by name.

    Args:
        problem: what is asked; ``problem.requested`` is a name, or ``"auto"``.
        backends: in order of preference.
        thorough: also look into packages that could not have changed the choice, so that every reason is there.
            That may import them; `explain` and errors do it.

    Raises:
        ArgumentError: the name ordered is not one of ``backends``.
        BackendRefused: the backend ordered by name can not run the problem.
        NoBackend: none of ``backends`` can.
    """
    key = (problem, thorough, backends if backends is BACKENDS else tuple(backends))
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()  # a dropout schedule makes a problem of every step
        plan = _plans[key] = _choose(problem, tuple(backends), thorough)
    return plan


def _choose(problem: Problem, candidates: tuple[Backend, ...], thorough: bool) -> Plan:
    names = [b.name for b in candidates]
    order = problem.requested
    if order != "auto" and order not in names:
        raise ArgumentError(f"`backend` must be 'auto' or one of {names}, but is {order!r}.")
    refusals = [b.refusals(problem, thorough=thorough) for b in candidates]
    if order == "auto" and all(refusals):
        # Auto does not fail for lack of a kernel: what else runs by order only (the specification) then runs unasked.
        refusals = [() if all(x.kind == "order" for x in r) else r for r in refusals]
    chosen = next((b for b, r in zip(candidates, refusals, strict=True) if not r and order in ("auto", b.name)), None)
    decisions = tuple(Decision(b.name, not r, r) for b, r in zip(candidates, refusals, strict=True))
    if chosen is None and not thorough:
        return _choose(problem, candidates, True)  # an error has all reasons
    if chosen is None and order != "auto":
        reasons = refusals[names.index(order)]
        listing = "\n".join(f"  - {r.reason}. Fix: {r.fix}." for r in reasons)
        raise BackendRefused(f"backend {order!r} was ordered, but it\n{listing}\nbackend='auto' picks one that runs this.")
    if chosen is None:
        listing = "\n".join(f"  - {d}" for d in decisions)
        raise NoBackend(f"none of these backends runs this call:\n{listing}")
    return Plan(chosen.name, chosen.kernel(problem), decisions, problem, chosen)


@constant_while_tracing
def choose_while_tracing(problem: tuple[tuple[str, Any], ...], semantics: tuple[tuple[str, Any], ...]) -> str:
    """`choose` as a constant of the graph: plain values in, the backend's name out; run by Python while tracing."""
    plan = choose(Problem(semantics=Semantics(**dict(semantics)), **dict(problem)))
    if not plan.implementation.own_op:
        for log in state.records:
            log.observe(plan.backend, -1)
    return plan.backend


def route(layout: SeqLayout, problem: Problem) -> Route:
    """Packed, or dense where nothing is padded (then packed rows are the padded rows, and nothing needs to move).

    A pure function of facts known on the host. Dense with padding is not chosen yet, although packing around a single attention call
    loses where little is padded or rows are short (`benchmarks/results/route.json`): the padded call reads padding unless that is zeroed
    first, and a threshold belongs to a class of machines.
    """
    if problem.tracing:
        return Route("packed", "always packed while tracing")
    if layout.lengths is None:
        return Route("packed", "only the device knows the lengths")
    if layout.is_dense:
        return Route("dense", "no row has padding")
    return Route("packed", f"{1 - (layout.fill or 0):.0%} of the batch is padding")


def requested_backend(backend: str | Backend) -> str | Backend:
    """Which backend is ordered: argument > `use_backend` > environment > auto."""
    if backend != "auto":
        if not isinstance(backend, str | Backend):
            raise ArgumentError(f"`backend` must be 'auto', a name or a Backend, but is {backend!r}.")
        return backend
    if state.override is not None:
        return state.override
    if _environment_order not in _NAMES:
        raise ArgumentError(f"`{_ENVIRONMENT}` must be 'auto' or one of {list(_NAMES[1:])}, but is {_environment_order!r}.")
    return _environment_order


@contextmanager
def use_backend(name: str | Backend) -> Iterator[None]:
    """Order a backend for all calls inside, in this thread. It runs, or the call raises `BackendRefused`.

    It must surround the backward pass too where activations are checkpointed, because recomputation chooses again. On a GPU autograd
    recomputes in a thread of its own, which this does not reach: give a checkpointed module ``backend=`` instead.
    """
    if not isinstance(name, Backend) and name not in _NAMES:
        raise ArgumentError(f"`name` must be 'auto' or one of {list(_NAMES[1:])}, but is {name!r}.")
    before, state.override = state.override, name
    try:
        yield
    finally:
        state.override = before


# -------------------------------------------------------------------- what ran


@dataclass(frozen=True)
class Call:
    """One attention call. Facts that only a device or a trace knows are None.

    Attributes:
        backend, kernel: what ran; backend "dense" is a module that computed padding too.
        plan: with the reasons; None where compiled code launched the kernel.
        module: its name in the model that `record` was given, else its class.
        rows: T.  slots: B*S.
        traced: seen once while tracing, and not at each run.
        reason: why a module went the dense way, or why a stack of layers did not run packed.
    """

    backend: str
    kernel: str
    plan: Plan | None = None
    module: str | None = None
    rows: int | None = None
    slots: int | None = None
    traced: bool = False
    reason: str | None = None

    @property
    def padding(self) -> float | None:
        """Share of the padded batch that is padding."""
        return 1 - self.rows / self.slots if self.rows is not None and self.slots else None


class Record:
    """The attention calls made inside `record`, in order; prints as a table with totals."""

    def __init__(self, names: dict[int, str] | None = None) -> None:
        self.calls: list[Call] = []
        self._names = names or {}

    def add(self, call: Call, module: object | None) -> None:
        """Write a call, with the name of the module that made it."""
        known = None if module is None else self._names.get(id(module), type(module).__name__)
        self.calls.append(replace(call, module=known))

    def __iter__(self) -> Iterator[Call]:
        return iter(self.calls)

    def __len__(self) -> int:
        return len(self.calls)

    def observe(self, backend: str, rows: int) -> None:
        """A kernel that our own op launched (``rows >= 0``), or a choice made while tracing."""
        kernel = "in compiled code"
        self.calls.append(Call(backend, kernel, rows=rows) if rows >= 0 else Call(backend, kernel, traced=True))

    def __str__(self) -> str:
        rows = [("#", "module", "backend", "T", "B*S", "padding", "kernel")]
        for i, call in enumerate(self.calls):
            padding = "-" if call.padding is None else f"{call.padding:.0%}"
            kernel = call.kernel + (" (traced)" if call.traced else "") + (f"; {call.reason}" if call.reason else "")
            rows.append((str(i), call.module or "-", call.backend, _text(call.rows), _text(call.slots), padding, kernel))
        widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        counts = {name: sum(c.backend == name for c in self.calls) for name in dict.fromkeys(c.backend for c in self.calls)}
        known = [c for c in self.calls if c.rows is not None and c.slots]
        packed, padded = sum(c.rows or 0 for c in known), sum(c.slots or 0 for c in known)
        saved = f"; {packed} of {padded} positions computed, {1 - packed / padded:.0%} padding left out" if padded else ""
        lines.append(f"{len(self.calls)} calls: " + ", ".join(f"{n} x {b}" for b, n in counts.items()) + saved)
        return "\n".join(lines)


def _text(number: int | None) -> str:
    return "-" if number is None else str(number)


@contextmanager
def record(model: torch.nn.Module | None = None) -> Iterator[Record]:
    """Record every attention call of this thread made inside: ``with record() as log: ...; print(log)``.

    Args:
        model: calls by its modules are recorded under their qualified names, others under their class.

    Compiled code is seen where it runs if the backend launches an op of ours (`cpu`), else once, when it is traced.
    """
    log = Record({} if model is None else {id(module): name for name, module in model.named_modules() if name})
    state.records.append(log)
    try:
        yield log
    finally:
        state.records.remove(log)


@contextmanager
def announced(plan: Plan, layout: SeqLayout, module: object | None, reason: str | None = None) -> Iterator[None]:
    """Write one call into the open records, and keep the op that it launches silent."""
    rows = layout.total if layout.lengths is not None else layout.num_rows
    _write(Call(plan.backend, plan.kernel, plan, None, rows, layout.batch_size * layout.padded_len, reason=reason), module)
    before, state.announced = state.announced, True
    try:
        yield
    finally:
        state.announced = before


def note_dense(module: object, query: Tensor, key: Tensor, value: Tensor, kernel: str, reason: str) -> None:
    """Write a call that a module computed the dense way, on ``(B, S, N, H)`` tensors, into the open records.

    Everything padded is computed: T is B*S. Its plan is that of the packed call, which did not run, with the reason.
    """
    problem = Problem(
        device_type=query.device.type,
        dtype=query.dtype,
        num_heads=query.shape[2],
        num_kv_heads=key.shape[2],
        head_dim=query.shape[3],
        value_head_dim=value.shape[3],
        needs_grad=torch.is_grad_enabled() and query.requires_grad,
    )
    plan = replace(choose(problem, thorough=True), backend="dense", kernel=kernel, route="dense", route_reason=reason)
    slots = query.shape[0] * query.shape[1]
    _write(Call("dense", kernel, plan, None, slots, slots, reason=reason), module)


def _write(call: Call, module: object | None) -> None:
    for log in state.records:
        assert isinstance(log, Record)
        log.add(call, module)


def backends() -> list[dict[str, Any]]:
    """All backends on this machine, in order: name, package, version, availability and the reason where it is not available."""
    rows = []
    for backend in BACKENDS:
        problem = Problem(requested=backend.name, dtype=_some_dtype(backend))
        reasons = [r for r in backend.refusals(problem) if r.kind != "unsupported"]
        rows.append(
            {
                "name": backend.name,
                "package": backend.package,
                "version": problem.version(backend.package),
                "available": not reasons,
                "reason": "; ".join(str(r) for r in reasons) or None,
            }
        )
    return rows


def _some_dtype(backend: Backend) -> torch.dtype:
    """A dtype that the backend takes: availability is about the machine, not about a dtype."""
    return torch.float32 if torch.float32 in backend.capabilities.dtypes else torch.float16
