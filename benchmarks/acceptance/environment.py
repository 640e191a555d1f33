"""The machine: what is in it, whether it is as fast as it should be, and which backends accept it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import lzma
import platform
import re
import shutil
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

import varlen_attn
from varlen_attn.convert.timing import cpu_name, interleave

from .findings import Findings, Setting

__all__ = ["driver_version", "facts", "load_library", "run", "slug"]

PACKAGES = (
    "einops", "flash-attn", "flash-attn-3", "flash-attn-4", "hypothesis", "numpy", "pytest", "sentence-transformers", "tokenspeed-fa3",
    "transformers", "triton", "xformers",
)  # fmt: skip
VENDORS = {"nvidia", "amd", "geforce", "tesla", "instinct", "radeon", "intel"}
_BOARD = re.compile(r"^(\d+gb|sxm\d?|pcie|hbm\d?e?|nvl|oam|mig)$")
COPY_TBPS, MATMUL_TFLOPS = 2.5, 650  # of an H100 SXM that nothing slows down


def slug(name: str) -> str:
    """The name of a folder: "NVIDIA H100 80GB HBM3" -> "h100", "NVIDIA GeForce RTX 4090" -> "rtx-4090"."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word and word not in VENDORS]
    board = next((i for i, word in enumerate(words) if _BOARD.match(word)), len(words))
    return "-".join(words[:board] or words or ["gpu"])


def driver_version(text: str) -> str | None:
    """From what the driver writes to ``/proc/driver/nvidia/version``."""
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found.group(0) if found else None


def facts(device: str) -> dict[str, Any] | None:
    """What every number depends on; no names of machines. None without that device."""
    if device == "cuda" and not torch.cuda.is_available():
        return None
    found: dict[str, Any] = {
        "device": cpu_name(),
        "type": device,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "varlen_attn": varlen_attn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "backends": {row["name"]: "available" if row["available"] else row["reason"] for row in varlen_attn.backends()},
    }
    if device == "cuda":
        driver = Path("/proc/driver/nvidia/version")
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "driver": driver_version(driver.read_text()) if driver.exists() else None,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def load_library(library: Path, runtime: Path | None) -> None:
    """Load the operations ``torch.ops.flash_attn_3`` from a library that was carried here, which may be packed as ``.xz``.

    Args:
        library: an ``.so`` of flash-attention 3 with torch's stable ABI.
        runtime: the ``libcudart`` that it was linked to, if that is another than torch's, or a wheel that holds one:
            loaded before it, for all.

    Raises:
        RuntimeError: a file is not there, cannot be loaded, or registers no such operations.
    """
    for path in (library, *([runtime] if runtime else [])):
        if not path.exists():
            raise RuntimeError(f"there is no file {path}")
    try:
        if runtime is not None:
            ctypes.CDLL(str(_from_wheel(runtime)), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(_unpacked(library)))
    except OSError as error:
        raise RuntimeError(f"{library} cannot be loaded: {error}") from None
    if not hasattr(torch.ops.flash_attn_3, "fwd"):
        raise RuntimeError(f"{library} registers no torch.ops.flash_attn_3.fwd")


def _unpacked(library: Path) -> Path:
    """The library itself; a packed one is unpacked to a folder that stays, because a loaded library needs its file."""
    if library.suffix != ".xz":
        return library
    target = Path(tempfile.mkdtemp(prefix="varlen_attn-")) / library.stem
    with lzma.open(library) as packed, target.open("wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 22)
    return target


def _from_wheel(runtime: Path) -> Path:
    if runtime.suffix != ".whl":
        return runtime
    with zipfile.ZipFile(runtime) as wheel:
        name = next((name for name in wheel.namelist() if Path(name).name.startswith("libcudart.so")), None)
        if name is None:
            raise RuntimeError(f"{runtime} holds no libcudart.so")
        return Path(wheel.extract(name, tempfile.mkdtemp(prefix="varlen_attn-")))


def run(setting: Setting, findings: Findings) -> None:
    there = [row["name"] for row in varlen_attn.backends() if row["available"]]
    findings.check("a backend is there", bool(there), ", ".join(there))
    if setting.small:
        return
    copied, multiplied = _rates(setting.device)
    findings.facts |= {"copy_TB/s": copied, "matmul_TFLOP/s": multiplied}
    # Of the card, not of the library: whoever reads the times should know.
    for name, rate, unit, least in (("copy", copied, "TB/s", COPY_TBPS), ("matmul", multiplied, "TFLOP/s", MATMUL_TFLOPS)):
        findings.check(name, rate > least, f"{rate} {unit}; an H100 SXM does more than {least}", required=False)


def _rates(device: str, numbers: int = 1 << 29, side: int = 8192) -> tuple[float, float]:
    """TB/s of a copy, read and written, and TFLOP/s of a matrix product, in bfloat16."""
    x = torch.randn(numbers, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = interleave({"copy": lambda: y.copy_(x), "matmul": lambda: a @ b}, budget=4.0, device=device)
    return round(2 * x.nbytes / times["copy"].seconds / 1e12, 3), round(2 * side**3 / times["matmul"].seconds / 1e12, 1)
