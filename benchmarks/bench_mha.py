"""One attention layer, padded in and padded out: `nn.MultiheadAttention` with its fast path on and off, the layer written by hand over
`F.scaled_dot_product_attention`, and ours by every backend that is here. E 512, 8 heads; the same weights.

The contest itself is that of ``python -m varlen_attn bench``: all are compared with float64 first, outputs and all gradients. The baseline
is the layer by hand with a bool mask, which is mostly the faster one of torch's.

``--recipes`` are those of docs/how-to/recommenders.md and docs/how-to/detection.md in place of it: models whose attention is an
`nn.MultiheadAttention` of their own, before and after `enable`. Real rows are compared with the model in float64 first.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from varlen_attn import SeqLayout, enable
from varlen_attn.cli.bench import DIRECTIONS, Batch, Setting, rows
from varlen_attn.testing import assert_within_budget

from .measure import DTYPES, add_machine, interleave, ratio, save, use_machine
from .workloads import WORKLOADS

WIDTH, HEADS = 512, 8
KEYS = ("threads", "dtype", "workload", "direction")
DEFAULT = ("w1", "w3", "w5", "w6", "text", "speech")  # a row of w2 or w4 takes a minute and says what attention alone says


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


def recipes(budget: float) -> None:
    """Each verified, then timed in evaluation."""
    torch.manual_seed(0)
    clicks = torch.tensor([200, 150, 120, 80, 60, 44, 33, 25, 18, 12, 9, 6, 5, 4, 3, 3] * 2)
    real = torch.arange(200) >= 200 - clicks[:, None]  # padded on the left
    model, sessions = SASRec().eval(), torch.randn(32, 200, 64)
    by_enable, by_rows = copy.deepcopy(model), copy.deepcopy(model)
    enable(by_enable)
    enable(by_rows)
    layout, mask = SeqLayout.from_attention_mask(real), model.mask(real)
    calls: dict[str, Callable[[], Tensor]] = {
        "torch": lambda: model(sessions, mask)[real],
        "enable": lambda: by_enable(sessions, mask.clone())[real],  # a new mask, as for each batch
        "by rows": lambda: by_rows(layout.pack(sessions), layout=layout),
    }
    contest(f"SASRec, fill {layout.fill:.2f}", calls, copy.deepcopy(model).double()(sessions.double(), mask.double())[real], budget)

    cells = torch.tensor([1024, 640, 480, 400, 320, 256, 200, 160])
    padding = torch.arange(1024) >= cells[:, None]
    image, positions = torch.randn(1024, 8, 256), torch.randn(1024, 1, 256)
    layer = DETRLayer().eval()
    ours = copy.deepcopy(layer)
    enable(ours, need_weights="never", example=(image, positions, padding))
    calls = {
        "torch": lambda: layer(image, positions, padding).transpose(0, 1)[~padding],
        "enable": lambda: ours(image, positions, padding).transpose(0, 1)[~padding],
    }
    exact = copy.deepcopy(layer).double()(image.double(), positions.double(), padding).transpose(0, 1)[~padding]
    contest(f"DETR's layer, fill {cells.sum() / padding.numel():.2f}", calls, exact, budget)


def contest(name: str, calls: dict[str, Callable[[], Tensor]], exact: Tensor, budget: float) -> None:
    with torch.no_grad():
        plain = calls["torch"]()
        for who, call in calls.items():
            assert_within_budget(call(), exact, plain, what=f"{name}, {who}")
        times = interleave(calls, rounds=7, budget=budget)
    for who, time in times.items():
        print(f"{name:24} {who:8} {time.seconds * 1e3:8.2f} ms  ratio {ratio(times['torch'], time):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=[w.name for w in WORKLOADS], default=DEFAULT)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    add_machine(parser, budget=5.0)
    parser.add_argument("--recipes", action="store_true", help="whole models by the recipes of the documentation, on a CPU")
    options = parser.parse_args()
    use_machine(options.device, options.threads)
    if options.recipes:
        recipes(options.budget)
        return
    for dtype in options.dtype:
        setting = Setting(options.device, DTYPES[dtype], WIDTH, HEADS, budget=options.budget)
        for workload in WORKLOADS:
            if workload.name not in options.workload:
                continue
            batch = Batch(workload.name, workload.lengths, workload.padded_len)
            for row in rows([batch], setting, options.direction):
                row = {"dtype": dtype, "workload": row.pop("name"), **row, "batch": str(workload)}
                save("mha", [row], KEYS, options.device)
                print(f"{dtype:9} {workload.name:6} {row['direction']:17} {row['milliseconds']} ratios {row['ratio']}", flush=True)
    print(f"written: results/mha.json, on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
