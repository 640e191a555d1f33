"""The acceptance of a GPU, as far as it can be shown without one: that it runs and passes here with small shapes, that what is wrong fails
it, that time runs out in order, and that what it writes is what docs/gpu.md says."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import itertools
import json
import lzma
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

pytest.importorskip("benchmarks.gpu_acceptance", reason="benchmarks are not in a source distribution")

from benchmarks import gpu_acceptance as acceptance
from benchmarks import report, what_ran
from benchmarks.acceptance import (
    apart,
    cases,
    compiled,
    contests,
    dropout,
    environment,
    findings,
    gpu_time,
    graph,
    kernels,
    limits,
    models,
    nosync,
    numerics,
    padding,
    processes,
    repeats,
    stages,
    timing,
    traced,
    traps,
)  # fmt: skip
from benchmarks.acceptance.findings import Findings, Setting, Stage
from benchmarks.measure import Timing
from varlen_attn import BACKENDS, Problem, SeqLayout
from varlen_attn.kernels.base import Backend

from .kernels.fake_kernels import efficient_forward, flash_forward, on_cpu

ROOT = Path(acceptance.__file__).parent.parent
CPU = Setting("cpu")
HEAD = {
    "device": "NVIDIA H100 80GB HBM3",
    "type": "cuda",
    "capability": "9.0",
    "torch": "2.11.0",
    "varlen_attn": "0.1.0",
    "date": "2026-01-01",
}


def found_by(stage: Callable[..., None], *arguments: Any) -> Findings:
    found = Findings()
    stage(CPU, found, *arguments)
    return found


def backend(name: str) -> Backend:
    return next(b for b in BACKENDS if b.name == name)


@pytest.fixture(autouse=True)
def no_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its package is here, importing it takes seconds in every process before it fails."""
    monkeypatch.setattr(type(backend("flash2")), "missing", lambda self, problem: "is not installed")


# -------------------------------------------------------------------- it passes here


@pytest.mark.filterwarnings("ignore")  # nested tensors and dynamo's imports say that they are prototypes
def test_the_rehearsal_on_a_cpu_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage that has something to do on a CPU, by the command itself."""
    out = tmp_path / "found" / "acceptance.json"
    assert acceptance.main(["--device", "cpu", "--without", "nested", "--out", str(out)]) == 0
    written, told = json.loads(out.read_text()), capsys.readouterr().out
    assert [*written["stages"]] == [stage.name for stage in stages.STAGES]
    on_gpus = [name for name, row in written["stages"].items() if row["status"] == "needs a GPU"]
    assert on_gpus == ["memory", "large", "graph", "flex", "flash3", "flash4", "flextimes"]
    assert all(row["checks"] for name, row in written["stages"].items() if name not in on_gpus)
    assert written["accepted"]
    assert written["environment"]["without"] == ["nested"]
    assert {stage: "nested" in row["facts"] for stage, row in written["stages"].items() if stage in ("smoke", "numerics")} == {
        "smoke": True, "numerics": False,
    }  # fmt: skip
    assert written["stages"]["smoke"]["facts"]["nested"]["status"] == "not here"
    assert "\nLeft out: nested\nACCEPTED\nA rehearsal on a CPU: nothing here was shown on a GPU." in told
    assert str(ROOT) not in out.read_text(), "a path of this machine"
    assert not {*written["environment"]} & {"host", "commit", "user"}


def test_the_command_needs_torch_and_einops_only() -> None:
    """Nothing that may be missing on a machine with a GPU is imported before it is asked for."""
    code = """
    import sys
    for name in ("hypothesis", "pytest", "transformers", "matplotlib", "numpy.testing", "sentence_transformers", "xformers", "flash_attn"):
        sys.modules[name] = None
    from benchmarks import gpu_acceptance
    from benchmarks.acceptance import stages
    print(len(stages.STAGES))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(stages.STAGES)


# -------------------------------------------------------------------- what is wrong fails it


