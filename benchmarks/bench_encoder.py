"""A whole encoder: `VarlenTransformerEncoder` against `nn.TransformerEncoder` with the same weights. 6 layers, pre-norm, E 512, 8 heads,
FF 2048, gelu, no dropout; padded in, padded out. Every contestant gets the bool mask, and what it makes of it is timed.

All ratios are against torch with its fast path switched off: on a CPU the fast path, which torch takes in evaluation, is the slower of the
two as soon as rows are long, and would flatter us. It is timed too ("as torch comes"); in training there is none.

Before anything is timed, all outputs at real tokens, and in training the gradients of the input and of every parameter, are compared with
torch's encoder in float64: whole batch, all layers, but one sequence at a time and without padding. That needs no mask to be right, and
is quicker. The error budget is that of torch's encoder in the same dtype on the padded batch.

Memory is measured on w4, every contestant in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varlen_attn import Problem, VarlenMultiheadAttention, VarlenTransformerEncoder, choose
from varlen_attn.testing import assert_within_budget

from .measure import DTYPES, add_machine, interleave, peak_extra, ratio, save, use_machine
from .workloads import WORKLOADS, Workload

LAYERS, WIDTH, HEADS, FEED_FORWARD = 6, 512, 8, 2048
DIRECTIONS = ("eval", "training")
TRAINED = ("w1", "w3", "w5", "w6")  # by default: a row of w2 or w4 takes minutes in training, and says what w1 says
OFF, ON, OURS, AGAIN = "fast path off", "as torch comes", "ours", "fast path off again"
MASKED = "masked"  # the baseline of memory: masked SDPA, alone or in torch's encoder with its fast path off
GOALS = {
    ("float32", "eval"): {"w1": 3.0, "w3": 4.5, "w6": 2.2},
    ("bfloat16", "eval"): {"w1": 3.2, "w3": 5.8, "w6": 1.9},
    ("bfloat16", "training"): {"w3": 4.0},
}
FLOORS = {"w5": 0.98}  # never below, in any row: nothing is padded there, so there is nothing to win
MEMORY_GOAL = 0.5  # of what torch's masked path takes


class Batch(NamedTuple):
    """One padded batch.

    Attributes:
        x: ``(B, S, D)``, a leaf that wants its gradient.
        mask: ``(B, S)`` bool, True is padding.
        grad: of the output, ``(B, S, D)``; 0 at padding, as every loss of real tokens has it.
    """

    x: Tensor
    mask: Tensor
    grad: Tensor

    @classmethod
    def of(cls, mask: Tensor, dtype: torch.dtype, device: str = "cpu") -> Batch:
        generator = torch.Generator().manual_seed(1)
        x, grad = (torch.randn(*mask.shape, WIDTH, generator=generator).to(device, dtype) for _ in range(2))
        mask = mask.to(device)
        return cls(x.requires_grad_(), mask, grad.masked_fill_(mask[..., None], 0))


def encoders(dtype: torch.dtype, device: str = "cpu") -> tuple[nn.TransformerEncoder, VarlenTransformerEncoder]:
    """torch's and ours, with the same weights."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, FEED_FORWARD, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    # Nested tensors serve post-norm layers only; torch warns if they are asked for here.
    theirs = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    ours = VarlenTransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    with torch.no_grad():
        for weight in theirs.parameters():  # layers start as copies, with biases of 0: mistakes could hide
            weight.add_(torch.randn_like(weight), alpha=0.02)
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(device, dtype), ours.to(device, dtype)


def step(model: nn.Module, batch: Batch, *, fast_path: bool, training: bool) -> Tensor:
    """The call that is timed."""
    torch.backends.mha.set_fastpath_enabled(fast_path)
    with torch.set_grad_enabled(training):
        if training:
            model.zero_grad()
            batch.x.grad = None
        out: Tensor = model(batch.x, src_key_padding_mask=batch.mask)
        if training:
            out.backward(batch.grad)
    return out.detach()


