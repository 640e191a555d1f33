"""What people wrap models in for distributed training, done to enabled models: for `test_wrappers.py` and `docs/parallel.md`.

A `Scenario` runs in every one of several processes, which share a process group (gloo). The same steps are taken in one process on the
model as it came, in float64, on the batches of all ranks.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import os
import re
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing, checkpoint_wrapper
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_model_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from varlen_attn import (
    ArgumentError,
    DtypeError,
    SeqLayout,
    VarlenMultiheadAttention,
    VarlenTransformerEncoder,
    VarlenTransformerEncoderLayer,
    disable,
    enable,
    padded_attention,
    record,
    varlen_attention,
    varlen_mha,
)

WORDS, WIDTH, HEADS, LENGTH, STEPS, RATE = 40, 16, 2, 24, 3, 0.05

# -------------------------------------------------------------------- models and batches


class Net(nn.Module):
    """Something of torch that attends, on tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(WORDS, WIDTH), inner, nn.Linear(WIDTH, WIDTH)
        self.attends = isinstance(inner, nn.MultiheadAttention)  # what wraps it is none

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.attends:
            return self.head(self.inner(x, x, x, key_padding_mask=padding, need_weights=False)[0])  # type: ignore[no-any-return]
        return self.head(self.inner(x, src_key_padding_mask=padding))  # type: ignore[no-any-return]


