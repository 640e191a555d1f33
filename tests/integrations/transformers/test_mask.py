"""The mask for transformers: which patterns are recognised, what it is to those who compute with it, and how attention is packed by it."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import masking_utils as hf
from transformers.models.gemma3 import modeling_gemma3 as gemma3

from varlen_attn import ArgumentError, record
from varlen_attn.data.host_lengths import HostLengths
from varlen_attn.integrations.transformers.attention import _collector, varlen_attention_forward
from varlen_attn.integrations.transformers.enabling import register
from varlen_attn.integrations.transformers.mask import Packing, Pattern, VarlenMask, classify, varlen_mask
from varlen_attn.testing.strategies import masks

from .tiny import attention_mask, error

MOVED = (
    f"transformers {transformers.__version__} makes its masks in another way: `{{}}` is no longer recognised. Results stay right, "
    "because an unknown mask is computed as `sdpa` computes it, but nothing skips padding any more. Teach `classify` in "
    "varlen_attn/integrations/transformers/mask.py the new form (compare transformers/masking_utils.py), and keep the old one."
)


# -------------------------------------------------------------------- patterns

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 2]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1], [4, 0, 1, 2, 0]])


def packed(function: Callable[..., Any]) -> Callable[..., Any]:
    made: Callable[..., Any] = hf.packed_sequence_compatibility_function(function, POSITIONS, DOCUMENTS)
    return made


KNOWN: dict[str, tuple[Callable[[], Any], Pattern]] = {
    "causal_mask_function": (lambda: hf.causal_mask_function, Pattern(True)),
    "bidirectional_mask_function": (lambda: hf.bidirectional_mask_function, Pattern(False)),
    "sliding_window_causal_mask_function": (lambda: hf.sliding_window_causal_mask_function(4), Pattern(True, (3, None))),
    "sliding_window_bidirectional_mask_function": (lambda: hf.sliding_window_bidirectional_mask_function(4), Pattern(False, (4, 4))),
    "packed_sequence_compatibility_function of causal_mask_function": (
        lambda: packed(hf.causal_mask_function),
        Pattern(True, None, DOCUMENTS),
    ),
    "packed_sequence_compatibility_function of sliding_window_causal_mask_function": (
        lambda: packed(hf.sliding_window_causal_mask_function(2)),
        Pattern(True, (1, None), DOCUMENTS),
    ),
    "or_masks of causal_mask_function and all, as in Gemma3TextModel": (
        lambda: hf.or_masks(hf.causal_mask_function, lambda *args: torch.tensor(True)),
        Pattern(False),
    ),
    "_bidirectional_window_overlay of Gemma3TextModel": (
        lambda: hf.or_masks(hf.sliding_window_causal_mask_function(3), gemma3._bidirectional_window_overlay(3)),
        Pattern(False, (2, 2)),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_transformers_own_patterns_are_recognised(name: str) -> None:
    make, expected = KNOWN[name]
    found = classify(make())
    assert found is not None, MOVED.format(name)
    assert found[:2] == expected[:2], MOVED.format(name)
    assert found.documents is expected.documents, MOVED.format(name)


MAKERS: dict[str, tuple[str, dict[str, Any], Pattern]] = {
    "create_causal_mask": ("LlamaConfig", {}, Pattern(True)),
    "create_bidirectional_mask": ("BertConfig", {}, Pattern(False)),
    "create_sliding_window_causal_mask": ("MistralConfig", {"sliding_window": 3}, Pattern(True, (2, None))),
    "create_bidirectional_sliding_window_mask": ("ModernBertConfig", {"local_attention": 4}, Pattern(False, (2, 2))),
}


@pytest.mark.parametrize("name", MAKERS)
def test_masks_that_models_ask_for_are_recognised(name: str) -> None:
    """What a model calls, from end to end: the functions above may stay as they are, and no longer be what is used."""
    register()
    class_name, options, pattern = MAKERS[name]
    config = getattr(transformers, class_name)(**options)
    config._attn_implementation = "varlen_attn"
    arguments = dict(config=config, inputs_embeds=torch.randn(4, 9, 8), attention_mask=attention_mask(), past_key_values=None)
    if "bidirectional" in name:
        del arguments["past_key_values"]
    mask = getattr(hf, name)(**arguments)
    assert isinstance(mask, VarlenMask), MOVED.format(name)
    assert mask.meaning.pattern == pattern, MOVED.format(name)
    config._attn_implementation = "sdpa"
    assert torch.equal(mask.meaning.dense, getattr(hf, name)(**arguments))


def test_packed_position_ids_are_recognised() -> None:
    register()
    config = transformers.LlamaConfig()
    config._attn_implementation = "varlen_attn"
    arguments = dict(inputs_embeds=torch.randn(2, 5, 8), attention_mask=None, past_key_values=None, position_ids=POSITIONS)
    mask = hf.create_causal_mask(config, **arguments)
    assert isinstance(mask, VarlenMask), MOVED.format("create_causal_mask with position_ids of several documents")
    assert torch.equal(mask.meaning.pattern.documents, DOCUMENTS)
    config._attn_implementation = "sdpa"
    assert torch.equal(mask.meaning.dense, hf.create_causal_mask(config, **arguments))


def test_what_transformers_collects_is_known() -> None:
    """Layers that run packed must know that somebody waits for hidden states, weights or router logits."""
    assert _collector() is not None, (
        f"transformers {transformers.__version__} has no `utils.output_capturing._active_collector` any more: teach `captured` in "
        "varlen_attn/integrations/transformers/attention.py how layers know what is collected from them."
    )


def sliding_window_overlay(sliding_window: int) -> Callable[..., Any]:
    """A user's function with the name of transformers', and with the window counted another way."""

    def inner_mask(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx >= q_idx - sliding_window

    return inner_mask


class Pattern_:
    def __call__(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx <= q_idx


def everything(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (q_idx >= 0) & (kv_idx >= 0)


UNKNOWN: dict[str, Callable[[], Any]] = {
    "chunked": lambda: hf.chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.long)),
    "blockwise": lambda: hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(DOCUMENTS)),
    "blockwise alone": lambda: hf.blockwise_overlay(DOCUMENTS),
    "or_masks": lambda: hf.or_masks(hf.causal_mask_function, hf.bidirectional_mask_function),
    "a user's overlay of the same name": lambda: hf.and_masks(sliding_window_overlay(2), hf.causal_mask_function),
    "an overlay alone": lambda: hf.sliding_window_overlay(2),
    "an overlay on another base": lambda: hf.and_masks(hf.sliding_window_overlay(2), hf.bidirectional_mask_function),
    "a bidirectional overlay on a causal base": lambda: hf.and_masks(hf.sliding_window_bidirectional_overlay(2), hf.causal_mask_function),
    "a user's function": lambda: everything,
    "a user's callable": Pattern_,
    "causal and a user's function": lambda: hf.and_masks(hf.causal_mask_function, everything),
    "a window and a user's function": lambda: hf.and_masks(hf.sliding_window_causal_mask_function(2), everything),
    "three parts": lambda: hf.and_masks(hf.sliding_window_overlay(2), hf.causal_mask_function, everything),
    "one part": lambda: hf.and_masks(hf.causal_mask_function),
    "packed chunks": lambda: packed(hf.chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.long))),
    "packed of packed": lambda: packed(packed(hf.causal_mask_function)),
    "documents without positions": lambda: hf.and_masks(hf.packed_sequence_mask_function(DOCUMENTS), hf.causal_mask_function),
    "positions without documents": lambda: hf.remap_positions_for_packed_sequence(hf.causal_mask_function, POSITIONS),
    "images": lambda: hf.or_masks(hf.causal_mask_function, lambda b, h, q, k: (q < 2) & (k < 2)),
    "images by all arguments": lambda: hf.or_masks(hf.causal_mask_function, lambda *args: args[2] + 1 >= args[3]),
    "nothing more": lambda: hf.or_masks(hf.causal_mask_function, lambda *args: torch.tensor(False)),
    "a wider window": lambda: hf.or_masks(hf.sliding_window_causal_mask_function(3), gemma3._bidirectional_window_overlay(4)),
    "all words on one side": lambda: hf.or_masks(hf.causal_mask_function, gemma3._bidirectional_window_overlay(3)),
    "with offsets": lambda: hf.add_offsets_to_mask_function(hf.causal_mask_function, 1, 0),
    "with padding": lambda: hf.and_masks(hf.causal_mask_function, hf.padding_mask_function(DOCUMENTS == 0)),
}


# transformers says so where a model joined a function of its own.
COMBINED = ("images", "images by all arguments", "nothing more", "a wider window", "all words on one side")


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_patterns_are_not_guessed(name: str) -> None:
    """They are computed as `sdpa` computes them, to the bit."""
    function = UNKNOWN[name]()
    assert classify(function) is None
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    arguments = dict(batch_size=2, q_length=5, kv_length=5, mask_function=function, attention_mask=mask, use_vmap=name in COMBINED)
    assert same(varlen_mask(**arguments), hf.sdpa_mask(**arguments))


def same(got: Tensor | None, want: Tensor | None) -> bool:
    if got is None or want is None:
        return got is want
    return type(got) is Tensor and torch.equal(got, want)


# -------------------------------------------------------------------- any mask


class Asked(NamedTuple):
    """Arguments of a mask function, and what is visible according to a sentence each, not to transformers."""

    arguments: dict[str, Any]
    visible: Tensor
    seed: int

    @property
    def mask(self) -> VarlenMask:
        made = varlen_mask(**self.arguments)
        assert isinstance(made, VarlenMask)
        return made


WINDOWS = (1, 2, 3, 6, 40)


@st.composite
def asked(draw: st.DrawFn, forms: tuple[str, ...] = ("right", "left", "both", "holes", "random"), square: bool = False) -> Asked:
    """Self-attention, decoding with cached keys, static and sliding caches, cross-attention, documents in rows."""
    kind = draw(st.sampled_from(("causal", "bidirectional", "documents")))
    w = draw(st.sampled_from((None, None, *WINDOWS)))
    real = ~draw(masks(forms=forms, max_batch=4).filter(lambda m: m.shape[0] > 0 and m.shape[1] > 1))
    batch, columns = real.shape
    mask: Tensor | None = real if draw(st.integers(0, 5)) else None
    q_length, q_offset, kv_offset, kv_length = columns, 0, 0, columns
    if kind == "documents":
        mask = None
    elif square:
        pass
    elif kind == "causal":
        q_length = draw(st.integers(2, columns))
        form = draw(st.sampled_from(("none", "cache", "static", "sliding")))
        if form in ("cache", "static"):
            q_offset = draw(st.integers(0, columns - q_length)) if form == "static" else columns - q_length
        elif form == "sliding":  # a cache that forgot its first columns
            q_offset = columns - q_length
            kv_offset = draw(st.integers(0, q_offset))
            kv_length = columns - kv_offset
        else:
            q_length = columns
        if form == "static":
            kv_length += draw(st.integers(0, 2))  # beyond the mask: nothing yet
    else:
        q_length = draw(st.integers(2, 9)) if draw(st.booleans()) else columns
    q, k = torch.arange(q_length)[:, None] + q_offset, torch.arange(kv_length) + kv_offset
    documents = torch.zeros(batch, columns, dtype=torch.long)
    if kind == "documents":
        starts = draw(st.lists(st.lists(st.booleans(), min_size=columns, max_size=columns), min_size=batch, max_size=batch))
        documents = torch.tensor(starts).long().cumsum(1)
    causal = kind != "bidirectional"
    visible = ((k <= q) if causal else (k >= 0).expand(q_length, -1))[None].expand(batch, -1, -1)
    function = hf.causal_mask_function if causal else hf.bidirectional_mask_function
    if w is not None and causal:  # the token itself and w - 1 before it
        visible, function = visible & (q - k < w), hf.sliding_window_causal_mask_function(w)
    elif w is not None:  # w on either side of the token
        visible, function = visible & ((q - k).abs() <= w), hf.sliding_window_bidirectional_mask_function(w)
    if kind == "documents":
        visible = visible & (documents[:, :, None] == documents[:, None, :])
        same_document = documents[:, :, None] == documents[:, None, :]
        positions = (same_document & torch.ones(columns, columns, dtype=torch.bool).tril(-1)).sum(-1)
        function = hf.packed_sequence_compatibility_function(function, positions, documents)
    if mask is not None:
        known = F.pad(mask, (0, max(0, kv_offset + kv_length - columns)))[:, kv_offset : kv_offset + kv_length]
        visible = visible & known[:, None, :]
    arguments = dict(
        batch_size=batch, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, mask_function=function,
        attention_mask=mask,
    )  # fmt: skip
    return Asked(arguments, visible[:, None], draw(st.integers(0, 10**6)))


@given(asked())
def test_the_dense_mask_is_the_one_of_sdpa(case: Asked) -> None:
    dense = case.mask.meaning.dense
    assert torch.equal(dense, hf.sdpa_mask(**case.arguments, allow_is_causal_skip=False))
    assert torch.equal(dense, case.visible)


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "slice": lambda m: m[:, :, 1:, :-1],
    "batch slice": lambda m: m[:1],
    "index": lambda m: m[0, 0],
    "index by tensor": lambda m: m[torch.tensor([0, 0])],
    "select": lambda m: m.select(3, 0),
    "not": lambda m: ~m,
    "and": lambda m: m & torch.ones(m.shape[-1], dtype=torch.bool),
    "and before": lambda m: torch.ones(m.shape[-2:], dtype=torch.bool).triu() & m,
    "or": lambda m: m | (torch.arange(m.shape[-1]) == 0),
    "xor with itself": lambda m: m ^ m,
    "logical_not": lambda m: m.logical_not(),
    "logical_and": lambda m: torch.logical_and(m, m[..., :1]),
    "equal to": lambda m: m == 0,
    "to float": lambda m: m.to(torch.float64),
    "float": lambda m: m.float(),
    "long": lambda m: m.long(),
    "type_as": lambda m: m.type_as(torch.zeros(1)),
    "inverted, as scores": lambda m: (1.0 - m.float()) * -1e4,
    "clone": lambda m: m.clone(),
    "contiguous": lambda m: m.contiguous().view(-1),
    "masked_fill": lambda m: m.masked_fill(torch.arange(m.shape[-1]) == 1, True),
    "fills others": lambda m: torch.zeros(m.shape, dtype=torch.float64).masked_fill(~m, -torch.inf),
    "fills others by itself": lambda m: torch.zeros(m.shape).masked_fill(m, 1.0),
    "where": lambda m: torch.where(m, 0.5, -torch.inf),
    "where of scores": lambda m: torch.where(m, torch.ones(m.shape), torch.zeros(())),
    "expand": lambda m: m.expand(-1, 3, -1, -1),
    "repeat": lambda m: m.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda m: m.repeat_interleave(2, 0),
    "cat": lambda m: torch.cat([m, torch.ones_like(m)], -1),
    "cat of two": lambda m: torch.cat([m, m], 0),
    "stack": lambda m: torch.stack([m, m]),
    "pad": lambda m: F.pad(m, (2, 0), value=True),
    "squeeze": lambda m: m.squeeze(1),
    "unsqueeze": lambda m: m[:, None],
    "reshape": lambda m: m.reshape(m.shape[0], -1),
    "transpose": lambda m: m.mT,
    "permute": lambda m: m.permute(0, 2, 3, 1),
    "flip": lambda m: m.flip(-1),
    "chunk": lambda m: m.chunk(2, -1)[0],
    "unbind": lambda m: m.unbind(0)[0],
    "any": lambda m: m.any(-1),
    "all": lambda m: bool(m.all()),
    "sum": lambda m: m.sum(),
    "cumsum": lambda m: m.cumsum(-1),
    "nonzero": lambda m: m.nonzero(),
    "item": lambda m: m[0, 0, 0, 0].item(),
    "einsum": lambda m: torch.einsum("bnqk->bq", m.float()),
    "tril": lambda m: m.tril(),
    "copied into": lambda m: torch.zeros(m.shape, dtype=torch.bool).copy_(m),
    "attended with": lambda m: F.scaled_dot_product_attention(
        torch.ones(m.shape[0], 1, m.shape[2], 4), torch.arange(4.0).expand(1, 1, m.shape[3], 4), torch.ones(1, 1, m.shape[3], 4), m
    ),
    "shape": lambda m: (m.shape, m.dtype, m.device, m.dim(), m.is_floating_point()),
    "new": lambda m: m.new_zeros(2),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kind", ["causal", "bidirectional", "window"])
def test_operations_on_the_mask_are_those_on_the_dense_one(name: str, kind: str) -> None:
    """A model may slice, invert, expand or convert its mask: whatever it does, it gets what `sdpa` would have got."""
    functions = {
        "causal": hf.causal_mask_function,
        "bidirectional": hf.bidirectional_mask_function,
        "window": hf.sliding_window_causal_mask_function(2),
    }
    mask = varlen_mask(4, 9, 9, mask_function=functions[kind], attention_mask=attention_mask("left").bool())
    assert isinstance(mask, VarlenMask)
    dense = mask.meaning.dense.clone()
    got, want = OPERATIONS[name](mask), OPERATIONS[name](dense)
    if not isinstance(want, Tensor):
        assert got == want
    else:
        assert type(got) is Tensor
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@given(asked(), st.sampled_from([n for n in OPERATIONS if n != "attended with"]))
def test_operations_on_any_mask(case: Asked, name: str) -> None:
    got, want = OPERATIONS[name](case.mask), OPERATIONS[name](case.visible)
    assert torch.equal(got, want) if isinstance(want, Tensor) else got == want


def causal() -> VarlenMask:
    mask = varlen_mask(4, 9, 9, attention_mask=attention_mask().bool())
    assert isinstance(mask, VarlenMask)
    return mask


ADDING: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "scores + mask": lambda s, m: s + m,
    "mask + scores": lambda s, m: m + s,
    "scores += mask": lambda s, m: s.add_(m),
    "torch.add": lambda s, m: torch.add(s, m, alpha=2),
    "scores - mask": lambda s, m: s - m,
    "scores * mask": lambda s, m: s * m,
    "half scores": lambda s, m: s.half() + m,
    "a buffer": lambda s, m: torch.add(s, m, out=torch.empty_like(s)),
    "a view": lambda s, m: s.view(4, 2, 9, 9) + m,
}


@pytest.mark.parametrize("name", ADDING)
def test_adding_the_mask_to_scores_is_an_error(name: str) -> None:
    """A model with attention code of its own, set up by hand: visible tokens would get 1 more, and padding would stay visible."""
    with pytest.raises(
        ArgumentError, match=r"must not be added to scores.*call varlen_attn\.enable\(model\), which leaves such models alone"
    ):
        ADDING[name](torch.randn(4, 2, 9, 9), causal())


def test_copies_that_keep_the_meaning() -> None:
    """Views and moves to where it is: accelerate, checkpointing and hooks do these."""
    mask = causal()
    kept = [
        mask.detach(),
        torch.ops.aten.alias(mask),
        mask.to("cpu"),
        mask.to(torch.device("cpu"), torch.bool),
        mask.to(torch.bool),
        mask.cpu(),
    ]
    for copied in (*kept, mask.bool(), mask.to("cpu", copy=True)):
        assert isinstance(copied, VarlenMask)
        assert copied.meaning.pattern == mask.meaning.pattern
        assert torch.equal(copied.meaning.dense, mask.meaning.dense)
        assert copied.shape == mask.shape
    assert mask.detach().meaning is mask.meaning
    moved = causal().to("meta")
    assert isinstance(moved, VarlenMask)
    assert moved.meaning.padding is not None
    assert moved.meaning.padding.device.type == moved.device.type == "meta"


LEAVING: dict[str, Callable[[Tensor], Any]] = {
    "tolist": lambda m: m.tolist(),
    "numpy": lambda m: m.numpy().tolist(),
    "deepcopy": lambda m: copy.deepcopy(m),
    "copy": lambda m: copy.copy(m),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
}


@pytest.mark.parametrize("name", LEAVING)
def test_what_can_not_be_done_with_it_is_an_error(name: str) -> None:
    """There is no memory behind it: right, or an error of torch's, but no numbers that mean nothing."""
    mask = causal()
    try:
        got = LEAVING[name](mask)
    except RuntimeError:
        return
    got = got.meaning.dense if isinstance(got, VarlenMask) else torch.as_tensor(got)
    assert torch.equal(got, mask.meaning.dense)


