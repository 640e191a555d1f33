"""The adapter of flex_attention: through dynamo, with torch's dense stand-in for the kernel, forward and backward; and its refusals.

The stand-in knows the function of pairs and not the blocks; those are tested in ``test_flex_blocks.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from varlen_attn import ArgumentError, SeqLayout, padded_attention, varlen_attention
from varlen_attn.kernels.cuda import flex
from varlen_attn.kernels.cuda.flex import Flex
from varlen_attn.kernels.problem import Problem, Semantics
from varlen_attn.testing import assert_within_budget, reference_attention
from varlen_attn.testing.strategies import AttentionCase, attention_cases

from ..fake_kernels import for_cpu

# Dynamo looks whether its inputs have a `.grad`, and hides the warning of those that are no leaves where it is not an error already.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
HERE = for_cpu(Flex)
graphs: list[torch.fx.GraphModule] = []


def dense(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """What compiles here: nothing. torch has eager maths for the operator, and its gradients."""
    graphs.append(graph)
    return graph.forward


@pytest.fixture(scope="module", autouse=True)
def _eager_maths_in_place_of_the_kernel() -> Iterator[None]:
    import torch.nn.attention.flex_attention as source

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "_kernels", {})
        patch.setattr(torch, "compile", partial(torch.compile, backend=dense))
        patch.setattr(source, "_validate_device", lambda *tensors: None)  # it says that a CPU has no backward: its kernel has none
        yield
    torch._dynamo.reset()


def tensors(lengths_q: list[int], lengths_k: list[int], heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths_q), heads[0], dims[0]), (sum(lengths_k), heads[1], dims[0]), (sum(lengths_k), heads[1], dims[1]))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def check(
    qkv: list[Tensor], layouts: tuple[SeqLayout, SeqLayout | None], more: tuple[Tensor, ...] = (), backend: Any = HERE, **options: Any
) -> None:
    """Output, log-sum-exp and all gradients (of ``more`` too) against the specification."""
    out, lse = varlen_attention(*qkv, *layouts, backend=backend, return_lse=True, **options)
    ref, ref_lse = reference_attention(*qkv, *layouts, return_lse=True, **options)
    naive, naive_lse = reference_attention(*qkv, *layouts, return_lse=True, dtype=qkv[0].dtype, **options)
    assert not lse.requires_grad
    assert lse.dtype == torch.float32
    assert_within_budget(out, ref, naive, what="output")
    assert_within_budget(lse, ref_lse, naive_lse, what="lse")
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = (*qkv, *more)
    grads, ref_grads, naive_grads = (torch.autograd.grad(x, wanted, grad.to(x)) for x in (out, ref, naive))
    for got, want, eager in zip(grads, ref_grads, naive_grads, strict=True):
        assert_within_budget(got, want.double(), eager, gradient=True)
    blind = torch.isneginf(ref_lse).T
    assert not out[blind].any(), "a query without a visible key gives exactly 0"
    assert not grads[0][blind].any(), "and gets exactly 0"


# -------------------------------------------------------------------- numbers

LONG = [100, 0, 200, 1, 30]
CASES: dict[str, tuple[list[int], list[int] | None, tuple[int, int], tuple[int, int], dict[str, Any]]] = {
    "self": (LONG, None, (2, 2), (16, 16), {}),
    "grouped heads, odd dimensions": ([5, 7, 1], None, (4, 2), (17, 9), dict(causal=True)),
    "empty sequences": ([5, 0, 4, 3], [2, 4, 0, 6], (2, 1), (8, 8), dict(scale=0.4)),
    "bottom-right": ([5, 3, 7], [2, 9, 7], (2, 2), (8, 8), dict(causal=True)),
    "top-left": ([5, 3, 7], [2, 9, 7], (2, 2), (8, 20), dict(causal="top_left")),
    "window": (LONG, None, (2, 1), (16, 16), dict(window=(3, 1))),
    "window of unequal lengths": ([9, 3, 140], [2, 9, 7], (2, 2), (8, 8), dict(window=(2, None), causal="top_left")),
    "softcap": (LONG, None, (2, 2), (16, 16), dict(softcap=0.7, causal=True)),
    "alibi of unequal lengths": ([5, 3, 7], [2, 9, 7], (3, 3), (8, 8), dict(alibi_slopes=torch.tensor([0.5, 0.25, 1.0]))),
    "sinks": ([5, 3, 7], [2, 0, 7], (2, 2), (8, 8), dict(sinks=torch.tensor([0.3, -1.0]))),
    "sinks for blind queries": ([5, 3], [2, 3], (2, 2), (8, 8), dict(sinks=torch.tensor([0.3, -1.0]), causal=True)),
    "everything": (
        [5, 3, 140], [2, 9, 130], (2, 1), (12, 12),
        dict(causal=True, window=(40, 3), softcap=2.0, alibi_slopes=torch.tensor([0.5, 0.25]), sinks=torch.zeros(2),
             score_bias=lambda head, i, j: (head + 1) * 0.1 * (i - j).abs(), scale=0.3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference_forward_and_backward(case: str, dtype: torch.dtype) -> None:
    lengths_q, lengths_k, heads, dims, options = CASES[case]
    layouts = (SeqLayout.from_lengths(lengths_q), None if lengths_k is None else SeqLayout.from_lengths(lengths_k))
    check(tensors(lengths_q, lengths_k or lengths_q, heads, dims, dtype), layouts, **options)


@settings(max_examples=20)
@given(case=attention_cases((torch.float32,)))
def test_any_case_matches_the_reference(case: AttentionCase) -> None:
    options = {k: v for k, v in case.semantics.items() if k not in ("batch_invariant", "deterministic")}
    check(list(case.tensors()[:3]), (case.layout, case.layout_kv), **options)


def test_sinks_have_a_gradient() -> None:
    sinks = torch.tensor([0.3, -1.0], requires_grad=True)
    layout, keys = SeqLayout.from_lengths([5, 3]), SeqLayout.from_lengths([2, 3])
    check(tensors([5, 3], [2, 3], (2, 2), (8, 8), torch.float32), (layout, keys), (sinks,), sinks=sinks, causal=True)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_slack_rows_hold_anything(poison: float) -> None:
    mask = torch.tensor([[False] * 4, [False, True, True, True], [True] * 4])
    layout = SeqLayout.from_key_padding_mask(mask, capacity=9)
    qkv = [torch.randn(9, 2, 8) for _ in range(3)]
    for x in qkv:
        x[5:] = poison
        x.requires_grad_()
    out, lse = varlen_attention(*qkv, layout, backend=HERE, causal=True, return_lse=True)
    grads = torch.autograd.grad(out, qkv, torch.full_like(out, poison).index_fill(0, torch.arange(5), 1.0))
    for x in (out, *grads):
        assert not x[5:].any(), "exactly 0"
        assert x[:5].isfinite().all()
    assert torch.isneginf(lse[:, 5:]).all()
    want = varlen_attention(*(x[:5] for x in qkv), SeqLayout.from_lengths([4, 1]), backend="reference", causal=True)
    torch.testing.assert_close(out[:5], want)


def test_an_updated_layout_is_seen() -> None:
    mask = torch.tensor([[False] * 4, [False, True, True, True]])
    layout = SeqLayout.from_key_padding_mask(mask, capacity=6)
    x = torch.randn(6, 2, 8)
    for current in (mask, ~mask):
        layout.update_(current)
        got = varlen_attention(x, x, x, layout, backend=HERE)
        torch.testing.assert_close(got, varlen_attention(x, x, x, layout, backend="reference"))


# -------------------------------------------------------------------- score biases


def t5(table: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """T5's relative position bias, for 8 buckets on each side: near distances each have one, far ones share them."""

    def bias(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = (j - i).abs()
        far = 4 + (torch.log(distance.clamp(min=1) / 4) / torch.log(torch.tensor(16.0)) * 4).to(torch.int64)
        return table[torch.where(distance < 4, distance, far.clamp(max=7)) + 8 * (j > i), head]

    return bias


def relative(table: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda head, i, j: table[head, (i - j).clamp(-6, 6) + 6]


@pytest.mark.parametrize(("make", "shape"), [(t5, (16, 2)), (relative, (2, 13))])
def test_position_biases_and_their_tables(make: Any, shape: tuple[int, ...]) -> None:
    table = torch.randn(shape, generator=torch.Generator().manual_seed(2), requires_grad=True)
    qkv = tensors([40, 3, 100], [40, 3, 100], (2, 2), (16, 16), torch.float32)
    check(qkv, (SeqLayout.from_lengths([40, 3, 100]), None), (table,), score_bias=make(table))


def test_alibi_as_a_bias_is_alibi() -> None:
    slopes = torch.tensor([0.5, 0.25])
    layout = SeqLayout.from_lengths([7, 4])
    q, k, v = tensors([7, 4], [7, 4], (2, 2), (16, 16), torch.float32)
    got = varlen_attention(q, k, v, layout, score_bias=lambda head, i, j: -slopes[head] * (i - j).abs(), backend=HERE)
    torch.testing.assert_close(got, varlen_attention(q, k, v, layout, alibi_slopes=slopes, backend=HERE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_tensor_is_indexed_by_positions_and_has_a_gradient(causal: bool, dtype: torch.dtype) -> None:
    """It reaches further than any sequence; what no pair asks for gets exactly 0, and may be anything."""
    bias = torch.randn(2, 12, 15, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    layouts = SeqLayout.from_lengths([9, 0, 4]), SeqLayout.from_lengths([7, 3, 11])
    qkv = tensors([9, 0, 4], [7, 3, 11], (2, 1), (16, 16), dtype)
    check(qkv, layouts, (bias,), score_bias=bias, causal=causal)
    (grad,) = torch.autograd.grad(varlen_attention(*qkv, *layouts, score_bias=bias, causal=causal, backend=HERE).sum(), bias)
    assert not grad[:, 9:].any()
    assert not grad[:, :, 11:].any()
    some = bias.detach().clone()
    some[:, 9:], some[:, :, 11:] = float("nan"), float("nan")
    assert varlen_attention(*qkv, *layouts, score_bias=some, causal=causal, backend=HERE).isfinite().all()


def test_a_bias_may_hide_all_keys() -> None:
    layout = SeqLayout.from_lengths([3, 2])
    qkv = tensors([3, 2], [3, 2], (2, 2), (16, 16), torch.float32)
    bias = torch.zeros(2, 3, 3)
    bias[0, 1] = float("-inf")
    out, lse = varlen_attention(*qkv, layout, score_bias=bias, return_lse=True, backend=HERE)
    assert not out[1, 0].any()
    assert not out[4, 0].any()
    assert lse[0].isneginf().tolist() == [False, True, False, False, True]
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), qkv))


def test_a_method_or_a_partial_is_a_bias() -> None:
    class Relative(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(2, 13))

        def forward(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return self.table[head, (i - j).clamp(-6, 6) + 6]

    layout = SeqLayout.from_lengths([5, 3])
    qkv = tensors([5, 3], [5, 3], (2, 2), (16, 16), torch.float32)
    module = Relative()
    for bias in (module, module.forward, Relative()):
        got = varlen_attention(*qkv, layout, score_bias=bias, backend=HERE)
        torch.testing.assert_close(got, varlen_attention(*qkv, layout, score_bias=bias, backend="reference"))


class Sloped:
    def __init__(self, slope: float) -> None:
        self.slope = slope

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.slope * (i - j) * head


@pytest.mark.parametrize("how", ["closure", "partial", "object", "method"])
def test_floats_of_a_bias_are_constants(how: str) -> None:
    """A float that changes becomes a symbol for dynamo, read by ``.item()``: no kernel can."""
    layout = SeqLayout.from_lengths([5, 3])
    qkv = tensors([5, 3], [5, 3], (2, 2), (16, 16), torch.float32)
    for slope in (0.25, 0.5, 0.75):
        bias: Any = {
            "closure": lambda head, i, j: slope * (i - j) * head,  # noqa: B023
            "partial": partial(lambda s, head, i, j: s * (i - j) * head, slope),
            "object": Sloped(slope),
            "method": Sloped(slope).__call__,
        }[how]
        graphs.clear()
        got = varlen_attention(*qkv, layout, score_bias=bias, backend=HERE)
        torch.testing.assert_close(got, varlen_attention(*qkv, layout, score_bias=bias, backend="reference"))
        assert not any(".item()" in part.code for graph in graphs for part in graph.modules() if isinstance(part, torch.fx.GraphModule))


@pytest.mark.parametrize(
    "bias",
    [
        lambda head, i, j: torch.zeros(2, 5, 5),
        lambda head, i, j: torch.nn.functional.embedding((j - i).abs(), torch.zeros(5, 2))[..., head],
    ],
    ids=["a whole tensor", "a module of vectors"],
)
def test_what_is_not_elementwise_is_an_error(bias: Any) -> None:
    layout = SeqLayout.from_lengths([5, 5])
    q = torch.randn(10, 2, 16)
    with pytest.raises(ArgumentError, match=r"`score_bias` must be elementwise .* backend='sdpa_padded'"):
        varlen_attention(q, q, q, layout, score_bias=bias, backend=HERE)


def test_other_errors_are_not_taken_for_one_of_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(kind: Any) -> Any:
        raise torch._dynamo.exc.TorchDynamoException("as it was")

    monkeypatch.setattr(flex, "_kernel", broken)
    q = torch.randn(5, 2, 16)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="as it was"):
        varlen_attention(q, q, q, SeqLayout.from_lengths([5]), score_bias=torch.zeros(2, 5, 5), backend=HERE)


# -------------------------------------------------------------------- what is compiled, and how often


def compiled(*batches: list[int], heads: int = 2, **options: Any) -> int:
    """How often attention on batches of these lengths compiles, forward and backward."""
    before = counters["stats"]["unique_graphs"]
    for lengths in batches:
        x = torch.randn(sum(lengths), heads, 16, requires_grad=True)
        varlen_attention(x, x, x, SeqLayout.from_lengths(lengths), backend=HERE, **options).sum().backward()
    return int(counters["stats"]["unique_graphs"] - before)


def test_lengths_do_not_compile_again() -> None:
    options: dict[str, Any] = dict(softcap=1.25, causal=True)
    assert compiled([100, 40], **options) == 1
    assert compiled([129], [3, 0, 500], [256], [1000, 24], **options) == 0
    assert compiled([40, 5], **options) == 1, "one block"
    assert compiled([2], [128], [3, 0, 50], **options) == 0


def test_a_bias_of_each_layer_does_not_compile_again() -> None:
    compiled([60, 90], score_bias=relative(torch.randn(2, 13)))
    assert compiled([60, 90], score_bias=relative(torch.randn(2, 13))) == 0


def test_more_kinds_than_dynamo_compiles_of_one_code() -> None:
    """It gives up after eight, here after two, and then computes all scores, or raises; each kind has code of its own."""
    with torch._dynamo.config.patch(recompile_limit=2):
        assert [compiled([3, 4], heads=heads, softcap=9.0) for heads in (1, 2, 3, 5)] == [1] * 4


def test_sizes_of_one_and_of_one_block_do_not_add_up_to_too_many() -> None:
    """One row, one block or more, of queries and of keys: nine graphs, which one code may not have."""
    sizes = (1, 5, 200)
    for rows, keys in itertools.product(sizes, sizes):
        layouts = SeqLayout.from_lengths([rows]), SeqLayout.from_lengths([keys])
        q, k, v = tensors([rows], [keys], (2, 2), (16, 16), torch.float32)
        varlen_attention(q, k, v, *layouts, softcap=7.25, backend=HERE)


def test_sizes_marked_as_data_do_not_reach_the_kernel() -> None:
    """`SeqLayout.pack` marks its result, for graphs of the caller's; the lowering of this kernel cannot have such a size."""
    layout = SeqLayout.from_lengths([30, 0, 123])
    q = torch.randn(3, 123, 2, 16)
    graphs.clear()
    padded_attention(q, q, q, layout=layout, softcap=3.75, backend=HERE)
    (graph,) = graphs
    shapes = [x.meta["example_value"].shape for x in graph.graph.nodes if isinstance(x.meta.get("example_value"), Tensor)]
    symbols = {str(size) for shape in shapes for size in shape if isinstance(size, torch.SymInt)}
    assert symbols, "dynamic"
    assert not any(name.startswith("u") for name in symbols)


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch about itself
def test_an_order_becomes_part_of_the_callers_graph_where_sizes_are_static() -> None:
    """In capacity mode; a name is refused while tracing, because sizes are data otherwise. An object is not asked."""
    mask = torch.arange(200) >= torch.tensor([[150], [0], [20]])
    layout = SeqLayout.from_key_padding_mask(mask, capacity=300, validate=False)
    x = torch.randn(300, 2, 16, requires_grad=True)

    def attend(x: Tensor, layout: SeqLayout, backend: Any = HERE) -> Tensor:
        out: Tensor = varlen_attention(x, 0.5 * x, x, layout, causal=True, softcap=4.5, backend=backend)
        return out

    graphs.clear()
    out = torch.compile(attend, fullgraph=True)(x, layout)
    (graph,) = graphs
    assert "higher_order.flex_attention" in graph.code
    want = attend(x, layout, "reference")
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(*(torch.autograd.grad(result.square().sum(), x)[0] for result in (out, want)), atol=1e-4, rtol=1e-4)


def test_only_the_kernel_for_prefill_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one for decoding, nor flash-attn 4; with the block mask of the layout, and with no log-sum-exp unless it is asked."""
    import torch.nn.attention.flex_attention as source

    seen: dict[str, Any] = {}

    def flex_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        seen.update(options)
        return torch.zeros_like(q), source.AuxOutput(lse=None)

    monkeypatch.setattr(source, "flex_attention", flex_attention)
    monkeypatch.setattr(flex, "_kernel", lambda kind: flex._attend)
    layout = SeqLayout.from_lengths([300, 100])
    q = torch.randn(400, 2, 16)
    varlen_attention(q, q, q, layout, backend=HERE)
    assert seen["kernel_options"] == {"BACKEND": "TRITON"}
    assert seen["return_aux"] == source.AuxRequest(lse=False)
    assert seen["score_mod"] is None
    visible = flex.visible_pairs(layout, layout, Semantics())
    assert seen["block_mask"].kv_indices is visible.blocks.kv_indices
    assert seen["block_mask"].full_q_num_blocks is visible.blocks.full_q_num_blocks
    assert seen["block_mask"].seq_lengths == (400, 400)
    assert seen["block_mask"].BLOCK_SIZE == (128, 128)


# -------------------------------------------------------------------- refusals


def refusals(**fields: Any) -> str:
    options = {k: fields.pop(k) for k in tuple(fields) if k in Semantics.__dataclass_fields__}
    machine: dict[str, Any] = dict(device_type="cuda", capability=(9, 0), rocm=False, torch_version="2.13.0", dtype=torch.bfloat16)
    return "; ".join(str(r) for r in Flex().refusals(Problem(**{**machine, **fields}, semantics=Semantics(**options))))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (dict(dropout_p=0.1), "dropout"),
        (dict(deterministic=True, needs_grad=True), "deterministic gradients"),
        (dict(batch_invariant=True), "bitwise independent of batch-mates"),
        (dict(tracing=True), "torch.compile and fake tensors"),
        (dict(transformed=True), "torch.func"),
        (dict(dtype=torch.float64), "float64"),
        (dict(head_dim=320), "up to 256"),
        (dict(capability=(7, 5)), "8.0"),
        (dict(rocm=True), "not known to be right on ROCm"),
        (dict(device_type="cpu"), "cuda only"),
        (dict(device_type="mps"), "cuda only"),
        (dict(device_type="xpu"), "cuda only"),
        (dict(torch_version="2.10.0"), "2.11"),
    ],
    ids=str,
)
def test_what_it_refuses(fields: dict[str, Any], text: str) -> None:
    assert text in refusals(**fields)


def test_what_it_takes() -> None:
    assert not refusals()
    assert not refusals(
        causal="top_left", window=(3, 1), softcap=30.0, alibi=True, score_bias=True, sinks=True, return_lse=True, needs_grad=True,
        host_lengths=False, self_attention=False, num_heads=6, num_kv_heads=3, head_dim=17, value_head_dim=40,
    )  # fmt: skip


def test_triton_is_asked_for_where_it_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: dict[str, str] = {}
    monkeypatch.setattr(flex, "installed_version", installed.get)
    here = Problem(device_type="cuda", capability=(9, 0), rocm=False)
    assert Flex().missing(here) is None, "a machine without a GPU is asked about another one"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "Triton is not installed" in str(Flex().missing(here))
    assert Flex().missing(Problem(device_type="cuda", capability=(9, 0), torch_version="2.12.0")) is None
    installed["pytorch-triton"] = "3.5.0"
    assert Flex().missing(here) is None


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_rows_at_all(lengths: list[int]) -> None:
    layout = SeqLayout.from_lengths(lengths)
    qkv = tensors(lengths, lengths, (2, 1), (8, 12), torch.float32)
    out, lse = varlen_attention(*qkv, layout, backend=HERE, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 2, 12), (2, 0))
    assert all(x.shape[0] == 0 for x in torch.autograd.grad(out.sum(), qkv))


def test_rows_without_a_position() -> None:
    """A padded length of 0 and capacity: there are rows, and no bias that they could ask for."""
    layout = SeqLayout.from_key_padding_mask(torch.zeros(2, 0, dtype=torch.bool), capacity=3)
    qkv = [torch.randn(3, 2, 16, requires_grad=True) for _ in range(3)]
    out, lse = varlen_attention(*qkv, layout, score_bias=torch.zeros(2, 0, 0), return_lse=True, backend=HERE)
    assert not out.any()
    assert lse.isneginf().all()
    assert not any(x.any() for x in torch.autograd.grad(out.sum(), qkv))


def test_no_keys_at_all() -> None:
    layouts = SeqLayout.from_lengths([2, 1]), SeqLayout.from_lengths([0, 0])
    qkv = tensors([2, 1], [0, 0], (2, 1), (8, 12), torch.float32)
    check(qkv, layouts)


@given(data=st.data())
@settings(max_examples=5)
def test_views_are_as_their_copies(data: st.DataObject) -> None:
    case = data.draw(attention_cases((torch.float32,)))
    assume(case.layout_kv is None)
    rows, heads = case.layout.num_rows, case.shape.kv_heads
    fused = torch.randn(rows, 3, heads, 16)
    got = varlen_attention(*fused.unbind(1), case.layout, backend=HERE)
    want = varlen_attention(*(x.contiguous() for x in fused.unbind(1)), case.layout, backend=HERE)
    assert torch.equal(got, want)
