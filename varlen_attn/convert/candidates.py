"""Which modules of a model may be enabled, and why the others may not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._clone import Seeded, clone, kinds, noise
from .._switch import original_class, own_class
from .._torch import unwrapped
from ..nn.token_wise import is_known
from ..nn.transformer import VARLEN
from . import conformer
from .watch import LAYERS, METHODS, STACKS, WEIGHTS_ONLY, is_seen, why_replaced

HOSTS = (nn.MultiheadAttention, *LAYERS, *STACKS)
ATTENTIONS = ("self_attn", "multihead_attn")


class Candidate(NamedTuple):
    """A module that could be enabled.

    Attributes:
        name: qualified, "" for the model itself.
        module: the module.
        host: which of torch's classes it is an instance of, or was scripted from.
        why_not: the reason to leave it alone; None where it may be enabled.
        parent: the layer or stack whose part it is.
    """

    name: str
    module: nn.Module
    host: type[nn.Module]
    why_not: str | None
    parent: Candidate | None


def is_varlen(module: nn.Module) -> bool:
    """Built as one of our modules, not enabled."""
    return isinstance(module, VARLEN) and original_class(module) is own_class(module)


def candidates(model: nn.Module, hooks: str, conformers: str | None = None) -> list[Candidate]:
    """Every module of a host class, in the order of `nn.Module.named_modules`; a shared one once. And every `Conformer`, if they are to
    have ``conformers`` at padding."""
    return list(_Search(hooks, conformers).walk("", model, None, None))


class _Search:
    def __init__(self, hooks: str, conformers: str | None) -> None:
        self.hooks, self.conformers = hooks, conformers
        self.seen: set[nn.Module] = set()
        self.findings: dict[nn.Module, _Finding | None] = {}
        self.stacks: dict[nn.Module, list[nn.Module]] = {}  # all layers of the stack of which a layer is one
        self.firsts: dict[nn.Module, nn.Module] = {}  # the first layer of its kind there
        self.trials: dict[nn.Module, _Finding | None] = {}  # of those

    def walk(self, name: str, module: nn.Module, parent: Candidate | None, above: str | None) -> Iterator[Candidate]:
        """``above``: why nothing here may be touched."""
        if module in self.seen:
            return
        self.seen.add(module)
        above = above or _closed(module)
        host = _host(module) or (conformer.host_of(module) if self.conformers else None)
        if host is not None:
            reader = None if above else self.reads_padding(module, host)
            parent = Candidate(name, module, host, above or self.why_not(module, host) or reader, parent)
            yield parent
            above = above or (reader and f"what it gives at padding is read: {reader}")
        for child_name, child in module.named_children():
            yield from self.walk(f"{name}.{child_name}" if name else child_name, child, parent, above)

    def why_not(self, module: Any, host: type[nn.Module]) -> str | None:
        """The first reason to leave a module of a host class alone, or None."""
        reason = _why_not_class(module, host) if host in HOSTS else conformer.why_not(module, self.conformers)
        if reason is not None:
            return reason
        # What is called on packed rows once the module is enabled; the layers of a stack answer for themselves.
        inner: dict[str, Any] = {"": module} if host in STACKS else dict(module.named_modules())
        if host in STACKS and module.norm is not None:
            inner |= dict(module.norm.named_modules(prefix="norm"))
        for name, m in inner.items():
            reason = _why_not_object(m, self.hooks) or (_closed(m) if name else None)
            if reason is not None:
                return f"{name}: {reason}" if name else reason
        for name, m in module.layers.named_children() if host in STACKS else ():
            if isinstance(m, torch.jit.ScriptModule):
                return f"layers.{name}: {_closed(m)}"
        if host is nn.TransformerDecoder and len(module.layers) and not hasattr(module.layers[0], "multihead_attn"):
            return f"its first layer, a {type(module.layers[0]).__name__}, has no multihead_attn"
        for name in ATTENTIONS if host in LAYERS else ():
            attn = getattr(module, name, None)
            if attn is not None and original_class(attn) is not nn.MultiheadAttention and not is_varlen(attn):
                return f"its {name} is a {type(attn).__name__}, not nn.MultiheadAttention"
        finding = self.find(module, host)
        return finding and finding.reason

    def reads_padding(self, module: Any, host: type[nn.Module]) -> str | None:
        """Which part mixes tokens, and padding into them. It would read other numbers if those before it were enabled."""
        inner = {"": module} | (dict(module.layers.named_modules(prefix="layers")) if host in STACKS else {})
        for name, m in inner.items():
            finding = self.find(m, _host(m))
            if finding and finding.reads_padding:
                return f"{name}: {finding.reason}" if name else finding.reason
        return None

    def find(self, module: Any, host: type[nn.Module] | None) -> _Finding | None:
        if host in STACKS:
            layers = [unwrapped(layer) for layer in module.layers]
            self.stacks.update(dict.fromkeys(layers, layers))
        if host in LAYERS + STACKS and module not in self.findings:
            self.findings[module] = self._find(module) if original_class(module) is host else None
        return self.findings.get(module)

    def _find(self, module: Any) -> _Finding | None:
        """Layers of one kind in a stack share what was found out about the first of them."""
        parts = _unknown_parts(module)
        if not parts or _closed(module) or _why_not_object(module, "packed"):
            return None
        inside = [m for part in parts.values() if isinstance(part, nn.Module) for m in part.modules()]
        fixed = next((reason for m in inside if (reason := _closed(m) or _why_not_object(m, "packed"))), None)
        if fixed is not None:
            return _Finding(f"{_named(parts)} could not be tried: {fixed}", True)
        if any(type(m).__module__.startswith("torch.ao.") for m in inside):
            return _Finding(f"quantised: {_named(parts)}", True)
        first = self.first_of_kind(module)
        if first not in self.trials:
            self.trials[first] = _try(module, parts)
        return self.trials[first]

    def first_of_kind(self, layer: nn.Module) -> nn.Module:
        if layer not in self.firsts:
            layers = self.stacks.get(layer, [layer])
            its_kinds = kinds(layers)
            self.firsts.update((x, layers[its_kinds.index(kind)]) for x, kind in zip(layers, its_kinds, strict=True))
        return self.firsts[layer]


def _host(module: nn.Module) -> type[nn.Module] | None:
    if isinstance(module, torch.jit.ScriptModule):
        return next((h for h in HOSTS if h.__name__ == getattr(module, "original_name", "")), None)
    return next((h for h in HOSTS if isinstance(module, h)), None)


def _closed(module: nn.Module) -> str | None:
    """Why nothing inside may be touched."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted: its code is fixed"
    if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
        return "compiled: call enable before torch.compile"
    return None


