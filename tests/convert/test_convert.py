"""`enable`, `disable`, `enabled`: the model computes the same at real tokens, becomes what it was, and the report is true."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
import random
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from varlen_attn import ArgumentError, VarlenMultiheadAttention, VarlenWarning, record, use_backend
from varlen_attn.convert import classes
from varlen_attn.convert.enabling import disable, enable, enabled
from varlen_attn.convert.report import Report
from varlen_attn.nn.transformer import (
    VarlenTransformerDecoder,
    VarlenTransformerDecoderLayer,
    VarlenTransformerEncoder,
    VarlenTransformerEncoderLayer,
)

D, N, FF = 8, 2, 12
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] + [True] * 4])
TARGETS = torch.tensor([[False] * 4, [False] * 2 + [True] * 2, [False] * 3 + [True]])

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors",  # torch's encoder makes them in evaluation
    "ignore:enable_nested_tensor is True",  # and says where it cannot
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def slow_path() -> Iterator[None]:
    """torch's fast path does not call what stands in a layer, and fails where this has no weight."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


# -------------------------------------------------------------------- models


def shake(module: nn.Module) -> nn.Module:
    """Weights of which no two are equal, and no bias is 0: the same ones in every call."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3, generator=generator)
    return module


def layer(kind: type[nn.Module] = nn.TransformerEncoderLayer, **options: Any) -> Any:
    return shake(kind(D, N, FF, **{"dropout": 0.0, "batch_first": True, "dtype": torch.float64, **options}))


def stack(layers: int = 2, norm: bool = True, **options: Any) -> Any:
    final = nn.LayerNorm(D, dtype=torch.float64) if norm else None
    return shake(nn.TransformerEncoder(layer(**options), layers, final))


def decoder(layers: int = 2, **options: Any) -> Any:
    return shake(nn.TransformerDecoder(layer(nn.TransformerDecoderLayer, **options), layers, nn.LayerNorm(D, dtype=torch.float64)))


def attention(kind: type[nn.Module] = nn.MultiheadAttention, **options: Any) -> Any:
    return shake(kind(D, N, **{"batch_first": True, "dtype": torch.float64, **options}))


class Everything(nn.Module):
    """Every host once: stacks, layers that are used alone, either way round, and attention that gives its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, D, dtype=torch.float64)
        self.encoder = stack()
        self.lone = nn.ModuleDict(
            {
                "pre": layer(norm_first=True),
                "post_sequence_first": layer(batch_first=False),
                "pre_sequence_first": layer(batch_first=False, norm_first=True, activation="gelu"),
            }
        )
        self.decoder = decoder(norm_first=True)
        self.transformer = nn.Transformer(D, N, 1, 1, FF, 0.0, batch_first=True, dtype=torch.float64)
        self.attention = attention()
        shake(self)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor, target_padding: Tensor) -> Tensor:
        """All real rows, and the attention weights of these."""
        x = self.encoder(self.embedding(source), src_key_padding_mask=padding)
        x = self.lone["pre"](x, src_key_padding_mask=padding)
        for name in ("post_sequence_first", "pre_sequence_first"):
            x = self.lone[name](x.transpose(0, 1), src_key_padding_mask=padding).transpose(0, 1)
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=torch.float64)
        # torch takes a float mask beside a bool one, and warns.
        masks = {"memory_key_padding_mask": padding, "tgt_key_padding_mask": added(target_padding)}
        y = self.decoder(self.embedding(target), x, tgt_mask=causal, **masks)
        both = self.transformer(x, y, tgt_mask=causal, src_key_padding_mask=padding, **masks)
        out, weights = self.attention(x, x, x, key_padding_mask=padding)
        parts = [x[~padding], y[~target_padding], both[~target_padding], out[~padding]]
        return torch.cat([*(p.flatten() for p in parts), *([] if weights is None else [weights[~padding].flatten()])])


def added(padding: Tensor) -> Tensor:
    return torch.zeros(padding.shape, dtype=torch.float64).masked_fill(padding, -torch.inf)


def tokens() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    source, target = (torch.randint(0, 11, p.shape, generator=generator) for p in (PADDING, TARGETS))
    return {"source": source, "target": target, "padding": PADDING, "target_padding": TARGETS}


def everything(model: nn.Module) -> Tensor:
    out: Tensor = model(**tokens())
    return out


def rows() -> Tensor:
    return torch.randn(*PADDING.shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def encode(model: nn.Module) -> Tensor:
    """The real rows of an encoder."""
    x = rows().requires_grad_()
    out = model(x, src_key_padding_mask=PADDING)
    assert out.shape == x.shape
    real: Tensor = out[~PADDING]
    return real


def attend(model: nn.Module, **options: Any) -> Tensor:
    x = rows()
    out: Tensor = model(x, x, x, key_padding_mask=PADDING, **options)[0][~PADDING]
    return out


def results(model: nn.Module, call: Callable[[nn.Module], Tensor] = encode) -> list[Tensor]:
    """In training and in evaluation, without and with gradients, and those of every parameter."""
    found = []
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            found.append(call(model))
        out = call(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True) if out.requires_grad else []
        found += [out.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=False))]
    return found


def assert_same(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-9) -> None:
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        error = (a - b).abs().max().item() if a.numel() else 0.0
        assert error < tolerance, f"{i}: {error}"


def anatomy(model: nn.Module) -> list[Any]:
    """All classes, all keys of every ``__dict__`` and of the dicts in it, and the objects themselves."""
    found: list[Any] = []
    for name, module in model.named_modules():
        found.append((name, id(module), type(module)))
        for key, value in module.__dict__.items():
            found.append((name, key, id(value)))
            if isinstance(value, dict):
                found += [(name, key, k, id(v)) for k, v in value.items()]
    return found


def without_classes(facts: list[Any]) -> list[Any]:
    """Nor what an object says that its class is from, by which `torch.fx` tells a leaf."""
    return [x for x in facts if not isinstance(x[-1], type) and x[1] != "__module__"]


def reasons(report: Report) -> dict[str, str]:
    return {m.module: m.reason for m in report.modules if m.action in ("left alone", "restored")}


def quietly(model: nn.Module, **options: Any) -> Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VarlenWarning)
        return enable(model, **options)


# -------------------------------------------------------------------- the same results, the same weights


@pytest.mark.parametrize("level", ["auto", "attention", "model"])
def test_a_model_computes_the_same(level: Any) -> None:
    """R-15, R-16, R-46: every host, in training and evaluation, with and without gradients; attention weights too."""
    model = Everything()
    want = results(copy.deepcopy(model), everything)
    report = enable(model, level)
    assert_same(results(model, everything), want)
    hosts = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.TransformerDecoderLayer, nn.TransformerDecoder)
    expected = [name for name, m in model.named_modules() if isinstance(m, hosts)]
    assert [m.module for m in report.modules] == expected, "the order of named_modules"
    if level != "attention":
        assert len(report.converted) == len(report.modules) == 26
        assert not report.left_alone


@pytest.mark.parametrize("level", ["attention", "model"])
def test_weights_and_training_mode_stay(level: Any) -> None:
    """R-16: an optimizer goes on as if nothing had happened."""
    model = Everything().train()
    model.encoder.layers[1].eval()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, twin)]
    before = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict(keep_vars=True).items()}
    modes = [m.training for m in model.modules()]

    def steps() -> None:
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            everything(m).square().mean().backward()
            optimizer.step()

    enable(model, level)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for key, value in after.items():
        assert value.data_ptr() == before[key][0]
        assert torch.equal(value, before[key][1])
    assert [m.training for m in model.modules()] == modes
    steps()
    disable(model)
    steps()
    enable(model, level)
    steps()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-6
    twin.load_state_dict(model.state_dict())
    model.load_state_dict(twin.state_dict())


