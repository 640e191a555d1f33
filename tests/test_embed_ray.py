"""`examples/embed_corpus.py` with Ray Data on this machine, and its Parquet. `make test-ray` installs what these need, and runs them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples import embed_corpus as corpus

from .test_embed_corpus import IDS, ROWS, TEXTS, KillingParts, assert_equals, expected, found, model

ray = pytest.importorskip("ray", reason="`make test-ray` installs it")
pytest.importorskip("ray.data")
pa = pytest.importorskip("pyarrow")
pd = pytest.importorskip("pandas")
__all__ = ["expected", "model"]  # fixtures

ROOT = Path(__file__).parent.parent


class KillingParquet(corpus.ParquetParts, KillingParts):  # type: ignore[misc]
    """Parquet, with the kill."""

    suffix = corpus.ParquetParts.suffix


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # for the actors
    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 << 20,
        _node_ip_address="127.0.0.1",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """In three files with two row groups each."""
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("texts")
    for i in range(3):
        part = slice(i * ROWS // 3, (i + 1) * ROWS // 3)
        parquet.write_table(pa.table({"id": IDS[part], "text": TEXTS[part]}), folder / f"{i}.parquet", row_group_size=10)
    return str(folder)


def assert_complete(parts: corpus.Parts, expected: np.ndarray[Any, Any]) -> None:
    ids, vectors = found(parts)
    assert sorted(ids) == sorted(IDS)
    assert_equals(vectors[[ids.index(x) for x in IDS]], expected)


def test_ray_replaces_a_killed_actor(cluster: None, model: str, expected: np.ndarray[Any, Any], texts: str, tmp_path: Path) -> None:
    parts, data = KillingParquet(tmp_path), ray.data.read_parquet(texts, override_num_blocks=6)
    assert corpus.embed_with_ray(data, parts, model, workers=2, size=6, tokens=40, threads=1) == ROWS
    assert (tmp_path / "killed").exists()
    assert_complete(parts, expected)


def test_ray_goes_on_with_a_run(cluster: None, model: str, expected: np.ndarray[Any, Any], texts: str, tmp_path: Path) -> None:
    parts = corpus.ParquetParts(tmp_path)
    parts.begin(model, {})
    corpus.Embedder(model, parts)({"id": IDS[5:25], "text": TEXTS[5:25]})
    assert corpus.embed_with_ray(texts, parts, model, workers=2, size=8, threads=1) == ROWS - 20
    assert_complete(parts, expected)


def test_parquet_in_and_out_of_a_pool(model: str, expected: np.ndarray[Any, Any], texts: str, tmp_path: Path) -> None:
    corpus.main([texts, str(tmp_path), "--model", model, "--rows", "8", "--tokens", "64"])
    ids, vectors = found(corpus.ParquetParts(tmp_path))
    assert ids == IDS
    assert_equals(vectors, expected)


def test_the_function_for_spark(model: str, expected: np.ndarray[Any, Any]) -> None:
    frames = [pd.DataFrame({"id": IDS[part], "text": TEXTS[part]}) for part in (slice(0, 25), slice(0, 0), slice(25, ROWS))]
    made = pd.concat(corpus.for_spark(model, tokens=64)(frames))
    assert made["id"].tolist() == IDS
    assert_equals(np.stack(made["vector"].tolist()), expected)
