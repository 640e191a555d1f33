"""The compiled CPU kernel of ``csrc/``: built by order only, found, loaded.

A plain shared library without Python or torch headers: called through `ctypes`, which releases the GIL, and linked against libtorch for
its matrix products. One build serves all CPUs of an architecture, because the instruction set is chosen when it is loaded; another torch
needs another build. Nothing is ever compiled at import or by a call. (``shlex`` is imported where it is used: it takes a millisecond.)
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from ...errors import VarlenError

_SOURCES = Path(__file__).parent / "csrc"
_VARIABLE = "VARLEN_ATTN_NATIVE"  # 0: leave the kernel out, as if it had not been built; else the folder where it lies


def _read_setting() -> str:
    """Once, because plans are kept; a relative folder is below the one in which the process is now, wherever it goes later."""
    given = os.environ.get(_VARIABLE, "")
    with suppress(OSError):  # that folder is gone
        return given if given in ("", "0") else os.path.abspath(given)
    return given


setting = _read_setting()
_COMPILER_FLAGS = (
    "-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-fno-strict-aliasing",  # numbers are moved as integers of their size
)  # fmt: skip
_LEVELS = {  # by namespace; what is not x86 has its vector instructions in the baseline
    "baseline": (),
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
}

_LINKER_FLAGS = ("-shared", "-Wl,--no-as-needed")  # libtorch stays linked, although nothing in it must be there

_POINTERS = "q k v out lse grad dq dk dv dsinks cu_q cu_k slopes sinks"
_STRIDES = "q_row q_head k_row k_head v_row v_head grad_row grad_head"
_INTEGERS = "num_seqs rows_q rows_k heads kv_heads dim value_dim dtype low high bottom_right seed slack_q slack_k"
_REALS = "scale softcap dropout_p"
PACKED = struct.Struct(f"{len(_POINTERS.split())}P{len(f'{_STRIDES} {_INTEGERS}'.split())}q{len(_REALS.split())}d2q")


class Arguments(ctypes.Structure):
    """`varlen::Args` of ``csrc/attention.h``, field by field.

    ``Arguments.from_buffer_copy(PACKED.pack(*values))`` takes a sixth of the time in which the constructor sets the fields one by one.
    """

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_int64) for name in (*_STRIDES.split(), *_INTEGERS.split())),
        *((name, ctypes.c_double) for name in _REALS.split()),
        ("level", ctypes.c_int64),
        ("portable", ctypes.c_int64),
    )


class Library:
    """The loaded kernel.

    Attributes:
        path: the file.
        level: the instruction set that it uses here, a key of ``_LEVELS``.
        products: what multiplies matrices: its own code, or libtorch's oneDNN, for float32 alone or for bfloat16 too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        loaded = ctypes.CDLL(str(path))
        for name in ("varlen_args_size", "varlen_level", "varlen_products"):
            getattr(loaded, name).restype = ctypes.c_int64
        loaded.varlen_last_error.restype = ctypes.c_char_p
        if loaded.varlen_args_size() != ctypes.sizeof(Arguments):
            raise OSError(f"{path} was built from other sources")
        self._loaded = loaded
        self.level = list(_LEVELS)[loaded.varlen_level()]
        self.products = {0: "its own products", 1: "oneDNN float32"}.get(loaded.varlen_products(), "oneDNN float32 and bfloat16")

    def __str__(self) -> str:
        return f"{self.level}, {self.products}"

    def forward(self, arguments: Arguments) -> None:
        """Raises ValueError for offsets that do not fit the rows, RuntimeError for all else."""
        torch.get_num_threads()  # sets OpenMP's number of threads in a Python thread that has not asked yet
        if failed := self._loaded.varlen_forward(ctypes.byref(arguments)):
            raise self._error(failed)

    def backward(self, arguments: Arguments) -> None:
        torch.get_num_threads()
        if failed := self._loaded.varlen_backward(ctypes.byref(arguments)):
            raise self._error(failed)

    def _error(self, status: int) -> Exception:
        kind = ValueError if status == 2 else RuntimeError
        return kind(f"the compiled CPU kernel failed: {self._loaded.varlen_last_error().decode()}")


