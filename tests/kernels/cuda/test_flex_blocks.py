"""The block mask of flex_attention, made of two numbers a row: against a loop over pairs, without reads, without a tensor of T x Tk."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from varlen_attn import SeqLayout
from varlen_attn.kernels import kept as _kept
from varlen_attn.kernels.cuda import flex_blocks as _flex_blocks
from varlen_attn.kernels.cuda.flex_blocks import Visible, visible_pairs
from varlen_attn.kernels.problem import Semantics
from varlen_attn.testing.strategies import layouts

from ...nosync import count_reads

causal_masks = st.sampled_from((False, "bottom_right", "top_left"))
sides = st.sampled_from((None, 0, 1, 2, 5, 40))


def brute_force(layout_q: SeqLayout, layout_kv: SeqLayout, semantics: Semantics) -> Tensor:
    """``(T, Tk)`` bool, pair by pair, after the words of `varlen_attention`."""
    visible = torch.zeros(layout_q.num_rows, layout_kv.num_rows, dtype=torch.bool)
    cu_q, cu_k = layout_q.cu_seqlens.tolist(), layout_kv.cu_seqlens.tolist()
    left, right = semantics.window or (None, None)
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
        for i in range(q1 - q0):
            at = i if semantics.causal == "top_left" else i + (k1 - k0) - (q1 - q0)
            for j in range(k1 - k0):
                hidden = (semantics.causal and j > at) or (left is not None and j < at - left) or (right is not None and j > at + right)
                visible[q0 + i, k0 + j] = not hidden
    return visible


def pairs(visible: Visible, num_keys: int) -> Tensor:
    keys = torch.arange(num_keys)
    return (keys >= visible.rows.first_T[:, None]) & (keys < visible.rows.end_T[:, None])


def listed(number: Tensor, indices: Tensor) -> Tensor:
    """``(rows, columns)`` bool, as the kernel reads it: that many of the first indices."""
    assert number.dtype == indices.dtype == torch.int32
    assert number.is_contiguous(), "the kernel takes it for contiguous"
    assert indices.is_contiguous(), "the kernel takes it for contiguous"
    dense = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, (n, columns) in enumerate(zip(number[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
        assert len(set(columns[:n])) == n
        dense[row, columns[:n]] = True
    return dense


def check_blocks(visible: Visible, expected: Tensor) -> None:
    """No visible pair is hidden, no full block has a hidden pair, no block is visited in vain; the same by queries and by keys."""
    b, size = visible.blocks, _flex_blocks.BLOCK
    partial, full = listed(b.kv_num_blocks, b.kv_indices), listed(b.full_kv_num_blocks, b.full_kv_indices)
    assert torch.equal(listed(b.q_num_blocks, b.q_indices), partial.T)
    assert torch.equal(listed(b.full_q_num_blocks, b.full_q_indices), full.T)
    assert not (partial & full).any(), "a block is visited once"
    for row in range(partial.shape[0]):
        for column in range(partial.shape[1]):
            block = expected[row * size : (row + 1) * size, column * size : (column + 1) * size]
            assert bool(partial[row, column] | full[row, column]) == bool(block.any())
            assert bool(full[row, column]) == (bool(block.all()) and block.shape[1] == size)


@given(data=st.data(), causal=causal_masks, window=st.one_of(st.none(), st.tuples(sides, sides)), block=st.sampled_from((2, 3, 4)))
def test_pairs_and_blocks_against_a_loop(data: st.DataObject, causal: Any, window: Any, block: int) -> None:
    """Cross-attention, empty sequences, slack rows, sizes that are no multiple of a block."""
    layout_q = data.draw(layouts(max_len=14))
    layout_kv = data.draw(layouts(num_seqs=layout_q.num_seqs, max_len=14)) if data.draw(st.booleans()) else layout_q
    semantics = Semantics.of(causal=causal, window=window)
    expected = brute_force(layout_q, layout_kv, semantics)
    if 0 in expected.shape:
        return  # never asked: the adapter answers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_flex_blocks, "BLOCK", block)
        visible = _flex_blocks._build(layout_q, layout_kv, semantics)
        assert torch.equal(pairs(visible, layout_kv.num_rows), expected)
        check_blocks(visible, expected)


def test_queries_far_beyond_the_last_key_are_in_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flex_blocks, "BLOCK", 2)
    layouts, semantics = (SeqLayout.from_lengths([14, 3]), SeqLayout.from_lengths([1, 2])), Semantics.of(causal="top_left", window=(0, 0))
    check_blocks(visible_pairs(*layouts, semantics), brute_force(*layouts, semantics))


@settings(max_examples=5)
@given(tokens=st.lists(st.sampled_from((0, 1, 60, 127, 128, 129, 300)), min_size=1, max_size=4), causal=causal_masks)
def test_blocks_of_the_real_size(tokens: list[int], causal: Any) -> None:
    layout = SeqLayout.from_lengths([*tokens, 3])
    check_blocks(visible_pairs(layout, layout, Semantics.of(causal=causal)), brute_force(layout, layout, Semantics.of(causal=causal)))


@given(layout=layouts(), data=st.data())
def test_positions_and_the_aligned_key(layout: SeqLayout, data: st.DataObject) -> None:
    layout_kv = data.draw(layouts(num_seqs=layout.num_seqs))
    rows = _flex_blocks._rows(layout, layout_kv, Semantics())
    assert torch.equal(rows.q_positions_T.long(), layout.positions)
    assert torch.equal(rows.k_positions_T.long(), layout_kv.positions)
    offsets, ends = layout_kv.cu_seqlens.tolist(), layout.cu_seqlens.tolist()
    for sequence in range(layout.num_seqs):  # the last query stands at the last key
        if ends[sequence + 1] > ends[sequence]:
            assert int(rows.aligned_T[ends[sequence + 1] - 1]) == offsets[sequence + 1] - 1


# -------------------------------------------------------------------- what it costs


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else [result]
        self.numel = max(self.numel, *(x.numel() for x in results if isinstance(x, Tensor)), 0)
        return result


def test_no_tensor_of_all_pairs() -> None:
    layout = SeqLayout.from_lengths([2000, 70, 0, 6000, 122])
    with Largest() as largest:
        visible_pairs(layout, layout, Semantics.of(causal=True, window=(100, None)))
    assert layout.num_rows == 8192 <= largest.numel < 2 * 8192, "two numbers a row, and 64 x 64 blocks"


@pytest.mark.parametrize("capacity", [None, 300])
def test_nothing_is_read_from_the_device(capacity: int | None) -> None:
    mask = torch.arange(200) >= torch.tensor([[150], [0], [20]])
    layout = SeqLayout.from_key_padding_mask(mask, capacity=capacity, validate=False)
    with count_reads() as reads:
        visible_pairs(layout, layout, Semantics.of(causal=True, window=(3, 4)))
    assert not reads


# -------------------------------------------------------------------- how long it is kept


def test_one_mask_for_all_layers_and_another_for_other_pairs() -> None:
    layout, other = SeqLayout.from_lengths([5, 3]), SeqLayout.from_lengths([2, 9])
    plain = visible_pairs(layout, layout, Semantics())
    assert visible_pairs(layout, layout, Semantics(softcap=3.0, scale=0.1)) is plain, "scores change nothing"
    assert visible_pairs(layout, layout, Semantics(causal="bottom_right")) is not plain
    assert visible_pairs(layout, layout, Semantics(window=(1, 0))) is not plain
    assert visible_pairs(layout, other, Semantics()) is not plain
    assert visible_pairs(SeqLayout.from_lengths([5, 3]), layout, Semantics()) is not plain, "by identity"
    assert visible_pairs(layout, layout, Semantics()) is plain


def test_an_update_in_place_makes_another() -> None:
    mask = torch.tensor([[False] * 4, [False, True, True, True]])
    layout = SeqLayout.from_key_padding_mask(mask, capacity=6)
    keys = SeqLayout.from_key_padding_mask(mask, capacity=6)
    first = [visible_pairs(*both, Semantics()) for both in ((layout, layout), (layout, keys))]
    layout.update_(~mask)
    for both, before in zip(((layout, layout), (layout, keys)), first, strict=True):
        after = visible_pairs(*both, Semantics())
        assert after is not before
        assert torch.equal(pairs(after, 6), brute_force(*both, Semantics()))
        assert visible_pairs(*both, Semantics()) is after


def test_it_goes_with_either_layout() -> None:
    queries, keys = SeqLayout.from_lengths([5, 3]), SeqLayout.from_lengths([2, 9])
    before = len(_kept._kept)
    for layout_kv in (queries, keys):
        visible_pairs(queries, layout_kv, Semantics())
    assert len(_kept._kept) == before + 1
    assert len(_kept._kept[queries]) == 2
    del keys, layout_kv
    gc.collect()
    assert len(_kept._kept[queries]) == 1
    del queries
    gc.collect()
    assert len(_kept._kept) == before


def test_made_in_evaluation_it_serves_training() -> None:
    layout = SeqLayout.from_lengths([5, 3])
    with torch.inference_mode():
        visible = visible_pairs(layout, layout, Semantics())
        unknown = SeqLayout.from_lengths([1]).__class__(**{**vars(layout), "cu_seqlens": layout.cu_seqlens.clone()})
        assert visible_pairs(unknown, unknown, Semantics()) is not visible_pairs(unknown, unknown, Semantics()), "it counts no writes"
    assert not any(x.is_inference() for part in visible for x in part)


def test_nothing_is_kept_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay computes it from the layout: kept from before, it would be that of the first batch for ever."""
    layout = SeqLayout.from_lengths([5, 3])
    before = visible_pairs(layout, layout, Semantics())
    monkeypatch.setattr(_kept, "is_captured", lambda x: True)
    captured = visible_pairs(layout, layout, Semantics())
    assert captured is not before
    monkeypatch.undo()
    assert visible_pairs(layout, layout, Semantics()) is before
