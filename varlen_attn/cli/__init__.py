"""``python -m varlen_attn``: ``main`` reads the command line, ``demo`` and ``bench`` measure with ``compare``."""
