"""Building, finding and leaving out the compiled CPU kernel. No compiler is needed here: stand-ins fail or write what they are told."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from varlen_attn import BackendRefused, SeqLayout, explain, varlen_attention
from varlen_attn.attention import dispatch
from varlen_attn.cli.main import main
from varlen_attn.errors import VarlenError
from varlen_attn.kernels.cpu import build as _native


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for builds, and a process that has not looked yet."""
    monkeypatch.setattr(_native, "setting", str(tmp_path))
    monkeypatch.setattr(_native, "_found", {})
    monkeypatch.setattr(dispatch, "_plans", {})
    return tmp_path


def compiler(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(path))


WRITES = 'while [ $# -gt 1 ]; do shift; done; echo nothing >"$1"'  # to the last of the arguments, which is the output


def reasons(backend: str = "cpu_native") -> str:
    x = torch.randn(3, 1, 16)
    plan = explain(x, x, x, SeqLayout.from_lengths([2, 1]))
    return " ".join(str(r) for d in plan.decisions if d.backend == backend for r in d.reasons)


def test_what_was_not_built_is_refused_with_the_command_that_builds_it(folder: Path) -> None:
    assert f"is not compiled yet for torch {torch.__version__}" in reasons()
    assert "python -m varlen_attn build-native" in reasons()
    x = torch.randn(3, 1, 16)
    with pytest.raises(BackendRefused, match="build-native"):
        varlen_attention(x, x, x, SeqLayout.from_lengths([3]), backend="cpu_native")
    assert not list(folder.iterdir()), "a call compiles nothing"


def test_a_build_for_another_torch_is_named(folder: Path) -> None:
    (folder / "native-2.12.0-x86_64-0123456789ab.so").touch()
    assert "only for torch 2.12.0" in reasons()


def test_it_can_be_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "setting", "0")
    assert "is left out: VARLEN_ATTN_NATIVE=0 is set" in reasons()


def test_no_compiler_is_an_error_that_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    assert main(["build-native"]) == 3, "not 1: nothing went wrong"
    with pytest.raises(_native.NoCompiler, match=r"no C\+\+ compiler was found.*Debian package g\+\+, or set CXX"):
        _native.build()
    assert "the last attempt failed (no C++ compiler was found" in reasons()


def test_another_system_than_linux_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native.sys, "platform", "darwin")
    with pytest.raises(_native.NoCompiler, match="compiled on Linux only, and this is darwin"):
        _native.build()


def test_a_failed_build_keeps_the_compilers_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler(folder, "echo 'kernel.cpp:1: error: bad flag' >&2; exit 3", monkeypatch)
    assert main(["build-native"]) == 1
    told = capsys.readouterr().err
    assert "error: bad flag" in told
    assert "-O3" in told, "the command too"
    assert "the last attempt failed (kernel.cpp:1: error: bad flag)" in reasons()
    assert not list(folder.glob("*.so"))


def test_a_compiler_that_is_not_there_is_an_error_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(folder / "nothing"))
    with pytest.raises(VarlenError, match="could not be started"):
        _native.build()


def test_a_file_that_does_not_load_is_refused_with_its_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / _native._name()).write_bytes(b"not a library")
    assert "was built, but does not load" in reasons()


def test_a_result_that_does_not_load_leaves_the_old_build_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / _native._name()).write_bytes(b"the old one")
    compiler(folder, WRITES, monkeypatch)
    assert main(["build-native"]) == 1
    assert "what was built does not load" in capsys.readouterr().err
    assert (folder / _native._name()).read_bytes() == b"the old one"


