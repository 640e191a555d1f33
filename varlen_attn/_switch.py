"""Changing a live model: all at once or not at all, and beside threads that are calling it.

What the library does to a model is a list of steps: a class, a hook, an entry of a dictionary. `Switch` goes from the steps that are there
to those that are wanted; whatever is raised on the way, it can go back. Every step may be made again, so what was interrupted is repeated.

A forward in another thread may be under way. It keeps what it began with: a step is first left, so that no new call uses it, and removed
once the calls that use it have ended. These say so themselves: each is a `Use`.
"""

from __future__ import annotations

import inspect
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache, partial, wraps
from types import FrameType
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .errors import VarlenError

_PATIENCE = 60.0  # seconds that a forward in another thread may still take
_lock = threading.RLock()
_ABSENT: Any = object()


# -------------------------------------------------------------------- what is under way

T = TypeVar("T")


class Alive(Generic[T]):
    """Objects that every thread can look through, as long as somebody holds them."""

    def __init__(self) -> None:
        self.references: dict[int, weakref.ref[T]] = {}

    def add(self, x: T) -> None:
        self.references[id(x)] = weakref.ref(x, partial(_forget, self.references, id(x)))

    def discard(self, x: T) -> None:
        self.references.pop(id(x), None)

    def __iter__(self) -> Iterator[T]:
        return iter([x for reference in list(self.references.values()) if (x := reference()) is not None])


def _forget(references: dict[int, Any], number: int, _: Any) -> None:
    references.pop(number, None)


class Use:
    """A call in a thread that uses what was done to a module. It ends when it is discarded, or forgotten by a call that is broken off."""

    __slots__ = ("__weakref__", "module", "thread")

    def __init__(self, module: nn.Module) -> None:
        self.module, self.thread = module, threading.get_ident()


uses: Alive[Use] = Alive()


def in_use(module: nn.Module) -> Use:
    """Whether ``module`` may still be used is looked at afterwards: then either this is seen by who takes it away, or that is seen here."""
    use = Use(module)
    uses.add(use)
    return use


# -------------------------------------------------------------------- steps


