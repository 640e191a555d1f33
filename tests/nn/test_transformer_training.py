"""Training and deployment of encoders and decoders: dropout, autocast, checkpoints, `torch.compile`, several processes."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from varlen_attn import SeqLayout, record
from varlen_attn.testing import assert_within_budget

from ..attention.test_functional import TOTALS, _Counting, dynamo_warns
from .test_transformer import DECODERS, build, each_class, pair

E = 8
each_stack = pytest.mark.parametrize("host", [nn.TransformerEncoder, nn.TransformerDecoder], ids=lambda c: c.__name__)
PADDING = torch.arange(6) >= torch.tensor([6, 2, 0, 3])[:, None]
MEMORY_PADDING = torch.arange(5) < torch.tensor([0, 3, 1, 5])[:, None]
rows_without_tokens = pytest.mark.filterwarnings("ignore:row . of the mask has no token")


def inputs(host: type[nn.Module], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((4, 6, E), (4, 5, E)) if host in DECODERS else ((4, 6, E),)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def paddings(host: type[nn.Module]) -> dict[str, Tensor]:
    if host in DECODERS:
        return {"tgt_key_padding_mask": PADDING, "memory_key_padding_mask": MEMORY_PADDING}
    return {"src_key_padding_mask": PADDING}


def results(model: nn.Module, out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The output at real tokens, and the gradients of inputs and parameters."""
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    loss = (out.double() * probe)[~PADDING].sum()
    return [out[~PADDING], *torch.autograd.grad(loss, [*leaves, *model.parameters()])]


# -------------------------------------------------------------------- dropout


@rows_without_tokens
@each_class
def test_dropout_is_applied_in_training_only(host: type[nn.Module]) -> None:
    """R-24: of attention weights, of activations and of both residuals; a seed repeats it."""
    ours = build(host, ours=True, dropout=0.4)
    x = inputs(host)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        out: Tensor = ours(*x, **paddings(host))
        assert not out[PADDING].any()
        return out

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    ours.eval()
    assert torch.equal(run(0), run(1))
    without = build(host, ours=True, dropout=0.0)
    without.load_state_dict(ours.state_dict())
    assert torch.equal(run(0), without(*x, **paddings(host)))


@rows_without_tokens
def test_every_dropout_of_a_layer_drops() -> None:
    ours = build(nn.TransformerDecoderLayer, ours=True)
    host = nn.TransformerDecoderLayer
    x = inputs(host)
    want = ours(*x, **paddings(host))
    parts: list[Any] = [ours.dropout, ours.dropout1, ours.dropout2, ours.dropout3, ours.self_attn, ours.multihead_attn]
    for part in parts:
        name = "dropout" if hasattr(part, "dropout") else "p"
        setattr(part, name, 0.5)
        assert not torch.equal(ours(*x, **paddings(host)), want), part
        setattr(part, name, 0.0)
    assert torch.equal(ours(*x, **paddings(host)), want)


# -------------------------------------------------------------------- dtypes


@pytest.mark.native_too
@rows_without_tokens
@each_class
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype", ["autocast", "bfloat16", "float32"])
def test_lower_precision_is_within_the_error_budget(host: type[nn.Module], norm_first: bool, dtype: str) -> None:
    """R-12, R-23: the error against float64 may be twice that of torch's own module in the same dtype."""
    theirs, ours = pair(host, norm_first=norm_first)
    truth = results(theirs, theirs(*(x := inputs(host)), **paddings(host)), x)
    low = torch.bfloat16 if dtype == "bfloat16" else torch.float32

    def run(model: nn.Module) -> list[Tensor]:
        model, leaves = copy.deepcopy(model).to(low), inputs(host, low)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            out = model(*leaves, **paddings(host))
        return results(model, out, leaves)

    got, naive = run(ours), run(theirs)
    assert [g.dtype for g in got] == [n.dtype for n in naive]
    for i, (a, b, c) in enumerate(zip(got, truth, naive, strict=True)):
        a = a.to(torch.bfloat16) if dtype == "autocast" else a
        assert_within_budget(a, b, c, gradient=i > 0, what=f"result {i}")


