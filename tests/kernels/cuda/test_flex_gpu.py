"""flex_attention compiled for a GPU, on several blocks of 128 rows: what `test_flex.py` checks with a stand-in, by the kernel itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from varlen_attn import SeqLayout, varlen_attention
from varlen_attn.testing import reference_attention

from .test_flex import CASES, check, relative, t5, tensors

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # compilers warn of what they like
MORE: dict[str, Any] = {
    "blocks": ([1000, 300, 0, 129, 700], None, (4, 2), (64, 64), dict(causal=True)),
    "blocks, unequal lengths": ([400, 300, 129], [900, 0, 500], (2, 2), (64, 32), dict(window=(200, 10))),
    "blocks, no multiple of 16": ([400, 300, 129], None, (2, 2), (40, 72), dict(causal=True, window=(130, None))),
}
# Every kind of call compiles for ten seconds or so: all of them in one dtype, the largest in the others.
CALLS = [(case, torch.bfloat16) for case in (*CASES, *MORE)] + [
    (case, dtype) for case in ("everything", *MORE) for dtype in (torch.float32, torch.float16)
]


def on_gpu(qkv: list[Tensor]) -> list[Tensor]:
    return [x.detach().cuda().requires_grad_() for x in qkv]


@pytest.mark.parametrize(("case", "dtype"), CALLS, ids=str)
def test_matches_the_reference_forward_and_backward(case: str, dtype: torch.dtype) -> None:
    lengths_q, lengths_k, heads, dims, options = (CASES | MORE)[case]
    layouts = tuple(None if x is None else SeqLayout.from_lengths(x, device="cuda") for x in (lengths_q, lengths_k))
    options = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
    check(on_gpu(tensors(lengths_q, lengths_k or lengths_q, heads, dims, dtype)), layouts, backend="flex", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("make", "shape"), [(t5, (16, 2)), (relative, (2, 13)), (None, (2, 700, 700))])
def test_biases_and_their_gradients(make: Any, shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape, device="cuda", requires_grad=True)
    lengths = [400, 3, 700]
    qkv = on_gpu(tensors(lengths, lengths, (2, 2), (32, 32), torch.float32))
    given = bias if make is None else make(bias)
    layout = SeqLayout.from_lengths(lengths, device="cuda")
    check(qkv, (layout, None), backend="flex", score_bias=given)
    grads = [
        torch.autograd.grad(call(*qkv, layout, score_bias=given, **how).square().sum(), bias)[0]
        for call, how in ((varlen_attention, dict(backend="flex")), (reference_attention, {}))
    ]
    # Each entry of a table is the sum of up to half a million terms, added one by one: not what a budget of rounding steps is for.
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-3 * float(grads[1].abs().max()))


def test_slack_rows_and_other_lengths_in_place() -> None:
    masks = [torch.arange(300) >= torch.tensor(lengths)[:, None] for lengths in ([300, 5, 140], [0, 260, 200])]
    layout = SeqLayout.from_key_padding_mask(masks[0].cuda(), capacity=512)
    x = torch.randn(512, 2, 64, device="cuda", dtype=torch.bfloat16)
    for mask, causal in itertools.product(masks, (False, True)):
        layout.update_(mask.cuda())
        total = int((~mask).sum())
        x[total:] = float("nan")
        got = varlen_attention(x, x, x, layout, backend="flex", causal=causal)
        assert not got[total:].any()
        exact = SeqLayout.from_key_padding_mask(mask.cuda())
        x = x.nan_to_num(1.0)
        want = varlen_attention(*[x[:total].float()] * 3, exact, backend="reference", causal=causal)
        torch.testing.assert_close(got[:total].float(), want, atol=2e-2, rtol=2e-2)
