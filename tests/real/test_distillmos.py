"""Real weights in an `nn.TransformerEncoder`: DistillMOS, which rates the quality of speech (7 layers, width 200, 8 heads, post-norm).

`make real` installs the package, which has its weights inside, and runs this; `make test` does not.

The model itself has no padding mask. Its forward fills a short recording with silence up to 7.68 s, cuts a longer one into overlapping
segments of 7.68 s, and its command line takes one file at a time: the encoder always sees (segments, 384, 200) and there is nothing to
skip. So the whole model must give the same scores, and gains nothing. Padding arises where the encoder gets recordings of their own
lengths. That is the second half of this file: features of 16, each computed from its recording alone, as one padded batch with a mask.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import varlen_attn
from varlen_attn.testing import assert_within_budget, poison

pytestmark = pytest.mark.real

WEIGHTS = "b18b3ac60227267cfb91e5d00ce22cc7b73716fd92f269484da1446e27031a40"  # sha256
RATE = 16_000
FRAME = 320  # samples, 20 ms

# Frames of 16 recordings, as lengths of spoken prompts are: 1.5 s in the middle, 6 s at most. 68 % of the batch is padding.
LENGTHS = (299, 28, 57, 49, 138, 122, 54, 15, 91, 25, 93, 90, 77, 188, 171, 57)

# -------------------------------------------------------------------- the model, and what it listens to


@pytest.fixture(scope="module")
def sqa() -> types.ModuleType:
    """The module ``distillmos.sqa``. Its command line alone needs torchaudio, which is replaced by nothing for the import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))
        return pytest.importorskip("distillmos.sqa", reason="distillmos is not installed: run `make real`")


@pytest.fixture(scope="module")
def loaded(sqa: types.ModuleType) -> nn.Module:
    return sqa.ConvTransformerSQAModel().eval()


@pytest.fixture
def model(loaded: nn.Module) -> nn.Module:
    return copy.deepcopy(loaded)


@pytest.fixture
def encoder(model: nn.Module) -> nn.TransformerEncoder:
    return model.transformer_pool_attn.transformer.transformer_encoder


@pytest.fixture(scope="module")
def features(loaded: nn.Module) -> list[Tensor]:
    """What the encoder is given, ``(L, 200)`` for each recording: the model's steps before the encoder, without filling up."""
    head = loaded.transformer_pool_attn
    found = []
    with torch.no_grad():
        for seed, length in enumerate(LENGTHS):
            wave = speech(length * FRAME, seed)
            x = head.norm_input(loaded.cnn(wave[None] / wave.abs().max()))
            x = head.transformer.linear_proj(head.transformer.norm(x).mT)
            found.append((x + head.transformer.position_encoding.pe[:, :length])[0])
    return found


def speech(samples: int, seed: int) -> Tensor:
    """``(samples,)``: a gliding voice, coloured by three wandering formants, in syllables with pauses, in a quiet room."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(6, generator=generator) * 2 * math.pi
    time = torch.arange(samples) / RATE

    def swing(hertz: float, index: int) -> Tensor:
        return torch.sin(2 * math.pi * hertz * time + starts[index])

    pitch = 130 * (1 + 0.2 * swing(0.6, 0))
    harmonics = torch.arange(1, 31)[:, None]
    formants = (600 * (1 + 0.3 * swing(2.1, 1)), 1500 * (1 + 0.3 * swing(1.7, 2)), 2600 * (1 + 0.1 * swing(1.3, 3)))
    colour = sum(1 / (1 + ((harmonics * pitch - formant) / 100) ** 2) for formant in formants)
    voice = (colour * torch.sin(2 * math.pi * harmonics * (pitch / RATE).cumsum(0))).sum(0)
    syllables = swing(2.5, 4).clamp(min=0) * (0.6 + 0.4 * swing(0.4, 5))
    return 0.1 * voice * syllables + 0.004 * torch.randn(samples, generator=generator)


def padded(features: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """``(B, S, D)`` and its key padding mask."""
    x = pad_sequence(features, batch_first=True, padding_side=side)
    mask = torch.arange(x.shape[1]) >= torch.tensor([len(f) for f in features])[:, None]
    return x, mask if side == "right" else mask.flip(1)


def as_it_comes(module: nn.Module, *args: Any, **options: Any) -> Tensor:
    """The result of torch's own classes, which warn that their fast path makes a nested tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        return module(*args, **options)


