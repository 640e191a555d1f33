"""Building, finding and leaving out the compiled CPU kernel. No compiler is needed here: stand-ins fail or write what they are told."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch

from varlen_attn import BackendRefused, SeqLayout, _native, dispatch, explain, varlen_attention
from varlen_attn.__main__ import main
from varlen_attn.errors import VarlenError


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


def reasons(backend: str = "cpu_native") -> str:
    x = torch.randn(3, 1, 16)
    plan = explain(x, x, x, SeqLayout.from_lengths([2, 1]))
    return " ".join(str(r) for d in plan.decisions if d.backend == backend for r in d.reasons)


def test_what_was_not_built_is_refused_with_the_command_that_builds_it(folder: Path) -> None:
    assert f"is not compiled for torch {torch.__version__}" in reasons()
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
    compiler(folder, 'while [ $# -gt 1 ]; do shift; done; echo nothing >"$1"', monkeypatch)
    assert main(["build-native"]) == 1
    assert "what was built does not load" in capsys.readouterr().err
    assert (folder / _native._name()).read_bytes() == b"the old one"


def test_looking_for_it_never_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that can not be read, no home directory, a note that is empty or no text: `cpu` runs in all of them."""
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
    monkeypatch.setattr(_native, "_hashes", {})
    assert _native._name() != before, "other sources, another build"


def test_builds_lie_with_the_environment_or_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_native, "setting", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_native.sys, "prefix", str(tmp_path / "venv"))
    assert list(_native._folders()) == [tmp_path / "venv" / "share" / "varlen_attn", tmp_path / "varlen_attn"]
    monkeypatch.setattr(_native.sys, "prefix", _native.sys.base_prefix)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert list(_native._folders()) == [Path.home() / ".cache" / "varlen_attn"]
