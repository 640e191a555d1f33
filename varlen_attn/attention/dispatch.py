"""`choose` a backend for a `Problem`, with the reasons against the others; `use_backend` around calls.

::

    Problem ─► choose ─► Plan(backend, kernel, decisions = one for each backend, with reasons and fixes)
    SeqLayout ─► route ─► "packed" or "dense"
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from .. import _state
from .._state import Order, opened, state, visible
from .._torch import constant_while_tracing
from ..errors import ArgumentError, BackendRefused, NoBackend
from ..kernels import BACKENDS
from ..kernels.base import Backend, Refusal
from ..kernels.problem import Problem, Semantics
from ..layout.seq_layout import SeqLayout
from ..layout.shown import Shown

_ENVIRONMENT = "VARLEN_ATTN_BACKEND"
_environment_order = os.environ.get(_ENVIRONMENT) or "auto"  # read once: a changed environment must not change a running model

_NAMES = ("auto", *(b.name for b in BACKENDS))

# Of problems their plan; of calls' signatures what was decided for them (`_call.Verdict`).
_plans: dict[Any, Any] = {}
_MAX_PLANS = 4096


@dataclass(frozen=True)
class Decision:
    """What was decided about one backend.

    Examples:
        >>> plan = choose(Problem(device_type="cpu"), all_reasons=True)
        >>> [d.backend for d in plan.decisions if not d.accepted][:2]
        ['flash3', 'flash4']
    """

    backend: str
    accepted: bool
    reasons: tuple[Refusal, ...] = ()

    def __str__(self) -> str:
        if self.accepted:
            return f"{self.backend}: accepts"
        return f"{self.backend}: " + "; ".join(str(r) for r in self.reasons)


@dataclass(frozen=True)
class Route:
    """Whether the tokens are packed, and why.

    Examples:
        >>> route(SeqLayout.from_lengths([4, 4]), Problem())
        Route(name='dense', reason='no row has padding')
    """

    name: Literal["packed", "dense"]
    reason: str


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """The backend that runs a problem, and why the others do not.

    Attributes:
        backend: its name.
        kernel: the kernel that it calls.
        evidence: how that is known: "declared" by the backend, "probed" on this machine, or "profiled".
        decisions: one for each backend, in order of preference.
        problem: what was asked.
        route, route_reason: "packed", or "dense" where nothing is padded, or where padded attention was exported.

    Examples:
        >>> plan = choose(Problem(device_type="cuda", capability=(8, 0), dtype=torch.float16, packages=()))
        >>> print(plan)
        torch_varlen runs this: aten::_flash_attention_forward with cu_seqlens (flash_fwd_kernel) (declared)
        why: the first in the order that can run it; ...
        >>> plan.as_dict()["capability"]
        (8, 0)
    """

    backend: str
    kernel: str
    decisions: tuple[Decision, ...]
    problem: Problem
    implementation: Backend = field(compare=False)
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
            "decisions": [asdict(d) | {"reasons": [asdict(r) for r in d.reasons]} for d in self.decisions],
        }

    @property
    def faster(self) -> str:
        """Which kernel would be chosen if it were installed, and how to install it; empty if there is none."""
        before = itertools.takewhile(lambda d: d.backend != self.backend, self.decisions if self.route == "packed" else ())
        lacks = (d for d in before if {r.kind for r in d.reasons} == {"missing"})
        return next((f"A faster kernel exists. {d}." for d in lacks), "")

    def __str__(self) -> str:
        """What runs, and why, in two lines; `details` has every reason and fix."""
        groups: dict[tuple[str, str], list[str]] = {}
        for decision in self.decisions:
            if decision.backend != self.backend:
                groups.setdefault(self._group(decision), []).append(decision.backend)
        why = ["it was requested" if self.problem.requested == self.backend else "the first in the order that can run it"]
        for (kind, reason), names in groups.items():
            listed = ", ".join(names)
            why.append(f"{listed if len(names) == 1 else f'{len(names)} {kind} ({listed})'}: {reason}")
        why[0] = self.route_reason if self.backend == "dense" else why[0]
        return f"{self.backend} runs this: {self.kernel} ({self.evidence})\nwhy: {'; '.join(why)}"

    def _group(self, decision: Decision) -> tuple[str, str]:
        """What is told of several backends at once: what they are, and the reason that counts most."""
        if decision.accepted:
            dense = f"would run, but {self.route_reason}"
            return "backends", dense if self.backend == "dense" else "would run too, but comes later in the order"
        worst = min(decision.reasons, key=lambda r: ("machine", "request", "missing", "unsupported").index(r.kind))
        elsewhere = re.match("runs on (cpu|cuda) only, and (.*)", worst.reason)
        return (f"{elsewhere[1].upper()} backends", elsewhere[2]) if elsewhere else ("backends", worst.reason)

    def details(self) -> str:
        """What runs, on which machine, and all reasons and fixes for every backend."""
        problem = self.problem
        capability = "" if problem.capability is None else f" sm{problem.capability[0]}{problem.capability[1]}"
        heads = f"{problem.num_heads}/{problem.num_kv_heads} heads of {problem.head_dim}"
        packages = ", ".join(f"{name} {version}" for name, version in _package_versions(problem)) or "none"
        origin = "installed" if problem.packages is None else "stated"
        lines = [
            str(self).splitlines()[0],
            f"  on {problem.device_type}{capability}, {str(problem.dtype).removeprefix('torch.')}, {heads}, "
            f"torch {problem.torch_version}; optional packages {origin}: {packages}",
            f"  route: {self.route} ({self.route_reason})",
        ]
        for decision in self.decisions:
            if decision.backend == self.backend:
                lines.append(f"  > {decision.backend}: runs")
            elif decision.accepted:
                lines.append(f"  + {decision.backend}: {self._group(decision)[1]}")
            else:
                reasons = [f"{r.reason}. Fix: {r.fix}." for r in decision.reasons]
                lines.append(f"  - {decision.backend}: " + "\n      ".join(reasons))
        return "\n".join(lines)


def _package_versions(problem: Problem) -> list[tuple[str, str]]:
    names = sorted({name for b in BACKENDS for name in (b.package, *b.packages)} - {"torch"})
    versions = [(name, problem.version(name)) for name in names]
    return [(name, version) for name, version in versions if version is not None]


def choose(problem: Problem, backends: Sequence[Backend] = BACKENDS, *, all_reasons: bool = False) -> Plan:
    """The plan for ``problem``: the first backend that accepts it, or the one that it requests by name.

    Args:
        problem: what is asked; ``problem.requested`` is a name, or ``"auto"``.
        backends: in order of preference.
        all_reasons: also look into packages that could not have changed the choice, so that every reason is there.
            That may import them; `explain` and errors do it.

    Raises:
        ArgumentError: the requested name is not one of ``backends``.
        BackendRefused: the requested backend cannot run the problem.
        NoBackend: none of ``backends`` can.

    Examples:
        >>> plan = choose(Problem(device_type="cpu", requested="cpu"))
        >>> print(plan.kernel)
        aten::_scaled_dot_product_flash_attention_for_cpu
    """
    key = (problem, all_reasons, backends if backends is BACKENDS else tuple(backends))
    plan: Plan | None = _plans.get(key)
    if plan is None:
        plan = _choose(problem, tuple(backends), all_reasons)
        remember(key, plan)
    return plan


def remember(key: Any, decision: Any) -> None:
    if len(_plans) >= _MAX_PLANS:
        _plans.clear()  # a dropout schedule makes a problem of every step
    _plans[key] = decision


def _choose(problem: Problem, candidates: tuple[Backend, ...], all_reasons: bool) -> Plan:
    names = [b.name for b in candidates]
    order = problem.requested
    if order != "auto" and order not in names:
        raise ArgumentError(f"`backend` must be 'auto' or one of {names}, but is {order!r}.")
    refusals = [b.refusals(problem, all_reasons=all_reasons) for b in candidates]
    if order == "auto" and all(refusals):
        # Auto does not fail for lack of a kernel: what else runs on request only (the specification) then runs unasked.
        refusals = [() if all(x.kind == "request" for x in r) else r for r in refusals]
    chosen = next((b for b, r in zip(candidates, refusals, strict=True) if not r and order in ("auto", b.name)), None)
    decisions = tuple(Decision(b.name, not r, r) for b, r in zip(candidates, refusals, strict=True))
    if chosen is None and not all_reasons:
        return _choose(problem, candidates, True)  # an error has all reasons
    if chosen is None and order != "auto":
        reasons = refusals[names.index(order)]
        listing = "\n".join(f"  - {r.reason}. Fix: {r.fix}." for r in reasons)
        raise BackendRefused(f"backend {order!r} was requested but cannot run this call:\n{listing}\nbackend='auto' picks one that can.")
    if chosen is None:
        listing = "\n".join(f"  - {d}" for d in decisions)
        raise NoBackend(f"none of these backends runs this call:\n{listing}")
    return Plan(chosen.name, chosen.kernel(problem), decisions, problem, chosen)


def problem_of_fields(problem: tuple[tuple[str, Any], ...], semantics: tuple[tuple[str, Any], ...]) -> Problem:
    """From plain values. ``device_index`` says whose compute capability counts, on a machine with several GPUs."""
    known = dict(problem)
    index = known.pop("device_index")
    if known["device_type"] == "cuda" and torch.cuda.is_available():
        known["capability"] = torch.cuda.get_device_capability(index)
    return Problem(semantics=Semantics(**dict(semantics)), **known)


@constant_while_tracing
def choose_while_tracing(problem: tuple[tuple[str, Any], ...], semantics: tuple[tuple[str, Any], ...]) -> str:
    """`choose` as a constant of the graph: plain values in, the backend's name out; run by Python while tracing."""
    plan = choose(problem_of_fields(problem, semantics))
    if not plan.implementation.custom_op:
        for log in visible(state.records):
            log.on_launch(plan.backend, -1)
    return plan.backend


