"""Batches: ``sampler`` says what is in them, ``collator`` makes them, with masks that keep lengths on the host: ``host_lengths``."""

from .collator import VarlenCollator

__all__ = ["VarlenCollator"]
