"""Groups of the CPU backend: which sequences share a kernel call, and that nobody can tell from the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from varlen_attn import SeqLayout, varlen_attention
from varlen_attn.kernels.cpu import aten as cpu
from varlen_attn.kernels.cpu import groups as _cpu_groups
from varlen_attn.kernels.cpu.groups import Costs, Plan
from varlen_attn.testing import assert_within_budget

NEVER = Costs(call=0.0, token=1.0, pair=1.0, copy=1.0, wave=10**6)
EQUAL = Costs(call=1e6, token=1e6, pair=1e6, copy=0.0, wave=10**6)  # near-equal ones never
ALWAYS = Costs(call=1e6, token=1e-6, pair=1e-6, copy=0.0, wave=10**6)
WAVES = ALWAYS._replace(wave=40)
WHOLE = ALWAYS._replace(groups=1e6)
EXACT = {"rtol": 0.0, "atol": 0.0}
LENGTHS = [5, 9, 5, 0, 64, 9, 33, 4, 5, 130, 9, 1]
each_grouping = pytest.mark.parametrize("costs", [EQUAL, ALWAYS, WAVES, WHOLE], ids=["equal", "always", "waves", "whole"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def offsets(lengths: list[int]) -> tuple[int, ...]:
    return tuple(SeqLayout.from_lengths(lengths).cu_seqlens.tolist())


def plan(lengths: list[int], costs: Costs, keys: list[int] | None = None, how: str = "near", slack: int = 0) -> Plan:
    starts_q, starts_k = offsets(lengths), offsets(lengths if keys is None else keys)
    return _cpu_groups._make(starts_q, starts_k, (starts_q[-1] + slack, starts_k[-1] + slack), how, costs)


def use(monkeypatch: pytest.MonkeyPatch, costs: Costs) -> None:
    monkeypatch.setattr(Costs, "of", classmethod(lambda *args: costs))
    monkeypatch.setattr(_cpu_groups, "_plans", {})


def tensors(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, n, 16, generator=generator).to(dtype) for n in (4, 2, 2, 4)]


def run(inputs: list[Tensor], *layouts: SeqLayout, backend: str = "cpu", **options: Any) -> list[Tensor]:
    """Output, log-sum-exp ``(T, N)`` and gradients."""
    *qkv, grad = inputs
    leaves = [x.clone().requires_grad_() for x in qkv]
    out, lse = varlen_attention(*leaves, *layouts, backend=backend, return_lse=True, **options)
    return [out.detach(), lse.t(), *torch.autograd.grad(out, leaves, grad)]


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries of all forward kernel calls."""
    shapes: list[tuple[int, ...]] = []
    kernel = cpu._flash

    def counting(query: Tensor, *args: Any, **options: Any) -> Any:
        shapes.append(tuple(query.shape))
        return kernel(query, *args, **options)

    monkeypatch.setattr(cpu, "_flash", counting)
    return shapes


# ------------------------------------------------------------ plans


