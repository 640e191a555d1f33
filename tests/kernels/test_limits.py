"""More sequences than a kernel's grid can count, more elements than 32 bits: in parts, with the results of one call (R-22)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from varlen_attn import ArgumentError, SeqLayout, varlen_attention
from varlen_attn.kernels.base import Backend
from varlen_attn.kernels.cuda import torch_varlen
from varlen_attn.kernels.cuda.flash2 import Flash2
from varlen_attn.kernels.cuda.flash3 import Flash3
from varlen_attn.kernels.cuda.flash4 import Flash4
from varlen_attn.kernels.cuda.mem_efficient import MemEfficient
from varlen_attn.kernels.cuda.nested import Nested
from varlen_attn.kernels.cuda.torch_varlen import TorchVarlen
from varlen_attn.kernels.limits import MAX_SEQUENCES

from . import fake_kernels
from .fake_kernels import flash_backward, flash_forward, for_cpu, on_cpu

KERNELS = {
    "_flash_attention_forward": "flash_forward",
    "_flash_attention_backward": "flash_backward",
    "_efficient_attention_forward": "efficient_forward",
    "_efficient_attention_backward": "efficient_backward",
}
LENGTHS_Q, LENGTHS_K = [3, 1, 4, 2, 5, 1, 2], [2, 6, 1, 3, 5, 1, 4]


@pytest.fixture
def launched() -> Iterator[list[int]]:
    """How many sequences each forward was started with."""
    seen: list[int] = []

    def watched(kernel: Any, where: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(len(args[where]) - 1)
            return kernel(*args, **kwargs)

        return call

    kernels = {op: getattr(fake_kernels, name) for op, name in KERNELS.items()}
    kernels["_flash_attention_forward"] = watched(fake_kernels.flash_forward, 3)
    kernels["_efficient_attention_forward"] = watched(fake_kernels.efficient_forward, 4)
    with on_cpu(**kernels):
        yield seen


def results(backend: Backend, layouts: tuple[SeqLayout, SeqLayout], options: dict[str, Any]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [x.num_rows for x in (layouts[0], layouts[1], layouts[1])]
    q, k, v = (torch.randn(t, 2, 8, generator=generator).half().requires_grad_() for t in rows)
    out, lse = varlen_attention(q, k, v, *layouts, backend=backend, return_lse=True, **options)
    cotangent = torch.randn(out.shape, generator=generator).half()
    return [out, lse, *torch.autograd.grad(out, (q, k, v), cotangent)]


@pytest.mark.parametrize("backend", [TorchVarlen, MemEfficient])
@pytest.mark.parametrize("most", [1, 3, 6])
@pytest.mark.parametrize("cross", [False, True])
def test_parts_are_one_call(backend: type[Backend], most: int, cross: bool, launched: list[int]) -> None:
    """R-22: rows are cut where the host knows a part to begin; causal too."""
    own = SeqLayout.from_lengths(LENGTHS_Q)
    layouts = (own, SeqLayout.from_lengths(LENGTHS_K) if cross else own)
    options = {} if cross else {"causal": True}
    want = results(for_cpu(backend), layouts, options)
    assert launched == [7]
    got = results(for_cpu(backend, max_sequences=most), layouts, options)
    assert launched[1:] == [min(most, 7 - start) for start in range(0, 7, most)]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("most", [1, 3, 6])
def test_parts_where_only_the_device_knows_them(most: int, cross: bool, launched: list[int]) -> None:
    """R-22, R-40: offsets are cut and rows are not; rows of other parts and slack rows, which a kernel leaves unwritten, stay 0."""

    def with_slack(lengths: list[int]) -> SeqLayout:
        return SeqLayout.from_key_padding_mask(torch.arange(6) >= torch.tensor(lengths)[:, None], capacity=sum(lengths) + 3)

    own = with_slack(LENGTHS_Q)
    layouts = (own, with_slack(LENGTHS_K) if cross else own)
    want = results(for_cpu(TorchVarlen), layouts, {})
    got = results(for_cpu(TorchVarlen, max_sequences=most), layouts, {})
    assert launched[1:] == [min(most, 7 - start) for start in range(0, 7, most)]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
        assert not a.isnan().any()


@pytest.mark.parametrize(("heads", "most", "parts"), [((4, 4), 3, [3, 1]), ((6, 2), 4, [3, 3]), ((8, 2), 3, [2] * 4), ((2, 2), 2, [2])])
def test_gradients_that_a_kernel_cannot_count_run_by_heads(
    heads: tuple[int, int], most: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-22: grouped heads stay with the key head that they share. A forward alone is one call."""
    launched: list[int] = []
    flash = torch_varlen._flash

    def watched(query: Tensor, key: Tensor, *rest: Any) -> Any:
        launched.append(query.shape[1])
        assert query.shape[1] % key.shape[1] == 0
        return flash(query, key, *rest)

    monkeypatch.setattr(torch_varlen, "_flash", watched)
    layout = SeqLayout.from_lengths(LENGTHS_Q)
    qkv = [torch.randn(layout.num_rows, n, 8).half().requires_grad_() for n in (heads[0], heads[1], heads[1])]
    of_one = (layout.num_rows + 128 * layout.num_seqs) * 32
    with on_cpu(_flash_attention_forward=flash_forward, _flash_attention_backward=flash_backward):
        all_at_once, limited = (
            varlen_attention(*qkv, layout, causal=True, return_lse=True, backend=for_cpu(TorchVarlen, max_gradient=limit))
            for limit in (None, of_one * most)
        )
        assert launched == [heads[0], *parts]
        cotangent = torch.randn_like(all_at_once[0])
        for a, b in zip(*([*x, *torch.autograd.grad(x[0], qkv, cotangent)] for x in (all_at_once, limited)), strict=True):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)  # gradients of a key head may be sums of parts
        with torch.no_grad():
            varlen_attention(*qkv, layout, backend=for_cpu(TorchVarlen, max_gradient=of_one))
        assert launched[len(parts) + 1 :] == [heads[0]]
        with pytest.raises(ArgumentError, match="elements a head"):
            varlen_attention(*qkv, layout, backend=for_cpu(TorchVarlen, max_gradient=of_one - 1))


