"""Which backend a machine gets, asked on this one: plans for stated problems. No kernel runs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from varlen_attn import BACKENDS
from varlen_attn.attention.dispatch import Plan, choose
from varlen_attn.kernels.base import Backend
from varlen_attn.kernels.cpu.build import why_not
from varlen_attn.kernels.problem import Problem, Semantics

FLASH = (("flash-attn", "2.8.3"),)
FLASH3, FLASH4 = (("flash-attn-3", "3.0.0b1"),), (("flash-attn-4", "4.0.0b36"),)
FLASH_CLASS = {"flash2", "flash3", "flash4", "torch_varlen", "nested"}
H100, A100, RTX4090, T4, V100, B200 = (9, 0), (8, 0), (8, 9), (7, 5), (7, 0), (10, 0)


def plan(capability: tuple[int, int] = H100, dtype: torch.dtype = torch.bfloat16, packages: Any = (), **fields: Any) -> Plan:
    options = {k: fields.pop(k) for k in tuple(fields) if k in Semantics.__dataclass_fields__}
    problem = Problem(
        device_type="cuda", capability=capability, rocm=fields.pop("rocm", False), torch_version="2.13.0", packages=packages,
        dtype=dtype, semantics=Semantics(**options), **fields,
    )  # fmt: skip
    return choose(problem, all_reasons=True)


def named(name: str) -> Backend:
    (backend,) = (b for b in BACKENDS if b.name == name)
    return backend


def reasons(chosen: Plan, name: str) -> str:
    (decision,) = (d for d in chosen.decisions if d.backend == name)
    return "; ".join(str(r) for r in decision.reasons)


# -------------------------------------------------------------------- which one


@pytest.mark.parametrize("capability", [A100, RTX4090, H100, B200])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [17, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("packages", [(), FLASH], ids=["torch only", "flash-attn"])
def test_half_precision_gets_flash_attention(capability: Any, dtype: torch.dtype, head_dim: int, packages: Any) -> None:
    for needs_grad, causal, lse in itertools.product((False, True), (False, "bottom_right"), (False, True)):
        chosen = plan(capability, dtype, packages, head_dim=head_dim, needs_grad=needs_grad, causal=causal, return_lse=lse)
        assert chosen.backend in FLASH_CLASS
        assert "scaled_dot_product" not in chosen.kernel


@pytest.mark.parametrize(
    ("fields", "without", "with_flash"),
    [
        ({}, "torch_varlen", "torch_varlen"),
        (dict(window=(4, 0)), "torch_varlen", "torch_varlen"),
        (dict(num_heads=8, num_kv_heads=2), "torch_varlen", "torch_varlen"),
        (dict(head_dim=64, value_head_dim=32), "torch_varlen", "torch_varlen"),
        (dict(host_lengths=False), "torch_varlen", "torch_varlen"),
        (dict(tracing=True, host_lengths=False, needs_grad=True), "torch_varlen", "torch_varlen"),
        (dict(dropout_p=0.1, needs_grad=True), "torch_varlen", "torch_varlen"),
        (dict(softcap=30.0), "flex", "flash2"),
        (dict(alibi=True), "flex", "flash2"),
        (dict(deterministic=True, needs_grad=True), "sdpa_padded", "flash2"),
        (dict(softcap=30.0, dropout_p=0.1), "sdpa_padded", "sdpa_padded"),
        (dict(sinks=True), "flex", "flex"),
        (dict(score_bias=True), "flex", "flex"),
        (dict(score_bias=True, needs_grad=True, num_kv_heads=2), "flex", "flex"),
        (dict(score_bias=True, dropout_p=0.1), "sdpa_padded", "sdpa_padded"),
        (dict(score_bias=True, tracing=True, host_lengths=False), "sdpa_padded", "sdpa_padded"),
        (dict(causal="top_left", self_attention=False), "mem_efficient", "mem_efficient"),
        (dict(head_dim=320), "mem_efficient", "mem_efficient"),
    ],
    ids=str,
)
def test_options_decide(fields: dict[str, Any], without: str, with_flash: str) -> None:
    assert plan(**fields).backend == without
    assert plan(packages=FLASH, **fields).backend == with_flash


@pytest.mark.parametrize(
    ("fields", "with_flash3", "with_flash4"),
    [
        ({}, "flash3", "flash4"),
        (dict(causal="bottom_right", num_heads=8, num_kv_heads=2, head_dim=17, value_head_dim=40), "flash3", "flash4"),
        (dict(tracing=True, host_lengths=False, needs_grad=True), "flash3", "flash4"),
        (dict(window=(4, 0), softcap=30.0, sinks=True, needs_grad=True, return_lse=True), "flash3", "flash4"),
        (dict(deterministic=True, needs_grad=True), "flash3", "flash4"),
        (dict(deterministic=True, needs_grad=True, head_dim=256), "sdpa_padded", "flash4"),
        (dict(capability=B200), "torch_varlen", "flash4"),
        (dict(capability=B200, sinks=True), "flex", "flash4"),
        (dict(capability=B200, head_dim=256), "torch_varlen", "torch_varlen"),
        (dict(capability=A100), "torch_varlen", "torch_varlen"),
        (dict(dropout_p=0.1), "torch_varlen", "torch_varlen"),
        (dict(alibi=True), "flex", "flex"),
        (dict(dtype=torch.float32), "mem_efficient", "mem_efficient"),
    ],
    ids=str,
)
def test_stated_packages_for_hopper_and_after_it(fields: dict[str, Any], with_flash3: str, with_flash4: str) -> None:
    assert plan(packages=FLASH3, **fields).backend == with_flash3
    assert plan(packages=FLASH4, **fields).backend == with_flash4
    assert plan(packages=FLASH3 + FLASH4, **fields).backend == (with_flash3 if with_flash3 == "flash3" else with_flash4)


def test_wheels_without_a_backward_are_for_inference() -> None:
    for package in ("tokenspeed-fa3", "fa3-fwd"):
        assert plan(packages=((package, "0.0.3"),)).backend == "flash3"
        trained = plan(packages=((package, "0.0.3"),), needs_grad=True)
        assert trained.backend == "torch_varlen"
        assert f"{package} 0.0.3 is compiled without a backward pass" in reasons(trained, "flash3")


@pytest.mark.parametrize(
    ("capability", "dtype", "backend"),
    [
        (T4, torch.float16, "mem_efficient"),
        (T4, torch.float32, "mem_efficient"),
        (V100, torch.float16, "mem_efficient"),
        (V100, torch.float32, "mem_efficient"),
        (A100, torch.float32, "mem_efficient"),
        (H100, torch.float32, "mem_efficient"),
        (A100, torch.bfloat16, "torch_varlen"),
        (H100, torch.float64, "sdpa_padded"),
        (T4, torch.float64, "sdpa_padded"),
    ],
    ids=str,
)
def test_machines_decide(capability: Any, dtype: torch.dtype, backend: str) -> None:
    for packages in ((), FLASH):
        assert plan(capability, dtype, packages).backend == backend


@pytest.mark.parametrize("capability", [T4, V100])
@pytest.mark.parametrize("causal", [False, "bottom_right"])
def test_bfloat16_on_old_gpus_is_eager(capability: Any, causal: Any) -> None:
    """Nothing fused has bfloat16 there, torch's nested attention included, which would say so in the middle of a call."""
    chosen = plan(capability, torch.bfloat16, causal=causal)
    assert chosen.backend == "sdpa_padded"
    assert "eager" in chosen.kernel
    assert "bfloat16" in reasons(chosen, "nested")
    assert "eager" not in plan(A100, torch.bfloat16, causal=causal, requested="sdpa_padded").kernel


