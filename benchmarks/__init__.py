"""Benchmarks: build, verify against float64, then time. ``make bench`` runs all of them; results stand in ``results/``."""
