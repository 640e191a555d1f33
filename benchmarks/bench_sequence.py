"""Memory of a training step on one long document, whole and shared by processes (`sequence_parallel`): the most that one process takes.

Processes of gloo on the CPUs of this machine. Their times say nothing, because they share its cores. What is written down is resident
memory beyond what a process had before the step, and what it sends to others.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from varlen_attn import SeqLayout, VarlenTransformerEncoder, VarlenTransformerEncoderLayer, record, sequence_parallel

from .measure import peak_extra, save

KEYS = ("tokens", "ranks", "width", "layers")
WIDTH, HEADS, LAYERS, TOKENS, RANKS = 64, 4, 2, 65_536, (1, 4)


class Sent(TorchDispatchMode):
    """Counts what this process sends to others."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.numbers = rank, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_to_all_single" in str(func):
            self.numbers += sum(args[2]) - args[2][self.rank]
        return func(*args, **(kwargs or {}))


def step(rank: int, ranks: int, tokens: int, folder: str) -> None:
    """One process: forward and backward of an encoder, causal, in float32. The input and the output are whole in each."""
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # which functional collectives need, and which takes memory
    store = f"file://{folder}/{ranks}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=30))
    torch.manual_seed(0)
    layer = VarlenTransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0, batch_first=True)
    model, x = VarlenTransformerEncoder(layer, LAYERS), torch.randn(tokens, WIDTH)
    mesh = init_device_mesh("cpu", (ranks,))

    def train(rows: Tensor) -> None:
        layout = SeqLayout.from_lengths([len(rows)])
        with sequence_parallel(mesh) if ranks > 1 else nullcontext():
            model(rows, is_causal=True, layout=layout).square().mean().backward()

    train(torch.randn(2048, WIDTH))  # what is imported and kept is there
    with Sent(rank) as sent, record() as log:
        peak = peak_extra(lambda: train(x))
    reason = log.calls[0].reason
    torch.save((peak, sent.numbers, reason), f"{folder}/{ranks}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def measure(ranks: int, tokens: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(step, (ranks, tokens, folder), nprocs=ranks)
        found = [torch.load(Path(folder) / f"{ranks}-{rank}.pt") for rank in range(ranks)]
    return {
        "tokens": tokens, "ranks": ranks, "width": WIDTH, "layers": LAYERS, "heads": HEADS,
        "megabytes": round(max(peak for peak, _, _ in found) / 1e6), "sent_megabytes": round(max(n for _, n, _ in found) * 4 / 1e6, 1),
        "reason": found[0][2],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--quick", action="store_true", help="few tokens: does it run? Nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for ranks in options.ranks:
        rows.append(measure(ranks, 2048 if options.quick else TOKENS))
        print(rows[-1])
    if not options.quick:
        print(f"written: {save('sequence', rows, KEYS)}")


if __name__ == "__main__":
    main()
