"""What `enable` says of each module."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Action = Literal["converted", "left alone", "built so", "restored"]


@dataclass(frozen=True)
class ModuleReport:
    """What happened to one module.

    Attributes:
        module: qualified name, "" for the model itself.
        kind: its class before, for example ``"TransformerEncoderLayer"``.
        action: "converted", "left alone", "built so" (one of our classes already) or "restored" (torch's class again).
        reason: why it was left alone, or what is worth knowing.
    """

    module: str
    kind: str
    action: Action
    reason: str


@dataclass(frozen=True)
class Report:
    """What happened to every attention module, layer and stack of a model."""

    modules: tuple[ModuleReport, ...]

    @property
    def converted(self) -> tuple[ModuleReport, ...]:
        return tuple(m for m in self.modules if m.action == "converted")

    @property
    def left_alone(self) -> tuple[ModuleReport, ...]:
        return tuple(m for m in self.modules if m.action == "left alone")

    def as_dict(self) -> dict[str, Any]:
        return {"modules": [asdict(m) for m in self.modules]}

    def __str__(self) -> str:
        if not self.modules:
            return "no attention module, layer or stack of torch's classes and no model of transformers was found, or none was enabled"
        rows = [(m.module or "(the model)", m.kind, m.action, m.reason) for m in self.modules]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows]
        counts = {action: sum(m.action == action for m in self.modules) for action in get_args(Action)}
        return "\n".join([*lines, ", ".join(f"{n} {action}" for action, n in counts.items() if n)])
