"""Export: `torch.export`, `torch.jit.trace` and ONNX record padded attention of aten ops, which serves every mask (R-56)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from varlen_attn import (
    ArgumentError,
    BackendRefused,
    DtypeError,
    LayoutError,
    SeqLayout,
    VarlenMultiheadAttention,
    VarlenTransformerDecoder,
    VarlenTransformerDecoderLayer,
    VarlenTransformerEncoder,
    VarlenTransformerEncoderLayer,
    enable,
    padded_attention,
    record,
    use_backend,
    varlen_attention,
    varlen_mha,
)
from varlen_attn.attention.export import static_attention, static_graph
from varlen_attn.layout.padded import PaddedRows
from varlen_attn.testing import assert_within_budget, reference_attention

B, S, D, N = 3, 6, 16, 4
AUTO = torch.export.Dim.AUTO
LENGTHS = ([6, 2, 3], [1, 6, 3], [0, 0, 0], [6, 6, 6], [4, 0, 5])

pytestmark = [
    pytest.mark.filterwarnings("ignore:row . of the mask has no token"),
    pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning"),
    # torch about itself, where it exports
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>"),
]


def right(lengths: list[int], size: int = S) -> Tensor:
    return torch.arange(size) >= torch.tensor(lengths)[:, None]


HOLES = torch.tensor([[0, 1, 0, 0, 1, 1], [1, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
ALIKE = [right(n) for n in LENGTHS] + [right(n).flip(1) for n in LENGTHS]


class Attention(nn.Module):
    """`padded_attention` with grouped heads."""

    def __init__(self, cross: bool = False, **options: Any) -> None:
        super().__init__()
        self.q, self.kv, self.cross, self.options = nn.Linear(D, N * 8), nn.Linear(D, 2 * 2 * 8), cross, options

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        key, value = self.kv(x).unflatten(-1, (2, 2, 8)).unbind(2)
        query, masks = self.q(x).unflatten(-1, (N, 8)), {"key_padding_mask": mask}
        if self.cross:  # other lengths, other sides, fewer rows
            query, masks["query_padding_mask"] = query[:, 2:], mask.flip(0)[:, 2:]
        out = padded_attention(query, key, value, **masks, **self.options)
        return torch.cat([out[0].flatten(2), out[1].transpose(1, 2)], -1) if self.options.get("return_lse") else out


class OneCall(nn.Module):
    def __init__(self, stacked: bool = False, **options: Any) -> None:
        super().__init__()
        self.w, self.o = nn.Parameter(torch.randn(3 * D, D) / 4), nn.Parameter(torch.randn(D, D) / 4)
        self.stacked, self.options = stacked, options

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.stacked:
            return varlen_mha((x @ self.w.T).unflatten(-1, (3, N, 4)), mask, **self.options)
        return varlen_mha(x, mask, num_heads=N, in_proj_weight=self.w, out_proj_weight=self.o, **self.options)


class Module(nn.Module):
    """One of our modules, called as torch's."""

    def __init__(self, inner: nn.Module, call: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.call(self.inner, x, mask)


def encoder(**options: Any) -> VarlenTransformerEncoder:
    layer = VarlenTransformerEncoderLayer(D, N, 32, batch_first=True, **options)
    return VarlenTransformerEncoder(layer, 2, norm=nn.LayerNorm(D))


def enabled() -> nn.Module:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, N, 32, batch_first=True), 2, enable_nested_tensor=False)
    enable(model)
    return model


def decoder() -> VarlenTransformerDecoder:
    return VarlenTransformerDecoder(VarlenTransformerDecoderLayer(D, N, 32, batch_first=True), 1)


def with_a_layout(model: Any, x: Tensor, mask: Tensor) -> Tensor:
    return model(x, layout=SeqLayout.from_key_padding_mask(mask, capacity=40))  # type: ignore[no-any-return]


