"""`enable`, `disable`, `enabled`: make a model skip padding, in place, and say what happened to which module.

A module is enabled by a new class for the same object: its weights, hooks, buffers and attributes are not touched, so `disable` is the
exact inverse, and copies and pickles know what they are. The state after `enable` depends on the model and the arguments only.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from .._clone import apart
from .._state import undone
from .._switch import Class, Step, Switch, original_class, own_class
from .._torch import unwrapped
from ..attention.forms import PaddingRows
from ..data.batches import inputs_of
from ..errors import ArgumentError, VarlenWarning, warn
from ..kernels.problem import Problem
from . import classes, conformer
from .candidates import HOSTS, Candidate, candidates, is_varlen, mixing
from .equality import Part, settled
from .prepacking import found_prepacked, is_prepacked, plan_prepacked
from .report import Action, ModuleReport, Report
from .watch import LAYERS

Level = Literal["auto", "attention", "model"]

# -------------------------------------------------------------------- the calls


def enable(
    model: nn.Module,
    level: Level = "auto",
    *,
    need_weights: bool | Literal["never"] = True,
    hooks: Literal["leave", "packed"] = "leave",
    padding_rows: PaddingRows | Literal["alone"] | None = None,
    example: Any = None,
    prepack: bool | torch.dtype = False,
    heads: Literal["all", "labelled"] = "all",
) -> Report:
    """Make a model skip padding, in place: torch's attention modules, layers and stacks, and models of transformers. `disable` undoes it.

    Args:
        model: any module: an `nn.TransformerEncoder`, a `PreTrainedModel` of transformers, a `SentenceTransformer`, an
            `nn.MultiheadAttention`, or a model that contains some of these.
        level: ``"model"`` packs once around whole stacks of layers, and around layers that are used alone, and packs a `Conformer` of
            torchaudio whole; ``"attention"`` changes calls of attention only, everything else stays padded. ``"auto"`` is ``"model"``,
            but for conformers, of which it changes attention only.
        need_weights: an `nn.MultiheadAttention` outside of torch's layers returns attention weights unless told otherwise, which costs
            the padded computation; the report names each module that pays. False makes them return None instead, unless a call asks for
            weights by name. ``"never"`` makes these calls return None too, where nothing reads the weights: ``example`` shows that, or
            without one the first forward, in which they are computed; a `VarlenWarning` says where they are read, and they stay.
        hooks: modules with hooks of yours are left alone, because inside a stack these would see packed rows ``(T, D)``; where hooks come
            later, the stack runs as it came as long as they are there. ``"packed"`` lets them see packed rows.
        padding_rows: what rows at padding hold: ``"zero"``; ``"edge"``, the row of the nearest token before them, else after them, without
            a gradient; or ``"exact"``, what the model as it came has there, for which a stack then runs as it came. None is ``"zero"`` for
            torch's stacks and layers, as their fast path has it, and for an `nn.MultiheadAttention`, unless something in ``model`` mixes
            over time, such as a convolution: then it keeps torch's rows. Models of transformers have ``"edge"``. ``"alone"`` gives each
            utterance in a conformer that is packed whole the numbers that it has alone: no convolution or norm reads padding. Otherwise
            such a conformer gives the padded model's numbers, and 0 at padding. All else is as with None then.
        example: a batch for the model's forward (a dict of keywords, a tuple of arguments or a tensor), with labels if it takes some. The
            model is called with it in evaluation, as it came and converted. Where a result, such as a loss, differs by more than rounding
            explains, what makes it differ stays as it came, or changes in attention only, and the report says what differed. Rows of
            padding in results may differ. Buffers, gradients and random states are put back.
        prepack: for inference on a CPU: linear layers keep their weights (float32, and bfloat16 where the CPU multiplies it) in oneDNN's
            blocked format as well, from their second call without gradients on, so that no call reorders them. This takes the memory of the
            weights once more, which the report says. A weight that was written to is reordered again, except after a write through
            ``weight.data``. In training such layers raise `VarlenError`; with gradients in evaluation they compute as they came.
            ``torch.bfloat16``: layers in float32 round what they multiply to bfloat16, sum in float32 and round their result. Everything
            else stays in float32.
        heads: ``"labelled"`` changes what language models of transformers return when they are called with ``labels``: their head and loss
            are computed at the n tokens alone whose label is not -100 (of causal models, whose next label is not), so that ``logits`` are
            ``(n, V)``, in order, and not ``(B, S, V)``. The loss and its gradients stay the same. So do calls without ``labels`` or
            with ``logits_to_keep``.

    Returns:
        What happened to each module, and why not: ``print(enable(model))``.

    Raises:
        ArgumentError: ``model`` is no module, an option has no such value, the model does not take ``example``, or has nothing to prepack,
            no head that is known to compute each token by itself, or no conformer that can be packed for ``"alone"``.
        VarlenError: the model is enabled already, and this is called inside of one of its forwards.

    Weights, `state_dict` and training mode stay. What changes: rows at padding, as ``padding_rows`` says. Only exactly torch's classes are
    converted; subclasses, parametrised, quantised, compiled and scripted modules are left alone. Layers whose norms, activation or
    linear layers were replaced are converted if a trial on a copy shows that these are token-wise; where one of them mixes tokens, it
    reads padding, and the whole stack is left alone. A `VarlenWarning` says when nothing was converted. Enabling twice is enabling once,
    and every call decides anew: what has been compiled or hooked since gets its class back, and the report says so.

    A model of transformers (5.4 or newer) attends through its attention interface, under the name ``varlen_attn``, and its stacks of
    layers run packed where a trial shows that nothing else changes: a few forwards in evaluation, with three short rows of random tokens
    or sound, without a trace in random states or training flags. Attention code of a model's own computes the padded batch as before, in
    layers that are packed where the trial allows it.

    Code that reads padding sees another number there: a mean over all columns, and a decoder that is given no
    ``memory_key_padding_mask`` and attends to the memory's padding. An ``example`` finds it; docs/what-enable-changes.md has all of it.

    Examples:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 2, enable_nested_tensor=False).eval()
        >>> report = enable(encoder)
        >>> len(report.converted)
        5
        >>> mask = torch.arange(5) >= torch.tensor([5, 3])[:, None]
        >>> bool(encoder(torch.randn(2, 5, 16), src_key_padding_mask=mask)[mask].any())  # rows at padding are 0
        False
    """
    _check(model)
    _check_options(level, need_weights, hooks, padding_rows, prepack, heads)
    levels = ("attention",) if level == "attention" else ("model", "attention")[: 1 if padding_rows == "alone" else None]
    weights = {True: "given", False: "asked", "never": "unread" if example is None else "none"}[need_weights]
    tried = [(name, weights) for name in levels] + [(levels[0], "given")] * (weights == "none")
    plans = (apart(partial(_plan, model, *each, hooks, padding_rows, level == "model")) for each in tried)
    before = _found(model)
    try:
        if example is None:
            parts = next(plans)
        else:
            parts = settled(model, inputs_of(example, "example"), plans, partial(_go, model))
        steps, rows = ([x for part in parts.values() for x in getattr(part, kind)] for kind in ("steps", "rows"))
        if weights == "unread":
            steps += classes.looking_at_weights(model, steps)
        if prepack:
            row, more = plan_prepacked(model, {x.module for x in steps if isinstance(x, Class)}, None if prepack is True else prepack)
            rows, steps = [*rows, row], [*steps, *more]
        if heads == "labelled":
            found, more = apart(partial(hf.plan_heads, model, steps)) if (hf := _transformers(model)) else ([], [])
            rows, steps = [*rows, *(ModuleReport(*row) for row in found)], [*steps, *more]
            if not more:
                raise ArgumentError(
                    "`heads` must be 'all' for this model, but is 'labelled', which needs a model of transformers whose loss compares each "
                    f"token with a label: {'; '.join(f'{kind}: {why}' for _, kind, _, why in found) or 'there is none in it'}."
                )
        if padding_rows == "alone" and not any(("padding_rows", "alone") in x.options for x in steps if isinstance(x, Class)):
            found = {f"{row.kind}: {row.reason}" for row in rows if row.kind == "Conformer"} or {"there is none in it"}
            raise ArgumentError(
                "`padding_rows` must be None, 'edge', 'zero' or 'exact' for this model, but is 'alone', which needs level='model' and a "
                f"Conformer of torchaudio that can be packed: {'; '.join(found)}."
            )
        _go(model, steps)
        report = Report(tuple(rows), _problem(model))
        if not any(m.action in ("converted", "built so") for m in report.modules):
            warn(f"nothing was converted, the model computes padding as before: {report}.", VarlenWarning)
        return report
    except BaseException:
        with undone(partial(_go, model, before)):
            raise


def _go(model: nn.Module, steps: Sequence[Step]) -> None:
    """From what has been done to a model to ``steps``."""
    switch = Switch(lambda: _found(model), steps)
    try:
        switch.make()
    except BaseException:
        switch.undo()
        raise


def _plan(model: nn.Module, level: str, weights: str, hooks: str, padding_rows: str | None, whole: bool) -> dict[Any, Part]:
    """What is to be done to a model, of which nothing is changed yet: to its models of transformers, and to each module of torch's, or with
    ``whole`` each `Conformer`, with all inside of it."""
    conformers = _ATTENTION_ONLY if level == "attention" else _EXACT if padding_rows == "exact" else padding_rows or "zero"
    found = candidates(model, hooks, conformers if whole else None)
    alone, padding_rows = padding_rows == "alone", None if padding_rows == "alone" else padding_rows
    hf, mixer = _transformers(model), None if padding_rows else mixing(model)
    rows, steps = hf.plan(model, level, hooks, padding_rows) if hf else ([], [])
    parts: dict[Any, Part] = {None: Part([ModuleReport(*row) for row in rows], list(steps))}
    for c in found:
        original = original_class(c.module)
        if c.why_not is None and c.host not in HOSTS:
            reader = None if padding_rows else mixing(model, c.module)
            says = conformer.says("alone" if alone else padding_rows, reader)
            decision = _Decision(conformer.enabled(c.host), "converted", says, "alone" if alone else None)  # type: ignore[arg-type]
        else:
            decision = _decide(c, found, level, weights, mixer)
        new_class = decision.new_class or original
        restored = decision.new_class is None and own_class(c.module) is not original
        outermost = c
        while outermost.parent is not None:
            outermost = outermost.parent
        part = parts.setdefault(outermost.name, Part([], []))
        part.rows.append(ModuleReport(c.name, original.__name__, "restored" if restored else decision.action, decision.reason))
        if new_class is not original:
            # `torch.fx` makes a leaf of what says that it is of torch.nn, and asks the object.
            wanted = {
                "hooks_packed": hooks == "packed",
                "padding_rows": decision.padding_rows or padding_rows or "zero",
                "weights": decision.weights,
                "__module__": original.__module__,
            }
            changed = ((name, value) for name, value in wanted.items() if value != getattr(new_class, name))
            part.steps.append(Class(c.module, new_class, original, tuple(changed)))
    return parts


def _found(model: nn.Module) -> list[Step]:
    """What has been done to a model."""
    hf = _transformers(model)
    enabled = [(m, original) for m in model.modules() if (original := original_class(m)) is not own_class(m)]
    swapped = [Class(m, own_class(m), original, tuple((x, vars(m)[x]) for x in classes.OPTIONS if x in vars(m))) for m, original in enabled]
    return [*swapped, *found_prepacked(model), *classes.found_looking(model), *(hf.found(model) if hf else [])]


def disable(model: nn.Module) -> Report:
    """Undo `enable`: every module gets its class back. Modules that were built from our classes keep them.

    Forwards under way in other threads are waited for: they go on with what they began with. What is left of an `enable` of an earlier
    version that was broken off is removed too, and a model of transformers that was given ``varlen_attn`` by hand gets its default.

    Returns:
        What was restored.

    Raises:
        ArgumentError: ``model`` is no module.
        VarlenError: called inside of a forward of the model.

    Examples:
        >>> layer = nn.TransformerEncoderLayer(16, 2, batch_first=True)
        >>> report = enable(layer)
        >>> report = disable(layer)
        >>> type(layer) is nn.TransformerEncoderLayer
        True
    """
    _check(model)
    hf = _transformers(model)
    restored = [ModuleReport(*row) for row in hf.enabled_models(model)] if hf else []
    for name, module in model.named_modules():
        original = original_class(module)
        if original is not own_class(module) and not is_prepacked(module) and (hf is None or not isinstance(module, hf.Watched)):
            restored.append(ModuleReport(name, original.__name__, "restored", ""))
        elif hasattr(original, "original_class") and is_varlen(module):
            reason = "its class was derived from the enabled one, as parametrisations do: remove them first"
            restored.append(ModuleReport(name, original.__name__, "left alone", reason))
    for entry in found_prepacked(model)[:1]:
        reason = f"weights in oneDNN's blocked format, by prepack={entry.value.dtype or True}"
        restored.append(ModuleReport("", "Linear", "restored", reason))
    report = Report(tuple(restored))
    _go(model, [])
    return report


@contextmanager
def enabled(
    model: nn.Module,
    level: Level = "auto",
    *,
    need_weights: bool | Literal["never"] = True,
    hooks: Literal["leave", "packed"] = "leave",
    padding_rows: PaddingRows | Literal["alone"] | None = None,
    example: Any = None,
    prepack: bool | torch.dtype = False,
    heads: Literal["all", "labelled"] = "all",
) -> Iterator[Report]:
    """``with enabled(model) as report``: `enable` for the length of a block; afterwards every module is what it was before.

    Raises:
        ArgumentError, VarlenError: as `enable`.

    Examples:
        >>> layer = nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
        >>> with enabled(layer) as report:
        ...     out = layer(torch.randn(2, 5, 16), src_key_padding_mask=torch.arange(5) >= torch.tensor([5, 3])[:, None])
        >>> type(layer) is nn.TransformerEncoderLayer
        True
    """
    _check(model)
    before = _found(model)
    with undone(partial(_go, model, before)):
        yield enable(
            model, level, need_weights=need_weights, hooks=hooks, padding_rows=padding_rows, example=example, prepack=prepack, heads=heads
        )


def _transformers(model: nn.Module) -> Any:
    """The integration, if there is a model of transformers in ``model``; a program that has one has imported transformers."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is None or not any(isinstance(module, library.PreTrainedModel) for module in model.modules()):
        return None
    return importlib.import_module("varlen_attn.integrations.transformers")


