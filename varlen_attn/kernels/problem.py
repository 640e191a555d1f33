"""`Semantics` and `Problem`: all that the choice of a backend may depend on. No tensors, hashable.

A `Problem` holds metadata only: nothing read from a device, no free memory, no random state, no number that
depends on the data. So the same call always gets the same backend (recomputation under gradient checkpointing included),
and a problem for a machine that is not here can be stated and asked about.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

from .._torch import constant, is_tracing, is_transformed
from ..errors import ArgumentError
from ..layout.seq_layout import SeqLayout

Causal = Literal[False, "bottom_right", "top_left"]
Window = tuple[int | None, int | None]

_UNLIMITED = 1 << 40  # from here on, a side of a window cuts nothing, and positions added to it would overflow

_versions: dict[str, str | None] = {}


def installed_version(distribution: str) -> str | None:
    """The installed version of a distribution, by its metadata: nothing is imported.

    By distribution and not by module: other packages install a module called ``flash_attn`` too.
    """
    if distribution not in _versions:
        try:
            _versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            _versions[distribution] = None
    return _versions[distribution]


def version_tuple(version: str) -> tuple[int, ...]:
    """``"2.11.0+cu130" -> (2, 11, 0)``: the leading numbers of a version."""
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


@dataclass(frozen=True)
class Semantics:
    """What a call computes, apart from its tensors. Make one with `Semantics.of`, which checks and normalises.

    Attributes:
        causal: False, ``"bottom_right"`` (query i sees keys up to ``i + Lk - Lq``) or ``"top_left"`` (up to i).
        window: ``(left, right)``, how many other tokens are visible on each side of the aligned position; None is unlimited.
        scale: factor of the scores; None is ``H ** -0.5`` of the true head dimension.
        softcap: c of ``c * tanh(score / c)``, or None.
        dropout_p: probability of dropping an attention weight.
        alibi, score_bias, sinks: whether the call has those tensors.
        return_lse: whether the log-sum-exp is asked for.
        deterministic: gradients must be bitwise reproducible.
        batch_invariant: a sequence's result must not depend on its batch-mates, bitwise.

    Examples:
        >>> Semantics.of(causal=True, window=(16, None)).window
        (16, None)
        >>> choose(Problem(device_type="cpu", semantics=Semantics.of(softcap=30.0))).problem.semantics.softcap
        30.0
    """

    causal: Causal = False
    window: Window | None = None
    scale: float | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    alibi: bool = False
    score_bias: bool = False
    sinks: bool = False
    return_lse: bool = False
    deterministic: bool = False
    batch_invariant: bool = False

    @classmethod
    def of(
        cls,
        *,
        causal: bool | str = False,
        window: Sequence[int | None] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        dropout_p: float = 0.0,
        deterministic: bool | None = None,
        **flags: bool,
    ) -> Semantics:
        """Check and normalise: ``causal=True`` is bottom-right, an unlimited window is None.

        Raises:
            ArgumentError: a value outside its range.
        """
        if causal is True:
            causal = "bottom_right"
        if causal not in (False, None, "bottom_right", "top_left"):
            raise ArgumentError(f"`causal` must be False, True, 'bottom_right' or 'top_left', but is {causal!r}.")
        for name, value in (("scale", scale), ("softcap", softcap)):
            if value is not None and not (isinstance(value, int | float) and math.isfinite(constant(value))):
                raise ArgumentError(f"`{name}` must be a finite number or None, but is {value!r}.")
        if softcap is not None and softcap <= 0:
            raise ArgumentError(f"`softcap` must be above 0, but is {softcap!r}: for no cap pass None.")
        check_dropout(dropout_p)
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        return cls(
            causal=causal or False,
            window=_normal_window(window),
            scale=constant(scale),
            softcap=constant(softcap),
            dropout_p=float(constant(dropout_p)),
            deterministic=deterministic,
            **flags,
        )

    @property
    def factor(self) -> float:
        """The scale as a number; a call fills it in before any backend sees it."""
        assert self.scale is not None
        return self.scale

    def visible_range(self, offset: int) -> tuple[int | None, int | None]:
        """``(low, high)``: query i sees keys ``i + low <= j <= i + high``; ``offset`` is ``Lk - Lq`` of the sequence.

        One rule for causal masks and windows, so that no backend derives its own.
        """
        aligned = 0 if self.causal == "top_left" else offset
        left, right = self.window or (None, None)
        if self.causal:
            right = 0 if right is None else min(right, 0)
        return (None if left is None else aligned - left), (None if right is None else aligned + right)


def check_dropout(dropout_p: float) -> None:
    """A probability, also where it is not applied: what fails in training should not pass in evaluation."""
    if not (isinstance(dropout_p, int | float) and 0.0 <= dropout_p <= 1.0):
        raise ArgumentError(f"`dropout_p` must be between 0 and 1, but is {dropout_p!r}.")


def _normal_window(window: Sequence[int | None] | None) -> Window | None:
    if window is None:
        return None
    sides = tuple(window) if isinstance(window, Sequence) else (window,)
    if len(sides) != 2 or any(s is not None and (isinstance(s, bool) or not isinstance(s, int) or s < 0) for s in sides):
        raise ArgumentError(
            f"`window` must be None or (left, right), each None (unlimited) or an integer of at least 0, but is {window!r}: "
            "it counts the other tokens visible on each side."
        )
    left, right = (None if side is None or side >= _UNLIMITED else constant(side) for side in sides)
    return None if left is None and right is None else (left, right)


def strictly_deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


@dataclass(frozen=True)
class Problem:
    """One attention call as metadata. Every default describes this machine; every field can be stated.

    Attributes:
        device_type: ``"cuda"``, ``"cpu"``, ``"mps"``, ``"xpu"``; ROCm is ``"cuda"`` with ``rocm=True``.
        capability: compute capability, as (9, 0) for an H100; that of this machine's first GPU if left out.
        rocm: whether torch is a ROCm build.
        torch_version: of the torch that would run it.
        flash_impl: what `torch.nn.attention.activate_flash_attention_impl` put in place of torch's flash kernels on GPUs, as ``"FA4"``.
        packages: ``(("flash-attn", "2.8.3"), ...)`` where another machine is described; None is what is installed here.
        dtype, num_heads, num_kv_heads, head_dim, value_head_dim: of query, key and value (N, K, H, Hv).
        semantics: what the call computes.
        self_attention: queries and keys have one layout.
        needs_grad: a gradient will be wanted.
        tracing: under `torch.compile`, `torch.export`, `torch.jit.trace` or fake tensors.
        transformed: under `torch.func` or forward-mode AD, which kernels with a backward only cannot serve.
        host_lengths: the lengths are known on the host.
        deterministic_mode: `torch.use_deterministic_algorithms(True)` is set, not to warn only: kernels without an argument obey it.
        requested: the backend's name, or ``"auto"``.

    Examples:
        >>> h100 = Problem(device_type="cuda", capability=(9, 0), dtype=torch.bfloat16, packages=())
        >>> choose(h100).backend
        'torch_varlen'
    """

    device_type: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    capability: tuple[int, int] | None = None
    rocm: bool = field(default_factory=lambda: torch.version.hip is not None)
    torch_version: str = torch.__version__
    flash_impl: str | None = field(default_factory=current_flash_attention_impl)
    packages: tuple[tuple[str, str], ...] | None = None
    dtype: torch.dtype = torch.float32
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int = 64
    value_head_dim: int | None = None
    semantics: Semantics = Semantics()
    self_attention: bool = True
    needs_grad: bool = False
    tracing: bool = False
    transformed: bool = False
    host_lengths: bool = True
    deterministic_mode: bool = field(default_factory=strictly_deterministic)
    requested: str = "auto"

    def __post_init__(self) -> None:
        derived: dict[str, Any] = {}
        if self.num_kv_heads is None:
            derived["num_kv_heads"] = self.num_heads
        if self.value_head_dim is None:
            derived["value_head_dim"] = self.head_dim
        if self.capability is None and self.device_type == "cuda" and torch.cuda.is_available():
            derived["capability"] = torch.cuda.get_device_capability()
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout_q: SeqLayout,
        layout_kv: SeqLayout,
        semantics: Semantics,
        *,
        needs_grad: bool,
        requested: str = "auto",
    ) -> Problem:
        """The problem that these tensors pose: ``query (T,N,H)``, ``key (Tk,K,H)``, ``value (Tk,K,Hv)``."""
        device = query.device
        return cls(
            device_type=device.type,
            capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
            dtype=query.dtype,
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=query.shape[2],
            value_head_dim=value.shape[2],
            semantics=semantics,
            self_attention=layout_q is layout_kv,
            needs_grad=needs_grad,
            tracing=is_tracing(query),
            transformed=is_transformed(),
            host_lengths=layout_q.lengths is not None and layout_kv.lengths is not None,
            requested=requested,
        )

    @property
    def machine(self) -> str:
        """The device type, and ``"rocm"`` for CUDA devices of a ROCm build: their kernels are others."""
        return "rocm" if self.device_type == "cuda" and self.rocm else self.device_type

    def version(self, distribution: str) -> str | None:
        """The version of a package: stated, or installed here."""
        if self.packages is None:
            return installed_version(distribution)
        return dict(self.packages).get(distribution)