def test_it_says_what_it_is() -> None:
    mask = varlen_mask(4, 9, 9, mask_function=hf.sliding_window_causal_mask_function(3))
    assert repr(mask) == "VarlenMask((4, 1, 9, 9), causal, window=(2, None), device=cpu)"
    wide = varlen_mask(4, 9, 9, mask_function=hf.sliding_window_bidirectional_mask_function(8))
    assert repr(wide) == "VarlenMask((4, 1, 9, 9), bidirectional, window=None, device=cpu)"  # no distance is larger


# -------------------------------------------------------------------- who gets the mask of sdpa

MASK = attention_mask("left")[:2].bool()
SDPA: dict[str, dict[str, Any]] = {
    "a decoding step": dict(q_length=1, kv_length=9, q_offset=8, attention_mask=MASK),
    "a decoding step without padding": dict(q_length=1, kv_length=9, q_offset=8),
    "a decoding step of a static cache": dict(q_length=1, kv_length=9, q_offset=torch.tensor(4), attention_mask=MASK),
    "a user's and-function": dict(
        q_length=9,
        kv_length=9,
        use_vmap=True,
        attention_mask=MASK,
        mask_function=hf.and_masks(hf.causal_mask_function, lambda b, h, q, k: q - k != 2),
    ),
    "one mask for all rows": dict(q_length=9, kv_length=9, attention_mask=MASK[:1]),
    "a mask of too many columns": dict(q_length=5, kv_length=5, attention_mask=MASK),
}


