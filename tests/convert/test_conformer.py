"""`enable(level="model")` on a Conformer with torchaudio's names: the padded model's numbers, or those of each utterance alone."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from varlen_attn import disable, enable, record
from varlen_attn.convert import conformer
from varlen_attn.errors import ArgumentError, VarlenError

from . import conformers
from .test_convert import shake

OURS = conformers.load()
D, T = 8, 30
LENGTHS = torch.tensor([30, 21, 9, 0, 1])
REAL = torch.arange(T) < LENGTHS[:, None]
WAYS: dict[str, Any] = {"padded": None, "alone": "alone"}
each_way = pytest.mark.parametrize("way", WAYS)
each_order = pytest.mark.parametrize("first", [False, True], ids=["attention first", "convolution first"])
pytestmark = pytest.mark.filterwarnings("ignore:row . of the mask has no token")  # drawn on purpose


@pytest.fixture(autouse=True)
def small_batches_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformer, "_PAYS", 0)


def build(home: Any = OURS, layers: int = 3, kernel: int = 5, **options: Any) -> Any:
    torch.manual_seed(0)
    model = shake(home.Conformer(D, 2, 12, layers, kernel, **options)).double().eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm1d)):
        norm.running_mean.normal_()  # type: ignore[union-attr, operator]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return model


def converted(model: nn.Module, way: str, **options: Any) -> Any:
    model = copy.deepcopy(model)
    enable(model, level="model", **{"padding_rows": WAYS[way], **options})
    return model


def reasons(report: Any) -> dict[str, str]:
    return {m.module: m.reason for m in report.modules}


def batch(lengths: Tensor = LENGTHS) -> Tensor:
    return torch.randn(len(lengths), int(lengths.max()), D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def expected(model: Any, way: str, x: Tensor, lengths: Tensor = LENGTHS) -> Tensor:
    """Real frames, one utterance after another."""
    if way == "padded":
        return model(x, lengths)[0][torch.arange(x.shape[1]) < lengths[:, None]]  # type: ignore[no-any-return]
    return torch.cat([model(x[i : i + 1, :n], lengths[i : i + 1])[0][0] for i, n in enumerate(lengths.tolist()) if n])


def everything(model: Any, compute: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Real frames, and gradients of a loss of these."""
    leaf = x.clone().requires_grad_()
    out = compute(leaf)
    loss = (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum()
    return [out, *torch.autograd.grad(loss, [leaf, *model.parameters()])]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=1e-9 * max([1.0, *b.detach().abs().flatten().tolist()]))


def why(model: nn.Module, x: Tensor, lengths: Tensor = LENGTHS) -> str | None:
    """Why the whole of it ran as it came; None if it ran on rows."""
    with record(model) as log:
        model(x, lengths)
    return next((call.reason for call in log if call.module == type(model).__name__), None)


@pytest.fixture
def torchaudio() -> Any:
    """The real one, where it is installed: its file alone, because its compiled part must fit to torch."""
    spec = importlib.util.find_spec("torchaudio")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("torchaudio is not installed")
    of_file = importlib.util.spec_from_file_location(conformers.HOME, f"{spec.submodule_search_locations[0]}/models/conformer.py")
    assert of_file is not None
    assert of_file.loader is not None
    module = importlib.util.module_from_spec(of_file)
    of_file.loader.exec_module(module)
    return module


# -------------------------------------------------------------------- numbers


@each_order
@each_way
def test_real_frames_and_their_gradients(way: str, first: bool) -> None:
    model, x, known = build(convolution_first=first), batch(), LENGTHS.clone()
    known[3] = 2  # torch gives NaN, and NaN gradients, for an utterance without frames
    real = torch.arange(T) < known[:, None]
    ours = converted(model, way)
    with record(ours) as log:
        got = everything(ours, lambda x: ours(x, known)[0][real], x)
    assert [call.module for call in log] == [f"conformer_layers.{i}.self_attn" for i in range(3)]
    assert_same(got, everything(model, lambda x: expected(model, way, x, known), x))
    assert not ours(x, known)[0][~real].any()
    assert ours(x, known)[1] is known
    others = expected(model, "alone" if way == "padded" else "padded", x, known)
    assert (others - got[0]).abs().max() > 0.01


