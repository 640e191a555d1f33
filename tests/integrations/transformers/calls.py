"""What becomes of the calls that people make: a table of families by calls, seen in runs of tiny models, for `docs/transformers.md`.

A cell says which linear layers of a model's stacks computed fewer rows than they do without `varlen_attn.enable`: all ("packed"), or some
("partly": one of two stacks, or all but those of positions). Otherwise attention alone was packed, or all was "padded".
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import varlen_attn
from varlen_attn.integrations.transformers.enabling import _stacks

from .architectures import ARCHITECTURES, Architecture, noise, padding, tokens

FAMILIES = (
    "BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification", "RobertaModel", "DistilBertModel",
    "ElectraModel", "ModernBertModel", "EsmModel", "MPNetModel", "DebertaV2Model", "T5EncoderModel", "CLIPTextModel", "Wav2Vec2Model",
    "Wav2Vec2ForCTC", "HubertModel", "WavLMModel", "LlamaForCausalLM", "LlamaForSequenceClassification", "MistralForCausalLM",
    "Qwen3ForCausalLM", "Gemma3ForCausalLM", "GptOssForCausalLM", "GPT2LMHeadModel", "BartForConditionalGeneration", "MBartModel",
    "MarianModel", "PegasusModel", "T5ForConditionalGeneration", "MT5Model", "WhisperModel",
)  # fmt: skip

LEVELS = ("packed", "partly", "attention", "padded")
Call = Callable[[PreTrainedModel], Any]


def forward(entry: Architecture, model: PreTrainedModel, form: str = "right", **more: Any) -> Call | None:
    case = entry.case(model, form)
    return None if case is None else lambda m: m(**{**case.arguments, **more})


def training(entry: Architecture, model: PreTrainedModel) -> Call | None:
    """With -100 at padding, and all layers."""
    call = forward(entry, model)
    model.config.layerdrop = 0
    return None if call is None else lambda m: call(m.train())


def embeds(entry: Architecture, model: PreTrainedModel) -> Call | None:
    case = entry.case(model, "right")
    assert case is not None
    arguments = dict(case.arguments)
    if "input_ids" not in arguments:
        return None
    arguments["inputs_embeds"] = model.get_input_embeddings()(arguments.pop("input_ids")).detach()
    return lambda m: m(**arguments)


def generate(entry: Architecture, model: PreTrainedModel, form: str = "left", **options: Any) -> Call | None:
    mask = padding(form)[:3]
    arguments: dict[str, Any] = dict(input_ids=tokens(mask), attention_mask=mask.long())
    if entry.family == "whisper" and entry.class_name.endswith("Generation"):
        arguments = dict(input_features=noise(3, 6, 22), decoder_input_ids=tokens(mask), decoder_attention_mask=mask.long())
    elif not entry.generates:
        return None
    options = dict(do_sample=False, min_new_tokens=3, max_new_tokens=3, disable_compile=True, **options)
    return lambda m: m.generate(**arguments, **options)


CALLS: Mapping[str, Callable[[Architecture, PreTrainedModel], Call | None]] = {
    "inference": forward,
    "training": training,
    "hidden states": lambda e, m: forward(e, m, output_hidden_states=True),
    "attention weights": lambda e, m: forward(e, m, output_attentions=True),
    "inputs_embeds": embeds,
    "left padding": lambda e, m: forward(e, m, "left", **({"labels": None} if "LM" in e.class_name else {})),
    "an empty row": lambda e, m: forward(e, m, "one empty row"),
    "one layer": forward,
    "generation": generate,
    "static cache": lambda e, m: generate(e, m, cache_implementation="static"),
    "generation, right": lambda e, m: generate(e, m, "right"),
}
_ONE_LAYER = ("num_hidden_layers", "num_layers", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")


def built(name: str, call: str) -> tuple[Architecture, PreTrainedModel]:
    entry = ARCHITECTURES[name]
    if call == "one layer":
        config = {k: 1 if k in _ONE_LAYER else x for k, x in entry.config.items() if k != "layer_types"}
        entry = replace(entry, config=config)
    if call == "attention weights":
        model = entry.build()
        model.set_attn_implementation("eager")
        return entry, model
    return entry, entry.build()


def cell(name: str, call: str) -> str:
    """``packed``, ``partly`` (some stacks), ``attention``, ``padded``; nothing if the family has no such call."""
    entry, model = built(name, call)
    run = CALLS[call](entry, model)
    if run is None:
        return ""
    try:
        before = _rows(copy.deepcopy(model), run)
    except Exception:  # transformers' own
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        varlen_attn.enable(model)
    with varlen_attn.record(model) as log:
        after = _rows(model, run)
    fewer = [after[module] < rows for module, rows in before.items()]
    if any(fewer):
        return "packed" if all(fewer) else "partly"
    return "attention" if any(call.backend != "dense" for call in log) else "padded"


def _rows(model: PreTrainedModel, run: Call) -> Counter[str]:
    """By linear layer of a stack. One hook of all modules, for with hooks of their own they would compute padding."""
    linear = {
        module: f"{stack.name}.{name}"
        for stack in _stacks(model)
        for name, module in stack.layers.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    rows: Counter[str] = Counter()

    def count(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if module in linear:
            rows[linear[module]] += result.numel() // result.shape[-1]

    handle = nn.modules.module.register_module_forward_hook(count)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(model)
    finally:
        handle.remove()
    return rows


def lines() -> list[str]:
    """The table, and before it how many cells say what."""
    found = {name: [cell(name, call) for call in CALLS] for name in FAMILIES}
    count = Counter(x for cells in found.values() for x in cells if x)
    said = ", ".join(f"{n} {level}" for level in LEVELS if (n := count[level]))
    head = [f"{count.total()} cells: {said}.", "", "| model | " + " | ".join(CALLS) + " |", "|---" * (1 + len(CALLS)) + "|"]
    return [*head, *("| `" + "` | ".join((name, " | ".join(cells))) + " |" for name, cells in found.items())]
