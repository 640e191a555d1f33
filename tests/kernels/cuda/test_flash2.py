"""Which flash-attn is here: versions by their signatures, broken packages, packages that only look like it. And how each is called."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from varlen_attn import SeqLayout, varlen_attention
from varlen_attn.kernels import problem
from varlen_attn.kernels.cuda import flash2
from varlen_attn.kernels.cuda import packages as _packages
from varlen_attn.kernels.cuda.flash2 import Flash2
from varlen_attn.kernels.problem import Problem, Semantics
from varlen_attn.testing import assert_within_budget, reference_attention

from ..fake_kernels import GRID, Finder, check_loads, flash_semantics, for_cpu, sequences

Install = Callable[..., None]


def gpu(**fields: Any) -> Problem:
    return Problem(**{"device_type": "cuda", "capability": (9, 0), "rocm": False, "dtype": torch.float16, **fields})


def reasons(**fields: Any) -> str:
    return "; ".join(str(r) for r in Flash2().refusals(gpu(**fields)))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    def put(version: str | None, execute: Callable[[types.ModuleType], None]) -> None:
        monkeypatch.setitem(problem._versions, "flash-attn", version)
        monkeypatch.setattr(_packages, "_probed", {})
        monkeypatch.setattr(sys, "meta_path", [Finder(execute, "flash_attn"), *sys.meta_path])
        for name in [n for n in sys.modules if n.partition(".")[0] == "flash_attn"]:
            monkeypatch.delitem(sys.modules, name)
        for name in ("flash_attn", "flash_attn.flash_attn_interface"):
            monkeypatch.setitem(sys.modules, name, None)  # so that what the test imports is forgotten afterwards
            del sys.modules[name]

    return put


# -------------------------------------------------------------------- signatures


class Kernel:
    """What the fakes of all versions run: the trap of the decoding shortcut, unwritten rows, +inf for rows without keys."""

    def __init__(self, padded_lse: bool) -> None:
        self.padded_lse = padded_lse
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
        dropout_p: float, softmax_scale: float, causal: bool, window_size: tuple[int, int], return_attn_probs: bool, **options: Any,
    ) -> Any:  # fmt: skip
        self.calls.append(dict(window_size=window_size, **options))
        assert not (max_seqlen_q == 1 and q.shape[1] > k.shape[1])
        assert q.shape[2] == k.shape[2] == v.shape[2]
        check_loads(q, k, v)
        assert 1 < len(cu_seqlens_q) <= GRID + 1
        semantics = flash_semantics(causal, *window_size, max_seqlen_k, max_seqlen_k)
        semantics = replace(semantics, softcap=options.get("softcap") or None)
        lengths = cu_seqlens_q.diff().tolist()
        out = torch.full_like(q, float("nan"))
        lse = torch.full((len(lengths), q.shape[1], max_seqlen_q), float("inf"))
        for i, s in enumerate(
            sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, semantics, dropout_p, 0, options["alibi_slopes"])
        ):
            out = out.index_put((torch.arange(s.rows_q.start, s.rows_q.stop),), s.out.transpose(0, 1).to(q.dtype))
            lse[i, :, : lengths[i]] = s.lse.float().masked_fill(s.lse.isneginf(), float("inf"))
        if not self.padded_lse:
            unwritten = torch.full((q.shape[1], q.shape[0] - sum(lengths)), float("nan"))
            lse = torch.cat([*(block[:, :n] for block, n in zip(lse, lengths, strict=True)), unwritten], 1)
        return (out, lse, None) if return_attn_probs else out


def version_2_5(kernel: Kernel) -> Any:
    def flash_attn_varlen_func(  # type: ignore[no-untyped-def]
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        return kernel(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
            return_attn_probs, alibi_slopes=alibi_slopes, deterministic=deterministic,
        )  # fmt: skip

    return flash_attn_varlen_func


def version_2_6(kernel: Kernel) -> Any:
    def flash_attn_varlen_func(  # type: ignore[no-untyped-def]
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        return kernel(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
            return_attn_probs, softcap=softcap, alibi_slopes=alibi_slopes, deterministic=deterministic,
        )  # fmt: skip

    return flash_attn_varlen_func


VERSIONS = {"2.5.9.post1": version_2_5, "2.6.3": version_2_6, "2.7.4.post1": version_2_6, "2.8.3.post2": version_2_6}


@pytest.fixture
def fake(install: Install) -> Callable[[str], Kernel]:
    def put(version: str) -> Kernel:
        kernel = Kernel(padded_lse=version.startswith("2.5"))

        def execute(module: types.ModuleType) -> None:
            if module.__name__ == "flash_attn.flash_attn_interface":
                module.flash_attn_varlen_func = VERSIONS[version](kernel)  # type: ignore[attr-defined]
                module.USE_TRITON_ROCM = False  # type: ignore[attr-defined]

        install(version, execute)
        return kernel

    return put


HERE = for_cpu(Flash2)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash2, "_device_refusals", lambda problem: ())


SLOPES = torch.tensor([0.5, 0.25])
CASES: dict[str, tuple[list[int], list[int] | None, tuple[int, int], tuple[int, int], dict[str, Any]]] = {
    "causal, grouped heads, odd dimensions": ([5, 7, 1], None, (4, 2), (17, 9), dict(causal=True)),
    "window": ([9, 4], None, (2, 2), (8, 8), dict(window=(2, 1))),
    "causal window": ([9, 4], None, (2, 2), (8, 8), dict(causal=True, window=(2, 3))),
    "window, open on the right, more queries": ([12, 3], [5, 9], (2, 2), (8, 8), dict(window=(2, None))),
    "softcap": ([9, 4], None, (2, 2), (8, 8), dict(softcap=1.5)),
    "ALiBi": ([9, 4], [5, 7], (2, 2), (8, 8), dict(alibi_slopes=SLOPES)),
    "ALiBi, causal": ([9, 4], None, (2, 2), (8, 8), dict(causal=True, alibi_slopes=SLOPES)),
    "ALiBi, causal, cross": ([9, 4, 2, 0], [5, 7, 0, 2], (2, 2), (8, 8), dict(causal=True, alibi_slopes=SLOPES)),
    "ALiBi, causal window": ([9, 4], [5, 7], (2, 2), (8, 8), dict(causal=True, window=(2, 0), alibi_slopes=SLOPES)),
    "ALiBi, causal window that cuts nothing": ([9, 4], [5, 7], (2, 2), (8, 8), dict(causal=True, window=(7, 0), alibi_slopes=SLOPES)),
    "cross, causal, empty sequences": ([5, 0, 4, 3], [2, 4, 0, 6], (2, 2), (8, 8), dict(causal=True)),
    "one query each, grouped heads": ([1, 0, 1], [3, 2, 4], (4, 2), (8, 8), {}),
    "no sequences": ([], [], (2, 2), (8, 8), {}),
}


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_every_version_is_called_by_its_own_signature(fake: Callable[[str], Kernel], version: str, case: str) -> None:
    if case == "softcap" and version.startswith("2.5"):
        pytest.skip("has none")
    kernel = fake(version)
    assert Flash2().missing(gpu()) is None
    lengths_q, lengths_k, heads, dims, options = CASES[case]
    layouts = (SeqLayout.from_lengths(lengths_q), None if lengths_k is None else SeqLayout.from_lengths(lengths_k))
    tk = sum(lengths_q if lengths_k is None else lengths_k)
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths_q), heads[0], dims[0]), (tk, heads[1], dims[0]), (tk, heads[1], dims[1]))
    qkv = [torch.randn(shape, generator=generator).half() for shape in shapes]
    out, lse = varlen_attention(*qkv, *layouts, backend=HERE, return_lse=True, **options)
    ref, ref_lse = reference_attention(*qkv, *layouts, return_lse=True, **options)
    assert_within_budget(out, ref, reference_attention(*qkv, *layouts, dtype=torch.float16, **options))
    torch.testing.assert_close(lse.double(), ref_lse, atol=1e-6, rtol=1e-6)
    assert torch.equal(varlen_attention(*qkv, *layouts, backend=HERE, **options), out), "a tensor without the log-sum-exp, not a tuple"
    assert len(kernel.calls) == (2 if lengths_q else 0)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("version", VERSIONS)
def test_slack_rows_are_zero(fake: Callable[[str], Kernel], version: str) -> None:
    fake(version)
    layout = SeqLayout.from_key_padding_mask(torch.tensor([[False] * 4, [False] * 2 + [True] * 2]), capacity=8)
    x = torch.randn(8, 2, 8, dtype=torch.float16)
    out, lse = varlen_attention(x, x, x, layout, backend=HERE, return_lse=True)
    assert bool(out.isfinite().all())
    assert not out[6:].any()
    assert bool(lse[:, 6:].isneginf().all())
    assert bool(lse[:, :6].isfinite().all())


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("version", ["2.5.9.post1", "2.8.3.post2"])
def test_more_sequences_than_a_grid_counts_run_in_parts(fake: Callable[[str], Kernel], version: str) -> None:
    kernel, layout = fake(version), SeqLayout.from_lengths([3, 0, 4, 2, 5])
    q, k, v = torch.randn(3, layout.num_rows, 2, 8).half()

    want, got = (
        varlen_attention(q, k, v, layout, backend=backend, causal=True, return_lse=True)
        for backend in (HERE, for_cpu(Flash2, max_sequences=2))
    )
    assert len(kernel.calls) == 1 + 3
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.usefixtures("on_cpu")
def test_options_reach_the_kernel(fake: Callable[[str], Kernel]) -> None:
    kernel = fake("2.8.3.post2")
    layout = SeqLayout.from_lengths([6])
    x = torch.randn(6, 2, 8, dtype=torch.float16)
    slopes = torch.tensor([0.5, 0.25], dtype=torch.float16)
    varlen_attention(x, x, x, layout, backend=HERE, softcap=5.0, alibi_slopes=slopes, deterministic=True)
    (call,) = kernel.calls
    assert call["softcap"] == 5.0
    assert call["deterministic"] is True
    assert call["alibi_slopes"].dtype == torch.float32, "the kernel takes slopes in float32 only"
    varlen_attention(x, x, x, layout, backend=HERE)
    assert kernel.calls[1] == dict(window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False)


@pytest.mark.parametrize(
    ("version", "semantics", "need"),
    [
        ("2.0.9", Semantics(), "2.1"),
        ("2.2.5", Semantics(window=(1, 1)), "2.3"),
        ("2.3.6", Semantics(alibi=True), "2.4"),
        ("2.4.0", Semantics(deterministic=True), "2.4.1"),
        ("2.5.9.post1", Semantics(softcap=5.0), "2.6"),
    ],
)
def test_older_versions_are_refused_for_what_they_lack(version: str, semantics: Semantics, need: str) -> None:
    """By version, for a machine that is not here: nothing is imported."""
    text = reasons(semantics=semantics, packages=(("flash-attn", version),))
    assert f"needs flash-attn {need} or newer" in text
    assert version in text
    assert not reasons(semantics=semantics, packages=(("flash-attn", need),))


def test_a_version_that_lies_about_its_signature_is_refused(install: Install) -> None:
    def execute(module: types.ModuleType) -> None:
        module.flash_attn_varlen_func = version_2_5(Kernel(True))  # type: ignore[attr-defined]

    install("2.8.3", execute)
    assert not reasons()
    assert "has no parameter softcap" in reasons(semantics=Semantics(softcap=5.0))


def test_blackwell_needs_a_version_that_knows_it() -> None:
    assert "2.7.3" in reasons(capability=(10, 0), packages=(("flash-attn", "2.6.3"),))
    assert not reasons(capability=(10, 0), packages=(("flash-attn", "2.8.3"),))


# -------------------------------------------------------------------- broken packages and impostors


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libcudart.so.12: cannot open shared object file: No such file or directory"),
        ModuleNotFoundError("No module named 'flash_attn_2_cuda'"),
        OSError("flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocationENSt7__cxx1112basic_string"),
        RuntimeError("operator torchvision::nms does not exist"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_broken_package_is_survived_and_quoted(install: Install, error: Exception) -> None:
    def execute(module: types.ModuleType) -> None:
        raise error

    install("2.8.3", execute)
    text = reasons()
    assert "flash-attn 2.8.3 is installed, but importing it raises" in text
    assert type(error).__name__ in text
    assert str(error) in text
    assert Flash2().refusals(gpu())[0].kind == "missing"


def test_warnings_of_the_package_are_not_the_callers_business(install: Install) -> None:
    import warnings

    def execute(module: types.ModuleType) -> None:
        warnings.warn("this package warns", FutureWarning, stacklevel=1)
        module.flash_attn_varlen_func = version_2_6(Kernel(False))  # type: ignore[attr-defined]

    install("2.8.3", execute)
    assert not reasons()


def test_a_package_without_the_function_is_refused(install: Install) -> None:
    install("2.8.3", lambda module: None)
    assert "has no function flash_attn_varlen_func" in reasons()


def test_a_function_of_another_kind_is_refused(install: Install) -> None:
    def execute(module: types.ModuleType) -> None:
        module.flash_attn_varlen_func = lambda q, k, v, causal=False: q  # type: ignore[attr-defined]

    install("1.0.0", execute)
    text = reasons()
    assert "has no parameter cu_seqlens_q, cu_seqlens_k" in text
    assert "needs flash-attn 2.1 or newer" in text


def test_another_distribution_with_a_module_of_that_name_is_not_flash_attn(install: Install) -> None:
    """fake-flash-attention, mtlflashattn: a module that would even run, and is something else."""
    imported = []
    install(None, lambda module: imported.append(module.__name__))
    assert "belongs to another distribution" in reasons()
    assert not imported, "it is not imported to find that out"


def test_the_namespace_package_of_flash_attn_4_is_not_flash_attn(install: Install, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    install(None, lambda module: None)
    monkeypatch.setattr(sys, "meta_path", [m for m in sys.meta_path if not isinstance(m, Finder)])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    assert "belongs to another distribution" in reasons()


def test_nothing_installed_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(problem._versions, "flash-attn", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refusal, *_ = Flash2().refusals(gpu())
    assert refusal.reason == "the package flash-attn is not installed"
    assert "pip install" in refusal.fix


def test_what_is_stated_is_trusted_and_nothing_here_is_imported(install: Install) -> None:
    imported = []
    install("2.8.3", lambda module: imported.append(module.__name__))
    assert not reasons(packages=(("flash-attn", "2.8.3"),))
    assert "not among those stated" in reasons(packages=())
    assert not imported


def test_the_probe_runs_once(install: Install) -> None:
    imported = []

    def execute(module: types.ModuleType) -> None:
        imported.append(module.__name__)
        raise ImportError("broken")

    install("2.8.3", execute)
    assert reasons() == reasons()
    assert imported == ["flash_attn"]


def test_a_cpu_call_never_imports_it(install: Install) -> None:
    imported = []
    install("2.8.3", lambda module: imported.append(module.__name__))
    assert Flash2().refusals(Problem(device_type="cpu"), all_reasons=False)
    assert not imported


def test_the_package_installed_here_is_broken_and_survived() -> None:
    """Without a GPU the package builds without its binary: a real broken package, where it is installed."""
    version = problem.installed_version("flash-attn")
    if version is None or torch.cuda.is_available():
        pytest.skip("needs flash-attn without its CUDA binary")
    text = reasons()
    assert f"flash-attn {version} is installed, but importing it raises ModuleNotFoundError" in text
    assert "flash_attn_2_cuda" in text


# -------------------------------------------------------------------- builds


@pytest.mark.parametrize(
    ("semantics", "reason"),
    [
        (Semantics(window=(2, 2)), "ignores windows"),
        (Semantics(softcap=5.0), "ignores softcap"),
        (Semantics(alibi=True), "ALiBi"),
        (Semantics(dropout_p=0.1), "same dropout mask"),
    ],
)
def test_the_triton_build_is_recognised(install: Install, monkeypatch: pytest.MonkeyPatch, semantics: Semantics, reason: str) -> None:
    def execute(module: types.ModuleType) -> None:
        module.flash_attn_varlen_func = version_2_6(Kernel(False))  # type: ignore[attr-defined]
        module.USE_TRITON_ROCM = True  # type: ignore[attr-defined]

    install("2.8.3", execute)
    monkeypatch.setenv("FLASH_ATTENTION_TRITON_AMD_ENABLE", "TRUE")
    assert reason in reasons(rocm=True, semantics=semantics), "by what the import will make of it"
    importlib.import_module("flash_attn.flash_attn_interface")
    monkeypatch.delenv("FLASH_ATTENTION_TRITON_AMD_ENABLE")
    assert reason in reasons(rocm=True, semantics=semantics), "by the imported module"
    assert not reasons(rocm=True)


def test_the_other_rocm_build_ignores_softcap() -> None:
    packages = (("flash-attn", "2.8.3"),)
    assert "ignores softcap" in reasons(rocm=True, packages=packages, semantics=Semantics(softcap=5.0))
    assert not reasons(rocm=True, packages=packages, semantics=Semantics(window=(2, 2), alibi=True))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (dict(capability=(7, 5)), "needs compute capability 8.0"),
        (dict(dtype=torch.float32), "supports bfloat16, float16 only"),
        (dict(dtype=torch.float64), "supports bfloat16"),
        (dict(head_dim=264), "up to 256"),
        (dict(semantics=Semantics(softcap=5.0, dropout_p=0.1)), "softcap together with dropout"),
        (dict(semantics=Semantics(return_lse=True, dropout_p=0.1)), "all attention weights"),
        (dict(semantics=Semantics(dropout_p=0.1), head_dim=200, needs_grad=True, capability=(8, 6)), "wrong backward"),
        (dict(semantics=Semantics(causal="top_left")), "top-left"),
        (dict(semantics=Semantics(sinks=True)), "sinks"),
        (dict(semantics=Semantics(score_bias=True)), "score bias"),
        (dict(device_type="cpu"), "runs on a GPU"),
        (dict(device_type="mps"), "tensors are on mps"),
    ],
    ids=str,
)
def test_what_the_kernel_lacks_is_refused(fields: dict[str, Any], reason: str) -> None:
    packages = (("flash-attn", "2.8.3"),)
    assert reason in reasons(packages=packages, **fields)
    assert not reasons(packages=packages)