def contestants(theirs: nn.Module, ours: nn.Module, training: bool) -> dict[str, tuple[nn.Module, Callable[[Batch], Tensor]]]:
    """By name: whose parameters get gradients, and the call."""
    found = {OFF: (theirs, False), ON: (theirs, True), OURS: (ours, True)}
    if training:
        del found[ON]
    return {name: (model, partial(step, model, fast_path=fast, training=training)) for name, (model, fast) in found.items()}


# -------------------------------------------------------------------- verified


def results(model: nn.Module, call: Callable[[Batch], Tensor], batch: Batch, training: bool) -> dict[str, Tensor]:
    """What is compared, by name: the output at real tokens, in training all gradients."""
    found = {"output": call(batch)[~batch.mask]}
    if training:
        assert batch.x.grad is not None
        found |= {"input": batch.x.grad[~batch.mask], **_gradients(model)}
    return found


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def reference(model: nn.Module, batch: Batch, training: bool) -> dict[str, Tensor]:
    """`results` of torch's encoder in float64, one sequence at a time, without padding."""
    model = copy.deepcopy(model).double()
    model.zero_grad()
    torch.backends.mha.set_fastpath_enabled(False)
    outs, grads = [], []
    for x, mask, grad in zip(batch.x.detach(), batch.mask, batch.grad, strict=True):
        leaf = x[~mask].double()[None].requires_grad_()
        with torch.set_grad_enabled(training):
            out = model(leaf)
        outs.append(out.detach()[0])
        if training:
            out.backward(grad[~mask].double()[None])
            grads.append(leaf.grad)
    found = {"output": torch.cat(outs)}
    return {**found, "input": torch.cat([g[0] for g in grads if g is not None]), **_gradients(model)} if training else found


def verify(
    calls: dict[str, tuple[nn.Module, Callable[[Batch], Tensor]]], truth: dict[str, Tensor], batch: Batch, training: bool
) -> dict[str, float]:
    """Raise AssertionError unless all results are as near to float64 as torch's are; the errors of the outputs, by contestant.

    It is the warm-up too: every contestant runs once.
    """
    plain = results(*calls[OFF], batch, training)
    errors = {}
    for name, contestant in calls.items():
        found = plain if name == OFF else results(*contestant, batch, training)
        for what, got in found.items():
            assert_within_budget(got, truth[what], plain[what], gradient=what != "output", what=f"{name}, {what}")
        errors[name] = float(f"{float((found['output'] - truth['output']).abs().max()):.2g}")
    return errors


# -------------------------------------------------------------------- timed


def bench(workload: Workload, dtype: str, directions: list[str], budget: float, device: str = "cpu") -> Iterator[dict[str, Any]]:
    """One row for each direction, as soon as it is there."""
    batch = Batch.of(workload.key_padding_mask, DTYPES[dtype], device)
    theirs, ours = encoders(DTYPES[dtype], device)
    truth = reference(theirs, batch, training="training" in directions)  # without dropout, evaluation has the same outputs
    for direction in directions:
        training = direction == "training"
        calls = contestants(theirs.train(training), ours.train(training), training)
        errors = verify(calls, truth, batch, training)
        timed: dict[str, Callable[[], object]] = {name: partial(call, batch) for name, (_, call) in calls.items()}
        timings = interleave({**timed, AGAIN: timed[OFF]}, warm_up=0, least=0, budget=budget, device=device)
        judged = torch.get_num_threads() == 2 and device == "cpu"
        yield {
            "threads": torch.get_num_threads(),
            "dtype": dtype,
            "workload": workload.name,
            "direction": direction,
            "batch": str(workload),
            "milliseconds": {name: round(t.seconds * 1e3, 3) for name, t in timings.items()},
            "spread": {name: round(t.spread, 3) for name, t in timings.items()},
            "ratio": {name: round(ratio(timings[OFF], timings[name]), 3) for name in timings if name != OFF},
            "ratio_on": None if training else round(ratio(timings[ON], timings[OURS]), 3),
            "error": errors,
            "rounds": len(timings[OFF].rounds),
            "foreign": round(timings[OFF].foreign, 3),
            "goal": GOALS.get((dtype, direction), {}).get(workload.name) if judged else None,
            "floor": FLOORS.get(workload.name) if judged else None,
        }


# -------------------------------------------------------------------- memory