@each_way
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any),
    kernel=st.sampled_from([1, 3, 7]),
    layers=st.integers(1, 4),
    first=st.booleans(),
)
def test_any_lengths(way: str, lengths: list[int], kernel: int, layers: int, first: bool) -> None:
    model, known = build(layers=layers, kernel=kernel, convolution_first=first), torch.tensor(lengths)
    x, real = batch(known), torch.arange(max(lengths)) < known[:, None]
    out = converted(model, way)(x, known)[0]
    assert_same([out[real]], [expected(model, way, x, known)])
    assert not out[~real].any()


@each_order
def test_only_padding_within_reach_is_computed(first: bool) -> None:
    """Of three layers that see two frames on each side, the first one needs six frames of padding, or four after its convolution."""
    model = converted(build(convolution_first=first), "padded")
    with record(model) as log:
        model(batch(), LENGTHS)
    of = lambda reach: sum(min(n + reach, T) for n in LENGTHS.tolist() if n)  # noqa: E731
    assert [call.rows for call in log] == [of(reach - 2 * first) for reach in (6, 4, 2)]
    alone = converted(model, "alone")
    with record(alone) as log:
        alone(batch(), LENGTHS)
    assert {call.rows for call in log} == {int(LENGTHS.sum())}


@each_way
def test_what_is_at_padding_of_the_input(way: str) -> None:
    """The padded model reads it, as far as convolutions reach; alone nothing does."""
    model, x = build(), batch()
    ours, far = converted(model, way), torch.arange(T) >= LENGTHS[:, None] + 6
    near = ~REAL & ~far
    hostile = x.masked_fill(far[..., None], torch.nan)
    assert_same([ours(hostile, LENGTHS)[0]], [ours(x, LENGTHS)[0]])
    changed = ours(x.masked_fill(near[..., None], 3.0), LENGTHS)[0]
    assert torch.equal(changed, ours(x, LENGTHS)[0]) == (way == "alone")


def test_rows_at_padding() -> None:
    x = batch()
    edge = converted(build(), "padded", padding_rows="edge")(x, LENGTHS)[0]
    assert torch.equal(edge[1, 21:], edge[1, 20].expand(9, D))
    assert not edge[3].any()
    assert_same([edge[REAL]], [expected(build(), "padded", x)])
    zero = converted(build(), "padded", padding_rows="zero")
    assert_same([zero(x, LENGTHS)[0]], [converted(build(), "padded")(x, LENGTHS)[0]])
    exact = copy.deepcopy(build())
    report = enable(exact, level="model", padding_rows="exact")
    assert "exact" in reasons(report)[""]
    assert report.modules[0].action == "left alone"
    assert_same([exact(x, LENGTHS)[0][:3]], [build()(x, LENGTHS)[0][:3]])
    with record() as log:  # rows at padding are the same where it runs as it came
        for rows, want in (("edge", edge), ("zero", zero(x, LENGTHS)[0])):
            hooked = converted(build(), "padded", padding_rows=rows)
            hooked.conformer_layers[0].register_forward_hook(lambda *_: None)
            assert_same([hooked(x, LENGTHS)[0]], [want])
    assert any("hooks" in (call.reason or "") for call in log)


# -------------------------------------------------------------------- norms over time, dropout, dtypes


def in_training(model: Any, x: Tensor, lengths: Tensor) -> Tensor:
    """Real frames of utterances alone, but for the statistics of batch norms, which are of all of them: written out."""
    parts = [x[i, :n] for i, n in enumerate(lengths.tolist())]
    for layer in model.conformer_layers:
        for i, part in enumerate(parts):
            part = part + layer.ffn1(part) / 2
            y = layer.self_attn_layer_norm(part)
            parts[i] = part + layer.self_attn(y, y, y, need_weights=False)[0]
        before = [layer.conv_module.layer_norm(part) for part in parts]
        for m in layer.conv_module.sequential:
            if isinstance(m, nn.BatchNorm1d):
                before = [*m(torch.cat(before)).split(lengths.tolist())]
            else:
                before = [m(part.T[None])[0].T for part in before]
        parts = [part + more for part, more in zip(parts, before, strict=True)]
        parts = [layer.final_layer_norm(part + layer.ffn2(part) / 2) for part in parts]
    return torch.cat(parts)


