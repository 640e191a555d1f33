"""`enable` and its inverse on models of transformers: what is converted, what is not and why, and that nothing else ever changes."""

from __future__ import annotations

import copy
import gc
import io
import json
import os
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from transformers import StaticCache
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

import varlen_attn
from varlen_attn import ArgumentError, VarlenError, VarlenWarning, record
from varlen_attn.convert.enabling import disable, enable, enabled
from varlen_attn.convert.report import Report
from varlen_attn.data.host_lengths import HostLengths
from varlen_attn.integrations.transformers.attention import varlen_attention_forward
from varlen_attn.integrations.transformers.enabling import register
from varlen_attn.integrations.transformers.mask import VarlenMask, of_numbers, varlen_mask
from varlen_attn.integrations.transformers.stack import LayerHook, _packed, is_ours

from .tiny import COLUMNS, NO_DROPOUT, assert_close, attention_mask, batch, build, error, quietly, reasons, seq2seq, shake, token_ids

VALID = attention_mask().bool()


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def states(model: nn.Module, **more: Any) -> Tensor:
    """What the model gives at real tokens of a batch with padding on the right."""
    out: Tensor = model(**batch(**more))[0]
    return out[VALID]


def hooks(model: nn.Module) -> list[tuple[str, Any]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [(name, hook) for name, m in model.named_modules() for kind in kinds for hook in getattr(m, kind).values()]


def anatomy(model: nn.Module) -> list[Any]:
    """All objects of all modules, all entries of their dictionaries, and every attention implementation."""
    found: list[Any] = []
    for name, module in model.named_modules():
        found.append((name, id(module), type(module)))
        for key, value in vars(module).items():
            found.append((name, key, id(value)))
            if isinstance(value, dict):
                found += [(name, key, k, id(v)) for k, v in value.items()]
        if isinstance(module, transformers.PreTrainedModel):
            found.append((name, implementations(module.config)))
    return found


def implementations(config: Any) -> dict[str, Any]:
    inner = {key: implementations(getattr(config, key)) for key in config.sub_configs if getattr(config, key, None) is not None}
    return {"": config._attn_implementation, **inner}


def clip(dtype: torch.dtype = torch.float64) -> Any:
    sizes: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    text = dict(**sizes, vocab_size=50, max_position_embeddings=64, bos_token_id=2, eos_token_id=3, pad_token_id=1)
    config = transformers.CLIPConfig(text_config=text, vision_config=dict(**sizes, image_size=8, patch_size=4), projection_dim=16)
    return shake(transformers.CLIPModel(config).to(dtype)).eval()


def images(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)}


def packing(model: nn.Module) -> int:
    """How many layers of stacks pack."""
    found = (hook for m in model.modules() for hook in m._forward_pre_hooks.values())
    return sum(isinstance(getattr(hook, "__self__", None), LayerHook) for hook in found)


def packed_calls(model: nn.Module, **inputs: Any) -> int:
    """Calls of attention on rows that a whole stack handed on, where nothing at padding is computed."""
    tokens = int(inputs["attention_mask"].sum())
    with record(model) as log:
        model(**inputs)
    return sum(call.rows == tokens for call in log.calls)


# -------------------------------------------------------------------- processes