@pytest.mark.parametrize("side", ["left", "right", "holes", "last columns", "nothing"])
def test_any_padding(side: str) -> None:
    """R-15, R-28: the shape of the input and zeros at padding, whatever the mask."""
    model = stack()
    padding = torch.zeros(3, 5, dtype=torch.bool)
    where: dict[str, Any] = {"left": (0, slice(0, 3)), "right": (1, slice(2, 5)), "holes": (2, [1, 3]), "last columns": (slice(None), 4)}
    if side in where:
        padding[where[side]] = True
    twin = copy.deepcopy(model)
    enable(model)
    for training in (True, False):
        with torch.no_grad():
            got = model.train(training)(rows(), src_key_padding_mask=padding)
            want = twin.train(training)(rows(), src_key_padding_mask=padding)
        assert got.shape == want.shape == rows().shape
        assert not got[padding].any()
        assert_same([got[~padding]], [want[~padding]])


# -------------------------------------------------------------------- the exact inverse


@pytest.mark.parametrize("level", ["attention", "model"])
def test_disable_is_the_exact_inverse(level: Any) -> None:
    model = Everything()
    before = anatomy(model)
    report = enable(model, level)
    assert without_classes(anatomy(model)) == without_classes(before), "nothing is added to a module"
    results(model, everything)
    model.train()
    restored = disable(model)
    assert anatomy(model) == before
    assert [(m.module, m.kind) for m in restored.modules] == [(m.module, m.kind) for m in report.converted]
    assert all(m.action == "restored" for m in restored.modules)
    assert f"{len(report.converted)} restored" in str(restored)
    assert disable(model).modules == ()
    assert anatomy(model) == before


def test_enabling_twice_is_enabling_once() -> None:
    model = Everything()
    first = enable(model)
    facts = anatomy(model)
    assert enable(model) == first
    assert anatomy(model) == facts


def test_levels_and_options_replace_each_other() -> None:
    """The state depends on the model and the arguments only, not on what it was before."""
    options: list[dict[str, Any]] = [{"level": "attention"}, {"level": "model"}, {"need_weights": False}, {"level": "attention"}, {}]
    model = Everything()
    for arguments in options:
        fresh = Everything()
        again, first = enable(model, **arguments), enable(fresh, **arguments)
        alone = [(m.module, m.kind, "left alone" if m.action == "restored" else m.action, m.reason) for m in again.modules]
        assert alone == [(m.module, m.kind, m.action, m.reason) for m in first.modules]
        assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
    disable(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in Everything().modules()]


def test_what_gained_hooks_is_converted_no_longer() -> None:
    model = stack()
    before = [type(m) for m in model.layers[0].modules()]
    enable(model)
    model.layers[0].linear1.register_forward_hook(lambda *args: None)
    report = enable(model)
    assert "linear1: has hooks" in reasons(report)["layers.0"]
    assert [m.module for m in report.modules if m.action == "restored"] == ["layers.0", "layers.0.self_attn"]
    assert [type(m) for m in model.layers[0].modules()] == before


def test_enabled_restores_what_was_there() -> None:
    model = Everything()
    plain = anatomy(model)
    with enabled(model) as report:
        assert report.converted
        inside = anatomy(model)
        with enabled(model, "attention") as inner:
            assert inner != report
            with enabled(model, need_weights=False):
                pass
        assert anatomy(model) == inside
    assert anatomy(model) == plain
    with pytest.raises(RuntimeError, match="of the block"), enabled(model):  # noqa: PT012
        assert anatomy(model) != plain
        raise RuntimeError("of the block")
    assert anatomy(model) == plain
    with enabled(model):
        disable(model)
    assert anatomy(model) == plain
    enable(model.encoder, "attention")
    partly = anatomy(model)
    for inner_action in (disable, lambda m: enable(m, "attention")):
        with enabled(model):
            inner_action(model)
        assert anatomy(model) == partly, "what was enabled before stays so"


@pytest.mark.parametrize("level", ["attention", "model"])
def test_copies_and_pickles_know_what_they_are(level: Any) -> None:
    model = Everything()
    want = results(copy.deepcopy(model), everything)
    classes = [type(m) for m in model.modules()]
    enable(model, level)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for other in copies:
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        disable(other)
        assert [type(m) for m in other.modules()] == classes
    assert [type(m) for m in model.modules()] != classes
    other = copies[-1]
    assert_same(results(other, everything), want)
    enable(other, level)
    assert_same(results(other, everything), want)


def test_what_was_built_as_ours_stays_ours() -> None:
    model = nn.ModuleDict(
        {
            "attention": attention(VarlenMultiheadAttention),
            "layer": layer(VarlenTransformerEncoderLayer),
            "decoder_layer": layer(VarlenTransformerDecoderLayer),
            "stack": shake(VarlenTransformerEncoder(layer(), 2)),
            "decoder": shake(VarlenTransformerDecoder(layer(nn.TransformerDecoderLayer), 1)),
        }
    )
    before = anatomy(model)
    for level in ("attention", "model"):
        report = enable(model, level)  # and does not warn
        assert {m.action for m in report.modules} == {"built so"}
        assert report.modules[0].kind in report.modules[0].reason
        assert anatomy(model) == before
    assert disable(model).modules == ()
    assert anatomy(model) == before


def test_a_layer_with_our_attention_is_converted_around_it() -> None:
    """Its hook, which keeps torch's fast path away, is none of the user's."""
    model = stack()
    for x in model.layers:
        x.self_attn = shake(attention(VarlenMultiheadAttention))
    want = results(copy.deepcopy(model))
    before = anatomy(model.train())
    report = enable(model)
    assert [m.action for m in report.modules] == ["converted", "converted", "built so", "converted", "built so"]
    assert_same(results(model), want)
    disable(model.train())
    assert anatomy(model) == before


def test_parametrised_after_enabling() -> None:
    """The class that torch made then is not taken away: the weights would be lost."""
    model = stack()
    enable(model)
    want = results(model)
    parametrizations.weight_norm(model.layers[0].self_attn, "in_proj_weight")
    assert len(quietly(model).converted) == 4
    report = disable(model.train())
    assert [m.module for m in report.modules if m.action == "restored"] == ["", "layers.0", "layers.1", "layers.1.self_attn"]
    assert "remove them first" in reasons(report)["layers.0.self_attn"]
    assert_same(results(model)[:2], want[:2])
    parametrize.remove_parametrizations(model.layers[0].self_attn, "in_proj_weight")
    assert [m.module for m in disable(model).modules] == ["layers.0.self_attn"]
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


def test_parametrised_inside_the_block() -> None:
    model = attention()
    with enabled(model):
        parametrizations.weight_norm(model, "in_proj_weight")
    attend(model)
    parametrize.remove_parametrizations(model, "in_proj_weight")
    disable(model)
    assert type(model) is nn.MultiheadAttention


def test_two_models_and_torchs_switches_do_not_notice() -> None:
    one, two, three = Everything(), Everything(), Everything()
    plain = anatomy(two)

    def switches() -> tuple[Any, ...]:
        cuda = torch.backends.cuda
        sdp = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled())
        return torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(), *sdp

    before = switches(), torch.get_rng_state()
    enable(one)
    assert anatomy(two) == plain
    enable(three, "attention")
    classes = [type(m) for m in three.modules()]
    disable(one)
    assert [type(m) for m in three.modules()] == classes
    assert anatomy(two) == plain
    assert switches() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


# -------------------------------------------------------------------- levels and arguments


