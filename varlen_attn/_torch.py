"""What of torch is not public: one function each, and nowhere else."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as _modules

# Whether a profiler runs, for whom calls leave a range: opening one costs microseconds.
profiler_enabled: Callable[[], bool] = torch.autograd._profiler_enabled  # type: ignore[attr-defined]


def global_hooks() -> tuple[dict[int, Any], ...]:
    """Hooks that are called for every module."""
    return (
        _modules._global_forward_hooks,
        _modules._global_forward_pre_hooks,
        _modules._global_backward_hooks,
        _modules._global_backward_pre_hooks,
    )


def is_tracing(*tensors: Tensor) -> bool:
    """Whether values must not be read: under `torch.compile`, `torch.export` or `torch.jit.trace`, or on fake tensors."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    for t in tensors:  # noqa: SIM110 (a generator is one more frame in each of many calls)
        if isinstance(t, FakeTensor):
            return True
    return False


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` holds numbers, and operations on it run at once: no tracing, no transform, no tensor subclass."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        return False
    return not (x.is_meta or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def trace_quietly() -> None:
    """Under `torch.jit.trace` sizes are tensors, and each check of a shape would warn that it is no part of the graph. torch ignores such
    warnings of its own files likewise, and for the whole process."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"(varlen_attn|einops)\b")  # type: ignore[attr-defined]


def mark_unbacked(tensor: Tensor) -> None:
    """Tell `torch.compile` that the number of packed rows is data: one graph for all of 0, 1, 2, ...

    Only of tensors that are ours and stay here: code that is compiled with a marked one cannot look at the size, and much of torch does.
    Only where dynamo is loaded already: its import costs 0.8 s and nobody compiles without it.
    """
    if "torch._dynamo" in sys.modules and not is_tracing(tensor):
        from torch._dynamo.decorators import mark_unbacked

        mark_unbacked(tensor, 0)


def needs_plain_gathers() -> bool:
    """Where our two functions would be in the way: under `torch.func`, and under `torch.jit.trace`, which could not save them."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing()  # type: ignore[attr-defined]


def is_transformed() -> bool:
    """Under `torch.func` or forward-mode AD, for which plain indexing has all rules and our two functions have none."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
