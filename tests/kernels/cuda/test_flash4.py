"""The adapter of flash-attn 4: numerics on a stand-in, traces, the signatures of several betas, broken packages and the namespace trap."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from varlen_attn import SeqLayout, varlen_attention
from varlen_attn.kernels import problem
from varlen_attn.kernels.cuda import packages as _packages
from varlen_attn.kernels.cuda.flash4 import Flash4
from varlen_attn.kernels.problem import Problem, Semantics

from ..fake_kernels import Finder, for_cpu, hopper_backward, hopper_forward
from . import flash_cases as cases

HERE = for_cpu(Flash4)
OPS = torch.ops.varlen_attn
INTERFACE = "flash_attn.cute.interface"


def gpu(**fields: Any) -> Problem:
    return Problem(**{"device_type": "cuda", "capability": (9, 0), "rocm": False, "dtype": torch.bfloat16, **fields})


def reasons(**fields: Any) -> str:
    return "; ".join(str(r) for r in Flash4().refusals(gpu(**fields)))


# -------------------------------------------------------------------- the functions of several betas


class Kernel:
    """What the functions of all betas run, and what they were called with."""

    def __init__(self, results: int) -> None:
        self.results = results
        self.calls: list[dict[str, Any]] = []

    def _semantics(self, causal: bool, softcap: float | None, left: int | None, right: int | None) -> Semantics:
        assert all(side is None or side >= 0 for side in (left, right)), "-1 is a window, not none"
        self.calls.append(dict(causal=causal, softcap=softcap, window=(left, right)))
        right = 0 if causal else right
        window = None if (left, right) == (None, None) else (left, right)
        return Semantics(causal="bottom_right" if causal else False, window=window, softcap=softcap or None)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scope: dict[str, Any]) -> tuple[Any, ...]:
        for name in ("qv", "seqused_q", "seqused_k", "page_table", "learnable_sink", "out", "lse"):
            assert scope.get(name) is None, f"{name} is {scope[name]}: something was passed by position"
        semantics = self._semantics(scope["causal"], scope["softcap"], scope["window_size_left"], scope["window_size_right"])
        out, lse = hopper_forward(q, k, v, *(scope[name] for name in LENGTHS), scope["softmax_scale"], semantics)
        return (out, lse if scope["return_lse"] else None, *[None] * (self.results - 2))

    def backward(self, q: Tensor, k: Tensor, v: Tensor, scope: dict[str, Any]) -> tuple[Tensor, ...]:
        assert isinstance(scope["softcap"], float), "None is not a softcap here"
        semantics = self._semantics(scope["causal"], scope["softcap"], scope["window_size_left"], scope["window_size_right"])
        self.calls[-1]["deterministic"] = scope["deterministic"]
        assert scope.get("learnable_sink") is None
        tensors = (scope["dout"], q, k, v, scope["out"], scope["lse"], *(scope[name] for name in LENGTHS))
        return hopper_backward(*tensors, scope["softmax_scale"], semantics)


LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def functions_b4(kernel: Kernel) -> tuple[Any, Any]:
    def _flash_attn_fwd(  # type: ignore[no-untyped-def]
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
        page_table=None, softmax_scale=None, causal=False, softcap=None, window_size_left=None, window_size_right=None,
        learnable_sink=None, m_block_size=128, n_block_size=128, num_threads=384, num_splits=1, pack_gqa=None, _arch=None,
        score_mod=None, mask_mod=None, block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None,
    ):  # fmt: skip
        return kernel.forward(q, k, v, locals())

    return _flash_attn_fwd, functions_b12(kernel)[1]


def functions_b12(kernel: Kernel) -> tuple[Any, Any]:
    def _flash_attn_fwd(  # type: ignore[no-untyped-def]
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None, window_size_left=None,
        window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None, intra_wg_overlap=None, num_threads=384,
        num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None, block_sparse_tensors=None, return_lse=False, out=None,
        lse=None, aux_tensors=None, q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None,
    ):  # fmt: skip
        return kernel.forward(q, k, v, locals())

    def _flash_attn_bwd(  # type: ignore[no-untyped-def]
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None, window_size_right=None,
        m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False,
        dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None,
        cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None,
        dv=None, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, block_sparse_tensors=None, dlse=None,
    ):  # fmt: skip
        return kernel.backward(q, k, v, locals())

    return _flash_attn_fwd, _flash_attn_bwd


def functions_b28(kernel: Kernel) -> tuple[Any, Any]:
    """``learnable_sink`` in the backward, which then returns its gradient too; the rest as before."""

    def _flash_attn_bwd(  # type: ignore[no-untyped-def]
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None, window_size_right=None,
        m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False,
        dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None,
        cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None,
        dv=None, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        dlse=None, learnable_sink=None,
    ):  # fmt: skip
        return kernel.backward(q, k, v, locals())

    return functions_b12(kernel)[0], _flash_attn_bwd


BETAS = {
    "4.0.0b12": (functions_b12, 2),
    "4.0.0b16": (functions_b12, 2),
    "4.0.0b20": (functions_b12, 4),
    "4.0.0b28": (functions_b28, 4),
    "4.0.0b36": (functions_b28, 5),
}

Install = Callable[[str | None, Callable[[types.ModuleType], None]], list[str]]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """A distribution flash-attn-4, whose modules do as told when they are imported."""

    def put(version: str | None, execute: Callable[[types.ModuleType], None]) -> list[str]:
        imported: list[str] = []

        def note(module: types.ModuleType) -> None:
            imported.append(module.__name__)
            if module.__name__ == INTERFACE:
                execute(module)

        monkeypatch.setitem(problem._versions, "flash-attn-4", version)
        monkeypatch.setattr(_packages, "_probed", {})
        monkeypatch.setattr(sys, "meta_path", [Finder(note, "flash_attn"), *sys.meta_path])
        for name in [n for n in sys.modules if n.partition(".")[0] == "flash_attn"]:
            monkeypatch.delitem(sys.modules, name)
        for name in ("flash_attn", "flash_attn.cute", INTERFACE):
            monkeypatch.setitem(sys.modules, name, None)  # so that what the test imports is forgotten afterwards
            del sys.modules[name]
        return imported

    return put


@pytest.fixture
def beta(install: Install) -> Callable[[str], Kernel]:
    def put(version: str) -> Kernel:
        functions, results = BETAS.get(version, (functions_b4, 2))
        kernel = Kernel(results)

        def execute(module: types.ModuleType) -> None:
            module._flash_attn_fwd, module._flash_attn_bwd = functions(kernel)  # type: ignore[attr-defined]

        install(version, execute)
        return kernel

    return put


@pytest.fixture
def kernel(beta: Callable[[str], Kernel]) -> Kernel:
    return beta("4.0.0b36")


# -------------------------------------------------------------------- numerics, on the stand-in


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("case", cases.CASES)
def test_matches_the_reference_forward_and_backward(case: str) -> None:
    cases.check_against_the_reference(HERE, cases.CASES[case])


@pytest.mark.parametrize("version", BETAS)
@pytest.mark.parametrize("case", ["causal window", "causal, grouped heads, odd dimensions", "sinks"])
def test_every_beta_is_called_by_its_own_signature(beta: Callable[[str], Kernel], version: str, case: str) -> None:
    beta(version)
    assert Flash4().missing(gpu()) is None
    cases.check_against_the_reference(HERE, cases.CASES[case])


@pytest.mark.usefixtures("kernel")
def test_nothing_to_attend_to_still_runs_backward() -> None:
    cases.check_nothing_to_attend_to_still_runs_backward(HERE)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("case", cases.SLACK)
def test_rows_of_no_sequence_corrupt_nothing_and_are_zero(case: str) -> None:
    cases.check_slack_rows(HERE, cases.SLACK[case])


def test_options_reach_the_kernel(kernel: Kernel) -> None:
    layout = SeqLayout.from_lengths([6])
    x = torch.randn(6, 2, 8, dtype=torch.float16, requires_grad=True)
    out = varlen_attention(x, x, x, layout, backend=HERE, softcap=5.0, window=(None, 2), deterministic=True)
    out.sum().backward()
    varlen_attention(x, x, x, layout, backend=HERE, causal=True)
    assert kernel.calls == [
        dict(causal=False, softcap=5.0, window=(None, 2)),
        dict(causal=False, softcap=5.0, window=(None, 2), deterministic=True),
        dict(causal=True, softcap=0.0, window=(None, 0)),
    ]


# -------------------------------------------------------------------- traces


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_our_ops_pass_opcheck(sinks: bool) -> None:
    cases.check_opcheck(OPS.flash4_forward.default, OPS.flash4_backward.default, [3, 0, 5], sinks)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_traces_forward_and_backward_without_the_package(device: str) -> None:
    """On meta tensors, and on fake ones: no kernel is there, and none is needed."""
    targets = cases.traced_ops(Flash4(), device)
    assert targets.count("varlen_attn.flash4_forward.default") == 1
    assert targets.count("varlen_attn.flash4_backward.default") == 1


@pytest.mark.usefixtures("kernel")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does that to autograd functions
def test_compiles_as_one_graph_for_all_lengths() -> None:
    cases.check_one_graph(HERE)


# -------------------------------------------------------------------- packages


@pytest.mark.parametrize(
    "error",
    [
        ImportError("cannot import name 'utils' from 'cutlass'"),
        ModuleNotFoundError("No module named 'cutlass'"),
        OSError("libcute_dsl_runtime.so: cannot open shared object file"),
        AttributeError("module 'cutlass.cute' has no attribute 'FastDivmodDivisor'"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_broken_package_is_survived_and_quoted(install: Install, error: Exception) -> None:
    def execute(module: types.ModuleType) -> None:
        raise error

    install("4.0.0b36", execute)
    text = reasons()
    assert f"flash-attn-4 4.0.0b36 is installed, but importing it raises {type(error).__name__}: {error}" in text
    assert Flash4().refusals(gpu())[0].kind == "missing"


def test_a_broken_flash_attn_2_around_it_is_survived(monkeypatch: pytest.MonkeyPatch, install: Install) -> None:
    """With flash-attn 2 installed, its ``__init__`` runs first."""
    install("4.0.0b36", lambda module: None)

    def execute(module: types.ModuleType) -> None:
        raise ModuleNotFoundError("No module named 'flash_attn_2_cuda'")

    monkeypatch.setattr(sys, "meta_path", [Finder(execute, "flash_attn"), *sys.meta_path])
    assert "raises ModuleNotFoundError: No module named 'flash_attn_2_cuda'" in reasons()


def test_a_package_without_the_functions_is_refused(install: Install) -> None:
    install("4.0.0b36", lambda module: None)
    assert "has no function _flash_attn_fwd" in reasons()


def test_functions_of_another_kind_are_refused(install: Install) -> None:
    def execute(module: types.ModuleType) -> None:
        module._flash_attn_fwd = functions_b12(Kernel(2))[0]  # type: ignore[attr-defined]
        module._flash_attn_bwd = lambda q, k, v, out, dout, lse: None  # type: ignore[attr-defined]

    install("4.1.0", execute)
    assert "_flash_attn_bwd of flash-attn-4 4.1.0 has no parameter cu_seqlens_q, cu_seqlens_k" in reasons()


def test_a_module_of_that_name_without_the_distribution_is_not_it(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The namespace package that an uninstalled or another distribution leaves."""
    imported = install(None, lambda module: None)
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    refusal, *_ = Flash4().refusals(gpu())
    assert refusal.reason == "the package flash-attn-4 is not installed"
    assert "flash-attn-4" in refusal.fix
    assert not imported


