"""`enable(need_weights="never")`: no weights where a forward shows that nothing reads them, and the same model where something does."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from varlen_attn import ArgumentError, VarlenWarning, disable, enable, record
from varlen_attn.convert import classes


class Layer(nn.Module):
    """As DETR's: positions are added to queries and keys only, and the weights are asked for by name."""

    def __init__(self, use: str = "") -> None:
        super().__init__()
        self.attention, self.use = nn.MultiheadAttention(64, 4, batch_first=True), use
        self.kept: Any = None

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        query = x + 1
        out, weights = self.attention(query, query, x, key_padding_mask=padding, need_weights=True)
        if self.use == "computes":
            out = out * (1 + weights[:, 0, 0, None, None])
        if self.use == "returns":
            return x + out, weights
        if self.use == "keeps":
            self.kept = weights
        return x + out


class Model(nn.Module):
    def __init__(self, *uses: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, uses))

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        seen = []
        for layer in self.layers:
            given = layer(x, padding)
            x = given[0] if isinstance(given, tuple) else given
            seen.append(given)
        return (x, *(given[1] for given in seen if isinstance(given, tuple)))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 120, 64, generator=generator), torch.arange(120) >= torch.tensor([120, 50, 20, 70])[:, None]


def backends(model: nn.Module) -> list[bool]:
    """Of each call whether it was packed."""
    with record() as log, torch.no_grad():
        model(*batch())
    return [call.backend != "dense" for call in log]


def assert_real_rows_same(got: Any, want: Any) -> None:
    real = ~batch()[1]
    torch.testing.assert_close(got[0][real], want[0][real], rtol=1e-4, atol=1e-5)
    assert len(got) == len(want)
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-5)


def test_the_first_forward_shows_that_nothing_reads_them() -> None:
    model = Model("", "").eval()
    want = model(*batch())
    report = enable(model, need_weights="never")
    assert all("nothing reads them" in m.reason for m in report.converted)
    assert backends(model) == [False, False]
    assert backends(model) == [True, True]
    assert_real_rows_same(model(*batch()), want)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert backends(copied) == [False, False]
    assert backends(copied) == [True, True]
    disable(model)
    assert vars(model.layers[0].attention).keys() == vars(nn.MultiheadAttention(64, 4)).keys()
    enable(model, need_weights="never", example=batch())
    assert backends(model) == [True, True]


@pytest.mark.parametrize("training", [False, True])
def test_training_shows_it_too(training: bool) -> None:
    model = Model("").train(training)
    enable(model, need_weights="never")
    for packs in (False, True):
        with record() as log:
            model(*batch())[0].square().sum().backward()
        assert [call.backend != "dense" for call in log] == [packs]


@pytest.mark.parametrize("use", ["computes", "returns", "keeps"])
def test_what_reads_weights_gets_them(use: str) -> None:
    model = Model("", use).eval()
    want = model(*batch())
    enable(model, need_weights="never")

    def forwards() -> None:
        for _ in range(3):
            got = model(*batch())
            assert type(got[0]) is Tensor
            assert_real_rows_same(got, want)
            model.layers[1].kept = None
            del got

    with pytest.warns(VarlenWarning, match="are read"):
        forwards()
    assert backends(model) == [True, False]
    assert_real_rows_same(model(*batch()), want)


@pytest.mark.parametrize("use", ["computes", "returns"])
def test_an_example_shows_what_reads_them(use: str) -> None:
    model = Model("", use).eval()
    want = model(*batch())
    report = enable(model, need_weights="never", example=batch())
    assert backends(model) == [True, False]
    assert_real_rows_same(model(*batch()), want)
    assert "on the example" in next(m.reason for m in report.modules if m.module == "layers.1.attention")


class Several(nn.Module):
    """One attention that is called several times, in a checkpoint or not, and gives the last weights, keeps them, or neither."""

    def __init__(self, use: str, checkpointed: bool = False) -> None:
        super().__init__()
        self.attention, self.use, self.checkpointed = nn.MultiheadAttention(64, 4, batch_first=True), use, checkpointed

    def attend(self, x: Tensor, padding: Tensor) -> Any:
        return self.attention(x + 1, x + 1, x, padding)

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        for _ in range(3):
            if self.checkpointed:
                x = x + checkpoint(lambda x: self.attend(x, padding)[0], x, use_reentrant=False)
            else:
                out, weights = self.attend(x, padding)
                x = x + out
        if self.use == "keeps":
            self.kept = weights
        return (x, weights) if self.use == "gives" else x


@pytest.mark.filterwarnings("ignore:attention weights are read:varlen_attn.VarlenWarning")
@pytest.mark.parametrize("use", ["gives", "keeps"])
def test_weights_of_the_last_call_are_given(use: str) -> None:
    model = Several(use).eval()
    enable(model, need_weights="never")
    for _ in range(4):
        weights = model(*batch())[1] if use == "gives" else model(*batch()) is None or model.kept
        assert weights is not None


def test_a_forward_that_is_computed_again_asks_for_what_it_did() -> None:
    model = Several("", checkpointed=True)
    enable(model, need_weights="never")
    for packs in (False, True):
        with record() as log:
            model(*batch()).sum().backward()
        assert {call.backend != "dense" for call in log} == {packs}


@pytest.mark.filterwarnings("ignore:attention weights are read:varlen_attn.VarlenWarning")
def test_another_enable_looks_again() -> None:
    model = Several("").eval()
    enable(model, need_weights="never")
    for _ in range(2):
        model(*batch())
    disable(model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not model._forward_hooks_always_called
    model.use = "gives"
    enable(model, need_weights="never")
    for _ in range(3):
        assert model(*batch())[1] is not None


def test_a_forward_that_fails_shows_nothing() -> None:
    model = Several("").eval()
    enable(model, need_weights="never")
    hook = model.attention.out_proj.register_forward_hook(lambda *_: 1 / 0)
    attention = model.attend
    model.attend = lambda x, padding: (attention(x, padding), 1 / 0)[0]  # type: ignore[method-assign,assignment]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model(*batch())
    hook.remove()
    model.attend = attention  # type: ignore[method-assign]
    assert set(backends(model)) == {False}
    assert set(backends(model)) == {True}


def test_attention_itself_gives_none() -> None:
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    enable(attention, need_weights="never")
    x, padding = batch()
    assert attention(x, x, x, padding)[1] is None
    assert attention(x, x, x, padding, True)[1] is None


def test_other_words_are_refused() -> None:
    with pytest.raises(ArgumentError, match="'never'"):
        enable(nn.MultiheadAttention(8, 2), need_weights="sometimes")  # type: ignore[arg-type]


def test_an_interrupted_forward_is_forgotten() -> None:
    """`KeyboardInterrupt` passes by torch's hooks."""
    model = Several("").eval()
    enable(model, need_weights="never")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    attend, model.attend = model.attend, interrupt  # type: ignore[method-assign,assignment]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(*batch())
    model.attend = attend  # type: ignore[method-assign]
    assert set(backends(model)) == {False}
    assert not classes._thread.given
