"""``python -m varlen_attn demo``: real text, and an encoder of torch's before and after `enable`.

The text is on every machine: the docstrings of Python's standard library. `facts` measures, `text` says it for people.
"""

from __future__ import annotations

import ast
import itertools
import re
import sysconfig
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.comparing import compare
from .bench import quiet
from .environment import headline, machine

BATCH_SIZE = 32
MAX_TOKENS = 512
VOCABULARY = 8192
DOCSTRINGS = 2048
DIM, HEADS, LAYERS = 256, 4, 4


def docstrings(limit: int = DOCSTRINGS) -> list[str]:
    """The first docstrings of the standard library's modules, classes and functions, by file name and then line."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return list(itertools.islice((text for path in paths for text in docstrings_in(path)), limit))


def docstrings_in(path: Path) -> list[str]:
    """Those of one file, by line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in strings are no business of ours
        tree = ast.parse(path.read_bytes())
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [doc for node in nodes if (doc := ast.get_docstring(node))]


def tokenise(document: str) -> list[int]:
    """Words and punctuation, each to an id from 1 on by a stable hash; at most `MAX_TOKENS`."""
    words = re.findall(r"\w+|[^\w\s]", document.lower())[:MAX_TOKENS]
    return [1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in words]


def batches(documents: Sequence[str]) -> list[Tensor]:
    """``(B, S)`` ids in natural order, 0 is padding."""
    rows = [torch.tensor(ids) for ids in map(tokenise, documents) if ids]
    groups = [rows[i : i + BATCH_SIZE] for i in range(0, len(rows), BATCH_SIZE)]
    return [nn.utils.rnn.pad_sequence(group, batch_first=True) for group in groups]


def facts() -> dict[str, Any]:
    """Everything the demo says, as plain values."""
    torch.manual_seed(0)
    ids = batches(docstrings())
    middle = ids[len(ids) // 2]
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, activation="gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, LAYERS)
    batch = {"src": nn.Embedding(VOCABULARY, DIM)(middle).detach(), "src_key_padding_mask": middle == 0}
    with quiet():
        found = {"evaluation": compare(encoder, batch), "training": compare(encoder, batch, train=True)}
    log = found["training"].log
    plan = log.calls[0].plan
    assert plan is not None
    return {
        "environment": machine(),
        "documents": sum(map(len, ids)),
        "batches": len(ids),
        "padding": 1 - sum(int(b.count_nonzero()) for b in ids) / sum(b.numel() for b in ids),
        "batch": list(middle.shape),
        "record": str(log),
        "plan": plan.as_dict(),
        "explanation": str(plan),
        **{name: comparison.as_dict() | {"text": str(comparison)} for name, comparison in found.items()},
    }


def text(found: dict[str, Any]) -> str:
    """`facts`, for people."""
    rows, columns = found["batch"]
    parts = [
        headline(found["environment"]),
        f"The text: {found['documents']} docstrings of Python's standard library, {found['batches']} batches of {BATCH_SIZE} in natural "
        f"order, {found['padding']:.0%} of them padding.\nThe model: nn.TransformerEncoder, {LAYERS} layers of width {DIM} with {HEADS} "
        f"heads, as it came and after `enable(encoder)`, on a batch of {rows} x {columns}.",
        f"In evaluation: {found['evaluation']['text']}",
        f"In training: {found['training']['text']}",
        f"What ran in training:\n{indent(found['record'], '  ')}",
        f"Why:\n{indent(found['explanation'], '  ')}",
        _NEXT,
    ]
    return "\n\n".join(parts)


_NEXT = """\
What to type next:

  python -m varlen_attn info                                    what this machine has
  python -m varlen_attn explain --device cuda --capability 9.0 --dtype bfloat16 --causal
                                                                what would run on a GPU, asked from here
  python -m varlen_attn build-native                            a faster kernel for CPUs, compiled here in 20 seconds
  python -m varlen_attn compare DIR --texts FILE                all this for a model of yours
and in your own program:

  from varlen_attn import compare, enable
  print(compare(model, batch))                                  # is it equal, and what is gained?
  print(enable(model))                                          # what was converted, and why the rest was not"""