class MaskedAttention(nn.Module):
    """One attention layer as people write it: linear, `F.scaled_dot_product_attention` with a mask, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        q, k, v = self.inside(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=~src_key_padding_mask[:, None, None])
        result: Tensor = self.outside(out.transpose(1, 2).flatten(2))
        return result


class OurAttention(VarlenMultiheadAttention):
    """Called as an encoder is."""

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:  # type: ignore[override]  # one signature for all contestants
        return super().forward(x, key_padding_mask=src_key_padding_mask)[0]


def take_memory(what: str, contestant: str, dtype: str, direction: str) -> float:
    """Megabytes that one call on w4 takes beyond model, inputs and, in training, the gradients of the step before. In this process."""
    if what == "encoder":
        theirs, ours = encoders(DTYPES[dtype])
        model: nn.Module = ours if contestant == OURS else theirs
        del theirs, ours
    else:
        model = (OurAttention(WIDTH, HEADS, batch_first=True) if contestant == OURS else MaskedAttention()).to(DTYPES[dtype])
    training = direction == "training"
    call = partial(step, model.train(training), fast_path=contestant != MASKED, training=training)
    workload = next(w for w in WORKLOADS if w.name == "w4")
    batch = Batch.of(workload.key_padding_mask, DTYPES[dtype])
    call(Batch.of(torch.arange(16) >= torch.tensor([[16], [9]]), DTYPES[dtype]))  # what is set up once is not of this call
    return peak_extra(partial(call, batch)) / 1e6


def bench_memory(what: str, dtype: str, direction: str) -> dict[str, Any]:
    """A row; each contestant in a fresh process, because an allocator keeps what it once had."""
    names = [MASKED, ON, OURS] if what == "encoder" and direction == "eval" else [MASKED, OURS]
    threads = torch.get_num_threads()
    found = {}
    for name in names:
        command = [sys.executable, "-m", "benchmarks.bench_encoder", "--threads", str(threads), "--take", what, name, dtype, direction]
        found[name] = round(float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout), 1)
    share = round(found[OURS] / found[MASKED], 3)
    ran = choose(Problem(device_type="cpu", dtype=DTYPES[dtype])).backend
    return {"what": what, "dtype": dtype, "direction": direction, "megabytes": found, "ratio": share, "goal": MEMORY_GOAL, "backend": ran}


# -------------------------------------------------------------------- command line


def _times(options: argparse.Namespace) -> None:
    names = {"eval": options.workload or [w.name for w in WORKLOADS], "training": options.workload or TRAINED}
    for dtype in options.dtype:
        for workload in WORKLOADS:
            directions = [d for d in options.direction if workload.name in names[d]]
            for row in bench(workload, dtype, directions, options.budget, options.device) if directions else ():
                save("encoder", [row], ("threads", "dtype", "workload", "direction"), options.device)
                shown = (row["milliseconds"], "ratios", row["ratio"], "others", row["foreign"], "rounds", row["rounds"])
                print(f"{dtype:9} {workload.name} {row['direction']:9}", *shown, flush=True)
    print("written: benchmarks/results/encoder.json")


def _memory(options: argparse.Namespace) -> None:
    for what in ("attention layer", "encoder"):
        for dtype in options.dtype:
            for direction in options.direction:
                row = bench_memory(what, dtype, direction)
                save("memory", [row], ("what", "dtype", "direction"))
                print(row, flush=True)
    print("written: benchmarks/results/memory.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs="+", choices=["times", "memory"], default=["times", "memory"])
    names = [w.name for w in WORKLOADS]
    parser.add_argument("--workload", nargs="+", choices=names, help=f"all in evaluation, {', '.join(TRAINED)} in training, unless named")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    add_machine(parser, budget=30.0)
    parser.add_argument("--take", nargs=4, help=argparse.SUPPRESS)  # one contestant of the memory table, in a process of its own
    options = parser.parse_args()
    use_machine(options.device, options.threads)
    if options.device == "cuda":
        options.part = ["times"]  # memory of a GPU is in bench_length
    if options.take:
        print(take_memory(*options.take))
        return
    for part, run in (("times", _times), ("memory", _memory)):
        if part in options.part:
            run(options)


if __name__ == "__main__":
    main()
