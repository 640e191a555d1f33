"""The command line: exit status, text and JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from varlen_attn import BACKENDS, __version__
from varlen_attn.cli.main import main

H100 = "explain --device cuda --capability 9.0 --dtype bfloat16 --heads 16 --kv-heads 4 --head-dim 64 --causal --with flash-attn=2.8.3"


def test_info_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["varlen_attn"] == __version__
    assert [row["name"] for row in facts["backends"]] == [b.name for b in BACKENDS]
    assert all(f"\n{b.name} " in text for b in BACKENDS)


def test_explain_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*H100.split(), "--all"]) == 0
    text = capsys.readouterr().out
    assert main(H100.split()) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) == 2
    assert short.splitlines()[0] == text.splitlines()[0]
    assert all(b.name in short for b in BACKENDS)
    assert "2 CPU backends (cpu_native, cpu): the tensors are on cuda" in short
    assert main([*H100.split(), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["device"] == "cuda"
    assert plan["capability"] == [9, 0]
    assert plan["dtype"] == "bfloat16"
    assert plan["packages"] == {"flash-attn": "2.8.3"}
    assert [d["backend"] for d in plan["decisions"]] == [b.name for b in BACKENDS]
    assert all(r["reason"] and r["fix"] for d in plan["decisions"] for r in d["reasons"])
    assert text.startswith(f"{plan['backend']} runs this")
    assert "16/4 heads of 64" in text
    assert "stated: flash-attn 2.8.3" in text


@pytest.mark.parametrize(
    "options",
    [
        "--window 16 none --softcap 30 --alibi --backward",
        "--causal top_left --cross --sinks --lse",
        "--dropout 0.1 --deterministic --value-head-dim 32",
        "--compiled --batch-invariant",
        "--device cuda --rocm --torch-version 2.12.1 --capability 9",
        "--score-bias",
        "--with flash_attn==2.8.3.post2 --capability 8.0 --torch-version 2.14.0.dev20260101+cu130",
    ],
)
def test_explain_takes_every_option(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *options.split()]) == 0
    assert "runs this" in capsys.readouterr().out


def test_a_refused_order_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    refused = ["explain", "--device", "cuda", "--backend", "cpu"]
    assert main(refused) == 1
    captured = capsys.readouterr()
    assert "backend 'cpu' was requested" in captured.err
    assert not captured.out
    assert main([*refused, "--json"]) == 1
    assert "backend 'cpu' was requested" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--device toaster", "--device must be a device of torch such as cpu or cuda, but is 'toaster'"),
        ("--capability nine", "must be a compute capability such as 9.0, but is 'nine'"),
        ("--dtype int8", "invalid choice: 'int8'"),
        ("--heads 0", "must be an integer of at least 1, but is '0'"),
        ("--heads 6 --kv-heads 4", "--heads must be a multiple of --kv-heads, but they are 6 and 4"),
        ("--window 3 x", "must be a number of tokens or 'none', but is 'x'"),
        ("--dropout 2", "`dropout_p` must be between 0 and 1, but is 2.0"),
        ("--softcap -1", "`softcap` must be above 0, but is -1.0"),
        ("--backend fastest", "`backend` must be 'auto' or one of"),
        ("--torch-version 1.0", "must be the version of a torch that this package runs on, 2.11 or newer, such as 2.13.0, but is '1.0'"),
        ("--torch-version 2.13.banana", "must be the version of a torch"),
        ("--torch-version 213", "must be the version of a torch"),
        ("--device cuda --capability 90", "must be a compute capability such as 9.0, but is '90'"),
        ("--capability 9.0.1", "must be a compute capability"),
        ("--device cpu --capability 9.0", "--capability and --rocm are of GPUs, but --device is cpu"),
        ("--with foo=1", "--with must name one of fa3-fwd, flash-attn, flash-attn-3, flash-attn-4, tokenspeed-fa3, but names 'foo'"),
        ("--with flash-attn=banana", "must be NAME=VERSION such as flash-attn=2.8.3, but is 'flash-attn=banana'"),
        ("--with flash-attn", "must be NAME=VERSION such as flash-attn=2.8.3, but is 'flash-attn'"),
    ],
)
def test_a_bad_value_exits_with_2(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["explain", *options.split()])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_no_command_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == 2
    assert "info | explain | demo | compare" in capsys.readouterr().err


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "varlen_attn", "explain", "--backend", "flash2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "backend 'flash2' was requested" in done.stderr