def fresh(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_nothing_is_imported_or_registered_before_a_model_is_enabled() -> None:
    """R-11, R-36."""
    out = fresh(
        """
        import sys
        import torch, varlen_attn
        from varlen_attn import enable
        enable(torch.nn.MultiheadAttention(8, 2, batch_first=True))
        print("transformers" in sys.modules, any("integrations" in name for name in sys.modules if name.startswith("varlen_attn")))
        import transformers
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        known = lambda: ["varlen_attn" in ALL_ATTENTION_FUNCTIONS.valid_keys(), "varlen_attn" in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()]
        print(known())
        import varlen_attn.integrations.transformers as ours
        print(known())
        ours.register()
        print(known())
        """
    )
    assert out == ["False False", "[False, False]", "[False, False]", "[True, True]"]


def test_a_saved_model_is_enabled_in_another_process(tmp_path: Path) -> None:
    """Where nobody has registered anything: a worker, or tomorrow."""
    for level in ("attention", "model"):
        model = build("Bert")
        enable(model, level=level)  # type: ignore[arg-type]
        torch.save((model, batch(), states(model)), tmp_path / f"{level}.pt")
    out = fresh(
        f"""
        import torch
        for level in ("attention", "model"):
            model, inputs, expected = torch.load({str(tmp_path)!r} + f"/{{level}}.pt", weights_only=False)
            got = model(**inputs)[0][inputs["attention_mask"].bool()]
            print(torch.allclose(got, expected, rtol=0, atol=1e-12), model.config._attn_implementation)
        """
    )
    assert out == ["True varlen_attn"] * 2


@pytest.mark.parametrize("version", ["5.3.0", "5.3.9.dev0", "4.57.6"])
def test_an_older_transformers_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Bert")
    before = anatomy(model)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    message = rf"`transformers` must be at least 5\.4.*but is {version}: pip install 'transformers>=5\.4'"
    with pytest.raises(ArgumentError, match=message):
        register()
    with pytest.raises(ArgumentError, match=message):
        enable(model)
    assert anatomy(model) == before


@pytest.mark.parametrize("version", ["5.4.0", "5.4.0.dev0", "5.10.1", "6.0.0rc1"])
def test_newer_ones_are_not(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    register()


# -------------------------------------------------------------------- the report


def test_the_report_has_a_row_for_every_stack_and_attention() -> None:
    model = build("Bart")
    expected = model(**seq2seq())[0]
    report = enable(model)
    rows = [(m.module, m.kind, m.action) for m in report.modules]
    assert rows[:2] == [("encoder.layers", "2 x BartEncoderLayer", "converted"), ("decoder.layers", "2 x BartDecoderLayer", "converted")]
    names = [name for name, m in model.named_modules() if type(m).__name__ == "BartAttention"]
    assert rows[2:] == [(name, "BartAttention", "converted") for name in names]
    assert report.modules[0].reason == "packed once around the stack"
    assert reasons(report) == {}
    assert json.loads(json.dumps(report.as_dict()))["modules"][0]["module"] == "encoder.layers"
    assert "packed once around the stack" in str(report)
    assert model.config._attn_implementation == "varlen_attn"
    valid = seq2seq()["decoder_attention_mask"].bool()
    assert_close(model(**seq2seq())[0][valid], expected[valid])
    assert isinstance(report, Report)


def test_level_attention_packs_no_stack() -> None:
    model = build("Llama")
    expected = states(model)
    report = enable(model, level="attention")
    assert reasons(report) == {"layers": 'not packed as a whole: level="attention" changes calls of attention only'}
    assert hooks(model) == []
    assert packed_calls(model, **batch()) == 0
    assert_close(states(model), expected)


@pytest.mark.parametrize("level", ["attention", "model"])
@pytest.mark.parametrize("name", ["Bert", "Llama", "Mistral", "ModernBert"])
def test_enabling_twice_is_enabling_once(name: str, level: Any) -> None:
    model = build(name)
    expected = states(model)
    before = anatomy(model)
    first = enable(model, level=level)
    middle = len(hooks(model))
    second = enable(model, level=level)
    assert first == second
    assert len(hooks(model)) == middle
    assert packing(model) == (2 if level == "model" else 0)
    assert middle == 0 or level == "model"
    assert_close(states(model), expected)
    disable(model)
    assert anatomy(model) == before
    assert torch.equal(states(model), expected)


def test_another_level_replaces_the_one_before() -> None:
    model = build("Bert")
    before = anatomy(model)
    for level, number in (("model", 2), ("attention", 0), ("auto", 2)):
        enable(model, level=level)  # type: ignore[arg-type]
        assert packing(model) == number
    disable(model)
    assert anatomy(model) == before


@pytest.mark.parametrize("given", [dict(level="x"), dict(level=None), dict(hooks="yes"), dict(need_weights=1)], ids=str)
def test_wrong_arguments(given: dict[str, Any]) -> None:
    model = build("Bert")
    before = anatomy(model)
    for call in (enable, enabled):
        with pytest.raises(ArgumentError, match=f"`{next(iter(given))}` must be"), _entered(call(model, **given)):
            pass
    assert anatomy(model) == before


def _entered(made: Any) -> Any:
    return made if hasattr(made, "__enter__") else pytest.fail("no error")


# -------------------------------------------------------------------- the inverse


MAKERS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "Bert": (lambda: build("Bert", "ForTokenClassification"), batch),
    "Llama": (lambda: build("Llama", "ForCausalLM"), batch),
    "T5": (lambda: build("T5", "ForConditionalGeneration"), seq2seq),
    "CLIP": (lambda: clip(torch.float32), lambda: {**batch(), **images(torch.float32)}),  # `eager` is NaN in float64
}


@pytest.mark.parametrize("level", ["attention", "model"])
@pytest.mark.parametrize("name", MAKERS)
def test_disable_is_the_exact_inverse(name: str, level: Any) -> None:
    """Every object, every hook, the implementation of every sub-configuration, and results to the bit."""
    make, inputs = MAKERS[name]
    model = make()
    if name == "CLIP":
        model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
        assert implementations(model.config) == {"": "sdpa", "text_config": {"": "eager"}, "vision_config": {"": "sdpa"}}
    before, expected = anatomy(model), dict(model(**inputs()))
    quietly(model, level=level)
    assert anatomy(model) != before
    report = disable(model)
    assert {m.action for m in report.modules} == {"restored"}
    assert anatomy(model) == before
    for key, value in model(**inputs()).items():
        if isinstance(value, Tensor):
            assert torch.equal(value, expected[key]), key
    assert disable(model).modules == ()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_implementation_that_was_set_comes_back(implementation: str) -> None:
    model = build("Bert")
    model.set_attn_implementation(implementation)
    expected = states(model)
    enable(model)
    assert_close(states(model), expected)
    disable(model)
    assert model.config._attn_implementation == implementation
    assert torch.equal(states(model), expected)


def test_one_that_was_set_up_by_hand_stays_so() -> None:
    """The two lines of the documentation, and then `enable`."""
    model = build("Bert")
    expected = states(model)
    register()
    model.set_attn_implementation("varlen_attn")
    assert_close(states(model), expected)
    with enabled(model):
        assert packed_calls(model, **batch()) == 2
        assert_close(states(model), expected)
    assert model.config._attn_implementation == "varlen_attn"
    assert hooks(model) == []


@pytest.mark.parametrize("inner_level", ["attention", "model"])
def test_enabling_a_part_of_an_enabled_model(inner_level: Any) -> None:
    """A model with a head shares its configuration with the model inside."""
    model = build("Bert", "ForMaskedLM")
    expected = model(**batch())[0][VALID]
    before = anatomy(model)
    enable(model)
    quietly(model.bert, level=inner_level)
    assert_close(model(**batch())[0][VALID], expected)
    disable(model)
    assert anatomy(model) == before
    assert torch.equal(model(**batch())[0][VALID], expected)


def test_disabling_a_part_of_an_enabled_model() -> None:
    """Both ways round, nothing is left behind."""
    model = build("Bert", "ForMaskedLM")
    expected = model(**batch())[0][VALID]
    before = anatomy(model)
    enable(model.bert)
    disable(model)
    assert anatomy(model) == before
    enable(model)
    disable(model.bert)
    assert_close(model(**batch())[0][VALID], expected)
    disable(model)
    assert anatomy(model) == before


def test_disabling_a_model_part_by_part() -> None:
    model = clip()
    before = anatomy(model)
    quietly(model)
    disable(model.text_model)
    disable(model.vision_model)
    disable(model)
    assert anatomy(model) == before


# -------------------------------------------------------------------- for the length of a block


def test_enabled_for_a_block() -> None:
    model = build("Bert")
    before, expected = anatomy(model), states(model)
    with enabled(model) as report:
        assert report.converted
        assert packed_calls(model, **batch()) == 2
        assert_close(states(model), expected)
    assert anatomy(model) == before
    assert torch.equal(states(model), expected)


def test_an_error_in_the_block() -> None:
    model = build("Bert")
    before = anatomy(model)
    with pytest.raises(ZeroDivisionError), enabled(model):
        assert len(hooks(model)) / 0
    assert anatomy(model) == before


@pytest.mark.parametrize("inner", ["attention", "model"])
@pytest.mark.parametrize("outer", ["attention", "model"])
def test_a_block_in_an_enabled_model(outer: Any, inner: Any) -> None:
    model = build("Bert")
    original = anatomy(model)
    enable(model, level=outer)
    number, calls = len(hooks(model)), packed_calls(model, **batch())
    expected = states(model)
    with enabled(model, level=inner):
        assert packing(model) == (2 if inner == "model" else 0)
    assert len(hooks(model)) == number
    assert packed_calls(model, **batch()) == calls
    assert torch.equal(states(model), expected)
    with enabled(model, level=inner), enabled(model, level=outer):
        pass
    assert len(hooks(model)) == number
    disable(model)
    assert anatomy(model) == original


def test_a_model_that_is_disabled_in_its_block() -> None:
    model = build("Bert")
    before = anatomy(model)
    with enabled(model):
        disable(model)
        assert anatomy(model) == before
    assert anatomy(model) == before


# -------------------------------------------------------------------- copies


def pickled(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
@pytest.mark.parametrize("level", ["attention", "model"])
@pytest.mark.parametrize("name", ["Bert", "Mistral"])
def test_copies_stay_enabled(name: str, level: Any, how: Callable[[nn.Module], Any]) -> None:
    """They know what they are, can be disabled, and share nothing with what they were copied from."""
    model = build(name)
    expected = states(model)
    enable(model, level=level)
    copied = how(model)
    number = packed_calls(model, **batch())
    assert packed_calls(copied, **batch()) == number == (2 if level == "model" else 0)
    assert torch.equal(states(copied), states(model))
    disable(model)
    assert packed_calls(copied, **batch()) == number
    assert copied.config._attn_implementation == "varlen_attn"
    assert packing(copied) == number
    disable(copied)
    assert hooks(copied) == []
    assert copied.config._attn_implementation == "sdpa"
    assert torch.equal(states(copied), expected)
    assert error(states(model), expected) == 0


def test_a_copy_goes_by_its_own_configuration() -> None:
    """The hook of a copy knows the copied configuration: whether layers are dropped is a question to that."""
    model = build("Bart", encoder_layerdrop=0.0)
    enable(model)
    copied = copy.deepcopy(model)
    hook = copied.encoder._varlen_attn_watch
    assert hook.config is copied.encoder.config


def test_saving_keeps_nothing_of_ours(tmp_path: Path) -> None:
    model = build("Bert")
    expected = states(model)
    enable(model)
    model.save_pretrained(tmp_path)
    assert "varlen" not in (tmp_path / "config.json").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config._attn_implementation == "sdpa"
    assert hooks(loaded) == []
    assert torch.equal(states(loaded), expected)
    assert set(model.state_dict()) == set(loaded.state_dict())
    register()
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="varlen_attn")
    assert_close(states(loaded), expected)


def test_an_enabled_model_can_be_collected() -> None:
    """No table in this process holds it."""
    model = build("Bert")
    enable(model)
    states(model)
    number = id(model.encoder.layer[0])
    del model
    gc.collect()
    assert not any(id(x) == number and isinstance(x, nn.Module) for x in gc.get_objects())


# -------------------------------------------------------------------- models of several kinds


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text = build("Bert")
        self.top = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True, dtype=torch.float64), 2)
        shake(self.top)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        hidden = self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return (self.top(hidden, src_key_padding_mask=attention_mask == 0),)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_model_of_transformers_beside_one_of_torch() -> None:
    model = Mixed().eval()
    expected, before = states(model), anatomy(model)
    report = enable(model)
    converted = {m.module: m.kind for m in report.converted}
    assert converted["text.encoder.layer"] == "2 x BertLayer"
    assert converted["text.encoder.layer.0.attention.self"] == "BertSelfAttention"
    assert converted["top"] == "TransformerEncoder"
    assert len(converted) == 3 + 5
    assert packed_calls(model, **batch()) == 4
    assert_close(states(model), expected)
    assert {m.module for m in disable(model).modules} >= {"text", "top", "top.layers.0"}
    assert anatomy(model) == before
    with enabled(model, level="attention"):
        assert_close(states(model), expected)
    assert anatomy(model) == before
    assert torch.equal(states(model), expected)


