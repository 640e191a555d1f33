"""Trying a module on a copy, so that the module itself, its weights, its hooks and whatever it belongs to never notice.

A clone has the structure of a module and its weights: these are shared and not copied, but for those that are to be others. It has no
hooks, it is in evaluation, and its forwards are those of its classes. It is tried in a thread of its own, where nothing is as somebody
left it: gradients, autocast, what other forwards have begun. Random numbers come from generators that nobody else has.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ._state import undone

__all__ = ["NotCloned", "Seeded", "apart", "clone", "kinds", "noise"]

T = TypeVar("T")

_TRIES = 5
_ATOMS = (bool, int, float, complex, str, bytes, type(None), type, FunctionType, BuiltinFunctionType, torch.dtype, torch.device)
# Those of accelerate, which move weights and inputs, and what transformers notes of its own hooks.
_LEFT_OUT = ("_compiled_call_impl", "_hf_hook", "_old_forward", "_output_capturing_hooks_installed")
_WITH_HOOKS = {name for name in vars(nn.Module()) if "_hooks" in name}
_OWN = {*vars(nn.Module()), *_LEFT_OUT}


class NotCloned(Exception):
    """A module whose clone would not compute what the module does, and why."""


# -------------------------------------------------------------------- cloning


def clone(
    module: nn.Module,
    weight: Callable[[Tensor], Tensor] = lambda x: x,
    instead: Mapping[nn.Module, nn.Module] | None = None,
    lengths: Mapping[nn.Module, int] | None = None,
) -> tuple[nn.Module, dict[int, Any]]:
    """A clone, and what became of everything in it, by identity.

    Args:
        module: of which nothing is changed.
        weight: what replaces a parameter or buffer; a buffer that stays is copied.
        instead: modules that stand in place of others.
        lengths: of lists of layers, of which the first ones are kept.

    Raises:
        NotCloned: a ``forward`` was replaced on an object by a function, which may call the module itself.
    """
    for _ in range(_TRIES):
        try:
            cloning = _Cloning(weight, {id(old): new for old, new in (instead or {}).items()}, lengths or {})
            return cloning.module(module), cloning.memo
        except RuntimeError as error:  # a forward in another thread writes to a dictionary that is being copied
            last = error
    raise last


class _Cloning:
    def __init__(self, weight: Callable[[Tensor], Tensor], memo: dict[int, Any], lengths: Mapping[nn.Module, int]) -> None:
        self.weight, self.memo, self.lengths = weight, memo, lengths

    def module(self, module: nn.Module) -> nn.Module:
        """First everything gets its object, so that whatever refers to a module finds its clone."""
        made: list[tuple[nn.Module, nn.Module]] = []
        new = self._shell(module, made)
        for old, its_clone in made:
            self._fill(old, its_clone)
        return new

    def _shell(self, module: nn.Module, made: list[tuple[nn.Module, nn.Module]]) -> nn.Module:
        if id(module) in self.memo:
            known: nn.Module = self.memo[id(module)]
            return known
        new: nn.Module = object.__new__(_own(_own(type(module))))
        self.memo[id(module)] = new
        made.append((module, new))
        children = list(vars(module)["_modules"].items())
        kept = self.lengths.get(module, len(children))
        inside = {name: child and self._shell(child, made) for name, child in children[:kept]}
        vars(new)["_modules"] = type(vars(module)["_modules"])(inside)
        if kept < len(children):
            layers = [child for _, child in children]
            of_kind = kinds(layers)
            for kind, layer in zip(of_kind, layers, strict=True):
                self.memo.setdefault(id(layer), self.memo[id(layers[of_kind.index(kind)])])
        return new

    def _fill(self, module: nn.Module, new: nn.Module) -> None:
        state = dict(vars(module))
        its = vars(new)
        if "forward" in state:
            forward = state["_old_forward"] if "_hf_hook" in state else state["forward"]
            state["forward"] = getattr(forward, "_torchdynamo_orig_callable", forward)  # of torch.compile
            if isinstance(state["forward"], FunctionType):
                raise NotCloned(f"the forward of a {type(module).__name__} was replaced on the object")
        for name, x in state.items():
            if name in _WITH_HOOKS:
                its[name] = OrderedDict()
            elif name in ("_parameters", "_buffers"):
                its[name] = type(x)((key, self._tensor(y)) for key, y in x.items())
            elif name != "_modules" and name not in _LEFT_OUT:
                its[name] = self._value(x)
        its["training"] = False
        for number, hook in list(state["_forward_pre_hooks"].items()):
            if _is_part_of(hook):
                its["_forward_pre_hooks"][number] = hook

    def _tensor(self, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        if id(x) not in self.memo:
            new = self.weight(x)
            self.memo[id(x)] = new if new is not x or isinstance(x, nn.Parameter) else x.detach().clone()
        found: Tensor = self.memo[id(x)]
        return found

    def _value(self, x: Any) -> Any:
        if isinstance(x, _ATOMS):
            return x
        if id(x) in self.memo:
            return self.memo[id(x)]
        if isinstance(x, Tensor):
            return self._tensor(x)
        if isinstance(x, nn.Module):
            return self.module(x)
        if type(x) in (list, tuple, set):
            return type(x)(map(self._value, x))
        if type(x) in (dict, OrderedDict):
            return type(x)((key, self._value(y)) for key, y in x.items())
        try:
            return copy.deepcopy(x, self.memo)
        except Exception as error:
            if "during iteration" in str(error):
                raise
            return x  # a lock, a stream, a file: nothing that a forward computes with


def _own(cls: type[Any]) -> type[Any]:
    """Without the class that fully_shard derives, or that of a module that was enabled."""
    return vars(cls).get("original_class") or next(c for c in cls.__mro__ if not c.__module__.startswith("torch.distributed.fsdp"))


def _is_part_of(hook: Any) -> bool:
    """Whether a module does not compute without a hook: it makes a weight, or keeps torch from reading one."""
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home.startswith("torch.nn.utils") or home == f"{__package__}.nn.multihead"


def noise(p: Tensor, generator: torch.Generator) -> Tensor:
    """Small random numbers of the shape of a parameter."""
    return (torch.randn(p.shape, generator=generator, device="cpu") * 0.1).to(p.device, p.dtype)


# -------------------------------------------------------------------- layers of one kind


def kinds(layers: Sequence[nn.Module]) -> list[Any]:
    """Two layers of one kind differ in nothing but the values of their weights, how much they drop out, and their place."""
    facts = [_facts(layer) for layer in layers]
    first = facts[0] if facts else {}
    places = {
        key
        for key, x in first.items()
        if type(x) is int and len(facts) > 1 and all(type(f.get(key)) is int and f[key] == x + i for i, f in enumerate(facts))
    }
    return [tuple((key, x) for key, x in f.items() if key not in places) for f in facts]


def _facts(layer: nn.Module) -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    for name, module in layer.named_modules():
        found[name, ""] = type(module)
        for key, x in [*module._parameters.items(), *module._buffers.items()]:
            found[name, key] = None if x is None else (type(x), tuple(x.shape), x.dtype)
        if not isinstance(module, nn.modules.dropout._DropoutNd):
            for key, x in list(vars(module).items()):
                if key not in _OWN and "drop" not in key and (x := _plain(x)) is not None:
                    found[name, key] = x
    return found


def _plain(x: Any) -> Any:
    if isinstance(x, MethodType):
        return x.__func__
    if isinstance(x, tuple):
        return tuple(map(_plain, x))
    return x if isinstance(x, _ATOMS) else type(x)


# -------------------------------------------------------------------- trying


class Seeded(TorchDispatchMode):
    """Random numbers are drawn from its own generators, for all code that draws.

    Attributes:
        used: some were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used = False
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags:
            given = next((x.device for x in args if isinstance(x, Tensor)), torch.device(kwargs.get("device") or "cpu"))
            if not any(argument.name == "generator" for argument in func._schema.arguments):
                func = getattr(func.overloadpacket, "generator", func)
            if any(argument.name == "generator" for argument in func._schema.arguments) and kwargs.get("generator") is None:
                self.used = True
                if given not in self.generators:
                    self.generators[given] = torch.Generator(given).manual_seed(0)
                kwargs["generator"] = self.generators[given]
        return func(*args, **kwargs)


def apart(work: Callable[[], T]) -> T:
    """What ``work`` gives, in a thread of its own, without gradients. An interruption waits for it: it sees nothing, and is soon over."""
    executor = ThreadPoolExecutor(1, "varlen_attn trial")
    with undone(executor.shutdown):
        result: T = executor.submit(torch.no_grad()(work)).result()
        return result
