"""What is particular to the compiled kernel; the conformance suite holds it to the reference like every backend."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from varlen_attn import LayoutError, SeqLayout, explain, padded_attention, record, varlen_attention
from varlen_attn.kernels.cpu import build as _native
from varlen_attn.kernels.cpu import compile as _compile
from varlen_attn.kernels.cpu.native import CpuNative
from varlen_attn.kernels.problem import Semantics
from varlen_attn.kernels.values import Call
from varlen_attn.testing import assert_within_budget, reference_attention
from varlen_attn.testing.strategies import AttentionCase, attention_cases

pytestmark = pytest.mark.native

LENGTHS = [3, 0, 300, 17, 64, 1, 600]
OPTIONS: list[dict[str, Any]] = [
    {},
    dict(causal=True),
    dict(window=(100, 30)),
    dict(window=(20, 0), dropout_p=0.0, causal=True, softcap=3.0),
    dict(softcap=2.0),
    dict(alibi_slopes=torch.tensor([0.5, 0.1])),
    dict(sinks=torch.tensor([1.0, -2.0])),
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: next(iter(o), "plain"))
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def tensors(total: int, dtype: torch.dtype = torch.float32, heads: int = 2, dim: int = 32, seed: int = 0) -> list[Tensor]:
    """Query, key, value and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    *qkv, grad = (torch.randn(total, heads, dim, generator=generator).to(dtype) for _ in range(4))
    return [*(x.requires_grad_() for x in qkv), grad]


def run(qkvg: list[Tensor], layout: SeqLayout, **options: Any) -> list[Tensor]:
    *qkv, grad = qkvg
    out = varlen_attention(*qkv, layout, backend="cpu_native", **options)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