def belong_to(user: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Path.stat

    def told(self: Path, **options: Any) -> os.stat_result:
        facts = inner(self, **options)
        return os.stat_result([*facts[:4], user, *facts[5:]]) if self == place else facts

    monkeypatch.setattr(Path, "stat", told)


@pytest.mark.parametrize("what", ["file", "folder", "file behind a link", "folder behind a link"])
@pytest.mark.parametrize("how", ["all", "group", "own group", "owner"])
def test_what_others_could_have_written_is_not_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch, what: str, how: str) -> None:
    place = folder / _native._name()
    if "link" in what:
        (folder / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(folder / "elsewhere" / "library")
        place = place.resolve()
    place.write_bytes(b"not a library")
    place = place.parent if "folder" in what else place
    place.chmod({"all": 0o702, "owner": 0o700}.get(how, 0o720))
    if how == "owner":
        belong_to(54321, place, monkeypatch)
        assert f"was built, but is not loaded: {place} belongs to another user (54321). Set VARLEN_ATTN_NATIVE" in reasons()
        return
    if how != "all":
        facts = place.stat()
        belong_to(facts.st_gid + (how == "group"), place, monkeypatch)
        monkeypatch.setattr(_native.os, "geteuid", lambda: facts.st_gid + (how == "group"))
    if how == "own group":
        assert "was built, but does not load" in reasons(), "as anything that is no library"
    else:
        assert f"not loaded: other users can write to {place}. Look whether it is what you built, and run `chmod go-w {place}`" in reasons()


def test_a_folder_of_others_does_not_hide_our_own(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    shared, own = folder / "shared", folder / "own"
    for place, mode in ((shared, 0o777), (own, 0o755)):
        place.mkdir()
        place.chmod(mode)
        (place / _native._name()).touch()
    monkeypatch.setattr(_native, "_folders", lambda: iter((shared, own)))
    monkeypatch.setattr(_native, "Library", lambda path: path)
    assert _native._load(_native._name()) == own / _native._name()
    assert _native._writable_folder() == own
    monkeypatch.setattr(_native, "_folders", lambda: iter((shared,)))
    with pytest.raises(VarlenError, match=rf"no folder to build in can be written: {shared}; other users can write to {shared}"):
        _native.build()
    monkeypatch.delattr(_native.os, "geteuid")
    assert _native._writable_folder() == shared, "where there are no such rights, nothing is asked"


def test_no_link_is_followed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by the note of a failed build, nor by the library of a successful one."""
    precious = folder / "precious"
    precious.write_bytes(b"precious")
    target = folder / _native._name()
    for link in (target, target.with_suffix(".failed")):
        link.symlink_to(precious)
    compiler(folder, "exit 3", monkeypatch)
    with pytest.raises(VarlenError):
        _native.build()
    assert not target.with_suffix(".failed").is_symlink()
    compiler(folder, WRITES, monkeypatch)
    monkeypatch.setattr(_native, "Library", lambda path: path)
    assert _native.build() == target
    assert not target.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o755, "whatever the umask is"
    assert not target.with_suffix(".failed").exists()
    assert precious.read_bytes() == b"precious"


@pytest.mark.parametrize("at", ["_compile", "_call", "Library", "os.replace", "Path.chmod"])
def test_an_interrupted_build_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    (folder / _native._name()).write_bytes(b"the old one")
    compiler(folder, WRITES, monkeypatch)
    before = sorted(folder.iterdir())

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"varlen_attn.kernels.cpu.build.{at}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _native.build()
    assert sorted(folder.iterdir()) == before
    assert (folder / _native._name()).read_bytes() == b"the old one"


def test_two_builds_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(folder, f"sleep 0.05; {WRITES}", monkeypatch)
    monkeypatch.setattr(_native, "Library", lambda path: path)
    with ThreadPoolExecutor(4) as pool:
        built = [job.result() for job in [pool.submit(_native.build) for _ in range(4)]]
    assert built == [folder / _native._name()] * 4
    assert sorted(p.name for p in folder.iterdir()) == sorted(["compiler", _native._name()])


def test_looking_for_it_never_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that cannot be read, no home directory, a note that is empty or no text: `cpu` runs in all of them."""
    note = (folder / _native._name()).with_suffix(".failed")
    for content in (b"", b"\xff\xfe"):
        note.write_bytes(content)
        _native._found.clear()
        dispatch._plans.clear()
        assert "the last attempt failed" in reasons()
    note.unlink()

    def refused(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "glob", refused)
    monkeypatch.setattr(Path, "exists", refused)
    _native._found.clear()
    dispatch._plans.clear()
    assert "is not compiled" in reasons()

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(_native, "setting", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert [f.name for f in _native._folders()] in ([], ["varlen_attn"])


def test_no_folder_to_write_to_is_an_error_that_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "setting", "/proc/nowhere")
    with pytest.raises(VarlenError, match=r"no folder to build in can be written: /proc/nowhere\. Set VARLEN_ATTN_NATIVE"):
        _native.build()


def test_a_sanitized_build_needs_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "setting", "")
    with pytest.raises(VarlenError, match="set VARLEN_ATTN_NATIVE to a folder of its own"):
        _native.build(sanitize="address")


def test_the_name_tells_torch_architecture_and_sources(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = _native._name()
    assert torch.__version__ in before
    changed = tmp_path / "sources"
    changed.mkdir()
    for file in _native._SOURCES.glob("*.*"):
        (changed / file.name).write_bytes(file.read_bytes() + b"\n")
    monkeypatch.setattr(_native, "_SOURCES", changed)
    assert _native._name() != before, "other sources, another build"


def test_builds_lie_with_the_environment_or_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_native, "setting", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_native.sys, "prefix", str(tmp_path / "venv"))
    assert list(_native._folders()) == [tmp_path / "venv" / "share" / "varlen_attn", tmp_path / "varlen_attn"]
    monkeypatch.setattr(_native.sys, "prefix", _native.sys.base_prefix)
    monkeypatch.delenv("XDG_CACHE_HOME")
    in_the_home = [Path.home() / ".cache" / "varlen_attn"]
    assert list(_native._folders()) == in_the_home
    for relative in ("cache", ".", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert list(_native._folders()) == in_the_home, "relative ones are ignored"
    monkeypatch.setattr(_native.sys, "prefix", "venv")
    monkeypatch.setenv("HOME", "home")
    assert list(_native._folders()) == [], "never below the current folder"


def test_a_relative_folder_is_that_of_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for given, want in (("", ""), ("0", "0"), ("builds", str(tmp_path / "builds")), ("/builds", "/builds")):
        monkeypatch.setenv("VARLEN_ATTN_NATIVE", given)
        assert _native._read_setting() == want
