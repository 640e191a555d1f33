"""What is derived from layouts, such as block masks and layouts without empty sequences, is made once a batch and not in every layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from .._torch import is_tracing, num_writes
from ..layout.seq_layout import SeqLayout, is_captured

_T = TypeVar("_T")

# By identity, as layouts are compared, and gone when one of the two layouts is. Not an attribute of the layout: copies and pickles of
# it would carry the tensors along, and a second layout (cross-attention) would be kept alive by the first.
_kept: WeakKeyDictionary[SeqLayout, WeakKeyDictionary[SeqLayout, dict[Hashable, Any]]] = WeakKeyDictionary()


def kept(layout_q: SeqLayout, layout_kv: SeqLayout, key: Hashable, make: Callable[[], _T]) -> _T:
    """``make()``, once for two layouts and a key, and again after `SeqLayout.update_`. The result must not refer to these layouts.

    While a CUDA graph is captured it is neither looked up nor kept: the graph must compute it from the layout at each replay. Nor while
    tracing.
    """
    offsets = layout_q.cu_seqlens, layout_kv.cu_seqlens
    if is_tracing(*offsets) or is_captured(offsets[0]) or any(x.is_inference() for x in offsets):
        return make()
    versions = num_writes(offsets[0]), num_writes(offsets[1])
    known = _kept.setdefault(layout_q, WeakKeyDictionary()).setdefault(layout_kv, {})
    if key not in known or known[key][0] != versions:
        with torch.inference_mode(False):  # kept for a later training step, which saves these tensors for its backward
            known[key] = versions, make()
    result: _T = known[key][1]
    return result