def _problem(model: nn.Module) -> Problem | None:
    """Of the calls of attention, as far as the weights say."""
    one = next((p for p in model.parameters() if p.is_floating_point() and p.device.type in ("cpu", "cuda")), None)
    return None if one is None else Problem(device_type=one.device.type, dtype=one.dtype)


def _check(model: nn.Module) -> None:
    if isinstance(model, type):
        raise ArgumentError(f"`model` must be a torch.nn.Module, but is the class {model.__name__}: pass an instance.")
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"`model` must be a torch.nn.Module, but is {type(model).__name__}: pass the model itself.")


def _check_options(level: Any, need_weights: Any, hooks: Any, padding_rows: Any, prepack: Any, heads: Any) -> None:
    for name, value, fix, *allowed in (
        ("level", level, "'model' packs whole stacks, 'attention' calls of attention", *get_args(Level)),
        ("need_weights", need_weights, _WEIGHTS, True, False, "never"),
        ("hooks", hooks, "'leave' leaves modules with hooks alone, 'packed' converts them too", "leave", "packed"),
        ("prepack", prepack, _PREPACK, True, False, torch.bfloat16),
        ("padding_rows", padding_rows, "None is the default of each kind of module", None, *get_args(PaddingRows), "alone"),
        ("heads", heads, "'labelled' computes a head and its loss at labelled tokens only", "all", "labelled"),
    ):
        if not any(type(value) is type(x) and value == x for x in allowed):
            *others, last = map(repr, allowed)
            raise ArgumentError(f"`{name}` must be {', '.join(others)} or {last}, but is {value!r}: {fix}.")


