"""Layouts whose tensors and numbers were tampered with, and what may be done with them: `test_hostile` runs this in processes of its own.

``python -m tests.hostile FIRST LAST`` runs the cases of these numbers and prints a line when each begins and when it ends, so that a signal
belongs to the last one begun. Right is an exception, or what plain attention in float64 gives for the offsets that the layout has.
"""

from __future__ import annotations

import io
import pickle
import random
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from varlen_attn import SeqLayout, VarlenError, varlen_attention

SECONDS = 20  # for one case
FAR = 2**31 - 1
HEADS, KV_HEADS, DIM = 4, 2, 16
BACKENDS = ("cpu", "cpu_native", "sdpa_padded", "reference", "nested", "flex")
OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"causal": True}, {"causal": "top_left"}, {"window": (2, 1)}, {"softcap": 3.0}, {"causal": True, "window": (3, None)},
)  # fmt: skip


# -------------------------------------------------------------------- what is wrong


def offsets_of(rng: random.Random, right: list[int]) -> list[int]:
    """Other offsets than the ``right`` ones, mostly wrong."""
    inner = rng.randrange(len(right))
    kinds: list[Callable[[], list[int]]] = [
        lambda: right,
        lambda: [0, *sorted(rng.randint(0, right[-1]) for _ in right[2:]), *right[-1:]][: len(right)],
        lambda: [*right[:-1], right[-1] + rng.choice((1, 2, 64, 200_000))],
        lambda: [*right[:-1], rng.choice((FAR, FAR - 7, 2**30))],
        lambda: [*right[:inner], rng.choice((FAR, -1, -FAR - 1, right[-1] + 1)), *right[inner + 1 :]],
        lambda: [1, *right[1:]],
        lambda: [x + 1 for x in right],
        lambda: [x - 1 for x in right],
        lambda: right[::-1],
        lambda: [*right[:-1], max(0, right[-1] - 1)],
        lambda: [0] * len(right),
        lambda: right[:-1],
        lambda: [*right, right[-1]],
        lambda: [*right, right[-1] + 5],
        lambda: [],
    ]
    return rng.choice(kinds)()


def written(how: str) -> Callable[[SeqLayout, Tensor], SeqLayout]:
    def write(layout: SeqLayout, wrong: Tensor) -> SeqLayout:
        cu = layout.cu_seqlens
        if wrong.shape != cu.shape:
            cu.set_(wrong.clone())  # type: ignore[call-overload]
        elif how == "data":
            cu.data.copy_(wrong)
        elif how == "numpy":
            cu.numpy()[:] = wrong.numpy()
        elif how == "inference mode":
            with torch.inference_mode():
                cu.copy_(wrong)
        else:
            cu.copy_(wrong)
        return layout

    return write


def replaced(change: Callable[[Tensor], Tensor]) -> Callable[[SeqLayout, Tensor], SeqLayout]:
    return lambda layout, wrong: replace(layout, cu_seqlens=change(wrong))


def unpickled(layout: SeqLayout, wrong: Tensor) -> SeqLayout:
    state = pickle.dumps(replace(layout, cu_seqlens=wrong))
    result: SeqLayout = pickle.loads(state)
    return result


def loaded(layout: SeqLayout, wrong: Tensor) -> SeqLayout:
    file = io.BytesIO()
    torch.save(replace(layout, cu_seqlens=wrong), file)
    file.seek(0)
    with torch.serialization.safe_globals([SeqLayout]):
        result: SeqLayout = torch.load(file, weights_only=True)
    return result


def of_inference_mode(layout: SeqLayout, wrong: Tensor) -> SeqLayout:
    with torch.inference_mode():
        return replace(layout, cu_seqlens=wrong.clone())


def not_validated(layout: SeqLayout, wrong: Tensor) -> SeqLayout:
    wide = wrong.to(torch.int64)
    return SeqLayout.from_cu_seqlens(wide + (2**32 if len(wide) == 3 else 0), layout.padded_len, total=layout.num_rows, validate=False)


def every_other(x: Tensor) -> Tensor:
    return x.repeat_interleave(2)[::2]


