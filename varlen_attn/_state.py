"""What `use_backend` and `record` set, for one thread and one coroutine, and blocks that put something back whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch


class Observer(Protocol):
    """Gets to know what our own ops launch."""

    def on_launch(self, backend: str, rows: int) -> None: ...


@dataclass(eq=False)
class Order:
    """A block of `use_backend`: the name of a backend, or the `Backend` itself."""

    backend: Any


class State(threading.local):
    """The blocks that are open in one thread, innermost last. `visible` are those of the coroutine that asks.

    Attributes:
        orders, records, ranks: of `use_backend`, `record` and `sequence_parallel`.
        traced: those of them that were opened while tracing, where no coroutine changes.
        recorded: the caller has recorded the call already, so that the op it launches stays silent.
    """

    def __init__(self) -> None:
        self.orders: list[Order] = []
        self.records: list[Observer] = []
        self.ranks: list[Any] = []
        self.traced: tuple[Any, ...] = ()
        self.recorded = False


state = State()
# Blocks around the coroutine that runs, or around what started it. Some may be closed, or open in another thread.
_around: ContextVar[tuple[Any, ...]] = ContextVar("varlen_attn", default=())

T = TypeVar("T")


@contextmanager
def opened(blocks: list[T], block: T) -> Iterator[T]:
    """``block`` is among ``blocks``. Coroutines leave theirs in any order, so leaving takes away this one, and brings back nothing."""
    tracing = torch.compiler.is_compiling()  # a ContextVar does not trace

    def undo() -> None:
        blocks[:] = [other for other in blocks if other is not block]
        if tracing:
            state.traced = tuple(other for other in state.traced if other is not block)
        else:
            _around.set(tuple(other for other in _around.get() if other is not block))

    with undone(undo):
        if tracing:
            state.traced = (*state.traced, block)
        else:
            _around.set((*_around.get(), block))
        blocks.append(block)
        yield block


def visible(blocks: list[T]) -> list[T]:
    """Those that are open around the caller: in this thread and in this coroutine."""
    around = {id(block) for block in (*_around.get(), *state.traced)}
    return [block for block in blocks if id(block) in around]


def __getattr__(name: str) -> Any:
    """``order``: what the innermost `use_backend` around the caller requests, or None; ``ranks``: of the innermost `sequence_parallel`. An
    attribute of a module is read by Python while tracing, and again each time before compiled code runs: so it may be another for each
    coroutine."""
    if name == "order":
        orders = visible(state.orders)
        return orders[-1].backend if orders else None
    if name == "ranks":
        return next(reversed(visible(state.ranks)), None)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
