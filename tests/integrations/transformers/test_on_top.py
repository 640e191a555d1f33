"""What people build on models of transformers: sentence-transformers' kinds of models, adapters and quantised layers. Each runs packed and
gives the same, or is left as it is with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import sentence_transformers
import torch
import transformers
from sentence_transformers.base.modules import Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.modules import SpladePooling
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from varlen_attn import disable, enable, record

from .tiny import COMMON, assert_close, assert_same_gradients, batch, build, gradients, reasons, shake

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = [*SPECIAL, *(letter * n for letter in "abcdefghijklmno" for n in (1, 2, 3))]  # as many as `tiny.VOCABULARY`
TEXTS = ["a bb ccc d", "e", "f gg a bb c d e f g", "hh iii"]
GROUPED: dict[str, Any] = dict(num_key_value_heads=2, head_dim=8)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def saved(model: Any, path: Path, side: str = "right") -> str:
    """With a tokenizer of few words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": word for name, word in zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True)}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side=side, **names).save_pretrained(path)
    model.save_pretrained(path)
    return str(path)


def tiny(name: str, head: str = "Model", **options: Any) -> Any:
    return build(name, head, dtype=torch.float32, pad_token_id=0, **options)


def ids() -> dict[str, Tensor]:
    """A batch for it."""
    inputs = batch()
    return inputs | {"input_ids": inputs["input_ids"] * inputs["attention_mask"]}


def gemma(**options: Any) -> Any:
    """The text model of Gemma 3, which embedding models are made of."""
    made = {**COMMON, **GROUPED, "pad_token_id": 0, "sliding_window": 4, "query_pre_attn_scalar": 8, **options}
    return shake(transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**made))).eval()


def assert_packed_and_equal(model: nn.Module, call: Callable[[], Tensor], rows: bool = True) -> None:
    """With ``rows=False`` one of its calls runs padded by design."""
    want = call()
    assert len({tuple(x.tolist()) for x in want.reshape(len(want), -1)}) > 1
    report = enable(model)
    with record(model) as log:
        got = call()
    assert_close(got, want, 2e-6 * float(want.abs().max()))
    assert any("packed once" in m.reason for m in report.converted)
    assert len(log)
    assert all(x.backend != "dense" and x.rows < x.slots for x in log) or not rows
    disable(model)
    assert torch.equal(call(), want)


# -------------------------------------------------------------------- sentence-transformers


@pytest.mark.parametrize("labels", [1, 3])
def test_cross_encoder(labels: int, tmp_path: Path) -> None:
    path = saved(tiny("Bert", "ForSequenceClassification", num_labels=labels), tmp_path)
    model = sentence_transformers.CrossEncoder(path, device="cpu")
    pairs = [("a bb", "c"), ("d e f", "g a b c d"), ("a", "b"), ("ccc ccc", "a bb ccc d e f")]
    assert_packed_and_equal(model, lambda: model.predict(pairs, convert_to_tensor=True))


def test_sparse_encoder(tmp_path: Path) -> None:
    """SPLADE: the largest logit of each word over the tokens. Rows at padding are copies of tokens, and masked besides."""
    path = saved(tiny("Bert", "ForMaskedLM"), tmp_path)
    model = sentence_transformers.SparseEncoder(modules=[Transformer(path, transformer_task="fill-mask"), SpladePooling()], device="cpu")
    assert_packed_and_equal(model, lambda: model.encode(TEXTS).to_dense())


