"""`enable` for a model that exists: ``candidates`` finds its modules, ``enabling`` converts them to ``classes``, ``report`` says so, and
``comparing`` what is gained."""

from .classes import (
    AttentionOnlyTransformerEncoder,
    AttentionOnlyTransformerEncoderLayer,
    EnabledMultiheadAttention,
    EnabledMultiheadAttentionWithoutWeights,
    EnabledTransformerDecoder,
    EnabledTransformerDecoderLayer,
    EnabledTransformerEncoder,
    EnabledTransformerEncoderLayer,
)
from .comparing import Comparison, compare
from .enabling import disable, enable, enabled
from .report import ModuleReport, Report

__all__ = [
    "AttentionOnlyTransformerEncoder",
    "AttentionOnlyTransformerEncoderLayer",
    "Comparison",
    "EnabledMultiheadAttention",
    "EnabledMultiheadAttentionWithoutWeights",
    "EnabledTransformerDecoder",
    "EnabledTransformerDecoderLayer",
    "EnabledTransformerEncoder",
    "EnabledTransformerEncoderLayer",
    "ModuleReport",
    "Report",
    "compare",
    "disable",
    "enable",
    "enabled",
]
