"""What ran: `record` around calls, and with ``kernels=True`` also what a profiler saw of each of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .._state import opened, state, undone, visible
from ..kernels.problem import Problem
from ..layout.seq_layout import SeqLayout
from ..layout.shown import Shown, table
from .dispatch import Plan, choose
from .profile import Profile, profiled, short_name

_RANGE = "varlen_attn call "  # with the number of a call: the range in which a profiler finds its kernels


@dataclass(frozen=True, repr=False)
class Call(Shown):
    """One attention call. Facts that only a device or a trace knows are None.

    Attributes:
        backend, kernel: what ran; backend "dense" is a module that computed padding too.
        plan: with the reasons; None where compiled code launched the kernel.
        module: its name in the model that `record` was given, else its class.
        rows: T.  slots: B*S.
        traced: seen once while tracing, and not at each run.
        reason: why a module computed the padded batch, or why a stack of layers did not run packed.
        kernels: what the profiler saw this call launch, forward only (`record(kernels=True)`): names of device kernels, or without a
            device of torch's and our attention ops. None without a profiler, or where compiled code launched it.
        confirmed: whether the kernel that the backend claims is among them; None without a profiler, or where nothing is claimed.
        layout: of the queries; None where they were not packed.

    Examples:
        >>> x = torch.randn(2, 5, 16)
        >>> with record() as log:
        ...     out = varlen_mha(x, layout=SeqLayout.from_lengths([5, 3]), num_heads=2)
        >>> call = log.calls[0]
        >>> call.rows, call.slots, round(call.padding, 2)
        (8, 10, 0.2)
    """

    backend: str
    kernel: str
    plan: Plan | None = None
    module: str | None = None
    rows: int | None = None
    slots: int | None = None
    traced: bool = False
    reason: str | None = None
    kernels: tuple[str, ...] | None = None
    confirmed: bool | None = None
    layout: SeqLayout | None = field(default=None, compare=False)

    @property
    def padding(self) -> float | None:
        """Share of the padded batch that is padding."""
        return 1 - self.rows / self.slots if self.rows is not None and self.slots else None

    def seen(self, kernels: tuple[str, ...]) -> Call:
        """This call with what a profiler saw of it."""
        confirmed = None
        if self.rows and self.plan is not None and self.backend == self.plan.implementation.name:
            pattern = self.plan.implementation.seen_as(self.plan.problem)
            confirmed = any(re.search(pattern, name) for name in kernels) if pattern else None
        plan = replace(self.plan, evidence="profiled") if self.plan is not None and confirmed else self.plan
        return replace(self, plan=plan, kernels=kernels, confirmed=confirmed)

    def __str__(self) -> str:
        return table([_HEADS[1:], self.row()], _SIDES[1:])

    def row(self) -> tuple[str, ...]:
        """For a table."""
        return self.module or "-", self.backend, *_numbers(self.rows, self.slots), self.kernel_text()

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; without the layout."""
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layout"}
        return parts | {"padding": self.padding, "plan": None if self.plan is None else self.plan.as_dict()}

    def kernel_text(self) -> str:
        """The kernel for a table: as declared, and what is known of it."""
        text = self.kernel + (" (traced)" if self.traced else "")
        if self.kernels is not None:
            names = ", ".join(dict.fromkeys(short_name(name) for name in self.kernels)) or "no kernel that it knows"
            text = f"NOT SEEN: {text}" if self.confirmed is False else text
            text += f"; the profiler saw {names}"
        return text + (f"; {self.reason}" if self.reason else "")


