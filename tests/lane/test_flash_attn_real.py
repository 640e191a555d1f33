"""The `flash2` backend on the real package flash-attn: its Triton build, run by Triton's interpreter on a CPU, forward and backward.

Needs a process of its own, with FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE and TRITON_INTERPRET=1 set before anything is imported
(``make test`` does it). What this build lacks is refused by the backend, and the controls at the end prove that the package would
have been silently wrong.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from varlen_attn import BackendRefused, SeqLayout, padded_attention, record, varlen_attention
from varlen_attn.kernels.cuda.flash2 import Flash2
from varlen_attn.kernels.problem import Semantics
from varlen_attn.kernels.values import Extras
from varlen_attn.testing import assert_within_budget, poison, reference_attention

if os.environ.get("FLASH_ATTENTION_TRITON_AMD_ENABLE") != "TRUE" or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")
fi = pytest.importorskip("flash_attn.flash_attn_interface", reason="needs flash-attn with its Triton build", exc_type=ImportError)

pytestmark = [
    # The interpreter computes on whole blocks with NumPy, which warns of -inf - (-inf) in rows that the kernel masks afterwards.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

# The kernel rounds its softmax weights to float16 before multiplying them with the values; eager attention does so later or never.
EXTRA = {torch.float16: (1e-3, 4e-3), torch.float32: (1e-6, 4e-6)}

Lengths = list[int]


@pytest.fixture(scope="module", autouse=True)
def _kernels_on_the_cpu() -> None:
    """flash-attn registers its ops for CUDA only; what they wrap runs wherever Triton does."""
    for op in (fi._flash_attn_varlen_forward, fi._flash_attn_varlen_backward):
        op.register_kernel("cpu")(op._init_fn)


def tensors(lengths_q: Lengths, lengths_k: Lengths, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths_q) + 31 * sum(lengths_k))
    shapes = ((sum(lengths_q), heads[0], dims[0]), (sum(lengths_k), heads[1], dims[0]), (sum(lengths_k), heads[1], dims[1]))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def assert_close(out: Tensor, ref64: Tensor, naive: Tensor, *, gradient: bool, what: str) -> None:
    """The usual budget, or this build's own rounding, whichever is larger."""
    assert out.dtype == naive.dtype
    assert bool(out.isfinite().all()), what
    if (out.double() - ref64).abs().max() > EXTRA[out.dtype][gradient]:
        assert_within_budget(out, ref64, naive, gradient=gradient, what=what)


CASES: dict[str, tuple[Lengths, Lengths | None, tuple[int, int], tuple[int, int], dict[str, Any]]] = {
    "self": ([5, 17, 1], None, (2, 2), (32, 32), {}),
    "causal, grouped heads": ([5, 17, 1], None, (4, 2), (32, 32), dict(causal=True)),
    "odd head dimensions": ([5, 17, 1], None, (2, 1), (17, 17), {}),
    "narrow values, scale": ([6, 3], None, (2, 2), (24, 17), dict(scale=0.3)),
    "cross": ([5, 3, 7], [2, 9, 4], (2, 2), (24, 24), {}),
    "cross, causal, more keys and more queries": ([5, 3, 7], [2, 9, 7], (4, 2), (16, 16), dict(causal=True)),
    "no queries, no keys": ([5, 0, 7, 0], [2, 9, 0, 0], (2, 2), (24, 24), {}),
    "no queries, no keys, causal": ([5, 0, 7], [2, 9, 0], (2, 1), (24, 24), dict(causal=True)),
    "one query each, grouped heads": ([1, 1, 0, 1], [2, 9, 4, 1], (4, 1), (16, 16), {}),
    "longer than a block": ([150], None, (1, 1), (16, 16), dict(causal=True)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference_forward_and_backward(case: str, dtype: torch.dtype) -> None:
    lengths_q, lengths_k, heads, dims, options = CASES[case]
    layout = SeqLayout.from_lengths(lengths_q)
    layout_kv = None if lengths_k is None else SeqLayout.from_lengths(lengths_k)
    qkv = tensors(lengths_q, lengths_k or lengths_q, heads, dims, dtype)
    out, lse = varlen_attention(*qkv, layout, layout_kv, backend="flash2", return_lse=True, **options)
    ref, ref_lse = reference_attention(*qkv, layout, layout_kv, return_lse=True, **options)
    naive, _ = reference_attention(*qkv, layout, layout_kv, dtype=dtype, return_lse=True, **options)
    assert_close(out, ref, naive, gradient=False, what="output")
    assert not lse.requires_grad
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), ref_lse, atol=2e-6, rtol=1e-6)  # equal infinities are close

    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads, ref_grads, naive_grads = (torch.autograd.grad(x, qkv, weights.to(x.dtype)) for x in (out, ref, naive))
    for name, grad, ref_grad, naive_grad in zip(("dq", "dk", "dv"), grads, ref_grads, naive_grads, strict=True):
        assert_close(grad, ref_grad.double(), naive_grad, gradient=True, what=name)
    blind = torch.isneginf(ref_lse).transpose(0, 1)[..., None]
    assert not out.masked_select(blind).any()
    assert not grads[0].masked_select(blind).any()


