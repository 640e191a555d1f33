"""``python -m varlen_attn``: ``main`` reads the command line what the commands do is beside it."""