def test_deterministic_gradients_on_a_gpu_are_not_left_to_a_kernel_that_adds_in_any_order() -> None:
    for mode, eager in ((False, True), (True, False)):
        chosen = plan(deterministic=True, needs_grad=True, deterministic_mode=mode, requested="sdpa_padded")
        assert ("eager" in chosen.kernel) == eager
    assert "eager" not in plan(deterministic=True, needs_grad=False, requested="sdpa_padded").kernel


@pytest.mark.parametrize("capability", [T4, V100])
def test_old_gpus_in_capacity_mode_and_graphs_are_padded(capability: Any) -> None:
    """Only the device knows whether a sequence is empty."""
    assert plan(capability, torch.float16, host_lengths=False).backend == "sdpa_padded"
    assert plan(capability, torch.float16, host_lengths=False, tracing=True).backend == "sdpa_padded"


def test_an_old_torch_or_flash_attn_changes_the_plan() -> None:
    old = Problem(device_type="cuda", capability=H100, rocm=False, torch_version="2.10.0", packages=FLASH, dtype=torch.float16)
    assert choose(old).backend == "flash2"
    assert plan(packages=(("flash-attn", "2.5.8"),), softcap=30.0).backend == "flex"
    assert "2.6" in reasons(plan(packages=(("flash-attn", "2.5.8"),), softcap=30.0), "flash2")