def _why_not_class(module: nn.Module, host: type[nn.Module]) -> str | None:
    own = original_class(module)
    if parametrize.is_parametrized(module):
        return "parametrised: its weights are computed, and its class is one of torch.nn.utils.parametrize"
    if own is host:
        return why_replaced(host)
    if own.__module__.startswith("torch.ao."):
        return f"quantised ({own.__name__})"
    return f"a subclass of nn.{host.__name__}, which may compute something else: derive {own.__name__} from Varlen{host.__name__}"


def _why_not_object(module: nn.Module, hooks: str) -> str | None:
    replaced = next((x for x in METHODS if x in vars(module)), None)
    if replaced is not None:
        return f"its {replaced} was replaced on the object"
    if hooks == "leave" and is_seen(module, WEIGHTS_ONLY):
        return 'has hooks, which would see packed rows: allow it with hooks="packed"'
    return None


# -------------------------------------------------------------------- parts that may not be token-wise

_OVER_TIME = tuple(f"torch.nn.modules.{name}" for name in ("conv", "rnn", "batchnorm", "instancenorm", "pooling", "fold"))


def mixing(model: nn.Module, but: nn.Module | None = None) -> str | None:
    """The first module that computes a token from others, and so from rows at padding that are given to it; outside of ``but``."""
    inside = set(but.modules()) if but is not None else ()
    for name, m in ((name, m) for name, m in model.named_modules() if m not in inside):
        over_time = isinstance(m, nn.GroupNorm) or any(c.__module__ in _OVER_TIME for c in type(m).__mro__)
        one_column = getattr(m, "kernel_size", 0) in (1, (1,), (1, 1), (1, 1, 1))
        if (over_time and not one_column) or len(getattr(m, "normalized_shape", "D")) > 1:
            return f"{name} ({type(m).__name__})"
    return None


