"""What a backend is given beside query, key and value, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..layout.seq_layout import SeqLayout
from .problem import Semantics

ScoreBias = Tensor | Callable[[Tensor, Tensor, Tensor], Tensor]
Result = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class Extras:
    """The tensors of a call beside q, k, v; each None unless `Semantics` says that it is there.

    ``alibi_slopes (N,)`` and ``sinks (N,)`` are float32 (float64 for float64 inputs).

    Examples:
        >>> extras = Extras(sinks=torch.zeros(4))
        >>> len(extras.tensors)
        1
    """

    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    score_bias: ScoreBias | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """What of them is a tensor: a gradient reaches it, 0 where there is nothing to attend to."""
        return [x for x in (self.alibi_slopes, self.sinks, self.score_bias) if isinstance(x, Tensor)]

    def of_heads(self, first: int, count: int) -> Extras:
        """Those of some heads; no kernel that needs parts takes a score bias."""
        part = slice(first, first + count)
        return Extras(*(None if x is None else x[part] for x in (self.alibi_slopes, self.sinks)))


NO_EXTRAS = Extras()


class Call(NamedTuple):
    """One call beside its query, key and value."""

    layout_q: SeqLayout
    layout_kv: SeqLayout
    semantics: Semantics
    extras: Extras = NO_EXTRAS

    @property
    def layouts(self) -> tuple[SeqLayout, SeqLayout]:
        return self.layout_q, self.layout_kv

    def on(self, layout_q: SeqLayout, layout_kv: SeqLayout) -> Call:
        """The same call on other layouts."""
        return self._replace(layout_q=layout_q, layout_kv=layout_kv)