def test_parts_of_a_model_are_tried_by_themselves() -> None:
    """Text and images: the text is packed, the other has no padding and no mask."""
    model = clip()
    expected = model(**batch(), **images())
    report = enable(model)
    converted = {m.module for m in report.converted}
    assert "text_model.encoder.layers" in converted
    assert "vision_model.encoder.layers.0.self_attn" in converted
    got = model(**batch(), **images())
    for key in ("logits_per_text", "text_embeds", "image_embeds"):
        assert_close(got[key], expected[key], what=key)
    with record(model) as log:
        model(**batch(), **images())
    text = [c for c in log.calls if (c.module or "").startswith("text")]
    assert [c.rows for c in text] == [20, 20]
    assert reasons(report).keys() == {"vision_model.encoder.layers"}


def test_one_model_at_two_places_is_enabled_once() -> None:
    inner = build("Bert")
    model = nn.ModuleDict({"a": inner, "b": inner, "c": build("Llama")})
    report = enable(model)
    assert [m.module for m in report.converted if m.kind.startswith("2 x")] == ["a.encoder.layer", "c.layers"]
    assert packing(model) == 4
    disable(model)
    assert hooks(model) == []


# -------------------------------------------------------------------- left alone


OWN_CODE = {"MPNet": "MPNetAttention", "DebertaV2": "DebertaV2Attention", "WavLM": "WavLMAttention"}


