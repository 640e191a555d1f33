"""`enable(model, heads="labelled")`: a head and its loss computed at labelled tokens only. The same losses and gradients, fewer rows."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from varlen_attn import disable, enable, enabled, record
from varlen_attn.errors import ArgumentError, VarlenError

from .tiny import assert_close, assert_same_gradients, batch, build, error, gradients, seq2seq

# Names that transformers had before 6, and peft still uses; what torch.compile looks at.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

GROUPED: dict[str, Any] = dict(num_key_value_heads=2, head_dim=8)
MASKED: list[tuple[str, dict[str, Any]]] = [
    (name, dict(attention_dropout=0.0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    for name in ("Bert", "Roberta", "ModernBert", "MPNet", "DistilBert", "Electra", "Albert", "DebertaV2")
]
NEXT: list[tuple[str, str, dict[str, Any]]] = [
    ("Llama", "ForCausalLM", {}),
    ("GPT2", "LMHeadModel", dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    ("Qwen3", "ForCausalLM", GROUPED),
    ("OPT", "ForCausalLM", dict(dropout=0.0, ffn_dim=48, word_embed_proj_dim=32)),
    ("Bert", "LMHeadModel", dict(is_decoder=True)),
]
MODELS = [(name, "ForMaskedLM", options) for name, options in MASKED] + NEXT + [("Bert", "ForTokenClassification", dict(num_labels=50))]


def labelled(side: str = "right", share: float = 0.4, padding: bool = False) -> dict[str, Tensor]:
    """A batch with labels at some tokens; with ``padding`` at some columns of padding too."""
    inputs = batch(side)
    chosen = torch.rand(inputs["input_ids"].shape, generator=torch.Generator().manual_seed(1)) < share
    chosen &= inputs["attention_mask"].bool() | padding
    labels = torch.randint(4, 50, chosen.shape, generator=torch.Generator().manual_seed(2))
    return {**inputs, "labels": labels.masked_fill(~chosen, -100)}


def counted(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """``(B, S)``: where the loss compares something."""
    labels = inputs["labels"]
    shifts = "Causal" in type(model).__name__ or "LMHead" in type(model).__name__
    return (nn.functional.pad(labels, (0, 1), value=-100)[:, 1:] if shifts else labels) != -100


def assert_learns_alike(model: nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
    """What the model gives once it is enabled, after its loss, gradients and logits were compared with those that it gave before."""
    want = model(**inputs)
    expected = gradients(model, want.loss)
    with enabled(model, heads="labelled", **options):
        got = model(**inputs)
        found = gradients(model, got.loss)
    # Losses of causal models are computed in float32.
    assert_close(got.loss, want.loss, 1e-12 if want.loss.dtype == torch.float64 else 1e-6, "the loss")
    assert_same_gradients(found, expected, 1e-12)
    assert_close(got.logits, want.logits[counted(model, inputs)], 1e-12, "logits")
    return got


# -------------------------------------------------------------------- equal


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "head", "options"), MODELS, ids=lambda x: x if isinstance(x, str) else "")
def test_the_same_loss_and_gradients(name: str, head: str, options: dict[str, Any], training: bool) -> None:
    model = build(name, head, **options).train(training)
    assert_learns_alike(model, labelled())


@pytest.mark.parametrize("level", ["attention", "model"])
@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("padding", [False, True])
def test_every_padding(level: str, side: str, padding: bool) -> None:
    for name, head in (("Bert", "ForMaskedLM"), ("Llama", "ForCausalLM")):
        assert_learns_alike(build(name, head), labelled(side, padding=padding), level=level)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", ["T5", "Bart", "Marian"])
def test_encoder_decoder(name: str, given: bool) -> None:
    """The decoder's inputs are made of all labels, if they are not given."""
    model = build(name, "MTModel" if name == "Marian" else "ForConditionalGeneration")
    inputs = seq2seq()
    inputs["labels"] = inputs["decoder_input_ids"].masked_fill(inputs["decoder_attention_mask"] == 0, -100)
    if not given:
        del inputs["decoder_input_ids"]
    got = assert_learns_alike(model, inputs)
    assert len(got.logits) == int(inputs["decoder_attention_mask"].sum())


@pytest.mark.parametrize("given", ["num_items_in_batch", "shift_labels", "both"])
def test_what_trainers_pass(given: str) -> None:
    model, inputs = build("Llama", "ForCausalLM"), labelled()
    more: dict[str, Any] = {} if given == "shift_labels" else {"num_items_in_batch": torch.tensor(17)}
    if given != "num_items_in_batch":
        more["shift_labels"] = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    assert_learns_alike(model, {**inputs, **more})


