"""What the adapters of flash-attn 3 and 4 are both tested with, on their stand-ins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varlen_attn import SeqLayout, padded_attention, varlen_attention
from varlen_attn.kernels.base import Backend
from varlen_attn.testing import assert_within_budget, reference_attention

Case = tuple[list[int], list[int] | None, tuple[int, int], tuple[int, int], dict[str, Any]]

CASES: dict[str, Case] = {
    "self": ([5, 7, 1], None, (2, 2), (16, 16), {}),
    "causal, grouped heads, odd dimensions": ([5, 7, 1], None, (4, 2), (17, 9), dict(causal=True)),
    "wide values": ([5, 7, 1], None, (2, 1), (9, 17), {}),
    "no columns": ([5, 2], None, (2, 2), (0, 0), {}),
    "window": ([9, 4], None, (2, 2), (8, 8), dict(window=(2, 1))),
    "window, one side": ([9, 4], None, (2, 2), (8, 8), dict(window=(None, 1))),
    "window of the token itself": ([9, 4], None, (2, 2), (8, 8), dict(window=(0, 0))),
    "causal window": ([9, 4], None, (2, 2), (8, 8), dict(causal=True, window=(2, 3))),
    "softcap": ([9, 4], None, (2, 2), (8, 8), dict(softcap=1.5, scale=0.9)),
    "cross, empty sequences": ([5, 0, 4, 3], [2, 4, 0, 6], (2, 1), (8, 8), dict(scale=0.4)),
    "cross, causal, blind queries": ([5, 0, 4, 3], [2, 4, 0, 6], (2, 2), (8, 8), dict(causal=True)),
    "one query each, grouped heads": ([1, 0, 1], [3, 2, 4], (4, 2), (8, 8), {}),
    "sinks": ([5, 7, 1], None, (2, 2), (16, 16), dict(sinks=True)),
    "sinks, softcap, blind queries": ([5, 0, 4, 3], [2, 4, 0, 6], (4, 2), (8, 8), dict(causal=True, sinks=True, softcap=2.0)),
    "no keys at all": ([2, 1], [0, 0], (2, 2), (8, 8), {}),
    "no queries at all": ([0, 0], [2, 1], (2, 2), (8, 8), {}),
    "no tokens": ([0, 0], None, (2, 2), (8, 8), {}),
    "no sequences": ([], [], (2, 2), (8, 8), {}),
}  # fmt: skip


def tensors(lengths_q: list[int], lengths_k: list[int], heads: tuple[int, int], dims: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths_q), heads[0], dims[0]), (sum(lengths_k), heads[1], dims[0]), (sum(lengths_k), heads[1], dims[1]))
    return [torch.randn(shape, generator=generator).half().requires_grad_() for shape in shapes]


def check_against_the_reference(backend: Backend, case: Case) -> None:
    lengths_q, lengths_k, heads, dims, options = case
    layouts = (SeqLayout.from_lengths(lengths_q), None if lengths_k is None else SeqLayout.from_lengths(lengths_k))
    inputs = tensors(lengths_q, lengths_q if lengths_k is None else lengths_k, heads, dims)
    if options.get("sinks"):
        options = {**options, "sinks": torch.linspace(-1, 1, heads[0]).requires_grad_()}
        inputs = [*inputs, options["sinks"]]
    qkv = inputs[:3]
    out, lse = varlen_attention(*qkv, *layouts, backend=backend, return_lse=True, **options)
    ref, ref_lse = reference_attention(*qkv, *layouts, return_lse=True, **options)
    naive = reference_attention(*qkv, *layouts, dtype=torch.float16, **options)
    assert_within_budget(out, ref, naive)
    assert out.dtype == torch.float16
    torch.testing.assert_close(lse.double(), ref_lse, atol=1e-6, rtol=1e-6)
    assert not lse.requires_grad
    assert torch.equal(varlen_attention(*qkv, *layouts, backend=backend, **options), out)
    grads, ref_grads, naive_grads = (torch.autograd.grad(x.sum(), inputs) for x in (out, ref, naive))  # a broadcast gradient
    for got, want, eager in zip(grads, ref_grads, naive_grads, strict=True):
        assert got.dtype == eager.dtype
        assert_within_budget(got, want.double(), eager, gradient=True)
    blind = torch.isneginf(ref_lse).transpose(0, 1)[..., None]
    assert not out.masked_select(blind).any()
    assert not grads[0].masked_select(blind).any()


def check_nothing_to_attend_to_still_runs_backward(backend: Backend) -> None:
    for lengths_q, lengths_k in (([], []), ([2, 1], [0, 0]), ([0, 0], [2, 1])):
        qkv = tensors(lengths_q, lengths_k, (2, 2), (8, 8))
        sinks = torch.zeros(2, requires_grad=True)
        layouts = (SeqLayout.from_lengths(lengths_q), SeqLayout.from_lengths(lengths_k))
        out = varlen_attention(*qkv, *layouts, backend=backend, sinks=sinks)
        for x, grad in zip((*qkv, sinks), torch.autograd.grad(out.sum(), (*qkv, sinks)), strict=True):
            assert torch.equal(grad, torch.zeros_like(x))


SLACK: dict[str, dict[str, Any]] = {
    "self": {},
    "causal": dict(causal=True),
    "window": dict(window=(2, 0)),
    "sinks": dict(sinks=torch.tensor([0.5, -0.5])),
}


def check_slack_rows(backend: Backend, options: dict[str, Any]) -> None:
    """Capacity mode, with a tail longer than one block: real rows as without it, the rest exactly 0."""
    mask = torch.tensor([[False] * 4, [True] * 4, [False] * 3 + [True], [True] * 4])
    exact, roomy = (SeqLayout.from_key_padding_mask(mask, capacity=n, validate=False) for n in (None, 7 + 300))
    plain = tensors([7], [7], (2, 2), (12, 12))
    padded = [torch.cat([x.detach(), torch.full((300, 2, 12), float("nan"), dtype=x.dtype)]).requires_grad_() for x in plain]
    inputs = [options["sinks"].clone().requires_grad_()] if "sinks" in options else []
    options = {**options, **({"sinks": inputs[0]} if inputs else {})}
    weights = torch.randn(307, 2, 12, generator=torch.Generator().manual_seed(1)).half()
    results = []
    for layout, qkv in ((exact, plain), (roomy, padded)):
        out, lse = varlen_attention(*qkv, layout, backend=backend, return_lse=True, **options)
        grads = torch.autograd.grad(out, [*qkv, *inputs], weights[: out.shape[0]])
        results.append((out, lse.t(), *grads))
    for got, want in zip(results[1], results[0], strict=True):
        real = len(want)
        torch.testing.assert_close(got[:real], want, atol=1e-6, rtol=1e-6)
        rest = got[real:]
        assert bool(rest.isneginf().all()) if got is results[1][1] else not rest.any()


def check_one_graph(backend: Backend) -> None:
    """Changing lengths, exact and traced once; forward and backward."""
    import torch._dynamo  # before the layouts: they mark themselves where it is loaded

    torch._dynamo.reset()
    graphs: list[object] = []

    def counting(module: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(module)
        return aot_eager(module, inputs)

    def call(query: Tensor, key: Tensor, value: Tensor, layout: SeqLayout) -> Any:
        return padded_attention(query, key, value, layout=layout, backend=backend, causal=True)

    compiled = torch.compile(call, fullgraph=True, backend=counting)
    for lengths in ([5, 3], [1, 1], [6, 6], [0, 1], [2, 6], [0, 0]):
        layout = SeqLayout.from_lengths(lengths, padded_len=6)
        qkv = [x.detach().view(2, 6, -1, 12).requires_grad_() for x in tensors([12], [12], (4, 2), (12, 12))]
        got, want = compiled(*qkv, layout), call(*qkv, layout)
        assert torch.equal(got, want)
        grads = [torch.autograd.grad(x, qkv, torch.ones_like(x)) for x in (got, want)]
        assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
    assert len(graphs) == 1
    torch._dynamo.reset()


def op_inputs(lengths: list[int], sinks: bool, causal: bool = True) -> tuple[list[Tensor], tuple[Any, ...]]:
    """Arguments of our forward op: ``q, k, v`` and the rest."""
    cu = SeqLayout.from_lengths(lengths).cu_seqlens
    qkv = [x.detach() for x in tensors(lengths, lengths, (2, 1), (8, 8))]
    sink = torch.tensor([0.5, -0.5]) if sinks else None
    return qkv, (cu, cu, sink, max(lengths), max(lengths), 0.3, causal, [-1, 0 if causal else -1], 0.0, False)


def check_opcheck(forward: Any, backward: Any, lengths: list[int], sinks: bool) -> None:
    qkv, rest = op_inputs(lengths, sinks)
    inputs = [x.clone().requires_grad_() for x in qkv]
    torch.library.opcheck(forward, (*inputs, *rest))
    out, lse = forward(*qkv, *rest)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(backward, (torch.randn_like(out), *qkv, out, lse, *rest), test_utils=utils)


def traced_ops(backend: Backend, device: str) -> list[str]:
    """The ops that forward and backward of a traced call launch."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from varlen_attn.kernels.problem import Semantics
    from varlen_attn.kernels.values import Extras

    layout = SeqLayout.from_lengths([5, 7]).to(device)
    semantics = Semantics(causal="bottom_right", scale=0.1, sinks=True, return_lse=True)
    qkvs = [torch.empty(12, n, 20, dtype=torch.float16, device=device, requires_grad=True) for n in (4, 2, 2)]
    qkvs.append(torch.empty(4, device=device, requires_grad=True))

    def call(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, layout: SeqLayout) -> Any:
        out, lse = backend.run(query, key, value, layout, layout, semantics, Extras(sinks=sinks))
        assert out.shape == (12, 4, 20)
        assert lse is not None
        assert lse.shape == (4, 12)
        grads = torch.autograd.grad(out.sum(), (query, key, value, sinks))
        assert [g.shape for g in grads] == [x.shape for x in qkvs]
        return out, grads

    mode = "real" if device == "meta" else "fake"
    return [str(node.target) for node in make_fx(call, tracing_mode=mode)(*qkvs, layout).graph.nodes if node.op == "call_function"]
