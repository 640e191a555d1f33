"""Models of Hugging Face transformers: attention for every architecture that has its interface, packed stacks for those that stand a trial.

`varlen_attn.enable` comes here with every `PreTrainedModel` that it finds. By hand, the two lines are::

    varlen_attn.integrations.transformers.register()
    model.set_attn_implementation("varlen_attn")
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

from torch import nn

from ..errors import ArgumentError
from ..records import Record, record
from . import _hf_stack as stack_hooks
from ._hf_attention import NotPackable, varlen_attention_forward
from ._hf_mask import paddings, varlen_mask
from ._hf_trial import Trial, difference, prepare, run

__all__ = ["NAME", "disable", "enable", "register", "roots", "snapshot"]

# Neither "flash" nor "sdpa" nor "flex_attention" may be part of it, nor a slash: transformers takes all of these for something of its own.
NAME = "varlen_attn"
OLDEST = (5, 4)
_STATE = "_varlen_attn_state"

Row = tuple[str, str, Literal["converted", "left alone", "restored"], str]
Implementation = str | dict[str, Any]


@dataclass(frozen=True)
class State:
    """What `disable` needs; kept on the model, so that copies of it have it too.

    Attributes:
        before: the attention implementation, with those of sub-configurations.
        stacks: names of the module lists whose layers run packed.
        guarded: whether ids at padding are looked at first.
    """

    before: Implementation
    stacks: tuple[str, ...]
    guarded: bool

    def __reduce__(self) -> tuple[Any, ...]:
        return _state_of_pickle, (self.before, self.stacks, self.guarded)


def _state_of_pickle(*fields: Any) -> State:
    """A process that loads an enabled model has not registered anything yet."""
    register()
    return State(*fields)


def register() -> None:
    """Make ``attn_implementation="varlen_attn"`` known to transformers: attention and masks, under one name.

    Raises:
        ArgumentError: transformers is older than 5.4, whose masks are made in another way.
    """
    import transformers

    found = tuple(int(x) for x in re.findall(r"\d+", transformers.__version__)[:2])
    if found < OLDEST:
        raise ArgumentError(
            f"`transformers` must be at least {OLDEST[0]}.{OLDEST[1]}, whose masks say what they hide, but is {transformers.__version__}: "
            "pip install 'transformers>=5.4'."
        )
    # Both or none: with the first alone masks become None, and padding is attended to without a word.
    transformers.AttentionInterface.register(NAME, varlen_attention_forward)
    transformers.AttentionMaskInterface.register(NAME, varlen_mask)


def roots(model: nn.Module) -> list[tuple[str, Any]]:
    """The outermost models of transformers inside ``model``, by name."""
    from transformers import PreTrainedModel

    names: list[str] = []
    found: dict[int, tuple[str, Any]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PreTrainedModel) and not _is_inside(name, names):
            names.append(name)
            found.setdefault(id(module), (name, module))
    return list(found.values())


def enable(model: nn.Module, level: str, hooks: str) -> list[Row]:
    """Enable every model of transformers in ``model``; one row for each stack of layers and each attention module."""
    rows: list[Row] = []
    closed = [name for name, module in model.named_modules() if _is_compiled(module)]
    for name, root in roots(model):
        compiled = _is_inside(name, closed)
        disable(root)
        tree = stack_hooks.Tree()
        parts = _parts(root)
        whole = None if parts == [("", root)] or level != "model" else _Part("", root, level, hooks, compiled, tree)
        if whole is not None:
            whole.run_trials()
        for part_name, part in parts:
            rows += _Part(part_name, part, level, hooks, compiled, tree).enable(name)
        if whole is not None and _is_packed(root):
            rows = _check_whole(root, tree, whole, rows)
        if _is_packed(root):
            stack_hooks.watch(tree, root, guarded=whole is not None)
    return rows


def _check_whole(root: Any, tree: stack_hooks.Tree, whole: _Part, rows: list[Row]) -> list[Row]:
    """Try the model around its parts, whose heads may read padding too; if they do, no part runs packed."""
    stack_hooks.watch(tree, root, guarded=True)
    reason = whole.compare([(trial._replace(full=True), expected) for trial, expected in whole.trials])
    stack_hooks.unwatch(root)
    kept = _states(root)
    for module, state in kept:
        if reason is None and state.stacks:
            stack_hooks.watch(tree, module, state.stacks, state.guarded)
        elif reason is not None:
            for stack in state.stacks:
                stack_hooks.remove(module.get_submodule(stack))
            setattr(module, _STATE, State(state.before, (), False))
    if reason is None:
        return rows
    return [
        (n, k, "left alone", f"not packed as a whole: {reason}") if r.startswith("packed once") else (n, k, a, r) for n, k, a, r in rows
    ]


def disable(model: nn.Module) -> list[Row]:
    """The exact inverse: implementations as they were, no hooks."""
    rows: list[Row] = []
    names = {id(module): name for name, module in model.named_modules()}
    for module, state in reversed(_states(model)):  # parts first: what a part had before may be what the whole had been given
        module.set_attn_implementation(state.before)
        delattr(module, _STATE)
        rows.append((names[id(module)], type(module).__name__, "restored", ""))
    stack_hooks.remove(model.modules())
    return rows[::-1]


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Later, puts every model of transformers in ``model`` back into the state that it has now."""
    before = [(module, state, _implementation(module.config)) for module, state in _states(model)]

    def restore() -> None:
        disable(model)
        trees = {id(m): tree for _, root in roots(model) for tree in [stack_hooks.Tree()] for m in root.modules()}
        for module, state, implementation in before:
            module.set_attn_implementation(implementation)
            for stack in state.stacks:
                stack_hooks.install(module.get_submodule(stack))
            if state.stacks:
                stack_hooks.watch(trees[id(module)], module, state.stacks, state.guarded)
            setattr(module, _STATE, state)
        for _, root in roots(model):
            if _is_packed(root):
                stack_hooks.watch(trees[id(root)], root)

    return restore


