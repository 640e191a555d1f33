"""A model that was enabled looks at every call, however it is made, and is what it was for all who look at it."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5.4", reason="needs transformers")

import accelerate
import transformers
from accelerate.hooks import add_hook_to_module, remove_hook_from_module

from varlen_attn import BackendRefused, disable, enable, enabled, record, use_backend

from .test_enable import WISHES, anatomy, packed_calls
from .tiny import assert_close, batch, build, error, quietly, shake

VALID = batch()["attention_mask"].bool()


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def accelerated(model: Any) -> Any:
    return add_hook_to_module(model, accelerate.hooks.ModelHook())


def bound(model: Any) -> Any:
    """As Accelerate's mixed precision does, and many a patch."""
    function = model.forward.__func__
    model.forward = (lambda self, *args, **kwargs: function(self, *args, **kwargs)).__get__(model)
    return model


def rows(call: Callable[..., Any]) -> set[int | None]:
    with record() as log:
        call(**batch())
    return {call.rows for call in log}


ENTRANCES: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "called": lambda model: model,
    "forward": lambda model: model.forward,
    "forward of the class": lambda model: lambda **inputs: type(model).forward(model, **inputs),
    "accelerate": accelerated,
    "forward of accelerate": lambda model: accelerated(model).forward,
    "bound to the object": bound,
    "a replica": lambda model: model._replicate_for_data_parallel(),
    "a shallow copy": copy.copy,
    "a deep copy of accelerate": lambda model: copy.deepcopy(accelerated(model)),
    "a part": lambda model: nn.Sequential(model)[0],
}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("wish", WISHES)
def test_every_entrance_is_watched(wish: str, entrance: str, before: bool) -> None:
    """What was there before `enable`, and what comes after it: a caller who reads padding gets what was there."""
    if before and entrance in ("a replica", "a shallow copy"):
        pytest.skip("another model, of which only parts are enabled")
    make, asked = WISHES[wish]
    model = make()
    expected = model(**batch(), **asked())
    enable(model) if not before else None
    call = ENTRANCES[entrance](model)
    enable(model) if before else None
    got = call(**batch(), **asked())
    for key in ("loss", "logits", "start_logits", "end_logits"):
        if key in expected:
            assert_close(got[key], expected[key], what=key)
    if not before or call is model:
        assert rows(call) == {20}


LOOKS: dict[str, Callable[[Any], Any]] = {
    "name": lambda model: type(model).__name__,
    "class in words": lambda model: str(type(model)),
    "documentation": lambda model: type(model).__doc__,
    "home": lambda model: type(model).__module__,
    "signature": lambda model: inspect.signature(model.forward),
    "signature of the class": lambda model: inspect.signature(type(model).forward),
    "bound to": lambda model: model.forward.__self__ is model,
    "a method": lambda model: (inspect.ismethod(model.forward), inspect.isfunction(type(model).forward)),
    "innermost function": lambda model: inspect.unwrap(type(model).forward),
    "text": repr,
    "generates": lambda model: model.can_generate(),
    "another one": lambda model: type(type(model)(model.config)),
    "another one by its configuration": lambda model: type(type(model)._from_config(model.config)),
    "weights": lambda model: list(model.state_dict()),
}


@pytest.mark.parametrize("accelerate_too", [False, True])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "LlamaForCausalLM"])
def test_it_looks_as_before(name: str, accelerate_too: bool, tmp_path: Path) -> None:
    head = name.removeprefix("Bert").removeprefix("Llama")
    model = build(name.removesuffix(head), head)
    accelerated(model) if accelerate_too else None
    looks = {what: look(model) for what, look in LOOKS.items() if what != "bound to" or not accelerate_too}
    was = type(model)
    enable(model)
    for what, seen in looks.items():
        assert LOOKS[what](model) == seen, what
    assert isinstance(model, was)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [name]
    assert type(type(model).from_pretrained(tmp_path)) is was
    disable(model)
    assert type(model) is was


def saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, saved, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_watched(how: Callable[[Any], Any]) -> None:
    make, asked = WISHES["labels at padding"]
    model = make()
    expected, was = model(**batch(), **asked()).loss, type(model)
    enable(model)
    copied = how(model)
    disable(model)
    assert_close(copied.forward(**batch(), **asked()).loss, expected)
    assert packed_calls(copied, **batch()) == 2
    assert packed_calls(model, **batch()) == 0
    disable(copied)
    assert type(copied) is was
    assert vars(copied).keys() == vars(model).keys()


def test_what_others_put_on_the_object_stays_theirs() -> None:
    """Whatever is put there and taken away again, in any order."""
    model = build("Bert")
    expected, before = model(**batch())[0][VALID], anatomy(model)
    enable(model)
    accelerated(model)
    assert packed_calls(model, **batch()) == 2
    remove_hook_from_module(model)
    assert packed_calls(model, **batch()) == 2
    disable(model)
    assert anatomy(model) == before
    accelerated(model)
    theirs = model.forward
    with enabled(model):
        assert packed_calls(model, **batch()) == 2
    assert model.forward is theirs
    enable(model)
    del model.forward
    with pytest.raises(AttributeError, match="forward"):
        del model.forward
    assert packed_calls(model, **batch()) == 2
    disable(model)
    assert error(model(**batch())[0][VALID], expected) == 0