def broken(name: str, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    """``change(original, *arguments)`` in place of a backend's ``run``."""
    original = backend(name).run
    monkeypatch.setattr(type(backend(name)), "run", lambda self, *arguments: change(original, *arguments))


def asked(call: Any, **changes: Any) -> Any:
    """The call with other semantics."""
    return call._replace(semantics=dataclasses.replace(call.semantics, **changes))


def without_causal(original: Callable[..., Any], *arguments: Any) -> Any:
    *tensors, call = arguments
    return original(*tensors, asked(call, causal=False))


def test_a_backend_that_drops_causal_is_not_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """R-02, R-12: by the exit status of the command."""
    broken("sdpa_padded", monkeypatch, without_causal)
    short = tuple(case for case in numerics.CASES if case.name in ("lengths", "lengths, causal", "no padding"))
    monkeypatch.setattr(numerics.run, "__defaults__", (short,))
    out = tmp_path / "acceptance.json"
    assert acceptance.main(["--device", "cpu", "--only", "env,numerics", "--out", str(out)]) == 1
    written, told = json.loads(out.read_text()), capsys.readouterr().out
    assert not written["accepted"]
    assert [written["stages"][name]["status"] for name in ("env", "numerics")] == ["passed", "failed"]
    wrong = {c["name"]: c["holds"] for c in written["stages"]["numerics"]["checks"]}
    assert wrong["sdpa_padded"] is False
    assert wrong["cpu"] is True
    assert "\nNOT ACCEPTED" in told
    assert "numerics: sdpa_padded: 4 ran, 0 refused; lengths, causal, float32: AssertionError: output: error" in told


def leaking(original: Callable[..., Any], query: Tensor, *rest: Any) -> Any:
    """A row of padding that is read as if it were a token: rows of slack come back as what stood there."""
    out, lse = original(query, *rest)
    return torch.where(rest[2].layout_q.valid_rows()[:, None, None], out, 1.0), lse


def test_rows_beyond_the_last_offset_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    broken("sdpa_padded", monkeypatch, leaking)
    told = {c.name: c for c in found_by(traps.traps).checks}
    assert not told["sdpa_padded"].holds
    assert "rows beyond the last offset are not 0" in told["sdpa_padded"].detail
    assert told["cpu"].holds


def test_padding_that_is_read_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """R-09: in results, and by a backend that knows what stands at padding."""
    batch = cases.Batch.of(cases.Case("", (3, 5), 6), torch.float32, "cpu")
    results = batch.results("cpu", batch.layouts())
    batch.pack(results)
    spoilt = {**results, "dk": results["dk"].clone()}
    spoilt["dk"][0, 5, 1, 0] = 1e-30
    with pytest.raises(AssertionError, match="dk is not 0 at padding"):
        batch.pack(spoilt)
    fills = iter((0.0, 1e4, float("nan")))
    case = cases.Case("", (3, 5), 6)
    padding.never_read(case, torch.float32, "cpu", "cpu")
    broken("cpu", monkeypatch, lambda original, q, *rest: original(q + 0 * next(fills), *rest))
    with pytest.raises(AssertionError, match="with nan at padding, a result is not finite"):
        padding.never_read(case, torch.float32, "cpu", "cpu")


def biased(original: Callable[..., Any], *arguments: Any) -> Any:
    """Dropout without the factor 1 / (1 - p)."""
    out, lse = original(*arguments)
    return out * (1 - arguments[3].semantics.dropout_p), lse


def half_as_much(original: Callable[..., Any], *arguments: Any) -> Any:
    *tensors, call = arguments
    return original(*tensors, asked(call, dropout_p=call.semantics.dropout_p / 2))


def never(original: Callable[..., Any], *arguments: Any) -> Any:
    *tensors, call = arguments
    return original(*tensors, asked(call, dropout_p=0.0))


def other_in_backward(original: Callable[..., Any], *arguments: Any) -> Any:
    """The output of one draw, the gradient of another."""
    out, lse = original(*arguments)
    again, _ = original(*arguments)
    return again + (out - again).detach(), lse


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (biased, "squared standard errors off"),
        (half_as_much, "the variance is 0.4"),
        (never, "two seeds give one result"),
        (other_in_backward, "other weights than the forward"),
    ],
)
def test_dropout_that_is_none_is_found(change: Callable[..., Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = SeqLayout.from_lengths((24, 0, 40, 1))
    dropout.statistics("reference", layout, torch.float32, 48)
    broken("reference", monkeypatch, change)
    with pytest.raises(AssertionError, match=says):
        dropout.statistics("reference", layout, torch.float32, 48)


def test_bits_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = cases.Batch.of(cases.Case("", (3, 5), 6), torch.float32, "cpu")
    repeats.same_bits(batch, "cpu")
    noise = iter(range(1000))
    broken("cpu", monkeypatch, lambda original, q, *rest: original(q * (1 + next(noise) * 1e-6), *rest))
    with pytest.raises(AssertionError, match="output of run 2 has other bits"):
        repeats.same_bits(batch, "cpu")


def test_what_is_written_on_a_timeline_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernels_of", lambda call, device: ())
    told = {c.name: c for c in found_by(kernels.run).checks}
    assert not told["cpu, forward"].holds
    assert not told["cpu, backward"].holds


def test_a_kernel_that_was_not_promised_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    broken("cpu", monkeypatch, lambda original, *arguments: backend("reference").run(*arguments))
    told = {c.name: c for c in found_by(kernels.run).checks}
    assert not told["cpu, forward"].holds
    assert "the profiler saw aten::_softmax" in told["cpu, forward"].detail
    assert told["sdpa_padded, forward"].holds


def test_reads_are_counted_and_the_control_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {c.name: c.holds for c in found_by(nosync.run).checks}
    assert told == {"control": True, "sdpa_padded, lengths on the host": True, "sdpa_padded, capacity": True}

    def reading(original: Callable[..., Any], query: Tensor, *rest: Any) -> Any:
        assert float(query.detach().sum()) < math.inf
        return original(query, *rest)

    broken("sdpa_padded", monkeypatch, reading)
    told = {c.name: c.holds for c in found_by(nosync.run).checks}
    assert told == {"control": True, "sdpa_padded, lengths on the host": False, "sdpa_padded, capacity": False}


def test_a_model_that_changed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    broken("cpu", monkeypatch, lambda original, q, *rest: original(q * 1.5, *rest))
    told = found_by(models.run).checks
    assert [c.holds for c in told] == [False, False]
    assert "output: error" in told[0].detail


def test_a_flash_kernel_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """R-01: here none runs, and the results are compared all the same."""
    monkeypatch.setattr(kernels, "_HEAD_DIMS", (8,))
    found = found_by(kernels.flash_class)
    assert [(c.holds, c.detail) for c in found.checks] == [(False, "cpu")] * 4
    monkeypatch.setattr(kernels, "FLASH_CLASS", ("cpu",))
    assert not found_by(kernels.flash_class).failed
    broken("cpu", monkeypatch, lambda original, q, *rest: original(q * 1.5, *rest))
    assert "error" in found_by(kernels.flash_class).failed[0].detail


# -------------------------------------------------------------------- backends that are asked apart from the others


def test_every_kind_of_flex_is_a_part_of_its_own() -> None:
    parts = apart.flex_parts(CPU)
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    assert names[0] == "flex", "a small batch first"
    assert {"score bias, a function", "lengths, float32", "kernels", "padding", "nosync"} <= {*names}
    assert next(stage for stage in stages.STAGES if stage.name == "flex").early


def test_a_part_compares_by_order_and_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in numerics.CASES if case.name == "lengths").shrunk()
    found = Findings()
    apart._right("cpu", (case,), torch.float32, CPU, found)
    assert [(c.name, c.holds, c.detail) for c in found.checks] == [("cpu", True, "2 ran, 0 refused"), ("auto", True, "2 ran, 0 refused")]
    broken("cpu", monkeypatch, lambda original, q, *rest: original(q * 1.5, *rest))
    wrong = Findings()
    apart._right("cpu", (case,), torch.float32, CPU, wrong)
    assert [c.holds for c in wrong.checks] == [False, False]


def test_a_library_that_nobody_gave_is_not_here() -> None:
    (first, *_) = apart.parts_of("flash3", CPU)
    row = processes.of_stage(first, CPU)
    assert (row["status"], row["facts"]["reason"]) == (
        "not here", "asked with --fa3-library; an installed package is asked with the other backends",
    )  # fmt: skip


@pytest.mark.parametrize(("capability", "want"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_the_half_precision_that_has_kernels(capability: tuple[int, int], want: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert findings.half("cuda") == Setting("cuda").dtype == want
    assert (findings.half("cpu"), CPU.dtype) == (torch.bfloat16, torch.float32)


def test_a_slow_card_is_told_and_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_rates", lambda device: (1.7, 500.0))
    found = Findings()
    environment.run(Setting("cuda"), found)
    assert {c.name: (c.holds, c.required) for c in found.checks[1:]} == {"copy": (False, False), "matmul": (False, False)}
    assert not found.failed


def test_a_recompilation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "frames_of", lambda *arguments: 2)
    assert [c.detail.split(" for")[0] for c in found_by(compiled.run).failed] == ["2 compilations"] * 2


def test_many_sequences_and_many_elements_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    traps.many_sequences(40, torch.float32, "cpu", "cpu")
    traps.many_elements(3 * 8 * 16 * 128, torch.float32, "cpu", "cpu", length=8)

    def wraps_around(original: Callable[..., Any], query: Tensor, *rest: Any) -> Any:
        out, lse = original(query, *rest)
        return torch.cat([out[:-2], out[:2]]), lse

    broken("cpu", monkeypatch, wraps_around)
    with pytest.raises(AssertionError):
        traps.many_sequences(40, torch.float32, "cpu", "cpu")
    with pytest.raises(AssertionError, match="a sequence at the end"):
        traps.many_elements(3 * 8 * 16 * 128, torch.float32, "cpu", "cpu", length=8)


# -------------------------------------------------------------------- CUDA graphs, with something that replays on a CPU


def eager_graph(call: Callable[[], cases.Results]) -> tuple[Callable[[], None], cases.Results]:
    """What a graph does: the same call again on the same tensors, into the same tensors."""
    written = {what: x.clone() for what, x in call().items()}

    def replay() -> None:
        for what, x in call().items():
            written[what].copy_(x)

    return replay, written


def test_replays_are_compared() -> None:
    """R-40: 20 sets of lengths, and a graph that forgets to look at the lengths anew fails."""
    assert len(graph.length_sets(24)) == 20
    assert {(0, 0, 0, 0), (24,) * 4} <= {*graph.length_sets(24)}
    assert graph.replays("sdpa_padded", "cpu", torch.float32, 24, eager_graph).endswith("20 other sets of lengths")

    def stale(call: Callable[[], cases.Results]) -> tuple[Callable[[], None], cases.Results]:
        return lambda: None, call()

    with pytest.raises(AssertionError):
        graph.replays("sdpa_padded", "cpu", torch.float32, 24, stale)


def test_layouts_inside_of_a_graph_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """R-40: `update_`, and building, follow a mask that changes in place."""
    assert graph.layouts("cpu", 24, eager_graph).endswith("20 other masks")

    def stale(call: Callable[[], cases.Results]) -> tuple[Callable[[], None], cases.Results]:
        return lambda: None, {what: x.clone() for what, x in call().items()}

    with pytest.raises(AssertionError, match="updated cu_seqlens is not that of the lengths"):
        graph.layouts("cpu", 24, stale)
    monkeypatch.setattr(SeqLayout, "update_", lambda self, mask: self)
    with pytest.raises(AssertionError, match="updated cu_seqlens is not that of the lengths"):
        graph.layouts("cpu", 24, eager_graph)


def test_a_graph_is_captured_after_it_was_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            order.append("wait")

    class Graph:
        def replay(self) -> None:
            order.append("replay")

    @contextlib.contextmanager
    def within(what: object) -> Iterator[None]:
        order.append(f"in {type(what).__name__}")
        yield
        order.append("out")

    for name, does in (("Stream", Stream), ("current_stream", Stream), ("stream", within), ("CUDAGraph", Graph), ("graph", within)):
        monkeypatch.setattr(torch.cuda, name, does)
    written = {"output": torch.ones(1)}
    replay, found = graph.captured(lambda: [order.append("call"), written][1])
    replay()
    assert found is written
    assert order == ["wait", "in Stream", "call", "call", "call", "out", "wait", "in Graph", "call", "out", "replay"]


def test_graphs_of_all_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "captured", eager_graph)
    monkeypatch.setattr(graph, "COLUMNS", 16)
    found = found_by(graph.run)
    assert {c.name: c.holds for c in found.checks} == {"auto": True, "cpu": True, "sdpa_padded": True, graph._LAYOUTS: True}
    assert "only the device knows" in found.facts["nested"]


# -------------------------------------------------------------------- waiting, with a GPU that is none


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """`torch.cuda` as far as the stage calls it, and a trace that a test states."""
    state: dict[str, Any] = {"mode": "default", "trace": traced.Trace(("flash_fwd_kernel",), (), ())}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: state.update(mode=mode))
    monkeypatch.setattr(nosync, "trace", lambda call, device: [call(), state["trace"]][1])
    yield state
    assert state["mode"] == "default", "torch's mode is left as it was"


@pytest.mark.parametrize("what", ["nothing", "lengths from page-locked memory", "a copy to the host", "a stream that is waited for"])
def test_waiting_is_found(what: str, pretended: dict[str, Any]) -> None:
    batch, found = cases.Batch.of(cases.Case("", (3, 5), 6), torch.float32, "cpu"), Findings()
    pretended["trace"] = {
        "nothing": traced.Trace(("k",), (), ()),
        "lengths from page-locked memory": traced.Trace(("k",), ("Memcpy HtoD (Pinned -> Device)",), ()),
        "a copy to the host": traced.Trace(("k",), ("Memcpy DtoH (Device -> Pageable)",), ()),
        "a stream that is waited for": traced.Trace(("k",), (), ("cudaStreamSynchronize",)),
    }[what]
    nosync._on_gpu("cpu, here", batch, "cpu", (3, 5), found)
    assert [c.holds for c in found.checks] == [what in ("nothing", "lengths from page-locked memory")]


def test_blind_witnesses_fail_the_control(pretended: dict[str, Any]) -> None:
    found = Findings()
    nosync._control(torch.ones(2, 3, dtype=torch.bool), found)
    assert [c.holds for c in found.checks] == [False] * 3
    assert found.checks[0].detail == "raised: False; in the trace: False"


def test_traces_are_sorted_out() -> None:
    events = [
        ("varlen_attn::torch_varlen", "CUDA", True),
        ("Memcpy HtoD (Pinned -> Device)", "CUDA", False),
        ("Memcpy DtoD (Device -> Device)", "CUDA", False),
        ("Memset (Device)", "CUDA", False),
        ("void flash_fwd_kernel<T>(P)", "CUDA", False),
        ("aten::add", "CPU", False),
        ("cudaStreamSynchronize", "CPU", False),
        ("cudaDeviceSynchronize", "CPU", False),
        ("autograd::engine::evaluate_function: AddBackward0", "CPU", False),
    ]
    kernel, copied = ("void flash_fwd_kernel<T>(P)",), ("Memcpy HtoD (Pinned -> Device)",)
    assert traced.sorted_out(events, "cuda") == (kernel, copied, ("cudaStreamSynchronize",))
    assert traced.sorted_out(events[5:], "cpu").kernels == ("aten::add",)


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        (
            "torch_varlen",
            "void pytorch_flash::flash_fwd_kernel<T>(P)",
            "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<T>",
        ),
        ("mem_efficient", "fmha_cutlassF_f32_aligned_64x64_rf_sm80", "fmha_cutlassB_f32_aligned_64x64_k64_sm80"),
        ("flash3", "void cutlass::device_kernel<flash::FlashAttnFwdSm90<M>>", "void cutlass::device_kernel<flash::FlashAttnBwdSm90<M>>"),
        ("flex", "triton_tem_fused_flex_attention_0", "triton_tem_fused_flex_attention_backward_1"),
    ],
)
def test_kernels_have_names(name: str, forward: str, backward: str) -> None:
    import re

    pattern = backend(name).seen_as(Problem(device_type="cuda", capability=(9, 0)))
    assert re.search(pattern, forward)
    assert re.search(kernels.BACKWARD[name], backward)
    assert not re.search(pattern, backward) or name == "flex"
    assert not re.search(pattern, "void at::native::softmax_warp_forward<float>")


