"""Whole models, as they come and after `enable`, by the clock on the wall: what a user gains."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import varlen_attn
from varlen_attn import SeqLayout, record
from varlen_attn.testing import assert_within_budget

from ..measure import Absent, interleave, ratio
from .findings import Findings, Setting, one_line
from .timing import Shape

__all__ = ["SIZES", "TINY", "Size", "bert", "encoders"]

BASE, PADDED, OURS, BY_LENGTHS = "as it comes", "padded", "after enable", "after enable, lengths on the host"
COMPILED = "as it comes, compiled"
_COMPARED = 4  # rows of the batch that are compared with float64
_DROPOUT = 0.1
Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Size:
    """A stack of layers, and a batch for it."""

    layers: int
    width: int
    heads: int
    batch: int
    columns: int
    fill: float = 0.4

    @property
    def shape(self) -> Shape:
        return Shape(self.batch, self.columns, self.fill, self.width // self.heads, self.heads)

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.width}, B {self.batch}, S {self.columns}, fill {self.fill:g}"


SIZES = (Size(6, 1024, 16, 32, 512), Size(12, 768, 12, 32, 512), Size(12, 768, 12, 32, 128))
TINY = (Size(2, 32, 4, 3, 24),)


def encoders(setting: Setting, findings: Findings, sizes: tuple[Size, ...] = ()) -> None:
    """`nn.TransformerEncoder` in evaluation, with torch's fast path, and in training, with dropout."""
    findings.facts["rows"] = rows = list[dict[str, Any]]()
    for size in sizes or (TINY if setting.small else SIZES):
        with findings.trying(str(size)):
            _of_size(size, setting, findings, rows)
        _free(setting)


