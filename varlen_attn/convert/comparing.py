"""`compare`: does a model gain by `enable` on a batch of yours, and does it stay equal?

::

    as it came ─► run ─┐                                 ┌─► profile: kernels and memory ─┐
                       ├─► gaps, by what rounding explains                                ├─► time, in turns ─► Comparison
    converted ──► run ─┘                                 └─► profile                     ─┘
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from .._state import undone
from ..attention.records import Record, record
from ..data.batches import inputs_of, tensors_in
from ..errors import VarlenWarning
from ..layout.shown import Shown, table
from .enabling import _check, _found, _go, disable, enable
from .equality import Difference, evaluated, forwarded, gaps, learned, run_given, with_idle
from .report import Report
from .timing import Timing, interleave, ratio, unsure

LEAST = 0.03  # of a gain that is worth a word, beside what the times vary by
SECONDS = 10.0  # of timing


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """A model as it came and converted, on one batch. ``print`` it.

    Attributes:
        report: what `enable` did to which module.
        results: how far each result is from what it was; in training also the loss, and the gradient of each parameter.
        padding: share of the batch that is padding; None where neither the batch nor a layout says so.
        times: of a call, "before" and "after"; in training with its backward pass.
        logs: the attention calls of ours, likewise, with kernels and the most memory that was taken at once, as a profiler saw them.
        train: whether it was run in training.

    Examples:
        >>> found = compare(nn.Linear(4, 4), torch.randn(2, 4))
        >>> found.verdict
        'leave it: nothing was converted'
    """

    report: Report
    results: tuple[Difference, ...]
    padding: float | None
    times: dict[str, Timing]
    logs: dict[str, Record]
    train: bool

    @property
    def log(self) -> Record:
        """The attention calls of the converted model."""
        return self.logs["after"]

    @property
    def equal(self) -> bool:
        """Whether rounding explains all differences, those at padding left aside."""
        return all(x.at_padding or x.gap.explained for x in self.results)

    @property
    def speedup(self) -> float:
        """How many times faster the converted model is."""
        return ratio(self.times["before"], self.times["after"])

    @property
    def verdict(self) -> str:
        """In one sentence."""
        spread = sum(time.spread for time in self.times.values())
        if not self.equal:
            worst = max((x for x in self.results if not x.at_padding), key=lambda x: x.gap.share)
            return f"not equal: {worst}; enable(model, example=batch) leaves what differs as it came"
        if not self.report.converted:
            return f"leave it: nothing was converted{''.join(f' ({m.reason})' for m in self.report.modules[:1])}"
        if all(call.backend == "dense" for call in self.log):
            why = next((call.reason for call in self.log), "no converted module attends in this batch")
            return f"leave it: {'nothing is padded' if self.padding == 0 else why}"
        if self.speedup > 1 + LEAST + spread:
            return f"{self.speedup:.2g}x faster, equal at tokens"
        return f"leave it: no faster ({self.speedup:.2f}x, and the times vary by {spread:.0%})"

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        parts = {name: getattr(self, name) for name in ("verdict", "equal", "speedup", "padding", "train")}
        for name, log in self.logs.items():
            parts[name] = {"memory": log.peak, "kernels": log.kernels, **asdict(self.times[name])}
        return parts | {"results": [asdict(x) for x in self.results]} | self.report.as_dict()

    def __str__(self) -> str:
        elsewhere = [str(x) for x in self.results if x.at_padding]
        farthest = max((x for x in self.results if not x.at_padding), key=lambda x: x.gap.share, default="nothing is returned")
        rows = [
            ("padding", "unknown: the batch has no mask" if self.padding is None else f"{self.padding:.0%} of the batch"),
            (
                "time",
                ", ".join(f"{x.seconds * 1e3:.1f} ms +- {x.spread:.0%} {name}" for name, x in self.times.items()),
            ),
            ("memory", ", ".join(f"{(log.peak or 0) / 1e6:.1f} MB {name}" for name, log in self.logs.items()) + " at its peak"),
            *(("kernels", f"{name}: {', '.join(log.kernels or ['none known'])}") for name, log in self.logs.items()),
            ("equality", f"{farthest}{' (of all results the farthest)' if len(self.results) - len(elsewhere) > 1 else ''}"),
            *(("elsewhere", text) for text in elsewhere),
            *((m.action, f"{m.module or '(the model)'}: {m.reason}") for m in self.report.modules if m.reason),
            *(("padded", reason) for reason in {c.reason: None for c in self.log if c.backend == "dense" and c.reason}),
        ]
        return "\n".join(filter(None, [self.verdict, table(rows, "<<", "  "), unsure(max(x.foreign for x in self.times.values()))]))


def compare(model: nn.Module, batch: Any, *, train: bool = False, progress: Callable[[str], object] = lambda what: None) -> Comparison:
    """A model as it came and converted by `enable`, on a batch of yours: equality, time, memory, kernels, and a verdict in one sentence.

    The model, its gradients and random states are left as they were. A model that is enabled already is compared as it is with what it was.

    Args:
        model: as for `enable`.
        batch: for the model's forward: a dict of keywords, a tuple of arguments or a tensor.
        train: compare the loss and all gradients too, and time a training step without an optimizer. The loss is that of the model, or the
            mean square of what it returns at tokens. Results are compared in evaluation, because dropout draws other numbers.
        progress: called with what is done next.

    Returns:
        ``print`` it; ``.verdict`` is the sentence.

    Raises:
        ArgumentError: ``model`` is no module, or does not take ``batch``; or nothing in it learns, with ``train``.

    Examples:
        >>> layer = nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
        >>> found = compare(layer, {"src": torch.randn(2, 5, 16), "src_key_padding_mask": torch.arange(5) >= torch.tensor([5, 3])[:, None]})
        >>> found.equal, round(found.padding, 2)
        (True, 0.2)
    """
    _check(model)
    inputs, came = inputs_of(batch, "batch"), _found(model)
    device = next((x.device.type for x in (*model.parameters(), *tensors_in(inputs))), "cpu")
    with undone(partial(_go, model, came)), warnings.catch_warnings():
        warnings.simplefilter("ignore", VarlenWarning)
        progress("converting")
        if came:  # what was done is what is undone
            rows = disable(model).modules
            report = Report(tuple(replace(m, action="converted") if m.action == "restored" else m for m in rows))
        else:
            report = enable(model)
        states = {"before": [], "after": came or _found(model)}

        def use(name: str) -> None:
            progress(f"the model {'as it came' if name == 'before' else 'converted'}")
            _go(model, states[name])

        def each(what: Callable[[], Any]) -> dict[str, Any]:
            found = {}
            for name in states:
                use(name)
                found[name] = what()
            return found

        def step(profiled: bool = True) -> Any:
            with evaluated(model, training if profiled else False), record(model, kernels=profiled) as log:
                learnt = call()
            return log if profiled else learnt

        runs = each(partial(run_given, model, inputs, "batch"))
        masks = [mask for run in runs.values() for mask in run.masks]
        training: bool | None = False
        report = replace(report, modules=tuple(with_idle(report.modules, runs["after"].log.idle)))
        results, call = gaps(*runs.values()), partial(forwarded, model, inputs)
        if train:
            training, call = None if model.training else True, partial(learned, model, inputs, masks)
            learnt = each(partial(step, False))
            results += gaps(*(replace(run, results=(learnt[name],)) for name, run in runs.items()))
        logs = each(step)
        with evaluated(model, training):
            times = interleave({"before": call, "after": call}, prepare=use, warm_up=1, budget=SECONDS, fewest=3, device=device)
    real = [float(mask.float().mean()) for mask in runs["before"].masks or masks if mask.numel()]
    return Comparison(report, tuple(results), 1 - sum(real) / len(real) if real else None, times, logs, train)
