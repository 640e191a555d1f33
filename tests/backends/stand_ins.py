"""CPU stand-ins for CUDA kernels, with the conventions and the traps that their source shows. Slow, in float64, one sequence at a time.

They make the adapters' arithmetic testable without a GPU: what is passed, what comes back, what is never written. They say nothing
about the kernels themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varlen_attn.backends.base import Backend
from varlen_attn.problem import Problem, Semantics


class Sequence(NamedTuple):
    """One sequence: its rows, and in float64 q, k, v ``(N, L, H)``, softmax weights, dropout factors and log-sum-exp."""

    rows_q: slice
    rows_k: slice
    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor
    keep: Tensor
    lse: Tensor

    @property
    def out(self) -> Tensor:
        return (self.weights * self.keep) @ self.v


def sequences(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, semantics: Semantics, dropout_p: float, seed: int
) -> Iterator[Sequence]:
    """``q (T,N,H)``, ``k, v (Tk,K,H)``."""
    generator = torch.Generator().manual_seed(seed)
    group = q.shape[1] // k.shape[1]
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        qs = q[q0:q1].double().transpose(0, 1)
        ks, vs = (x[k0:k1].double().transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        low, high = semantics.visible_range(k1 - k0 - (q1 - q0))
        distance = torch.arange(k1 - k0) - torch.arange(q1 - q0)[:, None]
        visible = torch.ones_like(distance, dtype=torch.bool)
        visible &= True if low is None else distance >= low
        visible &= True if high is None else distance <= high
        scores = (qs @ ks.transpose(1, 2) * scale).masked_fill(~visible, float("-inf"))
        lse = scores.logsumexp(-1)
        weights = torch.where(lse.isneginf()[..., None], 0, (scores - lse[..., None]).exp())
        keep = (torch.rand(scores.shape, generator=generator) >= dropout_p) / (1 - dropout_p)
        yield Sequence(slice(q0, q1), slice(k0, k1), qs, ks, vs, weights, keep.double(), lse)


def gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, parts: Iterator[Sequence]) -> tuple[Tensor, Tensor, Tensor]:
    """By hand, because autograd does not record inside a kernel. Rows that belong to no sequence are never written."""
    dq, dk, dv = (torch.full_like(x, float("nan"), memory_format=torch.contiguous_format) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    for s in parts:
        g = grad[s.rows_q].double().transpose(0, 1)
        d_weights = (g @ s.v.transpose(1, 2)) * s.keep
        d_scores = s.weights * (d_weights - (g * s.out).sum(-1, keepdim=True)) * scale
        dq[s.rows_q] = (d_scores @ s.k).transpose(0, 1).to(q.dtype)
        for total, part in ((dk, d_scores.transpose(1, 2) @ s.q), (dv, (s.weights * s.keep).transpose(1, 2) @ g)):
            total[s.rows_k] = part.unflatten(0, (-1, group)).sum(1).transpose(0, 1).to(k.dtype)
    return dq, dk, dv


# -------------------------------------------------------------------- flash


def _flash_semantics(is_causal: bool, left: int | None, right: int | None) -> Semantics:
    sides = tuple(None if side is None or side < 0 else side for side in (left, right))
    window = None if sides == (None, None) else sides
    return Semantics(causal="bottom_right" if is_causal else False, window=window)  # type: ignore[arg-type]


def _check_flash(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    assert q.dtype in (torch.float16, torch.bfloat16), "flash attention takes half precision only"
    assert q.shape[2] == k.shape[2] == v.shape[2] <= 256, "one head dimension"
    assert q.shape[2] % 8 == 0, "head dimensions are not padded by the kernel"
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert len(cu_q) > 1, "batch size must be positive"
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
    semantics = _flash_semantics(is_causal, window_size_left, window_size_right)
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
    semantics = _flash_semantics(is_causal, window_size_left, window_size_right)
    seed = int(rng_state.to(torch.int64)[0])
    return gradients(grad, q, k, v, scale, sequences(q, k, v, cu_q, cu_k, scale, semantics, dropout_p, seed))


# -------------------------------------------------------------------- memory-efficient

_MASK_TYPES = (False, "top_left", "bottom_right")


def _check_efficient(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, mask_type: int) -> None:
    assert q.shape[0] == k.shape[0] == v.shape[0] == 1
    assert q.shape[2] == k.shape[2] == v.shape[2], "no grouped heads"
    assert all(x.shape[3] % (8 if q.dtype != torch.float32 else 4) == 0 for x in (q, k, v)), "else the slow kernel runs"
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert int(cu_q.diff().min()) > 0, "an empty sequence"
    assert int(cu_k.diff().min()) > 0, "an empty sequence"
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
    for i, s in enumerate(sequences(q[0], k[0], v[0], cu_q, cu_k, scale, semantics, dropout_p, seed)):
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
    parts = sequences(q[0], k[0], v[0], cu_q, cu_k, scale, semantics, dropout_p, int(seed))
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


def for_cpu(backend: type[Backend]) -> Backend:
    """The backend with nothing refused because of the machine, so that it can be ordered for CPU tensors."""

    class Here(backend):  # type: ignore[misc,valid-type]
        capabilities = replace(backend.capabilities, devices=frozenset({"cpu"}), min_capability=None)

        def missing(self, problem: Problem) -> None:
            return None

    here: Backend = Here()
    return here