def test_tuples_and_positions() -> None:
    model, inputs = build("MPNet", "ForMaskedLM"), labelled()
    want = model(**inputs, return_dict=False, output_hidden_states=True)
    with enabled(model, heads="labelled"):
        got = model(inputs["input_ids"], inputs["attention_mask"], None, None, inputs["labels"], None, True, False)
    assert_close(got[0], want[0], 1e-12)
    assert_close(got[1], want[1][counted(model, inputs)], 1e-12)
    assert [x.shape for x in got[2]] == [x.shape for x in want[2]]


@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize(("name", "head"), [("ModernBert", "ForMaskedLM"), ("Llama", "ForCausalLM")])
def test_no_label(name: str, head: str, items: int | None) -> None:
    """The mean of nothing is NaN, as before, and the gradients are what they were."""
    model, inputs = build(name, head), labelled(share=0.0)
    more = {} if items is None else {"num_items_in_batch": items}
    want = model(**inputs, **more)
    expected = gradients(model, want.loss)
    enable(model, heads="labelled")
    got = model(**inputs, **more)
    assert error(got.loss, want.loss) == 0
    assert got.logits.shape == (0, 50)
    found = gradients(model, got.loss)
    assert set(found) == set(expected)
    assert all(error(found[name], expected[name]) == 0 for name in expected)


def test_a_whole_vocabulary() -> None:
    """It is tried with a few words, and each head has a size of its own that it views logits by."""
    for name, head in (("Bert", "ForMaskedLM"), ("Gemma2", "ForCausalLM"), ("GPT2", "LMHeadModel"), ("Bart", "ForConditionalGeneration")):
        model = build(name, head, vocab_size=3000, dtype=torch.float32)
        enable(model, heads="labelled")
        assert model(**labelled()).logits.shape[1:] == (3000,)


def test_adapters() -> None:
    model = peft.get_peft_model(
        build("Llama", "ForCausalLM"), peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    inputs = labelled()
    want = model(**inputs)
    expected = gradients(model, want.loss)
    enable(model, heads="labelled")
    got = model(**inputs)
    assert_close(got.loss, want.loss, 1e-6)
    assert_same_gradients(gradients(model, got.loss), expected, 1e-12)
    assert got.logits.dim() == 2


# -------------------------------------------------------------------- fewer rows, and only where it was asked for


def test_the_head_computes_labelled_rows() -> None:
    model, inputs = build("Bert", "ForMaskedLM"), labelled()
    seen: list[int] = []
    model.cls.predictions.transform.register_forward_hook(lambda _, args, result: seen.append(result.shape[:-1].numel()))
    enable(model, heads="labelled")
    with record(model) as log:
        model(**inputs)
    assert seen == [int((inputs["labels"] != -100).sum()) + 1]
    assert log.calls[0].rows == int(inputs["attention_mask"].sum())  # and its layers run packed


@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_calls_without_labels_are_what_they_were(name: str) -> None:
    model = build(name, "ForMaskedLM" if name == "Bert" else "ForCausalLM")
    inputs = labelled()
    labels = inputs.pop("labels")
    valid = inputs["attention_mask"].bool()
    want = model(**inputs).logits
    enable(model, heads="labelled")
    assert_close(model(**inputs).logits[valid], want[valid], 1e-12)
    if name == "Llama":
        assert model.generate(**batch("left"), max_new_tokens=3, do_sample=False).shape == (4, 12)
        kept = torch.arange(9)
        assert model(**inputs, labels=labels, logits_to_keep=kept).logits.shape == want.shape
    assert model.base_model(**inputs)[0].shape == (4, 9, 32)


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_a_loss_of_routers_before_logits(how: str, return_dict: bool) -> None:
    experts = dict(num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=2)
    model, inputs = build("Mixtral", "ForCausalLM", dtype=torch.float32, **experts), labelled()
    asked: dict[str, Any] = {"output_router_logits": True} if how == "argument" else {}
    model.config.output_router_logits = not asked
    want = model(**inputs, **asked, return_dict=return_dict)
    enable(model, heads="labelled")
    got = model(**inputs, **asked, return_dict=return_dict)
    assert len(got) == len(want)
    for i in (0, 1):
        assert_close(got[i], want[i], 1e-6)
    assert_close(got[2], want[2][counted(model, inputs)], 1e-5)


@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_another_ignored_label(name: str) -> None:
    """Some losses know it, others always ignore -100."""
    model, inputs = build(name, "ForMaskedLM" if name == "Bert" else "ForCausalLM"), labelled()
    inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, 7)
    want = model(**inputs, ignore_index=7)
    enable(model, heads="labelled")
    got = model(**inputs, ignore_index=7)
    assert_close(got.loss, want.loss, 1e-6)
    assert got.logits.shape == want.logits.shape


