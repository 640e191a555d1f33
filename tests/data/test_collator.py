"""`VarlenCollator`: batches against a loop and against transformers' collators, through real workers, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from varlen_attn import ArgumentError, LayoutWarning, SeqLayout
from varlen_attn.data.collator import VarlenCollator
from varlen_attn.data.host_lengths import HostLengths
from varlen_attn.testing.strategies import lengths, masks

from ..layout.test_seq_layout import assert_same
from ..nosync import count_reads

FORMS = {
    "lists": list,
    "arrays": np.array,
    "frozen int32 arrays": lambda v: frozen(np.array(v, dtype=np.int32)),
    "tensors": lambda v: torch.tensor(v, dtype=torch.int64),
}


def frozen(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.setflags(write=False)  # as the columns of arrow tables are
    return array


@st.composite
def documents(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Examples of ids, types and labels one a token; in any form, empty ones included."""
    form = FORMS[draw(st.sampled_from(sorted(FORMS)))]
    tokens = draw(lengths().filter(len))
    ids = [[10 * i + j + 1 for j in range(n)] for i, n in enumerate(tokens)]
    keys = ("input_ids", "token_type_ids", "labels")[: draw(st.integers(1, 3))]
    values = {"input_ids": ids, "token_type_ids": [[1] * n for n in tokens], "labels": [[-v for v in row] for row in ids]}
    return [{key: form(values[key][i]) if values[key][i] else [] for key in keys} for i in range(len(tokens))]


def padded(rows: list[list[int]], size: int, value: int, side: str) -> list[list[int]]:
    return [[*row, *[value] * (size - len(row))] if side == "right" else [*[value] * (size - len(row)), *row] for row in rows]


def column(examples: list[dict[str, Any]], key: str) -> list[list[int]]:
    return [[int(v) for v in example[key]] for example in examples]


# -------------------------------------------------------------------- padded


@given(
    examples=documents(),
    side=st.sampled_from((None, "right", "left")),
    multiple=st.sampled_from((None, 1, 4)),
    cut=st.sampled_from((None, 3)),
)
def test_padded_against_a_loop(examples: list[dict[str, Any]], side: Any, multiple: int | None, cut: int | None) -> None:
    batch = VarlenCollator(padding_side=side, pad_to_multiple_of=multiple, max_length=cut, pad_token_id=9, with_layout=True)(examples)
    assert set(batch) == {*examples[0], "attention_mask", "layout"}
    tokens = [min(len(e["input_ids"]), cut or 99) for e in examples]
    size = next(s for s in range(max(tokens), 99) if s % (multiple or 1) == 0)
    for key, value in (("input_ids", 9), ("token_type_ids", 0), ("labels", -100)):
        if key in batch:
            assert batch[key].dtype == torch.int64
            assert batch[key].tolist() == padded([row[:cut] for row in column(examples, key)], size, value, side or "right")
    mask = batch["attention_mask"]
    assert isinstance(mask, HostLengths)
    assert (mask.lengths, mask.known.padded_len, mask.known.padding_side, mask.known.kind) == (tuple(tokens), size, side or "right", "mask")
    assert (mask.dtype, mask.tolist()) == (torch.int64, padded([[1] * n for n in tokens], size, 0, side or "right"))
    assert batch["layout"] is mask.seq_layout
    assert_same(batch["layout"], SeqLayout.from_lengths(tokens, size, side or "right"))
    for key in examples[0]:
        assert type(batch[key]) is Tensor


@given(padding=masks().filter(len), packed=st.booleans())
def test_masks_of_examples(padding: Tensor, packed: bool) -> None:
    """A padded batch has them as they are; a packed one leaves out what they leave out."""
    real = ~padding
    ids = torch.arange(real.numel()).view(real.shape) + 1
    examples = [{"input_ids": i, "attention_mask": m.long().tolist(), "labels": i} for i, m in zip(ids, real, strict=True)]
    batch = VarlenCollator(packed=packed, pad_to_multiple_of=None if packed else 5)(examples)
    if packed:
        alone = [{"input_ids": i[m], "labels": i[m]} for i, m in zip(ids, real, strict=True)]
        expected = VarlenCollator(packed=True)(alone)
        assert batch.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(batch[key], value) if isinstance(value, Tensor) else batch[key] == value
        return
    mask, size = batch["attention_mask"], padding.shape[1]
    assert torch.equal(mask[:, :size], real.long())
    assert not mask[:, size:].any()
    known = HostLengths.from_mask(mask.as_subclass(Tensor).clone())
    assert isinstance(mask, HostLengths) == isinstance(known, HostLengths)
    assert getattr(mask, "lengths", None) == getattr(known, "lengths", None)
    assert torch.equal(batch["input_ids"][:, :size], ids)