def test_attention_level_packs_attention_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stack everything else stays padded; the fast path, which would not call attention, is not taken."""
    monkeypatch.setattr(classes, "_PAYS", 0)
    widths: list[int] = []
    for level, dims in (("attention", 3), ("auto", 2), ("model", 2)):
        model = stack(norm_first=True).eval()
        report = enable(model, level, hooks="packed")
        for x in model.layers:
            x.linear1.register_forward_hook(lambda module, args, out: widths.append(args[0].dim()))
        with torch.no_grad(), record() as log:
            encode(model)
        assert widths == [dims, dims]
        widths.clear()
        assert [call.rows for call in log.calls] == [int((~PADDING).sum())] * 2
        assert all("MultiheadAttention" in call.module for call in log.calls)
        alone = reasons(report)
        assert not alone
        reason = 'level="attention" changes calls of attention only' if level == "attention" else ""
        assert {m.reason for m in report.modules[:2]} == {reason}
    model = decoder()
    report = enable(model, "attention")
    assert [m.module for m in report.left_alone] == ["", "layers.0", "layers.1"]
    assert len(report.converted) == 4


def test_attention_level_makes_no_nested_tensors() -> None:
    """Compiled code that was made for padded ones is asked whether it fits, and torch ends the process."""
    model = stack().eval()
    shapes: list[Any] = []
    model.layers[0].register_forward_pre_hook(lambda module, args: shapes.append(None if args[0].is_nested else args[0].shape))
    with torch.no_grad():
        encode(model)
        enable(model, "attention", hooks="packed")
        encode(model)
        assert shapes == [None, rows().shape]
        model.use_nested_tensor = False
        assert vars(model)["use_nested_tensor"] is False
        disable(model)
        encode(model)
    assert shapes[2] == rows().shape, "what was set in between is kept"


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("level", ["attention", "model"])
@pytest.mark.usefixtures("slow_path")  # the other takes a float mask for a bool one
def test_layers_that_are_used_alone(level: Any, batch_first: bool, norm_first: bool) -> None:
    """All masks of a layer, either way round, in the dtypes that torch takes."""
    model = layer(batch_first=batch_first, norm_first=norm_first)
    twin = copy.deepcopy(model)
    enable(model, level)
    x = rows()
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    masks: list[dict[str, Any]] = [
        {},
        {"src_key_padding_mask": PADDING},
        {"src_key_padding_mask": added(PADDING)},
        {"src_key_padding_mask": PADDING, "src_mask": causal},
        {"src_key_padding_mask": PADDING, "src_mask": causal, "is_causal": True},
        {"src_mask": torch.randn(5, 5, dtype=torch.float64)},
    ]
    for options in masks:

        def call(m: nn.Module, options: dict[str, Any] = options) -> Tensor:
            out = m(x if batch_first else x.transpose(0, 1), **options)
            return (out if batch_first else out.transpose(0, 1))[~PADDING]

        assert_same(results(model, call), results(twin, call))


def test_attention_alone_goes_on_giving_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """R-46: and the report names what that costs."""
    monkeypatch.setattr(classes, "_PAYS", 0)
    model = attention()
    x = rows()
    want, want_weights = model(x, x, x, PADDING)
    report = enable(model)
    assert "pays for attention weights" in report.modules[0].reason
    assert "need_weights=False" in report.modules[0].reason
    for options in ({}, {"average_attn_weights": False}):
        out, weights = model(x, x, x, PADDING, **options)
        assert weights is not None
        assert_same([out[~PADDING]], [want[~PADDING]])
        assert weights.dim() == (4 if options else 3)
    assert_same([model(x, x, x, PADDING)[1][~PADDING]], [want_weights[~PADDING]])
    with record() as log:
        assert model(x, x, x, PADDING, need_weights=False)[1] is None
    assert log.calls[0].backend != "dense"
    report = enable(model, need_weights=False)
    assert report.modules[0].reason == "returns no attention weights unless asked"
    out, weights = model(x, x, x, PADDING)
    assert weights is None
    assert_same([out[~PADDING]], [want[~PADDING]])
    assert model(x, x, x, PADDING, need_weights=True)[1] is not None
    assert not enable(layer()).modules[1].reason, "a layer asks for no weights, so nothing pays"


BAD: list[tuple[Callable[[Any], Any], str]] = [
    (lambda m: enable(3), r"`model` must be a torch.nn.Module, but is int: pass"),
    (lambda m: enable(nn.Transformer), r"`model` must be a torch.nn.Module, but is the class Transformer: pass an instance"),
    (lambda m: disable(None), r"`model` must be a torch.nn.Module, but is NoneType: pass"),
    (lambda m: enabled({}).__enter__(), r"`model` must be a torch.nn.Module, but is dict: pass"),
    (lambda m: enable(m, "layers"), r"`level` must be 'auto', 'attention' or 'model', but is 'layers': "),
    (lambda m: enable(m, None), r"`level` must be .*, but is None"),
    (lambda m: enable(m, hooks=True), r"`hooks` must be 'leave' or 'packed', but is True: "),
    (lambda m: enable(m, need_weights=None), r"`need_weights` must be True, False or 'never', but is None: "),
    (lambda m: enable(m, need_weights="no"), r"`need_weights` must be True, False or 'never', but is 'no'"),
    (lambda m: enabled(m, "all").__enter__(), r"`level` must be"),
    (lambda m: enabled(m, need_weights=2).__enter__(), r"`need_weights` must be"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_wrong_arguments(call: Callable[[Any], Any], message: str) -> None:
    model = stack()
    before = anatomy(model)
    with pytest.raises(ArgumentError, match=message):
        call(model)
    assert anatomy(model) == before


# -------------------------------------------------------------------- the report


def test_the_report() -> None:
    model = Everything()
    model.encoder.layers[1].linear1.register_forward_hook(lambda *args: None)
    report = enable(model)
    text = str(report).splitlines()
    assert len(text) == len(report.modules) + 1
    for line, m in zip(text, report.modules, strict=False):
        assert line.split()[:2] == [m.module, m.kind]
        assert m.action in line
        assert line.endswith(m.reason)
    assert len({m.module for m in report.modules}) == len(report.modules)
    assert text[-1] == "24 converted, 2 left alone"
    assert (len(report.converted), len(report.left_alone)) == (24, 2)
    loaded = json.loads(json.dumps(report.as_dict()))
    assert loaded["modules"][0] == {"module": "encoder", "kind": "TransformerEncoder", "action": "converted", "reason": ""}
    assert len(loaded["modules"]) == 26
    assert str(enable(stack())).startswith("(the model)  ")


def test_converting_nothing_warns_once_and_says_why() -> None:
    model = stack(1)
    model.layers[0].norm1.register_forward_hook(lambda *args: None)
    with pytest.warns(VarlenWarning, match=r"nothing was converted(.|\n)*norm1: has hooks(.|\n)*3 left alone") as caught:
        report = enable(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert len(report.left_alone) == 3
    with pytest.warns(VarlenWarning, match="no attention of torch's classes and is no model .*: see docs/how-to/own-attention.md"):
        assert enable(nn.Linear(2, 2)).modules == ()
    with pytest.warns(VarlenWarning, match="nothing was converted"), enabled(nn.Linear(2, 2)):
        pass


# -------------------------------------------------------------------- what is left alone


class SubclassedLayer(nn.TransformerEncoderLayer):
    pass


class DoublingLayer(nn.TransformerEncoderLayer):
    def forward(self, src: Tensor, *args: Any, **options: Any) -> Tensor:
        return 2 * super().forward(src, *args, **options)


class SubclassedAttention(nn.MultiheadAttention):
    pass


class DoublingAttention(nn.MultiheadAttention):
    def forward(self, query: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        out, weights = super().forward(query, *args, **options)
        return 2 * out, weights


class OtherAttention(nn.Module):
    """Has what torch's layers read of `nn.MultiheadAttention`, and is none."""

    batch_first = True
    _qkv_same_embed_dim = False
    in_proj_bias = None
    num_heads = N

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D, dtype=torch.float64)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor, **options: Any) -> tuple[Tensor, None]:
        seen = (key_padding_mask == 0).to(query.dtype)[..., None]
        return self.linear(query) + (self.linear(value) * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True), None


class SequenceNorm(nn.Module):
    """Over real and padded tokens of a row."""

    eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean((-1, -2), keepdim=True) + self.eps).sqrt()


class TransposedBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(-1, -2)).transpose(-1, -2) if x.dim() == 3 else self.norm(x)


class LookAhead(nn.Module):
    """Reads the next token, and nothing before its own."""

    def forward(self, x: Tensor) -> Tensor:
        following = x[..., 1:, :]
        return x + 0.5 * F.pad(following, (0, 0, 0, 1))


def replaced_batch_norm(x: Any) -> Any:
    x.norm1 = TransposedBatchNorm()
    x.norm1.forward = x.norm1.forward
    return x


