"""The adapter of flash-attn 3: numerics on a stand-in for its ops, traces, the schemas of several builds, broken and partial packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from varlen_attn import SeqLayout, record, varlen_attention
from varlen_attn.kernels import problem
from varlen_attn.kernels.cuda import flash3
from varlen_attn.kernels.cuda import flash_ops as _flash_op
from varlen_attn.kernels.cuda.flash3 import Flash3
from varlen_attn.kernels.problem import Problem, Semantics

from ..fake_kernels import FA3_BACKWARD, FA3_FORWARD, FA3Ops, Finder, fa3_ops, for_cpu
from . import flash_cases as cases

HERE = for_cpu(Flash3)
OPS = torch.ops.varlen_attn

# Its ops as they were in May 2025: no defaults up to the scale, and a backward that returns its gradients.
OLD_FORWARD = FA3_FORWARD.replace("=None", "", 21).replace("=False", "", 1).replace("float? softmax_scale", "float softmax_scale")
OLD_BACKWARD = (
    FA3_BACKWARD.partition(" -> ")[0].replace("=None", "").replace("=False", "", 1).replace("float? softmax_scale", "float softmax_scale")
    + " -> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
)  # fmt: skip
WINDOW = "int window_size_left=-1, int window_size_right=-1, "


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash3, "_probed", {})
    for name in ("flash-attn-3", "tokenspeed-fa3", "fa3-fwd", "xformers"):
        monkeypatch.setitem(problem._versions, name, None)


@pytest.fixture
def ops() -> Iterator[FA3Ops]:
    with fa3_ops() as ops:
        yield ops


def gpu(**fields: Any) -> Problem:
    return Problem(**{"device_type": "cuda", "capability": (9, 0), "rocm": False, "dtype": torch.bfloat16, **fields})


def reasons(**fields: Any) -> str:
    return "; ".join(str(r) for r in Flash3().refusals(gpu(**fields)))


# -------------------------------------------------------------------- numerics, on the stand-in


@pytest.mark.usefixtures("ops")
@pytest.mark.parametrize("case", cases.CASES)
def test_matches_the_reference_forward_and_backward(case: str) -> None:
    cases.check_against_the_reference(HERE, cases.CASES[case])


@pytest.mark.usefixtures("ops")
def test_nothing_to_attend_to_still_runs_backward() -> None:
    cases.check_nothing_to_attend_to_still_runs_backward(HERE)


@pytest.mark.usefixtures("ops")
@pytest.mark.parametrize("case", cases.SLACK)
def test_rows_of_no_sequence_corrupt_nothing_and_are_zero(case: str) -> None:
    cases.check_slack_rows(HERE, cases.SLACK[case])


@pytest.mark.usefixtures("ops")
def test_control_a_naive_call_is_corrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def naive(layout_q: SeqLayout, layout_kv: SeqLayout) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        return layout_q.cu_seqlens, layout_kv.cu_seqlens, layout_q.max_seqlen, layout_kv.max_seqlen

    monkeypatch.setattr(_flash_op, "covering_offsets", naive)
    with pytest.raises(AssertionError, match="not close"):
        cases.check_slack_rows(HERE, {})


def test_offsets_cover_every_row_without_a_look_at_the_device() -> None:
    mask = torch.tensor([[False] * 4, [False] * 3 + [True]])
    for capacity in (7, 8, 135, 136, 263, 264, 1000):
        layout = SeqLayout.from_key_padding_mask(mask, capacity=capacity)
        other = SeqLayout.from_lengths([2, 600])
        for pair in ((layout, layout), (layout, other), (other, layout)):
            cu_q, cu_k, max_q, max_k = _flash_op.covering_offsets(*pair)
            assert cu_q.shape == cu_k.shape
            for cu, longest, own in ((cu_q, max_q, pair[0]), (cu_k, max_k, pair[1])):
                assert cu.dtype == torch.int32
                assert cu[:3].tolist() == own.cu_seqlens.tolist()
                assert cu[-1] == own.num_rows
                assert 0 <= int(cu.diff().min()) <= int(cu.diff().max()) <= longest
                assert int(cu[2:].diff().max()) <= 128
    layout = SeqLayout.from_lengths([4, 3])
    assert _flash_op.covering_offsets(layout, layout)[0] is layout.cu_seqlens, "nothing is launched where there is no slack"
    meta = SeqLayout.from_key_padding_mask(mask, capacity=300).to("meta")
    assert _flash_op.covering_offsets(meta, meta)[0].shape == (6,), "by shapes: no value is read"


def test_slack_of_a_huge_capacity_is_a_bounded_number_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's grid counts sequences, and not far."""
    monkeypatch.setattr(_flash_op, "_MOST_PIECES", 3)
    layout = SeqLayout.from_key_padding_mask(torch.arange(1000)[None] >= 10, capacity=1000)
    cu, _, most, _ = _flash_op.covering_offsets(layout, layout)
    assert len(cu) == 1 + 1 + 3
    assert (int(cu[0]), int(cu[1]), int(cu[-1])) == (0, 10, 1000)
    assert int(cu.diff().max()) <= most