@pytest.mark.parametrize("level", ["attention", "model"])
@pytest.mark.parametrize("name", OWN_CODE)
def test_attention_code_of_its_own_is_left_alone(name: str, level: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only attention is to change, and where layers are so narrow that packing them around it would cost more than it saves."""
    monkeypatch.setattr("varlen_attn.integrations.transformers.enabling._WIDE", 33)
    model = build(name)
    inputs = batch() if name != "WavLM" else {"input_values": torch.randn(3, 200, dtype=torch.float64)}
    expected, before = model(**inputs)[0], anatomy(model)
    with pytest.warns(VarlenWarning, match="nothing was converted"):
        report = enable(model, level=level)
    assert anatomy(model) == before
    assert torch.equal(model(**inputs)[0], expected)
    assert report.modules
    assert all(m.action == "left alone" for m in report.modules)
    assert any(m.reason.startswith(f"attention code of its own ({OWN_CODE[name]}") for m in report.modules)


# -------------------------------------------------------------------- attention that needs columns, in layers on rows


@torch.enable_grad()
@pytest.mark.parametrize(("name", "checkpointed"), [("MPNet", False), ("DebertaV2", False), ("DebertaV2", True), ("RoFormer", True)])
def test_layers_are_packed_around_attention_that_needs_columns(name: str, checkpointed: bool) -> None:
    model = build(name) if name != "RoFormer" else own(name, "eager", dict(NO_DROPOUT, embedding_size=32), set()).double()
    before = anatomy(model)
    if checkpointed:
        model.activation_checkpointing_enable()
        model.train()
    valid = batch()["attention_mask"].bool()

    def step() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        out = model(**batch()).last_hidden_state
        out[valid].sin().sum().backward()
        return out.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected, gradients = step()
    rows: list[int] = []
    report = enable(model, hooks="packed")
    handle = model.encoder.layer[0].intermediate.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    with record(model) as log:
        got, its = step()
    handle.remove()
    assert_close(got[valid], expected[valid])
    for a, b in zip(its, gradients, strict=True):
        assert_close(a, b)
    assert set(rows) == {int(valid.sum())}
    assert any("but for attention, which computes the padded batch" in m.reason for m in report.converted)
    assert {call.reason for call in log} == {"attention that needs columns: the layers around it compute rows"}
    disable(model)
    if not checkpointed:
        assert anatomy(model) == before


def test_masks_of_numbers_are_forgotten() -> None:
    model = build("MPNet")
    enable(model)
    model(**batch())
    gc.collect()
    assert not len(of_numbers)


def test_hidden_states_that_a_model_collects_itself_are_columns() -> None:
    model, valid = build("MPNet"), batch()["attention_mask"].bool()
    expected = model(**batch(), output_hidden_states=True)
    enable(model)
    with record(model) as log:
        got = model(**batch(), output_hidden_states=True)
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert_close(a[valid], b[valid])
    assert not len(log)


@pytest.mark.parametrize("targets", [False, True])
def test_a_model_with_position_biases_by_columns(targets: bool) -> None:
    model, inputs = build("T5", "ForConditionalGeneration"), batch()
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    inputs |= {"labels": ids} if targets else {"decoder_input_ids": ids}
    expected = model(**inputs)
    report = enable(model)
    got = model(**inputs)
    assert_close(got.encoder_last_hidden_state[valid], expected.encoder_last_hidden_state[valid])
    assert_close(got.logits, expected.logits)
    assert any(m.module == "encoder.block" and "but for attention" in m.reason for m in report.converted)


def test_a_pooler_that_reads_the_last_column() -> None:
    """SigLIP's text model pools it, padding or not: the stack is not packed, and nothing changes."""
    model = build("SiglipText")
    expected = model(**batch())
    report = enable(model)
    assert reasons(report)["encoder.layers"].startswith("not packed as a whole: pooler_output differs by")
    assert hooks(model) == []
    got = model(**batch())
    assert_close(got.pooler_output, expected.pooler_output)
    assert_close(got.last_hidden_state, expected.last_hidden_state)


class MeanOfEverything(transformers.BertPreTrainedModel):
    """A user's head that forgets the mask."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(32, 3)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return {"logits": self.head(hidden.mean(1))}


class MeanOfTokens(MeanOfEverything):
    """One that does not, and takes what it needs and no more."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, return_dict: bool | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return {"logits": self.head((hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))}


def test_a_head_that_reads_padding() -> None:
    """The trial sees it, and the head goes on reading what it read."""
    model = shake(MeanOfEverything(build("Bert").config).double()).eval()
    expected = model(**batch())["logits"]
    report = enable(model)
    assert reasons(report)["bert.encoder.layer"].startswith("not packed as a whole: logits differs by")
    assert_close(model(**batch())["logits"], expected)
    inner = enable(model.bert)  # by itself it is a good encoder, and whoever asks for that gets it
    assert "packed once around the stack" in str(inner)


def test_a_head_that_reads_tokens_only() -> None:
    model = shake(MeanOfTokens(build("Bert").config).double()).eval()
    expected = model(**batch())["logits"]
    report = enable(model)
    assert reasons(report) == {}
    assert packed_calls(model, **batch()) == 2
    assert_close(model(**batch())["logits"], expected)


def test_a_head_that_is_zero_at_first() -> None:
    """Nothing that it reads shows in a trial, until it has been trained for a step."""
    model = shake(MeanOfEverything(build("Bert").config).double()).eval()
    nn.init.zeros_(model.head.weight)
    enable(model)
    assert not model.head.weight.any()
    nn.init.eye_(model.head.weight)
    got = model(**batch())["logits"]
    disable(model)
    assert_close(got, model(**batch())["logits"])


class Gated(MeanOfEverything):
    """Adds what it makes of all columns by a gate that opens in training."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return {"logits": self.head(hidden + self.gate * hidden.mean(1, keepdim=True))}


def test_a_gate_that_is_closed_at_first() -> None:
    model = shake(Gated(build("Bert").config).double()).eval()
    nn.init.zeros_(model.gate)
    quietly(model)
    assert not model.gate
    nn.init.ones_(model.gate)
    got = model(**batch())["logits"]
    disable(model)
    assert_close(got[VALID], model(**batch())["logits"][VALID])


def test_a_head_that_looks_at_ids() -> None:
    """Language models classify by the last token whose id is not that of padding: with other ids there, by a row of padding."""
    model = build("Llama", "ForSequenceClassification", num_labels=3)
    usual, odd = batch(), {**batch(), "input_ids": token_ids(torch.ones(4, COLUMNS))}
    expected = [model(**inputs).logits for inputs in (usual, odd)]
    assert error(*expected) > 0.1
    enable(model)
    for inputs, logits in zip((usual, odd, usual), (*expected, expected[0]), strict=True):
        assert_close(model(**inputs).logits, logits)
    assert [packed_calls(model, **inputs) for inputs in (usual, odd, usual)] == [2, 0, 2]
    assert packed_calls(copy.deepcopy(model), **usual) == 2
    disable(model)
    assert hooks(model) == []


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_forward_that_is_broken_off(kind: type[BaseException]) -> None:
    """What it was asked for is not remembered for the next one. In a thread of its own, so that no other test finds it if it is."""
    model, other = build("Llama", "ForSequenceClassification", num_labels=3), build("Bert")
    enable(model)
    enable(other)
    odd = {**batch(), "input_ids": token_ids(torch.ones(4, COLUMNS))}
    found: list[Any] = []

    def stop(*_: Any) -> None:
        raise kind

    def work() -> None:
        handle = model.model.norm.register_forward_hook(stop)
        try:
            model(**odd)
        except kind as error:
            found.append(type(error))
        handle.remove()
        found.extend(packed_calls(m, **batch()) for m in (other, model))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [kind, 2, 2]


WISHES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "labels at padding": (lambda: build("Llama", "ForCausalLM"), lambda: {"labels": token_ids(torch.ones(4, COLUMNS))}),
    "masked labels at padding": (lambda: build("Bert", "ForMaskedLM"), lambda: {"labels": token_ids(torch.ones(4, COLUMNS))}),
    "the last logits": (lambda: build("Llama", "ForCausalLM"), lambda: {"logits_to_keep": 2}),
}


@pytest.mark.parametrize("name", WISHES)
def test_what_a_caller_reads_at_padding_is_there(name: str) -> None:
    """The same to the last row: such a forward runs padded, the next one does not."""
    make, wish = WISHES[name]
    model = make()
    expected = model(**batch(), **wish())
    enable(model)
    got = model(**batch(), **wish())
    for key in ("loss", "logits"):
        if key in expected:
            assert_close(got[key], expected[key], what=key)
    assert packed_calls(model, **batch()) == 2


class Broken(transformers.BertModel):
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        raise RuntimeError("this model needs\nanother batch")


def test_a_model_that_can_not_be_tried() -> None:
    """Its attention is ours all the same, because ours does what `sdpa` does; its stack is not."""
    model = Broken(build("Bert").config).double()
    report = enable(model)
    reason = "not packed as a whole: it could not be tried: RuntimeError: this model needs"
    assert reasons(report) == {"encoder.layer": reason}
    assert hooks(model) == []


def test_a_compiled_model_comes_back_as_it_was() -> None:
    model = build("Bert")
    model.forward = model.forward  # what is on the object stays there
    model.compile(backend="eager")
    before = anatomy(model)
    assert reasons(enable(model)) == {}
    disable(model)
    assert anatomy(model) == before


def test_a_layer_that_is_compiled_counts() -> None:
    """One that is wrapped, so that a clone would call the layer itself."""
    model = build("Bert")
    model.encoder.layer[1] = torch.compile(model.encoder.layer[1], backend="eager")
    assert "wrapped by OptimizedModule" in reasons(enable(model))["encoder.layer"]


@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_compiled_exported_and_traced_afterwards(name: str) -> None:
    """Where nothing can be read, attention is that of `sdpa`, whatever the batch."""
    model = build(name)
    options = {"use_cache": False} if name == "Llama" else {}
    other = attention_mask(lengths=(2, 9, 5, 7))
    batches = [batch(), {"input_ids": token_ids(other, 3), "attention_mask": other}]
    expected = [model(**inputs, **options)[0] for inputs in batches]
    enable(model)

    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            out: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **options)[0]
            return out

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [
            *([torch.compile(Positional(), backend="eager")] if name == "Bert" else []),
            torch.export.export(Positional(), tuple(batch().values()), strict=False).module(),
            torch.jit.trace(Positional(), tuple(batch().values()), check_trace=False),
        ]
        for compiled in made:
            for inputs, want in zip(batches, expected, strict=True):
                valid = inputs["attention_mask"].bool()
                assert_close(compiled(*inputs.values())[valid], want[valid])


@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_layers_that_are_taken_away_or_added_afterwards(name: str) -> None:
    """The last of the stack puts the tokens back. With another last one: right, or an error, but no rows for a batch."""
    model = build(name)
    owner, attribute = (model.encoder, "layer") if name == "Bert" else (model, "layers")
    layers = getattr(owner, attribute)
    for others in (layers[:1], nn.ModuleList([*layers, layers[0]])):
        setattr(owner, attribute, others)
        expected = states(model)
        setattr(owner, attribute, layers)
        enable(model)
        setattr(owner, attribute, others)
        try:
            got = model(**batch())[0]
        except VarlenError:
            pass
        else:
            assert_close(got[VALID], expected)
        enable(model)  # decides anew
        assert_close(states(model), expected)
        disable(model)
        assert hooks(model) == []
        setattr(owner, attribute, layers)


# -------------------------------------------------------------------- hooks of users


def test_a_hook_on_a_layer_keeps_its_stack_padded() -> None:
    """It would see rows where it saw batches; ``hooks="packed"`` says that it may."""
    model = build("Bert")
    expected = states(model)
    shapes = []
    handle = model.encoder.layer[1].attention.output.dense.register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape)))
    report = enable(model)
    assert shapes == []
    assert reasons(report) == {
        "encoder.layer": "not packed as a whole: layer 1.attention.output.dense has hooks, which would see packed rows: allow it with "
        'hooks="packed"'
    }
    assert_close(states(model), expected)
    assert shapes == [(4, 9, 32)]
    assert reasons(enable(model, hooks="packed")) == {}
    assert_close(states(model), expected)
    assert shapes == [(4, 9, 32), (1, 20, 32)]
    disable(model)
    assert [hook for _, hook in hooks(model)] == [model.encoder.layer[1].attention.output.dense._forward_hooks[handle.id]]


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_of_any_kind_on_a_layer(kind: str) -> None:
    model = build("Llama")
    getattr(model.layers[0], kind)(lambda *_: None)
    assert 'layer 0 has hooks, which would see packed rows: allow it with hooks="packed"' in reasons(enable(model))["layers"]


@pytest.mark.parametrize("level", ["attention", "model"])
def test_hooks_of_users_do_not_see_the_trial(level: Any) -> None:
    """Nor do they change it, and afterwards they are where they were."""
    model = build("Bert")
    calls: list[str] = []

    def note(module: nn.Module, *_: Any) -> None:
        calls.append(type(module).__name__)

    class Listener:
        def __call__(self, module: nn.Module, *_: Any) -> None:
            calls.append("listener")

        def method(self, module: nn.Module, *_: Any) -> None:
            calls.append("method")

    for module in (model, model.embeddings, model.pooler, model.encoder):
        module.register_forward_hook(note)
        module.register_forward_pre_hook(note)
        module.register_forward_hook(Listener())
        module.register_forward_hook(Listener().method)
        module.register_forward_pre_hook(lambda m, args, kwargs: calls.append("keywords"), with_kwargs=True)
    before = hooks(model)
    enable(model, level=level)
    assert calls == []
    theirs = [hook for hook in hooks(model) if not is_ours(hook[1])]
    assert theirs == before
    states(model)
    assert len(calls) == 4 * 5
    disable(model)
    assert hooks(model) == before


def test_hooks_that_come_later_see_what_they_saw() -> None:
    """As long as they are there the stack runs as it came, and the record says why."""
    model = build("Bert")
    expected = states(model)
    enable(model)
    shapes = []
    handle = model.encoder.layer[0].register_forward_pre_hook(lambda m, args: shapes.append(tuple(args[0].shape)))
    for _ in range(2):
        with record(model) as log:
            assert_close(states(model), expected)
        assert {call.reason for call in log} == {'layer 0 has hooks, which would see packed rows: allow it with hooks="packed"'}
    handle.remove()
    assert packed_calls(model, **batch()) == 2
    model.encoder.layer[0].register_forward_pre_hook(lambda m, args: shapes.append(tuple(args[0].shape)))
    assert_close(states(model), expected)
    report = enable(model)
    assert "has hooks" in reasons(report)["encoder.layer"]
    assert not any(is_ours(hook) for _, hook in hooks(model))
    assert_close(states(model), expected)
    assert shapes == [(4, 9, 32)] * 4


LATE: dict[str, Callable[[Any, Callable[..., None]], Any]] = {
    "before": lambda layer, see: layer.register_forward_pre_hook(lambda m, args: see(args)),
    "before, with keywords": lambda layer, see: layer.register_forward_pre_hook(
        lambda m, args, kwargs: see(args, kwargs), with_kwargs=True
    ),
    "after": lambda layer, see: layer.output.dense.register_forward_hook(lambda m, args, out: see(args, out)),
    "after, of a norm": lambda layer, see: layer.output.LayerNorm.register_forward_hook(lambda m, args, out: see(args, out)),
    "gradients": lambda layer, see: layer.output.dense.register_full_backward_hook(lambda m, grads, out: see(grads, out)),
    "gradients before": lambda layer, see: layer.register_full_backward_pre_hook(lambda m, grads: see(grads)),
    "an object": lambda layer, see: layer.attention.self.query.register_forward_hook(Seeing(see)),
}


class Seeing:
    def __init__(self, see: Callable[..., None]) -> None:
        self.see = see

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        self.see(args, out)


def copied(x: Any) -> list[Tensor]:
    """As a recorder keeps it."""
    if isinstance(x, Tensor):
        return [copy.deepcopy(x.detach() if type(x) is Tensor else x)]
    return [t for y in (x.values() if isinstance(x, dict) else x) for t in copied(y)] if isinstance(x, dict | tuple | list) else []


@pytest.mark.parametrize("name", LATE)
@pytest.mark.parametrize("level", ["attention", "model"])
def test_a_hook_sees_the_same_before_and_after(name: str, level: Any) -> None:
    """Of gradients what padding gets is not compared: nobody reads it."""
    model = build("Bert")

    def seen() -> list[Tensor]:
        found: list[Tensor] = []
        handle = LATE[name](model.encoder.layer[1], lambda *given: found.extend(copied(given)))
        with torch.enable_grad():
            model(**batch())[0][VALID].sin().sum().backward()
        handle.remove()
        return found

    expected = seen()
    enable(model, level=level)
    got = seen()
    assert [(type(x), x.shape, x.dtype) for x in got] == [(type(x), x.shape, x.dtype) for x in expected]
    assert expected
    for a, b in zip(got, expected, strict=True):
        if a.dtype == torch.bool:
            assert torch.equal(a, b)
        else:
            assert_close(a[VALID], b[VALID])
    assert packed_calls(model, **batch()) == (2 if level == "model" else 0)


def test_late_hooks_that_see_rows_all_the_same() -> None:
    """By order, and those that only bring a weight."""
    model = build("Bert")
    expected = states(model)
    enable(model, hooks="packed")
    shapes = []
    model.encoder.layer[1].register_forward_pre_hook(lambda m, args: shapes.append(tuple(args[0].shape)))
    assert_close(states(model), expected)
    assert packed_calls(copy.deepcopy(model), **batch()) == 2
    assert shapes == [(1, 20, 32)] * 2
    model = build("Bert")
    enable(model)
    prune.l1_unstructured(model.encoder.layer[0].output.dense, "weight", 0.1)
    assert packed_calls(model, **batch()) == 2


# -------------------------------------------------------------------- without a trace


@pytest.mark.parametrize("level", ["attention", "model"])
@pytest.mark.parametrize("name", ["Bert", "Llama", "T5", "Wav2Vec2"])
def test_enable_leaves_random_states_and_training_flags(name: str, level: Any) -> None:
    dropout = {"Bert": dict(hidden_dropout_prob=0.1), "Llama": dict(attention_dropout=0.1), "T5": dict(dropout_rate=0.1)}
    model = build(name, **dropout.get(name, dict(layerdrop=0.1, mask_time_prob=0.2)))
    model.train()
    parts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    for part in parts[::2]:
        part.eval()
    flags = [m.training for m in model.modules()]
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with torch.enable_grad():
        enable(model, level=level)
        assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    disable(model)
    assert [m.training for m in model.modules()] == flags


def test_a_failing_trial_leaves_no_trace_either() -> None:
    class Failing(transformers.BertModel):
        def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
            if any(is_ours(hook) for _, hook in hooks(self)):
                raise ValueError("not like this")
            return super().forward(input_ids, attention_mask, **kwargs)

    model = shake(Failing(build("Bert").config).double()).train()
    before = torch.get_rng_state()
    report = enable(model)
    assert reasons(report) == {"encoder.layer": "not packed as a whole: a trial failed: ValueError: not like this"}
    assert torch.equal(torch.get_rng_state(), before)
    assert all(m.training for m in model.modules())
    assert hooks(model) == []


def test_enable_in_inference_mode_and_under_autocast() -> None:
    expected = states(build("Bert"))
    for mode in (torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        model = build("Bert")
        with mode:
            enable(model)
        assert packed_calls(model, **batch()) == 2
        assert_close(states(model), expected)
    with torch.enable_grad():
        model(**batch())[0][VALID].square().sum().backward()
    assert model.encoder.layer[0].attention.self.query.weight.grad is not None


# -------------------------------------------------------------------- where a stack runs padded for once


def reason_of(model: nn.Module, inputs: dict[str, Any], **options: Any) -> str:
    with record(model) as log:
        model(**inputs, **options)
    assert all(call.rows != int(inputs["attention_mask"].sum()) for call in log.calls)
    return " ".join(sorted({call.reason or "" for call in log.calls}))


def test_layers_that_are_dropped_at_random() -> None:
    """In training; in evaluation nothing is dropped, and the stack is packed."""
    model = build("Bart", encoder_layerdrop=0.5, decoder_layerdrop=0.5)
    expected = {}
    for training in (True, False):
        model.train(training)
        torch.manual_seed(2)
        expected[training] = model(**seq2seq())[0]
    report = enable(model)
    assert "encoder.layers" not in reasons(report)
    valid = seq2seq()["decoder_attention_mask"].bool()
    for seed in range(2, 5):
        for training in (True, False):
            model.train(training)
            torch.manual_seed(seed)
            got = model(**seq2seq())[0]
            if seed == 2:
                assert_close(got[valid], expected[training][valid])
    model.encoder.train()
    torch.manual_seed(2)
    assert "layers are skipped at random in training (layerdrop)" in reason_of(model.encoder, batch())


@pytest.mark.parametrize("level", ["attention", "model"])
@pytest.mark.parametrize("name", ["Bert", "Llama", "ModernBert", "Mistral"])
def test_hidden_states_of_every_layer(name: str, level: Any) -> None:
    """Padded, as many as before, and the same at real tokens; and again after other forwards."""
    model = build(name)
    expected = model(**batch(), output_hidden_states=True)
    enable(model, level=level)
    for _ in range(2):
        got = model(**batch(), output_hidden_states=True)
        assert len(got.hidden_states) == len(expected.hidden_states) == 3
        for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
            assert a.shape == b.shape == (4, COLUMNS, 32)
            assert_close(a[VALID], b[VALID])
        assert_close(got.last_hidden_state[VALID], expected.last_hidden_state[VALID])
        assert packed_calls(model, **batch()) == (2 if level == "model" else 0)
    disable(model)
    for a, b in zip(model(**batch(), output_hidden_states=True).hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(a, b)


def test_hidden_states_beside_hooks_of_users() -> None:
    """transformers collects them with hooks that it installs when it is first asked: the trial must not be that first time."""
    expected = build("Bert")(**batch(), output_hidden_states=True).hidden_states
    model = build("Bert")
    model.encoder.layer[0].register_forward_hook(lambda *_: None)
    for given in ("leave", "packed"):
        enable(model, hooks=given)  # type: ignore[arg-type]
        got = model(**batch(), output_hidden_states=True).hidden_states
        assert len(got) == 3
        for a, b in zip(got, expected, strict=True):
            assert_close(a[VALID], b[VALID])
        disable(model)
        assert len(model(**batch(), output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["Bert", "Llama", "Mistral"])
def test_attention_weights_of_every_layer(name: str, side: str) -> None:
    """R-46: those of `eager`, which `sdpa` does not have, and the result is what it was."""
    model = build(name, dtype=torch.float32)  # their eager softmax is in float32
    model.set_attn_implementation("eager")
    inputs = batch(side)
    valid = inputs["attention_mask"].bool()
    expected = model(**inputs, output_attentions=True)
    model.set_attn_implementation("sdpa")
    enable(model)
    got = model(**inputs, output_attentions=True)
    assert len(got.attentions) == len(expected.attentions) == 2
    for a, b in zip(got.attentions, expected.attentions, strict=True):
        assert a.shape == b.shape == (4, 4, COLUMNS, COLUMNS)
        rows = valid[:, None, :, None].expand_as(a)
        assert_close(a[rows], b[rows], 1e-5)
        assert_close(a.sum(-1).transpose(1, 2)[valid], torch.ones(int(valid.sum()), 4), 1e-5)
    plain = model(**inputs)
    assert_close(got.last_hidden_state[valid], plain.last_hidden_state[valid], 1e-5)


def test_attention_weights_of_an_encoder_and_its_decoder() -> None:
    model = build("Bart")
    model.set_attn_implementation("eager")
    expected = model(**seq2seq(), output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    enable(model)
    got = model(**seq2seq(), output_attentions=True, output_hidden_states=True)
    valid = {"encoder": seq2seq()["attention_mask"].bool(), "decoder": seq2seq()["decoder_attention_mask"].bool()}
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        rows = valid["encoder" if name == "encoder_attentions" else "decoder"]
        assert len(got[name]) == len(expected[name]) == 2
        for a, b in zip(got[name], expected[name], strict=True):
            assert a.shape == b.shape
            assert_close(a.transpose(1, 2)[rows], b.transpose(1, 2)[rows], what=name)
    for name in ("encoder_hidden_states", "decoder_hidden_states"):
        rows = valid[name.split("_")[0]]
        for a, b in zip(got[name], expected[name], strict=True):
            assert_close(a[rows], b[rows], what=name)


@pytest.mark.parametrize("size", [1, 3])
def test_a_feed_forward_in_chunks(size: int) -> None:
    """It cuts a number of columns that packed rows do not have, nor does the trial, if they are not its multiple."""
    model = build("Bert", chunk_size_feed_forward=size)
    expected = states(model)
    reason = reasons(enable(model))["encoder.layer"]
    assert "chunk_size_feed_forward cuts rows of a fixed number" in reason if size == 1 else "it could not be tried" in reason
    assert_close(states(model), expected)


@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_masks_of_four_dimensions(name: str, form: str) -> None:
    """They are the caller's, and every row counts."""
    model = build(name)
    visible = torch.rand(4, 1, COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(0)) < 0.7
    visible = visible | torch.eye(COLUMNS, dtype=torch.bool)
    mask = visible if form == "bool" else torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -1e4)
    inputs = {"input_ids": token_ids(torch.ones(4, COLUMNS)), "attention_mask": mask}
    expected = model(**inputs)[0]
    enable(model)
    assert_close(model(**inputs)[0], expected)


