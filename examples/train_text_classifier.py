"""Which module of the standard library is this docstring from? A transformer of torch's, trained padded and packed.

    python examples/train_text_classifier.py

The packed training differs from the padded one in a single line, `enable(model)`. Embeddings, pooling and head stay as they are: they
see padded tensors, while everything inside of the encoder, feed-forward layers and norms too, computes real tokens only.
"""

from __future__ import annotations

import copy
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varlen_attn import enable
from varlen_attn.cli.demo import MAX_TOKENS, VOCABULARY, docstrings_in, tokenise

if TYPE_CHECKING or __package__:
    from ._compare import Batch, Training, arguments, compare
else:  # run as a file, which belongs to no package: Python looks for modules beside it
    from _compare import Batch, Training, arguments, compare


@dataclass(frozen=True)
class Sizes:
    classes: int = 8
    batch: int = 32
    dim: int = 128
    heads: int = 4
    layers: int = 3


QUICK = Sizes(classes=2, batch=4, dim=16, heads=2, layers=2)
LEARNING_RATE = 3e-4


class TextClassifier(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, sizes.dim, padding_idx=0)
        self.position = nn.Embedding(MAX_TOKENS, sizes.dim)
        # Dropout is off because padded and packed rows draw different masks: see "Comparing runs with dropout" in docs/semantics.md.
        layer = nn.TransformerEncoderLayer(
            sizes.dim, sizes.heads, 4 * sizes.dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, sizes.layers, nn.LayerNorm(sizes.dim), enable_nested_tensor=False)
        self.head = nn.Linear(sizes.dim, sizes.classes)

    def forward(self, ids: Tensor) -> Tensor:  # (B, S) -> (B, classes)
        padding = ids == 0
        x = self.embedding(ids) + self.position.weight[: ids.shape[1]]
        x = self.encoder(x, src_key_padding_mask=padding)
        real = (~padding)[..., None].to(x.dtype)
        logits: Tensor = self.head((x * real).sum(1) / real.sum(1))
        return logits


def loss(model: nn.Module, batch: Batch) -> Tensor:
    ids, labels = batch
    return F.cross_entropy(model(ids), labels)


def documents(classes: int) -> list[tuple[list[int], int]]:
    """Token ids and class of every docstring in the biggest files of the standard library; each file is a class."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: (-path.stat().st_size, path.name))
    found = [(tokenise(text), label) for label, path in enumerate(files[:classes]) for text in docstrings_in(path)]
    return [(ids, label) for ids, label in found if ids]


def shuffled_batches(sizes: Sizes) -> list[Batch]:
    """``(ids (B, S), labels (B,))``, padded to the longest of the batch, in the order of torch's seed."""
    found = documents(sizes.classes)
    found = [found[i] for i in torch.randperm(len(found)).tolist()]
    groups = [found[i : i + sizes.batch] for i in range(0, len(found) - sizes.batch + 1, sizes.batch)]
    return [
        (nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in group], batch_first=True), torch.tensor([label for _, label in group]))
        for group in groups
    ]


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(__doc__, argv, steps=16)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    sizes = QUICK if args.quick else Sizes()
    batches = shuffled_batches(sizes)
    padded = TextClassifier(sizes)

    packed = copy.deepcopy(padded)
    print(enable(packed))

    fill = sum(int((ids != 0).sum()) for ids, _ in batches) / sum(ids.numel() for ids, _ in batches)
    print(f"{len(batches)} batches of {sizes.batch}, fill {fill:.2f}")
    compare(__file__, args, Training(padded, loss), Training(packed, loss), batches, lr=LEARNING_RATE)


if __name__ == "__main__":
    main()
