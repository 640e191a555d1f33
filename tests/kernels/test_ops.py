"""Our own ops: which calls take them, and which the kernel itself. Their schemas, fakes and gradients are tested beside each backend."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from varlen_attn import ArgumentError, SeqLayout, record, varlen_attention
from varlen_attn.kernels.base import contiguous_grad, grad_without_slack, result_without_slack
from varlen_attn.kernels.ops import check_operands

LAYOUT = SeqLayout.from_lengths([3, 0, 5])
TESTS = Path(__file__).parents[1]
# Where `opcheck` runs on the ops of each backend. `gradcheck` wants float64, which only that of `cpu` takes: attention/test_functional.py.
CHECKED = {
    "cpu": "attention/test_functional.py",
    "cpu_native": "kernels/cpu/test_native.py",
    "flash3": "kernels/cuda/test_flash3.py",
    "flash4": "kernels/cuda/test_flash4.py",
}


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names += [str(func)] if "varlen_attn" in str(func) else []
        return func(*args, **(kwargs or {}))


def test_every_op_passes_opcheck_somewhere() -> None:
    ours = {
        schema.name.removeprefix("varlen_attn::") for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("varlen_attn::")
    }
    assert ours == {f"{backend}_{direction}" for backend in CHECKED for direction in ("forward", "backward")}
    for op in ours:
        file = CHECKED[op.rpartition("_")[0]]
        assert re.search(rf"opcheck\(.*\b{op}\b", (TESTS / file).read_text()), f"no opcheck of {op} in {file}"


@pytest.mark.parametrize("twice", [False, True])
def test_derivatives_of_what_stands_between(twice: bool) -> None:
    """What removes slack rows, of a result or of a gradient, and what makes a gradient contiguous."""
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    slack = torch.tensor([False, False, False, True, True])[:, None]
    check = gradgradcheck if twice else gradcheck
    assert check(contiguous_grad, (x,))
    assert check(lambda x: grad_without_slack(x, slack).masked_fill(slack, 0), (x,))  # a kernel does not read slack rows
    assert check(lambda x: result_without_slack(x.masked_fill(slack, 0), slack), (x,))  # nor those of a gradient


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    result: Tensor = varlen_attention(query, key, value, LAYOUT, backend="cpu")
    return result


def test_no_autograd_where_no_gradient_is_needed() -> None:
    """The same numbers, seen by modes and records alike."""
    inputs = [torch.randn(8, 2, 16) for _ in range(3)]
    results = []
    for i in range(4):
        leaves = [x.clone().requires_grad_(n == i) for n, x in enumerate(inputs)]
        with record() as log, Seen() as seen:
            results.append(attend(*leaves))
        assert seen.names == ["varlen_attn.cpu_forward.default"]
        assert results[-1].requires_grad == (i < 3)
        assert [call.backend for call in log.calls] == ["cpu"]
    with Seen() as seen, torch.no_grad():
        results.append(attend(*leaves[:2], leaves[2].requires_grad_()))
    assert seen.names == ["varlen_attn.cpu_forward.default"]
    assert all(torch.equal(results[0], x) for x in results)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: str(mode.__name__))
def test_flops_and_inference_mode(mode: Any) -> None:
    with mode():
        query = torch.randn(8, 2, 16)
        attend(query, query, query)
        with FlopCounterMode(display=False) as counter:
            out = attend(query, query, query)
    assert counter.get_total_flops() == 4 * (9 + 25) * 2 * 16
    assert out.is_inference() == (mode is torch.inference_mode)


def ops_called(call: Callable[[], object]) -> list[str]:
    """Our ops that go through the dispatcher."""
    called = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.endswith("_ops.py") and "varlen_attn" in str(frame.f_locals.get("self")):
            called.append(str(frame.f_locals["self"]))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return called


class Subclass(Tensor):
    pass


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_an_op_is_called_where_something_sees_it() -> None:
    """Modes, profilers and subclasses meet the op; a second derivative meets its refusal. All others meet the kernel at once."""
    query, key, value = (torch.randn(8, 2, 16, requires_grad=True) for _ in range(3))
    grad = torch.randn(3, 8, 2, 16)
    forward, backward = "varlen_attn.cpu_forward.default", "varlen_attn.cpu_backward.default"

    def back(grad: Tensor, **options: Any) -> tuple[list[str], Tensor]:
        found: list[Tensor] = []
        return ops_called(lambda: found.extend(torch.autograd.grad(out, query, grad, retain_graph=True, **options))), found[0]

    out = attend(query, key, value)
    assert ops_called(lambda: attend(query, key, value)) == ops_called(lambda: attend(*map(Tensor.detach, (query, key, value)))) == []
    called, want = back(grad[0])
    assert called == []
    for seen in (Seen, Functions, torch.autograd.profiler.profile):
        results = []
        with seen():
            assert ops_called(lambda results=results: results.append(attend(query, key, value)))[-1:] == [forward]
            if seen is not Functions:  # backward passes leave those out
                called, got = back(grad[0])
                assert called[-1:] == [backward]
                assert torch.equal(got, want)
        assert torch.equal(results[0], out)
    assert ops_called(lambda: attend(query.detach().as_subclass(Subclass), key, value))[-1:] == [forward]
    for called, got in (back(grad, is_grads_batched=True), back(grad[0], create_graph=True)):
        assert backward in called
        torch.testing.assert_close(got if got.dim() == 3 else got[0], want)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        got.sum().backward()  # type: ignore[possibly-undefined]


OPERANDS = {
    "query": (5, 4, 8), "key": (6, 2, 8), "value": (6, 2, 16), "grad": (5, 4, 16), "out": (5, 4, 16), "lse": (4, 5),
}  # fmt: skip


@pytest.mark.parametrize("wrong", [None, *OPERANDS])
def test_operands_that_do_not_belong_together_are_refused(wrong: str | None) -> None:
    """A kernel would read beyond them."""
    offsets = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([0, 6], dtype=torch.int32)

    def check(**changed: Tensor) -> None:
        query, key, value, *results = ({name: torch.zeros(shape) for name, shape in OPERANDS.items()} | changed).values()
        check_operands(query, key, value, *offsets, *results)

    if wrong is None:
        check()
        return
    shape = OPERANDS[wrong]
    for other in (
        torch.zeros(shape, dtype=torch.bfloat16),
        *(torch.zeros(*shape[:i], n + 1, *shape[i + 1 :]) for i, n in enumerate(shape)),
    ):
        with pytest.raises(ArgumentError, match="must belong together, but are"):
            check(**{wrong: other})


def test_saved_tensors_meet_their_hooks() -> None:
    kept: list[Tensor] = []
    query = torch.randn(8, 2, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        out = attend(query, query, query)
    assert [tuple(x.shape) for x in kept] == [(8, 2, 16)] * 4 + [(2, 8)] + [(4,)] * 2
    assert kept[3].data_ptr() == out.data_ptr()


def test_transforms_do_not_meet_the_op() -> None:
    """Those of `torch.func` take other ways; what they return has not lost a gradient."""
    query, key, value = (torch.randn(8, 2, 16) for _ in range(3))
    leaf = query.clone().requires_grad_()
    (want,) = torch.autograd.grad(attend(leaf, key, value).square().sum(), leaf)
    with torch.no_grad():
        got = torch.func.grad(lambda x: attend(x, key, value).square().sum())(query)
        many = torch.func.vmap(lambda x: attend(x, key, value))(torch.stack([query, key]))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(many[1], attend(key, key, value))
