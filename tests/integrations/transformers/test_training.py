"""Training enabled models of transformers: the same losses, the same gradients, with whatever else takes part in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from varlen_attn import VarlenCollator, enable, record
from varlen_attn.convert.enabling import disable, enabled
from varlen_attn.integrations.transformers.stack import is_ours

from .tiny import (
    COLUMNS,
    assert_close,
    assert_same_gradients,
    attention_mask,
    batch,
    build,
    error,
    gradients,
    quietly,
    reasons,
    seeded,
    seq2seq,
    shake,
    token_ids,
)

LEVELS: tuple[Any, ...] = ("attention", "model")

# Names that transformers had before 6, and peft still uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def inputs_of(name: str, side: str) -> tuple[dict[str, Tensor], Tensor]:
    """A batch, and which rows of the result count."""
    if name in ("T5", "Bart"):
        inputs = seq2seq(side)
        return inputs, inputs["decoder_attention_mask"].bool()
    inputs = batch(side)
    return inputs, inputs["attention_mask"].bool()


def loss_of(model: nn.Module, inputs: dict[str, Any], valid: Tensor) -> Tensor:
    """Of real tokens, each with a weight of its own, and of the pooled vector where there is one and the first column is real."""
    out = model(**inputs)
    hidden = out[0][valid]
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    loss: Tensor = (hidden * weights).sum() + hidden.sin().sum()
    if getattr(out, "pooler_output", None) is not None and bool(valid[:, 0].all()):
        loss = loss + out.pooler_output.square().sum()
    return loss


def trained(model: nn.Module, inputs: dict[str, Any], valid: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss and its gradients, by `backward`, as training does it."""
    model.zero_grad()
    loss = loss_of(model, inputs, valid)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_trains_alike(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], tolerance: float = 1e-9) -> None:
    assert_close(got[0], want[0], tolerance * max(1.0, abs(float(want[0]))), "the loss")
    assert_same_gradients(got[1], want[1], tolerance)


# -------------------------------------------------------------------- gradients


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("name", ["Bert", "Llama", "Mistral", "ModernBert", "T5", "Bart"])
def test_gradients(name: str, side: str, level: Any) -> None:
    """Of every parameter, in float64."""
    model = build(name).train()
    inputs, valid = inputs_of(name, side)
    expected = trained(model, inputs, valid)
    enable(model, level=level)
    assert_trains_alike(trained(model, inputs, valid), expected)
    disable(model)
    assert_trains_alike(trained(model, inputs, valid), expected, 0)


@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_the_comparison_sees_a_wrong_mask(name: str) -> None:
    """What these tests compare is far from equal where padding is attended to, or a direction is wrong."""
    model = build(name).train()
    inputs, valid = inputs_of(name, "left")
    expected = trained(model, inputs, valid)
    blind = trained(model, {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}, valid)
    with pytest.raises(AssertionError, match="the loss differs"):
        assert_trains_alike(blind, expected)
    with pytest.raises(AssertionError, match="differs by"):
        assert_same_gradients(blind[1], expected[1], 1e-2)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_gradients_of_the_inputs(name: str, level: Any) -> None:
    """Exactly 0 at padding, which no real token sees."""
    model = build(name).train()
    inputs, valid = inputs_of(name, "right")
    embed = model.get_input_embeddings()
    found = []
    for enabling in (False, True):
        if enabling:
            enable(model, level=level)
        x = embed(inputs["input_ids"]).detach().requires_grad_()
        loss = loss_of(model, {"inputs_embeds": x, "attention_mask": inputs["attention_mask"]}, valid)
        found.append(torch.autograd.grad(loss, x)[0])
    assert_close(found[1], found[0])
    assert bool((found[1][~valid] == 0).all())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["Bert", "Llama", "ModernBert"])