@pytest.mark.parametrize(
    "form", ["no mask", "all ones", "one row", "one column", "an empty row", "all empty", "bool", "float", "host lengths"]
)
@pytest.mark.parametrize("name", ["Bert", "Llama", "Mistral", "ModernBert"])
def test_masks_of_every_form(name: str, form: str) -> None:
    model = build(name)
    mask: Tensor | None = attention_mask()
    if form == "all ones":
        mask = torch.ones_like(VALID).long()
    elif form == "one row":
        mask = attention_mask(lengths=(4,))
    elif form == "one column":
        mask = torch.tensor([[1], [1]])
    elif form == "an empty row":
        mask = attention_mask(lengths=(9, 0, 3, 0))
    elif form == "all empty":
        mask = torch.zeros_like(VALID).long()
    elif form in ("bool", "float"):
        mask = mask.to(torch.bool if form == "bool" else torch.float32)
    elif form == "host lengths":
        mask = HostLengths.as_mask((9, 4, 6, 1), 9)
    assert mask is not None
    inputs = {"input_ids": token_ids(torch.as_tensor(mask != 0)), "attention_mask": None if form == "no mask" else mask}
    valid = torch.ones_like(mask).bool() if form == "no mask" else mask.as_subclass(Tensor).bool()
    expected = model(**inputs)[0]
    for level in ("attention", "model"):
        enable(model, level=level)  # type: ignore[arg-type]
        got = model(**inputs)[0]
        assert got.shape == expected.shape
        assert not got.isnan().any()
        assert error(got[valid], expected[valid]) < 1e-10


