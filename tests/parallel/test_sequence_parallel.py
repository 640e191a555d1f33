"""Rows of one batch on 2 to 4 processes: outputs and gradients are those of one process, in float64."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from varlen_attn import SeqLayout, record, varlen_attention

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


CHECKS: dict[int, list[Callable[[int, int], None]]] = {
    2: [check_calls],
    3: [check_calls],
    4: [check_calls],
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
    torch.multiprocessing.spawn(work, (world, str(tmp_path)), nprocs=world)
