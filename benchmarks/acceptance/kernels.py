"""Which kernels ran: those that a backend promises, and a flash kernel wherever one exists."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from varlen_attn import BackendRefused, SeqLayout, record, varlen_mha
from varlen_attn.testing import assert_within_budget, reference_attention

from .cases import Batch, Case, attend, here, leaves_of, mask_of
from .findings import Findings, Setting, one_line
from .traced import kernels_of

__all__ = ["FLASH_CLASS", "by_name", "flash_class", "run"]

FLASH_CLASS = ("flash3", "flash4", "torch_varlen", "flash2", "nested")
# Of backward passes; what shows of a forward, a backend says itself. From the strings of torch's and flash-attn's libraries and from
# issues: only a run can tell.
BACKWARD = {
    "flash3": r"FlashAttnBwdSm90",
    "flash4": r"(?i)flash.*(bwd|backward)",
    "torch_varlen": r"flash_bwd",
    "flash2": r"flash_bwd",
    "mem_efficient": r"fmha_cutlassB_",
    "nested": r"flash_bwd|fmha_cutlassB_",
    "flex": r"flex_attention_backward|flex_attention.*bwd",
    "sdpa_padded": r"fmha_cutlassB_",
}
_FLASH_CPU = r"aten::_scaled_dot_product_flash_attention_for_cpu_backward$"
BACKWARD_ON_CPU = {
    "cpu": _FLASH_CPU,
    "cpu_native": r"varlen_attn::cpu_native_backward$",
    "sdpa_padded": _FLASH_CPU,
    "nested": r"softmax_backward",
}
_HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)


def run(setting: Setting, findings: Findings) -> None:
    batch = by_name(setting, findings)
    _what_torch_chooses(batch, setting.device, findings)
    if not setting.small:
        flash_class(setting, findings)


def by_name(setting: Setting, findings: Findings) -> Batch:
    """What a profiler sees of every backend that is here; the batch that was computed."""
    device = setting.device
    dtype = setting.dtype
    case = Case("", (40, 5, 64), 64) if setting.small else Case("", (1024, 300, 700, 5), 1024, heads=(8, 8))
    batch = Batch.of(case, dtype, device)
    backward = BACKWARD_ON_CPU if setting.small else BACKWARD
    for name in here(device):
        with findings.trying(name):
            _of_backend(name, batch, backward.get(name, ""), findings)
    return batch


def _of_backend(name: str, batch: Batch, backward: str, findings: Findings) -> None:
    layout, _ = batch.layouts()
    leaves = leaves_of(tuple(layout.pack(x.detach()) for x in batch.qkv))
    grad = layout.pack(batch.grad)

    def both() -> object:
        return torch.autograd.grad(attend(leaves, layout, name), leaves, grad)

    try:
        both()  # what is set up at a first call is not of interest
    except BackendRefused as refusal:
        findings.facts[name] = one_line(refusal)
        return
    with record(kernels=True) as log:
        both()
    (call,) = log.calls
    real = kernels_of(both, grad.device.type)  # without what somebody wrote on the timeline, which shows like a kernel there
    forward = tuple(kernel for kernel in call.kernels or () if kernel in real)
    rest = tuple(kernel for kernel in log.kernels or () if kernel in real and kernel not in forward)
    findings.facts[name] = {"forward": _short(forward), "backward": _short(rest, backward)}
    findings.check(f"{name}, forward", bool(forward) and call.confirmed is not False, call.kernel_text()[:300])
    holds = any(re.search(backward, kernel) for kernel in rest)
    findings.check(f"{name}, backward", holds, f"expected {backward!r}" if holds else f"expected {backward!r}, saw {_short(rest)}")


def _short(names: tuple[str, ...], first: str = "") -> list[str]:
    """At most eight names of at most 120 characters, what matches standing first."""
    return [name[:120] for name in sorted(names, key=lambda name: not (first and re.search(first, name)))[:8]]


def _what_torch_chooses(batch: Batch, device: str, findings: Findings) -> None:
    """Facts about `F.scaled_dot_product_attention` with nothing said about kernels, with and without a mask."""
    q, k, v = (x.detach().nan_to_num(0).transpose(1, 2).contiguous() for x in batch.qkv)
    keep = ~batch.masks[0][:, None, None]
    calls: dict[str, Callable[[], object]] = {
        "torch, no mask": lambda: F.scaled_dot_product_attention(q, k, v),
        "torch, bool mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=keep),
        "torch, causal": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    for name, call in calls.items():
        findings.facts[name] = _short(kernels_of(call, device), r"flash|fmha|sdpa|attention")


def flash_class(setting: Setting, findings: Findings) -> None:
    """R-01: `varlen_mha(x, mask)` in half precision runs a flash kernel, for any mask and any head dimension up to 256."""
    if setting.device == "cuda" and (torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0)):
        findings.facts["flash class"] = "not asked of this GPU: half precision flash kernels need sm80"
        return
    lengths = (70, 0, 128, 1)
    for side in ("right", "left", "both", "holes"):
        mask = mask_of(lengths, 128, side).to(setting.device)
        for dim in _HEAD_DIMS:
            x = torch.randn(*mask.shape, 2 * dim, device=setting.device, dtype=torch.bfloat16, requires_grad=True)
            layout = SeqLayout.from_key_padding_mask(mask, validate=False)
            with findings.trying(f"flash class, {side}, head dim {dim}"), record() as log:
                out = varlen_mha(x, layout=layout, num_heads=2)
                out.sum().backward()
                ran = log.calls[0].backend
                _is_right(x, out, layout)
                findings.check(f"flash class, {side}, head dim {dim}", ran in FLASH_CLASS, ran)


def _is_right(x: Tensor, out: Tensor, layout: SeqLayout) -> None:
    """Raise AssertionError unless it is as near to float64 as plain attention; without weights q, k and v are all x."""
    heads = layout.pack(x.detach()).unflatten(-1, (2, -1))
    exact, plain = (reference_attention(heads, heads, heads, layout, dtype=dtype).flatten(1) for dtype in (torch.float64, x.dtype))
    assert_within_budget(layout.pack(out.detach()), exact, plain)
