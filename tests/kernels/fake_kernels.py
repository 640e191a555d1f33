"""CPU stand-ins for CUDA kernels, with the conventions and the traps that their source shows. Slow, in float64, one sequence at a time.

They make the adapters' arithmetic testable without a GPU: what is passed, what comes back, what is never written. They say nothing
about the kernels themselves.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import itertools
import types
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Strings
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varlen_attn.kernels.base import Backend
from varlen_attn.kernels.problem import Problem, Semantics


class Sequence(NamedTuple):
    """One sequence: its rows, and in float64 q, k, v ``(N, L, H)``, softmax weights, dropout factors and log-sum-exp; masked scores and
    what softcap multiplies their gradients with."""

    rows_q: slice
    rows_k: slice
    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor
    keep: Tensor
    lse: Tensor
    scores: Tensor
    slope: Tensor

    @property
    def out(self) -> Tensor:
        return (self.weights * self.keep) @ self.v


def sequences(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, semantics: Semantics, dropout_p: float, seed: int,
    alibi_slopes: Tensor | None = None, num_keys: int = 1,
) -> Iterator[Sequence]:  # fmt: skip
    """``q (T,N,H)``, ``k, v (Tk,K,H)``. Random numbers of a head begin at ``(sequence * N + head) * num_keys``."""
    group = q.shape[1] // k.shape[1]
    both = zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True)
    for number, ((q0, q1), (k0, k1)) in enumerate(both):
        qs = q[q0:q1].double().transpose(0, 1)
        ks, vs = (x[k0:k1].double().transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        low, high = semantics.visible_range(k1 - k0 - (q1 - q0))
        distance = torch.arange(k1 - k0) - torch.arange(q1 - q0)[:, None]
        visible = torch.ones_like(distance, dtype=torch.bool)
        visible &= True if low is None else distance >= low
        visible &= True if high is None else distance <= high
        scores, slope = qs @ ks.transpose(1, 2) * scale, torch.ones(())
        if semantics.softcap is not None:
            capped = torch.tanh(scores / semantics.softcap)
            scores, slope = semantics.softcap * capped, 1 - capped.square()
        if alibi_slopes is not None:
            scores = scores + alibi_slopes.double()[:, None, None] * _alibi(semantics, distance, k1 - k0 - (q1 - q0))
        scores = scores.masked_fill(~visible, float("-inf"))
        lse = scores.logsumexp(-1)
        weights = torch.where(lse.isneginf()[..., None], 0, (scores - lse[..., None]).exp())
        heads = (number * q.shape[1] + torch.arange(q.shape[1])) * num_keys
        drawn = [torch.rand(scores.shape[1:], generator=torch.Generator().manual_seed(seed + int(head))) for head in heads]
        keep = (torch.stack(drawn) >= dropout_p) / (1 - dropout_p) if drawn else torch.ones_like(scores)
        yield Sequence(slice(q0, q1), slice(k0, k1), qs, ks, vs, weights, keep.double(), lse, scores, slope)


def _alibi(semantics: Semantics, distance: Tensor, offset: int) -> Tensor:
    """flash-attn 2's ``mask.h``: under a causal mask the column alone, which changes the log-sum-exp of a row and not its softmax."""
    if semantics.causal and semantics.window is None:
        return (distance + torch.arange(distance.shape[0])[:, None]).double()
    return -(distance - offset).abs().double()


def gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, parts: Iterator[Sequence]) -> tuple[Tensor, Tensor, Tensor]:
    """By hand, because autograd does not record inside a kernel. Rows that belong to no sequence are never written."""
    dq, dk, dv = (torch.full_like(x, float("nan"), memory_format=torch.contiguous_format) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    for s in parts:
        g = grad[s.rows_q].double().transpose(0, 1)
        d_weights = (g @ s.v.transpose(1, 2)) * s.keep
        d_scores = s.weights * (d_weights - (g * s.out).sum(-1, keepdim=True)) * s.slope * scale
        dq[s.rows_q] = (d_scores @ s.k).transpose(0, 1).to(q.dtype)
        for total, part in ((dk, d_scores.transpose(1, 2) @ s.q), (dv, (s.weights * s.keep).transpose(1, 2) @ g)):
            total[s.rows_k] = part.unflatten(0, (-1, group)).sum(1).transpose(0, 1).to(k.dtype)
    return dq, dk, dv


# -------------------------------------------------------------------- flash


GRID = 65_535  # what CUDA counts to in the second and third place of a grid


def flash_semantics(is_causal: bool, left: int | None, right: int | None, most_left: int, most_right: int) -> Semantics:
    """What kernels make of a window: a side of at least ``most`` is unlimited, and an unlimited side beside a limited one is ``most``.

    Both are ``max_seqlen_k`` in flash-attn 2 and torch (``mha_varlen_fwd`` and ``set_params_fprop`` of ``flash_api.cpp``). In flash-attn 3
    they are ``max_seqlen_k - 1`` and ``max_seqlen_q - 1``.
    """
    left, right = (-1 if side is None or side >= most else side for side, most in ((left, most_left), (right, most_right)))
    right = 0 if is_causal else right
    if left < 0 and right == 0:
        return Semantics(causal="bottom_right")
    if left < 0 and right < 0:
        return Semantics()
    return Semantics(window=(most_left if left < 0 else left, most_right if right < 0 else right))


def check_loads(*tensors: Tensor) -> None:
    """Loads of 16 bytes: anything else is an illegal access, which ends the process."""
    for x in tensors:
        unit = 16 // x.element_size()
        assert x.stride(-1) == 1, "contiguous last dimension"
        assert x.data_ptr() % 16 == 0, "misaligned address"
        assert all(stride % unit == 0 for stride in x.stride()[:-1]), "misaligned rows"


def _check_flash(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    assert q.dtype in (torch.float16, torch.bfloat16), "flash attention takes half precision only"
    assert q.shape[2] == k.shape[2] == v.shape[2] <= 256, "one head dimension"
    assert q.shape[2] % 8 == 0, "head dimensions are not padded by the kernel"
    assert cu_q.dtype == cu_k.dtype == torch.int32
    check_loads(q, k, v)
    assert 1 < len(cu_q) <= GRID + 1, "batch size must be positive, and no grid counts further"
    assert not (max_q == 1 and q.shape[1] > k.shape[1]), "the decoding shortcut wants one query in every sequence"
    assert max_q >= int(cu_q.diff().max())
    assert max_k >= int(cu_k.diff().max())


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool,
    return_debug_mask: bool, *, scale: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None,
    **unused: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert all(x is None for x in unused.values())
    _check_flash(q, k, v, cu_q, cu_k, max_q, max_k)
    semantics = flash_semantics(is_causal, window_size_left, window_size_right, max_k, max_k)
    seed = int(torch.randint(2**30, ())) if dropout_p else 0
    out = torch.full_like(q, float("nan"), memory_format=torch.contiguous_format)
    lse = torch.full((q.shape[1], q.shape[0]), float("nan"))
    assert scale is not None
    for s in sequences(q, k, v, cu_q, cu_k, scale, semantics, dropout_p, seed):
        out[s.rows_q] = s.out.transpose(0, 1).to(q.dtype)
        lse[:, s.rows_q] = s.lse.float().masked_fill(s.lse.isneginf(), float("inf"))
    return out, lse, torch.tensor([seed, 0]).to(torch.uint64), torch.zeros((), dtype=torch.uint64), q.new_empty(0)


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, rng_state: Tensor, unused: Tensor, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check_flash(q, k, v, cu_q, cu_k, max_q, max_k)
    assert grad.is_contiguous(), "a broadcast gradient is read by its strides"
    assert scale is not None
    semantics = flash_semantics(is_causal, window_size_left, window_size_right, max_k, max_k)
    seed = int(rng_state.to(torch.int64)[0])
    return gradients(grad, q, k, v, scale, sequences(q, k, v, cu_q, cu_k, scale, semantics, dropout_p, seed))


# -------------------------------------------------------------------- flash-attn 3 and 4


def _check_hopper(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float | None) -> None:
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16), "half precision only"
    assert q.shape[2] == k.shape[2] == v.shape[2] <= 256, "one head dimension, as far as these tests go"
    assert q.shape[2] % 8 == 0
    assert q.shape[2] > 0, "head dimensions are not padded by the kernel"
    check_loads(q, k, v)
    assert all(0 not in x.stride() for x in (q, k, v)), "wrong on heads with a stride of 0"
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q.shape == cu_k.shape
    assert 1 < len(cu_q) <= GRID + 1
    assert min(q.shape[0], k.shape[0]) > 0, "early betas of flash-attn 4 have no rule for a backward of nothing"
    assert type(max_q) is type(max_k) is int
    assert max_q >= int(cu_q.diff().max())
    assert max_k >= int(cu_k.diff().max())
    assert scale is not None


def _tail_trap(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, *results: tuple[Tensor, Tensor]) -> None:
    """Rows beyond the last offset: the last sequence's last rows come out wrong, without an error (sgl-flash-attn#47)."""
    if int(cu_q[-1]) < q.shape[0] or int(cu_k[-1]) < k.shape[0]:
        for result, cu in results:
            result[max(0, int(cu[-1]) - 2) : int(cu[-1])] = 7.0


def hopper_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, semantics: Semantics
) -> tuple[Tensor, Tensor]:
    """What both libraries' forwards do here; the log-sum-exp of rows without keys is -inf, and rows of no sequence are not written."""
    _check_hopper(q, k, v, cu_q, cu_k, max_q, max_k, scale)
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    lse = torch.full((q.shape[1], q.shape[0]), float("nan"))
    for s in sequences(q, k, v, cu_q, cu_k, scale, semantics, 0.0, 0):
        out[s.rows_q] = s.out.transpose(0, 1).to(q.dtype)
        lse[:, s.rows_q] = s.lse.float()
    _tail_trap(q, k, cu_q, cu_k, (out, cu_q))
    return out, lse


