"""Who takes part in the contests of attention alone: ways to compute one batch, each from q, k, v as it wants them.

A contestant is made by a function of a `Case`. One that cannot run raises `Absent` with the reason, and the reason goes where its time
would have gone. How each is called is how its own documentation calls it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varlen_attn import BackendRefused, SeqLayout, explain, padded_attention, varlen_attention

from .measure import Absent, ours
from .workloads import Workload

__all__ = ["AUTO", "MASKED", "UNMASKED", "WITH_PACKING", "Case", "Contestant", "contestants", "masked", "our_backend"]

MASKED, UNMASKED, AUTO, WITH_PACKING = "masked", "dense", "packed", "pack+unpack"
_SMALL = 3_000_000  # padded scores of one head: beyond, the slow ones take minutes
_SLOW = {"nested", "reference"}  # of our backends, on a CPU


@dataclass(frozen=True)
class Case:
    """A batch of numbers.

    Attributes:
        workload, layout: which tokens there are.
        tensors: packed q, k, v and the gradient of the output, ``(T, N, H)``.
        everything: also what takes minutes.
    """

    workload: Workload
    layout: SeqLayout
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    everything: bool = False

    @classmethod
    def of(cls, workload: Workload, dtype: torch.dtype, heads: int, head_dim: int, device: str = "cpu", everything: bool = False) -> Case:
        generator = torch.Generator().manual_seed(1)
        layout = SeqLayout.from_lengths(workload.lengths, workload.padded_len).to(device)
        shape = (layout.num_rows, heads, head_dim)
        q, k, v, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
        return cls(workload, layout, (q, k, v, grad), everything)

    @property
    def device(self) -> str:
        return self.tensors[0].device.type

    @property
    def keep(self) -> Tensor:
        """``(B, 1, 1, S)`` bool, True is a token."""
        return (~self.workload.key_padding_mask[:, None, None]).to(self.device)

    def padded(self, heads_first: bool) -> list[Tensor]:
        """q, k, v and the gradient as ``(B, N, S, H)`` or ``(B, S, N, H)``."""
        padded = [self.layout.unpack(x) for x in self.tensors]
        return [x.transpose(1, 2).contiguous() for x in padded] if heads_first else padded

    def only_if_small(self) -> None:
        if self.device == "cpu" and not self.everything and len(self.workload.lengths) * self.workload.padded_len**2 > _SMALL:
            raise Absent("takes minutes on a CPU at these lengths; --everything runs it")


@dataclass(frozen=True)
class Contestant:
    """One way to compute the batch.

    Attributes:
        inputs: q, k, v as it wants them.
        attend: the call.
        rows: its result, as packed rows ``(T, N, H)``, to compare.
        grad: the gradient of its result; None where it has no backward.
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    rows: Callable[[Tensor], Tensor]
    grad: Tensor | None

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.attend(*self.inputs)

    def both(self) -> Sequence[Tensor]:
        assert self.grad is not None
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        out = self.attend(*leaves)
        return (out, *torch.autograd.grad(out, leaves, self.grad))

    def results(self) -> list[Tensor]:
        """Packed output, and gradients where there is a backward."""
        return [self.rows(x.detach()) for x in (self.both() if self.grad is not None else [self.forward()])]


# -------------------------------------------------------------------- torch's


def _heads_first(case: Case, attend: Callable[..., Tensor], backward: bool = True) -> Contestant:
    q, k, v, grad = case.padded(heads_first=True)
    return Contestant((q, k, v), attend, lambda x: case.layout.pack(x.transpose(1, 2)), grad if backward else None)


def masked(case: Case) -> Contestant:
    return _heads_first(case, partial(F.scaled_dot_product_attention, attn_mask=case.keep))


def unmasked(case: Case) -> Contestant:
    if not case.layout.is_dense:
        raise Absent("without a mask it computes something else where there is padding")
    return _heads_first(case, F.scaled_dot_product_attention)


def nested(case: Case) -> Contestant:
    """Jagged nested tensors through `F.scaled_dot_product_attention`, from and to packed rows."""
    case.only_if_small()
    offsets = case.layout.cu_seqlens.long()
    longest, shortest = max(case.workload.lengths), min(case.workload.lengths)

    def attend(*rows: Tensor) -> Tensor:
        jagged = [torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=shortest, max_seqlen=longest).transpose(1, 2) for x in rows]
        out: Tensor = F.scaled_dot_product_attention(jagged[0], jagged[1], jagged[2]).transpose(1, 2)
        return out.values() if out.is_contiguous() else out.contiguous().values()

    return _packed(case, attend)


