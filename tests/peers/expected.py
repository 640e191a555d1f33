"""Tests of other projects that fail on enabled models, each with the reason. ``Family.test`` or, for all families, ``test``."""

from __future__ import annotations

WEIGHTS = "builds a model from the configuration of an enabled one, whose attention is varlen_attn, and asks it for weights"
EXPECTED: dict[str, str] = {
    "test_sdpa_can_dispatch_non_composite_models": "reads the name of the attention implementation, which is varlen_attn",
    "test_feed_forward_chunking": "compares rows at padding of a model that runs packed with those of one that does not",
    **{
        f"{family}.test_attention_outputs": WEIGHTS
        for family in ("Bert", "Roberta", "DistilBert", "Electra", "ModernBert", "Llama", "Qwen3", "Bart", "T5")
    },
}
