"""A model run twice on one batch: which results differ, where and by how much, and that the model is left as it was."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from varlen_attn import ArgumentError, SeqLayout, VarlenTransformerEncoder, VarlenWarning, compare, disable, enable, enabled, record
from varlen_attn.convert.equality import Difference, Run, differences, run
from varlen_attn.data.batches import inputs_of
from varlen_attn.data.results import gap, tensors_of

B, S, D = 4, 12, 16
PAD = torch.arange(S) >= torch.tensor([12, 7, 9, 6])[:, None]
Read = Callable[["Model", Tensor, Tensor], Any]


class Model(nn.Module):
    """An encoder, and what ``read`` makes of its states and the mask."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(D, 2, 2 * D, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.lstm, self.head = nn.LSTM(D, D, batch_first=True, bidirectional=True), nn.Linear(D, 5)
        self.read = read

    def forward(self, x: Tensor, pad: Tensor, *labels: Tensor) -> Any:
        return self.read(self, self.encoder(x, src_key_padding_mask=pad), pad, *labels)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(1)), PAD


def both(model: nn.Module, *example: Any) -> tuple[Run, Run]:
    inputs = inputs_of(example or batch(), "example")
    before = run(model, inputs)
    enable(model)
    return before, run(model, inputs)


def found(read: Read, *labels: Tensor) -> list[Difference]:
    return differences(*both(Model(read), *batch(), *labels))


@dataclass
class Output:
    scores: Tensor
    inner: dict[str, Any]


LABELS = torch.zeros(B, S, dtype=torch.long)
READS_PADDING: dict[str, tuple[Read, list[str]]] = {
    "mean over all columns": (lambda m, y, pad: m.head(y.mean(1)), ["the output"]),
    "LSTM": (lambda m, y, pad: {"a": [m.lstm(y)[0]]}, ["a[0]"]),
    "loss": (lambda m, y, pad: (nn.functional.cross_entropy(m.head(y).mT, LABELS), m.head(y)), ["[0]"]),
    "dataclass": (lambda m, y, pad: Output(m.head(y), {"all": (y.sum((0, 1)),)}), ["inner.all[0]"]),
    "NaN": (lambda m, y, pad: (y / y.norm(dim=-1, keepdim=True)).sum(1), ["the output"]),
    "number of what is found": (lambda m, y, pad: y[y.abs().sum(-1) > 0], ["the output"]),
    "integers": (lambda m, y, pad: (y.abs().sum(-1) > 0).sum(1), ["the output"]),
}


@pytest.mark.parametrize("what", READS_PADDING)
def test_readers_of_padding_are_found(what: str) -> None:
    read, names = READS_PADDING[what]
    counted = [d for d in found(read) if not d.at_padding]
    assert [d.name for d in counted] == names
    assert all(d.gap.size > 10 * d.gap.allowed for d in counted), counted


READS_TOKENS: dict[str, Read] = {
    "mean of tokens": lambda m, y, pad: m.head(y.masked_fill(pad[..., None], 0).sum(1)),
    "first": lambda m, y, pad: m.head(y[:, 0]),
    "packed LSTM": lambda m, y, pad: (
        m.lstm(nn.utils.rnn.pack_padded_sequence(y, (~pad).sum(1), batch_first=True, enforce_sorted=False))[0].data
    ),
    "nothing": lambda m, y, pad: {"none": None, "name": "x", "number": 1},
}


@pytest.mark.parametrize("what", READS_TOKENS)
def test_readers_of_tokens_are_equal(what: str) -> None:
    assert found(READS_TOKENS[what]) == []


@pytest.mark.parametrize(
    "read",
    [
        lambda m, y, pad: y,
        lambda m, y, pad: {"time first": y.transpose(0, 1)},
        lambda m, y, pad: (y.mT, torch.einsum("bsd,btd->bst", y, y)[:, None]),
        lambda m, y, pad: m.head(y).argmax(-1),
    ],
    ids=["batch first", "time first", "columns last", "predictions"],
)
def test_rows_of_padding_are_told_apart(read: Read) -> None:
    (*every,) = found(read)
    assert every
    assert all(d.at_padding for d in every), [str(d) for d in every]
    assert "at padding" in str(every[0])


def test_masks_come_from_the_batch_or_from_what_was_packed() -> None:
    """A model that makes its mask of lengths names it to nobody."""

    class OfLengths(Model):
        def forward(self, x: Tensor, lengths: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x, torch.arange(S) >= lengths[:, None])

    (one,) = differences(*both(OfLengths(lambda m, y, pad: y), batch()[0], (~PAD).sum(1)))
    assert one.at_padding


