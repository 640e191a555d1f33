"""What a backend is: declared `Capabilities`, a `run`, and the reasons why it would refuse.

One function, `Backend.refusals`, turns a declaration into sentences. It feeds the automatic choice, forced backends, errors,
the command line and the tests, so that none of them can disagree.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .._state import state, visible
from .._torch import is_tracing
from .limits import heads_at_once, in_heads, in_parts
from .problem import Problem, version_tuple
from .values import Call, Extras, Result, ScoreBias

__all__ = ["Backend", "Call", "Capabilities", "Extras", "Refusal", "Result", "ScoreBias"]

HALF = frozenset({torch.float16, torch.bfloat16})
FLOATS = HALF | {torch.float32, torch.float64}


def on_launch(name: str, rows: int) -> None:
    """Called by our own ops where they run: in compiled code, no other code of ours sees the call."""
    if not state.recorded:
        for record in visible(state.records):
            record.on_launch(name, rows)


@dataclass(frozen=True)
class Refusal:
    """Why a backend does not run a problem, and what would change that.

    Examples:
        >>> plan = choose(Problem(device_type="cpu"), all_reasons=True)
        >>> reasons = {d.backend: d.reasons for d in plan.decisions}
        >>> print(reasons["torch_varlen"][0])
        runs on cuda only, and the tensors are on cpu (move them with .to('cuda'))
    """

    reason: str
    fix: str
    kind: Literal["missing", "machine", "unsupported", "request"] = "unsupported"  # a package, the device, this call, on request only

    def __str__(self) -> str:
        return f"{self.reason} ({self.fix})"


def _prepared(run: Callable[..., Result]) -> Callable[..., Result]:
    """``run`` with what is the same for all backends: a `Call` or its values one by one, on both sides, and no more than
    `Capabilities.max_sequences` and `Capabilities.max_gradient` at a time."""
    takes_values = inspect.unwrap(run).__code__.co_argcount > len(("self", "query", "key", "value", "call"))

    @wraps(run)
    def prepared(self: Backend, query: Tensor, key: Tensor, value: Tensor, call: Any, *rest: Any) -> Result:
        call = Call(call, *rest) if rest else call
        can = self.capabilities
        if can.max_sequences is not None and call.layout_q.num_seqs > can.max_sequences:
            return in_parts(query, key, value, call, can.max_sequences, partial(prepared, self))
        if can.max_gradient is not None and not is_tracing(query):  # sizes are not compared while tracing
            most = heads_at_once(query, key, value, call, can.max_gradient)
            if most < query.shape[1]:
                return in_heads(query, key, value, call, most, partial(prepared, self))
        return run(self, query, key, value, *call) if takes_values else run(self, query, key, value, call)

    return prepared


@dataclass(frozen=True)
class Capabilities:
    """What a backend runs. An option whose flag is False is refused with a reason; the conformance suite tests every True.

    Examples:
        >>> {b.name for b in BACKENDS if b.capabilities.score_bias and "cuda" in b.capabilities.devices} >= {"flex", "sdpa_padded"}
        True
    """

    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    min_capability: tuple[int, int] | None = None
    min_torch: tuple[int, ...] = ()
    rocm: bool = True
    torch_flash: bool = False  # it calls torch's flash kernels for GPUs
    max_head_dim: int | None = None
    max_sequences: int | None = None  # of one launch; more run in parts
    max_gradient: int | None = None  # elements of the gradient of a query, each sequence in whole blocks; more run in parts, by heads
    value_head_dim: bool = True  # Hv != H
    gqa: bool = True  # N != K
    causal_bottom_right: bool = True
    causal_top_left: bool = True  # for unequal lengths; with one layout it is the same as bottom_right
    window: bool = True
    softcap: bool = True
    dropout: bool = True
    alibi: bool = True
    score_bias: bool = True
    sinks: bool = True
    return_lse: bool = True
    deterministic: bool = True
    batch_invariant: bool = False
    grad: bool = True
    tracing: bool = True
    transforms: bool = False  # of torch.func, and forward-mode AD: kernels with a backward only would drop a derivative
    empty_sequences: bool = True  # False: removed before the call where lengths are on the host, else refused
    slack_rows: bool = True  # False: rows beyond cu_seqlens[-1] are left unwritten, and the caller zeroes them
    reads_slack: bool = True  # False: such rows of query, key and value are not read either, and may hold anything
    explicit_only: str = ""  # why it runs on request only, or where nothing else does


class Backend(ABC):
    """One way to compute attention on packed tensors. It has no state, and one instance for each class.

    Examples:
        >>> class Loop(Backend):
        ...     name = "loop"
        ...     capabilities = Capabilities(
        ...         devices=frozenset({"cpu"}), dtypes=frozenset({torch.float32}), gqa=False, window=False, softcap=False, dropout=False,
        ...         alibi=False, score_bias=False, sinks=False, return_lse=False, causal_bottom_right=False, causal_top_left=False,
        ...         empty_sequences=False,
        ...     )
        ...
        ...     def kernel(self, problem):
        ...         return "one sequence after another"
        ...
        ...     def run(self, query, key, value, call):
        ...         parts = zip(call.layout_q.split(query), call.layout_kv.split(key), call.layout_kv.split(value))
        ...         scores = (((q * call.semantics.factor).transpose(0, 1) @ k.permute(1, 2, 0), v.transpose(0, 1)) for q, k, v in parts)
        ...         return torch.cat([(s.softmax(-1) @ v).transpose(0, 1) for s, v in scores]), None
        >>> x, layout = torch.randn(8, 2, 16), SeqLayout.from_lengths([5, 3])
        >>> torch.testing.assert_close(varlen_attention(x, x, x, layout, backend=Loop()), varlen_attention(x, x, x, layout))
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    package: ClassVar[str] = "torch"  # the distribution whose version `backends()` shows
    packages: ClassVar[tuple[str, ...]] = ()  # other distributions that have its kernels
    install: ClassVar[str] = ""  # the fix where `missing` has a reason
    checks_offsets: ClassVar[bool] = False  # its kernel refuses offsets that do not fit the rows; else a call is checked before
    custom_op: ClassVar[bool] = False  # `run` launches a torch.library op of ours, which records itself in compiled code

    def missing(self, problem: Problem) -> str | None:
        """A sentence if a package that the backend needs is not installed, broken, or not what it claims to be; else None."""
        return None

    def extra_refusals(self, problem: Problem) -> Iterable[Refusal]:
        """Refusals that the fields of `Capabilities` cannot express."""
        return ()

    @abstractmethod
    def kernel(self, problem: Problem) -> str:
        """The kernel that `run` calls for this problem, by the name its library gives it."""

    def seen_as(self, problem: Problem) -> str:
        """A regular expression for the name that a profiler shows for that kernel; empty where the name is not known.

        Names of device kernels; for tensors on a CPU, of torch's and our ops.
        """
        return ""

    @abstractmethod
    def run(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
        """``query (T,N,H)``, ``key (Tk,K,H)``, ``value (Tk,K,Hv)`` -> ``out (T,N,Hv)``, lse ``(N,T)`` or None.

        Arguments are checked already; ``call.semantics.scale`` is a number. The values of a `Call` may also be taken and passed one by one.
        """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "run" in vars(cls):
            cls.run = _prepared(cls.run)  # type: ignore[method-assign]

    def refusals(self, problem: Problem, *, all_reasons: bool = True) -> tuple[Refusal, ...]:
        """All reasons against running ``problem``; none means that it runs.

        Without ``all_reasons`` a package is checked, which may import it, only where there is no other reason.
        """
        reasons = [*_capability_refusals(self.capabilities, problem), *self.extra_refusals(problem)]
        if self.capabilities.explicit_only and problem.requested != self.name:
            text = f"runs on request, or where nothing else does: {self.capabilities.explicit_only}"
            reasons.append(Refusal(text, f"request it with backend={self.name!r}", "request"))
        if all_reasons or not reasons:
            sentence = self.missing(problem)
            if sentence is not None:
                reasons.insert(0, Refusal(sentence, self.install, "missing"))
        return tuple(reasons)

    def __repr__(self) -> str:
        return f"<varlen_attn backend {self.name}>"


def _capability_refusals(can: Capabilities, problem: Problem) -> Iterator[Refusal]:
    yield from _machine_refusals(can, problem)
    yield from _shape_refusals(can, problem)
    want = problem.semantics
    unequal = "of unequal query and key lengths"
    asked: tuple[tuple[bool, bool, str, str], ...] = (
        (want.causal == "bottom_right", can.causal_bottom_right, "bottom-right causal attention", "use causal='top_left'"),
        (want.causal == "top_left", can.causal_top_left, f"top-left causal attention {unequal}", "use causal='bottom_right'"),
        (want.window is not None, can.window, "a sliding window", "drop `window`"),
        (want.softcap is not None, can.softcap, "softcap", "drop `softcap`"),
        (want.dropout_p > 0, can.dropout, "dropout", "pass dropout_p=0"),
        (want.alibi, can.alibi, "ALiBi slopes", "drop `alibi_slopes`"),
        (want.score_bias, can.score_bias, "a score bias", "drop `score_bias`"),
        (want.sinks, can.sinks, "attention sinks", "drop `sinks`"),
        (want.return_lse, can.return_lse, "returning the log-sum-exp", "drop `return_lse`"),
        (want.deterministic and problem.needs_grad, can.deterministic, "deterministic gradients", "pass deterministic=False"),
        (want.batch_invariant, can.batch_invariant, "results that are bitwise independent of batch-mates", "drop `batch_invariant`"),
        (problem.needs_grad, can.grad, "a backward pass", "call it under torch.no_grad()"),
        (problem.tracing, can.tracing, "torch.compile and fake tensors", "call it outside the compiled function"),
        (problem.transformed, can.transforms, "torch.func and forward-mode AD", "use backend='sdpa_padded', or call it outside of them"),
        (not problem.host_lengths, can.empty_sequences, "empty sequences, and only the device knows whether there are any",
         "build the layout from lengths or without `capacity`"),
    )  # fmt: skip
    for wanted, able, what, fix in asked:
        if wanted and not able:
            yield Refusal(f"does not support {what}", fix)


def _machine_refusals(can: Capabilities, problem: Problem) -> Iterator[Refusal]:
    if problem.device_type not in can.devices:
        there = min(can.devices)
        elsewhere = there == "cuda" and problem.device_type != "cpu"  # no machine with a GPU of another vendor has one
        yield Refusal(
            f"runs on {' and '.join(sorted(can.devices))} only, and the tensors are on {problem.device_type}",
            "use a machine with a CUDA device" if elsewhere else f"move them with .to({there!r})",
            "machine",
        )
        return
    if problem.device_type == "cuda" and problem.rocm and not can.rocm:
        yield Refusal("is not known to be right on ROCm", "use another backend, or an NVIDIA GPU", "machine")
    if problem.device_type == "cuda" and can.torch_flash and problem.flash_impl is not None:
        yield Refusal(
            f"calls torch's flash kernels, in whose place torch.nn.attention.activate_flash_attention_impl put {problem.flash_impl}",
            "call torch.nn.attention.restore_flash_attention_impl()",
            "machine",
        )
    if problem.device_type == "cuda" and not problem.rocm and can.min_capability is not None:
        have = problem.capability
        if have is None or have < can.min_capability:
            need, got = (".".join(map(str, c)) if c else "unknown" for c in (can.min_capability, have))
            fix = "use a newer GPU" if have else "state it, as in Problem(capability=(9, 0)) or --capability 9.0"
            yield Refusal(f"needs compute capability {need} or newer, and that of this device is {got}", fix, "machine")
    if can.min_torch and version_tuple(problem.torch_version) < can.min_torch:
        need = ".".join(map(str, can.min_torch))
        yield Refusal(f"needs torch {need} or newer, and this is {problem.torch_version}", f"pip install 'torch>={need}'", "machine")


def _shape_refusals(can: Capabilities, problem: Problem) -> Iterator[Refusal]:
    if problem.dtype not in can.dtypes:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in can.dtypes))
        yield Refusal(
            f"supports {names} only, and the tensors are {str(problem.dtype).removeprefix('torch.')}",
            f"call it under torch.autocast, or convert the tensors to {names.split(',')[0]}",
        )
    widest = max(problem.head_dim, problem.value_head_dim or 0)
    if can.max_head_dim is not None and widest > can.max_head_dim:
        yield Refusal(f"supports head dimensions up to {can.max_head_dim}, and this is {widest}", "use more heads")
    if not can.value_head_dim and problem.value_head_dim != problem.head_dim:
        yield Refusal("needs value heads as wide as query heads", "make head_dim of query and value equal")
    if not can.gqa and problem.num_heads != problem.num_kv_heads:
        yield Refusal(
            f"needs as many key/value heads as query heads, and these are {problem.num_kv_heads} and {problem.num_heads}",
            "repeat the key/value heads with repeat_interleave",
        )


