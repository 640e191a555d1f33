"""`TokenBudgetBatchSampler`: what each rank gets of an epoch, that an epoch goes on after a break, and how even the ranks are. And
`global_token_mean`: the gradients of whole steps."""

from __future__ import annotations

import gc
import json
from array import array
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from varlen_attn import ArgumentError, Cost, DtypeError, TokenBudgetBatchSampler, VarlenWarning, global_token_mean
from varlen_attn.data import sampler as module
from varlen_attn.testing import strategies

RANKS = st.integers(1, 5)
OPTIONS = st.fixed_dictionaries(
    {
        "window": st.sampled_from((1, 2, 3, 32)),
        "oversize": st.sampled_from(("error", "drop", "alone")),
        "drop_last": st.booleans(),
        "shuffle": st.booleans(),
        "seed": st.integers(0, 3),
    }
)
LENGTHS = strategies.lengths(max_batch=50, max_len=20)


def web(count: int, seed: int = 0) -> Tensor:
    """Lengths of documents of the web, more or less."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(count).log_normal_(6.0, 1.0, generator=generator).clamp(1, 8192).to(torch.int64)


def made(lengths: Any, budget: int, ranks: int, rank: Any = "all", **options: Any) -> TokenBudgetBatchSampler | None:
    """None where documents do not fit, which is an error of its own."""
    try:
        return TokenBudgetBatchSampler(lengths, budget, num_replicas=ranks, rank=rank, **options)
    except ArgumentError as error:
        assert str(error).startswith(("`lengths` must have a document", "`budget` must be at least", "`budget` must let"))  # noqa: PT017
        return None


def indices(batches: Any) -> list[int]:
    return [i for batch in batches for i in batch]


pytestmark = pytest.mark.filterwarnings("ignore:.* documents are left out:varlen_attn.VarlenWarning")


@given(LENGTHS, st.integers(1, 25), RANKS, OPTIONS)
def test_an_epoch_is_dealt_out(lengths: list[int], budget: int, ranks: int, options: dict[str, Any]) -> None:
    """Once each, within the budget, none empty, and each rank alone makes the share that it has in the plan of all."""
    sampler = made(lengths, budget, ranks, **options)
    if sampler is None:
        return
    batches = list(sampler)
    found = indices(batches)
    fit = [i for i, n in enumerate(lengths) if n <= budget or options["oversize"] != "drop"]
    assert len(set(found)) == len(found)
    assert set(found) <= set(fit)
    assert len(fit) - len(found) < (ranks if options["drop_last"] else 1)
    assert all(batches)
    assert all(sum(lengths[i] for i in batch) <= budget or len(batch) == 1 for batch in batches)
    assert len(batches) == len(sampler)
    assert len(sampler) % ranks == 0
    for rank in range(ranks):
        alone = made(lengths, budget, ranks, rank, **options)
        assert alone is not None
        assert list(alone) == batches[rank::ranks]
        assert len(alone) == len(sampler) // ranks
        alone.set_epoch(1)
        assert len(alone) == len(sampler) // ranks == len(list(alone))


@given(LENGTHS, st.integers(1, 25), st.lists(st.tuples(RANKS, st.floats(0, 1)), min_size=1, max_size=4), OPTIONS)
def test_an_epoch_goes_on_with_other_ranks(
    lengths: list[int], budget: int, parts: list[tuple[int, float]], options: dict[str, Any]
) -> None:
    """After any number of steps, on any number of ranks, several times: what is left comes once each."""
    done: list[int] = []
    state = None
    for ranks, share in parts:
        sampler = made(lengths, budget, ranks, **options)
        if sampler is None:
            return
        if state is None:
            sampler.set_epoch(2)
        else:
            try:
                sampler.load_state_dict(json.loads(json.dumps(state)))
            except ArgumentError:  # too few are left for so many ranks
                return
        assert sampler.epoch == 2
        before = sampler.state_dict()
        taken = before["taken"][-1][1]
        rest = list(sampler)
        assert len(rest) + ranks * (taken + sum(steps for _, steps in before["taken"][:-1])) == len(sampler)
        again = made(lengths, budget, ranks, **options)
        assert again is not None
        again.load_state_dict(before)
        steps = int(share * (len(rest) // ranks))
        head = list(islice(again, ranks * steps))
        assert head == rest[: ranks * steps]
        state = again.state_dict()
        on_one = made(lengths, budget, ranks, ranks - 1, **options)
        assert on_one is not None
        on_one.load_state_dict(state)
        assert list(on_one) == rest[ranks * steps + ranks - 1 :: ranks]
        left = indices(rest)
        assert not set(left) & set(done)
        if not options["drop_last"]:
            assert len(left) + len(done) == sum(n <= budget or options["oversize"] != "drop" for n in lengths)
        done += indices(head)


def test_orders() -> None:
    """Another one in each epoch and for each seed, the same again, and that of the data without shuffle."""
    lengths = web(500).tolist()

    def order(**options: Any) -> list[list[int]]:
        epoch = options.pop("epoch", 0)
        sampler = TokenBudgetBatchSampler(lengths, 8192, **options)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order() == order()
    assert order() != order(epoch=1) != order(seed=1)
    assert order(epoch=1) != order(seed=1)
    plain = order(shuffle=False, window=1)
    assert plain == order(shuffle=False, window=1, epoch=1)
    assert max(max(batch) - min(batch) for batch in plain) < 100
    assert sorted(indices(plain)) == list(range(500))


def test_a_new_loop_begins_anew() -> None:
    """As with every data loader: only what was loaded goes on."""
    sampler = TokenBudgetBatchSampler(web(200), 8192)
    whole = list(sampler)
    assert list(islice(sampler, 2)) == whole[:2]
    state = sampler.state_dict()
    assert list(sampler) == whole == list(sampler)
    sampler.load_state_dict(state)
    sampler.set_epoch(0)
    assert list(sampler) == whole[2:]
    assert list(sampler) == whole
    sampler.load_state_dict(sampler.state_dict())
    assert list(sampler) == []  # the epoch was over
    sampler.load_state_dict(state)
    sampler.set_epoch(1)
    assert len(indices(sampler)) == 200


@pytest.mark.parametrize(("ranks", "bound"), [(8, 0.02), (64, 0.02)])
def test_ranks_are_even(ranks: int, bound: float) -> None:
    """Idle is what ranks wait for the one with the most work. Those of a random deal wait for a third of the time and more."""
    lengths, cost = web(400 * ranks), Cost.of(768)

    def idle(batches: list[list[int]]) -> float:
        work = torch.stack([cost(lengths[batch].double()).sum() for batch in batches]).view(-1, ranks)
        return 1 - float(work.sum() / (ranks * work.amax(1).sum()))

    assert idle(list(TokenBudgetBatchSampler(lengths, 8192, num_replicas=ranks, rank="all"))) < bound
    assert idle([list(range(12 * k, 12 * k + 12)) for k in range(ranks * 33)]) > 0.3


def test_balance_follows_the_cost() -> None:
    lengths = torch.tensor([8] * 4 + [1] * 64)
    for cost in (Cost(), Cost(0.0, 1.0), lambda n: 8 * (n == 8) + 1.0):
        batches = list(TokenBudgetBatchSampler(lengths, 1000, num_replicas=4, rank="all", cost=cost))
        work = [float(torch.as_tensor(cost(lengths[batch].double())).sum()) for batch in batches]
        assert max(work) == min(work)


def test_the_cost_of_an_encoder() -> None:
    assert Cost.of(768) == Cost(1.0, 1 / (6 * 768)) == Cost.of(SimpleNamespace(hidden_size=768))
    assert Cost.of(SimpleNamespace(hidden_size=64, intermediate_size=64)).quadratic == pytest.approx(1 / 192)
    transformers = pytest.importorskip("transformers")
    assert Cost.of(transformers.BertConfig()) == Cost.of(768)
    with pytest.raises(ArgumentError, match="`width` must be an integer of at least 1"):
        Cost.of(SimpleNamespace(d=1))


class Column:
    """As that of a data set: a sequence, and no array."""

    def __init__(self, values: list[int]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: int) -> int:
        return self.values[i]


def frozen(values: list[int]) -> np.ndarray[Any, Any]:
    found = np.array(values)
    found.flags.writeable = False
    return found


@pytest.mark.parametrize(
    "kind", [tuple, torch.tensor, np.array, frozen, Column, iter, lambda x: array("i", x), lambda x: np.array(x, "u2")]
)
def test_lengths_come_in_many_classes(kind: Any) -> None:
    lengths = [5, 7, 1, 2, 9, 3]
    assert list(TokenBudgetBatchSampler(kind(lengths), 10)) == list(TokenBudgetBatchSampler(lengths, 10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [2.5, 1.0]}, "`lengths` must be a tensor of integers"),
        ({"lengths": 5}, "`lengths` must be integers, one for each document, but is 'int'"),
        ({"lengths": [[1, 2], [3]]}, "`lengths` must be integers"),
        ({"lengths": torch.ones(2, 2, dtype=torch.int64)}, "`lengths` must be 1-D"),
        ({"lengths": [1, -1]}, "`lengths` must be at least 0, but is -1"),
        ({"lengths": [1]}, "`lengths` must have a document for each of 2 ranks, but is 1 documents"),
        ({"lengths": [1, 20]}, "`budget` must be at least the longest of `lengths`, 20, but is 10: raise it, cut the documents, or pass"),
        (
            {"lengths": [8, 9, 8]},
            "`budget` must let 3 documents fit into steps that use each of 2 ranks, but is 10: raise it, or pass drop",
        ),
        ({"budget": 0}, "`budget` must be an integer of at least 1"),
        ({"window": 0}, "`window` must be an integer of at least 1"),
        ({"num_replicas": 0}, "`num_replicas` must be an integer of at least 1"),
        ({"rank": 2}, "`rank` must be below num_replicas = 2, but is 2"),
        ({"rank": "al"}, "`rank` must be an integer of at least 0"),
        ({"cost": lambda n: n[:1]}, "`cost` must give a finite number of at least 0 for each of 3 lengths"),
        ({"cost": lambda n: -n}, "`cost` must give a finite number"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"lengths": [1, 2, 3], "budget": 10, "num_replicas": 2, "rank": 0}
    with pytest.raises((ArgumentError, DtypeError), match=message):
        TokenBudgetBatchSampler(**arguments | change)


def test_long_documents_are_dropped_or_alone() -> None:
    lengths = [30, 2, 3, 30, 4, 0]
    with pytest.warns(VarlenWarning, match="2 of 6 documents are left out: they are longer than `budget`, 10"):
        dropped = TokenBudgetBatchSampler(lengths, 10, oversize="drop")
    assert sorted(indices(dropped)) == [1, 2, 4, 5]
    alone = list(TokenBudgetBatchSampler(lengths, 10, oversize="alone"))
    assert sorted(indices(alone)) == [0, 1, 2, 3, 4, 5]
    assert [0] in alone
    assert [3] in alone


def test_a_state_is_of_the_same_plan() -> None:
    state = TokenBudgetBatchSampler([1, 2, 3], 10).state_dict()
    for change, name in (
        ({"lengths": [1, 2]}, "documents"), ({"lengths": [1, 2, 4]}, "tokens"), ({"cost": Cost(1, 2)}, "cost"), ({"budget": 11}, "budget"),
        ({"seed": 1}, "seed"), ({"window": 2}, "window"),
    ):  # fmt: skip
        other = TokenBudgetBatchSampler(**{"lengths": [1, 2, 3], "budget": 10} | change)
        with pytest.raises(ArgumentError, match=rf"`state_dict\['{name}'\]` must be"):
            other.load_state_dict(state)


def test_plans_are_of_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of floats differ by machine and by threads, and then ranks would have different plans."""
    for name in ("sum", "cumsum"):
        add = getattr(Tensor, name)

        def checked(x: Tensor, *arguments: Any, add: Any = add, **options: Any) -> Tensor:
            assert not x.is_floating_point()
            return add(x, *arguments, **options)

        monkeypatch.setattr(Tensor, name, checked)
    assert list(TokenBudgetBatchSampler(web(500), 8192, num_replicas=2, rank="all"))
    with pytest.raises(AssertionError):
        torch.ones(1).sum()


