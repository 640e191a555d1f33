"""What the lanes beside ``make test`` found, as numbers: one JSON file, a part for each lane."""

from __future__ import annotations

import json
from pathlib import Path


def note(file: str | Path, lane: str, **figures: object) -> None:
    """Writes the part of ``lane``, and leaves the others."""
    path = Path(file)
    data = json.loads(path.read_text()) if path.exists() else {}
    data[lane] = figures
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
