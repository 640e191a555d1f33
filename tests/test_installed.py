"""What ``pip install`` brings: the compiled kernel, and without a compiler a package that works and says what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import varlen_attn

pytestmark = pytest.mark.native

ROOT = Path(varlen_attn.__file__).parent.parent
CALL = """
import torch, varlen_attn
from varlen_attn import SeqLayout, explain, varlen_attention
x = torch.randn(5, 2, 16)
layout = SeqLayout.from_lengths([3, 2])
for batch_invariant in (False, True):
    varlen_attention(x, x, x, layout, batch_invariant=batch_invariant)
print(explain(x, x, x, layout).backend, varlen_attn.__file__)
"""


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def installed(source: Path, folder: Path, **variables: str) -> tuple[str, str, str]:
    """The wheel's name, and what a call in a bare environment prints: torch is found by its path, and no index is asked."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VARLEN_ATTN", "PYTHON", "CXX", "LDFLAGS"))}
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source, env=environment | variables)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps", wheel, env=environment)
    (site,) = folder.glob("venv/lib/*/site-packages")
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    done = run(python, "-c", CALL, cwd=folder, env=environment)
    backend, file = done.stdout.split()
    assert Path(file).is_relative_to(site)
    return wheel.name, backend, done.stderr


def test_a_wheel_brings_the_kernel(tmp_path: Path) -> None:
    wheel, backend, told = installed(ROOT, tmp_path)
    assert "-py3-none-" in wheel
    assert not wheel.endswith("-any.whl")
    assert (backend, told) == ("cpu_native", "")


def test_without_a_compiler_it_is_installed_and_says_once_what_is_missing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "varlen_attn", source / "varlen_attn", ignore=shutil.ignore_patterns("native-*", "__pycache__"))
    wheel, backend, told = installed(source, tmp_path, PATH=str(source))
    assert wheel.endswith("-py3-none-any.whl")
    assert backend == "cpu"
    assert told.count("no C++ compiler was found") == 1
    assert "Debian package g++" in told
    assert told.count("python -m varlen_attn build-native") == 1
