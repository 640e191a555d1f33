"""Whether a model gives the same: run on one batch as it came and converted, and compared tensor by tensor.

A run is in evaluation, once without gradients and once with: torch's own fast path, which leaves out padding too, is there in the one only.
"""

from __future__ import annotations

import itertools
import random
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._state import undone
from .._switch import Step
from ..attention.records import Record, record
from ..data.batches import Inputs, map_tensors, masks_in, tensors_in
from ..data.results import HUGE, Gap, gap, tensors_of
from ..errors import ArgumentError, VarlenError
from .report import Action, ModuleReport

_FINE = 1e-4  # of the usual size of a result, for sums in another order through many layers


@dataclass(frozen=True)
class Difference:
    """How far a result is from what it was.

    Attributes:
        name: as ``"logits"``, ``"hidden_states[2]"``, and ``"the output"`` of a model that returns one tensor.
        what: how it differs, in words.
        gap: by how much, and how much rounding explains; infinitely where it is NaN, missing or of another shape.
        at_padding: only at columns of padding.
    """

    name: str
    what: str
    gap: Gap
    at_padding: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.what}"


@dataclass(frozen=True)
class Run:
    """What a model gave for a batch.

    Attributes:
        results: without gradients, then with, by name.
        masks: ``(B, S)``, True at tokens: those in the batch, and those by which calls of attention were packed.
        log: the calls of attention.
        dtype: the coarsest that it was computed in.
    """

    results: tuple[dict[str, Tensor], ...]
    masks: tuple[Tensor, ...]
    log: Record
    dtype: torch.dtype | None


class Part(NamedTuple):
    """A part of a model that is converted or not as a whole: its rows of the report, and what is to be done."""

    rows: list[ModuleReport]
    steps: list[Step]