def test_the_layout_of_a_mask_with_holes() -> None:
    collate = VarlenCollator(with_layout=True)
    batch = collate([{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, {"input_ids": [4], "attention_mask": [1]}])
    assert type(batch["attention_mask"]) is Tensor
    assert_same(batch["layout"], SeqLayout.from_attention_mask(torch.tensor([[1, 0, 1], [1, 0, 0]])))
    with pytest.warns(LayoutWarning):
        collate([{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, {"input_ids": [4], "attention_mask": [0]}])


def test_labels_of_an_example() -> None:
    ids = [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}]

    def labels(first: Any, second: Any, name: str = "labels", **options: Any) -> Any:
        return VarlenCollator(**options)([ids[0] | {name: first}, ids[1] | {name: second}])["labels"]

    for name in ("labels", "label", "label_ids"):
        assert labels(1, 0, name).tolist() == [1, 0]
        assert labels(1, 0, name).dtype == torch.int64
    assert labels(0.5, np.float32(2)).tolist() == [0.5, 2.0]
    assert labels([0.0, 1.0], [1.0, 0.0]).tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert labels([7, 8], [9], aligned_labels=False).tolist() == [[7, 8], [9, -100]]
    assert labels([7, 8], [9], aligned_labels=False, label_pad=-1, padding_side="left").tolist() == [[7, 8], [9, -1]]
    assert labels([], [9], aligned_labels=False).tolist() == [[-100], [9]]
    assert VarlenCollator(labels_from_input_ids=True)(ids)["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    assert labels(1, 0, labels_from_input_ids=True).tolist() == [1, 0]
    masked = [{"input_ids": [1, 2, 3], "attention_mask": [0, 1, 1]}]
    assert VarlenCollator(labels_from_input_ids=True)(masked)["labels"].tolist() == [[-100, 2, 3]]


def test_sound() -> None:
    clips = [np.linspace(0, 1, 4), np.linspace(0, 1, 2, dtype=np.float32), [0.5]]
    examples = [{"input_values": clip, "labels": list(range(1, i + 2)), "speaker": i} for i, clip in enumerate(clips)]
    batch = VarlenCollator(max_length=3, padding_side="right")(examples)
    assert batch["input_values"].dtype == torch.float32
    torch.testing.assert_close(batch["input_values"], torch.tensor([[0, 1 / 3, 2 / 3], [0, 1, 0], [0.5, 0, 0]]))
    assert batch["attention_mask"].lengths == (3, 2, 1)
    assert batch["labels"].tolist() == [[1, -100, -100], [1, 2, -100], [1, 2, 3]]  # transcripts are not cut with the sound
    assert batch["speaker"].tolist() == [0, 1, 2]


def test_frames() -> None:
    frames = [torch.randn(n, 5) for n in (3, 1)]
    batch = VarlenCollator(pad_to_multiple_of=4)([{"input_features": x} for x in frames])
    assert torch.equal(batch["input_features"], torch.stack([torch.cat([x, torch.zeros(4 - len(x), 5)]) for x in frames]))
    assert batch["attention_mask"].lengths == (3, 1)
    assert batch["attention_mask"].known.padded_len == 4
    left = VarlenCollator(SimpleNamespace(padding_side="left"))([{"input_features": x.tolist()} for x in frames])
    assert torch.equal(left["input_features"][1], torch.cat([torch.zeros(2, 5), frames[1]]))
    assert left["attention_mask"].known.padding_side == "left"


def test_other_columns_are_stacked() -> None:
    examples = [
        {"input_ids": [1, 2], "weight": 0.5, "box": [1, 2, 3], "flag": True},
        {"input_ids": [1], "weight": 1, "box": [4, 5, 6], "flag": False},
    ]
    for packed in (False, True):
        batch = VarlenCollator(packed=packed)(examples)
        assert batch["weight"].tolist() == [0.5, 1.0]
        assert batch["box"].tolist() == [[1, 2, 3], [4, 5, 6]]
        assert batch["flag"].dtype == torch.bool


def test_batches_do_not_depend_on_defaults_of_torch() -> None:
    examples = [{"input_ids": [1, 2]}, {"input_ids": [3]}]
    with torch.device("meta"):
        assert VarlenCollator()(examples)["input_ids"].tolist() == [[1, 2], [3, 0]]
        assert VarlenCollator(packed=True)(examples)["position_ids"].tolist() == [[0, 1, 0]]
    with torch.inference_mode():
        assert not VarlenCollator()(examples)["attention_mask"].is_inference()


# -------------------------------------------------------------------- packed


@given(examples=documents(), start=st.sampled_from((0, 2)), cut=st.sampled_from((None, 3)), from_ids=st.booleans())
def test_packed_against_a_loop(examples: list[dict[str, Any]], start: int, cut: int | None, from_ids: bool) -> None:
    collate = VarlenCollator(
        packed=True, position_ids_start=start, max_length=cut, labels_from_input_ids=from_ids, label_pad=-7, with_layout=True
    )
    batch = collate(examples)
    rows = [row[:cut] for row in column(examples, "input_ids")]
    tokens = tuple(map(len, rows))
    labels = [row[:cut] for row in column(examples, "labels")] if "labels" in examples[0] else rows if from_ids else None
    assert batch["input_ids"].tolist() == [[v for row in rows for v in row]]
    assert batch["position_ids"].tolist() == [[start + i for n in tokens for i in range(n)]]
    assert ("labels" in batch) == (labels is not None)
    if labels is not None:
        assert batch["labels"].tolist() == [[-7 if i == 0 else v for row in labels for i, v in enumerate(row)]]
    offsets = batch["cu_seq_lens_q"]
    assert offsets is batch["cu_seq_lens_k"]
    assert isinstance(offsets, HostLengths)
    assert (offsets.lengths, offsets.known.kind, offsets.dtype) == (tokens, "offsets", torch.int32)
    assert offsets.tolist() == [sum(tokens[:i]) for i in range(len(tokens) + 1)]
    assert batch["max_length_q"] == batch["max_length_k"] == max(tokens)
    assert type(batch["max_length_q"]) is int
    assert batch["layout"] is offsets.seq_layout
    assert_same(batch["layout"], SeqLayout.from_lengths(tokens))
    assert "attention_mask" not in batch


def test_packing_leaves_examples_alone() -> None:
    example = {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([3, 4]), "position_ids": [5, 6]}
    batch = VarlenCollator(packed=True)([example])
    assert batch["labels"].tolist() == [[-100, 4]]
    assert example["labels"].tolist() == [3, 4]
    assert batch["position_ids"].tolist() == [[5, 6]]  # the example's own


@pytest.mark.parametrize("with_labels", [False, True])
def test_packed_against_transformers(with_labels: bool) -> None:
    transformers = pytest.importorskip("transformers")
    examples = [{"input_ids": [5 * i + j for j in range(n)]} for i, n in enumerate((3, 1, 4, 2))]
    if with_labels:
        examples = [e | {"labels": [v + 100 for v in e["input_ids"]]} for e in examples]
    theirs = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(examples)
    ours = VarlenCollator(packed=True, labels_from_input_ids=True)(examples)
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        if isinstance(expected, Tensor):
            assert ours[key].dtype == expected.dtype
            assert torch.equal(ours[key], expected)
        else:
            assert ours[key] == expected


# -------------------------------------------------------------------- processors


class Tokenizer:
    """A tokenizer as far as one is asked: characters between 1 and 2, padded on the left with 9."""

    pad_token_id: int | None = 9
    padding_side = "left"
    model_input_names = ("input_ids",)

    def __call__(self, texts: list[str], truncation: bool, max_length: int | None, return_attention_mask: bool) -> dict[str, Any]:
        assert truncation == (max_length is not None)
        assert not return_attention_mask
        return {"input_ids": [[1, *map(ord, text[: max_length - 2 if max_length else None]), 2] for text in texts]}


def test_text() -> None:
    for examples in (["ab", ""], [{"text": "ab"}, {"text": ""}]):
        batch = VarlenCollator(Tokenizer())(examples)
        assert batch["input_ids"].tolist() == [[1, 97, 98, 2], [9, 9, 1, 2]]
        assert (batch["attention_mask"].lengths, batch["attention_mask"].known.padding_side) == ((4, 2), "left")
    both = SimpleNamespace(tokenizer=Tokenizer(), feature_extractor=SimpleNamespace(padding_side="right"))
    assert VarlenCollator(both)(["ab", ""])["attention_mask"].known.padding_side == "left"
    assert VarlenCollator(both)([{"input_values": [0.5]}, {"input_values": [0.5, 1.0]}])["attention_mask"].known.padding_side == "right"
    batch = VarlenCollator(both, packed=True, max_length=3)([{"text": "ab", "label": 1}, {"text": "", "label": 0}])
    assert batch["input_ids"].tolist() == [[1, 97, 2, 1, 2]]
    assert batch["labels"].tolist() == [1, 0]


def test_arguments_go_before_the_processor() -> None:
    batch = VarlenCollator(Tokenizer(), padding_side="right", pad_token_id=0)(["ab", ""])
    assert batch["input_ids"].tolist() == [[1, 97, 98, 2], [1, 2, 0, 0]]


def test_a_tokenizer_without_a_padding_token() -> None:
    tokenizer = Tokenizer()
    tokenizer.pad_token_id = None
    with pytest.raises(
        ArgumentError, match=r"`pad_token_id` must be given .*: pass pad_token_id=tokenizer.eos_token_id .*, or packed=True"
    ):
        VarlenCollator(tokenizer)
    assert VarlenCollator(tokenizer, packed=True)(["a"])["input_ids"].tolist() == [[1, 97, 2]]
    assert VarlenCollator(tokenizer, pad_token_id=5)(["a", ""])["input_ids"].tolist() == [[1, 97, 2], [5, 1, 2]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 7, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5, "c": 6}, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="a")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [None, 4])
