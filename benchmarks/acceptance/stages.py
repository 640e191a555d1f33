"""The stages in the order in which they run: what is quick and decides most first, then times, then what takes most of a card.

`compile` forgets what was compiled before it, kernels of `flex` among that: it stands behind all who run these. Seconds are estimates,
with 10 for each kind of kernel that `flex` compiles; nothing was measured.
"""

from __future__ import annotations

from . import compiled, dropout, environment, graph, kernels, models, nosync, numerics, padding, repeats, timing, traps
from .findings import Stage

__all__ = ["STAGES"]

STAGES: tuple[Stage, ...] = (
    Stage("env", "the machine, its speed, and which backends accept it", environment.run, 15),
    Stage("numerics", "every backend against float64, with NaN at padding", numerics.run, 110),
    Stage("padding", "every form of padding, every constructor, rotary positions", padding.run, 20),
    Stage("dropout", "unbiased, of the right variance, the same in the backward", dropout.run, 10),
    Stage("models", "torch's encoder before and after `enable`", models.run, 5),
    Stage("kernels", "the kernels that ran are those that were promised", kernels.run, 30),
    Stage("nosync", "nobody waits for the device", nosync.run, 15),
    Stage("graph", "one CUDA graph for all lengths", graph.run, 15, needs_gpu=True),
    Stage("determinism", "the same bits, or a refusal", repeats.determinism, 10),
    Stage("timing", "against torch, the bare kernel, and the limit of an H100", timing.timing, 105, needs_gpu=True),
    Stage("memory", "linear in tokens", repeats.memory, 15, needs_gpu=True),
    Stage("traps", "known mistakes of kernels do not show", traps.traps, 10),
    Stage("large", "more than 65535 sequences, and than 2^31 elements", traps.large, 20, needs_gpu=True),
    Stage("compile", "one compiled graph for all lengths", compiled.run, 45),
    Stage("minitest", "a layer with masks, causal attention and dropout", timing.minitest, 30, required=False),
)
