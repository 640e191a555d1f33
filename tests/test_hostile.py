"""No layout kills the process, and none with wrong offsets gives a number: `tests/hostile.py` in processes of its own, and what is known.

``python -m tests.test_hostile NUMBER`` prints the figures of docs/reliability.md.
"""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from ast import literal_eval
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from varlen_attn import ArgumentError, LayoutError, SeqLayout, varlen_attention
from varlen_attn.kernels.cpu import build as _native

from .hostile import BACKENDS, FAR, USES

pytestmark = pytest.mark.native_too
ROOT = Path(__file__).parent.parent
HERE = [name for name in BACKENDS if name != "flex"]  # flex compiles for a GPU
CASES = (sys.executable, "-m", "tests.hostile")


class Found(NamedTuple):
    counts: Counter[str]  # by use and outcome
    wrong: list[str]
    signals: list[str]


def run_cases(first: int, last: int, program: tuple[str, ...] = CASES) -> Found:
    """In a child, and in another one after each that dies."""
    found = Found(Counter(), [], [])
    while first < last:
        child = subprocess.run([*program, str(first), str(last)], capture_output=True, text=True, cwd=ROOT, check=False)
        begun = re.findall(r"^begin (\d+)$", child.stdout, re.M)
        for line in re.findall(r"^end \d+ (.*)$", child.stdout, re.M):
            found.counts.update(literal_eval(line))
        found.wrong.extend(re.findall(r"^note .*WRONG.*$", child.stdout, re.M))
        if child.returncode == 0:
            break
        assert begun, child.stderr[-2000:]
        found.signals.append(f"case {begun[-1]}: exit status {child.returncode}: {child.stderr.strip()[-300:]}")
        first = int(begun[-1]) + 1
    return found


def test_hostile_layouts() -> None:
    """Every use of each case."""
    found = run_cases(0, max(60, settings.default.max_examples))  # type: ignore[attr-defined]
    assert not found.signals
    assert not found.wrong
    runs = {*HERE} - ({"cpu_native"} if _native.why_not() else set())
    for use in USES:
        right, refused = found.counts[f"{use}: right"], found.counts[f"{use}: refused"]
        assert refused > (right + refused) // 4, f"{use}: {right} right, {refused} refused"
        assert right or use.split()[-1] in {*BACKENDS} - runs, f"{use}: nothing was right"


def test_a_signal_and_a_wrong_number_are_found(tmp_path: Path) -> None:
    """The control."""
    program = tmp_path / "dies.py"
    program.write_text(
        "import os, signal, sys\n"
        "for number in range(int(sys.argv[1]), int(sys.argv[2])):\n"
        "    print('begin', number, flush=True)\n"
        "    if number == 2:\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if number == 3:\n"
        "        print('note 3 cpu WRONG other numbers', flush=True)\n"
        "    print('end', number, {'cpu: right': 1}, flush=True)\n"
    )
    found = run_cases(0, 5, (sys.executable, str(program)))
    assert (found.counts, found.wrong) == ({"cpu: right": 4}, ["note 3 cpu WRONG other numbers"])
    assert [text.rstrip(" :") for text in found.signals] == ["case 2: exit status -11"]


# -------------------------------------------------------------------- what is known to have killed processes, or lied