def test_rocm_never_drops_softcap() -> None:
    assert plan(None, packages=FLASH, rocm=True).backend == "flash2"  # type: ignore[arg-type]
    assert plan(None, packages=FLASH, rocm=True, softcap=30.0).backend == "sdpa_padded"  # type: ignore[arg-type]


@pytest.mark.native_too
def test_the_choice_without_a_gpu() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        packed = "cpu" if why_not() or dtype == torch.float64 else "cpu_native"
        assert choose(Problem(device_type="cpu", dtype=dtype)).backend == packed
    assert choose(Problem(device_type="mps")).backend == "sdpa_padded"


# -------------------------------------------------------------------- whatever is asked


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    dict(causal="bottom_right"),
    dict(causal="top_left", self_attention=False),
    dict(causal="bottom_right", self_attention=False),
    dict(window=(3, None)),
    dict(softcap=20.0),
    dict(alibi=True),
    dict(score_bias=True),
    dict(sinks=True),
    dict(return_lse=True),
    dict(deterministic=True),
    dict(num_kv_heads=1),
    dict(head_dim=17, value_head_dim=40),
    dict(head_dim=300),
)
MACHINES: tuple[dict[str, Any], ...] = tuple(
    dict(capability=capability, dtype=dtype, packages=packages)
    for capability, dtype, packages in itertools.product(
        (V100, T4, A100, RTX4090, H100, B200), (torch.float16, torch.bfloat16, torch.float32), ((), FLASH, FLASH3, FLASH4)
    )
)
DECLARED = ("dropout", "softcap", "alibi", "score_bias", "sinks", "window", "return_lse")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_semantic_never_lands_on_a_backend_without_it(options: dict[str, Any], dropout_p: float) -> None:
    for machine, (needs_grad, tracing, host) in itertools.product(
        MACHINES, ((True, False, True), (True, True, False), (False, False, False))
    ):
        chosen = plan(**machine, **options, dropout_p=dropout_p, needs_grad=needs_grad, tracing=tracing, host_lengths=host)
        can = named(chosen.backend).capabilities
        asked = {"dropout": dropout_p > 0, **{name: bool(options.get(name)) for name in DECLARED if name != "dropout"}}
        assert all(getattr(can, name) for name, wanted in asked.items() if wanted), chosen
        assert machine["dtype"] in can.dtypes
        assert chosen.backend not in ("reference", "cpu")
        if chosen.backend in ("flash3", "flash4"):
            assert machine["packages"] == (FLASH3 if chosen.backend == "flash3" else FLASH4)
        for decision in chosen.decisions:
            assert decision.accepted != bool(decision.reasons)
            for refusal in decision.reasons:
                assert refusal.reason.strip(), decision
                assert refusal.fix.strip(), decision


@pytest.mark.native_too
def test_a_plan_names_every_backend_once() -> None:
    names = [b.name for b in BACKENDS]
    assert names == [
        "flash3", "flash4", "torch_varlen", "flash2", "mem_efficient", "nested", "flex", "cpu_native", "cpu", "sdpa_padded",
        "reference",
    ]  # fmt: skip
    for machine, options in itertools.product(MACHINES, OPTIONS):
        chosen = plan(**machine, **options)
        assert [d.backend for d in chosen.decisions] == names
        lines = [line.split(":")[0].split() for line in chosen.details().splitlines() if line.startswith(("  > ", "  + ", "  - "))]
        assert [name for name, _ in itertools.groupby(words[-1] for words in lines)] == names


def test_a_plan_depends_on_nothing_else() -> None:
    first = plan(dropout_p=0.1, needs_grad=True)
    torch.manual_seed(3)
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert [str(d) for d in plan(dropout_p=0.1, needs_grad=True).decisions] == [str(d) for d in first.decisions]
        assert [b.refusals(first.problem) for b in BACKENDS] == [d.reasons for d in first.decisions]
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


@pytest.mark.native_too
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_every_backend_names_its_kernel(backend: Backend) -> None:
    for device_type, dropout_p in itertools.product(("cpu", "cuda"), (0.0, 0.1)):
        problem = Problem(device_type=device_type, capability=H100, rocm=False, semantics=Semantics(dropout_p=dropout_p))
        assert backend.kernel(problem).strip()
