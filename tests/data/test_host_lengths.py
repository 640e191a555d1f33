"""`HostLengths`: what keeps the lengths, what loses them, and that lengths which are still there are right."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from varlen_attn import DtypeError, LayoutError, SeqLayout
from varlen_attn.data.host_lengths import HostLengths
from varlen_attn.testing.strategies import lengths, masks

from ..layout.test_seq_layout import assert_same
from ..nosync import count_reads

sides = st.sampled_from(("right", "left"))
dtypes = st.sampled_from((torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32))


def a_mask(side: Any = "right", dtype: torch.dtype = torch.int64) -> HostLengths:
    return HostLengths.as_mask([3, 1, 0], 4, side, dtype=dtype)


def assert_true(x: Tensor) -> None:
    """Whatever lengths a tensor still has are those of its values."""
    if isinstance(x, HostLengths) and x.known is not None:
        plain = x.as_subclass(Tensor).cpu()
        if x.known.kind == "mask":
            made = HostLengths.as_mask(x.known.lengths, x.known.padded_len, x.known.padding_side)
            assert torch.equal(plain != 0, made.as_subclass(Tensor) != 0)
        else:
            assert plain.diff().tolist() == list(x.known.lengths)
            assert plain[0] == 0


# -------------------------------------------------------------------- making one


@given(tokens=lengths(), slack=st.integers(0, 2), side=sides, dtype=dtypes)
def test_masks_against_a_loop(tokens: list[int], slack: int, side: Any, dtype: torch.dtype) -> None:
    size = max(tokens, default=0) + slack
    x = HostLengths.as_mask(tokens, size, side, dtype=dtype)
    rows = [[1] * n + [0] * (size - n) for n in tokens]
    rows = rows if side == "right" else [row[::-1] for row in rows]
    assert (x.shape, x.dtype, x.tolist()) == ((len(tokens), size), dtype, rows)
    assert (x.lengths, x.known.padded_len, x.known.padding_side, x.known.kind) == (tuple(tokens), size, side, "mask")
    assert_same(x.seq_layout, SeqLayout.from_lengths(tokens, size, side))


@given(tokens=lengths(), dtype=st.sampled_from((torch.int32, torch.int64)))
def test_offsets_against_a_loop(tokens: list[int], dtype: torch.dtype) -> None:
    x = HostLengths.as_offsets(tokens, dtype=dtype)
    assert (x.dtype, x.tolist()) == (dtype, [sum(tokens[:i]) for i in range(len(tokens) + 1)])
    assert (x.lengths, x.known.padded_len, x.known.padding_side, x.known.kind) == (
        tuple(tokens),
        max(tokens, default=0),
        "right",
        "offsets",
    )
    assert_same(x.seq_layout, SeqLayout.from_lengths(tokens))
    assert_same(x.seq_layout, SeqLayout.from_cu_seqlens(x.as_subclass(Tensor)))


@given(padding=masks(), dtype=st.sampled_from((torch.bool, torch.int64, torch.uint8)))
def test_from_a_mask(padding: Tensor, dtype: torch.dtype) -> None:
    """Known are exactly the masks of one side, and they mean what the mask means."""
    mask = (~padding).to(dtype)
    runs = [
        [row.tolist() == [i < n for i in range(len(row))] for row, n in zip(m, m.sum(1), strict=True)]
        for m in (~padding, (~padding).flip(1))
    ]
    x = HostLengths.from_mask(mask)
    assert torch.equal(x, mask)
    assert isinstance(x, HostLengths) == any(map(all, runs))
    if not isinstance(x, HostLengths):
        assert x is mask
        return
    assert x.dtype == dtype
    assert_same(x.seq_layout, SeqLayout.from_attention_mask(mask, validate=False))
    if mask.numel():
        mask[0, 0] = ~mask[0, 0] if dtype == torch.bool else 1 - mask[0, 0]  # the caller's tensor is the same memory
        assert x.lengths is None


def test_from_one_that_has_forgotten() -> None:
    x = a_mask()
    x[1, 1] = 1
    y = HostLengths.from_mask(x)
    assert (x.lengths, y.lengths) == (None, (3, 2, 0))
    assert torch.equal(torch.compile(lambda x: x + 1, backend="aot_eager", fullgraph=True)(y), y + 1)


def test_a_mask_that_says_something_else_stays_as_it_is() -> None:
    for mask in (torch.tensor([[2, 1, 0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, -torch.inf]]), torch.ones(2, 3, device="meta")):
        assert HostLengths.from_mask(mask) is mask


def test_wrong_arguments() -> None:
    with pytest.raises(LayoutError, match=r"`lengths\[1\]` must be at most padded_len = 3, but is 4"):
        HostLengths.as_mask([1, 4], 3)
    with pytest.raises(LayoutError, match=r"`lengths\[0\]` must be at least 0, but is -1"):
        HostLengths.as_offsets([-1])
    with pytest.raises(DtypeError, match=r"`lengths\[0\]` must be an integer"):
        HostLengths.as_offsets([0.5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="`padding_side` must be 'right' or 'left', but is 'up'"):
        HostLengths.as_mask([1], 3, "up")  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match=r"`mask` must have shape \(B, S\)"):
        HostLengths.from_mask(torch.ones(3))
    with pytest.raises(DtypeError, match="`mask` must be a tensor"):
        HostLengths.from_mask([[1]])  # type: ignore[arg-type]


def test_one_that_was_made_of_nothing_knows_nothing() -> None:
    for x in (HostLengths([1, 2]), torch.ones(2, 3).as_subclass(HostLengths)):
        assert (x.known, x.lengths, x.seq_layout) == (None,) * 3
        assert type(x + 1) is Tensor


# -------------------------------------------------------------------- what keeps them

CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "to device": lambda x: x.to("cpu"),
    "to device, non-blocking copy": lambda x: x.to(torch.device("cpu"), non_blocking=True, copy=True),
    "to meta": lambda x: x.to("meta"),
    "to dtype": lambda x: x.to(dtype=torch.int32),
    "to other": lambda x: x.to(torch.zeros(1, dtype=torch.int64)),
    "cpu": lambda x: x.cpu(),
    "int": lambda x: x.int(),
    "long": lambda x: x.long(),
    "clone": lambda x: x.clone(),
    "torch.clone": torch.clone,
    "contiguous": lambda x: x.contiguous(),
    "detach": lambda x: x.detach(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "a chain": lambda x: x.clone().int().detach().to("meta"),
}
MASK_CONVERSIONS = {"bool": lambda x: x.bool(), "to bool": lambda x: x.to(dtype=torch.bool), "to float": lambda x: x.to(torch.float32)}


@pytest.mark.parametrize("name", CONVERSIONS | MASK_CONVERSIONS)
@pytest.mark.parametrize("kind", ["mask", "left mask", "offsets"])
@pytest.mark.parametrize("inference", [False, True])
def test_conversions_keep_lengths(name: str, kind: str, inference: bool) -> None:
    x = HostLengths.as_offsets([3, 1, 0]) if kind == "offsets" else a_mask("left" if kind == "left mask" else "right")
    with torch.inference_mode(inference):
        y = (CONVERSIONS | MASK_CONVERSIONS)[name](x)
    if kind == "offsets" and name in MASK_CONVERSIONS:
        assert type(y) is Tensor
        return
    assert isinstance(y, HostLengths)
    facts = ("lengths", "padded_len", "padding_side", "kind")
    assert [getattr(y.known, f) for f in facts] == [getattr(x.known, f) for f in facts]
    assert y.shape == x.shape
    assert y.seq_layout is not None
    assert y.seq_layout.device == y.device
    if y.device == x.device:
        assert torch.equal(y, x.to(y.dtype))
        assert (y.seq_layout is x.seq_layout) == (name != "pickle")
        assert_same(y.seq_layout, x.seq_layout)
    if y.device.type == "cpu" and y is not x:
        shares = name in ("detach", "copy")
        y[(0,) * y.dim()] = 0 if kind == "mask" else 1
        assert y.lengths is None
        assert (x.lengths is None) == shares


def test_one_layout_for_all_that_stays_on_a_device() -> None:
    x = pickle.loads(pickle.dumps(a_mask()))  # nothing is built yet
    there = x.to("meta")
    assert there.bool().seq_layout is there.seq_layout is x.to("meta").long().seq_layout
    assert x.bool().seq_layout is x.seq_layout
    assert x.seq_layout is not there.seq_layout
    assert there.seq_layout.device.type == "meta"


@pytest.mark.parametrize("make", [a_mask, lambda: HostLengths.as_offsets([3, 1, 0])])
def test_a_layout_has_memory_of_its_own(make: Callable[[], HostLengths]) -> None:
    x = make()
    y, layout = x.clone(), make().seq_layout
    x.fill_(7)
    assert_same(y.seq_layout, layout)


def test_threads_share_one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    x = pickle.loads(pickle.dumps(a_mask()))
    seen: list[Any] = []
    all_build = threading.Barrier(8)
    build = SeqLayout.from_lengths

    def wait_and_build(*args: Any, **kwargs: Any) -> SeqLayout:
        all_build.wait(timeout=60)
        return build(*args, **kwargs)

    monkeypatch.setattr(SeqLayout, "from_lengths", wait_and_build)
    threads = [threading.Thread(target=lambda: seen.append(x.to(torch.int32).seq_layout)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len(set(map(id, seen))) == 1


def test_pickles_carry_lengths_and_no_layout() -> None:
    x = HostLengths.as_mask([200] * 50, 400, dtype=torch.bool)
    assert x.seq_layout is not None  # more than 100 kB of indices
    data = pickle.dumps(x)
    assert len(data) < 50 * 400 + 2000
    first, second, alias = pickle.loads(pickle.dumps((x, x, x.int())))
    assert first is second
    assert alias.seq_layout is first.seq_layout
    buffer = io.BytesIO()
    torch.save({"mask": x}, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False)["mask"].lengths == x.lengths


@pytest.mark.parametrize("write", [lambda x: x.__setitem__((0, 0), 0), lambda x: x.unsqueeze_(0), lambda x: x.resize_(2, 2)])
def test_what_has_forgotten_stays_so_in_copies_and_pickles(write: Callable[[Any], Any]) -> None:
    for convert in (CONVERSIONS | MASK_CONVERSIONS).values():
        x = a_mask()
        write(x)
        assert getattr(convert(x), "lengths", None) is None
        assert x.seq_layout is None


def test_no_inference_tensors() -> None:
    """Their writes are not counted, so a batch made or unpickled in inference mode is made of ordinary tensors."""
    data = pickle.dumps(a_mask())
    with torch.inference_mode():
        made = (a_mask(), HostLengths.as_offsets([3, 1]), HostLengths.from_mask(torch.ones(2, 3)[:, :2].long()), pickle.loads(data))
        for x in made:
            for y in (x, x.long(), x.clone(), x.to("cpu", copy=True), copy.deepcopy(x)):
                assert not y.is_inference()
                assert y.lengths is not None
            x.view(-1)[:1] = 7
            assert x.lengths is None


def test_one_copy_in_inference_mode() -> None:
    x = a_mask()
    with torch.inference_mode(), Operations() as operations:
        x.to(torch.int32)
    assert operations.seen
    assert not [name for name in operations.seen if "clone" in name]


class Operations(TorchDispatchMode):
    """Names of all that is dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