def test_every_backend_of_a_gpu_has_its_kernels() -> None:
    assert {*kernels.BACKWARD} == {b.name for b in BACKENDS if "cuda" in b.capabilities.devices and b.name != "reference"}


# -------------------------------------------------------------------- budget, and runs that are cut


def passing(setting: Setting, found: Findings) -> None:
    found.check("fine", True)


def failing(setting: Setting, found: Findings) -> None:
    found.check("wrong", False, "2 is not 3")


def raising(setting: Setting, found: Findings) -> None:
    found.check("fine", True)
    raise RuntimeError("CUDA error:\nan illegal memory access")


def silent(setting: Setting, found: Findings) -> None:
    """Checks nothing."""


def aborting(setting: Setting, found: Findings) -> None:
    found.check("fine", True)
    sys.stdout.write("what it said last\n")
    os.abort()


def hanging(setting: Setting, found: Findings) -> None:
    """As a kernel that never ends: no signal is answered."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(60)


def poisoning(setting: Setting, found: Findings) -> None:
    """After it, nothing can be computed in its process."""
    found.check("fine", True)

    def ones(*shape: int, **options: Any) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.ones = ones


def endless(setting: Setting, found: Findings) -> None:
    found.check("fine", True)
    while True:
        with contextlib.suppress(Exception):  # what catches everything must not catch the end
            time.sleep(0.01)


def outcome(*stages: Stage, device: str = "cuda", seconds: float = 1000.0, out: Path | None = None) -> dict[str, Any]:
    head = {**HEAD, "type": device}
    with patch.object(processes, "_health", return_value=""):  # no GPU is here that could be ill
        return acceptance.run(stages, Setting(device, time.monotonic() + seconds), head, out)


def test_a_stage_that_raises_is_a_failed_check_and_not_the_end() -> None:
    result = outcome(Stage("a", "", raising, 1), Stage("b", "", passing, 1))
    assert [row["status"] for row in result["stages"].values()] == ["failed", "passed"]
    assert not result["accepted"]
    assert "a: the stage itself: RuntimeError: CUDA error: an illegal memory access" in acceptance.summary(result)


def test_what_is_not_required_does_not_decide() -> None:
    def informational(setting: Setting, found: Findings) -> None:
        found.check("speed", False, "slow", required=False)

    result = outcome(Stage("a", "", informational, 1))
    assert result["accepted"]
    assert "Goals that are missed:\n  a: speed: slow" in acceptance.summary(result)
    assert not outcome(Stage("a", "", failing, 1))["accepted"]
    assert not outcome(Stage("a", "", silent, 1))["accepted"], "a stage that checks nothing has shown nothing"
    assert not outcome()["accepted"]


def test_stages_that_do_not_fit_are_skipped_and_not_passed() -> None:
    result = outcome(Stage("a", "", passing, 1), Stage("b", "", passing, 60), Stage("c", "", passing, 1), seconds=30)
    assert [row["status"] for row in result["stages"].values()] == ["passed", "skipped: budget", "passed"]
    assert not result["accepted"]
    assert not outcome(Stage("a", "", passing, 1), device="cpu", seconds=0)["accepted"]
    late = Stage("late", "", passing, 60, required=False)
    assert outcome(Stage("a", "", passing, 1), late, seconds=30)["accepted"]
    assert not outcome(dataclasses.replace(late, run=failing))["accepted"]


@pytest.mark.alone
def test_a_stage_is_cut_where_the_budget_ends() -> None:
    result = outcome(Stage("a", "", passing, 0), Stage("b", "", endless, 0), Stage("c", "", passing, 0.0), seconds=0.3)
    assert [row["status"] for row in result["stages"].values()] == ["passed", "cut: budget", "skipped: budget"]
    assert result["stages"]["b"]["checks"], "what it had until then"
    assert not result["accepted"]


def test_a_stage_that_ends_its_process_costs_itself_only(tmp_path: Path) -> None:
    """Whatever it does: the others run, and what it had found and said is kept."""
    out = tmp_path / "acceptance.json"
    bad = {"raises": raising, "aborts": aborting, "hangs": hanging, "poisons": poisoning}
    listed = [Stage(name, "", run, 0.0 if run is hanging else 5.0) for name, run in bad.items()]
    between = [Stage(f"after {stage.name}", "", passing, 1) for stage in listed]
    setting = Setting("cpu", time.monotonic() + 1000, grace=0.3 - 15)  # a stage is cut 15 seconds after twice its estimate
    result = acceptance.run([x for pair in zip(listed, between, strict=True) for x in pair], setting, {**HEAD, "type": "cpu"}, out)
    assert result == json.loads(out.read_text())
    status = {name: row["status"] for name, row in result["stages"].items()}
    assert status == {
        "raises": "failed", "aborts": "crashed", "hangs": "hung", "poisons": "poisoned the device",
        **{stage.name: "passed" for stage in between},
    }  # fmt: skip
    told = {name: {c["name"]: c["detail"] for c in result["stages"][name]["checks"] if not c["holds"]} for name in bad}
    assert told["raises"] == {"the stage itself": "RuntimeError: CUDA error: an illegal memory access"}
    assert told["aborts"] == {"the process": "crashed: exit status -6"}
    assert told["hangs"]["the process"].startswith("hung: did not end after ")
    assert told["poisons"]["the process"].endswith("RuntimeError: CUDA error: an illegal memory access was encountered")
    assert result["stages"]["aborts"]["checks"][0]["name"] == "fine", "what it had until then"
    assert "what it said last" in result["stages"]["aborts"]["output"]
    log = out.with_suffix(".log").read_text()
    assert "what it said last" in log
    assert "Traceback" in log
    assert "Fatal Python error: Aborted" in log
    assert not result["accepted"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acceptance.json", "acceptance.log"]


def test_parts_run_beside_the_stages_and_end_alone(tmp_path: Path) -> None:
    parts = (Stage("good", "", passing, 1), Stage("sdpa_padded", "", aborting, 1), Stage("bad", "", failing, 1))
    group = Stage("group", "", passing, 5, parts=lambda setting: parts, processes=2, early=True)

    def left_out(setting: Setting, found: Findings) -> None:
        reason = backend("sdpa_padded").missing(Problem())
        found.check("left out", reason == "is left out of this stage", reason)

    result = outcome(group, Stage("a", "", left_out, 1, quiet=True), device="cpu", out=tmp_path / "a.json")
    row = result["stages"]["group"]
    assert row["status"] == "crashed"
    assert {c["name"]: c["holds"] for c in row["checks"]} == {
        "good: fine": True, "sdpa_padded: fine": True, "sdpa_padded: the process": False, "bad: wrong": False,
    }  # fmt: skip
    assert row["facts"]["left out of later stages"] == ["sdpa_padded"]
    assert result["stages"]["a"]["status"] == "passed"


def test_a_run_that_is_killed_leaves_what_it_had(tmp_path: Path) -> None:
    out = tmp_path / "acceptance.json"
    run = outcome_in_a_child(out, Stage("a", "", passing, 1), Stage("b", "", endless, 50), Stage("c", "", passing, 1))
    end = time.monotonic() + 20
    while time.monotonic() < end and not (out.exists() and "fine" in json.dumps(json.loads(out.read_text())["stages"].get("b", {}))):
        time.sleep(0.02)
    run.kill()
    run.join()
    written = json.loads(out.read_text())
    assert {name: row["status"] for name, row in written["stages"].items()} == {"a": "passed", "b": "running", "c": "has not run"}
    assert written["stages"]["b"]["checks"], "what it had until then"
    assert not written["accepted"]
    assert "**running**" in what_ran.block([{**written, "environment": HEAD}])


def outcome_in_a_child(out: Path, *listed: Stage) -> Any:
    process = multiprocessing.get_context("fork").Process(target=lambda: outcome(*listed, device="cpu", out=out))
    process.start()
    return process


def test_only_known_backends_can_be_left_out() -> None:
    with pytest.raises(SystemExit):
        acceptance.main(["--without", "speed"])


def test_what_failed_is_run_again(tmp_path: Path) -> None:
    earlier = {"a": "passed", "b": "crashed", "c": "not here", "d": "skipped: budget", "e": "needs a GPU"}
    (tmp_path / "a.json").write_text(json.dumps({"stages": {name: {"status": status} for name, status in earlier.items()}}))
    assert acceptance.failed(tmp_path / "a.json") == ("b", "d")
    stage = Stage("b", "", passing, 10)
    assert (stage.limit(Setting("cpu", time.monotonic() + 500)), Setting("cpu").left()) == (35, math.inf)
    assert stage.limit(Setting("cpu", patient=True)) == math.inf


def test_only_known_stages_can_be_asked_for() -> None:
    assert [stage.name for stage in acceptance.chosen(["numerics,env", "traps"])] == ["env", "numerics", "traps"]
    assert acceptance.chosen([]) == stages.STAGES
    with pytest.raises(SystemExit, match="there is no stage speed; there are smoke, env, numerics"):
        acceptance.chosen(["speed,env"])


def test_the_stages_fit_the_budget() -> None:
    assert sum(stage.seconds for stage in stages.STAGES if stage.required) <= acceptance.BUDGET < 540, "under nine minutes"


def test_what_may_spoil_a_process_stands_behind_times() -> None:
    names = [stage.name for stage in stages.STAGES]
    assert names[0] == "smoke"
    assert names.index("timing") < min(names.index(late) for late in ("memory", "large", "graph", "compile"))
    assert all(stage.quiet for stage in stages.STAGES if stage.name in ("timing", "encoders", "bert", "host", "flextimes"))


def test_a_part_does_not_replace_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that the README is made of is that of all stages."""
    monkeypatch.setattr(acceptance, "RESULTS", tmp_path)
    monkeypatch.setattr(processes, "_health", lambda device: "")
    monkeypatch.setattr(acceptance, "STAGES", (Stage("env", "", passing, 1),))
    monkeypatch.setattr(environment, "facts", lambda device: HEAD)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert acceptance.main(["--device", "cuda", "--only", "env"]) == 0
    assert acceptance.main(["--device", "cuda"]) == 0
    assert sorted(path.name for path in (tmp_path / "h100").iterdir()) == [
        "acceptance.json", "acceptance.log", "partial.json", "partial.log",
    ]  # fmt: skip


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_gpu_takes_another_python() -> None:
    """One that can install nothing: no environment is made, everything is run with it."""

    def printed(*target: str) -> str:
        command = ["make", "-n", "--no-print-directory", *target, "GPU_PYTHON=that/python"]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()

    assert printed("gpu", "GPU_OPTIONS=--budget 9") == "that/python -m benchmarks.gpu_acceptance --budget 9"
    assert printed("gpu-again", "FILE=a.json") == "that/python -m benchmarks.gpu_acceptance --again a.json"
    assert "that/python -m pytest" in printed("gpu-tests")


