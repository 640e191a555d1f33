"""What only a large search found: results that read padding in ways that a glance at a model does not show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.4", reason="needs transformers")

import transformers
from transformers.modeling_outputs import SequenceClassifierOutput

from varlen_attn import enable, record

from .tiny import COMMON, assert_close, attention_mask, batch, build, quietly, reasons, shake, token_ids


def rows_and_reasons(model: nn.Module, **inputs: Any) -> tuple[bool, set[str]]:
    """Whether a call was packed, and why not."""
    with record() as log:
        model(**inputs)
    packed = any(call.rows is not None and call.slots is not None and call.rows < call.slots for call in log)
    return packed, {call.reason for call in log if call.reason}


def test_attention_that_chooses_its_keys() -> None:
    """Under another implementation's name it hands over the chosen indices, in place of a mask of them."""
    options = dict(COMMON) | dict(
        intermediate_size=48, moe_intermediate_size=16, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, index_topk=14,
        index_n_heads=2, index_head_dim=16, first_k_dense_replace=2, max_position_embeddings=128,
    )  # fmt: skip
    model = shake(transformers.DeepseekV32ForCausalLM(transformers.DeepseekV32Config(**options))).eval()
    ids = torch.randint(3, COMMON["vocab_size"], (3, 24), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids).logits
    report = quietly(model)
    assert not report.converted
    assert "indices" in next(iter(reasons(report).values()))
    assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT2"])
@pytest.mark.parametrize("labels_name", ["labels", "shift_labels"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_loss_of_a_token_that_follows_padding(name: str, labels_name: str, side: str) -> None:
    """Shifted labels: the first token of a row that is padded on the left is foretold by the last column of its padding."""
    if name == "GPT2" and labels_name == "shift_labels":
        pytest.skip("it takes none")
    model = build(name, "ForCausalLM" if name != "GPT2" else "LMHeadModel")
    inputs = batch(side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    given = {"labels": labels} | ({} if labels_name == "labels" else {labels_name: labels})
    expected = model(**inputs, **given).loss
    enable(model)
    assert_close(model(**inputs, **given).loss, expected)
    reason = "`labels` at padding or just after it that are not -100, so that a loss may count it"
    assert (reason in rows_and_reasons(model, **inputs, **given)[1]) == (side == "left")


def test_a_pooler_of_the_first_column_of_a_decoder() -> None:
    class FirstColumn(transformers.LlamaPreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model, self.head = transformers.LlamaModel(config), nn.Linear(config.hidden_size, 3)
            self.post_init()

        def forward(self, input_ids: Any = None, attention_mask: Any = None, **options: Any) -> Any:
            states = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
            return SequenceClassifierOutput(logits=self.head(states[:, 0]))

    model = shake(FirstColumn(build("Llama").config).double()).eval()
    expected = model(**batch("left")).logits
    enable(model)
    assert_close(model(**batch("left")).logits, expected)


def test_scores_of_hidden_keys_do_not_hide_a_difference() -> None:
    class Scores(transformers.BertPreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.bert = transformers.BertModel(config)
            self.post_init()

        def forward(self, input_ids: Any = None, attention_mask: Any = None, **options: Any) -> Any:
            states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
            scores = torch.einsum("bd,bsd->bs", states.mean(1), states)[:, None]
            if attention_mask is not None:
                scores = scores.masked_fill(attention_mask[:, None] == 0, torch.finfo(scores.dtype).min)
            return SequenceClassifierOutput(logits=scores)

    model = shake(Scores(build("Bert").config).double()).eval()
    inputs = batch()
    real = inputs["attention_mask"].bool()[:, None]
    expected = model(**inputs).logits
    enable(model)
    assert_close(model(**inputs).logits[real], expected[real])


@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_a_row_without_tokens_counts_in_a_loss(name: str) -> None:
    model = build(name, "ForSequenceClassification", num_labels=3)
    inputs = batch() | {"attention_mask": attention_mask("right", (9, 4, 0, 6)), "labels": torch.tensor([0, 1, 2, 0])}
    expected = model(**inputs)
    enable(model)
    got = model(**inputs)
    assert_close(got.logits, expected.logits)
    assert_close(got.loss, expected.loss)


def _lower(model: Any) -> None:
    model.config.num_hidden_layers = 1


def _replace(model: Any) -> None:
    model.layers[0] = build("Llama").layers[0]


def _insert(model: Any) -> None:
    model.layers.insert(1, build("Llama").layers[0])


@pytest.mark.parametrize("change", [_lower, _replace, _insert])
def test_layers_changed_after_enable(change: Callable[[Any], None]) -> None:
    model = build("Llama", use_cache=False)
    enable(model)
    change(model)
    got = model(**batch()).last_hidden_state
    assert not rows_and_reasons(model, **batch())[0]
    other = build("Llama", use_cache=False)
    change(other)
    other.load_state_dict(model.state_dict())
    real = batch()["attention_mask"].bool()
    assert_close(got[real], other(**batch()).last_hidden_state[real])


def test_layers_skipped_at_random_with_frozen_ones_below() -> None:
    model = build("Bart", encoder_layerdrop=0.5)
    enable(model)
    model.train()
    model.get_encoder().layers[0].eval()
    for seed in range(8):
        torch.manual_seed(seed)
        out: Tensor = model.get_encoder()(**batch()).last_hidden_state
        assert out.shape[:2] == batch()["attention_mask"].shape


def test_a_gate_that_opens_later() -> None:
    """Parameters that are 0 get noise in a trial, and are 0 afterwards."""
    model = build("Bert")
    nn.init.zeros_(model.pooler.dense.weight)
    before = {name: p.clone() for name, p in model.named_parameters()}
    enable(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_ids_at_padding_of_a_model_of_parts() -> None:
    text = dict(COMMON) | dict(num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=4, intermediate_size=48)
    vision = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4)
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=49,
        boi_token_index=48,
        eoi_token_index=47,
        num_labels=3,
    )
    model = shake(transformers.Gemma3ForSequenceClassification(config)).eval()
    inputs = dict(input_ids=token_ids(torch.ones(4, 9)).clamp(4, 40), attention_mask=attention_mask())
    expected = model(**inputs).logits
    enable(model)
    assert_close(model(**inputs).logits, expected, 1e-4)


def test_the_forward_of_a_model_is_packed_too() -> None:
    """sentence-transformers calls that, and not the model."""
    model = build("Bert")
    expected = model.forward(**batch()).last_hidden_state
    enable(model)
    with record() as log:
        got = model.forward(**batch()).last_hidden_state
    assert {call.rows for call in log} == {20}
    real = batch()["attention_mask"].bool()
    assert_close(got[real], expected[real])
