"""What would make a GPU wait for the host, and what a CUDA graph cannot hold, seen on a CPU.

`count_reads` names every operation that reads values of a tensor. `not_capturable` is for steps on the meta device: it names these too,
and whatever touches host memory, which a capture refuses or would freeze: tensors of Python data, copies between host and device, pinned
memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
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

    put = Tensor.__setitem__

    def setitem(self: Tensor, index: Any, value: Any) -> None:
        places = index if isinstance(index, tuple) else (index,)
        if not isinstance(value, Tensor) and len(places) == self.dim() and all(isinstance(i, int) for i in places):
            seen.append("Tensor.__setitem__ of one number")  # to a GPU it travels as a tensor, and waits (pytorch#186482)
        put(self, index, value)

    with ExitStack() as stack:
        for name in _READING_METHODS:
            stack.enter_context(patch.object(Tensor, name, watched(name)))
        stack.enter_context(patch.object(Tensor, "__setitem__", setitem))
        stack.enter_context(watch)
        yield seen


_OF_PYTHON_DATA = ("tensor", "as_tensor", "asarray", "from_numpy")


class _OffTheDevice(TorchDispatchMode):
    def __init__(self, seen: list[str]):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if any(isinstance(x, Tensor) and x.device.type == "cpu" for x in pytree.tree_leaves((args, kwargs, out))):
            self.seen.append(f"{func} on the CPU")
        return out


@contextmanager
def not_capturable() -> Iterator[list[str]]:
    """``with not_capturable() as seen``: what a step on meta tensors does that a step in a CUDA graph may not do."""
    extra: list[str] = []

    def named(name: str, original: Any, result: Any = None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            extra.append(name)
            return original(*args, **kwargs) if result is None else result(*args)

        return call

    with count_reads() as reads, ExitStack() as stack:
        for name in _OF_PYTHON_DATA:
            stack.enter_context(patch.object(torch, name, named(f"torch.{name}", getattr(torch, name))))
        # There is no pinned memory without CUDA: the tensor itself stands for it.
        stack.enter_context(patch.object(Tensor, "pin_memory", named("Tensor.pin_memory", None, lambda x: x)))
        stack.enter_context(patch.object(torch.cuda, "synchronize", named("torch.cuda.synchronize", None, lambda *_: None)))
        stack.enter_context(_OffTheDevice(extra))
        try:
            yield (seen := [])
        finally:
            seen += [*reads, *extra]