@pytest.mark.parametrize("name", [n for n in SDPA if n != "a mask of too many columns"])
def test_what_is_left_to_sdpa(name: str) -> None:
    arguments = {"batch_size": 2, "mask_function": hf.causal_mask_function, **SDPA[name]}
    assert same(varlen_mask(**arguments), hf.sdpa_mask(**arguments))


def test_columns_beyond_the_keys_are_left_out() -> None:
    """As transformers does it: the keys begin at ``kv_offset``."""
    arguments = dict(batch_size=2, **SDPA["a mask of too many columns"])
    mask = varlen_mask(**arguments)
    assert isinstance(mask, VarlenMask)
    assert torch.equal(mask.meaning.dense, hf.sdpa_mask(**arguments, allow_is_causal_skip=False))
    assert mask.meaning.padding is not None
    assert torch.equal(mask.meaning.padding, MASK[:, :5])


def test_without_a_function_it_is_causal() -> None:
    assert torch.equal(varlen_mask(1, 3, 3)[0, 0], torch.ones(3, 3, dtype=torch.bool).tril())  # type: ignore[index]


# -------------------------------------------------------------------- packed attention does the same


class Layer(nn.Module):
    """What attention functions read of a module."""

    def __init__(self, groups: int = 1, is_causal: bool = True) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, is_causal


