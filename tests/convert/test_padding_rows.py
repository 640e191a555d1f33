"""Rows at padding after `enable`: fixed for each kind of module, on every way through it, and real tokens never read another one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from varlen_attn import SeqLayout, VarlenMultiheadAttention, disable, enable, enabled, record
from varlen_attn.convert import classes
from varlen_attn.errors import ArgumentError
from varlen_attn.testing.strategies import Batch

from .test_convert import PADDING, D, N, assert_same, attend, attention, rows, shake, stack
from .test_watch import HOSTS, TOKENS, call, each_host

pytestmark = pytest.mark.filterwarnings(
    "ignore:row . of the mask has no token",  # drawn on purpose
    "ignore:The PyTorch API of nested tensors",  # torch's encoder makes them in evaluation
    "ignore:enable_nested_tensor is True",  # and says where it cannot
)


class Block(nn.Module):
    """Attention, then a part that may mix over time, as in a conformer."""

    def __init__(self, part: str, batch_first: bool = True, weights: bool = False) -> None:
        super().__init__()
        self.weights = weights
        self.norm, self.attn = nn.LayerNorm(D), attention(batch_first=batch_first)
        self.part: Any = PARTS[part]()
        self.add_module("head", nn.Linear(D, D))
        shake(self.double())

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        y = self.norm(x)
        y = y if self.attn.batch_first else y.transpose(0, 1)
        y = self.attn(y, y, y, key_padding_mask=padding, need_weights=self.weights)[0]
        x = x + (y if self.attn.batch_first else y.transpose(0, 1))
        x = x + (self.part(x)[0] if isinstance(self.part, nn.RNNBase) else self.part(x.mT).mT)
        return self.head(x)  # type: ignore[no-any-return]


PARTS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv1d(D, D, 3, padding=1, groups=D),
    "batch norm": lambda: nn.BatchNorm1d(D),
    "instance norm": lambda: nn.InstanceNorm1d(D, affine=True),
    "group norm": lambda: nn.GroupNorm(2, D),
    "pooling": lambda: nn.AvgPool1d(3, 1, 1),
    "rnn": lambda: nn.GRU(D, D, batch_first=True),
}
TOKEN_WISE: dict[str, Callable[[], nn.Module]] = {"kernel of 1": lambda: nn.Conv1d(D, D, 1), "none": nn.Identity}
PARTS |= TOKEN_WISE
CHECKPOINTS: dict[str, Callable[[Any], Any]] = {
    "none": lambda f: f,
    "reentrant": lambda f: lambda *args: checkpoint(f, *args, use_reentrant=True),
    "not reentrant": lambda f: lambda *args: checkpoint(f, *args, use_reentrant=False),
}


def everywhere(model: nn.Module, x: Tensor, padding: Tensor, factors: Tensor, way: str) -> list[Tensor]:
    """Outputs, and gradients of a loss, of real tokens."""
    leaf = x.clone().requires_grad_()
    out = CHECKPOINTS[way](model)(leaf, padding)
    loss = (out * factors)[~padding].sum()
    loss.backward()
    found = [out[~padding], leaf.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    return [torch.zeros(()) if g is None else g.detach() for g in found]


@pytest.mark.parametrize("part", PARTS)
@given(
    batch=TOKENS.filter(lambda batch: batch.mask.shape[1] > 1),
    batch_first=st.booleans(),
    way=st.sampled_from(list(CHECKPOINTS)),
    training=st.booleans(),
    weights=st.booleans(),
)
def test_real_tokens_of_blocks_that_mix_over_time(
    part: str, batch: Batch, batch_first: bool, way: str, training: bool, weights: bool
) -> None:
    model = Block(part, batch_first, weights).train(training)
    plain = copy.deepcopy(model)
    x, factors = (batch.tensor(D, dtype=torch.float64, salt=salt) for salt in range(2))
    report = enable(model, need_weights=weights)
    if part not in TOKEN_WISE:
        assert f"part ({type(model.part).__name__}) may read" in report.converted[0].reason
        assert 'padding_rows="zero"' in report.converted[0].reason
    assert_same(everywhere(model, x, batch.mask, factors, way), everywhere(plain, x, batch.mask, factors, way))


def test_what_mixes_over_time_is_named() -> None:
    model = nn.Sequential(nn.Conv1d(D, D, 1), nn.LayerNorm((5, D)), attention(), stack())
    report = {m.module: m for m in enable(model).modules}
    assert "1 (LayerNorm) may read" in report["2"].reason
    assert report["3"].reason == 'rows at padding are 0, which 1 (LayerNorm) may read: padding_rows="exact" keeps them'
    assert "may read" not in str(enable(model, padding_rows="zero"))
    del model[1]
    assert "may read" not in str(enable(model)), "every call decides anew"


# -------------------------------------------------------------------- the three, on all ways


def edge(x: Tensor, padding: Tensor) -> Tensor:
    """As documented, row by row."""
    out = x.detach().clone()
    for b, hidden in enumerate(padding):
        real = [i for i, h in enumerate(hidden) if not h]
        for s in (i for i, h in enumerate(hidden) if h):
            before = [i for i in real if i < s]
            out[b, s] = x[b, before[-1] if before else real[0]] if real else 0
    return out


WAYS: dict[str, Callable[[Any], Any]] = {
    "packed": lambda m: None,
    "as it came": lambda m: m.get_submodule("layers.0" if hasattr(m, "layers") else "linear1").register_forward_hook(lambda *args: None),
}


@pytest.mark.parametrize("way", WAYS)
@each_host
@given(batch=TOKENS, padding_rows=st.sampled_from(["zero", "edge", "exact", None]), training=st.booleans())
def test_rows_at_padding_of_stacks(host: str, way: str, batch: Batch, padding_rows: Any, training: bool) -> None:
    model = HOSTS[host]().train(training)
    x = batch.tensor(D, dtype=torch.float64, requires_grad=True)
    plain = call(model, x, batch.mask)
    enable(model, padding_rows=padding_rows)
    WAYS[way](model)
    out = call(model, x, batch.mask)
    assert_same([out[~batch.mask]], [plain[~batch.mask]])
    if padding_rows == "exact":
        assert_same([out], [plain])
        return
    want = edge(out, batch.mask) if padding_rows == "edge" else out.masked_fill(batch.mask[..., None], 0.0)
    assert torch.equal(out, want)
    if out[batch.mask].numel():
        grads = torch.autograd.grad(out[batch.mask].sum(), [x, *model.parameters()], allow_unused=True)
        assert not any(g is not None and g.any() for g in grads), "padding takes no gradient"


@pytest.mark.parametrize("built", [False, True])
@given(batch=TOKENS, padding_rows=st.sampled_from(["zero", "edge", "exact"]), weights=st.booleans(), causal=st.booleans())
def test_rows_at_padding_of_attention(built: bool, batch: Batch, padding_rows: Any, weights: bool, causal: bool) -> None:
    plain = attention()
    ours: Any = copy.deepcopy(plain)
    if built:
        ours = VarlenMultiheadAttention(D, N, batch_first=True, dtype=torch.float64, padding_rows=padding_rows)
        ours.load_state_dict(plain.state_dict())
    else:
        enable(ours, padding_rows=padding_rows)
    x = batch.tensor(D, dtype=torch.float64)
    length = batch.mask.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1) if causal else None
    options: Any = {"need_weights": weights, "attn_mask": mask, "is_causal": causal}
    want = plain(x, x, x, batch.mask, **{**options, "is_causal": False})[0]
    out = ours(x, x, x, batch.mask, **options)[0]
    real = ~batch.mask & ~want.isnan().any(-1)
    assert_same([out[real]], [want[real]])
    if padding_rows == "exact":
        seen = ~want.isnan().any(-1)
        assert_same([out[seen]], [want[seen]])
        assert torch.equal(out[~seen], ours.out_proj.bias.expand_as(out[~seen])), "a query without a key gives 0 before the projection"
    else:
        want = edge(out, batch.mask) if padding_rows == "edge" else out.masked_fill(batch.mask[..., None], 0.0)
        assert torch.equal(out, want)


def test_exact_attention_keeps_padded_queries_packed_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classes, "_PAYS", 0)
    model = attention()
    enable(model, need_weights=False, padding_rows="exact")
    with record() as log:
        attend(model)
    (got,) = log.calls
    assert got.backend != "dense"


# -------------------------------------------------------------------- the option itself


def test_an_option_is_kept_by_copies_and_undone() -> None:
    model = nn.ModuleList([stack(), attention()])
    plain = [set(vars(m)) for m in model.modules()]
    with enabled(model, padding_rows="edge"):
        assert {m.padding_rows for m in copy.deepcopy(model).modules() if hasattr(m, "padding_rows")} == {"edge"}
        with enabled(model, padding_rows="exact"):
            assert_same([model[1](rows(), rows(), rows(), PADDING)[0]], [copy.deepcopy(model)[1](rows(), rows(), rows(), PADDING)[0]])
        out = model[0](rows(), src_key_padding_mask=PADDING)
        assert torch.equal(out, edge(out, PADDING))
        enable(model)
        assert not model[0](rows(), src_key_padding_mask=PADDING)[PADDING].any()
    disable(model)
    assert [set(vars(m)) for m in model.modules()] == plain


def test_zero_padding_rows_is_an_alias() -> None:
    assert VarlenMultiheadAttention(D, N, zero_padding_rows=False).padding_rows == "exact"
    assert not VarlenMultiheadAttention(D, N, padding_rows="exact").zero_padding_rows
    assert VarlenMultiheadAttention(D, N).padding_rows == "zero"


@pytest.mark.parametrize("make", [lambda: enable(stack(), padding_rows="nan"), lambda: VarlenMultiheadAttention(D, N, padding_rows=0)])  # type: ignore[arg-type]
def test_other_values_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ArgumentError, match="`padding_rows` must be "):
        make()


def test_the_attention_level_is_exact_too() -> None:
    model = stack().eval()
    x = rows()
    with torch.no_grad():
        want = model(x, src_key_padding_mask=PADDING)
        enable(model, "attention", padding_rows="exact")
        assert torch.equal(model(x, src_key_padding_mask=PADDING), want), "in evaluation torch's fast path has zeros"


def test_a_layout_is_packed_whatever_the_rows() -> None:
    model = stack()
    enable(model, padding_rows="exact")
    layout = SeqLayout.from_key_padding_mask(PADDING)
    with record() as log:
        model(layout.pack(rows()), layout=layout)
    assert {c.rows for c in log.calls} == {layout.total}


@pytest.mark.parametrize("value", [1e30, 1e37, float("inf"), float("nan")])
def test_whatever_is_at_padding_reaches_nothing(value: float) -> None:
    """In a call that runs as it came, for its weights, and is large enough for its padding to be looked at and not copied."""
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    enable(attention)
    padding = torch.arange(40) >= torch.tensor([40, 30, 20, 10, 5, 39, 38, 40])[:, None]
    x = torch.randn(8, 40, 64)
    x[3, 20, 3] = value
    x.requires_grad_()
    out, weights = attention(x, x, x, padding)
    out[~padding].sum().backward()
    assert not out[padding].any()
    assert not weights[padding].any()
    for found in (out, x.grad, *(p.grad for p in attention.parameters())):
        assert found.isfinite().all()
