"""``python -m varlen_attn demo``: real text, an encoder of torch's before and after `enable`, and one attention layer beside it.

The text is on every machine: the docstrings of Python's standard library. `facts` measures, `text` says it for people.
"""

from __future__ import annotations

import ast
import copy
import os
import re
import sysconfig
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .convert import enable
from .dispatch import choose
from .explain import environment
from .modules import VarlenMultiheadAttention
from .records import record

__all__ = ["batches", "docstrings", "docstrings_in", "facts", "text", "tokenise"]

BATCH_SIZE = 32
MAX_TOKENS = 512
VOCABULARY = 8192
DOCSTRINGS = 2048
DIM, HEADS, LAYERS = 256, 4, 4
TIMED_BATCHES = 2
ROUNDS = 9
SECONDS = {"encoder": 8.0, "attention": 3.0}  # of timing, for each direction: then no further round
BUSY = 0.75  # load of the last minute, for each thread, above which times are not to be trusted


def docstrings(limit: int = DOCSTRINGS) -> list[str]:
    """The first docstrings of the standard library's modules, classes and functions, by file name and then line."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found += docstrings_in(path)
        if len(found) >= limit:
            break
    return found[:limit]


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


@dataclass(frozen=True)
class Example:
    """One batch, embedded: ``x (B, S, D)``, the padding mask ``(B, S)``, and a gradient of the output that is 0 at padding."""

    x: Tensor
    mask: Tensor
    grad: Tensor

    @classmethod
    def of(cls, ids: Tensor, embedding: nn.Embedding) -> Example:
        with torch.no_grad():
            x = embedding(ids)
        return cls(x, ids == 0, torch.randn_like(x) * (ids != 0)[..., None])


@dataclass(frozen=True)
class Pair:
    """torch's module and the same weights in ours.

    Attributes:
        name: "encoder" or "attention".
        says: what the two are.
        call: ``(module, x, mask) -> (B, S, D)``.
    """

    name: str
    says: str
    theirs: nn.Module
    ours: nn.Module
    call: Callable[[nn.Module, Tensor, Tensor], Tensor]

    def both(self, module: nn.Module, example: Example) -> tuple[Tensor, ...]:
        """The output, and the gradients of the input and of every weight."""
        x = example.x.detach().requires_grad_()
        out = self.call(module, x, example.mask)
        return (out.detach(), *torch.autograd.grad(out, (x, *module.parameters()), example.grad))


def _pairs() -> tuple[Pair, Pair]:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, dropout=0.0, activation="gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, LAYERS)
    enabled = copy.deepcopy(encoder)
    enable(enabled)
    attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    ours = VarlenMultiheadAttention(DIM, HEADS, batch_first=True)
    ours.load_state_dict(attention.state_dict())
    return (
        Pair(
            "encoder",
            f"nn.TransformerEncoder, {LAYERS} layers of width {DIM} with {HEADS} heads, and a copy of it after `enable(encoder)`",
            encoder,
            enabled,
            lambda module, x, mask: module(x, src_key_padding_mask=mask),
        ),
        Pair(
            "attention",
            f"nn.MultiheadAttention({DIM}, {HEADS}), and VarlenMultiheadAttention({DIM}, {HEADS}) with its weights",
            attention,
            ours,
            lambda module, x, mask: module(x, x, x, key_padding_mask=mask, need_weights=False)[0],
        ),
    )


@contextmanager
def _fast_path(enabled: bool) -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def facts() -> dict[str, Any]:
    """Everything the demo says, as plain values."""
    torch.manual_seed(0)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    ids = batches(docstrings())
    padding = [1 - float((b != 0).float().mean()) for b in ids]
    timed = [ids[(2 * i + 1) * len(ids) // (2 * TIMED_BATCHES)] for i in range(TIMED_BATCHES)]
    embedding = nn.Embedding(VOCABULARY, DIM)
    examples = [Example.of(b, embedding) for b in timed]
    found: dict[str, Any] = {}
    for pair in _pairs():
        with record() as log:
            differences = _differences(pair, examples)
        found[pair.name] = {"says": pair.says, "differences": differences, "milliseconds": _times(pair, examples), "record": str(log)}
    ran = log.calls[0].plan
    assert ran is not None
    plan = replace(choose(ran.problem, thorough=True), route=ran.route, route_reason=ran.route_reason)
    return {
        "environment": {name: value for name, value in environment().items() if name != "backends"},
        "documents": sum(b.shape[0] for b in ids),
        "batches": len(ids),
        "padding": 1 - sum(int((b != 0).sum()) for b in ids) / sum(b.numel() for b in ids),
        "padding_range": [min(padding), max(padding)],
        "timed": [{"rows": b.shape[0], "columns": b.shape[1], "tokens": int((b != 0).sum())} for b in timed],
        **found,
        "load_before": load,
        "plan": plan.as_dict(),
        "explanation": str(plan),
    }


def _differences(pair: Pair, examples: Sequence[Example]) -> dict[str, dict[str, float]]:
    """The largest difference over all batches, and the largest value beside it; of the weights, the worst."""
    found = {name: {"difference": 0.0, "largest": 0.0} for name in ("output", "gradient of the input", "gradients of the weights")}
    for example in examples:
        wants, gots = pair.both(pair.theirs, example), pair.both(pair.ours, example)
        for i, (want, got) in enumerate(zip(wants, gots, strict=True)):
            if i < 2:
                want, got = want[~example.mask], got[~example.mask]
            worst = found[list(found)[min(i, 2)]]
            worst["difference"] = max(worst["difference"], float((got - want).abs().max()))
            worst["largest"] = max(worst["largest"], float(want.abs().max()))
    return found


def _times(pair: Pair, examples: Sequence[Example]) -> dict[str, dict[str, float]]:
    """Milliseconds of a batch, medians of rounds in turns. torch's fast path exists in evaluation only."""

    def forward(module: nn.Module, fast_path: bool) -> None:
        module.eval()
        with _fast_path(fast_path), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's fast path says that nested tensors are a prototype
            for example in examples:
                pair.call(module, example.x, example.mask)

    def training(module: nn.Module) -> None:
        module.train()
        for example in examples:
            pair.both(module, example)

    contests = {
        "forward": {
            "torch": lambda: forward(pair.theirs, True),
            "torch, fast path off": lambda: forward(pair.theirs, False),
            "ours": lambda: forward(pair.ours, True),
        },
        "forward and backward": {"torch": lambda: training(pair.theirs), "ours": lambda: training(pair.ours)},
    }
    return {what: _interleave(calls, len(examples), SECONDS[pair.name]) for what, calls in contests.items()}


