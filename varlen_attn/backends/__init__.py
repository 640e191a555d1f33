"""The backends, in the order in which they are preferred: the first that accepts a problem runs it."""

from __future__ import annotations

from .base import Backend
from .cpu import Cpu
from .reference import Reference
from .sdpa_padded import SdpaPadded

__all__ = ["BACKENDS"]

BACKENDS: tuple[Backend, ...] = (
    Cpu(),  # the only packed path of a CPU
    SdpaPadded(),  # any device, any option: slow, never wrong
    Reference(),  # by name only
)