def test_batch_norms_in_training() -> None:
    model, x, known = build().train(), batch(), LENGTHS.clamp(min=2)
    real = torch.arange(T) < known[:, None]
    alone, padded = converted(model, "alone"), converted(model, "padded")
    want, got = copy.deepcopy(model), everything(alone, lambda x: alone(x, known)[0][real], x)
    assert_same(got, everything(want, lambda x: in_training(want, x, known), x))
    assert_same([*alone.buffers()], [*want.buffers()])
    assert "BatchNorm1d reads all padding" in str(why(padded, x, known))
    fresh, want = converted(model, "padded"), copy.deepcopy(model)
    assert_same([fresh(x, known)[0][real], *fresh.buffers()], [expected(want, "padded", x, known), *want.buffers()])
    for norm in (m for m in padded.modules() if isinstance(m, nn.BatchNorm1d)):
        norm.eval()  # frozen statistics
    assert why(padded, x, known) is None
    hooked = converted(model, "alone")
    hooked.conformer_layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(VarlenError, match=r"conformer_layers.0: has hooks.*disable\(model\)"):
        hooked(x, known)


def test_group_norms() -> None:
    model, x = build(use_group_norm=True), batch()
    report = enable(padded := copy.deepcopy(model), level="model")
    assert report.modules[0].action == "left alone"
    assert 'padding_rows="alone"' in reasons(report)[""]
    known = LENGTHS.clamp(min=1)
    assert_same([padded(x, known)[0]], [model(x, known)[0]])
    alone = converted(model, "alone")
    assert why(alone, x, known) is None
    assert_same([alone(x, known)[0][torch.arange(T) < known[:, None]]], [expected(model, "alone", x, known)])


@each_way
def test_dropout(way: str) -> None:
    """Of everything: what is left shows that all of torch's dropouts are there; and of half, it draws."""
    model, x, known = build(dropout=1.0), batch(), LENGTHS.clamp(min=1)
    for m in model.modules():
        m.training = not isinstance(m, nn.BatchNorm1d)
    ours = converted(model, way)
    assert why(ours, x, known) is None
    assert_same([ours(x, known)[0][torch.arange(T) < known[:, None]]], [expected(model, way, x, known)])
    for m in ours.modules():
        m.p = 0.5
    assert not torch.equal(ours(x, known)[0], ours(x, known)[0])


@each_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"])
def test_low_precision(way: str, dtype: Any) -> None:
    model, x = build(), batch()
    want = expected(model, way, x, LENGTHS.clamp(min=1))
    real = torch.arange(T) < LENGTHS.clamp(min=1)[:, None]
    model, x = (model.float(), x.float()) if dtype == "autocast" else (model.to(dtype), x.to(dtype))
    ours = converted(model, way)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        torchs, got = expected(model, way, x, LENGTHS.clamp(min=1)), ours(x, LENGTHS.clamp(min=1))[0][real]
        assert why(ours, x) is None
    assert got.dtype == torchs.dtype
    assert (got - want).abs().max() <= 2 * (torchs - want).abs().max()


@each_way
def test_on_the_way_of_others(way: str) -> None:
    """Checkpoints, `torch.func`, inference mode, prepacked weights, keywords, and other integers."""
    model, x = build(), batch()
    ours, known = converted(model, way), LENGTHS.clamp(min=1)
    real = torch.arange(T) < known[:, None]
    want = everything(model, lambda x: expected(model, way, x, known), x)
    for reentrant in (False, True):
        again = partial(checkpoint, ours, use_reentrant=reentrant)
        if not reentrant:
            assert_same(everything(ours, lambda x: again(x, known)[0][real], x), want)  # noqa: B023
        assert_same([again(x.clone().requires_grad_(), known)[0][real]], want[:1])
    weights = dict(ours.named_parameters()) | dict(ours.named_buffers())
    assert_same([torch.func.functional_call(ours, weights, (x, known))[0][real]], want[:1])
    with torch.inference_mode():
        assert_same([ours(lengths=known.to(torch.uint8), input=x)[0][real]], want[:1])
    assert_same([ours(x, known)[0][real]], want[:1])


