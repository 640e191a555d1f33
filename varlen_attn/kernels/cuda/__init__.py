"""Attention on a GPU: one adapter a file. ``packages`` asks what is installed, ``fit`` makes tensors fit a kernel, ``flash_ops`` makes
ops of flash-attn's functions, ``flex_blocks`` makes block masks.
"""
