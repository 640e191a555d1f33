"""What torch does to functions and models, done to each way into the package: for `test_transforms.py` and `docs/transforms.md`.

An `Entry` is one way into the package, as a function of parameters, a padded batch and its mask, beside the same in plain PyTorch. A
`Transform` is what is done to such a function. Each of a pair is either right, which is that both give the same numbers, or it is refused
with a sentence, which stands in `REFUSED`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from varlen_attn import (
    SeqLayout,
    VarlenMultiheadAttention,
    VarlenTransformerEncoder,
    VarlenWarning,
    padded_attention,
    varlen_attention,
    varlen_mha,
)

from .integrations.transformers.tiny import build, quietly, shake

B, S, N, D = 3, 5, 2, 8
Params = dict[str, Tensor]
Function = Callable[[Params, Tensor, Tensor], Tensor]  # parameters, (B, S, D), key padding mask -> (B, S, D)


def mask_of(*lengths: int) -> Tensor:
    """``(B, S)``, True is padding."""
    return torch.arange(S) >= torch.tensor(lengths)[:, None]


MASK, OTHER, NOTHING = mask_of(5, 2, 3), mask_of(1, 4, 5), mask_of(S, S, S)


# -------------------------------------------------------------------- ways into the package


@dataclass(frozen=True)
class Entry:
    """
    Attributes:
        ours, plain: the function, and the same by torch alone; both 0 at padding.
        params: what it is differentiated by, beside its input.
    """

    name: str
    ours: Function
    plain: Function
    params: Params


def _zeroed(out: Tensor, mask: Tensor) -> Tensor:
    return out.masked_fill(mask[..., None], 0.0)


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (N, D // N))


def _attention(p: Params, x: Tensor, mask: Tensor) -> Tensor:
    """The specification, on padded tensors."""
    q, k, v = (_heads(x @ p[name]).transpose(-2, -3) for name in "qkv")
    scores = (q @ k.transpose(-1, -2) * (D // N) ** -0.5).masked_fill(mask[:, None, None], float("-inf"))
    return _zeroed((scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2), mask)


def _projected(p: Params, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _heads(x @ p["q"]), _heads(x @ p["k"]), _heads(x @ p["v"])


def _by_varlen_mha(p: Params, x: Tensor, mask: Tensor) -> Tensor:
    weight = torch.cat([p["q"], p["k"], p["v"]], 1).T
    return varlen_mha(x, mask, num_heads=N, in_proj_weight=weight, out_proj_weight=p["o"])


def _by_padded_attention(p: Params, x: Tensor, mask: Tensor) -> Tensor:
    return padded_attention(*_projected(p, x), mask).flatten(-2)


def _by_layout(p: Params, x: Tensor, mask: Tensor) -> Tensor:
    """Packing that is written out."""
    layout = SeqLayout.from_key_padding_mask(mask)
    rows = layout.pack(x)
    return layout.unpack(varlen_attention(*_projected(p, rows), layout).flatten(-2))


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _functions() -> list[Entry]:
    params = {name: _randn(D, D, seed=i) / 2 for i, name in enumerate("qkvo")}
    return [
        Entry("`varlen_mha`", _by_varlen_mha, lambda *args: F.linear(_attention(*args), args[0]["o"]), params),
        Entry("`padded_attention`", _by_padded_attention, _attention, params),
        Entry("`layout.pack`, `varlen_attention`", _by_layout, _attention, params),
    ]


@dataclass(frozen=True)
class Call:
    """A module as a function of its parameters."""

    holder: nn.Module

    def __call__(self, p: Params, x: Tensor, mask: Tensor) -> Tensor:
        return _zeroed(torch.func.functional_call(self.holder, {f"inner.{k}": v for k, v in p.items()}, (x, mask)), mask)


class _Holder(nn.Module):
    def __init__(self, inner: nn.Module, how: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.how(self.inner, x, mask)


def _mha(m: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return m(x, x, x, key_padding_mask=mask, need_weights=False)[0]


def _stack(m: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return m(x, src_key_padding_mask=mask)


def _targets(m: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return m(x, x.flip(0), tgt_key_padding_mask=mask, memory_key_padding_mask=mask.flip(0))


def _bert(m: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return m(inputs_embeds=x, attention_mask=(~mask).long()).last_hidden_state


def _modules() -> list[Entry]:
    def entry(name: str, plain: nn.Module, ours: Callable[[nn.Module], nn.Module], how: Any) -> Entry:
        plain = shake(plain.double()).train()
        made = ours(copy.deepcopy(plain)).train()
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), made.parameters(), strict=True))
        params = {k: v.detach() for k, v in plain.named_parameters()}
        return Entry(name, Call(_Holder(made, how)), Call(_Holder(plain, how)), params)

    def enabled(m: nn.Module) -> nn.Module:
        report = quietly(m)
        assert not [x for x in report.modules if x.action != "converted"], report
        return m

    def loaded(made: nn.Module, m: nn.Module) -> nn.Module:
        made.double().load_state_dict(m.state_dict())
        return made

    layer = partial(nn.TransformerEncoderLayer, D, N, 12, dropout=0.0, batch_first=True)
    ours = [
        ("`VarlenMultiheadAttention`", nn.MultiheadAttention(D, N, batch_first=True),
         partial(loaded, VarlenMultiheadAttention(D, N, batch_first=True)), _mha),
        ("`VarlenTransformerEncoder`", nn.TransformerEncoder(layer(), 1, enable_nested_tensor=False),
         partial(loaded, VarlenTransformerEncoder(layer(), 1)), _stack),
        ("enabled `nn.MultiheadAttention`", nn.MultiheadAttention(D, N, batch_first=True), enabled, _mha),
        ("enabled `nn.TransformerEncoder`", nn.TransformerEncoder(layer(norm_first=True), 1, enable_nested_tensor=False), enabled, _stack),
        ("enabled `nn.TransformerDecoder`",
         nn.TransformerDecoder(nn.TransformerDecoderLayer(D, N, 12, dropout=0.0, batch_first=True), 1), enabled, _targets),
        ("enabled `BertModel`", build("Bert", hidden_size=D, num_attention_heads=N, intermediate_size=12), enabled, _bert),
    ]  # fmt: skip
    return [entry(*x) for x in ours]


@cache
def entries() -> dict[str, Entry]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {e.name: e for e in (*_functions(), *_modules())}


# -------------------------------------------------------------------- what is done to them

Result = list[Tensor]
Doing = Callable[[Function, Params, Tensor], Result]


@dataclass(frozen=True)
class Transform:
    """
    Attributes:
        do: with a function of parameters, a batch and a mask.
        want: of the same in plain PyTorch, if that is not ``do`` again.
        tolerance: of the largest difference, by the largest number.
        slow: it compiles.
    """

    name: str
    do: Doing
    want: Doing | None = None
    tolerance: float = 1e-9
    slow: bool = False


def _loss(f: Function, p: Params, x: Tensor, mask: Tensor) -> Tensor:
    return (f(p, x, mask) * torch.linspace(-1, 1, D, dtype=x.dtype)).exp().sum()


def _flat(*found: Any) -> Result:
    return [x for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, Tensor)]


def _leaves(p: Params, x: Tensor) -> tuple[Params, Tensor]:
    return {k: v.clone().requires_grad_() for k, v in p.items()}, x.clone().requires_grad_()


def _gradients(f: Function, p: Params, x: Tensor, mask: Tensor = MASK) -> Result:
    p, x = _leaves(p, x)
    _loss(f, p, x, mask).backward()
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in (*p.values(), x)]


def _of_each(f: Function) -> Any:
    """One sample, whose mask is its own."""
    return lambda p, x, mask: f(p, x[None], mask[None])[0]


def _tangents(x: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t.sin() + 0.5, x)


def _grad(f: Function, p: Params, x: Tensor) -> Result:
    return _flat(torch.func.grad(partial(_loss, f), argnums=(0, 1))(p, x, MASK))


def _vmap(f: Function, p: Params, x: Tensor) -> Result:
    return [torch.func.vmap(_of_each(f), in_dims=(None, 0, 0))(p, x, MASK)]


def _one_by_one(f: Function, p: Params, x: Tensor) -> Result:
    return [torch.stack([_of_each(f)(p, one, mask) for one, mask in zip(x, MASK, strict=True)])]


def _per_sample(f: Function, p: Params, x: Tensor) -> Result:
    of_one = torch.func.grad(lambda p, x, mask: _loss(f, p, x[None], mask[None]), argnums=(0, 1))
    return _flat(torch.func.vmap(of_one, in_dims=(None, 0, 0))(p, x, MASK))


def _gradients_one_by_one(f: Function, p: Params, x: Tensor) -> Result:
    each = [_gradients(f, p, one[None], mask[None]) for one, mask in zip(x, MASK, strict=True)]
    return [torch.stack([x.view(x.shape[1:]) if i == len(p) else x for x in many]) for i, many in enumerate(zip(*each, strict=True))]


def _vmap_one_mask(f: Function, p: Params, x: Tensor) -> Result:
    return [torch.func.vmap(lambda x: f(p, x, MASK))(torch.stack([x, x.cos()]))]


def _ensemble(f: Function, p: Params, x: Tensor) -> Result:
    return [torch.func.vmap(lambda p: f(p, x, MASK))({k: torch.stack([v, v.cos()]) for k, v in p.items()})]


def _ensemble_one_by_one(f: Function, p: Params, x: Tensor) -> Result:
    return [torch.stack([f(p, x, MASK), f({k: v.cos() for k, v in p.items()}, x, MASK)])]


def _jvp(f: Function, p: Params, x: Tensor) -> Result:
    return _flat(torch.func.jvp(lambda p, x: f(p, x, MASK), (p, x), _tangents((p, x))))


def _dual(f: Function, p: Params, x: Tensor) -> Result:
    with forward_ad.dual_level():
        p, x = torch.utils._pytree.tree_map(lambda t: forward_ad.make_dual(t, _tangents(t)), (p, x))
        return list(forward_ad.unpack_dual(f(p, x, MASK)))


def _jacfwd(f: Function, p: Params, x: Tensor) -> Result:
    return _flat(torch.func.jacfwd(lambda x: f(p, x, MASK))(x))


def _jacrev(f: Function, p: Params, x: Tensor) -> Result:
    return _flat(torch.func.jacrev(lambda x: f(p, x, MASK))(x))


def _hessian(f: Function, p: Params, x: Tensor) -> Result:
    return _flat(torch.func.hessian(lambda x: _loss(f, p, x, MASK[1:]))(x[1:]))


def _linearize(f: Function, p: Params, x: Tensor) -> Result:
    out, at = torch.func.linearize(lambda x: f(p, x, MASK), x)
    return [out, at(_tangents(x))]


def _jvp_of_input(f: Function, p: Params, x: Tensor) -> Result:
    return _flat(torch.func.jvp(lambda x: f(p, x, MASK), (x,), (_tangents(x),)))


def _functionalize(f: Function, p: Params, x: Tensor) -> Result:
    return [torch.func.functionalize(f)(p, x, MASK)]


def _double_backward(f: Function, p: Params, x: Tensor) -> Result:
    p, x = _leaves(p, x)
    first = torch.autograd.grad(_loss(f, p, x, MASK), x, create_graph=True)[0]
    return list(torch.autograd.grad(first.square().sum(), [*p.values(), x], allow_unused=True, materialize_grads=True))


def _batched_gradients(f: Function, p: Params, x: Tensor) -> Result:
    p, x = _leaves(p, x)
    out = f(p, x, MASK)
    many = torch.stack([out.detach().sin(), torch.ones_like(out)])
    return list(torch.autograd.grad(out, [*p.values(), x], many, is_grads_batched=True, allow_unused=True, materialize_grads=True))


def _recorded(of: Any = None, **options: Any) -> Doing:
    """Recorded with one mask, run with others."""

    def run(f: Function, p: Params, x: Tensor) -> Result:
        call = f if of is None else partial(of, f)
        out: Result = []
        for example in (MASK, NOTHING):
            graph = make_fx(call, **options, _allow_non_fake_inputs=True)(p, x, example)
            out += _flat([graph(p, x, mask) for mask in (MASK, OTHER, NOTHING)])
        return out

    return run


def _as_called(of: Any = None) -> Doing:
    def run(f: Function, p: Params, x: Tensor) -> Result:
        call = f if of is None else partial(of, f)
        return _flat([call(p, x, mask) for mask in (MASK, OTHER, NOTHING) * 2])

    return run


def _loss_and_grad(f: Function, p: Params, x: Tensor, mask: Tensor) -> Any:
    return torch.func.grad(partial(_loss, f), argnums=(0, 1))(p, x, mask)


def _symbolic(f: Function, p: Params, x: Tensor) -> Result:
    """A module inside of one that is traced, and a function inside of one."""
    if isinstance(f, Call):
        graph: Any = Call(torch.fx.symbolic_trace(f.holder))
    else:
        traced = torch.fx.symbolic_trace(lambda x, mask: f(p, x, mask))
        graph = lambda p, x, mask: traced(x, mask)  # noqa: E731
    return [graph(p, x, mask) for mask in (MASK, OTHER, NOTHING) * 2]


def _compiled(do: Doing) -> Doing:
    def run(f: Function, p: Params, x: Tensor) -> Result:
        torch._dynamo.reset()
        return torch.compile(partial(do, f), backend="eager", fullgraph=True)(p, x)

    return run


def _of_compiled(do: Doing, **options: Any) -> Doing:
    def run(f: Function, p: Params, x: Tensor) -> Result:
        torch._dynamo.reset()
        return do(torch.compile(f, backend="eager", **options), p, x)

    return run


def _checkpointed(reentrant: bool) -> Doing:
    def run(f: Function, p: Params, x: Tensor) -> Result:
        return _gradients(lambda p, x, mask: checkpoint(f, p, x, mask, use_reentrant=reentrant), p, x)

    return run


def _with(context: Callable[[], AbstractContextManager[Any]]) -> Doing:
    def run(f: Function, p: Params, x: Tensor) -> Result:
        with context():
            return [g for mask in (MASK, NOTHING) for g in _gradients(f, p, x, mask)]

    return run


def _hooks() -> AbstractContextManager[Any]:
    """What is saved comes back as other tensors."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: (t.detach().clone(),), lambda kept: kept[0].clone())


