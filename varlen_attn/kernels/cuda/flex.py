"""`torch.nn.attention.flex_attention` over packed rows, sequences kept apart by a block mask: the one fused kernel for score biases.

Read in torch's source (2.11 and 2.13). Run with torch 2.11 on an H200, and in the tests on a CPU, through dynamo and torch's dense stand-in
for the kernel, forward and backward:

- It must be compiled: otherwise it computes all ``T x Tk`` scores. So it is compiled here, once for each kind of call (dtype, heads, head
  dimensions, options); the number of rows is dynamic, except that up to 128 rows, which are one block, are another kind, and so is one
  row. The first call of a kind waits for Inductor and Triton; how long on a GPU was not measured. In a CUDA graph nothing can be
  compiled: call it once before; whether it can be captured then was not tried.
- A callable bias becomes part of the kernel: it must be elementwise, and the floats that it holds are constants of that
  kernel. Tensors that it indexes get gradients, added up in float32 by atomic adds; one that wants a gradient and is indexed twice is
  refused by torch.
- The number of rows is data while the caller's graph is traced, and the lowering asks how large it is: refused there. (In capacity mode
  it is a constant: a `Backend` object, which is not asked while tracing, then becomes part of that graph.)
- Head dimensions below 16 are refused by the lowering, so they are padded; others need not be powers of 2. Value heads may differ.
- Pairs that are hidden inside of a visited block have weight 0, and 0 times NaN is NaN: a NaN of one sequence reaches its neighbours in
  a block of 128 rows. Slack rows are zeroed before the call for that reason.
- Its products are TF32 where `torch.set_float32_matmul_precision` allows that, and exact float32 by default.
- No dropout. Gradients of q, k, v are added up without atomics, but runs have not been compared: deterministic gradients are refused.
- Sinks are exact by the log-sum-exp, ``out * sigmoid(lse - sink)``, for which the kernel has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._torch import compile_error, mark_dynamic
from ...errors import ArgumentError
from ..base import HALF, Backend, Capabilities, contiguous_grad, nothing, pad_head_dim
from ..problem import Problem, installed_version
from ..values import Call, Result, ScoreBias
from .flex_blocks import BLOCK, Visible, visible_pairs

_TRITON = ("triton", "pytorch-triton", "triton-windows")  # distributions that have a module triton

_kernels: dict[tuple[Any, ...], Callable[..., tuple[Tensor, Tensor | None]]] = {}


class Flex(Backend):
    """`flex_attention` over packed rows, sequences kept apart by a block mask."""

    name = "flex"
    install = "install the Triton that belongs to this torch, as its CUDA wheels do"
    capabilities = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=HALF | {torch.float32},
        min_capability=(8, 0),
        min_torch=(2, 11),
        rocm=False,
        max_head_dim=256,
        dropout=False,
        deterministic=False,
        tracing=False,
        slack_rows=False,
    )

    def missing(self, problem: Problem) -> str | None:
        here = problem.torch_version == torch.__version__ and problem.packages is None
        if here and torch.cuda.is_available() and all(installed_version(name) is None for name in _TRITON):
            return f"Triton is not installed (none of {', '.join(_TRITON)}), and flex_attention is compiled with it"
        return None

    def kernel(self, problem: Problem) -> str:
        return "flex_attention (triton_tem_fused_flex_attention)"

    def seen_as(self, problem: Problem) -> str:
        return "flex_attention"

    def run(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
        value_dim = value.shape[-1]
        semantics, extras = call.semantics, call.extras
        bias = extras.score_bias
        if 0 in (query.shape[0], key.shape[0]) or (isinstance(bias, Tensor) and 0 in bias.shape):  # the kernel refuses all of these
            return nothing(query, key, value, call)
        query, key = pad_head_dim(1, query, key, least=16)
        (value,) = pad_head_dim(1, value, least=16)
        visible = visible_pairs(*call.layouts, semantics)
        options = _Options(semantics.factor, semantics.softcap, semantics.return_lse or extras.sinks is not None)
        out, lse = _call(query, key, value, visible, options, extras.alibi_slopes, bias)
        if extras.sinks is not None and lse is not None:
            share = torch.sigmoid(lse - extras.sinks[:, None]).transpose(0, 1)[..., None]
            out = (out * share).to(query.dtype)
        out = contiguous_grad(out)[..., :value_dim]
        return out, lse.detach() if semantics.return_lse and lse is not None else None


class _Options(NamedTuple):
    """Constants of the compiled code."""

    scale: float
    softcap: float | None
    lse: bool


def _call(
    query: Tensor, key: Tensor, value: Tensor, visible: Visible, options: _Options, slopes_N: Tensor | None, bias: ScoreBias | None
) -> tuple[Tensor, Tensor | None]:
    """``out (T,N,Hv)`` and ``lse (N,T)`` if `_Options.lse`, by the kernel of this kind of call."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    if torch.compiler.is_compiling():
        out, lse = _attend(q, k, v, visible, options, slopes_N, bias)
    else:
        kind = (
            *((x.dtype, x.device, *x.shape[1:], x.requires_grad) for x in (query, key, value)),
            *(x.shape[0] > BLOCK for x in (query, key)),
            options,
            slopes_N is None,
            _kind_of_bias(bias),
            torch.is_grad_enabled(),
        )
        if isinstance(bias, Tensor):
            bias = bias.view_as(bias)
        _mark_sizes(q, k, v, visible, bias)
        out, lse = _compiled(kind, q, k, v, visible, options, slopes_N, bias)
    return out[0].transpose(0, 1), None if lse is None else lse[0]