def test_padded_against_transformers(tokenizer: Any, side: str, multiple: int | None) -> None:
    transformers = pytest.importorskip("transformers")
    texts = ["a b c", "a", "", "c b"]
    tokenizer.padding_side = side
    try:
        encoded = [dict(tokenizer(text)) | {"labels": i} for i, text in enumerate(texts)]
        theirs = transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)(encoded)
        collate = VarlenCollator(tokenizer, pad_to_multiple_of=multiple)
        for ours in (collate(encoded), collate([{"text": text, "labels": i} for i, text in enumerate(texts)])):
            assert ours["attention_mask"].lengths == (5, 3, 2, 4)
            assert ours["attention_mask"].known.padding_side == side
            for key, expected in theirs.items():
                assert torch.equal(ours[key], expected) or key == "token_type_ids", key
        tagged = [dict(tokenizer(text)) for text in texts]
        tagged = [e | {"labels": [v + 10 for v in e["input_ids"]]} for e in tagged]
        theirs = transformers.DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=multiple)(tagged)
        assert torch.equal(collate(tagged)["labels"], theirs["labels"])
    finally:
        tokenizer.padding_side = "right"


def test_sound_against_transformers() -> None:
    extractor = pytest.importorskip("transformers").Wav2Vec2FeatureExtractor(return_attention_mask=True)
    clips = [np.random.default_rng(i).normal(size=n).astype(np.float32) for i, n in enumerate((7, 3, 5))]
    theirs = extractor(clips, sampling_rate=16000, padding=True, return_tensors="pt")
    examples = [{"input_values": extractor(clip, sampling_rate=16000)["input_values"][0]} for clip in clips]
    ours = VarlenCollator(extractor)(examples)
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    torch.testing.assert_close(ours["input_values"], theirs["input_values"].float())
    assert ours["attention_mask"].lengths == (7, 3, 5)