def test_a_gpu_that_is_not_there_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert acceptance.main([]) == 3
    assert capsys.readouterr().out == "--device cuda: torch sees no GPU here\n"


def test_tallies() -> None:
    from varlen_attn import BackendRefused

    def refuse() -> None:
        raise BackendRefused("backend 'x' was requested but cannot run this call:\n  - cannot. Fix: do not.")

    def fail() -> None:
        raise ValueError("wrong")

    tally, found = findings.Tally("x"), Findings()
    for label, call in (("a", refuse), ("b", lambda: None), ("c", fail)):
        tally.attempt(label, call)
    tally.write(found)
    assert (found.checks[0].holds, found.checks[0].detail) == (False, "1 ran, 1 refused; c: ValueError: wrong")
    assert found.facts["x"]["refused"] == {"cannot. Fix: do not.": 1}
    nothing, strict, late = findings.Tally("nothing"), findings.Tally("auto"), findings.Tally("late", seconds=-1)
    nothing.attempt("a", refuse)
    strict.attempt("a", lambda: None)
    strict.attempt("b", refuse)
    late.attempt("a", fail)
    for other in (nothing, late):
        other.write(found)
    strict.write(found, may_refuse=False)
    assert [c.holds for c in found.checks[1:]] == [False] * 3
    assert found.checks[2].detail == "0 ran, 0 refused, 1 left out for time"