class Heads(NamedTuple):
    heads: int
    kv_heads: int
    dim: int
    value_dim: int


HEADS = (Heads(1, 1, 4, 4), Heads(2, 2, 3, 3), Heads(4, 2, 8, 8), Heads(3, 1, 5, 5), Heads(2, 2, 8, 3), Heads(4, 2, 4, 16))


def states(shape: tuple[int, ...], heads: Heads, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, q_length, kv_length = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads.heads, q_length, heads.dim), (heads.kv_heads, kv_length, heads.dim), (heads.kv_heads, kv_length, heads.value_dim))
    q, k, v = (2 * torch.randn(batch, *size, generator=generator, dtype=torch.float64) for size in sizes)
    return q, k, v


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """``(B, L, N, H)``; exactly 0 where nothing is visible."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)


def assert_rows(got: Tensor, want: Tensor) -> None:
    difference = error(got, want)
    assert difference < 1e-12


@given(asked(), st.sampled_from(HEADS))
def test_every_row_is_that_of_sdpa(case: Asked, heads: Heads) -> None:
    """R-26, R-27: rows of padded queries too, with keys that are longer, cached, cut off, or of another sequence."""
    mask = case.mask
    q, k, v = states(tuple(mask.shape), heads, case.seed)
    with record() as log:
        out, weights = varlen_attention_forward(Layer(heads.heads // heads.kv_heads), q, k, v, mask)
    assert weights is None
    assert_rows(out, masked_sdpa(q, k, v, case.visible))
    packs = isinstance(mask.meaning.packing, Packing) and not mask.meaning.is_plain
    assert [call.backend != "dense" for call in log.calls] == [packs]


@given(asked(forms=("right", "left", "both"), square=True))
def test_packed_rows_see_what_they_saw(case: Asked) -> None:
    """A stack that runs packed hands the same pattern on for its rows ``(1, T)``."""
    meaning = case.mask.meaning
    layout = meaning.tokens
    packed_mask = meaning.packed
    assert packed_mask.shape == (1, 1, layout.num_rows, layout.num_rows)
    batch, columns = meaning.shape[0], meaning.shape[3]
    everywhere = torch.zeros(batch * columns, batch * columns, dtype=torch.bool)
    for i, visible in enumerate(case.visible[:, 0]):
        rows = slice(i * columns, (i + 1) * columns)
        everywhere[rows, rows] = visible
    at = layout.token_indices
    assert torch.equal(packed_mask.meaning.dense[0, 0], everywhere[at][:, at])
    q, k, v = (layout.pack(x.transpose(1, 2))[None].transpose(1, 2) for x in states(meaning.shape, HEADS[2], case.seed))
    out, _ = varlen_attention_forward(Layer(2), q, k, v, packed_mask)
    assert_rows(out, masked_sdpa(q, k, v, everywhere[at][:, at]))


@given(asked(square=True))
def test_which_batches_pack(case: Asked) -> None:
    """The claim that is worth something: common padding is skipped, and only what must be is computed densely."""
    meaning = case.mask.meaning
    layout = meaning.keys
    kind = meaning.pattern
    if isinstance(meaning.packing, str):
        assert kind.documents is None
        assert layout.has_holes or not layout.is_dense
        if kind.causal:
            assert not layout.right_padded
        else:
            assert kind.window is not None
    else:
        assert meaning.packing.layout_kv.total == layout.total


@pytest.mark.parametrize("offset", [0, torch.tensor(0)], ids=["new", "used before"])
def test_a_static_cache_packs_without_its_future(offset: Any) -> None:
    """Keys that nobody wrote yet are not attended to, and may hold anything."""
    real = F.pad(attention_mask("left"), (0, 3)).bool()
    mask = varlen_mask(4, 9, 12, offset, attention_mask=real)
    assert isinstance(mask, VarlenMask)
    way = mask.meaning.packing
    assert isinstance(way, Packing)
    assert way.layout_kv.padded_len == 9
    q, k, v = states((4, 1, 9, 12), HEADS[1], 0)
    k[:, :, 9:], v[:, :, 9:] = torch.nan, torch.nan
    out, _ = varlen_attention_forward(Layer(), q, k, v, mask)
    assert_rows(out, masked_sdpa(q, k[:, :, :9], v[:, :, :9], mask.meaning.dense[..., :9]))


def hide_first(m: Tensor) -> Tensor:
    m[..., 0] = False
    return m


def and_first(m: Tensor) -> Tensor:
    m &= torch.arange(m.shape[-1]) > 0
    return m


def through_view(m: Tensor) -> Tensor:
    m[0].fill_(True)
    return m


WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "m[...] = False": hide_first,
    "m &= other": and_first,
    "logical_and_": lambda m: m.logical_and_(torch.arange(m.shape[-1]) > 0),
    "masked_fill_": lambda m: m.masked_fill_(torch.arange(m.shape[-1]) == 0, False),
    "a view's fill_": through_view,
    "copy_": lambda m: m.copy_(m.flip(-1)),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("name", WRITES)
def test_what_a_model_writes_to_its_mask_counts(name: str, mode: Callable[[], Any]) -> None:
    """Or it is an error: the meaning must not outlive it."""
    with mode():
        q, k, v = states((4, 1, 9, 9), HEADS[1], 0)
        mask = causal()
        dense = WRITES[name](mask.meaning.dense.clone())
        try:
            written = WRITES[name](mask)
        except ArgumentError:
            return
        for m in (written, mask):
            assert_rows(varlen_attention_forward(Layer(), q, k, v, m)[0], masked_sdpa(q, k, v, dense))


# -------------------------------------------------------------------- one layout for all masks of a batch


def test_masks_of_one_batch_share_a_layout() -> None:
    """A model with two kinds of layers makes two masks, each of a bool copy of its own."""
    first, second = (
        varlen_mask(4, 9, 9, mask_function=f, attention_mask=attention_mask().bool()) for f in (None, hf.bidirectional_mask_function)
    )
    assert isinstance(first, VarlenMask)
    assert isinstance(second, VarlenMask)
    assert first.meaning.keys is second.meaning.keys
    assert first.meaning.is_of_columns_of(second.meaning)
    third = varlen_mask(4, 9, 9, attention_mask=attention_mask("left").bool())
    assert isinstance(third, VarlenMask)
    assert third.meaning.keys is not first.meaning.keys
    assert not third.meaning.is_of_columns_of(first.meaning)


def test_a_reused_buffer_is_read_again() -> None:
    """A mask's memory that holds the next batch: by value, never by identity."""
    buffer = attention_mask().bool()
    before = varlen_mask(4, 9, 9, attention_mask=buffer)
    assert isinstance(before, VarlenMask)
    assert before.meaning.keys.lengths == (9, 4, 6, 1)
    buffer.copy_(attention_mask(lengths=(2, 9, 3, 9)))
    after = varlen_mask(4, 9, 9, attention_mask=buffer)
    assert isinstance(after, VarlenMask)
    assert after.meaning.keys.lengths == (2, 9, 3, 9)
    assert before.meaning.keys.lengths == (9, 4, 6, 1)


