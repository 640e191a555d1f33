"""Hooks, methods and classes that come after `enable`: what they see and do is what they saw and did before."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from varlen_attn import disable, enable, record
from varlen_attn.nn.transformer import unwrapped
from varlen_attn.testing.strategies import Batch, batches

from .test_convert import HOOKS, PADDING, D, assert_same, attention, decoder, encode, layer, quietly, reasons, rows, stack

pytestmark = pytest.mark.filterwarnings(
    "ignore:row . of the mask has no token",  # drawn on purpose
    "ignore:The PyTorch API of nested tensors",  # torch's encoder makes them in evaluation
    "ignore:enable_nested_tensor is True",  # and says where it cannot
)
HOSTS: dict[str, Callable[[], Any]] = {
    "encoder": stack,
    "encoder, pre-norm, sequence first": lambda: stack(norm_first=True, batch_first=False),
    "encoder layer": layer,
    "decoder": decoder,
    "decoder layer": lambda: layer(nn.TransformerDecoderLayer, norm_first=True),
}
each_host = pytest.mark.parametrize("host", HOSTS)


# Without any token torch has NaN, and without rows it raises.
TOKENS = batches(("right", "left", "both", "holes"), max_batch=3, max_len=5)
TOKENS = TOKENS.filter(lambda batch: batch.mask.numel() > 0 and bool((~batch.mask).any(1).all()))


def call(model: Any, x: Tensor, padding: Tensor) -> Tensor:
    """Of an encoder or decoder; memory is padded as the targets are."""
    first = model.layers[0] if hasattr(model, "layers") else model
    x = x if first.self_attn.batch_first else x.transpose(0, 1)
    if hasattr(first, "multihead_attn"):
        out = model(x, x, tgt_key_padding_mask=padding, memory_key_padding_mask=padding)
    else:
        out = model(x, src_key_padding_mask=padding)
    return out if first.self_attn.batch_first else out.transpose(0, 1)  # type: ignore[no-any-return]


def gradients(model: nn.Module, batch: Batch) -> list[Tensor]:
    """The results at real tokens, and gradients of a loss of these with respect to the input and all weights."""
    x, factors = (batch.tensor(D, dtype=torch.float64, salt=salt) for salt in range(2))
    out = call(model, x.requires_grad_(), batch.mask)
    leaves = [x, *model.parameters()]
    loss = (out * factors)[~batch.mask].sum()
    return [out[~batch.mask], *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def watch(model: nn.Module, part: str, kind: str) -> tuple[list[Tensor], Any]:
    """What a hook sees, and its handle."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, *args: Any) -> None:
        seen.extend(x.detach().clone() for x in tree_leaves(args) if isinstance(x, Tensor))

    return seen, getattr(model.get_submodule(part), kind)(hook)


@each_host
@given(data=st.data(), batch=TOKENS, kind=st.sampled_from(HOOKS))
def test_hooks_after_enable_see_what_they_saw_before(host: str, data: st.DataObject, batch: Batch, kind: str) -> None:
    model = HOSTS[host]()
    # torch calls all but these; of the output projection it reads the weights.
    part = data.draw(st.sampled_from([x for x, _ in model.named_modules() if x not in ("", "layers") and not x.endswith("out_proj")]))
    enabled = copy.deepcopy(model)
    enable(enabled)
    before, _ = watch(model, part, kind)
    want = gradients(model, batch)
    after, handle = watch(enabled, part, kind)
    got = gradients(enabled, batch)
    assert_same(got, want)
    assert_same(after, before)
    assert not call(enabled, batch.tensor(D, dtype=torch.float64), batch.mask)[batch.mask].any(), "padding is filled on every way"
    handle.remove()
    with record() as log:
        packed = gradients(enabled, batch)
    assert {c.rows for c in log.calls} <= {batch.layout.total}, "packed again once nobody watches"
    assert_same(packed, want)


def packs(model: Any) -> bool:
    """Whether attention gets rows of real tokens only."""
    with record() as log:
        call(model, rows(), PADDING)
    return {c.rows for c in log.calls} == {int((~PADDING).sum())}