def test_what_is_passed(ops: FA3Ops) -> None:
    layout = SeqLayout.from_lengths([6])
    x = torch.randn(6, 2, 20, dtype=torch.float16, requires_grad=True)
    out = varlen_attention(x, x, x, layout, backend=HERE, deterministic=True, window=(3, None), softcap=4.0)
    out.sum().backward()
    forward, backward = ops.calls
    for call in ops.calls:
        assert (call["window_size_left"], call["window_size_right"], call["softcap"]) == (3, -1, 4.0)
        assert call["softmax_scale"] == 20**-0.5, "of the true head dimension, not the padded one"
    assert forward["num_splits"] == 1
    assert backward["deterministic"] is True


@pytest.mark.usefixtures("ops")
def test_views_that_the_kernel_could_not_load_are_copied() -> None:
    """Columns of every other element, an odd address, heads with a stride of 0: the stand-in asserts what the kernel wants."""
    layout = SeqLayout.from_lengths([4, 2])
    views = (
        torch.randn(6, 2, 32).half()[..., ::2],
        torch.randn(1 + 6 * 2 * 16).half()[1:].view(6, 2, 16),
        torch.randn(6, 1, 16).half().expand(6, 2, 16),
        torch.randn(6, 2, 17).half()[..., :16],
    )
    for view in views:
        leaf = view.detach().requires_grad_()
        results = []
        for x in (leaf, view.clone(memory_format=torch.contiguous_format).requires_grad_()):
            out = varlen_attention(x, x, x, layout, backend=HERE)
            results.append((out, *torch.autograd.grad(out.sum(), x)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("ops")
def test_it_has_no_second_derivative() -> None:
    x = torch.randn(4, 2, 8, dtype=torch.float16, requires_grad=True)
    out = varlen_attention(x, x, x, SeqLayout.from_lengths([4]), backend=HERE)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"'flash3' is not differentiable.*backend='reference'"):
        torch.autograd.grad(grad.sum(), x)


# -------------------------------------------------------------------- traces


@pytest.mark.usefixtures("ops")
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("lengths", [[3, 0, 5], [0, 0]], ids=str)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_our_ops_pass_opcheck(lengths: list[int], sinks: bool) -> None:
    cases.check_opcheck(OPS.flash3_forward.default, OPS.flash3_backward.default, lengths, sinks)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_traces_forward_and_backward_without_the_package(device: str) -> None:
    """On meta tensors, and on fake ones: no kernel is there, and none is needed."""
    targets = cases.traced_ops(Flash3(), device)
    assert targets.count("varlen_attn.flash3_forward.default") == 1
    assert targets.count("varlen_attn.flash3_backward.default") == 1


@pytest.mark.usefixtures("ops")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does that to autograd functions
def test_compiles_as_one_graph_for_all_lengths() -> None:
    cases.check_one_graph(HERE)


@pytest.mark.usefixtures("ops")
def test_it_records_itself_once() -> None:
    x = torch.randn(4, 2, 8, dtype=torch.float16)
    layout = SeqLayout.from_lengths([4])
    with record() as log:
        varlen_attention(x, x, x, layout, backend=HERE)
    assert [(c.backend, c.rows) for c in log.calls] == [("flash3", 4)]
    qkv, rest = cases.op_inputs([3, 2], sinks=False)
    with record() as log:  # as compiled code launches it
        OPS.flash3_forward(*qkv, *rest)
    assert [(c.backend, c.rows) for c in log.calls] == [("flash3", 5)]


@pytest.mark.usefixtures("ops")
def test_its_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(6, 2, 8, dtype=torch.float16, requires_grad=True)
    layout = SeqLayout.from_lengths([4, 2])
    varlen_attention(x, x, x, layout, backend=HERE)  # the formulas are there from the first call on
    with FlopCounterMode(display=False) as counter:
        varlen_attention(x, x, x, layout, backend=HERE).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * (4 * 4 + 2 * 2) * 2 * 8


# -------------------------------------------------------------------- builds


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (FA3_FORWARD, FA3_BACKWARD),
        (FA3_FORWARD, FA3_BACKWARD.partition(" -> ")[0] + OLD_BACKWARD[OLD_BACKWARD.index(" -> ") :]),  # as in xformers 0.0.34
        (OLD_FORWARD, OLD_BACKWARD),
        (FA3_FORWARD.replace(") ->", ", Tensor? sinks=None) ->"), FA3_BACKWARD),  # as in tokenspeed-fa3
        (FA3_FORWARD.replace("int num_splits=0, ", ""), FA3_BACKWARD),
    ],
    ids=["August 2026", "xformers", "May 2025", "tokenspeed", "no splits"],
)
def test_every_schema_is_called_by_its_names(forward: str, backward: str) -> None:
    with fa3_ops(forward=forward, backward=backward):
        assert not reasons(needs_grad=True)
        for case in ("causal window", "causal, grouped heads, odd dimensions"):
            cases.check_against_the_reference(HERE, cases.CASES[case])


