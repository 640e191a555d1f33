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
from ..kernels.cpu import build
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
        questions["not causal"] = is_not_causal(attn_mask, hidden)
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


def is_not_causal(mask: Tensor, padding: Tensor | None) -> Tensor:
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
_PART = 1 << 18  # numbers that are compared at once
_TRUST = 4  # how many masks of a shape in turn may be nothing that is known
_MANY = 4096  # shapes that are remembered
_misses: dict[Any, int] = {}
_patterns: MutableMapping[Tensor, tuple[Any, Any, Pattern | None]] = WeakIdKeyDictionary()


def pattern_of(mask: Tensor, padding: Tensor | None, batch: int, device: torch.device, *, own: bool, worth: Any = None) -> Pattern | None:
    """The packed call that does what a bool or float ``attn_mask`` says, or None: causal masks, padding, sliding windows, documents, and
    what is merged from these, with or without the diagonal of padded queries; for all heads alike, and for every pair that counts.

    Kept for the mask as long as it is not written to: all layers of a model are given the same.

    Args:
        mask: ``(L, S)`` or ``(B*N, L, S)``, True (or -inf) hides.
        padding: ``(B, S)``, True (or -inf) at keys that nothing sees, whatever ``mask`` says.
        batch: B.
        device: of the layouts.
        own: padding is left out of the queries too.
        worth: whether a pattern is worth looking for. Where those of this shape were not, only some masks are looked at; None is at all.
    """
    # Not all optimizers count their writes to what is learned.
    if mask.requires_grad or not mask.numel() or not (mask.dtype == torch.bool or mask.is_floating_point()):
        return None
    padding, eager = padding[None] if padding is not None and padding.dim() == 1 else padding, worth is None
    its = [x for x in (mask, padding) if x is not None]
    kept = not any(x.is_inference() for x in its)  # which do not count how often they are written to
    key = (batch, device, own, eager, *map(num_writes, its)) if kept else None
    known, kind = _patterns.get(mask) if kept else None, (mask.shape, mask.dtype)
    if known is not None and known[0] == key and known[1]() is its[-1]:
        return known[2]
    misses, pattern = _misses.pop(kind, 0), None
    if eager or misses <= _TRUST or misses % _TRUST**2 == 0:
        with torch.inference_mode(False), torch.no_grad():  # it may be kept for training
            pattern = _find(mask, padding, batch, device, own, eager)
        if kept:
            _patterns[mask] = key, weakref.ref(its[-1]), pattern
    if (pattern is None or not (eager or worth(pattern))) and len(_misses) < _MANY:
        _misses[kind] = misses + 1
    return pattern