# -------------------------------------------------------------------- what enable says and does


def test_reports() -> None:
    with_head = nn.Sequential()
    with_head.front, with_head.encoder = nn.Conv1d(D, D, 3), build()
    report = enable(with_head, level="model")
    text = reasons(report)["encoder"]
    assert "the padded model's numbers" in text
    assert 'padding_rows="alone"' in text
    assert "front (Conv1d) may read" in text
    assert [m.action for m in report.modules] == ["converted"] * 4
    assert not any(reasons(report)[f"encoder.conformer_layers.{i}.self_attn"] for i in range(3))
    assert "front" not in reasons(enable(with_head, level="model", padding_rows="zero"))["encoder"]
    text = reasons(enable(with_head, level="model", padding_rows="alone"))["encoder"]
    assert "the numbers that it has alone, and not those of the padded model" in text
    levels: list[Any] = ["auto", "attention"]
    for level in levels:
        assert reasons(enable(with_head, level=level)).get("encoder", "") == ""
        assert type(with_head.encoder) is OURS.Conformer


def test_a_choice_that_cannot_be_had() -> None:
    for model, level, message in (
        (nn.MultiheadAttention(D, 2), "model", "there is none in it"),
        (build(), "auto", "needs level='model'"),
        (build(layers=0), "model", "has no layers"),
    ):
        with pytest.raises(ArgumentError, match=message):
            enable(model, level=level, padding_rows="alone")  # type: ignore[arg-type]
        assert type(model) in (nn.MultiheadAttention, OURS.Conformer)
    with pytest.raises(ArgumentError, match="takes the lengths of padded rows"):
        converted(build(), "padded")(batch(), LENGTHS, layout=[3])


def test_an_example_is_compared() -> None:
    x = batch(), LENGTHS.clamp(min=1)
    model = build()
    assert enable(model, level="model", example=x).modules[0].action == "converted"
    assert why(model, *x) is None
    with pytest.raises(ArgumentError, match=r"on the example .* differs"):
        enable(build(), level="model", padding_rows="alone", example=x)


