"""`torch.compile` with inductor of a model of transformers, padded and packed, each with and without freezing.

A BERT with random weights, as large as MiniLM, and two layers of one as large as BERT base. Every contestant has seen two batches of other
sizes before, so that its graphs are those for any size, as with batches that differ. `freezing` makes constants of weights: each layer has
graphs of its own then, and `torch._dynamo.config.recompile_limit`, 8 for each function, must allow that.

All outputs at tokens are compared with the model in float64, one sequence at a time, before anything is timed; the error budget is that of
the model as it came. One thread is timed by its CPU time.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import varlen_attn

from .bench_transformers import BEFORE, Limits, contest, evaluate, truth, verify
from .inputs import Batch, bert
from .measure import add_machine, environment, facts, save, use_machine

PACKED, COMPILED, COMPILED_PACKED, FROZEN, FROZEN_PACKED = (
    "packed", "compiled", "compiled, packed", "frozen", "frozen, packed"
)  # fmt: skip
PAIRS = ((PACKED, BEFORE), (COMPILED_PACKED, COMPILED), (FROZEN_PACKED, FROZEN))  # packed, and what it should not be slower than
MODELS = {"MiniLM, 6 layers, width 384": (6, 384), "BERT base, 2 of 12 layers, width 768": (2, 768)}
FILLS = (0.3, 0.6, 0.9, 1.0)
SIZE = (8, 128)
KEYS = ("threads", "what", "fill")


def batch_of(fill: float, size: int, columns: int) -> Batch:
    """Lengths from short to long, one of them that of the batch; their mean is ``fill``."""
    spread = min(fill, 1 - fill)
    lengths = (torch.linspace(fill - spread, fill + spread, size) * columns).round().long().clamp(1, columns)
    lengths[-1] = columns
    valid = torch.arange(columns) < lengths[torch.randperm(size, generator=torch.Generator().manual_seed(0)), None]
    ids = torch.randint(5, 1000, valid.shape, generator=torch.Generator().manual_seed(1)) * valid
    return Batch({"input_ids": ids, "attention_mask": valid.long()}, valid)


def contestants(model: nn.Module, backend: str) -> dict[str, Any]:
    """The model, enabled, compiled, and both; what is compiled has seen two sizes."""
    found: dict[str, Any] = {BEFORE: model, PACKED: copy.deepcopy(model)}
    varlen_attn.enable(found[PACKED])
    frozen: dict[str, Any] = {"options": {"freezing": True}} if backend == "inductor" else {}
    ways: tuple[tuple[str, str, dict[str, Any]], ...] = ((COMPILED, COMPILED_PACKED, {}), (FROZEN, FROZEN_PACKED, frozen))
    for padded, packed, options in ways:
        for name, as_it_is in ((padded, BEFORE), (packed, PACKED)):
            found[name] = torch.compile(copy.deepcopy(found[as_it_is]), backend=backend, **options)
            for size, columns in ((2, 16), (3, 24)):
                evaluate(found[name], batch_of(0.6, size, columns).inputs)
    return found


def outputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return {"output": evaluate(model, batch.inputs)[batch.valid]}


def row(what: str, fill: float, batch: Batch, models: Mapping[str, nn.Module], exact: nn.Module, limits: Limits) -> dict[str, Any]:
    difference = verify({name: partial(outputs, model, batch) for name, model in models.items()}, truth(exact, batch))
    timings = contest({name: partial(evaluate, model, batch.inputs) for name, model in models.items()}, limits)
    found = facts(timings, BEFORE)
    times = found["milliseconds"]
    gains = {packed: round(times[padded] / times[packed], 3) for packed, padded in PAIRS}
    return {"what": what, "fill": fill, "batch": str(batch), **found, "gain": gains, "difference": difference}


def rows(
    what: str, model: nn.Module, fills: tuple[float, ...], size: tuple[int, int], limits: Limits, backend: str
) -> Iterator[dict[str, Any]]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        models = contestants(model, backend)
        for fill in fills:
            yield row(what, fill, batch_of(fill, *size), models, model, limits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_machine(parser, budget=40.0)
    parser.add_argument("--fill", type=float, nargs="+", default=list(FILLS))
    parser.add_argument("--what", nargs="+", choices=[*MODELS], default=list(MODELS))
    options = parser.parse_args()
    use_machine(options.device, options.threads)
    for what in options.what:
        torch.manual_seed(0)
        for found in rows(what, bert(*MODELS[what]), tuple(options.fill), SIZE, Limits(budget=options.budget), "inductor"):
            save("compile", [found], KEYS)
            print(what, found["batch"], found["milliseconds"], "padded / packed", found["gain"], "others", found["foreign"], flush=True)
    print("written: benchmarks/results/compile.json, on", environment()["cpu"])


if __name__ == "__main__":
    main()