def flex(case: Case) -> Contestant:
    """`flex_attention`, compiled, on the packed rows as one sequence with a document mask."""
    if case.device == "cpu" and case.workload.name != "w3" and not case.everything:
        raise Absent("compiles half a minute for each batch on a CPU, so only w3 is measured; --everything runs it")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    ids, total = case.layout.seq_ids, case.layout.num_rows
    # Not compiled, this writes out the mask of all pairs of tokens, gigabytes where a GPU's batches are large.
    build = create_block_mask if case.device == "cpu" else torch.compile(create_block_mask)
    mask = build(lambda b, h, q, k: ids[q] == ids[k], None, None, total, total, device=case.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = compiled(q, k, v, block_mask=mask)
        assert isinstance(out, Tensor)
        return out[0].transpose(0, 1)

    return _packed(case, attend, backward=case.device != "cpu")


# -------------------------------------------------------------------- other libraries


def transformers_sdpa(case: Case) -> Contestant:
    """What a model of transformers calls with ``attn_implementation="sdpa"``; its mask has a row for each query, as its models make it."""
    try:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
    except ImportError as error:
        raise Absent(f"transformers: {error}") from None
    columns = case.workload.padded_len
    mask = case.keep.expand(-1, -1, columns, -1).contiguous()
    module = SimpleNamespace(is_causal=False, training=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = sdpa_attention_forward(module, q, k, v, mask, dropout=0.0, is_causal=False)[0]
        return out.transpose(1, 2)  # back to heads first, which moves nothing

    return _heads_first(case, attend)


def xformers(case: Case) -> Contestant:
    """`memory_efficient_attention` with a block-diagonal mask, on the packed rows as one sequence."""
    try:
        from xformers.ops import fmha, memory_efficient_attention
    except ImportError as error:
        raise Absent(f"xformers is not installed or broken ({error})") from None
    if case.device == "cpu":
        raise Absent("xformers has no attention kernel for a CPU")
    bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens(list(case.workload.lengths))

    def attend(*rows: Tensor) -> Tensor:
        out: Tensor = memory_efficient_attention(*(x[None] for x in rows), attn_bias=bias)
        return out[0]

    return _packed(case, attend)


def flash_attn(case: Case) -> Contestant:
    """`flash_attn_varlen_func` itself, without this package around it."""
    if case.device == "cpu":
        raise Absent("flash-attn runs on GPUs only")
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise Absent(f"flash-attn is not installed or broken ({error})") from None
    if case.tensors[0].dtype == torch.float32:
        raise Absent("flash-attn has no float32")
    starts, longest = case.layout.cu_seqlens, max(case.workload.lengths)
    return _packed(case, lambda q, k, v: flash_attn_varlen_func(q, k, v, starts, starts, longest, longest))


# -------------------------------------------------------------------- ours


def _packed(case: Case, attend: Callable[..., Tensor], backward: bool = True) -> Contestant:
    q, k, v, grad = case.tensors
    return Contestant((q, k, v), attend, lambda x: x, grad if backward else None)


def our_backend(case: Case, backend: str) -> Contestant:
    if backend in _SLOW:
        case.only_if_small()
    try:
        explain(*case.tensors[:3], case.layout, backend=backend)
    except BackendRefused as refusal:
        raise Absent(" ".join(str(refusal).split())) from None
    return _packed(case, partial(varlen_attention, layout=case.layout, backend=backend))


def with_packing(case: Case) -> Contestant:
    q, k, v, grad = case.padded(heads_first=False)
    return Contestant((q, k, v), partial(padded_attention, layout=case.layout), case.layout.pack, grad)


def contestants(case: Case, others: bool = True) -> tuple[dict[str, Contestant], dict[str, str]]:
    """All that can run, the masked call first, and the reasons of those that cannot; without ``others``, ours and the masked call only."""
    found: dict[str, Contestant] = {}
    absent: dict[str, str] = {}
    for name, reason in ours(case.device).items():
        if reason is not None:
            absent[f"{AUTO}, {name}"] = reason
    for name, make in _makers(case).items():
        if not (others or name == MASKED or name.startswith((AUTO, WITH_PACKING))):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # prototypes say that they are
                found[name] = make(case)
                found[name].forward()
        except Absent as reason:
            absent[name] = str(reason)
        except Exception as error:  # whatever goes wrong in another library is a fact about it, and no end of the run
            if name in (MASKED, AUTO):
                raise
            found.pop(name, None)
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return found, absent


def _makers(case: Case) -> dict[str, Callable[[Case], Contestant]]:
    first = explain(*case.tensors[:3], case.layout).backend  # the one that "auto" takes is there already
    names = [name for name, reason in ours(case.device).items() if reason is None and name != first]
    each = {f"{AUTO}, {name}": partial(our_backend, backend=name) for name in names}
    return {
        MASKED: masked,
        AUTO: partial(our_backend, backend="auto"),
        WITH_PACKING: with_packing,
        **each,
        UNMASKED: unmasked,
        "transformers, sdpa": transformers_sdpa,
        "nested tensors": nested,
        "flex_attention": flex,
        "xformers": xformers,
        "flash-attn": flash_attn,
    }


def reasons_without_backward(found: dict[str, Contestant]) -> dict[str, Any]:
    return {name: "has no backward on this device" for name, contestant in found.items() if contestant.grad is None}
