"""What `enable` tries in a model's place: a clone with few layers, of which nothing belongs to the caller but the weights."""

from __future__ import annotations

import copy
import pickle
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.bert.modeling_bert import BertLayer

from varlen_attn import VarlenError, VarlenMultiheadAttention, _clone, _switch, disable, enable, enabled, record
from varlen_attn.integrations.transformers import enabling as integration
from varlen_attn.integrations.transformers import trial as hf_trial
from varlen_attn.integrations.transformers.stack import LayerHook, is_ours

from .tiny import assert_close, attention_mask, batch, build, quietly, reasons, shake, token_ids

VALID = attention_mask().bool()


def packed_calls(model: nn.Module) -> int:
    with torch.no_grad(), record() as log:
        model(**batch())
    return sum(call.rows == int(VALID.sum()) for call in log.calls)


def clone_of(model: Any) -> Any:
    return hf_trial.clone_of(model, [(stack.name, stack.layers) for stack in integration._stacks(model)])[0]


# -------------------------------------------------------------------- the clone


@pytest.mark.parametrize(
    ("name", "options", "layers"),
    [
        ("Bert", dict(num_hidden_layers=7), 2),
        ("Mistral", dict(num_hidden_layers=5), 2),
        ("ModernBert", dict(num_hidden_layers=7, global_attn_every_n_layers=3), 4),  # the first has no norm
        ("Gemma2", dict(num_hidden_layers=6, layer_types=[*["sliding_attention"] * 3, *["full_attention"] * 3]), 4),
        ("Bert", dict(num_hidden_layers=1), 1),
    ],
)
def test_a_clone_has_every_kind_of_layer(name: str, options: dict[str, Any], layers: int) -> None:
    """And the weights of the model, of which none was copied."""
    model = build(name, **options)
    made = clone_of(model)
    (stack,) = integration._stacks(made)
    assert len(stack.layers) == made.config.num_hidden_layers == layers
    assert model.config.num_hidden_layers == options["num_hidden_layers"]
    weights = {id(p) for p in model.parameters()}
    assert all(id(p) in weights or not model.get_parameter(key).any() for key, p in made.named_parameters())
    assert not {id(m) for m in model.modules()} & {id(m) for m in made.modules()}


def test_a_clone_of_a_model_with_another_last_layer_has_all_layers() -> None:
    model = build("Bert", num_hidden_layers=5)
    model.encoder.layer[4].output.LayerNorm = nn.RMSNorm(32, dtype=torch.float64)
    assert len(clone_of(model).encoder.layer) == 5


