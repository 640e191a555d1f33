"""The attention function for transformers, called as its layers call it: every option counts, every row is right, nothing leaks."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import masking_utils as hf
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from varlen_attn import LayoutError, SeqLayout, record, use_backend
from varlen_attn.data.host_lengths import HostLengths
from varlen_attn.integrations.transformers import attention as _hf_attention
from varlen_attn.integrations.transformers.attention import NotPackable, varlen_attention_forward
from varlen_attn.integrations.transformers.mask import VarlenMask, varlen_mask
from varlen_attn.kernels.dense import EAGER

from .tiny import COLUMNS, LENGTHS, attention_mask, build, error, quietly, seeded, token_ids

B, N, K, H = 4, 4, 2, 8
SIDES = ("right", "left", "both", "holes", "full")


class Layer(nn.Module):
    """What attention functions read of a module."""

    def __init__(self, groups: int = N // K, is_causal: bool = True) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, is_causal


def states(len_q: int = COLUMNS, len_k: int | None = None, batch: int = B, value_dim: int = H, kv_heads: int = K) -> tuple[Tensor, ...]:
    """query, key, value as layers have them: ``(B, N, L, H)`` views of ``(B, L, N, H)``, float64, with gradients."""
    generator = torch.Generator().manual_seed(len_q + value_dim)
    len_k = len_q if len_k is None else len_k
    sizes = ((len_q, N, H), (len_k, kv_heads, H), (len_k, kv_heads, value_dim))
    made = [2 * torch.randn(batch, *size, generator=generator, dtype=torch.float64) for size in sizes]
    return tuple(x.requires_grad_().transpose(1, 2) for x in made)


def real(side: str, columns: int = COLUMNS) -> Tensor:
    lengths = tuple(max(1, n * columns // COLUMNS) for n in LENGTHS)
    return torch.ones(B, columns, dtype=torch.bool) if side == "full" else attention_mask(side, lengths, columns).bool()


def made_mask(side: str, causal: bool = True, window: int | None = None, len_q: int = COLUMNS, columns: int = COLUMNS) -> VarlenMask:
    if causal:
        function = hf.causal_mask_function if window is None else hf.sliding_window_causal_mask_function(window)
    else:
        function = hf.bidirectional_mask_function if window is None else hf.sliding_window_bidirectional_mask_function(window)
    mask = varlen_mask(B, len_q, columns, mask_function=function, attention_mask=real(side, columns))
    assert isinstance(mask, VarlenMask)
    return mask


def by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums of exponentials: ``(B, L, N, Hv)`` and the weights ``(B, N, Lq, Lk)``; 0 where nothing is visible."""
    groups = query.shape[1] // key.shape[1]
    key, value = (torch.stack([x] * groups, 2).flatten(1, 2) for x in (key, value))
    scores = torch.einsum("bnqh,bnkh->bnqk", query, key) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    if added is not None:
        scores = scores + added
    terms = scores.exp() if visible is None else scores.exp() * visible
    total = terms.sum(-1, keepdim=True)
    if s_aux is not None:
        total = total + s_aux.exp()[:, None, None]
    weights = terms / torch.where(total == 0, 1.0, total)
    return torch.einsum("bnqk,bnkh->bqnh", weights, value), weights


