"""Which modules of a model may be enabled, and why the others may not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ._token_wise import has_hooks, is_known
from .encoder import VarlenTransformerDecoder, VarlenTransformerDecoderLayer, VarlenTransformerEncoder, VarlenTransformerEncoderLayer
from .modules import VarlenMultiheadAttention

__all__ = ["LAYERS", "Candidate", "candidates", "packs_already", "torch_class"]

HOSTS = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerEncoder,
    nn.TransformerDecoderLayer,
    nn.TransformerDecoder,
)
LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
STACKS = (nn.TransformerEncoder, nn.TransformerDecoder)


class Candidate(NamedTuple):
    """A module that could be enabled.

    Attributes:
        name: qualified, "" for the model itself.
        module: the module.
        host: which of torch's classes it is an instance of.
        why_not: the reason to leave it alone; None where it may be enabled.
        parent: the layer or stack whose part it is.
    """

    name: str
    module: nn.Module
    host: type[nn.Module]
    why_not: str | None
    parent: Candidate | None


def torch_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, before it was enabled."""
    return getattr(type(module), "torch_class", type(module))


def packs_already(module: nn.Module) -> bool:
    """Built as one of our modules, not enabled."""
    ours = (
        VarlenMultiheadAttention,
        VarlenTransformerEncoderLayer,
        VarlenTransformerEncoder,
        VarlenTransformerDecoderLayer,
        VarlenTransformerDecoder,
    )
    return isinstance(module, ours) and torch_class(module) is type(module)


def candidates(model: nn.Module, hooks: str) -> list[Candidate]:
    """Every module of a host class, in the order of `nn.Module.named_modules`; a shared one once."""
    return list(_walk("", model, None, None, hooks, set()))


def _walk(
    name: str, module: nn.Module, parent: Candidate | None, above: str | None, hooks: str, seen: set[nn.Module]
) -> Iterator[Candidate]:
    if module in seen:
        return
    seen.add(module)
    above = above or _closed(module)
    host = next((h for h in HOSTS if isinstance(module, h)), None)
    if host is not None:
        parent = Candidate(name, module, host, above or _why_not(module, host, hooks), parent)
        yield parent
    for child_name, child in module.named_children():
        yield from _walk(f"{name}.{child_name}" if name else child_name, child, parent, above, hooks, seen)


def _closed(module: nn.Module) -> str | None:
    """Why nothing inside may be touched."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted: its code is fixed"
    if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
        return "compiled: call enable before torch.compile"
    return None


def _why_not(module: nn.Module, host: type[nn.Module], hooks: str) -> str | None:
    """The first reason to leave a module of a host class alone, or None."""
    own = torch_class(module)
    if parametrize.is_parametrized(module):
        return "parametrised: its weights are computed, and its class is one of torch.nn.utils.parametrize"
    if own is not host:
        if own.__module__.startswith("torch.ao."):
            return f"quantised ({own.__name__})"
        return f"a subclass of nn.{host.__name__}, which may compute something else: derive {own.__name__} from Varlen{host.__name__}"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    inner = {"": module} if host in STACKS else dict(module.named_modules())
    if host in STACKS and module.norm is not None:
        inner["norm"] = module.norm
    if hooks == "leave":
        hooked = next((name for name, m in inner.items() if has_hooks(m)), None)
        if hooked is not None:
            where = f"{hooked} has" if hooked else "has"
            return f'{where} hooks, which would see packed rows: allow it with hooks="packed"'
    closed = next((f"{name}: {reason}" for name, m in inner.items() if name and (reason := _closed(m))), None)
    if closed is not None:
        return closed
    if host in LAYERS:
        return _why_not_layer(module)
    if host in STACKS and module.norm is not None:
        return _mixes(module, [("norm", module.norm)], lambda m: m.norm, _width(next(iter(module.layers), None)))  # type: ignore[arg-type]
    return None


def _why_not_layer(layer: Any) -> str | None:
    attns = {name: getattr(layer, name) for name in ("self_attn", "multihead_attn") if hasattr(layer, name)}
    for name, attn in attns.items():
        if torch_class(attn) is not nn.MultiheadAttention:
            return f"its {name} is a {type(attn).__name__}, not nn.MultiheadAttention"
    parts = [(name, m) for name, m in layer.named_children() if name not in attns]
    if not isinstance(layer.activation, nn.Module):
        parts.append(("activation", layer.activation))

    def computes(copied: Any) -> Callable[[Tensor], Tensor]:
        def all_but_attention(x: Tensor) -> Tensor:
            for name in ("norm1", "dropout1", "norm2", "norm3", "dropout2"):
                x = getattr(copied, name, nn.Identity())(x)
            out: Tensor = copied._ff_block(x)
            return out

        return all_but_attention

    return _mixes(layer, parts, computes, _width(layer))


def _width(layer: Any) -> int:
    return int(layer.self_attn.embed_dim) if hasattr(layer, "self_attn") else 0


def _mixes(module: nn.Module, parts: list[tuple[str, Any]], computes: Callable[[Any], Any], width: int) -> str | None:
    """Why the parts can not be called on packed rows, or None. Those that are not known to be token-wise are tried on a copy."""
    unknown = [(name, part) for name, part in parts if not is_known(part)]
    if not unknown:
        return None
    named = ", ".join(f"{name} ({type(part).__name__})" for name, part in unknown)
    for _, part in unknown:
        if any(type(m).__module__.startswith("torch.ao.") for m in getattr(part, "modules", list)()):
            return f"quantised: {named}"
    try:
        token_wise = all(_is_token_wise(module, computes, width, training) for training in (False, True))
    except Exception as error:
        return f"{named} could not be called on packed rows: {type(error).__name__}: {error}"
    return None if token_wise else f"{named} is not token-wise: a token's result depends on other tokens"


def _is_token_wise(module: nn.Module, computes: Callable[[Any], Any], width: int, training: bool) -> bool:
    """Whether rows give what the padded tensor gives, and a changed token changes no other. The random state is left as it was."""
    copied = copy.deepcopy(module).float().train(training)
    weight = next((p for p in copied.parameters() if p.is_floating_point()), torch.empty(0))
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []), torch.no_grad():
        x = torch.randn(2, 3, width, device=weight.device, dtype=weight.dtype)
        changed = x.clone()
        changed[0, 0] = torch.randn_like(x[0, 0])
        padded, rows, other = (_seeded(computes(copied), t) for t in (x, x.view(6, width), changed))
    same = [padded.reshape(rows.shape), other.reshape(rows.shape)]
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in ((same[0], rows), (same[1][1:], rows[1:])))


def _seeded(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return function(x)
