"""`sequence_parallel`, and the rows that each rank has of a batch: split evenly, in order, through sequences.

Between `RankRows.part` and `RankRows.gathered` each rank computes its own rows, outside of them all compute the same. Gradients in
between are P times as large, for P ranks: parameters there have P times their part of the gradient, all others have all of it, so that
the mean over ranks is the gradient of one process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from .. import _state
from .._state import opened, state
from .._torch import all_to_all
from ..errors import ArgumentError, LayoutError
from ..layout.seq_layout import SeqLayout


@dataclass(frozen=True, eq=False)
class Ranks:
    """Who shares a batch, and which of them this process is."""

    group: Any
    size: int
    rank: int

    @classmethod
    def of(cls, mesh: Any) -> Ranks:
        """Of a `DeviceMesh` of one dimension, or a `ProcessGroup`."""
        from torch.distributed import ProcessGroup, get_rank, get_world_size

        group = mesh.get_group() if getattr(mesh, "ndim", 0) == 1 else mesh
        if not isinstance(group, ProcessGroup):
            raise ArgumentError(f"`mesh` must be a DeviceMesh of one dimension or a ProcessGroup of this process, but is {mesh!r}.")
        return cls(group, get_world_size(group), get_rank(group))

    def shares(self, total: int) -> list[int]:
        """How many of ``total`` each rank has, as `torch.tensor_split` cuts."""
        return [(total + self.size - 1 - rank) // self.size for rank in range(self.size)]  # no comparison, for graphs

    def slices(self, total: int) -> list[slice]:
        shares = self.shares(total)
        return [slice(sum(shares[:rank]), sum(shares[: rank + 1])) for rank in range(self.size)]

    def exchange(self, parts: Iterable[Tensor], sizes: list[int]) -> Tensor:
        """Send a part to each rank. Returns the numbers that came, ``sizes`` of them from each. Its backward is the reverse."""
        flat = [x.reshape(-1) for x in parts]
        return all_to_all(torch.cat(flat), sizes, [x.shape[0] for x in flat], self.group)


class _Part(torch.autograd.Function):
    """The rows of this rank, of rows that are the same on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: RankRows) -> Tensor:
        ctx.layout = layout
        return x[layout.mine].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layout.gathered(grad / ctx.layout.ranks.size), None