@given(
    pairs=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), max_size=20),
    how=st.sampled_from(["single", "equal", "near"]),
    costs=st.sampled_from([NEVER, EQUAL, ALWAYS, WAVES, WHOLE, *(Costs.of(torch.empty(1, 8, 64), n) for n in (1, 2, 64))]),
    alike=st.booleans(),
    slack=st.sampled_from([0, 3]),
)
def test_every_sequence_is_in_one_group_and_padded_with_its_own_rows(
    pairs: list[tuple[int, int]], how: str, costs: Costs, alike: bool, slack: int
) -> None:
    """Whatever the costs: queries, keys and places of results belong together, and padding reads no neighbour."""
    lengths_q = [a for a, _ in pairs]
    lengths_k = lengths_q if alike else [b for _, b in pairs]
    queries, keys, whole = plan(lengths_q, costs, lengths_k, how, slack)
    starts_q, starts_k = offsets(lengths_q), offsets(lengths_k)
    if whole:
        of_q, of_k = ([i for i, length in enumerate(lengths) for _ in range(length)] for lengths in (lengths_q, lengths_k))
        assert (queries.spans, keys.spans, slack) == ([(0, 1, len(of_q))], [(0, 1, len(of_k))], 0)
        assert set(of_q) <= set(of_k), "every query has a key"
        (bias,) = keys.biases
        assert bias is not None
        assert ((bias[0, 0] == 0) == (torch.tensor(of_q)[:, None] == torch.tensor(of_k))).all()
        assert queries.order is keys.order is None
        return
    pieces = [iter([x for rows, sizes, _ in side.waves for x in rows.split(sizes)]) for side in (queries, keys)]
    num_views = len(queries.spans) - len(queries.members)
    assert len(keys.spans) == len(queries.spans) == len(queries.biases) == len(keys.biases)
    places, seen = [], []
    for index, ((q_start, size, len_q), (k_start, k_size, len_k)) in enumerate(zip(queries.spans, keys.spans, strict=True)):
        assert size == k_size
        if index < num_views:
            assert queries.biases[index] is keys.biases[index] is None
            members = [i for i in range(len(pairs)) if q_start <= starts_q[i] < q_start + size * len_q and lengths_q[i]]
            assert [(lengths_q[i], lengths_k[i]) for i in members] == [(len_q, len_k)] * size
            assert [starts_k[i] for i in members] == [k_start + n * len_k for n in range(size)]
            places += range(q_start, q_start + size * len_q)
            seen += members
            continue
        for side, rows, length, lengths, starts in (
            (queries, next(pieces[0]).tolist(), len_q, lengths_q, starts_q),
            (keys, next(pieces[1]).tolist(), len_k, lengths_k, starts_k),
        ):
            numbers, cuts, is_padded = side.members[index - num_views]
            bias = side.biases[index]
            assert len(numbers) == size
            want = [starts[i] + min(n, lengths[i] - 1) for i in numbers for n in range(length)]
            assert rows == want
            real = [n < lengths[i] for i in numbers for n in range(length)]
            assert is_padded == (bias is not None) == (not all(real))
            assert cuts[:: 2 if is_padded else 1] == [lengths[i] for i in numbers]
            assert sum(cuts) == len(real)
            assert bias is None or (bias.shape == (size, 1, 1, length) and (bias.flatten() == 0).tolist() == real)
            assert not is_padded or how == "near"
        numbers = queries.members[index - num_views][0]
        assert numbers == keys.members[index - num_views][0]
        places += [starts_q[i] + n if n < lengths_q[i] else -1 for i in numbers for n in range(len_q)]
        seen += numbers
    for side in (queries, keys):
        gathered, hidden = [x for x in side.biases if x is not None], [x for *_, x in side.waves]
        assert sum(len(x) for x in hidden) == sum(int(x.isinf().sum()) for x in gathered)
    assert sorted(seen) == [i for i, (a, b) in enumerate(zip(lengths_q, lengths_k, strict=True)) if a and b]
    assert how != "single" or all(size == 1 for _, size, _ in queries.spans)
    covered = {row for row in places if row >= 0}
    assert queries.covers == (len(covered) == starts_q[-1] + slack)
    for row, place in enumerate(range(starts_q[-1] + slack) if queries.order is None else queries.order.tolist()):
        assert place == len(places) if row not in covered else places[place] == row


def test_padding_costs_no_more_than_the_call_it_saves() -> None:
    """Lengths one apart share a call while that is cheaper; the waste of a group stays below the cost of a call."""
    costs = Costs(call=100.0, token=1.0, pair=0.0, copy=0.0, wave=10**6)
    lengths = list(range(20, 60))
    queries, _, _ = plan(lengths, costs)
    gathered = zip(queries.spans[-len(queries.members) :], queries.members, strict=True)
    wastes = [size * length - sum(lengths[i] for i in numbers) for (_, size, length), (numbers, _, _) in gathered]
    assert all(50 < waste <= 100 for waste in wastes[:-1])
    assert wastes[-1] <= 100
    assert len(plan(lengths, NEVER)[0].spans) == len(lengths)


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_long_sequences_are_left_alone(threads: int) -> None:
    """Copies of them would take longer than calls; short ones of equal length share one also where others stand between."""
    costs = Costs.of(torch.empty(1, 8, 64), threads)
    long, _, _ = plan([4000, 2000, 4000, 2000, 4000], costs)
    assert len(long.spans) == 5
    assert not long.waves
    assert len(plan([8, 16, 8, 16, 8, 16] * 4, costs, how="equal")[0].spans) == 2
    dear = Costs(call=10.0, token=1.0, pair=1.0, copy=1.0, wave=10**6)
    assert len(plan([4, 8, 4], dear)[0].spans) == 2
    assert len(plan([100, 50, 100], dear)[0].spans) == 3
    equal, _, _ = plan([512] * 16, costs)
    assert len(equal.spans) == 1
    assert not equal.waves


