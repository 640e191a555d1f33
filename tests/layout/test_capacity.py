"""Capacity mode: a step that can be captured once and replayed with every batch that fits (R-10, R-40)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from varlen_attn import (
    LayoutError,
    SeqLayout,
    VarlenMultiheadAttention,
    VarlenTransformerEncoder,
    VarlenTransformerEncoderLayer,
    padded_attention,
    varlen_attention,
    varlen_mha,
)
from varlen_attn.attention import call as _call
from varlen_attn.kernels.base import Backend
from varlen_attn.kernels.cuda.torch_varlen import TorchVarlen
from varlen_attn.kernels.sdpa_padded import SdpaPadded
from varlen_attn.kernels.values import Call, Extras

from ..kernels.fake_kernels import flash_backward, flash_forward, for_cpu, on_cpu
from ..nosync import count_reads, not_capturable

B, S, D, N = 3, 6, 16, 2
PATTERNS = [
    [6, 2, 0], [1, 6, 3], [0, 0, 0], [6, 6, 6], [4, 0, 5], [1, 0, 0], [0, 0, 1], [2, 2, 2], [6, 0, 0], [0, 6, 6],
    [5, 4, 3], [3, 4, 5], [1, 1, 1], [6, 5, 1], [2, 6, 4], [0, 3, 0], [4, 4, 0], [1, 2, 3], [3, 1, 6], [6, 6, 5],
]  # fmt: skip


def mask_of(lengths: list[int], i: int = 0) -> Tensor:
    """True is padding: right, left, or with holes."""
    mask = torch.arange(S) >= torch.tensor(lengths)[:, None]
    return (mask, mask.flip(1), mask.roll(2, 1))[i % 3]


def of_mask(mask: Tensor, **options: Any) -> SeqLayout:
    return SeqLayout.from_key_padding_mask(mask, validate=False, holes="packed", **options)


def encoder() -> VarlenTransformerEncoder:
    return VarlenTransformerEncoder(VarlenTransformerEncoderLayer(D, N, 32, dropout=0.0, batch_first=True), 2, norm=nn.LayerNorm(D))


class OneCall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.o = nn.Parameter(torch.randn(3 * D, D) / 4), nn.Parameter(torch.randn(D, D) / 4)
        self.v, self.p = nn.Parameter(torch.randn(3 * D)), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor, layout: SeqLayout, backend: Any) -> Tensor:
        weights = {"in_proj_weight": self.w, "in_proj_bias": self.v, "out_proj_weight": self.o, "out_proj_bias": self.p}
        return varlen_mha(x, layout=layout, num_heads=N, causal=True, backend=backend, **weights)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = VarlenMultiheadAttention(D, N, batch_first=True)

    def forward(self, x: Tensor, layout: SeqLayout, backend: Any) -> Tensor:
        return self.inner(x, layout=layout, backend=backend)[0]  # type: ignore[no-any-return]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = encoder()

    def forward(self, x: Tensor, layout: SeqLayout, backend: Any) -> Tensor:
        for layer in self.inner.layers:
            layer.self_attn.backend = backend
        return self.inner(x, layout=layout)  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {"varlen_mha": OneCall, "module": Attention, "encoder": Encoder}

native = pytest.param("cpu_native", marks=pytest.mark.native)
on_each = pytest.mark.parametrize("backend", ["cpu", "sdpa_padded", "reference", "torch_varlen", native])


def chosen(name: str) -> tuple[str | Backend, AbstractContextManager[None], torch.dtype]:
    """The order, what must be there for it, and a dtype that it takes."""
    if name == "torch_varlen":
        kernels = on_cpu(_flash_attention_forward=flash_forward, _flash_attention_backward=flash_backward)
        return for_cpu(TorchVarlen), kernels, torch.bfloat16
    return name, nullcontext(), torch.float32


# -------------------------------------------------------------------- values


@on_each
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("slack", [0, 1, 7])
def test_slack_reaches_nothing(backend: str, model: str, packed: bool, slack: int) -> None:
    """R-10, R-40: with NaN in padding and in slack rows, results and gradients, those of weights too, are those of the exact layout."""
    order, kernels, dtype = chosen(backend)
    with kernels:
        check_slack(MODELS[model](), order, dtype, packed, slack)


def check_slack(net: nn.Module, order: str | Backend, dtype: torch.dtype, packed: bool, slack: int) -> None:
    torch.manual_seed(0)
    net = net.to(dtype)
    for i, lengths in enumerate(([6, 2, 0], [1, 6, 3], [0, 0, 0], [0, 5, 1])):
        mask, total = mask_of(lengths, i), sum(lengths)
        exact, layout = of_mask(mask), of_mask(mask, capacity=total + slack)
        assert layout.cu_seqlens.tolist()[-1] == total
        x = torch.randn(B, S, D).to(dtype).masked_fill(mask[..., None], torch.nan)
        rows = torch.full((total + slack, D), torch.nan, dtype=dtype)
        rows[:total] = exact.pack(x)
        results = []
        for inputs, a in ((rows if packed else x, layout), (exact.pack(x) if packed else x, exact)):
            leaf = inputs.clone().requires_grad_()
            out = net(leaf, a, order)
            grads = torch.autograd.grad((out.float() + 1).square().sum(), [leaf, *net.parameters()], materialize_grads=True)
            assert all(bool(t.isfinite().all()) for t in (out, *grads))
            if packed:
                assert not out[total:].any()
                assert not grads[0][total:].any()
            else:
                assert not out[mask].any()
                assert not grads[0][mask].any()
            results.append([out[:total], grads[0][:total], *grads[1:]] if packed else [out, *grads])
        close = dict(atol=1e-5, rtol=1e-4) if dtype == torch.float32 else dict(atol=0.05, rtol=0.05)
        torch.testing.assert_close(*results, **close)


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4), slack=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=25)
@pytest.mark.parametrize("backend", ["cpu", "sdpa_padded", native])
@pytest.mark.parametrize("options", [{}, dict(causal=True, window=(1, 0)), dict(return_lse=True)], ids=str)
def test_rows_of_slack_are_exactly_zero(backend: str, options: dict[str, Any], lengths: list[int], slack: int, seed: int) -> None:
    generator, total = torch.Generator().manual_seed(seed), sum(lengths)
    layout = of_mask(torch.arange(5) >= torch.tensor(lengths)[:, None], capacity=total + slack)
    q, k, v = torch.randn(3, total + slack, N, 8, generator=generator)
    for x in (q, k, v):
        x[total:] = torch.nan
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, *lse = result if isinstance(result := varlen_attention(q, k, v, layout, backend=backend, **options), tuple) else (result,)
    grads = torch.autograd.grad(out, (q, k, v), torch.randn(out.shape, generator=generator))
    assert all(not x[total:].any() and bool(x.isfinite().all()) for x in (out, *grads))
    assert all(bool(x[:, total:].isneginf().all()) for x in lse)


def test_trailing_offsets_repeat_the_last() -> None:
    documents = SeqLayout.from_document_ids(torch.tensor([[1, 1, 2, 0], [3, 3, 0, 0]]), max_docs=6)
    assert documents.cu_seqlens.tolist() == [0, 2, 3, 5, 5, 5, 5]
    assert documents.max_seqlen == 4, "the bound that a capture bakes in holds for every batch"
    for lengths in PATTERNS:
        layout = of_mask(mask_of(lengths), capacity=B * S)
        assert (layout.max_seqlen, layout.num_rows, layout.num_seqs) == (S, B * S, B)


# -------------------------------------------------------------------- capture once, replay


def step_of(net: nn.Module, x: Tensor, layout: SeqLayout, order: Any) -> Callable[[], list[Tensor]]:
    """Forward and backward on tensors that stay where they are."""
    parameters = list(net.parameters())

    def step() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        out = net(leaf, layout, order)
        return [out, *torch.autograd.grad(out.float().sin().sum(), [leaf, *parameters])]

    return step


@pytest.mark.parametrize("backend", ["cpu", "sdpa_padded", "torch_varlen", native])  # `reference` reads lengths in Python
@pytest.mark.parametrize("model", MODELS)
def test_captured_once_replayed_with_twenty_patterns(backend: str, model: str) -> None:
    """R-40, S21: the ops of one step, forward and backward, recorded with one batch and replayed on the same memory with others.

    What stands in the recording is what stands in a CUDA graph: Python does not run again, so a number of one batch would be seen.
    """
    order, kernels, dtype = chosen(backend)
    torch.manual_seed(0)
    net, x = MODELS[model]().to(dtype), torch.zeros(B, S, D, dtype=dtype)
    for capacity in (B * S, 12):
        layout = of_mask(mask_of([2, 1, 3]), capacity=capacity)
        addresses = [t.data_ptr() for t in (layout.cu_seqlens, layout.token_indices, layout.gather_indices)]
        with kernels if capacity == B * S else chosen(backend)[1]:
            graph = make_fx(step_of(net, x, layout, order))()
            replayed = 0
            for i, lengths in enumerate(PATTERNS):
                mask = mask_of(lengths, i)
                if sum(lengths) > capacity:
                    with pytest.raises(LayoutError, match="`capacity` must hold all tokens"):
                        layout.update_(mask)
                    continue
                x.copy_(torch.randn(B, S, D).to(dtype).masked_fill(mask[..., None], torch.nan))
                layout.update_(mask)
                got, want = graph(), step_of(net, x, of_mask(mask, capacity=capacity), order)()
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
                assert not got[0][mask].any()
                replayed += 1
        assert [t.data_ptr() for t in (layout.cu_seqlens, layout.token_indices, layout.gather_indices)] == addresses
        assert replayed == (20 if capacity == B * S else sum(sum(n) <= 12 for n in PATTERNS))


def test_a_recording_that_is_not_updated_gives_another_answer() -> None:
    """The control: it is the layout's memory that the recording reads, and without `update_` it answers for the batch before."""
    net, x = OneCall(), torch.randn(B, S, D)
    layout = of_mask(mask_of([2, 1, 3]), capacity=B * S)
    graph = make_fx(step_of(net, x, layout, "cpu"))()
    want = step_of(net, x, of_mask(mask_of([1, 3, 2]), capacity=B * S), "cpu")()[0]
    assert not torch.equal(graph()[0], want)
    layout.update_(mask_of([1, 3, 2]))
    assert torch.equal(graph()[0], want)