WAYS: tuple[Callable[[SeqLayout, Tensor], SeqLayout], ...] = (
    written("in place"), written("in place"), written("data"), written("numpy"), written("inference mode"),
    replaced(lambda x: x), replaced(lambda x: x), replaced(every_other), unpickled, loaded, of_inference_mode, not_validated, not_validated,
    replaced(lambda x: x.to(torch.int64)), replaced(lambda x: x.to(torch.int64) + 2**32), replaced(lambda x: x.float()),
    replaced(lambda x: x.to(torch.int16)), replaced(lambda x: x > 0), replaced(lambda x: x[None]), replaced(lambda x: x.sum()),
    replaced(lambda x: x[:1].expand(x.shape)), replaced(lambda x: x.repeat(2).as_strided(x.shape, (1,))),
    replaced(lambda x: x.to("meta")),
)  # fmt: skip


def other_numbers(rng: random.Random, layout: SeqLayout) -> SeqLayout:
    """The offsets stay, all else may be wrong."""
    lengths, size = layout.lengths, layout.padded_len
    shuffled = torch.randperm(layout.num_rows)
    changes: list[dict[str, Any]] = [
        {"max_seqlen": rng.choice((0, 1, size - 1, -1, size + 3, FAR))},
        {"padded_len": rng.choice((0, 1, size - 1, size + 1, FAR if layout.batch_size else 9)), "max_seqlen": rng.choice((1, size))},
        {"batch_size": rng.choice((0, layout.batch_size + 1))},
        {"has_slack": not layout.has_slack, "lengths": None},
        {"lengths": None},
        {"lengths": rng.choice(((), (1,) * layout.num_seqs, (FAR,) * layout.num_seqs))},
        {"lengths": None if lengths is None else lengths[::-1]},
        {"token_indices": layout.token_indices[shuffled]},
        {"token_indices": layout.token_indices + rng.choice((1, -1, FAR))},
        {"token_indices": layout.token_indices[:-1]},
        {"gather_indices": layout.gather_indices + rng.choice((1, -1, FAR))},
        {"gather_indices": layout.gather_indices[:-1]},
        {"gather_indices": layout.gather_indices.flip(0)},
    ]
    return replace(layout, **rng.choice(changes))


def layout_of(rng: random.Random, lengths: list[int]) -> SeqLayout:
    size = max(lengths, default=0) + rng.randint(0, 2)
    kind = rng.choice(("lengths", "left", "offsets", "capacity", "documents"))
    if kind == "capacity":
        mask = torch.arange(size) >= torch.tensor(lengths, dtype=torch.int64)[:, None]
        return SeqLayout.from_key_padding_mask(mask.view(len(lengths), size), capacity=sum(lengths) + rng.randint(0, 3))
    if kind == "documents" and all(lengths) and lengths:
        return SeqLayout.from_document_ids(torch.tensor([[i + 1 for i, n in enumerate(lengths) for _ in range(n)]]))
    if kind == "offsets":
        return SeqLayout.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0))
    return SeqLayout.from_lengths(lengths, size, "left" if kind == "left" else "right")


class Case:
    """A layout, made anew for each use, and what was packed by the right one."""

    def __init__(self, number: int) -> None:
        rng = self.rng = random.Random(number)
        self.lengths = [rng.choice((0, 1, 2, 3, 5, 9, 17)) for _ in range(rng.randint(0 if rng.random() < 0.1 else 1, 4))]
        self.seed, self.dtype = rng.random(), rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
        self.options = rng.choice(OPTIONS)
        generator = torch.Generator().manual_seed(number)
        right = layout_of(random.Random(self.seed), self.lengths)
        self.right, rows = right, right.num_rows
        shape = [(rows, HEADS, DIM), (rows, KV_HEADS, DIM), (rows, KV_HEADS, DIM)]
        self.tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(self.dtype) for s in (*shape, shape[0])]

    def layout(self) -> SeqLayout:
        rng = random.Random(self.seed)
        layout = layout_of(rng, self.lengths)
        if rng.random() < 0.25:
            return other_numbers(rng, layout)
        wrong = torch.tensor(offsets_of(rng, layout.cu_seqlens.tolist()), dtype=torch.int32)
        return rng.choice(WAYS)(layout, wrong)


# -------------------------------------------------------------------- what is right


def offsets_in(layout: SeqLayout, rows: int) -> list[int] | None:
    """As a list, where they are offsets of so many rows."""
    cu = layout.cu_seqlens
    if cu.is_meta or cu.dim() != 1 or cu.dtype == torch.bool:
        return None
    offsets = [int(x) for x in cu.tolist()]
    right = offsets[:1] == [0] and sorted(offsets) == offsets and (offsets[-1] == rows or (layout.has_slack and offsets[-1] < rows))
    return offsets if right else None


