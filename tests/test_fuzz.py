"""A short form of ``python -m tests.fuzz``, and that it sees what is wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from tests import fuzz
from varlen_attn.kernels import sdpa_padded

pytestmark = pytest.mark.native_too


def test_random_calls() -> None:
    found = fuzz.fuzz(settings.default.max_examples)  # type: ignore[attr-defined]
    assert not found.wrong
    assert found.outcomes["cpu ran"] == found.problems


@pytest.mark.parametrize("what", ["one number", "all rows"])
def test_a_wrong_number_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = sdpa_padded.attend_dense

    def wrong(*args: object, **options: object) -> tuple[torch.Tensor, ...]:
        out, *rest = attend(*args, **options)  # type: ignore[arg-type]
        change = torch.zeros_like(out)
        (change.view(-1)[-1:] if what == "one number" else change).fill_(0.01)
        return (out + change, *rest)

    monkeypatch.setattr(sdpa_padded, "attend_dense", wrong)
    assert "sdpa_padded" in fuzz.fuzz(200, backends=["sdpa_padded"]).wrong[0]
