"""Dropout by its statistics, because no two kernels draw the same mask: unbiased, of the right variance, the same mask in the backward."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from varlen_attn import SeqLayout

from .cases import attend, here, leaves_of
from .findings import Findings, Setting, Tally

__all__ = ["run"]

P, SEEDS = 0.2, 64
Tensors = tuple[Tensor, Tensor, Tensor]


def run(setting: Setting, findings: Findings) -> None:
    dtype = setting.dtype
    lengths = (24, 0, 40, 1) if setting.small else (96, 0, 200, 1)
    for name in ("auto", *here(setting.device, omit=("reference",) if setting.small else ())):
        tally = Tally(name)
        for capacity in (False, True):
            layout = _layout(lengths, setting.device, capacity)
            tally.attempt(f"capacity {capacity}", partial(statistics, name, layout, dtype, SEEDS))
        if tally.ran or tally.failures:  # a backend without dropout refuses, and there is nothing to say of it
            tally.write(findings)


def _layout(lengths: tuple[int, ...], device: str, capacity: bool) -> SeqLayout:
    layout = SeqLayout.from_lengths(lengths, device=device)
    if not capacity:
        return layout
    return SeqLayout.from_key_padding_mask(layout.padding_mask(), capacity=layout.num_rows + 5, validate=False)


def statistics(backend: str, layout: SeqLayout, dtype: torch.dtype, seeds: int) -> None:
    """Raise AssertionError for a dropout that is not one."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(layout.num_rows, 2, 32, generator=generator).to(layout.device, dtype) for _ in range(3))
    real = layout.valid_rows()

    def drawn(q: Tensor, seed: int, p: float = P) -> Tensor:
        torch.manual_seed(seed)
        return attend((q, k, v), layout, backend, dropout_p=p)[real].double()

    assert torch.equal(drawn(q, 1), drawn(q, 1)), "one seed gives two results"
    assert not torch.equal(drawn(q, 1), drawn(q, 2)), "two seeds give one result"
    _is_unbiased(torch.stack([drawn(q, seed) for seed in range(seeds)]), drawn(q, 0, p=0.0))
    # Without scores every weight is 1/L, and the variance of what is left after dropout is known.
    uniform = torch.stack([drawn(torch.zeros_like(q), seed) for seed in range(seeds)])
    _has_variance(uniform, _expected_variance(v, layout)[real])
    _backward_has_the_same_mask((q, k, v), layout, backend)


def _is_unbiased(samples: Tensor, without: Tensor) -> None:
    """The mean over seeds is the result without dropout: its error, in units of its own standard error, has mean square 1."""
    error = samples.std(0) / len(samples) ** 0.5
    drawn = error > 1e-6  # a query that sees one key has two results, and few samples of the rarer one
    score = float((((samples.mean(0) - without) / error)[drawn] ** 2).mean())
    assert 0.4 < score < 2.0, f"the mean over {len(samples)} seeds is {score:.2f} squared standard errors off the result without dropout"


def _expected_variance(v: Tensor, layout: SeqLayout) -> Tensor:
    """``p / (1-p) * sum(v^2) / L^2`` for each query of a sequence, ``(T, N, H)``."""
    squares = layout.pool(v.double() ** 2, "sum")
    lengths = layout.cu_seqlens.diff().clamp(min=1)[:, None, None]
    of_sequence = P / (1 - P) * squares / lengths.double() ** 2
    return of_sequence[layout.seq_ids.clamp(max=layout.num_seqs - 1)]


def _has_variance(samples: Tensor, expected: Tensor) -> None:
    share = float(samples.var(0).sum() / expected.sum())
    assert 0.85 < share < 1.15, f"the variance is {share:.2f} of that of dropout with p = {P}"


def _backward_has_the_same_mask(qkv: Tensors, layout: SeqLayout, backend: str) -> None:
    """The output is linear in v, so ``<dV, V> = <g, out>``, for ``g = out`` the square of its norm; with another mask it is less."""
    leaves = leaves_of(qkv)
    torch.manual_seed(3)
    out = attend(leaves, layout, backend, dropout_p=P)
    grads = torch.autograd.grad(out, leaves, out.detach())
    assert all(bool(g.isfinite().all()) for g in grads), "a gradient is not finite"
    share = float((grads[2].double() * qkv[2].double()).sum() / (out.detach().double() ** 2).sum())
    assert abs(share - 1) < 0.03, f"the backward drops other weights than the forward: <dV, V> is {share:.3f} of <out, out>"