# -------------------------------------------------------------------- finding


_found: dict[str, Library | str] = {}  # by `setting`


def library() -> Library:
    """The loaded kernel. Raises RuntimeError with `why_not` where there is none."""
    found = _found.get(setting) or _find()  # at once: every call of the kernel asks
    if isinstance(found, str):
        raise RuntimeError(f"the compiled CPU kernel {found}")
    return found


def why_not() -> str | None:
    """A sentence without its subject if the kernel cannot be used in this process, else None. Loads it the first time."""
    found = _find()
    return found if isinstance(found, str) else None


def _find() -> Library | str:
    if setting == "0":
        return f"is left out: {_VARIABLE}=0 is set"
    if setting not in _found:
        _found[setting] = _load(_name())
    return _found[setting]


def _load(name: str) -> Library | str:
    found = [folder / name for folder in _folders() if os.path.exists(folder / name)]
    reasons = []
    for path in found:
        try:
            shared = _shared(path.resolve(), path.resolve().parent, path.parent)
            if shared is None:
                return Library(path)
            reasons.append(f"was built, but is not loaded: {shared}")
        except (OSError, AttributeError) as error:
            reasons.append(f"was built, but does not load ({error})")
    return reasons[0] if reasons else _why_not_built(name)


def _shared(*places: Path) -> str | None:
    """Why another user could decide what runs here, if that is so: by owning one of these, or by the right to write to it.

    Trusted are this user, root, and who owns this package, whose code runs here anyway. A group of its owner's number is that owner's own
    (what ``login`` and ``pam_umask`` go by when they let new files be writable by the group); of any other group the members are not known.
    Folders further up do not matter: a user who replaces the folder becomes the owner of the new one.
    """
    if not hasattr(os, "geteuid"):
        return None
    trusted = {0, os.geteuid(), os.stat(__file__).st_uid}
    for place in places:
        facts = place.stat()
        if facts.st_uid not in trusted:
            return f"{place} belongs to another user ({facts.st_uid}). Set {_VARIABLE} to a folder of your own, and build there"
        if facts.st_mode & (stat.S_IWOTH | (0 if facts.st_gid == facts.st_uid else stat.S_IWGRP)):
            import shlex

            return f"other users can write to {place}. Look whether it is what you built, and run `chmod go-w {shlex.quote(str(place))}`"
    return None


def _why_not_built(name: str) -> str:
    """Looking for an optional kernel must never fail, whatever the folders are like."""
    others = set()
    for folder in _folders():
        try:
            note = (folder / name).with_suffix(".failed")
            if os.path.exists(note):
                lines = note.read_text(encoding="utf-8", errors="replace").split("\n")
                return f"is not compiled: the last attempt failed ({lines[0]})"
            others |= {file.name.split("-")[1] for file in folder.glob("native-*.so")}
        except OSError:
            continue
    return f"is not compiled yet for torch {torch.__version__}" + (f", only for torch {', '.join(sorted(others))}" if others else "")


def _name() -> str:
    """Of the file: what it was built from and for. Not the CPU, whose instruction set is chosen when it is loaded."""
    return f"native-{torch.__version__}-{platform.machine()}-{_sources_hash()}.so"


def _sources_hash() -> str:
    digest = hashlib.sha256(repr((_COMPILER_FLAGS, _LINKER_FLAGS, _LEVELS)).encode())
    for name in sorted(os.listdir(_SOURCES)):
        digest.update((_SOURCES / name).read_bytes())
    return digest.hexdigest()[:12]


def _folders() -> Iterator[Path]:
    """Where a build may lie: where the user says, with its virtual environment, whose torch it is for, or in the user's cache.

    Never below the current folder, which may be anybody's: what is no absolute path is left out, as the XDG specification wants it too.
    """
    folders = []
    if setting not in ("", "0"):
        folders.append(Path(setting))
    else:
        if sys.prefix != sys.base_prefix:
            folders.append(Path(sys.prefix) / "share" / "varlen_attn")
        cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
        with suppress(RuntimeError):  # no home directory
            folders.append((cache if cache.is_absolute() else Path.home() / ".cache") / "varlen_attn")
    yield from (folder for folder in folders if folder.is_absolute())