def test_accelerate_goes_after_disable() -> None:
    model = build("Bert")
    expected = model(**batch())[0]
    enable(model)
    accelerated(model)
    disable(model)
    assert torch.equal(model(**batch())[0], expected)
    remove_hook_from_module(model)
    assert torch.equal(model(**batch())[0], expected)


class Choosy(transformers.BertModel):
    """It does not like to be inherited from."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise AssertionError("this class has no subclasses")


def test_a_class_that_has_no_subclasses() -> None:
    model = Choosy(build("Bert").config).double().eval()
    enable(model)
    assert packed_calls(model, **batch()) == 2
    assert packed_calls(pickle.loads(pickle.dumps(model)), **batch()) == 2


def test_a_forward_of_the_class_that_is_replaced_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """By kernels that are patched in for a class."""
    model, calls = build("Bert"), []
    enable(model)
    original = transformers.BertModel.forward
    monkeypatch.setattr(transformers.BertModel, "forward", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    assert packed_calls(model, **batch()) == 2
    assert calls == [1]


def test_layers_called_outside_of_any_forward() -> None:
    """Nobody knows what is done with their rows."""
    model = build("Bert")
    hidden = model.embeddings(batch()["input_ids"])
    expected = model(**batch())[0]
    quietly(model)
    mask = transformers.masking_utils.create_bidirectional_mask(
        config=model.config, inputs_embeds=hidden, attention_mask=batch()["attention_mask"]
    )
    with record() as log:
        got = model.encoder(hidden, attention_mask=mask)[0]
    assert {call.reason for call in log} == {"no forward of its model is under way, or it began before that was enabled"} or all(
        call.rows == call.slots for call in log
    )
    assert_close(got[VALID], expected[VALID])


# -------------------------------------------------------------------- what was served before


@pytest.mark.parametrize("when", ["before", "after"])
def test_attention_weights_by_the_configuration(when: str, tmp_path: Path) -> None:
    """transformers lets only ``eager`` have them."""
    model = build("Bert")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    expected = model(**batch())
    model.config.output_attentions = when == "before"
    enable(model)
    assert packed_calls(model, **batch()) == (0 if when == "before" else 2)
    model.config.output_attentions = True
    assert pickle.loads(pickle.dumps(model.config))._attn_implementation == model.config._attn_implementation
    for each in (model, copy.deepcopy(model)):
        got = each(**batch())
        assert len(got.attentions) == 2
        for a, b in zip(got.attentions, expected.attentions, strict=True):
            assert_close(a[VALID[:, None].expand(a.shape[:3])], b[VALID[:, None].expand(b.shape[:3])])
        assert_close(got[0][VALID], expected[0][VALID])
    model.save_pretrained(tmp_path)
    assert model.config._attn_implementation in ("eager", "varlen_attn")
    assert model.config._attn_implementation != "sdpa"
    disable(model)
    assert type(model.config._attn_implementation) is str
    assert model.config._attn_implementation == "eager"


def vit() -> Any:
    sizes: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    return shake(transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4)).double()).eval()


WHOLE: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "a mask of ones": (lambda: build("Bert"), lambda: {**batch(), "attention_mask": torch.ones(4, 9, dtype=torch.long)}),
    "no mask": (lambda: build("Bert"), lambda: {"input_ids": batch()["input_ids"]}),
    "no mask, causal": (lambda: build("Llama", use_cache=False), lambda: {"input_ids": batch()["input_ids"]}),
    "a window": (lambda: build("Mistral", use_cache=False), lambda: {"input_ids": batch()["input_ids"]}),
    "images": (vit, lambda: {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}),
    "a bias": (lambda: build("T5", "EncoderModel"), lambda: {"input_ids": batch()["input_ids"]}),
    "padding": (lambda: build("Bert"), batch),
}


@pytest.mark.parametrize("order", ["reference", "cpu", "sdpa_padded", "flash2"])
@pytest.mark.parametrize("name", WHOLE)
def test_an_order_is_an_order_where_nothing_is_padded(name: str, order: str) -> None:
    make, given = WHOLE[name]
    model, inputs = make(), given()
    expected = model(**inputs)[0]
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
    quietly(model)
    with record(model) as log:
        try:
            with use_backend(order):
                got = model(**inputs)[0]
        except BackendRefused:
            assert order in ("flash2", "cpu" if name == "a bias" else "flash2")
        else:
            assert_close(got[real], expected[real])
            assert {call.backend for call in log} == {order}
            assert len(log) == 2


def test_an_order_in_generation() -> None:
    model = build("Llama", "ForCausalLM")
    given = dict(max_new_tokens=3, do_sample=False, eos_token_id=None)
    expected = model.generate(**batch("left"), **given)
    enable(model)
    with use_backend("reference"), record(model) as log:
        assert torch.equal(model.generate(**batch("left"), **given), expected)
    assert {call.backend for call in log} == {"reference"}
    assert len(log) == 6


def test_an_order_that_cannot_be_followed() -> None:
    model = build("Bert")
    model.set_attn_implementation("eager")
    enable(model)
    with pytest.raises(BackendRefused, match=r"'reference' was requested.*attention weights are asked for"), use_backend("reference"):
        model(**batch(), output_attentions=True)
    with use_backend("sdpa_padded"):
        model(**batch(), output_attentions=True)
