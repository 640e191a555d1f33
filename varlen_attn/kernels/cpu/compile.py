"""Compiles the kernel of ``csrc/``, with a C++ compiler and nothing else: the build hook of the package runs this file by itself.

One file serves every version of torch and all CPUs of an architecture: it takes what it needs of torch when it is loaded, and has the
kernel for each instruction set. Nothing is ever compiled at import or by a call.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FLAGS = (
    "-O3", "-std=c++20", "-fPIC", "-fopenmp-simd", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-fno-strict-aliasing",  # numbers are moved as integers of their size
    "-fno-exceptions",  # and so no C++ runtime
)  # fmt: skip
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mmovbe", "-mpopcnt")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
LEVELS = {"baseline": (), "avx2": _AVX2, "avx512": (*_AVX2, *_AVX512)}  # by namespace; beside x86 vector instructions are in the baseline


class CannotCompile(Exception):
    """No compiler, or one that fails; the message says what."""


def name(machine: str = "") -> str:
    """Of the file: what it was compiled from and for, as ``platform.machine()`` says it. Neither the CPU nor torch."""
    digest = hashlib.sha256(repr((FLAGS, LEVELS)).encode())
    for source in sorted(os.listdir(SOURCES)):
        digest.update((SOURCES / source).read_bytes())
    return f"native-{machine or platform.machine()}-{digest.hexdigest()[:12]}.so"


def compile_into(
    folder: Path, machine: str = "", system: str = sys.platform, options: Sequence[str] = (), check: Callable[[Path], object] = Path
) -> Path:
    """Compile with ``$CXX``, ``$CXXFLAGS`` and ``$LDFLAGS`` where they are set; 20 seconds. What fails is kept in a note beside it."""
    target = folder / name(machine)
    # Everything is written in a new folder and moved at once: no other process loads half a file, and no link is followed.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            built = _compile(_compiler(system), "x86" in target.name, system, [*options], Path(scratch))
            built.chmod(0o755)  # whatever the linker and the umask made of it
            check(built)
            os.replace(built, target)
        except (CannotCompile, OSError) as error:
            with suppress(OSError):
                words = Path(scratch, "failed")
                words.write_text(f"{error}\n", encoding="utf-8", errors="replace")
                os.replace(words, target.with_suffix(".failed"))
            raise
    target.with_suffix(".failed").unlink(missing_ok=True)
    return target


def _compiler(system: str) -> list[str]:
    import shlex

    if system not in ("linux", "darwin"):
        raise CannotCompile(f"the CPU kernel is compiled on Linux and macOS only, and this is {system}")
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for known in ("g++", "clang++", "c++"):
        if shutil.which(known):
            return [known]
    raise CannotCompile("no C++ compiler was found (g++ or clang++): install one, such as the Debian package g++, or set CXX")


def _compile(compiler: list[str], x86: bool, system: str, options: list[str], scratch: Path) -> Path:
    import shlex

    flags, linked = (shlex.split(os.environ.get(variable, "")) for variable in ("CXXFLAGS", "LDFLAGS"))
    levels = LEVELS if x86 else {"baseline": LEVELS["baseline"]}
    sources = {"entry": (), **{level: (*more, f"-DVARLEN_LEVEL={level}") for level, more in levels.items()}}
    objects = {name: str(scratch / f"{name}.o") for name in sources}
    jobs = [
        [*compiler, *flags, *FLAGS, *options, *more, "-c", str(SOURCES / f"{'kernel' if more else name}.cpp"), "-o", objects[name]]
        for name, more in sources.items()
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_call, jobs))
    unneeded = [] if system == "darwin" else ["-Wl,--as-needed"]
    target = scratch / "native.so"
    _call([*compiler, "-shared", *options, *unneeded, *objects.values(), *linked, "-o", str(target)])
    return target


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise CannotCompile(f"the compiler could not be started: {error}") from error
    if done.returncode:
        import shlex

        first = partial(next, (line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise CannotCompile(f"{first()}\n{shlex.join(command)}\n{done.stderr}")