class Conv(nn.Module):
    """Mixes neighbours, and not even that before it has been trained, if ``zero``."""

    def __init__(self, zero: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(D, FF, dtype=torch.float64)
        self.conv = nn.Conv1d(FF, FF, 3, padding=1, dtype=torch.float64)
        if zero:
            nn.init.zeros_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x + self.conv(x.transpose(-1, -2)).transpose(-1, -2)


def put(path: str, make: Callable[[], Any]) -> Callable[[Any], Any]:
    """Replace a part of a layer."""

    def spoil(x: Any) -> Any:
        torch.manual_seed(4)
        owner, _, name = path.rpartition(".")
        setattr(x.get_submodule(owner), name, make())
        return x

    return spoil


def become(new_class: type[nn.Module], part: str = "") -> Callable[[Any], Any]:
    def spoil(x: Any) -> Any:
        x.get_submodule(part).__class__ = new_class
        return x

    return spoil


def parametrised(function: Callable[..., Any], part: str, name: str) -> Callable[[Any], Any]:
    def spoil(x: Any) -> Any:
        torch.manual_seed(5)
        function(x.get_submodule(part), name)
        return x

    return spoil


def hooked(kind: str, part: str) -> Callable[[Any], Any]:
    def spoil(x: Any) -> Any:
        getattr(x.get_submodule(part), kind)(lambda *args: None)
        return x

    return spoil


def replaced_forward(part: str) -> Callable[[Any], Any]:
    """As tools do that move weights between devices."""

    def spoil(x: Any) -> Any:
        module = x.get_submodule(part)
        old = module.forward

        def forward(*args: Any, **options: Any) -> Any:
            out = old(*args, **options)
            return (2 * out[0], out[1]) if isinstance(out, tuple) else 2 * out

        module.forward = forward
        return x

    return spoil


def compiled(x: Any) -> Any:
    x.compile(backend="eager")
    return x


def mixing_activation(x: Any) -> Any:
    x.activation = functools.partial(F.softmax, dim=1)
    return x


HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook")
# How a layer becomes one that is left alone, where the reason stands in the report, and words of it.
PECULIAR: dict[str, tuple[Callable[[Any], Any], str]] = {
    "subclass": (become(SubclassedLayer), "a subclass of nn.TransformerEncoderLayer, .*VarlenTransformerEncoderLayer"),
    "subclass with its own forward": (become(DoublingLayer), "derive DoublingLayer from VarlenTransformerEncoderLayer"),
    "attention subclass": (become(SubclassedAttention, "self_attn"), "its self_attn is a SubclassedAttention"),
    "attention subclass with its own forward": (become(DoublingAttention, "self_attn"), "its self_attn is a DoublingAttention"),
    "other attention": (put("self_attn", OtherAttention), "its self_attn is a OtherAttention, not nn.MultiheadAttention"),
    "weight_norm": (parametrised(parametrizations.weight_norm, "self_attn", "in_proj_weight"), "its self_attn is a Parametrized"),
    "spectral_norm": (parametrised(parametrizations.spectral_norm, "self_attn", "in_proj_weight"), "its self_attn is a Parametrized"),
    "old weight_norm": (parametrised(torch.nn.utils.weight_norm, "linear1", "weight"), "linear1: has hooks"),
    "old spectral_norm": (parametrised(torch.nn.utils.spectral_norm, "self_attn", "in_proj_weight"), "self_attn: has hooks"),
    "forward replaced": (replaced_forward(""), "its forward was replaced on the object"),
    "forward of a norm replaced": (replaced_forward("norm1"), "norm1: its forward was replaced on the object"),
    "forward of attention replaced": (replaced_forward("self_attn"), "self_attn: its forward was replaced on the object"),
    "compiled": (compiled, "compiled: call enable before torch.compile"),
    "batch norm": (put("norm1", TransposedBatchNorm), r"norm1 \(TransposedBatchNorm\) is not token-wise"),
    "sequence norm": (put("norm2", SequenceNorm), r"norm2 \(SequenceNorm\) is not token-wise"),
    "batch norm, forward replaced": (replaced_batch_norm, "norm1.*: its forward was replaced on the object"),
    "look-ahead": (put("norm1", LookAhead), r"norm1 \(LookAhead\) is not token-wise"),
    "layer norm over the sequence": (put("norm1", lambda: nn.LayerNorm((5, D), dtype=torch.float64)), r"norm1 \(LayerNorm\)"),
    "rms norm over the sequence": (put("norm1", lambda: nn.RMSNorm((5, D), dtype=torch.float64)), r"norm1 \(RMSNorm\)"),
    "convolution": (put("linear1", Conv), r"linear1 \(Conv\) is not token-wise"),
    "convolution that is zero so far": (put("linear1", lambda: Conv(zero=True)), r"linear1 \(Conv\) is not token-wise"),
    "softmax over the sequence": (mixing_activation, r"activation \(partial\) is not token-wise"),
    "softmax module": (put("activation", lambda: nn.Softmax(dim=1)), r"activation \(Softmax\) is not token-wise"),
    **{f"{kind} on the layer": (hooked(kind, ""), "has hooks, which would see packed rows: .*packed") for kind in HOOKS},
    **{f"{kind} inside": (hooked(kind, "linear2"), "linear2: has hooks, which would see packed rows") for kind in HOOKS},
}


# These read padding, so that the layers before them must go on giving what they gave there.
MIXING = [name for name, (_, why) in PECULIAR.items() if "token-wise" in why or "Norm" in why or name == "batch norm, forward replaced"]


def peculiar_stack(spoil: Callable[[Any], Any], which: tuple[int, ...] = (1,), layers: int = 2) -> Any:
    """Made anew for every use: some cannot be copied."""
    model = shake(nn.TransformerEncoder(layer(), layers, nn.LayerNorm(D, dtype=torch.float64), enable_nested_tensor=False))
    for i in which:
        model.layers[i] = spoil(model.layers[i])
    return model


@pytest.mark.parametrize("level", ["attention", "model"])
@pytest.mark.parametrize("case", PECULIAR)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated", "ignore:`torch.nn.utils.spectral_norm` is deprecated")
@pytest.mark.usefixtures("slow_path")
def test_what_is_left_alone_among_others(case: str, level: Any) -> None:
    """The stack unpacks around such a layer; nothing inside of it is touched, so that it computes what it did."""
    spoil, why = PECULIAR[case]
    want = results(peculiar_stack(spoil))
    model = peculiar_stack(spoil)
    before, random_state = anatomy(model), torch.get_rng_state()
    values = {k: v.clone() for k, v in model.state_dict().items()}
    report = quietly(model, level=level)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items()), "a trial changes nothing"
    assert without_classes(anatomy(model)) == without_classes(before)
    alone = reasons(report)
    assert re.search(why, alone["layers.1"])
    inside = [m for m in report.modules if m.module.startswith("layers.1.")]
    assert all(m.action == "left alone" and m.reason for m in inside), "self_attn is never swapped alone"
    reads_padding = case in MIXING
    assert [name for name in alone if name.startswith("layers.0")] == (["layers.0", "layers.0.self_attn"] if reads_padding else [])
    assert ("" in alone) is reads_padding
    if reads_padding:
        assert re.search("^layers.1: " + why, alone[""])
        assert re.search("^what it gives at padding is read: layers.1: " + why, alone["layers.0"])
    disable(model)
    assert anatomy(model) == before
    quietly(model, level=level)
    assert_same(results(model), want)


@pytest.mark.parametrize("case", PECULIAR)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated", "ignore:`torch.nn.utils.spectral_norm` is deprecated")
def test_nothing_is_converted_where_every_layer_is_left_alone(case: str) -> None:
    spoil, why = PECULIAR[case]
    model = nn.ModuleList([spoil(layer()), peculiar_stack(spoil, which=(0, 1))])
    before = anatomy(model)
    with pytest.warns(VarlenWarning, match="nothing was converted"):
        report = enable(model)
    alone = reasons(report)
    assert len(alone) == len(report.modules)
    assert re.search(why, alone["0"])
    assert re.search("^layers.0: " + why if case in MIXING else "^none of its layers can be converted", alone["1"])
    assert anatomy(model) == before


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize(
    "case", ["subclass with its own forward", "compiled", "register_forward_hook inside", "register_forward_hook on the layer"]
)
def test_left_alone_with_torchs_fast_path(case: str, which: tuple[int, ...]) -> None:
    """In evaluation a stack of torch's makes nested tensors, and a layer of torch's does not call its parts."""
    want, model = (nn.Sequential() for _ in range(2))
    for m in (want, model):
        stacked = shake(nn.TransformerEncoder(layer(), 3, nn.LayerNorm(D, dtype=torch.float64)))
        for i in which:
            stacked.layers[i] = PECULIAR[case][0](stacked.layers[i])
        m.append(stacked)
    for level in ("model", "attention"):
        enable(model, level)
        assert_same(results(model[0]), results(want[0]))