def settled(model: nn.Module, inputs: Inputs, plans: Iterator[dict[Any, Part]], go: Callable[[list[Step]], None]) -> dict[Any, Part]:
    """Of each part the first plan with which results stay the same; else it stays as it came.

    Raises:
        ArgumentError: the model does not take ``inputs``.
    """
    first = next(plans)
    go([])
    before = run_given(model, inputs, "example")
    chosen = {key: Part(part.rows, []) for key, part in first.items()}
    reasons: dict[Any, str] = {}
    idle: set[str] = set()

    def keep(plan: dict[Any, Part], keys: list[Any]) -> None:
        """Those of ``keys`` that change nothing: all, or what can be kept of one half and then of the other."""
        tried = chosen | {key: plan[key] for key in keys}
        go([step for part in tried.values() for step in part.steps])
        why = _why_not(model, inputs, before, idle)
        if why is None:
            chosen.update(tried)
        elif len(keys) == 1:
            reasons.setdefault(keys[0], f"on the example {why}")
        else:
            keep(plan, keys[: len(keys) // 2])
            keep(plan, keys[len(keys) // 2 :])

    for plan in itertools.chain([first], plans):
        if left := [key for key, part in plan.items() if part.steps and not chosen[key].steps]:
            keep(plan, left)
        if not left or not reasons:
            break
    for key, why in reasons.items():
        part = chosen[key]
        action: Action = "converted" if part.steps else "left alone"
        rows = [replace(row, action=action, reason=why) if row.action == "converted" else row for row in part.rows]
        chosen[key] = part._replace(rows=rows)
    return {key: part._replace(rows=with_idle(part.rows, idle)) for key, part in chosen.items()}


def with_idle(rows: Iterable[ModuleReport], idle: Collection[str]) -> list[ModuleReport]:
    """Says of each converted module that is ``idle`` that nothing called it."""
    why = "never called: another module reads its weights, or nothing does"
    return [replace(row, reason=why) if row.action == "converted" and row.module in idle else row for row in rows]


def _why_not(model: nn.Module, inputs: Inputs, before: Run, idle: set[str]) -> str | None:
    """What is most unlike what it was, in words; adds modules that are not called to ``idle``."""
    try:
        after = run(model, inputs)
        idle.update(after.log.idle)
        found = [x for x in differences(before, after) if not x.at_padding]
    except Exception as error:
        return f"it raises {error!r}"
    return str(max(found, key=lambda x: x.gap.share)) if found else None


def run_given(model: nn.Module, inputs: Inputs, name: str) -> Run:
    """`run`, with a batch of the caller's. Raises ArgumentError where the model does not take it."""
    try:
        return run(model, inputs)
    except Exception as error:
        fix = f"pass a dict for model(**{name}), or a tuple for model(*{name})"
        raise ArgumentError(f"`{name}` must be a batch that the model takes, but with it that raises {error!r}: {fix}.") from error


def run(model: nn.Module, inputs: Inputs) -> Run:
    """Call a model as it is, with a copy of ``inputs``. It is left as it was, and draws the random numbers that are drawn next."""
    results: list[dict[str, Tensor]] = []
    tensors = tensors_in(inputs)
    learns = any(x.requires_grad for x in (*model.parameters(), *tensors))
    with record(model) as log, getattr(model, "no_sync", nullcontext)():  # a distributed model would wait for a backward pass
        for gradients in (False, True)[: 1 + learns]:
            with evaluated(model), torch.set_grad_enabled(gradients):
                args, kwargs = _copied(inputs)
                given = model(*args, **kwargs)
                results.append({name or "the output": x.detach().clone() for name, x in tensors_of(given)})
    layouts = {id(x): x for x in (*(call.layout for call in log), *log.tokens) if x is not None}
    masks = [~layout.padding_mask() for layout in layouts.values()]
    with suppress(VarlenError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks += [real for _, real in masks_in(inputs).values()]
    kind = next((x.device.type for x in (*model.parameters(), *tensors)), "cpu")
    half = [x.dtype for x in model.parameters() if x.dtype in (torch.float16, torch.bfloat16)]
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else next(iter(half), None)
    return Run(tuple(results), tuple(masks), log, dtype)


def forwarded(model: nn.Module, inputs: Inputs) -> Any:
    """What the model returns for a copy of ``inputs``, without gradients."""
    args, kwargs = _copied(inputs)
    with torch.no_grad():
        return model(*args, **kwargs)


def learned(model: nn.Module, inputs: Inputs, masks: Sequence[Tensor]) -> dict[str, Tensor]:
    """The loss for a copy of ``inputs``, and its gradients. Not by `backward`, which would call the hooks of an optimizer."""
    args, kwargs = _copied(inputs)
    parameters = {f"the gradient of {name}": x for name, x in model.named_parameters() if x.requires_grad}
    loss = _loss(dict(tensors_of(model(*args, **kwargs))), masks)
    if not (parameters and loss.requires_grad):
        raise ArgumentError("`train` must be False for a model whose results need no gradient, but is True: set requires_grad_() first.")
    gradients = zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True)
    return {"the loss": loss.detach(), **{name: x for name, x in gradients if x is not None}}


def _loss(results: dict[str, Tensor], masks: Sequence[Tensor]) -> Tensor:
    """The model's own, if it returns a number; else the mean square of what it returns at tokens."""
    learn = {name: x.to_padded_tensor(0.0) if x.is_nested else x for name, x in results.items() if x.requires_grad}
    numbers = [x for x in learn.values() if x.dim() == 0]
    if numbers:
        return learn.get("loss", numbers[0])
    squares = []
    for x in learn.values():
        part = next((at for mask in masks if (at := _columns(x.shape, mask)) is not None), torch.ones((), dtype=torch.bool))
        squares.append(x.masked_fill(~part.to(x.device) | (x.abs() > HUGE), 0).float().square().mean())
    return sum(squares, start=torch.zeros(()))


def differences(before: Run, after: Run) -> list[Difference]:
    """The largest of each result that differs by more than rounding explains: at tokens or without columns, else at padding."""
    found = sorted(gaps(before, after), key=lambda x: not x.at_padding)
    return list({x.name: x for x in found if not x.gap.explained}.values())


def gaps(before: Run, after: Run) -> list[Difference]:
    """The largest of each result, where it counts; and once more at padding, where it is not what it was there."""
    found: dict[tuple[str, bool], Difference] = {}
    for expected, got in zip(before.results, after.results, strict=True):
        for name in expected | got:
            for its in _gaps(name, expected.get(name), got.get(name), before, after):
                known = found.setdefault((name, its.at_padding), its)
                if its.gap.share > known.gap.share:
                    found[name, its.at_padding] = its
    return list(found.values())


def _gaps(name: str, a: Tensor | None, b: Tensor | None, before: Run, after: Run) -> Iterator[Difference]:
    if a is None or b is None or a.shape != b.shape:
        shapes = ["missing" if x is None else f"of shape {tuple(x.shape)}" for x in (b, a)]
        yield Difference(name, f"is {shapes[0]}, and was {shapes[1]}", Gap(float("inf"), 0.0))
        return
    a, b = (x.to_padded_tensor(0.0) if x.is_nested else x for x in (a, b))
    least, where = gap(a, b, fine=_FINE, dtype=before.dtype), ""
    if not least.explained:
        everywhere, parts = least, [x for mask in (*before.masks, *after.masks) if (x := _columns(a.shape, mask)) is not None]
        at_tokens = [gap(a, b, part.to(a.device), fine=_FINE, dtype=before.dtype) for part in parts]
        least, where = min(at_tokens, default=least, key=lambda x: (not x.explained, x)), " at tokens" if parts else ""
        if least.explained:
            yield Difference(name, f"differs by {everywhere.size:.1e} at padding", everywhere, True)
    yield Difference(name, f"differs by {least.size:.1e}{where}, and rounding explains {least.allowed:.1e}", least)


def _columns(shape: torch.Size, real: Tensor) -> Tensor | None:
    """Where in a result of ``shape`` there are tokens, by a mask ``(B, S)``: all its axes of S are columns, if the second is not."""
    rows, columns = real.shape
    if shape[:2] == (columns, rows) and rows != columns:
        return real.T.view(columns, rows, *[1] * (len(shape) - 2))
    axes = [1] if shape[1:2] == (columns,) else [j for j in range(2, len(shape)) if shape[j] == columns]
    if not axes or shape[0] != rows:
        return None
    counts = real.new_ones([1] * len(shape))
    for axis in axes:
        counts = counts & real.view(rows, *[columns if j == axis else 1 for j in range(1, len(shape))])
    return counts


def _copied(inputs: Inputs) -> Inputs:
    """A model may write to its inputs. What is one tensor stays one."""
    copies: dict[int, Tensor] = {}

    def copy(x: Tensor) -> Tensor:
        if id(x) not in copies:
            copies[id(x)] = x.detach().clone().requires_grad_(x.requires_grad)
        return copies[id(x)]

    return map_tensors(copy, inputs)


@contextmanager
def evaluated(model: nn.Module, training: bool | None = False) -> Iterator[None]:
    """In evaluation, or as ``training`` says (None is as it is); afterwards training flags, buffers, gradients and random states are what
    they were. No ``train`` is called, which may be the caller's code."""
    flags = [(module, module.training) for module in model.modules()]
    tables = [(vars(module)["_buffers"], dict(vars(module)["_buffers"])) for module in model.modules()]
    buffers = [(x, x.detach().clone()) for x in model.buffers() if not x.is_meta]
    gradients = [(p, p.grad) for p in model.parameters()]
    numpy = sys.modules.get("numpy.random")
    states = random.getstate(), numpy.get_state() if numpy else None

    def undo() -> None:
        for module, flag in flags:
            module.training = flag
        for table, entries in tables:
            table.clear()
            table.update(entries)
        for x, value in buffers:
            if not torch.equal(x, value):
                with torch.no_grad():
                    x.copy_(value)
        for p, gradient in gradients:
            p.grad = gradient
        random.setstate(states[0])
        if numpy:
            numpy.set_state(states[1])

    devices = {x.device for x in (*model.parameters(), *model.buffers()) if x.device.type == "cuda"}
    with undone(undo), torch.random.fork_rng(list(devices)):
        for module, flag in flags:
            module.training = flag if training is None else training
        for p, _ in gradients:
            p.grad = None
        yield
