"""transformers' common model tests, on models that were enabled as soon as they were built: equal batches, training, checkpoints, outputs.

A test that fails fails again on the model as it came, or it is a fault of ours, or it is in `expected.py` with a reason. A test that is
expected to fail and passes is a failure too: the list says what is true.
"""

from __future__ import annotations

import unittest
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import varlen_attn
from tests.integrations.transformers.tiny import COMMON, OPTIONS, token_ids
from tests.peers.expected import judge

common = pytest.importorskip("transformers_tests.test_modeling_common", reason="make test-peers brings transformers' tests")

HEADS = ("Model", "ForMaskedLM", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
SEQ2SEQ = ("Model", "ForConditionalGeneration")
FAMILIES = {
    **dict.fromkeys(("Bert", "Roberta", "DistilBert", "Electra", "MPNet", "ModernBert", "Llama", "Qwen3"), HEADS),
    **dict.fromkeys(("Bart", "T5"), SEQ2SEQ),
}
LENGTHS = (7, 4, 6, 7, 2)

# What happened, by family: modules that were converted, and tests that ran.
converted: Counter[str] = Counter()
ran: Counter[str] = Counter()


class Batches:
    """What transformers' tests ask for a configuration and a batch."""

    is_training = True
    batch_size, seq_length = len(LENGTHS), max(LENGTHS)
    encoder_seq_length = decoder_seq_length = key_length = seq_length
    num_choices = 2

    def __init__(self, family: str):
        self.config_class = getattr(transformers, f"{family}Config")
        self.options: dict[str, Any] = {**COMMON, **OPTIONS.get("Llama" if family == "Qwen3" else family, {})}
        self.seq2seq = FAMILIES[family] is SEQ2SEQ
        self.hidden_size = 32
        self.num_hidden_layers, self.num_attention_heads = 2, 4

    def get_config(self) -> Any:
        return self.config_class(**self.options)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Tensor]]:
        mask = (torch.arange(self.seq_length) < torch.tensor(LENGTHS)[:, None]).long()
        inputs = {"input_ids": token_ids(mask), "attention_mask": mask}
        if self.seq2seq:
            inputs |= {"decoder_input_ids": token_ids(mask, 1), "decoder_attention_mask": mask.clone()}
        return self.get_config(), inputs


@contextmanager
def enabled_when_built(family: str, classes: tuple[type[PreTrainedModel], ...]) -> Iterator[None]:
    """A model of these classes is enabled the first time that it is put into a mode or on a device, as all tests do before a forward."""
    inside = False

    def entrance(method: Callable[..., Any]) -> Callable[..., Any]:
        def enters(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            out = method(self, *args, **kwargs)
            if not inside and type(self) in classes:
                inside = True
                try:
                    converted[family] += len(varlen_attn.enable(self).converted)
                finally:
                    inside = False
            return out

        return enters

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", varlen_attn.VarlenWarning)
        with (
            patch.object(PreTrainedModel, "train", entrance(torch.nn.Module.train)),
            patch.object(PreTrainedModel, "to", entrance(PreTrainedModel.to)),
        ):
            yield


def on_enabled(family: str, name: str, test: Callable[..., Any]) -> Callable[..., Any]:
    """``test`` on enabled models."""

    def run(self: Any) -> None:
        ran[family] += 1
        self.subTest = lambda *args, **kwargs: nullcontext()  # a failure in a part is one of the test
        judge(f"{family}.{name}", lambda: test(self), lambda: enabled_when_built(family, self.all_model_classes))

    return run


def case(family: str) -> type[unittest.TestCase]:
    classes = tuple(getattr(transformers, family + head) for head in FAMILIES[family] if hasattr(transformers, family + head))
    own = {
        name: on_enabled(family, name, getattr(common.ModelTesterMixin, name))
        for name in dir(common.ModelTesterMixin)
        if name.startswith("test_") and callable(getattr(common.ModelTesterMixin, name))
    }
    setup = dict(
        all_model_classes=classes,
        setUp=lambda self: setattr(self, "model_tester", Batches(family)),
        is_encoder_decoder=FAMILIES[family] is SEQ2SEQ,
        __module__=__name__,
    )
    return type(f"Test{family}", (common.ModelTesterMixin, unittest.TestCase), {**own, **setup})


globals().update({f"Test{family}": case(family) for family in FAMILIES})


def test_models_were_enabled() -> None:
    """Last: tests that enabled nothing would all pass."""
    assert {family for family in ran if converted[family] > ran[family]} == set(ran)