# -------------------------------------------------------------------- limits and times


@pytest.mark.parametrize(
    ("columns", "moving", "fa2", "fa3"), [(512, 50, 46, 44), (1024, 101, 162, 138), (2048, 201, 599, 467), (8192, 805, 9134, 6160)]
)
def test_the_limit_is_that_of_the_published_rates(columns: int, moving: int, fa2: int, fa3: int) -> None:
    """32 rows of lengths spread evenly over 0..S, 16 heads of 64, bfloat16: by hand from bytes, products and the paper's rates."""
    assert limits.moving_seconds(16 * columns, 32 * columns, 1024, "forward") * 1e6 == pytest.approx(moving, abs=0.5)
    even = [columns * (i + 0.5) / 320 for i in range(320)]
    for kernel, microseconds in (("FA2", fa2), ("FA3", fa3)):
        found = limits.attention_seconds(even, 16, 64, kernel, "forward") / 10
        assert found * 1e6 == pytest.approx(microseconds, abs=0.5, rel=1e-3)


def test_rates_between_those_of_the_table() -> None:
    assert limits.rate("FA2", "forward", 64, 1024) == 306e12
    assert limits.rate("FA2", "forward", 64, 1) == limits.rate("FA2", "forward", 64, 256)
    assert limits.rate("FA2", "forward", 64, 1e6) == 324e12
    assert 306e12 < limits.rate("FA2", "forward", 64, 1500) < 318e12
    assert all(len(rates) == 7 and list(rates) == sorted(rates) for rates in limits.RATES.values())
    forward, both = (limits.limit_seconds((512, 100), 512, 16, 64, "FA2", way) for way in ("forward", "forward+backward"))
    assert both > 2 * forward
    # A quarter of the time of the backward's moving by hand: one gradient gathered, three scattered.
    assert limits.moving_seconds(8192, 16384, 1024, "backward") == pytest.approx((2 * 8192 + 3 * (8192 + 16384)) * 2048 / 3e12)