def _kind_of_bias(bias: Any) -> Any:
    """Its code, and each float that it holds: dynamo makes a symbol of a float that changes, and the lowering cannot have that."""
    if isinstance(bias, Tensor):
        return bias.dtype, bias.requires_grad
    if isinstance(bias, partial):
        code, held = _kind_of_bias(bias.func), [*bias.args, *bias.keywords.values()]
    else:
        code = getattr(bias, "__code__", type(bias))
        held = [cell.cell_contents for cell in getattr(bias, "__closure__", None) or ()]
        held += getattr(getattr(bias, "__self__", bias), "__dict__", {}).values()
    return code, *(x for x in held if isinstance(x, float))


def _compiled(kind: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, Tensor | None]:
    try:
        return _kernel(kind)(*arguments)
    except compile_error() as error:
        bias = arguments[-1]
        if bias is None or isinstance(bias, Tensor):
            raise
        raise ArgumentError(
            "`score_bias` must be elementwise to become part of a kernel, one number for a head and two positions, of tensor operations "
            f"that read no value, but {bias!r} could not be compiled: pass a tensor (N, Sq, Sk), or backend='sdpa_padded'."
        ) from error


def _kernel(kind: tuple[Any, ...]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`_attend`, compiled. Each kind has code of its own, because dynamo gives up on code that it compiled eight times."""
    if kind not in _kernels:
        own = FunctionType(_attend.__code__.replace(co_name=f"flex_{len(_kernels)}"), _attend.__globals__)
        _kernels[kind] = torch.compile(own, fullgraph=True)
    return _kernels[kind]


def _mark_sizes(q: Tensor, k: Tensor, v: Tensor, visible: Visible, bias: ScoreBias | None) -> None:
    """Tell dynamo which sizes change from batch to batch: else each kind is compiled twice before it notices.

    The tensors are views of the caller's: packed ones may be marked already, for graphs of the caller's, as sizes that are data, and the
    lowering cannot have that.
    """
    for x in (q, k, v):
        mark_dynamic(x, 2)
    for x in visible.rows:
        mark_dynamic(x, 0)
    for x in visible.blocks:
        mark_dynamic(x, list(range(2, x.dim())))
    if isinstance(bias, Tensor):
        mark_dynamic(bias, [1, 2])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Visible, options: _Options, slopes_N: Tensor | None, bias: ScoreBias | None
) -> tuple[Tensor, Tensor | None]:
    """What is compiled, on ``(1, N, T, H)``; the functions inside become part of the kernel."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    rows, softcap = visible.rows, options.softcap

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j >= rows.first_T[i]) & (j < rows.end_T[i])

    def modified(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes_N is not None:
            score = score - slopes_N[h] * (rows.aligned_T[i] - j).abs()
        # Positions of a hidden pair may belong to two sequences: each exists, so that nothing is read where no bias is.
        if isinstance(bias, Tensor):
            score = score + bias[h, rows.q_positions_T[i], rows.k_positions_T[j]]
        elif bias is not None:
            score = score + bias(h, rows.q_positions_T[i], rows.k_positions_T[j]).reshape(())  # an error, unless it is one number
        return score

    plain = softcap is None and slopes_N is None and bias is None
    sizes = (q.shape[2], k.shape[2])
    out, aux = flex_attention(
        q,
        k,
        v,
        score_mod=None if plain else modified,
        block_mask=BlockMask(sizes, **visible.blocks._asdict(), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=sees),
        scale=options.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options={"BACKEND": "TRITON"},  # not the kernels for decoding and for flash-attn 4, which "AUTO" may take
        return_aux=AuxRequest(lse=options.lse),
    )
    return out, aux.lse