def test_it_is_imported_once_and_only_when_nothing_else_refuses(install: Install) -> None:
    def execute(module: types.ModuleType) -> None:
        raise ImportError("broken")

    imported = install("4.0.0b36", execute)
    assert Flash4().refusals(gpu(device_type="cpu"), all_reasons=False)
    assert not imported
    assert reasons() == reasons()
    assert imported.count(INTERFACE) == 1


# -------------------------------------------------------------------- stated machines


@pytest.mark.parametrize(
    ("version", "fields", "need"),
    [
        ("4.0.0b4", {}, "4.0.0b12"),
        ("4.0.0b5.dev3", {}, "4.0.0b12"),
        ("4.0.0b20", dict(needs_grad=True, semantics=Semantics(softcap=5.0)), "4.0.0b28"),
    ],
)
def test_older_betas_are_refused_for_what_they_lack(version: str, fields: dict[str, Any], need: str) -> None:
    assert f"needs flash-attn-4 {need} or newer" in reasons(packages=(("flash-attn-4", version),), **fields)
    for newer in (need, "4.0.0", "4.0.1", "4.1.0b1"):
        assert not reasons(packages=(("flash-attn-4", newer),), **fields)


def test_softcap_without_gradients_is_older() -> None:
    assert not reasons(packages=(("flash-attn-4", "4.0.0b20"),), semantics=Semantics(softcap=5.0))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (dict(capability=(8, 0)), "needs compute capability 9.0"),
        (dict(rocm=True), "ROCm"),
        (dict(dtype=torch.float32), "supports bfloat16, float16 only"),
        (dict(head_dim=264), "up to 256"),
        (dict(head_dim=192, value_head_dim=128, capability=(10, 0)), "up to 128 on this GPU, and this is 192"),
        (dict(head_dim=136, capability=(12, 0)), "up to 128 on this GPU"),
        (dict(capability=(12, 0), needs_grad=True, semantics=Semantics(deterministic=True)), "deterministic gradients on this GPU"),
        (dict(capability=(12, 0), needs_grad=True, semantics=Semantics(softcap=5.0)), "gradients of softcap on this GPU"),
        (dict(semantics=Semantics(dropout_p=0.1)), "dropout"),
        (dict(semantics=Semantics(alibi=True)), "ALiBi"),
        (dict(semantics=Semantics(score_bias=True)), "score bias"),
        (dict(semantics=Semantics(causal="top_left")), "top-left"),
        (dict(semantics=Semantics(scale=0.0)), "scale above 0"),
        (dict(transformed=True), "torch.func"),
        (dict(device_type="cpu"), "runs on cuda only"),
    ],
    ids=str,
)
def test_what_the_kernel_lacks_is_refused(fields: dict[str, Any], reason: str) -> None:
    packages = (("flash-attn-4", "4.0.0b36"),)
    assert reason in reasons(packages=packages, **fields)
    for capability in ((9, 0), (10, 0), (12, 0)):
        assert not reasons(packages=packages, capability=capability)


def test_what_it_has_is_not_refused() -> None:
    everything = Semantics(window=(3, 3), softcap=5.0, sinks=True, deterministic=True, return_lse=True)
    packages = (("flash-attn-4", "4.0.0b36"),)
    for capability in ((9, 0), (10, 0)):
        assert not reasons(packages=packages, capability=capability, needs_grad=True, tracing=True, semantics=everything)
    assert not reasons(packages=packages, head_dim=256, needs_grad=True)
    assert reasons(packages=()).startswith("the package flash-attn-4 is not among those stated")
