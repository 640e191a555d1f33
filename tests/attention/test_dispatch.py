"""The choice of a backend, its reasons, who may order one, and what is written down about calls."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from torch import Tensor

from varlen_attn import (
    BACKENDS,
    ArgumentError,
    Backend,
    BackendRefused,
    Capabilities,
    NoBackend,
    Plan,
    Problem,
    Semantics,
    SeqLayout,
    VarlenMultiheadAttention,
    backends,
    choose,
    explain,
    padded_attention,
    record,
    route,
    use_backend,
    varlen_attention,
    varlen_mha,
)
from varlen_attn.kernels.values import Call
from varlen_attn.testing.strategies import problems

NAMES = [b.name for b in BACKENDS]
LAYOUT = SeqLayout.from_lengths([3, 0, 2], 4)
H100 = Problem(device_type="cuda", capability=(9, 0), rocm=False, dtype=torch.bfloat16, packages=())


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    q = torch.arange(80.0).view(5, 2, 8) / 80
    return q, q, q


# -------------------------------------------------------------------- choose


def plan_or_none(problem: Problem) -> Plan | None:
    """None only while tracing where results must be bitwise independent of batch-mates; then all say why."""
    try:
        return choose(problem, all_reasons=True)
    except NoBackend as error:
        lines = str(error).splitlines()
    assert problem.semantics.batch_invariant
    assert problem.tracing
    assert [line.split(":")[0] for line in lines[1:]] == [f"  - {name}" for name in NAMES]
    return None


@given(problem=problems())
def test_every_backend_is_decided_about_exactly_once(problem: Problem) -> None:
    """R-11, R-25, R-41: all named in order, each refusal with a reason and a fix; the first that accepts is chosen; never none."""
    if (plan := plan_or_none(problem)) is None:
        return
    assert [d.backend for d in plan.decisions] == NAMES
    accepted = [d.backend for d in plan.decisions if d.accepted]
    assert plan.backend == accepted[0]
    assert plan.kernel
    for d in plan.decisions:
        assert d.accepted == (not d.reasons)
        for r in d.reasons:
            assert r.reason.strip()
            assert r.fix.strip()
            assert not r.reason.endswith(".")
            assert not r.fix.endswith(".")
        assert str(d).startswith(d.backend)
    can, want = plan.implementation.capabilities, problem.semantics
    assert problem.dtype in can.dtypes
    for asked, able in (
        (want.dropout_p > 0, can.dropout),
        (want.sinks, can.sinks),
        (want.window is not None, can.window),
        (want.softcap, can.softcap),
        (want.alibi, can.alibi),
        (want.score_bias, can.score_bias),
    ):
        assert able or not asked
    assert choose(problem).backend == plan.backend, "looking closer at packages does not change the choice"
    assert choose(problem, all_reasons=True) is plan
    assert choose(replace(problem), all_reasons=True) is plan, "equal problems share a plan"
    assert json.loads(json.dumps(plan.as_dict()))["backend"] == plan.backend
    assert str(plan).startswith(f"{plan.backend} runs this: {plan.kernel}")


@given(problem=problems())
def test_an_order_runs_or_raises_with_every_reason(problem: Problem) -> None:
    for backend in BACKENDS:
        ordered = replace(problem, requested=backend.name)
        reasons = backend.refusals(ordered)
        if not reasons:
            assert choose(ordered).backend == backend.name
            continue
        with pytest.raises(BackendRefused) as caught:
            choose(ordered)
        text = str(caught.value)
        assert text.startswith(f"backend {backend.name!r} was requested but cannot run this call:\n")
        for r in reasons:
            assert f"  - {r.reason}. Fix: {r.fix}." in text
        assert text.endswith("backend='auto' picks one that can.")


def test_problems_hold_no_tensors_and_nothing_of_the_data() -> None:
    def of(layout: SeqLayout) -> Problem:
        q = torch.randn(layout.num_rows, 2, 8)
        return explain(q, q, q, layout, dropout_p=0.1).problem

    a, b = of(SeqLayout.from_lengths([3, 0, 2])), of(SeqLayout.from_lengths([1, 1, 1, 90]))
    assert a == b
    assert hash(a) == hash(b)
    for value in [*vars(a).values(), *vars(a.semantics).values()]:
        assert not isinstance(value, Tensor)
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.dtype = torch.float16  # type: ignore[misc]


def test_another_machine_can_be_asked_about() -> None:
    """A stated device is never refused for not being here, and the plan says which packages it assumed."""
    assert choose(H100).backend == "torch_varlen"
    with_flash3 = replace(H100, packages=(("flash-attn-3", "3.0.0"),))
    assert "flash-attn-3 3.0.0" in choose(with_flash3).details()
    assert "optional packages stated: none" in choose(H100).details()
    assert "optional packages installed" in choose(Problem(device_type="cpu")).details()
    assert "on cuda sm90, bfloat16" in str(choose(H100))
    turing = replace(H100, capability=(7, 5), dtype=torch.float16)
    assert choose(turing).backend not in ("torch_varlen", "flash2", "flash3", "flash4")  # R-39, row 3 of 3a
    assert choose(replace(H100, dtype=torch.float32)).backend not in ("torch_varlen", "flash2", "flash3", "flash4")
    assert choose(Problem(device_type="mps")).backend == "sdpa_padded"
    assert choose(Problem(device_type="cpu")).backend == "cpu"


def test_dropout_never_goes_where_there_is_none() -> None:  # R-25, row 18 of 3a
    for packages in ((), (("flash-attn", "2.8.3"),), (("flash-attn-3", "3.0.0"),)):
        for softcap in (None, 30.0):
            semantics = Semantics(dropout_p=0.1, softcap=softcap)
            plan = choose(replace(H100, semantics=semantics, packages=packages), all_reasons=True)
            assert plan.implementation.capabilities.dropout
            for d in plan.decisions:
                if not next(b for b in BACKENDS if b.name == d.backend).capabilities.dropout:
                    assert any("dropout" in r.reason for r in d.reasons), d


def test_restricted_backends() -> None:
    flash3 = [b for b in BACKENDS if b.name == "flash3"]
    with pytest.raises(NoBackend, match=r"none of these backends runs this call:\n  - flash3: .*runs on cuda only"):
        choose(Problem(device_type="cpu"), flash3)
    cpu_only = [b for b in BACKENDS if b.name == "cpu"]
    plan = choose(Problem(device_type="cpu"), cpu_only)
    assert [d.backend for d in plan.decisions] == ["cpu"]
    with pytest.raises(ArgumentError, match=r"`backend` must be 'auto' or one of \['cpu'\], but is 'reference'"):
        choose(Problem(device_type="cpu", requested="reference"), cpu_only)


def test_the_backends_of_this_machine() -> None:
    rows = backends()
    assert [r["name"] for r in rows] == NAMES
    for row in rows:
        assert set(row) == {"name", "package", "version", "available", "reason"}
        assert row["available"] == (row["reason"] is None)
    assert {r["name"] for r in rows if r["available"]} >= {"cpu", "sdpa_padded", "reference"}
    json.dumps(rows)


# -------------------------------------------------------------------- explain and the route


def test_explain_is_what_happens_and_computes_nothing() -> None:
    for option in (
        {},
        dict(causal=True),
        dict(sinks=torch.zeros(2)),
        dict(backend="reference"),
        dict(backend="sdpa_padded", window=(1, 0)),
    ):
        plan = explain(*qkv(), LAYOUT, **option)
        with record() as log:
            varlen_attention(*qkv(), LAYOUT, **option)
        (call,) = log.calls
        assert (call.backend, call.kernel) == (plan.backend, plan.kernel)
        assert call.plan is not None
        assert call.plan.problem == plan.problem
        with record() as log:
            explain(*qkv(), LAYOUT, **option)
        assert log.calls == []


def test_a_plan_prints_the_winner_and_every_loser() -> None:
    plan = explain(*qkv(), LAYOUT)
    lines = plan.details().splitlines()
    assert lines[0] == "cpu runs this: aten::_scaled_dot_product_flash_attention_for_cpu (declared)"
    assert f"on cpu, float32, 2/2 heads of 8, torch {torch.__version__}" in lines[1]
    assert lines[2] == "  route: packed (58% of the batch is padding)"
    decisions = [line for line in lines[3:] if line[2] in "+->"]  # further reasons of one backend are indented below it
    assert "  > cpu: runs" in decisions
    first, why = str(plan).splitlines()
    assert first == lines[0]
    assert all(why.count(f" {name}:") + why.count(f"{name},") + why.count(f"{name})") == 1 for name in NAMES if name != "cpu"), why
    assert "CUDA backends (flash3, flash4, torch_varlen, mem_efficient, flex): the tensors are on cpu" in why
    assert repr(plan) == str(plan)
    assert "<pre>cpu runs this" in plan._repr_html_()
    assert "  + sdpa_padded: would run too, but comes later in the order" in decisions
    order = [line.split(":")[0].split()[-1] for line in decisions]
    assert list(dict.fromkeys(order)) == NAMES
    assert all(". Fix: " in line for line in decisions if line.startswith("  - "))
    facts = json.loads(json.dumps(plan.as_dict()))
    assert facts["route"] == "packed"
    assert [d["backend"] for d in facts["decisions"]] == NAMES
    assert facts["device"] == "cpu"
    assert facts["dtype"] == "float32"


def test_the_route_and_its_reason() -> None:
    problem = Problem(device_type="cpu")
    full = SeqLayout.from_lengths([4, 4])
    assert route(full, problem).name == "dense"
    assert route(full, problem).reason == "no row has padding"
    padded = route(SeqLayout.from_lengths([4, 1]), problem)
    assert (padded.name, padded.reason) == ("packed", "38% of the batch is padding")
    capacity = SeqLayout.from_key_padding_mask(torch.zeros(2, 4, dtype=torch.bool), capacity=8)
    assert route(capacity, problem).reason == "only the device knows the lengths"
    assert route(full, replace(problem, tracing=True)) == replace(route(full, problem), name="packed", reason="always packed while tracing")
    q = torch.randn(8, 2, 8)
    assert explain(q, q, q, full).route == "dense"


def test_nothing_is_copied_where_nothing_is_padded() -> None:
    x = torch.randn(2, 4, 2, 8)
    layout = SeqLayout.from_lengths([4, 4])
    dense = padded_attention(x, x, x, layout=layout)
    capacity = SeqLayout.from_key_padding_mask(torch.zeros(2, 4, dtype=torch.bool), capacity=8)
    assert torch.equal(padded_attention(x, x, x, layout=capacity), dense)


# -------------------------------------------------------------------- who orders


def ran(**options: Any) -> str:
    with record() as log:
        varlen_attention(*qkv(), LAYOUT, **options)
    return log.calls[0].backend


def test_argument_before_context_before_auto() -> None:
    assert ran() == "cpu"
    with use_backend("sdpa_padded"):
        assert ran() == "sdpa_padded"
        assert ran(backend="reference") == "reference"
        assert ran(backend="auto") == "sdpa_padded"
        with use_backend("reference"):
            assert ran() == "reference"
            with use_backend("auto"):
                assert ran() == "cpu"
        assert ran() == "sdpa_padded"
        with pytest.raises(BackendRefused, match="'sdpa_padded' was requested"):
            ran(batch_invariant=True)
    assert ran() == "cpu"
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert ran() == "cpu", "restored after an exception"


def test_override_and_log_belong_to_one_thread() -> None:
    seen: list[str] = []
    with use_backend("reference"), record() as log:
        thread = threading.Thread(target=lambda: seen.append(ran()))
        thread.start()
        thread.join()
        assert ran() == "reference"
    assert seen == ["cpu"]
    assert log.calls[0].backend == "reference"
    assert len(log.calls) == 1


ENVIRONMENT = """
import torch, varlen_attn as va
layout = va.SeqLayout.from_lengths([2, 1])
q = torch.randn(3, 1, 8)
with va.record() as log:
    va.varlen_attention(q, q, q, layout)
    import os
    os.environ["VARLEN_ATTN_BACKEND"] = "cpu"  # read once
    va.varlen_attention(q, q, q, layout)
    with va.use_backend("sdpa_padded"):
        va.varlen_attention(q, q, q, layout)
    with va.use_backend("auto"):
        va.varlen_attention(q, q, q, layout)
    va.varlen_attention(q, q, q, layout, backend="cpu")
