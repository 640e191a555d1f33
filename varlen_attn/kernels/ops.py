"""Our own ops in `torch.library`: a forward with its backward, and what tracing, autograd and the FLOP counter want of them.

What `torch.library.custom_op` does, except that its wrapper imports dynamo at the first call, which takes a second; and that signatures
and sources are not inspected, which takes milliseconds of every import.

The FLOP counter, `torch.utils.flop_counter`, takes 50 ms to import: formulas are registered where it has been imported. That is looked
for when this package is imported and at every call. A `FlopCounterMode` copies the formulas when it is made, so import
``torch.utils.flop_counter`` first, or make one call before it.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch import PLAIN, any_requires_grad, is_batch_of_gradients, is_tracing, register_autograd, register_fake, watchers
from ..errors import ArgumentError, LayoutError
from ..layout.checks import check_offsets_tensor
from .base import accumulation_dtype

Op = Callable[..., Any]

_COUNTER = "torch.utils.flop_counter"

_LIBRARY = torch.library.Library("varlen_attn", "FRAGMENT")
_TYPES = {"Tensor | None": "Tensor?", "list[int]": "SymInt[]", "int": "SymInt", "str": "str"}  # others have the same name in a schema
_defined: list[str] = []  # names of backends


def _schema_of(function: Op) -> list[str]:
    """Its arguments in the words of a schema, by their annotations, which are strings."""
    code, defaults = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount]
    arguments = [f"{_TYPES.get(kind, kind)} {name}" for name in names for kind in (function.__annotations__[name],)]
    plain = len(names) - len(defaults)
    return arguments[:plain] + [f"{argument}={value}" for argument, value in zip(arguments[plain:], defaults, strict=True)]


def define_ops(name: str, forward: Op, backward: Op, *, kernel: str, device: str = "cpu", lse_by_rows: bool = False) -> Op:
    """Register ``varlen_attn::{name}_forward`` and ``_backward``; returns a function that calls the first.

    ``forward(query, key, value, cu_q, cu_k, ...) -> out (T,N,Hv), lse (N,T)``: its annotations are the schema, optional tensors before
    numbers. ``backward(grad, query, key, value, out, lse, cu_q, cu_k, ...) -> dq, dk, dv``, and the gradient of ``sinks`` if there is such
    an argument, ``(N,)``, or ``(0,)`` for None. All have memory of their own, which is contiguous.

    The dispatcher costs 8 microseconds a call, and autograd in Python twice as much. So where nothing sees them (`watchers`), eager calls
    leave it out, and call ``forward`` and ``backward`` themselves. Graphs of `torch.compile` and `torch.export` hold the ops.

    Args:
        kernel: who has no second derivative, for the error.
        device: for whose tensors; "default" for any.
        lse_by_rows: the log-sum-exp is the transpose of a contiguous ``(T,N)``.
    """
    arguments = _schema_of(forward)
    sinks = arguments.index("Tensor? sinks") if "Tensor? sinks" in arguments else None
    num_tensors = sum(argument.startswith("Tensor") for argument in arguments)

    def fake_forward(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        if query.device != options[0].device:  # of both, this is chosen by the one that has no memory, and the other's would hold anything
            raise ArgumentError(f"query and `cu_seqlens` must be on one device, but are on {query.device} and {options[0].device}.")
        (rows, heads), dtype = query.shape[:2], accumulation_dtype(query.dtype)
        lse = query.new_empty((rows, heads), dtype=dtype).t() if lse_by_rows else query.new_empty((heads, rows), dtype=dtype)
        return query.new_empty((rows, heads, value.shape[2])), lse

    def fake_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *options: Any) -> Any:
        grads = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
        return grads if sinks is None else (*grads, lse.new_empty((0 if options[sinks - 3] is None else query.shape[1],)))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        out, lse = output
        # Without this the log-sum-exp would look differentiable and its gradient be dropped without a word.
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(*inputs[:3], out, lse, *inputs[3:num_tensors])
        ctx.options = inputs[num_tensors:]

    def autograd(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: under checkpointing a second time is an error
        seen = torch.compiler.is_compiling() or torch.is_grad_enabled() or is_batch_of_gradients(grad)
        seen = seen or any(map(operator.call, watchers)) or not PLAIN.issuperset(map(type, (grad, *saved)))
        dq, dk, dv, *dsinks = (backward_op if seen else backward)(grad, *saved, *ctx.options)
        grads = [dq, dk, dv, *[None] * (len(arguments) - 3)]
        if sinks is not None and saved[sinks + 2] is not None:
            grads[sinks] = dsinks[0]
        return tuple(grads)

    def no_second_derivative(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"the backward of backend {name!r} is not differentiable: {kernel} has no second derivative. Order backend='reference' for it."
        )

    def register(suffix: str, schema: str, function: Op, fake: Op) -> Any:
        _LIBRARY.define(f"{name}_{suffix}{schema}", tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(f"{name}_{suffix}", function, "CPU" if device == "cpu" else "CompositeExplicitAutograd")
        register_fake(_LIBRARY, f"{name}_{suffix}", fake)
        return getattr(torch.ops.varlen_attn, f"{name}_{suffix}").default

    gradients = ", ".join(["Tensor"] * (3 if sinks is None else 4))
    schema = f"({', '.join(arguments)}) -> (Tensor, Tensor)"
    op = register("forward", schema, forward, fake_forward)
    of_backward = f"({', '.join(['Tensor grad', *arguments[:3], 'Tensor out', 'Tensor lse', *arguments[3:]])}) -> ({gradients})"
    backward_op = register("backward", of_backward, backward, fake_backward)
    apply = register_autograd(_LIBRARY, op, autograd, setup_context)
    register_autograd(_LIBRARY, backward_op, no_second_derivative)
    _defined.append(name)
    _register_flops()

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*inputs)
        if any(map(operator.call, watchers)) or not PLAIN.issuperset(map(type, inputs[:num_tensors])):
            if _COUNTER in sys.modules:
                _register_flops()
            return op(*inputs)
        return apply(forward, *inputs) if torch.is_grad_enabled() and any_requires_grad(*inputs) else forward(*inputs)

    return call


def check_operands(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, *results: Tensor) -> None:
    """What a kernel touches follows from these sizes, so those that do not belong together are refused, in direct calls of the op too.

    ``results``: gradient of the output, output and log-sum-exp.
    """
    (rows, heads, dim), (rows_k, kv_heads, value_dim), dtype = query.shape, value.shape, query.dtype
    fits = key.shape == (rows_k, kv_heads, dim) and kv_heads > 0 and heads % kv_heads == 0 and key.dtype == value.dtype == dtype
    if fits and results:
        grad, out, lse = results
        fits = grad.shape == out.shape == (rows, heads, value_dim) and grad.dtype == out.dtype == dtype
        fits = fits and lse.shape == (heads, rows) and lse.dtype == accumulation_dtype(dtype)
    if not fits:
        shown = ", ".join(f"{tuple(x.shape)} of {x.dtype}" for x in (query, key, value, *results))
        raise ArgumentError(f"query, key, value (and gradient, output, log-sum-exp) must belong together, but are {shown}.")
    if cu_q.dtype != torch.int32 or cu_k.dtype != torch.int32 or cu_q.dim() != 1 or not 0 < cu_q.numel() == cu_k.numel() or cu_k.dim() != 1:
        check_offsets_tensor(cu_q)
        check_offsets_tensor(cu_k)
        raise LayoutError(f"`cu_seqlens` of queries and keys must have equally many entries, but have {cu_q.numel()} and {cu_k.numel()}.")


def _register_flops() -> None:
    """Tell the FLOP counter of this process, if there is one, about our ops."""
    counter: Any = sys.modules.get(_COUNTER)
    for name in _defined if counter else ():
        for op, formula in ((f"{name}_forward", _forward_flops), (f"{name}_backward", _backward_flops)):
            packet = getattr(torch.ops.varlen_attn, op)
            if packet not in counter.flop_registry:
                counter.register_flop_formula(packet, get_raw=True)(formula)


def _pairs(cu_q: Tensor, cu_k: Tensor, rows_q: int, rows_k: int) -> int:
    """Query-key pairs of all sequences. Masks are not subtracted, as torch's own formulas do not."""
    if is_tracing(cu_q):  # no values: as if all were equally long
        return rows_q * rows_k // max(1, cu_q.shape[0] - 1)
    return int((cu_q.diff().to(torch.int64) * cu_k.diff().to(torch.int64)).sum())


def _forward_flops(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, *args: Any, **kwargs: Any) -> int:
    """Two matrix products: scores, and their weights times the values."""
    pairs = _pairs(cu_q, cu_k, query.shape[0], key.shape[0])
    return 2 * pairs * query.shape[1] * (query.shape[2] + value.shape[2])


def _backward_flops(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, *args: Any, **kwargs: Any
) -> int:
    """Five: the scores again, and the gradients of weights, values, queries and keys."""
    pairs = _pairs(cu_q, cu_k, query.shape[0], key.shape[0])
    return 2 * pairs * query.shape[1] * (3 * query.shape[2] + 2 * value.shape[2])
