"""`torch.compile` keeps a stack packed: its graphs end before our hooks, masks are made between them, and layers are compiled on rows."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.4", reason="needs transformers")

from torch._dynamo.testing import CompileCounter

from varlen_attn import disable, enable, record

from .test_enable import WISHES
from .tiny import assert_close, attention_mask, batch, build, error, quietly, token_ids


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def batches(number: int = 10, side: str = "right") -> list[dict[str, Any]]:
    """No two of one shape."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(number):
        lengths = torch.randint(1, 5 + i, (2 + i % 4,), generator=generator).tolist()
        lengths[:2] = 5 + i, 2 + i % 3
        mask = attention_mask(side, tuple(lengths), 5 + i)
        found.append({"input_ids": token_ids(mask, i), "attention_mask": mask})
    return found


def layers_of(model: Any) -> Any:
    return model.encoder.layer if hasattr(model, "encoder") else model.layers


def forwards_of_layers(model: Any, **options: Any) -> Any:
    for layer in layers_of(model):
        layer.forward = torch.compile(layer.forward, **options)
    return model


def compiled_layers(model: Any, **options: Any) -> Any:
    for layer in layers_of(model):
        layer.compile(**options)
    return model


def compiled_itself(model: Any, **options: Any) -> Any:
    model.compile(**options)
    return model


WAYS: dict[str, Callable[..., Any]] = {
    "torch.compile": torch.compile,
    "model.compile": compiled_itself,
    "layer.compile": compiled_layers,
    "forwards of layers": forwards_of_layers,
    "as sentence-transformers": lambda model, **options: torch.compile(model, **options).forward,
}


def run(call: Callable[..., Any], model: nn.Module, inputs: dict[str, Any], train: bool = False) -> tuple[Tensor, list[Tensor]]:
    valid = inputs["attention_mask"].bool()
    with torch.set_grad_enabled(train):
        out = call(**inputs)[0][valid]
        grads = torch.autograd.grad(out.sin().sum(), list(model.parameters()), allow_unused=True) if train else ()
    return out.detach(), [g for g in grads if g is not None]


@pytest.mark.parametrize(
    ("name", "way", "before", "train"),
    [
        ("Bert", "torch.compile", False, True),
        ("Llama", "torch.compile", False, False),
        ("Bert", "model.compile", True, False),
        ("Bert", "layer.compile", False, True),
        ("Llama", "layer.compile", True, False),
        ("Bert", "forwards of layers", True, True),
        ("Bert", "as sentence-transformers", False, False),
    ],
)
def test_layers_are_compiled_on_rows(name: str, way: str, before: bool, train: bool) -> None:
    """Whichever comes first, and with few graphs: one for a shape, one for all others."""
    options = dict(use_cache=False) if name == "Llama" else {}
    plain, model, counter = build(name, **options), build(name, **options), CompileCounter()
    enable(model) if not before else None
    call = WAYS[way](model, backend=counter)
    if before:
        assert "packed once around the stack" in str(enable(call))
    graphs = []
    for inputs in batches(10 if way == "torch.compile" else 5):
        expected, gradients = run(plain, plain, inputs, train)
        with record(model) as log:
            out, got = run(call, model, inputs, train)
        assert [call.rows for call in log] == [int(inputs["attention_mask"].sum())] * 2
        assert_close(out, expected)
        assert len(got) == len(gradients)
        assert all(error(a, b) <= 1e-9 * max(1.0, float(b.abs().max())) for a, b in zip(got, gradients, strict=True))
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[2] <= 12


def test_dynamic_shapes() -> None:
    plain, model, counter = build("Bert"), build("Bert"), CompileCounter()
    enable(model)
    call = torch.compile(model, backend=counter, dynamic=True)
    graphs = []
    for inputs in batches():
        with record(model) as log:
            out, _ = run(call, model, inputs)
        assert [call.rows for call in log] == [int(inputs["attention_mask"].sum())] * 2
        assert_close(out, run(plain, plain, inputs)[0])
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[0] <= 20


@pytest.mark.parametrize(("name", "way"), [("Bert", "torch.compile"), ("Llama", "layer.compile"), ("Bert", "forwards of layers")])
def test_batches_without_padding_share_graphs(name: str, way: str) -> None:
    """Their layers are given rows too: else each would be four graphs, which end before attention and after it."""
    options = dict(use_cache=False) if name == "Llama" else {}
    plain, model, counter = build(name, **options), build(name, **options), CompileCounter()
    enable(model)
    call, graphs = WAYS[way](model, backend=counter), []
    for i, inputs in enumerate(batches(6)):
        inputs["attention_mask"][:] = 1 if i > 2 else inputs["attention_mask"]
        with record(model) as log:
            assert_close(run(call, model, inputs)[0], run(plain, plain, inputs)[0])
        assert [call.rows for call in log] == [int(inputs["attention_mask"].sum())] * 2
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[1]


def test_many_layers_share_graphs() -> None:
    model, counter = build("Bert", num_hidden_layers=12), CompileCounter()
    expected = [run(model, model, inputs)[0] for inputs in batches(3)]
    enable(model)
    call = torch.compile(model, backend=counter)
    for inputs, want in zip(batches(3), expected, strict=True):
        with record(model) as log:
            assert_close(run(call, model, inputs)[0], want)
        assert [call.rows for call in log] == [int(inputs["attention_mask"].sum())] * 12
    assert counter.frame_count <= 12


