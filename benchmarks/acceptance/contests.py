"""Who is timed on a GPU: torch with and without a mask, other libraries, the bare kernels, ours, and ways to move padding out and in."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from varlen_attn import SeqLayout, padded_attention
from varlen_attn.testing import assert_within_budget, reference_attention

from .. import contestants as others
from ..contestants import Case, Contestant
from ..measure import Absent
from .cases import here
from .findings import one_line

__all__ = ["AGAIN", "BARE", "BASE", "KERNEL", "WHOLE", "contestants", "layouts", "movers", "packers", "verified"]

BASE, KERNEL, WHOLE, BARE, AGAIN = "torch, mask", "ours, kernel only", "ours, whole path", "bare kernel", "bare kernel again"
_DENSE = "no mask"  # in a name: computes padding too, a lower bound for padded calls and not compared
_FLEX = "flex_attention, mask built before"
_LEFT_OUT = ("reference", "sdpa_padded")
_ENOUGH = 1024  # tokens that are compared with float64; their results depend on no others


def contestants(case: Case) -> tuple[dict[str, Contestant], dict[str, str]]:
    """All that can run, the default masked call first, and the reasons of those that cannot."""
    found: dict[str, Contestant] = {}
    absent: dict[str, str] = {}
    for name, make in _makers(case).items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # prototypes say that they are, and forced kernels why they do not run
                found[name] = make(case)
                found[name].forward()
        except Exception as error:
            found.pop(name, None)
            absent[name] = one_line(error)
    return found, absent


def _makers(case: Case) -> dict[str, Callable[[Case], Contestant]]:
    makers: dict[str, Callable[[Case], Contestant]] = {
        BASE: others.masked,
        "torch, mask, mem-efficient": partial(_forced, kernel=SDPBackend.EFFICIENT_ATTENTION, masked=True),
        "torch, mask, cuDNN": partial(_forced, kernel=SDPBackend.CUDNN_ATTENTION, masked=True),
        f"torch, {_DENSE}, flash": partial(_forced, kernel=SDPBackend.FLASH_ATTENTION, masked=False),
        f"torch, {_DENSE}, cuDNN": partial(_forced, kernel=SDPBackend.CUDNN_ATTENTION, masked=False),
        "nested tensors, packed before": others.nested,
        "xformers": others.xformers,
        "flash-attn, unpad and pad": _unpadded,
    }
    if "flex" in here(case.device):  # it is left out where nothing shall be compiled
        makers[_FLEX] = others.flex
    for backend in ("auto", *here(case.device, omit=_LEFT_OUT)):
        makers[f"{KERNEL}, {backend}"] = partial(others.our_backend, backend=backend)
        makers[f"{WHOLE}, {backend}"] = partial(_whole, backend=backend)
        if backend in _BARE:
            makers[f"{BARE}, {backend}"] = makers[f"{AGAIN}, {backend}"] = _BARE[backend]
    return makers


def _forced(case: Case, kernel: SDPBackend, masked: bool) -> Contestant:
    keep = case.keep if masked else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)

    return others._heads_first(case, attend)


def _whole(case: Case, backend: str) -> Contestant:
    return replace(others.with_packing(case), attend=partial(padded_attention, layout=case.layout, backend=backend))


def _unpadded(case: Case) -> Contestant:
    """What flash-attn offers for padded batches: its own functions around its kernel, the mask read in every call."""
    try:
        from flash_attn import flash_attn_varlen_func
        from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
    except ImportError as error:
        raise Absent(f"flash-attn is not installed or broken ({error})") from None
    tokens = case.keep[:, 0, 0]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, index, offsets, longest = unpad_input(q, tokens)[:4]
        keys, values = (index_first_axis(x.flatten(0, 1), index) for x in (k, v))
        out: Tensor = pad_input(flash_attn_varlen_func(rows, keys, values, offsets, offsets, longest, longest), index, *q.shape[:2])
        return out

    return replace(others.with_packing(case), attend=attend)


# -------------------------------------------------------------------- the kernels themselves, without this package around them


def _torch_varlen(case: Case) -> Contestant:
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = case.layout.cu_seqlens, case.workload.padded_len

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=q.shape[-1] ** -0.5)
        assert isinstance(out, Tensor)
        return out

    return others._packed(case, attend)


def _mem_efficient(case: Case) -> Contestant:
    offsets, longest = case.layout.cu_seqlens, max(case.workload.lengths)

    def attend(*rows: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._efficient_attention_forward(
            *(x[None] for x in rows), None, offsets, offsets, longest, longest, 0.0, 0, True, scale=rows[0].shape[-1] ** -0.5
        )[0]
        return out[0]

    return others._packed(case, attend)


def _flash3(case: Case) -> Contestant:
    if not hasattr(torch.ops.flash_attn_3, "fwd"):
        raise Absent("torch.ops.flash_attn_3 is not loaded")
    offsets, longest = case.layout.cu_seqlens, case.workload.padded_len

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bounds = dict(cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=longest, max_seqlen_k=longest)
        out: Tensor = torch.ops.flash_attn_3.fwd(q, k, v, num_splits=1, **bounds)[0]
        return out

    return others._packed(case, attend, backward=False)


_BARE: dict[str, Callable[[Case], Contestant]] = {
    "torch_varlen": _torch_varlen,
    "flash2": others.flash_attn,
    "mem_efficient": _mem_efficient,
    "flash3": _flash3,
}


# -------------------------------------------------------------------- verified


def verified(found: dict[str, Contestant], case: Case) -> dict[str, str]:
    """R-12: who cannot run, or is wrong on the shortest sequences, output and gradients, and how. Longer ones are compared elsewhere."""
    lengths = case.workload.lengths
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    chosen = _shortest(lengths)
    alone = SeqLayout.from_lengths([lengths[i] for i in chosen], device=case.device)
    rows = torch.cat([torch.arange(starts[i], starts[i] + lengths[i]) for i in chosen]).to(case.device)
    truth, plain = (_reference(case, rows, alone, dtype) for dtype in (torch.float64, case.tensors[0].dtype))
    wrong = {}
    for name, contestant in found.items():
        try:
            results = contestant.results()
            if _DENSE in name:
                continue
            for got, want, naive in zip(results, truth[: len(results)], plain[: len(results)], strict=True):
                assert_within_budget(got[rows], want, naive, gradient=True)
        except Exception as error:
            wrong[name] = one_line(error)
    return wrong


def _shortest(lengths: Sequence[int]) -> list[int]:
    """Indices: the shortest, and more of them up to a limit."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    taken = [i for n, i in enumerate(order) if n == 0 or sum(lengths[j] for j in order[: n + 1]) <= _ENOUGH]
    return sorted(taken)