def _interleave(contestants: dict[str, Callable[[], None]], batch_count: int, seconds: float) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    began = time.perf_counter()
    for turn in range(ROUNDS + 1):  # the first warms up
        if turn > 3 and time.perf_counter() - began > seconds:
            break
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            if turn:
                taken[name].append((time.perf_counter() - start) / batch_count * 1e3)
    return {name: median(values) for name, values in taken.items()}


def text(found: dict[str, Any]) -> str:
    """`facts`, for people."""
    here, low_high = found["environment"], found["padding_range"]
    busy = _BUSY if found["load_before"] > BUSY * here["threads"] else ""
    parts = [
        f"varlen_attn {here['varlen_attn']} on torch {here['torch']}, {here['gpu'] or here['cpu']}, {here['threads']} threads",
        f"The text: {found['documents']} docstrings of Python's standard library, {found['batches']} batches of {BATCH_SIZE} "
        f"in natural order.\n"
        f"{found['padding']:.0%} of these batches is padding (from {low_high[0]:.0%} to {low_high[1]:.0%}). The batches compared:",
        "\n".join(
            f"  {b['rows']} x {b['columns']:3} positions, {b['tokens']:5} tokens, {1 - b['tokens'] / b['rows'] / b['columns']:.0%} padding"
            for b in found["timed"]
        ),
        _comparison("A whole encoder", found["encoder"]) + busy,
        _comparison("One attention layer alone", found["attention"]),
        "What ran in that layer:",
        _indent(found["attention"]["record"]),
        "Why:",
        _indent(found["explanation"]),
        _NEXT,
    ]
    return "\n\n".join(parts)


def _comparison(title: str, found: dict[str, Any]) -> str:
    parts = [
        f"{title}: {found['says']}.\nMilliseconds for a batch, median of rounds in turns:",
        _time_table(found["milliseconds"]),
        "The largest difference on real tokens, forward and backward:",
        _difference_table(found["differences"]),
    ]
    return "\n\n".join(parts)


def _difference_table(differences: dict[str, dict[str, float]]) -> str:
    width = max(map(len, differences))
    lines = [f"  {'':{width}}  difference  largest value"]
    lines += [f"  {name:{width}}  {row['difference']:10.1e}  {row['largest']:13.3g}" for name, row in differences.items()]
    return "\n".join(lines)


def _time_table(milliseconds: dict[str, dict[str, float]]) -> str:
    lines = [f"  {'':44} {'torch':>7} {'ours':>7}   times faster"]
    for what, row in milliseconds.items():
        for name, value in row.items():
            if name == "ours":
                continue
            note = {"forward": ", as torch comes (its fast path on)", "forward and backward": ", in training"}[what]
            label = what + (", torch's fast path off" if "off" in name else note)
            lines.append(f"  {label:44} {value:7.1f} {row['ours']:7.1f}   {value / row['ours']:.1f}")
    return "\n".join(lines)


def _indent(block: str) -> str:
    return "\n".join("  " + line for line in block.splitlines())


_BUSY = """

  Other processes were busy when this began, and they disturb threads that wait for each other: the times are unsure. Try again later."""

_NEXT = """\
What to type next:

  python -m varlen_attn info                                    what this machine has
  python -m varlen_attn explain --device cuda --capability 9.0 --dtype bfloat16 --causal
                                                                what would run on a GPU, asked from here
and in your own model:

  from varlen_attn import enable
  print(enable(model))                                          # what was converted, and why the rest was not"""
