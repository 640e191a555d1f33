"""No wait for the device: host lengths read nothing, a mask on a device is read once, forward and backward, on every public path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from varlen_attn import (
    SeqLayout,
    VarlenCollator,
    VarlenMultiheadAttention,
    VarlenTransformerDecoder,
    VarlenTransformerDecoderLayer,
    VarlenTransformerEncoder,
    VarlenTransformerEncoderLayer,
    padded_attention,
    use_backend,
    varlen_attention,
    varlen_mha,
)

from .nosync import count_reads, not_capturable

B, S, D, N = 3, 6, 16, 4
LENGTHS = [6, 2, 3]
MASK = torch.arange(S) >= torch.tensor(LENGTHS)[:, None]

CONTROLS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "int": lambda x: int(x.sum()),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x.any()),
    "if": lambda x: 1 if x.any() else 0,
    "index": lambda x: [0, 1, 2][x[0].long()],
    "range": lambda x: range(x.sum()),
    "numpy": lambda x: x.numpy(),
    "format": lambda x: f"{x.sum().item():d}",
    "nonzero": lambda x: x.nonzero(),
    "where of one": lambda x: torch.where(x),
    "by a mask": lambda x: torch.randn(2)[x],
    "by a mask, written": lambda x: torch.randn(2).__setitem__(x, torch.ones(1)),
    "masked_select": lambda x: torch.masked_select(x, x),
    "repeat_interleave without a size": lambda x: torch.repeat_interleave(x.long()),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "equal": lambda x: torch.equal(x, x),
    "a number into one place": lambda x: torch.ones(2).__setitem__(0, 3.0),
    "split by lengths": lambda x: torch.ones(1).split(x.long().tolist()),
}
INNOCENT: dict[str, Callable[[Tensor], Any]] = {
    "nonzero_static": lambda x: torch.nonzero_static(x, size=2),
    "by indices": lambda x: torch.randn(3)[torch.arange(2)],
    "repeat_interleave with a size": lambda x: torch.repeat_interleave(torch.arange(2), x.long(), output_size=1),
    "where of three": lambda x: torch.where(x, 1, 0),
    "a tensor into one place": lambda x: torch.ones(2).__setitem__(0, torch.ones(())),
    "masked_fill": lambda x: torch.ones(2).masked_fill(x, 0),
    "shape": lambda x: x.shape[0] + x.numel() + len(x),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_read_is_caught(name: str) -> None:
    """R-05, R-19: the control. Each of these waits for a GPU."""
    with count_reads() as reads:
        CONTROLS[name](torch.tensor([True, False]))
    assert len(reads) == 1, reads


@pytest.mark.parametrize("name", INNOCENT)
def test_no_read_is_invented(name: str) -> None:
    with count_reads() as reads:
        INNOCENT[name](torch.tensor([True, False]))
    assert reads == []


# -------------------------------------------------------------------- every path


def module(factory: Callable[[], nn.Module], call: Callable[[Any, Tensor, dict[str, Any]], Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, given: dict[str, Any]) -> Tensor:
        torch.manual_seed(0)
        return call(factory().to(x.device), x, given)

    return run


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (N, -1))


def packed(x: Tensor, given: dict[str, Any]) -> Tensor:
    layout = given.get("layout") or SeqLayout.from_key_padding_mask(given["key_padding_mask"])
    rows = heads(layout.pack(x))
    out: Tensor = layout.unpack(varlen_attention(rows, rows, rows, layout, causal=True).flatten(1))
    return out + layout.pool(layout.pack(x), "mean")[:, None]


def weighted(x: Tensor, given: dict[str, Any]) -> Tensor:
    weights = torch.randn(4 * D, D, device=x.device).split([3 * D, D])
    return varlen_mha(x, num_heads=N, in_proj_weight=weights[0], out_proj_weight=weights[1], **given)


def as_source(given: dict[str, Any]) -> dict[str, Any]:
    return {"src_key_padding_mask" if k == "key_padding_mask" else k: v for k, v in given.items()}


def decode(model: Any, x: Tensor, given: dict[str, Any]) -> Tensor:
    """Memory has no padding: its layout is known from its shape."""
    names = {"key_padding_mask": "tgt_key_padding_mask", "layout": "layout"}
    out: Tensor = model(x, x[:, :4], tgt_is_causal=True, **{names[k]: v for k, v in given.items()})
    return out


PATHS: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    "varlen_attention": packed,
    "padded_attention": lambda x, given: padded_attention(heads(x), heads(x), heads(x), **given, window=(2, 0)),
    "varlen_mha": weighted,
    "varlen_mha, stacked": lambda x, given: varlen_mha(torch.stack([heads(x)] * 3, 2), **given),
    "module": module(lambda: VarlenMultiheadAttention(D, N, batch_first=True), lambda m, x, given: m(x, **given)[0]),
    "module, causal": module(lambda: VarlenMultiheadAttention(D, N, batch_first=True), lambda m, x, g: m(x, **g, is_causal=True)[0]),
    "module, weights": module(lambda: VarlenMultiheadAttention(D, N, batch_first=True), lambda m, x, g: m(x, **g, need_weights=True)[0]),
    "layer": module(lambda: VarlenTransformerEncoderLayer(D, N, 32, batch_first=True), lambda m, x, given: m(x, **as_source(given))),
    "encoder of 3 layers": module(
        lambda: VarlenTransformerEncoder(VarlenTransformerEncoderLayer(D, N, 32, 0.1, batch_first=True), 3),
        lambda m, x, given: m(x, **as_source(given)),
    ),
    "decoder of 2 layers": module(lambda: VarlenTransformerDecoder(VarlenTransformerDecoderLayer(D, N, 32, batch_first=True), 2), decode),
}


def reads_of(path: str, given: Callable[[], dict[str, Any]]) -> list[str]:
    x = torch.randn(B, S, D, requires_grad=True)
    with use_backend("sdpa_padded"), count_reads() as reads:  # not `cpu`, which is a loop over offsets on a CPU
        PATHS[path](x, given()).sum().backward()
    return reads


@pytest.mark.parametrize("path", PATHS)
def test_lengths_of_the_host_read_nothing(path: str) -> None:
    assert reads_of(path, lambda: {"layout": SeqLayout.from_lengths(LENGTHS, S)}) == []


@pytest.mark.parametrize("path", PATHS)
def test_a_mask_is_read_once(path: str) -> None:
    assert reads_of(path, lambda: {"key_padding_mask": MASK}) == ["Tensor.tolist"]


@pytest.mark.parametrize("path", PATHS)
def test_no_padding_reads_nothing(path: str) -> None:
    if path == "varlen_attention":
        assert reads_of(path, lambda: {"layout": SeqLayout.from_lengths([S] * B)}) == []
    else:
        assert reads_of(path, dict) == []


@pytest.mark.parametrize("path", [p for p in PATHS if p != "decoder of 2 layers"])  # whose memory has a layout of its own
def test_with_a_layout_nothing_comes_from_the_host(path: str) -> None:
    """R-19, R-30: all that surrounds the kernel, forward and backward; nothing is made of Python data or copied either."""
    layout = SeqLayout.from_lengths(LENGTHS, S).to("meta")
    x = torch.zeros(B, S, D, device="meta", requires_grad=True)
    with torch.device("meta"), not_capturable() as seen:
        PATHS[path](x, {"layout": layout}).sum().backward()
    assert seen == []


# -------------------------------------------------------------------- on a GPU


@pytest.fixture
def strict() -> Iterator[Callable[[], None]]:
    """From its call on, any wait for the device raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


