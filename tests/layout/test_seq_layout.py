"""`SeqLayout` by value: constructors, packing and its derivatives, capacity, documents, pooling, frames, moving, warnings."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from varlen_attn import ArgumentError, DtypeError, LayoutError, LayoutWarning, SeqLayout, padded_attention, varlen_attention, varlen_mha
from varlen_attn.layout import build as _build
from varlen_attn.layout import rows as _gather
from varlen_attn.layout.padded import PaddedRows
from varlen_attn.layout.rows import scatter_rows
from varlen_attn.testing import poison
from varlen_attn.testing.strategies import Batch, batches, lengths, mask_dtypes, masks

from ..nosync import count_reads

POOLINGS = ("mean", "max", "sum", "first", "last")
any_masks = masks(forms=("right", "left", "both", "holes", "random"))


def tokens(mask: Tensor) -> list[list[int]]:
    """Columns of the tokens of each row, by a dull loop."""
    return [[c for c, padded in enumerate(row) if not padded] for row in mask.tolist()]


def of_mask(mask: Tensor, **options: Any) -> SeqLayout:
    return SeqLayout.from_key_padding_mask(mask, validate=False, **options)


def assert_same(a: SeqLayout, b: SeqLayout) -> None:
    """Equal in every field, tensors by value and dtype."""
    for f in dataclasses.fields(SeqLayout):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, Tensor):
            assert isinstance(y, Tensor), f.name
            assert x.dtype == y.dtype, f.name
            assert torch.equal(x, y), f.name
        else:
            assert x == y, f.name


def test_assert_same_can_fail() -> None:
    a = SeqLayout.from_lengths([1, 2])
    for other in (SeqLayout.from_lengths([2, 1]), SeqLayout.from_lengths([1, 2], 3), SeqLayout.from_lengths([1, 2], 2, "left")):
        with pytest.raises(AssertionError):
            assert_same(a, other)


# -------------------------------------------------------------------- what a mask means


@given(mask=any_masks)
def test_facts_against_a_loop(mask: Tensor) -> None:
    layout, rows = of_mask(mask), tokens(mask)
    size, padded_len = mask.shape
    flat = [(b, c, i) for b, columns in enumerate(rows) for i, c in enumerate(columns)]
    assert (layout.batch_size, layout.padded_len, layout.num_seqs, layout.num_rows) == (size, padded_len, size, len(flat))
    assert layout.lengths == tuple(len(r) for r in rows)
    assert (layout.total, layout.cu_seqlens.dtype) == (len(flat), torch.int32)
    assert layout.cu_seqlens.tolist() == [sum(len(r) for r in rows[:b]) for b in range(size + 1)]
    assert layout.seq_ids.tolist() == [b for b, _, _ in flat]
    assert layout.columns.tolist() == [c for _, c, _ in flat]
    assert layout.positions.tolist() == [i for _, _, i in flat]
    assert layout.token_indices.tolist() == [b * padded_len + c for b, c, _ in flat]
    assert layout.has_holes == any(c != list(range(c[0], c[0] + len(c))) for c in rows if c)
    assert layout.fill == pytest.approx(len(flat) / (size * padded_len) if size * padded_len else 1.0)
    assert layout.is_dense == (not mask.any())
    assert layout.max_seqlen >= max(layout.lengths, default=0)
    assert type(layout.num_rows) is int
    assert layout.valid_rows().all()


@given(mask=any_masks, form=st.sampled_from(["padding", "tokens", "additive"]))
def test_few_rows_are_read_as_many(mask: Tensor, form: str) -> None:
    """By their bytes, and by operations on tensors."""

    def make() -> SeqLayout:
        if form == "tokens":
            return SeqLayout.from_attention_mask(~mask, validate=False)
        return of_mask(torch.zeros(mask.shape).masked_fill(mask, float("-inf")) if form == "additive" else mask)

    few = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_build, "_FEW", -1)
        assert_same(make(), few)


@given(mask=any_masks, data=st.data())
def test_every_form_of_a_mask_is_the_same_mask(mask: Tensor, data: st.DataObject) -> None:
    """Row 24 of 3a and S3: bool, additive float of any lowest value, integers of Hugging Face, strided, expanded."""
    expected = of_mask(mask)
    assert_same(of_mask(data.draw(mask_dtypes(mask))), expected)
    keep = SeqLayout.from_attention_mask(~mask, validate=False)
    assert_same(keep, expected)
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.int8):
        assert_same(SeqLayout.from_attention_mask((~mask).to(dtype), validate=False), expected)
    wide = torch.stack([(~mask).long()] * 2, -1)[..., 1]
    assert_same(SeqLayout.from_attention_mask(wide, validate=False), expected)


@pytest.mark.parametrize("row", [[False, True, False], [True, True, True], [False, False, False]])
def test_expanded_mask_of_stride_zero(row: list[bool]) -> None:
    mask = torch.tensor(row).expand(4, 3)
    assert mask.stride(0) == 0
    assert_same(of_mask(mask), of_mask(mask.contiguous()))
    assert_same(of_mask(torch.zeros(3).masked_fill(torch.tensor(row), float("-inf")).expand(4, 3)), of_mask(mask.contiguous()))


@given(
    counts=lengths(),
    extra=st.integers(0, 2),
    side=st.sampled_from(("right", "left")),
    form=st.sampled_from(("list", "tuple", "i64", "i32", "u8")),
)
def test_lengths_are_the_mask_they_stand_for(counts: list[int], extra: int, side: Any, form: str) -> None:
    size = max(counts, default=0) + extra
    columns = torch.arange(size)
    count_B1 = torch.tensor(counts, dtype=torch.int64)[:, None]
    mask = columns >= count_B1 if side == "right" else columns < size - count_B1
    dtypes = {"i64": torch.int64, "i32": torch.int32, "u8": torch.uint8}
    given_as: Any = {"list": list, "tuple": tuple}.get(form, lambda c: torch.tensor(c, dtype=dtypes[form]))(counts)
    layout = SeqLayout.from_lengths(given_as, size, side)
    assert_same(layout, of_mask(mask))
    if extra == 0:
        assert_same(SeqLayout.from_lengths(given_as, padding_side=side), layout)


@given(counts=lengths(), extra=st.integers(0, 2), dtype=st.sampled_from((torch.int32, torch.int64, torch.int16)), strided=st.booleans())
def test_offsets_of_any_integer_dtype_and_stride(counts: list[int], extra: int, dtype: torch.dtype, strided: bool) -> None:
    """R-20, rows 6 and 8 of 3a: int64 and non-contiguous offsets are converted, not rejected."""
    offsets = torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=dtype)
    if strided:
        offsets = torch.stack([offsets, offsets], -1)[:, 0]
        assert len(counts) == 0 or not offsets.is_contiguous()
    size = max(counts, default=0) + extra
    expected = SeqLayout.from_lengths(counts, size)
    assert_same(SeqLayout.from_cu_seqlens(offsets, size, total=sum(counts)), expected)
    assert_same(SeqLayout.from_cu_seqlens(offsets), SeqLayout.from_lengths(counts))
    trusted = SeqLayout.from_cu_seqlens(offsets, size, total=sum(counts), validate=False)
    assert trusted.lengths is None
    assert torch.equal(trusted.token_indices, expected.token_indices)
    assert torch.equal(trusted.cu_seqlens, expected.cu_seqlens)


@pytest.mark.parametrize(
    ("offsets", "options", "text"),
    [
        ([1, 3], {}, r"`cu_seqlens\[0\]` must be 0, but is 1.*from_lengths"),
        ([3, 5, 2], {}, r"`cu_seqlens\[0\]` must be 0, but is 3"),  # S8: lengths in place of offsets
        ([0, 5, 2], {}, r"must not decrease, but cu_seqlens\[2\] = 2 after 5.*from_lengths"),
        ([0, 2, 7], dict(padded_len=4), r"`padded_len` must be at least the longest sequence, but is 4 and sequence 1 has 5"),  # S6
        ([0, 2, 7], dict(total=8), r"`cu_seqlens\[-1\]` must be total = 8, but is 7"),  # S7
        ([], {}, r"Q\+1 >= 1 entries.*torch.tensor\(\[0\]\)"),
        ([[0, 1]], {}, r"must be 1-D, but has shape \(1, 2\)"),  # row 7 of 3a
    ],
)
def test_offsets_that_lie_are_refused(offsets: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        SeqLayout.from_cu_seqlens(torch.tensor(offsets, dtype=torch.int64), **options)


def test_a_tensor_shorter_than_the_offsets_declare_is_refused() -> None:  # R-20, S7: an out-of-bounds read elsewhere
    layout = SeqLayout.from_cu_seqlens(torch.tensor([0, 4, 9]))
    q = torch.randn(9, 1, 8)
    with pytest.raises(LayoutError, match=r"`key` must begin with 9 .*has shape \(8, 1, 8\)"):
        varlen_attention(q, q[:8], q, layout)
    with pytest.raises(LayoutError, match="`value` must begin with 9"):
        varlen_attention(q, q, q[:8], layout)


# -------------------------------------------------------------------- pack and unpack


@given(batch=batches(), trailing=st.sampled_from(((), (3,), (2, 3))), pad_value=st.sampled_from((0.0, -1.5, float("inf"))))
def test_round_trips(batch: Batch, trailing: tuple[int, ...], pad_value: float) -> None:
    x, layout = batch.tensor(*trailing), batch.layout
    expected = x[~batch.mask]
    packed = layout.pack(poison(x, batch.mask))
    assert torch.equal(packed, expected)
    assert packed.is_contiguous()
    padding = batch.mask.view(*batch.mask.shape, *[1] * len(trailing))
    assert torch.equal(layout.unpack(packed), x.masked_fill(padding, 0.0))
    assert torch.equal(layout.unpack(packed, pad_value), x.masked_fill(padding, pad_value))
    assert torch.equal(layout.pack(layout.unpack(packed)), packed)


def edge_rows(x: Tensor, mask: Tensor) -> Tensor:
    """A dull loop: what `unpack` with ``"edge"`` gives."""
    expected = torch.zeros_like(x)
    for row, columns in enumerate(tokens(mask)):
        for c in range(mask.shape[1]) if columns else ():
            expected[row, c] = x[row, max((t for t in columns if t <= c), default=columns[0])]
    return expected


@given(batch=batches(), trailing=st.sampled_from(((), (3,), (2, 3))), extra=st.sampled_from((None, 0, 2)))
def test_edge_rows(batch: Batch, trailing: tuple[int, ...], extra: int | None) -> None:
    """Padding repeats the nearest token, and takes no gradient, with slack rows and while exporting too."""
    x, mask = batch.tensor(*trailing), batch.mask
    layout = batch.layout if extra is None else of_mask(mask, capacity=batch.layout.num_rows + extra)
    expected = edge_rows(x, mask)
    rows = layout.pack(x).index_fill(0, torch.arange(batch.layout.num_rows, layout.num_rows), torch.nan).requires_grad_()
    padded = PaddedRows.of(x, mask)
    given = poison(x, mask).requires_grad_()
    for out in (layout.unpack(rows, "edge"), layout.unpack(rows.detach(), "edge"), padded.unpack(given.flatten(0, 1), "edge")):
        assert torch.equal(out, expected)
    gradient = batch.tensor(*trailing, salt=1)
    (got,) = torch.autograd.grad(layout.unpack(rows, "edge"), rows, gradient)
    assert torch.equal(got, layout.pack(gradient))
    (got,) = torch.autograd.grad(padded.unpack(given.flatten(0, 1), "edge"), given, gradient)
    assert torch.equal(got, torch.where(mask.view(*mask.shape, *[1] * len(trailing)), 0, gradient))


def test_edge_rows_are_of_the_batch_row_and_follow_updates() -> None:
    ids = torch.tensor([[0, 1, 0, 2], [0, 0, 0, 0], [3, 3, 0, 0]])
    rows = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert SeqLayout.from_document_ids(ids).unpack(rows, "edge").tolist() == [[1, 1, 1, 2], [0, 0, 0, 0], [3, 4, 4, 4]]
    layout = of_mask(ids == 0, capacity=4)
    assert layout.unpack(rows, "edge").tolist() == [[1, 1, 1, 2], [0, 0, 0, 0], [3, 4, 4, 4]]
    layout.update_(torch.tensor([[True, True, True, False], [False] + [True] * 3, [True] * 4]))
    assert layout.unpack(rows, "edge").tolist() == [[1, 1, 1, 1], [2, 2, 2, 2], [0, 0, 0, 0]]
    with pytest.raises(ArgumentError, match='`pad_value` must be a number or "edge"'):
        layout.unpack(rows, "last")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning", "ignore:.*should not be instantiated:DeprecationWarning")
def test_edge_rows_in_transforms_and_graphs() -> None:
    layout = of_mask(torch.tensor([[True, False, False], [False, True, True]]))
    rows, weights = torch.randn(3, 2, dtype=torch.float64), torch.randn(2, 3, 2, dtype=torch.float64)
    loss = lambda x: (layout.unpack(x, "edge") * weights).sum()  # noqa: E731
    assert torch.equal(torch.func.grad(loss)(rows), layout.pack(weights))
    leaf = rows.clone().requires_grad_()
    (once,) = torch.autograd.grad(layout.unpack(leaf, "edge").square().sum(), leaf, create_graph=True)
    (twice,) = torch.autograd.grad(once.sum(), leaf)
    assert torch.equal(twice, torch.full_like(rows, 2))
    out, tangent = torch.func.jvp(lambda x: layout.unpack(x, "edge"), (rows,), (rows,))
    assert torch.equal(out, layout.unpack(rows, "edge"))
    assert torch.equal(tangent, layout.unpack(rows))

    def through(x: Tensor, mask: Tensor) -> Tensor:
        return SeqLayout.from_key_padding_mask(mask).unpack(x, "edge")

    got = torch.compile(through, fullgraph=True, backend="aot_eager")(leaf, layout.padding_mask())
    assert torch.equal(got, out)
    assert torch.equal(torch.autograd.grad(got, leaf, weights)[0], layout.pack(weights))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.complex64])
def test_any_dtype_and_stride(dtype: torch.dtype) -> None:
    mask = torch.tensor([[False, True, False], [True, True, True], [False, False, True]])
    layout = of_mask(mask)
    x = torch.arange(1, 10).reshape(3, 3).to(dtype)
    assert torch.equal(layout.pack(x), x[~mask])
    assert torch.equal(layout.unpack(layout.pack(x)), x.masked_fill(mask, 0))
    assert torch.equal(layout.unpack(layout.pack(x), 1), x.masked_fill(mask, 1))
    assert torch.equal(layout.pack(x.t().contiguous().t()), x[~mask])
    assert torch.equal(layout.pack(torch.ones(3, 1, dtype=dtype).expand(3, 3)), torch.ones(4, dtype=dtype))
    assert torch.equal(layout.unpack(layout.pack(x), "edge"), edge_rows(x, mask))
    labels = layout.unpack(torch.arange(4), -100)
    assert torch.equal(labels, torch.tensor([[0, -100, 1], [-100] * 3, [2, 3, -100]]))


def bits(x: Tensor) -> Tensor:
    return x.flatten().view(torch.uint8)


@pytest.mark.parametrize("width", [0, 1, 3, 8, 16], ids=lambda n: f"{n} numbers")
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.complex64, torch.complex128])
def test_copies_change_no_bit(dtype: torch.dtype, width: int) -> None:
    """R-10: whatever the bits are, NaNs with a payload among them, rows of 16 bytes or not, at any address and stride; slack or not."""
    mask = torch.tensor([[False, True, False], [True, True, True], [False, False, True]])
    size = torch.empty((), dtype=dtype).element_size()
    memory = torch.randint(0, 2 if dtype == torch.bool else 256, (10 * (width + 1) * size,), dtype=torch.uint8)
    everything = memory.view(dtype).view(10, width + 1)
    shifted = memory.view(dtype)[1 : 1 + 9 * width].view(9, width)
    for x in (everything[:9, :width].contiguous(), everything[:9, :width], everything[1:, 1:], shifted, shifted.t().contiguous().t()):
        for layout in (of_mask(mask), of_mask(mask, capacity=4), of_mask(mask, capacity=6)):
            packed = layout.pack(x.view(3, 3, width))
            assert torch.equal(bits(packed[:4]), bits(x[~mask.flatten()]))
            assert not bits(packed[4:]).any()
            want = torch.zeros(9, width, dtype=dtype)
            want[~mask.flatten()] = packed[:4]
            filled = torch.cat([packed[:4], torch.ones_like(packed[4:])])
            odd, even = (torch.ones(len(packed), 2 * width + extra, dtype=dtype) for extra in (3, 16))
            moved = torch.ones(1 + packed.numel(), dtype=dtype)[1:].view(packed.shape)
            for rows in (filled, moved, odd[:, :width], even[:, :width], even[:, 1 : width + 1], even[:, : 2 * width : 2]):
                rows.copy_(filled)
                assert torch.equal(bits(layout.unpack(rows)), bits(want)), "slack rows arrive nowhere"
                assert torch.equal(bits(scatter_rows(rows, layout.gather_indices, 0)), bits(want))


@pytest.mark.parametrize("capacity", [None, 4, 6])
def test_conjugates_are_packed_and_results_can_be_changed_in_place(capacity: int | None) -> None:
    mask = torch.tensor([[False, True, False], [True, True, True], [False, False, True]])
    layout = of_mask(mask, capacity=capacity)
    x = torch.randn(3, 3, 4, dtype=torch.complex64).conj()
    assert x.is_conj()
    rows = layout.pack(x)
    assert torch.equal(rows[:4], x[~mask])
    assert torch.equal(layout.unpack(rows.conj()), x.conj().masked_fill(mask[..., None], 0))
    leaf = torch.randn(layout.num_rows, 4, requires_grad=True)
    for y in (layout.unpack(leaf), layout.pack(layout.unpack(leaf))):
        y.mul_(2).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad[:4], torch.full((4, 4), 4.0))


@given(batch=batches(max_batch=3, max_len=4))
@settings(max_examples=15)
def test_derivatives_of_pack_and_unpack(batch: Batch) -> None:
    layout = batch.layout
    x = batch.tensor(2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(layout.num_rows, 2, dtype=torch.float64, requires_grad=True)
    for function, argument in ((layout.pack, x), (layout.unpack, y)):
        if argument.numel():
            assert gradcheck(function, (argument,))
            assert gradgradcheck(function, (argument,))


@given(batch=batches())
def test_each_is_the_backward_of_the_other(batch: Batch) -> None:
    layout = batch.layout
    x = batch.tensor(3, requires_grad=True)
    grad_packed = torch.randn(layout.num_rows, 3)
    (got,) = torch.autograd.grad(layout.pack(x), x, grad_packed)
    assert torch.equal(got, layout.unpack(grad_packed))
    y = torch.randn(layout.num_rows, 3, requires_grad=True)
    grad_padded = batch.tensor(3, salt=1)
    (got,) = torch.autograd.grad(layout.unpack(y), y, poison(grad_padded, batch.mask))
    assert torch.equal(got, grad_padded[~batch.mask])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, at its first forward-mode call
def test_functorch_transforms_go_through_pack_and_unpack() -> None:
    mask = torch.tensor([[False, True, False], [True, True, True]])
    layout, capacity = of_mask(mask), of_mask(mask, capacity=4)
    real = (~mask)[..., None].double()
    x, tangent = torch.randn(2, 2, 3, 2, dtype=torch.float64)
    for one in (layout, capacity):

        def round_trip(x: Tensor, one: SeqLayout = one) -> Tensor:
            return one.unpack(one.pack(x))

        assert torch.equal(torch.func.grad(lambda x: (round_trip(x) * tangent).sum())(x), tangent * real)
        out, out_tangent = torch.func.jvp(round_trip, (x,), (tangent,))
        assert torch.equal(out, x * real)
        assert torch.equal(out_tangent, tangent * real)
        many = torch.randn(5, 2, 3, 2, dtype=torch.float64)
        assert torch.equal(torch.func.vmap(round_trip)(many), many * real)
        per_sample = torch.func.vmap(torch.func.grad(lambda x: (round_trip(x) ** 2).sum()))(many)
        assert torch.equal(per_sample, 2 * many * real)


@pytest.fixture(params=["small", "large"])
def size_class(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results count as small (the formulas) or as large (copies of words), whatever their size is."""
    for name in ("_SMALL_PACK", "_SMALL_UNPACK"):
        monkeypatch.setattr(_gather, name, {"small": 2**62, "large": -1}[request.param])


