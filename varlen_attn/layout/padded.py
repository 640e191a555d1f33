"""A layout that packs nothing: for calls that compute padding too, because their graph may not depend on data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from ..errors import LayoutError
from .seq_layout import SeqLayout, layout_of_all


@dataclass(frozen=True, eq=False, repr=False)
class PaddedRows(SeqLayout):
    """A layout whose T = B*S rows are the padded ones, in their order.

    Attributes:
        padding: ``(B, S)``, True where a row is no token; None: nowhere.
    """

    padding: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, padding: Tensor | None) -> PaddedRows:
        """For ``x (B, S, ...)``."""
        every = layout_of_all(x.shape[0], x.shape[1], x.device)
        known = {f.name: getattr(every, f.name) for f in fields(every)}
        if padding is not None:
            known |= {"gather_indices": torch.where(padding.flatten(), 0, every.gather_indices), "has_holes": None, "right_padded": None}
        return cls(**known, padding=padding)

    @property
    def is_dense(self) -> bool:
        return self.padding is None

    @property
    def positions(self) -> Tensor:
        return self.counts().clamp(min=0).flatten()

    def padding_mask(self) -> Tensor:
        if self.padding is None:
            return torch.zeros(self.batch_size, self.padded_len, dtype=torch.bool, device=self.device)
        return self.padding

    def valid_rows(self) -> Tensor:
        return ~self.padding_mask().flatten()

    def pack(self, x: Tensor) -> Tensor:
        # By way of one dimension, because torch.export guards on the stride of merged dimensions, and refuses named ones for it.
        return self._filled(x, 0.0).reshape(-1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    def unpack(self, x: Tensor, pad_value: float | Literal["edge"] = 0.0) -> Tensor:
        x_BS = x.reshape(self.batch_size, self.padded_len, *x.shape[1:])
        if self.padding is None or not isinstance(pad_value, str):
            return self._filled(x_BS, pad_value)
        return x_BS.where(~self._wide(x_BS), self._edges(pad_value).rows_of(x.detach()).view_as(x_BS))

    def _check_tensors(self, *, again: bool = False, traced: bool = False) -> None:
        """They are made from sizes, in the graph that uses them."""

    def _filled(self, x: Tensor, value: Any) -> Tensor:
        return x if self.padding is None else x.masked_fill(self._wide(x), value)

    def _wide(self, x: Tensor) -> Tensor:
        return self.padding_mask().view(self.batch_size, self.padded_len, *[1] * (x.dim() - 2))

    def _not_here(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise LayoutError(
            "while exporting, modules see padded rows, which have no offsets of sequences: use `pack`, `unpack`, `positions`, `valid_rows` "
            "and `varlen_attention`, or build a SeqLayout from the mask."
        )

    pool = split = to_nested = compact = downsample = update_ = _not_here