# ---------------------------------------------------------------- in the loaders that people have


class Documents:
    """Each is its index."""

    def __len__(self) -> int:
        return 300

    def __getitem__(self, i: int) -> int:
        return i


LOADED = web(300).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader(workers: int) -> None:
    sampler = TokenBudgetBatchSampler(LOADED, 8192, num_replicas=2, rank=1)
    loader = DataLoader(Documents(), batch_sampler=sampler, num_workers=workers)  # type: ignore[arg-type,var-annotated]
    assert [batch.tolist() for batch in loader] == list(sampler)
    assert len(loader) == len(sampler)


def test_a_stateful_loader_goes_on() -> None:
    """What torchdata does: it begins a loop before it loads the state, and another after it."""
    sampler = TokenBudgetBatchSampler(LOADED, 8192)
    whole = list(sampler)
    assert list(islice(sampler, 3)) == whole[:3]
    other = TokenBudgetBatchSampler(LOADED, 8192)
    assert iter(other) is not None
    other.load_state_dict(sampler.state_dict())
    assert other.state_dict() == sampler.state_dict()
    assert list(other) == whole[3:]


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdata(workers: int) -> None:
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        return loaders.StatefulDataLoader(Documents(), batch_sampler=TokenBudgetBatchSampler(LOADED, 8192), num_workers=workers)

    first, second = loader(), loader()
    whole = [batch.tolist() for batch in first]
    assert [batch.tolist() for batch in islice(first, 3)] == whole[:3]
    second.load_state_dict(first.state_dict())
    assert [batch.tolist() for batch in second] == whole[3:]


