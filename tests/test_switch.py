"""Changing a live model of torch's modules: beside forwards in other threads, and what a trial copies."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varlen_attn import VarlenError, _switch, disable, enable, enabled
from varlen_attn._clone import kinds
from varlen_attn._switch import Class, Entry, Switch
from varlen_attn.convert import candidates as _enablable

PADDING = torch.arange(6) >= torch.tensor([6, 3, 1])[:, None]
X, MEMORY = (torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(i)) for i in range(2))

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True")


class Norm(nn.LayerNorm):
    """One that has to be tried."""


def encoder(layers: int = 3, **options: Any) -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, **{"batch_first": True, **options})
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def decoder() -> Any:
    torch.manual_seed(0)
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, 0.0, batch_first=True), 3)


def encode(model: nn.Module) -> Tensor:
    out: Tensor = model(X, src_key_padding_mask=PADDING)[~PADDING]
    return out


def decode(model: nn.Module) -> Tensor:
    out: Tensor = model(X, MEMORY, tgt_key_padding_mask=PADDING, memory_key_padding_mask=PADDING)[~PADDING]
    return out


def attend(model: nn.Module) -> Tensor:
    out: Tensor = model(X, X, X, key_padding_mask=PADDING)[0][~PADDING]
    return out


MODELS: dict[str, tuple[Callable[[], Any], Callable[[nn.Module], Tensor]]] = {
    "encoder": (encoder, encode),
    "layer": (lambda: encoder().layers[0], encode),
    "decoder": (decoder, decode),
    "attention": (lambda: nn.MultiheadAttention(16, 2, batch_first=True), attend),
}


# -------------------------------------------------------------------- beside forwards in other threads


class Held(threading.Thread):
    """A call that stands still at a linear layer until it may go on."""

    def __init__(self, call: Callable[[], Tensor], at: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.call, self.inside, self.go_on = call, threading.Event(), threading.Event()
        self.result: Any = None
        linear, calls = F.linear, [0]

        def wait(*args: Any) -> Tensor:
            if threading.current_thread() is self:
                calls[0] += 1
                if calls[0] == at:
                    self.inside.set()
                    assert self.go_on.wait(60)
            return linear(*args)

        monkeypatch.setattr(F, "linear", wait)
        self.start()
        assert self.inside.wait(60)

    def run(self) -> None:
        try:
            with torch.no_grad():
                self.result = self.call()
        except Exception as error:
            self.result = error


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("level", ["attention", "model"])
@pytest.mark.parametrize("name", MODELS)
def test_a_forward_under_way(name: str, level: Any, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands still in the middle, while the model is enabled, or disabled."""
    make, call = MODELS[name]
    model = make().train()
    with torch.no_grad():
        want = call(model)
    for change in (lambda: enable(model, level), lambda: disable(model)):
        with monkeypatch.context() as patched:
            held = Held(lambda: call(model), at, patched)
            changing = threading.Thread(target=change)
            changing.start()
            changing.join(0.2)
            with torch.no_grad():
                torch.testing.assert_close(call(model), want)  # others do not wait
            held.go_on.set()
            held.join()
            changing.join()
        assert isinstance(held.result, Tensor), held.result
        torch.testing.assert_close(held.result, want)
    assert [type(m) for m in model.modules()] == [type(m) for m in make().modules()]


def test_a_forward_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_switch, "_PATIENCE", 0.0)
    model = encoder()
    enable(model)
    classes = [type(m) for m in model.modules()]
    use = _switch.in_use(model.layers[1])
    use.thread += 1
    with pytest.raises(VarlenError, match="still under way in another thread"):
        disable(model)
    assert [type(m) for m in model.modules()] == classes
    del use  # what is forgotten is over
    disable(model)
    assert type(model) is nn.TransformerEncoder


def test_inside_of_a_forward() -> None:
    model = encoder()
    enable(model)
    handle = model.layers[1].norm1.register_forward_hook(lambda *_: disable(model) and None)
    with pytest.raises(VarlenError, match="inside of its own forward"):
        encode(model)
    handle.remove()
    disable(model)


# -------------------------------------------------------------------- going back


