"""Exact attention for padded batches without computing padding.

``varlen_mha(x, key_padding_mask)`` is the one call, `VarlenMultiheadAttention` the drop-in module, `SeqLayout` the value that says which
tokens exist, `explain` and `record` say which kernel runs and why the others do not.
"""

from .backends import BACKENDS
from .backends.base import Backend, Capabilities, Extras, Refusal
from .companions import apply_rotary, varlen_conv1d
from .convert import ModuleReport, Report, disable, enable, enabled
from .data import VarlenCollator
from .dispatch import Decision, Plan, Route, backends, choose, route, use_backend
from .encoder import VarlenTransformerDecoder, VarlenTransformerDecoderLayer, VarlenTransformerEncoder, VarlenTransformerEncoderLayer
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
from .records import Call, Record, record

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
    "ModuleReport",
    "NoBackend",
    "Plan",
    "Problem",
    "Record",
    "Refusal",
    "Report",
    "Route",
    "Semantics",
    "SeqLayout",
    "VarlenCollator",
    "VarlenError",
    "VarlenMultiheadAttention",
    "VarlenTransformerDecoder",
    "VarlenTransformerDecoderLayer",
    "VarlenTransformerEncoder",
    "VarlenTransformerEncoderLayer",
    "VarlenWarning",
    "apply_rotary",
    "backends",
    "choose",
    "disable",
    "enable",
    "enabled",
    "explain",
    "padded_attention",
    "record",
    "route",
    "use_backend",
    "varlen_attention",
    "varlen_conv1d",
    "varlen_mha",
]
