"""Masks of attention as people write them: what packs gives what torch gives, at every row, and what is nothing known is not guessed at."""

from __future__ import annotations

import copy
from functools import partialmethod
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from varlen_attn import VarlenMultiheadAttention, enable, record
from varlen_attn.convert import classes
from varlen_attn.kernels.cpu import build
from varlen_attn.nn import masks
from varlen_attn.nn.multihead import NO_PATTERN

from .strategies import WrittenMask, written_masks
from .test_multihead import E, N, assert_same, blind_rows, pair


def torchs(theirs: nn.MultiheadAttention, query: Tensor, key: Tensor, written: WrittenMask) -> tuple[Tensor, Tensor]:
    """torch's result with every mask as a float one, and which rows see nothing."""
    mask = written.mask
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)
    padding = written.padding
    if padding is not None:
        padding = torch.zeros(padding.shape, dtype=torch.float64).masked_fill(padding, -torch.inf)
    want, _ = theirs(query, key, key, padding, attn_mask=mask.double(), need_weights=True)
    return want, blind_rows(want)


def written(seen: list[str], padded: list[str] | None = None, *, least: bool = False, learned: bool = False) -> WrittenMask:
    """Rows of a mask for all samples, "x" where a query sees a key, and of its padding."""
    hidden = torch.tensor([[c != "x" for c in row] for row in seen])
    low = torch.finfo(torch.float32).min if least else -torch.inf
    mask = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, low) if least or learned else hidden
    padding = None if padded is None else torch.tensor([[c == "x" for c in row] for row in padded])
    return WrittenMask(mask, padding, spoiled=False, learned=learned, packs=False)


@pytest.mark.native_too
@pytest.mark.filterwarnings("ignore:row . of the mask has no token", "ignore:every row of the mask begins", "ignore:Support for mismatched")
@pytest.mark.parametrize("how", ["built", "enabled"])
@given(written=written_masks(N), same=st.booleans(), seed=st.integers(0, 99))
@example(written=written(["xx.", "xx.", "xx.", "xx.", ".x."]), same=False, seed=0)  # the last query is far from the first key
@example(written=written(["x..", "xx.", "xxx"], learned=True), same=True, seed=0)
@example(written=written(["xx.."] * 4, ["....", "xx.."], least=True), same=True, seed=0)  # sees what a finite number hides
@example(written=written(["xx..", "xx..", "..xx", "..xx"], ["..xx", "xx.."]), same=False, seed=0)  # queries of a document without keys
@example(written=written(["xx..", "xx..", "..x.", "xx.."], ["..x.", "xx.."]), same=True, seed=0)  # and one of none, which sees the first
def test_what_people_write_gives_what_torch_gives(how: str, written: WrittenMask, same: bool, seed: int) -> None:
    theirs, ours = pair()
    if how == "enabled":
        ours = copy.deepcopy(theirs)
        enable(ours)
    batch = len(written.padding) if written.padding is not None else len(written.mask) // N if written.mask.dim() == 3 else 2
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(batch, size, E, dtype=torch.float64, generator=generator).requires_grad_() for size in written.mask.shape[-2:])
    same &= x.shape == y.shape
    query, key = (x, x) if same else (x, y)
    with record() as log, patch.object(classes, "_PAYS", 0), patch.object(masks, "_misses", {}):
        if written.learned:
            with torch.no_grad():
                ours(query, key, key, written.padding, need_weights=False, attn_mask=written.mask)
            written.mask.requires_grad_()
        got, _ = ours(query, key, key, written.padding, need_weights=False, attn_mask=written.mask)
    want, blind = torchs(theirs, query, key, written)
    if written.packs and how == "built":
        assert all(call.backend != "dense" for call in log)
    real = ~written.padding if same and written.padding is not None else torch.ones_like(blind)
    counts, blind = real & ~blind, real & blind
    assert not got[~real].any(), "rows at padding are 0"
    if not written.spoiled:  # for all heads alike
        assert_same(got[blind], theirs.out_proj.bias.expand_as(got[blind]), "rows that see nothing")
    assert_same(got[counts], want[counts], "rows")
    hidden = written.mask if written.mask.dtype == torch.bool else written.mask < -1e30
    if written.padding is not None:
        hidden = hidden | written.padding.repeat_interleave(N if hidden.dim() == 3 else 1, 0)[:, None]
    lost = bool(hidden.all(-1).any())
    if blind.any() or not counts.any() or lost:
        return  # torch's gradients are NaN, or scores have no digit beside the numbers that are added to them
    inputs = ([x] if same else [x, y]) + ([written.mask] if written.learned else [])
    wants = torch.autograd.grad(want[counts].square().sum(), [*inputs, *theirs.parameters()])
    gots = torch.autograd.grad(got[counts].square().sum(), [*inputs, *ours.parameters()])
    for a, b in zip(gots, wants, strict=True):
        assert_same(a, b, "gradient")


