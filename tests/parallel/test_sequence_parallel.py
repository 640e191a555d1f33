"""Rows of one batch on 2 to 4 processes: outputs and gradients are those of one process, in float64."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from varlen_attn import (
    ArgumentError,
    LayoutError,
    SeqLayout,
    VarlenTransformerEncoder,
    VarlenTransformerEncoderLayer,
    enable,
    explain,
    record,
    sequence_parallel,
    varlen_attention,
)
from varlen_attn._state import state, visible
from varlen_attn.nn.norm import varlen_norm
from varlen_attn.parallel.rows import split_layouts

Model = tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]

H = 4
BIAS = torch.randn(8, 40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def alibi(heads: int) -> Tensor:
    return torch.logspace(-1, -3, heads, dtype=torch.float64)


# Lengths of queries and of keys (None: the same), heads of queries and of keys, options. More heads than processes: by heads; else by rows.
CALLS: list[tuple[list[int], list[int] | None, int, int, dict[str, Any]]] = [
    ([9, 4, 0, 17, 1], None, 4, 4, {}),
    ([9, 4, 0, 17, 1], None, 4, 2, {"causal": True}),
    ([33], None, 6, 3, {"causal": True}),
    ([9, 4, 17, 2], None, 8, 1, {"window": (3, 2), "softcap": 5.0}),
    ([9, 4, 17, 2], None, 5, 5, {"sinks": True}),
    ([12, 20], None, 6, 2, {"alibi": True, "causal": True, "window": (4, None)}),
    ([12, 0, 20], None, 8, 4, {"bias": "tensor"}),
    ([12, 20], None, 4, 4, {"bias": "callable", "alibi": True}),
    ([1], None, 4, 4, {}),
    ([0, 0], None, 4, 2, {"causal": True}),
    ([7, 3, 0], [5, 0, 12], 4, 2, {"causal": True}),
    ([7, 3, 0], [5, 0, 12], 4, 2, {"causal": "top_left"}),
    # by rows
    ([9, 4, 0, 17, 1], None, 1, 1, {}),
    ([33], None, 1, 1, {"causal": True}),
    ([9, 4, 0, 17, 1], None, 1, 1, {"window": (3, 2), "sinks": True}),
    ([33], None, 1, 1, {"window": (6, None)}),
    ([33, 2], None, 1, 1, {"window": (None, 5), "alibi": True}),
    ([12, 21], None, 1, 1, {"alibi": True, "causal": True, "window": (4, 0)}),
    ([12, 0, 21], None, 1, 1, {"bias": "tensor", "alibi": True}),
    ([33], None, 1, 1, {"bias": "callable"}),
    ([1], None, 1, 1, {}),
    ([0, 0], None, 1, 1, {}),
    ([], None, 1, 1, {}),
    ([7, 3, 9], [5, 0, 12], 1, 1, {"causal": True}),
    ([7, 3, 9], [5, 0, 12], 1, 1, {"causal": "top_left"}),
    ([7, 3, 9], [5, 0, 12], 1, 1, {"window": (2, 3)}),
]


def near(found: Tensor, expected: Tensor, what: Any) -> None:
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    error = (found - expected).abs().max().item() if found.numel() else 0.0
    assert error < 1e-12, (what, error)


def check_calls(rank: int, world: int) -> None:
    for lengths, others, heads, kv_heads, asked in CALLS:
        generator = torch.Generator().manual_seed(0)
        layout = SeqLayout.from_lengths(lengths)
        layout_kv = None if others is None else SeqLayout.from_lengths(others)
        total, total_kv = sum(lengths), sum(lengths if others is None else others)
        shapes = (total, heads, H), (total_kv, kv_heads, H), (total_kv, kv_heads, H + 1)
        whole = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        weight = torch.randn(total, heads, H + 1, generator=generator, dtype=torch.float64)
        options = {name: x for name, x in asked.items() if name in ("causal", "window", "softcap")}
        if "alibi" in asked:
            options["alibi_slopes"] = alibi(heads)
        shared = []
        if "sinks" in asked:
            shared.append(torch.randn(heads, generator=generator, dtype=torch.float64))
            options["sinks"] = shared[0]
        if "bias" in asked:
            shared.append(BIAS[:heads].clone())
            bias = shared[-1]
            options["score_bias"] = bias if asked["bias"] == "tensor" else lambda h, q, k, bias=bias: bias[h, q, k]
        for x in (*whole, *shared):
            x.requires_grad_()
        wanted, lse = varlen_attention(*whole, layout, layout_kv, return_lse=True, **options)
        (wanted * weight).sum().backward()
        expected = [x.grad for x in (*whole, *shared)]
        mine = [x.detach().tensor_split(world)[rank].clone().requires_grad_() for x in whole]
        for x in shared:
            x.grad = None
        out, lse_mine = varlen_attention(*mine, layout, layout_kv, return_lse=True, group=dist.group.WORLD, **options)
        (out * weight.tensor_split(world)[rank]).sum().backward()
        what = (lengths, others, heads, kv_heads, asked, world, rank)
        near(out, wanted.tensor_split(world)[rank], what)
        finite = lse.tensor_split(world, 1)[rank]
        assert torch.equal(lse_mine.isinf(), finite.isinf()), what
        near(lse_mine.nan_to_num(neginf=0), finite.nan_to_num(neginf=0), what)
        for x, y in zip(mine, expected, strict=False):
            near(x.grad, y.tensor_split(world)[rank], what)
        for x, y in zip(shared, expected[3:], strict=True):
            part = torch.zeros_like(x) if x.grad is None else x.grad.clone()
            dist.all_reduce(part)
            near(part, y, what)


# -------------------------------------------------------------------- models


def padded_batch(lengths: list[int], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers at padding too, which count where the model computes them; a weight for the loss, 0 at padding."""
    generator = torch.Generator().manual_seed(len(lengths))
    shape = len(lengths), max(lengths), width
    padding = torch.arange(shape[1]) >= torch.tensor(lengths)[:, None]
    x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, padding, weight.masked_fill(padding[..., None], 0)


