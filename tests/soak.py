"""Many calls of changing shapes in several threads, while another thread enables, disables and records: ``python -m tests.soak 100000``.

Two things must hold: every result is that of the model as it came, and neither the memory nor the number of objects grows.
"""

from __future__ import annotations

import gc
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.integrations.transformers import tiny
from tests.lanes import note
from varlen_attn import SeqLayout, disable, enable, record, varlen_mha

TOLERANCE = 1e-9  # float64


@dataclass
class Soak:
    """Attributes: wrong: what differed or raised. calls: how many were made. objects, memory: after each tenth; memory in bytes."""

    calls: int = 0
    wrong: list[str] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def growth(self) -> tuple[float, float]:
        """Objects a call, and memory, from the half to the end: what fills caches at first is not counted."""
        half = len(self.objects) // 2
        calls = self.calls * (len(self.objects) - 1 - half) / len(self.objects)
        return (self.objects[-1] - self.objects[half]) / calls, self.memory[-1] / self.memory[half] - 1


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True, dtype=torch.float64)
    return tiny.shake(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


class Work:
    """One call of a random shape, and what it must give."""

    def __init__(self) -> None:
        self.models = {"encoder": encoder(), "bert": tiny.build("Bert"), "classifier": tiny.build("Bert", "ForSequenceClassification")}
        self.as_came = {"encoder": encoder(), "bert": tiny.build("Bert"), "classifier": tiny.build("Bert", "ForSequenceClassification")}

    def batch(self, draw: random.Random) -> tuple[Tensor, Tensor]:
        rows, columns = draw.randint(1, 6), draw.randint(1, 40)
        lengths = torch.tensor([draw.randint(1, columns) for _ in range(rows)])
        return torch.randn(rows, columns, 32, dtype=torch.float64), torch.arange(columns) < lengths[:, None]

    def run(self, model: nn.Module, name: str, x: Tensor, real: Tensor) -> Tensor:
        if name == "encoder":
            out: Tensor = model(x, src_key_padding_mask=~real)
            return out[real]
        ids = tiny.token_ids(real.long())
        found = model(input_ids=ids, attention_mask=real.long())
        return found.logits if name == "classifier" else found.last_hidden_state[real]

    def compare(self, draw: random.Random, index: int) -> str | None:
        name = draw.choice(sorted(self.models))
        x, real = self.batch(draw)
        grads = index % 4 == 0
        with torch.set_grad_enabled(grads):
            got, want = (self.run(models[name], name, x, real) for models in (self.models, self.as_came))
            if grads:
                parameters = list(self.models[name].parameters()), list(self.as_came[name].parameters())
                pairs = [
                    torch.autograd.grad(out.square().sum(), p, allow_unused=True) for out, p in zip((got, want), parameters, strict=True)
                ]
                for a, b in zip(*pairs, strict=True):
                    if a is not None and b is not None and not torch.allclose(a, b, rtol=TOLERANCE, atol=1e-6):
                        return f"{name}: gradients of {tuple(x.shape)} differ by {(a - b).abs().max():.1e}"
        if not torch.allclose(got, want, rtol=TOLERANCE, atol=TOLERANCE):
            return f"{name}: {tuple(x.shape)} differs by {(got - want).abs().max():.1e}"
        varlen_mha(x, layout=SeqLayout.from_lengths(real.sum(1).tolist(), padded_len=x.shape[1]), num_heads=4)
        return None


def soak(calls: int, threads: int = 16, seed: int = 0, change: bool = True) -> Soak:
    """``calls`` in ``threads``, in ten parts; with ``change`` one more thread enables, disables and records all the time."""
    work, found, lock = Work(), Soak(), threading.Lock()
    done = threading.Event()

    def guarded(body: Callable[[], Any]) -> Callable[[], None]:
        def guards() -> None:
            try:
                body()
            except BaseException as error:  # an exception in a thread would be lost
                with lock:
                    found.wrong.append(repr(error))

        return guards

    def calling(share: int, part: int, number: int) -> None:
        draw = random.Random(f"{seed} {part} {number}")
        for index in range(share):
            problem = work.compare(draw, index)
            with lock:
                found.calls += 1
                found.wrong += [problem] if problem else []

    def changing() -> None:
        while not done.is_set():
            for model in work.models.values():
                enable(model)
                with record(model):
                    time.sleep(0.01)
                disable(model)

    for model in work.models.values():
        enable(model)
    changer = threading.Thread(target=guarded(changing))
    if change:
        changer.start()
    for part in range(10):
        workers = [threading.Thread(target=guarded(lambda n=n, p=part: calling(calls // 10 // threads, p, n))) for n in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        gc.collect()
        found.objects.append(len(gc.get_objects()))
        found.memory.append(resident())
    done.set()
    if change:
        changer.join()
    return found


def main(calls: int, out: Path | None = None) -> int:
    torch.set_num_threads(1)
    began, figures = time.monotonic(), {}
    for change in (False, True):
        found = soak(calls // 2, change=change)
        objects, memory = found.growth()
        what = f"{found.calls} calls{', enabled and disabled meanwhile' if change else ''}: {len(found.wrong)} wrong"
        print(
            f"{what}; in the second half {objects:+.2f} objects a call, memory {memory:+.1%} of {found.memory[-1] >> 20} MiB",
            flush=True,
        )
        print(*found.wrong[:5], sep="\n")
        figures["enabled and disabled meanwhile" if change else "calls"] = found.calls
        figures |= {"wrong": figures.get("wrong", 0) + len(found.wrong), "objects a call": f"{objects:+.2f}", "memory": f"{memory:+.1%}"}
        note(out, "soak", **figures, seconds=round(time.monotonic() - began))
        if found.wrong or objects > 1 or memory > 0.05:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *map(Path, sys.argv[2:])))
