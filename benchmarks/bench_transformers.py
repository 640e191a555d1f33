"""Models of transformers before and after `varlen_attn.enable`, at both levels. Before is attention by ``sdpa``, transformers' default.

- MiniLM with its published weights on docstrings of the standard library: batches of 32 in natural order, one batch without padding,
  and steps of training.
- `SentenceTransformer.encode` of 256 docstrings. It sorts by length first, so there is less padding left, and it tokenises.
- Wav2Vec2 and HuBERT, random weights of base width, on the durations of spoken prompts. Their convolutional front end computes padding
  before and after, and takes most of the time; so the transformer, with its positional convolution, is timed alone too.
- Shapes of other models with random weights, half of each batch padding: MPNet and T5's encoder, whose attention needs columns, in
  evaluation; BERT base, a step of training, and one with its head for masked words, of which 15 % have labels: `enable(model)`, and with
  `heads="labelled"`. (Whisper's encoder is given no mask: there is nothing to leave out.)
- `enable` itself, beside one forward of 4 rows of 32 tokens: BERT as large as MiniLM and as BERT base, and a stack of torch's.

Before anything is timed, all outputs at real tokens, and in training the gradients of all parameters, are compared with the model in
float64, one sequence at a time and without padding; the error budget is that of the model before. Vectors of `encode` must be within 1e-6
of those before. Dropout draws other numbers for packed rows: a step with dropout can be timed only.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import varlen_attn
from varlen_attn.testing import assert_within_budget

from .inputs import (
    SPEECH,
    Batch,
    bert,
    equal_lengths,
    library,
    masked_lm,
    minilm,
    mpnet,
    natural_order,
    sentence_transformer,
    speech,
    t5_encoder,
    waves,
)
from .measure import Timing, environment, interleave, ratio, save

BEFORE, ATTENTION, MODEL, AGAIN, FRONT, ENABLING = "before", "attention", "model", "before again", "front end", "enable and disable"
LEVELS = (ATTENTION, MODEL)
TEXT, ENCODE, TRAINING, AUDIO, SHAPES, ENABLE = "text", "encode", "training", "audio", "shapes", "enable"  # the parts
PARTS = (TEXT, ENCODE, TRAINING, AUDIO, SHAPES, ENABLE)
DOCUMENTS = 256  # for `encode`, in batches of 32
CLIPS = 8
OF_FILL = 0.85  # goal of a packed model: this share of B*S / tokens
ENCODE_GOAL, SHAPES_GOAL = 1.6, 1.4
ENABLE_LIMIT = 0.15  # seconds that `enable` may take where one forward is faster
FLOOR, FLOOR_EQUAL = 0.95, 0.97  # attention level; both levels where nothing is padded. Nothing is taken off these
SAME_VECTORS = 1e-6
DROPOUT = {"no dropout": "no dropout", "dropout 0.1": "dropout 0.1"}  # of training, and what its rows are called
BUSY = 0.2  # share of the machine taken by others, above which two threads say little


class Limits(NamedTuple):
    """How long to time: quiet rounds wanted, and seconds for one row."""

    rounds: int = 7
    budget: float = 30.0


class Judged(NamedTuple):
    """What ratios, by contestant, are aimed at, and which they must not fall below."""

    goals: Mapping[str, float] = {}
    floors: Mapping[str, float] = {}


# -------------------------------------------------------------------- contestants


def contestants(model: nn.Module, levels: tuple[str, ...] = LEVELS) -> dict[str, Any]:
    """The model and enabled copies of it."""
    found = {BEFORE: model}
    for level in levels:
        found[level] = copy.deepcopy(model)
        varlen_attn.enable(found[level], level=level)  # type: ignore[arg-type]
    return found


def evaluate(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs).last_hidden_state
    return out


def train(model: Any, inputs: dict[str, Tensor], grad: Tensor) -> Tensor:
    """Forward and backward, without an optimizer."""
    model.zero_grad()
    out: Tensor = model(**inputs).last_hidden_state
    out.backward(grad)
    return out.detach()


def random_grad(batch: Batch, width: int) -> Tensor:
    """Of the output; 0 at padding, as every loss of real tokens has it."""
    return torch.randn(*batch.valid.shape, width, generator=torch.Generator().manual_seed(1)) * batch.valid[..., None]


# -------------------------------------------------------------------- verified


def truth(model: nn.Module, batch: Batch, grad: Tensor | None = None) -> dict[str, Tensor]:
    """The output at real tokens, and with ``grad`` all gradients, in float64, one sequence at a time."""
    exact = copy.deepcopy(model).double()
    if grad is None:
        return {"output": torch.cat([evaluate(exact, inputs)[0] for inputs in batch.alone()])}
    outs = []
    for inputs, row, real in zip(batch.alone(), grad, batch.valid, strict=True):
        out = exact(**inputs).last_hidden_state
        out.backward(row[real].double()[None])
        outs.append(out.detach()[0])
    return {"output": torch.cat(outs), **gradients(exact)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def verify(calls: Mapping[str, Callable[[], dict[str, Tensor]]], exact: dict[str, Tensor]) -> dict[str, float]:
    """Raise AssertionError unless all results are as near to float64 as those before; how far outputs are from those before.

    It is the warm-up too: every contestant runs once.
    """
    plain = calls[BEFORE]()
    found = {}
    for name, call in calls.items():
        if name == BEFORE:
            continue
        results = call()
        assert results.keys() == exact.keys(), f"{name} has results {sorted(results.keys() ^ exact.keys())} of its own, or lacks them"
        for what, got in results.items():
            assert_within_budget(got, exact[what], plain[what], gradient=what != "output", what=f"{name}, {what}")
        found[name] = _short((results["output"] - plain["output"]).abs().max())
    return found


def _short(x: Any) -> float:
    return float(f"{float(x):.2g}")


# -------------------------------------------------------------------- one row


def row(
    part: str, what: str, batch: str, by_token: float, timings: Mapping[str, Timing], judged: Judged, difference: dict[str, float] | None
) -> dict[str, Any]:
    """Everything about one contest; ``by_token`` is what the ratio of a packed model would be if all of its work were by token."""
    import sentence_transformers
    import transformers

    judge = torch.get_num_threads() == 2
    return {
        "threads": torch.get_num_threads(),
        "part": part,
        "what": what,
        "batch": batch,
        "by_token": round(by_token, 3),
        "milliseconds": {name: round(t.seconds * 1e3, 3) for name, t in timings.items()},
        "spread": {name: round(t.spread, 3) for name, t in timings.items()},
        "ratio": {name: round(ratio(timings[BEFORE], t), 3) for name, t in timings.items() if name not in (BEFORE, FRONT)},
        "difference": difference,
        "rounds": len(timings[BEFORE].rounds),
        "foreign": round(timings[BEFORE].foreign, 3),
        "goals": {name: round(goal, 2) for name, goal in judged.goals.items()} if judge else {},
        "floors": dict(judged.floors) if judge else {},
        "libraries": f"transformers {transformers.__version__}, sentence-transformers {sentence_transformers.__version__}",
    }


def contest(calls: Mapping[str, Callable[[], object]], limits: Limits) -> dict[str, Timing]:
    again = {AGAIN: calls[BEFORE]}
    return interleave({**calls, **again}, rounds=limits.rounds, warm_up=0, least=0, budget=limits.budget)


# -------------------------------------------------------------------- the parts


def bench_text(model: nn.Module, batches: dict[str, Batch], limits: Limits) -> Iterator[dict[str, Any]]:
    models = contestants(model)
    for what, batch in batches.items():
        exact = truth(model, batch)
        calls = {name: partial(evaluate, m, batch.inputs) for name, m in models.items()}
        difference = verify({name: partial(_outputs, call, batch) for name, call in calls.items()}, exact)
        if batch.fill < 1:
            judged = Judged({MODEL: OF_FILL / batch.fill}, {ATTENTION: FLOOR})
        else:
            judged = Judged(floors=dict.fromkeys(LEVELS, FLOOR_EQUAL))
        yield row(TEXT, what, str(batch), 1 / batch.fill, contest(calls, limits), judged, difference)


def _outputs(call: Callable[[], Tensor], batch: Batch) -> dict[str, Tensor]:
    return {"output": call()[batch.valid]}


def bench_shapes(limits: Limits) -> Iterator[dict[str, Any]]:
    mask = (torch.arange(128) < torch.linspace(16, 112, 8).long()[:, None]).long()
    mask[-1] = 1
    for what, build in SHAPES_OF.items():
        torch.manual_seed(0)
        model = build()
        batch = Batch({"input_ids": torch.randint(5, 1000, mask.shape) * mask, "attention_mask": mask}, mask.bool())
        if what == BERT:
            yield from bench_training(model, batch, limits, {"no dropout": what}, SHAPES)
            continue
        if what == MASKED_LM:
            yield from bench_masked_lm(model, batch, limits)
            continue
        calls = {name: partial(evaluate, m, batch.inputs) for name, m in contestants(model, (MODEL,)).items()}
        difference = verify({name: partial(_outputs, call, batch) for name, call in calls.items()}, truth(model, batch))
        yield row(SHAPES, what, str(batch), 1 / batch.fill, contest(calls, limits), Judged({MODEL: SHAPES_GOAL}), difference)


BERT, MASKED_LM = "BERT base, a training step", "BERT base, a masked-LM training step at 15 % labels"
SHAPES_OF: dict[str, Callable[[], Any]] = {
    "MPNet base": mpnet,
    "T5 base, the encoder": t5_encoder,
    BERT: partial(bert, 12, 768),
    MASKED_LM: masked_lm,
}


def bench_masked_lm(model: Any, batch: Batch, limits: Limits) -> Iterator[dict[str, Any]]:
    """One contest, and a row for each way to enable the model, with half of the batch. Verified: the loss, and the gradients of all
    parameters."""
    batch = Batch({name: x[1::2] for name, x in batch.inputs.items()}, batch.valid[1::2])
    chosen = batch.valid & (torch.rand(batch.valid.shape, generator=torch.Generator().manual_seed(1)) < 0.15)
    batch = batch._replace(inputs=batch.inputs | {"labels": batch.inputs["input_ids"].masked_fill(~chosen, -100)})
    models = {BEFORE: model}
    for heads in ("all", "labelled"):
        models[heads] = copy.deepcopy(model)
        varlen_attn.enable(models[heads], heads=heads)
    exact, loss = copy.deepcopy(model).double(), torch.zeros((), dtype=torch.float64)
    for inputs in batch.alone():
        if share := int((inputs["labels"] != -100).sum()) / int(chosen.sum()):
            loss += learn(exact, inputs, share)
    truth = {"output": loss, **gradients(exact)}

    def results(model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        return {"output": learn(model, batch.inputs), **gradients(model)}

    difference = verify({name: partial(results, m) for name, m in models.items()}, truth)
    timings = contest({name: partial(learn, m, batch.inputs) for name, m in models.items()}, limits)
    for heads, title in (("all", MASKED_LM), ("labelled", f'{MASKED_LM}, heads="labelled"')):
        its = {BEFORE: timings[BEFORE], MODEL: timings[heads], AGAIN: timings[AGAIN]}
        yield row(SHAPES, title, str(batch), 1 / batch.fill, its, Judged(), {MODEL: difference[heads]})


def learn(model: Any, inputs: dict[str, Tensor], share: float = 1.0) -> Tensor:
    """The loss, after its backward; gradients are added up."""
    loss: Tensor = model(**inputs).loss * share
    loss.backward()
    return loss.detach()


def bench_training(
    model: Any, batch: Batch, limits: Limits, titles: Mapping[str, str] = DROPOUT, part: str = TRAINING
) -> Iterator[dict[str, Any]]:
    """Without dropout, verified, and with the dropout of the model's configuration."""
    grad = random_grad(batch, model.config.hidden_size)
    for what, title in titles.items():
        trained = copy.deepcopy(model).train()
        for module in trained.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0 if what == "no dropout" else 0.1
        models = contestants(trained, LEVELS if part == TRAINING else (MODEL,))
        calls = {name: partial(train, m, batch.inputs, grad) for name, m in models.items()}
        difference = None
        if what == "no dropout":
            results = {name: partial(_outputs_and_gradients, calls[name], m, batch) for name, m in models.items()}
            difference = verify(results, truth(trained, batch, grad))
        else:
            for call in calls.values():
                call()
        yield row(part, title, str(batch), 1 / batch.fill, contest(calls, limits), Judged(), difference)