# -------------------------------------------------------------------- helpers that several backends share


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in, and the dtype of the log-sum-exp: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scale_refusals(problem: Problem) -> Iterator[Refusal]:
    """For flash kernels, read in their source: scores are subtracted from their maximum and scaled after that, so that a negative scale
    overflows, and 0 times the -inf of a masked score is NaN. For the memory-efficient one too, whose source was not read for this."""
    scale = problem.semantics.scale
    if scale is not None and scale <= 0:
        yield Refusal("needs a scale above 0: its softmax takes the maximum before it scales", "multiply the query by it")


class _ContiguousGrad(torch.autograd.Function):
    """Identity; its gradient is contiguous. Kernels read ``dout`` by 32-bit strides, and a broadcast one
    (``out.sum().backward()``) or a slice of a ``cat`` corrupts the gradient or is refused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def contiguous_grad(x: Tensor) -> Tensor:
    """``x``, with a contiguous gradient for whatever kernel produced it."""
    return _ContiguousGrad.apply(x) if torch.is_grad_enabled() else x


class _WithoutSlack(torch.autograd.Function):
    """Identity, but that slack rows are 0: of the result, or else of its gradient, whatever a kernel left there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slack: Tensor, in_result: bool) -> Tensor:
        if in_result:
            return x.masked_fill(slack, 0)
        ctx.save_for_backward(slack)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        for slack in ctx.saved_tensors:
            grad = grad.masked_fill(slack, 0)
        return grad, None, None