@pytest.mark.parametrize(
    ("forward", "backward", "fields", "what"),
    [
        (FA3_FORWARD, None, dict(needs_grad=True), "a backward pass"),
        (FA3_FORWARD.replace(WINDOW, ""), FA3_BACKWARD, dict(semantics=Semantics(window=(2, 2))), "sliding windows"),
        (FA3_FORWARD, FA3_BACKWARD, dict(semantics=Semantics(softcap=4.0)), "softcap"),
        (
            FA3_FORWARD,
            FA3_BACKWARD.replace("bool deterministic=False, ", ""),
            dict(semantics=Semantics(deterministic=True), needs_grad=True),
            "deterministic gradients",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) and len(x) < 30 else "",
)
def test_ops_without_a_part_are_refused_for_it(forward: str, backward: str | None, fields: dict[str, Any], what: str) -> None:
    with fa3_ops(forward=forward, backward=backward):
        assert not reasons()
        text = reasons(**fields)
        assert f"torch.ops.flash_attn_3 is compiled without {what}" in text
        assert Flash3().refusals(gpu(**fields))[0].kind == "missing"


def test_ops_of_another_kind_are_refused() -> None:
    with fa3_ops(forward="fwd(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)", backward=None):
        assert "has no parameter cu_seqlens_q, cu_seqlens_k" in reasons()


def test_ops_that_are_loaded_later_are_found() -> None:
    assert "flash-attn 3 is not installed" in reasons()
    with fa3_ops():
        assert not reasons(needs_grad=True)
    assert "flash-attn 3 is not installed" in reasons()


# -------------------------------------------------------------------- packages

Install = Callable[..., list[str]]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """A distribution that defines ops when its module is imported, and says what it was compiled without."""
    opened: list[Any] = []

    def put(
        distribution: str | None, namespace: str = "flash_attn_3", without: Any = (), error: Exception | None = None, config: bool = True
    ) -> list[str]:
        prefix = "fa3_fwd" if namespace == "fa3_fwd" else "flash_attn"
        imported: list[str] = []

        def execute(module: types.ModuleType) -> None:
            imported.append(module.__name__)
            if module.__name__ == f"{prefix}_config":
                if not config:
                    raise ModuleNotFoundError(f"No module named '{module.__name__}'")
                flags = {f"FLASHATTENTION_DISABLE_{name}": name in without for name in ("BACKWARD", "LOCAL", "SOFTCAP", "FP16", "VARLEN")}
                flags |= {f"FLASHATTENTION_DISABLE_HDIM{width}": f"HDIM{width}" in without for width in (64, 96, 128, 192, 256)}
                module.CONFIG = {"build_flags": flags}  # type: ignore[attr-defined]
            elif error is not None:
                raise error
            else:
                opened.append(fa3_ops(namespace))
                opened[-1].__enter__()

        if distribution is not None:
            monkeypatch.setitem(problem._versions, distribution, "3.0.0")
        names = (f"{prefix}_interface", f"{prefix}_config")
        monkeypatch.setattr(sys, "meta_path", [Finder(execute, *names), *sys.meta_path])
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)  # so that what the test imports is forgotten afterwards
            del sys.modules[name]
        return imported

    yield put
    for manager in opened:
        manager.__exit__(None, None, None)