def test_turns_of_a_device() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = gpu_time.device_times(calls, "cpu", rounds=4, least=0.0)
    assert "".join(order[6:]) == "abbaabba"
    assert {len(t.rounds) for t in times.values()} == {4}
    assert {len(t.rounds) for t in gpu_time.device_times(calls, "cpu", rounds=9, budget=0.0).values()} == {3}


@pytest.mark.alone
def test_calls_are_queued_before_the_device_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device sleeps while the host queues, so that nothing of the host's time lies between the events."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def synchronize(self) -> None:
            order.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return 6.0

    for name, does in (("Event", Event), ("synchronize", lambda: order.append("wait")), ("_sleep", lambda cycles: order.append("sleep"))):
        monkeypatch.setattr(torch.cuda, name, does)
    assert gpu_time._by_events(lambda: order.append("call"), 3) == pytest.approx(0.002)
    assert order == ["wait", "sleep", "event", "call", "call", "call", "event", "wait"]
    slow_host = gpu_time.device_times({"a": lambda: time.sleep(0.01)}, "cuda", rounds=3, least=1.0)
    assert slow_host["a"].rounds == pytest.approx((0.006,) * 3), "one call a turn, where the host is slow"


TINY = timing.TINY


def test_shapes_beyond_their_share_are_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_row", lambda shape, case, found, rows: rows.append({"shape": str(shape), "forward": {}}))
    monkeypatch.setattr(timing, "SHARE", 2.5)
    monkeypatch.setattr(timing.time, "monotonic", itertools.count().__next__)  # a second for each look at it, two looks for a shape
    found = Findings()
    timing.timing(CPU, found, (TINY, TINY))
    assert [(c.name, c.holds, c.required) for c in found.checks] == [(str(TINY), False, False), ("a shape was timed", True, True)]