# -------------------------------------------------------------------- nothing that a capture refuses

META = torch.zeros(B, S, dtype=torch.bool, device="meta")


def test_the_check_catches_what_a_capture_refuses() -> None:
    """The control, by name."""
    x = torch.zeros(3, device="meta")
    controls: dict[str, Callable[[], Any]] = {
        "torch.tensor": lambda: torch.tensor([1, 2], device="meta"),
        "torch.as_tensor": lambda: torch.as_tensor([1.0], device="meta"),
        "aten.lift_fresh.default on the CPU": lambda: x * torch.tensor(2.0),
        "aten._to_copy.default on the CPU": lambda: torch.ones(2).to("meta"),
        "aten.copy_.default on the CPU": lambda: x.copy_(torch.ones(3)),
        "aten.arange.default on the CPU": lambda: torch.arange(3),
        "Tensor.pin_memory": lambda: torch.ones(1).pin_memory(),
        "Tensor.item": lambda: torch.ones(()).item(),
        "Tensor.tolist": lambda: torch.ones(2).tolist(),
        "aten.nonzero.default": lambda: torch.ones(2).nonzero(),
        "torch.cuda.synchronize": lambda: torch.cuda.synchronize(),
    }
    for name, control in controls.items():
        with not_capturable() as seen:
            control()
        assert name in seen, (name, seen)
    with not_capturable() as seen:
        torch.where(x > 0, x, 0.0), x.cumsum(0) + 1, torch.zeros(2, device="meta").scatter(0, torch.arange(2, device="meta"), 1.0)
    assert seen == []


