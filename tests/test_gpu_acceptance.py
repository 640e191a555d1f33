"""The acceptance of a GPU, as far as it can be shown without one: that it runs and passes here with small shapes, that what is wrong fails
it, that time runs out in order, and that what it writes is what the README says."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import itertools
import json
import lzma
import math
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("benchmarks.gpu_acceptance", reason="benchmarks are not in a source distribution")

from benchmarks import gpu_acceptance as acceptance
from benchmarks import report, what_ran
from benchmarks.acceptance import (
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
    repeats,
    stages,
    timing,
    traced,
    traps,
)  # fmt: skip
from benchmarks.acceptance.findings import Findings, Setting, Stage
from benchmarks.measure import Timing
from varlen_attn import BACKENDS, Problem, SeqLayout
from varlen_attn.backends.base import Backend

from .backends.stand_ins import efficient_forward, flash_forward, on_cpu

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


# -------------------------------------------------------------------- it passes here


@pytest.mark.filterwarnings("ignore")  # nested tensors and dynamo's imports say that they are prototypes
def test_the_rehearsal_on_a_cpu_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage that has something to do on a CPU, by the command itself."""
    out = tmp_path / "found" / "acceptance.json"
    assert acceptance.main(["--device", "cpu", "--out", str(out)]) == 0
    written, told = json.loads(out.read_text()), capsys.readouterr().out
    assert [*written["stages"]] == [stage.name for stage in stages.STAGES]
    on_gpus = [name for name, row in written["stages"].items() if row["status"] == "needs a GPU"]
    assert on_gpus == ["graph", "timing", "memory", "large"]
    assert all(row["checks"] for name, row in written["stages"].items() if name not in on_gpus)
    assert written["accepted"]
    assert "ACCEPTED\nA rehearsal on a CPU: nothing here was shown on a GPU." in told
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


def without_causal(original: Callable[..., Any], *arguments: Any) -> Any:
    *tensors, semantics, extras = arguments
    return original(*tensors, dataclasses.replace(semantics, causal=False), extras)


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
    assert "numerics: sdpa_padded: 8 ran, 0 refused; lengths, causal, float32: AssertionError: output: error" in told


def leaking(original: Callable[..., Any], query: Tensor, *rest: Any) -> Any:
    """A row of padding that is read as if it were a token: rows of slack come back as what stood there."""
    out, lse = original(query, *rest)
    return torch.where(rest[2].valid_rows()[:, None, None], out, 1.0), lse


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
    return out * (1 - arguments[5].dropout_p), lse


def half_as_much(original: Callable[..., Any], *arguments: Any) -> Any:
    *tensors, semantics, extras = arguments
    return original(*tensors, dataclasses.replace(semantics, dropout_p=semantics.dropout_p / 2), extras)


def never(original: Callable[..., Any], *arguments: Any) -> Any:
    *tensors, semantics, extras = arguments
    return original(*tensors, dataclasses.replace(semantics, dropout_p=0.0), extras)


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


# -------------------------------------------------------------------- the cases of a backend that compiles a kernel for each kind of call