# -------------------------------------------------------------------- around a collator


@pytest.fixture(params=["right", "left"])
def sided(tokenizer: Any, request: pytest.FixtureRequest) -> Any:
    tokenizer.padding_side, tokenizer.mask_token = request.param, "a"
    yield tokenizer
    tokenizer.padding_side = "right"


def encoded(tokenizer: Any, tagged: bool = True) -> list[dict[str, Any]]:
    examples = [dict(tokenizer(text)) for text in ("a b c", "a", "", "c b")]
    return [e | ({"labels": [v + 10 for v in e["input_ids"]]} if tagged else {}) for e in examples]


PADDING: list[tuple[str, dict[str, Any]]] = [
    ("DataCollatorWithPadding", {"pad_to_multiple_of": 4}),
    ("DataCollatorForTokenClassification", {}),
    ("DataCollatorForSeq2Seq", {}),
    ("DataCollatorForLanguageModeling", {"mlm": False}),
    ("DataCollatorForLanguageModeling", {"mlm": True, "seed": 0}),
]


@pytest.mark.parametrize(("name", "options"), PADDING)
def test_around_one_that_pads(sided: Any, name: str, options: dict[str, Any]) -> None:
    """The same batch, and what the host knows beside it."""
    make = getattr(pytest.importorskip("transformers"), name)
    examples = encoded(sided, tagged=name in ("DataCollatorForTokenClassification", "DataCollatorForSeq2Seq"))
    theirs = make(sided, **options)(examples)
    ours = VarlenCollator(make(sided, **options), with_layout=True)(examples)
    assert type(ours) is dict
    assert ours.keys() == {*theirs.keys(), "layout"}
    for key, expected in theirs.items():
        assert ours[key].dtype == expected.dtype
        assert torch.equal(ours[key], expected)
    mask = ours["attention_mask"]
    assert (mask.lengths, mask.known.padding_side, mask.known.padded_len) == ((5, 3, 2, 4), sided.padding_side, mask.shape[1])
    assert ours["layout"] is mask.seq_layout


