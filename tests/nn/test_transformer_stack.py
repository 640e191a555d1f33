"""Packed once for a whole stack: layouts, one read from a mask, modules that see packed rows, what stands in their places."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from varlen_attn import ArgumentError, BackendRefused, LayoutError, SeqLayout, VarlenMultiheadAttention, record, use_backend
from varlen_attn.nn.stream import Masks, pack_input
from varlen_attn.nn.transformer import VarlenTransformerDecoder, VarlenTransformerEncoder, VarlenTransformerEncoderLayer
from varlen_attn.testing.strategies import Batch, batches

from ..attention.test_functional import dynamo_warns
from ..nosync import count_reads
from .test_transformer import DECODERS, FF, E, N, added, assert_close, call, each_class, each_order, pair, rows_without_tokens

each_stack = pytest.mark.parametrize("host", [nn.TransformerEncoder, nn.TransformerDecoder], ids=lambda c: c.__name__)
LENGTHS = torch.tensor([5, 2, 3])
PADDING = torch.arange(5) >= LENGTHS[:, None]
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)


def batch_of_three(**options: Any) -> Tensor:
    return torch.randn(3, 5, E, dtype=torch.float64, **options)


# -------------------------------------------------------------------- layouts


@each_class
@pytest.mark.parametrize("form", ["packed", "padded", "capacity", "packed capacity"])
def test_layouts_in_place_of_masks(host: type[nn.Module], form: str) -> None:
    """R-05, R-10: packed in, packed out; slack rows hold whatever the caller left there, and the answer is 0."""
    decoder = host in DECODERS
    _, ours = pair(host)
    padding = torch.tensor([[False] * 4, [True, False, False, True], [True, True, False, False]])
    pads = (padding, padding[:, 1:]) if decoder else (padding,)
    names = ("tgt_key_padding_mask", "memory_key_padding_mask") if decoder else ("src_key_padding_mask",)
    tensors = [torch.randn(*p.shape, E, dtype=torch.float64) for p in pads]
    want = ours(*tensors, **dict(zip(names, pads, strict=True)))
    wanted = torch.autograd.grad(want.sum(), list(ours.parameters()))
    layouts = [SeqLayout.from_key_padding_mask(p, capacity=11 if "capacity" in form else None) for p in pads]
    given = dict(zip(("layout", "layout_kv"), layouts, strict=False))
    leaves = [(y.pack(x) if "packed" in form else x).detach() for x, y in zip(tensors, layouts, strict=True)]
    if form == "packed capacity":
        leaves = [x.where(y.valid_rows()[:, None], torch.nan) for x, y in zip(leaves, layouts, strict=True)]
    leaves = [x.requires_grad_() for x in leaves]
    got = ours(*leaves, **given)
    assert got.shape == leaves[0].shape
    grads = torch.autograd.grad(got.sum(), [*leaves, *ours.parameters()])
    assert all(bool(g.isfinite().all()) for g in grads)
    if "packed" in form:
        assert not got[~layouts[0].valid_rows()].any()
        for grad, layout in zip(grads, layouts, strict=False):
            assert not grad[~layout.valid_rows()].any()
        got = layouts[0].unpack(got)
    assert_close(got, want, form)
    for a, b in zip(grads[len(leaves) :], wanted, strict=True):
        assert_close(a, b, "gradient")


@each_class
def test_documents_of_one_row_stay_apart(host: type[nn.Module]) -> None:
    theirs, ours = pair(host)
    ids = torch.tensor([[1, 1, 1, 2, 2, 0], [3, 0, 4, 4, 4, 4]])
    layout = SeqLayout.from_document_ids(ids)
    x = torch.randn(2, 6, E, dtype=torch.float64)
    decoder = host in DECODERS
    options = {"layout": layout} | ({"layout_kv": layout} if decoder else {})
    for static in (False, True):
        if static:
            options = {k: SeqLayout.from_document_ids(ids, max_docs=6) for k in options}
        got = ours(*((x, x) if decoder else (x,)), **options)
        for row, columns in ((0, slice(0, 3)), (0, slice(3, 5)), (1, slice(0, 1)), (1, slice(2, 6))):
            alone = x[row : row + 1, columns]
            assert_close(got[row, columns], theirs(*((alone, alone) if decoder else (alone,)))[0], "a document")
        assert not got[ids == 0].any()
    name = "tgt_mask" if decoder else "mask" if host is nn.TransformerEncoder else "src_mask"
    with pytest.raises(LayoutError, match="several documents a row"):
        ours(*((x, x) if decoder else (x,)), **options, **{name: torch.zeros(6, 6, dtype=torch.float64)})


@each_class
def test_layouts_that_do_not_fit_are_refused(host: type[nn.Module]) -> None:  # nothing that is given is ignored
    decoder = host in DECODERS
    _, ours = pair(host)
    layout, x = SeqLayout.from_lengths([4, 2], 5), torch.randn(2, 5, E, dtype=torch.float64)
    rest = (x,) if decoder else ()
    prefix = "tgt" if decoder else "src"
    with pytest.raises(ArgumentError, match="not both"):
        ours(x, *rest, layout=layout, **{f"{prefix}_key_padding_mask": layout.padding_mask()})
    with pytest.raises(ArgumentError, match="`layout` must be a SeqLayout, but is Tensor"):
        ours(x, *rest, layout=layout.padding_mask())
    for wrong, text in ((SeqLayout.from_lengths([4, 2], 4), "2x4"), (SeqLayout.from_lengths([4], 5), "1x5")):
        with pytest.raises(LayoutError, match=f"`{prefix}` must begin with {text}"):
            ours(x, *rest, layout=wrong)
    with pytest.raises(LayoutError, match=f"`{prefix}` must begin with 6 "):
        ours(x[0], *rest, layout=layout)
    if decoder:
        with pytest.raises(ArgumentError, match="not both"):
            ours(x, x, layout_kv=layout, memory_key_padding_mask=layout.padding_mask())
        with pytest.raises(ArgumentError, match="`layout_kv` must be a SeqLayout, but is Tensor"):
            ours(x, x, layout_kv=layout.padding_mask())
        with pytest.raises(LayoutError, match="`memory` must begin with 2x4"):
            ours(x, x, layout_kv=SeqLayout.from_lengths([4, 2], 4))
        with pytest.raises(LayoutError, match="`memory` must be packed where the targets are"):
            ours(layout.pack(x), x, layout=layout)
        with pytest.raises(LayoutError, match="equally many sequences"):
            ours(layout.pack(x), x[0], layout=layout, layout_kv=SeqLayout.from_lengths([5]))


# -------------------------------------------------------------------- packed once


@rows_without_tokens
@given(batch=batches(), causal=st.booleans(), norm_first=st.booleans())
def test_packed_throughout_is_packed_for_each_layer(batch: Batch, causal: bool, norm_first: bool) -> None:
    _, ours = pair(nn.TransformerEncoder, layers=3, norm_first=norm_first)
    x = batch.tensor(E, dtype=torch.float64)
    want = x
    for layer in ours.layers:
        want = batch.layout.unpack(layer(batch.layout.pack(want), layout=batch.layout, is_causal=causal))
    want = batch.layout.unpack(ours.norm(batch.layout.pack(want)))
    assert_close(ours(x, layout=batch.layout, is_causal=causal), want, "pack, three layers, unpack")
    assert_close(ours(x, src_key_padding_mask=batch.mask, is_causal=causal), want, "the same from a mask")


READS: dict[str, tuple[dict[str, Any], int]] = {
    "layout": ({"layout": SeqLayout.from_lengths([5, 2, 3])}, 0),
    "layout and hint": ({"layout": SeqLayout.from_lengths([5, 2, 3]), "is_causal": True}, 0),
    "nothing": ({}, 0),
    "mask": ({"src_key_padding_mask": PADDING}, 1),
    "float mask": ({"src_key_padding_mask": added(PADDING)}, 1),
    "additive mask": ({"src_key_padding_mask": added(PADDING) - 0.5}, 1),
    "causal mask": ({"mask": CAUSAL}, 1),
    "mask, causal mask": ({"src_key_padding_mask": PADDING, "mask": CAUSAL}, 1),
    "float mask, causal mask and hint": ({"src_key_padding_mask": added(PADDING), "mask": added(CAUSAL), "is_causal": True}, 1),
    "mask, arbitrary mask": ({"src_key_padding_mask": PADDING, "mask": torch.rand(5, 5) < 0.3}, 1),
}


@pytest.mark.parametrize("case", READS)
@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("backward", [False, True])
def test_a_mask_is_read_once_for_all_layers(case: str, layers: int, backward: bool) -> None:
    """R-05: the layout is built once, the comparison with the causal mask rides along, and lengths of the host need no read."""
    options, allowed = READS[case]
    _, ours = pair(nn.TransformerEncoder, layers=layers)
    x = batch_of_three()
    with use_backend("sdpa_padded"):  # the CPU's kernel reads its offsets, which are on the host
        ours(x, **options)  # what is asked only once
        with count_reads() as reads:
            out = ours(x, **options)
            if backward:
                out.sum().backward()
    assert len(reads) == allowed


def test_a_layer_that_looks_for_itself_is_counted() -> None:
    """The control: a mask for every layer is a read for every layer."""

    class Looking(VarlenTransformerEncoderLayer):
        def forward(self, src: Tensor, **options: Any) -> Tensor:
            assert bool(src.isfinite().all())
            return super().forward(src, **options)

    ours = VarlenTransformerEncoder(Looking(E, N, FF, dtype=torch.float64), 4)
    with use_backend("sdpa_padded"), count_reads() as reads:
        ours(batch_of_three().transpose(0, 1), layout=SeqLayout.from_lengths([5, 2, 3]))
    assert len(reads) == 4


@pytest.mark.parametrize("layers", [1, 4])
def test_a_decoder_reads_each_of_its_masks_once(layers: int) -> None:
    _, ours = pair(nn.TransformerDecoder, layers=layers)
    x, memory = batch_of_three(), batch_of_three()
    layout = SeqLayout.from_lengths([5, 2, 3])
    masks = {"tgt_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING.flip(1)}
    for options, allowed in (
        (masks, 2),
        (masks | {"tgt_mask": CAUSAL, "memory_mask": torch.rand(5, 5) < 0.3}, 2),
        ({"layout": layout, "layout_kv": layout}, 0),
        ({"layout": layout, "layout_kv": layout, "tgt_is_causal": True}, 0),
    ):
        with use_backend("sdpa_padded"):
            ours(x, memory, **options)
            with count_reads() as reads:
                ours(x, memory, **options)
        assert len(reads) == allowed


def test_the_record_has_one_call_a_layer_and_says_why() -> None:
    """R-11, R-46: every layer is recorded, and a mask that only padded attention can serve is named."""
    _, ours = pair(nn.TransformerEncoder, layers=3)
    x = batch_of_three()
    for mask, hint in ((None, False), (None, True), (CAUSAL, None), (added(CAUSAL), True), (CAUSAL.expand(3 * N, 5, 5), None)):
        with record() as log:
            ours(x, mask, PADDING, is_causal=hint)
        assert [(c.backend, c.module) for c in log.calls] == [("cpu", "VarlenMultiheadAttention")] * 3
        assert all("flash" in c.kernel for c in log.calls)
        assert [c.rows for c in log.calls] == [10] * 3
    with record() as log:
        ours(x, torch.rand(5, 5) < 0.3, PADDING)
    assert [c.backend for c in log.calls] == ["dense"] * 3
    assert all("attn_mask is not causal" in c.reason for c in log.calls)


@each_class
def test_without_padding_nothing_is_copied(host: type[nn.Module]) -> None:
    """R-49: rows of a batch without padding are a view of it."""
    _, ours = pair(host)
    seen: list[Tensor] = []
    first = ours.layers[0] if hasattr(ours, "layers") else ours
    (first.norm1 if host in DECODERS else first.self_attn).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = batch_of_three()
    options = {f"{'tgt' if host in DECODERS else 'src'}_key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)}
    tensors = (x, x) if host in DECODERS else (x,)
    for more in (options, {}):
        with record() as log, torch.no_grad():  # with gradients, `h += encoder(h)` must not write to what was saved for them
            ours(*tensors, **more)
        assert all(c.plan.route == "dense" for c in log.calls)
    if host not in DECODERS:
        assert all(rows.data_ptr() == x.data_ptr() for rows in seen)


def test_pooling_by_the_layout_does_not_depend_on_who_computed() -> None:
    """R-14, peers 1c-10: a mean over columns reads padding, where torch has numbers in training and zeros in evaluation."""
    theirs, ours = pair(nn.TransformerEncoder)
    x, layout = batch_of_three(), SeqLayout.from_lengths([5, 2, 3])
    want, got = theirs(x, src_key_padding_mask=PADDING), ours(x, src_key_padding_mask=PADDING)
    assert (want.mean(1) - got.mean(1)).abs().max() > 1e-3
    for how in ("mean", "max", "first", "last"):
        assert_close(layout.pool(layout.pack(got), how), layout.pool(layout.pack(want), how), how)


def test_an_order_is_an_order_for_every_layer() -> None:
    _, ours = pair(nn.TransformerEncoder)
    x = batch_of_three()
    with use_backend("reference"), record() as log:
        ours(x, src_key_padding_mask=PADDING)
    assert [c.backend for c in log.calls] == ["reference"] * 2
    with use_backend("reference"), pytest.raises(BackendRefused, match="attn_mask is not causal"):
        ours(x, torch.rand(5, 5) < 0.3, PADDING)


# -------------------------------------------------------------------- what stands in a module's place


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)
        nn.init.constant_(self.up.weight, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Custom(nn.Module):
    """Remembers the shapes that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(x.shape)
        return x * 0.5


