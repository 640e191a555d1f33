"""`torch.compile`: one graph, no breaks, whatever the lengths, in every form in which they can be told and on every backend of a CPU.

Nobody sets a flag of dynamo's: 50 batches of one padded shape, totals 0 and 1 among them, forward and backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from varlen_attn import (
    SeqLayout,
    VarlenMultiheadAttention,
    VarlenTransformerEncoder,
    VarlenTransformerEncoderLayer,
    padded_attention,
    record,
    use_backend,
    varlen_mha,
)
from varlen_attn.kernels.base import Backend
from varlen_attn.kernels.cuda.torch_varlen import TorchVarlen

from .kernels.fake_kernels import flash_backward, flash_forward, for_cpu, on_cpu

B, S, D, N = 3, 8, 16, 4
Call = Callable[..., Tensor]

pytestmark = [
    pytest.mark.filterwarnings("ignore:every row of the mask begins:varlen_attn.LayoutWarning"),  # random masks
    pytest.mark.filterwarnings("ignore:row . of the mask has no token"),
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>"),  # dynamo about any autograd function
    pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning"),  # torch about itself
]


def batches(count: int = 50) -> list[list[int]]:
    """Of different lengths; first some, then the totals that specialise shapes, then any."""
    generator = torch.Generator().manual_seed(0)
    fixed = [[5, 2, 0], [1, 3, 1], [1, 0, 0], [0, 0, 0], [S, S, S], [0, 0, 1], [2, 0, 0]]
    drawn = torch.randint(0, S + 1, (4 * count, B), generator=generator).tolist()
    distinct = list(dict.fromkeys(tuple(n) for n in [*fixed, *drawn]))[:count]
    assert len(distinct) == count
    return [list(n) for n in distinct]


def mask_of(lengths: list[int], i: int = 0) -> Tensor:
    """True is padding; on the left in every third batch."""
    mask = torch.arange(S) >= torch.tensor(lengths)[:, None]
    return mask.flip(1) if i % 3 == 2 else mask


# -------------------------------------------------------------------- what is compiled


class OneCall(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.w, self.o, self.options = nn.Parameter(torch.randn(3 * D, D) / 4), nn.Parameter(torch.randn(D, D) / 4), options

    def forward(self, x: Tensor, mask: Tensor | None = None, layout: SeqLayout | None = None, backend: Any = "auto") -> Tensor:
        weights = {"in_proj_weight": self.w, "out_proj_weight": self.o}
        return varlen_mha(x, mask, layout=layout, num_heads=N, backend=backend, **weights, **self.options)


class Grouped(nn.Module):
    """`padded_attention` with two key/value heads for four query heads; its own projections read padding."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.q, self.kv, self.options = nn.Linear(D, N * 8), nn.Linear(D, 2 * 2 * 8), options

    def forward(self, x: Tensor, mask: Tensor | None = None, layout: SeqLayout | None = None, backend: Any = "auto") -> Tensor:
        key, value = self.kv(x).unflatten(-1, (2, 2, 8)).unbind(2)
        out: Tensor = padded_attention(self.q(x).unflatten(-1, (N, 8)), key, value, mask, layout=layout, backend=backend, **self.options)
        return out


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner, self.options = VarlenMultiheadAttention(D, N, batch_first=True), options

    def forward(self, x: Tensor, mask: Tensor | None = None, layout: SeqLayout | None = None, backend: Any = "auto") -> Tensor:
        out: Tensor = self.inner(x, key_padding_mask=mask, layout=layout, backend=backend, **self.options)[0]
        return out


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = VarlenTransformerEncoderLayer(D, N, 32, dropout=0.0, batch_first=True)
        self.inner, self.options = VarlenTransformerEncoder(layer, 1, norm=nn.LayerNorm(D)), options

    def forward(self, x: Tensor, mask: Tensor | None = None, layout: SeqLayout | None = None, backend: Any = "auto") -> Tensor:
        for layer in self.inner.layers:
            layer.self_attn.backend = backend
        out: Tensor = self.inner(x, src_key_padding_mask=mask, layout=layout, **self.options)
        return out


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "varlen_mha": OneCall,
    "module": Attention,
    "encoder, causal": lambda: Encoder(is_causal=True),
    "padded_attention, causal, grouped heads": lambda: Grouped(causal=True),
    "padded_attention, window": lambda: Grouped(window=(2, 1)),
}


MASK = torch.eye(S).roll(1, 1).bool()
DENSE: dict[str, Callable[[], nn.Module]] = {
    "module, weights": lambda: Attention(need_weights=True),
    "module, any mask": lambda: Attention(attn_mask=MASK),
    "encoder, any mask": lambda: Encoder(mask=MASK),
}
HOSTS_AND_DENSE = HOSTS | DENSE


