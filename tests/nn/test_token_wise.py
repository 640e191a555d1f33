"""The feed-forward in pieces: the same numbers, and whole wherever somebody could tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from varlen_attn import VarlenTransformerEncoderLayer
from varlen_attn.nn import token_wise as _token_wise
from varlen_attn.testing import assert_within_budget

ROWS = 700


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> VarlenTransformerEncoderLayer:
    """With pieces of 256 rows, the least."""
    monkeypatch.setattr(_token_wise, "_PIECE", 1)
    torch.manual_seed(0)
    return VarlenTransformerEncoderLayer(16, 2, 64, batch_first=True, activation="gelu").eval()


def calls(layer: Any, x: Tensor) -> tuple[Tensor, list[int]]:
    """The result, and the rows of each call."""
    seen: list[int] = []

    def feed_forward(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        out: Tensor = layer._ff_block(rows)
        return out

    return _token_wise.chunked_feed_forward(layer, x, feed_forward), seen


def test_pieces_give_the_same_numbers(layer: VarlenTransformerEncoderLayer) -> None:
    x = torch.randn(ROWS, 16)
    with torch.no_grad():
        out, seen = calls(layer, x)
        whole = layer._ff_block(x)
        truth = layer.double()._ff_block(x.double())
    assert seen == [256, 256, 188]
    assert_within_budget(out, truth, whole)


def test_a_stack_that_is_large_enough_is_cut_and_agrees_with_training(layer: VarlenTransformerEncoderLayer) -> None:
    layer = layer.double()
    layer.self_attn.dropout = 0.0
    for module in layer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = torch.randn(2, 400, 16, dtype=torch.float64)
    mask = torch.arange(400) >= torch.tensor([[400], [300]])
    with torch.no_grad():
        out = layer(x, src_key_padding_mask=mask)
    torch.testing.assert_close(out, layer.train()(x, src_key_padding_mask=mask), rtol=0, atol=1e-12)


class _Doubled(VarlenTransformerEncoderLayer):
    def _ff_block(self, x: Tensor) -> Tensor:
        return 2 * super()._ff_block(x)


CHANGES: dict[str, Callable[[Any], object]] = {
    "training": lambda layer: layer.train(),
    "a hook": lambda layer: layer.linear1.register_forward_hook(lambda *a: None),
    "a module of one's own": lambda layer: setattr(layer, "linear2", nn.Sequential(nn.Linear(64, 16))),
    "an activation of one's own": lambda layer: setattr(layer, "activation", lambda x: x.relu()),
    "a replaced forward": lambda layer: setattr(layer.linear1, "forward", layer.linear1.forward),
    "a replaced block": lambda layer: setattr(layer, "_ff_block", layer._ff_block),
    "an overridden block": lambda layer: setattr(layer, "__class__", _Doubled),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whole_where_somebody_could_tell(layer: VarlenTransformerEncoderLayer, change: str) -> None:
    CHANGES[change](layer)
    with torch.no_grad():
        assert calls(layer, torch.randn(ROWS, 16))[1] == [ROWS]


def test_whole_where_gradients_or_few_rows_are(layer: VarlenTransformerEncoderLayer) -> None:
    assert calls(layer, torch.randn(ROWS, 16))[1] == [ROWS], "gradients need the inner rows"
    with torch.no_grad():
        assert calls(layer, torch.randn(511, 16))[1] == [511]
        assert calls(layer, torch.randn(2, 400, 16))[1] == [2]