class PlainAttention(nn.MultiheadAttention):
    pass


class PlainDecoderLayer(nn.TransformerDecoderLayer):
    pass


class DoublingDecoderLayer(nn.TransformerDecoderLayer):
    def forward(self, *args: Any, **options: Any) -> Tensor:
        return 2 * super().forward(*args, **options)


class PlainEncoder(nn.TransformerEncoder):
    pass


class DoublingEncoder(nn.TransformerEncoder):
    def forward(self, *args: Any, **options: Any) -> Tensor:
        return 2 * super().forward(*args, **options)


class PlainDecoder(nn.TransformerDecoder):
    pass


class DoublingDecoder(nn.TransformerDecoder):
    def forward(self, *args: Any, **options: Any) -> Tensor:
        return 2 * super().forward(*args, **options)


@pytest.mark.parametrize("level", ["attention", "model"])
@pytest.mark.parametrize(
    "classes",
    [
        (PlainAttention, SubclassedLayer, PlainDecoderLayer, PlainEncoder, PlainDecoder),
        (DoublingAttention, DoublingLayer, DoublingDecoderLayer, DoublingEncoder, DoublingDecoder),
    ],
    ids=["without forward", "with forward"],
)
def test_subclasses_of_every_host(classes: tuple[type[nn.Module], ...], level: Any) -> None:
    model = Everything()
    paths = ("attention", "lone.pre", "decoder.layers.1", "encoder", "decoder")
    for path, new_class in zip(paths, classes, strict=True):
        become(new_class, path)(model)
    want = results(copy.deepcopy(model), everything)
    report = enable(model, level)
    for path, new_class in zip(paths, classes, strict=True):
        assert type(model.get_submodule(path)) is new_class
        assert f"derive {new_class.__name__} from Varlen" in reasons(report)[path]
    assert type(model.lone["pre"].self_attn) is nn.MultiheadAttention
    assert_same(results(model, everything), want)


OTHERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "weight_norm": (parametrised(parametrizations.weight_norm, "", "in_proj_weight"), "parametrised"),
    "spectral_norm": (parametrised(parametrizations.spectral_norm, "", "in_proj_weight"), "parametrised"),
    "forward replaced": (replaced_forward(""), "its forward was replaced"),
    "compiled": (compiled, "compiled: call enable before torch.compile"),
    "hook": (hooked("register_forward_hook", ""), "has hooks"),
    "hook inside": (hooked("register_forward_hook", "out_proj"), "out_proj: has hooks"),
    "subclass": (become(SubclassedAttention), "derive SubclassedAttention from VarlenMultiheadAttention"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_attention_that_is_left_alone(case: str) -> None:
    spoil, why = OTHERS[case]
    want = results(spoil(attention()), attend)
    model = spoil(attention())
    before = anatomy(model)
    with pytest.warns(VarlenWarning, match="nothing was converted"):
        report = enable(model)
    assert re.search(why, reasons(report)[""])
    assert anatomy(model) == before
    assert_same(results(model, attend), want)


def test_a_parametrised_output_projection_is_called() -> None:
    spoil = parametrised(parametrizations.weight_norm, "out_proj", "weight")
    want = results(spoil(attention()), attend)
    model = spoil(attention())
    assert enable(model).converted
    assert_same(results(model, attend), want)


@pytest.mark.parametrize("function", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.usefixtures("slow_path")
def test_a_parametrised_linear_layer(function: Any) -> None:
    """Called, so its computed weight is used; the iteration of `spectral_norm` goes on as without us."""
    spoil = parametrised(function, "linear1", "weight")
    want = results(peculiar_stack(spoil))
    model = peculiar_stack(spoil)
    values = {k: v.clone() for k, v in model.state_dict().items()}
    assert len(enable(model).converted) == 5
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert_same(results(model), want)


def test_a_final_norm_over_the_sequence() -> None:
    """It reads what the layers give at padding, so that these stay as well."""
    model = stack()
    model.norm = SequenceNorm()
    twin = copy.deepcopy(model)
    report = quietly(model)
    assert re.search(r"norm \(SequenceNorm\) is not token-wise", reasons(report)[""])
    assert len(reasons(report)) == 5
    assert_same(results(model), results(twin))
    model = stack()
    model.norm = nn.Sequential(nn.LayerNorm(D, dtype=torch.float64))
    model.norm[0].register_forward_hook(lambda *args: None)
    assert re.search(r"norm.0: has hooks", reasons(enable(model))[""])


@pytest.mark.parametrize("level", ["attention", "model"])
@pytest.mark.parametrize("path", ["norm1", "linear1"])
@pytest.mark.usefixtures("slow_path")
def test_nothing_in_a_decoder_layer_that_mixes_tokens_is_touched(path: str, level: Any) -> None:
    """Its norm reads rows of padding, which our attention makes 0."""
    model = decoder()
    put(path, SequenceNorm if path == "norm1" else Conv)(model.layers[1])
    memory = torch.randn(3, 5, D, dtype=torch.float64)

    def call(m: nn.Module) -> Tensor:
        out = m(torch.ones(*TARGETS.shape, D, dtype=torch.float64), memory, tgt_key_padding_mask=TARGETS, memory_key_padding_mask=PADDING)
        return out[~TARGETS]

    want = results(copy.deepcopy(model), call)
    report = quietly(model, level=level)
    assert len(reasons(report)) == len(report.modules) == 7
    assert "is not token-wise" in reasons(report)["layers.1"]
    assert_same(results(model, call), want)
    alone = layer(nn.TransformerDecoderLayer)
    put(path, SequenceNorm if path == "norm1" else Conv)(alone)
    report = quietly(alone, level=level)
    assert "what it gives at padding is read" in reasons(report)["multihead_attn"]


# -------------------------------------------------------------------- hooks that are allowed


@pytest.mark.parametrize("part", ["", "linear1", "norm2", "self_attn"])
@pytest.mark.parametrize("kind", HOOKS)
def test_allowed_hooks_see_packed_rows(kind: str, part: str) -> None:
    model = stack(1, norm=False)
    want = results(copy.deepcopy(model))
    shapes: list[Any] = []

    def hook(module: nn.Module, *args: Any) -> None:
        shapes.extend(x.shape for x in (args[0] if isinstance(args[0], tuple) else args) if isinstance(x, Tensor))

    getattr(model.layers[0].get_submodule(part), kind)(hook)
    assert not quietly(model).converted
    report = enable(model, hooks="packed")
    assert len(report.converted) == 3
    assert not shapes, "enabling calls no hook"
    assert_same(results(model), want)
    encode(model).sum().backward()
    assert shapes
    assert {tuple(s) for s in shapes} <= {(int((~PADDING).sum()), D), (int((~PADDING).sum()), FF)}
    assert not quietly(model).converted, "the next call decides anew"


@pytest.mark.usefixtures("slow_path")
def test_a_trial_fires_no_hook() -> None:
    model = layer()
    model.norm1 = TokenNorm()
    calls: list[int] = []
    for m in (model.norm1, model.linear1):
        m.register_forward_hook(lambda *args: calls.append(1))
        m.register_forward_pre_hook(lambda *args: calls.append(1))
    assert len(enable(model, hooks="packed").converted) == 2
    assert not calls
    model(rows())
    assert len(calls) == 4


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weight_norm_by_hooks_may_be_allowed() -> None:
    spoil = parametrised(torch.nn.utils.weight_norm, "linear1", "weight")
    want = results(peculiar_stack(spoil))
    model = peculiar_stack(spoil)
    assert len(enable(model, hooks="packed").converted) == 5
    assert_same(results(model), want)


@pytest.mark.parametrize("level", ["attention", "model"])
def test_a_hook_on_the_stack_itself(level: Any) -> None:
    """The stack stays torch's and in evaluation hands nested tensors to layers that are converted."""
    model = stack()
    want = results(copy.deepcopy(model))
    shapes: list[Any] = []
    model.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    report = enable(model, level)
    assert "has hooks" in reasons(report)[""]
    assert len(report.converted) == 4
    nested: list[bool] = []
    model.layers[0].register_forward_pre_hook(lambda module, args: nested.append(args[0].is_nested))
    assert_same(results(model), want)
    assert nested == [False, False, True, False]
    assert set(shapes) == {rows().shape}


# -------------------------------------------------------------------- compiled, scripted, quantised


def briefly(model: nn.Module) -> list[Tensor]:
    """In training with every gradient, then in evaluation without: each way is compiled anew, and takes seconds."""
    out = encode(model.train())
    grads = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    with torch.no_grad():
        return [out.detach(), *grads, encode(model.eval())]


tracing = pytest.mark.filterwarnings("ignore:.*should not be instantiated", "ignore:The .grad attribute of a Tensor")  # of torch


@tracing
@pytest.mark.parametrize(("level", "layers"), [("attention", 1), ("model", 2)])
def test_enable_then_compile(level: Any, layers: int) -> None:
    """With nested tensors in evaluation the process would end at level "attention": compiled code of layers cannot be asked for them."""
    torch._dynamo.reset()
    model = stack(layers)
    want = briefly(copy.deepcopy(model))
    enable(model, level)
    assert_same(briefly(torch.compile(model, backend="eager")), want)


@tracing
@pytest.mark.parametrize("index", [None, 0, 1])
def test_compile_then_enable(index: int | None) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(stack())
    want = briefly(copy.deepcopy(model[0]))
    if index is None:
        model[0] = torch.compile(model[0], backend="eager")
    else:
        model[0].layers[index] = torch.compile(model[0].layers[index], backend="eager")
    report = quietly(model)
    path = "0._orig_mod" if index is None else f"0.layers.{index}._orig_mod"
    assert reasons(report)[path] == reasons(report)[f"{path}.self_attn" if index is not None else f"{path}.layers.0"]
    assert "compiled: call enable before torch.compile" in reasons(report)[path]
    assert len(report.converted) == (0 if index is None else 3)
    assert_same(briefly(model[0]), want)


@tracing
def test_enable_behind_a_compiled_model() -> None:
    """Compiled code looks at the classes it was made for, and is made again."""
    torch._dynamo.reset()
    model = stack(1).eval()
    with torch.no_grad():
        want = encode(model)
        compiled_model = torch.compile(model, backend="eager")
        assert_same([encode(compiled_model)], [want])
        enable(model)
        with record() as log:
            assert_same([encode(compiled_model)], [want])
    assert log.calls


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("level", ["attention", "model"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_scripted_layer(index: int, level: Any) -> None:
    """Reported, though a scripted module is no instance of the class that it was made from."""

    def make() -> Any:
        m = shake(nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False))
        m.layers[index] = torch.jit.script(m.layers[index])
        return m

    want = results(make())
    model = make()
    report = enable(model, level)
    assert reasons(report)[f"layers.{index}"] == reasons(report)[f"layers.{index}.self_attn"] == "scripted: its code is fixed"
    assert len(report.converted) >= 2
    assert_same(results(model), want)
    with pytest.warns(VarlenWarning, match="scripted"):
        enable(torch.jit.script(layer()))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
@pytest.mark.usefixtures("slow_path")
def test_dynamically_quantised_linear_layers() -> None:
    """torch's own layers work with these without the fast path only."""
    model = nn.Sequential(stack(), stack()).float().eval()
    model[1] = torch.ao.quantization.quantize_dynamic(model[1], {nn.Linear})
    x = rows().float()

    def call(m: nn.Module) -> Tensor:
        with torch.no_grad():
            for part in m:
                out = part(x, src_key_padding_mask=PADDING)
        return out[~PADDING]

    want = call(model)
    report = enable(model)
    assert "quantised: linear1 (Linear), linear2 (Linear)" in reasons(report)["1.layers.0"]
    assert len(report.converted) == 5
    assert_same([call(model)], [want])


# -------------------------------------------------------------------- parts that were replaced


class TokenNorm(nn.Module):
    """Like `nn.RMSNorm`; counts its calls, and keeps an average in a buffer."""

    eps = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, D, dtype=torch.float64))
        self.register_buffer("average", torch.zeros(D, dtype=torch.float64))
        self.calls = 0
        self.shapes: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.shapes.append(tuple(x.shape))
        self.average.add_(1)
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


class LoRA(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, out, dtype=torch.float64)
        self.down = nn.Linear(width, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, out, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def gated(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.7 * x)


def with_activation(x: Any) -> Any:
    x.activation = gated
    return x


POSITION_WISE: dict[str, Callable[[Any], Any]] = {
    "nn.RMSNorm": put("norm1", lambda: nn.RMSNorm(D, eps=1e-6, dtype=torch.float64)),
    "a norm of one's own": put("norm2", TokenNorm),
    "LoRA": put("linear2", lambda: LoRA(FF, D)),
    "dropout behind a linear layer": put("linear1", lambda: nn.Sequential(nn.Linear(D, FF, dtype=torch.float64), nn.Dropout(0.0))),
    "another activation": with_activation,
    "an activation module": put("activation", nn.SiLU),
    "a module among activations": put("activation", lambda: nn.Sequential(nn.ReLU(), nn.Softmax(-1))),
}


@pytest.mark.parametrize("level", ["attention", "model"])
@pytest.mark.parametrize("case", POSITION_WISE)
@pytest.mark.usefixtures("slow_path")
def test_token_wise_parts_are_converted(case: str, level: Any) -> None:
    """R-23: what stands in a layer is called. The trial runs on a copy: no buffer, counter or random number of the model's moves."""
    model = POSITION_WISE[case](layer())
    want = results(copy.deepcopy(model))
    values = {k: v.clone() for k, v in model.state_dict().items()}
    random_states = torch.get_rng_state(), random.getstate()
    report = enable(model, level)
    assert len(report.converted) == 2
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    for m in model.modules():
        if isinstance(m, TokenNorm):
            assert m.calls == 0
            assert m.shapes == []
    assert_same(results(model), want)


@pytest.mark.usefixtures("slow_path")
def test_a_token_wise_final_norm() -> None:
    model = stack()
    model.norm = TokenNorm()
    want = results(copy.deepcopy(model))
    assert len(enable(model).converted) == 5
    assert_same(results(model), want)
    assert model.norm.shapes[-1] == (int((~PADDING).sum()), D)


def test_dropout_in_a_trial() -> None:
    """Random, but token-wise: copies are given the same random numbers."""
    model = layer(dropout=0.5)
    model.linear1 = nn.Sequential(nn.Linear(D, FF, dtype=torch.float64), nn.Dropout(0.5))
    assert len(enable(model).converted) == 2


class DropPath(nn.Module):
    """Drops whole rows of a batch, which packed rows are not."""

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(len(x), *[1] * (x.dim() - 1)) > 0.1
        return x * kept if self.training else x


@pytest.mark.parametrize("part", ["dropout1", "dropout2"])
def test_dropout_of_whole_sequences(part: str) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        report = enable(peculiar_stack(put(part, DropPath)))
        assert reasons(report)["layers.1"] == f"{part} (DropPath) gives packed rows other results than padded ones"
        assert len(report.converted) == 3


class Stateful(nn.Module):
    """Gives another result at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.scale += 1
        return x * self.scale


def test_a_trial_begins_with_a_fresh_copy_each_time() -> None:
    model = put("norm1", Stateful)(layer())
    assert len(enable(model).converted) == 2
    assert model.norm1.scale == 1


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            raise ValueError("wants (B, S, D)")
        return x


@pytest.mark.usefixtures("slow_path")
def test_a_part_that_can_not_be_called_on_rows() -> None:
    report = quietly(put("norm1", Failing)(layer()))
    assert reasons(report)[""] == "norm1 (Failing) could not be called on packed rows: ValueError: wants (B, S, D)"
    model = peculiar_stack(put("norm1", Failing))
    want = results(copy.deepcopy(model))
    assert len(enable(model).converted) == 3, "which says nothing about padding"
    assert_same(results(model), want)


class Positions(nn.Module):
    """Counts columns, which packed rows have none of."""

    eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(x.shape[-2], dtype=x.dtype)[:, None]


@pytest.mark.usefixtures("slow_path")
def test_a_part_that_counts_columns() -> None:
    model = peculiar_stack(put("norm1", Positions))
    want = results(copy.deepcopy(model))
    report = enable(model)
    assert reasons(report)["layers.1"] == "norm1 (Positions) gives packed rows other results than padded ones"
    assert len(report.converted) == 3
    assert_same(results(model), want)


def test_a_trial_is_made_in_full_precision() -> None:
    model = layer().bfloat16()
    model.norm1 = nn.Sequential(nn.LayerNorm(D, dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert len(enable(model).converted) == 2


# -------------------------------------------------------------------- sharing, and where things stand


@pytest.mark.parametrize("level", ["attention", "model"])
def test_shared_layers_and_tied_weights(level: Any) -> None:
    one = layer()
    first, second = stack(), shake(nn.TransformerEncoder(layer(), 2))
    first.layers[0] = first.layers[1]
    second.layers[0] = second.layers[1] = one
    second.layers[1].linear2.weight = nn.Parameter(second.layers[1].linear1.weight.detach().t().contiguous())
    model = nn.Sequential(first, second, one)
    model[0].layers[1].norm1.weight = one.norm1.weight

    def call(m: nn.Module) -> Tensor:
        x = rows()
        for part in m:
            x = part(x, src_key_padding_mask=PADDING)
        return x[~PADDING]

    want = results(copy.deepcopy(model), call)
    before = anatomy(model.train())
    report = enable(model, level)
    assert len({m.module for m in report.modules}) == len(report.modules)
    assert len(report.converted) == 6
    assert_same(results(model, call), want)
    disable(model.train())
    assert anatomy(model) == before


def test_two_stacks_of_the_same_layers() -> None:
    """A layer is reported once, and both stacks pack."""
    one, two = stack(), stack()
    two.layers = one.layers
    model = nn.ModuleList([one, two])
    want = [results(copy.deepcopy(m)) for m in model]
    report = enable(model)
    assert [m.module for m in report.converted if m.kind == "TransformerEncoder"] == ["0", "1"]
    for m, w in zip(model, want, strict=True):
        assert_same(results(m), w)


class Wrapper(nn.Module):
    """Calls what is inside, as tools for checkpoints and sharding do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.inner(*args, **options)


def test_inside_containers() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(D, D, dtype=torch.float64), Wrapper(layer())), "b": Wrapper(Wrapper(stack()))})

    def call(m: nn.Module) -> Tensor:
        x = m["a"][1](m["a"][0](rows()), src_key_padding_mask=PADDING)
        return m["b"](x, src_key_padding_mask=PADDING)[~PADDING]

    want = results(copy.deepcopy(model), call)
    report = enable(model)
    assert [m.module for m in report.converted][:3] == ["a.1.inner", "a.1.inner.self_attn", "b.inner.inner"]
    assert_same(results(model, call), want)