def torch_masks(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


def mha(**options: Any) -> VarlenMultiheadAttention:
    return VarlenMultiheadAttention(D, N, batch_first=True, **options)


BIAS = torch.randn(N, S, S, generator=torch.Generator().manual_seed(1))
MODELS: dict[str, Callable[[], nn.Module]] = {
    "padded_attention": Attention,
    "causal": lambda: Attention(causal=True, scale=0.7),
    "window": lambda: Attention(window=(1, 2)),
    "causal window": lambda: Attention(window=(2, None), causal=True),
    "softcap": lambda: Attention(softcap=2.0, causal=True),
    "alibi": lambda: Attention(alibi_slopes=torch.tensor([0.1, 0.2, 0.4, 0.8])),
    "sinks": lambda: Attention(sinks=torch.tensor([0.1, -0.2, 0.4, 0.8])),
    "score bias": lambda: Attention(score_bias=BIAS),
    "score bias function": lambda: Attention(score_bias=lambda head, i, j: 0.1 * head * (i - j).abs()),
    "log-sum-exp": lambda: Attention(return_lse=True),
    "cross": lambda: Attention(cross=True),
    "cross, bottom-right window": lambda: Attention(cross=True, window=(1, 0)),
    "cross, causal top-left": lambda: Attention(cross=True, causal="top_left"),
    "cross, log-sum-exp, causal": lambda: Attention(cross=True, causal=True, return_lse=True),
    "varlen_mha": OneCall,
    "varlen_mha causal": lambda: OneCall(causal=True),
    "varlen_mha stacked": lambda: OneCall(stacked=True),
    "varlen_mha without projections": lambda: Module(nn.Identity(), lambda m, x, mask: varlen_mha(x, mask, num_heads=N)),
    "module": lambda: Module(mha(), lambda m, x, mask: m(x, key_padding_mask=mask)[0]),
    "module, causal": lambda: Module(mha(), lambda m, x, mask: m(x, key_padding_mask=mask, is_causal=True)[0]),
    "module, weights": lambda: Module(mha(), lambda m, x, mask: m(x, key_padding_mask=mask, need_weights=True)[1]),
    "module, another key": lambda: Module(mha(), lambda m, x, mask: m(x[:, :3], x.flip(1), key_padding_mask=mask.flip(1))[0]),
    "module, torch's rows": lambda: Module(mha(zero_padding_rows=False), lambda m, x, mask: m(x, key_padding_mask=mask)[0]),
    "module, layout": lambda: Module(mha(), lambda m, x, mask: with_a_layout(m, x, mask)[0]),
    "module, added keys": lambda: Module(mha(add_bias_kv=True, add_zero_attn=True), lambda m, x, mask: m(x, key_padding_mask=mask)[0]),
    "encoder": lambda: Module(encoder(), lambda m, x, mask: m(x, src_key_padding_mask=mask)),
    "encoder, causal": lambda: Module(encoder(norm_first=True), lambda m, x, mask: m(x, src_key_padding_mask=mask, is_causal=True)),
    "encoder, layout": lambda: Module(encoder(), with_a_layout),
    "encoder, sequence first": lambda: Module(
        VarlenTransformerEncoder(VarlenTransformerEncoderLayer(D, N, 32), 1), lambda m, x, mask: m(x.transpose(0, 1), None, mask)
    ),
    "encoder, additive padding": lambda: Module(encoder(), lambda m, x, mask: m(x, src_key_padding_mask=torch_masks(mask))),
    "encoder, any mask": lambda: Module(encoder(), lambda m, x, mask: m(x, torch.eye(S).roll(1, 1).bool(), mask)),
    "enabled encoder": lambda: Module(enabled(), lambda m, x, mask: m(x, src_key_padding_mask=mask)),
    "decoder": lambda: Module(decoder(), lambda m, x, mask: m(x[:, 1:], x, None, None, mask[:, 1:], mask.flip(0), tgt_is_causal=True)),
}
DISTANCES = ("window", "alibi", "score bias")  # with holes, the eager call refuses them
READS_PADDING = ("added keys", "additive")


def poisoned(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(mask[..., None], torch.nan)


def masks_for(name: str) -> list[Tensor]:
    return ALIKE if any(word in name for word in DISTANCES) else [*ALIKE, HOLES]


def same_for_every_mask(name: str, graph: Any, model: nn.Module) -> None:
    for mask in masks_for(name):
        x = torch.randn(B, S, D)
        if "cross" not in name and "decoder" not in name and "another" not in name:
            x = poisoned(x, mask)
        if "torch's rows" in name:
            x = x.nan_to_num()
        with torch.no_grad():
            torch.testing.assert_close(graph(x, mask), model(x, mask), atol=2e-5, rtol=1e-4)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def names_of(program: Any) -> set[str]:
    return {str(n.target) for m in program.graph_module.modules() for n in m.graph.nodes if n.op == "call_function"}


EXAMPLE = (torch.randn(B, S, D), ALIKE[0])


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_program_serves_every_mask(name: str) -> None:
    """R-56: right, left, empty and full rows, holes; NaN at padding; aten ops only, and none whose result's size is data."""
    model = build(name)
    program = torch.export.export(model, EXAMPLE)
    found = names_of(program)
    assert all(n.startswith("aten.") or "getitem" in n for n in found), found
    assert not any("nonzero" in n or "masked_select" in n or "_local_scalar_dense" in n for n in found)
    same_for_every_mask(name, program.module(), model)


@pytest.mark.parametrize("name", ["cross, bottom-right window", "score bias", "varlen_mha causal", "module, weights", "encoder", "decoder"])
def test_dynamo_exports_the_same(name: str) -> None:
    model = build(name)
    program = torch.export.export(model, EXAMPLE, strict=True)
    assert all(n.startswith("aten.") or "getitem" in n for n in names_of(program))
    same_for_every_mask(name, program.module(), model)


@pytest.mark.parametrize("name", ["padded_attention", "causal window", "sinks", "varlen_mha", "module", "encoder, layout", "decoder"])
def test_sizes_may_be_dynamic(name: str) -> None:
    model = build(name)
    shapes = ({0: AUTO, 1: AUTO}, {0: AUTO, 1: AUTO})
    graph = torch.export.export(model, EXAMPLE, dynamic_shapes=shapes).module()
    same_for_every_mask(name, graph, model)
    for lengths, size in (([4, 1, 3, 7, 2], 7), ([3, 2], 4)):
        x, mask = torch.randn(len(lengths), size, D), right(lengths, size)
        with torch.no_grad():
            torch.testing.assert_close(graph(x, mask), model(x, mask), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["padded_attention", "log-sum-exp", "varlen_mha stacked", "varlen_mha without projections", "module, added keys", "encoder"]
)
def test_sizes_may_have_names(name: str) -> None:
    """R-56: a named dimension takes no guard that does not hold in all of its range, from 0 on."""
    model = build(name)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("columns")}
    graph = torch.export.export(model, EXAMPLE, dynamic_shapes=(sizes, sizes)).module()
    for lengths, size in (([4, 1, 3, 7, 2], 7), ([3, 2], 4), ([1], 1)):
        x, mask = torch.randn(len(lengths), size, D), right(lengths, size)
        with torch.no_grad():
            torch.testing.assert_close(graph(x, mask), model(x, mask), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_trace_serves_every_mask(name: str, tmp_path: Path) -> None:
    """R-56: `torch.jit.trace` runs Python once, with one mask; saved and loaded, the trace is right for the others."""
    model = build(name)
    torch.jit.save(torch.jit.trace(model, EXAMPLE), tmp_path / "model.pt")
    same_for_every_mask(name, torch.jit.load(tmp_path / "model.pt"), model)


def test_packing_that_is_written_out_is_exported_as_it_stands() -> None:
    """With a number of rows that is data, and our ops; traced likewise."""

    class Packed(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            layout = SeqLayout.from_key_padding_mask(mask)
            rows = layout.pack(x).unflatten(-1, (N, -1))
            return layout.unpack(varlen_attention(rows, rows, rows, layout, causal=True).flatten(1))

    model = Packed()
    program = torch.export.export(model, EXAMPLE)
    assert {"aten.nonzero.default", "varlen_attn.cpu_forward.default"} <= names_of(program)
    same_for_every_mask("packed", program.module(), model)
    same_for_every_mask("packed", torch.jit.trace(model, EXAMPLE), model)


def test_an_exported_program_runs_without_this_package(tmp_path: Path) -> None:
    """R-56: in a process that cannot import it."""
    model = build("encoder")
    x, mask = poisoned(torch.randn(B, S, D), ALIKE[4]), ALIKE[4]
    with torch.no_grad():
        torch.save((x, mask, model(x, mask)), tmp_path / "case.pt")
    torch.export.save(torch.export.export(model, EXAMPLE), tmp_path / "model.pt2")
    torch.jit.save(torch.jit.trace(model, EXAMPLE), tmp_path / "model.pt")
    script = f"""
import sys, torch
sys.modules["varlen_attn"] = None
x, mask, want = torch.load({str(tmp_path / "case.pt")!r})
for load, name in ((lambda p: torch.export.load(p).module(), "model.pt2"), (torch.jit.load, "model.pt")):
    torch.testing.assert_close(load({str(tmp_path)!r} + "/" + name)(x, mask).detach(), want, atol=2e-5, rtol=1e-4)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


def test_without_a_mask_there_is_none_in_the_graph() -> None:
    model = OneCall().eval()
    program = torch.export.export(model, EXAMPLE[:1])
    (call,) = (n for n in program.graph.nodes if "scaled_dot_product" in str(n.target))
    assert len(call.args) == 3
    assert not any("masked_fill" in n for n in names_of(program))
    x = torch.randn(B, S, D)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_training_graph_has_dropout_and_gradients(dropout: float) -> None:
    model = Module(mha(dropout=dropout), lambda m, x, mask: m(x, key_padding_mask=mask)[0]).train()
    graph = torch.export.export(model, EXAMPLE).module()
    for mask in (HOLES, ALIKE[2], ALIKE[4]):
        x = torch.randn(B, S, D)
        outs = [graph(poisoned(x, mask), mask) for _ in range(2)]
        assert torch.equal(*outs) == (dropout == 0.0 or bool(mask.all()))
        (graph_grad,) = torch.autograd.grad(outs[0].sum(), graph.get_parameter("inner.in_proj_weight"))
        assert bool(graph_grad.isfinite().all())
        if not dropout:
            (want,) = torch.autograd.grad(model(poisoned(x, mask), mask).sum(), model.get_parameter("inner.in_proj_weight"))
            torch.testing.assert_close(graph_grad, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, dict(causal=True), dict(softcap=3.0, window=(2, 1)), dict(causal="top_left", window=(None, 0))], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_padded_rows_against_the_reference(options: dict[str, Any], dtype: torch.dtype) -> None:
    """R-07, R-12, R-27, R-44: in the rows as they stand, with holes too, self and cross, in an error budget."""
    masks = [HOLES, right([2, 4, 0]).flip(1)]
    for mask_q, mask_k in ((HOLES, HOLES), masks, masks[::-1]):
        shapes = ((B, S, N, 8), (B, S, 2, 8), (B, S, 2, 8))
        q, k, v = (torch.randn(s).to(dtype) for s in shapes)
        layouts = [SeqLayout.from_key_padding_mask(m, holes="packed", validate=False) for m in (mask_q, mask_k)]
        layouts = layouts if mask_q is not mask_k else layouts[:1] * 2
        rows = [a.pack(x) for a, x in zip((layouts[0], layouts[1], layouts[1]), (q, k, v), strict=True)]
        ref = reference_attention(*rows, *layouts, **options)
        naive = reference_attention(*rows, *layouts, dtype=dtype, **options)
        own, other = PaddedRows.of(q, mask_q), PaddedRows.of(k, mask_k)
        other = own if mask_q is mask_k else other

        class Call(nn.Module):
            def forward(self, q: Tensor, k: Tensor, v: Tensor, own: Any = own, other: Any = other) -> Tensor:
                return own.unpack(varlen_attention(own.pack(q), other.pack(k), other.pack(v), own, other, **options))

        out = Call()(*(x.masked_fill(m[..., None, None], torch.nan) for x, m in ((q, mask_q), (k, mask_k), (v, mask_k))))
        assert not out[mask_q].any()
        assert_within_budget(layouts[0].pack(out), ref, naive)


def test_a_row_that_sees_nothing_asks_no_kernel_for_mercy(monkeypatch: pytest.MonkeyPatch) -> None:
    """R-07: some kernels, and ONNX, return NaN where a mask hides every key: none of the masks handed over does."""
    seen: list[Tensor] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, attn_mask: Tensor, **kwargs: Any) -> Tensor:
        seen.append(attn_mask)
        return original(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    x = torch.randn(B, S, N, 8)
    rows = PaddedRows.of(x, right([0, 3, 6]))
    out = varlen_attention(rows.pack(x), rows.pack(x), rows.pack(x), rows)
    assert bool(seen[0].any(-1).all())
    assert not rows.unpack(out)[0].any()


def test_what_was_exported_is_recorded_with_its_reason() -> None:
    model = build("encoder")
    for run in (lambda: torch.export.export(model, EXAMPLE), lambda: torch.jit.trace(model, EXAMPLE, check_trace=False)):
        with record(model) as log:
            run()
        assert len(log) >= 2
        for call in log:
            assert (call.backend, call.rows, call.slots, call.traced) == ("dense", *[B * S if log.calls[0].rows else None] * 2, True)
            assert call.plan is not None
            assert (call.plan.route, call.plan.route_reason) == ("dense", "exported: static control flow")
        assert {c.module for c in log} == {"inner.layers.0.self_attn", "inner.layers.1.self_attn"}
        assert "exported: static control flow" in str(log)
    with record() as log:
        torch.export.export(model, EXAMPLE, strict=True)
    assert [c.backend for c in log] == ["dense"] * 2


def test_an_order_is_an_order() -> None:
    """R-11: no backend runs in the graph, so that one which was ordered is refused, with the way out."""
    model = build("encoder")
    for order in ("cpu", "reference"):
        with (
            use_backend(order),
            pytest.raises(BackendRefused, match=rf"backend '{order}' was requested .*: this call is exported.*Fix: export"),
        ):
            torch.export.export(model, EXAMPLE)
    with use_backend("sdpa_padded"):
        torch.export.export(model, EXAMPLE)


def test_checks_of_arguments_stay() -> None:
    def export(call: Callable[[Tensor, Tensor], Tensor], mask: Tensor) -> None:
        torch.export.export(Module(nn.Identity(), lambda m, x, mask: call(x, mask)), (EXAMPLE[0], mask))

    with pytest.raises(DtypeError, match=r"`mask` must be bool or float, but is torch\.int64"):
        export(lambda x, mask: varlen_mha(x, mask), ALIKE[0].long())
    with pytest.raises(LayoutError, match=r"`key_padding_mask` must have x's \(B, S\)"):
        export(lambda x, mask: varlen_mha(x, mask[:, 1:]), ALIKE[0])
    with pytest.raises(ArgumentError, match="pass `key_padding_mask` or `layout`, not both"):
        export(lambda x, mask: varlen_mha(x, mask, layout=SeqLayout.from_key_padding_mask(mask)), ALIKE[0])
    graph = torch.export.export(OneCall().eval(), (EXAMPLE[0], torch_masks(ALIKE[0]))).module()
    with pytest.raises(RuntimeError, match="must hold 0"):  # S3
        graph(EXAMPLE[0], torch.ones(B, S))


class Custom(nn.TransformerEncoderLayer):
    """A layer that takes packed rows and their layout."""

    def forward(self, src: Tensor, src_mask: Any = None, is_causal: bool = False, *, layout: SeqLayout) -> Tensor:  # type: ignore[override]
        rows = src + layout.positions[:, None] * 0.1
        heads = rows.unflatten(-1, (N, -1))
        return src + varlen_attention(heads, heads, heads, layout).flatten(1)


def test_layers_of_ones_own_see_padded_rows() -> None:
    model = Module(
        VarlenTransformerEncoder(Custom(D, N, 32, batch_first=True), 2), lambda m, x, mask: m(x, src_key_padding_mask=mask)
    ).eval()
    same_for_every_mask("custom", torch.export.export(model, EXAMPLE).module(), model)
    rows = PaddedRows.of(EXAMPLE[0], HOLES)
    for call in (lambda: rows.pool(rows.pack(EXAMPLE[0]), "mean"), rows.compact, lambda: rows.to_nested(rows.pack(EXAMPLE[0]))):
        with pytest.raises(LayoutError, match="while exporting, modules see padded rows"):
            call()
    assert torch.equal(rows.columns[rows.valid_rows()], SeqLayout.from_key_padding_mask(HOLES, validate=False).columns)


def test_nothing_is_static_elsewhere() -> None:
    """torch 2.11 takes `is_exporting` for True in compiled functions: what we ask does not."""
    assert not static_graph()
    seen: list[bool] = []
    torch.compile(lambda x: (seen.append(static_graph()), x + 1)[1], backend="eager", fullgraph=True)(torch.zeros(1))
    assert seen == [False]
    assert static_attention.__module__ == "varlen_attn.attention.export"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of packages that announce each other's changes
@pytest.mark.parametrize("name", ["padded_attention", "causal window", "module, weights", "encoder", "decoder"])
def test_onnx_serves_every_mask(name: str, tmp_path: Path) -> None:
    """R-56: by torch's exporter on `torch.export`, run by onnxruntime, with other sizes too."""
    runtime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    model = build(name)
    shapes = ({0: AUTO, 1: AUTO}, {0: AUTO, 1: AUTO})
    torch.onnx.export(model, EXAMPLE, tmp_path / "model.onnx", dynamo=True, verbose=False, dynamic_shapes=shapes)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    names = [i.name for i in session.get_inputs()]

    def graph(*inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0])

    same_for_every_mask(name, graph, model)
    x, mask = torch.randn(2, 4, D), right([3, 2], 4)
    with torch.no_grad():
        torch.testing.assert_close(graph(x, mask), model(x, mask), atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")  # torch about itself
def test_a_compiled_package_serves_every_mask(tmp_path: Path) -> None:
    """By AOTInductor, with other sizes too."""
    model = build("module")
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("columns", min=2, max=128)}
    with torch.no_grad():
        program = torch.export.export(model, EXAMPLE, dynamic_shapes=(sizes, sizes))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    graph = torch._inductor.aoti_load_package(path)
    same_for_every_mask("module", graph, model)
    x, mask = torch.randn(5, 7, D), right([4, 1, 3, 7, 2], 7)
    with torch.no_grad():
        torch.testing.assert_close(graph(x, mask), model(x, mask), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["module", "encoder"])
def test_a_graph_exported_inside_autocast_runs_outside_of_it(name: str) -> None:
    model = build(name)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        program = torch.export.export(model, EXAMPLE)
        expected = model(*EXAMPLE)
    with torch.no_grad():
        got = program.module()(*EXAMPLE)
    torch.testing.assert_close(got.to(expected.dtype), expected, atol=0.05, rtol=0.05)