def hopper_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    scale: float, semantics: Semantics,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the kernels do: the weights from the log-sum-exp that is passed, and what they are subtracted from the output that is passed."""
    _check_hopper(q, k, v, cu_q, cu_k, max_q, max_k, scale)
    assert grad.is_contiguous(), "strides are multiplied in 32 bits"
    assert grad.dtype == out.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert lse.shape == (q.shape[1], q.shape[0])
    dq, dk, dv = (torch.full(x.shape, float("nan"), dtype=x.dtype) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    for s in sequences(q, k, v, cu_q, cu_k, scale, semantics, 0.0, 0):
        passed = lse[:, s.rows_q, None].double()
        weights = (s.scores - passed.masked_fill(passed.isneginf(), 0.0)).exp()
        g, o = (x[s.rows_q].double().transpose(0, 1) for x in (grad, out))
        d_scores = weights * (g @ s.v.transpose(1, 2) - (g * o).sum(-1, keepdim=True)) * s.slope * scale
        dq[s.rows_q] = (d_scores @ s.k).transpose(0, 1).to(q.dtype)
        for total, part in ((dk, d_scores.transpose(1, 2) @ s.q), (dv, weights.transpose(1, 2) @ g)):
            total[s.rows_k] = part.unflatten(0, (-1, group)).sum(1).transpose(0, 1).to(k.dtype)
    _tail_trap(q, k, cu_q, cu_k, (dq, cu_q), (dk, cu_k), (dv, cu_k))
    return dq, dk, dv


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages whose import does as told: all modules below the names given."""

    def __init__(self, execute: Callable[[types.ModuleType], None], *roots: str) -> None:
        self.execute, self.roots = execute, roots

    def find_spec(self, name: str, path: Strings[str] | None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.roots:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        self.execute(module)


# -------------------------------------------------------------------- memory-efficient

_MASK_TYPES = (False, "top_left", "bottom_right")


def _check_efficient(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, mask_type: int) -> None:
    assert q.shape[0] == k.shape[0] == v.shape[0] == 1
    assert q.shape[2] == k.shape[2] == v.shape[2], "no grouped heads"
    assert all(x.shape[3] % (8 if q.dtype != torch.float32 else 4) == 0 for x in (q, k, v)), "else the slow kernel runs"
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert int(cu_q.diff().min()) > 0, "an empty sequence"
    assert int(cu_k.diff().min()) > 0, "an empty sequence"
    assert len(cu_q) <= GRID + 1, "no grid counts further"
    check_loads(q, k, v)
    if mask_type == 2:
        assert bool((cu_q.diff() <= cu_k.diff()).all()), "bottom-right with more queries than keys masks nothing"


def efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: None, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout_p: float, mask_type: int,
    compute_lse: bool = False, *, scale: float | None = None, seqlen_k: None = None, window_size: None = None,
) -> tuple[Any, ...]:  # fmt: skip
    _check_efficient(q, k, v, cu_q, cu_k, mask_type)
    assert compute_lse
    assert scale is not None
    semantics = Semantics(causal=_MASK_TYPES[mask_type])  # type: ignore[arg-type]
    seed = int(torch.randint(2**30, ())) if dropout_p else 0
    out = torch.full((*q.shape[:3], v.shape[3]), float("nan"), dtype=q.dtype)
    lse = torch.full((len(cu_q) - 1, q.shape[2], -(-max_q // 32) * 32), float("inf"))
    # With offsets the forward takes the number of keys for 0 (attention.cu), so that all heads and sequences drop alike.
    for i, s in enumerate(sequences(q[0], k[0], v[0], cu_q, cu_k, scale, semantics, dropout_p, seed, num_keys=0)):
        out[0, s.rows_q] = s.out.transpose(0, 1).to(q.dtype)
        lse[i, :, : s.lse.shape[1]] = s.lse.float()
    return out, lse, torch.tensor(seed), torch.tensor(0), max_q, max_k


def efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: None, out: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    lse: Tensor, dropout_p: float, seed: Tensor, offset: Tensor, mask_type: int, bias_requires_grad: bool, *, scale: float | None = None,
    num_splits_key: None = None, window_size: None = None, shared_storage_dqdkdv: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check_efficient(q, k, v, cu_q, cu_k, mask_type)
    assert grad.is_contiguous()
    assert scale is not None
    semantics = Semantics(causal=_MASK_TYPES[mask_type])  # type: ignore[arg-type]
    parts = sequences(q[0], k[0], v[0], cu_q, cu_k, scale, semantics, dropout_p, int(seed), num_keys=max_q * max_k)
    return (*(x[None] for x in gradients(grad[0], q[0], k[0], v[0], scale, parts)), torch.empty(()))


@contextmanager
def on_cpu(**kernels: Callable[..., Any]) -> Iterator[None]:
    """CPU kernels for aten ops that have none, by name."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    try:
        for name, kernel in kernels.items():
            library.impl(name, kernel)
        yield
    finally:
        library._destroy()


def for_cpu(backend: type[Backend], **changed: Any) -> Backend:
    """The backend with nothing refused because of the machine, so that it can be ordered for CPU tensors; capabilities may change."""

    class Here(backend):  # type: ignore[misc,valid-type]
        capabilities = replace(backend.capabilities, devices=frozenset({"cpu"}), min_capability=None, **changed)

        def missing(self, problem: Problem) -> None:
            return None

    here: Backend = Here()
    return here


# -------------------------------------------------------------------- the ops of flash-attn 3

FA3_FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, Tensor(out!)? out=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
    "int? max_seqlen_q=None, int? max_seqlen_k=None, Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, "
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, "
    "bool? pack_gqa=None, int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
FA3_BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, "
    "Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
    "int? max_seqlen_q=None, int? max_seqlen_k=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, float softcap=0.0, bool deterministic=False, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class FA3Ops:
    """``torch.ops.{namespace}.fwd`` and ``bwd`` for CPU tensors, by the schema of some build, with what it was ``compiled_without``."""

    def __init__(self, namespace: str, forward: str, backward: str | None, compiled_without: Strings[str]) -> None:
        self.calls: list[dict[str, Any]] = []
        self.without = compiled_without
        self.library = torch.library.Library(namespace, "FRAGMENT")
        for schema, kernel in ((forward, self._forward), (backward, self._backward)):
            if schema is not None:
                self.library.define(schema)
                names = [argument.name for argument in torch._C.parse_schema(f"{namespace}::{schema}").arguments]
                count = schema.split("->")[1].count("Tensor")
                self.library.impl(schema.partition("(")[0], self._bound(kernel, names, count), "CPU")

    def _bound(self, kernel: Callable[..., tuple[Tensor, ...]], names: list[str], count: int) -> Callable[..., tuple[Tensor, ...]]:
        def run(*args: Any) -> tuple[Tensor, ...]:
            given = dict(zip(names, args, strict=False))  # the dispatcher leaves trailing defaults out
            self.calls.append({k: v for k, v in given.items() if not isinstance(v, Tensor)})
            results = kernel(**{k: v for k, v in given.items() if v is not None})
            return (*results, *(torch.empty(0) for _ in range(count - len(results))))

        return run

    def _checked(self, softcap: float, left: int, right: int, causal: bool, max_q: int, max_k: int) -> Semantics:
        semantics = flash_semantics(causal, left, right, max_k - 1, max_q - 1)
        assert "softcap" not in self.without or softcap == 0.0, "This flash attention build does not support tanh softcapping."
        assert "window" not in self.without or semantics.window is None, "This flash attention build does not support local attention."
        return replace(semantics, softcap=softcap or None)

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
        softmax_scale: float, is_causal: bool = False, window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
        attention_chunk: int = 0, num_splits: int = 0, **unused: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert not any(unused.values()), unused
        semantics = self._checked(softcap, window_size_left, window_size_right, is_causal, max_seqlen_q, max_seqlen_k)
        return hopper_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, semantics)

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
        cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, is_causal: bool = False,
        window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False, **unused: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert "backward" not in self.without, "This flash attention build does not support backward."
        assert not any(unused.values()), unused
        semantics = self._checked(softcap, window_size_left, window_size_right, is_causal, max_seqlen_q, max_seqlen_k)
        grads = hopper_backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, semantics
        )
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            assert target.is_contiguous()
            target.copy_(grad)
        return (torch.empty(0),)


@contextmanager
def fa3_ops(
    namespace: str = "flash_attn_3",
    forward: str = FA3_FORWARD,
    backward: str | None = FA3_BACKWARD,
    compiled_without: Strings[str] = (),
) -> Iterator[FA3Ops]:
    ops = FA3Ops(namespace, forward, backward, compiled_without)
    try:
        yield ops
    finally:
        ops.library._destroy()
