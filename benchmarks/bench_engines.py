"""Sentence embeddings on a CPU: a model of transformers as it came, enabled, and in the inference engines that people move to.

MiniLM in float32 with its published weights, on docstrings of the standard library cut at 256 tokens; of other shapes, with random
weights, fewer batches. Every contestant gives the hidden states of the last layer; those of real tokens are compared before anything is
timed. One process, in turns, each engine with as many threads as torch. Engines sleep between turns, because their threads wait for work
in loops for some time. What they are given is ready: arrays for ONNX Runtime and OpenVINO, lists of token ids for CTranslate2, which packs
a batch itself and takes no encoder of torch. `SentenceTransformer.encode` begins with texts.

`make bench-engines` installs the engines in a folder of their own, and none of them is needed for anything else. `--what` selects rows.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import varlen_attn

from .bench_transformers import BEFORE
from .inputs import Batch, bert, equal_lengths, library, minilm, minilm_tokenizer, natural_order, of_texts, sentence_transformer
from .measure import Timing, environment, home, interleave, ratio, save

ENABLED, PREPACKED, COMPILED = "enable", "enable, prepack", "enable, compile, freezing"
ONNX, OPENVINO, CTRANSLATE = "ONNX Runtime", "OpenVINO", "CTranslate2"
OURS, ENGINES = (ENABLED, PREPACKED, COMPILED), (ONNX, OPENVINO, CTRANSLATE)
PACKAGES = {ONNX: "onnxruntime", OPENVINO: "openvino", CTRANSLATE: "ctranslate2"}
KEYS = ("what", "threads")
# Speedups of MiniLM over the model as it came that are aimed at.
GOALS = {
    "32, natural order": 2.0, "32, sorted": 1.40, "8, natural order": 1.85, "1 of 256 tokens": 1.45, "1 of 31 tokens": 2.3,
    "32, nothing padded": 1.20, "32, very short": None,
}  # fmt: skip
BERT, ENCODER, ENCODE = "BERT base", "nn.TransformerEncoder", "SentenceTransformer.encode"
OTHERS = ("8, natural order", "1 of 256 tokens", "1 of 31 tokens")
ROWS = {**dict.fromkeys(GOALS, ""), **{f"{model}: {what}": model for model in (BERT, ENCODER) for what in OTHERS}, ENCODE: ENCODE}
TOLERANCE = 1e-4  # of hidden states, which are layer-normed: engines approximate some functions
PAUSE = 0.02  # seconds

Call = Callable[[], Tensor]  # the hidden states of all real tokens


def batches(documents: list[str]) -> dict[str, Batch]:
    tokenizer = minilm_tokenizer()
    lengths = [len(ids) for ids in tokenizer(documents, truncation=True, max_length=256).input_ids]
    by_length = [
        text for _, text in sorted(zip(random.Random(0).sample(lengths, 1024), random.Random(0).sample(documents, 1024), strict=True))
    ]
    short = [text for text, n in zip(documents, lengths, strict=True) if n <= 24][:31]
    long, single = (next(text for text, n in zip(documents, lengths, strict=True) if n == wanted) for wanted in (256, 31))
    natural = natural_order(documents, 0.5)
    eight = Batch({name: x[:8] for name, x in natural.inputs.items()}, natural.valid[:8])
    columns = int(eight.valid.sum(1).max())
    eight = Batch({name: x[:, :columns] for name, x in eight.inputs.items()}, eight.valid[:, :columns])
    made = (
        natural,
        of_texts(by_length[640:672]),
        eight,
        of_texts([long]),
        of_texts([single]),
        equal_lengths(documents),
        of_texts([*short, long]),
    )
    return dict(zip(GOALS, made, strict=True))


def of_vectors(batch: Batch, width: int) -> Batch:
    """For an encoder of torch: noise in place of embeddings."""
    torch.manual_seed(0)
    return Batch({"src": torch.randn(*batch.valid.shape, width), "src_key_padding_mask": ~batch.valid}, batch.valid)


def model_of(group: str) -> Any:
    torch.manual_seed(0)
    if group == BERT:
        model = bert(12, 768)
        model.config.position_embedding_type = "absolute"  # CTranslate2's conversion asks for it
        return model
    if group == ENCODER:
        layer = nn.TransformerEncoderLayer(512, 8, dim_feedforward=2048, activation="gelu", batch_first=True)
        return nn.TransformerEncoder(layer, 6).eval()
    return minilm()


# -------------------------------------------------------------------- contestants


def ours(model: Any, compiled: bool = False) -> dict[str, Any]:
    """The model as it came, and enabled copies."""
    found: dict[str, Any] = {BEFORE: model}
    for name in OURS if compiled else OURS[:2]:
        found[name] = copy.deepcopy(model)
        varlen_attn.enable(found[name], prepack=name == PREPACKED)
    if compiled:
        found[COMPILED] = torch.compile(found[COMPILED], options={"freezing": True})
    return found


def states(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        out = model(**batch.inputs)
    return (out if isinstance(out, Tensor) else out.last_hidden_state)[batch.valid]


def encoding(model: Any, texts: list[str]) -> Tensor:
    return model.encode(texts, convert_to_tensor=True, show_progress_bar=False)  # type: ignore[no-any-return]


def engines(model: Any, example: Batch, folder: Path, threads: int) -> Iterator[tuple[str, Callable[[Batch], Call]]]:
    """Each engine with the same weights, by its own conversion; ``example`` has the names of what is given to the model."""
    path, is_bert = folder / "model.onnx", hasattr(model, "config")
    given = {name: torch.zeros(2, 8, *x.shape[2:], dtype=x.dtype) for name, x in _named(example).items()}
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("columns")}
    plain = copy.deepcopy(model)
    if is_bert:
        plain.set_attn_implementation("eager")  # the pattern that ONNX Runtime's optimizer looks for
        plain = _States(plain).eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator, which nothing else has
    try:
        torch.onnx.export(
            plain, kwargs=given, f=str(path), dynamo=True, dynamic_shapes=dict.fromkeys(given, sizes),
            input_names=list(given), output_names=["states"], optimize=True, verbose=False,
        )  # fmt: skip
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    width, heads = (model.config.hidden_size, model.config.num_attention_heads) if is_bert else (512, 8)
    yield ONNX, _onnx_runtime(path, threads, width, heads)
    yield OPENVINO, _openvino(path, threads)
    if is_bert:
        yield CTRANSLATE, _ctranslate(model, folder, threads)


class _States(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        out: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).last_hidden_state
        return out


def _named(batch: Batch) -> dict[str, Tensor]:
    known = ("input_ids", "attention_mask", "token_type_ids", "src", "src_key_padding_mask")
    return {name: batch.inputs[name] for name in known if name in batch.inputs}


def _arrays(batch: Batch) -> dict[str, Any]:
    return {name: x.numpy() for name, x in _named(batch).items()}


def _onnx_runtime(path: Path, threads: int, width: int, heads: int) -> Callable[[Batch], Call]:
    import onnxruntime
    from onnxruntime.transformers import optimizer

    fused = optimizer.optimize_model(str(path), model_type="bert", num_heads=heads, hidden_size=width, opt_level=1, use_gpu=False)
    fused.save_model_to_file(str(path.with_name("fused.onnx")))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path.with_name("fused.onnx")), options, providers=["CPUExecutionProvider"])
    print(f"ONNX Runtime fused {sum(fused.get_fused_operator_statistics().values())} operators")
    return lambda batch: partial(_run_session, session, _arrays(batch), batch.valid)


def _run_session(session: Any, arrays: dict[str, Any], valid: Tensor) -> Tensor:
    return torch.from_numpy(session.run(None, arrays)[0])[valid]


def _openvino(path: Path, threads: int) -> Callable[[Batch], Call]:
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    request = compiled.create_infer_request()

    def run(arrays: dict[str, Any], valid: Tensor) -> Tensor:
        return torch.from_numpy(request.infer(arrays)[0])[valid]

    return lambda batch: partial(run, _arrays(batch), batch.valid)


def _ctranslate(model: Any, folder: Path, threads: int) -> Callable[[Batch], Call]:
    import ctranslate2
    import numpy
    from ctranslate2.converters import TransformersConverter

    source = folder / "source"
    model.save_pretrained(source)
    minilm_tokenizer().save_pretrained(source)
    TransformersConverter(str(source)).convert(str(folder / "converted"))
    encoder = ctranslate2.Encoder(str(folder / "converted"), device="cpu", intra_threads=threads, compute_type="float32")

    def run(ids: list[list[int]], valid: Tensor) -> Tensor:
        states = encoder.forward_batch(ids).last_hidden_state
        return torch.from_numpy(numpy.array(states))[valid]

    return lambda batch: partial(
        run, [row[real].tolist() for row, real in zip(batch.inputs["input_ids"], batch.valid, strict=True)], batch.valid
    )


# -------------------------------------------------------------------- one row


def row(what: str, batch: object, calls: dict[str, Call], threads: int, rounds: int, budget: float) -> dict[str, Any]:
    with torch.no_grad():
        plain = calls[BEFORE]()
        difference = {name: float(f"{float((call() - plain).abs().max()):.2g}") for name, call in calls.items() if name != BEFORE}
        wrong = {name: x for name, x in difference.items() if not x <= TOLERANCE}
        if wrong:
            raise AssertionError(f"{what}: results differ from those of the model as it came: {wrong}")
        timings: dict[str, Timing] = interleave(calls, rounds=rounds, budget=budget, prepare=lambda _: time.sleep(PAUSE))
    ratios = {name: round(ratio(timings[BEFORE], t), 3) for name, t in timings.items() if name != BEFORE}
    return {
        "what": what, "batch": str(batch), "threads": threads, "difference": difference, "ratio": ratios, "goal": GOALS.get(what),
        "milliseconds": {name: round(t.seconds * 1e3, 3) for name, t in timings.items()},
        "foreign": round(timings[BEFORE].foreign, 3),
    }  # fmt: skip


def groups(args: argparse.Namespace, documents: list[str], threads: int) -> Iterator[tuple[str, object, dict[str, Call]]]:
    """The rows that were asked for, with what is to be timed; a model at a time, because engines keep theirs."""
    inputs = batches(documents)
    for group in dict.fromkeys(ROWS[what] for what in args.what):
        wanted = [what for what in args.what if ROWS[what] == group]
        if group == ENCODE:
            texts = random.Random(0).sample(documents, args.texts)
            calls: dict[str, Call] = {name: partial(encoding, m, texts) for name, m in ours(sentence_transformer()).items()}
            yield ENCODE, f"{len(texts)} texts", calls
            continue
        model = model_of(group)
        batch_of = {what: inputs[what.removeprefix(f"{group}: ")] for what in wanted}
        if group == ENCODER:
            batch_of = {what: of_vectors(batch, 512) for what, batch in batch_of.items()}
        with tempfile.TemporaryDirectory() as folder:
            makers: dict[str, Callable[[Batch], Call]] = {
                name: partial(partial, states, m) for name, m in ours(model, args.compiled).items()
            }
            if not args.without_engines:
                makers |= dict(engines(model, next(iter(batch_of.values())), Path(folder), threads))
            for what, batch in batch_of.items():
                yield what, batch, {name: make(batch) for name, make in makers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for one row; never fewer than 5 rounds")
    parser.add_argument("--what", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--texts", type=int, default=1000, help=f"of {ENCODE}")
    parser.add_argument("--without-engines", action="store_true", help="only the model as it came and enabled")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile and freezing too, which takes minutes to compile")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    documents = library()
    for threads in args.threads:
        torch.set_num_threads(threads)
        for what, batch, calls in groups(args, documents, threads):
            found = row(what, batch, calls, threads, args.rounds, args.budget)
            found["versions"] = {name: version(package) for name, package in PACKAGES.items() if name in calls}
            gains = ", ".join(f"{name} {x:.2f}" for name, x in found["ratio"].items())
            print(f"{what}, {batch}, {threads} threads: {gains}", flush=True)
            if not args.no_save:
                save("engines", [found], KEYS)  # one at a time: what comes later may take long, or fail
    if not args.no_save:
        print(f"written to {home('engines').name}; {environment()['cpu']}")


if __name__ == "__main__":
    main()