_PREPACK = "True keeps weights in oneDNN's blocked format as well, for inference, torch.bfloat16 rounds them too"
_WEIGHTS = "False makes attention return None in place of its weights, 'never' also where a call asks for them and nothing reads them"


# -------------------------------------------------------------------- decisions

_NEW_CLASSES: dict[tuple[str, type[nn.Module]], type[nn.Module]] = {
    ("model", nn.TransformerEncoder): classes.EnabledTransformerEncoder,
    ("model", nn.TransformerEncoderLayer): classes.EnabledTransformerEncoderLayer,
    ("model", nn.TransformerDecoder): classes.EnabledTransformerDecoder,
    ("model", nn.TransformerDecoderLayer): classes.EnabledTransformerDecoderLayer,
    ("attention", nn.TransformerEncoder): classes.AttentionOnlyTransformerEncoder,
    ("attention", nn.TransformerEncoderLayer): classes.AttentionOnlyTransformerEncoderLayer,
}
_SAYS = {
    "given": "pays for attention weights with the padded computation, unless called or enabled with need_weights=False",
    "asked": "returns no attention weights unless asked",
    "unread": "returns no attention weights, once a forward has shown that nothing reads them",
    "none": "returns no attention weights",
}
_ATTENTION_ONLY = 'level="attention" changes calls of attention only'
_EXACT = 'padding_rows="exact" is what it computes as it came'


