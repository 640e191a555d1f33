"""`enable(model, prepack=True)`: the same numbers from weights in another format, which follow the module's own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from varlen_attn import ArgumentError, VarlenError, compare, disable, enable, enabled, record
from varlen_attn.convert import prepacking
from varlen_attn.nn import prepacked
from varlen_attn.nn.prepacked import PREPACKED, Prepacked, PrepackedLinear
from varlen_attn.testing import assert_within_budget

pytestmark = pytest.mark.skipif(not prepacked.dtypes(), reason="this build of torch has no oneDNN")
D = 16
PADDING = torch.arange(9) >= torch.tensor([9, 4, 1])[:, None]


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(prepacking, "LEAST", 0)
    monkeypatch.setattr(prepacked, "_LEAST_WORK", 0)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights of the products that ran in the blocked format."""
    seen: list[Tensor] = []
    run = Prepacked.linear

    def linear(self: Prepacked, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = run(self, x, weight, bias)
        if prepacked._can(x, weight, bias) and self.made is not None and self.made[2] is not None:
            seen.append(weight)
        return out

    monkeypatch.setattr(Prepacked, "linear", linear)
    return seen


def encoder() -> Any:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 32, batch_first=True), 2, enable_nested_tensor=False).eval()


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=50, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model: nn.Module = transformers.BertModel(config).eval()
    return model


def of_encoder(model: Any, padding: Tensor | None) -> Tensor:
    x = torch.randn(3, 9, D, generator=torch.Generator().manual_seed(1))
    out: Tensor = model(x.to(next(model.parameters()).dtype), src_key_padding_mask=padding)
    return out


def of_bert(model: Any, padding: Tensor | None) -> Tensor:
    ids = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    out: Tensor = model(ids, attention_mask=None if padding is None else (~padding).long()).last_hidden_state
    return out


HOSTS = {"encoder": (encoder, of_encoder, 8), "transformers": (bert, of_bert, 13)}
each_host = pytest.mark.parametrize(("build", "call", "weights"), HOSTS.values(), ids=HOSTS)


@each_host
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", [None, PADDING], ids=["nothing padded", "padded"])
def test_the_numbers_are_the_same(
    build: Callable[[], Any], call: Callable[..., Tensor], weights: int, dtype: torch.dtype, padding: Tensor | None, used: list[Tensor]
) -> None:
    if dtype not in prepacked.dtypes():
        pytest.skip("this CPU has no such product")
    theirs = build()
    ours = enable_copy(theirs.to(dtype))
    real = torch.ones_like(PADDING) if padding is None else ~padding
    with torch.no_grad():
        call(ours, padding)  # the second call packs
        naive, exact, out = (call(m, padding)[real] for m in (theirs, copy.deepcopy(theirs).double(), ours))
    assert len({id(w) for w in used}) == weights
    assert_within_budget(out, exact, naive)


def enable_copy(model: nn.Module) -> Any:
    made = copy.deepcopy(model)
    enable(made, prepack=True)
    return made


def test_a_weight_that_was_written_to_is_packed_again() -> None:
    def same(ours: nn.Module, theirs: nn.Module) -> None:
        of_encoder(ours, PADDING)
        torch.testing.assert_close(*(of_encoder(m, PADDING)[~PADDING] for m in (ours, theirs)))

    model, other = enable_copy(encoder()), encoder()
    with torch.no_grad():
        of_encoder(model, PADDING)
        of_encoder(model, PADDING)
        model.load_state_dict(other.state_dict())
        same(model, other)
        model.layers[0].linear1.weight.mul_(2)
        other.layers[0].linear1.weight.mul_(2)
        same(model, other)
        model.layers[0].linear1.weight = other.layers[0].linear1.weight = nn.Parameter(torch.ones(D, 32).T)
        same(model, other)


def test_a_new_weight_in_the_memory_of_an_old_one_is_packed() -> None:
    linear = nn.Linear(512, 512, bias=False)
    layer, x = nn.Sequential(linear).eval(), torch.randn(2, 512)
    enable(layer, prepack=True)
    for i in range(30):
        linear.weight = nn.Parameter(torch.randn(512, 512), requires_grad=False)
        if i % 3 == 2:
            layer(x)
            torch.testing.assert_close(layer(x), F.linear(x, linear.weight), atol=1e-3, rtol=0)


def test_a_step_of_a_fused_optimizer_is_seen() -> None:
    """It writes without being counted."""
    theirs = nn.Sequential(nn.Linear(D, 24)).eval()
    ours, x = enable_copy(theirs), torch.randn(8, D)
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
        for _ in range(2):
            with torch.no_grad():
                model(x)
                model(x)
            model(x).square().sum().backward()
            with torch.no_grad():
                model(x)
            optimizer.step()
            with torch.no_grad():
                model(x)
            optimizer.zero_grad()
    with torch.no_grad():
        ours(x)
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("bias", [torch.randn(48)[::2], torch.randn(1).expand(24), torch.randn(()), torch.randn(1), torch.randn(1, 24)])
def test_a_bias_of_any_layout(bias: Tensor) -> None:
    layer, x = nn.Linear(D, 24).eval(), torch.randn(8, D)
    model = nn.Sequential(layer)
    enable(model, prepack=True)
    layer.bias = nn.Parameter(bias)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(x), F.linear(x, layer.weight, bias))


