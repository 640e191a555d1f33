"""The written import direction, read from the source with `ast`: an arrow against it fails here.

Folders are floors. A module imports from lower floors and from its own folder, there without a circle, inside of functions as well. A new
folder gets its place in `FLOORS`.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import varlen_attn

ROOT = Path(varlen_attn.__file__).parent
FLOORS = (
    ("errors", "_torch", "_state"),
    ("layout", "_clone", "_switch"),
    ("data", *(f"kernels.{name}" for name in ("problem", "values", "kept", "limits", "base", "unseen", "ops", "dense"))),
    ("kernels", "parallel"),  # the adapters, and their order; rows on several ranks
    ("attention",),
    ("nn", "integrations"),
    ("convert", "testing", "_old_paths"),
    ("",),
    ("cli", "__main__"),
)
OPTIONAL_PACKAGES_IN = ("kernels.", "integrations.", "cli.", "testing.strategies")
IMPORTED_LAZILY = ("testing.strategies",)  # and so may import an optional package at once
MUTABLE = {
    "attention.dispatch._plans", "kernels.problem._versions", "_state.state",  # one cache of choices, one of versions, the thread's stack
    "kernels.ops._defined",  # for which backends ops are registered
    "kernels.cpu.groups._plans",  # how batches of some lengths are cut, by value
    "integrations.transformers.mask._thread",  # the last layout with the mask that it was made of; forwards under way
    "_switch.uses", "integrations.transformers.mask.masks",  # calls and masks that are alive, held by what makes them
    "integrations.transformers.mask.leaving",  # configurations in the middle of a change
    "integrations.transformers.attention._layouts",  # of offsets that a model is given, gone with them
    "layout.seq_layout._known",  # at which version of their offsets layouts were found to be right, gone with them
    "layout.seq_layout._edges",  # which rows padding repeats, gone with the layouts
    "convert.classes._unread", "convert.classes._shown", "convert.classes._thread",  # who reads the weights of a module, gone with it
    "nn.masks._misses",  # how many masks of a shape were no pattern
    "kernels.cpu.build._found",  # the compiled kernel or why there is none
    "kernels.kept._kept", "kernels.cuda.flex._kernels",  # what is derived from layouts, gone with them; one compiled kernel a kind of call
    "kernels.cuda.packages._probed", "kernels.cuda.flash3._probed",  # what a package can do, asked once
}  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
each_module = pytest.mark.parametrize("module", SOURCES, ids=lambda m: m or "varlen_attn")


def floor(module: str) -> int:
    """Of the longest name in `FLOORS` that ``module`` is or is inside of."""
    for name in [module, *(module[:i] for i in range(len(module) - 1, 0, -1) if module[i] == ".")]:
        for i, names in enumerate(FLOORS):
            if name in names:
                return i
    raise AssertionError(f"{module} has no place in FLOORS: say what it may import")


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


def own_imports(module: str) -> set[str]:
    names = {name for name, _ in imports(module) if name.split(".")[0] == "varlen_attn"}
    names |= {x.value for x in ast.walk(SOURCES[module]) if isinstance(x, ast.Constant) and f"{x.value}".startswith("varlen_attn.")}
    own = {name.removeprefix("varlen_attn").removeprefix(".") for name in names}
    return {name for name in own if name in SOURCES}


# Names that are private to another package, where they are touched outside of `_torch`. Names after "torch.ops." do not count: an adapter
# calls a private kernel, and asks whether it is there.
PRIVATE = {
    "errors": "_getframe",
    "_clone": "_DropoutNd _buffers _python_dispatch _schema",
    "_switch": "_call_impl _forward_hooks _forward_hooks_always_called _forward_hooks_with_kwargs _forward_pre_hooks "
    "_forward_pre_hooks_with_kwargs _getframe",
    "attention.profile": "_is_profiler_enabled",
    "convert.candidates": "_ff_block",
    "convert.classes": "_sa_block",
    "data.host_lengths": "_C _pytree _version",
    "integrations.transformers.attention": "_version",
    "integrations.transformers.enabling": "_ConvNd _NormBase _can_set_attn_implementation",
    "integrations.transformers.mask": "_C _disabled_torch_function_impl _make_wrapper_subclass _pytree",
    "integrations.transformers.stack": "_backward_hooks _backward_pre_hooks _forward_hooks _forward_pre_hooks",
    "integrations.transformers.trial": "_buffers _get_feat_extract_output_lengths",
    "nn.checks": "_mha_shape_check _qkv_same_embed_dim",
    "nn.multihead": "_qkv_same_embed_dim",
    "nn.stream": "_forward_hooks _forward_pre_hooks",
    "nn.token_wise": "_ff_block _modules",
    "nn.transformer": "_ff_block _mha_block _sa_block",
}


def defined(trees: Iterable[ast.AST]) -> set[str]:
    """Every name that is given to something."""
    names = {"_asdict", "_fields", "_replace"}  # of named tuples
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "cls"):
            names.add(node.attr)
    return names


def private_names(tree: ast.AST, own: set[str]) -> set[str]:
    """Names with an underscore that are read of something or imported from another package, and that nothing here is called."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not ast.unparse(node).startswith("torch.ops."):
            names |= {node.attr} - own
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
    return {name for name in names if name.startswith("_") and not name.endswith("__")}


