"""What this machine has, as data and as text."""

from __future__ import annotations

import platform
from typing import Any

import torch

from ..attention.dispatch import backends
from ..convert.timing import cpu_name
from ..layout.shown import table


def machine() -> dict[str, Any]:
    """The machine, torch and this package."""
    gpu = None
    if torch.cuda.is_available():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        gpu = f"{torch.cuda.get_device_name()} (compute capability {capability})"
    from .. import __version__

    return {
        "varlen_attn": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpu_name": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def environment() -> dict[str, Any]:
    """`machine`, and every backend with its version, availability and reason."""
    return machine() | {"backends": backends()}


def environment_text(facts: dict[str, Any]) -> str:
    """`environment`, for people."""
    rows = facts["backends"]
    lines = [f"{name:11} {'none' if value is None else value}" for name, value in facts.items() if name != "backends"]
    packages = [f"{row['package']} {row['version'] or ''}".rstrip() for row in rows]
    states = ["available" if row["available"] else f"no: {row['reason']}" for row in rows]
    return "\n".join([*lines, "", table([*zip((row["name"] for row in rows), packages, states, strict=True)], "<<<")])


def headline(facts: dict[str, Any]) -> str:
    """`machine` in one line."""
    where = facts["gpu"] or f"{facts['cpu_name']} ({facts['cpu']})"
    return f"varlen_attn {facts['varlen_attn']} on torch {facts['torch']}, {where}, {facts['threads']} thread{'s' * (facts['threads'] > 1)}"
