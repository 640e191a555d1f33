"""Tiny models of transformers whose attention is far from uniform, batches for them, and what two runs are compared by."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from varlen_attn import VarlenWarning, enable
from varlen_attn.convert.report import Report

VOCABULARY, PAD = 50, 1
COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
    pad_token_id=PAD,
    bos_token_id=2,
    eos_token_id=3,
)
NO_DROPOUT: dict[str, Any] = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
T5: dict[str, Any] = dict(
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    dropout_rate=0.0,
    decoder_start_token_id=2,
)
BART: dict[str, Any] = dict(
    d_model=32,
    **{f"{side}_{part}": n for side in ("encoder", "decoder") for part, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))},
    dropout=0.0,
    decoder_start_token_id=2,
)
OPTIONS: dict[str, dict[str, Any]] = {
    "Bert": NO_DROPOUT,
    "DistilBert": dict(dim=32, hidden_dim=48, n_layers=2, n_heads=4, dropout=0.0, attention_dropout=0.0),
    "Llama": dict(num_key_value_heads=2),
    "Mistral": dict(num_key_value_heads=2, head_dim=8, sliding_window=4),
    "ModernBert": dict(local_attention=4, global_attn_every_n_layers=2, cls_token_id=2, sep_token_id=3),
    "Gemma2": dict(num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=4, attn_logit_softcapping=2.0),
    "GptOss": dict(num_key_value_heads=2, head_dim=8, sliding_window=4, num_local_experts=2, num_experts_per_tok=2),
    "T5": T5,
    "Bart": BART,
    "MPNet": NO_DROPOUT,
    "DebertaV2": dict(**NO_DROPOUT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
    "SiglipText": dict(projection_size=32),
    "Wav2Vec2": dict(
        conv_dim=(16, 16), conv_kernel=(8, 4), conv_stride=(4, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, **{f"{name}_dropout": 0.0 for name in ("hidden", "activation", "attention", "feat_proj")},
        layerdrop=0.0, mask_time_prob=0.0, mask_feature_prob=0.0,
    ),
}  # fmt: skip
OPTIONS["WavLM"] = OPTIONS["Wav2Vec2"]
OPTIONS |= dict.fromkeys(("Marian", "Pegasus", "MBart", "M2M100"), BART) | {"MT5": T5}

LENGTHS = (9, 4, 6, 1)
COLUMNS = 9


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of which no two are equal: scores differ enough for a wrong mask, scale or window to show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if p.dim() == 1 and "norm" in name.lower() and "bias" not in name else 0.0, 0.12, generator=generator)
    return model


def build(name: str, head: str = "Model", *, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """``build("Bert")``, ``build("Llama", "ForCausalLM", num_hidden_layers=1)``: in evaluation, with ``sdpa`` where it has that."""
    config_class = getattr(transformers, f"{name}Config")
    config = config_class(**{**COMMON, **OPTIONS.get(name, {}), **options})
    return shake(getattr(transformers, name + head)(config).to(dtype)).eval()


def attention_mask(side: str = "right", lengths: tuple[int, ...] = LENGTHS, columns: int = COLUMNS) -> Tensor:
    """``(B, S)`` int64, 1 at tokens. ``"holes"`` keeps the first and the last column of tokens, ``"both"`` pads both ends."""
    column, length = torch.arange(columns), torch.tensor(lengths)[:, None]
    if side == "right":
        mask = column < length
    elif side == "left":
        mask = column >= columns - length
    elif side == "both":
        first = (columns - length + 1) // 2
        mask = (column >= first) & (column < first + length)
    else:
        mask = (column < length) & ~((column % 3 == 1) & (column < length - 1))
    return mask.long()


def token_ids(mask: Tensor, seed: int = 0) -> Tensor:
    """Random ids at tokens, neither padding nor the end."""
    ids = torch.randint(4, VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(seed))
    return ids.masked_fill(mask == 0, PAD)


def batch(side: str = "right", **more: Any) -> dict[str, Tensor]:
    mask = attention_mask(side)
    return {"input_ids": token_ids(mask), "attention_mask": mask, **more}


def seq2seq(side: str = "right", targets: int = 5) -> dict[str, Tensor]:
    """Inputs of an encoder-decoder whose decoder has padding on the right."""
    decoder_mask = attention_mask("right", (5, 3, 1, 4), targets)
    return {**batch(side), "decoder_input_ids": token_ids(decoder_mask, 1), "decoder_attention_mask": decoder_mask}


def quietly(model: nn.Module, **options: Any) -> Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VarlenWarning)
        return enable(model, **options)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def reasons(report: Report) -> dict[str, str]:
    return {m.module: m.reason for m in report.modules if m.action == "left alone"}


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference. A shape or a NaN of its own is infinitely far."""
    if got.shape != want.shape or not torch.equal(got.isnan(), want.isnan()):
        return float("inf")
    return (got.double() - want.double()).abs().nan_to_num().max().item() if got.numel() else 0.0


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-10, what: str = "result") -> None:
    """Exact maths in another order of additions; ``want`` must be anything but zeros."""
    assert want.numel()
    assert bool(want.ne(0).any())
    assert error(got, want) <= tolerance, f"{what} differs by {error(got, want):.1e}"


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter that has one."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert set(got) == set(want)
    assert want
    assert max(float(g.abs().max()) for g in want.values()) > 1e-3
    for name, expected in want.items():
        scale = max(1.0, float(expected.abs().max()))
        assert error(got[name], expected) <= tolerance * scale, f"{name} differs by {error(got[name], expected):.1e}"