def test_the_same_graphs_before_and_after() -> None:
    """A model that runs compiled may be enabled, and disabled, in between."""
    model, counter = build("Bert"), CompileCounter()
    call = torch.compile(model, backend=counter)
    expected = [run(call, model, inputs)[0] for inputs in batches(3)]
    for change, rows in ((enable, True), (disable, False), (enable, True)):
        change(model)
        for inputs, want in zip(batches(3), expected, strict=True):
            with record(model) as log:
                assert_close(run(call, model, inputs)[0], want)
            assert [call.rows for call in log] == [int(inputs["attention_mask"].sum())] * (2 * rows)


@pytest.mark.parametrize(("name", "way"), [("Llama", "torch.compile"), ("Bert", "forwards of layers")])
def test_one_graph(name: str, way: str) -> None:
    """Of the model, where attention is that of `sdpa` and the record says why; of layers, packed wherever rows are there."""
    options = dict(use_cache=False) if name == "Llama" else {}
    plain, model, counter = build(name, **options), build(name, **options), CompileCounter()
    enable(model)
    call = WAYS[way](model, backend=counter, fullgraph=True)
    whole = {**batch(), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    for inputs, padded in ((batch(), True), (whole, False), (batches()[3], True)):
        with record(model) as log:
            assert_close(run(call, model, inputs)[0], run(plain, plain, inputs)[0])
        if way == "torch.compile":
            assert all("torch.compile" in str(call.reason) for call in log)
        elif padded:
            assert [call.rows for call in log] == [int(inputs["attention_mask"].sum())] * 2
    assert counter.frame_count <= 6


def rows(sequences: list[Tensor], capacities: tuple[int, ...], most: int) -> dict[str, Any]:
    """As in docs/transformers.md."""
    source = (Path(__file__).parents[3] / "docs" / "transformers.md").read_text()
    names: dict[str, Any] = {"torch": torch, "F": F}
    exec(re.findall(r"^def rows.*?\n\n", source, re.DOTALL | re.MULTILINE)[0], names)
    found: dict[str, Any] = names["rows"](sequences, capacities, most)
    return found


def test_one_graph_for_each_capacity() -> None:
    """What CUDA graphs need: static shapes, and no graph that ends."""
    model, counter = build("Bert"), CompileCounter()
    generator = torch.Generator().manual_seed(0)
    given = [[torch.randint(3, 50, (n,), generator=generator) for n in lengths] for lengths in ([5, 3], [7], [9, 8, 7], [1, 1, 30], [6, 2])]
    expected = [torch.cat([model(input_ids=ids[None])[0][0] for ids in sequences]).detach() for sequences in given]
    enable(model)
    call = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for sequences, want in zip(given, expected, strict=True):
        with record(model) as log, torch.no_grad():
            out = call(**rows(sequences, (8, 16, 32), most=4))[0][0]
        assert_close(out[: len(want)], want)
        assert [call.rows for call in log] == [len(out)] * 2
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_packed_inputs_are_exported(name: str) -> None:
    """Sequences do not see each other, whatever the offsets."""
    model = build(name, **(dict(use_cache=False) if name == "Llama" else {}))
    enable(model)
    first, *others = (rows([torch.arange(3, 3 + n) for n in lengths], (16,), most=4) for lengths in ([5, 3], [7, 6, 3], [16]))
    program = torch.export.export(model, (), kwargs=first).module()
    for given in (first, *others):
        assert_close(program(**given)[0].detach(), model(**given)[0].detach())


@pytest.mark.parametrize("wish", ["labels at padding", "the last logits"])
def test_wishes_in_compiled_calls(wish: str) -> None:
    make, asked = WISHES[wish]
    model = make()
    expected = model(**batch(), **asked())
    enable(model)
    got = torch.compile(model, backend="eager")(**batch(), **asked())
    for key in ("loss", "logits", "start_logits", "end_logits"):
        if key in expected:
            assert_close(got[key].detach(), expected[key].detach(), what=key)


def test_hooks_in_compiled_calls() -> None:
    model, shapes = build("Bert"), []
    enable(model)
    call = torch.compile(model, backend="eager")
    expected = run(call, model, batch())[0]
    handle = model.encoder.layer[0].register_forward_hook(lambda m, args, out: shapes.append(tuple(args[0].shape)))
    with record(model) as log:
        assert_close(run(call, model, batch())[0], expected)
    assert shapes == [(4, 9, 32)]
    assert all("has hooks" in str(call.reason) for call in log)
    handle.remove()
    with record(model) as log:
        run(call, model, batch())
    assert {call.rows for call in log} == {20}


@pytest.mark.parametrize(("name", "level"), [("Bert", "attention"), ("T5", "model")])
def test_what_is_not_packed_is_right(name: str, level: Any) -> None:
    """Attention on padded columns is computed between graphs, with its reasons."""
    model, counter = build(name, "EncoderModel" if name == "T5" else "Model"), CompileCounter()
    whole = {**batch(), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    given = [batch(), whole, *batches(2), whole]
    expected = [run(model, model, inputs)[0] for inputs in given]
    quietly(model, level=level)
    call = torch.compile(model, backend=counter)
    for inputs, want in zip(given, expected, strict=True):
        with record(model) as log:
            assert_close(run(call, model, inputs)[0], want)
        assert len(log) == 2
    assert counter.frame_count <= 30


def test_generation_says_what_a_step_is() -> None:
    model = build("Llama", "ForCausalLM")
    enable(model)
    with record(model) as log:
        model.generate(**batch("left"), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert [call.reason for call in log] == [None] * 2 + ["a decoding step"] * 4