class WrappedLayer(Wrapper):
    """With what torch's stacks read of their first layer."""

    @property
    def self_attn(self) -> Any:
        return self.inner.self_attn

    @property
    def multihead_attn(self) -> Any:
        return self.inner.multihead_attn


def test_wrapped_layers_of_a_stack() -> None:
    """The stack does not know what a wrapper does, so it stays; the layers inside are converted."""
    encoder, stacked = shake(nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False)), decoder()
    for m in (encoder, stacked):
        for i, x in enumerate(m.layers):
            m.layers[i] = WrappedLayer(x)
    model = nn.ModuleList([encoder, stacked])

    def call(m: nn.Module) -> Tensor:
        memory = m[0](rows(), src_key_padding_mask=PADDING)
        tgt = torch.ones(*TARGETS.shape, D, dtype=torch.float64)
        return m[1](tgt, memory, tgt_key_padding_mask=TARGETS, memory_key_padding_mask=PADDING)[~TARGETS]

    want = results(copy.deepcopy(model), call)
    report = enable(model)
    assert reasons(report) == {"0": "none of its layers can be converted", "1": "none of its layers can be converted"}
    assert len(report.converted) == 10
    assert_same(results(model, call), want)


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.usefixtures("slow_path")
def test_checkpointed_layers(mixing: bool) -> None:
    """torch's wrapper passes everything on, so that the stack packs; what it hides is found."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = peculiar_stack(put("norm1", SequenceNorm) if mixing else lambda x: x)
    for i, x in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(x)
    want = results(copy.deepcopy(model))
    report = quietly(model)
    assert len(report.converted) == (0 if mixing else 5)
    assert_same(results(model), want)


class OwnDecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = attention()

    def forward(self, tgt: Tensor, memory: Tensor, **masks: Any) -> Tensor:
        return tgt + self.self_attn(tgt, tgt, tgt, key_padding_mask=masks["tgt_key_padding_mask"], need_weights=False)[0]


def test_a_first_layer_without_cross_attention() -> None:
    """Nothing says how memory lies, where ours asks."""
    model = decoder()
    model.layers[0] = OwnDecoderLayer()

    def call(m: nn.Module) -> Tensor:
        tgt = torch.ones(*TARGETS.shape, D, dtype=torch.float64)
        return m(tgt, rows(), tgt_key_padding_mask=TARGETS, memory_key_padding_mask=PADDING)[~TARGETS]

    want = results(copy.deepcopy(model), call)
    report = enable(model)
    assert reasons(report) == {"": "its first layer, a OwnDecoderLayer, has no multihead_attn"}
    assert len(report.converted) == 4
    assert_same(results(model, call), want)


@pytest.mark.parametrize("name", ["_sa_block", "_ff_block"])
@pytest.mark.usefixtures("slow_path")
def test_methods_that_were_replaced_on_the_object(name: str) -> None:
    """As recipes do that look at attention weights."""

    def make() -> Any:
        model = stack()
        old = getattr(model.layers[1], name)
        setattr(model.layers[1], name, lambda *args, **options: 2 * old(*args, **options))
        return model

    want = results(make())
    model = make()
    assert reasons(enable(model))["layers.1"] == f"its {name} was replaced on the object"
    assert_same(results(model), want)


class Marked(nn.Module):
    original_class = nn.Linear


def test_a_class_that_uses_our_word() -> None:
    model = nn.Sequential(Marked(), attention())
    assert [m.module for m in enable(model).modules] == ["1"]
    disable(model)
    assert type(model[0]) is Marked


class OwnLayer(nn.Module):
    """A layer of one's own in torch's stack, with attention of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = attention()

    def forward(self, src: Tensor, src_mask: Any, is_causal: bool, src_key_padding_mask: Tensor) -> Tensor:
        return src + self.self_attn(src, src, src, key_padding_mask=src_key_padding_mask, need_weights=False)[0]


def test_layers_of_ones_own_in_torchs_stack() -> None:
    model = shake(nn.TransformerEncoder(OwnLayer(), 2, enable_nested_tensor=False))
    want = results(copy.deepcopy(model))
    report = enable(model)
    assert reasons(report) == {"": "none of its layers can be converted"}
    assert len(report.converted) == 2
    assert_same(results(model), want)


