"""Packing, attention and rotary embeddings against what flash-attn itself tests with, in plain PyTorch.

In the process of ``tests/lane``, because flash-attn cannot be imported in another one without a GPU.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from varlen_attn import SeqLayout, apply_rotary, padded_attention
from varlen_attn.testing.strategies import Batch, HeadShape, batches, head_shapes

if os.environ.get("FLASH_ATTENTION_TRITON_AMD_ENABLE") != "TRUE" or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
theirs = pytest.importorskip("flash_attn.bert_padding", reason="needs flash-attn", exc_type=ImportError)
testing = pytest.importorskip("flash_attn.utils.testing", reason="needs flash-attn", exc_type=ImportError)
rotary = pytest.importorskip("flash_attn.layers.rotary", reason="needs flash-attn", exc_type=ImportError)


@given(batch=batches())
def test_packing_is_theirs(batch: Batch) -> None:
    """Rows, their order, offsets and gradients of `unpad_input` and `pad_input`."""
    if not batch.mask.numel():
        return  # theirs has no maximum of nothing
    layout, (mine, other) = batch.layout, (batch.tensor(2, 3, requires_grad=True) for _ in range(2))
    rows, indices, offsets, longest, _ = theirs.unpad_input(other, ~batch.mask)
    packed = layout.pack(mine)
    assert torch.equal(packed, rows)
    assert torch.equal(layout.token_indices, indices)
    assert torch.equal(layout.cu_seqlens, offsets)
    assert layout.cu_seqlens.dtype == offsets.dtype
    assert layout.max_seqlen >= longest
    back, padded = layout.unpack(packed.square()), theirs.pad_input(rows.square(), indices, *batch.mask.shape)
    assert torch.equal(back, padded)
    weights = batch.tensor(2, 3, salt=1)
    assert torch.equal(*(torch.autograd.grad(out, x, weights)[0] for out, x in ((back, mine), (padded, other))))


@given(documents=st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4).filter(any))
def test_documents_are_their_concatenated_sequences(documents: list[list[int]]) -> None:
    size = max(map(sum, documents)) + 1
    lengths = torch.tensor([row + [0] * (size - len(row)) for row in documents])
    ids = torch.tensor([[i + 1 for i, n in enumerate(row) for _ in range(n)] + [0] * (size - sum(row)) for row in documents])
    x = torch.randn(len(documents), size, 2)
    rows, indices, offsets, longest = theirs.unpad_input_for_concatenated_sequences(x, lengths)
    layout = SeqLayout.from_document_ids(ids)
    assert torch.equal(layout.pack(x), rows)
    assert torch.equal(layout.token_indices, indices)
    assert torch.equal(layout.cu_seqlens.long(), offsets.long())
    assert layout.max_seqlen >= longest


SIDE = st.sampled_from((None, 0, 1, 3))


@pytest.mark.parametrize("backend", ["reference", "cpu", "sdpa_padded"])
@given(data=st.data(), batch=batches(("right",)), shape=head_shapes())
def test_results_are_those_of_their_reference(backend: str, data: st.DataObject, batch: Batch, shape: HeadShape) -> None:
    """Cross-attention of any lengths, causal and with windows aligned to the end of the keys, softcap, grouped heads, and sinks."""
    keys = data.draw(batches(("right",), batch=len(batch.mask)))
    if not batch.mask.numel() or not keys.mask.numel():
        return
    causal, left, right = data.draw(st.tuples(st.booleans(), SIDE, SIDE))
    softcap = data.draw(st.sampled_from((None, 0.7)))
    sinks = data.draw(st.sampled_from((None, torch.linspace(-1, 1, shape.heads))))
    sizes = ((shape.heads, shape.dim), (shape.kv_heads, shape.dim), (shape.kv_heads, shape.value_dim))
    q, k, v = (b.tensor(*s, dtype=torch.float64, salt=i) for i, (b, s) in enumerate(zip((batch, keys, keys), sizes, strict=True)))
    masks: dict[str, Any] = dict(query_padding_mask=~batch.mask, key_padding_mask=~keys.mask)
    far = None if left is right is None else 99  # theirs takes no limit on both sides, or numbers on both
    window = (far if left is None else left, far if right is None else right)
    want, _ = testing.attention_ref(
        q, k, v, **masks, causal=causal, window_size=window, softcap=softcap or 0.0, learnable_sink=sinks, upcast=False
    )
    want = want.masked_fill(keys.mask.all(1)[:, None, None, None], 0.0)
    options: dict[str, Any] = dict(causal=causal, window=(left, right), softcap=softcap, sinks=sinks, backend=backend)
    got = padded_attention(q, k, v, layout=batch.layout, layout_kv=keys.layout, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 if sinks is not None else 1e-9)  # theirs has sinks in float32


@given(batch=batches(), interleaved=st.booleans(), turned=st.sampled_from((2, 4, 6)))
def test_rotary_is_theirs(batch: Batch, interleaved: bool, turned: int) -> None:
    """At the positions of packed rows, which restart with each sequence."""
    x, positions = batch.layout.pack(batch.tensor(2, 6, dtype=torch.float64)), batch.layout.positions
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, turned, 2, dtype=torch.float64) / turned)
    want = rotary.apply_rotary_emb_torch(x[None], angles.cos()[None], angles.sin()[None], interleaved)[0]
    torch.testing.assert_close(apply_rotary(x, positions, rotary_dim=turned, interleaved=interleaved), want)
