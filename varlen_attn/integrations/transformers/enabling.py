"""Models of Hugging Face transformers: attention for every architecture that has its interface, packed stacks for those that stand a trial.

`varlen_attn.enable` comes here with every `PreTrainedModel` that it finds. By hand, the two lines are::

    varlen_attn.integrations.transformers.register()
    model.set_attn_implementation("varlen_attn")
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from types import CodeType, FunctionType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..._clone import NotCloned, Seeded
from ..._switch import Entry, Hook, Step, original_class
from ..._torch import unwrapped
from ...attention.dispatch import use_backend
from ...attention.records import record
from ...errors import ArgumentError
from . import stack as stack_hooks
from .attention import NotPackable, varlen_attention_forward
from .labelled import next_labels, with_entry
from .mask import INTERNAL, leaving, masks, paddings, varlen_mask
from .trial import Trial, clone_of, difference, prepare, run

# Neither "flash" nor "sdpa" nor "flex_attention" may be part of it, nor a slash: transformers takes all of these for something of its own.
NAME = "varlen_attn"
OLDEST = (5, 4)
_STATE = "_varlen_attn_state"
_INTERFACE = ("ALL_ATTENTION_FUNCTIONS",)
_MASKS = tuple(f"{of}key_padding_mask" for of in ("", "src_", "tgt_", "memory_"))

Row = tuple[str, str, Literal["converted", "left alone", "restored"], str]
PaddingRows = Literal["edge", "zero", "exact"] | None


@dataclass(frozen=True)
class State:
    """What `disable` needs; kept on the model, so that copies of it have it too.

    Attributes:
        before: every configuration whose attention implementation was set, with the one that it had.
    """

    before: tuple[tuple[Any, str | None], ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return _state_of_pickle, (self.before,)


def _state_of_pickle(before: Any, *_: Any) -> State:
    """A process that loads an enabled model has not registered anything yet. Earlier versions kept one name, or several by part."""
    register()
    return State(before if isinstance(before, tuple) else ())


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


def plan(model: nn.Module, level: str, hooks: str, padding_rows: PaddingRows = None) -> tuple[list[Row], list[Step]]:
    """What is to be done to every model of transformers in ``model``, of which nothing is changed.

    One row for each stack of layers and each attention module.
    """
    rows: list[Row] = []
    steps: list[Step] = []
    before, found = _before(model), roots(model)
    for name, root in found:
        register()
        options = _Options(_why_attention_only(model, found, root, level, padding_rows), hooks, padding_rows)
        parts = [_Part(part_name, part, options, before) for part_name, part in _parts(root)]
        whole = None if [part.name for part in parts] == [""] or options.attention_only else _Part("", root, options, before)
        for part in parts:
            part.decide()
        if whole is not None and any(part.packed for part in parts):
            _check_whole(whole, parts)
        rows += [row for part in parts for row in part.rows(name)]
        packed = {part.model: (tuple(part.packed), part.guarded) for part in parts if part.packed}
        tree = stack_hooks.ModelId(hooks, padding_rows, root is not model or any(part.reads_first for part in parts))
        tree.left = True
        if packed:
            steps += stack_hooks.on_models(tree, root, packed if whole is None else {root: ((), True), **packed})
            steps += [hook for part in parts for hook in part.on_layers(tree, part.model)]
        # The hooks are there before masks of ours are made, and pack only where all masks of a forward are.
        steps += [Entry(vars(part.model), _STATE, part.state()) for part in parts if part.reason is None or part.packed]
        steps += [step for part in parts for step in part.implementation()]
        steps += [_in_use(tree)] if packed else []
    return rows, steps


def _why_attention_only(model: nn.Module, found: list[tuple[str, Any]], root: Any, level: str, padding_rows: PaddingRows) -> str | None:
    """Known without a trial: what the caller asks for, or what reads rows at padding after the layers."""
    if level != "model":
        return 'level="attention" changes calls of attention only'
    if padding_rows == "exact":
        return 'padding_rows="exact": rows at padding are what they were'
    if padding_rows is not None:
        return None
    if "start_positions" in inspect.signature(type(root).forward).parameters:
        return "its head compares all columns, those of padding too"
    inside = {id(m) for _, other in found for m in other.modules()}
    around = {name: m for name, m in model.named_modules() if id(m) not in inside}
    masked = any(_says(m, _MASKS) for m in around.values())
    for name, module in around.items():
        if not any(_is_inside(other, [name]) for other, _ in found) and _mixes(module, masked):
            return f"{name} ({original_class(module).__name__}), which is no part of it, may read its rows at padding"
    return None


def _mixes(module: nn.Module, masked: bool) -> bool:
    """Whether a module computes across columns, those of padding too. Attention that is given a mask does not.

    Args:
        module: around a model of transformers.
        masked: whether code there says that it gives torch's attention a mask.
    """
    cls = original_class(module)
    if "Attention" in cls.__name__ and not cls.__module__.startswith("varlen_attn"):
        parameters = inspect.signature(cls.forward).parameters.values()
        return not masked if cls is nn.MultiheadAttention else all("mask" not in p.name or p.default is not p.empty for p in parameters)
    size = getattr(module, "kernel_size", 0)
    sizes = set(size) if isinstance(size, tuple) else {size}
    of_images = (
        cls.__name__.endswith(("2d", "3d")) and len(sizes) == 1
    )  # of text, where a matrix of words counts as one, no kernel is square
    known = isinstance(module, (*_MIXING, nn.RNNCellBase, nn.Flatten)) or cls.__module__ == "torch.nn.modules.pooling"
    known |= len(getattr(module, "normalized_shape", "D")) > 1
    return (known and sizes != {1} and not of_images) or (isinstance(module, nn.Softmax) and module.dim in (1, -2))


def _in_use(tree: stack_hooks.ModelId) -> Step:
    return Entry(vars(tree), "left", False, True)


def _check_whole(whole: _Part, parts: list[_Part]) -> None:
    """Try the model around its parts, whose heads may read padding too; if they do, no part runs packed."""
    whole.keep_what_it_gives()
    clone, trials = whole.clone, [(trial._replace(full=True), expected) for trial, expected in whole.trials]
    steps: list[Step] = []
    packed: dict[nn.Module, tuple[tuple[str, ...], bool]] = {clone: ((), True)}
    tree = stack_hooks.ModelId(whole.options.hooks, whole.options.padding_rows or "edge", any(part.reads_first for part in parts))
    for part in parts if clone is not None else ():
        its_clone = clone.get_submodule(part.name)
        packed[its_clone] = (tuple(part.packed), part.guarded)
        steps += part.on_layers(tree, its_clone)
        steps += part.implementation(whole.memo)
    steps += stack_hooks.on_models(tree, clone, packed) if clone is not None else []
    with made(steps):
        reason = whole.compare(trials)
        if reason is not None and not tree.reads_first:
            tree.reads_first = parts[0].reads_first = True
            reason = whole.compare(trials)
    for part in parts if reason is not None else ():
        part.why_not_packed |= dict.fromkeys(part.packed, str(reason))
        part.packed, part.guarded = [], False


def found(model: nn.Module) -> list[Step]:
    """What has been done to the models of transformers in ``model``."""
    states: list[Step] = [Entry(vars(m), _STATE, vars(m)[_STATE]) for m in model.modules() if _STATE in vars(m)]
    implementations = [_Implementation(c, vars(c)[INTERNAL], before) for c, before in _before(model).values()]
    steps = stack_hooks.found_on(model.modules())
    hooks = [getattr(getattr(step, "hook", None), "__self__", getattr(step, "value", None)) for step in steps]
    trees = {id(tree): tree for hook in hooks if (tree := getattr(hook, "tree", None))}
    return [*steps, *states, *implementations, *map(_in_use, trees.values())]


def enabled_models(model: nn.Module) -> list[Row]:
    """One row for each model that `disable` restores."""
    return [
        (name, type(m).__name__, "restored", "") for name, m in model.named_modules() if _STATE in vars(m) or stack_hooks.HEADS in vars(m)
    ]


def _before(model: nn.Module) -> dict[int, tuple[Any, Any]]:
    """The configurations that say ``varlen_attn`` now, or when they were enabled, by identity, and what they said before.

    Of the states of a model and its parts, which may share one configuration, the outermost knows. What was set by hand, or left behind
    when an earlier version was broken off, gets transformers' default.
    """
    said: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        for config, before in getattr(vars(module).get(_STATE), "before", ()):
            if before != NAME:
                said.setdefault(id(config), (config, before))
    for module in model.modules():
        for config in _all_configurations(getattr(module, "config", None)):
            if vars(config).get(INTERNAL) == NAME:
                said.setdefault(id(config), (config, "sdpa" if getattr(module, "_supports_sdpa", True) else "eager"))
    return said


# -------------------------------------------------------------------- heads


def plan_heads(model: nn.Module, steps: Sequence[Step]) -> tuple[list[Row], list[Step]]:
    """What is to be done beside ``steps`` so that heads compute labelled tokens only. One row for each model of transformers."""
    rows: list[Row] = []
    more: list[Step] = []
    for name, root in roots(model):
        try:
            heads = Entry(vars(root), stack_hooks.HEADS, _what_its_head_reads(root))
        except Exception as error:
            why = str(error) if isinstance(error, NotPackable) else f"a trial failed: {_in_one_line(error)}"
            rows.append((name, type(root).__name__, "left alone", why))
        else:
            watched = any(isinstance(x, Entry) and x.entries is vars(root) and x.name == stack_hooks.WATCH for x in steps)
            more += [heads] if watched else [*stack_hooks.on_models(stack_hooks.ModelId(), root, {}), heads]
            rows.append((name, type(root).__name__, "converted", "given labels, its head and loss compute labelled tokens only"))
    return rows, more


def _what_its_head_reads(root: Any) -> tuple[str, bool]:
    """The name of the model in ``root`` whose result the head reads, and whether the loss shifts labels.

    Raises:
        NotPackable: a trial shows that the loss gives gradients to other rows than those of labelled tokens, or is another for these alone.
    """
    trials = prepare(root)
    if isinstance(trials, str):
        raise NotPackable(trials)
    clone, _, _ = clone_of(root, [(stack.name, stack.layers) for stack in _stacks(root)])
    inputs = {name: x for name, x in trials[0].inputs.items() if name != "output_hidden_states"} | {"return_dict": True}
    logits = clone(**inputs).get("logits")
    if logits is None:
        raise NotPackable("it gives no logits")
    for entries in (vars(clone), *map(vars, _all_configurations(clone.config))):  # of the clone, which may have fewer words
        entries.update({"vocab_size": logits.shape[-1]} if "vocab_size" in entries else {})
    place = torch.arange(logits.shape[:2].numel(), device=logits.device).view(logits.shape[:2])
    inputs["labels"] = (place * 7 % logits.shape[-1]).masked_fill(place % 5 < 2, -100)
    inputs.pop("decoder_input_ids", None)  # it makes them from labels
    read: dict[str, Tensor] = {}

    def cut(name: str, _: nn.Module, args: Any, result: Any) -> Any:
        read[name] = result[0].detach().requires_grad_()
        return with_entry(result, 0, read[name])

    for name, module in clone.named_modules():
        if hasattr(module, "get_input_embeddings") and name:
            module.register_forward_hook(partial(cut, name))

    def learnt() -> dict[str, Tensor]:
        """The loss, and its gradient for each result that it reads at once."""
        read.clear()
        with torch.enable_grad(), Seeded():
            loss = clone(**inputs)["loss"]
            found = torch.autograd.grad(loss, list(read.values()), allow_unused=True)
        return {"loss": loss.detach(), **{name: x for name, x in zip(read, found, strict=True) if x is not None}}

    before = learnt()
    name, gradient = list(before.items())[-1]
    rows = gradient.ne(0).any(-1)
    shifts = next((x for x in (False, True) if torch.equal(rows, next_labels(inputs["labels"], x) != -100)), None)
    if shifts is None or len(before) != 2:
        raise NotPackable("its loss reads other rows than those of labelled tokens")
    with made([*stack_hooks.on_models(stack_hooks.ModelId(), clone, {}), Entry(vars(clone), stack_hooks.HEADS, (name, shifts))]):
        after = learnt()
    before[name], after[name] = gradient[rows], after[name][0, :-1]
    why = difference(trials[0]._replace(valid=None, full=True), before, after, [])
    if why is not None:
        raise NotPackable(f"with labelled tokens only its {why}")
    return name, shifts


# -------------------------------------------------------------------- attention implementations


class _WasEager(str):
    """Our name in place of ``eager``, and equal to both: transformers lets no other one have ``config.output_attentions``."""

    def __eq__(self, other: object) -> bool:
        return other == "eager" or str(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


_WAS_EAGER = _WasEager(NAME)


class _Implementation(Entry):
    """Of a configuration. Masks that are under way are told before their layers attend with ``eager``."""

    def __init__(self, config: Any, value: Any, before: Any) -> None:
        super().__init__(vars(config), INTERNAL, value, before)
        object.__setattr__(self, "config", config)

    def make(self) -> None:
        super().make()
        leaving.discard(id(self.config))  # type: ignore[attr-defined]

    def restore(self) -> None:
        config = self.config  # type: ignore[attr-defined]
        if self.before == "eager":
            leaving.add(id(config))
            for mask in masks:
                mask.added |= mask.config is config
        super().restore()
        leaving.discard(id(config))


def _all_configurations(config: Any) -> list[Any]:
    """One and those inside of it."""
    if INTERNAL not in getattr(config, "__dict__", {}):
        return []
    inner = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
    return [config, *(c for sub in inner for c in _all_configurations(sub))]


def _configurations(model: Any) -> list[Any]:
    """Those that `set_attn_implementation` would change; none where transformers does not let it be set."""
    from transformers import PreTrainedModel

    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    if not model._can_set_attn_implementation():
        return []
    chosen = {id(m.config): m.config for m in models if m._can_set_attn_implementation()}
    of_models = {id(m.config) for m in models}
    inside = {id(c): c for c in _all_configurations(model.config) if id(c) not in of_models}
    return [*chosen.values(), *inside.values()]


# -------------------------------------------------------------------- what a model is made of


def _is_inside(name: str, outer: Iterable[str]) -> bool:
    """Whether a module is one of others, or inside of one."""
    return any(not other or f"{name}.".startswith(f"{other}.") for other in outer)


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


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
    return _says(module, _INTERFACE)


def _says(module: nn.Module, words: tuple[str, ...]) -> bool:
    """Whether the code of its class says one of them, as a global, an attribute or a keyword of a call."""
    return _class_says(original_class(module), words)  # type: ignore[arg-type]


@cache
def _class_says(cls: type, words: tuple[str, ...]) -> bool:
    bases = [base for base in cls.__mro__ if not base.__module__.startswith(("torch.", "transformers.modeling_utils"))]
    return any(_names(inspect.unwrap(_function(x)).__code__, words) for base in bases for x in vars(base).values() if _function(x))


def _function(x: Any) -> Any:
    """Of a method of any kind; None if it has none."""
    x = getattr(x, "fget", getattr(x, "__func__", x))
    return x if isinstance(x, FunctionType) else None


def _names(code: CodeType, words: tuple[str, ...]) -> bool:
    said = (code.co_names, *(x for x in code.co_consts if isinstance(x, tuple)))
    inside = (x for x in code.co_consts if isinstance(x, CodeType))
    return any(word in names for names in said for word in words) or any(_names(x, words) for x in inside)


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
    """A list of layers of which some attend, and the module that calls them."""

    name: str
    layers: nn.ModuleList
    owner: nn.Module
    whole: bool  # all of them do


def _stacks(model: nn.Module) -> list[_Stack]:
    found: list[_Stack] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or _is_inside(name, (other.name for other in found)):
            continue
        attends = [bool(inner := _innermost(layer)) and layer not in inner for layer in module]
        if any(attends):
            found.append(_Stack(name, module, model.get_submodule(name.rpartition(".")[0]), all(attends)))
    return found


def _innermost(layer: nn.Module) -> list[nn.Module]:
    """The modules in a layer that compute attention, of any kind but torch's."""
    return [m for m in layer.modules() if _is_attention(m) and not any(_is_attention(x) for x in m.modules() if x is not m)]


