"""Runs of a model that keep what enters and leaves each of its submodules."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from .._torch import pytree
from ..data.batches import Inputs, map_tensors, tensors_in
from ..errors import ArgumentError
from ..nn.token_wise import deepcopy_module
from ._batch import PaddedBatch

Call: TypeAlias = tuple[str, int]  # qualified name of a module, which of its calls
Events: TypeAlias = "dict[tuple[str, Call], Event]"  # by kind and call, in the order of the run


@dataclass(frozen=True)
class Event:
    """What entered or left a module in one call. ``blame`` computed it: the module itself, or the caller of one that was entered."""

    kind: str  # "input" or "output"
    call: Call
    blame: Call
    module: str  # class of ``blame``
    tensors: list[Tensor]


class Recorder:
    """Runs its own copy of a model, and keeps the floating tensors that enter and leave every submodule."""

    def __init__(self, model: nn.Module, *, double: bool) -> None:
        try:
            self.model = deepcopy_module(model).eval()
        except Exception as error:
            raise ArgumentError(
                f"`model` must be one that copy.deepcopy can copy, but is {type(model).__name__!r}, where that raises {error!r}: "
                "remove what is computed once and kept, as nn.utils.weight_norm does (parametrizations.weight_norm does not)."
            ) from error
        self.double = double
        if double:
            self.model.double()
        for name, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks; the module that calls it answers for it
                continue
            module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
            module.register_forward_hook(partial(self._leave, name))

    def run(self, inputs: Inputs) -> Events:
        """The events of one run, in their order."""
        self.stack: list[Call] = []
        self.calls: Counter[str] = Counter()
        self.events: Events = {}
        args, kwargs = map_tensors(self._own, inputs)
        self.model(*args, **kwargs)
        return self.events

    def unused(self) -> list[str]:
        """Modules without children whose call no run has seen: `nn.MultiheadAttention` takes the weights of its ``out_proj``, for one."""
        return [name for name, m in self.model.named_modules() if name not in self.calls and next(m.children(), None) is None]

    @property
    def dtype(self) -> torch.dtype:
        own = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return torch.float64 if self.double else next(own, torch.get_default_dtype())

    def _own(self, x: Tensor) -> Tensor:  # a copy, because a model may write to its input
        return x.detach().to(torch.float64 if self.double and x.is_floating_point() else x.dtype, copy=True)

    def _enter(self, name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls[name] += 1
        call = (name, self.calls[name])
        if self.stack:  # a pooled input counts, a number for each sample does not: it may well be its length
            self._note("input", call, self.stack[-1], [x for x in _floating((args, kwargs)) if x.dim() > 1])
        self.stack.append(call)

    def _leave(self, name: str, _: nn.Module, args: Any, output: Any) -> None:
        call = self.stack.pop()
        self._note("output", call, call, _floating(output))

    def _note(self, kind: str, call: Call, blame: Call, tensors: list[Tensor]) -> None:
        module = type(self.model.get_submodule(blame[0])).__name__
        self.events[kind, call] = Event(kind, call, blame, module, [x.clone() for x in tensors])  # before they are written to


def run_batch(model: nn.Module, given: PaddedBatch) -> tuple[Recorder, Events]:
    """In float64, so that a difference is a leak and not rounding; a model that names its dtype runs in that."""
    try:
        recorder = Recorder(model, double=True)
        return recorder, recorder.run(given.inputs)
    except ArgumentError:
        raise
    except Exception:
        recorder = Recorder(model, double=False)
        return recorder, recorder.run(given.inputs)


def run_alone(recorder: Recorder, given: PaddedBatch) -> dict[int, Events]:
    """Every sample that has tokens. One that does not run is an error: it may be a wrong cut, and silence would look like success."""
    runs = {}
    for i in range(given.samples):
        if not len(given.columns[i]):
            continue
        inputs = given.sample(i)
        try:
            runs[i] = recorder.run(inputs)
        except Exception as error:
            raise ArgumentError(
                f"`batch` must have samples that run alone, but with sample {i} ({len(given.columns[i])} tokens) the model raises "
                f"{error!r}, given {[tuple(x.shape) for x in tensors_in(inputs)]}: leave out a sample that is too short for the model; "
                "where these are not its shapes, pass `layout` or `batch_first`."
            ) from error
    return runs


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, the random state put back. Without torch's fast path, which calls no submodule."""
    cuda = [device] if device.type == "cuda" else []
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # What is compiled runs its Python, because hooks do not trace; without dynamo in the process nothing is, and it is slow to load.
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    try:
        with eager, torch.no_grad(), torch.random.fork_rng(cuda), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _floating(value: Any) -> list[Tensor]:
    """The floating tensors in arguments or outputs: in tuples, mappings, dataclasses."""
    found = []
    for leaf in pytree.tree_leaves(value, is_leaf=lambda x: isinstance(x, PackedSequence)):
        if isinstance(leaf, PackedSequence):  # its own rows stand in the order of time
            leaf = pad_packed_sequence(leaf, batch_first=True)[0]
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            found.append(leaf.detach())
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += _floating(vars(leaf))
    return found
