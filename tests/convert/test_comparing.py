"""`compare`: verdicts on equality and structure, and what it leaves behind; never how fast anything is."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from varlen_attn import ArgumentError, Comparison, compare, enable
from varlen_attn.cli.main import main
from varlen_attn.convert import comparing
from varlen_attn.convert.timing import Timing

B, S, D = 4, 12, 16
PAD = torch.arange(S) >= torch.tensor([S, 3, 7, 5])[:, None]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "SECONDS", 0.0)


class Model(nn.Module):
    def __init__(self, read: Any = lambda y: y, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 32, dropout, batch_first=True), 2, enable_nested_tensor=False)
        self.read = read

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Any:
        return self.read(self.encoder(x, src_key_padding_mask=pad))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(1)), PAD


def with_times(found: Comparison, before: float, after: float) -> Comparison:
    return comparing.replace(found, times={"before": Timing((before,) * 3), "after": Timing((after,) * 3)})


@pytest.mark.parametrize("train", [False, True])
def test_an_encoder(train: bool) -> None:
    found = compare(Model(), batch(), train=train)
    assert found.equal
    assert found.padding == pytest.approx(21 / 48)
    assert [x.name for x in found.results if x.at_padding] == ["the output"]
    assert {call.backend for call in found.log} != {"dense"}
    assert set(found.logs) == set(found.times) == {"before", "after"}
    assert all(log.peak and log.kernels for log in found.logs.values())
    assert with_times(found, 2.1, 1.0).verdict == "2.1x faster, equal at tokens"
    assert with_times(found, 1.0, 1.0).verdict == "leave it: no faster (1.00x, and the times vary by 0%)"
    names = {x.name for x in found.results}
    assert ("the loss" in names) == train
    assert ("the gradient of encoder.layers.1.linear2.weight" in names) == train
    text = str(found)
    assert text.splitlines()[0] == found.verdict
    assert "44% of the batch" in text
    assert repr(found) == text
    assert json.loads(json.dumps(found.as_dict()))["equal"] is True


def test_a_model_that_reads_padding_is_not_equal() -> None:
    found = compare(Model(lambda y: y.mean(1)), batch())
    assert not found.equal
    assert found.verdict.startswith("not equal: the output differs by ")
    assert "example=batch" in found.verdict


def test_a_gradient_that_differs_is_found() -> None:
    """Results are equal here, and what the weights learn is not."""

    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            ctx.save_for_backward(y)
            return y.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * ctx.saved_tensors[0].square().mean()

    found = compare(Model(Reads.apply), batch())
    assert found.equal
    found = compare(Model(Reads.apply), batch(), train=True)
    assert not found.equal
    assert "not equal: the gradient of " in found.verdict


@pytest.mark.parametrize("train", [False, True])
def test_models_that_gain_nothing(train: bool) -> None:
    full = compare(Model(), (batch()[0], torch.zeros_like(PAD)), train=train)
    assert full.verdict == "leave it: nothing is padded"
    assert full.padding == 0
    assert "nothing is padded" in compare(Model(), batch()[:1], train=train).verdict
    linear = compare(nn.Linear(D, 3), batch()[:1], train=train)
    assert linear.verdict == "leave it: nothing was converted"
    mha = nn.MultiheadAttention(D, 2, batch_first=True)
    example = dict(zip(("query", "key", "value", "key_padding_mask"), (batch()[0],) * 3 + (PAD,), strict=True))
    found = compare(mha, example, train=train)
    assert found.verdict.startswith("leave it: ")
    assert "need_weights=False" in str(found), "the way out"
    padded = [line for line in str(found).splitlines() if line.strip().startswith("padded  ")]
    assert len(padded) == 1
    assert "weights" in padded[0]
    frozen = mha.requires_grad_(False), {**example, "query": batch()[0].requires_grad_()}
    if train:
        with pytest.raises(ArgumentError, match=r"`train` must be False for a model whose results need no gradient.*requires_grad_"):
            compare(*frozen, train=True)


def test_a_classifier_in_training() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50, num_labels=3)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).train()
    ids = torch.randint(5, 50, (B, S)).masked_fill(PAD, 0)
    example = {"input_ids": ids, "attention_mask": (~PAD).long(), "labels": torch.tensor([0, 2, 1, 1])}
    found = compare(model, example, train=True)
    assert found.equal, found
    assert {"loss", "logits", "the loss", "the gradient of classifier.weight"} <= {x.name for x in found.results}
    assert with_times(found, 3, 1).verdict == "3x faster, equal at tokens"
    assert model.training
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("converted", [False, True])
def test_the_model_is_left_as_it_was(train: bool, converted: bool) -> None:
    model = Model(lambda y: y * torch.rand(()) * random.random())
    if converted:
        enable(model, level="attention")
    model.encoder.layers[0].eval()
    model.encoder.layers[0].linear1.bias.grad = torch.ones(32)

    def state() -> Any:
        return (
            [(type(m), m.training) for m in model.modules()], torch.get_rng_state().tolist(), random.getstate(),
            [None if p.grad is None else p.grad.clone().tolist() for p in model.parameters()],
        )  # fmt: skip

    x, pad = batch()
    before, weights = state(), copy.deepcopy(model.state_dict())
    found = compare(model, (x, pad), train=train)
    assert state() == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, batch()[0])
    assert bool(found.report.converted)
    assert found.equal


def test_what_cannot_be_compared() -> None:
    for model, given, options, why in (
        (Model, batch(), {}, "`model` must be a torch.nn.Module, but is the class Model"),
        (Model(), 3, {}, "`batch` must be a tuple, list, mapping or tensor"),
        (Model(), (1, 2, 3), {}, "`batch` must be a batch that the model takes, but with it that raises TypeError"),
        (Model().requires_grad_(False), batch(), {"train": True}, "`train` must be False"),
    ):
        with pytest.raises(ArgumentError, match=why):
            compare(model, given, **options)
    model = Model(lambda y: 1 / 0)
    with pytest.raises(ArgumentError, match="ZeroDivisionError"):
        compare(model, batch())
    assert type(model.encoder) is nn.TransformerEncoder


# -------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("models") / "bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "text", "is", "here", "and", "there"]
    place.mkdir()
    (place / "vocab.txt").write_text("\n".join(words))
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=len(words))
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).save_pretrained(place)
    transformers.BertTokenizer(str(place / "vocab.txt")).save_pretrained(place)
    (place.parent / "texts.txt").write_text("a text is here and there and here\n\na text\nhere\n" + "never read\n" * 3)
    return place


@pytest.mark.filterwarnings("ignore")  # of libraries
@pytest.mark.parametrize("options", [[], ["--train"]])
def test_a_folder_and_texts(folder: Any, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    texts, out = str(folder.parent / "texts.txt"), folder.parent / "found.json"
    assert main(["compare", str(folder), "--texts", texts, "--batch-size", "3", "--json", str(out), *options]) == 0
    shown, found = capsys.readouterr(), json.loads(out.read_text())
    assert shown.out.splitlines()[0] == found["verdict"]
    assert "the model converted" in shown.err
    assert found["equal"]
    assert found["train"] is bool(options)
    assert found["padding"] == pytest.approx(1 - (10 + 4 + 3) / 30)
    assert any(m["kind"] == "2 x BertLayer" and m["action"] == "converted" for m in found["modules"])


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("compare {0}/nothing --texts {0}/texts.txt", "must be a folder with a config.json, or an installed package that has one inside"),
        ("compare no_such_package --texts {0}/texts.txt", "must be a folder with a config.json"),
        ("compare json --texts {0}/texts.txt", "must be a folder with a config.json"),
        ("compare {0}/bert --texts {0}/none.txt", "must be a file with a text in every line"),
        ("compare {0}/bert", "required: --texts"),
        ("compare {0}/bert --texts {0}/texts.txt --json {0}/no/such/x.json", "must be a file in a folder that exists"),
        ("bench --json {0}/no/such/x.json", "must be a file in a folder that exists"),
        ("bench --json {0}", "must be a file in a folder that exists"),
    ],
)
def test_wrong_values_are_refused_at_once(folder: Any, command: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(command.format(folder.parent).split())
    assert exit_info.value.code == 2
    assert why in capsys.readouterr().err
