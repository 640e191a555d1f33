"""What `use_backend` and `record` set, for one thread, and blocks that put something back whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Observer(Protocol):
    """Gets to know what our own ops launch."""

    def on_launch(self, backend: str, rows: int) -> None: ...


class State(threading.local):
    """What `use_backend` and `record` set, for one thread. Not a ContextVar: that does not trace, this does and is guarded.

    Attributes:
        override: the name of the backend that the innermost `use_backend` orders, or the `Backend` itself, or None.
        records: the open records, innermost last.
        recorded: the caller has recorded the call already, so that the op it launches stays silent.
    """

    def __init__(self) -> None:
        self.override: Any = None
        self.records: list[Observer] = []
        self.recorded = False


state = State()


@contextmanager
def undone(undo: Callable[[], object]) -> Iterator[None]:
    """Call ``undo`` at the end of a block, and once more in case Ctrl-C came in the middle of it: a second call must do no harm."""
    try:
        try:
            yield
        finally:
            undo()
    finally:
        undo()
