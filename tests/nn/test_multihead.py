"""`VarlenMultiheadAttention` against `nn.MultiheadAttention`: same weights, same arguments, same results at real tokens."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from varlen_attn import ArgumentError, BackendRefused, LayoutError, SeqLayout, VarlenMultiheadAttention, record, use_backend, varlen_mha
from varlen_attn.nn.multihead import _Inputs
from varlen_attn.testing import poison
from varlen_attn.testing.strategies import Batch, batches, mask_dtypes

from ..nosync import count_reads

E, N = 8, 2
CONSTRUCTORS: tuple[dict[str, Any], ...] = (
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 5, "vdim": 7},
    {"kdim": 5, "vdim": 7, "bias": False},
)


def pair(
    batch_first: bool = True, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[nn.MultiheadAttention, VarlenMultiheadAttention]:
    """torch's module and ours with one set of weights, biases not zero."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, N, batch_first=batch_first, dtype=dtype, **options)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.4)
    ours = VarlenMultiheadAttention(E, N, batch_first=batch_first, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def assert_same(got: Tensor, want: Tensor, what: str) -> None:
    error = (got - want).abs().max().item() if want.numel() else 0.0
    assert got.shape == want.shape, what
    assert error < 1e-9, f"{what}: {error}"


def blind_rows(want: Tensor) -> Tensor:
    """Rows that torch answers with NaN: no key is visible."""
    return want.isnan().any(-1)


MASKS: dict[str, Callable[[int, int, int, Tensor], dict[str, Any]]] = {
    "none": lambda b, lq, lk, pad: {},
    "bool": lambda b, lq, lk, pad: {"key_padding_mask": pad},
    "float": lambda b, lq, lk, pad: {"key_padding_mask": torch.zeros(b, lk, dtype=torch.float64).masked_fill(pad, -torch.inf)},
    "additive": lambda b, lq, lk, pad: {"key_padding_mask": torch.randn(b, lk, dtype=torch.float64)},
    "2-D float": lambda b, lq, lk, pad: {"attn_mask": torch.randn(lq, lk, dtype=torch.float64)},
    "3-D bool": lambda b, lq, lk, pad: {"attn_mask": torch.rand(b * N, lq, lk) < 0.3},
    "both": lambda b, lq, lk, pad: {"attn_mask": torch.rand(lq, lk) < 0.3, "key_padding_mask": pad},
    "causal": lambda b, lq, lk, pad: {"attn_mask": torch.ones(lq, lk, dtype=torch.bool).triu(1), "is_causal": True},
    "causal + bool": lambda b, lq, lk, pad: {
        "attn_mask": torch.ones(lq, lk, dtype=torch.bool).triu(1),
        "is_causal": True,
        "key_padding_mask": pad,
    },
    "wrong hint": lambda b, lq, lk, pad: {"attn_mask": torch.rand(lq, lk) < 0.3, "is_causal": True, "key_padding_mask": pad},
}


@pytest.mark.parametrize("form", MASKS)
@pytest.mark.parametrize("options", CONSTRUCTORS, ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_matches_torch_forward_and_every_gradient(options: dict[str, Any], form: str, batch_first: bool) -> None:
    """R-16, R-26, R-27, R-46: all constructor options and masks, self- and cross-attention, with and without weights."""
    theirs, ours = pair(batch_first, **options)
    b, lq = 3, 6
    for lk, cross in ((6, False), (6, True), (5, True)):
        if not cross and "kdim" in options:
            continue
        padding = torch.zeros(b, lk, dtype=torch.bool)
        padding[0, 3:] = True
        padding[1, 0] = True
        masks = MASKS[form](b, lq, lk, padding)
        order = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
        query = order(torch.randn(b, lq, E, dtype=torch.float64)).requires_grad_()
        key = order(torch.randn(b, lk, theirs.kdim, dtype=torch.float64)) if cross else query
        value = order(torch.randn(b, lk, theirs.vdim, dtype=torch.float64)) if cross else query
        for need_weights in (False, True):
            # Without the hint torch uses the mask itself: with it, it adds a bias key that the hint then hides.
            hintless = {k: v for k, v in masks.items() if k != "is_causal"}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about mask dtypes, which ours takes in any mix
                want, want_weights = theirs(query, key, value, need_weights=need_weights, **hintless)
            got, weights = ours(query, key, value, need_weights=need_weights, **masks)
            want, got = order(want), order(got)
            real = ~blind_rows(want)
            if not cross and "key_padding_mask" in masks and form != "additive":
                real &= ~padding
                assert not got[padding].any(), "padded rows are exactly 0"
            what = f"{form}, cross={cross}, {lk} keys, weights={need_weights}"
            assert_same(got[real], want[real], what)
            if need_weights:
                assert weights is not None
                assert weights.shape == want_weights.shape
                assert_same(weights[real], want_weights[real], "weights of " + what)
            else:
                assert weights is None
            parameters = [p for p in theirs.parameters() if p.requires_grad]
            # A row that sees nothing has NaN gradients in torch, whatever its weight in the loss: compare where there is none.
            if bool(real.all()) or (not blind_rows(want).any()):
                wants = torch.autograd.grad(want[real].square().sum(), [query, *parameters])
                gots = torch.autograd.grad(got[real].square().sum(), [query, *ours.parameters()])
                for x, y in zip(gots, wants, strict=True):
                    assert_same(x, y, "gradient of " + what)


@pytest.mark.native_too
@given(batch=batches(), data=st.data())
def test_any_mask_form_matches_torch(batch: Batch, data: st.DataObject) -> None:
    """R-15, R-28: any mask in any legal dtype; shapes are the input's, train and eval agree."""
    theirs, ours = pair()
    mask = data.draw(mask_dtypes(batch.mask))
    x = batch.tensor(E, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows without tokens, drawn on purpose
        got, _ = ours(x, key_padding_mask=mask)
        evaluated, _ = ours.eval()(x, key_padding_mask=mask)
    assert got.shape == x.shape
    assert torch.equal(got, evaluated)
    for row in range(len(x)):
        real = ~batch.mask[row]
        if real.any() and x.shape[1]:
            alone = x[row : row + 1, real]
            assert_same(got[row, real], theirs(alone, alone, alone, need_weights=False)[0][0], "a row alone")
        if mask.dtype == torch.bool or bool(torch.isneginf(mask[row][~real]).all()):
            assert not got[row, ~real].any()


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("arbitrary", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_padding_is_not_read_and_gets_no_gradient(need_weights: bool, arbitrary: bool, training: bool) -> None:
    """R-07, R-09, R-10: NaN in padding and a row without tokens, on the packed and on the dense way."""
    _, ours = pair()
    ours.train(training)
    padding = torch.tensor([[False] * 5, [True] * 5, [True, False, False, True, True]])
    attn_mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) < 0.3 if arbitrary else None
    results = []
    for fill in (0.0, float("nan"), float("inf")):
        torch.manual_seed(1)
        x = poison(torch.randn(3, 5, E, dtype=torch.float64), padding, fill).requires_grad_()
        with pytest.warns(UserWarning, match="row 1 of the mask has no token"):
            out, weights = ours(x, key_padding_mask=padding, need_weights=need_weights, attn_mask=attn_mask)
        assert not out[padding].any()
        if weights is not None:
            assert not weights[padding].any()
            assert not weights.transpose(1, 2)[padding].any()
            sums = weights.sum(-1)
            assert bool(((sums - 1).abs() < 1e-9).logical_or(sums == 0).all())
        grads = torch.autograd.grad(out.sum(), [x, *ours.parameters()])
        assert not grads[0][padding].any()
        assert all(bool(g.isfinite().all()) for g in grads)
        results.append((out, *grads))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_a_query_without_keys_gives_the_output_bias() -> None:
    """R-07: cross-attention to a row without tokens; torch gives NaN, with weights even in all its gradients."""
    theirs, ours = pair()
    query = torch.randn(2, 3, E, dtype=torch.float64)
    key = torch.randn(2, 4, E, dtype=torch.float64)
    padding = torch.tensor([[True] * 4, [False] * 4])
    for need_weights in (False, True):
        with pytest.warns(UserWarning, match="no token"):
            out, _ = ours(query, key, key, key_padding_mask=padding, need_weights=need_weights)
        assert_same(out[0], ours.out_proj.bias.expand(3, E), "rows without keys")
        grads = torch.autograd.grad(out.sum(), list(ours.parameters()))
        assert all(bool(g.isfinite().all()) for g in grads)
    assert theirs(query, key, key, key_padding_mask=padding)[0][0].isnan().all(), "torch's answer, which this replaces"


def test_zero_padding_rows_false_keeps_torchs_rows() -> None:
    theirs, _ = pair()
    ours = VarlenMultiheadAttention(E, N, batch_first=True, dtype=torch.float64, zero_padding_rows=False)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, E, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for options in ({}, {"attn_mask": torch.rand(5, 5) < 0.2}, {"need_weights": True}):
        hidden = {"need_weights": False, **options}
        assert_same(ours(x, x, x, padding, **hidden)[0], theirs(x, x, x, padding, **hidden)[0], str(options))


SPLIT: dict[str, Callable[[Any, Callable[..., Tensor]], Callable[..., Tensor]]] = {
    "reentrant checkpoint": lambda module, f: partial(checkpoint, f, use_reentrant=True),
    "checkpoint": lambda module, f: partial(checkpoint, f, use_reentrant=False),
    "full backward hook": lambda module, f: module.register_full_backward_hook(lambda *args: None) and f,
    "detached copies": lambda module, f: lambda q, k, v: f(q, k.detach().requires_grad_(k.requires_grad), v),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("how", SPLIT)
@pytest.mark.filterwarnings("ignore::varlen_attn.LayoutWarning")
@given(batch=batches(max_batch=3, max_len=6), weights=st.booleans(), zero=st.booleans())
def test_self_attention_is_one_memory(how: str, batch_first: bool, batch: Batch, weights: bool, zero: bool) -> None:
    """Checkpoints and hooks hand over several objects for one."""
    _, ours = pair(batch_first)
    ours.zero_padding_rows = zero
    x, factors = (batch.tensor(E, dtype=torch.float64, salt=salt) for salt in range(2))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y if batch_first else y.transpose(0, 1) for y in (q, k, v))
        out, _ = ours(q, k, v, batch.mask, need_weights=weights)
        return out if batch_first else out.transpose(0, 1)

    leaf = x.clone().requires_grad_()
    want = attend(leaf, leaf, leaf)
    (want * factors).sum().backward()
    split = x.clone().requires_grad_()
    got = SPLIT[how](ours, attend)(split, split, split)
    (got * factors).sum().backward()
    assert_same(got, want, "output")
    if how != "detached copies":
        # Without any token nothing is computed of the input, and torch may leave its gradient out.
        got, want = (torch.zeros_like(x) if y.grad is None else y.grad for y in (split, leaf))
        assert_same(got, want, "gradient")


def test_another_key_of_equal_numbers_leaves_every_query_real() -> None:
    theirs, ours = pair()
    x, padding = torch.randn(2, 5, E, dtype=torch.float64), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    want, _ = theirs(x, x, x, padding)
    assert_same(ours(x, x.clone(), x, padding)[0], want, "a copy is another key")


# -------------------------------------------------------------------- inputs of other kinds


def test_unbatched_packed_and_left_out_inputs_agree() -> None:
    theirs, ours = pair()
    x = torch.randn(5, E, dtype=torch.float64)
    padding = torch.tensor([False, False, False, True, True])
    want, _ = theirs(x, x, x, padding, need_weights=False)
    got, weights = ours(x, key_padding_mask=padding, need_weights=True)
    assert_same(got[:3], want[:3], "unbatched")
    assert weights.shape == (5, 5)
    layout = SeqLayout.from_lengths([3, 2])
    packed, _ = ours(x, layout=layout)
    for rows in (slice(0, 3), slice(3, 5)):
        assert_same(packed[rows], ours(x[rows])[0], "packed rows")
    padded = layout.unpack(x)
    assert_same(ours(padded, layout=layout)[0], layout.unpack(packed), "padded with a layout")
    sequence_first = VarlenMultiheadAttention(E, N, dtype=torch.float64)
    sequence_first.load_state_dict(ours.state_dict())
    got, _ = sequence_first(padded.transpose(0, 1), layout=layout)
    assert_same(got.transpose(0, 1), layout.unpack(packed), "a layout is (B, S) whatever batch_first")
    dense, weights = ours(x, layout=layout, need_weights=True)
    assert_same(dense, packed, "packed, the dense way")
    assert weights.shape == (2, 3, 3)


def test_cross_attention_with_two_layouts() -> None:
    theirs, ours = pair()
    layout_q, layout_k = SeqLayout.from_lengths([2, 4], 5), SeqLayout.from_lengths([3, 1], 3)
    query = torch.randn(2, 5, E, dtype=torch.float64)
    key = torch.randn(2, 3, E, dtype=torch.float64)
    got, _ = ours(query, key, layout=layout_q, layout_kv=layout_k)
    want, _ = theirs(query, key, key, key_padding_mask=layout_k.padding_mask(), need_weights=False)
    assert_same(layout_q.pack(got), layout_q.pack(want), "cross")
    assert not got[layout_q.padding_mask()].any()
    with pytest.raises(LayoutError, match="layout_kv"):
        ours(query, key, layout=layout_q)
    with pytest.raises(ArgumentError, match="not both"):
        ours(query, key, key_padding_mask=layout_k.padding_mask(), layout=layout_q)


@pytest.mark.parametrize("left", [False, True])
def test_causal_cross_attention_compares_columns(left: bool) -> None:
    """R-27: with padding before the keys, packed positions are not torch's columns: queries at padding see nothing."""
    theirs, ours = pair()
    query, key = torch.randn(1, 4, E, dtype=torch.float64), torch.randn(1, 4, E, dtype=torch.float64)
    padding = torch.tensor([[left, False, False, not left]])
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    want, _ = theirs(query, key, key, padding, attn_mask=causal, need_weights=False)
    with record() as log:
        got, _ = ours(query, key, key, padding, attn_mask=causal, is_causal=True)
    real = ~blind_rows(want)
    assert_same(got[real], want[real], "causal cross")
    assert log.calls[0].backend != "dense"
    assert_same(got[~real], ours.out_proj.bias.expand_as(got[~real]), "queries without a key")


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_input_comes_back_nested(layout: torch.layout) -> None:
    """R-32: torch's encoder hands nested tensors over in evaluation."""
    _, ours = pair()
    parts = [torch.randn(3, E, dtype=torch.float64), torch.randn(5, E, dtype=torch.float64)]
    nested = torch.nested.as_nested_tensor(parts, layout=layout)
    with torch.no_grad():
        out, weights = ours(nested, nested, nested)
        assert weights is None
        assert out.layout == layout
        (out + nested).unbind()  # shapes are seen as the same
        for got, part in zip(out.unbind(), parts, strict=True):
            assert_same(got, ours(part)[0], "nested")
    if layout == torch.jagged:
        ours(nested, nested, nested)[0].values().sum().backward()
        assert bool(ours.in_proj_weight.grad.abs().sum() > 0)
    else:
        with pytest.raises(AssertionError, match=r"NestedTensor outside of its fast path.*grad is enabled"):
            ours.eval()(nested, nested, nested)


# -------------------------------------------------------------------- inside torch's encoder


def _encoder_input() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    return torch.randn(2, 5, 16), padding


@pytest.mark.native_too
@pytest.mark.parametrize("built", ["layer", "before the swap", "after the swap"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_fast_path_does_not_bypass_it(built: str) -> None:
    """Evaluation without gradients is where torch computes attention from the weights; the forward of ours must be counted."""
    x, padding = _encoder_input()
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0).eval()
    plain = layer if built == "layer" else nn.TransformerEncoder(layer, 2).eval()
    model = copy.deepcopy(plain)

    def swap(owner: nn.TransformerEncoderLayer) -> None:
        ours = VarlenMultiheadAttention(16, 4, batch_first=True)
        ours.load_state_dict(owner.self_attn.state_dict())
        owner.self_attn = ours.eval()

    if built == "layer":
        swap(model)
    elif built == "before the swap":
        for owner in model.layers:
            swap(owner)
    else:
        first = copy.deepcopy(layer)
        swap(first)
        model = nn.TransformerEncoder(first, 2).eval()
    with torch.no_grad(), record() as log:
        got = model(x, src_key_padding_mask=padding)
    want = plain(x, src_key_padding_mask=padding)
    assert len(log.calls) == (1 if built == "layer" else 2)
    assert all(call.module == "VarlenMultiheadAttention" for call in log.calls)
    assert got.shape == x.shape
    assert (got - want)[~padding].abs().max() < 1e-5


@pytest.mark.native_too
@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("mask_check", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_layers_agree_in_training_and_evaluation(side: str, mask_check: bool) -> None:
    """R-15, peers 1c-9 and 1c-10: torch's encoder without its mask check is wrong for left padding in evaluation, and pads otherwise."""
    x, _ = _encoder_input()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, {"left": slice(0, 2), "right": slice(3, 5), "holes": slice(1, 4, 2)}[side]] = True
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    layer.self_attn = VarlenMultiheadAttention(16, 4, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False, mask_check=mask_check)
    trained = encoder.train()(x, src_key_padding_mask=padding)
    with torch.no_grad():
        evaluated = encoder.eval()(x, src_key_padding_mask=padding)
    assert evaluated.shape == x.shape
    assert (trained - evaluated).abs().max() < 1e-5
    alone = encoder(x[1:, ~padding[1]])
    assert (evaluated[1, ~padding[1]] - alone[0]).abs().max() < 1e-5


@pytest.mark.native_too
def test_compiled_encoder_layer_traces_without_breaks() -> None:
    x, padding = _encoder_input()
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    layer.self_attn = VarlenMultiheadAttention(16, 4, batch_first=True)
    want = layer(x, src_key_padding_mask=padding)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = compiled(x, src_key_padding_mask=padding)
    assert (got - want)[~padding].abs().max() < 1e-5
    got[~padding].sum().backward()
    assert layer.self_attn.in_proj_weight.grad is not None


# -------------------------------------------------------------------- orders, records, copies


@pytest.mark.native_too
def test_orders_are_kept() -> None:
    """R-11: an order runs or raises, on the dense way too."""
    _, ours = pair()
    x = torch.randn(2, 4, E, dtype=torch.float64)
    with use_backend("reference"), record() as log:
        ours(x)
    assert log.calls[0].backend == "reference"
    with use_backend("reference"), pytest.raises(BackendRefused, match="weights exist only in the padded"):
        ours(x, need_weights=True)
    with pytest.raises(BackendRefused, match=r"runs on|needs"):
        ours(x, backend="torch_varlen")
    with use_backend("sdpa_padded"):
        assert ours(x, need_weights=True)[1] is not None


@pytest.mark.native_too
def test_the_record_says_what_weights_cost() -> None:
    _, ours = pair()
    x = torch.randn(2, 4, E, dtype=torch.float64)
    with record() as log:
        plain, _ = ours(x)
        with_weights, _ = ours(x, need_weights=True)
        ours(x, attn_mask=torch.randn(4, 4, dtype=torch.float64))
    assert_same(with_weights, plain, "weights do not change the output")
    assert [call.backend for call in log.calls] == ["cpu", "dense", "dense"]
    assert "weights exist only in the padded computation" in log.calls[1].reason
    assert "weights exist only in the padded computation" in str(log)
    assert "attn_mask" in log.calls[2].reason


def test_window_and_backend_of_the_constructor_and_of_the_call() -> None:
    _, ours = pair()
    x = torch.randn(2, 6, E, dtype=torch.float64)
    padding = torch.tensor([[False] * 6, [True] * 2 + [False] * 4])
    windowed = VarlenMultiheadAttention(E, N, batch_first=True, dtype=torch.float64, window=(1, 0), backend="reference")
    windowed.load_state_dict(ours.state_dict())
    i = torch.arange(6)
    band = ~((i[:, None] - i >= 0) & (i[:, None] - i <= 1))
    want, _ = ours(x, key_padding_mask=padding, attn_mask=band)
    for got in (
        windowed(x, key_padding_mask=padding)[0],
        ours(x, key_padding_mask=padding, window=(1, 0))[0],
        windowed(x, key_padding_mask=padding, need_weights=True, backend="auto")[0],
    ):
        assert_same(got, want, "window")
    holes = torch.tensor([[False, True, False, False, False, False]] * 2)
    for need_weights in (False, True):
        with pytest.raises(LayoutError, match="holes='packed'"):
            windowed(x, key_padding_mask=holes, need_weights=need_weights, backend="auto")


@pytest.mark.native_too
def test_dropout_only_in_training() -> None:
    ours = VarlenMultiheadAttention(E, N, dropout=0.5, batch_first=True)
    x = torch.randn(2, 6, E)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    for options in ({}, {"need_weights": True}):
        ours.eval()
        assert torch.equal(ours(x, key_padding_mask=padding, **options)[0], ours(x, key_padding_mask=padding, **options)[0])
        ours.train()
        assert not torch.equal(ours(x, key_padding_mask=padding, **options)[0], ours(x, key_padding_mask=padding, **options)[0])


def test_copies_pickles_and_state_dicts() -> None:
    theirs, ours = pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 4, E, dtype=torch.float64)
    want, _ = ours(x)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
        assert isinstance(other, VarlenMultiheadAttention)
        assert torch.equal(other(x)[0], want)
        assert len(other._forward_pre_hooks) == 1, "the copy still blocks torch's fast path"


@pytest.mark.native_too
def test_autocast_and_mixed_biases() -> None:
    ours = VarlenMultiheadAttention(E, N, batch_first=True)
    x = torch.randn(2, 4, E)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for need_weights in (False, True):
            assert ours(x, need_weights=need_weights)[0].dtype == torch.bfloat16
    ours.in_proj_bias = nn.Parameter(ours.in_proj_bias.half())
    assert ours(x)[0].dtype == torch.float32


# -------------------------------------------------------------------- errors, in torch's words


def _torch_error(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[type[BaseException], str]:
    with pytest.raises((AssertionError, RuntimeError)) as info:
        module(*args, **kwargs)
    return info.type, str(info.value)


@pytest.mark.parametrize(
    "case",
    [
        lambda: ((torch.randn(4, 4, E), torch.randn(4, E), torch.randn(4, 4, E)), {}),
        lambda: ((torch.randn(4, E), torch.randn(4, E), torch.randn(4, 4, E)), {}),
        lambda: ((torch.randn(4),) * 3, {}),
        lambda: ((torch.randn(4, 4, E),) * 3, {"key_padding_mask": torch.zeros(4, dtype=torch.bool)}),
        lambda: ((torch.randn(4, E),) * 3, {"key_padding_mask": torch.zeros(1, 4, dtype=torch.bool)}),
        lambda: ((torch.randn(3, 4, E),) * 3, {"key_padding_mask": torch.zeros(4, 4, dtype=torch.bool)}),
        lambda: ((torch.randn(3, 4, E),) * 3, {"key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)}),
        lambda: ((torch.randn(3, 4, E),) * 3, {"key_padding_mask": torch.zeros(3, 4, dtype=torch.int64)}),
        lambda: ((torch.randn(3, 4, E),) * 3, {"attn_mask": torch.zeros(4, 5, dtype=torch.bool)}),
        lambda: ((torch.randn(3, 4, E),) * 3, {"attn_mask": torch.zeros(5, 4, 4, dtype=torch.bool)}),
        lambda: ((torch.randn(4, E),) * 3, {"attn_mask": torch.zeros(5, 4, 4, dtype=torch.bool)}),
        lambda: ((torch.randn(3, 4, E),) * 3, {"attn_mask": torch.zeros(4, dtype=torch.bool)}),
        lambda: ((torch.randn(3, 4, E + 1),) * 3, {}),
        lambda: ((torch.randn(3, 4, E), torch.randn(3, 4, E), torch.randn(3, 5, E)), {}),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_errors_are_torchs_with_a_fix(case: Callable[[], tuple[tuple[Tensor, ...], dict[str, Any]]], training: bool) -> None:
    """R-15, R-16: class and text of torch, train and eval, also of a mask that would not be used."""
    theirs, ours = pair(dtype=torch.float32)
    theirs.train(training)
    ours.train(training)
    args, kwargs = case()
    kind, text = _torch_error(theirs, *args, need_weights=False, **kwargs)
    our_kind, our_text = _torch_error(ours, *args, **kwargs)
    assert our_kind is kind
    assert our_text.startswith(text.rstrip("."))
    assert "batch_first=True" in our_text


def test_a_mask_of_the_wrong_shape_is_refused_with_a_causal_hint_too() -> None:
    """R-16: torch lets it pass when `is_causal` makes it not look at the mask."""
    _, ours = pair(dtype=torch.float32)
    x = torch.randn(2, 4, E)
    with pytest.raises(RuntimeError, match="2D attn_mask"):
        ours(x, attn_mask=torch.zeros(3, 3, dtype=torch.bool), is_causal=True)


def test_no_warning_about_mixed_mask_types() -> None:
    """torch warns that support for mismatched masks is deprecated; warnings are errors here."""
    _, ours = pair(dtype=torch.float32)
    x = torch.randn(2, 4, E)
    padding = torch.tensor([[False] * 4, [False] * 3 + [True]])
    out, _ = ours(x, key_padding_mask=padding, attn_mask=torch.zeros(4, 4))
    assert not out[padding].any()


def test_is_causal_without_a_mask_means_causal() -> None:
    theirs, ours = pair()
    x = torch.randn(2, 5, E, dtype=torch.float64)
    want, _ = theirs(x, x, x, attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1), need_weights=False)
    assert_same(ours(x, is_causal=True)[0], want, "causal")
    assert_same(ours(x, is_causal=True, need_weights=True)[0], want, "causal, the dense way")


@pytest.mark.filterwarnings("ignore:row . of the mask has no token")
@pytest.mark.parametrize("zero", [True, False])
@given(
    batch=batches(max_batch=3, max_len=6),
    merged=st.booleans(),
    form=st.sampled_from(["bool", "float"]),
    wrong=st.sampled_from(["", "", "a pair", "a value"]),
    seed=st.integers(0, 99),
)
def test_a_causal_mask_beside_a_padding_mask_is_recognised(
    zero: bool, batch: Batch, merged: bool, form: str, wrong: str, seed: int
) -> None:
    """Without a word of it, as GPT's and SASRec's blocks pass it, and where it hides padding too; and nothing else is."""
    theirs, ours = pair()
    ours.zero_padding_rows = zero
    x = batch.tensor(E, dtype=torch.float64)
    length = batch.mask.shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    if merged:
        hidden = (hidden | batch.mask[:, None]).repeat_interleave(N, 0)
    mask = hidden if form == "bool" else torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    spot = tuple(int(torch.randint(0, max(n, 1), (), generator=torch.Generator().manual_seed(seed))) for n in mask.shape)
    spoiled = wrong and mask.numel()
    if spoiled:
        mask[spot] = ~hidden[spot] if form == "bool" else (0.5 if wrong == "a value" else 0.0 if hidden[spot] else -torch.inf)
    with record() as log:
        got, _ = ours(x, x, x, batch.mask, attn_mask=mask)
    if not mask.numel():
        return  # torch has no answer
    padding = batch.mask if form == "bool" else torch.zeros(batch.mask.shape, dtype=torch.float64).masked_fill(batch.mask, -torch.inf)
    want, _ = theirs(x, x, x, padding, attn_mask=mask)
    seen = ~blind_rows(want) & (~batch.mask if zero else torch.ones_like(batch.mask))
    assert_same(got[seen], want[seen], "output")
    key_is_padding = bool(batch.mask[spot[0] // N, spot[-1]] if merged else batch.mask[:, spot[-1]].all()) if spoiled else True
    shifted = not zero and not batch.layout.right_padded
    assert shifted or not key_is_padding or all(c.backend != "dense" for c in log.calls)


def test_a_causal_mask_is_read_in_the_one_transfer() -> None:
    _, ours = pair()
    x, padding = torch.randn(2, 12, E, dtype=torch.float64), torch.tensor([[False] * 12, [False] * 9 + [True] * 3])
    mask = torch.ones(12, 12, dtype=torch.bool).triu(1)
    reads = []
    for options in ({}, {"key_padding_mask": padding}, {"attn_mask": mask}, {"key_padding_mask": padding, "attn_mask": mask}):
        for _ in range(2):  # what is found out once for calls of a kind
            with count_reads() as made:
                ours(x, **options)
        reads.append(len(made))
    assert reads[2] <= reads[0], "nothing is padded: no mask is read"
    assert reads[3] == reads[1]


# -------------------------------------------------------------------- the dense way means what the packed way means


def _windowed_pair() -> tuple[VarlenMultiheadAttention, VarlenMultiheadAttention]:
    zeroing = VarlenMultiheadAttention(E, N, batch_first=True, dtype=torch.float64)
    keeping = VarlenMultiheadAttention(E, N, batch_first=True, dtype=torch.float64, zero_padding_rows=False)
    keeping.load_state_dict(zeroing.state_dict())
    return zeroing, keeping


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_window_is_the_same_on_every_way(side: str, is_causal: bool) -> None:
    """R-44, R-46: asking for weights, or keeping padded rows, changes no real row."""
    torch.manual_seed(0)
    zeroing, keeping = _windowed_pair()
    x, key = torch.randn(2, 8, E, dtype=torch.float64), torch.randn(2, 6, E, dtype=torch.float64)
    layout = SeqLayout.from_lengths([5, 8], 8, side)
    options: dict[str, Any] = {"key_padding_mask": layout.padding_mask(), "window": (1, 1), "is_causal": is_causal}
    want, _ = zeroing(x, **options)
    for module in (zeroing, keeping):
        for need_weights in (False, True):
            got, _ = module(x, **options, need_weights=need_weights)
            assert_same(layout.pack(got), layout.pack(want), f"weights={need_weights}, keeping={module is keeping}")
    layout_k = SeqLayout.from_lengths([6, 4], 6)
    cross = {"layout": layout, "layout_kv": layout_k, "window": (2, 1)}
    assert_same(zeroing(x, key, **cross, need_weights=True)[0], zeroing(x, key, **cross)[0], "cross-attention")


def test_a_window_over_packed_holes_is_the_same_with_weights() -> None:
    zeroing, _ = _windowed_pair()
    x = torch.randn(2, 8, E, dtype=torch.float64)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, 1] = mask[1, 3:5] = True
    layout = SeqLayout.from_key_padding_mask(mask, holes="packed")
    want, _ = zeroing(x, layout=layout, window=(1, 1))
    assert_same(zeroing(x, layout=layout, window=(1, 1), need_weights=True)[0], want, "holes")


def test_documents_never_see_each_other() -> None:
    """R-31: the packed way keeps them apart, and the dense way, which cannot, refuses."""
    _, ours = pair()
    x = torch.randn(2, 8, E, dtype=torch.float64)
    layout = SeqLayout.from_document_ids(torch.tensor([[1, 1, 1, 2, 2, 2, 0, 0], [3, 3, 3, 3, 0, 0, 0, 0]]))
    changed = x.clone()
    changed[0, 0] += 5
    assert torch.equal(ours(x, layout=layout)[0][0, 3:6], ours(changed, layout=layout)[0][0, 3:6])
    for options in ({"need_weights": True}, {"attn_mask": torch.zeros(8, 8, dtype=torch.float64)}):
        with pytest.raises(LayoutError, match="several documents a row"):
            ours(x, layout=layout, **options)


def test_masks_that_want_a_gradient_get_it() -> None:
    theirs, ours = pair()
    x = torch.randn(2, 4, E, dtype=torch.float64)
    causal = torch.zeros(4, 4, dtype=torch.float64).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -torch.inf)
    for name, start in (("key_padding_mask", torch.zeros(2, 4, dtype=torch.float64)), ("attn_mask", causal)):
        grads = []
        for module in (theirs, ours):
            bias = start.clone().requires_grad_()
            out, _ = module(x, x, x, **{name: bias}, need_weights=False, is_causal=name == "attn_mask" and module is ours)
            grads.append(torch.autograd.grad(out.square().sum(), bias)[0])
        assert_same(grads[1], grads[0], name)
        assert grads[1].abs().sum() > 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_layouts_and_masks_of_packed_and_nested_input_are_checked() -> None:
    """R-16: nothing that is given is ignored."""
    _, ours = pair()
    layout = SeqLayout.from_lengths([5, 8], 8)
    rows = torch.randn(13, E, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="2D attn_mask"):
        ours(rows, layout=layout, attn_mask=torch.ones(3, 3, dtype=torch.bool).triu(1), is_causal=True)
    with pytest.raises(AssertionError, match="only bool and floating types of attn_mask"):
        ours(rows, layout=layout, attn_mask=torch.ones(8, 8, dtype=torch.int64))
    causal = torch.ones(8, 8, dtype=torch.bool).triu(1)
    assert_same(ours(rows, layout=layout, attn_mask=causal)[0], ours(rows, layout=layout, is_causal=True)[0], "dense against packed")
    with pytest.raises(ArgumentError, match=r"`layout` must be a SeqLayout, but is Tensor"):
        ours(torch.randn(2, 8, E, dtype=torch.float64), layout=layout.padding_mask())
    nested = torch.nested.as_nested_tensor([rows[:5], rows[5:]], layout=torch.jagged)
    with pytest.raises(ArgumentError, match="nested tensor says itself"):
        ours(nested, layout=layout)
    with pytest.raises(AssertionError, match=r"outside of its fast path. Here it has no sequence, .* pass a padded"):
        ours(torch.nested.nested_tensor([]))


def test_a_wrapped_output_projection_is_called() -> None:
    """R-23: LoRA and quantised layers have no usable ``weight``."""

    class Quantised(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.scale = linear.weight.detach().abs().max() / 127
            self.weight = (linear.weight.detach() / self.scale + 128).round().to(torch.uint8)
            self.bias = linear.bias

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, (self.weight.to(x.dtype) - 128) * self.scale, self.bias)

    _, ours = pair()
    x = torch.randn(2, 4, E, dtype=torch.float64)
    padding = torch.tensor([[False] * 4, [False] * 2 + [True] * 2])
    want, _ = ours(x, key_padding_mask=padding)
    ours.out_proj = Quantised(ours.out_proj)
    for need_weights in (False, True):
        got, _ = ours(x, key_padding_mask=padding, need_weights=need_weights)
        assert 0 < (got - want).abs().max() < 0.05
        assert not got[padding].any()


@pytest.mark.native_too
def test_dense_calls_have_a_plan_too() -> None:
    _, ours = pair()
    with record() as log:
        ours(torch.randn(2, 4, E, dtype=torch.float64), need_weights=True)
    plan = log.calls[0].plan
    assert plan.backend == "dense"
    assert plan.route == "dense"
    assert "weights exist only" in plan.route_reason


def test_two_layouts_from_the_host_read_nothing() -> None:
    _, ours = pair()
    query, key = torch.randn(2, 5, E, dtype=torch.float64), torch.randn(2, 3, E, dtype=torch.float64)
    layouts = {"layout": SeqLayout.from_lengths([2, 4], 5), "layout_kv": SeqLayout.from_lengths([3, 1], 3)}
    ours._plan(_Inputs(query, key, key, "batch first", ours), (None, None), False, True, False, **layouts)  # what is asked only once
    with count_reads() as reads:
        _, causal, why_dense, _ = ours._plan(_Inputs(query, key, key, "batch first", ours), (None, None), False, True, False, **layouts)
    assert not reads
    assert causal
    assert why_dense is None


@pytest.mark.parametrize("need_weights", [False, True])
def test_models_may_view_what_torch_gives_contiguous(need_weights: bool) -> None:
    theirs, ours = pair(batch_first=False)
    query = torch.randn(4, 2, E, dtype=torch.float64)
    for module in (theirs, ours):
        assert module(query, query, query, need_weights=need_weights)[0].view(-1, E).shape == (8, E)


def test_repr_shows_what_differs_from_torch() -> None:
    text = repr(VarlenMultiheadAttention(E, N, window=(1, 0)))
    assert "backend='auto'" in text
    assert "window=(1, 0)" in text


def test_what_stands_in_slack_rows_is_not_read() -> None:
    """R-10: NaN in rows of a packed tensor that hold nothing reaches no weight's gradient, in the module and in the function."""
    _, ours = pair()
    layout = SeqLayout.from_key_padding_mask(torch.tensor([[False, False, True], [False, True, True]]), capacity=5)
    clean = torch.randn(5, E, dtype=torch.float64).masked_fill(~layout.valid_rows()[:, None], 0.0)
    results = []
    for fill in (0.0, float("nan")):
        x = clean.masked_fill(~layout.valid_rows()[:, None], fill).requires_grad_()
        out, _ = ours(x, layout=layout)
        same = varlen_mha(
            x, layout=layout, num_heads=N, in_proj_weight=ours.in_proj_weight, in_proj_bias=ours.in_proj_bias,
            out_proj_weight=ours.out_proj.weight, out_proj_bias=ours.out_proj.bias,
        )  # fmt: skip
        valid = layout.valid_rows()
        loss = out[valid].sum() + same[valid].sum()
        results.append((out[valid], same[valid], *torch.autograd.grad(loss, [x, *ours.parameters()])))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert bool(a.isfinite().all())
