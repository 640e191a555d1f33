"""`enable` leaves no trace: what can be observed is the same before it and after `disable`, and after a call that was broken off anywhere.

An interrupter raises at one line of the package, drawn among all lines that a call runs: as Ctrl-C does, as a failing allocation does.
"""

from __future__ import annotations

import copy
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from varlen_attn import VarlenWarning, disable, enable, enabled
from varlen_attn._state import state

from ..integrations.transformers.tiny import batch, build, shake
from ..interrupts import Interrupted, lines
from . import conformers

transformers.AttentionInterface()  # imports much, once, that has settings of its own


# -------------------------------------------------------------------- what can be observed


def observed(model: nn.Module) -> dict[str, Any]:
    """Everything about a model and its process that a caller can see, by name."""
    facts: dict[str, Any] = {"printed": repr(model), "pickled": _pickled(model)}
    for name, module in model.named_modules(remove_duplicate=False):
        facts[f"{name}: class"] = type(module)
        facts[f"{name}: forward"] = getattr(module.forward, "__func__", module.forward)
        facts |= {f"{name}: {key}": _fact(value) for key, value in vars(module).items()}
        facts[f"{name}: names of attributes"] = list(vars(module))
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        facts[f"{name}: tensor"] = (id(x), x._version, x.requires_grad, id(x.grad), x.detach().numpy().tobytes(), _fact(vars(x)))
    for key, value in model.state_dict().items():
        facts[f"state_dict: {key}"] = value.data_ptr()
    return facts | _process()