@pytest.mark.parametrize("width", [0, 1, 3, 8, 16], ids=lambda n: f"{n} numbers")
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.complex64, torch.complex128])
@pytest.mark.usefixtures("size_class")
def test_copies_of_either_size_change_no_bit(dtype: torch.dtype, width: int) -> None:
    test_copies_change_no_bit(dtype, width)


@pytest.mark.parametrize("capacity", [None, 4, 6])
@pytest.mark.usefixtures("size_class")
def test_conjugates_of_either_size(capacity: int | None) -> None:
    test_conjugates_are_packed_and_results_can_be_changed_in_place(capacity)


quantised = {torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4}
every_dtype = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)} - quantised, key=str)
without_a_one = re.compile(r"torch\.(bits.*|u?int[1-7]|float4.*)")  # torch itself cannot fill them


def test_dtypes_are_all_there() -> None:
    unsigned = {torch.uint8, torch.uint16, torch.uint32, torch.uint64}
    float8 = {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu}
    small = {torch.uint4, torch.int1, torch.bits8, torch.bits16, torch.float4_e2m1fn_x2}
    assert set(every_dtype) >= unsigned | float8 | small | {torch.bool, torch.int8, torch.int64, torch.float16, torch.complex32}


@pytest.mark.parametrize("width", [None, 1, 3, 16])
@pytest.mark.parametrize("capacity", [None, 5, 7])
@pytest.mark.parametrize("dtype", every_dtype, ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.usefixtures("size_class")
def test_every_dtype_of_torch(dtype: torch.dtype, capacity: int | None, width: int | None) -> None:
    mask = torch.tensor([[False, False, True], [True, True, True], [False, False, False]])
    layout = of_mask(mask, capacity=capacity)
    size = torch.empty((), dtype=dtype).element_size()
    bytes_of_x = torch.randint(0, 2 if dtype == torch.bool else 256, (3, 3, (width or 1) * size), dtype=torch.uint8)
    x = bytes_of_x.view(dtype)
    packed = layout.pack(x[..., 0] if width is None else x)
    assert packed.dtype == dtype
    bytes_of_rows = packed.reshape(len(packed), -1).view(torch.uint8)
    assert torch.equal(bytes_of_rows[:5], bytes_of_x[~mask])
    assert not bytes_of_rows[5:].any(), "slack rows are 0"
    pads = [(0, torch.zeros(1, dtype=torch.uint8))]
    if without_a_one.fullmatch(str(dtype)):
        with pytest.raises(ArgumentError, match=f"`pad_value` must be 0 for a tensor of {dtype}, but is 1"):
            layout.unpack(packed, 1)
    else:
        pads.append((1, torch.ones(width or 1, dtype=torch.float32).to(dtype).view(torch.uint8)))
    for pad_value, bytes_of_pad in pads:
        padded = layout.unpack(packed, pad_value)
        assert padded.dtype == dtype
        assert torch.equal(padded.reshape(3, 3, -1).view(torch.uint8), torch.where(mask[..., None], bytes_of_pad, bytes_of_x))
    last = layout.pool(packed, "last")
    assert last.dtype == dtype
    ends = torch.stack([bytes_of_x[0, 1], torch.zeros_like(bytes_of_x[0, 0]), bytes_of_x[2, 2]])
    assert torch.equal(last.reshape(3, -1).view(torch.uint8), ends)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_padding_of_unsigned_numbers(dtype: torch.dtype) -> None:
    layout, top = SeqLayout.from_lengths([2, 1], 2), torch.iinfo(dtype).max
    ids = torch.tensor([1, 2, 3], dtype=dtype)
    for value, want in ((0, 0), (top, top), *((n, n) for n in (top // 2, top // 2 + 1)), (-1, top)):  # -1 as in torch.full
        assert layout.unpack(ids, value).tolist() == [[1, 2], [3, want]]
    for value in (top + 1, -top - 1):
        with pytest.raises(ArgumentError, match=f"`pad_value` must be below {top + 1} for a tensor of {dtype}, but is {value}"):
            layout.unpack(ids, value)


@pytest.mark.parametrize("how", ["mean", "max", "sum"])
def test_pools_of_float8(how: Any) -> None:
    layout, x = SeqLayout.from_lengths([2, 1]), torch.tensor([[1.0], [3.0], [4.0]]).to(torch.float8_e5m2)
    pooled = layout.pool(x, how)
    assert pooled.dtype == x.dtype
    assert pooled.float().flatten().tolist() == layout.pool(x.float(), how).flatten().tolist()


@pytest.mark.parametrize("width", [None, 3])
@pytest.mark.parametrize("dtype", [torch.quint8, torch.qint8, torch.qint32], ids=str)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.usefixtures("size_class")
def test_quantised_rows(dtype: torch.dtype, width: int | None) -> None:
    layout = SeqLayout.from_lengths([2, 1], 3)
    padding = layout.padding_mask()
    x = torch.quantize_per_tensor(torch.arange(6.0).view(2, 3) if width is None else torch.randn(2, 3, width), 0.5, 0, dtype)
    packed, wide = layout.pack(x), (..., *[None] * (x.dim() - 2))
    assert torch.equal(packed.int_repr(), x.int_repr()[~padding])
    for pad_value in (0, 1.5):
        assert torch.equal(layout.unpack(packed, pad_value).dequantize(), x.dequantize().masked_fill(padding[wide], pad_value))
    assert torch.equal(layout.pool(packed, "first").dequantize(), x.dequantize()[:, 0])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_rows_that_torch_does_not_take() -> None:
    x, exact = torch.ones(2, 3), SeqLayout.from_lengths([2, 1], 3)
    capacity = of_mask(exact.padding_mask(), capacity=4)
    of_half_bytes = torch.quantize_per_tensor(x, 1.0, 0, torch.quint4x2)
    by_column = torch.quantize_per_channel(x, torch.ones(3), torch.zeros(3), 1, torch.qint8)
    whole = torch.quantize_per_tensor(x, 1.0, 0, torch.qint8)
    for layout, rows in ((exact, of_half_bytes), (exact, by_column), (capacity, whole)):
        with pytest.raises(DtypeError, match=rf"`x` must be quantised .* but is {rows.dtype} .*: pass x.int_repr\(\) or x.dequantize"):
            layout.pack(rows)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's own imports
def test_unsigned_numbers_in_a_graph(backend: str) -> None:
    def through(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layout = SeqLayout.from_key_padding_mask(mask)
        rows = layout.pack(ids)
        return rows, layout.unpack(rows, 7), layout.pool(rows, "last")

    ids, mask = torch.tensor([[1, 2, 65535], [40000, 0, 0]], dtype=torch.uint16), SeqLayout.from_lengths([2, 1], 3).padding_mask()
    made = torch.compile(through, fullgraph=True, backend=backend)(ids, mask)
    assert [x.tolist() for x in made] == [[1, 2, 40000], [[1, 2, 7], [40000, 7, 7]], [2, 40000]]


def grads_by_loop(y: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
    return torch.stack([torch.autograd.grad(y, x, v, retain_graph=True)[0] for v in vectors])


@pytest.mark.parametrize("width", [8, 3, 1])  # rows of 16 bytes or not
@pytest.mark.parametrize("capacity", [None, 11, 13])
@pytest.mark.usefixtures("size_class")
def test_batched_gradients(capacity: int | None, width: int) -> None:
    """R-13: batches of gradients have no storage, and `torch.func` does not know of them."""
    layout = SeqLayout.from_lengths([4, 4, 0, 3])
    if capacity is not None:
        layout = of_mask(layout.padding_mask(), capacity=capacity)
    for move, shape in ((layout.pack, (4, 4, width)), (layout.unpack, (layout.num_rows, width))):
        x = torch.randn(shape, requires_grad=True)
        y = move(x)
        vectors = torch.randn(5, *y.shape)
        (grads,) = torch.autograd.grad(y, x, vectors, is_grads_batched=True, retain_graph=True)
        assert torch.equal(grads, grads_by_loop(y, x, vectors))
        jacobians = [torch.autograd.functional.jacobian(move, x, vectorize=v, strategy="reverse-mode") for v in (True, False)]
        assert torch.equal(*jacobians)


@pytest.mark.parametrize("capacity", [None, 5, 7])
@pytest.mark.usefixtures("size_class")
def test_batched_second_derivatives(capacity: int | None) -> None:
    layout = of_mask(torch.tensor([[False, False, True], [False, False, False]]), capacity=capacity)
    x = torch.randn(2, 3, 2, dtype=torch.float64)
    of_loss: Any = lambda x: layout.unpack(layout.pack(x).pow(3)).square().sum()  # noqa: E731
    fast, slow = (torch.autograd.functional.hessian(of_loss, x, vectorize=v) for v in (True, False))
    assert slow.any()
    assert torch.allclose(fast, slow, rtol=1e-14, atol=0)


@pytest.mark.usefixtures("size_class")
def test_batched_gradients_of_attention() -> None:
    layout = SeqLayout.from_lengths([3, 1])
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    y = padded_attention(x, x, x, layout=layout, backend="reference")
    vectors = torch.randn(3, *y.shape, dtype=torch.float64)
    (grads,) = torch.autograd.grad(y, x, vectors, is_grads_batched=True, retain_graph=True)
    assert torch.allclose(grads, grads_by_loop(y, x, vectors), rtol=1e-12, atol=1e-12)


def test_small_results_take_no_detour(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps around a copy of words cost more than a small copy; large ones gain."""
    calls = []
    monkeypatch.setattr(_gather, "_in_words", lambda *rows: calls.append(len(rows)) or rows)
    for columns, expected in ((4, []), (2**18, [2, 1, 2])):
        mask = torch.tensor([[False], [True]])
        exact, capacity = of_mask(mask), of_mask(mask, capacity=2)
        x = torch.ones(2, 1, columns)
        for layout in (exact, capacity):
            layout.unpack(layout.pack(x))
        assert calls == expected


def test_shapes_and_devices_are_never_adjusted() -> None:
    layout = SeqLayout.from_lengths([2, 3])
    with pytest.raises(LayoutError, match=r"`x` must begin with 2x3 \(this layout has B=2, S=3, T=5\), but has shape \(2, 4, 1\).*sliced"):
        layout.pack(torch.zeros(2, 4, 1))
    with pytest.raises(LayoutError, match="`x` must begin with 5 "):
        layout.unpack(torch.zeros(6, 1))
    with pytest.raises(LayoutError, match=r"`x` is on meta, but the layout is on cpu: call layout.to\('meta'\)"):
        layout.pack(torch.zeros(2, 3, device="meta"))


# -------------------------------------------------------------------- capacity


@given(batch=batches(), slack=st.integers(0, 4))
def test_capacity_is_the_exact_layout_with_slack_rows_of_zero(batch: Batch, slack: int) -> None:  # S17
    exact = batch.layout
    total = exact.num_rows
    layout = of_mask(batch.mask, capacity=total + slack)
    assert layout.num_rows == total + slack
    assert (layout.lengths, layout.total, layout.fill, layout.has_holes) == (None, None, None, None)
    assert torch.equal(layout.cu_seqlens, exact.cu_seqlens)
    assert layout.valid_rows().tolist() == [True] * total + [False] * slack
    for name, filler in (("positions", 0), ("columns", 0), ("seq_ids", exact.num_seqs)):
        assert getattr(layout, name).tolist() == getattr(exact, name).tolist() + [filler] * slack

    x = batch.tensor(2, requires_grad=True)
    packed = layout.pack(poison(x, batch.mask))
    assert torch.equal(packed[:total], exact.pack(x))
    assert not packed[total:].any()
    grad = torch.randn(total + slack, 2)
    grad[total:] = float("nan")
    (dx,) = torch.autograd.grad(layout.pack(x), x, grad)
    assert torch.equal(dx, exact.unpack(grad[:total])), "what stands in slack rows of a gradient never arrives"
    y = grad.clone().requires_grad_()
    assert torch.equal(layout.unpack(y), exact.unpack(grad[:total]))
    (dy,) = torch.autograd.grad(layout.unpack(y), y, batch.tensor(2, salt=1))
    assert not dy[total:].any()
    assert torch.equal(dy[:total], exact.pack(batch.tensor(2, salt=1)))


@given(batch=batches(max_batch=3, max_len=3), slack=st.integers(1, 2))
@settings(max_examples=10)
def test_capacity_derivatives(batch: Batch, slack: int) -> None:
    layout = of_mask(batch.mask, capacity=batch.layout.num_rows + slack)
    y = torch.randn(layout.num_rows, 1, dtype=torch.float64, requires_grad=True)
    x = batch.tensor(1, dtype=torch.float64, requires_grad=True)
    for function, argument in ((layout.pack, x), (layout.unpack, y)):
        if argument.numel():
            assert gradcheck(function, (argument,))
            assert gradgradcheck(function, (argument,))


@given(batch=batches())
def test_capacity_refuses_one_token_too_many(batch: Batch) -> None:
    total = batch.layout.num_rows
    if total:
        with pytest.raises(LayoutError, match=f"`capacity` must hold all tokens, but there are more than {total - 1}: raise it"):
            of_mask(batch.mask, capacity=total - 1)
    assert of_mask(batch.mask, capacity=total).num_rows == total
    with pytest.raises(ArgumentError, match="`capacity` must be an integer of at least 0, but is -1"):
        of_mask(batch.mask, capacity=-1)


@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 5)), seed=st.integers(0, 999))
def test_update_writes_in_place(shape: tuple[int, int], seed: int) -> None:  # R-40, S21
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.rand(shape, generator=generator) < 0.4 for _ in range(2))
    layout = of_mask(first, capacity=first.numel())
    tensors = layout.cu_seqlens, layout.token_indices, layout.gather_indices
    addresses = [t.data_ptr() for t in tensors]
    assert layout.update_(second) is layout
    assert [t.data_ptr() for t in (layout.cu_seqlens, layout.token_indices, layout.gather_indices)] == addresses
    assert_same(layout, of_mask(second, capacity=first.numel()))


def test_update_that_does_not_fit_is_refused_and_writes_nothing() -> None:
    few, all_real = torch.tensor([[False, True, True]]), torch.zeros(1, 3, dtype=torch.bool)
    layout = of_mask(few, capacity=2)
    with pytest.raises(LayoutError, match="`capacity` must hold all tokens"):
        layout.update_(all_real)
    assert_same(layout, of_mask(few, capacity=2))
    with pytest.raises(LayoutError, match="`mask` must begin with 1x3"):
        layout.update_(torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(LayoutError, match="capacity="):
        of_mask(few).update_(few)
    documents = SeqLayout.from_document_ids(torch.ones(1, 3, dtype=torch.long), max_docs=2)
    with pytest.raises(LayoutError, match="capacity="):
        documents.update_(few)


def test_a_mask_changed_in_place_needs_a_new_layout_and_gets_one() -> None:
    """Row 7 of the peers' wrong answers: nothing is cached by the identity of a mask."""
    mask = torch.zeros(3, 6, dtype=torch.bool)
    assert of_mask(mask).lengths == (6, 6, 6)
    mask[1, 3:], mask[2, 1:] = True, True
    assert of_mask(mask).lengths == (6, 3, 1)


# -------------------------------------------------------------------- documents


def document_runs(ids: list[list[int]]) -> list[tuple[int, list[int]]]:
    """(row, columns) of each document, by a dull loop."""
    runs: list[tuple[int, list[int]]] = []
    for b, row in enumerate(ids):
        before = 0
        for c, value in enumerate(row):
            if value and value != before:
                runs.append((b, []))
            if value:
                runs[-1][1].append(c)
            before = value
    return runs


document_ids = st.integers(0, 4).flatmap(
    lambda b: st.integers(0, 7).flatmap(
        lambda s: st.lists(st.lists(st.integers(0, 3), min_size=s, max_size=s), min_size=b, max_size=b).map(
            lambda rows: torch.tensor(rows, dtype=torch.int64).reshape(b, s)
        )
    )
)


@given(ids=document_ids, dtype=st.sampled_from((torch.int64, torch.int32, torch.uint8)), extra=st.integers(0, 3))
def test_documents_against_a_loop(ids: Tensor, dtype: torch.dtype, extra: int) -> None:
    """R-31, and row 3 of the peers' wrong answers: boundaries come from ids only, padding anywhere."""
    runs = document_runs(ids.tolist())
    layout = SeqLayout.from_document_ids(ids.to(dtype))
    assert layout.lengths == tuple(len(columns) for _, columns in runs)
    assert layout.row_ids is not None
    assert layout.row_ids.tolist() == [b for b, _ in runs]
    assert layout.columns.tolist() == [c for _, columns in runs for c in columns]
    assert layout.positions.tolist() == [i for _, columns in runs for i in range(len(columns))]
    assert layout.seq_ids.tolist() == [q for q, (_, columns) in enumerate(runs) for _ in columns]
    assert torch.equal(layout.pack(ids), ids[ids != 0])
    assert torch.equal(layout.unpack(layout.pack(ids)), ids)

    static = SeqLayout.from_document_ids(ids.to(dtype), max_docs=len(runs) + extra)
    total = layout.num_rows
    assert (static.num_seqs, static.num_rows) == (len(runs) + extra, ids.numel())
    assert static.cu_seqlens.tolist() == layout.cu_seqlens.tolist() + [total] * extra
    assert static.row_ids is not None
    assert static.row_ids.tolist() == layout.row_ids.tolist() + [-1] * extra
    assert torch.equal(static.token_indices[:total], layout.token_indices)
    assert torch.equal(static.gather_indices, layout.gather_indices)
    assert torch.equal(static.unpack(static.pack(ids)), ids)
    if runs:
        with pytest.raises(LayoutError, match=f"`max_docs` must hold all documents, but there are more than {len(runs) - 1}"):
            SeqLayout.from_document_ids(ids, max_docs=len(runs) - 1)


def test_documents_do_not_attend_to_each_other() -> None:
    ids = torch.tensor([[1, 1, 2, 2, 2, 0], [7, 0, 7, 7, 1, 1]])
    x = torch.randn(2, 6, 1, 8, dtype=torch.float64)
    layout = SeqLayout.from_document_ids(ids)
    out = layout.unpack(varlen_attention(*[layout.pack(x)] * 3, layout))
    for row, columns in document_runs(ids.tolist()):
        q = x[row, columns, 0]
        want = (q @ q.T * 8**-0.5).softmax(-1) @ q
        torch.testing.assert_close(out[row, columns, 0], want)


# -------------------------------------------------------------------- nested tensors, split, pool, compact


@given(counts=lengths())
def test_nested_both_ways(counts: list[int]) -> None:
    layout = SeqLayout.from_lengths(counts)
    x = torch.randn(layout.num_rows, 3)
    nested = layout.to_nested(x)
    assert nested.values().data_ptr() == x.data_ptr() or not x.numel()
    assert nested.offsets().tolist() == layout.cu_seqlens.tolist()
    assert_same(SeqLayout.from_nested(nested), layout)
    for part, view in zip(layout.split(x), nested.unbind() if counts else (), strict=True):
        assert torch.equal(part, view)


def test_nested_tensors_that_are_not_packed_rows_are_refused() -> None:
    parts = [torch.randn(3, 4), torch.randn(2, 4)]
    jagged = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    with pytest.raises(LayoutError, match=r"layout torch.jagged.*as_nested_tensor"):
        SeqLayout.from_nested(torch.zeros(2, 3))
    with pytest.raises(LayoutError, match="transposed view or has gaps"):
        SeqLayout.from_nested(jagged.transpose(1, 2))
    gaps = torch.nested.narrow(torch.randn(2, 4, 3), 1, torch.tensor([0, 0]), torch.tensor([2, 3]), layout=torch.jagged)
    with pytest.raises(LayoutError, match="transposed view or has gaps"):
        SeqLayout.from_nested(gaps)


@given(counts=lengths())
def test_split_gives_views_of_the_sequences(counts: list[int]) -> None:
    layout = SeqLayout.from_lengths(counts)
    x = torch.randn(layout.num_rows, 2)
    parts = layout.split(x)
    assert [p.shape[0] for p in parts] == counts
    assert torch.equal(torch.cat([x[:0], *parts]), x)
    assert all(p._base is x for p in parts)
    capacity = of_mask(torch.zeros(1, 2, dtype=torch.bool), capacity=3)
    with pytest.raises(LayoutError, match="split needs the lengths on the host"):
        capacity.split(torch.zeros(3, 1))


def padded_pool(x: Tensor, mask: Tensor, how: str) -> Tensor:
    """The dull loop on the padded batch."""
    out = []
    for row, columns in zip(x, tokens(mask), strict=True):
        picked = row[columns]
        if not columns:
            out.append(row.new_zeros(row.shape[1:]) + 0 * row[:0].sum())
        elif how in ("first", "last"):
            out.append(picked[0 if how == "first" else -1])
        else:
            out.append({"mean": picked.mean, "sum": picked.sum, "max": picked.amax}[how](0))
    return torch.stack(out) if out else x.new_zeros(0, *x.shape[2:])


@pytest.mark.parametrize("how", POOLINGS)
@given(batch=batches(), slack=st.one_of(st.none(), st.integers(0, 3)))
@settings(max_examples=30)
def test_pool_against_the_padded_formula(how: Any, batch: Batch, slack: int | None) -> None:
    total = batch.layout.num_rows
    layout = batch.layout if slack is None else of_mask(batch.mask, capacity=total + slack)
    x = batch.tensor(3, dtype=torch.float64, requires_grad=True)
    rows = layout.pack(x).detach()
    rows[total:] = float("nan")
    rows.requires_grad_()
    got, want = layout.pool(rows, how), padded_pool(x, batch.mask, how)
    torch.testing.assert_close(got, want)
    grad = torch.randn(want.shape, dtype=torch.float64)
    (drows,) = torch.autograd.grad(got, rows, grad)
    if want.requires_grad:
        (dx,) = torch.autograd.grad(want, x, grad)
        torch.testing.assert_close(drows[:total], dx[~batch.mask])
    assert not drows[total:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pool_of_half_precision_accumulates_wide(dtype: torch.dtype) -> None:
    layout = SeqLayout.from_lengths([4096, 3])
    x = torch.full((4099, 1), 0.1).to(dtype)
    want = x[0].double()
    mean, total = layout.pool(x, "mean"), layout.pool(x, "sum")
    assert mean.dtype == total.dtype == dtype
    assert (mean.double() - want).abs().max() <= torch.finfo(dtype).eps * want
    assert (total[0].double() - 4096 * want).abs() <= torch.finfo(dtype).eps * 4096 * want


def test_pool_refuses_what_it_does_not_know() -> None:
    layout = SeqLayout.from_lengths([2, 1])
    with pytest.raises(ArgumentError, match="`how` must be one of 'mean', 'max', 'sum', 'first', 'last', but is 'cls'"):
        layout.pool(torch.zeros(3, 1), "cls")  # type: ignore[arg-type]
    with pytest.raises(DtypeError, match=r"`x` must be floating-point for how='mean', but is torch\.int64"):
        layout.pool(torch.arange(3), "mean")
    assert layout.pool(torch.arange(3), "last").tolist() == [1, 2]


@given(batch=batches(), slack=st.one_of(st.none(), st.integers(0, 3)))
def test_compact_moves_every_sequence_to_column_0_of_its_own_row(batch: Batch, slack: int | None) -> None:
    total = batch.layout.num_rows
    layout = batch.layout if slack is None else of_mask(batch.mask, capacity=total + slack)
    x = torch.randn(layout.num_rows, 2)
    x[total:] = float("nan")
    with count_reads() as reads:
        compact = layout.compact()
        padded = compact.unpack(x)
    assert not reads
    for row, columns, i in zip(padded, tokens(batch.mask), range(layout.num_seqs), strict=True):
        start = int(layout.cu_seqlens[i])
        assert torch.equal(row[: len(columns)], x[start : start + len(columns)])
        assert not row[len(columns) :].any()
    back = compact.pack(padded)
    assert torch.equal(back[:total], x[:total])
    assert not back[total:].any()
    if slack is None:
        assert_same(compact, SeqLayout.from_lengths(batch.layout.lengths or ()))


# -------------------------------------------------------------------- a value: printed, copied, shipped, traversed


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (
            SeqLayout.from_lengths([3, 0, 2], 4),
            "SeqLayout(B=3, S=4, Q=3, T=5, fill=0.42, lengths=(3, 0, 2), device=cpu)",
        ),
        (
            of_mask(torch.tensor([[False, True, False]])),
            "SeqLayout(B=1, S=3, Q=1, T=2, fill=0.67, lengths=(2), holes='refuse', device=cpu)",
        ),
        (
            of_mask(torch.zeros(1, 3, dtype=torch.bool), capacity=5),
            "SeqLayout(B=1, S=3, Q=1, T=5, lengths=on the device only, capacity=T, device=cpu)",
        ),
        (
            SeqLayout.from_document_ids(torch.tensor([[1, 2, 2, 0]])),
            "SeqLayout(B=1, S=4, Q=2, T=3, fill=0.75, lengths=(1, 2), row_ids=(0, 0), device=cpu)",
        ),
    ],
    ids=["lengths", "holes", "capacity", "documents"],
)
def test_repr_shows_all_of_it(layout: SeqLayout, text: str) -> None:
    assert repr(layout) == text


def test_repr_of_many_sequences_is_short() -> None:
    assert "lengths=(1, 1, 1, 1, 1, 1, 1, 1, ... 92 more)" in repr(SeqLayout.from_lengths([1] * 100))


def every_kind() -> list[SeqLayout]:
    mask = torch.tensor([[False, True, False, False], [True] * 4, [False, False, True, True]])
    return [
        of_mask(mask, holes="packed"),
        of_mask(mask, capacity=7),
        SeqLayout.from_lengths([]),
        SeqLayout.from_document_ids(torch.tensor([[1, 2, 2, 0]])),
        SeqLayout.from_document_ids(torch.tensor([[1, 2, 2, 0]]), max_docs=3),
    ]


@pytest.mark.parametrize("layout", every_kind(), ids=["holes", "capacity", "empty", "documents", "max_docs"])
def test_copies_and_tree_maps_keep_everything(layout: SeqLayout) -> None:
    assert_same(copy.deepcopy(layout), layout)
    assert_same(copy.copy(layout), layout)
    assert_same(pickle.loads(pickle.dumps(layout)), layout)
    leaves, spec = pytree.tree_flatten(layout)
    assert all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves)
    assert_same(pytree.tree_unflatten(leaves, spec), layout)
    assert_same(pytree.tree_unflatten(leaves, pytree.treespec_loads(pytree.treespec_dumps(spec))), layout)
    doubled = pytree.tree_map(lambda t: t * 2 if isinstance(t, Tensor) else t, {"layout": layout})["layout"]
    assert torch.equal(doubled.cu_seqlens, layout.cu_seqlens * 2)
    keys = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(layout)[0]]
    assert keys[:3] == [".cu_seqlens", ".token_indices", ".gather_indices"]


def test_frozen_and_hashed_by_identity() -> None:
    a, b = SeqLayout.from_lengths([1]), SeqLayout.from_lengths([1])
    assert a != b
    assert len({a, b, a}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.padded_len = 7  # type: ignore[misc]


def _collate(samples: list[Tensor]) -> tuple[Tensor, SeqLayout]:
    padded = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
    return padded, SeqLayout.from_lengths([len(s) for s in samples], padded.shape[1])


def test_through_a_dataloader_worker() -> None:
    data = [torch.randn(n, 2) for n in (3, 1, 4, 1, 5, 2)]
    loader = torch.utils.data.DataLoader(data, batch_size=3, collate_fn=_collate, num_workers=1)
    seen = list(loader)
    for first, (padded, layout) in zip((0, 3), seen, strict=True):
        assert_same(layout, SeqLayout.from_lengths([len(s) for s in data[first : first + 3]]))
        assert torch.equal(layout.pack(padded), torch.cat(data[first : first + 3]))


MAKERS: dict[str, Callable[[], SeqLayout]] = {
    "mask": lambda: of_mask(torch.tensor([[False, True], [False, False]], device="cpu")),
    "attention mask": lambda: SeqLayout.from_attention_mask(torch.tensor([[True, False], [True, True]], device="cpu")),
    "capacity": lambda: of_mask(torch.tensor([[False, True], [False, False]], device="cpu"), capacity=3),
    "lengths": lambda: SeqLayout.from_lengths([1, 2]),
    "offsets": lambda: SeqLayout.from_cu_seqlens(torch.tensor([0, 1, 3], device="cpu")),
    "documents": lambda: SeqLayout.from_document_ids(torch.tensor([[4, 0], [5, 5]], device="cpu")),
    "max_docs": lambda: SeqLayout.from_document_ids(torch.tensor([[4, 0], [5, 5]], device="cpu"), max_docs=2),
    "compact": lambda: SeqLayout.from_lengths([1, 2]).compact(),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_made_in_inference_mode_and_used_in_training(make: Callable[[], SeqLayout]) -> None:  # S24
    with torch.inference_mode():
        layout = make()
    weight = torch.randn(4, 4, requires_grad=True)
    out = varlen_mha(torch.randn(2, 2, 4) @ weight, layout=layout)
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad.any()
    assert not layout.cu_seqlens.is_inference()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("how", ["context", "default"])
def test_a_default_device_changes_nothing(make: Callable[[], SeqLayout], how: str) -> None:
    x = torch.randn(2, 2, 4)
    expected, want = make(), varlen_mha(x, layout=make(), causal=True, window=(1, 0))
    if how == "context":
        with torch.device("meta"):
            layout, out = make(), varlen_mha(x, layout=expected, causal=True, window=(1, 0))
            pooled = layout.pool(layout.pack(x), "mean")
    else:
        torch.set_default_device("meta")
        try:
            layout, out = make(), varlen_mha(x, layout=expected, causal=True, window=(1, 0))
            pooled = layout.pool(layout.pack(x), "mean")
        finally:
            torch.set_default_device(None)
    assert_same(layout, expected)
    assert torch.equal(out, want)
    assert pooled.device.type == "cpu"
    assert layout.positions.device.type == "cpu"


def test_to_moves_everything_and_only_if_needed() -> None:
    for layout in every_kind():
        moved = layout.to("meta")
        assert {t.device.type for t in pytree.tree_leaves(moved) if isinstance(t, Tensor)} == {"meta"}
        assert moved.lengths == layout.lengths
        assert layout.to("cpu").token_indices is layout.token_indices
    assert SeqLayout.from_lengths([2, 1], device="meta").device.type == "meta"


@given(batch=batches())
@settings(max_examples=20)
def test_rotary_positions_packed_and_padded(batch: Batch) -> None:
    """R-30: rotating the padded tensor by each token's own position, then packing, is packing, then rotating."""
    layout = batch.layout
    position_BS = torch.zeros(batch.mask.shape, dtype=torch.int64)
    for b, columns in enumerate(tokens(batch.mask)):
        position_BS[b, columns] = torch.arange(len(columns))
    frequency = torch.tensor([1.0, 0.1])

    def rotate(x: Tensor, position: Tensor) -> Tensor:
        angle = position[..., None] * frequency
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    x = batch.tensor(4)
    assert torch.equal(layout.pack(rotate(x, position_BS)), rotate(layout.pack(x), layout.positions))


# -------------------------------------------------------------------- the inverted mask


def warned(call: Callable[[], Any]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [w for w in caught if issubclass(w.category, LayoutWarning)]


@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=6).filter(lambda c: len(set(c)) > 1),
    left=st.booleans(),
    form=st.sampled_from(("bool", "float", "int", "bool keep")),
)
def test_an_inverted_mask_warns_and_a_correct_one_does_not(counts: list[int], left: bool, form: str) -> None:
    """R-04, S2: padded to its longest row, every row with a token. Without any padding there is nothing to see (next test)."""
    size = max(counts)
    mask = torch.arange(size) >= torch.tensor(counts)[:, None]
    mask = mask.flip(1) if left else mask

    def build(mask: Tensor, **options: Any) -> SeqLayout:
        if form == "int":
            return SeqLayout.from_attention_mask((~mask).long(), **options)
        if form == "bool keep":
            return SeqLayout.from_attention_mask(~mask, **options)
        if form == "float":
            return SeqLayout.from_key_padding_mask(torch.zeros(mask.shape).masked_fill(mask, float("-inf")), **options)
        return SeqLayout.from_key_padding_mask(mask, **options)

    assert not warned(lambda: build(mask))
    (warning,) = warned(lambda: build(~mask))
    text = str(warning.message)
    assert f"row {counts.index(size)} of the mask has no token" in text
    assert "`key_padding_mask` marks padding with True" in text
    assert "`attention_mask` marks tokens with True" in text
    assert "validate=False" in text
    assert not warned(lambda: build(~mask, validate=False))
    assert not warned(lambda: build(~mask, capacity=mask.numel())), "capacity mode reads nothing, so it cannot know"


def test_no_warning_where_all_rows_or_no_rows_are_empty_or_lengths_are_given() -> None:
    assert not warned(lambda: SeqLayout.from_key_padding_mask(torch.ones(2, 3, dtype=torch.bool)))
    assert not warned(lambda: SeqLayout.from_key_padding_mask(torch.zeros(2, 3, dtype=torch.bool)))
    assert not warned(lambda: SeqLayout.from_lengths([3, 0]))
    assert not warned(lambda: SeqLayout.from_cu_seqlens(torch.tensor([0, 3, 3])))
    assert not warned(lambda: SeqLayout.from_document_ids(torch.tensor([[1, 1], [0, 0]])))


def test_rows_that_all_begin_with_padding_are_odd_where_true_is_padding() -> None:
    left = SeqLayout.from_lengths([2, 1, 2], 4, padding_side="left").padding_mask()
    (warning,) = warned(lambda: SeqLayout.from_key_padding_mask(left))
    assert "begin" in str(warning.message)
    assert not warned(lambda: SeqLayout.from_attention_mask(~left))
    assert not warned(lambda: SeqLayout.from_key_padding_mask(torch.cat([left, torch.zeros(1, 4, dtype=torch.bool)])))


def test_the_warning_blames_the_callers_file() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    x = torch.randn(2, 2, 4)
    for call in (lambda: SeqLayout.from_key_padding_mask(mask), lambda: varlen_mha(x, mask)):
        (warning,) = warned(call)
        assert warning.filename == __file__


# -------------------------------------------------------------------- reads


def test_the_counter_counts() -> None:
    """The control: each of these must be seen, once."""
    x = torch.tensor([True, False])
    controls: list[Callable[[], Any]] = [
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: x.nonzero(),
        lambda: torch.randn(2)[x],
        lambda: bool(x.any()),
        lambda: int(x.sum()),
        lambda: torch.repeat_interleave(x.long()),
        lambda: torch.masked_select(x, x),
        lambda: torch.equal(x, x),
    ]
    for control in controls:
        with count_reads() as reads:
            control()
        assert len(reads) == 1, reads
    with count_reads() as reads:
        torch.nonzero_static(x, size=2), x.cumsum(0), torch.randn(3)[torch.tensor([1])]
    assert reads == []


@given(mask=any_masks, data=st.data())
@settings(max_examples=30)
def test_reads_of_a_mask(mask: Tensor, data: st.DataObject) -> None:
    """R-05: a mask is read exactly once, whatever its form; capacity mode and lengths read nothing."""
    formed = data.draw(mask_dtypes(mask))
    with count_reads() as reads:
        of_mask(formed)
    assert reads == ["Tensor.tolist"]
    with count_reads() as reads:
        SeqLayout.from_attention_mask((~mask).long(), validate=False)
    assert reads == ["Tensor.tolist"]
    x = torch.randn(*mask.shape, 2, requires_grad=True)
    counts = (~mask).sum(1).tolist()
    offsets = torch.tensor([0, *counts]).cumsum(0)
    with count_reads() as reads:
        layout = of_mask(formed, capacity=mask.numel() + 1)
        layout.update_(mask)
        layout.pool(layout.pack(x), "mean")
        layout.unpack(layout.pack(x)).sum().backward()
        layout.compact()
        assert layout.positions is not None
        assert layout.columns is not None
        from_lengths = SeqLayout.from_lengths(counts, mask.shape[1])
        from_lengths.unpack(from_lengths.pack(x)).sum().backward()
        SeqLayout.from_cu_seqlens(offsets, mask.shape[1], total=sum(counts), validate=False)
        SeqLayout.from_document_ids(mask.long(), max_docs=mask.numel())
    assert reads == []
    with count_reads() as reads:
        SeqLayout.from_cu_seqlens(offsets)
    assert reads == ["Tensor.tolist"]


def test_a_batch_of_more_sequences_than_16_bits_hold() -> None:
    layout = SeqLayout.from_lengths([1, 0, 2] * 30_000)
    rows = torch.arange(90_000, dtype=torch.float64)
    pooled = layout.pool(rows, "sum").view(30_000, 3)
    triples = rows.view(30_000, 3)
    assert torch.equal(pooled, torch.stack([triples[:, 0], torch.zeros(30_000), triples[:, 1] + triples[:, 2]], 1).double())


# -------------------------------------------------------------------- masks that are not read are checked all the same


def test_illegal_values_are_refused_where_nothing_is_read() -> None:
    """S3, R-02: a 0/1 float mask is no mask of padding, in capacity mode and while tracing either."""
    wrong = torch.tensor([[0.0, 1.0, 1.0]])
    with pytest.raises(LayoutError, match="has other values"):
        SeqLayout.from_key_padding_mask(wrong, capacity=3)
    with pytest.raises(LayoutError, match="has other values"):
        SeqLayout.from_attention_mask(torch.tensor([[2, 1, 0]]), capacity=3)
    layout = SeqLayout.from_key_padding_mask(torch.tensor([[False, True, True]]), capacity=3)
    with pytest.raises(LayoutError, match="has other values"):
        layout.update_(wrong)
    compiled = torch.compile(lambda mask: SeqLayout.from_key_padding_mask(mask).cu_seqlens, backend="eager", fullgraph=True)
    assert compiled(torch.tensor([[0.0, -torch.inf, -1e4]])).tolist() == [0, 1]
    with pytest.raises(RuntimeError, match="has other values"):
        compiled(wrong)


@given(mask=masks())
def test_right_padded_says_whether_columns_are_positions(mask: torch.Tensor) -> None:
    layout = SeqLayout.from_key_padding_mask(mask, validate=False)
    assert layout.right_padded == bool((layout.columns == layout.positions).all())


@given(counts=lengths(), extra=st.one_of(st.none(), st.integers(0, 2)), dtype=st.sampled_from((torch.int64, torch.int32, torch.uint8)))
def test_from_batch_index_counts_the_nodes_of_each_graph(counts: list[int], extra: int | None, dtype: torch.dtype) -> None:
    batch = torch.tensor([graph for graph, n in enumerate(counts) for _ in range(n)], dtype=dtype)
    known = counts + [0] * (extra or 0)
    if extra is None:  # graphs without nodes at the end are not seen
        while known and not known[-1]:
            known.pop()
    layout = SeqLayout.from_batch_index(batch, None if extra is None else len(known))
    assert_same(layout, SeqLayout.from_lengths(known))
    assert torch.equal(layout.seq_ids, batch.long())
    assert SeqLayout.from_batch_index(batch, padded_len=20).padded_len == 20


@pytest.mark.parametrize(
    ("batch", "num_graphs", "error", "text"),
    [
        ([0, 1, 0], None, LayoutError, r"`batch` must be sorted, but batch\[2\] = 0 comes after 1: sort the nodes"),
        ([-1, 0], None, LayoutError, "`batch` must hold numbers from 0 to 16777217 without `num_graphs`, but holds -1"),
        ([0, 2**31], None, LayoutError, "`batch` must hold numbers from 0 to 16777217 without `num_graphs`, but holds 2147483648"),
        ([0, 2], 2, LayoutError, "`batch` must hold numbers from 0 to num_graphs - 1 = 1, but holds 2"),
        ([0], -1, LayoutError, "`num_graphs` must be an integer of at least 0, but is -1"),
        ([0.0], None, DtypeError, "`batch` must be a tensor of integers, but is torch.float32"),
        ([[0]], None, LayoutError, r"`batch` must be 1-D, but has shape \(1, 1\)"),
    ],
)
def test_from_batch_index_refuses_what_is_no_batch_vector(batch: list[Any], num_graphs: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SeqLayout.from_batch_index(torch.tensor(batch), num_graphs)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_from_nested_names_what_it_got() -> None:
    strided = torch.nested.as_nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)], layout=torch.strided)
    for wrong, text in ((strided, "torch.strided"), (torch.zeros(2, 3), r"of shape \(2, 3\)"), ([1, 2], "'list'")):
        with pytest.raises(LayoutError, match=text):
            SeqLayout.from_nested(wrong)


# -------------------------------------------------------------------- downsample

windows = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 4), st.integers(1, 3))  # kernel, stride, padding, dilation


def frames_alone(length: int, window: tuple[int, int, int, int]) -> int:
    """What a real convolution makes of one sample; 0 where torch refuses it, or there is no sample."""
    kernel, stride, padding, dilation = window
    conv = nn.Conv1d(1, 1, kernel, stride, padding, dilation).double()  # oneDNN's (float32) crashes where padding is wider than the kernel
    if length and length + 2 * padding <= dilation * (kernel - 1):
        with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
            conv(torch.zeros(1, 1, length, dtype=torch.float64))
        return 0
    return conv(torch.zeros(1, 1, length, dtype=torch.float64)).shape[-1] if length else 0


@given(counts=lengths(max_len=12), extra=st.integers(0, 3), window=windows, holes=st.sampled_from(("refuse", "packed")))
def test_downsample_counts_the_frames_of_each_sample_alone(counts: list[int], extra: int, window: Any, holes: Any) -> None:
    size = max(counts, default=0) + extra
    layout = of_mask(torch.arange(size) >= torch.tensor(counts, dtype=torch.int64)[:, None], holes=holes)
    expected = SeqLayout.from_lengths([frames_alone(n, window) for n in counts], frames_alone(size, window))
    with count_reads() as reads:
        frames = layout.downsample(*window)
    assert reads == []
    assert_same(frames, dataclasses.replace(expected, holes=holes))
    assert frames.device == layout.device
    assert layout.to("meta").downsample(*window).device.type == "meta"


@given(
    counts=lengths(max_len=12),
    slack=st.one_of(st.none(), st.integers(0, 3)),
    window=windows,
    after=windows,
)
def test_downsample_of_lengths_that_only_the_device_knows(counts: list[int], slack: int | None, window: Any, after: Any) -> None:
    """R-40, R-47: the same frames, static shapes, nothing read, twice in a row; ``slack`` None is offsets that nobody read."""
    exact = SeqLayout.from_lengths(counts)
    if slack is None:
        layout = SeqLayout.from_cu_seqlens(exact.cu_seqlens, exact.padded_len, total=exact.total, validate=False)
    else:
        layout = SeqLayout.from_key_padding_mask(exact.padding_mask(), capacity=exact.num_rows + slack)
    for step in (window, after):
        exact = exact.downsample(*step)
        with count_reads() as reads:
            layout = layout.downsample(*step)
        assert reads == []
        total = exact.num_rows
        assert (layout.lengths, layout.has_slack, layout.padded_len) == (None, True, exact.padded_len)
        assert total <= layout.num_rows <= layout.batch_size * layout.padded_len
        for name in ("cu_seqlens", "gather_indices"):
            assert torch.equal(getattr(layout, name), getattr(exact, name))
        assert torch.equal(layout.token_indices[:total], exact.token_indices)
        assert not layout.token_indices[total:].any()


def test_rows_of_capacity_follow_from_shapes_only() -> None:  # R-40, for CUDA graphs
    masks_of_one_shape = torch.arange(8) >= torch.tensor([[8, 8], [1, 0], [3, 4]])[..., None]
    rows = {of_mask(mask, capacity=16).downsample(3, 2, 1).num_rows for mask in masks_of_one_shape}
    assert rows == {8}
    assert of_mask(masks_of_one_shape[2], capacity=7).downsample(3, 1, 1).num_rows == 7, "lengths that stay need no more rows"
    frames = of_mask(masks_of_one_shape[0], capacity=16).downsample(3, 2, 1)
    other = of_mask(masks_of_one_shape[2]).downsample(3, 2, 1)
    assert torch.equal(frames.update_(other.padding_mask()).gather_indices, other.gather_indices)


def test_the_comparison_of_frames_can_fail() -> None:
    """Mutants: lengths divided by the stride, no dilation, an empty sequence that gives frames."""
    window, counts = (2, 3, 3, 2), (8, 6, 0)
    assert SeqLayout.from_lengths(counts).downsample(*window).lengths == tuple(frames_alone(n, window) for n in counts)
    kernel, stride, padding, dilation = window
    for mutant in (
        lambda n: n // stride,
        lambda n: -(-n // stride),
        lambda n: (n + 2 * padding - kernel) // stride + 1 if n else 0,
        lambda n: (n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1,
    ):
        assert tuple(map(mutant, counts)) != tuple(frames_alone(n, window) for n in counts)


def test_chained_downsampling_of_known_models() -> None:  # R-47, S23
    layout = SeqLayout.from_lengths([16000, 15900, 399, 0])
    for kernel, stride in ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)):  # wav2vec 2.0, where 16000 // 320 is 50
        layout = layout.downsample(kernel, stride)
    assert layout.lengths == (49, 49, 0, 0)
    assert SeqLayout.from_lengths([3000, 1]).downsample(3, 1, 1).downsample(3, 2, 1).lengths == (1500, 1)  # Whisper


def test_one_frame_too_many_or_too_few_names_both_numbers() -> None:  # R-47, S23
    frames = SeqLayout.from_lengths([100, 60]).downsample(2, 2)
    for columns in (49, 51):
        text = (
            rf"`x` must begin with 2x50 .* has shape \(2, {columns}, 8\)\..* It has {columns} columns where the layout has 50: .*downsample"
        )
        with pytest.raises(LayoutError, match=text):
            frames.pack(torch.zeros(2, columns, 8))
    with pytest.raises(LayoutError) as caught:
        frames.pack(torch.zeros(3, 50, 8))
    assert "downsample" not in str(caught.value), "another batch is no matter of frames"


@given(batch=batches(), capacity=st.booleans())
def test_downsample_needs_all_padding_on_the_right(batch: Batch, capacity: bool) -> None:
    layout = of_mask(batch.mask, capacity=batch.mask.numel()) if capacity else batch.layout
    if batch.layout.right_padded:
        assert layout.downsample(1, 1).num_rows == layout.num_rows
        return
    with pytest.raises(LayoutError, match=r"must have all padding on the right .* (before|between) tokens.*layout.compact\(\)"):
        layout.downsample(3, 2)
    assert layout.compact().downsample(3, 2).num_seqs == batch.layout.num_seqs, "the way out that the message names"


def test_downsample_refuses_documents_and_names_the_form() -> None:
    for max_docs in (None, 3):
        documents = SeqLayout.from_document_ids(torch.tensor([[1, 1, 1, 2, 2]]), max_docs=max_docs)
        with pytest.raises(LayoutError, match=r"several documents a row: downsample layout.compact\(\)"):
            documents.downsample(3, 2)
        assert documents.compact().downsample(2, 2).cu_seqlens[:3].tolist() == [0, 1, 2]
    with pytest.raises(LayoutError, match="padding between tokens"):
        of_mask(torch.tensor([[False, True, False]])).downsample(3, 2)
    with pytest.raises(LayoutError, match="padding before tokens"):
        SeqLayout.from_lengths([2, 1], padding_side="left").downsample(3, 2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(kernel=0), "`kernel` must be an integer of at least 1, but is 0"),
        (dict(kernel=(3,)), r"`kernel` must be an integer of at least 1, but is \(3,\): of an nn.Conv1d pass conv.kernel_size\[0\]"),
        (dict(kernel=True), "`kernel` must be an integer of at least 1, but is True"),
        (dict(stride=0), r"`stride` must be an integer of at least 1, but is 0: .*conv.stride\[0\]"),
        (dict(stride=2.0), "`stride` must be an integer of at least 1, but is 2.0"),
        (dict(padding=-1), "`padding` must be an integer of at least 0, but is -1"),
        (dict(padding="same"), "`padding` must be an integer of at least 0, but is 'same': .*stride 1 needs no other layout"),
        (dict(dilation=0), r"`dilation` must be an integer of at least 1, but is 0: .*conv.dilation\[0\]"),
    ],
)
def test_downsample_names_a_bad_argument(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        SeqLayout.from_lengths([4, 2]).downsample(**(dict(kernel=3, stride=2) | arguments))


def test_downsampled_in_inference_mode_and_used_in_training() -> None:  # S24
    for layout in (SeqLayout.from_lengths([4, 2]), of_mask(torch.tensor([[False, False, True]]), capacity=3)):
        with torch.inference_mode():
            frames = layout.downsample(2, 2)
        x = torch.randn(frames.num_rows, 1, requires_grad=True)
        frames.unpack(x).square().sum().backward()
        assert x.grad is not None