def launch(backend: Backend, options: dict[str, Any]) -> Callable[..., Tensor]:
    """`varlen_attention` on meta tensors, by the backend itself: the call would only compute shapes."""

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: SeqLayout) -> Tensor:
        call = _call.AttentionCall(q, k, v, layout, None, Extras(), _call.Options(**options), "auto")
        out, _ = _call.launch(backend, q, k, v, Call(layout, layout, call.semantics))
        return out

    return attend


@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(dropout_p=0.1)], ids=str)
@pytest.mark.parametrize("backend", [TorchVarlen, SdpaPadded])
@pytest.mark.parametrize("capacity", [B * S, 7])
def test_a_training_step_does_nothing_that_a_capture_refuses(backend: type[Backend], options: dict[str, Any], capacity: int) -> None:
    """R-19, R-30, R-40: update, pack, project, attend, unpack, backward."""
    layout = of_mask(META, capacity=capacity)
    attend = launch(backend(), options)
    proj = nn.Linear(D, 3 * D, device="meta", dtype=torch.float16)
    x = torch.zeros(B, S, D, device="meta", dtype=torch.float16, requires_grad=True)
    with not_capturable() as seen:
        layout.update_(META)
        q, k, v = proj(layout.pack(x)).unflatten(-1, (3, N, -1)).unbind(1)
        out = layout.unpack(attend(q, k, v, layout).flatten(1))
        out.float().square().mean().backward()
        layout.pool(layout.pack(x), "mean")
        _ = (layout.positions, layout.columns, layout.seq_ids, layout.valid_rows(), layout.padding_mask(), layout.compact())
    assert seen == []
    assert x.grad is not None
    assert (out.shape, layout.num_rows) == (x.shape, capacity)


