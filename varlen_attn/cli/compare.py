"""The same layer computed by several modules: whether the numbers agree, and how long each takes. For `bench`; the demo is quiet too."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.timing import facts, interleave


@dataclass(frozen=True)
class Example:
    """``x (B, S, D)``, a leaf; the padding mask ``(B, S)``; and a gradient of the output, which is 0 at padding."""

    x: Tensor
    mask: Tensor
    grad: Tensor

    @classmethod
    def of(cls, x: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> Example:
        """With a random gradient."""
        grad = torch.randn(x.shape, generator=generator).to(x).masked_fill(mask[..., None], 0)
        return cls(x.detach().requires_grad_(), mask, grad)


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


def contest(contestants: Mapping[str, Contestant], examples: Sequence[Example], training: bool, **options: Any) -> dict[str, Any]:
    """Times of one example, in turns, as `facts`; the first contestant is the baseline. ``options`` are those of `interleave`."""

    def run_all(contestant: Contestant) -> None:
        for example in examples:
            contestant.run(example, training)

    for contestant in contestants.values():
        contestant.module.train(training)
    calls = {name: partial(run_all, contestant) for name, contestant in contestants.items()}
    return facts(interleave(calls, warm_up=0, **options), next(iter(calls)), len(examples))


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
