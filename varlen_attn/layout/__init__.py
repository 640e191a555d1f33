"""Which tokens of a batch exist, and where: `SeqLayout`, and packing by it.

``seq_layout`` is the value, ``build`` makes its index tensors, ``checks`` has the words for wrong masks and offsets, ``rows`` moves rows,
and ``padded`` is a padded batch as a layout.
"""

from .seq_layout import SeqLayout

__all__ = ["SeqLayout"]