def test_bidirectional_attention_of_a_causal_model() -> None:
    """Whoever makes an embedding model of a language model says so in the call."""
    model = build("Llama")
    for side in ("right", "left"):
        inputs = batch(side, is_causal=False)
        valid = inputs["attention_mask"].bool()
        expected = model(**inputs)[0]
        assert error(model(**batch(side))[0][valid], expected[valid]) > 0.1
        with enabled(model):
            assert_close(model(**inputs)[0][valid], expected[valid])
            assert packed_calls(model, **inputs) == 2


def test_inputs_that_are_embedded_already() -> None:
    model = build("Llama")
    embedded = model.embed_tokens(batch()["input_ids"])
    expected = states(model)
    enable(model)
    got = model(inputs_embeds=embedded, attention_mask=attention_mask(), position_ids=torch.arange(COLUMNS)[None])[0]
    assert_close(got[VALID], expected)


@pytest.mark.parametrize("side", ["right", "left", "both", "holes"])
@pytest.mark.parametrize("name", ["Bert", "Llama", "Mistral", "ModernBert", "Bart"])
def test_padding_on_every_side(name: str, side: str) -> None:
    model = build(name)
    inputs = batch(side) if name != "Bart" else seq2seq(side)
    valid = (inputs["attention_mask"] if name != "Bart" else inputs["decoder_attention_mask"]).bool()
    expected = model(**inputs)[0]
    for level in ("attention", "model"):
        enable(model, level=level)  # type: ignore[arg-type]
        assert_close(model(**inputs)[0][valid], expected[valid])


