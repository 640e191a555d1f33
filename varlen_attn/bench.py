"""``python -m varlen_attn bench``: an attention layer on this machine, by torch's own means and by ours, forward and with the backward.

Every contestant is the same layer (linear, attention, linear; same weights; padded in, padded out). Each is compared with float64 first,
output and all gradients, and only then timed, in turns. `facts` measures, `text` says it for people.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._profile import kernel_ran
from ._timing import PATIENCE, cpu_name, interleave
from ._timing import facts as contest_facts
from .dispatch import backends
from .explain import environment
from .functional import varlen_mha
from .layout import SeqLayout
from .modules import VarlenMultiheadAttention
from .records import record
from .testing import assert_within_budget

__all__ = ["BASE", "DIRECTIONS", "Batch", "ByHand", "Setting", "batch_of_fill", "facts", "named_kernel", "rows", "some_batches", "text"]

BASE, UNMASKED, THEIRS, FAST, OURS, AGAIN = (
    "masked SDPA", "SDPA, no mask", "nn.MultiheadAttention", "nn.MultiheadAttention, fast path", "ours", "masked SDPA again",
)  # fmt: skip
DIRECTIONS = ("forward", "forward+backward")
WIDTH, HEADS = 256, 4
BUSY = 0.1  # share of the machine taken by others, above which times are called unsure


@dataclass(frozen=True)
class Batch:
    """Lengths of the rows, the padded length, and what it stands for."""

    name: str
    lengths: tuple[int, ...]
    padded_len: int

    @property
    def fill(self) -> float:
        return sum(self.lengths) / (len(self.lengths) * self.padded_len)

    def __str__(self) -> str:
        return f"{self.name}: B {len(self.lengths)}, S {self.padded_len}, {1 - self.fill:.0%} padding"


def some_batches(quick: bool = False) -> list[Batch]:
    """Synthetic, from a fixed seed: a few long rows and many short ones, as text has; and one batch without padding."""
    if quick:
        return [Batch("sentences", _lognormal(32, 128, 30), 128), Batch("paragraphs", _lognormal(8, 512, 165), 512)]
    return [
        Batch("sentences", _lognormal(64, 128, 30), 128), Batch("paragraphs", _lognormal(16, 512, 165), 512),
        Batch("one long row", (1024, 150, 300, 200), 1024), Batch("no padding", (256,) * 8, 256),
    ]  # fmt: skip


def batch_of_fill(fill: float) -> Batch:
    """Lengths spread evenly around ``fill`` of the padded length, one of them full."""
    batch, padded_len, width = 16, 512, min(fill, 1 - fill)
    shares = [fill - width + 2 * width * (i + 0.5) / batch for i in range(batch - 1)]
    return Batch(f"fill {fill:g}", (*(max(1, round(padded_len * share)) for share in shares), padded_len), padded_len)


def _lognormal(batch: int, padded_len: int, middle: float) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.exp(torch.randn(batch, generator=generator) * 0.5 + math.log(middle)).round().clamp(4, padded_len).long()
    lengths[0] = padded_len
    return tuple(lengths.tolist())


@dataclass(frozen=True)
class Setting:
    """What all contests of a run have in common.

    Attributes:
        device, dtype: where, and in what.
        width, heads: of the layer.
        rounds, budget: quiet turns wanted, and seconds for one contest.
    """

    device: str
    dtype: torch.dtype
    width: int = WIDTH
    heads: int = HEADS
    rounds: int = 7
    budget: float = 3.0


# -------------------------------------------------------------------- contestants


class ByHand(nn.MultiheadAttention):
    """The layer as people write it, with the weights of `nn.MultiheadAttention`."""

    def forward(self, x: Tensor, key_padding_mask: Tensor | None) -> Tensor:  # type: ignore[override]  # one signature for all
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        keep = None if key_padding_mask is None else ~key_padding_mask[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        result: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return result


@dataclass(frozen=True)
class _Problem:
    """One batch of numbers: x, a leaf, and the gradient of the output, which is 0 at padding, both ``(B, S, D)``."""

    batch: Batch
    setting: Setting
    x: Tensor
    mask: Tensor
    grad: Tensor

    @classmethod
    def of(cls, batch: Batch, setting: Setting) -> _Problem:
        generator = torch.Generator().manual_seed(1)
        mask = torch.arange(batch.padded_len) >= torch.tensor(batch.lengths)[:, None]
        x, grad = (torch.randn(*mask.shape, setting.width, generator=generator).masked_fill(mask[..., None], 0) for _ in range(2))
        x, grad, mask = x.to(setting.device, setting.dtype), grad.to(setting.device, setting.dtype), mask.to(setting.device)
        return cls(batch, setting, x.requires_grad_(), mask, grad)

    def layer(self, kind: type[nn.MultiheadAttention], **options: Any) -> nn.MultiheadAttention:
        torch.manual_seed(0)
        layer = kind(self.setting.width, self.setting.heads, batch_first=True, **options)
        nn.init.normal_(layer.in_proj_bias, std=0.02)
        return layer.to(self.setting.device, self.setting.dtype)


Call = Callable[[], Tensor]


def _contestants(problem: _Problem, training: bool) -> tuple[dict[str, tuple[nn.Module, Call]], dict[str, str]]:
    """By name, the baseline first: whose parameters get gradients, and the call; and the reasons of who is not here."""
    x, mask = problem.x, problem.mask
    by_hand, theirs = problem.layer(ByHand).train(training), problem.layer(nn.MultiheadAttention).train(training)

    def of_torch(fast_path: bool) -> Tensor:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        out: Tensor = theirs(x, x, x, key_padding_mask=mask, need_weights=False)[0]
        return out

    found: dict[str, tuple[nn.Module, Call]] = {
        BASE: (by_hand, lambda: by_hand(x, mask)),
        THEIRS: (theirs, partial(of_torch, fast_path=False)),
    }
    if not training:
        found[FAST] = (theirs, partial(of_torch, fast_path=True))
    if problem.batch.fill == 1:
        found[UNMASKED] = (by_hand, lambda: by_hand(x, None))
    absent = {}
    for row in backends():
        name = f"{OURS}, {row['name']}"
        reason = row["reason"] if not row["available"] else _OMITTED.get(row["name"])
        ours = problem.layer(VarlenMultiheadAttention, backend=row["name"]).train(training)
        call = partial(_ours, ours, x, mask)
        reason = reason or _failure(call)
        if reason is None:
            found[name] = (ours, call)
        else:
            absent[name] = reason
    return found, absent


def _ours(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    out: Tensor = layer(x, key_padding_mask=mask)[0]
    return out


def _failure(call: Call) -> str | None:
    """Why the call can not be made: the backend refuses this dtype, or what it stands on breaks."""
    try:
        call()
    except RuntimeError as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


_OMITTED = {"reference": "the specification, which is not meant to be fast"}


def _step(layer: nn.Module, call: Call, problem: _Problem, training: bool) -> Tensor:
    """What is timed."""
    with torch.set_grad_enabled(training):
        if training:
            layer.zero_grad()
            problem.x.grad = None
        out = call()
        if training:
            out.backward(problem.grad)
    return out.detach()


# -------------------------------------------------------------------- verified


Results = dict[str, Tensor]


def _results(out: Tensor, layer: nn.Module, problem: _Problem, training: bool) -> dict[str, Tensor]:
    found = {"output": out[~problem.mask]}
    if training:
        assert problem.x.grad is not None
        found |= {"gradient of x": problem.x.grad[~problem.mask]}
        found |= {f"gradient of {name}": weight.grad for name, weight in layer.named_parameters() if weight.grad is not None}
    return found


def _specification(problem: _Problem, dtype: torch.dtype, training: bool) -> dict[str, Tensor]:
    """`_results` by the reference backend, one sequence at a time, without padding."""
    layer = problem.layer(nn.MultiheadAttention).to(dtype)
    same = _Problem(problem.batch, problem.setting, problem.x.detach().to(dtype).requires_grad_(), problem.mask, problem.grad.to(dtype))
    layout = SeqLayout.from_key_padding_mask(problem.mask)

    def call() -> Tensor:
        out: Tensor = varlen_mha(
            same.x, layout=layout, num_heads=problem.setting.heads, in_proj_weight=layer.in_proj_weight, in_proj_bias=layer.in_proj_bias,
            out_proj_weight=layer.out_proj.weight, out_proj_bias=layer.out_proj.bias, backend="reference",
        )  # fmt: skip
        return out

    return _results(_step(layer, call, same, training), layer, same, training)


def _verify(calls: dict[str, tuple[nn.Module, Call]], problem: _Problem, training: bool, truth: Results, plain: Results) -> None:
    """Raise AssertionError unless all results are as near to float64 as plain eager attention is."""
    for name, (layer, call) in calls.items():
        found = _results(_step(layer, call, problem, training), layer, problem, training)
        for what, got in found.items():
            assert_within_budget(got, truth[what], plain[what], gradient=True, what=f"{name}, {what}")


# -------------------------------------------------------------------- measured


def rows(batches: Sequence[Batch], setting: Setting, directions: Sequence[str] = DIRECTIONS) -> Iterator[dict[str, Any]]:
    """One contest for each batch and direction, as soon as it is there."""
    for batch in batches:
        problem = _Problem.of(batch, setting)
        trained = DIRECTIONS[1] in directions  # without dropout, evaluation has the same outputs
        exact, plain = (_specification(problem, dtype, trained) for dtype in (torch.float64, setting.dtype))
        for direction in directions:
            with _flags(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's fast path and nested tensors say that they are prototypes
                contest = _contest(problem, direction == DIRECTIONS[1], exact, plain)
            yield {"batch": str(batch), "name": batch.name, "direction": direction, **contest}


def _contest(problem: _Problem, training: bool, exact: Results, plain: Results) -> dict[str, Any]:
    calls, absent = _contestants(problem, training)
    _verify(calls, problem, training, exact, plain)
    steps: dict[str, Callable[[], object]] = {name: partial(_step, *pair, problem, training) for name, pair in calls.items()}
    kernels = {name: named_kernel(step) for name, step in steps.items()}
    setting = problem.setting
    timings = interleave(
        {**steps, AGAIN: steps[BASE]}, rounds=setting.rounds, warm_up=0, budget=setting.budget, patience=PATIENCE, device=setting.device
    )
    return {**contest_facts(timings, BASE), "kernel": kernels, "absent": absent}


def named_kernel(step: Callable[[], object]) -> str:
    """As the profiler saw it; of our own ops also which kernel they say that they called."""
    with record() as log:
        seen = kernel_ran(step)
    return f"{seen}: {log.calls[-1].kernel}" if log.calls and seen.startswith("varlen_attn::") else seen


@contextmanager
def _flags() -> Iterator[None]:
    """torch's fast path is switched off and on for the length of a contest; its loggers, which say why others of its kernels did not
    run, are silent."""
    before, silent = torch.backends.mha.get_fastpath_enabled(), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(silent)
        torch.backends.mha.set_fastpath_enabled(before)


def facts(batches: Sequence[Batch], setting: Setting, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Everything that is measured, as plain values; ``say`` gets every contest as text, as soon as it is there."""
    here = {name: value for name, value in environment().items() if name != "backends"} | {"cpu_name": cpu_name()}
    layer = f"width {setting.width}, {setting.heads} heads, {str(setting.dtype).removeprefix('torch.')}, {setting.device}"
    found: dict[str, Any] = {"environment": here, "layer": layer, "rows": []}
    say(_heading(found))
    for row in rows(batches, setting):
        found["rows"].append(row)
        say(_table(row))
    say(_remarks(found["rows"]))
    return found


