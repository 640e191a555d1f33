"""Modules: ``multihead`` and ``transformer`` are torch's, packed; ``stream`` takes a batch into a stack and out of it; ``masks`` reads the
masks of torch's modules and ``checks`` has torch's words for wrong ones. ``rotary``, ``conv`` and ``norm`` are for layers around attention.
"""

from .conv import varlen_conv1d
from .norm import varlen_norm
from .rotary import apply_rotary

__all__ = ["apply_rotary", "varlen_conv1d", "varlen_norm"]
