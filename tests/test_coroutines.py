"""Blocks of `use_backend` and `record` belong to a thread and a coroutine, whatever order they end in, compiled or not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch
from torch import Tensor

from varlen_attn import Record, SeqLayout, record, use_backend, varlen_attention
from varlen_attn._state import _around, state

LAYOUT = SeqLayout.from_lengths([3, 2])
X = torch.randn(5, 2, 8)


def attend(x: Tensor = X) -> Tensor:
    out: Tensor = varlen_attention(x, x, x, LAYOUT)
    return out


def ran(call: Callable[[Tensor], Tensor] = attend) -> str:
    """The backend; of compiled code, where nothing but our own op says that it runs, "sdpa_padded" for silence."""
    with record() as log:
        call(X)
    return next((c.backend for c in log if not c.traced), "sdpa_padded")


def run(*coroutines: Coroutine[Any, Any, Any]) -> list[Any]:
    async def main() -> list[Any]:
        return await asyncio.gather(*coroutines)

    results = asyncio.run(main())
    assert (state.orders, state.records, state.traced, _around.get()) == ([], [], (), ())
    assert ran() in ("cpu", "cpu_native")
    return results


class Turns:
    """Coroutines go on when it is their turn."""

    def __init__(self) -> None:
        self.now = 0

    async def wait(self, turn: int) -> None:
        while self.now != turn:
            await asyncio.sleep(0)
        self.now = turn + 1


@pytest.mark.parametrize("compiled", [False, True])
def test_each_coroutine_has_its_own_order(compiled: bool) -> None:
    torch._dynamo.reset()
    turns, call = Turns(), torch.compile(attend, fullgraph=True, backend="eager") if compiled else attend
    seen: list[tuple[int, str]] = []

    async def ordered(name: str, *when: int) -> None:
        await turns.wait(when[0])
        with use_backend(name):
            for turn in when[1:]:
                await turns.wait(turn)
                seen.append((turn, ran(call)))

    async def plain(*when: int) -> None:
        for turn in when:
            await turns.wait(turn)
            seen.append((turn, ran(call)))

    run(ordered("cpu", 0, 3, 5), ordered("sdpa_padded", 1, 4, 7), plain(2, 6, 8))
    auto = ran(call)
    assert seen == list(enumerate([auto, "cpu", "sdpa_padded", "cpu", auto, "sdpa_padded", auto], 2))
    torch._dynamo.reset()


def test_each_coroutine_has_its_own_record() -> None:
    turns = Turns()

    async def recorded(first: int, *when: int) -> Record:
        await turns.wait(first)
        with record() as log:
            for turn in when:
                await turns.wait(turn)
                attend()
        return log

    logs = run(recorded(0, 2, 4, 5), recorded(1, 3, 6))
    assert [len(log) for log in logs] == [3, 2]


def test_coroutines_inherit_what_is_open_around_them_as_long_as_it_is() -> None:
    async def later() -> str:
        await asyncio.sleep(0.01)
        return ran()

    async def main() -> None:
        with use_backend("sdpa_padded"), record() as log:
            assert await asyncio.gather(later(), later()) == ["sdpa_padded"] * 2
            assert await asyncio.to_thread(ran) != "sdpa_padded", "another thread"
            left = asyncio.create_task(later())
            await asyncio.sleep(0)
        assert await left != "sdpa_padded"
        assert len(log) == 2

    run(main())


def test_generators_may_end_in_any_order() -> None:
    def block(name: str) -> Any:
        with use_backend(name):
            yield

    one, two = block("reference"), block("sdpa_padded")
    next(one)
    next(two)
    one.close()
    assert ran() == "sdpa_padded"
    two.close()
    run()


def test_blocks_inside_of_compiled_code() -> None:
    """The inner one is the order there, and outside nothing is left of it."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def inside(x: Tensor) -> Tensor:
        with use_backend("sdpa_padded"), record():
            return attend(x)

    with use_backend("cpu"):
        assert [ran(inside), ran(inside), ran()] == ["sdpa_padded", "sdpa_padded", "cpu"]
    run()
    torch._dynamo.reset()
