"""The Triton kernel of `benchmarks.fused_rows` in the interpreter: the same bits as `SeqLayout.pack` and `unpack`, and their gradients.

Needs a process of its own with TRITON_INTERPRET=1 set before anything is imported (``make test`` does it).
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from varlen_attn import SeqLayout
from varlen_attn.testing import poison

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")
pytest.importorskip("benchmarks", reason="needs the benchmarks of the repository")

from benchmarks import bench_layout
from benchmarks.fused_rows import move, rows_of, why_not

MASKS = {
    "right": torch.tensor([[False, False, False, True], [False, True, True, True], [False] * 4]),
    "holes, an empty row": torch.tensor([[True, False, True, False], [True] * 4, [False, False, True, True]]),
    "no padding": torch.zeros(2, 3, dtype=torch.bool),
    "no token": torch.ones(2, 3, dtype=torch.bool),
    "no row": torch.zeros(0, 3, dtype=torch.bool),
}
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
slacks = pytest.mark.parametrize("slack", [None, 3], ids=["exact", "slack"])


def of_mask(mask: Tensor, slack: int | None) -> SeqLayout:
    capacity = None if slack is None else int((~mask).sum()) + slack
    return SeqLayout.from_key_padding_mask(mask, capacity=capacity, validate=False)


def anything(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random bits, NaNs of every payload among them."""
    size = torch.empty((), dtype=dtype).element_size()
    count = int(torch.Size(shape).numel()) * size
    some = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return some.view(dtype).view(shape)


def bits(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float32, torch.complex128], ids=str)
@each_mask
@slacks
def test_every_bit_of_every_dtype(dtype: torch.dtype, mask: Tensor, slack: int | None) -> None:
    layout = of_mask(mask, slack)
    forth, back = rows_of(layout)
    for width in (1, 5, 8):
        x, rows = anything(*mask.shape, width, dtype=dtype), anything(layout.num_rows, width, dtype=dtype)
        (packed,) = move(forth, back, [x.flatten(0, 1)])
        assert torch.equal(bits(packed), bits(layout.pack(x)))
        for pad_value in (0, 1) if dtype != torch.complex128 else (0,):
            (padded,) = move(back, forth, [rows], pad_value)
            assert torch.equal(bits(padded), bits(layout.unpack(rows, pad_value)))


def test_padding_that_is_not_one_word_is_refused() -> None:
    forth, back = rows_of(of_mask(MASKS["right"], None))
    with pytest.raises(ValueError, match="`pad_value` must repeat in every 8 bytes"):
        move(back, forth, [torch.zeros(8, 1, dtype=torch.complex128)], 1.0)


@pytest.mark.parametrize("width", [6, 16, 700])
def test_views_of_other_widths_and_dtypes_in_one_launch(width: int) -> None:
    """q, k and v of a fused projection, columns of a wider tensor, and numbers that lie apart; more columns than a block has."""
    mask = MASKS["right"]
    layout = of_mask(mask, 2)
    forth, back = rows_of(layout)
    qkv = torch.randn(*mask.shape, 3, 2, width // 2)
    wide = torch.randn(*mask.shape, 2 * width + 3)
    apart = torch.randn(4, 3, 6).transpose(0, 1), torch.randn(3, 4, 1).expand(3, 4, 6), torch.ones(3, 4, dtype=torch.bool)
    for views in (qkv.unbind(2), (wide[..., :width], wide[..., 1 : width + 1].bfloat16(), wide[..., 1:2]), apart, (wide,)):
        packed = move(forth, back, [x.flatten(0, 1) for x in views])
        for x, y in zip(views, packed, strict=True):
            assert torch.equal(y, layout.pack(x))


def test_more_rows_than_a_block_has() -> None:
    mask = torch.rand(3, 200, generator=torch.Generator().manual_seed(0)) < 0.4
    layout, x = of_mask(mask, 2), torch.randn(3, 200, 3)
    forth, back = rows_of(layout)
    (packed,) = move(forth, back, [x.flatten(0, 1)])
    assert torch.equal(packed, layout.pack(x))
    assert torch.equal(move(back, forth, [packed])[0].view(x.shape), x.masked_fill(mask[..., None], 0))


@each_mask
@slacks
def test_gradients_are_those_of_pack_and_unpack_and_no_nan_leaks(mask: Tensor, slack: int | None) -> None:
    layout, real = of_mask(mask, slack), int((~mask).sum())
    forth, back = rows_of(layout)
    xs = [poison(torch.randn(*mask.shape, 2, 4), mask).requires_grad_(i < 2) for i in range(3)]
    weights = [torch.randn(layout.num_rows, 2, 4) for _ in xs]
    for w in weights:
        w[real:] = float("nan")
    got = move(forth, back, [x.flatten(0, 1) for x in xs])
    want = [layout.pack(x) for x in xs]
    assert [x.requires_grad for x in got] == [True, True, False]
    for x, y in zip(*(torch.autograd.grad(packed[:2], xs[:2], weights[:2]) for packed in (got, want)), strict=True):
        assert torch.equal(x, y)

    rows = torch.randn(layout.num_rows, 3)
    rows[real:] = float("nan")
    rows.requires_grad_()
    upstream = poison(torch.randn(*mask.shape, 3), mask)
    (padded,) = move(back, forth, [rows])
    assert torch.equal(padded.view(upstream.shape), layout.unpack(rows))
    (grad,) = torch.autograd.grad(padded, rows, upstream.flatten(0, 1))
    assert torch.equal(grad, torch.autograd.grad(layout.unpack(rows), rows, upstream)[0])


@pytest.mark.parametrize("slack", [None, 1], ids=["exact", "slack"])
def test_derivatives(slack: int | None) -> None:
    mask = torch.tensor([[True, False, False], [True, True, True], [False, True, True]])
    layout = of_mask(mask, slack)
    forth, back = rows_of(layout)
    xs = [torch.randn(mask.numel(), width, dtype=torch.float64, requires_grad=True) for width in (2, 1)]
    ys = [torch.randn(layout.num_rows, width, dtype=torch.float64, requires_grad=True) for width in (2, 1)]
    assert gradcheck(lambda *xs: move(forth, back, xs), xs)
    assert gradcheck(lambda *ys: move(back, forth, ys, -1.5), ys)


def test_the_benchmark_has_it_as_a_contestant() -> None:
    assert why_not() is None
    mask = MASKS["right"]
    found = bench_layout.contests(mask, torch.randn(3, 4, 4) * ~mask[..., None], gpu=True)
    for what in (bench_layout.PACK, bench_layout.UNPACK, bench_layout.PACK_QKV):
        assert any(name.startswith("Triton") for name in found[what])
        bench_layout.verify(found[what])