def test_accelerate_deals_out_the_batches_of_all() -> None:
    prepare = pytest.importorskip("accelerate.data_loader").prepare_data_loader

    def loader(ranks: int, rank: Any, process: int) -> Any:
        sampler = TokenBudgetBatchSampler(LOADED, 8192, num_replicas=ranks, rank=rank)
        plain = DataLoader(Documents(), batch_sampler=sampler)  # type: ignore[arg-type,var-annotated]
        return prepare(plain, num_processes=ranks, process_index=process, put_on_device=False)

    for ranks in (1, 3):
        for process in range(ranks):
            dealt = loader(ranks, "all", process)
            for epoch in range(2):
                alone = TokenBudgetBatchSampler(LOADED, 8192, num_replicas=ranks, rank=process)
                alone.set_epoch(epoch)
                assert len(dealt) == len(alone)
                assert [batch.tolist() for batch in dealt] == list(alone)
    with pytest.raises(ArgumentError, match="`rank` must be 'all' where Accelerate deals out batches, but is 1"):
        loader(3, 1, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers", "ignore:.*pin_memory.*:UserWarning")
def test_a_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    seen: list[list[int]] = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, number: Tensor) -> dict[str, Tensor]:
            seen.append(number.tolist())
            return {"loss": self.weight * 1.0}

    class Trainer(transformers.Trainer):  # type: ignore[name-defined,misc]
        def get_train_dataloader(self) -> Any:
            sampler = TokenBudgetBatchSampler(LOADED, 8192, num_replicas=self.args.world_size, rank="all")
            return self.accelerator.prepare(DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator))

    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False
    )
    documents = [{"number": i} for i in range(300)]
    Trainer(Model(), arguments, train_dataset=documents).train()
    sampler = TokenBudgetBatchSampler(LOADED, 8192)
    first = list(sampler)
    sampler.set_epoch(1)
    assert seen == first + list(sampler)