def encoder(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0, batch_first=True, dtype=torch.float64, **options)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(16, dtype=torch.float64), enable_nested_tensor=False)


def enabled_encoder() -> Model:
    model = encoder()
    enable(model)
    return model, lambda x, padding: model(x, src_key_padding_mask=padding)


def causal_encoder() -> Model:
    """By name; some of its layers know no layout, and are computed whole."""
    torch.manual_seed(0)
    layer = VarlenTransformerEncoderLayer(16, 4, 32, dropout=0, batch_first=True, norm_first=True, dtype=torch.float64)
    model = VarlenTransformerEncoder(layer, 3)
    model.layers[1] = nn.TransformerEncoderLayer(16, 4, 32, dropout=0, batch_first=True, dtype=torch.float64)
    return model, lambda x, padding: model(x, src_key_padding_mask=padding, is_causal=True)


def masked_encoder() -> Model:
    """Attention by a mask that only padded attention knows."""
    model = encoder()
    enable(model)
    mask = torch.zeros(40, 40, dtype=torch.bool).bernoulli_(0.3, generator=torch.Generator().manual_seed(0))
    mask[:, 0] = False
    return model, lambda x, padding: model(x, mask=mask[: x.shape[1], : x.shape[1]], src_key_padding_mask=padding)


def decoder(one: bool = False) -> Model:
    """To what it is given itself, reversed; or to its first token, which may be fewer rows than there are ranks."""
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(16, 4, 32, dropout=0, batch_first=True, dtype=torch.float64)
    model = nn.TransformerDecoder(layer, 2)
    enable(model)
    if one:
        return model, lambda x, padding: model(x, x[:, :1], tgt_is_causal=True, tgt_key_padding_mask=padding)
    return model, lambda x, padding: model(
        x, x.flip(0), tgt_is_causal=True, tgt_key_padding_mask=padding, memory_key_padding_mask=padding.flip(0)
    )


def in_float64(model: nn.Module) -> nn.Module:
    """With norms that do not compute in float32."""
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if type(child).__name__ in ("LlamaRMSNorm", "MistralRMSNorm", "T5LayerNorm"):
                setattr(module, name, nn.RMSNorm(16, eps=1e-6))
    model.double()
    enable(model)
    return model


