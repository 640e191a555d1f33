"""A batch as a model is called with it: its arguments, the tensors in them, and the masks among these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._torch import pytree
from ..errors import ArgumentError
from ..layout.seq_layout import SeqLayout

Inputs: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


def map_tensors(change: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Every tensor changed; layouts stay whole."""
    return pytree.tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, inputs, is_leaf=is_layout)  # type: ignore[no-any-return]


def is_layout(x: Any) -> bool:
    return isinstance(x, SeqLayout)


def tensors_in(inputs: Inputs) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(inputs, is_leaf=is_layout) if isinstance(x, Tensor)]


def inputs_of(batch: Any, name: str) -> Inputs:
    """Of a call with ``batch``: ``model(**batch)``, ``model(*batch)`` or ``model(batch)``."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list | Tensor):
        return (batch,) if isinstance(batch, Tensor) else tuple(batch), {}
    raise ArgumentError(f"`{name}` must be a tuple, list, mapping or tensor, but is {type(batch).__name__!r}: pass the arguments.")


def masks_in(inputs: Inputs) -> dict[str, tuple[Any, Tensor]]:
    """The arguments that say which tokens are real, and what they say."""
    found: dict[str, tuple[Any, Tensor]] = {}
    positional = {f"argument {i}": value for i, value in enumerate(inputs[0])}
    inside = {key: y for x in inputs[0] if isinstance(x, Mapping) for key, y in x.items()}
    for name, value in (positional | inside | inputs[1]).items():
        if isinstance(value, SeqLayout):
            if value.row_ids is not None:
                raise ArgumentError(f"`{name}` must have one sequence a row, but has several documents: build it from a mask.")
            found[name] = value, ~value.padding_mask()
        elif not isinstance(value, Tensor) or value.dim() != 2:
            continue
        elif name.endswith("attention_mask"):
            found[name] = value, ~SeqLayout.from_attention_mask(value, validate=False).padding_mask()
        elif name.endswith("key_padding_mask") or (name in positional and value.dtype == torch.bool):
            found[name] = value, ~SeqLayout.from_key_padding_mask(value, validate=False).padding_mask()
    return found