@pytest.mark.parametrize("how", ["checkpointed", "compiled", "another"])
@pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning", "ignore:.*should not be instantiated:DeprecationWarning")
def test_a_model_inside_that_was_replaced(how: str) -> None:
    """All rows are computed. Labels of all tokens but one are as many as there are rows."""
    model, inputs = build("Bert", "ForMaskedLM"), batch()
    inputs["attention_mask"] = torch.ones(4, 9, dtype=torch.long)
    inputs["labels"] = torch.randint(4, 50, (4, 9), generator=torch.Generator().manual_seed(2))
    inputs["labels"][0, 0] = -100
    want = model(**inputs)
    expected = gradients(model, want.loss)
    enable(model, heads="labelled")
    new = {"checkpointed": checkpoint_wrapper, "compiled": lambda m: torch.compile(m, backend="eager"), "another": copy.deepcopy}[how]
    model.bert = new(model.bert)
    if how == "another":
        disable(model.bert)
        model.tie_weights()
    got = model(**inputs)
    assert_close(got.loss, want.loss, 1e-12)
    found = gradients(model, got.loss)
    assert_same_gradients(dict(zip(expected, found.values(), strict=True)), expected, 1e-12)
    assert got.logits.shape == want.logits.shape


@pytest.mark.parametrize("heads", ["all", "labelled"])
@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_a_model_inside_of_another_that_was_enabled(name: str, heads: Any) -> None:
    """Labels at padding of the model around it are seen."""
    model, inputs = build(name, "ForMaskedLM" if name == "Bert" else "ForCausalLM"), labelled(padding=True)
    want = model(**inputs)
    enable(model, heads=heads)
    setattr(model, model.base_model_prefix, copy.deepcopy(model.base_model))
    assert_close(model(**inputs).loss, want.loss, 1e-6)


@pytest.mark.filterwarnings("ignore:.*jit.trace.*:DeprecationWarning", "ignore:Converting a tensor", "ignore:.*:torch.jit.TracerWarning")
def test_traced() -> None:
    """A graph computes all rows, for labels of other numbers."""
    model, inputs = build("Bert", "ForMaskedLM").requires_grad_(False), labelled()
    other = inputs["labels"].roll(1, 1)
    want = [model(**inputs).loss, model(**inputs | {"labels": other}).loss]
    enable(model, heads="labelled")
    traced = torch.jit.trace(lambda labels: model(inputs["input_ids"], inputs["attention_mask"], labels=labels).loss, inputs["labels"])
    assert_close(torch.stack([traced(inputs["labels"]), traced(other)]), torch.stack(want), 1e-12)


def test_a_call_that_is_broken_off_leaves_nothing() -> None:
    model, inputs = build("Bert", "ForMaskedLM"), labelled()
    enable(model, heads="labelled")
    with pytest.raises(IndexError):
        model(**inputs | {"labels": inputs["labels"].masked_fill(inputs["labels"] != -100, 1000)})
    assert model.bert(**batch())[0].shape == (4, 9, 32)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_do_the_same_until_they_are_disabled(how: Any) -> None:
    model, inputs = build("Bert", "ForMaskedLM"), labelled()
    enable(model, heads="labelled")
    other = how(model)
    assert other(**inputs).logits.dim() == 2
    disable(other)
    assert other(**inputs).logits.dim() == 3
    assert model(**inputs).logits.dim() == 2
    enable(model)  # the state depends on the last call alone
    assert model(**inputs).logits.dim() == 3
    enable(model, heads="labelled")
    disable(model)
    assert type(model) is transformers.BertForMaskedLM
    assert "_varlen_attn_watch" not in vars(model)


def test_a_model_that_is_left_alone_otherwise() -> None:
    model, inputs = build("MPNet", "ForMaskedLM"), labelled()
    report = enable(model, level="attention", heads="labelled")
    assert [m.module for m in report.converted] == [""]
    assert model(**inputs).logits.dim() == 2
    assert [m.module for m in disable(model).modules] == [""]
    assert type(model) is transformers.MPNetForMaskedLM


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled() -> None:
    model, inputs = build("Llama", "ForCausalLM", num_hidden_layers=1), labelled()
    want = model(**inputs).loss
    enable(model, heads="labelled")
    got = torch.compile(model, backend="eager")(**inputs)
    assert_close(got.loss, want, 1e-6)
    assert got.logits.dim() == 2


