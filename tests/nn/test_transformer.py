"""Encoders and decoders against torch's with the same weights: same arguments, same results and gradients at real tokens."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from varlen_attn import ArgumentError, SeqLayout, VarlenMultiheadAttention, record
from varlen_attn.nn.transformer import (
    VarlenTransformerDecoder,
    VarlenTransformerDecoderLayer,
    VarlenTransformerEncoder,
    VarlenTransformerEncoderLayer,
)
from varlen_attn.testing import poison
from varlen_attn.testing.strategies import Batch, batches, mask_dtypes

from .strategies import AttentionMask, attention_masks, transformer_options

E, N, FF = 8, 2, 12
OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.TransformerEncoderLayer: VarlenTransformerEncoderLayer,
    nn.TransformerEncoder: VarlenTransformerEncoder,
    nn.TransformerDecoderLayer: VarlenTransformerDecoderLayer,
    nn.TransformerDecoder: VarlenTransformerDecoder,
}
ENCODERS, DECODERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer), (nn.TransformerDecoder, nn.TransformerDecoderLayer)
each_class = pytest.mark.parametrize("host", OURS, ids=lambda c: c.__name__)
each_order = pytest.mark.parametrize("batch_first", [True, False])
rows_without_tokens = pytest.mark.filterwarnings("ignore:row . of the mask has no token")  # drawn on purpose
nested_is_a_prototype = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def build(
    host: type[nn.Module], ours: bool, layers: int = 2, norm: bool = True, dtype: torch.dtype = torch.float64, **options: Any
) -> nn.Module:
    layer_class = nn.TransformerDecoderLayer if host in DECODERS else nn.TransformerEncoderLayer
    layer = (OURS[layer_class] if ours else layer_class)(E, N, FF, **{"dropout": 0.0, "batch_first": True, "dtype": dtype, **options})
    if host is layer_class:
        return layer
    final = nn.LayerNorm(E, dtype=dtype) if norm else None
    if ours:
        return OURS[host](layer, layers, final)
    return host(layer, layers, final, **({"enable_nested_tensor": False} if host is nn.TransformerEncoder else {}))


def pair(host: type[nn.Module], **options: Any) -> tuple[Any, Any]:
    """torch's module and ours with one set of weights, all of them at random."""
    theirs, ours = build(host, ours=False, **options), build(host, ours=True, **options)
    generator = torch.Generator().manual_seed(0)
    for p in theirs.parameters():
        nn.init.normal_(p, 0.1, 0.5, generator=generator)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def batch_first(model: Any) -> bool:
    first = model.layers[0] if hasattr(model, "layers") else model
    return bool(first.self_attn.batch_first)


def call(model: Any, *tensors: Tensor, **options: Any) -> Tensor:
    """``(B, S, D) -> (B, S, D)`` whatever the model wants; one tensor for an encoder, targets and memory for a decoder."""
    order = (lambda x: x) if batch_first(model) else (lambda x: x.transpose(0, 1))
    name = "mask" if type(model) in (nn.TransformerEncoder, VarlenTransformerEncoder) else "src_mask"
    options = {name if k == "src_mask" else k: v for k, v in options.items()}
    return order(model(*map(order, tensors), **options))


def assert_close(got: Tensor, want: Tensor, what: str) -> None:
    assert got.shape == want.shape, what
    error = (got - want).abs().max().item() if want.numel() else 0.0
    assert error < 1e-9, f"{what}: {error}"


def gradients(out: Tensor, real: Tensor, *wanted: Tensor) -> list[Tensor]:
    """Of a loss that weighs every value at real tokens differently."""
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    # Copies of a decoder layer forget an activation that is a module, in torch as here: its weights are then not used.
    return list(torch.autograd.grad((out * probe)[real].sum(), wanted, materialize_grads=True))


def assert_same_model(got: Tensor, want: Tensor, real: Tensor, ours: nn.Module, theirs: nn.Module, inputs: list[Tensor]) -> None:
    """Results and gradients of inputs and of every parameter."""
    assert not want.isnan().any(), "torch answers without NaN, so that everything can be compared"
    assert_close(got[real], want[real], "forward")
    assert not got[~real].any(), "exactly 0 at padding"
    names = ["an input"] * len(inputs) + [name for name, _ in theirs.named_parameters()]
    wants = gradients(want, real, *inputs, *theirs.parameters())
    gots = gradients(got, real, *inputs, *ours.parameters())
    for name, a, b in zip(names, gots, wants, strict=True):
        assert_close(a, b, f"gradient of {name}")