# -------------------------------------------------------------------- caches


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2"])
def test_a_cache_that_was_filled_by_packed_rows(name: str, side: str) -> None:
    """It holds padded keys, and the next step sees what it would have seen."""
    tolerance = 1e-10 if name != "Gemma2" else 1e-4
    model = build(name, "ForCausalLM", dtype=torch.float64 if name != "Gemma2" else torch.float32)
    mask = attention_mask(side)
    following = {
        "input_ids": torch.full((4, 1), 7),
        "attention_mask": torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], 1),
        "position_ids": mask.sum(1, keepdim=True),
    }
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def two_steps() -> tuple[Any, Tensor, Any]:
        first = model(**batch(side), position_ids=positions, use_cache=True)
        shapes = [(layer.keys.shape, layer.values.shape) for layer in first.past_key_values.layers]
        length = first.past_key_values.get_seq_length(1)
        second = model(**following, past_key_values=first.past_key_values, use_cache=True)
        return (type(first.past_key_values), length, shapes), first.logits, second.logits

    expected = two_steps()
    enable(model)
    with record(model) as log:
        got = two_steps()
    assert [call.rows == int(mask.sum()) for call in log.calls] == [True, True, False, False]
    assert got[0] == expected[0]
    assert got[0][0] is DynamicCache
    assert error(got[1][mask.bool()], expected[1][mask.bool()]) < tolerance
    assert error(got[2], expected[2]) < tolerance


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_a_second_chunk_of_the_prompt(name: str) -> None:
    """Several tokens after cached ones."""
    model = build(name)
    mask = attention_mask("left")
    ids = token_ids(mask)

    def chunks() -> Tensor:
        cache = DynamicCache(config=model.config)
        outs = []
        for start, stop in ((0, 4), (4, 7), (7, 9)):
            out = model(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
            outs.append(out.last_hidden_state)
        return torch.cat(outs, 1)

    expected = chunks()
    enable(model)
    got = chunks()
    assert_close(got[mask.bool()], expected[mask.bool()])


STEPS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": dict(cache_implementation="static"),
    "beams": dict(num_beams=3),
    "without cache": dict(use_cache=False),
    "sampling": dict(do_sample=True, temperature=0.9),
    "padding on the right": {},
}


@pytest.mark.parametrize("how", STEPS)
@pytest.mark.parametrize("name", ["Llama", "Mistral", "T5", "Bart", "Gemma2", "GptOss"])
def test_generated_tokens_are_the_same(name: str, how: str) -> None:
    if how == "static" and name in ("T5", "Bart"):
        pytest.skip("transformers compiles that")
    if how == "padding on the right" and name == "Gemma2":
        pytest.skip("goes on from rows whose window holds padding only: `eager` gives these a mean of everything, we 0")
    half = name in ("Gemma2", "GptOss")  # their eager softmax is in float32 anyway
    head = "ForConditionalGeneration" if name in ("T5", "Bart") else "ForCausalLM"
    model = build(name, head, dtype=torch.float32 if half else torch.float64)
    inputs = batch("right" if how == "padding on the right" else "left")

    def tokens() -> Tensor:
        torch.manual_seed(0)
        options: dict[str, Any] = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=1, disable_compile=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out: Tensor = model.generate(**inputs, **{**options, **STEPS[how]})
        return out

    expected = tokens()
    assert len(set(expected[:, -6:].flatten().tolist())) > 2
    enable(model)
    assert torch.equal(tokens(), expected)


def contents(cache: Any, mask: Tensor) -> list[Tensor]:
    """Keys and values at tokens, layer by layer; a layer with a window has forgotten the first columns."""
    found = []
    for layer in cache.layers:
        padding = F.pad(mask.bool(), (0, max(0, layer.keys.shape[2] - mask.shape[1])))[:, -layer.keys.shape[2] :]
        found += [x.transpose(1, 2)[padding] for x in (layer.keys, layer.values)]
    return found


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2"])
def test_a_static_cache_by_hand(name: str) -> None:
    """Layers with a window hold fewer columns than the prompt has."""
    tolerance = 1e-10 if name != "Gemma2" else 1e-4
    model = build(name, "ForCausalLM", dtype=torch.float64 if name != "Gemma2" else torch.float32)
    mask = attention_mask("left")
    cache = StaticCache(config=model.config, max_cache_len=12)
    following = {
        "input_ids": torch.full((4, 1), 7),
        "attention_mask": torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], 1),
        "position_ids": mask.sum(1, keepdim=True),
    }
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def steps() -> list[Tensor]:
        first = model(**batch("left"), position_ids=positions, past_key_values=cache, use_cache=True)
        kept = [x.clone() for x in contents(cache, mask)]
        second = model(**following, past_key_values=cache, use_cache=True)
        cache.reset()
        return [first.logits[mask.bool()], second.logits, *kept]

    expected = steps()
    enable(model)
    for _ in range(2):  # reset, it says where it is by a tensor
        with record(model) as log:
            got = steps()
        assert [call.reason for call in log.calls] == [None, None, *["a decoding step"] * 2]
        assert [call.rows for call in log.calls[:2]] == [int(mask.sum())] * 2
        assert all(error(x, y) < tolerance for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "GptOss"])
def test_generation_with_a_static_cache_packs_the_prompt(name: str) -> None:
    """Whose masks are made before the model's forward begins."""
    half = name in ("Gemma2", "GptOss")
    model = build(name, "ForCausalLM", dtype=torch.float32 if half else torch.float64)
    mask = attention_mask("left")
    options: dict[str, Any] = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, cache_implementation="static", disable_compile=True)

    def run() -> tuple[Tensor, list[Tensor]]:
        out = model.generate(**batch("left"), **options, return_dict_in_generate=True)
        return out.sequences, [x.clone() for x in contents(out.past_key_values, F.pad(mask, (0, 5), value=1))]

    expected = run()
    enable(model)
    for _ in range(2):  # with the cache of the call before
        with record(model) as log:
            got = run()
        assert [call.reason for call in log.calls[:4]] == [None, None, *["a decoding step"] * 2]
        assert [call.rows for call in log.calls[:2]] == [int(mask.sum())] * 2
        assert torch.equal(got[0], expected[0])
        assert all(error(x, y) < (1e-4 if half else 1e-10) for x, y in zip(got[1], expected[1], strict=True))


def test_masks_made_before_the_forward() -> None:
    """They know what the forward is asked for. With one that says nothing, all layers run padded."""
    model = build("Gemma2", dtype=torch.float32)
    inputs = batch("left")
    expected = model(**inputs).last_hidden_state
    enable(model)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    known = dict(config=model.config, inputs_embeds=embeds, attention_mask=inputs["attention_mask"], past_key_values=None)
    masks = {"full_attention": create_causal_mask(**known), "sliding_attention": create_sliding_window_causal_mask(**known)}
    mask = inputs["attention_mask"].bool()
    for _ in range(2):
        with record(model) as log:
            got = model(input_ids=inputs["input_ids"], attention_mask=masks).last_hidden_state
        assert log.calls[0].reason is None
        assert error(got[mask], expected[mask]) < 1e-5
    with record(model) as log:
        got = model(input_ids=inputs["input_ids"], attention_mask={**masks, "sliding_attention": masks["sliding_attention"] & True})
    assert log.calls[1].reason == "a kind of layers whose mask has a pattern that is not known"
    assert error(got.last_hidden_state[mask], expected[mask]) < 1e-5


