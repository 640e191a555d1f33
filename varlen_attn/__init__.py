"""Exact attention for padded batches without computing padding.

`enable` converts a model. ``varlen_mha(x, key_padding_mask)`` is a single attention, and `VarlenMultiheadAttention` is a drop-in module.
`SeqLayout` says which tokens exist. `explain` and `record` say which kernel runs, and why the others do not.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _old_paths
from .attention.dispatch import Decision, Plan, Route, backends, choose, route, use_backend
from .attention.explain import explain
from .attention.functional import padded_attention, varlen_attention, varlen_mha
from .attention.records import Call, Record, record
from .data.collator import VarlenCollator
from .errors import ArgumentError, BackendRefused, DtypeError, LayoutError, LayoutWarning, NoBackend, VarlenError, VarlenWarning
from .kernels import BACKENDS
from .kernels.base import Backend, Capabilities, Refusal
from .kernels.problem import Problem, Semantics
from .kernels.values import Extras
from .layout.seq_layout import SeqLayout

if TYPE_CHECKING:
    from .convert.comparing import Comparison, compare
    from .convert.enabling import disable, enable, enabled
    from .convert.report import ModuleReport, Report
    from .data.sampler import Cost, TokenBudgetBatchSampler, global_token_mean
    from .nn.conv import varlen_conv1d
    from .nn.multihead import VarlenMultiheadAttention
    from .nn.norm import varlen_norm
    from .nn.rotary import apply_rotary
    from .nn.transformer import (
        VarlenTransformerDecoder,
        VarlenTransformerDecoderLayer,
        VarlenTransformerEncoder,
        VarlenTransformerEncoderLayer,
    )
    from .parallel.rows import sequence_parallel

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "ArgumentError",
    "Backend",
    "BackendRefused",
    "Call",
    "Capabilities",
    "Comparison",
    "Cost",
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
    "TokenBudgetBatchSampler",
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
    "compare",
    "disable",
    "enable",
    "enabled",
    "explain",
    "global_token_mean",
    "padded_attention",
    "record",
    "route",
    "sequence_parallel",
    "use_backend",
    "varlen_attention",
    "varlen_conv1d",
    "varlen_mha",
    "varlen_norm",
]

_old_paths.open_old_paths(sys.modules[__name__])

if not TYPE_CHECKING:
    # Imported when it is looked at for the first time, because many programs use none of it. A name that its module lacks is the module.
    LATER = {
        **_old_paths.LATER,
        **{name: name for name in ("convert", "nn")},
        **dict.fromkeys(("Comparison", "compare"), "convert.comparing"),
        **dict.fromkeys(("disable", "enable", "enabled"), "convert.enabling"),
        **dict.fromkeys(("ModuleReport", "Report"), "convert.report"),
        **dict.fromkeys(("Cost", "TokenBudgetBatchSampler", "global_token_mean"), "data.sampler"),
        **dict.fromkeys((name for name in __all__ if name.startswith("VarlenTransformer")), "nn.transformer"),
        "VarlenMultiheadAttention": "nn.multihead",
        "apply_rotary": "nn.rotary",
        "sequence_parallel": "parallel.rows",
        "varlen_conv1d": "nn.conv",
        "varlen_norm": "nn.norm",
    }

    def __getattr__(name: str) -> Any:
        if name not in LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(f"{__name__}.{LATER[name]}")
        globals()[name] = found = getattr(module, name, module)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