def test_two_runs_of_one_model_are_equal_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = Model(lambda m, y, pad: (y, m.lstm(y)[0])).to(dtype)
        inputs = inputs_of((batch()[0].to(dtype), PAD), "example")
        assert differences(run(model, inputs), run(model, inputs)) == []


def test_half_precision_may_round() -> None:
    model = Model(lambda m, y, pad: m.head(y[:, 0])).bfloat16()
    assert differences(*both(model, batch()[0].bfloat16(), PAD)) == []
    with torch.autocast("cpu", torch.bfloat16):
        assert differences(*both(Model(lambda m, y, pad: m.head(y[:, 0]).float()))) == []


def test_a_model_is_left_as_it_was() -> None:
    class Counts(Model):
        def __init__(self) -> None:
            super().__init__(lambda m, y, pad: y * torch.rand(()) * random.random())
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", None)

        def forward(self, x: Tensor, pad: Tensor, *labels: Tensor) -> Any:
            self.calls += 1
            self.last = x.mean()
            if torch.is_grad_enabled():
                self.head(x).sum().backward()
            x.mul_(2)
            assert not self.training
            assert not self.lstm.training
            return super().forward(x, pad)

        def train(self, mode: bool = True) -> Any:
            raise AssertionError("code of the caller's")

    model = Counts()
    model.lstm.training = False
    model.head.weight.grad = torch.ones(5, D)
    gradient, x, calls = model.head.weight.grad, batch()[0], model.calls
    states, random_states, before = (
        copy.deepcopy(model.state_dict()),
        (torch.get_rng_state(), random.getstate()),
        [m.training for m in model.modules()],
    )
    once, again = run(model, inputs_of((x, PAD), "example")), run(model, inputs_of((x, PAD), "example"))
    assert differences(once, again) == [], "the same random numbers"
    assert model.head.weight.grad is gradient
    assert torch.equal(gradient, torch.ones(5, D))
    assert model.head.bias.grad is None
    assert model.calls is calls
    assert model.last is None
    assert all(torch.equal(value, states[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    assert torch.equal(x, batch()[0])


def test_a_model_that_raises_is_left_as_it_was_too() -> None:
    model = Model(lambda m, y, pad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, inputs_of(batch(), "example"))
    assert all(m.training for m in model.modules())


def test_an_input_that_comes_twice_stays_one() -> None:
    class Attends(nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            assert query is key
            return query

    x = torch.ones(2, 3, 4)
    run(Attends(), inputs_of((x, x), "example"))


def test_names_of_results() -> None:
    x = torch.zeros(1)
    given = {"a": (x, [x, {"b": x}]), "c": Output(x, {"d": None}), "e": SeqLayout.from_lengths([1]).cu_seqlens}
    assert [name for name, _ in tensors_of(given)] == ["a[0]", "a[1][0]", "a[1][1].b", "c.scores", "e"]


def test_what_rounding_explains() -> None:
    x = torch.randn(100)
    assert gap(x, x + 1e-2).size > gap(x, x + 1e-2).allowed
    for changed in (x + 1e-5, x.double(), x.clone()):
        assert gap(x, changed).size <= gap(x, changed).allowed
    nan = x.masked_fill(torch.arange(100) == 3, float("nan"))
    assert gap(nan, nan.clone()).size == 0
    assert gap(x, nan).size == gap(nan, x).size == float("inf")
    assert gap(x, nan, torch.arange(100) != 3).size == 0
    assert gap(torch.tensor([1, 2]), torch.tensor([1, 3])) == (1.0, 0.0)


# -------------------------------------------------------------------- enable(model, example=batch)


@pytest.mark.parametrize("what", [x for x in READS_PADDING if x != "integers"])  # which are right again with attention alone
def test_what_differs_on_the_example_stays_as_it_came(what: str) -> None:
    read, (name,) = READS_PADDING[what]
    model = Model(read)
    with pytest.warns(VarlenWarning, match=f"(?s)nothing was converted.*on the example {re.escape(name)} "):
        report = enable(model, example=batch())
    assert type(model.encoder) is nn.TransformerEncoder
    assert {m.action for m in report.modules} == {"left alone"}


@pytest.mark.parametrize("what", READS_TOKENS)
def test_what_is_equal_on_the_example_is_converted(what: str) -> None:
    model = Model(READS_TOKENS[what])
    assert len(enable(model, example=batch()).converted) == 5
    assert isinstance(model.encoder, VarlenTransformerEncoder)
    enable(model, example=dict(zip(("x", "pad"), batch(), strict=True)))
    assert isinstance(model.encoder, VarlenTransformerEncoder)
    disable(model)
    assert type(model.encoder) is nn.TransformerEncoder


class Several(nn.Module):
    """Encoders beside each other, of which some are read at padding."""

    def __init__(self, bad: set[int], number: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoders, self.bad = nn.ModuleList(Model(lambda m, y, pad: y).encoder for _ in range(number)), bad

    def forward(self, x: Tensor, pad: Tensor) -> Any:
        return [
            e(x, src_key_padding_mask=pad).sum(1) if i in self.bad else e(x, src_key_padding_mask=pad) for i, e in enumerate(self.encoders)
        ]


@pytest.mark.parametrize("bad", [{0}, {4}, {1, 5}, {0, 1, 2}], ids=str)
def test_only_what_makes_a_result_differ_stays(bad: set[int]) -> None:
    model = Several(bad)
    report = enable(model, example=batch())
    assert {i for i, e in enumerate(model.encoders) if type(e) is nn.TransformerEncoder} == bad
    for i in bad:
        (reason,) = {m.reason for m in report.modules if m.module.startswith(f"encoders.{i}")}
        assert f"[{i}]" in reason
    assert not any(m.reason for m in report.converted)


def test_an_example_that_the_model_does_not_take() -> None:
    model = Model(lambda m, y, pad: y)
    enable(model)
    for example, why in ((batch()[:1], "TypeError"), ((*batch(), 3), "TypeError"), (3, "must be a tuple, list, mapping or tensor")):
        with pytest.raises(ArgumentError, match=f"`example` .*{why}"):
            enable(model, example=example)
        assert isinstance(model.encoder, VarlenTransformerEncoder), "as it was before"
    disable(model)
    with enabled(model, example=batch()) as report:
        assert len(report.converted) == 5
    assert type(model.encoder) is nn.TransformerEncoder


def test_models_of_transformers_change_in_attention_only_where_their_padding_is_read() -> None:
    transformers = pytest.importorskip("transformers")

    class Pooled(nn.Module):
        def __init__(self, everywhere: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            options = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
            self.bert, self.everywhere = transformers.BertModel(transformers.BertConfig(**options)), everywhere

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            y: Tensor = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
            return y.mean(1) if self.everywhere else y

    ids = torch.randint(5, 50, (B, S), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids.masked_fill(PAD, 0), "attention_mask": (~PAD).long()}
    model = Pooled(False)
    assert any("BertLayer" in m.kind for m in enable(model, example=example).converted)
    model = Pooled(True)
    expected = model.eval()(**example)
    report = enable(model, example=example)
    assert [m.kind for m in report.converted] == ["BertSelfAttention"] * 2
    assert all("on the example the output differs by" in m.reason for m in report.converted)
    torch.testing.assert_close(model(**example), expected)


class Lends(nn.Module):
    """As WavLM in torchaudio: one attention only lends its weights to code that computes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.lender, self.caller = (nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = x + nn.functional.linear(x, self.lender.in_proj_weight[-16:])
        return x + self.caller(x, x, x, padding, need_weights=False)[0]


IDLE = "never called: another module reads its weights"
NOT_SEEN = "no call was seen of these enabled modules: lender"


def test_a_module_that_only_lends_its_weights_is_named() -> None:
    model, batch = Lends().eval(), (torch.randn(2, 5, 16), torch.arange(5) >= torch.tensor([5, 3])[:, None])
    found = compare(model, batch)
    rows = {row.module: row for row in enable(model, example=batch).modules}
    for row in (rows["lender"], next(row for row in found.report.modules if row.module == "lender")):
        assert row.action == "converted"
        assert row.reason.startswith(IDLE)
    assert IDLE not in rows["caller"].reason
    with record(model) as log:
        pass
    assert "no call was seen of these enabled modules: lender, caller" in str(log)
    with record(model) as log:
        model(*batch)
    assert NOT_SEEN in str(log)
    assert NOT_SEEN in log.summary()
    with record() as log:
        model(*batch)
    assert "no call was seen" not in str(log)


def test_what_runs_in_a_stack_or_in_the_model_itself_is_not_called_idle() -> None:
    padding = torch.arange(5) >= torch.tensor([5, 3])[:, None]
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False).eval()
    for model in (encoder, nn.Sequential(encoder), nn.MultiheadAttention(16, 2, batch_first=True)):
        enable(model)
        x = torch.randn(2, 5, 16)
        for given in (padding, torch.zeros_like(padding)):  # packed, and as it came
            with record(model) as log, torch.no_grad():
                if isinstance(model, nn.MultiheadAttention):
                    model(x, x, x, given)
                else:
                    encoder(x, src_key_padding_mask=given)
            assert log.calls
            assert log.idle == ()
