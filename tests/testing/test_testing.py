"""The helpers that compare must be able to fail."""

from __future__ import annotations

import pytest
import torch

from varlen_attn import SeqLayout, varlen_attention
from varlen_attn.testing import assert_within_budget, poison, reference_attention


def _case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layout = SeqLayout.from_lengths([5, 3, 9])
    q = torch.randn(17, 2, 16, dtype=dtype)
    out = varlen_attention(q, q, q, layout)
    return out, reference_attention(q, q, q, layout), reference_attention(q, q, q, layout, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_budget_accepts_ours_and_refuses_mutants(dtype: torch.dtype) -> None:
    out, ref, naive = _case(dtype)
    assert_within_budget(out, ref, naive)
    mutants = {
        "scaled": out * (1 + 40 * torch.finfo(dtype).eps),
        "one wrong element": out.clone().index_fill_(0, torch.tensor([3]), 0.0),
        "nan": out.clone().fill_(float("nan")),
        "shifted rows": out.roll(1, 0),
        "inf": out.clone().index_fill_(0, torch.tensor([0]), float("inf")),
    }
    for name, mutant in mutants.items():
        with pytest.raises(AssertionError):
            assert_within_budget(mutant, ref, naive, what=name)


def test_budget_refuses_other_shapes_and_a_reference_that_is_not_float64() -> None:
    out, ref, naive = _case(torch.float32)
    with pytest.raises(AssertionError, match="shapes"):
        assert_within_budget(out[:-1], ref, naive)
    with pytest.raises(AssertionError, match="float64"):
        assert_within_budget(out, ref.float(), naive)


def test_poison_fills_padding_only() -> None:
    x = torch.zeros(2, 3, 4)
    mask = torch.tensor([[False, True, True], [False, False, False]])
    poisoned = poison(x, mask)
    assert poisoned[0, 1:].isnan().all()
    assert not poisoned[0, 0].isnan().any()
    assert not poisoned[1].isnan().any()
    assert not x.isnan().any(), "the input is not touched"
