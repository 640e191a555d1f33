"""What the masks of torch's modules say: where padding is, and whether an attention mask is causal, read from a device at most once; and
which packed call computes what an attention mask hides."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .._torch import is_tracing, is_unreadable, num_writes
from ..attention.export import here, static_graph
from ..layout.padded import PaddedRows
from ..layout.seq_layout import SeqLayout, layout_and_flags, moved


class Pattern(NamedTuple):
    """A call of packed attention in which each query sees exactly the keys that an attention mask leaves it.

    Attributes:
        layout_q, layout_kv: of queries and keys, as sequences that do not see each other.
        causal, window: as `varlen_attention`; causal is top-left.
        alone: positions in ``B*S`` of tokens that see only themselves, where these are no sequences of the layouts.
        pairs: of a query and a key that are computed, about.
        where: of each row that is wanted, its place among the results, which are 0, those of ``layout_q``, and those ``alone``; None where
            these are the rows of ``layout_q``. A query that sees nothing has the first, which is 0.
    """

    layout_q: SeqLayout
    layout_kv: SeqLayout
    causal: bool
    window: tuple[int | None, int | None] | None
    pairs: float
    alone: Tensor | None
    where: Tensor | None


class MaskFacts(NamedTuple):
    """What is known of the masks of one call.

    Attributes:
        layout: of ``key_padding_mask``; None without one.
        additive: its values are more than 0 and -inf, or want a gradient: they belong into the scores.
        not_causal: ``attn_mask`` is not known to hide exactly the keys after each query, at padding whatever it wants.
    """

    layout: SeqLayout | None
    additive: bool
    not_causal: bool


def read_masks(x: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, *, hint: bool, compare: bool) -> MaskFacts:
    """Lengths, where padding is, whether a float mask is padding only and whether ``attn_mask`` is causal, in one transfer.

    Args:
        x: the tensor that the padding is of; the layout goes to its device.
        key_padding_mask: ``(B, S)``, True (or -inf) is padding.
        attn_mask: ``(L, S)`` or ``(B*N, L, S)``, True (or -inf) hides.
        hint: the caller says that ``attn_mask`` is causal. While tracing nothing can be read and this is trusted, as torch documents.
        compare: look whether it is; otherwise it is taken as any mask.
    """
    questions: dict[str, Tensor] = {}
    hidden = key_padding_mask
    if key_padding_mask is not None and key_padding_mask.is_floating_point():
        hidden = torch.isneginf(key_padding_mask)
        questions["additive"] = ((key_padding_mask != 0) & ~hidden).any()
    static = static_graph() or (hidden is not None and is_unreadable(hidden)) or (attn_mask is not None and is_unreadable(attn_mask))
    if attn_mask is not None and compare and not (static or is_tracing(x)):
        questions["not causal"] = _is_not_causal(attn_mask, hidden)
    layout: SeqLayout | None = None
    answers: dict[str, bool] = {}
    if hidden is not None and static:
        layout = PaddedRows.of(x, here(hidden, x))
    elif hidden is not None:
        layout, values = layout_and_flags(~hidden, [q.to(hidden.device) for q in questions.values()])
        layout = moved(layout, x.device)
        answers = dict(zip(questions, values, strict=True)) if values else {}
    elif not is_tracing(x):
        answers = {name: bool(question) for name, question in questions.items()}
    # Where nothing could be read, a float mask may hold anything.
    additive = answers.get("additive", "additive" in questions) or wants_grad(key_padding_mask)
    not_causal = attn_mask is not None and (not compare or answers.get("not causal", not hint) or wants_grad(attn_mask))
    return MaskFacts(layout, additive, not_causal)


def wants_grad(mask: Tensor | None) -> bool:
    return mask is not None and mask.requires_grad and torch.is_grad_enabled()


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """torch's bool masks (True is hidden) as 0 and -inf; float masks as they are."""
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))


def _is_not_causal(mask: Tensor, padding: Tensor | None) -> Tensor:
    """Whether a bool or additive ``(..., L, S)`` mask hides anything else than the keys after each query, of keys that are no padding."""
    after = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    wrong = mask != after if mask.dtype == torch.bool else torch.where(after, ~torch.isneginf(mask), mask != 0)
    if padding is not None and padding.device == mask.device:
        heads = len(mask) // max(len(padding), 1)
        wrong &= ~(padding.repeat_interleave(heads, 0)[:, None] if mask.dim() == 3 else padding.all(0))
    return wrong.any()


# -------------------------------------------------------------------- masks as people write them

