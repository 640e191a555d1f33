"""What users rely on, of drop-ins and of enabled modules: a sample's rows depend on that sample alone, and look as torch's do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from varlen_attn import VarlenMultiheadAttention, enable, use_backend
from varlen_attn.testing.strategies import Batch, batches

from .strategies import transformer_options
from .test_transformer import DECODERS, OURS, E, N, assert_close, batch_first, pair, rows_without_tokens

HOSTS = (nn.MultiheadAttention, *OURS)


def enabled(theirs: nn.Module, ours: nn.Module, **options: Any) -> nn.Module:
    assert enable(theirs, **options).converted
    return theirs


WAYS: dict[str, Callable[[nn.Module, nn.Module], nn.Module]] = {
    "ours": lambda theirs, ours: ours,
    "enabled": enabled,
    "enabled, attention": lambda theirs, ours: enabled(theirs, ours, level="attention"),
}
each_way = pytest.mark.parametrize("way", WAYS)


def both(host: type[nn.Module], dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, nn.Module]:
    """torch's module and ours, with one set of weights."""
    if host is not nn.MultiheadAttention:
        return pair(host, dtype=dtype, **options)
    attention = {key: options[key] for key in ("bias", "batch_first") if key in options}
    theirs, ours = (c(E, N, dtype=dtype, **{"batch_first": True, **attention}) for c in (nn.MultiheadAttention, VarlenMultiheadAttention))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def call(model: Any, x: Tensor, mask: Tensor, causal: bool, memory: Tensor | None = None, memory_mask: Tensor | None = None) -> Tensor:
    """``(B, S, E)`` of all these modules; ``memory`` is for decoders."""
    first = model.batch_first if isinstance(model, nn.MultiheadAttention) else batch_first(model)
    order = (lambda x: x) if first else (lambda x: x.transpose(0, 1))
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if causal else None
    if isinstance(model, nn.MultiheadAttention):
        x = order(x)
        return order(model(x, x, x, key_padding_mask=mask, attn_mask=hidden, is_causal=causal, need_weights=False)[0])
    if memory is not None:
        masks = dict(tgt_key_padding_mask=mask, memory_key_padding_mask=memory_mask, tgt_mask=hidden, tgt_is_causal=causal)
        return order(model(order(x), order(memory), **masks))
    name = "mask" if isinstance(model, nn.TransformerEncoder) else "src_mask"
    return order(model(order(x), src_key_padding_mask=mask, is_causal=causal, **{name: hidden}))


def widened(x: Tensor, left: int, right: int, fill: float | bool) -> Tensor:
    """More columns before and after, which hold ``fill``."""
    column = torch.full_like(x[:, :1], fill) if x.shape[1] else x.new_full((len(x), 1, *x.shape[2:]), fill)
    return torch.cat([column.expand(-1, left, *x.shape[2:]), x, column.expand(-1, right, *x.shape[2:])], 1)


@rows_without_tokens
@each_way
@given(data=st.data(), batch=batches(), options=transformer_options())
@settings(max_examples=30)
def test_a_samples_rows_are_its_own(way: str, data: st.DataObject, batch: Batch, options: dict[str, Any]) -> None:
    """R-09, R-31: in another order, in two batches, and with more columns of padding, whatever those hold: results and gradients."""
    assume(batch.mask.numel())  # torch's modules refuse batches of nothing
    host = data.draw(st.sampled_from(HOSTS))
    model = WAYS[way](*both(host, **options)).train(data.draw(st.booleans()))
    causal = data.draw(st.booleans())
    order = data.draw(st.sampled_from((nullcontext, partial(use_backend, "cpu"))))  # with an order even these small calls pack
    source = data.draw(batches(batch=len(batch.mask))) if host in DECODERS else None
    assume(source is None or source.mask.numel())
    inputs = [(b.tensor(E, dtype=torch.float64, salt=i), b.mask) for i, b in enumerate((batch, source)) if b is not None]

    def run(inputs: list[tuple[Tensor, Tensor]], weights: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x, _ in inputs]
        more = [leaves[1], inputs[1][1]] if source is not None else []
        with order():
            out = call(model, leaves[0], inputs[0][1], causal, *more)
        return [out, *torch.autograd.grad((out * weights)[~inputs[0][1]].sum(), leaves, materialize_grads=True)]

    weights = batch.tensor(E, dtype=torch.float64, salt=7)
    want = run(inputs, weights)
    rows = data.draw(st.permutations(range(len(batch.mask))))
    cut = data.draw(st.integers(0, len(rows)))
    halves = [run([(x[which], mask[which]) for x, mask in inputs], weights[which]) for which in (rows[:cut], rows[cut:]) if which]
    for parts, whole in zip(zip(*halves, strict=True), want, strict=True):
        assert_close(torch.cat(parts), whole[rows], "in another order and in two batches")

    # Where torch's own layers compute padding, NaN there makes gradients NaN.
    sides, fill = st.integers(0, 2), data.draw(st.sampled_from((0.0, 1e4) if "attention" in way else (0.0, 1e4, float("nan"))))
    added = [(data.draw(sides), data.draw(sides)) for _ in inputs]
    wide = [(widened(x, *more, fill), widened(mask, *more, True)) for (x, mask), more in zip(inputs, added, strict=True)]
    masks = [inputs[0][1], *(mask for _, mask in inputs)]
    for got, whole, mask, (left, _) in zip(run(wide, widened(weights, *added[0], 0.0)), want, masks, [added[0], *added], strict=True):
        assert_close(got[:, left : left + mask.shape[1]][~mask], whole[~mask], "with more columns of padding")


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
@each_way
def test_dtype_shape_and_device_are_torchs(way: str, host: type[nn.Module], dtype: torch.dtype, autocast: bool) -> None:
    if dtype == torch.float16 and autocast:
        pytest.skip("torch's norms take no float16 beside bfloat16")
    theirs, ours = both(host, dtype)
    model = WAYS[way](copy.deepcopy(theirs), ours)
    x, mask = torch.randn(2, 4, E, dtype=dtype), torch.tensor([[False] * 4, [False, False, True, True]])
    more = (x, mask) if host in DECODERS else ()
    for training in (True, False):
        results = []
        for m in (theirs, model):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = call(m.train(training), leaf, mask, True, *more)
            results.append((out, *torch.autograd.grad(out.sum(), [leaf, *m.parameters()], allow_unused=True)))
        for want, got in zip(*results, strict=True):
            assert (want is None) == (got is None)
            if want is not None:
                assert (got.dtype, got.device, got.shape) == (want.dtype, want.device, want.shape)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
@each_way
def test_without_values_there_are_shapes(way: str, host: type[nn.Module], causal: bool) -> None:
    """As torch's, on the meta device and on fake tensors: programs count memory and operations so."""
    model = WAYS[way](*both(host, torch.float32))
    x, mask = torch.randn(2, 4, E), torch.tensor([[False] * 4, [False, False, True, True]])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, FlopCounterMode(display=False) as counter:
        fake = tuple(map(mode.from_tensor, (x, mask)))
        out = call(model, *fake, causal, *(fake if host in DECODERS else ()))
    assert out.shape == x.shape
    assert counter.get_total_flops() > 0
    meta = x.to("meta"), mask.to("meta")
    with torch.device("meta"):  # the causal mask too
        out = call(model.to("meta"), *meta, causal, *(meta if host in DECODERS else ()))
    assert (out.shape, out.device.type) == (x.shape, "meta")