class Task(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.encoder = VarlenTransformerEncoder(VarlenTransformerEncoderLayer(64, 4, 128, batch_first=True), 4)

    def forward(self, ids: Tensor, layout: SeqLayout) -> Tensor:
        rows = self.encoder(layout.pack(self.embed(ids)), layout=layout)
        return layout.pool(rows, "mean").square().mean()


def steps(batches: list[tuple[Tensor, SeqLayout]], dtype: torch.dtype) -> list[Tensor]:
    model = Task().cuda().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    losses = []
    for ids, layout in batches:
        optimizer.zero_grad()
        loss = model(ids, layout)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_training_with_the_collator_never_waits(dtype: torch.dtype, strict: Callable[[], None]) -> None:
    steps([(torch.zeros(2, 4, dtype=torch.long, device="cuda"), SeqLayout.from_lengths([4, 2], device="cuda"))], dtype)  # warm-up
    examples = [{"input_ids": torch.randint(0, 32, (n,))} for n in (5, 17, 3, 32, 1, 8, 8, 30)]
    loader = DataLoader(examples, batch_size=4, collate_fn=VarlenCollator(with_layout=True), pin_memory=True)
    loaded = list(loader)
    strict()
    sent = [(batch["input_ids"].to("cuda", non_blocking=True), batch["layout"].to("cuda", non_blocking=True)) for batch in loaded]
    losses = steps(sent, dtype)
    torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isfinite() for loss in losses)


@pytest.mark.gpu
def test_training_in_capacity_mode_never_waits(strict: Callable[[], None]) -> None:
    masks = [(torch.arange(S) >= torch.tensor(n)[:, None]).cuda() for n in (LENGTHS, [1, 1, 6], [2, 0, 4])]
    ids = torch.randint(0, 32, (B, S), device="cuda")
    layout = SeqLayout.from_key_padding_mask(masks[0], capacity=B * S)
    steps([(ids, layout)], torch.bfloat16)
    strict()
    losses = steps([(ids, layout.update_(mask)) for mask in masks], torch.bfloat16)
    torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isfinite() for loss in losses)


@pytest.mark.gpu
def test_a_mask_on_the_device_waits_and_is_caught(strict: Callable[[], None]) -> None:
    """The control."""
    mask = MASK.cuda()
    strict()
    with pytest.raises(RuntimeError, match="synchronizing"):
        SeqLayout.from_key_padding_mask(mask)