print(*[c.backend for c in log.calls])
try:
    va.varlen_attention(q, q, q, layout, score_bias="x")
except TypeError:
    pass
"""


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def test_the_environment_orders_too() -> None:
    done = in_process(ENVIRONMENT, VARLEN_ATTN_BACKEND="reference")
    assert done.stdout.split() == ["reference", "reference", "sdpa_padded", "cpu", "cpu"], done.stderr


def test_a_wrong_environment_variable_is_named() -> None:
    code = "import torch, varlen_attn as va\nq = torch.randn(3, 1, 8)\nva.varlen_attention(q, q, q, va.SeqLayout.from_lengths([3]))"
    done = in_process(code, VARLEN_ATTN_BACKEND="flahs")
    assert done.returncode == 1
    assert "ArgumentError: `VARLEN_ATTN_BACKEND` must be 'auto' or one of [" in done.stderr
    assert "but is 'flahs'" in done.stderr


class Doubling(Backend):
    """A backend of a user: attention, times two."""

    name: ClassVar[str] = "doubling"
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=frozenset({"cpu"}), dtypes=frozenset({torch.float32}), window=False, empty_sequences=False
    )

    def __init__(self) -> None:
        self.lengths: list[tuple[int, ...] | None] = []

    def kernel(self, problem: Problem) -> str:
        return "twice the reference"

    def run(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Any:
        self.lengths.append(call.layout_q.lengths)
        reference = next(b for b in BACKENDS if b.name == "reference")
        out, lse = reference.run(query, key, value, call)
        return 2 * out, lse


def test_a_backend_object_is_an_order_too() -> None:
    """R-08: one that mishandles empty sequences never sees one; where only the device knows, it refuses."""
    mine, (q, k, v) = Doubling(), qkv()
    want, want_lse = varlen_attention(q, k, v, LAYOUT, return_lse=True)
    with record() as log:
        out, lse = varlen_attention(q, k, v, LAYOUT, return_lse=True, backend=mine)
        with use_backend(mine):
            inside = varlen_mha(q.flatten(1), layout=LAYOUT, num_heads=2)
    torch.testing.assert_close(out, 2 * want)
    torch.testing.assert_close(lse, want_lse)
    torch.testing.assert_close(inside, 2 * want.flatten(1))
    assert mine.lengths == [(3, 2)] * 2
    assert [c.backend for c in log.calls] == ["doubling"] * 2
    assert log.calls[0].kernel == "twice the reference"
    with pytest.raises(BackendRefused, match=r"(?s)'doubling' was requested.*does not support a sliding window. Fix: drop `window`"):
        varlen_attention(q, k, v, LAYOUT, window=(1, 1), backend=mine)
    capacity = SeqLayout.from_key_padding_mask(torch.zeros(1, 5, dtype=torch.bool), capacity=5)
    with pytest.raises(BackendRefused, match="empty sequences, and only the device knows"):
        varlen_attention(q, k, v, capacity, backend=mine)
    empty = SeqLayout.from_lengths([0, 0])
    nothing, nothing_lse = varlen_attention(q[:0], k[:0], v[:0], empty, return_lse=True, backend=mine)
    assert nothing.shape == (0, 2, 8)
    assert nothing_lse.shape == (2, 0)
    assert len(mine.lengths) == 2, "with nothing left it is not called at all"
    plan = explain(q, k, v, LAYOUT, backend=mine)
    assert [d.backend for d in plan.decisions] == ["doubling", *NAMES]


def test_empties_are_removed_on_both_sides_with_gradients() -> None:
    mine = Doubling()
    layout, layout_kv = SeqLayout.from_lengths([2, 0, 3, 1]), SeqLayout.from_lengths([1, 2, 0, 4])
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 2, 8, requires_grad=True) for n in (6, 7, 7))
    out, lse = varlen_attention(q, k, v, layout, layout_kv, return_lse=True, backend=mine)
    want, want_lse = varlen_attention(q, k, v, layout, layout_kv, return_lse=True, backend="reference")
    assert mine.lengths == [(2, 1)]
    torch.testing.assert_close(out, 2 * want)
    torch.testing.assert_close(lse, want_lse)
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad), strict=True):
        torch.testing.assert_close(a, 2 * b)


class Unwritten(Doubling):
    """Leaves rows beyond the last sequence unwritten, as flash-attn does."""

    name = "unwritten"
    capabilities = Capabilities(devices=frozenset({"cpu"}), dtypes=frozenset({torch.float32}), slack_rows=False)

    def run(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Any:
        assert query.isfinite().all()
        out, lse = super().run(query, key, value, call)
        slack = ~call.layout_q.valid_rows()
        return torch.where(slack[:, None, None], float("nan"), out), None if lse is None else torch.where(slack, float("nan"), lse)


def test_slack_rows_that_a_kernel_leaves_unwritten() -> None:  # R-10, S17
    mask = torch.tensor([[False, False, True], [True, False, False]])
    layout = SeqLayout.from_key_padding_mask(mask, capacity=6)
    q = torch.randn(6, 2, 8)
    q[4:] = float("nan")
    q.requires_grad_()
    out, lse = varlen_attention(q, q, q, layout, return_lse=True, backend=Unwritten())
    want, want_lse = varlen_attention(q, q, q, layout, return_lse=True)
    torch.testing.assert_close(out, 2 * want)
    torch.testing.assert_close(lse, want_lse)
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert dq.isfinite().all()
    assert not dq[4:].any()


# -------------------------------------------------------------------- what ran


def test_the_record_is_a_table_with_totals() -> None:
    q, k, v = qkv()
    with record() as log:
        varlen_attention(q, k, v, LAYOUT)
        varlen_attention(q, k, v, LAYOUT, backend="reference")
        varlen_mha(torch.randn(2, 4, 8), num_heads=2)
    assert [(c.backend, c.rows, c.slots) for c in log.calls] == [("cpu", 5, 12), ("reference", 5, 12), ("cpu", 8, 8)]
    assert log.calls[0].padding == pytest.approx(7 / 12)
    assert all(isinstance(c.plan, Plan) for c in log.calls)
    lines = str(log).splitlines()
    assert lines[0].split() == ["#", "module", "backend", "T", "B*S", "padding", "kernel"]
    assert lines[1].split()[:6] == ["0", "-", "cpu", "5", "12", "58%"]
    assert lines[-1] == "3 calls: 2 x cpu, 1 x reference; 18 of 32 positions computed, 44% padding left out"
    with record() as nothing:
        pass
    assert str(nothing).splitlines()[-1].startswith("0 calls")


def test_records_nest_and_close() -> None:
    with record() as outer:
        ran_inside = ran()
        with suppress(ZeroDivisionError), record() as inner:
            varlen_attention(*qkv(), LAYOUT)
            raise ZeroDivisionError
    varlen_attention(*qkv(), LAYOUT)
    assert ran_inside == "cpu"
    assert (len(outer.calls), len(inner.calls)) == (2, 1)


def test_capacity_calls_show_rows_and_slots() -> None:
    mask = torch.tensor([[False, True], [False, False]])
    layout = SeqLayout.from_key_padding_mask(mask, capacity=3)
    q = torch.randn(3, 1, 8)
    with record() as log:
        varlen_attention(q, q, q, layout)
    assert (log.calls[0].rows, log.calls[0].slots) == (3, 4)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch about itself
def test_compiled_calls_are_seen_where_they_run_and_orders_are_guarded() -> None:
    import torch._dynamo

    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(module: Any, inputs: Sequence[Any]) -> Any:
        graphs.append(1)
        return module.forward

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(x: Tensor, layout: SeqLayout) -> Tensor:
        return varlen_mha(x, layout=layout, num_heads=2)

    layout = SeqLayout.from_lengths([2, 3], 3)
    x = torch.randn(2, 3, 8)
    compiled(x, layout)
    with record() as log:
        compiled(x, layout)
        compiled(x, layout)
    assert [(c.backend, c.rows) for c in log.calls if not c.traced] == [("cpu", 5)] * 2
    with use_backend("sdpa_padded"):
        ordered = compiled(x, layout)
    with record() as log:
        compiled(x, layout)
    assert [c.backend for c in log.calls if not c.traced] == ["cpu"]
    torch.testing.assert_close(ordered, compiled(x, layout))
    assert len(graphs) <= 4
    torch._dynamo.reset()


def test_profiler_ranges_name_the_backend() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        varlen_attention(*qkv(), LAYOUT)
        varlen_attention(*qkv(), LAYOUT, backend="reference")
    names = {event.key for event in profile.key_averages()}
    assert {"varlen_attn::cpu", "varlen_attn::reference"} <= names


def test_a_cpu_computes_packed_rows_only() -> None:
    """R-33: exact attention without padding compute where there is no flash kernel for packed rows and no nested tensor."""
    mask = torch.tensor([[False] * 6, [False] + [True] * 5])
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    with record() as log:
        varlen_mha(x, mask, num_heads=2)
    (call,) = log.calls
    assert (call.backend, call.rows, call.slots) == ("cpu", 7, 12)
    assert "masked" not in call.kernel
    assert call.plan is not None
    assert call.plan.route == "packed"


def test_a_record_of_a_model_knows_its_modules_names() -> None:
    """R-11: qualified names where `record` was told the model, classes for everything else, each record by itself."""
    model = torch.nn.ModuleDict({"first": VarlenMultiheadAttention(8, 2, batch_first=True)})
    other = VarlenMultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    with record() as plain, record(model) as named:
        model["first"](x)
        model["first"](x, need_weights=True)
        other(x)
        varlen_mha(x)
    assert [c.module for c in named.calls] == ["first", "first", "VarlenMultiheadAttention", None]
    assert [c.module for c in plain.calls] == ["VarlenMultiheadAttention"] * 3 + [None]
    assert "first" in str(named)
    assert [call.module for call in named][:2] == ["first", "first"]
    assert len(named) == 4


def test_a_backend_may_take_the_values_of_a_call_one_by_one() -> None:
    class OneByOne(Doubling):
        def run(self, query: Tensor, key: Tensor, value: Tensor, layout_q: Any, layout_kv: Any, semantics: Any, extras: Any) -> Any:
            return super().run(query, key, value, layout_q, layout_kv, semantics, extras)

    layout = SeqLayout.from_lengths([2, 3])
    x = torch.randn(5, 2, 8)
    assert torch.equal(*(varlen_attention(x, x, x, layout, backend=backend) for backend in (Doubling(), OneByOne())))
