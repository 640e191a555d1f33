"""Torch's own variable-length flash kernel: the aten op below `torch.nn.attention.varlen.varlen_attn`, or that function itself.

The function is a Python-bodied op around the aten op, with a backward in Python. That costs more host time than the kernel takes for a
small batch, so it is called only where it knows another kernel (torch 2.14). Read in torch's source (2.10 to 2.13; of 2.14 and 2.15 what
changed); run with torch 2.11 on an H200:

- The function of 2.12 and later wants ``enable_gqa`` for grouped heads; the op does not.
- Causal is the window ``(-1, 0)`` as a tuple: a list compares unequal. It is aligned bottom-right.
- The head dimension must be a multiple of 8, and nothing is padded there. Value heads are as wide as query heads.
- Rows beyond ``cu_seqlens[-1]`` are never written: not the output, not the gradients.
- A row without keys has a log-sum-exp of +inf, and the log-sum-exp is ``(N, T)`` although the documentation says ``(T, N)``.
- Rows are loaded 16 bytes at once, and windows are normalised by the longest key sequence: see `fit`.
- It has no dropout. The aten op has (with a formula for autograd, so that the mask is drawn once and kept).
- On ROCm and on Intel GPUs (XPU) the op of that name is another kernel. Its source was not read: refused there.
- Its backward is deterministic where `torch.use_deterministic_algorithms(True)` says so; there is no argument for it.
- From 2.14 on, torch prefers cuDNN's kernel on Hopper and Blackwell (cuDNN 9.18, more than 128 queries, no window, as many key heads as
  query heads); from 2.15 on also for causal attention with one tensor of offsets, and for grouped heads. Whether that kernel is
  deterministic its source does not say, so where it may run deterministic gradients are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..base import Backend, Refusal, scale_refusals
from ..limits import MAX_GRADIENT
from ..problem import Problem, version_tuple
from ..values import Call, Result
from .fit import FLASH, fitted, flash2_bounds, flash_window

_CUDNN = (2, 14)  # the torch whose function may choose cuDNN's kernel
_KNOWS_CUDNN = version_tuple(torch.__version__) >= _CUDNN
_DROPOUT_BACKWARD_IS_WRONG = {(8, 6), (8, 9), (12, 0)}  # with head dimensions above 192: refused by torch's own checks too


class TorchVarlen(Backend):
    """`aten._flash_attention_forward` with offsets; from torch 2.14 on `torch.nn.attention.varlen.varlen_attn` where nothing is dropped."""

    name = "torch_varlen"
    install = "pip install 'torch>=2.11' for CUDA"
    capabilities = replace(
        FLASH, min_torch=(2, 11), rocm=False, torch_flash=True, max_gradient=MAX_GRADIENT,
        softcap=False, alibi=False, sinks=False, reads_slack=False,
    )  # fmt: skip

    def missing(self, problem: Problem) -> str | None:
        if problem.torch_version != torch.__version__:
            return None  # another machine's torch: its version is all that is known
        if torch.cuda.is_available() and not torch.backends.cuda.is_flash_attention_available():
            return f"torch {torch.__version__} is built without flash attention"
        return None

    def extra_refusals(self, problem: Problem) -> Iterable[Refusal]:
        yield from scale_refusals(problem)  # torch 2.15 raises
        want = problem.semantics
        widest = max(problem.head_dim, problem.value_head_dim or 0)
        if want.dropout_p and problem.needs_grad and widest > 192 and problem.capability in _DROPOUT_BACKWARD_IS_WRONG:
            yield Refusal("has no dropout with head dimensions above 192 on this GPU", "pass dropout_p=0, or use more heads")
        if want.dropout_p == 1.0:
            yield Refusal("needs dropout_p below 1", "pass less")
        if want.deterministic and problem.needs_grad and not problem.deterministic_mode:
            yield Refusal(
                "is deterministic only where torch.use_deterministic_algorithms(True) is set: the kernel has no argument for it",
                "set it, or pass deterministic=False",
            )
        elif want.deterministic and problem.needs_grad and _may_be_cudnn(problem):
            yield Refusal(
                f"may run cuDNN's kernel in torch {problem.torch_version}, which does not say whether its gradients are deterministic",
                "pass deterministic=False",
            )

    def kernel(self, problem: Problem) -> str:
        if problem.semantics.dropout_p or version_tuple(problem.torch_version) < _CUDNN:
            return "aten::_flash_attention_forward with cu_seqlens (flash_fwd_kernel)"
        return f"torch_attn::_varlen_attn ({'flash_fwd_kernel or cuDNN' if _may_be_cudnn(problem) else 'flash_fwd_kernel'})"

    def seen_as(self, problem: Problem) -> str:
        return "flash_fwd_(kernel|splitkv)" + ("|cudnn" if _may_be_cudnn(problem) else "")

    @fitted(align=True)
    def run(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
        run = _varlen_attn if _KNOWS_CUDNN and not call.semantics.dropout_p else _flash
        out, lse = run(query, key, value, call)
        return out, lse.detach().masked_fill(torch.isposinf(lse), float("-inf")) if call.semantics.return_lse else None


def _may_be_cudnn(problem: Problem) -> bool:
    """Whether torch may choose cuDNN's kernel: it decides by lengths and by cuDNN's version too, which no problem knows."""
    want = problem.semantics
    fits = want.window is None and not want.dropout_p and (not want.causal or problem.self_attention)
    since = (2, 15) if want.causal or problem.num_heads != problem.num_kv_heads else _CUDNN
    return fits and (problem.capability or (0, 0))[0] in (9, 10) and version_tuple(problem.torch_version) >= since


def _varlen_attn(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    max_q, max_k = flash2_bounds(call)
    out, lse = varlen_attn(
        query=query,
        key=key,
        value=value,
        cu_seq_q=call.layout_q.cu_seqlens,
        cu_seq_k=call.layout_kv.cu_seqlens,
        max_q=max_q,
        max_k=max_k,
        return_aux=AuxRequest(lse=True),
        scale=call.semantics.scale,
        window_size=flash_window(call.semantics),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out, lse


def _flash(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    left, right = flash_window(call.semantics)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        call.layout_q.cu_seqlens,
        call.layout_kv.cu_seqlens,
        *flash2_bounds(call),
        call.semantics.dropout_p,
        (left, right) == (-1, 0),
        False,
        scale=call.semantics.scale,
        window_size_left=left,
        window_size_right=right,
    )
    return out, lse
