"""``python -m varlen_attn demo``: real text, an encoder of torch's before and after `enable`, and one attention layer beside it.

The text is on every machine: the docstrings of Python's standard library. `facts` measures, `text` says it for people.
"""

from __future__ import annotations

import ast
import copy
import itertools
import re
import sysconfig
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.dispatch import choose
from ..attention.records import record
from ..convert.enabling import enable
from ..nn.multihead import VarlenMultiheadAttention
from .compare import Contestant, Example, attention, contest, differences, quiet
from .environment import headline, machine, table
from .timing import unsure

BATCH_SIZE = 32
MAX_TOKENS = 512
VOCABULARY = 8192
DOCSTRINGS = 2048
DIM, HEADS, LAYERS = 256, 4, 4
TIMED_BATCHES = 2
ROUNDS = 9
SECONDS = {"encoder": 8.0, "attention": 3.0}  # of timing, for each direction: then no round after the fifth


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


def _pairs() -> dict[str, tuple[str, Contestant, Contestant]]:
    """By name: what the two are, torch's module, and the same weights in ours."""
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, dropout=0.0, activation="gelu", batch_first=True)
    encoder = Contestant(nn.TransformerEncoder(layer, LAYERS), lambda module, x, mask: module(x, src_key_padding_mask=mask))
    enabled = copy.deepcopy(encoder.module)
    enable(enabled)
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    ours = VarlenMultiheadAttention(DIM, HEADS, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    says = f"nn.TransformerEncoder, {LAYERS} layers of width {DIM} with {HEADS} heads, and a copy of it after `enable(encoder)`"
    says_alone = f"nn.MultiheadAttention({DIM}, {HEADS}), and VarlenMultiheadAttention({DIM}, {HEADS}) with its weights"
    return {
        "encoder": (says, encoder, replace(encoder, module=enabled)),
        "attention": (says_alone, Contestant(theirs, attention), Contestant(ours, attention)),
    }


def facts() -> dict[str, Any]:
    """Everything the demo says, as plain values."""
    torch.manual_seed(0)
    ids = batches(docstrings())
    sizes = [
        {"rows": len(b), "columns": b.shape[1], "tokens": int(b.count_nonzero()), "padding": float((b == 0).float().mean())} for b in ids
    ]
    padding = [s["padding"] for s in sizes]
    chosen = [(2 * i + 1) * len(ids) // (2 * TIMED_BATCHES) for i in range(TIMED_BATCHES)]
    embedding = nn.Embedding(VOCABULARY, DIM)
    examples = [Example.of(embedding(ids[i]), ids[i] == 0) for i in chosen]
    found: dict[str, Any] = {}
    for name, (says, theirs, ours) in _pairs().items():
        with quiet():
            with record() as log:
                differ = differences(theirs, ours, examples)
            found[name] = {"says": says, "differences": differ, "record": str(log), **_times(theirs, ours, examples, SECONDS[name])}
    ran = log.calls[0].plan
    assert ran is not None
    plan = replace(choose(ran.problem, all_reasons=True), route=ran.route, route_reason=ran.route_reason)
    return {
        "environment": machine(),
        "documents": sum(map(len, ids)),
        "batches": len(ids),
        "padding": 1 - sum(s["tokens"] for s in sizes) / sum(b.numel() for b in ids),
        "padding_range": [min(padding), max(padding)],
        "timed": [sizes[i] for i in chosen],
        **found,
        "plan": plan.as_dict(),
        "explanation": str(plan),
    }


def _times(theirs: Contestant, ours: Contestant, examples: Sequence[Example], seconds: float) -> dict[str, Any]:
    """Milliseconds for a batch, medians of rounds in turns. torch's fast path exists in evaluation only."""
    both = {"torch": theirs, "ours": ours}
    contests = {"forward": both | {"torch, fast path off": replace(theirs, fast_path=False)}, "forward and backward": both}
    rows = {what: contest(c, examples, what != "forward", rounds=ROUNDS, budget=seconds, fewest=3) for what, c in contests.items()}
    return {"milliseconds": {what: r["milliseconds"] for what, r in rows.items()}, "foreign": max(r["foreign"] for r in rows.values())}


def text(found: dict[str, Any]) -> str:
    """`facts`, for people."""
    low, high = found["padding_range"]
    sizes = ["  {rows} x {columns:3} positions, {tokens:5} tokens, {padding:.0%} padding".format(**b) for b in found["timed"]]
    parts = [
        headline(found["environment"]),
        f"The text: {found['documents']} docstrings of Python's standard library, {found['batches']} batches of {BATCH_SIZE} "
        f"in natural order.\n{found['padding']:.0%} of these batches is padding (from {low:.0%} to {high:.0%}). The batches compared:",
        "\n".join(sizes),
        _comparison("A whole encoder", found["encoder"]),
        _comparison("One attention layer alone", found["attention"]),
        "What ran in that layer:",
        indent(found["attention"]["record"], "  "),
        "Why:",
        indent(found["explanation"], "  "),
        _NEXT,
    ]
    return "\n\n".join(parts)


def _comparison(title: str, found: dict[str, Any]) -> str:
    times, values = [("", "torch", "ours", "times faster")], [("", "difference", "largest value")]
    for label, what, name in _TIMED:
        theirs, ours = found["milliseconds"][what][name], found["milliseconds"][what]["ours"]
        times.append((label, f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.1f}"))
    for name, row in found["differences"].items():
        values.append((name, f"{row['difference']:.1e}", f"{row['largest']:.3g}"))
    busy = unsure(found["foreign"])
    return (
        f"{title}: {found['says']}.\nMilliseconds for a batch, median of rounds in turns:\n\n{table(times, '<>>>', '  ')}\n\n"
        f"The largest difference on real tokens, forward and backward:\n\n{table(values, '<>>', '  ')}" + (busy and f"\n\n{busy}")
    )


_TIMED = (
    ("forward, as torch comes (its fast path on)", "forward", "torch"),
    ("forward, torch's fast path off", "forward", "torch, fast path off"),
    ("forward and backward, in training", "forward and backward", "torch"),
)

_NEXT = """\
What to type next:

  python -m varlen_attn info                                    what this machine has
  python -m varlen_attn explain --device cuda --capability 9.0 --dtype bfloat16 --causal
                                                                what would run on a GPU, asked from here
and in your own model:

  from varlen_attn import enable
  print(enable(model))                                          # what was converted, and why the rest was not"""