@pytest.mark.parametrize("name", [("Bert", "ForMaskedLM"), ("Bart", "ForConditionalGeneration"), ("Llama", "ForCausalLM")])
def test_a_clone_gives_numbers_for_a_few_words(name: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary takes longer than the layers. The model, whose weights it may share with its embeddings, keeps all words."""
    monkeypatch.setattr(hf_trial, "_WORDS", 12)
    model = build(*name)
    words = model.get_output_embeddings().out_features
    assert words > 12
    cloned = []
    made = hf_trial.clone_of
    monkeypatch.setattr(hf_trial, "clone_of", lambda *args: cloned.append(made(*args)) or cloned[-1])
    monkeypatch.setattr(integration, "clone_of", hf_trial.clone_of)
    assert "packed once around the stack" in str(enable(model))
    assert all(whole is False for _, _, whole in cloned), "it ran with few words, or all would have been tried"
    assert model.get_output_embeddings().weight.shape[0] == words
    assert model(**batch()).logits.shape[-1] == words


def test_zeros_are_noise_in_the_clone_only() -> None:
    model = build("Bert", num_hidden_layers=2)
    nn.init.zeros_(model.pooler.dense.bias)
    version = model.pooler.dense.bias._version
    assert clone_of(model).pooler.dense.bias.any()
    assert not model.pooler.dense.bias.any()
    assert model.pooler.dense.bias._version == version


def test_a_clone_of_attention_that_packs_is_called_by_torchs_layer() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
    layer.self_attn = VarlenMultiheadAttention(16, 2, batch_first=True)
    found = _clone.clone(layer.eval())[0]
    with record() as log, torch.no_grad():
        found(torch.randn(2, 3, 16))
    assert len(log.calls) == 1


class Skipping(transformers.BertPreTrainedModel):
    """Reads a layer that a clone with few layers does not have."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        assert len(self.bert.encoder.layer[4].attention.output.dense.weight)
        return self.bert(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def test_a_model_that_does_not_run_with_few_layers_is_tried_with_all() -> None:
    model = shake(Skipping(build("Bert", num_hidden_layers=5).config).double()).eval()
    assert reasons(enable(model)) == {}
    assert packed_calls(model) == 5


@pytest.mark.parametrize("name", ["Bert", "Llama", "T5", "Wav2Vec2"])
def test_few_layers_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than these forwards of two layers a stack, however many there are."""
    calls: list[Any] = []
    run = hf_trial.run

    def counted(model: Any, *args: Any) -> Any:
        calls.append(sum(len(stack.layers) for stack in integration._stacks(model)))
        return run(model, *args)

    monkeypatch.setattr(integration, "run", counted)
    options = dict(num_layers=6) if name == "T5" else dict(num_hidden_layers=6)
    quietly(build(name, **options))
    assert 0 < len(calls) <= (17 if name == "T5" else 14)
    assert set(calls) == {4 if name == "T5" else 2}


# -------------------------------------------------------------------- what others did to a model


def test_hooks_of_accelerate_are_not_called() -> None:
    model = build("Bert")
    expected = model(**batch())[0][VALID]
    calls: list[str] = []

    class Counting(AlignDevicesHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(type(module).__name__)
            return super().pre_forward(module, *args, **kwargs)

    for module in (model, *model.encoder.layer):
        add_hook_to_module(module, Counting(execution_device="cpu"))
    forwards = [m.forward for m in model.encoder.layer]
    assert reasons(enable(model)) == {}
    assert calls == []
    assert [m.forward for m in model.encoder.layer] == forwards
    assert packed_calls(model) == 2
    assert calls
    assert_close(model(**batch())[0][VALID].detach(), expected.detach())


@pytest.mark.parametrize("bound", [True, False])
def test_a_forward_that_was_replaced(bound: bool) -> None:
    """What is bound to its module is a clone's too; of a function nobody knows what it calls."""
    model = build("Bert")
    layer, calls = model.encoder.layer[1], [0]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += self is layer
        return type(self).forward(self, *args, **kwargs)

    layer.forward = types.MethodType(forward, layer) if bound else lambda *args, **kwargs: forward(layer, *args, **kwargs)
    report = quietly(model)
    assert calls == [0]
    reason = "not packed as a whole: it could not be tried: the forward of a BertLayer was replaced on the object"
    assert reasons(report) == ({} if bound else {"encoder.layer": reason})
    assert packed_calls(model) == (2 if bound else 0)


@pytest.fixture
def process_group() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def wrapped_in_ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", [nn.DataParallel, wrapped_in_ddp])
def test_a_model_inside_of_a_wrapper(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """The wrapper's forward is not called, and its model is packed."""
    model = wrap(build("Bert"))
    with torch.no_grad():
        expected = model(**batch())[0][VALID]
    calls: list[int] = []
    forward = model.forward
    model.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    assert reasons(enable(model)) == {}
    assert calls == []
    assert packed_calls(model) == 2
    with torch.no_grad():
        assert_close(model(**batch())[0][VALID], expected)


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_model_that_was_sharded() -> None:
    """By version 1, whose weights are parts of flat ones, its attention is ours; by version 2 it is tried with random weights."""
    expected = build("Bert")(**batch())[0][VALID].detach()
    options: dict[str, Any] = dict(auto_wrap_policy=ModuleWrapPolicy({BertLayer}), device_id=torch.device("cpu"), use_orig_params=True)
    first = FullyShardedDataParallel(build("Bert"), **options)
    second = build("Bert")
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in second.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(second, mesh=mesh)
    for model, reason in ((first, "not packed as a whole: it could not be tried: wrapped by FullyShardedDataParallel"), (second, None)):
        report = quietly(model, hooks="packed")  # those of version 2
        assert [why.startswith(str(reason)) for why in reasons(report).values()] == [True] * (reason is not None)
        assert report.converted
        for _ in range(2):
            assert_close(model(**batch())[0][VALID].detach(), expected)
        disable(model)
        assert_close(model(**batch())[0][VALID].detach(), expected)


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_a_model_that_is_sharded_afterwards() -> None:
    """Its layers get hooks that bring weights, and it gets a class that is derived from the one it has."""
    model = build("Bert", "ForMaskedLM")
    labels = token_ids(torch.ones_like(VALID).long())
    expected = model(**batch(), labels=labels).loss.detach()
    enable(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for part in (*model.bert.encoder.layer, model):
        fully_shard(part, mesh=mesh)
    for _ in range(2):
        assert packed_calls(model) == 2
        assert_close(model(**batch(), labels=labels).loss.detach(), expected)
        quietly(model)
    disable(model)
    assert packed_calls(model) == 0
    assert_close(model(**batch(), labels=labels).loss.detach(), expected)


def test_weights_that_are_elsewhere() -> None:
    model = build("Bert").to("meta")
    assert "its weights are not here" in str(quietly(model))
    accelerate.hooks.remove_hook_from_module(model)


# -------------------------------------------------------------------- what others left behind


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("left", ["implementation", "some hooks", "hooks without state", "state without hooks"])
def test_what_was_left_half_done_goes(left: str, again: bool) -> None:
    """By a version that could be broken off."""
    model = build("Bert", "ForMaskedLM", num_hidden_layers=3)
    expected = model(**batch())[0][VALID].detach()
    enable(model)
    hooks = [(m, m._forward_pre_hooks) for m in model.modules() if any(map(is_ours, m._forward_pre_hooks.values()))]
    if left != "state without hooks":
        del model._varlen_attn_state
    if left != "hooks without state":
        for module, of_module in hooks[2 if left == "some hooks" else 0 :]:
            of_module.clear()
            module._forward_hooks.clear()
    for _ in range(1 + again):
        quietly(model) if again else None
        disable(model)
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert "_varlen_attn_state" not in vars(model)
    assert torch.equal(model(**batch())[0][VALID].detach(), expected)


def test_by_hand_and_never_enabled() -> None:
    for implementation in ("sdpa", "eager"):
        model = build("Bert")
        type(model)._supports_sdpa, before = implementation == "sdpa", type(model)._supports_sdpa
        try:
            integration.register()
            model.set_attn_implementation("varlen_attn")
            disable(model)
            assert model.config._attn_implementation == implementation
        finally:
            type(model)._supports_sdpa = before


def test_a_state_that_an_earlier_version_pickled() -> None:
    model = build("Bert")
    enable(model)
    state, of_before = model._varlen_attn_state, {"": "eager", "text_config": "sdpa"}
    make, _ = state.__reduce__()
    model._varlen_attn_state = pickle.loads(pickle.dumps(make(of_before, ("encoder.layer",), False)))
    disable(model)
    assert model.config._attn_implementation == "sdpa"


def test_hooks_come_back_in_their_order() -> None:
    model = build("Bert")
    enable(model)
    layer = model.encoder.layer[0]
    layer.register_forward_pre_hook(lambda *_: None, prepend=True)
    layer.register_forward_pre_hook(lambda *_: None)
    before = list(layer._forward_pre_hooks.items())
    assert [is_ours(hook) for _, hook in before] == [False, True, False]
    with enabled(model, hooks="packed"):
        late = layer.register_forward_pre_hook(lambda *_: None)
    late.remove()
    assert list(layer._forward_pre_hooks.items()) == before
    disable(model)
    assert list(layer._forward_pre_hooks.items()) == [before[0], before[2]]


# -------------------------------------------------------------------- beside forwards in other threads


class Held:
    """A forward in another thread that stands still inside of a layer, until it may go on."""

    def __init__(self, model: Any, layer: nn.Module, **inputs: Any) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.result: Any = None

        def wait(*_: Any) -> None:
            if threading.current_thread() is self.thread:
                self.inside.set()
                assert self.go_on.wait(60)

        def run() -> None:
            try:
                with torch.no_grad():
                    self.result = model(**inputs)
            except Exception as error:
                self.result = error

        self.handle = layer.register_forward_pre_hook(wait)
        self.thread = threading.Thread(target=run)
        self.thread.start()
        assert self.inside.wait(60)

    def end(self) -> Any:
        self.go_on.set()
        self.thread.join()
        self.handle.remove()
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("level", ["attention", "model"])
@pytest.mark.parametrize("name", ["Bert", "Llama", "Mistral", "T5"])
def test_a_forward_under_way(name: str, level: Any, implementation: str) -> None:
    """It began before the model was enabled and goes on after it, or the other way round."""
    model = build(name, "EncoderModel" if name == "T5" else "Model", dtype=torch.float32)
    model.set_attn_implementation(implementation)
    (stack,) = integration._stacks(model)
    inner = next(m for m in stack.layers[1].modules() if integration._calls_interface(m))
    with torch.no_grad():
        expected = model(**batch())[0][VALID]
    held = Held(model, inner, **batch())
    report = quietly(model, level=level, hooks="packed")
    packed = "packed once around the stack" in str(report)
    assert packed is (level == "model")
    assert_close(held.end()[0][VALID], expected, 1e-4)
    held = Held(model, inner, **batch())
    disabling = threading.Thread(target=lambda: disable(model))
    disabling.start()
    deadline = time.monotonic() + 30
    while model.config._attn_implementation != implementation and time.monotonic() < deadline:
        time.sleep(0.001)
    disabling.join(0.05)
    assert disabling.is_alive() is packed, "packed rows need the hooks of all layers"
    with torch.no_grad():
        assert_close(model(**batch())[0][VALID], expected, 1e-4)  # others do not wait
    assert_close(held.end()[0][VALID], expected, 1e-4)
    disabling.join()
    assert not any(is_ours(hook) for m in model.modules() for hook in m._forward_pre_hooks.values())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_a_forward_without_padding_under_way(name: str, implementation: str) -> None:
    """It goes on after the model was disabled; ``eager`` takes no mask for a word that nothing is hidden, the future neither."""
    model = build(name, dtype=torch.float32)
    model.set_attn_implementation(implementation)
    (stack,) = integration._stacks(model)
    inner = next(m for m in stack.layers[1].modules() if integration._calls_interface(m))
    inputs = {"input_ids": token_ids(torch.ones_like(VALID).long())}
    with torch.no_grad():
        expected = model(**inputs)[0]
    quietly(model, hooks="packed")
    held = Held(model, inner, **inputs)
    disabling = threading.Thread(target=lambda: disable(model))
    disabling.start()
    deadline = time.monotonic() + 30
    while model.config._attn_implementation != implementation and time.monotonic() < deadline:
        time.sleep(0.001)
    assert_close(held.end()[0], expected, 1e-4)
    disabling.join()


def test_a_forward_that_began_before_its_wish_was_known() -> None:
    """Nobody saw that its caller wants the loss of all columns: its layers run padded, those of the next one do not."""
    model = build("Bert", "ForTokenClassification", dtype=torch.float32)
    labels = token_ids(torch.ones_like(VALID).long()) % 2
    with torch.no_grad():
        expected = model(**batch(), labels=labels).loss
    held = Held(model, model.bert.embeddings.word_embeddings, **batch(), labels=labels)
    enable(model)
    assert_close(held.end().loss, expected, 1e-4)
    assert packed_calls(model) == 2


@pytest.mark.parametrize("change", ["enable", "disable"])
def test_a_model_that_is_changed_between_two_masks(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One mask is ours and the other is not: no layer may hand rows to one that cannot take them."""
    model = build("Gemma2", dtype=torch.float32, layer_types=["full_attention", "sliding_attention"])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**batch())[0][VALID]
    wanted = integration.plan(model, "model", "leave")[1]
    steps = wanted if change == "enable" else []
    _switch.Switch(lambda: integration.found(model), [] if steps else wanted).make()
    module = sys.modules[type(model).__module__]
    make = module.create_sliding_window_causal_mask

    def between(*args: Any, **kwargs: Any) -> Any:
        """As far as the model can be changed in the middle of a step."""
        monkeypatch.setattr(module, "create_sliding_window_causal_mask", make)
        if steps:
            _switch.Switch(lambda: integration.found(model), steps).make()
        else:
            for step in reversed(integration.found(model)):
                step.restore()
                if isinstance(step, integration._Implementation):
                    break
        return make(*args, **kwargs)

    monkeypatch.setattr(module, "create_sliding_window_causal_mask", between)
    with torch.no_grad():
        got = model(**batch())[0][VALID]
    assert_close(got, expected, 1e-4)
    disable(model)


def test_a_forward_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model stays enabled, and is disabled by the next call."""
    monkeypatch.setattr(_switch, "_PATIENCE", 0.05)
    model = build("Bert")
    enable(model)
    hooks = {id(m): list(m._forward_pre_hooks.items()) for m in model.modules()}
    held = Held(model, model.encoder.layer[1].attention.self, **batch())
    with pytest.raises(VarlenError, match="still under way in another thread after 0 seconds: wait"):
        disable(model)
    held.end()
    assert {id(m): list(m._forward_pre_hooks.items()) for m in model.modules()} == hooks
    assert packed_calls(model) == 2
    disable(model)
    assert packed_calls(model) == 0


def test_inside_of_a_forward() -> None:
    model = build("Bert")
    enable(model)
    handle = model.embeddings.register_forward_hook(lambda *_: disable(model) and None)
    with pytest.raises(VarlenError, match="inside of its own forward, but that of BertModel is under way"):
        model(**batch())
    handle.remove()
    assert packed_calls(model) == 2
    with pytest.raises(ZeroDivisionError):  # is over, though its error is kept
        Failing.run(model)
    disable(model)


class Failing:
    error: Any = None

    @classmethod
    def run(cls, model: Any) -> None:
        handle = model.encoder.layer[1].register_forward_hook(lambda *_: 1 / 0)
        try:
            model(**batch())
        except ZeroDivisionError as error:
            cls.error = error
            raise
        finally:
            handle.remove()


def test_random_numbers_are_nobody_elses() -> None:
    state = torch.get_rng_state()
    x = torch.ones(3, 4)
    with _clone.Seeded() as seeded:
        first = [x.bernoulli(0.5), torch.rand(2), torch.randn(2), torch.randperm(5), torch.randint(9, (3,)), nn.functional.dropout(x)]
        assert seeded.used
    with _clone.Seeded():
        again = [x.bernoulli(0.5), torch.rand(2), torch.randn(2), torch.randperm(5), torch.randint(9, (3,)), nn.functional.dropout(x)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, again))
    with _clone.Seeded() as seeded:
        nn.Linear(4, 4)(x).sum()
    assert torch.equal(torch.get_rng_state(), state) or seeded.used


def test_copies_of_hooks_are_in_use() -> None:
    model = build("Bert")
    enable(model)
    copied = copy.deepcopy(model)
    trees = {id(h.__self__.tree) for m in copied.modules() for h in m._forward_pre_hooks.values() if isinstance(h.__self__, LayerHook)}
    assert len(trees) == 1
    disable(model)
    assert packed_calls(copied) == 2
