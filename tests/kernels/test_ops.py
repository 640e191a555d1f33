"""Our own ops: which overload of the forward a call takes. Their schemas, fakes and gradients are tested beside each backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from varlen_attn import SeqLayout, record, varlen_attention

LAYOUT = SeqLayout.from_lengths([3, 0, 5])


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names += [str(func)] if "varlen_attn" in str(func) else []
        return func(*args, **(kwargs or {}))


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
        assert seen.names == ["varlen_attn.cpu_forward.default" if i < 3 else "varlen_attn.cpu_forward.no_grad"]
        assert results[-1].requires_grad == (i < 3)
        assert [call.backend for call in log.calls] == ["cpu"]
    with Seen() as seen, torch.no_grad():
        results.append(attend(*leaves[:2], leaves[2].requires_grad_()))
    assert seen.names == ["varlen_attn.cpu_forward.no_grad"]
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
