"""Rows of one batch on 2 to 4 processes: outputs and gradients are those of one process, in float64."""

from __future__ import annotations

import gc
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

from varlen_attn import (
    SeqLayout,
    VarlenTransformerEncoder,
    VarlenTransformerEncoderLayer,
    enable,
    record,
    sequence_parallel,
    varlen_attention,
)

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


def decoder() -> Model:
    """To what it is given itself, reversed."""
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(16, 4, 32, dropout=0, batch_first=True, dtype=torch.float64)
    model = nn.TransformerDecoder(layer, 2)
    enable(model)
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


# The model, and how many of its calls have rows of this rank: none where the stack is computed whole.
MODELS: dict[str, tuple[Callable[[], Model], int]] = {
    "torch's encoder": (enabled_encoder, 2),
    "layers that know no layout": (causal_encoder, 2),
    "any mask": (masked_encoder, 0),
    "torch's decoder": (decoder, 4),
    "BERT": (bert, 2),
    "Llama": (llama, 2),
    "Llama with few heads": (partial(llama, 1), 2),
    "Llama, computed again": (checkpointed_llama, 2),
    "Mistral with windows": (partial(llama, sliding_window=3), 2),
    "T5": (islands, 0),
}
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
    for name, (make, split) in MODELS.items():
        for lengths in BATCHES:
            model, call = make()
            expected = step(model, call, lengths)
            with sequence_parallel(mesh), record(model) as log:
                out, grad, *others = step(model, call, lengths)
            for got, wanted in zip((out, grad, *averaged(others)), expected, strict=True):
                near(got, wanted, (name, lengths, rank, world))
            shared = [c for c in log if c.reason is not None and f"split over {world} ranks" in c.reason]
            assert len(shared) >= (split if sum(lengths) >= world else 0), (name, lengths, log)
            again = step(model, call, lengths)
            near(again[0], expected[0], name)


CHECKS: dict[int, list[Callable[[int, int], None]]] = {
    2: [check_calls, check_models],
    3: [check_calls, check_models],
    4: [check_calls, check_models],
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
@pytest.mark.parametrize("world", CHECKS)
def test_processes_compute_what_one_does(tmp_path: Path, world: int) -> None:
    torch.multiprocessing.start_processes(work, (world, str(tmp_path)), nprocs=world, start_method="fork")