class Record(Shown):
    """The attention calls made inside `record`, in order; prints as a table with totals.

    Attributes:
        calls: one `Call` for each.
        kernels: with ``record(kernels=True)``, every kernel that ran inside, attention or not, backward passes included; else None.
        peak: with ``record(kernels=True)``, the most bytes of torch's allocator that were taken at once; else None.
        tokens: layouts of what counts, where calls have computed some of the padding too.

    Examples:
        >>> x, layout = torch.randn(2, 5, 16), SeqLayout.from_lengths([5, 3])
        >>> with record() as log, use_backend("cpu"):
        ...     for _ in range(3):
        ...         out = varlen_mha(x, layout=layout, num_heads=2)
        >>> print(log.summary())
        calls  module  backend  T   B*S  padding  kernel
        3      -       cpu      24  30   20%      aten::_scaled_dot_product_flash_attention_for_cpu
        3 calls: 3 x cpu; 24 of 30 positions computed, 20% padding left out
    """

    def __init__(self, model: torch.nn.Module | None = None, *, profiles: bool = False) -> None:
        from .._switch import original_class, own_class  # here, because attention alone does not need it

        self.calls: list[Call] = []
        self.kernels: tuple[str, ...] | None = None
        self.peak: int | None = None
        self.profiles = profiles
        self.tokens: list[SeqLayout] = []
        modules = {} if model is None else {name or type(m).__name__: m for name, m in model.named_modules()}
        self._names, self._all = {id(m): name for name, m in modules.items()}, {None, type(model).__name__}
        attns = [name for name, m in modules.items() if isinstance(m, torch.nn.MultiheadAttention)]
        self._enabled = [name for name in attns if original_class(modules[name]) is not own_class(modules[name])]

    def add(self, call: Call, module: object | None) -> None:
        """Add a call, with the name of the module that made it."""
        known = None if module is None else self._names.get(id(module), type(module).__name__)
        self.calls.append(replace(call, module=known))

    @property
    def idle(self) -> tuple[str, ...]:
        """Enabled attention modules of which no call was seen, nor of what they are in; none where a call has no name."""
        ran = {call.module for call in self.calls}
        return tuple(x for x in self._enabled if self._all.isdisjoint(ran) and not any(f"{x}.".startswith(f"{y}.") for y in ran))

    def __iter__(self) -> Iterator[Call]:
        return iter(self.calls)

    def __len__(self) -> int:
        return len(self.calls)

    def on_launch(self, backend: str, rows: int) -> None:
        """A kernel that our own op launched (``rows >= 0``), or a choice made while tracing."""
        kernel = "in compiled code"
        self.calls.append(Call(backend, kernel, rows=rows) if rows >= 0 else Call(backend, kernel, traced=True))

    def attach_profile(self, profile: Profile) -> None:
        """Store what the profiler saw, which is known at the end."""
        self.kernels, self.peak = profile.kernels, profile.peak
        for label, kernels in profile.by_range.items():
            number = int(label.removeprefix(_RANGE))
            self.calls[number] = self.calls[number].seen(kernels)

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {"calls": [call.as_dict() for call in self.calls], "kernels": self.kernels, "peak": self.peak}

    def summary(self) -> str:
        """A table by module and kernel, with the number of calls in place of each."""
        alike: dict[tuple[str, ...], list[Call]] = {}
        for call in self.calls:
            alike.setdefault((call.module or "-", call.backend, call.kernel_text()), []).append(call)
        rows = [(str(len(calls)), module, backend, *_sums(calls), kernel) for (module, backend, kernel), calls in alike.items()]
        return self._with_totals([("calls", *_HEADS[1:]), *rows])

    def __str__(self) -> str:
        rows = [(str(i), *call.row()) for i, call in enumerate(self.calls) if not _ENDS <= i < len(self.calls) - _ENDS]
        if len(rows) < len(self.calls):
            rows.insert(_ENDS, ("...", f"{len(self.calls) - len(rows)} more, see summary()", *[""] * (len(_HEADS) - 2)))
        return self._with_totals([_HEADS, *rows])

    def _with_totals(self, rows: list[tuple[str, ...]]) -> str:
        idle = f"no call was seen of these enabled modules: {', '.join(self.idle)}" if self.idle else ""
        if not self.calls:
            return "\n".join(filter(None, [_EMPTY, idle]))
        counts = Counter(call.backend for call in self.calls)
        packed, padded, share = _sums(self.calls)
        saved = f"; {packed} of {padded} positions computed, {share} padding left out" if padded != "-" else ""
        totals = f"{len(self.calls)} calls: " + ", ".join(f"{n} x {b}" for b, n in counts.items()) + saved
        faster = next((call.plan.faster for call in self.calls if call.plan is not None and call.plan.faster), "")
        return "\n".join(filter(None, [table(rows, _SIDES), totals, idle, faster]))


_HEADS = ("#", "module", "backend", "T", "B*S", "padding", "kernel")
_SIDES = "<<<<<<<"
_ENDS = 12  # calls that are shown of each end of a long record
_EMPTY = (
    "0 calls: no attention of varlen_attn was called here. Was the model enabled, by enable(model) after it was loaded? Does it call its "
    "attention modules, or only read their weights, as docs/how-to/own-attention.md has it? A record sees the calls of its own "
    "thread and coroutine, and of a graph that was compiled before only those that launch an op of ours."
)


