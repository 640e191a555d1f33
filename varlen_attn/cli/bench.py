"""``python -m varlen_attn bench``: an attention layer on this machine, by torch's own means and by ours, forward and with the backward.

Every contestant is the same layer (linear, attention, linear; same weights; padded in, padded out). Each is compared with float64 first,
output and all gradients, and only then timed, in turns. `facts` measures, and says each contest for people as soon as it is there.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.dispatch import backends
from ..attention.profile import kernel_ran
from ..attention.records import record
from ..convert.timing import PATIENCE, interleave, unsure
from ..convert.timing import facts as timed
from ..layout.shown import table
from ..nn.multihead import VarlenMultiheadAttention
from ..testing import assert_within_budget
from .environment import headline, machine

BASE, UNMASKED, THEIRS, FAST, OURS, AGAIN = (
    "masked SDPA", "SDPA, no mask", "nn.MultiheadAttention", "nn.MultiheadAttention, fast path", "ours", "masked SDPA again",
)  # fmt: skip
DIRECTIONS = ("forward", "forward+backward")
WIDTH, HEADS = 256, 4


@dataclass(frozen=True)
class Batch:
    """Lengths of the rows, the padded length, and what it is an example of."""

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


@dataclass(frozen=True)
class Example:
    """``x (B, S, D)``, a leaf; the padding mask ``(B, S)``; and a gradient of the output, which is 0 at padding."""

    x: Tensor
    mask: Tensor
    grad: Tensor


@dataclass(frozen=True)
class Contestant:
    """A module, and how it is called: ``call(module, x, mask) -> (B, S, D)``, with torch's fast path on or off."""

    module: nn.Module
    call: Callable[[nn.Module, Tensor, Tensor], Tensor]
    fast_path: bool = True

    def run(self, example: Example, training: bool) -> tuple[Tensor, ...]:
        """What is timed: the output, and in training the gradients of x and of every parameter."""
        torch.backends.mha.set_fastpath_enabled(self.fast_path)
        with torch.set_grad_enabled(training):
            out = self.call(self.module, example.x, example.mask)
            if not training:
                return (out,)
            return out.detach(), *torch.autograd.grad(out, (example.x, *self.module.parameters()), example.grad)

    def results(self, example: Example, training: bool) -> dict[str, Tensor]:
        """What `run` returns, by name; of the output and the gradient of x the real tokens."""
        self.module.train(training)
        names = ["output", "gradient of x", *(f"gradient of {name}" for name, _ in self.module.named_parameters())]
        found = dict(zip(names, self.run(example, training), strict=False))
        return found | {name: found[name][~example.mask] for name in names[:2] if name in found}


