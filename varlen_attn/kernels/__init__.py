"""The backends, in the order in which they are preferred: the first that accepts a problem runs it."""

from __future__ import annotations

from .base import Backend
from .cpu.aten import Cpu
from .cpu.native import CpuNative
from .cuda.flash2 import Flash2
from .cuda.flash3 import Flash3
from .cuda.flash4 import Flash4
from .cuda.flex import Flex
from .cuda.mem_efficient import MemEfficient
from .cuda.nested import Nested
from .cuda.torch_varlen import TorchVarlen
from .reference import Reference
from .sdpa_padded import SdpaPadded

BACKENDS: tuple[Backend, ...] = (
    Flash3(),  # the fastest on Hopper
    Flash4(),  # Hopper and Blackwell; not ahead of 3 on Hopper
    TorchVarlen(),  # flash attention that comes with torch: nothing to install or to break
    Flash2(),  # the same kernels, with softcap, ALiBi and deterministic gradients
    MemEfficient(),  # packed for float32 and for GPUs before sm80; slower than flash
    Nested(),  # the same two kernels, with fewer options and more work on the host
    Flex(),  # fused for score biases, but its block mask costs time for every batch
    CpuNative(),  # faster than the next, where it has been compiled
    Cpu(),  # the packed path that every CPU has
    SdpaPadded(),  # any device, any option: slow, never wrong
    Reference(),  # by name only
)
