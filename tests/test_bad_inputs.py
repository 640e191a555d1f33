# ruff: noqa: E501 (a table: one row a line)
"""Inputs that other libraries refuse without a word of help, or answer wrongly: served, or refused by name, value and fix.

The ids name the table and its row: ``a`` is what upstream rejects, ``S`` what it answers wrongly, ``p`` the peers' wrong answers.
Rows that are tested by value stand with what they are about: layouts, calls, dispatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from varlen_attn import (
    ArgumentError,
    BackendRefused,
    DtypeError,
    LayoutError,
    LayoutWarning,
    SeqLayout,
    VarlenError,
    VarlenWarning,
    explain,
    padded_attention,
    use_backend,
    varlen_attention,
    varlen_mha,
)
from varlen_attn.errors import UnknownArgument

LAYOUT = SeqLayout.from_lengths([3, 0, 2])
MASK = torch.tensor([[False, False, False], [True, True, True], [False, False, True]])


def packed(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (5, 2, 8)), dtype=dtype)


def attend(q: Any = None, k: Any = None, v: Any = None, layout: Any = LAYOUT, **options: Any) -> Any:
    q = packed() if q is None else q
    k = q if k is None else k
    return varlen_attention(q, k, k if v is None else v, layout, **options)


def padded(
    q: tuple[int, ...] = (3, 3, 2, 8), k: tuple[int, ...] | None = None, v: tuple[int, ...] | None = None, *mask: Any, **options: Any
) -> Any:
    k = k or q
    return padded_attention(torch.randn(q), torch.randn(k), torch.randn(v or k), *mask, **options)


def mha(*shape: int, **options: Any) -> Any:
    return varlen_mha(torch.randn(*(shape or (2, 3, 8))), **options)


Refused = tuple[str, type[Exception], Callable[[], Any], str]

SDPA: list[Refused] = [
    (f"sdpa {name} of {function}", UnknownArgument, call, rf"^{function}\(\) got an unexpected keyword argument '{name}': {fix}")
    for name, fix in (
        ("is_causal", "pass causal='top_left'"), ("attn_mask", "pass causal= or window="), ("enable_gqa", "leave it out"),
        ("dropout", "the nearest is dropout_p"),
    )
    for function, call in (
        ("varlen_attention", lambda name=name: attend(**{name: True})),
        ("padded_attention", lambda name=name: padded(**{name: True})),
        ("explain", lambda name=name: explain(packed(), packed(), packed(), LAYOUT, **{name: True})),
        ("varlen_mha", lambda name=name: mha(**{name: True})),
    )
]  # fmt: skip

REFUSED: list[Refused] = [
    *SDPA,
    ("sdpa heads first, mask", LayoutError, lambda: padded((3, 2, 4, 8), None, None, torch.zeros(3, 4, dtype=torch.bool)), r"pass key\.transpose\(1, 2\)\.$"),
    ("sdpa heads first, layout", LayoutError, lambda: padded((3, 2, 4, 8), layout=SeqLayout.from_lengths([4, 1, 2])), r"pass query\.transpose\(1, 2\)\.$"),
    ("sdpa heads first, packed", LayoutError, lambda: attend(packed(2, 5, 8)), r"pass query\.transpose\(0, 1\)\.$"),
    ("a mask of numpy", DtypeError, lambda: padded((3, 3, 2, 8), None, None, MASK.numpy()), r"`key_padding_mask` must be a tensor, but is ndarray: pass torch.as_tensor\(key_padding_mask\)"),
    ("a mask in a list", DtypeError, lambda: SeqLayout.from_key_padding_mask(MASK.tolist()), r"pass torch.as_tensor\(mask\)"),
    ("a bias that is a number", ArgumentError, lambda: attend(score_bias=lambda h, i, j: 0.0), r"`score_bias` must be a tensor .* or a callable \(head, q_position, k_position\).*returns 'float'"),
    ("a bias of torch's form", ArgumentError, lambda: attend(score_bias=lambda b, h, i, j: i - j), r"`score_bias` must be .*raises TypeError.*missing 1"),
    ("a bias of flex's form", ArgumentError, lambda: attend(score_bias=lambda s, b, h, i, j: s), r"`score_bias` must be .*raises TypeError.*missing 2"),
    ("a bias of another shape", ArgumentError, lambda: attend(score_bias=lambda h, i, j: torch.zeros(7, 7, 7)), r"`score_bias` must be .*returns torch.float32, of shape \(7, 7, 7\)"),
    ("a bias of nothing", ArgumentError, lambda: attend(score_bias=lambda h, i, j: None), r"`score_bias` must be .*returns 'NoneType'"),
    # ---- 3a
    ("a2 mixed dtypes", DtypeError, lambda: attend(packed(), packed().half()), r"query is float32, key is float16, value is float16: convert"),
    ("a2 not a float", DtypeError, lambda: attend(packed().long()), r"must be float16, bfloat16, float32 or float64, but query is int64"),
    ("a5 tensor on another device", LayoutError, lambda: attend(packed().to("meta")), r"`query` is on meta, but the layout is on cpu: call layout\.to"),
    ("a7 mask of rank 4", LayoutError, lambda: SeqLayout.from_key_padding_mask(MASK[:, None, None]), r"`mask` must have shape \(B, S\), but has shape \(3, 1, 1, 3\).*reduce"),
    ("a7 mask of rank 3", LayoutError, lambda: SeqLayout.from_attention_mask(MASK[:, None].expand(3, 3, 3)), r"`mask` must have shape \(B, S\).*\(3, 3, 3\)"),
    ("a7 mask of rank 1", LayoutError, lambda: SeqLayout.from_key_padding_mask(MASK[0]), r"has shape \(3,\)"),
    ("a7 mask for mha", LayoutError, lambda: mha(3, 3, 8, key_padding_mask=MASK[:, None]), r"`key_padding_mask` must have x's \(B, S\) = \(3, 3\), but has shape \(3, 1, 3\)"),
    ("a12 heads", ArgumentError, lambda: attend(packed(5, 6, 8), packed(5, 4, 8)), r"query heads must be a multiple of key/value heads, but they are 6 and 4"),
    ("a12 no heads", ArgumentError, lambda: attend(packed(5, 0, 8)), r"multiple of key/value heads, but they are 0 and 0"),
    ("a12 width", ArgumentError, lambda: mha(num_heads=3), r"`num_heads` must divide the width of x \(8\), but is 3"),
    ("a12 no number", ArgumentError, lambda: mha(num_heads=2.0), r"`num_heads` must be a positive integer, but is 2\.0"),
    ("a23 nested", ArgumentError, lambda: attend(torch.nested.as_nested_tensor([torch.randn(3, 2, 8)], layout=torch.jagged)), r"`query` must be a plain packed tensor, but is nested: pass its values\(\)"),
    ("a24 integers as key_padding_mask", DtypeError, lambda: mha(3, 3, 8, key_padding_mask=MASK.long()), r"(?s)`mask` must be bool or float, but is torch\.int64.*only bool and floating types of key_padding_mask are supported.*True \(torch\).*from_attention_mask"),
    ("a26 bytes as key_padding_mask", DtypeError, lambda: SeqLayout.from_key_padding_mask(MASK.byte()), r"torch\.uint8.*mask\.bool\(\)"),
    ("a24 floats as attention_mask", DtypeError, lambda: SeqLayout.from_attention_mask(MASK.float()), r"`mask` must be bool or an integer dtype.*torch\.float32.*from_key_padding_mask"),
    ("a31 batch second", LayoutError, lambda: mha(4, 3, 8, key_padding_mask=torch.zeros(3, 4, dtype=torch.bool)), r"`key_padding_mask` must have x's \(B, S\) = \(4, 3\), but has shape \(3, 4\).*sliced"),
    ("a38 slopes with gradient", ArgumentError, lambda: attend(alibi_slopes=torch.ones(2, requires_grad=True)), r"`alibi_slopes` must not require a gradient.*score_bias"),
    # ---- 3b
    ("S3 0/1 float mask", LayoutError, lambda: SeqLayout.from_key_padding_mask(MASK.float()), r"`mask\[1, 0\]` must be 0 \(token\), -inf or at most -1e4 \(padding\), but is 1\.0"),
    ("S3 a bias", LayoutError, lambda: SeqLayout.from_key_padding_mask(torch.tensor([[0.0, -5.0]])), r"`mask\[0, 1\]` .* is -5\.0"),
    ("S3 NaN", LayoutError, lambda: SeqLayout.from_key_padding_mask(torch.tensor([[0.0, math.nan]])), r"`mask\[0, 1\]` .* is nan"),
    ("S3 ids as a mask", LayoutError, lambda: SeqLayout.from_attention_mask(torch.tensor([[1, 0], [1, 7]])), r"`mask\[1, 1\]` must be 0 or 1, but is 7: pass \(ids != pad_id\)"),
    ("S3 bool bias", DtypeError, lambda: attend(score_bias=torch.zeros(2, 3, 3, dtype=torch.bool)), r"`score_bias` must be a floating-point tensor.*torch\.bool"),
    ("S6 too long", LayoutError, lambda: SeqLayout.from_lengths([2, 5], 4), r"`lengths\[1\]` must be at most padded_len = 4, but is 5: give the number of columns"),
    ("S7 wrong rows", LayoutError, lambda: attend(packed(6, 2, 8)), r"`query` must begin with 5 \(this layout has B=3, S=3, T=5\), but has shape \(6, 2, 8\)"),
    ("S9 other length, one mask", LayoutError, lambda: padded((3, 2, 2, 8), (3, 3, 2, 8), None, MASK), r"`key_padding_mask` alone means self-attention.*\(3, 2\) and \(3, 3\).*query_padding_mask"),
    ("S9 mask of the queries", LayoutError, lambda: padded((3, 2, 2, 8), (3, 3, 2, 8), None, MASK[:, :2], query_padding_mask=False), r"`key_padding_mask` must have key's \(B, S\) = \(3, 3\), but has shape \(3, 2\)\. Nothing is sliced"),
    ("S9 mask of the keys", LayoutError, lambda: padded((3, 2, 2, 8), (3, 3, 2, 8), None, MASK, query_padding_mask=MASK), r"`query_padding_mask` must have query's \(B, S\) = \(3, 2\), but has shape \(3, 3\)"),
    ("S11 dropout, unsaid", ArgumentError, lambda: mha(dropout_p=0.1), r"`training` must be True or False where dropout_p > 0, but is None"),
    ("S14 negative window", ArgumentError, lambda: attend(window=(-1, 0)), r"`window` must be None or \(left, right\), each None \(unlimited\) or an integer of at least 0, but is \(-1, 0\)"),
    ("S14 one number", ArgumentError, lambda: attend(window=4), r"`window` must be .* but is 4"),
    ("S14 three numbers", ArgumentError, lambda: attend(window=(1, 2, 3)), r"`window` must be .* but is \(1, 2, 3\)"),
    ("S23 one frame off", LayoutError, lambda: mha(2, 5, 8, key_padding_mask=torch.zeros(2, 4, dtype=torch.bool)), r"x's \(B, S\) = \(2, 5\), but has shape \(2, 4\)"),
    # ---- peers
    ("p6 a causal mask is no padding mask", LayoutError, lambda: padded((3, 3, 2, 8), None, None, torch.ones(3, 1, 3, 3, dtype=torch.bool)), r"`key_padding_mask` must have key's \(B, S\) = \(3, 3\), but has shape \(3, 1, 3, 3\)"),
    # ---- and every other argument
    ("no layout", ArgumentError, lambda: attend(layout=MASK), r"`layout` must be a SeqLayout, but is Tensor: build one with SeqLayout\.from_key_padding_mask"),
    ("no layout_kv", ArgumentError, lambda: attend(layout_kv=MASK), r"`layout_kv` must be a SeqLayout, but is Tensor"),
    ("no tensor", DtypeError, lambda: attend([1.0]), r"`query` must be a tensor, but is list"),
    ("padded instead of packed", LayoutError, lambda: attend(packed(3, 3, 2, 8)), r"`query` must be packed, \(T, N, H\), but has shape \(3, 3, 2, 8\): pack padded tensors with layout\.pack"),
    ("packed instead of padded", LayoutError, lambda: padded((5, 2, 8)), r"`query` must have shape \(B, S, heads, head_dim\), but has shape \(5, 2, 8\)"),
    ("values of other shape", LayoutError, lambda: padded((3, 3, 2, 8), (3, 3, 2, 8), (3, 4, 2, 8)), r"`value` must begin with key's \(B, S, K\) = \(3, 3, 2\), but has shape \(3, 4, 2, 8\)"),
    ("value heads", ArgumentError, lambda: attend(packed(), packed(), packed(5, 1, 8)), r"`value` must have as many heads as key \(2\), but has 1"),
    ("head dimension", ArgumentError, lambda: attend(packed(), packed(5, 2, 16)), r"`key` must have the head dimension of query \(8\), but has 16"),
    ("sequences", LayoutError, lambda: attend(layout_kv=SeqLayout.from_lengths([3, 2])), r"`layout` and `layout_kv` must have equally many sequences, but have 3 and 2"),
    ("padded, layout of the other side", LayoutError, lambda: padded((3, 3, 2, 8), (3, 4, 2, 8), None, layout=LAYOUT), r"`key` must begin with 3x3 .* but has shape \(3, 4, 2, 8\)"),
    ("negative max_docs", LayoutError, lambda: SeqLayout.from_document_ids(torch.ones(2, 3, dtype=torch.int64), max_docs=-1), r"`max_docs` must be an integer of at least 0, but is -1"),
    ("lengths are one number", DtypeError, lambda: SeqLayout.from_lengths(3), r"`lengths` must be a list, tuple or 1-D tensor of integers, but is 'int'"),
    ("capacity is no integer", ArgumentError, lambda: SeqLayout.from_key_padding_mask(MASK, capacity=2.5), r"`capacity` must be an integer of at least 0, but is 2.5"),
    ("num_heads is True", ArgumentError, lambda: mha(3, 3, 8, num_heads=True), r"`num_heads` must be a positive integer, but is True"),
    ("a mask as layout", ArgumentError, lambda: mha(3, 3, 8, layout=MASK), r"`layout` must be a SeqLayout, but is Tensor: build one with"),
    ("an endless padding value for integers", ArgumentError, lambda: LAYOUT.unpack(torch.zeros(LAYOUT.num_rows, dtype=torch.int64), float("inf")), r"`pad_value` must be an integer for a tensor of torch.int64, but is inf"),
    ("half a padding value for integers", ArgumentError, lambda: LAYOUT.unpack(torch.zeros(LAYOUT.num_rows, dtype=torch.int64), 0.5), r"`pad_value` must be an integer for a tensor of torch.int64, but is 0.5"),
    ("mask and layout", ArgumentError, lambda: padded((3, 3, 2, 8), None, None, MASK, layout=LAYOUT), r"not both: nothing says which one counts"),
    ("mask and layout, mha", ArgumentError, lambda: mha(3, 3, 8, key_padding_mask=MASK, layout=LAYOUT), r"`key_padding_mask` or `layout`, not both"),
    ("mask is a list", DtypeError, lambda: mha(1, 2, 8, key_padding_mask=[[True, False]]), r"`key_padding_mask` must be a tensor, but is list"),
    ("packed without layout", LayoutError, lambda: mha(5, 8), r"`x` of shape \(5, 8\) is packed, so `layout` must be given"),
    ("x of rank 4", LayoutError, lambda: mha(2, 3, 2, 8), r"`x` must be \(B, S, D\).*but has shape \(2, 3, 2, 8\)"),
    ("stacked by two", LayoutError, lambda: mha(2, 3, 2, 2, 8), r"stacked `x` must have shape \(B, S, 3, N, H\), but has shape \(2, 3, 2, 2, 8\)"),
    ("stacked and projected", ArgumentError, lambda: mha(2, 3, 3, 2, 8, in_proj_weight=torch.zeros(1)), r"pass no in_proj or out_proj weights"),
    ("in_proj_weight", ArgumentError, lambda: mha(in_proj_weight=torch.zeros(8, 8)), r"`in_proj_weight` must have shape \(24, 8\) for x of width 8, but has shape \(8, 8\)"),
    ("out_proj_bias alone", ArgumentError, lambda: mha(out_proj_bias=torch.zeros(8)), r"`out_proj_bias` is given without `out_proj_weight`"),
    ("causal", ArgumentError, lambda: attend(causal="left"), r"`causal` must be False, True, 'bottom_right' or 'top_left', but is 'left'"),
    ("scale", ArgumentError, lambda: attend(scale=math.nan), r"`scale` must be a finite number or None, but is nan"),
    ("softcap", ArgumentError, lambda: attend(softcap=0.0), r"`softcap` must be above 0, but is 0\.0: for no cap pass None"),
    ("dropout_p", ArgumentError, lambda: attend(dropout_p=1.5), r"`dropout_p` must be between 0 and 1, but is 1\.5"),
    ("dropout_p is a string", ArgumentError, lambda: attend(dropout_p="0.1"), r"`dropout_p` must be between 0 and 1, but is '0\.1'"),
    ("dropout_p in evaluation", ArgumentError, lambda: mha(dropout_p=1.5, training=False), r"`dropout_p` must be between 0 and 1, but is 1\.5"),
    ("slopes", ArgumentError, lambda: attend(alibi_slopes=torch.ones(3)), r"`alibi_slopes` must have shape \(N,\) = \(2,\), but has shape \(3,\)"),
    ("slopes of integers", DtypeError, lambda: attend(alibi_slopes=torch.ones(2, dtype=torch.long)), r"`alibi_slopes` must be a floating-point tensor, but is torch\.int64"),
    ("sinks", ArgumentError, lambda: attend(sinks=torch.ones(2, 1)), r"`sinks` must have shape \(N,\) = \(2,\), but has shape \(2, 1\)"),
    ("sinks elsewhere", ArgumentError, lambda: attend(sinks=torch.ones(2, device="meta")), r"`sinks` must be on cpu, as query is, but is on meta"),
    ("bias heads", ArgumentError, lambda: attend(score_bias=torch.zeros(1, 3, 3)), r"`score_bias` must have shape \(N, Sq, Sk\) with N = 2, but has shape \(1, 3, 3\)"),
    ("bias too small", ArgumentError, lambda: attend(score_bias=torch.zeros(2, 1, 3)), r"`score_bias` must reach to position 3 of queries and 3 of keys, but has shape \(2, 1, 3\)"),
    ("bias too narrow", ArgumentError, lambda: attend(score_bias=torch.zeros(2, 3, 2)), r"`score_bias` must reach to .* but has shape \(2, 3, 2\)"),
    ("bias elsewhere", ArgumentError, lambda: attend(score_bias=torch.zeros(2, 3, 3, device="meta")), r"`score_bias` must be on cpu, as query is, but is on meta"),
    ("bias", DtypeError, lambda: attend(score_bias="alibi"), r"`score_bias` must be a tensor or a callable, but is str"),
    ("backend name", ArgumentError, lambda: attend(backend="flahs2"), r"`backend` must be 'auto' or one of \[.*'cpu'.*\], but is 'flahs2'"),
    ("backend None", ArgumentError, lambda: attend(backend=None), r"`backend` must be 'auto', a name or a Backend, but is None"),
    ("use_backend name", ArgumentError, lambda: use_backend("flahs2").__enter__(), r"`name` must be 'auto' or one of \[.*\], but is 'flahs2'"),
    ("capacity", LayoutError, lambda: SeqLayout.from_key_padding_mask(MASK, capacity=4), r"`capacity` must hold all tokens, but there are more than 4: raise it"),
    ("holes", ArgumentError, lambda: SeqLayout.from_key_padding_mask(MASK, holes="ok"), r"`holes` must be 'refuse' or 'packed', but is 'ok'"),
    ("padding_side", ArgumentError, lambda: SeqLayout.from_lengths([1], 2, "middle"), r"`padding_side` must be 'right' or 'left', but is 'middle'"),
    ("negative length", LayoutError, lambda: SeqLayout.from_lengths([2, -1]), r"`lengths\[1\]` must be at least 0, but is -1"),
    ("negative padded_len", LayoutError, lambda: SeqLayout.from_lengths([], -1), r"`padded_len` must be an integer of at least 0, but is -1"),
    ("float lengths", DtypeError, lambda: SeqLayout.from_lengths([1.0]), r"`lengths\[0\]` must be an integer, but is 1\.0"),
    ("float lengths in a tensor", DtypeError, lambda: SeqLayout.from_lengths(torch.ones(2)), r"`lengths` must be a tensor of integers, but is torch\.float32"),
    ("lengths of rank 2", LayoutError, lambda: SeqLayout.from_lengths(torch.ones(2, 2, dtype=torch.long)), r"`lengths` must be 1-D, but has shape \(2, 2\)"),
    ("offsets in a list", DtypeError, lambda: SeqLayout.from_cu_seqlens([0, 2]), r"`cu_seqlens` must be a tensor of integers, but is 'list'"),
    ("bool ids", DtypeError, lambda: SeqLayout.from_document_ids(MASK), r"`ids` must have an integer dtype, but is torch\.bool: number the documents"),
    ("mask in a list", DtypeError, lambda: SeqLayout.from_key_padding_mask([[True]]), r"`mask` must be a tensor, but is 'list'"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::varlen_attn.LayoutWarning")  # MASK has an empty row on purpose
@pytest.mark.parametrize(("error", "call", "text"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused_by_name_value_and_fix(error: type[Exception], call: Callable[[], Any], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        call()
    assert type(caught.value) is error
    assert isinstance(caught.value, VarlenError)
    assert len(str(caught.value)) < 600


def test_classes_are_pythons_too() -> None:
    """Callers that catch what upstream raises catch ours."""
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(LayoutError, ArgumentError)
    assert issubclass(DtypeError, TypeError)
    assert issubclass(BackendRefused, RuntimeError)


@pytest.mark.parametrize(
    "row", [r for r in REFUSED if "attend" in r[2].__code__.co_names and not r[0].startswith(("sdpa ", "a bias"))][::4], ids=lambda r: r[0]
)
def test_explain_raises_what_the_call_raises(row: Refused) -> None:
    _, error, call, text = row
    calls = globals()["varlen_attention"]
    try:
        globals()["varlen_attention"] = explain
        with pytest.raises(error, match=text):
            call()
    finally:
        globals()["varlen_attention"] = calls


def equal(got: Tensor, want: Tensor) -> bool:
    return got.dtype == want.dtype and torch.allclose(got, want, atol=1e-5)


def plain(q: Tensor, k: Tensor | None = None, v: Tensor | None = None, scale: float | None = None) -> Tensor:
    """``(B,S,N,H)`` of lengths 3, 0, 2, in float32."""
    k = q if k is None else k
    v = k if v is None else v
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("binh,bjnh->bnij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(MASK[:, None, None], -1e9).softmax(-1)
    return torch.einsum("bnij,bjnh->binh", weights, v).masked_fill(MASK[..., None, None], 0.0)


@pytest.mark.filterwarnings("ignore::varlen_attn.LayoutWarning")  # MASK has an empty row on purpose
@pytest.mark.parametrize("head_dim", [1, 3, 20, 63, 80, 96, 256, 264, 320, 512])
def test_any_head_dimension(head_dim: int) -> None:  # R-45, rows 1, 4, 10 and 11 of 3a: float32 on a CPU, no multiple of 8, above 256
    q, k = torch.randn(2, 3, 3, 2, head_dim).unbind()
    assert equal(padded_attention(q, k, k, MASK), plain(q, k))
    v = torch.randn(3, 3, 2, 5)
    assert equal(padded_attention(q, k, v, MASK), plain(q, k, v))


@pytest.mark.filterwarnings("ignore::varlen_attn.LayoutWarning")
def test_what_upstream_rejects_and_we_serve() -> None:
    q = torch.randn(3, 3, 4, 8)
    k = torch.randn(3, 3, 2, 8)
    want = plain(q, k)
    # rows 25 and 27: a mask of any float dtype, whatever the dtype of the query
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        additive = torch.zeros(3, 3, dtype=dtype).masked_fill(MASK, -math.inf)
        assert equal(padded_attention(q, k, k, additive), want)
        lowest = torch.zeros(3, 3, dtype=dtype).masked_fill(MASK, torch.finfo(dtype).min)
        assert equal(padded_attention(q, k, k, lowest), want)
    half = padded_attention(q.bfloat16(), k.bfloat16(), k.bfloat16(), torch.zeros(3, 3).masked_fill(MASK, -math.inf))
    assert half.dtype == torch.bfloat16
    # row 13: no batch
    assert padded_attention(q[:0], k[:0], k[:0], MASK[:0]).shape == (0, 3, 4, 8)
    assert varlen_mha(torch.randn(0, 3, 8), MASK[:0]).shape == (0, 3, 8)
    # row 17: slopes of any float dtype
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    rows = LAYOUT.pack(q)
    expected = varlen_attention(rows, rows, rows, LAYOUT, alibi_slopes=slopes)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(varlen_attention(rows, rows, rows, LAYOUT, alibi_slopes=slopes.to(dtype)), expected)
    # row 28: causal with a mask
    assert padded_attention(q, k, k, MASK, causal=True).isfinite().all()


@pytest.mark.parametrize("length", [1, 5, 43, 64, 77, 128, 129, 192, 193])
def test_odd_lengths_with_a_bias(length: int) -> None:  # R-54, row 29 of 3a
    torch.manual_seed(0)
    layout = SeqLayout.from_lengths([length, 1])
    q = torch.randn(length + 1, 2, 8)
    bias = torch.randn(2, length, length)
    want = ((torch.einsum("inh,jnh->nij", q[:length], q[:length]) * 8**-0.5 + bias).softmax(-1) @ q[:length].transpose(0, 1)).transpose(
        0, 1
    )
    for backend in ("cpu", "sdpa_padded"):
        got = varlen_attention(q, q, q, layout, score_bias=bias, backend=backend)
        assert equal(got[:length], want)
        assert equal(got[length:], q[length:])


def test_large_negative_logits() -> None:  # R-34, S20
    q = torch.full((5, 1, 8), 100.0, requires_grad=True)
    k = torch.full((5, 1, 8), -100.0)
    for backend in ("cpu", "sdpa_padded", "reference"):
        out = attend(q, k, torch.arange(5.0).view(5, 1, 1).expand(5, 1, 8), backend=backend)
        assert torch.allclose(out[:, 0, 0], torch.tensor([1.0, 1.0, 1.0, 3.5, 3.5]))
        (grad,) = torch.autograd.grad(out.sum(), q)
        assert grad.isfinite().all()


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("causal", [False, True])
def test_a_scale_that_is_not_positive(scale: float, causal: bool) -> None:
    """Kernels that scale what they have masked make NaN of it, torch's CPU kernel among them."""
    q, k, v = (torch.randn(5, 1, 8, requires_grad=True) for _ in range(3))
    exact = attend(q, k, v, backend="reference", scale=scale, causal=causal)
    expected = torch.autograd.grad(exact.sum(), (q, k, v), materialize_grads=True)
    for backend in ("cpu", "sdpa_padded"):
        out = attend(q, k, v, backend=backend, scale=scale, causal=causal)
        torch.testing.assert_close(out, exact)
        for got, want in zip(torch.autograd.grad(out.sum(), (q, k, v), materialize_grads=True), expected, strict=True):
            torch.testing.assert_close(got, want)


