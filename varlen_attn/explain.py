"""`explain` a call before it is made, and say what this machine has."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor

from .dispatch import Plan, backends
from .functional import plan_attention
from .layout import SeqLayout

__all__ = ["environment", "environment_text", "explain"]


def explain(query: Tensor, key: Tensor, value: Tensor, layout: SeqLayout, layout_kv: SeqLayout | None = None, **semantics: Any) -> Plan:
    """Which backend would run ``varlen_attention(query, key, value, layout, layout_kv, **semantics)``, and why the others would not.

    Names every backend exactly once, with all reasons and their fixes; ``print`` it. Nothing is computed.

    Raises:
        what the call itself would raise.
    """
    return plan_attention(query, key, value, layout, layout_kv, **semantics)


def environment() -> dict[str, Any]:
    """The machine, torch, and every backend with its version, availability and reason."""
    gpu = None
    if torch.cuda.is_available():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        gpu = f"{torch.cuda.get_device_name()} (compute capability {capability})"
    from . import __version__

    return {
        "varlen_attn": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "backends": backends(),
    }


def environment_text() -> str:
    """`environment`, for people."""
    facts = environment()
    rows = facts.pop("backends")
    lines = [f"{name:11} {value if value is not None else 'none'}" for name, value in facts.items()]
    lines.append("")
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        version = f"{row['package']} {row['version']}" if row["version"] else row["package"]
        status = "available" if row["available"] else "no: " + row["reason"]
        lines.append(f"{row['name']:{width}}  {version:22} {status}")
    return "\n".join(lines)