def test_costs_follow_the_class_of_machine_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """No measurement: a program that runs twice has the same groups, and the same bits."""
    query = torch.empty(1, 8, 64)
    one, two = (Costs.of(query, threads) for threads in (1, 2))
    assert (one, two) == tuple(Costs.of(query, threads) for threads in (1, 2))
    assert two.call > one.call
    assert two.pair < one.pair
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert Costs.of(query, 1).pair > one.pair


# ------------------------------------------------------------ numbers


@each_grouping
@each_dtype
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (3, 1)}, {"alibi_slopes": torch.arange(1, 5) / 8}], ids=str)
def test_groups_match_the_reference(monkeypatch: pytest.MonkeyPatch, costs: Costs, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """R-12, R-33: forward, log-sum-exp and backward, however sequences are grouped."""
    use(monkeypatch, costs)
    layout = SeqLayout.from_lengths(LENGTHS)
    inputs = tensors(layout.num_rows, dtype)
    if dtype == torch.float64 and "alibi_slopes" in options:
        options = {"alibi_slopes": options["alibi_slopes"].double()}
    got = run(inputs, layout, **options)
    want = run(
        [x.double() for x in inputs],
        layout,
        backend="reference",
        **{k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()},
    )
    plain = run(inputs, layout, backend="reference", **options)
    for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), got, want, plain, strict=True):
        assert_within_budget(a, b, c, gradient=True, what=name)


@each_grouping
@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
def test_groups_of_unequal_queries_and_keys(monkeypatch: pytest.MonkeyPatch, costs: Costs, causal: Any) -> None:
    use(monkeypatch, costs)
    lengths_k = [9, 9, 5, 7, 60, 0, 33, 6, 5, 140, 8, 2]
    layouts = SeqLayout.from_lengths(LENGTHS), SeqLayout.from_lengths(lengths_k)
    q, _, _, grad = tensors(layouts[0].num_rows)
    _, k, v, _ = tensors(layouts[1].num_rows, seed=1)
    got = run([q, k, v, grad], *layouts, causal=causal)
    want = run([x.double() for x in (q, k, v, grad)], *layouts, backend="reference", causal=causal)
    plain = run([q, k, v, grad], *layouts, backend="reference", causal=causal)
    for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), got, want, plain, strict=True):
        assert_within_budget(a, b, c, gradient=True, what=name)


@each_grouping
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (3, 1)}], ids=str)
@pytest.mark.parametrize("fill", [float("nan"), float("inf"), 1e30])
def test_a_poisoned_sequence_stays_alone(monkeypatch: pytest.MonkeyPatch, costs: Costs, options: dict[str, Any], fill: float) -> None:
    """R-10, R-31: neighbours in the same kernel call keep their bits, in results and in gradients; but where all sequences are one group,
    they are computed once more, apart."""
    use(monkeypatch, costs)
    layout = SeqLayout.from_lengths(LENGTHS)
    inputs = tensors(layout.num_rows)
    clean = run(inputs, layout, **options)
    start, end = layout.cu_seqlens[2:4].tolist()
    for x in inputs:
        x[start:end] = fill
    for a, b in zip(clean, run(inputs, layout, **options), strict=True):
        torch.testing.assert_close(a[:start], b[:start], **({} if costs is WHOLE else EXACT))
        torch.testing.assert_close(a[end:], b[end:], **({} if costs is WHOLE else EXACT))