def test_packed_around_one_that_pads(sided: Any) -> None:
    transformers = pytest.importorskip("transformers")
    examples = [e | {"weight": 0.5} for e in encoded(sided)]
    theirs = transformers.DataCollatorForTokenClassification(sided, label_pad_token_id=-7)
    ours = VarlenCollator(theirs, packed=True, label_pad=-7, position_ids_start=2, with_layout=True)(examples)
    expected = VarlenCollator(packed=True, label_pad=-7, position_ids_start=2)(examples)
    assert ours.keys() == {*expected.keys(), "layout"}
    for key, value in expected.items():
        assert torch.equal(ours[key], value) if isinstance(value, Tensor) else ours[key] == value
    assert ours["layout"] is ours["cu_seq_lens_q"].seq_layout


@pytest.mark.parametrize("packed", [False, True])
def test_around_one_that_flattens(packed: bool) -> None:
    theirs = pytest.importorskip("transformers").DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    examples = [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}]
    ours, expected = VarlenCollator(theirs, packed=packed, with_layout=True)(examples), theirs(examples)
    assert ours.keys() == {*expected.keys(), "layout"}
    assert ours["input_ids"].tolist() == [[1, 2, 3, 4]]
    offsets = ours["cu_seq_lens_q"]
    assert offsets is ours["cu_seq_lens_k"]
    assert (offsets.lengths, offsets.dtype, offsets.tolist()) == ((3, 1), torch.int32, [0, 3, 4])
    assert ours["layout"] is offsets.seq_layout


def bare(examples: Any) -> Any:
    return examples


def test_around_any_function() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    batch = VarlenCollator(bare)({"anchor_attention_mask": mask, "positive_attention_mask": ~mask, "pixels": mask[None], "name": "x"})
    assert batch["anchor_attention_mask"].lengths == (2, 1)
    assert batch["anchor_attention_mask"].dtype == torch.bool
    assert batch["positive_attention_mask"].lengths == (0, 1)
    assert type(batch["pixels"]) is Tensor
    assert batch["name"] == "x"
    holes = torch.tensor([[1, 0, 1]])
    batch = VarlenCollator(bare, with_layout=True)({"attention_mask": holes})
    assert batch["attention_mask"] is holes
    assert_same(batch["layout"], SeqLayout.from_attention_mask(holes))
    cross = VarlenCollator(bare)({"cu_seq_lens_q": torch.tensor([0, 2]), "cu_seq_lens_k": torch.tensor([0, 3])})
    assert cross["cu_seq_lens_q"].lengths == (2,)
    assert type(cross["cu_seq_lens_k"]) is Tensor