@pytest.mark.parametrize("distribution", ["flash-attn-3", "tokenspeed-fa3", None])
def test_a_package_is_imported_when_nothing_else_refuses(install: Install, distribution: str | None) -> None:
    imported = install(distribution)
    assert Flash3().refusals(gpu(device_type="cpu"), all_reasons=False)
    assert not imported
    assert not reasons(needs_grad=True, semantics=Semantics(softcap=4.0, window=(2, 2), deterministic=True))
    assert not reasons(dtype=torch.float16)
    assert imported == ["flash_attn_interface", "flash_attn_config"], "once"


@pytest.mark.parametrize(
    ("part", "fields", "what"),
    [
        ("BACKWARD", dict(needs_grad=True), "a backward pass"),
        ("LOCAL", dict(semantics=Semantics(window=(2, 2))), "sliding windows"),
        ("SOFTCAP", dict(semantics=Semantics(softcap=4.0)), "softcap"),
        ("FP16", dict(dtype=torch.float16), "float16"),
    ],
)
def test_what_a_build_leaves_out_is_refused(install: Install, part: str, fields: dict[str, Any], what: str) -> None:
    install("flash-attn-3", without=(part,))
    assert not reasons()
    assert f"flash-attn-3 3.0.0 is compiled without {what}" in reasons(**fields)


def test_a_build_without_varlen_is_refused(install: Install) -> None:
    install("flash-attn-3", without=("VARLEN",))
    assert "flash-attn-3 3.0.0 is compiled without varlen attention" in reasons()


def test_head_dimensions_are_those_of_the_build(install: Install) -> None:
    install("flash-attn-3", without=("HDIM192", "HDIM256"))
    assert not reasons(head_dim=128)
    assert "for head dimensions up to 128, and this is 136" in reasons(head_dim=136)


def test_a_wider_kernel_may_lack_determinism(install: Install) -> None:
    install("flash-attn-3", without=("HDIM192",))
    strict = dict(needs_grad=True, semantics=Semantics(deterministic=True))
    assert not reasons(head_dim=128, **strict)
    assert "computes a head dimension of 160 as 256, without deterministic gradients" in reasons(head_dim=160, **strict)
    assert not reasons(head_dim=160, needs_grad=True)


def test_a_package_that_says_nothing_of_softcap(install: Install) -> None:
    install("flash-attn-3", config=False)
    assert not reasons(needs_grad=True, semantics=Semantics(window=(2, 2)))
    assert "softcap, or does not say that it has it" in reasons(semantics=Semantics(softcap=4.0))