def _find(mask: Tensor, padding: Tensor | None, batch: int, device: torch.device, own: bool, eager: bool) -> Pattern | None:
    """What the mask may be is seen from a few of its rows. Then all of it is compared with that."""
    mask = (mask[0] if mask.dim() == 3 and not mask.stride(0) else mask).resolve_neg()  # one for all samples, as `expand` makes it
    len_q, len_k = mask.shape[-2:]
    if padding is not None:
        padding = (torch.isneginf(padding) if padding.is_floating_point() else padding).to(mask.device)
    hidden = padding if padding is None or mask.dim() == 3 else padding.all(0, keepdim=True)
    if mask.dim() == 2 and len_q == len_k and not is_not_causal(mask, hidden):
        seqs = torch.ones(1, len_k, dtype=torch.int64, device="cpu")
        return _packing(seqs, seqs, (len_k, 0), batch, padding, own, device)
    heads = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, -1))
    one = heads[:, 0]
    see = torch.logical_not if mask.dtype == torch.bool else lambda x: x == 0
    left, right = max(len_q, len_k), len_k
    # Of each row the keys, by the diagonal if there is one.
    keys = see(one.diagonal(dim1=1, dim2=2) if len_q == len_k else one[:, 0])
    keys = keys if hidden is None else keys & ~hidden
    some = keys.any(1, keepdim=True)
    if len_q == len_k:
        # Sequences of those that see the one before them. How far the last and the first token of the longest one see.
        last = torch.where(keys, torch.arange(len_k, device=mask.device), -1).cummax(1).values.roll(1, 1)
        last[:, 0] = -1
        starts = keys & ~(see(one.gather(2, last.clamp(min=0)[..., None])[..., 0]) & (last >= 0))
        seqs, counted = starts.cumsum(1) * keys, keys.cumsum(1)
        rank = (counted - (counted * starts).cummax(1).values).masked_fill_(~keys, -1)
        row, at = divmod(int(rank.argmax()), len_k)
        alike, longest = seqs[row] == seqs[row, at], int(rank[row, at])
        first = int(alike.to(torch.uint8).argmax())
        sees = [int((see(one[row, i]) & alike)[part].sum()) - 1 for i, part in ((at, slice(at + 1)), (first, slice(first, None)))]
        left, right = (len_k if n >= longest else max(n, 0) for n in sees)
        of_queries, attached = seqs, ~keys & some
        if attached.any():
            start = keys.to(torch.uint8).argmax(1, keepdim=True)
            attached &= see(one.gather(2, start[..., None].expand(-1, len_q, 1))[..., 0])
            of_queries = seqs.masked_fill(attached, 1)
    else:
        attached = some.new_ones(len(one), len_q)
        seqs, of_queries = keys.long(), attached.long()
    if int(seqs.max()) > _MOST or (not eager and min(left, right) == len_k and bool((seqs == 1).all())):
        return None  # too many to count, or nothing is hidden
    hides = some.new_ones(())
    if mask.is_floating_point():
        hides = one[:, 0].amin()
        hides = hides if hides == -torch.inf else one.amin()
        hides = hides.where(hides < 0, -torch.inf)
        if (number := float(hides)) > -torch.inf:
            # A query without a key sees those that a number hides. Beside padding, which is not looked at by rows of a mask for all
            # samples, only queries that are keys themselves are known to see one.
            unsure = ~some | (of_queries == 0) | (attached if padding is not None and mask.dim() == 2 else False)
            if number > _NEVER or not (padding is None or own) or unsure.any():
                return None
            heads = heads + 0.0  # without negative zeros
    ids = of_queries.masked_fill(of_queries == 0, _MOST + 1).to(torch.uint8), seqs.to(torch.uint8)
    if _differs(heads, hides, *ids, None if hidden is None else ~hidden, (left, right), own):
        return None
    return _packing(seqs.cpu(), of_queries.cpu(), (left, right), batch, padding, own, device)