# -------------------------------------------------------------------- building


class NoCompiler(VarlenError):
    """There is nothing to build with: no fault, where the kernel is optional."""


def build(*, sanitize: str | None = None) -> Path:
    """Compile the kernel with the C++ compiler of this machine, ``$CXX`` if that is set. Takes about 20 seconds; needs no network.

    Args:
        sanitize: as of ``-fsanitize``, for tests: ``"address,undefined"``. Only with a folder of its own.

    Raises:
        VarlenError: no folder to write to that is this user's alone, a compiler that fails, or a result that does not load; the message
            says what, and is kept.
        NoCompiler: not Linux, or no compiler.
    """
    if sanitize and setting in ("", "0"):
        raise VarlenError(f"a sanitized build takes the place of the normal one: set {_VARIABLE} to a folder of its own")
    folder = _writable_folder()
    target = folder / _name()
    note = target.with_suffix(".failed")
    # Everything is written in a new folder and moved at once: no other process loads half a file, and no link is followed.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            built = _compile(_compiler(), Path(scratch), sanitize)
            built.chmod(0o755)  # whatever the linker and the umask made of it
            Library(built)
            os.replace(built, target)
        except (VarlenError, OSError) as error:
            with suppress(OSError):
                words = Path(scratch, "failed")
                words.write_text(f"{error}\n", encoding="utf-8", errors="replace")
                os.replace(words, note)
            if isinstance(error, VarlenError):
                raise
            raise VarlenError(f"what was built does not load: {error}") from error
    note.unlink(missing_ok=True)
    _found.clear()
    return target


def _writable_folder() -> Path:
    folders, reasons = list(_folders()), []
    for folder in folders:
        with suppress(OSError):
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            shared = _shared(folder)
            if shared is None and os.access(folder, os.W_OK):
                return folder
            reasons += [] if shared is None else [f"; {shared}"]
    raise VarlenError(
        f"no folder to build in can be written: {', '.join(map(str, folders))}{''.join(reasons)}. Set {_VARIABLE} to one that can"
    )


def _compiler() -> list[str]:
    if sys.platform != "linux":
        raise NoCompiler(f"the CPU kernel is compiled on Linux only, and this is {sys.platform}")
    if os.environ.get("CXX"):
        import shlex

        return shlex.split(os.environ["CXX"])
    for name in ("g++", "c++"):  # whose OpenMP is that of torch
        if shutil.which(name):
            return [name]
    raise NoCompiler("no C++ compiler was found (g++ or c++): install one, such as the Debian package g++, or set CXX")


def _compile(compiler: list[str], scratch: Path, sanitize: str | None) -> Path:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    checks = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-g"] if sanitize else []
    flags = [*_COMPILER_FLAGS, *checks]
    levels = _LEVELS if x86 else {"baseline": ()}
    jobs = [
        [*compiler, *flags, *extra, f"-DVARLEN_LEVEL={name}", "-c", str(_SOURCES / "kernel.cpp"), "-o", str(scratch / f"{name}.o")]
        for name, extra in levels.items()
    ]
    jobs.append([*compiler, *flags, *(["-DVARLEN_X86"] if x86 else []), "-c", str(_SOURCES / "entry.cpp"), "-o", str(scratch / "entry.o")])
    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        list(pool.map(_call, jobs))
    libraries = Path(torch.__file__).parent / "lib"
    # torch's own OpenMP, where it brings one: a second in one process would have threads of its own.
    openmp = sorted(str(file) for file in libraries.glob("libgomp*.so*")) or ["-fopenmp"]
    objects = [job[-1] for job in jobs]
    target = scratch / "native.so"
    libtorch = [f"-L{libraries}", "-ltorch_cpu", *openmp, f"-Wl,-rpath,{libraries}"]
    _call([*compiler, *_LINKER_FLAGS, *checks, *objects, *libtorch, "-o", str(target)])
    return target


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise VarlenError(f"the compiler could not be started: {error}") from error
    if done.returncode:
        import shlex

        first = partial(next, (line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise VarlenError(f"{first()}\n{shlex.join(command)}\n{done.stderr}")