def test_gradients_in_evaluation_are_those_of_the_model_as_it_came(used: list[Tensor]) -> None:
    theirs = encoder()
    ours = enable_copy(theirs)
    for model in (theirs, ours):
        of_encoder(model, PADDING)[~PADDING].square().sum().backward()
    assert not used
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


@each_host
def test_training_is_refused(build: Callable[[], Any], call: Callable[..., Tensor], weights: int) -> None:
    model = enable_copy(build()).train()
    with pytest.raises(VarlenError, match=r"in evaluation, because it was enabled with prepack, but"):
        call(model, PADDING)
    enable(model)
    call(model, PADDING).sum().backward()


@each_host
def test_everything_is_given_back(build: Callable[[], Any], call: Callable[..., Tensor], weights: int) -> None:
    model = build()
    before = [(type(m), set(vars(m))) for m in model.modules()]
    keys = list(model.state_dict())
    report = enable(model, prepack=True)
    assert report.modules[-1].reason.startswith(f"{weights} weights are kept in oneDNN's blocked format as well")
    assert sum(PREPACKED in vars(m) for m in model.modules()) == weights
    assert list(model.state_dict()) == keys
    kept = [vars(m).get(PREPACKED) for m in model.modules()]
    enable(model, prepack=True)
    assert [vars(m).get(PREPACKED) for m in model.modules()] == kept
    enable(model)
    assert not any(PREPACKED in vars(m) or isinstance(m, PrepackedLinear) for m in model.modules())
    enable(model, prepack=True)
    disable(model)
    assert [(type(m), set(vars(m))) for m in model.modules()] == before
    with enabled(model, prepack=True), torch.no_grad():
        call(model, PADDING)
    assert [(type(m), set(vars(m))) for m in model.modules()] == before


@each_host
def test_copies_and_pickles_pack_their_own(build: Callable[[], Any], call: Callable[..., Tensor], weights: int, used: list[Tensor]) -> None:
    model = enable_copy(build())
    with torch.no_grad():
        call(model, PADDING)
        out = call(model, PADDING)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            used.clear()
            call(other, PADDING)
            assert not used
            assert torch.equal(call(other, PADDING), out)
            assert used
            assert {id(w) for w in used} <= {id(p) for p in other.parameters()}


def test_what_is_counted_recorded_or_transformed_is_the_usual_product(used: list[Tensor]) -> None:
    linear = nn.Linear(D, 24).requires_grad_(False).eval()
    layer = nn.Sequential(linear)
    x = torch.randn(7, D)
    enable(layer, prepack=True)
    with FlopCounterMode(display=False) as flops:
        layer(x)
    assert flops.get_total_flops() == 2 * 7 * D * 24
    torch.testing.assert_close(torch.vmap(layer)(x), F.linear(x, linear.weight, linear.bias))
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).sum())(x), linear.weight.sum(0).expand(7, D))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.to("meta")(x.to("meta")).is_meta
    assert not used


@pytest.mark.parametrize("prepack", [True, torch.bfloat16])
def test_another_width_is_refused_in_the_words_of_torch(prepack: Any) -> None:
    model = nn.Sequential(nn.Linear(D, 8)).eval()
    enable(model, prepack=prepack)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(5, D))
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            model(torch.randn(5, D - 1))


def test_hooks_of_an_output_projection_are_not_called() -> None:
    """torch takes its weights, and never calls it."""
    theirs = encoder().layers[0].self_attn
    ours, x = enable_copy(theirs), torch.randn(3, 9, D)
    ours.out_proj.register_forward_hook(lambda module, args, out: out * 2)
    with torch.no_grad():
        for _ in range(2):
            out = ours(x, x, x, PADDING, need_weights=False)[0][~PADDING]
            torch.testing.assert_close(out, theirs(x, x, x, PADDING, need_weights=False)[0][~PADDING])


def test_compiled_code_has_the_usual_product(used: list[Tensor]) -> None:
    linear = nn.Linear(D, 24).requires_grad_(False).eval()
    layer = nn.Sequential(linear)
    enable(layer, prepack=True)
    x = torch.randn(7, D)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), F.linear(x, linear.weight, linear.bias))
    assert not used
    traced = torch.fx.symbolic_trace(layer)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]


