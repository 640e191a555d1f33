"""PyTorch's own tests of attention and of its Transformer, with our modules in torch's place and on enabled modules of torch.

``TORCH_TESTS=DIR make test-peers``: ``DIR`` is the folder ``test`` of a checkout of PyTorch, which no wheel has, of any version. A test
counts where it builds one of the modules below. One that fails fails again on torch's own modules, or it is a fault of ours, or it is in
`expected.py` with a reason. A test that is expected to fail and passes is a failure too.
"""

from __future__ import annotations

import ast
import math
import os
import re
import sys
import unittest
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.testing._internal import common_cuda, common_device_type, common_nn, common_utils

import varlen_attn
from tests.peers.expected import judge

FOLDER = Path(os.environ.get("TORCH_TESTS", "no folder"))
FILES = (  # a checkout has some of them
    "test_nn",
    "test_transformers",
    "test_native_mha",
    "nn/test_multihead_attention",
    "nn/test_module_hooks",
    "test_modules",
)
OURS = {
    name: getattr(varlen_attn, f"Varlen{name}")
    for name in ("MultiheadAttention", *(f"Transformer{part}" for part in ("Encoder", "EncoderLayer", "Decoder", "DecoderLayer")))
}
HOSTS = (nn.Transformer, *(getattr(nn, name) for name in OURS))
CONCERNS = re.compile(r"nn\.Transformer|multi_?head_?att|\bMHA|test_Transformer")

if not FOLDER.is_dir():
    pytest.skip("TORCH_TESTS is not the folder `test` of a checkout of PyTorch", allow_module_level=True)


class Lost:
    """In place of what the tests import and the installed torch has no longer: an empty list, or a decorator that does nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    def __getattr__(self, name: str) -> Any:
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __add__


def load(file: str) -> ModuleType:
    """A file of the folder as a module, without the tests that do not speak of attention: what they need may have gone since."""
    path = FOLDER / f"{file}.py"
    tree, lines = ast.parse(path.read_text()), path.read_text().splitlines()
    kept: set[str] = set()
    for part in ast.walk(tree):
        if isinstance(part, ast.ClassDef):
            tests = [x for x in part.body if isinstance(x, ast.FunctionDef) and x.name.startswith("test")]
            others = {x for x in tests if not CONCERNS.search("\n".join(lines[x.lineno - 1 : x.end_lineno]))}
            kept |= {x.name for x in tests if x not in others}
            part.body = [x for x in part.body if x not in others] or [ast.Pass()]
    module = ModuleType(file.replace("/", "."))
    module.__dict__.update(__file__=str(path), kept=tuple(kept))
    internal = [vars(m) for m in (common_cuda, common_device_type, common_nn, common_utils)]
    six = ModuleType("torch._six")
    six.__dict__.update(inf=math.inf, nan=math.nan, string_classes=(str, bytes))
    before = torch.get_default_dtype()
    with patch.dict(sys.modules, {"torch._six": six, module.__name__: module}), patch.object(sys, "path", [str(FOLDER), *sys.path]):
        for names in internal:
            names["__getattr__"] = lambda name, names=names: names.get(f"get_{name}", Lost)()
        try:
            exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), module.__dict__)
        finally:
            for names in internal:
                names.pop("__getattr__", None)
            module.default_dtype = torch.get_default_dtype()  # type: ignore[attr-defined]
            torch.set_default_dtype(before)
    return module


class Under(ModuleType):
    """A module under another: some names are others there."""

    def __init__(self, module: ModuleType, **names: Any):
        super().__init__(module.__name__)
        vars(self).update(names)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextmanager
def drop_in(module: ModuleType) -> Iterator[None]:
    """Tests of this module find ours under the names of torch's. `nn.Transformer` stays, because none is ours."""
    activation = Under(nn.modules.activation, MultiheadAttention=OURS["MultiheadAttention"])
    ours = Under(nn, modules=Under(nn.modules, activation=activation, **OURS), **OURS)
    names = {"torch": Under(torch, nn=ours), "nn": ours, **OURS}
    with patch.dict(vars(module), {name: value for name, value in names.items() if name in vars(module)}):
        yield


@contextmanager
def enabled(module: ModuleType) -> Iterator[None]:
    """A module of torch is enabled when it is called for the first time: its tests set weights before."""
    call, inside = nn.Module.__call__, False

    def enters(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside or type(self) not in HOSTS:
            return call(self, *args, **kwargs)
        inside = True
        try:
            varlen_attn.enable(self)
            return call(self, *args, **kwargs)
        finally:
            inside = False

    with patch.object(nn.Module, "__call__", enters):
        yield


@contextmanager
def ours(mode: str, module: ModuleType) -> Iterator[None]:
    """One of the two ways. A test that builds none of the modules shows nothing."""
    way, classes = MODES[mode]
    built, init = [], nn.Module.__init__

    def notes(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        built.extend([self] if isinstance(self, classes) else [])
        init(self, *args, **kwargs)

    with patch.object(nn.Module, "__init__", notes), way(module):
        yield
    if not built:
        raise unittest.SkipTest("builds none of these modules")


MODES = {"drop-in": (drop_in, tuple(OURS.values())), "enabled": (enabled, HOSTS)}


def on_ours(mode: str, module: ModuleType, name: str, test: Callable[..., Any]) -> Callable[..., Any]:
    """``test`` in one of the two ways."""

    def run(self: Any) -> None:
        self.subTest = lambda *args, **kwargs: nullcontext()  # a failure in a part is one of the test

        def once() -> None:
            common_utils.set_rng_seed(1234)
            test(self)

        before = torch.get_default_dtype()
        torch.set_default_dtype(module.default_dtype)
        try:
            judge(f"{mode}.{name}", once, lambda: ours(mode, module))
        finally:
            torch.set_default_dtype(before)

    return run


def cases(mode: str, module: ModuleType) -> Iterator[type[unittest.TestCase]]:
    for name, case in list(vars(module).items()):
        if isinstance(case, type) and issubclass(case, unittest.TestCase):
            own = {
                key: on_ours(mode, module, key, getattr(case, key)) if key.startswith(module.kept) or CONCERNS.search(key) else None
                for key in dir(case)
                if key.startswith("test")
            }
            yield type(f"{name}_{mode}", (case,), {**own, "__module__": __name__})


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    modules = [load(file) for file in FILES if (FOLDER / f"{file}.py").is_file()]
globals().update({f"Test_{case.__name__}": case for module in modules for mode in MODES for case in cases(mode, module)})