def packed(rows: int, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, rows, heads, 16).unbind()
    return query, key, value


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def runs(backend: str) -> str:
    if backend == "cpu_native" and _native.why_not():
        pytest.skip("needs the compiled kernel")
    return backend


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(
    ("offsets", "says"),
    [
        ((0, 3, 200_000), r"`cu_seqlens\[-1\]` must be total = 5, but is 200000.*Build the layout"),
        ((0, 3, 6), r"`cu_seqlens\[-1\]` must be total = 5, but is 6"),
        ((0, 3, 4), r"`cu_seqlens\[-1\]` must be total = 5, but is 4"),
        ((0, 3, FAR), rf"`cu_seqlens\[-1\]` must be total = 5, but is {FAR}"),
        ((0, 2**32 + 3, 2**32 + 5), rf"`cu_seqlens\[-1\]` must be total = 5, but is {FAR}"),
        ((1, 3, 5), r"`cu_seqlens\[0\]` must be 0, but is 1"),
        ((0, 5, 3), r"`cu_seqlens` must not decrease, but cu_seqlens\[2\] = 3 after 5"),
        ((0, -1, 5), r"`cu_seqlens` must not decrease, but cu_seqlens\[1\] = -1 after 0"),
    ],
)
def test_wrong_offsets_are_refused(backend: str, offsets: tuple[int, ...], says: str) -> None:
    given = SeqLayout.from_cu_seqlens(torch.tensor(offsets), padded_len=4, total=5, validate=False)
    in_place, roomy = SeqLayout.from_lengths([3, 2]), SeqLayout.from_key_padding_mask(torch.zeros(2, 3, dtype=torch.bool), capacity=6)
    in_place.cu_seqlens.copy_(given.cu_seqlens)
    roomy.cu_seqlens.copy_(given.cu_seqlens)
    for layout in (given, in_place, replace(SeqLayout.from_lengths([3, 2]), cu_seqlens=given.cu_seqlens)):
        with pytest.raises(LayoutError, match=says):
            varlen_attention(*packed(5), layout, backend=runs(backend))
    if offsets[-1] > 6 or sorted(offsets) != list(offsets) or offsets[0]:
        with pytest.raises(ArgumentError):
            varlen_attention(*packed(6), roomy, backend=runs(backend))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(
    "offsets", [int32(), torch.tensor([0.0, 3.0, 5.0]), torch.tensor([0, 3, 5]), int32(0, 3, 5)[None], int32(5).sum(), torch.arange(3) > 0],
    ids=str,
)  # fmt: skip
def test_tensors_that_are_no_offsets_are_refused(backend: str, offsets: Tensor) -> None:
    layout = replace(SeqLayout.from_lengths([3, 2]), cu_seqlens=offsets)
    for options in ({}, {"softcap": 2.0}) if backend != "nested" else ({},):
        with pytest.raises(LayoutError, match=r"`cu_seqlens` must be a tensor of int32 with shape \(Q\+1,\)|must have equally many"):
            varlen_attention(*packed(5), layout, backend=runs(backend), **options)


WRONG_NUMBERS: dict[str, Callable[[SeqLayout], SeqLayout]] = {
    "padded_len": lambda layout: SeqLayout.from_cu_seqlens(layout.cu_seqlens, padded_len=2, total=5, validate=False),
    "max_seqlen": lambda layout: replace(layout, max_seqlen=2, lengths=None),
    "lengths": lambda layout: replace(layout, lengths=(2, 3)),
    "a length": lambda layout: replace(layout, lengths=(5,)),
    "batch_size": lambda layout: replace(layout, batch_size=3),
    "token_indices": lambda layout: replace(layout, token_indices=layout.token_indices.flip(0)),
    "gather_indices": lambda layout: replace(layout, gather_indices=layout.gather_indices + 1),
}


@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_other_numbers_of_a_layout_are_refused(name: str) -> None:
    """By backends that go by them, and by what moves rows."""
    right = SeqLayout.from_lengths([3, 2])
    x = packed(5)[0]
    for backend in ("sdpa_padded", "nested", "reference"):
        with pytest.raises(LayoutError):
            varlen_attention(x, x, x, WRONG_NUMBERS[name](right), backend=backend)
    uses: list[Callable[[SeqLayout], Any]] = [
        lambda layout: layout.pack(torch.zeros(layout.batch_size, layout.padded_len)),
        lambda layout: layout.unpack(x),
        lambda layout: layout.pool(x, "mean"),
        lambda layout: layout.split(x),
        lambda layout: layout.to_nested(x),
        lambda layout: layout.positions,
        lambda layout: layout.compact(),
        lambda layout: layout.downsample(2, 1),
        lambda layout: layout.to("cpu"),
    ]
    for use in uses:
        with pytest.raises(LayoutError):
            use(WRONG_NUMBERS[name](right))


def test_right_tensors_are_taken_from_wherever_they_come() -> None:
    layout, x = SeqLayout.from_lengths([3, 0, 2], padding_side="left"), packed(5)[0]
    want = varlen_attention(x, x, x, layout, backend="reference")
    copies = [pickle.loads(pickle.dumps(layout)), replace(layout, lengths=None), layout.to("cpu"), layout.compact()]
    for made in copies:
        made.cu_seqlens.copy_(layout.cu_seqlens.clone())  # counted as a write
        for backend in ("cpu", "sdpa_padded", "reference"):
            torch.testing.assert_close(varlen_attention(x, x, x, made, backend=backend), want)
        assert torch.equal(made.pack(made.unpack(x)), x)


