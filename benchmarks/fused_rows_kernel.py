"""The kernel of `fused_rows`, in a file of its own because it imports triton."""

import triton
import triton.language as tl


@triton.jit
def _copy_block(src, out, stride, width, pad, row, inside, found, take, BLOCK_WORDS: tl.constexpr):
    """``out[row] = src[found] if take else pad`` for a block of columns. ``row`` and ``found`` are int64, and so are all offsets."""
    column = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    real = (column < width)[None, :]
    words = tl.load(src + found[:, None] * stride + column[None, :], mask=take[:, None] & real, other=pad)
    tl.store(out + row[:, None] * width + column[None, :], words, mask=inside[:, None] & real)


@triton.jit(do_not_specialize=["rows", "pad_0", "pad_1", "pad_2"])  # data: a number of rows must not compile another kernel
def copy_rows(
    index, base, count, rows,
    src_0, out_0, stride_0, width_0, pad_0,
    src_1, out_1, stride_1, width_1, pad_1,
    src_2, out_2, stride_2, width_2, pad_2,
    HAS_COUNT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """Row i of each ``out`` is row ``index[i] - base`` of its ``src``; all ``pad`` where that is negative, or i is not below ``count``.

    Widths and strides count words, the type of the pointers. The grid is (blocks of rows, blocks of columns, tensors).
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    found = tl.load(index + row, mask=inside, other=0) - base
    take = inside & (found >= 0)
    if HAS_COUNT:
        take = take & (row < tl.load(count))
    which = tl.program_id(2)
    if which == 0:
        _copy_block(src_0, out_0, stride_0, width_0, pad_0, row, inside, found, take, BLOCK_WORDS)
    elif which == 1:
        _copy_block(src_1, out_1, stride_1, width_1, pad_1, row, inside, found, take, BLOCK_WORDS)
    else:
        _copy_block(src_2, out_2, stride_2, width_2, pad_2, row, inside, found, take, BLOCK_WORDS)
