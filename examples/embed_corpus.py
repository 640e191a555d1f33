"""Vectors of a corpus by one actor class: in processes of one machine, in actors of Ray Data, or in Spark.

    python -m examples.embed_corpus texts.parquet vectors/ --model sentence-transformers/all-MiniLM-L6-v2 --workers 2
    python -m examples.embed_corpus texts.parquet vectors/ --model sentence-transformers/all-MiniLM-L6-v2 --workers 2 --ray

Results are written in parts, each under its name only when it is whole. A run leaves out ids that earlier runs have written: after a kill,
start it again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

Block = Mapping[str, Any]  # columns: "id", and "text" or "vector"
Rows = Callable[[], Iterable[tuple[Any, str]]]  # ids and texts, from the start at each call


# ---------------------------------------------------------------- where vectors go


class Parts:
    """A folder of results. Subclasses say how a file is written and read.

    Every process of a run sees the same folder, and one run at a time writes to it.
    """

    suffix: str

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()  # actors may have another working directory
        self.folder.mkdir(parents=True, exist_ok=True)

    def files(self) -> list[Path]:
        """In the order of rows, where `embed_in_pool` wrote them."""
        return sorted(self.folder.glob(f"part-*{self.suffix}"))

    def ids(self) -> list[Any]:
        """Of all that is done."""
        ids = [x for file in self.files() for x in self.load(file, ["id"])["id"].tolist()]
        if len(set(ids)) < len(ids):
            raise ValueError(f"{self.folder}: some ids are there twice: do two runs write at once, or has the corpus an id twice?")
        return ids

    def write(self, columns: Block, row: int | None = None) -> None:
        """A part, whole or not at all. The same ids make the same name, so writing them again doubles nothing."""
        name = hashlib.sha256(repr(np.asarray(columns["id"]).tolist()).encode()).hexdigest()[:16]
        name = f"part-{name}" if row is None else f"part-{row:012d}-{name}"
        temporary = self.folder / f"{uuid.uuid4().hex}.unfinished"
        try:
            with temporary.open("wb") as file:
                self.save(file, columns)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / f"{name}{self.suffix}")
        finally:
            temporary.unlink(missing_ok=True)

    def begin(self, model: str, options: Mapping[str, Any]) -> list[Any]:
        """The ids that are done. Removes what killed processes left unfinished, and refuses vectors of another model."""
        for file in self.folder.glob("*.unfinished"):
            file.unlink()
        now = {"model": model, **{name: x for name, x in options.items() if name not in ("tokens", "threads", "prepack")}}
        about, ids = self.folder / "about.json", self.ids()
        if ids and (before := json.loads(about.read_text())) != now:
            raise ValueError(f"{self.folder} has vectors of {before}, and these would be of {now}: write to another folder")
        about.write_text(json.dumps(now))
        return ids

    def save(self, file: Any, columns: Block) -> None:
        raise NotImplementedError

    def load(self, file: Path, names: Sequence[str] = ("id", "vector")) -> dict[str, np.ndarray[Any, Any]]:
        raise NotImplementedError


class NumpyParts(Parts):
    suffix = ".npz"

    def save(self, file: Any, columns: Block) -> None:
        np.savez(file, id=np.asarray(columns["id"]), vector=np.asarray(columns["vector"]))

    def load(self, file: Path, names: Sequence[str] = ("id", "vector")) -> dict[str, np.ndarray[Any, Any]]:
        with np.load(file) as columns:
            return {name: columns[name] for name in names}


class ParquetParts(Parts):
    suffix = ".parquet"

    def save(self, file: Any, columns: Block) -> None:
        import pyarrow
        from pyarrow import parquet

        vectors = np.asarray(columns["vector"], np.float32)
        column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.ravel()), vectors.shape[1])
        parquet.write_table(pyarrow.table({"id": pyarrow.array(np.asarray(columns["id"])), "vector": column}), file)

    def load(self, file: Path, names: Sequence[str] = ("id", "vector")) -> dict[str, np.ndarray[Any, Any]]:
        from pyarrow import parquet

        table = parquet.read_table(file, columns=list(names))
        columns = {name: table[name].to_numpy() for name in names}
        return {name: np.stack(x) if name == "vector" else x for name, x in columns.items()}


def parquet_rows(path: str, id_column: str = "id", text_column: str = "text") -> Iterator[tuple[Any, str]]:
    """Of a file or a folder, in order, without holding them all."""
    from pyarrow import dataset

    for batch in dataset.dataset(path, format="parquet").to_batches(columns=[id_column, text_column]):
        yield from zip(batch[id_column].to_pylist(), batch[text_column].to_pylist(), strict=True)


# ---------------------------------------------------------------- the actor


class Embedder:
    """Loads a `SentenceTransformer` once, enables it, and embeds block after block.

    Args:
        model: what `SentenceTransformer` takes.
        parts: where vectors are written. Without it they are returned.
        tokens: of a batch, at most; a longer text is a batch of its own.
        threads: of torch in this process; None leaves their number.
        prepack: that of ``enable``, for large models on a CPU.
        options: for ``encode``, such as ``normalize_embeddings=True`` or ``prompt_name="document"``.
    """

    def __init__(
        self, model: str, parts: Parts | None = None, *, tokens: int = 4096, threads: int | None = None,
        prepack: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        import torch
        from sentence_transformers import SentenceTransformer

        from varlen_attn import enable

        if threads is not None:
            torch.set_num_threads(threads)
        self.model, self.parts, self.tokens, self.options = SentenceTransformer(model), parts, tokens, options
        enable(self.model, prepack=prepack)
        self.done = set(parts.ids() if parts else ())  # an actor that replaces a killed one leaves out what that one wrote

    def __call__(self, block: Block) -> dict[str, Any]:
        """Ids and vectors in the order of the block; ids only, where the vectors were written."""
        ids, texts = np.asarray(block["id"]), list(block["text"])
        if self.parts is None:
            return {"id": ids, "vector": self.encode(texts)}
        left = [i for i, x in enumerate(ids.tolist()) if x not in self.done]
        if left:
            self.parts.write({"id": ids[left], "vector": self.encode([texts[i] for i in left])}, block.get("row"))
            self.done.update(ids[left].tolist())
        return {"id": ids}

    def encode(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        """What ``model.encode(texts)`` gives, in batches by tokens."""
        encodings = self.model.tokenizer(list(texts), truncation=True, max_length=self.model.max_seq_length)
        sizes, vectors = [len(x) for x in encodings["input_ids"]], None
        for batch in by_tokens(sizes, self.tokens):
            found = self.model.encode([texts[i] for i in batch], batch_size=len(batch), show_progress_bar=False, **self.options)
            vectors = np.empty((len(texts), *found.shape[1:]), found.dtype) if vectors is None else vectors
            vectors[batch] = found
        if vectors is None:
            raise ValueError("there are no texts in this block")
        return vectors


def by_tokens(sizes: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of batches, neighbours in length together: attention computes no padding, but embeddings and pooling do."""
    batch: list[int] = []
    room = tokens
    for i in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        if batch and sizes[i] > room:
            yield batch
            batch, room = [], tokens
        batch.append(i)
        room -= sizes[i]
    if batch:
        yield batch


