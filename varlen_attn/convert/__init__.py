"""`enable` for a model that exists: ``candidates`` finds its modules, ``enabling`` converts them to ``classes``, ``report`` says so, and
``comparing`` what is gained."""

from .classes import (
    AttentionOnlyTransformerEncoder,
    AttentionOnlyTransformerEncoderLayer,
    EnabledMultiheadAttention,
    EnabledTransformerDecoder,
    EnabledTransformerDecoderLayer,
    EnabledTransformerEncoder,
    EnabledTransformerEncoderLayer,
)
from .enabling import disable, enable, enabled
from .report import ModuleReport, Report

__all__ = [
    "AttentionOnlyTransformerEncoder",
    "AttentionOnlyTransformerEncoderLayer",
    "EnabledMultiheadAttention",
    "EnabledTransformerDecoder",
    "EnabledTransformerDecoderLayer",
    "EnabledTransformerEncoder",
    "EnabledTransformerEncoderLayer",
    "ModuleReport",
    "Report",
    "disable",
    "enable",
    "enabled",
]
