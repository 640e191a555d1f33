"""What rows at padding hold after a packed stack, and calls and models that run as they came because somebody reads these rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.4", reason="needs transformers")

import transformers
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers.masking_utils import bidirectional_mask_function
from transformers.modeling_outputs import TokenClassifierOutput

from varlen_attn import SeqLayout, enable, record
from varlen_attn.integrations.transformers.mask import ISLAND, varlen_mask

from .tiny import (
    COMMON,
    OPTIONS,
    assert_close,
    assert_same_gradients,
    attention_mask,
    batch,
    build,
    error,
    gradients,
    reasons,
    shake,
    token_ids,
)

VALID = attention_mask().bool()


def packed(model: nn.Module, **inputs: Any) -> bool:
    with record() as log:
        model(**inputs)
    return any(call.rows is not None and call.slots is not None and call.rows < call.slots for call in log)


def linear_rows(model: nn.Module, run: Callable[[], Any]) -> set[int]:
    """How many rows linear layers compute."""
    rows: set[int] = set()

    def look(module: nn.Module, args: Any, result: Any) -> None:
        if isinstance(module, nn.Linear) and module in inside and result.dim() > 2:
            rows.add(result.numel() // result.shape[-1])

    inside = set(model.modules())
    handle = nn.modules.module.register_module_forward_hook(look)
    run()
    handle.remove()
    return rows


def assert_edges(x: Tensor, mask: Tensor, what: str = "result") -> None:
    """Bit by bit, so that what compares rows finds the first of equals at a token."""
    layout = SeqLayout.from_attention_mask(mask)
    assert torch.equal(x, layout.unpack(layout.pack(x), "edge")), what
    assert bool(x.ne(0).any()), what


# -------------------------------------------------------------------- edge rows


@pytest.mark.parametrize("wish", [{}, {"output_attentions": True}], ids=["packed", "padded"])
@pytest.mark.parametrize(("name", "side"), [("Bert", "right"), ("ModernBert", "right"), ("Llama", "right"), ("Mistral", "left")])
def test_padding_repeats_the_nearest_token(name: str, side: str, wish: dict[str, Any]) -> None:
    """In every hidden state, whatever else is asked for."""
    model, inputs = build(name), batch(side)
    expected = model(**inputs, output_hidden_states=True)
    enable(model)
    assert packed(model, **inputs, **wish) == (not wish)
    got = model(**inputs, output_hidden_states=True, **wish)
    real = inputs["attention_mask"].bool()
    states = [(got.last_hidden_state, expected.last_hidden_state), *zip(got.hidden_states, expected.hidden_states, strict=True)]
    for i, (x, want) in enumerate(states):
        assert_close(x[real], want[real], what=f"state {i}")
        assert_edges(x, inputs["attention_mask"], f"state {i}")
    if name == "Bert":
        assert_close(got.pooler_output, expected.pooler_output)


def test_padding_between_tokens() -> None:
    """A decoder with holes runs padded, and gives the same kind of rows."""
    model, inputs = build("Llama", use_cache=False), batch("holes")
    enable(model)
    assert_edges(model(**inputs).last_hidden_state, inputs["attention_mask"])


@pytest.mark.parametrize("wish", [{}, {"output_attentions": True}], ids=["packed", "padded"])
def test_a_loss_that_reads_edge_rows_gives_no_gradient_through_them(wish: dict[str, Any]) -> None:
    model = build("Bert", add_pooling_layer=False)
    enable(model)
    weights = torch.randn(*VALID.shape, 32, dtype=torch.float64)
    everywhere, at_tokens = (
        gradients(model, (model(**batch(), **wish).last_hidden_state * w).sum()) for w in (weights, weights * VALID[..., None])
    )
    for name, g in at_tokens.items():
        assert error(everywhere[name], g) <= 1e-12, name


def test_what_people_make_of_rows_at_padding() -> None:
    """A norm and a mask afterwards, a maximum over time, argmax: as of each sample alone."""
    model, inputs = build("Bert"), batch()
    alone = [model(**{k: x[i : i + 1, : int(VALID[i].sum())] for k, x in inputs.items()}).last_hidden_state[0] for i in range(len(VALID))]
    enable(model)
    got = model(**inputs).last_hidden_state
    unit = got / got.norm(dim=-1, keepdim=True) * inputs["attention_mask"][..., None]
    assert_close(torch.stack([x.amax(0) for x in alone]), got.amax(1))
    assert_close(torch.cat([x / x.norm(dim=-1, keepdim=True) for x in alone]), unit[VALID])
    assert torch.equal(got.argmax(1), torch.stack([x.argmax(0) for x in alone]))


def test_letters_of_recordings() -> None:
    """All frames go into a batched CTC decoder, and those of padding must not say a letter more."""
    model = build("Wav2Vec2", "ForCTC", feat_extract_norm="layer", do_stable_layer_norm=True, vocab_size=12, pad_token_id=0)
    nn.init.normal_(model.lm_head.bias)
    lengths = torch.tensor([400, 160, 260, 90])
    mask = (torch.arange(400) < lengths[:, None]).long()
    waves = torch.randn(4, 400, dtype=torch.float64) * mask

    def letters(rows: Tensor) -> list[list[int]]:
        return [[c for c in row.unique_consecutive().tolist() if c] for row in rows]

    alone = [letters(model(waves[i : i + 1, :n], attention_mask=mask[i : i + 1, :n]).logits.argmax(-1))[0] for i, n in enumerate(lengths)]
    enable(model)
    assert packed(model, input_values=waves, attention_mask=mask)
    assert letters(model(waves, attention_mask=mask).logits.argmax(-1)) == alone


def test_a_cache_holds_zeros_at_padding() -> None:
    model = build("Llama")
    enable(model)
    cache = model(**batch("left")).past_key_values
    hidden = ~batch("left")["attention_mask"].bool()[:, None, :, None]
    assert not (cache.layers[0].keys * hidden).any()
    assert cache.layers[0].keys.any()


# -------------------------------------------------------------------- rows without tokens, padding before tokens, one layer


@pytest.mark.parametrize("wish", [{}, {"output_hidden_states": True}], ids=["", "hidden states"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["Bert", "ModernBert", "Llama", "Mistral", "T5"])
def test_a_row_without_tokens_is_computed(name: str, side: str, wish: dict[str, Any]) -> None:
    """All of it, as it was, for a pooler reads it; and the others are packed."""
    if name == "Bert" and side == "left":
        pytest.skip("its pooler reads the first column")
    model = build(name, "EncoderModel" if name == "T5" else "Model")
    mask = attention_mask(side, (9, 4, 0, 3))
    real = mask.bool() | ~mask.bool().any(1, keepdim=True)
    inputs = {"input_ids": token_ids(mask), "attention_mask": mask}
    weights = torch.randn(*mask.shape, 32, dtype=torch.float64) * real[..., None]

    def run() -> tuple[list[Tensor], dict[str, Tensor]]:
        out = model(**inputs, **wish)
        states = [out.last_hidden_state, *(out.get("hidden_states") or ())]
        pooled = [out.pooler_output] if name == "Bert" else []
        return [*(x[real] for x in states), *pooled], gradients(
            model, (out.last_hidden_state * weights).sum() + sum(x.sum() for x in pooled)
        )

    expected = run()
    enable(model)
    rows = linear_rows(model, lambda: model(**inputs, **wish))
    assert rows == {int(real.sum())}
    with record(model) as log:
        got = run()
    assert name == "T5" or ({call.reason for call in log}, log.calls[0].rows) == ({None}, int(real.sum()))
    for x, want in zip(got[0], expected[0], strict=True):
        assert_close(x, want)
    assert_same_gradients(got[1], expected[1])


def test_rows_without_tokens_in_numbers() -> None:
    """Code that computes with the mask of packed rows sees that they see nothing; on another device too."""
    mask = attention_mask(lengths=(3, 0, 2), columns=3)
    made = varlen_mask(3, 3, 3, mask_function=bidirectional_mask_function, attention_mask=mask.bool())
    packed_mask = made.meaning.packed
    want = torch.block_diag(torch.ones(3, 3), torch.zeros(3, 3), torch.ones(2, 2)).bool()
    assert torch.equal(packed_mask.meaning.dense[0, 0], want)
    moved = packed_mask.meaning.to(torch.device("cpu"))
    assert moved.stack.blind.tolist() == [False] * 3 + [True] * 3 + [False] * 2


LEFT: dict[str, tuple[str, dict[str, Any], bool]] = {
    "a pooler": ("Bert", {}, False),
    "no pooler": ("Bert", dict(add_pooling_layer=False), True),
    "words": ("BertForMaskedLM", {}, True),
    "a class of each token": ("BertForTokenClassification", {}, True),
    "the first token's class": ("BertForSequenceClassification", {}, False),
    "the mean": ("ModernBertForSequenceClassification", dict(classifier_pooling="mean"), True),
    "the first": ("ModernBertForSequenceClassification", dict(classifier_pooling="cls"), False),
}


@pytest.mark.parametrize("what", LEFT)
def test_padding_before_the_tokens_of_an_encoder(what: str) -> None:
    """The trial sees who reads the first column."""
    name, options, packs = LEFT[what]
    family, head = (name.split("For")[0], "For" + name.split("For")[1]) if "For" in name else (name, "Model")
    config = getattr(transformers, family + "Config")(
        **{**COMMON, **OPTIONS[family], **{k: x for k, x in options.items() if "add" not in k}}
    )
    model = shake(getattr(transformers, family + head)(config, **{k: x for k, x in options.items() if "add" in k}).double()).eval()
    inputs = batch("left")
    real = inputs["attention_mask"].bool()

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        out = model(**inputs)
        x = out[0] if out[0].dim() == 2 else out[0][real]
        return torch.cat([x.flatten(), *(y.flatten() for k, y in out.items() if k == "pooler_output")]), gradients(model, x.square().sum())

    expected = run()
    enable(model)
    with record(model) as log:
        got = run()
    assert [call.rows == int(real.sum()) for call in log] == [packs] * 2
    assert packs or "an encoder with padding before its tokens" in str(log.calls[0].reason)
    assert_close(got[0], expected[0])
    assert_same_gradients(got[1], expected[1])


def test_who_reads_the_first_column_around_a_model_is_not_known() -> None:
    wrapper = nn.ModuleDict({"text": build("DistilBert")})
    enable(wrapper)
    assert not packed(wrapper["text"], **batch("left"))
    assert packed(wrapper["text"], **batch())


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("name", ["Bert", "Llama", "T5"])
def test_one_layer(name: str, asked_before: bool) -> None:
    """Its input is one of the hidden states, and collected after it was computed."""
    head, inputs = "EncoderModel" if name == "T5" else "Model", batch()
    model, other = (build(name, head, num_hidden_layers=1) for _ in range(2))
    plain, expected = model(**inputs).last_hidden_state, other(**inputs, output_hidden_states=True).hidden_states
    if asked_before:
        model(**inputs, output_hidden_states=True)
    enable(model)
    with record(model) as log:
        assert_close(model(**inputs).last_hidden_state[VALID], plain[VALID])
        got = model(**inputs, output_hidden_states=True).hidden_states
    assert {call.reason for call in log} <= {None, ISLAND}
    assert len(got) == len(expected) == 2
    for x, want in zip(got, expected, strict=True):
        assert_close(x[VALID], want[VALID])
        assert_edges(x, inputs["attention_mask"])


def test_one_layer_of_which_some_states_are_asked_for() -> None:
    model, inputs = build("Llama", num_hidden_layers=1), batch()
    expected = model(**inputs, output_hidden_states=[1]).hidden_states
    enable(model)
    got = model(**inputs, output_hidden_states=[1]).hidden_states
    assert [x is None for x in got] == [x is None for x in expected]
    assert all(error(x[VALID], want[VALID]) < 1e-10 for x, want in zip(got, expected, strict=True) if want is not None)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_classifier_of_sequences_given_embeddings(side: str) -> None:
    """It knows no padding then, and reads the last column, which is a token where padding is on the left."""
    model, inputs = build("Llama", "ForSequenceClassification"), batch(side)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    expected = model(**inputs).logits
    enable(model)
    with record(model) as log:
        assert_close(model(**inputs).logits, expected)
    assert (log.calls[0].reason is None) == (side == "left")


# -------------------------------------------------------------------- readers that arguments tell of


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", ["Bert", "ModernBert"])
def test_a_head_that_compares_columns(name: str, given: bool) -> None:
    model = build(name, "ForQuestionAnswering")
    inputs = batch() | ({"start_positions": torch.tensor([1, 0, 2, 0]), "end_positions": torch.tensor([3, 1, 2, 0])} if given else {})
    expected = model(**inputs)
    report = enable(model)
    assert any("its head compares all columns" in reason for reason in reasons(report).values())
    got = model(**inputs)
    for key in ("start_logits", "end_logits", *(("loss",) if given else ())):
        assert_close(got[key], expected[key], what=key)


@pytest.mark.parametrize("kind", ["mask", "special", "random"])
def test_ids_at_padding(kind: str) -> None:
    """ColBERT reads rows of [MASK] that no token attends to; padding with another special id is padding, and so are random numbers."""
    model = build("Bert", sep_token_id=4)
    inputs = batch()
    chosen = {"mask": torch.where(VALID.cumsum(1) < 6, 40, 1), "special": torch.tensor(4), "random": torch.arange(36).view(4, 9) + 5}
    inputs["input_ids"] = torch.where(VALID, inputs["input_ids"], chosen[kind])
    expected = model(**inputs).last_hidden_state
    enable(model)
    with record() as log:
        got = model(**inputs).last_hidden_state
    if kind != "mask":
        assert_edges(got, inputs["attention_mask"])
        return
    assert_close(got, expected)
    assert all("an id at padding that is not that of padding" in (call.reason or "") for call in log)


def test_ids_at_padding_of_a_decoder_are_anything() -> None:
    model, inputs = build("Llama"), batch()
    inputs["input_ids"] = inputs["input_ids"].masked_fill(~VALID, 40)
    enable(model)
    assert_edges(model(**inputs).last_hidden_state, inputs["attention_mask"])


class Tagger(transformers.BertPreTrainedModel):
    """A user's head, whose losses go over all columns."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert, self.head = transformers.BertModel(config, add_pooling_layer=False), nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        labels: Any = None,
        tags: Any = None,
        return_dict: Any = None,
    ) -> TokenClassifierOutput:
        states = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)[0]
        logits, loss = self.head(states), None
        if labels is not None:
            loss = binary_cross_entropy_with_logits(logits, labels)
        elif tags is not None:
            loss = cross_entropy(logits.flatten(0, 1), tags.flatten())
        return TokenClassifierOutput(loss=loss, logits=logits)


