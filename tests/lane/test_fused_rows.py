"""`_fused_rows` in Triton's interpreter: the same bits as `_gather`, for every dtype, width and stride, forward and backward.

Needs a process of its own with TRITON_INTERPRET=1 set before anything is imported (``make test`` does it).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from varlen_attn import SeqLayout, _fused_rows, padded_attention
from varlen_attn._fused_rows import Rows, move, serves
from varlen_attn.testing import poison

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")

from varlen_attn import _fused_rows_kernel

MASKS = {
    "right": torch.tensor([[False, False, False, True], [False, True, True, True], [False] * 4]),
    "holes, an empty row": torch.tensor([[True, False, True, False], [True] * 4, [False, False, True, True]]),
    "left": torch.tensor([[True, False, False, False], [True, True, True, False]]),
    "no padding": torch.zeros(2, 3, dtype=torch.bool),
    "no token": torch.ones(2, 3, dtype=torch.bool),
    "no row": torch.zeros(0, 3, dtype=torch.bool),
    "no column": torch.zeros(3, 0, dtype=torch.bool),
}
DTYPES = (
    torch.bool, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
)  # fmt: skip
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
slacks = pytest.mark.parametrize("slack", [None, 0, 3], ids=["exact", "capacity", "slack"])


class Launches:
    """The kernel, and the grids that it was launched with."""

    def __init__(self) -> None:
        self.kernel, self.grids = _fused_rows_kernel.copy_rows, list[tuple[int, ...]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return self.kernel[grid]


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    seen = Launches()
    monkeypatch.setattr(_fused_rows, "setting", "1")
    monkeypatch.setattr(_fused_rows_kernel, "copy_rows", seen)
    return seen


def of_mask(mask: Tensor, slack: int | None) -> SeqLayout:
    capacity = None if slack is None else int((~mask).sum()) + slack
    return SeqLayout.from_key_padding_mask(mask, capacity=capacity, validate=False)


def anything(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random bits, NaNs of every payload among them."""
    size = torch.empty((), dtype=dtype).element_size()
    count = int(torch.Size(shape).numel()) * size
    some = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return some.view(dtype).view(shape)


