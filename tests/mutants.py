"""Small faults put into the library, one at a time, and whether the tests see them: ``make mutants``.

A mutant is another operator, condition or number in one place. Places are drawn at random, with a seed, from each part of the library
as many as its share of all places. Tests that run the line of a mutant run until one fails: a few at first, then half a minute's worth of
them, and with ``--all`` all others. Which tests run which lines was measured before, in a run of the suite in which all of them passed:

    python -m tests.mutants --map FOLDER
    python -m tests.mutants --number 300 --seed 0 --covered FOLDER --out FILE
    python -m tests.mutants --number 300 --seed 0 --covered FOLDER --out FILE --all
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.machinery import SourceFileLoader
from itertools import zip_longest
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from coverage import CoverageData

ROOT = Path(__file__).parents[1]
HOME = ROOT / "varlen_attn"
PARTS = ("layout", "kernels", "attention", "nn", "convert", "integrations", "data", "parallel")
FEW, MANY = 8.0, 30.0  # seconds of tests, as they took with few examples
PATIENCE = 600.0  # seconds; then the tests of a mutant are said not to end
# Files of tests whose programs run in processes of their own, train, or compile: no mutant is in those processes.
WITHOUT = (
    "test_compile.py", "test_examples.py", "test_benchmarks.py", "test_house.py", "test_docs.py", "test_release.py", "test_installed.py",
    "test_embed_corpus.py", "test_embed_ray.py", "test_wrappers.py", "test_soak.py", "test_hostile.py", "test_gpu_acceptance.py",
    "attention/test_export.py", "kernels/cuda/test_flex.py", "parallel", "lane", "peers",
)  # fmt: skip
LANES = {"native": ("native or native_too", ["--native"]), "others": ("not real and not alone and not native", [])}

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
    found = {part: [m for path in sorted((HOME / part).rglob("*.py")) for m in mutants(path)] for part in PARTS}
    total = sum(map(len, found.values()))
    draw = random.Random(seed)
    return [m for part in PARTS for m in draw.sample(found[part], max(1, round(number * len(found[part]) / total)))]


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


def measure(folder: Path) -> None:
    """Runs the suite, and leaves which tests run which lines (coverage) and how long they take (JUnit's XML) in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for lane, (marks, options) in LANES.items():
        (folder / "rc").write_text("[run]\nsource = varlen_attn\nbranch = false\n")
        ignored = [f"--ignore=tests/{path}" for path in WITHOUT]
        report = ["--cov", f"--cov-config={folder / 'rc'}", "--cov-context=test", "--cov-report=", f"--junitxml={folder / lane}.xml"]
        workers = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", "-q", "tests", "-m", marks, *options, *ignored, *report, *workers]
        given = {"COVERAGE_FILE": f"{folder / lane}.cov", "HYPOTHESIS_PROFILE": "fast", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=os.environ | given, check=False)


@dataclass(frozen=True)
class Test:
    """One test that passed. ``seconds`` is with few examples."""

    name: str
    lane: str
    seconds: float

    @property
    def file(self) -> str:
        return self.name.split("::")[0]


class Covered:
    """Which tests run a line."""

    def __init__(self, folder: Path) -> None:
        self.data, self.tests = {}, {}
        for lane in LANES:
            self.data[lane] = CoverageData(f"{folder / lane}.cov")
            self.data[lane].read()
            found = {}
            for case in ElementTree.parse(folder / f"{lane}.xml").iter("testcase"):
                if not len(case.findall("failure")) + len(case.findall("error")) + len(case.findall("skipped")):
                    name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
                    found[name] = Test(name, lane, float(case.get("time", 0)))
            self.tests[lane] = found

    def of(self, mutant: Mutant) -> dict[Test, frozenset[int]]:
        """Tests of its line, or of any line of the file where only an import runs it; and which lines of the file they run."""
        lines: dict[Test, set[int]] = {}
        for lane, data in self.data.items():
            (path,) = [x for x in data.measured_files() if x.endswith(mutant.path)] or [""]
            for line, names in (data.contexts_by_lineno(path) if path else {}).items():
                for name in {name.split("|")[0] for name in names} & self.tests[lane].keys():
                    lines.setdefault(self.tests[lane][name], set()).add(line)
        found = {test: frozenset(run) for test, run in lines.items()}
        return {test: run for test, run in found.items() if mutant.line in run} or found


def few_and_many(tests: dict[Test, frozenset[int]], draw: random.Random) -> list[list[Test]]:
    """At first tests of a few files, those with fewest tests of this line; then half a minute's worth of tests that run other lines of the
    file each, those first that run what few others do."""
    order = draw.sample(sorted(tests, key=lambda test: test.name), len(tests))
    chosen: list[list[Test]] = []
    for limit, group in ((FEW, lambda test: test.file), (MANY, tests.get)):
        groups: dict[Any, list[Test]] = {}
        for test in order:
            groups.setdefault(group(test), []).append(test)
        candidates = sorted(groups.values(), key=len)[: 5 if limit == FEW else None]
        taken: list[Test] = []
        for test in itertools.chain.from_iterable(zip_longest(*candidates)):
            fits = test is not None and sum(t.seconds for t in taken) + test.seconds <= limit
            if fits and not any(test in stage for stage in chosen):
                taken.append(test)
        chosen.append(taken)
    return chosen


class Only:
    """Of what pytest collects, some tests; and the name of the first that fails."""

    def __init__(self, tests: list[Test], pipe: int) -> None:
        self.names, self.pipe = {test.name for test in tests}, pipe

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid in self.names]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            os.write(self.pipe, f"{report.nodeid}\n".encode())