@each_dtype
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (3, 1)}], ids=str)
def test_equal_lengths_in_one_call_have_the_bits_of_calls_of_their_own(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """A group without padding changes no bit, forward and backward, so where it is made depends on time alone."""
    layout = SeqLayout.from_lengths([5, 33, 5, 200, 33, 5, 1, 200, 33])
    inputs = tensors(layout.num_rows, dtype)
    use(monkeypatch, EQUAL)
    together = run(inputs, layout, **options)
    use(monkeypatch, NEVER)
    apart = run(inputs, layout, **options)
    for a, b in zip(together, apart, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
def test_batch_invariant_is_bitwise_where_all_else_is_padded(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], kernel_calls: list[Any]
) -> None:
    """Gradients too. Groups of near-equal lengths do change bits, which is why the option keeps every sequence apart."""
    use(monkeypatch, ALWAYS)
    layout = SeqLayout.from_lengths(LENGTHS)
    inputs = tensors(layout.num_rows)
    whole = [layout.split(x) for x in run(inputs, layout, batch_invariant=True, **options)]
    assert len(kernel_calls) == sum(n > 0 for n in LENGTHS)
    parts = [layout.split(x) for x in inputs]
    for i, n in enumerate(LENGTHS):
        alone = run([p[i] for p in parts], SeqLayout.from_lengths([n]), batch_invariant=True, **options)
        assert all(torch.equal(a, b[i]) for a, b in zip(alone, whole, strict=True))
    padded = run(inputs, layout, **options)
    assert not all(torch.equal(a, torch.cat(b)) for a, b in zip(padded, whole, strict=True))


# ------------------------------------------------------------ calls


def test_equal_lengths_share_a_call_wherever_they_stand(monkeypatch: pytest.MonkeyPatch, kernel_calls: list[tuple[int, ...]]) -> None:
    use(monkeypatch, EQUAL)
    layout = SeqLayout.from_lengths([5, 9, 5, 0, 9, 5])
    run(tensors(layout.num_rows), layout)
    assert sorted(kernel_calls) == [(2, 4, 9, 16), (3, 4, 5, 16)]


def test_no_padding_is_one_call_without_copies(monkeypatch: pytest.MonkeyPatch, kernel_calls: list[tuple[int, ...]]) -> None:
    """R-49: what the kernel makes is the result, and what it reads are the rows themselves."""
    read: list[int] = []
    counting = cpu._flash

    def looking(query: Tensor, *args: Any, **options: Any) -> Any:
        read.append(query.data_ptr())
        return counting(query, *args, **options)

    monkeypatch.setattr(cpu, "_flash", looking)
    layout = SeqLayout.from_lengths([7] * 6)
    projected = torch.randn(42, 3, 4, 16)
    q, k, v = projected.unbind(1)
    varlen_attention(q, k, v, layout, backend="cpu")
    assert kernel_calls == [(6, 4, 7, 16)]
    assert read == [projected.data_ptr()]


def test_a_plan_is_made_once_for_layers_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    make = _cpu_groups._make

    def counting(*args: Any) -> Plan:
        made.append(args[0])
        return make(*args)

    monkeypatch.setattr(_cpu_groups, "_make", counting)
    monkeypatch.setattr(_cpu_groups, "_plans", {})
    layout = SeqLayout.from_lengths([5, 9, 5])
    for seed in range(3):
        run(tensors(layout.num_rows, seed=seed), layout)
    run(tensors(layout.num_rows), SeqLayout.from_lengths([5, 9, 5]))
    assert made == [(0, 5, 14, 19)]
    for n in range(2 * _cpu_groups._KEPT):
        run(tensors(n + 1), SeqLayout.from_lengths([n + 1]))
    assert len(_cpu_groups._plans) == _cpu_groups._KEPT
    assert len(made) == 1 + 2 * _cpu_groups._KEPT


def test_a_layout_that_changes_in_place_meets_no_old_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """R-40: capacity layouts are written to between calls, and between a forward and the next."""
    use(monkeypatch, ALWAYS)
    masks = [torch.arange(9) >= torch.tensor(lengths)[:, None] for lengths in ([5, 9, 5], [1, 2, 9], [0, 7, 7])]
    layout = SeqLayout.from_key_padding_mask(masks[0], capacity=24)
    inputs = tensors(24)
    for mask in masks:
        layout.update_(mask)
        got = run(inputs, layout)
        exact = SeqLayout.from_key_padding_mask(mask, validate=False)
        want = run([x[: exact.num_rows] for x in inputs], exact)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a[: exact.num_rows], b)
        assert not got[0][exact.num_rows :].any()
        assert torch.isneginf(got[1][exact.num_rows :]).all()
        assert not any(x[exact.num_rows :].any() for x in got[2:])
