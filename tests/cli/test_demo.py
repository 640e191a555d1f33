"""The demo, on few and small batches."""

from __future__ import annotations

import json

import pytest
import torch

from varlen_attn.cli import demo
from varlen_attn.cli.main import main
from varlen_attn.convert import comparing


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DIM", 16)
    monkeypatch.setattr(demo, "HEADS", 2)
    monkeypatch.setattr(demo, "MAX_TOKENS", 48)
    monkeypatch.setattr(comparing, "SECONDS", 0.0)
    documents = demo.docstrings(96)
    monkeypatch.setattr(demo, "docstrings", lambda: documents)


def test_the_text_is_the_same_every_time() -> None:
    documents = demo.docstrings(64)
    assert documents == demo.docstrings(64)
    assert len(documents) == 64


def test_tokens_are_stable_and_truncated() -> None:
    assert demo.tokenise("Return True.") == demo.tokenise("return true .")
    assert len(demo.tokenise("word " * 1000)) == demo.MAX_TOKENS
    assert min(demo.tokenise(" ".join(map(str, range(500))))) > 0
    assert demo.tokenise("return") == [7211]  # crc32, not Python's hash, which changes with every process


def test_batches_are_padded_with_zeros() -> None:
    (batch,) = demo.batches(["one two three", "", "one"])
    assert batch.shape == (2, 3)
    assert batch[1, 1:].tolist() == [0, 0]


@pytest.mark.usefixtures("small")
def test_it_gives_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    assert main(["demo", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for mode in ("evaluation", "training"):
        assert found[mode]["equal"]
        assert found[mode]["padding"] > 0.2
    assert "the loss" in {row["name"] for row in found["training"]["results"]}
    assert found["plan"]["backend"] == "cpu"
    assert torch.backends.mha.get_fastpath_enabled() is fast_path


@pytest.mark.usefixtures("small")
def test_it_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    text = capsys.readouterr().out
    assert text.index("In evaluation: ") < text.index("In training: ")
    assert "cpu runs this" in text
    assert "What to type next" in text
    assert max(map(len, text.split("In evaluation")[0].splitlines())) <= 140