# ---------------------------------------------------------------- losses of whole steps

WIDTH, BUDGET, STEPS = 5, 40, 6


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 30, (60,), generator=generator).tolist()
    return [torch.randn(size, WIDTH, generator=generator, dtype=torch.float64) for size in sizes]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, 1)).double()


def token_losses(net: nn.Module, batch: list[int], data: list[Tensor]) -> Tensor:
    return net(torch.cat([data[i] for i in batch])).square()  # type: ignore[no-any-return]


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad for p in net.parameters() if p.grad is not None]


def whole_step(batches: list[list[int]], data: list[Tensor]) -> list[Tensor]:
    net = model()
    token_losses(net, indices(batches), data).mean().backward()
    return gradients(net)


def groups_of(rank: int, world: int) -> Iterator[tuple[int, Any]]:
    """Of 1 to ``world`` ranks; those that are not among them leave it to the others."""
    for size in range(1, world + 1):
        group = dist.new_group(list(range(size)))
        if rank < size:
            yield size, group


def _train(rank: int, folder: str, world: int) -> None:
    """Data parallel, one and three batches a step. Every rank computes the whole steps alone, too."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)
    data = documents()
    assert TokenBudgetBatchSampler([len(x) for x in data], BUDGET).num_replicas == world
    assert TokenBudgetBatchSampler([len(x) for x in data], BUDGET).rank == rank
    for size, group in groups_of(rank, world):
        batches = list(TokenBudgetBatchSampler([len(x) for x in data], BUDGET, num_replicas=size, rank="all"))
        net = nn.parallel.DistributedDataParallel(model(), process_group=group)
        for accumulated in (1, 3):
            net.zero_grad()
            step = [batches[k * size : (k + 1) * size] for k in range(accumulated)]
            tokens = sum(len(data[i]) for share in step for i in share[rank])
            for k, share in enumerate(step):
                with net.no_sync() if k < accumulated - 1 else nullcontext():
                    global_token_mean(token_losses(net, share[rank], data), tokens, group).backward()
            for found, expected in zip(gradients(net), whole_step([b for share in step for b in share], data), strict=True):
                assert (found - expected).abs().max() < 1e-12, (size, accumulated)
        dist.barrier(group)
        del net
        gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.alone
def test_gradients_are_those_of_the_whole_step(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train, (str(tmp_path), 4), nprocs=4)


def test_a_loss_without_ranks() -> None:
    data, net = documents(), model()
    batches = list(TokenBudgetBatchSampler([len(x) for x in data], BUDGET))[:3]
    tokens = [sum(len(data[i]) for i in batch) for batch in batches]
    for batch in batches:
        global_token_mean(token_losses(net, batch, data), torch.tensor(tokens)).backward()
    for found, expected in zip(gradients(net), whole_step(batches, data), strict=True):
        assert (found - expected).abs().max() < 1e-12
    assert global_token_mean(torch.zeros(0), 0) == 0
    with pytest.raises(DtypeError, match="`num_tokens` must be a tensor of integers"):
        global_token_mean(torch.ones(3), 3.0)  # type: ignore[arg-type]


def test_checks_of_what_fits_are_none_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are longer where their documents do not fit, and the whole epoch is one that does."""
    lengths = [10] * 40 + [1] * 8
    sampler = TokenBudgetBatchSampler(lengths, 10, num_replicas=4, rank="all", window=1)
    assert sorted(indices(sampler)) == list(range(48))
    monkeypatch.setattr(module, "_fits", lambda *arguments: True)
    careless = TokenBudgetBatchSampler(lengths, 10, num_replicas=4, rank="all", window=1)
    with pytest.raises((IndexError, RuntimeError)):
        list(careless)