def _differs(heads: Tensor, hides: Tensor, of_queries: Tensor, of_keys: Tensor, real: Tensor | None, near: Any, own: bool) -> bool:
    """Whether a mask ``(G, N, L, S)`` has anything else than 0 at the keys that are near a query and of its sequence, ``(G, L)`` and
    ``(G, S)``, and ``hides`` elsewhere, for every head, at the keys, and queries if ``own``, that are ``real`` ``(G, S)`` (None: all).

    By its bits, because this is done for each new mask; without the compiled kernel a part at a time."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[heads.dtype.itemsize]
    heads, hides = heads.view(words), hides.view(words)
    if heads.is_cpu and heads.stride(3) == 1 and not build.why_not():
        tables = [x if x is None else x.contiguous() for x in (of_queries, of_keys, real if own else None, real)]
        pointers = (0 if x is None else x.data_ptr() for x in (heads, *tables))
        steps = (step * heads.itemsize for step in heads.stride()[:3])
        return build.library().differs(*pointers, *steps, *heads.shape, heads.itemsize, int(hides), *near)
    far = 1 - torch.ones(heads.shape[2:], dtype=torch.uint8, device=heads.device).triu(-near[0]).tril(near[1])
    part = max(1, _PART // heads[0].numel()) if heads.is_cpu else len(heads)
    parts = [x.split(part) for x in (heads, of_queries, of_keys)]
    counts = [None] * len(parts[0]) if real is None else (real[:, None] & real[..., None] if own else real[:, None])[:, None].split(part)
    for given, q, k, count in zip(*parts, counts, strict=True):
        hidden = (q[..., None] ^ k[:, None]).clamp_(max=1).bitwise_or_(far)
        differs = given ^ hidden.to(words).mul_(hides)[:, None]
        differs = differs if count is None else differs.bitwise_and_(count.to(words).neg_())
        if differs.contiguous().view(torch.uint8).amax():
            return True
    return False


def _packing(seqs: Tensor, of_queries: Tensor, near: Any, batch: int, padding: Tensor | None, own: bool, device: Any) -> Pattern | None:
    """The call, on the host, from the numbers of the sequences of keys ``(G, S)``, and of those that queries see ``(G, L)``, 0 for none."""
    len_q, len_k, (left, right) = of_queries.shape[1], seqs.shape[1], near
    looks = of_queries is not seqs or padding is not None
    seqs, of_queries, alone = seqs.expand(batch, -1), of_queries.expand(batch, -1), None
    wanted = torch.ones(batch, len_q, dtype=torch.bool, device="cpu")
    if padding is not None:
        padding = padding.cpu()
        wanted, seqs = ~padding if own else wanted, seqs.masked_fill(padding, 0)
    most = seqs.amax(1, keepdim=True)
    several = bool(((seqs != most) & (seqs > 0)).any())
    # Queries that see a sequence without being one of its keys. Where padding leaves no key of it, they see nothing.
    attaches = len_q != len_k
    if looks:
        attached = wanted & (of_queries > 0) & ((of_queries == most) | several)
        if not attaches:
            attached &= (seqs == 0) & ((right > 0) | seqs.cumsum(1).bool())
            attaches = bool(attached.any())
    if several:
        number = seqs + torch.arange(batch, device="cpu")[:, None] * (len_k + 1)
        single = (seqs > 0) & (number.flatten().bincount().take(number) == 1)
        if single.any():
            alone, seqs = single.flatten().nonzero()[:, 0], seqs.masked_fill(single, 0)
            several = bool(((seqs != seqs.amax(1, keepdim=True)) & (seqs > 0)).any())
    real, causal, where = seqs > 0, right == 0, None
    keys = queries = SeqLayout.from_document_ids(seqs) if several else SeqLayout.from_attention_mask(real, validate=False)
    if attaches:
        queries = SeqLayout.from_attention_mask(attached | real if len_q == len_k else attached, validate=False)
    window = (left if left < len_k else None, right if 0 < right < len_k else None)
    limited, shifted = window != (None, None), not (queries.right_padded and keys.right_padded)
    if (limited and (attaches or keys.has_holes)) or (attaches and (several or alone is not None or (causal and shifted))):
        return None
    if several and keys.num_seqs != len(number[real].unique()):
        return None  # holes
    if alone is not None or queries.num_rows != int(wanted.sum()):
        place = torch.zeros(batch * len_q, dtype=torch.int64, device="cpu")
        order = queries.token_indices if alone is None else torch.cat([queries.token_indices, alone])
        place.scatter_(0, order, torch.arange(1, len(order) + 1, device="cpu"))
        where = (place if padding is None else place[wanted.flatten()]).to(device)
    reach = 1 + sum(len_k if side is None else side for side in window[: 2 - causal]) if limited else len_k
    pairs = sum(q * min(k / 2 if causal else k, reach) for q, k in zip(queries.lengths or (), keys.lengths or (), strict=True))
    layout_kv = moved(keys, device)
    layout_q = layout_kv if queries is keys else moved(queries, device)
    return Pattern(layout_q, layout_kv, causal, window if limited else None, pairs, alone if alone is None else alone.to(device), where)