def _reference(case: Case, rows: Tensor, alone: SeqLayout, dtype: torch.dtype) -> list[Tensor]:
    q, k, v, grad = (x[rows].to(dtype).requires_grad_() for x in case.tensors)
    out = reference_attention(q, k, v, alone, dtype=dtype)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.detach())]


# -------------------------------------------------------------------- packing and layouts by themselves

Moved = tuple[Tensor, ...]


def movers(case: Case) -> dict[str, Callable[[], Moved]]:
    """Pack q, k, v and unpack one output: the first as people write it, with the index at hand."""
    layout, (q, k, v) = case.layout, case.padded(heads_first=False)[:3]
    width, slots = q.shape[2] * q.shape[3], q.shape[0] * q.shape[1]
    index, rows, offsets = layout.token_indices, case.tensors[0], layout.cu_seqlens.long()

    def by_index() -> Moved:
        packed = [x.view(slots, width).index_select(0, index) for x in (q, k, v)]
        return (*packed, q.new_zeros(slots, width).index_copy_(0, index, rows.view(-1, width)))

    def jagged() -> Moved:
        packed = [torch.ops.aten._padded_dense_to_jagged_forward(x.view(len(q), -1, width), [offsets], layout.num_rows) for x in (q, k, v)]
        padded = torch.ops.aten._jagged_to_padded_dense_forward(rows.view(-1, width), [offsets], [layout.padded_len], 0.0)
        return (*packed, padded.reshape(slots, width))

    def ours() -> Moved:
        packed = [layout.pack(x).view(-1, width) for x in (q, k, v)]
        return (*packed, layout.unpack(rows).view(slots, width))

    return {"index_select, index_copy_": by_index, "jagged operations of aten": jagged, "ours": ours}


def packers(case: Case, absent: dict[str, str]) -> dict[str, Callable[[], Moved]]:
    """Pack q, k and v: three times `index_select`, and one Triton kernel for all, if it is there."""
    q, k, v = case.padded(heads_first=False)[:3]
    flat, index = [x.flatten(0, 1).flatten(1) for x in (q, k, v)], case.layout.token_indices
    found: dict[str, Callable[[], Moved]] = {"index_select": lambda: tuple(x.index_select(0, index) for x in flat)}
    try:
        found["one Triton kernel"] = _by_triton(flat, case.layout)
        found["one Triton kernel"]()
    except Exception as error:
        found.pop("one Triton kernel", None)
        absent["one Triton kernel for packing"] = one_line(error)
    return found


def _by_triton(flat: Sequence[Tensor], layout: SeqLayout) -> Callable[[], Moved]:
    try:
        module = importlib.import_module("benchmarks.fused_rows")
    except ImportError:
        raise Absent("benchmarks.fused_rows is not there") from None
    if (reason := module.why_not()) is not None:
        raise Absent(f"it {reason}")
    forth, back = module.rows_of(layout)
    return partial(module.move, forth, back, flat)


def layouts(case: Case) -> dict[str, Callable[[], SeqLayout]]:
    mask, (lengths, columns) = ~case.keep[:, 0, 0], (case.workload.lengths, case.workload.padded_len)
    return {
        "from lengths on the host": lambda: SeqLayout.from_lengths(lengths, columns, device=mask.device),
        "from a mask, one transfer": lambda: SeqLayout.from_key_padding_mask(mask),
        "from a mask, with a capacity": lambda: SeqLayout.from_key_padding_mask(mask, capacity=mask.numel()),
    }
