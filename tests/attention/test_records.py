"""`record(kernels=True)`: what a profiler saw, and whether it is what was claimed. What `record` does else stands in `test_dispatch.py`."""

from __future__ import annotations

import html
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from varlen_attn import (
    ArgumentError,
    SeqLayout,
    VarlenMultiheadAttention,
    choose,
    enable,
    padded_attention,
    record,
    use_backend,
    varlen_attention,
)
from varlen_attn._state import _around, state
from varlen_attn.attention import dispatch
from varlen_attn.attention.profile import Profile, _alone, _kernels, _kernels_below
from varlen_attn.attention.records import Call, Record
from varlen_attn.kernels.cpu import build as _native
from varlen_attn.kernels.problem import Problem
from varlen_attn.kernels.reference import Reference

from ..interrupts import Interrupted, lines

FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
LAYOUT = SeqLayout.from_lengths([5, 7])


def rows() -> Tensor:
    return torch.randn(12, 2, 16, requires_grad=True)


class Impostor(Reference):
    """Claims a flash kernel and runs eager maths."""

    name = "impostor"

    def kernel(self, problem: Problem) -> str:
        return "flash_fwd_kernel"

    def seen_as(self, problem: Problem) -> str:
        return "flash_fwd"


class Silent(Impostor):
    def seen_as(self, problem: Problem) -> str:
        return ""


def test_each_call_knows_its_kernels() -> None:
    x = rows()
    with record(kernels=True) as log:
        varlen_attention(x, x, x, LAYOUT, backend="cpu")
        varlen_attention(x, x, x, LAYOUT, backend="cpu", softcap=2.0)
        varlen_attention(x, x, x, LAYOUT, backend="sdpa_padded").sum().backward()
    plain, capped, padded = log
    for call, own in ((plain, {FLASH}), (capped, {"aten::_softmax"}), (padded, {FLASH})):
        assert call.kernels is not None
        assert own == {name for name in call.kernels if not name.startswith("varlen_attn::")}
        assert call.confirmed is True
        assert call.plan is not None
        assert call.plan.evidence == "profiled"
    assert log.kernels is not None
    assert f"{FLASH}_backward" in log.kernels, "what a backward pass ran is in the record, though of no call"
    assert f"the profiler saw {FLASH}" in str(log)
    assert "NOT SEEN" not in str(log)


def test_a_claim_that_is_not_true_is_seen() -> None:
    x = rows()
    with record(kernels=True) as log:
        varlen_attention(x, x, x, LAYOUT, backend=Impostor())
        varlen_attention(x, x, x, LAYOUT, backend=Silent())
    lying, silent = log
    assert lying.confirmed is False
    assert lying.plan is not None
    assert lying.plan.evidence == "declared"
    assert "NOT SEEN: flash_fwd_kernel; the profiler saw aten::_softmax" in str(log)
    assert silent.confirmed is None
    assert "NOT SEEN" not in silent.kernel_text()


def test_nothing_is_claimed_where_nothing_is_computed() -> None:
    empty = SeqLayout.from_lengths([0, 0])
    x = torch.randn(0, 2, 16)
    with record(kernels=True) as log:
        varlen_attention(x, x, x, empty)
    assert [call.confirmed for call in log] == [None]


def test_without_kernels_nobody_looks() -> None:
    x = rows()
    with record() as log:
        varlen_attention(x, x, x, LAYOUT)
        assert not torch._C._autograd._profiler_enabled()
    assert log.kernels is None
    assert [(call.kernels, call.confirmed) for call in log] == [(None, None)]
    assert "profiler" not in str(log)


def test_dense_calls_of_modules_are_profiled_too() -> None:
    module = VarlenMultiheadAttention(16, 2, batch_first=True)
    with record(module, kernels=True) as log:
        module(torch.randn(2, 5, 16), need_weights=True)
    (call,) = log
    assert call.backend == "dense"
    assert call.kernels == ("aten::_softmax",)
    assert call.confirmed is None


def test_records_inside_and_around_keep_their_numbers() -> None:
    x = torch.randn(2, 6, 2, 16)
    with record() as outer:
        padded_attention(x, x, x)
        with record(kernels=True) as log:
            padded_attention(x, x, x, backend="cpu")
            with record() as inner:
                padded_attention(x, x, x, backend="reference")
    assert [call.kernels for call in outer] == [None] * 3
    assert [call.kernels for call in inner] == [None]
    assert [call.confirmed for call in log] == [True, None]