def tagger() -> Any:
    return shake(Tagger(build("Bert").config).double()).eval()


TAGS = torch.arange(VALID.numel()).view(VALID.shape) % 3


@pytest.mark.parametrize(
    "given",
    [{"labels": nn.functional.one_hot(TAGS, 3).double()}, {"tags": TAGS}, {"tags": TAGS * VALID}],
    ids=["three dimensions", "another name", "zeros at padding"],
)
def test_a_loss_over_all_columns(given: dict[str, Tensor]) -> None:
    model = tagger()
    expected = model(**batch(), **given).loss
    wanted = gradients(model, expected)
    enable(model)
    with record() as log:
        loss = model(**batch(), **given).loss
    assert all(f"`{next(iter(given))}` at padding" in (call.reason or "") for call in log)
    assert_close(loss, expected)
    for name, g in gradients(model, loss).items():
        assert error(g, wanted[name]) <= 1e-10, name


@pytest.mark.parametrize(
    "given", [{"tags": TAGS.masked_fill(~VALID, -100)}, {"token_type_ids": torch.ones_like(TAGS)}, {}], ids=["-100", "an input", "none"]
)
def test_what_reads_no_padding_is_packed(given: dict[str, Tensor]) -> None:
    model = tagger()
    expected = model(**batch(), **given)
    enable(model)
    assert packed(model, **batch(), **given)
    got = model(**batch(), **given)
    assert_close(got.logits[VALID], expected.logits[VALID])
    if expected.loss is not None:
        assert_close(got.loss, expected.loss)


