"""`check_padding_invariance`: the first submodule that gives a sample other numbers in a padded batch than alone.

Every sample runs alone, cut to its tokens. Then the batch runs as it is, and once more with random numbers at padding of its floating
inputs, because zeros hide what reads them. Hooks on a copy of the model keep what enters and leaves each submodule. The first difference
in the order of the batch's run is the answer: where an output differs, that module; where an input does, the caller, who computed it.

Nothing is assumed of the order of axes. Two runs with other sizes show them: the batch's is B in the one and 1 in the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.results import farthest
from ..errors import ArgumentError
from ..layout.seq_layout import SeqLayout
from ..layout.shown import Shown
from ._batch import PaddedBatch
from ._recorder import Call, Event, Events, run_alone, run_batch, undisturbed

FIXES = (  # by a part of the class's name; the first that fits
    (("Conv",), "a convolution reads its neighbours: zero its input at padding, or convolve packed rows with varlen_conv1d"),
    (("BatchNorm", "GroupNorm", "InstanceNorm"), "its statistics count padding: normalise each token (nn.LayerNorm), or real tokens only"),
    (("Attention",), "tokens attend to padding: give it the mask (key_padding_mask, or a layout)"),
    (("Pool",), "it pools padding: fill its input at padding with what it ignores, or pool packed rows with SeqLayout.pool"),
    (("RNN", "LSTM", "GRU"), "a backward direction reads padding first: give it nn.utils.rnn.pack_padded_sequence"),
    (("",), "what is computed there reads padding or other samples: mask it"),
)

HOLES = "It has padding between its tokens, and alone has none: what counts columns or reads neighbours is only right without such holes."
HIDDEN = (
    "The batch as given shows nothing, random numbers at padding of its inputs do: zero the inputs there at the beginning of forward, "
    "or pass `poison=False` if callers promise zeros."
)


@dataclass(frozen=True, repr=False)
class InvarianceReport(Shown):
    """What `check_padding_invariance` compared and found equal; ``str()`` says it in a few lines.

    Attributes:
        compared: names of the submodule calls compared, in the order of their completion; ``""`` is the model.
        not_compared: the others, and why.
        skipped: samples without tokens.
        largest: the largest absolute difference.
        poisoned: whether the batch also ran with random numbers at padding of its inputs.
        dtype: that the model ran in.

    Examples:
        >>> report = check_padding_invariance(nn.Linear(4, 4), torch.randn(2, 5, 4), layout=SeqLayout.from_lengths([5, 3]))
        >>> report.poisoned, report.skipped
        (True, ())
    """

    compared: tuple[str, ...]
    not_compared: dict[str, str]
    skipped: tuple[int, ...]
    largest: float
    poisoned: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        how = ", also with random numbers at padding of the input" if self.poisoned else ""
        lines = [f"{len(self.compared)} module calls are the same alone and in the batch{how}: largest difference {self.largest:.2g}"]
        lines[0] += f" in {str(self.dtype).removeprefix('torch.')}"
        lines += [f"not compared: {name or 'the model'}, {why}" for name, why in self.not_compared.items()]
        lines += [f"skipped: samples {', '.join(map(str, self.skipped))}, which have no tokens"] if self.skipped else []
        return "\n".join(lines)


def check_padding_invariance(
    model: nn.Module,
    batch: Any,
    *,
    layout: SeqLayout | Tensor | None = None,
    tolerance: float = 1e-5,
    batch_first: bool = True,
    poison: bool = True,
) -> InvarianceReport:
    """Assert that a model gives every sample of a padded batch the same result as alone, whatever is at padding.

    It runs a copy of the model, in evaluation and in float64 (or its own dtype, where it cannot); the model, its mode and the random
    state stay. Every floating tensor of its outputs is compared where it can be: ``(B, S, ...)`` with the axes in any order, pooled,
    downsampled (with padding on the right), and packed. Samples without tokens are skipped. Alone, a sample has no padding between its
    tokens, so what counts columns there differs.

    Args:
        model: called as ``model(*batch)`` or ``model(**batch)``.
        batch: a tuple or list of positional arguments, a mapping of keyword arguments, or one tensor. ``(B, S, ...)``, ``(S, B, ...)``,
            ``(B, C, S)``, ``(B, ...)``, ``(S, S)``, packed ``(T, ...)`` and layouts are cut to a sample; the rest is passed as it is.
        layout: which tokens are real, a layout or a ``key_padding_mask`` (True is padding). Left out, it is found in the batch: a layout,
            the keyword ``attention_mask`` (1 is a token), one that ends in ``key_padding_mask``, a positional bool ``(B, S)`` (True is
            padding); else ``(B,)`` lengths, positional integers or a keyword with "len" (floats are parts of S).
        tolerance: the largest difference allowed, times the largest value of the sample where that is above 1; at least 16 rounding
            steps where the model does not run in float64.
        batch_first: which axis of an input is the batch's, where ``S == B`` leaves it open.
        poison: run the batch a second time, with random numbers at padding of its floating inputs. False for a model that is promised
            zeros there.

    Returns:
        What was compared.

    Raises:
        AssertionError: a valid output depends on padding or on other samples; the message names the first submodule, and a fix.
        ArgumentError: the mask is not found or does not fit, a sample does not run alone, the model is random in evaluation, or
            nothing could be compared.

    Examples:
        >>> layer = nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
        >>> batch = {"src": torch.randn(2, 5, 16), "src_key_padding_mask": torch.arange(5) >= torch.tensor([5, 3])[:, None]}
        >>> "linear1" in check_padding_invariance(layer, batch).compared
        True
    """
    given = PaddedBatch.of(batch, layout, batch_first)
    skipped = tuple(i for i in range(given.samples) if not len(given.columns[i]))
    if skipped and len(skipped) == given.samples:
        raise ArgumentError(
            "`batch` must have a token, but by its mask everything is padding: torch's key_padding_mask is True at padding, and a Hugging "
            "Face attention_mask is 1 at tokens and must be passed under that name."
        )
    if not given.samples:
        return InvarianceReport((), {}, skipped, 0.0, False, torch.float64)
    with undisturbed(given.device):
        recorder, whole = run_batch(model, given)
        # In half precision two shapes round differently; a leak is far above that.
        tolerance = tolerance if recorder.double else max(tolerance, 16 * torch.finfo(recorder.dtype).eps)
        alone = run_alone(recorder, given)
        comparison = _Comparison(alone, given, tolerance)
        poisoned = given.poisoned() if poison else None
        leak = comparison.first_leak(whole)
        hidden = leak is None and poisoned is not None
        if leak is None and poisoned is not None:
            leak = comparison.first_leak(recorder.run(poisoned))
        if leak is not None:
            _refuse_random(whole, recorder.run(given.inputs), leak.event, tolerance)
            raise AssertionError(leak.message(given, tolerance, hidden=hidden))
    own = comparison.not_compared.get("")
    if own is not None:
        raise ArgumentError(
            f"`model` must have an output that can be compared, but {own}: nothing says whether it depends on padding. "
            "Check the part of the model before that, or a batch that is padded on the right."
        )
    if not comparison.compared:
        raise ArgumentError(f"`model` must have an output that can be compared, but has none: {comparison.not_compared}.")
    others = comparison.not_compared | dict.fromkeys(recorder.unused(), "it is never called")
    return InvarianceReport(tuple(comparison.compared), others, skipped, comparison.largest, poisoned is not None, recorder.dtype)


def _refuse_random(whole: Events, again: Events, event: Event, tolerance: float) -> None:
    """Two runs of one batch, from different random states, must agree before padding is blamed."""
    once, twice = (run[key].tensors if (key := (event.kind, event.call)) in run else [] for run in (whole, again))
    if any(x.shape != y.shape or farthest(x, y)[0] > tolerance * _scale(y) for x, y in zip(once, twice, strict=False)):
        raise ArgumentError(
            f"`model` must be deterministic in evaluation, but {_label(event.blame)} gives one batch other numbers every time: "
            "pass `self.training` to F.dropout, or fix the seed inside."
        )


@dataclass(frozen=True)
class _Leak:
    event: Event
    sample: int
    size: float
    where: tuple[int, ...]

    def message(self, given: PaddedBatch, tolerance: float, *, hidden: bool) -> str:
        event, tokens, columns = self.event, len(given.columns[self.sample]), given.real.shape[1]
        inner = f"what it gives to {_label(event.call)}" if event.kind == "input" else "its output"
        own = "" if event.kind == "input" else event.module  # between two submodules anything may have been computed
        fix = next(fix for words, fix in FIXES if any(word in own for word in words))
        text = (
            f"{_label(event.blame)} ({event.module}) must not depend on {'other samples' if tokens == columns else 'padding'}, but {inner} "
            f"does: sample {self.sample} ({tokens} tokens of {columns} columns) differs by {self.size:.3g} from its run alone, there at "
            f"index {self.where}, allowed is {tolerance:g}: {fix}."
        )
        holes = bool((given.columns[self.sample].diff() > 1).any())
        return " ".join([text, *[HOLES] * holes, *[HIDDEN] * hidden])


class _Comparison:
    """Runs of the batch against the runs of its samples."""

    def __init__(self, alone: dict[int, Events], given: PaddedBatch, tolerance: float) -> None:
        self.alone, self.given, self.tolerance = alone, given, tolerance
        self.compared: list[str] = []
        self.not_compared: dict[str, str] = {}
        self.largest = 0.0

    def first_leak(self, whole: Events) -> _Leak | None:
        """The largest difference in the first event that has one above the tolerance."""
        self.compared, self.not_compared = [], {}
        times, times_alone = _calls(whole), {i: _calls(run) for i, run in self.alone.items()}
        for key, event in whole.items():
            name = event.call[0]
            runs = {i: run[key].tensors for i, run in self.alone.items() if times_alone[i][name] == times[name]}
            leaks, reason = self._leaks(event, runs)
            if leaks:
                return max(leaks, key=lambda leak: leak.size)
            if event.kind == "output" and reason:
                self.not_compared[_name(event.call)] = reason
            elif event.kind == "output":
                self.compared.append(_name(event.call))
        return None

    def _leaks(self, event: Event, runs: dict[int, list[Tensor]]) -> tuple[list[_Leak], str]:
        """What differs; why nothing could be compared, else nothing."""
        leaks: list[_Leak] = []
        reasons = [] if event.tensors else ["it returns no floating tensor"]
        runs = {i: tensors for i, tensors in runs.items() if len(tensors) == len(event.tensors)}
        if not runs:
            return leaks, "it is called another number of times, or returns another number of tensors"
        for k, batch in enumerate(event.tensors):
            alone = {i: tensors[k] for i, tensors in runs.items()}
            part = _part(batch, alone, self.given)
            if isinstance(part, str):
                reasons.append(part)
                continue
            for i, y in alone.items():
                size, where = farthest(part(i), y)
                self.largest = max(self.largest, size)
                if size > self.tolerance * _scale(y):
                    leaks.append(_Leak(event, i, size, where))
        return leaks, reasons[0] if len(reasons) >= max(1, len(event.tensors)) else ""


def _part(batch: Tensor, alone: dict[int, Tensor], given: PaddedBatch) -> Callable[[int], Tensor] | str:
    """What sample i has of a tensor of the batch: found from the sizes of the axes in all runs; a reason where they do not tell."""
    (rows, columns), real = given.real.shape, given.columns
    if batch.is_nested or any(y.dim() != batch.dim() for y in alone.values()):
        return "it returns a nested tensor, or alone another number of axes"
    sizes = {j: {i: y.shape[j] for i, y in alone.items()} for j in range(batch.dim())}
    of_rows = [j for j in sizes if batch.shape[j] == rows and set(sizes[j].values()) == {1}]
    other = [j for j in sizes if j not in of_rows and set(sizes[j].values()) != {batch.shape[j]}]
    tokens = {i: len(real[i]) for i in alone}
    if len(of_rows) > 1:
        return "two axes of its output could be the batch's: B = S, and no sample has two tokens"
    if not of_rows:
        return (
            _part_of_rows(batch, other, given) if len(other) == 1 and sizes[other[0]] == tokens else "no axis of its output is the batch's"
        )
    exact = all(batch.shape[j] == columns and sizes[j] == tokens for j in other)
    if not exact and not given.right_padded:
        return "its output has frames in place of columns, and padding is not on the right"
    if not exact and any(sizes[j] != sizes[other[0]] or max(sizes[j].values()) > batch.shape[j] for j in other):
        return "its output has axes of unknown meaning"

    def part(i: int) -> Tensor:
        x = batch.select(of_rows[0], i).unsqueeze(of_rows[0])
        for j in other:  # downsampled frames stand at the beginning, as their columns do
            x = x.index_select(j, (real[i] if exact else torch.arange(sizes[j][i])).to(x.device))
        return x

    return part


def _part_of_rows(batch: Tensor, axes: list[int], given: PaddedBatch) -> Callable[[int], Tensor] | str:
    """Tokens of all samples on one axis: packed ones, or all ``B*S``."""
    (rows, columns), total = given.real.shape, int(given.real.sum())
    size = batch.shape[axes[0]]
    if size == columns or size not in (total, rows * columns):
        return "no axis of its output is the batch's"
    index = given.real.flatten() if size == rows * columns else torch.ones(total, dtype=torch.bool)
    packed = index.nonzero().flatten().split(given.real.sum(1).tolist())
    return lambda i: batch.index_select(axes[0], packed[i].to(batch.device))


def _scale(y: Tensor) -> float:
    finite = y.abs()[y.isfinite()]
    return max(1.0, float(finite.max())) if finite.numel() else 1.0


def _calls(run: Events) -> Counter[str]:
    return Counter(name for kind, (name, _) in run if kind == "output")


def _name(call: Call) -> str:
    return call[0] + (f" (call {call[1]})" if call[1] > 1 else "")


def _label(call: Call) -> str:
    return f"`{_name(call)}`" if call[0] else "the model"