def plain(
    q: Tensor, k: Tensor, v: Tensor, offsets: list[int], offsets_k: list[int], causal: Any = False, window: Any = None, softcap: Any = None
) -> Tensor:
    """Attention of each sequence; what sees nothing is 0."""
    out = q * 0.0 + 0.0 * (k.sum() + v.sum())
    for (q0, q1), (k0, k1) in zip(pairwise(offsets), pairwise(offsets_k), strict=True):
        i, j = torch.arange(q1 - q0)[:, None], torch.arange(k1 - k0)
        i = i if causal == "top_left" else i + (k1 - k0) - (q1 - q0)
        left, right = window or (None, None)
        seen = (j <= i) if causal else torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        seen = seen & (True if left is None else j >= i - left) & (True if right is None else j <= i + right)
        at = seen.any(1).nonzero().squeeze(1)
        keys, values = (x[k0:k1].repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        scores = torch.einsum("inh,jnh->nij", q[q0:q1][at], keys) * DIM**-0.5
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~seen[at], float("-inf")).softmax(-1)
        out = out.index_copy(0, at + q0, torch.einsum("nij,jnh->inh", weights, values))
    return out


def assert_same(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape, f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    step = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}.get(got.dtype, 0.0)
    assert torch.allclose(got.double(), want.double(), rtol=step, atol=step), "other numbers"


# -------------------------------------------------------------------- what is done with it