def _outputs_and_gradients(call: Callable[[], Tensor], model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return {"output": call()[batch.valid], **gradients(model)}


def bench_encode(documents: list[str], limits: Limits, levels: tuple[str, ...] = LEVELS) -> dict[str, Any]:
    texts = random.Random(0).sample(documents, DOCUMENTS)
    models = contestants(sentence_transformer(), levels)
    calls = {name: partial(m.encode, texts, batch_size=32, show_progress_bar=False) for name, m in models.items()}
    masks: list[Tensor] = []  # of the batches that `encode` really makes
    hook = models[BEFORE][0].register_forward_pre_hook(lambda _, args: masks.append(args[0]["attention_mask"]))
    vectors = {name: call() for name, call in calls.items()}
    hook.remove()
    tokens, slots = sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks)
    difference = {name: _short(abs(found - vectors[BEFORE]).max()) for name, found in vectors.items() if name != BEFORE}
    assert max(difference.values()) <= SAME_VECTORS, f"vectors differ: {difference}"
    batch = f"{len(masks)} batches sorted by length, fill {tokens / slots:.2f}"
    return row(ENCODE, f"{DOCUMENTS} docstrings", batch, slots / tokens, contest(calls, limits), Judged({MODEL: ENCODE_GOAL}), difference)


