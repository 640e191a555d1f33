"""Backends that are declared and not connected yet: their capabilities are known, and they refuse every call with that reason."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..layout import SeqLayout
from ..problem import Problem, Semantics
from .base import Backend, Extras


class Declared(Backend):
    """What is missing is an adapter, whether or not the package is there."""

    title: ClassVar[str]  # what has no adapter, for people
    kernel_name: ClassVar[str]

    def missing(self, problem: Problem) -> str | None:
        version = problem.torch_version if self.package == "torch" else problem.version(self.package)
        there = "is not installed" if version is None else f"{version} is there"
        return f"this version of varlen_attn has no adapter for {self.title} yet ({self.package} {there})"

    def kernel(self, problem: Problem) -> str:
        return self.kernel_name

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout_q: SeqLayout,
        layout_kv: SeqLayout,
        semantics: Semantics,
        extras: Extras,
    ) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError(f"varlen_attn has no adapter for {self.title} yet")
