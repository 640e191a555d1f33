"""Small faults put into the library, one at a time, and whether the tests see them: ``make mutants``.

A mutant is another operator, condition or number in one place. Places are drawn at random, with a seed, from each part of the library
as many as its share of all places. The tests of that part run until one fails; they must pass without a mutant. With ``--all``, what they
do not see meets the other tests too.

    python -m tests.mutants --number 60 --seed 0 --out FILE
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HOME = ROOT / "varlen_attn"
SECONDS = 300  # of the tests of one mutant; the tests themselves take less, so that what takes longer does not end
OTHER_TESTS = ("tests/kernels/test_conformance.py", "tests/nn", "tests/convert", "tests/integrations/transformers", "tests/attention")
TESTS = {
    "layout": ("tests/layout", "tests/test_bad_inputs.py", "tests/kernels/test_conformance.py", "tests/nn/test_transformer_stack.py"),
    "kernels": ("tests/kernels", "tests/attention/test_functional.py"),
    "attention": ("tests/attention", "tests/test_bad_inputs.py", "tests/nn/test_multihead.py"),
    "nn": ("tests/nn", "tests/convert/test_convert.py", "tests/test_bad_inputs.py"),
    "convert": ("tests/convert", "tests/test_switch.py"),
    "integrations": ("tests/integrations/transformers",),
    "data": ("tests/data",),
}

SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One place. ``start`` and ``end`` are bytes of the file."""

    path: str
    line: int
    start: int
    end: int
    old: str
    new: str

    @property
    def part(self) -> str:
        return Path(self.path).parts[1]

    def source(self) -> bytes:
        given = (ROOT / self.path).read_bytes()
        return given[: self.start] + self.new.encode() + given[self.end :]


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """What can stand in place of an expression. Messages, annotations and texts are not looked at."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield ast.Compare(node.left, [SWAPS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(SWAPS[type(node.op)](), node.values)
        yield ast.BoolOp(node.op, node.values[1:]) if len(node.values) > 2 else node.values[1]
    elif isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        yield ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield ast.Constant(node.value + 1)


def expressions(node: ast.AST) -> Iterator[ast.AST]:
    """All that runs: without messages of exceptions, annotations, defaults of documentation and what only a type checker reads."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "type_params") or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert):
                yield child
                yield from expressions(child)


def mutants(path: Path) -> Iterator[Mutant]:
    text = path.read_text()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    for node in expressions(ast.parse(text)):
        for other in changed(node):
            start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
            new = ast.unparse(ast.fix_missing_locations(other))
            new = f"({new})" if not isinstance(other, ast.Constant) else new
            yield Mutant(str(path.relative_to(ROOT)), node.lineno, start, end, text.encode()[start:end].decode(), new)  # type: ignore[attr-defined]


def drawn(number: int, seed: int) -> list[Mutant]:
    """From each part its share. Adapters of CUDA kernels are among them: they are tested on fakes."""
    found = {part: [m for path in sorted((HOME / part).rglob("*.py")) for m in mutants(path)] for part in TESTS}
    total = sum(map(len, found.values()))
    draw = random.Random(seed)
    return [m for part in TESTS for m in draw.sample(found[part], max(1, round(number * len(found[part]) / total)))]


class Mutated(SourceFileLoader):
    """Loads one module from other source."""

    def __init__(self, name: str, path: str, source: bytes):
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec", dont_inherit=True)


class Finder:
    def __init__(self, mutant: Mutant):
        path = Path(mutant.path)
        parts = path.with_suffix("").parts
        self.name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        self.path, self.source = ROOT / path, mutant.source()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        inside = [str(self.path.parent)] if self.path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(
            name, self.path, loader=Mutated(name, str(self.path), self.source), submodule_search_locations=inside
        )


def tested(mutant: Mutant | None, tests: tuple[str, ...], seconds: float) -> str:
    """``"seen"``, ``"not seen"`` or ``"no end"``, in a child that has torch and transformers already."""
    child = os.fork()
    if child == 0:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nowhere, stream)
        status = 3
        try:
            import pytest

            if mutant is not None:
                sys.meta_path.insert(0, Finder(mutant))  # type: ignore[arg-type]
            status = int(
                pytest.main(
                    [
                        "-q",
                        "-x",
                        "-W",
                        "ignore::pytest.PytestAssertRewriteWarning",
                        "-p",
                        "no:cacheprovider",
                        "-n",
                        "0",
                        "-m",
                        "not alone and not real and not native",
                        *tests,
                    ]
                )
            )
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "not seen" if status == 0 else "seen"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "no end"


def interval(seen: int, number: int) -> tuple[float, float]:
    """Wilson's, of 95 %."""
    z, share = 1.96, seen / number
    middle, half = share + z * z / 2 / number, z * math.sqrt(share * (1 - share) / number + z * z / 4 / number**2)
    return (middle - half) / (1 + z * z / number), (middle + half) / (1 + z * z / number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", default="0/1", help="the part of the mutants that this process runs: 0/2 and 1/2 for two processes")
    parser.add_argument("--all", action="store_true", help="what the tests of its part do not see meets the other tests too")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VARLEN_ATTN_NATIVE": "0"}
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    first, step = map(int, given.share.split("/"))
    rows: list[dict[str, Any]] = []
    chosen = drawn(given.number, given.seed)[first::step]
    for part in dict.fromkeys(m.part for m in chosen):
        if (outcome := tested(None, TESTS[part], 4 * SECONDS)) != "not seen":
            sys.exit(f"the tests of {part} do not pass without a mutant: {outcome}")
    for mutant in chosen:
        began = time.monotonic()
        outcome = tested(mutant, TESTS[mutant.part], SECONDS)
        if outcome == "not seen" and given.all:
            outcome = tested(mutant, tuple(x for x in OTHER_TESTS if x not in TESTS[mutant.part]), 4 * SECONDS)
        rows.append(asdict(mutant) | {"outcome": outcome, "seconds": round(time.monotonic() - began, 1)})
        print(f"{outcome:9} {rows[-1]['seconds']:6} {mutant.path}:{mutant.line}  {mutant.old}  ->  {mutant.new}", flush=True)
        seen = sum(row["outcome"] != "not seen" for row in rows)
        low, high = interval(seen, len(rows))
        score = {"seen": seen, "of": len(rows), "share": seen / len(rows), "interval": [low, high]}
        given.out.write_text(json.dumps({"number": given.number, "seed": given.seed, **score, "mutants": rows}, indent=1) + "\n")
    print(f"{seen} of {len(rows)} seen: {seen / len(rows):.0%} ({low:.0%} to {high:.0%})")


if __name__ == "__main__":
    main()
