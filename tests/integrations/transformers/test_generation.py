"""What `generate` and caches read beside tokens, and calls whose shapes could be taken for others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.4", reason="needs transformers")

import transformers
from transformers import StaticCache
from transformers.modeling_outputs import BaseModelOutput

from varlen_attn import enable

from .tiny import build


def both(model: Any) -> tuple[Any, Any]:
    """As it came, and enabled."""
    ours = copy.deepcopy(model)
    enable(ours)
    return model, ours


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 4, 5])
def test_one_text_with_as_many_tokens_as_heads(tokens: int) -> None:
    """A position bias is ``(1, heads, Q, K)``, and rows are ``(1, tokens, D)``."""
    theirs, ours = both(build("T5", "Model").get_encoder())
    assert theirs.config.num_heads == 4
    mask = (torch.arange(6) < tokens).long()[None]
    ids = torch.randint(3, 20, (1, 6)) * mask
    close(*(m(input_ids=ids, attention_mask=mask)[0][:, :tokens] for m in (ours, theirs)))


@pytest.mark.parametrize("cached", [True, False])
def test_a_prompt_of_a_target_that_is_padded_on_the_right(cached: bool) -> None:
    models = both(build("Bart", "ForConditionalGeneration"))
    ids, prompt = torch.randint(4, 20, (2, 6)), torch.randint(4, 20, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": prompt, "decoder_attention_mask": mask}
    theirs, ours = (
        m.generate(**given, use_cache=cached, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_scores=True)
        for m in models
    )
    close(ours.scores[0].nan_to_num(), theirs.scores[0].nan_to_num())


@pytest.mark.parametrize("assisted", [False, True])
def test_candidates_behind_the_padding_of_a_prompt(assisted: bool) -> None:
    models = both(build("Llama", "ForCausalLM"))
    ids = torch.tensor([[5, 6, 7, 5, 6, 9, 1, 1, 1]])
    theirs, ours = (
        m.generate(
            input_ids=ids, attention_mask=(ids != 1).long(), max_new_tokens=6, do_sample=False,
            **({"assistant_model": m} if assisted else {"prompt_lookup_num_tokens": 2}),
        ).tolist()
        for m in models
    )  # fmt: skip
    assert ours == theirs


def test_gradients_of_a_source_without_tokens_where_a_position_bias_is_all_that_counts() -> None:
    model = build("T5", "ForConditionalGeneration")
    model.set_attn_implementation("eager")
    width = model.config.d_model
    x, mask = torch.randn(2, 9, width, dtype=torch.float64), torch.tensor([[1] * 9, [0] * 9])
    found = []
    for m in both(model):
        leaf, target = x.clone().requires_grad_(), torch.arange(3, 10).expand(2, -1)
        out = m(encoder_outputs=BaseModelOutput(leaf), attention_mask=mask, decoder_input_ids=target, use_cache=False).logits
        found.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    close(found[1], found[0])


@pytest.mark.parametrize("prompt", [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("asks", [{}, {"output_attentions": True}], ids=["", "weights"])
def test_several_tokens_after_the_prompt_of_a_static_cache(prompt: list[int], asks: dict[str, Any]) -> None:
    """Whose count of its tokens is a tensor that goes on counting."""
    model = build("Llama", "ForCausalLM")
    mask = torch.cat([torch.tensor([[1] * 5, prompt]), torch.ones(2, 2, dtype=torch.long)], 1)
    ids, found = torch.randint(4, 20, (2, 7)), []
    for m in both(model):
        cache = StaticCache(config=m.config, max_cache_len=16)
        with torch.no_grad():
            m(input_ids=ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
            found.append(m(input_ids=ids[:, 5:], attention_mask=mask, past_key_values=cache, **asks).logits)
    close(found[1], found[0])


def test_generate_is_found_by_its_code() -> None:
    """Which is private to transformers: a test fails when it moves."""
    import inspect

    assert inspect.unwrap(transformers.GenerationMixin.generate).__code__.co_name == "generate"
