"""Do a padded and a packed training have the same losses? The text classifier of examples/, on docstrings, trained in turns: padded, packed
after `enable`, and packed again from other initial weights, which shows what a difference looks like.

Before it is timed, the packed training is held against the same steps in float64: it may be off by twice what the padded one is.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch

from examples._compare import Batch, Training, step_by_step
from examples.train_text_classifier import LEARNING_RATE, QUICK, Sizes, TextClassifier, loss, shuffled_batches
from varlen_attn import enable
from varlen_attn.testing import assert_within_budget

from .measure import save

PADDED, PACKED, OTHER = "padded", "packed", "packed, other weights"
KEYS = ("threads", "what")
SEEDS = {PADDED: 0, PACKED: 0, OTHER: 1}
EXACT_STEPS = 4


def classifier(name: str, sizes: Sizes) -> Training:
    torch.manual_seed(SEEDS[name])
    model = TextClassifier(sizes)
    if name != PADDED:
        enable(model)
    return Training(model, loss)


def verify(sizes: Sizes, batches: Sequence[Batch]) -> None:
    trainings = {name: classifier(name, sizes) for name in (PADDED, PACKED)}
    exact = Training(copy.deepcopy(trainings[PADDED].model).double(), loss)
    found = {name: [x for x, _ in step_by_step({name: t}, batches, LEARNING_RATE)[name]] for name, t in trainings.items()}
    truth = torch.tensor([x for x, _ in step_by_step({"exact": exact}, batches, LEARNING_RATE)["exact"]], dtype=torch.float64)
    assert_within_budget(torch.tensor(found[PACKED]), truth, torch.tensor(found[PADDED]), what="losses")


def bench(sizes: Sizes, steps: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    batches = shuffled_batches(sizes)
    fill = sum(int((ids != 0).sum()) for ids, _ in batches) / sum(ids.numel() for ids, _ in batches)
    verify(sizes, batches[:EXACT_STEPS])
    batches = [batches[i % len(batches)] for i in range(steps)]
    found = step_by_step({name: classifier(name, sizes) for name in SEEDS}, batches, LEARNING_RATE)
    shared = {"threads": torch.get_num_threads(), "dtype": "float32", "batch": f"B {sizes.batch}, {sizes.layers} layers of {sizes.dim}"}
    return [
        {
            **shared,
            "what": name,
            "fill": round(fill, 2),
            "losses": [round(x, 8) for x, _ in rows],
            "seconds": [round(s, 4) for _, s in rows],
        }
        for name, rows in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=108, help="of each training")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? Nothing is written")
    parser.add_argument("--threads", type=int, default=1, help="1 is timed by CPU time, more by the wall clock")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = bench(QUICK if options.quick else Sizes(), options.steps)
    for row in rows:
        print(f"{row['what']}: loss {row['losses'][0]:.3f} to {row['losses'][-1]:.3f}, {sum(row['seconds']):.1f} s")
    if not options.quick:
        print(f"written: {save('curves', rows, KEYS)}")


if __name__ == "__main__":
    main()