class InGraph(nn.Module):
    """A mask goes in, and the layout is made inside."""

    def __init__(self, inner: nn.Module, capacity: int | None) -> None:
        super().__init__()
        self.inner, self.capacity = inner, capacity

    def forward(self, x: Tensor, mask: Tensor, backend: Any) -> Any:
        return self.inner(x, layout=SeqLayout.from_key_padding_mask(mask, capacity=self.capacity), backend=backend)


CAPACITY = {"capacity in the graph": B * S, "smaller capacity in the graph": 20}
FORMS = ("mask", "layout in the graph", *CAPACITY, "layout from a mask", "layout from lengths")
WHOLE = ("varlen_mha", "padded_attention, causal, grouped heads")  # in every form; the others in the two that are most different


def prepare(form: str, model: nn.Module) -> tuple[nn.Module, Callable[[list[int], int], dict[str, Any]]]:
    """What to compile, and its arguments beside ``x`` for a batch."""
    if "in the graph" in form:
        return InGraph(model, CAPACITY.get(form)), lambda n, i: {"mask": mask_of(n, i)}
    if form == "mask":
        return model, lambda n, i: {"mask": mask_of(n, i)}
    if form == "layout from lengths":
        return model, lambda n, i: {"layout": SeqLayout.from_lengths(n, S, "left" if i % 3 == 2 else "right")}
    return model, lambda n, i: {"layout": SeqLayout.from_key_padding_mask(mask_of(n, i), holes="packed")}


def compilations(
    host: str, form: str, backend: str | Backend = "auto", compiler: str = "aot_eager", dtype: torch.dtype = torch.float32, count: int = 50
) -> int:
    """Compile, compare values and gradients with eager for ``count`` batches, and count the graphs."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = HOSTS_AND_DENSE[host]().to(dtype)
    whole, arguments = prepare(form, model)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(whole, backend=counter, fullgraph=True)
    leaves = list(model.parameters())
    close = {} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    for i, lengths in enumerate(batches(count)):
        if sum(lengths) > CAPACITY.get(form, B * S):
            continue
        padding = mask_of(lengths, i)
        x = torch.randn(B, S, D, dtype=dtype)
        x = (x if isinstance(model, Grouped) else x.masked_fill(padding[..., None], torch.nan)).requires_grad_()
        given = arguments(lengths, i)
        outs = [call(x, **given, backend=backend) for call in (compiled, whole)]
        real = ~padding
        torch.testing.assert_close(outs[0], outs[1], **close)
        assert not outs[0][padding].any()
        cotangent = torch.randn_like(outs[0])
        got, want = (torch.autograd.grad((out * cotangent).sum(), [x, *leaves], materialize_grads=True) for out in outs)
        torch.testing.assert_close(got[0][real], want[0][real], **close)
        torch.testing.assert_close(got[1:], want[1:], **close)
    torch._dynamo.reset()
    return int(counter.frame_count)


# -------------------------------------------------------------------- how often


@pytest.mark.parametrize(
    ("host", "form"),
    [
        pytest.param(host, form, marks=[pytest.mark.native_too] if (host, form) == ("encoder, causal", "mask") else [])
        for host in HOSTS
        for form in (FORMS if host in WHOLE else ("mask", "layout from lengths"))
    ],
)
def test_one_graph_for_fifty_batches(host: str, form: str) -> None:  # row 36 of 3a
    assert compilations(host, form) == 1


@pytest.mark.parametrize("form", ["mask", "layout from lengths"])
@pytest.mark.parametrize("host", DENSE)
def test_one_graph_of_the_dense_way(host: str, form: str) -> None:
    """R-18: what needs padded attention does not look at lengths either; a layout that is dense, or not padded on the right, is another
    kind of batch."""
    assert compilations(host, form, count=20) <= 2


@pytest.mark.parametrize("form", ["mask", "capacity in the graph", "layout from lengths"])
@pytest.mark.parametrize("backend", ["sdpa_padded", pytest.param("cpu_native", marks=pytest.mark.native)])
def test_one_graph_on_other_backends(backend: str, form: str) -> None:
    assert compilations("padded_attention, causal, grouped heads", form, backend) == 1


@pytest.fixture
def torch_varlen() -> Iterator[Backend]:
    with on_cpu(_flash_attention_forward=flash_forward, _flash_attention_backward=flash_backward):
        yield for_cpu(TorchVarlen)


@pytest.mark.parametrize("form", ["mask", "capacity in the graph", "layout from lengths"])
@pytest.mark.parametrize("host", ["padded_attention, causal, grouped heads", "varlen_mha"])
def test_one_graph_on_torch_varlen(host: str, form: str, torch_varlen: Backend) -> None:
    """R-18: torch's own Python, op and meta functions, on a stand-in for its kernel."""
    assert compilations(host, form, torch_varlen, dtype=torch.float16, count=20) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "form"),
    [("encoder, causal", "mask"), pytest.param("padded_attention, window", "capacity in the graph", marks=pytest.mark.native_too)],
)
def test_inductor_compiles_one_graph(host: str, form: str) -> None:
    assert compilations(host, form, compiler="inductor") == 1