def _in_place(f: Function, p: Params, x: Tensor) -> Result:
    """A residual, whatever is padded."""
    found: Result = []
    for mask in (MASK, NOTHING):
        its, leaf = _leaves(p, x)
        h = leaf * 2
        h += f(its, h, mask)
        out = f(its, h, mask)
        out += h
        out.exp().sum().backward()
        found += [out, leaf.grad]
    return found


def _out_of_place(f: Function, p: Params, x: Tensor) -> Result:
    found: Result = []
    for mask in (MASK, NOTHING):
        its, leaf = _leaves(p, x)
        h = leaf * 2
        h = h + f(its, h, mask)
        out = f(its, h, mask) + h
        out.exp().sum().backward()
        found += [out, leaf.grad]
    return found


def _autocast(f: Function, p: Params, x: Tensor) -> Result:
    """One cast of a weight serves several calls, those without gradients first."""
    p, x = _leaves({k: v.float() for k, v in p.items()}, x.float())
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            f(p, x, OTHER)
        loss = _loss(f, p, x, MASK) + _loss(f, p, x, OTHER)
    return list(torch.autograd.grad(loss, [*p.values(), x], allow_unused=True, materialize_grads=True))


def _inference(f: Function, p: Params, x: Tensor) -> Result:
    """The input, the mask, the weights, or all of them are of inference mode."""
    with torch.inference_mode():
        its = {k: v.clone() for k, v in p.items()}, x.clone(), MASK.clone()
        found = [f(*its)]
    found.append(f(*its))
    found += [f(its[0], x, MASK), f(p, its[1], MASK), f(p, x, its[2])]
    with torch.no_grad():
        found.append(f(*its))
    return found