# ---------------------------------------------------------------- one machine

_embedder: Embedder


def _start(model: str, parts: Parts | None, options: dict[str, Any]) -> None:
    global _embedder  # noqa: PLW0603 - one for each worker process
    Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    _embedder = Embedder(model, parts, **options)


def _end_with(parent: Any) -> None:
    """Without its parent a worker would compute what has been handed out, beside the run that resumes."""
    parent.join()
    os._exit(1)


def _embed(block: Block) -> dict[str, Any]:
    return _embedder(block)


def pool(model: str, parts: Parts | None = None, *, workers: int, **options: Any) -> ProcessPoolExecutor:
    """Processes with an `Embedder` each, which `_embed` calls."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (model, parts, options))


def blocks(rows: Iterable[tuple[Any, str]], done: set[Any], size: int) -> Iterator[dict[str, Any]]:
    """Rows that are not done, in blocks of neighbours, so that the names of parts sort as rows do."""
    seen, block, start = set(), list[tuple[Any, str]](), 0
    for row, (key, text) in enumerate(rows):
        if key in seen:
            raise ValueError(f"id {key!r} comes twice in the corpus: give every row an id of its own")
        seen.add(key)
        if block and (key in done or len(block) == size):
            yield {"id": [x for x, _ in block], "text": [x for _, x in block], "row": start}
            block = []
        if key not in done:
            start = start if block else row
            block.append((key, text))
    if block:
        yield {"id": [x for x, _ in block], "text": [x for _, x in block], "row": start}


def embed_in_pool(rows: Rows, parts: Parts, model: str, *, workers: int = 2, size: int = 512, **options: Any) -> int:
    """How many rows were computed now. A worker that is killed is replaced, unless nothing was done since the last one was.

    Args:
        size: rows of a block, which is what a kill loses at most for each worker.
        options: of `Embedder`.
    """
    before = len(parts.begin(model, options))
    while True:
        done = set(parts.begin(model, options))
        progress = Progress(len(done))
        try:
            with pool(model, parts, workers=workers, **options) as processes:
                left, running = blocks(rows(), done, size), set[Future[Any]]()
                while running := running | {processes.submit(_embed, block) for block in islice(left, 2 * workers - len(running))}:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    progress.add(sum(len(future.result()["id"]) for future in finished))
            return len(parts.ids()) - before
        except BrokenProcessPool:
            if len(parts.ids()) == len(done):
                raise
            print("a worker was killed: its rows are computed again", flush=True)


class Progress:
    def __init__(self, before: int, every: float = 5.0) -> None:
        self.before, self.every, self.rows, self.began, self.printed = before, every, 0, time.monotonic(), 0.0
        if before:
            print(f"{before:,} rows were done before", flush=True)

    def add(self, rows: int) -> None:
        self.rows += rows
        now = time.monotonic()
        if now - self.printed >= self.every:
            self.printed = now
            print(f"{self.rows:,} rows now, {self.rows / (now - self.began):.1f} a second", flush=True)


# ---------------------------------------------------------------- Ray


def embed_with_ray(
    texts: Any, parts: Parts, model: str, *, workers: int = 2, size: int = 512, resources: Mapping[str, Any] | None = None, **options: Any
) -> int:
    """How many rows were computed now. Ray replaces actors that are killed, and gives them their blocks again.

    Args:
        texts: Parquet with the columns "id" and "text", or a dataset of Ray with these.
        resources: of an actor, such as ``{"num_gpus": 1}``; one CPU if left out.
    """
    import ray.data

    before = len(parts.begin(model, options))
    data = ray.data.read_parquet(texts).select_columns(["id", "text"]) if isinstance(texts, str) else texts
    actors: Any = data.map_batches(
        Embedder, fn_constructor_args=(model, parts), fn_constructor_kwargs=options, batch_size=size,
        compute=ray.data.ActorPoolStrategy(size=workers), **(resources or {"num_cpus": 1}),
    )  # fmt: skip
    progress = Progress(before)
    for found in actors.iter_batches(batch_size=None):
        progress.add(len(found["id"]))
    now, rows = len(parts.ids()), data.count()
    if now != rows:
        raise ValueError(f"{parts.folder} holds {now} ids, and there are {rows} texts: is an id twice in the corpus, or was it changed?")
    return now - before


# ---------------------------------------------------------------- Spark


def for_spark(model: str, **options: Any) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """For ``mapInPandas``: a function of data frames with the columns "id" and "text". It loads the model once for each partition."""

    def embed(frames: Iterable[Any]) -> Iterator[Any]:
        embedder = Embedder(model, **options)
        for frame in frames:
            if len(frame):
                columns = embedder({"id": frame["id"].to_numpy(), "text": frame["text"]})
                yield type(frame)({"id": columns["id"], "vector": list(columns["vector"])})

    return embed


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="Parquet with the columns id and text: a file or a folder")
    parser.add_argument("out", help="a folder for Parquet with the columns id and vector")
    parser.add_argument("--model", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch")
    parser.add_argument("--rows", type=int, default=512, help="of a part")
    parser.add_argument("--threads", type=int, default=1, help="of a worker")
    parser.add_argument("--prepack", action="store_true", help="weights for a CPU, as enable(model, prepack=True)")
    parser.add_argument("--ray", action="store_true", help="actors of Ray instead of processes of this machine")
    args = parser.parse_args(argv)
    options: dict[str, Any] = {
        "workers": args.workers,
        "size": args.rows,
        "tokens": args.tokens,
        "threads": args.threads,
        "prepack": args.prepack,
    }
    if args.ray:
        count = embed_with_ray(args.corpus, ParquetParts(args.out), args.model, **options)
    else:
        count = embed_in_pool(partial(parquet_rows, args.corpus), ParquetParts(args.out), args.model, **options)
    print(f"{count:,} rows computed; {args.out} is complete")


if __name__ == "__main__":
    main()
