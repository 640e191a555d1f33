"""`examples/embed_corpus.py`: the vectors of `encode`, every row once, whatever is killed. Ray: test_embed_ray.py."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples import embed_corpus as corpus

pytest.importorskip("sentence_transformers")

ROOT = Path(__file__).parent.parent
ROWS = 60
TEXTS = [" ".join(random.Random(i).choices("abcdefgh", k=1 + i * i % 23)) for i in range(ROWS)]
IDS = [f"doc {(7 * i) % ROWS}" for i in range(ROWS)]  # their order is not that of names


def save_tiny_model(folder: Path) -> str:
    import transformers
    from sentence_transformers import SentenceTransformer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    SentenceTransformer(str(folder), device="cpu").save(str(folder / "sentences"))
    return str(folder / "sentences")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(model: str) -> np.ndarray[Any, Any]:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(model, device="cpu").encode(TEXTS)


def rows(ids: Sequence[Any] = IDS) -> Any:
    return lambda: zip(ids, TEXTS, strict=True)


def found(parts: corpus.Parts) -> tuple[list[Any], np.ndarray[Any, Any]]:
    loaded = [parts.load(file) for file in parts.files()]
    return [x for part in loaded for x in part["id"].tolist()], np.concatenate([part["vector"] for part in loaded])


def assert_equals(vectors: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    assert vectors.shape == expected.shape
    assert vectors.dtype == expected.dtype
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)


class KillingParts(corpus.NumpyParts):
    """The worker that has written the third part is killed, once, before it can say so; or its parent is."""

    def __init__(self, folder: Path, parent: bool = False) -> None:
        super().__init__(folder)
        self.parent = parent

    def write(self, columns: corpus.Block, row: int | None = None) -> None:
        super().write(columns, row)
        if len(self.files()) >= 3:
            try:
                (self.folder / "killed").touch(exist_ok=False)
            except FileExistsError:
                return
            os.kill(os.getppid() if self.parent else os.getpid(), signal.SIGKILL)


def test_by_tokens() -> None:
    assert list(corpus.by_tokens([4, 3, 12, 1, 9], 10)) == [[2], [4], [0, 1, 3]]
    assert list(corpus.by_tokens([], 10)) == []


def test_blocks_are_neighbours() -> None:
    made = list(corpus.blocks(enumerate("abcdefgh"), {2, 3}, 3))
    assert [block["id"] for block in made] == [[0, 1], [4, 5, 6], [7]]
    assert [block["row"] for block in made] == [0, 4, 7]
    assert "".join(x for block in made for x in block["text"]) == "abefgh"


@pytest.mark.parametrize("tokens", [1, 50, 10_000])
def test_vectors_are_those_of_encode(model: str, expected: np.ndarray[Any, Any], tokens: int) -> None:
    columns = corpus.Embedder(model, tokens=tokens)({"id": IDS, "text": TEXTS})
    assert columns["id"].tolist() == IDS
    assert_equals(columns["vector"], expected)


def test_options_are_those_of_encode(model: str, expected: np.ndarray[Any, Any]) -> None:
    vectors = corpus.Embedder(model, normalize_embeddings=True)({"id": IDS, "text": TEXTS})["vector"]
    assert_equals(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True))


@pytest.mark.slow
def test_a_pool_goes_on_when_a_worker_is_killed(
    model: str, expected: np.ndarray[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = KillingParts(tmp_path / "out")
    assert corpus.embed_in_pool(rows(), parts, model, workers=2, size=6, tokens=40, threads=1) == ROWS
    ids, vectors = found(parts)
    assert ids == IDS
    assert_equals(vectors, expected)
    printed = capsys.readouterr().out
    assert "a worker was killed" in printed
    assert "rows now" in printed
    written = {file: file.stat().st_mtime_ns for file in parts.files()}
    assert corpus.embed_in_pool(rows(), parts, model, workers=1, size=50) == 0
    assert written == {file: file.stat().st_mtime_ns for file in parts.files()}


def killed_run(model: str, folder: str) -> None:
    corpus.embed_in_pool(rows(), KillingParts(Path(folder), parent=True), model, workers=1, size=2, threads=1)


@pytest.mark.slow
def test_a_run_that_was_killed_resumes(model: str, expected: np.ndarray[Any, Any], tmp_path: Path) -> None:
    """Its worker ends as well, and does not write beside the next run."""
    program = f"from tests.test_embed_corpus import killed_run; killed_run({model!r}, {str(tmp_path)!r})"
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, timeout=200)  # until the worker closes its output as well
    assert run.returncode == -signal.SIGKILL, run.stderr
    parts = corpus.NumpyParts(tmp_path)
    before = parts.begin(model, {})
    assert 6 <= len(before) < ROWS
    embedder = corpus.Embedder(model, parts)
    for block in corpus.blocks(rows()(), set(before), 7):
        embedder(block)
    ids, vectors = found(parts)
    assert ids == IDS
    assert_equals(vectors, expected)


def test_what_is_done_is_left_out(model: str, expected: np.ndarray[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = corpus.NumpyParts(tmp_path)
    first = corpus.Embedder(model, parts)
    first({"id": IDS[10:20], "text": TEXTS[10:20], "row": 10})
    second, computed = corpus.Embedder(model, parts), list[str]()
    encode = second.encode
    monkeypatch.setattr(second, "encode", lambda texts: computed.extend(texts) or encode(texts))
    for block in (range(5, 15), range(15, 25), range(0, 10), range(20, ROWS), range(ROWS)):
        second({"id": [IDS[i] for i in block], "text": [TEXTS[i] for i in block]})
    assert sorted(computed) == sorted(TEXTS[:10] + TEXTS[20:])
    ids, vectors = found(parts)
    order = [ids.index(x) for x in IDS]
    assert len(ids) == ROWS
    assert_equals(vectors[order], expected)


def test_a_part_is_whole_or_not_there(tmp_path: Path) -> None:
    class Full(corpus.NumpyParts):
        def save(self, file: Any, columns: corpus.Block) -> None:
            file.write(b"half")
            raise OSError("no space left")

    columns = {"id": [1, 2], "vector": np.ones((2, 3), np.float32)}
    with pytest.raises(OSError, match="no space"):
        Full(tmp_path).write(columns)
    assert list(tmp_path.iterdir()) == []
    parts = corpus.NumpyParts(tmp_path)
    (tmp_path / "0.unfinished").write_bytes(b"half")
    for _ in range(2):  # a block that is given again, as after a kill
        parts.write(columns)
    assert parts.ids() == [1, 2]
    (tmp_path / "about.json").write_text('{"model": "m"}')
    assert parts.begin("m", {"tokens": 1}) == [1, 2]
    assert not list(tmp_path.glob("*.unfinished"))


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="id 3 comes twice in the corpus"):
        list(corpus.blocks([(3, "a"), (3, "b")], set(), 8))
    parts = corpus.NumpyParts(tmp_path)
    parts.begin("one", {"prompt_name": "document"})
    parts.write({"id": [1], "vector": np.ones((1, 2))})
    with pytest.raises(ValueError, match=r"has vectors of \{'model': 'one', 'prompt_name': 'document'\}.* another folder"):
        parts.begin("two", {})
    parts.write({"id": [1, 2], "vector": np.ones((2, 2))})
    with pytest.raises(ValueError, match="some ids are there twice"):
        parts.ids()
