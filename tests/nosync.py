"""Count what would make a GPU wait for the host, on a CPU: every operation that reads values of a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# The size of the result, or the result itself, is a value: on a device each of these waits.
_READS = {
    "aten._local_scalar_dense.default",
    "aten.nonzero.default",
    "aten.masked_select.default",
    "aten._unique2.default",
    "aten.unique_consecutive.default",
    "aten.unique_dim.default",
    "aten.equal.default",
}
_READING_METHODS = ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__")


class _Watch(TorchDispatchMode):
    def __init__(self, seen: list[str]):
        super().__init__()
        self.seen, self.inside = seen, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(func)
        by_mask = name in ("aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        unsized = name == "aten.repeat_interleave.Tensor" and kwargs.get("output_size") is None
        if (name in _READS or by_mask or unsized) and not self.inside:
            self.seen.append(name)
        return func(*args, **kwargs)


@contextmanager
def count_reads() -> Iterator[list[str]]:
    """``with count_reads() as reads``: the name of each read made inside; a method that dispatches counts once."""
    seen: list[str] = []
    watch = _Watch(seen)

    def watched(name: str) -> Any:
        original = getattr(Tensor, name)

        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if watch.inside:
                return original(self, *args, **kwargs)
            seen.append(f"Tensor.{name}")
            watch.inside = True
            try:
                return original(self, *args, **kwargs)
            finally:
                watch.inside = False

        return method

    with ExitStack() as stack:
        for name in _READING_METHODS:
            stack.enter_context(patch.object(Tensor, name, watched(name)))
        stack.enter_context(watch)
        yield seen