def test_what_others_have_imported_is_asked_too(install: Install) -> None:
    """Its ops are loaded then, and the module beside them still says what they lack."""
    install("flash-attn-3", without=("BACKWARD",))
    importlib.import_module("flash_attn_interface")
    assert not reasons(semantics=Semantics(softcap=4.0))
    assert "compiled without a backward pass" in reasons(needs_grad=True)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libcudart.so.12: cannot open shared object file: No such file or directory"),
        OSError("flash_attn_3/_C.abi3.so: undefined symbol: aoti_torch_get_current_cuda_stream"),
        AttributeError("module 'torch' has no attribute 'float8_e4m3fn'"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_broken_package_is_survived_and_quoted(install: Install, error: Exception) -> None:
    install("flash-attn-3", error=error)
    text = reasons()
    assert f"flash-attn-3 3.0.0 is installed, but loading it raises {type(error).__name__}: {error}" in text
    assert Flash3().refusals(gpu())[0].kind == "missing"


def test_a_package_from_before_the_ops_is_refused(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("flash-attn-3")
    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_varlen_func = lambda *args: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    assert "flash-attn-3 3.0.0 has no ops torch.ops.flash_attn_3" in reasons()


def test_fa3_fwd_has_a_namespace_of_its_own(install: Install) -> None:
    install("fa3-fwd", "fa3_fwd", without=("BACKWARD", "LOCAL", "FP16"))
    assert not reasons(semantics=Semantics(softcap=4.0))
    assert "fa3-fwd 3.0.0 is compiled without a backward pass" in reasons(needs_grad=True)
    layout, x = SeqLayout.from_lengths([5, 3]), torch.randn(8, 2, 16, dtype=torch.bfloat16)
    out = varlen_attention(x, x, x, layout, backend=HERE)
    torch.testing.assert_close(out, varlen_attention(x, x, x, layout, backend="reference"), atol=0.02, rtol=0.02)


def test_the_next_package_is_tried_after_a_broken_one(install: Install) -> None:
    install("fa3-fwd", "fa3_fwd")
    install("flash-attn-3", error=ImportError("broken"))
    assert not reasons()


@pytest.mark.parametrize("there", [True, False])
def test_the_library_inside_of_xformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool) -> None:
    """xformers itself is not imported: it would load more, and may be broken."""
    library = tmp_path / "xformers" / "flash_attn_3" / "_C.so"
    if there:
        library.parent.mkdir(parents=True)
        library.write_bytes(b"not a library")
    monkeypatch.setitem(problem._versions, "xformers", "0.0.34")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: types.SimpleNamespace(locate_file=tmp_path.joinpath))
    text = reasons()
    assert ("xformers 0.0.34 is installed, but loading it raises OSError" in text) == there
    assert ("flash-attn 3 is not installed" in text) != there
    loaded: list[str] = []
    monkeypatch.setattr(flash3, "_probed", {})
    monkeypatch.setattr(torch.ops, "load_library", lambda path: loaded.append(path))
    assert ("xformers 0.0.34 has no ops" in reasons()) == there
    assert loaded == [str(library)] * there


def test_nothing_installed_is_said_so() -> None:
    refusal, *_ = Flash3().refusals(gpu())
    assert "flash-attn 3 is not installed" in refusal.reason
    assert "torch_varlen" in refusal.fix


# -------------------------------------------------------------------- stated machines


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (dict(capability=(8, 0)), "needs compute capability 9.0"),
        (dict(capability=(10, 0)), "no kernels for GPUs after Hopper"),
        (dict(rocm=True), "ROCm"),
        (dict(dtype=torch.float32), "supports bfloat16, float16 only"),
        (dict(head_dim=264), "up to 256"),
        (dict(semantics=Semantics(dropout_p=0.1)), "dropout"),
        (dict(semantics=Semantics(alibi=True)), "ALiBi"),
        (dict(semantics=Semantics(score_bias=True)), "score bias"),
        (dict(semantics=Semantics(causal="top_left")), "top-left"),
        (dict(semantics=Semantics(batch_invariant=True)), "batch-mates"),
        (dict(semantics=Semantics(scale=0.0)), "scale above 0"),
        (dict(semantics=Semantics(scale=-0.1)), "scale above 0"),
        (dict(semantics=Semantics(deterministic=True), head_dim=200, needs_grad=True), "head dimensions above 192"),
        (dict(transformed=True), "torch.func"),
        (dict(device_type="cpu"), "runs on cuda only"),
    ],
    ids=str,
)
def test_what_the_kernel_lacks_is_refused(fields: dict[str, Any], reason: str) -> None:
    packages = (("flash-attn-3", "3.0.0b1"),)
    assert reason in reasons(packages=packages, **fields)
    assert not reasons(packages=packages)
    assert not reasons(packages=packages, semantics=Semantics(deterministic=True), head_dim=200), "there are no gradients then"


def test_packages_of_another_machine_are_known_by_name(install: Install) -> None:
    imported = install("flash-attn-3")
    everything = Semantics(window=(3, 3), softcap=5.0, sinks=True, deterministic=True, return_lse=True)
    assert not reasons(packages=(("flash-attn-3", "3.0.0b1"),), needs_grad=True, tracing=True, semantics=everything)
    assert "tokenspeed-fa3 3.0.0 is compiled without a backward pass" in reasons(packages=(("tokenspeed-fa3", "3.0.0"),), needs_grad=True)
    assert "without float16" in reasons(packages=(("fa3-fwd", "0.0.3"),), dtype=torch.float16)
    assert "not among" in reasons(packages=()) or "no package with flash-attn 3" in reasons(packages=())
    assert not imported
