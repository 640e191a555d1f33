"""The written import direction, read from the source with `ast`: an arrow against it fails here.

Every module has a rank and imports lower ranks only. A new module gets its line in `RANKS`.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import varlen_attn

ROOT = Path(varlen_attn.__file__).parent
RANKS = (
    ("errors", "_state", "_timing"),
    ("_clone", "_switch", "_compare", "_gather", "_layout_checks", "_native", "_profile"),
    ("_index",),
    ("layout",),
    ("companions", "_host_lengths", "_padded_rows"),
    ("problem",),
    ("backends._kept", "backends._values"),
    ("backends._limits",),
    ("backends.base",),
    ("backends._*",),  # math that several backends share
    ("backends._cpu_groups", "backends._flash_op"),
    ("backends._cpu_plan",),
    ("backends.*",),
    ("backends",),
    ("dispatch",),
    ("records",),
    ("_call_checks", "_static", "_mha_checks", "_token_wise"),
    ("_call", "_masks"),
    ("_streams",),
    ("functional",),
    ("explain",),
    ("testing._batch",),
    ("testing._recorder",),
    ("testing._invariance",),
    ("testing", "data"),
    ("testing.strategies", "modules"),
    ("encoder",),
    ("_enablable",),
    ("convert",),
    ("integrations",),
    ("integrations._hf_mask",),
    ("integrations._hf_attention",),
    ("integrations._hf_stack",),
    ("integrations._hf_trial",),
    ("integrations.*",),
    ("demo", "bench"),
    ("", "__main__"),
)
OPTIONAL_PACKAGES_IN = ("backends.", "integrations.", "demo", "__main__", "testing.strategies")
IMPORTED_LAZILY = ("testing.strategies",)  # and so may import an optional package at once
MUTABLE = {
    "dispatch._plans", "problem._versions", "_state.state",  # one cache of choices, one of versions, the thread's stack
    "backends._ops._defined",  # for which backends ops are registered
    "backends._cpu_groups._plans",  # how batches of some lengths are cut, by value
    "integrations._hf_attention._layouts",  # of offsets that a model is given, gone with them
    "integrations._hf_mask._thread",  # the last layout with the mask that it was made of; forwards under way
    "_switch.uses", "integrations._hf_mask.masks",  # calls and masks that are alive, held by whoever makes them
    "integrations._hf_mask.leaving",  # configurations in the middle of a change
    "layout._known",  # at which version of their offsets layouts were found to be right, gone with them
    "_native._found", "_native._hashes",  # the compiled kernel or why there is none; what its name says of its sources
    "backends._kept._kept", "backends.flex._kernels",  # what is derived from layouts, gone with them; one compiled kernel a kind of call
    "backends._packages._probed", "backends.flash3._probed",  # what a package can do, asked once
    "backends.torch_varlen._parameters",
}  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
each_module = pytest.mark.parametrize("module", SOURCES, ids=lambda m: m or "varlen_attn")


def rank(module: str) -> int:
    """Exact names first, so that ``backends.base`` is not just any backend."""
    head, _, tail = module.rpartition(".")
    for pattern in (module, f"{head}._*" if tail.startswith("_") else "", f"{head}.*"):
        for i, names in enumerate(RANKS):
            if pattern in names and (pattern or not module):
                return i
    raise AssertionError(f"{module} has no place in RANKS: say what it may import")


def imports(module: str, tree: ast.AST | None = None) -> Iterator[tuple[str, bool]]:
    """``(absolute module, whether at import time)`` of all imports; names from a package count as its submodules where they are."""
    tree = SOURCES[module] if tree is None else tree
    lazy = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for n in ast.walk(f)}
    lazy |= {id(n) for f in ast.walk(tree) if isinstance(f, ast.If) and "TYPE_CHECKING" in ast.unparse(f.test) for n in ast.walk(f)}
    is_package = (ROOT / module.replace(".", "/") / "__init__.py").exists()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["varlen_attn", *module.split(".")] if module else ["varlen_attn"]
                up = here[: len(here) - node.level + is_package]
                base = ".".join([*up, base] if base else up)
            for alias in node.names:
                submodule = f"{base}.{alias.name}".removeprefix("varlen_attn.")
                yield (
                    (f"varlen_attn.{submodule}" if submodule in SOURCES and base.startswith("varlen_attn") else base),
                    id(node) not in lazy,
                )


@each_module
def test_arrows_point_one_way(module: str) -> None:
    own = [
        (name.removeprefix("varlen_attn").removeprefix("."), now) for name, now in imports(module) if name.split(".")[0] == "varlen_attn"
    ]
    for name, now in own:
        if name == "" and not now:
            continue  # `from . import __version__`, when somebody asks
        assert rank(name) < rank(module), f"{module} imports {name}, which stands above it"
        assert not name.startswith("integrations") or not now or module.startswith("integrations"), (
            f"{module} imports {name} at import time"
        )


@each_module
def test_only_torch_and_einops_at_import(module: str) -> None:
    standard = {*sys.stdlib_module_names, "torch", "einops", "varlen_attn"}
    for name, now in imports(module):
        top = name.split(".")[0]
        if top in standard:
            continue
        assert module.startswith(OPTIONAL_PACKAGES_IN), f"{module} imports {top}"
        assert not now or module in IMPORTED_LAZILY, f"{module} imports {top} at import time"
    assert not {name for name, now in imports(module) if now} & {f"varlen_attn.{name}" for name in IMPORTED_LAZILY}


def test_the_rules_can_fail() -> None:
    """A mutant for each rule."""

    def seen(module: str, code: str) -> list[tuple[str, bool]]:
        return list(imports(module, ast.parse(code)))

    assert seen("backends.cpu", "from ..dispatch import choose") == [("varlen_attn.dispatch", True)]
    assert seen("backends.cpu", "from .flash2 import Flash2") == [("varlen_attn.backends.flash2", True)]
    assert seen("layout", "from .problem import Problem") == [("varlen_attn.problem", True)]
    assert seen("dispatch", "from . import functional") == [("varlen_attn.functional", True)]
    assert seen("backends.flash2", "def f():\n    import flash_attn.x") == [("flash_attn.x", False)]
    assert rank("dispatch") > rank("backends.cpu") == rank("backends.flash2") > rank("backends._dense") > rank("backends.base")
    assert rank("problem") > rank("layout") > rank("errors")
    with pytest.raises(AssertionError, match="no place in RANKS"):
        rank("helpers")


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func) in (
            "dict",
            "list",
            "set",
            "defaultdict",
            "State",
            "threading.local",
            "OrderedDict",
            "WeakKeyDictionary",
        )
    return isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp)


@each_module
def test_module_state_is_what_is_written_down(module: str) -> None:
    """Plain-dict caches of pure functions and the thread's stack. Constants are in capitals and nobody writes to them."""
    found = set()
    for node in SOURCES[module].body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for target in targets:
            name = ast.unparse(target)
            if is_mutable(node.value) and not name.isupper() and name != "__all__":  # type: ignore[union-attr]
                found.add(f"{module}.{name}")
    assert found <= MUTABLE
    text = [ast.unparse(node) for node in ast.walk(SOURCES[module]) if isinstance(node, ast.Global | ast.Attribute | ast.Name)]
    for forbidden in ("lru_cache", "functools.cache", "ContextVar", "contextvars.ContextVar"):
        assert forbidden not in text, f"{module} uses {forbidden}: it does not trace"
    assert not any(t.startswith("global ") for t in text)


def test_the_public_names() -> None:
    """`__all__` is sorted (constants, classes, functions), complete, and true."""
    names = varlen_attn.__all__
    assert len(set(names)) == len(names)
    kinds = [(0 if n.isupper() else 1 if n[0].isupper() else 2, n) for n in names]
    assert kinds == sorted(kinds)
    tree = SOURCES[""]
    imported = {a.asname or a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert imported - {"annotations"} == set(names)
    for name in names:
        assert getattr(varlen_attn, name) is not None


@each_module
def test_names_of_every_module_exist(module: str) -> None:
    if module == "__main__":
        return
    loaded = importlib.import_module(f"varlen_attn.{module}".rstrip("."))
    for name in getattr(loaded, "__all__", ()):
        assert hasattr(loaded, name)
    assert loaded.__doc__ or module.startswith("backends._")
