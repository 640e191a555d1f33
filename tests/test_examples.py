"""The scripts of `examples/`, with tiny sizes: both trainings are the same training, and the scripts would notice if they were not."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples import _compare, serving, train_audio_classifier, train_text_classifier
from varlen_attn import SeqLayout, disable, varlen_attention
from varlen_attn.convert import classes

ROOT = Path(__file__).parent.parent
Main = Callable[[Sequence[str]], None]
each_script = pytest.mark.parametrize("main", [train_text_classifier.main, train_audio_classifier.main], ids=["text", "audio"])


@each_script
@pytest.mark.parametrize("seed", range(3))
def test_losses_agree(main: Main, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--seed", str(seed)])
    text = capsys.readouterr().out
    assert "The same training" in text
    assert 0 < float(re.search(r"fill (\d\.\d+)", text)[1]) < 0.9  # type: ignore[index]
    steps = re.findall(r"^ +\d+ +([\d.]+) +([\d.]+) +\S+ +\d+ +\d+$", text, flags=re.MULTILINE)
    assert len(steps) == 3
    assert len({padded for padded, _ in steps}) == 3  # it trains


def test_every_attention_of_the_text_classifier_is_converted(capsys: pytest.CaptureFixture[str]) -> None:
    train_text_classifier.main(["--quick"])
    assert "left alone" not in capsys.readouterr().out


# ---------------------------------------------------------------- mutants: each breaks the packed training only


def nothing_is_padding(patch: pytest.MonkeyPatch) -> None:
    forward = classes.EnabledTransformerEncoder.forward
    patch.setattr(classes.EnabledTransformerEncoder, "forward", lambda self, x, **masks: forward(self, x))


def one_layer_is_skipped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(classes.EnabledTransformerEncoderLayer, "forward", lambda self, x, **masks: x)


def means_ignore_the_layout(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SeqLayout, "pool", lambda self, x, how: x.mean(0, keepdim=True).expand(self.num_seqs, *x.shape[1:]))


def sums_instead_of_means(patch: pytest.MonkeyPatch) -> None:
    pool = SeqLayout.pool
    patch.setattr(SeqLayout, "pool", lambda self, x, how: pool(self, x, "sum") / (self.num_rows / self.num_seqs))


def labels_go_to_other_utterances(patch: pytest.MonkeyPatch) -> None:
    seq_ids: Any = SeqLayout.seq_ids
    patch.setattr(SeqLayout, "seq_ids", property(lambda self: self.num_seqs - 1 - seq_ids.fget(self)))


def rows_attend_to_all_rows(patch: pytest.MonkeyPatch) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, layout: SeqLayout) -> Any:
        return varlen_attention(q, k, v, SeqLayout.from_lengths([layout.num_rows]))

    patch.setattr(train_audio_classifier, "varlen_attention", attention)


def convolutions_see_other_utterances(patch: pytest.MonkeyPatch) -> None:
    def conv1d(conv: nn.Conv1d, rows: Tensor, layout: SeqLayout) -> tuple[Tensor, SeqLayout]:
        after = layout.downsample(conv.kernel_size[0], conv.stride[0], int(conv.padding[0]))
        rows = nn.functional.pad(rows, (0, 0, 0, conv.stride[0] * layout.num_seqs))  # enough frames for all utterances
        return conv(rows.T[None])[0].T[: after.num_rows], after

    patch.setattr(train_audio_classifier, "varlen_conv1d", conv1d)


def bias_is_left_at_padding(patch: pytest.MonkeyPatch) -> None:
    unpack = SeqLayout.unpack
    patch.setattr(SeqLayout, "unpack", lambda self, x: unpack(self, x, 1e-2))


@pytest.mark.parametrize(
    ("main", "break_it"),
    [
        (train_text_classifier.main, nothing_is_padding),
        (train_text_classifier.main, one_layer_is_skipped),
        (train_audio_classifier.main, means_ignore_the_layout),
        (train_audio_classifier.main, sums_instead_of_means),
        (train_audio_classifier.main, labels_go_to_other_utterances),
        (train_audio_classifier.main, rows_attend_to_all_rows),
        (train_audio_classifier.main, convolutions_see_other_utterances),
        (train_audio_classifier.main, bias_is_left_at_padding),
    ],
    ids=lambda x: x.__name__,
)
def test_a_broken_packed_training_fails(
    main: Main, break_it: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(monkeypatch)
    with pytest.raises(AssertionError, match=r"losses: error .* is above the budget"):
        main(["--quick"])


# ---------------------------------------------------------------- as commands


def test_run_as_a_file_and_as_a_module() -> None:
    """Both ways to start a script, and the memory that a subprocess measures."""
    arguments = _compare.arguments("A script.", ["--quick", "--threads", "1"], steps=1)
    script = str(ROOT / "examples" / "train_text_classifier.py")
    file = _compare.measure_memory(script, arguments, "packed")
    assert (file is not None and file > 0) == Path("/proc/self/clear_refs").exists()
    module = [sys.executable, "-m", "examples.train_audio_classifier", "--quick", "--steps", "1"]
    assert "The same training" in subprocess.run(module, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_the_padded_model_stays_torchs() -> None:
    """What the packed training is compared with has nothing of ours in it."""
    torch.manual_seed(0)
    model = train_text_classifier.TextClassifier(train_text_classifier.QUICK)
    assert disable(model).modules == ()
    assert not any(type(m).__module__.startswith("varlen_attn") for m in model.modules())


def test_the_readme_names_every_script() -> None:
    readme = (ROOT / "examples" / "README.md").read_text()
    scripts = {path.stem for path in (ROOT / "examples").glob("train_*.py")}
    assert set(re.findall(r"^python -m examples\.(\w+)$", readme, flags=re.MULTILINE)) == scripts


# ---------------------------------------------------------------- a service


class Words:
    """In place of a `SentenceTransformer`: a text is so many tokens as it has words, and its vector is their number."""

    def __init__(self) -> None:
        self.tokenizer, self.batches, self.go = self, list[list[int]](), threading.Event()

    def eval(self) -> Words:
        return self

    def __call__(self, given: Any, **options: Any) -> Any:
        if isinstance(given, str):
            return {"input_ids": given.split()}
        assert self.go.wait(10)
        self.batches.append(given["sizes"])
        if 13 in given["sizes"]:
            raise ValueError("unlucky")
        return {"sentence_embedding": torch.tensor(given["sizes"])}

    def pad(self, encodings: list[dict[str, list[str]]], return_tensors: str) -> dict[str, list[int]]:
        return {"sizes": [len(encoding["input_ids"]) for encoding in encodings]}


def served(sizes: Sequence[int], **options: Any) -> tuple[Words, list[Any]]:
    """What the model was called with, and the answers; all that came while the first batch was computed."""
    model = Words()
    server = serving.Server(model, **options)
    answers = [server.submit("word " * size) for size in sizes]
    model.go.set()
    server.close()
    return model, answers


def test_a_service_answers_all_in_batches_of_tokens() -> None:
    model, answers = served([4, 3, 2, 12, 1, 9, 5, 5], tokens=10, patience=1.0)
    assert model.batches == [[4, 3, 2], [12], [1, 9], [5, 5]]  # the second is longer than a batch
    assert [int(answer.result(0)) for answer in answers] == [4, 3, 2, 12, 1, 9, 5, 5]


def test_a_service_does_not_wait_for_more_than_its_patience() -> None:
    model = Words()
    model.go.set()
    server = serving.Server(model, tokens=10, patience=0.01)
    assert int(server.submit("one").result(10)) == 1
    assert int(server.submit("one two").result(10)) == 2
    server.close()
    assert model.batches == [[1], [2]]


def test_a_service_passes_errors_on_and_goes_on() -> None:
    _, answers = served([5, 13, 2], tokens=15, patience=1.0)
    assert int(answers[0].result(0)) == 5
    with pytest.raises(ValueError, match="unlucky"):
        answers[1].result(0)
    with pytest.raises(ValueError, match="unlucky"):
        answers[2].result(0)


def test_a_service_leaves_out_what_was_cancelled() -> None:
    model = Words()
    server = serving.Server(model, tokens=1, patience=0)
    answers = [server.submit("one"), server.submit("two"), server.submit("three")]
    assert answers[1].cancel()
    model.go.set()
    server.close()
    assert model.batches == [[1], [1]]
    assert int(answers[2].result(0)) == 1