# -------------------------------------------------------------------- checkpoints


@pytest.mark.native_too
@rows_without_tokens
@each_stack
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("around", ["stack", "each layer"])
def test_checkpoints_recompute_the_same(host: type[nn.Module], use_reentrant: bool, autocast: bool, around: str) -> None:
    """R-41: with dropout, whose random state is kept; a layout is an input like another."""
    model: Any = build(host, ours=True, dropout=0.3, dtype=torch.float32)
    layouts = [SeqLayout.from_key_padding_mask(p, validate=False) for p in paddings(host).values()]

    def through(call: Callable[..., Tensor], *args: Any) -> Tensor:
        return checkpoint(call, *args, use_reentrant=use_reentrant)  # type: ignore[no-any-return]

    def direct(call: Callable[..., Tensor], *args: Any) -> Tensor:
        return call(*args)

    def run(way: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        leaves = inputs(host, torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            if around == "stack":
                out = way(lambda *x: model(*x, **paddings(host)), *leaves)
            else:
                rows = [layout.pack(x) for layout, x in zip(layouts, leaves, strict=True)]
                for layer in model.layers:
                    given = dict(zip(("layout", "layout_kv"), layouts, strict=False))
                    rows[0] = way(lambda *x, layer=layer, given=given: layer(*x, **given), *rows)
                out = layouts[0].unpack(rows[0])
        model.zero_grad()
        out.float().sin().sum().backward()
        used = [p for p in model.parameters() if p.grad is not None]
        assert len(used) == len(list(model.parameters())) - (2 if around == "each layer" else 0), "all but the final norm"
        return [out, *(t.grad for t in (*leaves, *used))]  # type: ignore[misc]

    for a, b in zip(run(direct), run(through), strict=True):
        assert torch.equal(a, b)


# -------------------------------------------------------------------- torch.compile


LENGTHS = (*TOTALS, [7, 7, 7], [0, 8, 0], [3, 6, 5])
CAUSAL = torch.ones(8, 8, dtype=torch.bool).triu(1)


def right_padded(lengths: list[int], size: int = 8) -> Tensor:
    return torch.arange(size) >= torch.tensor(lengths)[:, None]


def compiled_like_eager(
    model: nn.Module, options: Callable[[int, list[int]], dict[str, Any]], tensors: int, batches: int = len(LENGTHS)
) -> int:
    """Outputs and, in training, gradients of a compiled model and of the model; how many graphs were compiled."""
    from torch import _dynamo  # before the layouts: they mark themselves where it is loaded

    _dynamo.reset()
    counting = _Counting()
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    for i, lengths in enumerate(LENGTHS[:batches]):
        x = [torch.randn(3, 8, E, requires_grad=model.training) for _ in range(tensors)]
        given = options(i, lengths)
        with torch.set_grad_enabled(model.training):
            got, want = compiled(*x, **given), model(*x, **given)
        torch.testing.assert_close(got, want)
        if model.training:
            wanted = [*x, *model.parameters()]
            grads = [torch.autograd.grad(out.sin().sum(), wanted, materialize_grads=True) for out in (got, want)]
            torch.testing.assert_close(*grads)
    _dynamo.reset()
    return counting.graphs


@dynamo_warns
@rows_without_tokens
@pytest.mark.parametrize(
    ("given", "training", "layers"),
    [("mask", True, 2), ("mask", False, 1), ("mask and causal hint", True, 1), ("layout", True, 1), ("layout", False, 1)],
)
def test_one_graph_of_an_encoder_for_all_lengths(given: str, training: bool, layers: int) -> None:
    """R-18, R-19: fullgraph, many totals including 0 and 1, at most two compilations."""
    model = build(nn.TransformerEncoder, ours=True, layers=layers, dtype=torch.float32).train(training)

    def options(i: int, lengths: list[int]) -> dict[str, Any]:
        if given == "layout":
            return {"layout": SeqLayout.from_lengths(lengths, 8)}
        causal = {"mask": CAUSAL, "is_causal": True} if "causal" in given else {}
        return {"src_key_padding_mask": right_padded(lengths).flip(1) if i % 3 == 2 else right_padded(lengths), **causal}

    assert compiled_like_eager(model, options, 1) <= 2


@dynamo_warns
@rows_without_tokens
@pytest.mark.parametrize(("given", "training"), [("masks", True), ("layouts", False)])
def test_one_graph_of_a_decoder_for_all_lengths(given: str, training: bool) -> None:
    model = build(nn.TransformerDecoder, ours=True, layers=1, dtype=torch.float32).train(training)

    def options(i: int, lengths: list[int]) -> dict[str, Any]:
        others = LENGTHS[i - 5]
        if given == "layouts":
            return {"layout": SeqLayout.from_lengths(lengths, 8), "layout_kv": SeqLayout.from_lengths(others, 8), "tgt_is_causal": True}
        return {"tgt_key_padding_mask": right_padded(lengths), "memory_key_padding_mask": right_padded(others).flip(1), "tgt_mask": CAUSAL}

    assert compiled_like_eager(model, options, 2) <= 2


@dynamo_warns
@rows_without_tokens
@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(torch.zeros(8, 8).masked_fill(CAUSAL, -torch.inf), id="causal", marks=pytest.mark.native_too),
        pytest.param(CAUSAL.flip(0), id="any"),
    ],
)
def test_attention_masks_while_tracing(mask: Tensor) -> None:
    """Nothing can be compared: without the hint a mask is used as it is, with it it is trusted, as torch documents."""
    model = build(nn.TransformerEncoder, ours=True, layers=1, dtype=torch.float32).eval()
    graphs = compiled_like_eager(model, lambda i, n: {"mask": mask, "src_key_padding_mask": right_padded(n)}, 1, batches=4)
    assert graphs <= 2
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, padding = torch.randn(3, 8, E), right_padded([5, 2, 8])
    torch.testing.assert_close(compiled(x, mask), model(x, mask))
    with record() as log:
        hinted = compiled(x, mask, padding, is_causal=True)
    torch.testing.assert_close(hinted, model(x, CAUSAL, padding))
    assert [c.backend for c in log.calls] in (["cpu"], ["cpu_native"])


