"""`_fused_rows` where its kernel does not run: off by default, asked for in the environment, and its formula in plain PyTorch.

The kernel itself: tests/lane/test_fused_rows.py.
"""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from varlen_attn import SeqLayout, _fused_rows
from varlen_attn.functional import pack_rows_together
from varlen_attn.testing.strategies import Batch, batches

from .test_imports import fresh


def test_it_is_off_and_triton_is_not_imported() -> None:
    code = """
        import sys, torch, varlen_attn as va
        from varlen_attn import _fused_rows
        x = torch.randn(2, 2, 3, 4)
        va.padded_attention(x, x, x, torch.tensor([[False, True], [False, False]]))
        print("triton.language" in sys.modules, "varlen_attn._fused_rows_kernel" in sys.modules, _fused_rows.why_not())
    """
    assert fresh(code).strip() == "False False is off: VARLEN_ATTN_TRITON=1 turns it on"
    for value in ("0", "yes"):
        assert "is off" in fresh(code, VARLEN_ATTN_TRITON=value)
    if not torch.cuda.is_available():
        asked = fresh(code, VARLEN_ATTN_TRITON="1")
        assert asked.strip() == "False False needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1)"


def test_a_cpu_and_a_machine_without_triton_are_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fused_rows, "setting", "1")
    monkeypatch.setattr(_fused_rows, "_INTERPRETED", False)
    assert not _fused_rows.serves(torch.randn(2, 3))
    monkeypatch.setattr(_fused_rows, "_INTERPRETED", True)
    real = builtins.__import__

    def without_triton(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if "_fused_rows_kernel" in (fromlist or ()):
            raise ImportError("No module named 'triton'")
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", without_triton)
    assert _fused_rows.why_not() == "needs triton, which does not import (No module named 'triton')"
    assert not _fused_rows.serves(torch.randn(2, 3))


@given(batch=batches(), slack=st.one_of(st.none(), st.integers(0, 3)), pad_value=st.sampled_from((0, -1.5, float("inf"))))
def test_the_formula_packs_and_unpacks(batch: Batch, slack: int | None, pad_value: float) -> None:
    capacity = None if slack is None else batch.layout.num_rows + slack
    layout = SeqLayout.from_key_padding_mask(batch.mask, capacity=capacity, validate=False)
    packed_rows, padded_rows = layout._rows()
    x, y = batch.tensor(3), torch.randn(layout.num_rows, 2)
    y[batch.layout.num_rows :] = float("nan")
    (packed,) = _fused_rows.move(packed_rows, padded_rows, (x.flatten(0, 1),))
    assert torch.equal(packed, layout.pack(x))
    (padded,) = _fused_rows.move(padded_rows, packed_rows, (y,), pad_value)
    assert torch.equal(padded.view(*batch.mask.shape, 2), layout.unpack(y, pad_value))
    for one, other in zip(pack_rows_together(layout, x=x, y=2 * x), (packed, 2 * packed), strict=True):
        assert torch.equal(one, other)


@given(batch=batches(max_batch=2, max_len=3), slack=st.one_of(st.none(), st.integers(0, 2)))
@settings(max_examples=10)
def test_derivatives_of_the_formula(batch: Batch, slack: int | None) -> None:
    capacity = None if slack is None else batch.layout.num_rows + slack
    layout = SeqLayout.from_key_padding_mask(batch.mask, capacity=capacity, validate=False)
    packed_rows, padded_rows = layout._rows()
    xs = [torch.randn(batch.mask.numel(), n, dtype=torch.float64, requires_grad=True) for n in (1, 2)]
    ys = [torch.randn(layout.num_rows, n, dtype=torch.float64, requires_grad=True) for n in (1, 2)]
    if batch.mask.numel() and layout.num_rows:
        assert gradcheck(lambda *xs: _fused_rows.move(packed_rows, padded_rows, xs), xs)
        assert gradcheck(lambda *ys: _fused_rows.move(padded_rows, packed_rows, ys, 2.0), ys)
