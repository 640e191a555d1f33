"""Nothing is hung on tensors of the caller's, nor on what he is given: his own `torch.compile` and `torch.save` would find it there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo  # what marks tensors does so only where this is loaded
import torch.utils._pytree as pytree
from torch import Tensor, nn

import varlen_attn
from varlen_attn import (
    SeqLayout,
    VarlenMultiheadAttention,
    VarlenTransformerDecoder,
    VarlenTransformerEncoder,
    apply_rotary,
    padded_attention,
    varlen_attention,
    varlen_conv1d,
    varlen_mha,
    varlen_norm,
)
from varlen_attn.data.host_lengths import HostLengths

B, S, D, N = 2, 4, 8, 2
LENGTHS = [3, 2]
PADDING = SeqLayout.from_lengths(LENGTHS, S).padding_mask()
Made = dict[str, Tensor]
Case = Callable[[Made, SeqLayout], Any]


def tensors() -> Made:
    return {
        "x": torch.randn(B, S, D),
        "heads": torch.randn(B, S, N, D),
        "rows": torch.randn(5, N, D),
        "flat": torch.randn(5, D),
        "padding": PADDING.clone(),
        "tokens": (~PADDING).long(),
        "attn_mask": torch.ones(S, S, dtype=torch.bool).triu(1),
        "cu_seqlens": torch.tensor([0, 3, 5]),
        "lengths": torch.tensor(LENGTHS),
        "documents": torch.tensor([[1, 1, 2, 0], [1, 2, 0, 0]]),
        "sinks": torch.randn(N),
        "slopes": torch.rand(N),
        "bias": torch.randn(N, S, S),
        "in_proj_weight": torch.randn(3 * D, D),
    }


def layer(kind: str) -> nn.Module:
    made: nn.Module = getattr(nn, f"Transformer{kind}Layer")(D, N, 16, batch_first=True)
    return made


def module(make: Callable[[], nn.Module], call: Callable[[Any, Made, SeqLayout], Any]) -> Case:
    """Its parameters and buffers are the caller's too."""

    def run(t: Made, layout: SeqLayout) -> Any:
        made = make()
        t.update(made.state_dict(keep_vars=True))
        return call(made, t, layout)

    return run


def enabled(make: Callable[[], nn.Module], **options: Any) -> Callable[[], nn.Module]:
    def convert() -> nn.Module:
        model = make()
        varlen_attn.enable(model, **options)
        return model

    return convert


def encoder() -> nn.Module:
    return nn.TransformerEncoder(layer("Encoder"), 2, enable_nested_tensor=False)


def decoder() -> nn.Module:
    return nn.TransformerDecoder(layer("Decoder"), 2)


def mha() -> nn.Module:
    return nn.MultiheadAttention(D, N, batch_first=True)


def padded(m: Any, t: Made, layout: SeqLayout) -> Any:
    return m(t["x"], t["attn_mask"], t["padding"])


def packed(m: Any, t: Made, layout: SeqLayout) -> Any:
    return m(t["flat"], layout=layout)


