"""Tests of other projects that fail on enabled models, each with the reason. ``Family.test`` or, for all families, ``test``."""

from __future__ import annotations

EXPECTED: dict[str, str] = {
    "test_sdpa_can_dispatch_non_composite_models": "reads the name of the attention implementation, which is varlen_attn",
    "Bert.test_attention_outputs": "builds a model from the configuration of an enabled one, whose attention is varlen_attn",
    "Bert.test_feed_forward_chunking": "compares rows at padding of a model that runs packed with those of one that does not",
}