class Stubborn(Entry):
    """Is interrupted where it is told to be."""

    def make(self) -> None:
        super().make()
        raise KeyboardInterrupt

    def restore(self) -> None:
        super().restore()
        if not vars(self).get("interrupted"):
            object.__setattr__(self, "interrupted", True)
            raise SystemExit


def test_an_undo_survives_being_interrupted() -> None:
    entries = {"a": 1, "b": 1}
    layer = encoder(1)
    steps = [Entry(entries, "a", 2, 1), Class(layer, type(layer), type(layer)), Stubborn(entries, "b", 2, 1), Entry(entries, "c", 2)]
    switch = Switch(list, steps)
    with pytest.raises(KeyboardInterrupt):
        switch.make()
    assert entries == {"a": 2, "b": 2}
    with pytest.raises(SystemExit):
        switch.undo()
    assert entries == {"a": 1, "b": 1}


def test_two_that_enable_at_once() -> None:
    model = encoder()
    threads = [threading.Thread(target=lambda i=i: [enable(model, ("attention", "model")[i]) for _ in range(5)]) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(encode(model), encode(encoder()))
    disable(model)
    assert {type(m) for m in model.modules()} == {type(m) for m in encoder().modules()}


def test_a_block_that_is_left_by_an_interruption() -> None:
    model = encoder()
    with pytest.raises(KeyboardInterrupt), enabled(model):
        raise KeyboardInterrupt
    assert type(model) is nn.TransformerEncoder


# -------------------------------------------------------------------- what a trial copies


def test_layers_of_one_kind_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder(12)
    for i, layer in enumerate(model.layers):
        layer.norm1 = Norm(16)
        layer.norm1.place = i  # a number that says nothing else
    model.layers[7].norm1.place, model.layers[7].norm1.other = 7, True
    tried: list[Any] = []
    original = _enablable._try
    monkeypatch.setattr(_enablable, "_try", lambda module, parts: tried.append(module) or original(module, parts))
    assert len(enable(model).converted) == 25
    assert tried == [model.layers[0], model.layers[7]]


def test_a_trial_shares_what_it_does_not_try() -> None:
    layer = encoder(1).layers[0]
    layer.norm1 = Norm(16)
    copied = _enablable._copy(layer, {"norm1": layer.norm1})
    shared = [name for name, p in copied.named_parameters() if any(p is q for q in layer.parameters())]
    assert shared == [f"{part}.{kind}" for part in ("linear1", "linear2", "norm2") for kind in ("weight", "bias")]
    assert type(copied.get_submodule("self_attn")) is nn.Identity


@pytest.mark.parametrize(
    ("change", "number"),
    [
        (lambda layer, i: None, 1),
        (lambda layer, i: setattr(layer, "index", i + 3), 1),
        (lambda layer, i: setattr(layer.dropout1, "p", i / 10), 1),
        (lambda layer, i: layer.linear1.weight.detach().mul_(i), 1),
        (lambda layer, i: setattr(layer, "window", 4 * (i % 2)), 2),
        (lambda layer, i: setattr(layer, "scale", 0.5 * i), 4),
        (lambda layer, i: setattr(layer, "kind", "ab"[i == 3]), 2),
        (lambda layer, i: setattr(layer, "linear1", nn.Linear(16, 32, bias=i < 2)), 2),
        (lambda layer, i: setattr(layer, "norm1", Norm(16)) if i == 1 else None, 2),
        (lambda layer, i: setattr(layer, "forward", lambda x: x) if i == 1 else None, 2),
    ],
)
def test_kinds_of_layers(change: Callable[[Any, int], object], number: int) -> None:
    model = encoder(4)
    for i, layer in enumerate(model.layers):
        change(layer, i)
    found = kinds(list(model.layers))
    assert len([x for i, x in enumerate(found) if x not in found[:i]]) == number


def test_the_trial_sees_nothing_of_its_caller() -> None:
    """Nor the other way round: settings of a thread are its own."""
    seen: list[Any] = []

    class Looking(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))
            return super().forward(x)

    model = encoder(1)
    model.layers[0].norm1 = Looking(16)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        enable(model)
        assert torch.is_inference_mode_enabled()
    assert set(seen) == {(False, False, False)}
