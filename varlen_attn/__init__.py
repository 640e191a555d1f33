"""Exact attention for padded batches without computing padding.

``varlen_mha(x, key_padding_mask)`` is the one call, `VarlenMultiheadAttention` the drop-in module, `SeqLayout` the value that says which
tokens exist, `explain` and `record` say which kernel runs and why the others do not.
"""

import sys

from . import _old_paths
from .attention.dispatch import Decision, Plan, Route, backends, choose, route, use_backend
from .attention.explain import explain
from .attention.functional import padded_attention, varlen_attention, varlen_mha
from .attention.records import Call, Record, record
from .convert.enabling import disable, enable, enabled
from .convert.report import ModuleReport, Report
from .data.collator import VarlenCollator
from .errors import ArgumentError, BackendRefused, DtypeError, LayoutError, LayoutWarning, NoBackend, VarlenError, VarlenWarning
from .kernels import BACKENDS
from .kernels.base import Backend, Capabilities, Refusal
from .kernels.problem import Problem, Semantics
from .kernels.values import Extras
from .layout.seq_layout import SeqLayout
from .nn.conv import varlen_conv1d
from .nn.multihead import VarlenMultiheadAttention
from .nn.rotary import apply_rotary
from .nn.transformer import VarlenTransformerDecoder, VarlenTransformerDecoderLayer, VarlenTransformerEncoder, VarlenTransformerEncoderLayer

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

_old_paths.open_old_paths(sys.modules[__name__])