def test_a_broadcast_gradient_is_made_contiguous() -> None:
    layout = SeqLayout.from_lengths([5, 3])
    qkv = tensors([5, 3], [5, 3], (2, 2), (16, 16), torch.float32)
    got = torch.autograd.grad(varlen_attention(*qkv, layout, backend="flash2").sum(), qkv)
    want = torch.autograd.grad(reference_attention(*qkv, layout).sum(), qkv)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_never_read(side: str) -> None:
    mask = torch.tensor([[False] * 6, [False] * 2 + [True] * 4, [True] * 6])
    mask = mask if side == "right" else mask.flip(1)
    layout = SeqLayout.from_lengths([6, 2, 0], padded_len=6, padding_side=side)
    plain = [torch.randn(3, 6, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    results = []
    for fill in (0.0, float("nan")):
        qkv = [poison(x, mask, fill).requires_grad_() for x in plain]
        out = padded_attention(*qkv, layout=layout, causal=True, backend="flash2")
        grads = torch.autograd.grad(out, qkv, torch.ones_like(out))
        assert all(not x[mask].any() for x in (out, *grads)), "padding rows of results and gradients are exactly 0"
        results.append((out, *grads))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_rows_without_a_sequence_stay_zero() -> None:
    """Capacity mode: the rows beyond the last sequence belong to nobody, and may hold anything."""
    mask = torch.tensor([[False] * 4, [False] * 2 + [True] * 2])
    layout = SeqLayout.from_key_padding_mask(mask, capacity=8)
    qkv = tensors([8], [8], (2, 2), (16, 16), torch.float32)
    with torch.no_grad():
        for x in qkv:
            x[6:] = float("nan")
    out = varlen_attention(*qkv, layout, backend="flash2")
    grads = torch.autograd.grad(out, qkv, torch.ones_like(out))
    exact = reference_attention(*(x[:6] for x in qkv), SeqLayout.from_lengths([4, 2]))
    torch.testing.assert_close(out[:6].double(), exact, atol=1e-6, rtol=1e-5)
    assert all(not x[6:].any() for x in (out, *grads))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(window=(2, 0)), "ignores windows"),
        (dict(softcap=1.0), "ignores softcap"),
        (dict(alibi_slopes=torch.ones(2)), "ALiBi"),
        (dict(causal="top_left"), "top-left"),
        (dict(sinks=torch.ones(2)), "sinks"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_this_build_gets_wrong_is_refused(options: dict[str, Any], reason: str) -> None:
    qkv = tensors([6], [7], (2, 2), (16, 16), torch.float32)
    layouts = (SeqLayout.from_lengths([6]), SeqLayout.from_lengths([7]))
    with pytest.raises(BackendRefused, match=reason):
        varlen_attention(*qkv, *layouts, backend="flash2", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dropout_statistics(dtype: torch.dtype) -> None:
    """R-25: kept weights are scaled up, a share of p is dropped, and the backward drops the same ones."""
    lengths, p = [64, 40, 64], 0.3
    query, key, value = tensors(lengths, lengths, (4, 4), (16, 16), dtype)
    layout = SeqLayout.from_lengths(lengths)
    ones = torch.ones_like(value).requires_grad_()
    with record() as log:
        out = varlen_attention(query, key, ones, layout, backend="flash2", dropout_p=p)
    assert log.calls[0].backend == "flash2"
    sums = out.detach().float()[..., 0]  # the sum of each query's kept weights
    assert sums.std() > 0.02, "something is dropped"
    deviation = (p / (1 - p) / 40) ** 0.5 * 3 / sums.numel() ** 0.5  # weights are not equal: up to 3 times that of equal ones
    assert abs(sums.mean().item() - 1) < 5 * deviation
    (grad,) = torch.autograd.grad(out.float().sum(), ones)
    assert abs(grad.float().sum().item() / out.float().sum().item() - 1) < 5e-3, "out is linear in value: one mask in both directions"


def test_bfloat16_is_refused_in_the_interpreter() -> None:
    qkv = tensors([6], [6], (2, 2), (16, 16), torch.bfloat16)
    with pytest.raises(BackendRefused, match="wrong for bfloat16"):
        varlen_attention(*qkv, SeqLayout.from_lengths([6]), backend="flash2")


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_traces_forward_and_backward_without_running_the_kernel(device: str) -> None:
    """On meta tensors, and on fake ones, by the package's own ops and their fake kernels."""

    def call(query: Tensor, key: Tensor, value: Tensor, layout: SeqLayout) -> Any:
        out, lse = Flash2().run(query, key, value, layout, layout, Semantics(scale=0.1, return_lse=True), Extras())
        assert out.shape == (12, 4, 20)
        assert lse is not None
        return out, torch.autograd.grad(out.sum(), (query, key, value))

    layout = SeqLayout.from_lengths([5, 7]).to(device)
    qkv = [torch.empty(12, n, 20, dtype=torch.float16, device=device, requires_grad=True) for n in (4, 2, 2)]
    graph = make_fx(call, tracing_mode="real" if device == "meta" else "fake")(*qkv, layout).graph
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert targets.count("flash_attn._flash_attn_varlen_forward.default") == 1
    assert targets.count("flash_attn._flash_attn_varlen_backward.default") == 1


# -------------------------------------------------------------------- controls: the package itself, without our refusals


def directly(qkv: list[Tensor], **options: Any) -> Tensor:
    cu = torch.tensor([0, qkv[0].shape[0]], dtype=torch.int32)
    length = qkv[0].shape[0]
    with torch.no_grad():
        result: Tensor = fi.flash_attn_varlen_func(*qkv, cu, cu, length, length, **options)
    return result


def test_control_the_package_runs_and_ignores_windows_and_softcap() -> None:
    """If this fails, the build has learned them, and the refusals can go."""
    layout = SeqLayout.from_lengths([12])
    qkv = tensors([12], [12], (2, 2), (16, 16), torch.float32)
    plain = directly(qkv)
    torch.testing.assert_close(plain.double(), reference_attention(*qkv, layout).detach(), atol=1e-6, rtol=1e-5)
    for ours, theirs in ((dict(window=(1, 0)), dict(window_size=(1, 0))), (dict(softcap=0.5), dict(softcap=0.5))):
        assert torch.equal(directly(qkv, **theirs), plain)
        assert (reference_attention(*qkv, layout, **ours) - plain).abs().max() > 0.1


def test_control_the_package_asserts_at_one_alibi_slope_a_head() -> None:
    qkv = tensors([6], [6], (2, 2), (16, 16), torch.float32)
    with pytest.raises(AssertionError):
        directly(qkv, alibi_slopes=torch.ones(2))


def test_control_the_package_draws_one_dropout_mask_for_ever() -> None:
    """A training run would drop the same weights at every step, whatever the seed."""
    qkv = tensors([12], [12], (2, 2), (16, 16), torch.float32)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(directly(qkv, dropout_p=0.5))
    assert torch.equal(*results)
    assert not torch.equal(results[0], directly(qkv))
