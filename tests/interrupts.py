"""Breaking a call off at any line of the package, as Ctrl-C does or an allocation that fails."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import varlen_attn

PACKAGE = str(Path(varlen_attn.__file__).parent)


class Interrupted(KeyboardInterrupt):
    """As Ctrl-C, but nobody's else."""


@contextmanager
def lines(raise_at: int | None = None, kind: type[BaseException] = Interrupted) -> Iterator[list[str]]:
    """Which lines of the package run; before the line number ``raise_at`` of them an exception is raised."""
    seen: list[str] = []

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            seen.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
            if len(seen) - 1 == raise_at:
                raise kind(f"at {seen[-1]}")
        return local

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace(), threading.gettrace()
    sys.settrace(trace)
    threading.settrace(trace)  # of those that the package starts
    try:
        yield seen
    finally:
        sys.settrace(before[0])
        threading.settrace(before[1])  # type: ignore[arg-type]