def bert(**options: Any) -> Model:
    torch.manual_seed(0)
    size = dict(vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    config = transformers.BertConfig(**size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options)
    model = in_float64(transformers.BertModel(config))
    return model, lambda x, padding: model(inputs_embeds=x, attention_mask=(~padding).long()).last_hidden_state


def llama(heads: int = 4, **options: Any) -> Model:
    torch.manual_seed(0)
    size = dict(vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=heads, intermediate_size=32)
    cls, config = transformers.LlamaModel, transformers.LlamaConfig(**size, num_key_value_heads=max(heads // 2, 1), use_cache=False)
    if options:
        cls, config = transformers.MistralModel, transformers.MistralConfig(**size, num_key_value_heads=2, use_cache=False, **options)
    model = in_float64(cls(config))
    return model, lambda x, padding: model(inputs_embeds=x, attention_mask=(~padding).long()).last_hidden_state


def checkpointed_llama() -> Model:
    model, call = llama()
    model.activation_checkpointing_enable()
    return model, call


def islands() -> Model:
    """Attention of columns in layers of rows."""
    torch.manual_seed(0)
    size = dict(vocab_size=9, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0)
    model = in_float64(transformers.T5EncoderModel(transformers.T5Config(**size)))
    return model, lambda x, padding: model(inputs_embeds=x, attention_mask=(~padding).long()).last_hidden_state


# How many of its calls have rows of this rank, at least (0: attention is computed whole), and with which numbers of processes it is tested.
MODELS: list[tuple[Callable[[], Model], int, tuple[int, ...]]] = [
    (enabled_encoder, 2, (2, 3)),
    (causal_encoder, 2, (2,)),
    (masked_encoder, 0, (2,)),
    (decoder, 4, (3,)),
    (partial(decoder, one=True), 4, (3,)),
    (bert, 2, (2, 4)),
    (llama, 2, (2, 3)),
    (partial(llama, 1), 2, (4,)),
    (checkpointed_llama, 2, (2,)),
    (partial(llama, sliding_window=3), 2, (3,)),
    (islands, 0, (2,)),
]
BATCHES = ([9, 3, 14, 1], [33], [2, 1])


def step(model: nn.Module, call: Any, lengths: list[int]) -> list[Tensor]:
    """Output, gradient of the input, and of parameters."""
    x, padding, weight = padded_batch(lengths, 16)
    model.zero_grad()
    leaf = x.requires_grad_()
    out = call(leaf * 1, padding)
    ((out * weight).sum() / weight.shape[0]).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [out.detach() * (weight != 0), leaf.grad, *grads]


def averaged(grads: list[Tensor]) -> list[Tensor]:
    for grad in grads:
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    return grads


def check_models(rank: int, world: int) -> None:
    mesh = dist.init_device_mesh("cpu", (world,))
    for make, split, worlds in MODELS:
        for lengths in BATCHES if world in worlds else ():
            model, call = make()
            expected = step(model, call, lengths)
            with sequence_parallel(mesh), record(model) as log:
                out, grad, *others = step(model, call, lengths)
            for got, wanted in zip((out, grad, *averaged(others)), expected, strict=True):
                near(got, wanted, (make, lengths, rank, world))
            shared = [c for c in log if c.reason is not None and f"split over {world} ranks" in c.reason]
            assert len(shared) >= (split if sum(lengths) >= world else 0), (make, lengths, log)
            if lengths is BATCHES[0]:
                near(call(padded_batch(lengths, 16)[0], padded_batch(lengths, 16)[1]), model_output(make, lengths), make)


def model_output(make: Callable[[], Model], lengths: list[int]) -> Tensor:
    _, call = make()
    return call(*padded_batch(lengths, 16)[:2])


def check_meshes(rank: int, world: int) -> None:
    """Two batches, each shared by two ranks: wrappers of torch average gradients over all four."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    for make in (enabled_encoder, bert, llama):
        model, call = make()
        steps = [step(model, call, lengths) for lengths in BATCHES[:2]]
        expected = [sum(grads) / 2 for grads in zip(*(grads[2:] for grads in steps), strict=True)]
        lengths = BATCHES[rank // 2]
        for wrapped in ("DDP", "FSDP2"):
            model, call = make()
            if wrapped == "DDP":
                outer: nn.Module = nn.parallel.DistributedDataParallel(Caller(model, call), find_unused_parameters=True)
            else:
                for layer in model.layers if hasattr(model, "layers") else model.encoder.layer:
                    fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)
                outer = Caller(model, call)
            with sequence_parallel(mesh["sequence"]), record() as log:
                found = step(model, outer, lengths)
            assert any("split over 2 ranks" in (c.reason or "") for c in log), (wrapped, log)
            near(found[0], steps[rank // 2][0], wrapped)
            for got, wanted in zip(found[2:], expected, strict=True):
                near(got.full_tensor() if isinstance(got, DTensor) else got, wanted, (wrapped, rank))
            del outer, model, call


class Caller(nn.Module):
    def __init__(self, model: nn.Module, call: Any) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.call(x, padding)  # type: ignore[no-any-return]


class Sent(TorchDispatchMode):
    """Counts the numbers that this process sends to others."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.numbers, self.calls = rank, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_to_all_single" in str(func):
            sizes = args[2]
            self.numbers, self.calls = self.numbers + sum(sizes) - sizes[self.rank], self.calls + 1
        return func(*args, **(kwargs or {}))


def check_volume(rank: int, world: int) -> None:
    """The formulas of docs/how-to/sequence-parallel.md."""
    mesh, total = dist.init_device_mesh("cpu", (world,)), 32
    layout = SeqLayout.from_lengths([20, 12])
    for heads, kv_heads, sent in (
        (8, 4, 2 * (8 + 4) * (world - 1) / world**2),
        (8, 1, 2 * (8 + world) * (world - 1) / world**2),
        (1, 1, 2 * (world - 1) / world),
    ):
        q, k = (torch.randn(total // world, n, H, requires_grad=True) for n in (heads, kv_heads))
        with Sent(rank) as forward:
            out = varlen_attention(q, k, k, layout, group=mesh)
        with Sent(rank) as backward:
            out.sum().backward()
        assert forward.numbers == backward.numbers == total * H * sent, (heads, kv_heads, forward.numbers)
        assert forward.calls == backward.calls == (2 if heads >= world else 1)
    model, call = enabled_encoder()
    with sequence_parallel(mesh), Sent(rank) as both:
        step(model, call, [20, 12])
    layers, width = 2, 16
    assert both.numbers == total * width * (layers * 8 * (world - 1) / world**2 + 3 * (world - 1) / world)


def check_refusals(rank: int, world: int) -> None:
    mesh = dist.init_device_mesh("cpu", (world,))
    layout = SeqLayout.from_lengths([5, 3])
    q = torch.randn(4, 2, H)
    with pytest.raises(ArgumentError, match=r"`dropout_p` must be 0 where rows are split over ranks, but is 0\.5"):
        varlen_attention(q, q, q, layout, dropout_p=0.5, group=mesh)
    with pytest.raises(LayoutError, match="`query` must begin with 4"):
        varlen_attention(q[:3], q, q, layout, group=mesh)
    with pytest.raises(ArgumentError, match="`mesh` must be a DeviceMesh of one dimension or a ProcessGroup of this process, but is 'all'"):
        varlen_attention(q, q, q, layout, group="all")
    with (
        pytest.raises(ArgumentError, match="`mesh` must be a DeviceMesh of one dimension"),
        sequence_parallel(dist.init_device_mesh("cpu", (1, world))),
    ):
        pass
    one = SeqLayout.from_key_padding_mask(torch.tensor([[False] * 5 + [True] * 3, [False] * 3 + [True] * 5]), capacity=8)
    with pytest.raises(LayoutError, match="must have lengths on the host, and outside of graphs, where there are fewer heads than ranks"):
        varlen_attention(q[:, :1], q[:, :1], q[:, :1], one, group=mesh)
    near(varlen_attention(q, q, q, one, group=mesh), varlen_attention(q, q, q, layout, group=mesh), "lengths on the device")
    assert type(split_layouts(layout, None, mesh)[0].gathered(q)) is Tensor, "kernels read memory, which may not be on its way"
    plan = explain(q, q, q, layout, group=mesh)
    assert f"split over {world} ranks: by all-to-all each has 1 of 2 heads" in plan.details()
    assert f"split over {world} ranks: an all-gather" in explain(q[:, :1], q[:, :1], q[:, :1], layout, group=mesh).route_reason

    with pytest.raises(LayoutError, match="inside `sequence_parallel` a module sees the rows of its own rank"):
        split_layouts(layout, None, mesh)[0].pool(q, "mean")
    for norm in (nn.BatchNorm1d(8), nn.GroupNorm(2, 8)):
        with pytest.raises(LayoutError, match=r"but has rows of one rank|inside `sequence_parallel`"):
            varlen_norm(norm, q.flatten(1), split_layouts(layout, None, mesh)[0])
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False)
    enable(model)
    x, padding, _ = padded_batch([9, 3], 16)
    normed = VarlenTransformerEncoder(VarlenTransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 1, nn.BatchNorm1d(16))
    config = transformers.BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    second = transformers.BertModel(config)
    for module in (second.embeddings.dropout, *second.encoder.layer[0].modules()):
        vars(module).update({name: 0.0 for name in ("p", "dropout_prob") if name in vars(module)})
    enable(second)
    with sequence_parallel(mesh):
        with pytest.raises(ArgumentError, match="`track_running_stats` of BatchNorm1d is True"):
            normed(x.float(), src_key_padding_mask=padding)
        with pytest.raises(ArgumentError, match=r"is 0\.1, which does not go with rows split over ranks"):
            second(inputs_embeds=x.float(), attention_mask=(~padding).long())
        with pytest.raises(ArgumentError, match=r"`p` of Dropout is 0\.1, which does not go with rows split over ranks|`dropout` of"):
            model(x.float(), src_key_padding_mask=padding)
        model.eval()
        model.layers[1].norm1 = nn.BatchNorm1d(16)
        with pytest.raises(ArgumentError, match="`track_running_stats` of BatchNorm1d is True"):
            model(x.float(), src_key_padding_mask=padding)
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(len(visible(state.ranks))))
        thread.start()
        thread.join()
        assert seen == [0], "a block is of one thread"


def check_generation(rank: int, world: int) -> None:
    """Prompts are split, decoding steps are computed whole, with whole caches."""
    mesh = dist.init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    size = dict(vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, pad_token_id=0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size)).double().eval()
    enable(model)
    ids = torch.randint(1, 9, (2, 6), generator=torch.Generator().manual_seed(0))
    asked = dict(attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]), max_new_tokens=5, do_sample=False)
    expected = model.generate(ids, **asked)
    with sequence_parallel(mesh), record() as log:
        assert torch.equal(model.generate(ids, **asked), expected)
    assert any("split over" in (c.reason or "") for c in log)