def test_a_mask_with_a_gradient_and_one_from_inference_mode() -> None:  # S24
    x = torch.randn(3, 3, 8, requires_grad=True)
    additive = torch.zeros(3, 3).masked_fill(MASK, -math.inf).requires_grad_()
    with torch.inference_mode():
        inference = MASK.clone()
    layouts = [SeqLayout.from_key_padding_mask(m, validate=False) for m in (MASK, additive, inference)]
    outs = [varlen_mha(x, layout=layout) for layout in layouts]
    for out in outs:
        assert torch.equal(out, outs[0])
        (grad,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        assert grad.isfinite().all()


def test_a_layout_of_ints_is_python_ints() -> None:  # rows 14 and 15 of 3a: no tensor ever stands for the longest length
    for layout in (LAYOUT, SeqLayout.from_key_padding_mask(MASK, capacity=5), SeqLayout.from_document_ids((~MASK).long(), max_docs=3)):
        assert type(layout.max_seqlen) is int
        assert type(layout.num_rows) is int
        assert type(layout.compact().max_seqlen) is int


def test_errors_of_the_callers_own_bias_are_left_alone() -> None:
    with pytest.raises(ZeroDivisionError):
        attend(score_bias=lambda h, i, j: 1 / 0)


def test_a_wide_head_that_nothing_was_said_of_warns() -> None:
    weights = dict(in_proj_weight=torch.randn(3 * 320, 320))
    with pytest.warns(
        VarlenWarning, match=r"`num_heads` is left out, so that one head of 320 is computed: pass num_heads=5 for heads of 64"
    ):
        out = mha(2, 3, 320, **weights)
    assert out.shape == (2, 3, 320)
    mha(2, 3, 320, num_heads=1, **weights)
    mha(2, 3, 256)
    varlen_mha(torch.randn(2, 3, 3, 2, 320))


FIXED = torch.arange(64) >= torch.tensor([50, 20, 7, 31])[:, None]  # padded to a length that no row fills


@pytest.mark.parametrize("call", [
    lambda mask: SeqLayout.from_key_padding_mask(mask),
    lambda mask: padded_attention(*[torch.randn(*mask.shape, 2, 8)] * 3, mask),
    lambda mask: varlen_mha(torch.randn(*mask.shape, 8), mask),
])  # fmt: skip
def test_an_inverted_mask_of_fixed_length_warns(call: Any) -> None:
    with pytest.warns(LayoutWarning, match="every row of the mask begins with padding, and none is full.*or padding is on the left"):
        call(~FIXED)
    call(FIXED)
    call(FIXED.flip(1)[:, 14:])  # padding on the left, and a full row, as most batches with padding there have it


def test_padding_on_the_left_is_nothing_to_warn_of() -> None:
    SeqLayout.from_attention_mask(~FIXED.flip(1))  # the convention of models that generate
    SeqLayout.from_key_padding_mask(FIXED.flip(1), validate=False)
    SeqLayout.from_key_padding_mask(FIXED.flip(1)[:1])
    SeqLayout.from_lengths([5, 3], 8, "left")