@pytest.mark.parametrize(
    ("name", "capability", "judged"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), True),
        ("NVIDIA H100 PCIe", (9, 0), False),
        ("NVIDIA H100 NVL", (9, 0), False),
        ("L40S", (8, 9), False),
    ],
)
def test_the_limit_is_that_of_the_card(name: str, capability: tuple[int, int], judged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert timing._has_published_limits("cuda") is judged
    assert not timing._has_published_limits("cpu")


@pytest.mark.filterwarnings("ignore")
def test_a_row_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Findings()
    timing.timing(CPU, found, (TINY,))
    (row,) = found.facts["rows"]
    assert row["auto"] == "cpu"
    assert not found.failed
    assert row["moving"].keys() == {"index_select, index_copy_", "jagged operations of aten", "ours"}
    for direction in timing.DIRECTIONS:
        assert row[direction]["microseconds"].keys() >= {"torch, mask", "ours, kernel only, auto", "ours, whole path, auto"}
    assert "xformers" in row["absent"]
    assert what_ran.times({"stages": {"timing": {"facts": found.facts}}})[0].count("\n") == 2
    late = Findings()
    timing.timing(Setting("cpu", time.monotonic()), late, (TINY,))
    assert (late.checks[0].detail, late.facts["rows"]) == ("left out for time", [])
    assert [c.name for c in late.failed] == ["a shape was timed"], "nothing timed is nothing shown"
    broken("cpu", monkeypatch, lambda original, q, *rest: original(q * 1.01, *rest))
    wrong = Findings()
    timing.timing(CPU, wrong, (TINY,))
    assert {c.name.split(": ", 1)[1] for c in wrong.failed} >= {"ours, kernel only, auto is right", "ours, whole path, cpu is right"}
    assert "ours, whole path, auto" not in wrong.facts["rows"][0]["forward"]["microseconds"]


def test_bare_kernels_are_called_as_they_want(monkeypatch: pytest.MonkeyPatch) -> None:
    """On stand-ins: what the two kernels of torch that we compare with are given."""
    case = contests.Case.of(TINY.workload, torch.bfloat16, 2, 16)
    with on_cpu(_flash_attention_forward=flash_forward, _efficient_attention_forward=efficient_forward):
        found = {name: dataclasses.replace(contests._BARE[name](case), grad=None) for name in ("torch_varlen", "mem_efficient")}
        assert contests.verified(found, case) == {}
        found["torch_varlen"] = dataclasses.replace(found["torch_varlen"], rows=lambda x: x * 1.1)
        assert "error" in contests.verified(found, case)["torch_varlen"]
    with pytest.raises(contests.Absent, match="is not loaded"):
        contests._BARE["flash3"](case)


@pytest.mark.parametrize(
    ("ours", "again", "spread", "holds"),
    [(1.01, 1.0, 0.0, True), (1.03, 1.0, 0.0, False), (1.03, 0.98, 0.0, True), (1.03, 1.0, 0.02, True), (1.05, 1.0, 0.02, False)],
)
@pytest.mark.parametrize("noisy", ["bare kernel", "ours, kernel only"])
def test_what_is_ours_around_a_kernel_is_judged(ours: float, again: float, spread: float, holds: bool, noisy: str) -> None:
    """Two in a hundred, and the noise: what the kernel itself is off itself, or the spread of one of the two."""

    def timing_of(name: str, factor: float) -> Timing:
        off = spread if name == noisy else 0.0
        return Timing((factor * 1e-3 * (1 - off), factor * 1e-3, factor * 1e-3 * (1 + off)))

    times = {
        "bare kernel, torch_varlen": timing_of("bare kernel", 1.0), "bare kernel again, torch_varlen": timing_of("again", again),
        "ours, kernel only, torch_varlen": timing_of("ours, kernel only", ours),
    }  # fmt: skip
    found, shape = Findings(), timing.Shape(32, 512)
    case = contests.Case.of(TINY.workload, torch.float32, 2, 16)
    timing._judge("x", times, shape, case, "forward", "torch_varlen", found)
    assert [(c.name, c.holds, c.required) for c in found.checks] == [("x: torch_varlen adds nothing", holds, False)]


@pytest.mark.parametrize(("share", "holds"), [(0.9, True), (0.7, False)])
def test_the_whole_path_is_judged_by_the_limit(share: float, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_has_published_limits", lambda device: True)
    shape = timing.Shape(32, 512)
    case = contests.Case.of(dataclasses.replace(shape.workload), torch.bfloat16, 1, 8)
    limit = limits.limit_seconds(case.workload.lengths, 512, 16, 64, "FA2", "forward")
    found = Findings()
    timing._judge("x", {"ours, whole path, auto": Timing((limit / share,) * 3)}, shape, case, "forward", "torch_varlen", found)
    assert [(c.holds, c.required) for c in found.checks] == [(holds, False)]


def test_movers_that_differ_are_found() -> None:
    case = contests.Case.of(TINY.workload, torch.float32, 2, 16)
    movers = contests.movers(case)
    assert len(timing._agreeing(movers)) == 3
    with pytest.raises(AssertionError, match="other moves other rows"):
        timing._agreeing({**movers, "other": lambda: tuple(x + 1 for x in movers["ours"]())})


def test_a_line() -> None:
    """R-53: what is linear in tokens lies on one, and scores do not."""
    assert repeats.line_through([1, 2, 3], [5, 7, 9]) == pytest.approx((2, 3))


@pytest.mark.parametrize(("peak", "holds"), [(lambda rows, columns: 20_000 * rows + 7, True), (lambda rows, columns: rows * rows, False)])
def test_memory_is_judged(peak: Callable[[int, int], int], holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "_peak", lambda name, batch, length, columns, device: peak(batch * length, columns))
    told = {c.name: c.holds for c in found_by(repeats.memory).checks}
    assert told["cpu, linear in tokens"] is holds
    assert told["cpu, padding costs nothing"]
    monkeypatch.setattr(repeats, "_peak", lambda name, batch, length, columns, device: batch * columns * 100)
    assert not found_by(repeats.memory).checks[1].holds


# -------------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Tesla T4", "t4"), ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("NVIDIA GH200 480GB", "gh200"), ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA", "gpu"),
    ],
)  # fmt: skip
def test_folders_of_results(name: str, folder: str) -> None:
    assert environment.slug(name) == folder