class Bert(nn.Module):
    """``pooler`` is computed and not read: it has no gradients."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import AutoModel

        self.inner = AutoModel.from_config(config)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        return self.inner(input_ids=ids, attention_mask=(~padding).long())[0]  # type: ignore[no-any-return]


def _encoder(ours: bool = False) -> nn.Module:
    stack, layer = (
        (VarlenTransformerEncoder, VarlenTransformerEncoderLayer) if ours else (nn.TransformerEncoder, nn.TransformerEncoderLayer)
    )
    return Net(stack(layer(WIDTH, HEADS, 2 * WIDTH, 0.0, batch_first=True), 2, enable_nested_tensor=False))


def _attention(ours: bool = False) -> nn.Module:
    return Net((VarlenMultiheadAttention if ours else nn.MultiheadAttention)(WIDTH, HEADS, batch_first=True))


def _bert(ours: bool = False) -> nn.Module:
    from transformers import BertConfig

    sizes = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=2 * WIDTH)
    return Bert(BertConfig(vocab_size=WORDS, **sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))  # type: ignore[arg-type]


def _llama(ours: bool = False) -> nn.Module:
    from transformers import LlamaConfig

    sizes = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=2 * WIDTH)
    return Bert(LlamaConfig(vocab_size=WORDS, **sizes))  # type: ignore[arg-type]


MODELS: dict[str, Callable[..., nn.Module]] = {"encoder": _encoder, "attention": _attention, "bert": _bert, "llama": _llama}


def made(kind: str, ours: bool = False) -> nn.Module:
    """With weights of which no two are equal."""
    model = MODELS[kind](ours).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            p.normal_(1.0 if "norm" in name.lower() and "bias" not in name else 0.0, 0.15, generator=generator)
    return model


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Ids and padding. In the second step rank 1 has no token."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    lengths = torch.randint(1, LENGTH // 2, (4,), generator=generator)
    lengths[0] = LENGTH
    lengths = lengths * (not (rank == 1 and step == 1))
    return torch.randint(WORDS, (4, LENGTH), generator=generator), torch.arange(LENGTH) >= lengths[:, None]


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    ids, padding = batch(rank, step)
    return (model(ids, padding).sin() * ~padding[..., None]).sum() / 40


@cache
def expected(kind: str, world: int) -> tuple[dict[str, Tensor], Tensor]:
    """Parameters after some steps in one process, and what the model gives then to the tokens of a batch."""
    model = made(kind)
    for step in range(STEPS):
        with_tokens = [rank for rank in range(world) if not batch(rank, step)[1].all()]  # others add nothing, and torch gives NaN
        sum(loss_of(model, rank, step) / world for rank in with_tokens).backward()  # type: ignore[union-attr]
        _descend(model)
    fast, _ = torch.backends.mha.get_fastpath_enabled(), torch.backends.mha.set_fastpath_enabled(False)  # it gives float32's numbers
    given = _given(model, world)
    torch.backends.mha.set_fastpath_enabled(fast)
    return {name: p.detach() for name, p in model.named_parameters()}, given


def _descend(model: nn.Module) -> None:
    torch.optim.SGD(model.parameters(), RATE).step()
    model.zero_grad()


@torch.no_grad()
def _given(model: nn.Module, world: int) -> Tensor:
    ids, padding = batch(world, STEPS)
    return torch.as_tensor(model.eval()(ids, padding)[~padding])


def _local(x: Tensor) -> Tensor:
    x = x.detach()
    return x.full_tensor() if hasattr(x, "full_tensor") else x.clone()  # type: ignore[no-any-return]


_WRAPPING = re.compile(r"\b(module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


# -------------------------------------------------------------------- one of several processes


@dataclass
class Here:
    """
    Attributes:
        rank, world, mesh: of this process.
        folder: that all processes see.
    """

    rank: int
    world: int
    mesh: DeviceMesh
    folder: Path

    def train(self, model: nn.Module, packed: bool = True) -> None:
        """Takes the steps; some attention has to be ours, which computes fewer rows where it is ``packed``."""
        model.train()
        with record(model) as log:
            for step in range(STEPS):
                loss_of(model, self.rank, step).backward()
                _descend(model)
        assert any(call.rows < call.slots for call in log) >= packed, [(call.rows, call.slots, call.backend) for call in log]

    def compare(self, model: nn.Module, kind: str, tolerance: float = 1e-10) -> None:
        """Parameters, of the same names, and results in evaluation."""
        parameters, given = expected(kind, self.world)
        flat = isinstance(model, FullyShardedDataParallel)
        with FullyShardedDataParallel.summon_full_params(model) if flat else nullcontext():
            found = {_WRAPPING.sub("", name): _local(p) for name, p in model.named_parameters()}
        assert found.keys() == parameters.keys(), found.keys() ^ parameters.keys()
        for name, p in parameters.items():
            _close(found[name], p, name, tolerance)
        _close(_given(model, self.world), given, "results", tolerance)

    def exact(
        self,
        kind: str,
        wrap: Callable[[nn.Module], nn.Module],
        order: str,
        tolerance: float = 1e-10,
        packed: bool = True,
        start: Callable[[str], nn.Module] | None = None,
        **options: Any,
    ) -> None:
        """``order``: the model is enabled before it is wrapped, or after, or its attention was built from our classes. In the first two
        cases it is enabled anew and disabled at the end, and computes the same."""
        model = start(kind) if start else made(kind, ours=order == "built")
        if order == "before":
            enable(model, **options)
        keys = model.state_dict().keys()
        model = wrap(model)
        wrapped = {name: type(m) for name, m in model.named_modules()}
        if order == "after":
            enable(model, **options)
        self.train(model, packed)
        self.compare(model, kind, tolerance)
        if not isinstance(model, FullyShardedDataParallel):
            assert [_WRAPPING.sub("", name) for name in model.state_dict()] == list(keys)
        if order != "built":
            for again in (enable, disable):
                again(model)
                self.compare(model, kind, tolerance)
            assert not [name for name, m in model.named_modules() if type(m).forward.__module__.startswith("varlen_attn.")]
        if order == "after":
            assert {name: type(m) for name, m in model.named_modules()} == wrapped


def _close(found: Tensor, wanted: Tensor, name: str, tolerance: float) -> None:
    error = (found - wanted).abs().max().item()
    assert error <= tolerance, f"{name} differs by {error:.1e}"


def layers_of(model: Any) -> list[nn.Module]:
    inner = model.inner
    if isinstance(inner, nn.MultiheadAttention):
        return [inner]
    return list(inner.layers if hasattr(inner, "layers") else inner.encoder.layer)


# -------------------------------------------------------------------- what is done


@dataclass(frozen=True)
class Scenario:
    """
    Attributes:
        what: people do, in Markdown.
        outcome: exact or refused.
        note: what there is to know.
        run: in each process; raises where it is not so.
        worlds: numbers of processes.
    """

    what: str
    outcome: str
    note: str
    run: Callable[[Here], None]
    worlds: tuple[int, ...]


SCENARIOS: dict[str, Scenario] = {}


def _scenario(what: str, note: str = "", outcome: str = "exact", worlds: tuple[int, ...] = (2,)) -> Any:
    def register(run: Callable[[Here], None]) -> Callable[[Here], None]:
        SCENARIOS[run.__name__] = Scenario(what, outcome, note, run, worlds)
        return run

    return register


ALL = ("encoder", "attention", "bert")


def _orders(kind: str) -> tuple[str, ...]:
    return ("before", "after") if kind in ("bert", "llama") else ("before", "after", "built")


def _is_packed(kind: str, order: str) -> bool:
    """A lone `nn.MultiheadAttention` leaves so little work to torch, and zeros padding."""
    return kind != "attention" or order == "built"


@_scenario("`DistributedDataParallel`", "also where a rank has no token in a step", worlds=(2, 4))
def ddp(here: Here) -> None:
    for kind in ALL:
        for order in _orders(kind)[: None if here.world == 2 else 1]:
            wrap = functools.partial(DistributedDataParallel, find_unused_parameters=kind == "bert")
            here.exact(kind, wrap, order, packed=_is_packed(kind, order))


@_scenario("`DistributedDataParallel(static_graph=True)`")
def ddp_static(here: Here) -> None:
    for kind in ALL:
        for order in _orders(kind)[1:]:
            here.exact(kind, functools.partial(DistributedDataParallel, static_graph=True), order, packed=_is_packed(kind, order))


def _sharded(model: Any, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


@_scenario("`fully_shard` (FSDP2)", "`enable`, `enable` again and `disable` leave it sharded")
def fsdp2(here: Here) -> None:
    for kind in ALL:
        for order in _orders(kind):
            here.exact(kind, functools.partial(_sharded, mesh=here.mesh), order, packed=_is_packed(kind, order))


@_scenario("`fully_shard` of a layer's `self_attn`, and of the stack alone")
def fsdp2_parts(here: Here) -> None:
    def attention(model: Any) -> nn.Module:
        for layer in model.inner.layers:
            fully_shard(layer.self_attn, mesh=here.mesh)
        return fully_shard(model, mesh=here.mesh)

    def stack(model: Any) -> nn.Module:
        fully_shard(model.inner, mesh=here.mesh)
        return fully_shard(model, mesh=here.mesh)

    for wrap in (attention, stack):
        for order in _orders("encoder"):
            here.exact("encoder", wrap, order)


class Norm(nn.Module):
    """Of somebody's, of which `enable` finds out that it is token-wise."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