def added(mask: Tensor | None, dtype: torch.dtype = torch.float64) -> Tensor | None:
    """torch warns about a mix of dtypes, which ours takes: for torch all masks are added."""
    if mask is None or mask.is_floating_point():
        return None if mask is None else mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)


def real_of(mask: Tensor) -> Tensor:
    """Values above -inf are added to the scores, however low: those positions are tokens."""
    return ~torch.isneginf(mask) if mask.is_floating_point() else ~mask


# -------------------------------------------------------------------- against torch


@rows_without_tokens
@given(batch=batches(), options=transformer_options(), data=st.data())
def test_encoders_match_torch(batch: Batch, options: dict[str, Any], data: st.DataObject) -> None:
    """R-15, R-16, R-27, R-28: any padding mask in any dtype, any attention mask and hint, every constructor option."""
    host = data.draw(st.sampled_from(ENCODERS))
    theirs, ours = pair(host, norm=data.draw(st.booleans()), **options)
    x, padding = batch.tensor(E, dtype=torch.float64, requires_grad=True), data.draw(mask_dtypes(batch.mask))
    size = x.shape[1]
    masks: AttentionMask = data.draw(attention_masks(size, size, len(x) * N))
    got = call(ours, x, src_mask=masks.mask, src_key_padding_mask=padding, is_causal=masks.is_causal)
    assert got.shape == x.shape
    with torch.no_grad():
        evaluated = call(ours.eval(), x, src_mask=masks.mask, src_key_padding_mask=padding, is_causal=masks.is_causal)
    assert torch.equal(got, evaluated), "training and evaluation are one computation"
    if not x.numel():
        assert not any(g.any() for g in torch.autograd.grad(got.sum(), [x, *ours.parameters()])), "every parameter takes part"
    else:
        want = call(theirs, x, src_mask=added(masks.means), src_key_padding_mask=added(padding))
        assert_same_model(got, want, real_of(padding), ours, theirs, [x])


@rows_without_tokens
@given(batch=batches(), options=transformer_options(), data=st.data())
def test_decoders_match_torch(batch: Batch, options: dict[str, Any], data: st.DataObject) -> None:
    """R-16, R-26, R-27, R-28: padding of targets and of memory is independent, and so are their attention masks."""
    host = data.draw(st.sampled_from(DECODERS))
    theirs, ours = pair(host, norm=data.draw(st.booleans()), **options)
    source: Batch = data.draw(batches(batch=len(batch.mask)))
    tgt = batch.tensor(E, dtype=torch.float64, requires_grad=True)
    memory = source.tensor(E, dtype=torch.float64, requires_grad=True, salt=1)
    padding, memory_padding = (data.draw(st.none() | mask_dtypes(b.mask)) for b in (batch, source))
    (rows, len_q), len_k = batch.mask.shape, source.mask.shape[1]
    masks, memory_masks = (data.draw(attention_masks(len_q, k, rows * N)) for k in (len_q, len_k))
    options = {
        "tgt_mask": masks.mask,
        "memory_mask": memory_masks.mask,
        "tgt_key_padding_mask": padding,
        "memory_key_padding_mask": memory_padding,
        "tgt_is_causal": masks.is_causal,
        "memory_is_causal": memory_masks.is_causal,
    }
    got = call(ours, tgt, memory, **options)
    assert got.shape == tgt.shape
    with torch.no_grad():
        assert torch.equal(got, call(ours.eval(), tgt, memory, **options)), "training and evaluation are one computation"
    if tgt.numel() and memory.numel():
        want = call(
            theirs,
            tgt,
            memory,
            tgt_mask=added(masks.means),
            memory_mask=added(memory_masks.means),
            tgt_key_padding_mask=added(padding),
            memory_key_padding_mask=added(memory_padding),
        )
        real = torch.ones_like(batch.mask) if padding is None else real_of(padding)
        assert_same_model(got, want, real, ours, theirs, [tgt, memory])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads_apart", [False, True])