def test_a_decoders_activation_is_tried_as_it_is() -> None:
    """Copies of torch's decoder layers forget an activation that is a module."""
    model = decoder()
    model.layers[1].activation = nn.Softmax(dim=1)
    report = quietly(model)
    assert "activation (Softmax) is not token-wise" in reasons(report)["layers.1"]
    assert not report.converted


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("level", ["attention", "model"])
def test_traces_and_exports_of_enabled_models_serve_other_masks(level: Any) -> None:
    """R-56: a trace that packed would keep one batch's number of tokens."""
    model = stack().eval()
    enable(model, level=level)
    x, full = torch.randn(3, 5, D, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.bool)
    traced = torch.jit.trace(model, example_kwarg_inputs={"src": x, "src_key_padding_mask": full})
    exported = torch.export.export(model, (), {"src": x, "src_key_padding_mask": full}).module()
    for graph in (traced, exported):
        for mask in (PADDING, PADDING.flip(1), full):
            got, want = (m(src=x, src_key_padding_mask=mask) for m in (graph, model))
            torch.testing.assert_close(got[~mask], want[~mask])


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>")
def test_attention_level_packs_in_compiled_code_too() -> None:
    """torch's own stack would hand float masks on, which may hold anything while tracing."""
    model = stack().eval()
    want = encode(model)
    enable(model, level="attention")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with record() as log, torch.no_grad():
        got = compiled(rows(), src_key_padding_mask=PADDING)
    assert_same([got[~PADDING]], [want])
    assert {c.backend for c in log.calls} == {"cpu"}


@pytest.mark.parametrize("kind", ["encoder", "decoder", "attention"])
@pytest.mark.parametrize("training", [False, True])
def test_where_nothing_is_padded_little_work_is_as_it_came(kind: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, torch's fast path included, and the record says so. With a backend requested it runs on that; more work is packed."""
    monkeypatch.setattr(classes, "_PAYS", 0)
    plain: Any
    if kind == "encoder":
        plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    elif kind == "decoder":
        plain = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    else:
        plain = nn.MultiheadAttention(16, 2, batch_first=True)
    plain.train(training)
    model, x = copy.deepcopy(plain), torch.randn(3, 5, 16)
    enable(model)
    given = {"encoder": (x,), "decoder": (x, x + 1), "attention": (x, x, x)}[kind]
    none = {"attention": "key_padding_mask", "encoder": "src_key_padding_mask", "decoder": "tgt_key_padding_mask"}[kind]
    options = {"need_weights": False} if kind == "attention" else {}
    for masks in ({}, {none: torch.zeros(3, 5, dtype=torch.bool)}):
        with torch.set_grad_enabled(training), record() as log:
            got, want = (first(m(*given, **masks, **options)) for m in (model, plain))
        assert torch.equal(got, want)
        assert [call.kernel for call in log.calls] == ["torch's own"]
        assert "nothing is padded" in str(log)
        with use_backend("reference"), record() as log:
            torch.testing.assert_close(first(model(*given, **masks, **options)), want)
        assert {call.backend for call in log.calls} == {"reference"}
    padded = torch.arange(5) >= torch.tensor([5, 2, 3])[:, None]
    with record() as log:
        model(*given, **{none: padded}, **options)
    assert all(call.rows == 10 for call in log.calls if call.module and "multihead" not in call.module) or kind == "decoder"
    assert "nothing is padded" not in str(log)


@pytest.mark.parametrize("padding_rows", ["zero", "exact", "edge"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("cross", [True, False])
def test_attention_with_little_padding_is_torchs_own(
    padding_rows: Any, batch_first: bool, cross: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives what packed attention gives, whatever is at padding; an order is obeyed, and weights that nobody asked for are None."""
    plain = nn.MultiheadAttention(8, 2, batch_first=batch_first, dtype=torch.float64)
    x, query = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 5, 8, dtype=torch.float64)
    padding = torch.arange(5) >= torch.tensor([5, 2, 3])[:, None]
    if cross or padding_rows != "exact":
        x = torch.where(padding[..., None], torch.nan, x)
    x, query = (x, query) if batch_first else (x.transpose(0, 1), query.transpose(0, 1))
    results = []
    for pays, order in ((classes._PAYS, "auto"), (0, "auto"), (classes._PAYS, "reference")):
        monkeypatch.setattr(classes, "_PAYS", pays)
        model = copy.deepcopy(plain)
        enable(model, need_weights=False, padding_rows=padding_rows)
        leaf = x.clone().requires_grad_()
        with record() as log, use_backend(order):
            out, weights = model(query if cross else leaf, leaf, leaf, padding)
        assert weights is None
        as_it_came = pays and order == "auto" and padding_rows != "edge"
        assert ("to pack so little takes more time than it saves" in str(log)) == bool(as_it_came)
        results.append((out, *torch.autograd.grad(out.square().sum(), [leaf, *model.parameters()])))
    assert not results[0][0].isnan().any()
    for got in results[1:]:
        for ours, other in zip(results[0], got, strict=True):
            torch.testing.assert_close(ours, other)


def test_weights_that_nobody_wants_are_none_where_nothing_is_padded_too() -> None:
    model, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    enable(model, need_weights=False)
    for masks in ({}, {"key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)}):
        assert model(x, x, x, **masks)[1] is None


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("cross", [True, False])
def test_weights_are_torchs_own_computation(batch_first: bool, average: bool, cross: bool) -> None:
    """Whatever is at padding reaches no token, and no gradient; rows and weights of padding are 0, as the module built by name has them."""
    plain = nn.MultiheadAttention(8, 2, batch_first=batch_first, dtype=torch.float64)
    model, named = copy.deepcopy(plain), VarlenMultiheadAttention(8, 2, batch_first=batch_first, dtype=torch.float64)
    named.load_state_dict(plain.state_dict())
    enable(model)
    padding = torch.arange(5) >= torch.tensor([5, 2, 3])[:, None]
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    x = torch.where(padding[..., None], torch.nan, x)
    query = torch.randn(3, 5, 8, dtype=torch.float64)
    x, query = (x, query) if batch_first else (x.transpose(0, 1), query.transpose(0, 1))
    results = []
    for module in (model, named):
        leaf = x.clone().requires_grad_()
        given = (query, leaf, leaf) if cross else (leaf, leaf, leaf)
        with record() as log:
            out, weights = module(*given, padding, need_weights=True, average_attn_weights=average)
        results.append((out, weights, *torch.autograd.grad(out.square().sum() + weights.square().sum(), [leaf, *module.parameters()])))
        assert ("padded computation only" in str(log)) == (module is model)
    for ours, built in zip(*results, strict=True):
        torch.testing.assert_close(ours, built)
    with record() as log:
        model(*(t.nan_to_num() for t in given), torch.ones_like(padding))  # no key: torch has NaN there, and in every gradient
    assert "padded computation only" not in str(log)


@pytest.mark.parametrize(("batch", "columns"), [(4, 6), (500, 40)])
def test_what_a_mask_means_does_not_depend_on_the_size_of_a_batch(batch: int, columns: int) -> None:
    """`is_causal` without a mask, a query without a key, and masks that do not fit: as on packed rows, also where torch's own would run."""
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 1).eval()
    lone = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 1).eval()
    x = torch.randn(batch, columns, 16)
    assert (x.numel() > 1 << 18) == (columns > 6)
    after = torch.ones(columns, columns, dtype=torch.bool).triu(1)
    plain = copy.deepcopy(stack)
    for model in (stack, lone, decoder):
        enable(model)
    with torch.no_grad():
        want = plain(x, mask=after, is_causal=True)
        torch.testing.assert_close(stack(x, is_causal=True), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(stack(x, None, None, True), want, atol=1e-5, rtol=1e-5)
        causal = lone(x, x, x, need_weights=False, attn_mask=after)[0]
        torch.testing.assert_close(lone(x, x, x, is_causal=True)[0], causal, atol=1e-5, rtol=1e-5)
        want = decoder(x, x, tgt_mask=after)
        torch.testing.assert_close(decoder(x, x, tgt_is_causal=True), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(decoder(x, x, None, None, None, None, True), want, atol=1e-5, rtol=1e-5)
        after[2] = True
        for weights in (False, True):
            assert not lone(x, x, x, need_weights=weights, attn_mask=after)[0].isnan().any()
    for shape in ((batch, columns + 1), (batch - 1, columns)):
        with pytest.raises(AssertionError, match="key_padded_mask"):
            lone(x, x, x, torch.ones(shape, dtype=torch.bool).index_fill(1, torch.tensor([0]), False))