# -------------------------------------------------------------------- several processes


STEPS = 2


def _batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Different lengths in every process; the second process begins with a batch of nothing but padding."""
    lengths = [[5, 0, 2], [0, 0, 0]][rank] if step == 0 else [[1, 1, 1], [6, 3, 2]][rank]
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(3, 6, E, generator=generator, dtype=torch.float64), torch.arange(6) >= torch.tensor(lengths)[:, None]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return build(nn.TransformerEncoder, ours=True)


def _loss(model: nn.Module, rank: int, step: int) -> Tensor:
    x, padding = _batch(rank, step)
    return model(x, src_key_padding_mask=padding).sin().sum()  # type: ignore[no-any-return]


def _train(rank: int, folder: str) -> None:
    """One of two processes; writes the gradients of every step."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    model = nn.parallel.DistributedDataParallel(_model())
    for step in range(STEPS):
        model.zero_grad()
        _loss(model, rank, step).backward()
        torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}-{step}.pt")
    # No process leaves, and none tears down what its model still holds, while the other is at work: gloo's threads abort then.
    torch.distributed.barrier()
    del model
    gc.collect()
    torch.distributed.destroy_process_group()


@pytest.mark.alone
@rows_without_tokens
def test_two_processes_average_their_gradients(tmp_path: Path) -> None:
    """Every parameter takes part even where a process has no token at all, so that no process waits for another for ever."""
    torch.multiprocessing.spawn(_train, (str(tmp_path),), nprocs=2)
    for step in range(STEPS):
        model = _model()
        (sum(_loss(model, rank, step) for rank in range(2)) / 2).backward()
        for rank in range(2):
            for got, p in zip(torch.load(tmp_path / f"{rank}-{step}.pt"), model.parameters(), strict=True):
                assert (got - p.grad).abs().max() < 1e-12