def attention(module: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """How `nn.MultiheadAttention` and modules like it are called."""
    out: Tensor = module(x, x, x, key_padding_mask=mask, need_weights=False)[0]
    return out


def contest(contestants: Mapping[str, Contestant], example: Example, training: bool, **options: Any) -> dict[str, Any]:
    """Times in turns, as `facts` of `timing`; the first contestant is the baseline. ``options`` are those of `interleave`."""
    for contestant in contestants.values():
        contestant.module.train(training)
    calls = {name: partial(contestant.run, example, training) for name, contestant in contestants.items()}
    return timed(interleave(calls, warm_up=0, **options), next(iter(calls)))


@contextmanager
def quiet() -> Iterator[None]:
    """torch's fast path is afterwards as it was before. Inside, nothing warns or logs: torch says that its fast path and nested tensors are
    prototypes, and why others of its kernels did not run."""
    fast_path, silent = torch.backends.mha.get_fastpath_enabled(), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(silent)
        torch.backends.mha.set_fastpath_enabled(fast_path)


class ByHand(nn.MultiheadAttention):
    """The layer as people write it, with the weights of `nn.MultiheadAttention`."""

    def forward(self, x: Tensor, key_padding_mask: Tensor | None) -> Tensor:  # type: ignore[override]  # one signature for all
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        keep = None if key_padding_mask is None else ~key_padding_mask[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        result: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return result


def _example(batch: Batch, setting: Setting) -> Example:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(batch.padded_len) >= torch.tensor(batch.lengths)[:, None]
    x = torch.randn(*mask.shape, setting.width, generator=generator).masked_fill(mask[..., None], 0)
    grad = torch.randn(x.shape, generator=generator).masked_fill(mask[..., None], 0)
    x, mask, grad = x.to(setting.device, setting.dtype), mask.to(setting.device), grad.to(setting.device, setting.dtype)
    return Example(x.requires_grad_(), mask, grad)


def _layer(setting: Setting, kind: type[nn.MultiheadAttention], **options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    layer = kind(setting.width, setting.heads, batch_first=True, **options)
    nn.init.normal_(layer.in_proj_bias, std=0.02)
    return layer.to(setting.device, setting.dtype)


def _ours(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    out: Tensor = layer(x, key_padding_mask=mask)[0]
    return out


def _contestants(batch: Batch, setting: Setting, example: Example, training: bool) -> tuple[dict[str, Contestant], dict[str, str]]:
    """By name, the baseline first; and the reasons of those that are not here."""
    by_hand = Contestant(_layer(setting, ByHand), lambda layer, x, mask: layer(x, mask))
    theirs = Contestant(_layer(setting, nn.MultiheadAttention), attention)
    found = {BASE: by_hand, THEIRS: replace(theirs, fast_path=False)}
    if not training:
        found[FAST] = theirs
    if batch.fill == 1:
        found[UNMASKED] = replace(by_hand, call=lambda layer, x, mask: layer(x, None))
    absent = {}
    for row in backends():
        name = f"{OURS}, {row['name']}"
        ours = Contestant(_layer(setting, VarlenMultiheadAttention, backend=row["name"]), _ours)
        reason = _OMITTED.get(row["name"]) if row["available"] else row["reason"]
        reason = reason or _failure(partial(ours.results, example, training))
        if reason is None:
            found[name] = ours
        else:
            absent[name] = reason
    return found, absent


def _failure(call: Callable[[], object]) -> str | None:
    """Why the call cannot be made: the backend refuses this dtype, or what it needs fails."""
    try:
        call()
    except RuntimeError as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


_OMITTED = {"reference": "the specification, which is not meant to be fast"}


# -------------------------------------------------------------------- measured


def rows(batches: Sequence[Batch], setting: Setting, directions: Sequence[str] = DIRECTIONS) -> Iterator[dict[str, Any]]:
    """One contest for each batch and direction, as soon as it is there."""
    for batch in batches:
        example = _example(batch, setting)
        trained = DIRECTIONS[1] in directions  # without dropout, evaluation has the same outputs
        exact, plain = (_specification(example, setting, dtype, trained) for dtype in (torch.float64, setting.dtype))
        for direction in directions:
            training = direction == DIRECTIONS[1]
            with quiet():
                calls, absent = _contestants(batch, setting, example, training)
                for name, contestant in calls.items():
                    for what, got in contestant.results(example, training).items():
                        assert_within_budget(got, exact[what], plain[what], gradient=True, what=f"{name}, {what}")
                kernels = {name: named_kernel(partial(contestant.run, example, training)) for name, contestant in calls.items()}
                measured = contest(
                    calls | {AGAIN: calls[BASE]}, example, training,
                    rounds=setting.rounds, budget=setting.budget, patience=PATIENCE, device=setting.device,
                )  # fmt: skip
            says = {"batch": str(batch), "name": batch.name, "direction": direction}
            yield says | measured | {"kernel": kernels, "absent": absent}


def _specification(example: Example, setting: Setting, dtype: torch.dtype, training: bool) -> dict[str, Tensor]:
    """The results of the reference backend, one sequence at a time, without padding."""
    layer = _layer(setting, VarlenMultiheadAttention, backend="reference").to(dtype)
    same = Example(example.x.detach().to(dtype).requires_grad_(), example.mask, example.grad.to(dtype))
    return Contestant(layer, attention).results(same, training)


def named_kernel(step: Callable[[], object]) -> str:
    """As the profiler saw it; of our own ops also which kernel they say that they called."""
    with record() as log:
        seen = kernel_ran(step)
    return f"{seen}: {log.calls[-1].kernel}" if log.calls and seen.startswith("varlen_attn::") else seen


def facts(batches: Sequence[Batch], setting: Setting, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Everything that is measured, as plain values; ``say`` gets every contest as text, as soon as it is there."""
    layer = f"width {setting.width}, {setting.heads} heads, {str(setting.dtype).removeprefix('torch.')}, {setting.device}"
    found: dict[str, Any] = {"environment": machine(), "layer": layer, "rows": []}
    say(
        f"{headline(found['environment'])}\n"
        f"One attention layer, {layer}; padded in, padded out. All were compared with float64 before they were timed, in turns.\n"
        "Times faster: than a layer written with F.scaled_dot_product_attention and a bool mask.\n"
    )
    for row in rows(batches, setting):
        found["rows"].append(row)
        say(_table(row))
    say(_remarks(found["rows"]))
    return found


def _table(row: dict[str, Any]) -> str:
    cells = [("", "ms", "+-", "faster", "kernel")]
    for name, taken in row["milliseconds"].items():
        times = f"{row['ratio'][name]:.2f}" if name in row["ratio"] else ""
        spread = "once" if name in row["once"] else f"{row['spread'][name]:.0%}"
        cells.append((name, f"{taken:.2f}", spread, times, row["kernel"].get(name, "")))
    return f"{row['batch']}; {row['direction']}\n{table(cells, '<>>><', '  ')}\n"


def _remarks(found: list[dict[str, Any]]) -> str:
    absent = {name: reason for row in found for name, reason in row["absent"].items()}
    lines = ["Not here:", *(f"  {name}: {reason}" for name, reason in absent.items())]
    if any(row["once"] for row in found):
        lines.append(f"Once: more than {PATIENCE:g} times slower than the baseline, so timed once, outside of the turns.")
    return "\n".join(filter(None, [*lines, unsure(max(row["foreign"] for row in found))]))
