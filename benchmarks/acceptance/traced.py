"""What a call does on a device, by `torch.profiler`: kernels, copies, waiting. On a CPU, the operations of torch and ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from varlen_attn.attention.profile import _without_stderr

__all__ = ["Trace", "kernels_of", "sorted_out", "trace"]

_OPERATION = re.compile(r"^\w+::\w+$")
_COPY = re.compile(r"^Mem(cpy|set)")
_WAITS = re.compile(r"^cuda(Stream|Event)Synchronize$|^cudaMemcpy$")


class Trace(NamedTuple):
    """Names, in the order of their begin.

    Attributes:
        kernels: on the device; on a CPU its operations.
        copies: between host and device, such as "Memcpy DtoH (Device -> Pageable)".
        waits: calls of the CUDA runtime that wait for the device.
    """

    kernels: tuple[str, ...]
    copies: tuple[str, ...]
    waits: tuple[str, ...]


def trace(call: Callable[[], object], device: str) -> Trace:
    """Of one call, after one that sets up whatever a first call sets up."""
    from torch.profiler import ProfilerActivity, profile

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    call()
    wait()
    with _without_stderr(), profile(activities=activities, acc_events=True) as seen:
        call()
        wait()
    return sorted_out([(e.name, e.device_type.name, e.is_user_annotation) for e in sorted(seen.events() or (), key=_begin)], device)


def _begin(event: Any) -> float:
    return float(event.time_range.start)


def sorted_out(events: Sequence[tuple[str, str, bool]], device: str) -> Trace:
    """From names, "CUDA" or "CPU", and whether somebody's annotation is meant, which shows on a device too and is no kernel."""
    own = [(name, where) for name, where, annotation in events if not annotation]
    on_device, on_host = ([name for name, where in own if where == side] for side in ("CUDA", "CPU"))
    copies = [name for name in on_device if "HtoD" in name or "DtoH" in name]
    operations = [name for name in on_host if _OPERATION.match(name)]
    kernels = [name for name in on_device if not _COPY.match(name)] if device == "cuda" else operations
    return Trace(tuple(kernels), tuple(copies), tuple(name for name in on_host if _WAITS.match(name)))


def kernels_of(call: Callable[[], object], device: str) -> tuple[str, ...]:
    """The device kernels that a call ran, each once; on a CPU the operations."""
    return tuple(dict.fromkeys(trace(call, device).kernels))