@each_class
def test_unbatched_input(host: type[nn.Module], masked: bool, heads_apart: bool) -> None:
    theirs, ours = pair(host)
    x, memory = torch.randn(5, E, dtype=torch.float64), torch.randn(3, E, dtype=torch.float64)
    padding = torch.tensor([True, False, False, True, False])
    mask = torch.rand((N, 5, 5) if heads_apart else (5, 5)) < 0.3
    tensors = (x, memory) if host in DECODERS else (x,)
    prefix = "tgt" if host in DECODERS else "src"
    name = "mask" if host is nn.TransformerEncoder else f"{prefix}_mask"
    options = {f"{prefix}_key_padding_mask": padding} | ({name: mask} if masked else {})
    want, got = theirs(*tensors, **options), ours(*tensors, **options)
    assert_close(got[~padding], want[~padding], "unbatched")
    assert got.shape == x.shape
    assert not got[padding].any()


def test_low_values_after_each_query_are_not_a_causal_mask() -> None:
    theirs, ours = pair(nn.TransformerEncoder)
    x = torch.randn(2, 4, E, dtype=torch.float64)
    for value in (-1.0, -1e4, float("-inf")):
        mask = torch.zeros(4, 4, dtype=torch.float64).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), value)
        for hint in (None, True):
            assert_close(ours(x, mask, is_causal=hint), theirs(x, mask, is_causal=False), str(value))


@each_class
def test_masks_for_each_head_of_nothing(host: type[nn.Module]) -> None:
    """R-17: no rows, no columns, or targets of no length."""
    _, ours = pair(host)
    for rows, columns in ((0, 3), (2, 0), (0, 0)):
        x = torch.randn(rows, columns, E, dtype=torch.float64)
        memory = torch.randn(rows, 3, E, dtype=torch.float64)
        options = {"src_mask": torch.zeros(rows * N, columns, columns)}
        if host in DECODERS:
            options = {"tgt_mask": options["src_mask"], "memory_mask": torch.zeros(rows * N, columns, 3)}
            options["memory_key_padding_mask"] = torch.full((rows, 3), -1e4)
        assert call(ours, *((x, memory) if host in DECODERS else (x,)), **options).shape == x.shape


def test_the_last_columns_are_kept_where_torch_cuts_them_off() -> None:
    """R-15, pain 9: torch's encoder gives a shorter tensor in evaluation, if its mask is wide enough for its fast path."""
    _, ours = pair(nn.TransformerEncoder)
    x = torch.randn(2, 6, E, dtype=torch.float64)
    padding = torch.arange(6) >= torch.tensor([4, 2])[:, None]
    trained = ours(x, src_key_padding_mask=padding)
    with torch.no_grad():
        evaluated = ours.eval()(x, src_key_padding_mask=padding)
    assert evaluated.shape == trained.shape == x.shape
    assert torch.equal(evaluated, trained)


@rows_without_tokens
@each_class
@each_order
def test_padding_is_not_read_and_gets_no_gradient(host: type[nn.Module], batch_first: bool) -> None:
    """R-07, R-09, R-10: whatever stands in padding, and with rows that are nothing but padding, everything is bit-identical."""
    _, ours = pair(host, batch_first=batch_first)
    padding = torch.tensor([[False] * 5, [True] * 5, [True, False, False, True, True]])
    memory_padding = torch.tensor([[False, False, True], [False, True, False], [True] * 3])
    clean = torch.randn(3, 5, E, dtype=torch.float64), torch.randn(3, 3, E, dtype=torch.float64)
    pads = (padding, memory_padding) if host in DECODERS else (padding,)
    names = ("tgt_key_padding_mask", "memory_key_padding_mask") if host in DECODERS else ("src_key_padding_mask",)
    for masks in ({}, {"tgt_mask" if host in DECODERS else "src_mask": torch.rand(5, 5) < 0.3}):
        results = []
        for fill in (0.0, 1e4, float("nan"), float("inf"), -float("inf")):
            tensors = [poison(x, p, fill).requires_grad_() for x, p in zip(clean, pads, strict=False)]
            out = call(ours, *tensors, **dict(zip(names, pads, strict=True)), **masks)
            assert not out[padding].any()
            # The loss reads padding too: it is a constant there.
            grads = gradients(out, torch.ones_like(padding), *tensors, *ours.parameters())
            assert all(bool(g.isfinite().all()) for g in (out, *grads))
            for grad, p in zip(grads, pads, strict=False):
                assert not grad[p].any()
            results.append((out, *grads))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# -------------------------------------------------------------------- a drop-in


