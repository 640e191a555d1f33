"""Activation checkpoints: recomputation chooses, packs and drops as the first forward did (R-41)."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from varlen_attn import SeqLayout, VarlenMultiheadAttention, VarlenTransformerEncoderLayer, padded_attention, use_backend, varlen_mha

B, S, D, N = 3, 7, 16, 4


class Block(nn.Module):
    """Every kind of call of ours, one after another, with dropout in each."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layer = VarlenTransformerEncoderLayer(D, N, 32, dropout=dropout, batch_first=True)
        self.attn = VarlenMultiheadAttention(D, N, dropout=dropout, batch_first=True)
        self.weight, self.dropout = nn.Parameter(torch.randn(3 * D, D) / 4), dropout

    def forward(self, x: Tensor, given: dict[str, Any]) -> Tensor:
        layer = {"src_key_padding_mask" if k == "key_padding_mask" else k: v for k, v in given.items()}
        x = self.layer(x, **layer)
        x = x + self.attn(x, **given, is_causal=True)[0]
        x = x + varlen_mha(x, num_heads=N, in_proj_weight=self.weight, dropout_p=self.dropout, training=self.training, **given)
        q = x.unflatten(-1, (N, -1))
        return x + padded_attention(q, q[:, :, ::2], q[:, :, ::2], dropout_p=self.dropout, **given).flatten(2)


def gradients(block: Block, x: Tensor, given: dict[str, Any], autocast: bool, use_reentrant: bool | None) -> list[Tensor]:
    torch.manual_seed(7)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        if use_reentrant is None:
            out = block(leaf, given)
        else:
            out = checkpoint(lambda x: block(x, given), leaf, use_reentrant=use_reentrant)
    block.zero_grad()
    out.float().sin().sum().backward()
    return [out, *(t.grad for t in (leaf, *block.parameters()))]  # type: ignore[misc]


@pytest.mark.filterwarnings("ignore:(row .|every row) of the mask")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_fifty_of_fifty(use_reentrant: bool, dropout: float) -> None:
    """R-41: bitwise the gradients without a checkpoint, in 50 random settings of lengths, layouts, autocast and backend."""
    draw, matched = random.Random(0), 0
    for seed in range(50):
        torch.manual_seed(seed)
        block, x = Block(dropout), torch.randn(B, S, D)
        lengths = [draw.randint(0, S) for _ in range(B)]
        mask = torch.arange(S) >= torch.tensor(lengths)[:, None]
        given: dict[str, Any] = draw.choice(
            (
                {"key_padding_mask": mask.flip(1)},
                {"layout": SeqLayout.from_lengths(lengths, S)},
                {"layout": SeqLayout.from_key_padding_mask(mask, capacity=B * S)},
            )
        )
        autocast, backend = draw.random() < 0.5, draw.choice(("auto", "sdpa_padded"))
        with use_backend(backend):  # around backward too, as documented
            want, got = (gradients(block, x, given, autocast, way) for way in (None, use_reentrant))
        matched += all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert not dropout or mask.all() or not torch.equal(want[0], block.eval()(x, given)), "dropout drops"
    assert matched == 50


def test_the_comparison_can_fail() -> None:
    """The control: a recomputation that draws other numbers gives other gradients."""
    torch.manual_seed(0)
    block, x = Block(0.4), torch.randn(B, S, D)
    given = {"layout": SeqLayout.from_lengths([7, 3, 5], S)}

    results = []
    for preserve in (True, False):
        torch.manual_seed(7)
        leaf = x.clone().requires_grad_()
        checkpoint(lambda x: block(x, given), leaf, use_reentrant=True, preserve_rng_state=preserve).sum().backward()
        results.append(leaf.grad)
    assert not torch.equal(*results)
