"""Wav2Vec2 and HuBERT on the durations of real recordings: small random weights, but a front end with the strides of the real ones.

The first layers are convolutions over samples, and behind them stands a convolution over frames in place of positions. These read across
time and stay padded, untouched; what is packed are the frames in the stack of layers. Slow, so that only `make real` runs this.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import varlen_attn
from varlen_attn.testing import assert_within_budget

inputs = pytest.importorskip("benchmarks.inputs", reason="the durations are not in a source distribution")

pytestmark = pytest.mark.real

LAYERS, WIDTH = 3, 48
SMALL = dict(
    hidden_size=WIDTH, num_attention_heads=4, intermediate_size=96, conv_dim=(12,) * 7, num_conv_pos_embedding_groups=4,
    hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0,
    mask_time_prob=0.0,
)  # fmt: skip
BATCHES = {"real": inputs.SPEECH[:10], "others": inputs.SPEECH[16:26]}
each_kind = pytest.mark.parametrize("kind", ["wav2vec2", "hubert"])
each_level = pytest.mark.parametrize("level", ["attention", "model"])
each_order = pytest.mark.parametrize("stable", [False, True], ids=["norm last", "norm first"])


def small(kind: str, **options: Any) -> Any:
    pytest.importorskip("transformers")
    model = inputs.speech(kind, LAYERS, **{**SMALL, **options})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():  # biases start as 0: mistakes could hide
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
    return model


def valid(model: nn.Module, batch: Any) -> Tensor:
    """Frames of the whole batch, one recording after another."""
    out: Tensor = model(**batch.inputs).last_hidden_state
    return out[batch.valid]


def test_the_batches_are_mostly_padding() -> None:
    model = small("wav2vec2")
    for durations in BATCHES.values():
        batch = inputs.waves(model, durations)
        assert batch.valid.shape[1] == (max(durations) * 16 - 80) // 320  # frames of 20 ms, the first after 25 ms
        assert batch.fill < 0.45


@each_level
@each_order
@pytest.mark.parametrize("durations", BATCHES.values(), ids=BATCHES)
@each_kind
def test_valid_frames(kind: str, durations: tuple[int, ...], stable: bool, level: Any) -> None:
    """Against every recording alone in float64."""
    model = small(kind, do_stable_layer_norm=stable)
    batch = inputs.waves(model, durations)
    exact, ours = copy.deepcopy(model).double(), copy.deepcopy(model)
    report = varlen_attn.enable(ours, level=level)
    assert len(report.converted) == LAYERS + (level == "model")
    with torch.no_grad(), varlen_attn.record(ours) as log:
        out = valid(ours, batch)
        truth = torch.cat([exact(**one).last_hidden_state[0] for one in batch.alone()])
        assert_within_budget(out, truth, valid(model, batch))
    assert len(log.calls) == LAYERS
    if level == "model":
        assert {(c.backend, c.rows, c.slots) for c in log.calls} == {("cpu", int(batch.valid.sum()), batch.valid.numel())}


@each_level
@each_kind
def test_a_group_norm_in_the_front_end(kind: str, level: Any) -> None:
    """It runs over padding too, before and after: the truth is the padded batch in float64."""
    model = small(kind, feat_extract_norm="group")
    batch = inputs.waves(model, BATCHES["real"])
    exact, ours = copy.deepcopy(model).double(), copy.deepcopy(model)
    varlen_attn.enable(ours, level=level)
    doubled = batch._replace(inputs={**batch.inputs, "input_values": batch.inputs["input_values"].double()})
    with torch.no_grad():
        assert_within_budget(valid(ours, batch), valid(exact, doubled), valid(model, batch))


@each_kind
def test_the_front_end_is_untouched(kind: str) -> None:
    """Convolutions over samples and over frames see and give what they did, to the bit; layers see frames only."""
    model = small(kind)
    batch = inputs.waves(model, BATCHES["real"])
    ours = copy.deepcopy(model)
    varlen_attn.enable(ours)
    seen = []
    for each in (model, ours):
        with torch.no_grad(), _seen(each.feature_extractor, each.feature_projection, each.encoder.pos_conv_embed) as tensors:
            valid(each, batch)
        seen.append(tensors)
        with torch.no_grad(), _seen(*(layer.feed_forward for layer in each.encoder.layers)) as rows:
            valid(each, batch)
        shape = (1, int(batch.valid.sum())) if each is ours else batch.valid.shape
        assert {x.shape[:2] for x in rows} == {shape}
    before, after = seen
    assert len(before) == len(after) == 6
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@contextmanager
def _seen(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Inputs and outputs of modules, in order."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
        found.extend(x.clone() for x in (args[0], out[0] if isinstance(out, tuple) else out))

    hooks = [module.register_forward_hook(hook) for module in modules]
    yield found
    for each in hooks:
        each.remove()


@each_level
@each_kind
def test_gradients(kind: str, level: Any) -> None:
    """Of all weights, those of the front end too."""
    model = small(kind).train()
    batch = inputs.waves(model, BATCHES["others"])
    weights = torch.randn(int(batch.valid.sum()), WIDTH, generator=torch.Generator().manual_seed(2))

    def gradients(model: nn.Module, out: Callable[[], Tensor]) -> dict[str, Tensor]:
        (out() * weights.to(next(model.parameters()).dtype)).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    exact, ours = copy.deepcopy(model).double(), copy.deepcopy(model)
    varlen_attn.enable(ours, level=level)
    truth = gradients(exact, lambda: torch.cat([exact(**one).last_hidden_state[0] for one in batch.alone()]))
    naive, out = (gradients(m, lambda m=m: valid(m, batch)) for m in (model, ours))  # type: ignore[misc]
    assert out.keys() == truth.keys()
    for name in truth:
        assert_within_budget(out[name], truth[name], naive[name], gradient=True, what=name)


@each_kind
def test_speech_recognition(kind: str) -> None:
    """A head on top: the same loss of letters and the same text."""
    import transformers

    head = {"wav2vec2": transformers.Wav2Vec2ForCTC, "hubert": transformers.HubertForCTC}[kind]
    torch.manual_seed(0)
    model = head(type(small(kind).config)(num_hidden_layers=LAYERS, feat_extract_norm="layer", vocab_size=20, **SMALL)).eval()
    batch = inputs.waves(model, BATCHES["real"])
    labels = torch.randint(1, 20, (len(batch.valid), 6))
    with torch.no_grad():
        want = model(**batch.inputs, labels=labels)
        with varlen_attn.enabled(model), varlen_attn.record() as log:
            got = model(**batch.inputs, labels=labels)
    assert {c.rows for c in log.calls} == {int(batch.valid.sum())}
    torch.testing.assert_close(got.loss, want.loss, atol=0, rtol=1e-5)
    assert torch.equal(got.logits.argmax(-1)[batch.valid], want.logits.argmax(-1)[batch.valid])


@each_kind
def test_recordings_of_one_length(kind: str) -> None:
    """Nothing is padded, with a mask that says so and without a mask."""
    model = small(kind)
    batch = inputs.waves(model, [1200] * 3)
    ours = copy.deepcopy(model)
    varlen_attn.enable(ours)
    with torch.no_grad():
        for options in (batch.inputs, {"input_values": batch.inputs["input_values"]}):
            want, got = (m(**options).last_hidden_state for m in (model, ours))
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
