"""Whether an installed package is what an adapter calls: imported once, and asked for its functions and their parameters."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..base import Refusal
from ..problem import Problem

# By what was probed: a sentence if it is broken or something else, and the parameters of its functions.
_probed: dict[tuple[str, str], tuple[str | None, frozenset[str]]] = {}


def probe(what: str, module: str, functions: Mapping[str, Sequence[str]]) -> tuple[str | None, frozenset[str]]:
    """Import ``module`` of ``what``, a distribution with its version, and look for ``functions`` with the parameters that are named."""
    if (what, module) not in _probed:
        _probed[what, module] = _probe(what, module, functions)
    return _probed[what, module]


def _probe(what: str, module: str, functions: Mapping[str, Sequence[str]]) -> tuple[str | None, frozenset[str]]:
    sentence = load_quietly(what, "importing", lambda: importlib.import_module(module))
    found: set[str] = set()
    for name, wanted in functions.items() if sentence is None else ():
        function = getattr(importlib.import_module(module), name, None)
        if function is None:
            return f"{what} is installed, but has no function {name}", frozenset()
        parameters = inspect.signature(function).parameters
        found |= set(parameters)
        lacking = [p for p in wanted if p not in parameters]
        if lacking:
            return f"{name} of {what} has no parameter {', '.join(lacking)}", frozenset(found)
    return sentence, frozenset(found)


def version_refusals(
    problem: Problem, distribution: str, release: Callable[[str], tuple[Any, ...]], gates: Iterable[tuple[bool, str, str]], install: str
) -> Iterable[Refusal]:
    """``gates``: whether it is asked, the least version, what that is for. ``release`` makes of a version what can be compared."""
    text = problem.version(distribution)
    for asked, need, what in gates:
        if asked and text is not None and release(text) < release(need):
            fix = f"{install} '{distribution}>={need}'"
            yield Refusal(f"needs {distribution} {need} or newer for {what}, and this is {text}", fix, "missing")


def load_quietly(what: str, doing: str, load: Callable[[], object]) -> str | None:
    """Load it; a sentence if that raises. A broken binary raises whatever it likes: OSError, ImportError, RuntimeError, AttributeError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a package warns of at import is not the caller's business
            load()
    except Exception as error:
        return f"{what} is installed, but {doing} it raises {type(error).__name__}: {error}"
    return None


def findable(module: str) -> bool:
    """Whether a module is there; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # one that was put into sys.modules by hand
        return True
