"""What the masks of torch's modules say: where padding is, and whether an attention mask is causal, read from a device at most once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._torch import is_tracing, is_unreadable
from ..attention.export import here, static_graph
from ..layout.padded import PaddedRows
from ..layout.seq_layout import SeqLayout, layout_and_flags, moved


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