OWN = defined(SOURCES.values())


@pytest.mark.parametrize("module", sorted(SOURCES.keys() - {"_torch"}), ids=lambda m: m or "varlen_attn")
def test_what_is_private_to_torch_is_touched_in_one_file(module: str) -> None:
    assert private_names(SOURCES[module], OWN) == set(PRIVATE.get(module, "").split()), "touch it in `_torch`, by one function"


@each_module
def test_arrows_point_down(module: str) -> None:
    for name in own_imports(module):
        inside = name.split(".")[0] == module.split(".")[0].replace("__main__", "cli") and floor(name) <= floor(module)
        assert inside or floor(name) < floor(module), f"{module} imports {name}, which is not below it"
    for name, now in imports(module):
        known = name.startswith("varlen_attn.integrations") and not module.startswith("integrations")
        assert not known or not now, f"{module} imports {name} at import time"


def test_no_circles() -> None:
    left = {module: own_imports(module) - {module} for module in SOURCES}
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"a circle in {sorted(left)}"


def test_no_adapter_knows_another() -> None:
    adapters = {b.__class__.__module__.removeprefix("varlen_attn.") for b in varlen_attn.BACKENDS}
    for module in adapters:
        assert not own_imports(module) & adapters


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

    assert seen("kernels.base", "from ..attention.dispatch import choose") == [("varlen_attn.attention.dispatch", True)]
    assert seen("kernels.cuda.flash3", "from .flash2 import Flash2") == [("varlen_attn.kernels.cuda.flash2", True)]
    assert seen("layout.seq_layout", "from ..kernels.problem import Problem") == [("varlen_attn.kernels.problem", True)]
    assert seen("attention.dispatch", "from . import functional") == [("varlen_attn.attention.functional", True)]
    assert seen("kernels.cuda.flash2", "def f():\n    import flash_attn.x") == [("flash_attn.x", False)]
    assert floor("attention.dispatch") > floor("kernels.cpu.aten") == floor("kernels.cuda.flash2") > floor("kernels.base")
    assert floor("kernels.problem") > floor("layout.seq_layout") > floor("errors")
    with pytest.raises(AssertionError, match="no place in FLOORS"):
        floor("helpers")

    def touched(code: str) -> set[str]:
        return private_names(ast.parse(code), {"_mine"})

    assert touched("x._version + torch._C.y(x._mine, x.__dict__)") == {"_version", "_C"}
    assert touched("from torch.utils import _pytree") == touched("import torch.utils._pytree") == {"_pytree"}
    assert touched("from ._torch import pytree\ntorch.ops.aten._efficient_attention_forward()") == set()


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
    allowed = ("ContextVar",) if module == "_state" else ()  # which reads it in eager code, and as an attribute of the module while tracing
    for forbidden in {"lru_cache", "functools.cache", "ContextVar", "contextvars.ContextVar"} - {*allowed}:
        assert forbidden not in text, f"{module} uses {forbidden}: it does not trace"
    assert not any(t.startswith("global ") for t in text)


def test_the_public_names() -> None:
    """`__all__` is sorted (constants, classes, functions), complete, and true."""
    names = varlen_attn.__all__
    assert len(set(names)) == len(names)
    kinds = [(0 if n.isupper() else 1 if n[0].isupper() else 2, n) for n in names]
    assert kinds == sorted(kinds)
    froms = [node for node in ast.walk(SOURCES[""]) if isinstance(node, ast.ImportFrom) and node.level]
    assert {alias.asname or alias.name for node in froms for alias in node.names} - {"_old_paths"} == set(names)
    later = {alias.name: node.module for node in froms if node.col_offset for alias in node.names}  # for type checkers
    assert later.items() <= varlen_attn.LATER.items()
    assert set(names) <= set(dir(varlen_attn))
    with pytest.raises(AttributeError, match="module 'varlen_attn' has no attribute 'enablee'"):
        getattr(varlen_attn, "enablee")  # noqa: B009
    for name in names:
        assert getattr(varlen_attn, name) is not None


@each_module
def test_names_of_every_module_exist(module: str) -> None:
    if module == "__main__":
        return
    loaded = importlib.import_module(f"varlen_attn.{module}".rstrip("."))
    for name in getattr(loaded, "__all__", ()):
        assert hasattr(loaded, name)
    assert loaded.__doc__