def _is_attention(module: nn.Module) -> bool:
    named = "Attention" in type(module).__name__ and not type(module).__module__.startswith("torch.")
    return named or _calls_interface(module)


# -------------------------------------------------------------------- one model


class _Options(NamedTuple):
    """How a model is to be enabled.

    Attributes:
        attention_only: why no stack of layers is to run packed.
        hooks, padding_rows: as in `enable`.
    """

    attention_only: str | None
    hooks: str
    padding_rows: PaddingRows


class _Part:
    """One model, and what was found out about it on a clone.

    Attributes:
        reason: why its attention is left alone.
        packed: names of its stacks that run packed, and of those of them whose attention computes the padded batch.
        guarded: whether ids at padding are looked at first.
        reads_first: whether a head or pooler reads the first column.
        clone, memo: what is tried in its place, and the clone of everything in it, by identity; None where it cannot be tried.
        trials: with what the model gives.
        random: whether it draws random numbers in evaluation.
    """

    def __init__(self, name: str, model: Any, options: _Options, before: dict[int, tuple[Any, Any]]) -> None:
        self.name, self.model, self.options = name, model, options
        self.configurations = [(c, before.get(id(c), (c, vars(c)[INTERNAL]))[1]) for c in _configurations(model)]
        self.through, self.own = _attentions(model)
        self.stacks = _stacks(model)
        self.clone: Any = None
        self.memo: dict[int, Any] = {}
        self.trials: list[tuple[Trial, dict[str, Any]]] = []
        self.reason: str | None = None
        self.why_not_packed: dict[str, str] = {}
        self.packed: list[str] = []
        self.islands: set[str] = set()
        self.guarded = self.random = self.reads_first = False

    def state(self) -> State:
        return State(tuple(self.configurations))

    def implementation(self, memo: dict[int, Any] | None = None) -> list[Step]:
        """Of the model, or of a clone."""
        pairs = [(c if memo is None else memo[id(c)], before) for c, before in self.configurations if self.reason is None]
        return [_Implementation(c, _WAS_EAGER if before == "eager" else NAME, before) for c, before in pairs]

    def on_layers(self, tree: stack_hooks.ModelId, model: nn.Module) -> list[Step]:
        """Of the model, or of a clone."""
        return [hook for stack in self.packed for hook in self._hooks(tree, model.get_submodule(stack), stack in self.islands)]

    def _hooks(self, tree: stack_hooks.ModelId, layers: Any, islands: bool) -> list[Hook]:
        crosses = any(name in trial.inputs for trial, _ in self.trials for name in ("decoder_input_ids", "encoder_hidden_states"))
        inside = [m for layer in layers for m in _innermost(layer)] if islands else ()
        return stack_hooks.on_layers(tree, layers, inside, not self.own, crosses)

    def rows(self, root: str) -> list[Row]:
        return [(_joined(root, self.name, name), kind, action, why) for name, kind, action, why in self._rows()]

    def _rows(self) -> Iterator[Row]:
        for name, layers, *_ in self.stacks if self.reason is None or self.packed else ():
            kind = f"{len(layers)} x {type(layers[0]).__name__}"
            if name in self.packed:
                guarded = ", where padding holds pad_token_id" if self.guarded else ""
                but = ", but for attention, which computes the padded batch" if name in self.islands else ""
                yield name, kind, "converted", f"packed once around the stack{but}{guarded}"
            else:
                yield name, kind, "left alone", f"not packed as a whole: {self.options.attention_only or self.why_not_packed[name]}"
        for name, module in [*self.through, *self.own] or [("", self.model)]:
            yield name, type(module).__name__, "converted" if self.reason is None else "left alone", self.reason or ""

    def decide(self) -> None:
        self.reason = self._why_not()
        if self.own and self.stacks and self._is_wide() and self.options.attention_only is None and self.keep_what_it_gives() is None:
            self._pack_each(self._stacks_to_try(), islands=True)
        if self.reason is not None:
            return
        untried = self.keep_what_it_gives()
        if untried is None:
            with made(self.implementation(self.memo)):
                self._try()
        elif all(getattr(m, "_supports_sdpa", True) for m in self.model.modules()):
            # What `sdpa` can compute, dense calls of ours are.
            self.why_not_packed = {stack.name: untried for stack in self.stacks}
        else:
            self.reason = f"{untried}, and it does not support sdpa"

    def _why_not(self) -> str | None:
        """Known without a trial."""
        if self.own:
            names = ", ".join(sorted({type(m).__name__ for _, m in self.own}))
            return f"attention code of its own ({names}), which does not go through transformers' attention interface"
        if not self.through:
            return "no attention that goes through transformers' attention interface"
        if not self.configurations:
            return "transformers does not let its attention implementation be set"
        return None

    # ---------------------------------------------------------------- trials

    def keep_what_it_gives(self) -> str | None:
        """Or say why that is not known. On a few layers, and where these do not run alone, on all."""
        whole = True
        for short in (True, False):
            try:
                trials = prepare(self.model)
                if isinstance(trials, str):
                    return trials
                stacks = [(stack.name, stack.layers) for stack in self.stacks]
                self.clone, self.memo, whole = clone_of(self.model, stacks if short else [])
                for config, before in self.configurations:
                    vars(self.memo[id(config)])[INTERNAL] = before
                self.random = True
                self.trials = [(trial, self._run(trial)) for trial in trials]
                return None
            except NotCloned as error:
                return f"it could not be tried: {error}"
            except Exception as error:
                self.clone, reason = None, f"it could not be tried: {_in_one_line(error)}"
                if not short or whole:
                    break
        return reason

    def _run(self, trial: Trial) -> dict[str, Any]:
        # Orders of the caller's are for calls of the caller's.
        with use_backend("auto"), Seeded() if self.random else nullcontext() as seeded:
            given = run(self.clone, trial, [stack.name for stack in self.stacks])
        self.random = seeded is not None and seeded.used  # to look costs as much as a small model
        return given

    def compare(self, trials: Sequence[tuple[Trial, dict[str, Any]]]) -> str | None:
        """Whether the clone gives something else now, and what."""
        try:
            for trial, expected in trials:
                with record(self.clone) as log, paddings() as made_masks:
                    got = self._run(trial)
                reason = difference(trial, expected, got, made_masks)
                if reason is not None or not (len(log) or self.own):
                    return reason or "its layers never call transformers' attention interface"
        except NotPackable as error:
            return str(error)
        except Exception as error:
            return f"a trial failed: {_in_one_line(error)}"
        return None

    def _try(self) -> None:
        """All stacks packed, which usually does it; else attention alone, and then one stack after another, without its attention last."""
        stacks = self._stacks_to_try()
        self.reason = self.compare(self.trials[:1])  # a stack that runs packed does so only as long as nothing else is asked for
        if self.reason is None and not (stacks and self._pack(stacks)):
            self.reason = self.compare(self.trials[1:])
            self._pack_each(stacks if len(stacks) > 1 else [])
        self._pack_each(stacks if self._is_wide() else [], islands=True)

    def _is_wide(self) -> bool:
        return getattr(self.model.config.get_text_config(), "hidden_size", 0) >= _WIDE

    def _stacks_to_try(self) -> list[str]:
        reasons = {s.name: self._why_not_stack(s) for s in self.stacks} if self.options.attention_only is None else {}
        self.why_not_packed |= {name: why for name, why in reasons.items() if why is not None}
        return [name for name, why in reasons.items() if why is None]

    def _pack_each(self, stacks: list[str], islands: bool = False) -> None:
        left = [name for name in stacks if name not in self.packed]
        for some in ([left] if islands and len(left) > 1 else []) + [[name] for name in left]:
            if not set(some) <= set(self.packed) and (self.reason is None or self.own):
                self._pack(some, islands)

    def _pack(self, stacks: list[str], islands: bool = False) -> bool:
        """Those of them that stand a trial, beside those that run packed already; whether any does."""
        first, *others = self.trials
        if islands:  # which cannot give hidden states in rows, if the model collects them itself
            (trial, expected), others = first, self.trials
            inputs = {name: x for name, x in trial.inputs.items() if name != "output_hidden_states"}
            first = trial._replace(inputs=inputs), {name: x for name, x in expected.items() if not name.endswith("hidden_states")}
        with self._running(stacks, islands) as begun:
            reason = self.compare([first])
        packed = [name for name in stacks if any(id(layer) in begun for layer in map(unwrapped, self.clone.get_submodule(name)))]
        if reason is None:
            unpacked = [name for name in stacks if name not in packed]
            self.why_not_packed |= dict.fromkeys(unpacked, "its layers were not given a mask of padding alone")
            stacks = packed
        # What is packed with padding on the left is a decoder's, whose padding sees nothing: its poolers must not see it either.
        trials = [(trial._replace(full=True), expected) for trial, expected in others]
        odd = [(trial, expected) for trial, expected in trials if trial.odd_ids]
        if reason is None and stacks:
            usual = [(trial, expected) for trial, expected in trials if not trial.odd_ids]
            looks_at_ids = False
            for reads_first in (False, True):
                self.reads_first |= reads_first
                with self._running(stacks, islands):
                    reason = self.compare(usual)
                    looks_at_ids = reason is None and self.compare(odd) is not None
                if reason is None or self.reads_first:
                    break
            self.guarded |= looks_at_ids
            if looks_at_ids:
                with self._running(stacks, islands):
                    reason = self.compare(odd)
        if reason is None:
            self.packed += stacks
            self.islands |= set(stacks if islands else ())
        elif not islands or self.own:
            self.why_not_packed |= dict.fromkeys(stacks, reason)
        return reason is None and bool(stacks)

    @contextmanager
    def _running(self, stacks: list[str], islands: bool) -> Iterator[set[int]]:
        """The clone with these stacks packed, beside those that are already; the layers that are given rows first."""
        packed = (*self.packed, *stacks)
        # Without rules, so that it runs packed whatever it is given.
        tree = stack_hooks.ModelId(self.options.hooks, self.options.padding_rows or "edge", self.reads_first)
        hooks = self.on_layers(tree, self.clone)
        hooks += [hook for name in stacks for hook in self._hooks(tree, self.clone.get_submodule(name), islands)]
        with made([*hooks, *stack_hooks.on_models(tree, self.clone, {self.clone: (packed, self.guarded)})]):
            yield tree.begun

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
        if any("quantized.dynamic" in type(m).__module__ for m in layers.modules()):
            return "its linear layers are quantised with one scale for all rows of a batch, those of padding too"
        if any(hasattr(m, "expert_capacity") for m in layers.modules()):
            return "its experts take a number of tokens that depends on how many there are"
        return stack_hooks.why_hooked(layers, self.options.hooks)


@contextmanager
def made(steps: Sequence[Step]) -> Iterator[None]:
    """On a clone."""
    for step in steps:
        step.make()
    try:
        yield
    finally:
        for step in reversed(steps):
            step.remove()


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


# Layers around attention that needs columns: narrower ones take less time than the steps around them (Zen 4, one thread, 4 x 32 tokens).
_WIDE = 384
# Across columns, or over all of a batch's positions.
_MIXING = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.RNNBase)
