"""Every architecture of the table, with padding of every form, at both levels: what an enabled model gives is what the model gave.

The reference is the model itself with transformers' own attention, in float32 and in float64; at positions that mean something an enabled
model may have twice the reference's error, as everywhere in these tests. That the comparison can fail is tested too: by models that
lose their mask, and by models whose mask is one column off.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor, nn

import varlen_attn
from varlen_attn import LayoutWarning, SeqLayout, VarlenWarning
from varlen_attn.testing import assert_within_budget

pytest.importorskip("transformers", minversion="5.4", reason="needs transformers")

import transformers
from transformers import DataCollatorWithFlattening, PreTrainedModel

from . import table
from .architectures import ARCHITECTURES, FORMS, PAD, VOCABULARY, Case, Outcomes, outcome, padding, text, tokens

Level = Literal["attention", "model"]
LEVELS: tuple[Level, ...] = ("attention", "model")
Outputs = dict[str, Tensor]
Subject = Callable[[Mapping[str, Any]], Outputs]

pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for mismatched key_padding_mask:UserWarning",  # WavLM gives torch such masks
)

by_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
by_level = pytest.mark.parametrize("level", LEVELS)

# -------------------------------------------------------------------- running a model


def tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All float tensors of an output, with their names; caches are left out."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from tensors(value, f"{name}.{key}" if name else key)
    elif isinstance(output, tuple):
        for i, value in enumerate(output):
            yield from tensors(value, f"{name}[{i}]")


def run(model: PreTrainedModel, arguments: Mapping[str, Any]) -> Outputs:
    with torch.no_grad():
        return dict(tensors(model(**arguments)))


def in_double(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}


@functools.cache
def pristine(name: str) -> PreTrainedModel:
    return ARCHITECTURES[name].build()


@functools.cache
def pristine_double(name: str) -> PreTrainedModel:
    model = copy.deepcopy(pristine(name)).double()
    model.set_experts_implementation("eager")  # the kernel for experts does not know float64
    return model


@dataclass(frozen=True)
class Enabled:
    """A copy of a model after `enable`, and what was said about it."""

    model: PreTrainedModel
    report: varlen_attn.Report
    warned: bool


@functools.cache
def enabled(name: str, level: Level) -> Enabled:
    model = copy.deepcopy(pristine(name))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = varlen_attn.enable(model, level=level)
    return Enabled(model, report, any(issubclass(warning.category, VarlenWarning) for warning in caught))


@dataclass(frozen=True)
class Reference:
    """A batch and what the model makes of it, in float32 and in float64."""

    case: Case
    outputs: Outputs
    outputs64: Outputs  # empty where the model does not run in float64


@functools.cache
def reference(name: str, form: str) -> Reference | None:
    """What the model gives; None where the architecture has no such form, or refuses it itself."""
    case = ARCHITECTURES[name].case(pristine(name), form)
    if case is None:
        return None
    try:
        outputs = run(pristine(name), case.arguments)
    except Exception:
        return None
    try:
        outputs64 = run(pristine_double(name), in_double(case.arguments))
    except RuntimeError:
        outputs64 = {}
    return Reference(case, outputs, outputs64)


def references(name: str) -> Iterator[tuple[str, Reference]]:
    for form in FORMS:
        if (expected := reference(name, form)) is not None:
            yield form, expected


# -------------------------------------------------------------------- comparing


def meaningful(output: Tensor, case: Case) -> Tensor:
    """The part of an output that means something, by its shape: nothing, perhaps."""
    columns = case.valid.get(output.shape[1]) if output.dim() > 1 else None
    if columns is not None and columns.shape[0] == output.shape[0]:
        return output[columns]
    if output.dim() and output.shape[0] == case.rows.shape[0]:
        return output[case.rows]
    return output if bool(case.rows.all()) else output.new_empty(0)


def compare(what: str, output: Tensor, expected: Tensor, expected64: Tensor | None, *, gradient: bool = False) -> None:
    """``expected64`` is None where the model does not run in float64, and not finite where that is so for its eager attention: there
    rows without any key overflow in the softmax, which it computes in float32.
    """
    assert bool(expected.isfinite().all()), f"{what}: the reference is not finite"
    if expected64 is not None and bool(expected64.isfinite().all()):
        assert_within_budget(output, expected64.double(), expected, what=what, gradient=gradient)
        return
    error = float((output - expected).abs().max()) if output.numel() else 0.0
    allowed = 2e-5 * max(1.0, float(expected.abs().max())) if output.numel() else 0.0
    assert error <= allowed, f"{what}: error {error:.3g} is above {allowed:.3g}"


def differences(what: str, outputs: Outputs, expected: Reference) -> list[str]:
    """A line for every output that differs."""
    if outputs.keys() != expected.outputs.keys():
        return [f"{what}: outputs are {sorted(outputs)} instead of {sorted(expected.outputs)}"]
    found = []
    for name, output in outputs.items():
        naive, truth = expected.outputs[name], expected.outputs64.get(name)
        if output.shape != naive.shape or output.dtype != naive.dtype:
            found.append(f"{what}, {name}: {output.dtype} {tuple(output.shape)} instead of {naive.dtype} {tuple(naive.shape)}")
            continue
        output, naive = meaningful(output, expected.case), meaningful(naive, expected.case)
        try:
            compare(f"{what}, {name}", output, naive, None if truth is None else meaningful(truth, expected.case))
        except AssertionError as difference:
            found.append(str(difference))
    return found


def by_token(name: str, output: Tensor, case: Case) -> Tensor | None:
    """Where tokens are in an output with a row for each, that has rows at padding; None of others."""
    valid = case.valid.get(output.shape[1]) if output.dim() == 3 else None
    named = any(part in name for part in ("last_hidden_state", "hidden_states", "logits"))
    if valid is None or not named or len(valid) != len(output) or bool(valid.all()) or not bool(valid.any(1).all()):
        return None
    return valid


def rows_at_padding(what: str, outputs: Outputs, expected: Reference, packed: bool, known: bool) -> list[str]:
    """A line for every output whose rows at padding are other ones than documented: after a packed stack those of the nearest token, else
    what they were, which means something where they see a key.
    """
    found = []
    for name, output in outputs.items():
        valid, before = by_token(name, output, expected.case), expected.outputs[name]
        if valid is None:
            continue
        layout = SeqLayout.from_attention_mask(valid)
        edges = torch.allclose(output, layout.unpack(layout.pack(output), "edge"), rtol=1e-4, atol=1e-5)
        unchanged = torch.allclose(output, before, rtol=1e-4, atol=2e-5 * max(1.0, float(before.abs().max())))
        if not (edges if packed and name in ("last_hidden_state", "logits") else edges or unchanged or not known):
            found.append(f"{what}, {name}: rows at padding of a {'packed' if packed else 'padded'} run")
    return found


def matrix(name: str, subject: Subject, what: str) -> list[str]:
    """A line for every output of every form in which ``subject`` differs from the architecture ``name``."""
    found = []
    for form, expected in references(name):
        here = f"{name}, {form}, {what}"
        with warnings.catch_warnings():
            if form == "one empty row":
                warnings.simplefilter("ignore", LayoutWarning)
            try:
                outputs = subject(expected.case.arguments)
            except Exception as error:
                found.append(f"{here}: {type(error).__name__}: {error}")
                continue
        found += differences(here, outputs, expected)
    return found


# -------------------------------------------------------------------- the comparison itself


@by_architecture
def test_the_model_itself_passes(name: str) -> None:
    found = matrix(name, lambda arguments: run(pristine(name), arguments), "itself")
    assert not found, "\n".join(found)
    compared = [meaningful(x, expected.case).numel() for _, expected in references(name) for x in expected.outputs.values()]
    assert any(compared), f"{name}: nothing was compared"


def test_the_matrix_is_full() -> None:
    """What a model refuses is left out of the matrix, which must not become empty that way: 26 of 1366 cells were refused."""
    assert sum(1 for name in ARCHITECTURES for _ in references(name)) > 1300


def no_padding(mask: Tensor) -> Tensor:
    return torch.ones_like(mask)


def one_column_off(mask: Tensor) -> Tensor:
    return mask.roll(1, 1)


def one_frame_more(mask: Tensor) -> Tensor:
    return mask | mask.roll(8, 1)


TEXTS = (
    "BertModel",
    "DistilBertForQuestionAnswering",
    "ModernBertModel",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Gemma2ForCausalLM",
    "MixtralForCausalLM",
    "T5Model",
    "BartForConditionalGeneration",
    "CLIPModel",
)
RECORDINGS = ("Wav2Vec2Model, layer norm", "HubertModel")


@pytest.mark.parametrize(
    ("name", "change", "forms"),
    [
        # What stands behind a causal model's tokens is hidden without a mask.
        *((name, change, ("left", "both", "holes")) for name in TEXTS for change in (no_padding, one_column_off)),
        *((name, change, ("right",)) for name in RECORDINGS for change in (no_padding, one_frame_more)),
    ],
)
def test_a_wrong_mask_is_seen(name: str, change: Callable[[Tensor], Tensor], forms: tuple[str, ...]) -> None:
    def wrong(arguments: Mapping[str, Any]) -> Outputs:
        masks = {k: change(v) for k, v in arguments.items() if k.endswith("attention_mask") and v is not None and v.dim() == 2}
        return run(pristine(name), {**arguments, **masks})

    found = matrix(name, wrong, "wrong")
    for form in forms:
        assert any(line.startswith(f"{name}, {form}, wrong") for line in found), f"{name}, {form}: the wrong mask was not seen"


# -------------------------------------------------------------------- outputs


@by_architecture
@by_level
def test_outputs(name: str, level: Level) -> None:
    model, wrong = enabled(name, level).model, []

    def subject(arguments: Mapping[str, Any]) -> Outputs:
        with varlen_attn.record() as log:
            outputs = run(model, arguments)
        expected = next(r for _, r in references(name) if r.case.arguments is arguments)
        packed = any(call.reason is None and call.rows is not None and call.slots is not None and call.rows < call.slots for call in log)
        # Of the former only the encoder may be packed, the latter makes several frames of a row afterwards.
        packed &= ARCHITECTURES[name].kind != "encoder-decoder" and name != "SEWModel"
        wrong.extend(rows_at_padding(f"{name}, level {level}", outputs, expected, packed, sees_a_key_everywhere(name)))
        return outputs

    found = matrix(name, subject, f"level {level}") + wrong
    assert not found, "\n".join(found)


@pytest.mark.parametrize("fill", ["zero", "another token"])
def test_other_rows_at_padding_are_seen(fill: str) -> None:
    expected = reference("BertModel", "right")
    assert expected is not None
    outputs = run(enabled("BertModel", "model").model, expected.case.arguments)
    assert not rows_at_padding("", outputs, expected, True, True)
    states = outputs["last_hidden_state"]
    padding = ~expected.case.valid[states.shape[1]][..., None]
    changed = states.masked_fill(padding, 0) if fill == "zero" else torch.where(padding, states.roll(2, 1), states)
    assert rows_at_padding("", {"last_hidden_state": changed}, expected, True, True)
    assert rows_at_padding("", {"last_hidden_state": changed}, expected, False, True)


def sees_a_key_everywhere(name: str) -> bool:
    """Every row of a batch padded on the right, also at padding: in a window it might see padding alone."""
    entry = ARCHITECTURES[name]
    windows = ("sliding_window", "attention_chunk_size", "local_attention", "attention_window_size")
    return entry.inputs is text and entry.reference == "sdpa" and not any(window in entry.config for window in windows)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if sees_a_key_everywhere(name)])
def test_rows_at_padding(name: str) -> None:
    """At level "attention" they are what they were, wherever they see a key."""
    expected = reference(name, "right")
    assert expected is not None
    everywhere = {length: torch.ones_like(valid) for length, valid in expected.case.valid.items()}
    everywhere_expected = replace(expected, case=replace(expected.case, valid=everywhere))
    outputs = run(enabled(name, "attention").model, expected.case.arguments)
    found = differences(f"{name}, rows at padding", outputs, everywhere_expected)
    assert not found, "\n".join(found)


OTHER_LABELS = ("EncoderDecoderModel", "Wav2Vec2ForAudioFrameClassification", "Wav2Vec2ForXVector")  # a warning; one-hot; other classes


@functools.cache
def with_labels(name: str, form: str) -> Reference | None:
    """The same batch with labels, where the model takes some: its loss is one of the outputs."""
    expected = reference(name, form)
    takes = "labels" in inspect.signature(type(pristine(name)).forward).parameters and name not in OTHER_LABELS
    if expected is None or "logits" not in expected.outputs or not takes:
        return expected
    logits = expected.outputs["logits"]
    labels = torch.randint(logits.shape[-1], logits.shape[:-1], generator=torch.Generator().manual_seed(5))
    valid = expected.case.valid.get(labels.shape[1]) if labels.dim() > 1 else None
    if valid is not None:
        before = torch.nn.functional.pad(valid, (1, 0))[:, :-1]  # losses of shifted labels read the column before
        labels = labels.masked_fill(~(valid & before), -100)
    return replace(expected, case=replace(expected.case, arguments={**expected.case.arguments, "labels": labels}))


@pytest.mark.parametrize(("name", "form"), [(name, form) for form in ("right", "left") for name in ARCHITECTURES])
@by_level
def test_losses_and_gradients(name: str, form: str, level: Level) -> None:
    """Of all parameters, from everything that the model gives."""
    expected = with_labels(name, form)
    elsewhere = level == "attention" and form == "left" and name not in TEXTS
    if expected is None or not enabled(name, level).report.converted or elsewhere or name == "XGLMForCausalLM":  # no float64 with a mask
        pytest.skip("nothing of it is converted, or it has no such batch, or that is looked at elsewhere")

    def gradients(model: PreTrainedModel, arguments: Mapping[str, Any]) -> Outputs:
        model = copy.deepcopy(model)  # some keep the states of their last forward, whose graph could not be copied later
        generator = torch.Generator().manual_seed(3)
        loss = torch.zeros(())
        for _, output in tensors(model(**arguments)):
            part = meaningful(output, expected.case)
            loss = loss + (part * torch.randn(part.shape, generator=generator).to(part.dtype)).sum()
        named = {key: p for key, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return {"none": loss.detach(), **{key: g for key, g in zip(named, found, strict=True) if g is not None}}

    naive = gradients(pristine(name), expected.case.arguments)
    truth = gradients(pristine_double(name), in_double(expected.case.arguments))
    ours = gradients(enabled(name, level).model, expected.case.arguments)
    assert ours.keys() == naive.keys()
    for key, gradient in ours.items():
        compare(f"{name}, {form}, level {level}, gradient of {key}", gradient, naive[key], truth[key], gradient=True)


# -------------------------------------------------------------------- generation

GENERATION: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache": dict(cache_implementation="static"),
    "no cache": dict(use_cache=False),
    "beams": dict(num_beams=3),
}


def generate(model: PreTrainedModel, **options: Any) -> Tensor:
    mask = padding("left")[:3]
    arguments = dict(input_ids=tokens(mask), attention_mask=mask.long())
    return model.generate(**arguments, do_sample=False, min_new_tokens=6, max_new_tokens=6, **options)  # type: ignore[no-any-return]


@functools.cache
def generated(name: str, how: str) -> Tensor | None:
    """What the model generates; None if it refuses."""
    try:
        return generate(copy.deepcopy(pristine(name)), **GENERATION[how])
    except Exception:
        return None


@pytest.mark.parametrize("name", [name for name, entry in ARCHITECTURES.items() if entry.generates])
@by_level
def test_generation(name: str, level: Level) -> None:
    model = enabled(name, level).model
    for how, options in GENERATION.items():
        expected = generated(name, how)
        if expected is None:
            continue
        got = generate(model, **options)
        assert torch.equal(got, expected), f"{name}, {how}, level {level}: {got.tolist()} instead of {expected.tolist()}"


# -------------------------------------------------------------------- packed by the caller

DOCUMENTS = (5, 1, 9, 3)


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, VOCABULARY - 9, (length,), generator=generator) for length in DOCUMENTS]


def assert_each_document_alone(name: str, level: Level, arguments: Mapping[str, Any]) -> None:
    options = {"use_cache": False} if ARCHITECTURES[name].kind == "decoder" else {}

    def alone(model: PreTrainedModel) -> Tensor:
        return torch.cat([columns(run(model, dict(input_ids=ids[None], **options))) for ids in documents()], dim=1)

    got = columns(run(enabled(name, level).model, {**arguments, **options}))
    compare(f"{name}, packed by the caller, level {level}", got, alone(pristine(name)), alone(pristine_double(name)))


def columns(outputs: Outputs) -> Tensor:
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]


@pytest.mark.parametrize(
    "name",
    [
        "BertModel",
        "RobertaModel",
        "DistilBertModel",
        "ModernBertModel",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Gemma3ForCausalLM",
    ],
)
@by_level
def test_packed_by_the_collator(name: str, level: Level) -> None:
    start = PAD + 1 if name == "RobertaModel" else 0
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, position_ids_start=start)
    batch = collate([{"input_ids": ids} for ids in documents()], return_tensors="pt")
    del batch["labels"]
    assert {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"} < set(batch)
    assert_each_document_alone(name, level, batch)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM"])
@by_level
def test_packed_with_positions_only(name: str, level: Level) -> None:
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])
    assert_each_document_alone(name, level, dict(input_ids=torch.cat(documents())[None], position_ids=positions[None]))


# -------------------------------------------------------------------- what enable says, and the way back


def assert_unchanged(name: str, model: PreTrainedModel, what: str) -> None:
    """Bit by bit, also where nothing means anything."""
    for form, expected in references(name):
        outputs = run(model, expected.case.arguments)
        assert outputs.keys() == expected.outputs.keys(), f"{name}, {form}, {what}: other outputs"
        for key, output in outputs.items():
            same = (output == expected.outputs[key]) | (output.isnan() & expected.outputs[key].isnan())
            assert bool(same.all()), f"{name}, {form}, {what}, {key}: {int((~same).sum())} of {same.numel()} numbers are others"


@by_architecture
@by_level
def test_the_report(name: str, level: Level) -> None:
    subject = enabled(name, level)
    assert subject.report.modules, f"{name}: the report is empty"
    for row in subject.report.modules:
        assert row.action in ("converted", "left alone"), f"{name}: {row}"
        assert row.reason or row.action == "converted", f"{name}: {row} says no reason"
    nothing = not subject.report.converted
    assert subject.warned == nothing, f"{name}: a warning is due where nothing was converted, and only there: {subject.report}"
    if nothing:
        assert_unchanged(name, subject.model, "left alone")


# The least that must become of a batch padded on the right; of an architecture that is not named here, that it is packed once.
LEAST: dict[Outcomes, tuple[str, ...]] = {
    "attention": (
        # reads padded columns after its layers
        "BertForQuestionAnswering",
        "DistilBertForQuestionAnswering",
        "SiglipModel",
        "SiglipTextModel",
        "Wav2Vec2Model, adapter",
        # adds a bias to the scores
        # other layers between those that attend, or something else that mixes tokens
        "FalconH1ForCausalLM",
        "Gemma3nForCausalLM",
        "JambaForCausalLM",
        "Lfm2ForCausalLM",
        "Qwen3NextForCausalLM",
        "RecurrentGemmaForCausalLM",
        "Wav2Vec2ConformerModel, rotary",
        "Zamba2ForCausalLM",
        # masks of chunks, in some of its layers
        "Llama4ForCausalLM",
        "Llama4ForCausalLM, full attention first",
        # its layers are given more than a mask of padding
        "BartForSequenceClassification",
        "MoonshineModel",
        "WhisperModel",
    ),
    # no padding, or a mask of the model's own
    "dense": (
        "ASTModel",
        "Dinov2Model",
        "ParakeetEncoder",
        "ViTModel",
        "Wav2Vec2BertModel",
        "Wav2Vec2ConformerModel",
    ),
    # attention code of its own
    "left alone": (
        "ConvBertModel",
        "FNetModel",
        "FunnelModel",
        "LEDModel",
        "LongformerModel",
        "Mamba2ForCausalLM",
        "MambaForCausalLM",
        "NystromformerModel",
        "Speech2TextModel",
        "SqueezeBertModel",
        "XLMModel",
        "XLNetModel",
    ),
}


@by_architecture
def test_the_outcome(name: str) -> None:
    found = outcome(name)
    least: Outcomes = next((level for level, names in LEAST.items() if name in names), "packed once")
    order = get_args(Outcomes)
    assert order.index(found.level) >= order.index(least), f"{found}"
    assert found.reasons or found.level in ("packed once", "attention"), f"{found}"
    page = table.PAGE.read_text()
    assert table.row(found) in page or f"transformers {transformers.__version__}," not in page, (
        "docs/transformers.md says something else: make docs-tables"
    )


def state(model: PreTrainedModel) -> dict[str, Any]:
    """All that `enable` might change, for comparison."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = type(module), sorted(vars(module)), hooks_of(module)
        if hasattr(module, "config"):
            found[f"{name}, configuration"] = module.config.to_dict(), implementations(module.config)
    return found


def hooks_of(module: nn.Module) -> dict[str, Any]:
    return {k: list(v.items()) if isinstance(v, Mapping) else v for k, v in vars(module).items() if "_hook" in k}


def implementations(config: Any) -> dict[str, Any]:
    """Of attention, in a configuration and in those inside of it."""
    inner = {key: getattr(config, key, None) for key in config.sub_configs}
    return {"": config._attn_implementation, **{key: implementations(c) for key, c in inner.items() if c is not None}}


@by_architecture
@by_level
def test_the_way_back(name: str, level: Level) -> None:
    model = copy.deepcopy(pristine(name))
    for form, expected in references(name):  # transformers' own hooks appear when hidden states are asked for the first time
        if "hidden states" in form:
            run(model, expected.case.arguments)
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VarlenWarning)
        varlen_attn.enable(model, level=level)
        varlen_attn.disable(model)
        assert state(model) == before, f"{name}: disable leaves something behind"
        with varlen_attn.enabled(model, level=level):
            pass
        assert state(model) == before, f"{name}: enabled leaves something behind"
    assert_unchanged(name, model, "disabled")
