"""Time and memory against length, padded and packed, up to 16384 columns: one attention layer, E 256, 4 heads, two rows, the second an
eighth as long as the first; forward for times, a step of training for memory.

"Scores" is `nn.MultiheadAttention` as its documentation calls it, with attention weights, whose ``(B, N, S, S)`` scores stand in memory;
"padded" is the layer by hand over `F.scaled_dot_product_attention` with a bool mask; "packed" is ours.

Memory is the peak of one step beyond model and input, in a process of its own, which the system refuses more than the stated limit
(`RLIMIT_DATA`): where that is not enough, the contestant does not fit, and that is what the table says. On a GPU it is what torch's
allocator counts, and its own limit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from varlen_attn import VarlenMultiheadAttention
from varlen_attn.cli.bench import ByHand
from varlen_attn.testing import assert_within_budget

from .measure import DTYPES, PATIENCE, add_machine, facts, interleave, limit_memory, peak_extra, save, use_machine

WIDTH, HEADS, BATCH = 256, 4, 2
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
SCORES, PADDED, PACKED = "scores", "padded", "packed"
CONTESTANTS = (PADDED, SCORES, PACKED)  # the baseline first
LIMIT = 8.0  # GB
KEYS = ("threads", "dtype", "length")
TIMED_SCORES = 4096  # beyond, the scores alone take seconds and, soon, all of the memory


def batch(length: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """x and the mask, True at padding."""
    mask = torch.arange(length) >= torch.tensor([[length], [length // 8]])
    x = torch.randn(BATCH, length, WIDTH, generator=torch.Generator().manual_seed(0))
    return x.to(device, dtype).requires_grad_(), mask.to(device)


def layer(contestant: str, dtype: torch.dtype, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    torch.manual_seed(0)
    kind: type[nn.MultiheadAttention] = {SCORES: nn.MultiheadAttention, PADDED: ByHand, PACKED: VarlenMultiheadAttention}[contestant]
    module = kind(WIDTH, HEADS, batch_first=True).to(device, dtype)
    if contestant == SCORES:
        return lambda x, mask: _first(module(x, x, x, key_padding_mask=mask))
    return lambda x, mask: _first(module(x, key_padding_mask=mask))


def _first(found: Any) -> Tensor:
    result: Tensor = found[0] if isinstance(found, tuple) else found
    return result


# -------------------------------------------------------------------- time


def bench(length: int, dtype: str, device: str, budget: float) -> dict[str, Any]:
    x, mask = batch(length, DTYPES[dtype], device)
    names = [name for name in CONTESTANTS if name != SCORES or length <= TIMED_SCORES]
    layers = {name: layer(name, DTYPES[dtype], device) for name in names}

    @torch.no_grad()
    def run(name: str) -> Tensor:
        return layers[name](x, mask)

    verify({name: run(name)[~mask] for name in names}, x, mask)
    timings = interleave(
        {**{name: _call(run, name) for name in names}, "padded again": _call(run, PADDED)},
        rounds=3, warm_up=0, budget=budget, patience=PATIENCE, device=device,
    )  # fmt: skip
    return facts(timings, PADDED)


def _call(run: Callable[[str], Tensor], name: str) -> Callable[[], object]:
    return lambda: run(name)


@torch.no_grad()
def verify(found: dict[str, Tensor], x: Tensor, mask: Tensor) -> None:
    """Against float64, row by row without padding; the attention of torch in the same dtype is the measure of the error."""
    torch.manual_seed(0)
    exact = ByHand(WIDTH, HEADS, batch_first=True).to(x.device).to(x.dtype)
    plain = torch.cat([exact(row[~hide][None], None)[0] for row, hide in zip(x.detach(), mask, strict=True)])
    exact = exact.double()
    truth = torch.cat([exact(row[~hide][None].double(), None)[0] for row, hide in zip(x.detach(), mask, strict=True)])
    for name, got in found.items():
        assert_within_budget(got, truth, plain, gradient=True, what=name)


# -------------------------------------------------------------------- memory


def take_memory(contestant: str, length: int, dtype: str, device: str, limit: float) -> str:
    """Megabytes of one step of training, or "does not fit"; in this process, which is a fresh one."""
    call = layer(contestant, DTYPES[dtype], device)

    def step(x: Tensor, mask: Tensor) -> None:
        call(x, mask).sum().backward()

    step(*batch(16, DTYPES[dtype], device))  # what is set up once is not of this step
    x, mask = batch(length, DTYPES[dtype], device)
    limit_memory(limit, device)
    try:
        return f"{peak_extra(lambda: step(x, mask), device) / 1e6:.1f}"
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        return "does not fit"


def memory(length: int, dtype: str, device: str, limit: float) -> dict[str, float | None]:
    """By contestant; None is one that does not fit."""
    found: dict[str, float | None] = {}
    for name in CONTESTANTS:
        command = [sys.executable, "-m", "benchmarks.bench_length", "--take", name, str(length), dtype, str(limit), "--device", device]
        command += ["--threads", str(torch.get_num_threads())]
        text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
        found[name] = None if text == "does not fit" else float(text)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"])
    parser.add_argument("--memory-limit", type=float, default=LIMIT, metavar="GB")
    parser.add_argument("--take", nargs=4, help=argparse.SUPPRESS)  # memory of one contestant, in a process of its own
    add_machine(parser, budget=4.0)
    options = parser.parse_args()
    use_machine(options.device, options.threads)
    if options.take:
        name, length, dtype, limit = options.take
        print(take_memory(name, int(length), dtype, options.device, float(limit)))
        return
    for dtype in options.dtype:
        for length in options.length:
            row = {"dtype": dtype, "length": length, **bench(length, dtype, options.device, options.budget)}
            row |= {"megabytes": memory(length, dtype, options.device, options.memory_limit), "limit_gb": options.memory_limit}
            path = save("length", [row], KEYS, options.device)
            print(f"{dtype} S {length:5} {row['milliseconds']} MB {row['megabytes']}", flush=True)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
