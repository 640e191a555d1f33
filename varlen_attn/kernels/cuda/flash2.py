"""The package flash-attn, version 2: dropout, softcap, ALiBi and deterministic gradients beside everything that torch's own kernel has.

Read in its source (2.8.3, with what changed since 2.1); its Triton build is run by ``tests/lane``, its CUDA build was not run:

- Causal and windows are aligned bottom-right (since 2.1). Softcap and dropout exclude each other.
- Rows are loaded 16 bytes at once, and windows are normalised by the longest key sequence: see `fit`.
- Under a causal mask without a left side, ALiBi adds ``slope * j`` instead of ``-slope * |i + Lk - Lq - j|`` (``mask.h``): the same
  softmax, and a log-sum-exp that is larger by ``slope * (i + Lk - Lq)``, which is subtracted here.
- Rows beyond ``cu_seqlens[-1]`` are never written. A row without keys has a log-sum-exp of +inf; before 2.6 it comes padded.
- With dropout, the log-sum-exp is only to be had together with all attention weights: refused.
- Of its two ROCm builds, the CK one ignores softcap, and the Triton one ignores windows and softcap, asserts at one ALiBi slope a head
  and draws the same dropout mask at every call (refused on a GPU, where models are trained with it). Its log-sum-exp is ``(T, N)``;
  under a causal mask, a block of queries that see no key zeroes it beyond the end of the sequence and of the memory. In Triton's
  interpreter, bfloat16 is garbage.
- A module named ``flash_attn`` is no evidence: flash-attn-4 leaves a namespace package of that name, and other distributions
  install one too. So the distribution is looked up, then imported, then its signature is read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...layout.seq_layout import SeqLayout
from ..base import HALF, Backend, Refusal, scale_refusals
from ..limits import MAX_GRADIENT
from ..problem import Problem, Semantics, version_tuple
from ..unseen import without_unseen
from ..values import Call, Result
from .fit import FLASH, fitted, flash2_bounds, flash_window
from .packages import findable, probe, version_refusals

_INTERFACE = "flash_attn.flash_attn_interface"
_CORE = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p", "softmax_scale", "causal", "return_attn_probs")
_SINCE = (  # version, parameter, what it is for
    ("2.3", "window_size", "sliding windows"),
    ("2.4", "alibi_slopes", "ALiBi slopes"),
    ("2.4.1", "deterministic", "deterministic gradients"),
    ("2.6", "softcap", "softcap"),
)


def _not_installed() -> str:
    if findable("flash_attn"):
        return "the package flash-attn is not installed: the module flash_attn found here belongs to another distribution"
    return "the package flash-attn is not installed"


def _is_triton_build(problem: Problem) -> bool:
    """Whether the package here is, or would be imported as, its Triton build. That of another machine is taken for the usual one."""
    if problem.packages is not None:
        return False
    switch = os.environ.get("FLASH_ATTENTION_TRITON_AMD_ENABLE", "FALSE") == "TRUE"
    return bool(getattr(sys.modules.get(_INTERFACE), "USE_TRITON_ROCM", switch))


def _options(semantics: Semantics, slopes: Any) -> dict[str, Any]:
    """Arguments that older versions lack: only those that are asked for."""
    given = {
        "window_size": None if semantics.window is None else flash_window(semantics),
        "alibi_slopes": slopes,
        "deterministic": semantics.deterministic or None,
        "softcap": semantics.softcap,
    }
    return {name: value for name, value in given.items() if value is not None}


def _names(semantics: Semantics) -> list[str]:
    return list(_options(semantics, semantics.alibi or None))


class Flash2(Backend):
    """`flash_attn.flash_attn_varlen_func`."""

    name = "flash2"
    package = "flash-attn"
    install = "pip install flash-attn --no-build-isolation, built for this torch"
    capabilities = replace(
        FLASH, devices=frozenset({"cuda", "cpu"}), dtypes=HALF | {torch.float32}, max_gradient=MAX_GRADIENT, sinks=False, reads_slack=False
    )

    def missing(self, problem: Problem) -> str | None:
        version = problem.version(self.package)
        if version is None:
            return _not_installed() if problem.packages is None else "the package flash-attn is not among those stated"
        if problem.packages is not None:
            return None  # another machine's package: its version is all that is known
        sentence, parameters = probe(f"flash-attn {version}", _INTERFACE, {"flash_attn_varlen_func": _CORE})
        lacking = [name for name in _names(problem.semantics) if name not in parameters]
        if sentence is None and lacking:
            return f"flash_attn_varlen_func of flash-attn {version} has no parameter {', '.join(lacking)}"
        return sentence

    def extra_refusals(self, problem: Problem) -> Iterable[Refusal]:
        yield from _device_refusals(problem)
        yield from _version_refusals(problem)
        yield from scale_refusals(problem)
        want = problem.semantics
        widest = max(problem.head_dim, problem.value_head_dim or 0)
        if want.softcap is not None and want.dropout_p:
            yield Refusal("does not support softcap together with dropout", "drop one of them")
        if want.return_lse and want.dropout_p:
            yield Refusal("returns the log-sum-exp under dropout only together with all attention weights", "drop `return_lse`")
        if want.dropout_p and problem.needs_grad and widest > 192 and problem.capability in ((8, 6), (8, 9)):
            yield Refusal("has a wrong backward for dropout with head dimensions above 192 on this GPU", "use more heads")
        if want.dropout_p == 1.0:
            yield Refusal("needs dropout_p below 1", "pass less")

    def kernel(self, problem: Problem) -> str:
        build = "Triton build" if _is_triton_build(problem) else "composable kernels" if problem.rocm else "flash_fwd_kernel"
        return f"flash_attn_varlen_func ({build})"

    def seen_as(self, problem: Problem) -> str:
        if _is_triton_build(problem):
            return "flash_attn::_flash_attn_varlen_forward" if problem.device_type == "cpu" else "attn_fwd"
        return "" if problem.rocm else "flash_fwd_(kernel|splitkv)"

    @fitted(align=True)
    def run(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
        from flash_attn import flash_attn_interface

        triton = getattr(flash_attn_interface, "USE_TRITON_ROCM", False)

        def attend(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
            semantics, slopes = call.semantics, call.extras.alibi_slopes
            max_q, max_k = flash2_bounds(call)
            result = flash_attn_interface.flash_attn_varlen_func(
                q=query,
                k=key,
                v=value,
                cu_seqlens_q=call.layout_q.cu_seqlens,
                cu_seqlens_k=call.layout_kv.cu_seqlens,
                max_seqlen_q=max_q,
                max_seqlen_k=max_k,
                dropout_p=semantics.dropout_p,
                softmax_scale=semantics.scale,
                causal=bool(semantics.causal),
                return_attn_probs=semantics.return_lse,
                **_options(semantics, slopes),
            )
            if not semantics.return_lse:
                return result, None
            lse = _packed_lse(result[1].detach(), call.layout_q, triton)
            if slopes is not None and _adds_by_column(semantics, max_k):
                lse = lse - slopes[:, None] * _aligned_positions(*call.layouts)
            return result[0], lse

        if triton and call.semantics.causal:
            return without_unseen(query, key, value, call, attend, queries=True)
        return attend(query, key, value, call)


def _adds_by_column(semantics: Semantics, max_k: int) -> bool:
    """Whether the kernel takes the call for causal only: a left side of at least ``max_seqlen_k`` is unlimited to it."""
    left, _ = flash_window(semantics)
    return bool(semantics.causal) and not 0 <= left < max_k


def _aligned_positions(layout_q: SeqLayout, layout_kv: SeqLayout) -> Tensor:
    """``(T,)``: ``i + Lk - Lq`` of each query; of no meaning for slack rows."""
    if layout_kv is layout_q:
        return layout_q.positions
    offset_Q = layout_kv.cu_seqlens.diff() - layout_q.cu_seqlens.diff()
    return layout_q.positions + offset_Q[layout_q.seq_ids.clamp(max=layout_q.num_seqs - 1)]


def _packed_lse(lse: Tensor, layout_q: SeqLayout, triton: bool) -> Tensor:
    """``(N, T)``, -inf for rows without keys."""
    if triton:
        lse = lse.transpose(0, 1)
    elif lse.dim() == 3:  # before 2.6: (Q, N, max_seqlen)
        sequence_T = layout_q.seq_ids.clamp(max=lse.shape[0] - 1)  # slack rows belong to none
        lse = lse[sequence_T, :, layout_q.positions.clamp(min=0)].transpose(0, 1)
    return lse.masked_fill(torch.isposinf(lse), float("-inf"))


def _device_refusals(problem: Problem) -> Iterable[Refusal]:
    """What differs between the CUDA build, the two ROCm builds, and the Triton build in Triton's interpreter."""
    on_cpu, triton = problem.device_type == "cpu", _is_triton_build(problem)
    if on_cpu and not (triton and os.environ.get("TRITON_INTERPRET") == "1"):
        yield Refusal("runs on a GPU; on a CPU only its Triton build does, in Triton's interpreter", "move them to 'cuda'", "machine")
    elif on_cpu and problem.requested != "flash2":
        yield Refusal("is never chosen by itself on a CPU: Triton's interpreter is for tests", "request it with backend='flash2'")
    if on_cpu and problem.dtype == torch.bfloat16:
        yield Refusal("is wrong for bfloat16 in Triton's interpreter", "use float16")
    if not on_cpu and problem.dtype == torch.float32:
        yield Refusal("supports bfloat16, float16 only, and the tensors are float32", "call it under torch.autocast")
    want = problem.semantics
    if want.alibi and want.causal and want.return_lse and problem.rocm:
        yield Refusal("is not known to return a log-sum-exp with true ALiBi biases on ROCm", "drop `return_lse`, or use another backend")
    if want.softcap is not None and (triton or problem.rocm):
        yield Refusal("ignores softcap on ROCm builds, without an error", "drop `softcap`, or use another backend")
    if triton:
        if want.window is not None:
            yield Refusal("ignores windows in its Triton build, without an error", "drop `window`, or use another backend")
        if want.alibi:
            yield Refusal("fails for ALiBi slopes in its Triton build", "drop `alibi_slopes`, or use another backend")
        if want.causal and not problem.host_lengths:
            yield Refusal("needs lengths on the host for causal attention in its Triton build", "build the layout from lengths")
        if want.dropout_p and not on_cpu:
            yield Refusal("draws the same dropout mask at every call in its Triton build", "pass dropout_p=0, or use another backend")


def _version_refusals(problem: Problem) -> Iterable[Refusal]:
    names = _names(problem.semantics)
    gates = (
        (True, "2.1", "varlen attention as it is called here"),
        (not problem.rocm and (problem.capability or (0, 0)) >= (10, 0), "2.7.3", "this GPU"),
        *((name in names, since, what) for since, name, what in _SINCE),
    )
    return version_refusals(problem, "flash-attn", version_tuple, gates, "pip install")
