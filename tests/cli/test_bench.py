"""``python -m varlen_attn bench``, on small batches and with no time to lose: what is measured, compared and said, never how fast."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from varlen_attn import BACKENDS
from varlen_attn.cli import bench
from varlen_attn.cli.main import main

SMALL = bench.Setting("cpu", torch.float32, width=32, heads=2, rounds=1, budget=0.0)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line with batches that take no time."""
    monkeypatch.setattr(bench, "Setting", lambda device, dtype, **limits: replace(SMALL, device=device, dtype=dtype))
    monkeypatch.setattr(bench, "some_batches", lambda quick=False: [bench.Batch("two", (9, 4), 9), bench.Batch("full", (5, 5), 5)][quick:])


def test_every_backend_is_there_or_has_its_reason() -> None:
    for row in bench.rows([bench.Batch("two", (16, 5), 16)], SMALL):
        named = {*row["milliseconds"], *row["absent"]}
        assert {f"ours, {b.name}" for b in BACKENDS} <= named
        assert "ours, cpu" in row["milliseconds"]
        assert all(row["absent"].values())
        assert row["kernel"]["ours, cpu"] == "varlen_attn::cpu_forward: aten::_scaled_dot_product_flash_attention_for_cpu"
        assert row["kernel"][bench.BASE] == "aten::_scaled_dot_product_flash_attention_for_cpu"


def test_the_fast_path_is_as_it_was() -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    forward, both = bench.rows([bench.Batch("full", (6, 6), 6)], SMALL)
    assert torch.backends.mha.get_fastpath_enabled() is before
    assert bench.FAST in forward["milliseconds"]
    assert bench.FAST not in both["milliseconds"]  # there is none in training
    assert bench.UNMASKED in forward["milliseconds"]
    assert bench.UNMASKED in both["milliseconds"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_contestant_is_never_timed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = bench._ours
    monkeypatch.setattr(bench, "_ours", lambda *given: wrong(*given) * 1.05)
    monkeypatch.setattr(bench, "contest", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(AssertionError, match=r"ours, \w+, output: error"):
        list(bench.rows([bench.Batch("two", (16, 5), 16)], replace(SMALL, dtype=dtype), ["forward"]))


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench._ours
    monkeypatch.setattr(bench, "_ours", lambda layer, x, mask: right(layer, x * 0.99 + x.detach() * 0.01, mask))
    with pytest.raises(AssertionError, match=r"ours, \w+, gradient of x: error"):
        list(bench.rows([bench.Batch("two", (16, 5), 16)], SMALL, ["forward+backward"]))


def test_what_breaks_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("no such\nkernel")

    assert bench._failure(broken) == "RuntimeError: no such kernel"


def test_batches_are_what_they_say() -> None:
    for batch in (*bench.some_batches(), *bench.some_batches(quick=True), bench.batch_of_fill(0.4), bench.batch_of_fill(1.0)):
        assert max(batch.lengths) == batch.padded_len
        assert f"{1 - batch.fill:.0%} padding" in str(batch)
    assert bench.batch_of_fill(0.4).fill == pytest.approx(0.4, abs=0.05)
    assert bench.batch_of_fill(1.0).fill == 1


@pytest.mark.usefixtures("tiny")
def test_the_command_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert "two: B 2, S 9, 28% padding; forward+backward" in text
    assert "full: B 2, S 5, 0% padding; forward\n" in text
    assert "Not here:\n" in text
    assert "ours, reference: the specification, which is not meant to be fast" in text


@pytest.mark.usefixtures("tiny")
def test_json_to_the_screen_or_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--lengths", "7,3", "--dtype", "bfloat16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][0]["batch"] == "yours: B 2, S 7, 29% padding"
    assert "bfloat16" in found["layer"]
    path = tmp_path / "found.json"
    assert main(["bench", "--quick", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["layer"] in printed
    assert all(bench._table(row) in printed for row in found["rows"])


@pytest.mark.usefixtures("tiny")
def test_a_fill_of_ones_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "batch_of_fill", lambda fill: bench.Batch(f"fill {fill:g}", (4, 2), 4))
    assert main(["bench", "--fill", "0.75"]) == 0
    assert "fill 0.75: B 2, S 4, 25% padding" in capsys.readouterr().out


def test_slow_and_busy_are_said() -> None:
    row = {
        "batch": "b", "direction": "forward", "milliseconds": {bench.BASE: 1.0, "slow": 9.0}, "spread": {bench.BASE: 0.0, "slow": 0.0},
        "ratio": {"slow": 0.11}, "once": ["slow"], "foreign": 0.5, "kernel": {}, "absent": {},
    }  # fmt: skip
    assert "once    0.11" in bench._table(row)
    assert "timed once" in bench._remarks([row])
    assert "took up to 50% of the machine" in bench._remarks([row])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--lengths 3,x", "must be an integer of at least 1, but is 'x'"),
        ("--fill 1.5", "must be a number above 0 and at most 1, but is '1.5'"),
        ("--fill half", "must be a number above 0 and at most 1, but is 'half'"),
        ("--fill 0.5 --lengths 3", "not allowed with argument"),
        ("--threads 0", "must be an integer of at least 1, but is '0'"),
        pytest.param(
            "--device cuda",
            "--device must be one that is here, but torch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_a_bad_value_exits_with_2(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", *options.split()])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