@_scenario("`fully_shard`, layers with a norm of your own", "tried with other weights where only parts are here")
def fsdp2_own_parts(here: Here) -> None:
    def wrap(model: Any) -> nn.Module:
        return _sharded(model, here.mesh)

    def own(kind: str) -> nn.Module:
        model: Any = made("encoder")
        for layer in model.inner.layers:
            layer.norm1, layer.norm2 = Norm(layer.norm1), Norm(layer.norm2)
        return model  # type: ignore[no-any-return]

    for order in ("before", "after"):
        here.exact("encoder", wrap, order, start=own)


@_scenario("`enable(model, prepack=True)`, then `fully_shard`", "weights are not kept in another format; after `fully_shard`: an error")
def fsdp2_prepacked(here: Here) -> None:
    """FSDP writes to weights without being counted."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True).eval().requires_grad_(False)
    plain, x, padding = copy.deepcopy(layer), torch.randn(8, 64, 256), torch.arange(64) >= torch.randint(5, 64, (8, 1))
    enable(layer, prepack=True)
    fully_shard(layer, mesh=here.mesh)
    for factor in (1, 1, 1, 1.2, 1):
        for p in (*layer.parameters(), *plain.parameters()):
            p.mul_(factor)
        given, wanted = (m(x, src_key_padding_mask=padding)[~padding] for m in (layer, plain))
        _close(given, wanted, "results", 1e-5)
    sharded = fully_shard(copy.deepcopy(plain), mesh=here.mesh)
    with pytest.raises(ArgumentError, match="`prepack` must be False"):
        enable(sharded, prepack=True)


@_scenario("`fully_shard` with a `MixedPrecisionPolicy`", "rows at padding are 0, though query and key are cast apart")
def fsdp2_mixed(here: Here) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.float32)  # below the float64 of the tests
    for kind in ALL:
        for order in _orders(kind):
            wrap = functools.partial(_sharded, mesh=here.mesh, mp_policy=policy)
            here.exact(kind, wrap, order, 2e-6, packed=_is_packed(kind, order))
    padding = batch(here.rank, 0)[1]
    for order in _orders("attention"):
        attention = made("attention", ours=order == "built").inner
        if order == "before":
            enable(attention)
        fully_shard(attention, mesh=here.mesh, mp_policy=policy)
        if order == "after":
            enable(attention)
        for grad in (False, True):
            x = torch.randn(4, LENGTH, WIDTH, dtype=torch.float64, requires_grad=grad)
            for columns in (1, 8):  # so much that it packs
                rows, hidden = x.repeat(1, columns, 1), torch.cat([padding, *[torch.ones_like(padding)] * (columns - 1)], 1)
                out = attention(rows, rows, rows, key_padding_mask=hidden, need_weights=False)[0]
                assert not out[hidden].any()
                assert out[~hidden].all()


@_scenario("`FullyShardedDataParallel` (FSDP1), `use_orig_params` True or False", "stacks of transformers pack if `enable` was before")
def fsdp1(here: Here) -> None:
    for kind in ALL:
        for order in _orders(kind):
            for original in (True, False)[: 1 + (order != "after")]:

                def wrap(model: nn.Module, original: bool = original) -> nn.Module:
                    policy = ModuleWrapPolicy({type(layer) for layer in layers_of(model)})
                    options: dict[str, Any] = dict(auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=original)
                    return FullyShardedDataParallel(model, device_mesh=here.mesh, **options)

                here.exact(kind, wrap, order, packed=_is_packed(kind, order) and (kind, order) != ("bert", "after"))


# A layer of transformers by parts; the parts of its attention are whole heads.
PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": (
        "encoder.layer",
        {
            **{f"attention.self.{name}": ColwiseParallel for name in ("query", "key", "value")},
            **{"attention.output.dense": RowwiseParallel, "intermediate.dense": ColwiseParallel, "output.dense": RowwiseParallel},
        },
    ),
    "llama": (
        "layers",
        {
            **{f"self_attn.{name}_proj": ColwiseParallel for name in "qkv"},
            **{f"mlp.{name}_proj": ColwiseParallel for name in ("gate", "up")},
            **{"self_attn.o_proj": RowwiseParallel, "mlp.down_proj": RowwiseParallel},
        },
    ),
    "encoder": ("layers", {"linear1": ColwiseParallel, "linear2": RowwiseParallel}),
}


def _in_parts(model: Any, mesh: DeviceMesh, kind: str) -> nn.Module:
    layers, parts = PLANS[kind]
    parallelize_module(model.inner, mesh, {f"{layers}.{i}.{name}": style() for i in range(2) for name, style in parts.items()})
    return model  # type: ignore[no-any-return]


@_scenario(
    "`parallelize_module` with `ColwiseParallel` and `RowwiseParallel`",
    'their hooks keep stacks padded, unless `enable(model, hooks="packed")`',
)
def tensor_parallel(here: Here) -> None:
    alike = Here(0, here.world, here.mesh, here.folder)  # every rank has the batch
    for kind in PLANS:
        _, padding = batch(0, 0)
        wanted = made(kind)(batch(0, 0)[0], padding)[~padding]
        loss_of(reference := made(kind), 0, 0).backward()
        for order in ("before", "after"):
            for hooks in ("leave", "packed"):
                model = made(kind)
                if order == "before":
                    enable(model, hooks=hooks)
                _in_parts(model, alike.mesh, kind)
                if order == "after":
                    with warnings.catch_warnings():
                        enable(model, hooks=hooks)
                with record(model) as log:
                    loss_of(model, 0, 0).backward()
                assert any(call.rows < call.slots for call in log) == (hooks == "packed"), (kind, order, hooks, list(log))
                tolerance = 1e-10 if kind != "llama" else 1e-6  # whose norms are float32
                _close(model(*batch(0, 0))[~padding].detach(), wanted.detach(), f"{kind} {order} {hooks}", tolerance)
                for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
                    if q.grad is not None:
                        assert p.grad is not None, name
                        _close(_local(p.grad), q.grad, name, tolerance)


@_scenario("`parallelize_module` inside of `fully_shard` (2 by 2 ranks)", worlds=(4,))
def two_dimensions(here: Here) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "parts"))
    half = Here(mesh.get_local_rank("data"), 2, mesh["data"], here.folder)
    for order in ("before", "after"):

        def wrap(model: nn.Module) -> nn.Module:
            return _sharded(_in_parts(model, mesh["parts"], "bert"), mesh["data"])

        half.exact("bert", wrap, order, hooks="packed")


@_scenario("`tp_plan=` of transformers", 'attention only; `parallelize_module` after `enable(model, hooks="packed")` packs')
def tp_plan(here: Here) -> None:
    from transformers import LlamaModel

    plain, path = made("llama"), here.folder / "llama"
    if here.rank == 0:
        plain.inner.save_pretrained(path)
    dist.barrier()
    model = made("llama")
    model.inner = LlamaModel.from_pretrained(path, tp_plan="auto", dtype=torch.float64)
    assert any(hasattr(p, "full_tensor") or p.shape != q.shape for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    ids, padding = batch(0, 0)
    for hooks in ("leave", "packed"):
        enable(model, hooks=hooks)
        _close(model(ids, padding)[~padding].detach(), plain(ids, padding)[~padding].detach(), hooks, 1e-6)


@_scenario("Activations that are `DTensor`s: modules of torch", "they run as they came")
def distributed_activations(here: Here) -> None:
    ids, padding = batch(0, 0)
    for kind in ("encoder", "attention"):
        for order in ("before", "after"):
            plain, model = made(kind), made(kind)
            if order == "before":
                enable(model)
            distribute_module(model, here.mesh)
            if order == "after":
                enable(model)
            whole = [distribute_tensor(x, here.mesh, [Replicate()]) for x in (ids, padding)]
            _close(_local(model(*whole))[~padding], plain(ids, padding)[~padding].detach(), f"{kind} {order}", 1e-10)


@_scenario(
    "Activations that are `DTensor`s: our functions, layouts and modules built by name",
    "other ranks may hold rows: pass `x.to_local()`, or `x.full_tensor()`",
    "refused",
)
def distributed_rows(here: Here) -> None:
    _, padding = batch(0, 0)
    x = torch.randn(4, LENGTH, WIDTH, dtype=torch.float64)
    layout = SeqLayout.from_key_padding_mask(padding)
    modules = {kind: made(kind, ours=True).inner for kind in ("encoder", "attention")}
    for placement in (Replicate(), Shard(0), Shard(1)):
        there, mask = distribute_tensor(x, here.mesh, [placement]), distribute_tensor(padding, here.mesh, [placement])
        heads = there.unflatten(-1, (HEADS, -1))
        rows = distribute_tensor(layout.pack(x).unflatten(-1, (HEADS, -1)), here.mesh, [placement])
        calls: list[Callable[[], Any]] = [
            lambda rows=rows: varlen_attention(rows, rows, rows, layout),
            lambda there=there: layout.pack(there),
            lambda rows=rows: layout.unpack(rows),
        ]
        for m in (padding, mask):
            calls += [
                lambda there=there, m=m: varlen_mha(there, m, num_heads=HEADS),
                lambda heads=heads, m=m: padded_attention(heads, heads, heads, m),
                lambda there=there, m=m: modules["encoder"](there, src_key_padding_mask=m),
                lambda there=there, m=m: modules["attention"](there, key_padding_mask=m),
            ]
        for call in calls:
            with pytest.raises(DtypeError, match="is a DTensor, of which other ranks may hold some"):
                call()


@_scenario("`torch.distributed.checkpoint`, with `state_dict` or `get_state_dict`", "keys do not change")
def distributed_checkpoint(here: Here) -> None:
    """What an enabled and sharded model saves, a plain one loads, and the other way round."""

    def of(order: str) -> Any:
        model = made("encoder")
        if order == "before":
            enable(model)
        model = _sharded(model, here.mesh)
        if order == "after":
            enable(model)
        return model

    for order in ("before", "after"):
        saved = of(order)
        here.train(saved)
        path = str(here.folder / f"checkpoint-{order}")
        adam = torch.optim.AdamW(saved.parameters())
        weights, moments = get_state_dict(saved, adam)
        save({"model": weights, "optim": moments}, checkpoint_id=path)
        assert set(weights) == set(made("encoder").state_dict())
        for other in ("plain", "before", "after"):
            loaded = of(other)
            with torch.no_grad():
                for p in loaded.parameters():
                    p.zero_()
            adam = torch.optim.AdamW(loaded.parameters())
            weights, moments = get_state_dict(loaded, adam)
            load({"model": weights, "optim": moments}, checkpoint_id=path)
            set_state_dict(loaded, adam, model_state_dict=weights, optim_state_dict=moments)
            here.compare(loaded, "encoder")
        loaded = made("encoder")
        weights = loaded.state_dict()
        load({"model": weights}, checkpoint_id=path)
        loaded.load_state_dict(weights)
        here.compare(loaded, "encoder")


@_scenario('Construction on `"meta"`, `fully_shard`, `to_empty`, then loading', "`enable` at any point; transformers: after loading")
def meta(here: Here) -> None:
    for kind in ALL:
        for order in ("meta", "sharded", "empty", "loaded")[3 * (kind == "bert") :]:
            with torch.device("meta"):
                model = MODELS[kind]().double()
            enable(model) if order == "meta" else None
            model = _sharded(model, here.mesh)
            enable(model) if order == "sharded" else None
            model.to_empty(device="cpu")
            enable(model) if order == "empty" else None
            weights = {name: p.detach() for name, p in made(kind).state_dict().items()}
            set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
            for name, buffer in made(kind).named_buffers():  # those that are in no state_dict
                model.get_buffer(name).copy_(buffer)
            enable(model) if order == "loaded" else None
            here.train(model, packed=kind != "attention")
            here.compare(model, kind)


@_scenario("`checkpoint_wrapper`, `apply_activation_checkpointing`, after `enable` and before", "with `fully_shard` too")
def checkpoint_wrappers(here: Here) -> None:
    def wrap(model: Any, shard: bool) -> nn.Module:
        kinds = {type(layer) for layer in layers_of(model)}
        apply_activation_checkpointing(model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda m: type(m) in kinds)
        assert any("CheckpointWrapper" in type(m).__name__ for m in model.modules())
        return (
            _sharded(model, here.mesh) if shard else DistributedDataParallel(model, find_unused_parameters="Bert" in type(model).__name__)
        )

    for kind in ("encoder", "bert"):
        for order in _orders(kind):
            for shard in (False, True):
                here.exact(kind, functools.partial(wrap, shard=shard), order)


@_scenario("`nn.DataParallel`", "on a CPU it calls the module; several GPUs are untested")
def data_parallel(here: Here) -> None:
    for kind in ALL:
        model, plain = made(kind), made(kind)
        model = nn.DataParallel(model)
        enable(model)
        ids, padding = batch(0, 0)
        _close(model(ids, padding)[~padding].detach(), plain(ids, padding)[~padding].detach(), kind, 1e-10)


@_scenario("`Accelerator.prepare`", "before or after `enable`")
def accelerate(here: Here) -> None:
    from accelerate import Accelerator, DistributedDataParallelKwargs

    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    assert accelerator.num_processes == here.world
    for kind in ALL:
        for order in _orders(kind):
            here.exact(kind, accelerator.prepare, order, packed=_is_packed(kind, order))


@_scenario("`Trainer` of transformers, with the variables of `torchrun`", "losses and weights as those of the padded model")
def trainer(here: Here) -> None:
    from transformers import Trainer, TrainingArguments

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = made("bert")

        def forward(self, ids: Tensor, padding: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.net(ids, padding).sin() * ~padding[..., None]).sum() / 40}

    data = [{"ids": ids, "padding": padding} for i in range(6) for ids, padding in zip(*batch(i, 0), strict=True)]
    losses, weights = [], []
    for packed in (False, True):
        model = Loss()
        if packed:
            enable(model)
        arguments = TrainingArguments(
            str(here.folder / "trainer"),
            max_steps=3,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            ddp_find_unused_parameters=True,
        )
        learner = Trainer(model, arguments, train_dataset=data)
        with record(model) as log:
            learner.train()
        assert any(call.rows < call.slots for call in log) == packed
        losses.append([float(entry["loss"]) for entry in learner.state.log_history if "loss" in entry])
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert len(losses[0]) == 3
    _close(*map(torch.tensor, losses), "losses", 1e-6)
    _close(*weights, "weights", 1e-10)


# -------------------------------------------------------------------- the page

PAGE = Path(__file__).parents[1] / "docs" / "parallel.md"
UNTESTED = {
    "DeepSpeed, Megatron": "",
    "Lightning": "a recipe is below",
    "`torch.distributed.pipelining`": "a recipe is below",
    "Several GPUs: NCCL, `nn.DataParallel` on them, `fully_shard` with `CPUOffloadPolicy`": "the tests run on CPUs (gloo)",
    "`SequenceParallel`": 'its hooks keep stacks padded; do not pass `hooks="packed"` with it, because packed rows have other columns',
}
_BEGIN, _END = "<!-- table -->\n", "<!-- /table -->"


def page() -> str:
    """`docs/parallel.md` with the table as it is."""
    before, rest = PAGE.read_text().split(_BEGIN)
    rows = [(x.what, x.outcome, x.note) for x in SCENARIOS.values()]
    rows += [(what, "untested", note) for what, note in UNTESTED.items()]
    rows.append(("`context_parallel` of torch", "refused", "no backend sees the columns of other ranks"))
    table = ["| what is done | result | |", "| --- | --- | --- |", *(f"| {what} | {outcome} | {note} |" for what, outcome, note in rows)]
    return before + _BEGIN + "\n".join(table) + "\n" + _END + rest.split(_END)[1]


# -------------------------------------------------------------------- the processes


def _work(rank: int, world: int, folder: str, names: tuple[str, ...]) -> None:
    """One process: what went wrong there, by scenario. All stop at the first in which one fails, because others may wait in it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(f"{folder}/store", world)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))  # as torchrun does
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    here = Here(rank, world, init_device_mesh("cpu", (world,)), Path(folder))
    said: dict[str, str] = {}
    for name in names:
        try:
            SCENARIOS[name].run(here)
            said[name] = ""
        except BaseException:
            said[name] = f"rank {rank}: {traceback.format_exc()}"
        (here.folder / f"{rank}.json").write_text(json.dumps(said))
        gc.collect()
        dist.barrier()
    dist.destroy_process_group()


def spawn(world: int, folder: Path, *names: str) -> dict[str, str]:
    """What went wrong in any process, by scenario."""
    names = names or tuple(name for name, scenario in SCENARIOS.items() if world in scenario.worlds)
    context = torch.multiprocessing.start_processes(_work, (world, str(folder), names), world, join=False)
    try:
        while not context.join():
            pass
        error = ""
    except Exception as e:
        error = str(e)
    files = [folder / f"{rank}.json" for rank in range(world)]
    found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    return {name: "\n".join(filter(None, (said.get(name, f"not finished: {error}") for said in found))) for name in names}


if __name__ == "__main__":
    import sys
    import tempfile
    import time

    if not sys.argv[1:]:
        PAGE.write_text(page())
    for world in map(int, sys.argv[1:2]):
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            for name, said in spawn(world, Path(folder), *sys.argv[2:]).items():
                sys.stdout.write(f"{world} {name}: {said or 'as in one process'}\n")
            sys.stdout.write(f"{time.perf_counter() - begun:.1f} s\n")