@each_class
def test_modules_in_the_place_of_others_are_called_on_packed_rows(host: type[nn.Module]) -> None:
    """Requests of peers: LoRA, another norm, another activation and another dropout run, in training and in evaluation."""
    theirs, ours = pair(host)
    tokens = int(LENGTHS.sum())
    for model in (theirs, ours):
        for layer in getattr(model, "layers", [model]):
            torch.manual_seed(1)
            layer.linear1, layer.norm1 = Lora(layer.linear1), nn.RMSNorm(E, dtype=torch.float64)
            layer.activation, layer.dropout, layer.dropout1 = Custom(), Custom(), Custom()
    x = batch_of_three()
    tensors = (x, x) if host in DECODERS else (x,)
    options = {f"{'tgt' if host in DECODERS else 'src'}_key_padding_mask": PADDING}
    want = theirs(*tensors, **options)
    for training in (True, False):
        ours.train(training)
        got = ours(*tensors, **options)
        assert_close(got[~PADDING], want[~PADDING], "custom parts")
        for layer in getattr(ours, "layers", [ours]):
            for part, width in ((layer.activation, FF), (layer.dropout, FF), (layer.dropout1, E)):
                assert part.shapes == [(tokens, width)]
                part.shapes.clear()


@each_class
def test_hooks_of_inner_modules_see_packed_rows_once(host: type[nn.Module]) -> None:
    _, ours = pair(host)
    seen: dict[str, list[Any]] = {}
    for name, module in ours.named_modules():
        if name and not isinstance(module, nn.ModuleList) and not name.endswith("out_proj"):

            def hook(module: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
                seen.setdefault(name, []).append((out[0] if isinstance(out, tuple) else out).shape)

            module.register_forward_hook(hook, with_kwargs=True)
    x = batch_of_three()
    options = {f"{'tgt' if host in DECODERS else 'src'}_key_padding_mask": PADDING}
    for training in (True, False):
        seen.clear()
        with torch.set_grad_enabled(training):
            ours.train(training)(*((x, x) if host in DECODERS else (x,)), **options)
        assert len(seen) == len([n for n, m in ours.named_modules() if n and n != "layers" and not n.endswith("out_proj")])
        for name, shapes in seen.items():
            assert shapes == [(10, FF if name.endswith(("linear1", "dropout")) else E)], name


@each_class
@each_order
def test_subclasses_that_override_blocks(host: type[nn.Module], batch_first: bool) -> None:
    """R-16: what a subclass of torch's layer may override is called here too: token-wise on rows, attention as torch calls it."""
    decoder = host in DECODERS
    theirs, ours = pair(host, batch_first=batch_first)
    calls: list[tuple[str, int]] = []

    def derive(parent: type[Any]) -> type[Any]:
        class Derived(parent):  # type: ignore[misc]
            def _ff_block(self, x: Tensor) -> Tensor:
                calls.append(("ff", x.dim()))
                return 2 * super()._ff_block(x)

            def _sa_block(self, x: Tensor, attn_mask: Any, key_padding_mask: Any, is_causal: bool = False) -> Tensor:
                calls.append(("sa", x.dim()))
                return 3 * super()._sa_block(x, attn_mask, key_padding_mask, is_causal)

            if issubclass(parent, nn.TransformerDecoderLayer):

                def _mha_block(self, x: Tensor, mem: Tensor, attn_mask: Any, key_padding_mask: Any, is_causal: bool = False) -> Tensor:
                    calls.append(("mha", x.dim()))
                    return 4 * super()._mha_block(x, mem, attn_mask, key_padding_mask, is_causal)

        return Derived

    for model in (theirs, ours):
        for layer in getattr(model, "layers", [model]):
            layer.__class__ = derive(type(layer))
    x, memory = batch_of_three(), batch_of_three()
    tensors, prefix = ((x, memory), "tgt") if decoder else ((x,), "src")
    paddings = {f"{prefix}_key_padding_mask": PADDING} | ({"memory_key_padding_mask": PADDING.flip(1)} if decoder else {})
    for mask in (None, CAUSAL, torch.rand(5, 5) < 0.3):
        masks = {f"{prefix}_mask": mask, **paddings}
        want = call(theirs, *tensors, **{k: added(v) for k, v in masks.items()})
        calls.clear()
        got = call(ours, *tensors, **masks)
        assert_close(got[~PADDING], want[~PADDING], "overridden blocks")
        each = [("sa", 3), ("mha", 3), ("ff", 2)] if decoder else [("sa", 3), ("ff", 2)]
        assert calls == each * len(getattr(ours, "layers", [ours]))


class Plain(nn.Module):
    """A layer that knows no layout."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(E, N, batch_first=batch_first, dtype=torch.float64)
        self.multihead_attn = nn.MultiheadAttention(E, N, batch_first=batch_first, dtype=torch.float64)
        self.shapes: list[torch.Size] = []

    def forward(self, x: Tensor, src_mask: Any = None, is_causal: bool = False, src_key_padding_mask: Any = None) -> Tensor:
        self.shapes.append(x.shape)
        assert src_mask is None or src_mask.shape == (5, 5)
        assert src_key_padding_mask.shape == (3, 5)
        out, _ = self.self_attn(x, x, x, src_key_padding_mask, False, src_mask)
        return x + out


class PlainDecoder(Plain):
    def forward(self, x: Tensor, memory: Tensor, **options: Any) -> Tensor:  # type: ignore[override]
        self.shapes.extend((x.shape, memory.shape))
        x = x + self.self_attn(x, x, x, options["tgt_key_padding_mask"], False, options["tgt_mask"])[0]
        return x + self.multihead_attn(x, memory, memory, options["memory_key_padding_mask"], False, options["memory_mask"])[0]


class Knowing(Plain):
    """One that does, with an attention that is none of torch's."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__(batch_first)
        self.self_attn = nn.Identity()
        self.self_attn.batch_first = batch_first

    def forward(self, x: Tensor, src_mask: Any, is_causal: bool, layout: SeqLayout) -> Tensor:  # type: ignore[override]
        self.shapes.append(x.shape)
        assert layout.lengths == (5, 2, 3)
        assert is_causal
        assert src_mask is None
        return x + 1


@each_order
def test_custom_layers_get_padded_tensors_or_rows_with_a_layout(batch_first: bool) -> None:
    """A layer says by its signature what it wants, and masks mean the same for both."""
    x, layout = batch_of_three(), SeqLayout.from_lengths([5, 2, 3])
    order = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    plain, knowing = VarlenTransformerEncoder(Plain(batch_first), 2), VarlenTransformerEncoder(Knowing(batch_first), 2)
    for mask in (None, CAUSAL, torch.rand(5, 5) < 0.3):
        want = order(x)
        for layer in plain.layers:
            want = layer(want, src_key_padding_mask=added(PADDING), src_mask=added(mask))
        got = order(plain(order(x), mask, PADDING))
        assert_close(got[~PADDING], order(want)[~PADDING], "plain layers")
        assert not got[PADDING].any()
    assert all(shape == order(x).shape for layer in plain.layers for shape in layer.shapes)
    for options in ({"mask": CAUSAL, "src_key_padding_mask": PADDING}, {"layout": layout, "is_causal": True}):
        assert_close(order(knowing(order(x), **options)), layout.unpack(layout.pack(x) + 2), "layers with layouts")
    assert all(shape == (10, E) for layer in knowing.layers for shape in layer.shapes)
    with pytest.raises(LayoutError, match="several documents a row, but Plain takes no layout"):
        plain(order(x), layout=SeqLayout.from_document_ids(torch.tensor([[1, 1, 2, 2, 0]] * 3)))


@each_stack
@pytest.mark.parametrize("kind", ["compiled", "checkpointed", "both"])
@dynamo_warns
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch about itself
def test_wrapped_layers_get_packed_rows(host: type[nn.Module], kind: str) -> None:
    """A wrapper's own signature says nothing: the layer inside is asked."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    _, ours = pair(host)
    x = batch_of_three()
    tensors, prefix = ((x, x), "tgt") if host in DECODERS else ((x,), "src")
    options = {f"{prefix}_key_padding_mask": PADDING, f"{prefix}_mask" if host in DECODERS else "mask": CAUSAL}
    want, shapes = ours(*tensors, **options), []
    for i, layer in enumerate(ours.layers):
        layer.linear1.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
        layer = layer if kind == "compiled" else checkpoint_wrapper(layer)
        ours.layers[i] = layer if kind == "checkpointed" else torch.compile(layer, backend="eager")
    assert_close(ours(*tensors, **options), want, kind)
    assert shapes == [(10, E)] * 2
    with use_backend("sdpa_padded"), count_reads() as reads:
        ours(*tensors, **options)
    assert len(reads) == 1


@each_order
def test_custom_decoder_layers(batch_first: bool) -> None:
    tgt, memory = batch_of_three(), torch.randn(3, 4, E, dtype=torch.float64)
    memory_padding = torch.arange(4) < torch.tensor([0, 2, 1])[:, None]
    order = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    decoder = VarlenTransformerDecoder(PlainDecoder(batch_first), 2)
    masks = {"tgt_mask": CAUSAL, "memory_mask": torch.rand(5, 4) < 0.3}
    paddings = {"tgt_key_padding_mask": PADDING, "memory_key_padding_mask": memory_padding}
    want = order(tgt)
    for layer in decoder.layers:
        want = layer(want, order(memory), **{k: added(v) for k, v in (masks | paddings).items()})
    got = order(decoder(order(tgt), order(memory), **masks, **paddings))
    assert_close(got[~PADDING], order(want)[~PADDING], "plain decoder layers")
    assert not got[PADDING].any()


@each_class
@each_order
def test_an_attention_module_that_knows_no_layout(host: type[nn.Module], batch_first: bool) -> None:
    """It is called padded, as torch calls it; the rest of the layer stays packed."""
    decoder = host in DECODERS
    theirs, ours = pair(host, batch_first=batch_first)
    for layer, origin in zip(getattr(ours, "layers", [ours]), getattr(theirs, "layers", [theirs]), strict=True):
        layer.self_attn = origin.self_attn
        if decoder:
            layer.multihead_attn = origin.multihead_attn
    x, memory = batch_of_three(), torch.randn(3, 4, E, dtype=torch.float64)
    memory_padding = torch.arange(4) < torch.tensor([0, 2, 1])[:, None]
    tensors, prefix = ((x, memory), "tgt") if decoder else ((x,), "src")
    paddings = {f"{prefix}_key_padding_mask": PADDING} | ({"memory_key_padding_mask": memory_padding} if decoder else {})
    for mask in (None, CAUSAL, torch.rand(5, 5) < 0.3):
        more = {"memory_mask": torch.rand(5, 4) < 0.3} if decoder else {}
        masks = {f"{prefix}_mask": mask, **more, **paddings}
        want = call(theirs, *tensors, **{k: added(v) for k, v in masks.items()})
        assert_close(call(ours, *tensors, **masks)[~PADDING], want[~PADDING], "torch's attention in our layers")


def test_window_and_backend_of_the_attention_modules() -> None:
    _, ours = pair(nn.TransformerEncoder)
    for layer in ours.layers:
        layer.self_attn.window, layer.self_attn.backend = (1, 0), "reference"
    x, i = batch_of_three(), torch.arange(5)
    band = ~((i[:, None] - i >= 0) & (i[:, None] - i <= 1))
    with record() as log:
        got = ours(x, src_key_padding_mask=PADDING)
    assert [c.backend for c in log.calls] == ["reference"] * 2
    plain = pair(nn.TransformerEncoder)[1]
    assert_close(got, plain(x, band, PADDING), "windowed layers")


def test_masks_that_want_a_gradient_get_it() -> None:
    theirs, ours = pair(nn.TransformerEncoder)
    x = batch_of_three()
    for name, start in (("src_key_padding_mask", added(PADDING)), ("mask", added(CAUSAL))):
        grads = []
        for model in (theirs, ours):
            bias = start.clone().requires_grad_()
            out = model(x, **{name: bias}, is_causal=False)  # torch drops a mask that it sees to be causal
            grads.append(torch.autograd.grad((out[~PADDING] ** 3).sum(), bias)[0])
        assert_close(grads[1], grads[0], name)
        assert grads[1].abs().sum() > 0


def test_a_layer_with_our_attention_is_packed_too() -> None:
    """In the class's own constructor, as by `enable`."""
    layer = nn.TransformerEncoderLayer(E, N, FF, dropout=0.0, batch_first=True, dtype=torch.float64)
    layer.self_attn = VarlenMultiheadAttention(E, N, batch_first=True, dtype=torch.float64)
    ours = VarlenTransformerEncoder(layer, 2)
    assert all(type(x) is VarlenTransformerEncoderLayer for x in ours.layers)
    rows: list[tuple[int, ...]] = []
    ours.layers[1].linear1.register_forward_pre_hook(lambda module, args: rows.append(tuple(args[0].shape)))
    ours(batch_of_three(), src_key_padding_mask=PADDING)
    assert rows == [(int((~PADDING).sum()), E)]


def test_a_decoder_layer_that_takes_one_layout_is_called_padded() -> None:
    """Memory has a layout of its own: who cannot take both gets padded tensors."""
    seen: list[tuple[int, ...]] = []

    class OneLayout(nn.TransformerDecoderLayer):
        def forward(self, tgt: Tensor, memory: Tensor, layout: Any = None, **masks: Any) -> Tensor:  # type: ignore[override]
            seen.append(tuple(tgt.shape))
            return super().forward(tgt, memory, **masks)

    options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    theirs = nn.TransformerDecoder(OneLayout(E, N, FF, **options), 1)
    ours = VarlenTransformerDecoder(OneLayout(E, N, FF, **options), 1)
    ours.load_state_dict(theirs.state_dict())
    x, memory = batch_of_three(), batch_of_three()
    masks = {"tgt_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING.flip(1)}
    assert_close(ours(x, memory, **masks)[~PADDING], theirs(x, memory, **masks)[~PADDING], "padded decoder layer")
    assert seen == [(3, 5, E)] * 2


# -------------------------------------------------------------------- what a stack hands to its layers


def two_layers(**options: Any) -> VarlenTransformerEncoder:
    torch.manual_seed(0)
    layer = VarlenTransformerEncoderLayer(E, N, FF, dropout=0.0, batch_first=True, dtype=torch.float64, **options)
    return VarlenTransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize("where", ["self_attn", "layer"])
def test_a_hook_sees_and_changes_the_arguments_of_packed_modules(where: str) -> None:
    """A module with hooks is called with layouts and masks, and not with what the stack has settled for the others."""
    model, seen = two_layers(), []

    def hook(module: nn.Module, arguments: Any, options: dict[str, Any]) -> Any:
        seen.append(options["layout"].num_rows)
        return arguments, {**options, "is_causal": True}

    for layer in model.layers:
        (layer.self_attn if where == "self_attn" else layer).register_forward_pre_hook(hook, with_kwargs=True)
    x = batch_of_three()
    changed = model(x, src_key_padding_mask=PADDING)
    assert seen == [10, 10]
    assert_close(changed, two_layers()(x, src_key_padding_mask=PADDING, is_causal=True), "output")


def test_a_hook_that_asks_for_weights_gets_them() -> None:
    model, weights = two_layers(), []
    attn = model.layers[0].self_attn
    attn.register_forward_pre_hook(lambda module, args, options: (args, {**options, "need_weights": True}), with_kwargs=True)
    attn.register_forward_hook(lambda module, args, out: weights.append(out[1]))
    model(batch_of_three(), src_key_padding_mask=PADDING)
    assert weights[0].shape == (3, 5, 5)


def test_another_forward_of_the_same_name_is_not_taken_for_ours() -> None:
    """`functools.wraps` copies attributes of functions too."""
    seen: list[int] = []

    class Layer(VarlenTransformerEncoderLayer):
        @functools.wraps(VarlenTransformerEncoderLayer.forward)
        def forward(self, *args: Any, layout: Any, **options: Any) -> Tensor:
            seen.append(layout.num_rows)
            return super().forward(*args, layout=layout, **options)

    model, x = two_layers(), batch_of_three()
    want = model(x, src_key_padding_mask=PADDING)
    model.layers[1].__class__ = Layer
    assert torch.equal(model(x, src_key_padding_mask=PADDING), want)
    assert seen == [10]


def test_what_a_stack_has_settled_is_one_value_to_wrappers() -> None:
    """One that rebuilds all tuples among the arguments would make two layouts of one."""
    prepared = pack_input(two_layers().layers[0].self_attn, "src", batch_of_three(), Masks(PADDING, None, False, None, True)).prepared([])
    assert torch.utils._pytree.tree_map(lambda x: x, {"layout": prepared})["layout"] is prepared
    assert prepared.layout is prepared.layout_kv


@pytest.mark.parametrize("norm_first", [True, False])
def test_slack_rows_that_a_part_of_a_layer_leaves_unwritten_reach_no_gradient(norm_first: bool) -> None:
    """R-40: as a product of groups does, which writes the rows of its groups only."""

    class Grouped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return torch.cat([out[:10], torch.full_like(out[10:], float("nan"))])

    model = two_layers(norm_first=norm_first)
    rows = SeqLayout.from_key_padding_mask(PADDING, capacity=14)
    if norm_first:
        for layer in model.layers:
            layer.linear2.__class__ = Grouped
    else:
        model.layers[0].self_attn.register_forward_hook(lambda module, args, out: (torch.cat([out[0][:10], out[0][10:] * 0 + 1]), None))
    out = model(torch.randn(14, E, dtype=torch.float64), layout=rows)
    out.square().sum().backward()
    assert not out[10:].any()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