def _states(model: nn.Module) -> list[tuple[Any, State]]:
    return [(module, state) for module in model.modules() if isinstance(state := vars(module).get(_STATE), State)]


def _is_packed(model: nn.Module) -> bool:
    return any(state.stacks for _, state in _states(model))


# -------------------------------------------------------------------- what a model is made of


def _is_inside(name: str, outer: Iterable[str]) -> bool:
    """Whether a module is one of others, or inside of one."""
    return any(not other or f"{name}.".startswith(f"{other}.") for other in outer)


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def _parts(root: Any) -> list[tuple[str, Any]]:
    """The model itself, or, where it is made of several (text and images, encoder and decoder), the parts that may be tried alone."""
    from transformers import PreTrainedModel

    parts: dict[str, Any] = {}
    for name, module in root.named_modules():
        if not isinstance(module, PreTrainedModel) or _is_inside(name, parts):
            continue
        composite = len(getattr(module.config, "sub_configs", {})) > 0
        if not (composite and any(isinstance(m, PreTrainedModel) and m.config is not module.config for m in module.modules())):
            parts[name] = module
    return list(parts.items()) or [("", root)]


def _calls_interface(module: nn.Module) -> bool:
    """Whether a module computes attention through transformers' interface."""
    return _source_calls_interface(type(module))  # type: ignore[arg-type]


@cache
def _source_calls_interface(cls: type) -> bool:
    for base in cls.__mro__:
        if base.__module__.startswith(("torch.", "transformers.modeling_utils")):
            continue
        try:
            if "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(base):
                return True
        except (OSError, TypeError):
            continue
    return False


def _attentions(model: nn.Module) -> tuple[list[tuple[str, nn.Module]], list[tuple[str, nn.Module]]]:
    """Modules that compute attention through the interface, and those with attention code of their own."""
    through: list[tuple[str, nn.Module]] = []
    own: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if _calls_interface(module):
            through.append((name, module))
        elif "Attention" in type(module).__name__ and not type(module).__module__.startswith("torch."):
            known = any(_calls_interface(m) or isinstance(m, nn.MultiheadAttention) for m in module.modules())
            # An attention inside of an attention is named once, by the outermost.
            if not known and not _is_inside(name, (other for other, _ in own)):
                own.append((name, module))
    return through, own