CASES: dict[str, Case] = {
    "from_key_padding_mask": lambda t, _: SeqLayout.from_key_padding_mask(t["padding"]).pack(t["x"]),
    "from_key_padding_mask, capacity": lambda t, _: SeqLayout.from_key_padding_mask(t["padding"], capacity=7).pack(t["x"]),
    "from_attention_mask": lambda t, _: SeqLayout.from_attention_mask(t["tokens"]).pack(t["x"]),
    "from_lengths": lambda t, _: SeqLayout.from_lengths(t["lengths"], S).pack(t["x"]),
    "from_cu_seqlens": lambda t, _: SeqLayout.from_cu_seqlens(t["cu_seqlens"], S).pack(t["x"]),
    "from_document_ids": lambda t, _: SeqLayout.from_document_ids(t["documents"]).pack(t["x"]),
    "from_batch_index": lambda t, layout: SeqLayout.from_batch_index(layout.seq_ids).unpack(t["rows"]),
    "pack": lambda t, layout: layout.pack(t["x"]),
    "pack with a gradient": lambda t, layout: layout.pack(t["x"].requires_grad_()),
    "pack integers": lambda t, layout: layout.pack(t["tokens"]),
    "unpack": lambda t, layout: layout.unpack(t["rows"]),
    "split": lambda t, layout: layout.split(t["rows"]),
    "pool": lambda t, layout: [layout.pool(t["rows"], how) for how in ("mean", "last")],
    "to_nested": lambda t, layout: layout.to_nested(t["rows"]).sum(),
    "facts": lambda t, layout: (layout.positions, layout.columns, layout.seq_ids, layout.valid_rows(), layout.padding_mask()),
    "apply_rotary": lambda t, layout: apply_rotary(t["rows"], layout.positions),
    "varlen_conv1d": module(lambda: nn.Conv1d(D, D, 3, 2, 1), lambda m, t, layout: varlen_conv1d(m, t["flat"], layout)[0]),
    "varlen_norm": module(lambda: nn.InstanceNorm1d(D, affine=True), lambda m, t, layout: varlen_norm(m, t["flat"], layout)),
    "varlen_attention": lambda t, layout: varlen_attention(t["rows"], t["rows"], t["rows"], layout, return_lse=True),
    "varlen_attention, everything": lambda t, layout: varlen_attention(
        t["rows"], t["rows"], t["rows"], layout, sinks=t["sinks"], score_bias=t["bias"], alibi_slopes=t["slopes"], softcap=5.0
    ),
    **{
        f"varlen_attention on {name}": partial(lambda name, t, layout: varlen_attention(*[t["rows"]] * 3, layout, backend=name), name)
        for name in ("cpu", "sdpa_padded", "reference", "nested")
    },
    "padded_attention": lambda t, _: padded_attention(t["heads"], t["heads"], t["heads"], t["padding"], return_lse=True),
    "varlen_mha": lambda t, _: varlen_mha(t["x"], t["padding"], num_heads=N, in_proj_weight=t["in_proj_weight"]),
    "varlen_mha, packed": lambda t, layout: varlen_mha(t["flat"], layout=layout, num_heads=N, in_proj_weight=t["in_proj_weight"]),
    "HostLengths": lambda t, _: HostLengths.from_mask(t["tokens"]).bool().as_subclass(Tensor),
    "module": module(lambda: VarlenMultiheadAttention(D, N, batch_first=True), lambda m, t, _: m(t["x"], key_padding_mask=t["padding"])[0]),
    "module, packed": module(lambda: VarlenMultiheadAttention(D, N, batch_first=True), lambda m, t, layout: packed(m, t, layout)[0]),
    "encoder": module(lambda: VarlenTransformerEncoder(layer("Encoder"), 2), padded),
    "encoder, packed": module(lambda: VarlenTransformerEncoder(layer("Encoder"), 2), packed),
    "decoder, packed": module(
        lambda: VarlenTransformerDecoder(layer("Decoder"), 2), lambda m, t, layout: m(t["flat"], t["flat"], layout=layout, layout_kv=layout)
    ),
    "enabled encoder": module(enabled(encoder), padded),
    "enabled encoder, attention only": module(enabled(encoder, level="attention"), padded),
    "enabled decoder": module(
        enabled(decoder), lambda m, t, _: m(t["x"], t["x"], tgt_key_padding_mask=t["padding"], memory_key_padding_mask=t["padding"])
    ),
    "enabled attention": module(enabled(mha), lambda m, t, _: m(t["x"], t["x"], t["x"], key_padding_mask=t["padding"])[0]),
}


@pytest.mark.native_too
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tensors_come_and_go_without_attributes(case: Case) -> None:
    given, layout = tensors(), SeqLayout.from_lengths(LENGTHS, S)
    result = case(given, layout)
    for name, x in given.items():
        assert not vars(x), f"on `{name}`"
    for x in pytree.tree_leaves(result):
        assert not isinstance(x, Tensor) or not vars(x), "on what comes back"


def test_this_sees_a_mark() -> None:
    def marking(given: Made, layout: SeqLayout) -> None:
        torch._dynamo.decorators.mark_unbacked(given["x"], 0)

    with pytest.raises(AssertionError, match="on `x`"):
        test_tensors_come_and_go_without_attributes(marking)
