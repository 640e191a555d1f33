"""Decoders that see a source: their own tokens are rows, and those of the source by a layout of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("transformers", minversion="5.4", reason="needs transformers")

import transformers

from varlen_attn import disable, enable, record

from .test_padding_rows import assert_edges, linear_rows
from .tiny import (
    COMMON,
    NO_DROPOUT,
    assert_close,
    assert_same_gradients,
    attention_mask,
    build,
    error,
    gradients,
    quietly,
    shake,
    token_ids,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

SOURCE = (9, 4, 6, 1)
TARGETS: dict[str, tuple[tuple[int, ...], int, str]] = {
    "shorter": ((5, 3, 1, 4), 5, "right"),
    "as many columns": ((3, 9, 2, 7), 9, "right"),
    "left": ((3, 9, 2, 7), 9, "left"),
    "one without tokens": ((5, 0, 1, 4), 5, "right"),
}
FAMILIES = ("Bart", "MBart", "Marian", "Pegasus", "M2M100", "T5", "MT5", "two Berts")


def make(name: str, head: str = "Model") -> Any:
    if name != "two Berts":
        return build(name, head)
    bert = dict(model_type="bert", **COMMON, **NO_DROPOUT)
    config = transformers.EncoderDecoderConfig(encoder=bert, decoder={**bert, "is_decoder": True, "add_cross_attention": True})
    config.decoder_start_token_id, config.pad_token_id = 2, 1
    return shake(transformers.EncoderDecoderModel(config).double()).eval()


def pair(what: str = "shorter", source: tuple[int, ...] = SOURCE) -> dict[str, Tensor]:
    lengths, columns, side = TARGETS[what]
    mask, target = attention_mask("right", source), attention_mask(side, lengths, columns)
    return {
        "input_ids": token_ids(mask), "attention_mask": mask, "decoder_input_ids": token_ids(target, 1), "decoder_attention_mask": target,
    }  # fmt: skip


def valid_of(inputs: dict[str, Tensor]) -> Tensor:
    return inputs["decoder_attention_mask"].bool()


def decoder_rows(model: Any, run: Callable[[], Any]) -> set[int]:
    """How many rows the feed-forward layers of its decoder compute."""
    names = ("fc1", "wi", "wi_0", "intermediate.dense")
    return linear_rows(nn.ModuleList(m for name, m in model.get_decoder().named_modules() if name.endswith(names)), run)


@pytest.mark.parametrize("what", TARGETS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_target_runs_packed(name: str, what: str) -> None:
    model, inputs = make(name), pair(what)
    valid = valid_of(inputs)
    computed = int((valid | ~valid.any(1, keepdim=True)).sum())
    weights = torch.randn(*valid.shape, 50 if name == "two Berts" else 32, dtype=torch.float64) * valid[..., None]

    def run() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        out = model(**inputs, use_cache=False)
        found = out[0]
        return found, out.encoder_last_hidden_state, gradients(model, (found * weights).sum())

    expected = run()
    assert ("but for attention" in str(enable(model))) == (name in ("T5", "MT5"))
    assert decoder_rows(model, lambda: model(**inputs, use_cache=False)) == {computed}
    got = run()
    assert_close(got[0][valid], expected[0][valid])
    source = inputs["attention_mask"].bool()
    assert_close(got[1][source], expected[1][source])
    assert_same_gradients(got[2], expected[2])
    if what != "one without tokens":
        assert_edges(got[0], inputs["decoder_attention_mask"])


@pytest.mark.parametrize("source", [None, (9, 9, 9, 9), (9, 0, 6, 1)], ids=["no mask", "all tokens", "one without tokens"])
@pytest.mark.parametrize("name", ["Bart", "T5", "two Berts"])
def test_sources_of_every_form(name: str, source: tuple[int, ...] | None) -> None:
    model, inputs = make(name), pair("as many columns", source or SOURCE)
    if source is None:
        del inputs["attention_mask"]
    valid = valid_of(inputs)
    expected = model(**inputs, use_cache=False)[0]
    enable(model)
    for records in (False, True):  # which transformers' masks depend on
        with record(model) if records else torch.enable_grad():
            assert_close(model(**inputs, use_cache=False)[0][valid], expected[valid])
    assert decoder_rows(model, lambda: model(**inputs, use_cache=False)) == {int(valid.sum())}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["Bart", "Marian", "T5"])
def test_training_with_labels(name: str, checkpointed: bool) -> None:
    model = make(name, "MTModel" if name == "Marian" else "ForConditionalGeneration").train()
    inputs = pair()
    valid = valid_of(inputs)
    inputs["labels"] = token_ids(inputs["decoder_attention_mask"], 3).masked_fill(~valid, -100)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)
        loss = model(**inputs).loss
        return loss.detach(), gradients(model, loss)

    expected = run()
    enable(model)
    assert decoder_rows(model, lambda: model(**inputs)) == {int(valid.sum())}
    got = run()
    assert_close(got[0], expected[0])
    assert_same_gradients(got[1], expected[1])


@pytest.mark.parametrize("name", ["T5", "DebertaV2"])
def test_recomputed_after_another_forward(name: str) -> None:
    """Without hooks of layers, and by the masks that attention is given."""
    model = build(name, "EncoderModel" if name == "T5" else "Model").train()
    batches = [{"input_ids": token_ids(mask), "attention_mask": mask} for n in (SOURCE, (3, 5, 9)) for mask in [attention_mask("right", n)]]

    def run() -> list[dict[str, Tensor]]:
        losses = [model(**inputs)[0][inputs["attention_mask"].bool()].square().sum() for inputs in batches]
        return [gradients(model, loss) for loss in losses]

    expected = run()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    enable(model)
    for got, want in zip(run(), expected, strict=True):
        assert_same_gradients(got, want)


@pytest.mark.parametrize("name", ["Bart", "T5"])
def test_labels_at_padding_of_a_target(name: str) -> None:
    """A loss that counts them reads rows at padding, of the decoder alone."""
    model = make(name, "ForConditionalGeneration")
    inputs = pair("as many columns")
    inputs["labels"] = token_ids(torch.ones_like(inputs["decoder_attention_mask"]), 3)
    expected = model(**inputs).loss
    enable(model)
    assert decoder_rows(model, lambda: model(**inputs)) == {36}
    assert linear_rows(model.get_encoder(), lambda: model(**inputs)) == {int(inputs["attention_mask"].sum())}
    assert_close(model(**inputs).loss, expected)
    inputs["labels"] = inputs["labels"].masked_fill(~valid_of(inputs), -100)
    disable(model)
    expected = model(**inputs).loss
    enable(model)
    assert decoder_rows(model, lambda: model(**inputs)) == {int(valid_of(inputs).sum())}
    assert_close(model(**inputs).loss, expected)


@pytest.mark.parametrize("name", ["Bart", "Marian", "T5", "two Berts"])
def test_a_cache_of_both(name: str) -> None:
    """It holds what it did, and the next step sees it."""
    model, inputs = make(name), pair("left")
    valid, source = valid_of(inputs), inputs["attention_mask"].bool()

    def two_steps() -> list[Tensor]:
        with torch.no_grad():
            first = model(**inputs, use_cache=True)
            cache = first.past_key_values
            parts = [(cache.self_attention_cache, valid), (cache.cross_attention_cache, source)]
            kept = [x.transpose(1, 2)[mask] for part, mask in parts for layer in part.layers for x in (layer.keys, layer.values)]
            following = {
                "decoder_input_ids": torch.full((4, 1), 7),
                "decoder_attention_mask": F.pad(inputs["decoder_attention_mask"], (0, 1), value=1),
                "attention_mask": inputs["attention_mask"],
                "encoder_outputs": (first.encoder_last_hidden_state,),
            }
            second = model(**following, past_key_values=cache, use_cache=True)
        return [first[0][valid], second[0], *kept]

    expected = two_steps()
    enable(model)
    assert int(valid.sum()) in decoder_rows(model, two_steps)
    assert all(error(x, y) < 1e-10 for x, y in zip(two_steps(), expected, strict=True))


def test_a_layer_that_gives_its_attention_no_mask_of_the_source() -> None:
    """Nothing is known of it, so the decoder runs as it came."""
    options = dict(num_mel_bins=6, max_source_positions=9, max_target_positions=16, d_model=32, dropout=0.0)
    for side in ("encoder", "decoder"):
        options |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
    config = transformers.WhisperConfig(**{**COMMON, **options, "decoder_start_token_id": 2})
    model = shake(transformers.WhisperModel(config).double()).eval()
    target = attention_mask("right", (5, 3, 1, 4), 5)
    inputs = {"input_features": torch.randn(4, 6, 18, dtype=torch.float64), "decoder_attention_mask": target}
    inputs["decoder_input_ids"] = token_ids(target, 1)
    expected = model(**inputs)[0]
    quietly(model)
    assert_close(model(**inputs)[0][target.bool()], expected[target.bool()])
