"""What the inputs of `nn.MultiheadAttention` must be: torch's checks, in its classes and words, with a fix appended."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DtypeError
from ..layout.seq_layout import SeqLayout


def mha_shape_check(*args: Any) -> None:
    """torch's own check of ranks. Private, but its words are part of the drop-in's contract; looked up late, so that a torch without it
    breaks the drop-in only."""
    F._mha_shape_check(*args)  # type: ignore[attr-defined]


def check_inputs(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    attn_mask: Tensor | None,
    packed: tuple[SeqLayout, SeqLayout] | None,
) -> None:
    """torch's own checks, in its classes and words, with our fix appended; also of masks that would not be used.

    ``packed`` are the layouts of queries and keys where those are packed rows.
    """
    for name, x in (("key_padding_mask", mask), ("attn_mask", attn_mask)):
        if x is not None and not isinstance(x, Tensor):
            raise DtypeError(f"`{name}` must be a tensor, but is {type(x).__name__}.")
    try:
        if packed is None:
            mha_shape_check(query, key, value, mask, attn_mask, module.num_heads)
        for name, x in (("key_padding_mask", mask), ("attn_mask", attn_mask)):
            if x is not None and x.dtype != torch.bool and not x.is_floating_point():
                raise AssertionError(f"only bool and floating types of {name} are supported")
        _check_widths(module, query, key, value)
        if packed is None:
            batch, len_q, len_k = _sizes(module, query, key)
        else:
            batch, len_q, len_k = packed[0].batch_size, packed[0].padded_len, packed[1].padded_len
        if mask is not None:
            _check_key_padding_mask(mask if mask.dim() == 2 else mask[None], batch, len_k)
        if attn_mask is not None:
            expected = (len_q, len_k) if attn_mask.dim() == 2 else (batch * module.num_heads, len_q, len_k)
            if tuple(attn_mask.shape) != expected:
                raise RuntimeError(f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {expected}.")
    except (AssertionError, RuntimeError) as error:
        order = "(B, L, E)" if module.batch_first else "(L, B, E)"
        shown = None if mask is None else tuple(mask.shape)
        raise type(error)(
            f"{str(error).rstrip('.')}. Here batch_first={module.batch_first}, so query and key are {order}, "
            f"key_padding_mask is (B, S) with True at padding; given are query {tuple(query.shape)}, "
            f"key {tuple(key.shape)}, key_padding_mask {shown}."
        ) from None


def _check_widths(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.shape[-1] != module.embed_dim:
        raise AssertionError(f"was expecting embedding dimension of {module.embed_dim}, but got {query.shape[-1]}")
    if key.dim() == 3 and module.batch_first:  # torch names the shapes after its own transposition
        shape_k, shape_v = (torch.Size((x.shape[1], x.shape[0], x.shape[2])) for x in (key, value))
    else:
        shape_k, shape_v = key.shape, value.shape
    if module._qkv_same_embed_dim and shape_k != shape_v:
        raise AssertionError(f"key shape {shape_k} does not match value shape {shape_v}")
    if shape_k[:-1] != shape_v[:-1]:
        raise AssertionError(f"key's sequence and batch dims {shape_k[:-1]} do not match value's {shape_v[:-1]}")
    for name, x, width in (("key", key, module.kdim), ("value", value, module.vdim)):
        if x.shape[-1] != width:
            raise RuntimeError(f"was expecting {name} dimension of {width}, but got {x.shape[-1]}")


def _sizes(module: nn.MultiheadAttention, query: Tensor, key: Tensor) -> tuple[int, int, int]:
    """B, L, S."""
    if query.dim() == 2:
        return 1, query.shape[0], key.shape[0]
    batch, length = (0, 1) if module.batch_first else (1, 0)
    if query.shape[batch] != key.shape[batch]:
        raise RuntimeError(f"query and key must have one batch size, but have {query.shape[batch]} and {key.shape[batch]}")
    return query.shape[batch], query.shape[length], key.shape[length]


def _check_key_padding_mask(mask: Tensor, batch: int, len_k: int) -> None:
    """As torch's, whose own function does not trace."""
    for i, expected in enumerate((batch, len_k)):
        if mask.shape[i] != expected:
            raise AssertionError(f"Expected key_padded_mask.shape[{i}] to be {expected}, but got {mask.shape[i]}")