def bench_audio(kind: str, layers: int, clips: int, limits: Limits) -> Iterator[dict[str, Any]]:
    """The whole model, with its front end timed beside it, and the transformer alone."""
    model = speech(kind, layers)
    batch = waves(model, SPEECH[:clips])
    exact = truth(model, batch)
    models = contestants(model)
    hidden = _front_end(model, batch)
    name = f"{kind}, {layers} layers"

    parts = {level: partial(_transformer, m, hidden, batch.valid) for level, m in models.items()}
    difference = verify({level: partial(_outputs, call, batch) for level, call in parts.items()}, exact)
    yield row(AUDIO, f"{name}, transformer", str(batch), 1 / batch.fill, contest(parts, limits), Judged(), difference)

    wholes: dict[str, Callable[[], Tensor]] = {level: partial(evaluate, m, batch.inputs) for level, m in models.items()}
    difference = verify({level: partial(_outputs, call, batch) for level, call in wholes.items()}, exact)
    # Attention level is left out: it differs from before in the transformer only, and a round takes many seconds.
    timed: dict[str, Callable[[], object]] = {BEFORE: wholes[BEFORE], MODEL: wholes[MODEL], FRONT: partial(_front_end, model, batch)}
    timings = contest(timed, limits)
    front = timings[FRONT].seconds / timings[BEFORE].seconds
    by_token = 1 / (front + (1 - front) * batch.fill)  # the convolutions of the front end stay padded
    yield row(AUDIO, f"{name}, whole", str(batch), by_token, timings, Judged(), difference)