def _free(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.empty_cache()


def _of_size(size: Size, setting: Setting, findings: Findings, rows: list[dict[str, Any]]) -> None:
    lengths = size.shape.workload.lengths
    mask = size.shape.workload.key_padding_mask.to(setting.device)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(size.width, size.heads, 4 * size.width, dropout=_DROPOUT, batch_first=True)
    model = nn.TransformerEncoder(layer, size.layers).to(setting.device, setting.dtype).eval()
    own = copy.deepcopy(model)
    varlen_attn.enable(own)
    x = torch.randn(*mask.shape, size.width, generator=torch.Generator().manual_seed(1)).to(setting.device, setting.dtype)

    def by_lengths(x: Tensor) -> Tensor:
        layout = SeqLayout.from_lengths(lengths, mask.shape[1], device=mask.device)
        return layout.unpack(own(layout.pack(x), layout=layout))

    def padded(x: Tensor) -> Tensor:
        with _without_fast_path():
            out: Tensor = model(x, src_key_padding_mask=mask)
            return out

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        BASE: lambda x: model(x, src_key_padding_mask=mask),
        OURS: lambda x: own(x, src_key_padding_mask=mask),
        BY_LENGTHS: by_lengths,
        PADDED: padded,
    }
    with _without_fast_path(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        few, hidden = x[:_COMPARED], mask[:_COMPARED]
        exact = copy.deepcopy(model).double()(few.double(), src_key_padding_mask=hidden)[~hidden]
        plain = model(few, src_key_padding_mask=hidden)[~hidden]
    row: dict[str, Any] = {"model": str(size), "dtype": str(setting.dtype).removeprefix("torch."), "tokens": sum(lengths)}
    rows.append(row)
    with record(own) as log:
        _verify(str(size), _without_grad(ways, x), mask, exact, plain, findings, row)
    row["backends"] = sorted({call.backend for call in log.calls})
    row["evaluation"] = _times(_without_grad(ways, x), setting)
    findings.publish()
    del ways[PADDED]
    leaf, grad = x.clone().requires_grad_(), torch.randn_like(x).masked_fill(mask[..., None], 0)
    model.train(), own.train()
    steps: Calls = {name: partial(_step, way, leaf, grad, own if "enable" in name else model) for name, way in ways.items()}
    row["training"] = _times(steps, setting)
    findings.publish()


def _without_grad(ways: Mapping[str, Callable[[Any], Any]], x: Any) -> Calls:
    return {name: torch.no_grad()(partial(way, x)) for name, way in ways.items()}


def _step(way: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, model: nn.Module) -> None:
    way(x).backward(grad)
    model.zero_grad(set_to_none=True)
    x.grad = None


@contextmanager
def _without_fast_path() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def _verify(what: str, calls: Calls, mask: Tensor, exact: Tensor, plain: Tensor, findings: Findings, row: dict[str, Any]) -> None:
    """Ours must be right, and others are told: all outputs at tokens of the first rows, against float64."""
    for name in list(calls):
        try:
            out = calls[name]()
            assert_within_budget(out[:_COMPARED][~mask[:_COMPARED]], exact, plain, what=name)
        except Exception as error:
            row.setdefault("not as float64", {})[name] = one_line(error)
    wrong = {name: why for name, why in row.get("not as float64", {}).items() if "enable" in name}
    findings.check(f"{what} is right", not wrong, wrong or "output at tokens, against float64")


def _times(calls: Calls, setting: Setting) -> dict[str, Any]:
    """Of those that can run."""
    absent = {}
    for name in list(calls):
        try:
            calls[name]()
        except Exception as error:
            absent[name] = one_line(error)
            del calls[name]
    budget, least = (0.05, 0.0) if setting.small else (3.0, 0.03)
    times = interleave(calls, rounds=7, least=least, budget=budget, device=setting.device)
    return {
        "milliseconds": {name: round(t.seconds * 1e3, 3) for name, t in times.items()},
        "spread": {name: round(t.spread, 3) for name, t in times.items()},
        "host milliseconds": {name: round(_queueing(call, setting.device) * 1e3, 3) for name, call in calls.items()},
        f"times faster than {BASE}": {name: round(ratio(times[BASE], t), 3) for name, t in times.items()} if BASE in times else {},
        **({"absent": absent} if absent else {}),
    }


def _queueing(call: Callable[[], object], device: str) -> float:
    """Seconds of the host until the call returns; what the device still has to do is not waited for."""
    taken = []
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return median(taken)


# -------------------------------------------------------------------- a model of transformers


def bert(setting: Setting, findings: Findings) -> None:
    """`BertModel` with random weights, in evaluation: as it comes, compiled, and after `enable`. Nothing is downloaded."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise Absent(f"transformers is not installed ({one_line(error, 100)})") from None
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100)
    torch.manual_seed(0)
    model = BertModel(BertConfig(**(small if setting.small else {})), add_pooling_layer=False).to(setting.device, setting.dtype).eval()
    own = copy.deepcopy(model)
    report = varlen_attn.enable(own)
    findings.facts["attention"] = getattr(model.config, "_attn_implementation", "")
    findings.facts["enable"] = [f"{m.module or 'the model'}: {m.action} {m.reason}".strip() for m in report.modules][:4]
    findings.facts["rows"] = rows = list[dict[str, Any]]()
    for size in TINY if setting.small else SIZES[1:]:
        _of_bert(model, own, size, setting, findings, rows)
    if not setting.small:
        _compiled_bert(model, own, SIZES[1], setting, findings, rows[0])


def _inputs(size: Size, model: nn.Module, setting: Setting) -> tuple[dict[str, Tensor], Tensor]:
    mask = size.shape.workload.key_padding_mask
    words: int = model.config.vocab_size  # type: ignore[assignment, union-attr]
    ids = torch.randint(5, words, mask.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids.to(setting.device), "attention_mask": (~mask).long().to(setting.device)}, mask.to(setting.device)


def _hidden(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    out: Tensor = model(**inputs).last_hidden_state
    return out


def _of_bert(
    model: nn.Module, own: nn.Module, size: Size, setting: Setting, findings: Findings, rows: list[dict[str, Any]]
) -> None:  # fmt: skip
    inputs, mask = _inputs(size, model, setting)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        few, hidden = {name: x[:_COMPARED] for name, x in inputs.items()}, mask[:_COMPARED]
        exact, plain = _hidden(copy.deepcopy(model).double(), few)[~hidden], _hidden(model, few)[~hidden]
    row: dict[str, Any] = {"model": f"BertModel, {size}", "tokens": int((~mask).sum())}
    rows.append(row)
    ways = {BASE: partial(_hidden, model), OURS: partial(_hidden, own)}
    _verify(row["model"], _without_grad(ways, inputs), mask, exact, plain, findings, row)
    row["evaluation"] = _times(_without_grad(ways, inputs), setting)
    findings.publish()


def _compiled_bert(model: nn.Module, own: nn.Module, size: Size, setting: Setting, findings: Findings, row: dict[str, Any]) -> None:
    """Last, because it takes long; in one contest with the others."""
    inputs, _ = _inputs(size, model, setting)
    compiled = torch.compile(copy.deepcopy(model))
    began = time.monotonic()
    with findings.trying("BertModel, compiled", required=False), torch.no_grad():
        first = _hidden(compiled, inputs)
        row["seconds of compiling"] = round(time.monotonic() - began, 1)
        assert bool(first.isfinite().all())
        ways = {BASE: partial(_hidden, model), COMPILED: partial(_hidden, compiled), OURS: partial(_hidden, own)}
        row["evaluation, with the compiled one"] = _times(_without_grad(ways, inputs), setting)
        findings.publish()