def without_fast_path(module: nn.Module, *args: Any, **options: Any) -> Tensor:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return module(*args, **options)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# -------------------------------------------------------------------- the whole model


def test_the_weights_are_the_published_ones(sqa: types.ModuleType) -> None:
    assert hashlib.sha256(Path(sqa.DEFAULT_WEIGHTS_CHKPT).read_bytes()).hexdigest() == WEIGHTS


def test_everything_is_enabled_and_comes_back(model: nn.Module) -> None:
    before = [type(module) for module in model.modules()]
    report = varlen_attn.enable(model)
    assert [m.kind for m in report.converted] == ["TransformerEncoder", *["TransformerEncoderLayer", "MultiheadAttention"] * 7]
    assert report.left_alone == ()
    assert {m.reason for m in report.modules} == {""}
    assert len(varlen_attn.disable(model).modules) == 15
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize(("seconds", "segments"), [(2.5, 1), (7.68, 1), (8.5, 2)])
def test_scores(model: nn.Module, seconds: float, segments: int) -> None:
    waves = torch.stack([speech(int(seconds * RATE), seed) for seed in (0, 1)])
    with torch.no_grad():
        naive = model(waves)
        truth = copy.deepcopy(model).double()(waves.double())
        for level in ("model", "attention"):
            with varlen_attn.enabled(model, level), varlen_attn.record() as log:
                scores = model(waves)
            assert_within_budget(scores, truth, naive, what=level)
            assert len(log.calls) == 7
            assert {(call.rows, call.slots) for call in log.calls} == {(2 * segments * 384, 2 * segments * 384)}
        assert torch.equal(model(waves), naive)


