"""Lengths of real text and real speech: small committed tables of numbers, and how they were made. No text and no sound is kept.

``python -m benchmarks.lengths`` counts the text again, with the Python and the tokenizer that are installed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

__all__ = ["SPEECH_MILLISECONDS", "all_text", "frames", "text_batch"]

DATA = Path(__file__).parent / "data"
BATCHES, BATCH_SIZE, MAX_TOKENS = 16, 32, 512
_RATE, _KERNEL, _STRIDE = 16, 400, 320  # samples a millisecond; what one frame of Wav2Vec2's front end sees, and how far the next one is


def _table(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    return found


SPEECH_MILLISECONDS: tuple[int, ...] = tuple(_table("speech")["milliseconds"])


def frames(milliseconds: int) -> int:
    """Frames that Wav2Vec2, HuBERT and their like make of so much sound: one for 20 ms."""
    return (milliseconds * _RATE - _KERNEL) // _STRIDE + 1


def all_text() -> tuple[int, ...]:
    """Of all batches in the table."""
    return tuple(length for batch in _table("text")["batches"] for length in batch)


def text_batch() -> tuple[int, ...]:
    """Of the batches in the table, the one of median fill."""
    batches = sorted(_table("text")["batches"], key=lambda lengths: sum(lengths) / max(lengths))
    return tuple(batches[len(batches) // 2])


def count_text() -> dict[str, Any]:
    """The table of text: batches of neighbours, from evenly spread places of the library."""
    import platform

    from .inputs import library, minilm_tokenizer

    documents = library()
    starts = [i * (len(documents) - BATCH_SIZE) // (BATCHES - 1) for i in range(BATCHES)]
    tokenizer = minilm_tokenizer()
    tokens = [tokenizer(documents[start : start + BATCH_SIZE], truncation=True, max_length=MAX_TOKENS).input_ids for start in starts]
    made_by = (
        f"Tokens of docstrings of the standard library of Python {platform.python_version()}, in the order of its files: "
        f"{BATCHES} batches of {BATCH_SIZE} neighbours, from evenly spread places. Counted by BERT's tokenizer (WordPiece, uncased) with "
        f"its two special tokens, cut at {MAX_TOKENS}. Made by `python -m benchmarks.lengths`."
    )
    return {"made_by": made_by, "batches": [[len(ids) for ids in batch] for batch in tokens]}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    table = count_text()
    lines = ",\n  ".join(json.dumps(batch) for batch in table["batches"])
    text = f'{{\n "made_by": {json.dumps(table["made_by"])},\n "batches": [\n  {lines}\n ]\n}}\n'
    (DATA / "text.json").write_text(text)
    print("written: benchmarks/data/text.json")


if __name__ == "__main__":
    main()
