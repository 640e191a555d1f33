"""Attention on a CPU: ``aten`` runs torch's kernel on ``blocks`` of equal ``groups``; ``native`` runs the compiled kernel, which
``build`` compiles from ``csrc/``, finds and loads.
"""