class Step(Protocol):
    """One thing that is done to a model. Every method may be called at any time, and again."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Two steps of one key do the same."""

    @property
    def module(self) -> nn.Module | None:
        """Whose calls may use it; None if it makes no difference to those that are under way."""

    def make(self) -> None: ...

    def restore(self) -> None:
        """New calls do without it, and those under way may go on with it."""

    def remove(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Entry:
    """An entry of a dictionary, such as an attribute of an object."""

    entries: MutableMapping[str, Any]
    name: str
    value: Any
    before: Any = _ABSENT
    module: None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return id(self.entries), self.name, id(self.value)

    def make(self) -> None:
        self.entries[self.name] = self.value

    def restore(self) -> None:
        if self.before is _ABSENT:
            self.entries.pop(self.name, None)
        else:
            self.entries[self.name] = self.before

    def remove(self) -> None:
        self.restore()


@dataclass(frozen=True, eq=False)
class Hook:
    """A hook that gets keywords.

    Attributes:
        after: a forward hook, else one before it.
        always: it is called after errors too.
        number: under which it is registered.
        behind: numbers of the hooks that come before it.
    """

    module: nn.Module
    hook: Callable[..., Any]
    after: bool
    always: bool
    number: int
    behind: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        return id(self.module), self.after, self.number

    @property
    def _dicts(self) -> tuple[Any, ...]:
        """Of the hooks, and what says how each is called."""
        module = self.module
        if not self.after:
            return module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs
        always = (module._forward_hooks_always_called,) if self.always else ()
        return module._forward_hooks, module._forward_hooks_with_kwargs, *always

    def make(self) -> None:
        hooks, *flags = self._dicts
        for flag in flags:  # first, or a forward that comes between would call it without keywords
            flag[self.number] = True
        hooks[self.number] = self.hook
        for number in [number for number in hooks if number not in (*self.behind, self.number)]:
            hooks.move_to_end(number)

    @classmethod
    def new(cls, module: nn.Module, hook: Callable[..., Any], after: bool, always: bool = False) -> Hook:
        """Before hooks of others, which then see what the module sees."""
        return cls(module, hook, after, always, RemovableHandle(module._forward_hooks if after else module._forward_pre_hooks).id)

    @classmethod
    def found(cls, module: nn.Module, is_ours: Callable[[Any], bool]) -> list[Hook]:
        made: list[Hook] = []
        for after, hooks in ((False, module._forward_pre_hooks), (True, module._forward_hooks)):
            numbers = list(hooks)
            for i, number in enumerate(numbers):
                if is_ours(hooks[number]):
                    always = after and number in module._forward_hooks_always_called
                    made.append(cls(module, hooks[number], after, always, number, tuple(numbers[:i])))
        return made

    def restore(self) -> None:
        """What says whether it is in use is a step of its own."""

    def remove(self) -> None:
        for hooks in self._dicts:
            hooks.pop(self.number, None)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, without what `fully_shard` derives from it for an object."""
    own = type(module)
    return own.__bases__[-1] if _is_sharded(own) else own


def _is_sharded(cls: type[Any]) -> bool:
    return cls.__module__.startswith("torch.distributed.") and cls.__bases__[0].__module__.startswith("torch.distributed.")


def _sharded_as(cls: Any, new: Any) -> Any:
    """``new``, with what `fully_shard` has added to ``cls``, if anything."""
    if not _is_sharded(cls):
        return new
    bases = (*cls.__bases__[:-1], new)
    there = next((c for c in reversed(new.__subclasses__()) if c.__bases__ == bases), None)  # above all that of `fully_shard` itself
    name = cls.__name__.removesuffix(cls.__bases__[-1].__name__) + new.__name__
    return there or type(cls)(name, bases, {key: vars(cls)[key] for key in ("__module__", "__deepcopy__")})


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, before it was enabled. A class that was derived from an enabled one since stays, except by sharding."""
    own = own_class(module)
    original = vars(own).get("original_class")
    return original if isinstance(original, type) and issubclass(own, original) else own


@dataclass(frozen=True, eq=False)
class Class:
    """A class for an object of another one, and attributes that say how it computes there. What got a class of somebody else's in the
    meantime keeps that."""

    module: nn.Module
    new: type[nn.Module]
    original: type[nn.Module]
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        return id(self.module), self.new, self.options

    def _become(self, new: type[nn.Module]) -> None:
        if own_class(self.module) is not new and original_class(self.module) is self.original:
            self.module.__class__ = _sharded_as(type(self.module), new)

    def make(self) -> None:
        vars(self.module).update(self.options)  # first, for a forward that comes between
        self._become(self.new)

    def restore(self) -> None:
        if own_class(self.module) is not self.original:
            self._become(_leaving(self.new, self.original))  # type: ignore[arg-type]

    def remove(self) -> None:
        self._become(self.original)
        for name, _ in self.options:
            vars(self.module).pop(name, None)


@cache
def _leaving(new: Any, original: type[Any]) -> Any:
    """For objects that get their class back: what is under way finds all that it needs."""
    names = {"__module__": new.__module__, "__qualname__": new.__qualname__}
    return type(new)(new.__name__, (new,), {**names, "left": True, "original_class": original})


class Derived:
    """A class for objects of another one, its ``original_class``, from which it is made by ``derive``. Its name is the original's."""

    original_class: ClassVar[Any] = None
    derive: ClassVar[Callable[[Any], Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """What the original does for classes of its users is not for this one."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A new model is none that was enabled."""
        return cls.original_class(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(protocol)
        (make, args, *rest), original = made, original_class(self)  # type: ignore[arg-type]
        return _derived_again, (type(self).derive, make, tuple(original if x is type(self) else x for x in args)), *rest


def _derived_again(derive: Callable[[Any], Any], make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """For copies and pickles, which the class by its name would not find."""
    made = make(*args)
    made.__class__ = derive(original_class(made))
    return made


def derived(base: Any, original: Any, derive: Callable[[Any], Any], **own: Any) -> Any:
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    entries = {**names, "original_class": original, "derive": staticmethod(derive), **own}
    return type(original)(original.__name__, (base, original), entries)


class _Here(threading.local):
    """Of one thread: whether a module runs as it came, with all that is in it."""

    as_it_came = False


_here = _Here()


def run_as_it_came(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inside: bool = True) -> Any:
    """The ``forward`` of the original class, and with ``inside`` that of every enabled module in it. These must not be called again by a
    checkpoint of somebody's between the two, which would compute something else then."""
    before, _here.as_it_came = _here.as_it_came, inside
    try:
        return module.original_class.forward(module, *args, **kwargs)
    finally:
        _here.as_it_came = before


def switchable(new: type[Any], inside: type[Any]) -> type[Any]:
    """A class for objects of another one, its ``original_class``, which they may get back in the middle of a call.

    A call with a layout goes on with what was begun; all others get the ``forward`` of the original. A layout of the type ``inside`` comes
    from a stack, whose own call is a use of all that is in it.
    """
    compute = new.forward
    compute_inside = getattr(compute, "inside", compute)

    def run(self: Any, use: Use | None, args: Any, kwargs: Any) -> Any:
        if kwargs.get("layout") is None:
            if not isinstance(self, new) or self.left or _here.as_it_came:
                if use is not None:
                    uses.discard(use)
                return new.original_class.forward(self, *args, **kwargs)
            why = self.why_as_it_came(args, kwargs)
            if why is not None:
                return self.as_it_came(why, args, kwargs)
        return compute(self, *args, **kwargs)

    @wraps(compute)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(kwargs.get("layout")) is inside:
            return compute_inside(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            return run(self, None, args, kwargs)
        if _here.as_it_came and kwargs.get("layout") is None:  # the call around it is the use
            return new.original_class.forward(self, *args, **kwargs)
        use = in_use(self)
        try:
            return run(self, use, args, kwargs)
        finally:
            uses.discard(use)

    if hasattr(compute, "takes_prepared"):
        forward.takes_prepared = forward  # type: ignore[attr-defined]
    new.forward, new.left = forward, False
    return new


# -------------------------------------------------------------------- going from some to others


class Switch:
    """From the steps that ``find`` sees on a model to those that are wanted.

    Attributes:
        going, made: what `make` takes away, and what it has added.
    """

    def __init__(self, find: Callable[[], Sequence[Step]], wanted: Sequence[Step]) -> None:
        self.find, self.wanted = find, wanted
        self.going: list[Step] = []
        self.made: list[Step] = []

    def make(self) -> None:
        """
        Raises:
            VarlenError: called inside of a forward that uses what goes, or one in another thread does not end.
        """
        with _lock:
            present = self.find()
            there, wanted = {step.key for step in present}, {step.key for step in self.wanted}
            going = [step for step in present if step.key not in wanted]
            _refuse_inside(going)
            self.going = going
            if not _take_away(going):
                raise VarlenError(
                    f"a forward that uses what is taken away is still under way in another thread after {_PATIENCE:.0f} seconds: wait "
                    "for it before the model is disabled or enabled anew."
                )
            for step in self.wanted:
                if step.key not in there:
                    self.made.append(step)
                    step.make()

    def undo(self) -> None:
        """Whatever was raised, and wherever. It may be interrupted once itself."""
        try:
            self._back()
        except BaseException:
            self._back()
            raise

    def _back(self) -> None:
        with _lock:
            _take_away(self.made, anyway=True)
            for step in self.going:
                step.make()


def _take_away(steps: Sequence[Step], anyway: bool = False) -> bool:
    """False, with nothing removed, if forwards that use them do not end; unless ``anyway``."""
    for step in reversed(steps):
        step.restore()
    ended = _wait_for({id(step.module) for step in steps if step.module is not None})
    if ended or anyway:
        for step in reversed(steps):
            step.remove()
    return ended


def _wait_for(modules: set[int]) -> bool:
    """Until no other thread uses them."""
    end = time.monotonic() + _PATIENCE
    here = threading.get_ident()
    while any(use.thread != here and any(id(m) in modules for m in use.module.modules()) for use in list(uses)):
        if time.monotonic() > end:
            return False
        time.sleep(0.0005)
    return True


def _refuse_inside(going: Sequence[Step]) -> None:
    modules = {id(step.module) for step in going if step.module is not None}
    inside = next((module for module, _ in around() if id(module) in modules), None)
    if inside is not None:
        raise VarlenError(
            f"a model must not be disabled or enabled anew inside of its own forward, but that of {type(inside).__name__} is under way: "
            "call enable or disable before or after it."
        )


_CALL = nn.Module._call_impl.__code__


def around(frame: FrameType | None = None) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """The modules in whose forwards this is called, or ``frame`` is, the innermost first, and what these are given."""
    frame = frame or sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _CALL or (code.co_name == "forward" and code.co_varnames[:1] == ("self",)):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                stars = sum(code.co_flags & flag != 0 for flag in (inspect.CO_VARARGS, inspect.CO_VARKEYWORDS))
                given = code.co_argcount + code.co_kwonlyargcount + stars
                yield module, {name: frame.f_locals.get(name) for name in code.co_varnames[1:given]}
        frame = frame.f_back