def test_noise_lowers_the_score(model: nn.Module) -> None:
    """The weights do what they are for, and do it enabled."""
    varlen_attn.enable(model)
    wave = speech(6 * RATE, 0)
    noise = 3 * wave.std() * torch.randn(len(wave), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        clean, noisy = model(torch.stack([wave, wave + noise])).flatten()
    assert 1 < noisy < clean - 0.5 < 4.5


def test_fine_tuning(model: nn.Module) -> None:
    """One step as its documentation has it: segments of 7.68 s, batch norm in training mode, gradients of everything."""
    model.train().segmenting_in_forward = False
    waves = torch.stack([speech(384 * FRAME, seed) for seed in (0, 1)])

    def step(model: nn.Module, waves: Tensor) -> dict[str, Tensor]:
        ((model(waves) - torch.tensor([[4.0], [2.0]])) ** 2).mean().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    ours, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    varlen_attn.enable(ours)
    naive, truth, out = step(model, waves), step(exact, waves.double()), step(ours, waves)
    for name in naive:
        assert_within_budget(out[name], truth[name], naive[name], gradient=True, what=name)


# -------------------------------------------------------------------- its encoder, on a padded batch


def test_the_batch_is_two_thirds_padding(features: list[Tensor]) -> None:
    x, mask = padded(features, "right")
    assert x.shape == (16, 299, 200)
    assert 0.67 < mask.double().mean() < 0.69


@pytest.mark.parametrize("level", ["model", "attention"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_valid_positions(encoder: nn.TransformerEncoder, features: list[Tensor], side: str, level: str) -> None:
    """Against every recording alone in float64; NaN at padding shows that it is not read."""
    x, mask = padded(features, side)
    exact = copy.deepcopy(encoder).double()
    with torch.no_grad():
        truth = torch.cat([exact(f.double()[None])[0] for f in features])
        for torchs in (as_it_comes, without_fast_path):
            naive = torchs(encoder, x, src_key_padding_mask=mask)
            with varlen_attn.enabled(encoder, level), varlen_attn.record() as log:
                out = encoder(x if level == "attention" else poison(x, mask), src_key_padding_mask=mask)
            assert_within_budget(out[~mask], truth, naive[~mask])
    assert {(call.backend, call.rows, call.slots) for call in log.calls} == {("cpu", sum(LENGTHS), mask.numel())}
    assert level == "attention" or not out[mask].any()


@pytest.mark.parametrize("level", ["model", "attention"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_gradients(encoder: nn.TransformerEncoder, features: list[Tensor], side: str, training: bool, level: str) -> None:
    """Of the input and of all weights. Its dropout is 0, so that training can be compared."""
    encoder.train(training)
    x, mask = padded(features, side)
    weights = torch.randn(sum(LENGTHS), 200, generator=torch.Generator().manual_seed(0))

    def gradients(encoder: nn.Module, out: Tensor) -> dict[str, Tensor]:
        (out * weights.to(out.dtype)).sum().backward()
        return {name: p.grad for name, p in encoder.named_parameters()}

    def of_batch(encoder: nn.Module) -> dict[str, Tensor]:
        leaf = x.clone().requires_grad_()
        found = gradients(encoder, encoder(leaf, src_key_padding_mask=mask)[~mask])
        assert not leaf.grad[mask].any()
        return {"input": leaf.grad[~mask], **found}

    exact, ours = copy.deepcopy(encoder).double(), copy.deepcopy(encoder)
    varlen_attn.enable(ours, level)
    leaves = [f.double().requires_grad_() for f in features]
    truth = gradients(exact, torch.cat([exact(leaf[None])[0] for leaf in leaves]))
    truth["input"] = torch.cat([leaf.grad for leaf in leaves])
    naive, out = of_batch(encoder), of_batch(ours)
    for name in truth:
        assert_within_budget(out[name], truth[name], naive[name], gradient=True, what=name)


# -------------------------------------------------------------------- time


@pytest.fixture(params=sorted({1, os.cpu_count() or 1}))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_time(model: nn.Module, features: list[Tensor], threads: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints a table; the results were compared above. Undisturbed, skipping two thirds of the work is faster than either way of torch."""
    from benchmarks.measure import QUIET, environment, interleave, ratio  # not in a source distribution

    fast = copy.deepcopy(model)
    varlen_attn.enable(fast)
    theirs, ours = (m.transformer_pool_attn.transformer.transformer_encoder for m in (model, fast))
    x, mask = padded(features, "right")
    wave = speech(int(2.5 * RATE), 0)[None]

    def step(encoder: nn.Module) -> None:
        encoder.zero_grad()
        encoder(x, src_key_padding_mask=mask).sum().backward()

    contests: dict[str, dict[str, Callable[[], object]]] = {
        "evaluation": {
            "torch": lambda: as_it_comes(theirs, x, src_key_padding_mask=mask),
            "fast path off": lambda: without_fast_path(theirs, x, src_key_padding_mask=mask),
            "enabled": lambda: ours(x, src_key_padding_mask=mask),
        },
        "training step": {"torch": lambda: step(theirs), "enabled": lambda: step(ours)},
        "whole model, 2.5 s filled up to 7.68 s": {"torch": lambda: model(wave), "enabled": lambda: fast(wave)},
    }
    facts = environment()
    lines = [f"\n{facts['cpu']}, torch {facts['torch']}, threads {threads}: ms, and how many times faster enabled is"]
    ratios = {}
    for name, contestants in contests.items():
        for module in (model, fast):
            module.train(name == "training step")
        with torch.set_grad_enabled(name == "training step"):
            times = interleave(contestants, rounds=5, budget=10)
        others = {who: ratio(timing, times["enabled"]) for who, timing in times.items() if who != "enabled"}
        disturbed = times["enabled"].foreign > QUIET  # never with one thread, whose own CPU time counts
        cells = [f"{who} {times[who].seconds * 1e3:.0f} ({others[who]:.2f})" for who in others]
        lines.append(f"  {name}: {', '.join(cells)}, enabled {times['enabled'].seconds * 1e3:.0f}{'  (disturbed)' if disturbed else ''}")
        if not disturbed:
            ratios[name] = min(others.values())
    with capsys.disabled():
        sys.stdout.write("\n".join(lines) + "\n")
    for name in ("evaluation", "training step"):
        assert name not in ratios or ratios[name] > 1, name
