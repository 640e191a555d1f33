"""A short form of ``make soak``, and that it sees what it is for."""

from __future__ import annotations

import multiprocessing
import random
import sys

import pytest

from tests import soak
from varlen_attn import enable


def test_many_threads_call_while_another_enables_and_disables() -> None:
    found = soak.soak(160, threads=16)
    assert found.calls == 160
    assert not found.wrong


def test_a_process_that_is_forked_after_use_gives_the_same() -> None:
    """With one thread. With more, torch's own attention hangs in the child."""
    work = soak.Work()
    for model in work.models.values():
        enable(model)

    def calls() -> None:
        sys.exit(any(work.compare(random.Random(index), index) for index in range(12)))

    with pytest.raises(SystemExit, match=r"^False$"):
        calls()
    child = multiprocessing.get_context("fork").Process(target=calls)
    child.start()
    child.join(120)
    assert child.exitcode == 0


def test_nothing_grows() -> None:
    found = soak.soak(120, threads=1, change=False)
    assert not found.wrong
    assert found.growth()[0] < 10


def test_a_leak_and_a_wrong_result_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    compare = soak.Work.compare

    def leaks(*args: object) -> str | None:
        kept.extend([] for _ in range(50))
        return compare(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(soak.Work, "compare", leaks)
    monkeypatch.setattr(soak, "TOLERANCE", 0.0)
    found = soak.soak(40, threads=1, change=False)
    assert found.growth()[0] > 25
    assert any("differs" in problem for problem in found.wrong)