def assert_rows(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    difference = error(got, want)
    assert difference < tolerance
    assert bool(want.ne(0).any())


def check(
    mask: Tensor | None, visible: Tensor | None, inputs: tuple[Tensor, ...], layer: nn.Module | None = None, **options: Any
) -> list[Any]:
    """Results and gradients of all three, at every row; gives the calls that were recorded."""
    query, key, value = inputs
    with record() as log:
        out, weights = varlen_attention_forward(layer or Layer(), query, key, value, mask, **options)
    maths = {k: v for k, v in options.items() if k in ("scaling", "softcap", "position_bias", "s_aux")}
    expected, by_sums = by_hand(query, key, value, visible, **maths)
    assert_rows(out, expected)
    if weights is not None:  # where they cost nothing
        assert log.calls[0].kernel == EAGER
        assert_rows(weights, by_sums[..., : weights.shape[-1]])  # without the future of a static cache
    learned = [x for x in (*inputs, *maths.values()) if isinstance(x, Tensor) and x.requires_grad]
    grads = [torch.autograd.grad(x.sin().sum(), learned, retain_graph=True) for x in (out, expected)]
    for got, want in zip(*grads, strict=True):
        assert_rows(got, want, 1e-11)
    return log.calls


# -------------------------------------------------------------------- masks of every kind


@pytest.mark.parametrize("causal", [True, False])
def test_without_a_mask(causal: bool) -> None:
    """The module says whether it is causal, and a keyword says it louder, as with `sdpa`."""
    inputs = states()
    triangle = torch.ones(COLUMNS, COLUMNS, dtype=torch.bool).tril()
    check(None, triangle if causal else None, inputs, Layer(is_causal=causal))
    check(None, triangle if causal else None, inputs, Layer(is_causal=not causal), is_causal=causal)
    bare = nn.Module()  # such a module is causal
    query, key, value = states(kv_heads=N)
    out, _ = varlen_attention_forward(bare, query, key, value, None)
    assert_rows(out, by_hand(query, key, value, triangle)[0])


def test_a_decoding_step_without_a_mask_sees_everything() -> None:
    check(None, None, states(1, 6))


def test_a_static_cache_without_a_mask_hides_its_future() -> None:
    visible = torch.ones(5, 9, dtype=torch.bool).tril()
    check(None, visible, states(5, 9))
    check(None, visible, states(5, 9), softcap=3.0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("len_q", [1, 2, 5])
def test_an_order_without_a_mask(len_q: int, causal: bool) -> None:
    query, key, value = states(len_q, 5)
    visible = torch.ones(len_q, 5, dtype=torch.bool).tril() if causal and len_q > 1 else None
    for order in ("reference", "sdpa_padded"):
        with use_backend(order), record() as log:
            out, _ = varlen_attention_forward(Layer(is_causal=causal), query, key, value, None)
        assert {call.backend for call in log} == {order}
        assert_rows(out, by_hand(query, key, value, visible)[0])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_masks_of_ours(side: str, causal: bool, window: int | None) -> None:
    """Whatever stands in the module or in ``is_causal``: a mask says what is visible."""
    mask = made_mask(side, causal, window)
    calls = check(mask, mask.meaning.dense, states(), Layer(is_causal=not causal))
    assert len(calls) == 1
    padded = side == "full" and window is None
    hidden = (causal and side in ("both", "holes")) or (not causal and window is not None and side != "full")
    assert (calls[0].backend == "dense") == (padded or hidden), calls
    if padded:
        assert calls[0].reason == "nothing is padded"
    check(mask, mask.meaning.dense, states(), is_causal=not causal)


@pytest.mark.parametrize("heads", ["one for all", "one for each"])
@pytest.mark.parametrize("form", ["bool", "float"])
def test_masks_of_the_callers_own(form: str, heads: str) -> None:
    """Four dimensions, computed as they are, whatever they hide."""
    generator = torch.Generator().manual_seed(0)
    visible = torch.rand(B, 1 if heads == "one for all" else N, COLUMNS, COLUMNS, generator=generator) < 0.6
    visible[0, :, 2] = False
    added = torch.randn(visible.shape, generator=generator, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    inputs = states()
    out, _ = varlen_attention_forward(Layer(), *inputs, visible if form == "bool" else added)
    expected, _ = by_hand(*inputs, visible, added=None if form == "bool" else added.masked_fill(~visible, 0))
    assert_rows(out, expected)
    with record() as log:
        capped, _ = varlen_attention_forward(Layer(), *inputs, visible if form == "bool" else added, softcap=2.0)
    assert_rows(capped, by_hand(*inputs, visible, softcap=2.0, added=None if form == "bool" else added.masked_fill(~visible, 0))[0])
    assert "the caller's own" in str(log)


def test_a_mask_of_two_dimensions_is_an_error() -> None:
    """Layers never see one: it would be taken for queries by keys."""
    with pytest.raises(RuntimeError, match="must match"):
        varlen_attention_forward(Layer(), *states(), attention_mask().bool())


def test_a_mask_made_for_other_tensors_is_not_guessed_at() -> None:
    """A model that cuts its keys by itself: an error of torch's, not an answer."""
    query, key, value = states()
    with pytest.raises(RuntimeError):
        varlen_attention_forward(Layer(), query, key[:, :, :7], value[:, :, :7], made_mask("right"))


def test_other_head_dimensions() -> None:
    """R-26 with a value dimension of its own, and heads of which two share a key."""
    for value_dim in (3, 16):
        mask = made_mask("left")
        check(mask, mask.meaning.dense, states(value_dim=value_dim))
    query, key, value = states(kv_heads=1)
    check(made_mask("right"), made_mask("right").meaning.dense, (query, key, value), Layer(groups=4))


# -------------------------------------------------------------------- options: all of them, or none of the speed


def bias(batch: int = 1, columns: int = COLUMNS) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, N, columns, columns, generator=generator, dtype=torch.float64).requires_grad_()


def sinks() -> Tensor:
    return torch.tensor([-1.0, 0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "scaling": lambda: dict(scaling=0.2),
    "softcap": lambda: dict(softcap=1.5),
    "sinks": lambda: dict(s_aux=sinks()),
    "bias": lambda: dict(position_bias=bias()),
    "a bias for each row": lambda: dict(position_bias=bias(B)),
    "bias and scaling": lambda: dict(position_bias=bias(), scaling=1.0),
    "softcap and sinks": lambda: dict(softcap=2.0, s_aux=sinks(), scaling=0.3),
    "bias and softcap": lambda: dict(position_bias=bias(), softcap=2.0),
}
PATTERNS = {"causal": (True, None), "bidirectional": (False, None), "window": (True, 3)}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_count(name: str, side: str, pattern: str) -> None:
    """R-43, and row 1c-2 of the peers' wrong answers: nothing that a layer asks for is dropped, with any padding and any window."""
    mask = made_mask(side, *PATTERNS[pattern])
    options = OPTIONS[name]()
    seen = mask.meaning.dense
    query, key, value = states()
    if "position_bias" in options and bool((~seen.any(-1)).any()):
        # `sdpa` gives those who see nothing a mean of everything, and so does the dense way with a bias.
        out, _ = varlen_attention_forward(Layer(), query, key, value, mask, **options)
        alive = seen[:, 0].any(-1)
        assert_rows(out[alive], by_hand(query, key, value, seen, **options)[0][alive])
        assert not out.isnan().any()
    else:
        check(mask, seen, (query, key, value), **options)
    plain, _ = by_hand(query, key, value, seen, **{k: v for k, v in options.items() if k == "position_bias" and len(options) > 1})
    out, _ = varlen_attention_forward(Layer(), query, key, value, mask, **options)
    assert error(out, plain) > 1e-3


@pytest.mark.parametrize("name", OPTIONS)
def test_options_without_a_mask(name: str) -> None:
    triangle = torch.ones(COLUMNS, COLUMNS, dtype=torch.bool).tril()
    check(None, triangle, states(), **OPTIONS[name]())
    check(None, None, states(), Layer(is_causal=False), **OPTIONS[name]())


@pytest.mark.parametrize("name", ["softcap", "sinks", "softcap and sinks"])
def test_options_of_a_decoding_step(name: str) -> None:
    """One query for each row and the mask that `sdpa` gets."""
    visible = real("left")[:, None, None]
    check(visible, visible, states(1, COLUMNS), **OPTIONS[name]())
    added = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    out, _ = varlen_attention_forward(Layer(), *states(1, COLUMNS), added, **OPTIONS[name]())
    assert_rows(out, by_hand(*states(1, COLUMNS), visible, **OPTIONS[name]())[0])


def test_a_bias_with_much_padding_is_added_to_packed_rows() -> None:
    mask = varlen_mask(B, COLUMNS, COLUMNS, mask_function=hf.bidirectional_mask_function, attention_mask=real("right"))
    assert isinstance(mask, VarlenMask)
    assert mask.meaning.keys.fill is not None
    assert mask.meaning.keys.fill < 0.6
    (call,) = check(mask, mask.meaning.dense, states(), position_bias=bias())
    assert call.backend != "dense"
    (call,) = check(mask, mask.meaning.dense, states(), position_bias=bias(B))
    assert call.backend == "dense"


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_bias_of_cached_keys(side: str) -> None:
    """Five queries after four keys: columns of the bias are those of the keys."""
    mask = varlen_mask(B, 5, COLUMNS, q_offset=4, attention_mask=real(side))
    assert isinstance(mask, VarlenMask)
    seen = mask.meaning.dense
    columns_bias = torch.randn(1, N, 5, COLUMNS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out, _ = varlen_attention_forward(Layer(), *states(5, COLUMNS), mask, position_bias=columns_bias)
    alive = seen[:, 0].any(-1)
    assert_rows(out[alive], by_hand(*states(5, COLUMNS), seen, position_bias=columns_bias)[0][alive])


@pytest.mark.parametrize("how", ["packed", "dense", "packed with softcap", "dense with sinks", "packed with bias", "offsets"])
def test_dropout(how: str) -> None:
    """1c-2. Values that are a unit matrix give the weights back: each is dropped, with the probability asked for, or scaled up."""
    p, copies = 0.3, 40
    query, key, _ = (x.detach() for x in states(kv_heads=N))
    value = torch.eye(COLUMNS, dtype=torch.float64).expand(B, N, -1, -1)
    mask: Tensor | None = made_mask("both" if "dense" in how else "right", causal="dense" in how)
    seen = mask.meaning.dense  # type: ignore[union-attr]
    options: dict[str, Any] = {}
    if "softcap" in how:
        options["softcap"] = 2.0
    if "sinks" in how:
        options["s_aux"] = sinks().detach()
    if "bias" in how:
        options["position_bias"] = bias().detach()
    given_offsets = {}
    if how == "offsets":
        query, key, value = (x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for x in (query, key, value))
        mask, given_offsets = None, {"cu_seq_lens_q": torch.arange(0, 37, 9, dtype=torch.int32), "is_causal": False}
        seen = torch.block_diag(*[torch.ones(9, 9)] * 4).bool()
    _, weights = by_hand(query, key, value[..., :1], seen, **options)
    if how == "offsets":
        weights = torch.stack([weights[0, :, i * 9 : i * 9 + 9, i * 9 : i * 9 + 9] for i in range(B)])
    dropped = torch.zeros(B, N, COLUMNS, COLUMNS)
    mean = torch.zeros_like(weights)
    with seeded(1):
        for _ in range(copies):
            out, _ = varlen_attention_forward(Layer(1).train(), query, key, value, mask, dropout=p, **options, **given_offsets)
            got = (out[0].view(B, COLUMNS, N, COLUMNS) if how == "offsets" else out).transpose(1, 2)
            zero = got == 0
            assert_rows(got, torch.where(zero, 0.0, weights / (1 - p)))
            dropped += zero
            mean += got / copies
    share = (dropped[weights > 0] / copies).mean().item()
    trials = copies * int((weights > 0).sum())
    assert abs(share - p) < 5 * (p * (1 - p) / trials) ** 0.5
    assert 0 < error(mean, weights) < 1


def test_no_dropout_where_none_is_asked_for() -> None:
    """Layers pass 0 in evaluation; the module's own flag is not asked."""
    mask = made_mask("right")
    outs = [varlen_attention_forward(Layer().train(), *states(), mask, dropout=0.0)[0] for _ in range(2)]
    assert torch.equal(*outs)
    before = torch.get_rng_state()
    varlen_attention_forward(Layer().train(), *states(), mask)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"sinks": True}, {"bias": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_sdpa(dtype: torch.dtype, options: dict[str, Any]) -> None:
    exact = tuple(x.detach() for x in states())
    arguments: dict[str, Any] = {k: v for k, v in options.items() if k == "softcap"}
    if "sinks" in options:
        arguments["s_aux"] = sinks().detach().to(dtype)
    if "bias" in options:
        arguments["position_bias"] = bias().detach().to(dtype)
    inputs = tuple(x.to(dtype) for x in exact)
    mask = made_mask("right", causal=False)
    want, _ = by_hand(
        *(x.double() for x in inputs), mask.meaning.dense, **{k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    )
    naive, _ = by_hand(*inputs, mask.meaning.dense, **arguments)
    got, _ = varlen_attention_forward(Layer(), *inputs, mask, **arguments)
    assert got.dtype == dtype
    assert 0 < error(got, want) < 2 * error(naive, want)


# -------------------------------------------------------------------- weights


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_weights(side: str, causal: bool) -> None:
    """R-46: they sum to 1 wherever a query sees something, hide what is hidden, and the result is what it was."""
    mask = made_mask(side, causal)
    inputs = states()
    plain, nothing = varlen_attention_forward(Layer(), *inputs, mask)
    with record() as log:
        out, weights = varlen_attention_forward(Layer(), *inputs, mask, output_attentions=True)
    assert nothing is None
    assert weights is not None
    expected, by_sums = by_hand(*inputs, mask.meaning.dense)
    assert_rows(weights, by_sums)
    assert_rows(out, expected)
    assert_rows(out, plain)
    seen = mask.meaning.dense.any(-1).expand(-1, N, -1)
    assert_rows(weights.sum(-1), seen.double())
    assert bool((weights[~mask.meaning.dense.expand(-1, N, -1, -1)] == 0).all())
    assert log.calls[0].backend == "dense"
    assert log.calls[0].reason == "attention weights are asked for"


def test_weights_with_options() -> None:
    mask = made_mask("left")
    options = dict(softcap=2.0, s_aux=sinks(), position_bias=bias())
    out, weights = varlen_attention_forward(Layer(), *states(), mask, output_attentions=True, **options)
    expected, by_sums = by_hand(*states(), mask.meaning.dense, **options)
    assert weights is not None
    assert_rows(out, expected)
    assert_rows(weights, by_sums)
    assert float(weights.detach().sum(-1).max()) < 1  # the sinks have the rest


def test_packed_rows_have_no_weights_and_no_bias() -> None:
    """A stack hears of it in its trial, and stays padded."""
    packed = made_mask("right").meaning.packed
    inputs = tuple(x.detach().transpose(1, 2).flatten(0, 1)[None, : packed.shape[-1]].transpose(1, 2) for x in states())
    for options in (dict(output_attentions=True), dict(position_bias=torch.zeros(1, N, *packed.shape[2:], dtype=torch.float64))):
        with pytest.raises(NotPackable, match="position bias to the scores, or gives attention weights"):
            varlen_attention_forward(Layer(), *inputs, packed, **options)


# -------------------------------------------------------------------- rows that see nothing, and padding that holds anything


@pytest.mark.parametrize("options", ["", "softcap", "sinks"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_row_without_tokens_is_zero(causal: bool, options: str) -> None:
    """Never NaN, and no NaN in gradients."""
    present = real("right").clone()
    present[2] = False
    function = hf.causal_mask_function if causal else hf.bidirectional_mask_function
    mask = varlen_mask(B, COLUMNS, COLUMNS, mask_function=function, attention_mask=present)
    inputs = states()
    arguments = OPTIONS[options]() if options else {}
    out, _ = varlen_attention_forward(Layer(), *inputs, mask, **arguments)
    assert bool((out[2] == 0).all())
    assert bool((out[[0, 1, 3]] != 0).all())
    grads = torch.autograd.grad(out.square().sum() + out[2].sum(), inputs)
    assert all(bool(g.isfinite().all()) for g in grads)
    assert all(bool((g[2] == 0).all()) for g in grads)
    empty = varlen_mask(B, COLUMNS, COLUMNS, mask_function=function, attention_mask=torch.zeros_like(present))
    out, _ = varlen_attention_forward(Layer(), *inputs, empty, **arguments)
    assert bool((out == 0).all())


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("side", "causal", "window"), [
    ("right", True, None), ("left", True, None), ("right", False, None), ("left", False, None), ("both", False, None),
    ("holes", False, None), ("right", True, 3), ("left", True, 3),
])  # fmt: skip
def test_what_padding_holds_does_not_matter(side: str, causal: bool, window: int | None, poison: float) -> None:
    """Keys and values at padding may be NaN or infinite. Masked SDPA gives NaN for it."""
    mask, inputs = made_mask(side, causal, window), states()
    query, key, value = (x.detach() for x in inputs)
    clean, _ = varlen_attention_forward(Layer(), query, key, value, mask)
    padding = ~real(side)[:, None, :, None]
    key, value = (x.masked_fill(padding, poison).requires_grad_() for x in (key, value))
    query.requires_grad_()
    out, _ = varlen_attention_forward(Layer(), query, key, value, mask)
    assert torch.equal(out, clean)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(bool(g.isfinite().all()) for g in grads)
    theirs, _ = sdpa_attention_forward(Layer(), query, key, value, mask.meaning.dense)
    assert bool(theirs.isnan().any())


# -------------------------------------------------------------------- caches


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_prefill_of_a_static_cache(side: str, window: int | None) -> None:
    """Keys as long as the cache will be, of which the last are not there yet."""
    columns = COLUMNS + 4
    present = F.pad(real(side), (0, 4))
    function = hf.causal_mask_function if window is None else hf.sliding_window_causal_mask_function(window)
    mask = varlen_mask(B, COLUMNS, columns, mask_function=function, attention_mask=present)
    assert isinstance(mask, VarlenMask)
    check(mask, mask.meaning.dense, states(COLUMNS, columns))


@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_a_decoding_step_of_a_static_cache(side: str) -> None:
    """Its offset is a tensor that nobody may read."""
    visible = varlen_mask(B, 1, COLUMNS, q_offset=torch.tensor(6), attention_mask=real(side), allow_is_causal_skip=False)
    assert visible is not None
    assert type(visible) is Tensor
    check(visible, visible, states(1, COLUMNS))


@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("window", [None, 4])
def test_more_than_one_token_after_cached_ones(side: str, window: int | None) -> None:
    """Of keys that begin at column 2: a sliding cache has forgotten the first two."""
    function = hf.causal_mask_function if window is None else hf.sliding_window_causal_mask_function(window)
    for kv_offset in (0, 2):
        columns = COLUMNS - kv_offset
        mask = varlen_mask(B, 3, columns, q_offset=6, kv_offset=kv_offset, mask_function=function, attention_mask=real(side))
        assert isinstance(mask, VarlenMask)
        q, k = torch.arange(3)[:, None] + 6, torch.arange(columns) + kv_offset
        seen = (k <= q) & (q - k < (99 if window is None else window)) & real(side)[:, None, None, kv_offset:]
        check(mask, seen, states(3, columns))


# -------------------------------------------------------------------- wrong answers of others


@pytest.mark.parametrize("side", ["right", "left", "both", "holes"])
@pytest.mark.parametrize(("len_q", "len_k"), [(9, 9), (5, 9), (9, 5), (12, 3), (2, 9)])
def test_cross_attention_to_padded_keys(len_q: int, len_k: int, side: str) -> None:
    """R-26, row 1c-1: the mask of the keys is not a mask of the queries, whichever of them are more."""
    mask = made_mask(side, causal=False, len_q=len_q, columns=len_k)
    (call,) = check(mask, real(side, len_k)[:, None, None], states(len_q, len_k), Layer(is_causal=False))
    assert call.backend != "dense"
    check(mask, real(side, len_k)[:, None, None], states(len_q, len_k), Layer(is_causal=True))


@given(st.lists(st.integers(0, 6), min_size=4, max_size=4), st.integers(2, 7), st.booleans())
def test_cross_attention_to_any_keys(lengths: list[int], len_q: int, left: bool) -> None:
    """R-26: some rows have no keys at all."""
    columns = max(lengths) + 1
    present = attention_mask("left" if left else "right", tuple(lengths), columns).bool()
    mask = varlen_mask(B, len_q, columns, mask_function=hf.bidirectional_mask_function, attention_mask=present)
    inputs = states(len_q, columns)
    out, _ = varlen_attention_forward(Layer(is_causal=False), *inputs, mask)
    difference = error(out, by_hand(*inputs, present[:, None, None])[0])
    assert difference < 1e-12


@pytest.mark.parametrize("level", ["attention", "model"])
@pytest.mark.parametrize("given_mask", [True, False])
def test_left_padding_is_not_taken_for_documents(level: str, given_mask: bool) -> None:
    """R-31, row 1c-3: positions that `generate` makes for padding on the left. Boundaries come from the mask alone; without a mask
    transformers takes such positions for three documents, and so do we."""
    model = build("Llama")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    inputs: dict[str, Any] = {"input_ids": token_ids(mask), "position_ids": torch.tensor([[1, 1, 0, 1, 2, 3]]), "use_cache": False}
    if given_mask:
        inputs["attention_mask"] = mask
    expected = model(**inputs).last_hidden_state
    quietly(model, level=level)
    with record(model) as log:
        got = model(**inputs).last_hidden_state
    assert bool(got.isfinite().all())
    assert error(got[:, 2:], expected[:, 2:]) < 1e-10
    if level == "attention" or not given_mask:
        assert error(got, expected) < 1e-10
    assert all(call.rows == (4 if given_mask else 6) for call in log.calls)
    alone = model(input_ids=inputs["input_ids"][:, 2:]).last_hidden_state
    assert error(got[:, 2:], alone) < 1e-10


# -------------------------------------------------------------------- batches that the caller has packed

DOCUMENTS = (3, 1, 4, 2)
OFFSETS = torch.tensor([0, 3, 4, 8, 10], dtype=torch.int32)


def packed_states(total: int = 10) -> tuple[Tensor, ...]:
    return states(total, batch=1)


def alone(inputs: tuple[Tensor, ...], **options: Any) -> Tensor:
    """Each document by itself."""
    parts = zip(*(x.split(DOCUMENTS, 2) for x in inputs), strict=True)
    made = []
    for q, k, v in parts:
        length = q.shape[2]
        i, j = torch.arange(length)[:, None], torch.arange(length)
        made.append(by_hand(q, k, v, (j <= i) & (i - j < options.get("window", 99)) if options["causal"] else None)[0])
    return torch.cat(made, 1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("causal", [True, False])
def test_documents(causal: bool, dtype: torch.dtype) -> None:
    """R-31: equal to each document alone."""
    offsets = OFFSETS.to(dtype)
    inputs = packed_states()
    expected = alone(inputs, causal=causal)
    for more in ({}, {"cu_seq_lens_k": offsets}, {"cu_seq_lens_k": offsets.clone(), "max_length_q": 4, "max_length_k": 4}):
        out, weights = varlen_attention_forward(Layer(is_causal=causal), *inputs, None, cu_seq_lens_q=offsets, **more)
        assert weights is None
        assert_rows(out, expected)
        grads = [torch.autograd.grad(x.sin().sum(), inputs, retain_graph=True) for x in (out, expected)]
        for got, want in zip(*grads, strict=True):
            assert_rows(got, want, 1e-11)
    out, _ = varlen_attention_forward(Layer(is_causal=not causal), *inputs, None, is_causal=causal, cu_seq_lens_q=offsets)
    assert_rows(out, expected)


def test_documents_are_independent_to_the_bit() -> None:
    """R-31: another document of other numbers changes nothing, not even rounding."""
    inputs = packed_states()
    outs = []
    for factor in (1.0, 3.0):
        scale = torch.ones(10, 1, dtype=torch.float64)
        scale[4:8] = factor
        changed = tuple((x.detach() * scale).requires_grad_() for x in inputs)
        out, _ = varlen_attention_forward(Layer(), *changed, None, cu_seq_lens_q=OFFSETS)
        others = torch.cat([out[:, :4], out[:, 8:]], 1)
        outs.append((others, *(g[:, :, [0, 1, 2, 3, 8, 9]] for g in torch.autograd.grad(out.square().sum(), changed))))
        assert error(out[:, 4:8], outs[0][0][:, :4]) > 0.01
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_documents_with_options() -> None:
    offsets = OFFSETS.clone()
    together = torch.block_diag(*[torch.ones(n, n) for n in DOCUMENTS]).tril().bool()
    inputs = packed_states()
    for options in (dict(softcap=2.0), dict(s_aux=sinks()), dict(scaling=1.0)):
        out, _ = varlen_attention_forward(Layer(), *inputs, None, cu_seq_lens_q=offsets, **options)
        assert_rows(out, by_hand(*inputs, together, **options)[0])
    out, _ = varlen_attention_forward(Layer(), *inputs, together, cu_seq_lens_q=offsets, position_bias=bias(columns=10))
    assert_rows(out, by_hand(*inputs, together, position_bias=bias(columns=10))[0])
    out, weights = varlen_attention_forward(Layer(is_causal=False), *inputs, None, cu_seq_lens_q=offsets, output_attentions=True)
    expected, by_sums = by_hand(*inputs, together | together.mT)
    assert weights is not None
    assert_rows(out, expected)
    assert_rows(weights, by_sums)


@pytest.mark.parametrize("options", [{"output_attentions": True}, {"position_bias": True}], ids=str)
def test_documents_computed_densely_stay_causal(options: dict[str, Any]) -> None:
    """Weights or a bias are asked for, and no mask says that attention is causal."""
    together = torch.block_diag(*[torch.ones(n, n) for n in DOCUMENTS]).bool()
    inputs = packed_states()
    more: dict[str, Any] = {"position_bias": bias(columns=10)} if "position_bias" in options else {}
    arguments = {**{k: v for k, v in options.items() if k == "output_attentions"}, **more}
    for causal in (True, False):
        out, _ = varlen_attention_forward(Layer(is_causal=causal), *inputs, None, cu_seq_lens_q=OFFSETS, **arguments)
        assert_rows(out, by_hand(*inputs, together.tril() if causal else together, **more)[0])


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_documents_with_a_window(causal: bool, window: int) -> None:
    """ModernBERT's local layers: a mask that holds the window only, and the offsets beside it."""
    make = hf.sliding_window_causal_mask_function if causal else hf.sliding_window_bidirectional_mask_function
    mask = varlen_mask(1, 10, 10, mask_function=make(window))
    assert isinstance(mask, VarlenMask)
    inputs = packed_states()
    out, _ = varlen_attention_forward(Layer(), *inputs, mask, cu_seq_lens_q=OFFSETS, cu_seq_lens_k=OFFSETS)
    together = torch.block_diag(*[torch.ones(n, n) for n in DOCUMENTS]).bool() & mask.meaning.dense
    assert_rows(out, by_hand(*inputs, together)[0])


@pytest.mark.parametrize("form", ["bool", "float"])
def test_documents_with_a_mask_of_the_callers(form: str) -> None:
    """Both hold: what crosses from one document into another is hidden as well."""
    visible = torch.rand(1, 1, 10, 10, generator=torch.Generator().manual_seed(0)) < 0.7
    mask = visible if form == "bool" else torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    together = torch.block_diag(*[torch.ones(n, n) for n in DOCUMENTS]).bool()
    out, _ = varlen_attention_forward(Layer(), *packed_states(), mask, cu_seq_lens_q=OFFSETS)
    assert_rows(out, by_hand(*packed_states(), together & visible)[0])


def test_documents_with_keys_of_their_own() -> None:
    """R-26: cross-attention of packed queries to packed keys."""
    keys = torch.tensor([0, 2, 2, 7, 9], dtype=torch.int32)
    query, key, value = states(10, 9, batch=1)
    out, _ = varlen_attention_forward(Layer(is_causal=False), query, key, value, None, cu_seq_lens_q=OFFSETS, cu_seq_lens_k=keys)
    together = torch.block_diag(*[torch.ones(q, k) for q, k in zip(DOCUMENTS, (2, 0, 5, 2), strict=True)]).bool()
    assert_rows(out, by_hand(query, key, value, together)[0])
    with pytest.raises(LayoutError, match="`cu_seq_lens_k` must be given, because there are other keys than queries"):
        varlen_attention_forward(Layer(), query, key, value, None, cu_seq_lens_q=OFFSETS)
    with pytest.raises(LayoutError, match=r"`cu_seq_lens_k` must describe the \(1, 9\) columns.*ends at 10"):
        varlen_attention_forward(Layer(), query, key, value, None, cu_seq_lens_q=OFFSETS, cu_seq_lens_k=OFFSETS)


def test_offsets_that_do_not_fit() -> None:
    with pytest.raises(LayoutError, match=r"`cu_seq_lens_q` must describe the \(1, 9\) columns.*ends at 10: pass packed inputs"):
        varlen_attention_forward(Layer(), *packed_states(9), None, cu_seq_lens_q=OFFSETS)
    with pytest.raises(LayoutError, match=r"`cu_seq_lens_q` must describe the \(4, 10\) columns"):
        varlen_attention_forward(Layer(), *states(10), None, cu_seq_lens_q=OFFSETS)
    mask = varlen_mask(1, 10, 10, attention_mask=attention_mask(lengths=(8,), columns=10).bool())
    with pytest.raises(LayoutError, match=r"`attention_mask` must not hide columns where cu_seq_lens_q is given.*pass one of both"):
        varlen_attention_forward(Layer(), *packed_states(), mask, cu_seq_lens_q=OFFSETS)
    for wrong in (torch.tensor([0, 5, 4, 10]), torch.tensor([1, 5, 10])):
        with pytest.raises(LayoutError):
            varlen_attention_forward(Layer(), *packed_states(), None, cu_seq_lens_q=wrong)


def rewritten(offsets: Tensor, how: str) -> Tensor:
    new = torch.tensor([0, 5, 6, 7, 10], dtype=torch.int32)
    if how == "copy_":
        offsets.copy_(new)
    elif how == "item":
        offsets[1], offsets[2], offsets[3] = 5, 6, 7
    elif how == "view":
        offsets[1:4].copy_(new[1:4])
    else:
        torch.add(new, 0, out=offsets)
    return new


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
@pytest.mark.parametrize("made_in", [nullcontext, torch.inference_mode])
@pytest.mark.parametrize("how", ["copy_", "item", "view", "out"])
def test_offsets_that_changed_in_place_are_read_again(how: str, made_in: Callable[[], Any], mode: Callable[[], Any]) -> None:
    """A buffer that the caller uses again."""
    with made_in():
        offsets = OFFSETS.clone()
    inputs = tuple(x.detach() for x in packed_states())
    with mode():
        varlen_attention_forward(Layer(), *inputs, None, cu_seq_lens_q=offsets)
    with torch.inference_mode() if made_in is torch.inference_mode else mode():
        new = rewritten(offsets, how)
    with mode():
        out, _ = varlen_attention_forward(Layer(), *inputs, None, cu_seq_lens_q=offsets)
    sizes = (5, 1, 1, 3)
    together = torch.block_diag(*[torch.ones(n, n) for n in sizes]).tril().bool()
    assert torch.equal(offsets, new)
    assert_rows(out, by_hand(*inputs, together)[0])


@pytest.mark.parametrize("how", ["numpy", "data"])
def test_offsets_that_changed_without_a_trace_are_read_again(how: str) -> None:
    """torch counts no such writes; on a CPU comparing a few integers costs nothing."""
    offsets = OFFSETS.clone()
    inputs = packed_states()
    varlen_attention_forward(Layer(), *inputs, None, cu_seq_lens_q=offsets)
    new = torch.tensor([0, 5, 6, 7, 10], dtype=torch.int32)
    if how == "numpy":
        offsets.numpy()[:] = new.numpy()
    else:
        offsets.data.copy_(new)
    out, _ = varlen_attention_forward(Layer(), *inputs, None, cu_seq_lens_q=offsets)
    together = torch.block_diag(*[torch.ones(n, n) for n in (5, 1, 1, 3)]).tril().bool()
    assert_rows(out, by_hand(*inputs, together)[0])


def test_offsets_are_read_once_a_batch_and_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every thread; nothing hangs on them that a file would take along, and nothing outlives them."""
    made: list[Tensor] = []
    build = SeqLayout.from_cu_seqlens
    monkeypatch.setattr(SeqLayout, "from_cu_seqlens", lambda offsets: made.append(offsets) or build(offsets))
    offsets, inputs, before = OFFSETS.clone(), packed_states(), len(_hf_attention._layouts)

    def layers(offsets: Tensor) -> None:
        for _ in range(3):
            varlen_attention_forward(Layer(), *inputs, None, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)

    layers(offsets)
    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(layers, offsets) for _ in range(8)]:
            job.result()
    assert len(made) == 1
    assert len(_hf_attention._layouts) == before + 1
    assert not vars(offsets)
    file = io.BytesIO()
    torch.save(offsets, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), offsets)
    made.clear()
    del offsets
    gc.collect()
    assert len(_hf_attention._layouts) == before


def test_offsets_with_host_lengths() -> None:
    """They know their layout, and forget it when they are written to."""
    offsets = HostLengths.as_offsets(DOCUMENTS)
    out, _ = varlen_attention_forward(Layer(), *packed_states(), None, cu_seq_lens_q=offsets)
    assert_rows(out, alone(packed_states(), causal=True))
    offsets.copy_(torch.tensor([0, 5, 6, 7, 10]))
    out, _ = varlen_attention_forward(Layer(), *packed_states(), None, cu_seq_lens_q=offsets)
    together = torch.block_diag(*[torch.ones(n, n) for n in (5, 1, 1, 3)]).tril().bool()
    assert_rows(out, by_hand(*packed_states(), together)[0])


def test_a_whole_batch_of_one_document_each() -> None:
    """As many columns as tokens, but a batch that was not packed: refused, because nothing says which is meant."""
    offsets = torch.tensor([0, 10], dtype=torch.int32)
    out, _ = varlen_attention_forward(Layer(), *packed_states(), None, cu_seq_lens_q=offsets)
    assert_rows(out, by_hand(*packed_states(), torch.ones(10, 10).tril().bool())[0])


# -------------------------------------------------------------------- modes


def test_inference_mode_and_training_share_nothing() -> None:
    """A layout made in one may be used in the other."""
    mask = made_mask("right")
    with torch.inference_mode():
        first, _ = varlen_attention_forward(Layer(), *(x.detach() for x in states()), mask)
    calls = check(mask, mask.meaning.dense.clone(), states())
    assert calls[0].backend != "dense"
    assert error(first, by_hand(*states(), mask.meaning.dense)[0]) < 1e-12


def test_the_record_names_what_ran() -> None:
    mask = made_mask("right")
    layer = nn.ModuleDict({"attention": Layer()})
    with record(layer) as log:
        varlen_attention_forward(layer["attention"], *states(), mask)
        varlen_attention_forward(layer["attention"], *states(), mask, position_bias=bias(B))
        varlen_attention_forward(layer["attention"], *states(), mask, softcap=1.0, output_attentions=True)
    packed, dense, eager = log.calls
    assert packed.module == dense.module == "attention"
    assert (packed.rows, packed.slots) == (B * COLUMNS, B * COLUMNS)  # every query row, but the keys of tokens only
    assert dense.kernel == "F.scaled_dot_product_attention"
    assert eager.kernel == EAGER
    assert "a position bias by columns" in str(log)