@pytest.mark.parametrize("how", ["lasttoken", "mean"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "make",
    [lambda: tiny("Qwen3", **GROUPED), gemma, lambda: gemma(use_bidirectional_attention=True)],
    ids=["Qwen3", "Gemma3", "Gemma3, bidirectional"],
)
def test_embeddings_of_decoders(make: Callable[[], Any], side: str, how: str, tmp_path: Path) -> None:
    model = sentence_transformers.SentenceTransformer(
        modules=[Transformer(saved(make(), tmp_path, side)), Pooling(32, pooling_mode=how)], device="cpu"
    )
    # An encoder with padding before its tokens, of which code around it may read the first column.
    rows = side == "right" or not getattr(model[0].model.config, "use_bidirectional_attention", False)
    assert_packed_and_equal(model, lambda: model.encode(TEXTS, convert_to_tensor=True), rows)


@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_gemma_as_an_encoder_learns_the_same(side: str) -> None:
    """Layers with a window on both sides, and those that see all columns."""
    model = gemma(use_bidirectional_attention=True, layer_types=["sliding_attention", "full_attention"]).double()
    inputs = batch(side)
    inputs = inputs | {"input_ids": inputs["input_ids"] * inputs["attention_mask"]}
    valid = inputs["attention_mask"].bool()

    def learnt() -> dict[str, Tensor]:
        return gradients(model, model(**inputs).last_hidden_state[valid].sin().sum())

    want = learnt()
    enable(model)
    with record(model) as log:
        assert_same_gradients(learnt(), want, 2e-5)  # its norms compute in float32
    assert all(x.rows < x.slots for x in log)


@pytest.mark.parametrize("expansion", [False, True])
def test_late_interaction(expansion: bool, tmp_path: Path) -> None:
    """Documents run packed; a query that is expanded with [MASK], which no token attends to, reads rows of padding and runs padded."""
    options = dict(query_expansion={"strategy": "fixed", "length": 12, "attend": False}) if expansion else {}
    model = sentence_transformers.MultiVectorEncoder(
        modules=[Transformer(saved(tiny("Bert"), tmp_path), **options), MultiVectorMask()], device="cpu"
    )
    documents, queries = model.encode_document(TEXTS), model.encode_query(TEXTS)
    enable(model)
    with record(model) as log:
        got = model.encode_document(TEXTS)
    assert all(x.rows < x.slots for x in log)
    for a, b in zip([*got, *model.encode_query(TEXTS)], [*documents, *queries], strict=True):
        assert_close(torch.as_tensor(a), torch.as_tensor(b), 1e-5)


# -------------------------------------------------------------------- adapters, quantised layers


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "lora_dropout": 0.1}], ids=str)
def test_lora(options: dict[str, Any]) -> None:
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(tiny("Llama", "ForCausalLM"), config).eval()
    inputs = ids()
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert_packed_and_equal(model, lambda: model(**inputs).logits[valid])


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tens", "ignore:.*quant")
@pytest.mark.parametrize("name", ["Bert", "Llama", "ModernBert"])
def test_layers_quantised_with_one_scale_for_all_rows(name: str) -> None:
    """Rows of padding change what tokens are rounded to, so leaving them out would give other numbers."""
    model = torch.ao.quantization.quantize_dynamic(tiny(name), {nn.Linear})
    inputs = ids()
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = model(**inputs)[0]
        report = enable(model)
        assert_close(model(**inputs)[0][valid], want[valid], 1e-6)
    assert any("quantised with one scale for all rows of a batch, those of padding too" in why for why in reasons(report).values())


class RoundedByRow(nn.Linear):
    """int8 with a scale for each row of activations, and for each output, as torchao's dynamic activations have it."""

    def forward(self, x: Tensor) -> Tensor:
        scales = x.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127
        weights = self.weight.abs().amax(-1, keepdim=True) / 127
        product = nn.functional.linear((x / scales).round(), (self.weight / weights).round())
        return product * scales * weights.T[0] + (0 if self.bias is None else self.bias)


@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_layers_quantised_row_by_row(name: str) -> None:
    """Tokens do not see each other, so these run packed."""
    model = tiny(name)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = RoundedByRow
    inputs = ids()
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = model(**inputs)[0][valid]
        report = enable(model)
        with record(model) as log:
            got = model(**inputs)[0][valid]
    # A number in the middle between two steps may be rounded either way.
    assert (got - want).abs().mean() < 1e-3 * want.abs().mean()
    assert any("packed once" in m.reason for m in report.converted)
    assert all(x.rows < x.slots for x in log)


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao(kind: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = tiny("Llama")
    quantization.quantize_(model, getattr(quantization, kind)())
    inputs = ids()
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = model(**inputs)[0][valid]
        report = enable(model)
        got = model(**inputs)[0][valid]
    assert (got - want).abs().mean() < 1e-3 * want.abs().mean()
    assert any("packed once" in m.reason for m in report.converted) or reasons(report)