def attend(backend: str, *, of_keys: bool = False) -> Callable[[Case, SeqLayout], None]:
    """``of_keys``: the queries have the right layout."""

    def use(case: Case, layout: SeqLayout) -> None:
        *inputs, grad = case.tensors
        options = case.options if backend != "nested" else {}
        inputs = inputs if backend != "nested" else [inputs[0], *(x.repeat_interleave(HEADS // KV_HEADS, 1) for x in inputs[1:])]
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = varlen_attention(*leaves, *((case.right, layout) if of_keys else (layout,)), backend=backend, **options)
        got = torch.autograd.grad(out, leaves, grad)
        offsets_k = offsets_in(layout, len(inputs[0]))
        offsets = offsets_in(case.right, len(inputs[0])) if of_keys else offsets_k
        assert offsets is not None, "accepted"
        assert offsets_k is not None, "accepted"
        exact = [x.double().requires_grad_() for x in case.tensors[:3]]
        want = plain(*exact, offsets, offsets_k, **options)
        assert_same(out, want)
        wanted = torch.autograd.grad(want, exact, grad.double())
        groups = [x if x.shape == y.shape else x.unflatten(1, (KV_HEADS, -1)).sum(2) for x, y in zip(got, wanted, strict=True)]
        for x, y in zip(groups, wanted, strict=True):
            assert_same(x, y)

    return use


def launch(op: str) -> Callable[[Case, SeqLayout], None]:
    """The library op, with the offsets as they are and now and then a tensor that does not fit."""

    def use(case: Case, layout: SeqLayout) -> None:
        q, k, v, grad = case.tensors
        rng = random.Random(case.seed)
        rest: tuple[Any, ...] = (None, 0.25, "", [-1, -1], False)
        if op == "cpu_native":
            rest = (None, None, None, [-9, 9], True, 0.25, 0.0, 0.0)
        cu = layout.cu_seqlens
        out, lse = getattr(torch.ops.varlen_attn, f"{op}_forward")(q, k, v, cu, cu, *rest)
        backward = [grad, q, k, v, out, lse]
        if rng.random() < 0.5:
            at = rng.randrange(6)
            backward[at] = rng.choice((backward[at][:-1], backward[at][..., :8], backward[at].half(), backward[at][:, :1]))
        getattr(torch.ops.varlen_attn, f"{op}_backward")(*backward, cu, cu, *rest)
        offsets = offsets_in(replace(layout, has_slack=True), len(q))
        assert offsets is not None, "accepted"
        if op == "cpu":
            with torch.no_grad():
                scaled = [q.double(), k.double(), v.double()]
                assert_same(out, plain(*scaled, offsets, offsets))

    return use


def moved(name: str, case: Case, layout: SeqLayout, offsets: list[int] | None) -> None:
    """As the right layout does, or one that was built for these offsets. Rows that the offsets leave out may be anything."""
    x = case.tensors[0]
    if name == "pack":
        size = layout.batch_size, min(layout.padded_len, 99)
        x = torch.arange(size[0] * size[1], dtype=torch.float64).view(*size, 1)
    got = getattr(layout, name)(x)
    right = [case.right]
    if offsets is not None:
        if offsets[-1] == layout.num_rows:
            right.append(SeqLayout.from_cu_seqlens(torch.tensor(offsets), layout.padded_len))
        got = got[: offsets[-1]] if name == "pack" else got
    wanted = [getattr(w, name)(x)[: len(got)] for w in right if (w.batch_size, w.padded_len) == (layout.batch_size, layout.padded_len)]
    assert not got.numel() or any(torch.equal(got, want) for want in wanted), "other numbers"


def rows(name: str) -> Callable[[Case, SeqLayout], None]:
    """What moves rows, and what numbers or adds them."""

    def use(case: Case, layout: SeqLayout) -> None:
        x = case.tensors[0]
        offsets = offsets_in(layout, len(x))
        spans = [] if offsets is None else [slice(a, b) for a, b in pairwise(offsets)]
        if name in ("pack", "unpack"):
            return moved(name, case, layout, offsets)
        result = {
            "pool": lambda: layout.pool(x.double(), "sum"),
            "split": lambda: torch.cat([part.sum(0, keepdim=True) for part in layout.split(x.double())]),
            "to_nested": lambda: torch.stack([part.sum(0) for part in layout.to_nested(x.double()).unbind()]),
            "positions": lambda: layout.positions,
            "compact": lambda: layout.compact().unpack(x.double()).sum(1),
            "downsample": lambda: layout.downsample(2, 2).cu_seqlens,
        }[name]()
        assert offsets is not None, "accepted"
        if name == "positions":
            ends = torch.zeros(layout.num_rows - offsets[-1], dtype=torch.int64)
            return assert_same(result, torch.cat([*[torch.arange(s.stop - s.start) for s in spans], ends]))
        if name == "downsample":
            return assert_same(result, torch.tensor([0, *[(s.stop - s.start) // 2 for s in spans]]).cumsum(0))
        want = torch.stack([x[s].double().sum(0) for s in spans]) if spans else x.new_zeros((0, *x.shape[1:]))
        return assert_same(result, want)

    return use


USES: dict[str, Callable[[Case, SeqLayout], None]] = {
    **{backend: attend(backend) for backend in BACKENDS},
    **{f"keys of {backend}": attend(backend, of_keys=True) for backend in BACKENDS},
    "op cpu": launch("cpu"),
    "op cpu_native": launch("cpu_native"),
    **{name: rows(name) for name in ("pack", "unpack", "pool", "split", "to_nested", "positions", "compact", "downsample")},
}


OURS = frozenset(name for name in USES if "op " not in name) - {"to_nested", "split", "pack", "unpack"}


def outcomes(number: int) -> Iterator[tuple[str, str, str]]:
    """``(use, "right", "refused" or "WRONG", details)`` of each use."""
    case = Case(number)
    for name, use in USES.items():
        try:
            layout = case.layout()
        except (VarlenError, TypeError, pickle.UnpicklingError) as error:
            yield name, "refused", f"{type(error).__name__}: {error}"
            continue
        try:
            use(case, layout)
            yield name, "right", ""
        except AssertionError as error:
            yield name, "WRONG", f"{error}; {case.lengths} {case.dtype} {case.options} {layout.cu_seqlens}"
        except Exception as error:
            # What is wrong with a layout is ours to say. How to use tensors of inference mode, and the ops' dtypes, torch says.
            ours = isinstance(error, VarlenError) or name not in OURS or "Inference tensors" in str(error)
            yield name, "refused" if ours else "WRONG", f"{type(error).__name__}: {error}"


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def main(first: int, last: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for number in range(first, last):
        say("begin", number)
        signal.alarm(SECONDS)
        found: Counter[str] = Counter()
        try:
            for name, outcome, details in outcomes(number):
                found[f"{name}: {outcome}"] += 1
                if outcome == "WRONG" or "--all" in sys.argv:
                    say("note", number, name, outcome, " ".join(details.split())[:300])
        except Exception:
            say("note", number, "WRONG", " ".join(traceback.format_exc().split())[-500:])
        signal.alarm(0)
        say("end", number, dict(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
