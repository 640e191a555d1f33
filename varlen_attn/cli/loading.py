"""What ``python -m varlen_attn compare`` works on: a model from a folder, a batch of texts; and where it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any


def loaded(folder: Path, texts: Sequence[str]) -> tuple[Any, Any]:
    """A model of sentence-transformers or transformers, and the batch that it is called with. Nothing is downloaded."""
    if (folder / "modules.json").exists():
        model = import_module("sentence_transformers").SentenceTransformer(str(folder), local_files_only=True)
        return model, (dict(model.preprocess(list(texts))),)
    library = import_module("transformers")
    tokenizer, config = (kind.from_pretrained(folder, local_files_only=True) for kind in (library.AutoTokenizer, library.AutoConfig))
    kind = getattr(library, next(iter(config.architectures or ()), ""), library.AutoModel)
    model = kind.from_pretrained(folder, local_files_only=True).eval()
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", sys.maxsize))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, dict(tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt"))


@contextmanager
def progress() -> Iterator[Callable[[str], object]]:
    """What is done now, on the error output: by tqdm if it is installed."""
    try:
        bar = import_module("tqdm").tqdm(bar_format="{desc} [{elapsed}]")
    except ImportError:
        yield lambda what: print(what, file=sys.stderr)  # noqa: T201 (a command line prints)
        return
    with bar:
        yield bar.set_description_str
