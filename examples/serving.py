"""Embeddings for many callers at once, from one `SentenceTransformer` on a CPU: requests are gathered into batches of so many tokens.

A packed batch takes the time of its tokens, whatever their lengths. So nothing is sorted, no length waits for another, and a batch is full
when it has enough tokens.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor

Request = tuple[Any, Future[Tensor]]  # what the tokenizer made of a text, and where its vector goes


class Server:
    """One thread that calls ``model`` in evaluation.

    Args:
        tokens: of a batch, at most; a longer text is a batch of its own.
        patience: seconds that a request waits for others, at most, while nothing else is computed.
        threads: of torch in a call; None leaves their number.
    """

    def __init__(self, model: Any, *, tokens: int = 2048, patience: float = 0.003, threads: int | None = None) -> None:
        self.model, self.tokens, self.patience, self.threads = model.eval(), tokens, patience, threads
        self.requests: SimpleQueue[Request | None] = SimpleQueue()
        self.thread = Thread(target=self._serve)
        self.thread.start()

    def submit(self, text: str) -> Future[Tensor]:
        """The vector of a text, later. For asyncio: ``await asyncio.wrap_future(server.submit(text))``."""
        future: Future[Tensor] = Future()
        self.requests.put((self.model.tokenizer(text, truncation=True), future))  # in the thread that asks
        return future

    def close(self) -> None:
        """Answers what has been submitted, and ends. Nothing may be submitted afterwards."""
        for _ in range(2):  # the first may end a batch, and the second is read where a batch begins
            self.requests.put(None)
        self.thread.join()

    def _serve(self) -> None:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        request = None
        while request := request or self.requests.get():
            batch, room, deadline = [request], self.tokens - _size(request), time.monotonic() + self.patience
            while (request := self._next(deadline)) and _size(request) <= room:
                batch.append(request)
                room -= _size(request)
            self._answer(batch)

    def _next(self, deadline: float) -> Request | None:
        try:
            return self.requests.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            return None

    @torch.inference_mode()
    def _answer(self, batch: list[Request]) -> None:
        wanted = [(encoding, future) for encoding, future in batch if future.set_running_or_notify_cancel()]
        if not wanted:
            return
        try:
            features = self.model.tokenizer.pad([encoding for encoding, _ in wanted], return_tensors="pt")
            vectors = self.model(dict(features))["sentence_embedding"]
        except Exception as error:  # every caller learns of it, and the thread goes on
            for _, future in wanted:
                future.set_exception(error)
        else:
            for (_, future), vector in zip(wanted, vectors, strict=True):
                future.set_result(vector)


def _size(request: Request) -> int:
    return len(request[0]["input_ids"])