def test_one_profiler_at_a_time() -> None:
    with record(kernels=True) as log:
        with pytest.raises(ArgumentError, match="while a profiler is running"), record(kernels=True):
            raise AssertionError("never entered")
        x = rows()
        varlen_attention(x, x, x, LAYOUT, backend="cpu")
    assert [call.confirmed for call in log] == [True]


def test_one_profiler_among_threads() -> None:
    """Two at a time crash the process: also the one of another thread counts."""
    x, found = rows(), []
    started, leave = threading.Event(), threading.Event()

    def other() -> None:
        with record(kernels=True) as log:
            started.set()
            varlen_attention(x, x, x, LAYOUT, backend="cpu")
            leave.wait(10)
        found.append(log.calls[0].confirmed)

    thread = threading.Thread(target=other)
    thread.start()
    assert started.wait(10)
    with pytest.raises(ArgumentError, match="another thread"), record(kernels=True):
        raise AssertionError("never entered")
    leave.set()
    thread.join()
    assert found == [True]
    with record(kernels=True) as log:
        varlen_attention(x, x, x, LAYOUT, backend="cpu")
    assert [call.confirmed for call in log] == [True]


def test_a_profiler_that_does_not_start_says_why_and_blocks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise OSError("no tracing here")

    with monkeypatch.context() as broken:
        broken.setattr(torch.profiler.profile, "start", fail)
        with pytest.raises(OSError, match="no tracing here"), record(kernels=True):
            raise AssertionError("never entered")
    x = rows()
    with record(kernels=True) as log:
        varlen_attention(x, x, x, LAYOUT, backend="cpu")
    assert [call.confirmed for call in log] == [True]


def test_an_error_inside_leaves_a_record_and_no_profiler(capfd: pytest.CaptureFixture[str]) -> None:
    x = rows()
    with suppress(ZeroDivisionError), record(kernels=True) as log:
        varlen_attention(x, x, x, LAYOUT, backend="cpu")
        raise ZeroDivisionError
    assert [call.confirmed for call in log] == [True]
    assert not torch._C._autograd._profiler_enabled()
    assert not capfd.readouterr().err


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does that to autograd functions
def test_compiled_code_keeps_its_record() -> None:
    torch._dynamo.reset()
    call = torch.compile(lambda x: varlen_attention(x, x, x, LAYOUT, backend="cpu"), backend="aot_eager", fullgraph=True)
    x = rows().detach()
    call(x)
    with record(kernels=True) as log:
        call(x)
    assert [(c.backend, c.kernels) for c in log] == [("cpu", None)]
    assert log.kernels is not None
    assert FLASH in log.kernels


# -------------------------------------------------------------------- what a GPU's profile looks like


def event(name: str, kernels: tuple[str, ...] = (), children: tuple[Any, ...] = ()) -> Any:
    return SimpleNamespace(name=name, kernels=[SimpleNamespace(name=k) for k in kernels], cpu_children=list(children))


def test_kernels_of_a_device_stand_for_the_ops_that_launched_them() -> None:
    launch = event("cudaLaunchKernel", ("void pytorch_flash::flash_fwd_kernel<Traits, true>(Params)", "Memset (Device)"))
    copy = event("cudaMemcpyAsync", ("Memcpy DtoD (Device -> Device)", "varlen_attn call 0"))
    op = event("aten::_flash_attention_forward", (), (launch, copy))
    found = _kernels_below(event("varlen_attn call 0", (), (event("torch_attn::_varlen_attn", (), (op,)),)))
    assert found == ("void pytorch_flash::flash_fwd_kernel<Traits, true>(Params)",)
    assert _kernels([], ["aten::empty", FLASH, FLASH, "aten::mm"]) == (FLASH,)


def test_names_of_a_device_are_short_in_the_table() -> None:
    log = Record(profiles=True)
    log.add(Call("torch_varlen", "torch_attn::_varlen_attn (flash_fwd_kernel)"), None)
    names = ("void pytorch_flash::flash_fwd_kernel<Traits, true>(Params)", "void pytorch_flash::flash_fwd_kernel<Traits, false>(Params)")
    log.attach_profile(Profile(names, {"varlen_attn call 0": names}))
    assert str(log).count("pytorch_flash::flash_fwd_kernel") == 1
    assert log.calls[0].kernels == names


def _recorded() -> None:
    with record():
        _attend()


def _profiled() -> None:
    with record(kernels=True):
        _attend()


def _ordered() -> None:
    with use_backend("reference"):
        _attend()


def _attend() -> None:
    x = rows()
    varlen_attention(x, x, x, LAYOUT)


