"""The stages of `benchmarks.gpu_acceptance`, a file for one or two; `stages.STAGES` has them in order."""
