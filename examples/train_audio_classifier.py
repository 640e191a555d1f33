"""Tone, rising chirp, falling chirp or noise? A convolutional front end and a transformer, trained padded and packed.

    python examples/train_audio_classifier.py

The packed training has one layout a batch, which shrinks with each strided convolution, and never goes back to padded tensors: attention,
pooling, and a loss that is averaged over the frames of each utterance first all read it. The padded training is the same in plain
torch (but for `apply_rotary`, which takes both), with a mask in four places; wherever one is forgotten, the loss of a sample depends on
the length of its batch-mates.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varlen_attn import SeqLayout, apply_rotary, varlen_attention, varlen_conv1d

if TYPE_CHECKING or __package__:
    from ._compare import Batch, Training, arguments, compare
else:  # run as a file, which belongs to no package: Python looks for modules beside it
    from _compare import Batch, Training, arguments, compare


@dataclass(frozen=True)
class Sizes:
    batch: int = 16
    batches: int = 20
    dim: int = 128
    heads: int = 4
    layers: int = 4
    median_seconds: float = 0.6


QUICK = Sizes(batch=3, batches=3, dim=16, heads=2, layers=2, median_seconds=0.1)
LEARNING_RATE = 2e-4
RATE = 8000  # samples a second
LONGEST = 3.0  # seconds
KERNELS_AND_STRIDES = ((10, 5), (8, 4), (4, 4))  # 100 frames a second
CLASSES = 4

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """One layer, padded ``(B, S, D)`` or packed ``(T, D)``: all but ``attend`` is token-wise and does not mind."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.in_proj, self.out_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.in_proj(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        mixed = attend(apply_rotary(q, positions), apply_rotary(k, positions), v)
        x = x + self.out_proj(mixed.flatten(-2))
        out: Tensor = x + self.feed_forward(self.norm2(x))
        return out


class AudioClassifier(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        channels = (1, sizes.dim // 4, sizes.dim // 2, sizes.dim)
        self.convs = nn.ModuleList(
            nn.Conv1d(channels[i], channels[i + 1], kernel, stride, padding=kernel // 2)
            for i, (kernel, stride) in enumerate(KERNELS_AND_STRIDES)
        )
        self.blocks = nn.ModuleList(Block(sizes.dim, sizes.heads) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.dim)
        self.utterance_head = nn.Linear(sizes.dim, CLASSES)
        self.frame_head = nn.Linear(sizes.dim, CLASSES)

    def packed_loss(self, batch: Batch) -> Tensor:
        waves, lengths, labels = batch
        layout = SeqLayout.from_lengths(lengths, waves.shape[1])
        x = layout.pack(waves[..., None])  # (T, 1)
        for conv in self.convs:
            x, layout = varlen_conv1d(conv, x, layout)  # the layout of the frames, fewer with each convolution
            x = F.gelu(x)
        positions = layout.positions
        for block in self.blocks:
            x = block(x, positions, lambda q, k, v: varlen_attention(q, k, v, layout))
        x = self.norm(x)

        utterance_loss = F.cross_entropy(self.utterance_head(layout.pool(x, "mean")), labels)
        # Frames of one utterance are averaged first, so that a long utterance counts no more than a short one.
        frame_losses = F.cross_entropy(self.frame_head(x), labels[layout.seq_ids], reduction="none")  # (T,)
        return utterance_loss + layout.pool(frame_losses, "mean").mean()

    def padded_loss(self, batch: Batch) -> Tensor:
        x, lengths, labels = batch
        x = x[..., None]  # (B, S, 1)
        real = torch.arange(x.shape[1]) < lengths[:, None]
        for conv, (kernel, stride) in zip(self.convs, KERNELS_AND_STRIDES, strict=True):
            # Zeros again before each convolution, because the bias of the one before has filled the padding.
            x = F.gelu(conv((x * real[..., None]).transpose(1, 2)).transpose(1, 2))
            lengths = (lengths + 2 * (kernel // 2) - kernel) // stride + 1
            real = torch.arange(x.shape[1]) < lengths[:, None]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None]).transpose(1, 2)

        positions = torch.arange(x.shape[1])
        for block in self.blocks:
            x = block(x, positions, attend)
        x = self.norm(x)

        mean = (x * real[..., None]).sum(1) / lengths[:, None]
        utterance_loss = F.cross_entropy(self.utterance_head(mean), labels)
        labels_BS = labels[:, None].expand_as(real)
        frame_losses = F.cross_entropy(self.frame_head(x).transpose(1, 2), labels_BS, reduction="none")  # (B, S)
        return utterance_loss + ((frame_losses * real).sum(1) / lengths).mean()


def wave(label: int, seconds: float) -> Tensor:
    """A sound of one of four classes in some noise, at a random pitch."""
    t = torch.arange(int(seconds * RATE)) / RATE
    if label == 3:
        sound = torch.randn_like(t)
    else:
        pitch = 200 + 600 * torch.rand(())
        sweep = pitch * (0, 0.8, -0.8)[label] / seconds  # over the whole sound, up or down
        sound = torch.sin(2 * math.pi * (pitch * t + sweep / 2 * t**2))
    return sound + 0.3 * torch.randn_like(t)


def random_batches(sizes: Sizes) -> list[Batch]:
    """``(waves (B, S), lengths (B,), labels (B,))``: durations are log-normal, as those of speech, in the order of torch's seed."""
    batches: list[Batch] = []
    for _ in range(sizes.batches):
        seconds = (sizes.median_seconds * torch.exp(0.6 * torch.randn(sizes.batch))).clamp(0.05, LONGEST)
        labels = torch.randint(CLASSES, (sizes.batch,))
        waves = [wave(label, s) for label, s in zip(labels.tolist(), seconds.tolist(), strict=True)]
        batches.append((nn.utils.rnn.pad_sequence(waves, batch_first=True), torch.tensor([len(w) for w in waves]), labels))
    return batches


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(__doc__, argv, steps=20)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    sizes = QUICK if args.quick else Sizes()
    batches = random_batches(sizes)
    model = AudioClassifier(sizes)
    same = copy.deepcopy(model)

    fill = sum(int(lengths.sum()) for _, lengths, _ in batches) / sum(waves.numel() for waves, _, _ in batches)
    print(f"{len(batches)} batches of {sizes.batch}, fill {fill:.2f}")
    compare(
        __file__, args, Training(model, AudioClassifier.padded_loss), Training(same, AudioClassifier.packed_loss), batches, lr=LEARNING_RATE
    )


if __name__ == "__main__":
    main()