def _sums(calls: Sequence[Call]) -> tuple[str, ...]:
    known = [(call.rows, call.slots) for call in calls if call.rows is not None and call.slots]
    return _numbers(*map(sum, zip(*known, strict=True))) if known else _numbers(None, None)


def _numbers(rows: int | None, slots: int | None) -> tuple[str, ...]:
    padding = "-" if rows is None or not slots else f"{1 - rows / slots:.0%}"
    return *("-" if number is None else str(number) for number in (rows, slots)), padding


@contextmanager
def record(model: torch.nn.Module | None = None, *, kernels: bool = False) -> Iterator[Record]:
    """Record every attention call made inside, in this thread and this coroutine: ``with record() as log: ...; print(log)``.

    Args:
        model: calls by its modules are recorded under their qualified names, others under their class.
        kernels: run `torch.profiler` meanwhile, and write down which kernels each call launched: then ``call.confirmed`` is an
            observation. Not for timing: a profiler slows everything down, and at the end it waits for the GPU.

    Compiled code is seen where it runs if the backend launches an op of ours (`cpu`), else once, when it is traced.

    Raises:
        ArgumentError: ``kernels=True`` while a profiler is running: there is one for a process.

    Examples:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 2, enable_nested_tensor=False)
        >>> report = enable(encoder)
        >>> with record(encoder) as log, use_backend("cpu"):
        ...     out = encoder(torch.randn(2, 5, 16), src_key_padding_mask=torch.arange(5) >= torch.tensor([5, 3])[:, None])
        >>> [(call.module, call.rows) for call in log]
        [('layers.0.self_attn', 8), ('layers.1.self_attn', 8)]
    """
    log = Record(model, profiles=kernels)
    profile = Profile()
    try:
        with opened(state.records, log), profiled(_RANGE) if kernels else nullcontext(profile) as profile:
            yield log
    finally:
        if kernels:
            log.attach_profile(profile)


@contextmanager
def recorded(plan: Plan, layout: SeqLayout, module: object | None, reason: str | None = None) -> Iterator[None]:
    """Write one call into the open records, and keep the op that it launches silent."""
    rows = layout.total if layout.lengths is not None else layout.num_rows
    call = Call(plan.backend, plan.kernel, plan, None, rows, layout.batch_size * layout.padded_len, reason=reason, layout=layout)
    before = state.recorded

    def undo() -> None:
        state.recorded = before

    with undone(undo), _written(call, module):
        state.recorded = True
        yield


def recorded_padded(module: object, query: Tensor, key: Tensor, value: Tensor, kernel: str, reason: str) -> AbstractContextManager[object]:
    """Write a call that a module computes the dense way, on ``(B, S, N, H)`` tensors, into the open records; surround it with this."""
    problem = Problem(
        device_type=query.device.type,
        dtype=query.dtype,
        num_heads=query.shape[2],
        num_kv_heads=key.shape[2],
        head_dim=query.shape[3],
        value_head_dim=value.shape[3],
        needs_grad=torch.is_grad_enabled() and query.requires_grad,
    )
    return _written(dense_call(problem, kernel, reason, query.shape[0] * query.shape[1]), module)


def dense_call(problem: Problem, kernel: str, reason: str, slots: int | None, traced: bool = False) -> Call:
    """Of B*S ``slots``, all of which are computed. Its plan is that of the packed call, which did not run, with the reason."""
    plan = replace(choose(problem, all_reasons=True), backend="dense", kernel=kernel, route="dense", route_reason=reason)
    return Call("dense", kernel, plan, None, slots, slots, traced=traced, reason=reason)


def write(call: Call, module: object | None) -> None:
    """Into every open record."""
    for log in visible(state.records):
        assert isinstance(log, Record)
        log.add(call, module)


def _written(call: Call, module: object | None) -> AbstractContextManager[object]:
    """The call is in all open records; the range finds its kernels, where one of them looks for kernels."""
    where: AbstractContextManager[object] = nullcontext()
    for log in visible(state.records):
        if isinstance(log, Record) and log.profiles:
            where = torch.profiler.record_function(f"{_RANGE}{len(log)}")
    write(call, module)
    return where