def _of_the_thread() -> tuple[Any, ...]:
    return (
        list(state.orders),
        list(state.records),
        state.recorded,
        _around.get(),
        torch.autograd.profiler._is_profiler_enabled,
        _alone.locked(),
    )


@pytest.mark.parametrize("what", [_recorded, _profiled, _ordered])
def test_blocks_that_are_broken_off_at_any_line(what: Callable[[], None]) -> None:
    for _ in range(2):
        with lines() as seen:
            what()
    before = _of_the_thread()
    # A profile takes a while: each line of it once.
    once = {label: i for i, label in enumerate(seen) if what is not _profiled or label.startswith(("_profile", "_state"))}
    for line in once.values():
        with suppress(Interrupted), lines(line) as broken:
            what()
        now = _of_the_thread()
        state.orders.clear()
        state.records.clear()
        state.recorded = before[2]
        _around.set(before[3])
        assert now == before, f"at {broken[-1]}"


# -------------------------------------------------------------------- how it is shown


def test_an_empty_record_says_why_it_may_be_empty() -> None:
    with record() as log:
        pass
    assert str(log).startswith("0 calls: ")
    for hint in ("enable(model)", "thread", "compiled before"):
        assert hint in str(log)
    assert log.summary() == str(log)


def test_a_long_record_is_cut_in_the_middle_and_has_a_summary() -> None:
    layout, q = SeqLayout.from_lengths([5, 3]), torch.randn(8, 2, 8)
    with record() as log:
        for _ in range(40):
            varlen_attention(q, q, q, layout)
        varlen_attention(q, q, q, layout, backend="reference")
    lines = str(log).splitlines()
    assert len(lines) == 1 + 12 + 1 + 12 + 1
    assert lines[13].split() == ["...", "17", "more,", "see", "summary()"]
    assert [line.split()[0] for line in (lines[12], lines[14])] == ["11", "29"]
    head, cpu, reference, totals = log.summary().splitlines()
    assert head.split() == ["calls", "module", "backend", "T", "B*S", "padding", "kernel"]
    assert cpu.split()[:6] == ["40", "-", "cpu", "320", "400", "20%"]
    assert reference.split()[:3] == ["1", "-", "reference"]
    assert totals == lines[-1]


def test_what_the_library_says_is_shown_as_it_prints() -> None:
    """In a REPL, in a notebook, and as plain values."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2, enable_nested_tensor=False)
    report = enable(model)
    mask = torch.arange(5) >= torch.tensor([5, 3])[:, None]
    with record(model) as log:
        model(torch.randn(2, 5, 16), src_key_padding_mask=mask)
    for shown in (log, log.calls[0], log.calls[0].plan, report):
        assert repr(shown) == str(shown)
        assert shown._repr_html_() == f"<pre>{html.escape(str(shown))}</pre>"
        json.dumps(shown.as_dict())
    assert str(log.calls[0]).splitlines()[1].split()[:5] == ["layers.0.self_attn", "cpu", "8", "10", "20%"]
    layout = log.calls[0].layout
    cells = layout._repr_html_()
    assert cells.startswith(f"<pre>{layout!r}</pre><table")
    assert (cells.count("<tr>"), cells.count("<td")) == (2, 10)
    assert cells.count("#eeeeee") == 2
    assert json.loads(json.dumps(layout.as_dict()))["lengths"] == [5, 3]
    assert SeqLayout.from_lengths([5000] * 50)._repr_html_().count("<td") <= 32 * 96
    assert "<td" not in SeqLayout.from_lengths([])._repr_html_()


@pytest.mark.parametrize("native", ["missing", "not wanted"])
def test_a_faster_kernel_is_named_once(native: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_native, "setting", "0" if native == "not wanted" else str(tmp_path))
    monkeypatch.setattr(_native, "_found", {})
    monkeypatch.setattr(dispatch, "_plans", {})
    layout, q = SeqLayout.from_lengths([5, 3]), torch.randn(8, 2, 8)
    report = enable(nn.MultiheadAttention(8, 2), need_weights=False)
    with record() as log:
        for _ in range(3):
            varlen_attention(q, q, q, layout)
    for text in (str(log), log.summary(), str(report)):
        assert text.count("python -m varlen_attn build-native") == (native == "missing")
    assert ("cpu_native: is not compiled yet" in str(log).splitlines()[-1]) == (native == "missing")
    h100 = choose(Problem(device_type="cuda", capability=(9, 0), dtype=torch.bfloat16, packages=()))
    assert h100.faster.startswith("A faster kernel exists. flash3: no package with flash-attn 3")
    assert not choose(Problem(device_type="cuda", capability=(8, 0), dtype=torch.bfloat16, packages=())).faster
