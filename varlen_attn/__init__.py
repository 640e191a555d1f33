"""Exact attention for padded batches without computing padding.

``varlen_mha(x, key_padding_mask)`` is the one call, `VarlenMultiheadAttention` the drop-in module, `SeqLayout` the value that says which
tokens exist, `explain` and `record` say which kernel runs and why the others do not.
"""

from .backends import BACKENDS
from .backends.base import Backend, Capabilities, Extras, Refusal
from .dispatch import Call, Decision, Plan, Record, Route, backends, choose, record, route, use_backend
from .errors import (
    ArgumentError,
    BackendRefused,
    DtypeError,
    LayoutError,
    LayoutWarning,
    NoBackend,
    VarlenError,
    VarlenWarning,
)
from .explain import explain
from .functional import padded_attention, varlen_attention, varlen_mha
from .layout import SeqLayout
from .modules import VarlenMultiheadAttention
from .problem import Problem, Semantics

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "ArgumentError",
    "Backend",
    "BackendRefused",
    "Call",
    "Capabilities",
    "Decision",
    "DtypeError",
    "Extras",
    "LayoutError",
    "LayoutWarning",
    "NoBackend",
    "Plan",
    "Problem",
    "Record",
    "Refusal",
    "Route",
    "Semantics",
    "SeqLayout",
    "VarlenError",
    "VarlenMultiheadAttention",
    "VarlenWarning",
    "backends",
    "choose",
    "explain",
    "padded_attention",
    "record",
    "route",
    "use_backend",
    "varlen_attention",
    "varlen_mha",
]
