"""Tests of models of transformers; the tiny ones of these tests count as wide."""

from varlen_attn.integrations.transformers import enabling

enabling._WIDE = 0
