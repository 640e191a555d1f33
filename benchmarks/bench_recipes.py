"""Models by the recipes of docs/how-to/ (recommenders.md, detection.md, recipes.md): padded, after `enable`, and on rows. And convolutions.

The models of recipes.md are those that its blocks define. Each contest is verified in float64 first: what is on rows with each sample
alone, what `enable` converted with the padded model. Times are of evaluation on a CPU, or of a step of training where it says so. A new
mask is a copy for every contestant.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varlen_attn import SeqLayout, enable, varlen_conv1d
from varlen_attn.testing import assert_within_budget

from .measure import add_machine, facts, interleave, save, use_machine

Rows = Iterator[dict[str, Any]]
TORCH, ENABLE, ROWS = "torch", "enable", "on rows"
KEYS = ("threads", "recipe", "what")
PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "recipes.md"


Calls = dict[str, Callable[[], Tensor]]


class SASRec(nn.Module):
    """Blocks as replay-rec and rectools have them: the norm is on queries only, causality and padding are one mask for each head."""

    def __init__(self, width: int = 64, heads: int = 2, blocks: int = 2) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * blocks))
        self.forwards = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(blocks))
        self.heads = heads

    def mask(self, real: Tensor) -> Tensor:
        """``(B*N, S, S)``; the diagonal is open, so that no query is blind."""
        columns = torch.arange(real.shape[1])
        seen = ((columns <= columns[:, None]) & real[:, None]) | (columns == columns[:, None])
        return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).repeat_interleave(self.heads, 0)

    def forward(self, x: Tensor, mask: Tensor | None = None, layout: SeqLayout | None = None) -> Tensor:
        given = {"attn_mask": mask} if layout is None else {"layout": layout, "layout_kv": layout, "is_causal": True}
        for i, (attention, forward) in enumerate(zip(self.attentions, self.forwards, strict=True)):
            query = self.norms[2 * i](x)
            x = query + attention(query, x, x, need_weights=False, **given)[0]
            x = x + forward(self.norms[2 * i + 1](x))
        return x


class DETRLayer(nn.Module):
    """As DETR's own encoder layer: positions are added to queries and keys only, and the weights are dropped."""

    def __init__(self, width: int = 256, heads: int = 8, wide: int = 512) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads)
        self.linear1, self.linear2 = nn.Linear(width, wide), nn.Linear(wide, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        query = x + positions
        x = self.norm1(x + self.self_attn(query, query, value=x, key_padding_mask=padding)[0])
        out: Tensor = self.norm2(x + self.linear2(self.linear1(x).relu()))
        return out


def sasrec(budget: float) -> Rows:
    torch.manual_seed(0)
    clicks = torch.tensor([200, 150, 120, 80, 60, 44, 33, 25, 18, 12, 9, 6, 5, 4, 3, 3] * 2)
    real = torch.arange(200) >= 200 - clicks[:, None]  # padded on the left
    model, sessions = SASRec().eval(), torch.randn(32, 200, 64)
    by_enable, by_rows = copy.deepcopy(model), copy.deepcopy(model)
    enable(by_enable)
    enable(by_rows)
    layout, mask = SeqLayout.from_attention_mask(real), model.mask(real)
    exact = copy.deepcopy(model).double()(sessions.double(), mask.double())[real]
    batch = f"32 sessions of 3 to 200 clicks, {real.double().mean():.0%} real"
    new: Calls = {
        TORCH: lambda: model(sessions, mask.clone())[real],
        ENABLE: lambda: by_enable(sessions, mask.clone())[real],
        ROWS: lambda: by_rows(layout.pack(sessions), layout=layout),
    }
    yield contest("SASRec, 2 blocks of width 64, a new mask for each batch", batch, new, exact, budget)
    kept: Calls = {TORCH: lambda: model(sessions, mask)[real], ENABLE: lambda: by_enable(sessions, mask)[real]}
    yield contest("SASRec, 2 blocks of width 64, a mask that stays", batch, kept, exact, budget)


def detr(budget: float) -> Rows:
    torch.manual_seed(0)
    cells = torch.tensor([1024, 640, 480, 400, 320, 256, 200, 160])
    padding = torch.arange(1024) >= cells[:, None]
    image, positions = torch.randn(1024, 8, 256), torch.randn(1024, 1, 256)
    layer = DETRLayer().eval()
    ours = copy.deepcopy(layer)
    enable(ours, need_weights="never", example=(image, positions, padding))
    calls: Calls = {
        TORCH: lambda: layer(image, positions, padding).transpose(0, 1)[~padding],
        ENABLE: lambda: ours(image, positions, padding).transpose(0, 1)[~padding],
    }
    exact = copy.deepcopy(layer).double()(image.double(), positions.double(), padding).transpose(0, 1)[~padding]
    batch = f"8 images of 160 to 1024 cells, {cells.sum() / padding.numel():.0%} real"
    yield contest("DETR's own encoder layer, width 256", batch, calls, exact, budget)


def page() -> dict[str, Any]:
    """What the blocks of the page define."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL):
        exec(block, names)
    return names


def convolution(budget: float) -> Rows:
    """As a conformer has them."""
    torch.manual_seed(0)
    layout = SeqLayout.from_lengths(torch.linspace(1, 300, 16).long(), 300)
    x = torch.randn(16, 300, 256) * ~layout.padding_mask()[..., None]
    for kernel, groups in ((1, 1), (3, 1), (31, 256)):
        conv = nn.Conv1d(256, 256, kernel, padding=kernel // 2, groups=groups)

        def padded(x: Tensor, conv: nn.Module = conv) -> Tensor:
            return layout.pack(conv(x.transpose(1, 2)).transpose(1, 2))

        def rows(x: Tensor, conv: nn.Conv1d = conv) -> Tensor:
            return varlen_conv1d(conv, x, layout)[0]

        given = {TORCH: (padded, x), ROWS: (rows, layout.pack(x))}
        exact = copy.deepcopy(conv).double()
        name = f"{'depthwise ' if groups > 1 else ''}convolution, kernel {kernel}, width 256"
        batch = f"16 utterances of 1 to 300 frames, {layout.fill:.0%} real"
        calls: Calls = {who: partial(f, x) for who, (f, x) in given.items()}
        yield contest(name, batch, calls, layout.pack(exact(x.double().transpose(1, 2)).transpose(1, 2)), budget)
        yield train(name, batch, {who: (f, [x]) for who, (f, x) in given.items()}, list(conv.parameters()), budget)


def conformer(budget: float) -> Rows:
    """A `Conformer` with the names and numbers of torchaudio's."""
    by_page, home = page()["conformer_layer"], importlib.import_module("tests.convert.conformers").load()
    torch.manual_seed(0)
    model = home.Conformer(144, 4, 576, 4, 31).eval()
    lengths = torch.linspace(30, 412, 12).long()
    layout = SeqLayout.from_lengths(lengths, 412)
    x = torch.randn(12, 412, 144) * ~layout.padding_mask()[..., None]
    ours, whole, each = (copy.deepcopy(model) for _ in range(3))
    enable(ours)
    enable(whole, level="model")
    enable(each, level="model", padding_rows="alone")

    def padded(model: Any, x: Tensor) -> Tensor:
        return layout.pack(model(x, lengths)[0])

    def rows(x: Tensor) -> Tensor:
        for layer in model.conformer_layers:
            x = by_page(layer, x, layout)
        return x

    def alone(model: Any, x: Tensor) -> Tensor:
        return torch.cat([model(x[i : i + 1, :n], lengths[i : i + 1])[0][0] for i, n in enumerate(layout.lengths or ())])

    wide, name, of_rows = copy.deepcopy(model).double(), "Conformer, 4 layers of width 144", layout.pack(x)
    batch = f"12 utterances of 30 to 412 frames, {layout.fill:.0%} real"
    with torch.no_grad():
        assert_within_budget(rows(of_rows), alone(wide, x.double()), alone(model, x), what=f"{name}, by rows")
        assert_within_budget(padded(each, x), alone(wide, x.double()), alone(model, x), what=f"{name}, each utterance alone")
        for one in (ours, whole):
            assert_within_budget(padded(one, x), padded(wide, x.double()), padded(model, x), what=f"{name}, the padded model's numbers")
    plain, by_rows, by_alone = partial(padded, model), {ROWS: (rows, [of_rows])}, f'{name}, `level="model"`, `padding_rows="alone"`'
    yield contest(name, batch, {TORCH: partial(plain, x), ENABLE: partial(padded, ours, x), ROWS: partial(rows, of_rows)}, None, budget)
    yield contest(f'{name}, `level="model"`', batch, {TORCH: partial(plain, x), ENABLE: partial(padded, whole, x)}, None, budget)
    yield contest(by_alone, batch, {TORCH: partial(plain, x), ENABLE: partial(padded, each, x)}, None, budget)
    for one in (model, ours, each):  # in training the batch norms read padding, so that `whole` runs as it came
        one.train()
    weights = [*model.parameters(), *ours.parameters(), *each.parameters()]
    yield train(name, batch, {TORCH: (plain, [x]), ENABLE: (partial(padded, ours), [x]), **by_rows}, weights, budget)
    yield train(by_alone, batch, {TORCH: (plain, [x]), ENABLE: (partial(padded, each), [x])}, weights, budget)


def graphs(budget: float) -> Rows:
    """Four layers, on nodes; padded as `to_dense_batch` does it."""
    names = page()
    torch.manual_seed(0)
    sizes = torch.linspace(3, 11, 48).square().long()
    batch = torch.arange(48).repeat_interleave(sizes)
    layout, first = SeqLayout.from_batch_index(batch), sizes.cumsum(0) - sizes
    edges = (torch.rand(2, 4 * len(batch)) * sizes[batch].repeat(4)).long() + first[batch].repeat(4)
    layers, x, mask = nn.ModuleList(names["GPSLayer"]() for _ in range(4)).eval(), torch.randn(len(batch), 64), ~layout.padding_mask()
    ours, by_rows = copy.deepcopy(layers), names["attention"]
    enable(ours)

    def dense(module: nn.Module, x: Tensor, layout: SeqLayout) -> Tensor:
        padded = x.new_zeros(*mask.shape, x.shape[1])
        padded[mask] = x
        out: Tensor = module(padded, padded, padded, key_padding_mask=~mask, need_weights=False)[0][mask]
        return out

    def run(layers: Any, attention: Any, x: Tensor) -> Tensor:
        names["attention"] = attention  # which the layer looks up
        for layer in layers:
            x = layer(x, edges, layout)
        return x

    calls: Calls = {TORCH: lambda: run(layers, dense, x), ENABLE: lambda: run(ours, dense, x), ROWS: lambda: run(layers, by_rows, x)}
    exact = run(copy.deepcopy(layers).double(), dense, x.double())
    yield contest("graph transformer, 4 layers of width 64", f"48 graphs of 9 to 121 nodes, {layout.fill:.0%} real", calls, exact, budget)


def cells(budget: float) -> Rows:
    model = page()["Cells"](1000, 128).eval()
    torch.manual_seed(0)
    lengths = torch.linspace(240, 1200, 8).long()
    real = torch.arange(1200) < lengths[:, None]
    genes, values = torch.randint(1, 1000, real.shape) * real, torch.rand(real.shape) * real
    ours = copy.deepcopy(model)
    enable(ours)
    calls: Calls = {TORCH: lambda: model(genes, values)[1][real], ENABLE: lambda: ours(genes, values)[1][real]}
    exact = copy.deepcopy(model).double()(genes, values.double())[1][real]
    batch = f"8 cells of 240 to 1200 genes, {real.double().mean():.0%} real"
    yield contest("scGPT-like, 2 layers of width 128", batch, calls, exact, budget)


def proteins(budget: float) -> Rows:
    from transformers import EsmConfig, EsmModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 160, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 640}
    special = {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32, "token_dropout": True, "position_embedding_type": "rotary"}
    model = EsmModel(EsmConfig(**sizes, **special), add_pooling_layer=False).eval()
    lengths = torch.linspace(5, 20, 12).square().long()
    real = torch.arange(420) < lengths[:, None]
    inputs = {"input_ids": torch.where(real, torch.randint(4, 24, real.shape), 1), "attention_mask": real.long()}
    ours = copy.deepcopy(model)
    enable(ours)
    calls: Calls = {TORCH: lambda: model(**inputs)[0][real], ENABLE: lambda: ours(**inputs)[0][real]}
    batch = f"12 proteins of 25 to 400 residues, {real.double().mean():.0%} real"
    yield contest("ESM-2, 4 layers of width 160", batch, calls, copy.deepcopy(model).double()(**inputs)[0][real], budget)