class _Finding(NamedTuple):
    """Why parts of a layer, or the norm of a stack, cannot be called on packed rows.

    Attributes:
        reason: in words.
        reads_padding: real tokens depend on padding, or nobody knows.
    """

    reason: str
    reads_padding: bool


def _unknown_parts(module: Any) -> dict[str, Any]:
    """Of a layer, or of a stack beside its layers: those that are not known to be token-wise."""
    if isinstance(module, STACKS):
        parts = {} if module.norm is None else {"norm": module.norm}
    else:
        parts = {name: m for name, m in module.named_children() if name not in ATTENTIONS} | {"activation": module.activation}
    return {name: part for name, part in parts.items() if not _is_known(part)}


def _named(parts: dict[str, Any]) -> str:
    return ", ".join(f"{name} ({type(part).__name__})" for name, part in parts.items())


def _try(module: Any, parts: dict[str, Any]) -> _Finding | None:
    """On a copy: whether its parts are token-wise."""
    owners = module.layers if isinstance(module, STACKS) else [module]
    width = next((m.self_attn.embed_dim for m in owners if isinstance(getattr(m, "self_attn", None), nn.MultiheadAttention)), None)
    if width is None:
        return None
    named = _named(parts)
    x = torch.randn(4, 8, width, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)
    changed = x.clone()
    changed[1, 3] = 1 - x[1, 3]  # with tokens before and after it in its row, and rows before and after
    others = torch.arange(32, device="cpu") != 11
    modes = (False, True)
    try:
        copied = _copy(module, parts)
        padded = [_result(copied, training, x) for training in modes]
        if not all(_close(_result(copied, t, changed)[others], rows[others]) for t, rows in zip(modes, padded, strict=True)):
            return _Finding(f"{named} is not token-wise: a token's result depends on other tokens", True)
    except Exception as error:
        return _Finding(f"{named} could not be tried on a copy: {type(error).__name__}: {error}", True)
    try:
        same = all(_close(_result(copied, t, x.flatten(0, 1)), rows) for t, rows in zip(modes, padded, strict=True))
    except Exception as error:
        return _Finding(f"{named} could not be called on packed rows: {type(error).__name__}: {error}", False)
    return None if same else _Finding(f"{named} gives packed rows other results than padded ones", False)


def _is_known(part: Any) -> bool:
    """Norms over more than the last dimension mix tokens."""
    return is_known(part) and len(getattr(part, "normalized_shape", "D")) == 1


def _copy(module: Any, parts: dict[str, Any]) -> nn.Module:
    """A stack's norm or a layer without its attention, in float32.

    Weights of the parts that are tried get some noise: a gate or a branch that is 0 at first would hide what it does later. All others are
    shared with the module.
    """
    source: Any = module.norm if isinstance(module, STACKS) else module
    tried = {id(p) for part in parts.values() if isinstance(part, nn.Module) for p in part.parameters()}
    generator = torch.Generator().manual_seed(1)

    def weight(x: Tensor) -> Tensor:
        here = not hasattr(x, "full_tensor")  # else others stand in for it
        if not x.is_floating_point() or (here and id(x) not in tried and x.dtype == torch.float32):
            return x
        new = x.detach().float() if here else torch.tensor(0.1, device=x.device).expand(x.shape)
        new = new + noise(new, generator) if id(x) in tried else new
        return nn.Parameter(new) if isinstance(x, nn.Parameter) else new

    return clone(source, weight, {getattr(source, name): nn.Identity() for name in ATTENTIONS if hasattr(source, name)})[0]


def _result(copied: nn.Module, training: bool, x: Tensor) -> Tensor:
    """Rows; every call begins with the same state and the same random numbers."""
    called: Any = clone(copied)[0].train(training)
    x = x.to(next((p.device for p in called.parameters()), x.device))
    with Seeded():
        if isinstance(called, LAYERS):
            # Not one after another: a norm removes what the one before it did.
            names = ("norm1", "norm2", "norm3", "dropout1", "dropout2", "dropout3")
            outs = [getattr(called, name)(x.clone()) for name in names if hasattr(called, name)]
            out = torch.cat([*outs, called._ff_block(x)], -1)
        else:
            out = called(x)
    return out.reshape(-1, out.shape[-1])


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4)