@pytest.mark.parametrize("model", MODELS)
def test_modules_do_nothing_that_a_capture_refuses(model: str) -> None:
    """R-19, R-40: all that surrounds the kernel, forward and backward, with what was built once before."""
    net, layout = MODELS[model]().to("meta"), of_mask(META, capacity=B * S)
    x = torch.zeros(B, S, D, device="meta", requires_grad=True)
    with not_capturable() as seen:
        layout.update_(META)
        net(x, layout, "auto").sum().backward()
        padded_attention(*torch.zeros(3, B, S, N, 8, device="meta"), layout=layout, window=(1, 1))
    assert seen == []


@pytest.mark.parametrize("model", MODELS)
def test_no_values_are_read(model: str) -> None:
    net = MODELS[model]()
    x, mask = torch.randn(B, S, D, requires_grad=True), mask_of([2, 6, 0])
    with count_reads() as reads:
        layout = of_mask(mask, capacity=10)
        net(x, layout, "sdpa_padded").sum().backward()
        layout.update_(mask.flip(0))
        net(x, layout, "sdpa_padded").sum().backward()
    assert reads == []


# -------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_a_cuda_graph_replays_twenty_patterns(model: str) -> None:  # R-40, S21
    device = torch.device("cuda")
    torch.manual_seed(0)
    net, x = MODELS[model]().to(device, torch.float16), torch.zeros(B, S, D, device=device, dtype=torch.float16)
    mask = mask_of([2, 1, 3]).to(device)
    layout = of_mask(mask, capacity=B * S)

    def whole() -> list[Tensor]:
        layout.update_(mask)
        return step_of(net, x, layout, "auto")()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            whole()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = whole()
    for i, lengths in enumerate(PATTERNS):
        mask.copy_(mask_of(lengths, i))
        x.copy_(torch.randn(B, S, D).masked_fill(mask_of(lengths, i)[..., None], torch.nan))
        graph.replay()
        want = step_of(net, x, of_mask(mask), "auto")()
        torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)
        assert not got[0][mask].any()