def contest(name: str, batch: str, calls: Calls, exact: Tensor | None, budget: float) -> dict[str, Any]:
    with torch.no_grad():
        plain = calls[TORCH]()
        for who, call in calls.items():
            if exact is not None:
                assert_within_budget(call(), exact, plain, what=f"{name}, {who}")
        return timed(name, batch, calls, budget)


def train(
    name: str, batch: str, steps: dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]], weights: list[nn.Parameter], budget: float
) -> dict[str, Any]:
    """Forward and backward, with a gradient of the input."""

    def step(function: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> None:
        for weight in weights:
            weight.grad = None
        F.mse_loss(out := function(inputs[0].detach().requires_grad_()), torch.zeros_like(out)).backward()

    return timed(f"{name}, training", batch, {who: partial(step, *given) for who, given in steps.items()}, budget)


def timed(name: str, batch: str, calls: dict[str, Callable[[], Any]], budget: float) -> dict[str, Any]:
    return {"what": name, "batch": batch, **facts(interleave(calls, rounds=7, budget=budget), TORCH)}


RECIPES = {f.__name__: f for f in (sasrec, detr, convolution, conformer, graphs, cells, proteins)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    add_machine(parser, budget=5.0)
    options = parser.parse_args()
    use_machine(options.device, options.threads)
    for name in options.recipe:
        for row in RECIPES[name](options.budget):
            path = save("recipes", [{"recipe": name, **row}], KEYS, options.device)
            print(f"{row['what']:60} {row['milliseconds']} ms, ratios {row['ratio']}, others {row['foreign']:.0%}", flush=True)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
