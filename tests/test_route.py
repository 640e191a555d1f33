"""Packed or dense: the rule, and the dense route itself, on which padding is computed and still never read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from varlen_attn import ArgumentError, LayoutError, Problem, SeqLayout, padded_attention, record, route, use_backend, varlen_mha
from varlen_attn.dispatch import _DENSE_PAYS
from varlen_attn.testing import assert_within_budget, poison, reference_attention
from varlen_attn.testing.strategies import Batch, batches, head_shapes, semantics

from .nosync import count_reads

CPU = Problem(device_type="cpu", requested="cpu")
SHORT = [16] * 4 + [12] * 4  # of 16 columns: a fill of 0.88
Way = Literal["auto", "packed", "dense"]


def qkv(batch: int = 8, columns: int = 16, dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, columns, 2, 16, generator=generator).to(dtype).requires_grad_(grad) for _ in range(3))
    return q, k, v


def backend_and_route(*tensors: Tensor, **options: Any) -> tuple[str, str, str]:
    with record() as log:
        padded_attention(*tensors, **options)
    (call,) = log
    assert call.plan is not None
    return call.backend, call.plan.route, call.plan.route_reason


# -------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("lengths", "columns", "name"),
    [
        ([16] * 8, 16, "dense"),
        (SHORT, 16, "dense"),
        ([10] * 8, 16, "packed"),
        ([16] * 63 + [8], 16, "packed"),
        ([32] * 4 + [24] * 4, 32, "packed"),
    ],
    ids=str,
)
def test_where_little_is_padded_one_call_stays_dense(lengths: list[int], columns: int, name: str) -> None:
    layout = SeqLayout.from_lengths(lengths, columns)
    assert route(layout, CPU, per_call=True).name == name
    once = route(layout, CPU)
    assert once.name == ("dense" if layout.is_dense else "packed"), "who packs once for many calls leaves out every row of padding"


def test_the_rule_knows_only_host_facts_and_reads_nothing() -> None:
    layout = SeqLayout.from_lengths(SHORT, 16)
    with count_reads() as reads:
        first = route(layout, CPU, per_call=True)
        assert first == route(layout, CPU, per_call=True)
    assert not reads
    assert "12% of the batch is padding" in first.reason
    assert "16 columns" in first.reason
    device_only = SeqLayout.from_key_padding_mask(layout.padding_mask(), capacity=128)
    assert route(device_only, CPU, per_call=True).name == "packed"
    for problem in (
        Problem(device_type="cpu", requested="cpu", tracing=True),
        Problem(device_type="cpu", requested="cpu", dtype=torch.bfloat16),
        Problem(device_type="cuda", capability=(9, 0), dtype=torch.bfloat16, torch_version="2.13.0", packages=(), rocm=False),
    ):
        assert route(layout, problem, per_call=True).name == "packed"


def test_the_rule_is_what_was_measured() -> None:
    """R-35: where it says dense, the committed measurement has padding no slower than packing, and nowhere else much faster."""
    path = Path(__file__).parent.parent / "benchmarks" / "results" / "break_even.json"
    rows = [row for row in json.loads(path.read_text())["rows"] if row["backend"] in _DENSE_PAYS and row["dtype"] == "float32"]
    said = []
    for row in rows:
        columns, least, most = _DENSE_PAYS[row["backend"]]
        if row["padded_len"] <= columns and least <= row["real_fill"] <= most:
            said.append(row["dense_to_packed"])
            assert row["dense_to_packed"] < 1.05, row
        else:
            assert row["dense_to_packed"] > 0.9, row
    assert len(said) >= 4
    assert sum(said) / len(said) < 0.95, "or the rule would not be worth its lines"


# -------------------------------------------------------------------- the calls


def test_a_call_takes_the_route_of_the_rule() -> None:
    nearly, half = (SeqLayout.from_lengths(n, 16) for n in (SHORT, [16] * 4 + [4] * 4))
    backend, way, reason = backend_and_route(*qkv(), layout=nearly)
    assert (backend, way) == ("sdpa_padded", "dense")
    assert "less than to pack for one call" in reason
    assert backend_and_route(*qkv(), layout=half)[:2] == ("cpu", "packed")
    assert backend_and_route(*qkv(), layout=nearly, route="packed")[:2] == ("cpu", "packed")
    assert backend_and_route(*qkv(), layout=half, route="dense") == ("sdpa_padded", "dense", "the caller's wish")
    assert backend_and_route(*qkv(), layout=nearly, backend="cpu")[:2] == ("cpu", "packed"), "an order runs"
    with use_backend("cpu"):
        assert backend_and_route(*qkv(), layout=nearly)[:2] == ("cpu", "packed")
    assert backend_and_route(*qkv(), layout=SeqLayout.from_lengths([16] * 8))[:2] == ("cpu", "dense"), "nothing is padded"
    capacity = SeqLayout.from_key_padding_mask(nearly.padding_mask(), capacity=128)
    assert backend_and_route(*qkv(), layout=capacity)[1] == "packed"
    assert backend_and_route(*qkv(), layout=capacity, route="dense")[1] == "dense", "who knows more than the host may say so"


def test_the_dense_route_computes_padding_and_the_record_says_so() -> None:
    with record() as log:
        padded_attention(*qkv(), layout=SeqLayout.from_lengths(SHORT, 16))
    (call,) = log
    assert (call.rows, call.slots) == (128, 128)


@given(batch=batches(), shape=head_shapes(), data=st.data())
def test_the_dense_route_is_exact_and_never_reads_padding(batch: Batch, shape: Any, data: st.DataObject) -> None:
    """R-07, R-09, R-10, R-12: as the packed route, in results and gradients, whatever stands at padding."""
    # Some masks have holes, which distances refuse; the rest is refused, or random.
    left_out = {"window", "alibi_slopes", "score_bias", "dropout_p", "batch_invariant"}
    options = {k: v for k, v in data.draw(semantics(shape.heads)).items() if k not in left_out}
    plain = [
        batch.tensor(shape.heads, shape.dim, salt=0),
        batch.tensor(shape.kv_heads, shape.dim, salt=1),
        batch.tensor(shape.kv_heads, shape.value_dim, salt=2),
    ]
    results = []
    for way, fill in (("dense", 0.0), ("dense", float("nan")), ("packed", float("nan"))):
        tensors = [poison(x, batch.mask, fill).requires_grad_() for x in plain]
        out = padded_attention(*tensors, layout=batch.layout, route=way, **options)
        results.append((out, *torch.autograd.grad(out, tensors, torch.ones_like(out))))
    clean, dirty, packed = results
    for x, y, z in zip(clean, dirty, packed, strict=True):
        assert torch.equal(x, y)
        assert not x[batch.mask].any()
        torch.testing.assert_close(x, z, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distances_count_tokens_on_the_dense_route(dtype: torch.dtype) -> None:
    mask = torch.tensor([[False, True, False, False, True, False], [True, True, False, False, False, True]])
    layout = SeqLayout.from_key_padding_mask(mask, holes="packed")
    x = torch.randn(2, 6, 2, 16, dtype=dtype)
    slopes = torch.tensor([0.5, 0.1])
    options: dict[str, Any] = dict(causal=True, window=(1, 0), alibi_slopes=slopes)
    rows = layout.pack(x)
    exact = reference_attention(rows, rows, rows, layout, **options)
    naive = reference_attention(rows, rows, rows, layout, dtype=dtype, **options)
    out = padded_attention(x, x, x, layout=layout, route="dense", **options)
    assert_within_budget(layout.pack(out), exact, naive)
    refused = SeqLayout.from_key_padding_mask(mask)
    with pytest.raises(LayoutError, match="padding between tokens"):
        padded_attention(x, x, x, layout=refused, route="dense", **options)


def test_cross_attention_and_log_sum_exp_on_the_dense_route() -> None:
    queries, keys = SeqLayout.from_lengths([3, 0, 4], 4), SeqLayout.from_lengths([5, 2, 0], 6)
    q, k = torch.randn(3, 4, 2, 16), torch.randn(3, 6, 2, 16)
    for causal in (False, "bottom_right", "top_left"):
        dense, packed = (
            padded_attention(q, k, k, layout=queries, layout_kv=keys, route=way, causal=causal, return_lse=True) for way in WAYS
        )
        for got, want in zip(dense, packed, strict=True):
            torch.testing.assert_close(got, want)


WAYS: tuple[Way, ...] = ("dense", "packed")


def test_the_one_call_takes_a_route_too() -> None:
    x, mask = torch.randn(2, 6, 32), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    weights = dict(in_proj_weight=torch.randn(96, 32) / 6, in_proj_bias=torch.randn(96), out_proj_weight=torch.randn(32, 32) / 6)
    dirty = x.masked_fill(mask[..., None], float("nan"))
    dense, packed = (varlen_mha(dirty, mask, num_heads=2, route=way, **weights) for way in WAYS)
    torch.testing.assert_close(dense, packed)
    assert not dense[mask].any()
    stacked = torch.randn(2, 6, 3, 2, 16)
    torch.testing.assert_close(varlen_mha(stacked, mask, route="dense"), varlen_mha(stacked, mask, route="packed"))
    with record() as log:
        varlen_mha(torch.randn(8, 16, 3, 2, 8), layout=SeqLayout.from_lengths(SHORT, 16))
        varlen_mha(torch.randn(8, 16, 32), layout=SeqLayout.from_lengths(SHORT, 16), num_heads=2, **weights)
    assert [call.backend for call in log] == ["sdpa_padded", "cpu"], "projections leave padding out, so they always pack"


def test_wishes_that_can_not_be_met_raise() -> None:
    x = torch.randn(1, 4, 2, 16)
    documents = SeqLayout.from_document_ids(torch.tensor([[1, 1, 2, 0]]))
    with pytest.raises(ArgumentError, match="several documents"):
        padded_attention(x, x, x, layout=documents, route="dense")
    with pytest.raises(ArgumentError, match="backend 'cpu' is ordered"):
        padded_attention(x, x, x, route="dense", backend="cpu")
    with pytest.raises(ArgumentError, match="must be 'auto', 'packed' or 'dense'"):
        padded_attention(x, x, x, route="padded")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="must be 'auto', 'packed' or 'dense'"):
        varlen_mha(torch.randn(4, 32), layout=SeqLayout.from_lengths([4]), num_heads=2, route="nonsense")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="packed x, whose padding is gone"):
        varlen_mha(torch.randn(4, 32), layout=SeqLayout.from_lengths([4]), num_heads=2, route="dense")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does that to autograd functions
def test_the_dense_route_compiles_with_static_shapes() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
        return padded_attention(q, k, v, mask, route="dense", causal=True)

    compiled = torch.compile(call, backend=counter, fullgraph=True)
    tensors = qkv(batch=3, columns=6)
    for lengths in ([6, 6, 6], [1, 2, 3], [0, 0, 1], [0, 0, 0]):
        layout = SeqLayout.from_lengths(lengths, 6)
        expected = padded_attention(*tensors, layout=layout, route="packed", causal=True)
        torch.testing.assert_close(compiled(*tensors, layout.padding_mask()), expected)
    assert counter.frame_count == 1


def test_dense_on_a_device_mask_reads_nothing_with_capacity() -> None:
    mask = SeqLayout.from_lengths([3, 6], 6).padding_mask()
    layout = SeqLayout.from_key_padding_mask(mask, capacity=12)
    tensors = qkv(batch=2, columns=6)
    with count_reads() as reads:
        padded_attention(*tensors, layout=layout, route="dense")
    assert not reads


@pytest.mark.parametrize("columns", [33, 64, 65, 192, 704])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_attention_is_never_left_to_torch_to_choose(
    columns: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-34: very negative logits under a mask at the lengths where cuDNN, torch's choice on Hopper, returned NaN (pytorch#196678)."""

    def chosen(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("F.scaled_dot_product_attention picks a kernel by itself")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", chosen)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, columns, 1, 64, generator=generator) for _ in range(3))
    mask = torch.zeros(2, columns, dtype=torch.bool)
    mask[1, columns // 2 :] = True
    tensors = [x.to(device, dtype) for x in (0.1 * q, 0.1 * k, v)]
    tensors[0][..., 0], tensors[1][..., 0] = 1.0, -120 * 64**0.5
    tensors = [x.requires_grad_() for x in tensors]
    layout = SeqLayout.from_key_padding_mask(mask).to(device)
    rows = [layout.pack(x) for x in tensors]
    ref, naive = (reference_attention(*rows, layout, dtype=wanted) for wanted in (torch.float64, dtype))
    ref_grads, naive_grads = (torch.autograd.grad(x.sum(), tensors, retain_graph=True) for x in (ref, naive))
    for options in (dict(route="dense"), dict(route="packed", backend="sdpa_padded")):
        out = padded_attention(*tensors, layout=layout, **options)  # type: ignore[arg-type]
        assert_within_budget(layout.pack(out), ref, naive)
        for got, want, eager in zip(torch.autograd.grad(out.sum(), tensors), ref_grads, naive_grads, strict=True):
            assert bool(got.isfinite().all())
            if dtype == torch.float32:  # sums that cancel times 960: half precision has no digits left there
                assert_within_budget(got, want.double(), eager, gradient=True)


def test_what_the_padded_call_can_not_do_stays_packed() -> None:
    """Nobody ordered it: the route must not depend on the fill where only one of the two can run the call."""
    layout = SeqLayout.from_lengths(SHORT, 16)
    q, k, v = qkv()
    assert backend_and_route(q, k, v, layout=layout, batch_invariant=True)[:2] == ("cpu", "packed")
    with pytest.raises(ArgumentError, match="`route` must not be 'dense' with batch_invariant"):
        padded_attention(q, k, v, layout=layout, batch_invariant=True, route="dense")
    meta = torch.empty(8, 16, 2, 16, device="meta")
    assert padded_attention(meta, meta, meta, layout=layout.to("meta")).shape == meta.shape


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, at the first forward derivative
@pytest.mark.parametrize("way", WAYS)
def test_forward_derivatives_on_both_routes(way: Way) -> None:
    q, k, v = qkv()
    layout = SeqLayout.from_lengths(SHORT, 16)

    def call(q: Tensor) -> Tensor:
        out: Tensor = padded_attention(q, k, v, layout=layout, route=way, causal=True)
        return out

    _, tangent = torch.func.jvp(call, (q,), (torch.ones_like(q),))
    _, expected = torch.func.jvp(
        lambda q: padded_attention(q, k, v, layout=layout, backend="cpu", causal=True), (q,), (torch.ones_like(q),)
    )
    torch.testing.assert_close(tangent, expected)
