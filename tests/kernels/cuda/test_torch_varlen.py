"""The adapter of torch's varlen kernel: torch's real Python on a stand-in kernel, traces on meta tensors, signatures of other versions."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from varlen_attn import Refusal, SeqLayout, padded_attention, varlen_attention
from varlen_attn.kernels.cuda import torch_varlen
from varlen_attn.kernels.cuda.fit import aligned
from varlen_attn.kernels.cuda.torch_varlen import TorchVarlen
from varlen_attn.kernels.problem import Problem, Semantics
from varlen_attn.kernels.values import Extras
from varlen_attn.testing import assert_within_budget, reference_attention

from ..fake_kernels import flash_backward, flash_forward, for_cpu, on_cpu

HERE = for_cpu(TorchVarlen)


@pytest.fixture
def kernel() -> Iterator[None]:
    with on_cpu(_flash_attention_forward=flash_forward, _flash_attention_backward=flash_backward):
        yield


def tensors(lengths_q: list[int], lengths_k: list[int], heads: tuple[int, int], dims: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths_q), heads[0], dims[0]), (sum(lengths_k), heads[1], dims[0]), (sum(lengths_k), heads[1], dims[1]))
    return [torch.randn(shape, generator=generator).half().requires_grad_() for shape in shapes]


CASES: dict[str, tuple[list[int], list[int] | None, tuple[int, int], tuple[int, int], dict[str, Any]]] = {
    "self": ([5, 7, 1], None, (2, 2), (16, 16), {}),
    "causal, grouped heads, odd dimensions": ([5, 7, 1], None, (4, 2), (17, 9), dict(causal=True)),
    "window": ([9, 4], None, (2, 2), (8, 8), dict(window=(2, 1))),
    "causal window, one side": ([9, 4], None, (2, 2), (8, 8), dict(window=(None, 1))),
    "causal window": ([9, 4], None, (2, 2), (8, 8), dict(causal=True, window=(2, 3))),
    "window, open on the right, more queries": ([12, 3], [5, 9], (2, 2), (8, 8), dict(window=(2, None))),
    "window, wide on the right, more queries": ([12, 3], [5, 9], (2, 2), (8, 8), dict(window=(2, 10))),
    "window, open on the left, more queries": ([12, 3], [5, 9], (2, 2), (8, 8), dict(window=(None, 10))),
    "cross": ([5, 0, 4, 3], [2, 4, 0, 6], (2, 1), (8, 8), dict(scale=0.4)),
    "cross, causal": ([5, 0, 4, 3], [2, 4, 0, 6], (2, 2), (8, 8), dict(causal=True)),
    "one query each, grouped heads": ([1, 0, 1], [3, 2, 4], (4, 2), (8, 8), {}),
    "no sequences": ([], [], (2, 2), (8, 8), {}),
}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference_forward_and_backward(case: str) -> None:
    lengths_q, lengths_k, heads, dims, options = CASES[case]
    layouts = (SeqLayout.from_lengths(lengths_q), None if lengths_k is None else SeqLayout.from_lengths(lengths_k))
    qkv = tensors(lengths_q, lengths_k or lengths_q, heads, dims)
    out, lse = varlen_attention(*qkv, *layouts, backend=HERE, return_lse=True, **options)
    ref, ref_lse = reference_attention(*qkv, *layouts, return_lse=True, **options)
    naive = reference_attention(*qkv, *layouts, dtype=torch.float16, **options)
    assert_within_budget(out, ref, naive)
    torch.testing.assert_close(lse.double(), ref_lse, atol=1e-6, rtol=1e-6)
    assert not lse.requires_grad
    grads, ref_grads, naive_grads = (torch.autograd.grad(x.sum(), qkv) for x in (out, ref, naive))  # a broadcast gradient
    for got, want, eager in zip(grads, ref_grads, naive_grads, strict=True):
        assert_within_budget(got, want.double(), eager, gradient=True)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_rows_that_the_kernel_leaves_unwritten_are_zero(dropout_p: float) -> None:
    mask = torch.tensor([[False] * 4, [False] * 2 + [True] * 2])
    layout = SeqLayout.from_key_padding_mask(mask, capacity=8)
    qkv = tensors([8], [8], (2, 2), (8, 8))
    out, lse = varlen_attention(*qkv, layout, backend=HERE, dropout_p=dropout_p, return_lse=True)
    grads = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert all(bool(x.isfinite().all()) and not x[6:].any() for x in (out, *grads))
    assert bool(lse[:, 6:].isneginf().all())


@pytest.mark.usefixtures("kernel")
def test_rows_that_the_kernel_could_not_load_are_copied() -> None:
    """Parts of a fused projection beside something else: at another address, or with rows that are no multiple of 16 bytes."""
    layout = SeqLayout.from_lengths([6, 4])
    for before, after in ((4, 4), (4, 0), (0, 4)):
        fused = torch.randn(10, before + 3 * 2 * 8 + after).half()
        q, k, v = fused[:, before : before + 48].unflatten(1, (3, 2, 8)).unbind(1)
        out = varlen_attention(q, k, v, layout, backend=HERE)
        assert torch.equal(out, varlen_attention(*(x.contiguous() for x in (q, k, v)), layout, backend=HERE))
    one = torch.randn(10, 1, 8).half().expand(10, 2, 8)
    assert torch.equal(varlen_attention(q, one, v, layout, backend=HERE), varlen_attention(q, one.contiguous(), v, layout, backend=HERE))


def test_rows_that_the_kernel_can_load_are_not_copied() -> None:
    fused = torch.randn(10, 3, 2, 8).half()
    assert all(aligned(x) is x for x in fused.unbind(1))
    assert aligned(fused[1:, 1]).data_ptr() == fused[1:, 1].data_ptr()
    assert aligned(torch.frombuffer(bytearray(2 * 24 + 2), dtype=torch.float16, offset=2).view(3, 1, 8)).data_ptr() % 16 == 0


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_rows_that_the_kernel_could_not_load_do_not_reach_it_from_a_graph() -> None:
    """A graph cannot ask for an address: rows are copied, an offset is an error."""

    def call(fused: Tensor, before: int) -> Tensor:
        return aligned(fused[:, before : before + 8]) + 1

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for width, before in ((12, 4), (16, 0), (16, 8)):
        fused = torch.randn(3, width).half()
        assert torch.equal(compiled(fused, before), fused[:, before : before + 8] + 1)
    with pytest.raises(RuntimeError, match="divisible by 8"):
        compiled(torch.randn(3, 16).half(), 4)


def test_capacity_costs_no_copy_before_the_kernel() -> None:
    """Rows that the kernel never reads need no zeros; only their gradients do."""
    seen: list[int] = []

    class Looking(type(HERE)):  # type: ignore[misc]
        def run(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
            seen.extend(x.data_ptr() for x in (query, key, value))
            return query * key * value, None

    layout = SeqLayout.from_key_padding_mask(torch.tensor([[False, False, True]]), capacity=3)
    qkv = tensors([3], [3], (2, 2), (8, 8))
    out = varlen_attention(*qkv, layout, backend=Looking())
    assert seen == [x.data_ptr() for x in qkv]
    grads = torch.autograd.grad(out, qkv, torch.full_like(out, float("nan")))
    assert all(not x[2:].any() and bool(x[:2].isnan().all()) for x in grads)


@pytest.mark.usefixtures("kernel")
def test_dropout_reaches_the_kernel_and_its_backward() -> None:
    layout = SeqLayout.from_lengths([6])
    qkv = tensors([6], [6], (2, 2), (8, 8))
    plain = varlen_attention(*qkv, layout, backend=HERE)
    outs = [varlen_attention(*qkv, layout, backend=HERE, dropout_p=0.5) for _ in range(200)]
    assert not torch.equal(outs[0], outs[1])
    torch.testing.assert_close(torch.stack(outs).mean(0), plain, atol=0.35, rtol=0)
    (dv,) = torch.autograd.grad(outs[0].sum(), qkv[2])
    linear = (dv.double() * qkv[2].double()).sum()  # the output is linear in the values
    torch.testing.assert_close(linear, outs[0].double().sum(), atol=0.05, rtol=0.01)


@pytest.mark.usefixtures("kernel")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does that to autograd functions
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compiles_as_one_graph(dropout_p: float) -> None:
    def call(query: Tensor, key: Tensor, value: Tensor, layout: SeqLayout) -> Any:
        return padded_attention(query, key, value, layout=layout, backend=HERE, causal=True, dropout_p=dropout_p)

    layout = SeqLayout.from_lengths([5, 3], padded_len=6)
    qkv = [x.detach().view(2, 6, -1, 12).requires_grad_() for x in tensors([12], [12], (4, 2), (12, 12))]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    if dropout_p:
        assert compiled(*qkv, layout).shape == (2, 6, 4, 12)
        return
    got, want = compiled(*qkv, layout), call(*qkv, layout)
    assert torch.equal(got, want)
    got_grads, want_grads = (torch.autograd.grad(x, qkv, torch.ones_like(x)) for x in (got, want))
    assert all(torch.equal(x, y) for x, y in zip(got_grads, want_grads, strict=True))


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_traces_forward_and_backward_on_meta_tensors(dropout_p: float, newer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Python there is an op around the other, which costs the host; it is called where it may choose another kernel."""
    monkeypatch.setattr(torch_varlen, "_KNOWS_CUDNN", newer)
    op = "torch_attn._varlen_attn" if newer and not dropout_p else "aten._flash_attention"
    forward, backward = f"{op}_forward.default" if op.startswith("aten") else f"{op}.default", f"{op}_backward.default"
    layout = SeqLayout.from_lengths([5, 7]).to("meta")
    semantics = Semantics(causal="bottom_right", scale=0.1, dropout_p=dropout_p)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Any:
        out, _ = TorchVarlen().run(query, key, value, layout, layout, semantics, Extras())
        return out, torch.autograd.grad(out.sum(), (query, key, value))

    qkv = [torch.empty(12, n, 16, dtype=torch.float16, device="meta", requires_grad=True) for n in (4, 2, 2)]
    targets = [str(node.target) for node in make_fx(call)(*qkv).graph.nodes if node.op == "call_function"]
    assert targets.count(forward) == 1
    assert targets.count(backward) == 1