def test_a_row_without_tokens_makes_no_nan(name: str, level: Any) -> None:
    model = build(name).train()
    mask = attention_mask(lengths=(9, 0, 5, 2))
    inputs, valid = {"input_ids": token_ids(mask), "attention_mask": mask}, mask.bool()
    expected = trained(model, inputs, valid)
    enable(model, level=level)
    got = trained(model, inputs, valid)
    assert all(bool(g.isfinite().all()) for g in got[1].values())
    assert_trains_alike(got, expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_gradients_through_hidden_states(name: str, level: Any) -> None:
    """A loss on what a layer in the middle gives."""
    model = build(name).train()
    inputs, valid = inputs_of(name, "right")

    def loss() -> Tensor:
        middle = model(**inputs, output_hidden_states=True).hidden_states[1][valid]
        return middle.sin().sum() + middle.square().sum()

    wanted = gradients(model, loss())
    enable(model, level=level)
    assert_same_gradients(gradients(model, loss()), wanted)


# -------------------------------------------------------------------- losses of heads


CLASSES = torch.tensor([0, 2, 1, 2])
HEADS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "BertForSequenceClassification": lambda: (build("Bert", "ForSequenceClassification", num_labels=3), {"labels": CLASSES}),
    "BertForTokenClassification": lambda: (build("Bert", "ForTokenClassification", num_labels=3), {"labels": labels(3)}),
    "BertForMaskedLM": lambda: (build("Bert", "ForMaskedLM"), {"labels": labels(50)}),
    "LlamaForCausalLM": lambda: (build("Llama", "ForCausalLM"), {"labels": labels(50)}),
    "LlamaForSequenceClassification": lambda: (build("Llama", "ForSequenceClassification", num_labels=3), {"labels": CLASSES}),
    "MistralForCausalLM": lambda: (build("Mistral", "ForCausalLM"), {"labels": labels(50)}),
    "ModernBertForMaskedLM": lambda: (build("ModernBert", "ForMaskedLM"), {"labels": labels(50)}),
}  # fmt: skip


def labels(classes: int, side: str = "right") -> Tensor:
    mask = attention_mask(side)
    drawn = torch.randint(0, classes, mask.shape, generator=torch.Generator().manual_seed(4))
    return drawn.masked_fill(mask == 0, -100).masked_fill(drawn % 5 == 0, -100)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", HEADS)
def test_losses_with_labels(name: str, level: Any) -> None:
    """Labels of -100 do not count, and neither does padding; losses, logits and gradients are the same."""
    model, more = HEADS[name]()
    model.train()
    expected = model(**batch(), **more)
    wanted = gradients(model, expected.loss)
    enable(model, level=level)
    got = model(**batch(), **more)
    assert_close(got.loss, expected.loss)
    assert_same_gradients(gradients(model, got.loss), wanted)
    where = attention_mask().bool() if got.logits.shape[:2] == (4, COLUMNS) else slice(None)
    assert_close(got.logits[where], expected.logits[where])


@pytest.mark.parametrize("level", LEVELS)
def test_losses_of_an_encoder_and_its_decoder(level: Any) -> None:
    model = build("T5", "ForConditionalGeneration").train()
    inputs = batch("left", labels=labels(50)[:, :6].contiguous())
    expected = model(**inputs)
    wanted = gradients(model, expected.loss)
    enable(model, level=level)
    got = model(**inputs)
    assert_close(got.loss, expected.loss)
    assert_same_gradients(gradients(model, got.loss), wanted)


@pytest.mark.parametrize("level", LEVELS)
def test_documents_in_one_row(level: Any) -> None:
    """A packed batch with its offsets trains like the padded one, document by document."""
    model = build("Llama", "ForCausalLM").train()
    mask = attention_mask()
    padded = {"input_ids": token_ids(mask), "attention_mask": mask, "labels": token_ids(mask).masked_fill(mask == 0, -100)}
    expected = model(**padded)
    wanted = gradients(model, expected.loss)
    examples = [{"input_ids": row[row_mask.bool()]} for row, row_mask in zip(padded["input_ids"], mask, strict=True)]
    packed = VarlenCollator(packed=True, labels_from_input_ids=True)(examples)
    enable(model, level=level)
    with record(model) as log:
        got = model(**packed, use_cache=False)
    assert [call.rows for call in log.calls] == [20, 20]
    assert_close(got.loss, expected.loss)
    assert_same_gradients(gradients(model, got.loss), wanted)


# -------------------------------------------------------------------- recomputation


CHECKPOINTED = {"Bert": {}, "Llama": {}, "ModernBert": {}, "T5": {}, "Bart": {}}


