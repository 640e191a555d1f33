"""ROCm, Intel GPUs and Apple's: plans for stated problems. Nothing here runs on any of them, and no plan says that something has.

The rule: a kernel that was not run on a device is refused there. What is chosen is eager math on re-padded tensors, which calls no fused
kernel of another library.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.nn import attention
from torch.nn.attention import _registry
from torch.utils._python_dispatch import TorchDispatchMode

from varlen_attn import BACKENDS, BackendRefused, varlen_attention
from varlen_attn.attention.dispatch import Plan, choose
from varlen_attn.kernels import dense as _dense
from varlen_attn.kernels.dense import EAGER, dense_kernel
from varlen_attn.kernels.problem import Problem, Semantics
from varlen_attn.testing import assert_within_budget, reference_attention
from varlen_attn.testing.strategies import AttentionCase, attention_cases

NAMES = [b.name for b in BACKENDS]
FLASH = (("flash-attn", "2.8.3"),)
DEVICES: dict[str, dict[str, Any]] = {
    "rocm": dict(device_type="cuda", rocm=True),
    "xpu": dict(device_type="xpu", rocm=False),
    "mps": dict(device_type="mps", rocm=False),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    dict(causal="bottom_right"),
    dict(causal="bottom_right", self_attention=False),
    dict(causal="top_left", self_attention=False),
    dict(window=(3, None)),
    dict(softcap=20.0),
    dict(dropout_p=0.1),
    dict(alibi=True),
    dict(score_bias=True),
    dict(sinks=True),
    dict(return_lse=True),
    dict(deterministic=True, needs_grad=True),
    dict(num_kv_heads=2),
    dict(head_dim=17, value_head_dim=40),
    dict(head_dim=300),
    dict(host_lengths=False),
    dict(host_lengths=False, tracing=True, needs_grad=True),
)


def plan(device: str, dtype: torch.dtype = torch.float16, packages: Any = (), **fields: Any) -> Plan:
    options = {k: fields.pop(k) for k in tuple(fields) if k in Semantics.__dataclass_fields__}
    problem = Problem(torch_version="2.13.0", packages=packages, dtype=dtype, semantics=Semantics(**options), **DEVICES[device], **fields)
    return choose(problem, all_reasons=True)


def reasons(chosen: Plan, name: str) -> str:
    (decision,) = (d for d in chosen.decisions if d.backend == name)
    return "; ".join(str(r) for r in decision.reasons)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_a_plan_is_complete_and_chooses_what_is_right_there(device: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """R-11, R-25, R-39: every backend once, with reasons and fixes."""
    for packages in ((), FLASH):
        chosen = plan(device, dtype, packages, **options)
        assert [d.backend for d in chosen.decisions] == NAMES
        for decision in chosen.decisions:
            assert decision.accepted != bool(decision.reasons)
            assert all(r.reason.strip() and r.fix.strip() for r in decision.reasons)
        flash = device == "rocm" and chosen.backend == "flash2" and packages == FLASH and dtype in (torch.float16, torch.bfloat16)
        assert flash or (chosen.backend, chosen.kernel) == ("sdpa_padded", EAGER)


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_that_were_not_run_there_are_refused(device: str) -> None:
    chosen = plan(device)
    for name in set(NAMES) - {"sdpa_padded", "reference"}:
        with pytest.raises(BackendRefused):
            choose(replace(chosen.problem, requested=name))
    said = [name for name in NAMES if "is not known to be right on ROCm" in reasons(chosen, name)]
    assert said == (["flash3", "flash4", "torch_varlen", "mem_efficient", "nested", "flex"] if device == "rocm" else [])


@pytest.fixture
def fa4() -> Iterator[None]:
    """Stands for the real one, which needs flash-attn-4: it replaces ``aten::_flash_attention_forward``, and raises there for dropout."""

    class Handle:
        def remove(self) -> None: ...

    before = _registry._FLASH_ATTENTION_IMPLS.get("FA4")
    attention.register_flash_attention_impl("FA4", register_fn=Handle)
    attention.activate_flash_attention_impl("FA4")
    yield
    attention.restore_flash_attention_impl()
    attention.register_flash_attention_impl("FA4", register_fn=before)


HOPPER: dict[str, Any] = dict(device_type="cuda", capability=(9, 0), rocm=False, torch_version="2.13.0", packages=(), dtype=torch.bfloat16)


def test_a_plan_knows_that_torchs_flash_kernels_were_replaced(fa4: None) -> None:
    """What replaces them was not run, and is refused; a problem that says that nothing replaces them keeps its plan."""
    for dropout_p in (0.0, 0.1):
        chosen = choose(Problem(**HOPPER, semantics=Semantics.of(dropout_p=dropout_p)))
        assert chosen.backend not in ("torch_varlen", "nested")
        assert "activate_flash_attention_impl" in reasons(chosen, "torch_varlen")
        assert choose(replace(chosen.problem, flash_impl=None)).backend == "torch_varlen"
    with pytest.raises(BackendRefused, match=r"(?s)calls torch's flash kernels, in whose place .* put FA4. Fix: call .*restore_flash"):
        choose(Problem(**HOPPER, requested="torch_varlen"))


def test_no_fix_asks_for_what_the_machine_can_not_have() -> None:
    for device in DEVICES:
        chosen = plan(device, torch.bfloat16)
        for decision in chosen.decisions:
            assert ".to('cuda')" not in str(decision)
            assert "compute capability" not in str(decision)
    assert "use a machine with a CUDA device" in reasons(plan("mps"), "flex")
    assert ".to('cuda')" in reasons(choose(Problem(device_type="cpu"), all_reasons=True), "flex")


def test_rocm_is_a_machine_of_its_own() -> None:
    assert [Problem(**fields).machine for fields in DEVICES.values()] == ["rocm", "xpu", "mps"]
    assert Problem(device_type="cuda", rocm=False).machine == "cuda"
    assert Problem(device_type="cpu", rocm=True).machine == "cpu", "tensors on the CPU of such a build"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_fused_kernel_is_taken_for_granted(dtype: torch.dtype) -> None:
    for device_type, rocm in (("mps", False), ("xpu", False), ("cuda", True)):
        assert dense_kernel(Semantics(), device_type, dtype, rocm=rocm) == EAGER
    assert dense_kernel(Semantics(), "cpu", dtype) != EAGER
    assert (dense_kernel(Semantics(), "cuda", dtype, rocm=False) == EAGER) == (dtype == torch.float64)


class _Ops(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@settings(max_examples=25)
@given(case=attention_cases((torch.float32, torch.float16)))
def test_the_last_resort_there_is_eager_and_right(case: AttentionCase) -> None:
    """The route of those devices, taken on a CPU: no operation of the kernels of attention, forward and backward."""
    options = {k: v for k, v in case.semantics.items() if k != "batch_invariant"}
    qkv, grad = case.tensors()[:3], case.tensors()[3]
    layouts = (case.layout, case.layout_kv)
    with pytest.MonkeyPatch.context() as patch, _Ops() as ops:
        patch.setattr(_dense, "dense_kernel", lambda semantics, device_type, dtype, **machine: dense_kernel(semantics, "mps", dtype))
        out, lse = varlen_attention(*qkv, *layouts, backend="sdpa_padded", return_lse=True, **options)
        grads = torch.autograd.grad(out, qkv, grad)
    assert not [name for name in ops.names if "attention" in name or "sdp" in name]
    ref, ref_lse = reference_attention(*qkv, *layouts, return_lse=True, **options)
    naive, naive_lse = reference_attention(*qkv, *layouts, return_lse=True, dtype=case.dtype, **options)
    assert_within_budget(out, ref, naive, what="output")
    assert_within_budget(lse, ref_lse, naive_lse, what="lse")
    for got, want, eager in zip(grads, torch.autograd.grad(ref, qkv, grad.double()), torch.autograd.grad(naive, qkv, grad), strict=True):
        assert_within_budget(got, want.double(), eager, gradient=True)
