"""A name that `_streams` imports from here."""

from ._masks import additive_mask

__all__ = ["additive_mask"]