# -------------------------------------------------------------------- in a Trainer


class Texts(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self) -> None:
        self.inputs = [labelled(padding=False), labelled("right", 0.7)]

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: x[i % 3] for name, x in self.inputs[i // 3].items()}


def trainer(model: Any, path: Path, **options: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        str(path), per_device_train_batch_size=2, per_device_eval_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2, num_train_epochs=2, save_strategy="no", **{k: x for k, x in options.items() if k != "compute_metrics"},
    )  # fmt: skip
    metrics = options.get("compute_metrics")
    return transformers.Trainer(model, arguments, train_dataset=Texts(), eval_dataset=Texts(), compute_metrics=metrics)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}, {"label_smoothing_factor": 0.1}], ids=str)
@pytest.mark.parametrize(("name", "head"), [("Bert", "ForMaskedLM"), ("Llama", "ForCausalLM")])
def test_training(name: str, head: str, options: dict[str, Any], tmp_path: Path) -> None:
    """With label smoothing the trainer computes the loss itself, from all logits: the model gets no labels."""
    models = [build(name, head) for _ in range(2)]
    enable(models[1], heads="labelled")
    ended = [trainer(model, tmp_path, **options).train().training_loss for model in models]
    assert ended[1] == pytest.approx(ended[0], rel=1e-6)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert error(b.detach(), a.detach()) < 1e-6


def test_evaluation(tmp_path: Path) -> None:
    """Metrics get all logits, whose samples a trainer counts; without metrics the loss alone is computed."""
    model = build("Bert", "ForMaskedLM")

    def right(found: Any) -> dict[str, float]:
        assert found.predictions.shape[:2] == found.label_ids.shape == (6, 9)
        return {"right": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    rows: list[int] = []
    model.cls.register_forward_hook(lambda _, args, result: rows.append(result.shape[:2].numel()))
    found = []
    for heads in ("all", "labelled"):
        enable(model, heads=heads)
        found += [trainer(model, tmp_path, compute_metrics=metrics).evaluate() for metrics in (right, None)]
    assert [x["eval_loss"] for x in found] == pytest.approx([found[0]["eval_loss"]] * 4, rel=1e-6)
    assert found[2]["eval_right"] == found[0]["eval_right"]
    labels = [Texts()[i]["labels"] for i in range(6)]
    labels_in = [int((torch.stack(x) != -100).sum()) + 1 for x in (labels[:4], labels[4:])]
    assert rows == [36, 18] * 3 + labels_in


# -------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "head", "why"),
    [
        ("Bert", "Model", "gives no logits"),
        ("Bert", "ForSequenceClassification", "batch_size"),
        ("Electra", "ForPreTraining", "reads other rows"),
        ("Bert", "ForQuestionAnswering", "gives no logits"),
    ],
)
def test_heads_that_are_not_known(name: str, head: str, why: str) -> None:
    model = build(name, head)
    with pytest.raises(ArgumentError, match=rf"`heads` must be 'all' for this model.*{name}{head}: .*{why}"):
        enable(model, heads="labelled")
    assert type(model) is getattr(transformers, name + head)  # nothing was changed


def test_a_head_that_looks_around() -> None:
    """Of an object that reads the rows beside labelled ones."""
    model = build("Bert", "ForMaskedLM")

    class Around(type(model.cls)):  # type: ignore[misc]
        def forward(self, sequence_output: Tensor) -> Any:
            return super().forward(sequence_output + sequence_output.roll(1, 1))

    model.cls.__class__ = Around
    with pytest.raises(ArgumentError, match="its loss reads other rows than those of labelled tokens"):
        enable(model, heads="labelled")


def test_wrong_arguments() -> None:
    with pytest.raises(ArgumentError, match="`heads` must be 'all' or 'labelled', but is 'masked'"):
        enable(build("Bert", "ForMaskedLM"), heads="masked")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"needs a model of transformers whose loss .*: there is none in it"):
        enable(nn.TransformerEncoderLayer(16, 2), heads="labelled")


def test_labels_of_another_shape() -> None:
    model, inputs = build("Bert", "ForMaskedLM"), labelled()
    enable(model, heads="labelled")
    with pytest.raises(VarlenError, match=r"`labels` must have a number for each token, \(4, 9\)"):
        model(**inputs | {"labels": inputs["labels"][:, :7]})
