"""A short form of ``python -m tests.failing``."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.failing import failing

pytestmark = pytest.mark.native_too


def test_a_failed_allocation_is_an_error_and_leaves_nothing() -> None:
    cases = settings.default.max_examples  # type: ignore[attr-defined]
    found = failing(cases)
    if found is None:
        pytest.skip("needs Linux and a C compiler")
    assert not found.signals
    assert not found.wrong
    raised = sum(n for name, n in found.counts.items() if name.endswith("raised"))
    assert raised > 0.9 * cases, "few of the allocations that failed were those of the call"
