"""The stages in the order in which they run: who crashes, what is right, times, what takes most of a card, what compiles, other libraries.

`graph` stands behind times and memory, because a capture that fails may leave its process in that state. Seconds are estimates.
"""

from __future__ import annotations

from functools import partial

from . import (
    apart,
    compiled,
    dropout,
    encoders,
    environment,
    graph,
    host,
    kernels,
    models,
    nosync,
    numerics,
    padding,
    repeats,
    smoke,
    timing,
    traps,
)
from .findings import Stage

__all__ = ["STAGES"]

STAGES: tuple[Stage, ...] = (
    Stage("smoke", "every backend computes a small batch", smoke.run, 30, parts=smoke.parts, processes=8),
    Stage("env", "the machine, its speed, and which backends accept it", environment.run, 12, quiet=True),
    Stage("numerics", "every backend against float64, with NaN at padding", numerics.run, 35),
    Stage("kernels", "the kernels that ran are the expected ones", kernels.run, 20),
    Stage("padding", "every form of padding, every constructor, rotary positions", padding.run, 20),
    Stage("nosync", "no call waits for the device", nosync.run, 12),
    Stage("dropout", "dropout is unbiased, has the right variance, and is the same in the backward", dropout.run, 10),
    Stage("models", "torch's encoder before and after `enable`", models.run, 5),
    Stage("determinism", "results are the same bits each time, or the call is refused", repeats.determinism, 10),
    Stage("traps", "known faults of kernels do not affect results", traps.traps, 10),
    Stage("encoders", "whole encoders before and after `enable`, times", encoders.encoders, 45, quiet=True),
    Stage("timing", "one attention against torch and the bare kernel, times", timing.timing, 75, quiet=True),
    Stage("host", "what a call costs the host", host.run, 8, quiet=True),
    Stage("bert", "a BertModel before and after `enable`, times", encoders.bert, 45, required=False, quiet=True),
    Stage("memory", "memory is linear in tokens", repeats.memory, 12, needs_gpu=True),
    Stage("large", "more than 65535 sequences, and more than 2^31 elements", traps.large, 20, needs_gpu=True),
    Stage("graph", "one CUDA graph for all lengths", graph.run, 15, needs_gpu=True),
    Stage("compile", "one compiled graph for all lengths", compiled.run, 45),
    Stage(
        "flex",
        "flex_attention: right, and its kernels",
        smoke.run,
        30,
        needs_gpu=True,
        only="flex",
        parts=apart.flex_parts,
        processes=6,
        early=True,
    ),
    Stage("minitest", "a layer with masks, causal attention and dropout", timing.minitest, 25, required=False),
    Stage(
        "flash3",
        "a library of flash-attention 3",
        smoke.run,
        45,
        needs_gpu=True,
        required=False,
        only="flash3",
        parts=partial(apart.parts_of, "flash3"),
    ),
    Stage(
        "flash4", "flash-attention 4", smoke.run, 90, needs_gpu=True, required=False, only="flash4", parts=partial(apart.parts_of, "flash4")
    ),
    Stage(
        "flextimes", "one attention by flex_attention, times", apart.flex_times, 45, needs_gpu=True, required=False, quiet=True, only="flex"
    ),
)
