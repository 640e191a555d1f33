"""Attention on padded tensors: its kernels agree, and what a GPU's memory-efficient kernel is given, shown by a stand-in for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from varlen_attn import SeqLayout, varlen_attention
from varlen_attn.kernels import dense as _dense
from varlen_attn.kernels.cuda.mem_efficient import MemEfficient
from varlen_attn.kernels.dense import EAGER, EFFICIENT, FLASH_CPU, FUSED, attend_dense
from varlen_attn.kernels.problem import Semantics

from .fake_kernels import efficient_forward, for_cpu, on_cpu


@pytest.mark.parametrize("columns", [6, 0])
@pytest.mark.parametrize(("kernel", "biased"), [*product((EAGER, FLASH_CPU, EFFICIENT), (False, True)), (FUSED, False)])
def test_the_kernels_agree(kernel: str, biased: bool, columns: int) -> None:
    """Against sums of exponentials: queries that see nothing, by either mask or both, give 0 with gradient 0."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, generator=generator) for n in (5, columns, columns))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    visible = torch.rand(2, 1, 5, columns, generator=generator) < 0.5
    visible[0, :, 2] = False
    bias = torch.randn(1, 3, 5, columns, dtype=torch.float64, generator=generator) if biased else None
    seen = visible.expand(2, 3, 5, columns)
    if bias is not None:
        bias[:, 1, 3] = -torch.inf
        bias[:, :, 4, :1] = -torch.inf
        seen = seen & ~bias.isneginf()
    semantics = Semantics(scale=0.4, return_lse=True)
    with padded_kernel(2**62):
        out, lse, weights = attend_dense(q, k, v, semantics, visible=visible, bias=bias, kernel=kernel)
        grads = torch.autograd.grad(out.sin().sum(), leaves)
    scores = 0.4 * q @ k.transpose(-1, -2) + (0 if bias is None else bias.masked_fill(~seen, 0))
    terms = scores.exp() * seen
    total = terms.sum(-1, keepdim=True)
    by_sums = terms / torch.where(total == 0, 1, total)
    want = by_sums @ v
    torch.testing.assert_close(out, want)
    for got, expected in zip(grads, torch.autograd.grad(want.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(got, expected)
    assert not out[0, :, 2].any()
    if lse is not None and kernel != EFFICIENT:  # whose stand-in gives zeros
        torch.testing.assert_close(lse, total.squeeze(-1).log())
    if kernel == EFFICIENT and columns:
        assert lse is not None
        assert torch.equal(lse.isneginf(), ~seen.any(-1))
    assert (weights is not None) == (kernel == EAGER or (not columns and kernel != FUSED))
    if weights is not None:
        torch.testing.assert_close(weights, by_sums)


def test_a_mask_of_padding_is_not_written_out() -> None:
    seen: list[Tensor] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, compute_lse: bool, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        seen.append(mask)
        weights = (q @ k.transpose(-1, -2) * kwargs["scale"] + mask).softmax(-1)
        return weights @ v, torch.zeros(q.shape[:3]), torch.zeros(()), torch.zeros(())

    q, k, v = (torch.randn(3, 4, 7, 8) for _ in range(3))
    visible = torch.arange(7) < torch.tensor([7, 3, 0])[:, None, None, None]
    with on_cpu(_scaled_dot_product_efficient_attention=kernel):
        out, lse, _ = attend_dense(q, k, v, Semantics(scale=0.5), visible=visible, kernel=EFFICIENT)
    (mask,) = seen
    assert mask.shape == (3, 4, 7, 7)
    assert mask.stride() == (16, 0, 0, 1), "one row a sequence, whatever the heads and queries, and rows of 16"
    assert bool((mask[2] == 0).all()), "a row that sees nothing is not left to the kernel"
    assert not out[2].any()
    assert bool(lse[2].isneginf().all())
    exact = (q[1] @ k[1, :, :3].transpose(-1, -2) * 0.5).softmax(-1) @ v[1, :, :3]
    torch.testing.assert_close(out[1], exact)


@pytest.mark.parametrize("wraps", [2**32, 50, 20, 5])
def test_dropout_of_the_padded_call_is_one_mask_forward_and_backward(wraps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a kernel that numbers its random numbers in fewer bits in the forward: calls beyond are halved until both agree."""
    torch.manual_seed(0)
    monkeypatch.setattr(_dense, "_MAX_DROPPED", wraps - 1)
    q, k, v = (torch.randn(3, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 4, 4))
    visible = torch.arange(4) < torch.tensor([4, 3, 0])[:, None, None, None]

    def run(p: float) -> Tensor:
        return attend_dense(q, k, v, Semantics(scale=0.5, dropout_p=p), visible=visible, kernel=EFFICIENT)[0]

    with padded_kernel(wraps) as calls:
        out = run(0.5)
        grads = torch.autograd.grad(out, (q, k, v), out.detach())
        torch.testing.assert_close((grads[2] * v).sum(), out.square().sum())  # the output is linear in the values
        assert not torch.equal(out, run(0.5))
        torch.testing.assert_close(torch.stack([run(0.5) for _ in range(400)]).mean(0), run(0.0), atol=0.35, rtol=0)
    assert max(calls) < wraps
    assert not out[2].any()


def test_a_padded_call_in_one_part_would_drop_other_weights() -> None:
    """The same on the kernel as it is, whose numbers wrap: what the test above would find."""
    q, k, v = (torch.randn(3, 2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with padded_kernel(50):
        out = attend_dense(q, k, v, Semantics(scale=0.5, dropout_p=0.5), kernel=EFFICIENT)[0]
        (dv,) = torch.autograd.grad(out, v, out.detach())
    assert float(((dv * v).sum() / out.square().sum() - 1).detach().abs()) > 0.05


@contextmanager
def padded_kernel(wraps: int) -> Iterator[list[int]]:
    """torch's padded memory-efficient kernel with dropout: in the forward, numbers of random numbers wrap. Lists the weights of calls."""
    calls: list[int] = []

    def weights(q: Tensor, k: Tensor, mask: Tensor, scale: float, p: float, seed: Tensor, wraps: int) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(-1, -2) * scale + mask
        draws = torch.rand(scores.numel(), generator=torch.Generator().manual_seed(int(seed)))
        numbers = torch.arange(scores.numel()) % wraps
        return scores.softmax(-1), (draws[numbers] >= p).view(scores.shape) / (1 - p)

    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, lse: bool, p: float = 0.0, causal: bool = False, *, scale: float) -> Any:
        calls.append(mask.numel() if p else 0)
        seed = torch.randint(2**30, ())
        shares, keep = weights(q, k, mask, scale, p, seed, wraps)
        return (shares * keep) @ v, torch.zeros(q.shape[:3]), seed, torch.zeros(())

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, out: Tensor, lse: Tensor, seed: Tensor, offset: Tensor, p: float,
        wanted: list[bool], causal: bool = False, *, scale: float,
    ) -> Any:  # fmt: skip
        shares, keep = weights(q, k, mask, scale, p, seed, 2**62)
        scores = shares * ((grad @ v.transpose(-1, -2)) * keep - (grad * out).sum(-1, keepdim=True)) * scale
        return scores @ k, scores.transpose(-1, -2) @ q, (shares * keep).transpose(-1, -2) @ grad, torch.empty(())

    kernels = {"_scaled_dot_product_efficient_attention": forward, "_scaled_dot_product_efficient_attention_backward": backward}
    with on_cpu(**kernels):
        yield calls


def test_empty_sequences_of_self_attention_move_nothing() -> None:
    """They have no rows: only offsets change for a kernel that mishandles them."""
    here, seen = for_cpu(MemEfficient), []

    class Looking(type(here)):  # type: ignore[misc]
        def run(self, query: Tensor, key: Tensor, value: Tensor, call: Any) -> Any:
            seen.append((query.data_ptr(), key.data_ptr(), value.data_ptr(), call.layout_q.lengths))
            return query.clone(), None

    q, k, v = (torch.randn(7, 2, 8) for _ in range(3))
    out = varlen_attention(q, k, v, SeqLayout.from_lengths([3, 0, 4]), backend=Looking())
    assert seen == [(q.data_ptr(), k.data_ptr(), v.data_ptr(), (3, 4))]
    assert torch.equal(out, q)


@pytest.mark.parametrize(("lengths_q", "lengths_k"), [([3, 0, 4], None), ([5, 0, 4], [2, 3, 0]), ([3, 2, 2, 3, 2], [4, 1, 2, 2, 2])])
def test_layouts_for_a_kernel_are_made_once(lengths_q: list[int], lengths_k: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without empty sequences, without queries that see no key, in parts: they are those of the first layer in every later one."""
    layouts = [SeqLayout.from_lengths(lengths_q), None if lengths_k is None else SeqLayout.from_lengths(lengths_k)]
    q, k, v = (torch.randn(sum(n), 2, 8) for n in (lengths_q, lengths_k or lengths_q, lengths_k or lengths_q))
    here, made, make = for_cpu(MemEfficient, max_sequences=4), [], SeqLayout.from_lengths
    with on_cpu(_efficient_attention_forward=efficient_forward):
        first = varlen_attention(q, k, v, *layouts, causal=True, backend=here)
        monkeypatch.setattr(SeqLayout, "from_lengths", lambda *args, **options: [made.append(args), make(*args, **options)][1])
        assert torch.equal(varlen_attention(q, k, v, *layouts, causal=True, backend=here), first)
    assert made == []