@pytest.mark.parametrize("first", ["enabled first", "checkpointing first"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing(name: str, reentrant: bool, first: str) -> None:
    """Layers that are run twice see the same rows twice."""
    model = build(name).train()
    inputs, valid = inputs_of(name, "right")
    inputs = {**inputs, "use_cache": False} if name in ("Llama", "T5", "Bart") else inputs
    expected = trained(model, inputs, valid)
    if first == "enabled first":
        enable(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if first != "enabled first":
        enable(model)
    with record(model) as log:
        got = trained(model, inputs, valid)
    layers = {call.module for call in log.calls}
    assert all(sum(call.module == layer for call in log.calls) == 2 for layer in layers)
    assert_trains_alike(got, expected)
    model.gradient_checkpointing_disable()
    assert_trains_alike(trained(model, inputs, valid), expected)


DROPPING: dict[str, dict[str, Any]] = {
    "Bert": dict(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3),
    "Llama": dict(attention_dropout=0.3),
    "ModernBert": dict(attention_dropout=0.3, mlp_dropout=0.2, embedding_dropout=0.1),
    "T5": dict(dropout_rate=0.2),
    "Bart": dict(dropout=0.2, attention_dropout=0.2, activation_dropout=0.1),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", DROPPING)
def test_dropout_in_training(name: str, level: Any) -> None:
    """Random in training, the same for the same seed, recomputed the same; absent in evaluation."""
    model = build(name, **DROPPING[name])
    inputs, valid = inputs_of(name, "right")
    inputs = {**inputs, "use_cache": False} if name in ("Llama", "T5", "Bart") else inputs
    still = trained(model, inputs, valid)
    enable(model, level=level)
    assert_trains_alike(trained(model, inputs, valid), still)
    model.train()
    losses = []
    for seed in (0, 0, 1):
        with seeded(seed):
            losses.append(trained(model, inputs, valid))
    assert torch.equal(losses[0][0], losses[1][0])
    assert all(torch.equal(losses[0][1][key], losses[1][1][key]) for key in losses[0][1])
    assert error(losses[2][0], losses[0][0]) > 1e-3
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        with seeded(0):
            again = trained(model, inputs, valid)
        assert_trains_alike(again, losses[0], 1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_dropout_of_attention_has_the_right_mean(level: Any) -> None:
    """Neither twice nor never. One layer, so that its output is linear in its weights: averages over many draws come near to no dropout."""
    model = build("Llama", num_hidden_layers=1, attention_dropout=0.3)
    attention = model.layers[0].self_attn
    found: list[Tensor] = []
    inputs, valid = inputs_of("Llama", "right")
    enable(model, level=level, hooks="packed")
    attention.o_proj.register_forward_pre_hook(lambda m, args: found.append(args[0].detach().reshape(-1, 32)))
    model.eval()
    model(**inputs)
    still = found.pop()
    model.train()
    with seeded(0), torch.no_grad():
        for _ in range(300):
            model(**inputs)
    draws = torch.stack(found)
    deviation = draws.std(0) / len(draws) ** 0.5
    assert error(draws[0], still) > 0.1
    rows = slice(None) if len(still) == int(valid.sum()) else valid.flatten()
    sigmas = ((draws.mean(0) - still) / deviation.clamp(min=1e-12))[rows]
    assert float(sigmas.abs().max()) < 5.5
    assert float(sigmas.square().mean()) < 1.5


# -------------------------------------------------------------------- Trainer


class Data(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows of many lengths."""

    def __init__(self, classify: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, COLUMNS + 1, (16,), generator=generator).tolist()
        self.rows = [torch.randint(4, 50, (n,), generator=generator).tolist() for n in lengths]
        self.classify = classify

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.rows[i], "labels": i % 3 if self.classify else self.rows[i]}


def padded(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What a collator that pads does."""
    ids = [torch.tensor(e["input_ids"]) for e in examples]
    made = {
        "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=1),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
    }
    if isinstance(examples[0]["labels"], int):
        return {**made, "labels": torch.tensor([e["labels"] for e in examples])}
    return {**made, "labels": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)}


def losses(model: Any, data: Data, collate: Any, folder: Path, **options: Any) -> list[float]:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=5, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        logging_steps=1, disable_tqdm=True, save_strategy="no", seed=3, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
    with seeded():
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("collate", ["padded", "VarlenCollator", "packed", "padded, recomputed"])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "LlamaForCausalLM"])
def test_trainer(name: str, collate: str, tmp_path: Path) -> None:
    """Steps of `Trainer`, optimizer and schedule included, have the losses that they had."""
    if collate == "packed" and name.startswith("Bert"):
        pytest.skip("a class belongs to a row")
    head = name.removeprefix("Bert").removeprefix("Llama")
    models = [build(name.removesuffix(head), head, dtype=torch.float32, num_labels=3) for _ in range(2)]
    data = Data(classify="Classification" in name)
    expected = losses(models[0], data, padded, tmp_path)
    enable(models[1])
    options: dict[str, Any] = {"gradient_checkpointing": True} if "recomputed" in collate else {}
    collators: dict[str, Any] = {
        "VarlenCollator": VarlenCollator(pad_token_id=1), "packed": VarlenCollator(packed=True)
    }  # fmt: skip
    got = losses(models[1], data, collators.get(collate, padded), tmp_path, **options)
    assert len(got) == len(expected) == 5
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) < 1e-5
    assert len(set(expected)) == 5
    assert any(is_ours(hook) for m in models[1].modules() for hook in m._forward_pre_hooks.values())


# -------------------------------------------------------------------- adapters


def lora(model: Any) -> Any:
    """With weights that are not 0, as they are at first."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value", "q_proj", "v_proj", "dense", "down_proj"])
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.normal_(0, 0.2, generator=generator)
    return adapted.double()


@pytest.mark.parametrize("order", ["adapters first", "enabled first"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_adapters(name: str, level: Any, order: str) -> None:
    """LoRA: the gradients of its weights, and of nothing else."""
    inputs, valid = inputs_of(name, "right")
    expected = trained(lora(build(name)), inputs, valid)
    plain = build(name)
    if order == "enabled first":
        enable(plain, level=level)
        model = lora(plain)
    else:
        model = lora(plain)
        report = enable(model, level=level)
        assert all(m.module.startswith("base_model.model.") for m in report.converted)
    with record(model) as log:
        got = trained(model, inputs, valid)
    assert [call.rows == 20 for call in log.calls] == [level == "model"] * 2
    assert_trains_alike(got, expected)
    assert all("lora" in key for key in got[1])
    disable(model)
    assert not any(is_ours(hook) for m in model.modules() for hook in m._forward_hooks.values())
    assert_trains_alike(trained(model, inputs, valid), expected, 0)


PROMPTS: dict[str, Callable[[str], Any]] = {
    "prefix tuning": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
    "prompt tuning": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("how", PROMPTS)
@pytest.mark.parametrize("name", ["Llama", "Bert"])
def test_virtual_tokens(name: str, how: str, side: str) -> None:
    """Keys before the first column: as a cache that an encoder has too, or as embeddings in front."""
    head, task = ("ForCausalLM", "CAUSAL_LM") if name == "Llama" else ("ForTokenClassification", "TOKEN_CLS")
    torch.manual_seed(0)
    base = build(name, head)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, PROMPTS[how](task)).double()
    shake(model.prompt_encoder, 5)
    inputs = batch(side)
    valid = inputs["attention_mask"].bool()
    learned = [p for p in model.prompt_encoder.parameters() if p.requires_grad]

    def results() -> list[Tensor]:
        logits = model(**inputs).logits[:, -COLUMNS:][valid]
        return [logits, *torch.autograd.grad(logits.sin().sum(), learned)]

    for training in (False, True):
        model.train(training)
        expected = results()
        for level in LEVELS:
            with enabled(model, level=level):
                for got, want in zip(results(), expected, strict=True):
                    assert_close(got, want, 1e-9)


# -------------------------------------------------------------------- precision and placement


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["Bert", "Llama", "ModernBert"])
def test_autocast(name: str, level: Any) -> None:
    """As near to float32 as `sdpa` is, forward and backward."""
    inputs, valid = inputs_of(name, "right")
    model = build(name, dtype=torch.float32).train()
    exact = trained(model, inputs, valid)
    reference = model(**inputs)[0][valid]
    results = {}
    for implementation in ("sdpa", "ours"):
        if implementation == "ours":
            enable(model, level=level)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model(**inputs)[0][valid]
            found = trained(model, inputs, valid)
        mean = sum(float((found[1][key] - exact[1][key]).norm() / (1 + exact[1][key].norm())) for key in exact[1])
        results[implementation] = (error(hidden, reference), mean)
    assert 0 < results["ours"][0] <= 2 * results["sdpa"][0]
    assert 0 < results["ours"][1] <= 2 * results["sdpa"][1]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_autocast_leaves_float64(name: str, level: Any) -> None:
    inputs, valid = inputs_of(name, "right")
    model = build(name, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(**inputs)[0][valid]
        enable(model, level=level)
        got = model(**inputs)[0][valid]
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["Bert", "Llama", "T5"])
def test_fake_tensors_have_shapes(name: str, level: Any) -> None:
    inputs, _ = inputs_of(name, "right")
    model = build(name, dtype=torch.float32)
    want = model(**inputs)[0]
    enable(model, level=level)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        got = model(**{key: mode.from_tensor(x) for key, x in inputs.items()})[0]
    assert (got.shape, got.dtype) == (want.shape, want.dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_half_precision(name: str, level: Any) -> None:
    """A model in bfloat16, against itself in float32."""
    inputs, valid = inputs_of(name, "right")
    model = build(name, dtype=torch.bfloat16)
    with torch.no_grad():
        theirs = model(**inputs)[0][valid]
        enable(model, level=level)
        ours = model(**inputs)[0][valid]
        disable(model)
        exact = model.float()(**inputs)[0][valid]
    assert ours.dtype == torch.bfloat16
    assert 0 < error(ours, exact) <= 2 * error(theirs, exact)


@pytest.mark.parametrize("order", ["enabled first", "offloaded first"])
@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_offloaded_weights(name: str, order: str) -> None:
    """accelerate brings weights when a module is called. Without them there is no trial, and no stack that is packed."""
    inputs, valid = inputs_of(name, "right")
    model = build(name)
    with torch.no_grad():
        expected = model(**inputs)[0][valid]
        if order == "enabled first":
            enable(model)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        if order != "enabled first":
            report = enable(model)
            assert set(reasons(report).values()) == {"not packed as a whole: it could not be tried: its weights are not here"}
        with record(model) as log:
            assert_close(model(**inputs)[0][valid], expected)
        assert [call.rows == 20 for call in log.calls] == [order == "enabled first"] * 2
        disable(model)
        assert_close(model(**inputs)[0][valid], expected)


def test_prepared_by_accelerate() -> None:
    inputs, valid = inputs_of("Bert", "right")
    model = build("Bert").train()
    expected = trained(model, inputs, valid)
    enable(model)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = torch.utils.data.DataLoader(
        [{"input_ids": i, "attention_mask": m} for i, m in zip(*batch().values(), strict=True)], batch_size=4
    )
    prepared, _, batches = accelerator.prepare(model, optimizer, loader)
    (given,) = list(batches)
    assert torch.equal(given["input_ids"], inputs["input_ids"])
    prepared.zero_grad()
    loss = loss_of(prepared, given, valid)
    accelerator.backward(loss)
    unwrapped = accelerator.unwrap_model(prepared)
    found = {key: p.grad for key, p in unwrapped.named_parameters() if p.grad is not None}
    assert_trains_alike((loss.detach(), found), expected)


def test_frozen_weights() -> None:
    """Gradients of the head alone: no layer of the stack needs any."""
    model = build("Bert", "ForTokenClassification", num_labels=3).train()
    model.bert.requires_grad_(False)
    more = {"labels": labels(3)}
    wanted = gradients(model, model(**batch(), **more).loss)
    enable(model)
    assert_same_gradients(gradients(model, model(**batch(), **more).loss), wanted)
    assert set(wanted) == {"classifier.weight", "classifier.bias"}


def test_a_step_changes_what_the_next_one_sees() -> None:
    """Nothing of a forward is kept for the next."""
    inputs, valid = inputs_of("Llama", "right")
    models = [build("Llama").train() for _ in range(2)]
    enable(models[1])
    for step in range(3):
        ids = token_ids(attention_mask("right", (4 + step, 9, 2, 7)), step)
        mask = (ids != 1).long()
        for model in models:
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
            optimizer.zero_grad()
            loss_of(model, {"input_ids": ids, "attention_mask": mask}, mask.bool()).backward()
            optimizer.step()
    for (name, a), (_, b) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert_close(b.detach(), a.detach(), 1e-8, name)
    assert_trains_alike(trained(models[1], inputs, valid), trained(models[0], inputs, valid), 1e-7)


def test_evaluation_between_steps() -> None:
    """In inference mode, with the same mask: training afterwards is not touched by it."""
    inputs, valid = inputs_of("Bert", "right")
    model = build("Bert").train()
    expected = trained(model, inputs, valid)
    quietly(model)
    with torch.inference_mode():
        model(**inputs)
    assert_trains_alike(trained(model, inputs, valid), expected)