class _Decision(NamedTuple):
    new_class: type[nn.Module] | None
    action: Action
    reason: str
    padding_rows: str | None = None
    weights: str = "given"

    @classmethod
    def alone(cls, reason: str) -> _Decision:
        return cls(None, "left alone", reason)


def _decide(c: Candidate, found: list[Candidate], level: str, weights: str, mixer: str | None) -> _Decision:
    """What becomes of one candidate, given all of them."""
    if is_varlen(c.module):
        return _Decision(None, "built so", f"a {type(c.module).__name__}: it packs already")
    if c.why_not is not None:
        return _Decision.alone(c.why_not)
    if c.host is nn.MultiheadAttention:
        return _decide_attention(c, weights, mixer)
    new_class = _NEW_CLASSES.get((level, c.host))
    if new_class is None:
        return _Decision.alone(_ATTENTION_ONLY)
    if c.host not in LAYERS:
        layers = [x for x in found if x.host in LAYERS and any(x.module is unwrapped(m) for m in c.module.layers)]  # type: ignore[union-attr]
        if not any(is_varlen(x.module) or x.why_not is None for x in layers):
            return _Decision.alone("none of its layers can be converted")
    read = f'rows at padding are 0, which {mixer} may read: padding_rows="exact" keeps them' if mixer else ""
    return _Decision(new_class, "converted", read if level == "model" else _ATTENTION_ONLY)


def _decide_attention(c: Candidate, weights: str, mixer: str | None) -> _Decision:
    if c.parent is not None and c.parent.host not in HOSTS and c.parent.why_not is None:  # of a Conformer, which may run as it came
        return _Decision(classes.EnabledMultiheadAttention, "converted", "", "exact")
    layer = c.parent if c.parent is not None and c.parent.host in LAYERS else None
    if layer is not None and layer.host is nn.TransformerEncoderLayer and layer.why_not is not None:
        return _Decision.alone("part of a layer that is left alone, which in evaluation reads its weights and does not call it")
    weights = "none" if weights == "unread" and not c.name else weights  # its caller knows what it gives
    why = [] if weights == "given" and layer is not None else [_SAYS[weights]]
    if mixer is None or (layer is not None and layer.why_not is None):
        return _Decision(classes.EnabledMultiheadAttention, "converted", "; ".join(why), weights=weights)
    why.append(f'keeps torch\'s rows at padding, which {mixer} may read: padding_rows="zero" leaves them out')
    return _Decision(classes.EnabledMultiheadAttention, "converted", "; ".join(why), "exact", weights)
