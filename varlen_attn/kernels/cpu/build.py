"""The compiled CPU kernel of ``csrc/``: found and loaded. `compile` makes the file when the package is installed.

A plain shared library without Python or torch headers: called through `ctypes`, which releases the GIL. It gets the functions of libtorch
that it needs, those for threads and for matrix products, when it is loaded.
"""

from __future__ import annotations

import ctypes
import logging
import os
import stat
import struct
import sys
from contextlib import suppress
from pathlib import Path

import torch

from ...errors import VarlenError
from . import compile as _compile

_VARIABLE = "VARLEN_ATTN_NATIVE"  # 0: leave the kernel out, as if it had not been compiled; else the folder where it lies


def _read_setting() -> str:
    """Once, because plans are kept; a relative folder is below the one in which the process is now, wherever it goes later."""
    given = os.environ.get(_VARIABLE, "")
    with suppress(OSError):  # that folder is gone: then below none
        return given if given in ("", "0") else os.path.abspath(given)
    return "0"


setting = _read_setting()
_ELSEWHERE = f"Set {_VARIABLE} to a folder of your own, and build there"
INSTALL = "compile it with `python -m varlen_attn build-native`"

# `varlen::Torch` of ``csrc/attention.h``: threads since torch 2.10, and oneDNN's products by the names that C++ compilers give them.
_FUNCTIONS = (
    "torch_parallel_for", "torch_get_num_threads", "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb",
    "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb", "_ZN2at6native7cpublas14brgemm_releaseEb",
)  # fmt: skip
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
        level: the instruction set that it uses here, a key of `compile.LEVELS`.
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
        libtorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{'dylib' if sys.platform == 'darwin' else 'so'}"))
        functions = (ctypes.cast(getattr(libtorch, name, 0), ctypes.c_void_p) for name in _FUNCTIONS)
        loaded.varlen_bind((ctypes.c_void_p * len(_FUNCTIONS))(*functions))
        self._loaded = loaded
        self.level = list(_compile.LEVELS)[loaded.varlen_level()]
        self.products = {0: "its own products", 1: "oneDNN float32"}.get(loaded.varlen_products(), "oneDNN float32 and bfloat16")

    def __str__(self) -> str:
        return f"{self.level}, {self.products}"

    def forward(self, arguments: Arguments) -> None:
        """Raises ValueError for offsets that do not fit the rows, RuntimeError for all else."""
        if failed := self._loaded.varlen_forward(ctypes.byref(arguments)):
            raise self._error(failed)

    def backward(self, arguments: Arguments) -> None:
        if failed := self._loaded.varlen_backward(ctypes.byref(arguments)):
            raise self._error(failed)

    def differs(self, *fields: int, level: int = -1) -> bool:
        """Whether a mask is anything else than it is thought to be. Takes the fields of `varlen::Mask` of ``csrc/attention.h``."""
        return bool(self._loaded.varlen_differs((ctypes.c_int64 * (len(fields) + 1))(*fields, level)))

    def _error(self, status: int) -> Exception:
        kind = ValueError if status == 2 else RuntimeError
        return kind(f"the compiled CPU kernel failed: {self._loaded.varlen_last_error().decode()}")


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
        _found[setting] = _load()
    return _found[setting]


def _folder() -> Path:
    """That of the package, where its installation puts the kernel, or the one that the user says."""
    return Path(__file__).parent if setting in ("", "0") else Path(setting)


def _load() -> Library | str:
    """Looking for an optional kernel must never fail, whatever the folder is like."""
    path, note = _folder() / _compile.name(), ""
    try:
        if os.path.exists(path):
            # Who can write to the package needs no library: its own code runs here anyway.
            shared = _shared(path.resolve(), path.resolve().parent, path.parent) if setting else None
            return f"was built, but is not loaded: {shared}" if shared else Library(path)
        note = path.with_suffix(".failed").read_text(encoding="utf-8", errors="replace").split("\n")[0]
    except FileNotFoundError:
        return "is not compiled yet for this machine and this version of the package"
    except (OSError, AttributeError) as error:
        return f"was built, but does not load ({error})"
    missing = f"is not compiled: the last attempt failed ({note})"
    logging.getLogger("varlen_attn").warning(f"The compiled CPU kernel, which is faster, {missing}. To have it, {INSTALL}.")
    return missing


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
            return f"{place} belongs to another user ({facts.st_uid}). {_ELSEWHERE}"
        if facts.st_mode & (stat.S_IWOTH | (0 if facts.st_gid == facts.st_uid else stat.S_IWGRP)):
            import shlex  # here, because it takes a millisecond

            return f"other users can write to {place}. Look whether it is what you built, and run `chmod go-w {shlex.quote(str(place))}`"
    return None


def build(*, sanitize: str | None = None) -> Path:
    """Compile the kernel again with the C++ compiler of this machine. See `compile.compile_into`.

    Args:
        sanitize: as of ``-fsanitize``, for tests: ``"address,undefined"``. Only with a folder of its own.

    Raises:
        VarlenError: no compiler, one that fails, a folder that is not this user's to write to alone, or a result that does not load; the
            message says what, and is kept.
    """
    if sanitize and setting in ("", "0"):
        raise VarlenError(f"a sanitized build takes the place of the normal one: set {_VARIABLE} to a folder of its own")
    folder = _folder()
    with suppress(OSError):
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise VarlenError(f"this user cannot write to {folder}. {_ELSEWHERE}")
    if setting not in ("", "0") and (shared := _shared(folder)):
        raise VarlenError(shared)
    options = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-g"] if sanitize else []
    try:
        target = _compile.compile_into(folder, options=options, check=Library)
    except _compile.CannotCompile as error:
        raise VarlenError(str(error)) from error
    except OSError as error:
        raise VarlenError(f"what was built does not load: {error}") from error
    _found.clear()
    return target
