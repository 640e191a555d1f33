"""flash-attn 4 (CuTe DSL, for Hopper and Blackwell), by its functions ``_flash_attn_fwd`` and ``_flash_attn_bwd``, as torch calls them.

Read in its source (``flash_attn/cute/interface.py`` of 4.0.0b4, b12, b16, b20, b28 and b36); run here on a stand-in, not on a GPU:

- Kernels are compiled when a combination of dtype, head dimension and options is first called: seconds, each.
- b4 has no varlen backward on Hopper; softcap has none with varlen before a version between b20 and b28. So b12 is asked for, and b28
  for softcap with gradients.
- Positions changed (the fourth argument was ``cu_seqlens_q`` and is ``qv``), and the forward returns 2 tensors, 4 since b20, 5 in b36:
  everything is passed by keyword, and two are taken. No window is None, not -1; no softcap is 0. The log-sum-exp has to be asked for.
- It registers no ops. Ours are around it, so it traces.
- Head dimensions are a multiple of 8: up to 256 on Hopper, up to 128 after it (other pairs there have kernels with fewer options).
- On compute capability 12 it has no deterministic gradients, and none for softcap.
- Causal and windows are aligned bottom-right; no dropout; ALiBi and biases only as code to be compiled in. Sinks: its own parameter
  took bfloat16 only, and gave no gradient, before b28; they are computed around the kernel (see ``flash_ops``).
- The log-sum-exp is ``(N, T)``, -inf for rows without keys.
- The distribution leaves a namespace package ``flash_attn`` without flash-attn 2 in it, so the distribution is looked up, then imported.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..base import Refusal
from ..problem import Problem, version_tuple
from .flash_ops import FlashOps, define_flash_ops
from .packages import probe, version_refusals

_INTERFACE = "flash_attn.cute.interface"
_SHARED = (
    "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal", "softcap",
    "window_size_left", "window_size_right",
)  # fmt: skip
_CORE = {"_flash_attn_fwd": (*_SHARED, "return_lse"), "_flash_attn_bwd": (*_SHARED, "out", "dout", "lse", "deterministic")}


def _release(version: str) -> tuple[Any, ...]:
    """``"4.0.0b12" -> (4, 0, 0, 12)``; a version that is no beta counts as after all of them."""
    beta = re.search(r"b(\d+)", version.split("+")[0])
    numbers = version_tuple(re.sub(r"[a-z].*", "", version.split("+")[0]))
    return (*numbers, int(beta[1]) if beta else float("inf"))


def _call(name: str, given: dict[str, Any]) -> tuple[Tensor, ...]:
    """A function of the library, which returns other tensors after ours in each version."""
    sides = {side: None if given[side] < 0 else given[side] for side in ("window_size_left", "window_size_right")}
    found: tuple[Tensor, ...] = getattr(importlib.import_module(_INTERFACE), name)(**given | sides)
    return found


def _forward(given: dict[str, Any]) -> tuple[Tensor, ...]:
    return _call("_flash_attn_fwd", given | {"return_lse": True})[:2]


def _backward(given: dict[str, Any]) -> tuple[Tensor, ...]:
    return _call("_flash_attn_bwd", given)[:3]


class Flash4(FlashOps):
    """flash-attn's kernels for Hopper and Blackwell, written in CuTe."""

    name = "flash4"
    package = "flash-attn-4"
    install = "pip install --pre 'flash-attn-4>=4.0.0b28', or use 'torch_varlen' or 'flash2'"
    op = staticmethod(define_flash_ops("flash4", _forward, _backward))

    def missing(self, problem: Problem) -> str | None:
        version = problem.version(self.package)
        if version is None:
            return "the package flash-attn-4 is not " + ("installed" if problem.packages is None else "among those stated")
        if problem.packages is not None:
            return None  # of another machine its version is all that is known
        return probe(f"flash-attn-4 {version}", _INTERFACE, _CORE)[0]

    def extra_refusals(self, problem: Problem) -> Iterable[Refusal]:
        yield from super().extra_refusals(problem)
        want, major = problem.semantics, (problem.capability or (9, 0))[0]
        gates = (
            (True, "4.0.0b12", "varlen attention with gradients"),
            (problem.needs_grad and want.softcap is not None, "4.0.0b28", "gradients of softcap"),
        )
        yield from version_refusals(problem, self.package, _release, gates, "pip install --pre")
        widest = max(problem.head_dim, problem.value_head_dim or 0)
        if widest > 128 and major > 9:
            yield Refusal(f"supports head dimensions up to 128 on this GPU, and this is {widest}", "use more heads")
        if problem.needs_grad and major >= 12:
            if want.deterministic:
                yield Refusal("does not support deterministic gradients on this GPU", "pass deterministic=False")
            if want.softcap is not None:
                yield Refusal("does not support gradients of softcap on this GPU", "drop `softcap`")

    def kernel(self, problem: Problem) -> str:
        return "flash_attn.cute.interface._flash_attn_fwd"
