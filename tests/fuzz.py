"""Random calls on every backend, forward and backward, against float64: ``python -m tests.fuzz 100000 --seed 1``.

Calls are those of the conformance suite, and longer ones. They are drawn in parts of `PART`, each with a seed of its own. Every call has
numbers of one kind: plain ones, some that are NaN, infinite or large in some of its sequences, views with strides, or dropout.

- Sequences of plain numbers must be within the error budget, whatever the others of their batch hold. A gradient in half precision of
  hundreds of queries that meet one key, with a sink, may miss it: the compiled kernel reads its own output, which is rounded.
- In the others, what is finite in float64 and in eager attention must be finite. A NaN of a query or key must stay one.
- With dropout everything must be finite, because no other implementation draws the same.
- A query that sees no key must give 0, with gradient 0.

``make sanitize`` runs it with the compiled kernel built for the sanitizers, which end the process where they find something.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.cpu.test_native import force
from tests.kernels.test_conformance import DTYPES, Results, check, run
from tests.lanes import note
from varlen_attn import BackendRefused, testing
from varlen_attn.kernels.cpu import build as _native
from varlen_attn.testing import assert_within_budget
from varlen_attn.testing.strategies import AttentionCase, attention_cases

PART = 500
BACKENDS = ("cpu", "cpu_native", "sdpa_padded", "nested")
LONGEST = (9, 9, 9, 40, 150)  # the last ones cross the blocks of kernels
KINDS = ("plain",) * 6 + ("strided", "strided", "nan", "inf", "large", "dropout")
ODD = {"nan": (float("nan"),), "inf": (float("inf"), float("-inf")), "large": (1e4, -1e4)}
LARGEST = 1e3  # gradients of large numbers that are above it may overflow in half precision


@dataclass(frozen=True)
class Fuzzed:
    """A case of the conformance suite, and what its numbers are like.

    From 0 on, ``level`` is an instruction set of the compiled kernel, which then multiplies matrices by itself.
    """

    case: AttentionCase
    kind: str
    level: int

    def odd_rows(self) -> tuple[Tensor, Tensor]:
        """Of queries and of keys: those of sequences whose numbers are not plain."""
        layouts = self.case.layout, self.case.layout_kv or self.case.layout
        generator = torch.Generator().manual_seed(self.case.seed)
        odd = torch.rand(layouts[0].num_seqs, generator=generator) < (0.5 if self.kind in ODD else 0.0)
        rows = [torch.zeros(layout.num_rows, dtype=torch.bool) for layout in layouts]
        for real, layout in zip(rows, layouts, strict=True):
            for each, (start, end) in zip(odd.tolist(), pairwise(layout.cu_seqlens.tolist()), strict=True):
                real[start:end] = each
        return rows[0], rows[1]

    def tensors(self) -> tuple[list[Tensor], Tensor]:
        *qkv, grad = (x.detach() for x in self.case.tensors())
        generator = torch.Generator().manual_seed(self.case.seed)
        if self.kind in ODD:
            queries, keys = self.odd_rows()
            chosen = int(torch.randint(7, (), generator=generator)) + 1  # which of the three have odd numbers
            for number, (x, rows) in enumerate(zip(qkv, (queries, keys, keys), strict=True)):
                if chosen >> number & 1:
                    odd = torch.tensor(ODD[self.kind])[torch.randint(len(ODD[self.kind]), x.shape, generator=generator)]
                    where = (torch.rand(x.shape, generator=generator) < 0.1) & rows[:, None, None]
                    x[where] = odd[where].to(x.dtype)
        if self.kind == "strided":
            wide = [torch.stack([x, torch.full_like(x, float("nan"))], dim) for dim, x in enumerate((*qkv, grad))]
            *qkv, grad = (x.select(dim, 0) for dim, x in enumerate(wide))
        return [x.requires_grad_() for x in qkv], grad


def fuzzed() -> st.SearchStrategy[Fuzzed]:
    # Nothing is more exact than float64: what the budget allows it, a few rounding steps, is for short sequences.
    dtypes = {longest: tuple(x for x in DTYPES["cpu"] if x != torch.float64 or longest < 10) for longest in LONGEST}
    cases = st.sampled_from(LONGEST).flatmap(lambda longest: attention_cases(dtypes[longest], longest))
    return st.builds(Fuzzed, cases, st.sampled_from(KINDS), st.integers(-2, 2))


@dataclass
class Fuzz:
    """Attributes: problems: how many were drawn. outcomes: how many calls a backend ran or refused. kinds: problems by kind and dtype."""

    problems: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def one(self, drawn: Fuzzed, backends: Sequence[str]) -> None:
        case = drawn.case
        qkv, grad = drawn.tensors()
        layouts, options = (case.layout, case.layout_kv), dict(case.semantics)
        if drawn.kind == "dropout":
            options["dropout_p"] = 0.3
        self.problems += 1
        self.kinds.update((drawn.kind, str(case.dtype)))

        @cache
        def reference(dtype: torch.dtype) -> Results:
            inputs = tuple(x.detach().to(dtype).requires_grad_() for x in qkv)
            return run(inputs, grad.to(dtype), layouts, backend="reference", **options)

        for backend in backends:
            with pytest.MonkeyPatch.context() as patch:
                if backend == "cpu_native" and drawn.level >= 0:
                    force(patch, drawn.level)
                try:
                    got = run(tuple(qkv), grad, layouts, backend != "nested", backend=backend, **options)
                except BackendRefused:
                    self.outcomes[f"{backend} refused"] += 1
                    continue
                except Exception as error:
                    error.add_note(f"backend: {backend}")
                    raise
            try:
                self.compare(got, reference, drawn)
            except AssertionError as error:
                error.add_note(f"backend: {backend}")
                raise
            self.outcomes[f"{backend} ran"] += 1

    def compare(self, got: Results, reference: Any, drawn: Fuzzed) -> None:
        if drawn.kind == "dropout":
            for x in (got[0], *got[2]):
                assert x.isfinite().all(), "not finite"
        elif drawn.kind not in ODD:
            with pytest.MonkeyPatch.context() as patch:  # the gradient of a key is a sum over its queries, and so is its rounding
                terms = max(1, int(drawn.case.layout.cu_seqlens.diff().max().item()) // 16) if drawn.case.layout.num_seqs else 1
                patch.setitem(testing._BAND, "gradient", {half: steps * terms for half, steps in testing._BAND["gradient"].items()})
                check(got, reference, drawn.case, "cpu")
        else:
            compare_odd(got, reference(torch.float64), reference(drawn.case.dtype), drawn)


def compare_odd(got: Results, exact: Results, naive: Results, drawn: Fuzzed) -> None:
    queries, keys = drawn.odd_rows()
    results = [(got[0], exact[0], naive[0], queries), *zip(got[2], exact[2], naive[2], (queries, keys, keys), strict=True)]
    for number, (x, truth, eager, odd) in enumerate(results):
        what = ("output", "dq", "dk", "dv")[number]
        assert_within_budget(x[~odd], truth[~odd], eager[~odd], gradient=number > 0, what=f"{what} of plain sequences")
        if number == 0 or drawn.kind == "large":  # gradients add up what rows see that hold a NaN
            finite = truth.isfinite() & eager.isfinite() & (truth.abs() < LARGEST)
            assert x[finite].isfinite().all(), f"{what}: not finite where it is in float64"
    assert exact[1] is not None
    blind = torch.isneginf(exact[1]).all(0) & (drawn.kind == "nan")
    assert not got[0][blind].any(), "a query without a visible key gives exactly 0"
    assert not got[2][0][blind].any(), "and gets exactly 0"
    if drawn.kind == "nan" and got[1] is not None:
        assert got[1][exact[1].isnan()].isnan().all(), "a NaN of a query or key is lost"


def fuzz(problems: int, seed: int = 0, backends: Sequence[str] = BACKENDS, found: Fuzz | None = None) -> Fuzz:
    """What is wrong is made small by Hypothesis, and the rest of its part is left out."""
    found = found or Fuzz()
    limits = hypothesis.settings(max_examples=problems, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    body = hypothesis.seed(seed)(limits(hypothesis.given(fuzzed())(lambda drawn: found.one(drawn, backends))))
    try:
        body()
    except Exception:
        found.wrong.append(f"seed {seed}: {traceback.format_exc(limit=-2)}")
        print(found.wrong[-1], flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", type=int)
    parser.add_argument("--seed", type=int, default=0, help="of the first part; the others follow")
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lane", default="fuzz", help="the figures' name in --out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, start = Fuzz(), time.process_time()
    for part in range(-(-options.problems // PART)):
        fuzz(min(PART, options.problems - part * PART), options.seed + part, options.backends, found)
        seconds = round(time.process_time() - start)
        print(f"{found.problems} problems, {len(found.wrong)} parts wrong, {seconds} s, {dict(found.outcomes)}", flush=True)
        kernel = _native.why_not() or str(_native.library())
        figures = {"problems": found.problems, "wrong": len(found.wrong), "seconds": seconds, "seed": options.seed, "kernel": kernel}
        note(options.out, options.lane, **figures, outcomes=dict(found.outcomes), kinds=dict(found.kinds))
    return len(found.wrong) > 0


if __name__ == "__main__":
    sys.exit(main())
