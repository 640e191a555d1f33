"""Timing, the facts about a machine that a number needs beside it, rows of results, and memory."""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import re
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import varlen_attn
from varlen_attn.attention.profile import kernel_ran
from varlen_attn.convert.timing import PATIENCE, QUIET, Timing, cpu_name, facts, interleave, ratio

__all__ = [
    "DTYPES", "PATIENCE", "QUIET", "RESULTS", "Absent", "Timing", "add_machine", "environment", "facts", "home", "interleave", "kernel_ran",
    "limit_memory", "ours", "peak_extra", "ratio", "save", "use_machine",
]  # fmt: skip

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Absent(Exception):
    """A contestant that cannot take part; its text is the reason, which stands in the results in place of a time."""


def add_machine(parser: ArgumentParser, budget: float) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU: 1 is timed by CPU time, more by the wall clock")
    parser.add_argument("--budget", type=float, default=budget, help="seconds for one row; never fewer than 5 rounds")


def use_machine(device: str, threads: int) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here")
    torch.set_num_threads(threads)


def ours(device: str) -> dict[str, str | None]:
    """Our backends: None for those that are available for this device, else the reason against."""
    rows = varlen_attn.backends()
    return {row["name"]: None if row["available"] else row["reason"] for row in rows if _concerns(row, device)}


def _concerns(row: dict[str, Any], device: str) -> bool:
    """A reason that says nothing but "wrong device" is no news in a table about another device."""
    backend = next(b for b in varlen_attn.BACKENDS if b.name == row["name"])
    return device in backend.capabilities.devices


def peak_extra(call: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that ``call`` takes at most, beyond what stood before: of resident memory (Linux only), on a GPU by torch's allocator.

    In a fresh process only: memory that was freed before, but not given back, would be used again without being seen.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        standing = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - standing
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def limit_memory(gigabytes: float, device: str = "cpu") -> None:
    """Refuse this process more than so much beyond what it has now. Linux, or torch's allocator on a GPU."""
    if device == "cuda":
        _, everything = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + gigabytes * 1e9) / everything))
        return
    import resource

    most = _status("VmData") + int(gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a number depends on; no names of machines."""
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "varlen_attn": varlen_attn.__version__,
        **gpu,
    }


def home(name: str, device: str = "cpu") -> Path:
    """The file for what this machine measures: ``results/`` is of one kind of CPU, and other machines have folders of their own in it."""
    main = RESULTS / f"{name}.json"
    if device == "cuda":
        return RESULTS / "cuda" / main.name
    here = environment()
    first = next((path for path in (main, *sorted(RESULTS.glob("*.json"))) if path.exists()), None)
    known = here if first is None else json.loads(first.read_text())["environment"]
    kind, its = ([of[key] for key in ("cpu", "cpu_capability")] for of in (here, known))
    return main if kind == its else RESULTS / "-".join(re.findall("[a-z0-9]+", " ".join(kind).lower())) / main.name


def save(name: str, rows: list[dict[str, Any]], keys: tuple[str, ...], device: str = "cpu") -> Path:
    """Write rows to `home`. Rows of an earlier run that this one did not measure again stay, if they are of this torch."""
    path = home(name, device)
    earlier = json.loads(path.read_text()) if path.exists() else {"environment": {}, "rows": []}
    here, today = environment(device), time.strftime("%Y-%m-%d", time.gmtime())
    rows = [{**row, "measured": today} for row in rows]
    old = earlier["rows"] if same_setting(earlier["environment"], here) else []
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps({"environment": here, "rows": merged(old, rows, keys)}, indent=1) + "\n")
    return path


def same_setting(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether rows measured in these environments may stand in one table; threads are a column of their own."""
    return all(one.get(key) == other.get(key) for key in ("cpu", "cpu_capability", "torch", "gpu"))


def merged(earlier: list[dict[str, Any]], rows: list[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """``rows``, and those of ``earlier`` that differ from all of them in one of ``keys``."""
    fresh = {tuple(row.get(k) for k in keys) for row in rows}
    kept = [row for row in earlier if tuple(row.get(k) for k in keys) not in fresh]
    return sorted(kept + rows, key=lambda row: tuple(str(row.get(k)) for k in keys))