def _signature(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@each_class
def test_signatures_are_torchs(host: type[nn.Module]) -> None:
    assert _signature(OURS[host]) == _signature(host)
    got = [p for p in _signature(OURS[host].forward) if p[0] not in ("layout", "layout_kv")]
    assert got == _signature(host.forward)
    assert issubclass(OURS[host], host)


@each_class
@pytest.mark.parametrize("norm_first", [False, True])
def test_state_dicts_seeds_and_copies(host: type[nn.Module], norm_first: bool) -> None:
    """R-16: weights load both ways, a seed draws torch's weights, and no option makes the constructor warn."""
    models = []
    for ours in (False, True):
        torch.manual_seed(3)
        models.append(build(host, ours, norm_first=norm_first, bias=False))
    theirs, ours = models
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    theirs.load_state_dict(ours.state_dict())
    assert "self_attn): VarlenMultiheadAttention" in repr(ours)
    x = torch.randn(2, 4, E, dtype=torch.float64)
    tensors = (x, x) if host in DECODERS else (x,)
    want = ours(*tensors)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
        assert type(other) is OURS[host]
        assert torch.equal(other(*tensors), want)


@pytest.mark.parametrize("host", [nn.TransformerEncoder, nn.TransformerDecoder])
def test_plain_layers_are_converted(host: type[nn.Module]) -> None:
    layer_class = nn.TransformerEncoderLayer if host is nn.TransformerEncoder else nn.TransformerDecoderLayer
    plain = layer_class(E, N, FF, dropout=0.0, batch_first=True)
    stack = OURS[host](plain, 2)
    assert all(type(layer) is OURS[layer_class] for layer in stack.layers)
    assert all(type(m) is VarlenMultiheadAttention for m in stack.modules() if isinstance(m, nn.MultiheadAttention))
    assert type(plain) is layer_class, "copies are converted, not the caller's"
    assert type(plain.self_attn) is nn.MultiheadAttention


@each_class
@each_order
def test_the_output_can_be_viewed(host: type[nn.Module], batch_first: bool) -> None:
    """R-16: torch's is contiguous, and models call `view` on it."""
    theirs, ours = pair(host, batch_first=batch_first)
    x = torch.randn(4, 3, E, dtype=torch.float64)
    padding = torch.zeros((4, 3) if batch_first else (3, 4), dtype=torch.bool)
    for model in (theirs, ours):
        for last in (False, True):
            padding[:, -1] = last
            name = "tgt_key_padding_mask" if host in DECODERS else "src_key_padding_mask"
            model(*((x, x) if host in DECODERS else (x,)), **{name: padding}).view(-1, E)


@rows_without_tokens
@nested_is_a_prototype
@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("ours", [False, True])
def test_torchs_own_encoder_around_our_layer(side: str, ours: bool) -> None:
    """Pain 9: in evaluation torch packs right-padded batches into nested tensors, which our layer takes."""
    layer = VarlenTransformerEncoderLayer(E, N, FF, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    reference = VarlenTransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(3, 5, E), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, {"right": slice(2, 5), "left": slice(0, 3), "holes": slice(1, 4, 2)}[side]] = True
    if ours:
        padding[2] = True
    want = reference(x, src_key_padding_mask=padding)
    with torch.no_grad(), record() as log:
        got = encoder(x, src_key_padding_mask=padding)
    assert len(log.calls) == 2
    assert (got - want).abs().max() < 1e-5
    assert (encoder.train()(x, src_key_padding_mask=padding) - want).abs().max() < 1e-5


@nested_is_a_prototype
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@each_class
def test_nested_input_comes_back_nested(host: type[nn.Module], layout: torch.layout) -> None:
    theirs, ours = pair(host)
    parts = [torch.randn(n, E, dtype=torch.float64) for n in (3, 0, 5)]
    memory = [torch.randn(n, E, dtype=torch.float64) for n in (2, 4, 1)]
    nested = [torch.nested.as_nested_tensor(p, layout=layout) for p in ([parts, memory] if host in DECODERS else [parts])]
    out = ours(*nested)
    assert out.layout == layout
    (out + nested[0]).unbind()  # shapes are seen as the same
    for got, *alone in zip(out.unbind(), parts, *([memory] if host in DECODERS else []), strict=True):
        if got.shape[0]:
            assert_close(got, theirs(*(a[None] for a in alone))[0], "nested")
    (out.values() if layout == torch.jagged else torch.cat(out.unbind())).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    prefix = "tgt" if host in DECODERS else "src"
    for options in ({f"{prefix}_key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)}, {"layout": SeqLayout.from_lengths([3, 0, 5])}):
        with pytest.raises(ArgumentError, match="nested tensor says itself"):
            ours(*nested, **options)


@nested_is_a_prototype
@each_class
def test_nested_input_without_tokens(host: type[nn.Module]) -> None:
    """One sequence of length 0 is served. No sequence at all, of which torch keeps no width, is refused as by torch's own layer."""
    theirs, ours = pair(host)
    count, no_tokens = 2 if host in DECODERS else 1, torch.zeros(0, E, dtype=torch.float64)
    for layout in (torch.jagged, torch.strided):
        out = ours(*[torch.nested.nested_tensor([no_tokens], layout=layout)] * count)
        assert (out.layout, out.size(0), [len(x) for x in out.unbind()]) == (layout, 1, [0])
    jagged = torch.nested.nested_tensor_from_jagged(no_tokens, offsets=torch.tensor([0]))
    assert SeqLayout.from_nested(jagged).num_seqs == 0
    out = ours(*[jagged] * count)
    assert (out.size(0), out.values().shape) == (0, (0, E))
    nothing = torch.nested.nested_tensor([])
    with pytest.raises(AssertionError, match=r"outside of its fast path. Here it has no sequence, .* pass a padded"):
        ours(*[nothing] * count)
    if host in ENCODERS:
        with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
            theirs(nothing)


@each_order
def test_inside_of_torchs_transformer(batch_first: bool) -> None:
    """R-26: `nn.Transformer` calls its parts by keyword."""
    (encoder, our_encoder), (decoder, our_decoder) = (
        pair(h, batch_first=batch_first) for h in (nn.TransformerEncoder, nn.TransformerDecoder)
    )
    torch.manual_seed(0)
    theirs = nn.Transformer(E, N, custom_encoder=encoder, custom_decoder=decoder, batch_first=batch_first)
    ours = nn.Transformer(E, N, custom_encoder=our_encoder, custom_decoder=our_decoder, batch_first=batch_first)
    ours.load_state_dict(theirs.state_dict())
    src, tgt = (torch.randn(3, n, E, dtype=torch.float64) for n in (6, 4))
    src_padding = torch.arange(6) >= torch.tensor([6, 2, 3])[:, None]
    tgt_padding = torch.arange(4) < torch.tensor([0, 2, 1])[:, None]
    order = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    masks = dict(
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64),
        src_key_padding_mask=added(src_padding),
        tgt_key_padding_mask=added(tgt_padding),
        memory_key_padding_mask=added(src_padding),
    )
    want, got = (order(m(order(src), order(tgt), **masks)) for m in (theirs, ours))
    with record() as log:
        ours(order(src), order(tgt), **masks)
    assert_close(got[~tgt_padding], want[~tgt_padding], "a transformer")
    assert [c.backend for c in log.calls] == ["cpu"] * 6, "the causal mask is recognised"


# -------------------------------------------------------------------- errors, in torch's words


WRONG: dict[str, Callable[[], dict[str, Tensor]]] = {
    "padding mask (B,)": lambda: {"src_key_padding_mask": torch.zeros(3, dtype=torch.bool)},
    "padding mask (S, B)": lambda: {"src_key_padding_mask": torch.zeros(4, 3, dtype=torch.bool)},
    "padding mask too long": lambda: {"src_key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)},
    "mask too long": lambda: {"src_mask": torch.zeros(5, 5, dtype=torch.bool)},
    "causal mask too long": lambda: {"src_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)},
    "mask not square": lambda: {"src_mask": torch.zeros(4, 5)},
    "mask for each row": lambda: {"src_mask": torch.zeros(3, 4, 4, dtype=torch.bool)},
    "mask 1-D": lambda: {"src_mask": torch.zeros(4, dtype=torch.bool)},
    "width": lambda: {"src": torch.randn(3, 4, E + 2)},
    "4-D": lambda: {"src": torch.randn(3, 4, E, 1)},
    "1-D": lambda: {"src": torch.randn(E)},
}


@each_class
@each_order
@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("training", [True, False])
def test_errors_are_torchs_with_a_fix(host: type[nn.Module], batch_first: bool, case: str, training: bool) -> None:
    """R-15, R-16: class and text of torch's slow way, in training and in evaluation, and with a hint that would hide the mask."""
    theirs, ours = pair(host, batch_first=batch_first, dtype=torch.float32)
    options = {"src": torch.randn(3, 4, E), **WRONG[case]()}
    if options["src"].dim() == 3 and not batch_first:
        options["src"] = options["src"].transpose(0, 1)
    x = options.pop("src")
    tensors = (x, x) if host in DECODERS else (x,)
    if host in DECODERS:
        options = {k.replace("src", "tgt"): v for k, v in options.items()}
    elif host is nn.TransformerEncoder:
        options = {k.replace("src_mask", "mask"): v for k, v in options.items()}
    with pytest.raises((AssertionError, RuntimeError, IndexError)) as torchs:
        theirs(*tensors, **options)
    ours.train(training)
    hint = {"tgt_is_causal" if host in DECODERS else "is_causal": True}
    for more in ({}, hint):
        with pytest.raises((AssertionError, RuntimeError)) as raised:
            ours(*tensors, **options, **more)
        if torchs.type is not IndexError:
            assert raised.type is torchs.type
            assert str(raised.value).startswith(str(torchs.value).rstrip("."))
        assert f"batch_first={batch_first}" in str(raised.value)


@each_class
def test_masks_of_integers_are_refused(host: type[nn.Module]) -> None:
    _, ours = pair(host, dtype=torch.float32)
    x = torch.randn(3, 4, E)
    prefix = "tgt" if host in DECODERS else "src"
    name = "mask" if host is nn.TransformerEncoder else f"{prefix}_mask"
    for mask in ({f"{prefix}_key_padding_mask": torch.zeros(3, 4, dtype=torch.int64)}, {name: torch.zeros(4, 4, dtype=torch.int64)}):
        with pytest.raises(AssertionError, match=r"only bool and floating types of .*mask are supported"):
            ours(*((x, x) if host in DECODERS else (x,)), **mask)


@pytest.mark.parametrize("host", DECODERS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_errors_about_memory_are_torchs_with_a_fix(host: type[nn.Module], training: bool) -> None:
    theirs, ours = pair(host, dtype=torch.float32)
    ours.train(training)
    tgt, memory = torch.randn(3, 4, E), torch.randn(3, 5, E)
    hint = {"memory_is_causal": True}
    for options in (
        {"memory_key_padding_mask": torch.zeros(3, 4, dtype=torch.bool)},
        {"memory_key_padding_mask": torch.zeros(5, 3, dtype=torch.bool)},
        {"memory_mask": torch.zeros(4, 4, dtype=torch.bool)},
        {"memory_mask": torch.zeros(3, 4, 5)},
        {"memory": torch.randn(5, E)},
    ):
        options = {"memory": memory, **options}
        with pytest.raises((AssertionError, RuntimeError)) as torchs:
            theirs(tgt, **options)
        for more in ({}, hint):
            with pytest.raises(torchs.type) as raised:
                ours(tgt, **options, **more)
            assert str(raised.value).startswith(str(torchs.value).rstrip("."))
            assert "batch_first=True" in str(raised.value)
    with pytest.raises(RuntimeError, match=f"was expecting key dimension of {E}, but got {E + 2}"):  # torch: two shapes of its kernel
        ours(tgt, torch.randn(3, 5, E + 2))
    with pytest.raises(RuntimeError, match="one batch size, but have 3 and 2"):
        ours(tgt, memory[:2])


def test_no_warning_about_anything() -> None:
    """torch warns about mixed mask dtypes, odd heads and `norm_first`; warnings are errors here."""
    warnings.simplefilter("error")
    encoder = VarlenTransformerEncoder(nn.TransformerEncoderLayer(9, 3, FF, norm_first=True), 1, nn.LayerNorm(9), mask_check=False)
    encoder(torch.randn(4, 2, 9), torch.zeros(4, 4), torch.zeros(2, 4, dtype=torch.bool))
    assert encoder.enable_nested_tensor