def _fact(value: Any) -> Any:
    """A value that is equal as long as nothing changed: containers by their contents in order, configurations by theirs, others as such."""
    if isinstance(value, transformers.PreTrainedConfig | transformers.GenerationConfig):
        return id(value), _fact(vars(value))
    if isinstance(value, dict | OrderedDict):
        return type(value), [(key, _fact(x)) for key, x in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [_fact(x) for x in value]
    if isinstance(value, set | frozenset):
        return type(value), sorted(map(repr, value))
    return value if isinstance(value, str | int | float | bool | type(None)) else (type(value), id(value))


def _pickled(model: nn.Module) -> list[str]:
    """Which objects a copy of the model would hold."""
    held: Counter[str] = Counter()
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    copy.deepcopy(model, memo)
    for x in memo.values():
        held[type(x).__qualname__] += 1
    return sorted(f"{n} x {kind}" for kind, n in held.items())


def _process() -> dict[str, Any]:
    """Random states, and settings of torch and Python."""
    flags = torch.backends
    return {
        "random": random.getstate(),
        "numpy": repr(np.random.get_state()),
        "torch": torch.get_rng_state().numpy().tobytes(),
        "dtype": torch.get_default_dtype(),
        "device": str(torch.get_default_device()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        "sdpa": (flags.cuda.flash_sdp_enabled(), flags.cuda.mem_efficient_sdp_enabled(), flags.cuda.math_sdp_enabled()),
        "fast path": flags.mha.get_fastpath_enabled(),
        "matmul": (torch.get_float32_matmul_precision(), flags.mkldnn.enabled, torch.get_num_threads()),
        "anomalies": torch.is_anomaly_enabled(),
        "modes": torch.overrides._len_torch_function_stack() if hasattr(torch.overrides, "_len_torch_function_stack") else 0,
        "hooks of all modules": [len(x) for x in (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)],
        "warnings": [repr(x) for x in warnings.filters],
        "loggers": (logging.getLogger("transformers").level, logging.getLogger("varlen_attn").level, logging.root.level),
        "signals": signal.getsignal(signal.SIGINT),
        "environment": dict(os.environ),
        "threads": threading.active_count(),
        "ours": (list(state.orders), list(state.records), state.recorded),
        "attention functions": sorted(set(transformers.AttentionInterface().valid_keys()) - {"varlen_attn"}),
    }


def assert_unchanged(before: dict[str, Any], model: nn.Module, where: str) -> None:
    after = observed(model)
    changed = [key for key in before | after if before.get(key, "missing") != after.get(key, "missing")]
    assert not changed, f"{where}: {[(key, before.get(key), after.get(key)) for key in changed[:3]]}"


def quietly(call: Callable[[], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VarlenWarning)
        call()


# -------------------------------------------------------------------- models


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.ModuleDict({"stack": nn.TransformerEncoder(layer, 2), "alone": nn.MultiheadAttention(16, 2, batch_first=True)})
    model["stack"].layers[0].register_forward_hook(_hook)
    return model.eval()


def trained_encoder() -> nn.Module:
    """In training, with gates that are closed and a norm that has to be tried."""
    layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, activation=nn.GELU())
    layer.norm1 = nn.Sequential(nn.LayerNorm(16), nn.Softsign())
    nn.init.zeros_(layer.linear2.weight)
    model = nn.TransformerDecoder(layer, 2)
    model.layers[1].requires_grad_(False).eval()
    return model


def bert() -> nn.Module:
    model = build("Bert", "ForSequenceClassification", dtype=torch.float32)
    nn.init.zeros_(model.classifier.bias)
    model.bert.embeddings.register_forward_pre_hook(_hook)
    model.bert.encoder.layer[0].attention.register_forward_hook(_hook, always_call=True, prepend=True)
    model.bert.pooler.train()
    return model


def llama() -> nn.Module:
    return build("Llama", "ForCausalLM", dtype=torch.float32).train()


def speech() -> nn.Module:
    return build("Wav2Vec2", "ForCTC", dtype=torch.float32)


def sentences() -> nn.Module:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.auto_model = build("Bert", dtype=torch.float32)

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            ids, mask = features["input_ids"], features["attention_mask"]
            return features | {"token_embeddings": self.auto_model(input_ids=ids, attention_mask=mask).last_hidden_state}

    return SentenceTransformer(modules=[Words(), Pooling(32)], device="cpu")


def speech_of_torchaudio() -> nn.Module:
    return conformers.load().Conformer(16, 2, 32, 2, 3).eval()


def _hook(*_: Any) -> None:
    """Of the user's."""


_MADE = (encoder, trained_encoder, bert, llama, speech, sentences, speech_of_torchaudio)
MODELS: dict[str, Callable[[], nn.Module]] = {f.__name__: f for f in _MADE}


@cache
def model_of(name: str) -> nn.Module:
    """One for all examples: what they leave behind is what is tested."""
    torch.manual_seed(0)
    return shake(MODELS[name]()) if name == "encoder" else MODELS[name]()


def calls(model: nn.Module, level: Any) -> dict[str, Callable[[], Any]]:
    def block() -> None:
        with enabled(model, level):
            pass

    return {"enable": lambda: enable(model, level), "disable": lambda: disable(model), "enabled": block}


@cache
def number_of_lines(name: str, level: str, what: str) -> list[str]:
    """Of a call that is not broken off, after others have filled what is kept."""
    model = model_of(name)
    for _ in range(2):
        if what == "disable":
            quietly(calls(model, level)["enable"])
        with lines() as seen:
            quietly(calls(model, level)[what])
        disable(model)
    return seen


# -------------------------------------------------------------------- the property


@pytest.mark.parametrize("level", ["model", "attention"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_after_disable(name: str, level: Any) -> None:
    model = MODELS[name]()
    quietly(lambda: enable(model, level) and disable(model))  # imports and registers something once
    observed(model)
    for what in ("enable", "enabled"):
        before = observed(model)
        quietly(calls(model, level)[what])
        assert what == "enabled" or observed(model) != before, "the call did nothing"
        disable(model)
        assert_unchanged(before, model, what)


_INTERRUPTIONS = st.tuples(
    st.sampled_from(list(MODELS)),
    st.sampled_from(["model", "attention"]),
    st.sampled_from(["enable", "enable", "disable", "enabled"]),
    st.sampled_from([Interrupted, SystemExit, MemoryError, RuntimeError]),
    st.floats(0, 1, exclude_max=True),
)


@settings(max_examples=max(40, settings.default.max_examples // 2))
@given(_INTERRUPTIONS)
def test_a_call_that_is_broken_off_leaves_everything_as_it_was(drawn: tuple[str, Any, str, type[BaseException], float]) -> None:
    name, level, what, kind, point = drawn
    model, all_lines = model_of(name), number_of_lines(*drawn[:3])
    line = int(point * len(all_lines))
    before = observed(model)
    if what == "disable":
        quietly(lambda: enable(model, level))
    whole = observed(model)
    caught = None
    try:
        with lines(line, kind) as seen:
            quietly(calls(model, level)[what])
    except kind as error:
        caught = error
    if len(seen) <= line:  # it took fewer lines this time: what the garbage collector calls is among them
        disable(model)
        return
    where = f"{what}({name}, {level}) broken off at line {line} of {len(all_lines)}, {seen[-1]}"
    after = observed(model)
    if what == "disable":
        assert after in (before, whole), f"{where}: half done"
        disable(model)
        assert_unchanged(before, model, where)
    else:
        # An error inside a trial is an answer of the trial; other interruptions come out.
        assert caught is not None or kind in (MemoryError, RuntimeError), f"{where}: swallowed"
        disable(model) if caught is None else None
        assert_unchanged(before, model, where)


def test_the_comparison_sees_what_a_half_done_call_leaves() -> None:
    """Of each kind that is compared one change, which must show."""
    model: Any = bert()
    changes: list[Callable[[], Any]] = [
        lambda: model.bert.pooler.eval(),
        lambda: setattr(model.config, "_attn_implementation_internal", "varlen_attn"),
        lambda: model.bert.encoder.layer[1].register_forward_hook(_hook),
        lambda: model.bert.encoder.layer[0].attention._forward_hooks.clear(),
        lambda: setattr(model, "_varlen_attn_state", None),
        lambda: model.classifier.bias.detach().zero_(),
        lambda: model.classifier.weight.requires_grad_(False),
        lambda: setattr(model.bert.embeddings.word_embeddings.weight, "mark", 1),
        lambda: setattr(model.bert.encoder, "__class__", nn.Identity),
        lambda: setattr(model.config, "use_cache", not model.config.use_cache),
        lambda: torch.rand(1),
        lambda: state.records.append(object()),
    ]
    try:
        for i, change in enumerate(changes):
            before = observed(model)
            change()
            assert observed(model) != before, f"change {i} is not seen"
    finally:
        state.records.clear()


# -------------------------------------------------------------------- other threads


@pytest.mark.parametrize("name", ["encoder", "bert", "llama"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch makes them in evaluation
def test_forwards_in_another_thread_stay_right(name: str) -> None:
    """While a model is enabled and disabled, again and again."""
    model: Any = model_of(name).eval()
    inputs = batch()
    x, padding = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(0)), inputs["attention_mask"] == 0

    def forward() -> Tensor:
        if name == "encoder":
            return model["stack"](x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0)
        out = model(**inputs).logits
        return out if out.dim() == 2 else out.masked_fill(padding[..., None], 0)

    wrong: list[str] = []
    finished = threading.Event()

    @torch.no_grad()
    def serve() -> None:
        while not finished.is_set():
            try:
                error = float((forward() - want).abs().max())
                if not error < 1e-4:
                    wrong.append(f"{error:.1e}")
            except Exception as error:
                wrong.append(repr(error))

    with torch.no_grad():
        want = forward()
    interval = sys.getswitchinterval()
    threads = [threading.Thread(target=serve) for _ in range(2)]
    try:
        sys.setswitchinterval(1e-5)
        for thread in threads:
            thread.start()
        for _ in range(8):
            quietly(lambda: enable(model) and disable(model))
    finally:
        finished.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not wrong, (len(wrong), wrong[:3])