def grad_without_slack(x: Tensor, slack: Tensor) -> Tensor:
    """``x``, for a kernel that neither reads slack rows of ``x`` nor writes those of its gradient: without a copy of ``x``."""
    result: Tensor = _WithoutSlack.apply(x, slack, False)
    return result


def result_without_slack(x: Tensor, slack: Tensor) -> Tensor:
    """0 in slack rows, for a kernel that did not write them and does not read those of the gradient of ``x``."""
    result: Tensor = _WithoutSlack.apply(x, slack, True)
    return result


def pad_head_dim(multiple: int, *tensors: Tensor, least: int = 0) -> tuple[Tensor, ...]:
    """Zero columns up to one common head dimension, a multiple of ``multiple``: exact as long as the scale is the true one's."""
    widest = least
    for t in tensors:
        widest = max(widest, t.shape[-1])
    width = -(-widest // multiple) * multiple
    padded = []
    for t in tensors:
        padded.append(t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1])))  # noqa: PERF401 (a frame in every call)
    return tuple(padded)


def repeat_kv(num_heads: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Key/value heads repeated to ``num_heads`` (dimension 1), for kernels without grouped heads. Copies: kernels
    have returned wrong results on broadcast (stride 0) heads."""
    return tuple(t if t.shape[1] == num_heads else t.repeat_interleave(num_heads // int(t.shape[1]), dim=1) for t in tensors)


def zeros_with_grad(shape: Sequence[int], *tensors: Tensor) -> Tensor:
    """Zeros that depend on ``tensors`` with gradient 0: a batch without tokens must still run ``backward``."""
    nothing = sum((t[:0].sum() for t in tensors), start=tensors[0].new_zeros(()))
    return tensors[0].new_zeros(tuple(shape)) + nothing


def nothing(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
    """The result where there is nothing to see: 0, gradient 0 and -inf."""
    out = zeros_with_grad((*query.shape[:2], value.shape[-1]), query, key, value, *call.extras.tensors)
    lse = out.new_full((out.shape[1], out.shape[0]), float("-inf"), dtype=accumulation_dtype(out.dtype))
    return out, lse if call.semantics.return_lse else None
