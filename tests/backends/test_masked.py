"""The padded call on a GPU's memory-efficient kernel: what the kernel is given, shown by a stand-in for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varlen_attn import SeqLayout, varlen_attention
from varlen_attn.backends._masked import _efficient_cuda
from varlen_attn.backends.mem_efficient import MemEfficient

from .stand_ins import for_cpu, on_cpu


def test_a_mask_of_padding_is_not_written_out() -> None:
    seen: list[Tensor] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, compute_lse: bool, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        seen.append(mask)
        weights = (q @ k.transpose(-1, -2) * kwargs["scale"] + mask).softmax(-1)
        return weights @ v, torch.zeros(q.shape[:3]), torch.zeros(()), torch.zeros(())

    q, k, v = (torch.randn(3, 4, 7, 8) for _ in range(3))
    visible = torch.arange(7) < torch.tensor([7, 3, 0])[:, None, None, None]
    with on_cpu(_scaled_dot_product_efficient_attention=kernel):
        out, lse = _efficient_cuda(q, k, v, visible, None, 0.5)
    (mask,) = seen
    assert mask.shape == (3, 4, 7, 7)
    assert mask.stride() == (16, 0, 0, 1), "one row a sequence, whatever the heads and queries, and rows of 16"
    assert bool((mask[2] == 0).all()), "a row that sees nothing is not left to the kernel"
    assert not out[2].any()
    assert bool(lse[2].isneginf().all())
    exact = (q[1] @ k[1, :, :3].transpose(-1, -2) * 0.5).softmax(-1) @ v[1, :, :3]
    torch.testing.assert_close(out[1], exact)


def test_empty_sequences_of_self_attention_move_nothing() -> None:
    """They have no rows: only offsets change for a kernel that mishandles them."""
    here, seen = for_cpu(MemEfficient), []

    class Looking(type(here)):  # type: ignore[misc]
        def run(self, query: Tensor, key: Tensor, value: Tensor, layout_q: SeqLayout, *rest: Any) -> Any:
            seen.append((query.data_ptr(), key.data_ptr(), value.data_ptr(), layout_q.lengths))
            return query.clone(), None

    q, k, v = (torch.randn(7, 2, 8) for _ in range(3))
    out = varlen_attention(q, k, v, SeqLayout.from_lengths([3, 0, 4]), backend=Looking())
    assert seen == [(q.data_ptr(), k.data_ptr(), v.data_ptr(), (3, 4))]
    assert torch.equal(out, q)
