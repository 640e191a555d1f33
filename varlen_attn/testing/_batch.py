"""A padded batch as a model is called with it: where its mask is, what one sample of it is, and the same batch with other padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._torch import pytree
from ..data.batches import Inputs, inputs_of, is_layout, map_tensors, masks_in, tensors_in
from ..errors import ArgumentError
from ..layout.seq_layout import SeqLayout


def _is_parts(name: str, value: Any) -> bool:
    """Lengths as parts of S."""
    return "len" in name and isinstance(value, Tensor) and value.dim() == 1 and value.is_floating_point()


def _looks_like_a_mask(x: Tensor) -> bool:
    """A float mask is 2-D and has two values; random numbers at padding would make it another mask."""
    return x.dim() == 2 and x.unique().numel() <= 2


@dataclass(frozen=True)
class PaddedBatch:
    """The arguments of a call and their mask. One row is repeated, because an axis of size 1 would not show itself."""

    inputs: Inputs
    real: Tensor  # (B, S) bool on the host
    batch_first: bool
    masks: frozenset[int]  # ids of the tensors that are masks: not poisoned, and (B, S) whatever `batch_first`
    samples: int  # rows of the batch as it was given

    @classmethod
    def of(cls, batch: Any, layout: SeqLayout | Tensor | None, batch_first: bool) -> PaddedBatch:
        inputs = inputs_of(batch, "batch")
        found = {name: x for name, x in masks_in(inputs).items() if not name.endswith("_attention_mask")}
        real = _real_tokens(inputs, found, layout, batch_first)
        self = cls(inputs, real, batch_first, _ids(found), real.shape[0])
        self._check()
        if self.samples != 1:
            return self
        copies = 2 if real.shape[1] != 2 else 3  # B = S would hide which is which
        inputs = self._take([0] * copies, None)
        return cls(inputs, real.repeat(copies, 1), batch_first, _ids(masks_in(inputs)), 1)

    def _check(self) -> None:
        tensors = tensors_in(self.inputs)
        if not any(self._axes(x)[1] or self._is_packed(x) for x in tensors if id(x) not in self.masks):
            raise ArgumentError(
                f"`batch` must have a tensor with the rows and columns of its mask, {tuple(self.real.shape)}, but has "
                f"{[tuple(x.shape) for x in tensors]}: pass `layout` for the columns of the input, not for frames made from them."
            )

    @property
    def device(self) -> torch.device:
        """Of the inputs: the first that is not the CPU."""
        devices = [x.device for x in tensors_in(self.inputs)]
        return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))

    @property
    def columns(self) -> list[Tensor]:
        """The real columns of every row."""
        return [row.nonzero().flatten() for row in self.real]

    @property
    def right_padded(self) -> bool:
        return not bool((self.real[:, 1:] & ~self.real[:, :-1]).any())

    def sample(self, i: int) -> Inputs:
        args, kwargs = self._take([i], self.columns[i])
        parts = {name: torch.ones_like(value) for name, value in kwargs.items() if _is_parts(name, value)}
        return args, kwargs | parts

    def poisoned(self) -> Inputs | None:
        """Random numbers as large as the others at padding of the floating inputs; None where there is no such place."""
        generator = torch.Generator().manual_seed(0)
        changed = False

        def fill(x: Tensor) -> Tensor:
            nonlocal changed
            row, times = self._axes(x)
            if row is None or len(times) != 1 or not x.numel() or not x.is_floating_point() or id(x) in self.masks or _looks_like_a_mask(x):
                return x
            padding = ~self.real if row < times[0] else ~self.real.T
            shape = [n if j in (row, *times) else 1 for j, n in enumerate(x.shape)]
            changed = changed or bool(padding.any())
            noise = torch.randn(x.shape, generator=generator).to(x) * x.detach().nan_to_num(0, 0, 0).abs().max().clamp(min=1)
            return torch.where(padding.reshape(shape).to(x.device), noise, x.detach())

        inputs = map_tensors(fill, self.inputs)
        return inputs if changed else None

    def _take(self, rows: list[int], columns: Tensor | None) -> Inputs:
        def cut(x: Any) -> Any:
            if isinstance(x, SeqLayout):
                mask = x.padding_mask().cpu()[rows]
                mask = mask[:, columns] if columns is not None and mask.shape[1] == self.real.shape[1] else mask
                return SeqLayout.from_key_padding_mask(mask, holes=x.holes, validate=False).to(x.device)
            if not isinstance(x, Tensor):
                return x
            if self._is_packed(x):
                sequences = x.split(self.real.sum(1).tolist())
                return torch.cat([sequences[row] for row in rows])
            row, times = self._axes(x)
            x = x if row is None else x.index_select(row, torch.tensor(rows, device=x.device))
            if columns is not None:
                for axis in times:
                    x = x.index_select(axis, columns.to(x.device))
            return x

        args, kwargs = pytree.tree_map(cut, self.inputs, is_leaf=is_layout)
        return args, kwargs

    def _is_packed(self, x: Tensor) -> bool:
        layouts = any(isinstance(v, SeqLayout) for v in (*self.inputs[0], *self.inputs[1].values()))
        return layouts and x.dim() > 0 and x.shape[0] == int(self.real.sum()) and not self._axes(x)[1]

    def _axes(self, x: Tensor) -> tuple[int | None, tuple[int, ...]]:
        """The axis of rows, and those of columns."""
        (rows, columns), shape = self.real.shape, x.shape
        time_first = rows != columns or (not self.batch_first and id(x) not in self.masks)
        if time_first and tuple(shape[:2]) == (columns, rows):
            return 1, (0,)
        times = tuple(j for j in range(1, x.dim()) if shape[j] == columns)
        if x.dim() and shape[0] in (rows, 1):  # rows, or what is the same for all of them
            if x.dtype != torch.bool:  # a second axis of S is a feature axis, where it is not a mask's
                times = times[:1] if 1 in times else tuple(j for j in times if j == x.dim() - 1)
            return (0 if shape[0] == rows else None), times
        return None, ((0, *times) if tuple(shape) in ((columns,), (columns, columns)) else ())


def _ids(found: dict[str, tuple[Any, Tensor]]) -> frozenset[int]:
    return frozenset(id(value) for value, _ in found.values())


def _real_tokens(inputs: Inputs, found: dict[str, tuple[Any, Tensor]], layout: SeqLayout | Tensor | None, batch_first: bool) -> Tensor:
    """``(B, S)``, True at tokens; everything that says it must say the same."""
    masks = {name: real.cpu() for name, (_, real) in found.items()}
    if layout is not None:
        layout = layout if isinstance(layout, SeqLayout) else SeqLayout.from_key_padding_mask(layout, validate=False)
        real = ~layout.padding_mask().cpu()
        masks = {"layout": real, **{name: mask for name, mask in masks.items() if mask.shape == real.shape}}
    elif not masks:
        masks = _lengths_in(inputs, batch_first)
    names = " and ".join(f"`{name}`" for name in masks)
    if not masks:
        raise ArgumentError(
            "`layout` must say which tokens are real, because `batch` does not, but is None: pass a SeqLayout, or a mask that is True "
            "at padding."
        )
    first, *others = masks.values()
    if any(not torch.equal(first, other) for other in others):
        raise ArgumentError(f"{names} must mark the same tokens, but do not: pass `layout` for one of them, padded to a length of its own.")
    return first


def _lengths_in(inputs: Inputs, batch_first: bool) -> dict[str, Tensor]:
    positional = {f"argument {i}": x for i, x in enumerate(inputs[0]) if isinstance(x, Tensor) and not x.is_floating_point()}
    found = {}
    for name, value in (positional | {k: v for k, v in inputs[1].items() if "len" in k}).items():
        if not isinstance(value, Tensor) or value.dim() != 1 or value.dtype == torch.bool:
            continue
        first, last = _sizes(inputs, len(value), batch_first)
        counts = (value * next(iter(first), 0)).round().long() if value.is_floating_point() else value
        longest = int(counts.max()) if counts.numel() else 0
        columns = next((n for n in (*first, *last) if n >= longest), None)
        if columns is None:
            continue
        if longest in last and longest not in first and columns in first and not value.is_floating_point():
            raise ArgumentError(
                f"`{name}` must show which axis of the inputs has the columns, but its largest length {longest} fits several sizes, "
                f"{(*first, *last)}: pass `layout=SeqLayout.from_lengths({name}, padded_len)`."
            )
        found[name] = torch.arange(columns) < counts.cpu()[:, None]
    return found


def _sizes(inputs: Inputs, rows: int, batch_first: bool) -> tuple[list[int], list[int]]:
    """What S may be: the sizes of the axis beside the rows, and those of the last axis, of inputs with channels first."""
    first, last = [], []
    for x in tensors_in(inputs):
        if x.dim() > 1 and x.shape[0] == rows and (batch_first or x.shape[1] != rows):
            first.append(x.shape[1])
            last.append(x.shape[-1])
        elif x.dim() > 1 and x.shape[1] == rows:
            first.append(x.shape[0])
    return first, last