def route(layout: SeqLayout, problem: Problem) -> Route:
    """Packed, or dense where nothing is padded (then packed rows are the padded rows, and nothing needs to move).

    A pure function of facts known on the host.

    Examples:
        >>> print(route(SeqLayout.from_lengths([5, 3, 1]), Problem()).reason)
        40% of the batch is padding
    """
    if layout.ranks is not None:
        from ..parallel.attention import way_of

        return Route("packed", way_of(layout.ranks, problem.num_heads)[1])
    if problem.tracing:
        return Route("packed", "always packed while tracing")
    if layout.lengths is None:
        return Route("packed", "only the device knows the lengths")
    if layout.is_dense:
        return Route("dense", "no row has padding")
    return Route("packed", f"{1 - (layout.fill or 0):.0%} of the batch is padding")


def requested_backend(backend: str | Backend) -> str | Backend:
    """Which backend is requested: argument > `use_backend` > environment > auto."""
    if backend != "auto":
        if not isinstance(backend, str | Backend):
            raise ArgumentError(f"`backend` must be 'auto', a name or a Backend, but is {backend!r}.")
        return backend
    traced = [block for block in state.traced if isinstance(block, Order)]
    asked = traced or state.orders or torch.compiler.is_compiling()  # which guards on `_state.order`
    order: str | Backend | None = traced[-1].backend if traced else _state.order if asked else None
    if order is not None:
        return order
    if _environment_order not in _NAMES:
        raise ArgumentError(f"`{_ENVIRONMENT}` must be 'auto' or one of {list(_NAMES[1:])}, but is {_environment_order!r}.")
    return _environment_order


@contextmanager
def use_backend(name: str | Backend) -> Iterator[None]:
    """Request a backend for all calls inside, in this thread and this coroutine. It runs, or the call raises `BackendRefused`.

    It must surround the backward pass too where activations are checkpointed, because recomputation chooses again. On a GPU autograd
    recomputes in a thread of its own, which this does not reach: give a checkpointed module ``backend=`` instead.

    Examples:
        >>> x = torch.randn(2, 5, 16)
        >>> with use_backend("reference"), record() as log:
        ...     out = varlen_mha(x, num_heads=2)
        >>> log.calls[0].backend
        'reference'
    """
    if not isinstance(name, Backend) and name not in _NAMES:
        raise ArgumentError(f"`name` must be 'auto' or one of {list(_NAMES[1:])}, but is {name!r}.")
    with opened(state.orders, Order(name)):
        yield


def backends() -> list[dict[str, Any]]:
    """All backends on this machine, in order: name, package, version, availability and the reason where it is not available.

    Examples:
        >>> [row["name"] for row in backends()] == [b.name for b in BACKENDS]
        True
    """
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