_NEVER = torch.finfo(torch.float32).min / 2  # added to a score, it leaves a weight of 0 beside any score that computes with numbers
_MOST = 254  # sequences of a row, which are compared as bytes
_TRUST = 4  # how many masks of a shape in turn may be nothing that is known
_misses: dict[Any, int] = {}
_patterns: MutableMapping[Tensor, tuple[Any, Any, Pattern | None]] = WeakIdKeyDictionary()


def pattern_of(mask: Tensor, padding: Tensor | None, batch: int, device: torch.device, *, own: bool, eager: bool = True) -> Pattern | None:
    """The packed call that does what a bool or float ``attn_mask`` says, or None: causal masks, padding, sliding windows, documents, and
    what is merged from these, with or without the diagonal of padded queries; for all heads alike, and for every pair that counts.

    Kept for the mask as long as it is not written to: all layers of a model are given the same.

    Args:
        mask: ``(L, S)`` or ``(B*N, L, S)``, True (or -inf) hides.
        padding: ``(B, S)``, True (or -inf) at keys that nothing sees, whatever ``mask`` says.
        batch: B.
        device: of the layouts.
        own: padding is left out of the queries too.
        eager: look at each new mask, also where those of this shape have been nothing that is known. Else only at some.
    """
    its = (mask,) if padding is None else (mask, padding)
    kept = not any(x.is_inference() for x in its)  # which do not count how often they are written to
    key = (batch, device, own, *map(num_writes, its)) if kept else None
    known = _patterns.get(mask)
    if known is not None and kept and known[0] == key and (known[1] and known[1]()) is padding:
        return known[2]
    kind = mask.shape, mask.dtype
    misses = _misses.get(kind, 0)
    if not eager and misses > _TRUST and misses % _TRUST**2:
        _misses[kind] = misses + 1
        return None
    if wants_grad(mask):
        return None
    with torch.inference_mode(False), torch.no_grad():  # it may be kept for training
        pattern = _find(mask, padding, batch, device, own)
    _misses[kind] = misses + 1 if pattern is None else 0
    if kept:
        _patterns[mask] = key, None if padding is None else weakref.ref(padding), pattern
    return pattern


def _find(mask: Tensor, padding: Tensor | None, batch: int, device: torch.device, own: bool) -> Pattern | None:
    """What the mask may be is seen from a few of its rows. Then all of it is compared with that."""
    len_q, len_k = mask.shape[-2:]
    if 0 in mask.shape:
        return None
    if padding is not None:
        padding = (torch.isneginf(padding) if padding.is_floating_point() else padding).to(mask.device)
    heads = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, -1))
    one = heads[:, 0]
    see = torch.logical_not if mask.dtype == torch.bool else lambda x: x == 0
    hidden = padding if padding is None or mask.dim() == 3 else padding.all(0, keepdim=True)
    columns = torch.arange(len_k, device=mask.device)
    left = right = torch.full((), len_k, device=mask.device)
    if len_q == len_k:
        # Of each row the keys, by the diagonal; sequences of those that see the one before them.
        keys = see(one.diagonal(dim1=1, dim2=2))
        keys = keys if hidden is None else keys & ~hidden
        last = torch.where(keys, columns, -1).cummax(1).values.roll(1, 1)
        last[:, 0] = -1
        before = last.clamp(min=0)
        joined = keys & (last >= 0) & see(one.gather(2, before[..., None])[..., 0])
        ids = (keys & ~joined).cumsum(1) * keys
        # How far the last and the first token of the longest sequence see.
        counted = keys.cumsum(1)
        rank = counted - torch.where(keys & ~joined, counted, 0).cummax(1).values
        at = torch.where(keys, rank, -1).argmax()
        row, longest = at // len_k, rank.flatten()[at]
        alike = ids[row] == ids[row, at % len_k]
        first = alike.to(torch.uint8).argmax()
        seen = [(see(one[row, i]) & alike & far).sum() - 1 for i, far in ((at % len_k, columns <= at % len_k), (first, columns >= first))]
        left, right = (torch.where(x == longest, len_k, x.clamp(min=0)) for x in seen)
        start = keys.to(torch.uint8).argmax(1, keepdim=True)
        attached = ~keys & keys.any(1, keepdim=True) & see(one.gather(2, start[..., None].expand(-1, len_q, 1))[..., 0])
    else:
        keys = see(one[:, 0])
        keys = keys if hidden is None else keys & ~hidden
        ids, attached = keys.long(), keys.new_ones(len(one), len_q)
    of_queries = attached.long() if len_q != len_k else torch.where(attached, 1, ids)
    blind = (of_queries == 0) | ~keys.any(1, keepdim=True)
    distance = columns - torch.arange(len_q, device=mask.device)[:, None]
    of_queries = of_queries.masked_fill(of_queries == 0, _MOST + 1).to(torch.uint8)
    visible = (of_queries[..., None] == ids.to(torch.uint8)[:, None]) & ((distance >= -left) & (distance <= right))
    if padding is not None and not own:
        blind |= True  # for queries at padding, of which nobody knows whether they see a key
    wrong = _differs(heads, visible, hidden, own, blind) | (ids.max() > _MOST)
    facts = torch.cat([torch.stack([wrong, left, right]).long(), ids.flatten(), attached.flatten()]).cpu()
    if facts[0]:
        return None
    return _packing(facts, len(one), batch, len_q, len_k, None if padding is None else padding.cpu(), own, device)