def test_disable_is_the_exact_inverse() -> None:
    model = build()
    before = [(type(m), sorted(vars(m))) for m in model.modules()]
    for way in ("padded", "alone", "padded"):
        enable(model, level="model", padding_rows=WAYS[way])
        enable(model, level="model", padding_rows=WAYS[way])
        assert type(model).__name__ == "Conformer"
        assert type(model).__module__ == conformers.HOME
        assert isinstance(model, OURS.Conformer)
        assert why(model, batch()) is None
    assert [m.kind for m in disable(model).modules] == ["Conformer", *["MultiheadAttention"] * 3]
    assert [(type(m), sorted(vars(m))) for m in model.modules()] == before


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes are found by their names, as pickles and dynamo do."""
    for name in ("torchaudio", "torchaudio.models", conformers.HOME):
        monkeypatch.setitem(sys.modules, name, OURS if name == conformers.HOME else types.ModuleType(name))


@each_way
@pytest.mark.usefixtures("loaded")
def test_copies_and_pickles(way: str) -> None:
    model, x = build(), batch()
    ours = converted(model, way)
    assert ours.state_dict().keys() == model.state_dict().keys()
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.copy(ours)):
        assert type(other) is type(ours)
        assert why(other, x) is None
        assert_same([other(x, LENGTHS)[0]], [ours(x, LENGTHS)[0]])
    disable(other := copy.deepcopy(ours))
    assert type(other) is OURS.Conformer
    assert type(type(ours)(D, 2, 12, 1, 3)) is OURS.Conformer  # a new one is none that was enabled


# -------------------------------------------------------------------- why not


def mutate(where: str, module: Any) -> None:
    """Something that is not as `enable` knows it."""
    layer = module.conformer_layers[1]
    torch.manual_seed(0)
    if where == "hook":
        layer.ffn1.register_forward_hook(lambda *_: None)
    elif where == "backward hook":
        layer.conv_module.sequential[1].register_full_backward_hook(lambda *_: None)
    elif where == "method":
        layer._apply_convolution = lambda x, f=layer._apply_convolution: f(x) * 1
    elif where == "forward":
        layer.ffn2.forward = layer.ffn2.forward
    elif where == "part":
        layer.ffn1.sequential[1] = nn.Sequential(layer.ffn1.sequential[1], nn.Softmax(0))
    elif where == "convolution":
        layer.self_attn_dropout = nn.Conv1d(len(LENGTHS), len(LENGTHS), 3, padding=1).double()
    elif where == "norm":
        layer.conv_module.sequential[4] = nn.LayerNorm(T).double()
    elif where == "nested":
        layer.conv_module.sequential[2] = nn.Sequential(layer.conv_module.sequential[2])
    elif where == "padding":
        layer.conv_module.sequential[2].padding_mode = "reflect"
    elif where == "attention":
        layer.self_attn = nn.MultiheadAttention(D, 2, add_zero_attn=True).double().eval()
    else:
        raise AssertionError(where)


MUTATIONS = ("nested", "convolution", "hook", "backward hook", "method", "forward", "part", "norm", "padding", "attention")


@each_way
@pytest.mark.parametrize("where", MUTATIONS)
def test_parts_that_are_not_known(where: str, way: str) -> None:
    """Before `enable` it is left alone; after it, what it gives is what its own code gives, and the record says why."""
    x, known = batch(), LENGTHS.clamp(min=3)  # to be reflected
    if where == "norm":  # of columns
        x, known = x[:2], torch.tensor([T, T - 1])
    real = torch.arange(T) < known[:, None]
    model, ours = build(), converted(build(), way)
    mutate(where, ours)
    if where == "attention":
        ours.conformer_layers[1].self_attn.load_state_dict(model.conformer_layers[1].self_attn.state_dict())
    mutate(where, model)
    if where == "attention":
        model.conformer_layers[1].self_attn.load_state_dict(build().conformer_layers[1].self_attn.state_dict())
    if where not in ("norm", "convolution") or way == "padded":
        assert_same([ours(x, known)[0][real]], [expected(model, way, x, known)])
        assert "conformer_layers.1." in str(why(ours, x, known)) or where == "method"
    refused = pytest.raises(ArgumentError, match=r"conformer_layers\.1")
    if way == "alone":
        with refused:
            enable(model, level="model", padding_rows="alone")
    else:
        assert "conformer_layers.1" in reasons(enable(model, level="model"))[""]


@each_way
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["Conformer", "ConformerLayer", "_ConvolutionModule", "_FeedForwardModule"])
def test_code_that_is_replaced_for_all_objects(name: str, when: str, way: str) -> None:
    home = conformers.load()
    owner, x, known = getattr(home, name), batch(), LENGTHS.clamp(min=1)
    model = build(home)
    ours = converted(model, way) if when == "after" else copy.deepcopy(model)
    forward, calls = owner.forward, []

    def counted(self: Any, *args: Any) -> Any:
        calls.append(self)
        return forward(self, *args)

    owner.forward = counted
    if when == "after":
        assert_same([ours(x, known)[0][torch.arange(T) < known[:, None]]], [expected(model, way, x, known)])
        assert not {*calls}.isdisjoint(ours.modules())
    elif way == "padded":
        assert enable(ours, level="model").modules[0].action == "left alone"


def test_another_version_of_torchaudio() -> None:
    """Whose code computes something else, by the same names."""
    home = conformers.load()
    exec("def forward(self, x, padding):\n    return self._apply_convolution(x + self.ffn1(x))", vars(home))
    home.ConformerLayer.forward = home.forward
    assert "could not be packed: VarlenError: it gave other numbers" in reasons(enable(build(home), level="model"))[""]
    home = conformers.load()
    exec("def __init__(self, config): ...", vars(home))
    model = build(home)
    home.Conformer.__init__ = vars(home)["__init__"]
    assert "could not be packed: TypeError" in reasons(enable(model, level="model"))[""]


def test_subclasses() -> None:
    class Named(OURS.Conformer):  # type: ignore[misc, name-defined]
        pass

    class Other(OURS.Conformer):  # type: ignore[misc, name-defined]
        def forward(self, input: Tensor, lengths: Tensor) -> Any:
            return super().forward(input * 2, lengths)

    for cls, action in ((Named, "converted"), (Other, "left alone")):
        model = build()
        model.__class__ = cls
        assert enable(model, level="model").modules[0].action == action
        assert type(model).__name__ == cls.__name__


@each_way
@pytest.mark.filterwarnings("ignore:.torch.jit")  # by forward-mode AD of torch
def test_calls_that_run_as_they_came(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(), batch()
    ours, full = converted(model, way), torch.full((5,), T)
    assert "nothing is padded" in str(why(ours, x, full))
    assert torch.equal(ours(x, full)[0], model(x, full)[0])
    bad: dict[str, Any] = {
        "too short": LENGTHS.clamp(max=T - 1),
        "too long": LENGTHS + 1,
        "too few": LENGTHS[:3],
        "two dimensions": LENGTHS[:, None],
        "a list": LENGTHS.tolist(),
        "elsewhere": LENGTHS.to("meta"),
    }
    for name, lengths in bad.items():
        with pytest.raises(Exception) as torchs:  # noqa: PT011
            model(x, lengths)
        with pytest.raises(Exception) as got:  # noqa: PT011
            ours(x, lengths)
        assert (got.type, str(got.value)[:40]) == (torchs.type, str(torchs.value)[:40]), name
    halves = LENGTHS.clamp(min=1.0)
    if way == "alone":
        with pytest.raises(VarlenError, match="lengths must be integers"):
            ours(x, halves)
        with pytest.raises(VarlenError, match="traced"):
            torch.func.jvp(lambda x: ours(x, LENGTHS)[0], (x,), (x,))
    else:
        assert_same([ours(x, halves)[0][:3]], [(model(x, halves)[0] * REAL[..., None])[:3]])
        assert_same([ours(x, LENGTHS - 2 * (LENGTHS == 1))[0][REAL][:-1]], [model(x, LENGTHS)[0][REAL][:-1]])  # one is -1
        near = x[:2], torch.tensor([T, T - 4])  # all of that padding is within reach of some layer
        assert why(ours, *near) is None
        monkeypatch.setattr(conformer, "_PAYS", conformer._BY_WIDTH * D**2 + 1)
        assert "more time than it saves" in str(why(ours, *near))
        assert_same([ours(*near)[0][1, : T - 4]], [model(*near)[0][1, : T - 4]])
        monkeypatch.undo()
        assert "more time than it saves" in str(why(ours, x))
        assert_same([ours(x, LENGTHS)[0][REAL]], [model(x, LENGTHS)[0][REAL]])


@each_way
@pytest.mark.usefixtures("loaded")
@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
def test_compiled(way: str) -> None:
    model, x, known = build(layers=1), batch(), LENGTHS.clamp(min=1)
    ours = converted(model, way)
    real = torch.arange(T) < known[:, None]
    torch._dynamo.reset()
    for call in (torch.compile(ours, backend="eager"), torch.compile(lambda *given: ours(*given), backend="eager")):
        with torch.no_grad():
            assert_same([call(x, known)[0][real]], [expected(model, way, x, known)])
    with pytest.raises(Exception):  # noqa: B017, PT011  # not another model's numbers
        torch.jit.script(ours)
    if way == "alone":
        with pytest.raises(VarlenError, match="traced"):
            torch.jit.trace(ours, (x, known))
    torch._dynamo.reset()


@each_order
@each_way
def test_torchaudios_own(way: str, first: bool, torchaudio: Any) -> None:
    model, x, known = build(torchaudio, convolution_first=first), batch(), LENGTHS.clamp(min=1)
    ours, real = converted(model, way), torch.arange(T) < known[:, None]
    assert why(ours, x, known) is None
    got = everything(ours, lambda x: ours(x, known)[0][real], x)
    assert_same(got, everything(model, lambda x: expected(model, way, x, known), x))
