"""What a call takes of the host: small batches, where the kernels take next to nothing, and all that is around them is seen.

One thread, its own CPU time; the best of many rounds in turns, because whatever disturbs a round only adds to it. Ratios are ours / what
it was, so 1.03 is 3 % slower. All results are compared with float64 before anything is timed. The parts:

- model: an enabled model / the same model as it was, torch's fast path included.
- attention: `varlen_attention` with a layout that is ready / `F.scaled_dot_product_attention` with a bool mask, by each backend for CPUs.
- padded: `padded_attention`, from the mask to the padded output / the same call.
- layer: what a further layer takes, ``(t(12 layers) - t(2 layers)) / 10``, with kernels that compute nothing. The order is for a kernel of
  GPUs, so this is the Python around it.
- import: ``import varlen_attn`` / ``import torch``, in fresh processes.
- choose: `choose` from its cache, in microseconds.

A library that never packs is never slower either: the part "packed" says which calls of an enabled encoder run packed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import varlen_attn
from varlen_attn import Problem, SeqLayout, choose, padded_attention, record, use_backend, varlen_attention
from varlen_attn.kernels.cuda.torch_varlen import TorchVarlen
from varlen_attn.testing import assert_within_budget, reference_attention

from .measure import environment, home, ours, same_setting, save

KEYS = ("part", "what")
PARTS = ("model", "attention", "padded", "layer", "import", "choose", "packed")
WAS, OURS = "as it was", "ours"
HEADS, LAYERS = 4, 4
UNPADDED = ((1, 10, 64), (4, 32, 64), (4, 32, 256))
PADDED = (
    (1, 10, 64, 0.5), (2, 16, 128, 0.6), (4, 32, 64, 0.6), (4, 10, 256, 0.5), (1, 32, 256, 0.6), (4, 32, 256, 0.6), (4, 32, 64, 0.88),
    (4, 32, 256, 0.88),
)  # fmt: skip
GRID = ((0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97), (10, 32, 128), (64, 256, 512))  # fill, columns, width; 4 samples
SMALL = (2, 4, 8, 16)  # batch, heads, columns, head dim
NOISE = 0.1  # of a ratio, between two runs

GOAL_UNPADDED, GOAL_MICROSECONDS, GOAL_DEEP = 1.03, 15.0, 1.10  # whichever of the first two is more, but never above the third
GOAL_PADDED, GOAL_WIDE = 1.15, 1.0  # the second where packing pays: fill below 0.7, and width from 256 on
GOAL_ATTENTION = {"cpu_native": (1.8, 2.2), "cpu": (4.0, 4.0)}  # forward, forward with grad
GOAL_PADDED_ATTENTION, GOAL_LAYER, GOAL_IMPORT, GOAL_CHOOSE = 4.5, 1.15, 0.025, 10.0

Call = Callable[[], Any]


# -------------------------------------------------------------------- the clock


def best(calls: Mapping[str, Call], rounds: int, least: float = 0.005) -> dict[str, float]:
    """Microseconds of CPU time of one call, the least of all rounds; in turns, each as often as takes ``least`` seconds."""
    repeats = {}
    for name, call in calls.items():
        _seconds(call, 3)
        repeats[name] = max(1, round(least / _seconds(call, 3)))
    found = dict.fromkeys(calls, float("inf"))
    for turn in range(rounds):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            found[name] = min(found[name], _seconds(calls[name], repeats[name]))
    return {name: round(seconds * 1e6, 2) for name, seconds in found.items()}


def _seconds(call: Call, repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        call()
    return max(time.process_time() - start, 1e-7) / repeats


def row(part: str, what: str, times: dict[str, float], limit: float | None, measured: float | None = None) -> dict[str, Any]:
    """``measured`` is the ratio of the two times, or given; it should be at most ``limit``, None where there is no goal."""
    found = measured if measured is not None else times[OURS] / times[WAS]
    met = None if limit is None else found <= limit
    rounded = None if limit is None else round(limit, 3)
    return {"part": part, "what": what, "threads": 1, "microseconds": times, "ratio": round(found, 4), "limit": rounded, "met": met}


# -------------------------------------------------------------------- enabled models


def mask_of(batch: int, columns: int, fill: float | None) -> Tensor:
    """True is padding: lengths from short to long, so that the mean is ``fill``; None is nothing padded."""
    low, high = (1.0, 1.0) if fill is None else (max(2 * fill - 1, 0.1), min(1.0, 2 * fill)) if batch > 1 else (fill, fill)
    lengths = torch.linspace(low * columns, high * columns, batch).round().long().clamp(min=1)
    return torch.arange(columns) >= lengths[:, None]


def encoder(width: int, layers: int = LAYERS) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(width, HEADS, 2 * width, batch_first=True), layers)


def bert(width: int, layers: int = LAYERS) -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=HEADS, intermediate_size=2 * width, vocab_size=100)
    return BertModel(BertConfig(**sizes), add_pooling_layer=False)  # type: ignore[no-any-return]


def sentences(width: int) -> nn.Module:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.auto_model = bert(width)

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            ids, mask = features["input_ids"], features["attention_mask"]
            return features | {"token_embeddings": self.auto_model(input_ids=ids, attention_mask=mask).last_hidden_state}

    return SentenceTransformer(modules=[Words(), Pooling(width)], device="cpu")  # type: ignore[no-any-return]


Way = tuple[str, int, Callable[[int], nn.Module], Callable[[nn.Module, Tensor, Tensor | None], Tensor]]


def ways() -> list[Way]:
    """Name, layers, how a model is made for a width, and how it is called with ``x (B, S, E)`` and a mask."""

    def attend(model: nn.Module, x: Tensor, mask: Tensor | None, weights: bool) -> Tensor:
        return model(x, x, x, key_padding_mask=mask, need_weights=weights)[0]  # type: ignore[no-any-return]

    def read(model: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        return model(input_ids=_ids(x, mask), attention_mask=None if mask is None else (~mask).long()).last_hidden_state  # type: ignore[no-any-return]

    def embed(model: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        real = torch.ones(x.shape[:2], dtype=torch.long) if mask is None else (~mask).long()
        return model({"input_ids": _ids(x, mask), "attention_mask": real})["sentence_embedding"]  # type: ignore[no-any-return]

    found: list[Way] = [
        ("nn.TransformerEncoder", LAYERS, encoder, lambda model, x, mask: model(x, src_key_padding_mask=mask)),
        *((f"nn.MultiheadAttention{says}", 1, lambda width: nn.MultiheadAttention(width, HEADS, batch_first=True),
           partial(attend, weights=weights)) for says, weights in (("", True), (", need_weights=False", False))),
    ]  # fmt: skip
    if find_spec("transformers"):
        found.append(("BertModel", LAYERS, bert, read))
    if find_spec("sentence_transformers"):
        found.append(("SentenceTransformer", LAYERS, sentences, embed))
    return found


def _ids(x: Tensor, mask: Tensor | None) -> Tensor:
    """Made of ``x``, so that the same words are read in float64."""
    ids = x[..., 0].double().mul(1e3).long().remainder(90) + 5
    return ids if mask is None else ids * ~mask


@torch.no_grad()
def bench_models(rounds: int, unpadded: Any = UNPADDED, padded: Any = PADDED) -> Iterator[dict[str, Any]]:
    batches = [(*sizes, fill) for sizes in unpadded for fill in (None, 1.0)] + [*padded]
    for name, layers, make, call in ways():
        for batch, columns, width, fill in batches:
            torch.manual_seed(0)
            model = make(width).eval()
            x, mask = torch.randn(batch, columns, width), None if fill is None else mask_of(batch, columns, fill)
            enabled = copy.deepcopy(model)
            varlen_attn.enable(enabled)
            calls = {WAS: partial(call, model, x, mask), OURS: partial(call, enabled, x, mask)}
            exact = call(copy.deepcopy(model).double(), x.double(), mask)
            verify(calls, exact, None if mask is None or exact.dim() < 3 else ~mask)
            times = best(calls, rounds)
            limit = max(GOAL_UNPADDED, 1 + GOAL_MICROSECONDS / times[WAS])
            limit = min(limit, GOAL_DEEP) if layers > 1 else limit
            if fill is not None and fill < 1:
                limit = GOAL_WIDE if fill < 0.7 and width >= 256 else GOAL_PADDED
            says = "no mask" if fill is None else "nothing padded" if fill == 1 else f"fill {fill}"
            yield row("model", f"{name}, {batch} x {columns}, width {width}, {says}", times, limit)


def verify(calls: Mapping[str, Call], exact: Tensor, real: Tensor | None) -> None:
    """Raise AssertionError unless all results are as near to float64 as the first."""
    at = ... if real is None else real
    plain = next(iter(calls.values()))()[at]
    for name, call in calls.items():
        assert_within_budget(call()[at], exact[at], plain, what=name)


# -------------------------------------------------------------------- attention alone


def bench_attention(rounds: int) -> Iterator[dict[str, Any]]:
    batch, heads, columns, dim = SMALL
    mask = mask_of(batch, columns, 0.6)
    layout = SeqLayout.from_key_padding_mask(mask)
    padded = [torch.randn(batch, columns, heads, dim) for _ in range(3)]
    for grad in (False, True):
        says = "forward with grad" if grad else "no grad"
        q, k, v = (layout.pack(x).requires_grad_(grad) for x in padded)
        dense = [x.transpose(1, 2).contiguous().requires_grad_(grad) for x in padded]
        inputs = [x.detach().clone().requires_grad_(grad) for x in padded]
        exact = reference_attention(q, k, v, layout)
        seen = ~mask[:, None, None]
        with torch.set_grad_enabled(grad):
            masked: Call = partial(_masked, dense, seen)
            plain = layout.pack(masked().transpose(1, 2))
            for backend in [name for name, reason in ours("cpu").items() if reason is None]:
                call = partial(varlen_attention, q, k, v, layout, backend=backend)
                assert_within_budget(call(), exact, plain, what=backend)
                limit = GOAL_ATTENTION[backend][grad] if backend in GOAL_ATTENTION else None
                yield row("attention", f"{backend}, {says}", best({WAS: masked, OURS: call}, rounds), limit)
            whole: Call = partial(_from_mask, inputs, mask)
            assert_within_budget(layout.pack(whole()), exact, plain, what="padded_attention")
            yield row("padded", f"padded_attention, {says}", best({WAS: masked, OURS: whole}, rounds), GOAL_PADDED_ATTENTION)


def _masked(inputs: list[Tensor], seen: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], attn_mask=seen)


def _from_mask(inputs: list[Tensor], mask: Tensor) -> Tensor:
    return padded_attention(inputs[0], inputs[1], inputs[2], mask)


# -------------------------------------------------------------------- a further layer


FLOAT = frozenset({torch.float32})  # whose matrix products take a CPU less than those of half precision


class Nothing(TorchVarlen):
    """The backend for GPUs, for tensors on a CPU: with `no_kernels` all of its Python runs, and nothing is computed."""

    capabilities = replace(TorchVarlen.capabilities, devices=frozenset({"cpu"}), dtypes=FLOAT, min_capability=None)

    checks_offsets = True  # on a GPU once for each layout, on a CPU in every call

    def missing(self, problem: Problem) -> None:
        return None


_NOTHING = Nothing()


@contextmanager
def no_kernels() -> Iterator[None]:
    """Attention, ours and theirs, is memory that nothing was written to."""
    lse, seed = torch.empty(HEADS, 1), torch.empty(2, dtype=torch.uint64)
    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_flash_attention_forward", lambda q, *rest, **options: (torch.empty_like(q), lse, seed, seed, lse))
    library.impl("_scaled_dot_product_flash_attention_for_cpu", lambda q, *rest, **options: (torch.empty_like(q), lse))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, that it has one
            yield
    finally:
        library._destroy()


@torch.no_grad()
def bench_layers(rounds: int) -> Iterator[dict[str, Any]]:
    """torch's fast path is off, because it is one op a layer, and a GPU's kernels would be in it."""
    batch, columns, width, few, many = 2, 8, 32, 2, 12
    x, mask = torch.randn(batch, columns, width), mask_of(batch, columns, 0.6)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for name, _, make, call in ways():
            if name not in ("nn.TransformerEncoder", "BertModel"):
                continue
            models = {layers: make(width, layers).eval() for layers in (few, many)}  # type: ignore[call-arg]
            enabled = copy.deepcopy(models)
            for model in enabled.values():
                varlen_attn.enable(model)
            calls = {}
            with no_kernels():
                for layers in models:
                    calls[f"{WAS}, {layers} layers"] = partial(call, models[layers], x, mask)
                    calls[f"{OURS}, {layers} layers"] = partial(_ordered, call, enabled[layers], x, mask)
                    with record(enabled[layers]) as log:
                        calls[f"{OURS}, {layers} layers"]()
                    ran = [(made.backend, made.plan and made.plan.route) for made in log]
                    assert ran == [("torch_varlen", "packed")] * layers, f"{name} of {layers} layers ran {ran}"
                times = best(calls, rounds)
            by_layer = {who: (times[f"{who}, {many} layers"] - times[f"{who}, {few} layers"]) / (many - few) for who in (WAS, OURS)}
            yield row("layer", f"a further layer of {name}", {who: round(t, 2) for who, t in by_layer.items()}, GOAL_LAYER)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _ordered(call: Callable[..., Any], *inputs: Any) -> Any:
    with use_backend(_NOTHING):
        return call(*inputs)


# -------------------------------------------------------------------- once, or not at all


_IMPORTS = """
import time
start = time.process_time()
import torch
between = time.process_time()
import varlen_attn
print(between - start, time.process_time() - between)
"""


def bench_import(processes: int) -> Iterator[dict[str, Any]]:
    """Each process times both. The first writes byte code, wherever that goes otherwise: compiling is no part of an import."""
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        given = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environ = given | {"PYTHONPYCACHEPREFIX": folder}
        for _ in range(processes + 1):
            done = subprocess.run([sys.executable, "-c", _IMPORTS], capture_output=True, text=True, check=True, env=environ)
            taken.append([round(float(seconds) * 1e6) for seconds in done.stdout.split()])
    theirs, own = zip(*taken[1:], strict=True)
    yield row("import", "import varlen_attn / import torch", {WAS: min(theirs), OURS: min(own)}, GOAL_IMPORT)


def bench_choose(rounds: int) -> Iterator[dict[str, Any]]:
    """On a `Problem` that it has met, and the same with building the `Problem` from tensors, as a call does."""
    q, k, v = (torch.randn(12, 8, 64) for _ in range(3))
    layout, problem = SeqLayout.from_lengths([5, 7]), Problem()
    choose(problem)

    def of_tensors() -> None:
        choose(Problem.of(q, k, v, layout, layout, problem.semantics, needs_grad=False))

    calls: dict[str, Call] = {"from its cache": partial(choose, problem), "with the Problem built": of_tensors}
    for what, microseconds in best(calls, rounds).items():
        limit = GOAL_CHOOSE if what == "from its cache" else None
        yield row("choose", f"choose {what}, in microseconds", {OURS: microseconds}, limit, microseconds)


@torch.no_grad()
def bench_packed(grid: Any = GRID) -> Iterator[dict[str, Any]]:
    """The share of a grid of batches of which an enabled encoder runs attention packed; the cells are written down."""
    fills, all_columns, widths = grid
    cells = {}
    for width in widths:
        model = encoder(width).eval()
        varlen_attn.enable(model)
        for columns in all_columns:
            for fill in fills:
                with record(model) as log:
                    model(torch.randn(4, columns, width), src_key_padding_mask=mask_of(4, columns, fill))
                cells[f"fill {fill}, {columns} columns, width {width}"] = any(made.plan and made.plan.route == "packed" for made in log)
    share = sum(cells.values()) / len(cells)
    what = f"share of {len(cells)} batches of 4 that an enabled encoder packs"
    yield row("packed", what, {}, None, share) | {"not packed": [cell for cell, packed in cells.items() if not packed]}


# -------------------------------------------------------------------- all of them


def bench(parts: Any, rounds: int, processes: int) -> Iterator[dict[str, Any]]:
    benches: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "model": partial(bench_models, rounds), "attention": partial(bench_attention, rounds), "layer": partial(bench_layers, rounds),
        "import": partial(bench_import, processes), "choose": partial(bench_choose, rounds), "packed": bench_packed,
    }  # fmt: skip
    for part, run in benches.items():
        if part in parts or (part == "attention" and "padded" in parts):
            yield from (found for found in run() if found["part"] in parts)


def told(found: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {microseconds:.4g} us" for name, microseconds in found["microseconds"].items())
    goal = "no goal" if found["met"] is None else f"at most {found['limit']}: {'met' if found['met'] else 'MISSED'}"
    cells = f"\n  not packed: {'; '.join(found['not packed']) or 'none'}" if "not packed" in found else ""
    return f"{found['part']:9} {found['what']}: {found['ratio']:.3f} ({times}), {goal}{cells}"


def fell(rows: list[dict[str, Any]], committed: dict[str, Any]) -> list[str]:
    """Goals that are missed, and were met or missed by less in the committed results, by more than noise."""
    if not same_setting(committed["environment"], environment()):
        return []  # of another kind of machine, or none: how much was missed there is no measure
    before = committed["rows"]
    known = {tuple(found[key] for key in KEYS): found["ratio"] for found in before}
    worse = []
    for found in rows:
        allowed = max(found["limit"] or 0.0, known.get(tuple(found[key] for key in KEYS), 0.0))
        if found["met"] is False and found["ratio"] > (1 + NOISE) * allowed:
            worse.append(found["what"])
    return worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=25, help="of each row")
    parser.add_argument("--processes", type=int, default=9, help="that import both")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a goal is missed by more than committed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for found in bench(options.part, options.rounds, options.processes):
        rows.append(found)
        print(told(found), flush=True)
    missed = [found["what"] for found in rows if found["met"] is False]
    judged = sum(found["met"] is not None for found in rows)
    print(f"{len(missed)} of {judged} goals are missed" + "".join(f"\n- {what}" for what in missed))
    if options.check:
        path = home("host")
        worse = fell(rows, json.loads(path.read_text()) if path.exists() else {"environment": {}, "rows": []})
        print(f"{len(worse)} are worse than committed" + "".join(f"\n- {what}" for what in worse))
        return int(bool(worse))
    print(f"written: benchmarks/results/{save('host', rows, KEYS).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
