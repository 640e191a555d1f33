"""Paths of modules before they moved into folders: pickles that were made with them load and compute, and imports find what they found."""

from __future__ import annotations

import importlib
import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import varlen_attn
from varlen_attn import disable, record

PICKLES = Path(__file__).parent / "pickles"


def loaded(name: str) -> Any:
    return pickle.loads((PICKLES / f"{name}.pickle").read_bytes())


@pytest.fixture(autouse=True)
def _slow_path() -> Iterator[None]:
    """torch's fast path makes nested tensors, and warns of them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@torch.no_grad()
def called(model: Any, name: str) -> Tensor:
    padding = torch.arange(5) >= torch.tensor([5, 2, 3])[:, None]
    if name == "encoder":
        out = model(torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)), src_key_padding_mask=padding)
    else:
        ids = (torch.arange(15).view(3, 5) % 11 + 1).masked_fill(padding, 0)
        out = model(ids, attention_mask=(~padding).long()).last_hidden_state
    return out[~padding]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["encoder", "bert"])
def test_a_model_that_was_enabled_and_pickled_before(name: str) -> None:
    model = loaded(name)
    with record(model) as log:
        got = called(model, name)
    assert [call.rows for call in log.calls] == [10, 10]
    assert disable(model).modules
    torch.testing.assert_close(got, called(model, name))


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("layout", "SeqLayout"),
        ("problem", "Problem Semantics"),
        ("records", "Record Call record recorded"),
        ("dispatch", "choose route Plan Decision use_backend backends"),
        ("functional", "varlen_attention padded_attention varlen_mha"),
        ("modules", "VarlenMultiheadAttention"),
        ("encoder", "VarlenTransformerEncoder VarlenTransformerDecoderLayer"),
        ("companions", "apply_rotary varlen_conv1d"),
        ("convert", "enable disable enabled Report ModuleReport EnabledTransformerEncoder"),
        ("data", "VarlenCollator"),
        ("backends", "BACKENDS"),
        ("backends.base", "Backend Capabilities Call Extras Refusal Result"),
        ("backends.cpu", "Cpu"),
        ("backends.flex", "Flex"),
        ("backends.reference", "Reference"),
        ("integrations.transformers", "register State NAME varlen_mask varlen_attention_forward"),
        ("testing", "reference_attention"),
    ],
)
def test_imports_from_where_it_was(path: str, names: str) -> None:
    module = importlib.import_module(f"varlen_attn.{path}")
    for name in names.split():
        assert getattr(module, name) is not None


def test_backends_is_a_function_and_a_package() -> None:
    found: dict[str, Any] = {}
    exec("import varlen_attn.backends.base as base; from varlen_attn.backends import BACKENDS", found)
    base, BACKENDS = found["base"], found["BACKENDS"]
    assert varlen_attn.backends.BACKENDS is BACKENDS is varlen_attn.BACKENDS  # type: ignore[attr-defined]
    assert [row["name"] for row in varlen_attn.backends()] == [b.name for b in BACKENDS]
    assert base.Backend is varlen_attn.Backend
    assert not inspect.signature(varlen_attn.backends).parameters
    assert "in order" in str(inspect.getdoc(varlen_attn.backends))