@dataclass(frozen=True, eq=False, repr=False)
class RankRows(SeqLayout):
    """The layout of a whole batch, of whose T rows this rank has some.

    Attributes:
        whole: of all rows.
        ranks: who shares them.
        mine: which of them this rank has, as `token_indices` says too. All else is of the whole batch.
    """

    whole: SeqLayout = None  # type: ignore[assignment]
    ranks: Ranks = None  # type: ignore[assignment, misc]
    mine: slice = None  # type: ignore[assignment]

    @classmethod
    def of(cls, layout: SeqLayout, ranks: Ranks) -> RankRows:
        mine = ranks.slices(layout.num_rows)[ranks.rank]
        known = {f.name: getattr(layout, f.name) for f in fields(layout)} | {"token_indices": layout.token_indices[mine]}
        return cls(**known, whole=layout, ranks=ranks, mine=mine)

    @property
    def is_dense(self) -> bool:
        return False

    @property
    def positions(self) -> Tensor:
        return self.whole.positions[self.mine]

    def valid_rows(self) -> Tensor:
        return self.whole.valid_rows()[self.mine]

    def part(self, rows: Tensor) -> Tensor:
        """Of all rows, the same on every rank, those of this one. What goes back is the gradient of all, on every rank."""
        return _Part.apply(rows, self)  # type: ignore[no-any-return]

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, on every one. What goes back is the sum of the gradients of all."""
        sizes, shape = self.ranks.shares(self.whole.num_rows), rows.shape[1:]
        return self.ranks.exchange([rows] * self.ranks.size, [n * math.prod(shape) for n in sizes]).view(sum(sizes), *shape)

    def pack(self, x: Tensor) -> Tensor:
        return self.part(self.whole.pack(x))

    def unpack(self, x: Tensor, pad_value: float | Literal["edge"] = 0) -> Tensor:
        return self.whole.unpack(self.gathered(x), pad_value)

    def _check_tensors(self, *, again: bool = False, traced: bool = False) -> None:
        """They are those of `whole`, which is checked where it is used."""

    def _not_here(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise LayoutError("inside `sequence_parallel` a module sees the rows of its own rank: layout.unpack(rows) gathers all of them.")

    seq_ids = property(_not_here)
    pool = split = to_nested = compact = downsample = update_ = to = pin_memory = _not_here


def split_layouts(layout: SeqLayout, layout_kv: SeqLayout | None, mesh: Any) -> tuple[RankRows, RankRows]:
    """Of rows that are split already."""
    ranks = Ranks.of(mesh)
    own = RankRows.of(layout, ranks)
    return own, own if layout_kv is None or layout_kv is layout else RankRows.of(layout_kv, ranks)


def all_rows(layout: SeqLayout, rows: Tensor) -> tuple[SeqLayout, Tensor]:
    """Those of all ranks where each has some, with their layout."""
    return (layout.whole, layout.gathered(rows)) if isinstance(layout, RankRows) else (layout, rows)


def share_of(layout: SeqLayout, queries: SeqLayout | None = None) -> SeqLayout:
    """For the rows of this rank, in a block of `sequence_parallel`; ``layout`` itself outside of it, and where there are fewer rows than
    ranks: these are computed whole on every rank. What ``queries`` attend to is split where they are."""
    traced = torch.compiler.is_compiling()
    ranks = _state.ranks if traced or state.ranks else None
    if ranks is None or ranks.size == 1 or type(layout) is not SeqLayout:
        return layout
    whole = queries.ranks is None if queries is not None else not traced and layout.num_rows < ranks.size
    return layout if whole else RankRows.of(layout, ranks)


def refuse_mixing(layers: Iterable[nn.Module]) -> None:
    """What would not be that of all rows: random numbers, which ranks would draw alike or leave unlike for what comes after the layers, and
    statistics of the rows of one rank."""
    for module in (m for layer in layers for m in layer.modules()):
        for name, x in vars(module).items():
            drawn = module.training and ("drop" in name or name == "p") and type(x) in (int, float) and x > 0
            if drawn or (name == "track_running_stats" and (module.training or not x)):
                fix = "set it to 0" if drawn else "a batch norm counts all rows, and needs eval()"
                raise ArgumentError(f"`{name}` of {type(module).__name__} is {x}, which does not go with rows split over ranks: {fix}.")


def sequence_parallel(mesh: Any) -> AbstractContextManager[Any]:
    """Share the packed rows of each batch among ranks, in all stacks of layers that run packed inside, in this thread and this coroutine.

    Every rank calls the model with the same whole batch, has a part of its rows in the layers, and gets the whole output. The gradient of
    what goes into a stack is whole on every rank. Average the gradients of parameters over the ranks, as DistributedDataParallel and
    ``fully_shard`` do: the result is the gradient of one process. What does not run packed is computed whole on every rank.

    Random numbers outside of the layers must be the same on all ranks of ``mesh``: give these the same seed. Dropout in the layers is
    refused in training.

    Args:
        mesh: a `DeviceMesh` of one dimension (``mesh["sequence"]`` of one with more), or a `ProcessGroup`.

    Raises:
        ArgumentError: ``mesh`` is something else; a stack of layers inside has dropout, or batch norms, in training.

    Examples:
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> mesh = torch.distributed.init_device_mesh("cpu", (1,))
        >>> encoder = VarlenTransformerEncoder(VarlenTransformerEncoderLayer(16, 2, dropout=0.0, batch_first=True), num_layers=2)
        >>> with sequence_parallel(mesh):
        ...     out = encoder(torch.randn(2, 5, 16), src_key_padding_mask=torch.arange(5) >= torch.tensor([5, 3])[:, None])
        >>> out.shape
        torch.Size([2, 5, 16])
        >>> torch.distributed.destroy_process_group()
    """
    return opened(state.ranks, Ranks.of(mesh))
