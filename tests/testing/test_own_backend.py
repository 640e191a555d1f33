"""`conformance`, for backends that are not of this package: right ones pass, and each fault is found."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from varlen_attn import Backend, Capabilities
from varlen_attn.kernels.base import Call, Result
from varlen_attn.kernels.cpu.aten import Cpu
from varlen_attn.kernels.reference import Reference
from varlen_attn.testing import conformance

PAGE = Path(__file__).parents[2] / "docs/how-to/own-backend.md"


def of_the_page() -> Any:
    """The backend that the documentation shows."""
    block = re.search(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert block is not None
    names: dict[str, Any] = {}
    exec(block[1], names)
    return names["Loop"]


@pytest.mark.parametrize("backend", [of_the_page()(), Cpu()], ids=str)
def test_a_right_one_passes(backend: Backend) -> None:
    assert conformance(backend, examples=60) > 0


class Faulty(Cpu):
    name = "faulty"

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def run(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
        if self.fault == "drops an option":
            call = call._replace(semantics=type(call.semantics)(scale=call.semantics.scale, return_lse=call.semantics.return_lse))
        out, lse = super().run(query, key.detach() if self.fault == "a gradient" else key, value, call)
        if self.fault == "the output":
            out = out * 1.01
        return out + 0 * key.sum(), None if lse is None else lse + (self.fault == "the log-sum-exp")


@pytest.mark.parametrize(
    ("fault", "name"), [("the output", "output"), ("a gradient", "dk"), ("the log-sum-exp", "lse"), ("drops an option", "")]
)
def test_a_wrong_one_is_found(fault: str, name: str) -> None:
    with pytest.raises(AssertionError, match=rf"{name}.* of faulty: "):
        conformance(Faulty(fault), examples=100)


def test_one_that_refuses_everything_has_shown_nothing() -> None:
    class Nothing(Reference):
        name = "nothing"
        capabilities = Capabilities(devices=frozenset({"cuda"}), dtypes=frozenset({torch.float32}))

    with pytest.raises(AssertionError, match="nothing refused all of 20 calls"):
        conformance(Nothing(), examples=20)