def test_calls_that_take_no_time_are_the_usual_product(monkeypatch: pytest.MonkeyPatch, used: list[Tensor]) -> None:
    linear = nn.Linear(D, 24).requires_grad_(False).eval()
    layer = nn.Sequential(linear)
    enable(layer, prepack=True)
    monkeypatch.setattr(prepacked, "_LEAST_WORK", 8 * D * 24)
    assert layer(torch.randn(7, D)).shape == (7, 24)
    assert not used
    for _ in range(2):
        assert layer(torch.randn(8, D)).shape == (8, 24)
    assert len(used) == 1


def test_nothing_padded_runs_packed() -> None:
    """torch's fast path would read the weights as they came."""
    model = enable_copy(encoder())
    with record() as log, torch.no_grad():
        of_encoder(model, None)
    assert all(call.reason is None for call in log.calls)


@pytest.mark.parametrize(
    "model", [nn.Linear(D, 4).double(), nn.Linear(D, 4, device="meta"), nn.LayerNorm(D)], ids=["float64", "elsewhere", "no linear layer"]
)
def test_a_model_with_nothing_to_prepack_is_refused(model: nn.Module) -> None:
    with pytest.raises(ArgumentError, match=r"`prepack` must be False for this model, but is True: it has no nn\.Linear"):
        enable(model, prepack=True)
    assert not any(PREPACKED in vars(m) for m in model.modules())


def test_a_comparison_says_it() -> None:
    model = enable_copy(encoder())
    batch = {"src": torch.randn(3, 9, D), "src_key_padding_mask": PADDING}
    assert "prepack=True" in str(compare(model, batch))
    assert "prepack=True" in str(disable(model))
    assert "prepack=True" not in str(compare(model, batch))


@pytest.mark.skipif(torch.bfloat16 not in prepacked.dtypes(), reason="this CPU has no such product")
def test_a_comparison_says_that_rounded_products_are_not_equal() -> None:
    model = encoder()
    enable(model, prepack=torch.bfloat16)
    found = compare(model, {"src": torch.randn(3, 9, D), "src_key_padding_mask": PADDING})
    assert not found.equal
    assert "prepack=torch.bfloat16" in str(found)


@pytest.mark.parametrize("wrong", ["yes", torch.float16, 1])
def test_other_values_of_prepack_are_refused(wrong: Any) -> None:
    with pytest.raises(ArgumentError, match=f"`prepack` must be True, False or torch.bfloat16, but is {wrong!r}"):
        enable(encoder(), prepack=wrong)


# -------------------------------------------------------------------- products of rounded numbers

rounding = pytest.mark.skipif(torch.bfloat16 not in prepacked.dtypes(), reason="this CPU has no such product")


@rounding
@each_host
def test_numbers_are_rounded_in_products_only(
    build: Callable[[], Any], call: Callable[..., Tensor], weights: int, used: list[Tensor]
) -> None:
    """So the error is at most what bfloat16 throughout would have, and all calls give the same."""
    theirs = build()
    ours = copy.deepcopy(theirs)
    report = enable(ours, prepack=torch.bfloat16)
    assert report.modules[-1].reason.startswith(f"{weights} weights are kept in oneDNN's blocked format as well, rounded to torch.bfloat16")
    with torch.no_grad():
        out, again, exact = (call(m, PADDING)[~PADDING] for m in (ours, ours, theirs))
        low = call(copy.deepcopy(theirs).bfloat16(), PADDING)[~PADDING]
        assert len({id(w) for w in used}) == weights
        assert out.dtype == torch.float32
        assert torch.equal(out, again)
        assert 1e-5 < (out - exact).abs().max() < (low - exact).abs().max()
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(call(other, PADDING)[~PADDING], out)
        kept = [vars(m).get(PREPACKED) for m in ours.modules()]
        assert str(enable(ours, prepack=torch.bfloat16)) == str(report)
        assert [vars(m).get(PREPACKED) for m in ours.modules()] == kept
        assert "prepack=torch.bfloat16" in str(disable(copy.deepcopy(ours)))
        enable(ours, prepack=True)
        call(ours, PADDING)
        torch.testing.assert_close(call(ours, PADDING)[~PADDING], exact)
        disable(ours)
        torch.testing.assert_close(call(ours, PADDING)[~PADDING], exact)


@rounding
def test_rounded_weights_follow_the_modules_own() -> None:
    linear = nn.Linear(D, 24).requires_grad_(False).eval()
    layer, x = nn.Sequential(linear), torch.randn(8, D)
    enable(layer, prepack=torch.bfloat16)
    layer(x)
    linear.weight.mul_(2)
    rounded = (t.bfloat16().float() for t in (x, linear.weight, linear.bias))
    assert torch.equal(layer(x), F.linear(*rounded).bfloat16().float())


def test_rounding_is_refused_where_no_cpu_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacking, "dtypes", lambda: (torch.float32,))
    model = encoder()
    with pytest.raises(ArgumentError, match=r"must be True or False on this machine, but is torch\.bfloat16"):
        enable(model, prepack=torch.bfloat16)
    assert type(model) is nn.TransformerEncoder