@each_host
def test_a_hook_that_changes_what_passes(host: str) -> None:
    """As steering of activations does: it writes to one column of all rows."""
    model = HOSTS[host]()
    wanted = copy.deepcopy(model)
    enable(model)

    def steer(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out.select(1 if batch_first else 0, 2).add_(1.0)
        return out

    found = []
    for m in (wanted, model):
        part = m.layers[0] if hasattr(m, "layers") else m.norm1
        batch_first = (m.layers[0] if hasattr(m, "layers") else m).self_attn.batch_first
        part.register_forward_hook(steer)
        found.append(call(m, rows(), PADDING)[~PADDING])
    assert_same(found[1:], found[:1])


def test_hooks_for_all_modules() -> None:
    model, shapes = stack(), []
    enable(model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: shapes.append(args[0].shape))
    assert not packs(model)
    assert {s[:2] for s in shapes} == {PADDING.shape}
    handle.remove()
    assert packs(model)


def test_hooks_of_torch_that_look_at_no_activation_leave_a_stack_packed() -> None:
    model = stack()
    enable(model)
    prune.l1_unstructured(model.layers[0].linear1, "weight", 0.5)
    assert packs(model)
    with FlopCounterMode(display=False) as packed:
        assert packs(model)
    disable(model)
    with FlopCounterMode(display=False) as padded:
        encode(model.train())
    assert packed.get_total_flops() < padded.get_total_flops()


def test_hooks_packed_is_kept_by_copies_and_forgotten_by_the_next_call() -> None:
    model = stack()
    plain = vars(copy.deepcopy(model)).keys()
    enable(model, hooks="packed")
    model.layers[0].norm1.register_forward_hook(lambda *args: None)
    assert packs(model)
    assert packs(copy.deepcopy(model))
    report = enable(model)
    assert "has hooks" in reasons(report)["layers.0"]
    disable(model)
    assert vars(model).keys() == plain


def test_a_layer_that_was_left_alone_for_its_hooks_takes_no_packing_from_others() -> None:
    model = stack(3)
    seen, _ = watch(model, "layers.1.linear1", "register_forward_hook")
    want = encode(copy.deepcopy(model))
    seen.clear()
    enable(model)
    with record() as log:
        assert_same([encode(model)], [want])
    assert [c.rows for c in log.calls] == [int((~PADDING).sum())] * 2
    assert {x.shape[:2] for x in seen} == {PADDING.shape}


def test_a_record_says_why_a_stack_runs_as_it_came() -> None:
    model = stack()
    enable(model)
    model.layers[1].linear2.register_forward_hook(lambda *args: None)
    with record(model) as log:
        encode(model)
    assert [(c.backend, c.rows) for c in log.calls] == [("dense", PADDING.numel())]
    assert 'as it came: layers.1.linear2: has hooks, which would see packed rows: allow it with hooks="packed"' in str(log)


def checkpointed(module: Any) -> Any:
    module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
    return module


@pytest.mark.parametrize("wrapper", [checkpoint_wrapper, checkpointed])
def test_checkpointed_layers_inside_of_a_stack_that_is_watched(wrapper: Callable[[Any], Any]) -> None:
    """What they compute again is what they computed."""

    def run(model: Any) -> list[Tensor]:
        out = encode(model)
        return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]

    model = stack(3)
    want = run(copy.deepcopy(model))
    if wrapper is checkpoint_wrapper:
        model.layers = nn.ModuleList(map(wrapper, model.layers))
    enable(model)
    if wrapper is checkpointed:
        model.layers = nn.ModuleList(map(wrapper, model.layers))
    assert_same(run(model), want)
    unwrapped(model.layers[1]).linear1.register_forward_hook(lambda *args: None)
    assert_same(run(model), want)


# -------------------------------------------------------------------- methods of objects, and of classes


def doubled(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def twice(*args: Any, **options: Any) -> Any:
        out = method(*args, **options)
        return (2 * out[0], out[1]) if isinstance(out, tuple) else 2 * out

    return twice


PATCHES: dict[str, tuple[Any, str]] = {
    "sa_block": (nn.TransformerEncoderLayer, "_sa_block"),
    "ff_block": (nn.TransformerEncoderLayer, "_ff_block"),
    "layer": (nn.TransformerEncoderLayer, "forward"),
    "stack": (nn.TransformerEncoder, "forward"),
    "attention": (nn.MultiheadAttention, "forward"),
    "function": (F, "multi_head_attention_forward"),
}


@pytest.mark.usefixtures("_no_fast_path")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("level", ["attention", "model"])
@pytest.mark.parametrize("patch", PATCHES)
def test_code_that_is_replaced_for_all_objects_runs(patch: str, level: Any, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = PATCHES[patch]
    model, lone = stack(), attention()
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, doubled(getattr(owner, name)))
        want = [encode(model), lone(rows(), rows(), rows(), PADDING)[0][~PADDING]]
        if when == "before":
            report = quietly(nn.ModuleList([model, lone]), level=level)
            assert f"{owner.__name__}.{name} was replaced for all objects" in str(report)
    if when == "after":
        enable(nn.ModuleList([model, lone]), level)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, doubled(getattr(owner, name)))
        with record() as log:
            assert_same([encode(model), lone(rows(), rows(), rows(), PADDING)[0][~PADDING]], want)
        assert when == "before" or f"{owner.__name__}.{name} was replaced for all objects" in str(log)
    if when == "after" and level == "model":
        assert packs(model)


@pytest.fixture
def _no_fast_path() -> Any:
    """It calls none of these."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("method", ["_sa_block", "_ff_block", "forward"])
def test_methods_that_are_replaced_on_a_layer_run(method: str) -> None:
    model = stack()
    plain = copy.deepcopy(model)
    enable(model)
    found = []
    for m in (plain, model):
        setattr(m.layers[1], method, doubled(getattr(m.layers[1], method)))
        found.append(encode(m))
    assert_same(found[1:], found[:1])


# -------------------------------------------------------------------- compiled


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch about itself
def test_compiled_code_asks_for_what_eager_code_asks_for() -> None:
    x = rows()
    lone, alone = attention(), layer()
    want = lone(x, x, x, PADDING)[1]
    enable(lone)
    enable(alone)
    compile_ = functools.partial(torch.compile, backend="eager", fullgraph=True)
    assert_same([compile_(lone)(x, x, x, PADDING)[1][~PADDING]], [want[~PADDING]])
    assert_same([encode(compile_(alone))], [encode(alone)])
    alone.linear1.register_forward_hook(lambda module, args, out: 2 * out)
    torch._dynamo.reset()  # its guards do not look for hooks
    assert_same([encode(compile_(alone))], [encode(alone)])