def test_building_the_layout_reads_nothing() -> None:
    x = pickle.loads(pickle.dumps(a_mask("left")))
    offsets = pickle.loads(pickle.dumps(HostLengths.as_offsets([3, 1])))
    with count_reads() as reads:
        for y in (x, offsets, x.to("meta"), offsets.to("meta")):
            assert y.seq_layout is not None
            assert y.lengths is not None
    assert reads == []
    with count_reads() as reads:
        SeqLayout.from_attention_mask(x.as_subclass(Tensor), validate=False)
    assert reads


# -------------------------------------------------------------------- what loses them

OTHERS: dict[str, Callable[[Any], Any]] = {
    "index": lambda x: x[0],
    "slice": lambda x: x[:2],
    "whole slice": lambda x: x[:],
    "columns": lambda x: x[:, -2:],
    "none": lambda x: x[:, None, None],
    "by tensor": lambda x: x[torch.tensor([0, 1])],
    "add": lambda x: x + 0,
    "rsub": lambda x: 1.0 - x,
    "compare": lambda x: x == 1,
    "not": lambda x: ~x,
    "expand": lambda x: x.expand(3, 4),
    "view": lambda x: x.view(3, 4),
    "reshape": lambda x: x.reshape(3, 4),
    "transpose": lambda x: x.mT,
    "flip": lambda x: x.flip(1),
    "cumsum": lambda x: x.cumsum(1),
    "sum": lambda x: x.sum(1),
    "cat": lambda x: torch.cat([x, x]),
    "stack": lambda x: torch.stack([x, x]),
    "where": lambda x: torch.where(x == 1, x, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "index_select": lambda x: x.index_select(0, torch.tensor([0, 1, 2])),
    "masked_fill": lambda x: x.masked_fill(x == 0, 0),
    "zeros_like": torch.zeros_like,
    "new_ones": lambda x: x.new_ones(x.shape),
    "as the other of to": lambda x: torch.ones(3, 4).to(x),
    "unbind": lambda x: x.unbind()[0],
    "split": lambda x: x.split(2)[0],
    "iteration": lambda x: next(iter(x)),
    "by keyword": lambda x: torch.clone(input=x),
    "where it is the mask": lambda x: torch.zeros(3, 4).masked_fill(x == 0, 1.0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_operations_return_plain_tensors(name: str) -> None:
    x = a_mask()
    y = OTHERS[name](x)
    assert type(y) is Tensor
    assert torch.equal(y, OTHERS[name](x.as_subclass(Tensor)))
    assert x.lengths == (3, 1, 0)


WRITES: dict[str, Callable[[Any], Any]] = {
    "item": lambda x: x.__setitem__((0, 1), 0),
    "fill_": lambda x: x.fill_(0),
    "mul_": lambda x: x.mul_(0),
    "augmented": lambda x: x.__imul__(0),
    "copy_": lambda x: x.copy_(torch.zeros(3, 4)),
    "random_": lambda x: x.random_(0, 2),
    "index_put_": lambda x: x.index_put_((torch.tensor([0]),), torch.tensor(0)),
    "out": lambda x: torch.mul(x, 0, out=x),
    "out of others": lambda x: torch.zeros(3, 4, dtype=torch.int64, out=x),
    "view": lambda x: x[:, :2].fill_(0),
    "view of view": lambda x: x.T.reshape(4, 3)[1:].zero_(),
    "detached": lambda x: x.detach().fill_(0),
    # Of a plain view, copy.copy makes a tensor on the same memory whose writes torch counts apart.
    "copy": lambda x: copy.copy(x).fill_(0) if isinstance(x, HostLengths) else x,
    "plain": lambda x: x.as_subclass(Tensor).fill_(0),
    "bits": lambda x: x.view(torch.int32).fill_(0),
    "foreach": lambda x: torch._foreach_zero_([x]),
    "aten": lambda x: torch.ops.aten.fill_.Scalar(x, 0),
    "resize_": lambda x: x.resize_(2, 2),
    "transpose_": lambda x: x.t_(),
    "unsqueeze_": lambda x: x.unsqueeze_(0),
    "set_": lambda x: x.set_(torch.zeros(3, 4, dtype=torch.int64)),
}
UNCOUNTED_WRITES: dict[str, Callable[[Any], Any]] = {
    "data": lambda x: x.data.fill_(0),
    "set data": lambda x: setattr(x, "data", torch.zeros(3, 4, dtype=torch.int64)),
    "numpy": lambda x: x.numpy().fill(0),
    "asarray": lambda x: __import__("numpy").asarray(x).fill(0),
    "dlpack": lambda x: torch.from_dlpack(x).fill_(0),
    "storage": lambda x: x.untyped_storage().fill_(0),
    "apply_": lambda x: x.apply_(lambda v: 0),
    "unsafe_chunk": lambda x: x.unsafe_chunk(2)[0].fill_(0),
    "unsafe_split": lambda x: torch.unsafe_split(x, 2)[0].fill_(0),
    "map_": lambda x: x.map_(x, lambda v, w: 0),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", WRITES | UNCOUNTED_WRITES)
def test_writes_make_it_forget(name: str, inference: bool) -> None:
    if inference and name in ("set data", "bits"):
        pytest.skip("torch refuses the one there, and does not count the other")
    x = a_mask()
    kept = x.clone()
    with torch.inference_mode(inference):
        (WRITES | UNCOUNTED_WRITES)[name](x)
    assert x.lengths is None
    assert x.seq_layout is None
    assert kept.lengths == (3, 1, 0)
    assert_true(kept)


def test_numpy_between_forward_and_backward_is_no_write() -> None:
    """It forgets, without the count that would make autograd refuse a saved mask."""
    x, weight = a_mask(dtype=torch.float32), torch.ones(3, 4, requires_grad=True)
    loss = (weight * x).sum()
    assert x.numpy().sum() == 4
    loss.backward()
    assert x.lengths is None
    assert torch.equal(weight.grad, x)


def test_reading_forgets_nothing() -> None:
    x = a_mask()
    for read in (
        repr,
        str,
        len,
        hash,
        Tensor.tolist,
        lambda x: x[0, 0].item(),
        lambda x: f"{x}",
        lambda x: x.data_ptr(),
        lambda x: x.sum(),
        list,
    ):
        read(x)
    _ = (x.shape, x.device, x.dtype, x.is_cuda, x.layout, x.ndim, x.requires_grad, x._version, x.is_pinned)
    assert x.lengths == (3, 1, 0)


@pytest.mark.parametrize("kind", ["mask", "offsets"])
def test_every_method_without_arguments(kind: str) -> None:
    """Nothing but the conversions above returns lengths, and no method leaves wrong ones."""
    kept = {"bool", "clone", "contiguous", "cpu", "detach", "int", "long"}
    called = 0
    for name in dir(Tensor):
        if name in ("__class__", "__init_subclass__", "__subclasshook__", "__dir__", "cuda", "pin_memory") or not callable(
            getattr(Tensor, name)
        ):
            continue
        x = a_mask() if kind == "mask" else HostLengths.as_offsets([2, 3])
        before = x.tolist()
        try:
            y = getattr(x, name)()
        except Exception:  # arguments are missing, or the operation is not for integers
            continue
        called += 1
        for leaf in (z for z in pytree.tree_leaves(y) if isinstance(z, Tensor) and z is not x and name not in kept):
            assert type(leaf) is Tensor or name in ("__copy__", "__reduce__"), name
        assert_true(x)
        assert x.lengths is None or x.tolist() == before, name
    assert called > 150


STEPS: dict[str, Callable[[Any], Any]] = CONVERSIONS | MASK_CONVERSIONS | OTHERS | WRITES


@given(
    tokens=lengths(batch=3, max_len=4), side=sides, steps=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9)), max_size=6)
)
def test_lengths_that_are_there_are_right(tokens: list[int], side: Any, steps: list[tuple[str, int]]) -> None:
    """Any operations in any order, on any of the tensors that came before."""
    alive: list[Any] = [HostLengths.as_mask(tokens, 4, side), HostLengths.as_offsets(tokens)]
    for name, which in steps:
        x = alive[which % len(alive)]
        try:
            y = STEPS[name](x)
        except Exception:  # shapes and dtypes of the examples above do not fit every tensor
            continue
        alive += [z for z in pytree.tree_leaves(y) if isinstance(z, Tensor) and z.device.type == "cpu"]
        for z in alive:
            assert_true(z)


def test_a_wrong_one_would_be_found() -> None:
    x = a_mask()
    wrong = HostLengths._of(x[:2].as_subclass(Tensor), x.known)
    with pytest.raises(AssertionError):
        assert_true(wrong)
    x._writes = 1
    x.as_subclass(Tensor)[0, 0] = 0
    with pytest.raises(AssertionError):
        assert_true(x)


# -------------------------------------------------------------------- among others


def test_repr() -> None:
    x = HostLengths.as_mask([2, 1])
    text = "HostLengths(tensor([[1, 1],\n        [1, 0]]), lengths=(2, 1), padded_len=2, padding_side='right', kind='mask')"
    assert repr(x) == str(x) == f"{x}" == text
    x[0, 0] = 0
    assert repr(x) == "HostLengths(tensor([[0, 1],\n        [1, 0]]), forgotten)"


class Other(Tensor):
    """A subclass of somebody else, which wants to see every operation."""

    seen: list[Any] = []  # noqa: RUF012, a list for the test

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not all(issubclass(cls, t) for t in types):
            return NotImplemented
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs)


