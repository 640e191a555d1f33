"""What `enable` says of each module."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..attention.dispatch import choose
from ..kernels.problem import Problem
from ..layout.shown import Shown, table

Action = Literal["converted", "left alone", "built so", "restored"]


@dataclass(frozen=True)
class ModuleReport:
    """What happened to one module.

    Attributes:
        module: qualified name, "" for the model itself.
        kind: its class before, for example ``"TransformerEncoderLayer"``.
        action: "converted", "left alone", "built so" (one of our classes already) or "restored" (torch's class again).
        reason: why it was left alone, or what is worth knowing.

    Examples:
        >>> print(enable(nn.TransformerEncoderLayer(16, 2)).modules[0])
        ModuleReport(module='', kind='TransformerEncoderLayer', action='converted', reason='')
    """

    module: str
    kind: str
    action: Action
    reason: str


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """What happened to every attention module, layer and stack of a model.

    Attributes:
        modules: one row for each.
        problem: what a call of the model will be like, as far as that is known: it says whether a faster kernel could be had.

    Examples:
        >>> report = enable(nn.TransformerEncoderLayer(16, 2))
        >>> [m.kind for m in report.converted], report.left_alone
        (['TransformerEncoderLayer', 'MultiheadAttention'], ())
    """

    modules: tuple[ModuleReport, ...]
    problem: Problem | None = field(default=None, compare=False)

    @property
    def converted(self) -> tuple[ModuleReport, ...]:
        """What skips padding now."""
        return tuple(m for m in self.modules if m.action == "converted")

    @property
    def left_alone(self) -> tuple[ModuleReport, ...]:
        """What computes padding as before, with the reasons."""
        return tuple(m for m in self.modules if m.action == "left alone")

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {"modules": [asdict(m) for m in self.modules]}

    def __str__(self) -> str:
        if not self.modules:
            return "the model has no attention of torch's classes and is no model of transformers: see docs/how-to/own-attention.md"
        rows = [(m.module or "(the model)", m.kind, m.action, m.reason) for m in self.modules]
        counts = Counter(m.action for m in self.modules)
        faster = choose(self.problem).faster if self.problem and self.converted else ""
        return "\n".join(filter(None, [table(rows, "<<<<"), ", ".join(f"{n} {action}" for action, n in counts.items()), faster]))