def test_the_count_can_fail() -> None:
    """The control: rows that are not marked as data compile for 0, for 1, for a number and for any."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda rows: rows.sum(0), backend=counter, fullgraph=True)
    for lengths in batches(8):
        compiled(torch.ones(sum(lengths), 2))
    assert counter.frame_count > 2
    torch._dynamo.reset()


@pytest.mark.parametrize("form", ["no mask", "mask", "layout from lengths", "capacity in the graph"])
def test_other_shapes_cost_what_they_cost_anywhere(form: str) -> None:
    """R-18: torch compiles once more when B or S first changes, for any of both from then on, and not again for the lengths."""
    torch._dynamo.reset()
    counter, model = CompileCounterWithBackend("aot_eager"), OneCall(causal=True)
    inside = form == "capacity in the graph"

    def call(x: Tensor, given: Any) -> Tensor:
        if inside:
            return model(x, layout=SeqLayout.from_key_padding_mask(given, capacity=given.numel()))  # type: ignore[no-any-return]
        return model(x, layout=given) if form == "layout from lengths" else model(x, given)  # type: ignore[no-any-return]

    compiled, counts = torch.compile(call, backend=counter, fullgraph=True), []
    for size, padded_len in ((3, 8), (3, 8), (3, 12), (5, 8), (4, 9), (7, 16), (2, 8)):
        for seed in range(2):
            lengths = torch.randint(0, padded_len + 1, (size,), generator=torch.Generator().manual_seed(seed))
            mask = torch.arange(padded_len) >= lengths[:, None]
            given = SeqLayout.from_lengths(lengths.tolist(), padded_len) if form == "layout from lengths" else mask
            given = None if form == "no mask" else given
            x = torch.randn(size, padded_len, D)
            torch.testing.assert_close(compiled(x, given), call(x, given))
        counts.append(counter.frame_count)
    assert counts[:2] == [1, 1]
    assert counts[-1] <= 3, counts
    torch._dynamo.reset()


# -------------------------------------------------------------------- orders and records around compiled calls


@pytest.mark.native_too
def test_orders_and_records_around_compiled_calls() -> None:
    """R-11: an order recompiles and its end returns to the first graph; what runs in our op is seen at each run, others once."""
    torch._dynamo.reset()
    counter, model = CompileCounterWithBackend("aot_eager"), OneCall()
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def run(i: int, order: AbstractContextManager[None]) -> list[tuple[str, bool]]:
        lengths = batches(20)[i]
        with order, record() as log:
            out = compiled(x := torch.randn(B, S, D), mask_of(lengths))
        torch.testing.assert_close(out, model(x, mask_of(lengths)))
        return [(c.backend, c.traced) for c in log if c.rows is None or c.rows == sum(lengths)]

    native = ("cpu_native", False) if run(0, nullcontext())[-1][0] == "cpu_native" else ("cpu", False)
    assert [run(i, nullcontext()) for i in (1, 2, 3)] == [[native]] * 3
    assert counter.frame_count == 1
    assert run(4, use_backend("sdpa_padded")) == [("sdpa_padded", True)]
    assert run(5, use_backend("sdpa_padded")) == []
    assert counter.frame_count == 2
    assert run(6, nullcontext()) == [native]
    assert counter.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.native_too
def test_a_compiled_layer_in_an_eager_stack_sees_packed_rows() -> None:
    """R-18: rows that the stack packed are data too."""
    torch._dynamo.reset()
    counter, model = CompileCounterWithBackend("aot_eager"), Encoder()
    compiled = copy.deepcopy(model)
    compiled.inner.layers[0].compile(backend=counter, fullgraph=True)
    for i, lengths in enumerate(batches()):
        x, layout = torch.randn(B, S, D), SeqLayout.from_lengths(lengths, S, "left" if i % 2 else "right")
        torch.testing.assert_close(compiled(x, layout=layout), model(x, layout=layout))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.native_too
def test_a_compiled_layer_of_rows_that_the_caller_packed() -> None:
    """R-18: such rows are the caller's, so the layer compiles for 0, for 1, for a number and for any, as with every size in torch."""
    torch._dynamo.reset()
    counter, layer = CompileCounterWithBackend("aot_eager"), Encoder().inner.layers[0]
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for i, lengths in enumerate(batches()):
        layout = SeqLayout.from_lengths(lengths, S, "left" if i % 2 else "right")
        rows = layout.pack(torch.randn(B, S, D))
        torch.testing.assert_close(compiled(rows, layout=layout), layer(rows, layout=layout))
    assert counter.frame_count <= 4
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["a branch", "torch's layer", "torch's attention"])
def test_packed_rows_are_tensors_like_any_in_code_of_the_caller(how: str) -> None:
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(D, N, 32, batch_first=True).eval()

    def call(rows: Tensor) -> Tensor:
        if how == "a branch":
            return rows.mean(0) if len(rows) and rows.shape[0] > 4 else rows.sum(0)
        return layer(rows[None]) if how == "torch's layer" else F.scaled_dot_product_attention(rows[None], rows[None], rows[None])

    layout = SeqLayout.from_lengths([3, 2], S)
    rows = layout.pack(torch.randn(2, S, D))
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(rows), call(rows))
    torch._dynamo.reset()