def tested(mutant: Mutant | None, tests: list[Test], lane: str) -> str:
    """The test that fails; ``"import"`` if the library does not load; ``"no end"``; or nothing. In a child that has torch already."""
    read, write = os.pipe()
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
            if lane == "native":
                del os.environ["VARLEN_ATTN_NATIVE"]
            marks, options = LANES[lane]
            files = list(dict.fromkeys(test.file for test in tests))
            plain = ["-q", "-x", "-W", "ignore::pytest.PytestAssertRewriteWarning", "-p", "no:cacheprovider", "-n", "0", "-m", marks]
            status = int(pytest.main([*plain, *options, *files], plugins=[Only(tests, write)]))
        finally:
            os._exit(status)
    os.close(write)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            names = os.read(read, 10_000).decode().splitlines()
            os.close(read)
            code = os.waitstatus_to_exitcode(status)
            if code == 5:
                raise RuntimeError("no test was found")
            return "" if code == 0 else names[0] if names else "import" if code > 0 else f"signal {-code}"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(read)
    return "no end"


def seen_by(mutant: Mutant | None, tests: list[Test]) -> str:
    for lane in ("others", "native"):
        if (of_lane := [test for test in tests if test.lane == lane]) and (name := tested(mutant, of_lane, lane)):
            return name
    return ""


def interval(seen: int, number: int) -> tuple[float, float]:
    """Wilson's, of 95 %."""
    z, share = 1.96, seen / number
    middle, half = share + z * z / 2 / number, z * math.sqrt(share * (1 - share) / number + z * z / 4 / number**2)
    return (middle - half) / (1 + z * z / number), (middle + half) / (1 + z * z / number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map", type=Path, help="measure which tests run which lines, and nothing else")
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", default="0/1", help="the part of the mutants that this process runs: 0/2 and 1/2 for two processes")
    parser.add_argument("--covered", type=Path, help="the folder that was given as --map")
    parser.add_argument("--all", action="store_true", help="run all tests of their lines for mutants in --out that were not seen")
    parser.add_argument("--out", type=Path, help="mutants that are in this file already are not run again")
    given = parser.parse_args()
    if given.map:
        measure(given.map)
        return
    os.environ |= {"HYPOTHESIS_PROFILE": "gpu" if given.all else "mutants"}  # few examples, always the same ones
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VARLEN_ATTN_NATIVE": "0"}
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    covered = Covered(given.covered)
    chosen = drawn(given.number, given.seed)
    places = {(mutant.path, mutant.start, mutant.new) for mutant in chosen}
    found: list[dict[str, Any]] = json.loads(given.out.read_text())["mutants"] if given.out.exists() else []
    rows = [row for row in found if (row["path"], row["start"], row["new"]) in places]  # of the code as it is
    random.Random(given.seed).shuffle(chosen)  # so that a run that is stopped is a sample too
    first, step = map(int, given.share.split("/"))
    known = {(row["path"], row["start"], row["new"]): row for row in rows}
    for mutant in chosen[first::step]:
        row = known.get((mutant.path, mutant.start, mutant.new))
        if given.all == (row is None) or (row and row["by"]):
            continue
        began = time.monotonic()
        tests = covered.of(mutant)
        stages = few_and_many(tests, random.Random(given.seed))
        if given.all:
            stages = [
                sorted(tests.keys() - {test for stage in stages for test in stage}, key=lambda test: f"/{mutant.part}/" not in test.file)
            ]
        by = ""
        for stage in stages:
            by = by or seen_by(mutant, stage)
        if row is None:
            rows.append(row := asdict(mutant) | {"tests": len(tests), "seconds": 0.0})
        row |= {"by": by, "seconds": round(row["seconds"] + time.monotonic() - began, 1)}
        print(f"{row['seconds']:6} {mutant.path}:{mutant.line}  {mutant.old}  ->  {mutant.new}   {by or 'NOT SEEN'}", flush=True)
        write(given.out, given.seed, rows)
    # What sees a mutant must pass without it: alone, and after the others.
    killers = {row["by"] for row in rows}
    tests = [test for lane in covered.tests.values() for test in lane.values() if test.name in killers]
    while failing := seen_by(None, tests):
        print(f"fails without a mutant: {failing}")
        rows = [row for row in rows if row["by"] != failing]
        tests = [test for test in tests if test.name != failing]
    write(given.out, given.seed, rows)


def write(out: Path, seed: int, rows: list[dict[str, Any]]) -> None:
    seen = sum(bool(row["by"]) for row in rows)
    low, high = interval(seen, len(rows))
    score = {"seed": seed, "seen": seen, "of": len(rows), "share": seen / len(rows), "interval": [low, high]}
    lines = ",\n".join(map(json.dumps, rows))
    out.write_text(f'{json.dumps(score)[:-1]}, "mutants": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
