"""Modules that have moved, under their old paths, for one release: pickles and other people's code hold these.

The old path is the module itself, under a second name, so that nothing exists twice. `varlen_attn.backends` is a function and a package:
a module that can be called.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar

from . import kernels
from .attention import dispatch, functional, records
from .kernels import base, problem, reference, sdpa_padded
from .kernels.cpu import aten, build, native
from .kernels.cuda import flash2, flash3, flash4, flex, mem_efficient, nested, torch_varlen
from .layout import build as layout_build

LATER = {"companions": "nn", "encoder": "nn.transformer", "modules": "nn.multihead"}  # those that `import varlen_attn` does not import


class _Later(ModuleType):
    """Makes way for the module when it is looked at for the first time. A look into all modules that there are is none."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        package, _, path = self.__name__.partition(".")
        sys.modules[self.__name__] = module = import_module(f"{package}.{LATER[path]}")
        return getattr(module, name)


class _Backends(ModuleType):
    __path__: ClassVar[list[str]] = []  # type: ignore[misc]

    def __call__(self) -> list[dict[str, Any]]:
        return dispatch.backends()

    def __getattr__(self, name: str) -> Any:
        return getattr(kernels, name)


backends = _Backends("varlen_attn.backends", dispatch.backends.__doc__)
_MOVED = {
    "_index": layout_build,
    "_native": build,
    "dispatch": dispatch,
    "functional": functional,
    "problem": problem,
    "records": records,
    "backends": backends,
    "backends.base": base,
    "backends.cpu": aten,
    "backends.cpu_native": native,
    "backends.reference": reference,
    "backends.sdpa_padded": sdpa_padded,
    **{f"backends.{m.__name__.rpartition('.')[2]}": m for m in (flash2, flash3, flash4, flex, mem_efficient, nested, torch_varlen)},
}


def open_old_paths(package: ModuleType) -> None:
    for path in LATER:
        sys.modules[f"{package.__name__}.{path}"] = _Later(f"{package.__name__}.{path}")
    for path, module in _MOVED.items():
        sys.modules[f"{package.__name__}.{path}"] = module
        parent, _, name = path.rpartition(".")
        setattr(backends if parent else package, name, module)
