"""An allocation that fails in the middle of a call: ``python -m tests.failing 1000`` lets one fail, drawn at random, in each of 1000 calls.

``failing.c`` is preloaded into a process of its own, and counts the large allocations of a call: those of torch, of the compiled kernel and
of Python. Right is an error, or the right result, and then an unchanged state and a next call that is right.

Only the thread of the call is made to fail, and small allocations of attention are left out: without memory, a thread that starts and
oneDNN's ``dnnl_brgemm_create`` end the process, and neither is ours.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.convert.test_traces import assert_unchanged, observed, quietly
from tests.hostile import say
from tests.lanes import note
from tests.test_hostile import Found, run_cases
from varlen_attn import SeqLayout, disable, enable, varlen_attention
from varlen_attn._state import state
from varlen_attn.kernels.cpu import build as _native

SECONDS = 60  # for one case
OPTIONS: dict[str, dict[str, Any]] = {"": {}, " window": {"causal": True, "window": (5, None)}, " softcap": {"softcap": 3.0}}
SOURCE = Path(__file__).with_name("failing.c")


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


class Attention:
    """Forward and backward of one call."""

    least = 1 << 13

    def __init__(self, backend: str, options: dict[str, Any]) -> None:
        draw, generator = random.Random(0), torch.Generator().manual_seed(0)
        self.backend, self.options = backend, options
        # Offsets of more than `least` bytes. Fewer where each sequence is a tensor of autograd's, which ends the process without memory.
        count = 60 if "softcap" in options else 1100
        self.layout = SeqLayout.from_lengths([48, 40, *(draw.randint(0, 4) for _ in range(count))])
        self.inputs = [torch.randn(self.layout.num_rows, 2, 16, generator=generator, requires_grad=True) for _ in range(3)]
        self.want = self.call()

    def before(self) -> None: ...

    def call(self) -> list[Tensor]:
        out = varlen_attention(*self.inputs, self.layout, backend=self.backend, **self.options)
        return [out.detach(), *torch.autograd.grad(out.sum(), self.inputs)]

    def after(self, failed: bool) -> None:
        assert_close(self.call(), self.want)


class Model:
    """`enable` or `disable` of an encoder, or a call of it while it is enabled."""

    least = 1 << 10

    def __init__(self, what: str) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True)
        self.what, self.model = what, nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(what == "training step")
        self.x, self.mask = torch.randn(8, 40, 64), torch.arange(40) >= torch.tensor([3, 40, 9, 17, 1, 22, 30, 5])[:, None]
        self.want = self.forward()
        self.before()
        disable(self.model)
        self.came = observed(self.model)

    def forward(self) -> list[Tensor]:
        with torch.set_grad_enabled(self.model.training):
            out = self.model(self.x, src_key_padding_mask=self.mask)[~self.mask]
            return [out.detach(), *(torch.autograd.grad(out.sum(), list(self.model.parameters())) if self.model.training else ())]

    def before(self) -> None:
        if self.what != "enable":
            quietly(lambda: enable(self.model))

    def call(self) -> list[Tensor]:
        if self.what in ("enable", "disable"):
            quietly(lambda: enable(self.model) if self.what == "enable" else disable(self.model))
            return self.want
        return self.forward()

    def after(self, failed: bool) -> None:
        if failed and self.what == "enable":
            assert_unchanged(self.came, self.model, "after a failed enable")
        assert_close(self.forward(), self.want)
        disable(self.model)
        assert_unchanged(self.came, self.model, f"after {self.what}")
        assert_close(self.forward(), self.want)


MODELS = ("enable", "disable", "forward", "training step")
NAMES = [f"{backend}{options}" for backend in ("cpu", "cpu_native", "sdpa_padded") for options in OPTIONS] + [*MODELS]


@cache
def case_of(name: str) -> Attention | Model:
    backend = name.split(" ")[0]
    return Model(name) if name in MODELS else Attention(backend, OPTIONS[name.removeprefix(backend)])


def call(name: str, library: Any, nth: int) -> tuple[int, Exception | None]:
    """With the allocation ``nth`` failing: how many there were, and the error. Raises AssertionError for all that is wrong."""
    case, error, got = case_of(name), None, []
    case.before()
    library.failing_arm(nth, case.least)
    try:
        got = case.call()
    except (RuntimeError, MemoryError) as raised:
        error = raised
    finally:
        count = library.failing_seen()
        library.failing_arm(-1, sys.maxsize)
    if error is None:
        assert_close(got, case.want)
    assert not state.orders, "use_backend is still open"
    assert not state.records, "record is still open"
    case.after(error is not None)
    return count, error


@cache
def allocations(name: str, library: Any) -> int:
    """Of a call after the first, which fills what is kept."""
    return [call(name, library, -1)[0] for _ in range(2)][1]


def child(first: int, last: int) -> None:
    """The cases of these numbers, with lines as `tests.hostile` prints them."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    library: Any = ctypes.CDLL(None)
    library.failing_arm.argtypes, library.failing_seen.restype = (ctypes.c_long, ctypes.c_size_t), ctypes.c_long
    names = [name for name in NAMES if "cpu_native" not in name or not _native.why_not()]
    for number in range(first, last):
        say("begin", number)
        signal.alarm(SECONDS)
        draw = random.Random(number)
        name = draw.choice(names)
        outcome, nth = "WRONG", -1
        try:
            nth = draw.randrange(allocations(name, library))
            _, error = call(name, library, nth)
            outcome = "right" if error is None else "raised"
            say("note", number, name, nth, repr(error)[:200]) if "--all" in sys.argv else None
        except Exception:
            say("note", number, "WRONG", name, nth, " ".join(traceback.format_exc().split())[-700:])
        signal.alarm(0)
        say("end", number, {f"{name}: {outcome}": 1})


def failing(cases: int, first: int = 0) -> Found | None:
    """None without a compiler, or on another system than Linux."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder, "failing.so"))
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", str(SOURCE), "-o", library], check=True)
        environment = {"LD_PRELOAD": library, "VARLEN_ATTN_NATIVE": _native.setting}
        program = ("env", *(f"{k}={v}" for k, v in environment.items()), sys.executable, "-m", "tests.failing", "--child")
        return run_cases(first, first + cases, program)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    start = time.perf_counter()
    found = failing(options.cases)
    assert found is not None, "it needs Linux and a C compiler"
    seconds, wrong = round(time.perf_counter() - start), found.wrong + found.signals
    sums = {outcome: sum(n for name, n in found.counts.items() if name.endswith(outcome)) for outcome in ("raised", "right")}
    print(f"{options.cases} calls with a failed allocation: {sums}, {len(wrong)} wrong, {len(found.signals)} signals, {seconds} s")
    print(*wrong, sep="\n")
    note(options.out, "failed allocations", calls=options.cases, **sums, wrong=len(wrong), signals=len(found.signals), seconds=seconds)
    return len(wrong) > 0


if __name__ == "__main__":
    if "--child" in sys.argv:
        child(int(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(main())