def _front_end(model: Any, batch: Batch) -> Tensor:
    """Convolutions and the projection behind them, ``(B, frames, D)``."""
    with torch.no_grad():
        features = model.feature_projection(model.feature_extractor(batch.inputs["input_values"]).transpose(1, 2))
    hidden: Tensor = features[0] if isinstance(features, tuple) else features
    return hidden


def _transformer(model: Any, hidden: Tensor, valid: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.encoder(hidden, attention_mask=valid).last_hidden_state
    return out


class Stack(nn.Module):
    """torch's, called as a model of transformers."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.encoder(hidden, src_key_padding_mask=attention_mask == 0))


def bench_enable(what: str, limits: Limits) -> dict[str, Any]:
    """One forward, and `enable` with `disable`, which is a hundredth of it."""
    layers, width = ENABLED[what]
    mask = (torch.arange(32) < torch.tensor([32, 20, 12, 7])[:, None]).long()
    torch.manual_seed(0)
    if what.startswith("BERT"):
        model, given = bert(layers, width), {"input_ids": torch.randint(5, 1000, mask.shape) * mask}
    else:
        model, given = Stack(layers, width).eval(), {"hidden": torch.randn(*mask.shape, width)}
    batch = Batch({**given, "attention_mask": mask}, mask.bool())
    calls = {name: partial(evaluate, m, batch.inputs) for name, m in contestants(model, (MODEL,)).items()}
    difference = verify({name: partial(_outputs, call, batch) for name, call in calls.items()}, truth(model, batch))

    def enabling() -> None:
        varlen_attn.enable(model)
        varlen_attn.disable(model)

    enabling()  # whatever is imported and looked up once
    timings = contest({BEFORE: calls[BEFORE], ENABLING: enabling}, limits)
    forward = timings[BEFORE].seconds
    judged = Judged({ENABLING: forward / max(forward, ENABLE_LIMIT)})
    return row(ENABLE, what, str(batch), 1 / batch.fill, timings, judged, difference)


ENABLED = {
    "BERT, 6 layers, width 384": (6, 384),
    "BERT, 12 layers, width 768": (12, 768),
    "nn.TransformerEncoder, 12 layers, width 768": (12, 768),
}


# -------------------------------------------------------------------- command line


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    limits = Limits(budget=options.budget)
    if {TEXT, ENCODE, TRAINING} & set(options.part):
        documents, model = library(), minilm()
        batch = natural_order(documents, 0.5)
    if TEXT in options.part:
        fuller, equal = natural_order(documents, 0.9), equal_lengths(documents)
        yield from bench_text(model, {"natural order": batch, "natural order, fuller": fuller, "no padding": equal}, limits)
    if ENCODE in options.part:
        yield bench_encode(documents, limits)
    if TRAINING in options.part:
        yield from bench_training(model, batch, limits)
    if AUDIO in options.part:
        for kind in options.kind:
            for layers in options.layers:
                yield from bench_audio(kind, layers, options.clips, limits)
    if SHAPES in options.part:
        yield from bench_shapes(limits)
    if ENABLE in options.part:
        yield from (bench_enable(what, limits) for what in ENABLED)


def demo() -> None:
    """About a minute: one batch, and `encode`. Nothing is written."""
    facts = environment()
    print(f"varlen_attn {facts['varlen_attn']} on torch {facts['torch']}, {facts['cpu']}, {facts['threads']} threads")
    documents, model = library(), minilm()
    print(f"MiniLM with its published weights, and {len(documents)} docstrings of Python's standard library.\n")
    enabled = copy.deepcopy(model)
    print(f"print(enable(model)):\n\n{varlen_attn.enable(enabled)}\n")
    limits = Limits(rounds=3, budget=0)
    batch = natural_order(documents, 0.5)
    for found in bench_text(model, {"natural order": batch}, limits):
        _say("One batch of 32 in natural order", found)
    found = bench_encode(documents, limits, (MODEL,))
    _say(f"SentenceTransformer.encode of {DOCUMENTS} docstrings, tokenising included", found)


def _say(title: str, found: dict[str, Any]) -> None:
    print(f"{title} ({found['batch']}).\nMilliseconds, and how many times faster:\n")
    names = {BEFORE: "before (sdpa)", ATTENTION: 'enable(model, "attention")', MODEL: "enable(model)", AGAIN: "before, again: the noise"}
    for name, taken in found["milliseconds"].items():
        times = "" if name == BEFORE else f"{found['ratio'][name]:6.2f}"
        print(f"  {names[name]:28} {taken:9.1f} {times}")
    print(f"\n  {found['by_token']:.2f} positions for each token. Largest difference of results: {max(found['difference'].values()):.1e}.")
    if found["foreign"] > BUSY:
        print("  Other processes were busy, and they disturb threads that wait for each other: the times are unsure.")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="one batch and `encode`, few rounds, about a minute; writes nothing")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--kind", nargs="+", choices=["wav2vec2", "hubert"], default=["wav2vec2", "hubert"])
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 12], help="of Wav2Vec2 and HuBERT")
    parser.add_argument("--clips", type=int, default=CLIPS, help=f"recordings in a batch, at most {len(SPEECH)}")
    parser.add_argument("--threads", type=int, help="1 is timed by CPU time, more by the wall clock; 2, in the demo what torch takes")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds for one row; never fewer than 5 rounds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or (torch.get_num_threads() if options.demo else 2))
    if options.demo:
        demo()
        return
    for found in rows(options):
        save("transformers", [found], ("threads", "part", "what"))
        shown = (found["milliseconds"], "ratios", found["ratio"], "by token", found["by_token"], "others", found["foreign"])
        print(f"{found['part']:9} {found['what']}:", *shown, flush=True)
    print("written: benchmarks/results/transformers.json")


if __name__ == "__main__":
    main()