@pytest.fixture
def with_flex(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """A machine with `flex`, which is the automatic choice in float32; what each was asked: backend, case, dtype."""
    asked: list[tuple[str, str, str]] = []
    original = findings.Tally.attempt

    def attempt(self: findings.Tally, label: str, call: Callable[[], object]) -> None:
        asked.append(
            (self.name, label.removesuffix(", capacity").rpartition(", ")[0], label.removesuffix(", capacity").rpartition(", ")[2])
        )
        original(self, label, call)

    monkeypatch.setattr(findings.Tally, "attempt", attempt)
    monkeypatch.setattr(numerics, "here", lambda device: ["cpu", "flex"])
    monkeypatch.setattr(numerics, "_chosen", lambda batch, capacity: "flex" if batch.qkv[0].dtype == torch.float32 else "cpu")
    monkeypatch.setattr(numerics, "verify", lambda *arguments: None)
    monkeypatch.setattr(cases.Batch, "specification", lambda self, dtype: {})
    return asked


def test_flex_is_asked_what_it_is_there_for_first(with_flex: list[tuple[str, str, str]]) -> None:
    found = found_by(numerics.run)
    of_flex = list(dict.fromkeys((case, dtype) for name, case, dtype in with_flex if name == "flex"))
    assert [case for case, _ in of_flex[:4]] == ["score bias, a function", "score bias, a table", "softcap", "ALiBi"]
    assert [case for case, dtype in of_flex if dtype == "bfloat16"] == list(numerics.OF_FLEX)
    assert {case for case, dtype in of_flex if dtype == "float32"} >= {"lengths", "head dim 256, many rows"}
    # The automatic choice is asked the rest where it is another, and these where it is flex: nothing is compiled for it alone.
    of_auto = {(case, dtype) for name, case, dtype in with_flex if name == "auto"}
    assert {case for case, dtype in of_auto if dtype == "float32"} == {case for case, dtype in of_flex if dtype == "float32"}
    assert {case for case, dtype in of_auto if dtype == "bfloat16"} == {case.name for case in numerics.CASES}
    assert found.facts["auto"]["elsewhere"] == 2 * len(numerics.CASES)
    assert {c.name: c.holds for c in found.checks} == {"auto": True, "cpu": True, "flex": True}


def test_nothing_of_what_decides_is_left_out(with_flex: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "SHARE", 0.0)
    told = {c.name: c for c in found_by(numerics.run).checks}
    assert {name: c.holds for name, c in told.items()} == {"auto": False, "cpu": True, "flex": False}
    assert told["flex"].detail == f"1 ran, 0 refused, {2 * (len(numerics.OF_FLEX) + len(numerics._OF_FLEX_FLOAT32)) - 1} left out for time"


def test_compiling_spends_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(findings.time, "perf_counter", lambda: now[0])
    tally = findings.Tally("x", seconds=1.5)
    for label in "abc":
        tally.attempt(label, lambda: now.__setitem__(0, now[0] + 20))
    assert (tally.ran, tally.left_out, tally.spent) == (2, 1, 2.0)


def test_the_automatic_choice_is_that_of_the_call() -> None:
    batch = cases.Batch.of(numerics.CASES[0].shrunk(), torch.float32, "cpu")
    assert [numerics._chosen(batch, capacity) for capacity in (False, True)] == ["cpu", "cpu"]
    wrong = dataclasses.replace(batch, options={"window": "wide"})
    assert numerics._chosen(wrong, False) == ""


def test_the_automatic_choice_of_cross_attention() -> None:
    (case,) = (case for case in numerics.CASES if case.name == "cross, grouped heads")
    assert numerics._chosen(cases.Batch.of(case.shrunk(), torch.float32, "cpu"), False) == "cpu"


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


@pytest.mark.parametrize("what", ["nothing", "a copy to the host", "a stream that is waited for"])
def test_waiting_is_found(what: str, pretended: dict[str, Any]) -> None:
    batch, found = cases.Batch.of(cases.Case("", (3, 5), 6), torch.float32, "cpu"), Findings()
    pretended["trace"] = {
        "nothing": traced.Trace(("k",), (), ()),
        "a copy to the host": traced.Trace(("k",), ("Memcpy DtoH (Device -> Pageable)",), ()),
        "a stream that is waited for": traced.Trace(("k",), (), ("cudaStreamSynchronize",)),
    }[what]
    nosync._on_gpu("cpu, here", batch, "cpu", (3, 5), found)
    assert [c.holds for c in found.checks] == [what == "nothing"]


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


def killed(setting: Setting, found: Findings) -> None:
    raise KeyboardInterrupt


def endless(setting: Setting, found: Findings) -> None:
    found.check("fine", True)
    while True:
        with contextlib.suppress(Exception):  # what catches everything must not catch the end
            time.sleep(0.01)


def outcome(*stages: Stage, device: str = "cuda", seconds: float = 1000.0, out: Path | None = None) -> dict[str, Any]:
    head = {**HEAD, "type": device}
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
    assert "a: speed (not required): slow" in acceptance.summary(result)
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


def test_a_run_that_is_killed_leaves_what_it_had(tmp_path: Path) -> None:
    out = tmp_path / "acceptance.json"
    with pytest.raises(KeyboardInterrupt):
        outcome(Stage("a", "", passing, 1), Stage("b", "", killed, 1), Stage("c", "", passing, 1), out=out)
    written = json.loads(out.read_text())
    assert written["stages"]["a"]["status"] == "passed"
    assert written["stages"]["b"] == {"status": "running"}
    assert not written["accepted"]
    assert [path.name for path in tmp_path.iterdir()] == ["acceptance.json"]
    assert "**running**" in what_ran.block([{**written, "environment": HEAD}])


def test_what_needs_a_gpu_is_neither_run_nor_held_against_a_cpu() -> None:
    on_gpus = Stage("a", "", killed, 1, needs_gpu=True)
    assert outcome(on_gpus, Stage("b", "", passing, 0), device="cpu")["accepted"]


def test_only_known_stages_can_be_asked_for() -> None:
    assert [stage.name for stage in acceptance.chosen("numerics,env")] == ["env", "numerics"]
    assert acceptance.chosen("") == stages.STAGES
    with pytest.raises(SystemExit, match="there is no stage speed; there are env, numerics"):
        acceptance.chosen("speed,env")


def test_the_stages_fit_the_budget() -> None:
    assert sum(stage.seconds for stage in stages.STAGES) <= acceptance.options([]).budget < 480, "under eight minutes"


def test_times_before_what_may_wait_and_forgetting_last() -> None:
    """`compile` resets dynamo: whoever runs kernels of `flex` behind it would compile them again."""
    names = [stage.name for stage in stages.STAGES]
    assert names.index("timing") < min(names.index(late) for late in ("memory", "traps", "large"))
    assert names.index("compile") > max(
        names.index(user) for user in ("numerics", "padding", "kernels", "nosync", "graph", "timing", "memory", "traps")
    )


def test_a_part_does_not_replace_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that the README is made of is that of all stages."""
    monkeypatch.setattr(acceptance, "RESULTS", tmp_path)
    monkeypatch.setattr(acceptance, "use_machine", lambda *arguments: None)
    monkeypatch.setattr(acceptance, "STAGES", (Stage("env", "", passing, 1),))
    monkeypatch.setattr(environment, "facts", lambda device: HEAD)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert acceptance.main(["--device", "cuda", "--only", "env"]) == 0
    assert acceptance.main(["--device", "cuda"]) == 0
    assert sorted(path.name for path in (tmp_path / "h100").iterdir()) == ["acceptance.json", "partial.json"]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_gpu_takes_another_python() -> None:
    """One that can install nothing: no environment is made, everything is run with it."""

    def printed(python: str) -> str:  # which of the tests' packages there are is asked all the same
        command = ["make", "-n", "--no-print-directory", "gpu", f"GPU_PYTHON={python}"]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout

    done = printed(sys.executable)
    assert "-m pip" not in done
    assert f"{sys.executable} -m benchmarks.gpu_acceptance --device cuda" in done
    for tests in ("tests -m gpu", "tests/backends"):
        assert f"{sys.executable} -m pytest -q -p no:cacheprovider -W default --device cuda {tests}" in done
    without = printed("that/python")
    assert "that/python -m benchmarks.gpu_acceptance --device cuda" in without
    assert "the tests were not run: that/python has no pytest" in without.splitlines()[-1]
    assert "-m pytest" not in without


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_the_parts_of_make_gpu_run_one_by_one() -> None:
    ran = {
        part: subprocess.run(
            ["make", "-n", "--no-print-directory", part, "GPU_PYTHON=that/python"], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout
        for part in ("gpu-acceptance", "gpu-tests")
    }
    assert {part: ("benchmarks.gpu_acceptance" in text, "pytest" in text) for part, text in ran.items()} == {
        "gpu-acceptance": (True, False), "gpu-tests": (False, True),
    }  # fmt: skip


def test_a_gpu_that_is_not_there_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="torch sees no GPU here"):
        acceptance.main(["--device", "cuda"])


def test_tallies() -> None:
    from varlen_attn import BackendRefused

    def refuse() -> None:
        raise BackendRefused("backend 'x' was ordered, but it\n  - can not. Fix: do not.")

    def fail() -> None:
        raise ValueError("wrong")

    tally, found = findings.Tally("x"), Findings()
    for label, call in (("a", refuse), ("b", lambda: None), ("c", fail)):
        tally.attempt(label, call)
    tally.write(found)
    assert (found.checks[0].holds, found.checks[0].detail) == (False, "1 ran, 1 refused; c: ValueError: wrong")
    assert found.facts["x"]["refused"] == {"can not. Fix: do not.": 1}
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


TINY = timing.Shape(3, 40, heads=2, head_dim=16)


@pytest.mark.filterwarnings("ignore")
def test_kernels_are_compiled_for_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    case = contests.Case.of(TINY.workload, torch.float32, 2, 16)
    monkeypatch.setitem(vars(contests.others), "flex", contests.others.masked)
    found, _ = contests.contestants(case)
    assert contests._FLEX in found
    found, absent = contests.contestants(case, compiled=False)
    assert contests._FLEX not in found
    assert absent[contests._FLEX] == "compiles kernels for every shape, and is timed at one"
    assert timing.COMPILED in timing.SHAPES


def test_shapes_beyond_their_share_are_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_row", lambda shape, *rest: {"shape": str(shape)})
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
    assert timing._is_h100() is judged


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
    assert {c.name.split(": ")[1] for c in wrong.failed} >= {"ours, kernel only, auto is right", "ours, whole path, cpu is right"}
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
    timing._judge("x", times, shape, case, "forward", "torch_varlen", found, True)
    assert [(c.name, c.holds, c.required) for c in found.checks] == [("x: torch_varlen adds nothing", holds, True)]


@pytest.mark.parametrize(("share", "holds"), [(0.9, True), (0.7, False)])
def test_the_whole_path_is_judged_by_the_limit(share: float, holds: bool) -> None:
    shape = timing.Shape(32, 512)
    case = contests.Case.of(dataclasses.replace(shape.workload), torch.bfloat16, 1, 8)
    limit = limits.limit_seconds(case.workload.lengths, 512, 16, 64, "FA2", "forward")
    found = Findings()
    timing._judge("x", {"ours, whole path, auto": Timing((limit / share,) * 3)}, shape, case, "forward", "torch_varlen", found, True)
    assert [c.holds for c in found.checks] == [holds]


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
    with pytest.raises(SystemExit, match=r"registers no torch\.ops\.flash_attn_3\.fwd"):
        environment.load_library(packed, runtime)
    assert asked == ["libcudart.so.12 True", "fa3.so b'code'"]
    with pytest.raises(SystemExit, match="there is no file"):
        environment.load_library(tmp_path / "nothing.so", None)
    monkeypatch.undo()
    (tmp_path / "broken.so").write_bytes(b"no library")
    with pytest.raises(SystemExit, match="can not be loaded"):
        environment.load_library(tmp_path / "broken.so", None)


# -------------------------------------------------------------------- the README


def recorded() -> dict[str, Any]:
    """A run as it would be written; the numbers are made up."""
    check = {"name": "torch_varlen", "holds": True, "required": True, "detail": "60 ran"}
    row = {
        "shape": "B 32", "auto": "torch_varlen",
        "forward": {"microseconds": {"torch, mask": 200.0, "ours, whole path, auto": 100.0},
                    "times faster than torch, mask": {"ours, whole path, auto": 2.0, "ours, kernel only, auto": 4.0}},
    }  # fmt: skip
    return {
        "environment": {**HEAD, "cuda": "13.0", "driver": None, "cudnn": 91900},
        "accepted": True,
        "stages": {
            "env": {"status": "passed", "says": "the machine", "checks": [check], "facts": {"backends": {"torch_varlen": "available"}}},
            "numerics": {"status": "passed", "says": "float64", "checks": [check], "facts": {"torch_varlen": {"ran": 60}}},
            "kernels": {"status": "passed", "checks": [check], "facts": {"torch_varlen": {"forward": ["flash_fwd<T>"], "backward": []}}},
            "nosync": {"status": "failed", "checks": [{**check, "name": "torch_varlen, capacity", "holds": False, "detail": "a | b"}]},
            "timing": {"status": "passed", "checks": [check], "facts": {"rows": [row]}},
        },
    }


def test_the_readme_says_what_has_run_where() -> None:
    text = what_ran.block([recorded()])
    assert text.startswith("**NVIDIA H100 80GB HBM3** (compute capability 9.0), torch 2.11.0, CUDA 13.0, cuDNN 91900, varlen_attn 0.1.0, ")
    assert "2026-01-01: accepted." in text
    assert "| nosync |  | **failed**, 0 of 1 |" in text
    assert "- nosync, torch_varlen, capacity: a \\| b" in text
    assert "| torch_varlen | 60 | flash_fwd\\<T> | yes | **no** | - | - | - | - |" in text
    assert "| B 32 | torch_varlen | 200 | 100 | 2.00 | 4.00 | - | - | - | - |" in text
    refused = copy.deepcopy(recorded())
    refused["accepted"] = False
    assert "**not accepted**" in what_ran.block([refused])
    assert not set(text) & {"#"}, "no heading: the README finds its rows by sections"


def test_without_a_run_the_readme_says_so() -> None:
    assert what_ran.block([]).startswith("No run on a GPU is recorded.")


def test_results_of_all_gpus_are_found(tmp_path: Path) -> None:
    for folder, changes in (("h200", {"device": "H200"}), ("h100", {}), ("cpu", {"type": "cpu"})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "acceptance.json").write_text(json.dumps({"environment": {**HEAD, **changes}}))
    assert [r["environment"]["device"] for r in what_ran.load(tmp_path)] == [HEAD["device"], "H200"]


def test_the_committed_block_is_what_the_results_say() -> None:
    text = (ROOT / "README.md").read_text()
    assert what_ran.block(what_ran.load()) == text.split(what_ran.BEGIN)[1].split(what_ran.END)[0].strip(), (
        "run `python -m benchmarks.report`"
    )
    changed = report.readme(text, report.load(), [recorded()])
    assert "NVIDIA H100" in changed
    assert report.readme(changed, report.load(), what_ran.load()) == text