def test_the_version_of_a_driver() -> None:
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version:  gcc version 12.3.0"
    assert environment.driver_version(text) == "580.65.06"
    assert environment.driver_version("something else") is None


def test_a_library_that_is_carried_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacked where it is packed, after the runtime that it was linked to."""
    asked: list[str] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode: asked.append(f"{Path(name).name} {mode == ctypes.RTLD_GLOBAL}"))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: asked.append(f"{Path(path).name} {Path(path).read_bytes()!r}"))
    packed, runtime = tmp_path / "fa3.so.xz", tmp_path / "libcudart.so.12"
    packed.write_bytes(lzma.compress(b"code"))
    runtime.write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"registers no torch\.ops\.flash_attn_3\.fwd"):
        environment.load_library(packed, runtime)
    assert asked == ["libcudart.so.12 True", "fa3.so b'code'"]
    wheel = tmp_path / "nvidia_cuda_runtime.whl"
    with zipfile.ZipFile(wheel, "w") as packed_runtime:
        packed_runtime.writestr("nvidia/cuda_runtime/lib/libcudart.so.12", b"code")
    assert environment._from_wheel(wheel).read_bytes() == b"code"
    with pytest.raises(RuntimeError, match="there is no file"):
        environment.load_library(tmp_path / "nothing.so", None)
    monkeypatch.undo()
    (tmp_path / "broken.so").write_bytes(b"no library")
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        environment.load_library(tmp_path / "broken.so", None)


# -------------------------------------------------------------------- docs/gpu.md


def recorded() -> dict[str, Any]:
    """A run as it would be written; the numbers are made up."""
    check = {"name": "torch_varlen", "holds": True, "required": True, "detail": "60 ran"}
    row = {
        "shape": "B 32", "auto": "torch_varlen",
        "forward": {"microseconds": {"torch, mask": 200.0, "ours, whole path, auto": 100.0},
                    "times faster than torch, mask": {"ours, whole path, auto": 2.0, "ours, kernel only, auto": 4.0}},
    }  # fmt: skip
    encoder = {
        "model": "6 layers", "tokens": 100,
        "evaluation": {"milliseconds": {"as it comes": 8.0, "after enable": 4.0}, "times faster than as it comes": {"after enable": 2.0}},
    }  # fmt: skip
    return {
        "environment": {**HEAD, "cuda": "13.0", "driver": None, "cudnn": 91900, "backends": {"torch_varlen": "available"}},
        "accepted": True,
        "stages": {
            "env": {"status": "passed", "says": "the machine", "checks": [check, {**check, "required": False, "holds": False}]},
            "numerics": {"status": "passed", "says": "float64", "checks": [check], "facts": {"torch_varlen": {"ran": 60}}},
            "kernels": {"status": "passed", "checks": [check], "facts": {"torch_varlen": {"forward": ["flash_fwd<T>"], "backward": []}}},
            "nosync": {"status": "failed", "checks": [{**check, "name": "torch_varlen, capacity", "holds": False, "detail": "a | b"}]},
            "timing": {"status": "passed", "checks": [check], "facts": {"rows": [row]}},
            "encoders": {"status": "passed", "checks": [check], "facts": {"rows": [encoder]}},
        },
    }


def test_the_page_says_what_has_run_where() -> None:
    text = what_ran.block([recorded()])
    assert text.startswith("**NVIDIA H100 80GB HBM3** (compute capability 9.0), torch 2.11.0, CUDA 13.0, cuDNN 91900, varlen_attn 0.1.0, ")
    assert "2026-01-01: accepted." in text
    assert "| env | the machine, its speed, and which backends accept it | passed, 1 of 1, 0 of 1 goals |" in text
    assert "| nosync | no call waits for the device | **failed**, 0 of 1 |" in text
    assert "| 6 layers | 100 | evaluation | 8.00 | 4.00 | 2.00 | - |" in text
    assert "- nosync, torch_varlen, capacity: a \\| b" in text
    assert "| torch_varlen | 60 | flash_fwd\\<T> | yes | **no** | - | - | - | - |" in text
    assert "| B 32 | torch_varlen | 200 | 100 | 2.00 | 4.00 | - | - | - | - |" in text
    refused = copy.deepcopy(recorded())
    refused["accepted"] = False
    assert "**not accepted**" in what_ran.block([refused])
    assert not set(text) & {"#"}, "no heading: the README finds its rows by sections"


def test_what_has_not_run_is_said() -> None:
    text = what_ran.block([])
    assert text.startswith("No run on a GPU is recorded.\n\n| stage |")
    assert text.count("has not run") == len(stages.STAGES)
    assert "| graph | one CUDA graph for all lengths | has not run |" in what_ran.block([recorded()])


def test_results_of_all_gpus_are_found(tmp_path: Path) -> None:
    for folder, changes in (("h200", {"device": "H200"}), ("h100", {}), ("cpu", {"type": "cpu"})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "acceptance.json").write_text(json.dumps({"environment": {**HEAD, **changes}}))
    assert [r["environment"]["device"] for r in what_ran.load(tmp_path)] == [HEAD["device"], "H200"]


def test_the_committed_block_is_what_the_results_say() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text()
    assert report.gpu_page(text, what_ran.load()) == text, "run `python -m benchmarks.report`"
    assert "NVIDIA H100" in report.gpu_page(text, [recorded()])
