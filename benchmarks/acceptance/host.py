"""What a call costs the host: the time until it has queued its work, which nothing waits for. Where a layer's work on the device is
shorter than that, the host decides."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import varlen_attn
from varlen_attn import SeqLayout, varlen_attention

from .findings import Findings, Setting, one_line

__all__ = ["run"]

LENGTHS, COLUMNS = (60, 7, 33, 64), 64
CALLS, ROUNDS = 30, 7  # queued without waiting: fewer kernels than a queue holds


def run(setting: Setting, findings: Findings) -> None:
    findings.facts["microseconds of the host"] = found = dict[str, Any]()
    for name, call in _calls(setting).items():
        try:
            found[name] = round(_queueing(call, setting) * 1e6, 1)
        except Exception as error:
            found[name] = one_line(error)
        findings.publish()
    wanted = [found.get(name) for name in ("varlen_attention", "a layer after enable, packed")]
    findings.check("calls were timed", all(isinstance(value, float) for value in wanted), wanted)


def _calls(setting: Setting) -> dict[str, Callable[[], object]]:
    layout = SeqLayout.from_lengths(LENGTHS, COLUMNS, device=setting.device)
    width = 64 if setting.small else 512
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(layout.num_rows, 8, width // 8, generator=generator).to(setting.device, setting.dtype) for _ in range(3))
    dq, dk, dv = (x.clone().requires_grad_() for x in (q, k, v))
    dense, keep = layout.unpack(q).transpose(1, 2), ~layout.padding_mask()[:, None, None]
    layer = nn.TransformerEncoderLayer(width, 8, width, dropout=0.0, batch_first=True).to(setting.device, setting.dtype)
    own = varlen_attn.VarlenTransformerEncoderLayer(width, 8, width, dropout=0.0, batch_first=True).to(setting.device, setting.dtype)
    rows, x = q.flatten(1), layout.unpack(q.flatten(1))
    grad = torch.ones_like(q)

    def both() -> object:
        return torch.autograd.grad(varlen_attention(dq, dk, dv, layout), (dq, dk, dv), grad)

    return {
        "varlen_attention": torch.no_grad()(partial(varlen_attention, q, k, v, layout)),
        "varlen_attention, forward of training": partial(varlen_attention, dq, dk, dv, layout),
        "varlen_attention, forward and backward": both,
        "torch's kernel without this package": torch.no_grad()(partial(_bare, q, k, v, layout)),
        "F.scaled_dot_product_attention with a mask": torch.no_grad()(partial(F.scaled_dot_product_attention, dense, dense, dense, keep)),
        "a layer after enable, packed": torch.no_grad()(partial(own.eval(), rows, layout=layout)),
        "a layer of torch, padded, as in training": partial(layer, x, src_key_padding_mask=layout.padding_mask()),
        "a layer after enable, packed, as in training": partial(own.train(), rows, layout=layout),
        "SeqLayout.from_lengths": partial(SeqLayout.from_lengths, LENGTHS, COLUMNS, device=setting.device),
    }


def _bare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SeqLayout) -> object:
    from torch.nn.attention.varlen import varlen_attn as bare

    return bare(q, k, v, layout.cu_seqlens, layout.cu_seqlens, COLUMNS, COLUMNS)


def _queueing(call: Callable[[], object], setting: Setting) -> float:
    wait = torch.cuda.synchronize if setting.device == "cuda" else lambda: None
    calls, taken = 2 if setting.small else CALLS, []
    for _ in range(ROUNDS + 1):
        wait()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        taken.append((time.perf_counter() - began) / calls)
        wait()
    return median(taken[1:])
