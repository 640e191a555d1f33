"""Linear layers on a CPU whose weights are kept in oneDNN's blocked format as well, so that no call has to reorder them: for inference.

It is the same product, in another order of summation; or one of numbers rounded to bfloat16, where that was asked for. A weight that was
written to is reordered again, which is known by its version. Torch does not count writes through ``weight.data``.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .._switch import original_class
from .._torch import is_observed, is_plain, is_sharded, num_writes
from ..errors import VarlenError

PREPACKED = "_varlen_attn_prepacked"  # the attribute of a module that holds its `Prepacked`
# Numbers of a weight, and multiplications of a call: oneDNN's product and what decides on it take 25 microseconds more than a small product
# of MKL, and save that from here on (Zen 4, one thread).
LEAST, _LEAST_WORK = 1 << 16, 1 << 21


class Prepacked:
    """A weight in the blocked format. The second call with the same weight makes it, because one that is new in every call, as a
    parametrisation's, would be made in vain; the first, where numbers are rounded, so that all calls give the same. Copies and pickles
    make their own.

    Attributes:
        dtype: of the product, where it is another than that of the weight.
        made: the memory it is of, which no other weight can have while this is here; its version; and the weight, from the second call on.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.made: tuple[Tensor, int, Tensor | None] | None = None

    def __deepcopy__(self, memo: Any) -> Prepacked:
        return Prepacked(self.dtype)

    def __reduce__(self) -> Any:
        return Prepacked, (self.dtype,)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _can(x, weight, bias):
            return F.linear(x, weight, bias)
        made = self.made
        if made is None or not made[0].is_set_to(weight) or made[1] != num_writes(weight):
            made = self.made = weight.detach(), num_writes(weight), None
            if self.dtype is None:
                return F.linear(x, weight, bias)
        memory, version, packed = made
        if packed is None:
            packed = torch.ops.mkldnn._reorder_linear_weight(memory if self.dtype is None else memory.to(self.dtype), None)
            self.made = memory, version, packed
        if self.dtype is not None:
            x, bias = x.to(self.dtype), None if bias is None else bias.to(self.dtype)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
        return out if self.dtype is None else out.to(weight.dtype)


def linear(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` with a weight of ``module``, in the blocked format where that was asked for and can be used.

    Raises:
        VarlenError: it was asked for, and the module is in training and learns.
    """
    held: Prepacked | None = vars(module).get(PREPACKED)
    if held is None or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if learns and module.training:
        raise VarlenError(
            f"the {original_class(module).__name__} must be in evaluation, because it was enabled with prepack, but is in training: "
            "call model.eval(), or varlen_attn.enable(model) without prepack before training."
        )
    if learns or is_sharded(module) or (weight.is_leaf and weight.grad is not None):
        held.made = None  # a fused optimizer writes to the weight without being counted, and so does FSDP
        return F.linear(x, weight, bias)
    return held.linear(x, weight, bias)


def _can(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """A product on a CPU that takes some time, and that no mode counts or records."""
    if x.numel() * weight.shape[0] < _LEAST_WORK or not (is_plain(x) and is_plain(weight)) or is_observed():
        return False
    if x.shape[-1] != weight.shape[1] or (bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous())):
        return False  # the kernel would read others
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if x.dtype not in dtypes() or not all(t.is_cpu and t.dtype == x.dtype for t in tensors) or weight.is_inference():
        return False
    return bool(torch.backends.mkldnn.enabled) and not torch.is_autocast_enabled("cpu")


@cache
def dtypes() -> tuple[torch.dtype, ...]:
    """What this build of torch has in the blocked format; others than float32 where the CPU has instructions for them."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)


class PrepackedLinear(nn.Linear):
    original_class: ClassVar[type[nn.Module]] = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return linear(self, input, self.weight, self.bias)


class PrepackedOutProjection(NonDynamicallyQuantizableLinear):
    original_class: ClassVar[type[nn.Module]] = NonDynamicallyQuantizableLinear
    forward = PrepackedLinear.forward