@pytest.mark.parametrize("batch", [(0, 4), (2, 0), (2, 4)], ids=["no sequences", "no columns", "no tokens"])
def test_gradients_of_nothing_are_zeros(batch: tuple[int, int]) -> None:
    """Of sinks and score biases too."""

    def call(x: Tensor, mask: Tensor, sinks: Tensor, bias: Tensor) -> Tensor:
        return padded_attention(x, x, x, mask, sinks=sinks, score_bias=bias)

    tensors = [torch.randn(shape, requires_grad=True) for shape in ((*batch, N, 8), (N,), (N, S, S))]
    x, sinks, bias = tensors
    torch.compile(call, fullgraph=True, backend="aot_eager")(x, torch.ones(batch, dtype=torch.bool), sinks, bias).sum().backward()
    for tensor in tensors:
        assert tensor.grad is not None
        assert not tensor.grad.any()


# -------------------------------------------------------------------- sizes and numbers that change


@pytest.mark.parametrize(("host", "how"), [*((host, "dynamic=True") for host in HOSTS), ("encoder, causal", "mark_dynamic")])
def test_any_size_from_the_first_call_on(host: str, how: str) -> None:
    """`dynamic=True` makes symbols of all sizes, of heads and widths too, which the choice of a kernel needs as numbers."""
    torch._dynamo.reset()
    counter, model = CompileCounterWithBackend("eager"), HOSTS[host]()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True if how == "dynamic=True" else None)
    for size, padded_len in ((3, 8), (5, 12), (2, 7), (7, 33)):
        lengths = torch.randint(0, padded_len + 1, (size,), generator=torch.Generator().manual_seed(size))
        x, mask = torch.randn(size, padded_len, D), torch.arange(padded_len) >= lengths[:, None]
        for given in (x, mask):
            if how == "mark_dynamic":
                torch._dynamo.mark_dynamic(given, [0, 1])
        torch.testing.assert_close(compiled(x, mask), model(x, mask))
    assert counter.frame_count == 1
    torch._dynamo.reset()


CHANGING: dict[str, list[dict[str, Any]]] = {
    "heads": [{"heads": 2}, {"heads": 6}, {"heads": 3}],
    "head dims": [{"width": 8}, {"width": 16}, {"width": 24}],
    "dtypes": [{"dtype": torch.float32}, {"dtype": torch.bfloat16}, {"dtype": torch.float64}],
    "scale": [{"scale": 0.3}, {"scale": 0.7}, {"scale": 2}, {"scale": None}],
    "softcap": [{"softcap": 3.0}, {"softcap": 5.0}, {"softcap": 7.0}],
    "window": [{"window": (2, 1)}, {"window": (3, 1)}, {"window": (4, None)}, {"window": None}],
    "dropout": [{"dropout_p": 0.0}, {"dropout_p": 1.0}, {"dropout_p": 0.5}],
    "causal": [{"causal": False}, {"causal": True}, {"causal": "top_left"}],
}


@pytest.mark.parametrize("what", CHANGING)
def test_compiled_once_and_called_otherwise(what: str) -> None:
    """Dynamo makes a symbol of a number that changed; each value has a graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(padded_attention, backend=counter, fullgraph=True)
    for given in CHANGING[what]:
        options = dict(given)
        heads, width, dtype = options.pop("heads", 4), options.pop("width", 8), options.pop("dtype", torch.float32)
        x = torch.randn(B, S, heads, width, dtype=dtype)
        outs = [call(x, x, x, mask_of([5, 2, 0]), **options) for call in (compiled, padded_attention)]
        if options.get("dropout_p") == 0.5:
            assert bool(outs[0].any())
            assert not outs[0][mask_of([5, 2, 0])].any()
        else:
            torch.testing.assert_close(*outs)
    assert counter.frame_count == len(CHANGING[what])
    torch._dynamo.reset()