def bits(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def without(call: Callable[..., Any], *arguments: Any) -> Any:
    """The same call on the way of `_gather`."""
    _fused_rows.setting = ""
    try:
        return call(*arguments)
    finally:
        _fused_rows.setting = "1"


@each_dtype
@each_mask
@slacks
def test_every_bit_of_every_dtype(dtype: torch.dtype, mask: Tensor, slack: int | None, launches: Launches) -> None:
    layout = of_mask(mask, slack)
    for width in (1, 5, 8):
        x = anything(*mask.shape, width, dtype=dtype)
        packed = layout.pack(x)
        assert torch.equal(bits(packed), bits(without(layout.pack, x)))
        rows = anything(layout.num_rows, width, dtype=dtype, seed=1)
        padded = layout.unpack(rows)
        assert padded.shape == x.shape
        assert torch.equal(bits(padded), bits(without(layout.unpack, rows)))
    assert len(launches.grids) == 3 * (layout.num_rows > 0) + 3 * (mask.numel() > 0), "one launch each, none for nothing"


@pytest.mark.parametrize("pad_value", [0.0, -0.0, 1, -1.5, float("-inf"), float("nan"), -100])
@each_dtype
def test_padding_is_the_value_asked_for(dtype: torch.dtype, pad_value: float, launches: Launches) -> None:
    layout, rows = of_mask(MASKS["right"], None), anything(8, 3, dtype=dtype)
    if not (dtype.is_floating_point or dtype.is_complex or pad_value in (0, 1, -100)):
        pytest.skip("not a number of this dtype")
    want = without(layout.unpack, rows, pad_value)
    assert torch.equal(bits(layout.unpack(rows, pad_value)), bits(want))
    a_word = dtype != torch.complex128 or (pad_value == 0 and str(pad_value) != "-0.0")
    assert len(launches.grids) == a_word, "a complex number of 16 bytes that is not 0 is not one word again and again"


def test_words_narrower_than_a_number_hold_what_repeats() -> None:
    assert _fused_rows._bits(1.0, torch.float32, 8) == 0x3F8000003F800000
    assert _fused_rows._bits(1.0, torch.float32, 2) is None
    assert _fused_rows._bits(-1, torch.int64, 1) == -1
    assert _fused_rows._bits(True, torch.bool, 2) == 0x0101
    assert _fused_rows._bits(-0.0, torch.bfloat16, 2) == -0x8000
    assert _fused_rows._bits(-0.0, torch.int32, 4) == 0
    assert _fused_rows._bits(1, torch.complex128, 8) is None


def test_three_tensors_of_other_widths_and_dtypes_in_one_launch(launches: Launches) -> None:
    mask = MASKS["holes, an empty row"]
    for slack in (None, 2):
        layout = of_mask(mask, slack)
        forth, back = layout._rows()
        for dtypes in ((torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.bool), (torch.int64, torch.complex64, torch.float16)):
            xs = [anything(mask.numel(), width, dtype=dtype, seed=width) for width, dtype in zip((4, 700, 0), dtypes, strict=True)]
            for some in (xs, xs[:2], xs[1:], xs[:1]):
                launches.grids.clear()
                packed = move(forth, back, some)
                assert [grid[2] for grid in launches.grids] == [len(some)]
                for x, y in zip(some, packed, strict=True):
                    assert y.dtype == x.dtype
                    assert torch.equal(bits(y), bits(without(layout.pack, x.view(*mask.shape, -1))))
                for pad_value in (0, 1):
                    for x, y in zip(packed, move(back, forth, packed, pad_value), strict=True):
                        assert torch.equal(bits(y), bits(without(layout.unpack, x, pad_value)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [6, 16])
def test_views_are_read_in_place(dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v of a fused projection, and columns of a wider tensor: no copy before the launch."""
    mask = MASKS["right"]
    layout = of_mask(mask, None)
    together = anything(*mask.shape, 3, 2, width // 2, dtype=dtype)
    wide = anything(*mask.shape, 2 * width + 3, dtype=dtype)
    monkeypatch.setattr(Tensor, "contiguous", None)
    for views in (together.unbind(2), (wide[..., :width], wide[..., 3 : width + 3], wide[..., 1:2])):
        packed = layout._pack_fused(*views)
        assert packed is not None
        for x, y in zip(views, packed, strict=True):
            assert torch.equal(bits(y), bits(x[~mask]))
    rows = anything(8, 2 * width, dtype=dtype)
    for x in (rows[:, :width], rows[:, 1 : width + 1], rows[:, 3]):
        assert torch.equal(bits(layout.unpack(x)[~mask]), bits(x))


def test_numbers_apart_are_copied_together_first() -> None:
    mask = MASKS["right"]
    layout = of_mask(mask, None)
    for x in (
        torch.randn(4, 3, 6).transpose(0, 1),
        torch.randn(3, 4, 12)[..., ::2],
        torch.randn(6, 4, 3).permute(2, 1, 0),
        torch.randn(3, 4, 1).expand(3, 4, 6),
        torch.randn(3, 4, 6, dtype=torch.complex64).conj(),
        torch._neg_view(torch.randn(3, 4, 6)),
    ):
        packed = layout.pack(x)
        assert torch.equal(packed, x[~mask])
        back = packed.t().contiguous().t() if packed.dim() == 2 else packed
        assert torch.equal(layout.unpack(back), x.masked_fill(mask[..., None], 0))


@pytest.mark.parametrize(("rows", "width", "grid"), [(600, 3, (3, 1, 1)), (60, 300, (15, 1, 1)), (9, 2049, (3, 9, 1))])
def test_rows_and_columns_beyond_a_block(rows: int, width: int, grid: tuple[int, ...], launches: Launches) -> None:
    mask = torch.rand(3, rows // 3, generator=torch.Generator().manual_seed(0)) < 0.4
    layout, x = of_mask(mask, 2), torch.randn(3, rows // 3, width)
    packed = layout.pack(x)
    assert torch.equal(packed, without(layout.pack, x))
    assert torch.equal(layout.unpack(packed), x.masked_fill(mask[..., None], 0))
    assert launches.grids[-1] == grid


def test_offsets_beyond_32_bits() -> None:
    """The last row begins 2 GB after the first; of the memory only what is written to is there."""
    width = 4097  # so that words are bytes
    source = torch.empty(2**31 // width + 2, width, dtype=torch.int8)
    source[-1] = torch.arange(width) % 127
    source[0] = -1
    last = torch.tensor([len(source) - 1])
    forth, back = Rows(last, 0, None), Rows(last, 0, None)
    (row,) = move(forth, back, (source,))
    assert torch.equal(row[0], source[-1])


# -------------------------------------------------------------------- gradients


@pytest.mark.parametrize("slack", [None, 1], ids=["exact", "slack"])
def test_derivatives(slack: int | None) -> None:
    mask = torch.tensor([[True, False, False], [True, True, True], [False, True, True]])
    layout = of_mask(mask, slack)
    packed_rows, padded_rows = layout._rows()
    xs = [torch.randn(mask.numel(), width, dtype=torch.float64, requires_grad=True) for width in (2, 1)]
    ys = [torch.randn(layout.num_rows, width, dtype=torch.float64, requires_grad=True) for width in (2, 1)]
    for check in (gradcheck, gradgradcheck):
        assert check(lambda *xs: move(packed_rows, padded_rows, xs), xs)
        assert check(lambda *ys: move(padded_rows, packed_rows, ys, -1.5), ys)


@each_mask
@slacks
def test_gradients_are_those_of_gather_and_no_nan_leaks(mask: Tensor, slack: int | None, launches: Launches) -> None:
    layout = of_mask(mask, slack)
    real = int((~mask).sum())
    xs = [poison(torch.randn(*mask.shape, 2, 4), mask).requires_grad_() for _ in range(3)]

    def gradients() -> tuple[Tensor, ...]:
        packed = layout._pack_fused(*xs) or tuple(layout.pack(x) for x in xs)
        assert all(bool(x.isfinite().all()) for x in packed)
        weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(2)) for x in packed]
        for w in weights:
            w[real:] = float("nan")
        return torch.autograd.grad(packed, xs, weights)

    got, want = gradients(), without(gradients)
    assert len(launches.grids) == (layout.num_rows > 0) + (mask.numel() > 0), "one forward, one backward, for all three"
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
        assert not x[mask].any()

    y = torch.randn(layout.num_rows, 3)
    y[real:] = float("nan")
    leaf = y.requires_grad_()
    upstream = poison(torch.randn(*mask.shape, 3), mask)
    for out, (grad,) in (
        (layout.unpack(leaf), torch.autograd.grad(layout.unpack(leaf), leaf, upstream)),
        without(lambda: (layout.unpack(leaf), torch.autograd.grad(layout.unpack(leaf), leaf, upstream))),
    ):
        assert not out[mask].any()
        assert bool(out.isfinite().all())
        assert torch.equal(grad[:real], upstream[~mask])
        assert not grad[real:].any()


def test_only_what_needs_a_gradient_gets_one(launches: Launches) -> None:
    layout = of_mask(MASKS["right"], None)
    q, k, v = (torch.randn(3, 4, 2) for _ in range(3))
    for wanted in ([q], [k, v], [v]):
        for x in (q, k, v):
            x.requires_grad_(any(x is w for w in wanted))
        packed = layout._pack_fused(q, k, v)
        assert packed is not None
        assert [x.requires_grad for x in packed] == [x.requires_grad for x in (q, k, v)]
        launches.grids.clear()
        torch.autograd.grad(sum(x.sum() for x in packed), wanted)
        assert [grid[2] for grid in launches.grids] == [len(wanted)]
    packed = layout._pack_fused(q.requires_grad_(), k.requires_grad_(), v)
    assert packed is not None
    (dk,) = torch.autograd.grad(packed[1].sum(), k, retain_graph=True)
    assert torch.equal(dk, (~MASKS["right"])[..., None].float().expand(3, 4, 2))
    assert torch.autograd.grad(packed[1].sum(), q, allow_unused=True) == (None,)


# -------------------------------------------------------------------- in place


@pytest.mark.parametrize("slack", [None, 3])
def test_padded_attention_packs_q_k_and_v_at_once(slack: int | None, launches: Launches) -> None:
    mask = MASKS["right"]
    layout = of_mask(mask, slack)
    qkv = [poison(torch.randn(3, 4, 2, 8), mask).requires_grad_() for _ in range(3)]

    def run() -> tuple[Tensor, ...]:
        out = padded_attention(*qkv, layout=layout, backend="reference")
        return out, *torch.autograd.grad(out, qkv, torch.ones_like(out))

    got = run()
    assert [grid[2] for grid in launches.grids] == [3, 1, 1, 3], "pack, unpack, and back"
    for x, y in zip(got, without(run), strict=True):
        assert torch.equal(x, y)
    launches.grids.clear()
    cross = SeqLayout.from_lengths([2, 1, 2])
    out = padded_attention(torch.randn(3, 2, 2, 8), *qkv[1:], layout=cross, layout_kv=layout, backend="reference")
    assert [grid[2] for grid in launches.grids] == [1, 2, 1]
    assert out.shape == (3, 2, 2, 8)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch about itself
def test_what_is_not_served_goes_the_other_way(launches: Launches) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    layout = of_mask(MASKS["right"], None)
    x = torch.randn(3, 4, 2)
    assert serves(x)
    assert serves(x, x, x)
    assert not serves(x, x, x, x)
    assert not serves(x, torch.empty(2, device="meta"))
    assert not serves(torch.empty(2, device="meta"))
    with FlopCounterMode(display=False):
        assert not serves(x)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert not serves(fake)
    assert torch.equal(torch.func.vmap(layout.pack)(torch.stack([x, x]))[1], layout.pack(x))
    torch.func.jvp(layout.pack, (x,), (x,))
    assert len(launches.grids) == 1
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layout.pack, backend="eager", fullgraph=True)(x), x[~MASKS["right"]])
    assert len(launches.grids) == 1
    assert without(serves, x) is False
    assert without(_fused_rows.why_not) == "is off: VARLEN_ATTN_TRITON=1 turns it on"
    assert _fused_rows.why_not() is None


def test_the_benchmark_has_it_as_a_contestant(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    bench_layout = pytest.importorskip("benchmarks.bench_layout")
    monkeypatch.setattr(_fused_rows, "setting", "")
    mask = MASKS["right"]
    found = bench_layout.contests(mask, torch.randn(3, 4, 4) * ~mask[..., None], gpu=True)
    for what in (bench_layout.PACK, bench_layout.UNPACK, bench_layout.PACK_QKV):
        launches.grids.clear()
        bench_layout.verify(found[what])
        assert [grid[2] for grid in launches.grids] == [3 if what == bench_layout.PACK_QKV else 1]