def text(found: dict[str, Any]) -> str:
    """`facts`, for people."""
    return "\n".join([_heading(found), *map(_table, found["rows"]), _remarks(found["rows"])])


def _heading(found: dict[str, Any]) -> str:
    here = found["environment"]
    where = here["gpu"] or f"{here['cpu_name']} ({here['cpu']})"
    return (
        f"varlen_attn {here['varlen_attn']} on torch {here['torch']}, {where}, {here['threads']} threads\n"
        f"One attention layer, {found['layer']}; padded in, padded out. All were compared with float64 before they were timed, in turns.\n"
        f"Times faster: than a layer written with F.scaled_dot_product_attention and a bool mask.\n"
    )


def _table(row: dict[str, Any]) -> str:
    width = max(len(name) for name in (*row["milliseconds"], *row["absent"]))
    lines = [f"{row['batch']}; {row['direction']}", f"  {'':{width}} {'ms':>9} {'+-':>5} {'faster':>7}  kernel"]
    for name, taken in row["milliseconds"].items():
        times = f"{row['ratio'][name]:.2f}" if name in row["ratio"] else ""
        spread = "once" if name in row["once"] else f"{row['spread'][name]:.0%}"
        lines.append(f"  {name:{width}} {taken:9.2f} {spread:>5} {times:>7}  {row['kernel'].get(name, '')}".rstrip())
    return "\n".join([*lines, ""])


def _remarks(found: list[dict[str, Any]]) -> str:
    absent = {name: reason for row in found for name, reason in row["absent"].items()}
    lines = ["Not here:", *(f"  {name}: {reason}" for name, reason in absent.items())]
    if any(row["once"] for row in found):
        lines.append(f"Once: more than {PATIENCE:g} times slower than the baseline, so timed once, outside of the turns.")
    busiest = max(row["foreign"] for row in found)
    if busiest > BUSY:
        lines.append(f"Other processes took up to {busiest:.0%} of the machine, and they disturb threads that wait for each other.")
    return "\n".join(lines)