TRANSFORMS = {
    t.name: t
    for t in (
        Transform("`grad`", _grad, lambda f, p, x: _gradients(f, p, x)),
        Transform("`vmap`, a mask for each sample", _vmap, _one_by_one),
        Transform("`vmap(grad)`, a mask for each sample", _per_sample, _gradients_one_by_one),
        Transform("`vmap`, one mask for all", _vmap_one_mask),
        Transform("`vmap` over parameters", _ensemble, _ensemble_one_by_one),
        Transform("`jvp`", _jvp),
        Transform("`forward_ad.make_dual`", _dual, _jvp),
        Transform("`jacfwd`", _jacfwd, _jacrev),
        Transform("`jacrev`", _jacrev),
        Transform("`hessian`", _hessian),
        Transform("`linearize`", _linearize, _jvp_of_input),
        Transform("`functionalize`", _functionalize),
        Transform("gradients of gradients", _double_backward),
        Transform("`is_grads_batched`", _batched_gradients),
        Transform("`make_fx`", _recorded(), _as_called()),
        Transform('`make_fx`, `tracing_mode="fake"`', _recorded(tracing_mode="fake"), _as_called()),
        Transform('`make_fx`, `tracing_mode="symbolic"`', _recorded(tracing_mode="symbolic"), _as_called()),
        Transform("`make_fx`, `pre_dispatch=True`", _recorded(pre_dispatch=True), _as_called()),
        Transform("`make_fx` of `grad`", _recorded(_loss_and_grad), _as_called(_loss_and_grad)),
        Transform("`compile` of `jvp`", _compiled(_jvp), _jvp, slow=True),
        Transform("`compile` of `grad`", _compiled(_grad), _grad, slow=True),
        Transform("`compile` of `vmap(grad)`", _compiled(_per_sample), _gradients_one_by_one, slow=True),
        Transform("`jvp` of `compile`", _of_compiled(_jvp), _jvp, slow=True),
        Transform("`compile`, `dynamic=True`", _of_compiled(_as_called(), fullgraph=True, dynamic=True), _as_called(), slow=True),
        Transform("`fx.symbolic_trace`", _symbolic, _as_called()),
        Transform("`checkpoint`, reentrant", _checkpointed(True), _gradients),
        Transform("`checkpoint`, not reentrant", _checkpointed(False), _gradients),
        Transform("`save_on_cpu`", _with(torch.autograd.graph.save_on_cpu), _with(nullcontext)),
        Transform("`saved_tensors_hooks`", _with(_hooks), _with(nullcontext)),
        Transform("`allow_mutation_on_saved_tensors`", _with(torch.autograd.graph.allow_mutation_on_saved_tensors), _with(nullcontext)),
        Transform("residuals in place", _in_place, _out_of_place),
        Transform("autocast that keeps its casts", _autocast, tolerance=0.03),
        Transform("tensors of inference mode", _inference),
    )
}