def test_threads_do_not_share_what_was_seen_last() -> None:
    found: list[Any] = []

    def one(lengths: tuple[int, ...]) -> None:
        for _ in range(20):
            mask = varlen_mask(4, 9, 9, attention_mask=attention_mask(lengths=lengths).bool())
            assert isinstance(mask, VarlenMask)
            found.append(mask.meaning.keys.lengths == lengths)

    threads = [threading.Thread(target=one, args=(lengths,)) for lengths in ((9, 1, 2, 3), (4, 9, 9, 9))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 40


def test_a_mask_made_in_inference_mode_can_be_used_in_training() -> None:
    with torch.inference_mode():
        varlen_mask(4, 9, 9, attention_mask=attention_mask().bool()).meaning.keys  # type: ignore[union-attr]  # noqa: B018
    q, k, v = (x.requires_grad_() for x in states((4, 1, 9, 9), HEADS[1], 0))
    out, _ = varlen_attention_forward(Layer(), q, k, v, varlen_mask(4, 9, 9, attention_mask=attention_mask().bool()))
    out.sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("side", ["right", "left"])
def test_lengths_that_the_host_knows_are_not_read_back(side: str) -> None:
    made = HostLengths.as_mask((9, 4, 6, 1), 9, side).to(torch.bool)  # type: ignore[arg-type]
    mask = varlen_mask(4, 9, 9, attention_mask=made)
    assert isinstance(mask, VarlenMask)
    assert isinstance(made, HostLengths)
    assert mask.meaning.keys is made.seq_layout
    q, k, v = states((4, 1, 9, 9), HEADS[1], 0)
    out, _ = varlen_attention_forward(Layer(), q, k, v, mask)
    visible = attention_mask(side).bool()[:, None, None] & torch.ones(9, 9, dtype=torch.bool).tril()
    assert torch.equal(mask.meaning.dense, visible)
    assert_rows(out, masked_sdpa(q, k, v, visible))