@pytest.fixture(params=["as it comes", "avx512", "avx2", "baseline"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel as users have it, and each instruction set that this CPU has with the kernel's own matrix products."""
    if request.param == "as it comes":
        return str(request.param)
    wanted, best = (list(_compile.LEVELS).index(name) for name in (request.param, _native.library().level))
    if wanted > best:
        pytest.skip(f"this CPU has no {request.param}")
    force(monkeypatch, wanted)
    return str(request.param)


def force(monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    for name in ("forward", "backward"):
        inner = getattr(_native.Library, name)

        def forced(self: _native.Library, arguments: Any, inner: Any = inner) -> None:
            arguments.level, arguments.portable = level, 1
            inner(self, arguments)

        monkeypatch.setattr(_native.Library, name, forced)


@each_dtype
@each_option
def test_every_instruction_set_and_our_own_products_are_exact(level: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    layout = SeqLayout.from_lengths(LENGTHS)
    qkvg = tensors(layout.num_rows, dtype)
    check(qkvg, layout, options)


def units(got: Tensor, want: Tensor) -> float:
    """The largest error, in float32's units in the last place of what is ``want``ed in float64."""
    unit = torch.ldexp(torch.ones_like(want), (want.abs().log2().floor() - 23).clamp(min=-149))
    return float(((got.double() - want).abs() / unit).max())


def test_softcap_to_the_last_places(level: str) -> None:
    """The log-sum-exp of a single key is its score, so tanh comes out; and its slope from the gradient of two keys."""
    powers = 2.0 ** torch.arange(-30, 8, dtype=torch.float32)[:, None]
    x = torch.cat([(powers * torch.linspace(1, 2, 4001)).flatten(), torch.linspace(0, 12, 100001), torch.tensor([1e-45, 1e9, torch.inf])])
    x = torch.cat([x, -x])[:, None, None]
    one, two = (SeqLayout.from_lengths([n]) for n in (1, 2))
    call = partial(varlen_attention, softcap=1.0, scale=1.0, backend="cpu_native")
    key = torch.ones(1, 1, 1)
    _, capped = call(x, key, key, SeqLayout.from_lengths([len(x)]), one, return_lse=True)
    assert units(capped.flatten(), x.double().flatten().tanh()) <= 2
    x = x[x.abs() < 20][:, None, None].requires_grad_()
    keys = torch.tensor([1.0, 0.0])[:, None, None]
    weight = call(x, keys, keys, SeqLayout.from_lengths([len(x)]), two)
    (grad,) = torch.autograd.grad(weight.sum(), x)  # 16: there are more roundings than those of the slope
    share = x.detach().double().tanh().sigmoid()
    assert units(grad, share * (1 - share) / x.detach().double().cosh().square()) <= 16


@pytest.mark.parametrize("softcap", [50.0, None])
def test_the_backward_makes_the_scores_of_the_forward(level: str, softcap: float | None) -> None:
    """Large scores, rounded in other places, would be other weights: errors three times those of plain float32."""
    options = {"softcap": softcap, "alibi_slopes": torch.tensor([0.1, 0.2, 0.25, 0.3])}
    layout = SeqLayout.from_lengths([113, 97])
    for seed in range(4):
        *qkv, grad = tensors(layout.num_rows, heads=4, dim=96, seed=seed)
        qkv = [(x.detach() * s).requires_grad_() for x, s in zip(qkv, (50.0, 1.0, 1.0), strict=True)]
        truth, plain = (grads_of_reference(qkv, grad, layout, dtype, options) for dtype in (torch.float64, torch.float32))
        for got, want, other in zip(run([*qkv, grad], layout, **options)[1:], truth, plain, strict=True):
            assert (got - want).abs().max() <= 2 * (other - want).abs().max()


def grads_of_reference(qkv: list[Tensor], grad: Tensor, layout: SeqLayout, dtype: torch.dtype, options: dict[str, Any]) -> list[Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
    out = reference_attention(*leaves, layout, dtype=dtype, **options)
    return list(torch.autograd.grad(out, leaves, grad.to(dtype)))


def check(qkvg: list[Tensor], layout: SeqLayout, options: dict[str, Any]) -> None:
    *qkv, grad = qkvg
    wanted = []
    for dtype in (torch.float64, grad.dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
        out = reference_attention(*leaves, layout, dtype=dtype, **options)
        wanted.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))])
    for got, truth, plain in zip(run(qkvg, layout, **options), *wanted, strict=True):
        assert_within_budget(got, truth, plain, gradient=True)


@each_dtype
@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(window=(70, 40))], ids=str)
def test_blocks_meet_at_every_edge(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Lengths around the sizes of blocks, where a query, a key or a whole block could be lost."""
    edges = sorted({max(1, edge + shift) for edge in (8, 16, 64, 256, 512, 1024) for shift in (-1, 0, 1)})
    layout = SeqLayout.from_lengths(edges)
    check(tensors(layout.num_rows, dtype, heads=1, dim=16), layout, options)


@each_dtype
@pytest.mark.parametrize("causal", [False, "bottom_right", "top_left"])
@pytest.mark.parametrize("window", [None, (60, 20)])
def test_long_cross_attention_with_grouped_heads(causal: Any, window: Any, dtype: torch.dtype) -> None:
    """Unequal lengths over several blocks, four heads on two key/value heads, values of another width."""
    layout, layout_kv = SeqLayout.from_lengths([300, 90, 0, 40]), SeqLayout.from_lengths([120, 400, 7, 0])
    generator = torch.Generator().manual_seed(0)
    shapes = ((430, 4, 48), (527, 2, 48), (527, 2, 24), (430, 4, 24))
    *qkv, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    results = []
    for wide, backend in ((torch.float64, "reference"), (dtype, "reference"), (dtype, "cpu_native")):
        leaves = [x.detach().to(wide).requires_grad_() for x in qkv]
        out = varlen_attention(*leaves, layout, layout_kv, causal=causal, window=window, backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(wide))])
    for truth, plain, got in zip(*results, strict=True):
        assert_within_budget(got, truth, plain, gradient=True)


def test_absolute_errors_stay_below_what_is_promised() -> None:
    """float32: 2e-6 in outputs, 4e-6 in gradients."""
    layout = SeqLayout.from_lengths([300, 20, 700])
    qkvg = tensors(layout.num_rows, dim=64)
    leaves = [x.detach().double().requires_grad_() for x in qkvg[:3]]
    out = reference_attention(*leaves, layout)
    truth = [out.detach(), *torch.autograd.grad(out, leaves, qkvg[3].double())]
    for got, want, most in zip(run(qkvg, layout), truth, (2e-6, 4e-6, 4e-6, 4e-6), strict=True):
        assert (got.double() - want).abs().max() < most


@each_dtype
@each_option
def test_a_sequence_is_bitwise_the_same_whatever_its_batch_mates(options: dict[str, Any], dtype: torch.dtype) -> None:
    layout = SeqLayout.from_lengths(LENGTHS)
    qkvg = tensors(layout.num_rows, dtype)
    together = run(qkvg, layout, batch_invariant=True, **options)
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        alone = run([x.detach()[rows].requires_grad_() for x in qkvg], SeqLayout.from_lengths([length]), batch_invariant=True, **options)
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b[rows])
        start += length


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@each_dtype
@each_option
@pytest.mark.parametrize("lengths", [LENGTHS, [300]], ids=["many tasks", "few tasks"])  # which are made smaller for two threads
def test_threads_change_nothing(two_threads: None, dtype: torch.dtype, options: dict[str, Any], lengths: list[int]) -> None:
    layout = SeqLayout.from_lengths(lengths)
    qkvg = tensors(layout.num_rows, dtype)
    many = run(qkvg, layout, **options)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(many, run(qkvg, layout, **options), strict=True))


def test_rows_and_heads_may_stand_anywhere() -> None:
    """Views of one projection, heads before rows, odd strides: as their copies."""
    layout = SeqLayout.from_lengths([5, 70, 2])
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        fused = torch.randn(77, 3, 2, 16, generator=generator).to(dtype)
        turned = torch.randn(2, 77, 33, generator=generator).to(dtype)[..., 1:17].transpose(0, 1)
        apart = torch.randn(77, 2, 32, generator=generator).to(dtype)[..., ::2]
        crowded = torch.randn(77, 128, 16, generator=generator).to(dtype)[:, :2]  # rows 4096 bytes apart or less, which are copied
        for views in (
            fused.unbind(1), (turned, turned, turned), (apart, apart, turned), (turned[:1].expand(77, 2, 16), apart, apart), (crowded,) * 3
        ):  # fmt: skip
            want = varlen_attention(*(x.contiguous() for x in views), layout, backend="cpu_native")
            assert torch.equal(varlen_attention(*views, layout, backend="cpu_native"), want)


# -------------------------------------------------------------------- numbers that are not usual


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["query", "key", "value", "grad"])
def test_what_is_not_a_number_shows_and_stays_in_its_sequence(which: int, value: float) -> None:
    """As in eager attention: a model that has diverged must not look as if it had not."""
    layout = SeqLayout.from_lengths([8, 30, 4])
    clean = tensors(layout.num_rows)
    dirty = [x.detach().clone() for x in clean]
    dirty[which][8 + 5] = value
    qkv = [x.requires_grad_() for x in dirty[:3]]
    got, fine = run([*qkv, dirty[3]], layout), run(clean, layout)
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = reference_attention(*leaves, layout, dtype=torch.float32)
    wanted = [out.detach(), *torch.autograd.grad(out, leaves, dirty[3])]
    for x, y, plain in zip(got, fine, wanted, strict=True):
        assert torch.equal(x[:8], y[:8])
        assert torch.equal(x[38:], y[38:])
        assert torch.equal(x.isfinite().all(-1), plain.isfinite().all(-1)), "not a number in the same rows"


def test_blind_queries_with_nan_reach_no_key() -> None:
    """A query that sees no key has no part in anything, whatever stands there."""
    layout, layout_kv = SeqLayout.from_lengths([8, 20]), SeqLayout.from_lengths([5, 20])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        query, _, _, grad = (x.detach() for x in tensors(28, dtype))
        key = torch.randn(25, 2, 32).to(dtype).requires_grad_()
        for x in (query, grad):
            x[0] = float("nan")  # three rows of the first sequence are blind
        query.requires_grad_()
        out = varlen_attention(query, key, key, layout, layout_kv, causal=True, backend="cpu_native")
        for x in (out, *torch.autograd.grad(out, (query, key), grad)):
            assert x.isfinite().all()


@pytest.mark.parametrize("dim", [32, 48, 64, 128])
@pytest.mark.parametrize("scale", [1.0, 0.1, -0.3, 0.0])
def test_large_scores_and_any_scale(dim: int, scale: float) -> None:
    """The largest weight of a row is exp(0), however large its score; a scale may be negative or 0."""
    layout = SeqLayout.from_lengths([20, 300])
    check(tensors(320, dim=dim), layout, dict(scale=scale))
    query, key, _, grad = (x.detach() for x in tensors(320, dim=dim))
    query, key, ones = (x.requires_grad_() for x in (query * 1e4, key * 1e4, torch.ones_like(key)))
    out = varlen_attention(query, key, ones, layout, scale=scale, backend="cpu_native")
    torch.testing.assert_close(out, torch.ones_like(out))  # weights add up to 1
    *grads, dv = torch.autograd.grad(out, (query, key, ones), grad)
    assert all(x.isfinite().all() for x in grads)
    assert dv.abs().max() <= grad.abs().sum(0).max(), "no weight is above 1"


def test_windows_without_end_are_no_windows() -> None:
    layout = SeqLayout.from_lengths([3, 40])
    qkvg = tensors(43)
    for window in ((sys.maxsize, sys.maxsize), (1 << 40, None)):
        assert all(torch.equal(a, b) for a, b in zip(run(qkvg, layout, window=window), run(qkvg, layout), strict=True))
    for a, b in zip(run(qkvg, layout, window=(sys.maxsize, 0)), run(qkvg, layout, causal=True), strict=True):
        assert torch.equal(a, b)


def test_onednn_that_is_switched_off_is_not_called() -> None:
    layout = SeqLayout.from_lengths([3, 40])
    for dtype in (torch.float32, torch.bfloat16):
        qkvg = tensors(43, dtype)
        usual = run(qkvg, layout)
        try:
            torch._C._set_mkldnn_enabled(False)  # the context manager of torch.backends.mkldnn warns of other hardware
            other = run(qkvg, layout)
        finally:
            torch._C._set_mkldnn_enabled(True)
        for a, b in zip(usual, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="torch exports products for AVX512 only")
def test_products_of_libtorch_are_found_where_it_has_them() -> None:
    assert _native.library().products.startswith("oneDNN")


def test_it_is_bound_to_no_torch_and_no_openmp() -> None:
    needed = _native.library().path.read_bytes()
    assert not [name for name in (b"libtorch_cpu", b"libc10", b"libgomp", b"libomp", b"libstdc++", b"libc++") if name in needed]


def test_what_holds_torch_to_fewer_instructions_holds_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    says = "from varlen_attn.kernels.cpu import build; print(build.library().level)"
    assert subprocess.run([sys.executable, "-c", says], capture_output=True, text=True, check=True).stdout == "baseline\n"


def test_a_torch_without_its_functions_is_served_by_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    layout = SeqLayout.from_lengths(LENGTHS)
    qkvg = tensors(layout.num_rows, torch.bfloat16)
    with monkeypatch.context() as patch:
        force(patch, -1)  # its own products
        want = run(qkvg, layout)
    copy = tmp_path / "native.so"
    copy.write_bytes(_native.library().path.read_bytes())
    monkeypatch.setattr(_native, "_FUNCTIONS", [f"no_{name}" for name in _native._FUNCTIONS])
    monkeypatch.setitem(_native._found, _native.setting, library := _native.Library(copy))
    assert library.products == "its own products"
    assert all(torch.equal(a, b) for a, b in zip(run(qkvg, layout), want, strict=True))


def test_what_libtorch_throws_is_an_error(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    """A product that fails in the middle of a call, here because it was switched off, as no caller of ours does it."""
    if "bfloat16" not in _native.library().products:
        pytest.skip("no products that can fail")
    layout = SeqLayout.from_lengths(LENGTHS)
    qkvg = tensors(layout.num_rows, torch.bfloat16)
    want = run(qkvg, layout)
    inner = _native.Library.forward

    def forward(self: _native.Library, arguments: Any) -> None:
        arguments.portable = 0
        inner(self, arguments)

    try:
        torch._C._set_mkldnn_enabled(False)
        with monkeypatch.context() as patch:
            patch.setattr(_native.Library, "forward", forward)
            with pytest.raises(RuntimeError, match="the compiled CPU kernel failed: a matrix product of libtorch failed"):
                run(qkvg, layout)
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert all(torch.equal(a, b) for a, b in zip(run(qkvg, layout), want, strict=True))


def test_heads_without_width_are_left_to_others() -> None:
    x = torch.randn(3, 2, 0)
    plan = explain(x, x, torch.randn(3, 2, 4), SeqLayout.from_lengths([3]))
    assert plan.backend == "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_the_nearest_number(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where products are of float32, only the result is rounded."""
    force(monkeypatch, 0)
    layout = SeqLayout.from_lengths(LENGTHS)
    qkv = [x.detach() for x in tensors(layout.num_rows, dtype)[:3]]
    got, wide = (varlen_attention(*(x.to(of) for x in qkv), layout, backend="cpu_native") for of in (dtype, torch.float32))
    assert torch.equal(got, wide.to(dtype))


@each_dtype
def test_gradients_beside_an_odd_number_of_queries_without_a_key(level: str, dtype: torch.dtype) -> None:
    """Products of bfloat16 take rows in pairs."""
    layouts = SeqLayout.from_lengths([6, 41]), SeqLayout.from_lengths([3, 20])
    query, _, _, grad = tensors(47, dtype)
    _, key, value, _ = tensors(23, dtype)

    def gradients(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        out = varlen_attention(*leaves, *layouts, causal="bottom_right", backend=backend)
        return [*torch.autograd.grad(out, leaves, grad.to(dtype))]

    results = (gradients(backend, of) for backend, of in (("cpu_native", dtype), ("reference", torch.float64), ("reference", dtype)))
    for got, exact, eager in zip(*results, strict=True):
        assert_within_budget(got, exact, eager, gradient=True)


def test_the_gradient_of_sinks(level: str) -> None:
    layout = SeqLayout.from_lengths(LENGTHS)
    *qkv, grad = tensors(layout.num_rows)

    def gradient(backend: str, dtype: torch.dtype) -> Tensor:
        sinks = torch.tensor([1.0, -2.0], dtype=dtype, requires_grad=True)
        out = varlen_attention(*(x.detach().to(dtype) for x in qkv), layout, sinks=sinks, causal=True, backend=backend)
        return torch.autograd.grad(out, sinks, grad.to(dtype))[0]

    exact, eager = (gradient("reference", dtype) for dtype in (torch.float64, torch.float32))
    assert_within_budget(gradient("cpu_native", torch.float32), exact, eager, gradient=True)


# -------------------------------------------------------------------- dropout


def weights_after_dropout(qkv: list[Tensor], layout: SeqLayout, p: float, seed: int) -> Tensor:
    """``(T, N, longest)``: with the identity as values, a row of the output is its weights."""
    query, key, _ = qkv
    value = torch.cat([torch.eye(n, layout.max_seqlen) for n in layout.lengths or ()])[:, None].expand(-1, key.shape[1], -1)
    torch.manual_seed(seed)
    result: Tensor = varlen_attention(query, key, value, layout, dropout_p=p, backend="cpu_native")
    return result


def test_dropout_drops_its_share_and_scales_the_rest() -> None:
    layout = SeqLayout.from_lengths([160, 0, 144])
    qkv = tensors(layout.num_rows)[:3]
    full = weights_after_dropout(qkv, layout, 0.0, 0)
    some = weights_after_dropout(qkv, layout, 0.25, 0)
    real = full > 0
    kept = some[real] > 0
    torch.testing.assert_close(some[real][kept], full[real][kept] / 0.75)
    count = kept.numel()
    assert abs(kept.double().mean() - 0.75) < 4 * (0.25 * 0.75 / count) ** 0.5, "four standard deviations"
    assert torch.equal(some, weights_after_dropout(qkv, layout, 0.25, 0)), "the same seed"
    other = weights_after_dropout(qkv, layout, 0.25, 1)[real] > 0
    agreement = (kept == other).double().mean()
    assert abs(agreement - (0.75**2 + 0.25**2)) < 0.01, "another seed is independent"
    heads = (some > 0)[:160, 0, :160] == (some > 0)[:160, 1, :160]
    assert abs(heads.double().mean() - 0.625) < 0.02, "and so are heads"
    neighbours = (some > 0)[:159, 0, :160] == (some > 0)[1:160, 0, :160]
    assert abs(neighbours.double().mean() - 0.625) < 0.02, "and rows"
    sequences = (some > 0)[:144, 0, :144] == (some > 0)[160:, 0, :144]
    assert abs(sequences.double().mean() - 0.625) < 0.02, "and sequences"


def test_dropout_has_the_gradient_of_what_it_drew() -> None:
    lengths = 40, 300  # the second in two blocks of keys forward, and more of them backward
    layout = SeqLayout.from_lengths(lengths)
    query, key, value, grad = tensors(layout.num_rows)
    kept = (weights_after_dropout([query, key, value], layout, 0.3, 5) > 0).detach()
    torch.manual_seed(5)
    out = varlen_attention(query, key, value, layout, dropout_p=0.3, softcap=5.0, backend="cpu_native")
    got = [out.detach(), *torch.autograd.grad(out, (query, key, value), grad)]
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    parts, start = [], 0
    for length in lengths:
        q, k, v = (x[start : start + length].transpose(0, 1) for x in wide)
        scores = 5.0 * torch.tanh(q @ k.transpose(1, 2) * 32**-0.5 / 5.0)
        mask = kept[start : start + length, :, :length].transpose(0, 1)
        parts.append((scores.softmax(-1) * mask / 0.7 @ v).transpose(0, 1))
        start += length
    want = torch.cat(parts)
    for a, b in zip(got, [want.detach(), *torch.autograd.grad(want, wide, grad.double())], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)


def test_dropping_everything_gives_zeros_and_no_gradient() -> None:
    layout = SeqLayout.from_lengths([4, 9])
    for x in run(tensors(13), layout, dropout_p=1.0):
        assert not x.any()


# -------------------------------------------------------------------- around the kernel


def test_the_plan_says_what_multiplies_matrices() -> None:
    layout = SeqLayout.from_lengths([2, 1])
    x = torch.randn(3, 1, 16)
    plan = explain(x, x, x, layout)
    assert plan.backend == "cpu_native"
    assert plan.kernel == f"compiled kernel ({_native.library().level}, {_native.library().products})"
    bias = explain(x, x, x, layout, score_bias=torch.zeros(1, 2, 2))
    assert bias.backend == "cpu"
    with record() as log:
        varlen_attention(x.double(), x.double(), x.double(), layout)
        varlen_attention(x, x, x, layout)
    assert [c.backend for c in log.calls] == ["cpu", "cpu_native"]


@pytest.mark.parametrize(("offsets", "says"), [([0, 2, 9], "at most total = 3"), ([1, 3], "must be 0"), ([0, 3, 2], "not decrease")])
def test_offsets_beyond_the_rows_are_refused_and_read_nothing(offsets: list[int], says: str) -> None:
    x, good = torch.randn(3, 1, 16), torch.tensor([0] * (len(offsets) - 1) + [3], dtype=torch.int32)
    bad = torch.tensor(offsets, dtype=torch.int32)
    for pair in ((bad, good), (good, bad)):
        with pytest.raises(LayoutError, match=says):
            torch.ops.varlen_attn.cpu_native_forward(x, x, x, *pair, None, None, None, [-9, 9], True, 1.0, 0.0, 0.0)


@given(case=attention_cases((torch.float32, torch.bfloat16)))
def test_our_ops_pass_opcheck(case: AttentionCase) -> None:
    ops = torch.ops.varlen_attn
    layout, layout_kv = case.layout, case.layout_kv or case.layout
    q, k, v, grad = (x.detach() for x in case.tensors("cpu"))
    if k.shape[2] % 16 or v.shape[2] % 16:
        q, k, v, grad = (torch.nn.functional.pad(x, (0, -x.shape[2] % 16)) for x in (q, k, v, grad))
    sinks = torch.zeros(q.shape[1])
    rest = (layout.cu_seqlens, layout_kv.cu_seqlens, None, sinks, torch.tensor(7), [-3, 1 << 40], True, 0.25, 0.0, 0.1)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.cpu_native_forward.default, (q, k, v, *rest), test_utils=utils)
    out, lse = ops.cpu_native_forward(q, k, v, *rest)
    torch.library.opcheck(ops.cpu_native_backward.default, (grad, q, k, v, out, lse, *rest), test_utils=utils)


def test_no_second_derivative_without_an_error() -> None:
    query, key, value, _ = tensors(5)
    out = varlen_attention(query, key, value, SeqLayout.from_lengths([5]), backend="cpu_native")
    (first,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backend 'cpu_native' is not differentiable.*backend='reference'"):
        first.sum().backward()


def test_forward_mode_goes_elsewhere_and_says_so() -> None:
    layout = SeqLayout.from_lengths([3, 2])
    q = torch.randn(5, 1, 16)
    with record() as log:
        torch.func.grad(lambda x: varlen_attention(x, x, x, layout).sum())(q)
    assert log.calls[0].backend == "cpu"
    assert "forward-mode AD" in " ".join(str(r) for d in log.calls[0].plan.decisions if d.backend == "cpu_native" for r in d.reasons)


def test_nothing_of_the_size_of_scores_is_allocated() -> None:
    """The largest tensor that forward and backward make is as large as an input."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(result):
                if isinstance(x, Tensor):
                    self.numel = max(self.numel, x.numel())
            return result

    layout = SeqLayout.from_lengths([1000, 24])
    qkvg = tensors(1024, heads=2, dim=16)
    with Largest() as mode:
        run(qkvg, layout, causal=True, dropout_p=0.1)
    assert mode.numel == 1024 * 2 * 16


@pytest.mark.filterwarnings("ignore:.*")
def test_one_graph_with_dropout_and_sinks_whatever_the_lengths() -> None:
    import torch._dynamo

    torch._dynamo.reset()
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x, layout, sinks: padded_attention(x, x, x, layout=layout, sinks=sinks, dropout_p=0.1), fullgraph=True, backend=counting
    )
    sinks = torch.zeros(1, requires_grad=True)
    for seed, lengths in enumerate(([3, 4], [0, 0], [1, 0], [0, 9], [10, 2])):
        torch.manual_seed(seed)
        x = torch.randn(2, 10, 1, 16, requires_grad=True)
        with record() as log:
            compiled(x, SeqLayout.from_lengths(lengths, 10), sinks).sum().backward()
        assert log.calls[-1].backend == "cpu_native"
        assert x.grad is not None
        assert x.grad.any() or max(lengths) < 3, "a single weight may be dropped"
    assert len(graphs) <= 2
    torch._dynamo.reset()


def test_a_call_is_few_functions_of_ours() -> None:
    """On short sequences each costs as much as a part of their attention."""
    layout = SeqLayout.from_lengths([9, 11])
    x = torch.randn(20, 2, 16)
    call = Call(layout, layout, Semantics(scale=0.25))
    backend = CpuNative()
    backend.run(x, x, x, call)
    root, seen = str(Path(_native.__file__).parent), []

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(root):
            seen.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        backend.run(x, x, x, call)
    finally:
        sys.setprofile(None)
    assert len(seen) <= 8 + ("torch.utils.flop_counter" in sys.modules), seen