@pytest.mark.parametrize("backend", ["cpu", "cpu_native"])
def test_offsets_that_change_before_the_backward(backend: str) -> None:
    layout = SeqLayout.from_lengths([3, 2])
    leaves = [x.requires_grad_() for x in packed(5)]
    out = varlen_attention(*leaves, layout, backend=runs(backend)).sum()
    layout.cu_seqlens.data.copy_(int32(0, 3, 200_000))  # torch does not count it
    with pytest.raises(LayoutError, match="must be total = 5, but is 200000"):
        out.backward()


@pytest.mark.parametrize("op", ["cpu", "cpu_native"])
def test_ops_called_by_hand(op: str) -> None:
    """Offsets and shapes that do not belong to the tensors."""
    query, key, value = packed(5)
    rest: tuple[Any, ...] = (None, 0.25, "", [-1, -1], False)
    if runs(op) == "cpu_native":
        rest = (None, None, None, [-9, 9], True, 0.25, 0.0, 0.0)
    ops, good = torch.ops.varlen_attn, int32(0, 3, 5)
    forward, backward = getattr(ops, f"{op}_forward"), getattr(ops, f"{op}_backward")
    out, lse = forward(query, key, value, good, good, *rest)
    for bad in (int32(), int32(0, 3, 9), int32(0, 9, 5), int32(1, 3, 5), int32(0, 3, 5, 5), torch.zeros(3, 0, dtype=torch.int32)):
        for pair in ((bad, good), (good, bad)):
            with pytest.raises(LayoutError):
                forward(query, key, value, *pair, *rest)
            with pytest.raises(LayoutError):
                backward(out, query, key, value, out, lse, *pair, *rest)
    for number in range(6):
        given = [out, query, key, value, out, lse]
        for wrong in (given[number][:-1], given[number][:, :1], given[number].double()):
            with pytest.raises((ArgumentError, ValueError)):
                backward(*given[:number], wrong, *given[number + 1 :], good, good, *rest)
            if 0 < number < 4:
                with pytest.raises((ArgumentError, ValueError)):
                    forward(*given[1:number], wrong, *given[number + 1 : 4], good, good, *rest)
    slopes = (torch.ones(3), *rest[1:])
    with pytest.raises((ArgumentError, RuntimeError)):
        forward(query, key, value, good, good, *slopes)
    with pytest.raises(ArgumentError, match="must be on one device"):
        forward(query, key, value, good.to("meta"), good.to("meta"), *rest)


class Attend(nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, x: Tensor, layout: SeqLayout) -> Tensor:
        result: Tensor = varlen_attention(x, x, x, layout, backend=self.backend)
        return result


@pytest.mark.parametrize("backend", ["cpu", "cpu_native", "sdpa_padded"])
@pytest.mark.parametrize("way", ["compiled", "exported"])
def test_graphs_refuse_them_too(backend: str, way: str) -> None:
    x, layout = packed(5)[0], SeqLayout.from_lengths([3, 2])
    model: Any = Attend(runs(backend))
    model = torch.compile(model, backend="eager", fullgraph=True) if way == "compiled" else torch.export.export(model, (x, layout)).module()
    torch.testing.assert_close(model(x, layout), varlen_attention(x, x, x, layout, backend="reference"))
    for wrong in ((0, 3, 200_000), (0, 5, 3), (1, 3, 5)):
        layout.cu_seqlens.copy_(int32(*wrong))
        with pytest.raises(RuntimeError if backend == "sdpa_padded" else LayoutError, match="cu_seqlens"):
            model(x, layout)


def test_more_rows_than_32_bits_count() -> None:
    for build in (
        lambda: SeqLayout.from_cu_seqlens(torch.tensor([0, 2**32 + 3])),
        lambda: SeqLayout.from_lengths([2**31]),
    ):
        with pytest.raises(LayoutError, match="at most 2147483647"):
            build()


if __name__ == "__main__":
    figures = run_cases(0, int(sys.argv[1]))
    sums: Counter[str] = Counter()
    for use_and_outcome, count in figures.counts.items():
        sums[use_and_outcome.rpartition(": ")[2]] += count
    sys.stdout.write(f"{sys.argv[1]} cases, {sums.total()} uses: {dict(sums)}, {len(figures.signals)} signals\n")