def test_another_subclass_has_its_say() -> None:
    x, other = a_mask(), torch.ones(3, 4).as_subclass(Other)
    for y in (x * other, other * x, torch.cat([x, other])):
        assert type(y) is Other
    assert len(Other.seen) == 3
    x.mul_(torch.ones(3, 4, dtype=torch.int64).as_subclass(Other))
    assert x.lengths is None


def from_workers(examples: list[HostLengths], **options: Any) -> list[Any]:
    return list(DataLoader(examples, batch_size=None, collate_fn=None, **options))


def test_through_processes() -> None:
    """Shared memory and pickles of real workers. Writes here are counted as at home."""
    sent = [HostLengths.as_mask([n, 1], 5) for n in range(1, 5)] + [HostLengths.as_offsets([n, 1]) for n in range(4)]
    for x, y in zip(sent, from_workers(sent, num_workers=2, multiprocessing_context="spawn"), strict=True):
        assert torch.equal(x, y)
        assert (y.lengths, y.known.kind) == (x.lengths, x.known.kind)
        assert_same(y.seq_layout, x.seq_layout)
        y[:1] = 9
        assert (y.lengths, x.lengths is None) == (None, False)


# -------------------------------------------------------------------- compiled


def mixed(mask: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    both = torch.cat([mask, mask])
    return (
        x.masked_fill(~mask.bool(), 0.0),
        1.0 - mask.to(x.dtype),
        mask.cumsum(1),
        both.sum(0),
        torch.nonzero_static(mask.reshape(-1), size=4),
    )


@pytest.fixture
def dynamo() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_functions_take_it_as_a_tensor(backend: str, fullgraph: bool, dynamo: Any) -> None:
    compiled = torch.compile(mixed, backend=backend, fullgraph=fullgraph)
    x = torch.randn(3, 4)
    for mask in (a_mask(), HostLengths.as_mask([2, 0, 2], 4)):  # one graph for all lengths
        before = mask.lengths
        for got, expected in zip(compiled(mask, x), mixed(mask.as_subclass(Tensor), x), strict=True):
            assert type(got) is Tensor
            assert torch.equal(got, expected)
        assert mask.lengths == before
    assert dynamo["unique_graphs"] == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_writes_of_compiled_functions(backend: str, dynamo: Any) -> None:
    def write(mask: Tensor) -> Tensor:
        mask[0, 1] = 0
        return mask.sum()

    x = a_mask()
    assert torch.compile(write, backend=backend)(x) == 3
    assert x.tolist()[0] == [1, 0, 1, 0]
    assert x.lengths is None


@pytest.mark.parametrize("name", ["resize_", "transpose_", "unsqueeze_", "set data", "fill_"])
def test_compiled_functions_see_what_has_become_of_it(name: str, dynamo: Any) -> None:
    x = a_mask()
    (WRITES | UNCOUNTED_WRITES)[name](x)
    assert torch.equal(torch.compile(lambda x: x * 2, backend="aot_eager")(x), x * 2)


def test_around_a_graph_break(dynamo: Any) -> None:
    def broken(mask: Tensor) -> Any:
        some = mask.bool()
        torch._dynamo.graph_break()
        return some.sum() + mask.sum(), mask.lengths

    total, known = torch.compile(broken, backend="eager")(a_mask())
    assert (total, known) == (8, (3, 1, 0))


# -------------------------------------------------------------------- on a device


@pytest.mark.gpu
def test_to_a_device_and_back() -> None:
    x = a_mask("left")
    pinned = x.pin_memory()
    assert pinned.is_pinned()
    for y in (pinned, x.cuda(), pinned.to("cuda", non_blocking=True), x.cuda().cpu(), x.to("cuda", torch.bool)):
        assert (y.lengths, y.known.padding_side) == (x.lengths, "left")
    there = pinned.to("cuda", non_blocking=True)
    assert there.seq_layout is there.bool().seq_layout
    assert there.seq_layout.device == there.device
    assert_same(there.seq_layout.to("cpu"), x.seq_layout)
    there[0] = 1
    assert there.lengths is None


@pytest.mark.gpu
def test_pinned_by_a_loader() -> None:
    for x in from_workers([a_mask(), a_mask()], num_workers=1, pin_memory=True):
        assert x.is_pinned()
        assert x.lengths == (3, 1, 0)