# -------------------------------------------------------------------- modules around a model


class Around(nn.Module):
    """A model inside of a larger module, which reads every row."""

    def __init__(self, top: nn.Module, read: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.text, self.top, self.read = build("Bert"), shake(top.double()), read

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.read(self.top, states, attention_mask)


def by_row(top: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return top(x)


def by_column(top: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return top(x.transpose(1, 2)).transpose(1, 2)


def first(top: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return top(x)[0]


class Normed(transformers.BertPreTrainedModel):
    """In training its statistics are of all columns, in evaluation of none."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert, self.norm = transformers.BertModel(config, add_pooling_layer=False), nn.BatchNorm1d(config.hidden_size)
        self.post_init()

    def forward(self, input_ids: Any = None, attention_mask: Any = None, return_dict: Any = None) -> TokenClassifierOutput:
        states = self.bert(input_ids, attention_mask=attention_mask)[0]
        return TokenClassifierOutput(logits=self.norm(states.transpose(1, 2)).transpose(1, 2))


def test_a_norm_over_the_batch_inside_of_the_model() -> None:
    model = shake(Normed(build("Bert").config).double()).train()
    expected = model(**batch()).logits
    report = enable(model)
    assert any("what norm reads differs" in reason for reason in reasons(report).values())
    assert_close(model(**batch()).logits, expected)


class Scored(nn.Module):
    """A user's module with a loss over all columns, given its targets in one way or another."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.head = build("Bert", add_pooling_layer=False), shake(nn.Linear(32, 3).double())

    def forward(self, batch: dict[str, Tensor], tags: Tensor | None = None, **more: Tensor) -> Tensor:
        states = self.text(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        targets = next(x for x in (tags, more.get("gold"), batch.get("labels")) if x is not None)
        return cross_entropy(self.head(states).flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("way", ["tags", "gold", "labels"])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_loss_of_a_module_around_the_model(way: str, ignored: bool) -> None:
    model, targets = Scored().eval(), TAGS.masked_fill(~VALID, -100) if ignored else TAGS
    args, kwargs = (({**batch(), "labels": targets},), {}) if way == "labels" else ((batch(),), {way: targets})
    expected = model(*args, **kwargs)
    enable(model)
    with record() as log:
        assert_close(model(*args, **kwargs), expected)
    assert {call.rows for call in log} == ({20} if ignored else {36})


class MyAttention(nn.Linear):  # transformers leaves models alone that stand beside one of nn.Module
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1) * x


READERS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "LSTM": (lambda: nn.LSTM(32, 16, bidirectional=True, batch_first=True), first),
    "GRU": (lambda: nn.GRU(32, 16, batch_first=True, bidirectional=True), first),
    "Conv1d": (lambda: nn.Conv1d(32, 8, 3, padding=1), by_column),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(32, track_running_stats=False), by_column),
    "Conv2d": (lambda: nn.Conv2d(1, 32, (3, 32), padding=(1, 0)), lambda top, x, mask: top(x[:, None])[..., 0].transpose(1, 2)),
    "Flatten": (lambda: nn.Flatten(), lambda top, x, mask: x + top(x).mean(1)[:, None, None]),
    "Softmax": (lambda: nn.Softmax(1), lambda top, x, mask: top(x) * x),
    "AvgPool1d": (lambda: nn.AvgPool1d(3, 1, 1), by_column),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(32, 4, batch_first=True), lambda top, x, mask: top(x, x, x)[0]),
    "MyAttention": (lambda: MyAttention(32, 1), by_row),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_reader_around_the_model(kind: str) -> None:
    top, read = READERS[kind]
    model = Around(top(), read).eval()
    expected = model(**batch())
    report = enable(model)
    assert f"top ({kind}), which is no part of it, may read its rows at padding" in reasons(report)["text.encoder.layer"]
    assert_close(model(**batch())[VALID], expected[VALID])


@pytest.mark.parametrize(
    "top",
    [
        lambda: nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Dropout(0.0)),
        lambda: nn.Conv1d(32, 8, 1),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True), 2),
    ],
    ids=["token by token", "a convolution of one column", "attention with a mask"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_no_reader_around_the_model(top: Callable[[], nn.Module]) -> None:
    class Masked(Around):
        """Its code says that attention is given a mask."""

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            if isinstance(self.top, nn.TransformerEncoder):
                return self.top(x, src_key_padding_mask=attention_mask == 0)  # type: ignore[no-any-return]
            return by_column(self.top, x, attention_mask) if isinstance(self.top, nn.Conv1d) else self.top(x)  # type: ignore[no-any-return]

    model = Masked(top(), by_row).eval()
    expected = model(**batch())
    report = enable(model)
    assert "text.encoder.layer" not in reasons(report)
    assert packed(model, **batch())
    assert_close(model(**batch())[VALID], expected[VALID])


def test_images_beside_the_text() -> None:
    model = Around(nn.Linear(32, 8), by_row).eval()
    model.images = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.MaxPool2d(2))
    enable(model)
    assert packed(model, **batch())


# -------------------------------------------------------------------- what a caller wants there


READ: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "nothing": (lambda: build("Llama"), {}),
    "columns": (lambda: build("Bert", "ForQuestionAnswering"), {}),
    "labels": (tagger, {"tags": TAGS}),
    "ids": (lambda: build("Bert"), {"input_ids": batch()["input_ids"].masked_fill(~VALID, 40)}),
    "an LSTM": (lambda: Around(nn.LSTM(32, 16, batch_first=True), first).eval(), {}),
}


@pytest.mark.parametrize("padding_rows", ["edge", "zero", "exact"])
@pytest.mark.parametrize("name", READ)
def test_the_caller_says_what_they_hold(name: str, padding_rows: Any) -> None:
    """Which goes before what is known of readers."""
    make, given = READ[name]
    model, inputs, seen = make(), batch() | given, []
    base = model.text if isinstance(model, Around) else model.base_model
    base.register_forward_hook(lambda _, args, out: seen.append(out.last_hidden_state))
    model(**inputs)
    left = reasons(enable(model, padding_rows=padding_rows))
    assert packed(model, **inputs) == (padding_rows != "exact")
    expected, got = seen[0], seen[-1]
    assert_close(got[VALID], expected[VALID])
    if padding_rows == "exact":
        assert any('padding_rows="exact"' in reason for reason in left.values())
        assert_close(got, expected)
    elif padding_rows == "zero":
        assert not got[~VALID].any()
    else:
        assert_edges(got, inputs["attention_mask"])
