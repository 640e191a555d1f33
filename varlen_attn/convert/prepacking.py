"""`enable(model, prepack=True)`: which linear layers keep their weights in oneDNN's blocked format too."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .._switch import Class, Entry, Step, original_class
from ..errors import ArgumentError
from ..nn.multihead import VarlenMultiheadAttention
from ..nn.prepacked import LEAST, PREPACKED, Prepacked, PrepackedLinear, PrepackedOutProjection, dtypes
from .report import ModuleReport

_CLASSES: dict[Any, type[nn.Module]] = {nn.Linear: PrepackedLinear, NonDynamicallyQuantizableLinear: PrepackedOutProjection}


def plan_prepacked(model: nn.Module, ours: set[nn.Module], dtype: torch.dtype | None) -> tuple[ModuleReport, list[Step]]:
    """What is to be done to linear layers, and to the input projections of attention, which is among ``ours``.

    Raises:
        ArgumentError: there is none that could be, or this machine has no products of ``dtype``.
    """
    if dtype and dtype not in dtypes():
        raise ArgumentError(f"`prepack` must be True or False on this machine, but is {dtype}: oneDNN has no such product for its CPU.")
    steps: list[Step] = []
    weights: dict[int, int] = {}
    for module in model.modules():
        original = original_class(module)
        new = _CLASSES.get(original) if "forward" not in vars(module) else None
        attends = module in ours or isinstance(module, VarlenMultiheadAttention)
        weight: Any = getattr(module, "weight" if new is not None else "in_proj_weight", None) if new is not None or attends else None
        if type(weight) is not nn.Parameter or not weight.is_cpu or weight.dtype not in dtypes() or weight.numel() < LEAST:
            continue
        weights[id(weight)] = weight.numel() * (dtype or weight.dtype).itemsize
        held: Prepacked | None = vars(module).get(PREPACKED)
        steps.append(Entry(vars(module), PREPACKED, held if held and held.dtype == dtype else Prepacked(dtype)))
        if new is not None:
            steps.append(Class(module, new, original, (("__module__", original.__module__),)))  # of which torch.fx makes a leaf
    if not steps:
        raise ArgumentError(
            f"`prepack` must be False for this model, but is {dtype or True}: it has no nn.Linear with at least {LEAST} weights of "
            f"{' or '.join(map(str, dtypes())) or 'any dtype that this build of torch can prepack'} on a CPU."
        )
    rounded = f", rounded to {dtype}" if dtype else ""
    reason = f"{len(weights)} weights are kept in oneDNN's blocked format as well{rounded}: {sum(weights.values()) / 2**20:.1f} MiB more"
    return ModuleReport("", "Linear", "converted", reason), steps


def found_prepacked(model: nn.Module) -> list[Entry]:
    """What of it is there, beside classes."""
    return [Entry(vars(m), PREPACKED, vars(m)[PREPACKED]) for m in model.modules() if PREPACKED in vars(m)]


def is_prepacked(module: nn.Module) -> bool:
    return isinstance(module, PrepackedLinear | PrepackedOutProjection)