def _differs(heads: Tensor, visible: Tensor, padding: Tensor | None, own: bool, blind: Tensor) -> Tensor:
    """Whether a mask ``(G, N, L, S)`` is not that of ``visible (G, L, S)`` for every head, at keys that are no padding, and with ``own`` at
    queries that are none. In few passes: this takes a tenth of the attention itself."""
    if heads.dtype == torch.bool:
        differs = heads == visible[:, None]
    else:
        low = heads.new_full((), _NEVER if torch.finfo(heads.dtype).min < _NEVER else -torch.inf)
        if padding is not None:
            blind = blind & ~padding if own else blind
        low = torch.where(blind.any(), -torch.inf, low)  # of keys that are all hidden the least hidden one counts
        wanted = torch.zeros(visible.shape, dtype=heads.dtype, device=heads.device).masked_fill_(~visible, low)
        differs = heads.clamp(min=low) != wanted[:, None]
    if padding is not None:
        counts = ~padding[:, None, None]
        differs = differs & (counts & ~padding[:, None, :, None] if own else counts)
    return differs.view(torch.uint8).amax() > 0


def _packing(
    facts: Tensor, groups: int, batch: int, len_q: int, len_k: int, padding: Tensor | None, own: bool, device: torch.device
) -> Pattern | None:
    """The call, from sequences by their numbers and queries that see the keys of their row without being one; on the host."""
    left, right = facts[1:3].tolist()
    ids, attached = facts[3:].split([groups * len_k, groups * len_q])
    ids, attached = ids.view(groups, len_k).expand(batch, -1), attached.view(groups, len_q).bool().expand(batch, -1)
    wanted = attached.new_ones(batch, len_q)
    if padding is not None:
        if own:
            wanted = ~padding
        elif len_q == len_k:
            attached = attached | ((ids > 0) & padding)
        attached, ids = attached & wanted, ids.masked_fill(padding, 0)
    alone, real = None, ids > 0
    several = _several(ids)
    if several and attached.any():
        return None
    if several:
        number = ids + torch.arange(batch, device="cpu")[:, None] * (len_k + 1)
        single = real & (number.flatten().bincount()[number] == 1)
        if single.any():
            alone, ids = single.flatten().nonzero()[:, 0], ids.masked_fill(single, 0)
            real = ids > 0
            several = _several(ids)
    keys = SeqLayout.from_document_ids(ids) if several else SeqLayout.from_attention_mask(real, validate=False)
    queries, causal = keys, right == 0
    window = (left if left < len_k else None, right if 0 < right < len_k else None)
    if attached.any():
        queries = SeqLayout.from_attention_mask(attached | real if len_q == len_k else attached, validate=False)
        if window != (None, None) or (causal and not (queries.right_padded and keys.right_padded)):
            return None
    if window != (None, None) and keys.has_holes:
        return None
    place = torch.zeros(batch * len_q, dtype=torch.int64, device="cpu")
    order = queries.token_indices if alone is None else torch.cat([queries.token_indices, alone])
    place[order.cpu()] = torch.arange(1, len(order) + 1, device="cpu")
    where = place[wanted.flatten()]
    alone = alone if alone is None else alone.to(device)
    same = alone is None and len(where) == queries.num_rows
    near = len_k if window == (None, None) else 1 + sum(len_k if side is None else side for side in window[: 2 - causal])
    pairs = sum(q * min(k / 2 if causal else k, near) for q, k in zip(queries.lengths or (), keys.lengths or (), strict=True))
    layouts = [moved(x, device) for x in ((queries,) if queries is keys else (queries, keys))]
    its_window, where = None if window == (None, None) else window, where.to(device)
    return Pattern(layouts[0], layouts[-1], causal, its_window, pairs, alone, None if same else where)


def _several(ids: Tensor) -> bool:
    """Whether a row has more than one sequence."""
    return bool(((ids != ids.amax(1, keepdim=True)) & (ids > 0)).any())