# By transform and entry, or all entries: what an error says. All other pairs are right.
_LAYOUT = "`layout.pack`, `varlen_attention`"
_ALL = "all"
REFUSED: dict[tuple[str, str], str] = {
    ("gradients of gradients", "enabled `nn.MultiheadAttention`"): "_for_cpu_backward is not implemented",
    ("gradients of gradients", _ALL): "the backward of backend 'cpu' is not differentiable",
    ("`vmap`, a mask for each sample", _LAYOUT): "`mask` must have values that can be read",
    ("`vmap(grad)`, a mask for each sample", _LAYOUT): "`mask` must have values that can be read",
    ("`functionalize`", _LAYOUT): "`mask` must have values that can be read",
    ("`linearize`", _LAYOUT): "make_fx records the number of tokens of `mask` as a constant",
    ("`make_fx`", _LAYOUT): "make_fx records the number of tokens of `mask` as a constant",
    ("`make_fx`, `pre_dispatch=True`", _LAYOUT): "make_fx records the number of tokens of `mask` as a constant",
    ("`make_fx` of `grad`", _LAYOUT): "make_fx records the number of tokens of `mask` as a constant",
    ('`make_fx`, `tracing_mode="fake"`', _LAYOUT): "Could not extract specialized integer from data-dependent expression",
    ("`compile` of `jvp`", _LAYOUT): "Could not guard on data-dependent expression",
    ("`compile` of `vmap(grad)`", _LAYOUT): "Attempted to vmap over aten::nonzero",
    ("`fx.symbolic_trace`", "`varlen_mha`"): "torch.fx must not trace into attention",
    ("`fx.symbolic_trace`", "`padded_attention`"): "torch.fx must not trace into attention",
    ("`fx.symbolic_trace`", _LAYOUT): "`mask` must be a tensor, but is 'Proxy'",
    ("`fx.symbolic_trace`", "enabled `BertModel`"): "slice indices must be integers",
    ("residuals in place", "`padded_attention`"): "has been modified by an inplace operation",
}
# What is not in the sentence itself.
_REMARKS = {
    "the backward of backend 'cpu' is not differentiable": '`backend="reference"` gives them, and so does `torch.func`',
    "_for_cpu_backward is not implemented": "torch's words: so little runs as it came",
    "make_fx records the number of tokens of `mask` as a constant": "a `LayoutWarning`; the graph raises for a mask with another number",
    "Could not extract specialized integer from data-dependent expression": "torch's words, when the graph is made",
    "Could not guard on data-dependent expression": "torch's words, when it is compiled; a layout made outside works",
    "Attempted to vmap over aten::nonzero": "torch's words, when it is compiled",
    "slice indices must be integers": "it is transformers' code that cannot be traced, before `enable` too",
    "has been modified by an inplace operation": "where nothing is padded, as `F.scaled_dot_product_attention` does",
}


