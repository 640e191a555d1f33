"""flash-attn 3, the kernels for Hopper, by their ops ``flash_attn_3::fwd`` and ``bwd``: forward, backward, windows, softcap, sinks.

Read in its source (``hopper/`` from May 2025, when it got ops, to August 2026) and in the files of three wheels; run here on a CPU
stand-in, not on a GPU:

- Where the ops come from, in this order: they are loaded already (`torch.ops.load_library` before the first call is enough); the module
  ``flash_attn_interface`` of the distributions flash-attn-3 and tokenspeed-fa3; the library inside of xformers (up to 0.0.34); fa3-fwd,
  under a name of its own. Only the ops are called, so that Python functions that returned different tuples over time do not matter.
- What a build was compiled without is listed in a module ``flash_attn_config`` beside it: tokenspeed-fa3 and fa3-fwd have no backward
  (their op ``bwd`` exists, and raises), fa3-fwd no windows and no float16, tokenspeed-fa3 no softcap. Ops alone do not say; xformers'
  are without softcap, so softcap is refused where nothing says that it is there.
- Compute capability 9.0 only. Head dimensions are a multiple of 8 up to 256, and nothing is padded there. Values may be narrower only
  in some pairs, so all are padded to one width: exact, with the true scale.
- Causal and windows are aligned bottom-right; no dropout, no ALiBi. Sinks are computed around the kernel (see ``flash_ops``).
- The log-sum-exp is ``(N, T)``, of rows without keys -inf (+inf where there are no keys at all, which never gets there).
- Gradients are deterministic where asked, except for head dimensions above 192.
- Its own fake kernel cannot trace the default number of splits. One split is what its Python function passes, and what is passed here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._torch import arguments_of
from ..base import Refusal
from ..problem import Problem, installed_version
from .flash_ops import FlashOps, define_flash_ops
from .packages import findable, load_quietly

_INTERFACE, _CONFIG = "flash_attn_interface", "flash_attn_config"
_WIDTHS = (64, 96, 128, 192, 256)  # that kernels are compiled for; a head dimension takes the next
_CORE = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "is_causal")
_FLAGS = {"BACKWARD": "a backward pass", "LOCAL": "sliding windows", "SOFTCAP": "softcap", "FP16": "float16", "VARLEN": "varlen attention"}
_STATED = {  # what is known of a distribution on another machine
    "flash-attn-3": (),
    "tokenspeed-fa3": ("a backward pass", "softcap"),
    "fa3-fwd": ("a backward pass", "sliding windows", "float16"),
}


class Build(NamedTuple):
    """Ops that are loaded, and what they were compiled without."""

    what: str  # for people
    forward: Any
    backward: Any  # None without one
    lacks: frozenset[str] = frozenset()
    widths: tuple[int, ...] = _WIDTHS


_probed: dict[tuple[Any, ...], Build | str] = {}


def _probe() -> Build | str:
    """The build that is there, loaded once; or a sentence why none is."""
    key = (_registered("flash_attn_3"), *(installed_version(name) for name in (*_STATED, "xformers")))
    if key not in _probed:
        found = _find()
        # Loading has registered the ops; who asks again finds them there.
        _probed[key] = _probed[(_registered("flash_attn_3"), *key[1:])] = found
    return _probed[key]


def _registered(namespace: str) -> bool:
    return hasattr(getattr(torch.ops, namespace), "fwd")


def _find() -> Build | str:
    if _registered("flash_attn_3"):  # loading a second library of that name would abort the process
        return _describe("torch.ops.flash_attn_3", "flash_attn_3", _CONFIG if _INTERFACE in sys.modules else None)
    sentences: list[str] = []
    for what, namespace, config, load in _sources():
        build = load_quietly(what, "loading", load) or _describe(what, namespace, config)
        if isinstance(build, Build):
            return build
        sentences.append(build)
    return sentences[0] if sentences else "flash-attn 3 is not installed: neither flash-attn-3 nor another package with its kernels"


def _sources() -> Iterable[tuple[str, str, str | None, Callable[[], object]]]:
    """``(for people, namespace of the ops, module that says what they lack, what loads them)``; nothing is imported to find out."""
    names = [f"{name} {installed_version(name)}" for name in ("flash-attn-3", "tokenspeed-fa3") if installed_version(name)]
    if names or findable(_INTERFACE):
        yield " and ".join(names) or f"a module {_INTERFACE}", "flash_attn_3", _CONFIG, lambda: importlib.import_module(_INTERFACE)
    if installed_version("xformers"):
        path = importlib.metadata.distribution("xformers").locate_file("xformers/flash_attn_3/_C.so")
        if path.is_file():  # type: ignore[attr-defined]
            yield f"xformers {installed_version('xformers')}", "flash_attn_3", None, lambda: torch.ops.load_library(str(path))
    if installed_version("fa3-fwd"):
        what = f"fa3-fwd {installed_version('fa3-fwd')}"
        yield what, "fa3_fwd", "fa3_fwd_config", lambda: importlib.import_module("fa3_fwd_interface")


def _describe(what: str, namespace: str, config: str | None) -> Build | str:
    """The build whose ops are in ``namespace``; a sentence if they are not what is called here."""
    if not _registered(namespace):
        return f"{what} has no ops torch.ops.{namespace}: it is older than May 2025"
    ops = getattr(torch.ops, namespace)
    forward, backward = ops.fwd.default, getattr(getattr(ops, "bwd", None), "default", None)
    lacking = [name for name in _CORE if name not in _parameters(forward)]
    if lacking:
        return f"{namespace}::fwd of {what} has no parameter {', '.join(lacking)}"
    flags = _flags(config)
    lacks = {part for flag, part in _FLAGS.items() if flags.get(f"FLASHATTENTION_DISABLE_{flag}", flags == {} and flag == "SOFTCAP")}
    lacks |= {"a backward pass"} if backward is None else set()
    lacks |= {"deterministic gradients"} if backward is None or "deterministic" not in _parameters(backward) else set()
    both = _parameters(forward) & (_parameters(forward) if backward is None else _parameters(backward))
    lacks |= {part for name, part in (("window_size_left", "sliding windows"), ("softcap", "softcap")) if name not in both}
    if "varlen attention" in lacks:
        return f"{what} is compiled without varlen attention"
    widths = tuple(width for width in _WIDTHS if not flags.get(f"FLASHATTENTION_DISABLE_HDIM{width}"))
    return Build(what, forward, backward, frozenset(lacks), widths)


def _parameters(op: Any) -> frozenset[str]:
    return frozenset(argument.name for argument in arguments_of(op))


def _flags(config: str | None) -> dict[str, bool]:
    """What the package says about how it was compiled; nothing if it does not."""
    try:
        flags: dict[str, bool] = importlib.import_module(config).CONFIG["build_flags"] if config else {}
    except (ImportError, AttributeError, KeyError):
        return {}
    return flags


def _wanted(problem: Problem) -> Iterable[str]:
    want = problem.semantics
    asked = (
        (problem.needs_grad, "a backward pass"),
        (want.window is not None, "sliding windows"),
        (want.softcap is not None, "softcap"),
        (problem.dtype == torch.float16, "float16"),
        (want.deterministic and problem.needs_grad, "deterministic gradients"),
    )
    return (what for wanted, what in asked if wanted)


def _missing_in(build: Build, problem: Problem) -> str | None:
    lacking = [what for what in _wanted(problem) if what in build.lacks]
    if lacking:
        return f"{build.what} is compiled without {' and '.join(lacking)}, or does not say that it has it"
    widest = max(problem.head_dim, problem.value_head_dim or 0)
    width = min((w for w in build.widths if w >= widest), default=None)
    if width is None:
        return f"{build.what} is compiled for head dimensions up to {max(build.widths, default=0)}, and this is {widest}"
    if width > 192 and problem.semantics.deterministic and problem.needs_grad:
        return f"{build.what} computes a head dimension of {widest} as {width}, without deterministic gradients"
    return None


def _options(op: Any, **given: Any) -> dict[str, Any]:
    """What of ``given`` the op has a parameter for (the probe saw to the rest), and None for parameters without a default: older ops
    have no defaults."""
    return {a.name: given.get(a.name) for a in arguments_of(op) if a.name in given or not a.has_default_value()}


def _forward(given: dict[str, Any]) -> tuple[Tensor, ...]:
    op = _build().forward
    out, lse, *_ = op(**_options(op, num_splits=1, is_causal=given["causal"], **given))
    return out, lse


def _backward(given: dict[str, Any]) -> tuple[Tensor, ...]:
    op, grads = _build().backward, {f"d{name}": torch.empty_like(given[name]) for name in "qkv"}
    op(**_options(op, is_causal=given["causal"], softmax_lse=given["lse"], **grads, **given))
    return tuple(grads.values())  # what the op returns changed from 8 tensors to 5; the gradients are written where they should be


def _build() -> Build:
    build = _probe()
    assert isinstance(build, Build), build
    return build


class Flash3(FlashOps):
    """flash-attn's kernels for Hopper."""

    name = "flash3"
    package = "flash-attn-3"
    packages = tuple(_STATED)
    install = "install flash-attn-3 built for this torch, or use 'torch_varlen' or 'flash2'"
    op = staticmethod(define_flash_ops("flash3", _forward, _backward))

    def missing(self, problem: Problem) -> str | None:
        if problem.packages is not None:  # another machine's: its name and version are all that is known
            stated = next((name for name in _STATED if problem.version(name)), None)
            if stated is None:
                return "no package with flash-attn 3 is among those stated"
            return _missing_in(Build(f"{stated} {problem.version(stated)}", None, None, frozenset(_STATED[stated])), problem)
        build = _probe()
        return build if isinstance(build, str) else _missing_in(build, problem)

    def extra_refusals(self, problem: Problem) -> Iterable[Refusal]:
        yield from super().extra_refusals(problem)
        want = problem.semantics
        if problem.capability is not None and problem.capability >= (10, 0):
            yield Refusal("has no kernels for GPUs after Hopper (compute capability 9.0)", "use 'flash4' or 'torch_varlen'", "machine")
        if want.deterministic and problem.needs_grad and max(problem.head_dim, problem.value_head_dim or 0) > 192:
            yield Refusal("has no deterministic gradients for head dimensions above 192", "pass deterministic=False, or use more heads")

    def kernel(self, problem: Problem) -> str:
        return "flash_attn_3::fwd (FlashAttnFwdSm90)"

    def seen_as(self, problem: Problem) -> str:
        return "FlashAttnFwdSm90"