class _Stack(NamedTuple):
    """A list of layers of which some attend through the interface, and the module that calls them."""

    name: str
    layers: nn.ModuleList
    owner: nn.Module
    whole: bool  # all of them do


def _stacks(model: nn.Module) -> list[_Stack]:
    found: list[_Stack] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or _is_inside(name, (other.name for other in found)):
            continue
        attends = [any(_calls_interface(m) for m in layer.modules()) and not _calls_interface(layer) for layer in module]
        if any(attends):
            found.append(_Stack(name, module, model.get_submodule(name.rpartition(".")[0]), all(attends)))
    return found


def _implementation(config: Any) -> Implementation:
    """What `set_attn_implementation` takes to make everything as it is now."""
    inner = {key: sub for key in getattr(config, "sub_configs", {}) if (sub := getattr(config, key, None)) is not None}
    own: str = config._attn_implementation or "eager"
    return {"": own, **{key: _implementation(sub) for key, sub in inner.items()}} if inner else own


# -------------------------------------------------------------------- one model


class _Part:
    """Enabling one model, with what was found out about it."""

    def __init__(self, name: str, model: Any, level: str, hooks: str, compiled: bool, tree: stack_hooks.Tree) -> None:
        self.name, self.model, self.level, self.hooks, self.compiled, self.tree = name, model, level, hooks, compiled, tree
        self.through, self.own = _attentions(model)
        self.stacks = _stacks(model)
        self.trials: list[tuple[Trial, dict[str, Any]]] = []
        self.why_not_packed: dict[str, str] = {}
        self.packed: list[str] = []
        self.guarded = False

    def enable(self, root: str) -> list[Row]:
        reason = self._why_not() or self._attention()
        if reason is None:
            setattr(self.model, _STATE, State(self.before, tuple(self.packed), self.guarded))
        return [(_joined(root, self.name, name), kind, action, why) for name, kind, action, why in self._rows(reason)]

    def _rows(self, reason: str | None) -> Iterator[Row]:
        if reason is not None:
            for name, module in [*self.through, *self.own] or [("", self.model)]:
                yield name, type(module).__name__, "left alone", reason
            return
        for name, layers, *_ in self.stacks:
            kind = f"{len(layers)} x {type(layers[0]).__name__}"
            if name in self.packed:
                guarded = ", where padding holds pad_token_id" if self.guarded else ""
                yield name, kind, "converted", f"packed once around the stack{guarded}"
            else:
                yield name, kind, "left alone", f"not packed as a whole: {self.why_not_packed.get(name, _ATTENTION_ONLY)}"
        for name, module in self.through:
            yield name, type(module).__name__, "converted", ""

    def _why_not(self) -> str | None:
        """Before anything is changed."""
        if self.own:
            names = ", ".join(sorted({type(m).__name__ for _, m in self.own}))
            return f"attention code of its own ({names}), which does not go through transformers' attention interface"
        if not self.through:
            return "no attention that goes through transformers' attention interface"
        if self.compiled or any(_is_compiled(module) for module in self.model.modules()):
            return "compiled: call enable before torch.compile"
        return None

    def _attention(self) -> str | None:
        """Set the implementation, and see that the model uses it and gives what it gave; else the reason, and nothing is changed."""
        register()
        self.before = _implementation(self.model.config)
        untried = self.run_trials()
        self.model.set_attn_implementation(NAME)
        if self.model.config._attn_implementation != NAME:
            reason: str | None = "transformers does not let its attention implementation be set"
        elif untried is None:
            reason = self.compare(self.trials)
        elif all(getattr(m, "_supports_sdpa", True) for m in self.model.modules()):
            reason = None  # what `sdpa` can compute, dense calls of ours are
        else:
            reason = f"{untried}, and it does not support sdpa"
        if reason is not None:
            self.model.set_attn_implementation(self.before)
            return reason
        for stack in self.stacks if self.level == "model" else ():
            why = untried or self._why_not_stack(stack) or self._pack(stack.name, stack.layers)
            if why is None:
                self.packed.append(stack.name)
            else:
                self.why_not_packed[stack.name] = why
        stack_hooks.unwatch(self.model)  # the trials'
        if self.packed:
            stack_hooks.watch(self.tree, self.model, tuple(self.packed), self.guarded)
        return None

    def run_trials(self) -> str | None:
        """Keep what the model gives before; or say why that is not known."""
        try:
            trials = prepare(self.model)
            if isinstance(trials, str):
                return trials
            self.trials = [(trial, self._run(trial)) for trial in trials]
        except Exception as error:
            return f"it could not be tried: {_in_one_line(error)}"
        return None

    def _run(self, trial: Trial) -> dict[str, Any]:
        return run(self.model, trial, [stack.name for stack in self.stacks])

    def compare(self, trials: Sequence[tuple[Trial, dict[str, Any]]]) -> str | None:
        """Whether the model gives something else now, and what."""
        try:
            for trial, expected in trials:
                with record(self.model) as log, paddings() as made:
                    got = self._run(trial)
                reason = difference(trial, expected, got, made)
                self.log: Record = log
                if reason is not None or not len(log):
                    return reason or "its layers never call transformers' attention interface"
        except NotPackable as error:
            return str(error)
        except Exception as error:
            return f"a trial failed: {_in_one_line(error)}"
        return None

    # ---------------------------------------------------------------- the stack

    def _why_not_stack(self, stack: _Stack) -> str | None:
        """What is known of a stack without a trial."""
        layers, owner = stack.layers, stack.owner
        if not stack.whole:
            return "not every layer in it attends through transformers' attention interface"
        if getattr(self.model.config, "chunk_size_feed_forward", 0):
            return "chunk_size_feed_forward cuts rows of a fixed number"
        extras = [p for p in inspect.signature(type(owner).forward).parameters if re.search(r"visual|deepstack|image|vision", p)]
        if extras:
            return f"between its layers {type(owner).__name__} adds to tokens by column ({extras[0]})"
        mixing = next((type(m).__name__ for m in layers.modules() if isinstance(m, _MIXING) and getattr(m, "kernel_size", 0) != (1,)), None)
        if mixing is not None:
            return f"a {mixing} in its layers mixes tokens"
        if any(hasattr(m, "expert_capacity") for m in layers.modules()):
            return "its experts take a number of tokens that depends on how many there are"
        hooked = next((name for name, m in layers.named_modules() if not stack_hooks.only_waiting(m)), None)
        if hooked is not None and self.hooks == "leave":
            return f'layer {hooked} has hooks, which would see packed rows: allow it with hooks="packed"'
        return None

    def _pack(self, name: str, layers: nn.ModuleList) -> str | None:
        stack_hooks.install(layers)
        stack_hooks.watch(self.tree, self.model, guarded=self.guarded)
        reason = self.compare(self.trials[:1])
        if reason is None and not self._was_packed(name):
            reason = "its layers were not given a mask of padding alone"
        # What is packed with padding on the left is a decoder's, whose padding sees nothing: its poolers must not see it either.
        trials = [(trial._replace(full=True), expected) for trial, expected in self.trials]
        odd = [(trial, expected) for trial, expected in trials if trial.odd_ids]
        if reason is None:
            reason = self.compare([(trial, expected) for trial, expected in trials[1:] if not trial.odd_ids])
        if reason is None and not self.guarded and self.compare(odd) is not None:
            self.guarded = True
            stack_hooks.unwatch(self.model)
            stack_hooks.watch(self.tree, self.model, guarded=True)
            reason = self.compare(odd)
        if reason is not None:
            stack_hooks.remove(layers)
        return reason

    def _was_packed(self, name: str) -> bool:
        calls = [c for c in self.log.calls if (c.module or "").startswith(f"{name}.")]
        return any(c.rows is not None and c.slots is not None and c.rows < c.slots for c in calls)


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


# Across columns, or over all of a batch's positions.
_MIXING = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.RNNBase)
_ATTENTION_ONLY = 'level="attention" changes calls of attention only'