def check_graphs(rank: int, world: int) -> None:
    """One graph, in which the collectives are ops."""
    mesh = dist.init_device_mesh("cpu", (world,))
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    q = torch.randn(31, 4, H, dtype=torch.float64).tensor_split(world)[rank].clone().requires_grad_()
    layout = SeqLayout.from_lengths([9, 4, 0, 17, 1])
    call = partial(varlen_attention, causal=True, group=mesh)
    out = torch.compile(call, backend=backend, fullgraph=True)(q, q, q, layout)
    assert sum("all_to_all_single" in name for name in seen) == 2
    wanted = call(q, q, q, layout)
    near(out, wanted, "compiled")
    near(*(torch.autograd.grad(x.sin().sum(), q)[0] for x in (out, wanted)), "compiled")


CHECKS: dict[int, list[Callable[[int, int], None]]] = {
    2: [check_calls, check_models, check_refusals, check_generation, check_graphs],
    3: [check_calls, check_models],
    4: [check_calls, check_models, check_meshes, check_volume],
}


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)
    for check in CHECKS[world]:
        check(rank, world)
        gc.collect()
        dist.barrier()
    dist.destroy_process_group()


@pytest.mark.alone
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.parametrize("world", CHECKS)
def test_processes_compute_what_one_does(tmp_path: Path, world: int) -> None:
    torch.multiprocessing.start_processes(work, (world, str(tmp_path)), nprocs=world, start_method="fork")
