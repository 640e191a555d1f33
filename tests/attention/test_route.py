"""Packed or dense: the rule, what calls do by it, and the padded call of last resort."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from varlen_attn import Problem, SeqLayout, padded_attention, record, route
from varlen_attn.testing import assert_within_budget, reference_attention

from ..nosync import count_reads

CPU = Problem(device_type="cpu", requested="cpu")


@pytest.mark.parametrize(
    ("lengths", "name"), [([16] * 8, "dense"), ([16] * 7 + [15], "packed"), ([16] * 4 + [12] * 4, "packed"), ([0] * 8, "packed")], ids=str
)
def test_dense_is_where_nothing_is_padded(lengths: list[int], name: str) -> None:
    layout = SeqLayout.from_lengths(lengths, 16)
    assert route(layout, CPU).name == name
    x = torch.randn(8, 16, 2, 16)
    with record() as log:
        padded_attention(x, x, x, layout=layout)
    (call,) = log
    assert call.plan is not None
    assert (call.backend, call.plan.route) == ("cpu", name)


def test_the_rule_knows_only_host_facts_and_reads_nothing() -> None:
    layout = SeqLayout.from_lengths([16] * 4 + [12] * 4, 16)
    with count_reads() as reads:
        assert route(layout, CPU) == route(layout, CPU)
    assert not reads
    assert "12% of the batch is padding" in route(layout, CPU).reason
    device_only = SeqLayout.from_key_padding_mask(layout.padding_mask(), capacity=128)
    assert route(device_only, CPU).name == "packed"


@pytest.mark.parametrize("columns", [33, 64, 65, 192, 704])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_attention_is_never_left_to_torch_to_choose(
    columns: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-34: very negative logits under a mask at the lengths where cuDNN, torch's choice on Hopper, returned NaN (pytorch#196678)."""

    def chosen(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("F.scaled_dot_product_attention picks a kernel by itself")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", chosen)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, columns, 1, 64, generator=generator) for _ in range(3))
    mask = torch.zeros(2, columns, dtype=torch.bool)
    mask[1, columns // 2 :] = True
    tensors = [x.to(device, dtype) for x in (0.1 * q, 0.1 * k, v)]
    tensors[0][..., 0], tensors[1][..., 0] = 1.0, -120 * 64**0.5
    tensors = [x.requires_grad_() for x in tensors]
    layout = SeqLayout.from_key_padding_mask(mask).to(device)
    rows = [layout.pack(x) for x in tensors]
    ref, naive = (reference_attention(*rows, layout, dtype=wanted) for wanted in (torch.float64, dtype))
    ref_grads, naive_grads = (torch.autograd.grad(x.sum(), tensors, retain_graph=True) for x in (ref, naive))
    out = padded_attention(*tensors, layout=layout, backend="sdpa_padded")
    assert_within_budget(layout.pack(out), ref, naive)
    for got, want, eager in zip(torch.autograd.grad(out.sum(), tensors), ref_grads, naive_grads, strict=True):
        assert bool(got.isfinite().all())
        if dtype == torch.float32:  # sums that cancel times 960: half precision has no digits left there
            assert_within_budget(got, want.double(), eager, gradient=True)
