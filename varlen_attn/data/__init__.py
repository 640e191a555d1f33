"""Batches that keep their lengths on the host: ``collator`` makes them, ``host_lengths`` are their masks."""

from .collator import VarlenCollator

__all__ = ["VarlenCollator"]
