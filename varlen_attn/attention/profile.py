"""Which kernels ran, by `torch.profiler`: for `record(kernels=True)` and for benchmarks."""

from __future__ import annotations

import itertools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .._state import undone
from ..errors import ArgumentError

# What to look for in a profile, the most telling first. Ops that only choose a kernel (`aten::scaled_dot_product_attention`) are not here.
_OPS = (
    r"varlen_attn::\w+(forward|backward)",
    r"aten::_scaled_dot_product_\w+",
    r"aten::_(flash|efficient|cudnn)_attention_(forward|backward)",
    r"aten::_native_multi_head_attention",
    r"flash_attn\w*::\w+(forward|backward)",
    r"aten::_(safe_)?softmax",
)
_CUDA_KERNELS = (r"flash|Flash|fmha|mha_|attention", r"softmax")
_EXPLICIT = re.compile(r"softmax", re.IGNORECASE)
_BACKWARD = re.compile(r"backward|bwd|bprop|cutlassB", re.IGNORECASE)
_MEMORY = "[memory]"
# Copies, fills, memory that is taken or given back, and ranges of ours on a device's timeline.
_NOT_KERNELS = re.compile(r"^(Memcpy|Memset|\[memory\]|varlen_attn( |::\w+$))")


_alone = threading.Lock()


@dataclass
class Profile:
    """What a profiler saw. Filled in when `profiled` ends.

    Attributes:
        kernels: the kernels that a device ran, by name, each once, in order; without a device, torch's and our attention ops.
        by_range: the same for each range (`torch.profiler.record_function`) of ours, by its label.
        peak: the most bytes of torch's allocator that were taken at once, beyond what was there before; on a GPU if there is one in use.
    """

    kernels: tuple[str, ...] = ()
    by_range: dict[str, tuple[str, ...]] = field(default_factory=dict)
    peak: int = 0


@contextmanager
def profiled(prefix: str) -> Iterator[Profile]:
    """Profile what runs inside, backward passes included; ranges whose label starts with ``prefix`` are kept apart.

    Kernels launched by a backward pass belong to no range: autograd launches them later, and on a GPU from a thread of its own.

    Raises:
        ArgumentError: a profiler is running. There is one for the process: a second one, in another thread too, would crash it.
    """
    found, profiler = Profile(), None
    try:
        with _running() as profiler:
            yield found
    finally:
        if profiler is not None:  # it was started
            events = profiler.events() or []
            on_device = [e for e in events if e.device_type.name == "CUDA" and not e.is_user_annotation]
            found.kernels = _kernels(on_device, [e.name for e in events])
            ranges = [e for e in events if e.device_type.name == "CPU" and e.name.startswith(prefix)]
            found.by_range = {e.name: _kernels_below(e) for e in ranges}
            found.peak = _peak(profiler.profiler.kineto_results.events())


@contextmanager
def _running() -> Iterator[Any]:
    """The one profiler of the process, alone, from start to stop."""
    from torch.profiler import ProfilerActivity, profile

    on_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    profiler = profile(activities=activities, acc_events=True, profile_memory=True)
    held: list[bool] = []

    def undo() -> None:
        if not held:
            return
        with _without_stderr():
            if torch.autograd.profiler._is_profiler_enabled:
                if on_cuda:
                    torch.cuda.synchronize()  # kernels are launched without waiting, and those that end later are not seen
                profiler.stop()
        _alone.release() if held.pop() else None

    with undone(undo):
        held += [True] if not torch.autograd.profiler._is_profiler_enabled and _alone.acquire(blocking=False) else []
        if not held:
            raise ArgumentError(
                "`kernels` must be False while a profiler is running, but is True: leave out the outer torch.profiler or "
                "record(kernels=True), also that of another thread."
            )
        with _without_stderr():
            profiler.start()
        yield profiler


def _peak(events: Sequence[Any]) -> int:
    changes: list[tuple[int, int, str]] = sorted((e.start_ns(), e.nbytes(), e.device_type().name) for e in events if e.name() == _MEMORY)
    device = max((name for *_, name in changes), default="")  # CUDA, where something of it was taken
    return max(itertools.accumulate((size for _, size, name in changes if name == device), initial=0))


def _kernels_below(event: Any) -> tuple[str, ...]:
    below = [event]
    for inner in below:  # grows while it is read
        below += inner.cpu_children
    return _kernels([kernel for inner in below for kernel in inner.kernels], [inner.name for inner in below])


def _kernels(on_device: Sequence[Any], ops: Sequence[str]) -> tuple[str, ...]:
    names = [kernel.name for kernel in on_device if not _NOT_KERNELS.match(kernel.name)]
    names = names or [name for name in ops if any(re.match(pattern, name) for pattern in _OPS)]
    return tuple(dict.fromkeys(names))


def short_name(kernel: str) -> str:
    """Without what C++ adds: result type, template and function arguments."""
    short = kernel.removeprefix("void ").split("<")[0].split("(")[0]
    inner = re.search(r"\bFlash\w+", kernel) if short.endswith("device_kernel") else None  # cutlass launches all by one name
    return inner.group() if inner else short


def kernel_ran(call: Callable[[], object]) -> str:
    """The attention kernel that ``call`` runs, by `torch.profiler`: a CUDA kernel if one runs, else the op of torch or of ours.

    Scores written out, then a softmax, is what runs where no kernel is fused; that is said.
    """
    call()  # what is set up at a first call is not of interest
    with _running() as seen:
        call()
    events = seen.key_averages()
    on_device = [e for e in events if e.device_type.name == "CUDA"]
    names = [e.key for e in sorted(on_device, key=lambda e: -e.self_device_time_total)] or [e.key for e in events]
    return pick_kernel(names, _CUDA_KERNELS if on_device else _OPS)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """The profiler's C++ writes two lines there for each profile, whatever its log level; Python's own errors come later."""
    sys.stderr.flush()
    with open(os.devnull, "wb") as nowhere, open(os.dup(2), "wb") as kept, undone(lambda: os.dup2(kept.fileno(), 2)):
        os.dup2(nowhere.fileno(), 2)
        yield


def pick_kernel(names: Sequence[str], patterns: Sequence[str] = _OPS) -> str:
    """The first of ``names`` that the first matching pattern matches, without template arguments."""
    for pattern in patterns:
        for name in names:
            if re.search(pattern, name) and not _BACKWARD.search(name):
                short = short_name(name)
                return f"explicit scores, {short}" if _EXPLICIT.search(short) else short
    return "none known"
