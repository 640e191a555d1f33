"""Ops of ours in `torch.library`, without what its decorator costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def own_op(name: str, device: str = "cpu") -> Callable[[Callable[..., Any]], Any]:
    """Register ``varlen_attn::name`` for tensors of one device type, or with ``"default"`` of any. What `torch.library.custom_op` does,
    except that its wrapper imports dynamo at the first call, which takes a second."""

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(f"varlen_attn::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(f"varlen_attn::{name}", device, function)
        return getattr(torch.ops.varlen_attn, name).default

    return register