@pytest.mark.parametrize("kind", [DynamicCache, lambda config: StaticCache(config, max_cache_len=12)], ids=["growing", "static"])
def test_an_offloaded_cache(kind: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It moves what it was given, which is by column. Its streams are those of a device, which is not needed to see that."""
    monkeypatch.setattr(torch.cuda, "default_stream", MagicMock())
    model = build("Llama")
    mask = attention_mask("left")

    def run() -> tuple[Tensor, list[Tensor]]:
        cache = kind(config=model.config)
        cache.offloading, cache.only_non_sliding, cache.prefetch_stream = True, False, MagicMock()
        if isinstance(cache, DynamicCache):
            cache.prefetch = MagicMock()  # of layers that are not there yet
        out = model(**batch("left"), past_key_values=cache, use_cache=True).last_hidden_state
        return out[mask.bool()], contents(cache, mask)

    expected = run()
    enable(model)
    with record(model) as log:
        got = run()
    assert [call.reason for call in log.calls] == [None, None]
    assert error(got[0], expected[0]) < 1e-10
    assert all(error(x, y) < 1e-10 for x, y in zip(got[1], expected[1], strict=True))


def test_a_cache_of_another_kind_names_itself() -> None:
    """What is quantised together with padding would not be the same."""
    model = build("Llama", use_cache=False)
    inputs, kind = batch("left"), type("QuantizedCache", (Cache,), {})
    expected = model(**inputs).last_hidden_state
    enable(model)
    with record(model) as log:
        got = model(**inputs, past_key_values=kind(layer_class_to_replicate=DynamicLayer), use_cache=True).last_hidden_state
    assert "`past_key_values`, a QuantizedCache, which" in str(log.calls[0].reason)
    mask = inputs["attention_mask"].bool()
    assert_close(got[mask], expected[mask])


# -------------------------------------------------------------------- what ran


def test_the_record_of_a_packed_model() -> None:
    model = build("Bert")
    enable(model)
    with record(model) as log:
        model(**batch())
    names = ["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"]
    assert [(c.module, c.rows, c.slots, c.backend) for c in log.calls] == [(name, 20, 36, "cpu") for name in names]
    assert "40 of 72 positions computed, 44% padding left out" in str(log)
    with record(model) as log:
        model(**batch("left"))
    assert [(c.module, c.rows, c.slots) for c in log.calls] == [(name, 36, 36) for name in names]
    assert all("an encoder with padding before its tokens" in (c.reason or "") for c in log.calls)
    disable(model)
    with record(model) as log:
        model(**batch())
    assert len(log) == 0


# -------------------------------------------------------------------- set up by hand


def test_an_implementation_chosen_at_construction() -> None:
    """The name in the configuration, as users of `from_pretrained` do it."""
    register()
    model = build("Bert")
    expected = states(model)
    by_name = build("Bert", attn_implementation="varlen_attn")
    assert by_name.config._attn_implementation == "varlen_attn"
    with record(by_name) as log:
        assert_close(states(by_name), expected)
    assert len(log) == 2
    assert transformers.AttentionInterface()["varlen_attn"] is varlen_attention_forward


OWN: dict[str, dict[str, Any]] = {
    "MPNet": {},
    "DebertaV2": {},
    "RoFormer": dict(embedding_size=32),
    "MegatronBert": {},
    "Canine": {},
    "Mpt": dict(d_model=32, n_heads=4, n_layers=2),
    "Longformer": dict(attention_window=4),
    "GPTJ": dict(n_embd=32, n_head=4, n_layer=2, rotary_dim=4),
    "Bloom": {},
    "VisualBert": {},
}


@pytest.mark.parametrize("name", OWN)
def test_attention_code_of_its_own_is_never_silently_wrong(name: str) -> None:
    """transformers takes any name at construction. Such a model adds its mask to scores, or fills with it: an error, or right results."""
    register()
    dropped = {key: 0.0 for key in ("hidden_dropout_prob", "attention_probs_dropout_prob") if hasattr(transformers, f"{name}Config")}
    options = {**(dropped if name not in ("GPTJ", "Bloom", "Mpt") else {}), **OWN[name]}
    renamed = {"num_hidden_layers", "num_attention_heads"} if name in ("GPTJ", "Mpt") else set()
    expected = own(name, "eager", options, renamed)(**batch())[0][VALID]
    try:
        got = own(name, "varlen_attn", options, renamed)(**batch())[0][VALID]
    except ArgumentError:
        return
    except KeyError as unknown:
        if unknown.args != ("varlen_attn",):  # GPT-J's own table has no such name
            raise
        return
    assert_close(got, expected, 1e-4)


def own(name: str, implementation: str, options: dict[str, Any], without: set[str]) -> Any:
    from .tiny import COMMON

    config_class = getattr(transformers, f"{name}Config")
    common = {k: v for k, v in COMMON.items() if k not in without}
    config = config_class(**{**common, **options})
    config._attn_implementation = implementation
    return shake(getattr(transformers, f"{name}Model")(config)).eval()


def test_the_way_by_hand_that_the_documentation_shows() -> None:
    """Two lines, and back."""
    model = build("Llama")
    expected = states(model)
    varlen_attn.integrations.transformers.enabling.register()  # type: ignore[attr-defined]
    model.set_attn_implementation("varlen_attn")
    with record(model) as log:
        assert_close(states(model), expected)
    assert len(log) == 2
    model.set_attn_implementation("sdpa")
    assert torch.equal(states(model), expected)


def test_a_user_who_sets_another_implementation_afterwards() -> None:
    """The hooks find no mask of ours, and do nothing."""
    model = build("Bert")
    expected = states(model)
    enable(model)
    model.set_attn_implementation("sdpa")
    assert torch.equal(states(model), expected)
    model.set_attn_implementation("eager")
    assert_close(states(model), expected)
    disable(model)
    assert model.config._attn_implementation == "sdpa"
    assert hooks(model) == []


# -------------------------------------------------------------------- what a stack costs


def calls_of_the_integration(model: nn.Module) -> int:
    """Python calls of a forward, comprehensions included."""
    folder, count = str(Path(varlen_attn.integrations.__file__).parent), 0  # type: ignore[attr-defined]

    def profiler(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(folder)

    with torch.no_grad():
        model(**batch(), use_cache=False)
        sys.setprofile(profiler)
        try:
            model(**batch(), use_cache=False)
        finally:
            sys.setprofile(None)
    return count


@pytest.mark.parametrize("name", ["Bert", "Llama", "ModernBert"])
def test_a_further_layer_takes_over_what_the_first_one_settled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "peft", raising=False)  # where it is loaded, every module is asked for its adapters
    counts = []
    for layers in (4, 6):
        model = build(name, num_hidden_layers=layers)
        enable(model)
        counts.append(calls_of_the_integration(model))
    assert 0 < counts[1] - counts[0] <= 2 * 8


def test_a_forward_leaves_no_mask_to_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask keeps what layers were given, but never itself."""
    model = build("Llama")
    enable(model)
    made: list[Any] = []
    init = VarlenMask.__init__

    def spy(self: VarlenMask, meaning: Any) -> None:
        made.append(weakref.ref(meaning))
        init(self, meaning)

    monkeypatch.setattr(VarlenMask, "__init__", spy)
    gc.disable()
    try:
        with torch.no_grad():
            model(**batch())
        assert len(made) == 2  # the padded one and the one of rows
        assert all(meaning() is None for meaning in made)
    finally:
        gc.enable()


def test_arguments_of_layers_are_packed_once_unless_they_may_change() -> None:
    meaning = varlen_mask(4, COLUMNS, COLUMNS, attention_mask=attention_mask().bool()).meaning  # type: ignore[union-attr]
    x, hidden = torch.randn(4, COLUMNS, 2), torch.randn(4, COLUMNS, 3)
    rows = meaning.keys.pack(hidden)[None]

    def packed(x: Any) -> Any:
        return _packed("states", x, meaning, hidden, rows)

    assert packed(x) is packed(x)
    assert packed((x, None)) is not None
    assert packed((x, None))[0] is packed(x)
    assert packed(hidden) is packed((hidden,))[0] is rows
    growing = [x]
    assert len(packed(growing)) == 1
    growing.append(x)
    assert len(packed(growing)) == 2
    weight = x.clone().requires_grad_()
    assert packed(weight) is not packed(weight)
    assert packed((weight,)) is not packed((weight,))
    assert torch.equal(packed(weight), packed(x))
