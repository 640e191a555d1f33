"""Inside torch's `context_parallel` attention has to see the columns of other ranks. What computes it here does not, and says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from varlen_attn import NoBackend, VarlenTransformerEncoderLayer, enable, padded_attention, varlen_mha

PADDING = torch.arange(200) >= torch.tensor([200, 50, 20, 9])[:, None]
pytestmark = pytest.mark.filterwarnings("ignore")  # a prototype of torch, which says so


@pytest.fixture
def parallel(tmp_path: Path) -> Iterator[Any]:
    experimental = pytest.importorskip("torch.distributed.tensor.experimental")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    try:
        yield lambda: experimental.context_parallel(mesh, buffers=[torch.ones(4, 200)], buffer_seq_dims=[1])
    finally:
        dist.destroy_process_group()


def test_a_call_is_refused_inside(parallel: Any) -> None:
    x = torch.randn(4, 200, 16)
    layer = VarlenTransformerEncoderLayer(16, 4, 32, batch_first=True)
    rows = x.unflatten(-1, (4, 4))
    calls: list[Callable[[], Any]] = [
        lambda: layer(x, src_key_padding_mask=PADDING),
        lambda: varlen_mha(x, PADDING, num_heads=4),
        lambda: padded_attention(rows[:, :8], rows[:, :8], rows[:, :8], PADDING[:, :8]),  # so little that no layout is made
        lambda: padded_attention(rows, rows, rows, PADDING, causal=True),
    ]
    for call in calls:
        call()
    with parallel():
        for call in calls:
            with pytest.raises(NoBackend, match="no backend sees the columns of other ranks"):
                call()
    for call in calls:
        call()


def test_an_enabled_model_of_transformers_is_refused_where_it_pads(parallel: Any) -> None:
    """Stacks of torch run as they came, because attention was replaced."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = transformers.BertModel(config)
    enable(model)
    with parallel(), pytest.raises(NoBackend, match="no backend sees the columns of other ranks"):
        model(inputs_embeds=torch.randn(4, 200, 16), attention_mask=(~PADDING).long())


def test_who_else_replaces_attention_is_not_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 200, 16)
    expected = varlen_mha(x, PADDING, num_heads=4)
    before = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *given, **options: before(*given, **options))
    torch.testing.assert_close(varlen_mha(x, PADDING, num_heads=4), expected)