def merged(lengths: list[int], size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Causal and padding on the left, the diagonal open, for each head."""
    real = torch.arange(size) >= size - torch.tensor(lengths)[:, None]
    seen = (torch.ones(size, size, dtype=torch.bool).tril() & real[:, None]) | torch.eye(size, dtype=torch.bool)
    mask = ~seen.repeat_interleave(N, 0)
    return mask if dtype is None else torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)


def calls(module: Any, mask: Tensor, x: Tensor, **options: Any) -> list[str]:
    with record() as log, torch.no_grad():
        module(x, x.clone(), x, need_weights=False, attn_mask=mask, **options)
    return ["packed" if call.backend != "dense" else call.reason or "" for call in log]


def test_a_mask_is_looked_at_once_until_it_is_written_to() -> None:
    _, ours = pair()
    x, mask = torch.randn(2, 6, E, dtype=torch.float64), merged([6, 3], 6, torch.float64)
    with patch.object(masks, "_find", wraps=masks._find) as find:
        assert calls(ours, mask, x) == calls(ours, mask, x) == ["packed"]
        assert find.call_count == 1
        mask[1, 4, 0] = -torch.inf  # one pair of the second head of the first sample
        assert calls(ours, mask, x) == [NO_PATTERN]
        mask[1, 4, 0] = 0.0
        assert calls(ours, mask, x) == ["packed"]
        assert find.call_count == 3


@pytest.mark.parametrize("inference", [False, True])
def test_enabled_attention_packs_or_runs_as_it_came(inference: bool) -> None:
    attention = nn.MultiheadAttention(64, N, batch_first=True).eval()
    theirs = copy.deepcopy(attention)
    enable(attention)
    x = torch.randn(32, 100, 64)
    with torch.inference_mode(inference):
        mask = merged([100, 30, 20, 10, 4, 3, 1, 2] * 4, 100, torch.float32)
        assert calls(attention, mask, x) == ["packed"]
        mask[3, 50, 50] = 0.5
        assert calls(attention, mask, x) == [f"runs as it came: {NO_PATTERN}"]
        torch.testing.assert_close(attention(x, x, x, attn_mask=mask)[0], theirs(x, x, x, attn_mask=mask)[0])


def test_masks_that_are_nothing_known_are_not_looked_at_for_ever() -> None:
    attention = nn.MultiheadAttention(64, N, batch_first=True).eval()
    enable(attention)
    x = torch.randn(32, 100, 64)
    with patch.object(masks, "_find", wraps=masks._find) as find, patch.object(masks, "_misses", {}):
        for _ in range(40):
            calls(attention, torch.rand(100, 100) < 0.3, x)
        assert find.call_count < 10
        for _ in range(40):
            calls(attention, merged([100, 30, 20, 10, 4, 3, 2, 2] * 4, 100), x)
        assert "packed" in calls(attention, merged([100, 30, 20, 10, 4, 3, 2, 2] * 4, 100), x)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_a_query_without_a_key_gives_the_bias_where_torch_computes(need_weights: bool, same: bool) -> None:
    theirs, _ = pair()
    enable(theirs.eval())
    x = torch.randn(2, 6, E, dtype=torch.float64)
    mask = torch.rand(6, 6) < 0.3
    mask[2] = True
    for padding in (None, torch.tensor([[False] * 6, [False] * 4 + [True] * 2])):
        with torch.no_grad():
            out, weights = theirs(x, x if same else x.clone(), x, padding, need_weights, attn_mask=mask)
        assert_same(out[:, 2], theirs.out_proj.bias.expand_as(out[:, 2]), "the row")
        assert not out.isnan().any()
        assert weights is None or not weights.isnan().any()


KINDS = ("causal", "merged", "window", "causal window", "blocks", "padding")
FORMS = ("bool", "float32", "float64", "bfloat16", "least")


def hidden_by(kind: str, lengths: list[int], size: int, near: int) -> Tensor:
    """``(B, S, S)``, True hides."""
    column = torch.arange(size)
    distance, real = column - column[:, None], column >= size - torch.tensor(lengths)[:, None]
    if kind == "padding":
        return ~real[:, None].expand(-1, size, -1)
    if kind == "merged":
        return ~(((distance <= 0) & real[:, None]) | (distance == 0))
    blocks = column // (near + 2)
    hidden = {
        "causal": distance > 0,
        "window": distance.abs() > near,
        "causal window": (distance > 0) | (distance < -near),
        "blocks": blocks != blocks[:, None],
    }[kind]
    return hidden.expand(len(lengths), -1, -1)


@pytest.mark.native_too
@pytest.mark.parametrize("level", [-1, *(pytest.param(n, marks=pytest.mark.native) for n in (0, 1))])
@given(data=st.data(), kind=st.sampled_from(KINDS), form=st.sampled_from(FORMS), stored=st.sampled_from(("rows", "columns", "apart")))
def test_one_number_that_differs_is_noticed(level: int, data: st.DataObject, kind: str, form: str, stored: str) -> None:
    """At any pair that counts, of any head, whatever the padding beside it hides."""
    size = data.draw(st.integers(3, 150), "size")
    lengths = data.draw(st.lists(st.integers(2, size), min_size=1, max_size=3), "lengths")
    hidden = hidden_by(kind, lengths, size, data.draw(st.integers(1, 9), "near")).repeat_interleave(N, 0)
    dtype = {"least": torch.float32}.get(form) or getattr(torch, form)
    low = torch.finfo(torch.float32).min if form == "least" else -torch.inf
    mask = hidden.clone() if form == "bool" else torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, low)
    mask = {"rows": mask, "columns": mask.mT.contiguous().mT, "apart": torch.stack([mask, mask], 1)[:, 1]}[stored]
    real = torch.arange(size) >= size - torch.tensor(lengths)[:, None]
    padding, own = data.draw(st.sampled_from([(None, False), (~real, False), (~real, True)]), "padding beside it, also of queries")
    forced = partialmethod(build.Library.differs, level=level)

    def found() -> masks.Pattern | None:
        with patch.object(build.Library, "differs", forced), patch.object(masks, "_PART", 1 << 12):
            return masks.pattern_of(mask, padding, len(lengths), mask.device, own=own)

    head, query, key = [data.draw(st.integers(0, n - 1)) for n in mask.shape]
    counts = padding is None or bool(real[head // N, key] and (not own or real[head // N, query]))
    before, was = found(), mask[head, query, key].clone()
    assert before is not None or padding is not None or form == "least"
    mask[head, query, key] = ~was if form == "bool" else data.draw(st.sampled_from((low if was == 0 else 0.0, 1e-3, torch.nan, -1.0)))
    assert not counts or found() is None
    mask[head, query, key] = was
    assert (found() is None) == (before is None)


def test_a_mask_that_is_learned_is_a_bias() -> None:
    theirs, ours = pair()
    x = torch.randn(2, 6, E, dtype=torch.float64)
    for module in (ours, copy.deepcopy(theirs)):
        enable(module)
        mask = merged([6, 3], 6, torch.float64).requires_grad_()
        module(x, x, x, need_weights=False, attn_mask=mask)[0].sum().backward()
        assert mask.grad is not None
        assert "packed" not in calls(module, mask, x), "optimizers need not count that they write to it"


def test_dropout_of_tokens_that_see_only_themselves() -> None:
    ours = VarlenMultiheadAttention(E, N, dropout=0.5, bias=False, batch_first=True, dtype=torch.float64)
    x = torch.randn(1, 400, E, dtype=torch.float64)
    nn.init.eye_(ours.out_proj.weight)
    mask = torch.eye(400, dtype=torch.bool).logical_not().expand(N, -1, -1)
    out, _ = ours(x, x, x, attn_mask=mask)
    value = x @ ours.in_proj_weight[-E:].T
    factor = (out / value).unflatten(-1, (N, -1))
    assert ((factor.abs() < 1e-9) | ((factor - 2).abs() < 1e-9)).all()
    assert_same(factor, factor[..., :1].expand_as(factor), "a head is dropped as a whole")
    assert 300 < factor[..., 0].count_nonzero() < 500


@pytest.mark.parametrize("layout_kv", [False, True])
def test_packed_rows_ask_for_no_weights(layout_kv: bool) -> None:
    from varlen_attn import SeqLayout

    attention = nn.MultiheadAttention(E, N, batch_first=True)
    enable(attention)
    layout = SeqLayout.from_lengths([3, 5])
    rows = torch.randn(8, E)
    options = {"layout_kv": layout} if layout_kv else {}
    assert attention(rows, rows, rows, layout=layout, **options)[1] is None
    assert attention(rows, rows, rows, layout=layout, need_weights=True, **options)[1] is not None
    assert attention(torch.randn(2, 5, E))[1] is not None


def test_a_small_call_says_how_it_packs() -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    x, padding, causal = torch.randn(3, 7, 16), torch.arange(7) >= torch.tensor([7, 3, 5])[:, None], torch.ones(7, 7).triu(1).bool()
    enable(attention, need_weights=False)
    with record() as log:
        attention(x, x, x, padding, attn_mask=causal)
        attention(x, x, x, padding, is_causal=True)
    assert "is_causal=True" in str(log.calls[0].reason)
    assert log.calls[1].rows == 15