# -------------------------------------------------------------------- other versions of torch


def varlen_attn_2_15(  # type: ignore[no-untyped-def]
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False,
    seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """A scale is checked, and cuDNN's causal mask, aligned top-left, is for one tensor of offsets."""
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be greater than 0, got {scale}")
    CALLS.append(dict(scale=scale, window_size=window_size, enable_gqa=enable_gqa, cudnn_causal=cu_seq_q is cu_seq_k))
    return torch.zeros_like(query), query.new_zeros(query.shape[1], query.shape[0])


CALLS: list[dict[str, Any]] = []


@pytest.fixture
def fake_torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(function: Any) -> None:
        module = types.ModuleType("torch.nn.attention.varlen")
        module.varlen_attn = function  # type: ignore[attr-defined]
        module.AuxRequest = lambda lse: lse  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
        monkeypatch.setattr(torch_varlen, "_KNOWS_CUDNN", True)
        CALLS.clear()

    return install


def machine(**fields: Any) -> Problem:
    return Problem(**{"device_type": "cuda", "capability": (9, 0), "rocm": False, "dtype": torch.bfloat16, **fields})


def test_grouped_heads_are_announced_where_torch_wants_it(fake_torch: Any) -> None:
    fake_torch(varlen_attn_2_15)
    layout = SeqLayout.from_lengths([5])
    query, key = torch.zeros(5, 4, 8, dtype=torch.float16), torch.zeros(5, 2, 8, dtype=torch.float16)
    TorchVarlen().run(query, key, key, layout, layout, Semantics(causal="bottom_right", scale=0.1), Extras())
    assert [dict(scale=0.1, window_size=(-1, 0), enable_gqa=True, cudnn_causal=True)] == CALLS
    assert isinstance(CALLS[0]["window_size"], tuple), "a list compares unequal to (-1, 0), and causal would be lost"


def test_unequal_lengths_never_share_their_offsets(fake_torch: Any) -> None:
    """What torch 2.15 tells by the tensor's identity: cuDNN would align the causal mask at the first key."""
    fake_torch(varlen_attn_2_15)
    x = torch.zeros(5, 2, 8, dtype=torch.float16)
    layouts = [SeqLayout.from_lengths(lengths) for lengths in ([5, 0], [1, 4])]
    TorchVarlen().run(x, x, x, *layouts, Semantics(causal="bottom_right", scale=0.1), Extras())
    assert CALLS[0]["cudnn_causal"] is False


@pytest.mark.parametrize("torch_version", ["2.13.0", "2.15.0"])
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_scale_of_0_or_below_is_refused(torch_version: str, scale: float) -> None:
    """torch 2.15 raises; before that, the kernel would overflow or give NaN."""
    (refusal,) = TorchVarlen().refusals(machine(torch_version=torch_version, semantics=Semantics(scale=scale)))
    assert "needs a scale above 0" in refusal.reason
    assert not TorchVarlen().refusals(machine(torch_version=torch_version, semantics=Semantics(scale=0.5)))


@pytest.mark.parametrize(
    ("fields", "since"),
    [
        ({}, "2.14"),
        (dict(capability=(10, 0)), "2.14"),
        (dict(self_attention=False), "2.14"),
        (dict(num_kv_heads=2), "2.15"),
        (dict(semantics=Semantics(causal="bottom_right")), "2.15"),
        (dict(semantics=Semantics(causal="bottom_right"), self_attention=False), "never"),
        (dict(semantics=Semantics(window=(3, 3))), "never"),
        (dict(semantics=Semantics(dropout_p=0.1)), "never"),
        (dict(capability=(8, 0)), "never"),
        (dict(capability=(12, 0)), "never"),
    ],
    ids=str,
)
def test_where_torch_may_run_cudnn_the_plan_says_so(fields: dict[str, Any], since: str) -> None:
    for version in ("2.13", "2.14", "2.15"):
        may = since != "never" and version >= since
        problem = machine(torch_version=f"{version}.0", **fields)
        assert ("cuDNN" in TorchVarlen().kernel(problem)) == may
        semantics = replace(problem.semantics, deterministic=True)
        strict = replace(problem, semantics=semantics, needs_grad=True, deterministic_mode=True)
        assert ("may run cuDNN's kernel" in "; ".join(r.reason for r in TorchVarlen().refusals(strict))) == may


def test_torch_2_10_is_refused() -> None:
    (refusal,) = TorchVarlen().refusals(machine(torch_version="2.10.0"))
    assert "needs torch 2.11" in refusal.reason


# -------------------------------------------------------------------- determinism


def test_deterministic_gradients_need_the_global_switch() -> None:
    def refusals() -> tuple[Refusal, ...]:
        return TorchVarlen().refusals(machine(semantics=Semantics(deterministic=True), needs_grad=True))

    (refusal,) = refusals()
    assert "torch.use_deterministic_algorithms" in refusal.reason
    torch.use_deterministic_algorithms(True)
    try:
        assert not refusals()
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert refusals(), "then torch only warns, and runs the other algorithm"
    finally:
        torch.use_deterministic_algorithms(False)


def test_dropout_with_wide_heads_is_refused_on_consumer_gpus() -> None:
    semantics = Semantics(dropout_p=0.1)
    for capability, refused in (((8, 0), False), ((8, 6), True), ((8, 9), True), ((9, 0), False), ((12, 0), True)):
        problem = machine(capability=capability, head_dim=256, semantics=semantics, needs_grad=True)
        assert bool(TorchVarlen().refusals(problem)) == refused, capability