def refused(transform: str, entry: str) -> str | None:
    """What the error says, or None for what is right."""
    return REFUSED.get((transform, entry)) or REFUSED.get((transform, _ALL))


def outcome(transform: Transform, entry: Entry) -> str:
    """What is so: right, wrong and how far, or an error. Warnings of the package are errors."""
    x = _randn(B, S, D, seed=9)
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = (transform.want or transform.do)(entry.plain, entry.params, x)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", VarlenWarning)
            got = transform.do(entry.ours, entry.params, x)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if [g.shape for g in got] != [w.shape for w in want]:
        return f"wrong: shapes {[tuple(g.shape) for g in got]}, not {[tuple(w.shape) for w in want]}"
    far = max(
        float((g.detach() - w.detach()).abs().max()) / max(1.0, float(w.detach().abs().max())) for g, w in zip(got, want, strict=True)
    )
    return "right" if far <= transform.tolerance else f"wrong by {far:.1e}"


# -------------------------------------------------------------------- the page

PAGE = Path(__file__).parents[1] / "docs" / "transforms.md"
_INTRODUCTION = """# Transforms of torch

Each row is a transform that torch applies to functions or models, and each column is a function or module of this package. They ran on a
CPU, with torch {torch} and a padded batch. *right* means that the numbers are those of plain PyTorch, or of one sample after another;
`tests/test_transforms.py` compares them in float64. A number refers to the error below. No other outcome occurs: no numbers are wrong.

- Under `torch.func` and forward-mode AD, attention is eager math on the packed tokens, because kernels have only a backward.
- Where `torch.vmap` maps the mask, each sample has its own mask, and packing is impossible. Attention runs on padded tensors with a mask.
  Rows at padding of the results are the same.
- A graph of `make_fx` contains padded attention with a mask, and serves all masks of its shape.
- `torch.fx.symbolic_trace` makes each module of this package a leaf, as it does with torch's modules.

`make docs-tables` writes this page from `tests/transforms.py`.
"""


def page() -> str:
    sentences = list(dict.fromkeys(REFUSED.values()))
    names = list(entries())
    table = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for t in TRANSFORMS:
        said = [refused(t, name) for name in names]
        table.append(f"| {t} | " + " | ".join("right" if x is None else f"({sentences.index(x) + 1})" for x in said) + " |")
    notes = [f"{i}. ... {x} ...{f' ({_REMARKS[x]})' if x in _REMARKS else ''}" for i, x in enumerate(sentences, 1)]
    version = ".".join(torch.__version__.split(".")[:2])
    return "\n".join([_INTRODUCTION.format(torch=version), *table, "", *notes, ""])


if __name__ == "__main__":
    PAGE.write_text(page())