def test_nested_tensors_run_in_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """R-22: torch passes them to the same kernels."""
    layout, started, attention = SeqLayout.from_lengths(LENGTHS_Q), [], F.scaled_dot_product_attention
    q, k, v = torch.randn(3, layout.num_rows, 2, 8)
    want = varlen_attention(q, k, v, layout, backend="nested")

    def watched(q: Tensor, *rest: Any, **options: Any) -> Tensor:
        started.append(q.shape[0])
        return attention(q, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    torch.testing.assert_close(varlen_attention(q, k, v, layout, backend=for_cpu(Nested, max_sequences=3)), want)
    assert started == [3, 3, 1]
    assert all(for_cpu(backend).capabilities.max_sequences == MAX_SEQUENCES < 65_536 for backend in (Nested, Flash2, Flash3, Flash4))


@pytest.mark.gpu
def test_more_sequences_than_a_grid_counts() -> None:
    lengths = [1, 2] * 35_000
    layout = SeqLayout.from_lengths(lengths, device="cuda")
    for dtype, backend in ((torch.float16, "torch_varlen"), (torch.float32, "mem_efficient")):
        q, k, v = (torch.randn(layout.num_rows, 1, 8, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
        out = varlen_attention(q, k, v, layout, backend=backend)
        out.sum().backward()
        lone = torch.tensor(lengths, device="cuda").repeat_interleave(torch.tensor(lengths, device="cuda")) == 1
        torch.testing.assert_close(out[lone], v[lone])  # a single token sees itself
        assert all(bool(x.grad.isfinite().all()) for x in (q, k, v))
