"""Every public name has an example in its docstring that runs and prints what is written beside it."""

from __future__ import annotations

import doctest
import inspect
from typing import Any

import pytest
import torch
from torch import nn

import varlen_attn
from varlen_attn import testing
from varlen_attn.attention import dispatch
from varlen_attn.convert import comparing

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
NAMES = [("varlen_attn", name) for name in varlen_attn.__all__ if name != "BACKENDS"] + [("testing", name) for name in testing.__all__]


@pytest.mark.parametrize(("where", "name"), NAMES, ids=lambda x: x)
def test_the_example_runs(where: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "SECONDS", 0.0)
    module = varlen_attn if where == "varlen_attn" else testing
    names: dict[str, Any] = {x: getattr(varlen_attn, x) for x in varlen_attn.__all__} | {x: getattr(testing, x) for x in testing.__all__}
    thing = dispatch.backends if name == "backends" else inspect.unwrap(getattr(module, name))  # the name is a module too
    found = doctest.DocTestFinder(recurse=False).find(thing, name, globs={**names, "torch": torch, "nn": nn}, module=False)
    (example,) = (test for test in found if test.examples)
    said: list[str] = []
    torch.manual_seed(0)
    failed, ran = doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=said.append)
    assert ran
    assert not failed, "".join(said)
