"""What a type checker makes of calls: results by overload, and a keyword that is misspelt is found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CALLS = """
import torch
from varlen_attn import SeqLayout, compare, explain, padded_attention, varlen_attention, varlen_mha

x, layout = torch.zeros(3, 2, 8), SeqLayout.from_lengths([3])
reveal_type(varlen_attention(x, x, x, layout, causal=True))  # Tensor
reveal_type(varlen_attention(x, x, x, layout, return_lse=False))  # Tensor
reveal_type(varlen_attention(x, x, x, layout, window=(1, None), return_lse=True))  # tuple[Tensor, Tensor]
reveal_type(padded_attention(x, x, x, query_padding_mask=False, softcap=3.0))  # Tensor
reveal_type(padded_attention(x, x, x, None, return_lse=True))  # tuple[Tensor, Tensor]
reveal_type(varlen_mha(x, num_heads=2))  # Tensor
reveal_type(explain(x, x, x, layout, causal="top_left", return_lse=True))  # Plan
reveal_type(compare(torch.nn.Linear(2, 2), x).verdict)  # str
varlen_attention(x, x, x, layout, cusal=True)  # error
padded_attention(x, x, x, cusal=True)  # error
explain(x, x, x, layout, cusal=True)  # error
padded_attention(x, x, x, causal="left")  # error
varlen_attention(x, x, x, layout, window=3)  # error
"""


def test_mypy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = pytest.importorskip("mypy.api")
    file = tmp_path / "calls.py"
    file.write_text(CALLS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    out, problems, _ = api.run([str(file), "--strict", "--config-file", "", "--cache-dir", str(ROOT / ".mypy_cache" / "calls")])
    assert not problems, problems
    found = dict(re.findall(r"calls\.py:(\d+): (?:note: Revealed type is \"(.*)\"|error: .*)", out))
    for number, line in enumerate(CALLS.splitlines(), start=1):
        if "  # " not in line:
            assert str(number) not in found, out
            continue
        expected = line.split("  # ")[1]
        got = re.sub(r"\b(?:torch|varlen_attn|builtins|typing)\.(?:\w+\.)*", "", found[str(number)])
        assert got.replace("_tensor.", "") == ("" if expected == "error" else expected), (line, got)
