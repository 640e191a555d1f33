"""Every Python block of the README and of docs/gpu.md runs, in order, one namespace a page; what they say of files and commands is true."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from varlen_attn import BACKENDS
from varlen_attn.cli.main import main
from varlen_attn.kernels.cpu import build as _native

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does that to autograd functions
@pytest.mark.parametrize("page", ["README.md", "docs/gpu.md"])
def test_python_blocks_run(page: str) -> None:
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(blocks):
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + block, f"{page} block {number}", "exec"), namespace)


def test_the_recorded_output_is_real(capsys: pytest.CaptureFixture[str]) -> None:
    """The table in the README is what its first block prints."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    shown = re.search(r"^```text\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert shown is not None
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert capsys.readouterr().out == shown.group(1)


def test_commands_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the compiler, which `make test` runs by the same command before the tests."""
    monkeypatch.setattr(_native, "build", lambda sanitize: Path("kernel.so"))
    commands = re.findall(r"^python -m varlen_attn (.*)$", README, flags=re.MULTILINE)
    assert commands
    for command in commands:
        assert main(shlex.split(command)) == 0
        assert capsys.readouterr().out


def test_every_backend_has_its_row() -> None:
    table = README.split("## What runs where")[1].split("##")[0]
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)))
    assert named == [b.name for b in BACKENDS]


@pytest.mark.parametrize("page", ["README.md", "docs/gpu.md"])
def test_links_and_make_targets_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
        assert ((ROOT / page).parent / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z-]+)", text):
        if target not in ("them",):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