def test_a_batch_on_a_device_stays_as_it_is() -> None:
    batch = {"attention_mask": torch.ones(1, 2, device="meta"), "cu_seq_lens_q": torch.zeros(2, device="meta", dtype=torch.int32)}
    assert VarlenCollator(bare)(batch) == batch


def test_what_trainers_ask_of_their_collator() -> None:
    for collate in (VarlenCollator(), VarlenCollator(bare)):
        assert not hasattr(collate, "tokenizer")
    transformers = pytest.importorskip("transformers")
    wrapped = pickle.loads(pickle.dumps(VarlenCollator(transformers.DataCollatorWithPadding(3))))
    assert wrapped.tokenizer == 3
    assert not hasattr(wrapped, "valid_label_columns")


MASK = torch.tensor([[1, 1], [1, 0]])
IDS = {"input_ids": MASK, "attention_mask": MASK}


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ({"input_ids": MASK}, {}, r"`processor` must make a dict with tensors `attention_mask` .* made \['input_ids'\]: .* return_flash"),
        ({"attention_mask": [[1]]}, {}, "made .*'attention_mask'.*: give it return_tensors='pt'"),
        ((MASK, MASK), {}, "must make a dict .* made "),
        ({"attention_mask": MASK}, {"packed": True}, "`input_ids` and `attention_mask`"),
        ({"a_attention_mask": MASK, "input_ids": MASK}, {"packed": True}, "`input_ids` and `attention_mask`"),
        (IDS | {"labels": MASK[:, :1]}, {"packed": True}, r"'labels'\]` must have 2 values, .* has 1: .* without packed=True"),
        (IDS | {"attention_mask": MASK + 1}, {"packed": True}, r"'attention_mask'\]` must hold 0 and 1, but holds \[2, 2\]"),
    ],
)
def test_refused_batches(batch: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        VarlenCollator(bare, **options)(batch)


@pytest.mark.parametrize(
    "option",
    [{"padding_side": "left"}, {"pad_token_id": 0}, {"pad_to_multiple_of": 8}, {"max_length": 3}, {"aligned_labels": False},
     {"labels_from_input_ids": True}],
)  # fmt: skip
def test_options_of_the_wrapped_collator(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ArgumentError, match=f"`{name}` must be left out where a collator is wrapped, .*: give it to that collator"):
        VarlenCollator(bare, **option)


# -------------------------------------------------------------------- what it refuses

REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "none": ([], {}, r"`examples` must be a list of at least one example, but is \[\]"),
    "a dict of columns": ({"input_ids": [[1]]}, {}, "`examples` must be a list of at least one example, but is"),
    "no dict": ([{"input_ids": [1]}, 3], {}, r"`examples\[1\]` must be a dict or text, but is 3"),
    "keys": (
        [{"input_ids": [1]}, {"input_ids": [1], "x": 1}],
        {},
        r"`examples\[1\]` must have the keys of examples\[0\], \['input_ids'\], but has",
    ),
    "two labels": ([{"input_ids": [1], "label": 1, "labels": 1}], {}, r"`examples\[0\]` must have one column of labels"),
    "no input": ([{"x": 1}], {}, r"`examples` must have one of the columns input_ids, input_values, input_features, but have \['x'\]"),
    "two inputs": ([{"input_ids": [1], "input_values": [1.0]}], {}, "`examples` must have one of the columns"),
    "text": (["a"], {}, "`processor` must be a tokenizer where examples are text, but is None"),
    "no text": ([{"text": None}], {"processor": Tokenizer()}, r"`examples\[0\]\['text'\]` must be a string, but is None"),
    "batched": (
        [{"input_ids": [[1, 2]]}],
        {},
        r"`examples\[0\]\['input_ids'\]` must have 1 dimension, but has shape \(1, 2\): .* no batch dimension",
    ),
    "flat frames": ([{"input_features": [1.0]}], {}, r"`examples\[0\]\['input_features'\]` must have 2 dimensions, but has shape \(1,\)"),
    "features": (
        [{"input_features": [[1.0]]}, {"input_features": [[1.0, 2.0]]}],
        {},
        r"`examples\[1\]` must have 1 features in each frame",
    ),
    "float ids": ([{"input_ids": [0.5]}], {}, r"`examples\[0\]\['input_ids'\]` must hold integers, but holds torch.float32"),
    "integer sound": ([{"input_values": [5, 6]}], {}, r"`examples\[0\]\['input_values'\]` must hold floats, but holds torch.int64"),
    "labels": (
        [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2, 3], "labels": [1, 2]}],
        {},
        r"`examples\[1\]\['labels'\]` must have 3 values, one for each token, but has 2: .* aligned_labels=False",
    ),
    "types": (
        [{"input_ids": [1, 2], "token_type_ids": [1]}],
        {},
        r"`examples\[0\]\['token_type_ids'\]` must have 2 values, .* but has 1: cut and pad",
    ),
    "mask": ([{"input_ids": [1, 2], "attention_mask": [1]}], {}, r"`examples\[0\]\['attention_mask'\]` must have 2 values"),
    "mask values": (
        [{"input_ids": [1], "attention_mask": [2]}],
        {},
        r"`examples\[0\]\['attention_mask'\]` must hold 0 and 1, but holds \[2\]",
    ),
    "ragged": (
        [{"input_ids": [1], "words": [1, 2]}, {"input_ids": [1], "words": [1]}],
        {},
        r"`examples\[1\]\['words'\]` must have the shape that it has in examples\[0\], \(2,\), but has \(1,\): remove the column",
    ),
    "words": (
        [{"input_ids": [1], "words": ["a", "b"]}],
        {},
        r"`examples\[0\]\['words'\]` must be a number, .* but is \['a', 'b'\]: remove the column",
    ),
    "ragged rows": ([{"input_ids": [[1, 2], [3]]}], {}, r"`examples\[0\]\['input_ids'\]` must be a number, or numbers in equal rows"),
    "packed sound": ([{"input_values": [0.5]}], {"packed": True}, "`packed` must be False for input_values, but is True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_examples(name: str) -> None:
    examples, options, message = REFUSED[name]
    with pytest.raises(ArgumentError, match=message):
        VarlenCollator(**options)(examples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding_side": "up"}, "`padding_side` must be 'right' or 'left', but is 'up'"),
        ({"max_length": 0}, "`max_length` must be an integer of at least 1, but is 0"),
        ({"pad_to_multiple_of": 1.5}, "`pad_to_multiple_of` must be an integer of at least 1, but is 1.5"),
        ({"packed": True, "padding_side": "left"}, "`padding_side` must be left out where packed=True, but is 'left'"),
        ({"packed": True, "pad_to_multiple_of": 8}, "`pad_to_multiple_of` must be left out where packed=True, but is 8"),
        ({"packed": True, "aligned_labels": False}, "`aligned_labels` must be left out where packed=True, but is False"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        VarlenCollator(**options)


# -------------------------------------------------------------------- on the way to a model

EXAMPLES = [{"input_ids": list(range(1, n + 1)), "labels": n % 2} for n in (3, 1, 2, 5, 4, 1, 2, 2)]


def batches_of(collate: VarlenCollator, **options: Any) -> list[dict[str, Any]]:
    return list(DataLoader(EXAMPLES, batch_size=4, collate_fn=collate, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("packed", [False, True])
def test_through_workers(packed: bool) -> None:
    """Real processes: batches, lengths and layouts are those made at home."""
    collate = VarlenCollator(packed=packed, with_layout=True)
    for here, there in zip(batches_of(collate), batches_of(collate, num_workers=2, multiprocessing_context="spawn"), strict=True):
        assert here.keys() == there.keys()
        key = "cu_seq_lens_q" if packed else "attention_mask"
        assert there[key].lengths == here[key].lengths
        assert there[key].known.kind == here[key].known.kind
        assert_same(there["layout"], here["layout"])
        assert_same(there[key].seq_layout, here["layout"])
        if packed:
            assert there["cu_seq_lens_k"] is there[key]
        assert all(torch.equal(there[k], v) for k, v in here.items() if isinstance(v, Tensor))


def saved(batch: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(batch, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "way",
    [lambda b: saved(b, True), lambda b: saved(b, False), lambda b: pickle.loads(pickle.dumps(b)), copy.deepcopy],
    ids=["torch.load", "torch.load everything", "pickle", "deepcopy"],
)
def test_a_batch_can_be_saved_and_copied(way: Callable[[Any], Any], packed: bool) -> None:
    here = VarlenCollator(packed=packed, with_layout=True)(EXAMPLES)
    here["layout"].unpack(here["layout"].pack(torch.zeros(here["layout"].batch_size, here["layout"].padded_len)))  # and after use
    there = way(here)
    assert there.keys() == here.keys()
    key = "cu_seq_lens_q" if packed else "attention_mask"
    assert type(there[key]) is HostLengths
    assert (there[key].lengths, there[key].known.kind) == (here[key].lengths, here[key].known.kind)
    assert_same(there["layout"], here["layout"])
    assert not packed or there["cu_seq_lens_k"] is there[key]
    assert all(torch.equal(there[k], v) for k, v in here.items() if isinstance(v, Tensor))
    there[key].add_(1)
    assert there[key].lengths is None
    assert saved(there, True)[key].lengths is None, "what it has forgotten stays so"


def test_packing_a_batch_reads_nothing() -> None:
    """From the loader's batch to packed rows and back: no value of a tensor is asked for. That of a bare mask is."""
    batch = pickle.loads(pickle.dumps(VarlenCollator()(EXAMPLES)))
    x = nn.Embedding(6, 8)(batch["input_ids"])
    with count_reads() as reads:
        layout = batch["attention_mask"].to("cpu", non_blocking=True).bool().seq_layout
        out = layout.unpack(layout.pack(x))
        out.sum().backward()
    assert reads == []
    bare = batch["attention_mask"].as_subclass(Tensor)
    with count_reads() as reads:
        layout = SeqLayout.from_attention_mask(bare)
    assert reads
    assert torch.equal(out, layout.unpack(layout.pack(x)))


def test_accelerate_sends_lengths() -> None:
    send = pytest.importorskip("accelerate.utils").send_to_device
    for packed in (False, True):
        batch = send(VarlenCollator(packed=packed, with_layout=True)(EXAMPLES), torch.device("meta"), non_blocking=True)
        sent = batch["cu_seq_lens_q" if packed else "attention_mask"]
        assert sent.device.type == batch["layout"].device.type == "meta"
        assert sent.lengths == (3, 1, 2, 5, 4, 1, 2, 2)
        if packed:  # one tensor was sent twice, and both ask for one layout
            assert batch["cu_seq_lens_k"].seq_layout is sent.seq_layout


class Model(nn.Module):
    """Counts ids, and keeps what the trainer gave it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 2)
        self.seen: list[Any] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.seen.append(getattr(attention_mask, "lengths", None))
        logits = (self.embedding(input_ids) * attention_mask[..., None]).sum(1)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("workers", [0, 2])
def test_trainer_brings_lengths_to_the_model(tmp_path: Any, workers: int) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, per_device_eval_batch_size=4, dataloader_num_workers=workers,
        use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    model = Model()
    trainer = transformers.Trainer(
        model, arguments, train_dataset=EXAMPLES, eval_dataset=EXAMPLES, data_collator=VarlenCollator(pad_to_multiple_of=2)
    )
    trainer.train()
    assert sorted(n for seen in model.seen for n in seen) == [1, 1, 2, 2, 2, 3, 4, 5]
    model.seen.clear()
    trainer.evaluate()
    assert model.seen == [(3, 1, 2, 5), (4, 1, 2, 2)]


@pytest.mark.gpu
def test_pinned_by_a_loader() -> None:
    for batch in batches_of(VarlenCollator(with_layout=True), num_workers=1, pin_memory=True):
        assert batch["attention_mask"].is_pinned()
        assert batch["attention_mask"].lengths is not None
        assert batch["layout"].token_indices.is_pinned()
        assert batch["attention_mask"].to("cuda", non_blocking=True).seq_layout.device.type == "cuda"
